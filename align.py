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
    python align.py evaluate out/dpo --against out/sft  # --samples 8: pass@k; --reward: the best of them
    python align.py label out/sft                       # which of two answers do you prefer?

A model's text is parsed and compiled, never executed. Left out: images, answers written on other machines.

SFT and rankings: Ouyang et al. 2022. DPO: Rafailov et al. 2023. IPO: Azar et al. 2023. SimPO: Meng et al.
2024. LoRA: Hu et al. 2021. PPO: Schulman et al. 2017, for language models Ziegler et al. 2019. GRPO: Shao et
al. 2024. (The numbers below are arXiv's.)
"""

import ast
import builtins
import dataclasses
import functools
import itertools
import json
import keyword
import math
import os
import random
import re
import symtable
import sys
import textwrap
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves this folder out
from model import (  # before torch: it says how OpenMP's threads wait
    DTYPES, Linear, Ranks, Run, RunOptions, Tokens, Transformer, UserError, barrier, build_optimizer, cast,
    check, clip_gradients, command, default_data, find_checkpoint, finish_save, generate,
    load_config, load_model, load_state, load_tokenizer, open_run, opt, pick_device, pick_dtype, progress,
    rank_and_world, render, run_app, save_checkpoint, save_files, say, seed_of, setup_distributed,
    sum_over_ranks, token_losses,
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
    trained = [False] * len(prompt) + [True] * len(answer)
    return Example(prompt + answer, trained)

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
    sizes = [tokens_in(item) for item in items]
    rows = pack(sizes, max(T, *sizes))
    T = max(sum(sizes[i] for i in row) for row in rows)
    numbers = list(itertools.accumulate(map(len, items), initial=0))  # of each item's first example
    ids = torch.zeros(len(rows) * T, dtype=torch.long)
    positions, docs, trunks = torch.full((3, len(ids)), -1)
    places = {}  # where the tokens of each example stand
    for r, row in enumerate(rows):
        end = r * T
        for i in row:
            item = items[i]
            shared = trunk_length(item)
            trunk = torch.arange(end, end + shared)
            parts = [(n + i, 0, item[0].ids[:shared])]  # document, first position, tokens
            parts += [(k, shared, e.ids[shared:]) for k, e in enumerate(item, numbers[i])]
            for doc, start, tokens in parts:
                where = torch.arange(end, end + len(tokens))
                ids[where] = torch.tensor(tokens, dtype=torch.long)
                positions[where] = torch.arange(start, start + len(tokens))
                docs[where] = doc
                trunks[where] = n + i
                places[doc] = torch.cat((trunk, where))
                end += len(tokens)
    at, targets = [], []
    for k, example in enumerate(itertools.chain(*items)):
        asked = torch.tensor(example.trained[1:], dtype=torch.bool)
        at.append(places[k][:-1][asked])
        targets.append(ids[places[k][1:][asked]])
    lengths = torch.tensor([len(a) for a in at])
    owner = torch.arange(n).repeat_interleave(lengths)
    last = torch.stack([places[k][-1] for k in range(n)])
    rows = [column.view(-1, T) for column in (ids, positions, docs, trunks)]
    tensors = (*rows, torch.cat(at), torch.cat(targets), owner, last, lengths)
    return Batch(*(values.to(device) for values in tensors))

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

ADAPTED = r"layers\.\d+\.(self_attn|mlp|mlp\.shared_experts)\.\w+_proj"  # every token comes through these

def add_lora(model: Transformer, rank: int, alpha: float, seed: int) -> None:
    """Put LoRA on the matrices of attention and of dense or shared feed-forward parts; freeze the rest but a
    score head."""
    check(rank <= model.config.n_embd, f"--lora-rank {rank} is more than the width, {model.config.n_embd}.")
    for name, p in model.named_parameters():
        p.requires_grad_(name == "score.weight")
    for name, module in list(model.named_modules()):
        if re.fullmatch(ADAPTED, name):
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

# Whatever the prompt alone asks for, a script without a model can do: write code that parses, defines what it
# should, reads its parameters. So one check, `agrees`, asks for what the prompt keeps back: the author's
# words.

CHECKS = ("parses", "defines", "known", "fits", "agrees", "ends")
AGREES = 0.25  # the least F-score of an answer's new words
KNOWN = {*dir(builtins), "__class__", "__file__"}  # names that need no definition
VERBS = {"return": ast.Return, "yield": (ast.Yield, ast.YieldFrom), "raise": ast.Raise}
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
    """Parse an answer; None where parser or compiler refuse it, or it is longer or deeper than anybody
    writes."""
    depth = deepest = 0
    for c in code:
        depth += (c in "([{") - (c in ")]}")
        deepest = max(deepest, depth)
    indent = max((len(line) - len(line.lstrip()) for line in code.splitlines()), default=0)
    if len(code) > MAX_CHARS or deepest > MAX_DEPTH or indent > 4 * MAX_DEPTH:
        return None
    tree = attempt(ast.parse, code)
    return tree if tree and attempt(compile, tree, "<answer>", "exec", 0, True) else None

def names_in(code: str) -> tuple[set[str], set[str]]:
    """Find the names that code defines at its top level, and those that it reads there or as globals.

    >>> names_in("def f(path): return os.stat(path)")
    ({'f'}, {'os'})
    """
    tables = [symtable.symtable(code, "<answer>", "exec")]
    for table in tables:  # and those that it adds
        tables += table.get_children()
    defined = {s.get_name() for s in tables[0].get_symbols() if s.is_assigned() or s.is_imported()}
    symbols = [s for table in tables for s in table.get_symbols()]
    return defined, {s.get_name() for s in symbols if s.is_global() and s.is_referenced()}

def fits(node: ast.FunctionDef, params: list[str]) -> bool:
    """Tell whether a function reads these parameters and does what its docstring says: return, yield,
    raise."""
    inside = [n for statement in node.body for n in ast.walk(statement)]
    read = {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    said = re.findall(r"\b(return|yield|raise)s?\b", (ast.get_docstring(node) or "").lower())
    return set(params) <= read and all(any(isinstance(n, VERBS[v]) for n in inside) for v in said)

def words(text: str) -> set[str]:
    """Split names and text into words of four letters or more, Python's keywords left out.

    >>> sorted(words("def readLine(file_name): return None"))
    ['file', 'line', 'name', 'read']
    """
    found = {w.lower() for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", text) if len(w) > 3}
    return found - {w.lower() for w in keyword.kwlist}

def agreement(answer: str, author: str, shown: str) -> float:
    """Compute the F-score of an answer's words against its author's; words of the prompt do not count.

    >>> agreement("Read the next line of a file", "Gives a file's next line", "def f(file): ...")
    0.666...
    """
    mine = words(answer) - words(shown)
    theirs = words(author) - words(shown)
    both = len(mine) + len(theirs)
    return 2 * len(mine & theirs) / both if both else 1.0

def likeness(answer: str, author: str) -> float:
    """Compute chrF2 (Popovic 2015, 2016): the F-score, recall counting double, of runs of up to six
    characters, white space left out.

    It is a second opinion of answers: nothing is trained on it.

    >>> likeness("get_name", "get_names")
    0.862...
    """
    texts = ["".join(text.split()) for text in (answer, author)]
    lengths = range(1, 1 + min(6, *map(len, texts)))
    precision = recall = 0.0
    for n in lengths:
        mine, theirs = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in texts)
        same = (mine & theirs).total()
        precision += same / mine.total() / len(lengths)
        recall += same / theirs.total() / len(lengths)
    return 5 * precision * recall / (4 * precision + recall) if precision else 0.0

def grade(rules: dict, answer: str, ended: bool) -> dict[str, bool]:
    """Check an answer -> {one of CHECKS: did it pass}. The answer passes when it passed all.

    rules: "before" and "after", the text around the answer; "shown", the prompt; "answer", its author's;
    "name" of the function; "params" to be read; "known", names that its module defines; "task".

    parses    Python's parser and compiler take the text with the answer in its place
    defines   it is one function of the name asked for
    known     it reads no name that nobody defines
    fits      it reads every parameter and does what its docstring says
    agrees    enough of its words that the prompt does not show are its author's; mended code is as it was
    ends      the model ended its turn by itself
    """
    result = dict.fromkeys(CHECKS, False) | {"ends": ended}
    code, original = (rules["before"] + text + rules["after"] for text in (answer, rules["answer"]))
    tree = parse(code) if answer.strip() else None
    if tree is None:
        return result
    result["parses"] = True
    node = tree.body[0] if len(tree.body) == 1 else None
    if not isinstance(node, ast.FunctionDef):
        return result
    result["defines"] = node.name == (answer.strip() if rules["task"] == "name" else rules["name"])
    names = attempt(names_in, code)
    result["known"] = names is not None and names[1] <= {*names[0], *rules["known"], *KNOWN}
    result["fits"] = fits(node, rules["params"])
    if rules["task"] == "mend":
        as_it_was = parse(original) or ast.Pass()
        result["agrees"] = attempt(ast.dump, tree) == attempt(ast.dump, as_it_was)
    else:
        result["agrees"] = agreement(answer, rules["answer"], rules["shown"]) >= AGREES
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
SIGNS = re.compile(r"(?<!\w)[()\[\]{}.,:=]|[()\[\]{}.,:=](?!\w)")  # without which no two words run together
BORDERS = re.compile(r"(?<!\w)|(?!\w)")

def find_functions(text: str) -> Iterator[tuple[ast.FunctionDef, list[str], list[str]]]:
    """Find a module's functions and methods of up to 60 lines, each with its lines, dedented, and the names
    that the module defines; none with tabs, on one line, or inside another function, whose names it may use.
    """
    lines = re.split(r"\r\n|\r|\n", text)  # not splitlines: a form feed ends no line for ast
    often = Counter(re.findall(r"\w+", text))
    defined, _ = attempt(names_in, text) or ((), ())
    known = sorted(name for name in defined if often[name] > 1)  # the others nobody uses
    scopes = [attempt(ast.parse, text) or ast.Module([], [])]
    for scope in scopes:  # and the classes that it adds
        for node in scope.body:
            if isinstance(node, ast.ClassDef):
                scopes.append(node)
            elif isinstance(node, ast.FunctionDef) and node.body[0].lineno > node.lineno:
                own = lines[node.lineno - 1 : node.end_lineno]
                if len(own) <= 60 and "\t" not in "".join(own):
                    yield node, textwrap.dedent("\n".join(own)).split("\n"), known

def break_code(code: str, rng: random.Random) -> str | None:
    """Leave out a sign without which code does not parse, and which the parser would take in three other
    places of the line, too, all between words: trying does not tell which one is meant."""
    signs = list(SIGNS.finditer(code))
    for sign in rng.sample(signs, len(signs)):
        i = sign.start()
        broken = code[:i] + code[i + 1 :]
        line = (code.rfind("\n", 0, i) + 1, f"{broken}\n".index("\n", i))
        forms = set()
        for border in BORDERS.finditer(broken, *line) if parse(broken) is None else ():
            place = border.start()
            tree = attempt(ast.parse, broken[:place] + sign.group() + broken[place:])
            forms |= {ast.dump(tree)} if tree else set()
            if len(forms) > 3:
                return broken
    return None

def make_instructions(node: ast.FunctionDef, lines, known, wanted, rng: random.Random) -> Iterator[dict]:
    """Make those of the wanted tasks that a function is good for: {"messages", "task", "check"}, with its
    author's answers."""
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

    def record(task, shown, answer, before, after="", params=()):
        question = {"role": "user", "content": f"{TASKS[task]}\n\n{shown}"}
        rules = {"task": task, "before": before, "after": after, "shown": question["content"],
                 "answer": answer, "name": node.name, "params": list(params), "known": known}
        reply = {"role": "assistant", "content": answer}
        return {"messages": [question, reply], "task": task, "check": rules}

    summary = (doc or "").strip().split("\n\n")[0].strip()
    if summary and '"""' not in summary and "\\" not in summary and summary[-1] != '"':
        summary = textwrap.indent(summary, indent).strip()
        described = f'{signature}\n{indent}"""{summary}"""'
        if params:
            yield record("body", described, body, described + "\n", params=params)
        yield record("doc", bare, summary, f'{signature}\n{indent}"""', f'"""\n{body}')
    if re.fullmatch(r"(?i)[a-z_]\w{2,}", node.name):
        nameless = bare.replace(f"def {node.name}(", "def _(", 1)
        yield record("name", nameless, node.name, "def ", bare[len(f"def {node.name}") :])
    if "mend" in wanted and (broken := break_code(bare, rng)):
        yield record("mend", broken, bare, "")
    statements = node.body[1:] if doc else node.body
    if len(statements) > 1:
        cut = statements[rng.randrange(1, len(statements))].lineno - node.lineno
        shown = "\n".join(lines[:cut])
        yield record("continue", shown, "\n".join(lines[cut:]).strip("\n"), shown + "\n", params=params)

def read_modules(folder: str, split: str, seed: int) -> Iterator[str]:
    """Read one split's modules in a random order; "val" and "test" are halves of the validation split."""
    tokens = Tokens(folder, "train" if split == "train" else "val")
    tokenizer = load_tokenizer(folder)
    ids = tokens.read(0, tokens.n)
    modules = [m for m in np.split(ids, np.flatnonzero(ids == tokens.eot_id) + 1) if len(m)]
    random.Random(seed).shuffle(modules)
    half = {"train": slice(None), "val": slice(0, None, 2), "test": slice(1, None, 2)}[split]
    for module in modules[half]:
        yield tokenizer.decode(module[module != tokens.eot_id].tolist())

def nearly_seen(lines: list[str], seen: set) -> bool:
    """Tell whether half of a function's pairs of lines stood in functions before, and remember them all."""
    pairs = set(itertools.pairwise(lines))
    new = pairs - seen
    seen |= pairs
    return len(new) <= len(pairs) / 2

def find_flaw(record: dict, tokenizer, max_tokens: int) -> str | None:
    """Say why an instruction is of no use, if it is: its author's answer has to pass the checks, too."""
    rules = record["check"]
    answer = rules["answer"]
    if record["task"] != "mend" and words(answer) <= words(rules["shown"]):
        return "with answers that only repeat words of the prompt"
    if not all(grade(rules, answer, True).values()):
        return "with answers that fail the checks"
    longer = len(render(tokenizer, record["messages"])[0]) > max_tokens
    return "longer than the context" if longer else None

def instructions_of(folder: str, split: str, limit: int, max_tokens: int, seed: int, seen: set | None = None):
    """Make instructions from one split of a data folder, at most `limit` a task -> records, and a count of
    what is left out. seen: what `nearly_seen` remembers of other splits."""
    tokenizer = load_tokenizer(folder)
    rng = random.Random(seed_of(seed, split))
    seen = set() if seen is None else seen
    records, counts, left_out = [], Counter(), Counter()
    found = itertools.chain.from_iterable(map(find_functions, read_modules(folder, split, seed)))
    with progress(f"{split}: reading functions", limit * len(TASKS)) as show:
        for node, lines, known in found:
            wanted = [task for task in TASKS if counts[task] < limit]
            if not wanted:
                break
            if nearly_seen(lines, seen):
                left_out["functions like others"] += 1
                continue
            for record in make_instructions(node, lines, known, wanted, rng):
                if record["task"] in wanted:
                    flaw = find_flaw(record, tokenizer, max_tokens)
                    left_out.update([flaw] if flaw else ())
                    counts[record["task"]] += not flaw
                    records += [] if flaw else [record]
            show(len(records))
    return records, left_out

# ---- Reading what people have: Alpaca, Dolly, ShareGPT, messages; pairs and rankings -----------------------

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
         "system": "system", "tool": "tool", "function": "tool", "observation": "tool"}
