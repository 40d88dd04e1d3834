"""Measure many layouts in one group of processes that test_parallel.py starts through torchrun.

    torchrun --nproc-per-node 4 tests/parallel_worker.py DATA RESULTS.json short ideas counts
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model import (  # before torch
    IGNORE, Batches, Block, Config, Transformer, build_optimizer, load_moe, make_config, open_data,
    rope_angles, rope_frequencies,
)

import parallel
import torch
import torch.distributed as dist
from bench import LiveBytes
from parallel import Options, full, local
from torch.distributed.tensor import DTensor

LAYOUTS = {
    4: {
        "ddp": {},
        "zero-1": {"zero": 1},
        "zero-2": {"zero": 2},
        "zero-3": {"zero": 3},
        "tp 2": {"tp": 2},
        "zero-1 x tp 2": {"tp": 2, "zero": 1},
        "tp 4": {"tp": 4},
        "tp 4, sequence": {"tp": 4, "sequence_parallel": True},
        "zero-3 x tp 2": {"tp": 2, "zero": 3},
        "zero-2 x tp 2, sequence": {"tp": 2, "zero": 2, "sequence_parallel": True},
        "replicate x shard": {"zero": 3, "replicate": 2},
    },
    8: {
        "replicate x shard x tp": {"tp": 2, "zero": 3, "replicate": 2},
        "dp 2 x pp 2 x tp 2": {"pp": 2, "tp": 2},
        "pp 2 x cp 2 x tp 2": {"pp": 2, "cp": 2, "tp": 2},
        "zero-2 x dp 2 x pp 2 x tp 2, sequence": {"pp": 2, "tp": 2, "zero": 2, "sequence_parallel": True},
        "zero-1 x dp 2 x pp 2 x cp 2": {"pp": 2, "cp": 2, "zero": 1},
    },
}
PIPELINES = {f"pp 4, {name}": {"pp": 4, "pp_schedule": name} for name in parallel.SCHEDULES}
PIPELINES |= {f"dp 2 x pp 2, {name}": {"pp": 2, "pp_schedule": name} for name in parallel.SCHEDULES}
PIPELINES |= {
    "pp 2": {"pp": 2},
    "zero-1 x pp 2": {"pp": 2, "zero": 1},
    "zero-2 x pp 2": {"pp": 2, "zero": 2},
    "zero-2 x pp 2, interleaved": {"pp": 2, "zero": 2, "pp_schedule": "interleaved"},
    "zero-2 x pp 2, zero-bubble": {"pp": 2, "zero": 2, "pp_schedule": "zero-bubble"},
    "tp 2 x pp 2": {"pp": 2, "tp": 2},
    "tp 2 x pp 2, sequence": {"pp": 2, "tp": 2, "sequence_parallel": True},
}
CONTEXTS = {
    "cp 4": {"cp": 4},
    "dp 2 x cp 2": {"cp": 2},
    "zero-3 x cp 2": {"cp": 2, "zero": 3},
    "zero-1 x cp 2": {"cp": 2, "zero": 1},
    "pp 2 x cp 2": {"cp": 2, "pp": 2},
    "cp 2 x tp 2": {"cp": 2, "tp": 2},
}
SPLIT_EXPERTS = {
    "ep 4": {"ep": 4},
    "ep 2": {"ep": 2},
    "zero-1 x ep 2": {"ep": 2, "zero": 1},
    "zero-2 x ep 2": {"ep": 2, "zero": 2},
    "zero-3 x ep 2": {"ep": 2, "zero": 3},
    "zero-3 x ep 4": {"ep": 4, "zero": 3},
    "tp 4": {"tp": 4},
    "zero-3 x tp 2": {"tp": 2, "zero": 3},
    "ep 2 x tp 2": {"ep": 2, "tp": 2},
    "ep 2 x pp 2": {"ep": 2, "pp": 2},
    "tp 2 x pp 2": {"tp": 2, "pp": 2},
    "tp 4, sequence": {"tp": 4, "sequence_parallel": True},
}
LAYOUTS[4] |= PIPELINES | CONTEXTS | SPLIT_EXPERTS
SHORT = {"muon": ("zero-3", "zero-1 x tp 2"),
         "adamw": ("ddp", "zero-1", "zero-2", "zero-3 x tp 2", "tp 4, sequence", "replicate x shard")}
LONG = {"muon": ("ddp", "zero-2", "tp 4, sequence", "replicate x shard"),
        "adamw": ("tp 2", "zero-2 x tp 2, sequence"), "experts, adamw": ("zero-3",), "adamw, accumulate": ("ddp", "zero-2")}
EIGHT = {"muon, accumulate": ("dp 2 x pp 2 x tp 2",),
         "adamw, accumulate": ("pp 2 x cp 2 x tp 2", "zero-2 x dp 2 x pp 2 x tp 2, sequence")}

# Eight micro-batches a step, four a rank on two ranks of data; stages need layers.
DEEP = {"n_layer": 8, "micro_batch": 2, "optimizer": "adamw"}
PP = {"deep": (*(f"pp 4, {name}" for name in parallel.SCHEDULES), "zero-2 x pp 2, zero-bubble"),
      "deep, untied": ("pp 4, 1f1b",), "windows, sequence": ("tp 2 x pp 2, sequence",),
      "deep, recompute": ("pp 4, zero-bubble",), "deep, muon": ("zero-1 x pp 2", "tp 2 x pp 2")}
CP = {"adamw, accumulate": ("cp 4", "zero-3 x cp 2", "cp 2 x tp 2"), "muon": ("zero-3 x cp 2",),
      "windows, documents": ("pp 2 x cp 2",), "experts, context": ("dp 2 x cp 2",), "latent": ("cp 4",)}
FAMILIES = {"gpt": ("tp 2 x pp 2",), "gemma": ("tp 4",)}
EP = {"experts, accumulate": ("ep 4", "zero-3 x ep 2", "ep 2 x tp 2", "tp 4, sequence"),
      "experts, muon": ("zero-1 x ep 2",), "experts, adamw": ("zero-2 x ep 2", "ep 2 x pp 2")}

EXPERTS = ["n_expert=4", "z_loss=0.001", "capacity=1.25", "balance_rate=0.01"]
# Muon's rate is small: Newton-Schulz runs in bf16, where float noise in a gradient becomes 2^-8 of an update
CASES = {
    "deep": DEEP,
    "deep, untied": DEEP | {"n_layer": 4, "set": ["tie=false"]},
    "gpt": {"optimizer": "adamw", "micro_batch": 4, "set": [
        "position=learned", "norm=layer", "gated=false", "act=gelu_new", "qk_norm=false", "qkv_bias=true", "o_bias=true",
        "mlp_bias=true"]},
    "gemma": {"optimizer": "adamw", "micro_batch": 4, "set": ["norm_plus_one=true", "post_norm=true",
                                                            "scale_embedding=true", "logit_cap=30"]},
    "deep, recompute": DEEP | {"recompute": True},
    "deep, muon": DEEP | {"optimizer": "muon", "lr": 3e-4, "n_layer": 4},
    "windows, documents": {"optimizer": "adamw", "micro_batch": 4, "doc_mask": True, "set": ["window=12"]},
    "latent": {"optimizer": "adamw", "micro_batch": 4, "set": [
        "qk_norm=false", "kv_rank=16", "nope_dim=8", "rope_dim=8", "v_dim=16"]},
    "windows, sequence": DEEP | {"n_layer": 4, "set": ["window=12"]},
    "experts, context": {"optimizer": "adamw", "micro_batch": 4,
                         "set": ["n_expert=4", "balance=bias", "router=sigmoid", "router_bias=true"]},
    "muon": {"lr": 3e-4},
    "adamw": {"optimizer": "adamw"},
    "muon, accumulate": {"lr": 3e-4, "micro_batch": 2},
    "adamw, accumulate": {"optimizer": "adamw", "micro_batch": 2, "recompute": True},
    "experts, muon": {"lr": 3e-4, "set": EXPERTS},
    "experts, accumulate": {"optimizer": "adamw", "micro_batch": 2, "set": EXPERTS},
    "experts, adamw": {"optimizer": "adamw", "micro_batch": 2, "recompute": True,
                       "set": [*EXPERTS, "balance=bias", "router=sigmoid", "n_expert_shared=1"]},
}
COUNTS = {
    "ddp": {},
    "zero-1": {"zero": 1},
    "zero-2": {"zero": 2},
    "zero-3": {"zero": 3},
    "tp": {"tp": 4},
    "tp, sequence": {"tp": 4, "sequence_parallel": True},
    "tp, recompute, muon": {"tp": 4, "recompute": True, "optimizer": "muon"},
    "zero-3 x tp, sequence, muon": {"tp": 2, "zero": 3, "sequence_parallel": True, "optimizer": "muon"},
    "zero-1 x tp, muon": {"zero": 1, "tp": 2, "optimizer": "muon"},
    "zero-3, muon": {"zero": 3, "optimizer": "muon"},
    "zero-3, muon, deep": {"zero": 3, "optimizer": "muon", "n_layer": 8},
    "replicate x shard, muon": {"zero": 3, "replicate": 2, "optimizer": "muon"},
    "pp 4": {"pp": 4, "n_layer": 8, "micro_batch": 2},
    "zero-2 x pp 2": {"pp": 2, "zero": 2, "n_layer": 8, "micro_batch": 2},
    "zero-1 x pp 2, muon": {"pp": 2, "zero": 1, "n_layer": 8, "micro_batch": 2, "optimizer": "muon"},
    "tp 2 x pp 2": {"pp": 2, "tp": 2, "n_layer": 8, "micro_batch": 2},
    "cp 4": {"cp": 4},
    "zero-3 x cp 2, muon": {"cp": 2, "zero": 3, "optimizer": "muon"},
    "ep 4": {"ep": 4, "set": ["n_expert=4"]},
    "zero-3 x ep 2": {"ep": 2, "zero": 3, "set": ["n_expert=4"]},
    "tp 4, experts": {"tp": 4, "set": ["n_expert=4", "n_expert_shared=1"]},
}


PEAKS = {name: {"pp": 4, "pp_schedule": name} for name in parallel.SCHEDULES} | {
    "zero-2 x pp 2": {"pp": 2, "zero": 2},
    "cp 4": {"cp": 4, "micro_batch": 16},
    "cp 2 x tp 2": {"cp": 2, "tp": 2, "micro_batch": 16},
    "ep 4": {"ep": 4, "micro_batch": 4, "set": ["n_expert=4", "expert_dim=64"]},
    "tp 4, experts": {"tp": 4, "micro_batch": 16, "set": ["n_expert=4", "expert_dim=64"]},
}


def options(data, **changes):
    tiny = {"data": [data], "out": "unused", "preset": "nano", "n_layer": 2, "n_embd": 64, "seq_len": 32,
            "tokens_per_step": 512, "micro_batch": 16, "max_steps": 5, "warmup_steps": 1, "lr": 1e-3,
            "device": "cpu", "dtype": "fp32", "compile": "off", "schedule": "constant"}
    changes["set"] = ["n_head=4", "n_kv_head=4", *changes.get("set", [])]
    return Options(**{**tiny, **changes})


def relative(a, b):
    """Compute the norm of the difference over the norm."""
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def micro_batches_of(o, layout):
    """Count a rank's micro-batches, as parallel.train does."""
    return parallel.check_micro_batches(layout, o.tokens_per_step // o.seq_len, o.micro_batch)


def one_process(o):
    """Take the steps as plainly as can be, by one process -> losses, first gradient, weights."""
    sources, _, weights = open_data(o.data)
    config = make_config(o, sources[0])
    model = Transformer(config).init_weights(o.seed).train()
    optimizer = build_optimizer(model, o.optimizer, o.lr, o.weight_decay)
    losses, first, norms = [], {}, []
    taken = [0]
    for step in range(o.max_steps):
        batch = Batches(sources, weights, o, config.seq_len, torch.device("cpu"), taken=taken)
        windows, _, taken = batch.read(step, taken)
        x, y = (torch.cat([b[i] for b in windows]) for i in (0, 1))
        each, aux = model(x, y)
        loss = each.sum() / (y != IGNORE).sum()
        (loss + aux[:, 0].sum()).backward()
        first = first or {n: p.grad.clone() for n, p in model.named_parameters()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)))
        optimizer.set_lr(o.lr)
        optimizer.step()
        if config.n_expert:
            load_moe().shift_bias(model, aux)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, first, parallel.named_weights(model), norms


