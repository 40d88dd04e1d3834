"""From a text predictor to something that does what was asked: instructions, preferences, and play against a reward.

A pretrained model goes on with a text. Shown conversations and trained on the assistant's words only (SFT), it answers.
Shown two answers of which one is better, it learns which (reward model), or learns to write the better one (DPO),
without ever leaving the model it began as too far behind (the reference). Or it writes answers itself, is told what each
was worth, and makes the better ones likelier (PPO, GRPO). Everything here works offline on the default data: Python
functions, where a signature and a docstring are the instruction, the body is the answer, and whether it parses, defines
what was asked for, uses its parameters and does something is decided by `ast`, not by a judge.

    python align.py data                                # instructions from the data folder's own modules
    python align.py sft                                 # out/python -> out/sft;  --show-mask 3 prints what is trained
    python align.py pairs out/sft                       # its own answers, ranked by the checks
    python align.py dpo --model out/sft --data data/pairs.jsonl
    python align.py reward --model out/sft --data data/pairs.jsonl
    python align.py grpo                                # out/sft -> out/grpo, rewarded by the checks
    python align.py ppo --reward out/reward:0.1 --reward checks
    python align.py evaluate out/dpo --against out/sft  # --samples 8: pass@k, their vote, best of 8
    python align.py label out/sft                       # which of two answers do you prefer?

Text that a model wrote is parsed and compiled, never executed. Left out: images, rollouts on other machines than training.

SFT and rankings: Ouyang et al. 2022 (2203.02155). DPO: Rafailov et al. 2023 (2305.18290). IPO: Azar et al. 2023
(2310.12036). Noisy labels: Mitchell 2023 (cDPO); Chowdhury et al. 2024 (2403.00409). SimPO: Meng et al. 2024
(2405.14734). LoRA: Hu et al. 2021 (2106.09685). ChatML: OpenAI 2023. PPO: Schulman et al. 2017 (1707.06347), for language
models Ziegler et al. 2019 (1909.08593). GRPO: Shao et al. 2024 (2402.03300).
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
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
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import typer

from model import (
    Branches,
    Linear,
    Log,
    Stopping,
    Tokens,
    Transformer,
    UserError,
    build_optimizer,
    check_out,
    console,
    default_data,
    find_checkpoint,
    generate,
    load_model,
    load_state,
    load_tokenizer,
    lr_at,
    option,
    pick_device,
    pick_dtype,
    render,
    resumed,
    run_app,
    run_command,
    save_checkpoint,
    say,
    seed_of,
    setup_distributed,
    token_losses,
    write_text,
)  # fmt: skip
from model import evaluate as evaluate_text

# B batch, T tokens of a row, V vocabulary, n examples of a batch (several stand in one row).

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True, help=__doc__.split("\n\n")[0])

# ---------------------------------------------------------------------------------------------------------------------
# The idea, I: a conversation as tokens, and whose words are trained


class Example(NamedTuple):
    """A conversation in tokens, as `model.render` gives it; trained[i]: did the assistant write token i?"""

    ids: list[int]
    trained: list[bool]


def pack(lengths: list[int], T: int) -> list[list[int]]:
    """Which examples share a row of T tokens: first fit, the longest first.

    >>> pack([3, 5, 2, 4], 8)
    [[1, 0], [3, 2]]
    """
    rows, room = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, left in enumerate(room) if left >= lengths[i]), None)
        if row is None:
            rows, room, row = [*rows, []], [*room, T], len(rows)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def trunk_of(item: list[Example]) -> int:
    """How many tokens the examples of an item (answers to one prompt) begin with together, before any that is trained.

    >>> trunk_of([Example([5, 6, 7], [False, False, True]), Example([5, 6, 8], [False, False, True])])
    2
    """
    if len(item) == 1:
        return 0
    return min(len(os.path.commonprefix([e.ids for e in item])), *(e.trained.index(True) for e in item))


def size_of(item: list[Example]) -> int:
    """Tokens that it takes in a batch."""
    return sum(len(e.ids) for e in item) - (len(item) - 1) * trunk_of(item)


def answer_tokens(item: list[Example]) -> int:
    """Those of them that are trained."""
    return sum(sum(e.trained[1:]) for e in item)


class Batch(NamedTuple):
    """n examples in rows. What the examples of an item begin with stands there once: each sees this trunk and itself."""

    x: torch.Tensor  # ids (B, T)
    positions: torch.Tensor  # (B, T), in its own text; -1 is padding
    docs: torch.Tensor  # (B, T) number of the example; from n on: of a trunk
    trunks: torch.Tensor  # (B, T) the trunk that it goes on from
    at: torch.Tensor  # (N,) for each trained token of the first example, the second ...: the place before it, in the flattened rows
    targets: torch.Tensor  # (N,) these tokens
    owner: torch.Tensor  # (N,) whose they are
    last: torch.Tensor  # (n,) where each example ends, in the flattened rows
    lengths: torch.Tensor  # (n,) trained tokens of each

    @property
    def place(self) -> dict:
        return {"positions": self.positions, "doc_ids": self.docs, "trunk_ids": self.trunks}


def collate(items: list[list[Example]], T: int, device="cpu") -> Batch:
    """In rows of up to T tokens, or of the longest item's."""
    n, sizes = sum(map(len, items)), [size_of(item) for item in items]
    firsts = list(itertools.accumulate(map(len, items), initial=0))  # number of each item's first example
    rows = pack(sizes, max(T, *sizes))
    T = max(sum(sizes[i] for i in row) for row in rows)
    x = torch.zeros(len(rows), T, dtype=torch.long)
    positions, docs, trunks = (torch.full_like(x, -1) for _ in range(3))
    at, targets, last = [[]] * n, [[]] * n, [0] * n
    for r, row in enumerate(rows):
        end = 0

        def put(ids, position, doc, trunk, r=r):  # -> where the first of them stands
            nonlocal end
            start, end = end, end + len(ids)
            x[r, start:end], positions[r, start:end] = torch.tensor(ids), torch.arange(position, position + len(ids))
            docs[r, start:end], trunks[r, start:end] = doc, trunk
            return r * T + start

        for i in row:
            shared = trunk_of(items[i])
            before = put(items[i][0].ids[:shared], 0, n + i, n + i)
            for k, (ids, trained) in enumerate(items[i], firsts[i]):
                own = put(ids[shared:], shared, k, n + i) - shared
                asked = [j for j in range(1, len(ids)) if trained[j]]
                at[k] = [j - 1 + (own if j > shared else before) for j in asked]
                targets[k], last[k] = [ids[j] for j in asked], own + len(ids) - 1
    lengths = torch.tensor([len(t) for t in targets])
    flat = (torch.tensor(list(itertools.chain(*parts)), dtype=torch.long) for parts in (at, targets))
    owner = torch.arange(n).repeat_interleave(lengths)
    return Batch(*(t.to(device) for t in (x, positions, docs, trunks, *flat, owner, torch.tensor(last), lengths)))


def logps(model, batch: Batch):
    """log p(the assistant's words | the rest) of each example: (n,), float32."""
    losses, _ = model(batch.x, batch.targets, at=batch.at, **batch.place)  # (N,)
    return torch.zeros(len(batch.last), device=losses.device).index_add(0, batch.owner, -losses)


def rewards(model, batch: Batch):
    """The score head at the last token of each example: (n,), float32."""
    return model(batch.x, at=batch.last, **batch.place)[0]


# ---------------------------------------------------------------------------------------------------------------------
# The idea, II: losses on preferences. chosen, rejected (n,): log p(answer) of the policy minus that of the reference


def dpo_loss(chosen, rejected, beta: float = 0.1, label_smoothing: float = 0.0):
    """-log sigmoid(beta * margin) (2305.18290, eq. 7): what the policy says more of the chosen answer than the reference
    does, against the same of the rejected one. ln 2 at the start, where both are nothing.

    label_smoothing: the share of labels thought to be wrong (cDPO): the optimum is then a finite margin.

    >>> dpo_loss(torch.tensor([2.0]), torch.tensor([1.0]), beta=1.0).item()  # ln(1 + 1/e)
    0.31326...
    """
    h = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def robust_loss(chosen, rejected, beta: float = 0.1, label_smoothing: float = 0.0):
    """DPO's loss without the bias that wrong labels give it (2403.00409, eq. 12): its mean over flipped labels is the
    loss of the true ones. It may be negative."""
    h = beta * (chosen - rejected)
    return -((1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)) / (1 - 2 * label_smoothing)


def ipo_loss(chosen, rejected, beta: float = 0.1):
    """(margin - 1 / (2 beta))^2 (2310.12036, eq. 17): a margin to reach, where DPO's wants ever more. On means per token.

    >>> ipo_loss(torch.tensor([2.0]), torch.tensor([1.0]), beta=0.25).item()
    1.0
    """
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simpo_loss(chosen, rejected, beta: float = 2.0, gamma: float = 1.0):
    """-log sigmoid(beta * margin - gamma) (2405.14734, eq. 6), on means per token of the policy alone: no reference."""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


class Variant(NamedTuple):
    """How a preference loss takes log p: as a sum over the answer or a mean, with a reference or without."""

    loss: Callable
    mean: bool
    reference: bool
    options: tuple[str, ...] = ()


VARIANTS = {
    "dpo": Variant(dpo_loss, mean=False, reference=True, options=("label_smoothing",)),
    "robust": Variant(robust_loss, mean=False, reference=True, options=("label_smoothing",)),
    "norm": Variant(dpo_loss, mean=True, reference=True, options=("label_smoothing",)),  # DPO on means per token
    "ipo": Variant(ipo_loss, mean=True, reference=True),
    "simpo": Variant(simpo_loss, mean=True, reference=False, options=("gamma",)),
}


def ranking_loss(scores):
    """Bradley-Terry over all pairs of a ranking, the best first: -log sigmoid(better - worse), mean (2203.02155, eq. 1).

    scores (K,) -> a number.

    >>> ranking_loss(torch.tensor([1.0, 0.0])).item()
    0.31326...
    """
    better, worse = torch.triu_indices(len(scores), len(scores), 1)
    return -F.logsigmoid(scores[better] - scores[worse]).mean()


# ---------------------------------------------------------------------------------------------------------------------
# The idea, III: LoRA


class LoRA(Linear):
    """W x + (alpha / r) B A x with W frozen (2106.09685, eq. 3). B begins at zero, so training begins at the base model."""

    def forward(self, x):
        return super().forward(x) + (x @ self.lora_A.to(x.dtype).T) @ self.lora_B.to(x.dtype).T * self.scale


def add_lora(model: Transformer, rank: int, alpha: float, seed: int) -> None:
    """On every matrix of attention and of the dense feed-forward parts; all but these and a score head is frozen."""
    for name, p in model.named_parameters():
        p.requires_grad_(name == "score.weight")
    for name, module in model.named_modules():
        if isinstance(module, Linear) and name.startswith("layers.") and (".self_attn." in name or name.count(".") == 3):
            module.__class__, module.scale = LoRA, alpha / rank
            generator = torch.Generator().manual_seed(seed_of(seed, name))
            start = torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5
            module.lora_A = nn.Parameter(start.to(module.weight))
            module.lora_B = nn.Parameter(module.weight.new_zeros(module.out_features, rank))


@torch.no_grad()
def merged(model: Transformer) -> dict:
    """The weights with B A added to W: a folder like any other."""
    weights = {n: p for n, p in model.state_dict().items() if not n.endswith(("lora_A", "lora_B")) and n[:7] != "critic."}
    for name, module in model.named_modules():
        if isinstance(module, LoRA):
            weights[f"{name}.weight"] = module.weight + module.lora_B @ module.lora_A * module.scale
    return weights


# ---------------------------------------------------------------------------------------------------------------------
# The idea, IV: a reward that nobody has to label. Text of a model is parsed and compiled, never executed

CHECKS = ("parses", "compiles", "defines", "uses", "content", "ends")
WORK = (ast.Call, ast.BinOp, ast.BoolOp, ast.UnaryOp, ast.Compare, ast.Subscript, ast.Attribute, ast.JoinedStr, ast.For,
        ast.While, ast.With, ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)  # fmt: skip
MAX_CHARS, MAX_DEPTH = 10_000, 20  # of brackets, and of indentation: the parser's time grows with both


