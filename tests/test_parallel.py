"""Hold parallel.py: layouts equal one process, what is sent and kept equals the formulas, nothing is lost."""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, call, command, refusal, wait_for
from model import PRESETS, Config, Transformer, UserError, count_params, read_tensors, resumed

import model
import parallel
import train
from parallel import Layout, assign_owners, check_layout, communication, training_bytes, zero_bytes

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
    return measure(4, "ideas", "counts", "short")


def assert_equal(results):
    for name, r in results.items():
        assert r["loss"] < 2e-5, (name, r)
        assert r["gradient"] < 5e-6, (name, r)
        assert r["weights"] < (1e-4 if "muon" in name else 2e-5), (name, r)  # Muon: see parallel_worker.CASES


def test_layouts_equal_one_process(found):
    results = found["short"]
    assert len(results) == 10
    assert_equal(results)
    share = {name.removesuffix(", adamw"): r["share"] for name, r in results.items()}
    assert share["ddp"] == share["zero-1"] == 1.0  # these keep all parameters on each rank
    assert share["zero-2"] == pytest.approx(0.25, abs=0.01)
    assert share["zero-3 x tp 2"] == pytest.approx(0.25, abs=0.01)
    assert share["tp 4, sequence"] == pytest.approx(0.25, abs=0.02)


@pytest.mark.slow
def test_all_layouts_equal_one_process(measure):
    results = measure(4, "long")["long"]
    assert len(results) == 11 + 11 + 3 + 3 + 3
    assert_equal(results)


@pytest.mark.slow
def test_replicate_x_shard_x_tensor_on_eight(measure):
    results = measure(8, "eight")["eight"]
    assert len(results) == 2
    assert_equal(results)


def test_plain_lines_equal_engine(found):
    results = dict(found["ideas"])
    assert results.pop("zero-3 sends") == {"step/all_gather": 6, "step/reduce_scatter": 3}  # of three layers
    assert set(results) == {"linear", "block", "zero-1", "zero-2", "zero-3"}
    assert all(error < 5e-6 for error in results.values()), results


def test_counts_equal_formulas(found):
    """Hold --count-communication's numbers exactly, and its bytes and memory within 5 %."""
    sent = {}
    for name, r in found["counts"].items():
        sent[name], formula = ({key: entry for key, entry in r[side].items() if "ward/" in key}
                               for side in ("measured", "formula"))  # forward and backward
        assert set(sent[name]) == set(formula), (name, r)
        for key, (count, size) in formula.items():
            assert sent[name][key][0] == count, (name, key, r)
            assert sent[name][key][1] == pytest.approx(size, rel=0.05), (name, key, r)
        for what in ("parameters", "gradients", "optimizer"):
            assert r["measured"][what][1] == pytest.approx(r["formula"][what][1], rel=0.05), (name, what, r)
    L = 2
    assert sent["tp"]["forward/all_reduce"][0] == 2 * L + 1 + 3  # the embedding, three sums of the loss
    assert sent["tp"]["backward/all_reduce"][0] == 2 * L + 1 + 1  # the output matrix, the heads' norms
    assert sent["zero-3"]["forward/all_gather"][0] == sent["zero-3"]["backward/all_gather"][0] == L + 1
    memory = {name: {key: r["measured"][key][1] for key in ("parameters", "gathered")}
              for name, r in found["counts"].items()}
    n = memory["ddp"]["parameters"]
    assert sent["ddp"]["backward/all_reduce"][1] == n
    assert memory["ddp"]["gathered"] == 0
    assert memory["zero-2"]["gathered"] == pytest.approx(n, rel=0.05)
    assert 0 < memory["zero-3"]["gathered"] < n


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
    """Train on dp 4, go on with dp 2 x tp 2 and ZeRO-3, then with train.py alone, as one process unbroken."""
    args = ["--data", data, *TINY, "--schedule", "constant"]
    code, _, err = command("train.py", *args, "--out", tmp_path / "one", "--max-steps", 9, env=ONE)
    assert code == 0, err
    out = tmp_path / "run"
    code, _, err = command("parallel.py", *args, "--out", out, "--max-steps", 3, ranks=4, env=ONE)
    assert code == 0, err
    args = ["--resume", out, "--max-steps", 6, "--tp", 2, "--zero", 3]
    code, _, err = command("parallel.py", *args, ranks=4, env=ONE)
    assert code == 0 and "dp 2 x tp 2, ZeRO-3" in err, err
    code, _, err = command("train.py", "--resume", out, "--max-steps", 9, env=ONE)
    assert code == 0, err
    assert losses(out) == pytest.approx(losses(tmp_path / "one"), abs=2e-3)  # Muon's bf16
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
    assert "whole tensors already" in refusal(parallel.export, joined)
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
    """Kill one of four ranks: torchrun --max-restarts goes on from the last save, to the same weights."""
    args = ["--max-steps", 16, "--save-interval", 4, "--zero", 2]
    whole = tmp_path / "whole"
    code, _, err = command("parallel.py", "--data", data, "--out", whole, *TINY, *args, ranks=4, env=ONE)
    assert code == 0, err
    out = tmp_path / "cut"
    process = start(data, out, 4, *args, restarts=2)
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
    (Layout(dp=8, zero=1, offload=True), "needs CUDA and --zero 2 or 3"),
])
def test_layouts_that_cannot_be(layout, words):
    config = Config(vocab_size=128, n_head=4, n_kv_head=4, n_embd=64, head_dim=16, ffn_dim=96)
    with pytest.raises(UserError, match=words):
        check_layout(layout, 8, config)


