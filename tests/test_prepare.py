"""Hold `tokenize.py prepare` to what it says: filters, duplicates, sources, weights, memory, kills, bad input."""

import contextlib
import gzip
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import model
import numpy as np
import pytest
from conftest import ROOT, script
from test_tokenize import TEXTS, documents_of, read_folder, run

tk = script("tokenize")
ENGLISH = """The river was low that summer, and the boats lay on the sand where the children of the village had played
since the morning. Nobody had thought that the rain would come back before the harvest, but the old woman at the mill
said it would, and she was right more often than the men who read the paper to each other in the evening. """
FOREIGN = {
    "German": """Der Fluss stand in jenem Sommer niedrig, und die Boote lagen auf dem Sand, auf dem die Kinder des Dorfes
seit dem Morgen gespielt hatten. Niemand hatte gedacht, dass der Regen vor der Ernte zurückkehren würde, aber die alte
Frau in der Mühle sagte es, und sie hatte öfter recht als die Männer, die einander abends die Zeitung vorlasen.""",
    "French": """La rivière était basse cet été-là, et les bateaux restaient sur le sable où les enfants du village avaient
joué depuis le matin. Personne ne pensait que la pluie reviendrait avant la moisson, mais la vieille femme du moulin le
disait, et elle avait plus souvent raison que les hommes qui se lisaient le journal le soir.""",
    "Russian": """В то лето река была мелкой, и лодки лежали на песке, где с утра играли деревенские дети. Никто не думал, что
дождь вернётся до жатвы, но старуха на мельнице говорила, что вернётся, и она бывала права чаще, чем мужчины.""",
}
WORDS = sorted({word for text in TEXTS for word in re.findall("[a-z]{3,}", text)})


def make_texts(n: int, seed: int = 0, length: int = 300) -> list[str]:
    """Draw texts of common words, eight to a line."""
    rng = random.Random(seed)
    texts = []
    for _ in range(n):
        words = rng.choices(WORDS, k=length)
        texts.append("\n".join(" ".join(words[i : i + 8]) for i in range(0, length, 8)))
    return texts


