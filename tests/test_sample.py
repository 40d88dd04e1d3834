"""Test sample.py: filters by hand-worked examples, texts by `model.generate`, the command by its words."""

import doctest
import io
import json
import os
import subprocess
import sys
import time
from functools import partial

from model import (
    Config, Transformer, UserError, generate, load_model, load_tokenizer, render, round_up, save_checkpoint,
)

import model
import pytest
import torch
from conftest import ROOT, command, refusal
from safetensors.torch import load_file, save_file

import sample as sampling
from sample import Reader, Writer, draw, fill, keep_top_k, keep_top_p, newest_checkpoint, pieces, sample, stream, write

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
    facts = dict(vocab_size=round_up(tokenizer.n_vocab), eos_id=tokenizer.eot_id, pad_id=tokenizer.pad_id)
    net = Transformer(Config(**sizes | facts | changes)).init_weights(seed)
    with torch.no_grad():
        net.lm_head.weight.mul_(20)
    save_checkpoint(folder, net, vocab)
    return folder


@pytest.fixture(scope="session")
def folder(vocab, tmp_path_factory):
    return make(vocab, tmp_path_factory.mktemp("model") / "a", tie=False)


def go(folder, **options):
    """Run the command, called as a function."""
    sampling.main(sampling.Options(folder, **{"device": "cpu"} | options))


def run(capsys, folder, **options):
    """Run the command -> its JSON lines."""
    go(folder, **{"max_new_tokens": 30, "seed": 0, "json": True} | options)
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def kept(logits):
    return logits.isfinite().nonzero().flatten().tolist()


# --- the filters ---


def test_worked_examples():
    result = doctest.testmod(sampling)
    assert result.attempted and not result.failed


def test_temperature():
    logits = torch.tensor([1.0, 2.0, 4.0])
    for t in (0.5, 1.0, 2.0):
        ids = sample(logits.expand(40_000, 3), t, generator=torch.Generator().manual_seed(0))
        share = torch.bincount(ids, minlength=3) / len(ids)
        assert (share - (logits / t).softmax(-1)).abs().max() < 0.01
    many = logits.expand(500, 3)
    assert set(sample(many, 1e-40).tolist()) == set(sample(many, 1e-10).tolist()) == {2}  # no overflow
    assert set(sample(many, 1e30).tolist()) == {0, 1, 2}


def test_top_k():
    assert kept(keep_top_k(torch.tensor([2.0, 1.0, 3.0, 0.0]), 2)) == [0, 2]
    assert len(kept(keep_top_k(torch.zeros(9), 4))) == 4  # exactly k of equals
    assert kept(keep_top_k(torch.zeros(3), 99)) == [0, 1, 2]
    rows = keep_top_k(torch.tensor([[1.0, 2.0], [4.0, 3.0]]), 1)
    assert rows.tolist() == [[-torch.inf, 2.0], [4.0, -torch.inf]]


@pytest.mark.parametrize(
    "p, nucleus", [(0.4, [1]), (0.6, [1, 3]), (0.8, [1, 3]), (0.85, [0, 1, 3]), (1, [0, 1, 2, 3])]
)
def test_top_p_by_hand(p, nucleus):
    assert kept(keep_top_p(torch.tensor([0.12, 0.5, 0.07, 0.31]).log(), p)) == nucleus


def test_top_p_erratum():
    """The chapter's mask `cumsum <= p` drops the token that crosses p, and all where the first one does."""
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
        assert (mass >= p - 1e-5).all()  # reaches p,
        assert (mass - least < p + 1e-5).all()  # and not without its last
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
    assert sample(logits, temperature=0, n_vocab=4).tolist() == [0]  # never the vocabulary's padding
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
    reader = Reader(net, cached)
    return list(stream(reader, reader.read(torch.tensor([ids])), 40, pick))


def test_the_cache_reads_each_token_once(folder):
    net, lengths = load_model(folder), []
    net.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    for cached, want in ((True, [3, 1, 1, 1]), (False, [3, 4, 5, 6])):
        lengths.clear()
        reader = Reader(net, cached)
        assert len(list(stream(reader, reader.read(torch.tensor([[1, 2, 3]])), 4))) == 4
        assert lengths == want  # and nothing is read that nobody asks for


