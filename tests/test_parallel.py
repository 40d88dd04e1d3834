"""parallel.py: every layout equals one process; what is sent and kept equals the formulas; nothing is lost."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, command, wait_for

import parallel
from model import PRESETS, Config, MoEConfig, UserError, communication, read_tensors, training_bytes, zero_bytes
from parallel import Layout, check_layout

ONE = {"OMP_NUM_THREADS": "1"}
TINY = ["--preset", "nano", "--n-layer", 2, "--n-embd", 64, "--n-head", 4, "--seq-len", 32, "--tokens-per-step", 256, "--dtype", "fp32",
        "--device", "cpu", "--warmup-steps", 2, "--lr", 3e-3, "--eval-interval", 100, "--eval-tokens", 1000]  # fmt: skip


def group(ranks, job, data, out, *args):
    """Start parallel_worker.py on so many processes -> what it found."""
    code, _, err = command("tests/parallel_worker.py", job, data, out, *args, ranks=ranks, env=ONE, timeout=400)
    assert code == 0, err[-3000:]
    return json.loads(out.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def worker(data, tmp_path_factory):
    return lambda ranks, job, *args: group(ranks, job, data, tmp_path_factory.mktemp(job) / "out", *args)


def check(results):
    for name, r in results.items():
        assert r["loss"] < 2e-5, (name, r)
        assert r["grad"] < 1e-5, (name, r)
        assert r["weights"] < 1e-4, (name, r)


def test_layouts_equal_one_process(worker):
    from parallel_worker import LAYOUTS

    names = [n for n, layout in LAYOUTS.items() if layout.world == 4]
    results = worker(4, "layouts", *names)
    assert len(results) == 2 * len(names) + 3 + 2 * 3
    check(results)
    share = {n: results[f"{n}, adamw"]["share"] for n in names}
    assert share["ddp"] == share["zero-1"] == 1.0  # these keep all parameters on each rank
    assert abs(share["zero-3"] - 0.25) < 0.01 and abs(share["tp 4"] - 0.25) < 0.02 and abs(share["zero-3 x tp 2"] - 0.25) < 0.01


def test_replicate_x_shard_x_tensor_on_eight(worker):
    check(worker(8, "layouts", "replicate x shard x tp"))


def test_plain_lines_equal_engine(worker):
    results = worker(2, "ideas")
    sends = results.pop("zero-3 sends")
    assert all(error < 1e-5 for error in results.values()), results
    assert sends == {"all_gather": 6, "reduce_scatter": 3}  # of three layers


def test_counts_equal_formulas(worker):
    """The issue's counts, and bytes and memory within 5 %."""
    results = worker(4, "counts")
    for name, r in results.items():
        assert set(r["sent"]) == set(r["formula"]), (name, r)
        for key, (count, size) in r["formula"].items():
            assert r["sent"][key][0] == count, (name, key, r)
            assert r["sent"][key][1] == pytest.approx(size, rel=0.05), (name, key, r)
        for what in ("parameters", "gradients", "optimizer"):
            assert r["bytes"][what] == pytest.approx(r["planned"][what], rel=0.05), (name, what, r)
    L = 2
    assert results["tp"]["sent"]["forward/all_reduce"][0] == 2 * L + 1 + 3  # and the embedding, and three sums of the loss
    assert results["tp"]["sent"]["backward/all_reduce"][0] == 2 * L + 1 + 1  # and the output matrix, and the heads' norms
    assert results["zero-3"]["sent"]["forward/all_gather"][0] == results["zero-3"]["sent"]["backward/all_gather"][0] == L + 1
    n = results["ddp"]["bytes"]["parameters"]
    assert results["ddp"]["sent"]["backward/all_reduce"][1] == n
    assert results["zero-2"]["bytes"]["gathered"] == pytest.approx(n, rel=0.05)
    assert results["zero-3"]["bytes"]["gathered"] < n


def run_parallel(data, out, ranks, *args, script="parallel.py", **kwargs):
    return command(script, "--data", data, "--out", out, *TINY, *args, ranks=ranks, env=ONE, **kwargs)


