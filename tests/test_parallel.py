"""Hold parallel.py: layouts equal one process, what is sent and kept equals the formulas, nothing is lost."""

import concurrent.futures
import errno
import inspect
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, call, command, refusal, wait_for
from model import PRESETS, Config, Tokens, Transformer, UserError, count_params, read_tensors, resumed

import model
import parallel
import train
from safetensors import safe_open
from safetensors.torch import save_file
from parallel import Layout, assign_owners, check_layout, check_micro_batches, communication, training_bytes, zero_bytes

train_app = model.command(train.Options, train.train)
parallel_app = model.command(parallel.Options, parallel.train)
ONE = {"OMP_NUM_THREADS": "1"}
TINY = ["--preset", "nano", "--n-layer", 2, "--n-embd", 64, "--seq-len", 32, "--tokens-per-step", 256,
        "--dtype", "fp32", "--device", "cpu", "--warmup-steps", 2, "--lr", 3e-3, "--eval-interval", 100,
        "--set", "n_head=4", "--set", "n_kv_head=4", "--set", "grad_clip=0.9"]


@pytest.fixture(scope="module")
def measure(data, tmp_path_factory):
    """Run jobs of parallel_worker.py on so many processes -> {job: what it found}."""

    def run(ranks, *jobs):
        out = tmp_path_factory.mktemp("worker") / "results.json"
        args = ["tests/parallel_worker.py", data, out, *jobs]
        code, _, err = command(*args, ranks=ranks, env=ONE, timeout=600)
        assert code == 0, err[-3000:]
        return json.loads(out.read_text())

    return run


@pytest.fixture(scope="module")
def found(measure):
    return measure(4, "ideas", "counts", "short", "stopped")


def assert_equal(results):
    for name, r in results.items():
        assert r["loss"] < 2e-5, (name, r)
        assert r["gradient"] < 5e-6, (name, r)
        assert r["weights"] < (1e-4 if "muon" in name else 2e-5), (name, r)  # Muon: see parallel_worker.CASES


def test_layouts_equal_one_process(found):
    results = found["short"]
    assert len(results) == 8
    assert_equal(results)
    share = {name.removesuffix(", adamw"): r["share"] for name, r in results.items()}
    assert share["ddp"] == share["zero-1"] == 1.0  # these keep all parameters on each rank
    assert share["zero-2"] == pytest.approx(0.25, abs=0.01)
    assert share["zero-3 x tp 2"] == pytest.approx(0.25, abs=0.01)
    assert share["tp 4, sequence"] == pytest.approx(0.25, abs=0.02)


@pytest.mark.slow
def test_all_layouts_equal_one_process(measure):
    results = measure(4, "long")["long"]
    assert len(results) == 9
    assert_equal(results)


@pytest.mark.slow
@pytest.mark.parametrize("job, count", [("pipelines", 11), ("contexts", 7), ("experts", 7), ("families", 2)])
def test_pipelines_contexts_and_experts_equal_one_process(job, count, measure):
    results = measure(4, job)[job]
    assert len(results) == count
    for name, r in results.items():
        assert r["loss"] < 2e-5 and r["gradient"] < 5e-6, (name, r)
        # weights that begin at zero (Gemma's norms) are as large as AdamW's few steps, and noise decides some
        assert r["norm"] < 3e-5 and r["weights"] < (1e-3 if "gemma" in name else 1e-4), (name, r)
    share = {name: r["share"] for name, r in results.items()}
    if job == "pipelines":
        assert share["pp 4, 1f1b, deep"] == pytest.approx(0.26, abs=0.01)
        assert share["zero-2 x pp 2, zero-bubble, deep"] == pytest.approx(0.25, abs=0.01)
    if job == "experts":
        assert share["ep 4, experts, accumulate"] == pytest.approx(0.42, abs=0.01)  # a quarter of the experts
        assert share["zero-3 x ep 2, experts, accumulate"] == pytest.approx(0.25, abs=0.01)


@pytest.mark.slow
def test_three_axes_on_eight(measure):
    results = measure(8, "eight")["eight"]
    assert len(results) == 3
    assert_equal(results)


@pytest.mark.slow
def test_idle_slots_and_memory_as_planned(measure):
    """Count waits and stored micro-batches in the real actions, and the bytes that stand on each rank."""
    results = measure(4, "peaks")["peaks"]
    for name, r in results.items():
        assert r["idle"] == pytest.approx(r["bubble"]), name
        for rank in r["ranks"]:
            assert rank["stored"] == rank["formula"], (name, r)
        near = [rank["measured"] / rank["planned"] for rank in r["ranks"]]
        if name == "ep 4":  # a rank has as many rows as tokens have chosen its experts: the plan is the mean
            near = [sum(near) / len(near)]
        low, high = {"zero-bubble": (0.8, 1.05), "tp 4, experts": (0.95, 1.1)}.get(name, (0.95, 1.05))
        assert low < min(near) and max(near) < high, (name, near)
    stored = {name: [rank["stored"] for rank in r["ranks"]] for name, r in results.items()}
    assert stored["1f1b"] == [4, 3, 2, 1] and stored["gpipe"] == [8] * 4 and stored["naive"] == [1] * 4
    assert results["gpipe"]["bubble"] == results["1f1b"]["bubble"] == 3 / 11
    one = results["naive"]["ranks"][0]["peak"]  # one micro-batch's
    assert results["1f1b"]["ranks"][0]["peak"] / one == pytest.approx(4, rel=0.1)
    assert results["gpipe"]["ranks"][0]["peak"] / one == pytest.approx(8, rel=0.12)


