"""Measure how fast this machine is, and how much of that a model gets out of it.

Two limits rule a language model: the rate of matrix products (training, prefill) and the rate at which memory
is read (decoding: each token reads all weights). Both are measured here a moment before they are needed, and
every speed stands beside its limit: MFU (model FLOPs utilisation, Chowdhery et al. 2022, 2204.02311, appendix
B) for training, a fraction of the bandwidth for decoding. Speeds are medians, beside them the fastest and the
slowest; two things that are compared take turns, so that whatever else the machine does meets both. In the
race with transformers both sides keep weights in float32, multiply in --dtype (theirs by autocast), update
with AdamW, and are both compiled or both not.

    python bench.py machine                       # the two limits
    python bench.py train --preset mini           # a training step, in fp32 and in bf16 where that is faster
    python bench.py train --vs transformers       # ... next to transformers' model of the same shape
    python bench.py decode out/python             # tokens per second, with the cache and without
    python bench.py claims                        # what is often said of training, measured here
    python bench.py plot out/sft out/dpo          # what runs logged, side by side: a table and a picture
    python bench.py xz data/python                # what a compressor makes of the text: the number to beat
    python bench.py sizes llama-2-7b              # parameters, bytes and operations of the presets
    python bench.py context                       # texts longer than those of the training
    python train.py --set position=alibi --out out/alibi    # or learned, or none: to be read beside it
    python bench.py context out/python out/alibi

A model that was trained on at a greater length is read beside the others, too: `python train.py --init
out/python --seq-len 1024 --max-steps 60 --set 'rope_scaling={"rope_type": "linear", "factor": 4}'`. YaRN also
needs "original_max_position_embeddings": 256 there.

Left out: profiles of single operators (torch.profiler has them); caches that forget (sample.py has one). So
`context` reads a window as a mask, and first tokens that stay visible beyond it at their true distance.
Interpolation: Chen et al. 2023 (2306.15595). NTK-aware, YaRN: Peng et al. 2023 (2309.00071). ALiBi: Press et
al. 2021 (2108.12409). Sinks: Xiao et al. 2023 (2309.17453). The needle: Kamradt 2023.
"""

import copy
import itertools
import json
import lzma
import math
import platform
import re
import string
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from statistics import median
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves this folder out
from model import (  # before torch: it says how OpenMP's threads wait
    DTYPES, PRESETS, Cache, Config, Tokens, Transformer, UserError, build_optimizer, check, check_memory,
    config_to_hf, count_params, count_weights, flops_per_token, is_a, load_model, load_tokenizer, peak_flops,
    pick_device, pick_dtype, progress, read_metrics, read_tokenizer, resize, run_app, say, synchronize,
)

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# B batch, T tokens of a sequence, H heads, D head_dim, V vocabulary, N tokens of a value.

NAMES = {dtype: name for name, dtype in DTYPES.items()}

# ---- The idea: how to measure ------------------------------------------------------------------------------

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

def peak_bytes(job: Callable, known=()) -> int:
    """Measure the most memory that a job takes at one time, beyond what was there before."""
    with LiveBytes(known) as live:
        job()
    return live.peak

def read_rate(device: torch.device) -> float:
    """Measure the bytes per second that memory gives: the sum of an array far larger than any cache."""
    x = torch.ones(2**30 if device.type == "cuda" else 2**27, device=device)  # float32: 4 GiB, 512 MiB
    return x.nbytes / min(alternate({"read": x.sum}, 20, device)["read"])

def bytes_per_step(config: Config, B: int, T: int, itemsize: int) -> int:
    """Count the bytes read for one token of B texts of length T: all matrices once, and each text's cache."""
    heads, key, value = config.cached
    cache = B * T * config.n_layer * heads * (key + value)  # model.Cache keeps what has left a window, too
    return (count_weights(config)[2] + cache) * itemsize

def cache_bytes(config: Config, T: int, itemsize: int = 2) -> int:
    """Count the bytes of a cache for a text of T tokens that forgets what has left a layer's window."""
    heads, key, value = config.cached
    kept = sum(min(T, (w or T) + config.global_tokens) for w in config.windows)  # tokens, in all layers
    return heads * (key + value) * kept * itemsize

