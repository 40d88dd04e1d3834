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
    import gzip
    import hashlib
    import heapq
    import importlib.metadata
    import json
    import multiprocessing
    import os
    import re
    import shlex
    import shutil
    import signal
    import sys
    import sysconfig
    import tempfile
    import unicodedata
    import zlib
    from array import array
    from collections import Counter, defaultdict, deque
    from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
    from functools import partial
    from itertools import chain, groupby, islice, pairwise
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
PACKED = (".gz", ".zst")  # such an ending may follow any name
OUTPUTS = ({"meta.json", "train.bin"}, {"config.json", "tokenizer.json"})  # folders of these are no text
# Groups of three letters that are common in English and not in its neighbours; _ is a space.
ENGLISH = "_th the he_ ed_ _of of_ _an _to ng_ _or ion is_ and nd_ s_t _wi f_t _li thi tio d_t ith his"
ENGLISH += " but s_o ted nt_ s_a not wit _if tho use ame th_ _us ct_ _re tha ts_ _wh if_ _ar ons hat e_t"
ENGLISH += " e_a ut_ _it _fo me_ ly_ any ice her nam by_ ght _a_ ny_ wor out oth _yo you _by d_a igh y_o"
ENGLISH += " d_b ry_ ead _ot _sh n_t _be din d_o _on ot_ s_w _wo t_i whe was ere ing ll_ ve_ as_ ave all"
TOXIC = "fuck fucking fucked fucker motherfucker shit bullshit bitch bitches bastard asshole cunt dick whore"
# A document is dropped for the first of these that is true. text is data with U+FFFD where it is not UTF-8.
FILTERS = {
    "empty": lambda data, text: not text.strip(),
    "binary": lambda data, text: b"\0" in data,
    "not UTF-8": lambda data, text: text.encode() != data,
    "short": lambda data, text: len(text.strip()) < 64,
    "long lines": lambda data, text: max(map(len, text.splitlines())) > 20_000,  # minified code, dumps
    "data": lambda data, text: len(data.translate(None, LETTERS)) > 0.75 * len(data),  # tables of numbers
    "repetitive": lambda data, text: len(zlib.compress(data, 1)) < 0.1 * len(data),
    # those that follow have to be asked for
    "symbols": lambda data, text: len(re.findall(r"[^\w\s]", text)) > 0.3 * len(text),
    "digits": lambda data, text: sum(map(data.count, b"0123456789")) > 0.2 * len(data),
    "repeated lines": lambda data, text: count_repeated(text) > 0.3 * len(text),
    "generated": lambda data, text: of_one_form(text.splitlines()),
    "toxic": lambda data, text, words: share_of(words, re.findall(r"\w+", text.lower())) > 0.005,
    "language": lambda data, text, common, share: share_of(common, trigrams(text)) < 0.5 * share,
}
MUST_PASS = ("empty", "binary", "not UTF-8")  # all that a text file has to pass that the user named
ON_REQUEST = ("symbols", "digits", "repeated lines", "generated", "toxic", "language")
HASHES = 112  # in the signature of a document

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
        source = name if named else unpacked(path.resolve()).stem
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

def read_records(path: Path, file, field: str, loose: bool):
    """Yield one field of each object of a JSON file: one a line, or one array or object in all.

    Lines are read one by one; what is no line of its own is held whole. loose: it may be no text at all.
    """
    lines = ((i, line) for i, line in enumerate(file, 1) if line.strip())
    i, first = next(lines, (1, b""))
    try:
        row = parse_json(without_mark(first), path)
    except UserError:
        row = None
    if isinstance(row, dict) and not loose:
        rest = ((i, parse_json(line, f"line {i} of {path}")) for i, line in lines)
        rows = chain([(i, row)], rest)
    else:
        file.seek(0)
        data = file.read()
        try:
            whole = parse_json(data, path)
            rows = enumerate(whole if isinstance(whole, list) else [whole], 1)
        except UserError:
            lines = enumerate(without_mark(data).splitlines(), 1)
            rows = ((i, parse_json(line, f"line {i} of {path}")) for i, line in lines if line.strip())
    i = 0
    for i, row in rows:
        text = row.get(field) if isinstance(row, dict) else None
        check(isinstance(text, str), f'line {i} of {path} is no JSON object with a text in "{field}"')
        yield text.encode("utf-8", "surrogatepass")
    check(i, f"{path} is empty")

