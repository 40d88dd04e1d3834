"""Pretraining on many processes: data parallel (DDP, ZeRO-1/2/3) and tensor parallel, on PyTorch's engine.

    torchrun --nproc-per-node 2 parallel.py                                  # DDP on two CPU cores, or two GPUs
    torchrun --nproc-per-node 4 parallel.py --dp 2 --tp 2 --zero 3           # 2 x 2: sharded data, split matrices
    torchrun --nproc-per-node 4 parallel.py --resume out/python --tp 4       # go on, on another layout
    torchrun --nproc-per-node 2 parallel.py --zero 3 --count-communication   # one step: what is sent, what is kept
    python parallel.py plan --preset llama-2-70b --gpus 512 --memory 80      # which layouts fit
    python parallel.py export out/python                                     # join the shards of a stopped run

It trains what train.py trains, from the same data folder to the same checkpoint folder, and each can go on with
the other's. The processes form a grid (`AXES`); tensor parallelism talks in every layer and is innermost, where
the links are fast, data parallelism talks once a step and is outermost.

Part I says each idea in plain lines with bare collectives: column- and row-parallel matrices (Shoeybi et al. 2019,
1909.08053), ZeRO-1, -2 and -3 (Rajbhandari et al. 2019, 1910.02054). Part II composes PyTorch's engine for the same:
DDP (Li et al. 2020, 2006.15704), fully_shard (FSDP, Zhao et al. 2023, 2304.11277) and DTensor. The tests hold them
equal to each other and to one process. Left out: masked models (train.py has them, with DDP).
"""

from __future__ import annotations

import time

START = time.perf_counter()  # before torch is imported

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import typer
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from model import (
    AUX,
    IGNORE,
    PRESETS,
    Config,
    Log,
    Mixture,
    Options,
    Ranks,
    Stopping,
    Transformer,
    UserError,
    build_optimizer,
    check_out,
    communication,
    console,
    default_data,
    derive,
    evaluate,
    find_checkpoint,
    fingerprint,
    hf_name,
    lr_at,
    make_config,
    open_data,
    pad_vocab,
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
    training_bytes,
    windows_at,
    write_folder,
    write_text,
)  # fmt: skip

# W ranks; dp, tp how many along an axis. B, T, C, H, K, I, N, L as in model.py, lower case for one rank's share.


# ------------------------------------------------------------------------------------------------------------
# Part I: the ideas, with bare collectives
# ------------------------------------------------------------------------------------------------------------


class _Copy(torch.autograd.Function):
    """Megatron's f (1909.08053, figure 3): the input goes to all ranks as it is; their gradients for it add up."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad


class _Reduce(torch.autograd.Function):
    """Megatron's g: the ranks' results add up; the gradient of a sum is the same for each of its terms."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


class ColumnParallelLinear(nn.Module):
    """y = x W^T with the rows of W (out, in), torch's layout, dealt out: rank r makes the r-th part of the outputs."""

    def __init__(self, weight):  # the whole (out, in)
        super().__init__()
        self.weight = nn.Parameter(weight.chunk(dist.get_world_size())[dist.get_rank()].clone())  # (out/W, in)

    def forward(self, x):  # (..., in), the same on all ranks -> (..., out/W)
        return nn.functional.linear(_Copy.apply(x), self.weight)


class RowParallelLinear(nn.Module):
    """y = x W^T with the columns of W dealt out: each rank has the part of x that its columns multiply."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight.chunk(dist.get_world_size(), 1)[dist.get_rank()].clone())  # (out, in/W)

    def forward(self, x):  # (..., in/W) -> (..., out), the same on all ranks
        return _Reduce.apply(nn.functional.linear(x, self.weight))


def split_block(block: nn.Module, x, *rest):
    """A decoder block on a rank that has H/W of its heads and I/W of its feed-forward width.

    Heads do not see each other, nor do hidden units: so a rank's share is an ordinary, smaller block, and each half
    costs one all-reduce forward (_Reduce) and one backward (_Copy), whatever is inside.

    x (B, T, C), the same on all ranks -> the same.
    """
    x = x + _Reduce.apply(block.self_attn(_Copy.apply(block.input_layernorm(x)), *rest))
    return x + _Reduce.apply(block.mlp(_Copy.apply(block.post_attention_layernorm(x))))


def share_of_block(name: str, tensor, rank: int, world: int):
    """What split_block's rank holds of a block's tensor: heads and hidden units by rows, what reads them by columns."""
    if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
        return tensor.chunk(world)[rank]
    return tensor.chunk(world, 1)[rank] if name.endswith(("o_proj.weight", "down_proj.weight")) else tensor


def adamw(w, grad, m, v, step: int, lr: float, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-10) -> None:
    """AdamW in place on any share of a flat vector: it is element by element, and that is why ZeRO works.

    Decoupled decay, then Adam with bias correction (Loshchilov & Hutter 2017, 1711.05101, algorithm 2).
    """
    m.lerp_(grad, 1 - betas[0])
    v.lerp_(grad.square(), 1 - betas[1])
    w.mul_(1 - lr * weight_decay)
    w.sub_(lr * (m / (1 - betas[0] ** step)) / ((v / (1 - betas[1] ** step)).sqrt() + eps))


def zero1_step(weights, grad, m, v, step: int, lr: float) -> None:
    """All ranks hold all weights and gradients (P,), each the optimizer's state of its P/W: m, v (P/W,).

    4P + 4P + 8P/W bytes. Sent: an all-reduce of the gradient and an all-gather of the new weights.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    dist.all_reduce(grad)
    mine = weights.chunk(world)[rank]  # a view: what is updated is in its place
    adamw(mine, grad.chunk(world)[rank], m, v, step, lr)
    dist.all_gather_into_tensor(weights, mine.clone())


def zero2_step(weights, grad, m, v, step: int, lr: float) -> None:
    """As zero1_step, but a rank asks only for the sum of the gradients that it will use: 4P + 4P/W + 8P/W bytes.

    An all-reduce is a reduce-scatter and an all-gather: what is sent is the same as before, or less.
    """
    world, rank = dist.get_world_size(), dist.get_rank()
    mine, my_grad = weights.chunk(world)[rank], torch.empty_like(m)
    dist.reduce_scatter_tensor(my_grad, grad)
    adamw(mine, my_grad, m, v, step, lr)
    dist.all_gather_into_tensor(weights, mine.clone())