def plain_attention(q, k, v):
    """Attend causally as on paper, (B, H, T, D) each: all B*H*T*T scores stand in memory, several times."""
    T = q.shape[2]
    hidden = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, H, T, T)
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v

# ---- Plumbing: models, steps, tables -----------------------------------------------------------------------

def make_model(config: Config, device: torch.device, dtype: torch.dtype) -> Transformer:
    """Make a model to train: weights in float32, activations in dtype."""
    check_memory(config, device, 16)  # bytes a parameter: weights, gradients, two moments
    model = Transformer(config).init_weights().to(device)
    model.compute_dtype = dtype
    return model

def random_tokens(config: Config, B: int, T: int, device: torch.device):
    """Draw inputs and targets (B, T). What they say does not change how long a step takes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (B, T + 1), generator=generator).to(device)
    return ids[:, :-1], ids[:, 1:].contiguous()

def stepper(loss: Callable, optimizer) -> Callable:
    """Make a training step without arguments."""

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step

def transformers_step(config: Config, dtype: torch.dtype, compiled: bool, x) -> Callable:
    """Make a step of transformers' model of this shape, as its users write it."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise UserError("transformers is not installed: pip install -r requirements-dev.txt.") from None
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config_to_hf(config)))
    model = model.to(x.device).float().train()
    if compiled:
        model.compile()

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

def check_counts(**counts: int) -> None:
    """Refuse numbers of things that are below one, or more than a machine holds at once."""
    for name, n in counts.items():
        check(1 <= n <= 2**22, f"--{name.replace('_', '-')} is {n}; it has to be between 1 and {2**22}.")