def parse(code: str) -> ast.Module | None:
    """The syntax tree, or None where it is no Python, or longer or deeper than anybody writes."""
    depth = deepest = 0
    for c in code:
        depth += (c in "([{") - (c in ")]}")
        deepest = max(deepest, depth)
    indents = max((len(line) - len(line.lstrip()) for line in code.splitlines()), default=0)
    if len(code) > MAX_CHARS or deepest > MAX_DEPTH or indents > 4 * MAX_DEPTH or "\0" in code:
        return None
    try:
        with warnings.catch_warnings(action="ignore"):  # "\d" in a string
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def compiles(tree: ast.Module) -> bool:
    """What the parser lets pass and the compiler does not: `return` outside, `nonlocal` without, names twice."""
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(tree, "<answer>", "exec", dont_inherit=True)
        return True
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return False


def words(text: str) -> set[str]:
    """
    >>> sorted(words("def readLine(file_name): ..."))
    ['def', 'file', 'line', 'name', 'read']
    """
    return {w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", text) if len(w) > 2}


def works(node: ast.FunctionDef, first_line: int) -> bool:
    """Do the statements from this line on do anything? `pass`, `...`, a docstring, `return None`, `return a, b`, a lone
    `raise NotImplementedError()` and calling oneself with one's own parameters do not."""
    params = [a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg)]
    for call in (n for n in ast.walk(node) if isinstance(n, ast.Call)):
        given = [getattr(a, "id", None) for a in call.args]
        if getattr(call.func, "id", getattr(call.func, "attr", None)) == node.name and given == [p for p in params if p != "self"]:
            return False
    statements = [s for s in ast.walk(node) if isinstance(s, ast.stmt) and s.lineno >= first_line]
    done = (s for s in statements if not isinstance(s, (ast.Raise, ast.Assert, ast.Pass)))
    return any(isinstance(n, WORK) for s in done for n in ast.walk(s) if not isinstance(n, ast.Raise))


def grade(check: dict, answer: str, ended: bool) -> dict[str, bool]:
    """What can be verified of an answer: {one of CHECKS: did it pass}. It is a good one when all did.

    check: "before" and "after", the text between which the answer stands; "name" of the function; "params"; "task";
    "shown", what the prompt showed of the code.

    parses, compiles   the text with the answer in its place
    defines            it is one function of the name asked for
    uses               every parameter; a docstring or a name: a word of the code
    content            it does something (`works`); mended code is nearly the broken one; nothing is a copy of the prompt
    ends               the model ended its turn by itself
    """
    task, code = check["task"], check["before"] + answer + check["after"]
    result = dict.fromkeys(CHECKS, False) | {"ends": ended}
    tree = parse(code) if answer.strip() else None
    if tree is None:
        return result
    result |= {"parses": True, "compiles": compiles(tree)}
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef):
        return result
    node = tree.body[0]
    result["defines"] = node.name == (answer.strip() if task == "name" else check["name"])
    new = answer.strip() not in check["shown"]
    if task in ("doc", "name"):
        result["uses"] = bool(words(answer) & words(check["shown"]))
        result["content"] = len(answer.split()) >= 3 and new if task == "doc" else len(answer.strip()) >= 3
        return result
    used = {n.id for s in node.body for n in ast.walk(s) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    result["uses"] = set(check["params"]) <= used
    if task == "mend":
        result["content"] = difflib.SequenceMatcher(None, check["shown"], answer, autojunk=False).ratio() > 0.8
    else:
        result["content"] = new and works(node, check["before"].count("\n") + 1)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The idea, V: learning from one's own answers. Everything is per token of an answer; N tokens of several answers


def gae(rewards: list[float], values: list[float], gamma: float = 1.0, lam: float = 0.95) -> list[float]:
    """Generalized advantage estimates of an answer's T tokens (1506.02438, eq. 16), from the end backwards:

        delta_t = r_t + gamma V_{t+1} - V_t          A_t = delta_t + gamma lam A_{t+1}

    After the last token there is nothing to win. lam 0 trusts the critic's next value alone, lam 1 what was really won.

    >>> gae([0.0, 1.0], [0.5, 0.5], gamma=1.0, lam=0.5)
    [0.25, 0.5]
    """
    advantages, ahead, worth = [], 0.0, 0.0
    for reward, value in zip(reversed(rewards), reversed(values), strict=True):
        ahead = reward + gamma * worth - value + gamma * lam * ahead
        worth = value
        advantages.append(ahead)
    return advantages[::-1]


def clipped_loss(log_ratio, advantages, low: float = 0.2, high: float = 0.2):
    """-min(r A, clip(r, 1 - low, 1 + high) A), r = p_new / p_old of a token: (N,) (PPO, 1707.06347, eq. 7; a wider `high`, so
    that unlikely tokens can rise: DAPO, 2503.14476, eq. 10). Its gradient at r = 1 is the policy gradient's; a token that has
    moved past the bound in the direction that it was pushed in has none.

    >>> clipped_loss(torch.tensor([0.0, 1.0, -1.0]), torch.tensor([1.0, 1.0, -1.0]))
    tensor([-1.0000, -1.2000,  0.8000])
    """
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def value_loss(values, old, returns, clip: float = 0.2):
    """(V - R)^2 / 2, or what it would be had V moved from its old value by `clip` only, where that is more: (N,) (the first of
    PPO's tricks that the paper does not name: 2005.12729, section 3).

    >>> value_loss(torch.tensor([1.0, 1.0]), torch.zeros(2), torch.tensor([1.0, 2.0]))
    tensor([0.3200, 1.6200])
    """
    near = old + (values - old).clamp(-clip, clip)
    return torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2


def group_advantages(rewards, scale: bool = True):
    """How much better an answer is than the others to its prompt: (groups, n) -> (groups, n) (GRPO, 2402.03300, section 4.1.2).

    scale: divided by the group's standard deviation, as in the paper; without, prompts that are nearly always or hardly ever
    answered well do not count for more (Dr. GRPO, 2503.20783). A group of equal rewards has no advantages.

    >>> group_advantages(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), scale=False)
    tensor([[ 0.5000, -0.5000],
            [ 0.0000,  0.0000]])
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, keepdim=True) + 1e-4) if scale else centred


def kl_estimate(log_ratio):
    """r - 1 - log r with r = p_ref / p, from log r: (N,), unbiased for KL(p || p_ref) in mean over p's tokens, never negative
    (Schulman 2020, "Approximating KL divergence", k3). As a loss its gradient is that of KL(p_ref || p), the other way round."""
    return log_ratio.exp() - 1 - log_ratio


def adapted(coef: float, kl: float, target: float) -> float:
    """The KL coefficient after a step whose answers lay at `kl`: a little up where that is too far, down where it is not
    (1909.08593, section 2.2)."""
    return coef * (1 + 0.1 * min(max(kl / target - 1, -0.2), 0.2))


def pass_at_k(n: int, right: int, k: int) -> float:
    """Probability that of k answers, drawn from n of which so many are right, one is (2107.03374, eq. 1).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1 - math.comb(n - right, k) / math.comb(n, k)


# ---------------------------------------------------------------------------------------------------------------------
# Instructions from Python's own functions

TASKS = {
    "body": "Write the body of this function.",
    "doc": "Write the docstring of this function.",
    "name": "Name this function.",
    "mend": "Mend this broken code.",
    "continue": "Continue this code.",
}


def find_functions(text: str) -> Iterator[tuple[ast.FunctionDef, list[str]]]:
    """Functions and methods of a module, each with its lines, dedented and without decorators; those with tabs are not."""
    tree = parse_module(text)
    lines = text.splitlines()
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.FunctionDef) and node.body[0].lineno > node.lineno:
            own = lines[node.lineno - 1 : node.end_lineno]
            if not any("\t" in line for line in own):
                yield node, textwrap.dedent("\n".join(own)).split("\n")


def parse_module(text: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError):
        return None


def break_code(code: str, rng: random.Random) -> str | None:
    """The code with one mistake that keeps it from parsing: a colon, a bracket or a quote is gone, a line is shifted."""
    places = [m.start() for m in re.finditer(r":$|[()\[\]{}'\"]", code, re.M)] + [m.end() for m in re.finditer(r"\n +", code)]
    for place in rng.sample(places, len(places)):
        broken = code[:place] + " " + code[place:] if code[place - 1] == " " else code[:place] + code[place + 1 :]
        if parse(broken) is None:
            return broken
    return None


def make_instructions(node: ast.FunctionDef, lines: list[str], rng: random.Random) -> Iterator[dict]:
    """The tasks that a function is good for: {"messages", "task", "check"}, the answer being what its author wrote."""
    first, offset = node.body[0], node.lineno
    doc, start = ast.get_docstring(node), first.lineno - offset
    head, after_doc = lines[:start], first.end_lineno - offset + 1 if doc else start
    body = "\n".join(lines[after_doc:]).strip("\n")
    if not body.strip() or (doc and len(node.body) == 1):
        return
    params = [a.arg for a in ast.walk(node.args) if isinstance(a, ast.arg) and a.arg not in ("self", "cls") and a.arg[0] != "_"]
    indent = re.match(" *", lines[start]).group()
    signature = "\n".join(head)
    facts = {"name": node.name, "params": params}

    def record(task, shown, answer, before, after=""):
        check = {"task": task, "before": before, "after": after, "shown": shown, **facts}
        messages = [{"role": "user", "content": f"{TASKS[task]}\n\n{shown}"}, {"role": "assistant", "content": answer}]
        return {"messages": messages, "task": task, "check": check}

    summary = doc and doc.strip().split("\n\n")[0].strip()
    if doc and summary and '"""' not in summary and "\\" not in summary and summary[-1] != '"':
        summary = textwrap.indent(summary, indent).strip()
        shown = f'{signature}\n{indent}"""{summary}"""'
        if params:
            yield record("body", shown, body, shown + "\n")
        shown = f"{signature}\n{body}"
        yield record("doc", shown, summary, f'{signature}\n{indent}"""', f'"""\n{body}')
    bare = "\n".join(head) + "\n" + body  # without the docstring, which would give the name away
    if re.fullmatch(r"[a-z_]\w{2,}", node.name, re.I):
        shown = bare.replace(f"def {node.name}(", "def _(", 1)
        yield record("name", shown, node.name, "def ", bare[len(f"def {node.name}") :])
    if broken := break_code(bare, rng):
        yield record("mend", broken, bare, "")
    statements = node.body[1:] if doc else node.body
    if len(statements) > 1:
        cut = statements[rng.randrange(1, len(statements))].lineno - offset
        shown = "\n".join(lines[:cut])
        yield record("continue", shown, "\n".join(lines[cut:]).strip("\n"), shown + "\n")


def instructions_of(folder: str, split: str, limit: int, max_tokens: int, seed: int) -> Iterator[tuple[dict, Counter]]:
    """Records from the documents of one split of a data folder, shuffled; at most `limit` a task, all of which the checks
    find good. Beside each the count of all that was seen so far."""
    tokens, tokenizer = Tokens(folder, split), load_tokenizer(folder)
    ids = tokens.read(0, tokens.n)
    documents = np.split(ids, np.flatnonzero(ids == tokens.eot_id) + 1)
    rng, counts, seen = random.Random(seed_of(seed, split)), Counter(), set()
    for i in rng.sample(range(len(documents)), len(documents)):
        text = tokenizer.decode([t for t in documents[i].tolist() if t != tokens.eot_id])
        for node, lines in find_functions(text):
            if len(lines) > 60 or (key := "\n".join(lines)) in seen:
                continue
            seen.add(key)
            for record in make_instructions(node, lines, rng):
                task, answer = record["task"], record["messages"][1]["content"]
                if counts[task] >= limit:
                    continue
                good = all(grade(record["check"], answer, True).values())
                counts["dropped for failing the checks"] += not good
                if good and len(render(tokenizer, record["messages"])[0]) > max_tokens:
                    counts["dropped for being longer than the context"] += 1
                elif good:
                    counts[task] += 1
                    yield record, counts
        if all(counts[task] >= limit for task in TASKS):
            return


# ---------------------------------------------------------------------------------------------------------------------
# Reading what people have: Alpaca, Dolly, ShareGPT, messages; pairs and rankings

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
         "system": "system", "tool": "tool", "function": "tool", "observation": "tool"}  # fmt: skip


