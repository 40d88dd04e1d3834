"""Turn text into tokens, and documents into a data folder.

A tokenizer is learned from text and kept in one file, Hugging Face's tokenizer.json. Byte-level BPE starts
from the 256 bytes and joins the most frequent pair of neighbours into a new token, again and again. That is
`get_pairs`, `merge` and `train_bpe_plain`; `train_bpe` learns the same merges faster. `prepare` cleans,
deduplicates and splits documents and writes them as one long row of token ids.
Left out so far: WordPiece, Unigram, byte fallback. Near-duplicates are counted, not removed. All text is held
in memory at once.

    python tokenize.py prepare                          # the Python that is installed here -> data/python
    python tokenize.py prepare shakespeare.txt --output data/shakespeare --algorithm char
    python tokenize.py train --input shakespeare.txt --vocab-size 1024 --output tokenizer.json
    python tokenize.py encode --tokenizer tokenizer.json "lower lowest"
    python tokenize.py decode --tokenizer tokenizer.json "[75, 78, 86]"

Papers: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; Radford et al. 2019 (GPT-2: BPE on bytes).
"""

from __future__ import annotations

if __name__ == "tokenize":
    # The standard library has a module of this name, and a script's folder comes first on the import path:
    # hand that one over. The rest of this file then only defines functions that nobody calls.
    import importlib.util
    import os
    import sys

    _path = os.path.join(os.path.dirname(os.__file__), "tokenize.py")
    _spec = importlib.util.spec_from_file_location("tokenize", _path)
    sys.modules["tokenize"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["tokenize"])
else:
    import contextlib
    import hashlib
    import heapq
    import importlib.metadata
    import json
    import multiprocessing
    import os
    import re
    import shlex
    import signal
    import sys
    import sysconfig
    import unicodedata
    import zlib
    from collections import Counter, defaultdict
    from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
    from functools import partial
    from itertools import groupby, pairwise
    from pathlib import Path
    from typing import Annotated, Literal

    import numpy as np
    import regex
    import tiktoken
    import typer

# Special tokens get the last ids, in this order, after the bytes and the merges.
SPECIAL = (
    "<|endoftext|>", "<|pad|>", "<|mask|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>",
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
)  # fmt: skip
LEAST_VOCAB = 256 + len(SPECIAL) + 1  # the bytes, the special tokens and one merge
# GPT-2 gave the printable bytes the first ids. It writes a byte as a visible character, itself where it can.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = PRINTABLE + [b for b in range(256) if b not in PRINTABLE]  # id -> byte
BYTE_TO_ID = bytes(BYTES.index(b) for b in range(256))  # a table for bytes.translate
CHAR = {b: chr(b if b in PRINTABLE else 256 + BYTE_TO_ID[b] - len(PRINTABLE)) for b in BYTES}  # 32 -> "Ġ"
BYTE = {c: b for b, c in CHAR.items()}
# A pattern cuts text into words; no merge crosses from one into the next. "gpt4" is GPT-4's first: today's
# treats white space at the very end of a text otherwise, and `tokenizers` misreads its "{1,3}+".
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# No tokenizer file may ask for these: options of the file, of BPE, and of an added token.
UNSUPPORTED = "truncation padding dropout continuing_subword_prefix end_of_word_suffix byte_fallback"
UNSUPPORTED += " single_word lstrip rstrip"
# Our own tokenizer files begin as this; what is empty here is filled in by `tokenizer_file` and `bpe_file`.
SKELETON = """{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
"pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"}, "model": {"type": "BPE",
"dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
"fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": {}, "merges": []}}"""
FLAGS = '{"single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}'
BYTE_LEVEL = '{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}'
SPLIT = '{"type": "Split", "pattern": {}, "behavior": "Isolated", "invert": false}'
GAP = -1  # stands between two words, where no pair is counted
# The embedded default reads the standard library and these packages, which requirements.txt installs.
PACKAGES = "torch numpy tiktoken regex typer rich pytest safetensors"
# It skips what is hidden or outside (".."), folders of these names, and tests.
SKIPPED = r"(^|/)(\.|(test|tests|testing|idlelib|site-packages|dist-packages|__pycache__)/"
SKIPPED += r"|test_[^/]*$|[^/]*_test\.py$|conftest\.py$)"
DATA_FILES = ("train.bin", "val.bin", "tokenizer.json", "meta.json")
LETTERS = bytes([*range(65, 91), *range(97, 123), *range(128, 256)])  # ASCII letters, all that is not ASCII
# Files of these names are JSON, one text a line or an array; the others are one text each.
JSON_FILES = (".jsonl", ".ndjson", ".jsonlines", ".json")
OUTPUTS = ({"meta.json", "train.bin"}, {"config.json", "tokenizer.json"})  # folders of these are no text
# A document is dropped for the first of these that is true. text is data with U+FFFD where it is not UTF-8.
FILTERS = {
    "empty": lambda data, text: not text.strip(),
    "binary": lambda data, text: b"\0" in data,
    "not UTF-8": lambda data, text: text.encode() != data,
    "short": lambda data, text: len(text.strip()) < 64,
    "long lines": lambda data, text: max(map(len, text.splitlines())) > 20_000,  # minified code, dumps
    "data": lambda data, text: len(data.translate(None, LETTERS)) > 0.75 * len(data),  # tables of numbers
    "repetitive": lambda data, text: len(zlib.compress(data, 1)) < 0.1 * len(data),
}
MUST_PASS = ("empty", "binary", "not UTF-8")  # all that a text file has to pass that the user named