def test_plain_lines_equal_engine(found):
    results = dict(found["ideas"])
    assert results.pop("zero-3 sends") == {"step/all_gather": 6, "step/reduce_scatter": 3}  # of three layers
    assert results.pop("gpipe stores") == [6] * 4  # of six micro-batches
    assert results.pop("one_forward_one_backward stores") == [4, 3, 2, 1]
    assert set(results) == {"linear", "block", "zero-1", "zero-2", "zero-3", "gpipe", "one_forward_one_backward"}
    assert all(error < 5e-6 for error in results.values()), results


def test_counts_equal_formulas(found):
    """Hold the bytes that are sent and the memory within 5 % of the formulas, and the counts exactly."""
    for name, r in found["counts"].items():
        sums = {}
        for rank in r["ranks"]:
            for key, (_, size) in rank["sent"].items():
                collective = key.split("/")[1]
                sums[collective] = sums.get(collective, 0) + size / len(r["ranks"])
        assert sums == pytest.approx(r["formulas"]["sent"], rel=0.05), (name, r)
        for rank in r["ranks"]:
            planned = rank["formulas"]["memory"]
            for what in ("parameters", "gradients", "optimizer"):
                # matrices are not cut: an owner has up to one more than its share, in two copies
                more = 2 * r["largest"] if what == "optimizer" and "muon" in name else 0
                # a pipeline's gradients with ZeRO-2 are whole until they are cut in two, and that is all that is left
                part = 3 if what == "gradients" and name == "zero-2 x pp 2" else 1
                low, high = 0.95 * planned[what] / part - more, 1.05 * planned[what] / part + more
                assert low <= rank["memory"][what] <= high, (name, what, rank)
    count = {name: {key: entry[0] for key, entry in r["sent"].items()} for name, r in found["counts"].items()}
    L = 2
    assert count["tp"] == {"forward/all_reduce": 2 * L + 1 + 3,  # the embedding, three sums of the loss
                           "backward/all_reduce": 2 * L + 1 + 2 * L}  # the output matrix, the heads' norms
    again = {"backward/all_reduce": 3 * L + 1 + 2 * L}  # a block that is computed again sends its first half again
    halves = {"forward/all_gather": 2 * L + 1, "forward/reduce_scatter": 2 * L + 1}
    assert halves.items() <= count["tp, sequence"].items()
    assert count["zero-2"] == {"forward/all_gather": L + 1, "backward/reduce_scatter": L + 1}
    assert count["zero-3"] == count["zero-2"] | {"backward/all_gather": L + 1}
    matrices = 7 * L
    update = {"step/all_gather": matrices, "step/broadcast": matrices}
    assert count["zero-3, muon"] == count["zero-3"] | update
    assert count["tp, recompute, muon"] == count["tp"] | again | update
    memory = {name: r["memory"] for name, r in found["counts"].items()}
    n = memory["ddp"]["parameters"]
    assert found["counts"]["ddp"]["sent"] == {"backward/all_reduce": [1, n]}
    assert memory["ddp"]["gathered"] == 0
    assert memory["zero-2"]["gathered"] == pytest.approx(n, rel=0.05)
    assert 0 < memory["zero-3"]["gathered"] < n


def test_muons_update_holds_few_whole_matrices(found):
    """The peak of the update does not grow with the model: a few matrices, where all would be fifty-six."""
    peaks = {name: r["memory"]["update"] / r["largest"] for name, r in found["counts"].items() if "muon" in name}
    assert max(peaks.values()) < 7, peaks
    deep = found["counts"]["zero-3, muon, deep"]
    assert deep["memory"]["parameters"] * 4 > 30 * deep["largest"]
    assert peaks["zero-3, muon, deep"] <= peaks["zero-3, muon"] * 1.1, peaks


