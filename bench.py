"""Measure how fast this machine is, and how much of that a model gets out of it.

Two limits rule a language model: the rate of matrix products (training, prefill) and the rate at which memory
is read (decoding: each token reads all weights). Both are measured here a moment before they are needed, and
every speed stands beside its limit: MFU (model FLOPs utilisation, Chowdhery et al. 2022, 2204.02311, appendix
B) for training, a fraction of the bandwidth for decoding. Speeds are medians, beside them the fastest and the
slowest; two things that are compared take turns, so that whatever else the machine does meets both.

    python bench.py machine                       # the two limits
    python bench.py train --preset mini           # a training step
    python bench.py train --vs transformers       # ... next to transformers' model of the same shape
    python bench.py decode out/python             # tokens per second, with the cache and without
    python bench.py claims                        # what is often said of training, measured here
    python bench.py plot out/sft out/dpo          # what runs logged, side by side: a table and a picture
    python bench.py xz data/python                # what a compressor makes of the text: the number to beat

Left out: profiles of single operators (torch.profiler has them).
"""

import itertools
import json
import lzma
import os
import platform
import re
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import median
from typing import Annotated

from model import (  # before torch: it says how OpenMP's threads wait
    DTYPES, PRESETS, Cache, Config, Tokens, Transformer, UserError, build_optimizer, check, config_to_hf,
    count_params, load_model, load_tokenizer, peak_flops, pick_device, pick_dtype, progress, read_metrics,
    resize, round_up, run_app, say, synchronize,
)

import torch
import torch.nn.functional as F
import typer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# B batch, T tokens of a sequence, H heads, D head_dim, V vocabulary.

PRIMED_LIMIT = 200_000_000  # bytes of training text up to which xz reads them first
NAMES = {dtype: name for name, dtype in DTYPES.items()}

# ------------------------------------------------------------------------------------------------------------
# The idea: how to measure
# ------------------------------------------------------------------------------------------------------------

def alternate(jobs: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Time each job in each round -> seconds; the jobs take turns, after a round that does not count."""
    seconds = {name: [] for name in jobs}
    for i in range(rounds + 1):
        for name, job in jobs.items():
            synchronize(device)
            start = time.perf_counter()
            job()
            synchronize(device)
            if i:
                seconds[name].append(time.perf_counter() - start)
    return seconds

def spread(values: list[float], scale: float = 1e3) -> dict[str, float]:
    """Sum up repeated measurements, seconds in milliseconds by default.

    >>> spread([0.003, 0.001, 0.002])
    {'median': 2.0, 'low': 1.0, 'high': 3.0}
    """
    return {"median": median(values) * scale, "low": min(values) * scale, "high": max(values) * scale}

class LiveBytes(TorchDispatchMode):
    """Count the bytes of tensors that live at one time, as CUDA's allocator does, on any device.

    known: tensors that were there before, parameters and inputs; they do not count.
    """

    def __init__(self, known=()):
        super().__init__()
        self.sizes = {t.untyped_storage()._cdata: 0 for t in known}  # address of a storage -> its bytes
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            address = storage._cdata
            if address not in self.sizes:
                self.sizes[address] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, address)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out

def peak_bytes(job: Callable, device: torch.device, known=()) -> int:
    """Measure the most memory that a job takes at one time, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes(known) as live:
        job()
    return live.peak

def peak_gb(device: torch.device) -> float | None:
    """Read the most memory held so far, of the GPU or of this process; None on Windows, which keeps it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return None
    import resource

    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return rss * (1 if sys.platform == "darwin" else 1024) / 1e9

def read_rate(device: torch.device) -> float:
    """Measure the bytes per second that memory gives: the sum of an array far larger than any cache."""
    x = torch.ones(2**30 if device.type == "cuda" else 2**27, device=device)  # float32: 4 GiB, 512 MiB
    return x.nbytes / min(alternate({"read": x.sum}, 20, device)["read"])

def kv_bytes(config: Config, B: int, T: int, itemsize: int) -> int:
    """Count the bytes of the keys and values that B sequences of T tokens keep."""
    return 2 * B * T * config.n_layer * config.n_kv_head * config.head_dim * itemsize

def bytes_per_step(config: Config, B: int, T: int, itemsize: int) -> int:
    """Count the bytes read for one token of B texts of length T: all matrices once, and each text's cache."""
    return config.matrix_params * itemsize + kv_bytes(config, B, T, itemsize)

def plain_attention(q, k, v):
    """Attend causally as on paper, (B, H, T, D) each: all B*H*T*T scores stand in memory, several times."""
    T = q.shape[2]
    hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, H, T, T)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