# model.py loads this file too, and catches its own UserError: ours is then a kind of that one.
class UserError(getattr(sys.modules.get("model"), "UserError", Exception)):
    """Tell the user in one sentence what to mend; `main` prints it without a traceback, with exit code 2."""

def check(ok, sentence: str):
    """Refuse with this sentence unless all is well."""
    if not ok:
        raise UserError(sentence)

def without_mark(data: bytes) -> bytes:
    """Drop the byte-order mark that some editors put before a text, and make UTF-8 of marked UTF-16."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        data = data[: len(data) // 2 * 2].decode("utf-16", "surrogatepass").encode("utf-8", "surrogatepass")
    return data.removeprefix(b"\xef\xbb\xbf")

def parse_json(data: bytes | str, name):
    """Read JSON from outside, however damaged or deep it is; name: what the refusal calls it."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise UserError(f"{name} is not JSON") from None

# ---- Byte pair encoding ------------------------------------------------------------------------------------

def get_pairs(ids, counts=None, weight=1) -> dict:
    """Count the neighbours.

    >>> get_pairs([1, 2, 3, 1, 2])
    {(1, 2): 2, (2, 3): 1, (3, 1): 1}
    """
    counts = {} if counts is None else counts
    for pair in pairwise(ids):
        counts[pair] = counts.get(pair, 0) + weight
    return counts

def merge(ids: list, pair: tuple, new: int) -> list:
    """Replace a pair by one token, from left to right.

    >>> merge([1, 2, 3, 1, 2], (1, 2), 4)
    [4, 3, 4]
    """
    out = []
    i = 0
    while i < len(ids):
        joined = tuple(ids[i : i + 2]) == pair
        out.append(new if joined else ids[i])
        i += 2 if joined else 1
    return out

def train_bpe_plain(words: dict, n_merges: int) -> list:
    """Learn merges as the method is told: count all pairs, join the most frequent, repeat.

    words: piece of text -> how often it occurs. Of equally frequent pairs the smallest ids win.
    train_bpe_plain({"aab": 1, "ab": 2}, 2) -> [(64, 65), (64, 256)]: "ab" (3 times), then "a" + "ab".
    """
    rows = [(list(word.encode().translate(BYTE_TO_ID)), n) for word, n in words.items()]
    merges = []
    for new in range(256, 256 + n_merges):
        counts = {}
        for ids, n in rows:
            get_pairs(ids, counts, n)
        if not counts:
            break
        pair = min(counts, key=lambda p: (-counts[p], p))
        rows = [(merge(ids, pair, new), n) for ids, n in rows]
        merges.append(pair)
    return merges

def train_bpe(words: dict, n_merges: int, watch=iter) -> tuple[list, int]:
    """Learn the merges of `train_bpe_plain`, fast; return them and how many tokens they make of the words.

    All words lie in one row of cells, a gap after each. A token is written at its ends: head[first cell] and
    tail[last cell] hold its id, so its neighbours are one step away. For "lower" with "lo" joined:

        cell   0   1   2   3   4   5   6
        head   .  lo   .   w   e   r   .
        tail   .   .  lo   w   e   r   .

    A merge visits only the cells where its pair stands, and changes only the counts of the pairs around them.
    watch: wraps the loop, for progress. train_bpe({"aab": 1, "ab": 2}, 2) -> ([(64, 65), (64, 256)], 3)
    """
    head = [GAP]
    weight = [0]  # how often the word of a cell occurs
    counts = defaultdict(int)
    where = defaultdict(list)  # pair -> its first cells, some of them swallowed since by another merge
    for word, n in words.items():
        ids = word.encode().translate(BYTE_TO_ID)
        for cell, pair in enumerate(pairwise(ids), len(head)):
            counts[pair] += n
            where[pair].append(cell)
        head += [*ids, GAP]
        weight += [n] * (len(ids) + 1)
    tail = head.copy()
    width = [1] * 256  # id -> number of cells
    queue = [(-n, pair) for pair, n in counts.items()]  # a heap: most frequent first, then the smallest ids
    heapq.heapify(queue)
    merges = []
    for new in watch(range(256, 256 + n_merges)):
        while queue and counts[queue[0][1]] < -queue[0][0]:  # the count fell since this entry was made
            pair = queue[0][1]
            heapq.heapreplace(queue, (-counts[pair], pair))
        if not queue or queue[0][0] == 0:
            break
        a, b = heapq.heappop(queue)[1]
        merges.append((a, b))
        width.append(width[a] + width[b])
        made = defaultdict(list)
        for first in where.pop((a, b)):
            second = first + width[a]
            if head[first] != a or head[second] != b:
                continue
            end = first + width[new]
            left = tail[first - 1]
            right = head[end]
            head[second] = tail[second - 1] = GAP
            head[first] = tail[end - 1] = new
            if left != GAP:
                counts[left, a] -= weight[first]
                counts[left, new] += weight[first]
                made[left, new].append(first - width[left])
            if right != GAP:
                counts[b, right] -= weight[first]
                counts[new, right] += weight[first]
                made[new, right].append(first)
        for pair in made:
            heapq.heappush(queue, (-counts[pair], pair))
        where.update(made)
    return merges, sum(n for i, n in zip(head, weight, strict=True) if i != GAP)

def count_words(texts: list[str], pattern: str) -> Counter:
    """Count the pieces of the pattern: count_words(["a b b"], "gpt2") -> {"a": 1, " b": 2}"""
    find = regex.compile(PATTERNS[pattern]).findall
    # `re` is twice as fast, but knows no Unicode classes: it takes the texts that are plain ASCII.
    plain = PATTERNS[pattern].replace(r"\p{L}\p{N}", "a-zA-Z0-9")
    plain = plain.replace(r"\p{L}", "[a-zA-Z]").replace(r"\p{N}", "[0-9]")
    find_ascii = re.compile(plain, re.ASCII).findall
    words = Counter()
    for text in texts:
        words.update(find_ascii(text) if text.isascii() else find(text))
    return words

