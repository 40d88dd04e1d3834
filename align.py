"""From a text predictor to an assistant: instructions, preferences, and learning from one's own answers.

A pretrained model goes on with a text. Shown conversations and trained on the assistant's words only (SFT),
it answers. Shown which of two answers is better, it learns to tell (reward model) or to write the better one
(DPO), held near the model it began as (the reference). Or it writes answers itself, has them scored, and
makes the better ones likelier (PPO, GRPO). All works offline on the default data: a signature and a docstring
are the instruction, the function's body is the answer, and `ast` checks it; nobody has to label anything.

    python align.py data                                # instructions from the data folder's own modules
    python align.py sft                                 # out/python -> out/sft; --show-mask 3 shows targets
    python align.py pairs out/sft                       # its own answers, ranked by the checks
    python align.py dpo                                 # out/sft -> out/dpo, from data/pairs.jsonl
    python align.py reward                              # out/sft -> out/reward, from the same
    python align.py grpo                                # out/sft -> out/grpo, rewarded by the checks
    python align.py ppo --reward out/reward:0.1 --reward checks
    python align.py evaluate out/dpo --against out/sft  # --samples 8: pass@k, their vote; --reward: the best
    python align.py label out/sft                       # which of two answers do you prefer?

A model's text is parsed and compiled, never executed. Left out: images, answers written on other machines.

SFT and rankings: Ouyang et al. 2022 (2203.02155). DPO: Rafailov et al. 2023 (2305.18290); with noisy labels:
Mitchell 2023 (cDPO). IPO: Azar et al. 2023 (2310.12036). SimPO: Meng et al. 2024 (2405.14734). LoRA: Hu et
al. 2021 (2106.09685). PPO: Schulman et al. 2017 (1707.06347), for language models Ziegler et al. 2019
(1909.08593). GRPO: Shao et al. 2024 (2402.03300).
"""

import ast
import dataclasses
import difflib
import functools
import itertools
import json
import math
import os
import random
import re
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

from model import (  # before torch: it says how OpenMP's threads wait
    DTYPES, Linear, Ranks, Run, RunOptions, Tokens, Transformer, UserError, barrier, build_optimizer, check,
    clip_gradients, command, console, default_data, find_checkpoint, finish_save, generate, load_model,
    load_state, load_tokenizer, open_run, opt, pick_device, pick_dtype, progress, rank_and_world, render,
    run_app, save_checkpoint, save_files, say, seed_of, setup_distributed, sum_over_ranks, token_losses,
)
from model import evaluate as evaluate_text

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import typer

# B rows of a batch, T tokens of a row, n examples of a batch (a row holds several), N their trained tokens,
# V vocabulary, C n_embd.

# ---- The idea, I: a conversation as tokens, and whose words are trained ------------------------------------

class Example(NamedTuple):
    """Hold a conversation in tokens, as `model.render` gives it; trained: those that the assistant wrote."""

    ids: list[int]
    trained: list[bool]

def as_example(prompt: list[int], answer: list[int]) -> Example:
    return Example(prompt + answer, [False] * len(prompt) + [True] * len(answer))

def pack(lengths: list[int], T: int) -> list[list[int]]:
    """Choose which texts share a row of T tokens: first fit, the longest first.

    >>> pack([3, 5, 2, 4], 8)
    [[1, 0], [3, 2]]
    """
    rows, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, left in enumerate(room) if left >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(T)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows

def trunk_length(examples: list[Example]) -> int:
    """Count the tokens with which all answers to one prompt begin, up to the first that is trained.

    >>> trunk_length([Example([5, 6, 7], [False, False, True]), Example([5, 6, 8], [False, False, True])])
    2
    """
    if len(examples) == 1:
        return 0
    alike = len(os.path.commonprefix([e.ids for e in examples]))
    return min(alike, *(e.trained.index(True) for e in examples))

def tokens_in(examples: list[Example]) -> int:
    """Count the tokens that answers to one prompt take in a batch, where their trunk stands once."""
    return sum(len(e.ids) for e in examples) - (len(examples) - 1) * trunk_length(examples)

def trained_tokens(examples: list[Example]) -> int:
    return sum(sum(e.trained[1:]) for e in examples)

class Batch(NamedTuple):
    """Hold n examples in rows. A trunk stands there once: each of its examples sees the trunk and itself."""

    ids: torch.Tensor  # (B, T)
    positions: torch.Tensor  # (B, T) in the example's own text; -1 is padding
    docs: torch.Tensor  # (B, T) number of the example; from n on: of a trunk
    trunks: torch.Tensor  # (B, T) number of the trunk that it goes on from
    at: torch.Tensor  # (N,) the place before each trained token, in the flattened rows; example after example
    targets: torch.Tensor  # (N,) these tokens
    owner: torch.Tensor  # (N,) the example of each
    last: torch.Tensor  # (n,) where each example ends, in the flattened rows
    lengths: torch.Tensor  # (n,) trained tokens of each

    def read(self, model, *targets, **more):
        """Let a model read the rows -> what it gives at the places that are asked for."""
        where = {"positions": self.positions, "doc_ids": self.docs, "trunk_ids": self.trunks}
        return model(self.ids, *targets, **where, **more)[0]

def collate(items: list[list[Example]], T: int, device="cpu") -> Batch:
    """Lay the examples of all items, each the answers to one prompt, into rows of up to T tokens."""
    n = sum(map(len, items))
    firsts = list(itertools.accumulate(map(len, items), initial=0))  # number of each item's first example
    sizes = [tokens_in(item) for item in items]
    rows = pack(sizes, max(T, *sizes))
    T = max(sum(sizes[i] for i in row) for row in rows)
    cells = []  # (id, position, document, trunk) of each place, row after row
    places = [[]] * n  # where each example's tokens stand
    for row in rows:
        for i in row:
            shared = trunk_length(items[i])
            trunk = range(len(cells), len(cells) + shared)
            cells += [(token, p, n + i, n + i) for p, token in enumerate(items[i][0].ids[:shared])]
            for k, example in enumerate(items[i], firsts[i]):
                places[k] = [*trunk, *range(len(cells), len(cells) + len(example.ids) - shared)]
                cells += [(token, p, k, n + i) for p, token in enumerate(example.ids[shared:], shared)]
        cells += [(0, -1, -1, -1)] * (-len(cells) % T)
    at, targets, lengths = [], [], []
    for where, example in zip(places, itertools.chain(*items), strict=True):
        asked = [j for j in range(1, len(example.ids)) if example.trained[j]]
        at += [where[j - 1] for j in asked]
        targets += [example.ids[j] for j in asked]
        lengths.append(len(asked))
    lists = (at, targets, np.repeat(np.arange(n), lengths), [where[-1] for where in places], lengths)
    tensors = [torch.as_tensor(values, dtype=torch.long) for values in lists]
    columns = torch.tensor(cells).view(len(rows), T, 4).unbind(-1)
    return Batch(*(t.to(device) for t in (*columns, *tensors)))

def sum_by_example(values, batch: Batch):
    """Add up the trained tokens' values of each example: (N,) -> (n,)."""
    return torch.zeros(len(batch.last), device=values.device).index_add(0, batch.owner, values)

def logps(model, batch: Batch):
    """Compute log p(the assistant's words | the rest) of each example: (n,), float32."""
    return sum_by_example(-batch.read(model, batch.targets, at=batch.at), batch)

def scores(model, batch: Batch):
    """Read the score head at the last token of each example: (n,), float32."""
    return batch.read(model, at=batch.last)

# ---- The idea, II: losses on preferences -------------------------------------------------------------------

# chosen, rejected (n,): log p(answer) of the policy minus that of the reference.

def dpo_loss(chosen, rejected, beta: float = 0.1, label_smoothing: float = 0.0):
    """Compute -log sigmoid(beta * margin) (2305.18290, eq. 7): the policy shall prefer the chosen answer by
    more than the reference does. ln 2 at the start, where policy and reference are one.

    label_smoothing: the share of labels thought to be wrong (cDPO): the optimum is then a finite margin.

    >>> dpo_loss(torch.tensor([2.0]), torch.tensor([1.0]), beta=1.0).item()  # ln(1 + 1/e)
    0.31326...
    """
    h = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)

def ipo_loss(chosen, rejected, beta: float = 0.1):
    """Compute (margin - 1 / (2 beta))^2 (2310.12036, eq. 17), on means per token: a margin to reach.

    >>> ipo_loss(torch.tensor([2.0]), torch.tensor([1.0]), beta=0.25).item()
    1.0
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2

def simpo_loss(chosen, rejected, beta: float = 2.0, gamma: float = 1.0):
    """Compute -log sigmoid(beta * margin - gamma) (2405.14734, eq. 6), on means per token, no reference."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)

class Variant(NamedTuple):
    """Say how a preference loss takes log p: summed or a mean per token, beside the reference's or alone."""

    loss: Callable
    mean: bool
    reference: bool
    beta: float  # by default
    options: tuple[str, ...] = ()

VARIANTS = {
    "dpo": Variant(dpo_loss, False, True, 0.1, ("label_smoothing",)),
    "norm": Variant(dpo_loss, True, True, 0.1, ("label_smoothing",)),
    "ipo": Variant(ipo_loss, True, True, 0.1),
    "simpo": Variant(simpo_loss, True, False, 2.0, ("gamma",)),
}

def ranking_loss(ranked):
    """Compute -log sigmoid(better - worse), the mean over all pairs of a ranking (2203.02155, eq. 1).

    ranked (K,): scores of K answers, the best answer's first -> a number.

    >>> ranking_loss(torch.tensor([1.0, 0.0])).item()
    0.31326...
    """
    better, worse = torch.triu_indices(len(ranked), len(ranked), 1)
    return -F.logsigmoid(ranked[better] - ranked[worse]).mean()

def calibration_error(margins, bins: int = 10) -> float:
    """Compute the expected calibration error (1706.04599) of p(the chosen answer is better) =
    sigmoid(margin).

    It is the mean distance between p and how often it came true, over bins of p; pairs count both ways.

    >>> calibration_error(torch.tensor([20.0, 20.0, 20.0, -20.0]))  # quite sure, right three times in four
    0.25
    """
    p = torch.cat([margins, -margins]).sigmoid()
    right = torch.cat([torch.ones_like(margins), torch.zeros_like(margins)])
    cell = (p * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins).index_add(0, cell, p - right)
    return round(float(gaps.abs().sum()) / len(p), 6)

# ---- The idea, III: LoRA -----------------------------------------------------------------------------------