def shingles(text: str) -> set:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def jaccard(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def alter(text: str, index: float, rng: random.Random) -> str:
    """Change as many words, each in 5 shingles, as bring the Jaccard index down to this."""
    words = re.split(r"(\W+)", text)
    places = rng.sample(range(0, len(words), 2), round(len(words) / 2 * (1 - index) / (1 + index) / 5))
    for i in places:
        words[i] = f"x{rng.randrange(10**9)}"
    return "".join(words)


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def prepare(folder: Path, *args, code=0, output="d") -> tuple[dict, str]:
    """Run prepare -> meta.json, what it said."""
    options = [] if "--tokenizer" in args else ["--vocab-size", 300]
    told = run("prepare", *args, *options, "--output", output, "--overwrite", code=code, cwd=folder).stderr.decode()
    return json.loads((folder / output / "meta.json").read_text()) if code == 0 else {}, told


def texts_of(folder: Path, output="d") -> set[str]:
    return {text.decode() for split in ("train", "val") for text in documents_of(folder / output, split)}


# ---- Duplicates


def test_planted_near_duplicates_are_dropped_and_no_others(tmp_path):
    """At an index of 0.9 at least 95 % are found; at 0.5 and below none goes."""
    rng = random.Random(1)
    texts = make_texts(120, length=200)
    near = [alter(text, 0.9, rng) for text in texts[:60]]
    far = [alter(text, index, rng) for index in (0.3, 0.4) for text in texts[60:90]]
    assert 0.87 < np.mean([jaccard(*pair) for pair in zip(texts, near, strict=False)]) < 0.93
    write_lines(tmp_path / "x.jsonl", texts + near + far)
    meta, told = prepare(tmp_path, "x.jsonl", "--near-duplicates", 0.8)
    kept = texts_of(tmp_path)
    assert kept >= {*texts, *far} and len(kept & {*near}) <= 3
    count = meta["filters"]["near-duplicate"]
    assert count["documents"] == 60 - len(kept & {*near}) and count["example"][:20] == " ".join(near[0].split())[:20]
    assert f"dropped: {count['documents']} near-duplicate" in told
    # and without the option all stay, and those across the split are counted
    meta, told = prepare(tmp_path, "x.jsonl")
    assert len(texts_of(tmp_path)) == 240 and "near-duplicate" not in meta["filters"]
    train, val = (documents_of(tmp_path / "d", split) for split in ("train", "val"))
    sets = [shingles(text.decode()) for text in train]
    alike = sum(max(len(s & t) / len(s | t) for t in sets) >= 0.6 for s in (shingles(text.decode()) for text in val))
    assert meta["near_duplicates"] >= 0.95 * alike > 5


def test_signatures_estimate_the_jaccard_index_as_datasketch_does():
    datasketch = pytest.importorskip("datasketch", reason="datasketch is in requirements-dev.txt")
    rng = random.Random(2)
    texts = make_texts(60, seed=2, length=150)
    texts += [alter(text, rng.uniform(0.3, 1), rng) for text in texts]
    errors = {"ours": [], "theirs": []}
    theirs = []
    for text in texts:
        theirs.append(datasketch.MinHash(num_perm=tk.HASHES, seed=1))
        theirs[-1].update_batch([" ".join(s).encode() for s in shingles(text)])
    ours = np.frombuffer(b"".join(map(tk.sign, texts)), np.uint16).reshape(-1, tk.HASHES)
    for i in range(60):
        exact = jaccard(texts[i], texts[i + 60])
        errors["ours"].append((ours[i] == ours[i + 60]).mean() - exact)
        errors["theirs"].append(theirs[i].jaccard(theirs[i + 60]) - exact)
    spread = {name: np.sqrt(np.mean(np.square(e))) for name, e in errors.items()}
    assert abs(np.mean(errors["ours"])) < 0.02 and spread["ours"] < 1.3 * max(spread["theirs"], 0.04)
    # the pairs that are found are those of datasketch's index with the same bands
    lsh = datasketch.MinHashLSH(num_perm=tk.HASHES, params=(16, 7))
    for i, signature in enumerate(theirs):
        lsh.insert(i, signature)
    expected = {(i, j) for i, signature in enumerate(theirs) for j in lsh.query(signature) if i < j}
    expected = {(i, j) for i, j in expected if jaccard(texts[i], texts[j]) > 0.9}
    found = [zip(*map(np.ndarray.tolist, pair), strict=True) for pair in tk.find_pairs(ours, np.arange(120), 0.8)]
    found = set(itertools.chain.from_iterable(found))
    assert found >= expected != set() and all(jaccard(texts[i], texts[j]) > 0.65 for i, j in found)


def test_short_texts_and_scripts_without_spaces_have_shingles():
    alike = lambda a, b: np.mean(np.frombuffer(tk.sign(a), np.uint16) == np.frombuffer(tk.sign(b), np.uint16))  # noqa: E731
    chinese = "今年夏天河水很浅孩子们从早上起就在沙滩上玩耍没有人想到收获之前会下雨但是磨坊里的老妇人说会下雨的"
    assert alike("One two THREE", "one, two: three!") == 1 and alike("!?", "?!") == alike("one", "two") == 0
    assert 0.6 < alike(chinese, chinese.replace("孩", "狗")) < 1 and alike(chinese, chinese[::-1]) < 0.1


# ---- Filters


ODD = {  # name -> a text that this filter drops, and no other one
    "symbols": " ".join(random.Random(0).choices(["-->", "{}", "a", "((", "bee", "]]", "$$$", "see"], k=400)),
    "digits": " ".join(f"word{random.Random(i).randrange(10**3)}" for i in range(300)),
    "repeated-lines": "\n".join(line for text in make_texts(1, 3) for line in text.splitlines() for _ in "ab"),
    "generated": "\n".join(f"{a} = {b}; {c}" for a, b, c in zip(WORDS, WORDS[50:], WORDS[90:300], strict=False)),
    "toxic": "\n".join(make_texts(1, 4)) + " shit" * 20,
}


def test_filters_are_chosen_by_name_and_tell_what_they_dropped(tmp_path):
    (tmp_path / "in").mkdir()
    for i, text in enumerate(make_texts(8, 5)):
        (tmp_path / "in" / f"good{i}.txt").write_text(text)
    for name, text in ODD.items():
        (tmp_path / "in" / f"{name}.txt").write_text(text)
    (tmp_path / "in" / "short.txt").write_text("Two words, or 4.")
    meta, _ = prepare(tmp_path, "in")
    assert {name for name, n in meta["filters"].items() if n["documents"]} == {"short"}
    assert not {*meta["filters"]} & {name.replace("-", " ") for name in ODD}  # none is hidden, none is there unasked
    meta, told = prepare(tmp_path, "in", "--filter", "all", "--filter", "no-short")
    assert "short" not in meta["filters"] and "Two words, or 4." in texts_of(tmp_path)
    for name, text in ODD.items():
        reason = name.replace("-", " ")
        count = meta["filters"][reason]
        assert (count["documents"], count["bytes"]) == (1, len(text.encode())), (name, meta["filters"])
        assert count["example"].startswith(f"{name}.txt: {' '.join(text.split())[:20]}") and f"dropped: 1 {reason}" in told
    assert "--filter all --filter no-short" in meta["command"]
    for name in ODD:
        meta, _ = prepare(tmp_path, "in", "--filter", name)
        assert [n["documents"] for n in meta["filters"].values()].count(1) == 2, name
    meta, _ = prepare(tmp_path, "in", "--filter", "no-all")
    assert {*meta["filters"]} == {*tk.MUST_PASS, "not a file", "without the field", "duplicate"}


def test_a_list_of_words_of_the_users_own(tmp_path):
    texts = make_texts(10, 6)
    (tmp_path / "words.txt").write_text("Rutabaga\n")
    write_lines(tmp_path / "x.jsonl", [*texts, texts[0] + " rutabaga!" * 9, texts[1] + " shit" * 9])
    meta, _ = prepare(tmp_path, "x.jsonl", "--toxic", "words.txt")
    assert meta["filters"]["toxic"]["documents"] == 1 and not any("rutabaga" in text for text in texts_of(tmp_path))


def test_language_by_its_letters(tmp_path):
    texts = [ENGLISH.replace("river", word) for word in WORDS[:9]]
    write_lines(tmp_path / "x.jsonl", [*texts, *FOREIGN.values()])
    meta, _ = prepare(tmp_path, "x.jsonl", "--language", "en")
    assert meta["filters"]["language"]["documents"] == 3 and texts_of(tmp_path) == {*texts}
    (tmp_path / "german.txt").write_text(" ".join(f"{FOREIGN['German']} Wir sahen {i} Boote." for i in range(10)))
    write_lines(tmp_path / "y.jsonl", [*texts[:2], FOREIGN["French"], *(f"{i}. {FOREIGN['German']}" for i in range(9))])
    meta, _ = prepare(tmp_path, "y.jsonl", "--language", "german.txt")
    assert meta["filters"]["language"]["documents"] == 3 and all("Fluss" in text for text in texts_of(tmp_path))


@pytest.mark.parametrize("size", [400, 9000])
def test_quality_is_likeness_to_a_text_of_the_users(tmp_path, size):
    """A tenth of the texts are of other words than the reference, rare ones or common ones: they are what goes."""
    half = WORDS[::2]
    rng = random.Random(7)
    good = [" ".join(rng.choices(half, k=200)) for _ in range(45)]
    bad = ["\n".join(rng.choices(WORDS[1::2], k=size)) for _ in range(5)]
    (tmp_path / "reference.txt").write_text(" ".join(rng.choices(half, k=5000)))
    write_lines(tmp_path / "x.jsonl", [*good[:20], *bad, *good[20:]])
    meta, _ = prepare(tmp_path, "x.jsonl", "--quality", "reference.txt")
    assert texts_of(tmp_path) == {*good} and meta["filters"]["quality"]["documents"] == 5


# ---- Sources


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_files_are_read(tmp_path, suffix, monkeypatch):
    if suffix == ".gz":
        pack = gzip.compress
    else:  # Python 3.14 has it; before, the same module comes by another name
        zstd = pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd",
                                   reason="zstd needs Python 3.14, or backports.zstd")  # fmt: skip
        monkeypatch.setitem(sys.modules, "compression", type(sys)("compression"))
        sys.modules["compression"].zstd = zstd
        pack = zstd.compress
    plain = write_lines(tmp_path / "a.jsonl", make_texts(30, 8)).read_bytes()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / f"a.jsonl{suffix}").write_bytes(pack(plain))
    (tmp_path / "in" / f"b.txt{suffix}").write_bytes(pack(ENGLISH.encode()))
    (tmp_path / "b.txt").write_text(ENGLISH)
    prepare(tmp_path, "x=a.jsonl", "x=b.txt", output="plain")
    prepare(tmp_path, "x=in", output="packed")
    meta, _ = prepare(tmp_path, f"in/a.jsonl{suffix}", f"in/b.txt{suffix}", output="named")
    ids = [(tmp_path / name / "train.bin").read_bytes() for name in ("plain", "packed", "named")]
    assert ids[0] == ids[1] == ids[2] and {*meta["sources"]} == {"a", "b"}
    for cut in pack(plain)[:-9], pack(plain)[:50] + b"....." + pack(plain)[55:], b"no such thing":
        (tmp_path / "in" / f"a.jsonl{suffix}").write_bytes(cut)
        _, told = prepare(tmp_path, "in", code=2)
        assert f"a.jsonl{suffix}" in told and "cannot be unpacked" in told


