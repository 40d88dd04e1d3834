"""Pretraining on many processes: data parallel (DDP, ZeRO-1/2/3) and tensor parallel, on PyTorch's engine.

    torchrun --nproc-per-node 2 parallel.py                                  # DDP on two CPU cores or GPUs
    torchrun --nproc-per-node 4 parallel.py --dp 2 --tp 2 --zero 3           # sharded data, split matrices
    torchrun --nproc-per-node 4 parallel.py --resume out/python --dp 1 --tp 4  # go on, on another layout
    python parallel.py plan --preset llama-2-70b --gpus 512 --memory 80      # which layouts fit
    python parallel.py export out/python                                     # join a stopped run's shards

It trains what train.py trains, from the same data folder to the same checkpoint folder, and each can go on
with the other's, but for --patience, --target-loss and --noise-scale, which end there. The processes form a
grid (`AXES`); tensor parallelism talks in every layer and is innermost, where the links are fast, data
parallelism talks once a step and is outermost.

Part I says each idea in plain lines with bare collectives: column- and row-parallel matrices (Shoeybi et al.
2019, 1909.08053), ZeRO-1, -2 and -3 (Rajbhandari et al. 2019, 1910.02054). Part II has their costs as
formulas. Part III composes PyTorch's engine for the same: DDP (Li et al. 2020, 2006.15704), fully_shard
(FSDP, Zhao et al. 2023, 2304.11277) and DTensor. The tests hold the three equal to each other and to one
process. Left out: masked models (train.py has them, with DDP), and splitting the experts of a mixture.
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
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from model import (  # before torch: it says how OpenMP's threads wait
    KEEP_LOGITS, PRESETS, START, Batches, Config, Ranks, Run, Tokens, TrainOptions, Transformer, UserError,
    barrier, build_optimizer, check, checkpoint_files, clear, command, console, count_params, default_data,
    derive, evaluate, evaluate_mixture, fill, fingerprint, flops_per_token, hf_name, load_config, load_model,
    load_moe, load_state, make_config, open_data, open_run, opt, pick_dtype, reading, resize, resumed,
    run_app, save_checkpoint, save_files, saved_state, say, seed_of, setup_distributed, sum_over_ranks,
)

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.tensor.parallel as styles
import typer
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

# W ranks; dp, tp how many along an axis. B, T, C, H, I, N, L as in model.py, lower case for one rank's share.

# ---- Part I: the ideas, with bare collectives --------------------------------------------------------------

class _Copy(torch.autograd.Function):
    """Hand on the input, and add up the ranks' gradients for it: Megatron's f (1909.08053, figure 3)."""

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
    """Run layers[i] (flat weights, x) -> x, where a rank keeps shards[i] (P/W,) of its weights: 16P/W bytes.

    A layer is gathered when it is needed, thrown away, and (checkpoint computes it again) gathered once more
    for its backward pass: two all-gathers and a reduce-scatter. The step is adamw on each shard.
    """

    def gather_and_run(layer, shard, x):
        return layer(_Gather.apply(shard), x)

    for layer, shard in zip(layers, shards, strict=True):
        x = checkpoint(gather_and_run, layer, shard, x, use_reentrant=False)
    return x

# ---- Part II: layouts, and what they cost ------------------------------------------------------------------

# Outermost first. A step's gradients cross the outer axes once, activations the inner one in every layer.
AXES = ("replicate", "shard", "tensor")

@dataclass(frozen=True)
class Layout:
    """Divide W = dp x tp ranks: the data goes dp = replicate x shard ways, through a model split over tp."""

    dp: int = 1
    tp: int = 1
    zero: int = 0
    replicate: int = 1  # with ZeRO-2 and -3: groups that each hold a whole set of shards
    sequence: bool = False  # norms and residuals split along the sequence between the tensor-parallel halves
    optimizer: str = "adamw"  # or "muon", whose matrices are dealt out whole

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Give the lengths of the axes: what is not sharded over data is replicated."""
        replicate = self.dp if self.zero < 2 else self.replicate
        return replicate, self.dp // replicate, self.tp

    @property
    def uses_fsdp(self) -> bool:
        """Tell whether fully_shard does the data parallelism: DDP has no shards and takes no DTensors."""
        return self.dp > 1 and (self.zero >= 2 or self.tp > 1)

    @property
    def owners(self) -> int:
        """Count the ranks that share one copy of the weights: Muon's matrices are dealt out to them."""
        return self.tp * (self.dp if self.zero else 1) if self.optimizer == "muon" else 1