def read_lines(path: str | Path, read: Callable) -> Iterator:
    """read(record) of each line of a JSON-lines file. A UserError with the number of the line that `read` refuses."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                    if not isinstance(record, dict):
                        raise ValueError("it is not a JSON object")
                    yield read(record)
                except ValueError as error:  # (JSONDecodeError is one)
                    raise UserError(f"{path}, line {number}: {error}.") from None
    except FileNotFoundError:
        raise UserError(f"{path} is missing: `python align.py data` and `pairs` make the default ones.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None


def take(record: dict, key: str, kind: type = str):
    if not isinstance(record.get(key), kind):
        raise ValueError(f"{key!r} is missing or no {'text' if kind is str else 'list'}")
    return record[key]


def read_messages(items: list, role: str = "role", content: str = "content") -> list[dict]:
    messages = []
    for item in items:
        if not isinstance(item, dict) or item.get(role) not in ROLES:
            raise ValueError(f"a message has no known {role!r} ({', '.join(ROLES)})")
        messages.append({"role": ROLES[item[role]], "content": take(item, content)})
    return messages


def read_conversation(record: dict) -> list[dict]:
    """Any of the usual forms -> messages. A ValueError says what is missing.

    messages       [{"role", "content"}]: OpenAI's; roles system, user, assistant, tool
    conversations  [{"from", "value"}]: ShareGPT
    instruction, input, output      Alpaca; Dolly calls the last two context and response. The input stands after the
                                    instruction and an empty line
    prompt, completion (or chosen)
    """
    if "messages" in record:
        return read_messages(take(record, "messages", list))
    if "conversations" in record:
        return read_messages(take(record, "conversations", list), "from", "value")
    if "instruction" in record:
        answer = "response" if "output" not in record and "response" in record else "output"
        more = record.get("input") or record.get("context") or ""
        question = take(record, "instruction") + (f"\n\n{more}" if more else "")
        return [{"role": "user", "content": question}, {"role": "assistant", "content": take(record, answer)}]
    if "prompt" in record:
        return [*read_prompt(record), read_answer(record, "completion" if "completion" in record else "chosen")]
    raise ValueError("it has neither messages, conversations, instruction nor prompt")


def read_prompt(record: dict) -> list[dict]:
    if isinstance(record.get("prompt"), list):
        return read_messages(record["prompt"])
    return [{"role": "user", "content": take(record, "prompt")}]


def read_answer(record: dict, key: str) -> dict:
    answer = record.get(key)
    if isinstance(answer, list) and answer:
        answer = read_messages(answer)[-1]["content"]
    return {"role": "assistant", "content": take({key: answer}, key)}


def read_ranking(record: dict) -> list[list[dict]]:
    """{"prompt", "chosen", "rejected"} or {"prompt", "answers": [best, ..., worst]} -> conversations, the best first."""
    prompt = read_prompt(record)
    if "answers" in record:
        answers = [read_answer({"answer": a}, "answer") for a in take(record, "answers", list)]
        if len(answers) < 2:
            raise ValueError("'answers' has fewer than two")
    else:
        answers = [read_answer(record, "chosen"), read_answer(record, "rejected")]
    return [[*prompt, answer] for answer in answers]


def load_items(paths, tokenizer, T: int, ranked: bool) -> tuple[list[list[Example]], Counter]:
    """What a stage trains on, as lists of examples: one of a conversation, several of a ranking (the best first).

    Counted, and left out: conversations in which the assistant says nothing, those longer than the context, rankings
    whose answers are equal. Counted, and kept: a conversation that ends with the user (without that turn), rankings
    with an empty answer (it is one: the end of the turn).
    """
    items, counts = [], Counter()
    for conversations in itertools.chain(*(read_lines(p, read_ranking if ranked else lambda r: [read_conversation(r)]) for p in paths)):
        counts["read"] += 1
        if not ranked:
            kept = conversations[0][: 1 + max((i for i, m in enumerate(conversations[0]) if m["role"] == "assistant"), default=-1)]
            counts["ended with the user"] += len(kept) < len(conversations[0])
            conversations = [kept]
        answers = [[m["content"] for m in c if m["role"] == "assistant"] for c in conversations]
        examples = [Example(*render(tokenizer, c)) for c in conversations]
        if not ranked and not any(a.strip() for a in answers[0]):
            counts["left out: no answer"] += 1
        elif ranked and len({a[-1] for a in answers}) < len(answers):
            counts["left out: equal answers"] += 1
        elif max(len(e.ids) for e in examples) > T:
            counts["left out: longer than the context"] += 1
        else:
            counts["with an empty answer"] += ranked and not all(a[-1].strip() for a in answers)
            items.append(examples)
    counts["kept"] = len(items)
    return items, +counts


# ---------------------------------------------------------------------------------------------------------------------
# A stage: the loop that SFT, reward model and DPO share


@dataclass
class Stage:
    """What every stage has to be told; it is kept in the checkpoint, for --resume."""

    model: str = option("out/python", "Checkpoint folder to begin with.")
    data: tuple[str, ...] = option(("data/instructions/train.jsonl",), "JSON lines to learn from; several times for more.")
    val: str | None = option(None, "JSON lines to judge by. Default: val.jsonl beside --data, or a twentieth of it.")
    out: str = option("out/sft", "Checkpoint folder to write.")
    epochs: float = option(2.0, "How often the data is seen.")
    max_steps: int | None = option(None, "Optimizer steps, instead of --epochs.")
    batch_size: int = option(32, "Conversations (or rankings) of a step, over all ranks.")
    lr: float = option(2e-3, "Peak learning rate; larger models want 1e-5 to 1e-4.")
    warmup_steps: int = option(20, "Steps of linear warm-up.")
    schedule: str = option("cosine", "cosine, wsd or constant.")
    min_lr: float = option(0.1, "Where the schedule ends, as a fraction of --lr.")
    optimizer: str = option("adamw", "adamw, or muon on the matrices.")
    weight_decay: float = option(0.0, "Of matrices only.")
    grad_clip: float = option(1.0, "Largest norm of the gradient.")
    lora_rank: int = option(0, "Train low-rank additions only (8 to 64); 0: all weights.")
    lora_alpha: float = option(16.0, "Their scale is alpha / rank.")
    dtype: str = option("auto", "auto, fp32 or bf16.")
    device: str = option("auto", "auto, cpu, cuda or mps.")
    micro_tokens: int = option(0, "Tokens at once on a device: memory and speed only. 0: 8,192, on a GPU 32,768.")
    eval_interval: int = option(100, "Steps between evaluations.")
    save_interval: int = option(250, "Steps between checkpoints.")
    seed: int = option(0, "Of the order of the data.")


@dataclass
class RewardStage(Stage):
    model: str = option("out/sft", "Checkpoint folder to begin with.")
    data: tuple[str, ...] = option(("data/pairs.jsonl",), "Pairs (prompt, chosen, rejected) or rankings (prompt, answers).")
    out: str = option("out/reward", "Checkpoint folder to write.")
    lr: float = option(3e-4, "Peak learning rate; larger models want 1e-6 to 1e-5.")


@dataclass
class DPOStage(RewardStage):
    out: str = option("out/dpo", "Checkpoint folder to write.")
    loss: str = option("dpo", f"One of {', '.join(VARIANTS)}.")
    beta: float = option(0.1, "How dear it is to leave the reference; 2 for simpo.")
    label_smoothing: float = option(0.0, "Share of the labels that may be wrong (dpo, norm, robust).")
    gamma: float = option(1.0, "Margin that is asked for (simpo).")
    nll_weight: float = option(1.0, "Weight of -log p(chosen) a token, added to the loss: keeps the good answers likely.")


@dataclass
class PlayStage(Stage):
    """What a stage that learns from its own answers has to be told."""

    model: str = option("out/sft", "Checkpoint folder to begin with; it stays the reference.")
    out: str = option("out/grpo", "Checkpoint folder to write.")
    reward: tuple[str, ...] = option(("checks",), "checks, one of them, or a reward model's folder; NAME:WEIGHT, several times: a sum.")
    unended: float = option(1.0, "Taken off the reward of an answer that did not end by itself.")
    max_steps: int | None = option(120, "Steps: each plays, then learns from what it saw.")
    batch_size: int = option(32, "Prompts of a step, over all ranks.")
    samples: int = option(8, "Answers to each prompt: the group.")
    temperature: float = option(1.0, "Of the answers that it learns from.")
    max_new_tokens: int = option(128, "Longest answer.")
    passes: int = option(1, "How often a step's answers are learned from.")
    minibatches: int = option(2, "Updates of a pass.")
    clip: float = option(0.2, "How far from 1 a token's probability ratio may move.")
    lr: float = option(3e-4, "Peak learning rate; larger models want 1e-6.")
    warmup_steps: int = option(5, "Steps of linear warm-up.")
    schedule: str = option("wsd", "cosine, wsd or constant.")
    eval_interval: int = option(20, "Steps between evaluations.")
    save_interval: int = option(40, "Steps between checkpoints.")


@dataclass
class GRPOStage(PlayStage):
    clip_high: float | None = option(None, "The bound above, where it is not --clip (DAPO: 0.28).")
    scale: str = option("std", "Advantages: std (divided by the group's deviation), or none (Dr. GRPO).")
    normalize: str = option("token", "Mean of tokens: token (DAPO), sequence (then of answers: GRPO), constant (sums: Dr. GRPO).")
    kl_coef: float = option(0.02, "Weight of the KL to the reference in the loss; 0: none (DAPO, Dr. GRPO).")
    keep_flat: bool = option(False, "Keep groups without variance in the batch; DAPO drops them, and draws others until it is full.")


@dataclass
class PPOStage(PlayStage):
    out: str = option("out/ppo", "Checkpoint folder to write.")
    batch_size: int = option(64, "Prompts of a step, over all ranks.")
    samples: int = option(4, "Answers to each prompt.")
    minibatches: int = option(4, "Updates of a pass.")
    max_steps: int | None = option(150, "Steps: each plays, then learns from what it saw.")
    critic: str = option("shared", "shared: a head on the model's last layer; own: a model of its own, which begins as the same.")
    gamma: float = option(1.0, "Discount of a token's reward by the next token.")
    lam: float = option(0.95, "Lambda of the advantages (GAE).")
    value_coef: float = option(0.1, "Weight of the critic's loss.")
    value_clip: float = option(0.2, "How far an update may move a value.")
    entropy_coef: float = option(0.0, "Weight of the entropy in the objective.")
    kl_coef: float = option(0.005, "Taken off each token's reward, times log(p / p_ref).")
    kl_target: float = option(0.0, "Adapt --kl-coef so that an answer's KL becomes so many nats; 0: fixed.")


class Run:
    """A stage between its opening and its end: model, data, loop, and what is saved of it.

    `unit(item)` is what an item weighs in the mean loss (its trained tokens, or 1); `loss(model, picks)` gives the sum of
    the losses of some items and of whatever else is logged of them. Set by the stage."""

    def __init__(self, o: Stage, resume: str | None, ranked: bool, head: str = "lm"):
        self.began, self.o, self.ranks, self.resume = time.perf_counter(), o, setup_distributed(o.device), resume
        base, self.out = find_checkpoint(resume if resume and not o.lora_rank else o.model), Path(o.out)
        self.tokenizer_file, self.tokenizer = base / "tokenizer.json", load_tokenizer(base)
        self.model = load_model(base, self.ranks.device)
        if head == "lm" and self.model.config.head == "score":
            raise UserError(f"{base} is a reward model: it gives scores, not answers.")
        if head != self.model.config.head:
            self.model = with_head(self.model, head)
        self.model.float().compute_dtype = pick_dtype(o.dtype, self.ranks.device)
        self.load_data(ranked)
        self.tensors, self.state = load_state(resume) if resume else ({}, {})
        self.open_weights(resume)
        self.optimizer = build_optimizer(self.model, o.optimizer, o.lr, o.weight_decay)
        self.optimizer.load_state_dict(self.tensors)
        self.at, self.bad, self.skipped = self.state.get("at", 0), 0, self.state.get("skipped", 0)
        self.extra, self.kept, lines = {}, {}, []  # tensors and numbers of the stage that are saved along
        self.shown = ()  # of what is logged, what the line on the terminal shows; all by default
        if resume:
            lines = (find_checkpoint(resume) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            lines = [line for line in lines if json.loads(line)["step"] <= self.at]
        self.max_steps = o.max_steps or max(1, math.ceil(o.epochs * len(self.items) / o.batch_size))
        self.log = Log(self.out, lines, self.max_steps, self.at, self.ranks.rank)

    def load_data(self, ranked: bool) -> None:
        o, T = self.o, self.model.config.seq_len
        val = o.val or next((str(p) for p in [Path(o.data[0]).with_name("val.jsonl")] if p.exists() and str(p) not in o.data), None)
        self.items, self.counts = load_items(o.data, self.tokenizer, T, ranked)
        self.val = load_items([val], self.tokenizer, T, ranked)[0] if val else []
        if not self.val and self.items:  # by prompt, so that none is on both sides
            prompts = [seed_of(item[0].ids[: item[0].trained.index(True)]) for item in self.items]
            held = {p for p in prompts if p % 20 == 0} or {prompts[-1]}
            self.val = [item for item, p in zip(self.items, prompts, strict=True) if p in held]
            self.items = [item for item, p in zip(self.items, prompts, strict=True) if p not in held] or self.val
        if not self.items:
            raise UserError(f"There is nothing to learn in {', '.join(o.data)} ({describe(self.counts)}).")
        self.val = self.val[:500]
        say(f"{', '.join(o.data)}: {describe(self.counts)}")
        self.fingerprint = [seed_of(Path(p).read_bytes()) for p in (*o.data, *([val] if val else []))]

    def open_weights(self, resume: str | None) -> None:
        """The base's, or when a stage goes on its own; with LoRA the base's and its own additions."""
        o, base = self.o, seed_of(*fingerprint_of(self.model))
        if o.lora_rank:
            add_lora(self.model, o.lora_rank, o.lora_alpha, o.seed)
        self.attach()
        if resume:
            if self.state["data"] != self.fingerprint or (o.lora_rank and self.state["base"] != base):
                raise UserError(f"The data or {o.model} is not what {resume} began with: restore it to resume.")
            own = {k.removeprefix("weights/"): v for k, v in self.tensors.items() if k.startswith("weights/")}
            self.model.load_state_dict(own, strict=False)
        self.base = base

    def attach(self) -> None:
        """What else is trained, as parts of the model."""

    def save(self, finished: bool = False) -> None:
        self.log.close()
        if self.ranks.rank == 0:
            tensors = self.optimizer.state_dict() | self.extra
            for name, p in self.model.named_parameters():
                if p.requires_grad and (self.o.lora_rank or name.startswith("critic.")):
                    tensors[f"weights/{name}"] = p.detach().cpu()
            state = {"stage": type(self.o).__name__, "at": self.at, "skipped": self.skipped, "finished": finished, "data": self.fingerprint,
                     "base": self.base, "counts": self.counts, "options": dataclasses.asdict(self.o), **self.kept}  # fmt: skip
            save_checkpoint(self.out, self.model, self.tokenizer_file, state=(tensors, state), metrics=self.log.text(),
                            weights=merged(self.model))  # fmt: skip
        if self.ranks.world > 1:
            torch.distributed.barrier()
        if not finished:
            self.log.open()

    def picks(self, step: int, n: int) -> list[int]:
        """Which of n items a step takes: each once an epoch, in an order that depends on seed and epoch alone."""
        picks = []
        for i in range(step * self.o.batch_size, (step + 1) * self.o.batch_size):
            if not picks or i % n == 0:
                order = np.random.default_rng([self.o.seed, i // n]).permutation(n)
            picks.append(int(order[i % n]))
        return picks

    def micro_batches(self, picks, items, rank: int = 0, world: int = 1) -> Iterator[list[int]]:
        """A rank's share of the picks, some thousand tokens at a time."""
        limit = self.o.micro_tokens or (8192 if self.ranks.device.type == "cpu" else 32768)
        batch, tokens = [], 0
        for i in picks[rank::world]:
            size = size_of(items[i])
            if batch and tokens + size > limit:
                yield batch
                batch, tokens = [], 0
            batch, tokens = [*batch, i], tokens + size
        if batch:
            yield batch

    def collate(self, items: list[list[Example]]) -> Batch:
        return collate(items, self.model.config.seq_len, self.ranks.device)

    def measure(self, picks, items, loss, backward: bool) -> dict[str, float]:
        """Means of the loss and of what goes with it over these items, of all ranks; backward: its gradient, too."""
        weight = sum(self.unit(items[i]) for i in picks)  # of all ranks: each knows the whole step's items
        sums, trained = Counter(), [p for p in self.model.parameters() if p.requires_grad]
        for batch in self.micro_batches(picks, items, self.ranks.rank, self.ranks.world):
            total, stats = loss(self.model, batch)
            if backward:
                (total / weight).backward()
            for name, value in (stats | {"loss": total.detach()}).items():
                sums[name] += value
        names = sorted(sums) if self.ranks.world == 1 else self.names
        values = torch.stack([torch.as_tensor(sums[n], dtype=torch.float32, device=self.ranks.device) for n in names])
        if self.ranks.world > 1:
            torch.distributed.all_reduce(values)
            for p in trained if backward else ():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                torch.distributed.all_reduce(p.grad)
        return {n: v / weight for n, v in zip(names, values.tolist(), strict=True)}

    def step(self, lr: float) -> dict:
        self.optimizer.set_lr(lr)
        picks = self.picks(self.at, len(self.items))
        return self.update(picks) | {"tokens": sum(size_of(self.items[i]) for i in picks)}

    def update(self, picks: list[int]) -> dict:
        """One step of the optimizer on these items."""
        stats = self.measure(picks, self.items, self.loss, backward=True)
        trained = [p for p in self.model.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, self.o.grad_clip))
        if math.isfinite(norm) and math.isfinite(stats["loss"]):
            self.optimizer.step()
            self.bad = 0
        else:
            self.bad, self.skipped = self.bad + 1, self.skipped + 1
            self.log.say(f"step {self.at + 1}: the loss or the gradient is not finite; the update is skipped ({self.skipped} so far).")
            if self.bad >= 5:
                raise UserError(f"The loss was not finite in {self.bad} updates running: stopped. {self.out} is whole; try a lower --lr.")
        self.optimizer.zero_grad()
        return stats | {"grad_norm": norm}

    def judge(self) -> dict:
        """What an evaluation finds."""
        return self.measure(range(len(self.val)), self.val, self.val_loss, backward=False) | self.also()

    @torch.no_grad()
    def evaluate(self) -> None:
        self.model.eval()
        self.result = {f"val_{k}": v for k, v in self.judge().items()}
        self.model.train()
        self.log.write({"step": self.at, **self.result, "seconds": time.perf_counter() - self.began})
        self.log.say(f"step {self.at}: " + ", ".join(f"{k.replace('_', ' ')} {v:.4f}" for k, v in self.result.items()))

    def go(self) -> dict:
        """The loop. -> the last evaluation."""
        o, stopping, rate = self.o, Stopping(), None
        say(f"{self.max_steps} steps of {o.batch_size}, {len(self.val)} to judge by; "
            f"{sum(p.numel() for p in self.model.parameters() if p.requires_grad) / 1e6:.2f}M parameters trained, "
            f"{o.optimizer} in {str(self.model.compute_dtype)[6:]} on {self.ranks.device.type}")  # fmt: skip
        if not self.resume:
            self.save()  # a disk that cannot be written to is found out now, and any later kill can be resumed
            self.log.write({"step": 0, "counts": self.counts})
        else:
            self.log.open()
        try:
            self.model.train()
            if self.at == 0 and not any('"val_' in line for line in self.log.lines):
                self.evaluate()
            while self.at < self.max_steps:
                begin, lr = time.perf_counter(), o.lr * lr_at(self.at, self.max_steps, o.warmup_steps, o.schedule, o.min_lr)
                stats = self.step(lr)
                seconds = time.perf_counter() - begin
                self.at += 1
                rate = seconds if rate is None else 0.9 * rate + 0.1 * seconds
                tokens = stats.pop("tokens")
                self.log.write({"step": self.at, **stats, "lr": lr, "ms_per_step": seconds * 1e3, "tok_per_s": tokens / seconds})
                words = "  ".join(f"{k.replace('_', ' ')} {stats[k]:.3f}" for k in self.shown or stats)
                self.log.show(self.at, f"{words}  {tokens / seconds:,.0f} tok/s", rate * (self.max_steps - self.at))
                if self.asked(stopping):
                    self.save()
                    raise KeyboardInterrupt
                if self.at % o.eval_interval == 0 and self.at < self.max_steps:
                    self.evaluate()
                if self.at % o.save_interval == 0 and self.at < self.max_steps:
                    self.save()
            self.evaluate()
            self.save(finished=True)
        except KeyboardInterrupt:
            self.log.stop()
            say(f"Stopped after step {self.at}; --resume {self.out} goes on from there.")
            raise
        finally:
            self.log.stop()
            stopping.restore()
        say(f"{self.out} written after {time.perf_counter() - self.began:.0f} s.")
        return self.result

    def also(self) -> dict:
        """What an evaluation measures beside the means."""
        return {}

    def asked(self, stopping: Stopping) -> bool:
        asked = torch.tensor(float(stopping.asked), device=self.ranks.device)
        if self.ranks.world > 1:
            torch.distributed.all_reduce(asked)
        return bool(asked > 0)


