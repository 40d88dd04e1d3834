"""Hold tokenize.py against tiktoken, tokenizers and transformers; run its commands; give it bad input."""

import contextlib
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiktoken
from conftest import ROOT, script

import model

tk = script("tokenize")
STDLIB = Path(os.__file__).parent
TEXTS = [
    (STDLIB / f"{name}.py").read_text(encoding="utf-8")
    for name in ("argparse", "datetime", "inspect", "typing")
]


def run(*args, stdin: bytes = b"", code: int = 0, cwd=None) -> SimpleNamespace:
    """Run a command of tokenize.py in this process; it exits with `code`, and 2 comes with a sentence."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="\n") for _ in range(2))
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "argv", ["tokenize.py", *map(str, args)])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        patch.chdir(cwd or Path.cwd())
        with pytest.raises(SystemExit) as end:
            tk.main()
        out.flush()
        err.flush()
    done = SimpleNamespace(stdout=out.buffer.getvalue(), stderr=err.buffer.getvalue())
    told = done.stderr.decode()
    assert (end.value.code or 0) == code, told
    if code == 2:
        assert "Traceback" not in told and told.splitlines()[-1].startswith("error: "), told
    return done


def run_process(*args, stdin: bytes = b"", **options) -> subprocess.CompletedProcess:
    """Run a command of tokenize.py in a process of its own."""
    command = [sys.executable, str(ROOT / "tokenize.py"), *map(str, args)]
    return subprocess.run(command, input=stdin, capture_output=True, **options)


def train(texts, vocab_size, pattern="gpt4", algorithm="bpe"):
    """Learn a tokenizer without a word on standard error."""
    with contextlib.redirect_stderr(io.StringIO()):
        return tk.train_tokenizer(texts, algorithm, vocab_size, pattern)[0]


def random_strings(n: int, seed: int = 0) -> list[str]:
    """Draw from all of Unicode, and from what splits trip over: white space, digits, apostrophes, marks."""
    rng = random.Random(seed)
    traps = [
        " ",
        "  ",
        "\n",
        "\r\n",
        "\t",
        "\u00a0",
        "\u3000",
        "\x1c",
        "'s",
        "'LL",
        "'ſ",
        "é",
        "e\u0301",
        "\u0301",
    ]
    traps += [
        "123",
        "4567",
        "٣",
        "Ⅷ",
        "!?",
        "_",
        "the",
        " def",
        "return",
        "नमस्ते",
        "你好",
        "🙂",
        "\u200d",
        "ß",
        "İ",
    ]
    traps += ["<|endoftext|>", "<think>"]
    out = []
    for _ in range(n):
        parts = []
        for _ in range(rng.randint(1, 12)):
            c = rng.randrange(0x110000 - 0x800)
            parts.append(rng.choice(traps) if rng.random() < 0.6 else chr(c if c < 0xD800 else c + 0x800))
        out.append("".join(parts))
    return out


@pytest.fixture(scope="module", params=["gpt2", "gpt4"])
def pattern(request):
    return request.param


@pytest.fixture(scope="module")
def bpe(pattern):
    return train(TEXTS, 1024, pattern)


@pytest.fixture(scope="module")
def char():
    return train(["hello\nworld é 🙂"], 0, algorithm="char")


# ---- The method


def test_worked_examples_of_the_docstrings():
    assert tk.get_pairs([1, 2, 3, 1, 2]) == {(1, 2): 2, (2, 3): 1, (3, 1): 1}
    assert tk.merge([1, 2, 3, 1, 2], (1, 2), 4) == [4, 3, 4]
    assert tk.train_bpe_plain({"aab": 1, "ab": 2}, 2) == [(64, 65), (64, 256)]
    assert tk.train_bpe({"aab": 1, "ab": 2}, 2) == ([(64, 65), (64, 256)], 3)
    assert tk.count_words(["a b b"], "gpt2") == {"a": 1, " b": 2}
    assert tk.cut("one two six", 2) == ["one", " two", " six"]
    assert tk.why_drop(b"x = 1") == "short"


def test_chapter_lower_lower_lower_lowest():
    """Join lo, low, lowe, lower as the chapter does. Pairs tie: the order may differ, the result may not."""
    words = {"lower": 3, "lowest": 1}
    rows = [(list(word), n) for word, n in words.items()]
    for pair in ("l", "o"), ("lo", "w"), ("low", "e"), ("lowe", "r"):
        counts = {}
        for symbols, n in rows:
            tk.get_pairs(symbols, counts, n)
        assert counts[pair] == max(counts.values())  # each step of the chapter is a most frequent pair
        rows = [(tk.merge(symbols, pair, "".join(pair)), n) for symbols, n in rows]
    assert [symbols for symbols, _ in rows] == [["lower"], ["lowe", "s", "t"]]
    tokenizer = tk.Tokenizer(tk.bpe_file(tk.train_bpe(words, 4)[0], "gpt2"))
    for symbols, _ in rows:
        assert [tokenizer.token_bytes[i].decode() for i in tokenizer.encode("".join(symbols))] == symbols


def ids_of(word):
    """Give the ids of a word's bytes, or the ids that it is already."""
    return [tk.BYTES.index(b) for b in word.encode()] if isinstance(word, str) else word


