"""Test bench.py: the measures by things of known size, the commands by what they print; never a speed."""

import doctest
import itertools
import json
import lzma
import math
import subprocess
import sys
import time

from model import PRESETS, Cache, Config, Transformer, UserError, resize, save_checkpoint

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, call, command, refusal

import bench
import model
from bench import CLAIMS, alternate, bytes_per_step, counting_batches, peak_bytes, plain_attention, spread

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Measures without the time that makes them good."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "peak_flops", lambda *_: 1e12)
    monkeypatch.setattr(bench, "read_rate", lambda *_: 1e10)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models wait for a second thread more than it helps them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def printed(capsys):
    return json.loads(capsys.readouterr().out)


# --- how it is measured ---


def test_worked_examples():
    result = doctest.testmod(bench)
    assert result.attempted and not result.failed


def test_jobs_take_turns():
    turns = []
    jobs = {"a": lambda: turns.append("a"), "b": lambda: (turns.append("b"), time.sleep(0.01))}
    seconds = alternate(jobs, 3, CPU)
    assert turns == ["a", "b"] * 4
    assert [len(s) for s in seconds.values()] == [3, 3]  # the first round does not count
    assert min(seconds["b"]) >= 0.01 > max(seconds["a"])
    assert spread([3.0, 1.0, 8.0], 2.0) == {"median": 6.0, "low": 2.0, "high": 16.0}


def test_peak_bytes_counts_what_lives_at_one_time():
    x = torch.ones(1000)  # 4 kB

    def job():
        a = x + 1  # 4
        b = a * 2  # 8
        del a  # 4
        c = b + b + b  # 12, with the sum of two that does not last
        return (b.view(10, 100), c.mul_(2))  # views and changes in place take nothing

    assert peak_bytes(job, [x]) == 12_000

    def views():
        x.view(10, 100).t()
        kept = x + 1  # 4
        (x + 2).sum()  # 8, and a number
        return kept

    assert peak_bytes(views, [x]) == 8_004


def test_peak_bytes_of_a_backward_pass():
    """Ten squares keep their ten inputs; recomputed by halves, those of five and one more."""
    x = torch.ones(1000, requires_grad=True)

    def run(y, halves):
        def squares(y):
            for _ in range(5):
                y = y.square()
            return y

        for _ in range(2):
            y = torch.utils.checkpoint.checkpoint(squares, y, use_reentrant=False) if halves else squares(y)
        torch.autograd.grad(y.sum(), x)

    whole, halves = (peak_bytes(lambda h=h: run(x, h), [x]) for h in (False, True))
    assert 40_000 <= whole <= 56_000 and 24_000 <= halves <= 40_000 and halves < whole


def test_plain_attention_is_the_flash_one():
    q, k, v = torch.randn(3, 2, 4, 33, 16)
    flash = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(plain_attention(q, k, v), flash)


def test_bytes_per_step():
    config = PRESETS["micro"].replace(vocab_size=4096)
    net = Transformer(config)
    matrices = sum(p.numel() for p in net.parameters() if p.dim() == 2)  # the embedding is the output matrix
    cache = Cache(config, 3, 100, dtype=torch.bfloat16)
    assert bytes_per_step(config, 3, 100, 2) == 2 * matrices + cache.k.nbytes + cache.v.nbytes


def test_counting_text_can_be_learned():
    x, y = next(counting_batches(16, 64, 32, seed=0))
    assert x.shape == y.shape == (64, 32) and torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal((2 * x[:, 1:] - x[:, :-1]) % 16, y[:, 1:])  # each row goes on by its own step


# --- the commands ---


def test_machine(capsys):
    facts = bench.machine(device="cpu", as_json=True)
    assert printed(capsys) == facts
    assert [row["rate"] for row in facts["rows"]] == [1e3, 1e3, 10]
    assert facts["threads"] == torch.get_num_threads() and facts["torch"] == torch.__version__
    assert facts["name"]
    bench.machine(device="cpu")
    assert "GFLOP/s" in capsys.readouterr().out


def test_read_rate_is_of_this_world(monkeypatch):
    monkeypatch.undo()
    assert 1e8 < bench.read_rate(CPU) < 1e13


TINY = dict(preset="nano", n_layer=1, n_embd=64, seq_len=16, batch=2, device="cpu")