def open_layout(o):
    """Join the group and build this rank's part of a run -> what parallel.open_model gives, and the data."""
    ranks = parallel.join_processes("cpu", 60)
    sources, _, weights = open_data(o.data)
    config = make_config(o, sources[0])
    layout = o.layout(ranks.world)
    parallel.check_layout(layout, ranks.world, config)
    made = parallel.open_model(o, config, layout, ranks, micro_batches_of(o, layout))
    batches = Batches(sources, weights, o, config.seq_len, ranks.device, made[0].data, layout.dp)
    return *made, batches


def compare(o, reference):
    """Take the same steps on this layout -> how far losses, first gradient and last weights are off."""
    losses, first, last, _ = reference
    norms = []
    grid, model, forward, optimizer, batches = open_layout(o)
    config, layout = model.config, grid.layout
    named = dict(model.named_parameters())
    share = sum(local(p).numel() for p in named.values()) / sum(p.numel() for p in last.values())
    seen, gradients = [], {}
    for step in range(o.max_steps):
        micro_batches, targets, windows = batches.at(step)
        targets = targets / layout.split
        loss, aux = parallel.gradients_of_step(forward, model, grid, micro_batches, targets, windows)
        # (without rotations nothing depends on the keys' bias: its gradient is noise)
        real = [n for n in named if first[n].norm() > 1e-6]
        gradients = gradients or {n: relative(full(named[n].grad), first[n]) for n in real}
        norm = parallel.clip_gradients(model, grid, o.grad_clip)
        norms.append(abs(float(norm) - reference[3][step]) / reference[3][step])
        optimizer.set_lr(o.lr)
        optimizer.step()
        optimizer.zero_grad()
        for sum_of_all in (loss, aux):
            dist.all_reduce(sum_of_all)
        if config.n_expert:
            load_moe().shift_bias(model, aux / layout.tp)
        seen.append(float(loss) / layout.tp)
    worst = {
        "loss": max(abs(a - b) for a, b in zip(seen, losses, strict=True)),
        "gradient": max(gradients.values()),
        "norm": max(norms),
        "weights": max(relative(full(p), last[n]) for n, p in parallel.named_weights(model).items()
                       if n in real or n not in named),
    }
    found = torch.tensor(list(worst.values()))
    dist.all_reduce(found, dist.ReduceOp.MAX)  # a rank of a pipeline has its own layers only
    return dict(zip(worst, found.tolist(), strict=True)) | {"share": share}


