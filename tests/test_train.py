"""train.py: the ideas by hand-worked numbers, the command by what it leaves behind."""

import dataclasses
import errno
import itertools
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import model
import numpy as np
import pytest
import torch
import train
import typer
from conftest import call, command, records, refusal, wait_for
from model import IGNORE, Batches, Tokens, UserError, load_model, load_state, resumed, saved_state
from typer.testing import CliRunner

TINY = {"preset": "nano", "n_layer": 2, "n_embd": 32, "seq_len": 32, "set": ["n_head=2"], "max_steps": 6,
        "tokens_per_step": 256, "warmup_steps": 2, "eval_interval": 3, "eval_tokens": 512, "save_interval": 2,
        "device": "cpu"}
COMMAND = model.command(train.Options, train.train)


def options(source, out, **changes):
    return train.Options(**TINY | {"data": [str(source)], "out": str(out)} | changes)


def flags(source, out, **changes):
    """Spell options as a user types them."""
    words = []
    for name, value in (TINY | {"data": source, "out": out} | changes).items():
        flag = f"--{name.replace('_', '-')}"
        for one in value if isinstance(value, list) else [value]:
            words += [flag] if one is True else [flag, one]
    return words


def rewrite(source, folder, change):
    """Copy a data folder with other ids: change(split, ids) -> ids."""
    shutil.copytree(source, folder)
    meta = json.loads((folder / "meta.json").read_text())
    for split in ("train", "val"):
        ids = change(split, np.fromfile(folder / f"{split}.bin", "<u2")).astype("<u2")
        ids.tofile(folder / f"{split}.bin")
        meta["splits"][split] |= {"tokens": len(ids), "bytes": len(ids)}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture(scope="module")
def data(data, tmp_path_factory):
    """Characters, each line a document of its own; a validation text that is soon read."""
    newline, end = model.load_tokenizer(data).encode("\n")[0], Tokens(data, "train").eot_id

    def change(split, ids):
        return np.where(ids == newline, end, ids)[: 2000 if split == "val" else None]

    return rewrite(data, tmp_path_factory.mktemp("train") / "chars", change)


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """Leave out pictures and samples, and the measure of the machine: the command's own test has them."""
    monkeypatch.setattr(train, "report", lambda *args: None)
    monkeypatch.setattr(model, "peak_flops", lambda *args: 1e12)


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


class Kill(BaseException):
    """Stands for a kill: nothing catches it."""


def kill_at(monkeypatch, n: int) -> None:
    """Let the run die in its n-th update."""
    real, calls = model.Run.update, itertools.count(1)

    def update(self, *args, **metrics):
        if next(calls) == n:
            raise Kill
        return real(self, *args, **metrics)

    monkeypatch.setattr(model.Run, "update", update)


# ---- the ideas ---------------------------------------------------------------------------------------------


def test_schedule():
    warm = [model.lr_at(step, 100, 10) for step in range(10)]
    assert warm == pytest.approx([i / 10 for i in range(1, 11)])
    for schedule in ("cosine", "wsd"):  # the chapter's ends at zero, its text says a tenth
        values = [model.lr_at(step, 100, 10, schedule) for step in range(100)]
        assert values[-1] == pytest.approx(0.1) and max(values) == 1.0
        assert all(a >= b for a, b in zip(values[10:], values[11:], strict=False))
    assert model.lr_at(54, 100, 10, "cosine") == pytest.approx(0.55)
    wsd = [model.lr_at(s, 100, 10, "wsd", 0.0) for s in range(100)]
    assert set(wsd[10:63]) == {1.0} and wsd[-1] == 0.0
    assert model.lr_at(99, 100, 10, "constant") == 1.0


def test_batch_ramp():
    sizes = [model.windows_at(s, 64, 10, world=4) for s in range(12)]
    assert sizes[0] == 8 and sizes[10:] == [64, 64] and sizes == sorted(sizes)
    assert all(s % 4 == 0 for s in sizes)


def test_masking_is_berts():
    x = torch.randint(0, 50, (64, 512), generator=torch.Generator().manual_seed(0))
    inputs, targets = train.mask_tokens(x, 60, 50, [(0, i) for i in range(64)])
    chosen = targets != IGNORE
    assert torch.equal(targets[chosen], x[chosen])
    assert torch.equal(inputs[~chosen], x[~chosen])
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert (inputs[chosen] == 60).float().mean().item() == pytest.approx(0.8, abs=0.02)
    # a random token is the token itself once in 50 times
    assert (inputs[chosen] == x[chosen]).float().mean().item() == pytest.approx(0.1 + 0.1 / 50, abs=0.02)
    again = train.mask_tokens(x[5:6], 60, 50, [(0, 5)])
    assert torch.equal(again[0], inputs[5:6]) and torch.equal(again[1], targets[5:6])  # not of the batch