class _Gather(torch.autograd.Function):
    """A shard (P/W,) becomes the whole (P,) for as long as it is used; the gradient goes back as a summed shard."""

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
    """layers[i] (flat weights, x) -> x; a rank keeps the i-th layer's weights as shards[i] (P/W,): 16P/W bytes in all.

    Each layer is gathered when it is needed, thrown away, and (checkpoint computes it again) gathered once more for
    its backward pass: two all-gathers and a reduce-scatter of its weights. The step is adamw on each shard.
    """
    for layer, shard in zip(layers, shards, strict=True):
        x = checkpoint(lambda shard, x, layer=layer: layer(_Gather.apply(shard), x), shard, x, use_reentrant=False)
    return x


# ------------------------------------------------------------------------------------------------------------
# Part II: the same on PyTorch's engine
# ------------------------------------------------------------------------------------------------------------

# Outermost first. A step's gradients cross the outer axes once, activations the inner ones in every layer.
AXES = ("replicate", "shard", "pipeline", "context", "tensor")


@dataclass(frozen=True)
class Layout:
    """dp = replicate x shard copies of the data's way through the model, each split over tp ranks."""

    dp: int = 1
    tp: int = 1
    zero: int = 0
    replicate: int = 1  # with ZeRO-2 and -3: groups that each hold a whole set of shards
    sequence: bool = False  # norms and residuals split along the sequence between the tensor-parallel halves
    offload: bool = False

    @property
    def world(self) -> int:
        return self.dp * self.tp

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the axes: what is not sharded over data is replicated."""
        replicate = self.dp if self.zero < 2 else self.replicate
        return (replicate, self.dp // replicate, 1, 1, self.tp)

    @property
    def wrapped(self) -> bool:
        """By fully_shard: what DDP cannot do, sharded parameters and DTensors, it does (with a shard axis of one too)."""
        return self.dp > 1 and (self.zero >= 2 or self.tp > 1)

    def __str__(self):
        parts = [f"dp {self.dp}"] + [f"replicate {self.replicate}"] * (self.replicate > 1)
        parts += [f"tp {self.tp}"] * (self.tp > 1) + ["sequence"] * self.sequence
        return " x ".join(parts) + (f", ZeRO-{self.zero}" if self.zero else "")


def check_layout(layout: Layout, world: int, config: Config) -> None:
    """A UserError that names the nearest layout that can be."""
    if layout.zero not in range(4):
        raise UserError(f"--zero is 0, 1, 2 or 3; not {layout.zero}.")
    widths = {"heads": config.n_head, "key-value heads": config.n_kv_head, "feed-forward width": config.ffn_dim,
              "vocabulary": config.vocab_size}  # fmt: skip

    def fits(tp):
        return all(n % tp == 0 for n in widths.values())

    if layout.world != world or not fits(layout.tp):
        pairs = [(world // tp, tp) for tp in range(1, world + 1) if world % tp == 0 and fits(tp)]
        dp, tp = min(pairs, key=lambda p: abs(math.log(p[0] / layout.dp)) + abs(math.log(p[1] / layout.tp)))
        bad = next((f"{n} {what} do not divide by {layout.tp}" for what, n in widths.items() if n % layout.tp), "")
        why = bad or f"{layout.dp} x {layout.tp} is {layout.world}, and there are {world} processes"
        raise UserError(f"--dp {layout.dp} --tp {layout.tp} cannot be: {why}; the nearest that can is --dp {dp} --tp {tp}.")
    if layout.tp > 1 and config.moe:
        raise UserError("A mixture of experts cannot be split by --tp yet: use --dp, with --zero 3 where memory is short.")
    if layout.dp % layout.replicate or (layout.replicate > 1 and layout.zero < 2):
        raise UserError(f"--replicate {layout.replicate} has to divide --dp {layout.dp}, and needs --zero 2 or 3.")
    if layout.sequence and (layout.tp == 1 or config.seq_len % layout.tp):
        raise UserError(f"--sequence-parallel needs --tp above 1 that divides the context of {config.seq_len}.")


def split_tensors(model: Transformer, mesh, sequence: bool) -> None:
    """Tensor parallelism as DTensor placements: what each matrix is split by, and what comes in and goes out.

    q, k, v, gate and up read the same input. It is prepared once for all of them (PrepareModuleInput), so their
    gradients for it are added before they are sent: one all-reduce, where each by itself would send its own.
    The norms of q and k see the rank's heads only: "sequence" here means the axis of heads, and their weights'
    gradients come out as the ranks' terms of a sum (see `settle`).
    """
    whole, between = Replicate(), Shard(1) if sequence else Replicate()  # between the halves of a block: (B, t, C)
    plan = {
        "embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=between),  # rows: a part of the vocabulary
        "lm_head": ColwiseParallel(input_layouts=whole, output_layouts=Shard(-1), use_local_output=False),
    }
    norm = SequenceParallel(use_local_output=True)
    for block in model.layers.values():
        one = {
            "self_attn": PrepareModuleInput(input_layouts=(between, None, None, None, None),
                                            desired_input_layouts=(whole, None, None, None, None)),
            "self_attn.q_proj": ColwiseParallel(),
            "self_attn.k_proj": ColwiseParallel(),
            "self_attn.v_proj": ColwiseParallel(),
            "self_attn.o_proj": RowwiseParallel(output_layouts=between),
            "mlp": PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(whole,)),
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(output_layouts=between),
        }  # fmt: skip
        if model.config.qk_norm:
            heads = SequenceParallel(sequence_dim=2, use_local_output=True)
            one |= {"self_attn.q_norm": heads, "self_attn.k_norm": heads}
        if sequence:
            one |= {"input_layernorm": norm, "post_attention_layernorm": norm}
        parallelize_module(block, mesh, one)
    if sequence:
        parallelize_module(model.norm, mesh, SequenceParallel(use_local_output=False))
        gather = PrepareModuleOutput(output_layouts=Shard(1), desired_output_layouts=whole)
        parallelize_module(model.norm, mesh, gather)
    parallelize_module(model, mesh, plan)
    tie(model)


def tie(model: Transformer) -> None:
    if model.config.tie:
        model.lm_head.weight = model.embed_tokens.weight


def parallelize(config: Config, o: Options, layout: Layout, mesh, device: torch.device):
    """-> (model with this rank's shares, the module to call). Nothing is ever whole on one rank.

    The order: (1) tensor parallelism first, since it decides what a rank's matrices are; (2) recomputation inside of
    the rest, so that a block that is computed again also sends again what it sent; (3) compile one block at a time
    (`run` leaves this out where matrices are split); (4) data parallelism last, around the blocks: its gathers and hooks stay
    out of the compiled code and can run ahead of it. Built on "meta" and filled when sharded.
    """
    with torch.device("meta"):
        model = Transformer(config)
    if layout.tp > 1:
        split_tensors(model, mesh["tensor"], layout.sequence)
    model.compute_dtype, model.recompute = pick_dtype(o.dtype, device), o.recompute
    model.set_dropout(o.dropout)
    model.set_balance(o)
    if o.compile == "on":
        model.compile_blocks()
    if layout.wrapped:
        lower = None if model.compute_dtype == torch.float32 else model.compute_dtype
        options = {
            "mesh": mesh["replicate", "shard"] if layout.sizes[0] > 1 else mesh["shard"],
            "reshard_after_forward": layout.zero == 3,
            "mp_policy": MixedPrecisionPolicy(lower, torch.float32, cast_forward_inputs=False),  # sums in fp32
        }
        if layout.offload:
            options["offload_policy"] = CPUOffloadPolicy()
        for block in model.layers.values():
            fully_shard(block, **options)
        fully_shard(model, **options)  # what is left: the embedding, the last norm and the output matrix, in one group
    model.to_empty(device="cpu" if layout.offload else device)
    tie(model)
    model.init_weights(o.seed, o.mup_base)
    if layout.dp > 1 and not layout.wrapped:
        return model, DDP(model, process_group=mesh["replicate"].get_group(), init_sync=False)
    return model, model


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor):
    """The whole of a tensor, on all ranks of its mesh (they all have to ask)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def fill(target, whole) -> None:
    """Put this rank's share of a whole tensor in its place; nothing is sent."""
    if isinstance(target, DTensor):
        whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(whole)


def settle(parameters) -> None:
    """Add up gradients that are still the ranks' terms of a sum (of norms that saw a part of the heads or the
    sequence): all of them in one all-reduce."""
    waiting = [p for p in parameters if isinstance(p.grad, DTensor) and any(x.is_partial() for x in p.grad.placements)]
    if waiting:
        flat = torch.cat([p.grad.to_local().flatten() for p in waiting])
        mesh = waiting[0].device_mesh
        flat = DTensor.from_local(flat, mesh, [Partial()] * mesh.ndim).full_tensor()
        for p, g in zip(waiting, flat.split([p.numel() for p in waiting]), strict=True):
            p.grad = DTensor.from_local(g.view(p.shape), mesh, p.placements)


def global_norm(parameters) -> torch.Tensor:
    """The norm of the gradient over all ranks: each adds the squares of its shares, divided by how many hold the same."""
    world, total = dist.get_world_size(), 0.0
    for p in parameters:
        copies = world
        if isinstance(p, DTensor):
            mesh, same = p.device_mesh, [i for i, x in enumerate(p.placements) if x.is_replicate()]
            copies = world // mesh.size() * math.prod(mesh.size(i) for i in same)
        total = total + local(p.grad).float().square().sum().to(torch.float64) / copies
    dist.all_reduce(total)
    return total.sqrt()


class ParallelOptimizer:
    """The optimizers of model.py where a rank holds shares.

    AdamW is element by element: on the shards of ZeRO-2 and -3 and of tensor parallelism it runs as it is; for ZeRO-1
    it is shown a share of each weight, which all ranks then gather. Muon needs a whole matrix: each has an owner, the
    only rank that keeps its momentum and runs Newton-Schulz on it, and that sends out the new weights.
    """

    def __init__(self, model: Transformer, o: Options, layout: Layout, mesh):
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.rows, self.owned, stand_ins = {}, {}, {}
        self.group, ranks = None, list(range(dist.get_world_size()))
        if layout.zero == 0:  # replicated over data: the owners are among those that share one copy
            self.group = mesh["tensor"].get_group()
            ranks = dist.get_process_group_ranks(self.group)
        load = dict.fromkeys(ranks, 0)
        for name, p in sorted(self.params.items(), key=lambda item: -item[1].numel()):
            if o.optimizer == "muon" and p.dim() == 2 and name.startswith("layers.") and (layout.tp > 1 or layout.zero):
                owner = min(load, key=load.get)
                load[owner] += p.numel()
                mine = owner == dist.get_rank()
                stand_ins[name] = nn.Parameter(torch.empty(p.shape, device=p.device)) if mine else None
                self.owned[name] = owner
            elif layout.zero == 1 and layout.dp > 1 or not isinstance(p, DTensor) and layout.tp > 1:
                stand_ins[name] = self.rows[name] = self.share(p, mesh)
        self.stand_ins = stand_ins
        self.inner = build_optimizer(model, o.optimizer, o.lr, o.weight_decay, mup_base=o.mup_base, stand_ins=stand_ins)
        self.refresh()

    def share(self, p, mesh) -> nn.Parameter:
        """ZeRO-1's part of a weight: cut along an axis that tensor parallelism has not cut. (Without data parallelism a
        weight that is no DTensor becomes one, all of it: an optimizer's group holds only one kind.)"""
        names, placements, cut = ("replicate",), [Shard(0)], None  # on which axes, cut how; what "tensor" has cut
        if isinstance(p, DTensor) and "tensor" in p.device_mesh.mesh_dim_names and p.placements[-1].is_shard():
            cut = p.placements[-1].dim
            names, placements = ("replicate", "tensor"), [Shard(1 - cut if p.dim() == 2 else 0), p.placements[-1]]
        if cut is not None and p.dim() == 1:  # a bias that tensor parallelism has cut: too small to cut again
            placements[0] = Replicate()
        dim = placements[0].dim if placements[0].is_shard() else None
        mine = local(p.detach())
        if dim is not None:
            n, i = mesh["replicate"].size(), mesh["replicate"].get_local_rank()
            parts = mine.chunk(n, dim)
            mine = parts[i] if i < len(parts) else mine.narrow(dim, 0, 0)
        stride = torch.empty(p.shape, device="meta").stride()
        mine = mine.contiguous()  # a cut along rows is in its place; one along columns is a copy (fused kernels ask for it)
        return nn.Parameter(DTensor.from_local(mine, mesh[names], placements, shape=p.shape, stride=stride))

    @torch.no_grad()
    def cut(self, whole, row):
        """The part of a rank's tensor that a ZeRO-1 share stands for."""
        placement, mesh = row.placements[0], row.device_mesh
        if not placement.is_shard():
            return whole
        parts, i = whole.chunk(mesh.size(0), placement.dim), mesh.get_local_rank(0)
        return parts[i] if i < len(parts) else whole.narrow(placement.dim, 0, 0)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the weights as they are now: at the start, and after a checkpoint was read."""
        for name in self.owned:
            whole = full(self.params[name].detach())
            if self.stand_ins[name] is not None:
                self.stand_ins[name].copy_(whole)
        for name, row in self.rows.items():
            row.to_local().copy_(self.cut(local(self.params[name].detach()), row))

    @torch.no_grad()
    def step(self) -> None:
        for name in self.owned:
            whole = full(self.params[name].grad)  # an all-gather; what is not ours is dropped at once
            if self.stand_ins[name] is not None:
                self.stand_ins[name].grad = whole.to(self.stand_ins[name].device)
        for name, row in self.rows.items():
            part = self.cut(local(self.params[name].grad), row).contiguous()
            row.grad = DTensor.from_local(part, row.device_mesh, row.placements, shape=row.shape, stride=row.stride())
        self.inner.step()
        self.spread()

    @torch.no_grad()
    def spread(self) -> None:
        """Each owner's new matrix to all, and ZeRO-1's shares back to whole weights."""
        sent = []
        for name, owner in self.owned.items():
            p, mine = self.params[name], self.stand_ins[name]
            whole = mine.detach() if mine is not None else torch.empty(p.shape, device=p.device)
            sent.append((p, whole, dist.broadcast(whole, owner, self.group, async_op=True)))
        for p, whole, work in sent:
            work.wait()
            fill(p, whole)
        for name, row in self.rows.items():
            whole = row.detach().redistribute(placements=[Replicate(), *row.placements[1:]]).to_local()
            local(self.params[name].detach()).copy_(whole)

    def set_lr(self, lr: float) -> None:
        self.inner.set_lr(lr)

    def zero_grad(self) -> None:
        self.inner.zero_grad()
        for p in self.params.values():
            p.grad = None

    def tensors(self) -> dict:
        """The optimizer's state as it is on this rank, {name/key: tensor}, made where a first step has not yet."""
        out = {}
        for part in self.inner.parts:
            for p in (p for group in part.param_groups for p in group["params"]):
                state = part.state[p]
                if not state and isinstance(part, torch.optim.Muon):
                    state["momentum_buffer"] = torch.zeros_like(p)
                elif not state:
                    state |= {"step": torch.zeros((), device=local(p).device), "exp_avg": torch.zeros_like(p),
                              "exp_avg_sq": torch.zeros_like(p)}  # fmt: skip
                out |= {f"{self.inner.names[p]}/{key}": value for key, value in state.items()}
        return out


class Counter(TorchDispatchMode):
    """Counts the collectives that run under it: {(phase, name): [how many, bytes of the whole tensor]}."""

    NAMES = {"all_reduce": "all_reduce", "allreduce_": "all_reduce", "all_gather_into_tensor": "all_gather",
             "_allgather_base_": "all_gather", "reduce_scatter_tensor": "reduce_scatter",
             "_reduce_scatter_base_": "reduce_scatter", "broadcast_": "broadcast"}  # fmt: skip

    def __init__(self):
        super().__init__()
        self.counts, self.phase = {}, "step"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t is DTensor for t in types):
            return NotImplemented  # its local form comes by in a moment
        result = func(*args, **(kwargs or {}))
        if func.namespace in ("c10d", "_c10d_functional") and func._opname in self.NAMES:
            tensors = torch.utils._pytree.tree_leaves((args, result))
            size = max(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
            entry = self.counts.setdefault((self.phase, self.NAMES[func._opname]), [0, 0])
            entry[0], entry[1] = entry[0] + 1, entry[1] + size
        return result


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: sharded and in the background while it runs, whole at the end
# ------------------------------------------------------------------------------------------------------------


def named_weights(model: Transformer) -> dict:
    """Parameters, and the routers' bias."""
    return {n: p.detach() for n, p in [*model.named_parameters(), *model.named_buffers()]}


class Saver:
    """Shards into OUT.new in the background; when all ranks have written, rank 0 puts the folder in its place.

    torch.distributed.checkpoint writes safetensors whose headers say which part of a tensor is where, so that any
    other layout finds its own shares. It talks over a group of its own: its thread must not cut in on the training's.
    """

    def __init__(self, out: Path, model, optimizer, tokenizer: Path, log: Log):
        self.out, self.model, self.optimizer, self.tokenizer, self.log = out, model, optimizer, tokenizer, log
        self.group, self.pending = dist.new_group(backend="gloo"), None

    def begin(self, state: dict) -> None:
        self.finish()
        new = Path(f"{self.out}.new")
        if dist.get_rank() == 0:
            self.guard(lambda: (shutil.rmtree(new, ignore_errors=True), (new / "state" / "shards").mkdir(parents=True),
                                write_folder(new, self.model.config, self.tokenizer),
                                write_text(new / "state" / "state.json", json.dumps(state, indent=1) + "\n")))  # fmt: skip
        dist.barrier()
        tensors = {hf_name(n, self.model.config): p for n, p in named_weights(self.model).items()} | self.optimizer.tensors()
        tensors = {n: t.detach().clone() for n, t in tensors.items()}  # the next step changes them in place
        writer = HuggingFaceStorageWriter(str(new / "state" / "shards"), save_distributed=True)
        self.pending = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)

    def guard(self, write) -> None:
        try:
            write()
        except OSError as error:
            raise UserError(f"The checkpoint could not be written to {self.out}.new ({error}).") from None

    def poll(self) -> None:
        if self.pending is not None and self.pending.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the shards on their way, if any, and put the folder in its place."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        try:
            pending.result()  # on rank 0 this means: of all ranks
        except Exception as error:  # whatever the writer's thread ran into
            raise UserError(f"The checkpoint could not be written to {self.out}.new ({error}).") from None
        if dist.get_rank() == 0:
            self.log.close()
            self.guard(self.swap)
            self.log.open()

    def swap(self) -> None:
        old, new = Path(f"{self.out}.old"), Path(f"{self.out}.new")
        write_text(new / "metrics.jsonl", self.log.text())  # with what was logged since
        if self.out.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(self.out, old)
        os.replace(new, self.out)
        shutil.rmtree(old, ignore_errors=True)

    def whole(self, state: dict) -> None:
        """The Hugging Face folder with train.py's state: tensors are joined one after another, on rank 0's host."""
        self.finish()
        self.log.close()
        keep = dist.get_rank() == 0
        weights = joined(named_weights(self.model), keep)
        optimizer = joined(self.optimizer.tensors(), keep)
        if keep:
            save_checkpoint(self.out, self.model, self.tokenizer, state=(optimizer, state), metrics=self.log.text(),
                            weights=weights)  # fmt: skip
        dist.barrier()