def unpacked(path: Path) -> Path:
    """Name a file as it is called without .gz or .zst."""
    return path.with_suffix("") if path.suffix.lower() in PACKED else path

def unpack(path: Path, file):
    """Open what a packed file holds; any other file is as it is."""
    if path.suffix.lower() == ".gz":
        return gzip.open(file)
    if path.suffix.lower() == ".zst":
        try:
            from compression import zstd
        except ImportError:
            raise UserError(f"{path} needs Python 3.14 to be read: unpack it first (zstd -d)") from None
        return zstd.open(file)
    return file

def read_contents(files: list, field: str, hashes: list):
    """Yield (source, name, named, data, reason, bytes read) of each document in files; hash each file.

    reason: why there is no document where one could have been, or None.
    """
    for source, name, path, named in files:
        if not path.is_file():  # a pipe, a dead link, a link to a folder, a folder of earlier output
            yield source, name, False, b"", "not a file", 0
            continue
        with open(path, "rb") as raw:
            hashes.append([source, name, hashlib.file_digest(raw, "sha256").hexdigest()[:16]])
            raw.seek(0)
            done = 0
            suffix = unpacked(path).suffix.lower()
            try:
                file = unpack(path, raw)
                if suffix not in JSON_FILES:
                    contents = [file.read()]
                elif named or suffix != ".json":
                    contents = read_records(path, file, field, False)
                else:  # settings, maybe
                    contents = []
                    with contextlib.suppress(UserError):
                        contents = list(read_records(path, file, field, True))
                for data in contents:
                    size = raw.tell() - done
                    done += size
                    yield source, name, named and suffix not in JSON_FILES, without_mark(data), None, size
            except Exception as error:
                fits = isinstance(error, UserError) or path.suffix.lower() not in PACKED
                check(fits, f"{path} cannot be unpacked ({error}): is it whole?")
                raise
            if not contents:
                raw.seek(0)
                yield source, name, False, raw.read(), "without the field", raw.tell() - done

def judge(filters: dict, batch: list) -> list:
    """Decide about documents -> (source, name, named, text, why it goes or None, size, key, signature)."""
    judged = []
    for source, name, named, data, reason, _ in batch:
        text = data.decode(errors="replace")
        for rule, given in {} if reason else filters.items():
            if (not named or rule in (*MUST_PASS, *ON_REQUEST)) and FILTERS[rule](data, text, *given):
                reason = rule
                break
        bare = "\n".join(map(str.rstrip, text.strip().splitlines()))  # line ends make no difference
        key = b"" if reason else hashlib.sha256(bare.encode()).digest()
        signature = b"" if reason else sign(text)
        text = text[:200] if reason else text
        judged.append((source, name, named, text, reason, len(data), key, signature))
    return judged