def cut(text: str, size: int) -> list[str]:
    """Cut a text into parts of `size` characters or more: cut("one two six", 2) -> ["one", " two", " six"]"""
    # always before the space between two words, where a piece of every pattern begins
    return re.findall(rf"(?s).{{{size}}}.*?\S(?= \S)|.+", text)

# ---- The tokenizer and its file ----------------------------------------------------------------------------

def bpe_file(merges: list, pattern: str) -> dict:
    """Describe byte-level BPE as a tokenizer.json: bytes, merges, special tokens."""
    names = list(CHAR.values())
    for a, b in merges:
        names.append(names[a] + names[b])
    spec = tokenizer_file(names)
    spec["model"]["merges"] = [[names[a], names[b]] for a, b in merges]
    spec["decoder"] = json.loads(BYTE_LEVEL)
    split = json.loads(SPLIT)
    split["pattern"]["Regex"] = PATTERNS[pattern]
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, json.loads(BYTE_LEVEL)]}
    return spec

def tokenizer_file(names: list[str]) -> dict:
    """Describe a tokenizer that has these tokens and the special ones, and merges nothing."""
    spec = json.loads(SKELETON)
    spec["model"]["vocab"] = {name: i for i, name in enumerate(names)}
    for i, name in enumerate(SPECIAL, len(names)):
        spec["added_tokens"].append({"id": i, "content": name, **json.loads(FLAGS)})
    return spec

def read_ids(spec: dict) -> dict:
    """Read {token: id}; refuse, by name, what a tokenizer.json may not ask for, and ids that cannot be."""
    model = spec["model"]
    added = spec.get("added_tokens", [])
    kind = model.get("type", "BPE")
    check(kind == "BPE", f"tokenizers of the type {kind} are not supported yet")
    for part in (spec, model, *added):
        for option in UNSUPPORTED.split():
            check(not part.get(option), f"the option {option} is not supported yet")
    ids = dict(model["vocab"])
    free = len(ids)
    for token in added:  # `tokenizers` gives it its id in the vocabulary, or the next that is free
        name = token["content"]
        expected = ids.setdefault(name, free)
        check(name and token["id"] == expected, f"the added token {name!r} has to have the id {expected}")
        free = max(free, expected + 1)
    for name, i in ids.items():
        check(type(i) is int and 0 <= i < 2**24, f"{i} cannot be the id of {name!r}")
    check(len(set(ids.values())) == len(ids), "two tokens have the same id")
    return ids

def steps_of(spec: dict, part: str, known: tuple) -> list:
    """List the steps of a part of the file: none, one, or a Sequence's; refuse by name those not known."""
    found = spec.get(part) or {"type": "Sequence"}
    lists = [value for value in found.values() if isinstance(value, list)]
    steps = sum(lists, []) if found["type"] == "Sequence" else [found]
    for step in steps:
        check(step["type"] in known, f"the {part} {step} is not supported yet")
    return steps

def char_codec(spec: dict):
    """Read a file with one id a character: return {id: bytes} and a function from text to ids."""
    vocab = spec["model"]["vocab"]
    check(set(map(len, vocab)) <= {1}, "a BPE tokenizer without merges has to have single characters only")
    check(not spec["model"].get("unk_token"), "the option unk_token is not supported for characters")

    def encode(text: str) -> list[int]:
        try:
            return [vocab[c] for c in text]
        except KeyError as e:
            raise UserError(f"the character {e} is not in the vocabulary of this tokenizer") from None

    return {i: c.encode() for c, i in vocab.items()}, encode

def bpe_codec(spec: dict):
    """Read a file of BPE on bytes: return {id: bytes} and a function from text to ids, by tiktoken."""
    vocab = spec["model"]["vocab"]
    names = read_merges(spec)
    ids = np.array([vocab[name] for name in names], dtype=np.uint32)
    ranks = {bytes(map(BYTE.get, name)): rank for rank, name in enumerate(names)}
    pattern = read_pattern(spec)
    encoding = tiktoken.Encoding("octavo", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode(text: str) -> np.ndarray:
        try:
            return ids[encoding.encode_to_numpy(text, disallowed_special=())]
        except ValueError:  # the pattern's backtracking is limited
            raise UserError("a million spaces in a row are too many for tiktoken: cut the text") from None

    tokens = {}
    for name, i in vocab.items():  # a token that is not spelled in bytes stands for itself
        tokens[i] = bytes(map(BYTE.get, name)) if set(name) <= BYTE.keys() else name.encode()
    return tokens, encode

def read_merges(spec: dict) -> list[str]:
    """List the bytes and what the merges make of them, in the order of their ranks.

    A tokenizer.json ranks pairs, tiktoken ranks tokens. The ids are the same if each token, spelled in bytes
    and merged by those before it, ends as a pair that is listed for it.
    """
    vocab = spec["model"]["vocab"]
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in spec["model"]["merges"]]
    made = [name for name, _ in groupby(a + b for a, b in pairs)]  # several pairs may make one token
    names = [*CHAR.values(), *made]
    lacks = [name for name in names if name not in vocab]
    check(not lacks, f"only BPE on all 256 bytes is supported: the vocabulary lacks {lacks[:1]}")
    rank = {name: i for i, name in enumerate(names)}
    listed = set(pairs)
    odd = [name for name in made if merge_before(name, rank) not in listed]
    ordered = not odd and len(rank) == len(names)
    check(ordered, f"merges in an order of their own are not supported: see {odd[:1]}")
    other = vocab.keys() - names - {token["content"] for token in spec.get("added_tokens", [])}
    refused = other and spec["model"].get("ignore_merges")
    check(not refused, f"the option ignore_merges is not supported where no merge makes {other}")
    return names