class Numbers:
    """A source that names its windows: window number p of source s reads as [s, p]."""

    def __init__(self, source):
        self.source = source

    def batch(self, position, count, T, seed):
        rows = torch.tensor([[self.source, p] for p in range(position, position + count)])
        return rows, rows


def test_a_mixture_keeps_its_weights_and_each_source_its_order():
    o = SimpleNamespace(seed=0, tokens_per_step=20, micro_batch=3, batch_ramp=0, doc_mask=False)
    cpu = torch.device("cpu")
    sources = [Numbers(0), Numbers(1)]
    whole = Batches(sources, [3.0, 1.0], o, 2, cpu)
    seen, steps = [], []
    for step in range(200):
        batches, targets, windows = whole.at(step)
        assert windows == 10 and targets == 20
        assert [len(x) for x, _, _ in batches] == [3, 3, 3, 1]
        rows = torch.cat([x for x, _, _ in batches]).tolist()
        seen += rows
        steps.append(rows)
    assert whole.taken[0] / 2000 == pytest.approx(0.75, abs=0.04) and sum(whole.taken) == 2000
    for source in (0, 1):
        assert [p for s, p in seen if s == source] == list(range(whole.taken[source]))
    # any number of ranks shares a step's windows, and what was taken is all that a run remembers
    again = Batches(sources, [3.0, 1.0], o, 2, cpu)
    for step in range(50):
        again.at(step)
    ranks = [Batches(sources, [3.0, 1.0], o, 2, cpu, rank, 2, again.taken) for rank in (0, 1)]
    shares = [torch.cat([x for x, _, _ in rank.at(50)[0]]).tolist() for rank in ranks]
    assert shares[0] + shares[1] == steps[50]


def test_noise_scale_of_a_known_noise():
    """Gradients g + noise with |g|^2 = 4 and tr(S) = 100: the critical batch is 25."""
    rng, d, k = np.random.default_rng(0), 1000, 8
    g = np.full(d, 2 / math.sqrt(d))
    found = []
    for _ in range(200):
        batch = g + rng.normal(size=(k, d)) * math.sqrt(100 / d)
        found.append([float(np.mean((batch**2).sum(1))), float((batch.mean(0) ** 2).sum())])
    small, big = np.mean(found, 0)
    assert train.noise_scale([small] * k, big) == pytest.approx(25, rel=0.1)


# ---- a step ------------------------------------------------------------------------------------------------


def gradient(data, out, monkeypatch, **changes) -> list[torch.Tensor]:
    """Start a run and read the gradient of its first step, as it comes to be clipped."""
    found = []

    def take(parameters, limit, scale):
        found.extend(p.grad.clone() for p in parameters)
        raise Kill

    with monkeypatch.context() as patch:
        patch.setattr(train, "clip_gradients", take)
        with pytest.raises(Kill):
            train.train(options(data, out, **{"dtype": "fp32", "overwrite": True, **changes}))
    return found


CASES = {"clm": {}, "mlm": {"objective": "mlm"}, "doc_mask": {"doc_mask": True}}


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_give_the_gradient_of_the_whole(data, tmp_path, monkeypatch, case):
    """Also when they hold unequal numbers of targets (mlm) or are of unequal size (3 + 3 + 2 sequences)."""
    whole = gradient(data, tmp_path / "run", monkeypatch, micro_batch=8, **CASES[case])
    for size in (1, 3):
        parts = gradient(data, tmp_path / "run", monkeypatch, micro_batch=size, **CASES[case])
        for a, b in zip(parts, whole, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()


def test_recomputation_changes_no_gradient(data, tmp_path, monkeypatch):
    dropout = {"set": ["n_head=2", "dropout=0.2"]}
    whole = gradient(data, tmp_path / "run", monkeypatch, **dropout)
    again = gradient(data, tmp_path / "run", monkeypatch, recompute=True, **dropout)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_a_nan_step_is_skipped_and_counted(data, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 4})
    train.train(options(data, tmp_path / "run"))
    assert saved_state(tmp_path / "run")["skipped"] == 2
    assert all(p.isfinite().all() for p in load_model(tmp_path / "run").parameters())
    losses = [r["loss"] for r in records(tmp_path / "run") if "loss" in r]
    assert [math.isnan(loss) for loss in losses] == [False, True, False, True, False, False]


def poison(monkeypatch, steps) -> None:
    """Make the loss NaN at these updates."""
    real, count = model.Run.update, itertools.count(1)

    def update(self, optimizer, lr, **metrics):
        if next(count) in steps:
            metrics["loss"] = metrics["loss"] * math.nan
        return real(self, optimizer, lr, **metrics)

    monkeypatch.setattr(model.Run, "update", update)