def test_experts_are_not_split():
    config = Config(vocab_size=128, n_head=4, n_kv_head=4, n_embd=64, head_dim=16, ffn_dim=96, n_expert=4)
    check_layout(Layout(dp=8, zero=3), 8, config)
    with pytest.raises(UserError, match="mixture of experts cannot be split"):
        check_layout(Layout(dp=4, tp=2), 8, config)


def test_refused_by_one_rank_in_one_sentence(data, tmp_path):
    args = ["--data", data, "--out", tmp_path / "run", *TINY, "--dp", 1, "--tp", 1]
    code, _, err = command("parallel.py", *args, ranks=2, env=ONE)
    assert code != 0 and err.count("error: --dp 1 --tp 1 cannot be") == 1
    assert "the nearest that can is --dp 2 --tp 1" in err and f'File "{ROOT}' not in err
    assert not (tmp_path / "run").exists()


def test_masked_models_are_train_pys(data, tmp_path):
    out = tmp_path / "masked"
    call(train_app, "--data", data, "--out", out, *TINY, "--max-steps", 1, "--objective", "mlm")
    code, _, err = command("parallel.py", "--resume", out, "--max-steps", 2, env=ONE)
    assert code == 2 and "is a masked model: use train.py" in err


def test_a_folder_that_cannot_be_written(data, tmp_path):
    (tmp_path / "file").touch()
    args = ["--data", data, *TINY, "--out", tmp_path / "file" / "run", "--max-steps", 2]
    code, _, err = command("parallel.py", *args, env=ONE)
    assert code == 2 and "could not be written" in err and "Traceback" not in err


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
    rows = communication(config, 4096, Layout(tp=8))
    forward = next(r for r in rows if r[0] == "forward" and r[3] == 2 * 80 + 1)
    assert forward[4] == pytest.approx(2 * 80 * 4096 * 8192 * 2, rel=0.02)  # each half a block's (N, C)
    zero2, zero3 = (communication(config, 4096, Layout(64, zero=zero), e=4) for zero in (2, 3))
    assert sum(r[4] for r in zero3) == pytest.approx(1.5 * sum(r[4] for r in zero2))  # one more all-gather
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
    call(parallel.plan, *args, "--json")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows and all(r["dp"] * r["tp"] == 512 and r["total"] <= 80 for r in rows)
    assert not any(r["zero"] == 0 and r["tp"] == 1 for r in rows)  # 1.1 TB
    assert all(a["data"] <= b["data"] for a, b in zip(rows, rows[1:], strict=False))  # best first
    call(parallel.plan, *args)  # as a table
    assert "Nothing fits" in refusal(parallel.plan, "--gpus", 1, "--memory", 10)


def test_options():
    names = set(inspect.signature(parallel_app).parameters)
    assert len(names) <= 30
    assert {"dp", "tp", "zero", "replicate", "sequence_parallel", "count_communication"} <= names
    o = parallel.Options(set=["timeout=5", "offload=true", "n_kv_head=2"])
    assert (o.timeout, o.offload, o.set) == (5, True, ["n_kv_head=2"])
    assert o.layout(8) == Layout(dp=8, offload=True)