def test_train(capsys):
    facts = bench.train(**TINY, steps=2, as_json=True)
    assert printed(capsys) == facts
    config = resize("nano", 1, 64, 16, vocab_size=4096)  # the model that train.py trains
    assert facts["rows"][0]["speedup"] == 1  # the others are compared with it
    assert facts["params"] == sum(p.numel() for p in Transformer(config).parameters())
    for row in facts["rows"]:
        ms = row["ms_per_step"]
        assert ms["low"] <= ms["median"] <= ms["high"]
        assert row["tok_per_s"] == pytest.approx(32e3 / ms["median"])
        assert row["mfu"] == pytest.approx(row["tok_per_s"] * model.flops_per_token(config, 16) / 1e12)
    rows = bench.train(**TINY, steps=1, dtype="fp32", optimizer="adamw")["rows"]
    assert [row["dtype"] for row in rows] == ["fp32"]


def test_train_against_transformers():
    pytest.importorskip("transformers", reason="transformers is the other side of this race")
    facts = bench.train(**TINY, steps=1, vs="transformers", dtype="bf16", as_json=True)
    rows = facts["rows"]
    assert [row["model"] for row in rows] == ["octavo", "transformers"] and rows[1]["speedup"] == 1
    ours, theirs = (row["ms_per_step"]["median"] for row in rows)
    assert rows[0]["speedup"] == pytest.approx(theirs / ours)
    assert facts["optimizer"] == "adamw"  # on both sides
    with pytest.raises(UserError, match="transformers has no muon"):
        bench.train(**TINY, steps=1, vs="transformers", optimizer="muon")


def test_both_sides_of_a_race_are_compiled(monkeypatch):
    pytest.importorskip("transformers", reason="transformers is the other side of this race")
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *_, **__: compiled.append(type(self).__name__))
    facts = bench.train(**TINY, steps=1, vs="transformers", dtype="fp32", compiled=True, as_json=True)
    assert facts["compile"] and compiled == ["Block", "Qwen3ForCausalLM"]


def test_decode(tmp_path, capsys):
    sizes = dict(vocab_size=64, seq_len=32, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, head_dim=8)
    sizes["ffn_dim"] = 24
    (tmp_path / "vocab.json").write_text("{}")
    save_checkpoint(tmp_path / "a", Transformer(Config(**sizes)).init_weights(), tmp_path / "vocab.json")
    options = dict(batch=[1, 3], prompt=8, new=8, rounds=2, device="cpu", dtype="fp32")
    facts = bench.decode(tmp_path / "a", **options, as_json=True)
    assert printed(capsys) == facts and [row["batch"] for row in facts["rows"]] == [1, 3]
    for row in facts["rows"]:
        assert row["tok_per_s"] == pytest.approx(row["batch"] * 1e3 / row["ms_per_token"]["median"])
        size = bytes_per_step(Config(**sizes), row["batch"], 12, 4)
        assert row["of_bandwidth"] == pytest.approx(size * row["tok_per_s"] / row["batch"] / 1e10)
    bench.decode(preset="nano", batch=[2], prompt=4, new=2, rounds=1, device="cpu", dtype="bf16")
    assert "bf16" in capsys.readouterr().out


@pytest.mark.slow
def test_claims(capsys):
    results = bench.claims(quick=True, device="cpu", as_json=True)
    assert printed(capsys) == results and list(results) == list(CLAIMS)
    assert all(result["claim"] and result["finding"] and result["rows"] for result in results.values())
    # what does not depend on the speed of a machine
    short, *_, long = results["flash-attention"]["rows"]
    doublings = long["T"] / short["T"]
    assert long["plain_mb"] / short["plain_mb"] > doublings**2 * 0.8  # quadratic memory
    assert long["flash_mb"] / short["flash_mb"] == pytest.approx(doublings, rel=0.1)  # linear
    none, block = (row["peak_mb"] for row in results["recompute"]["rows"])
    assert block < none
    *_, cold, warm = (row["largest_rise"]["median"] for row in results["warmup"]["rows"])
    assert warm < cold
    bench.show("tables", results["warmup"]["rows"])
    assert "largest rise" in capsys.readouterr().out