# ------------------------------------------------------------------------------------------------------------
# Plumbing: models, steps, tables
# ------------------------------------------------------------------------------------------------------------

def make_model(config: Config, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Make a model to train: weights in float32, activations in dtype."""
    model = Transformer(config).init_weights().to(device)
    model.compute_dtype = dtype
    return model

def random_tokens(config: Config, B: int, T: int, device: torch.device):
    """Draw inputs and targets (B, T). What they say does not change how long a step takes."""
    ids = torch.randint(config.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(0)).to(device)
    return ids[:, :-1], ids[:, 1:].contiguous()

def stepper(loss: Callable, optimizer) -> Callable:
    """Make a training step without arguments."""

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step

def octavo_step(model: Transformer, optimizer: str, x, y) -> Callable:
    return stepper(lambda: model(x, y)[0].mean(), build_optimizer(model, optimizer))

def transformers_step(config: Config, dtype: torch.dtype, x) -> Callable:
    """Make a step of transformers' model of this shape, as its users write it."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise UserError("transformers is not installed: pip install -r requirements-dev.txt.") from None
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_to_hf(config)))
    model = model.to(x.device).float().train()

    def loss():
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            return model(input_ids=x, labels=x, use_cache=False).loss

    return stepper(loss, torch.optim.AdamW(model.parameters(), 1e-3, fused=True))

def dtypes_of(name: str, device: torch.device) -> list[torch.dtype]:
    """List the precisions to measure; auto: float32 and the machine's fast one."""
    names = ["fp32", "auto"] if name == "auto" else [name]
    return list(dict.fromkeys(pick_dtype(name, device) for name in names))