def joined(tensors: dict, keep: bool) -> dict:
    """{name: whole tensor} on the rank that keeps them, from tensors of which the ranks hold shares or some."""
    names = [None] * dist.get_world_size()
    dist.all_gather_object(names, {n: list(t.shape) for n, t in tensors.items()})
    out = {}
    for name in sorted(set().union(*names)):
        holder = next(rank for rank, held in enumerate(names) if name in held)
        if all(name in held for held in names):
            tensor = full(tensors[name])
        else:  # an owner's alone
            here = tensors.get(name)
            tensor = here if here is not None else torch.empty(names[holder][name])
            tensor = tensor.cpu().contiguous()
            dist.broadcast(tensor, holder)
        if keep:
            out[name] = tensor.cpu().contiguous()
    return out


def find_run(folder: str | Path) -> Path:
    """A checkpoint with whole tensors or with shards, or its `.old`."""
    for path in (Path(folder), Path(f"{folder}.old")):
        whole = any(path.glob("model*.safetensors"))  # an `.old` that a kill left behind must not win over it
        if (path / "config.json").is_file() and (whole or (path / "state" / "shards").is_dir()):
            return path
    return find_checkpoint(folder)


def load(folder: str | Path, model: Transformer, optimizer: ParallelOptimizer, only_weights: bool = False) -> None:
    """Each rank reads its shares of weights and optimizer state, whatever layout has written them."""
    folder = find_run(folder)
    shards = folder / "state" / "shards"
    weights = {hf_name(n, model.config): p for n, p in named_weights(model).items()}
    state = {} if only_weights else optimizer.tensors()
    if shards.is_dir():
        sources = [(shards, weights | state)]
    else:
        sources = [(folder, weights)] + [(folder / "state", state)] * (not only_weights)
    for path, wanted in sources:
        reader = HuggingFaceStorageReader(str(path))
        held = reader.read_metadata().state_dict_metadata
        missing = [n for n in wanted if n not in held]
        if missing and missing != [n for n in wanted if "/" in n]:  # before the first step there is no state
            raise UserError(f"{path} lacks {len(missing)} tensors, {missing[0]} among them: it is not of this run.")
        dcp.load({n: t for n, t in wanted.items() if n in held}, storage_reader=reader)
    optimizer.refresh()