# Fields of Config that the plan of `split_tensors` does not know.
WHOLE = ("position", "norm", "norm_plus_one", "post_norm", "parallel_block", "gated", "o_bias", "mlp_bias",
         "head_bias", "scale_embedding", "kv_rank")

def check_layout(layout: Layout, world: int, config: Config) -> None:
    """Refuse a layout that cannot be, and name the nearest one that can."""
    dp, tp, zero = layout.dp, layout.tp, layout.zero
    check(zero in range(4), f"--zero is 0, 1, 2 or 3; not {zero}.")
    widths = {"heads": config.n_head, "key-value heads": config.n_kv_head, "vocabulary": config.vocab_size,
              "feed-forward width": config.ffn_dim}
    counts = [world, *widths.values()]
    fitting = [n for n in range(1, min(counts) + 1) if not any(count % n for count in counts)]
    near = min(fitting, key=lambda n: abs(math.log(world / n / dp)) + abs(math.log(n / tp)))
    why = [f"{width} {what} do not divide by {tp}" for what, width in widths.items() if width % tp]
    why += [f"{dp} x {tp} is {dp * tp}, and there are {world} processes"] * (dp * tp != world)
    check(not why, f"--dp {dp} --tp {tp} cannot be: {', '.join(why[:1])}; the nearest that can is "
          f"--dp {world // near} --tp {near}.")
    check(tp == 1 or not config.n_expert,
          "A mixture of experts cannot be split by --tp yet: use --dp, with --zero 3 where memory is short.")
    odd = [name for name in WHOLE if getattr(config, name) != getattr(Config, name)]
    check(tp == 1 or not odd, f"A model with {', '.join(odd)} cannot be split by --tp yet: use --dp.")
    check(dp % layout.replicate == 0 and (layout.replicate == 1 or zero >= 2),
          f"--replicate {layout.replicate} has to divide --dp {dp}, and needs --zero 2 or 3.")
    check(not layout.sequence or (tp > 1 and config.seq_len % tp == 0),
          f"--sequence-parallel needs --tp above 1 that divides the context of {config.seq_len}.")

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
def count_model(config: Config) -> tuple[int, int]:
    """Count all parameters, and those in the matrices of layers, which are nearly all that layers have."""
    with torch.device("meta"):
        model = Transformer(config)
    return sum(p.numel() for p in model.parameters()), sum(layer_matrices(model).values())

def layer_matrices(model: Transformer) -> dict[str, int]:
    """List the matrices of layers, which are Muon's: {name: parameters}."""
    named = model.named_parameters()
    return {name: p.numel() for name, p in named if p.dim() == 2 and name.startswith("layers.")}

