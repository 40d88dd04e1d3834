"""train.py: the ideas by hand-worked numbers, the command by what it leaves behind."""

import errno
import json
import math
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import command, prepare, wait_for

import model
import train
from model import IGNORE, Tokens, UserError, load_model

TINY = dict(preset="nano", n_layer=2, n_head=2, n_embd=32, seq_len=32, max_steps=6, tokens_per_step=256, warmup_steps=2,
            eval_interval=3, eval_tokens=512, save_interval=2, device="cpu")  # fmt: skip


def options(data, out, **changes):
    return train.Options(**{**TINY, "data": (str(data),), "out": str(out), **changes})


def flags(data, out, **changes):
    given = {**TINY, "data": data, "out": out, **changes}
    return [a for k, v in given.items() for a in (f"--{k.replace('_', '-')}", v)]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(train, "report", lambda this: None)  # pictures and samples: in the tests of the command


def weights(folder):
    return (Path(folder) / "model.safetensors").read_bytes()


# --- the ideas ---


def test_schedule():
    warm = [train.lr_at(s, 100, 10) for s in range(10)]
    assert warm == pytest.approx([i / 10 for i in range(1, 11)])
    for schedule in ("cosine", "wsd"):  # the chapter's cosine ends at zero; its text says a tenth, and so do we
        values = [train.lr_at(s, 100, 10, schedule) for s in range(100)]
        assert values[-1] == pytest.approx(0.1) and max(values) == 1.0
        assert all(a >= b for a, b in zip(values[10:], values[11:], strict=False))
    assert train.lr_at(54, 100, 10, "cosine") == pytest.approx(0.55)
    wsd = [train.lr_at(s, 100, 10, "wsd", 0.0) for s in range(100)]
    assert set(wsd[10:63]) == {1.0} and wsd[-1] == 0.0
    assert train.lr_at(99, 100, 10, "constant") == 1.0


def test_batch_ramp():
    sizes = [train.windows_at(s, 64, 10, world=4) for s in range(12)]
    assert sizes[0] == 8 and sizes[10:] == [64, 64] and sizes == sorted(sizes)
    assert all(s % 4 == 0 for s in sizes)


def test_masking_is_berts():
    x = torch.randint(0, 50, (64, 512))
    inputs, targets = train.mask_tokens(x, 60, 50, [(0, i) for i in range(64)])
    chosen = targets != IGNORE
    assert torch.equal(targets[chosen], x[chosen])
    assert torch.equal(inputs[~chosen], x[~chosen])
    assert chosen.float().mean().item() == pytest.approx(0.15, abs=0.01)
    assert (inputs[chosen] == 60).float().mean().item() == pytest.approx(0.8, abs=0.02)
    # a random token is the token itself once in 50 times
    assert (inputs[chosen] == x[chosen]).float().mean().item() == pytest.approx(0.1 + 0.1 / 50, abs=0.02)
    again = train.mask_tokens(x[5:6], 60, 50, [(0, 5)])
    assert torch.equal(again[0], inputs[5:6]) and torch.equal(again[1], targets[5:6])  # of the row, not of the batch


def test_mixture_keeps_its_weights_and_each_source_its_order():
    mixture, taken, plan = train.Mixture([None, None], [3.0, 1.0], 0), [0, 0], []
    for step in range(200):
        rows, taken = mixture.draw(step, 10, taken)
        plan += rows
    assert taken[0] / 2000 == pytest.approx(0.75, abs=0.04) and sum(taken) == 2000
    for source in (0, 1):
        assert [p for s, p in plan if s == source] == list(range(taken[source]))


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


def make_step(data, **changes):
    o = options(data, "unused", dtype="fp32", **changes)
    tokens = Tokens(data, "train")
    config = train.make_config(o, tokens)
    ranks = model.Ranks()
    train.derive(o, config, 1, ranks.device)
    m, optimizer = train.open_model(o, config, ranks, None, {})
    return train.Step(o, m, optimizer, train.Mixture([tokens], [1.0], 0), ranks)


def gradient(step, at=0):
    batches, _ = step.load(at, [0])
    step.backward(batches, at)
    return {n: p.grad.clone() for n, p in step.model.named_parameters()}


@pytest.mark.parametrize("changes", [{}, {"objective": "mlm"}, {"doc_mask": True}], ids=["clm", "mlm", "doc_mask"])
def test_micro_batches_give_the_gradient_of_the_whole(data, changes):
    """Also when they hold unequal numbers of targets (mlm) or are of unequal size (3 + 3 + 2 sequences)."""
    whole = gradient(make_step(data, micro_batch=8, **changes))
    for size in (1, 3):
        parts = gradient(make_step(data, micro_batch=size, **changes))
        for name, g in whole.items():
            assert (parts[name] - g).norm() <= 1e-5 * g.norm(), name