def start(data, out, ranks, *args, restarts=0):
    """Start parallel.py under torchrun and wait until it has logged a few steps."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks,
              "--max-restarts", restarts, ROOT / "parallel.py", "--data", data, "--out", out, *TINY, *args]
    process = subprocess.Popen([*map(str, launch)], env={**os.environ, **ONE}, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    wait_for(out / "metrics.jsonl", 120)
    while len((out / "metrics.jsonl").read_text().splitlines()) < 6:
        assert process.poll() is None, process.communicate()[0][-2000:]
        time.sleep(0.01)
    return process


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [r["loss"] for r in lines if "loss" in r]


def weights_of(folder):
    return dict(read_tensors(folder / "model.safetensors"))


@pytest.mark.slow
def test_resharding_and_the_whole_folder(data, tmp_path):
    """Train on dp 4, go on with tp 2 x pp 2, then cp 2 and ZeRO-3, then train.py, as one process unbroken."""
    args = ["--data", data, *TINY, "--schedule", "constant"]
    code, _, err = command("train.py", *args, "--out", tmp_path / "one", "--max-steps", 9, env=ONE)
    assert code == 0, err
    out = tmp_path / "run"
    code, _, err = command("parallel.py", *args, "--out", out, "--max-steps", 3, ranks=4, env=ONE)
    assert code == 0, err
    shown = ["--show-schedule", "--count-communication"]
    for steps, axes, said in ((5, ["--tp", 2, "--pp", 2, "--micro-batch", 2, *shown], "pp 2 (1f1b, 4 micro-batches) x tp 2"),
                              (7, ["--tp", 1, "--pp", 1, "--cp", 2, "--zero", 3], "dp 2 x cp 2 x tp 1, ZeRO-3")):
        code, _, err = command("parallel.py", "--resume", out, "--max-steps", steps, *axes, ranks=4, env=ONE)
        assert code == 0 and said in err, err
        if "--pp" in axes and shown[0] in axes:
            assert err.count("rank 1   .  F0  B0  B0  F1  B1  B1") == 1  # drawn once, of the real order
            assert "Idle: 20.0% of the slots, 20.0% by formula" in err and "on each rank: 2, 1" in err
            sent = [line.split() for line in err.splitlines() if line.startswith("  send ")]
            assert len(sent) == 1 and sent[0][1] == sent[0][3] != "0.000"  # as counted, as by formula
    code, _, err = command("train.py", "--resume", out, "--max-steps", 9, env=ONE)
    assert code == 0, err
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), abs=2e-3)  # Muon's bf16
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    read = [line["val_tokens"] for line in lines if "val_tokens" in line]
    assert set(read[-4:]) == {Tokens(data, "val").n - 1}  # of ranks that split a model each token once
    transformers = pytest.importorskip("transformers")
    net = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert net(torch.zeros(1, 4, dtype=torch.long)).logits.shape[1] == 4


@pytest.mark.slow
def test_stop_go_on_and_export(data, tmp_path):
    """SIGTERM leaves shards; another layout goes on with them; joined, train.py goes on with them."""
    out = tmp_path / "run"
    process = start(data, out, 2, "--max-steps", 500, "--zero", 3, "--set", "eval_tokens=1000")
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert "goes on from there" in output
    state = json.loads((out / "state" / "state.json").read_text())
    at = state["at"]
    assert at >= 6 and not state["finished"]
    names = {"config.json", "generation_config.json", "metrics.jsonl", "state", "tokenizer.json",
             "tokenizer_config.json"}
    assert {path.name for path in out.iterdir()} == names
    assert sorted(path.name for path in (out / "state").iterdir()) == ["shards", "state.json"]
    assert len(list((out / "state" / "shards").iterdir())) == 2

    joined = tmp_path / "joined"
    shutil.copytree(out, joined)
    assert "export" in refusal(train_app, "--resume", joined)
    call(parallel.export, joined)
    assert weights_of(joined)["model.layers.0.mlp.up_proj.weight"].shape[1] == 64
    assert not (joined / "state" / "shards").exists()
    assert "no shards to join" in refusal(parallel.export, joined)
    o = resumed(train.Options, joined, max_steps=at + 1)
    assert (o.eval_tokens, o.grad_clip) == (1000, 0.9)  # settings stay with the run
    train.train(o)
    assert len(losses(joined)) == at + 1

    args = ["--max-steps", at + 1, "--tp", 2, "--zero", 0]
    code, _, err = command("parallel.py", "--resume", out, *args, ranks=2, env=ONE)
    assert code == 0, err
    assert losses(out) == pytest.approx(losses(joined), abs=1e-4)  # the last step on another layout
    assert not (out / "state" / "shards").exists() and (out / "model.safetensors").exists()
    shutil.rmtree(joined / "state")
    assert "without the state of its run" in refusal(parallel_app, "--resume", joined)


@pytest.mark.slow
def test_killed_rank_restarts(data, tmp_path):
    """Kill one of 2 x 2 ranks: torchrun --max-restarts goes on from the last save, to the same weights.

    OCTAVO_KILLS=20, or any number: of 2 x 2 x 2, which takes a minute and a half.
    """
    ranks = 8 if "OCTAVO_KILLS" in os.environ else 4
    args = ["--max-steps", 12, "--save-interval", 4, "--zero", 2, "--pp", 2, "--tp", ranks // 4, "--micro-batch", 1]
    whole = tmp_path / "whole"
    code, _, err = command("parallel.py", "--data", data, "--out", whole, *TINY, *args, ranks=ranks, env=ONE)
    assert code == 0, err
    out = tmp_path / "cut"
    process = start(data, out, ranks, *args, restarts=2)
    children = ["ps", "-o", "pid=", "--ppid", str(process.pid)]
    children = subprocess.run(children, capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-2000:]
    a, b = weights_of(whole), weights_of(out)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert losses(out) == losses(whole)


@pytest.mark.slow
def test_bf16_weights_are_saved_in_fp32(data, tmp_path):
    """ZeRO-2 holds whole weights in bf16 after an evaluation; what is saved are the float32 shards."""
    args = [*TINY, "--max-steps", 2, "--zero", 2, "--dtype", "bf16"]
    args += ["--data", data, "--out", tmp_path / "run"]
    code, _, err = command("parallel.py", *args, ranks=2, env=ONE)
    assert code == 0, err
    w = weights_of(tmp_path / "run")["model.layers.0.mlp.up_proj.weight"]
    assert w.dtype == torch.float32 and not torch.equal(w, w.bfloat16().float())


@pytest.mark.parametrize("layout, words", [
    (Layout(dp=3, tp=2), "--dp 4 --tp 2"),
    (Layout(dp=2, tp=2), "there are 8 processes; the nearest that can is --dp 4 --tp 2"),
    (Layout(dp=1, tp=8), "heads do not divide by 8; the nearest that can is --dp 2 --tp 4"),
    (Layout(dp=8, zero=4), "--zero is 0, 1, 2 or 3"),
    (Layout(dp=8, zero=3, replicate=3), "--replicate 3 has to divide"),
    (Layout(dp=8, replicate=2), "needs --zero 2 or 3"),
    (Layout(dp=8, sequence=True), "needs --tp above 1"),
])
def test_layouts_that_cannot_be(layout, words):
    config = Config(vocab_size=128, n_head=4, n_kv_head=4, n_embd=64, head_dim=16, ffn_dim=96)
    with pytest.raises(UserError, match=words):
        check_layout(layout, 8, config)


@pytest.mark.parametrize("layout, words", [
    (Layout(dp=4, ep=2), "is 4, and there are 8 processes; the nearest that can is --dp 8 --ep 2 --tp 1"),
    (Layout(dp=8, ep=8), "4 experts on 8 of 8 data-parallel ranks do not divide; .* --dp 8 --ep 4 --tp 1"),
    (Layout(dp=2, pp=4, schedule="interleaved"), "6 layers do not make 8 stages .*; .* --dp 4 --pp 2 --tp 1"),
    (Layout(dp=1, cp=8), "a context of 24 does not divide into 16 pieces; .* is --dp 2 --cp 4 --tp 1"),
    (Layout(dp=4, pp=2, zero=3), "use --zero 2"),
    (Layout(dp=4, cp=2), "balance loss and capacity are of whole sequences"),
    (Layout(dp=8, ep=2, zero=3, replicate=2), "do not go together"),
    (Layout(dp=4, cp=2, zero=3), "balance loss and capacity"),
])
def test_axes_that_cannot_be(layout, words):
    sizes = {"n_layer": 6, "n_head": 4, "n_kv_head": 4, "n_embd": 64, "head_dim": 16, "ffn_dim": 96, "expert_dim": 32}
    config = Config(vocab_size=128, seq_len=24, n_expert=4, **sizes)
    with pytest.raises(UserError, match=words):
        check_layout(layout, 8, config)


def test_a_schedule_that_an_older_engine_cannot(monkeypatch):
    layout, config = Layout(dp=1, pp=2, schedule="zero-bubble"), Config(vocab_size=128, n_kv_head=6)
    version = torch.torch_version.TorchVersion
    monkeypatch.setattr(torch, "__version__", version("2.13.0+cpu"))
    check_layout(layout, 2, config)
    monkeypatch.setattr(torch, "__version__", version("2.11.0+cu130"))
    with pytest.raises(UserError, match="needs torch 2.13, this is 2.11"):
        check_layout(layout, 2, config)


@pytest.mark.parametrize("layout, windows, micro_batch, words", [
    (Layout(pp=4), 16, 16, "makes 1 micro-batches .* the nearest that it takes is --micro-batch 4"),
    (Layout(pp=4), 16, 3, "makes 5.33333 micro-batches"),
    (Layout(pp=4, schedule="interleaved"), 24, 4, "the nearest that it takes is --micro-batch (3|6)"),
    (Layout(dp=2, pp=4), 6, 1, "make --tokens-per-step a multiple of 8 sequences"),
])
def test_micro_batches_that_a_schedule_does_not_take(layout, windows, micro_batch, words):
    with pytest.raises(UserError, match=words):
        check_micro_batches(layout, windows, micro_batch)
    assert check_micro_batches(Layout(pp=4, schedule="gpipe"), 6, 2) == 3  # it stores all anyway
    assert check_micro_batches(Layout(pp=4), 12, 2) == 6  # 1F1B takes any number from p on


def test_refused_by_one_rank_in_one_sentence(data, tmp_path):
    args = ["--data", data, "--out", tmp_path / "run", *TINY, "--dp", 1, "--tp", 1]
    code, _, err = command("parallel.py", *args, ranks=2, env=ONE)
    assert code != 0 and err.count("error: --dp 1 --tp 1 cannot be") == 1
    assert "the nearest that can is --dp 2 --tp 1" in err and f'File "{ROOT}' not in err
    assert not (tmp_path / "run").exists()


def test_masked_models_are_train_pys(data, tmp_path, group):
    out = tmp_path / "masked"
    call(train_app, "--data", data, "--out", out, *TINY, "--max-steps", 1, "--objective", "mlm")
    assert "is a masked model: use train.py" in refusal(parallel_app, "--resume", out, "--max-steps", 2)


def test_a_folder_that_cannot_be_written(data, tmp_path, group):
    (tmp_path / "file").touch()
    args = ["--data", data, *TINY, "--out", tmp_path / "file" / "run", "--max-steps", 2]
    assert "could not be read or written (" in refusal(parallel_app, *args)


def test_owners_share_the_work():
    sizes = {f"m{i}": 10 + i % 3 for i in range(17)}
    rounds = assign_owners(sizes, [4, 5, 6, 7])
    owners = {name: owner for owned in rounds for name, owner in owned.items()}
    assert owners.keys() == sizes.keys()
    assert all(len(set(owned.values())) == len(owned) for owned in rounds)  # one matrix a rank at a time
    load = {rank: sum(sizes[n] for n, owner in owners.items() if owner == rank) for rank in (4, 5, 6, 7)}
    assert max(load.values()) - min(load.values()) <= max(sizes.values())
    assert assign_owners({}, [0, 1]) == []


def test_chapters_table():
    """4 + 4 + 8 bytes a parameter: 175B are 700, 700 and 1400 GB; on 64 ranks ZeRO-3 is 43.75 in all."""
    assert zero_bytes(175e9, 1, 0) == (700e9, 700e9, 1400e9)
    assert zero_bytes(175e9, 64, 1)[2] / 1e9 == pytest.approx(21.875)
    assert sum(zero_bytes(175e9, 64, 3)) / 1e9 == pytest.approx(43.75)
    # the chapter's ZeRO-2 example: 10.9 GB of gradients are what remains on a rank, not what is saved
    assert zero_bytes(175e9, 64, 2)[1] / 1e9 == pytest.approx(10.94, abs=0.01)


def test_formulas_follow_the_papers():
    config = PRESETS["llama-2-70b"]
    assert count_params(config)[0] == 68_976_648_192  # as published
    sent = sum(size for _, axis, size in communication(config, 4096, Layout(tp=8)) if axis == "tensor")
    assert sent == pytest.approx(4 * 80 * 4096 * 8192 * 2, rel=0.02)  # of each half a block (N, C), twice
    zero2, zero3 = (communication(config, 4096, Layout(64, zero=zero), e=4) for zero in (2, 3))
    assert sum(r[2] for r in zero3) == pytest.approx(1.5 * sum(r[2] for r in zero2))  # one more all-gather
    muon = communication(config, 4096, Layout(64, zero=3, optimizer="muon"), e=4)
    more = sum(r[2] for r in muon) - sum(r[2] for r in zero3)
    assert more == pytest.approx(2 * 4 * 68.45e9, rel=0.01)  # its matrices, to their owners and back
    memory = {name: training_bytes(config, 1, 4096, Layout(64, zero=3, optimizer=name)) for name in
              ("adamw", "muon")}
    assert memory["muon"]["optimizer"] == pytest.approx(memory["adamw"]["optimizer"], rel=0.01)
    one = training_bytes(config, 1, 4096, Layout(optimizer="muon"))
    assert one["optimizer"] == pytest.approx(4 * 69e9, rel=0.02)  # one moment, where nothing is dealt out
    sharded = Layout(8, zero=3)
    small = training_bytes(config, 1, 4096, sharded, recompute=True)["activations"]
    assert small < training_bytes(config, 1, 4096, sharded)["activations"] / 5


def test_activations_as_counted():
    """Compare with the tensors that autograd keeps (fp32: in bf16 a CPU writes short attention out)."""
    sizes = {"n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 64, "head_dim": 16, "ffn_dim": 160}
    config = Config(vocab_size=256, seq_len=64, **sizes)
    net = Transformer(config).init_weights(0).train()
    own = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.dtype == torch.float32:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randint(256, (2, 64))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        net(x, x)
    planned = training_bytes(config, 2, 64, Layout(), e=4)["activations"]
    assert sum(kept.values()) == pytest.approx(planned, rel=0.15)


def test_plan_command(capsys):
    args = ["--preset", "llama-2-70b", "--gpus", 512, "--memory", 80]
    plans = {}
    for optimizer in ("muon", "adamw"):
        call(parallel.plan, *args, "--optimizer", optimizer, "--json")
        rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert rows and all(r["memory"] <= 80e9 for r in rows)
        assert all(r["dp"] * r["pp"] * r["cp"] * r["tp"] == 512 for r in rows)
        assert {1, 2, 4, 8} == {r["tp"] for r in rows} and max(r["pp"] for r in rows) >= 16
        assert not any(r["zero"] == 0 and r["tp"] == r["pp"] == 1 for r in rows)  # 1.1 TB
        assert all(a["seconds"] <= b["seconds"] for a, b in zip(rows, rows[1:], strict=False))  # best first
        parts = ("compute", "bubble", "tensor", "context", "pipeline", "expert", "data")
        assert all(r["seconds"] == pytest.approx(sum(r[part] for part in parts)) for r in rows)
        again = [r for r in rows if r["recompute"]]
        assert again and again[0]["compute"] == pytest.approx(4 / 3 * rows[0]["compute"])
        plans[optimizer] = rows
    ethernet = ["--network", 12.5, "--json"]
    call(parallel.plan, *args, *ethernet)
    slow = json.loads(capsys.readouterr().out.splitlines()[0])
    assert slow["seconds"] > plans["muon"][0]["seconds"]
    call(parallel.plan, *args, "--tokens", 2e12)  # as a table, with days and dollars
    assert "2,000B tokens are 476,837 steps in" in capsys.readouterr().err
    assert "Nothing fits" in refusal(parallel.plan, "--gpus", 1, "--memory", 10)
    assert "use --zero 2" in refusal(parallel.plan, "--gpus", 64, "--pp", 4, "--tp", 4, "--zero", 3)
    assert "80 layers do not make 256 stages" in refusal(parallel.plan, "--pp", 128)


def test_a_plans_machine_and_price(capsys):
    args = ["--preset", "llama-3-8b", "--gpus", 8, "--tp", 8, "--zero", 1, "--tokens-per-step", 2**17]

    def first(*more):
        call(parallel.plan, *args, *more, "--json")
        return json.loads(capsys.readouterr().out.splitlines()[0])

    base = first()
    assert first("--peak", 494.5)["compute"] == pytest.approx(2 * base["compute"])
    assert first("--utilisation", 0.9)["compute"] == pytest.approx(base["compute"] / 2)
    assert first("--nvlink", 225)["tensor"] == pytest.approx(2 * base["tensor"])
    dollars = []
    for price in (2, 4):
        call(parallel.plan, *args, "--price", price, "--tokens", 1e12)
        dollars.append(float(capsys.readouterr().err.split(" dollars")[0].split()[-1].replace(",", "")))
    assert dollars[1] == pytest.approx(2 * dollars[0], rel=1e-4)


def test_the_textbooks_layout(capsys):
    """175B on 512 ranks as 8 x 8 x 8: 2.7B parameters a rank, 350 GB of weights in bf16 on 64 of them."""
    args = ["--preset", "gpt-3-175b", "--dp", 8, "--pp", 8, "--tp", 8, "--zero", 1, "--pp-schedule", "1f1b", "--json"]
    call(parallel.plan, *args, "--optimizer", "adamw", "--tokens-per-step", 1024 * 2048)
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all((r["dp"], r["pp"], r["tp"]) == (8, 8, 8) for r in rows)
    assert rows[0]["parameters"] == pytest.approx(4 * 175e9 / 64, rel=0.1)
    assert rows[0]["bubble"] / (rows[0]["bubble"] + rows[0]["compute"]) == pytest.approx(7 / (128 + 7))


PLAN = ["gpus", "memory", "per-node", "micro-batch", "seq-len", "tp", "pp", "tokens-per-step", "peak", "network"]
OUT_OF_RANGE = [(name, value) for name in PLAN for value in ("0", "-1", "999999999999")]
OUT_OF_RANGE += [("memory", "nan"), ("memory", "inf"), ("optimizer", "sgd"), ("preset", "huge")]


@pytest.mark.parametrize("name, value", OUT_OF_RANGE)
def test_numbers_of_a_plan_that_make_no_sense(name, value):
    with pytest.raises(UserError, match=name.replace("-", "[-_]")):
        call(parallel.plan, f"--{name}={value}")


@pytest.mark.parametrize("name, value", [
    ("timeout", "nan"), ("timeout", "inf"), ("timeout", "0"), ("timeout", "-1"), ("timeout", "1e30"),
    ("dp", "0"), ("dp", "-1"), ("dp", "1000000000"), ("tp", "0"), ("tp", "64"), ("zero", "-1"), ("zero", "4"),
    ("replicate", "0"), ("replicate", "3"), ("replicate", "1000000000"),
])
def test_numbers_of_a_layout_that_make_no_sense(name, value, data, tmp_path, group):
    args = ["--data", data, "--out", tmp_path / "run", *TINY, "--max-steps", 1]
    assert f"--{name}" in refusal(parallel_app, *args, f"--{name}={value}")
    assert not (tmp_path / "run").exists()


def test_options():
    names = set(inspect.signature(parallel_app).parameters)
    assert len(names) <= 36
    assert {"dp", "tp", "zero", "replicate", "sequence_parallel", "timeout", "pp", "pp_schedule", "cp", "ep"} <= names
    o = parallel.Options(set=["eval_tokens=5", "n_kv_head=2"])
    assert (o.eval_tokens, o.set) == (5, ["n_kv_head=2"])
    assert o.layout(8) == Layout(dp=8, optimizer="muon")


# ---- Shards: what is damaged is refused before anything is touched, and a save that fails loses nothing ----


@pytest.fixture
def group():
    """Leave no process group behind, where a command runs in this process."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_the_timeout_is_that_of_every_group(group):
    parallel.join_processes("cpu", 60)
    grid = parallel.Grid(Layout(), Config(vocab_size=128), "cpu", 7.0)
    for name in ("replicate", "shard", "pipeline", "tensor"):
        backend = grid.weights.get_group(name)._get_backend(torch.device("cpu"))
        assert backend.options._timeout.total_seconds() == 7.0


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def shards_of(folder):
    return sorted((folder / "state" / "shards").glob("*.safetensors"))


