"""Pretraining: a data folder in, a checkpoint folder out, on one device or on several under torchrun (DDP).

    python train.py                                    # prepare Python's own sources, train, show a sample
    python train.py --data data/mine --out out/mine    # your data (made by tokenize.py prepare)
    python train.py --resume out/mine                  # go on exactly where it was stopped or killed
    torchrun --nproc-per-node 8 train.py --preset small --tokens-per-step 524288

A step: take the next windows of the seeded order, sum the loss of each token in micro-batches, divide by the
number of tokens in the whole step (on all ranks), clip, update. So micro-batch, accumulation and number of ranks
change the speed and nothing else. What a run needs to go on is a handful of numbers: weights, the optimizer's
state, the step, and how many windows of each source were taken; whatever is random is a function of the seed and
one of these.

Objectives: causal (Radford et al. 2018) and masked (Devlin et al. 2018, 1810.04805) language modelling.
Left out: sharded and tensor-parallel training (parallel.py).
"""

from __future__ import annotations

import time

START = time.perf_counter()  # before torch is imported, which is part of what a run costs

import contextlib
import dataclasses
import json
import math
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch.nn.parallel import DistributedDataParallel as DDP

from model import (
    IGNORE,
    PRESETS,
    Config,
    Tokens,
    Transformer,
    UserError,
    build_optimizer,
    console,
    evaluate,
    find_checkpoint,
    generate,
    load_model,
    load_state,
    load_tokenizer,
    pad_vocab,
    peak_flops,
    pick_dtype,
    read_json,
    run_app,
    save_checkpoint,
    say,
    seed_of,
    setup_distributed,
)  # fmt: skip

# B sequences of a micro-batch, T tokens of a sequence, N tokens of a step over all ranks.


@dataclass
class Options:
    """A run, as its checkpoint remembers it. None: derived (see `derive`), and then stored as what it became."""

    data: tuple[str, ...] = ("data/python",)
    out: str = "out/python"
    objective: str = "clm"
    preset: str = "micro"
    n_layer: int | None = None
    n_head: int | None = None
    n_kv_head: int | None = None
    n_embd: int | None = None
    seq_len: int | None = None
    max_steps: int = 1000
    tokens_per_step: int = 4096
    micro_batch: int | None = None
    batch_ramp: int = 0
    optimizer: str = "muon"
    lr: float = 1e-2
    warmup_steps: int = 30
    schedule: str = "wsd"
    min_lr: float = 0.1
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    dropout: float = 0.0
    mup_base: int | None = None
    doc_mask: bool = False
    dtype: str = "auto"
    device: str = "auto"
    compile: str = "auto"
    recompute: str = "none"
    eval_interval: int = 250
    eval_tokens: int | None = 100_000
    save_interval: int = 250
    target_loss: float | None = None
    patience: int | None = None
    noise_scale: bool = False
    seed: int = 0


# ------------------------------------------------------------------------------------------------------------
# The ideas: schedule, masking, mixture, noise scale
# ------------------------------------------------------------------------------------------------------------


