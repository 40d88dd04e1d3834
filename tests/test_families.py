"""Hold every algorithm of tokenize.py, and every form of a published file, against `tokenizers` and transformers."""

import base64
import itertools
import json
import math
import random
import time
import unicodedata
from collections import Counter

import numpy as np
import pytest
from test_tokenize import STDLIB, TEXTS, both, random_strings, run, small_spec, tk, train

LANGUAGES = [
    "The quick brown fox isn't here: I'll say 3,14 \u201cyes\u201d.", "Größere Äpfel, naïve cafés.", "Привет, мир!",
    "नमस्ते दुनिया।", "こんにちは世界。", "你好，世界！", "안녕하세요 세계", "مرحبا بالعالم", "שלום עולם", "สวัสดีชาวโลก",
    "Γειά σου Κόσμε Σας", "İstanbul ılık", "வணக்கம் உலகம்", "Xin chào thế giới", "Բարեւ աշխարհ", "def f(x):\n\treturn  x\r\n",
]  # fmt: skip
KINDS = {
    "bpe": {}, "byte": {}, "char": {}, "wordpiece": {"normalizer": "cased"}, "uncased": {}, "spm-bpe": {},
    "unigram": {}, "unigram nfkc": {"normalizer": "nfkc"},
}  # fmt: skip
RANDOM = [text for text in random_strings(600, seed=7) if max(text) < "\U00010000"]  # libraries' Unicode differs