ASKED = ("messages", "conversations", "prompt", "instruction")  # OpenAI, ShareGPT, trl, Alpaca and Dolly
ANSWERED = ("output", "response", "completion", "chosen")  # Alpaca, Dolly, trl

def read_lines(path: str | Path, read: Callable) -> Iterator:
    """Read JSON lines -> read(record) of each; a UserError has the number of the line that `read` refuses.

    `read` takes out of a record what it uses: what is left anywhere is named at the end.
    """
    number = 0
    unused = set()
    try:
        finish_save(Path(path).parent)
        there = os.path.isfile(path)
        check(there, "it is missing, or no file: `python align.py data` and `pairs` make the defaults")
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                line = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line:
                    record = json.loads(line)
                    check(isinstance(record, dict), "It is not a JSON object")
                    json.dumps(record, ensure_ascii=False).encode()  # half a character is an error
                    yield read(record)
                    unused |= record.keys() - {"task", "check", "held_out"}
    except UnicodeError as error:
        raise UserError(f"{path}, line {number} is not UTF-8, or has half a character: {error}.") from None
    except (UserError, OSError, ValueError, RecursionError) as error:
        where = f"{path}, line {number}" if number else path
        raise UserError(f"{where}: {str(error).rstrip('.')}.") from None
    if unused:
        say(f"{path}: not used of it: {', '.join(sorted(unused))}", markup=False)

def first_of(names: tuple[str, ...], record: dict) -> str:
    """Find the name that a record has, of those that mean the same."""
    found = [name for name in names if name in record]
    check(found, f"It lacks {' or '.join(names)}")
    return found[0]

def read_text(record: dict, name: str) -> str:
    """Take out a text, empty where there is none."""
    text = record.pop(name, None) or ""
    check(isinstance(text, str), f"{name!r} is not a text")
    return text

def read_turns(record: dict, name: str, role: str) -> list[dict]:
    """Take out a text, or messages in OpenAI's form (role, content) or ShareGPT's (from, value)."""
    value = record.pop(name)
    if isinstance(value, str):
        value = {"role": role, "content": value}
    turns = []
    for message in value if isinstance(value, list) and value else [value]:
        message = dict(message) if isinstance(message, dict) else {}
        speaker = message.pop("from" if "from" in message else "role", None)
        text = message.pop("value" if "value" in message else "content", None)
        known = isinstance(speaker, str) and speaker in ROLES and isinstance(text, str)
        check(known, f"{name!r} is neither a text nor messages, each with a text and a known role")
        record |= {f"{name}: {field}": None for field in message}
        turns.append({"role": ROLES[speaker], "content": text})
    return turns