def describe(counts: Counter) -> str:
    return ", ".join(f"{n:,} {what}" for what, n in counts.items())


def with_head(model: Transformer, head: str) -> Transformer:
    """The same layers under another head; a score head begins at zero, where every text is worth nothing."""
    other = Transformer(dataclasses.replace(model.config, head=head)).to(next(model.parameters()).device)
    if head == "score":
        nn.init.zeros_(other.score.weight)
    other.load_state_dict({n: p for n, p in model.state_dict().items() if not n.startswith(("lm_head", "score"))}, strict=False)
    return other


def sft_run(o: Stage, resume: str | None = None) -> Run:
    """Loss: -log p of the assistant's tokens, mean over those of the step.

    Healthy: the loss falls from some 4 nats (the chat format is new) to below pretraining's within a few hundred steps,
    and val_loss follows it; grad_norm stays around one. val_loss that rises while loss falls: fewer epochs.
    """
    run = Run(o, resume, ranked=False)
    run.unit = answer_tokens
    run.names = ["loss"]

    def loss_on(items):
        return lambda model, picks: (-logps(model, run.collate([items[i] for i in picks])).sum(), {})

    run.loss, run.val_loss = loss_on(run.items), loss_on(run.val)
    return run


def reward_run(o: RewardStage, resume: str | None = None) -> Run:
    """Loss: Bradley-Terry on the scores of a ranking's answers; accuracy: of its best against its worst.

    Healthy: the loss begins at ln 2 = 0.693 and accuracy rises well above 0.5; val_loss that rises while accuracy stays
    is overconfidence, which `calibration_error` shows (mean distance between the probability that the scores give the chosen
    answer and the share of times that it was right, in ten bins: Guo et al. 2017, 1706.04599).
    """
    run = Run(o, resume, ranked=True, head="score")
    run.unit = lambda item: 1.0
    run.names = ["accuracy", "loss", "margin"]

    def loss_on(items):
        def loss(model, picks):
            scores = rewards(model, run.collate([items[i] for i in picks])).split([len(items[i]) for i in picks])
            margins = torch.stack([s[0] - s[-1] for s in scores]).detach()
            return torch.stack([ranking_loss(s) for s in scores]).sum(), {"accuracy": (margins > 0).float().sum(), "margin": margins.sum()}

        return loss

    def calibration():
        batches = run.micro_batches(range(len(run.val)), run.val)
        ends = [rewards(run.model, run.collate([[run.val[i][0], run.val[i][-1]] for i in b])).view(-1, 2) for b in batches]
        return {"calibration_error": calibration_error(torch.cat([e[:, 0] - e[:, 1] for e in ends]).cpu())}

    run.loss, run.val_loss, run.also = loss_on(run.items), loss_on(run.val), calibration
    return run


def calibration_error(margins, bins: int = 10) -> float:
    """Expected calibration error of p = sigmoid(margin), the probability that the chosen answer is the better one.

    Each pair is seen from both sides: as p with outcome 1 and as 1 - p with outcome 0.

    >>> calibration_error(torch.tensor([20.0, 20.0, 20.0, -20.0]))  # quite sure, and right three times in four
    0.25
    """
    p = torch.cat([margins, -margins]).sigmoid()
    right = torch.cat([torch.ones_like(margins), torch.zeros_like(margins)])
    cell = (p * bins).long().clamp(max=bins - 1)
    gaps = [abs(float((p - right)[cell == b].sum())) for b in range(bins)]
    return round(sum(gaps) / len(p), 6)