def test_never_half_a_character(vocab, capsys):
    tokenizer = load_tokenizer(vocab)
    ids = tokenizer.encode("aé日🎉b")
    assert len(ids) > 5  # characters in pieces
    new = []
    texts = list(pieces(iter([*ids, tokenizer.eot_id]), Writer(tokenizer, {tokenizer.eot_id}), new))
    assert "".join(texts) == "aé日🎉b" and new == [*ids, tokenizer.eot_id]
    assert sum(map(bool, texts)) >= 5  # streamed, not held back to the end
    broken = tokenizer.encode("日")[:1] + tokenizer.encode("x")
    assert "".join(pieces(broken, Writer(tokenizer), [])) == tokenizer.decode(broken) == "\ufffdx"

    def slow():
        yield "a"
        assert capsys.readouterr().out == "a"  # it was written before the next one was asked for
        yield "b"

    write(slow())
    assert capsys.readouterr().out == "b\n"


def test_a_cache_that_grows_is_the_cache_that_was_large(vocab, tmp_path):
    net = load_model(make(vocab, tmp_path / "a", tie=False, seq_len=1024))
    want = generate(net, [[1, 2, 3]], 600)[0]
    reader = Reader(net)
    assert list(stream(reader, reader.read(torch.tensor([[1, 2, 3]])), 600)) == want


def test_a_text_is_read_from_where_it_parts(folder):
    net, lengths = load_model(folder), []
    reader = Reader(net)
    net.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    texts = ([1, 2, 3], 3), ([1, 2, 3, 4, 5], 2), ([1, 2, 9], 1), ([1, 2, 9], 1), ([7, 2], 2), ([7], 1)
    for ids, read in texts:
        lengths.clear()
        logits = reader.read_text(ids)
        assert lengths == [read]
        torch.testing.assert_close(logits, net(torch.tensor([ids]))[0][:, -1], rtol=1e-4, atol=1e-4)


# --- the command ---


def test_json(folder, capsys):
    tokenizer, net = load_tokenizer(folder), load_model(folder)
    [facts] = run(capsys, folder, prompt=PROMPT, temperature=0, ignore_eos=True)
    ids = tokenizer.encode(PROMPT)
    want = generate(net, [ids], 30, lambda z: z[:, : tokenizer.n_vocab].argmax(-1))[0]
    assert facts["ids"] == {"prompt": ids, "continuation": want}
    assert facts["text"] == tokenizer.decode(want) and facts["finish_reason"] == "length"
    assert facts["prefill_ms"] > 0 and facts["tok_per_s"] > 0 and facts["seed"] == 0
    hot = dict(temperature=1.0)
    for options in (dict(no_cache=True), dict(seed=5), hot | dict(top_k=1), hot | dict(top_p=1e-9)):
        [again] = run(capsys, folder, **dict(prompt=PROMPT, temperature=0, ignore_eos=True) | options)
        assert again["ids"] == facts["ids"]


def test_options_change_something(folder, capsys):
    texts = {}
    changes = dict(base={}, seed=dict(seed=1), hot=dict(temperature=3.0))
    changes |= dict(top_k=dict(top_k=2), top_p=dict(top_p=0.2))
    for name, options in changes.items():
        [facts] = run(capsys, folder, prompt="import", **options)
        [again] = run(capsys, folder, prompt="import", no_cache=True, **options)
        texts[name] = facts["text"]
        assert again["text"] == facts["text"]  # the same seed, with the cache and without
    assert len(set(texts.values())) == 5
    [facts] = run(capsys, folder, dtype="bf16", temperature=0)
    assert facts["ids"]["prompt"] == [load_tokenizer(folder).eot_id]


def test_samples_are_numbered_by_seed(folder, capsys):
    three = run(capsys, folder, num_samples=3, seed=7)
    assert [facts["seed"] for facts in three] == [7, 8, 9] and len({facts["text"] for facts in three}) == 3
    assert run(capsys, folder, seed=8)[0]["ids"] == three[1]["ids"]
    assert run(capsys, folder, seed=None)[0]["seed"] != run(capsys, folder, seed=None)[0]["seed"]