def layouts(data, which):
    """Compare layouts with one process, {"layout, case": result}."""
    results = {}
    for case, names in which.items():
        reference = one_process(options(data, **CASES[case]))
        for name in names:
            o = options(data, **CASES[case], **LAYOUTS[dist.get_world_size()][name])
            results[f"{name}, {case}"] = compare(o, reference)
    return results


class Live(LiveBytes):
    """Count the bytes that live at one time, of what DTensors hold as well."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(t is DTensor for t in types):
            return NotImplemented
        return super().__torch_dispatch__(func, types, args, kwargs)


def counts(data):
    """Take a step on several layouts -> what is sent and what stands in memory, and the formulas."""
    results = {}
    for name, changes in COUNTS.items():
        o = options(data, **{"optimizer": "adamw", "micro_batch": 512, **changes})
        results[name] = count_step(o)
    return results


def count_step(o):
    """Take one step -> {"sent": {"phase/name": [count, bytes]}, "memory": ..., and both as formulas}."""
    grid, model, forward, optimizer, batches = open_layout(o)
    config, layout = model.config, grid.layout
    micro_batches, targets, windows = batches.at(0)
    memory = {"parameters": sum(local(p).nbytes for p in model.parameters())}

    def measure_gathered(*_):  # what fully_shard has gathered has no axis "shard" for the moment
        whole = [p for p in model.parameters() if layout.uses_fsdp
                 and not (isinstance(p, DTensor) and "shard" in p.device_mesh.mesh_dim_names)]
        memory["gathered"] = sum(local(p).nbytes for p in whole)

    counter = parallel.CommunicationCounter()

    def enter(phase):
        """Make a module's hook from which on what is sent belongs to this phase."""
        return lambda *_: setattr(counter, "phase", phase)

    list(model.layers.values())[-1].mlp.register_forward_pre_hook(measure_gathered)
    if layout.pp == 1:
        forward.register_forward_pre_hook(enter("forward"), prepend=True)  # before fully_shard's own
        forward.register_forward_hook(enter("backward"))
    args = forward, model, grid, micro_batches, targets / layout.split, windows
    if layout.pp > 1:  # in the first step the engine tries what shapes there are
        parallel.gradients_of_step(*args)
        optimizer.zero_grad()
    with counter:
        parallel.gradients_of_step(*args)
        counter.phase = "step"
        memory["gradients"] = sum(local(p.grad).nbytes for p in model.parameters())
        known = [*model.parameters(), *(p.grad for p in model.parameters()), *optimizer.mine.values()]
        known += [*parallel.state_of(optimizer.inner).values(), *optimizer.slices.values()]
        with Live([local(t.detach()) for t in known]) as live:
            optimizer.step()
    state = parallel.state_of(optimizer.inner)
    moments = [t for name, t in state.items() if not name.endswith("/step")]
    memory["optimizer"] = sum(local(t).nbytes for t in [*moments, *optimizer.mine.values()])
    memory["update"] = live.peak
    largest = max([4 * size for size in parallel.layer_matrices(model).values()])
    B, T = micro_batches[0][0].shape
    costs = (layout, o.recompute, parallel.model_dtype(model).itemsize)
    sent = {}
    m = len(micro_batches)
    for name, _, size in parallel.communication(config, B * T // layout.cp, *costs, m):
        sent[name] = sent.get(name, 0) + size
    formulas = {"sent": sent, "memory": parallel.training_bytes(config, B, T, *costs, m, grid.stage)}
    result = {"sent": counter.counts, "memory": memory, "formulas": formulas, "largest": largest}
    ranks = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, result)
    return result | {"ranks": ranks}


