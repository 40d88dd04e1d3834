"""Text to tokens, and text to a data folder.

A tokenizer is learned from text and kept in one file, Hugging Face's tokenizer.json. Byte-level BPE starts from the
256 bytes and joins the most frequent pair of neighbours into a new token, again and again: `get_pairs` and `merge`
are the idea, `train_bpe_plain` the whole of it in a dozen lines, `train_bpe` the same merges at the speed of the
Rust trainer. `prepare` cleans, deduplicates and splits documents and writes them as one long row of token ids.
Left out so far: WordPiece, Unigram, normalizers, near-duplicates. All text is held in memory at once.

    python tokenize.py prepare                                  # the Python that is installed here -> data/python
    python tokenize.py prepare shakespeare.txt --output data/shakespeare --algorithm char --val-fraction 0.1
    python tokenize.py train --input shakespeare.txt --vocab-size 1024 --output tokenizer.json
    python tokenize.py encode --tokenizer tokenizer.json "lower lowest"
    python tokenize.py decode --tokenizer tokenizer.json "[75, 78, 86]"

Sennrich et al. 2016, https://arxiv.org/abs/1508.07909 (BPE); Radford et al. 2019 (GPT-2: bytes, a pattern to split).
"""

from __future__ import annotations

if __name__ == "tokenize":
    # The standard library has a module of this name, and a script's folder comes first on the import path: hand that
    # module over. What follows then only defines functions that nobody calls, and needs none of the imports below.
    import importlib.util
    import os
    import sys

    _path = os.path.join(os.path.dirname(os.__file__), "tokenize.py")
    _spec = importlib.util.spec_from_file_location("tokenize", _path)
    sys.modules["tokenize"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["tokenize"])
else:
    import hashlib
    import heapq
    import importlib.metadata
    import json
    import lzma
    import multiprocessing
    import os
    import re
    import shlex
    import shutil
    import signal
    import sys
    import sysconfig
    import time
    import zlib
    from collections import Counter
    from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
    from contextlib import nullcontext
    from itertools import repeat
    from pathlib import Path
    from typing import Annotated, Literal

    import numpy as np
    import regex
    import tiktoken
    import typer