@pytest.fixture
def stopped(found, tmp_path):
    """A folder with the four shards of a run that was stopped after three steps."""
    assert len(shards_of(Path(found["stopped"]))) == 4
    return Path(shutil.copytree(found["stopped"], tmp_path / "stopped"))


def rewrite(path, change) -> None:
    """Change the tensors of a shard, {name: tensor}."""
    with safe_open(path, "pt") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(tensors)
    save_file(tensors, path, about)


def poison(tensors):
    next(t for t in tensors.values() if t.numel())[..., :1] = math.nan


def halve(tensors):
    tensors.update({n: t.half() for n, t in tensors.items() if n.endswith("momentum_buffer")})


def edit(path, **changes) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


DAMAGE = {
    "the first is missing": lambda f: shards_of(f)[0].unlink(),
    "the last is missing": lambda f: shards_of(f)[-1].unlink(),
    "all are missing": lambda f: [path.unlink() for path in shards_of(f)],
    "one is cut": lambda f: os.truncate(shards_of(f)[1], shards_of(f)[1].stat().st_size - 100),
    "one is empty": lambda f: shards_of(f)[1].write_bytes(b""),
    "one is garbage": lambda f: shards_of(f)[1].write_bytes(bytes(range(256)) * 40),
    "one is another's copy": lambda f: shutil.copy(shards_of(f)[0], shards_of(f)[1]),
    "one is a folder": lambda f: shards_of(f)[1].with_name("shard-00005.safetensors").mkdir(),
    "a number is none": lambda f: rewrite(shards_of(f)[2], poison),
    "a tensor is missing": lambda f: rewrite(shards_of(f)[2], lambda t: t.popitem()),
    "moments of another type": lambda f: [rewrite(path, halve) for path in shards_of(f)],
    "a larger model": lambda f: edit(f / "config.json", num_hidden_layers=3),
    "a wider model": lambda f: edit(f / "config.json", intermediate_size=512),
    "no model": lambda f: (f / "config.json").write_text("{}"),
    "another optimizer": lambda f: edit(f / "state" / "state.json", options={"optimizer": "adamw"}),
    "no optimizer": lambda f: edit(f / "state" / "state.json", options={}),
    "options of another type": lambda f: edit(f / "state" / "state.json", options=[1]),
    "no step": lambda f: edit(f / "state" / "state.json", at=None),
    "a step of another type": lambda f: edit(f / "state" / "state.json", at="3"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_shards_are_refused_untouched(name, stopped):
    DAMAGE[name](stopped)
    before = files_of(stopped)
    refusal(parallel.export, stopped)
    assert files_of(stopped) == before


@pytest.mark.parametrize("name", [name for name in DAMAGE if "optimizer" not in name])
def test_no_run_goes_on_with_damaged_shards(name, stopped, group):
    DAMAGE[name](stopped)
    before = files_of(stopped)
    refusal(parallel_app, "--resume", stopped, "--dp", 1, "--tp", 1, "--zero", 0)
    assert files_of(stopped) == before


def test_a_pipe_among_the_shards_is_not_waited_for(stopped):
    os.mkfifo(stopped / "state" / "shards" / "shard-00005-model-00001-of-00001.safetensors")
    assert "is no file" in refusal(parallel.export, stopped)


def test_another_layout_goes_on_with_the_shards(stopped, group, tmp_path):
    """One process goes on with what four have left, and with it joined: to the same weights."""
    joined = tmp_path / "joined"
    shutil.copytree(stopped, joined)
    call(parallel.export, joined)
    for folder in (stopped, joined):
        call(parallel_app, "--resume", folder, "--dp", 1, "--tp", 1, "--zero", 0, "--max-steps", 4)
    a, b = weights_of(stopped), weights_of(joined)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_begin_with_the_weights_of_a_folder(stopped, group, data, tmp_path):
    call(parallel.export, stopped)
    args = ["--data", data, "--out", tmp_path / "new", "--init", stopped, "--device", "cpu", "--dtype", "fp32"]
    call(parallel_app, *args, "--tokens-per-step", 64, "--max-steps", 1, "--lr", 1e-12)
    a, b = weights_of(stopped), weights_of(tmp_path / "new")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name])