class LoRA(Linear):
    """Compute W x + (alpha / r) B A x with W frozen (2106.09685, eq. 3). B is zero at first."""

    def __init__(self, linear: Linear, rank: int, alpha: float, seed: int):
        super().__init__(linear.in_features, linear.out_features, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.scale = alpha / rank
        generator = torch.Generator().manual_seed(seed)
        a = torch.randn(rank, self.in_features, generator=generator) * self.in_features**-0.5
        self.lora_A = nn.Parameter(a.to(self.weight))
        self.lora_B = nn.Parameter(self.weight.new_zeros(self.out_features, rank))

    def forward(self, x):
        low = x @ self.lora_A.to(x.dtype).T  # (..., r)
        return super().forward(x) + low @ self.lora_B.to(x.dtype).T * self.scale

    def merged(self):
        return self.weight + self.lora_B @ self.lora_A * self.scale

def add_lora(model: Transformer, rank: int, alpha: float, seed: int) -> None:
    """Put LoRA on the matrices of attention and dense feed-forward parts; freeze the rest but a score
    head."""
    for name, p in model.named_parameters():
        p.requires_grad_(name == "score.weight")
    for name, module in list(model.named_modules()):
        if re.fullmatch(r"layers\.\d+\.(self_attn|mlp)\.\w+_proj", name):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoRA(module, rank, alpha, seed_of(seed, name)))

@torch.no_grad()
def merged(model: Transformer) -> dict:
    """Collect the weights of a folder like any other: with B A added to W, and without a critic."""
    extra = ("lora_A", "lora_B", "critic.weight", "critic.bias")
    weights = {name: p for name, p in model.state_dict().items() if not name.endswith(extra)}
    for name, module in model.named_modules():
        if isinstance(module, LoRA):
            weights[f"{name}.weight"] = module.merged()
    return weights

# ---- The idea, IV: a reward that nobody has to label -------------------------------------------------------

CHECKS = ("parses", "compiles", "defines", "uses", "content", "ends")
WORK = (ast.Call, ast.BinOp, ast.BoolOp, ast.UnaryOp, ast.Compare, ast.Subscript, ast.Attribute, ast.For,
        ast.JoinedStr, ast.While, ast.With, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
MAX_CHARS = 10_000
MAX_DEPTH = 20  # of brackets and of indentation: the parser's time grows with both

def attempt(work: Callable, *args):
    """Run Python's parser, compiler or `ast.dump` -> the result, or None where it refuses."""
    try:
        with warnings.catch_warnings(action="ignore"):  # "\d" in a string
            return work(*args)
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return None

def parse(code: str) -> ast.Module | None:
    """Parse an answer; None where it is no Python, or longer or deeper than anybody writes."""
    depth = deepest = 0
    for c in code:
        depth += (c in "([{") - (c in ")]}")
        deepest = max(deepest, depth)
    indent = max((len(line) - len(line.lstrip()) for line in code.splitlines()), default=0)
    if len(code) > MAX_CHARS or deepest > MAX_DEPTH or indent > 4 * MAX_DEPTH:
        return None
    return attempt(ast.parse, code)

def compiles(tree: ast.Module) -> bool:
    """Tell whether the compiler takes what the parser did: no `return` outside, no parameter twice."""
    return attempt(compile, tree, "<answer>", "exec", 0, True) is not None

def words(text: str) -> set[str]:
    """
    >>> sorted(words("def readLine(file_name): ..."))
    ['def', 'file', 'line', 'name', 'read']
    """
    return {w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", text) if len(w) > 2}

def does_something(node: ast.FunctionDef, first_line: int) -> bool:
    """Tell whether the statements from this line on do any work.

    `pass`, `...`, a docstring, `return None`, `return a, b`, a lone `raise NotImplementedError()` do not, nor
    does a call of the function itself with its own parameters.
    """
    params = [a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg) and a.arg != "self"]
    for call in ast.walk(node):
        if isinstance(call, ast.Call):
            name = getattr(call.func, "id", getattr(call.func, "attr", None))
            given = [getattr(a, "id", None) for a in call.args]
            if name == node.name and given == params:
                return False
    statements = [n for n in ast.walk(node) if isinstance(n, ast.stmt) and n.lineno >= first_line]
    done = [s for s in statements if not isinstance(s, (ast.Raise, ast.Assert, ast.Pass))]
    return any(isinstance(n, WORK) for s in done for n in ast.walk(s))

def grade(rules: dict, answer: str, ended: bool) -> dict[str, bool]:
    """Check an answer -> {one of CHECKS: did it pass}. It is a good one when it passed all.

    rules: "before" and "after", the text around the answer; "name" of the function; "params"; "task";
    "shown", the code in the prompt.

    parses, compiles   the text with the answer in its place
    defines            it is one function of the name asked for
    uses               it reads every parameter; of a docstring or a name: it has a word of the code
    content            it does something; mended code is nearly the broken one; it is no copy of the prompt
    ends               the model ended its turn by itself
    """
    task, shown = rules["task"], rules["shown"]
    result = dict.fromkeys(CHECKS, False) | {"ends": ended}
    tree = parse(rules["before"] + answer + rules["after"]) if answer.strip() else None
    if tree is None:
        return result
    result["parses"] = True
    result["compiles"] = compiles(tree)
    node = tree.body[0] if len(tree.body) == 1 else None
    if not isinstance(node, ast.FunctionDef):
        return result
    result["defines"] = node.name == (answer.strip() if task == "name" else rules["name"])
    names = [n for s in node.body for n in ast.walk(s) if isinstance(n, ast.Name)]
    copied = answer.strip() in shown
    if task in ("doc", "name"):
        result["uses"] = bool(words(answer) & words(shown))
    else:
        result["uses"] = set(rules["params"]) <= {n.id for n in names if isinstance(n.ctx, ast.Load)}
    if task == "doc":
        result["content"] = len(answer.split()) >= 3 and not copied
    elif task == "name":
        result["content"] = len(answer.strip()) >= 3
    elif task == "mend":
        result["content"] = difflib.SequenceMatcher(None, shown, answer, autojunk=False).ratio() > 0.8
    else:
        result["content"] = not copied and does_something(node, rules["before"].count("\n") + 1)
    return result

# ---- The idea, V: learning from one's own answers ----------------------------------------------------------

# Everything is per token: N tokens of several answers.

def gae(rewards: list[float], values: list[float], gamma: float = 1.0, lam: float = 0.95) -> list[float]:
    """Estimate the advantage of each of an answer's tokens (1506.02438, eq. 16), from the end backwards:

        delta_t = r_t + gamma V_{t+1} - V_t          A_t = delta_t + gamma lam A_{t+1}

    After the last token there is nothing to win. lam 0 trusts the critic, lam 1 the rewards.

    >>> gae([0.0, 1.0], [0.5, 0.5], gamma=1.0, lam=0.5)
    [0.25, 0.5]
    """
    advantages = []
    advantage = next_value = 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        delta = reward + gamma * next_value - value
        advantage = delta + gamma * lam * advantage
        next_value = value
        advantages.append(advantage)
    return advantages[::-1]

def clipped_loss(log_ratio, advantages, low: float = 0.2, high: float = 0.2):
    """Compute -min(r A, clip(r, 1 - low, 1 + high) A), r = p_new / p_old: (N,) (1707.06347, eq. 7).

    At r = 1 its gradient is the policy gradient's; a token beyond the bound, in the direction that it was
    pushed in, has none. A wider `high` lets unlikely tokens rise (DAPO, 2503.14476, eq. 10).

    >>> clipped_loss(torch.tensor([0.0, 1.0, -1.0]), torch.tensor([1.0, 1.0, -1.0]))
    tensor([-1.0000, -1.2000,  0.8000])
    """
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)

def beyond_clip(log_ratio, advantages, low: float, high: float):
    """Mark the tokens that the clip holds back: (N,), 0 or 1."""
    ratio = log_ratio.detach().exp()
    up = (ratio > 1 + high) & (advantages > 0)
    down = (ratio < 1 - low) & (advantages < 0)
    return (up | down).float()

def value_loss(values, old, returns, clip: float = 0.2):
    """Compute (V - R)^2 / 2, or the same of a V that moved from its old value by `clip` only, where that is
    more: (N,) (a trick that the paper of PPO does not name: 2005.12729, section 3).

    >>> value_loss(torch.tensor([1.0, 1.0]), torch.zeros(2), torch.tensor([1.0, 2.0]))
    tensor([0.3200, 1.6200])
    """
    near = old + (values - old).clamp(-clip, clip)
    return torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2

def group_advantages(rewards, scale: bool = True):
    """Compare answers' rewards with the others to their prompt: (.., n) (2402.03300, section 4.1.2).

    scale: divided by the group's standard deviation, as in the paper; without, prompts that are nearly always
    or hardly ever answered well do not count for more (Dr. GRPO, 2503.20783).

    >>> group_advantages(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), scale=False)
    tensor([[ 0.5000, -0.5000],
            [ 0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, keepdim=True) + 1e-4) if scale else centred

def kl_estimate(log_ratio):
    """Compute r - 1 - log r from log r, r = p_ref / p: (N,), never negative. Its mean over p's tokens is KL(p
    || p_ref) (Schulman 2020, "Approximating KL divergence", k3); its gradient as a loss is KL(p_ref ||
    p)'s."""
    return log_ratio.exp() - 1 - log_ratio

def next_kl_coef(coef: float, kl: float, target: float) -> float:
    """Move the KL coefficient a little up where the answers' KL lies above the target, down where it lies
    below (1909.08593, section 2.2)."""
    return coef * (1 + 0.1 * min(max(kl / target - 1, -0.2), 0.2))

def pass_at_k(n: int, right: int, k: int) -> float:
    """Compute the probability that one of k answers is right, drawn from n (2107.03374, eq. 1).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)

# ---- Instructions from Python's own functions --------------------------------------------------------------

TASKS = {
    "body": "Write the body of this function.",
    "doc": "Write the docstring of this function.",
    "name": "Name this function.",
    "mend": "Mend this broken code.",
    "continue": "Continue this code.",
}

def find_functions(text: str) -> Iterator[tuple[ast.FunctionDef, list[str]]]:
    """Find a module's functions and methods, each with its lines, dedented; none with tabs or on one line."""
    lines = re.split(r"\r\n|\r|\n", text)  # not splitlines: a form feed ends no line for ast
    for node in ast.walk(attempt(ast.parse, text) or ast.Module([], [])):
        if isinstance(node, ast.FunctionDef) and node.body[0].lineno > node.lineno:
            own = "\n".join(lines[node.lineno - 1 : node.end_lineno])
            if "\t" not in own:
                yield node, textwrap.dedent(own).split("\n")

def break_code(code: str, rng: random.Random) -> str | None:
    """Make one mistake that keeps code from parsing: a colon, bracket or quote goes, or a line is shifted."""
    places = [m.start() for m in re.finditer(r"(?m):$|[()\[\]{}'\"]", code)]
    places += [m.end() for m in re.finditer(r"\n +", code)]
    for place in rng.sample(places, len(places)):
        shifted = code[:place] + " " + code[place:]
        broken = shifted if code[place - 1] == " " else code[:place] + code[place + 1 :]
        if parse(broken) is None:
            return broken
    return None