def read_prompt(record: dict) -> list[dict]:
    """Take out what is asked: one of ASKED (messages and conversations have the answers in them), Alpaca's
    "input" or Dolly's "context" after it, "system" and "history" (pairs of question and answer) before."""
    name = first_of(ASKED, record)
    turns = read_turns(record, name, "user")
    if name == "instruction" and (more := read_text(record, "input") or read_text(record, "context")):
        turns[-1]["content"] += f"\n\n{more}"
    before = []
    if system := read_text(record, "system"):
        before.append({"role": "system", "content": system})
    history = record.pop("history", None) or []
    check(isinstance(history, list), "'history' is not a list")
    for pair in history:
        known = isinstance(pair, list) and [type(text) for text in pair] == [str, str]
        check(known, "'history' is not a list of pairs, a question and its answer each")
        before += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    check(not before or turns[0]["role"] != "system", "It has two system messages, or a history before one")
    return before + turns

def read_answers(record: dict, names: list[str]) -> list[list[dict]]:
    """Read a conversation for each answer, a text or messages, which may repeat the prompt (trl's pairs)."""
    whole = all(isinstance(record.get(name), list) for name in names)
    prompt = [] if whole and not any(name in record for name in ASKED) else read_prompt(record)
    talks = []
    for name in names:
        turns = read_turns(record, name, "assistant")
        talks.append(turns if turns[: len(prompt)] == prompt else prompt + turns)
        check(talks[-1][-1]["role"] == "assistant", f"{name!r} does not end with the assistant's turn")
    return talks

def read_conversation(record: dict) -> list[list[dict]]:
    """Read question and answers in any of the usual forms, as one conversation."""
    if first_of(ASKED, record) in ("messages", "conversations"):
        return [read_prompt(record)]
    return read_answers(record, [first_of(ANSWERED, record)])

def read_ranking(record: dict) -> list[list[dict]]:
    """Read {"prompt", "chosen", "rejected"} or {"prompt", "answers": [best, .., worst]} as conversations."""
    if "answers" not in record:
        return read_answers(record, [first_of((name,), record) for name in ("chosen", "rejected")])
    answers = record.pop("answers")
    check(isinstance(answers, list) and len(answers) > 1, "'answers' has fewer than two")
    named = {f"answers[{i}]": answer for i, answer in enumerate(answers)}
    record |= named
    return read_answers(record, list(named))

@dataclass
class Item:
    """Hold what a step draws: a conversation, or answers to one prompt, and what a loss must know of it."""

    examples: list[Example]
    facts: dict[str, torch.Tensor] = field(default_factory=dict)  # a number for each answer or trained token

    @property
    def lengths(self) -> list[int]:
        return [sum(example.trained[1:]) for example in self.examples]

def make_example(tokenizer, talk: list[dict], ranked: bool) -> Example:
    """Turn a conversation into tokens; of a ranking's only the last turn is trained."""
    ids, trained = render(tokenizer, talk)
    context = len(render(tokenizer, talk[:-1], reply=True)[0]) if ranked else 0
    return Example(ids, [False] * context + trained[context:])

def load_items(paths, tokenizer, T: int, ranked: bool) -> tuple[list[Item], Counter]:
    """Read conversations, or rankings with the best answer first; count what is kept and left out.

    A conversation that ends with the user loses that turn; an empty answer of a ranking is an answer, too.
    """
    items, counts = [], Counter()
    read = read_ranking if ranked else read_conversation
    for talks in itertools.chain(*(read_lines(path, read) for path in paths)):
        counts["read"] += 1
        counts["ended with the user"] += talks[0][-1]["role"] != "assistant"
        while talks[0] and talks[0][-1]["role"] != "assistant":
            talks[0].pop()
        if not any(m["role"] == "assistant" and m["content"].strip() for talk in talks for m in talk):
            counts["left out: no answer"] += 1
            continue
        try:
            examples = [make_example(tokenizer, talk, ranked) for talk in talks]
        except UserError as error:
            check("template" in str(error), str(error))
            counts["left out: not for this folder's chat template"] += 1
            continue
        answers = [[*talk[:-1], talk[-1]["content"].strip()] for talk in talks]
        if any(one == other for one, other in itertools.combinations(answers, 2)):
            counts["left out: equal answers"] += 1
        elif max(len(e.ids) for e in examples) > T:
            counts["left out: longer than the context"] += 1
        else:
            counts["with an empty answer"] += ranked and not all(answer[-1] for answer in answers)
            counts["kept"] += 1
            items.append(Item(examples))
    return items, +counts

RULES = {"task": str, "before": str, "after": str, "shown": str, "answer": str, "name": str, "params": list,
         "known": list}  # see `grade`

def read_task(record: dict) -> dict:
    """Read what to ask ("prompt": messages) and, in the default data, how to check the answer ("check")."""
    prompt = read_prompt(record)
    while prompt and prompt[-1]["role"] == "assistant":
        prompt.pop()
    check(prompt, "Nothing is asked in it")
    rules = record.get("check")
    if rules is not None:
        known = isinstance(rules, dict) and all(type(rules.get(name)) is kind for name, kind in RULES.items())
        known = known and all(isinstance(name, str) for name in rules["params"] + rules["known"])
        check(known, "Its 'check' is not of the kind that `python align.py data` writes")
    task = read_text(record, "task") or (rules["task"] if rules else None)
    return {"prompt": prompt, "task": task, "check": rules, "held_out": record.get("held_out")}

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

    settings: ClassVar[set] = {"dropout"}  # fields of Config that --set reaches (masks differ with the ranks)
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
        check(self.batch_size <= 10**6, "--batch-size is at most a million.")
        check(self.lora_alpha > 0, "--set lora_alpha=0 would keep the additions from doing anything.")
        self.refuse_without("lora_alpha", "--lora-rank", self.lora_rank)

    def refuse_without(self, name: str, needed: str, there) -> None:
        """Refuse a --set NAME that would change nothing, because what it belongs to is not there."""
        given = any(item.startswith(f"{name}=") for item in self.set)
        check(there or not given, f"--set {name} changes nothing without {needed}.")

@options()
class SFTStage(Stage):
    """Train on the assistant's words of conversations (SFT)."""

    command: ClassVar[str] = "sft"
    epochs: Annotated[float, opt("Run", "How often the data is seen.", above=0)] = 2.0
    max_steps: Annotated[int | None, opt("Run", "Optimizer steps, instead of --epochs.", low=1)] = None

@options(model="out/sft", data=("data/pairs.jsonl",), out="out/reward", lr=3e-4)
class RewardStage(SFTStage):
    """Train a reward model: scores for conversations, from pairs (chosen, rejected) or rankings (answers)."""

    command: ClassVar[str] = "reward"

@options(out="out/dpo")
class DPOStage(RewardStage):
    """Train on preferences without a reward model: DPO, IPO, SimPO and their kin."""

    command: ClassVar[str] = "dpo"
    loss: Annotated[str, opt("Loss", f"One of {', '.join(VARIANTS)}.", one_of=tuple(VARIANTS))] = "dpo"
    beta: Annotated[float | None, opt("Loss", "Price of the distance: 0.1 (simpo: 2).", above=0)] = None
    label_smoothing: Annotated[float, opt("Loss", "Share of wrong labels (dpo and norm).", low=0)] = 0.0
    nll_weight: Annotated[float, opt("Loss", "Weight of -log p(chosen) a token.", low=0)] = 1.0
    gamma: float = 1.0  # the margin that simpo asks for

    def __post_init__(self):
        super().__post_init__()
        used = VARIANTS[self.loss].options
        self.refuse_without("gamma", "--loss simpo", "gamma" in used)
        check(self.label_smoothing < 0.5 if "label_smoothing" in used else self.label_smoothing == 0,
              "--label-smoothing has to be below 0.5, and goes with --loss dpo and norm only.")

@options(model="out/sft", max_steps=120, lr=3e-4, warmup_steps=5, schedule="wsd", eval_interval=20,
         save_interval=40)