LOGS = {"half a line": b'{"step": 9, "lo', "nothing": b"\0" * 9, "no text": b"\xff\xfe\n", "blank": b"\n\n"}


@pytest.mark.parametrize("name", LOGS)
def test_a_damaged_log_ends_no_run(name, stopped, group):
    log = stopped / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + LOGS[name])
    call(parallel_app, "--resume", stopped, "--dp", 1, "--tp", 1, "--zero", 0, "--max-steps", 4)
    assert len(losses(stopped)) == 4


@pytest.mark.parametrize("damage", ["missing", "shape", "type"])
def test_whole_state_that_does_not_fit(damage, stopped, group):
    call(parallel.export, stopped)
    path = stopped / "state" / "optimizer.safetensors"
    name = "embed_tokens.weight/exp_avg"
    changes = {"missing": lambda t: t.pop(name), "shape": lambda t: t.update({name: t[name][:1].clone()}),
               "type": lambda t: t.update({name: t[name].int()})}
    rewrite(path, changes[damage])
    assert name in refusal(parallel_app, "--resume", stopped, "--dp", 1, "--tp", 1, "--zero", 0)


@pytest.fixture
def saver(data, tmp_path, group):
    """A Saver of one process, and a function that fills its weights with a number and saves them so, or begins to."""
    sizes = {"n_layer": 1, "n_head": 1, "n_kv_head": 1, "n_embd": 8, "head_dim": 8, "ffn_dim": 8}
    o = parallel.Options(device="cpu", dtype="fp32", optimizer="adamw", compile="off")
    ranks = parallel.join_processes("cpu", 60)
    _, net, _, optimizer = parallel.open_model(o, Config(vocab_size=128, **sizes), Layout(), ranks, 1)
    made = parallel.Saver(tmp_path / "out", net, optimizer, data / "tokenizer.json")
    state = {"command": "pretrain", "finished": False, "options": {"optimizer": "adamw"}, "scale": 1.0, "good": 0,
             "skipped": 0}

    def save(step, finish=True):
        for p in parallel.named_weights(net).values():
            p.fill_(step)
        made.begin(state | {"at": step})
        for p in parallel.named_weights(net).values():
            p.fill_(-1)  # the run goes on while the save is written
        if finish:
            made.finish()

    return made, save