def lr_at(step: int, max_steps: int, warmup_steps: int, schedule: str = "cosine", min_lr: float = 0.1) -> float:
    """The fraction of the peak learning rate at a step, 0-based; it ends at min_lr, a tenth by default.

    Warm-up is linear. Then cosine (Loshchilov & Hutter 2016, 1608.03983), or warm-up-stable-decay (Hu et al. 2024,
    2404.06395): constant, and in the last 40 % a straight line down. "constant" stays.

    >>> [round(lr_at(s, 100, 10), 2) for s in (0, 9, 55, 99)]
    [0.1, 1.0, 0.55, 0.1]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = (step - warmup_steps + 1) / max(1, max_steps - warmup_steps)  # in (0, 1]
    if schedule == "cosine":
        return min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return min_lr + (1 - min_lr) * min(1.0, max(0.0, 1 - done) / 0.4)


def windows_at(step: int, full: int, ramp_steps: int, world: int = 1) -> int:
    """Sequences in a step: while the batch ramps, from an eighth up to all, in whole multiples of the ranks.

    >>> [windows_at(s, 64, 4) for s in range(6)]
    [8, 22, 36, 50, 64, 64]
    """
    if step >= ramp_steps:
        return full
    return max(1, int(full * (0.125 + 0.875 * step / ramp_steps)) // world) * world


def mask_tokens(x, mask_id: int, n_vocab: int, seeds: list):
    """BERT's corruption (1810.04805, section 3.1): ids (B, T) -> inputs, targets (B, T).

    15 % of the tokens are targets. Of these 80 % show the mask, 10 % a random token, 10 % themselves, so that the
    model cannot know from the input which are asked for. One seed a row: the masks do not depend on the batch.
    """
    inputs, targets = x.clone(), torch.full_like(x, IGNORE)
    for row, seed in enumerate(seeds):
        rng = np.random.default_rng(seed_of(*seed))
        u, kind = rng.random(x.shape[1]), rng.random(x.shape[1])
        chosen, to_mask, to_random = (torch.from_numpy(m) for m in (u < 0.15, kind < 0.8, kind >= 0.9))
        targets[row, chosen] = x[row, chosen]
        inputs[row, chosen & to_mask] = mask_id
        noise = torch.from_numpy(rng.integers(n_vocab, size=x.shape[1]))
        inputs[row, chosen & to_random] = noise[chosen & to_random]
    return inputs, targets


class Mixture:
    """Several sources, each in its own seeded order, drawn by weight.

    `taken`, the windows of each source so far, is all that a run has to remember of its data.
    """

    def __init__(self, sources: list[Tokens], weights: list[float], seed: int):
        self.sources, self.seed = sources, seed
        self.share = np.array(weights) / sum(weights)

    def draw(self, step: int, count: int, taken: list[int]) -> tuple[list[tuple[int, int]], list[int]]:
        """The windows of a global batch, the same on all ranks: [(source, position in its order)], new `taken`."""
        rng = np.random.default_rng([self.seed, step])
        picks = rng.choice(len(self.share), count, p=self.share) if len(self.share) > 1 else np.zeros(count, int)
        plan, taken = [], list(taken)
        for source in picks.tolist():
            plan.append((source, taken[source]))
            taken[source] += 1
        return plan, taken

    def read(self, plan: list[tuple[int, int]], T: int):
        """-> inputs, targets (len(plan), T)."""
        rows = [self.sources[s].batch(position, 1, T, self.seed) for s, position in plan]
        return torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])


def noise_scale(norms_small: list[float], norm_big: float) -> float:
    """The critical batch size in units of the small batch: tr(S) / |G|^2 (McCandlish et al. 2018, 1812.06162, A.1).

    norms_small: squared norms of the mean gradients of k batches of one unit; norm_big: of the mean of them all.
    E|G_b|^2 = |G|^2 + tr(S)/b gives two equations, at b = 1 and b = k.

    >>> noise_scale([5.0, 5.0], 3.0)       # |G|^2 = 1, tr(S) = 4
    4.0
    """
    k, small = len(norms_small), sum(norms_small) / len(norms_small)
    g2 = (k * norm_big - small) / (k - 1)
    trace = (small - norm_big) / (1 - 1 / k)
    return trace / g2 if g2 > 0 else math.inf


# ------------------------------------------------------------------------------------------------------------
# Plumbing: options, data, model
# ------------------------------------------------------------------------------------------------------------


def default_data(folder: str) -> None:
    """No data folder yet: let tokenize.py make the embedded one, as a command of its own."""
    say(f"No data in {folder}: preparing the sources of this Python (python tokenize.py prepare), once.")
    command = [sys.executable, str(Path(__file__).with_name("tokenize.py")), "prepare", "--output", folder]
    code = subprocess.run(command).returncode
    if code:
        raise UserError(f"tokenize.py prepare ended with exit code {code}; its words above say why.")


def open_data(specs: tuple[str, ...]) -> tuple[list[Tokens], list[Tokens], list[float]]:
    """FOLDER or FOLDER:WEIGHT, several -> training splits, validation splits, weights."""
    train, val, weights = [], [], []
    for spec in specs:
        folder, colon, weight = spec.rpartition(":")
        if not colon or Path(spec).exists() or "/" in weight or "\\" in weight:  # no weight, or a drive's colon
            folder, weight = spec, "1"
        try:
            weights.append(float(weight))
        except ValueError:
            raise UserError(f"--data {spec}: {weight!r} is not a weight; write FOLDER or FOLDER:WEIGHT.") from None
        if not weights[-1] > 0:
            raise UserError(f"--data {spec}: a weight has to be above zero.")
        if not Path(folder).is_dir():
            raise UserError(f"There is no data folder {folder}: make one with `python tokenize.py prepare`.")
        train.append(Tokens(folder, "train"))
        val.append(Tokens(folder, "val"))
    texts = {(t.folder / "tokenizer.json").read_bytes() for t in train if (t.folder / "tokenizer.json").exists()}
    if len(texts) != 1:
        raise UserError("The data folders have different tokenizers (or none): prepare them with the same --tokenizer.")
    return train, val, weights


def make_config(o: Options, tokens: Tokens) -> Config:
    if o.preset not in PRESETS:
        raise UserError(f"--preset is one of {', '.join(PRESETS)}; not {o.preset!r}.")
    config = PRESETS[o.preset]
    sizes = {k: getattr(o, k) for k in ("n_layer", "n_head", "n_kv_head", "n_embd", "seq_len")}
    sizes = {k: v for k, v in sizes.items() if v is not None}
    if "n_embd" in sizes:  # the other widths follow, in the preset's proportions
        if "n_head" not in sizes:
            sizes["n_head"] = max(1, sizes["n_embd"] // config.head_dim)
        if sizes["n_embd"] % sizes["n_head"]:
            raise UserError(f"A width of {sizes['n_embd']} does not divide into {sizes['n_head']} heads.")
        sizes["head_dim"] = sizes["n_embd"] // sizes["n_head"]
        sizes["ffn_dim"] = pad_vocab(round(sizes["n_embd"] * config.ffn_dim / config.n_embd), 32)
    if "n_head" in sizes:
        group = config.n_head // config.n_kv_head
        sizes.setdefault("n_kv_head", sizes["n_head"] // group if sizes["n_head"] % group == 0 else sizes["n_head"])
    special = load_tokenizer(tokens.folder).special
    return config.replace(
        vocab_size=pad_vocab(tokens.vocab_size), causal=o.objective == "clm", eos_id=tokens.eot_id,
        pad_id=special.get("<|pad|>"), **sizes,
    )  # fmt: skip


def derive(o: Options, config: Config, world: int, device: torch.device) -> None:
    """Check what a user can get wrong, and fill in what follows from the rest."""
    named = {"objective": ("clm", "mlm"), "schedule": ("cosine", "wsd", "constant"),
             "compile": ("auto", "on", "off"), "recompute": ("none", "block", "selective")}  # fmt: skip
    for name, allowed in named.items():
        if getattr(o, name) not in allowed:
            raise UserError(f"--{name} is one of {', '.join(allowed)}; not {getattr(o, name)!r}.")
    for name in ("max_steps", "eval_interval", "save_interval", "tokens_per_step", "lr", "grad_clip"):
        if getattr(o, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} has to be above zero.")
    if not 0 <= o.dropout < 1:
        raise UserError(f"--dropout {o.dropout} is not a share of the activations: 0 up to, not with, 1.")
    windows = o.tokens_per_step // config.seq_len
    if windows == 0 or windows % world:
        near = config.seq_len * world * max(1, round(windows / world))
        raise UserError(
            f"--tokens-per-step {o.tokens_per_step} does not divide into sequences of {config.seq_len} on {world} "
            f"process{'es' * (world > 1)}: {near} does."
        )
    if o.micro_batch is None:  # a CPU is busy with 8k tokens; a GPU takes what its logits and activations allow
        o.micro_batch = max(1, (8192 if device.type == "cpu" else 32768) // config.seq_len)
    if o.compile == "auto":
        # Start-up is some 40 s, and what is won per step some 10 % on CPU, a third on CUDA: it has to be a long run.
        # Judged by operations, not by the clock, so that a resumed run decides the same.
        flops = config.flops_per_token() * o.tokens_per_step * o.max_steps
        o.compile = "on" if flops > {"cpu": 3e14, "cuda": 2e16}.get(device.type, math.inf) else "off"
    o.dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[pick_dtype(o.dtype, device)]


def resumed(folder: str, given: dict) -> Options:
    """The options of a run to go on with, those given now on top where that keeps the run the same run."""
    state = load_state(folder)[1]
    if state["finished"] and given.get("max_steps", 0) <= state["at"]:
        raise UserError(f"{folder} is finished: there is nothing to resume (a larger --max-steps trains it further).")
    free = {"max_steps", "device", "micro_batch", "save_interval", "eval_interval", "eval_tokens", "target_loss",
            "patience", "noise_scale", "recompute"}  # fmt: skip
    options = Options(**{**state["options"], "data": tuple(state["options"]["data"]), "out": folder})
    for name, value in given.items():
        if name in free:
            setattr(options, name, value)
        elif value != getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')} cannot change on --resume: start a run of its own (--out).")
    return options


class Step:
    """One optimizer step: everything that is done between two log lines."""

    def __init__(self, o: Options, model: Transformer, optimizer, mixture: Mixture, ranks):
        self.o, self.model, self.optimizer, self.mixture, self.ranks = o, model, optimizer, mixture, ranks
        self.scale = 2.0**14 if o.dtype == "fp16" else 1.0  # of the loss: fp16 gradients below 6e-8 vanish
        self.good = self.bad = self.skipped = 0
        self.taken = [0] * len(mixture.sources)
        tokenizer = load_tokenizer(mixture.sources[0].folder)
        self.mask_id, self.n_vocab = tokenizer.special.get("<|mask|>"), tokenizer.n_vocab
        self.forward = DDP(model) if ranks.world > 1 else model
        self.pool = ThreadPoolExecutor(1)  # reads the next step's windows while this one computes

    def corrupt(self, x, seeds):
        return mask_tokens(x, self.mask_id, self.n_vocab, seeds)

    def load(self, step: int, taken: list[int]):
        """This rank's micro-batches of a step, [(inputs, targets, documents)], and the windows then taken."""
        o, r, T = self.o, self.ranks, self.model.config.seq_len
        count = windows_at(step, o.tokens_per_step // T, o.batch_ramp, r.world)
        plan, taken = self.mixture.draw(step, count, taken)
        plan = plan[r.rank * count // r.world : (r.rank + 1) * count // r.world]
        batches = []
        for i in range(0, len(plan), o.micro_batch):
            rows = plan[i : i + o.micro_batch]
            x, y = self.mixture.read(rows, T)
            docs = self.mixture.sources[0].documents(x) if o.doc_mask else None
            if o.objective == "mlm":
                x, y = self.corrupt(x, [(o.seed, *row) for row in rows])
            if r.device.type == "cuda":
                x, y, docs = (t.pin_memory() if t is not None else None for t in (x, y, docs))
            batches.append((x, y, docs))
        return batches, taken

    def prefetch(self, step: int, taken: list[int]) -> None:
        self.next = self.pool.submit(self.load, step, taken)

    def backward(self, batches, step: int):
        """Accumulate the gradient of the mean loss over all tokens of all ranks.

        -> (this rank's sum of losses, tokens of all ranks)"""
        o, r = self.o, self.ranks
        tokens = torch.tensor(float(sum((y != IGNORE).sum() for _, y, _ in batches)), device=r.device)
        if r.world > 1:
            torch.distributed.all_reduce(tokens)
        if o.dropout:
            torch.manual_seed(seed_of(o.seed, step, r.rank))
        total = torch.zeros((), device=r.device)
        for i, (x, y, docs) in enumerate(batches):
            x, y = x.to(r.device, non_blocking=True), y.to(r.device, non_blocking=True)
            docs = docs.to(r.device, non_blocking=True) if docs is not None else None
            last = i == len(batches) - 1  # DDP adds up over the ranks once, in the last backward pass
            with contextlib.nullcontext() if last or r.world == 1 else self.forward.no_sync():
                losses, aux = self.forward(x, y, doc_ids=docs)  # (B, T)
                loss = losses.sum() / tokens + aux / len(batches) / r.world
                (loss * (self.scale * r.world)).backward()  # DDP divides by the number of ranks: undo that
            total += losses.detach().sum()
        return total, tokens

    def __call__(self, step: int, lr: float, stop: bool) -> dict:
        """-> {"loss", "grad_norm", "tokens", "stop"}: the mean loss, and whether any rank was asked to stop."""
        batches, taken = self.next.result()
        self.prefetch(step + 1, taken)
        self.optimizer.set_lr(lr)
        total, tokens = self.backward(batches, step)
        params = [p for p in self.model.parameters() if p.grad is not None]
        if self.scale != 1.0:
            torch._foreach_div_([p.grad for p in params], self.scale)
        norm = torch.nn.utils.clip_grad_norm_(params, self.o.grad_clip)
        stats = torch.stack([total, torch.as_tensor(float(stop), device=total.device)])
        if self.ranks.world > 1:
            torch.distributed.all_reduce(stats)
        # The one moment in a step when the host waits for the device: an update must not be made of a NaN.
        loss, asked, norm, tokens = torch.stack([*stats, norm.float(), tokens]).tolist()
        loss /= tokens
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            self.good, self.bad = self.good + 1, 0
        else:
            self.good, self.bad, self.skipped = 0, self.bad + 1, self.skipped + 1
        self.optimizer.zero_grad()
        if self.o.dtype == "fp16":  # dynamic loss scaling (Micikevicius et al. 2017, 1710.03740): halve on overflow
            self.scale = self.scale / 2 if self.bad else self.scale * 2 if self.good % 1000 == 999 else self.scale
        self.taken = taken
        return {"loss": loss, "grad_norm": norm, "tokens": int(tokens), "stop": asked > 0}

    def measure_noise(self, step: int, parts: int = 8) -> float:
        """The critical batch size in tokens, from the gradients of `parts` pieces of one step's windows."""
        batches, _ = self.pool.submit(self.load, step, self.taken).result()  # one reader of the files at a time
        x, y = (torch.cat([b[i] for b in batches]) for i in range(2))
        k = min(parts, len(x))
        small = []
        for xs, ys in zip(x.tensor_split(k), y.tensor_split(k), strict=True):
            before = [p.grad.clone() if p.grad is not None else 0 for p in self.model.parameters()]
            losses, _ = self.model(xs.to(self.ranks.device), ys.to(self.ranks.device))
            (losses.sum() / (ys != IGNORE).sum() / k).backward()
            after = zip(self.model.parameters(), before, strict=True)
            small.append(sum(float((p.grad - b).double().square().sum()) for p, b in after) * k * k)
        big = sum(float(p.grad.double().square().sum()) for p in self.model.parameters())
        self.optimizer.zero_grad()
        return noise_scale(small, big) * x.numel() / k


class Log:
    """metrics.jsonl for programs, a progress bar for people; lines where there is no terminal."""

    def __init__(self, folder: Path, lines: list[str], steps: int, done: int, rank: int):
        self.path, self.lines, self.rank, self.file = folder / "metrics.jsonl", lines, rank, None
        self.shown, self.bar = time.perf_counter(), None
        if rank == 0 and console().is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = ("step", MofNCompleteColumn(), BarColumn(24), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Progress(*columns, console=console())
            self.task = self.bar.add_task("", total=steps, completed=done, text="")
            self.bar.start()
        self.steps = steps

    def open(self) -> None:
        """Continue the file in the checkpoint folder (a save has just put a new folder in its place)."""
        if self.rank == 0:
            self.file = self.guard(lambda: open(self.path, "a", encoding="utf-8"))

    def close(self) -> None:
        file, self.file = self.file, None
        if file:
            self.guard(file.close)

    def guard(self, write):
        try:
            return write()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}).") from None

    def write(self, record: dict) -> None:
        if self.rank == 0:
            self.lines.append(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()}))
            self.guard(lambda: (self.file.write(self.lines[-1] + "\n"), self.file.flush()))

    def show(self, step: int, text: str, left: float) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step, text=text)
        elif time.perf_counter() - self.shown > 10 or step == self.steps:
            say(f"step {step}/{self.steps}  {left / 60:.1f} min left  {text}")
            self.shown = time.perf_counter()

    def say(self, text: str) -> None:
        if self.rank == 0:
            (self.bar.console if self.bar else console()).print(text, highlight=False)

    def stop(self) -> None:
        self.close()
        if self.bar:
            self.bar.stop()
            self.bar = None