def time_decoding(model: Transformer, B: int, prompt: int, new: int, rounds: int, device) -> dict:
    """Time reading a prompt, writing `new` tokens with the cache, and an eighth of them without.

    -> {"prefill", "cache", "none": seconds in each round for one token of every text}
    """
    x, _ = random_tokens(model.config, B, prompt, device)
    cache = Cache(model.config, B, prompt + new, device, next(model.parameters()).dtype)
    few = max(1, new // 8)

    def next_ids(ids, cache=None):
        return model(ids, cache=cache, output="last")[0].argmax(-1)  # (B, 1), never waited for

    def prefill():
        cache.rewind(0)
        next_ids(x, cache)

    def with_cache():
        cache.rewind(prompt - 1)
        ids = x[:, -1:]
        for _ in range(new):
            ids = next_ids(ids, cache)

    def without():
        ids = x
        for _ in range(few):
            ids = torch.cat((ids, next_ids(ids)), 1)

    with torch.inference_mode():
        times = alternate({"prefill": prefill, "cache": with_cache, "none": without}, rounds, device)
    tokens = {"prefill": prompt, "cache": new, "none": few}
    return {name: [s / tokens[name] for s in seconds] for name, seconds in times.items()}

def cpu_name() -> str:
    """Name the processor, as far as the system does."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text()) if path.exists() else None
    return found[1] if found else platform.processor() or platform.machine()

def show(title: str, rows: list[dict]) -> None:
    """Print a table on standard output: the keys of the rows are its columns."""
    from rich.console import Console
    from rich.table import Table

    def text(value) -> str:
        if isinstance(value, dict):  # of spread
            return "{} ({}-{})".format(*map(text, value.values()))
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return "-" if value is None else f"{value:,}" if isinstance(value, int) else value

    table = Table(*[name.replace("_", " ") for name in rows[0]], title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(text, row.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)

def report(result: dict, as_json: bool, title: str, rows: list[dict]) -> dict:
    """Print a result, as JSON or as a table."""
    if as_json:
        print(json.dumps(result))
    else:
        show(title, rows)
    return result


# ------------------------------------------------------------------------------------------------------------
# What is said of training (and of the cache), each measured -> rows of a table, and what came out
# ------------------------------------------------------------------------------------------------------------

def claim_batch(device: torch.device, quick: bool):
    """Choose the model that claims are measured with, and a batch for it."""
    config = resize("nano" if quick else "micro", vocab_size=4096)
    return config, *random_tokens(config, 8 if quick else 16, config.seq_len, device)

def claim_mixed_precision(device: torch.device, quick: bool):
    config, x, y = claim_batch(device, quick)
    jobs = {}
    for dtype in dict.fromkeys((torch.float32, pick_dtype("auto", device), torch.bfloat16)):
        model = make_model(config, device, dtype)
        jobs[NAMES[dtype]] = octavo_step(model, "adamw", x, y)
    times = alternate(jobs, 3 if quick else 8, device)
    rows = [{"precision": name, "ms_per_step": spread(s), "tok_per_s": x.numel() / median(s),
             "speedup": median(times["fp32"]) / median(s)} for name, s in times.items()]
    fast = max(rows[1:], key=lambda row: row["speedup"])
    return rows, f"{fast['precision']} is {fast['speedup']:.2f} times as fast as fp32"

def claim_flash_attention(device: torch.device, quick: bool):
    dtype = pick_dtype("auto", device)
    flash_attention = partial(F.scaled_dot_product_attention, is_causal=True)
    rows = []
    for T in (128, 256, 512) if quick else (128, 256, 512, 1024, 2048):
        q, k, v = torch.randn(3, 1, 8, T, 64, device=device, dtype=dtype).requires_grad_()

        def run(attention, inputs=(q, k, v)):
            torch.autograd.grad(attention(*inputs).sum(), inputs)

        jobs = {"plain": partial(run, plain_attention), "flash": partial(run, flash_attention)}
        times = alternate(jobs, 5 if quick else 9, device)
        row = {"T": T} | {f"{name}_ms": spread(s) for name, s in times.items()}
        row["speedup"] = median(times["plain"]) / median(times["flash"])
        for name, job in jobs.items():
            row[f"{name}_mb"] = peak_bytes(job, device, (q, k, v)) / 1e6
            before = rows[-1][f"{name}_ms"]["median"] if rows else None
            row[f"{name}_growth"] = row[f"{name}_ms"]["median"] / before if before else None
        rows.append(row)
    memory = row["flash_mb"] / row["plain_mb"]
    return rows, f"at {T} tokens {row['speedup']:.2f} times as fast, in {memory:.1%} of the memory"

def markov_batches(V: int, B: int, T: int, seed: int) -> Iterator:
    """Make up an endless text to learn: each token is followed by one of four, which ones is drawn once."""
    generator = torch.Generator().manual_seed(seed)
    follows = torch.randint(V, (V, 4), generator=generator)
    while True:
        ids = torch.randint(V, (B, T + 1), generator=generator)
        for t in range(T):
            ids[:, t + 1] = follows[ids[:, t], torch.randint(4, (B,), generator=generator)]
        yield ids[:, :-1], ids[:, 1:].contiguous()

def warmup_run(config: Config, lr: float, warmup_steps: int, batches: Iterator, seed: int, device) -> dict:
    """Train on some batches -> the loss's largest climb above its lowest, the largest gradient, the end."""
    model = Transformer(config).init_weights(seed).to(device)
    optimizer = build_optimizer(model, "adamw")
    losses, norms = [], []
    for step, (x, y) in enumerate(batches):
        loss = model(x.to(device), y.to(device))[0].mean()
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm(p.grad for p in model.parameters()).item())
        losses.append(loss.item())
        optimizer.set_lr(lr * min(1.0, (step + 1) / max(1, warmup_steps)))
        optimizer.step()
        optimizer.zero_grad()
    rise = max(loss - lowest for loss, lowest in zip(losses, itertools.accumulate(losses, min), strict=True))
    return {"largest_rise": rise, "largest_grad_norm": max(norms), "last_loss": losses[-1]}