def make_instructions(node: ast.FunctionDef, lines: list[str], rng: random.Random) -> Iterator[dict]:
    """Make the tasks that a function is good for: {"messages", "task", "check"}, with its author's
    answers."""
    doc = ast.get_docstring(node)
    start = node.body[0].lineno - node.lineno  # the first line of the docstring, or of the body
    after_doc = node.body[0].end_lineno - node.lineno + 1 if doc else start
    signature = "\n".join(lines[:start])
    body = "\n".join(lines[after_doc:]).strip("\n")
    bare = f"{signature}\n{body}"  # without the docstring, which would give the name away
    indent = re.match(" *", lines[start]).group()
    args = [a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)]
    params = [a for a in args if a not in ("self", "cls") and a[0] != "_"]
    if not body.strip() or (doc and len(node.body) == 1):
        return

    def record(task, shown, answer, before, after=""):
        question = {"role": "user", "content": f"{TASKS[task]}\n\n{shown}"}
        rules = {"task": task, "before": before, "after": after, "shown": shown, "name": node.name}
        return {"messages": [question, {"role": "assistant", "content": answer}], "task": task,
                "check": rules | {"params": params}}

    summary = (doc or "").strip().split("\n\n")[0].strip()
    if summary and '"""' not in summary and "\\" not in summary and summary[-1] != '"':
        summary = textwrap.indent(summary, indent).strip()
        described = f'{signature}\n{indent}"""{summary}"""'
        if params:
            yield record("body", described, body, described + "\n")
        yield record("doc", bare, summary, f'{signature}\n{indent}"""', f'"""\n{body}')
    if re.fullmatch(r"(?i)[a-z_]\w{2,}", node.name):
        nameless = bare.replace(f"def {node.name}(", "def _(", 1)
        yield record("name", nameless, node.name, "def ", bare[len(f"def {node.name}") :])
    if broken := break_code(bare, rng):
        yield record("mend", broken, bare, "")
    statements = node.body[1:] if doc else node.body
    if len(statements) > 1:
        cut = statements[rng.randrange(1, len(statements))].lineno - node.lineno
        shown = "\n".join(lines[:cut])
        yield record("continue", shown, "\n".join(lines[cut:]).strip("\n"), shown + "\n")

def take_apart(folder: str, split: str, seed: int) -> Iterator[dict]:
    """Make the instructions of each function in one split of a data folder, its modules in a random order."""
    tokens = Tokens(folder, split)
    tokenizer = load_tokenizer(folder)
    ids = tokens.read(0, tokens.n)
    modules = np.split(ids, np.flatnonzero(ids == tokens.eot_id) + 1)
    rng = random.Random(seed_of(seed, split))
    seen = set()
    for i in rng.sample(range(len(modules)), len(modules)):
        text = tokenizer.decode(modules[i][modules[i] != tokens.eot_id].tolist())
        for node, lines in find_functions(text):
            if len(lines) <= 60 and (key := "\n".join(lines)) not in seen:
                seen.add(key)
                yield from make_instructions(node, lines, rng)

def instructions_of(folder: str, split: str, limit: int, max_tokens: int, seed: int):
    """Make instructions from one split of a data folder, at most `limit` a task, whose answers pass the
    checks -> records, and a count of what is dropped."""
    tokenizer = load_tokenizer(folder)
    records, counts, dropped = [], Counter(), Counter()
    with progress(f"{split}: reading functions", limit * len(TASKS)) as show:
        for record in take_apart(folder, split, seed):
            task = record["task"]
            if counts[task] >= limit:
                if len(records) == limit * len(TASKS):
                    break
            elif not all(grade(record["check"], record["messages"][1]["content"], True).values()):
                dropped["dropped for failing the checks"] += 1
            elif len(render(tokenizer, record["messages"])[0]) > max_tokens:
                dropped["dropped for being longer than the context"] += 1
            else:
                counts[task] += 1
                records.append(record)
                show(len(records))
    return records, dropped

# ---- Reading what people have: Alpaca, Dolly, ShareGPT, messages; pairs and rankings -----------------------

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
         "system": "system", "tool": "tool", "function": "tool", "observation": "tool"}

def read_lines(path: str | Path, read: Callable) -> Iterator:
    """Read JSON lines -> read(record) of each; a UserError has the number of the line that `read` refuses."""
    finish_save(Path(path).parent)
    check(Path(path).exists(), f"{path} is missing: `python align.py data` and `pairs` make the defaults.")
    number = 0
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                number += 1
                if line.strip():
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError("it is not a JSON object")
                    yield read(record)
    except (OSError, ValueError) as error:  # (a JSONDecodeError, or text that is no UTF-8, is a ValueError)
        raise UserError(f"{path}, line {number}: {error}.") from None

def read_turns(value, role: str, name: str) -> list[dict]:
    """Read a text, or messages in OpenAI's form (role, content) or ShareGPT's (from, value)."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    turns = []
    for item in value if isinstance(value, list) and value else [{}]:
        item = item if isinstance(item, dict) else {}
        text = item.get("content", item.get("value"))
        speaker = item.get("role", item.get("from"))
        if speaker not in ROLES or not isinstance(text, str):
            raise ValueError(f"{name!r} is neither a text nor messages, each with a text and a known role")
        turns.append({"role": ROLES[speaker], "content": text})
    return turns

def read_prompt(record: dict) -> list[dict]:
    """Read what is asked, in any of the usual forms: "messages" (OpenAI; with the answers), "conversations"
    (ShareGPT; the same), "prompt", or "instruction" with "input" (Alpaca) or "context" (Dolly) after it."""
    for name in ("messages", "conversations", "prompt"):
        if name in record:
            return read_turns(record[name], "user", name)
    if "instruction" not in record:
        raise ValueError("it has neither messages, conversations, prompt nor instruction")
    prompt = read_turns(record["instruction"], "user", "instruction")
    more = record.get("input") or record.get("context")
    prompt[0]["content"] += f"\n\n{more}" if more else ""
    return prompt

def read_answer(record: dict, *names: str) -> dict:
    name = next((n for n in names if n in record), names[0])
    if name not in record:
        raise ValueError(f"{name!r} is missing")
    return {**read_turns(record[name], "assistant", name)[-1], "role": "assistant"}

def read_conversation(record: dict) -> list[dict]:
    """Read question and answers in any of the usual forms, as messages; Dolly calls the answer "response"."""
    talk = read_prompt(record)
    if "messages" in record or "conversations" in record:
        return talk
    return [*talk, read_answer(record, "output", "response", "completion", "chosen")]

def read_ranking(record: dict) -> list[list[dict]]:
    """Read {"prompt", "chosen", "rejected"} or {"prompt", "answers": [best, .., worst]} as conversations."""
    answers = record.get("answers")
    if answers is None:
        answers = [read_answer(record, "chosen"), read_answer(record, "rejected")]
    elif not isinstance(answers, list) or len(answers) < 2:
        raise ValueError("'answers' has fewer than two")
    else:
        answers = [read_answer({"answers": answer}, "answers") for answer in answers]
    return [[*read_prompt(record), answer] for answer in answers]

@dataclass
class Item:
    """Hold what a step draws: a conversation, or answers to one prompt, and what a loss must know of it."""

    examples: list[Example]
    facts: dict[str, torch.Tensor] = field(default_factory=dict)  # a number for each answer or trained token

def load_items(paths, tokenizer, T: int, ranked: bool) -> tuple[list[Item], Counter]:
    """Read conversations, or rankings with the best answer first; count what is kept and left out.

    A conversation that ends with the user loses that turn; an empty answer of a ranking is an answer, too.
    """
    items, counts = [], Counter()
    read = read_ranking if ranked else lambda record: [read_conversation(record)]
    for talks in itertools.chain(*(read_lines(path, read) for path in paths)):
        counts["read"] += 1
        if talks[0][-1]["role"] != "assistant":
            counts["ended with the user"] += 1
            spoken = [i for i, m in enumerate(talks[0]) if m["role"] == "assistant"]
            talks = [talks[0][: spoken[-1] + 1 if spoken else 0]]
        last = [talk[-1]["content"].strip() if talk else "" for talk in talks]
        examples = [Example(*render(tokenizer, talk)) for talk in talks]
        if not ranked and not any(m["content"].strip() for m in talks[0] if m["role"] == "assistant"):
            counts["left out: no answer"] += 1
        elif len(set(last)) < len(last):
            counts["left out: equal answers"] += 1
        elif max(len(e.ids) for e in examples) > T:
            counts["left out: longer than the context"] += 1
        else:
            counts["with an empty answer"] += ranked and not all(last)
            counts["kept"] += 1
            items.append(Item(examples))
    return items, +counts

RULES = {"task", "before", "after", "shown", "name", "params"}  # of a prompt's "check": see `grade`

def read_task(record: dict) -> dict:
    """Read what to ask ("prompt": messages) and, in the default data, how to check the answer ("check")."""
    prompt = read_prompt(record)
    while prompt and prompt[-1]["role"] == "assistant":
        prompt.pop()
    if not prompt:
        raise ValueError("nothing is asked in it")
    rules = record.get("check")
    if rules is not None and not (isinstance(rules, dict) and rules.keys() >= RULES):
        raise ValueError("its 'check' is not of the kind that `python align.py data` writes")
    return {"prompt": prompt, **{name: record.get(name) for name in ("task", "check", "held_out")}}

def load_prompts(path: str, limit: int = 0, task: str | None = None) -> list[dict]:
    """Load what to ask, of one task or all; limit: so many, drawn evenly."""
    records = [r for r in read_lines(path, read_task) if task in (None, r["task"])]
    check(records, f"There are no prompts in {path}{f' of the task {task}' if task else ''}.")
    if limit and len(records) > limit:
        order = np.random.default_rng(0).permutation(len(records))
        records = [records[i] for i in sorted(order[:limit].tolist())]
    return records

# ---- Options -----------------------------------------------------------------------------------------------

def options(**defaults) -> Callable:
    """Decorate a stage's options: a dataclass that changes these defaults of the one that it extends."""

    def make(kind: type) -> type:
        types = {f.name: f.type for f in dataclasses.fields(kind.__base__)}
        for name, value in defaults.items():
            kind.__annotations__[name] = types[name]
            setattr(kind, name, value)
        return dataclass(kind)

    return make

@options(out="out/sft", optimizer="adamw", lr=2e-3, warmup_steps=20, schedule="cosine", weight_decay=0.0,
         eval_interval=100)
class Stage(RunOptions):
    """Hold what every stage is told. A model larger than the default one wants a --lr of 1e-6 to 1e-5."""

    changeable: ClassVar[set] = RunOptions.changeable | {"micro_tokens"}
    settings: ClassVar[set] = {"dropout"}  # fields of Config that --set reaches
    model: Annotated[str, opt("Model", "Checkpoint folder to begin with.")] = "out/python"
    lora_rank: Annotated[int, opt("Model", "Train additions of this rank only (8 to 64); 0: all.", low=0)] = 0
    data: Annotated[list[str], opt("Data", "JSON lines to learn from; several times for more.")] = (
        "data/instructions/train.jsonl",)
    val: Annotated[str | None, opt("Data", "JSON lines to judge by, not val.jsonl beside --data.")] = None
    batch_size: Annotated[int, opt("Data", "Conversations, rankings or prompts of a step.", low=1)] = 32
    show_mask: Annotated[int, opt("Data", "Only print so many, trained tokens in colour.", low=0)] = 0
    set: Annotated[list[str], opt("Run", "NAME=VALUE, several times: a setting without option (grad_clip=1, "
                                  "min_lr=0.1, weight_decay=0, lora_alpha=16, micro_tokens=8192), and "
                                  "dropout=0.1 where answers are given.")] = ()
    lora_alpha: float = 16.0  # the additions' scale is alpha / rank
    micro_tokens: int = 0  # tokens at once on a device: memory and speed only; 0: 8,192, on a GPU 32,768

    def __post_init__(self):
        super().__post_init__()
        unknown = self.fields_set.keys() - self.settings
        check(not unknown, f"--set {', '.join(unknown)}: no setting of this stage has that name.")