class Documents:
    """Keep texts in a file without a name, so that a kill leaves nothing, and some 350 bytes of each here."""

    def __init__(self, folder: Path | None, seed: int):
        self.seed = seed
        self.file = tempfile.TemporaryFile(dir=folder)
        self.keys = set()
        self.sources = []  # the names; of each document the place of its source in them:
        self.source = array("H")
        self.ends = array("Q", [0])
        self.order = array("Q")  # they are shuffled by this, which only their content and the seed decide
        self.signatures = bytearray()

    def __len__(self):
        return len(self.order)

    def add(self, source: str, text: str, key: bytes, signature: bytes) -> bool:
        """Write a text to the end of the file, unless one with this key is there."""
        if key[:16] in self.keys:
            return False
        self.keys.add(key[:16])
        data = text.encode()
        self.file.seek(self.ends[-1])
        self.file.write(data)
        if source not in self.sources:
            self.sources.append(source)
        self.source.append(self.sources.index(source))
        self.ends.append(self.ends[-1] + len(data))
        digest = hashlib.sha256(f"{self.seed} {key.hex()}".encode()).digest()
        self.order.append(int.from_bytes(digest[:8], "big"))
        self.signatures += signature
        return True

    def sizes(self) -> np.ndarray:
        """Give the bytes of each text."""
        return np.diff(np.array(self.ends)).astype(int)

    def signed(self) -> np.ndarray:
        """Give the signatures as rows (documents, HASHES)."""
        return np.frombuffer(self.signatures, np.uint16).reshape(-1, HASHES)

    def text(self, i: int) -> str:
        self.file.seek(self.ends[i])
        return self.file.read(self.ends[i + 1] - self.ends[i]).decode()

    def read(self, rows, what: str):
        """Yield the texts of these documents, with a bar."""
        yield from map(self.text, track(rows, what, len(rows)))

    def values(self):
        """Yield (source, text) of all documents."""
        for i, text in enumerate(self.read(range(len(self)), "reading again")):
            yield self.sources[self.source[i]], text

def read_documents(files: list, field: str, filters: dict | None = None, folder=None, seed=0) -> tuple:
    """Read files: return Documents, {reason: what was dropped}, [source, name, hash] of each.

    A text file that the user named only has to be text, and what was asked for; all others, and the records
    of every JSON file, pass all filters. Of equal texts one is kept.
    """
    used = field == "text" or any(unpacked(path).suffix.lower() in JSON_FILES for _, _, path, _ in files)
    check(used, f"--field {field} is for JSON files, and there are none")
    filters = choose_filters([]) if filters is None else filters
    documents = Documents(folder, seed)
    dropped = {}
    for reason in ("not a file", "without the field", *filters, "duplicate"):
        dropped[reason] = {"documents": 0, "bytes": 0}
    hashes = []
    n_bytes = sum(path.stat().st_size for _, _, path, _ in files if path.is_file())
    contents = track(read_contents(files, field, hashes), "reading", n_bytes, lambda content: content[-1])
    batches = group(contents, 4_000_000, lambda content: len(content[3]))
    for judged in compute(partial(judge, filters), batches, "filtering", processes=True):
        for source, name, named, text, reason, size, key, signature in judged:
            bad = named and reason in MUST_PASS
            check(not bad, f"{name} is {reason}, and has to be UTF-8 text")
            if reason or not documents.add(source, text, key, signature):
                count = dropped[reason or "duplicate"]
                count["documents"] += 1
                count["bytes"] += size
                count.setdefault("example", excerpt(f"{name}: {text}"))
    told = ", ".join(f"{name}: {count['documents']}" for name, count in dropped.items() if count["documents"])
    check(len(documents), f"no document is left to learn from ({told or 'there was no text'})")
    return documents, dropped, hashes

def select_documents(documents: Documents, threshold: float, reference: str | None, dropped: dict):
    """Leave out near-duplicates, and the texts least like a reference; return the rows of the others."""
    rows = np.arange(len(documents))
    steps = [("near-duplicate", find_near_duplicates, threshold), ("quality", find_worst, reference)]
    for reason, find, given in steps:
        if given:
            bad = find(documents, rows, given)
            rows = np.setdiff1d(rows, bad)
            dropped[reason] = {"documents": len(bad), "bytes": int(documents.sizes()[bad].sum())}
            if len(bad):
                dropped[reason]["example"] = excerpt(documents.text(bad[0]))
    return rows

def excerpt(text: str) -> str:
    """Give a line of the text's beginning."""
    return " ".join(text[:300].split())[:100]