def cpu_name() -> str:
    """Name the processor, as far as the system does."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", path.read_text()) if path.exists() else None
    return found[1] if found else platform.machine()

def in_words(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):  # a value and what qualifies it: the ends of a spread, say
        first, *rest = map(in_words, value.values())
        return f"{first} ({'-'.join(rest)})"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if is_a(value, int) else str(value)

def show(title: str, rows: list[dict]) -> None:
    """Print a table on standard output: the keys of the rows are its columns."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*[name.replace("_", " ") for name in rows[0]], title=title, title_justify="left")
    for row in rows:
        table.add_row(*map(in_words, row.values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)

def report(facts: dict, as_json: bool) -> dict:
    """Print what was found: as JSON, or its rows as a table and the rest as the title."""
    if as_json:
        print(json.dumps(facts))
    else:
        rest = [f"{name.replace('_', ' ')} {in_words(x)}" for name, x in facts.items() if name != "rows"]
        show(", ".join(rest), facts["rows"])
    return facts

# ---- What is said of training, each measured -> rows of a table, and what came out -------------------------
# (that mixed precision is faster: `train` shows it; what the cache of keys and values saves: `decode`)

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
            row[f"{name}_mb"] = peak_bytes(job, (q, k, v)) / 1e6
        rows.append(row)
    memory = row["flash_mb"] / row["plain_mb"]
    return rows, f"at {T} tokens {row['speedup']:.2f} times as fast, in {memory:.1%} of the memory"

def counting_batches(V: int, B: int, T: int, seed: int) -> Iterator:
    """Make up an endless text to learn: each row counts up, modulo V, by a step of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        start, step = torch.randint(V, (2, B, 1), generator=generator)
        ids = (start + step * torch.arange(T + 1)) % V  # (B, T + 1)
        yield ids[:, :-1], ids[:, 1:].contiguous()

def warmup_run(config: Config, lr: float, warmup_steps: int, batches: Iterator, seed: int, device) -> dict:
    """Train on some batches -> the loss's largest climb above its lowest so far, and its end."""
    model = Transformer(config).init_weights(seed).to(device)
    optimizer = build_optimizer(model, "adamw")
    losses = []
    for step, (x, y) in enumerate(batches):
        loss = model(x.to(device), y.to(device))[0].mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.set_lr(lr * min(1.0, (step + 1) / max(1, warmup_steps)))
        optimizer.step()
        optimizer.zero_grad()
    lowest = itertools.accumulate(losses, min)
    rise = max(loss - least for loss, least in zip(losses, lowest, strict=True))
    return {"largest_rise": rise, "last_loss": losses[-1]}

def claim_warmup(device: torch.device, quick: bool):
    config = resize("nano", n_layer=1 if quick else 4, seq_len=64, vocab_size=256)
    steps = 30 if quick else 60
    rows = []
    for lr, warmup_steps in itertools.product((0.01, 0.1), (0, steps // 3)):
        runs = []
        for seed in range(1 if quick else 3):
            batches = itertools.islice(counting_batches(256, 16, 64, seed), steps)
            runs.append(warmup_run(config, lr, warmup_steps, batches, seed, device))
        facts = {name: spread([run[name] for run in runs], 1.0) for name in runs[0]}
        rows.append({"lr": lr, "warmup_steps": warmup_steps} | facts)
    cold, warm = (row["largest_rise"]["median"] for row in rows[-2:])
    return rows, f"at a rate of {lr} the loss climbs back by {cold:.2f} nats without, by {warm:.2f} with it"

def claim_recompute(device: torch.device, quick: bool):
    config = resize("nano" if quick else "micro", vocab_size=4096)
    x, y = random_tokens(config, 8 if quick else 16, config.seq_len, device)
    jobs, peaks = {}, {}
    for name in ("none", "block"):
        model = make_model(config, device, pick_dtype("auto", device))
        model.recompute = name == "block"

        def job(model=model):
            model(x, y)[0].mean().backward()
            model.zero_grad(set_to_none=True)

        jobs[name] = job
        peaks[name] = peak_bytes(job, (*model.parameters(), x, y))
    times = alternate(jobs, 2 if quick else 5, device)
    rows = [{"recompute": n, "ms_forward_backward": spread(s), "time": median(s) / median(times["none"]),
             "peak_mb": peaks[n] / 1e6, "memory": peaks[n] / peaks["none"]} for n, s in times.items()]
    return rows, f"block: {rows[-1]['time'] - 1:+.0%} time, {rows[-1]['memory'] - 1:+.0%} memory"

CLAIMS = {
    "flash-attention": (claim_flash_attention, "Flash attention is 2 to 4 times as fast, its memory linear, "
                        "its time still quadratic"),
    "warmup": (claim_warmup, "Warm-up prevents early instability"),
    "recompute": (claim_recompute, "Gradient checkpointing trades time for memory"),
}

# ---- Texts longer than those of the training ---------------------------------------------------------------

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # where in a text a needle lies

def ways_to_read(config: Config, T: int, length: int) -> dict[str, dict]:
    """Name the ways to read texts of a length -> {way: what it changes in the config}.

    A plain RoPE model that was trained at T is read in all ways, any other one as its config says.
    """
    c = config
    if c.position != "rope" or c.rope_scaling or any(c.windows) or c.seq_len != T:
        return {"as it is": {}}
    factor = length / T
    return {
        "as it is": {},
        "interpolation": {"rope_scaling": {"rope_type": "linear", "factor": factor}},
        "NTK-aware": {"rope_scaling": {"rope_type": "ntk", "factor": factor}},
        "YaRN": {"rope_scaling": {"rope_type": "yarn", "factor": factor,
                                  "original_max_position_embeddings": T}},
        "window": {"window": T},
        "window, sinks": {"window": T, "global_tokens": 4},
    }

def reconfigured(model: Transformer, **changes) -> Transformer:
    """Give the same weights another config, one that needs no others."""
    other = copy.copy(model)
    other.config = model.config.replace(**changes)
    return other

def losses_of(model: Transformer, x, y) -> torch.Tensor:
    """Compute the loss of each token, (B, T) -> (B, T) on the CPU, a few rows at a time."""
    device = next(model.parameters()).device
    few = max(1, 8192 // x.shape[1])
    parts = zip(x.to(device).split(few), y.to(device).split(few), strict=True)
    return torch.cat([model(*part)[0].cpu() for part in parts])

def sum_up_losses(losses, T: int, longest: int) -> dict[str, float | None]:
    """Average the losses of texts (B, length): of all tokens, of the last T, and in ranges of positions.

    None stands where a text has no such tokens.
    """
    length = losses.shape[1]

    def mean(start, end):
        part = losses[:, start:end]
        return part.mean().item() if 0 < end - start == part.shape[1] else None

    loss = mean(0, length)
    ppl = None if loss is None else math.exp(min(loss, 50))
    edges = [0, T // 4, *(T * 2**i for i in range((longest // T).bit_length()))]
    ranges = {f"{start}-{end}": mean(start, end) for start, end in itertools.pairwise(edges)}
    return {"loss": loss, "ppl": ppl, f"last_{T}": mean(length - T, length)} | ranges

def hide_needle(tokens: Tokens, tokenizer, length: int, seed: int):
    """Hide a line `KEY_QRTZ = 4711` in a text, and ask for its value at the end -> ids (B, length + 1), N.

    A row for each depth, and a last one that has more text in the line's place, at the front: what stands
    before the question is the same. The value is the last N tokens of each.
    """
    rng = np.random.default_rng(seed)
    key = "".join(rng.choice(list(string.ascii_uppercase), 4))
    texts = (f"\nKEY_{key} =", f" {rng.integers(1000, 10_000)}", "\n")
    ask, value, end = (tokenizer.encode(text) for text in texts)
    line = ask + value + end
    room = length + 1 - len(ask + value)  # what stands before the question
    check(room > len(line), f"A text of {length} tokens has no room for a needle of {len(line)} and a "
          "question: --needles 0 leaves them out.")
    hay = tokens.read(int(rng.integers(tokens.n)), 2 * room)  # documents, whose ends are taken out
    hay = hay[hay != tokens.eot_id][:room].tolist()
    around = hay[len(line) :]
    places = [round(depth * len(around)) for depth in DEPTHS]
    rows = [around[:place] + line + around[place:] + ask + value for place in places]
    return torch.tensor([*rows, hay + ask + value]), len(value)

def find_needle(model: Transformer, ids, N: int):
    """Read the texts of `hide_needle` -> two numbers for each depth, (depths, 2).

    By how much the line changes the value's loss, in nats a token, and whether greedy decoding finds it.
    """
    device = next(model.parameters()).device
    B, T = ids.shape[0], ids.shape[1] - 1
    at = torch.arange(B)[:, None] * T + torch.arange(T - N, T)  # (B, N)
    logits = model(ids[:, :-1].to(device), at=at.flatten().to(device))[0].float().cpu()  # (B*N, V)
    targets = ids[:, -N:].flatten()
    losses = F.cross_entropy(logits, targets, reduction="none").view(B, N).mean(1)
    found = (logits.argmax(-1) == targets).view(B, N).all(1)
    return torch.stack((losses - losses[-1], found.float()), 1)[:-1]

# ---- Commands ----------------------------------------------------------------------------------------------

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
    rows = [{"limit": f"matrix products, {n}", "rate": f / 1e9, "unit": "GFLOP/s"} for n, f in flops.items()]
    rows.append({"limit": "reading memory", "rate": bandwidth, "unit": "GB/s"})
    facts = {"device": where.type, "name": name, "threads": torch.get_num_threads()}
    return report(facts | {"torch": torch.__version__, "rows": rows}, as_json)

@app.command()
def train(
    preset: Preset = "micro",
    n_layer: Annotated[int | None, typer.Option(help="Layers, instead of the preset's.")] = None,
    n_embd: Annotated[int | None, typer.Option(help="Width; heads and feed-forward follow.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens of a sequence.")] = None,
    batch: Annotated[int, typer.Option(help="Sequences of a step.")] = 32,
    dtype: Dtype = "auto",
    optimizer: Annotated[str | None, typer.Option(help="muon (the default), or adamw, as in a race.")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the models.")] = False,
    steps: Annotated[int, typer.Option(help="Steps to time, after one that does not count.")] = 10,
    vs: Annotated[str | None, typer.Option(help="transformers: its model of this shape, in turns.")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> dict:
    """Time a training step on random tokens; speed-up: over the first row, or with --vs over transformers."""
    check(vs in (None, "transformers"), f"--vs knows transformers, not {vs!r}.")
    optimizer = optimizer or ("adamw" if vs else "muon")
    check(not vs or optimizer == "adamw", f"transformers has no {optimizer}: leave out --optimizer, or --vs.")
    where = pick_device(device)
    config = resize(preset, n_layer, n_embd, seq_len, vocab_size=4096)
    check_counts(steps=steps, batch=batch, tokens=batch * config.seq_len)
    x, y = random_tokens(config, batch, config.seq_len, where)
    rows, base = [], None
    for kind in dtypes_of(dtype, where):
        model = make_model(config, where, kind)
        if compiled:
            model.compile_blocks()
        update = build_optimizer(model, optimizer)
        jobs = {"octavo": stepper(lambda model=model: model(x, y)[0].mean(), update)}
        if vs:
            jobs[vs] = transformers_step(config, kind, compiled, x)
        peak = peak_flops(where, kind)
        times = alternate(jobs, steps, where)
        base = median(times[vs]) if vs else base or median(times["octavo"])
        for name, seconds in times.items():
            speed = x.numel() / median(seconds)
            rows.append({
                "model": name,
                "dtype": NAMES[kind],
                "ms_per_step": spread(seconds),
                "tok_per_s": speed,
                "mfu": speed * flops_per_token(config) / peak,
                "speedup": base / median(seconds),
            })
    facts = {"params": count_params(config)[0], "batch": batch, "seq_len": config.seq_len}
    return report(facts | {"optimizer": optimizer, "compile": compiled, "rows": rows}, as_json)

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
    check_counts(batch=min(batch), prompt=prompt, new=new, rounds=rounds, tokens=max(batch) * (prompt + new))
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
            rows.append({
                "dtype": NAMES[kind],
                "batch": B,
                "prefill_tok_per_s": speed["prefill"],
                "ms_per_token": spread(times["cache"]),
                "tok_per_s": speed["cache"],
                "without_cache": speed["none"],
                "of_bandwidth": rate / bandwidth,  # above 1: the weights stay in the processor's caches
            })
    facts = {"params": count_params(model.config)[0], "prompt": prompt, "new": new}
    return report(facts | {"read_gb_per_s": bandwidth / 1e9, "rows": rows}, as_json)

@app.command()
def claims(
    names: Annotated[list[str] | None, typer.Argument(help=f"Which: {', '.join(CLAIMS)}; or all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller and rougher.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> dict:
    """Measure what is said of training on this machine."""
    names = names or list(CLAIMS)
    for name in names:
        check(name in CLAIMS, f"There is no claim {name!r}; there are {', '.join(CLAIMS)}.")
    where = pick_device(device)
    results = {}
    for name in names:
        measure, claim = CLAIMS[name]
        rows, finding = measure(where, quick)
        results[name] = {"claim": claim, "rows": rows, "finding": finding}
        say(f"{name}: {finding}")
        if not as_json:
            show(f"{claim}: {finding}", rows)
    if as_json:
        print(json.dumps(results))
    return results

@app.command()
def plot(
    folders: Annotated[list[str], typer.Argument(help="Checkpoint folders: each one a line.")],
    of: Annotated[list[str], typer.Option(help="What to show of metrics.jsonl; a panel each.")] = ("loss",),
    out: Annotated[Path, typer.Option(help="Picture to write (needs matplotlib).")] = Path("out/plot.png"),
    as_json: Json = False,
) -> dict:
    """Show what runs logged over their steps, side by side."""
    lines = {}
    for folder in dict.fromkeys(folders):
        log = Path(folder, "metrics.jsonl")
        check(log.is_file(), f"{folder} has no metrics.jsonl: it is no folder of a run.")
        for record in read_metrics(log):
            numbers = {name: x for name, x in record.items() if is_a(x, float)}
            for name in numbers if "step" in numbers else ():
                steps, values = lines.setdefault((name, folder), ([], []))
                steps.append(numbers["step"])
                values.append(numbers[name])
    known = sorted({name for name, _ in lines})
    for name in of:
        check(name in known, f"No run logged {name!r}; they logged {', '.join(known) or 'nothing'}.")
    panels = {name: {f: lines[name, f] for f in folders if (name, f) in lines} for name in of}
    draw(panels, out)
    rows = []
    for name, runs in panels.items():
        for folder, (steps, values) in runs.items():
            rows.append({"metric": name, "run": folder, "steps": steps[-1], "first": values[0],
                         "lowest": min(values), "highest": max(values), "last": values[-1]})
    return report({"rows": rows}, as_json)

def draw(panels: dict[str, dict[str, tuple]], path: Path, over: str = "step") -> None:
    """Draw a panel for each metric, one below the other: {metric: {run: (steps, values)}}."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return say("(pip install matplotlib, and this is also drawn as a picture)")
    figure = Figure(figsize=(7, 2.4 * len(panels)))
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)
    for (name, runs), axis in zip(panels.items(), axes[:, 0], strict=True):
        for folder, line in runs.items():
            axis.plot(*line, label=folder, lw=1, marker="o" if len(line[0]) < 20 else None)
        axis.set_ylabel(name)
        axis.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))  # beside the lines
    axis.set_xlabel(over)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, bbox_inches="tight")
    except (OSError, ValueError, TypeError) as error:  # no room, no such name, no picture of this kind
        raise UserError(f"{path} could not be drawn ({error}): choose another file.") from None
    say(f"{path} written.")

@app.command()
@torch.inference_mode()
def context(
    folders: Annotated[list[str], typer.Argument(
        help="Checkpoints: a RoPE model of the shortest context is read in several ways, others as they say.",
    )] = ("out/python",),
    data: Annotated[Path, typer.Option(help="Data folder: its validation text.")] = Path("data/python"),
    times: Annotated[int, typer.Option(help="Read 1, 2, 4 ... so many times the shortest context.")] = 8,
    texts: Annotated[int, typer.Option(help="Stretches of text to read.")] = 32,
    needles: Annotated[int, typer.Option(help="Lines to hide at each depth of a text and to ask for.")] = 8,
    picture: Annotated[Path | None, typer.Option("--plot", help="Picture to write (matplotlib).")] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> dict:
    """Measure the loss by position in texts longer than those of the training, and look for needles there.

    All read the same stretches of text, across the borders of documents. A shorter length reads their ends:
    the loss of the last tokens has the same targets at every length. Learned positions end where their table
    does: "-" stands for what a model cannot read.
    """
    check_counts(times=times, texts=texts)
    check(0 <= needles <= 2**22, f"--needles is {needles}; it has to be a number of lines, or 0.")
    where = pick_device(device)
    tokens = Tokens(data, "val")
    models = {folder: open_to_read(folder, data, where) for folder in folders}
    T = min(model.config.seq_len for model in models.values())
    lengths = [T * 2**i for i in range(times.bit_length())]
    longest = lengths[-1]
    check(tokens.n > longest, f"{tokens.path} has {tokens.n} tokens, no more than {longest}: lower --times.")
    starts = np.linspace(0, tokens.n - longest - 1, texts).astype(int)
    x, y = tokens.rows(starts, [longest] * texts, longest, texts)  # (texts, longest)
    tokenizer = load_tokenizer(data)
    hidden = {n: [hide_needle(tokens, tokenizer, n, seed) for seed in range(needles)] for n in lengths}
    readings = [(length, folder, *way) for length in lengths for folder, model in models.items()
                for way in ways_to_read(model.config, T, length).items()]
    rows, found, done = [], [], 0
    with progress("Positions read", sum(length for length, *_ in readings)) as show_progress:
        for length, folder, way, changes in readings:
            model = reconfigured(models[folder], **changes)
            name = {"model": folder, "read": way, "length": length}
            readable = model.config.position != "learned" or length <= model.config.seq_len
            losses = losses_of(model, x[:, -length:], y[:, -length:]) if readable else torch.empty(1, 0)
            rows.append(name | sum_up_losses(losses, T, longest))
            if readable and needles:
                means = torch.stack([find_needle(model, *needle) for needle in hidden[length]]).mean(0)
                pairs = [{"nats": nats, "found": share} for nats, share in means.tolist()]
                found.append(name | {f"depth_{d:g}": pair for d, pair in zip(DEPTHS, pairs, strict=True)})
            done += length
            show_progress(done, f"{folder}, {way}")
    if picture:
        draw(panels_of(rows, T), picture, "tokens")
    facts = {"trained": T, "texts": texts, "needles": found, "rows": rows}
    if as_json:
        return report(facts, True)
    show(f"Loss of {texts} texts: all tokens, the last {T}, and by position", rows)
    if found:
        show("A needle at each depth: change of its value's loss in nats (share found greedily)", found)
    return facts

def open_to_read(folder: str, data: Path, device: torch.device) -> Transformer:
    """Load a model that predicts the next token of this data."""
    model = load_model(folder, device, torch.float32)
    fits = model.config.head == "lm" and model.config.causal
    check(fits, f"{folder} does not predict the next token: it cannot be read here.")
    same = read_tokenizer(Path(folder, "tokenizer.json")) == read_tokenizer(data / "tokenizer.json")
    check(same, f"{folder} and {data} have different tokenizers: prepare the data with that of the model.")
    return model

def panels_of(rows: list[dict], T: int) -> dict[str, dict[str, tuple]]:
    """Arrange the rows of `context` for `draw`: losses by length, and of the longest texts by position."""
    rows = [row for row in rows if row["loss"] is not None]
    longest = rows[-1]["length"]
    by_length, by_position = {}, {}
    for row in rows:
        run = f"{row['model']}, {row['read']}"
        lengths, losses = by_length.setdefault(run, ([], []))
        lengths.append(row["length"])
        losses.append(row[f"last_{T}"])
        by_position.setdefault(run, ([], []))  # without a line, too: a run has one colour in both panels
        if row["length"] == longest:
            ranges = {name: loss for name, loss in row.items() if "-" in name}
            by_position[run] = ([int(name.split("-")[1]) for name in ranges], list(ranges.values()))
    return {f"loss of the last {T}": by_length, f"loss up to a position, of {longest}": by_position}

@app.command()
def sizes(
    names: Annotated[list[str] | None, typer.Argument(help="Presets; or all.")] = None,
    context: Annotated[int, typer.Option(help="Tokens of the text in the cache.")] = 4096,
    vocab_size: Annotated[int, typer.Option(help="Of presets that leave it to the data.")] = 4096,
    as_json: Json = False,
) -> dict:
    """Count what the presets take: parameters, bytes in bf16 (weights, and a text's cache), operations.

    The operations are those of training, forward and backward; a forward pass takes a third of them.
    """
    check_counts(context=context, vocab_size=vocab_size)
    rows = []
    for name in names or list(PRESETS):
        check(name in PRESETS, f"There is no preset {name!r}; there are {', '.join(PRESETS)}.")
        config = PRESETS[name]
        config = config if config.vocab_size else config.replace(vocab_size=vocab_size)
        params, active = count_params(config)
        rows.append({"preset": name, "params": params, "active": active, "weights_gb": 2 * params / 1e9,
                     "cache_gb": cache_bytes(config, context) / 1e9,
                     "gflop_per_token": flops_per_token(config, context) / 1e9})
    return report({"context": context, "rows": rows}, as_json)

@app.command()
def xz(
    folder: Annotated[Path, typer.Argument(help="Data folder.")] = Path("data/python"),
    as_json: Json = False,
) -> dict:
    """Compress validation text with xz -9e, alone and after training text: baselines in bits per byte."""
    val, before = (text_of(Tokens(folder, split)) for split in ("val", "train"))
    before = before[-(2**26) :]  # xz remembers no more
    say(f"Compressing {(len(before) + len(val)) * 2e-6:,.0f} MB, one or two seconds each ...")
    with ThreadPool(2) as pool:  # lzma lets other threads run
        alone, first, both = pool.map(compress, (val, before, before + val))
    rows = []
    for name, size in (("xz", alone), ("xz_primed", both - first)):
        rows.append({"baseline": name, "bytes": size, "bits_per_byte": round(8 * size / max(1, len(val)), 4)})
    return report({"val_bytes": len(val), "primed_bytes": len(before), "rows": rows}, as_json)

def compress(text: bytes) -> int:
    """Compress a text with xz -9e -> bytes."""
    return len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME))

def text_of(tokens: Tokens) -> bytes:
    """Decode a split of a data folder, without the end-of-text tokens: nobody wrote these."""
    tokenizer = load_tokenizer(tokens.folder)
    parts = []
    for start in range(0, tokens.n, 2**20):
        count = min(2**20, tokens.n - start)
        ids = tokens.read(start, count)
        parts.append(tokenizer.decode_bytes(ids[ids != tokens.eot_id].tolist()))
    text = b"".join(parts)
    check(len(text) == tokens.bytes, f"{tokens.path} holds {len(text)} bytes of text where meta.json counts "
          f"{tokens.bytes}: prepare the folder anew.")
    return text

if __name__ == "__main__":
    run_app(app)
