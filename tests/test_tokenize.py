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
import unicodedata
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
            c = chr(rng.randrange(0x110000))
            while unicodedata.category(c) in ("Cs", "Cn"):  # what is not assigned yet, libraries know or do not
                c = chr(rng.randrange(0x110000))
            parts.append(rng.choice(traps) if rng.random() < 0.6 else c)
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
    words = tk.in_bytes({"aab": 1, "ab": 2})
    assert tk.train_plain(words, 2, 256) == [(64, 65), (64, 256)]
    assert tk.train_bpe(words, 2) == ([(64, 65), (64, 256)], 3)
    assert tk.count_words(["a b b"], "gpt2") == {"a": 1, " b": 2}
    assert tk.cut("one two six", 2) == ["one", " two", " six"]
    assert tk.find_tokens([{"content": "<a>", "id": 7}], "x<a>") == [("x", None), ("<a>", 7)]


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
    tokenizer = tk.Tokenizer(tk.bpe_file(tk.train_bpe(tk.in_bytes(words), 4)[0], "gpt2"))
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
    merges, n_tokens = tk.train_bpe(tk.in_bytes(words), 40)
    assert merges == tk.train_plain(tk.in_bytes(words), 40, 256)
    for i, pair in enumerate(merges):
        words = {tuple(tk.merge(list(ids_of(word)), pair, 256 + i)): n for word, n in words.items()}
    assert n_tokens == sum(len(ids_of(word)) * n for word, n in words.items())


def test_no_words_no_merges():
    assert tk.train_bpe({}, 5) == ([], 0)


@pytest.mark.parametrize("word", ["a", "aa", "aaa", "aaaa", "aaaaa", "abab", "aabaab", "abababa"])
def test_overlapping_pairs(word):
    assert tk.train_bpe(tk.in_bytes({word: 3}), 9)[0] == tk.train_plain(tk.in_bytes({word: 3}), 9, 256)


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