def step_of(folder) -> int | None:
    """Read which step a folder with shards is of; all its files have to agree."""
    try:
        at = model.saved_state(folder)["at"]
    except UserError:
        assert not (folder / "config.json").exists()
        return None
    weights = {"model.norm.weight": torch.zeros(8), "model.embed_tokens.weight": torch.zeros(128, 8)}
    parallel.load_shards(folder, weights, alone=True)
    assert all(bool((w == at).all()) for w in weights.values())
    return at


class Disk:
    """Stand before the calls that change a disk: count them, and do something at the n-th."""

    CALLS = [(os, "replace"), (os, "rename"), (os, "unlink"), (os, "mkdir"), (os, "rmdir"), (os, "fsync"),
             (Path, "open")]

    def __init__(self, patch, at):
        self.at, self.n = at, -1
        for owner, name in self.CALLS:
            patch.setattr(owner, name, self.wrap(getattr(owner, name)))

    def wrap(self, real):
        def call(*args, **kw):
            self.n += 1
            self.do(real)
            return real(*args, **kw)

        return call

    def do(self, real):
        if self.n == self.at:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_what_is_no_number_is_not_saved(saver):
    made, save = saver
    save(1)
    with pytest.raises(UserError, match="are no numbers"):
        save(math.nan)
    assert step_of(made.folder) == 1