def test_nans_that_stay_stop_the_run_and_name_the_good_checkpoint(data, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(4, 100)))
    with pytest.raises(UserError, match="up to step 8.*holds step [46]"):
        train.train(options(data, tmp_path / "run", max_steps=50))
    assert all(p.isfinite().all() for p in load_model(tmp_path / "run").parameters())


def test_fp16_halves_its_scale_until_nothing_overflows(data, tmp_path):
    """A run with an absurd scale skips its updates, halves the scale, and changes no weight meanwhile."""
    run = tmp_path / "run"
    train.train(options(data, run, dtype="fp16", max_steps=2))
    before = weights(run)
    state = json.loads((run / "state" / "state.json").read_text())
    assert state["scale"] == 2.0**14 and state["skipped"] == 0
    (run / "state" / "state.json").write_text(json.dumps(state | {"scale": 2.0**100}))
    train.train(resumed(train.Options, run, max_steps=4))
    state = saved_state(run)
    assert state["scale"] == 2.0**98 and state["skipped"] == 2
    assert weights(run) == before


# ---- runs --------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_a_folder(data, tmp_path):
    result = train.train(options(data, tmp_path / "run", max_steps=60, lr=1e-2, eval_interval=20))
    steps = [r for r in records(tmp_path / "run") if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 61))
    assert {"loss", "grad_norm", "lr", "ms_per_step", "tok_per_s", "mfu"} <= steps[0].keys()
    assert steps[0]["loss"] > 4 > 3.2 > result["val_loss"]
    assert result["val_tokens"] == Tokens(data, "val").n - 1  # the last evaluation takes all of the text
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert files == {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json",
                     "tokenizer_config.json", "metrics.jsonl", "state"}
    loss = model.evaluate(load_model(tmp_path / "run"), Tokens(data, "val"), 32)["val_loss"]
    assert loss == pytest.approx(result["val_loss"], abs=0.02)  # the run evaluated in bfloat16


RESUMES = {
    "fp32": {"dtype": "fp32"},
    "bf16": {"dtype": "bf16"},
    "adamw, accumulation": {"optimizer": "adamw", "micro_batch": 3},
    "mlm, dropout": {"objective": "mlm", "set": ["n_head=2", "dropout=0.2"]},
    "ramp, fp16": {"dtype": "fp16", "set": ["n_head=2", "batch_ramp=4"]},
    "recompute, doc_mask, cosine": {"recompute": True, "doc_mask": True, "schedule": "cosine"},
    "experts, their bias": {"set": ["n_head=2", "n_expert=4", "balance=bias", "router=sigmoid"]},
}


@pytest.mark.parametrize("case", RESUMES)
def test_resume_is_exact(data, tmp_path, monkeypatch, case):
    train.train(options(data, tmp_path / "whole", **RESUMES[case]))
    with monkeypatch.context() as patch:
        kill_at(patch, 6)
        with pytest.raises(Kill):
            train.train(options(data, tmp_path / "cut", **RESUMES[case]))
    assert saved_state(tmp_path / "cut")["at"] == 4  # the fifth step is done again
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "loss": 1.')  # half a line, as a kill leaves it
    train.train(resumed(train.Options, tmp_path / "cut"))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    logs = []
    for name in ("cut", "whole"):
        logs.append([(r["step"], r.get("loss"), r.get("val_loss")) for r in records(tmp_path / name)])
    assert logs[0] == logs[1]


def test_resume_of_a_mixture_is_exact(data, tmp_path):
    other = rewrite(data, tmp_path / "other", lambda split, ids: ids[::-1])
    both = {"data": [f"{data}:3", f"{other}:1"], "schedule": "constant"}
    train.train(options(data, tmp_path / "whole", **both))
    train.train(options(data, tmp_path / "cut", **both, max_steps=4))
    train.train(resumed(train.Options, tmp_path / "cut", max_steps=6))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert min(saved_state(tmp_path / "cut")["taken"]) > 0  # both were drawn from
    assert {"val_loss_chars", "val_loss_other"} <= records(tmp_path / "cut")[-1].keys()


def kill_and_resume(data, folder, kills, seed, **changes):
    """Run the command, kill it at random moments once it trains, resume each time -> (kills, weights)."""
    rng, killed = random.Random(seed), 0
    log = folder / "metrics.jsonl"
    while True:
        begun = (folder / "config.json").exists()
        args = ["--resume", folder] if begun else flags(data, folder, **changes)
        before = log.stat().st_mtime_ns if log.exists() else 0
        words = [sys.executable, train.__file__, *map(str, args)]
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        if killed < kills:
            while process.poll() is None and (not log.exists() or log.stat().st_mtime_ns == before):
                time.sleep(0.01)
            try:
                process.wait(rng.uniform(0.0, 0.5))
            except subprocess.TimeoutExpired:
                process.kill()
        _, err = process.communicate(timeout=240)
        if process.returncode == -signal.SIGKILL:
            killed += 1
        else:
            assert process.returncode == 0 or "is finished" in err, err
            return killed, weights(folder)


