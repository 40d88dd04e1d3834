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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch.nn.parallel import DistributedDataParallel as DDP

from model import (
    AUX,
    IGNORE,
    Config,
    Log,
    Mixture,
    Options,
    Stopping,
    Tokens,
    Transformer,
    UserError,
    build_optimizer,
    check_out,
    console,
    default_data,
    derive,
    evaluate,
    find_checkpoint,
    fingerprint,
    generate,
    load_model,
    load_state,
    load_tokenizer,
    lr_at,
    make_config,
    open_data,
    peak_flops,
    pick_dtype,
    read_json,
    resumed,
    routing_record,
    run_app,
    run_command,
    save_checkpoint,
    say,
    seed_of,
    setup_distributed,
    windows_at,
)  # fmt: skip

# B sequences of a micro-batch, T tokens of a sequence, N tokens of a step over all ranks.


# ------------------------------------------------------------------------------------------------------------
# The ideas: masking, noise scale (the schedule and the mixture are in model.py: parallel.py follows the same)
# ------------------------------------------------------------------------------------------------------------


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
# A step, and what is drawn of it
# ------------------------------------------------------------------------------------------------------------


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

        -> (this rank's sum of losses, its part of the auxiliary losses, targets of all ranks, windows of all ranks)"""
        o, r = self.o, self.ranks
        targets, rows = sum((y != IGNORE).sum() for _, y, _ in batches), sum(len(x) for x, _, _ in batches)
        counts = torch.tensor([float(targets), float(rows)], device=r.device)
        if r.world > 1:
            torch.distributed.all_reduce(counts)
        targets, rows = counts
        if o.dropout:
            torch.manual_seed(seed_of(o.seed, step, r.rank))
        total = aux_total = torch.zeros((), device=r.device)
        for i, (x, y, docs) in enumerate(batches):
            x, y = x.to(r.device, non_blocking=True), y.to(r.device, non_blocking=True)
            docs = docs.to(r.device, non_blocking=True) if docs is not None else None
            last = i == len(batches) - 1  # DDP adds up over the ranks once, in the last backward pass
            with contextlib.nullcontext() if last or r.world == 1 else self.forward.no_sync():
                losses, aux = self.forward(x, y, doc_ids=docs)  # (B, T)
                aux = aux * (len(x) / rows)  # means over sequences
                loss = losses.sum() / targets + aux[:, 0].sum()
                (loss * (self.scale * r.world)).backward()  # DDP divides by the number of ranks: undo that
            total, aux_total = total + losses.detach().sum(), aux_total + aux.detach()
        return total, aux_total, targets, rows

    def __call__(self, step: int, lr: float, stop: bool) -> dict:
        """-> {"loss", "grad_norm", "tokens", "stop"}: the mean loss over the targets, the tokens that were read (a masked
        model's targets are fewer), whether any rank was asked to stop; with experts, what `routing_record` says of them."""
        batches, taken = self.next.result()
        self.prefetch(step + 1, taken)
        self.optimizer.set_lr(lr)
        total, aux, targets, rows = self.backward(batches, step)
        params = [p for p in self.model.parameters() if p.grad is not None]
        if self.scale != 1.0:
            torch._foreach_div_([p.grad for p in params], self.scale)
        norm = torch.nn.utils.clip_grad_norm_(params, self.o.grad_clip)
        stats = torch.cat([torch.stack([total, torch.as_tensor(float(stop), device=total.device)]), aux.flatten()])
        if self.ranks.world > 1:
            torch.distributed.all_reduce(stats)
        # The one moment in a step when the host waits for the device: an update must not be made of a NaN.
        aux = stats[2:].view_as(aux)
        loss, asked, norm, targets, rows = torch.stack([*stats[:2], norm.float(), targets, rows]).tolist()
        loss /= targets
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            if self.o.balance == "bias":
                self.model.shift_bias(aux, self.o.balance_rate)
            self.good, self.bad = self.good + 1, 0
        else:
            self.good, self.bad, self.skipped = 0, self.bad + 1, self.skipped + 1
        self.optimizer.zero_grad()
        if self.o.dtype == "fp16":  # dynamic loss scaling (Micikevicius et al. 2017, 1710.03740): halve on overflow
            self.scale = self.scale / 2 if self.bad else self.scale * 2 if self.good % 1000 == 999 else self.scale
        self.taken = taken
        record = routing_record(aux, self.model.config)
        return {"loss": loss, "grad_norm": norm, "tokens": int(rows) * self.model.config.seq_len, "stop": asked > 0} | record

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


def load_bars(load: list[list[float]]) -> str:
    """A bar for each expert of each layer, of full height at twice the mean."""
    lines = ["how often each expert was chosen in the last step (half of the height: the mean; largest beside it)"]
    for i, row in enumerate(load):
        relative = [x * len(row) / sum(row) for x in row]
        bars = "".join(" ▁▂▃▄▅▆▇█"[min(8, round(r * 4))] for r in relative)
        lines.append(f"  layer {i:2} │{bars}│ {max(relative):.2f}")
    return "\n".join(lines)


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
    if resume or o.init:
        model.load_state_dict(load_model(resume or o.init).state_dict())
    else:
        model.init_weights(o.seed, o.mup_base)
    model.compute_dtype, model.recompute = pick_dtype(o.dtype, ranks.device), o.recompute
    model.set_dropout(o.dropout)
    model.set_balance(o)
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
                            metrics=self.log.text())  # fmt: skip
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
                routing = {k: stats[k] for k in stats if k in (*AUX, "load_max")}
                self.log.write({"step": self.at, "loss": stats["loss"], "grad_norm": stats["grad_norm"], "lr": lr,
                                "ms_per_step": seconds * 1e3, "tok_per_s": speed, "mfu": mfu, **routing})  # fmt: skip
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


def describe(o: Options, config: Config, train: list[Tokens], ranks) -> None:
    arch = config.to_hf()["architectures"][0]
    what = "has these experts" if config.causal else "is bidirectional"
    kind = f'saved as model_type "octavo": no stock class {what}' if arch.startswith("Octavo") else f"saved as {arch}"
    active = f", {config.n_params(active=True) / 1e6:.1f}M of them active" if config.moe else ""
    say(f"{config.n_params() / 1e6:.1f}M parameters{active} ({config.n_layer} layers, {config.n_embd} wide, context "
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
    if this.config.moe and steps:
        say(load_bars(steps[-1]["load"]), markup=False)
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
    given: dict,
    resume: Annotated[str | None, typer.Option(help="Go on with the run in this checkpoint folder, exactly.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin again where --out holds a run.")] = False,
) -> None:
    """Train a model on a data folder; without options, a small one on the sources of the installed Python."""
    run(resumed(resume, given) if resume else Options(**given), resume=resume, overwrite=overwrite)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(run_command(main))
    run_app(app)