# Reserved from the first day, in this order, after the bytes and the merges.
SPECIAL = (
    "<|endoftext|>", "<|pad|>", "<|mask|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>",
    "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
)  # fmt: skip
# GPT-2 gave the printable bytes the first ids. It writes each byte as one visible character: itself where it can.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTES = PRINTABLE + [b for b in range(256) if b not in PRINTABLE]  # id -> byte
CHAR = {b: chr(b) if i < len(PRINTABLE) else chr(256 + i - len(PRINTABLE)) for i, b in enumerate(BYTES)}  # 32 -> "Ġ"
BYTE = {c: b for b, c in CHAR.items()}
# A merge never crosses the pieces that the pattern cuts. GPT-4's is its first form: today's, with possessive "++",
# means the same but for white space at the very end, and Oniguruma, the engine of `tokenizers`, reads "{1,3}+" as a
# repetition of the repetition.
PATTERNS = {
    "gpt2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
# Larger pieces, each a whole number of the pattern's, found by the faster `re`. For gpt2: no piece has white space
# after anything else, so one begins wherever white space does. For gpt4: newlines may belong to the word before them,
# but a piece ends with the last newline of a stretch of white space.
COARSE = {"gpt2": r"\s*\S+|\s+", "gpt4": r"\s*\S+(?:\s*[\r\n]+)?|\s+"}
# Sources of the embedded default, beside the standard library: what requirements.txt installs.
PACKAGES = ("torch", "numpy", "tiktoken", "regex", "typer", "rich", "pytest", "safetensors")
NOT_TEXT = {"test", "tests", "testing", "idlelib", "site-packages", "dist-packages", "__pycache__"}
# What a document is dropped for, in the order of the checks.
FILTERS = ("binary", "not_utf8", "short", "long_lines", "data", "repetitive", "duplicate")
LETTERS = bytes([*range(65, 91), *range(97, 123), *range(128, 256)])  # ASCII letters, and all bytes that are not ASCII
XZ_LIMIT = 200_000_000  # bytes of training text
XZ = {"format": 1, "preset": 9 | 1 << 31}  # xz -9e (lzma.FORMAT_XZ, lzma.PRESET_EXTREME)


class UserError(Exception):
    """What a user can mend: one sentence, printed without a traceback, exit code 2."""


# ---------------------------------------------------------------------------------------------------------------------
# Byte pair encoding


def get_pairs(ids: list[int], counts: dict | None = None, weight: int = 1) -> dict[tuple[int, int], int]:
    """Count the neighbours: get_pairs([1, 2, 3, 1, 2]) -> {(1, 2): 2, (2, 3): 1, (3, 1): 1}"""
    counts = {} if counts is None else counts
    for pair in zip(ids, ids[1:], strict=False):
        counts[pair] = counts.get(pair, 0) + weight
    return counts


def merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replace a pair by one token, from left to right: merge([1, 2, 3, 1, 2], (1, 2), 4) -> [4, 3, 4]"""
    out, i = [], 0
    while i < len(ids):
        joined = tuple(ids[i : i + 2]) == pair
        out.append(new if joined else ids[i])
        i += 2 if joined else 1
    return out


def train_bpe_plain(words: dict[str, int], n_merges: int) -> list[tuple[int, int]]:
    """The method as it is told: count all pairs, join the most frequent, repeat. `train_bpe` gives the same merges.

    words: distinct piece of text -> how often it occurs. Of equally frequent pairs the smallest ids win, as in
    `tokenizers`. train_bpe_plain({"aab": 1, "ab": 2}, 2) -> [(64, 65), (64, 256)]: "ab" (3 times), then "a" + "ab".
    """
    rows = [([BYTES.index(b) for b in word.encode()], n) for word, n in words.items()]
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


def train_bpe(words: dict[str, int], n_merges: int, watch=iter) -> list[tuple[int, int]]:
    """Merges of byte-level BPE, in order: [(left id, right id)], fewer than n_merges where no pair is left.

    `watch` wraps the loop, for progress.

    All words lie in one array, a gap after each. A token is known at its two ends: `head[first cell]` and
    `tail[last cell]` hold its id, so its neighbours are one step away whatever their length. For "lower" with "lo"
    joined: head = lo . w e r, tail = . lo w e r. A merge touches only the cells where its pair stands, and changes
    only the counts of the pairs around them.
    """
    gap = 256  # an id between the bytes and the merges that pairs with nothing; taken out again at the end
    text = [word.encode() for word in words]
    size = np.array([len(w) for w in text], dtype=np.int64)
    start = np.cumsum(size + 1) - size  # cell of each word's first byte; cell 0 is a gap
    cells = np.arange(size.sum()) + np.repeat(np.arange(len(text)) + 1, size)
    head = np.full(len(cells) + len(text) + 1, gap, dtype=np.int32)
    id_of = np.argsort(BYTES)  # byte -> id
    head[cells] = id_of[np.frombuffer(b"".join(text), dtype=np.uint8)]
    tail = head.copy()
    weight = np.zeros(len(head))  # of the word a cell belongs to; float64 counts exactly up to 2**53
    weight[cells] = np.repeat(np.fromiter(words.values(), dtype=np.int64), size)
    del text, start, cells

    width = [1] * 257  # id -> bytes
    where = [np.flatnonzero(head == i) for i in range(256)] + [None]  # id -> cells where it began, some since swallowed
    table = np.bincount(head[:-1] * 257 + head[1:], weights=weight[:-1], minlength=257 * 257).reshape(257, 257)
    counts = {(a, b): int(table[a, b]) for a, b in np.argwhere(table[:256, :256]).tolist()}
    heap = [(-n, pair) for pair, n in counts.items()]  # most frequent first, then the smallest ids
    heapq.heapify(heap)

    def tally(ids, cells):
        """(id, how often) of the tokens around some cells, gaps left out."""
        total = np.bincount(ids, weights=weight[cells], minlength=gap + 1)
        total[gap] = 0
        found = np.flatnonzero(total)
        return zip(found.tolist(), total[found].astype(np.int64).tolist(), strict=True)

    merges = []
    for _ in watch(range(n_merges)):
        while heap and counts[heap[0][1]] < -heap[0][0]:  # the count fell since this entry was made
            _, pair = heapq.heappop(heap)
            if counts[pair]:
                heapq.heappush(heap, (-counts[pair], pair))
        if not heap:
            break
        a, b = heapq.heappop(heap)[1]
        new = len(width)
        width.append(width[a] + width[b])
        merges.append((a, b))
        # 1. the cells p where a b stands, from the rarer of the two
        if len(where[a]) <= len(where[b]):
            where[a] = p = where[a][head[where[a]] == a]
            p = p[head[p + width[a]] == b]
        else:
            where[b] = q = where[b][head[where[b]] == b]
            p = q[tail[q - 1] == a] - width[a]
        if a == b:  # "aaaa" holds the pair at 0, 1 and 2: take every second one of a run
            index = np.arange(len(p))
            begin = np.append(True, np.diff(p) != width[a])
            p = p[(index - np.maximum.accumulate(np.where(begin, index, 0))) % 2 == 0]
        # 2. join, noting the neighbour on the right before
        q, end = p + width[a], p + width[new]
        right = head[end]
        head[q] = tail[q - 1] = -1
        head[p] = tail[end - 1] = new
        where.append(p)
        # 3. pairs that went: (left, a) and (b, right); that came: (left, new) and (new, right).
        #    Where two joined ones touch, the pair between them is seen from its left one only.
        left = tail[p - 1]
        alone = left != new
        for x, n in tally(left[alone], p[alone]):
            counts[x, a] -= n
            counts[x, new] = n
            heapq.heappush(heap, (-n, (x, new)))
        for x, n in tally(right, p):
            counts[b, x] -= n
        for x, n in tally(head[end], p):
            counts[new, x] = n
            heapq.heappush(heap, (-n, (new, x)))
        counts[a, b] = 0
    return [(a - (a > gap), b - (b > gap)) for a, b in merges]


def count_words(texts: list[str], pattern: str) -> Counter:
    """How often each piece of the pattern occurs: count_words(["a b b"], "gpt2") -> {"a": 1, " b": 2}

    Counting the coarse pieces first lets the slow pattern see each of them once, where text repeats itself a third.
    """
    coarse, words, findall = Counter(), Counter(), regex.compile(PATTERNS[pattern]).findall
    for text in texts:
        if any(c in text for c in "\x1c\x1d\x1e\x1f"):  # white space to `re` only
            words.update(findall(text))
        else:
            coarse.update(re.findall(COARSE[pattern], text))
    for piece, n in coarse.items():
        for word in findall(piece):
            words[word] += n
    return words


def cut(text: str, size: int) -> list[str]:
    """Parts of at least this many characters, cut before the space between two words, where a piece always begins."""
    parts, begin = [], 0
    while len(text) - begin > 2 * size and (found := re.compile(r"\S(?= \S)").search(text, begin + size)):
        parts.append(text[begin : found.end()])
        begin = found.end()
    return [*parts, text[begin:]]


def count_words_in_parallel(texts: list[str], pattern: str, size: int = 4_000_000) -> Counter:
    """`count_words` on all cores, by parts of about `size` characters."""
    parts, room = [[]], size
    for part in (part for text in texts for part in cut(text, size)):
        if parts[-1] and room < len(part):
            parts, room = [*parts, []], size
        parts[-1].append(part)
        room -= len(part)
    pool, counts = None, map(count_words, parts, repeat(pattern))
    if __name__ == "__main__" and min(len(parts), n_cores()) > 1:  # workers start the program that runs: this file
        context = multiprocessing.get_context("spawn")  # the one way that all systems have
        ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered here
        pool = ProcessPoolExecutor(min(len(parts), n_cores()), context, signal.signal, ignore)
        counts = pool.map(count_words, parts, repeat(pattern))
    total = Counter()
    try:
        for count in track(counts, "counting words", len(parts)):
            total.update(count)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
    return total


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer and its file


def bpe_file(merges: list[tuple[int, int]], pattern: str) -> dict:
    """tokenizer.json of byte-level BPE: bytes, merges, special tokens."""
    names = [CHAR[b] for b in BYTES]
    for a, b in merges:
        names.append(names[a] + names[b])
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": pattern == "gpt2"}
    split = {"type": "Split", "pattern": {"Regex": PATTERNS[pattern]}, "behavior": "Isolated", "invert": False}
    splitter = level if pattern == "gpt2" else {"type": "Sequence", "pretokenizers": [split, level]}
    decoder = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    return tokenizer_file(names, [[names[a], names[b]] for a, b in merges], splitter, decoder)


def char_file(characters: set[str]) -> dict:
    """tokenizer.json with one id for each character: to Hugging Face a BPE that never merges."""
    return tokenizer_file(sorted(characters), [], None, {"type": "Fuse"})


def tokenizer_file(names: list[str], merges: list, pre_tokenizer: dict | None, decoder: dict) -> dict:
    """The parts that all our tokenizer files share; special tokens come last."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
        "vocab": {name: i for i, name in enumerate(names)}, "merges": merges,
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": len(names) + i, "content": name, **flags} for i, name in enumerate(SPECIAL)],
        "normalizer": None, "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": decoder, "model": model,
    }  # fmt: skip