@options()
class SFTStage(Stage):
    """Train on the assistant's words of conversations (SFT)."""

    command: ClassVar[str] = "sft"
    epochs: Annotated[float, opt("Run", "How often the data is seen.", above=0)] = 2.0
    max_steps: Annotated[int | None, opt("Run", "Optimizer steps, instead of --epochs.", low=1)] = None

@options(model="out/sft", data=("data/pairs.jsonl",), out="out/reward", lr=3e-4)
class RewardStage(SFTStage):
    """Train a reward model: scores for conversations, from pairs (prompt, chosen, rejected) or rankings
    (answers)."""

    command: ClassVar[str] = "reward"

@options(out="out/dpo")
class DPOStage(RewardStage):
    """Train on preferences without a reward model: DPO, IPO, SimPO and their kin."""

    command: ClassVar[str] = "dpo"
    loss: Annotated[str, opt("Loss", f"One of {', '.join(VARIANTS)}.", one_of=tuple(VARIANTS))] = "dpo"
    beta: Annotated[float | None, opt("Loss", "Price of leaving the reference, instead of 0.1 (simpo: 2).",
                                      above=0)] = None
    label_smoothing: Annotated[float, opt("Loss", "Share of wrong labels (dpo and norm).", low=0)] = 0.0
    nll_weight: Annotated[float, opt("Loss", "Weight of -log p(chosen) a token in the loss.", low=0)] = 1.0
    gamma: float = 1.0  # the margin that simpo asks for

    def __post_init__(self):
        super().__post_init__()
        smooth = "label_smoothing" in VARIANTS[self.loss].options
        check(self.label_smoothing < 0.5 if smooth else not self.label_smoothing,
              "--label-smoothing has to be below 0.5, and goes with --loss dpo and norm only.")

@options(model="out/sft", max_steps=120, lr=3e-4, warmup_steps=5, schedule="wsd", eval_interval=20,
         save_interval=40)
class PlayStage(Stage):
    """Hold what a stage that learns from its own answers is told."""

    settings: ClassVar[set] = set()  # with dropout the ratio of a policy to itself would not be 1
    reward: Annotated[list[str], opt("Answers", "checks, one of them, or a reward model's folder; several "
                                     "(NAME:WEIGHT) are added up.")] = ("checks",)
    unended: Annotated[float, opt("Answers", "Taken off the reward of an answer that did not end.")] = 1.0
    samples: Annotated[int, opt("Answers", "Answers to each prompt: the group.", low=1)] = 8
    temperature: Annotated[float, opt("Answers", "Of the answers that it learns from.", above=0)] = 1.0
    max_new_tokens: Annotated[int, opt("Answers", "Longest answer.", low=1)] = 128
    clip: Annotated[float, opt("Loss", "How far from 1 a token's probability ratio may move.", above=0)] = 0.2
    clip_high: Annotated[float | None, opt("Loss", "The bound above, instead of --clip (DAPO: 0.28).",
                                           above=0)] = None
    kl_coef: Annotated[float, opt("Loss", "Price of the KL to the reference; 0: none.", low=0)] = 0.02
    passes: int = 1  # how often a step's answers are learned from
    minibatches: int = 2  # updates of a pass

    def __post_init__(self):
        super().__post_init__()
        check(self.clip < 1, "--clip has to be below 1: it bounds a ratio from both sides.")
        check(min(self.passes, self.minibatches) >= 1, "--set passes and minibatches have to be at least 1.")

@options(out="out/grpo")
class GRPOStage(PlayStage):
    """Reinforce without a critic: answers are judged beside others to the same prompt (GRPO)."""

    command: ClassVar[str] = "grpo"
    samples: Annotated[int, opt("Answers", "Answers to each prompt: the group.", low=2)] = 8
    scale: Annotated[str, opt("Loss", "Advantages: std (divided by the group's deviation) or none.",
                              one_of=("std", "none"))] = "std"
    normalize: Annotated[str, opt("Loss", "Mean over tokens: token (DAPO), sequence (then over answers: "
                                  "GRPO) or constant (sums: Dr. GRPO).",
                                  one_of=("token", "sequence", "constant"))] = "token"

@options(out="out/ppo", max_steps=150, batch_size=64, samples=4, minibatches=4, kl_coef=0.005)
class PPOStage(PlayStage):
    """Reinforce with a critic: each token is judged beside what was expected (PPO)."""

    command: ClassVar[str] = "ppo"
    value_coef: Annotated[float, opt("Loss", "Weight of the critic's loss.", low=0)] = 0.1
    kl_target: Annotated[float, opt("Loss", "KL of an answer, in nats, that --kl-coef adapts to; 0: fixed.",
                                    low=0)] = 0.0
    gamma: float = 1.0  # discount of a token's reward by the next token
    lam: float = 0.95  # lambda of the advantages (GAE)
    value_clip: float = 0.2  # how far an update may move a value
    entropy_coef: float = 0.0  # weight of the entropy in the objective

    def __post_init__(self):
        super().__post_init__()
        check(max(self.gamma, self.lam) <= 1, "--set gamma and lam lie between 0 and 1.")
        check(self.kl_coef or not self.kl_target, "--kl-target needs a --kl-coef above 0: it is multiplied.")

# ---- What all stages share ---------------------------------------------------------------------------------

class Method:
    """Say what a stage trains and by which loss; another stage is one more of these, and its options."""

    head = "lm"
    ranked = False  # does an item hold several answers, the best first?
    judged = 500  # items to judge by, at most

    def __init__(self, o: Stage):
        self.o = o
        self.tensors = {}  # what a checkpoint holds of it, by name
        self.numbers = {}

    def extend(self, model: Transformer) -> None:
        """Add what else is trained to the model."""

    def load(self, paths: list[str], learner) -> tuple[list, Counter]:
        """Load what a step draws from, and count what is left out."""
        return load_items(paths, learner.tokenizer, learner.model.config.seq_len, self.ranked)

    def prompt_of(self, item) -> list:
        first = item.examples[0]
        return first.ids[: first.trained.index(True)]

    def prepare(self, learner) -> None:
        """Find out what has to be known before the first step."""

    def weight(self, item: Item) -> float:
        """Weigh an item in the mean loss."""
        return 1.0

    def loss(self, model, items: list[Item]) -> dict:
        """Compute "loss" and other metrics of items: for each a tensor of any shape, to be added up."""
        raise NotImplementedError

    def evaluate(self, learner) -> dict:
        return learner.measure(learner.val)

class Learner:
    """Hold what any stage trains with: model, optimizer, data, ranks, and the run that it goes on with."""

    def __init__(self, o: Stage):
        self.o = o
        self.ranks = setup_distributed(o.device)
        self.saved = open_run(o)
        self.unchanged = {}  # what has to be as it was on --resume
        self.method = METHODS[o.command](o)
        self.folder = find_checkpoint(o.resume if o.resume and not o.lora_rank else o.model)
        self.tokenizer = load_tokenizer(self.folder)
        self.tensors = load_state(o.resume)[0] if o.resume else {}
        self.model = self.open_model(load_model(self.folder, self.ranks.device))
        self.items, self.val = self.load_splits()
        self.optimizer = build_optimizer(self.model, o.optimizer, o.lr, o.weight_decay)
        self.optimizer.load_state_dict(self.tensors)
        self.method.prepare(self)
        o.max_steps = o.max_steps or max(1, math.ceil(o.epochs * len(self.items) / o.batch_size))
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        say(f"{o.max_steps} steps of {o.batch_size}, {len(self.val)} to judge by; {trained / 1e6:.2f}M "
            f"parameters trained, {o.optimizer} in {o.dtype} on {self.ranks.device.type}")

    def open_model(self, base: Transformer) -> Transformer:
        """Make of the base, or of the run's own last weights, the model that is trained."""
        o = self.o
        check(self.method.head == "score" or base.config.head == "lm",
              f"{self.folder} is a reward model: it gives scores, not answers.")
        model = rebuild(base, head=self.method.head, **o.fields_set).float()
        model.compute_dtype = pick_dtype(o.dtype, self.ranks.device)
        o.dtype = {dtype: name for name, dtype in DTYPES.items()}[model.compute_dtype]
        if o.lora_rank:
            self.keep(model=fingerprint(base))
            add_lora(model, o.lora_rank, o.lora_alpha, o.seed)
        self.method.extend(model)
        own = {name: w for name, w in self.tensors.items() if name.startswith("weights/")}
        model.load_state_dict({name.removeprefix("weights/"): w for name, w in own.items()}, strict=False)
        return model

    def load_splits(self) -> tuple[list, list]:
        """Load what to train on, and what to judge by: --val, val.jsonl beside --data, or a part of it."""
        o, method = self.o, self.method
        items, counts = method.load(o.data, self)
        check(items, f"There is nothing to learn in {', '.join(o.data)} ({describe(counts)}).")
        say(f"{', '.join(o.data)}: {describe(counts)}")
        self.counts = counts
        beside = Path(o.data[0]).with_name("val.jsonl")
        paths = [o.val] if o.val else [str(beside)] if beside.exists() and str(beside) not in o.data else []
        self.keep(data=[seed_of(Path(path).read_bytes()) for path in (*o.data, *paths)])
        val = method.load(paths, self)[0]
        if not val:
            items, val = hold_out(items, method.prompt_of)
        return items, val[: method.judged]

    def keep(self, **fingerprints) -> None:
        """Remember what a run depends on, and refuse to go on where it has changed."""
        for name, value in fingerprints.items():
            check(not self.saved or self.saved.get(name) == value,
                  f"--{name} is not what {self.o.resume} began with: restore it to resume.")
        self.unchanged |= fingerprints

    def save(self, folder: Path, state: dict) -> None:
        """Write a checkpoint: merged weights, and in state/ what is trained beside them."""
        tensors = self.optimizer.state_dict() | self.method.tensors
        for name, p in self.model.named_parameters():
            if p.requires_grad and (self.o.lora_rank or name.startswith("critic.")):
                tensors[f"weights/{name}"] = p.detach().cpu()
        state = (tensors, state | self.unchanged | self.method.numbers | {"counts": self.counts})
        if self.ranks.rank == 0:
            tokenizer = self.folder / "tokenizer.json"
            save_checkpoint(folder, self.model, tokenizer, state=state, weights=merged(self.model))
        barrier()

    @torch.no_grad()
    def evaluate(self, last: bool) -> dict:
        return {f"val_{name}": value for name, value in self.method.evaluate(self).items()}

    def micro_batches(self, items: list[Item]) -> list[list[int]]:
        """Choose which items are computed together: some thousand tokens."""
        limit = self.o.micro_tokens or (8192 if self.ranks.device.type == "cpu" else 32768)
        sizes = [tokens_in(item.examples) for item in items]
        return pack(sizes, max([limit, *sizes]))

    def measure(self, items: list[Item], scale: float = 0.0) -> dict[str, float]:
        """Average the loss and each metric over items, shared out over the ranks.

        scale: above zero, this rank's part of the gradient is computed, multiplied by it.
        """
        self.model.train(scale > 0)
        weight = sum(map(self.method.weight, items))  # of all ranks: each knows the whole step's items
        mine = items[self.ranks.rank :: self.ranks.world]
        sums = Counter()
        for row in self.micro_batches(mine):
            metrics = self.method.loss(self.model, [mine[i] for i in row])
            if scale:
                (metrics["loss"].sum() * (scale / weight)).backward()
            sums.update({name: float(values.detach().sum()) for name, values in metrics.items()})
        total = Counter()
        for part in gather(sums):  # a rank without items has no names
            total.update(part)
        return {name: value / weight for name, value in total.items()}

    @torch.no_grad()
    def score(self, compute: Callable, items: list[Item]) -> list:
        """Compute something for each item, shared out over the ranks; compute: items -> one for each."""
        self.model.eval()

        def work(mine):
            found = {}
            for row in self.micro_batches(mine):
                found |= zip(row, compute([mine[i] for i in row]), strict=True)
            return [found[i] for i in range(len(mine))]

        return share_over_ranks(work, items)

    def sum_gradients(self) -> None:
        """Add the ranks' parts of the gradient up."""
        for p in self.model.parameters():
            if p.requires_grad and self.ranks.world > 1:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                sum_over_ranks(p.grad)