def training_bytes(config: Config, B: int, T: int, layout: Layout, recompute=False, e=2) -> dict:
    """Count the bytes that stand in a rank's memory when it trains on B sequences of T tokens at once.

    {"parameters", "gathered", "gradients", "optimizer", "activations"}; e: bytes of an activation.
    fully_shard keeps a shard beside what it has gathered: the whole model with ZeRO-2, embedding and two
    blocks with ZeRO-3. Muon has one moment, and owners a copy of their matrices. Activations are what a
    block's backward pass needs, where attention is not written out.
    """
    c, L, tp, zero = config, config.n_layer, layout.tp, layout.zero
    n, matrices = (count / tp for count in count_model(c))  # (all ranks have norms: next to nothing)
    shards = layout.dp if zero == 1 else layout.sizes[1]
    parameters, gradients, moments = zero_bytes(n, shards, zero)
    if layout.optimizer == "muon":
        moments *= 1 - matrices / n  # AdamW's, of the rest
        moments += tp * matrices * (8 / layout.owners if layout.owners > 1 else 4)
    gathered = e * n if e < 4 or layout.uses_fsdp else 0.0
    if zero >= 2 and shards > 1:
        parameters = 4 * n / shards
        gathered = e * (n if zero == 2 else n - max(0, 1 - 2 / L) * matrices)
    heads = (c.n_head + c.n_kv_head) * c.head_dim / tp
    width = c.ffn_dim / tp
    if c.n_expert:  # the rows that go to the experts, and what comes back, stand beside the tokens
        width = c.expert_dim * (c.n_expert_active + c.n_expert_shared) + c.n_embd * c.n_expert_active / 2
    layer = 4 * c.n_embd + (3 + c.qk_norm) * heads + 4 * width  # norms' inputs and outputs; q, k, v, y
    kept = L * c.n_embd + layer if recompute else L * layer
    logits = min(B * T * c.vocab_size / tp, KEEP_LOGITS)
    return {"parameters": parameters, "gathered": gathered, "gradients": gradients, "optimizer": moments,
            "activations": e * B * T * kept + 4 * logits}

def communication(config: Config, N: int, layout: Layout, recompute=False, e=2) -> list[tuple]:
    """List what a step on one micro-batch of N tokens a rank sends: (collective, axis, bytes).

    bytes: of the whole tensors. Tensor parallelism: two all-reduces of the activations (N, C) a block,
    forward and backward (1909.08053, 3); with the sequence split (2205.05198, figure 5) each is an all-gather
    and a reduce-scatter. Data parallelism: the gradients once; the weights once with ZeRO-1 and 2, twice with
    ZeRO-3 (1910.02054, 7). Muon: a matrix's gradient to its owner, its weights back. Not: norms' gradients.
    """
    c, rows = config, []
    replicate, shards, tp = layout.sizes
    n, matrices = (count / tp for count in count_model(c))
    if tp > 1:
        sent = (4 + recompute) * c.n_layer  # a block that is computed again also sends its first half again
        low = e * N * c.n_embd
        whole = 4 * N * c.n_embd  # float32 at either end of the model
        # three numbers a token for the loss, and the gradient of what the output matrix reads
        rows.append(("all_reduce", "tensor", 3 * 4 * N + low))
        if layout.sequence:  # (to be computed again, what was split is gathered again)
            gathered = sent + 1 + c.n_layer * recompute
            rows.append(("all_gather", "tensor", gathered * low + whole))
            rows.append(("reduce_scatter", "tensor", sent * low + whole))
        else:
            rows.append(("all_reduce", "tensor", sent * low + whole))
    if shards > 1:
        rows.append(("all_gather", "shard", (2 if layout.zero == 3 else 1) * e * n))
        rows.append(("reduce_scatter", "shard", 4 * n))
    if replicate > 1:
        rows.append(("all_reduce", "replicate", 4 * n / shards))
    if layout.owners > 1:
        n -= matrices  # the others are AdamW's
        whole = 4 * matrices * tp
        if tp > 1:
            rows.append(("all_gather", "tensor", whole / shards))
        if shards > 1:
            rows.append(("all_gather", "shard", whole))
        rows.append(("broadcast", "shard" if layout.zero else "tensor", whole))
    if layout.zero == 1 and layout.dp > 1:
        rows.append(("all_gather", "replicate", 4 * n))
    return rows