@pytest.mark.parametrize("which", ["eot_id", "im_end_id", "config"])
def test_stops_at_the_end(which, vocab, tmp_path, capsys, monkeypatch):
    tokenizer = load_tokenizer(vocab)
    folder = make(vocab, tmp_path / "a", tie=False, eos_id=None)
    [facts] = run(capsys, folder, prompt="import", seed=3, temperature=2.0, ignore_eos=True)
    ids = facts["ids"]["continuation"]
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
    go(folder, prompt="import ", max_new_tokens=30, seed=0)
    out, err = capsys.readouterr()
    assert out == "import " + facts["text"] + "\n" and err == ""
    go(folder, num_samples=2, max_new_tokens=3, seed=0)
    assert "2 of 2" in capsys.readouterr().err
    go(folder, max_new_tokens=64, seed=0)
    assert "more than the 64" in " ".join(capsys.readouterr().err.split())


def test_fill(vocab, tmp_path, capsys):
    tokenizer, folder = load_tokenizer(vocab), make(vocab, tmp_path / "masked", causal=False)
    net, mask = load_model(folder), tokenizer.special["<|mask|>"]
    go(folder, fill="for <|mask|> in <|mask|>(<|mask|>):", json=True)
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
    assert fill(net, [1, 2], mask, tokenizer.n_vocab) == ([1, 2], [])


def test_newest_checkpoint(vocab, tmp_path):
    with pytest.raises(UserError, match="run `python train.py` first"):
        newest_checkpoint(tmp_path / "none")
    for i, name in enumerate(("old", "new", "empty")):
        make(vocab, tmp_path / "out" / name)
        os.utime(tmp_path / "out" / name / "config.json", (i, time.time() + i))
    (tmp_path / "out" / "empty" / "model.safetensors").unlink()
    assert newest_checkpoint(tmp_path / "out") == tmp_path / "out" / "new"


# --- the chat ---


def chat(monkeypatch, capsys, folder, text, **options):
    """Talk, with these lines typed -> what was answered, and what was said beside."""
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    go(folder, **{"chat": True, "temperature": 0, "max_new_tokens": 6} | options)
    out, err = capsys.readouterr()
    return out, " ".join(err.split())


def test_chat(folder, monkeypatch, capsys):
    """What was said is in the context, /reset forgets it, and the end of the context too."""
    say = partial(chat, monkeypatch, capsys, folder)
    once, _ = say("hi\n")
    twice, _ = say("hi\nhi\n")
    again, err = say("hi\n/reset\nhi\n")
    assert again == once * 2 != twice and "forgotten" in err
    assert say("h\\\ni\n\n  \n/exit\nmore\n")[0] == say("h\ni".replace("\n", "\\\n") + "\n")[0] != once
    assert say("h\\\ni\\")[0] == say("h\\\ni\n")[0]  # the end of the input ends a message
    assert "turns are forgotten" in say("a b\n" * 8)[1]
    assert "say it shorter" in say("word " * 60 + "\n")[1]


def plan(net, *answers):
    """Let a model's picks be these ids, one after the other -> pick, and what the model reads at a time."""
    reads = []
    net.register_forward_pre_hook(lambda _, args: reads.append(args[0][0].tolist()))
    left = [token for answer in answers for token in answer]

    def pick(logits):
        token = left.pop(0)
        if token is None:
            raise KeyboardInterrupt
        return torch.tensor([token])

    return pick, reads


