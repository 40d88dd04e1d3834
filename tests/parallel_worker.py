"""One group of processes for many layouts (started by test_parallel.py through torchrun): results as JSON."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import parallel  # noqa: E402
from model import IGNORE, Block, Config, Options, Transformer, build_optimizer, open_data, rank_and_world, rope_angles  # noqa: E402
from parallel import Layout, Run, full, local  # noqa: E402

LAYOUTS = {
    "ddp": Layout(dp=4),
    "zero-1": Layout(dp=4, zero=1),
    "zero-2": Layout(dp=4, zero=2),
    "zero-3": Layout(dp=4, zero=3),
    "tp 2": Layout(dp=2, tp=2),
    "zero-1 x tp 2": Layout(dp=2, tp=2, zero=1),
    "tp 4": Layout(tp=4),
    "tp 4, sequence": Layout(tp=4, sequence=True),
    "zero-3 x tp 2": Layout(dp=2, tp=2, zero=3),
    "zero-2 x tp 2, sequence": Layout(dp=2, tp=2, zero=2, sequence=True),
    "replicate x shard": Layout(dp=4, zero=3, replicate=2),
    "replicate x shard x tp": Layout(dp=4, tp=2, zero=3, replicate=2),  # eight processes
}


EXPERTS = ("ddp", "zero-1", "zero-3")  # layouts that are also compared with a mixture of experts


def options(data, **changes):
    tiny = {"data": (data,), "out": "", "preset": "nano", "n_layer": 2, "n_head": 4, "n_kv_head": 4, "n_embd": 64,
            "seq_len": 32, "tokens_per_step": 512, "micro_batch": 16, "max_steps": 5, "warmup_steps": 1, "lr": 1e-3,
            "device": "cpu", "dtype": "fp32", "compile": "off", "schedule": "constant"}  # fmt: skip
    return Options(**{**tiny, **changes})


def one_process(o, config, data, steps):
    """The same steps as plainly as can be: no micro-batches, no ranks. -> losses, first gradient, weights."""
    model = Transformer(config)
    model.init_weights(o.seed).train()
    model.set_balance(o)
    optimizer, mixture = build_optimizer(model, o.optimizer, o.lr, o.weight_decay), parallel.Mixture(data[0], data[2], o.seed)
    losses, first, taken = [], {}, [0]
    for step in range(steps):
        plan, taken = mixture.draw(step, o.tokens_per_step // config.seq_len, taken)
        x, y = mixture.read(plan, config.seq_len)
        each, aux = model(x, y)
        loss = each.sum() / (y != IGNORE).sum()
        (loss + aux[:, 0].sum()).backward()
        first = first or {n: p.grad.clone() for n, p in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        optimizer.set_lr(o.lr)
        optimizer.step()
        if o.balance == "bias":
            model.shift_bias(aux, o.balance_rate)
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, first, parallel.named_weights(model)


def off(a, b):
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def compare(layout, o, config, data, reference):
    """How far a layout is from one process: losses, first gradient, weights after all steps."""
    losses, first, weights = reference
    run = Run(o, layout, config, data, parallel.Ranks(*rank_and_world(), dist.get_world_size()), None)
    batches, _ = run.batches()
    run.backward(batches)
    named = dict(run.model.named_parameters())
    grads = {n: off(full(p.grad), first[n]) for n, p in named.items()}
    share = sum(local(p).numel() for p in named.values()) / sum(weights[n].numel() for n in named)
    run.optimizer.zero_grad()
    seen = [run.step(o.lr, False)["loss"] for _ in losses]
    return {
        "loss": max(abs(a - b) for a, b in zip(seen, losses, strict=True)),
        "grad": max(grads.values()),
        "worst": max(grads, key=grads.get),
        "weights": max(off(full(p), weights[n]) for n, p in parallel.named_weights(run.model).items()),
        "share": share,
    }


def layouts(data_folder, out, names):
    """Muon's rate is small: Newton-Schulz runs in bf16, where float noise in a gradient becomes 2^-8 of an update."""
    data, results = open_data((data_folder,)), {}
    cases = {"muon": {"lr": 3e-4}, "adamw": {"optimizer": "adamw"},
             "adamw, accumulate": {"optimizer": "adamw", "micro_batch": 2, "recompute": "block"}}  # fmt: skip
    experts = {"n_expert": 4, "z_loss": 0.001, "capacity": 1.25, "balance_rate": 0.01}
    if any(n in EXPERTS for n in names):
        cases |= {"experts, muon": {**experts, "lr": 3e-4},
                  "experts, adamw": {**experts, "optimizer": "adamw", "micro_batch": 2, "recompute": "block", "balance": "bias",
                                     "router": "sigmoid", "n_expert_shared": 1}}  # fmt: skip
    for case, changes in cases.items():
        o = options(data_folder, out=out, **changes)
        config = parallel.make_config(o, data[0][0])
        reference = one_process(o, config, data, 5)
        some = ("ddp", "zero-2", "zero-3 x tp 2") if "accumulate" in case else EXPERTS if "experts" in case else names
        for name in (n for n in names if n in some):
            results[f"{name}, {case}"] = compare(LAYOUTS[name], o, config, data, reference)
    return results