@pytest.mark.parametrize("recompute", ["block", "selective"])
def test_recomputation_changes_nothing(data, recompute):
    whole, again = gradient(make_step(data)), gradient(make_step(data, recompute=recompute))
    assert all(torch.equal(whole[n], again[n]) for n in whole)


def test_mup_scales_steps_and_logits(data):
    """Of twice the base width: half AdamW's rate on matrices, 1/sqrt(2) Muon's, logits halved; saved as a stock class."""
    base, wide = make_step(data, optimizer="adamw"), make_step(data, optimizer="adamw", n_embd=64, mup_base=32)

    def scale(s):
        groups = [g for part in s.optimizer.parts for g in part.param_groups]
        return {s.optimizer.names[p]: g["lr_scale"] for g in groups for p in g["params"]}

    assert set(scale(base).values()) == {1.0}
    assert scale(wide)["layers.0.mlp.up_proj.weight"] == 0.5 and scale(wide)["embed_tokens.weight"] == 1.0
    assert wide.model.norm.weight[0] == 0.5
    assert wide.model.config.to_hf()["architectures"] == ["Qwen3ForCausalLM"]
    muon = make_step(data, optimizer="muon", n_embd=64, mup_base=32)
    assert scale(muon)["layers.0.mlp.up_proj.weight"] == pytest.approx(2**-0.5)


# --- runs ---


def test_a_run_learns_and_leaves_a_folder(data, tmp_path):
    o = options(data, tmp_path / "run", max_steps=60, lr=1e-2, eval_interval=20)
    result = train.run(o)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "loss" in r]
    assert [r["step"] for r in steps] == list(range(1, 61))
    assert {"loss", "grad_norm", "lr", "ms_per_step", "tok_per_s", "mfu"} <= steps[0].keys()
    assert steps[0]["loss"] > 4 > 3.2 > result["val_loss"]
    assert result["val_tokens"] == Tokens(data, "val").n - 1  # the last evaluation takes all of the text
    files = {p.name for p in (tmp_path / "run").iterdir()}
    assert files >= {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json",
                     "tokenizer_config.json", "metrics.jsonl", "state"}  # fmt: skip
    m = load_model(tmp_path / "run")
    loss = model.evaluate(m, Tokens(data, "val"), 32)["val_loss"]
    assert loss == pytest.approx(result["val_loss"], abs=0.02)  # the run evaluated in bfloat16


CASES = {
    "fp32": dict(dtype="fp32"),
    "bf16": dict(dtype="bf16"),
    "adamw, accumulation": dict(optimizer="adamw", micro_batch=3),
    "mlm, dropout": dict(objective="mlm", dropout=0.2),
    "ramp, fp16": dict(batch_ramp=4, dtype="fp16"),
    "recompute, doc_mask, wsd": dict(recompute="block", doc_mask=True, schedule="wsd"),
}