def bpe_codec(spec: dict):
    """(id -> bytes, function from text to ids) of a byte-level BPE file. Encoding is tiktoken's."""
    vocab, pattern = spec["model"]["vocab"], read_pattern(spec["pre_tokenizer"])
    pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in spec["model"]["merges"]]
    try:
        names = dict.fromkeys([CHAR[b] for b in BYTES] + [a + b for a, b in pairs])  # in the order of their ranks
        ranks = {bytes(BYTE[c] for c in name): rank for rank, name in enumerate(names)}
        ids = np.array([vocab[name] for name in names], dtype=np.uint32)
    except KeyError as e:
        raise UserError(f"there is no token {e}: only byte-level BPE with all 256 bytes is supported") from None
    try:
        encoding = tiktoken.Encoding("octavo", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError as e:
        raise UserError(f"tiktoken cannot read the split pattern of this tokenizer: {e}") from None

    def encode(text: str) -> np.ndarray:
        try:
            return ids[encoding.encode_to_numpy(text, disallowed_special=())]
        except ValueError:  # the pattern's backtracking is limited
            raise UserError("a stretch of a million spaces or more is too long for tiktoken") from None

    return dict(zip(ids.tolist(), ranks, strict=True)), encode


def char_codec(spec: dict):
    """(id -> bytes, function from text to ids) of a file with one id a character."""
    vocab = spec["model"]["vocab"]
    if any(len(c) != 1 for c in vocab):
        raise UserError("a BPE tokenizer without merges has to have single characters only")
    table = np.full(0x110000, -1, dtype=np.int32)
    table[[ord(c) for c in vocab]] = list(vocab.values())

    def encode(text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        ids = table[codes]
        if len(ids) and ids.min() < 0:
            c = chr(codes[ids.argmin()])
            raise UserError(f"the character {c!r} (U+{ord(c):04X}) is not in the vocabulary of this tokenizer")
        return ids.astype(np.uint32)

    return {i: c.encode() for c, i in vocab.items()}, encode


def read_pattern(pre_tokenizer: dict | None) -> str:
    """The one regular expression that a file's pre-tokenizer amounts to."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {"type": "no pre-tokenizer"}])
    kinds = [s["type"] for s in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"] and not steps[0]["add_prefix_space"]:
        return PATTERNS["gpt2"]
    split = steps[0]
    plain = kinds == ["Split", "ByteLevel"] and not steps[1]["use_regex"] and not steps[1]["add_prefix_space"]
    if not plain or split["behavior"] != "Isolated" or split["invert"] or "Regex" not in split["pattern"]:
        raise UserError(f"this tokenizer's pre-tokenizer ({' + '.join(kinds)}, with its options) is not supported yet")
    pattern = split["pattern"]["Regex"]
    # Hugging Face keeps what lies between two matches as a piece of its own, tiktoken would drop it.
    return pattern if pattern in PATTERNS.values() else rf"{pattern}|(?:(?!{pattern})[\s\S])+"


class Tokenizer:
    """A tokenizer.json and what it means: text to ids and back. `special` maps names to ids, None where there is none.

    Special tokens never come out of ordinary text: whoever wants them names them.
    """

    def __init__(self, spec: dict):
        model = spec.get("model", {})
        check_supported(spec, model.get("type", "BPE"))
        self.spec = spec
        self.special = {t["content"]: t["id"] for t in spec["added_tokens"]}
        tokens, self._encode = bpe_codec(spec) if model["merges"] else char_codec(spec)
        tokens |= {i: name.encode() for name, i in self.special.items()}
        self.n_vocab = max(tokens) + 1
        self.token_bytes = [tokens.get(i, b"") for i in range(self.n_vocab)]  # an id that a file leaves out is empty
        names = ("<|endoftext|>", "<|pad|>", "<|mask|>", "<|im_start|>", "<|im_end|>")
        self.eot_id, self.pad_id, self.mask_id, self.im_start_id, self.im_end_id = map(self.special.get, names)

    @classmethod
    def load(cls, path) -> Tokenizer:
        """From a tokenizer.json or a folder that holds one."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        try:
            return cls(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UserError(f"there is no tokenizer at {path}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{path} is not a tokenizer.json: {type(e).__name__}: {e}") from None
        except UserError as e:
            raise UserError(f"{path}: {e}") from None

    def save(self, path) -> None:
        """To a file, or into a folder as tokenizer.json; whole or not at all."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        write_whole(path, json.dumps(self.spec, ensure_ascii=False, indent=2) + "\n")

    def encode(self, text: str, special=()) -> list[int]:
        """Ids of a text. `special`: "all", a name or names of special tokens that the text may spell out."""
        names = self.special if special == "all" else [special] if isinstance(special, str) else list(special)
        if not names:
            return self._encode(text).tolist()
        if unknown := [name for name in names if name not in self.special]:
            raise UserError(f"this tokenizer has no special token {unknown[0]!r}; it has {', '.join(self.special)}")
        longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        ids = []
        for piece in re.split(f"({longest_first})", text):
            ids += [self.special[piece]] if piece in names else self._encode(piece).tolist()
        return ids

    def encode_array(self, text: str) -> np.ndarray:
        """Ids of ordinary text as uint32; fast, and several threads at once where it is BPE."""
        return self._encode(text)

    def decode_bytes(self, ids) -> bytes:
        """The exact bytes of some ids; special tokens by their names."""
        try:
            if len(ids) and min(ids) < 0:
                raise IndexError
            return b"".join([self.token_bytes[i] for i in ids])
        except IndexError:
            bad = next(i for i in ids if not 0 <= i < self.n_vocab)
            raise UserError(f"token id {bad} is not in the vocabulary of {self.n_vocab} ids") from None

    def decode(self, ids) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def check_supported(spec: dict, kind: str) -> None:
    """Refuse, by name, what a file asks for and we would do differently."""
    model = spec["model"]
    if kind != "BPE":
        raise UserError(f"tokenizers of the type {kind} are not supported yet")
    if spec["normalizer"]:
        raise UserError(f"a normalizer ({spec['normalizer']['type']}) is not supported yet")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise UserError(f"BPE with {option} is not supported yet")
    for token in spec["added_tokens"]:
        for option in ("single_word", "lstrip", "rstrip"):
            if token.get(option):
                raise UserError(f"the added token {token['content']} asks for {option}, which is not supported yet")


def train_tokenizer(texts: list[str], algorithm: str, vocab_size: int, pattern: str) -> Tokenizer:
    """A tokenizer learned from some texts."""
    if algorithm == "char":
        return Tokenizer(char_file(set().union(*texts)))
    n_merges = vocab_size - 256 - len(SPECIAL)
    words = count_words_in_parallel(texts, pattern)
    merges = train_bpe(words, n_merges, lambda steps: track(steps, "merging", n_merges))
    if len(merges) < n_merges:
        say(f"warning: the text gives {len(merges)} merges only, so the vocabulary has {267 + len(merges)} tokens")
    return Tokenizer(bpe_file(merges, pattern))


# ---------------------------------------------------------------------------------------------------------------------
# Documents: found, read, filtered, split


class Document:
    """One text with the source it came from and a digest that ignores line ends and trailing white space."""

    def __init__(self, source: str, text: str, size: int):
        self.source, self.text, self.size = source, text, size  # size in bytes of UTF-8
        self.digest = hashlib.sha256("\n".join(s.rstrip() for s in text.strip().splitlines()).encode()).hexdigest()


def find_files(inputs: list[str]) -> list[tuple[str, str, Path, bool]]:
    """(source, name within it, path, whether the user named this very file) of all files of all inputs, sorted."""
    found = []
    for item in inputs:
        source, equals, rest = item.partition("=")
        path = Path(rest if equals and not Path(item).exists() else item)
        source = source if path == Path(rest) and equals else path.resolve().stem
        if path.is_dir():
            found += [(source, name, path / name, False) for name in walk(path)]
        elif path.exists():
            found.append((source, path.name, path, True))
        else:
            raise UserError(f"there is no file or folder {path}")
    if not found:
        raise UserError(f"there are no files in {', '.join(inputs)}")
    return sorted(found)


def walk(folder: Path, skip=()) -> list[str]:
    """Files below a folder as relative names with slashes; nothing hidden, no folder of a name to skip."""
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = [d for d in folders if not d.startswith(".") and d not in skip]
        names += [(Path(root) / f).relative_to(folder).as_posix() for f in files if not f.startswith(".")]
    return names


def find_python() -> list[tuple[str, str, Path, bool]]:
    """The embedded default: the standard library and the packages that requirements.txt installs, without tests."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = [("python", name, library / name) for name in walk(library, NOT_TEXT)]
    for package in PACKAGES:
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            say(f"{package} is not installed here: left out")
            continue
        found += [(package, f.as_posix(), Path(f.locate())) for f in files if ".." not in f.parts]

    def wanted(name: str) -> bool:
        *folders, file = name.split("/")
        is_test = file.startswith("test_") or file.endswith("_test.py") or file == "conftest.py"
        return file.endswith(".py") and not is_test and NOT_TEXT.isdisjoint(folders)

    return sorted((source, name, path, False) for source, name, path in found if wanted(name) and path.is_file())


def read_file(path: Path, field: str) -> tuple[bytes, list[bytes]]:
    """A file's bytes, and the texts in it: the file itself, or a field of each line of a .jsonl file."""
    data = path.read_bytes()
    if path.suffix != ".jsonl":
        return data, [data]
    texts = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            texts += [json.loads(line)[field].encode("utf-8", "surrogatepass")] if line.strip() else []
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f'line {number} of {path} is not a JSON object with a text in "{field}"') from None
    return data, texts


def why_drop(data: bytes) -> str | None:
    """The first filter that a document does not pass: why_drop(b"x = 1") -> "short" """
    if b"\0" in data:
        return "binary"
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return "not_utf8"
    if len(text.strip()) < 64:
        return "short"
    if max(map(len, text.splitlines())) > 20_000:
        return "long_lines"  # minified code, dumps
    if len(data.translate(None, LETTERS)) > 0.75 * len(data):
        return "data"  # tables of numbers
    if len(zlib.compress(data, 1)) < 0.1 * len(data):
        return "repetitive"
    return None


def read_documents(files: list, field: str, filters=FILTERS) -> tuple[list[Document], dict, list]:
    """Documents that pass the filters; {filter: what it dropped}; [source, name, hash] of each file.

    The filters judge what was found in folders and JSON lines. A file that the user named is taken if it is text.
    """
    dropped = {name: {"documents": 0, "bytes": 0} for name in filters}
    documents, seen, listing = [], set(), []
    for source, name, path, named in track(files, "reading", len(files)):
        data, texts = read_file(path, field)
        listing.append([source, name, hashlib.sha256(data).hexdigest()[:16]])
        for text in texts:
            reason = why_drop(text)
            if named and path.suffix != ".jsonl":
                if not text.strip() or reason in ("binary", "not_utf8"):
                    raise UserError(f"{path} is {'not UTF-8 text' if text.strip() else 'empty'}")
                reason = None
            if reason not in filters:
                document, reason = Document(source, text.decode(), len(text)), None
                if document.digest in seen and "duplicate" in filters:
                    reason = "duplicate"
                seen.add(document.digest)
            if reason:
                dropped[reason]["documents"] += 1
                dropped[reason]["bytes"] += len(text)
            else:
                documents.append(document)
    if not documents:
        told = ", ".join(f"{name}: {n['documents']}" for name, n in dropped.items() if n["documents"])
        raise UserError(f"no document is left to learn from ({told or 'there was no text'})")
    return documents, dropped, listing


def split_documents(documents: list[Document], val_fraction: float, seed: int) -> dict[str, list[Document]]:
    """Whole documents go to train or val, in an order that only their content and the seed decide.

    A document that is alone is cut instead, at the character where nanoGPT cuts tiny Shakespeare.
    """
    if len(documents) == 1:
        say("a single document: its tail becomes the validation split")
        (one,) = documents
        cut_at = int(len(one.text) * (1 - val_fraction))
        parts = one.text[:cut_at], one.text[cut_at:]
        if not all(parts):
            raise UserError(f"{len(one.text)} characters are too few to split")
        train, val = [Document(one.source, part, len(part.encode())) for part in parts]
        return {"train": [train], "val": [val]}
    shuffled = sorted(documents, key=lambda d: hashlib.sha256(f"{seed} {d.digest}".encode()).digest())
    wanted = val_fraction * sum(d.size for d in documents)
    val = [shuffled.pop()]
    while len(shuffled) > 1 and sum(d.size for d in val) + shuffled[-1].size / 2 < wanted:
        val.append(shuffled.pop())
    return {"train": shuffled, "val": val}


def encode_all(tokenizer: Tokenizer, documents: list[Document], what: str):
    """The ids of each document in turn, as arrays, encoded by all cores."""
    pool = ThreadPoolExecutor(n_cores())  # tiktoken lets go of the interpreter's lock
    try:
        arrays = pool.map(tokenizer.encode_array, [d.text for d in documents])
        yield from track(arrays, what, len(documents))
    finally:
        pool.shutdown(cancel_futures=True)


def write_tokens(path: Path, tokenizer: Tokenizer, documents: list[Document], dtype: str) -> dict[str, dict[str, int]]:
    """Write all ids in a row, an end-of-text after each document: {source: {documents, tokens, bytes}}"""
    counts = {}
    with open(path, "wb") as f:
        for ids, document in zip(encode_all(tokenizer, documents, f"encoding {path.stem}"), documents, strict=True):
            f.write(np.append(ids, np.uint32(tokenizer.eot_id)).astype(np.dtype(dtype).newbyteorder("<")).tobytes())
            count = counts.setdefault(document.source, {"documents": 0, "tokens": 0, "bytes": 0})
            count["documents"] += 1
            count["tokens"] += len(ids) + 1
            count["bytes"] += document.size
    return counts


def xz_sizes(send, train: bytes, val: bytes) -> None:
    """Compress train, then val behind it. Sends a float after each megabyte, then C(train) and C(train + val)."""
    xz, size, worker = lzma.LZMACompressor(**XZ), 0, multiprocessing.parent_process()
    if worker:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    for i in range(0, len(train), 10**6):
        size += len(xz.compress(train[i : i + 10**6]))
        send(i / len(train))
    if worker and hasattr(os, "fork"):  # a compressor cannot be copied, but a process can: one pass gives both sizes
        if not (child := os.fork()):
            send(size + len(xz.flush()))
            os._exit(0)
        os.waitpid(child, 0)
    else:
        send(len(lzma.compress(train, **XZ)))
    send(size + len(xz.compress(val)) + len(xz.flush()))


class Baselines:
    """What xz makes of the validation text, alone and primed with the training text, found while the rest goes on."""

    def __init__(self, train: list[Document], val: list[Document]):
        self.texts = ["".join(d.text for d in documents).encode() for documents in (train, val)]
        self.process = None

    def __enter__(self) -> Baselines:
        if __name__ == "__main__" and len(self.texts[0]) <= XZ_LIMIT:  # as above: workers start this file
            context = multiprocessing.get_context("spawn")
            self.inlet, outlet = context.Pipe(duplex=False)
            self.process = context.Process(target=xz_sizes, args=(outlet.send, *self.texts), daemon=True)
            self.process.start()
            outlet.close()
        return self

    def __exit__(self, *_) -> None:
        if self.process:
            self.process.terminate()

    def result(self) -> dict:
        """Sizes in bytes, and bits per byte of the validation text."""
        train, val = self.texts
        sizes = {"xz": len(lzma.compress(val, **XZ))}
        if len(train) > XZ_LIMIT:
            say("xz primed with so much text takes minutes: left out")
        else:
            n, found = -(-len(train) // 10**6) + 2, []
            if not self.process:
                xz_sizes(found.append, train, val)
            items = (self.inlet.recv() for _ in range(n)) if self.process else found
            found = list(track(items, "compressing with xz -9e, the baseline", n))
            sizes["xz_primed"] = found[-1] - found[-2]
        bits = {f"{name}_bpb": round(8 * size / len(val), 4) for name, size in sizes.items()}
        return {f"{name}_bytes": size for name, size in sizes.items()} | bits


# ---------------------------------------------------------------------------------------------------------------------
# Files, progress, tables


def write_whole(path: Path, text: str) -> None:
    """Write a file beside its place, then rename it, so that the name never holds half of it."""
    beside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8", newline="\n")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


class NewFolder:
    """A folder that appears whole or not at all: filled beside its place, renamed at the end of the `with`."""

    def __init__(self, path: Path, overwrite: bool):
        if path.exists() and not overwrite:
            raise UserError(f"{path} exists: pass --overwrite to replace it, or another --output")
        self.path, self.beside = path, path.with_name(f".{path.name}.tmp-{os.getpid()}")
        self.old = path.with_name(f".{path.name}.old")

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.old.exists() and not self.path.exists():  # killed between the two renames below
            self.old.rename(self.path)
        for stale in self.path.parent.glob(f".{self.path.name}.tmp-*"):
            if not is_running(int(stale.name.rpartition("-")[2])):
                shutil.rmtree(stale, ignore_errors=True)
        self.beside.mkdir()
        return self.beside

    def __exit__(self, error, *_) -> None:
        if error is None:
            shutil.rmtree(self.old, ignore_errors=True)
            if self.path.exists():
                self.path.rename(self.old)
            self.beside.rename(self.path)
            shutil.rmtree(self.old, ignore_errors=True)
        shutil.rmtree(self.beside, ignore_errors=True)


def is_running(pid: int) -> bool:
    """Whether a process lives. Windows has no harmless way to ask (signal 0 is Ctrl-C there): yes, then."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def say(text: str) -> None:
    """A line for people; standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def track(items, what: str, total: int):
    """Go through some items with progress and time left on a terminal, with a line at the end elsewhere."""
    start = time.perf_counter()
    if sys.stderr.isatty():
        from rich import console, progress  # here, as `encode` has to start fast

        yield from progress.track(items, what, total, console=console.Console(stderr=True))
    else:
        yield from items
        say(f"{what}: {time.perf_counter() - start:.1f} s")


def show_table(title: str, columns: list[str], rows: list[list]) -> None:
    """A small table on standard error; numbers to the right."""
    from rich import console, table

    grid = table.Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        grid.add_column(column, justify="right" if i else "left")
    for row in rows:
        grid.add_row(*(f"{x:,}" if isinstance(x, int) else x for x in row))
    console.Console(stderr=True).print(grid)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def train(
    inputs: Annotated[list[str], typer.Option("--input", help="Text file, folder or .jsonl file; can be repeated.")],
    output: Annotated[Path, typer.Option(help="The tokenizer.json to write.")],
    algorithm: Annotated[Literal["bpe", "char"], typer.Option(help="Byte-level BPE, or single characters.")] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="bpe: all ids, with the special tokens; 1024 to 256000.")] = 4096,
    pattern: Annotated[Literal["gpt2", "gpt4"], typer.Option(help="bpe: how text is split before it merges.")] = "gpt4",
    field: Annotated[str, typer.Option(help="Field of a .jsonl line that holds the text.")] = "text",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
) -> None:
    """Learn a tokenizer from text."""
    check_vocab_size(algorithm, vocab_size)
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists: pass --overwrite to replace it, or another --output")
    documents, _, _ = read_documents(find_files(inputs), field, filters=("binary", "not_utf8"))
    start = time.perf_counter()
    tokenizer = train_tokenizer([d.text for d in documents], algorithm, vocab_size, pattern)
    seconds = time.perf_counter() - start
    tokenizer.save(output)
    n_tokens = sum(map(len, encode_all(tokenizer, documents, "encoding")))
    n_bytes, n_merges = sum(d.size for d in documents), len(tokenizer.spec["model"]["merges"])
    row = [str(tokenizer.n_vocab), n_merges, f"{seconds:.1f}", n_bytes, f"{n_bytes / n_tokens:.3f}"]
    show_table(str(output), ["tokens", "merges", "seconds", "bytes of text", "bytes per token"], [row])


def encode(
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer.json, or a folder that holds one.")],
    text: Annotated[str, typer.Argument(help="The text; standard input, byte for byte, where none is given.")] = None,
    special: Annotated[list[str], typer.Option(help="Special token that the text may spell out, or: all.")] = (),
) -> None:
    """Print the ids of a text as one JSON list."""
    tok = Tokenizer.load(tokenizer)
    try:
        text = sys.stdin.buffer.read().decode() if text is None else text
        text.encode()  # an argument can hold bytes that are no text
    except UnicodeError:
        raise UserError("the text is not UTF-8") from None
    print(json.dumps(tok.encode(text, "all" if "all" in special else special)))


def decode(
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer.json, or a folder that holds one.")],
    ids: Annotated[str, typer.Argument(help="A JSON list; standard input where none is given.")] = None,
) -> None:
    """Write the bytes that a JSON list of ids stands for."""
    tok = Tokenizer.load(tokenizer)
    try:
        numbers = json.loads(sys.stdin.buffer.read() if ids is None else ids)
    except ValueError:
        numbers = None
    if not isinstance(numbers, list) or any(type(i) is not int for i in numbers):
        raise UserError("the ids are not a JSON list of whole numbers")
    sys.stdout.buffer.write(tok.decode_bytes(numbers))
    sys.stdout.buffer.flush()


def prepare(
    inputs: Annotated[list[str], typer.Argument(help="File, folder, .jsonl or NAME=PATH. None: this Python.")] = None,
    output: Annotated[Path, typer.Option(help="Folder to write; by default data/ and the first source's name.")] = None,
    tokenizer: Annotated[Path, typer.Option(help="Use this tokenizer.json instead of learning one.")] = None,
    algorithm: Annotated[Literal["bpe", "char"], typer.Option(help="Byte-level BPE, or single characters.")] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="bpe: all ids, with the special tokens; 1024 to 256000.")] = 4096,
    pattern: Annotated[Literal["gpt2", "gpt4"], typer.Option(help="bpe: how text is split before it merges.")] = "gpt4",
    val_fraction: Annotated[float, typer.Option(help="Share of the bytes kept for validation, 0 to 1.")] = 0.02,
    seed: Annotated[int, typer.Option(help="Another seed gives another split and order of documents.")] = 0,
    field: Annotated[str, typer.Option(help="Field of a .jsonl line that holds the text.")] = "text",
    baselines: Annotated[bool, typer.Option(help="Measure what xz -9e needs for the validation text.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print meta.json, less its files, as one line.")] = False,
) -> None:
    """Turn text into a data folder: train.bin, val.bin, tokenizer.json, meta.json."""
    # 1. what can be wrong, before any work
    check_vocab_size(algorithm, vocab_size)
    if not 0 < val_fraction < 1:
        raise UserError(f"--val-fraction {val_fraction} is not between 0 and 1")
    tok = Tokenizer.load(tokenizer) if tokenizer else None
    if tok and tok.eot_id is None:
        raise UserError(f"{tokenizer} has no {SPECIAL[0]}, which has to end every document")
    files = find_files(inputs) if inputs else find_python()
    output = output or Path("data") / (files[0][0] if inputs else "python")
    with NewFolder(output, overwrite) as folder:
        # 2. documents
        documents, dropped, listing = read_documents(files, field)
        splits = split_documents(documents, val_fraction, seed)
        with Baselines(**splits) if baselines else nullcontext() as xz:
            # 3. the tokenizer: merges from train alone; characters from all, or val might have one without an id
            if not tok:
                parts = documents if algorithm == "char" else splits["train"]
                tok = train_tokenizer([d.text for d in parts], algorithm, vocab_size, pattern)
            tok.save(folder)
            # 4. the ids
            dtype = "uint16" if tok.n_vocab <= 2**16 else "uint32"
            counts = {s: write_tokens(folder / f"{s}.bin", tok, docs, dtype) for s, docs in splits.items()}
            # 5. the account of it
            keys = ("documents", "tokens", "bytes")
            meta = {"dtype": dtype, "vocab_size": tok.n_vocab, "eot_id": tok.eot_id}
            meta["splits"] = {s: {k: sum(c[k] for c in counts[s].values()) for k in keys} for s in counts}
            sources = dict.fromkeys(source for source, *_ in files)
            none = dict.fromkeys(keys, 0)
            meta["sources"] = {name: {s: counts[s].get(name, none) for s in counts} for name in sources}
            meta["filters"] = dropped
            chosen = {"tokenizer": tokenizer} if tokenizer else {"algorithm": algorithm}
            chosen |= {"vocab-size": vocab_size, "pattern": pattern} if not tokenizer and algorithm == "bpe" else {}
            chosen |= {"val-fraction": val_fraction, "seed": seed, "field": field}
            meta["command"] = command_line(inputs or [], chosen)
            meta["baselines"] = xz.result() if xz else {}
        meta["files_sha256"] = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
        files_too = {**meta, "files": listing if len(listing) <= 10_000 else []}
        write_whole(folder / "meta.json", json.dumps(files_too, indent=1) + "\n")
    show_meta(output, meta)
    if as_json:
        print(json.dumps({"output": str(output), **meta}))