@pytest.fixture(scope="module", params=list(KINDS))
def learned(request, tmp_path_factory):
    """Learn a tokenizer of each kind, and open its file with `tokenizers` too."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is in requirements-dev.txt")
    kind = {"uncased": "wordpiece"}.get(request.param, request.param.split()[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tk, "track", lambda items, *rest: items)
        texts = [*TEXTS[:2], "\n".join(LANGUAGES)]
        tokenizer, _ = tk.train_tokenizer(texts, kind, vocab_size=1200, **KINDS[request.param])
    path = tmp_path_factory.mktemp("learned") / "tokenizer.json"
    tokenizer.save(path)
    theirs = tokenizers.Tokenizer.from_file(str(path))
    theirs.encode_special_tokens = True
    return request.param, tk.Tokenizer.load(path), theirs


def hold(name, ours, theirs, texts):
    for text in texts:
        try:
            ids = ours.encode(text)
        except tk.UserError:
            assert name == "char"
            continue
        assert ids == theirs.encode(text, add_special_tokens=False).ids, text
        assert not set(ids) & set(ours.special.values())
        if name not in ("wordpiece", "uncased", "unigram nfkc"):
            assert ours.decode(ids) == (text if name in ("bpe", "byte", "char") else text.replace(tk.SPACE, " "))


def test_ids_are_theirs_and_text_comes_back(learned):
    name, ours, theirs = learned
    assert name in ("byte", "char") or ours.n_vocab == 1200
    hold(name, ours, theirs, [*LANGUAGES, TEXTS[2][:5000], "", " ", "<|endoftext|>", "<|special|>", "<unk>", "[UNK]", "<0x0A>", *RANDOM])
    with pytest.raises(tk.UserError, match="half"):
        ours.encode("a\ud800")


@pytest.mark.slow
def test_ids_are_theirs_on_many_strings(learned):
    name, ours, theirs = learned
    texts = random_strings(12_500, seed=1)
    if name in ("wordpiece", "uncased", "unigram nfkc"):  # these ask Unicode's tables, and libraries have other versions
        old = unicodedata.ucd_3_2_0.category
        texts = [text for text in texts if "Cn" not in map(old, text)]
    assert len(texts) > 1000
    hold(name, ours, theirs, texts)


def test_special_tokens_come_when_they_are_named(learned):
    name, ours, _ = learned
    for token, i in ours.special.items():
        assert ours.encode(f"a{token}a", token).count(i) == 1
        if name != "char":
            assert i not in ours.encode(f"a{token}a")


def test_the_name_of_a_byte_is_text_where_its_letters_were_never_seen(tmp_path):
    """Unigram knows <0x41> as a token: a text that spells it stays text, however it is cut."""
    text = "plain words and nothing else, over and over " * 40
    ours, n_tokens = tk.train_tokenizer([text], "unigram", vocab_size=340)
    theirs, ours = both(ours.spec, tmp_path)
    assert ours.encode("x<0x41>y") == theirs.encode("x<0x41>y").ids and n_tokens == len(ours.encode(text))
    assert {ours.decode(ids) for ids in ours.encode_ways("x<0x41>y", 3, None, None)} == {"x<0x41>y"}


def test_a_coverage_that_leaves_no_word_is_refused():
    with pytest.raises(tk.UserError, match="no word is left"):
        tk.train_tokenizer(["aab aac aad"], "wordpiece", vocab_size=40, coverage=0.3)


@pytest.mark.parametrize("kind", ["wordpiece", "spm-bpe", "unigram"])
def test_tokens_are_counted_as_they_are_made(kind):
    """Characters beyond the coverage, too."""
    texts = ["one two three four " * 50, "\u4e16\u754c "]
    ours, n_tokens = tk.train_tokenizer(texts, kind, vocab_size=340 if kind != "wordpiece" else 60, coverage=0.99)
    assert n_tokens == sum(len(ours.encode(text)) for text in texts)


@pytest.mark.parametrize("change", [
    lambda s: s["normalizer"].pop("clean_text"), lambda s: s["normalizer"].pop("lowercase"),
    lambda s: s["model"].pop("max_input_chars_per_word"), lambda s: s["model"].pop("unk_token"),
    lambda s: s.update(normalizer={"type": "Replace", "pattern": {"String": "a"}}),
])  # fmt: skip
def test_a_damaged_part_shows_when_the_file_is_opened(tmp_path, change):
    spec = tk.wordpiece_file(["[UNK]", "a", "##b"], tk.SPECIAL, True)
    tk.Tokenizer(spec)
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(tk.UserError, match="damaged"):
        tk.Tokenizer.load(tmp_path)


def test_an_added_token_that_normalizes_to_nothing_is_nowhere():
    spec = tk.wordpiece_file(["[UNK]", "the", "e", "##e"], tk.SPECIAL, True)
    ids = tk.Tokenizer(spec).encode("the eee")
    token = {"id": 15, "content": "\u200b", "normalized": True, "special": False}
    spec["added_tokens"].append({**json.loads(tk.FLAGS), **token})
    assert tk.Tokenizer(spec).encode("the eee") == ids and len(ids) == 4


# ---- The methods, against themselves told plainly


def test_wordpiece_is_learned_as_it_is_told():
    rng = random.Random(0)
    for _ in range(60):
        words = {tuple(rng.choices(range(5), k=rng.randint(1, 9))): rng.randint(1, 40) for _ in range(30)}
        n = rng.randint(1, 25)
        assert tk.train_wordpiece(words, n, 5) == tk.train_plain(words, n, 5, wordpiece=True)


def ways_of(word, p):
    """List all ways to cut a word into pieces."""
    if not word:
        return [[]]
    return [[word[:k], *rest] for k in range(1, len(word) + 1) if word[:k] in p for rest in ways_of(word[k:], p)]


def test_expected_counts_are_those_of_all_ways():
    words = {"abab": 3, "ba": 2, "aab": 1, "b": 5}
    lattice = tk.Lattice(list(words), list(words.values()))
    pieces = lattice.find_pieces(3, 100)
    assert set(pieces) == {"a", "b", "ab", "ba", "aba", "bab"} - {p for p in ("aba", "bab") if p not in pieces}
    p = np.random.default_rng(0).dirichlet(np.ones(len(pieces)))
    known = dict(zip(pieces, p, strict=True))
    counts, whole = lattice.expect(p)
    expected = Counter()
    for i, word in enumerate(lattice.words):
        ways = [(math.prod(known[x] for x in way), way) for way in ways_of(word, known)]
        total = sum(q for q, _ in ways)
        assert whole[i] == pytest.approx(total * tk.CHAR_SCALE ** len(word))
        for q, way in ways:
            for piece in way:
                expected[piece] += words[word] * q / total
    assert counts == pytest.approx([expected[piece] for piece in pieces])


def test_the_ways_to_cut_are_the_best_ones_and_drawn_as_likely_as_they_are():
    rng = random.Random(0)
    logp = {"".join(c): -rng.uniform(1, 5) for n in (1, 2, 3) for c in itertools.product("ab", repeat=n)}
    del logp["a"]
    costs = (logp, 3, -12.0)
    for _ in range(30):
        word = "".join(rng.choices("ab", k=6))
        price = {**logp, "a": -12.0}
        ways = sorted(((sum(price[x] for x in way), way) for way in ways_of(word, price)), reverse=True)
        assert tk.viterbi(word, *costs) == ways[0][1]
        assert [way for _, way in tk.n_best(word, *costs, 5)] == [way for _, way in ways[:5]]
    drawn = Counter(tuple(tk.sample_pieces("abba", *costs, 0.5, rng)) for _ in range(4000))
    weights = {tuple(way): math.exp(0.5 * sum({**logp, "a": -12.0}[x] for x in way)) for way in ways_of("abba", {**logp, "a": 0})}
    total = sum(weights.values())
    chi = sum((drawn[way] - 4000 * w / total) ** 2 / (4000 * w / total) for way, w in weights.items())
    assert len(weights) > 3 and chi < 3 * len(weights) + 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unigram", "spm-bpe"])
def test_as_few_tokens_as_sentencepiece(tmp_path, kind):
    """Trained on the same lines at the same size: tokens of held-out lines within 1 %."""
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = [path.read_text(encoding="utf-8") for path in sorted(STDLIB.glob("*.py"))[:80]]
    lines = [" ".join(line.split()) for text in texts for line in text.splitlines() if line.strip()]
    lines = [line.replace(tk.SPACE, "") for line in lines]
    random.Random(0).shuffle(lines)
    held, lines = lines[:5000], lines[5000:]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    ours, _ = tk.train_tokenizer(lines, kind, vocab_size=4000)
    n = ours.n_vocab - len(ours.special) + 2  # theirs has <s>, </s>
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "lines.txt"), model_prefix=str(tmp_path / "sp"), vocab_size=n, minloglevel=2,
        model_type=kind.replace("spm-", ""), byte_fallback=True, normalization_rule_name="identity")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    ratio = sum(len(ours.encode(x)) for x in held) / sum(len(theirs.encode(x)) for x in held)
    assert 0.97 < ratio < 1.01


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "spm-bpe", pytest.param("unigram", marks=pytest.mark.slow)])
@pytest.mark.parametrize("unit", [" ", "a", "ab1 "])
def test_odd_texts_take_time_in_proportion(kind, unit):
    tokenizer = train(TEXTS[:1], 700, algorithm=kind)
    times = []
    for n in (12_500, 50_000):
        text = unit * (n // len(unit))
        start = time.process_time()
        tokenizer.encode(text)
        tk.train_tokenizer([text + TEXTS[0]], kind, vocab_size=700)
        times.append(time.process_time() - start)
    assert times[1] < 8 * times[0] + 0.3


# ---- Files of others


def step(**about):
    return lambda s: s.update(about)


def split(pattern, behavior, **more):
    form = {"Regex": pattern} if more.pop("regex", True) else {"String": pattern}
    return {"type": "Split", "pattern": form, "behavior": behavior, "invert": False, **more}


NORMALIZERS = [
    {"type": "NFD"}, {"type": "NFKC"}, {"type": "NFKD"}, {"type": "Lowercase"}, {"type": "Strip", "strip_left": True, "strip_right": False},
    {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}, {"type": "Prepend", "prepend": "x"}]},
    {"type": "Replace", "pattern": {"String": " "}, "content": "_"}, {"type": "Replace", "pattern": {"Regex": r"\d+"}, "content": "0"},
    {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
    {"type": "BertNormalizer", "clean_text": False, "handle_chinese_chars": False, "strip_accents": True, "lowercase": False},
]  # fmt: skip
LEVEL = json.loads(tk.BYTE_LEVEL)
CUTS = [
    [split("e", behavior), LEVEL]
    for behavior in ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous")
]
CUTS += [
    [split("[a-z]+", "Isolated", invert=True), LEVEL], [split("e.", "Isolated", regex=False), LEVEL],
    [{"type": "Digits", "individual_digits": True}, LEVEL], [{"type": "Digits", "individual_digits": False}, LEVEL],
    [{"type": "Punctuation", "behavior": "Isolated"}, LEVEL], [{"type": "WhitespaceSplit"}, LEVEL],
    [split(r"\p{N}{1,3}", "Isolated"), split("[一-龥]+", "Isolated"), split(tk.PATTERNS["gpt2"], "Isolated"), LEVEL],
    [LEVEL | {"add_prefix_space": True, "use_regex": True}], [{"type": "Whitespace"}, LEVEL],
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("part", [*NORMALIZERS, *CUTS], ids=lambda part: json.dumps(part)[:60])
def test_parts_of_published_files_give_their_ids(tmp_path, part):
    spec = small_spec()
    if isinstance(part, list):
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": part}
    else:
        spec["normalizer"] = part
    theirs, ours = both(spec, tmp_path)
    for text in [*LANGUAGES, TEXTS[0][:3000], "12345 eel. ee!!", *RANDOM[:120]]:
        assert ours.encode(text) == theirs.encode(text).ids, text


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"single_word": True}, {"lstrip": True, "rstrip": True}], ids=str)
def test_added_tokens_take_white_space_or_whole_words(tmp_path, flags):
    spec = small_spec()
    i = len(spec["model"]["vocab"]) + len(spec["added_tokens"])
    for k, name in enumerate(("<tool>", "word")):
        spec["added_tokens"].append({**json.loads(tk.FLAGS), "id": i + k, "content": name, "special": False, **flags})
    theirs, ours = both(spec, tmp_path)
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(rng.choices(["<tool>", "word", "sword", "é", " ", "\n", "x", "  ", "!"], k=7))
        assert ours.encode(text) == theirs.encode(text).ids, text


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_metaspace_and_byte_fallback(tmp_path, scheme):
    """Llama's, Mistral's and T5's way to write spaces, with a special token in the middle of a text."""
    ours, _ = tk.train_tokenizer(TEXTS[:1], "spm-bpe", vocab_size=700)
    spec = ours.spec
    spec["normalizer"] = None
    spec["pre_tokenizer"] = {"type": "Metaspace", "replacement": tk.SPACE, "prepend_scheme": scheme, "split": False}
    theirs, ours = both(spec, tmp_path)
    theirs.encode_special_tokens = False
    for text in [*LANGUAGES, "a<|endoftext|>b c<|endoftext|> d", "<|endoftext|>x", *RANDOM[:100]]:
        assert ours.encode(text, "all") == theirs.encode(text).ids, text