def merge_before(name: str, rank: dict) -> tuple:
    """Merge the bytes of a token by all tokens before it, and return the parts: two where all is well."""
    parts = list(name)
    own = rank[name]
    while len(parts) > 1:
        first, i = min((rank.get(a + b, own), i) for i, (a, b) in enumerate(pairwise(parts)))
        if first == own:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)

def read_pattern(spec: dict) -> str:
    """Find the one regular expression that a file's pre-tokenizer amounts to."""
    steps = steps_of(spec, "pre_tokenizer", ("Split", "ByteLevel"))
    asked = []
    for step in steps:
        form = (step["type"], step.get("use_regex", True), step.get("add_prefix_space", False))
        asked.append((*form, step.get("behavior")))
    if asked == [("ByteLevel", True, False, None)]:
        return PATTERNS["gpt2"]
    known = asked == [("Split", True, False, "Isolated"), ("ByteLevel", False, False, None)]
    pattern = steps[0]["pattern"].get("Regex") if known else None
    check(pattern is not None, f"the pre_tokenizer {spec.get('pre_tokenizer')} is not supported yet")
    if pattern in PATTERNS.values():
        return pattern
    odd = "" in regex.findall(pattern, "a1 \n.\r\n  'é") or re.search(r"\{[\d,]*\}\+", pattern)
    check(not odd, f"the pattern {pattern!r} is not supported: it matches nothing, or repeats a repetition")
    # Hugging Face keeps what lies between two matches as a piece, tiktoken would drop it; and its ^ and $ are
    # those of any line.
    return rf"(?m:{pattern})|(?:(?!(?m:{pattern}))[\s\S])+"

def find_tokens(tokens: dict, text: str) -> list[tuple]:
    """Cut tokens out of a text: find_tokens({"<a>": 7}, "x<a>") -> [("x", None), ("<a>", 7)]"""
    if not tokens:
        return [(text, None)]
    longest_first = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    return [(piece, tokens.get(piece)) for piece in re.split(f"({longest_first})", text) if piece]

def read_frame(spec: dict) -> tuple[tuple, tuple]:
    """Find the ids that a file's post-processor puts before and after a text."""
    steps = steps_of(spec, "post_processor", ("TemplateProcessing", "ByteLevel"))
    templates = [step for step in steps if step["type"] == "TemplateProcessing"]  # ByteLevel's adds nothing
    frame = []
    for part in templates[0]["single"] if templates else [{"Sequence": "A"}]:
        name = part.get("SpecialToken", {}).get("id")
        frame += templates[0]["special_tokens"][name]["ids"] if name else [None]
    check(len(templates) < 2 and frame.count(None) == 1, "the post_processor takes the text more than once")
    place = frame.index(None)
    return tuple(frame[:place]), tuple(frame[place + 1 :])

