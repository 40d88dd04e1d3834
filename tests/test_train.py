"""train.py: the ideas by hand-worked numbers, the command by what it leaves behind."""

import dataclasses
import errno
import itertools
import json
import math
import os
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
from safetensors.torch import save_file
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


REPORT = train.report


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


def test_masking_is_berts():
    x = torch.randint(0, 50, (64, 512), generator=torch.Generator().manual_seed(0))
    inputs, targets = train.mask_tokens(x, 60, 50, [(0, i) for i in range(64)])
    chosen = targets != IGNORE
    assert torch.equal(targets[chosen], x[chosen])
    assert torch.equal(inputs[~chosen], x[~chosen])
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert (inputs[chosen] == 60).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert set(inputs[chosen].tolist()) == {*range(50), 60}
    # a random token is the token itself once in 50 times
    assert (inputs[chosen] == x[chosen]).float().mean().item() == pytest.approx(0.1 + 0.1 / 50, abs=0.02)
    again = train.mask_tokens(x[5:6], 60, 50, [(0, 5)])
    assert torch.equal(again[0], inputs[5:6]) and torch.equal(again[1], targets[5:6])  # not of the batch


def test_every_row_has_a_target():
    """0.85^4 = 52 % of rows of four tokens would have none, and a step may hold nothing else."""
    x = torch.arange(4).expand(200, 4)
    _, targets = train.mask_tokens(x, 60, 50, [(0, i) for i in range(200)])
    counts = (targets != IGNORE).sum(1)
    assert counts.min() == 1 and (counts == 1).float().mean() > 0.8
    assert set(targets[counts == 1].amax(1).tolist()) == {0, 1, 2, 3}  # any of them


class Numbers:
    """A source that names its windows: window number p of source s reads as [s, p]."""

    def __init__(self, source):
        self.source = source

    def batch(self, position, count, T, seed):
        rows = torch.tensor([[self.source, p] for p in range(position, position + count)])
        return rows, rows


def test_a_mixture_keeps_its_weights_and_each_source_its_order():
    o = SimpleNamespace(seed=0, tokens_per_step=20, micro_batch=3, doc_mask=False)
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
        small, big = float(np.mean((batch**2).sum(1))), float((batch.mean(0) ** 2).sum())
        found.append(train.noise_parts(small, big, k))
    g2, trace = np.mean(found, 0)
    assert g2 == pytest.approx(4, rel=0.1) and trace == pytest.approx(100, rel=0.03)


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


CASES = {"clm": {}, "mlm": {"objective": "mlm"}, "doc_mask": {"doc_mask": True},
         "experts": {"set": ["n_head=2", "n_expert=4", "balance_rate=1", "z_loss=1"]}}


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_give_the_gradient_of_the_whole(data, tmp_path, monkeypatch, case):
    """Also when they hold unequal numbers of targets (mlm) or are of unequal size (3 + 3 + 2 sequences)."""
    whole = gradient(data, tmp_path / "run", monkeypatch, micro_batch=8, **CASES[case])
    for size in (1, 3):
        parts = gradient(data, tmp_path / "run", monkeypatch, micro_batch=size, **CASES[case])
        for a, b in zip(parts, whole, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()


def noise_of(data, out, **changes) -> list[dict]:
    """Train with --noise-scale -> what the evaluations say of it."""
    sizes = {"dtype": "fp32", "noise_scale": True, "overwrite": True, "eval_interval": 2, "max_steps": 4}
    train.train(options(data, out, **sizes | changes))
    names = ("critical_batch_tokens", "noise_steps")
    return [{name: r.get(name) for name in names} for r in records(out) if "noise_steps" in r]


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_noise_scale_is_that_of_the_steps_gradients(data, tmp_path, objective):
    """The gradient of each sequence of a step by itself, by autograd, gives the same figure."""
    run = tmp_path / "run"
    o = {"lr": 1e-9, "weight_decay": 0.0, "doc_mask": True, "micro_batch": 4, "objective": objective}
    found = noise_of(data, run, **o)
    assert [f["noise_steps"] for f in found] == [2, 2]  # those since the last evaluation
    net = load_model(run).train()
    params = list(net.parameters())
    corrupt = train.Corrupt(0, data) if objective == "mlm" else None
    source = [Tokens(data, "train")], [1.0], options(data, run, **o)
    batches = Batches(*source, 32, torch.device("cpu"), change=corrupt)

    def gradient(x, y, documents):
        loss = net(x, y, doc_ids=documents)[0].sum() / (y != IGNORE).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]).double()

    sums = np.zeros(2)
    for step in range(2):
        whole = [torch.cat(parts) for parts in zip(*batches.at(step)[0], strict=True)]
        big = gradient(*whole).square().sum().item()
        four = [gradient(*(part[i : i + 1] for part in whole)).square().sum().item() for i in range(4)]
        small = sum(four) / 4
        sums += [(8 * big - small) / 7, (small - big) * 8 / 7]
    assert found[0]["critical_batch_tokens"] == pytest.approx(sums[1] / sums[0] * 32, rel=1e-3)