def find_layouts(config: Config, ranks: int, per_node: int, micro_batch: int, optimizer: str) -> list[dict]:
    """List the layouts of so many ranks, with the GB that stand on each and that it sends, best first."""
    found = []
    tokens = micro_batch * config.seq_len
    widths = [2**i for i in range(per_node.bit_length()) if ranks % 2**i == 0]
    for tp, zero, recompute in itertools.product(widths, range(4), (False, True)):
        layout = Layout(ranks // tp, tp, zero, optimizer=optimizer)
        with contextlib.suppress(UserError):
            check_layout(layout, ranks, config)
            row = training_bytes(config, micro_batch, config.seq_len, layout, recompute)
            row |= {"total": sum(row.values()), "tensor": 0.0, "data": 0.0}
            for name, axis, size in communication(config, tokens, layout, recompute):
                link = axis if axis == "tensor" else "data"
                group = tp if axis == "tensor" else layout.dp
                times = 2 if name == "all_reduce" else 1  # in a ring each rank sends (W-1)/W of the whole
                row[link] += times * size * (group - 1) / group
            row = {name: size / 1e9 for name, size in row.items()}
            found.append({"dp": layout.dp, "tp": tp, "zero": zero, "recompute": recompute, **row})
    # what is sent between nodes costs most, then what is computed twice, then what is sent within one
    return sorted(found, key=lambda row: (row["data"], row["recompute"], row["tensor"]))

# ---- Part III: the same on PyTorch's engine ----------------------------------------------------------------

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
            "mlp": styles.PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(whole,)),
        }
        plan |= {f"self_attn.{name}_proj": columns for name in "qkv"}
        plan |= {f"mlp.{name}_proj": columns for name in ("gate", "up")}
        plan |= {"self_attn.o_proj": rows, "mlp.down_proj": rows}
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
    """Build a rank's shares of a model -> (model, the module to call).

    The order: (1) tensor parallelism, since it decides what a rank's matrices are; (2) recomputation inside
    of the rest, so that a block that is computed again also sends again; (3) compile one block at a time (not
    where matrices are split); (4) data parallelism around the blocks: its gathers and hooks stay out of the
    compiled code and can run ahead of it. Filled when it is sharded: one whole tensor at a time.
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
        }
        for block in model.layers.values():
            fully_shard(block, **options)
        fully_shard(model, **options)  # one group for what is left: embedding, last norm, output matrix
    model.to_empty(device=device)
    model.tie_weights()
    model.init_weights(o.seed)
    if layout.dp > 1 and not layout.uses_fsdp:
        return model, DDP(model, process_group=mesh["replicate"].get_group(), init_sync=False)
    return model, model

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
    """Add gradients up over the ranks after the last micro-batch; for ZeRO-2 and -3, short of room, each."""
    if isinstance(forward, FSDPModule):
        forward.set_requires_gradient_sync(last or layout.zero >= 2)
        forward.set_reshard_after_backward(last or layout.zero == 3)
    return forward.no_sync() if isinstance(forward, DDP) and not last else contextlib.nullcontext()

def sync_partial_gradients(parameters) -> None:
    """Add up the gradients of norms that saw a part of the heads or of the sequence."""
    for p in parameters:
        if isinstance(p.grad, DTensor) and p.grad.placements != p.placements:
            p.grad = p.grad.redistribute(placements=p.placements)

@torch.no_grad()
def clip_gradients(parameters: list, limit: float, scale: float = 1.0):
    """Undo the loss scale of fp16 and clip the gradient's norm over all ranks to `limit` -> the norm.

    Each rank adds the squares of its shares, divided by how many ranks hold the same.
    """
    total = 0.0
    for p in parameters:
        copies = dist.get_world_size()
        if isinstance(p, DTensor):
            cuts = [p.device_mesh.size(i) for i, x in enumerate(p.placements) if not x.is_replicate()]
            copies //= math.prod(cuts)
        total = total + local(p.grad).float().square().sum().double() / copies
    norm = sum_over_ranks(total).sqrt() / scale
    grads = [local(p.grad) for p in parameters]
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0) / scale
    torch._foreach_mul_(grads, factor.to(grads[0]))
    return norm

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

    def __init__(self, model: Transformer, o, layout: Layout, mesh):
        self.params = dict(model.named_parameters())
        self.group = dist.group.WORLD if layout.zero else mesh["tensor"].get_group()
        sizes = layer_matrices(model) if layout.owners > 1 else {}
        self.rounds = assign_owners(sizes, dist.get_process_group_ranks(self.group))
        self.mine = {}
        for owned in self.rounds:
            for name, owner in owned.items():
                whole = full(self.params[name].detach())
                if owner == dist.get_rank():
                    self.mine[name] = nn.Parameter(whole.clone())
        self.meshes = {1: mesh["replicate"], 2: mesh["replicate", "tensor"]}
        self.slices = {}
        for name, p in self.params.items():
            # (an optimizer takes one kind only: beside DTensors a plain weight becomes one, all of it)
            sliced = (layout.zero == 1 and layout.dp > 1) or (layout.tp > 1 and not isinstance(p, DTensor))
            if sliced and name not in sizes:
                self.slices[name] = nn.Parameter(self.cut_slice(p, p.detach()))
        stand_ins = dict.fromkeys(sizes) | self.mine | self.slices
        self.inner = build_optimizer(model, o.optimizer, o.lr, o.weight_decay, stand_ins=stand_ins)
        self.set_lr = self.inner.set_lr

    def cut_slice(self, p, tensor) -> DTensor:
        """Cut this rank's slice for ZeRO-1 of a weight p, or of its gradient, along an axis that is whole."""
        placements = [Shard(0)]
        if isinstance(p, DTensor) and p.device_mesh.mesh_dim_names[-1] == "tensor":
            taken = p.placements[-1]
            if taken.is_shard():  # (a bias has no other axis: all of it)
                placements = [Shard(1 - taken.dim) if p.dim() == 2 else Replicate(), taken]
        mesh = self.meshes[len(placements)]
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