@pytest.mark.slow
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
    spec = tk.bpe_file(tk.train_bpe(tk.in_bytes({"hello": 2, "12": 3}), 5)[0], "gpt4")
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
        (lambda s: s["model"].update(type="WordLevel"), "WordLevel"),
        (lambda s: s["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (lambda s: s["model"].update(continuing_subword_prefix="##"), "continuing_subword_prefix"),
        (lambda s: s.update(normalizer={"type": "Nmt"}), "Nmt"),
        (lambda s: s.update(pre_tokenizer={"type": "UnicodeScripts"}), "UnicodeScripts"),
        (lambda s: s.update(decoder={"type": "CTC"}), "CTC"),
        (lambda s: s["model"]["vocab"].update({"ĠĠ": s["model"]["vocab"].pop("Ġ")}), "Ġ"),
        (lambda s: s.pop("model"), "tokenizer.json"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, change, named):
    spec = tk.bpe_file(tk.train_bpe(tk.in_bytes({"hello": 2}), 2)[0], "gpt4")
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(tk.UserError, match=re.escape(named)):
        tk.Tokenizer.load(tmp_path)


# ---- What a folder says is honoured, or refused by name


def small_spec(pattern="gpt4", merges=80):
    """Describe a small BPE whose file the tests then change."""
    return tk.bpe_file(tk.train_bpe(tk.in_bytes(tk.count_words(TEXTS, pattern)), merges)[0], pattern)


def add_token(spec, content, i=None, **flags):
    """Add a token as `tokenizers` writes it."""
    there = {token["content"] for token in spec["added_tokens"]} - spec["model"]["vocab"].keys()
    i = spec["model"]["vocab"].get(content, len(spec["model"]["vocab"]) + len(there)) if i is None else i
    token = {"id": i, "content": content, **json.loads(tk.FLAGS), "special": False}
    spec["added_tokens"].append(token | flags)


def both(spec, folder):
    """Open one file with `tokenizers` (special tokens stay text, as ours do) and with ours."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is in requirements-dev.txt")
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    return theirs, tk.Tokenizer.load(folder)


def test_added_tokens_that_are_not_special_come_from_ordinary_text(tmp_path):
    spec = small_spec()
    spec["normalizer"] = {"type": "NFC"}
    for content, normalized in [("<tool>", False), ("<tool>s", True), ("    ", True), ("ab", False),
                                ("abc", True), ("e\u0301t", True), ("def", False), ("(", False)]:
        add_token(spec, content, normalized=normalized)
    theirs, ours = both(spec, tmp_path)
    rng = random.Random(3)
    parts = ["<tool>", "<tool>s", "    ", "abc", "ab", "\u00e9t", "e\u0301t", "def f(x)", " ", "\n", "<|endoftext|>"]
    for _ in range(500):
        text = "".join(rng.choices(parts, k=8))
        assert ours.encode(text) == theirs.encode(text).ids, text
    assert "<tool>" not in ours.special and ours.encode("a<tool>")[-1] == ours.n_vocab - 6
    assert ours.decode(ours.encode("<tool>    def")) == "<tool>    def"


def test_defaults_of_the_format(tmp_path):
    """Files from before tokenizers 0.12 know no use_regex; an empty Sequence is none; parts may be missing."""
    spec = small_spec("gpt2")
    spec["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    spec["normalizer"] = {"type": "Sequence", "normalizers": []}
    for key in "truncation", "padding", "post_processor", "added_tokens":
        del spec[key]
    del spec["model"]["type"], spec["model"]["dropout"]
    spec["model"]["unk_token"] = "!"  # nothing is unknown where all bytes are there
    theirs, ours = both(spec, tmp_path)
    for text in TEXTS[:1] + random_strings(300):
        assert ours.encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize("merges, fine", [
    ([["b", "c"], ["a", "b"], ["ab", "c"]], False),  # "abc" is a|bc there
    ([["a", "b"], ["b", "c"], ["a", "bc"]], False),  # never reached: "abc" is ab|c there
    ([["a", "b"], ["c", "d"], ["b", "c"], ["ab", "c"]], True),
    ([["a", "b"], ["b", "c"], ["a", "bc"], ["ab", "c"]], True),  # several pairs for one token, as Llama 3 has
])  # fmt: skip
def test_merges_in_an_order_of_their_own(tmp_path, merges, fine):
    spec = tk.char_file([*tk.CHAR.values(), *dict.fromkeys(a + b for a, b in merges)])
    spec["model"]["merges"] = merges
    level = json.loads(tk.BYTE_LEVEL)
    spec |= {"decoder": level, "pre_tokenizer": level | {"use_regex": True}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    if not fine:
        with pytest.raises(tk.UserError, match="merges"):
            tk.Tokenizer.load(tmp_path)
        return
    theirs, ours = both(spec, tmp_path)
    rng = random.Random(0)
    for text in ["".join(rng.choices("abcd ", k=9)) for _ in range(500)]:
        assert ours.encode(text) == theirs.encode(text).ids, text


@pytest.mark.parametrize("change", [
    lambda s: s.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "NFC"}]}),
    lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "^[a-z]+|[0-9]$"}),
    lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "[a-z]+"}, invert=True),
    lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(pattern={"String": "e."}),
    lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": ""}),
    lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "a*"}),
    lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"\d{1,2}+"}),
    lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": r"(?=\d)"}),
    lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"),
    lambda s: s["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True}),
    lambda s: s["pre_tokenizer"]["pretokenizers"].insert(
        0, s["pre_tokenizer"]["pretokenizers"][0] | {"pattern": {"Regex": "e"}}),
    lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
    lambda s: s["pre_tokenizer"].update(pretokenizers=[]),
    lambda s: s.update(pre_tokenizer=None),
    lambda s: s.update(decoder=None),
    lambda s: s.update(decoder={"type": "Sequence", "decoders": [json.loads(tk.BYTE_LEVEL), {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}),
    lambda s: s.update(truncation={"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}),
    lambda s: s.update(padding={"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None,
                                "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}),
    lambda s: s["model"].update(ignore_merges=True),
    lambda s: s["model"].update(ignore_merges=True, vocab=s["model"]["vocab"] | {"return": 336}, merges=s["model"]["merges"]),
    lambda s: s["model"].update(dropout=0.5),
    lambda s: s["model"].update(merges=[]),
    lambda s: add_token(s, "<x>", i=500),
    lambda s: add_token(s, "#", i=500),
    lambda s: add_token(s, "#", i=2),
    lambda s: add_token(s, "word", single_word=True),
    lambda s: add_token(s, ""),
    lambda s: s["added_tokens"].clear() or add_token(s, "def"),
])  # fmt: skip
def test_a_form_gives_their_ids_or_is_refused(tmp_path, change):
    """Whatever a file asks for: the ids are those of `tokenizers`, or one sentence says what is not supported."""
    spec = small_spec()
    change(spec)
    try:
        theirs, ours = both(spec, tmp_path)
    except tk.UserError as error:
        assert "tokenizer.json that can be used" in str(error) and "damaged" not in str(error), error
        return
    for text in [TEXTS[0][:3000], "12345 a\nb1\n2 #x word", *random_strings(300)]:
        try:
            ids = ours.encode(text)
        except tk.UserError as error:  # theirs drops it without a word
            assert "not in the vocabulary" in str(error)
            continue
        assert ids == theirs.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs.encode(text).ids, skip_special_tokens=False)


@pytest.mark.parametrize("i", [-5, 2**33, "7", 1.0, True, None, 3])
def test_ids_that_cannot_be(tmp_path, i):
    for part in "vocab", "added_tokens":
        spec = small_spec()
        if part == "vocab":
            spec["model"]["vocab"]["!"] = i
        else:
            spec["added_tokens"][-1]["id"] = i
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
        with pytest.raises(tk.UserError, match="that can be used"):
            tk.Tokenizer.load(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "", "null", "[]", '{"model": {}}', '{"model": {"vocab": [], "merges": 3}}',
                                  '{"model": null, "added_tokens": null}', "\x00"])
def test_files_that_are_no_tokenizers(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(tk.UserError):
        tk.Tokenizer.load(tmp_path)


def template(*single):
    """Make a post-processor of names of special tokens; "A" is the text."""
    parts = [{"Sequence": {"id": "A", "type_id": 0}} if name == "A" else
             {"SpecialToken": {"id": name, "type_id": 0}} for name in single]  # fmt: skip
    ids = {name: {"id": name, "ids": [spec_id], "tokens": [name]} for name, spec_id in IDS.items()}
    return {"type": "TemplateProcessing", "single": parts, "pair": [*parts, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": ids}  # fmt: skip


IDS = {"<|im_start|>": 339, "<|im_end|>": 340, "<think>": 341}


@pytest.mark.parametrize("processor", [
    None,
    json.loads(tk.BYTE_LEVEL),
    template("<|im_start|>", "A"),
    template("<|im_start|>", "<think>", "A", "<|im_end|>"),
    {"type": "Sequence", "processors": [json.loads(tk.BYTE_LEVEL), template("<|im_start|>", "A")]},
    {"type": "Sequence", "processors": [template("<think>", "A"), template("<|im_start|>", "A", "<|im_end|>")]},
    template("A", "<|im_end|>", "A"),
    {"type": "BertProcessing", "sep": ["<|im_end|>", 340], "cls": ["<|im_start|>", 339]},
])  # fmt: skip
def test_what_the_post_processor_puts_around_a_text(tmp_path, processor):
    spec = small_spec()
    spec["post_processor"] = processor
    try:
        theirs, ours = both(spec, tmp_path)
    except tk.UserError as error:
        assert "post_processor" in str(error)
        return
    assert {name: ours.special[name] for name in IDS} == IDS
    for text in "", "def f(x):\n":
        assert [*ours.prefix, *ours.encode(text), *ours.suffix] == theirs.encode(text).ids


@pytest.mark.parametrize("settings", [
    {"bos_token": "<|im_start|>", "eos_token": "<|endoftext|>"},
    {"bos_token": "<|im_start|>", "add_bos_token": True},
    {"bos_token": {"content": "<|im_start|>", "special": True, "__type": "AddedToken", "lstrip": False,
                   "rstrip": False, "normalized": False, "single_word": False},
     "eos_token": "<|im_end|>", "add_eos_token": True, "add_bos_token": True},
    {"bos_token": "<|im_start|>", "add_bos_token": False},
    {"add_eos_token": True},
])  # fmt: skip
def test_settings_of_a_folder_are_those_of_transformers(tmp_path, settings):
    transformers = pytest.importorskip("transformers", reason="transformers is in requirements-dev.txt")
    spec = small_spec()
    spec["post_processor"] = template("<think>", "A")
    settings = settings | {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<|nowhere|>"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8-sig")
    ours = tk.Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):"
    assert [*ours.prefix, *ours.encode(text), *ours.suffix] == auto(text)["input_ids"]
    for key in "bos_token", "eos_token":
        assert ours.names.get(key) == getattr(auto, key)
    assert "pad_token" not in ours.names and tk.Tokenizer.load(tmp_path / "tokenizer.json").names == {}


def test_names_and_the_chat_template_of_a_folder(tmp_path):
    spec = small_spec()
    spec["added_tokens"][0]["content"] = "</s>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    bare = tk.Tokenizer.load(tmp_path)
    assert (bare.chat_template, bare.eot_id) == (tk.CHAT_FORMATS["chatml"][0], None)
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "</s>", "unk_token": "<unk>", "pad_token": null}')
    ours = tk.Tokenizer.load(tmp_path)
    assert ours.names == {"eos_token": "</s>"} and ours.eot_id == 336
    for said in "{{ one }}", [{"name": "default", "template": "{{ one }}"}, {"name": "rag", "template": "two"}]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": said, "eos_token": "<think>"}))
        ours = tk.Tokenizer.load(tmp_path)
        assert ours.chat_template == "{{ one }}" and ours.names == {"eos_token": "<think>"}
    (tmp_path / "chat_template.jinja").write_text("{{ three }}\n")
    assert tk.Tokenizer.load(tmp_path).chat_template == "{{ three }}\n"
    (tmp_path / "chat_template.jinja").unlink()
    for settings in '{"chat_template": {"default": 1}}', '{"chat_template": [3]}', '{"added_tokens_decoder": {"999": {"content": "<new>", "special": false}}}', "[1]", "{":
        (tmp_path / "tokenizer_config.json").write_text(settings)
        with pytest.raises(tk.UserError, match="what stands beside .*tokenizer.json cannot be used"):
            tk.Tokenizer.load(tmp_path)
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes(b'{"a": "\xe9"}')
        with pytest.raises(tk.UserError, match="what stands beside"):
            tk.Tokenizer.load(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize("change", [
    lambda s: s.update(pre_tokenizer={"type": "UnicodeScripts"}),
    lambda s: s.update(decoder=json.loads(tk.BYTE_LEVEL)),
    lambda s: s["model"]["vocab"].update({"ab": 1}),
])  # fmt: skip
def test_what_a_character_file_cannot_say(tmp_path, change):
    spec = tk.char_file(list("abc "))
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(tk.UserError):
        tk.Tokenizer.load(tmp_path)


def test_bytes_are_for_bpe_alone(tmp_path):
    spec = train(["one two three " * 300], 300, algorithm="unigram").spec | {"pre_tokenizer": json.loads(tk.BYTE_LEVEL)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(tk.UserError, match="Unigram on bytes"):
        tk.Tokenizer.load(tmp_path)


def test_two_answers_in_a_row_end_once(bpe):
    """A template may leave out the end of what stands last, as the prompt of the second answer does."""
    ours = tk.Tokenizer(bpe.spec)
    ours.chat_template = "{% for m in messages %}{{ m.content }}{% if not loop.last %}<|im_end|>{% endif %}{% endfor %}"
    ids, own = ours.render([{"role": role, "content": role[0]} for role in ("user", "assistant", "assistant")])
    assert ours.decode(ids) == "u<|im_end|>a<|im_end|>a" and own == [False, True, True, True, True]


def test_half_a_character_is_said_to_be_one(bpe, char):
    for tokenizer in bpe, char:
        for special in (), "all":
            with pytest.raises(tk.UserError, match="not UTF-8"):
                tokenizer.encode("h\ud83de", special)


# ---- Properties, on whatever hypothesis thinks of

hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is in requirements-dev.txt")
from hypothesis import strategies as some  # noqa: E402

quick = hypothesis.settings(max_examples=150, deadline=None, derandomize=True,
                            suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
texts = some.lists(some.one_of(some.text(max_size=9), some.sampled_from([*tk.SPECIAL, "  ", "\r\n", "'ll", "12", "the"]))).map("".join)


@quick
@hypothesis.given(text=texts)
def test_no_text_is_lost_and_none_makes_a_special_token(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text and bpe.decode(bpe.encode(text, "all")) == text
    assert not set(ids) & set(bpe.special.values())


@quick
@hypothesis.given(words=some.dictionaries(some.text("abé ", min_size=1, max_size=9), some.integers(1, 9)), n=some.integers(0, 60))
def test_whatever_is_learned_is_learned_plainly_and_read_back(words, n):
    merges, n_tokens = tk.train_bpe(tk.in_bytes(words), n)
    assert merges == tk.train_plain(tk.in_bytes(words), n, 256)
    tokenizer = tk.Tokenizer(tk.bpe_file(merges, "gpt2"))  # refuses merges that tiktoken could not follow
    for word in words:
        assert tokenizer.decode(tokenizer.encode(word)) == word


@pytest.fixture(scope="module")
def rust(bpe, tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is in requirements-dev.txt")
    bpe.save(path := tmp_path_factory.mktemp("rust") / "tokenizer.json")
    return tokenizers.Tokenizer.from_file(str(path))


@quick
@hypothesis.given(text=texts)
def test_ids_are_those_of_tokenizers_for_any_text(bpe, rust, text):
    assert bpe.encode(text, "all") == rust.encode(text).ids


# ---- The commands


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of Python files with one of each thing that a filter drops."""
    folder = tmp_path_factory.mktemp("corpus") / "lib"
    folder.mkdir()
    for path in sorted(STDLIB.glob("*.py"))[:60]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "copy_of.py").write_bytes((folder / "argparse.py").read_bytes().replace(b"\n", b"  \r\n"))
    (folder / "empty.py").write_text("\n")
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
    dropped = {reason for reason, n in meta["filters"].items() if n["documents"] == 1}
    assert dropped == {*tk.FILTERS, "duplicate"} - {*tk.ON_REQUEST}
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
    assert len(meta["files"]) == 68 and str(corpus.parent) not in (out / "meta.json").read_text()


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


def count_documents(folder: Path) -> int:
    splits = json.loads((folder / "meta.json").read_text())["splits"]
    return sum(split["documents"] for split in splits.values())


RECORDS = [{"text": TEXTS[0][i : i + 900], "id": i} for i in range(0, 9000, 900)]


@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.JsonLines", "a.json", "array.json", "one.json", "pretty.jsonl"])
@pytest.mark.parametrize("named", [True, False])
def test_json_by_any_name_is_read_as_documents(tmp_path, name, named):
    (tmp_path / "in").mkdir()
    lines = "\r\n".join(json.dumps(record) for record in RECORDS) + "\n\n"
    text = {"array.json": json.dumps(RECORDS), "pretty.jsonl": json.dumps(RECORDS, indent=1),
            "one.json": json.dumps({"text": TEXTS[0][:20_000]})}.get(name, lines)  # fmt: skip
    (tmp_path / "in" / name).write_text(text, encoding="utf-8-sig")
    run("prepare", f"in/{name}" if named else "in", "--output", "d", "--vocab-size", 300, cwd=tmp_path)
    assert count_documents(tmp_path / "d") == (2 if name == "one.json" else 10)  # one document is cut in two
    tok = tk.Tokenizer.load(tmp_path / "d")
    assert b'{"' not in tok.decode_bytes(np.fromfile(tmp_path / "d" / "train.bin", dtype="<u2"))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"id": 1}\n', '[{"text": "x"}, 3]', '{"text": ["x"]}', '{"text": null}', "3", '"text"',
                                  '{"text": "x"}\n' + "[" * 100_000, "", "\x00"])