def group(items, size: int, size_of=len):
    """Put items into lists of about this size."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size_of(item)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch

def split_documents(documents: Documents, rows: np.ndarray, val_fraction: float) -> tuple:
    """Put whole documents into train or val, in an order that only their content and the seed decide."""
    if len(rows) == 1:  # cut it at the character where nanoGPT cuts tiny Shakespeare
        say("a single document: its tail becomes the validation split")
        text = documents.text(rows[0])
        end = int(len(text) * (1 - val_fraction))
        for part in (text[:end], text[end:]):
            source = documents.sources[documents.source[rows[0]]]
            documents.add(source, part, hashlib.sha256(part.encode()).digest(), sign(part))
        train, val = [len(documents) - 2], [len(documents) - 1]
    else:
        train, val = [], []
        sizes = documents.sizes()
        room = val_fraction * float(sizes[rows].sum())
        for i in rows[np.argsort(np.array(documents.order)[rows])]:
            fits = sizes[i] / 2 <= room  # then it brings validation nearer to what is asked
            room -= sizes[i] if fits else 0
            (val if fits else train).append(i)
        if not val:
            val = [min(train, key=lambda i: sizes[i])]
            train.remove(val[0])
    sizes = documents.sizes()
    share = sizes[val].sum() / (sizes[train].sum() + sizes[val].sum())
    say(f"validation: {len(val)} of {len(rows)} documents, {share:.2%} of the bytes")
    enough = share > val_fraction / 10 and 1 - share > (1 - val_fraction) / 10
    check(enough, f"the documents are too unequal for --val-fraction {val_fraction}: join them to one file")
    return np.array(train), np.array(val)

def mix_sources(documents: Documents, train: np.ndarray, weights: dict, sources: dict) -> np.ndarray:
    """Repeat or leave out training documents until the bytes of each source are its share of the mixture.

    The whole stays as large as it was: of a source that gets twice its bytes, each document comes twice.
    """
    sizes = documents.sizes()[train]
    place = np.array(documents.source)[train]
    order = np.array(documents.order)[train]
    rows, keys = [], []
    for name, weight in weights.items():
        own = np.flatnonzero(place == documents.sources.index(name)) if name in documents.sources else []
        check(len(own), f"--weight: nothing of {name} is left for training")
        epochs = weight / sum(weights.values()) * sizes.sum() / sizes[own].sum()
        check(epochs <= 100, f"--weight: {name} would be repeated {epochs:.0f} times; 100 is the most")
        sources[name] |= {"weight": weight, "epochs": round(epochs, 4)}
        ends = np.cumsum(sizes[own])
        for copy in range(int(np.ceil(epochs))):
            part = own[ends <= (epochs - copy) * ends[-1]]  # all of it, but for the last copy
            rows.append(train[part])
            keys.append(order[part] * np.uint64(2 * copy + 1))  # the copies lie apart
    return np.concatenate(rows)[np.argsort(np.concatenate(keys), kind="stable")]

# ---- Documents: what they are like -------------------------------------------------------------------------

def choose_filters(asked: list[str], language: str | None = None, toxic: Path | None = None) -> dict:
    """Choose filters by name -> {name: what it needs to know}; asked: NAME, no-NAME, all or no-all."""
    chosen = set(FILTERS) - set(ON_REQUEST)
    given = {"toxic": (set((read_text(toxic) if toxic else TOXIC).lower().split()),)}
    if language:
        given["language"] = learn_language(language)
        chosen.add("language")
    if toxic:
        chosen.add("toxic")
    free = [name for name in FILTERS if name not in (*MUST_PASS, "language")]
    known = {name.replace(" ", "-"): {name} for name in free}
    known["all"] = set().union(*known.values())
    for word in asked:
        name = word.removeprefix("no-")
        check(name in known, f"there is no filter {word!r}: write NAME or no-NAME, of {', '.join(known)}")
        chosen = chosen | known[name] if name == word else chosen - known[name]
    return {name: given.get(name, ()) for name in FILTERS if name in chosen}

def read_text(path: Path | str) -> str:
    """Read a text that an option names."""
    check(Path(path).is_file(), f"there is no file {path}")
    try:
        return without_mark(Path(path).read_bytes()).decode()
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None

def share_of(wanted, items: list) -> float:
    """Give the share of items that are wanted."""
    return sum(item in wanted for item in items) / max(1, len(items))

def trigrams(text: str) -> list[str]:
    """List the groups of three letters of a text's beginning, a space between words."""
    letters = " ".join(["", *re.findall(r"[^\W\d_]+", text[:20_000].lower()), ""])
    return [letters[i : i + 3] for i in range(len(letters) - 2)]

