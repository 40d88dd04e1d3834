"""How fast this machine is, and how much of that a model gets out of it.

Two limits rule a language model: the rate of matrix products (training, prefill) and the rate at which memory can be
read (decoding: each token reads all weights). Both are measured here, on the machine and in the minute in which they
are needed, and every speed stands beside its limit: MFU (model FLOPs utilisation, Chowdhery et al. 2022, 2204.02311,
appendix B) for training, a fraction of the bandwidth for decoding. Speeds are medians, with the fastest and slowest run
beside them; two things that are compared take turns, so that whatever else the machine does meets both.

    python bench.py machine                       # the two limits; also written to out/machine.json
    python bench.py train --preset mini           # a training step
    python bench.py train --vs transformers       # ... next to transformers' model of the same shape
    python bench.py decode out/python             # tokens per second, with the cache and without
    python bench.py claims                        # what is often said of training, measured here
    python bench.py plot out/sft out/dpo          # what runs logged, side by side: a table and a picture

Left out: profiles of single operators (torch.profiler has them).
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import (
    PRESETS,
    Cache,
    Config,
    Tokens,
    Transformer,
    UserError,
    build_optimizer,
    console,
    find_checkpoint,
    load_model,
    pad_vocab,
    peak_flops,
    pick_device,
    pick_dtype,
    run_app,
    say,
    synchronize,
    write_text,
)

# B batch, T tokens of a sequence, H heads, D head_dim, V vocabulary.

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# ---------------------------------------------------------------------------------------------------------------------
# The idea: how to measure


def alternate(jobs: dict[str, Callable], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each job in each round; the jobs take turns, after a round that does not count."""
    seconds = {name: [] for name in jobs}
    for i in range(rounds + 1):
        for name, job in jobs.items():
            synchronize(device)
            start = time.perf_counter()
            job()
            synchronize(device)
            seconds[name] += [time.perf_counter() - start] if i else []
    return seconds


def spread(seconds: list[float], scale: float = 1e3) -> dict[str, float]:
    """
    >>> spread([0.003, 0.001, 0.002])
    {'median': 2.0, 'low': 1.0, 'high': 3.0}
    """
    return {name: f(seconds) * scale for name, f in (("median", median), ("low", min), ("high", max))}


class LiveBytes(TorchDispatchMode):
    """The most bytes that the tensors made under it had at one time: what CUDA's allocator counts, for any device."""

    def __init__(self, known=()):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0
        self.known = {t.untyped_storage()._cdata for t in known}  # there before: parameters, inputs

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)):
            key = storage._cdata  # its address; free again when it dies, and then forgotten here
            if key not in self.sizes and key not in self.known:
                self.sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, key)
        self.peak = max(self.peak, self.now)
        return out

    def forget(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def peak_bytes(job: Callable, device: torch.device, known=()) -> int:
    """The most memory that `job` takes at one time beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        return torch.cuda.max_memory_allocated(device) - before
    with LiveBytes(known) as live:
        job()
    return live.peak


def read_rate(device: torch.device, seconds: float = 0.5) -> float:
    """Bytes per second that can be read from memory: the sum of an array far larger than any cache."""
    x = torch.ones(2**30 if device.type == "cuda" else 2**27, device=device)  # float32: 4 GiB, 512 MiB
    best, end = 0.0, 0.0
    while best == 0 or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        x.sum()
        synchronize(device)
        if end:
            best = max(best, x.nbytes / (time.perf_counter() - start))
        end = end or time.perf_counter() + seconds  # the first one warms up
    return best


def bytes_per_step(config: Config, B: int, T: int, itemsize: int) -> int:
    """Read for one new token of each of B texts of length T: all matrices once, and every text's own cache."""
    return config.matrix_params * itemsize + config.kv_bytes(B, T, itemsize)


def plain_attention(q, k, v):
    """Causal attention as on paper, (B, H, T, D) each: all B*H*T*T scores stand in memory, several times over."""
    T = q.shape[2]
    hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)  # (B, H, T, T)
    return scores.softmax(-1) @ v


# ---------------------------------------------------------------------------------------------------------------------
# Plumbing: shapes, steps, tables