def test_json_of_unexpected_shape(tmp_path, text):
    """The user named it: a sentence. It lies in a folder, as settings do: counted, if it is .json."""
    (tmp_path / "in").mkdir()
    for i in range(3):
        (tmp_path / "in" / f"{i}.txt").write_text(TEXTS[i][:3000])
    (tmp_path / "in" / "x.json").write_text(text)
    run("prepare", "in/x.json", "--output", "d", code=2, cwd=tmp_path)
    told = run("prepare", "in", "--output", "d", "--vocab-size", 300, cwd=tmp_path).stderr.decode()
    assert "1 without the field" in told and count_documents(tmp_path / "d") == 3


def test_deep_json_on_standard_input(tmp_path):
    train(TEXTS[:1], 300).save(tmp_path / "tokenizer.json")
    for text in b"[" * 100_000, b"[1,", b"\xff", b"null", b"[true]", b"[1e3]":
        assert b"JSON" in run("decode", "--tokenizer", tmp_path, stdin=text, code=2).stderr


@pytest.mark.skipif(os.name != "posix", reason="makes pipes, sockets and links")
def test_what_is_no_file_is_counted_or_refused(corpus, tmp_path):
    import shutil
    import socket

    shutil.copytree(corpus, tmp_path / "in")
    os.mkfifo(tmp_path / "in" / "pipe.txt")
    (tmp_path / "in" / "dead.txt").symlink_to("/nowhere/at/all.txt")
    (tmp_path / "in" / "linked").symlink_to(corpus, target_is_directory=True)
    (tmp_path / "in" / "zero.txt").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(tmp_path / "in"):
        listener.bind("socket.txt")
    args = ["--vocab-size", 300, "--output", "d"]
    told = run("prepare", "in", *args, cwd=tmp_path).stderr.decode()
    assert "5 not a file" in told
    run("prepare", corpus, "--vocab-size", 300, "--output", "e", cwd=tmp_path)
    assert read_folder(tmp_path / "d")["train.bin"] == read_folder(tmp_path / "e")["train.bin"]
    with pytest.MonkeyPatch.context() as patch:  # a folder that cannot be opened; root may open them all
        scandir = os.scandir

        def closed(path):
            if str(path).endswith("deeper"):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        patch.setattr(os, "scandir", closed)
        (tmp_path / "in" / "deeper").mkdir()
        assert b"6 not a file" in run("prepare", "in", "--overwrite", *args, cwd=tmp_path).stderr
    for name in "in/pipe.txt", "in/dead.txt", "/dev/zero", "in/socket.txt":
        assert b"no file or folder" in run("prepare", name, "--output", "f", code=2, cwd=tmp_path).stderr
        assert b"no tokenizer" in run("encode", "--tokenizer", name, "x", code=2, cwd=tmp_path).stderr


