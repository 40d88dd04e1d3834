"""Pretraining on many processes: data, tensor, pipeline, context and expert parallel, on PyTorch's engine.

    torchrun --nproc-per-node 2 parallel.py                                  # DDP on two CPU cores or GPUs
    torchrun --nproc-per-node 4 parallel.py --dp 2 --tp 2 --zero 3           # sharded data, split matrices
    torchrun --nproc-per-node 4 parallel.py --resume out/python --dp 1 --tp 4  # go on, on another layout
    torchrun --nproc-per-node 2 parallel.py --pp 2 --show-schedule           # a pipeline, drawn as it ran
    torchrun --nproc-per-node 8 parallel.py --pp 2 --tp 2 --zero 2           # three axes
    torchrun --nproc-per-node 2 parallel.py --set n_expert=8 --ep 2          # experts on different ranks
    python parallel.py plan --preset llama-2-70b --gpus 512 --tokens 2e12    # layouts, days, dollars
    python parallel.py export out/python                                     # join a stopped run's shards

It trains what train.py trains, from the same data folder to the same checkpoint folder, and each can go on
with the other's, but for --patience, --target-loss and --noise-scale, which end there. The processes form a
grid (`AXES`): tensor parallelism talks in every layer and is innermost, where the links are fast, data
parallelism talks once a step and is outermost.

Part I says each idea in plain lines with bare collectives: column- and row-parallel matrices (Shoeybi et al.
2019, 1909.08053), ZeRO-1, -2 and -3 (Rajbhandari et al. 2019, 1910.02054), pipelines, the pieces of a
sequence, the exchange of experts' rows. Part II has layouts and their costs as formulas. Part III composes
PyTorch's engine for the same: DDP (Li et al. 2020, 2006.15704), fully_shard (FSDP, Zhao et al. 2023,
2304.11277), DTensor and torch.distributed.pipelining. The tests hold the three equal to each other and to one
process. Left out: masked models (train.py has them, with DDP); offload to the host's memory or to disks.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import logging
import math
import os
import sys
import time
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves this folder out
from model import (  # before torch: it says how OpenMP's threads wait
    AUX, KEEP_LOGITS, PRESETS, START, Batches, Config, Linear, Ranks, Run, Tokens, TrainOptions, Transformer,
    UserError, visible,
    barrier, build_optimizer, check, checkpoint_files, clear, command, console, count_params, default_data,
    derive, evaluate, evaluate_mixture, fill, fingerprint, flops_per_token, hf_name, load_config, load_model,
    load_moe, load_state, make_config, open_data, open_run, opt, pick_dtype, reading, resize, resumed,
    run_app, save_checkpoint, save_files, saved_state, say, seed_of, setup_distributed, sum_over_ranks,
)

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.tensor.parallel as styles
from torch.distributed import pipelining
import typer
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

# W ranks; dp, tp how many along an axis. B, T, C, H, I, N, L as in model.py, lower case for one rank's share.

# ---- Part I: the ideas, with bare collectives --------------------------------------------------------------

class _Copy(torch.autograd.Function):
    """Hand on the input, and add up the ranks' gradients for it: Megatron's f (1909.08053, figure 3)."""

    @staticmethod
    def forward(ctx, x, group=None):  # of ranks; all of them by default
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None

class _Reduce(torch.autograd.Function):
    """Add up the ranks' results: Megatron's g. The gradient of a sum is the same for each of its terms."""

    @staticmethod
    def forward(ctx, x, group=None):
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad, None

class ColumnParallelLinear(nn.Module):
    """Compute y = x W^T with the rows of W (out, in) dealt out: rank r makes the r-th part of the outputs."""

    def __init__(self, weight):  # the whole (out, in)
        super().__init__()
        share = weight.chunk(dist.get_world_size())[dist.get_rank()]
        self.weight = nn.Parameter(share.clone())  # (out/W, in)

    def forward(self, x):  # (..., in), the same on all ranks -> (..., out/W)
        return nn.functional.linear(_Copy.apply(x), self.weight)

class RowParallelLinear(nn.Module):
    """Compute y = x W^T with the columns of W dealt out: a rank has the part of x that its columns read."""

    def __init__(self, weight):
        super().__init__()
        share = weight.chunk(dist.get_world_size(), 1)[dist.get_rank()]
        self.weight = nn.Parameter(share.clone())  # (out, in/W)

    def forward(self, x):  # (..., in/W) -> (..., out), the same on all ranks
        return _Reduce.apply(nn.functional.linear(x, self.weight))

def split_block(block: nn.Module, x, *rest):
    """Run a decoder block on a rank that has H/W of its heads and I/W of its feed-forward width.

    Heads do not see each other, nor do hidden units: so a rank's share is an ordinary, smaller block, and
    each half costs one all-reduce forward (_Reduce) and one backward (_Copy), whatever is inside. q, k, v,
    gate and up are cut by rows; o and down, which read what those make, by columns. x (B, T, C), the same on
    all ranks -> the same.
    """
    x = x + _Reduce.apply(block.self_attn(_Copy.apply(block.input_layernorm(x)), *rest))
    return x + _Reduce.apply(block.mlp(_Copy.apply(block.post_attention_layernorm(x))))

def adamw(w, grad, m, v, step: int, lr: float, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-10) -> None:
    """Update any share of a flat vector in place: AdamW is element by element, and that is why ZeRO works.

    Decoupled decay, then Adam with bias correction (Loshchilov & Hutter 2017, 1711.05101, algorithm 2).
    """
    m.lerp_(grad, 1 - betas[0])
    v.lerp_(grad.square(), 1 - betas[1])
    mean = m / (1 - betas[0] ** step)
    square = v / (1 - betas[1] ** step)
    w.mul_(1 - lr * weight_decay)
    w.sub_(lr * mean / (square.sqrt() + eps))

def zero_step(zero: int, weights, grad, m, v, step: int, lr: float) -> None:
    """Update weights (P,) that all ranks hold whole, where each keeps the moments m and v (P/W,) of its part.

    ZeRO-1 adds up the whole gradient on all ranks: 4P + 4P + 8P/W bytes. ZeRO-2 asks only for the part that
    this rank uses: 4P + 4P/W + 8P/W. It sends what DDP does, since an all-reduce is a reduce-scatter and an
    all-gather; ZeRO-1, written so, sends half as much again.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if zero == 1:
        dist.all_reduce(grad)
        my_grad = grad.chunk(world)[rank]
    else:
        my_grad = torch.empty_like(m)
        dist.reduce_scatter_tensor(my_grad, grad)
    mine = weights.chunk(world)[rank]  # a view: what is updated is in its place
    adamw(mine, my_grad, m, v, step, lr)
    dist.all_gather_into_tensor(weights, mine.clone())