class Tokenizer:
    """Turn text into ids and back, as a tokenizer.json and the settings beside it in a folder say.

    special: {text: id} of the special tokens. Ordinary text never gives them: whoever wants them names them.
    prefix, suffix: the ids that belong before and after a text, () where there are none; encode adds none.
    names: {"eos_token": text, ...} as the folder says, those that the vocabulary has.
    chat_template: the folder's own, or None. eot_id, pad_id, mask_id, im_start_id, im_end_id: ids, or None.
    token_bytes: the bytes of each id, n_vocab of them.
    """

    def __init__(self, spec: dict):
        self.spec = spec
        self.ids = read_ids(spec)
        added = spec.get("added_tokens", [])
        characters = not spec.get("pre_tokenizer") and not spec["model"]["merges"]
        tokens, self.encode_words = char_codec(spec) if characters else bpe_codec(spec)
        tokens |= {token["id"]: token["content"].encode() for token in added}
        decoder = steps_of(spec, "decoder", ("Fuse",) if characters else ("ByteLevel",))
        check(len(decoder) == 1, "a tokenizer without a decoder is not supported")
        self.prefix, self.suffix = read_frame(spec)
        nfc = steps_of(spec, "normalizer", ("NFC",))
        self.normalize = partial(unicodedata.normalize, "NFC") if nfc else str
        self.special = {token["content"]: token["id"] for token in added if token["special"]}
        # Tokens that ordinary text gives are found in the text as it is, or after the normalizer.
        plain = [token for token in added if not token["special"]]
        self.raw = {token["content"]: token["id"] for token in plain if not token["normalized"]}
        self.normalized = {self.normalize(t["content"]): t["id"] for t in plain if t["normalized"]}
        self.n_vocab = max(tokens) + 1
        self.token_bytes = [tokens.get(i, b"") for i in range(self.n_vocab)]  # a file may leave an id out
        named = map(self.ids.get, SPECIAL[:5])  # None where the file has no such token
        self.eot_id, self.pad_id, self.mask_id, self.im_start_id, self.im_end_id = named
        self.names, self.chat_template = {}, None

    @classmethod
    def load(cls, path) -> Tokenizer:
        """Load a folder's tokenizer and what lies beside it, or a tokenizer.json alone."""
        folder = Path(path)
        path = folder / "tokenizer.json" if folder.is_dir() else folder
        check(path.is_file(), f"there is no tokenizer at {path}")
        try:
            tokenizer = cls(parse_json(path.read_bytes(), path))
            if folder.is_dir():
                tokenizer.read_settings(folder)
            return tokenizer
        except (UserError, LookupError, ValueError, TypeError, AttributeError, regex.error) as e:
            why = e if isinstance(e, UserError) else f"it is damaged ({e!r})"
            raise UserError(f"{path} is not a tokenizer.json that can be used: {why}") from None

    def read_settings(self, folder: Path):
        """Take over the names of special tokens and the chat template that a folder gives."""
        settings = {}
        for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
            settings |= parse_json(path.read_bytes(), path) if path.is_file() else {}
        for token in settings.get("added_tokens_decoder", {}).values():
            check(token["content"] in self.ids, f"tokenizer_config.json adds {token['content']!r} to it")
        for key, value in settings.items():
            text = value.get("content") if isinstance(value, dict) else value
            if key.endswith("_token") and isinstance(text, str) and text in self.ids:
                self.names[key] = text
        template = settings.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {t["name"]: t["template"] for t in template}.get("default")
        path = folder / "chat_template.jinja"
        template = without_mark(path.read_bytes()).decode() if path.is_file() else template
        check(isinstance(template, str | None), "chat_template is no text")
        self.chat_template = template
        if self.eot_id is None:
            self.eot_id = self.ids.get(self.names.get("eos_token"))

    def save(self, path: Path):
        """Save the tokenizer to a file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.new")
        text = json.dumps(self.spec, ensure_ascii=False, indent=2)
        beside.write_text(f"{text}\n", encoding="utf-8", newline="\n")
        os.replace(beside, path)

    def encode(self, text: str, special=()) -> list[int]:
        """Encode a text. special: "all", a name or names of special tokens that the text may spell out."""
        names = self.special if special == "all" else [special] if isinstance(special, str) else special
        for name in names:
            check(name in self.special, f"there is no special token {name!r}, only {', '.join(self.special)}")
        return self.encode_array(text, names).tolist()

    def encode_array(self, text: str, special=()) -> np.ndarray:
        """Encode a text as uint32; in several threads at once where it is BPE. special: names."""
        whole = text.isascii() or not re.search("[\ud800-\udfff]", text)
        check(whole, "the text is not UTF-8: a character is cut in half, or a byte is none")
        rows = [np.empty(0, np.uint32)]
        for piece, i in find_tokens(self.raw | {name: self.special[name] for name in special}, text):
            parts = [("", i)] if i is not None else find_tokens(self.normalized, self.normalize(piece))
            for part, i in parts:
                rows.append(np.array(self.encode_words(part) if i is None else [i], dtype=np.uint32))
        return np.concatenate(rows)

    def decode_bytes(self, ids) -> bytes:
        """Decode ids to their exact bytes; special tokens to their names."""
        for i in ids:
            if not 0 <= i < self.n_vocab:
                raise UserError(f"token id {i} is not in the vocabulary of {self.n_vocab} ids")
        return b"".join([self.token_bytes[i] for i in ids])

    def decode(self, ids) -> str:
        """Decode ids to text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

def train_tokenizer(texts: list, algorithm="bpe", vocab_size=4096, pattern="gpt4"):
    """Learn a tokenizer from texts; return it and how many tokens it makes of them."""
    if algorithm == "char":
        return Tokenizer(tokenizer_file(sorted(set().union(*texts)))), sum(map(len, texts))
    pieces = [piece for text in texts for piece in cut(text, 20_000)]
    n = 1 + sum(map(len, pieces)) // 4_000_000
    parts = [pieces[i::n] for i in range(n)]
    words = Counter()
    for counts in compute(partial(count_words, pattern=pattern), parts, "counting words", processes=True):
        words.update(counts)
    n_merges = vocab_size - LEAST_VOCAB + 1
    merges, n_tokens = train_bpe(words, n_merges, lambda steps: track(steps, "merging", n_merges))
    tokenizer = Tokenizer(bpe_file(merges, pattern))
    if len(merges) < n_merges:
        say(f"warning: the text gives {len(merges)} merges only, so there are {tokenizer.n_vocab} tokens")
    return tokenizer, n_tokens

# ---- Documents: found, read, filtered, split ---------------------------------------------------------------

def find_files(inputs: list[str]) -> list:
    """Find the files of all inputs, sorted: (source, name within it, path, whether the user named it)."""
    found = []
    for item in inputs:
        name, _, rest = item.partition("=")  # NAME=PATH
        named = rest and not Path(item).exists()
        path = Path(rest if named else item)
        source = name if named else path.resolve().stem
        check(path.is_file() or path.is_dir(), f"there is no file or folder {path}")
        check(re.fullmatch(r"(?!\.\.?$)[^/\\]+", source), f"{source!r} names no source: write NAME={path}")
        if path.is_dir():
            found += [(source, name, path / name, False) for name in walk(path)]
        else:
            found.append((source, path.name, path, True))
    check(found, f"there are no files in {', '.join(inputs)}")
    return sorted(found)

def walk(folder: Path, skipped=r"^\.") -> list[str]:
    """List what is below a folder, without what matches `skipped`; there, a folder's name ends in a slash.

    Folders that are links, hold earlier output or cannot be opened are listed too: to be counted.
    """
    names = []
    closed = []
    for root, folders, files in os.walk(folder, onerror=closed.append):
        if Path(root) != folder and any(output <= set(files) for output in OUTPUTS):
            folders.clear()
            files = [""]
        folders[:] = [name for name in folders if not re.search(skipped, f"{name}/")]
        files += [name for name in folders if Path(root, name).is_symlink()]
        files = [name for name in files if not re.search(skipped, name)]
        names += [os.path.join(root, name) for name in files]
    names += [error.filename for error in closed]
    return [Path(name).relative_to(folder).as_posix() for name in names]