def conversation(tokenizer, *texts):
    """Encode a conversation of these texts, the user's and the assistant's in turn, up to the next answer."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return render(tokenizer, messages, reply=True)[0]


def test_chat_reads_each_turn_once(folder, monkeypatch, capsys):
    """The second turn goes on from the cache, and the model reads what `render` makes of the conversation."""
    net, tokenizer = load_model(folder), load_tokenizer(folder)
    end = tokenizer.im_end_id
    answers = [[*tokenizer.encode(text), end] for text in ("one x", "two")]
    pick, reads = plan(net, *answers)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    sampling.talk(net, tokenizer, 9, pick, {end})
    assert capsys.readouterr().out == "one x\ntwo\n"
    whole = [*conversation(tokenizer, "a", "one x", "b"), *answers[1][:-1]]
    assert sum(reads, []) == whole  # each token once: the end of a turn is read with the next one


def test_an_interrupted_answer_stays_in_the_conversation(folder, monkeypatch, capsys):
    net, tokenizer = load_model(folder), load_tokenizer(folder)
    cut = tokenizer.encode("or")
    pick, reads = plan(net, [*cut, None], [tokenizer.im_end_id])
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    sampling.talk(net, tokenizer, 9, pick, {tokenizer.im_end_id})
    assert capsys.readouterr().out == "or\n\n"
    assert sum(reads, []) == conversation(tokenizer, "a", "or", "b")


def test_a_message_that_cannot_be_encoded_ends_no_chat(folder, monkeypatch, capsys):
    """One unknown character of a character tokenizer, say; the answers go on as if it had not been typed."""
    tokenizer = load_tokenizer(folder)
    real = tokenizer.encode_array

    def encode(text, *more):
        model.check("é" not in text, "This tokenizer has no token for 'é'.")
        return real(text, *more)

    monkeypatch.setattr(sampling, "load_tokenizer", lambda folder: tokenizer)
    plain, _ = chat(monkeypatch, capsys, folder, "hi\n")
    monkeypatch.setattr(tokenizer, "encode_array", encode)
    out, err = chat(monkeypatch, capsys, folder, "caf\xe9\nhi\n")
    assert out == plain and "no token for 'é'" in err


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8:strict", "latin-1"])
def test_bytes_that_are_no_text_and_any_encoding_of_the_terminal(folder, encoding):
    env = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "200"}
    args = [sys.executable, str(ROOT / "sample.py"), folder, "--chat", "--max-new-tokens", "12", "--seed", "1"]
    done = subprocess.run(args, input=b"caf\xe9 \x81\nhello\n", capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("utf-8").count("\n") >= 2  # both were answered
    assert (b"U+FFFD" in done.stderr) == (encoding != "latin-1")  # there every byte is a character


# What Hugging Face folders say of ends, beginnings and tokens


def say_in(folder, name, **facts):
    """Write facts into a JSON file of a folder."""
    path = folder / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | facts))


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_every_one_of_several_ends_ends_a_text(where, vocab, tmp_path, capsys):
    """generation_config.json wins, as in transformers."""
    folder = make(vocab, tmp_path / "a", tie=False, eos_id=None)
    hot = {"seed": 3, "temperature": 2.0, "prompt": "import"}
    [facts] = run(capsys, folder, ignore_eos=True, **hot)
    ids = facts["ids"]["continuation"]
    places = [i for i in range(5, 30) if ids[i] not in ids[:i]][:2]
    for place in places:
        others = [i for i in range(256) if i not in ids][:3]
        say_in(folder, "generation_config.json", eos_token_id=None)
        say_in(folder, "config.json", eos_token_id=ids[2])
        say_in(folder, where, eos_token_id=[*others, ids[place]])
        [facts] = run(capsys, folder, **hot)
        assert facts["finish_reason"] == "stop" and facts["ids"]["continuation"] == ids[: place + 1]


def with_tokenizer(monkeypatch, folder, **facts):
    """Let a folder's tokenizer say more than its file does."""
    tokenizer = load_tokenizer(folder)
    for name, value in facts.items():
        monkeypatch.setattr(tokenizer, name, value, raising=False)
    monkeypatch.setattr(sampling, "load_tokenizer", lambda folder: tokenizer)
    return tokenizer