def test_noise_scale_of_masked_models_of_one_sequence_at_a_time_and_of_too_few(data, tmp_path):
    masked = {"objective": "mlm", "micro_batch": 1, "doc_mask": True, "lr": 1e-9, "weight_decay": 0.0}
    half, full = (noise_of(data, tmp_path / d, dtype=d, **masked) for d in ("fp16", "fp32"))
    for a, b in zip(half, full, strict=True):  # the loss scale of fp16 is taken out again
        assert a["noise_steps"] == b["noise_steps"] == 2
        assert a["critical_batch_tokens"] == pytest.approx(b["critical_batch_tokens"], rel=0.1)
    with pytest.raises(UserError, match="two sequences"):
        noise_of(data, tmp_path / "one", tokens_per_step=32)


def test_recomputation_changes_no_gradient(data, tmp_path, monkeypatch):
    dropout = {"set": ["n_head=2", "dropout=0.2"]}
    whole = gradient(data, tmp_path / "run", monkeypatch, **dropout)
    again = gradient(data, tmp_path / "run", monkeypatch, recompute=True, **dropout)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_dropout_draws_new_masks_each_step(data, tmp_path, monkeypatch):
    """The same window at a rate that moves nothing: only the masks tell the steps apart."""
    read = Tokens.batch
    monkeypatch.setattr(Tokens, "batch", lambda tokens, position, *rest: read(tokens, 0, *rest))
    for dropout, different in ((0.2, 6), (0.0, 1)):
        changes = {"dtype": "fp32", "lr": 1e-12, "weight_decay": 0.0, "overwrite": True}
        train.train(options(data, tmp_path / "run", set=["n_head=2", f"dropout={dropout}"], **changes))
        assert len({r["loss"] for r in records(tmp_path / "run") if "loss" in r}) == different


def test_a_nan_step_is_skipped_and_counted(data, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 4})
    train.train(options(data, tmp_path / "run"))
    assert saved_state(tmp_path / "run")["skipped"] == 2
    assert all(p.isfinite().all() for p in load_model(tmp_path / "run").parameters())
    losses = [r["loss"] for r in records(tmp_path / "run") if "loss" in r]
    assert [loss is None for loss in losses] == [False, True, False, True, False, False]  # JSON has no NaN


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
    with pytest.raises(UserError, match="step 8.*holds step 2; begin anew"):
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
    assert state["scale"] == 2.0**98 and state["skipped"] == 2 and state["good"] == 0
    assert weights(run) == before
    (run / "state" / "state.json").write_text(json.dumps(state | {"scale": 2.0**10, "good": 998}))
    train.train(resumed(train.Options, run, max_steps=7))
    state = saved_state(run)
    assert state["scale"] == 2.0**11 and state["good"] == 1001  # a thousand good ones: tried again at twice


