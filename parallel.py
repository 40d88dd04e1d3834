"""Pretraining on many processes: data parallel (DDP, ZeRO-1/2/3) and tensor parallel, on PyTorch's engine.

    torchrun --nproc-per-node 2 parallel.py                                  # DDP on two CPU cores or GPUs
    torchrun --nproc-per-node 4 parallel.py --dp 2 --tp 2 --zero 3           # sharded data, split matrices
    torchrun --nproc-per-node 4 parallel.py --resume out/python --dp 1 --tp 4  # go on, on another layout
    torchrun --nproc-per-node 2 parallel.py --zero 3 --count-communication   # what a step sends and keeps
    python parallel.py plan --preset llama-2-70b --gpus 512 --memory 80      # which layouts fit
    python parallel.py export out/python                                     # join a stopped run's shards

It trains what train.py trains, from the same data folder to the same checkpoint folder, and each can go on
with the other's. The processes form a grid (`AXES`); tensor parallelism talks in every layer and is
innermost, where the links are fast, data parallelism talks once a step and is outermost.

Part I says each idea in plain lines with bare collectives: column- and row-parallel matrices (Shoeybi et al.
2019, 1909.08053), ZeRO-1, -2 and -3 (Rajbhandari et al. 2019, 1910.02054). Part II has their costs as
formulas. Part III composes PyTorch's engine for the same: DDP (Li et al. 2020, 2006.15704), fully_shard
(FSDP, Zhao et al. 2023, 2304.11277) and DTensor. The tests hold the three equal to each other and to one
process. Left out: masked models (train.py has them, with DDP), and splitting the experts of a mixture.
"""

import contextlib
import functools
import json
import logging
import math
import os
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from model import (  # before torch: it says how OpenMP's threads wait
    CHUNK_LOGITS, KEEP_LOGITS, PRESETS, START, Batches, Config, Ranks, Run, Tokens, TrainOptions, Transformer,
    UserError, barrier, build_optimizer, check, checkpoint_files, clear, command, config_from_hf, console,
    count_params, default_data, derive, evaluate, evaluate_mixture, fill, fingerprint, hf_name, load_moe,
    make_config, open_data, open_run, opt, pick_dtype, read_json, resumed, round_up, run_app, save_checkpoint,
    save_files, saved_state, say, seed_of, setup_distributed, sum_over_ranks,
)

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.tensor.parallel as styles
import typer
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

# W ranks; dp, tp how many along an axis. B, T, C, H, I, N, L as in model.py, lower case for one rank's share.


# ------------------------------------------------------------------------------------------------------------
# Part I: the ideas, with bare collectives
# ------------------------------------------------------------------------------------------------------------

class _Copy(torch.autograd.Function):
    """Give all ranks the input as it is, and add up their gradients for it: Megatron's f (1909.08053, figure
    3)."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad

class _Reduce(torch.autograd.Function):
    """Add up the ranks' results: Megatron's g. The gradient of a sum is the same for each of its terms."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad

class ColumnParallelLinear(nn.Module):
    """Compute y = x W^T with the rows of W (out, in) dealt out: rank r makes the r-th part of the outputs."""

    def __init__(self, weight):  # the whole (out, in)
        super().__init__()
        share = weight.chunk(dist.get_world_size())[dist.get_rank()]
        self.weight = nn.Parameter(share.clone())  # (out/W, in)

    def forward(self, x):  # (..., in), the same on all ranks -> (..., out/W)
        return nn.functional.linear(_Copy.apply(x), self.weight)

class RowParallelLinear(nn.Module):
    """Compute y = x W^T with the columns of W dealt out: each rank has the part of x that its columns read.
    """

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
    w.mul_(1 - lr * weight_decay)
    w.sub_(lr * (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps))