def curve(records: list[dict], width: int = 72, height: int = 12) -> str:
    """The loss over the steps as a picture of characters; `o` marks the validation losses."""
    train = [(r["step"], r["loss"]) for r in records if "loss" in r and math.isfinite(r["loss"])]
    val = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    if len(train) < 2:
        return ""
    first, last = train[0][0], max(train[-1][0], train[0][0] + 1)
    columns = [[] for _ in range(width)]
    for step, loss in train:
        columns[(step - first) * (width - 1) // (last - first)].append(loss)
    means = [sum(c) / len(c) if c else None for c in columns]
    # the first losses are far above the rest: let the scale begin where a twentieth of the run is over
    seen = [m for m in means if m is not None] + [v for _, v in val]
    low, high = min(seen), sorted(seen)[-max(1, len(seen) // 20)]
    rows = [[" "] * width for _ in range(height)]

    def put(x, value, mark):
        rows[round((high - min(value, high)) / max(high - low, 1e-9) * (height - 1))][x] = mark

    for x, mean in enumerate(means):
        if mean is not None:
            put(x, mean, "·")
    for step, value in val:
        put(min(width - 1, max(0, (step - first) * (width - 1) // (last - first))), value, "o")
    labels = [f"{high - (high - low) * i / (height - 1):6.2f} │" for i in range(height)]
    body = "\n".join(label + "".join(row).rstrip() for label, row in zip(labels, rows, strict=True))
    return f"{body}\n       └{'─' * width}\n        step {first}{last:>{width - 5 - len(str(first))}}   · train   o val"


def picture(folder: Path, records: list[dict]) -> None:
    try:
        import matplotlib
    except ImportError:
        return say("(pip install matplotlib, and the curve is also drawn as loss.png)")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4))
    axes.plot([r["step"] for r in records if "loss" in r], [r["loss"] for r in records if "loss" in r], lw=0.6)
    axes.plot([r["step"] for r in records if "val_loss" in r], [r["val_loss"] for r in records if "val_loss" in r], "o-")
    axes.set(xlabel="step", ylabel="loss (nats per token)", yscale="log", title=str(folder))
    figure.savefig(folder / "loss.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)


# ------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------


def evaluate_all(o: Options, step: Step, val: list[Tokens], B: int, limit: int | None) -> dict:
    """Validation loss, by the sources' weights; masked runs also say how many masked tokens the model gets right."""
    T, model = step.model.config.seq_len, step.model
    if o.objective == "clm":
        results = [evaluate(model, tokens, T, B, limit) for tokens in val]
    else:
        results = [evaluate_masked(o, step, tokens, B, limit) for tokens in val]
    share = step.mixture.share
    total = {k: float(sum(w * r[k] for w, r in zip(share, results, strict=True))) for k in results[0]}
    total["val_tokens"] = sum(r["val_tokens"] for r in results)
    if len(val) > 1:
        total |= {f"val_loss_{t.folder.name}": r["val_loss"] for t, r in zip(val, results, strict=True)}
    return total | {"val_ppl": math.exp(min(total["val_loss"], 50))}


@torch.no_grad()
def evaluate_masked(o: Options, step: Step, tokens: Tokens, B: int, limit: int | None) -> dict:
    """Loss and accuracy on the same masked tokens at every call: the masks depend on the window's text alone."""
    model, r = step.model, step.ranks
    model.eval()
    total = torch.zeros(3, dtype=torch.float64)  # nats, right, masked
    for x, y in tokens.in_order(model.config.seq_len, B, limit, r.rank, r.world):
        real = y != IGNORE  # the last window is padded
        x, y = step.corrupt(x, [("val", row.numpy().tobytes()) for row in x])
        y[~real] = IGNORE
        x, y = x.to(r.device), y.to(r.device)
        logits = model(x)[0][y != IGNORE].float()
        loss = torch.nn.functional.cross_entropy(logits, y[y != IGNORE], reduction="sum")
        right = (logits.argmax(-1) == y[y != IGNORE]).sum()
        total += torch.tensor([loss.item(), right.item(), len(logits)], dtype=torch.float64)
    if r.world > 1:
        total = total.to(r.device)
        torch.distributed.all_reduce(total)
    model.train()
    nats, right, count = total.tolist()
    return {"val_loss": nats / count, "val_acc": right / count, "val_tokens": int(count)}


def fingerprint(sources: list[Tokens]) -> list:
    """Enough to notice that a data folder is not the one it was: sizes, files, tokenizer."""
    return [[t.n, t.meta.get("files_sha256"), seed_of((t.folder / "tokenizer.json").read_bytes())] for t in sources]


class Stopping:
    """Ctrl-C and SIGTERM ask the loop to save and end; a second Ctrl-C ends it at once."""

    def __init__(self):
        self.asked = False
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def compile_or_not(model: Transformer, o: Options) -> None:
    """torch.compile the blocks, and say so in a line where that cannot be done (no compiler, say)."""
    device = next(model.parameters()).device
    ids = torch.zeros(o.micro_batch, model.config.seq_len, dtype=torch.long, device=device)
    say("Compiling (--compile off to begin at once) ...")
    model.compile_blocks()
    try:
        model(ids, ids)[0].sum().backward()
    except Exception as error:  # whatever a compiler may raise: the run goes on without it
        for block in model.layers.values():
            block._compiled_call_impl = None
        say(f"torch.compile does not work here ({str(error).strip().splitlines()[0][:100]}); going on without it.")
    model.zero_grad()


def open_model(o: Options, config: Config, ranks, resume: str | None, tensors: dict):
    """-> model, optimizer: fresh from the seed, or as the checkpoint has them."""
    model = Transformer(config)
    if resume:
        model.load_state_dict(load_model(resume).state_dict())
    else:
        model.init_weights(o.seed, o.mup_base)
    model.compute_dtype, model.recompute = pick_dtype(o.dtype, ranks.device), o.recompute
    model.set_dropout(o.dropout)
    model.to(ranks.device).train()
    optimizer = build_optimizer(model, o.optimizer, o.lr, o.weight_decay, mup_base=o.mup_base)
    if resume:
        optimizer.load_state_dict(tensors)
    if o.compile == "on":
        compile_or_not(model, o)
    return model, optimizer


class Run:
    """A training run between its opening and its end: the loop, and what is saved of it."""

    def __init__(self, o: Options, config: Config, train: list[Tokens], val: list[Tokens], weights, ranks, resume):
        self.o, self.config, self.train_data, self.val_data, self.ranks = o, config, train, val, ranks
        tensors, state = load_state(resume) if resume else ({}, {})
        self.model, self.optimizer = open_model(o, config, ranks, resume, tensors)
        self.step = Step(o, self.model, self.optimizer, Mixture(train, weights, o.seed), ranks)
        self.out, self.at, self.best, self.waited = Path(o.out), 0, None, 0
        self.eval_seconds, self.result, self.reached = 0.0, {}, False
        lines = []
        if resume:
            self.at, self.best, self.waited = state["at"], state["best"], state["waited"]
            for name in ("taken", "scale", "good", "skipped"):
                setattr(self.step, name, state[name])
            lines = (find_checkpoint(resume) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            lines = [line for line in lines if json.loads(line)["step"] <= self.at]
        self.log = Log(self.out, lines, o.max_steps, self.at, ranks.rank)
        if not resume:
            self.save()  # a disk that cannot be written to is found out now, and any later kill can be resumed
        self.log.open()

    def save(self, finished: bool = False) -> None:
        self.log.close()
        if self.ranks.rank == 0:
            step = self.step
            state = {"at": self.at, "taken": step.taken, "scale": step.scale, "good": step.good,
                     "skipped": step.skipped, "best": self.best, "waited": self.waited, "finished": finished,
                     "data": fingerprint(self.train_data), "options": dataclasses.asdict(self.o)}  # fmt: skip
            save_checkpoint(self.out, self.model, self.train_data[0].folder / "tokenizer.json",
                            state=(self.optimizer.state_dict(), state),
                            metrics="".join(line + "\n" for line in self.log.lines))  # fmt: skip
        if self.ranks.world > 1:
            torch.distributed.barrier()
        if not finished:
            self.log.open()

    def evaluate(self, limit: int | None) -> None:
        o, begin = self.o, time.perf_counter()
        self.result = evaluate_all(o, self.step, self.val_data, o.micro_batch, limit)
        if o.noise_scale and self.at < o.max_steps:
            self.result["critical_batch_tokens"] = self.step.measure_noise(self.at)
        self.eval_seconds += time.perf_counter() - begin
        seconds = time.perf_counter() - START - self.eval_seconds
        self.log.write({"step": self.at, **self.result, "seconds": seconds})
        words = {"val_loss": "val loss {:.4f}", "val_bpb": "{:.4f} bits per byte", "val_acc": "accuracy {:.3f}",
                 "critical_batch_tokens": "critical batch {:,.0f} tokens"}  # fmt: skip
        text = ", ".join(w.format(self.result[k]) for k, w in words.items() if k in self.result)
        self.log.say(f"step {self.at}: {text} after {seconds:.1f} s")
        loss = self.result["val_loss"]
        improved = self.best is None or loss < self.best
        self.best, self.waited = (loss, 0) if improved else (self.best, self.waited + 1)
        if improved and o.patience and self.ranks.rank == 0:
            save_checkpoint(f"{self.out}-best", self.model, self.train_data[0].folder / "tokenizer.json")
        self.reached = o.target_loss is not None and loss <= o.target_loss

    def loop(self) -> None:
        o, step, stopping = self.o, self.step, Stopping()
        peak = peak_flops(self.ranks.device, self.model.compute_dtype, kept="out/machine.json") * self.ranks.world
        per_byte = self.train_data[0].n / max(1, self.train_data[0].bytes)  # tokens in a byte of text
        rate = None
        try:
            step.prefetch(self.at, step.taken)
            while self.at < o.max_steps and not self.reached:
                begin = time.perf_counter()
                lr = o.lr * lr_at(self.at, o.max_steps, o.warmup_steps, o.schedule, o.min_lr)
                stats = step(self.at, lr, stopping.asked)
                seconds = time.perf_counter() - begin
                self.at += 1
                rate = seconds if rate is None or self.at < 5 else 0.9 * rate + 0.1 * seconds
                speed = stats["tokens"] / seconds
                mfu = speed * self.config.flops_per_token() / peak
                self.log.write({"step": self.at, "loss": stats["loss"], "grad_norm": stats["grad_norm"], "lr": lr,
                                "ms_per_step": seconds * 1e3, "tok_per_s": speed, "mfu": mfu})  # fmt: skip
                bits = f"  {stats['loss'] / math.log(2) * per_byte:.3f} bits/byte" if o.objective == "clm" else ""
                text = f"loss {stats['loss']:.4f}{bits}  {speed:,.0f} tok/s  MFU {mfu:.0%}"
                self.log.show(self.at, text, rate * (o.max_steps - self.at))
                if step.bad:
                    self.tell_bad()
                if self.at == 5:
                    self.tell_time(rate * o.max_steps)
                if stats["stop"]:
                    self.save()
                    self.log.stop()
                    say(f"Stopped after step {self.at}; `python train.py --resume {self.out}` goes on from there.")
                    raise KeyboardInterrupt
                if self.at % o.eval_interval == 0 and self.at < o.max_steps:
                    self.evaluate(o.eval_tokens)
                    if o.patience and self.waited >= o.patience:
                        self.log.say(f"No better for {self.waited} evaluations: stopping. The best is in {o.out}-best.")
                        break
                if self.at % o.save_interval == 0 and self.at < o.max_steps:
                    self.save()
            if not self.reached:
                self.evaluate(None)  # all of the validation text
            self.save(finished=True)
        finally:
            self.log.stop()
            stopping.restore()
            step.pool.shutdown(wait=False, cancel_futures=True)

    def tell_bad(self) -> None:
        step = self.step
        self.log.say(f"step {self.at}: the loss or the gradient is not finite; the update is skipped ({step.skipped} so far).")
        if step.bad >= 5 and step.scale <= 1:
            saved = load_state(self.out)[1]["at"]
            raise UserError(
                f"The loss or the gradient was not finite in {step.bad} steps running, up to step {self.at}: stopped. "
                f"{self.out} holds step {saved}, which was good; a lower --lr or a longer --warmup-steps may help."
            )

    def tell_time(self, seconds: float) -> None:
        o = self.o
        hint = ""
        if seconds > 600:
            hint = f"; for ten minutes pass --max-steps {max(1, int(o.max_steps * 600 / seconds))}, or --preset nano"
        self.log.say(f"{o.max_steps} steps will take about {seconds / 60:.1f} min{hint}.")


def run(o: Options, *, resume: str | None = None, overwrite: bool = False) -> dict:
    """Train, evaluate, save, show. -> the last evaluation."""
    # 1. Where, and with what
    ranks, out = setup_distributed(o.device), Path(o.out)
    if not resume:
        check_out(out, overwrite)
    if o.data == Options.data and not Path(o.data[0]).exists():
        if ranks.rank == 0:
            default_data(o.data[0])
        if ranks.world > 1:
            torch.distributed.barrier()
    train, val, weights = open_data(o.data)

    # 2. Which model: of these options, or the one in the folder
    if resume:
        config = Config.from_hf(read_json(find_checkpoint(resume) / "config.json"))
        if load_state(resume)[1]["data"] != fingerprint(train):
            raise UserError(f"The data or its tokenizer is not what {resume} was trained on: restore it to resume.")
    else:
        config = make_config(o, train[0])
    derive(o, config, ranks.world, ranks.device)
    for tokens in train + val:
        if tokens.n <= config.seq_len:
            raise UserError(f"{tokens.path} has {tokens.n} tokens, not more than the context: lower --seq-len.")
    describe(o, config, train, ranks)

    # 3. Train
    this = Run(o, config, train, val, weights, ranks, resume)
    this.loop()

    # 4. Show
    if ranks.rank == 0:
        report(this)
    return this.result


def check_out(out: Path, overwrite: bool) -> None:
    """Nothing that exists is lost: a run's folder needs --overwrite, anything else is never replaced."""
    is_run = (out / "config.json").exists() or Path(f"{out}.old").exists()
    if is_run and not overwrite:
        raise UserError(f"{out} holds a run already: --resume {out} goes on with it, --overwrite begins again.")
    if not is_run and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not a checkpoint folder: choose another --out.")


def describe(o: Options, config: Config, train: list[Tokens], ranks) -> None:
    arch = config.to_hf()["architectures"][0]
    kind = f"saved as {arch}" if config.causal else 'saved as model_type "octavo": no stock class is bidirectional'
    say(f"{config.n_params() / 1e6:.1f}M parameters ({config.n_layer} layers, {config.n_embd} wide, context "
        f"{config.seq_len}), {kind}")  # fmt: skip
    epochs = o.tokens_per_step * o.max_steps / sum(t.n for t in train)
    say(f"{o.max_steps} steps of {o.tokens_per_step:,} tokens = {epochs:.2f} epochs of "
        f"{', '.join(str(t.folder) for t in train)}; {o.optimizer}, {o.dtype} on {ranks.device.type}"
        f"{f' x {ranks.world}' if ranks.world > 1 else ''}")  # fmt: skip


def report(this: Run) -> None:
    """The curve, the figures beside what a compressor needs for the same bytes, a sample."""
    from rich.table import Table

    o, records = this.o, [json.loads(line) for line in this.log.lines]
    say(curve(records), markup=False)
    picture(this.out, records)
    steps = [r for r in records if "ms_per_step" in r]
    table = Table("figure", "value", title=str(this.out), title_justify="left")
    for key, value in this.result.items():
        table.add_row(key, f"{value:,.4f}" if isinstance(value, float) else f"{value:,}")
    baselines = this.val_data[0].meta.get("baselines") or {}
    for key, words in (("xz_bpb", "xz -9e, bits per byte"), ("xz_primed_bpb", "... that has read the training text")):
        if key in baselines and o.objective == "clm":
            table.add_row(words, f"{baselines[key]:.4f}")
    if len(this.train_data) > 1:
        taken = np.array(this.step.taken) / sum(this.step.taken)
        table.add_row("share of each source", ", ".join(f"{t.folder.name} {s:.1%}" for t, s in
                                                         zip(this.train_data, taken, strict=True)))  # fmt: skip
    if steps:
        table.add_row("tok_per_s, median", f"{np.median([r['tok_per_s'] for r in steps]):,.0f}")
        table.add_row("mfu, median", f"{np.median([r['mfu'] for r in steps]):.1%}")
    table.add_row("steps skipped", str(this.step.skipped))
    seconds = time.perf_counter() - START
    table.add_row("seconds, of them evaluation", f"{seconds:.1f}, {this.eval_seconds:.1f}")
    console().print(table)
    if this.reached:
        say(f"Target {o.target_loss} reached after {seconds - this.eval_seconds:.1f} s without evaluation.")
    if o.objective == "clm":
        say("[bold]A sample[/] (`python sample.py` for more):")
        tokenizer, generator = load_tokenizer(this.out), torch.Generator().manual_seed(o.seed)

        def pick(logits):
            logits = logits[:, : tokenizer.n_vocab].cpu() / 0.7
            return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0].to(this.ranks.device)

        ids = generate(this.model.eval(), [[this.config.eos_id]], 200, pick, eos_id=this.config.eos_id)[0]
        say(tokenizer.decode(ids), markup=False, style="cyan")


def main(
    ctx: typer.Context,
    data: Annotated[list[str], typer.Option(help="Data folder, or FOLDER:WEIGHT; several times for a mixture.")] = ["data/python"],  # noqa: B006
    out: Annotated[str, typer.Option(help="Checkpoint folder to write.")] = Options.out,
    resume: Annotated[str | None, typer.Option(help="Go on with the run in this checkpoint folder, exactly.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin again where --out holds a run.")] = False,
    objective: Annotated[str, typer.Option(help="clm: the next token. mlm: masked tokens, bidirectional.")] = Options.objective,
    preset: Annotated[str, typer.Option(help=f"Size of the model: {', '.join(PRESETS)}.")] = Options.preset,
    n_layer: Annotated[int | None, typer.Option(help="Layers, instead of the preset's.")] = None,
    n_head: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    n_kv_head: Annotated[int | None, typer.Option(help="Key-value heads (a divisor of the heads).")] = None,
    n_embd: Annotated[int | None, typer.Option(help="Width; the feed-forward width follows in proportion.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Context in tokens.")] = None,
    max_steps: Annotated[int, typer.Option(help="Optimizer steps.")] = Options.max_steps,
    tokens_per_step: Annotated[int, typer.Option(help="Tokens of a step, over all ranks and micro-batches.")] = Options.tokens_per_step,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences at once on a device: memory and speed only.")] = None,
    batch_ramp: Annotated[int, typer.Option(help="Steps over which the batch grows from an eighth.")] = Options.batch_ramp,
    optimizer: Annotated[str, typer.Option(help="muon (matrices; AdamW on the rest) or adamw.")] = Options.optimizer,
    lr: Annotated[float, typer.Option(help="Peak learning rate; 2e-3 to 2e-2 with muon, 3e-4 to 3e-3 with adamw.")] = Options.lr,
    warmup_steps: Annotated[int, typer.Option(help="Steps of linear warm-up.")] = Options.warmup_steps,
    schedule: Annotated[str, typer.Option(help="wsd (stable, then a line down), cosine or constant.")] = Options.schedule,
    min_lr: Annotated[float, typer.Option(help="Where the schedule ends, as a fraction of --lr.")] = Options.min_lr,
    weight_decay: Annotated[float, typer.Option(help="Of matrices only.")] = Options.weight_decay,
    grad_clip: Annotated[float, typer.Option(help="Largest norm of the gradient.")] = Options.grad_clip,
    dropout: Annotated[float, typer.Option(help="For data that is seen many times: 0.1 to 0.3.")] = Options.dropout,
    mup_base: Annotated[int | None, typer.Option(help="Width at which --lr was found: scale it to this one (muP).")] = None,
    doc_mask: Annotated[bool, typer.Option("--doc-mask", help="Tokens see their own document only.")] = Options.doc_mask,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16 (with loss scaling).")] = Options.dtype,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = Options.device,
    compile: Annotated[str, typer.Option(help="auto (when the run is long enough to win), on or off.")] = Options.compile,
    recompute: Annotated[str, typer.Option(help="block: keep only each block's input; none, selective.")] = Options.recompute,
    eval_interval: Annotated[int, typer.Option(help="Steps between evaluations.")] = Options.eval_interval,
    eval_tokens: Annotated[int | None, typer.Option(help="Validation tokens of each; 0: all. The last takes all.")] = Options.eval_tokens,
    save_interval: Annotated[int, typer.Option(help="Steps between checkpoints.")] = Options.save_interval,
    target_loss: Annotated[float | None, typer.Option(help="Stop at the first evaluation at or below it.")] = None,
    patience: Annotated[int | None, typer.Option(help="Stop after so many evaluations without a better one; kept in OUT-best.")] = None,
    noise_scale: Annotated[bool, typer.Option("--noise-scale", help="Measure the critical batch size.")] = Options.noise_scale,
    seed: Annotated[int, typer.Option(help="Of the weights and the order of the data.")] = Options.seed,
) -> None:  # fmt: skip
    """Train a model on a data folder; without options, a small one on the sources of the installed Python."""
    given = {k: v for k, v in ctx.params.items() if ctx.get_parameter_source(k).name == "COMMANDLINE"}
    given = {k: tuple(v) if k == "data" else v for k, v in given.items() if k not in ("resume", "overwrite")}
    if given.get("eval_tokens") == 0:
        given["eval_tokens"] = None
    run(resumed(resume, given) if resume else Options(**given), resume=resume, overwrite=overwrite)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(main)
    run_app(app)