class PlayStage(Stage):
    """Hold what a stage that learns from its own answers is told."""

    settings: ClassVar[set] = set()  # with dropout the ratio of a policy to itself would not be 1
    reward: Annotated[list[str], opt("Answers", "checks, one of them, or a reward model's folder; several "
                                     "(NAME:WEIGHT) are added up.")] = ("checks",)
    unended: Annotated[float, opt("Answers", "Taken off where an answer did not end.", low=0)] = 1.0
    samples: Annotated[int, opt("Answers", "Answers to each prompt: the group.", low=1)] = 8
    temperature: Annotated[float, opt("Answers", "Of the answers that it learns from.", low=0.01)] = 1.0
    max_new_tokens: Annotated[int, opt("Answers", "Longest answer.", low=1)] = 128
    clip: Annotated[float, opt("Loss", "How far from 1 a token's probability ratio may move.", above=0)] = 0.2
    clip_high: Annotated[float | None, opt("Loss", "The bound above (DAPO: 0.28).", above=0)] = None
    kl_coef: Annotated[float, opt("Loss", "Price of the KL to the reference; 0: none.", low=0)] = 0.02
    inner_epochs: int = 1  # how often a step's answers are learned from
    minibatches: int = 2  # updates of a pass

    def __post_init__(self):
        super().__post_init__()
        check(self.clip < 1, "--clip has to be below 1: it bounds a ratio from both sides.")
        least = min(self.inner_epochs, self.minibatches)
        check(least >= 1, "--set inner_epochs and minibatches have to be at least 1.")
        answers = self.batch_size * self.samples
        check(1 < answers <= 10**6, "--batch-size times --samples is between 2 and a million.")
        for name, _ in map(parse_reward, self.reward):
            check(name in ("checks", *CHECKS) or Path(name).resolve() != Path(self.out).resolve(),
                  f"--reward {name} is what this run writes: choose another --out.")

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
    kl_target: Annotated[float, opt("Loss", "An answer's KL that --kl-coef adapts to.", low=0)] = 0.0
    gamma: float = 1.0  # discount of a token's reward by the next token
    lam: float = 0.95  # lambda of the advantages (GAE)
    value_clip: float = 0.2  # how far an update may move a value
    entropy_coef: float = 0.0  # weight of the entropy in the objective

    def __post_init__(self):
        super().__post_init__()
        check(max(self.gamma, self.lam) <= 1, "--set gamma and lam lie between 0 and 1.")
        check(self.kl_coef or not self.kl_target, "--kl-target needs a --kl-coef above 0: it is multiplied.")

# ---- What all stages share ---------------------------------------------------------------------------------

class Learner:
    """Train a model by a loss on items. A stage is a subclass and its options; it has to say

    loss(items)     {"loss" and other metrics: for each a tensor of any shape, to be added up over the step}

    and may change load, prompt_of, prepare, weight, step, open_model and judge.
    """

    head = "lm"
    ranked = False  # does an item hold several answers, the best first?
    judged = 500  # items to judge by, at most
    by_token = False  # is the mean loss over trained tokens, or over items?

    def __init__(self, o: Stage):
        self.o = o
        self.ranks = setup_distributed(o.device)
        self.saved = open_run(o)
        self.state = {}  # what a checkpoint holds of the stage
        self.state_tensors = {}  # and by name, those that are tensors
        self.folder = find_checkpoint(o.resume if o.resume and not o.lora_rank else o.model)
        self.tokenizer = load_tokenizer(self.folder)
        self.tensors = load_state(o.resume)[0] if o.resume else {}
        self.model = self.open_model()
        for name, p in self.own_weights().items() if o.resume else ():
            saved = self.tensors.get(name, torch.empty(0))
            check(saved.shape == p.shape, f"{o.resume} lacks {name} as it was: it cannot be resumed.")
            p.copy_(saved)
        self.items, self.val = self.load_splits()
        self.optimizer = build_optimizer(self.model, o.optimizer, o.lr, o.weight_decay)
        self.optimizer.load_state_dict(self.tensors)
        self.prepare()
        o.max_steps = o.max_steps or max(1, math.ceil(o.epochs * len(self.items) / o.batch_size))
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        say(f"{o.max_steps} steps of {o.batch_size}, {len(self.val)} to judge by; {trained / 1e6:.2f}M "
            f"parameters trained, {o.optimizer} in {o.dtype} on {self.ranks.device.type}")

    def load(self, paths: list[str]) -> tuple[list, Counter]:
        """Load what a step draws from, and count what is left out."""
        return load_items(paths, self.tokenizer, self.model.config.seq_len, self.ranked)

    def prompt_of(self, item) -> list:
        first = item.examples[0]
        return first.ids[: first.trained.index(True)]

    def prepare(self) -> None:
        """Find out what has to be known before the first step."""

    def weight(self, item: Item) -> int:
        """Weigh an item in the mean loss."""
        return sum(item.lengths) if self.by_token else 1

    def step(self, run: Run, step: int, lr: float) -> None:
        o = self.o
        items = draw(self.items, o.batch_size, step, o.seed)
        torch.manual_seed(seed_of(o.seed, step, self.ranks.rank))  # of dropout, which differs with the ranks
        self.update(run, lr, items, tokens=sum(tokens_in(item.examples) for item in items))

    def open_model(self) -> Transformer:
        """Make the model that is trained of the base, or of the run's own last weights."""
        o = self.o
        base = load_model(self.folder, self.ranks.device)
        check(self.head == "score" or base.config.head == "lm",
              f"{self.folder} is a reward model: it gives scores, not answers.")
        model = rebuild(base, head=self.head, **o.fields_set).float()
        model.compute_dtype = pick_dtype(o.dtype, self.ranks.device)
        o.dtype = {dtype: name for name, dtype in DTYPES.items()}[model.compute_dtype]
        if o.lora_rank:
            self.keep(model=fingerprint(base))
            add_lora(model, o.lora_rank, o.lora_alpha, o.seed)
        return model

    def load_splits(self) -> tuple[list, list]:
        """Load what to train on, and what to judge by: --val, val.jsonl beside --data, or a part of it."""
        o = self.o
        beside = Path(o.data[0]).parent / "val.jsonl"
        others = beside.exists() and beside.resolve() not in [Path(path).resolve() for path in o.data]
        paths = [o.val] if o.val else [str(beside)] if others else []
        splits = []
        for some in filter(None, (o.data, paths)):
            items, counts = self.load(some)
            found = f"{', '.join(some)}: {describe(counts)}"
            check(items, f"{found}: there is nothing to {'judge by' if splits else 'learn from'}.")
            say(found, markup=False)
            splits.append(items)
            self.state.setdefault("counts", counts)
        self.keep(data=[seed_of(Path(path).read_bytes()) for path in (*o.data, *paths)])
        items, val = splits if paths else hold_out(splits[0], self.prompt_of)
        return items, val[: self.judged]

    def keep(self, **fingerprints) -> None:
        """Remember what a run depends on, and refuse to go on where it has changed."""
        for name, value in fingerprints.items():
            check(not self.saved or self.saved.get(name) == value,
                  f"--{name} is not what {self.o.resume} began with: restore it to resume.")
        self.state |= fingerprints

    def own_weights(self) -> dict:
        """Find what is trained and not among the merged weights: LoRA's matrices and the critic."""
        named = [(name, p.detach()) for name, p in self.model.named_parameters() if p.requires_grad]
        return {f"weights/{name}": p for name, p in named if self.o.lora_rank or name.startswith("critic.")}

    def save(self, folder: Path, state: dict) -> None:
        """Write a checkpoint: merged weights, and in state/ what is trained beside them."""
        own = {name: p.cpu() for name, p in self.own_weights().items()}
        tensors = self.optimizer.state_dict() | self.state_tensors | own
        if self.ranks.rank == 0:
            save_checkpoint(folder, self.model, self.folder / "tokenizer.json",
                            state=(tensors, state | self.state), weights=merged(self.model))
        barrier()

    def judge(self) -> dict:
        return self.measure(self.val)

    @torch.no_grad()
    def evaluate(self, last: bool) -> dict:
        return {f"val_{name}": value for name, value in self.judge().items()}

    def micro_batches(self, items: list[Item]) -> Iterator[tuple[list[int], list[Item]]]:
        """Share items out over the ranks, and yield this one's, with their numbers, some thousand tokens at a
        time."""
        mine = range(self.ranks.rank, len(items), self.ranks.world)
        limit = self.o.micro_tokens or (8192 if self.ranks.device.type == "cpu" else 32768)
        sizes = [tokens_in(items[i].examples) for i in mine]
        for row in pack(sizes, max([limit, *sizes])):
            numbers = [mine[k] for k in row]
            yield numbers, [items[i] for i in numbers]

    def measure(self, items: list[Item], scale: float = 0.0) -> dict[str, float]:
        """Average the loss and each metric over items, over all ranks.

        scale: above zero, this rank's part of the gradient is computed, multiplied by it.
        """
        self.model.train(scale > 0)
        weight = sum(map(self.weight, items))
        sums = Counter()
        for _, some in self.micro_batches(items):
            metrics = self.loss(some)
            if scale:
                (metrics["loss"].sum() * (scale / weight)).backward()
            sums.update({name: float(values.detach().sum()) for name, values in metrics.items()})
        total = Counter()
        for part in gather(sums):  # a rank without items has no names
            total.update(part)
        return {name: value / weight for name, value in total.items()}

    @torch.no_grad()
    def score(self, compute: Callable, items: list[Item]) -> list:
        """Compute something for each item, on all ranks; compute: items -> one for each."""
        self.model.eval()
        found = {}
        for numbers, some in self.micro_batches(items):
            found |= zip(numbers, compute(some), strict=True)
        return gather_in_order(found)

    def update(self, run: Run, lr: float, items: list[Item], **more) -> None:
        """Take one step of the optimizer down the gradient of the items' mean loss."""
        metrics = self.measure(items, run.scale)  # forward and backward
        for p in self.model.parameters():
            if p.requires_grad and self.ranks.world > 1:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                sum_over_ranks(p.grad)
        grad_norm = clip_gradients(self.model.parameters(), self.o.grad_clip, run.scale)
        run.update(self.optimizer, lr, **metrics, grad_norm=grad_norm, **more)