def find_python() -> list:
    """Find the embedded default: the standard library and the packages of requirements.txt, without tests."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = [("python", name, library / name, False) for name in walk(library, SKIPPED)]
    for package in PACKAGES.split():
        for installed in list(importlib.metadata.distributions(name=package))[:1]:
            files = [file for file in installed.files or [] if not re.search(SKIPPED, file.as_posix())]
            found += [(package, file.as_posix(), Path(file.locate()), False) for file in files]
    return sorted(file for file in found if file[1].endswith(".py") and file[2].is_file())

def read_records(path: Path, data: bytes, field: str) -> list[bytes]:
    """Read one field of each object of a JSON file: one a line, or one array or object in all."""
    try:
        whole = parse_json(data, path)
        rows = enumerate(whole if isinstance(whole, list) else [whole], 1)
    except UserError:
        lines = enumerate(without_mark(data).splitlines(), 1)
        rows = ((i, parse_json(line, f"line {i} of {path}")) for i, line in lines if line.strip())
    texts = []
    for i, row in rows:
        text = row.get(field) if isinstance(row, dict) else None
        check(isinstance(text, str), f'line {i} of {path} is no JSON object with a text in "{field}"')
        texts.append(text.encode("utf-8", "surrogatepass"))
    check(texts, f"{path} is empty")
    return texts

def read_documents(files: list, field: str) -> tuple:
    """Read files: return {key: (source, text)}, {reason: what was dropped}, [source, name, hash] of each.

    A text file that the user named only has to be text; all others, and the records of every JSON file, pass
    all filters. Of equal texts one is kept.
    """
    used = field == "text" or any(path.suffix.lower() in JSON_FILES for _, _, path, _ in files)
    check(used, f"--field {field} is for JSON files, and there are none")
    documents = {}
    drops = []  # (reason, bytes)
    hashes = []
    for source, name, path, named in track(files, "reading", len(files)):
        if not path.is_file():  # a pipe, a dead link, a link to a folder, a folder of earlier output
            drops.append(("not a file", 0))
            continue
        data = path.read_bytes()
        hashes.append([source, name, hashlib.sha256(data).hexdigest()[:16]])
        contents = [without_mark(data)]
        if path.suffix.lower() in JSON_FILES:
            loose = not named and path.suffix.lower() == ".json"  # settings, maybe
            named, contents = False, []
            with contextlib.suppress(UserError if loose else ()):
                contents = read_records(path, data, field)
            drops += [] if contents else [("without the field", len(data))]
        for content in contents:
            text = content.decode(errors="replace")
            filters = MUST_PASS if named else FILTERS
            reason = next((name for name in filters if FILTERS[name](content, text)), None)
            check(not (named and reason), f"{path} is {reason}, and has to be UTF-8 text")
            bare = "\n".join(map(str.rstrip, text.strip().splitlines()))  # line ends make no difference
            key = hashlib.sha256(bare.encode()).hexdigest()
            if reason or key in documents:
                drops.append((reason or "duplicate", len(content)))
            else:
                documents[key] = source, text
    dropped = {}
    for reason in ("not a file", "without the field", *FILTERS, "duplicate"):
        sizes = [size for name, size in drops if name == reason]
        dropped[reason] = {"documents": len(sizes), "bytes": sum(sizes)}
    told = ", ".join(f"{name}: {count['documents']}" for name, count in dropped.items() if count["documents"])
    check(documents, f"no document is left to learn from ({told or 'there was no text'})")
    return documents, dropped, hashes

def split_documents(documents: dict, val_fraction: float, seed: int) -> dict:
    """Put whole documents into train or val, in an order that only their content and the seed decide."""
    if len(documents) == 1:  # cut it at the character where nanoGPT cuts tiny Shakespeare
        say("a single document: its tail becomes the validation split")
        ((source, text),) = documents.values()
        end = int(len(text) * (1 - val_fraction))
        splits = {"train": [(source, text[:end])], "val": [(source, text[end:])]}
    else:
        splits = {"train": [], "val": []}
        room = val_fraction * sum(len(text.encode()) for _, text in documents.values())
        for key in sorted(documents, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest()):
            size = len(documents[key][1].encode())
            fits = size / 2 <= room  # then it brings validation nearer to what is asked
            room -= size if fits else 0
            splits["val" if fits else "train"].append(documents[key])
        if not splits["val"]:
            splits["val"] = [min(splits["train"], key=lambda document: len(document[1]))]
            splits["train"].remove(splits["val"][0])
    n_train, n_val = (sum(len(text.encode()) for _, text in splits[name]) for name in ("train", "val"))
    share = n_val / (n_train + n_val)
    say(f"validation: {len(splits['val'])} of {len(documents)} documents, {share:.2%} of the bytes")
    enough = share > val_fraction / 10 and 1 - share > (1 - val_fraction) / 10
    check(enough, f"the documents are too unequal for --val-fraction {val_fraction}: join them to one file")
    return splits

def count_repeats(splits: dict) -> int:
    """Count the validation documents of which more than half the longer lines stand in training, too."""
    rows = [{line for line in text.splitlines() if len(line) >= 20} for _, text in splits["val"]]
    wanted = set().union(*rows)
    seen = set().union(*(wanted.intersection(text.splitlines()) for _, text in splits["train"]))
    return sum(len(lines & seen) > len(lines) / 2 for lines in rows)

def compute(function, items: list, what: str, processes=False):
    """Yield function(item) for each item in turn, computed on all cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Threads are enough for tiktoken. Worker processes start the program that runs: it has to be this file.
    if processes and min(cores, len(items)) > 1 and __name__ == "__main__":
        context = multiprocessing.get_context("spawn")  # the one way that all systems have
        ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered by this process alone
        pool = ProcessPoolExecutor(min(cores, len(items)), context, signal.signal, ignore)
        handler = signal.signal(*ignore)  # the workers inherit this, so they are quiet while they start, too
        results = pool.map(function, items)
        signal.signal(signal.SIGINT, handler)
    else:
        pool = ThreadPoolExecutor(cores)
        results = pool.map(function, items)
    try:
        yield from track(results, what, len(items))
    finally:
        pool.shutdown(cancel_futures=True)