@pytest.mark.parametrize("error", [UserError("refused"), OSError("disk"), KeyboardInterrupt(), torch.OutOfMemoryError()])
def test_a_save_is_finished_however_the_run_ends(error, saver):
    made, save = saver
    save(1)
    with pytest.raises(type(error)), parallel.finish_or_explain(made, model.Ranks()):
        save(2, finish=False)
        raise error
    assert step_of(made.folder) == 2


@pytest.mark.parametrize("written", [True, False])
def test_when_the_others_are_gone_only_what_they_wrote_is_put_in_place(written, saver):
    made, save = saver
    save(1)
    with pytest.raises(UserError, match="lost the others"), parallel.finish_or_explain(made, model.Ranks()):
        save(2, finish=False)
        made.pending.result()
        if not written:
            made.pending = concurrent.futures.Future()  # it would wait for ever
        raise RuntimeError("Connection closed by peer")
    assert step_of(made.folder) == (2 if written else 1)


SLOW_JOIN = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import parallel
join = parallel.join_shards
parallel.join_shards = lambda folder: time.sleep(16) or join(folder)
parallel.train(parallel.Options(data=[sys.argv[2]], out=sys.argv[3], preset="nano", n_layer=1, n_embd=32, seq_len=32,
    tokens_per_step=64, max_steps=1, device="cpu", timeout=10.0))