def shape_of(preset: str, n_layer=None, n_embd=None, seq_len=None, vocab_size: int = 4096) -> Config:
    """A preset, or one of another width with heads and feed-forward in proportion."""
    if preset not in PRESETS:
        raise UserError(f"--preset is one of {', '.join(PRESETS)}; not {preset!r}.")
    base = PRESETS[preset].replace(vocab_size=pad_vocab(vocab_size))
    sizes = {"n_layer": n_layer, "seq_len": seq_len}
    if n_embd is not None:
        if n_embd < 1 or n_embd % base.head_dim:
            raise UserError(f"--n-embd is {n_embd}; here it has to be a multiple of the head's {base.head_dim}.")
        heads = n_embd // base.head_dim
        kv = heads // (base.n_head // base.n_kv_head) if heads % (base.n_head // base.n_kv_head) == 0 else heads
        sizes |= {"n_embd": n_embd, "n_head": heads, "n_kv_head": kv,
                  "ffn_dim": pad_vocab(round(base.ffn_dim * n_embd / base.n_embd))}  # fmt: skip
    return base.replace(**{name: size for name, size in sizes.items() if size is not None})


def make_model(config: Config, device: torch.device, dtype: torch.dtype, recompute: str = "none") -> Transformer:
    """In training mode: weights in float32, activations in dtype."""
    model = Transformer(config).init_weights().to(device)
    model.compute_dtype, model.recompute = dtype, recompute
    return model


def random_tokens(config: Config, B: int, T: int, device: torch.device, seed: int = 0):
    """Inputs and targets (B, T). What they say does not change how long a step takes."""
    ids = torch.randint(config.vocab_size, (B, T + 1), generator=torch.Generator().manual_seed(seed)).to(device)
    return ids[:, :-1], ids[:, 1:].contiguous()


def stepper(model: Transformer, optimizer, x, y) -> Callable:
    """A training step without arguments."""

    def step():
        loss = model(x, y)[0].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def dtypes_of(name: str, device: torch.device) -> list[torch.dtype]:
    """auto: float32 and the machine's fast one."""
    return list(dict.fromkeys([torch.float32] * (name == "auto") + [pick_dtype(name, device)]))