# ---- runs --------------------------------------------------------------------------------------------------


def test_a_run_learns_and_leaves_a_folder(data, tmp_path):
    result = train.train(options(data, tmp_path / "run", max_steps=60, lr=1e-2, eval_interval=20))
    steps = [r for r in records(tmp_path / "run") if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 61))
    assert {"loss", "grad_norm", "lr", "ms_per_step", "tok_per_s", "mfu"} <= steps[0].keys()
    assert all(r["tok_per_s"] * r["ms_per_step"] == pytest.approx(256_000, rel=1e-6) for r in steps)
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
    "fp16, noise": {"dtype": "fp16", "noise_scale": True, "set": ["n_head=2", "dropout=0.2"]},
    "recompute, doc_mask, cosine": {"recompute": True, "doc_mask": True, "schedule": "cosine"},
    "experts, their bias": {"set": ["n_head=2", "n_expert=4", "balance=bias", "router=sigmoid"]},
}


QUICK = ("fp32", "mlm, dropout", "fp16, noise")


@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c not in QUICK)) for c in RESUMES])
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


@pytest.mark.slow
def test_a_killed_command_resumes_to_the_same_bits(data, tmp_path):
    sizes = {"max_steps": 100, "save_interval": 2, "eval_interval": 300}
    train.train(options(data, tmp_path / "whole", **sizes))
    assert kill_and_resume(data, tmp_path / "cut", 2, 0, **sizes) == (2, weights(tmp_path / "whole"))


KILLS = int(os.environ.get("OCTAVO_KILLS", 5))  # 20 of them take a minute and a half