def learn_language(name: str) -> tuple:
    """Learn which groups of letters are common in a language, "en" or a text in it, and their share there.

    On 99 languages, in messages of Django's of 200 letters, "en" keeps 3 of 2,014 that are not English and
    24 of 27 that are; of 500 letters none and all.
    """
    english = {gram.replace("_", " ") for gram in ENGLISH.split()}
    if name == "en":
        return english, 0.25
    found = trigrams(read_text(name))
    check(len(found) > 2000, f"--language {name} is too short: give some pages")
    common = {gram for gram, _ in Counter(found).most_common(120)} - english
    return common, share_of(common, found)

def count_repeated(text: str) -> int:
    """Count the characters in lines that stood before (Gopher's rule, 2112.11446)."""
    counts = Counter(map(str.strip, text.splitlines()))
    return sum(len(line) * (n - 1) for line, n in counts.items())

def of_one_form(lines: list[str]) -> bool:
    """Tell whether most lines differ in nothing but their words and numbers, as a program writes them."""
    forms = Counter(re.sub(r"\w+", "w", line) for line in lines if line.strip())
    form, n = forms.most_common(1)[0]
    return n >= 20 and n > 0.5 * forms.total() and form.strip("w ") != ""

def hash_words(text: str) -> np.ndarray:
    """Hash the words of a text, small letters and digits alone; of scripts without spaces, each character."""
    if not text.isascii():
        text = re.sub("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]", r" \g<0> ", text)
    data = text.lower().encode()
    words = data.translate(bytes(b if b in LETTERS or 48 <= b < 58 else 32 for b in range(256))).split()
    return np.fromiter(map(zlib.crc32, words or [data]), np.uint64, max(1, len(words)))

def sign(text: str) -> bytes:
    """Sign a text by MinHash (Broder 1997): signatures agree in a share that is near the Jaccard index.

    The index is that of the sets of shingles, which are all runs of 5 words: how many are in both texts, of
    those that are in either. A number of the signature is the shingle that comes first in one random order of
    all shingles: it is the same in two signatures if it is in both texts.
    """
    words = hash_words(text)
    words = np.pad(words, (0, max(0, 5 - len(words))))
    random = np.frombuffer(hashlib.shake_128(b"shingles").digest(40 + 8 * HASHES), np.uint64)
    n = len(words) - 4
    shingles = sum(words[k : k + n] * (random[k] | np.uint64(1)) for k in range(5)) >> np.uint64(32)
    shingles = shingles.astype(np.uint32)
    factors, shifts = random[5:].view(np.uint32).reshape(2, HASHES, 1)
    first = np.full(HASHES, 2**32 - 1, np.uint32)
    for i in range(0, n, 1024):
        places = shingles[i : i + 1024] * (factors | np.uint32(1)) + shifts  # (HASHES, shingles)
        np.minimum(first, places.min(axis=1), out=first)
    return first.astype(np.uint16).tobytes()  # the lower half is enough to compare