def test_a_prompt_begins_as_the_tokenizer_says(folder, monkeypatch, capsys):
    tokenizer = with_tokenizer(monkeypatch, folder, prefix=(7, 8), suffix=(9,))
    [facts] = run(capsys, folder, prompt="import")
    assert facts["ids"]["prompt"] == [7, 8, *tokenizer.encode("import")]
    [facts] = run(capsys, folder)
    assert facts["ids"]["prompt"] == [7, 8]
    with_tokenizer(monkeypatch, folder, prefix=(), names={"bos_token": "<|im_start|>"})
    [facts] = run(capsys, folder)
    assert facts["ids"]["prompt"] == [tokenizer.im_start_id]  # a folder that only names what begins a text
    with_tokenizer(monkeypatch, folder, prefix=(), names={}, eot_id=None)
    with pytest.raises(UserError, match="no token to begin a document with"):
        go(folder)


def test_a_masked_text_stands_between_prefix_and_suffix(vocab, tmp_path, monkeypatch, capsys):
    folder = make(vocab, tmp_path / "masked", causal=False)
    tokenizer = with_tokenizer(monkeypatch, folder, prefix=(7,), suffix=(8, 9))
    go(folder, fill="a <|mask|>", json=True)
    facts = json.loads(capsys.readouterr().out)
    assert facts["ids"]["prompt"] == [7, *tokenizer.encode("a "), tokenizer.mask_id, 8, 9]


def test_a_token_beyond_the_embedding_is_refused_where_it_is_used(vocab, tmp_path, monkeypatch, capsys):
    """A token that was added later, as for padding, is in nobody's way until a text has it."""
    folder = make(vocab, tmp_path / "a", tie=False, vocab_size=round_up(load_tokenizer(vocab).n_vocab))
    [plain] = run(capsys, folder, prompt="import")
    n = load_model(folder).config.vocab_size
    tokenizer = load_tokenizer(folder)
    grown = [*tokenizer.token_bytes, *[b"?"] * (n + 5 - tokenizer.n_vocab)]
    facts = {"token_bytes": grown, "n_vocab": n + 5, "special": tokenizer.special | {"<new>": n + 4}}
    with_tokenizer(monkeypatch, folder, **facts)
    [again] = run(capsys, folder, prompt="import", top_k=1)
    assert max(again["ids"]["continuation"]) < n and plain["ids"]["prompt"] == again["ids"]["prompt"]
    with_tokenizer(monkeypatch, folder, prefix=(n + 4,), **facts)
    with pytest.raises(UserError, match=f"a token of id {n + 4}, and the model knows {n} ids"):
        go(folder, prompt="import")


def test_settings_that_are_not_followed_are_named(vocab, tmp_path, capsys):
    folder = make(vocab, tmp_path / "a", tie=False, seq_len=64)
    go(folder, prompt="a", max_new_tokens=2)
    assert "suggests" not in capsys.readouterr().err
    say_in(folder, "generation_config.json", temperature=0.6, top_p=0.9, repetition_penalty=1.1, top_k=None, num_beams=1)
    go(folder, prompt="a", max_new_tokens=2)
    told = capsys.readouterr().err
    assert "suggests temperature 0.6, repetition_penalty 1.1" in told and "top_p" not in told


TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}Be brief.<|im_end|>{% endif %}{% for message in messages %}"
    "[{{ message['role'] }}] {{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_a_chat_speaks_by_the_template_of_its_folder(vocab, tmp_path, monkeypatch, capsys):
    """With its own system prompt, once and at the beginning, however long the conversation."""
    folder = make(vocab, tmp_path / "a", tie=False, seq_len=256)
    say_in(folder, "tokenizer_config.json", chat_template=TEMPLATE)
    net, tokenizer = load_model(folder), load_tokenizer(folder)
    end = tokenizer.im_end_id
    pick, reads = plan(net, [*tokenizer.encode("one"), end], [*tokenizer.encode("two"), end])
    monkeypatch.setattr("sys.stdin", io.StringIO("a\nb\n"))
    sampling.talk(net, tokenizer, 9, pick, {end})
    assert capsys.readouterr().out == "one\ntwo\n"
    text = "Be brief.<|im_end|>[user] a<|im_end|>[assistant] one<|im_end|>[user] b<|im_end|>[assistant] two"
    assert tokenizer.decode(sum(reads, [])) == text
    say_in(folder, "tokenizer_config.json", chat_template="{{ raise_exception('no chat') }}")
    with pytest.raises(UserError, match="template"):
        go(folder, chat=True)