@pytest.mark.parametrize("seed", range(30))
def test_fast_training_equals_plain_training(seed):
    rng = random.Random(seed)
    letters = "ab" if seed % 2 else "abcé "
    words = {"".join(rng.choices(letters, k=rng.randint(1, 12))): rng.randint(1, 9) for _ in range(20)}
    merges, n_tokens = tk.train_bpe(words, 40)
    assert merges == tk.train_bpe_plain(words, 40)
    for i, pair in enumerate(merges):
        words = {tuple(tk.merge(list(ids_of(word)), pair, 256 + i)): n for word, n in words.items()}
    assert n_tokens == sum(len(ids_of(word)) * n for word, n in words.items())


def test_no_words_no_merges():
    assert tk.train_bpe({}, 5) == ([], 0)


@pytest.mark.parametrize("word", ["a", "aa", "aaa", "aaaa", "aaaaa", "abab", "aabaab", "abababa"])
def test_overlapping_pairs(word):
    assert tk.train_bpe({word: 3}, 9)[0] == tk.train_bpe_plain({word: 3}, 9)


def train_rust(texts, n_vocab, pattern):
    tokenizers = pytest.importorskip("tokenizers", reason="the reference trainer is in requirements-dev.txt")
    level, split = tokenizers.pre_tokenizers.ByteLevel, tokenizers.pre_tokenizers.Split
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    cut = [
        split(tokenizers.Regex(tk.PATTERNS[pattern]), "isolated"),
        level(add_prefix_space=False, use_regex=False),
    ]
    gpt2 = level(add_prefix_space=False)
    tok.pre_tokenizer = gpt2 if pattern == "gpt2" else tokenizers.pre_tokenizers.Sequence(cut)
    tok.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=n_vocab,
        initial_alphabet=level.alphabet(),
        show_progress=False,
        special_tokens=["<|endoftext|>"],
    )
    tok.train_from_iterator(texts, trainer)
    return tok


def test_merges_equal_those_of_tokenizers(bpe, pattern):
    theirs = json.loads(train_rust(TEXTS, 1024 - 10, pattern).to_str())
    assert bpe.spec["model"]["merges"] == theirs["model"]["merges"]


@pytest.mark.parametrize("algorithm", ["bpe", "char"])
def test_tokens_counted_while_training_are_those_of_encoding(algorithm, pattern, capsys):
    tokenizer, n_tokens = tk.train_tokenizer(TEXTS, algorithm, 900, pattern)
    assert n_tokens == sum(len(tokenizer.encode(text)) for text in TEXTS)