def test_a_killed_command_resumes_to_the_same_bits(data, tmp_path):
    sizes = {"max_steps": 100, "save_interval": 2, "eval_interval": 300}
    train.train(options(data, tmp_path / "whole", **sizes))
    assert kill_and_resume(data, tmp_path / "cut", 2, 0, **sizes) == (2, weights(tmp_path / "whole"))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw", "dtype": "fp32", "micro_batch": 3}],
                         ids=["muon bf16", "adamw fp32"])
def test_twenty_kills(data, tmp_path, changes):
    sizes = {"max_steps": 600, "save_interval": 2, "eval_interval": 500, **changes}  # half of it are saves
    train.train(options(data, tmp_path / "whole", **sizes))
    assert kill_and_resume(data, tmp_path / "cut", 20, 1, **sizes) == (20, weights(tmp_path / "whole"))


def test_ctrl_c_saves_and_says_how_to_go_on(data, tmp_path):
    args = flags(data, tmp_path / "run", max_steps=100000, save_interval=100000, eval_interval=100000)
    words = [sys.executable, train.__file__, *map(str, args)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run" / "metrics.jsonl")
    while len((tmp_path / "run" / "metrics.jsonl").read_text()) < 300:  # some steps done
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert f"--resume {tmp_path / 'run'}" in err.replace("\n", " ")
    assert saved_state(tmp_path / "run")["at"] > 0


def test_two_ranks_give_what_one_gives(data, tmp_path):
    # AdamW: Muon makes its update orthogonal in bfloat16, which turns float noise into 4e-3
    sizes = {"optimizer": "adamw", "lr": 1e-3, "dtype": "fp32", "objective": "mlm", "micro_batch": 3}
    train.train(options(data, tmp_path / "one", **sizes))
    two = flags(data, tmp_path / "two", **sizes)
    code, _, err = command("train.py", *two, ranks=2, env={"OMP_NUM_THREADS": "1"})
    assert code == 0, err
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        for key in ("loss", "grad_norm", "val_loss"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=2e-4)
    a, b = load_model(tmp_path / "one"), load_model(tmp_path / "two")
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (p - q).norm() <= 1e-4 * p.norm(), name
    # and goes on as one process, in the same order of the data
    ends = []
    for name in ("one", "two"):
        train.train(resumed(train.Options, tmp_path / name, max_steps=7))
        ends.append(records(tmp_path / name)[-2]["loss"])
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)


def test_masked_model_learns_and_is_saved_as_our_own_class(data, tmp_path):
    result = train.train(options(data, tmp_path / "mlm", objective="mlm", max_steps=60, lr=1e-2))
    first = records(tmp_path / "mlm")[0]["loss"]
    assert result["val_loss"] < first - 0.8 and result["val_acc"] > 0.15
    assert json.loads((tmp_path / "mlm" / "config.json").read_text())["model_type"] == "octavo"
    assert not load_model(tmp_path / "mlm").config.causal


def test_target_and_patience(data, tmp_path):
    run = tmp_path / "run"
    train.train(options(data, run, target_loss=10.0))
    assert saved_state(run)["at"] == TINY["eval_interval"]  # the first evaluation
    run = tmp_path / "stop"
    train.train(options(data, run, lr=1.0, max_steps=300, eval_interval=1, patience=2))
    assert saved_state(run)["at"] < 300
    values = [r["val_loss"] for r in records(run) if "val_loss" in r]
    assert min(values[-2:]) >= min(values[:-2])  # two evaluations without a better one
    best = load_model(f"{run}-best")
    best.compute_dtype = model.pick_dtype("auto", torch.device("cpu"))
    loss = model.evaluate(best, Tokens(data, "val"), 32, 8, TINY["eval_tokens"])["val_loss"]
    assert loss == pytest.approx(min(values), abs=1e-3)