def test_weights_of_a_mixture(tmp_path):
    for i, (name, n) in enumerate({"web": 60, "books": 20, "code": 20}.items()):
        write_lines(tmp_path / f"{name}.jsonl", make_texts(n, 10 + i))
    inputs = ["web.jsonl", "books.jsonl", "code.jsonl"]
    before, _ = prepare(tmp_path, *inputs)
    plain = documents_of(tmp_path / "d", "val")
    weights = ["--weight", "web=0.3", "--weight", "books=0.6", "--weight", "code=0.1"]
    meta, told = prepare(tmp_path, *inputs, *weights)
    assert documents_of(tmp_path / "d", "val") == plain  # validation is not mixed
    total = meta["splits"]["train"]["bytes"]
    assert abs(total / before["splits"]["train"]["bytes"] - 1) < 0.05
    for name, share in {"web": 0.3, "books": 0.6, "code": 0.1}.items():
        source = meta["sources"][name]
        assert abs(source["train"]["bytes"] / total - share) < 0.03 and source["weight"] == share
        epochs = source["train"]["bytes"] / before["sources"][name]["train"]["bytes"]
        assert abs(source["epochs"] - epochs) < 0.1 and f"{source['epochs']} epochs" in told
    books = [text for text in documents_of(tmp_path / "d", "train") if text.decode() in set(make_texts(20, 11))]
    assert len(books) > 2.2 * len({*books})
    assert np.mean([a == b for a, b in itertools.pairwise(books)]) < 0.3  # the copies lie apart
    for wrong in ["web=1"], ["wob=1", *weights[1::2]], ["web=0", "books=1", "code=1"], ["web", "books=1", "code=1"]:
        options = [word for weight in wrong for word in ("--weight", weight)]
        assert "--weight" in prepare(tmp_path, *inputs, *options, code=2)[1]