class Kill(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("case", CASES)
def test_resume_is_exact(data, tmp_path, monkeypatch, case):
    whole = options(data, tmp_path / "whole", **CASES[case])
    train.run(whole)
    calls, step = [0], train.Step.__call__

    def stop_at_five(self, *args):
        calls[0] += 1
        if calls[0] == 5:
            raise Kill
        return step(self, *args)

    monkeypatch.setattr(train.Step, "__call__", stop_at_five)
    with pytest.raises(Kill):
        train.run(options(data, tmp_path / "cut", **CASES[case]))
    train.run(train.resumed(str(tmp_path / "cut"), {}), resume=str(tmp_path / "cut"))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    losses = [[json.loads(s).get("loss") for s in (tmp_path / d / "metrics.jsonl").read_text().splitlines()]
              for d in ("cut", "whole")]  # fmt: skip
    assert losses[0] == losses[1]


def test_resume_of_a_mixture_is_exact(data, text, tmp_path):
    other = prepare(tmp_path / "other", text[:30_000], "--tokenizer", data / "tokenizer.json", "--val-fraction", "0.1")
    both = (f"{data}:3", f"{other}:1")
    run = {**TINY, "data": both, "schedule": "constant"}
    train.run(train.Options(**{**run, "out": str(tmp_path / "whole")}))
    train.run(train.Options(**{**run, "out": str(tmp_path / "cut"), "max_steps": 4}))
    train.run(train.resumed(str(tmp_path / "cut"), {"max_steps": 6}), resume=str(tmp_path / "cut"))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert min(model.load_state(tmp_path / "cut")[1]["taken"]) > 0  # both were drawn from


def kill_and_resume(data, folder, kills, seed, **changes):
    """Run the command, SIGKILL it at random moments, resume each time; -> the final weights."""
    rng, killed = random.Random(seed), 0
    args = flags(data, folder, **changes)
    while True:
        resume = (folder / "config.json").exists() or folder.with_name(folder.name + ".old").exists()
        args = ["--resume", folder] if resume else flags(data, folder, **changes)
        moment = rng.uniform(2.0, 6.0) if killed < kills else None
        code, _, err = command("train.py", *args, kill_after=moment)
        if code == -signal.SIGKILL:
            killed += 1
        else:
            assert code == 0 or "is finished" in err, err
            return killed, weights(folder)


def test_a_killed_command_resumes_to_the_same_bits(data, tmp_path):
    train.run(options(data, tmp_path / "whole", max_steps=300, save_interval=5, eval_interval=300))
    killed, found = kill_and_resume(data, tmp_path / "cut", 2, 0, max_steps=300, save_interval=5, eval_interval=300)
    assert killed == 2 and found == weights(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"optimizer": "adamw", "dtype": "fp32", "micro_batch": 3}], ids=["muon bf16", "adamw fp32"])
def test_twenty_kills(data, tmp_path, changes):
    sizes = dict(max_steps=3000, save_interval=2, eval_interval=500, **changes)  # it is saving half of the time
    train.run(options(data, tmp_path / "whole", **sizes))
    killed, found = kill_and_resume(data, tmp_path / "cut", 20, 1, **sizes)
    assert killed == 20 and found == weights(tmp_path / "whole")