def test_a_table_of_characters(tmp_path):
    """SentencePiece's own table, as T5's file carries it: from a model that it trained."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = pytest.importorskip("transformers.utils.sentencepiece_model_pb2_new", reason="reads the model's file")
    (tmp_path / "a.txt").write_text("\n".join([*LANGUAGES, *TEXTS[0].splitlines()[:300]]))
    sentencepiece.SentencePieceTrainer.train(input=str(tmp_path / "a.txt"), model_prefix=str(tmp_path / "m"), vocab_size=500, minloglevel=2)
    proto = model.ModelProto.FromString((tmp_path / "m.model").read_bytes())
    spec = tk.describe_tokenizer({"type": "Unigram", "unk_id": 0, "vocab": [[p.piece, p.score] for p in proto.pieces]})
    table = base64.b64encode(proto.normalizer_spec.precompiled_charsmap).decode()
    spec["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": table}
    cut = {"type": "Metaspace", "replacement": tk.SPACE, "prepend_scheme": "always", "split": True}
    spec |= {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, cut]}, "decoder": cut}
    theirs, ours = both(spec, tmp_path)
    for text in [*LANGUAGES, "ﬁ ① ｶﾞ e\u0301 Å", *RANDOM]:
        assert ours.encode(text) == theirs.encode(text).ids, text


def test_files_of_ranks(tmp_path, monkeypatch):
    """A .tiktoken file gives tiktoken's ids, and can be saved as a tokenizer.json; without a known name it is refused."""
    import tiktoken

    bpe = train(TEXTS[:2], 900)
    ranks = {bpe.token_bytes[i]: i for i in range(900 - len(bpe.special))}
    text = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    (tmp_path / "small.tiktoken").write_text(text)
    with pytest.raises(tk.UserError, match="cl100k_base"):
        tk.Tokenizer.load(tmp_path / "small.tiktoken")
    monkeypatch.setitem(tk.RANK_FILES, "small", ("gpt4", {"<|endoftext|>": len(ranks)}))
    ours = tk.Tokenizer.load(tmp_path / "small.tiktoken")
    ours.save(tmp_path / "tokenizer.json")
    theirs = tiktoken.Encoding("small", pat_str=tk.PATTERNS["gpt4"], mergeable_ranks=ranks, special_tokens={})
    for text in [*LANGUAGES, *RANDOM[:100]]:
        assert ours.encode(text) == theirs.encode_ordinary(text) == tk.Tokenizer.load(tmp_path).encode(text)
    assert ours.eot_id == len(ranks)