def zero_step(zero: int, weights, grad, m, v, step: int, lr: float) -> None:
    """Update weights (P,) that all ranks hold whole, where each keeps the moments m and v (P/W,) of its part.

    ZeRO-1 adds up the whole gradient on all ranks: 4P + 4P + 8P/W bytes. ZeRO-2 asks only for the part that
    this rank uses: 4P + 4P/W + 8P/W. An all-reduce is a reduce-scatter and an all-gather, so it sends the
    same or less.
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
    """Make the whole (P,) of a shard (P/W,) while it is used; the gradient goes back as a summed shard."""

    @staticmethod
    def forward(ctx, shard):
        whole = shard.new_empty(shard.numel() * dist.get_world_size())
        dist.all_gather_into_tensor(whole, shard.detach().contiguous())
        return whole

    @staticmethod
    def backward(ctx, grad):
        shard = grad.new_empty(grad.numel() // dist.get_world_size())
        dist.reduce_scatter_tensor(shard, grad.contiguous())
        return shard

def zero3_forward(layers: list, shards: list, x):
    """Run layers[i] (flat weights, x) -> x, where a rank keeps shards[i] (P/W,) of its weights: 16P/W bytes
    in all.

    Each layer is gathered when it is needed, thrown away, and (checkpoint computes it again) gathered once
    more for its backward pass: two all-gathers and a reduce-scatter of its weights. The step is adamw on each
    shard.
    """

    def gather_and_run(layer, shard, x):
        return layer(_Gather.apply(shard), x)

    for layer, shard in zip(layers, shards, strict=True):
        x = checkpoint(gather_and_run, layer, shard, x, use_reentrant=False)
    return x


# ------------------------------------------------------------------------------------------------------------
# Part II: layouts, and what they cost
# ------------------------------------------------------------------------------------------------------------

# Outermost first. A step's gradients cross the outer axes once, activations the inner ones in every layer.
AXES = ("replicate", "shard", "pipeline", "context", "tensor")

@dataclass(frozen=True)
class Layout:
    """Divide W = dp x tp ranks: the data goes dp = replicate x shard ways, each through a model split over
    tp."""

    dp: int = 1
    tp: int = 1
    zero: int = 0
    replicate: int = 1  # with ZeRO-2 and -3: groups that each hold a whole set of shards
    sequence: bool = False  # norms and residuals split along the sequence between the tensor-parallel halves
    offload: bool = False

    @property
    def sizes(self) -> tuple[int, ...]:
        """The lengths of the axes: what is not sharded over data is replicated."""
        replicate = self.dp if self.zero < 2 else self.replicate
        return (replicate, self.dp // replicate, 1, 1, self.tp)

    @property
    def uses_fsdp(self) -> bool:
        """Tell whether fully_shard does the data parallelism: DDP has no shards and takes no DTensors."""
        return self.dp > 1 and (self.zero >= 2 or self.tp > 1)

    def __str__(self):
        words = [f"dp {self.dp}", self.replicate > 1 and f"replicate {self.replicate}",
                 self.tp > 1 and f"tp {self.tp}", self.sequence and "sequence"]
        return " x ".join(filter(None, words)) + (f", ZeRO-{self.zero}" if self.zero else "")

def check_layout(layout: Layout, world: int, config: Config) -> None:
    """Refuse a layout that cannot be, and name the nearest one that can."""
    dp, tp, zero = layout.dp, layout.tp, layout.zero
    check(zero in range(4), f"--zero is 0, 1, 2 or 3; not {zero}.")
    widths = {"heads": config.n_head, "key-value heads": config.n_kv_head, "vocabulary": config.vocab_size,
              "feed-forward width": config.ffn_dim}
    fitting = [n for n in range(1, world + 1) if world % n == 0 and all(w % n == 0 for w in widths.values())]
    near = min(fitting, key=lambda n: abs(math.log(world / n / dp)) + abs(math.log(n / tp)))
    why = [f"{width} {what} do not divide by {tp}" for what, width in widths.items() if width % tp]
    why += [f"{dp} x {tp} is {dp * tp}, and there are {world} processes"] * (dp * tp != world)
    check(not why, f"--dp {dp} --tp {tp} cannot be: {', '.join(why[:1])}; the nearest that can is "
          f"--dp {world // near} --tp {near}.")
    check(tp == 1 or not config.n_expert,
          "A mixture of experts cannot be split by --tp yet: use --dp, with --zero 3 where memory is short.")
    check(dp % layout.replicate == 0 and (layout.replicate == 1 or zero >= 2),
          f"--replicate {layout.replicate} has to divide --dp {dp}, and needs --zero 2 or 3.")
    check(not layout.sequence or (tp > 1 and config.seq_len % tp == 0),
          f"--sequence-parallel needs --tp above 1 that divides the context of {config.seq_len}.")
    check(not layout.offload or (zero >= 2 and torch.cuda.is_available()),
          "--set offload=true keeps shards in host memory beside a GPU: it needs CUDA and --zero 2 or 3.")

def zero_bytes(n: float, ranks: int, zero: int) -> tuple[float, float, float]:
    """Count bytes of (parameters, gradients, optimizer) on a rank for n parameters: float32, AdamW's two
    moments.

    ZeRO shards the optimizer (1), the gradients too (2), the parameters too (3): 1910.02054, figure 1.

    >>> [round(b / 1e9, 2) for b in zero_bytes(175e9, 64, 1)]
    [700.0, 700.0, 21.88]
    """
    parameters = 4 * n / (ranks if zero >= 3 else 1)
    gradients = 4 * n / (ranks if zero >= 2 else 1)
    return parameters, gradients, 8 * n / (ranks if zero >= 1 else 1)

@functools.cache
def count_share(config: Config, tp: int) -> tuple[float, float]:
    """Count the parameters of a block (their mean), and of the model, on one of tp tensor-parallel ranks."""
    tables = config.vocab_size * config.n_embd * (1 if config.tie else 2)
    blocks = count_params(config)[0] - tables - config.n_embd  # (the last norm)
    return blocks / config.n_layer / tp, (blocks + tables) / tp + config.n_embd

def training_bytes(config: Config, B: int, T: int, layout: Layout, recompute=False, e=2) -> dict:
    """Count the bytes that stand in a rank's memory when it trains on B sequences of T tokens at once.

    {"parameters", "gathered", "gradients", "optimizer", "activations"}; e: bytes of an activation.
    fully_shard keeps a shard beside what it has gathered: all of the model with ZeRO-2, the embedding and two
    blocks with ZeRO-3. Activations are what a block's backward pass needs, with attention that is not written
    out.
    """
    c, L, tp, zero = config, config.n_layer, layout.tp, layout.zero
    block, n = count_share(c, tp)
    shards = layout.dp if zero == 1 else layout.sizes[1]
    parameters, gradients, optimizer = zero_bytes(n, shards, zero)
    gathered = e * n if e < 4 or layout.uses_fsdp else 0.0
    if zero >= 2 and shards > 1:
        parameters = 4 * n / shards
        gathered = e * (n if zero == 2 else n - max(0, L - 2) * block)
    q = c.n_head * c.head_dim / tp
    kv = c.n_kv_head * c.head_dim / tp
    width = c.ffn_dim / tp
    if c.n_expert:  # the rows that go to the experts, and what comes back, stand beside the tokens
        width = c.expert_dim * (c.n_expert_active + c.n_expert_shared) + c.n_embd * c.n_expert_active / 2
    layer = 4 * c.n_embd + (3 + c.qk_norm) * (q + kv) + 4 * width  # norms' inputs and outputs; q, k, v, y
    kept = L * c.n_embd + layer if recompute else L * layer
    logits = min(B * T * c.vocab_size / tp, KEEP_LOGITS)
    return {"parameters": parameters, "gathered": gathered, "gradients": gradients, "optimizer": optimizer,
            "activations": e * B * T * kept + 4 * logits}

def communication(config: Config, N: int, layout: Layout, recompute=False, e=2) -> list[tuple]:
    """List what a step with one micro-batch of N tokens a rank sends: (phase, collective, axis, count,
    bytes).

    bytes: of the whole tensors. Tensor parallelism: two all-reduces of the activations (N, C) a block,
    forward and backward (1909.08053, 3); with the sequence split (2205.05198, figure 5) each is an all-gather
    and a reduce-scatter. Data parallelism: the gradients once; ZeRO-3 also the weights, twice (1910.02054,
    7). And small ones: a loss over a split vocabulary sums three numbers a token, split norms have terms of a
    gradient.
    """
    c, dp, zero, rows = config, layout.dp, layout.zero, []
    n = count_share(c, layout.tp)[1]
    groups = c.n_layer + 1  # of parameters: the blocks, and what is left
    halves = 2 * c.n_layer
    again = c.n_layer * recompute  # a block that is computed again sends again what its first half sent
    whole = 4 * N * c.n_embd  # the activations (N, C), in float32 at either end of the model
    low = e * N * c.n_embd
    if layout.tp > 1:
        chunks = -(-N // max(64, CHUNK_LOGITS["cpu"] // c.vocab_size))  # see token_losses
        rows.append(("forward", "all_reduce", "tensor", 3 * chunks, 3 * 4 * N))
        norms = halves * c.qk_norm + (halves + 1) * layout.sequence
        numbers = halves * c.qk_norm * c.head_dim + (halves + 1) * layout.sequence * c.n_embd
        if norms:  # fully_shard sends each by itself
            rows.append(("backward", "all_reduce", "tensor", norms if dp > 1 else 1, 4 * numbers))
        if layout.sequence:
            twice = halves + 2 * again
            rows += [("forward", "all_gather", "tensor", halves + 1, (halves + 1) * low),
                     ("forward", "reduce_scatter", "tensor", halves + 1, halves * low + whole),
                     ("backward", "all_gather", "tensor", twice + 1, twice * low + whole),
                     ("backward", "reduce_scatter", "tensor", halves + again, (halves + again) * low),
                     ("backward", "all_reduce", "tensor", chunks, low)]
        else:
            back = halves + again
            rows += [("forward", "all_reduce", "tensor", halves + 1, halves * low + whole),
                     ("backward", "all_reduce", "tensor", back + chunks, (back + 1) * low)]
    replicate, shards = layout.sizes[:2]
    if shards > 1:
        phases = ("forward", "backward") if zero == 3 else ("forward",)
        rows += [(phase, "all_gather", "shard", groups, e * n) for phase in phases]
        rows.append(("backward", "reduce_scatter", "shard", groups, 4 * n))
    if replicate > 1:
        buckets = groups if layout.uses_fsdp else -(-int(4 * n) // 2**25)  # (DDP's hold 25 MB)
        rows.append(("backward", "all_reduce", "replicate", buckets, 4 * n / shards))
    if zero == 1 and dp > 1:
        rows.append(("step", "all_gather", "replicate", 1, 4 * n))
    return rows

def find_layouts(config: Config, ranks: int, per_node: int, micro_batch: int) -> list[dict]:
    """List the layouts of so many ranks with the GB that stand on each and that it sends in a step, best
    first."""
    found, T = [], config.seq_len
    widths = [2**i for i in range(per_node.bit_length()) if ranks % 2**i == 0]
    for tp, zero, recompute in ((t, z, r) for t in widths for z in range(4) for r in (False, True)):
        layout = Layout(ranks // tp, tp, zero)
        with contextlib.suppress(UserError):
            check_layout(layout, ranks, config)
            row = training_bytes(config, micro_batch, T, layout, recompute)
            row |= {"total": sum(row.values()), "tensor": 0.0, "data": 0.0}
            for _, name, axis, _, size in communication(config, micro_batch * T, layout, recompute):
                group = tp if axis == "tensor" else layout.dp
                times = 2 if name == "all_reduce" else 1  # in a ring each rank sends (W-1)/W of the whole
                row["tensor" if axis == "tensor" else "data"] += times * size * (group - 1) / group
            row = {name: size / 1e9 for name, size in row.items()}
            found.append({"dp": layout.dp, "tp": tp, "zero": zero, "recompute": recompute, **row})
    # what is sent between nodes costs most, then what is computed twice, then what is sent within one
    return sorted(found, key=lambda row: (row["data"], row["recompute"], row["tensor"]))


# ------------------------------------------------------------------------------------------------------------
# Part III: the same on PyTorch's engine
# ------------------------------------------------------------------------------------------------------------

def split_tensors(model: Transformer, mesh, sequence: bool) -> None:
    """Say tensor parallelism as DTensor placements: how each matrix is split, and what comes in and goes out.

    q, k, v, gate and up read the same input. It is prepared once for all of them (PrepareModuleInput), so
    their gradients for it are added before they are sent: one all-reduce, where each would send its own. The
    norms of q and k see the rank's heads only ("sequence" here means the axis of heads): see
    `sync_partial_gradients`.
    """
    whole = Replicate()
    between = Shard(1) if sequence else whole  # between the halves of a block: (B, t, C)
    columns = styles.ColwiseParallel()
    rows = styles.RowwiseParallel(output_layouts=between)
    rest = (None,) * 4
    for block in model.layers.values():
        plan = {
            "self_attn": styles.PrepareModuleInput(input_layouts=(between, *rest),
                                                   desired_input_layouts=(whole, *rest)),
            "self_attn.q_proj": columns,
            "self_attn.k_proj": columns,
            "self_attn.v_proj": columns,
            "self_attn.o_proj": rows,
            "mlp": styles.PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(whole,)),
            "mlp.gate_proj": columns,
            "mlp.up_proj": columns,
            "mlp.down_proj": rows,
        }
        if model.config.qk_norm:
            heads = styles.SequenceParallel(sequence_dim=2, use_local_output=True)
            plan |= {"self_attn.q_norm": heads, "self_attn.k_norm": heads}
        if sequence:
            norm = styles.SequenceParallel(use_local_output=True)
            plan |= {"input_layernorm": norm, "post_attention_layernorm": norm}
        styles.parallelize_module(block, mesh, plan)
    if sequence:
        styles.parallelize_module(model.norm, mesh, styles.SequenceParallel(use_local_output=False))
        gather = styles.PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=whole)
        styles.parallelize_module(model.norm, mesh, gather)
    styles.parallelize_module(model, mesh, {
        "embed_tokens": styles.RowwiseParallel(input_layouts=whole, output_layouts=between),  # part of ids
        "lm_head": styles.ColwiseParallel(input_layouts=whole, use_local_output=False),
    })
    model.tie_weights()

def parallelize(config: Config, o, layout: Layout, mesh, device: torch.device):
    """Build a rank's shares of a model -> (model, the module to call). Nothing is ever whole on one rank.

    The order: (1) tensor parallelism, since it decides what a rank's matrices are; (2) recomputation inside
    of the rest, so that a block that is computed again also sends again; (3) compile one block at a time (not
    where matrices are split); (4) data parallelism around the blocks: its gathers and hooks stay out of the
    compiled code and can run ahead of it. Built on "meta" and filled when sharded.
    """
    with torch.device("meta"):
        model = Transformer(config).train()
    if layout.tp > 1:
        split_tensors(model, mesh["tensor"], layout.sequence)
    model.compute_dtype = pick_dtype(o.dtype, device)
    model.recompute = o.recompute
    if o.compile == "on":
        model.compile_blocks()
    if layout.uses_fsdp:
        lower = None if model.compute_dtype == torch.float32 else model.compute_dtype
        options = {
            "mesh": mesh["replicate", "shard"] if layout.sizes[0] > 1 else mesh["shard"],
            "reshard_after_forward": layout.zero == 3,
            "mp_policy": MixedPrecisionPolicy(lower, torch.float32, cast_forward_inputs=False),  # fp32 sums
            "offload_policy": CPUOffloadPolicy() if layout.offload else OffloadPolicy(),
        }
        for block in model.layers.values():
            fully_shard(block, **options)
        fully_shard(model, **options)  # one group for what is left: embedding, last norm, output matrix
    model.to_empty(device="cpu" if layout.offload else device)
    model.tie_weights()
    model.init_weights(o.seed)
    if layout.dp > 1 and not layout.uses_fsdp:
        return model, DDP(model, process_group=mesh["replicate"].get_group(), init_sync=False)
    return model, model

def axes(tensor) -> tuple[str, ...]:
    """Name the axes of the grid over which a tensor is spread."""
    return tensor.device_mesh.mesh_dim_names if isinstance(tensor, DTensor) else ()

def local(tensor):
    """Give this rank's share of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

