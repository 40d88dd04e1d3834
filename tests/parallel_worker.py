"""One group of processes for many layouts (started by test_parallel.py through torchrun): results as JSON."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import parallel  # noqa: E402
from model import IGNORE, Config, Options, Transformer, build_optimizer, open_data, rank_and_world  # noqa: E402
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


def options(data, **changes):
    tiny = {"data": (data,), "out": "", "preset": "nano", "n_layer": 2, "n_head": 4, "n_kv_head": 4, "n_embd": 64,
            "seq_len": 32, "tokens_per_step": 512, "micro_batch": 2, "max_steps": 5, "warmup_steps": 1, "lr": 1e-3,
            "device": "cpu", "dtype": "fp32", "compile": "off", "schedule": "constant"}  # fmt: skip
    return Options(**{**tiny, **changes})


def one_process(o, config, data, steps):
    """The same steps as plainly as can be: no micro-batches, no ranks. -> losses, first gradient, weights."""
    model = Transformer(config)
    model.init_weights(o.seed).train()
    optimizer, mixture = build_optimizer(model, o.optimizer, o.lr, o.weight_decay), parallel.Mixture(data[0], data[2], o.seed)
    losses, first, taken = [], {}, [0]
    for step in range(steps):
        plan, taken = mixture.draw(step, o.tokens_per_step // config.seq_len, taken)
        x, y = mixture.read(plan, config.seq_len)
        loss = model(x, y)[0].sum() / (y != IGNORE).sum()
        loss.backward()
        first = first or {n: p.grad.clone() for n, p in model.named_parameters()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        optimizer.set_lr(o.lr)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, first, {n: p.detach() for n, p in model.named_parameters()}


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
    share = sum(local(p).numel() for p in named.values()) / sum(p.numel() for p in weights.values())
    run.optimizer.zero_grad()
    seen = [run.step(o.lr, False)["loss"] for _ in losses]
    return {
        "loss": max(abs(a - b) for a, b in zip(seen, losses, strict=True)),
        "grad": max(grads.values()),
        "worst": max(grads, key=grads.get),
        "weights": max(off(full(p.detach()), weights[n]) for n, p in named.items()),
        "share": share,
    }


def layouts(data_folder, out, names):
    data, results = open_data((data_folder,)), {}
    cases = {"muon": {}, "adamw": {"optimizer": "adamw"}, "accumulate": {"micro_batch": 1, "recompute": "block"}}
    for case, changes in cases.items():
        o = options(data_folder, out=out, **changes)
        config = parallel.make_config(o, data[0][0])
        reference = one_process(o, config, data, 5)
        for name in names:
            results[f"{name}, {case}"] = compare(LAYOUTS[name], o, config, data, reference)
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