def test_ctrl_c_saves_and_says_how_to_go_on(data, tmp_path):
    import subprocess
    import sys

    args = flags(data, tmp_path / "run", max_steps=100000, save_interval=100000, eval_interval=100000)
    process = subprocess.Popen([sys.executable, str(Path(train.__file__)), *map(str, args)], stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run" / "metrics.jsonl")
    while len((tmp_path / "run" / "metrics.jsonl").read_text()) < 300:  # some steps done
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    assert f"--resume {tmp_path / 'run'}" in err.replace("\n", " ")
    assert model.load_state(tmp_path / "run")[1]["at"] > 0


def test_two_ranks_give_what_one_gives(data, tmp_path):
    # AdamW: Muon makes its update orthogonal in bfloat16, which turns float noise into 4e-3
    sizes = dict(dtype="fp32", micro_batch=3, max_steps=5, objective="mlm", optimizer="adamw", lr=1e-3)
    train.run(options(data, tmp_path / "one", **sizes))
    code, _, err = command("train.py", *flags(data, tmp_path / "two", **sizes), ranks=2, env={"OMP_NUM_THREADS": "1"})
    assert code == 0, err
    one, two = ([json.loads(s) for s in (tmp_path / d / "metrics.jsonl").read_text().splitlines()] for d in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "grad_norm"):
            if key in a:
                assert a[key] == pytest.approx(b[key], rel=2e-4)
    a, b = load_model(tmp_path / "one"), load_model(tmp_path / "two")
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (p - q).norm() <= 1e-4 * p.norm(), name
    # and goes on as one process, in the same order of the data
    train.run(train.resumed(str(tmp_path / "two"), {"max_steps": 7}), resume=str(tmp_path / "two"))
    train.run(train.resumed(str(tmp_path / "one"), {"max_steps": 7}), resume=str(tmp_path / "one"))
    ends = [json.loads((tmp_path / d / "metrics.jsonl").read_text().splitlines()[-2])["loss"] for d in ("one", "two")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-3)


def test_masked_model_learns_and_is_saved_as_our_own_class(data, tmp_path):
    result = train.run(options(data, tmp_path / "mlm", objective="mlm", max_steps=60, lr=1e-2))
    first = json.loads((tmp_path / "mlm" / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert result["val_loss"] < first - 0.8 and result["val_acc"] > 0.15
    assert json.loads((tmp_path / "mlm" / "config.json").read_text())["model_type"] == "octavo"
    assert not load_model(tmp_path / "mlm").config.causal


def test_target_and_patience(data, tmp_path):
    run = tmp_path / "run"
    train.run(options(data, run, target_loss=10.0))
    assert model.load_state(run)[1]["at"] == TINY["eval_interval"]  # the first evaluation
    train.run(options(data, tmp_path / "stop", lr=1.0, max_steps=300, eval_interval=1, patience=2))
    assert model.load_state(tmp_path / "stop")[1]["at"] < 300
    values = [json.loads(s)["val_loss"] for s in (tmp_path / "stop" / "metrics.jsonl").read_text().splitlines() if "val_loss" in s]
    best = load_model(f"{tmp_path / 'stop'}-best")
    best.compute_dtype = model.pick_dtype("auto", torch.device("cpu"))
    loss = model.evaluate(best, Tokens(data, "val"), 32, 8, TINY["eval_tokens"])["val_loss"]
    assert loss == pytest.approx(min(values), abs=1e-3)


def test_dropout_acts_in_training_only(data, tmp_path):
    plain, dropped = gradient(make_step(data)), gradient(make_step(data, dropout=0.5))
    assert any(not torch.equal(plain[n], dropped[n]) for n in plain)
    step = make_step(data, dropout=0.5)
    a, b = (model.evaluate(step.model, Tokens(data, "val"), 32, limit=512)["val_loss"] for _ in range(2))
    assert a == b


# --- what can go wrong ---


def poison(monkeypatch, steps):
    """Make the loss NaN at these calls of the training step."""
    real, count = train.Step.backward, [0]

    def backward(self, batches, step):
        total, *rest = real(self, batches, step)
        count[0] += 1
        return (total * float("nan") if count[0] in steps else total), *rest

    monkeypatch.setattr(train.Step, "backward", backward)


def test_a_nan_step_is_skipped_and_counted(data, tmp_path, monkeypatch):
    poison(monkeypatch, {2, 4})
    train.run(options(data, tmp_path / "run", grad_clip=1.0))
    assert model.load_state(tmp_path / "run")[1]["skipped"] == 2
    assert all(p.isfinite().all() for p in load_model(tmp_path / "run").parameters())


def test_nans_that_stay_stop_the_run_and_name_the_good_checkpoint(data, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(4, 100)))
    with pytest.raises(UserError, match="up to step 8.*holds step [46]"):
        train.run(options(data, tmp_path / "run", max_steps=50))
    assert all(p.isfinite().all() for p in load_model(tmp_path / "run").parameters())


def test_fp16_halves_its_scale_on_overflow(data):
    step = make_step(data)
    step.o.dtype, step.scale = "fp16", 2.0**127
    step.prefetch(0, [0])
    before = [p.clone() for p in step.model.parameters()]
    step(0, 1e-3, False)
    assert step.scale == 2.0**126 and step.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(before, step.model.parameters(), strict=True))


def test_full_disk_keeps_the_last_checkpoint(data, tmp_path, monkeypatch):
    real, count = model.save_tensors, [0]

    def full(path, tensors, metadata=None):
        count[0] += 1
        if count[0] > 4:  # two files a checkpoint: the third one fails
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, tensors, metadata)

    monkeypatch.setattr(model, "save_tensors", full)
    with pytest.raises(UserError, match="No space left.*is whole"):
        train.run(options(data, tmp_path / "run"))
    assert model.load_state(tmp_path / "run")[1]["at"] == 2
    assert not (tmp_path / "run.new").exists()


def test_metrics_that_cannot_be_written(data, tmp_path, monkeypatch):
    real = train.Log.open

    def broken(self):
        real(self)
        self.file.close()
        self.file = open("/dev/full", "w")

    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    monkeypatch.setattr(train.Log, "open", broken)
    with pytest.raises(UserError, match="metrics.jsonl cannot be written"):
        train.run(options(data, tmp_path / "run"))
    load_model(tmp_path / "run")


def test_data_that_shrinks_underneath(data, tmp_path, monkeypatch):
    copy = shutil.copytree(data, tmp_path / "copy")
    real = train.Run.evaluate

    def shrink(self, limit):
        (copy / "train.bin").write_bytes(b"")
        real(self, limit)

    monkeypatch.setattr(train.Run, "evaluate", shrink)
    with pytest.raises(UserError, match="became shorter"):
        train.run(options(copy, tmp_path / "run", max_steps=40))
    load_model(tmp_path / "run")