def full(tensor):
    """Give the whole of a tensor, on all ranks of its mesh (they all have to ask)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

def split_vocabulary(layout: Layout):
    """Let cross_entropy, forward and backward, take logits of which each rank has a part of the vocabulary.
    """
    return styles.loss_parallel() if layout.tp > 1 else contextlib.nullcontext()

def sync_gradients(forward: nn.Module, layout: Layout, last: bool):
    """Add gradients up over the ranks once, after the last micro-batch; with ZeRO-2 and -3 after each one,
    since a rank has room for its share only."""
    if isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(last or layout.zero >= 2)
        forward.set_reshard_after_backward(last or layout.zero == 3)
    return forward.no_sync() if isinstance(forward, DDP) and not last else contextlib.nullcontext()

def sync_partial_gradients(parameters) -> None:
    """Add up, in one all-reduce, gradients that are still the ranks' terms of a sum: those of norms that saw
    a part of the heads or of the sequence."""
    sharded = (p for p in parameters if isinstance(p.grad, DTensor))
    partial = [p for p in sharded if any(placement.is_partial() for placement in p.grad.placements)]
    if partial:
        mesh = partial[0].device_mesh
        flat = torch.cat([p.grad.to_local().flatten() for p in partial])
        flat = DTensor.from_local(flat, mesh, [Partial()] * mesh.ndim).full_tensor()
        for p, grad in zip(partial, flat.split([p.numel() for p in partial]), strict=True):
            p.grad = DTensor.from_local(grad.view(p.shape), mesh, p.placements)

@torch.no_grad()
def clip_gradients(parameters: list, limit: float, scale: float = 1.0):
    """Undo the loss scale of fp16 and clip the norm of the gradient over all ranks to `limit` -> the norm
    before.

    Each rank adds the squares of its shares, divided by how many ranks hold the same.
    """
    total = 0.0
    for p in parameters:
        copies = dist.get_world_size()
        if isinstance(p, DTensor):
            split = [p.device_mesh.size(i) for i, x in enumerate(p.placements) if not x.is_replicate()]
            copies //= math.prod(split)
        total = total + local(p.grad).float().square().sum().double() / copies
    norm = sum_over_ranks(total).sqrt() / scale
    grads = [local(p.grad) for p in parameters]
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0) / scale
    torch._foreach_mul_(grads, factor.to(grads[0]))
    return norm

def assign_owners(sizes: dict[str, int], ranks: list[int]) -> list[dict[str, int]]:
    """Deal matrices out to ranks, each to the one that has least so far -> rounds of {name: owner}.

    In a round each rank has at most one matrix: they work at the same time, and few whole matrices stand in
    memory.

    >>> assign_owners({"a": 4, "b": 2, "c": 2}, [0, 1])
    [{'a': 0, 'b': 1}, {'c': 1}]
    """
    queues = {rank: [] for rank in ranks}
    load = dict.fromkeys(ranks, 0)
    for name in sorted(sizes, key=sizes.get, reverse=True):
        owner = min(load, key=load.get)
        load[owner] += sizes[name]
        queues[owner].append(name)
    longest = max(map(len, queues.values()))
    return [{queue[i]: rank for rank, queue in queues.items() if i < len(queue)} for i in range(longest)]

class ParallelOptimizer:
    """Update weights of which a rank holds shares, with the optimizers of model.py.

    AdamW is element by element: on the shards of ZeRO-2 and -3 and of tensor parallelism it runs as it is;
    for ZeRO-1 it is shown a slice of each weight, which all ranks then gather. Muon needs a whole matrix:
    each has an owner, the only rank that keeps its momentum and runs Newton-Schulz on it, and that sends out
    the new weights.
    """

    def __init__(self, model: Transformer, o, layout: Layout, mesh):
        self.params = dict(model.named_parameters())
        # the owners are among the ranks that share one copy of the weights
        self.group = dist.group.WORLD if layout.zero else mesh["tensor"].get_group()
        matrices = {n: p.numel() for n, p in self.params.items() if p.dim() == 2 and n.startswith("layers.")}
        owned = o.optimizer == "muon" and (layout.tp > 1 or layout.zero > 0)
        self.rounds = assign_owners(matrices if owned else {}, dist.get_process_group_ranks(self.group))
        owners = {name: owner for owned in self.rounds for name, owner in owned.items()}
        self.mine = {}
        for name, owner in owners.items():
            whole = full(self.params[name].detach())
            if owner == dist.get_rank():
                self.mine[name] = nn.Parameter(whole.clone())
        self.meshes = {1: mesh["replicate"], 2: mesh["replicate", "tensor"]}
        self.slices = {}
        for name, p in self.params.items():
            # (an optimizer takes one kind only: beside DTensors a plain weight becomes one, all of it)
            sliced = (layout.zero == 1 and layout.dp > 1) or (layout.tp > 1 and not isinstance(p, DTensor))
            if sliced and name not in owners:
                self.slices[name] = nn.Parameter(self.cut_slice(p, p.detach()))
        stand_ins = dict.fromkeys(owners) | self.mine | self.slices
        self.inner = build_optimizer(model, o.optimizer, o.lr, o.weight_decay, stand_ins=stand_ins)
        self.set_lr = self.inner.set_lr

    def cut_slice(self, p, tensor) -> DTensor:
        """Cut this rank's slice for ZeRO-1 of a weight p, or its gradient: along an axis that tensor
        parallelism has not cut. One along rows is a view."""
        placements = [Shard(0)]
        taken = p.placements[-1] if "tensor" in axes(p) else Replicate()
        if taken.is_shard():  # (a bias has no other axis: all of it)
            placements = [Shard(1 - taken.dim) if p.dim() == 2 else Replicate(), taken]
        mesh = self.meshes[len(placements)]
        part = local(tensor)
        if placements[0].is_shard():
            dim = placements[0].dim
            parts = part.chunk(mesh.size(0), dim)
            i = mesh.get_local_rank(0)
            part = parts[i] if i < len(parts) else part.narrow(dim, 0, 0)
        stride = torch.empty(p.shape, device="meta").stride()
        return DTensor.from_local(part.contiguous(), mesh, placements, shape=p.shape, stride=stride)

    @torch.no_grad()
    def step(self) -> None:
        for owned in self.rounds:
            for name in owned:
                whole = full(self.params[name].grad)  # an all-gather; what another owns is dropped at once
                if name in self.mine:
                    self.mine[name].grad = whole.to(self.mine[name].device)
            for part in self.inner.parts:
                if isinstance(part, torch.optim.Muon):
                    part.step()  # on the one matrix that has a gradient
            for name, owner in owned.items():
                p = self.params[name]
                whole = torch.empty(p.shape, device=p.device)
                if name in self.mine:
                    whole = self.mine[name].detach()
                    self.mine[name].grad = None
                dist.broadcast(whole, owner, self.group)
                fill(p, whole)
        for name, part in self.slices.items():
            part.grad = self.cut_slice(self.params[name], self.params[name].grad)
        self.inner.step()
        for name, part in self.slices.items():
            whole = part.detach().redistribute(placements=[Replicate(), *part.placements[1:]])
            local(self.params[name].detach()).copy_(whole.to_local())

    def zero_grad(self) -> None:
        self.inner.zero_grad()
        for p in self.params.values():
            p.grad = None

    def tensors(self) -> dict:
        """Give the optimizer's state as it is on this rank, {name/key: tensor}; before the first step it is
        zeros."""
        out = {}
        for part in self.inner.parts:
            keys = ["momentum_buffer"] if isinstance(part, torch.optim.Muon) else ["exp_avg", "exp_avg_sq"]
            for p in (p for group in part.param_groups for p in group["params"]):
                if not part.state[p]:
                    part.state[p] |= {key: torch.zeros_like(p) for key in keys}
                    if len(keys) > 1:
                        part.state[p]["step"] = torch.zeros((), device=local(p).device)
                out |= {f"{self.inner.names[p]}/{key}": value for key, value in part.state[p].items()}
        return out

class Counter(TorchDispatchMode):
    """Count the collectives that run under it: {"phase/name": [how many, bytes of the whole tensors]}."""

    NAMES = {"all_reduce": "all_reduce", "allreduce_": "all_reduce", "all_gather_into_tensor": "all_gather",
             "_allgather_base_": "all_gather", "reduce_scatter_tensor": "reduce_scatter",
             "_reduce_scatter_base_": "reduce_scatter", "broadcast_": "broadcast"}

    def __init__(self):
        super().__init__()
        self.counts = {}
        self.phase = "step"

    def enter(self, phase: str):
        """Make a module's hook from which on what is sent belongs to this phase."""
        return lambda *_: setattr(self, "phase", phase)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t is DTensor for t in types):
            return NotImplemented  # its local form comes by in a moment
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and func._opname in self.NAMES:
            leaves = torch.utils._pytree.tree_leaves((args, result))
            entry = self.counts.setdefault(f"{self.phase}/{self.NAMES[func._opname]}", [0, 0])
            entry[0] += 1
            entry[1] += max(t.nbytes for t in leaves if isinstance(t, torch.Tensor))
        return result