def peaks(data):
    """Take two steps on each layout -> what each rank had stored at most, in micro-batches and in bytes."""
    results = {}
    for name, changes in PEAKS.items():
        o = options(data, **{"optimizer": "adamw", "n_layer": 8, "micro_batch": 2, **changes})
        grid, model, forward, optimizer, batches = open_layout(o)
        layout = grid.layout
        micro_batches, targets, windows = batches.at(0)
        args = forward, model, grid, micro_batches, targets / layout.split, windows
        for _ in range(2):  # (in the second one DDP makes its buckets anew)
            parallel.gradients_of_step(*args)
        optimizer.step()
        named = dict(model.named_parameters())
        state = list(parallel.state_of(optimizer.inner).values())
        standing = [local(t) for t in [*named.values(), *state, *(p.grad for p in named.values())]]
        buffers = []
        for stage in forward.stages if layout.pp > 1 else ():
            for infos in (*stage.args_recv_info.values(), *stage.grad_recv_info.values()):
                buffers += [info.buffer for info in infos if info.buffer is not None]
        with Live([*standing, *buffers]) as live:
            parallel.gradients_of_step(*args)
        m = len(micro_batches)
        planned = parallel.training_bytes(model.config, o.micro_batch, o.seq_len, layout, False, 4, m, grid.stage)
        actions = forward.actions if layout.pp > 1 else [("F", 0, 0), ("B", 0, 0)]
        mine = {"peak": live.peak, "stored": parallel.most_stored(actions), "actions": actions,
                "formula": parallel.stored(layout.schedule, layout.pp, m, grid.stage), "activations": planned["activations"],
                "measured": live.peak + sum(t.nbytes for t in standing), "planned": sum(planned.values())}
        ranks = [None] * 4
        dist.all_gather_object(ranks, mine)
        results[name] = {"ranks": ranks, "m": m, "bubble": parallel.bubble(layout.schedule, layout.pp, m)}
        results[name]["idle"] = parallel.idle_share(parallel.place_actions([r.pop("actions") for r in ranks]))
    return results