def test_a_chat_without_conversations_is_refused_at_once(folder, monkeypatch):
    with_tokenizer(monkeypatch, folder, chat_template=None)
    monkeypatch.setattr(sampling, "load_model", lambda *args: pytest.fail("it was loaded first"))
    with pytest.raises(UserError, match="not made for conversations"):
        go(folder, chat=True)


# --- what cannot be ---

NUMBERS = {"max-new-tokens": 1, "num-samples": 1, "top-k": 1, "top-p": 0, "temperature": 0, "seed": 0}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_out_of_range_are_a_sentence(name):
    wrong = [NUMBERS[name] - 1, -(10**9), 10**12]
    wrong += ["nan", "inf", -0.001] if name in ("top-p", "temperature") else []
    for value in wrong:
        assert refusal(model.command(sampling.Options, sampling.main), f"--{name}", value).startswith(f"--{name} is ")


def test_as_many_tokens_as_can_be_asked_for_need_no_memory_in_advance(folder, monkeypatch, capsys):
    with_tokenizer(monkeypatch, folder, eot_id=None)
    monkeypatch.setattr(sampling, "picker", lambda *args: lambda logits: torch.tensor([ends.pop()]))
    ends = [load_model(folder).config.eos_id, 1, 2]
    [facts] = run(capsys, folder, prompt="a", max_new_tokens=2**31 - 1)
    assert facts["ids"]["continuation"][:2] == [2, 1] and facts["finish_reason"] == "stop"


MODES = {
    "fill": dict(prompt="a", max_new_tokens=3, num_samples=2, ignore_eos=True, no_cache=True, temperature=1.0,
                 top_k=5, top_p=0.5, seed=1),
    "chat": dict(prompt="a", fill="<|mask|>", num_samples=2, ignore_eos=True, no_cache=True, json=True),
}


@pytest.mark.parametrize("mode", MODES)
def test_an_option_that_does_nothing_is_refused(mode):
    on = {"fill": "a <|mask|>", "chat": True}[mode]
    for name, value in MODES[mode].items():
        with pytest.raises(UserError, match=f"^--{mode} has no use for .*--{name.replace('_', '-')}"):
            sampling.Options(**{mode: on, name: value})
    rest = {"dtype": "fp32", "device": "cpu"}
    rest |= {"temperature": 0.0, "top_k": 2, "seed": 1, "max_new_tokens": 5} if mode == "chat" else {"json": True}
    sampling.Options(**{mode: on, **rest})


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(dtype="fp8"), "--dtype"), (dict(device="abacus"), "abacus"),
        (dict(fill="a <|mask|>"), "no masked model"), (dict(folder="nowhere"), "no checkpoint"),
        (dict(prompt="\udcff"), "UTF-8"),
    ],
)
def test_bad_input(folder, options, words):
    with pytest.raises(UserError, match=words):
        go(**{"folder": folder} | options)


def test_bad_folders(vocab, tmp_path, capsys):
    masked = make(vocab, tmp_path / "masked", causal=False)
    for options, words in ((dict(prompt="a"), "masked model"), (dict(fill="no gap"), "nothing to fill")):
        with pytest.raises(UserError, match=words):
            go(masked, **options)
    net = load_model(make(vocab, tmp_path / "a", tie=False))
    small = Transformer(net.config.replace(vocab_size=64)).init_weights()
    save_checkpoint(tmp_path / "small", small, vocab)
    with pytest.raises(UserError, match="another model's"):
        go(tmp_path / "small")


@pytest.mark.parametrize("mode", [dict(prompt="a"), dict(chat=True), dict(fill="a <|mask|>")], ids=str)
def test_weights_that_are_no_numbers_are_said(mode, vocab, tmp_path, monkeypatch):
    folder = make(vocab, tmp_path / "a", causal="fill" not in mode)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][:] = torch.nan
    save_file(weights, folder / "model.safetensors")
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
    with pytest.raises(UserError, match="NaN"):
        go(folder, **mode)


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
        "error: There is no checkpoint in out/ yet: run `python train.py` first, or name a folder."
    )
