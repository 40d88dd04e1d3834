"""sample.py: each filter by a hand-worked example, the text by `model.generate`, the command by what it prints."""

import doctest
import io
import json
import os
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from conftest import ROOT, command

import sample as sampling
from model import Config, Transformer, UserError, generate, load_model, load_tokenizer, pad_vocab, save_checkpoint
from sample import Reader, draw, fill, keep_top_k, keep_top_p, newest_checkpoint, sample, stream, temper, write_stream

PROMPT = "def größe(x): 日本"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models wait for a second thread more than it helps them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def vocab(tmp_path_factory, text):
    """Byte-level BPE with few merges: most characters beyond ASCII are several tokens."""
    folder = tmp_path_factory.mktemp("vocab")
    (folder / "text.txt").write_text(text, encoding="utf-8")
    args = ("--input", folder / "text.txt", "--vocab-size", 300, "--output", folder / "tokenizer.json")
    code, _, err = command("tokenize.py", "train", "--algorithm", "bpe", *args)
    assert code == 0, err
    return folder / "tokenizer.json"


def make(vocab, folder, seed=0, **changes):
    """A random model whose logits are as large as a trained one's, in a checkpoint folder."""
    tokenizer = load_tokenizer(vocab)
    sizes = dict(seq_len=64, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, head_dim=16, ffn_dim=48)
    facts = dict(vocab_size=pad_vocab(tokenizer.n_vocab), eos_id=tokenizer.eot_id, pad_id=tokenizer.special["<|pad|>"])
    net = Transformer(Config(**sizes | facts | changes)).init_weights(seed)
    with torch.no_grad():
        net.lm_head.weight.mul_(20)
    save_checkpoint(folder, net, vocab)
    return folder


@pytest.fixture(scope="session")
def folder(vocab, tmp_path_factory):
    return make(vocab, tmp_path_factory.mktemp("model") / "a", tie=False)


def run(capsys, folder, **options):
    """The command, called as a function -> its JSON lines."""
    sampling.main(folder, **{"max_new_tokens": 30, "seed": 0, "device": "cpu", "as_json": True} | options)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def kept(logits):
    return logits.isfinite().nonzero().flatten().tolist()


# --- the filters ---


def test_worked_examples():
    result = doctest.testmod(sampling)
    assert result.attempted and not result.failed


def test_temperature():
    logits = torch.tensor([[1.0, 2.0, 4.0]])
    for t in (0.5, 1.0, 2.0):
        torch.testing.assert_close(temper(logits, t).softmax(-1), (logits / t).softmax(-1))
    for t in (1e-40, 1e-10, 1e30):  # no overflow at either end
        assert torch.isfinite(temper(logits, t).softmax(-1)).all()
    assert temper(logits, 1e-10).softmax(-1).tolist() == [[0, 0, 1]]


def test_top_k():
    assert kept(keep_top_k(torch.tensor([2.0, 1.0, 3.0, 0.0]), 2)) == [0, 2]
    assert len(kept(keep_top_k(torch.zeros(9), 4))) == 4  # exactly k of equals
    assert kept(keep_top_k(torch.zeros(3), 99)) == [0, 1, 2]
    rows = keep_top_k(torch.tensor([[1.0, 2.0], [4.0, 3.0]]), 1)
    assert rows.tolist() == [[-torch.inf, 2.0], [4.0, -torch.inf]]


@pytest.mark.parametrize("p, nucleus", [(0.4, [1]), (0.6, [1, 3]), (0.8, [1, 3]), (0.85, [0, 1, 3]), (1, [0, 1, 2, 3])])
def test_top_p_by_hand(p, nucleus):
    assert kept(keep_top_p(torch.tensor([0.12, 0.5, 0.07, 0.31]).log(), p)) == nucleus


def test_top_p_erratum():
    """The chapter's mask `cumsum <= p` drops the token that crosses p, and all of them where the first one does."""
    probs = torch.tensor([0.9, 0.06, 0.04])
    chapter = probs.cumsum(-1) <= 0.5
    assert not chapter.any()  # nothing is left to draw from
    assert kept(keep_top_p(probs.log(), 0.5)) == [0]
    probs = torch.tensor([0.5, 0.3, 0.2])
    assert probs[probs.cumsum(-1) <= 0.7].sum() < 0.7  # it does not reach p
    assert kept(keep_top_p(probs.log(), 0.7)) == [0, 1]