def stopped(data, out):
    """Stop a run after three of its steps, as SIGTERM does -> the folder that it leaves, with shards."""
    folder = Path(out).with_name("stopped")
    clip = parallel.clip_gradients
    steps = iter((False, False, True))

    def clip_and_stop(*args):
        if next(steps):
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(*args)

    parallel.clip_gradients = clip_and_stop
    o = options(data, out=str(folder), tp=2, zero=3, optimizer="muon", max_steps=9, overwrite=True)
    try:
        parallel.train(o)
    except KeyboardInterrupt:
        parallel.clip_gradients = clip
    return str(folder)


def ideas(data):
    """Compare Part I of parallel.py with one process."""
    torch.manual_seed(0)
    return {**split_matrices(), **split_a_block(), **zero_by_hand(), **pipelines_by_hand()}


def pipelines_by_hand():
    """Compare Part I's pipelines, a layer a rank, with all layers in one process."""
    rank, world = dist.get_rank(), dist.get_world_size()
    m = 6
    weights = torch.randn(world, 8, 8) / 3
    inputs = torch.randn(m, 2, 3, 8)
    whole = weights.clone().requires_grad_()
    x = inputs.flatten(0, 1)
    for w in whole:
        x = torch.tanh(x @ w)
    x.square().sum().backward()
    results = {}
    for run in (parallel.gpipe, parallel.one_forward_one_backward):
        mine = weights[rank].clone().requires_grad_()

        def stage(x, w=mine):
            y = torch.tanh(x @ w)
            return y.square().sum() if rank == world - 1 else y

        pipe = parallel.Pipe(stage, list(inputs), (2, 3, 8))
        run(pipe, m)
        peaks = [None] * world
        dist.all_gather_object(peaks, pipe.peak)
        worst = torch.tensor(relative(mine.grad, whole.grad[rank]))
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        results |= {run.__name__: float(worst), f"{run.__name__} stores": peaks}
    return results