# ---- Checkpoints: sharded and in the background while it runs, whole at the end ----------------------------

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
            dist.barrier()
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

    changeable = TrainOptions.changeable | {"dp", "tp", "zero", "replicate", "sequence_parallel", "timeout"}
    dp: Annotated[int | None, opt("Layout", "Data-parallel ranks: all that --tp leaves.", low=1)] = None
    tp: Annotated[int, opt("Layout", "Tensor-parallel ranks, on one node: each matrix is split.", low=1)] = 1
    zero: Annotated[int, opt("Layout", "Sharded: 1 the optimizer, 2 gradients too, 3 all.", low=0)] = 0
    replicate: Annotated[int, opt("Layout", "Groups of ranks that each hold all shards.", low=1)] = 1
    sequence_parallel: Annotated[bool, opt("Layout", "With --tp: split norms along the sequence.")] = False
    timeout: Annotated[float, opt("Layout", "Seconds until a silent rank counts as dead.", above=0)] = 600.0

    def __post_init__(self):
        super().__post_init__()
        # what --set said is in the fields now; for train.py, which may go on, these are options
        self.set = [item for item in self.set if not item.startswith(("eval_tokens", "doc_mask"))]

    def layout(self, world: int) -> Layout:
        dp = self.dp or max(1, world // self.tp)
        return Layout(dp, self.tp, self.zero, self.replicate, self.sequence_parallel, self.optimizer)

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
    # known of: DTensor gathers twice in a row, and the losses, which nobody changes in place, are a view
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module")
    return ranks

def open_model(o: Options, config: Config, layout: Layout, ranks: Ranks):
    """Build a rank's shares -> (model, module to call, optimizer): new, of --init, or as a run left them."""
    mesh = dist.init_device_mesh(ranks.device.type, layout.sizes, mesh_dim_names=AXES)
    model, forward = parallelize(config, o, layout, mesh, ranks.device)
    weights = named_weights(model)
    sharded = o.resume and has_shards(o.resume)
    if sharded:
        load_shards(o.resume, {hf_name(n, config): p for n, p in weights.items()})
    elif o.resume or o.init:
        load_whole(o.resume or o.init, weights, load_model(o.resume or o.init).state_dict())
    optimizer = ParallelOptimizer(model, o, layout, mesh)
    if sharded:
        load_shards(o.resume, state_of(optimizer.inner))
    elif o.resume and (held := load_state(o.resume)[0]):  # before its first step train.py has none
        load_whole(o.resume, state_of(optimizer.inner), held)
    return model, forward, optimizer

def gradients_of_step(forward, micro_batches: list, targets, windows: int, layout: Layout, scale=1.0):
    """Add up the gradients of a step of so many targets and windows -> this rank's part of (loss, aux)."""
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

def after_restart(o: Options) -> Options:
    """Go on with the run in --out where torchrun has started all ranks again, because one had died."""
    if o.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:
        return o
    try:
        held = resumed(Options, o.out)
    except UserError:  # it died before the first save
        return o
    derived = dict.fromkeys(("resume", "micro_batch", "compile", "dtype"))  # what a run fills in
    asked = [json.dumps(dataclasses.asdict(options) | derived) for options in (held, o)]
    return held if asked[0] == asked[1] else o  # another run, which --overwrite is to replace

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
    layout = o.layout(ranks.world)
    check_layout(layout, ranks.world, config)
    derive(o, config, layout.dp, ranks.device)
    if layout.tp > 1 and o.compile == "on":  # DTensor's redistribution has no compiled backward pass in 2.13
        say("torch.compile does not go with tensor parallelism here; going on without it.")
        o.compile = "off"
    say(f"{count_params(config)[0] / 1e6:.1f}M parameters on {ranks.world} processes (dp {layout.dp} x tp "
        f"{layout.tp}, ZeRO-{layout.zero}), {o.optimizer}, {o.dtype} on {ranks.device}; {o.max_steps} steps")

    # 2. What a step needs, and what surrounds it
    model, forward, optimizer = open_model(o, config, layout, ranks)
    part = ranks.rank // layout.tp  # ranks that split one model read the same tokens
    batches = Batches(sources, weights, o, config.seq_len, ranks.device, part, layout.dp, saved.get("taken"))
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
    measure = functools.partial(assess, o, layout, model, val, weights)
    run = Run(o, ranks, save, measure, saved, flops_per_token(config))
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

def plan(
    preset: Annotated[str, typer.Option(help="Shape of the model: see `bench.py sizes`.")] = "llama-2-70b",
    gpus: Annotated[int, typer.Option(help="Ranks in all.")] = 512,
    memory: Annotated[float, typer.Option(help="Of each, in GB (1e9 bytes).")] = 80.0,
    per_node: Annotated[int, typer.Option(help="Ranks with fast links: --tp stays within.")] = 8,
    micro_batch: Annotated[int, typer.Option(help="Sequences at once on a rank.")] = 1,
    seq_len: Annotated[int | None, typer.Option(help="Context, instead of the preset's.")] = None,
    optimizer: Annotated[str, typer.Option(help="muon (matrices; AdamW on the rest) or adamw.")] = "muon",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a layout.")] = False,
) -> None:
    """Show which layouts fit: GB on a rank, GB it sends in a step. Activations in bf16, optimizer in fp32."""
    from rich.table import Table

    numbers = {"gpus": gpus, "memory": memory, "per-node": per_node, "micro-batch": micro_batch}
    for name, n in numbers.items():
        check(0 < n < 1e9, f"--{name} is {n}; it has to be a number above 0, below a billion.")
    check(optimizer in ("muon", "adamw"), f"--optimizer is muon or adamw; not {optimizer!r}.")
    known = preset in PRESETS and PRESETS[preset].vocab_size
    config = resize(preset, seq_len=seq_len, vocab_size=known or 4096)
    say(f"{preset}: {count_params(config)[0] / 1e9:.2f}B parameters, {micro_batch} x {config.seq_len} tokens")
    layouts = find_layouts(config, gpus, per_node, micro_batch, optimizer)
    fitting = [row for row in layouts if row["total"] <= memory]
    least = min(row["total"] for row in layouts)
    check(fitting, f"Nothing fits; the least is {least:.1f} GB: more ranks, or a shorter --seq-len.")
    if as_json:
        for row in fitting:
            print(json.dumps(row))
        return
    names = "dp tp ZeRO recompute params gathered grads optim. activ. all tensor data".split()
    table = Table(*names, title="GB on a rank, and what it sends in a step", box=None, padding=(0, 1, 0, 0))
    for row in fitting[:16]:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    console().print(table)

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