def test_a_source_without_a_small_enough_document_is_no_source_left_out(tmp_path):
    write_lines(tmp_path / "a.jsonl", make_texts(1, 1, 2000))
    write_lines(tmp_path / "b.jsonl", make_texts(40, 2))
    told = prepare(tmp_path, "a.jsonl", "b.jsonl", "--weight", "a=0.02", "--weight", "b=0.98", code=2)[1]
    assert "no document of a is as small" in told
    told = prepare(tmp_path, "a.jsonl", "--weight", "a=1", "--weight", "a=2", code=2)[1]
    assert "a has one already" in told


def test_equal_halves_of_one_document_are_two_splits(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0][:3000] * 2)
    meta, _ = prepare(tmp_path, "a.txt", "--val-fraction", 0.5)
    assert {split["bytes"] for split in meta["splits"].values()} == {3000}
    assert documents_of(tmp_path / "d", "train") == documents_of(tmp_path / "d", "val")
    (tmp_path / "b.txt").write_text("b")
    assert "one character" in prepare(tmp_path, "b.txt", code=2)[1]


def test_a_tokenizers_settings_go_into_the_data_and_on_into_a_checkpoint(tmp_path):
    """Names of tokens and chat template, which a tokenizer.json does not hold."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in make_texts(9)))
    run("train", "--input", "a.jsonl", "--output", "t/tokenizer.json", "--vocab-size", 300, "--chat", "llama2", cwd=tmp_path)
    settings = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "</s>", "rope": 1}))
    prepare(tmp_path, "a.jsonl", "--tokenizer", "t")
    template, special, end = tk.CHAT_FORMATS["llama2"]
    for folder in ("d", "checkpoint"):
        ours = tk.Tokenizer.load(tmp_path / folder)
        assert ours.names["eos_token"] == "</s>" and ours.chat_template == template
        if folder == "d":
            files = model.checkpoint_files(model.PRESETS["nano"], tmp_path / "d" / "tokenizer.json")
            (tmp_path / "checkpoint").mkdir()
            for name, text in files.items():
                (tmp_path / "checkpoint" / name).write_text(text)
    prepare(tmp_path, "a.jsonl")  # with another tokenizer they go
    assert not (tmp_path / "d" / "tokenizer_config.json").exists()
    args = ["train", "--input", "a.jsonl", "--output", "t/tokenizer.json", "--vocab-size", 300]
    run(*args, "--overwrite", cwd=tmp_path)
    assert not (tmp_path / "t" / "tokenizer_config.json").exists()
    (tmp_path / "t" / "tokenizer.json").unlink()
    (tmp_path / "t" / "tokenizer_config.json").write_text("{}")
    assert b"another tokenizer" in run(*args, code=2, cwd=tmp_path).stderr


def test_the_command_is_written_down_without_folders_of_this_machine(tmp_path):
    write_lines(tmp_path / "a.jsonl", make_texts(9))
    meta, _ = prepare(tmp_path, f"b={tmp_path / 'a.jsonl'}", "--special", "/think")
    assert str(tmp_path) not in meta["command"]
    assert "prepare b=a.jsonl " in meta["command"] and "--special /think" in meta["command"]


@pytest.mark.parametrize("args, said", [
    (["a.txt", "--quality", "english.txt"], "too few"),
    (["a.txt", "--language", "english.txt"], "write --language en"),
    (["a.txt", "--near-duplicates", "1.5"], "--near-duplicates 1.5 is out of range"),
    (["a.txt", "--near-duplicates", "0.01"], "--near-duplicates 0.01 is out of range"),
    (["a.txt", "--near-duplicates", "nan"], "--near-duplicates nan is out of range"),
    (["a.txt", "--filter", "nope"], "there is no filter 'nope'"),
    (["a.txt", "--filter", "no-binary"], "there is no filter 'no-binary'"),
    (["a.txt", "--filter", "language"], "there is no filter 'language'"),
    (["a.txt", "--language", "xx"], "there is no file xx"),
    (["a.txt", "--language", "short.txt"], "too short"),
    (["a.txt", "--quality", "gone.txt"], "there is no file gone.txt"),
    (["a.txt", "--toxic", "latin.txt"], "latin.txt is not UTF-8 text"),
    (["a.txt", "--weight", "a=2,5"], "write NAME=SHARE"),
    (["a.jsonl.zst"], "a.jsonl.zst needs Python 3.14"),
])  # fmt: skip
def test_bad_input_gets_a_sentence(tmp_path, args, said, monkeypatch):
    monkeypatch.setitem(sys.modules, "compression", None)
    (tmp_path / "a.txt").write_text(TEXTS[0])
    (tmp_path / "short.txt").write_text("Ein Fluss.")
    (tmp_path / "english.txt").write_text(ENGLISH * 8)
    (tmp_path / "latin.txt").write_bytes("été".encode("latin-1"))
    (tmp_path / "a.jsonl.zst").write_bytes(b"(\xb5/\xfd")
    assert said in prepare(tmp_path, *args, code=2)[1] and not (tmp_path / "d").exists()


# ---- Memory, kills


def test_a_few_items_are_held_at_a_time():
    taken = itertools.count()
    results = tk.compute(lambda i: i * i, (next(taken) for _ in range(10**9)))
    assert [next(results) for _ in range(5)] == [0, 1, 4, 9, 16]
    results.close()
    assert next(taken) <= 5 + 2 * (os.cpu_count() or 1)


PEAK = """import os, resource, runpy, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
sys.argv = sys.argv[1:]
try: runpy.run_path(sys.argv[0], run_name="__main__")
finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr)"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory as Linux counts it")
def test_memory_stays_flat(tmp_path):
    texts = make_texts(400, 20, 400)
    prepare(tmp_path, write_lines(tmp_path / "small.jsonl", texts), output="small")
    peaks = {}
    for n in 6, 20:
        with open(tmp_path / f"{n}.jsonl", "w") as file:
            for i in range(n * 400):
                file.write(json.dumps({"text": f"{i} {texts[i % 400]}"}) + "\n")
        args = ["prepare", tmp_path / f"{n}.jsonl", "--tokenizer", tmp_path / "small", "--output", tmp_path / f"d{n}"]
        done = subprocess.run([sys.executable, "-c", PEAK, ROOT / "tokenize.py", *args], capture_output=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr.decode()
        peaks[(tmp_path / f"{n}.jsonl").stat().st_size] = 1024 * int(done.stderr.split()[-1])
    (small, before), (large, after) = peaks.items()
    under_way = 24e6  # two cores have some lists of 4 MB under way, which the small file does not fill
    assert after - before < 0.3 * (large - small) + under_way, peaks


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
def test_a_kill_at_any_moment_leaves_the_folder_as_it_was(tmp_path):
    write_lines(tmp_path / "x.jsonl", make_texts(500, 30))
    args = [sys.executable, ROOT / "tokenize.py", "prepare", "x.jsonl", "--vocab-size", "300", "--output", "d"]
    subprocess.run(args, check=True, cwd=tmp_path, capture_output=True)
    before = read_folder(tmp_path / "d")
    args += ["--seed", "1"]
    started = time.monotonic()
    subprocess.run([*args[:-3], "e", *args[-2:]], check=True, cwd=tmp_path, capture_output=True)
    whole = time.monotonic() - started
    after = read_folder(tmp_path / "e")
    old = 0
    rng = random.Random(0)
    for number in [signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGKILL]:
        process = subprocess.Popen([*args, "--overwrite"], cwd=tmp_path, stderr=subprocess.DEVNULL,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0.2, 0.8) * whole)
        process.send_signal(number)
        process.wait()
        model.finish_save(tmp_path / "d")  # as every reader of a folder begins
        found = {n: data for n, data in read_folder(tmp_path / "d").items() if not n.endswith(".new")}
        assert found in (before, after)  # and nothing else: no half of a file, none of another name
        old += found == before
        assert {path.name for path in tmp_path.iterdir()} == {"x.jsonl", "d", "e"}
        for name, data in before.items():
            (tmp_path / "d" / name).write_bytes(data)
    assert old >= 1