def draw(things: list, count: int, step: int, seed: int) -> list:
    """Draw what a step takes: each thing once an epoch, in an order that seed and epoch alone decide.

    >>> sorted(draw("abcdef", 3, 0, seed=1) + draw("abcdef", 3, 1, seed=1))
    ['a', 'b', 'c', 'd', 'e', 'f']
    """
    n = len(things)
    begin = step * count
    epochs = range(begin // n, (begin + count - 1) // n + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(n) for epoch in epochs])
    begin -= epochs[0] * n
    return [things[i] for i in order[begin : begin + count]]

def gather(thing) -> list:
    """Collect a Python object from each rank, in the order of the ranks."""
    things = [thing] * rank_and_world()[1]
    if len(things) > 1:
        torch.distributed.all_gather_object(things, thing)
    return things

def share_over_ranks(work: Callable, things: list) -> list:
    """Let each rank do work(its share of the things) -> all results, in the things' order, on all ranks."""
    rank, world = rank_and_world()
    parts = gather(work(things[rank::world]))
    return [parts[i % world][i // world] for i in range(len(things))]

def rebuild(model: Transformer, **fields) -> Transformer:
    """Give the same weights another head or dropout; a new score head is zero."""
    with torch.device("meta"):
        other = Transformer(model.config.replace(**fields))
    weights = model.state_dict()
    if other.config.head != model.config.head:
        weights = {name: w for name, w in weights.items() if not name.startswith(("lm_head.", "score."))}
        weights["score.weight"] = model.norm.weight.new_zeros(1, model.config.n_embd)
    other.load_state_dict(weights, assign=True)
    other.tie_weights()
    return other

def fingerprint(model) -> int:
    return seed_of(*(round(p.detach().cpu().double().sum().item(), 6) for p in model.parameters()))

def describe(counts: Counter) -> str:
    return ", ".join(f"{n:,} {what}" for what, n in counts.items())

def hold_out(items: list, prompt_of: Callable) -> tuple[list, list]:
    """Split items into those to train on and a twentieth to judge by; a prompt stands on one side only."""
    prompts = [seed_of(prompt_of(item)) for item in items]
    held = {p for p in prompts if p % 20 == 0} or {prompts[-1]}
    rest = [item for item, p in zip(items, prompts, strict=True) if p not in held]
    val = [item for item, p in zip(items, prompts, strict=True) if p in held]
    return rest or val, val

def batch_of(model, items: list[Item]) -> Batch:
    return collate([item.examples for item in items], model.config.seq_len, next(model.parameters()).device)

def facts_of(items: list[Item], name: str, device="cpu"):
    """Join what is known of each item's answers or tokens: (n,) or (N,)."""
    return torch.cat([item.facts[name] for item in items]).to(device)

def print_mask(o: Stage) -> None:
    """Print the first examples, the trained tokens in colour."""
    from rich.text import Text

    tokenizer = load_tokenizer(find_checkpoint(o.model))
    items, _ = load_items(o.data, tokenizer, 10**9, METHODS[o.command].ranked)
    for number, example in enumerate(e for item in items[: o.show_mask] for e in item.examples):
        console().rule(f"{number + 1}", style="dim")
        text = Text()
        for trained, group in itertools.groupby(zip(*example, strict=True), key=lambda pair: pair[1]):
            part = tokenizer.decode([token for token, _ in group])
            text.append(part, style="bold green" if trained else "dim")
        console().print(text)

# ---- The stages that learn from given answers: SFT, reward model, DPO --------------------------------------

class SFT(Method):
    """Train by -log p of the assistant's tokens, the mean over those of the step.

    Healthy: the loss falls from some 4 nats (the chat format is new) to below pretraining's within a few
    hundred steps, and val_loss follows it. val_loss that rises while loss falls: fewer epochs.
    """

    def weight(self, item):
        return trained_tokens(item.examples)

    def loss(self, model, items):
        return {"loss": -logps(model, batch_of(model, items))}

class RewardModel(Method):
    """Train by Bradley-Terry on the scores of a ranking's answers. accuracy: of its best against its worst.

    Healthy: the loss begins at ln 2 = 0.693 and accuracy rises well above 0.5. val_loss that rises while
    accuracy stays is overconfidence, which `calibration_error` shows.
    """

    head = "score"
    ranked = True

    def loss(self, model, items):
        ranked = scores(model, batch_of(model, items)).split([len(item.examples) for item in items])
        margin = torch.stack([s[0] - s[-1] for s in ranked])
        losses = torch.stack([ranking_loss(s) for s in ranked])
        return {"loss": losses, "accuracy": (margin > 0).float(), "margin": margin}

    def evaluate(self, learner):
        margins = learner.score(lambda items: self.loss(learner.model, items)["margin"].cpu(), learner.val)
        return super().evaluate(learner) | {"calibration_error": calibration_error(torch.stack(margins))}

class DPO(Method):
    """Train by one of VARIANTS on a ranking's best and worst answer (`preference`), plus nll_weight times
    -log p of the best a token (`nll`; 2404.19733, eq. 1). The reference's log p is saved with the run.

    Healthy: `preference` begins at ln 2 (ipo: 1 / (2 beta)^2); accuracy (is the margin positive?) and margin
    (beta times the difference of log-ratios) rise. `chosen` and `rejected` are log-ratios: the rejected
    falls, and without nll the chosen too. When it falls as fast, the model soon forgets to end: raise beta or
    nll_weight.
    """

    ranked = True

    def __init__(self, o):
        super().__init__(o)
        self.variant = VARIANTS[o.loss]
        self.beta = self.variant.beta if o.beta is None else o.beta
        self.options = {name: getattr(o, name) for name in self.variant.options}

    def prepare(self, learner):
        for name, items in (("reference/items", learner.items), ("reference/val", learner.val)):
            for item in items:
                item.examples = [item.examples[0], item.examples[-1]]
            if not self.variant.reference:
                continue
            if not self.o.resume:
                rows = learner.score(lambda some: self.read(learner.model, some)[0].cpu(), items)
                learner.tensors[name] = torch.stack(rows)
            check(name in learner.tensors, f"{self.o.resume} lacks the reference's log p: start anew.")
            self.tensors[name] = learner.tensors[name]
            for item, logp in zip(items, self.tensors[name], strict=True):
                item.facts["reference"] = logp

    def read(self, model, items):
        """Compute log p of chosen and rejected, and how many tokens they have: (n, 2) each."""
        batch = batch_of(model, items)
        return logps(model, batch).view(-1, 2), batch.lengths.view(-1, 2)

    def loss(self, model, items):
        logp, lengths = self.read(model, items)
        ratios = logp
        if self.variant.reference:
            ratios = logp - facts_of(items, "reference", logp.device).view(-1, 2)
        if self.variant.mean:
            ratios = ratios / lengths
        chosen, rejected = ratios.unbind(1)
        margin = self.beta * (chosen - rejected)
        preference = self.variant.loss(chosen, rejected, self.beta, **self.options)
        nll = -(logp / lengths)[:, 0]
        metrics = {"loss": preference + self.o.nll_weight * nll, "preference": preference, "nll": nll}
        metrics |= {"accuracy": (margin > 0).float(), "margin": margin}
        return metrics | {"chosen": chosen, "rejected": rejected}

def learn(o: SFTStage) -> dict:
    """Run SFT, a reward model or DPO: they differ in the loss of an item and in nothing else."""
    learner = Learner(o)
    run = Run(o, learner.ranks, learner.save, learner.evaluate, learner.saved)
    for step, lr in run.steps():
        if not run.records:
            run.evaluate(last=False)
        items = draw(learner.items, o.batch_size, step, o.seed)
        torch.manual_seed(seed_of(o.seed, step, learner.ranks.rank))  # of dropout
        metrics = learner.measure(items, run.scale)  # forward and backward
        learner.sum_gradients()
        grad_norm = clip_gradients(learner.model.parameters(), o.grad_clip, run.scale)
        tokens = sum(tokens_in(item.examples) for item in items)
        run.update(learner.optimizer, lr, **metrics, grad_norm=grad_norm, tokens=tokens)
    return run.result

# ---- Answers, and the rewards that they get ----------------------------------------------------------------

JUDGED_AT = 0.7  # temperature of the answers by which a model is judged

@dataclass
class Answer:
    """Hold what a model answered to a prompt."""

    task: dict  # what was asked, as `read_task` gives it
    prompt: list[int]
    ids: list[int]  # the end of the turn among them
    text: str
    ended: bool
    reward: float = 0.0

    @functools.cached_property
    def grades(self) -> dict[str, bool]:
        """Run the checks that the prompt carries; where it has none, only see whether the answer ended."""
        rules = self.task["check"]
        return grade(rules, self.text, self.ended) if rules else {"ends": self.ended}

    @property
    def good(self) -> bool:
        return bool(self.task["check"]) and all(self.grades.values())

    @property
    def conversation(self) -> list[dict]:
        return [*self.task["prompt"], {"role": "assistant", "content": self.text}]

def sampler(temperature: float, n_vocab: int, seed: int, device) -> Callable:
    """Make a pick for `generate` that draws from softmax(logits / temperature); 0 is greedy."""
    generator = torch.Generator(device).manual_seed(seed)

    def pick(logits):  # (B, V) -> (B,)
        logits = logits[:, :n_vocab]
        if temperature == 0:
            return logits.argmax(-1)
        total = (logits / temperature).softmax(-1).cumsum(-1)  # one random number a row; multinomial draws V
        u = torch.rand((len(logits), 1), generator=generator, device=device) * total[:, -1:]
        return torch.searchsorted(total, u, right=True)[:, 0].clamp_(max=n_vocab - 1)

    return pick

def write_answers(model, tokenizer, tasks, samples=1, temperature=1.0, seed=0, max_new_tokens=None):
    """Answer each prompt `samples` times -> a list of Answers for each; an answer ends with the turn, with
    the text, or where the context is full."""
    if not tasks:
        return []
    T = model.config.seq_len
    prompts = [render(tokenizer, task["prompt"], reply=True)[0] for task in tasks]
    longest = max(map(len, prompts))
    check(longest < T, f"A prompt of {longest} tokens leaves no room for an answer: the context has {T}.")
    limits = [min(T - len(prompt), max_new_tokens or T) for prompt in prompts]
    stop = {tokenizer.im_end_id, tokenizer.eot_id} - {None}
    device = next(model.parameters()).device
    pick = sampler(temperature, tokenizer.n_vocab, seed, device)
    groups = [[] for _ in tasks]
    for i, ids in enumerate(generate(model, prompts, limits, pick, stop, samples)):
        ended = ids[-1] in stop
        text = tokenizer.decode(ids[:-1] if ended else ids)
        groups[i // samples].append(Answer(tasks[i // samples], prompts[i // samples], ids, text, ended))
    return groups

class Judge:
    """Score conversations with a reward model, as text that it reads with its own tokenizer.

    Of one that is longer than its context it reads the end, so that the answer is seen; it says so once.
    """

    def __init__(self, folder: str, device):
        self.folder = folder
        self.model = load_model(folder, device)
        self.tokenizer = load_tokenizer(folder)
        self.fingerprint = fingerprint(self.model)
        self.said = False
        is_judge = self.model.config.head == "score"
        check(is_judge, f"{folder} is no reward model: `python align.py reward` trains one.")

    @torch.no_grad()
    def __call__(self, conversations: list[list[dict]]) -> list[float]:
        T = self.model.config.seq_len
        examples = [Example(*render(self.tokenizer, talk)) for talk in conversations]
        longer = sum(len(e.ids) > T for e in examples)
        if longer and not self.said:
            self.said = True
            say(f"{self.folder} reads {T} tokens: of {longer} of {len(examples)} texts the beginning is left "
                "out, and of later ones too.")
        items = [Item([Example(e.ids[-T:], e.trained[-T:])]) for e in examples]
        batches = [items[i : i + 64] for i in range(0, len(items), 64)]
        return [x for some in batches for x in scores(self.model, batch_of(self.model, some)).tolist()]

class Reward:
    """Give an answer the weighted sum of

    checks         half the share of the checks that it passes, and half when it passes all: 0 to 1
    parses, ...    one of CHECKS, 0 or 1
    a folder       a reward model's score

    less `unended` where it did not end by itself. specs: each NAME or NAME:WEIGHT.
    """

    def __init__(self, specs: list[str], unended: float, device):
        self.unended = unended
        self.judges = []  # and their weights
        for spec in specs:
            found = re.fullmatch(r"(.+?)(?::(-?(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?))?", spec)
            check(found, f"--reward {spec!r}: write NAME or NAME:WEIGHT.")
            name, weight = found.groups("1")
            judge = name if name == "checks" or name in CHECKS else Judge(name, device)
            self.judges.append((judge, float(weight)))
        self.fingerprint = [judge.fingerprint for judge, _ in self.judges if isinstance(judge, Judge)]

    def __call__(self, answers: list[Answer]) -> list[float]:
        total = np.array([0.0 if a.ended else -self.unended for a in answers], float)
        for judge, weight in self.judges:
            total += weight * np.array(self.ask(judge, answers))
        return total.tolist()

    def ask(self, judge: str | Judge, answers: list[Answer]) -> list[float]:
        if isinstance(judge, Judge):
            return judge([a.conversation for a in answers])
        check(all(a.task["check"] for a in answers),
              f"--reward {judge} needs prompts that carry checks: `python align.py data` makes them.")
        if judge in CHECKS:
            return [a.grades[judge] for a in answers]
        return [(sum(a.grades.values()) / len(CHECKS) + a.good) / 2 for a in answers]

# ---- The stages that learn from their own answers: PPO and GRPO --------------------------------------------

class Play(Method):
    """Write answers, have them rewarded, and know of each token what it was worth when the policy wrote it.

    An item is a group, the answers to one prompt. Its facts: rewards, one for each answer; for each token
    logp, its log p under the policy that wrote it, reference, the same under the reference, and advantages.
    """

    judged = 200

    def load(self, paths, learner):
        counts = Counter()
        prompts = []
        room = learner.model.config.seq_len - min(16, self.o.max_new_tokens)
        for task in itertools.chain(*(load_prompts(path) for path in paths)):
            fits = len(render(learner.tokenizer, task["prompt"], reply=True)[0]) <= room
            counts["prompts" if fits else "left out: no room for an answer"] += 1
            if fits and not task["held_out"]:
                prompts.append(task)
        return prompts, counts

    def prompt_of(self, task):
        return task["prompt"]

    def prepare(self, learner):
        o, device = self.o, learner.ranks.device
        self.learner = learner
        self.reference = load_model(o.model, device)
        self.reference.compute_dtype = learner.model.compute_dtype
        self.actor = Transformer(learner.model.config).to(device, learner.model.compute_dtype)
        self.reward = Reward(o.reward, o.unended, device)
        self.seconds = math.inf  # that the last answers took to write
        learner.keep(model=fingerprint(self.reference), reward=self.reward.fingerprint)

    def answer(self, tasks: list[dict], samples: int, temperature: float, *seed) -> list[list[Answer]]:
        """Answer each prompt `samples` times, and reward the answers; the ranks share the prompts."""
        self.actor.load_state_dict(merged(self.learner.model))

        def work(mine):
            began = time.perf_counter()
            own_seed = seed_of(self.o.seed, *seed, self.learner.ranks.rank)
            groups = write_answers(self.actor, self.learner.tokenizer, mine, samples, temperature, own_seed,
                                   self.o.max_new_tokens)
            self.seconds = time.perf_counter() - began
            answers = list(itertools.chain(*groups))
            for answer, reward in zip(answers, self.reward(answers) if answers else [], strict=True):
                answer.reward = reward
            return groups

        return share_over_ranks(work, tasks)

    def evaluate(self, learner):
        return summarize(self.answer(learner.val, 1, JUDGED_AT, "val"))

    def keeps(self, group: list[Answer]) -> bool:
        """Tell whether there is something to learn from a group."""
        return len(group) > 0

    def observe(self, groups: list[list[Answer]]) -> list[Item]:
        """Make items of the groups that are worth it, before the policy learns from them."""
        items = []
        for group in filter(self.keeps, groups):
            rewards = torch.tensor([a.reward for a in group])
            items.append(Item([as_example(a.prompt, a.ids) for a in group], {"rewards": rewards}))
        for model in (self.reference, self.learner.model):
            seen = self.learner.score(functools.partial(self.facts, model), items)
            for item, facts in zip(items, seen, strict=True):
                item.facts |= {"reference": facts["logp"]} if model is self.reference else facts
        return items

    def facts(self, model, items: list[Item]) -> list[dict]:
        """Read each item's answers -> what there is to know of its tokens."""
        found = self.read(model, batch_of(model, items))
        sizes = [trained_tokens(item.examples) for item in items]
        parts = zip(*(values.cpu().split(sizes) for values in found.values()), strict=True)
        return [dict(zip(found, part, strict=True)) for part in parts]

    def read(self, model, batch: Batch) -> dict:
        """Compute log p of the answers' tokens at the temperature that they were drawn with, and what else is
        computed from the hidden states that they came from: (N,) each."""
        hidden = batch.read(model, at=batch.at, output="hidden")  # (N, C)
        cooled = hidden / self.o.temperature
        logp = -token_losses(cooled, model.lm_head, batch.targets, model.config.vocab_size)
        return {"logp": logp} | self.more(model, hidden)

    def more(self, model, hidden) -> dict:
        return {}

    def credit(self, items: list[Item]) -> dict:
        """Give each token its advantage -> what is logged of that."""
        raise NotImplementedError

    def loss(self, model, items):
        """Compute the clipped loss of tokens, which GRPO and PPO add to in `total`."""
        o = self.o
        batch = batch_of(model, items)
        now = self.read(model, batch)
        then = {name: facts_of(items, name, batch.at.device) for name in items[0].facts}
        log_ratio = now["logp"] - then["logp"]
        bounds = (o.clip, o.clip_high or o.clip)
        metrics = {"policy_loss": clipped_loss(log_ratio, then["advantages"], *bounds),
                   "clip_fraction": beyond_clip(log_ratio, then["advantages"], *bounds)}
        return self.total(metrics, now, then, batch)

class GRPO(Play):
    """Give each token of an answer the advantage of the answer in its group: no critic.

    Loss: `clipped_loss` and kl_coef times `kl_estimate` (kl_loss), over tokens or answers as --normalize
    says. With `sequence` it begins at zero: at r = 1 an answer's is minus its advantage, and a group's
    advantages add up to nothing. By token longer answers count for more. Its gradient is what learns: watch
    the reward, not the loss.
    """

    def keeps(self, group):
        return len(group) > 1 and not is_flat(group)

    def weight(self, item):
        return trained_tokens(item.examples) if self.o.normalize == "token" else len(item.examples)

    def credit(self, items):
        for item in items:
            advantages = group_advantages(item.facts["rewards"], self.o.scale == "std")
            lengths = torch.tensor([trained_tokens([e]) for e in item.examples])
            item.facts["advantages"] = advantages.repeat_interleave(lengths)
        return {}

    def total(self, metrics, now, then, batch):
        metrics["kl_loss"] = kl_estimate(then["reference"] - now["logp"])
        losses = metrics["policy_loss"] + self.o.kl_coef * metrics["kl_loss"]
        if self.o.normalize == "token":
            return {"loss": losses} | metrics
        lengths = batch.lengths[batch.owner]  # (N,)
        scale = self.o.max_new_tokens if self.o.normalize == "constant" else lengths
        return {"loss": losses / scale} | {name: values / lengths for name, values in metrics.items()}

class PPO(Play):
    """Train policy and critic. A token's reward is -kl_coef log(p / p_ref), and the last one's the answer's
    reward besides (1909.08593, eq. 2). GAE over them; `clipped_loss` on whitened advantages, `value_loss` on
    the returns.

    What decides whether it works, numbered as in Huang, Liu & von Werra 2023 ("The N Implementation Details
    of RLHF with PPO"): 1 log p is taken at the temperature of the answers (`read`); 2 the critic begins at
    zero, so that the first advantages are the rewards (`extend`); 4 no dropout: the ratio of a policy to
    itself is 1; 5 an answer that does not end pays (--unended); 6 rewards are not discounted (gamma); 7 a
    step's answers are shuffled and learned from in minibatches (`play`); 8 the KL is paid token by token
    (`credit`); 9 advantages are whitened, here over the step, so that a minibatch's mean is not lost, and
    rewards are not (`credit`); 10 a value is held back like a ratio (`value_loss`); 11 the KL's price can
    adapt to a target (`next_kl_coef`).

    Logged besides: explained_variance of the returns by the critic (near 0 at first, then up; below 0 it
    harms: lower --lr or raise --value-coef), kl_coef, and the parts of the loss.
    """

    def extend(self, model):
        self.critic = nn.Linear(model.config.n_embd, 1, device=model.norm.weight.device)
        nn.init.zeros_(self.critic.weight)
        nn.init.zeros_(self.critic.bias)
        model.add_module("critic", self.critic)

    def prepare(self, learner):
        super().prepare(learner)
        self.numbers["kl_coef"] = learner.saved.get("kl_coef", self.o.kl_coef)

    def weight(self, item):
        return trained_tokens(item.examples)

    def more(self, model, hidden):
        found = {"values": self.critic(hidden.float())[:, 0]}
        if self.o.entropy_coef:
            p = model.lm_head(hidden / self.o.temperature).float().softmax(-1)
            found["entropy"] = -torch.xlogy(p, p).sum(-1)
        return found

    def credit(self, items):
        o, coef = self.o, self.numbers["kl_coef"]
        for item in items:
            facts = item.facts
            lengths = [trained_tokens([e]) for e in item.examples]
            kls = (facts["logp"] - facts["reference"]).split(lengths)
            advantages = []
            values_of = facts["values"].split(lengths)
            for reward, kl, values in zip(facts["rewards"], kls, values_of, strict=True):
                rewards = -coef * kl
                rewards[-1] += reward
                advantages += gae(rewards.tolist(), values.tolist(), o.gamma, o.lam)
            facts["advantages"] = torch.tensor(advantages)
            facts["returns"] = facts["advantages"] + facts["values"]
        if not items:
            return {}
        advantages = facts_of(items, "advantages")
        mean, std = advantages.mean(), advantages.std()
        for item in items:
            item.facts["advantages"] = (item.facts["advantages"] - mean) / (std + 1e-8)
        if o.kl_target:
            self.numbers["kl_coef"] = next_kl_coef(coef, distance(items)["kl_answer"], o.kl_target)
        unexplained = advantages.var() / facts_of(items, "returns").var().clamp(min=1e-8)
        return {"explained_variance": 1 - float(unexplained), "kl_coef": coef}

    def total(self, metrics, now, then, batch):
        o = self.o
        metrics["value_loss"] = value_loss(now["values"], then["values"], then["returns"], o.value_clip)
        losses = metrics["policy_loss"] + o.value_coef * metrics["value_loss"]
        if o.entropy_coef:
            losses = losses - o.entropy_coef * now["entropy"]
        return {"loss": losses} | metrics

METHODS = {"sft": SFT, "reward": RewardModel, "dpo": DPO, "grpo": GRPO, "ppo": PPO}

def play(o: PlayStage) -> dict:
    """Run GRPO or PPO: they differ in what they credit a token with, and in what they add to the loss.

    Logged of a step's answers: reward and reward_std; good, what the checks say whatever the reward was;
    length, ended, distinct; flat, the share of groups whose rewards are all equal; nan_rewards, those that
    are no number. Of those that it learns from: kl to the reference in nats a token (mean log p / p_ref),
    kl_answer, entropy of a token (mean -log p), clip_fraction. Of the time: rollout_share (answers and
    rewards), generated_per_s.

    Healthy: reward and good rise together, kl grows slowly (to some tenths of a nat), entropy falls slowly
    and stays above zero, distinct stays; clip_fraction is some per cent. Reward up with good or distinct down
    is hacking: raise kl_coef.
    """
    learner = Learner(o)
    method = learner.method
    run = Run(o, learner.ranks, learner.save, learner.evaluate, learner.saved)
    for step, lr in run.steps():
        if not run.records:
            run.evaluate(last=False)
        began = time.perf_counter()
        # 1. Answers and their rewards; an answer whose reward is no number is left out
        prompts = draw(learner.items, o.batch_size, step, o.seed)
        groups = method.answer(prompts, o.samples, o.temperature, "play", step)
        played = time.perf_counter() - began
        summary = summarize(groups)
        groups = [[a for a in group if math.isfinite(a.reward)] for group in groups]
        # 2. Credit to each of their tokens
        items = method.observe(groups)
        flat = sum(map(is_flat, groups)) / len(groups)
        run.note(**summary, flat=flat, **distance(items), **method.credit(items))
        # 3. Updates
        for turn in range(o.passes if items else 0):
            order = np.random.default_rng([o.seed, step, turn]).permutation(len(items))
            for part in np.array_split(order, min(o.minibatches, len(items))):
                metrics = learner.measure([items[i] for i in part], run.scale)  # forward and backward
                learner.sum_gradients()
                grad_norm = clip_gradients(learner.model.parameters(), o.grad_clip, run.scale)
                run.update(learner.optimizer, lr, **metrics, grad_norm=grad_norm)
        tokens = round(summary["length"] * o.batch_size * o.samples)
        seconds = time.perf_counter() - began
        run.note(tokens=tokens, rollout_share=played / seconds, generated_per_s=tokens / method.seconds)
    return run.result

def is_flat(group: list[Answer]) -> bool:
    """Tell whether all rewards are equal. (A reward model's, of equal answers, differ in the last digits.)"""
    rewards = [a.reward for a in group] or [0.0]
    return max(rewards) - min(rewards) < 1e-4

def distance(items: list[Item]) -> dict:
    """Measure how far the policy is from the reference, on the tokens that it wrote."""
    if not items:
        return {"kl": 0.0, "kl_answer": 0.0, "entropy": 0.0}
    logp = facts_of(items, "logp")
    kl = logp - facts_of(items, "reference")
    answers = sum(len(item.examples) for item in items)
    return {"kl": float(kl.mean()), "kl_answer": float(kl.sum()) / answers, "entropy": -float(logp.mean())}

def summarize(groups: list[list[Answer]]) -> dict:
    """Average what answers are like; rewards that are no number are left out, and counted."""
    answers = list(itertools.chain(*groups))
    rewards = [a.reward for a in answers if math.isfinite(a.reward)]
    lost = len(answers) - len(rewards)
    if lost:
        say(f"{lost} of {len(answers)} rewards are no number; these answers are left out.")
    rewards = rewards or [math.nan]
    summary = {"reward": np.mean(rewards), "good": np.mean([a.good for a in answers])}
    summary["length"] = np.mean([len(a.ids) for a in answers])
    summary["ended"] = np.mean([a.ended for a in answers])
    summary |= {"distinct": len({a.text for a in answers}) / len(answers), "reward_std": np.std(rewards)}
    summary |= {"nan_rewards": lost} if lost else {}
    return {name: float(value) for name, value in summary.items()}

# ---- How good are a model's answers? -----------------------------------------------------------------------

def row(values) -> tuple[float, float, float, int]:
    """Average values -> (mean, its 95 % confidence interval, n).

    Of rates it is Wilson's (1927), sensible at 0 and 1 too; else the normal one.

    >>> [round(x, 3) for x in row([False] * 10)]
    [0.0, 0.0, 0.278, 10]
    """
    n, z = len(values), 1.96
    mean = float(np.mean(values))
    if set(values) <= {0, 1}:
        shrink = 1 + z * z / n
        middle = (mean + z * z / (2 * n)) / shrink
        half = z / shrink * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n))
        return mean, max(0.0, middle - half), min(1.0, middle + half), n
    half = z * float(np.std(values)) / math.sqrt(max(1, n - 1))
    return mean, mean - half, mean + half, n

def answer_all(folder, tasks, temperature, seed, device, max_new_tokens=None, samples=1) -> list:
    """Let the model of a folder answer prompts -> `samples` answers to each."""
    model = load_model(folder, device, pick_dtype("auto", device))
    check(model.config.head == "lm", f"{folder} is a reward model: it gives scores, not answers.")
    tokenizer = load_tokenizer(folder)
    groups = []
    with progress(f"{folder} answers", len(tasks)) as show:
        for i in range(0, len(tasks), 500):
            part = tasks[i : i + 500]
            part_seed = seed_of(seed, i)
            groups += write_answers(model, tokenizer, part, samples, temperature, part_seed, max_new_tokens)
            show(len(groups))
    return groups

@torch.no_grad()
def mean_kl(policy, reference, items: list[Item]) -> list[float]:
    """Compute KL(policy || reference) of each item, in nats a token: not sampled."""
    result = []
    for i in range(0, len(items), 16):
        batch = batch_of(policy, items[i : i + 16])
        p, q = (batch.read(m, at=batch.at).float().log_softmax(-1) for m in (policy, reference))  # (N, V)
        kl = sum_by_example((p.exp() * (p - q)).sum(-1), batch)
        result += (kl / batch.lengths.clamp(min=1)).tolist()
    return result

def vote(answers: list[Answer]) -> Answer:
    """Choose the answer that most agree with (self-consistency: 2203.11171), the first of them. Two agree as
    syntax trees where they parse, else as texts; no reward is asked."""
    forms = []
    for a in answers:
        rules = a.task["check"]
        tree = parse(rules["before"] + a.text + rules["after"]) if rules and a.ended else None
        forms.append((tree and attempt(ast.dump, tree)) or a.text.strip())
    return answers[forms.index(Counter(forms).most_common(1)[0][0])]

def rates(answers: list[Answer]) -> dict:
    """Measure what the checks say, for each task and over the tasks that were trained."""
    rows = {}
    checked = [a for a in answers if a.task["check"]]
    for task in sorted({a.task["task"] for a in checked}):
        some = [a for a in checked if a.task["task"] == task]
        held_out = any(a.task["held_out"] for a in some)
        rows[f"good: {task}{' (held out)' * held_out}"] = row([a.good for a in some])
    trained = [a for a in checked if not a.task["held_out"]] or answers
    rows["good"] = row([all(a.grades.values()) for a in trained])
    for name in CHECKS if checked else ("ends",):
        rows[name] = row([a.grades[name] for a in trained if name in a.grades])
    texts = [a.text for a in answers]
    rows["distinct"] = row([text not in texts[:i] for i, text in enumerate(texts)])
    return rows | {"length, tokens": row([len(a.ids) for a in answers])}

def compare(folder, against, reward, answers: list[Answer], theirs: list[Answer], device) -> dict:
    """Measure how far a model's answers are from another model, and which of the two answers better."""
    model, other = load_model(folder, device), load_model(against, device)
    check(other.config.vocab_size == model.config.vocab_size,
          f"{folder} and {against} have other vocabularies: no KL compares them.")
    items = [Item([as_example(a.prompt, a.ids)]) for a in answers]
    rows = {"KL to the other, nats a token": row(mean_kl(model, other, items))}

    def wins(mine, others):
        return row([(a > b) + 0.5 * (a == b) for a, b in zip(mine, others, strict=True)])

    if all(a.task["check"] for a in answers):
        passed = ([sum(a.grades.values()) for a in some] for some in (answers, theirs))
        rows["wins by the checks"] = wins(*passed)
    if reward:
        judge = Judge(reward, device)
        scored = (judge([a.conversation for a in some]) for some in (answers, theirs))
        rows["wins by the reward model"] = wins(*scored)
    return rows

def best_of(groups: list[list[Answer]], reward, device) -> dict:
    """Measure what several answers to a prompt are worth: pass@k, their vote, the judge's best."""
    n = len(groups[0])
    rows = {}
    for k in sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n}):
        rows[f"pass@{k}"] = row([pass_at_k(n, sum(a.good for a in group), k) for group in groups])
    rows[f"good: vote of {n}"] = row([vote(group).good for group in groups])
    if reward:
        found = Judge(reward, device)([a.conversation for group in groups for a in group])
        best = np.reshape(found, (-1, n)).argmax(1)
        chosen = [group[i].good for group, i in zip(groups, best, strict=True)]
        rows[f"good: best of {n} by the reward model"] = row(chosen)
    return rows