sys.stderr.flush()
os._exit(0)  # on Python's own way out gloo's threads now and then abort the process
"""


@pytest.mark.slow
def test_joining_the_shards_may_take_longer_than_the_timeout(data, tmp_path):
    (tmp_path / "join.py").write_text(SLOW_JOIN)
    code, _, err = command(tmp_path / "join.py", ROOT, data, tmp_path / "run", ranks=2, env=ONE)
    assert code == 0 and (tmp_path / "run" / "model.safetensors").exists(), err


@pytest.mark.slow
@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_at_any_moment_of_a_sharded_save(exists, saver, monkeypatch):
    made, save = saver
    results = []
    for at in itertools.count():
        shutil.rmtree(made.folder, ignore_errors=True)
        if exists:
            save(1)
        with monkeypatch.context() as patch:
            disk = Disk(patch, at)
            failed = False
            try:
                save(2)
            except UserError as error:
                failed = True
                assert "No space left" in str(error)
        results.append(step_of(made.folder))
        assert results[-1] in ({1, 2} if exists else {None, 2}) and (failed or results[-1] == 2)
        save(3)  # room was made
        assert step_of(made.folder) == 3
        assert not list(made.folder.rglob("*.new"))
        if disk.n < at:
            break
    assert len(results) > 12 and results.count(2) < len(results) / 2 + 2


@pytest.mark.parametrize("exists", [True, False])
def test_a_kill_at_any_moment_of_a_sharded_save(exists, saver, monkeypatch, tmp_path):
    """Keep the folder as it is before each change: what a kill there would leave is the old save or the new."""
    made, save = saver
    if exists:
        save(1)
    kept = []

    class Copy(Disk):
        def do(self, real):
            if threading.current_thread() is not self.busy and made.folder.exists():
                self.busy = threading.current_thread()
                kept.append(tmp_path / f"kept{len(kept)}" / "out")
                shutil.copytree(made.folder, kept[-1])
                self.busy = None

        busy = None

    with monkeypatch.context() as patch:
        Copy(patch, 0)
        save(2)
    found = [step_of(folder) for folder in kept]
    first = 1 if exists else None
    assert found == [first] * found.count(first) + [2] * found.count(2)
    assert found.count(first) > 8 and found.count(2) > 3
    for folder in kept[:: len(kept) // 6]:  # and a run goes on in such a folder
        made.folder, made.new, made.shards = folder, folder / "state" / "shards.new", folder / "state" / "shards"
        save(3)
        assert step_of(folder) == 3 and not list(folder.rglob("*.new"))