def ideas(data_folder, out):
    """Part I of parallel.py against the engine or one process."""
    torch.manual_seed(0)
    rank, world = dist.get_rank(), dist.get_world_size()
    results = {}

    # column- then row-parallel matrices, against the same two matrices in one piece
    up, down, x = torch.randn(24, 8), torch.randn(8, 24), torch.randn(5, 8, requires_grad=True)
    column, row = parallel.ColumnParallelLinear(up), parallel.RowParallelLinear(down)
    y = row(column(x).relu())
    (y * y).sum().backward()
    u, d, z = up.clone().requires_grad_(), down.clone().requires_grad_(), x.detach().clone().requires_grad_()
    want = (z @ u.T).relu() @ d.T
    (want * want).sum().backward()
    results["linear"] = max(off(y, want), off(x.grad, z.grad), off(column.weight.grad, u.grad.chunk(world)[rank]),
                            off(row.weight.grad, d.grad.chunk(world, 1)[rank]))  # fmt: skip

    # a block with a share of the heads, against the whole block
    config = Config(vocab_size=64, n_layer=1, n_head=4, n_kv_head=4, n_embd=32, head_dim=8, ffn_dim=48)
    whole = Block(config, 0)
    small = Block(config.replace(n_head=4 // world, n_kv_head=4 // world, ffn_dim=48 // world), 0)
    with torch.no_grad():
        for (name, p), q in zip(whole.named_parameters(), small.parameters(), strict=True):
            q.copy_(parallel.share_of_block(name, p, rank, world))
    x = torch.randn(2, 6, 32, requires_grad=True)
    cos, sin = rope_angles(torch.arange(6), 8, 1e4)
    y = parallel.split_block(small, x, cos, sin, "causal", None)
    y.square().sum().backward()
    mine = {n: p.grad for n, p in small.named_parameters()}
    z = x.detach().clone().requires_grad_()
    want, _ = whole(z, torch.zeros(()), cos, sin, "causal", None)
    want.square().sum().backward()
    results["block"] = max([off(y, want), off(x.grad, z.grad)] + [
        off(mine[n], parallel.share_of_block(n, p.grad, rank, world))
        for n, p in whole.named_parameters() if "q_norm" not in n and "k_norm" not in n])  # fmt: skip

    # ZeRO by hand: three layers, each rank with its part of the batch, against torch.optim.AdamW on all of it
    P, steps, lr = 8 * 8, 3, 1e-2
    start, batches = torch.randn(3, P) / 8, torch.randn(steps, world, 4, 8)

    def layer(w, x):
        return torch.tanh(x @ w.view(8, 8))

    one = [w.clone().requires_grad_() for w in start]
    optimizer = torch.optim.AdamW(one, lr, (0.9, 0.95), eps=1e-10, weight_decay=0.1)
    for batch in batches:
        x = batch.flatten(0, 1)
        for w in one:
            x = layer(w, x)
        optimizer.zero_grad()
        x.square().sum().backward()
        optimizer.step()
    for zero, step in ((1, parallel.zero1_step), (2, parallel.zero2_step)):
        flat = start.flatten().clone()
        m, v = torch.zeros(flat.numel() // world), torch.zeros(flat.numel() // world)
        for i, batch in enumerate(batches):
            w = flat.clone().requires_grad_()
            x = batch[rank]
            for part in w.split(P):
                x = layer(part, x)
            x.square().sum().backward()
            step(flat, w.grad, m, v, i + 1, lr)
        results[f"zero-{zero}"] = off(flat, torch.cat([w.detach() for w in one]))
    shards = [w.chunk(world)[rank].clone().requires_grad_() for w in start]
    states = [(torch.zeros(P // world), torch.zeros(P // world)) for _ in shards]
    for i, batch in enumerate(batches):
        with parallel.Counter() as counter:
            parallel.zero3_forward([layer] * 3, shards, batch[rank]).square().sum().backward()
        for shard, (m, v) in zip(shards, states, strict=True):
            with torch.no_grad():
                parallel.adamw(shard, shard.grad, m, v, i + 1, lr)
            shard.grad = None
    results["zero-3"] = max(off(s.detach(), w.detach().chunk(world)[rank]) for s, w in zip(shards, one, strict=True))
    sent = {name: entry[0] for (_, name), entry in counter.counts.items()}
    results["zero-3 sends"] = sent
    return results


def counts(data_folder, out):
    """What --count-communication measures, for several layouts, beside the formulas."""
    data, results = open_data((data_folder,)), {}
    cases = {
        "ddp": (Layout(dp=4), {}),
        "zero-1": (Layout(dp=4, zero=1), {}),
        "zero-2": (Layout(dp=4, zero=2), {}),
        "zero-3": (Layout(dp=4, zero=3), {}),
        "tp": (Layout(tp=4), {}),
        "tp, sequence": (Layout(tp=4, sequence=True), {}),
        "tp, recompute": (Layout(tp=4), {"recompute": "block"}),
        "zero-3 x tp": (Layout(dp=2, tp=2, zero=3), {}),
        "zero-3 x tp, sequence": (Layout(dp=2, tp=2, zero=3, sequence=True), {}),
        "replicate x shard": (Layout(dp=4, zero=3, replicate=2), {}),
    }
    for name, (layout, changes) in cases.items():
        o = options(data_folder, out=out, optimizer="adamw", micro_batch=512, **changes)
        config = parallel.make_config(o, data[0][0])
        run = Run(o, layout, config, data, parallel.Ranks(*rank_and_world(), dist.get_world_size()), None)
        measured = run.count()
        parallel.show_count(measured, run)
        for kind in ("sent", "formula"):
            measured[kind] = {"/".join(k): v for k, v in measured[kind].items() if k[0] != "step"}
        args = {k: getattr(layout, k) for k in ("dp", "tp", "zero", "replicate")}
        measured["planned"] = parallel.training_bytes(config, 4, config.seq_len, e=4, **args)
        results[name] = measured
    return results


def main(job, data_folder, out, *args):
    parallel.join_processes("cpu", 60)
    results = globals()[job](data_folder, out, *args)
    if dist.get_rank() == 0:
        Path(out).with_suffix(".json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    job, data_folder, out, *args = sys.argv[1:]
    main(job, data_folder, out, *([args] if job == "layouts" else args))