def track(items, what, total):
    """Go through items with a bar and the time left."""
    from rich import console, progress  # here, as `encode` has to start fast
    yield from progress.track(items, what, total, console=console.Console(stderr=True))

def say(text: str):
    """Print a line for people; standard output is for results."""
    print(text, file=sys.stderr, flush=True)

# ---- Commands ----------------------------------------------------------------------------------------------

def train(
    inputs: Annotated[list[str], typer.Option("--input", help="Text, folder or .jsonl; can be repeated.")],
    output: Annotated[Path, typer.Option(help="The tokenizer.json to write.")],
    algorithm: Annotated[Literal["bpe", "char"], typer.Option(help="BPE (default) or characters.")] = None,
    vocab_size: Annotated[int, typer.Option(help="bpe: all ids, special tokens too; 4096.")] = None,
    pattern: Annotated[Literal["gpt2", "gpt4"], typer.Option(help="bpe: how text is cut; gpt4.")] = None,
    field: Annotated[str, typer.Option(help="JSON files: the field that holds the text.")] = "text",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
):
    """Learn a tokenizer from text."""
    files = find_files(inputs)
    options = choose_tokenizer(None, algorithm, vocab_size, pattern)
    ours = not output.exists() or (output.is_file() and b'"added_tokens"' in output.read_bytes())
    check_output(output, ours, overwrite or not output.exists(), files)
    documents, _, _ = read_documents(files, field)
    texts = [text for _, text in documents.values()]
    tokenizer, n_tokens = train_tokenizer(texts, **options)
    tokenizer.save(output)
    n_bytes = sum(len(text.encode()) for text in texts)
    say(f"{output}: {tokenizer.n_vocab:,} ids, {n_bytes / n_tokens:.3f} bytes per token")

def encode(
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer.json, or a folder that holds one.")],
    text: Annotated[str, typer.Argument(help="The text; by default standard input.")] = None,
    special: Annotated[list[str], typer.Option(help="Special token that the text may spell, or: all.")] = (),
):
    """Print the ids of a text as one JSON list."""
    tok = Tokenizer.load(tokenizer)
    if text is None:
        text = without_mark(sys.stdin.buffer.read()).decode(errors="surrogateescape")
    print(json.dumps(tok.encode(text, "all" if "all" in special else special)))

def decode(
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer.json, or a folder that holds one.")],
    ids: Annotated[str, typer.Argument(help="A JSON list; by default standard input.")] = None,
):
    """Write the bytes that a JSON list of ids stands for."""
    tok = Tokenizer.load(tokenizer)
    numbers = parse_json(sys.stdin.buffer.read() if ids is None else ids, "the list of ids")
    whole = isinstance(numbers, list) and all(type(i) is int for i in numbers)
    check(whole, "the ids are not a JSON list of whole numbers")
    sys.stdout.buffer.write(tok.decode_bytes(numbers))