# ---- Checkpoints: sharded and in the background while it runs, whole at the end ----------------------------

def named_weights(model: Transformer) -> dict:
    """Name the parameters, and the routers' bias."""
    return {n: p.detach() for n, p in [*model.named_parameters(), *model.named_buffers()]}

class Saver:
    """Write shards in the background; when all ranks have, rank 0 puts them in their place.

    torch.distributed.checkpoint writes safetensors whose headers say which part of a tensor is where, so that
    any other layout finds its own shares. It talks over a group of its own: its thread must not cut in on the
    training's.
    """

    def __init__(self, folder: str, model: Transformer, optimizer: ParallelOptimizer, tokenizer: Path):
        self.folder, self.model, self.optimizer, self.tokenizer = Path(folder), model, optimizer, tokenizer
        self.new = self.folder / "state" / "shards.new"
        self.group = dist.new_group(backend="gloo")
        self.pending = self.state = None

    def begin(self, state: dict) -> None:
        """Copy this rank's shares and start to write them."""
        self.finish()
        self.state = state
        if dist.get_rank() == 0 and self.new.exists():
            clear(self.new)
        dist.barrier()
        tensors = {hf_name(n, self.model.config): p for n, p in named_weights(self.model).items()}
        tensors |= self.optimizer.tensors()
        tensors = {n: t.detach().clone() for n, t in tensors.items()}  # the next step changes them in place
        writer = HuggingFaceStorageWriter(str(self.new), save_distributed=True)
        self.pending = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)

    def finish(self, wait: bool = True) -> None:
        """Put the shards on their way in the place of the old ones, when all ranks have written theirs."""
        if self.pending is None or not (wait or self.pending.done()):
            return
        pending, self.pending = self.pending, None
        try:
            pending.result()  # on rank 0 this means: of all ranks
        except dcp.CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]  # that of one rank
            raise UserError(f"{self.folder} could not be written ({reason}); its files are whole.") from None
        if dist.get_rank() > 0:
            return
        shards = self.folder / "state" / "shards"
        shards.mkdir(exist_ok=True)
        old = {f"state/shards/{path.name}" for path in shards.glob("*.safetensors")}
        files = checkpoint_files(self.model.config, self.tokenizer)
        files["state/state.json"] = json.dumps(self.state, indent=1) + "\n"
        for path in self.new.iterdir():  # file by file, so that all ranks may call finish_save at once
            os.replace(path, shards / f"{path.name}.new")
            files[f"state/shards/{path.name}"] = None
        self.new.rmdir()
        stale = {"model.safetensors", "state/optimizer.safetensors", *old} - files.keys()
        save_files(self.folder, files, stale)