def test_top_p_is_the_smallest_set_that_reaches_p():
    torch.manual_seed(0)
    logits = torch.randn(200, 50) * 3
    for p in (0.05, 0.3, 0.9, 0.999):
        left = keep_top_p(logits, p).isfinite()
        probs = logits.softmax(-1)
        mass = (probs * left).sum(-1)
        least = probs.masked_fill(~left, 2).amin(-1)
        assert (mass >= p - 1e-5).all() and (mass - least < p + 1e-5).all()  # reaches p, and not without its last
        assert (least >= probs.masked_fill(left, 0).amax(-1)).all()  # the likeliest ones
    assert keep_top_p(logits, 1.0).isfinite().all()
    assert (keep_top_p(logits, 0.0).isfinite().sum(-1) == 1).all()  # never empty


def test_draw_follows_the_probabilities():
    probs = torch.tensor([0.5, 0.3, 0.0, 0.2])
    ids = draw(probs.log().expand(40_000, 4), torch.Generator().manual_seed(0))
    share = torch.bincount(ids, minlength=4) / len(ids)
    assert share[2] == 0 and (share - probs).abs().max() < 0.01


def test_sample_composes():
    logits = torch.tensor([[5.0, 1.0, 4.0, 3.0, 9.0]])
    assert sample(logits, temperature=0).tolist() == [4]
    assert sample(logits, temperature=0, n_vocab=4).tolist() == [0]  # padding of the vocabulary is never produced
    many = logits.expand(500, 5)
    assert set(sample(many, n_vocab=4, temperature=50.0).tolist()) == {0, 1, 2, 3}
    assert set(sample(many, n_vocab=4, temperature=50.0, top_k=2).tolist()) == {0, 2}
    # top-p is of what temperature and top-k left: two equal tokens, each with a half
    assert set(sample(torch.tensor([[2.0, 2.0, 1.0]]).expand(500, 3), top_k=2, top_p=0.5).tolist()) == {0}
    a, b = (sample(many, generator=torch.Generator().manual_seed(3)).tolist() for _ in range(2))
    assert a == b


# --- the text ---


@pytest.mark.parametrize("changes", [dict(), dict(window=(4, None)), dict(n_kv_head=2, qk_norm=False)])
def test_stream_is_generate(vocab, tmp_path, changes):
    net = load_model(make(vocab, tmp_path / "a", tie=False, **changes))
    ids = load_tokenizer(vocab).encode(PROMPT)
    for options in (dict(temperature=0), dict(temperature=0.8, top_k=40, top_p=0.9)):
        want, *others = (
            ids_of(net, ids, partial(sample, **options, generator=torch.Generator().manual_seed(1)), cached)
            for cached in (None, True, False)
        )
        assert len(want) == 40 and others == [want, want]


def ids_of(net, ids, pick, cached):
    if cached is None:
        return generate(net, [ids], 40, pick)[0]
    reader = Reader(net, len(ids) + 40, cached)
    return list(stream(reader, reader.read(torch.tensor([ids])), 40, pick))


def test_the_cache_reads_each_token_once(folder):
    net, lengths = load_model(folder), []
    net.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    for cached, want in ((True, [3, 1, 1, 1]), (False, [3, 4, 5, 6])):
        lengths.clear()
        ids_of_4 = Reader(net, 7, cached)
        assert len(list(stream(ids_of_4, ids_of_4.read(torch.tensor([[1, 2, 3]])), 4))) == 4
        assert lengths == want  # and nothing is read that nobody asks for


def test_never_half_a_character(vocab):
    tokenizer = load_tokenizer(vocab)
    ids = tokenizer.encode("aé日🎉b")
    assert len(ids) > 5  # characters in pieces

    class Out(io.StringIO):
        def write(self, piece):
            pieces.append(piece)

    pieces, new = [], []
    text = write_stream("", iter([*ids, tokenizer.eot_id]), tokenizer, {tokenizer.eot_id}, new, Out())
    assert text == "aé日🎉b" == "".join(pieces).rstrip("\n") and "\ufffd" not in "".join(pieces)
    assert new == [*ids, tokenizer.eot_id] and len(pieces) >= 5  # streamed, not printed at the end
    broken = tokenizer.encode("日")[:1] + tokenizer.encode("x")
    assert write_stream("", iter(broken), tokenizer, set(), []) == tokenizer.decode(broken) == "\ufffdx"


# --- the command ---