class _Gather(torch.autograd.Function):
    """Make the whole (P, ..) of the ranks' shards (P/W, ..); the gradient goes back as a summed shard."""

    @staticmethod
    def forward(ctx, shard, group=None):
        ctx.group = group
        whole = shard.new_empty(shard.shape[0] * dist.get_world_size(group), *shard.shape[1:])
        dist.all_gather_into_tensor(whole, shard.detach().contiguous(), group=group)
        return whole

    @staticmethod
    def backward(ctx, grad):
        shard = grad.new_empty(grad.shape[0] // dist.get_world_size(ctx.group), *grad.shape[1:])
        dist.reduce_scatter_tensor(shard, grad.contiguous(), group=ctx.group)
        return shard, None

def zero3_forward(layers: list, shards: list, x):
    """Run layers[i] (flat weights, x) -> x, where a rank keeps shards[i] (P/W,) of its weights: 16P/W bytes.

    A layer is gathered when it is needed, thrown away, and (checkpoint computes it again) gathered once more
    for its backward pass: two all-gathers and a reduce-scatter. The step is adamw on each shard.
    """

    def gather_and_run(layer, shard, x):
        return layer(_Gather.apply(shard), x)

    for layer, shard in zip(layers, shards, strict=True):
        x = checkpoint(gather_and_run, layer, shard, x, use_reentrant=False)
    return x

class Pipe:
    """Be one stage of a pipeline: rank r computes layers whose input comes from rank r-1.

    stage (x) -> y is this rank's part of the model; the last one's y is a loss. shape: of what passes between
    two stages, (B, T, C). What is sent is not waited for until the end: two ranks that send to each other,
    and each wait for the other to receive, would wait for ever.
    """

    def __init__(self, stage, inputs: list, shape):
        self.stage, self.inputs, self.shape = stage, inputs, shape
        self.rank, self.last = dist.get_rank(), dist.get_world_size() - 1
        self.stored = {}  # micro-batch -> (x, y) with all that its backward pass needs
        self.peak = 0  # the most that were stored at one time
        self.sends = []

    def receive(self, rank: int):
        buffer = torch.empty(self.shape)
        dist.recv(buffer, rank)
        return buffer

    def send(self, tensor, rank: int) -> None:
        self.sends.append((dist.isend(tensor.contiguous(), rank), tensor))

    def forward(self, i: int) -> None:
        x = self.inputs[i] if self.rank == 0 else self.receive(self.rank - 1).requires_grad_()
        y = self.stage(x)
        self.stored[i] = x, y
        self.peak = max(self.peak, len(self.stored))
        if self.rank < self.last:
            self.send(y.detach(), self.rank + 1)

    def backward(self, i: int) -> None:
        x, y = self.stored.pop(i)
        y.backward(None if self.rank == self.last else self.receive(self.rank + 1))
        if self.rank > 0:
            self.send(x.grad, self.rank - 1)

    def finish(self) -> None:
        for work, _ in self.sends:
            work.wait()

def gpipe(pipe: Pipe, m: int) -> None:
    """Fill the pipeline with all m micro-batches, then drain it: m are stored (Huang 2018, 1811.06965)."""
    for i in range(m):
        pipe.forward(i)
    for i in range(m):
        pipe.backward(i)
    pipe.finish()

def one_forward_one_backward(pipe: Pipe, m: int) -> None:
    """Go back with the oldest micro-batch as soon as it can: p - r are stored, and no fewer slots are idle.

    1F1B (PipeDream-Flush, Narayanan et al. 2020, 2006.09503). What it saves beside GPipe is memory, not time.
    """
    warmup = min(m, pipe.last - pipe.rank)
    for i in range(warmup):  # warm-up: as many as stages follow
        pipe.forward(i)
    for i in range(warmup, m):  # steady state
        pipe.forward(i)
        pipe.backward(i - warmup)
    for i in range(m - warmup, m):  # cool-down
        pipe.backward(i)
    pipe.finish()

def context_pieces(T: int, cp: int) -> list[list[int]]:
    """Deal a sequence out to cp ranks: a piece from the front and one from the back -> positions of each.

    A causal token sees those before it: with the front alone, rank 0 would have next to nothing to do. With
    pieces r and 2cp-1-r of 2cp all ranks have the same (Llama 3, 2407.21783, 3.3.2).

    >>> context_pieces(8, 2)
    [[0, 1, 6, 7], [2, 3, 4, 5]]
    """
    size = T // (2 * cp)
    piece = [list(range(i * size, (i + 1) * size)) for i in range(2 * cp)]
    return [piece[r] + piece[2 * cp - 1 - r] for r in range(cp)]

class _Exchange(torch.autograd.Function):
    """Send the first sent[0] rows to rank 0, the next sent[1] to rank 1 ..; the gradients go the way back."""

    @staticmethod
    def forward(ctx, rows, sent: list[int], received: list[int], group=None):
        ctx.way = sent, received, group
        found = rows.new_empty(sum(received), *rows.shape[1:])
        dist.all_to_all_single(found, rows.contiguous(), received, sent, group=group)
        return found

    @staticmethod
    def backward(ctx, grad):
        sent, received, group = ctx.way
        rows = grad.new_empty(sum(sent), *grad.shape[1:])
        dist.all_to_all_single(rows, grad.contiguous(), sent, received, group=group)
        return rows, None, None, None

def exchange(experts, compute, x, chosen, weights, group=None):
    """Compute a mixture whose experts are dealt out: rows go to their experts' ranks and come back.

    GShard (Lepikhin et al. 2020, 2006.16668). experts: this rank's E/W of them; compute: moe.dispatch, as one
    process has it. x (N, C), chosen (N, A) of all E, or E for one that was dropped, weights (N, A) -> (N, C).
    """
    N, A = chosen.shape
    world = dist.get_world_size(group)
    E = world * len(experts)
    flat = chosen.flatten()
    order = flat.argsort(stable=True)  # by expert, and so by rank; dropped ones last
    counts = torch.bincount(flat, minlength=E + 1)[:E].view(world, -1)
    kept = int(counts.sum())
    theirs = torch.empty_like(counts)  # how many rows each rank sends to each of this rank's experts
    dist.all_to_all_single(theirs, counts, group=group)
    sent = counts.sum(1).tolist()
    received = theirs.sum(1).tolist()
    rows = _Exchange.apply(x.index_select(0, order[:kept] // A), sent, received, group)
    expert = torch.arange(len(experts), device=x.device).repeat(world).repeat_interleave(theirs.flatten())
    y = compute(experts, rows, expert.unsqueeze(1), rows.new_ones(len(rows), 1))
    y = _Exchange.apply(y, received, sent, group)
    y = torch.cat([y, y.new_zeros(N * A - kept, y.shape[1])])
    place = order.argsort().view(N, A)  # where each choice went
    return (y[place] * weights.to(y.dtype).unsqueeze(-1)).sum(1)  # (N, A, C) -> (N, C)

# ---- Part II: layouts, and what they cost ------------------------------------------------------------------

# Outermost first. Gradients cross the outer axes once a step (ZeRO-2 and -3: once a micro-batch), what passes
# between stages once a micro-batch, keys and values once a layer, activations twice a layer.
AXES = ("replicate", "shard", "pipeline", "context", "tensor")

# How micro-batches go through a pipeline -> (the engine's class, stages on each rank).
SCHEDULES = {
    "naive": (pipelining.ScheduleGPipe, 1),  # one micro-batch after the other: one rank works at a time
    "gpipe": (pipelining.ScheduleGPipe, 1),
    "1f1b": (pipelining.Schedule1F1B, 1),
    "interleaved": (pipelining.ScheduleInterleaved1F1B, 2),  # smaller stages, a shorter fill (2104.04473)
    "zero-bubble": (pipelining.ScheduleInterleavedZeroBubble, 2),  # weights' gradients fill it (2401.10241)
}

@dataclass(frozen=True)
class Layout:
    """Divide W = dp x pp x cp x tp ranks; the experts are dealt out to ep of the dp.

    dp = replicate x shard reads different sequences; pp has different layers, cp different parts of a
    sequence, tp different parts of each matrix.
    """

    dp: int = 1
    tp: int = 1
    zero: int = 0
    replicate: int = 1  # with ZeRO-2 and -3: groups that each hold a whole set of shards
    sequence: bool = False  # outside of attention and feed-forward a rank of tp has T/tp positions
    optimizer: str = "adamw"  # or "muon", whose matrices are dealt out whole
    pp: int = 1
    cp: int = 1
    ep: int = 1
    schedule: str = "1f1b"

    @property
    def data(self) -> int:
        """Count the ranks that have the same weights and see different tokens: they add up gradients."""
        return self.dp * self.cp

    @property
    def split(self) -> int:
        """Count the ranks that read the same sequences, which are those that one model is split over."""
        return self.pp * self.cp * self.tp

    @property
    def stages(self) -> int:
        return self.pp * SCHEDULES[self.schedule][1] if self.pp > 1 else 1

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Give the axes on which weights differ or not: (replicate, shard, pipeline, tensor)."""
        replicate = self.data if self.zero < 2 else self.replicate
        return replicate, self.data // replicate, self.pp, self.tp

    @property
    def uses_fsdp(self) -> bool:
        """Tell whether fully_shard adds up the gradients."""
        return self.data > 1 and self.zero >= 2

    @property
    def uses_ddp(self) -> bool:
        """Tell whether DDP does: it takes no DTensors, and its hooks miss a pipeline's backward passes."""
        return self.data > 1 and self.zero < 2 and self.pp == self.tp == self.ep == 1

    @property
    def owners(self) -> int:
        """Count the ranks that share one copy of the weights: Muon's matrices are dealt out to them."""
        return self.tp * (self.data if self.zero else 1) if self.optimizer == "muon" else 1

    def describe(self, m: int) -> str:
        """Say the axes that are in use, for the first line of a run."""
        more = [f"pp {self.pp} ({self.schedule}, {m} micro-batches)"] * (self.pp > 1)
        more += [f"cp {self.cp}"] * (self.cp > 1) + [f"ep {self.ep}"] * (self.ep > 1)
        return f"{' x '.join([f'dp {self.dp}', *more, f'tp {self.tp}'])}, ZeRO-{self.zero}"

    def __str__(self) -> str:
        more = [f"--{axis} {getattr(self, axis)}" for axis in ("pp", "cp", "ep") if getattr(self, axis) > 1]
        return " ".join([f"--dp {self.dp}", *more, f"--tp {self.tp}"])

# Layouts that run without torch.compile -> their name.
UNCOMPILED = {
    lambda layout: layout.tp > 1: "tensor parallelism",
    lambda layout: layout.stages > 1 and layout.schedule == "zero-bubble": "a zero-bubble schedule",
}

# Fields of Config that the plan of `split_tensors` does not know.
WHOLE = ("parallel_block", "head_bias", "kv_rank")

def misfits(layout: Layout, world: int, config: Config) -> list[str]:
    """Say what does not divide, the first reason first; nothing where the layout can be."""
    dp, pp, cp, tp, ep = layout.dp, layout.pp, layout.cp, layout.tp, layout.ep
    widths = {"heads": config.n_head, "key-value heads": config.n_kv_head, "vocabulary": config.vocab_size,
              "feed-forward width": config.ffn_dim}
    if config.n_expert:
        widths["experts' width"] = config.expert_dim
    why = [f"{width} {what} do not divide by {tp}" for what, width in widths.items() if width % tp]
    if config.n_layer < layout.stages:
        why.append(f"{config.n_layer} layers do not make {layout.stages} stages ({layout.schedule})")
    if cp > 1 and config.seq_len % (2 * cp):
        why.append(f"a context of {config.seq_len} does not divide into {2 * cp} pieces")
    if ep > 1 and (dp % ep or config.n_expert % ep or not config.n_expert):
        why.append(f"{config.n_expert} experts on {ep} of {dp} data-parallel ranks do not divide")
    if dp * pp * cp * tp != world:
        sizes = " x ".join(str(n) for n in (dp, pp, cp, tp) if n > 1 or n in (dp, tp))
        why.append(f"{sizes} is {dp * pp * cp * tp}, and there are {world} processes")
    return why

def nearest_layout(layout: Layout, world: int, config: Config) -> Layout:
    """Find the layout that can be whose axes differ by the smallest factors, those of the model before dp."""
    divisors = [n for n in range(1, world + 1) if world % n == 0]

    def distance(near: Layout) -> float:
        weights = {"dp": 1, "tp": 1.01, "pp": 1.01, "cp": 1.01, "ep": 1}
        return sum(w * abs(math.log(getattr(near, a) / getattr(layout, a))) for a, w in weights.items())

    best = None
    for pp, cp, tp in itertools.product(divisors, repeat=3):
        if world % (pp * cp * tp):
            continue
        for ep in divisors if layout.ep > 1 else [1]:
            near = dataclasses.replace(layout, dp=world // (pp * cp * tp), pp=pp, cp=cp, tp=tp, ep=ep)
            if (best is None or distance(near) < distance(best)) and not misfits(near, world, config):
                best = near
    return best

def check_layout(layout: Layout, world: int, config: Config) -> None:
    """Refuse a layout that cannot be, and name the nearest one that can."""
    zero, tp, cp, pp = layout.zero, layout.tp, layout.cp, layout.pp
    check(zero in range(4), f"--zero is 0, 1, 2 or 3; not {zero}.")
    check(layout.schedule in SCHEDULES, f"--pp-schedule is {', '.join(SCHEDULES)}; not {layout.schedule!r}.")
    why = misfits(layout, world, config)
    if why:
        near = nearest_layout(layout, world, config)
        raise UserError(f"{layout} cannot be: {why[0]}; the nearest that can is {near}.")
    odd = [name for name in WHOLE if getattr(config, name) != getattr(Config, name)]
    check(tp == 1 or not odd, f"A model with {', '.join(odd)} cannot be split by --tp yet: use --dp.")
    check(layout.dp % layout.replicate == 0 and (layout.replicate == 1 or zero >= 2),
          f"--replicate {layout.replicate} has to divide --dp {layout.dp}, and needs --zero 2 or 3.")
    check(layout.replicate == 1 or layout.ep == 1, "--replicate and --ep do not go together: leave one out.")
    plain = not config.post_norm and config.position != "learned"
    check(not layout.sequence or plain, "--sequence-parallel knows no learned places or norms after a block.")
    check(not layout.sequence or (tp > 1 and config.seq_len // cp % tp == 0),
          f"--sequence-parallel needs --tp above 1 that divides the context of {config.seq_len // cp}.")
    check(pp == 1 or zero < 3, "--zero 3 would gather a stage for each micro-batch: with --pp use --zero 2.")
    old = layout.schedule == "zero-bubble" and torch.__version__ < "2.13"  # (as numbers)
    check(pp == 1 or not old, f"Zero-bubble needs torch 2.13, this is {torch.__version__}: take interleaved.")
    check(cp == tp == 1 or config.position != "alibi", "ALiBi's bias is not split by --cp or --tp: use --dp.")
    whole = config.n_expert and (config.balance == "loss" or config.capacity is not None)
    check(cp == 1 or not whole, "Experts' balance loss and capacity are of whole sequences, which --cp "
          "splits: --set balance=none, or bias, and no capacity.")

def default_micro_batch(layout: Layout, windows: int) -> int:
    """Choose micro-batches for a pipeline: about four for each stage, which leaves 11 to 20 % idle (1F1B)."""
    mine = max(1, windows // layout.dp)
    able = [n for n in range(1, mine + 1) if mine % n == 0 and n % layout.pp == 0 and n <= 4 * layout.pp]
    return mine // max(able, default=1)

def check_micro_batches(layout: Layout, windows: int, micro_batch: int) -> int:
    """Count the micro-batches of a rank's windows -> m; refuse what a schedule does not take."""
    mine = windows // layout.dp
    m, rest = divmod(mine, micro_batch)
    if layout.pp == 1:
        return m + (rest > 0)
    able = [n for n in range(1, mine + 1) if mine % n == 0]
    if layout.schedule not in ("naive", "gpipe"):
        able = [n for n in able if n >= layout.pp]
    if layout.schedule in ("interleaved", "zero-bubble"):  # in rounds of p, for which `bubble` counts
        able = [n for n in able if n % layout.pp == 0]
    near = min(able, key=lambda n: abs(math.log(n / max(m, 1))), default=None)
    check(near, f"{mine} sequences a rank do not make micro-batches for a pipeline of {layout.pp} stages: "
          f"make --tokens-per-step a multiple of {layout.dp * layout.pp} sequences.")
    check(not rest and m in able, f"--micro-batch {micro_batch} makes {mine / micro_batch:g} micro-batches "
          f"of a rank's {mine} sequences, which {layout.schedule} on {layout.pp} ranks does not take; the "
          f"nearest that it takes is --micro-batch {mine // near}.")
    return m

@functools.cache
def deal_layers(config: Config, stages: int) -> list[range]:
    """Cut the layers into stages of about equal operations, the output matrix counted to the last.

    >>> deal_layers(PRESETS["nano"].replace(vocab_size=64, n_layer=5), 2)
    [range(0, 3), range(3, 5)]
    """
    L = config.n_layer
    one = config.replace(n_layer=1, window=None, dense_layers=())
    head = config.vocab_size * config.n_embd
    costs = []
    for i in range(L):
        kind = one if config.is_sparse(i) else one.replace(n_expert=0)
        costs.append(flops_per_token(kind, config.seq_len) / 6 - head)
    costs[-1] += head
    before = [0, *itertools.accumulate(costs)]
    ends = [0]
    for stage in range(1, stages):
        goal = before[-1] * stage / stages
        able = range(ends[-1] + 1, L - (stages - stage) + 1)  # at least one layer for each
        ends.append(min(able, key=lambda i: abs(before[i] - goal)))
    return [range(a, b) for a, b in itertools.pairwise([*ends, L])]

def bubble(schedule: str, p: int, m: int) -> float:
    """Compute the share of a rank's time that it waits: p ranks, m micro-batches, backward twice forward.

    GPipe and 1F1B (2104.04473, 2.2.1): (p-1)/(m+p-1). Interleaved, v stages on a rank: (p-1)/(vm+p-1). Zero
    bubble, where a third of the work, the weights' gradients, can wait: (p-1)/(3vm+p-1).

    >>> round(bubble("1f1b", 4, 8), 3), round(bubble("interleaved", 4, 8), 3)
    (0.273, 0.158)
    """
    if schedule == "naive":
        return (p - 1) / p
    work = m * SCHEDULES[schedule][1] * (3 if schedule == "zero-bubble" else 1)
    return (p - 1) / (work + p - 1)

def stored(schedule: str, p: int, m: int, rank: int) -> int:
    """Count the most micro-batches of one stage whose activations stand on a rank: p - r with 1F1B."""
    if schedule == "naive":
        return 1
    if schedule == "gpipe":
        return m
    if schedule == "1f1b":
        return min(m, p - rank)
    return min(2 * m, 2 * p if schedule == "zero-bubble" else 3 * p - 2 * rank - 1)

def zero_bytes(n: float, ranks: int, zero: int) -> tuple[float, float, float]:
    """Count bytes of (parameters, gradients, AdamW's two moments) on a rank for n parameters in float32.

    ZeRO shards the optimizer (1), the gradients too (2), the parameters too (3): 1910.02054, figure 1.

    >>> [round(b / 1e9, 2) for b in zero_bytes(175e9, 64, 1)]
    [700.0, 700.0, 21.88]
    """
    parameters = 4 * n / (ranks if zero >= 3 else 1)
    gradients = 4 * n / (ranks if zero >= 2 else 1)
    return parameters, gradients, 8 * n / (ranks if zero >= 1 else 1)

@functools.cache
def count_parts(config: Config) -> tuple[dict, ...]:
    """Count each layer's parameters, {"all", "matrices", "experts"}, then of what is before and after."""
    with torch.device("meta"):
        model = Transformer(config)
    parts = []
    for i in range(config.n_layer):
        sizes = {f"layers.{n}": p for n, p in model.layers[str(i)].named_parameters()}
        parts.append({"all": sum(p.numel() for p in sizes.values()),
                      "matrices": sum(p.numel() for p in sizes.values() if p.dim() == 2),
                      "experts": sum(p.numel() for n, p in sizes.items() if ".experts." in n)})
    none = {"matrices": 0, "experts": 0}
    first = sum(p.numel() for n, p in model.named_parameters() if n.startswith("embed_"))
    last = model.lm_head.weight.numel() + config.n_embd  # (and the last norm)
    return *parts, {"all": first, **none}, {"all": last, **none}

def count_share(config: Config, layout: Layout, rank: int = 0) -> dict:
    """Count the parameters of a rank of the pipeline, in one piece: {"all", "matrices", "experts"}."""
    *layers, first, last = count_parts(config)
    if layout.stages == 1:
        parts = [*layers, first, last | {"all": config.n_embd} if config.tie else last]
    else:
        mine = deal_layers(config, layout.stages)[rank :: layout.pp]
        parts = [layers[i] for some in mine for i in some] + [first] * (rank == 0)
        parts += [last] * (rank == layout.pp - 1)
    return {name: sum(part[name] for part in parts) for name in ("all", "matrices", "experts")}

def layer_matrices(model: nn.Module) -> dict[str, int]:
    """List the matrices of layers, which are Muon's: {name: parameters}."""
    named = model.named_parameters()
    return {name: p.numel() for name, p in named if p.dim() == 2 and name.startswith("layers.")}

def training_bytes(config: Config, B: int, T: int, layout: Layout, recompute=False, e=2, m=1, rank=0) -> dict:
    """Count the bytes that stand in a rank's memory when it trains on m micro-batches of B sequences.

    {"parameters", "gathered", "gradients", "optimizer", "activations"}; e: bytes of an activation; rank: of
    the pipeline. fully_shard keeps a shard beside what it has gathered: the whole model with ZeRO-2,
    embedding and two blocks with ZeRO-3. Muon has one moment, and owners a copy of their matrices.
    Activations are what a block's backward pass needs, where attention is not written out, for each
    micro-batch that is stored. Without fully_shard "gathered" are bf16's copies of matrices.
    """
    c, tp, cp, zero = config, layout.tp, layout.cp, layout.zero
    count = count_share(c, layout, rank)
    dense = {name: (count[name] - count["experts"]) / tp for name in ("all", "matrices")}
    experts = count["experts"] / tp / layout.ep
    shards = layout.data if zero == 1 else layout.sizes[1]
    total = dict.fromkeys(("parameters", "gathered", "gradients", "optimizer"), 0.0)
    blocks = sum(map(len, deal_layers(c, layout.stages)[rank :: layout.pp]))
    at_once = 1.0  # micro-batches that stand in memory
    if layout.pp > 1:
        at_once = stored(layout.schedule, layout.pp, m, rank) / SCHEDULES[layout.schedule][1]
    for n, matrices, ranks, owners in (
        (dense["all"], dense["matrices"], shards, layout.owners),
        (experts, experts, shards / layout.ep, layout.owners / (layout.ep if zero else 1)),
    ):
        if not n:
            continue
        parameters, gradients, moments = zero_bytes(n, ranks, zero)
        if layout.optimizer == "muon":
            moments *= 1 - matrices / n  # AdamW's, of the rest
            moments += tp * matrices * (8 / owners if owners > 1 else 4)
        # a matrix in the precision of products, kept for the backward pass of each micro-batch
        gathered = e * n * (1 / blocks if recompute else at_once) if e < 4 else 0.0
        if layout.uses_fsdp:
            parameters = 4 * n / ranks
            gathered = e * (n if zero == 2 else n - max(0, 1 - 2 / blocks) * matrices)
            if layout.pp > 1:
                gradients = 4 * n + 4 * n / ranks  # whole until the last micro-batch's are there
        for name, size in zip(total, (parameters, gathered, gradients, moments), strict=True):
            total[name] += size
    heads = (c.n_head + c.n_kv_head) * c.head_dim / tp
    width = c.ffn_dim / tp
    if c.n_expert:  # the rows that go to the experts, and what comes back, stand beside the tokens
        width = c.expert_dim * (c.n_expert_active + c.n_expert_shared) / tp + c.n_embd * c.n_expert_active / 2
    stream = 4 * c.n_embd / (tp if layout.sequence else 1)  # bytes of the residual stream, float32
    layer = e * (2 * c.n_embd + (3 + c.qk_norm) * heads + 4 * width)  # norms' outputs; q, k, v, y
    layer += 2 * e * c.n_kv_head * c.head_dim * (cp - 1) / tp  # the other ranks' keys and values
    kept = blocks * stream + 2 * stream + layer if recompute else blocks * (2 * stream + layer)
    if layout.pp > 1 and layout.schedule == "zero-bubble":
        at_once *= 1.4  # gradients inside of blocks wait, too, for the weights' turn: 11 to 42 % (measured)
    N = B * T / cp
    logits = min(N * c.vocab_size / tp, KEEP_LOGITS) if rank == layout.pp - 1 else 0
    mask = (1 + e) * (2 * cp + 1) * (T / (2 * cp)) ** 2 if cp > 1 else 0
    return total | {"activations": N * kept * at_once + mask + 4 * logits}

def communication(config: Config, N: int, layout: Layout, recompute=False, e=2, m=1) -> list[tuple]:
    """List what a step on m micro-batches of N tokens a rank sends: (collective, axis, bytes).

    bytes: of the whole tensors. Tensor parallelism: two all-reduces of the activations (N, C) a block,
    forward and backward (1909.08053, 3); with the sequence split (2205.05198, figure 5) each is an all-gather
    and a reduce-scatter. Data parallelism: the gradients once; the weights once with ZeRO-1 and 2, twice with
    ZeRO-3 (1910.02054, 7). Pipeline: what passes between stages, and its gradient, the mean of the ranks.
    Context: keys and values of all ranks, and their gradients. Experts: A rows a token there and back, and
    their gradients. Muon: a matrix's gradient to its owner, its weights back. Not: norms' gradients.
    """
    c, rows = config, []
    replicate, shards, pp, tp = layout.sizes
    shares = [count_share(c, layout, rank) for rank in range(pp)]
    n, matrices, experts = (sum(s[name] for s in shares) / pp / tp for name in ("all", "matrices", "experts"))
    sparse = sum(map(c.is_sparse, range(c.n_layer))) / pp
    layers = c.n_layer / pp
    low = e * N * c.n_embd
    if tp > 1:
        rows += tensor_communication(c, N, layout, recompute, e, m)
    if pp > 1:
        hidden = 4 * N * c.n_embd / (tp if layout.sequence else 1)  # the residual stream is float32
        rows.append(("send", "pipeline", 2 * m * (layout.stages - 1) / pp * hidden))
        if c.tie:
            rows.append(("all_reduce", "pipeline", 2 / pp * 4 * c.vocab_size * c.n_embd / tp / shards))
    if layout.cp > 1:
        keys = m * layers * e * 2 * c.n_kv_head * c.head_dim / tp * N * layout.cp
        rows.append(("all_gather", "context", (1 + recompute) * keys))
        rows.append(("reduce_scatter", "context", keys))
    if layout.ep > 1:
        rows.append(("all_to_all", "expert", m * (4 + 2 * recompute) * sparse * c.n_expert_active * low))
    own = experts / layout.ep
    fewer = layout.ep if layout.zero >= 2 else 1  # ranks that share one expert's shards
    for size, matrix, ranks, copies in (
        (n - experts, matrices - experts, shards, replicate),
        (own, own, shards // fewer, replicate * fewer // layout.ep),
    ):
        if ranks > 1:
            rows.append(("all_gather", "shard", (2 * m if layout.zero == 3 else 1) * e * size))
            rows.append(("reduce_scatter", "shard", (m if pp == 1 else 1) * 4 * size))
        if copies > 1:
            rows.append(("all_reduce", "replicate", 4 * size / ranks))
        if copies > 1 and layout.zero == 1:
            rows.append(("all_gather", "replicate", 4 * (size - matrix * (layout.owners > 1))))
    if layout.owners > 1:
        whole = 4 * (matrices - experts + own) * tp
        if tp > 1:
            rows.append(("all_gather", "tensor", whole / shards))
        if shards > 1:
            rows.append(("all_gather", "shard", whole))
        rows.append(("broadcast", "shard" if layout.zero else "tensor", whole))
    return [row for row in rows if row[2]]

def tensor_communication(c: Config, N: int, layout: Layout, recompute, e, m) -> list[tuple]:
    """List what tensor parallelism sends; see `communication`."""
    layers = c.n_layer / layout.pp
    sparse = sum(map(c.is_sparse, range(c.n_layer))) / layout.pp
    low = e * N * c.n_embd
    # (a block that is computed again also sends its first half again)
    sent = m * ((4 + recompute) * layers + 2 * sparse * bool(c.n_expert_shared))
    whole = m * 4 * N * c.n_embd / layout.pp  # float32 at either end of the model
    rows = [
        # three numbers a token for the loss, and the gradient of what the output matrix reads
        ("all_reduce", "tensor", m * (3 * 4 * N + low) / layout.pp),
        # the gradient of the weights that a router gives its experts
        ("all_reduce", "tensor", m * sparse * 4 * N * c.n_expert_active),
    ]
    if not layout.sequence:
        return [*rows, ("all_reduce", "tensor", sent * low + whole)]
    # (what is computed again has to be gathered again)
    gathered = sent + m * (1 / layout.pp + layers * recompute)
    return [*rows, ("all_gather", "tensor", gathered * low + whole),
            ("reduce_scatter", "tensor", sent * low + whole)]

@dataclass(frozen=True)
class Machine:
    """Describe the ranks and what is between them; the defaults are one H100 SXM in its usual node."""

    per_node: int = 8
    memory: float = 80e9  # bytes
    peak: float = 989e12  # products a second in bf16 (NVIDIA's data sheet, without sparsity)
    utilisation: float = 0.45  # of it, while a rank computes (Llama 3 reports 0.38 to 0.43 of a whole step)
    inside: float = 450e9  # bytes a second and direction within a node: NVLink 4
    between: float = 50e9  # between nodes: InfiniBand at 400 Gbit/s a rank (Ethernet at 100: 12.5e9)
    itemsize: int = 2  # bytes of what is sent in a forward pass

    def speed(self, span: int) -> float:
        """Give the speed of a group that lies in so many ranks that follow each other."""
        return self.inside if span <= self.per_node else self.between

def step_seconds(config: Config, layout: Layout, machine: Machine, micro_batch: int, m: int, recompute: bool):
    """Estimate a step's time by part: {"compute", "bubble", then what is sent, by axis}, in seconds.

    A rank waits for what tensor, context and expert parallelism and the pipeline send. DDP and fully_shard
    send gradients while it computes backward, two thirds of the time: only what is longer than that is
    counted; elsewhere gradients follow the last backward pass.
    """
    o, ranks = layout, layout.dp * layout.split
    tokens = o.dp * m * micro_batch * config.seq_len
    flops = flops_per_token(config) * tokens / ranks * (4 / 3 if recompute else 1)
    compute = flops / machine.peak / machine.utilisation
    idle = bubble(o.schedule, o.pp, m) if o.pp > 1 else 0.0
    found = {"compute": compute, "bubble": compute * idle / (1 - idle)}
    sizes = {"tensor": o.tp, "context": o.cp, "pipeline": o.pp, "expert": o.ep, "data": o.data}
    spans = sizes | {"context": o.cp * o.tp, "pipeline": o.split, "expert": o.ep * o.split, "data": ranks}
    found |= dict.fromkeys(sizes, 0.0)
    for name, axis, size in communication(config, micro_batch * config.seq_len // o.cp, o, recompute,
                                          machine.itemsize, m):
        axis = "data" if axis in ("replicate", "shard") else axis
        # in a ring a rank sends (W-1)/W of the whole, twice to add up; stages talk in pairs
        share = (sizes[axis] - 1) / sizes[axis] * (2 if name == "all_reduce" else 1)
        share = 1 if axis == "pipeline" else share
        found[axis] += share * size / machine.speed(spans[axis])
    if o.uses_ddp or (o.uses_fsdp and o.pp == 1):
        found["data"] = max(0.0, found["data"] - 2 / 3 * compute)
    return found

def find_layouts(config: Config, ranks: int, machine: Machine, micro_batch: int, tokens: int, **fixed):
    """List layouts of so many ranks, by estimated seconds a step of so many tokens, with the GB on a rank.

    fixed: fields of Layout that are given; the others are tried, axes in powers of two, tp within a node.
    """
    powers = [2**i for i in range(ranks.bit_length()) if ranks % 2**i == 0]
    tried = {
        "tp": [n for n in powers if n <= machine.per_node],
        "pp": [n for n in powers if n <= config.n_layer],
        "cp": [n for n in powers if n == 1 or 4096 * n <= config.seq_len],
        "ep": [n for n in powers if n <= config.n_expert] or [1],
        "zero": range(4),
        "schedule": ("1f1b", "interleaved", "zero-bubble"),
    }
    tried = [[value] if (value := fixed.get(name)) is not None else values for name, values in tried.items()]
    found = []
    why = "none divides its layers, heads and sequences"
    for tp, pp, cp, ep, zero, schedule in itertools.product(*tried):
        windows = tokens // config.seq_len
        dp = ranks // (tp * pp * cp)
        layout = Layout(dp, tp, zero, optimizer=fixed["optimizer"], pp=pp, cp=cp, ep=ep, schedule=schedule)
        if not dp or fixed.get("dp") not in (None, dp) or (pp == 1 and schedule != "1f1b"):
            continue
        if windows % (dp * micro_batch) or misfits(layout, ranks, config):
            why = (misfits(layout, ranks, config) or [f"{windows} sequences do not divide"])[0]
            continue
        try:
            check_layout(layout, ranks, config)
            m = check_micro_batches(layout, windows, micro_batch)
        except UserError as error:
            why = str(error)
        else:
            for recompute in (False, True):
                ends = [training_bytes(config, micro_batch, config.seq_len, layout, recompute, 2, m, rank)
                        for rank in {0, pp - 1}]
                memory = max(ends, key=lambda row: sum(row.values()))
                seconds = step_seconds(config, layout, machine, micro_batch, m, recompute)
                axes = {"dp": dp, "pp": pp, "cp": cp, "ep": ep, "tp": tp, "zero": zero,
                        "schedule": schedule if pp > 1 else None, "recompute": recompute, "micro_batches": m}
                found.append(axes | {"memory": sum(memory.values()), **memory,
                                     "seconds": sum(seconds.values()), **seconds})
    check(found, f"No layout of {ranks} ranks has what was asked for, with steps of {tokens} tokens in micro-"
          f"batches of {micro_batch} x {config.seq_len}: {why}")
    return sorted(found, key=lambda row: (row["seconds"], row["memory"]))

# ---- Part III: the same on PyTorch's engine ----------------------------------------------------------------

class Grid:
    """Hold the processes as one array (`AXES`), and the meshes and groups that it is cut into.

    weights: the mesh of what differs in weights, (replicate, shard, pipeline, tensor); ranks of one context
    are data-parallel in it. experts: the same for the experts, of which ep ranks have different ones.
    """

    def __init__(self, layout: Layout, config: Config, device: str, timeout: float):
        self.layout = o = layout
        self.tied = ["embed_tokens.weight"] * (config.tie and o.pp > 1)  # on both ends of a pipeline
        ranks = torch.arange(o.dp * o.split).view(o.dp, o.pp, o.cp, o.tp)
        rank = dist.get_rank()
        self.data, self.stage, self.context, self.tensor = (int(i) for i in (ranks == rank).nonzero()[0])
        names = ("replicate", "shard", "pipeline", "tensor")
        by_weights = ranks.transpose(1, 2).reshape(o.sizes)
        self.weights = self.experts = DeviceMesh(device, by_weights, mesh_dim_names=names)
        self.context_group = self.expert_group = self.tied_group = None
        if o.cp > 1:
            mesh = DeviceMesh(device, ranks.flatten(0, 1), mesh_dim_names=("rest", "context", "tensor"))
            self.context_group = mesh["context"].get_group()
        if o.ep > 1:
            copies = o.data // o.ep
            sizes = (copies, 1, o.ep) if o.zero < 2 else (1, copies, o.ep)
            by_expert = ranks.view(o.dp // o.ep, o.ep, o.pp, o.cp, o.tp).permute(0, 3, 1, 2, 4)
            names = ("replicate", "shard", "expert", "pipeline", "tensor")
            self.experts = DeviceMesh(device, by_expert.reshape(*sizes, o.pp, o.tp), mesh_dim_names=names)
            self.expert_group = self.experts["expert"].get_group()
        self.pipe = self.weights["pipeline"].get_group()
        self.pipe_ranks = dist.get_process_group_ranks(self.pipe)
        # the ranks that share one copy of this stage's weights, and of this rank's experts
        self.owners = self.owners_of_experts = self.weights["tensor"].get_group()
        if o.zero:
            stages = by_weights.permute(2, 0, 1, 3).flatten(1).tolist()
            self.owners = self.owners_of_experts = dist.new_subgroups_by_enumeration(stages)[0]
            if o.ep > 1:
                owners = self.experts.mesh.permute(2, 3, 0, 1, 4).flatten(0, 1).flatten(1).tolist()
                self.owners_of_experts = dist.new_subgroups_by_enumeration(owners)[0]
        if self.tied:
            pairs = ranks[:, [0, -1]].permute(0, 2, 3, 1).reshape(-1, 2).tolist()
            pairs += [[r] for r in ranks[:, 1:-1].flatten().tolist()]
            self.tied_group = dist.new_subgroups_by_enumeration(pairs)[0]

        limit = timedelta(seconds=timeout)  # a group of its own has the library's, whatever that of all ranks
        groups = [self.owners, self.owners_of_experts, self.tied_group, self.context_group]
        for mesh in (self.weights, self.experts):
            groups += [mesh.get_group(name) for name in mesh.mesh_dim_names]
        for group in filter(None, groups):
            dist.distributed_c10d._set_pg_timeout(limit, group)

    def mesh(self, name: str):
        """Give the mesh of a parameter."""
        return self.experts if ".experts." in name else self.weights

    def group_of_owners(self, name: str):
        return self.owners_of_experts if ".experts." in name else self.owners

    def copies(self, name: str, p) -> int:
        """Count the ranks that hold the same share of a parameter."""
        mesh = self.mesh(name)
        axes = [a for a in mesh.mesh_dim_names if a not in ("pipeline", "expert")]
        copies = math.prod(mesh[a].size() for a in axes)
        if isinstance(p, DTensor):
            cuts = (p.device_mesh.size(i) for i, x in enumerate(p.placements) if not x.is_replicate())
            copies //= math.prod(cuts)
        return copies * (2 if name in self.tied else 1)

class Stage(Transformer):
    """Be the layers that a rank has, in the form in which a pipeline calls them; without one, all layers.

    own: the positions (T/cp,) of this rank's part, where a sequence is dealt out. All its ranks read it.
    """

    own = None

    def forward(self, x, aux=None, *, targets=None, documents=None):
        """Compute ids (B, T), or hidden (B, t, C) and the aux so far -> hidden or losses, and aux."""
        own = self.own
        if own is None:
            own = torch.arange(self.config.seq_len, device=x.device)
        else:
            x = x[:, own] if self.first else x
            targets = targets[:, own]
        targets = targets if self.last else None
        result, aux = super().forward(x, targets, positions=own, doc_ids=documents, aux=aux)
        return result, aux.clone()  # of what goes out as it came in, the engine of torch 2.11 has no gradient

    def embed(self, ids, positions):
        """Keep the residual stream in float32, where fully_shard hands out the table in bf16."""
        return super().embed(ids, positions).float()

    def masks(self, positions, doc_ids, trunk_ids, cache, T) -> dict:
        """Make the masks of a rank's two pieces of the sequence, each with the keys up to its own end."""
        if self.own is None:
            # (T would be a rank's part of the sequence, where norms are split along it)
            return super().masks(positions, doc_ids, trunk_ids, cache, len(positions))
        k_pos = torch.arange(self.config.seq_len, device=positions.device)
        masks = {}
        for window in set(self.config.windows):
            masks[window] = []
            for q_pos in positions.chunk(2):
                end = int(q_pos[-1]) + 1
                documents = (None, None) if doc_ids is None else (doc_ids[:, q_pos], doc_ids[:, :end])
                more = {"window": window, "n_global": self.config.global_tokens}
                mask = visible(q_pos, k_pos[:end], *documents, **more)
                masks[window].append(mask if mask.dim() == 3 else mask.unsqueeze(0))
        return masks

class ContextKeys:
    """Take a cache's place in attention: `update` gathers the keys and values of all ranks."""

    def __init__(self, group, pieces):  # (cp, T/cp): the positions of all ranks
        self.group = group
        self.order = pieces.flatten().argsort()  # ranks' tokens -> the sequence

    def update(self, layer: int, k, v):  # (B, K, T/cp, D) twice -> (B, K, T, D) twice
        both = torch.cat((k, v), -1).permute(2, 0, 1, 3)
        whole = _Gather.apply(both, self.group).index_select(0, self.order)
        return whole.permute(1, 2, 0, 3).split((k.shape[-1], v.shape[-1]), -1)

    def hook(self, module, args):
        """Hand this to attention in the place of a cache: (x, cos, sin, mask, None) -> (.., self)."""
        return *args[:-1], self

class SplitExperts(nn.Module):
    """Hold this rank's experts in the place of all, and compute the mixture with the other ranks."""

    def __init__(self, experts: dict, ep, tp):
        super().__init__()
        for e, expert in experts.items():
            self.add_module(e, expert)
        self.values = experts.values
        self.ep, self.tp = ep, tp  # groups: experts are dealt out, matrices are split

    def __len__(self) -> int:
        return len(self._modules)

    @torch.compiler.disable
    def forward(self, x, chosen, weights):
        compute = load_moe().dispatch
        if self.tp:  # each rank has a part of every expert's width, as in `split_block`
            x = _Copy.apply(x, self.tp)
            weights = _Copy.apply(weights, self.tp)
        if self.ep:
            y = exchange(self, compute, x, chosen, weights, self.ep)
        else:
            y = compute(self, x, chosen, weights)
        return _Reduce.apply(y, self.tp) if self.tp else y

class LocalLinear(Linear):
    """Multiply by this rank's share of a matrix."""

    def forward(self, x):
        return nn.functional.linear(x, local(self.weight).to(x.dtype))

def split_experts(model: Transformer, grid: Grid) -> None:
    """Deal out the experts to ep ranks, and split the matrices of each over tp."""
    ep, tp = grid.layout.ep, grid.layout.tp
    if not model.config.n_expert or ep == tp == 1:
        return
    E = model.config.n_expert // ep
    first = grid.experts["expert"].get_local_rank() * E if ep > 1 else 0
    mesh = grid.experts["tensor"]
    for block in model.layers.values():
        if not block.sparse:
            continue
        mine = {str(e): block.mlp.experts[str(e)] for e in range(first, first + E)}
        for expert in mine.values() if tp > 1 else ():
            for name, linear in expert.named_children():
                if isinstance(linear, Linear):
                    cut = Shard(1 if name == "down_proj" else 0)
                    linear.weight = nn.Parameter(distribute_tensor(linear.weight.detach(), mesh, [cut]))
                    linear.__class__ = LocalLinear
        block.mlp.experts = SplitExperts(mine, grid.expert_group, mesh.get_group() if tp > 1 else None)

def split_tensors(model: Transformer, mesh, sequence: bool) -> None:
    """Say tensor parallelism as DTensor placements: how each matrix is split, and what comes in and goes out.

    q, k, v, gate and up read the same input. It is prepared once for all of them (PrepareModuleInput), so
    their gradients for it are added before they are sent: one all-reduce, where each would send its own. The
    norms of q and k see the rank's heads only ("sequence" here means the axis of heads): see
    `finish_gradients`.
    """
    whole = Replicate()
    between = Shard(1) if sequence else whole  # between the halves of a block: (B, t, C)
    columns = styles.ColwiseParallel()
    rows = styles.RowwiseParallel(output_layouts=between)
    rest = (None,) * 4
    for block in model.layers.values():
        plan = {"self_attn": styles.PrepareModuleInput(input_layouts=(between, *rest),
                                                       desired_input_layouts=(whole, *rest))}
        plan |= {f"self_attn.{name}_proj": columns for name in "qkv"}
        plan |= {"self_attn.o_proj": rows}
        mlp, at = "mlp", between
        if block.sparse:  # a router sees whole tokens; `split_experts` splits the rest
            mlp, at = "mlp.shared_experts", whole
            if sequence:
                plan["mlp"] = styles.PrepareModuleInputOutput(
                    input_layouts=(between,), desired_input_layouts=(whole,), use_local_input=True,
                    output_layouts=(whole, None), desired_output_layouts=(between, None))
        if not block.sparse or block.mlp.shared_experts is not None:
            plan[mlp] = styles.PrepareModuleInput(input_layouts=(at,), desired_input_layouts=(whole,))
            plan |= {f"{mlp}.{name}_proj": columns for name in ["gate"] * model.config.gated + ["up"]}
            plan[f"{mlp}.down_proj"] = styles.RowwiseParallel(output_layouts=at)
        if model.config.qk_norm:
            heads = styles.SequenceParallel(sequence_dim=2, use_local_output=True)
            plan |= {"self_attn.q_norm": heads, "self_attn.k_norm": heads}
        if sequence:
            norm = styles.SequenceParallel(use_local_output=True)
            plan |= {"input_layernorm": norm, "post_attention_layernorm": norm}
        styles.parallelize_module(block, mesh, plan)
    plan = {}
    if hasattr(model, "embed_tokens"):
        # each rank looks up a part of the ids
        plan["embed_tokens"] = styles.RowwiseParallel(input_layouts=whole, output_layouts=between)
    if model.last:
        plan["lm_head"] = styles.ColwiseParallel(input_layouts=whole, use_local_output=False)
    if sequence and model.last:
        styles.parallelize_module(model.norm, mesh, styles.SequenceParallel(use_local_output=False))
        gather = styles.PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=whole)
        styles.parallelize_module(model.norm, mesh, gather)
    styles.parallelize_module(model, mesh, plan)
    model.tie_weights()

class Share(nn.Module):
    """Show the stages of a rank as one model: their parameters have the names of the whole."""

    def __init__(self, stages: list[Stage]):
        super().__init__()
        self.config = stages[0].config
        self.layers = nn.ModuleDict({i: block for stage in stages for i, block in stage.layers.items()})
        for stage in stages:
            for name, module in stage.named_children():
                if name != "layers":
                    self.add_module(name, module)
        self.stages = nn.ModuleList(stages)  # last: named_parameters() gives the first name of a parameter

def parallelize(config: Config, o, grid: Grid, device: torch.device):
    """Build a rank's shares of a model -> (model, the module to call).

    The order: (1) pipeline, context, expert and tensor parallelism, since they decide what a rank's layers,
    tokens and matrices are; (2) recomputation inside of the rest, so that a block that is computed again also
    sends again; (3) compile one block at a time (not where matrices are split); (4) data parallelism around
    the blocks: its gathers and hooks stay out of the compiled code and can run ahead of it. Filled when it is
    sharded: one whole tensor at a time.
    """
    layout = grid.layout
    stages = []
    for layers in deal_layers(config, layout.stages)[grid.stage :: layout.pp]:
        with torch.device("meta"):
            stages.append(Stage(config, layers).train())
    for stage in stages:
        shard_stage(stage, o, grid, device)
    model = stages[0] if layout.pp == 1 else Share(stages)
    for stage in stages:
        stage.to_empty(device=device)
        stage.tie_weights()
        stage.init_weights(o.seed)
    if layout.uses_ddp:
        group = grid.weights["replicate"].get_group()
        return model, DDP(model, process_group=group, init_sync=False, gradient_as_bucket_view=True)
    return model, model

def shard_stage(stage: Stage, o, grid: Grid, device: torch.device) -> None:
    """Put on a stage, still without memory, all that the layout asks for."""
    layout = grid.layout
    split_experts(stage, grid)
    if layout.tp > 1:
        split_tensors(stage, grid.weights["tensor"], layout.sequence)
    if layout.cp > 1:
        pieces = torch.tensor(context_pieces(stage.config.seq_len, layout.cp), device=device)
        stage.own = pieces[grid.context]
        keys = ContextKeys(grid.context_group, pieces)
        for block in stage.layers.values():
            block.self_attn.register_forward_pre_hook(keys.hook)
    stage.compute_dtype = pick_dtype(o.dtype, device)
    stage.recompute = o.recompute
    if o.compile == "on":
        stage.compile_blocks()
    if not layout.uses_fsdp:
        return

    def shard(module, mesh, lower=stage.compute_dtype):
        lower = None if lower == torch.float32 else lower
        precision = MixedPrecisionPolicy(lower, torch.float32, cast_forward_inputs=False)  # fp32 sums
        axes = mesh["replicate", "shard"] if mesh["replicate"].size() > 1 else mesh["shard"]
        fully_shard(module, mesh=axes, reshard_after_forward=layout.zero == 3, mp_policy=precision)
        module.set_gradient_divide_factor(1.0)  # sums, not means
        module.set_force_sum_reduction_for_comms(True)

    for block in stage.layers.values():
        if block.sparse:
            shard(block.mlp.gate, grid.weights, torch.float32)  # in bf16 a router would round near ties
        if block.sparse and layout.ep > 1:
            shard(block.mlp.experts, grid.experts)
        shard(block, grid.weights)
    shard(stage, grid.weights)  # one group for what is left: embedding, last norm, output matrix

def local(tensor):
    """Give this rank's share of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

def full(tensor):
    """Give the whole of a tensor, on all ranks of its mesh (they all have to ask)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

def split_vocabulary(layout: Layout):
    """Let cross_entropy and its gradient take logits of which each rank has a part of the vocabulary."""
    return styles.loss_parallel() if layout.tp > 1 else contextlib.nullcontext()

def sync_gradients(forward: nn.Module, layout: Layout, last: bool):
    """Add gradients up after the last micro-batch; ZeRO-2 and -3 after each: they keep no whole gradients."""
    if isinstance(forward, FSDPModule):
        forward.set_reshard_after_backward(last or layout.zero == 3)
    return forward.no_sync() if isinstance(forward, DDP) and not last else contextlib.nullcontext()

def finish_gradients(model: nn.Module, grid: Grid) -> None:
    """Add up what is still to be, when the last micro-batch is done.

    Gradients of norms that saw a part of the heads or of the sequence; of all weights, where neither DDP nor
    fully_shard has; of a tied matrix, which the first stage of a pipeline reads and the last multiplies by.
    """
    layout = grid.layout
    for p in model.parameters():
        if isinstance(p.grad, DTensor) and p.grad.placements != p.placements:
            p.grad = p.grad.redistribute(placements=p.placements)
    named = dict(model.named_parameters())
    if layout.data > 1 and not (layout.uses_ddp or layout.uses_fsdp):
        for _, some in itertools.groupby(named, key=lambda name: (name.split(".")[:2], ".experts." in name)):
            some = list(some)  # a bucket: a layer, its experts, or what is outside of them
            copies = grid.mesh(some[0])["replicate"]
            if copies.size() > 1:
                add_up([named[name].grad for name in some], copies.get_group())
    for name in grid.tied:
        if name in named:
            add_up([named[name].grad], grid.tied_group)

def add_up(grads: list, group) -> None:
    """Add up gradients over a group of ranks, in one message."""
    shares = [local(grad) for grad in grads]
    flat = torch.cat([share.flatten() for share in shares])
    dist.all_reduce(flat, group=group)
    for share, whole in zip(shares, flat.split([share.numel() for share in shares]), strict=True):
        share.copy_(whole.view_as(share))

@torch.no_grad()
def clip_gradients(model: nn.Module, grid: Grid, limit: float, scale: float = 1.0):
    """Undo the loss scale of fp16 and clip the gradient's norm over all ranks to `limit` -> the norm.

    Each rank adds the squares of its shares, divided by how many ranks hold the same.
    """
    total = torch.zeros((), dtype=torch.float64, device=grid.weights.device_type)
    for name, p in model.named_parameters():
        total += local(p.grad).float().square().sum().double() / grid.copies(name, p)
    norm = sum_over_ranks(total).sqrt() / scale
    grads = [local(p.grad) for p in model.parameters()]
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0) / scale
    torch._foreach_mul_(grads, factor.to(grads[0]))
    return norm

class RecordedStage(pipelining.PipelineStage):
    """Be a stage that notes what the schedule has it do, in order: (F, B, I or W, stage, micro-batch)."""

    actions: list  # of all stages of this rank
    micro_batches_done = 0  # of this step, by earlier calls of the schedule

    def forward_one_chunk(self, i, *args, **more):
        self.actions.append(("F", self.stage_index, i + self.micro_batches_done))
        return super().forward_one_chunk(i, *args, **more)

    def backward_one_chunk(self, i, *args, full_backward=True, **more):
        """Go back all the way (B), or to the stage's input only (I), so that the stage before can go on."""
        self.actions.append(("B" if full_backward else "I", self.stage_index, i + self.micro_batches_done))
        return super().backward_one_chunk(i, *args, full_backward=full_backward, **more)

    def backward_weight_one_chunk(self, i, *args, **more):
        self.actions.append(("W", self.stage_index, i))
        return super().backward_weight_one_chunk(i, *args, **more)

class Pipeline:
    """Send micro-batches through the stages by a schedule of torch.distributed.pipelining."""

    def __init__(self, share: Share, grid: Grid, m: int, device: torch.device):
        layout = grid.layout
        self.m, self.grid, self.share = m, grid, share
        self.actions = []
        self.stages = stages = []
        for i, stage in enumerate(share.stages):
            index = grid.stage + i * layout.pp
            stages.append(RecordedStage(stage, index, layout.stages, device, group=grid.pipe))
            stages[-1].actions = self.actions
        kind, each = SCHEDULES[layout.schedule]
        at_once = 1 if layout.schedule == "naive" else m
        self.schedule = kind(stages if each > 1 else stages[0], at_once, scale_grads=False,
                             loss_fn=self.loss_of)
        self.takes_ids = grid.stage == 0

    def loss_of(self, output, y):
        scaled, *part = self.objective(output, y)
        self.parts.append(part)
        return scaled

    def step(self, micro_batches: list, objective) -> list:
        """Add up the gradients of objective(output, targets)[0] -> the rest of it for each micro-batch."""
        self.objective = objective
        self.parts = []
        self.actions.clear()
        batches = [micro_batches] if self.schedule._n_microbatches > 1 else [[one] for one in micro_batches]
        for i, some in enumerate(batches):
            for stage in self.stages:
                stage.micro_batches_done = i
            x, y = (torch.cat([batch[part] for batch in some]) for part in (0, 1))
            more = {"targets": y}
            if some[0][2] is not None:
                more["documents"] = torch.cat([documents for _, _, documents in some])
            self.schedule.step(*[x] * self.takes_ids, target=y, return_outputs=False, **more)
        return self.parts[-self.m :]  # (before its first step the engine tries what shapes there are)

    @torch.no_grad()
    def losses(self, x, y, documents):
        """Compute the losses of one batch, stage by stage -> (B, T) on the last stage's ranks, else 0."""
        layout, ranks = self.grid.layout, self.grid.pipe_ranks
        result = torch.zeros(y.shape, device=y.device)
        for i in range(layout.stages):
            before, here, after = (ranks[(i + step) % layout.pp] for step in (-1, 0, 1))
            if here != dist.get_rank():
                continue
            stage = self.share.stages[i // layout.pp]
            if i > 0:
                t = y.shape[1] // layout.cp // (layout.tp if layout.sequence else 1)
                x = torch.empty(len(y), t, stage.config.n_embd, device=y.device)
                dist.recv(x, before, group=self.grid.pipe)
            output, _ = stage(x, targets=y, documents=documents)
            if i < layout.stages - 1:
                dist.send(output.contiguous(), after, group=self.grid.pipe)
            else:
                result = output
        return result

def place_actions(actions: list[list[tuple]]) -> list[list[tuple]]:
    """Place what ranks do into time slots, each as early as its input is there -> a row of slots a rank.

    actions: of each rank in order, (kind, stage, micro-batch). F takes a slot, B two; I and W one each. A
    slot is None where the rank waits.

    >>> for row in place_actions([[("F", 0, 0), ("B", 0, 0)], [("F", 1, 0), ("B", 1, 0)]]):
    ...     print(*("." if slot is None else slot[0] for slot in row))
    F . . . B B
    . F B B . .
    """
    last = max(stage for rank in actions for _, stage, _ in rank)
    done = {}  # what is finished -> when
    rows = [[] for _ in actions]
    at = [0] * len(actions)
    while any(i < len(mine) for i, mine in zip(at, actions, strict=True)):
        before = list(at)
        for rank, mine in enumerate(actions):
            if at[rank] == len(mine):
                continue
            kind, stage, i = action = mine[at[rank]]
            needs = []
            if kind == "F" and stage > 0:
                needs = [("F", stage - 1, i)]
            if kind in "BI" and stage < last:
                needs = [("B", stage + 1, i)]
            if not all(need in done for need in needs):
                continue
            start = max([len(rows[rank]), *(done[need] for need in needs)])
            rows[rank] += [None] * (start - len(rows[rank])) + [action] * (2 if kind == "B" else 1)
            done["B" if kind == "I" else kind, stage, i] = len(rows[rank])
            at[rank] += 1
        check(at != before, "The ranks wait for each other: this order of actions cannot be.")
    end = max(map(len, rows))
    return [row + [None] * (end - len(row)) for row in rows]

def idle_share(rows: list[list]) -> float:
    """Compute the share of all slots in which a rank waits."""
    return sum(row.count(None) for row in rows) / sum(map(len, rows))

def most_stored(actions: list[tuple]) -> int:
    """Count the most micro-batches whose activations stood on a rank at one time."""
    held = most = 0
    split = any(kind == "W" for kind, _, _ in actions)
    for kind, _, _ in actions:
        held += (kind == "F") - (kind == ("W" if split else "B"))
        most = max(most, held)
    return most

def show_schedule(pipeline: Pipeline) -> None:
    """Draw what the ranks of the pipeline did in the last step: a row for each, time from left to right."""
    from rich.text import Text

    layout = pipeline.grid.layout
    actions = [None] * layout.pp
    dist.all_gather_object(actions, pipeline.actions, group=pipeline.grid.pipe)
    rows = place_actions(actions)
    colors = {"F": "black on cyan", "B": "black on green", "I": "black on green", "W": "black on yellow"}
    say(f"{layout.schedule}: {pipeline.m} micro-batches on {layout.pp} ranks, as this step had them. F "
        "is forward, B backward; I, W backward to the input, to the weights. Small letters: its second stage")
    for rank, row in enumerate(rows):
        line = Text(f"rank {rank} ")
        for slot in row:
            if slot is None:
                line.append("  . ")
                continue
            kind, stage, i = slot
            line.append(f" {kind if stage < layout.pp else kind.lower()}{i:<2}", colors[kind])
        say(line)
    formula = bubble(layout.schedule, layout.pp, pipeline.m)
    most = ", ".join(str(most_stored(mine)) for mine in actions)
    say(f"Idle: {idle_share(rows):.1%} of the slots, {formula:.1%} by formula. Micro-batches that stood in "
        f"memory at most, on each rank: {most}" + " (of half a rank's layers)." * (layout.stages > layout.pp))

def assign_owners(sizes: dict[str, int], ranks: list[int]) -> list[dict[str, int]]:
    """Deal matrices out to ranks, the largest first, in turn -> rounds of {name: owner}.

    In a round each rank has at most one: they work at the same time, and few whole matrices stand in memory.

    >>> assign_owners({"a": 2, "b": 4, "c": 2}, [0, 1])
    [{'b': 0, 'a': 1}, {'c': 0}]
    """
    names = sorted(sizes, key=sizes.get, reverse=True)
    rounds = [names[i : i + len(ranks)] for i in range(0, len(names), len(ranks))]
    return [dict(zip(some, ranks)) for some in rounds]  # noqa: B905 (the last round may be short)

class ParallelOptimizer:
    """Update weights of which a rank holds shares, with the optimizers of model.py.

    AdamW is element by element: on the shards of ZeRO-2 and -3 and of tensor parallelism it runs as it is;
    for ZeRO-1 it is shown a slice of each weight, which all ranks then gather. Muon needs a whole matrix:
    each has an owner, the only rank that keeps it whole with its momentum, runs Newton-Schulz on it, and
    sends out the new weights. The owners are among the ranks that share one copy of the weights.
    """

    def __init__(self, model: nn.Module, o, grid: Grid):
        layout = grid.layout
        self.params = dict(model.named_parameters())
        self.grid = grid
        sizes = layer_matrices(model) if layout.owners > 1 else {}
        self.rounds = []
        for group in dict.fromkeys(map(grid.group_of_owners, sizes)):
            own = {name: size for name, size in sizes.items() if grid.group_of_owners(name) == group}
            self.rounds += assign_owners(own, dist.get_process_group_ranks(group))
        self.mine = {}
        for owned in self.rounds:
            for name, owner in owned.items():
                whole = full(self.params[name].detach())
                if owner == dist.get_rank():
                    self.mine[name] = nn.Parameter(whole.clone())
        self.slices = {}
        for name, p in self.params.items():
            if layout.zero == 1 and layout.data > 1 and name not in sizes:
                self.slices[name] = nn.Parameter(self.cut_slice(name, p.detach()))
        stand_ins = dict.fromkeys(sizes) | self.mine | self.slices
        self.inner = build_optimizer(model, o.optimizer, o.lr, o.weight_decay, stand_ins=stand_ins)
        self.set_lr = self.inner.set_lr
        self.separate_meshes()

    def separate_meshes(self) -> None:
        """Let the fused AdamW see tensors of one mesh at a time, or plain ones: it takes no mixture."""
        for part in self.inner.parts:
            groups = []
            for group in part.param_groups:
                meshes = {}
                for p in group["params"]:
                    meshes.setdefault(getattr(p, "device_mesh", None), []).append(p)
                groups += [group | {"params": some} for some in meshes.values()]
            part.param_groups = groups

    def cut_slice(self, name: str, tensor) -> DTensor:
        """Cut this rank's slice for ZeRO-1 of a weight, or of its gradient, along an axis that is whole."""
        p, axes, placements = self.params[name], ["replicate"], [Shard(0)]
        if isinstance(p, DTensor) and p.device_mesh.mesh_dim_names[-1] == "tensor":
            taken = p.placements[-1]
            if taken.is_shard():  # (a bias has no other axis: all of it)
                axes = ["replicate", "tensor"]
                placements = [Shard(1 - taken.dim) if p.dim() == 2 else Replicate(), taken]
        mesh = self.grid.mesh(name)[tuple(axes)]
        part = local(tensor)
        if placements[0].is_shard():
            dim = placements[0].dim
            parts = part.chunk(mesh.size(0), dim)
            i = mesh.get_local_rank(0)
            part = parts[i] if i < len(parts) else part.narrow(dim, 0, 0)
        return DTensor.from_local(part.contiguous(), mesh, placements, shape=p.shape, stride=p.stride())

    @torch.no_grad()
    def step(self) -> None:
        for owned in self.rounds:
            for name in owned:
                whole = full(self.params[name].grad)  # an all-gather; what another owns is dropped at once
                if name in self.mine:
                    self.mine[name].grad = whole
            for part in self.inner.parts:
                if isinstance(part, torch.optim.Muon):
                    part.step()  # on the one matrix that has a gradient
                    part.zero_grad()
            for name, owner in owned.items():
                p = self.params[name]
                mine = self.mine.get(name)
                whole = torch.empty(p.shape, device=p.device) if mine is None else mine.detach()
                dist.broadcast(whole, owner, self.grid.group_of_owners(name))
                fill(p, whole)
        for name, part in self.slices.items():
            part.grad = self.cut_slice(name, self.params[name].grad)
        self.inner.step()
        for name, part in self.slices.items():
            whole = part.detach().redistribute(placements=[Replicate(), *part.placements[1:]])
            local(self.params[name].detach()).copy_(whole.to_local())

    def zero_grad(self) -> None:
        self.inner.zero_grad()
        for p in self.params.values():
            p.grad = None

def state_of(optimizer) -> dict:
    """Give an optimizer's state by name, {name/key: tensor}; before the first step it is zeros."""
    found = {}
    for part in optimizer.parts:
        keys = ["momentum_buffer"] if isinstance(part, torch.optim.Muon) else ["exp_avg", "exp_avg_sq"]
        for p in (p for group in part.param_groups for p in group["params"]):
            state = part.state[p]
            if not state:
                state |= {key: torch.zeros_like(p) for key in keys}
                if len(keys) > 1:
                    state["step"] = torch.zeros((), device=local(p).device)
            found |= {f"{optimizer.names[p]}/{key}": value for key, value in state.items()}
    return found

class CommunicationCounter(TorchDispatchMode):
    """Count the collectives that run under it: {"phase/name": [how many, bytes of the whole tensors]}."""

    NAMES = {"all_reduce": "all_reduce", "allreduce_": "all_reduce", "all_gather_into_tensor": "all_gather",
             "_allgather_base_": "all_gather", "reduce_scatter_tensor": "reduce_scatter",
             "_reduce_scatter_base_": "reduce_scatter", "broadcast_": "broadcast", "send": "send",
             "alltoall_base_": "all_to_all"}

    def __init__(self):
        super().__init__()
        self.counts = {}
        self.phase = "step"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t is DTensor for t in types):
            return NotImplemented  # its local form comes by in a moment
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and func._opname in self.NAMES:
            name = self.NAMES[func._opname]
            leaves = torch.utils._pytree.tree_leaves(args[1] if name == "all_to_all" else (args, result))
            tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
            if name == "all_to_all" and not tensors[0].is_floating_point():
                return result  # how many rows will come
            entry = self.counts.setdefault(f"{self.phase}/{name}", [0, 0])
            entry[0] += 1
            entry[1] += max(t.nbytes for t in tensors)
        return result

def show_communication(sent: CommunicationCounter, *sizes) -> None:
    """Print what a step has sent, the mean of all ranks, beside the formulas of `communication(*sizes)`."""
    planned = {}
    for name, axis, size in communication(*sizes):
        planned.setdefault(name, []).append((axis, size))
    say("A step sends (mean of the ranks; bytes of whole tensors), and by formula:")
    for name in dict.fromkeys(CommunicationCounter.NAMES.values()):
        bytes_sent = sum(entry[1] for key, entry in sent.counts.items() if key.endswith(f"/{name}"))
        mean = float(sum_over_ranks(torch.tensor(float(bytes_sent)))) / dist.get_world_size()
        parts = planned.get(name, [])
        axes = ", ".join(dict.fromkeys(axis for axis, _ in parts))
        if mean or parts:
            formula = sum(size for _, size in parts)
            say(f"  {name:14} {mean / 1e6:12.3f} MB   {formula / 1e6:12.3f} MB  {axes}")

# ---- Checkpoints: sharded and in the background while it runs, whole at the end ----------------------------

def model_dtype(model: nn.Module) -> torch.dtype:
    """Give the precision of a rank's products."""
    return (model if isinstance(model, Stage) else model.stages[0]).compute_dtype

def named_weights(model: Transformer) -> dict:
    """Name the parameters, and the routers' bias."""
    return {n: p.detach() for n, p in [*model.named_parameters(), *model.named_buffers()]}

class Saver:
    """Write shards in the background; when all ranks have, rank 0 puts them in their place.

    torch.distributed.checkpoint copies a rank's shares to the CPU, one after the other, and writes
    safetensors whose headers say which part of a tensor is where, so that any other layout finds its own. It
    talks over a group of its own: its thread must not cut in on the training's.
    """

    def __init__(self, folder: str, model: Transformer, optimizer: ParallelOptimizer, tokenizer: Path):
        self.folder, self.model, self.optimizer, self.tokenizer = Path(folder), model, optimizer, tokenizer
        self.new = self.folder / "state" / "shards.new"
        self.shards = self.folder / "state" / "shards"
        self.group = dist.new_group(backend="gloo")
        self.pending = self.state = None

    def begin(self, state: dict) -> None:
        """Copy this rank's shares and start to write them."""
        self.finish()
        self.state = state
        tensors = our_tensors(self.model, self.optimizer.inner)
        broken = torch.tensor(float(not all(local(t).isfinite().all() for t in tensors.values())))
        check(sum_over_ranks(broken) == 0, f"Weights are no numbers: {self.folder} keeps what it holds.")
        with explaining(self.folder):
            if dist.get_rank() == 0:
                for path in [self.new, *self.shards.glob("*.new")]:  # of a save that was cut off
                    clear(path)
            barrier()
            writer = HuggingFaceStorageWriter(str(self.new), save_distributed=True)
            self.pending = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)

    def finish(self, wait: bool = True) -> None:
        """Put the shards on their way in the place of the old ones, when all ranks have written theirs."""
        if self.pending is None or not (wait or self.pending.done()):
            return
        pending, self.pending = self.pending, None
        with explaining(self.folder):
            pending.result()  # on rank 0 this means: of all ranks
            if dist.get_rank() == 0:
                self.replace()

    def replace(self) -> None:
        """Put the new files in the place of the old ones, by the journal of `save_files`."""
        self.shards.mkdir(exist_ok=True)
        old = {f"state/shards/{path.name}" for path in self.shards.glob("*.safetensors")}
        files = checkpoint_files(self.model.config, self.tokenizer)
        files["state/state.json"] = json.dumps(self.state, indent=1) + "\n"
        for path in self.new.iterdir():  # file by file, so that all ranks may call finish_save at once
            os.replace(path, self.shards / f"{path.name}.new")
            files[f"state/shards/{path.name}"] = None
        clear(self.new)
        stale = {"model.safetensors", "state/optimizer.safetensors", *old} - files.keys()
        save_files(self.folder, files, stale)

@contextlib.contextmanager
def explaining(folder: Path):
    """Turn the errors of a disk, and of torch.distributed.checkpoint, into a sentence about the first one."""
    try:
        yield
    except (dcp.CheckpointException, OSError) as error:
        if isinstance(error, dcp.CheckpointException):  # it lists those of all ranks
            error = next(iter(error.failures.values()))[0]
        raise UserError(f"{folder} could not be read or written ({error}); what it held is whole.") from None

def our_tensors(model: Transformer, optimizer) -> dict:
    """Name what a run has to keep: the weights as in a checkpoint folder, and the optimizer's state."""
    return {hf_name(n, model.config): p for n, p in named_weights(model).items()} | state_of(optimizer)

def has_shards(folder: str | Path) -> bool:
    return any(Path(folder, "state", "shards").glob("*.safetensors"))

def load_shards(folder: str | Path, wanted: dict, alone: bool = False) -> None:
    """Fill tensors, or a rank's shares of them, from a run's shards, whatever layout has written these.

    Names, shapes and types are compared before; NaN, left where nothing was read, shows a missing part.
    alone: one process asks, not all ranks at once.
    """
    path = Path(folder, "state", "shards")
    check(all(file.is_file() for file in path.iterdir()), f"{path} holds what is no file: take it away.")
    reader = HuggingFaceStorageReader(str(path))
    with reading(path):
        held = reader.read_metadata().state_dict_metadata
        unlike = [name for name, t in wanted.items() if name not in held
                  or (held[name].size, held[name].properties.dtype) != (t.shape, t.dtype)]
    if not unlike:
        for tensor in wanted.values():
            local(tensor).fill_(math.nan)
        with explaining(path):
            dcp.load(wanted, storage_reader=reader, no_dist=alone)
        unlike = [name for name, t in wanted.items() if not local(t).isfinite().all()]
    wrong = torch.tensor(float(len(unlike)))
    wrong = wrong if alone else sum_over_ranks(wrong)
    check(wrong == 0, f"The shards in {path} do not hold all of {(unlike or ['a tensor'])[0]} as config.json "
          "has it: one is missing, damaged or of another run.")

def load_whole(folder: str | Path, wanted: dict, held: dict) -> None:
    """Fill this rank's shares of tensors from whole ones, by name; these are mapped from disk, not read."""
    for name, tensor in wanted.items():
        fits = name in held and held[name].shape == tensor.shape and held[name].is_floating_point()
        check(fits, f"{folder} lacks {name}, or has it in another shape or type: it is not of this run.")
        fill(tensor, held[name])

def join_shards(folder: Path) -> None:
    """Make a Hugging Face folder, with train.py's state, of one with shards; one process holds it all."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is meant
    state = saved_state(folder)
    with torch.device("meta"):
        model = Transformer(load_config(folder, shards=True))
        optimizer = build_optimizer(model, state["options"].get("optimizer"))
    tensors = {name: torch.empty_like(t, device="cpu") for name, t in our_tensors(model, optimizer).items()}
    load_shards(folder, tensors, alone=True)
    weights = {n: tensors.pop(hf_name(n, model.config)) for n in named_weights(model)}
    save_checkpoint(folder, model, folder / "tokenizer.json", state=(tensors, state), weights=weights)

# ---- Part IV: the run --------------------------------------------------------------------------------------

@dataclass
class Options(TrainOptions):
    """Hold the options of this command: what any pretraining is told, and the layout of the processes."""

    changeable = TrainOptions.changeable | {
        "dp", "tp", "zero", "replicate", "sequence_parallel", "timeout", "pp", "pp_schedule", "cp", "ep",
        "show_schedule", "count_communication"}
    dp: Annotated[int | None, opt("Layout", "Data-parallel ranks: what the others leave.", low=1)] = None
    tp: Annotated[int, opt("Layout", "Tensor-parallel ranks, on one node: each matrix is split.", low=1)] = 1
    zero: Annotated[int, opt("Layout", "Sharded: 1 the optimizer, 2 gradients too, 3 all.", low=0)] = 0
    replicate: Annotated[int, opt("Layout", "Groups of ranks that each hold all shards.", low=1)] = 1
    sequence_parallel: Annotated[bool, opt("Layout", "With --tp: split norms along the sequence.")] = False
    pp: Annotated[int, opt("Layout", "Pipeline: ranks that have different layers.", low=1)] = 1
    pp_schedule: Annotated[str, opt("Layout", f"Of a pipeline: {', '.join(SCHEDULES)}.",
                                    one_of=SCHEDULES)] = "1f1b"
    cp: Annotated[int, opt("Layout", "Ranks that have different parts of a sequence.", low=1)] = 1
    ep: Annotated[int, opt("Layout", "Ranks that have different experts, among those of --dp.", low=1)] = 1
    show_schedule: Annotated[bool, opt("Run", "Draw what the ranks of a pipeline do.",
                                       "--show-schedule")] = False
    count_communication: Annotated[bool, opt("Run", "Print what a step sends, and the formulas.",
                                             "--count-communication")] = False
    timeout: Annotated[float, opt("Layout", "Seconds until a silent rank counts as dead.", above=0)] = 600.0

    def __post_init__(self):
        super().__post_init__()
        # what --set said is in the fields now; for train.py, which may go on, these are options
        self.set = [item for item in self.set if not item.startswith(("eval_tokens", "doc_mask"))]

    def layout(self, world: int) -> Layout:
        dp = self.dp or max(1, world // (self.pp * self.cp * self.tp))
        axes = {"pp": self.pp, "cp": self.cp, "ep": self.ep, "schedule": self.pp_schedule}
        return Layout(dp, self.tp, self.zero, self.replicate, self.sequence_parallel, self.optimizer, **axes)

def join_processes(device: str, timeout: float) -> Ranks:
    """Join torchrun's group; without torchrun, a group of one, so that nothing below has to ask."""
    more = {}
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store still has the addresses of the processes before the restart: look elsewhere in it
        rank, world, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        store = dist.TCPStore(os.environ["MASTER_ADDR"], port, world, is_master=False)
        more = {"store": dist.PrefixStore(f"attempt_{attempt}", store), "rank": rank, "world_size": world}
    if device == "auto" and not torch.cuda.is_available():
        device = "cpu"  # neither gloo nor float64 knows Apple's GPU
    ranks = setup_distributed(device, timeout, **more)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # two warnings that mean no harm: DTensor gathers twice in a row, and losses are a view
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    return ranks

def open_model(o: Options, config: Config, layout: Layout, ranks: Ranks, m: int):
    """Build a rank's shares -> (grid, model, what to call, optimizer): new, of --init, or of a run."""
    grid = Grid(layout, config, ranks.device.type, o.timeout)
    model, forward = parallelize(config, o, grid, ranks.device)
    if layout.pp > 1:
        forward = Pipeline(model, grid, m, ranks.device)
    weights = named_weights(model)
    sharded = o.resume and has_shards(o.resume)
    if sharded:
        load_shards(o.resume, {hf_name(n, config): p for n, p in weights.items()})
    elif o.resume or o.init:
        load_whole(o.resume or o.init, weights, load_model(o.resume or o.init).state_dict())
    optimizer = ParallelOptimizer(model, o, grid)
    if sharded:
        load_shards(o.resume, state_of(optimizer.inner))
    elif o.resume and (held := load_state(o.resume)[0]):  # before its first step train.py has none
        load_whole(o.resume, state_of(optimizer.inner), held)
    return grid, model, forward, optimizer

def gradients_of_step(forward, model, grid: Grid, micro_batches: list, targets, windows: int, scale=1.0):
    """Add up the gradients of a step of so many targets and windows -> this rank's part of (loss, aux)."""
    layout, config = grid.layout, model.config
    scale *= layout.data if layout.uses_ddp else 1  # DDP divides by it

    def objective(output, y):
        """Weigh a micro-batch's losses (B, T) and (L, ..), what each layer adds, means over sequences."""
        losses, layers = output
        loss = full(losses).sum() / targets
        aux = layers * (len(y) / windows / layout.cp)
        return (loss + aux[:, 0].sum()) * scale, loss.detach(), aux.detach()

    parts = []
    with split_vocabulary(layout):
        if layout.pp > 1:
            parts = forward.step(micro_batches, objective)
        else:
            for i, (x, y, documents) in enumerate(micro_batches):
                with sync_gradients(forward, layout, i == len(micro_batches) - 1):
                    scaled, *part = objective(forward(x, targets=y, documents=documents), y)
                    scaled.backward()
                parts.append(part)
    finish_gradients(model, grid)
    if not parts:  # only the last stage of a pipeline knows
        columns = len(AUX) + config.n_expert if config.n_expert else 1
        parts = [(torch.zeros_like(targets), torch.zeros(config.n_layer, columns, device=targets.device))]
    return tuple(sum(some) for some in zip(*parts, strict=True))

def after_restart(o: Options) -> Options:
    """Go on with the run in --out where torchrun has started all ranks again, because one had died."""
    if o.resume or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return o
    try:
        held = resumed(Options, o.out)
    except UserError:  # it died before the first save
        return o
    derived = dict.fromkeys(("resume", "micro_batch", "compile", "dtype"))  # what a run fills in
    asked = [json.dumps(dataclasses.asdict(options) | derived) for options in (held, o)]
    return held if asked[0] == asked[1] else o  # another run, which --overwrite is to replace

def choose_layout(o: Options, config: Config, ranks: Ranks) -> tuple[Layout, int]:
    """Check the layout, fill in what follows from it -> (layout, a rank's micro-batches of a step)."""
    layout = o.layout(ranks.world)
    check_layout(layout, ranks.world, config)
    windows = o.tokens_per_step // config.seq_len
    if o.micro_batch is None and layout.pp > 1:
        o.micro_batch = default_micro_batch(layout, windows)
    derive(o, config, layout.dp, ranks.device)
    m = check_micro_batches(layout, windows, o.micro_batch)
    check(layout.pp > 1 or o.resume or not o.show_schedule,
          "--show-schedule draws a pipeline: it needs --pp above 1.")
    for others, why in UNCOMPILED.items():  # neither has a compiled backward pass in 2.13
        if o.compile == "on" and others(layout):
            say(f"torch.compile does not go with {why} here; going on without it.")
            o.compile = "off"
    say(f"{count_params(config)[0] / 1e6:.1f}M parameters on {ranks.world} processes ({layout.describe(m)}), "
        f"{o.optimizer}, {o.dtype} on {ranks.device}; {o.max_steps} steps")
    if layout.zero and layout.data == 1:
        say(f"--zero {layout.zero} shards nothing here: no two ranks have the same weights.")
    return layout, m

def train(o: Options) -> dict:
    """Train on many processes (started by torchrun), as train.py does on one: same data, loss and folders."""
    # 1. Where, with what, and which model on which grid
    ranks = join_processes(o.device, o.timeout)
    o = after_restart(o)
    saved = open_run(o)
    default_data(o.data, ranks)
    sources, val, weights = open_data(o.data)
    data = fingerprint(sources)
    check(saved.get("data", data) == data, f"The data is not what {o.out} was trained on: restore it.")
    config = make_config(o, sources[0], bool(saved))
    check(config.causal, f"{o.resume or o.init} is a masked model: use train.py, alone or under torchrun.")
    layout, m = choose_layout(o, config, ranks)
    shown = o.show_schedule and layout.pp > 1  # (a run that goes on without a pipeline has the option still)

    # 2. What a step needs, and what surrounds it
    grid, model, forward, optimizer = open_model(o, config, layout, ranks, m)
    batches = Batches(sources, weights, o, config.seq_len, ranks.device, grid.data, layout.dp,
                      saved.get("taken"))  # (ranks that split one model read the same tokens)
    tokenizer = Path(o.resume or o.init or sources[0].folder, "tokenizer.json")  # its folder's template too
    saver = Saver(o.out, model, optimizer, tokenizer)
    moe = load_moe() if config.n_expert else None

    def save(folder: Path, state: dict) -> None:
        saver.begin(state | {"taken": batches.taken, "data": data})
        if state["finished"] or not state["at"]:
            saver.finish()
        if not state["finished"]:
            barrier()
        elif ranks.rank == 0:  # alone: reading and writing all of a large model outlasts any --timeout
            join_shards(folder)

    # 3. The steps
    measure = functools.partial(assess, o, grid, model, forward, val, weights)
    run = Run(o, ranks, save, measure, saved, flops_per_token(config))
    with finish_or_explain(saver, ranks):
        for step, lr in run.steps():
            micro_batches, targets, windows = batches.at(step)
            targets = targets / layout.split
            torch.manual_seed(seed_of(o.seed, step, grid.data, grid.stage))  # of dropout
            # (not in the first step, if there is another: the engine tries there what shapes there are)
            second = step == min(saved.get("at", 0) + 1, o.max_steps - 1)
            sent = CommunicationCounter() if second and o.count_communication else contextlib.nullcontext()
            with sent:
                batch = micro_batches, targets, windows
                loss, aux = gradients_of_step(forward, model, grid, *batch, run.scale)
            if second and shown:
                show_schedule(forward)
            grad_norm = clip_gradients(model, grid, o.grad_clip, run.scale)
            loss, aux = sum_over_ranks(loss / layout.tp), sum_over_ranks(aux / layout.tp)
            facts = {"tokens": o.tokens_per_step} | (moe.routing_record(aux, config) if moe else {})
            with sent:
                updated = run.update(optimizer, lr, loss=loss, grad_norm=grad_norm, **facts)
            if updated and moe:
                moe.shift_bias(model, aux)
            if second and o.count_communication:
                N = micro_batches[0][0].numel() // layout.cp
                show_communication(sent, config, N, layout, o.recompute, model_dtype(model).itemsize, m)
            saver.finish(wait=False)
    say(f"Done: {o.out} opens in transformers, and train.py --resume goes on with it "
        f"({time.perf_counter() - START:.1f} s, {run.eval_seconds:.1f} of them evaluation).")
    return run.result

@contextlib.contextmanager
def finish_or_explain(saver: Saver, ranks: Ranks):
    """Finish the save that is under way, however a run ends; say so when other ranks are gone."""
    try:
        yield
    except BaseException as error:
        lost = ("gloo", "connection", "timed out", "timeout", "nccl", "peer")
        if not isinstance(error, RuntimeError) or not any(word in str(error).lower() for word in lost):
            saver.finish()
            raise
        with contextlib.suppress(UserError):  # nobody is waited for: are all shards there already?
            saver.finish(wait=False)
        raise UserError(f"Rank {ranks.rank} lost the others ({str(error)[:120]!r}): --resume {saver.folder} "
                        "goes on, torchrun --max-restarts by itself.") from None

def assess(o: Options, grid: Grid, model, forward, val: list[Tokens], weights, last: bool) -> dict:
    """Evaluate on the validation text; ranks that split one model read the same part of it."""
    layout = grid.layout

    def losses(x, y, documents):
        """Compute (B, T): the sum over ranks that read the same is one process's, times their number."""
        with split_vocabulary(layout):
            if layout.pp > 1:
                found = full(forward.losses(x, y, documents)) * layout.pp
            else:
                found = full(model(x, targets=y, documents=documents)[0])
        return found * layout.cp

    def one(tokens: Tokens) -> dict:
        return evaluate(model, tokens, model.config.seq_len, o.micro_batch, None if last else o.eval_tokens,
                        forward=losses, share=(grid.data, layout.dp), doc_mask=o.doc_mask)

    result = evaluate_mixture(one, val, weights)
    for module in (m for m in model.modules() if isinstance(m, FSDPModule)):
        module.reshard()  # without a backward pass ZeRO-2's weights stay whole, and rounded: not to be saved
    return result | {"val_ppl": math.exp(min(result["val_loss"], 50))}

# ---- Commands ----------------------------------------------------------------------------------------------

def plan(
    preset: Annotated[str, typer.Option(help="Shape of the model: see `bench.py sizes`.")] = "llama-2-70b",
    gpus: Annotated[int, opt("", "Ranks in all.", low=1)] = 512,
    memory: Annotated[float, opt("", "Of each, in GB (1e9 bytes).", above=0)] = 80.0,
    per_node: Annotated[int, opt("", "Ranks with fast links: --tp stays within.", low=1)] = 8,
    micro_batch: Annotated[int, opt("", "Sequences at once on a rank.", low=1)] = 1,
    seq_len: Annotated[int | None, opt("", "Context, instead of the preset's.", low=1)] = None,
    optimizer: Annotated[str, opt("", "muon (matrices; AdamW on the rest) or adamw.",
                                  one_of=("muon", "adamw"))] = "muon",
    dp: Annotated[int | None, opt("", "Only layouts with so many.", low=1)] = None,
    tp: Annotated[int | None, opt("", "The same.", low=1)] = None,
    pp: Annotated[int | None, opt("", "The same.", low=1)] = None,
    cp: Annotated[int | None, opt("", "The same.", low=1)] = None,
    ep: Annotated[int | None, opt("", "The same.", low=1)] = None,
    zero: Annotated[int | None, opt("", "The same: 0 to 3.", low=0)] = None,
    pp_schedule: Annotated[str | None, opt("", "The same.", one_of=tuple(SCHEDULES))] = None,
    tokens_per_step: Annotated[int, opt("", "Tokens of a step, over all ranks.", low=1)] = 4_194_304,
    tokens: Annotated[float | None, typer.Option(help="Of the whole run; by default 20 a parameter.")] = None,
    peak: Annotated[float, opt("", "Of a rank, TFLOP/s in bf16: H100's.", above=0)] = 989.0,
    utilisation: Annotated[float, opt("", "Share of it, while a rank computes.", above=0)] = 0.45,
    nvlink: Annotated[float, opt("", "GB/s and direction within a node: NVLink 4.", above=0)] = 450.0,
    network: Annotated[float, opt("", "GB/s of a rank between nodes: InfiniBand at 400 Gbit/s; 12.5 for "
                                  "Ethernet at 100.", above=0)] = 50.0,
    price: Annotated[float, opt("", "Dollars for a GPU and hour.", above=0)] = 2.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a layout.")] = False,
) -> None:
    """Rank the layouts that fit by estimated time of a step; days and dollars of the whole run.

    Activations in bf16, optimizer in fp32. `--preset llama-2-70b --tokens 2e12` answers the interview
    question, `--preset gpt-3-175b --dp 8 --pp 8 --tp 8 --tokens-per-step 2097152` the textbook's example.
    """
    known = preset in PRESETS and PRESETS[preset].vocab_size
    padded = -(-(known or 4096) // 64) * 64  # so that it divides
    config = resize(preset, seq_len=seq_len, vocab_size=padded)
    machine = Machine(per_node, memory * 1e9, peak * 1e12, utilisation, nvlink * 1e9, network * 1e9)
    check(gpus <= 2**20, f"--gpus is {gpus}; the plan is for up to a million ranks.")
    check(tokens is None or 0 < tokens < 1e18, f"--tokens is {tokens}; it has to be above 0, below 10^18.")
    fixed = {"dp": dp, "tp": tp, "pp": pp, "cp": cp, "ep": ep, "zero": zero, "schedule": pp_schedule}
    layouts = find_layouts(config, gpus, machine, micro_batch, tokens_per_step, optimizer=optimizer, **fixed)
    fitting = [row for row in layouts if row["memory"] <= machine.memory]
    least = min(row["memory"] for row in layouts) / 1e9
    check(fitting, f"Nothing fits; the least is {least:.1f} GB: more ranks, or a shorter --seq-len.")
    if as_json:
        for row in fitting:
            print(json.dumps(row))
        return
    n = count_params(config)[0]
    say(f"{preset}: {n / 1e9:.2f}B parameters on {gpus} ranks; a step of {tokens_per_step / 1e6:.2f}M "
        f"tokens, in micro-batches of {micro_batch} x {config.seq_len}; {len(fitting)} of {len(layouts)} "
        "layouts fit")
    screen = console()
    screen.width = max(screen.width, 100)  # a narrow terminal wraps the lines, and keeps the figures
    say(plan_table(fitting[:16]))
    steps = (tokens or 20 * n) / tokens_per_step
    seconds = steps * fitting[0]["seconds"]
    hours = gpus * seconds / 3600
    mfu = flops_per_token(config) * tokens_per_step / gpus / machine.peak / fitting[0]["seconds"]
    say(f"The first: {steps * tokens_per_step / 1e9:,.0f}B tokens are {steps:,.0f} steps in "
        f"{seconds / 86400:.1f} days, {hours:,.0f} GPU-hours, {hours * price:,.0f} dollars at {price:g} an "
        f"hour, {mfu:.0%} of the peak.")

def plan_table(layouts: list[dict]):
    """Make the table of a plan; columns in which all are alike 0 or 1 are left out."""
    from rich.table import Table

    parts = ("seconds", "compute", "bubble", "tensor", "context", "pipeline", "expert", "data")
    names = "dp pp cp ep tp ZeRO schedule again m GB s".split() + list(parts[1:])
    rows = []
    for row in layouts:
        cells = ["yes" if value is True else str(value or 0) for value in list(row.values())[:9]]
        rows.append([*cells, f"{row['memory'] / 1e9:.1f}", *(f"{row[name]:.3g}" for name in parts)])
    used = [i for i in range(len(names)) if any(row[i] not in ("0", "1") for row in rows)]
    title = "GB on a rank, seconds of a step"
    table = Table(*(names[i] for i in used), title=title, box=None, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*("" if row[i] == "0" else row[i] for i in used))
    return table

def export(folder: Annotated[Path, typer.Argument(help="The folder of a run that was stopped.")]) -> None:
    """Join the shards of a folder: then transformers opens it, and train.py --resume goes on with it."""
    check(saved_state(folder) and has_shards(folder), f"{folder} has no shards to join.")
    join_shards(folder)
    say(f"{folder} is whole.")

def train_or_more(ctx: typer.Context, **values):
    """Train on many processes (started by torchrun), as train.py does on one; or plan, or export."""
    return None if ctx.invoked_subcommand else command(Options, train)(**values)

if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(plan)
    app.command()(export)
    context, _ = inspect.signature(train_or_more).parameters.values()
    options = inspect.signature(command(Options, train)).parameters.values()
    train_or_more.__signature__ = inspect.Signature([context, *options])
    app.callback(invoke_without_command=True)(train_or_more)
    run_app(app)