def dpo_run(o: DPOStage, resume: str | None = None) -> Run:
    """Loss: one of VARIANTS (`preference`) on a ranking's best and worst answer, and nll_weight times -log p of the best a
    token (`nll`). The reference's log p is computed once and kept in state/.

    Healthy: `preference` begins at ln 2 (ipo: 1 / (2 beta)^2); accuracy (of rankings, is the margin positive) and margin
    (beta times the difference of log-ratios) rise. `chosen` and `rejected` are log-ratios: the rejected falls, and without
    nll the chosen too. When it falls as fast the model leaves both, and soon forgets to end: raise beta or nll_weight.
    """
    if o.loss not in VARIANTS:
        raise UserError(f"--loss is one of {', '.join(VARIANTS)}; not {o.loss!r}.")
    if not 0 <= o.label_smoothing < 0.5 or o.beta <= 0:
        raise UserError("--beta has to be above zero, and --label-smoothing from 0 up to, not with, 0.5.")
    variant, run = VARIANTS[o.loss], Run(o, resume, ranked=True)
    run.unit = lambda item: 1.0
    run.names = ["accuracy", "chosen", "loss", "margin", "nll", "preference", "rejected"]
    options = {name: getattr(o, name) for name in variant.options}

    def both(model, items, picks):  # -> log p of (chosen, rejected), (n, 2), and their lengths
        batch = run.collate([[items[i][0], items[i][-1]] for i in picks])
        return logps(model, batch).view(-1, 2), batch.lengths.view(-1, 2)

    @torch.no_grad()
    def reference_of(name, items):
        kept = run.tensors.get(f"reference/{name}")
        if kept is None:
            run.model.eval()
            kept = torch.cat([both(run.model, items, picks)[0] for picks in run.micro_batches(range(len(items)), items)]).cpu()
        run.extra[f"reference/{name}"] = kept
        return kept.to(run.ranks.device)

    def loss_on(name, items):
        reference = reference_of(name, items) if variant.reference else torch.zeros(len(items), 2, device=run.ranks.device)

        def loss(model, picks):
            policy, lengths = both(model, items, picks)
            ratios = policy - reference[picks]  # (n, 2)
            ratios = ratios / lengths if variant.mean else ratios
            chosen, rejected = ratios.unbind(1)
            margins = (o.beta * (chosen - rejected)).detach()
            preference = variant.loss(chosen, rejected, o.beta, **options)
            nll = -(policy / lengths)[:, 0]  # (2404.19733, eq. 1: DPO alone lets the chosen answer fall with the rejected)
            stats = {"accuracy": (margins > 0).float(), "margin": margins, "chosen": chosen, "rejected": rejected,
                     "preference": preference, "nll": nll}  # fmt: skip
            return (preference + o.nll_weight * nll).sum(), {name: values.detach().sum() for name, values in stats.items()}

        return loss

    if resume and variant.reference and not {"reference/items", "reference/val"} <= run.tensors.keys():
        raise UserError(f"{resume} lacks the reference's log-probabilities: start the run again.")
    run.loss, run.val_loss = loss_on("items", run.items), loss_on("val", run.val)
    return run


# ---------------------------------------------------------------------------------------------------------------------
# Stages that play: PPO and GRPO


class Episode(NamedTuple):
    record: dict  # of the prompt
    answer: Answer
    reward: float
    good: bool  # by the checks, whatever the reward was