def test_json(folder, capsys):
    tokenizer, net = load_tokenizer(folder), load_model(folder)
    [facts] = run(capsys, folder, prompt=PROMPT, temperature=0, ignore_eos=True)
    ids = tokenizer.encode(PROMPT)
    want = generate(net, [ids], 30, lambda z: z[:, : tokenizer.n_vocab].argmax(-1))[0]
    assert facts["ids"] == {"prompt": ids, "continuation": want}
    assert facts["text"] == tokenizer.decode(want) and facts["finish_reason"] == "length"
    assert facts["prefill_ms"] > 0 and facts["tok_per_s"] > 0 and facts["seed"] == 0
    same = (dict(no_cache=True), dict(seed=5), dict(top_k=1, temperature=1.0), dict(top_p=1e-9, temperature=1.0))
    for options in same:
        [again] = run(capsys, folder, **dict(prompt=PROMPT, temperature=0, ignore_eos=True) | options)
        assert again["ids"] == facts["ids"]


def test_options_change_something(folder, capsys):
    texts = {}
    changes = dict(base={}, seed=dict(seed=1), hot=dict(temperature=3.0), top_k=dict(top_k=2), top_p=dict(top_p=0.2))
    for name, options in changes.items():
        [facts] = run(capsys, folder, prompt="import", **options)
        [again] = run(capsys, folder, prompt="import", no_cache=True, **options)
        texts[name] = facts["text"]
        assert again["text"] == facts["text"]  # the same seed, with the cache and without
    assert len(set(texts.values())) == 5
    assert run(capsys, folder, dtype="bf16", temperature=0)[0]["ids"]["prompt"] == [load_tokenizer(folder).eot_id]


def test_samples_are_numbered_by_seed(folder, capsys):
    three = run(capsys, folder, num_samples=3, seed=7)
    assert [facts["seed"] for facts in three] == [7, 8, 9] and len({facts["text"] for facts in three}) == 3
    assert run(capsys, folder, seed=8)[0]["ids"] == three[1]["ids"]
    assert run(capsys, folder, seed=None)[0]["seed"] != run(capsys, folder, seed=None)[0]["seed"]


@pytest.mark.parametrize("which", ["eot_id", "im_end_id", "config"])
def test_stops_at_the_end(which, vocab, tmp_path, capsys, monkeypatch):
    tokenizer = load_tokenizer(vocab)
    folder = make(vocab, tmp_path / "a", tie=False, eos_id=None)
    ids = run(capsys, folder, prompt="import", seed=3, temperature=2.0, ignore_eos=True)[0]["ids"]["continuation"]
    at = next(i for i in range(5, 30) if ids[i] not in ids[:i] and tokenizer.token_bytes[ids[i]].isalpha())
    if which == "config":
        make(vocab, folder, tie=False, eos_id=ids[at])
    else:
        setattr(tokenizer, which, ids[at])
        monkeypatch.setattr(sampling, "load_tokenizer", lambda folder: tokenizer)
    [facts] = run(capsys, folder, prompt="import", seed=3, temperature=2.0)
    assert facts["finish_reason"] == "stop" and facts["ids"]["continuation"] == ids[: at + 1]
    assert facts["text"] == tokenizer.decode(ids[:at])  # the end of text is an id, not text
    [facts] = run(capsys, folder, prompt="import", seed=3, temperature=2.0, ignore_eos=True)
    assert facts["finish_reason"] == "length" and facts["ids"]["continuation"] == ids


def test_padding_of_the_vocabulary_is_never_produced(vocab, tmp_path, capsys):
    net = load_model(make(vocab, tmp_path / "a", tie=False))
    n = load_tokenizer(vocab).n_vocab
    assert net.config.vocab_size > n
    with torch.no_grad():
        net.lm_head.weight[n:] *= 100
    save_checkpoint(tmp_path / "a", net, vocab)
    assert max(generate(net, [[1]], 30)[0]) >= n
    [facts] = run(capsys, tmp_path / "a", temperature=1.0, top_p=None, ignore_eos=True)
    assert len(facts["ids"]["continuation"]) == 30 and max(facts["ids"]["continuation"]) < n


def test_streams_to_standard_output(folder, capsys):
    [facts] = run(capsys, folder, prompt="import ")
    sampling.main(folder, prompt="import ", max_new_tokens=30, seed=0, device="cpu")
    out, err = capsys.readouterr()
    assert out == "import " + facts["text"] + "\n" and err == ""
    sampling.main(folder, num_samples=2, max_new_tokens=3, seed=0, device="cpu")
    assert "2 of 2" in capsys.readouterr().err
    sampling.main(folder, max_new_tokens=64, seed=0, device="cpu")
    assert "more than the 64" in " ".join(capsys.readouterr().err.split())