def test_words_are_those_of_the_pattern(pattern):
    """Cuts and the short way of plain ASCII save time and change nothing."""
    texts = (
        TEXTS + random_strings(3000, seed=1) + ["  \n\n \n  x  ", "a,\n \n b", "x\n\n\ny", "!\x1c\x1c z", ""]
    )
    rng = random.Random(2)
    texts += ["".join(rng.choices("ab1,' \n\r\t\u00a0\x1d", k=rng.randint(1, 30))) for _ in range(3000)]
    for text in texts:
        expected = Counter(tk.regex.findall(tk.PATTERNS[pattern], text))
        assert tk.count_words([text], pattern) == expected
        parts = tk.cut(text, 5)
        assert "".join(parts) == text and tk.count_words(parts, pattern) == expected
    assert max(map(len, tk.cut(TEXTS[0], 1000))) < 3000


# ---- Encoding, and the file


def test_ids_equal_those_of_tiktoken(bpe, pattern):
    ranks = {token: i for i, token in enumerate(bpe.token_bytes) if i not in bpe.special.values()}
    theirs = tiktoken.Encoding(
        "x", pat_str=tk.PATTERNS[pattern], mergeable_ranks=ranks, special_tokens=bpe.special
    )
    for text in TEXTS + random_strings(10_000):
        ids = bpe.encode(text)
        assert ids == theirs.encode_ordinary(text) == bpe.encode_array(text).tolist()
        assert bpe.decode(ids) == text == theirs.decode(ids)
        assert bpe.encode(text, "all") == theirs.encode(text, allowed_special="all")


def test_pattern_equals_tiktoken_cl100k():
    """Compare with the pattern of tiktoken's openai_public.py, which repeats possessively."""
    theirs = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    theirs += r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    for text in TEXTS + random_strings(3000):
        text += (
            "x"  # white space at the very end they keep whole, the older form that the others use does not
        )
        assert tk.regex.findall(theirs, text) == tk.regex.findall(tk.PATTERNS["gpt4"], text), repr(text)