def test_warmup_run(monkeypatch):
    """The rise is above the lowest loss so far, not between neighbours."""
    config = PRESETS["nano"].replace(vocab_size=256, n_layer=1)
    losses = iter([5.0, 3.0, 4.0, 4.5, 2.0, 2.1])
    forward = Transformer.forward

    def told(self, x, y):
        return forward(self, x, y)[0] * 0 + next(losses), None

    monkeypatch.setattr(Transformer, "forward", told)
    batches = itertools.islice(counting_batches(256, 2, 8, 0), 6)
    facts = bench.warmup_run(config, 0.01, 2, batches, 0, CPU)
    assert facts == {"largest_rise": 1.5, "last_loss": pytest.approx(2.1)}


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: bench.train(preset="huge"), "--preset"), (lambda: bench.train(n_embd=99), "head_dim"),
        (lambda: bench.train(steps=0), "--steps"), (lambda: bench.train(vs="jax"), "--vs"),
        (lambda: bench.train(optimizer="sgd", preset="nano", device="cpu"), "--optimizer"),
        (lambda: bench.train(n_layer=0), "n_layer"), (lambda: bench.decode(batch=[0]), "--batch"),
        (lambda: bench.decode("nowhere", device="cpu"), "no checkpoint"),
        (lambda: bench.claims(["magic"]), "magic"), (lambda: bench.xz("nowhere"), "is missing"),
        (lambda: bench.machine(device="abacus"), "abacus"), (lambda: bench.decode(dtype="fp8"), "--dtype"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(UserError, match=words):
        call()


def test_plot_shows_what_was_logged(tmp_path, capsys):
    for name, values in (("a", [1.0, 3.0, 2.0]), ("b", [5.0, 4.0])):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"step": i + 1, "loss": x, "kind": "x"}) + "\n" for i, x in enumerate(values)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(lines) + '{"step": 9, "lo')  # it was killed
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    bench.plot(folders, of=["loss"], out=tmp_path / "p.png", as_json=True)
    rows = printed(capsys)["rows"]
    found = [(r["first"], r["lowest"], r["highest"], r["last"], r["steps"]) for r in rows]
    assert found == [(1, 1, 3, 2, 3), (5, 4, 5, 4, 2)]
    with pytest.raises(UserError, match="No run logged 'reward'; they logged loss, step"):
        bench.plot(folders, of=["reward"], out=tmp_path / "p.png")
    with pytest.raises(UserError, match="no folder of a run"):
        bench.plot([str(tmp_path / "c")], of=["loss"], out=tmp_path / "p.png")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "metrics.jsonl").write_text('{"loss": 1}\n{"step": "x", "loss": 1}\n')  # without steps
    with pytest.raises(UserError, match="they logged nothing"):
        bench.plot([str(tmp_path / "d")], of=["loss"], out=tmp_path / "p.png")


def test_plot_draws_where_it_can(tmp_path, capsys, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    picture = tmp_path / "new" / "p.png"
    with monkeypatch.context() as patch:
        for name in ("matplotlib", "matplotlib.figure"):
            patch.setitem(sys.modules, name, None)  # as where it is not installed
        bench.plot([str(tmp_path)], of=["loss"], out=picture)
    out, err = capsys.readouterr()
    assert "pip install matplotlib" in err and "highest" in out and not picture.exists()
    pytest.importorskip("matplotlib")
    bench.plot([str(tmp_path)], of=["loss"], out=picture)
    assert picture.read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "file").touch()
    (tmp_path / "d.png").mkdir()
    for out in (tmp_path / "d.png", tmp_path / "p.xyz", tmp_path / "file" / "p.png"):
        with pytest.raises(UserError, match="could not be drawn"):
            bench.plot([str(tmp_path)], of=["loss"], out=out)


TRAIN = ["n-layer", "n-embd", "seq-len", "batch", "steps"]
COUNTS = [("train", name) for name in TRAIN]
COUNTS += [("decode", name) for name in ("batch", "prompt", "new", "rounds")]


@pytest.mark.parametrize("number", ["0", "-1", "999999999999"])
@pytest.mark.parametrize("name, option", COUNTS)
def test_numbers_that_make_no_sense(name, option, number):
    """Each is one sentence that names the option, before anything is measured."""
    with pytest.raises(UserError, match=option.replace("-", "[-_]")):
        call(bench.app, name, "--preset", "nano", "--device", "cpu", "--dtype", "fp32", f"--{option}={number}")