def test_fill(vocab, tmp_path, capsys):
    tokenizer, folder = load_tokenizer(vocab), make(vocab, tmp_path / "masked", causal=False)
    net, mask = load_model(folder), tokenizer.special["<|mask|>"]
    sampling.main(folder, fill_text="for <|mask|> in <|mask|>(<|mask|>):", as_json=True, device="cpu")
    facts = json.loads(capsys.readouterr().out)
    before, after = facts["ids"]["prompt"], facts["ids"]["filled"]
    gaps = [i for i, token in enumerate(before) if token == mask]
    assert len(gaps) == 3 and sorted(step["place"] for step in facts["steps"]) == gaps
    assert all(a == b for a, b in zip(before, after, strict=True) if a != mask)
    assert not set(after) & set(tokenizer.special.values()) and facts["text"] == tokenizer.decode(after)
    # the first one filled is the one that a single pass is surest of, and the last sees all others
    probs = net(torch.tensor([before]))[0][0, :, : tokenizer.n_vocab - len(tokenizer.special)].softmax(-1)
    assert facts["steps"][0]["place"] == max(gaps, key=lambda i: probs[i].max())
    last = facts["steps"][-1]["place"]
    x = torch.tensor([[mask if i == last else token for i, token in enumerate(after)]])
    assert net(x)[0][0, last, : tokenizer.n_vocab - len(tokenizer.special)].argmax() == after[last]
    assert fill(net, [1, 2], mask, tokenizer.n_vocab) == []


def test_newest_checkpoint(vocab, tmp_path):
    with pytest.raises(UserError, match="run `python train.py` first"):
        newest_checkpoint(tmp_path / "none")
    for i, name in enumerate(("old", "new", "half.new", "empty")):
        make(vocab, tmp_path / "out" / name)
        os.utime(tmp_path / "out" / name / "config.json", (i, time.time() + i))
    (tmp_path / "out" / "empty" / "model.safetensors").unlink()
    assert newest_checkpoint(tmp_path / "out") == tmp_path / "out" / "new"


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(top_p=0.0), "--top-p"), (dict(top_p=1.1), "--top-p"), (dict(top_k=0), "--top-k"),
        (dict(temperature=-1.0), "--temperature"), (dict(temperature=float("nan")), "--temperature"),
        (dict(max_new_tokens=0), "--max-new-tokens"), (dict(num_samples=0), "--num-samples"), (dict(seed=-1), "--seed"),
        (dict(dtype="fp8"), "--dtype"), (dict(device="abacus"), "abacus"),
        (dict(fill_text="a <|mask|>"), "no masked model"), (dict(folder="nowhere"), "no checkpoint"),
        (dict(prompt="\udcff"), "UTF-8"),
    ],
)  # fmt: skip
def test_bad_input(folder, options, words):
    with pytest.raises(UserError, match=words):
        sampling.main(**{"folder": folder, "device": "cpu"} | options)


def test_bad_folders(vocab, tmp_path, capsys):
    masked = make(vocab, tmp_path / "masked", causal=False)
    for options, words in ((dict(prompt="a"), "masked model"), (dict(fill_text="no gap"), "nothing to fill")):
        with pytest.raises(UserError, match=words):
            sampling.main(masked, device="cpu", **options)
    net = load_model(make(vocab, tmp_path / "a", tie=False))
    small = Transformer(net.config.replace(vocab_size=64)).init_weights()
    save_checkpoint(tmp_path / "small", small, vocab)
    with pytest.raises(UserError, match="another model's"):
        sampling.main(tmp_path / "small", device="cpu")
    net.norm.weight.data[:] = torch.nan
    save_checkpoint(tmp_path / "a", net, vocab)
    with pytest.raises(UserError, match="NaN"):
        sampling.main(tmp_path / "a", device="cpu")


def test_as_a_command(folder, tmp_path):
    args = [sys.executable, str(ROOT / "sample.py")]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    given = "größe\n".encode()
    short = [folder, "--prompt", "-", "--max-new-tokens", "5"]
    done = subprocess.run(args + short, input=given, capture_output=True, env=env)
    assert done.returncode == 0 and done.stdout.startswith(given), done.stderr
    done = subprocess.run(args, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.strip() == (
        "error: There is no checkpoint under out/ yet: run `python train.py` first, or name a folder."
    )