def test_same_ids_in_tokenizers_and_transformers(bpe, char, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is in requirements-dev.txt")
    transformers = pytest.importorskip("transformers", reason="transformers is in requirements-dev.txt")
    plain = ["hello\n\n world", "  \n", "🙂é", "<|pad|>ol<|pad|>"]
    for ours, texts in (bpe, TEXTS + random_strings(10_000)), (char, plain):
        ours.save(tmp_path / "tokenizer.json")
        fast = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        auto = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
        assert fast.get_vocab_size() == len(auto) == ours.n_vocab
        theirs = [e.ids for e in fast.encode_batch(texts)]
        assert theirs == auto(texts)["input_ids"] == [ours.encode(t, "all") for t in texts]
        assert [fast.decode(ids, skip_special_tokens=False) for ids in theirs] == [
            ours.decode(i) for i in theirs
        ]
        # and what they write again from it means the same to us
        fast.save(str(tmp_path / "theirs.json"))
        again = tk.Tokenizer.load(tmp_path / "theirs.json")
        assert again.token_bytes == ours.token_bytes and again.special == ours.special
        assert [again.encode(t, "all") for t in texts] == theirs


def test_files_of_tokenizers_are_read(pattern, tmp_path):
    """Their trainer gives special tokens the first ids."""
    theirs = train_rust(TEXTS, 800, pattern)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = tk.Tokenizer.load(tmp_path)
    assert (ours.eot_id, ours.pad_id, ours.n_vocab) == (0, None, 800)
    for text in TEXTS + random_strings(3000):
        assert ours.encode(text, "all") == theirs.encode(text).ids


def test_an_unusual_split_pattern_loses_nothing(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is in requirements-dev.txt")
    spec = tk.bpe_file(tk.train_bpe({"hello": 2, "12": 3}, 5)[0], "gpt4")
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = (
        "[a-z]+"  # leaves digits and spaces unmatched
    )
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ours = tk.Tokenizer.load(tmp_path)
    for text in ("hello 12 hello12", "  12", "hello"):
        assert ours.encode(text) == theirs.encode(text).ids and ours.decode(ours.encode(text)) == text


def test_layout_of_the_vocabulary(bpe):
    assert bytes(tk.BYTES[:3]) == b'!"#' and tk.CHAR[ord(" ")] == "Ġ" and tk.CHAR[ord("\n")] == "Ċ"
    assert [bpe.token_bytes[i] for i in range(256)] == [bytes([b]) for b in tk.BYTES]
    assert list(bpe.special) == list(tk.SPECIAL) and list(bpe.special.values()) == list(
        range(1024 - 11, 1024)
    )
    assert (bpe.eot_id, bpe.pad_id, bpe.mask_id, bpe.im_start_id, bpe.im_end_id) == tuple(range(1013, 1018))
    assert all(bpe.decode_bytes([i]) == bpe.token_bytes[i] for i in range(bpe.n_vocab))


def test_special_tokens_come_only_when_asked_for(bpe):
    text = "a<|endoftext|><think>b"
    assert not set(bpe.encode(text)) & set(bpe.special.values())
    assert bpe.encode(text, ["<think>"]).count(bpe.special["<think>"]) == 1
    assert bpe.eot_id not in bpe.encode(text, ["<think>"])
    assert bpe.encode(text, "all")[1:-1] == [bpe.eot_id, bpe.special["<think>"]]
    assert bpe.encode(text, "<|endoftext|>")[1] == bpe.eot_id
    assert all(bpe.decode(bpe.encode(text, special)) == text for special in ((), "<think>", "all"))
    with pytest.raises(tk.UserError, match="no special token '<nope>'"):
        bpe.encode(text, ["<nope>"])


def test_character_level(char):
    assert char.n_vocab == len(set("hello\nworld é 🙂")) + len(tk.SPECIAL)
    assert char.token_bytes[: char.eot_id] == [c.encode() for c in sorted(set("hello\nworld é 🙂"))]
    assert char.decode(char.encode("hé🙂\n")) == "hé🙂\n"
    with pytest.raises(tk.UserError, match="'z' is not in the vocabulary"):
        char.encode("oz")


def test_unknown_ids_are_refused(bpe):
    for bad in [bpe.n_vocab], [-1], np.array([5, 99999]):
        with pytest.raises(tk.UserError, match="not in the vocabulary of 1024"):
            bpe.decode_bytes(bad)
    assert bpe.decode([]) == "" and bpe.decode([tk.BYTES.index(0xC3)]) == "\ufffd"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s["model"].update(type="WordPiece"), "WordPiece"),
        (lambda s: s["model"].update(type="Unigram"), "Unigram"),
        (lambda s: s["model"].update(byte_fallback=True), "byte_fallback"),
        (lambda s: s.update(normalizer={"type": "NFC"}), "NFC"),
        (lambda s: s.update(pre_tokenizer={"type": "Metaspace"}), "Metaspace"),
        (lambda s: s["added_tokens"][0].update(lstrip=True), "lstrip"),
        (lambda s: s["model"]["vocab"].pop("Ġ"), "Ġ"),
        (lambda s: s.pop("model"), "tokenizer.json"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, change, named):
    spec = tk.bpe_file(tk.train_bpe({"hello": 2}, 2)[0], "gpt4")
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(tk.UserError, match=re.escape(named)):
        tk.Tokenizer.load(tmp_path)


# ---- The commands


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of Python files with one of each thing that a filter drops."""
    folder = tmp_path_factory.mktemp("corpus") / "lib"
    folder.mkdir()
    for path in sorted(STDLIB.glob("*.py"))[:60]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "copy_of.py").write_bytes((folder / "argparse.py").read_bytes().replace(b"\n", b"  \r\n"))
    (folder / "binary.py").write_bytes(b"x = 1\n" * 50 + b"\0")
    (folder / "latin.py").write_bytes("# été\n".encode("latin-1") * 50)
    (folder / "short.py").write_text("x = 1\n")
    (folder / "table.py").write_text("\n".join(f"{i * 7919},{i * i * 104729}" for i in range(500)))
    (folder / "again.py").write_text("print('the same line again')\n" * 500)
    (folder / "long.py").write_text("".join(random.Random(0).choices("abcdefghij", k=30_000)))
    return folder


def read_folder(folder: Path) -> dict:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_train_encode_decode(tmp_path):
    (tmp_path / "a.txt").write_bytes(TEXTS[0].encode())
    out = tmp_path / "t" / "tokenizer.json"
    done = run("train", "--input", tmp_path / "a.txt", "--vocab-size", 600, "--output", out)
    tok = tk.Tokenizer.load(tmp_path / "t")
    assert tok.n_vocab == 600 and tok.spec == train(TEXTS[:1], 600).spec
    ratio = len(TEXTS[0].encode()) / len(tok.encode(TEXTS[0]))
    assert f"{ratio:.3f} bytes per token" in done.stderr.decode() and not done.stdout
    text = "déf f(x):\r\n\treturn 'é' \n\n"
    ids = json.loads(run("encode", "--tokenizer", tmp_path / "t", stdin=text.encode()).stdout)
    assert ids == tok.encode(text) == json.loads(run("encode", "--tokenizer", out, text).stdout)
    assert run("decode", "--tokenizer", out, stdin=json.dumps(ids).encode()).stdout == text.encode()
    assert run("decode", "--tokenizer", out, json.dumps([tk.BYTES.index(0xC3)])).stdout == b"\xc3"
    for special in ["--special", "<|pad|>"], ["--special", "all"]:
        assert json.loads(run("encode", "--tokenizer", out, "<|pad|>", *special).stdout) == [tok.pad_id]
    assert len(json.loads(run("encode", "--tokenizer", out, "<|pad|>").stdout)) > 3
    run("train", "--input", tmp_path / "a.txt", "--output", out, code=2)
    assert tk.Tokenizer.load(out).n_vocab == 600
    run("train", "--input", tmp_path / "a.txt", "--algorithm", "char", "--output", out, "--overwrite")
    assert tk.Tokenizer.load(out).n_vocab == len(set(TEXTS[0])) + 11


def test_a_process_of_its_own_loads_no_torch(tmp_path):
    """The bytes that go in come out, through real pipes; and none of the three commands waits for torch."""
    (tmp_path / "a.txt").write_bytes(TEXTS[0].encode())
    out = tmp_path / "t.json"
    code = f"import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {str(ROOT)!r})\n"
    code += "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: assert not {'torch', 'model'} & set(sys.modules)"
    text = "é\r\n\t🙂".encode()
    given = b""
    for args in (
        ["train", "--input", tmp_path / "a.txt", "--vocab-size", 300, "--output", out],
        ["encode", "--tokenizer", out],
        ["decode", "--tokenizer", out],
    ):
        command = [sys.executable, "-c", code, str(ROOT / "tokenize.py"), *map(str, args)]
        done = subprocess.run(command, input=given or text, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        given = done.stdout
    assert given == text


def test_training_in_several_processes_changes_nothing(tmp_path):
    """As a command, text of this size goes to worker processes; as a function, it does not."""
    text = "".join(TEXTS * 14)
    assert len(text) > 5_000_000
    (tmp_path / "a.txt").write_bytes(text.encode())
    args = ["train", "--input", tmp_path / "a.txt", "--vocab-size", 400, "--output", tmp_path / "t.json"]
    assert run_process(*args).returncode == 0
    assert tk.Tokenizer.load(tmp_path / "t.json").spec == train([text], 400).spec


def test_prepare(corpus, tmp_path):
    out = tmp_path / "data"
    done = run("prepare", corpus, "--output", out, "--vocab-size", 512, "--val-fraction", 0.1, "--json")
    meta = json.loads((out / "meta.json").read_text())
    told = json.loads(done.stdout)
    assert told.pop("output") == str(out) and {k: v for k, v in meta.items() if k != "files"} == told
    assert {p.name for p in tmp_path.iterdir()} == {"data"} and set(read_folder(out)) == {
        "train.bin", "val.bin", "tokenizer.json", "meta.json"}  # fmt: skip
    tok = tk.Tokenizer.load(out)
    assert (
        meta["vocab_size"] == tok.n_vocab == 512
        and meta["eot_id"] == tok.eot_id
        and meta["dtype"] == "uint16"
    )
    assert {k: v["documents"] for k, v in meta["filters"].items()} == dict.fromkeys(
        [*tk.FILTERS, "duplicate"], 1
    )
    # what is in the files is what the account says, and together it is the corpus
    documents = {}
    for split in "train", "val":
        ids = np.fromfile(out / f"{split}.bin", dtype="<u2")
        ends = np.flatnonzero(ids == tok.eot_id)
        assert ids[-1] == tok.eot_id
        documents[split] = [
            tok.decode_bytes(part[part != tok.eot_id]) for part in np.split(ids, ends + 1)[:-1]
        ]
        n = {"documents": len(ends), "tokens": len(ids), "bytes": sum(map(len, documents[split]))}
        assert meta["splits"][split] == n == meta["sources"]["lib"][split]
    kept = {p.read_bytes() for p in corpus.glob("*.py")} & {*documents["train"], *documents["val"]}
    assert len(kept) == 60 and not set(documents["train"]) & set(documents["val"])
    share = meta["splits"]["val"]["bytes"] / sum(s["bytes"] for s in meta["splits"].values())
    assert 0.05 < share < 0.2
    assert tok.spec == train([d.decode() for d in documents["train"]], 512).spec
    # the account names no path of this machine
    assert len(meta["files"]) == 67 and str(corpus.parent) not in (out / "meta.json").read_text()


def test_prepare_is_deterministic_and_refuses_to_overwrite(corpus, tmp_path):
    args = ["prepare", corpus, "--vocab-size", 300, "--output"]
    run(*args, tmp_path / "a")
    assert run_process(*args, tmp_path / "b").returncode == 0  # as a user would, with worker processes
    first = read_folder(tmp_path / "a")
    assert first == read_folder(tmp_path / "b")
    assert b"exists: pass --overwrite" in run(*args, tmp_path / "a", "--seed", 1, code=2).stderr
    assert first == read_folder(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    run(*args, tmp_path / "a", "--seed", 1, "--overwrite")
    second = read_folder(tmp_path / "a")
    assert second.pop("notes.txt") == b"mine" and second["val.bin"] != first["val.bin"]
    assert second.keys() == first.keys() and {p.name for p in tmp_path.iterdir()} == {"a", "b"}


def test_prepare_writes_into_nobody_elses_folder(corpus, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "train.bin").write_text("years of work")
    for flags in [], ["--overwrite"]:
        done = run("prepare", corpus, "--output", tmp_path / "thesis", *flags, code=2)
        assert b"is no data folder" in done.stderr
    assert read_folder(tmp_path / "thesis") == {"train.bin": b"years of work"}
    run("prepare", corpus, "--output", tmp_path / "thesis" / "train.bin", code=2)
    # an empty folder, and what a killed save has left in one, are no obstacle
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "train.bin.new").write_text("half of it")
    run("prepare", corpus, "--output", tmp_path / "new", "--vocab-size", 300)
    assert set(read_folder(tmp_path / "new")) == {"train.bin", "val.bin", "tokenizer.json", "meta.json"}


def test_a_text_is_not_replaced_by_what_is_made_of_it(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    args = ["train", "--input", "a.txt", "--output", "x/a.txt", "--overwrite"]
    (tmp_path / "x").symlink_to(tmp_path)
    assert b"has to stay" in run(*args, code=2, cwd=tmp_path).stderr
    assert (tmp_path / "a.txt").read_text() == TEXTS[0]
    run("prepare", "a.txt", "--algorithm", "char", "--output", "d", cwd=tmp_path)
    for inputs in ["d"], ["d/tokenizer.json"], ["a.txt", "d/meta.json"]:
        args = ["prepare", *inputs, "--output", "d", "--overwrite", "--algorithm", "char"]
        assert b"has to stay" in run(*args, code=2, cwd=tmp_path).stderr


def test_prepare_one_text_as_nanogpt_splits_it(tmp_path):
    text = "".join(c for c in TEXTS[0] if c.isascii())[:20_001] + "é"
    (tmp_path / "play.txt").write_bytes(text.encode())
    args = ["play.txt", "--algorithm", "char", "--val-fraction", 0.1]
    assert b"a single document" in run("prepare", *args, cwd=tmp_path).stderr
    out = tmp_path / "data" / "play"
    tok = tk.Tokenizer.load(out)
    assert tok.n_vocab == len(set(text)) + 11
    parts = [np.fromfile(out / f"{s}.bin", dtype="<u2") for s in ("train", "val")]
    n = int(len(text) * 0.9)
    assert [tok.decode(p[:-1]) for p in parts] == [text[:n], text[n:]]


def test_prepare_json_lines_names_and_a_given_tokenizer(tmp_path):
    given = train(TEXTS, 300, "gpt2")
    given.save(tmp_path / "tokenizer.json")
    lines = [json.dumps({"body": TEXTS[0][i : i + 900], "id": i}) for i in range(0, 18_000, 900)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.py").write_text(TEXTS[1])
    args = ["--field", "body", "--tokenizer", "tokenizer.json", "--output", "d"]
    run("prepare", "web=x.jsonl", "more", *args, cwd=tmp_path)
    meta = json.loads((tmp_path / "d" / "meta.json").read_text())
    assert {k: sum(s["documents"] for s in v.values()) for k, v in meta["sources"].items()} == {
        "web": 20,
        "more": 1,
    }
    assert tk.Tokenizer.load(tmp_path / "d").spec == given.spec


def test_default_source_is_the_installed_python():
    files = tk.find_python()
    sources = Counter(source for source, *_ in files)
    assert set(sources) >= {"python", "numpy", "tiktoken", "pytest", "rich"} and sources["python"] > 300
    names = {(source, name) for source, name, *_ in files}
    assert ("python", "argparse.py") in names and ("pytest", "_pytest/python.py") in names
    assert not any(
        "/tests/" in f"/{name}" or "site-packages" in name or not name.endswith(".py") for _, name in names
    )


def test_bad_input_gets_a_sentence(tmp_path):
    train(TEXTS, 1024).save(tmp_path / "tokenizer.json")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(bytes(range(256)))
    (tmp_path / "good.txt").write_text(TEXTS[0])
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": TEXTS[0]}) + "\n{no\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "short.txt").write_text("x")
    (tmp_path / "file").write_text("")
    before = {p.name for p in tmp_path.iterdir()}
    for args, said in [
        (["prepare", "gone.txt"], "no file or folder gone.txt"),
        (["prepare", "empty.txt"], "empty.txt is empty"),
        (["prepare", "binary.txt"], "binary.txt is not UTF-8 text"),
        (["prepare", "folder"], "no document is left to learn from (short: 1)"),
        (["prepare", "bad.jsonl"], "line 2 of bad.jsonl"),
        (
            ["prepare", "bad.jsonl", "--field", "body"],
            'line 1 of bad.jsonl is no JSON object with a text in "body"',
        ),
        (["prepare", "good.txt", "--vocab-size", 267], "--vocab-size 267 is too small"),
        (["prepare", "good.txt", "--val-fraction", 1.5], "--val-fraction 1.5 is not between 0 and 1"),
        (["prepare", "good.txt", "--tokenizer", "gone.json"], "there is no tokenizer at gone.json"),
        (["prepare", "good.txt", "--tokenizer", "good.txt"], "good.txt is not a tokenizer.json"),
        (["prepare", "good.txt", "--output", "file/x"], "file"),
        (["train", "--input", "gone.txt", "--output", "t.json"], "no file or folder gone.txt"),
        (["train", "--input", "binary.txt", "--output", "t.json"], "binary.txt is not UTF-8 text"),
        (
            ["train", "--input", "good.txt", "--output", "t.json", "--vocab-size", 10],
            "--vocab-size 10 is too small",
        ),
        (["decode", "--tokenizer", ".", "[1024]"], "token id 1024 is not in the vocabulary of 1024 ids"),
        (["decode", "--tokenizer", ".", "[1.5]"], "not a JSON list of whole numbers"),
        (["encode", "--tokenizer", ".", "x", "--special", "<nope>"], "no special token '<nope>'"),
    ]:
        assert said in run(*args, code=2, cwd=tmp_path).stderr.decode(), args
    assert b"not UTF-8" in run("encode", "--tokenizer", tmp_path, stdin=b"\xff", code=2).stderr
    assert before | {"data"} >= {p.name for p in tmp_path.iterdir()}
    assert not list(tmp_path.glob("data/*")) and not list(tmp_path.glob("data/.*"))


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files by POSIX means")
def test_a_full_disk_gets_a_sentence_and_leaves_nothing(corpus, tmp_path):
    """A limit of 64 KiB a file stands for the full disk: both are an OSError in the middle of writing."""
    import resource

    (tmp_path / "data").mkdir()
    limit = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))}
    done = run_process("prepare", corpus, "--output", tmp_path / "data", "--vocab-size", 300, **limit)
    told = done.stderr.decode()
    assert done.returncode == 2 and told.splitlines()[-1].startswith("error: ") and "Traceback" not in told
    assert not list((tmp_path / "data").rglob("*"))


def test_too_little_text_for_the_merges_is_a_warning(tmp_path):
    (tmp_path / "a.txt").write_text("lower lower lower lowest")
    done = run("train", "--input", tmp_path / "a.txt", "--output", tmp_path / "t.json")
    made = len(tk.Tokenizer.load(tmp_path / "t.json").spec["model"]["merges"])
    assert f"warning: the text gives {made} merges only" in done.stderr.decode() and 5 < made < 20


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize("number", ["SIGINT", "SIGKILL"])
def test_a_killed_prepare_leaves_nothing_half_written(corpus, tmp_path, number):
    out = tmp_path / "data"
    args = ["prepare", corpus, "--output", out, "--vocab-size", 4096]
    # a shell's background jobs ignore Ctrl-C, and hand that down: the command starts as a terminal starts it
    process = subprocess.Popen(
        [sys.executable, ROOT / "tokenize.py", *map(str, args)],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    told = process.stderr.readline()
    assert b"reading" in told  # at work
    process.send_signal(getattr(signal, number))
    told += process.communicate(timeout=20)[1]
    assert b"Traceback" not in told and not out.exists()
    assert process.returncode == (130 if number == "SIGINT" else -9)


def test_errors_are_those_of_model_py():
    """Whoever catches the errors of model.py catches those of its tokenizer."""
    assert issubclass(tk.UserError, model.UserError)
    with pytest.raises(model.UserError, match="there is no tokenizer at"):
        model.load_tokenizer(Path("nowhere"))


# ---- The name: in this folder `import tokenize` still gives the standard library's module

CHECK = "import tokenize; assert tokenize.__file__ != {own!r} and tokenize.TokenInfo"
CHECK += " and not hasattr(tokenize, 'np')"
CHECK = CHECK.format(own=str(ROOT / "tokenize.py"))
WORKER = f"""
import multiprocessing
def work(_):
    {CHECK}
    import linecache, inspect
    return tokenize.generate_tokens.__module__
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(work, [0]) == ["tokenize"]
"""


def run_python(*args, **environment):
    environment |= os.environ
    done = subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr + done.stdout


def test_import_tokenize_by_c():
    run_python("-c", CHECK + "; import inspect, linecache, typing, dataclasses")


@pytest.mark.parametrize("code", [CHECK, WORKER], ids=["script", "spawned worker"])
def test_import_tokenize_by_script(tmp_path, code):
    (tmp_path / "script.py").write_text(code)
    run_python(str(tmp_path / "script.py"), PYTHONPATH=str(ROOT))


def test_import_tokenize_by_pytest(tmp_path):
    (tmp_path / "test_name.py").write_text(f"def test_name():\n    {CHECK}\n")
    run_python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "test_name.py"))


@pytest.mark.slow
def test_import_tokenize_under_compile():
    pytest.importorskip("torch", reason="torch is in requirements.txt")
    code = "import torch; f = torch.compile(lambda x: (x.sin() + 1).sum()); print(f(torch.ones(8))); "
    run_python("-c", code + CHECK)