def prepare(
    inputs: Annotated[list[str], typer.Argument(help="File, folder, NAME=PATH; else this Python.")] = None,
    output: Annotated[Path, typer.Option(help="Folder to write; else data/ and the source's name.")] = None,
    tokenizer: Annotated[Path, typer.Option(help="Use this tokenizer.json instead of learning one.")] = None,
    algorithm: Annotated[Literal["bpe", "char"], typer.Option(help="BPE (default) or characters.")] = None,
    vocab_size: Annotated[int, typer.Option(help="bpe: all ids, special tokens too; 4096.")] = None,
    pattern: Annotated[Literal["gpt2", "gpt4"], typer.Option(help="bpe: how text is cut; gpt4.")] = None,
    val_fraction: Annotated[float, typer.Option(help="Share of the bytes for validation, 0 to 1.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Another seed gives another split and order.")] = 0,
    field: Annotated[str, typer.Option(help="JSON files: the field that holds the text.")] = "text",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print meta.json, less its files.")] = False,
):
    """Turn text into a data folder: train.bin, val.bin, tokenizer.json, meta.json."""
    # 1. what can be wrong, before any work
    sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves it out
    from model import finish_save, save_files  # here, as it loads torch, and the other commands start fast
    check(0 < val_fraction < 1, f"--val-fraction {val_fraction} is not between 0 and 1")
    check(0 <= seed < 2**31, f"--seed {seed} is out of range: it has to be 0 at least, and below 2^31")
    options = choose_tokenizer(tokenizer, algorithm, vocab_size, pattern)
    tok = Tokenizer.load(tokenizer) if tokenizer else None
    check(not tok or tok.eot_id is not None, f"{tokenizer} names no token to end a document with")
    files = find_files(inputs) if inputs else find_python()
    output = output or Path("data") / (files[0][0] if inputs else "python")
    finish_save(output)
    left = {f"{name}.new" for name in (*DATA_FILES, "commit.json")}  # a save that was killed may leave these
    there = any(not path.is_dir() and path.name not in left for path in output.resolve().rglob("*"))
    meta = output / "meta.json"
    ours = not there or (meta.is_file() and b'"splits"' in meta.read_bytes())
    check_output(output, ours, overwrite or not there, files)
    # 2. documents
    documents, dropped, hashes = read_documents(files, field)
    splits = split_documents(documents, val_fraction, seed)
    # 3. the tokenizer: merges from train alone; characters from all, or val might have one without an id
    if not tok:
        learn_from = documents.values() if algorithm == "char" else splits["train"]
        tok, _ = train_tokenizer([text for _, text in learn_from], **options)
    # 4. the ids, and the account of it all
    dtype = "uint16" if tok.n_vocab <= 2**16 else "uint32"
    meta = {"dtype": dtype, "vocab_size": tok.n_vocab, "eot_id": tok.eot_id, "splits": {}}
    meta["sources"] = {source: {} for source, *_ in files}
    train_ids = encode_documents(tok, splits["train"], "train", meta)
    val_ids = encode_documents(tok, splits["val"], "val", meta)
    meta["near_duplicates"] = count_repeats(splits)
    meta["filters"] = dropped
    options |= {"val_fraction": val_fraction, "seed": seed, "field": field}
    meta["command"] = command_line(inputs or [], options)
    meta["files_sha256"] = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    account = json.dumps(meta | {"files": hashes if len(hashes) <= 10_000 else []}, indent=1)
    # 5. the folder
    contents = (train_ids.tofile, val_ids.tofile, tok.save, f"{account}\n")
    save_files(output, dict(zip(DATA_FILES, contents, strict=True)))
    show_meta(output, meta)
    if as_json:
        print(json.dumps({"output": str(output), **meta}))

def encode_documents(tokenizer: Tokenizer, documents: list, split: str, meta: dict) -> np.ndarray:
    """Encode a split as one row of ids, an end-of-text after each document; add its counts to meta."""
    for count in (meta["splits"], *meta["sources"].values()):
        count[split] = {"documents": 0, "tokens": 0, "bytes": 0}
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    rows = []
    encoded = compute(tokenizer.encode_array, [text for _, text in documents], f"encoding {split}")
    for (source, text), ids in zip(documents, encoded, strict=True):
        rows.append(np.append(ids, tokenizer.eot_id).astype(dtype))
        for count in (meta["splits"][split], meta["sources"][source][split]):
            count["documents"] += 1
            count["tokens"] += len(rows[-1])
            count["bytes"] += len(text.encode())
    return np.concatenate(rows)

def command_line(inputs: list, options: dict) -> str:
    """Write down the command; of an absolute path only the name, as it means nothing on another machine."""
    words = ["python", "tokenize.py", "prepare", *inputs]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(Path(w).name if Path(w).is_absolute() else w for w in words)

def show_meta(output: Path, meta: dict):
    """Print what each source gave, and what was dropped."""
    for name, split in (meta["sources"] | {f"{output}": meta["splits"]}).items():
        for part, n in split.items():
            numbers = f"{n['documents']:>9,} documents {n['bytes']:>14,} bytes {n['tokens']:>14,} tokens"
            say(f"{name:12} {part:5} {numbers}")
    n_val = meta["splits"]["val"]["documents"]
    say(f"validation documents with near duplicates in training: {meta['near_duplicates']} of {n_val}")
    dropped = {reason: n["documents"] for reason, n in meta["filters"].items() if n["documents"]}
    say("dropped: " + (", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "nothing"))

def choose_tokenizer(tokenizer: Path | None, algorithm, vocab_size, pattern) -> dict:
    """Collect the options that make a tokenizer, and refuse or name those that would do nothing."""
    options = {"algorithm": algorithm, "vocab_size": vocab_size, "pattern": pattern}
    options = {name: value for name, value in options.items() if value is not None}
    free = not (tokenizer and options)
    check(free, "--tokenizer says it all: leave out --algorithm, --vocab-size and --pattern")
    if algorithm == "char" and len(options) > 1:
        say("--vocab-size and --pattern are for bpe alone: left out")
        return {"algorithm": algorithm}
    fits = LEAST_VOCAB <= options.get("vocab_size", LEAST_VOCAB) < 2**24
    check(fits, f"--vocab-size {vocab_size} is out of range: at least {LEAST_VOCAB}, below 2^24")
    return {"tokenizer": tokenizer} if tokenizer else options

def check_output(output: Path, ours: bool, free: bool, files: list):
    """Refuse, before any work, an output that would replace what has to stay."""
    target = output.resolve()
    for _, _, path, _ in files:
        place = path.resolve()
        kept = target not in (place, *place.parents) or path.is_dir()
        check(kept, f"{path} is input, so it has to stay: choose another --output")
    check(ours, f"{output} is not empty, and is no data folder or tokenizer of ours: choose another --output")
    check(free, f"{output} exists: pass --overwrite to replace it, or another --output")

def main():
    """Run the command that the user typed; print an error as one sentence."""
    app = typer.Typer(help="Turn text into tokens, and into a data folder.", no_args_is_help=True,
                      add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    for command in (train, encode, decode, prepare):
        app.command()(command)
    try:
        app()
    except OSError as e:  # no such folder, no permission, disk full
        error = f"{e.filename or 'the output could not be written'}: {e.strerror or e}"
    except Exception as e:
        if type(e).__name__ != "UserError":  # ours, or that of model.py
            raise
        error = e
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    main()