def assess(folder, records, against=None, reward=None, temperature=JUDGED_AT, seed=0, text=None, device=None,
           samples=1) -> dict:
    """Measure everything that `evaluate` prints: {name: (value, low, high, n)}."""
    device = device or pick_device()
    checked = [r for r in records if r["check"] and not r["held_out"]]
    check(samples == 1 or checked,
          "--samples needs prompts that carry checks, as `python align.py data` makes them.")
    check(not reward or against or samples > 1,
          "--reward judges between answers: give --against another folder, or --samples.")
    answers = [group[0] for group in answer_all(folder, records, temperature, seed, device)]
    rows = rates(answers)
    if against:
        theirs = [group[0] for group in answer_all(against, records, temperature, seed, device)]
        rows |= compare(folder, against, reward, answers, theirs, device)
    if samples > 1:
        groups = answer_all(folder, checked, temperature, seed, device, samples=samples)
        rows |= best_of(groups, reward, device)
    if text:
        tokens = Tokens(text, "val")
        check(tokens.vocab_size == load_tokenizer(folder).n_vocab,
              f"{text} and {folder} have different tokenizers: give the --data of its pretraining.")
        model = load_model(folder, device)
        found = evaluate_text(model, tokens, model.config.seq_len, 16, 50_000)
        rows["bits per byte of the pretraining text"] = (found["val_bpb"], None, None, found["val_tokens"])
    return rows