def test_earlier_output_within_the_input_is_not_read(corpus, tmp_path):
    import shutil

    shutil.copytree(corpus, tmp_path / "in")
    args = ["prepare", "in", "--vocab-size", 300, "--output"]
    run(*args, "in/data/x", cwd=tmp_path)
    (tmp_path / "in" / "run").mkdir()
    for name in "config.json", "tokenizer.json", "metrics.jsonl", "notes.txt":
        (tmp_path / "in" / "run" / name).write_text("{}\n" * 100)
    assert "2 not a file" in run(*args, "d", cwd=tmp_path).stderr.decode()
    assert read_folder(tmp_path / "d")["train.bin"] == read_folder(tmp_path / "in" / "data" / "x")["train.bin"]
    run(*args, "in/data/x", "--overwrite", cwd=tmp_path)  # it may be made anew


def test_an_output_that_is_holds_or_lies_above_an_input(tmp_path):
    for folder in "corpus", "data/earlier", "data/meta":
        (tmp_path / folder).mkdir(parents=True)
    for name in "corpus/a.txt", "corpus/b.txt", "data/notes.txt", "data/earlier/train.bin":
        (tmp_path / name).write_text(TEXTS[0])
    (tmp_path / "data" / "meta" / "meta.json").write_text('{"title": "mine"}')
    (tmp_path / "link").symlink_to("corpus")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for inputs, output in [("corpus", "corpus"), ("corpus", "."), ("corpus", "link"), ("link", "corpus"), ("corpus/a.txt", "corpus"),
                           ("corpus", "data"), ("corpus", "data/meta"), ("corpus", "corpus/../corpus")]:
        told = run("prepare", inputs, "--output", output, "--overwrite", code=2, cwd=tmp_path).stderr.decode()
        assert "has to stay" in told or "no data folder" in told
    args = ["train", "--input", "corpus", "--overwrite", "--output"]
    for output in "corpus/a.txt", "corpus", "data/notes.txt", "data/meta/meta.json", ".":
        run(*args, output, code=2, cwd=tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    # a name does not lead out of data/
    for name in "../x", "..", "a/b", "/x":
        assert b"NAME=" in run("prepare", f"{name}=corpus", code=2, cwd=tmp_path).stderr


def test_an_output_that_is_a_link_stays_one(corpus, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "d").symlink_to("disk")
    for flags in [], ["--overwrite"]:
        run("prepare", corpus, "--output", "d", "--vocab-size", 300, *flags, cwd=tmp_path)
    assert (tmp_path / "d").is_symlink() and set(read_folder(tmp_path / "disk")) == set(tk.DATA_FILES)


def test_byte_order_marks(tmp_path):
    """One text in five encodings is one document, and its mark is no character."""
    (tmp_path / "in").mkdir()
    text = TEXTS[1][:5000] + "é 🙂\n"
    for i, encoding in enumerate(["utf-8", "utf-8-sig", "utf-16"]):
        (tmp_path / "in" / f"{i}.txt").write_bytes(text.encode(encoding))
    (tmp_path / "in" / "3.txt").write_bytes(b"\xfe\xff" + text.encode("utf-16-be"))
    (tmp_path / "in" / "4.txt").write_bytes(b"\xff\xfe" + bytes(range(1, 256)) * 9)
    (tmp_path / "in" / "5.txt").write_text(TEXTS[2])
    told = run("prepare", "in", "--output", "d", "--algorithm", "char", cwd=tmp_path).stderr.decode()
    assert "3 duplicate" in told and "1 not UTF-8" in told and count_documents(tmp_path / "d") == 2
    assert "\ufeff" not in tk.Tokenizer.load(tmp_path / "d").spec["model"]["vocab"]
    spec = (tmp_path / "d" / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "d" / "tokenizer.json").write_text(spec, encoding="utf-8-sig")
    for mark in b"", b"\xef\xbb\xbf":
        ids = json.loads(run("encode", "--tokenizer", tmp_path / "d", stdin=mark + b"def").stdout)
        assert ids == tk.Tokenizer.load(tmp_path / "d").encode("def")


def documents_of(folder: Path, split: str) -> list[bytes]:
    tok = tk.Tokenizer.load(folder)
    ids = np.fromfile(folder / f"{split}.bin", dtype="<u2")
    return [tok.decode_bytes(part[part != tok.eot_id]) for part in np.split(ids, np.flatnonzero(ids == tok.eot_id) + 1)[:-1]]


def test_the_split_is_by_bytes_as_near_as_documents_allow(tmp_path):
    for seed in range(5):
        run("prepare", STDLIB / "json", STDLIB / "email", "--vocab-size", 300, "--val-fraction", 0.25, "--seed", seed,
            "--output", f"d{seed}", cwd=tmp_path)  # fmt: skip
        splits = json.loads((tmp_path / f"d{seed}" / "meta.json").read_text())["splits"]
        assert 0.22 < splits["val"]["bytes"] / sum(split["bytes"] for split in splits.values()) < 0.28
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "large.txt").write_text((TEXTS[0] * 3)[:217_000])
    (tmp_path / "in" / "small.txt").write_text(TEXTS[1][:183])
    for seed in range(4):
        args = ["prepare", "in", "--val-fraction", 0.05, "--seed", seed, "--output", "e"]
        assert b"too unequal" in run(*args, code=2, cwd=tmp_path).stderr
    (tmp_path / "in" / "small.txt").write_text(TEXTS[1][:3000])  # 1.4 % where 5 are asked: said
    for seed in range(4):
        args = ["prepare", "in", "--val-fraction", 0.05, "--seed", seed, "--overwrite", "--output", "e", "--vocab-size", 300]
        assert b"validation: 1 of 2 documents, 1.36% of the bytes" in run(*args, cwd=tmp_path).stderr
        assert documents_of(tmp_path / "e", "val") == [TEXTS[1][:3000].encode()]