def find_pairs(signatures: np.ndarray, rows: np.ndarray, threshold: float):
    """Yield pairs (earlier, later) of rows of signatures (documents, HASHES) that agree to the threshold.

    Only texts that agree in a whole band of r numbers are compared. At a Jaccard index t, one of b bands
    agrees with probability 1 - (1 - t^r)^b: take the longest that find 95 % at the threshold (16 bands of 7
    find 98 % at 0.8; 37 of 3 find 99 % at 0.5). Of many alike in a band, each is compared with the 8 before.
    """
    found = {r: 1 - (1 - threshold**r) ** (HASHES // r) for r in range(1, 15)}
    r = max(r for r in found if found[r] >= 0.95)
    odd = 2 * np.arange(1, r + 1, dtype=np.uint64) ** 15 + 1
    for start in range(0, HASHES - r + 1, r):
        keys = signatures[rows, start : start + r].astype(np.uint64) @ odd
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        for step in range(1, 9):
            at = np.flatnonzero(keys[step:] == keys[:-step])
            for some in np.array_split(at, 1 + len(at) // 10_000):
                earlier, later = rows[order[some]], rows[order[some + step]]
                alike = (signatures[earlier] == signatures[later]).mean(axis=1) >= threshold
                yield earlier[alike], later[alike]

def find_near_duplicates(documents: Documents, rows: np.ndarray, threshold: float) -> np.ndarray:
    """Find the documents that are near an earlier one."""
    near = np.zeros(len(documents), bool)
    for _, later in find_pairs(documents.signed(), rows, threshold):
        near[later] = True
    return np.flatnonzero(near)

def count_contaminated(documents: Documents, train: np.ndarray, val: np.ndarray) -> int:
    """Count the validation documents that share half of their shingles, or more, with a training document."""
    in_val = np.isin(np.arange(len(documents)), val)
    near = np.zeros(len(documents), bool)
    rows = np.unique(np.concatenate([train, val]))
    for earlier, later in find_pairs(documents.signed(), rows, 0.5):
        across = in_val[earlier] != in_val[later]
        near[np.where(in_val[earlier], earlier, later)[across]] = True
    return int(near.sum())

def find_worst(documents: Documents, rows: np.ndarray, reference: str, share=0.1) -> np.ndarray:
    """Find the share of documents that is least like a reference text.

    A linear classifier, naive Bayes: the weight of a word or pair of words says how much likelier it is in
    the reference than in the corpus (as in DSIR, Xie et al. 2023, 2302.03169). A text's score is the mean.
    """
    def hash_pairs(text: str) -> np.ndarray:
        words = hash_words(text).astype(np.int64)
        return np.concatenate([words, 31 * words[:-1] + words[1:]]) % 65_521  # a prime: all bits count

    liked, found = np.ones((2, 65_521))
    np.add.at(liked, hash_pairs(reference), 1)
    for text in documents.read(rows, "learning quality"):
        np.add.at(found, hash_pairs(text), 1)
    weights = np.log(liked / liked.sum()) - np.log(found / found.sum())
    scores = [weights[hash_pairs(text)].mean() for text in documents.read(rows, "judging quality")]
    return rows[np.argsort(scores, kind="stable")[: int(share * len(rows))]]

def compute(function, items, what: str, processes=False):
    """Yield function(item) for each item in turn, computed on all cores; a few items are held at a time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total = len(items) if hasattr(items, "__len__") else None  # a generator has a bar of its own
    items = iter(items)
    first = list(islice(items, cores))
    ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered by this process alone
    # Threads are enough for tiktoken. Worker processes start the program that runs: it has to be this file.
    if processes and len(first) > 1 and __name__ == "__main__":
        context = multiprocessing.get_context("spawn")  # the one way that all systems have
        pool = ProcessPoolExecutor(len(first), context, signal.signal, ignore)
    else:
        pool = ThreadPoolExecutor(cores)
    handler = signal.signal(*ignore)  # the workers inherit this, so they are quiet while they start, too
    window = deque(pool.submit(function, item) for item in first)
    signal.signal(signal.SIGINT, handler)

    def results():
        for item in items:
            window.append(pool.submit(function, item))
            yield window.popleft().result()
        yield from (future.result() for future in window)

    try:
        yield from results() if total is None else track(results(), what, total)
    finally:
        pool.shutdown(cancel_futures=True)

def track(items, what, total, size_of=lambda item: 1):
    """Go through items with a bar and the time left."""
    from rich import console, progress  # here, as `encode` has to start fast
    with progress.Progress(console=console.Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            bar.advance(task, size_of(item))

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
    filter: Annotated[list[str], typer.Option(help="NAME, no-NAME, all or no-all; repeat.")] = (),
    language: Annotated[str, typer.Option(help="Keep what is in it: en, or a text in the language.")] = None,
    toxic: Annotated[Path, typer.Option(help="Drop what holds many words of this list.")] = None,
    quality: Annotated[Path, typer.Option(help="Drop the tenth that is least like this text.")] = None,
    near_duplicates: Annotated[float, typer.Option(help="Keep one of those alike, 0.8; 0: all.")] = 0.0,
    weight: Annotated[list[str], typer.Option(help="NAME=SHARE of a source in train; repeat.")] = (),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print meta.json, less its files.")] = False,
):
    """Turn text into a data folder: train.bin, val.bin, tokenizer.json, meta.json."""
    command = command_line(**locals())
    # 1. what can be wrong, before any work
    sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves it out
    from model import finish_save, save_files  # here, as it loads torch, and the other commands start fast
    check(0 < val_fraction < 1, f"--val-fraction {val_fraction} is not between 0 and 1")
    check(0 <= seed < 2**31, f"--seed {seed} is out of range: it has to be 0 at least, and below 2^31")
    fits = near_duplicates == 0 or 0.1 <= near_duplicates <= 1
    check(fits, f"--near-duplicates {near_duplicates} is out of range: 0 (none is dropped), or 0.1 to 1")
    options = choose_tokenizer(tokenizer, algorithm, vocab_size, pattern)
    tok = Tokenizer.load(tokenizer) if tokenizer else None
    check(not tok or tok.eot_id is not None, f"{tokenizer} names no token to end a document with")
    chosen = choose_filters(filter, language, toxic)
    reference = read_text(quality) if quality else None
    files = find_files(inputs) if inputs else find_python()
    shares = read_weights(weight, {source for source, *_ in files})
    output = output or Path("data") / (files[0][0] if inputs else "python")
    finish_save(output)
    check_folder(output, overwrite, files)
    # 2. documents; what is written on the way has no name on the disk, so a kill leaves nothing
    disk = next(folder for folder in (output.resolve(), *output.resolve().parents) if folder.is_dir())
    documents, dropped, hashes = read_documents(files, field, chosen, disk, seed)
    rows = select_documents(documents, near_duplicates, reference, dropped)
    train, val = split_documents(documents, rows, val_fraction)
    sources = {source: {} for source, *_ in files}
    train = mix_sources(documents, train, shares, sources) if shares else train
    # 3. the tokenizer: merges from train alone; characters from all, or val might have one without an id
    if not tok:
        texts = documents.read(rows if algorithm == "char" else train, "learning")
        tok, _ = train_tokenizer(texts, **options)
    # 4. the ids, and the account of it all
    dtype = "uint16" if tok.n_vocab <= 2**16 else "uint32"
    meta = {"dtype": dtype, "vocab_size": tok.n_vocab, "eot_id": tok.eot_id, "splits": {}, "sources": sources}
    save_train = encode_documents(tok, documents, train, "train", meta, disk)
    save_val = encode_documents(tok, documents, val, "val", meta, disk)
    meta |= {"near_duplicates": count_contaminated(documents, train, val), "filters": dropped}
    meta["command"] = command
    meta["files_sha256"] = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    account = json.dumps(meta | {"files": hashes if len(hashes) <= 10_000 else []}, indent=1)
    # 5. the folder
    contents = (save_train, save_val, tok.save, f"{account}\n")
    save_files(output, dict(zip(DATA_FILES, contents, strict=True)))
    show_meta(output, meta)
    if as_json:
        print(json.dumps({"output": str(output), **meta}))

def check_folder(output: Path, overwrite: bool, files: list):
    """Refuse a folder that is not empty and no data folder, or one that has to stay."""
    left = {f"{name}.new" for name in (*DATA_FILES, "commit.json")}  # a save that was killed may leave these
    there = any(not path.is_dir() and path.name not in left for path in output.resolve().rglob("*"))
    meta = output / "meta.json"
    ours = not there or (meta.is_file() and b'"splits"' in meta.read_bytes())
    check_output(output, ours, overwrite or not there, files)

def read_weights(weights: list[str], sources: set) -> dict:
    """Read NAME=SHARE of every source."""
    shares = {}
    for weight in weights:
        name, _, share = weight.rpartition("=")
        fits = name in sources and re.fullmatch(r"\d*\.?\d+", share) and float(share) > 0
        check(fits, f"--weight {weight}: write NAME=SHARE, above 0, NAME of {', '.join(sorted(sources))}")
        shares[name] = float(share)
    missing = sources - set(shares) if shares else ()
    check(not missing, f"--weight has to name every source: {', '.join(sorted(missing))} is missing")
    return shares

def encode_documents(tok: Tokenizer, documents: Documents, rows: np.ndarray, split: str, meta: dict, disk):
    """Encode a split as one row of ids, an end-of-text after each document; add its counts to meta.

    Returns a function that writes the ids to a path.
    """
    for count in (meta["splits"], *meta["sources"].values()):
        count[split] = {"documents": 0, "tokens": 0, "bytes": 0}
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    sizes = documents.sizes()
    file = tempfile.TemporaryFile(dir=disk)

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [np.append(tok.encode_array(text), tok.eot_id).astype(dtype) for text in texts]

    def save(path: Path):
        file.seek(0)
        with open(path, "wb") as target:
            shutil.copyfileobj(file, target, 2**20)

    texts = group(documents.read(rows, f"encoding {split}"), 200_000)
    encoded = chain.from_iterable(compute(encode, texts, ""))
    for i, ids in zip(rows, encoded, strict=True):
        file.write(ids.tobytes())
        source = documents.sources[documents.source[i]]
        for count in (meta["splits"][split], meta["sources"][source][split]):
            count["documents"] += 1
            count["tokens"] += len(ids)
            count["bytes"] += int(sizes[i])
    return save

def command_line(inputs: list, output, overwrite, as_json, **options) -> str:
    """Write down the command; of an absolute path only the name, as it means nothing on another machine."""
    words = ["python", "tokenize.py", "prepare", *(inputs or [])]
    for name, value in options.items():
        for given in value if isinstance(value, (list, tuple)) else [value]:
            words += [f"--{name.replace('_', '-')}", str(given)] if given or name == "seed" else []
    return shlex.join(Path(w).name if Path(w).is_absolute() else w for w in words)

def show_meta(output: Path, meta: dict):
    """Print what each source gave, and what was dropped."""
    for name, split in (meta["sources"] | {f"{output}": meta["splits"]}).items():
        for part in ("train", "val"):
            n = split[part]
            numbers = f"{n['documents']:>9,} documents {n['bytes']:>14,} bytes {n['tokens']:>14,} tokens"
            say(f"{name:12} {part:5} {numbers}")
        if "epochs" in split:
            say(f"{name:12} {split['epochs']} epochs, for a weight of {split['weight']}")
    n_val = meta["splits"]["val"]["documents"]
    say(f"validation documents with near duplicates in training: {meta['near_duplicates']} of {n_val}")
    for reason, n in meta["filters"].items():
        if n["documents"]:
            say(f"dropped: {n['documents']} {reason}, such as {n['example']!r}")

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