def test_more_than_memory_holds():
    with pytest.raises(UserError, match="tokens"):
        bench.train(preset="nano", batch=2**20, device="cpu")
    with pytest.raises(UserError, match="memory"):
        bench.train(preset="llama-2-70b", batch=1, n_layer=9_999, device="cpu")
    with pytest.raises(UserError, match="memory"):
        bench.decode(preset="llama-2-70b", device="cpu")


@pytest.mark.slow
def test_few_open_files_are_no_traceback(tmp_path, files=40):
    """A limit on open files, as some systems have it, ends in a sentence or in the result."""
    pytest.importorskip("resource", reason="Windows has no such limit")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    code = f"import resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files})); "
    code += f"sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['bench.py', 'plot', '.']; "
    code += "import runpy; runpy.run_path(sys.path[0] + '/bench.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr, done.stderr


# --- long texts ---


@pytest.fixture(scope="module")
def readers(tmp_path_factory, modules):
    """Folders of models for `modules` with random weights, "trained" at 64 tokens: {name: folder}."""
    home = tmp_path_factory.mktemp("readers")
    sizes = {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32, "head_dim": 16, "ffn_dim": 64}
    kinds = {kind: {"position": kind} for kind in ("rope", "alibi", "learned", "none")}
    kinds["tuned"] = {"rope_scaling": {"rope_type": "linear", "factor": 2.0}, "seq_len": 128}
    kinds["score"] = {"head": "score", "tie": False}
    for name, fields in kinds.items():
        net = Transformer(Config(**{"vocab_size": 448, "seq_len": 64} | sizes | fields)).init_weights(1)
        with torch.no_grad():  # so that attention has something to tell
            for p in net.parameters():
                p.mul_(3 if p.dim() > 1 else 1)
        save_checkpoint(home / name, net, modules / "tokenizer.json")
    return {name: str(home / name) for name in kinds}


@pytest.fixture(scope="module")
def study(readers, modules):
    """What the command finds out about four kinds of positions and a model of 128 tokens."""
    folders = [readers[name] for name in ("rope", "alibi", "learned", "none", "tuned")]
    return bench.context(folders, modules, times=4, texts=3, needles=2, device="cpu", as_json=True)


def test_context_has_a_row_for_each_way_to_read(study, readers):
    ways = ["as it is", "interpolation", "NTK-aware", "YaRN", "window", "window, sinks"]
    methods = [(readers["rope"], way) for way in ways]
    methods += [(readers[name], "as it is") for name in ("alibi", "learned", "none", "tuned")]
    found = [(row["length"], row["model"], row["read"]) for row in study["rows"]]
    assert study["trained"] == 64 and found == [(n, *method) for n in (64, 128, 256) for method in methods]
    for row in study["rows"]:
        numbers = [row[name] for name in ("loss", "ppl", "last_64", "0-16", "16-64")]
        beyond = [row["64-128"], row["128-256"]]
        if row["model"] == readers["learned"] and row["length"] > 64:  # it has no such places
            assert {*numbers, *beyond} == {None}
            continue
        assert all(map(math.isfinite, numbers)) and row["ppl"] == pytest.approx(math.exp(row["loss"]))
        assert [x is None for x in beyond] == [row["length"] < 128, row["length"] < 256]
        if row["length"] == 64:
            assert row["loss"] == pytest.approx(row["last_64"]) == (row["0-16"] + 3 * row["16-64"]) / 4


def test_context_at_the_trained_length_all_ways_agree(study, readers):
    def last(length):
        rows = [row for row in study["rows"] if row["model"] == readers["rope"] and row["length"] == length]
        return {row["read"]: row["last_64"] for row in rows}

    assert [*last(64).values()] == pytest.approx([last(64)["as it is"]] * 6, rel=1e-6)
    assert len({round(loss, 5) for loss in last(256).values()}) == 6  # and beyond none is another's