def has_shards(folder: str | Path) -> bool:
    return any(Path(folder, "state", "shards").glob("*.safetensors"))

def load_tensors(folder: str | Path, part: str, wanted: dict) -> None:
    """Read this rank's shares of the weights (part: "") or "state", whatever layout has written them."""
    folder = Path(folder)
    reader = HuggingFaceStorageReader(str(folder / ("state/shards" if has_shards(folder) else part)))
    held = reader.read_metadata().state_dict_metadata
    missing = [name for name in wanted if held and name not in held]
    check(not missing, f"{folder} lacks {', '.join(missing[:1])}: it is not of this run.")
    if held:  # before its first step train.py has no state
        dcp.load(wanted, storage_reader=reader)

def join_shards(folder: Path) -> None:
    """Make a Hugging Face folder with train.py's state of a folder with shards; one process does."""
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # so it is meant
    reader = HuggingFaceStorageReader(str(folder / "state" / "shards"))
    held = reader.read_metadata().state_dict_metadata
    tensors = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in held.items()}
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    with torch.device("meta"):
        model = Transformer(config_from_hf(read_json(folder / "config.json")))
    weights = {n: tensors.pop(hf_name(n, model.config)) for n in named_weights(model)}
    state = (tensors, saved_state(folder))
    save_checkpoint(folder, model, folder / "tokenizer.json", state=state, weights=weights)