def split_matrices():
    """Compare column- then row-parallel matrices with the same two in one piece."""
    rank, world = dist.get_rank(), dist.get_world_size()
    up, down, x = torch.randn(24, 8), torch.randn(8, 24), torch.randn(5, 8, requires_grad=True)
    column, row = parallel.ColumnParallelLinear(up), parallel.RowParallelLinear(down)
    y = row(column(x).relu())
    (y * y).sum().backward()
    u, d, z = (t.detach().clone().requires_grad_() for t in (up, down, x))
    want = (z @ u.T).relu() @ d.T
    (want * want).sum().backward()
    pairs = [(y, want), (x.grad, z.grad), (column.weight.grad, u.grad.chunk(world)[rank]),
             (row.weight.grad, d.grad.chunk(world, 1)[rank])]
    return {"linear": max(relative(a, b) for a, b in pairs)}


def share_of_block(name, tensor):
    """Cut this rank's share: q, k, v, gate and up by rows, o and down by columns."""
    rank, world = dist.get_rank(), dist.get_world_size()
    if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"):
        return tensor.chunk(world)[rank]
    return tensor.chunk(world, 1)[rank] if name.split(".")[-2] in ("o_proj", "down_proj") else tensor


def split_a_block():
    """Compare a block with a share of the heads with the whole block."""
    world = dist.get_world_size()
    config = Config(vocab_size=64, n_layer=1, n_head=4, n_kv_head=4, n_embd=32, head_dim=8, ffn_dim=48)
    whole = Block(config, 0)
    small = Block(config.replace(n_head=4 // world, n_kv_head=4 // world, ffn_dim=48 // world), 0)
    with torch.no_grad():
        for (name, p), q in zip(whole.named_parameters(), small.parameters(), strict=True):
            q.copy_(share_of_block(name, p))
    x = torch.randn(2, 6, 32, requires_grad=True)
    cos, sin = rope_angles(torch.arange(6), *rope_frequencies(config, torch.arange(6)))
    y = parallel.split_block(small, x, cos, sin, "causal", None)
    y.square().sum().backward()
    mine = {n: p.grad for n, p in small.named_parameters()}
    z = x.detach().clone().requires_grad_()
    want, _ = whole(z, torch.zeros(1, 1), cos, sin, "causal", None)
    want.square().sum().backward()
    pairs = [(y, want), (x.grad, z.grad)]
    pairs += [(mine[n], share_of_block(n, p.grad)) for n, p in whole.named_parameters()
              if "q_norm" not in n and "k_norm" not in n]
    return {"block": max(relative(a, b) for a, b in pairs)}


def zero_by_hand():
    """Compare ZeRO on three layers, each rank with its part of the batch, with torch.optim.AdamW on all."""
    rank, world = dist.get_rank(), dist.get_world_size()
    P, steps, lr = 8 * 8, 3, 1e-2
    start, batches = torch.randn(3, P) / 8, torch.randn(steps, world, 4, 8)

    def layer(w, x):
        return torch.tanh(x @ w.view(8, 8))

    def loss_of(layer_weights, x):
        for w in layer_weights:
            x = layer(w, x)
        return x.square().sum()

    one = [w.clone().requires_grad_() for w in start]
    optimizer = torch.optim.AdamW(one, lr, (0.9, 0.95), eps=1e-10, weight_decay=0.1)
    for batch in batches:
        optimizer.zero_grad()
        loss_of(one, batch.flatten(0, 1)).backward()
        optimizer.step()
    results = {}
    for zero in (1, 2):
        flat = start.flatten().clone()
        m, v = torch.zeros(flat.numel() // world), torch.zeros(flat.numel() // world)
        for i, batch in enumerate(batches):
            w = flat.clone().requires_grad_()
            loss_of(w.split(P), batch[rank]).backward()
            parallel.zero_step(zero, flat, w.grad, m, v, i + 1, lr)
        results[f"zero-{zero}"] = relative(flat, torch.cat([w.detach() for w in one]))
    shards = [w.chunk(world)[rank].clone().requires_grad_() for w in start]
    states = [(torch.zeros(P // world), torch.zeros(P // world)) for _ in shards]
    for i, batch in enumerate(batches):
        with parallel.CommunicationCounter() as counter:
            parallel.zero3_forward([layer] * 3, shards, batch[rank]).square().sum().backward()
        for shard, (m, v) in zip(shards, states, strict=True):
            with torch.no_grad():
                parallel.adamw(shard, shard.grad, m, v, i + 1, lr)
            shard.grad = None
    pairs = [(s.detach(), w.detach().chunk(world)[rank]) for s, w in zip(shards, one, strict=True)]
    sent = {name: entry[0] for name, entry in counter.counts.items()}
    return results | {"zero-3": max(relative(a, b) for a, b in pairs), "zero-3 sends": sent}


def main(data, out, *jobs):
    parallel.join_processes("cpu", 60)
    work = {"ideas": ideas, "counts": counts, "short": lambda data: layouts(data, SHORT),
            "long": lambda data: layouts(data, LONG), "eight": lambda data: layouts(data, EIGHT),
            "stopped": lambda data: stopped(data, out), "pipelines": lambda data: layouts(data, PP),
            "peaks": peaks, "families": lambda data: layouts(data, FAMILIES),
            "contexts": lambda data: layouts(data, CP), "experts": lambda data: layouts(data, EP)}
    results = {job: work[job](data) for job in jobs}
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stderr.flush()
    os._exit(0)  # on Python's own way out gloo's threads now and then abort the process