def test_context_is_what_the_model_says(study, readers, modules):
    """Interpolation by hand: the last text, at positions that are four times as close."""
    net = model.load_model(readers["rope"])
    tokens = bench.Tokens(modules, "val")
    losses = []
    for start in (0, (tokens.n - 257) // 2, tokens.n - 257):
        ids = torch.from_numpy(tokens.read(start, 257).astype("int64"))[None]
        with torch.no_grad():
            losses.append(net(ids[:, :-1], ids[:, 1:], positions=torch.arange(256) / 4)[0])
    losses = torch.cat(losses)
    [row] = [row for row in study["rows"] if row["read"] == "interpolation" and row["length"] == 256]
    assert row["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert row["last_64"] == pytest.approx(losses[:, -64:].mean().item(), rel=1e-5)
    assert row["64-128"] == pytest.approx(losses[:, 64:128].mean().item(), rel=1e-5)


def test_needle_lies_where_it_is_said(modules):
    tokenizer = model.load_tokenizer(modules)
    tokens = bench.Tokens(modules, "val")
    ids, N = bench.hide_needle(tokens, tokenizer, 200, seed=3)
    assert ids.shape == (len(bench.DEPTHS) + 1, 201) and not (ids == tokens.eot_id).any()
    *texts, without = (tokenizer.decode(row.tolist()) for row in ids)
    key, _, value = without.rpartition("\n")[2].partition(" = ")
    assert key.startswith("KEY_") and 1000 <= int(value) < 10_000 and without.count(key) == 1
    assert tokenizer.decode(ids[0, -N:].tolist()) == f" {value}"
    places = [text.index(f"{key} = {value}\n") / len(text) for text in texts]
    assert all(text.endswith(f"\n{key} = {value}") and text.count(key) == 2 for text in texts)
    assert places[0] < 0.01 and places == sorted(places) and 0.8 < places[-1]
    assert torch.equal(ids[0, 40:], ids[-1, 40:])  # the line aside, all end alike
    assert not torch.equal(ids[0], bench.hide_needle(tokens, tokenizer, 200, seed=4)[0][0])


def test_needle_is_found_by_a_model_that_copies(modules):
    """A model that repeats what came after the last token's earlier place finds it, another one does not."""
    V = 448

    class Copies(torch.nn.Module):
        def __init__(self, sees):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))
            self.sees = sees  # so many last tokens

        def forward(self, ids, at):
            logits = torch.zeros(*ids.shape, V)
            for row, t in zip(at // ids.shape[1], at % ids.shape[1], strict=True):
                text = ids[row, max(0, t + 1 - self.sees) : t + 1].tolist()
                for i in range(3, len(text)):  # after the same three tokens
                    if text[i - 3 : i] == text[-3:]:
                        logits[row, t, text[i]] = 9.0
            return logits.flatten(0, 1)[at], None

    case = bench.hide_needle(bench.Tokens(modules, "val"), model.load_tokenizer(modules), 120, seed=0)
    found = bench.find_needle(Copies(999), *case)
    assert found.shape == (len(bench.DEPTHS), 2) and (found[:, 1] == 1).all() and (found[:, 0] < -4).all()
    assert bench.find_needle(Copies(60), *case)[:, 1].tolist() == [0, 0, 0, 1, 1]
    assert bench.find_needle(Copies(60), *case)[0, 0] == 0  # what cannot be seen changes nothing


def test_context_looks_for_needles(study, readers):
    beyond = [row for row in study["needles"] if row["model"] == readers["learned"]]
    assert len(study["needles"]) == 28 and [row["length"] for row in beyond] == [64]
    for row in study["needles"]:
        depths = {name: pair for name, pair in row.items() if name.startswith("depth_")}
        assert list(depths) == ["depth_0", "depth_0.25", "depth_0.5", "depth_0.75", "depth_1"]
        assert all(math.isfinite(pair["nats"]) and 0 <= pair["found"] <= 1 for pair in depths.values())


def test_context_prints_and_draws(readers, modules, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    args = [readers["learned"], readers["none"], "--data", modules, "--times", 2, "--texts", 2]
    call(bench.app, "context", *args, "--needles", 1, "--device", "cpu", "--plot", tmp_path / "p.png")
    out, err = capsys.readouterr()
    assert "64-128" in out and " - " in out and "depth 0.25" in out and "Positions read" in err
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    call(bench.app, "context", *args, "--needles", 0, "--device", "cpu", "--json")
    facts = printed(capsys)
    assert facts["needles"] == [] and len(facts["rows"]) == 4


def test_context_refuses(readers, modules, data, tmp_path):
    rope = readers["rope"]
    cases = [([rope, "--times", 0], "--times"), ([rope, "--times", 9999], "lower --times"),
             ([rope, "--texts", 0], "--texts"), ([rope, "--needles", -1], "--needles"),
             (["nowhere"], "nowhere"), ([readers["score"]], "next token"),
             ([rope, "--data", data], "different tokenizers"), ([rope, "--data", "gone"], "is missing")]
    for args, words in cases:
        args = args if "--data" in args else [*args, "--data", modules]
        assert words in refusal(bench.app, "context", *args, "--device", "cpu"), args
    net = Transformer(model.load_config(rope).replace(seq_len=16)).init_weights()
    save_checkpoint(tmp_path / "short", net, modules / "tokenizer.json")
    assert "--needles 0" in refusal(bench.app, "context", tmp_path / "short", "--data", modules)


def test_sizes(capsys):
    facts = bench.sizes(["llama-2-7b", "mistral-7b", "deepseek-v2", "nano"], context=8192, as_json=True)
    assert printed(capsys) == facts
    llama, mistral, deepseek, nano = facts["rows"]
    L, C, I, V = 32, 4096, 11_008, 32_000
    assert llama["params"] == llama["active"] == 2 * V * C + L * (4 * C * C + 3 * C * I + 2 * C) + C
    assert llama["weights_gb"] == 2 * llama["params"] / 1e9
    assert llama["cache_gb"] == 2 * 32 * 128 * L * 8192 * 2 / 1e9  # keys and values of 32 heads
    products = llama["params"] - V * C - (2 * L + 1) * C  # nothing is multiplied by embedding and norms
    assert llama["gflop_per_token"] * 1e9 == pytest.approx(6 * products + 12 * L * C * 8193 / 2)
    assert mistral["cache_gb"] == 2 * 8 * 128 * L * 4096 * 2 / 1e9  # no more than its window
    assert deepseek["cache_gb"] == (512 + 64) * 60 * 8192 * 2 / 1e9  # a latent vector
    assert deepseek["active"] < deepseek["params"] / 10
    assert nano["params"] == model.count_params(resize("nano", vocab_size=4096))[0]
    assert bench.sizes(["llama-2-7b"])["rows"][0]["cache_gb"] == pytest.approx(2.147, abs=1e-3)
    assert "6,738,415,616" in capsys.readouterr().out
    cases = [(["huge"], "no preset 'huge'"), (["--context", 0], "--context"), (["--vocab-size", 0], "--vocab")]
    for args, words in cases:
        assert words in refusal(bench.app, "sizes", *args)


def test_sizes_of_all_presets():
    rows = bench.sizes()["rows"]
    assert [row["preset"] for row in rows] == list(PRESETS)
    assert all(0 < row["active"] <= row["params"] and row["cache_gb"] > 0 for row in rows)


def test_bytes_per_step_of_a_latent_cache():
    latent = dict(kv_rank=16, rope_dim=8, nope_dim=8, v_dim=8)
    config = Config(vocab_size=64, n_layer=3, n_head=4, n_kv_head=4, **latent)
    cache = Cache(config, 2, 10, dtype=torch.bfloat16)
    step = bytes_per_step(config, 2, 10, 2) - bytes_per_step(config, 2, 0, 2)
    assert step == cache.k.nbytes + cache.v.nbytes == 2 * bench.cache_bytes(config, 10)


# --- the compressor ---


def test_xz_is_lzma(data, text, capsys):
    facts = bench.xz(data, as_json=True)
    assert printed(capsys) == facts
    val, train = (bench.text_of(bench.Tokens(data, split)) for split in ("val", "train"))
    assert (train + val).decode() == text
    assert len(val) == facts["val_bytes"] and len(train) == facts["primed_bytes"]
    size = {t: len(lzma.compress(t, preset=9 | lzma.PRESET_EXTREME)) for t in (val, train, train + val)}
    alone, primed = facts["rows"]
    assert alone["bytes"] == size[val] and primed["bytes"] == size[train + val] - size[train]
    assert alone["bits_per_byte"] == round(8 * size[val] / len(val), 4) > primed["bits_per_byte"] > 0


def test_xz_counts_what_meta_counts(data, tmp_path):
    for path in data.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    meta = json.loads((data / "meta.json").read_text())
    meta["splits"]["val"]["bytes"] += 1
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="prepare the folder anew"):
        bench.xz(tmp_path)


def test_as_a_command(data):
    """A refusal is one line; standard output holds the result alone."""
    code, out, err = command("bench.py", "claims", "magic")
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("error: There is no claim 'magic'")
    code, out, err = command("bench.py", "xz", data, "--json")
    assert code == 0 and json.loads(out)["rows"] and "Compressing" in err, err