def losses(folder):
    return [r["loss"] for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in r]


def test_resharding_and_the_whole_folder(data, tmp_path):
    """dp 4, stopped at a save; dp 2 x tp 2 with ZeRO-3 goes on; then train.py alone; against one process unbroken."""
    assert run_parallel(data, tmp_path / "one", 1, "--max-steps", 9, "--schedule", "constant", script="train.py")[0] == 0
    out = tmp_path / "run"
    code, _, err = run_parallel(data, out, 4, "--max-steps", 3, "--schedule", "constant")
    assert code == 0, err
    code, _, err = command("parallel.py", "--resume", out, "--max-steps", 6, "--tp", 2, "--zero", 3, ranks=4, env=ONE)
    assert code == 0, err
    code, _, err = command("train.py", "--resume", out, "--max-steps", 9, env=ONE)
    assert code == 0, err
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), abs=2e-3)  # Muon's bf16: see parallel_worker.layouts
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert model(torch.zeros(1, 4, dtype=torch.long)).logits.shape[1] == 4


def test_stop_shards_export(data, tmp_path):
    """SIGTERM leaves shards; another layout goes on with them, or export joins them for train.py: the same weights."""
    out = tmp_path / "run"
    args = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "parallel.py"),
            "--data", str(data), "--out", str(out), *map(str, TINY), "--max-steps", "500", "--zero", "3"]  # fmt: skip
    process = subprocess.Popen(args, env={**os.environ, **ONE}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(out / "metrics.jsonl", 60)
    while len((out / "metrics.jsonl").read_text().splitlines()) < 3:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    assert (out / "state" / "shards").is_dir()
    at = json.loads((out / "state" / "state.json").read_text())["at"]
    assert at >= 3
    code, _, err = command("train.py", "--resume", out)
    assert code == 2 and "export" in err
    code, _, err = command("parallel.py", "export", out)
    assert code == 0 and "is whole" in err, err
    shape = dict(read_tensors(out / "model.safetensors"))["model.layers.0.mlp.up_proj.weight"].shape
    assert shape[1] == 64 and not (out / "state" / "shards").exists()
    code, _, err = command("train.py", "--resume", out, "--max-steps", at + 1, env=ONE)
    assert code == 0, err


def test_killed_rank_restarts(data, tmp_path):
    """One of four ranks is killed: torchrun --max-restarts goes on from the last save, to the same weights."""
    args = ["--max-steps", 16, "--save-interval", 4, "--zero", 2]
    assert run_parallel(data, tmp_path / "whole", 4, *args)[0] == 0
    out = tmp_path / "cut"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "--max-restarts", "2",
              str(ROOT / "parallel.py"), "--data", str(data), "--out", str(out), *map(str, TINY), *map(str, args)]  # fmt: skip
    process = subprocess.Popen(launch, env={**os.environ, **ONE}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(out / "metrics.jsonl", 60)
    while len((out / "metrics.jsonl").read_text().splitlines()) < 6:
        time.sleep(0.01)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-2000:]
    a, b = (dict(read_tensors(tmp_path / f / "model.safetensors")) for f in ("whole", "cut"))
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("layout, words", [
    (Layout(dp=3, tp=2), "--dp 4 --tp 2"),
    (Layout(dp=2, tp=2), "there are 8 processes; the nearest that can is --dp 4 --tp 2"),
    (Layout(dp=1, tp=8), "heads do not divide by 8; the nearest that can is --dp 2 --tp 4"),
    (Layout(dp=8, zero=4), "--zero is 0, 1, 2 or 3"),
    (Layout(dp=8, zero=3, replicate=3), "--replicate 3 has to divide"),
    (Layout(dp=8, replicate=2), "needs --zero 2 or 3"),
    (Layout(dp=8, sequence=True), "needs --tp above 1"),
    (Layout(dp=4, tp=2, sequence="experts"), "mixture of experts cannot be split"),
])  # fmt: skip
def test_layouts_that_cannot_be(layout, words):
    config = Config(vocab_size=128, n_head=4, n_kv_head=4, n_embd=64, head_dim=16, ffn_dim=96)
    if layout.sequence == "experts":
        layout, config = dataclasses.replace(layout, sequence=False), config.replace(moe=MoEConfig())
    with pytest.raises(UserError, match=words):
        check_layout(layout, 8, config)