def claim_warmup(device: torch.device, quick: bool, data: str | None = None):
    tokens = Tokens(data, "train") if data else None
    V = round_up(tokens.vocab_size) if tokens else 256
    config = resize("nano", n_layer=1 if quick else 4, seq_len=64, vocab_size=V)
    steps = 30 if quick else 60
    rows = []
    for lr, warmup_steps in itertools.product((0.01, 0.1), (0, steps // 3)):
        runs = []
        for seed in range(1 if quick else 3):
            batches = markov_batches(V, 16, 64, seed)
            if tokens:
                batches = (tokens.batch(16 * i, 16, 64, seed) for i in itertools.count())
            batches = itertools.islice(batches, steps)
            runs.append(warmup_run(config, lr, warmup_steps, batches, seed, device))
        facts = {name: spread([run[name] for run in runs], 1.0) for name in runs[0]}
        rows.append({"lr": lr, "warmup_steps": warmup_steps} | facts)
    cold, warm = (row["largest_rise"]["median"] for row in rows[-2:])
    return rows, f"at a rate of {lr} the loss climbs back by {cold:.2f} nats without, by {warm:.2f} with it"

def claim_recompute(device: torch.device, quick: bool):
    config, x, y = claim_batch(device, quick)
    jobs, peaks = {}, {}
    for name in ("none", "block"):
        model = make_model(config, device, pick_dtype("auto", device))
        model.recompute = name == "block"

        def job(model=model):
            model(x, y)[0].mean().backward()
            model.zero_grad(set_to_none=True)

        jobs[name] = job
        peaks[name] = peak_bytes(job, device, (*model.parameters(), x, y))
    times = alternate(jobs, 2 if quick else 5, device)
    rows = [{"recompute": n, "ms_forward_backward": spread(s), "time": median(s) / median(times["none"]),
             "peak_mb": peaks[n] / 1e6, "memory": peaks[n] / peaks["none"]} for n, s in times.items()]
    return rows, f"block: {rows[-1]['time'] - 1:+.0%} time, {rows[-1]['memory'] - 1:+.0%} memory"

def claim_kv_cache(device: torch.device, quick: bool):
    config, *_ = claim_batch(device, quick)
    dtype = pick_dtype("auto", device)
    model = make_model(config, device, dtype).to(dtype).eval()
    rows = []
    for T in (64, 256) if quick else (64, 128, 256, 512, 1024):
        times = time_decoding(model, 1, T, 1, 5 if quick else 15, device)
        rows.append({"T": T, "ms_with_cache": spread(times["cache"]), "ms_without": spread(times["none"]),
                     "speedup": median(times["none"]) / median(times["cache"]),
                     "cache_mb": kv_bytes(config, 1, T, dtype.itemsize) / 1e6})
    return rows, f"for a token after {T} others: {rows[-1]['speedup']:.1f} times"

CLAIMS = {
    "mixed-precision": (claim_mixed_precision, "Mixed precision trains 2 to 3 times as fast"),
    "flash-attention": (claim_flash_attention, "Flash attention is 2 to 4 times as fast, its memory linear, "
                        "its time still quadratic"),
    "warmup": (claim_warmup, "Warm-up prevents early instability"),
    "recompute": (claim_recompute, "Gradient checkpointing trades time for memory"),
    "kv-cache": (claim_kv_cache, "Without the KV cache, all earlier tokens are computed again"),
}

# ------------------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option(help="auto (fp32 and the machine's fast one), fp32, bf16 or fp16.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")]
Preset = Annotated[str, typer.Option(help=f"Shape of the model: {', '.join(PRESETS)}.")]

@app.command()
def machine(device: Device = "auto", as_json: Json = False) -> dict:
    """Measure the two limits of this machine: matrix products and memory."""
    where = pick_device(device)
    # float16 products on a CPU run hundreds of times slower than the others: nobody trains so
    dtypes = [torch.float32, torch.bfloat16] + [torch.float16] * (where.type != "cpu")
    flops = {NAMES[dtype]: peak_flops(where, dtype, 1.0) for dtype in dtypes}
    bandwidth = read_rate(where) / 1e9
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else cpu_name()
    facts = {"device": where.type, "name": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
             "torch": torch.__version__, "flops": flops, "read_gb_per_s": bandwidth}
    rows = [{"limit": f"matrix products, {n}", "rate": f / 1e9, "unit": "GFLOP/s"} for n, f in flops.items()]
    rows.append({"limit": "reading memory", "rate": bandwidth, "unit": "GB/s"})
    return report(facts, as_json, f"{name}, {facts['threads']} threads, torch {facts['torch']}", rows)

@app.command()
def train(
    preset: Preset = "micro",
    n_layer: Annotated[int | None, typer.Option(help="Layers, instead of the preset's.")] = None,
    n_embd: Annotated[int | None, typer.Option(help="Width; heads and feed-forward follow.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a sequence.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 32,
    vocab_size: Annotated[int, typer.Option(help="Tokens in the vocabulary.")] = 4096,
    dtype: Dtype = "auto",
    optimizer: Annotated[str, typer.Option(help="muon or adamw.")] = "muon",
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the blocks.")] = False,
    steps: Annotated[int, typer.Option(help="Steps to time, after one that does not count.")] = 10,
    vs: Annotated[str | None, typer.Option(help="transformers: its model of this shape, in turns.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> dict:
    """Time a training step on random tokens, against the peak that was measured just before."""
    check(vs in (None, "transformers"), f"--vs knows transformers, not {vs!r}.")
    check(steps >= 1 and batch >= 1, "--steps and --batch have to be at least 1.")
    where = pick_device(device)
    config = resize(preset, n_layer, n_embd, seq_len, vocab_size=round_up(vocab_size))
    x, y = random_tokens(config, batch, config.seq_len, where)
    optimizer = "adamw" if vs else optimizer
    rows = []
    for kind in dtypes_of(dtype, where):
        model = make_model(config, where, kind)
        if compiled:
            model.compile_blocks()
        jobs = {"octavo": octavo_step(model, optimizer, x, y)}
        if vs:
            jobs[vs] = transformers_step(config, kind, x)
        peak = peak_flops(where, kind)
        times = alternate(jobs, steps, where)
        for name, seconds in times.items():
            speed = x.numel() / median(seconds)
            row = {"model": name, "dtype": NAMES[kind], "ms_per_step": spread(seconds), "tok_per_s": speed}
            row |= {"mfu": speed * config.flops_per_token() / peak, "peak_tflops": peak / 1e12}
            rows.append(row | {"speedup": median(times[vs]) / median(seconds) if vs else None})
    params = count_params(config)[0]
    gb = peak_gb(where)
    facts = {"params": params, "batch": batch, "seq_len": config.seq_len, "compile": compiled,
             "optimizer": optimizer, "mem_gb": gb, "rows": rows}
    title = f"{params / 1e6:.1f}M parameters, {batch} x {config.seq_len} tokens, {optimizer}"
    return report(facts, as_json, title + (f"; {gb:.2f} GB at most" if gb else ""), rows)

@app.command()
def decode(
    folder: Annotated[Path | None, typer.Argument(help="Checkpoint folder; else random weights.")] = None,
    preset: Preset = "micro",
    batch: Annotated[list[int], typer.Option(help="Texts at once; several times for several.")] = (1, 8),
    prompt: Annotated[int, typer.Option(help="Tokens that are read before.")] = 128,
    new: Annotated[int, typer.Option(help="Tokens to write.")] = 64,
    dtype: Dtype = "auto",
    rounds: Annotated[int, typer.Option(help="Times to do it all.")] = 3,
    device: Device = "auto",
    as_json: Json = False,
) -> dict:
    """Count tokens per second, with the cache and without, beside what the memory's bandwidth allows."""
    check(min(*batch, prompt, new, rounds) >= 1, "--batch, --prompt, --new and --rounds are at least 1.")
    where = pick_device(device)
    bandwidth = read_rate(where)
    rows = []
    for kind in dtypes_of(dtype, where):
        if folder:
            model = load_model(folder, where, kind)
        else:
            model = make_model(resize(preset, vocab_size=4096), where, kind).to(kind).eval()
        for B in batch:
            times = time_decoding(model, B, prompt, new, rounds, where)
            speed = {name: B / median(seconds) for name, seconds in times.items()}  # tokens a second
            rate = bytes_per_step(model.config, B, prompt + new // 2, kind.itemsize) / median(times["cache"])
            row = {"dtype": NAMES[kind], "batch": B, "prefill_tok_per_s": speed["prefill"]}
            row |= {"ms_per_token": spread(times["cache"]), "tok_per_s": speed["cache"]}
            row |= {"without_cache": speed["none"], "gb_per_s": rate / 1e9, "of_bandwidth": rate / bandwidth}
            rows.append(row)
    params = count_params(model.config)[0]
    facts = {"params": params, "prompt": prompt, "new": new, "read_gb_per_s": bandwidth / 1e9, "rows": rows}
    title = f"{params / 1e6:.1f}M parameters, {new} tokens after {prompt}"
    title += f"; memory reads {bandwidth / 1e9:.1f} GB/s (above 1: the weights stay in the caches)"
    return report(facts, as_json, title, rows)

@app.command()
def claims(
    names: Annotated[list[str] | None, typer.Argument(help=f"Which: {', '.join(CLAIMS)}; or all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller and rougher.")] = False,
    data: Annotated[str | None, typer.Option(help="Data folder for warm-up's runs; else made up.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> dict:
    """Measure what is said of training and of the cache on this machine."""
    names = names or list(CLAIMS)
    for name in names:
        check(name in CLAIMS, f"There is no claim {name!r}; there are {', '.join(CLAIMS)}.")
    where = pick_device(device)
    results = {}
    with progress("claims", len(names)) as done:
        for name in names:
            measure, claim = CLAIMS[name]
            start = time.perf_counter()
            rows, finding = measure(where, quick, data) if name == "warmup" else measure(where, quick)
            seconds = time.perf_counter() - start
            results[name] = {"claim": claim, "rows": rows, "finding": finding, "seconds": seconds}
            done(len(results))
            say(f"{name}: {finding}")
    if as_json:
        print(json.dumps(results))
    else:
        for result in results.values():
            show(f"{result['claim']}: {result['finding']}", result["rows"])
    return results

@app.command()
def plot(
    folders: Annotated[list[str], typer.Argument(help="Checkpoint folders: each one a line.")],
    of: Annotated[list[str], typer.Option(help="What to show of metrics.jsonl; a panel each.")] = ("loss",),
    out: Annotated[Path, typer.Option(help="Picture to write (needs matplotlib).")] = Path("out/plot.png"),
    as_json: Json = False,
) -> dict:
    """Show what runs logged over their steps, side by side."""
    logs = {folder: read_metrics(Path(folder) / "metrics.jsonl") for folder in folders}
    for folder, log in logs.items():
        check(log, f"{folder} has no metrics.jsonl that can be read: it is no folder of a run.")
    records = itertools.chain(*logs.values())
    known = {name for record in records for name, x in record.items() if isinstance(x, (int, float))}
    for name in of:
        check(name in known, f"No run logged {name!r}; they logged {', '.join(sorted(known))}.")
    lines, rows = {}, []
    for name, folder in itertools.product(of, folders):
        steps = [r["step"] for r in logs[folder] if name in r]
        values = [r[name] for r in logs[folder] if name in r]
        if values:
            lines[name, folder] = (steps, values)
            rows.append({"metric": name, "run": folder, "steps": steps[-1], "first": values[0],
                         "lowest": min(values), "highest": max(values), "last": values[-1]})
    draw(lines, of, out)
    return report({"rows": rows}, as_json, "over the steps", rows)

def draw(lines: dict[tuple[str, str], tuple], panels: list[str], path: Path) -> None:
    """Draw a panel for each metric, one below the other, over the same steps."""
    try:
        import matplotlib
    except ImportError:
        return say("(pip install matplotlib, and this is also drawn as a picture)")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(panels), figsize=(7, 2.4 * len(panels)), sharex=True, squeeze=False)
    for panel, axis in zip(panels, axes[:, 0], strict=True):
        for (name, folder), line in lines.items():
            if name == panel:
                axis.plot(*line, label=folder, lw=1, marker="o" if len(line[0]) < 20 else None)
        axis.set_ylabel(panel)
        axis.legend()
    axes[-1, 0].set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    say(f"{path} written.")

@app.command()
def xz(
    folder: Annotated[Path, typer.Argument(help="Data folder.")] = Path("data/python"),
    as_json: Json = False,
) -> dict:
    """Compress validation text with xz -9e, alone and after the training text: baselines in bits per byte."""
    train, val = Tokens(folder, "train"), Tokens(folder, "val")
    texts = [text_of(val)]
    if train.bytes <= PRIMED_LIMIT:
        before = text_of(train)
        texts += [before, before + texts[0]]
    else:
        say(f"{train.bytes / 1e6:,.0f} MB of training text take xz too long: validation text only.")
    alone, *primed = compress(texts)
    sizes = {"xz": alone}
    if primed:
        sizes["xz_primed"] = primed[1] - primed[0]
    facts = {"val_bytes": val.bytes, "train_bytes": train.bytes}
    rows = []
    for name, size in sizes.items():
        bits = round(8 * size / val.bytes, 4)
        facts |= {f"{name}_bytes": size, f"{name}_bpb": bits}
        rows.append({"baseline": name, "bytes": size, "bits_per_byte": bits})
    return report(facts, as_json, f"{folder}: {val.bytes:,} bytes of validation text", rows)

def text_of(tokens: Tokens) -> bytes:
    """Decode a split of a data folder, without the end-of-text tokens: nobody wrote these."""
    tokenizer = load_tokenizer(tokens.folder)
    parts = []
    for start in range(0, tokens.n, 2**20):
        ids = tokens.read(start, min(2**20, tokens.n - start))
        parts.append(tokenizer.decode_bytes(ids[ids != tokens.eot_id].tolist()))
    text = b"".join(parts)
    check(len(text) == tokens.bytes, f"{tokens.path} holds {len(text)} bytes of text where meta.json counts "
          f"{tokens.bytes}: prepare the folder anew.")
    return text

def compress(texts: list[bytes]) -> list[int]:
    """Compress texts with xz -9e -> bytes of each; two at a time, since lzma lets other threads run.

    xz remembers 64 MiB: of a longer text before it, the last part alone helps.
    """
    done = itertools.count(1)
    total = sum(-(-len(text) // 10**6) for text in texts)
    with progress("megabyte", total) as show_done, ThreadPool(2) as pool:

        def size(text: bytes) -> int:
            compressor = lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME)
            size = 0
            for start in range(0, len(text), 10**6):
                size += len(compressor.compress(text[start : start + 10**6]))
                show_done(next(done))
            return size + len(compressor.flush())

        return pool.map(size, texts)

if __name__ == "__main__":
    run_app(app)