# ------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------


class Run:
    """A training run on a grid of processes: the loop, and what is saved of it."""

    def __init__(self, o: Options, layout: Layout, config: Config, data, ranks: Ranks, resume: str | None):
        self.o, self.layout, self.config, self.ranks = o, layout, config, ranks
        self.train_data, self.val_data, weights = data
        self.mesh = init_device_mesh(ranks.device.type, layout.sizes, mesh_dim_names=AXES)
        self.dp_rank = ranks.rank // layout.tp  # ranks that split one model read the same tokens
        self.model, self.forward = parallelize(config, o, layout, self.mesh, ranks.device)
        self.model.train()
        self.optimizer = ParallelOptimizer(self.model, o, layout, self.mesh)
        self.params = list(self.model.parameters())
        self.mixture = Mixture(self.train_data, weights, o.seed)
        self.state = {"at": 0, "taken": [0] * len(weights), "scale": 2.0**14 if o.dtype == "fp16" else 1.0, "good": 0,
                      "skipped": 0, "best": None, "waited": 0, "finished": False, "data": fingerprint(self.train_data)}  # fmt: skip
        self.bad, self.eval_seconds, self.result, lines = 0, 0.0, {}, []
        if o.init and not resume:
            load(o.init, self.model, self.optimizer, only_weights=True)
        if resume:
            load(resume, self.model, self.optimizer)
            folder = find_run(resume)
            held = read_json(folder / "state" / "state.json")
            self.state |= {k: held[k] for k in self.state if k != "finished"}
            lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            lines = [line for line in lines if json.loads(line)["step"] <= self.at]
        self.out = Path(o.out)
        self.log = Log(self.out, lines, o.max_steps, self.at, ranks.rank)
        self.saver = Saver(self.out, self.model, self.optimizer, self.train_data[0].folder / "tokenizer.json", self.log)

    @property
    def at(self) -> int:
        return self.state["at"]

    def batches(self):
        """This rank's micro-batches of the step, [(inputs, targets, documents)], and the windows then taken."""
        o, T, dp = self.o, self.config.seq_len, self.layout.dp
        count = windows_at(self.at, o.tokens_per_step // T, o.batch_ramp, dp)
        plan, taken = self.mixture.draw(self.at, count, self.state["taken"])
        plan = plan[self.dp_rank * count // dp : (self.dp_rank + 1) * count // dp]
        out = []
        for i in range(0, len(plan), o.micro_batch):
            x, y = (t.to(self.ranks.device) for t in self.mixture.read(plan[i : i + o.micro_batch], T))
            out.append((x, y, self.mixture.sources[0].documents(x) if o.doc_mask else None))
        return out, taken

    def synchronize(self, last: bool):
        """When gradients are added over the ranks: with ZeRO-2 and -3 after every micro-batch, since a rank has room for
        its share only; else once, after the last."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(last or self.layout.zero >= 2)
            self.model.set_reshard_after_backward(last or self.layout.zero == 3)
        elif isinstance(self.forward, DDP) and not last:
            return self.forward.no_sync()
        return contextlib.nullcontext()

    def backward(self, batches, counter=None):
        """-> (this rank's sum of losses, its part of the auxiliary losses, tokens of all ranks that read different ones)."""
        o, dp = self.o, self.layout.dp
        targets, rows = sum((y != IGNORE).sum() for _, y, _ in batches), sum(len(x) for x, _, _ in batches)
        counts = torch.tensor([float(targets), float(rows)], device=self.ranks.device)
        dist.all_reduce(counts)
        tokens, rows = counts / self.layout.tp
        if o.dropout:
            torch.manual_seed(seed_of(o.seed, self.at, self.dp_rank))
        total = aux_total = torch.zeros((), device=self.ranks.device)
        for i, (x, y, docs) in enumerate(batches):
            split_vocabulary = loss_parallel() if self.layout.tp > 1 else contextlib.nullcontext()
            if counter:
                counter.phase = "forward"
            with self.synchronize(i == len(batches) - 1), split_vocabulary:
                losses, aux = self.forward(x, y, doc_ids=docs)
                losses = full(losses)  # (B, T)
                aux = aux * (len(x) / rows)  # means over sequences
                loss = losses.sum() / tokens + aux[:, 0].sum()
                if counter:
                    counter.phase = "backward"
                (loss * (self.state["scale"] * dp)).backward()  # DDP and fully_shard divide by dp: undo that
            total, aux_total = total + losses.detach().sum(), aux_total + aux.detach()
        settle(self.params)
        return total, aux_total, tokens

    def step(self, lr: float, stop: bool) -> dict:
        o, state = self.o, self.state
        batches, taken = self.batches()
        self.optimizer.set_lr(lr)
        total, aux, tokens = self.backward(batches)
        grads = [local(p.grad) for p in self.params]
        norm = global_norm(self.params) / state["scale"]
        clip = torch.clamp(o.grad_clip / (norm + 1e-6), max=1.0) / state["scale"]
        torch._foreach_mul_(grads, clip.to(grads[0].dtype).to(grads[0].device))
        stats = torch.cat([torch.stack([total, torch.as_tensor(float(stop), device=total.device)]), aux.flatten()])
        dist.all_reduce(stats)
        stats /= self.layout.tp
        aux = stats[2:].view_as(aux)
        loss, asked, norm, tokens = torch.stack([*stats[:2], norm.float(), tokens]).tolist()
        loss /= tokens
        if math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
            if o.balance == "bias":
                self.model.shift_bias(aux, o.balance_rate)
            state["good"], self.bad = state["good"] + 1, 0
        else:
            state["good"], self.bad, state["skipped"] = 0, self.bad + 1, state["skipped"] + 1
        self.optimizer.zero_grad()
        if o.dtype == "fp16":
            grown = state["scale"] * 2 if state["good"] % 1000 == 999 else state["scale"]
            state["scale"] = state["scale"] / 2 if self.bad else grown
        state["taken"], state["at"] = taken, self.at + 1
        record = routing_record(aux, self.config)
        return {"loss": loss, "grad_norm": norm, "tokens": int(tokens), "stop": asked > 0} | record

    def save(self, finished: bool = False) -> None:
        state = {**self.state, "finished": finished, "options": dataclasses.asdict(self.o), "layout": str(self.layout)}
        if finished:
            self.saver.whole(state)
        else:
            self.saver.begin(state)

    def evaluate(self, limit: int | None) -> None:
        begin = time.perf_counter()
        T, B, share = self.config.seq_len, self.o.micro_batch, (self.dp_rank, self.layout.dp)

        def forward(x, y):
            with loss_parallel() if self.layout.tp > 1 else contextlib.nullcontext():
                return full(self.model(x, y)[0])

        results = [evaluate(self.model, tokens, T, B, limit, forward, share) for tokens in self.val_data]
        weights = self.mixture.share
        self.result = {k: float(sum(w * r[k] for w, r in zip(weights, results, strict=True))) for k in results[0]}
        self.result["val_tokens"] = sum(r["val_tokens"] for r in results)
        self.eval_seconds += time.perf_counter() - begin
        seconds = time.perf_counter() - START - self.eval_seconds
        self.log.write({"step": self.at, **self.result, "seconds": seconds})
        text = f"val loss {self.result['val_loss']:.4f}, {self.result['val_bpb']:.4f} bits per byte"
        self.log.say(f"step {self.at}: {text} after {seconds:.1f} s")
        best = self.state["best"]
        self.state["best"] = min(self.result["val_loss"], best if best is not None else math.inf)

    def loop(self) -> None:
        o, stopping = self.o, Stopping()
        peak = peak_flops(self.ranks.device, self.model.compute_dtype, kept="out/machine.json") * self.ranks.world
        rate, reached = None, False
        try:
            while self.at < o.max_steps and not reached:
                begin = time.perf_counter()
                lr = o.lr * lr_at(self.at, o.max_steps, o.warmup_steps, o.schedule, o.min_lr)
                stats = self.step(lr, stopping.asked)
                self.saver.poll()
                seconds = time.perf_counter() - begin
                rate = seconds if rate is None or self.at < 5 else 0.9 * rate + 0.1 * seconds
                speed = stats["tokens"] / seconds
                mfu = speed * self.config.flops_per_token() / peak
                routing = {k: stats[k] for k in stats if k in (*AUX, "load_max")}
                self.log.write({"step": self.at, "loss": stats["loss"], "grad_norm": stats["grad_norm"], "lr": lr,
                                "ms_per_step": seconds * 1e3, "tok_per_s": speed, "mfu": mfu, **routing})  # fmt: skip
                text = f"loss {stats['loss']:.4f}  {speed:,.0f} tok/s  MFU {mfu:.0%}"
                self.log.show(self.at, text, rate * (o.max_steps - self.at))
                if self.bad:
                    self.log.say(f"step {self.at}: the loss or the gradient is not finite; the update is skipped.")
                if self.bad >= 5 and self.state["scale"] <= 1:
                    raise UserError(f"The loss was not finite in {self.bad} steps running, up to step {self.at}: stopped. "
                                    f"{self.out} holds the last checkpoint; a lower --lr may help.")  # fmt: skip
                if stats["stop"]:
                    self.save()
                    self.saver.finish()
                    self.log.stop()
                    say(f"Stopped after step {self.at}; --resume {self.out} goes on from there, on this layout or another.")
                    raise KeyboardInterrupt
                if self.at % o.eval_interval == 0 and self.at < o.max_steps:
                    self.evaluate(o.eval_tokens)
                    reached = o.target_loss is not None and self.result["val_loss"] <= o.target_loss
                if self.at % o.save_interval == 0 and self.at < o.max_steps:
                    self.save()
            if not reached:
                self.evaluate(None)
            self.save(finished=True)
        finally:
            self.log.stop()
            stopping.restore()

    def count(self) -> dict:
        """One step under the counter, without an update at its end: what was sent, and what stands in memory when."""
        state = self.optimizer.tensors()
        batches, _ = self.batches()
        sizes = {"parameters": stored(self.model)}

        def look(*_):  # in the last block
            sizes["gathered"] = stored(self.model) - sizes["parameters"]

        hook = self.model.layers[str(self.config.n_layer - 1)].mlp.register_forward_pre_hook(look)
        with Counter() as counter:
            total, _, tokens = self.backward(batches, counter)
        hook.remove()
        sizes["gradients"] = sum(local(p.grad).nbytes for p in self.params)
        sizes["optimizer"] = sum(local(t).nbytes for n, t in state.items() if not n.endswith("/step"))
        sizes["optimizer"] += sum(p.nbytes for p in self.optimizer.stand_ins.values() if p is not None
                                  and not isinstance(p, DTensor))  # fmt: skip
        self.optimizer.zero_grad()
        N = sum(x.numel() for x, _, _ in batches)
        return {"sent": counter.counts, "bytes": sizes, "tokens": N, "micro_batches": len(batches),
                "loss": float(total / tokens)}  # fmt: skip


def stored(model: nn.Module) -> int:
    """Bytes of parameter storage that this rank holds now, gathered copies of fully_shard included."""
    seen = {}
    for tensor in model.parameters():
        storage = local(tensor.detach()).untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
    for module in model.modules():
        group = getattr(module._get_fsdp_state(), "_fsdp_param_group", None) if isinstance(module, FSDPModule) else None
        for held in group.fsdp_params if group else ():
            shard = held._sharded_param_data.untyped_storage()
            seen[shard.data_ptr()] = shard.nbytes()
    return sum(seen.values())


def join_processes(device: str, timeout: float) -> Ranks:
    """torchrun's group; without torchrun, a group of one, so that nothing below has to ask."""
    ranks = setup_distributed(device, timeout)
    if not dist.is_initialized():
        dist.init_process_group("gloo" if ranks.device.type != "cuda" else "cpu:gloo,cuda:nccl", store=dist.HashStore(),
                                rank=0, world_size=1)  # fmt: skip
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # two all-gathers are known of
    return ranks


def run(o: Options, dp: int | None, layout: Layout, *, resume=None, overwrite=False, count=False, timeout=600.0) -> dict:
    """Train, evaluate, save. -> the last evaluation; with count, what `Run.count` measures."""
    # 1. Where, and with what
    if o.objective != "clm":
        raise UserError(f"{o.out} is a masked model: go on with `python train.py --resume {o.out}`, alone or under torchrun.")
    ranks, out = join_processes(o.device, timeout), Path(o.out)
    if not resume and not count:
        check_out(out, overwrite)
    if o.data == Options.data and not Path(o.data[0]).exists():
        if ranks.rank == 0:
            default_data(o.data[0])
        dist.barrier()
    data = open_data(o.data)

    # 2. Which model, on which grid
    if resume:
        folder = find_run(resume)
        config = Config.from_hf(read_json(folder / "config.json"))
        if read_json(folder / "state" / "state.json")["data"] != fingerprint(data[0]):
            raise UserError(f"The data or its tokenizer is not what {resume} was trained on: restore it to resume.")
    else:
        config = make_config(o, data[0][0])
    layout = dataclasses.replace(layout, dp=dp or max(1, ranks.world // layout.tp))
    check_layout(layout, ranks.world, config)
    derive(o, config, layout.dp, ranks.device)
    if layout.tp > 1 and o.compile == "on":  # DTensor's redistribution has no compiled backward pass in 2.13
        say("torch.compile does not go with tensor parallelism here; going on without it.")
        o.compile = "off"
    say(f"{config.n_params() / 1e6:.1f}M parameters on {ranks.world} processes ({layout}), {o.optimizer}, {o.dtype} on "
        f"{ranks.device.type}; {o.max_steps} steps of {o.tokens_per_step:,} tokens")  # fmt: skip

    # 3. Train
    this = Run(o, layout, config, data, ranks, resume)
    if count:
        result = this.count()
        show_count(result, this)
        return result
    if not resume:
        this.save()
        this.saver.finish()
    else:
        this.log.open()
    try:
        this.loop()
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in ("gloo", "connection", "timed out", "timeout", "nccl", "peer")):
            raise
        raise UserError(f"Rank {ranks.rank} lost the others ({str(error).splitlines()[0][:120]}): go on with --resume {out}; "
                        "torchrun --max-restarts does it by itself.") from None  # fmt: skip
    say(f"Done: {out} opens in transformers, and train.py --resume goes on with it "
        f"({time.perf_counter() - START:.1f} s, {this.eval_seconds:.1f} of them evaluation).")  # fmt: skip
    return this.result


# ------------------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------------------


def show_count(result: dict, this: Run) -> None:
    """Measured beside the formula, as tables."""
    from rich.table import Table

    c, layout, o = this.config, this.layout, this.o
    e = torch.tensor([], dtype=this.model.compute_dtype).element_size()
    rows = communication(c, result["tokens"] // result["micro_batches"], e=e, recompute=o.recompute, sequence=layout.sequence,
                         **{k: getattr(layout, k) for k in ("dp", "tp", "zero", "replicate")})  # fmt: skip
    table = Table("phase", "collective", "measured", "MB", "formula", "MB", title=f"Sent in a step of {result['micro_batches']} "
                  f"micro-batch(es): {layout}", title_justify="left")  # fmt: skip
    expected = {}
    for phase, name, _, count, size in rows:
        had = expected.get((phase, name), (0, 0))
        expected[phase, name] = (had[0] + (count or 0), had[1] + size)
    keys = {k for k in (*result["sent"], *expected) if k[0] != "step"}
    for key in sorted(keys, key=lambda k: (k[0] != "forward", k)):
        count, size = result["sent"].get(key, (0, 0))
        want = expected.get(key, (0, 0))
        table.add_row(*key, str(count), f"{size / 1e6:.3f}", str(want[0]), f"{want[1] / 1e6:.3f}")
    result["formula"] = expected
    plan = training_bytes(c, o.micro_batch, c.seq_len, e=e, recompute=o.recompute,
                          **{k: getattr(layout, k) for k in ("dp", "tp", "zero", "replicate")})  # fmt: skip
    sizes = Table("on rank 0", "measured MB", "planned MB", title_justify="left")
    for name, size in result["bytes"].items():
        sizes.add_row(name, f"{size / 1e6:.3f}", f"{plan[name] / 1e6:.3f}")
    if this.ranks.rank == 0:
        console().print(table, sizes)


def main(
    given: dict,
    dp: Annotated[int | None, typer.Option(help="Data-parallel ranks; by default all that --tp leaves.", min=1)] = None,
    tp: Annotated[int, typer.Option(help="Tensor-parallel ranks, on one node: each matrix is split over them.", min=1)] = 1,
    zero: Annotated[int, typer.Option(help="What dp ranks shard: 0 nothing, 1 optimizer, 2 gradients too, 3 parameters too.")] = 0,
    replicate: Annotated[int, typer.Option(help="Groups of dp ranks that each hold a full set of shards.", min=1)] = 1,
    sequence_parallel: Annotated[bool, typer.Option("--sequence-parallel", help="With --tp: split norms along the sequence.")] = False,
    offload: Annotated[bool, typer.Option("--offload", help="Shards in host memory between uses (CUDA, --zero 2 or 3).")] = False,
    count_communication: Annotated[
        bool, typer.Option("--count-communication", help="Run one step: collectives and bytes beside the formula.")
    ] = False,
    timeout: Annotated[float, typer.Option(help="Seconds after which a silent rank counts as dead.")] = 600.0,
    resume: Annotated[str | None, typer.Option(help="Go on with this checkpoint folder, from any layout.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin again where --out holds a run.")] = False,
) -> None:
    """Train on many processes (started by torchrun), as train.py does on one: same data, same loss, same folders."""
    if resume is None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0:  # a rank died: go on from the last save
        with contextlib.suppress(UserError):
            find_run(given.get("out", Options.out))
            resume = given.get("out", Options.out)
    layout = Layout(dp or 1, tp, zero, replicate, sequence_parallel, offload)
    o = resumed_run(resume, given) if resume else Options(**given)
    if offload and (zero < 2 or not torch.cuda.is_available()):
        raise UserError("--offload keeps shards in host memory beside a GPU: it needs CUDA and --zero 2 or 3.")
    run(o, dp, layout, resume=resume, overwrite=overwrite, count=count_communication, timeout=timeout)


def resumed_run(folder: str, given: dict) -> Options:
    return resumed(folder, given, read_json(find_run(folder) / "state" / "state.json"))


def plan(
    preset: Annotated[str, typer.Option(help=f"Shape of the model: {', '.join(PRESETS)}.")] = "llama-2-70b",
    gpus: Annotated[int, typer.Option(help="Ranks in all.", min=1)] = 512,
    memory: Annotated[float, typer.Option(help="Of each, in GB (1e9 bytes).", min=0)] = 80.0,
    per_node: Annotated[int, typer.Option(help="Ranks with fast links among them: --tp stays within.", min=1)] = 8,
    micro_batch: Annotated[int, typer.Option(help="Sequences at once on a rank.", min=1)] = 1,
    seq_len: Annotated[int | None, typer.Option(help="Context, instead of the preset's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a layout, to standard output.")] = False,
) -> None:
    """Which layouts fit: bytes on each rank, and what a step sends, least first. Activations in bf16, AdamW in fp32."""
    from rich.table import Table

    if preset not in PRESETS:
        raise UserError(f"--preset is one of {', '.join(PRESETS)}; not {preset!r}.")
    config = PRESETS[preset]
    config = config.replace(vocab_size=config.vocab_size or pad_vocab(4096), seq_len=seq_len or config.seq_len)
    T = config.seq_len
    found, least = [], None
    for tp in (2**i for i in range(per_node.bit_length()) if gpus % 2**i == 0):
        for zero in range(4):
            for recompute in ("none", "block"):
                layout = Layout(gpus // tp, tp, zero)
                try:
                    check_layout(layout, gpus, config)
                except UserError:
                    continue
                args = {"dp": layout.dp, "tp": tp, "zero": zero, "recompute": recompute}
                sizes = {k: v / 1e9 for k, v in training_bytes(config, micro_batch, T, **args).items()}
                ring = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}  # times (W-1)/W of the whole, sent by each
                sent = {"tensor": 0.0, "data": 0.0}
                for _, name, axis, _, size in communication(config, micro_batch * T, **args):
                    ranks = tp if axis == "tensor" else layout.dp
                    sent["tensor" if axis == "tensor" else "data"] += ring[name] * size * (ranks - 1) / ranks / 1e9
                total = sum(sizes.values())
                if least is None or total < least[0]:
                    least = (total, f"{layout}, recompute {recompute}")
                if total <= memory:
                    found.append({"dp": layout.dp, "tp": tp, "zero": zero, "recompute": recompute, **sizes, "total": total, **sent})
    # what is sent between nodes costs most, then what is computed twice, then what is sent within one
    found.sort(key=lambda f: (f["data"], f["recompute"], f["tensor"]))
    say(f"{preset}: {config.n_params() / 1e9:.2f}B parameters, {micro_batch} x {T} tokens on each of {gpus} ranks of {memory:g} GB")
    if as_json:
        for one in found:
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in one.items()}))
        return
    if not found:
        raise UserError(f"Nothing fits; the least is {least[0]:.1f} GB ({least[1]}): more ranks, or a shorter --seq-len.")
    table = Table("dp", "tp", "ZeRO", "recompute", "params", "gathered", "grads", "optimizer", "activations", "all",
                  "sent tp", "sent dp", title="GB on a rank, and GB that it sends in a step", title_justify="left")  # fmt: skip
    for one in found[:16]:
        table.add_row(*(f"{v:.2f}" if isinstance(v, float) else str(v) for v in one.values()))
    console().print(table)


def export(folder: Annotated[Path, typer.Argument(help="A checkpoint folder with the shards of a stopped or running run.")]) -> None:
    """Join the shards of a folder: then transformers opens it, and train.py --resume goes on with it."""
    from torch.distributed.checkpoint.state_dict_loader import load as load_shards

    source = find_run(folder)
    if not (source / "state" / "shards").is_dir():
        raise UserError(f"{folder} has whole tensors already.")
    reader = HuggingFaceStorageReader(str(source / "state" / "shards"))
    tensors = {n: torch.empty(m.size, dtype=m.properties.dtype) for n, m in reader.read_metadata().state_dict_metadata.items()}
    load_shards(tensors, storage_reader=reader, no_dist=True)
    config = Config.from_hf(read_json(source / "config.json"))
    with torch.device("meta"):
        model = Transformer(config)
    weights = {n: tensors.pop(hf_name(n, model.config)) for n in named_weights(model)}
    metrics = (source / "metrics.jsonl").read_text(encoding="utf-8")
    state = read_json(source / "state" / "state.json")
    save_checkpoint(folder, model, source / "tokenizer.json", state=(tensors, state), metrics=metrics, weights=weights)
    say(f"{folder} is whole, at step {state['at']}.")


if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.callback(invoke_without_command=True)(run_command(main, leave_out=("objective", "patience", "noise_scale")))
    app.command()(plan)
    app.command()(export)
    run_app(app)