def process_gb() -> float | None:
    """The most memory this process had so far; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def cpu_name() -> str:
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    elif sys.platform == "darwin":
        names = [subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True).stdout]
    else:
        names = []
    return (names + [platform.processor() or platform.machine()])[0].strip()


def show(title: str, rows: list[dict]) -> None:
    """A table on standard output: the keys of the rows are its columns."""
    from rich.console import Console
    from rich.table import Table

    def text(value) -> str:
        if isinstance(value, dict):  # of spread
            return f"{text(value['median'])} ({text(value['low'])}-{text(value['high'])})"
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return "-" if value is None else f"{value:,}" if isinstance(value, int) else str(value)

    table = Table(*[name.replace("_", " ") for name in rows[0]], title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(text, row.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def report(result: dict, as_json: bool, title: str, rows: list[dict]) -> dict:
    if as_json:
        print(json.dumps(result))
    else:
        show(title, rows)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# What is said of training (and of the cache), each measured: a dict with the claim, a table and what came out


def claim_mixed_precision(device: torch.device, quick: bool) -> dict:
    config, B = PRESETS["nano" if quick else "micro"].replace(vocab_size=4096), 8 if quick else 16
    x, y = random_tokens(config, B, config.seq_len, device)
    jobs = {}
    for dtype in dict.fromkeys((torch.float32, pick_dtype("auto", device), torch.bfloat16)):
        model = make_model(config, device, dtype)
        jobs[NAMES[dtype]] = stepper(model, build_optimizer(model, "adamw"), x, y)
    times = alternate(jobs, 3 if quick else 8, device)
    rows = [{"precision": n, "ms_per_step": spread(s), "tok_per_s": x.numel() / median(s),
             "speedup": median(times["fp32"]) / median(s)} for n, s in times.items()]  # fmt: skip
    fast = max(rows[1:], key=lambda row: row["speedup"])
    return {"claim": "Mixed precision trains 2 to 3 times as fast", "rows": rows,
            "finding": f"{fast['precision']} is {fast['speedup']:.2f} times as fast as fp32"}  # fmt: skip


def claim_flash_attention(device: torch.device, quick: bool) -> dict:
    dtype, rows, last = pick_dtype("auto", device), [], None
    for T in (128, 256, 512) if quick else (128, 256, 512, 1024, 2048):
        q, k, v = (torch.randn(1, 8, T, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))

        def run(attention, q=q, k=k, v=v):
            torch.autograd.grad(attention(q, k, v).sum(), (q, k, v))

        def flash(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        jobs = {"plain": lambda run=run: run(plain_attention), "flash": lambda run=run, flash=flash: run(flash)}
        times = alternate(jobs, 5 if quick else 9, device)
        row = {"T": T, "plain_ms": spread(times["plain"]), "flash_ms": spread(times["flash"]),
               "speedup": median(times["plain"]) / median(times["flash"])}  # fmt: skip
        row |= {f"{name}_mb": peak_bytes(job, device, (q, k, v)) / 1e6 for name, job in jobs.items()}
        for name in ("plain", "flash"):
            row[f"{name}_growth"] = row[f"{name}_ms"]["median"] / last[f"{name}_ms"]["median"] if last else None
        rows.append(row)
        last = row
    return {"claim": "Flash attention is 2 to 4 times as fast, its memory linear, its time still quadratic",
            "rows": rows, "finding": f"at {last['T']} tokens {last['speedup']:.2f} times as fast, in "
            f"{last['flash_mb'] / last['plain_mb']:.1%} of the memory"}  # fmt: skip


def markov_batches(V: int, B: int, T: int, seed: int) -> Iterator:
    """An endless text to learn: each token is followed by one of four, which ones is drawn once."""
    generator = torch.Generator().manual_seed(seed)
    follows = torch.randint(V, (V, 4), generator=generator)
    while True:
        ids = torch.randint(V, (B, T + 1), generator=generator)
        for t in range(T):
            ids[:, t + 1] = follows[ids[:, t], torch.randint(4, (B,), generator=generator)]
        yield ids[:, :-1], ids[:, 1:].contiguous()


def warmup_run(config: Config, lr: float, warmup_steps: int, steps: int, batches: Iterator, seed: int, device) -> dict:
    """A short training run: how far the loss climbs above the lowest so far, the largest gradient, the last loss."""
    model = Transformer(config).init_weights(seed).to(device)
    optimizer, losses, norms = build_optimizer(model, "adamw", lr), [], []
    for step in range(steps):
        x, y = (t.to(device) for t in next(batches))
        loss = model(x, y)[0].mean()
        loss.backward()
        norms.append(torch.nn.utils.get_total_norm(p.grad for p in model.parameters()).item())
        optimizer.set_lr(lr * min(1.0, (step + 1) / max(1, warmup_steps)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    rise = max(loss - min(losses[: i + 1]) for i, loss in enumerate(losses))
    return {"largest_rise": rise, "largest_grad_norm": max(norms), "last_loss": losses[-1]}


def claim_warmup(device: torch.device, quick: bool, data: str | None = None) -> dict:
    config, steps, rows = PRESETS["nano"].replace(vocab_size=256, seq_len=64, n_layer=2 if quick else 4), 60, []
    tokens = Tokens(data, "train") if data else None
    if tokens:
        config = config.replace(vocab_size=pad_vocab(tokens.vocab_size))
    for lr in (0.01, 0.1):
        for warmup_steps in (0, steps // 3):
            runs = []
            for seed in (0,) if quick else (0, 1, 2):
                batches = markov_batches(256, 16, 64, seed)
                if tokens:
                    batches = (tokens.batch(16 * i, 16, 64, seed) for i in itertools.count())
                runs.append(warmup_run(config, lr, warmup_steps, steps, batches, seed, device))
            facts = {key: spread([run[key] for run in runs], 1.0) for key in runs[0]}
            rows.append({"lr": lr, "warmup_steps": warmup_steps} | facts)
    cold, warm = (row["largest_rise"]["median"] for row in rows[-2:])
    return {"claim": "Warm-up prevents early instability", "rows": rows, "finding": f"at a rate of {lr} the loss "
            f"climbs back by {cold:.2f} nats without it, by {warm:.2f} with it"}  # fmt: skip


def claim_recompute(device: torch.device, quick: bool) -> dict:
    config, B = PRESETS["nano" if quick else "micro"].replace(vocab_size=4096), 8 if quick else 16
    x, y = random_tokens(config, B, config.seq_len, device)
    jobs, peaks = {}, {}
    for name in ("none", "selective", "block"):
        model = make_model(config, device, pick_dtype("auto", device), name)

        def job(model=model):
            model(x, y)[0].mean().backward()
            model.zero_grad(set_to_none=True)

        jobs[name], peaks[name] = job, peak_bytes(job, device, (*model.parameters(), x, y))
    times = alternate(jobs, 2 if quick else 5, device)
    rows = [{"recompute": n, "ms_forward_backward": spread(s), "time": median(s) / median(times["none"]),
             "peak_mb": peaks[n] / 1e6, "memory": peaks[n] / peaks["none"]} for n, s in times.items()]  # fmt: skip
    return {"claim": "Gradient checkpointing trades time for memory", "rows": rows,
            "finding": f"block: {rows[-1]['time'] - 1:+.0%} time, {rows[-1]['memory'] - 1:+.0%} memory"}  # fmt: skip


def claim_kv_cache(device: torch.device, quick: bool) -> dict:
    config, rows, dtype = PRESETS["nano" if quick else "micro"].replace(vocab_size=4096), [], pick_dtype("auto", device)
    model = make_model(config, device, dtype).to(dtype).eval()
    for T in (64, 256) if quick else (64, 128, 256, 512, 1024):
        x, _ = random_tokens(config, 1, T, device)
        cache = Cache(config, 1, T, device, dtype)
        with torch.inference_mode():
            model(x[:, :-1], cache=cache, output="last")

            def cached(x=x, cache=cache, T=T):
                cache.rewind(T - 1)
                model(x[:, -1:], cache=cache, output="last")

            jobs = {"cache": cached, "none": lambda x=x: model(x, output="last")}
            times = alternate(jobs, 5 if quick else 15, device)
        rows.append({"T": T, "ms_with_cache": spread(times["cache"]), "ms_without": spread(times["none"]),
                     "speedup": median(times["none"]) / median(times["cache"]),
                     "cache_mb": cache.nbytes / 1e6})  # fmt: skip
    return {"claim": "Without the KV cache, all earlier tokens are computed again", "rows": rows,
            "finding": f"for a token after {rows[-1]['T'] - 1} others: {rows[-1]['speedup']:.1f} times"}  # fmt: skip


CLAIMS = {"mixed-precision": claim_mixed_precision, "flash-attention": claim_flash_attention, "warmup": claim_warmup,
          "recompute": claim_recompute, "kv-cache": claim_kv_cache}  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Commands

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True)
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")]
Preset = Annotated[str, typer.Option(help=f"Shape of the model: {', '.join(PRESETS)}.")]


@app.command()
def machine(device: Device = "auto", as_json: Json = False) -> dict:
    """The two limits of this machine: matrix products and memory. Kept in out/machine.json."""
    where = pick_device(device)
    # float16 products on a CPU run hundreds of times slower than the others: nobody trains so
    dtypes = [torch.float32, torch.bfloat16] + [torch.float16] * (where.type != "cpu")
    facts = {"device": where.type, "name": torch.cuda.get_device_name(where) if where.type == "cuda" else cpu_name(),
             "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
             "time": time.strftime("%Y-%m-%dT%H:%M:%S"),
             "flops": {NAMES[dtype]: peak_flops(where, dtype, 1.0) for dtype in dtypes},
             "read_gb_per_s": read_rate(where, 1.0) / 1e9}  # fmt: skip
    Path("out").mkdir(exist_ok=True)
    write_text(Path("out/machine.json"), json.dumps(facts, indent=1) + "\n")
    rows = [{"limit": f"matrix products, {n}", "rate": f / 1e9, "unit": "GFLOP/s"} for n, f in facts["flops"].items()]
    rows.append({"limit": "reading memory", "rate": facts["read_gb_per_s"], "unit": "GB/s"})
    return report(facts, as_json, f"{facts['name']}, {facts['threads']} threads, torch {facts['torch']}", rows)


@app.command()
def train(
    preset: Preset = "micro",
    n_layer: Annotated[int | None, typer.Option(help="Layers, instead of the preset's.")] = None,
    n_embd: Annotated[int | None, typer.Option(help="Width; heads and feed-forward follow.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a sequence.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 32,
    vocab_size: Annotated[int, typer.Option(help="Tokens in the vocabulary.")] = 4096,
    dtype: Annotated[str, typer.Option(help="auto (fp32 and the machine's fast one), fp32, bf16 or fp16.")] = "auto",
    optimizer: Annotated[str, typer.Option(help="muon or adamw.")] = "muon",
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="torch.compile the blocks.")] = False,
    steps: Annotated[int, typer.Option(help="Steps to time, after one that does not count.")] = 10,
    vs: Annotated[str | None, typer.Option(help="transformers: its model of the same shape, in turns.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> dict:
    """The speed of a training step on random tokens, against the peak that was measured just before."""
    if vs not in (None, "transformers"):
        raise UserError(f"--vs knows transformers, not {vs!r}.")
    if steps < 1 or batch < 1:
        raise UserError("--steps and --batch have to be at least 1.")
    where, config = pick_device(device), shape_of(preset, n_layer, n_embd, seq_len, vocab_size)
    x, y = random_tokens(config, batch, config.seq_len, where)
    rows = []
    for kind in dtypes_of(dtype, where):
        model = make_model(config, where, kind)
        if compiled:
            model.compile_blocks()
        optim, peak = build_optimizer(model, "adamw" if vs else optimizer), peak_flops(where, kind)
        jobs = {"octavo": stepper(model, optim, x, y)} | ({vs: transformers_step(config, kind, x, where)} if vs else {})
        times = alternate(jobs, steps, where)
        for name, seconds in times.items():
            speed = x.numel() / median(seconds)
            rows.append({"model": name, "dtype": NAMES[kind], "ms_per_step": spread(seconds), "tok_per_s": speed,
                         "mfu": speed * config.flops_per_token(config.seq_len) / peak, "peak_tflops": peak / 1e12,
                         "speedup": median(times[vs]) / median(seconds) if vs else None})  # fmt: skip
    gb = torch.cuda.max_memory_allocated(where) / 1e9 if where.type == "cuda" else process_gb()
    facts = {"params": config.n_params(), "batch": batch, "seq_len": config.seq_len, "compile": compiled,
             "optimizer": "adamw" if vs else optimizer, "mem_gb": gb, "rows": rows}  # fmt: skip
    title = f"{config.n_params() / 1e6:.1f}M parameters, {batch} x {config.seq_len} tokens, {facts['optimizer']}"
    return report(facts, as_json, title + (f"; {gb:.2f} GB at most" if gb else ""), rows)


def transformers_step(config: Config, dtype: torch.dtype, x, device: torch.device) -> Callable:
    """A training step of transformers' model of this shape, as its users write it: autocast, fused AdamW."""
    try:
        from transformers import Qwen3Config, Qwen3ForCausalLM
    except ImportError:
        raise UserError("transformers is not installed: pip install -r requirements-dev.txt.") from None
    model = Qwen3ForCausalLM(Qwen3Config.from_dict(config.to_hf())).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def step():
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            loss = model(input_ids=x, labels=x, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


@app.command()
def decode(
    folder: Annotated[Path | None, typer.Argument(help="Checkpoint folder; without one, random weights.")] = None,
    preset: Preset = "micro",
    batch: Annotated[list[int], typer.Option(help="Texts at once; several times for several.")] = [1, 8],  # noqa: B006
    prompt: Annotated[int, typer.Option(help="Tokens that are read before.")] = 128,
    new: Annotated[int, typer.Option(help="Tokens to write.")] = 64,
    dtype: Annotated[str, typer.Option(help="auto (fp32 and the machine's fast one), fp32, bf16 or fp16.")] = "auto",
    rounds: Annotated[int, typer.Option(help="Times to do it all.")] = 3,
    device: Device = "auto",
    as_json: Json = False,
) -> dict:
    """Tokens per second, with the cache and without, and how much of the memory's bandwidth that is."""
    if min(*batch, prompt, new, rounds) < 1:
        raise UserError("--batch, --prompt, --new and --rounds have to be at least 1.")
    where = pick_device(device)
    config, rows, bandwidth = None if folder else shape_of(preset), [], read_rate(where)
    few = max(1, new // 8)  # without the cache: enough for a median

    for kind in dtypes_of(dtype, where):
        model = load_model(folder, where, kind) if folder else make_model(config, where, kind).to(kind).eval()
        config = model.config
        for B in batch:
            x, _ = random_tokens(config, B, prompt, where)
            cache = Cache(config, B, prompt + new, where, kind)

            @torch.inference_mode()
            def prefill(model=model, x=x, cache=cache):
                cache.clear()
                return model(x, cache=cache, output="last")[0].argmax(-1)

            @torch.inference_mode()
            def go_on(model=model, x=x, cache=cache):
                cache.rewind(prompt)
                ids = x[:, -1:]
                for _ in range(new):
                    ids = model(ids, cache=cache, output="last")[0].argmax(-1)  # (B, 1), never waited for

            @torch.inference_mode()
            def anew(model=model, x=x):
                ids = x
                for _ in range(few):
                    ids = torch.cat((ids, model(ids, output="last")[0].argmax(-1)), 1)

            times = alternate({"prefill": prefill, "cache": go_on, "none": anew}, rounds, where)
            steps = [s / new for s in times["cache"]]
            rate = bytes_per_step(config, B, prompt + new // 2, kind.itemsize) / median(steps)
            rows.append({"dtype": NAMES[kind], "batch": B, "prefill_tok_per_s": B * prompt / median(times["prefill"]),
                         "ms_per_token": spread(steps), "tok_per_s": B / median(steps),
                         "without_cache": B * few / median(times["none"]), "gb_per_s": rate / 1e9,
                         "of_bandwidth": rate / bandwidth})  # fmt: skip
    facts = {"params": config.n_params(), "prompt": prompt, "new": new, "read_gb_per_s": bandwidth / 1e9, "rows": rows}
    title = f"{config.n_params() / 1e6:.1f}M parameters, {new} tokens after {prompt}"
    title += f"; memory reads {bandwidth / 1e9:.1f} GB/s (above 1: the weights stay in the caches)"
    return report(facts, as_json, title, rows)


@app.command()
def claims(
    names: Annotated[list[str] | None, typer.Argument(help=f"Which: {', '.join(CLAIMS)}; all by default.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller and rougher.")] = False,
    data: Annotated[str | None, typer.Option(help="Data folder for the warm-up's runs; default: made up.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> dict:
    """What is said of training and of the cache, measured on this machine."""
    from rich.progress import track

    where, results = pick_device(device), {}
    if unknown := set(names or ()) - set(CLAIMS):
        raise UserError(f"There is no claim {min(unknown)!r}; there are {', '.join(CLAIMS)}.")
    for name in track(names or list(CLAIMS), "claims", console=console()):
        start = time.perf_counter()
        results[name] = CLAIMS[name](where, quick, **({"data": data} if name == "warmup" else {}))
        results[name]["seconds"] = time.perf_counter() - start
        say(f"{name}: {results[name]['finding']}")
    if as_json:
        print(json.dumps(results))
    else:
        for result in results.values():
            show(f"{result['claim']}: {result['finding']}", result["rows"])
    return results


@app.command()
def plot(
    folders: Annotated[list[str], typer.Argument(help="Checkpoint folders: each one a line.")],
    of: Annotated[list[str], typer.Option(help="What to show of metrics.jsonl; several times: one panel each.")] = ["loss"],  # noqa: B006
    out: Annotated[Path, typer.Option(help="Picture to write (needs matplotlib).")] = Path("out/plot.png"),
    as_json: Json = False,
) -> dict:
    """What runs logged over their steps, side by side."""
    logs = {folder: read_metrics(folder) for folder in folders}
    known = sorted({name for log in logs.values() for record in log for name, value in record.items() if isinstance(value, (int, float))})
    if unknown := set(of) - set(known):
        raise UserError(f"No run logged {min(unknown)!r}; they logged {', '.join(known)}.")
    lines = {(name, folder): [(r["step"], r[name]) for r in log if name in r] for name in of for folder, log in logs.items()}
    rows = []
    for (name, folder), line in lines.items():
        if line:
            values = [value for _, value in line]
            rows.append({"metric": name, "run": folder, "steps": line[-1][0], "first": values[0], "lowest": min(values),
                         "highest": max(values), "last": values[-1]})  # fmt: skip
    draw(lines, of, out)
    return report({"rows": rows}, as_json, "over the steps", rows)


def read_metrics(folder: str) -> list[dict]:
    try:
        return [json.loads(line) for line in open(find_checkpoint(folder) / "metrics.jsonl", encoding="utf-8")]
    except (OSError, ValueError):
        raise UserError(f"{folder} has no metrics.jsonl that can be read: it is no folder of a run.") from None


def draw(lines: dict[tuple[str, str], list], panels: list[str], path: Path) -> None:
    """One panel for each metric, below one another, over the same steps."""
    try:
        import matplotlib
    except ImportError:
        return say("(pip install matplotlib, and this is also drawn as a picture)")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(panels), figsize=(7, 2.4 * len(panels)), sharex=True, squeeze=False)
    for panel, axis in zip(panels, axes[:, 0], strict=True):
        for (name, folder), line in lines.items():
            if name == panel and line:
                axis.plot(*zip(*line, strict=True), label=folder, lw=1, marker="o" if len(line) < 20 else None)
        axis.set_ylabel(panel)
        axis.legend()
    axes[-1, 0].set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)
    say(f"{path} written.")


if __name__ == "__main__":
    run_app(app)