@pytest.mark.slow
@pytest.mark.parametrize("changes, n", [({}, KILLS), ({"optimizer": "adamw", "dtype": "fp32", "micro_batch": 3}, KILLS // 2)],
                         ids=["muon bf16", "adamw fp32"])
def test_many_kills(data, tmp_path, changes, n):
    sizes = {"max_steps": 30 * n, "save_interval": 2, "eval_interval": 500, **changes}  # half of it are saves
    train.train(options(data, tmp_path / "whole", **sizes))
    assert kill_and_resume(data, tmp_path / "cut", n, 1, **sizes) == (n, weights(tmp_path / "whole"))


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


def test_a_masked_model_of_very_short_steps_trains(data, tmp_path):
    sizes = {"objective": "mlm", "seq_len": 4, "tokens_per_step": 4, "max_steps": 20, "eval_interval": 50}
    train.train(options(data, tmp_path / "run", **sizes))
    assert saved_state(tmp_path / "run")["skipped"] == 0


def test_a_masked_model_needs_a_mask_token(data, tmp_path):
    bare = shutil.copytree(data, tmp_path / "bare")
    spec = json.loads((bare / "tokenizer.json").read_text())
    (bare / "tokenizer.json").write_text(json.dumps(spec).replace("<|mask|>", "<|other|>"))
    words = refusal(COMMAND, *flags(bare, tmp_path / "run", objective="mlm"))
    assert "needs a tokenizer with a <|mask|> token" in words and str(bare) in words
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("objective", ["clm", "mlm"])
def test_documents_are_masked_in_every_evaluation(data, tmp_path, monkeypatch, objective):
    """What is logged is the loss of the model as it was trained: a token sees its own document only."""
    seen = []
    real = model.Transformer.forward

    def forward(self, x, *args, doc_ids=None, **kw):
        seen.append(doc_ids is not None and torch.equal(doc_ids, Tokens(data, "val").documents(x)) or self.training)
        return real(self, x, *args, doc_ids=doc_ids, **kw)

    monkeypatch.setattr(model.Transformer, "forward", forward)
    train.train(options(data, tmp_path / "run", objective=objective, doc_mask=True, dtype="fp32"))
    if objective == "clm":
        assert all(seen) and len(seen) > 6
        losses = {mask: model.evaluate(load_model(tmp_path / "run"), Tokens(data, "val"), 32, doc_mask=mask)
                  for mask in (True, False)}
        logged = records(tmp_path / "run")[-1]["val_loss"]
        assert logged == pytest.approx(losses[True]["val_loss"], rel=1e-5)
        assert abs(logged - losses[False]["val_loss"]) > 1e-3
    else:  # masked inputs hide some ends of documents, so the ids do not tell: the loss does
        logged = records(tmp_path / "run")[-1]["val_loss"]
        net, tokens = load_model(tmp_path / "run"), Tokens(data, "val")
        for mask in (True, False):
            again = train.evaluate_masked(net, tokens, 32, 8, None, train.Corrupt(0, data), mask)["val_loss"]
            assert (again == pytest.approx(logged, rel=1e-5)) == mask


def test_masked_evaluation_by_hand(data):
    """Windows in order, masked by their own text; of the last one only what the text still has."""
    sizes = {"n_layer": 1, "n_head": 2, "n_kv_head": 2, "n_embd": 32, "head_dim": 16, "ffn_dim": 48}
    corrupt, tokens = train.Corrupt(0, data), Tokens(data, "val")
    net = model.Transformer(model.Config(vocab_size=128, causal=False, **sizes)).init_weights(1)
    T, nats, right, count = 32, 0.0, 0, 0
    assert (tokens.n - 1) % T
    for start in range(0, tokens.n - 1, T):
        x = torch.from_numpy(tokens.read(start, T).astype(np.int64))[None]
        seed = ("val", x[0].numpy().tobytes())
        inputs, targets = train.mask_tokens(x, corrupt.mask_id, corrupt.n_vocab, [seed])
        targets[:, tokens.n - 1 - start :] = IGNORE
        with torch.no_grad():
            logits = net(inputs)[0].float()
        chosen = targets != IGNORE
        nats += torch.nn.functional.cross_entropy(logits[chosen], targets[chosen], reduction="sum").item()
        right += (logits[chosen].argmax(-1) == targets[chosen]).sum().item()
        count += int(chosen.sum())
    found = train.evaluate_masked(net, tokens, T, 5, None, corrupt, False)
    want = {"val_loss": nats / count, "val_acc": right / count, "val_tokens": count}
    assert found == pytest.approx(want, rel=1e-5)


def test_masked_model_learns_and_is_saved_as_our_own_class(data, tmp_path):
    result = train.train(options(data, tmp_path / "mlm", objective="mlm", max_steps=60, lr=1e-2))
    first = records(tmp_path / "mlm")[0]["loss"]
    assert result["val_loss"] < first - 0.8 and result["val_acc"] > 0.15
    assert json.loads((tmp_path / "mlm" / "config.json").read_text())["model_type"] == "octavo"
    assert not load_model(tmp_path / "mlm").config.causal


def test_a_target_ends_a_run_and_all_of_the_text_is_evaluated(data, tmp_path):
    result = train.train(options(data, tmp_path / "run", target_loss=10.0))
    assert saved_state(tmp_path / "run")["at"] == TINY["eval_interval"]  # the first evaluation
    assert result["val_tokens"] == Tokens(data, "val").n - 1


def losses_by_step(monkeypatch, part, whole=9.0) -> None:
    """Let the evaluations over a part of the text find these losses, and those over all of it another."""
    left = iter(part)

    def assess(o, model, val, weights, corrupt, limit):
        return {"val_loss": next(left) if limit else whole, "val_tokens": limit or 1000}

    monkeypatch.setattr(train, "assess", assess)


PATIENT = {"eval_interval": 1, "patience": 2, "lr": 1e-2, "dtype": "fp32"}


def best_of(run) -> dict:
    return json.loads(Path(f"{run}-best", "best.json").read_text())


def test_patience_keeps_the_best_and_stops(data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    losses_by_step(monkeypatch, [3.0, 2.0, 2.0, 2.5, 1.0])
    result = train.train(options(data, run, **PATIENT))
    assert saved_state(run)["at"] == 4 and best_of(run)["val_loss"] == 2.0
    assert "the best is in" in result["stop"] and result["val_loss"] == 9.0  # and all of the text at the end
    short = train.train(options(data, tmp_path / "two", **PATIENT | {"patience": None, "max_steps": 2}))
    assert "stop" not in short
    assert weights(f"{run}-best") == weights(tmp_path / "two") != weights(run)


@pytest.mark.parametrize("last, best", [(1.5, 1.5), (2.5, 2.0)], ids=["better", "worse"])
def test_the_last_evaluation_is_judged_like_the_others(data, tmp_path, monkeypatch, last, best):
    """Over the same part of the text: over all of it the loss is another (here 0.5, which is no better)."""
    run = tmp_path / "run"
    losses_by_step(monkeypatch, [3.0, 2.0, last], whole=0.5)
    result = train.train(options(data, run, max_steps=3, **PATIENT))
    assert result["val_loss"] == 0.5 and best_of(run)["val_loss"] == best
    assert (weights(f"{run}-best") == weights(run)) == (last == best)


def test_a_loss_that_is_no_number_is_never_the_best(data, tmp_path, monkeypatch):
    losses_by_step(monkeypatch, [math.nan, 2.0, math.nan, 1.0, 1.5, 1.5])
    train.train(options(data, tmp_path / "run", **PATIENT))
    assert best_of(tmp_path / "run")["val_loss"] == 1.0


def test_patience_counts_on_after_resume(data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        losses_by_step(patch, [2.0, 3.0])
        kill_at(patch, 3)
        with pytest.raises(Kill):
            train.train(options(data, run, save_interval=1, **PATIENT))
    losses_by_step(monkeypatch, [2.5, 1.0])
    with pytest.raises(UserError, match="leave --eval-tokens at 512"):
        train.train(resumed(train.Options, run, eval_tokens=256))
    train.train(resumed(train.Options, run))
    assert saved_state(run)["at"] == 3 and best_of(run)["val_loss"] == 2.0


def test_out_best_of_another_is_refused_before_training(data, tmp_path, monkeypatch):
    """Whatever OUT-best holds that this run did not write: another run, files of the user's, or a plain file."""
    run = tmp_path / "run"
    train.train(options(data, tmp_path / "other", max_steps=1))
    best = Path(f"{run}-best")

    def refused(o):
        with pytest.raises(UserError, match="--patience keeps the best model in .*run-best.*not this run's"):
            train.train(o)

    shutil.copytree(tmp_path / "other", best)
    before = {p: p.read_bytes() for p in best.rglob("*") if p.is_file()}
    refused(options(data, run, **PATIENT))
    refused(options(data, run, overwrite=True, **PATIENT))
    assert not run.exists() and {p: p.read_bytes() for p in best.rglob("*") if p.is_file()} == before
    train.train(options(data, run, **PATIENT | {"patience": None, "max_steps": 1}))
    refused(resumed(train.Options, run, max_steps=3, patience=2))  # and where patience comes with --resume
    refused(resumed(train.Options, run, max_steps=3, patience=2, overwrite=True))
    shutil.rmtree(best)
    best.mkdir()
    (best / "thesis.txt").write_text("years of work")
    refused(options(data, run, overwrite=True, **PATIENT))
    shutil.rmtree(best)
    best.write_text("a file")
    refused(options(data, run, overwrite=True, **PATIENT))
    best.unlink()
    train.train(options(data, run, overwrite=True, **PATIENT | {"max_steps": 2}))
    shutil.copytree(best, tmp_path / "kept")
    train.train(resumed(train.Options, run, max_steps=4))  # its own
    with pytest.raises(UserError, match="not this run's"):  # a new run of the same name
        shutil.rmtree(run)
        train.train(options(data, run, **PATIENT))
    assert (tmp_path / "kept" / "best.json").read_text().startswith('{"run": ')
    train.train(options(data, f"{run}/", overwrite=True, **PATIENT | {"max_steps": 2}))  # that of its name
    assert not (run / "-best").exists()


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


def test_words_that_cannot_be_written_end_no_run(data, tmp_path, monkeypatch):
    def write(text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model.console(), "_file", SimpleNamespace(write=write, flush=lambda: None, encoding="utf-8"))
    result = train.train(options(data, tmp_path / "run", max_steps=1))
    assert result["val_tokens"] > 0 and saved_state(tmp_path / "run")["finished"]


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
    free = {"init": str(run), "preset": "micro", "n_layer": None, "n_embd": None, "set": []}
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
    assert len(DECLARED) <= 30 and SETTINGS == {"grad_clip", "min_lr", "weight_decay"}


@pytest.mark.slow
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
    free = {"preset": "micro", "n_layer": None, "n_embd": None, "set": []}
    for name in ("\udcff", "\0"):
        with pytest.raises(UserError, match="no name for a folder"):
            train.train(options(data, tmp_path / name))
    with pytest.raises(UserError, match="what it begins with"):
        train.train(options(data, run, init=str(run / "."), overwrite=True, **free))
    best = run.rename(tmp_path / "new-best")
    (best / "best.json").write_text("{}")
    with pytest.raises(UserError, match="which the run begins with"):
        train.train(options(data, tmp_path / "new", init=str(best), overwrite=True, patience=2, **free))


def test_init_starts_from_a_folder(data, tmp_path):
    free = {"preset": "micro", "n_layer": None, "n_embd": None, "seq_len": None, "set": []}
    train.train(options(data, tmp_path / "first", max_steps=40, lr=1e-2))
    train.train(options(data, tmp_path / "second", init=str(tmp_path / "first"), **free))
    first, second = (records(tmp_path / name) for name in ("first", "second"))
    assert second[0]["loss"] < first[0]["loss"] - 0.5
    assert model.load_config(tmp_path / "second") == model.load_config(tmp_path / "first")
    longer = {**free, "seq_len": 64, "set": ["dropout=0.1"]}  # a context and what acts in training may differ
    train.train(options(data, tmp_path / "third", init=str(tmp_path / "first"), **longer))
    assert model.load_config(tmp_path / "third").seq_len == 64
    for changes in ({"preset": "nano"}, {"n_layer": 2}, {"n_embd": 32}, {"set": ["n_head=2"]}):
        with pytest.raises(UserError, match="cannot be chosen"):
            train.train(options(data, tmp_path / "no", init=str(tmp_path / "first"), **{**free, **changes}))
    with pytest.raises(UserError, match="the other --objective"):
        train.train(options(data, tmp_path / "no", init=str(tmp_path / "first"), objective="mlm", **free))
    with pytest.raises(UserError, match="holds no checkpoint"):
        train.train(options(data, tmp_path / "no", init=str(tmp_path / "absent"), **free))
    assert not (tmp_path / "no").exists()


def test_what_a_folder_says_is_kept_when_it_is_trained_on(data, tmp_path):
    """Its chat template and its ends, through --init, OUT-best and --resume."""
    free = {"preset": "micro", "n_layer": None, "n_embd": None, "seq_len": None, "set": []}
    first = tmp_path / "first"
    train.train(options(data, first, max_steps=1))
    said = {"generation_config.json": {"eos_token_id": [3, 5], "top_k": 7},
            "tokenizer_config.json": {"chat_template": "{{ messages }}", "eos_token": "a"}}
    for name, content in said.items():
        (first / name).write_text(json.dumps(content))
    run = tmp_path / "second"
    train.train(options(data, run, init=str(first), max_steps=2, patience=1, eval_interval=1, **free))
    shutil.move(first, tmp_path / "elsewhere")
    train.train(resumed(train.Options, run, max_steps=3, patience=None))
    for folder in (run, f"{run}-best"):
        for name, content in said.items():
            assert json.loads(Path(folder, name).read_text()) == content
        assert model.load_config(folder).eos_ids == {3, 5}


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
    with pytest.raises(UserError, match=rf"^--(set {name}|{name.replace('_', '-')}) is .*(has to be|one of|not).*\.$"):
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
    ({"device": "tpu"}, "auto, cpu, cuda or mps"),
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
    min_lr=-0.1 weight_decay=x weight_decay=-1 batch_ramp=4 fields_set={}
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
             "dtype": "fp16", "warmup_steps": 3, "init": str(run), "doc_mask": True,
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


@pytest.mark.parametrize("change, words", [
    (lambda name, x: None, "is empty"),
    (lambda name, x: None if name.endswith("step") else x, "does not fit"),
    (lambda name, x: None if name.endswith("exp_avg_sq") else x, "does not fit"),
    (lambda name, x: x.half(), "does not fit"),
    (lambda name, x: x.reshape(-1, 1), "does not fit"),
], ids=str)  # fmt: skip
def test_an_optimizers_state_that_is_not_whole_is_refused(change, words, data, tmp_path):
    run = tmp_path / "run"
    train.train(options(data, run, n_layer=1, max_steps=1, eval_tokens=64))
    path = run / "state" / "optimizer.safetensors"
    tensors = {name: change(name, x) for name, x in load_state(run)[0].items()}
    save_file({name: x for name, x in tensors.items() if x is not None}, path)
    assert words in refusal(COMMAND, "--resume", run, "--max-steps", 3)


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


def test_names_in_brackets_are_shown_as_they_are(data, tmp_path, monkeypatch, capsys):
    """Folders' names are no markup: neither [red] nor :-1: nor [/]."""
    monkeypatch.setattr(train, "report", REPORT)
    monkeypatch.setenv("COLUMNS", "300")
    names = [tmp_path / name for name in ("a[red]", "b:-1:x", "c[/]")]
    for name in names[:2]:
        shutil.copytree(data, name)
    train.train(options(names[0], names[2], data=[f"{name}:1" for name in names[:2]]))
    shown = capsys.readouterr().err.replace("\n", "")
    for name in (*names, "val_loss_a[red]", "val_loss_b:-1:x"):
        assert str(name) in shown


def test_a_curve_of_anything():
    def log(*losses, val=()):
        lines = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
        return lines + [{"step": len(losses), "val_loss": loss} for loss in val]

    assert train.curve(log(3.0)) == ""
    shown = train.curve(log(4.0, 2.0, val=[3.0]), width=9, height=3).splitlines()
    assert shown[:3] == ["  4.00 │·", "  3.00 │        o", "  2.00 │        ·"]
    for strange in (math.nan, math.inf, -math.inf, None):
        assert "o val" in train.curve(log(3.0, strange, 2.0, val=[strange, 1.0]))
        assert train.curve(log(strange, strange, val=[strange])) == ""
    assert "o val" in train.curve(log(2.0, 2.0))  # a flat one


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_few_file_descriptors_are_no_traceback_after_training(data, tmp_path):
    run = tmp_path / "run"
    code = (f"import resource, sys; sys.path.insert(0, {str(Path(train.__file__).parent)!r}); import train, model\n"
            "def cut(*args):\n"
            "    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))\n"
            "    return real(*args)\n"
            "real, train.report = train.report, cut\n"
            "model.run_app(lambda: train.train(train.Options(**%r)))")
    sizes = TINY | {"data": [str(data)], "out": str(run), "max_steps": 1}
    done = subprocess.run([sys.executable, "-c", code % sizes], capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    load_model(run)


def test_help_names_every_option_and_a_wrong_type_is_a_usage_error(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    app = typer.Typer()
    app.command()(COMMAND)
    shown = CliRunner().invoke(app, ["--help"]).output
    assert all(f"--{name.replace('_', '-')}" in shown for name in DECLARED)
    wrong = CliRunner().invoke(app, ["--max-steps", "many"])
    assert wrong.exit_code == 2 and "--max-steps" in wrong.output and "integer" in wrong.output