# ---- The commands ------------------------------------------------------------------------------------------

def write_lines(path: Path, records: list[dict], overwrite: bool) -> None:
    check(overwrite or not path.exists(), f"{path} exists already: --overwrite replaces it.")
    save_files(path.parent, {path.name: "".join(json.dumps(record) + "\n" for record in records)})

def run_stage(o: Stage) -> dict | None:
    """Run a training stage, or only show what it would train."""
    if o.show_mask:
        return print_mask(o)
    return play(o) if isinstance(o, PlayStage) else learn(o)

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__.split("\n\n")[0])
for kind in (SFTStage, RewardStage, DPOStage, PPOStage, GRPOStage):
    app.command(kind.command, help=kind.__doc__)(command(kind, run_stage))

Folder = Annotated[str, typer.Argument(help="Checkpoint folder that answers.")]
Prompts = Annotated[str, typer.Option(help="JSON lines with prompts, and checks.")]
Limit = Annotated[int, typer.Option(help="Prompts, drawn evenly; 0: all.")]
Task = Annotated[str | None, typer.Option(help="Prompts of this task only.")]
Temperature = Annotated[float, typer.Option(help="Of the answers: 1 as the model says, 0 greedy.")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")]

@app.command()
def data(
    source: Annotated[str, typer.Option("--data", help="Data folder to take apart.")] = "data/python",
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("data/instructions"),
    held_out: Annotated[str, typer.Option(help=f"Task only judged: {', '.join(TASKS)}.")] = "continue",
    limit: Annotated[int, typer.Option(help="Most training examples of a task.")] = 4000,
    val_limit: Annotated[int, typer.Option(help="Most examples of a task to judge by.")] = 150,
    max_tokens: Annotated[int, typer.Option(help="Longest conversation: the model's context.")] = 256,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Make instructions from Python functions: training ones from the modules that pretraining trained on,
    those to judge by from the modules that it only validated on."""
    check(held_out in TASKS, f"--held-out is one of {', '.join(TASKS)}; not {held_out!r}.")
    check(min(limit, val_limit) >= 1, "--limit and --val-limit have to be at least 1.")
    for path in (out / "train.jsonl", out / "val.jsonl"):
        check(overwrite or not path.exists(), f"{path} exists already: --overwrite replaces it.")
    default_data(source, Ranks())
    for split, most in (("train", limit), ("val", val_limit)):
        records, dropped = instructions_of(source, split, most, max_tokens, seed)
        records = [r | ({"held_out": True} if r["task"] == held_out else {}) for r in records]
        records = [r for r in records if split == "val" or r["task"] != held_out]
        say(f"{split}: {describe(Counter(r['task'] for r in records))}; {describe(dropped)}")
        check(records, f"The {split} split of {source} has no function to make instructions of.")
        random.Random(seed).shuffle(records)
        write_lines(out / f"{split}.jsonl", records, overwrite)
    say(f"{out} written. One of them:\n")
    for message in records[0]["messages"]:
        say(f"[{message['role']}]\n{message['content']}", markup=False, style="cyan")

@app.command()
def pairs(
    folder: Folder = "out/sft",
    prompts: Prompts = "data/instructions/train.jsonl",
    out: Annotated[Path, typer.Option(help="JSON-lines file to write.")] = Path("data/pairs.jsonl"),
    samples: Annotated[int, typer.Option(help="Answers to each prompt.")] = 3,
    limit: Limit = 8000,
    task: Task = None,
    temperature: Temperature = JUDGED_AT,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Rank a model's own answers by the checks: each good one beside each bad one to the same prompt.

    Prompts whose answers are all good or all bad teach nothing and are counted. A bad answer that was cut off
    is left out: it would be given an end that nobody wrote, to unlearn it."""
    check(samples >= 2, "--samples has to be at least 2: a preference is between two answers.")
    check(overwrite or not out.exists(), f"{out} exists already: --overwrite replaces it.")
    records = [r for r in load_prompts(prompts, limit, task) if r["check"]]
    check(records, f"The prompts of {prompts} carry no checks: rank by hand with `python align.py label`.")
    made, counts = [], Counter()
    for group in answer_all(folder, records, temperature, seed, pick_device(device), max_new_tokens, samples):
        asked = {name: group[0].task[name] for name in ("prompt", "task")}
        group.sort(key=lambda a: -sum(a.grades.values()))
        good = dict.fromkeys(a.text for a in group if a.good)
        bad = dict.fromkeys(a.text for a in group if a.ended and not a.good)
        counts["all good" if not bad else "none good" if not good else "with both"] += 1
        for chosen, rejected in itertools.product(good, bad):
            made.append(asked | {"chosen": chosen, "rejected": rejected})
    say(f"{samples} answers of {folder} to each of {len(records):,} prompts: {describe(counts)}")
    check(made, f"No prompt had a good answer and a bad one: train {folder} further, or raise --temperature.")
    write_lines(out, made, overwrite)
    say(f"{out} written: {len(made):,} pairs.")

@app.command()
def label(
    folder: Folder = "out/sft",
    prompts: Prompts = "data/instructions/val.jsonl",
    out: Annotated[Path, typer.Option(help="JSON lines to add the pairs to.")] = Path("data/labels.jsonl"),
    limit: Limit = 50,
    temperature: Temperature = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Show two answers: 1 or 2 for the better one, s to skip, q to end. What is chosen is written at once;
    prompts that the file has already are not asked again."""
    done = [r.get("prompt") for r in read_lines(out, dict)] if out.exists() else []
    records = [r for r in load_prompts(prompts, limit) if r["prompt"] not in done]
    if not records:
        return say(f"All prompts are labelled in {out}.")
    groups = answer_all(folder, records, temperature, seed, pick_device(device), samples=2)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="utf-8") as file:
        for i, (first, second) in enumerate(groups):
            key = "s" if first.text == second.text else ask(first, second, f"{i + 1} of {len(groups)}")
            if key == "q":
                break
            if key != "s":
                chosen, rejected = (first, second) if key == "1" else (second, first)
                record = {"prompt": first.task["prompt"], "chosen": chosen.text, "rejected": rejected.text}
                file.write(json.dumps(record) + "\n")
                file.flush()
    say(f"{out} holds {sum(1 for _ in read_lines(out, dict))} pairs.")

def ask(first: Answer, second: Answer, title: str) -> str:
    """Show two answers side by side and read a key: without Enter on a terminal, else from standard input."""
    from rich.columns import Columns
    from rich.markup import escape
    from rich.panel import Panel

    width = max(20, console().width // 2 - 2)
    console().print(Panel(escape(first.task["prompt"][-1]["content"]), title=title, title_align="left"))
    answers = [Panel(escape(a.text), title=key, width=width) for key, a in (("1", first), ("2", second))]
    console().print(Columns(answers))
    say("[bold]1 / 2 / s / q[/] ? ")
    while True:
        key = typer.getchar() if sys.stdin.isatty() else sys.stdin.read(1) or "q"
        if key.lower() in "12sq":
            return key.lower()

@app.command()
def evaluate(
    folder: Folder = "out/sft",
    against: Annotated[str | None, typer.Option(help="Folder to compare with: KL, win rate.")] = None,
    reward: Annotated[str | None, typer.Option(help="Reward model, with --against or --samples.")] = None,
    prompts: Prompts = "data/instructions/val.jsonl",
    limit: Limit = 0,
    task: Task = None,
    text: Annotated[str | None, typer.Option("--data", help="Pretraining's text.")] = "data/python",
    temperature: Temperature = JUDGED_AT,
    samples: Annotated[int, typer.Option(help="Answers to each prompt: pass@k, vote, best (--reward).")] = 1,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object to standard output.")] = False,
) -> None:
    """Measure how good a model's answers are, by rules, with 95 % confidence intervals."""
    records = load_prompts(prompts, limit, task)
    check(samples >= 1, "--samples has to be at least 1.")
    check(samples == 1 or temperature, "--samples needs a --temperature above 0: greedy answers are all one.")
    check(text in (None, "data/python") or Path(text).is_dir(), f"There is no data folder {text}.")
    text = text if text and Path(text).exists() else None
    rows = assess(folder, records, against, reward, temperature, seed, text, pick_device(device), samples)
    if as_json:
        names = ("value", "low", "high", "n")
        return print(json.dumps({what: dict(zip(names, found, strict=True)) for what, found in rows.items()}))
    from rich.table import Table

    title = f"{folder} against {against}" if against else folder
    table = Table("what", "value", "95 % interval", "n", title=title, title_justify="left")
    for name, (value, low, high, n) in rows.items():
        table.add_row(name, f"{value:.3f}", "" if low is None else f"{low:.3f} to {high:.3f}", f"{n:,}")
    console().print(table)

if __name__ == "__main__":
    run_app(app)