def test_dropout_acts_in_training_only(data, tmp_path, monkeypatch):
    dropped = {"set": ["n_head=2", "dropout=0.5"]}
    plain = gradient(data, tmp_path / "run", monkeypatch)
    other = gradient(data, tmp_path / "run", monkeypatch, **dropped)
    assert any(not torch.equal(a, b) for a, b in zip(plain, other, strict=True))
    train.train(options(data, tmp_path / "run", dtype="fp32", overwrite=True, **dropped))
    losses = [r["val_loss"] for r in records(tmp_path / "run") if "val_loss" in r]
    again = model.evaluate(load_model(tmp_path / "run"), Tokens(data, "val"), 32)["val_loss"]
    assert again == pytest.approx(losses[-1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compiled_blocks_train_alike(data, tmp_path, dtype):
    for name in ("on", "off"):
        train.train(options(data, tmp_path / name, dtype=dtype, compile=name, optimizer="adamw", lr=1e-3))
    on, off = ([r["loss"] for r in records(tmp_path / name) if "loss" in r] for name in ("on", "off"))
    assert on == pytest.approx(off, rel=1e-5 if dtype == "fp32" else 5e-3)


# ---- what can go wrong -------------------------------------------------------------------------------------


def test_full_disk_keeps_the_last_checkpoint(data, tmp_path, monkeypatch):
    real, count = model.save_file, itertools.count(1)

    def full(*args):
        if next(count) > 4:  # two files a checkpoint: the third one fails
            raise OSError(errno.ENOSPC, "No space left on device")
        real(*args)

    monkeypatch.setattr(model, "save_file", full)
    with pytest.raises(UserError, match="No space left.*is whole"):
        train.train(options(data, tmp_path / "run"))
    assert load_state(tmp_path / "run")[1]["at"] == 2
    assert list((tmp_path / "run").rglob("*.new")) == []


FIRST = {"kill": Kill(), "full disk": OSError(errno.ENOSPC, "No space left on device")}


@pytest.mark.parametrize("error", FIRST.values(), ids=FIRST)
def test_a_first_save_that_fails_is_not_in_the_way_of_the_next(data, tmp_path, monkeypatch, error):
    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(model, "save_file", fail)
        with pytest.raises((Kill, UserError)):
            train.train(options(data, tmp_path / "run"))
    train.train(options(data, tmp_path / "run", max_steps=1))
    assert list((tmp_path / "run").rglob("*.new")) == []


def test_metrics_that_cannot_be_written(data, tmp_path, monkeypatch):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    log, real = tmp_path / "run" / "metrics.jsonl", train.evaluate

    def fill(*args, **kw):
        log.unlink()
        log.symlink_to("/dev/full")
        return real(*args, **kw)

    monkeypatch.setattr(train, "evaluate", fill)
    with pytest.raises(UserError, match="metrics.jsonl cannot be written"):
        train.train(options(data, tmp_path / "run"))
    load_model(tmp_path / "run")


def test_data_that_shrinks_underneath(data, tmp_path, monkeypatch):
    copy = shutil.copytree(data, tmp_path / "copy")
    real = train.evaluate

    def shrink(*args, **kw):
        (copy / "train.bin").write_bytes(b"")
        return real(*args, **kw)

    monkeypatch.setattr(train, "evaluate", shrink)
    with pytest.raises(UserError, match="became shorter"):
        train.train(options(copy, tmp_path / "run", max_steps=40))
    load_model(tmp_path / "run")


def test_compile_that_fails_is_a_line(data, tmp_path, monkeypatch, capsys):
    def broken(self):
        for block in self.layers.values():
            block._compiled_call_impl = lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no C++ compiler"))

    monkeypatch.setattr(model.Transformer, "compile_blocks", broken)
    train.train(options(data, tmp_path / "compiled", compile="on"))
    train.train(options(data, tmp_path / "plain", compile="off"))
    assert weights(tmp_path / "compiled") == weights(tmp_path / "plain")
    assert "torch.compile does not work here (no C++ compiler)" in capsys.readouterr().err


def test_other_peoples_data_and_folders(data, modules, tmp_path):
    run = tmp_path / "run"
    train.train(options(data, run))
    before = weights(run)
    def refused(words, o):
        with pytest.raises(UserError, match=words):
            train.train(o)

    refused("holds a run already", options(data, run))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        refused("not a checkpoint folder", options(data, tmp_path / "mine", overwrite=overwrite))
    refused("is finished", resumed(train.Options, run))
    refused("--lr cannot change", resumed(train.Options, run, lr=1.0, max_steps=10))
    with pytest.raises(UserError, match="holds no checkpoint"):
        resumed(train.Options, tmp_path / "nothing")
    copy = shutil.copytree(data, tmp_path / "copy")
    (copy / "val.bin").write_bytes((copy / "val.bin").read_bytes()[:-3])
    refused("cut off", options(copy, tmp_path / "other"))
    every = np.arange(10**6) % 99 > 0
    copy = rewrite(data, tmp_path / "beyond", lambda split, ids: np.where(every[: len(ids)], ids, 60_000))
    refused("beyond the vocabulary", options(copy, tmp_path / "other"))
    refused("different tokenizers", options(data, tmp_path / "both", data=[str(data), str(modules)]))
    free = {"init": str(run), "n_layer": None, "n_embd": None, "set": []}
    refused("different tokenizers", options(modules, tmp_path / "both", **free))
    state = run / "state" / "state.json"
    changed = state.read_text().replace(json.dumps(str(data)), json.dumps(str(modules)))
    state.write_text(changed.replace('"finished": true', '"finished": false'))
    refused("not what .* was trained on", resumed(train.Options, run))
    assert weights(run) == before


# ---- options -----------------------------------------------------------------------------------------------

FIELDS = {f.name: f.type for f in dataclasses.fields(train.Options)}
DECLARED = {name: kind.__metadata__[0] for name, kind in FIELDS.items() if hasattr(kind, "__metadata__")}
SETTINGS = FIELDS.keys() - DECLARED.keys()  # those that only --set reaches
CHANGES = {  # option or setting -> (another value, what it changes: see `outcome`)
    "max_steps": (3, "steps"),
    "eval_interval": (1, "val"),
    "save_interval": (1, "saves"),
    "seed": (1, "loss"),
    "optimizer": ("adamw", "weights"),
    "lr": (2e-3, "lr"),
    "warmup_steps": (0, "lr"),
    "schedule": ("cosine", "lr"),
    "dtype": ("bf16", "loss"),
    "min_lr": (0.5, "lr"),
    "weight_decay": (0.5, "weights"),
    "grad_clip": (1e-3, "weights"),
    "target_loss": (10.0, "steps"),
    "patience": (1, "best"),
    "tokens_per_step": (128, "loss"),
    "micro_batch": (1, "passes"),
    "preset": ("medium", "config"),
    "n_layer": (1, "config"),
    "n_embd": (64, "config"),
    "seq_len": (16, "config"),
    "set": (["n_head=2", "n_kv_head=1"], "config"),
    "objective": ("mlm", "config"),
    "eval_tokens": (64, "val"),
    "batch_ramp": (3, "loss"),
    "doc_mask": (True, "loss"),
    "noise_scale": (True, "noise"),
    "recompute": (True, "passes"),
}
ELSEWHERE = {  # the test that shows what these do
    "data": "test_resume_of_a_mixture_is_exact", "out": "test_a_run_learns_and_leaves_a_folder",
    "resume": "test_resume_is_exact", "overwrite": "test_overwrite_begins_again",
    "init": "test_init_starts_from_a_folder", "compile": "test_compile_that_fails_is_a_line",
    "device": "test_values_out_of_range_are_a_sentence",
}


def outcome(source, out, monkeypatch, **changes) -> dict:
    """Train four steps -> all that an option may change of a run."""
    passes, saves = itertools.count(), itertools.count()
    block, save = model.Block.forward, train.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(model.Block, "forward", lambda *args, **kw: (next(passes), block(*args, **kw))[1])
        patch.setattr(train, "save_checkpoint", lambda *args, **kw: (next(saves), save(*args, **kw))[1])
        train.train(options(source, out, **{"max_steps": 4, "dtype": "fp32", "lr": 1e-3} | changes))
    log = records(out)
    names = {"loss": "loss", "lr": "lr", "val": "val_loss", "noise": "critical_batch_tokens"}
    found = {short: [r[name] for r in log if name in r] for short, name in names.items()}
    found |= {"steps": len(found["loss"]), "passes": next(passes), "saves": next(saves)}
    found |= {"config": json.loads((out / "config.json").read_text()), "best": Path(f"{out}-best").exists()}
    return found | {"weights": weights(out)}


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "report", lambda *args: None)
        return outcome(data, tmp_path_factory.mktemp("plain") / "run", patch)


def test_every_option_and_setting_has_a_test():
    assert sorted([*CHANGES, *ELSEWHERE]) == sorted(FIELDS)
    assert all(name in globals() for name in ELSEWHERE.values())
    assert len(DECLARED) <= 30 and SETTINGS == {"grad_clip", "min_lr", "weight_decay", "batch_ramp"}


@pytest.mark.parametrize("name", CHANGES)
def test_an_option_does_something(data, plain, tmp_path, monkeypatch, name):
    value, changed = CHANGES[name]
    changes = {name: value}
    if name in SETTINGS:  # the command line reaches it by --set
        changes = {"set": [*TINY["set"], f"{name}={value}"]}
    found = outcome(data, tmp_path / "run", monkeypatch, **changes)
    assert found[changed] != plain[changed]
    if name in ("micro_batch", "recompute"):  # speed and memory only
        assert found["loss"] == pytest.approx(plain["loss"], rel=1e-5)


def test_overwrite_begins_again(data, tmp_path):
    run = tmp_path / "run"
    train.train(options(data, run))
    (run / "mine.txt").write_text("a note")
    train.train(options(data, run, overwrite=True, seed=1, max_steps=2))
    assert [r["step"] for r in records(run) if "loss" in r] == [1, 2]
    assert saved_state(run)["options"]["seed"] == 1
    assert (run / "mine.txt").read_text() == "a note"


def test_init_starts_from_a_folder(data, tmp_path):
    free = {"n_layer": None, "n_embd": None, "seq_len": None, "set": []}
    train.train(options(data, tmp_path / "first", max_steps=40, lr=1e-2))
    train.train(options(data, tmp_path / "second", init=str(tmp_path / "first"), **free))
    first, second = (records(tmp_path / name) for name in ("first", "second"))
    assert second[0]["loss"] < first[0]["loss"] - 0.5
    assert model.load_config(tmp_path / "second") == model.load_config(tmp_path / "first")
    longer = {**free, "seq_len": 64, "set": ["dropout=0.1"]}  # a context and what acts in training may differ
    train.train(options(data, tmp_path / "third", init=str(tmp_path / "first"), **longer))
    assert model.load_config(tmp_path / "third").seq_len == 64
    for changes in ({"n_layer": 2}, {"n_embd": 32}, {"set": ["n_head=2"]}):
        with pytest.raises(UserError, match="cannot be chosen"):
            train.train(options(data, tmp_path / "no", init=str(tmp_path / "first"), **{**free, **changes}))
    with pytest.raises(UserError, match="the other --objective"):
        train.train(options(data, tmp_path / "no", init=str(tmp_path / "first"), objective="mlm", **free))
    with pytest.raises(UserError, match="holds no checkpoint"):
        train.train(options(data, tmp_path / "no", init=str(tmp_path / "absent"), **free))
    assert not (tmp_path / "no").exists()


def out_of_range():
    """List option and value for whatever its declaration forbids, and NaN and infinity for every number."""
    for name, kind in FIELDS.items():
        kinds = str(kind)
        low, above, one_of = DECLARED[name].limits if name in DECLARED else (0, None, None)
        if "int" not in kinds and "float" not in kinds:
            if one_of:
                yield from ((name, value) for value in ("", "sgd", "Auto", "fp8"))
            continue
        if "float" in kinds:
            yield from ((name, value) for value in (math.nan, math.inf, -math.inf))
        if low is not None:
            yield from ((name, value) for value in (low - 1, -(10**9)))
        if above is not None:
            yield from ((name, value) for value in (above, -0.5))


@pytest.mark.parametrize("name, value", out_of_range())
def test_values_out_of_range_are_a_sentence(name, value):
    with pytest.raises(UserError, match=rf"^--{name.replace('_', '-')} is .*(has to be|one of|not).*\.$"):
        train.Options(**{name: value})


BAD = [
    ({"set": ["n_head=3"]}, "does not divide into 3 heads"),
    ({"set": ["n_head=4", "n_kv_head=3"]}, "cannot share 3 key-value heads"),
    ({"set": ["n_expert=4", "n_expert_active=9"]}, "cannot go to 9 experts"),
    ({"set": ["expert_dim=8"]}, "needs experts"),
    ({"set": ["dropout=1.0"]}, "dropout is 1.0"),
    ({"preset": "huge"}, "--preset is one of"),
    ({"n_embd": 33}, "33"),
    ({"tokens_per_step": 8}, "does not divide into sequences"),
    ({"seq_len": 500_000, "tokens_per_step": 500_000}, "lower --seq-len"),
    ({"data": ["nowhere"]}, "no data folder nowhere"),
    ({"device": "tpu"}, "cannot be used here"),
]


@pytest.mark.parametrize("changes, words", BAD, ids=[w for _, w in BAD])
def test_bad_sizes_are_a_sentence(data, tmp_path, changes, words):
    words = rf"(?s)^[A-Z\-\d\w].*{words}.*\.$|^.*{words}"
    with pytest.raises(UserError, match=words):
        train.train(options(data, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


BAD_SETS = """
    n_head n_head= n_head=two n_head=0 n_head=-1 n_head=1.5 n_head=null n_head=true n_head=[2]
    no_such_field=3 n_expert=abc n_expert=-1 n_expert=1.5 expert_dim=x window=x window=0 window=-3
    window=[1,2,3] window={} dropout=x dropout=nan dropout=NaN dropout=-0.1 norm_eps=x norm_eps=-1
    norm_eps=NaN rope_theta=x rope_theta=0 rope_theta=Infinity qk_norm=maybe qk_norm=3 tie=no head=tail
    head=score causal=false vocab_size=3 eos_id=x head_dim=7 head_dim=x ffn_dim=0 n_layer=3 lr=0.1
    out=here grad_clip=abc grad_clip=-1 grad_clip=NaN grad_clip=nan grad_clip=null grad_clip=true min_lr=x
    min_lr=-0.1 weight_decay=x weight_decay=-1 batch_ramp=x batch_ramp=1.5 batch_ramp=-1 fields_set={}
    command=x
""".split()


@pytest.mark.parametrize("item", BAD_SETS)
def test_a_bad_set_is_a_sentence(data, tmp_path, item):
    name = item.partition("=")[0]
    words = refusal(COMMAND, *flags(data, tmp_path / "run", set=[item], max_steps=1))
    assert name in words.replace("-", "_") or (name == "n_head" and "heads" in words)
    assert words.endswith(".") and len(words) < 300
    assert not (tmp_path / "run").exists()


def test_a_set_of_experts_fields_is_a_sentence(data, tmp_path):
    for item in ("router=coin", "balance=hope", "capacity=0", "n_group=3", "n_expert_active=0", "z_loss=x",
                 "router_scale=x", "dense_layers=x", "balance_rate=x", "capacity=-1"):
        words = refusal(COMMAND, *flags(data, tmp_path / "run", set=["n_expert=4", item], max_steps=1))
        assert not (tmp_path / "run").exists(), item
        assert words.endswith("."), item


def test_a_window_and_biases_by_set(data, tmp_path):
    sets = ["n_head=2", "window=[8, null]", "qkv_bias=true", "qk_norm=false", "tie=false"]
    call(COMMAND, *flags(data, tmp_path / "run", set=sets, max_steps=1))
    config = model.load_config(tmp_path / "run")
    assert (config.windows, config.qkv_bias, config.qk_norm, config.tie) == ((8, None), True, False, False)


def test_resume_on_the_command_line(data, tmp_path):
    """Saved options are the defaults, what is typed wins, and what must not change is refused."""
    run = tmp_path / "run"
    sets = ["n_head=2", "grad_clip=0.5", "dropout=0.1"]
    call(COMMAND, *flags(data, run, set=sets, lr=3e-3, max_steps=2, schedule="constant"))
    assert refusal(COMMAND, "--resume", run).endswith("trains it further).")
    call(COMMAND, "--resume", run, "--max-steps", 4, "--eval-interval", 1)
    saved = saved_state(run)["options"]
    assert (saved["lr"], saved["max_steps"], saved["eval_interval"], saved["set"]) == (3e-3, 4, 1, sets)
    assert saved["grad_clip"] == 0.5  # a setting without an option comes from the folder
    assert [r["lr"] for r in records(run) if "lr" in r] == pytest.approx([1.5e-3, 3e-3, 3e-3, 3e-3])
    before = weights(run)
    fixed = {"lr": 1e-2, "seed": 1, "optimizer": "adamw", "tokens_per_step": 512, "schedule": "wsd",
             "seq_len": 64, "n_layer": 3, "n_embd": 64, "preset": "micro", "objective": "mlm",
             "data": "elsewhere", "dtype": "fp16", "warmup_steps": 3, "init": str(run), "doc_mask": True,
             "compile": "on"}
    for name, value in fixed.items():
        flag = f"--{name.replace('_', '-')}"
        words = refusal(COMMAND, "--resume", run, "--max-steps", 6, flag, *([] if value is True else [value]))
        assert words.startswith(f"{flag} cannot change on --resume"), words
    for item in ("n_head=4", "dropout=0.2", "grad_clip=1.0", "weight_decay=0.2"):
        words = refusal(COMMAND, "--resume", run, "--max-steps", 6, "--set", item)
        assert "cannot change on --resume" in words, item
    assert weights(run) == before
    call(COMMAND, "--resume", run, "--max-steps", 5, *(word for item in sets for word in ("--set", item)))
    assert saved_state(run)["at"] == 5  # the same settings typed again


def test_a_run_goes_on_with_its_own_command(data, tmp_path):
    run = tmp_path / "run"
    train.train(options(data, run, max_steps=2))
    state = json.loads((run / "state" / "state.json").read_text())
    (run / "state" / "state.json").write_text(json.dumps(state | {"command": "sft"}))
    assert "another command" in refusal(COMMAND, "--resume", run, "--max-steps", 4)
    model.save_checkpoint(tmp_path / "plain", load_model(run), data / "tokenizer.json")
    assert "cannot be resumed" in refusal(COMMAND, "--resume", tmp_path / "plain", "--max-steps", 4)
    assert "holds no checkpoint" in refusal(COMMAND, "--resume", tmp_path / "nothing")


def test_the_command_line(data, tmp_path):
    """One real call: exit code, the words for people, and a refusal that keeps the folder."""
    args = flags(data, tmp_path / "run", noise_scale=True)
    code, out, err = command("train.py", *args)
    assert code == 0 and out == "", err
    for words in ("Qwen3ForCausalLM", "val loss", "val bpb", "critical batch", "· train   o val", "A sample"):
        assert words in err, words
    before = weights(tmp_path / "run")
    code, _, err = command("train.py", *args)
    assert code == 2 and err.startswith("error: ") and len(err.strip().splitlines()) == 1, err
    assert weights(tmp_path / "run") == before


def test_help_names_every_option_and_a_wrong_type_is_a_usage_error(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    app = typer.Typer()
    app.command()(COMMAND)
    shown = CliRunner().invoke(app, ["--help"]).output
    assert all(f"--{name.replace('_', '-')}" in shown for name in DECLARED)
    wrong = CliRunner().invoke(app, ["--max-steps", "many"])
    assert wrong.exit_code == 2 and "--max-steps" in wrong.output and "integer" in wrong.output