def command_line(inputs: list[str], options: dict) -> str:
    """The command to write down; of an absolute path only the name, as it means nothing on another machine."""
    words = ["python", "tokenize.py", "prepare", *inputs]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    return shlex.join(Path(w).name if Path(w).is_absolute() else w for w in words)


def show_meta(output: Path, meta: dict) -> None:
    """The tables at the end of `prepare`."""

    def row(name: str, train: dict, val: dict) -> list:
        documents, size = (train[key] + val[key] for key in ("documents", "bytes"))
        return [name, documents, size, train["tokens"], val["tokens"]]

    rows = [row(name, **splits) for name, splits in {**meta["sources"], "all": meta["splits"]}.items()]
    columns = ["source", "documents", "bytes", "train tokens", "val tokens"]
    show_table(f"{output}: {meta['vocab_size']} ids", columns, rows)
    rows = [[name, *n.values()] for name, n in meta["filters"].items()]
    show_table("Dropped", ["filter", "documents", "bytes"], rows)
    val = meta["splits"]["val"]
    rows = [["bytes per token", f"{val['bytes'] / val['tokens']:.3f}"]]
    rows += [[name, f"{n:.4f}"] for name, n in meta["baselines"].items() if name.endswith("bpb")]
    show_table("Validation text", ["measure", "value"], rows)


def check_vocab_size(algorithm: str, vocab_size: int) -> None:
    """Room for the bytes, the special tokens and a merge at least."""
    least = 256 + len(SPECIAL) + 1
    if algorithm == "bpe" and vocab_size < least:
        raise UserError(f"--vocab-size {vocab_size} is too small: bytes, special tokens and one merge take {least}")


def main() -> None:
    """The commands, with errors as one sentence."""
    app = typer.Typer(help="Text to tokens, and text to a data folder.", add_completion=False, no_args_is_help=True,
                      pretty_exceptions_enable=False, rich_markup_mode=None)  # fmt: skip
    for command in (train, encode, decode, prepare):
        app.command()(command)
    try:
        app()
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except OSError as e:  # no such folder, no permission, disk full
        print(f"error: {e.filename or 'the output could not be written'}: {e.strerror or e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