class Play(Run):
    """A stage that learns from its own answers. Each step: answers to some prompts (`play`), what each token of them was
    worth (`credit`, set by the stage), and `passes` times `minibatches` updates on that.

    Counted: prompts that leave no room for an answer (`counts`); rewards that are no number, whose answers are left out
    (`nan_rewards`). Answers that do not end are cut at --max-new-tokens and pay --unended.

    Logged of the step's answers: reward and reward_std; good, what the checks say whatever the reward was; kl to the
    reference in nats a token (k1, the mean of log p / p_ref), kl_answer, and entropy of a token (the mean of -log p), these
    three of the groups that are learned from;
    length, ended, distinct; flat, the share of groups whose rewards are all equal; of the updates: clip_fraction, the share
    of tokens beyond the clip, and grad_norm; of the time: rollout_share (answers and their rewards), and generated_per_s,
    tokens a second while answers are written.
    Healthy: reward and good rise together, kl grows slowly (to some tenths of a nat), entropy falls slowly and stays above
    zero, distinct stays; clip_fraction is some per cent. Reward up with good or distinct down is hacking: raise kl_coef.
    """

    def __init__(self, o: PlayStage, resume: str | None):
        super().__init__(o, resume, ranked=False)
        if min(o.samples, o.passes, o.minibatches, o.max_new_tokens) < 1 or o.temperature <= 0 or not 0 < o.clip < 1:
            raise UserError("--samples, --passes, --minibatches and --max-new-tokens have to be at least 1, --temperature above 0, "
                            "--clip between 0 and 1.")  # fmt: skip
        self.reference = load_model(o.model, self.ranks.device)
        if resume and seed_of(o.model, *fingerprint_of(self.reference)) != self.state["reference"]:
            raise UserError(f"{o.model} is not the model that {resume} began with, and is the reference: restore it to resume.")
        self.kept["reference"] = seed_of(o.model, *fingerprint_of(self.reference))
        self.reference.compute_dtype = self.model.compute_dtype
        self.actor = Transformer(self.model.config).to(self.ranks.device, self.model.compute_dtype)  # what it is, to write with
        self.cache = Branches(self.model.config, self.ranks.device, self.model.compute_dtype)
        self.worth = reward_function(o.reward, o.unended, self.ranks.device)
        if resume and self.worth.judges != self.state.get("judges", self.worth.judges):
            raise UserError(f"{', '.join(o.reward)} is not what {resume} was rewarded by: restore it to resume.")
        self.kept["judges"] = self.worth.judges
        self.writing = math.inf  # seconds that the last answers took to write
        self.shown = ("reward", "good", "kl", "entropy", "length")

    def load_data(self, ranked: bool) -> None:
        o, self.items, self.counts = self.o, [], Counter()
        val = o.val or next((str(p) for p in [Path(o.data[0]).with_name("val.jsonl")] if p.exists() and str(p) not in o.data), None)
        room = self.model.config.seq_len - min(16, o.max_new_tokens)

        def read(paths, limit=None):
            for record in itertools.chain(*(load_prompts(p, limit) for p in paths)):
                ids = render(self.tokenizer, record["prompt"], reply=True)[0]
                self.counts["left out: no room for an answer" if len(ids) > room else "prompts"] += 1
                if len(ids) <= room:
                    yield record | {"ids": ids}

        self.val = [r for r in read([val], 400) if not r["held_out"]][:200] if val else []
        self.counts.clear()
        self.prompts = list(read(o.data))
        if not self.prompts:
            raise UserError(f"There is nothing to answer in {', '.join(o.data)} ({describe(self.counts)}).")
        if not self.val:
            n = min(200, max(1, len(self.prompts) // 20))
            self.val, self.prompts = self.prompts[:n], self.prompts[n:] or self.prompts
        say(f"{', '.join(o.data)}: {describe(self.counts)}")
        self.fingerprint = [seed_of(Path(p).read_bytes()) for p in (*o.data, *([val] if val else []))]

    def spread(self, work: Callable, things: list) -> list:
        """work(a rank's share of the things) -> something of each; of all ranks, in the order of the things."""
        ranks = self.ranks
        mine = work(things[ranks.rank :: ranks.world])
        if ranks.world == 1:
            return mine
        parts = [None] * ranks.world
        torch.distributed.all_gather_object(parts, mine)
        return [parts[i % ranks.world][i // ranks.world] for i in range(len(things))]

    def answers_to(self, records: list[dict], samples: int, temperature: float, seed: int) -> list[list[Episode]]:
        """Each prompt's group."""
        o = self.o
        self.actor.load_state_dict(merged(self.model))

        def work(some):
            if not some:
                return []
            began = time.perf_counter()
            found = rollout(self.actor, self.tokenizer, [r["ids"] for r in some], temperature, seed_of(seed, self.ranks.rank),
                            o.max_new_tokens, samples, cache=self.cache)  # fmt: skip
            self.writing = time.perf_counter() - began
            every = [r for r in some for _ in range(samples)]
            worth = self.worth(every, found)
            good = [bool(r["check"]) and all(grade(r["check"], a.text, a.ended).values()) for r, a in zip(every, found, strict=True)]
            episodes = [Episode(*e) for e in zip(every, found, worth, good, strict=True)]
            return [episodes[i : i + samples] for i in range(0, len(episodes), samples)]

        return self.spread(work, records)

    def read(self, model, batch: Batch):
        """-> log p of the answers' tokens under the temperature that they were drawn with, their entropy if it is asked for,
        and the critic's value before each: (N,) each."""
        hidden = model(batch.x, at=batch.at, output="hidden", **batch.place)[0] / self.o.temperature  # (N, C)
        logp = -token_losses(hidden, model.lm_head, batch.targets, model.config.vocab_size)
        entropy, values, critic = torch.zeros_like(logp), torch.zeros_like(logp), getattr(model, "critic", None)
        if getattr(self.o, "entropy_coef", 0) and torch.is_grad_enabled():
            every = model.lm_head(hidden).float().log_softmax(-1)
            entropy = -(every.exp() * every).sum(-1)
        if isinstance(critic, nn.Linear):
            values = critic(hidden.float() * self.o.temperature)[:, 0]
        elif critic is not None:
            values = critic(batch.x, at=batch.at, **batch.place)[0]
        return logp, entropy, values

    @torch.no_grad()
    def look(self, model) -> list[tuple]:
        """log p and value of each token of each group, before it learns from them."""

        def work(mine):
            seen = []
            for picks in self.micro_batches(mine, self.items):
                batch = self.collate([self.items[i] for i in picks])
                logp, _, values = self.read(model, batch)
                parts = [answer_tokens(self.items[i]) for i in picks]
                seen += zip(logp.cpu().split(parts), values.cpu().split(parts), strict=True)
            return seen

        model.eval()
        return self.spread(work, list(range(len(self.items))))

    def of(self, values: list, picks: list[int]):
        """The tokens' values of some groups, one after the other."""
        return torch.cat([values[i] for i in picks]).to(self.ranks.device)

    def step(self, lr: float) -> dict:
        o, began = self.o, time.perf_counter()
        self.optimizer.set_lr(lr)
        records = [self.prompts[i] for i in self.picks(self.at, len(self.prompts))]
        groups = self.answers_to(records, o.samples, o.temperature, seed_of(o.seed, "play", self.at))
        played = time.perf_counter() - began
        episodes = [e for group in groups for e in group]
        finite = [e for e in episodes if math.isfinite(e.reward)]
        rewards = [e.reward for e in finite] or [math.nan]
        stats = {"reward": float(np.mean(rewards)), "reward_std": float(np.std(rewards)), **summary(episodes),
                 "flat": sum(map(is_flat, groups)) / len(groups)}  # fmt: skip
        if len(finite) < len(episodes):
            stats["nan_rewards"] = bad = len(episodes) - len(finite)
            self.log.say(f"step {self.at + 1}: {bad} of {len(episodes)} rewards are no number; these answers are left out.")
        stats |= self.credit([[e for e in group if math.isfinite(e.reward)] for group in groups])
        updates, n = [], len(self.items)
        self.model.train()
        for turn in range(o.passes if n else 0):
            order = np.random.default_rng([o.seed, self.at, turn]).permutation(n)
            updates += [self.update(picks.tolist()) for picks in np.array_split(order, min(o.minibatches, n))]
        stats |= {name: sum(u[name] for u in updates) / len(updates) for name in (updates[0] if updates else ())}
        tokens = sum(len(e.answer.ids) for e in episodes)
        return stats | {"tokens": tokens, "rollout_share": played / (time.perf_counter() - began), "generated_per_s": tokens / self.writing}

    def remember(self, groups: list[list[Episode]]) -> dict:
        """The groups as items; the log p of policy (with values) and reference -> what they say of the KL."""
        self.groups = groups
        self.items = [[as_example(e.record["ids"], e.answer.ids) for e in group] for group in groups]
        seen, reference = self.look(self.model), self.look(self.reference)
        self.old, self.values = [logp for logp, _ in seen], [value for _, value in seen]  # of each group's tokens
        self.theirs = [logp for logp, _ in reference]
        if not groups:
            return {"kl": 0.0, "kl_answer": 0.0, "entropy": 0.0}
        apart = torch.cat([a - b for a, b in zip(self.old, self.theirs, strict=True)])
        return {"kl": float(apart.mean()), "kl_answer": float(apart.sum() / sum(map(len, groups))),
                "entropy": -float(torch.cat(self.old).mean())}  # fmt: skip

    def judge(self) -> dict:
        groups = self.answers_to(self.val, 1, JUDGED_AT, seed_of(self.o.seed, "val"))
        episodes = [group[0] for group in groups]
        found = [e.reward for e in episodes if math.isfinite(e.reward)]
        nan = {"nan_rewards": len(episodes) - len(found)} if len(found) < len(episodes) else {}
        return {"reward": float(np.mean(found or [math.nan])), **summary(episodes), **nan}


def is_flat(group: list[Episode]) -> bool:
    """Are all rewards equal? (A reward model's, of equal answers, differ in the last digits: their rows are others.)"""
    rewards = [e.reward for e in group]
    return max(rewards) - min(rewards) < 1e-4


def summary(episodes: list[Episode]) -> dict:
    n = len(episodes)
    return {"good": sum(e.good for e in episodes) / n, "ended": sum(e.answer.ended for e in episodes) / n,
            "length": sum(len(e.answer.ids) for e in episodes) / n, "distinct": len({e.answer.text for e in episodes}) / n}  # fmt: skip


def fingerprint_of(model) -> list[float]:
    return [round(p.detach().cpu().double().sum().item(), 6) for p in model.parameters()]


def grpo_run(o: GRPOStage, resume: str | None = None) -> Play:
    """An answer's advantage is its reward beside the group's (`group_advantages`), the same for all its tokens: no critic.
    Loss: `clipped_loss` and kl_coef times `kl_estimate`, over tokens or answers as --normalize says.

    With --normalize sequence the loss begins at zero: at r = 1 an answer's is minus its advantage, and a group's advantages
    add up to nothing. By token longer answers count for more, so it begins above zero where the worse ones are the longer.
    Either way its gradient is what learns: watch the reward, not the loss. Logged besides: kl_loss, the estimate that is paid for.
    """
    if o.scale not in ("std", "none") or o.normalize not in ("token", "sequence", "constant"):
        raise UserError("--scale is std or none; --normalize is token, sequence or constant.")
    if o.samples < 2:
        raise UserError("--samples has to be at least 2: an answer is judged beside the others to its prompt.")
    if o.kl_coef < 0 or (o.clip_high is not None and o.clip_high <= 0):
        raise UserError("--kl-coef cannot be below 0, and --clip-high has to be above it.")
    run = Play(o, resume)
    run.names = ["clip_fraction", "kl_loss", "loss"]
    run.unit = answer_tokens if o.normalize == "token" else len

    def credit(groups):
        groups = [g for g in groups if len(g) > 1 and (o.keep_flat or not is_flat(g))]
        run.advantages = []  # of each group's tokens
        for group in groups:
            advantages = group_advantages(torch.tensor([e.reward for e in group]), o.scale == "std")
            run.advantages.append(advantages.repeat_interleave(torch.tensor([len(e.answer.ids) for e in group])))
        return run.remember(groups)

    def loss(model, picks):
        batch = run.collate([run.items[i] for i in picks])
        logp, _, _ = run.read(model, batch)
        advantages, log_ratio = run.of(run.advantages, picks), logp - run.of(run.old, picks)
        clipped = clipped_loss(log_ratio, advantages, o.clip, o.clip if o.clip_high is None else o.clip_high)
        kl = kl_estimate(run.of(run.theirs, picks) - logp)
        share = 1 if o.normalize == "token" else 1 / batch.lengths[batch.owner]
        scale = 1 / o.max_new_tokens if o.normalize == "constant" else share
        beyond = beyond_clip(log_ratio, advantages, o)
        stats = {"clip_fraction": beyond * share, "kl_loss": kl.detach() * share}
        return ((clipped + o.kl_coef * kl) * scale).sum(), {name: value.sum() for name, value in stats.items()}

    run.credit, run.loss = credit, loss
    return run


def beyond_clip(log_ratio, advantages, o) -> torch.Tensor:
    """Which tokens the clip holds back."""
    ratio, high = log_ratio.detach().exp(), getattr(o, "clip_high", None)
    up = (ratio > 1 + (o.clip if high is None else high)) & (advantages > 0)
    return (up | ((ratio < 1 - o.clip) & (advantages < 0))).float()


def ppo_run(o: PPOStage, resume: str | None = None) -> Play:
    """Policy and critic. A token's reward is -kl_coef log(p / p_ref), the last one's the answer's reward besides (1909.08593,
    eq. 2); GAE over them; `clipped_loss` on the whitened advantages, `value_loss` on advantage + old value.

    Details that decide whether it works; the numbers are those of the list for policy training in Huang, Liu & von Werra 2023
    ("The N Implementation Details of RLHF with PPO", which took OpenAI's code of 1909.08593 apart):
      1   log p is taken at the temperature that the answers were drawn with                          `Play.read`
      2   the critic begins at zero, so that the first advantages are the rewards                     `PPO.attach`
      4   no dropout: the ratio of a policy to itself is 1
      5   an answer that does not end pays; there with a reward of -1 in place of its own             `--unended`
      6   rewards are not discounted                                                                  `--gamma`
      7   a step's answers are shuffled and learned from in minibatches, `passes` times; one pass of
          four learns as much a minute here as two of two                                             `Play.step`
      8   the KL is paid token by token, as a reward                                                  `credit`
      9   advantages are whitened; there each minibatch's by themselves, here the step's, so that a
          minibatch's mean is not lost. Rewards are not: the checks' lie between 0 and 1              `credit`
      10  a value is held back like a ratio                                                           `value_loss`
      11  the KL's price can adapt to a target                                                        `adapted`

    Logged besides: explained_variance of the returns by the critic (near 0 at first, then up; below 0 it harms: lower
    --lr or raise --value-coef), kl_coef, and what loss is made of: policy_loss and, times --value-coef, value_loss.
    """
    if o.critic not in ("shared", "own"):
        raise UserError("--critic is shared or own.")
    if min(o.kl_coef, o.kl_target, o.value_coef, o.entropy_coef) < 0 or o.value_clip <= 0 or not (0 <= o.gamma <= 1 and 0 <= o.lam <= 1):
        raise UserError("--gamma and --lam lie between 0 and 1, --value-clip above 0, and no coefficient below 0.")
    if o.kl_target and not o.kl_coef:
        raise UserError("--kl-target needs a --kl-coef above 0 to begin with: it is multiplied.")
    run = PPO(o, resume)
    run.names = ["clip_fraction", "loss", "policy_loss", "value_loss"]
    run.unit = answer_tokens
    run.kept["kl_coef"] = run.state.get("kl_coef", o.kl_coef)

    def credit(groups):
        groups = [g for g in groups if g]
        stats, coef = run.remember(groups), run.kept["kl_coef"]
        if not run.items:
            return stats
        run.advantages = []
        for group, *tokens in zip(groups, run.old, run.theirs, run.values, strict=True):
            lengths, advantages = [len(e.answer.ids) for e in group], []
            for e, logp, theirs, values in zip(group, *(t.split(lengths) for t in tokens), strict=True):
                rewards = (-coef * (logp - theirs)).tolist()
                rewards[-1] += e.reward
                advantages += gae(rewards, values.tolist(), o.gamma, o.lam)
            run.advantages.append(torch.tensor(advantages))
        run.returns = [a + v for a, v in zip(run.advantages, run.values, strict=True)]
        every, returns = torch.cat(run.advantages), torch.cat(run.returns)
        run.advantages = [(a - every.mean()) / (every.std() + 1e-8) for a in run.advantages]
        if o.kl_target:
            run.kept["kl_coef"] = adapted(coef, stats["kl_answer"], o.kl_target)
        return stats | {"explained_variance": 1 - float(every.var() / returns.var().clamp(min=1e-8)), "kl_coef": coef}

    def loss(model, picks):
        batch = run.collate([run.items[i] for i in picks])
        logp, entropy, values = run.read(model, batch)
        advantages, log_ratio = run.of(run.advantages, picks), logp - run.of(run.old, picks)
        policy = clipped_loss(log_ratio, advantages, o.clip, o.clip)
        value = value_loss(values, run.of(run.values, picks), run.of(run.returns, picks), o.value_clip)
        stats = {"policy_loss": policy, "value_loss": value, "clip_fraction": beyond_clip(log_ratio, advantages, o)}
        return (policy + o.value_coef * value - o.entropy_coef * entropy).sum(), {n: v.detach().sum() for n, v in stats.items()}

    run.credit, run.loss = credit, loss
    return run


class PPO(Play):
    def attach(self) -> None:
        if self.o.critic == "own":
            self.model.critic = with_head(self.model, "score").float()
            self.model.critic.compute_dtype = self.model.compute_dtype
        else:
            self.model.critic = nn.Linear(self.model.config.n_embd, 1, device=self.ranks.device)
            nn.init.zeros_(self.model.critic.weight)
            nn.init.zeros_(self.model.critic.bias)


def reward_function(specs: tuple[str, ...], unended: float, device) -> Callable[[list[dict], list[Answer]], list[float]]:
    """What answers to prompts are worth: the weighted sum of

    checks         half the share of the checks that they pass, and half when they pass all: 0 to 1
    parses, ...    one of CHECKS, 0 or 1
    a folder       a reward model's score. It is given the conversation as text, so its tokenizer may be another

    less `unended` for an answer that did not end by itself.
    """
    parts = []
    for spec in specs:
        name, weight = re.fullmatch(r"(.+?)(?::(-?\d*\.?\d+(?:e-?\d+)?))?", spec).groups("1")
        parts.append((name if name == "checks" or name in CHECKS else open_judge(name, device), float(weight)))
    judges = [part.fingerprint for part, _ in parts if callable(part)]

    def worth(records, answers):
        total = [-unended * (not a.ended) for a in answers]
        grades = None
        for part, weight in parts:
            if callable(part):
                talks = [[*r["prompt"], {"role": "assistant", "content": a.text}] for r, a in zip(records, answers, strict=True)]
                found = part(talks)
            else:
                if not all(r["check"] for r in records):
                    raise UserError(f"--reward {part} needs prompts that carry checks, as `python align.py data` makes them.")
                grades = grades or [grade(r["check"], a.text, a.ended) for r, a in zip(records, answers, strict=True)]
                found = [(sum(g.values()) / len(g) + all(g.values())) / 2 if part == "checks" else float(g[part]) for g in grades]
            total = [t + weight * f for t, f in zip(total, found, strict=True)]
        return total

    worth.judges = judges
    return worth


# ---------------------------------------------------------------------------------------------------------------------
# Answers, and what they are worth

JUDGED_AT = 0.7  # temperature of the answers by which a model is judged


def sharpen(temperature: float, n_vocab: int, seed: int, device) -> Callable:
    """pick for `generate`: draw from softmax(logits / temperature); 0 is greedy."""
    generator = torch.Generator(device).manual_seed(seed)

    def pick(logits):
        logits = logits[:, :n_vocab]
        if temperature == 0:
            return logits.argmax(-1)
        total = (logits / temperature).softmax(-1).cumsum(-1)  # one random number a row, where Gumbel noise needs V
        u = torch.rand((len(logits), 1), generator=generator, device=device) * total[:, -1:]
        return torch.searchsorted(total, u, right=True)[:, 0].clamp_(max=n_vocab - 1)

    return pick


class Answer(NamedTuple):
    ids: list[int]  # the end of the turn among them
    text: str
    ended: bool


def rollout(model, tokenizer, prompts: list[list[int]], temperature=1.0, seed=0, max_new_tokens=None, samples=1, rows=256,
            cache=None):  # fmt: skip
    """`samples` Answers to each prompt, one after the other; each ends with the turn, with the text, or where the context is
    full."""
    rooms = [min(model.config.seq_len - len(p), max_new_tokens or math.inf) for p in prompts]
    if min(rooms) < 1:
        longest = max(len(p) for p in prompts)
        raise UserError(f"A prompt of {longest} tokens leaves no room for an answer: the context has {model.config.seq_len}.")
    stop = {tokenizer.im_end_id, tokenizer.eot_id} - {None}
    pick = sharpen(temperature, tokenizer.n_vocab, seed, next(model.parameters()).device)
    new = generate(model, prompts, rooms, pick, stop, samples, rows, cache)
    return [Answer(ids, tokenizer.decode(ids[: len(ids) - (ids[-1] in stop)]), ids[-1] in stop) for ids in new]


def progress(text: str, total: int):
    """A bar with time left, on a terminal: `with progress(...) as advance: advance(n)`."""
    import contextlib

    from rich.progress import Progress

    @contextlib.contextmanager
    def bar():
        with Progress(console=console(), transient=True, disable=not console().is_terminal) as shown:
            task = shown.add_task(text, total=total)
            yield lambda n=1: shown.advance(task, n)

    return bar()


def load_prompts(path: str, limit: int | None, tasks=None, seed: int = 0) -> list[dict]:
    """Records with what to ask ("prompt": messages) and, in the default data, how to check the answer."""

    def read(record: dict) -> dict:
        if "messages" in record or "conversations" in record or "instruction" in record:
            prompt = read_conversation(record)
            while prompt and prompt[-1]["role"] == "assistant":
                prompt = prompt[:-1]
        else:
            prompt = read_prompt(record)
        if not prompt:
            raise ValueError("nothing is asked in it")
        check = record.get("check")
        if check is not None and not (isinstance(check, dict) and {"task", "before", "after", "shown", "name", "params"} <= check.keys()):
            raise ValueError("its 'check' is not of the kind that `python align.py data` writes")
        return {"prompt": prompt, **{key: record.get(key) for key in ("task", "check", "held_out")}}

    records = [r for r in read_lines(path, read) if not tasks or r["task"] in tasks]
    if limit and len(records) > limit:  # an even part of each task
        order = np.random.default_rng(seed).permutation(len(records))
        records = [records[i] for i in sorted(order[:limit].tolist())]
    if not records:
        raise UserError(f"There are no prompts in {path}{f' of the tasks {tasks}' if tasks else ''}.")
    return records


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % confidence interval of a rate (Wilson 1927): sensible at 0 and 1 too.

    >>> [round(x, 3) for x in wilson(0, 10)]
    [0.0, 0.278]
    """
    p, d = successes / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / d, z / d * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_interval(values) -> tuple[float, float, float]:
    """(mean, and its 95 % confidence interval)."""
    values = np.asarray(values, float)
    half = 1.96 * values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


# What can stand after a piece of Python: the first is right. Few-shot multiple choice without a download.
CHOICES = [
    ("import os\npath = os.path.", ["join(", "merge(", "combine(", "glue("]),
    ("for i in ", ["range(", "global(", "return(", "import("]),
    ("class Error(", ["Exception):", "Continue):", "Import):", "Lambda):"]),
    ("def __init__(", ["self", "None", "return", "with"]),
    ("if value is ", ["None:", "def:", "class:", "import:"]),
    ("try:\n    run()\nexcept ", ["ValueError:", "for x:", "return x:", "break:"]),
    ("with open(path) ", ["as file:", "to file:", "is file:", "of file:"]),
    ("from collections import ", ["defaultdict", "while", "lambda", "return"]),
    ("x = [i for i ", ["in items]", "of items]", "at items]", "to items]"]),
    ("if name not ", ["in names:", "of names:", "at names:", "on names:"]),
    ("while ", ["True:", "import:", "class:", "def:"]),
    ("def f(x):\n    ", ["return x", "import f(", "class x", "except x"]),
    ("raise ", ["TypeError(", "for x in", "def f(", "elif x:"]),
    ("assert isinstance(", ["value, str)", "for value)", "return, if)", "value: def)"]),
    ("names = {}\nnames.", ["items()", "append()", "upper()", "strip()"]),
    ("items = []\nitems.", ["append(", "keys(", "lower(", "encode("]),
    ("text = 'a'\ntext.", ["split(", "append(", "items(", "keys("]),
    ("lambda ", ["x: x", "def x", "class x", "return x"]),
    ("self.name = ", ["name", "def", "elif", "except"]),
    ("import ", ["sys", "if", "else", "not"]),
    ("return ", ["self.value", "import", "except:", "def f"]),
    ("if x == 0:\n    y = 1\n", ["else:", "catch:", "then:", "end"]),
    ("yield ", ["item", "def", "class", "elif"]),
    ("print(", ["'done')", "def)", "class:", "import)"]),
]


@torch.no_grad()
def multiple_choice(model, tokenizer, shots: int) -> list[bool]:
    """Is the right ending the likeliest (log p per byte) after so many solved ones? Of each of CHOICES."""
    right, device = [], next(model.parameters()).device
    for i, (before, endings) in enumerate(CHOICES):
        solved = random.Random(i).sample([c for c in CHOICES if c[0] != before], shots)
        context = tokenizer.encode("".join(f"{b}{e[0]}\n\n" for b, e in solved) + before)
        tails = [tokenizer.encode(e) for e in endings]
        examples = [as_example(context, t) for t in tails]
        if max(len(e.ids) for e in examples) > model.config.seq_len:
            raise UserError(f"{shots} shots do not fit the context of {model.config.seq_len} tokens.")
        scores = logps(model, collate([examples], model.config.seq_len, device)).cpu() / torch.tensor([len(e.encode()) for e in endings])
        right.append(int(scores.argmax()) == 0)
    return right


@torch.no_grad()
def mean_kl(policy, reference, examples: list[Example], batch: int = 16) -> list[float]:
    """KL(policy || reference) of each answer, in nats a token: summed over the vocabulary, not sampled."""
    result, device = [], next(policy.parameters()).device
    for i in range(0, len(examples), batch):
        b = collate([[e] for e in examples[i : i + batch]], policy.config.seq_len, device)
        p, q = (m(b.x, at=b.at, **b.place)[0].float().log_softmax(-1) for m in (policy, reference))  # (N, V)
        kl = (p.exp() * (p - q)).sum(-1)
        result += (torch.zeros(len(b.last), device=device).index_add(0, b.owner, kl) / b.lengths.clamp(min=1)).tolist()
    return result


def as_example(prompt: list[int], answer: list[int]) -> Example:
    return Example(prompt + answer, [False] * len(prompt) + [True] * len(answer))


def answer_all(folder, records, temperature, seed, device, max_new_tokens=None, samples=1):
    """-> tokenizer, prompts in tokens, answers."""
    model = load_model(folder, device, pick_dtype("auto", device))
    if model.config.head != "lm":
        raise UserError(f"{folder} is a reward model: it gives scores, not answers.")
    tokenizer = load_tokenizer(folder)
    prompts = [[tokenizer.eot_id, *tokenizer.encode(r["plain"])] if "plain" in r else render(tokenizer, r["prompt"], reply=True)[0]
               for r in records]  # fmt: skip
    answers = []
    with progress(f"{folder} answers", len(prompts) * samples) as advance:
        for i in range(0, len(prompts), 1000):
            some = prompts[i : i + 1000]
            answers += rollout(model, tokenizer, some, temperature, seed_of(seed, i), max_new_tokens, samples)
            advance(len(some) * samples)
    return tokenizer, prompts, answers


def open_judge(folder, device) -> Callable[[list[list[dict]]], list[float]]:
    """A reward model: conversations -> scores, each read with its own tokenizer. Of one that is longer than its context the
    beginning is left out, so that the answer and its end are seen; that is said when it first happens."""
    model, tokenizer = load_model(folder, device), load_tokenizer(folder)
    if model.config.head != "score":
        raise UserError(f"{folder} is no reward model: `python align.py reward` trains one.")
    T, said = model.config.seq_len, False

    @torch.no_grad()
    def score(conversations):
        nonlocal said
        examples, scores = [Example(*render(tokenizer, c)) for c in conversations], []
        if not said and (longer := sum(len(e.ids) > T for e in examples)):
            said = True
            say(f"{folder} reads {T} tokens: of {longer} of {len(examples)} texts the beginning is left out, and of later ones too.")
        for i in range(0, len(examples), 64):
            cut = [[Example(e.ids[-T:], e.trained[-T:])] for e in examples[i : i + 64]]
            scores += rewards(model, collate(cut, T, device)).tolist()
        return scores

    score.fingerprint = seed_of(str(folder), *fingerprint_of(model))
    return score


def compare(folder, against, reward, records, model, prompts, answers, temperature, seed) -> dict:
    """The part of `assess` that needs another model, which answers the same prompts."""
    device, n = next(model.parameters()).device, len(records)
    other = load_model(against, device)
    _, _, theirs = answer_all(against, records, temperature, seed, device)
    if other.config.vocab_size != model.config.vocab_size:
        raise UserError(f"{folder} and {against} have different vocabularies: they cannot be compared token by token.")
    examples = [as_example(p, a.ids) for p, a in zip(prompts, answers, strict=True)]
    result = {"KL to the other, nats a token": (*mean_interval(mean_kl(model, other, examples)), n)}

    def wins(name, mine, others):
        result[name] = (*mean_interval([(a > b) + 0.5 * (a == b) for a, b in zip(mine, others, strict=True)]), n)

    if all(r["check"] for r in records):
        def passed(some):
            return [sum(grade(r["check"], a.text, a.ended).values()) for r, a in zip(records, some, strict=True)]

        wins("wins by the checks", passed(answers), passed(theirs))
    if reward:
        talks = [[*r["prompt"], {"role": "assistant", "content": a.text}] for some in (answers, theirs)
                 for r, a in zip(records, some, strict=True)]  # fmt: skip
        scores = open_judge(reward, device)(talks)
        wins("wins by the reward model", scores[:n], scores[n:])
    return result


def vote(record: dict, answers: list[Answer]) -> int:
    """Which answer most agree with (self-consistency: 2203.11171), the first of them: equal as syntax trees, where they parse,
    else as text. No reward is asked."""
    forms = []
    for a in answers:
        tree = parse(record["check"]["before"] + a.text + record["check"]["after"]) if record["check"] else None
        try:
            forms.append(ast.dump(tree) if tree and a.ended else a.text.strip())
        except RecursionError:  # deeper than ast.dump goes
            forms.append(a.text.strip())
    return forms.index(Counter(forms).most_common(1)[0][0])


def more_answers(folder, records, samples, reward, temperature, seed, device) -> dict:
    """The part of `assess` that draws several answers to each prompt: what more compute is worth without any training."""
    _, _, answers = answer_all(folder, records, temperature, seed, device, samples=samples)
    if "plain" in records[0]:
        answers = [cut_plain(records[i // samples], a) for i, a in enumerate(answers)]
    groups = [answers[i : i + samples] for i in range(0, len(answers), samples)]
    good = [[all(grade(r["check"], a.text, a.ended).values()) for a in g] for r, g in zip(records, groups, strict=True)]
    result = {}
    for k in sorted({1, *(2**i for i in range(1, samples.bit_length()) if 2**i <= samples), samples}):
        result[f"pass@{k}"] = (*mean_interval([pass_at_k(samples, sum(g), k) for g in good]), len(good))
    picked = {f"good: vote of {samples}": [g[vote(r, some)] for r, some, g in zip(records, groups, good, strict=True)]}
    if reward:
        talks = [[*r["prompt"], {"role": "assistant", "content": a.text}] for r, g in zip(records, groups, strict=True) for a in g]
        scores = np.reshape(open_judge(reward, device)(talks), (-1, samples))
        picked[f"good: best of {samples} by the reward model"] = [g[i] for g, i in zip(good, scores.argmax(1).tolist(), strict=True)]
    return result | {name: (sum(p) / len(p), *wilson(sum(p), len(p)), len(p)) for name, p in picked.items()}


PLAIN_END = {"body": r"\n(?=\S)", "continue": r"\n(?=\S)", "doc": r'"""', "name": r"\("}


def plainly(records: list[dict]) -> list[dict]:
    """The prompts as a base model would meet them: the text itself up to where the answer begins, no conversation. Such an
    answer ends where the text does something else: a line that is not indented, the closing quotes."""
    return [{**r, "plain": r["check"]["before"]} for r in records if r["check"] and r["task"] in PLAIN_END]


def cut_plain(record: dict, answer: Answer) -> Answer:
    found = re.search(PLAIN_END[record["task"]], answer.text)
    return answer._replace(text=answer.text[: found.start()], ended=True) if found else answer


def assess(folder, records, against=None, reward=None, temperature=JUDGED_AT, seed=0, text=None, device=None, samples=1) -> dict:
    """Everything that `evaluate` prints: {name: (value, low, high, n)}."""
    device, result, some = device or pick_device(), {}, [r for r in records if r["check"] and not r["held_out"]]
    if samples > 1 and not some:
        raise UserError("--samples needs prompts that carry checks, as `python align.py data` makes them.")
    if reward and not against and samples == 1:
        raise UserError("--reward judges between answers: give --against another folder, or --samples.")
    tokenizer, prompts, answers = answer_all(folder, records, temperature, seed, device)
    model = load_model(folder, device)
    if "plain" in records[0]:
        answers = [cut_plain(r, a) for r, a in zip(records, answers, strict=True)]
    grades = [grade(r["check"], a.text, a.ended) if r["check"] else {"ends": a.ended} for r, a in zip(records, answers, strict=True)]

    def rate(name, outcomes):
        result[name] = (sum(outcomes) / len(outcomes), *wilson(sum(outcomes), len(outcomes)), len(outcomes))

    checked = [(r, g) for r, g in zip(records, grades, strict=True) if r["check"]]
    for task in sorted({r["task"] for r, _ in checked}):
        held_out = any(r["held_out"] for r, _ in checked if r["task"] == task)
        rate(f"good: {task}{' (held out)' * held_out}", [all(g.values()) for r, g in checked if r["task"] == task])
    trained = [g for r, g in checked if not r["held_out"]] or grades  # the figures below are of the tasks that were trained
    rate("good", [all(g.values()) for g in trained])
    for name in CHECKS if checked else ("ends",):
        rate(name, [g[name] for g in trained if name in g])
    rate("distinct", [i == 0 for i in (Counter(a.text for a in answers[: k + 1])[a.text] - 1 for k, a in enumerate(answers))])
    result["length, tokens"] = (*mean_interval([len(a.ids) for a in answers]), len(answers))
    if against:
        result |= compare(folder, against, reward, records, model, prompts, answers, temperature, seed)
    if samples > 1:
        result |= more_answers(folder, some, samples, reward, temperature, seed, device)
    for shots in (0, 1, 4):
        rate(f"multiple choice, {shots} shots", multiple_choice(model, tokenizer, shots))
    if text:
        tokens = Tokens(text, "val")
        if tokens.vocab_size != tokenizer.n_vocab:
            raise UserError(f"{text} was made with another tokenizer than {folder}: its bits per byte cannot be measured.")
        found = evaluate_text(model, tokens, model.config.seq_len, 16, 50_000)
        result["bits per byte of the pretraining text"] = (found["val_bpb"], None, None, found["val_tokens"])
    return result


# ---------------------------------------------------------------------------------------------------------------------
# The commands

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")]
Resume = Annotated[str | None, typer.Option(help="Go on with the run in this checkpoint folder, exactly.")]


def write_records(path: Path, records: list[dict], overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already: --overwrite replaces it.")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.new")
    write_text(new, "".join(json.dumps(r) + "\n" for r in records))
    new.replace(path)


@app.command()
def data(
    source: Annotated[str, typer.Option("--data", help="Data folder whose modules are taken apart.")] = "data/python",
    out: Annotated[Path, typer.Option(help="Folder for train.jsonl and val.jsonl.")] = Path("data/instructions"),
    held_out: Annotated[str, typer.Option(help=f"Task that is not trained, only judged: {', '.join(TASKS)}.")] = "continue",
    limit: Annotated[int, typer.Option(help="Most training examples of a task.")] = 4000,
    val_limit: Annotated[int, typer.Option(help="Most examples of a task to judge by.")] = 150,
    max_tokens: Annotated[int, typer.Option(help="Longest conversation: the model's context.")] = 256,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Make instructions from Python functions: training ones from the modules that pretraining trained on, those to judge
    by from the modules that it only validated on."""
    if held_out not in TASKS:
        raise UserError(f"--held-out is one of {', '.join(TASKS)}; not {held_out!r}.")
    if source == "data/python" and not Path(source).exists():
        default_data(source)
    made = {}
    for split, most in (("train", limit), ("val", val_limit)):
        made[split], counts, tasks = [], Counter(), len(TASKS) - (split == "train")
        with progress(f"{split}: reading functions", most * tasks) as advance:
            for record, counts in instructions_of(source, split, most, max_tokens, seed):  # noqa: B007
                if split == "val" or record["task"] != held_out:
                    made[split].append(record | ({"held_out": True} if record["task"] == held_out else {}))
                    advance()
        dropped = {k: v for k, v in counts.items() if k not in TASKS}
        say(f"{split}: {describe(Counter(r['task'] for r in made[split]))}; {describe(dropped)}")
        random.Random(seed).shuffle(made[split])
        write_records(out / f"{split}.jsonl", made[split], overwrite)
    shown = next(r for r in made["train"] or made["val"])
    say(f"{out} written. One of them:\n")
    say("\n".join(f"[{m['role']}]\n{m['content']}" for m in shown["messages"]), markup=False, style="cyan")


def stage_command(kind: type, open_run: Callable, doc: str) -> Callable:
    """A stage as a typer command with the options of its kind."""

    def main(given: dict, resume: Resume = None, overwrite: Overwrite = False, show_mask: Annotated[int, typer.Option(
             help="Print so many examples, the trained tokens in colour, and end.")] = 0) -> dict:  # fmt: skip
        o = resumed(resume, given, kind=kind) if resume else kind(**given)
        for name in ("batch_size", "lr", "epochs", "grad_clip", "eval_interval", "save_interval"):
            if getattr(o, name) <= 0:
                raise UserError(f"--{name.replace('_', '-')} has to be above zero.")
        if o.max_steps is not None and o.max_steps < 1:
            raise UserError("--max-steps has to be above zero.")
        if show_mask:
            return print_mask(o, show_mask)
        if not resume:
            check_out(Path(o.out), overwrite)
        return open_run(o, resume).go()

    main.__doc__ = doc
    return run_command(main, options=kind, leave_out=("epochs",) if issubclass(kind, PlayStage) else ())


def print_mask(o: Stage, count: int) -> None:
    from rich.text import Text

    tokenizer, ranked = load_tokenizer(find_checkpoint(o.model)), isinstance(o, RewardStage)
    shown = load_items(o.data, tokenizer, 10**9, ranked)[0][:count]
    for number, example in enumerate(e for item in shown for e in item):
        console().rule(f"{number + 1}", style="dim")
        text = Text()
        for trained, group in itertools.groupby(zip(*example, strict=True), key=lambda pair: pair[1]):
            text.append(tokenizer.decode([token for token, _ in group]), style="bold green" if trained else "dim")
        console().print(text)


sft = stage_command(Stage, sft_run, "Instructions: train on the assistant's words of conversations (SFT).")
reward = stage_command(RewardStage, reward_run, "A reward model: a score for a conversation, from pairs or rankings.")
grpo = stage_command(GRPOStage, grpo_run, "Reinforcement without a critic: answers are judged beside others to the same prompt.")
ppo = stage_command(PPOStage, ppo_run, "Reinforcement with a critic: each token is judged beside what was expected.")
dpo = stage_command(DPOStage, dpo_run, "Preferences without a reward model: DPO, IPO, SimPO and their kin.")
for name, command in (("sft", sft), ("reward", reward), ("dpo", dpo), ("ppo", ppo), ("grpo", grpo)):
    app.command(name)(command)


@app.command()
def pairs(
    folder: Annotated[str, typer.Argument(help="Checkpoint folder that answers.")] = "out/sft",
    prompts: Annotated[str, typer.Option(help="JSON lines with prompts and checks.")] = "data/instructions/train.jsonl",
    out: Annotated[Path, typer.Option(help="JSON-lines file to write.")] = Path("data/pairs.jsonl"),
    samples: Annotated[int, typer.Option(help="Answers to each prompt.")] = 3,
    limit: Annotated[int, typer.Option(help="Prompts, drawn evenly.")] = 8000,
    task: Annotated[str | None, typer.Option(help="Prompts of this task only.")] = None,
    temperature: Annotated[float, typer.Option(help="Of the answers: 1 is the model's own distribution.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 128,
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """A model's own answers, ranked by the checks: of each prompt those that pass all, each beside each that does not.

    Prompts whose answers are all good or all bad teach nothing and are counted. An answer that was cut off is left out: it
    would be given an end that nobody wrote, to unlearn it."""
    if samples < 2:
        raise UserError("--samples has to be at least 2: a preference is between two answers.")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists already: --overwrite replaces it.")
    records = [r for r in load_prompts(prompts, limit, task and [task], seed) if r["check"]]
    if not records:
        raise UserError(f"The prompts of {prompts} carry no checks: rank answers by hand with `python align.py label`.")
    _, _, answers = answer_all(folder, records, temperature, seed, pick_device(device), max_new_tokens, samples)
    made, counts = [], Counter()
    for i, record in enumerate(records):
        own = answers[i * samples : (i + 1) * samples]
        graded = sorted(((sum(grade(record["check"], a.text, a.ended).values()), a) for a in own), key=lambda g: -g[0])
        good, bad = [g for g in graded if g[0] == len(CHECKS)], [g for g in graded if g[0] < len(CHECKS) and g[1].ended]
        counts["all good" if not bad else "none good" if not good else "with both"] += 1
        different = itertools.product(dict.fromkeys(a.text for _, a in good), dict.fromkeys(a.text for _, a in bad))
        made += [{"prompt": record["prompt"], "chosen": c, "rejected": r, "task": record["task"]} for c, r in different]
    say(f"{len(answers):,} answers of {folder} to {len(records):,} prompts: {describe(counts)}")
    if not made:
        raise UserError(f"No prompt had a good answer beside a bad one: train {folder} further, or raise --temperature.")
    write_records(out, made, overwrite)
    say(f"{out} written.")


@app.command()
def label(
    folder: Annotated[str, typer.Argument(help="Checkpoint folder that answers.")] = "out/sft",
    prompts: Annotated[str, typer.Option(help="JSON lines with prompts.")] = "data/instructions/val.jsonl",
    out: Annotated[Path, typer.Option(help="JSON-lines file that the pairs are added to.")] = Path("data/labels.jsonl"),
    limit: Annotated[int, typer.Option(help="Prompts.")] = 50,
    temperature: Annotated[float, typer.Option(help="Of the answers.")] = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Two answers side by side: 1 or 2 for the better one, s to skip, q to end. What is chosen is written at once; prompts
    that the file has already are not asked again."""
    from rich.columns import Columns
    from rich.markup import escape
    from rich.panel import Panel

    done = [r["prompt"] for r in read_lines(out, dict)] if out.exists() else []
    records = [r for r in load_prompts(prompts, limit) if r["prompt"] not in done]
    if not records:
        return say(f"All prompts are labelled in {out}.")
    _, _, answers = answer_all(folder, records, temperature, seed, pick_device(device), samples=2)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="utf-8") as file:
        for i, record in enumerate(records):
            first, second = (a.text for a in answers[2 * i : 2 * i + 2])
            if first == second:
                continue
            width = max(20, console().width // 2 - 2)
            console().print(Panel(escape(record["prompt"][-1]["content"]), title=f"{i + 1} of {len(records)}", title_align="left"))
            console().print(Columns([Panel(escape(t), title=k, width=width) for k, t in (("1", first), ("2", second))]))
            key = read_key("12sq")
            if key == "q":
                break
            if key != "s":
                chosen, rejected = (first, second) if key == "1" else (second, first)
                file.write(json.dumps({"prompt": record["prompt"], "chosen": chosen, "rejected": rejected}) + "\n")
                file.flush()
    say(f"{out} holds {sum(1 for _ in read_lines(out, dict))} pairs.")


def read_key(allowed: str) -> str:
    """One key, without Enter on a terminal; else the next character of standard input that is allowed, q at its end."""
    say(f"[bold]{' / '.join(allowed)}[/] ? ")
    while True:
        key = typer.getchar() if sys.stdin.isatty() else sys.stdin.read(1) or "q"
        if key.lower() in allowed:
            return key.lower()


@app.command("evaluate")
def evaluate_command(
    folder: Annotated[str, typer.Argument(help="Checkpoint folder to judge.")] = "out/sft",
    against: Annotated[str | None, typer.Option(help="Checkpoint folder to compare with: KL, win rate.")] = None,
    reward: Annotated[str | None, typer.Option(help="Reward model that judges too (with --against or --samples).")] = None,
    prompts: Annotated[str, typer.Option(help="JSON lines with prompts and checks.")] = "data/instructions/val.jsonl",
    limit: Annotated[int, typer.Option(help="Prompts, drawn evenly; 0: all.")] = 0,
    task: Annotated[str | None, typer.Option(help="Prompts of this task only.")] = None,
    text: Annotated[str | None, typer.Option("--data", help="Pretraining's data folder: what was forgotten.")] = "data/python",
    temperature: Annotated[float, typer.Option(help="Of the answers; 0 is greedy.")] = JUDGED_AT,
    samples: Annotated[int, typer.Option(help="Answers to each prompt, for pass@k, their vote, and (--reward) their best.")] = 1,
    plain: Annotated[bool, typer.Option("--plain", help="Let it go on with the text, as a base model does.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object to standard output.")] = False,
) -> None:
    """How good a model's answers are, by rules that nobody can argue with; with 95 % confidence intervals."""
    records = load_prompts(prompts, limit or None, task and [task])
    if samples < 1 or (samples > 1 and not temperature):
        raise UserError("--samples has to be at least 1; and greedy answers (--temperature 0) are all the same.")
    if plain and (against or not (records := plainly(records))):
        raise UserError("--plain needs prompts with checks, and no --against: a base model is judged by itself.")
    text = text if text and Path(text).exists() else None
    result = assess(folder, records, against, reward, temperature, seed, text, pick_device(device), samples)
    if as_json:
        return print(json.dumps({name: dict(zip(("value", "low", "high", "n"), row, strict=True)) for name, row in result.items()}))
    from rich.table import Table

    table = Table("what", "value", "95 % interval", "n", title=f"{folder}{f' against {against}' if against else ''}", title_justify="left")
    for name, (value, low, high, n) in result.items():
        table.add_row(name, f"{value:.3f}", "" if low is None else f"{low:.3f} to {high:.3f}", f"{n:,}")
    console().print(table)


if __name__ == "__main__":
    run_app(app)