def test_near_duplicates_across_the_split_are_counted(tmp_path):
    (tmp_path / "in").mkdir()
    lines = [line for text in TEXTS for line in text.splitlines() if len(line) > 30]
    rng = random.Random(0)
    for i in range(20):
        own = rng.sample(lines, 40)
        (tmp_path / "in" / f"{i}.txt").write_text("\n".join(f"{line} {i}" for line in own))
        if i < 10:  # and a second version, in which a quarter of the lines is another
            (tmp_path / "in" / f"{i}b.txt").write_text("\n".join(f"{line} {i if k % 4 else 'x'}" for k, line in enumerate(own)))
    args = ["prepare", "in", "--vocab-size", 300, "--val-fraction", 0.3, "--output", "d"]
    told = run(*args, cwd=tmp_path).stderr.decode()
    train_texts, val_texts = ([text.decode() for text in documents_of(tmp_path / "d", split)] for split in ("train", "val"))
    near = sum(len({*text.splitlines()} & {*other.splitlines()}) >= 20 for text in val_texts for other in train_texts)
    assert near > 0 and f"near duplicates in training: {near} of {len(val_texts)}" in told
    assert json.loads((tmp_path / "d" / "meta.json").read_text())["near_duplicates"] == near


def test_options_that_would_do_nothing_are_refused(tmp_path):
    train(TEXTS[:1], 300).save(tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text(TEXTS[0])
    for option in ["--algorithm", "bpe"], ["--algorithm", "char"], ["--vocab-size", 4096], ["--pattern", "gpt4"]:
        told = run("prepare", "a.txt", "--tokenizer", "tokenizer.json", *option, code=2, cwd=tmp_path).stderr
        assert b"--tokenizer" in told and option[0].encode() in told
    for option in ["--vocab-size", 400], ["--pattern", "gpt2"]:
        for command in ["prepare", "a.txt", "--output", "c"], ["train", "--input", "a.txt", "--output", "t.json"]:
            told = run(*command, "--algorithm", "char", *option, "--overwrite", cwd=tmp_path, code=2).stderr
            assert f"{option[0]} is for bpe".encode() in told
    assert b"--field body" in run("prepare", "a.txt", "--field", "body", code=2, cwd=tmp_path).stderr
    for option in ["--vocab-size", "0"], ["--vocab-size", "-5"], ["--val-fraction", "nan"], ["--val-fraction", "-inf"], ["--val-fraction", "0"], ["--seed", -(10**26)]:
        assert option[0] in run("prepare", "a.txt", *option, code=2, cwd=tmp_path).stderr.decode()


def test_names_in_brackets_are_shown_as_they_are(tmp_path):
    (tmp_path / "[red].txt").write_text(TEXTS[0])
    told = run("prepare", "[red].txt", "--vocab-size", 300, "--output", "[bold]d", cwd=tmp_path).stderr.decode()
    assert re.search(r"(?m)^\[red\] +train", told) and re.search(r"(?m)^\[bold\]d +train", told)
    assert b"[blue].txt" in run("prepare", "[blue].txt", code=2, cwd=tmp_path).stderr


def test_a_tokenizer_whose_folder_names_the_end_can_prepare(tmp_path):
    spec = small_spec()
    spec["added_tokens"][0]["content"] = "</s>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "a.txt").write_text(TEXTS[0])
    args = ["prepare", "a.txt", "--tokenizer", ".", "--output", "d"]
    assert b"token to end a document with" in run(*args, code=2, cwd=tmp_path).stderr
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    run(*args, cwd=tmp_path)
    assert json.loads((tmp_path / "d" / "meta.json").read_text())["eot_id"] == 336


def test_prepare_without_the_scripts_folder_on_the_path(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    done = run_process("prepare", tmp_path / "a.txt", "--vocab-size", 300, "--output", tmp_path / "d", env={**os.environ, "PYTHONSAFEPATH": "1"})
    assert done.returncode == 0, done.stderr.decode()


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
    (tmp_path / "latin.txt").write_bytes("é\n".encode("latin-1") * 50)
    (tmp_path / "good.txt").write_text(TEXTS[0])
    (tmp_path / "bad.jsonl").write_text(json.dumps({"text": TEXTS[0]}) + "\n{no\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "short.txt").write_text("x")
    (tmp_path / "file").write_text("")
    before = {p.name for p in tmp_path.iterdir()}
    for args, said in [
        (["prepare", "gone.txt"], "no file or folder gone.txt"),
        (["prepare", "empty.txt"], "empty.txt is empty"),
        (["prepare", "binary.txt"], "binary.txt is binary"),
        (["prepare", "latin.txt"], "latin.txt is not UTF-8"),
        (["prepare", "folder"], "no document is left to learn from (short: 1)"),
        (["prepare", "bad.jsonl"], "line 2 of bad.jsonl"),
        (
            ["prepare", "bad.jsonl", "--field", "body"],
            'line 1 of bad.jsonl is no JSON object with a text in "body"',
        ),
        (["prepare", "good.txt", "--vocab-size", 267], "--vocab-size 267 is out of range"),
        (["prepare", "good.txt", "--val-fraction", 1.5], "--val-fraction 1.5 is not between 0 and 1"),
        (["prepare", "good.txt", "--tokenizer", "gone.json"], "there is no tokenizer at gone.json"),
        (["prepare", "good.txt", "--tokenizer", "good.txt"], "good.txt is not a tokenizer.json"),
        (["prepare", "good.txt", "--output", "file/x"], "file"),
        (["train", "--input", "gone.txt", "--output", "t.json"], "no file or folder gone.txt"),
        (["train", "--input", "binary.txt", "--output", "t.json"], "binary.txt is binary"),
        (
            ["train", "--input", "good.txt", "--output", "t.json", "--vocab-size", 10],
            "--vocab-size 10 is out of range",
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
    made = tk.Tokenizer.load(tmp_path / "t.json").n_vocab
    assert f"warning: the text gives {made} ids only" in done.stderr.decode() and 272 < made < 290


@pytest.mark.slow
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