def test_refused_by_one_rank_in_one_sentence(data, tmp_path):
    code, _, err = run_parallel(data, tmp_path / "run", 2, "--dp", 1, "--tp", 1)
    assert code != 0 and err.count("error: --dp 1 --tp 1 cannot be") == 1
    assert "the nearest that can is --dp 2 --tp 1" in err and "Traceback (most recent call last):\n  File \"" + str(ROOT) not in err


def test_masked_models_are_train_pys_and_an_old_folder_does_not_win(tmp_path):
    with pytest.raises(UserError, match="is a masked model"):
        parallel.run(parallel.Options(objective="mlm", out="out/masked"), None, Layout())
    for name, inside in (("run", "model.safetensors"), ("run.old", "state/shards/x")):
        (tmp_path / name / inside).parent.mkdir(parents=True)
        (tmp_path / name / inside).touch()
        (tmp_path / name / "config.json").touch()
    assert parallel.find_run(tmp_path / "run") == tmp_path / "run"


def test_chapters_table():
    """4 + 4 + 8 bytes a parameter: 175B are 700, 700 and 1400 GB; on 64 ranks ZeRO-1's optimizer is 21.9, ZeRO-3 43.75 in all."""
    assert zero_bytes(175e9, 1, 0) == (700e9, 700e9, 1400e9)
    assert zero_bytes(175e9, 64, 1)[2] / 1e9 == pytest.approx(21.875)
    assert sum(zero_bytes(175e9, 64, 3)) / 1e9 == pytest.approx(43.75)
    # the chapter's ZeRO-2 example: 10.9 GB of gradients are what remains on a rank, not what is saved
    assert zero_bytes(175e9, 64, 2)[1] / 1e9 == pytest.approx(10.94, abs=0.01)


def test_formulas_follow_the_papers():
    config = PRESETS["llama-2-70b"]
    assert config.n_params() == 68_976_648_192  # as published
    rows = communication(config, 4096, tp=8)
    forward = next(r for r in rows if r[0] == "forward" and r[3] == 2 * 80 + 1)
    assert forward[4] == pytest.approx(2 * 80 * 4096 * 8192 * 2, rel=0.02)  # a block half: one all-reduce of (N, C)
    by_zero = {z: sum(r[4] for r in communication(config, 4096, dp=64, zero=z, e=4) if r[1] != "all_reduce") for z in (2, 3)}
    assert by_zero[3] == pytest.approx(1.5 * by_zero[2])  # one more all-gather
    small = training_bytes(config, 1, 4096, dp=8, zero=3, recompute="block")["activations"]
    assert small < training_bytes(config, 1, 4096, dp=8, zero=3)["activations"] / 5


def test_activations_as_counted():
    """The formula against the tensors that autograd keeps (fp32, flash attention: more keys than CPU_SHORT would need bf16)."""
    config = Config(vocab_size=256, seq_len=64, n_layer=3, n_head=4, n_kv_head=2, n_embd=64, head_dim=16, ffn_dim=160)
    model = parallel.Transformer(config)
    model.init_weights(0).train()
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.dtype == torch.float32:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randint(256, (2, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(x, x)
    planned = training_bytes(config, 2, 64, e=4)["activations"]
    assert sum(kept.values()) == pytest.approx(planned, rel=0.15)


def test_plan_command():
    code, out, err = command("parallel.py", "plan", "--preset", "llama-2-70b", "--gpus", 512, "--memory", 80, "--json")
    assert code == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows and all(r["dp"] * r["tp"] == 512 and r["total"] <= 80 for r in rows)
    assert not any(r["zero"] == 0 and r["tp"] == 1 for r in rows)  # 1.1 TB
    code, _, err = command("parallel.py", "plan", "--gpus", 1, "--memory", 10)
    assert code == 2 and "Nothing fits" in err and "Traceback" not in err