# ------------------------------------------------------------------------------------------------------------
# Part IV: the run
# ------------------------------------------------------------------------------------------------------------

@dataclass
class Options(TrainOptions):
    """Hold the options of this command: what any pretraining is told, and the layout of the processes."""

    changeable = TrainOptions.changeable | {"dp", "tp", "zero", "replicate", "sequence_parallel", "offload",
                                            "timeout", "count_communication"}
    dp: Annotated[int | None, opt("Layout", "Data-parallel ranks; by default all that --tp leaves.",
                                  low=1)] = None
    tp: Annotated[int, opt("Layout", "Tensor-parallel ranks, on one node: each matrix is split.", low=1)] = 1
    zero: Annotated[int, opt("Layout", "What dp ranks shard: 0 nothing, 1 the optimizer, 2 gradients too, "
                             "3 parameters too.", low=0)] = 0
    replicate: Annotated[int, opt("Layout", "Groups of ranks that each hold all shards.", low=1)] = 1
    sequence_parallel: Annotated[bool, opt("Layout", "With --tp: split norms along the sequence.",
                                           "--sequence-parallel/--no-sequence-parallel")] = False
    count_communication: Annotated[bool, opt("Layout", "Run one step: collectives, bytes and the formulas.",
                                             "--count-communication")] = False
    offload: bool = False  # shards stand in host memory between uses (CUDA, --zero 2 or 3)
    timeout: float = 600.0  # seconds after which a silent rank counts as dead

    def __post_init__(self):
        super().__post_init__()
        # what --set said is in the fields now, and train.py, which may go on, has other names for these
        own = ("offload", "timeout", "eval_tokens", "doc_mask")
        self.set = [item for item in self.set if not item.startswith(own)]

    def layout(self, world: int) -> Layout:
        dp = self.dp or max(1, world // self.tp)
        return Layout(dp, self.tp, self.zero, self.replicate, self.sequence_parallel, self.offload)

def join_processes(device: str, timeout: float) -> Ranks:
    """Join torchrun's group; without torchrun, a group of one, so that nothing below has to ask."""
    more = {}
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store still has the addresses of the processes before the restart: look elsewhere in it
        rank, world, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        store = dist.TCPStore(os.environ["MASTER_ADDR"], port, world, is_master=False)
        more = {"store": dist.PrefixStore(f"attempt_{attempt}", store), "rank": rank, "world_size": world}
    ranks = setup_distributed(device, timeout, **more)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    # known of: DTensor gathers twice in a row, and the losses, which nobody changes in place, are a view
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    return ranks

def open_model(o: Options, config: Config, layout: Layout, ranks: Ranks):
    """Build a rank's shares -> (model, the module to call, optimizer): new, those of --init, or as a run left
    them."""
    mesh = init_device_mesh(ranks.device.type, layout.sizes, mesh_dim_names=AXES)
    model, forward = parallelize(config, o, layout, mesh, ranks.device)
    if o.resume or o.init:
        load_tensors(o.resume or o.init, "", {hf_name(n, config): p for n, p in named_weights(model).items()})
    optimizer = ParallelOptimizer(model, o, layout, mesh)
    if o.resume:
        load_tensors(o.resume, "state", optimizer.tensors())
    return model, forward, optimizer

def gradients_of_step(forward, micro_batches: list, targets, windows: int, layout: Layout, scale=1.0):
    """Add up the gradients of a step over its micro-batches and all ranks -> this rank's part of (loss, aux).

    micro_batches: [(inputs, targets, documents)] of this rank; targets, windows: how many there are in the
    step.
    """
    loss = aux = torch.zeros((), device=targets.device)
    for i, (x, y, documents) in enumerate(micro_batches):
        last = i == len(micro_batches) - 1
        with sync_gradients(forward, layout, last), split_vocabulary(layout):
            losses, layers = forward(x, y, doc_ids=documents)
            losses = full(losses)  # (B, T): nats of each token
            layers = layers * (len(x) / windows)  # (L, ..): what each layer adds, means over sequences
            part = losses.sum() / targets + layers[:, 0].sum()
            (part * (scale * layout.dp)).backward()  # DDP and fully_shard divide by dp: undo that
        loss = loss + losses.detach().sum() / targets
        aux = aux + layers.detach()
    sync_partial_gradients(forward.parameters())
    return loss, aux

def train(o: Options) -> dict:
    """Train on many processes (started by torchrun), as train.py does on one: same data, same loss, same
    folders."""
    # 1. Where, with what, and which model on which grid
    ranks = join_processes(o.device, o.timeout)
    o = go_on_after_restart(o)
    saved = {} if o.count_communication and not o.resume else open_run(o)
    default_data(o.data[0], ranks)
    sources, val, weights = open_data(o.data)
    data = fingerprint(sources)
    check(not saved or saved["data"] == data,
          f"The data or its tokenizer is not what {o.out} was trained on: restore it to resume.")
    config = make_config(o, sources[0], bool(saved))
    check(config.causal, f"{o.resume or o.init} is a masked model: use train.py, alone or under torchrun.")
    layout = o.layout(ranks.world)
    check_layout(layout, ranks.world, config)
    derive(o, config, layout.dp, ranks.device)
    if layout.tp > 1 and o.compile == "on":  # DTensor's redistribution has no compiled backward pass in 2.13
        say("torch.compile does not go with tensor parallelism here; going on without it.")
        o.compile = "off"
    say(f"{count_params(config)[0] / 1e6:.1f}M parameters on {ranks.world} processes ({layout}), "
        f"{o.optimizer}, {o.dtype} on {ranks.device}; {o.max_steps} steps of {o.tokens_per_step:,} tokens")

    # 2. What a step needs, and what surrounds it
    model, forward, optimizer = open_model(o, config, layout, ranks)
    part = ranks.rank // layout.tp  # ranks that split one model read the same tokens
    batches = Batches(sources, weights, o, config.seq_len, ranks.device, part, layout.dp, saved.get("taken"))
    if o.count_communication:
        return count_step(o, layout, model, forward, optimizer, batches)
    saver = Saver(o.out, model, optimizer, sources[0].folder / "tokenizer.json")
    moe = load_moe() if config.n_expert else None

    def save(folder: Path, state: dict) -> None:
        saver.begin(state | {"taken": batches.taken, "data": data, "layout": str(layout)})
        if state["finished"] or not state["at"]:
            saver.finish()
        if state["finished"] and ranks.rank == 0:
            join_shards(folder)
        barrier()

    # 3. The steps
    measure = functools.partial(assess, o, layout, model, val, weights)
    run = Run(o, ranks, save, measure, saved, config.flops_per_token())
    with finish_or_explain(saver, ranks):
        for step, lr in run.steps():
            micro_batches, targets, windows = batches.at(step)
            targets = targets / layout.tp
            torch.manual_seed(seed_of(o.seed, step, part))  # of dropout
            loss, aux = gradients_of_step(forward, micro_batches, targets, windows, layout, run.scale)
            grad_norm = clip_gradients(list(model.parameters()), o.grad_clip, run.scale)
            loss, aux = sum_over_ranks(loss / layout.tp), sum_over_ranks(aux / layout.tp)
            routing = moe.routing_record(aux, config) if moe else {}
            tokens = windows * config.seq_len
            if run.update(optimizer, lr, loss=loss, grad_norm=grad_norm, tokens=tokens, **routing) and moe:
                moe.shift_bias(model, aux)
            saver.finish(wait=False)
    say(f"Done: {o.out} opens in transformers, and train.py --resume goes on with it "
        f"({time.perf_counter() - START:.1f} s, {run.eval_seconds:.1f} of them evaluation).")
    return run.result

def go_on_after_restart(o: Options) -> Options:
    """Resume from the last save where torchrun has started the processes again because a rank died."""
    if not o.resume and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:
        with contextlib.suppress(UserError):
            return resumed(Options, o.out)
    return o

@contextlib.contextmanager
def finish_or_explain(saver: Saver, ranks: Ranks):
    """Finish the save that is under way when a run is stopped; say in a sentence when other ranks are gone.
    """
    try:
        yield
    except KeyboardInterrupt:
        saver.finish()
        raise
    except RuntimeError as error:
        first = str(error).splitlines()[0][:120]
        lost = ("gloo", "connection", "timed out", "timeout", "nccl", "peer")
        if not any(word in str(error).lower() for word in lost):
            raise
        raise UserError(f"Rank {ranks.rank} lost the others ({first}): go on with --resume {saver.folder}; "
                        "torchrun --max-restarts does it by itself.") from None

def assess(o: Options, layout: Layout, model: Transformer, val: list[Tokens], weights, last: bool) -> dict:
    """Evaluate on the validation text; ranks that split one model read the same part of it."""

    def forward(x, y, documents):
        with split_vocabulary(layout):
            return full(model(x, y, doc_ids=documents)[0])

    def one(tokens: Tokens) -> dict:
        return evaluate(model, tokens, model.config.seq_len, o.micro_batch, None if last else o.eval_tokens,
                        forward=forward, share=(dist.get_rank() // layout.tp, layout.dp), doc_mask=o.doc_mask)

    result = evaluate_mixture(one, val, weights)
    for module in (m for m in model.modules() if isinstance(m, FSDPModule)):
        module.reshard()  # without a backward pass ZeRO-2's weights stay whole, and rounded: not to be saved
    return result | {"val_ppl": math.exp(min(result["val_loss"], 50))}

# ---- Commands ----------------------------------------------------------------------------------------------

def count_step(o: Options, layout: Layout, model, forward, optimizer, batches: Batches) -> dict:
    """Run a step without an update -> {"measured": ..., "formula": ...}: what is sent, and what stands in
    memory."""
    from rich.table import Table

    state = {n: t for n, t in optimizer.tensors().items() if not n.endswith("/step")}
    stands = {"parameters": sum(local(p).nbytes for p in model.parameters())}

    def measure_gathered(*_):  # what fully_shard has gathered has no axis "shard" for the moment
        whole = [p for p in model.parameters() if layout.uses_fsdp and "shard" not in axes(p)]
        stands["gathered"] = sum(local(p).nbytes for p in whole)

    counter = Counter()
    model.layers[str(model.config.n_layer - 1)].mlp.register_forward_pre_hook(measure_gathered)
    forward.register_forward_pre_hook(counter.enter("forward"), prepend=True)  # before fully_shard's own
    forward.register_forward_hook(counter.enter("backward"))
    micro_batches, targets, windows = batches.at(0)
    with counter:
        loss, _ = gradients_of_step(forward, micro_batches, targets / layout.tp, windows, layout)
    stands["gradients"] = sum(local(p.grad).nbytes for p in model.parameters())
    stands["optimizer"] = sum(local(t).nbytes for t in [*state.values(), *optimizer.mine.values()])
    optimizer.zero_grad()
    B, T = micro_batches[0][0].shape
    costs = (layout, o.recompute, model.compute_dtype.itemsize)
    formula = {name: [0, size] for name, size in training_bytes(model.config, B, T, *costs).items()}
    for phase, name, _, count, size in communication(model.config, B * T, *costs):
        entry = formula.setdefault(f"{phase}/{name}", [0, 0])
        entry[0] += count
        entry[1] += size
    measured = counter.counts | {name: [0, size] for name, size in stands.items()}
    table = Table("rank 0", "measured", "MB", "formula", "MB", title=f"One step, {layout}")
    for key in measured:
        pair = (measured[key], formula.get(key, [0, 0]))
        table.add_row(key, *(cell for n, size in pair for cell in (str(n or ""), f"{size / 1e6:.3f}")))
    if dist.get_rank() == 0:
        console().print(table)
    return {"measured": measured, "formula": formula, "loss": float(sum_over_ranks(loss / layout.tp))}

def plan(
    preset: Annotated[str, typer.Option(help=f"Shape of the model: {', '.join(PRESETS)}.")] = "llama-2-70b",
    gpus: Annotated[int, typer.Option(help="Ranks in all.", min=1)] = 512,
    memory: Annotated[float, typer.Option(help="Of each, in GB (1e9 bytes).", min=0)] = 80.0,
    per_node: Annotated[int, typer.Option(help="Ranks with fast links: --tp stays within.", min=1)] = 8,
    micro_batch: Annotated[int, typer.Option(help="Sequences at once on a rank.", min=1)] = 1,
    seq_len: Annotated[int | None, typer.Option(help="Context, instead of the preset's.", min=1)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a layout.")] = False,
) -> None:
    """Show which layouts fit: GB on a rank, GB it sends in a step. Activations in bf16, AdamW in fp32."""
    from rich.table import Table

    check(preset in PRESETS, f"--preset is one of {', '.join(PRESETS)}; not {preset!r}.")
    config = PRESETS[preset]
    config = config.replace(vocab_size=config.vocab_size or round_up(4096), seq_len=seq_len or config.seq_len)
    say(f"{preset}: {count_params(config)[0] / 1e9:.2f}B parameters, {micro_batch} x {config.seq_len} tokens "
        f"on each of {gpus} ranks of {memory:g} GB")
    layouts = find_layouts(config, gpus, per_node, micro_batch)
    fitting = [row for row in layouts if row["total"] <= memory]
    if as_json:
        for row in fitting:
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}))
        return
    least = min(layouts, key=lambda row: row["total"])
    words = f"dp {least['dp']} x tp {least['tp']}, ZeRO-{least['zero']}" + ", recompute" * least["recompute"]
    check(fitting, f"Nothing fits; the least is {least['total']:.1f} GB ({words}): more ranks, or a shorter "
          "--seq-len.")
    table = Table("dp", "tp", "ZeRO", "recompute", "params", "gathered", "grads", "optimizer", "activations",
                  "all", "sent tp", "sent dp", title="GB on a rank, and GB that it sends in a step")
    for row in fitting[:16]:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    console().print(table)

def export(folder: Annotated[Path, typer.Argument(help="The folder of a run that was stopped.")]) -> None:
    """Join the shards of a folder: then transformers opens it, and train.py --resume goes on with it."""
    at = saved_state(folder)["at"]
    check(has_shards(folder), f"{folder} has whole tensors already.")
    join_shards(folder)
    say(f"{folder} is whole, at step {at}.")

if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(plan)
    app.command()(export)
    if not {"plan", "export"} & set(sys.argv[1:2]):  # without the name of a command: train
        app.callback(invoke_without_command=True)(command(Options, train))
    run_app(app)