def test_compile_that_fails_is_a_line(data, tmp_path, monkeypatch):
    def broken(self):
        for block in self.layers.values():
            block._compiled_call_impl = lambda *a, **k: (_ for _ in ()).throw(RuntimeError("no C++ compiler"))

    monkeypatch.setattr(model.Transformer, "compile_blocks", broken)
    train.run(options(data, tmp_path / "compiled", compile="on"))
    train.run(options(data, tmp_path / "plain", compile="off"))
    assert weights(tmp_path / "compiled") == weights(tmp_path / "plain")


BAD = [
    (dict(n_head=3, n_embd=32), "does not divide into 3 heads"),
    (dict(n_head=4, n_kv_head=3), "cannot share 3 key-value heads"),
    (dict(preset="huge"), "--preset is one of"),
    (dict(tokens_per_step=8), "does not divide into sequences"),
    (dict(seq_len=500_000, tokens_per_step=500_000), "lower --seq-len"),
    (dict(optimizer="sgd"), "adamw or muon"),
    (dict(dtype="fp8"), "--dtype is one of"),
    (dict(schedule="linear"), "--schedule is one of"),
    (dict(objective="nsp"), "--objective is one of"),
    (dict(lr=0.0), "--lr has to be above zero"),
    (dict(dropout=1.0), "not a share"),
    (dict(data=("nowhere",)), "no data folder nowhere"),
    (dict(device="tpu"), "cannot be used here"),
]


@pytest.mark.parametrize("changes, words", BAD, ids=[w for _, w in BAD])
def test_bad_options_are_a_sentence(data, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        train.run(train.Options(**{**TINY, "data": (str(data),), "out": str(tmp_path / "run"), **changes}))
    assert not (tmp_path / "run").exists()


def test_other_peoples_data_and_folders(data, text, tmp_path):
    run = str(tmp_path / "run")
    train.run(options(data, run))
    before = weights(run)
    with pytest.raises(UserError, match="holds a run already"):
        train.run(options(data, run))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="not a checkpoint folder"):
            train.run(options(data, tmp_path / "mine"), overwrite=overwrite)
    with pytest.raises(UserError, match="is finished"):
        train.resumed(run, {})
    with pytest.raises(UserError, match="--lr cannot change"):
        train.resumed(run, {"lr": 1.0, "max_steps": 10})
    with pytest.raises(UserError, match="holds no checkpoint"):
        train.resumed(str(tmp_path / "nothing"), {})
    copy = shutil.copytree(data, tmp_path / "copy")
    (copy / "val.bin").write_bytes((copy / "val.bin").read_bytes()[:-3])
    with pytest.raises(UserError, match="cut off"):
        train.run(options(copy, tmp_path / "other"))
    ids = np.fromfile(data / "train.bin", "<u2")
    ids[len(ids) // 2 :] = 60_000
    copy = shutil.copytree(data, tmp_path / "beyond")
    ids.tofile(copy / "train.bin")
    with pytest.raises(UserError, match="beyond the vocabulary"):
        train.run(options(copy, tmp_path / "other", max_steps=200))
    other = prepare(tmp_path / "bpe", text, "--vocab-size", "300", "--val-fraction", "0.1")
    with pytest.raises(UserError, match="different tokenizers"):
        train.run(train.Options(**{**TINY, "data": (str(data), str(other)), "out": str(tmp_path / "both")}))
    state = Path(run, "state", "state.json")
    changed = state.read_text().replace(json.dumps(str(data)), json.dumps(str(other)))
    state.write_text(changed.replace('"finished": true', '"finished": false'))
    with pytest.raises(UserError, match="not what .* was trained on"):
        train.run(train.resumed(run, {}), resume=run)
    assert weights(run) == before


def test_the_command_line(data, tmp_path):
    """One real call: exit code, the words for people, and a refusal with exit code 2 that keeps the folder."""
    args = flags(data, tmp_path / "run", noise_scale=None)
    args = [a for a in args if a is not None]
    code, out, err = command("train.py", *args)
    assert code == 0 and out == "", err
    for words in ("Qwen3ForCausalLM", "val loss", "bits per byte", "critical batch", "· train   o val", "A sample"):
        assert words in err, words
    before = weights(tmp_path / "run")
    code, _, err = command("train.py", *args)
    assert code == 2 and err.startswith("error: ") and len(err.strip().splitlines()) == 1, err
    assert weights(tmp_path / "run") == before
    code, _, err = command("train.py", "--resume", tmp_path / "nothing")
    assert code == 2 and "holds no checkpoint" in err
    code, _, err = command("train.py", "--max-steps", "many")
    assert code == 2 and "Traceback" not in err
    code, out, _ = command("train.py", "--help")
    assert code == 0 and "--target-loss" in out