def draw(things: list, count: int, step: int, seed: int) -> list:
    """Draw what a step takes: each thing once an epoch, in an order that seed and epoch alone decide.

    >>> sorted(draw("abcdef", 3, 0, seed=1) + draw("abcdef", 3, 1, seed=1))
    ['a', 'b', 'c', 'd', 'e', 'f']
    """
    n = len(things)
    numbers = range(step * count, (step + 1) * count)
    epochs = {i // n for i in numbers}
    order = {epoch: np.random.default_rng([seed, epoch]).permutation(n) for epoch in epochs}
    return [things[order[i // n][i % n]] for i in numbers]

def gather(found: dict) -> list[dict]:
    """Collect a dict of Python objects from each rank, in the order of the ranks."""
    parts = [found] * rank_and_world()[1]
    if len(parts) > 1:
        torch.distributed.all_gather_object(parts, found)
    return parts

def gather_in_order(found: dict) -> list:
    """Collect {number: result} from the ranks -> all results, by their numbers, on all ranks."""
    everything = {number: result for part in gather(found) for number, result in part.items()}
    return [everything[i] for i in sorted(everything)]

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
    if not rest:
        say("All items ask the same, so the same ones are trained on and judge it.")
    return rest or val, val

def batch_of(model, items: list[Item]) -> Batch:
    return collate([item.examples for item in items], model.config.seq_len, next(model.parameters()).device)

def facts_of(items: list[Item], name: str, device="cpu"):
    """Join what is known of each item's answers or tokens: (n,) or (N,)."""
    return torch.cat([item.facts[name] for item in items]).to(device)

def print_mask(o: Stage) -> None:
    """Print the first examples, the trained tokens in colour."""
    tokenizer = load_tokenizer(find_checkpoint(o.model))
    items, _ = load_items(o.data, tokenizer, load_config(o.model).seq_len, METHODS[o.command].ranked)
    for example in (example for item in items[: o.show_mask] for example in item.examples):
        say("\n----", style="dim")
        for trained, group in itertools.groupby(zip(*example, strict=True), key=lambda pair: pair[1]):
            part = tokenizer.decode([token for token, _ in group])
            say(part, markup=False, end="", style="bold green" if trained else "dim")

# ---- The stages that learn from given answers: SFT, reward model, DPO --------------------------------------

class SFT(Learner):
    """Train by -log p of the assistant's tokens, the mean over those of the step.

    Healthy: the loss falls below pretraining's in a few hundred steps. val_loss rising alone: fewer epochs.
    """

    by_token = True

    def loss(self, items):
        return {"loss": -logps(self.model, batch_of(self.model, items))}

class RewardModel(Learner):
    """Train by Bradley-Terry on the scores of a ranking's answers. accuracy: of its best against its worst.

    Healthy: the loss begins at ln 2 = 0.693, accuracy rises well above 0.5. val_loss rising alone: too sure.
    """

    head = "score"
    ranked = True

    def loss(self, items):
        found = scores(self.model, batch_of(self.model, items))
        rankings = found.split([len(item.examples) for item in items])
        losses = torch.stack([ranking_loss(ranking) for ranking in rankings])
        margin = torch.stack([ranking[0] - ranking[-1] for ranking in rankings])
        return {"loss": losses, "accuracy": (margin > 0).float(), "margin": margin}

class DPO(Learner):
    """Train by one of VARIANTS on a ranking's best and worst answer (`preference`), plus nll_weight times
    -log p of the best a token (`nll`; 2404.19733, eq. 1). The reference's log p is saved with the run.
    `chosen` and `rejected` are the log-ratios, accuracy and margin those of beta times their difference.

    Healthy: accuracy and margin rise, and the rejected falls. The chosen falling as fast soon forgets to end:
    raise --beta or --nll-weight.
    """

    ranked = True

    def load(self, paths):
        items, counts = super().load(paths)
        for item in items:
            counts["answers left out between best and worst"] += len(item.examples) - 2
            item.examples = [item.examples[0], item.examples[-1]]
        return items, +counts

    def prepare(self):
        self.variant = VARIANTS[self.o.loss]
        self.beta = self.o.beta or self.variant.beta
        self.options = {name: getattr(self.o, name) for name in self.variant.options}
        if not self.variant.reference:
            return
        for name, items in (("reference/items", self.items), ("reference/val", self.val)):
            if self.o.resume:
                found = self.tensors.get(name)
                whole = found is not None and found.shape == (len(items), 2)
                check(whole, f"{self.o.resume} lacks the reference's log p: start anew.")
            else:
                found = torch.stack(self.score(lambda some: self.read(some)[0].cpu(), items))
            self.state_tensors[name] = found
            for item, logp in zip(items, found, strict=True):
                item.facts["reference"] = logp

    def read(self, items):
        """Compute log p of chosen and rejected, and how many tokens they have: (n, 2) each."""
        batch = batch_of(self.model, items)
        return logps(self.model, batch).view(-1, 2), batch.lengths.view(-1, 2)

    def loss(self, items):
        logp, lengths = self.read(items)
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
        """Run the checks that the prompt carries; none where it carries none."""
        rules = self.task["check"]
        return grade(rules, self.text, self.ended) if rules else {}

    @property
    def passes(self) -> bool | None:
        """Tell whether it passes all of its checks; None where there are none."""
        return all(self.grades.values()) if self.grades else None

def sampler(temperature: float, n_vocab: int, seed: int, device) -> Callable:
    """Make a pick for `generate` that draws from softmax(logits / temperature); below 0.01 it is greedy."""
    generator = torch.Generator(device).manual_seed(seed)

    def pick(logits):  # (B, V) -> (B,)
        logits = logits[:, :n_vocab]
        if temperature < 0.01:
            return logits.argmax(-1)
        total = (logits / temperature).softmax(-1).cumsum(-1)  # one random number a row; multinomial draws V
        u = torch.rand((len(logits), 1), generator=generator, device=device) * total[:, -1:]
        return torch.searchsorted(total, u, right=True)[:, 0].clamp_(max=n_vocab - 1)

    return pick

def stop_ids(tokenizer, config) -> set[int]:
    """Collect the ids that end an answer: of the turn, of the text, and what the folder names besides."""
    return {tokenizer.im_end_id, tokenizer.eot_id, *config.eos_ids} - {None}

def write_answers(model, tokenizer, tasks, samples=1, temperature=1.0, seed=0, max_new_tokens=None):
    """Answer each prompt `samples` times -> a list of Answers for each; an answer ends with the turn, with
    the text, after max_new_tokens, or where the context is full."""
    if not tasks:
        return []
    T = model.config.seq_len
    prompts = [render(tokenizer, task["prompt"], reply=True)[0] for task in tasks]
    limits = [min(T - len(prompt), max_new_tokens or T) for prompt in prompts]
    stop = stop_ids(tokenizer, model.config)
    device = next(model.parameters()).device
    pick = sampler(temperature, tokenizer.n_vocab, seed, device)
    groups = [[] for _ in tasks]
    for i, ids in enumerate(generate(model, prompts, limits, pick, stop, samples)):
        n = i // samples
        ended = ids[-1] in stop
        text = tokenizer.decode(ids[:-1] if ended else ids)
        groups[n].append(Answer(tasks[n], prompts[n], ids, text, ended))
    return groups

def parse_reward(spec: str) -> tuple[str, float]:
    """Read NAME or NAME:WEIGHT.

    >>> parse_reward("out/reward:0.5")
    ('out/reward', 0.5)
    """
    found = re.fullmatch(r"(.+?)(?::(-?(?:\d+\.?\d*|\.\d+)(?:e-?\d+)?))?", spec)
    name, weight = found.groups("1") if found else ("", "1")
    check(name and math.isfinite(float(weight)), f"--reward {spec!r}: write NAME or NAME:WEIGHT.")
    return name, float(weight)

class Reward:
    """Give an answer the weighted sum of

    checks         half the share of the checks that it passes, and half when it passes all: 0 to 1
    parses, ...    one of CHECKS, 0 or 1
    a folder       a reward model's score of the conversation, as text that it reads with its own tokenizer

    less `unended` where it did not end by itself. specs: each NAME or NAME:WEIGHT.
    """

    def __init__(self, specs: list[str], unended: float, device):
        self.unended = unended
        self.parts = []  # name, weight, and a reward model with its tokenizer, or None twice
        for spec in specs:
            name, weight = parse_reward(spec)
            model = tokenizer = None
            if name != "checks" and name not in CHECKS:
                model = load_model(name, device)
                tokenizer = load_tokenizer(name)
                check(model.config.head == "score",
                      f"{name} is no reward model: `python align.py reward` trains one.")
                say(f"{name} reads the last {model.config.seq_len} tokens of a conversation.", markup=False)
            self.parts.append((name, weight, model, tokenizer))
        self.fingerprint = [fingerprint(model) for _, _, model, _ in self.parts if model]

    def __call__(self, answers: list[Answer]) -> list[float]:
        total = np.array([0.0 if a.ended else -self.unended for a in answers], float)
        for name, weight, model, tokenizer in self.parts:
            found = self.judge(model, tokenizer, answers) if model else self.count(name, answers)
            total += weight * np.array(found, float)
        check(np.isfinite(total).all(), "A reward is not a number: look at the weights of the reward model.")
        return total.tolist()

    def count(self, name: str, answers: list[Answer]) -> list[float]:
        """Count the checks that answers pass, or look at one of them."""
        check(all(a.task["check"] for a in answers),
              f"--reward {name} needs prompts that carry checks: `python align.py data` makes them.")
        if name in CHECKS:
            return [a.grades[name] for a in answers]
        return [(sum(a.grades.values()) / len(CHECKS) + a.passes) / 2 for a in answers]

    @torch.no_grad()
    def judge(self, model, tokenizer, answers: list[Answer]) -> list[float]:
        """Score conversations; of one that is longer than the context the end is read, with the answer."""
        T = model.config.seq_len
        found = []
        for i in range(0, len(answers), 64):
            items = []
            for a in answers[i : i + 64]:
                said = {"role": "assistant", "content": a.text}
                ids, trained = render(tokenizer, [*a.task["prompt"], said])
                items.append(Item([Example(ids[-T:], trained[-T:])]))
            found += scores(model, batch_of(model, items)).tolist()
        return found

# ---- The stages that learn from their own answers: PPO and GRPO --------------------------------------------

class Play(Learner):
    """Write answers, have them rewarded, and learn from what each token was worth.

    An item is a group, the answers to one prompt. Its facts: rewards, one for each answer; for each token
    logp, its log p under the policy that wrote it, reference, the same under the reference, and advantages,
    which `credit` finds.

    Logged: of a step's answers `features`, reward and its deviation, and flat, the share of groups whose
    rewards are all equal; of those that it learns from kl to the reference (nats a token), kl_answer
    and entropy (mean -log p); rollout_share, the time that answers and rewards took.

    Healthy: reward and passes rise together; kl and entropy change slowly; clip_fraction is some per cent.
    Reward up with passes or distinct down is hacking: raise --kl-coef.
    """

    judged = 200
    flat_teaches = True  # is there something to learn from a group whose rewards are all equal?

    def load(self, paths):
        counts = Counter()
        prompts = []
        room = self.model.config.seq_len - min(16, self.o.max_new_tokens)
        for task in itertools.chain(*(load_prompts(path) for path in paths)):
            fits = len(render(self.tokenizer, task["prompt"], reply=True)[0]) <= room
            kept = "left out: held out" if task["held_out"] else "prompts"
            counts[kept if fits else "left out: no room for an answer"] += 1
            if fits and not task["held_out"]:
                prompts.append(task)
        return prompts, counts

    def prompt_of(self, task):
        return task["prompt"]

    def prepare(self):
        o, device = self.o, self.ranks.device
        self.reference = load_model(o.model, device)
        self.reference.compute_dtype = self.model.compute_dtype
        self.actor = cast(Transformer(self.model.config), device, self.model.compute_dtype)
        self.reward = Reward(o.reward, o.unended, device)
        self.keep(model=fingerprint(self.reference), reward=self.reward.fingerprint)

    def answer(self, tasks: list[dict], samples: int, temperature: float, *seed) -> list[list[Answer]]:
        """Answer each prompt `samples` times, and reward the answers; the ranks share the prompts."""
        self.actor.load_state_dict(merged(self.model))
        mine = range(self.ranks.rank, len(tasks), self.ranks.world)
        own_seed = seed_of(self.o.seed, *seed, self.ranks.rank)
        groups = write_answers(self.actor, self.tokenizer, [tasks[i] for i in mine], samples, temperature,
                               own_seed, self.o.max_new_tokens)
        answers = list(itertools.chain(*groups))
        for answer, reward in zip(answers, self.reward(answers), strict=True):
            answer.reward = reward
        return gather_in_order(dict(zip(mine, groups, strict=True)))

    def judge(self):
        return summarize(self.answer(self.val, 1, JUDGED_AT, "val"))

    def observe(self, groups: list[list[Answer]]) -> list[Item]:
        """Make items of the groups that teach something, before the policy learns from them."""
        items = []
        for group in (group for group in groups if self.flat_teaches or not is_flat(group)):
            examples = [as_example(a.prompt, a.ids) for a in group]
            items.append(Item(examples, {"rewards": torch.tensor([a.reward for a in group])}))
        for item, facts in zip(items, self.score(self.read_both, items), strict=True):
            item.facts |= facts
        return items

    def read_both(self, items: list[Item]) -> list[dict]:
        """Read answers with the policy and the reference -> the facts of each item's tokens."""
        batch = batch_of(self.model, items)
        found = self.read(batch) | {"reference": self.read_logp(self.reference, batch)[0]}
        sizes = [sum(item.lengths) for item in items]
        parts = zip(*(values.cpu().split(sizes) for values in found.values()), strict=True)
        return [dict(zip(found, part, strict=True)) for part in parts]

    def read_logp(self, model, batch: Batch):
        """Compute log p of the answers' tokens, at the temperature that they were drawn with, and the hidden
        states that it came from: (N,), (N, C)."""
        hidden = batch.read(model, at=batch.at, output="hidden")
        cooled = hidden / self.o.temperature
        return -token_losses(cooled, model.lm_head, batch.targets, model.config.vocab_size), hidden

    def read(self, batch: Batch) -> dict:
        """Compute what the loss needs to know of tokens under the policy: (N,) each."""
        return {"logp": self.read_logp(self.model, batch)[0]}

    def loss(self, items):
        """Compute the clipped loss of tokens; `total` adds what is GRPO's or PPO's own."""
        o = self.o
        batch = batch_of(self.model, items)
        now = self.read(batch)
        then = {name: facts_of(items, name, batch.at.device) for name in items[0].facts}
        log_ratio = now["logp"] - then["logp"]
        losses = clipped_loss(log_ratio, then["advantages"], o.clip, o.clip_high or o.clip)
        held_back = losses > -log_ratio.exp() * then["advantages"]
        metrics = {"policy_loss": losses, "clip_fraction": held_back.float()}
        return self.total(metrics, now, then, batch)

    def step(self, run, step, lr):
        o = self.o
        began = time.perf_counter()
        # 1. Answers and their rewards
        prompts = draw(self.items, o.batch_size, step, o.seed)
        groups = self.answer(prompts, o.samples, o.temperature, "play", step)
        played = time.perf_counter() - began
        summary = summarize(groups)
        # 2. Credit to each of their tokens
        items = self.observe(groups)
        run.note(**summary, flat=sum(map(is_flat, groups)) / len(groups))
        if items:
            run.note(**distance(items), **self.credit(items))
        # 3. Updates
        for turn in range(o.inner_epochs if items else 0):
            order = np.random.default_rng([o.seed, step, turn]).permutation(len(items))
            for part in np.array_split(order, min(o.minibatches, len(items))):
                self.update(run, lr, [items[i] for i in sorted(part)])
        tokens = round(summary["length"] * o.batch_size * o.samples)
        run.note(tokens=tokens, rollout_share=played / (time.perf_counter() - began))

class GRPO(Play):
    """Give each token of an answer the advantage of the answer in its group: no critic.

    Loss: `clipped_loss` and kl_coef times `kl_estimate` (kl_loss), over tokens or answers as --normalize
    says. By `sequence` it begins at zero, as advantages do: watch the reward, not the loss. Groups whose
    rewards are all equal are left out, with their KL; the mean is over the others.
    """

    flat_teaches = False

    def weight(self, item):
        return sum(item.lengths) if self.o.normalize == "token" else len(item.examples)

    def credit(self, items):
        for item in items:
            advantages = group_advantages(item.facts["rewards"], self.o.scale == "std")
            item.facts["advantages"] = advantages.repeat_interleave(torch.tensor(item.lengths))
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

    Details decide whether it works (Huang, Liu & von Werra 2023, "The N Implementation Details of RLHF with
    PPO"): log p is taken at the answers' temperature; the critic begins at zero, so that the first advantages
    are the rewards that follow, less by lam a token. Unlike theirs, advantages are whitened over the step,
    not over a minibatch, and rewards are not.

    Healthy besides: explained_variance of the returns by the critic rises from 0. Below: lower --lr.
    """

    by_token = True

    def open_model(self):
        model = super().open_model()
        model.critic = nn.Linear(model.config.n_embd, 1, device=self.ranks.device)
        nn.init.zeros_(model.critic.weight)
        nn.init.zeros_(model.critic.bias)
        return model

    def prepare(self):
        super().prepare()
        self.state["kl_coef"] = self.saved.get("kl_coef", self.o.kl_coef)

    def read(self, batch):
        logp, hidden = self.read_logp(self.model, batch)
        found = {"logp": logp, "values": self.model.critic(hidden.float())[:, 0]}
        if self.o.entropy_coef:
            p = self.model.lm_head(hidden / self.o.temperature).float().softmax(-1)
            found["entropy"] = -torch.xlogy(p, p).sum(-1)
        return found

    def credit(self, items):
        o, coef = self.o, self.state["kl_coef"]
        for item in items:
            facts = item.facts
            kls = (facts["logp"] - facts["reference"]).split(item.lengths)
            values_of = facts["values"].split(item.lengths)
            advantages = []
            for reward, kl, values in zip(facts["rewards"], kls, values_of, strict=True):
                rewards = -coef * kl
                rewards[-1] += reward
                advantages += gae(rewards.tolist(), values.tolist(), o.gamma, o.lam)
            facts["advantages"] = torch.tensor(advantages)
            facts["returns"] = facts["advantages"] + facts["values"]
        advantages = facts_of(items, "advantages")
        mean, std = advantages.mean(), advantages.std()
        for item in items:
            item.facts["advantages"] = (item.facts["advantages"] - mean) / (std + 1e-8)
        if o.kl_target:
            self.state["kl_coef"] = next_kl_coef(coef, distance(items)["kl_answer"], o.kl_target)
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

def train(o: Stage) -> dict:
    """Run a stage: each does in a step what its class says."""
    learner = METHODS[o.command](o)
    run = Run(o, learner.ranks, learner.save, learner.evaluate, learner.saved)
    for step, lr in run.steps():
        if not run.records:
            run.evaluate(last=False)
        learner.step(run, step, lr)
    return run.result

def is_flat(group: list[Answer]) -> bool:
    """Tell whether all rewards are equal. (A reward model's, of equal answers, differ in the last digits.)"""
    rewards = [a.reward for a in group]
    return max(rewards) - min(rewards) < 1e-4

def distance(items: list[Item]) -> dict:
    """Measure how far the policy is from the reference, on the tokens that it wrote."""
    logp = facts_of(items, "logp")
    kl = logp - facts_of(items, "reference")
    answers = sum(len(item.examples) for item in items)
    return {"kl": float(kl.mean()), "kl_answer": float(kl.sum()) / answers, "entropy": -float(logp.mean())}

def summarize(groups: list[list[Answer]]) -> dict:
    """Average what answers are like."""
    answers = list(itertools.chain(*groups))
    rewards = [a.reward for a in answers]
    means = {name: float(np.mean(values)) for name, values in features(answers).items()}
    return {"reward": float(np.mean(rewards)), **means, "reward_std": float(np.std(rewards))}

# ---- How good are a model's answers? -----------------------------------------------------------------------

def row(values) -> tuple[float, float, float, int]:
    """Average values -> (mean, its 95 % confidence interval, n).

    Of truths it is Wilson's (1927), sensible at 0 and 1 too; of numbers the normal one.

    >>> [round(x, 3) for x in row([False] * 10)]
    [0.0, 0.0, 0.278, 10]
    """
    n, z = len(values), 1.96
    mean = float(np.mean(values))
    if all(isinstance(value, (bool, np.bool_)) for value in values):
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
    check(samples <= 1000, "--samples is at most 1,000.")
    check(samples == 1 or temperature >= 0.01, "Several greedy answers are all one: raise --temperature.")
    tokenizer = load_tokenizer(folder)
    longest = max(len(render(tokenizer, task["prompt"], reply=True)[0]) for task in tasks)
    T = model.config.seq_len
    check(longest < T, f"A prompt of {longest} tokens leaves no room for an answer: the context has {T}.")
    groups = []
    with progress(f"{folder} answers", len(tasks)) as show:
        for i in range(0, len(tasks), 500):
            part = tasks[i : i + 500]
            part_seed = seed_of(seed, i)
            groups += write_answers(model, tokenizer, part, samples, temperature, part_seed, max_new_tokens)
            show(len(groups))
    return groups

@torch.no_grad()
def mean_kl(policy, reference, answers: list[Answer]) -> list[float]:
    """Compute KL(policy || reference) along each answer, in nats a token, over the whole vocabulary."""
    items = [Item([as_example(a.prompt, a.ids)]) for a in answers]
    result = []
    for i in range(0, len(items), 16):
        batch = batch_of(policy, items[i : i + 16])
        p, q = (batch.read(m, at=batch.at).float().log_softmax(-1) for m in (policy, reference))  # (N, V)
        kl = sum_by_example((p.exp() * (p - q)).sum(-1), batch)
        result += (kl / batch.lengths).tolist()
    return result

def features(answers: list[Answer]) -> dict[str, list]:
    """List what answers are like, by name: a number for each; `passes` where the prompt has checks."""
    texts = [a.text for a in answers]
    found = {"passes": [a.passes for a in answers if a.grades]}
    found["length"] = [len(a.ids) for a in answers]
    found["ended"] = [a.ended for a in answers]
    found["distinct"] = [text not in texts[:i] for i, text in enumerate(texts)]
    return {name: values for name, values in found.items() if values}

def rate(answers: list[Answer]) -> dict:
    """Measure answers by their checks, for each task and over the tasks that were trained."""
    rows = {}
    checked = [a for a in answers if a.grades]
    for task in sorted({a.task["task"] for a in checked}):
        some = [a for a in checked if a.task["task"] == task]
        held_out = " (held out)" if some[0].task["held_out"] else ""
        rows[f"passes: {task}{held_out}"] = row([a.passes for a in some])
    trained = [a for a in answers if not a.task["held_out"]] or answers
    rows |= {name: row(values) for name, values in features(trained).items()}
    checked = [a for a in trained if a.grades]
    if checked:
        rows |= {name: row([a.grades[name] for a in checked]) for name in CHECKS}
        rows["likeness"] = row([likeness(a.text, a.task["check"]["answer"]) for a in checked])
    return rows

def assess(folder, tasks, against=None, reward=None, temperature=JUDGED_AT, seed=0, text=None, device=None,
           samples=1) -> dict:
    """Measure everything that `evaluate` prints: {name: (value, low, high, n)}."""
    device = device or pick_device()
    checked = [i for i, task in enumerate(tasks) if task["check"]]
    trained = [i for i in checked if not tasks[i]["held_out"]] or checked
    check(samples == 1 or trained,
          "--samples needs prompts that carry checks, as `python align.py data` makes them.")
    check(reward is None or against or samples > 1,
          "--reward judges between answers: give --against another folder, or --samples.")
    judge = None
    if reward is not None or all(task["check"] for task in tasks):
        judge = Reward(["checks" if reward is None else reward], 0.0, device)
    by = "the checks" if reward in (None, "checks") else "the reward model"
    ids = load_tokenizer(find_checkpoint(folder)).token_bytes
    tokens = Tokens(text, "val") if text else None
    if tokens and load_tokenizer(text).token_bytes != ids:
        say(f"{text} has another tokenizer than {folder}: its bits per byte are left out.")
        tokens = None
    check(not against or load_tokenizer(find_checkpoint(against)).token_bytes == ids,
          "The two folders have different tokenizers: no KL compares them.")
    for name in filter(None, (folder, against)):  # before the work, not after it
        check(load_config(name).head == "lm", f"{name} is a reward model: it gives scores, not answers.")
    groups = answer_all(folder, tasks, temperature, seed, device, samples=samples)
    answers = [group[0] for group in groups]
    rows = rate(answers)
    model = load_model(folder, device)
    if against:
        theirs = [group[0] for group in answer_all(against, tasks, temperature, seed, device)]
        other = load_model(against, device)
        rows["KL to the other, nats a token"] = row(mean_kl(model, other, answers))
        if judge:
            found = zip(judge(answers), judge(theirs), strict=True)
            rows[f"wins by {by}"] = row([(a > b) + 0.5 * (a == b) for a, b in found])
    if samples > 1:
        some = [groups[i] for i in trained]
        for k in (k for k in range(1, samples + 1) if k == samples or k.bit_count() == 1):
            rows[f"pass@{k}"] = row([pass_at_k(samples, sum(a.passes for a in group), k) for group in some])
        if reward is not None:
            best = [group[int(np.argmax(judge(group)))] for group in some]
            rows[f"passes: best of {samples} by {by}"] = row([a.passes for a in best])
    if tokens:
        found = evaluate_text(model, tokens, model.config.seq_len, 16, 50_000)
        rows["bits per byte of the pretraining text"] = (found["val_bpb"], None, None, found["val_tokens"])
    return rows

# ---- The commands ------------------------------------------------------------------------------------------

def run_stage(o: Stage) -> dict | None:
    """Run a training stage, or only show what it would train."""
    return print_mask(o) if o.show_mask else train(o)

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__.split("\n\n")[0])
for kind in (SFTStage, RewardStage, DPOStage, PPOStage, GRPOStage):
    app.command(kind.command, help=kind.__doc__)(command(kind, run_stage))

Folder = Annotated[str, typer.Argument(help="Checkpoint folder that answers.")]
Prompts = Annotated[str, typer.Option(help="JSON lines with prompts, and checks.")]
Limit = Annotated[int, opt("", "Prompts, drawn evenly; 0: all.", low=0)]
Task = Annotated[str | None, typer.Option(help="Prompts of this task only.")]
Temperature = Annotated[float, opt("", "Of the answers: 1 as the model says, 0 greedy.", low=0)]
Longest = Annotated[int, opt("", "Longest answer.", low=1)]
Seed = Annotated[int, opt("", "Of everything that is drawn.", low=0)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")]

def check_new(path: Path, overwrite: bool) -> None:
    """Refuse a file that cannot be written, or that would be lost, before the work is done."""
    fit = len(path.name) < 250 and not os.path.isdir(path)
    check(fit, f"{path} cannot be a file: give --out another name.")
    check(overwrite or not os.path.exists(path), f"{path} exists already: --overwrite replaces it.")

def write_lines(path: Path, records: list[dict]) -> None:
    save_files(path.parent, {path.name: "".join(json.dumps(record) + "\n" for record in records)})

@app.command()
def data(
    source: Annotated[str, typer.Option("--data", help="Data folder to take apart.")] = "data/python",
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("data/instructions"),
    held_out: Annotated[str, typer.Option(help=f"Task only judged: {', '.join(TASKS)}.")] = "continue",
    limit: Annotated[int, opt("", "Most examples of a task in a file.", low=1)] = 4000,
    max_tokens: Annotated[int, opt("", "Longest conversation: the model's context.", low=1)] = 256,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Make instructions from Python functions: train.jsonl from the modules that pretraining trained on, and
    from halves of those that it only validated on val.jsonl, to choose by, and test.jsonl, to report."""
    check(held_out in TASKS, f"--held-out is one of {', '.join(TASKS)}; not {held_out!r}.")
    splits = ("test", "val", "train")
    for split in splits:
        check_new(out / f"{split}.jsonl", overwrite)
    default_data([source], Ranks())
    made, seen = {}, set()
    for split in splits:
        records, left_out = instructions_of(source, split, limit, max_tokens, seed, seen)
        records = [r for r in records if split != "train" or r["task"] != held_out]
        say(f"{split}: {describe(Counter(r['task'] for r in records))}; left out: {describe(left_out)}")
        check(records, f"There is no instruction for {split}.jsonl: --data has to be a folder of Python "
              "modules, several of them in its validation split, with functions that fit --max-tokens.")
        random.Random(seed).shuffle(records)
        made[split] = [r | {"held_out": True} if r["task"] == held_out else r for r in records]
    for split in splits:
        write_lines(out / f"{split}.jsonl", made[split])
    say(f"{out} written. One of them:\n", markup=False)
    show(made["train"][0]["messages"])

def show(messages: list[dict]) -> None:
    for message in messages:
        say(f"[{message['role']}]\n{message['content']}", markup=False)

@app.command()
def pairs(
    folder: Folder = "out/sft",
    prompts: Prompts = "data/instructions/train.jsonl",
    out: Annotated[Path, typer.Option(help="JSON-lines file to write.")] = Path("data/pairs.jsonl"),
    samples: Annotated[int, opt("", "Answers to each prompt.", low=2)] = 3,
    limit: Limit = 8000,
    task: Task = None,
    temperature: Temperature = JUDGED_AT,
    max_new_tokens: Longest = 128,
    seed: Seed = 0,
    device: Device = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Rank a model's own answers by the checks: each good one beside each bad one to the same prompt.

    Prompts whose answers are all good or all bad teach nothing and are counted. An answer that was cut off is
    left out: it would be given an end that nobody wrote."""
    check_new(out, overwrite)
    check(out.resolve() != Path(prompts).resolve(), "--out would replace --prompts: give it another name.")
    tasks = [task for task in load_prompts(prompts, limit, task) if task["check"]]
    check(tasks, f"The prompts of {prompts} carry no checks: rank by hand with `python align.py label`.")
    made, counts, cut = [], Counter(), 0
    groups = answer_all(folder, tasks, temperature, seed, pick_device(device), max_new_tokens, samples)
    for asked, group in zip(tasks, groups, strict=True):
        ended = [a for a in group if a.ended]
        cut += len(group) - len(ended)
        good = dict.fromkeys(a.text for a in ended if a.passes)
        bad = dict.fromkeys(a.text for a in ended if not a.passes)
        what = "with both" if good and bad else "all good" if good else "none good" if bad else "all cut off"
        counts[what] += 1
        for chosen, rejected in itertools.product(good, bad):
            record = {"prompt": asked["prompt"], "task": asked["task"]}
            made.append(record | {"chosen": chosen, "rejected": rejected})
    say(f"{samples} answers of {folder} to each of {len(tasks):,} prompts: {describe(counts)}; "
        f"{cut:,} answers that were cut off are left out", markup=False)
    check(made, f"No prompt had a good answer and a bad one: train {folder} further, or raise --temperature.")
    write_lines(out, made)
    say(f"{out} written: {len(made):,} pairs.", markup=False)

@app.command()
def label(
    folder: Folder = "out/sft",
    prompts: Prompts = "data/instructions/train.jsonl",
    out: Annotated[Path, typer.Option(help="JSON lines to add the pairs to.")] = Path("data/labels.jsonl"),
    limit: Limit = 50,
    temperature: Temperature = 1.0,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Show two answers: type 1 or 2 for the better one, s to skip, q to end. What is chosen is written at
    once; prompts that the file has already are not asked again."""
    check_new(out, overwrite=True)
    done = list(read_lines(out, read_ranking)) if out.exists() else []
    asked = [talks[0][:-1] for talks in done]
    tasks = [task for task in load_prompts(prompts, limit) if task["prompt"] not in asked]
    if not tasks:
        return say(f"{out} has all prompts that --limit {limit} draws: raise it for more.")
    groups = answer_all(folder, tasks, temperature, seed, pick_device(device), samples=2)
    groups = [[a, b] for a, b in groups if a.ended and b.ended and a.text != b.text]
    left = len(tasks) - len(groups)
    say(f"{left} of {len(tasks)} prompts have equal answers or one that was cut off: they are left out.")
    # (not splitlines: JSON may hold a line separator of Unicode's)
    text = out.read_text(encoding="utf-8-sig") if out.exists() else ""
    lines = [line for line in text.split("\n") if line.strip()]
    for i, pair in enumerate(groups, 1):
        say(f"---- {i} of {len(groups)}")
        show([*pair[0].task["prompt"], *({"role": str(k), "content": a.text} for k, a in enumerate(pair, 1))])
        key = read_key()
        if key == "q":
            break
        if key != "s":
            chosen, rejected = pair if key == "1" else pair[::-1]
            record = {"prompt": chosen.task["prompt"], "chosen": chosen.text, "rejected": rejected.text}
            lines.append(json.dumps(record))
            save_files(out.parent, {out.name: "\n".join(lines) + "\n"})
    say(f"{out} holds {len(lines)} pairs.")

def read_key() -> str:
    """Read 1, 2, s or q from a line of standard input; its end is q."""
    while True:
        say("1 / 2 / s / q ?")
        line = sys.stdin.buffer.readline().decode(errors="replace") or "q"
        if line.strip().lower() in ("1", "2", "s", "q"):
            return line.strip().lower()

@app.command()
def evaluate(
    folder: Folder = "out/sft",
    against: Annotated[str | None, typer.Option(help="Folder to compare with: KL, win rate.")] = None,
    reward: Annotated[str | None, typer.Option(help="Reward model, with --against or --samples.")] = None,
    prompts: Prompts = "data/instructions/test.jsonl",
    limit: Limit = 0,
    task: Task = None,
    text: Annotated[str | None, typer.Option("--data", help="Pretraining's text.")] = "data/python",
    temperature: Temperature = JUDGED_AT,
    samples: Annotated[int, opt("", "Answers to each prompt: pass@k, best (--reward).", low=1)] = 1,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object to standard output.")] = False,
) -> None:
    """Measure how good a model's answers are, by rules, with 95 % confidence intervals."""
    tasks = load_prompts(prompts, limit, task)
    check(text in (None, "data/python") or Path(text).is_dir(), f"There is no data folder {text}.")
    text = text if text and Path(text).exists() else None
    rows = assess(folder, tasks, against, reward, temperature, seed, text, pick_device(device), samples)
    if as_json:
        names = ("value", "low", "high", "n")
        return print(json.dumps({what: dict(zip(names, found, strict=True)) for what, found in rows.items()}))
    say(f"{'what':40}{'value':>9}   {'95 % interval':20}n")
    for what, (value, low, high, n) in rows.items():
        interval = "" if low is None else f"{low:.3f} to {high:.3f}"
        say(f"{what:40}{value:9.3f}   {interval:20}{n:,}", markup=False)

if __name__ == "__main__":
    run_app(app)