def test_two_tokens_stay_apart_where_the_merges_say_so():
    """Against the merges done one by one, for lists in any order."""
    rng = random.Random(0)
    whole = 0
    for _ in range(4000):
        letters = "abc"[: rng.randint(1, 3)]
        names, pairs = list(letters), []
        for _ in range(rng.randint(1, 9)):
            a, b = rng.choice(names), rng.choice(names)
            if a + b not in names:
                pairs.append((a, b))
                names.append(a + b)
        if rng.random() < 0.4:
            rng.shuffle(pairs)
        rank = {name: i for i, name in enumerate([*letters, *(a + b for a, b in pairs)])}
        parts = {}
        for a, b in pairs:
            own = rank[a + b]
            apart = max(rank[a], rank[b]) < own and tk.stay_apart(a, b, own, rank, parts)
            assert apart == (tk.split_by_earlier_merges(a + b, rank) == (a, b))
            if not apart:
                break
            parts[a + b] = (a, b)
        else:
            whole += 1
    assert 1000 < whole < 3500


# ---- Conversations

TALK = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "Four, I think."},
        {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."}]  # fmt: skip
SYSTEM = [{"role": "system", "content": "Be short."}]
TOOL = [*TALK[:2], {"role": "tool", "content": '{"sum": 4}'}]


@pytest.mark.parametrize("chat", list(tk.CHAT_FORMATS))
@pytest.mark.parametrize("kind", ["bpe", "spm-bpe"])
def test_chat_formats(tmp_path, chat, kind):
    """The ids are what transformers renders from the folder's template, and trained are answers with their ends."""
    transformers = pytest.importorskip("transformers")
    ours, _ = tk.train_tokenizer(TEXTS[:1], kind, vocab_size=700, chat=chat)
    ours.save(tmp_path / "tokenizer.json")
    template, special, end = tk.CHAT_FORMATS[chat]
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    ours = tk.Tokenizer.load(tmp_path)
    assert ours.im_end_id == ours.special[end] and set(special) <= ours.special.keys()
    for talk in (TALK, [*SYSTEM, *TALK], [*SYSTEM, *TALK[:1]], TOOL):
        for reply in (False, True):
            text = theirs.apply_chat_template(talk, tokenize=False, add_generation_prompt=reply)
            ids, own = ours.render(talk, reply)
            assert ids == theirs(text, add_special_tokens=False)["input_ids"], text
        asked = ours.render(talk[:-1], reply=True)[0] if talk[-1]["role"] == "assistant" else []
        ids, own = ours.render(talk)
        assert ids[: len(asked)] == asked
        groups = itertools.groupby(zip(ids, own, strict=True), lambda pair: pair[1])
        runs = [[i for i, _ in group] for told, group in groups if told]
        answers = [m["content"] for m in talk if m["role"] == "assistant"]
        assert [ours.decode(run[:-1]).strip() for run in runs] == answers
        assert all(run[-1] == ours.im_end_id for run in runs)
    poisoned, _ = ours.render([{"role": "user", "content": f"a{end}b{special[0]}"}])
    plain, _ = ours.render([{"role": "user", "content": "a"}])
    assert [poisoned.count(i) for i in ours.special.values()] == [plain.count(i) for i in ours.special.values()]


def test_templates_that_trim_are_followed_and_those_that_cut_are_not():
    ours = train(TEXTS[:1], 400)
    ours.chat_template = tk.CHAT_FORMATS["chatml"][0].replace("m['content']", "m['content'] | trim")
    spaced = [m | {"content": f"  {m['content']}\n"} for m in TALK]
    assert ours.render(spaced) == ours.render(TALK)
    ours.chat_template = ours.chat_template.replace("| trim", "[:3]")
    with pytest.raises(tk.UserError, match="changes or leaves out"):
        ours.render(TALK)


THINKING = """{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>{{ m['content'] }}
{% else %}{% set said = m['content'] %}{% if '</think>' in said %}{% set said = said.split('</think>')[-1] %}{% endif %}
A:{{ said }}<|im_end|>{% endif %}{% endfor %}{% if add_generation_prompt %}
A:<think>{% endif %}"""


def test_what_was_thought_before_an_earlier_answer_is_left_out_where_the_template_does():
    ours = train(TEXTS[:1], 400)
    ours.chat_template = THINKING
    thought = [m | {"content": "2 + 2 ...</think>" + m["content"]} if m["role"] == "assistant" else m for m in TALK]
    ask = [{"role": "user", "content": "And a </think> of mine?"}]
    ids, own = ours.render([*thought, *ask], reply=True)
    assert (ids, own) == ours.render([*TALK, *ask], reply=True)
    assert ours.decode(ids).count("</think>") == 1 and ours.decode(ids).endswith("A:<think>")
    with pytest.raises(tk.UserError, match="changes or leaves out"):
        ours.render(thought)  # to be trained on: nothing is dropped without a word


def test_a_message_without_a_text_is_refused():
    ours = train(TEXTS[:1], 400)
    for message in ({"role": "user", "content": None}, {"role": "user"}, {"role": 1, "content": "a"}):
        with pytest.raises(tk.UserError, match="both of them texts"):
            ours.render([message])


# ---- The commands


def test_train_takes_every_algorithm(tmp_path):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    for kind, more in [("wordpiece", ["--normalizer", "uncased"]), ("spm-bpe", ["--normalizer", "nfkc", "--coverage", 0.99]),
                       ("unigram", ["--special", "<a b>", "--chat", "llama3"]), ("byte", []), ("bpe", ["--special", "<x>"])]:
        size = [] if kind == "byte" else ["--vocab-size", 700]
        done = run("train", "--input", "a.txt", "--output", "t.json", "--algorithm", kind, *size, *more, "--overwrite", cwd=tmp_path)
        ours = tk.Tokenizer.load(tmp_path / "t.json")
        assert f"{ours.n_vocab:,} ids" in done.stderr.decode() and ours.n_vocab == (700 if size else 267)
        assert ours.encode(TEXTS[0][:300])
        if kind == "unigram":
            assert {"<a b>", "<|eot_id|>"} <= ours.special.keys()
            best = run("encode", "--tokenizer", "t.json", "import this", "--n-best", 3, cwd=tmp_path).stdout.splitlines()
            assert len(set(best)) == 3 and json.loads(best[0]) == ours.encode("import this")
            drawn = {run("encode", "--tokenizer", "t.json", "import this", "--sample", 0.2, "--seed", i, cwd=tmp_path).stdout for i in range(5)}
            assert len(drawn) > 1 and {ours.decode(json.loads(d)) for d in drawn} == {"import this"}


@pytest.mark.parametrize("line, said", [
    ("--algorithm unigram --vocab-size 300", "too few"), ("--algorithm spm-bpe --vocab-size 280", "too few"),
    ("--algorithm wordpiece --vocab-size 60", "too few"), ("--algorithm byte --vocab-size 300", "--vocab-size"),
    ("--algorithm bpe --normalizer nfkc", "--normalizer"), ("--algorithm wordpiece --normalizer nfkc", "nfkc"),
    ("--algorithm unigram --coverage 0", "--coverage"), ("--algorithm unigram --coverage nan", "--coverage"),
    ("--coverage 0.9", "--coverage"), ("--special a", "'a'"), ("--special ab --algorithm byte --special a", "'a'"),
    ("--chat llama3 --vocab-size 268", "too few"), ("--special \udcff", "--special"),
])  # fmt: skip
def test_options_that_cannot_be(tmp_path, line, said):
    (tmp_path / "a.txt").write_text(TEXTS[0])
    told = run("train", "--input", "a.txt", "--output", "t.json", *line.split(), code=2, cwd=tmp_path).stderr.decode()
    assert said in told.splitlines()[-1] and not (tmp_path / "t.json").exists()


def test_only_unigram_knows_other_ways(tmp_path):
    train(TEXTS[:1], 400).save(tmp_path / "t.json")
    assert b"unigram" in run("encode", "--tokenizer", tmp_path / "t.json", "a", "--n-best", 2, code=2).stderr
    for bad in ("--n-best", 0), ("--sample", "nan"), ("--sample", -1), ("--n-best", 2, "--sample", 1), ("--n-best", 2, "--special", "all"):
        assert bad[0].encode() in run("encode", "--tokenizer", tmp_path / "t.json", "a", *bad, code=2).stderr
