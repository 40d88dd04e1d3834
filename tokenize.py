"""Turn text into tokens, and documents into a data folder.

A tokenizer is learned from text and kept in one file, Hugging Face's tokenizer.json. Five ways to learn one:

- BPE joins the most frequent pair of neighbours into a new token, again and again, beginning with the 256
  bytes (`bpe`) or with characters, the space one of them (`spm-bpe`). `train_plain` is the method as it is
  told; `train_bpe` learns the same merges faster, because a merge visits only its places (`Row`).
- WordPiece joins the pair that makes the text likeliest, and cuts a word greedily (`wordpiece`).
- Unigram begins with many pieces and drops those that the text misses least (`train_unigram`, `Lattice`); of
  all ways to cut a text it takes the likeliest (`viterbi`), or draws one.
- characters (`char`) and bytes (`byte`) as they are: what the others are measured against.

A tokenizer also spells conversations, by the template of its folder (`Tokenizer.render`). `prepare` cleans
documents by filters with names, drops duplicates, near ones by MinHash (`sign`, `find_pairs`), splits, and
writes one long row of ids, without ever holding the text. `report` lays tokenizers side by side.
Left out: WordLevel, SentencePiece's own .model files (transformers converts them), texts from the web.

    python tokenize.py prepare                          # the Python that is installed here -> data/python
    python tokenize.py prepare shakespeare.txt --output data/shakespeare --algorithm char
    python tokenize.py train --input shakespeare.txt --vocab-size 1024 --output tokenizer.json
    python tokenize.py encode --tokenizer tokenizer.json "lower lowest"
    python tokenize.py decode --tokenizer tokenizer.json "[75, 78, 86]"
    python tokenize.py report tokenizer.json            # languages, the chapter's examples

BPE: Sennrich et al. 2016 (1508.07909); on bytes: Radford et al. 2019 (GPT-2). WordPiece: Schuster, Nakajima
2012. Unigram, subword regularization: Kudo 2018 (1804.10959). SentencePiece: Kudo, Richardson 2018
(1808.06226). MinHash: Broder 1997.
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
    import base64
    import contextlib
    import functools
    import gc
    import gzip
    import hashlib
    import heapq
    import importlib.metadata
    import importlib.util
    import json
    import math
    import multiprocessing
    import os
    import random
    import re
    import shlex
    import shutil
    import signal
    import subprocess
    import sys
    import sysconfig
    import tempfile
    import time
    import unicodedata
    import zlib
    from array import array
    from collections import Counter, defaultdict, deque
    from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
    from functools import partial
    from itertools import accumulate, chain, compress, groupby, islice, pairwise
    from pathlib import Path
    from typing import Annotated, Literal

    import numpy as np
    import regex
    import tiktoken
    import typer

    Algorithm = Literal["bpe", "wordpiece", "spm-bpe", "unigram", "char", "byte"]
    Normalizer = Literal["nfkc", "cased", "uncased"]
    Chat = Literal["chatml", "llama2", "mistral", "llama3", "gemma", "phi3"]

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
    # SentencePiece's words: spaces and what follows them, letters or other signs
    "words": r" *[\p{L}\p{M}]+| *[^ \p{L}\p{M}]+| +",
}
PATTERNS["cl100k"] = PATTERNS["gpt4"].replace(r"|\s*[\r\n]+", r"|\s+(?![\s\S])|\s*[\r\n]+")
PATTERNS["qwen"] = PATTERNS["gpt4"].replace("{1,3}", "")
# A .tiktoken file holds neither its pattern nor its special tokens: both are looked up by its name.
RANK_FILES = {
    "gpt2": ("gpt2", {"<|endoftext|>": 50256}),
    "r50k_base": ("gpt2", {"<|endoftext|>": 50256}),
    "cl100k_base": ("cl100k", {"<|100256|>": 100256, "<|endoftext|>": 100257, "<|fim_prefix|>": 100258,
                               "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260}),
    "qwen": ("qwen", {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}),
}
# Our own tokenizer files begin as this.
SKELETON = """{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
"pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"}, "model": {}}"""
FLAGS = '{"single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}'
BYTE_LEVEL = '{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}'
NEVER = "(?!)"  # a pattern that nothing matches
GAP = -1  # stands between two words, where no pair is counted
START, AFTER_TOKEN, INSIDE = range(3)  # where a text begins: some tokenizers write a space before it
SPACE = "\u2581"  # the sign that SentencePiece writes for a space
MAX_PIECE_CHARS = 16  # characters of a piece of Unigram
MAX_WORD_CHARS = 48  # characters: longer words are cut, for learning only
SEED_FACTOR = 20  # Unigram begins with so many times the pieces that are asked for
CHAR_SCALE = 20.0  # a character's usual price, taken out of Unigram's products
LOGP_STEP = 2.0**-20  # of its log probabilities
RARE_PIECE = -1000.0  # the log p of tokens that no text is to be cut into
CHINESE = r"[\u4e00-\u9fff\u3400-\u4dbf\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f" \
    r"\U0002b920-\U0002ceaf\uf900-\ufaff\U0002f800-\U0002fa1f]"
# The embedded default reads the standard library and these packages, which requirements.txt installs.
PACKAGES = "torch numpy tiktoken regex typer rich pytest safetensors"
# It skips what is hidden or outside (".."), folders of these names, and tests.
SKIPPED = r"(^|/)(\.|(test|tests|testing|idlelib|site-packages|dist-packages|__pycache__)/"
SKIPPED += r"|test_[^/]*$|[^/]*_test\.py$|conftest\.py$)"
# Which algorithms an option is for; the normalizers of an algorithm.
LEARNED_ON_WORDS = {"wordpiece": ("cased", "uncased"), "spm-bpe": ("nfkc",), "unigram": ("nfkc",)}
OPTION_ALGORITHMS = {
    "vocab_size": ("bpe", *LEARNED_ON_WORDS),
    "pattern": ("bpe",),
    "normalizer": (*LEARNED_ON_WORDS,),
    "coverage": (*LEARNED_ON_WORDS,),
}
SETTINGS = "tokenizer_config.json"  # what a tokenizer.json does not hold, where there is such
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

# ---- Merges: byte pair encoding, and WordPiece -------------------------------------------------------------

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

def count_units(rows) -> Counter:
    """Count the units of (word, how often it occurs).

    >>> count_units([("aab", 2)])
    Counter({'a': 4, 'b': 2})
    """
    counts = Counter()
    for word, n in rows:
        for unit in word:
            counts[unit] += n
    return counts

def train_plain(words: dict, n_merges: int, n_units: int, wordpiece: bool = False) -> list:
    """Learn merges as the method is told: count all pairs, join the best, repeat.

    words: a word's ids, all below n_units -> how often it occurs. BPE joins the most frequent pair; WordPiece
    the pair with the largest count(ab) / (count(a) count(b)), which gains most likelihood. Alone that finds
    letters that are rare and always together, so a pair has to be frequent, too: `least` times, a bound that
    is halved when no pair reaches it. Of equal pairs the smallest ids win.

    >>> train_plain({(0, 0, 1): 1, (0, 1): 2}, 2, n_units=2)  # "ab" (3 times), then "a" + "ab"
    [(0, 1), (0, 2)]
    """
    rows = [(list(word), n) for word, n in words.items()]
    merges = []
    least = first_bound(words, n_units + n_merges)
    while len(merges) < n_merges:
        new = n_units + len(merges)
        counts = {}
        for ids, n in rows:
            get_pairs(ids, counts, n)
        if wordpiece:
            tokens = count_units(rows)
            counts = {(a, b): n / (tokens[a] * tokens[b]) for (a, b), n in counts.items() if n >= least}
        if not counts and wordpiece and least > 1:
            least //= 2
            continue
        if not counts:
            break
        pair = min(counts, key=lambda p: (-counts[p], p))
        rows = [(merge(ids, pair, new), n) for ids, n in rows]
        merges.append(pair)
    return merges

def first_bound(words: dict, size: int) -> int:
    """Say how often WordPiece's first pairs have to occur: as often as a token of `size` does on average."""
    return max(1, sum(words.values()) // size)

class Row:
    """Hold all words in one row of cells, a gap after each: a merge visits only the places of its pair.

    A token is written at its ends: head[first cell] and tail[last cell] hold its id, so its neighbours are
    one step away. For "lower" with "lo" joined:

        cell   0   1   2   3   4   5   6
        head   .  lo   .   w   e   r   .
        tail   .   .  lo   w   e   r   .
    """

    def __init__(self, words: dict, n_units: int):
        head = [GAP]
        weight = [0]  # how often the word of a cell occurs
        self.counts = counts = defaultdict(int)
        self.where = where = defaultdict(list)  # pair -> its first cells, some swallowed since by a merge
        for ids, n in words.items():
            for cell, pair in enumerate(pairwise(ids), len(head)):
                counts[pair] += n
                where[pair].append(cell)
            head += [*ids, GAP]
            weight += [n] * (len(ids) + 1)
        self.head, self.weight = head, weight
        self.tail = head.copy()
        self.width = [1] * n_units  # id -> number of cells

    def join(self, a: int, b: int) -> tuple[list, int]:
        """Make the next id of this pair -> the pairs that it stands in now, how often it was joined."""
        head, tail, weight, width, counts = self.head, self.tail, self.weight, self.width, self.counts
        new = len(width)
        width.append(width[a] + width[b])
        new_places = defaultdict(list)
        joined = 0
        for first in self.where.pop((a, b)):
            second = first + width[a]
            if head[first] != a or head[second] != b:
                continue
            n = weight[first]
            joined += n
            end = first + width[new]
            left = tail[first - 1]
            right = head[end]
            head[second] = tail[second - 1] = GAP
            head[first] = tail[end - 1] = new
            if left != GAP:
                counts[left, a] -= n
                counts[left, new] += n
                new_places[left, new].append(first - width[left])
            if right != GAP:
                counts[b, right] -= n
                counts[new, right] += n
                new_places[new, right].append(first)
        counts[a, b] -= joined
        self.where.update(new_places)
        return list(new_places), joined

def train_bpe(words: dict, n_merges: int, n_units: int = 256, watch=iter) -> tuple[list, int]:
    """Learn the merges of `train_plain`, fast -> (merges, how many tokens they make of the words).

    watch: wraps the loop, for progress.

    >>> train_bpe({(0, 0, 1): 1, (0, 1): 2}, 2, n_units=2)
    ([(0, 1), (0, 2)], 3)
    """
    row = Row(words, n_units)
    counts = row.counts
    queue = [(-n, pair) for pair, n in counts.items()]  # a heap: most frequent first, then the smallest ids
    heapq.heapify(queue)
    merges = []
    for _ in watch(range(n_merges)):
        while queue and counts[queue[0][1]] < -queue[0][0]:  # the count fell since this entry was made
            pair = queue[0][1]
            heapq.heapreplace(queue, (-counts[pair], pair))
        if not queue or queue[0][0] == 0:
            break
        a, b = heapq.heappop(queue)[1]
        merges.append((a, b))
        for pair in row.join(a, b)[0]:
            heapq.heappush(queue, (-counts[pair], pair))
    n_tokens = sum(n for i, n in zip(row.head, row.weight, strict=True) if i != GAP)
    return merges, n_tokens

def train_wordpiece(words: dict, n_merges: int, n_units: int, watch=iter) -> list:
    """Learn the merges of `train_plain(..., wordpiece=True)`, fast.

    A pair's score changes with its parts, too: then it goes into the heap once more, and what is there with
    an old score is passed over."""
    row = Row(words, n_units)
    tokens = count_units(words.items())
    around = defaultdict(set)  # id -> its pairs
    least = first_bound(words, n_units + n_merges)
    queue = []  # a heap: the best score first, then the smallest ids
    merges = []

    def score(pair: tuple) -> float:
        n = row.counts[pair]
        return n / (tokens[pair[0]] * tokens[pair[1]]) if n >= least else 0

    fresh = list(row.counts)
    changed = set()
    for new in watch(range(n_units, n_units + n_merges)):
        for pair in fresh:
            for i in pair:
                around[i].add(pair)
        for pair in changed.union(fresh):
            if row.counts[pair] >= least:
                heapq.heappush(queue, (-score(pair), pair))
        while True:
            while queue and -queue[0][0] != score(queue[0][1]):
                heapq.heappop(queue)
            if queue or least == 1:
                break
            least //= 2
            queue = [(-score(pair), pair) for pair, n in row.counts.items() if n >= least]
            heapq.heapify(queue)
        if not queue:
            break
        a, b = heapq.heappop(queue)[1]
        merges.append((a, b))
        fresh, tokens[new] = row.join(a, b)
        tokens[a] -= tokens[new]
        tokens[b] -= tokens[new]
        changed = around[a] | around[b]
        gone = {pair for pair in changed if row.counts[pair] == 0}
        around[a] -= gone
        around[b] -= gone
    return merges

# ---- Unigram -----------------------------------------------------------------------------------------------

class Lattice:
    """Hold all the ways to cut words into pieces: an edge for each place of each piece (1808.06226).

    The words stand in one row, a gap after each. An edge leads from the place of a piece's first character to
    the place after its last. All edges that end at one distance from the beginnings of their words are a
    level, and are taken at once: a pass has as many steps as the longest word has characters."""

    def __init__(self, words: list[str], weights):
        self.words = words
        self.weights = np.array(weights, dtype=float)
        lengths = np.array([*map(len, words)])
        self.ends = np.cumsum(lengths + 1) - 1
        self.begins = self.ends - lengths
        self.word = np.repeat(np.arange(len(words)), lengths + 1)  # of each place

    def find_pieces(self, longest: int, n_pieces: int) -> list[str]:
        """List all characters, then the substrings with the most occurrences times length; make the edges.

        Substrings of length k are those of length k - 1 and one character more: a number for each, at each
        place, by one sort a length. What occurs once cannot occur twice when it is longer."""
        text = "".join(f"{word}\0" for word in self.words)
        codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        weights = self.weights[self.word]
        places = np.arange(len(text))
        left = self.ends[self.word] - places
        number = np.zeros(len(text), dtype=np.int64)
        pieces = []  # for each length: where each piece first stands, its length, its score
        edges = []  # ... places, places after the end, numbers of the pieces
        n_found = 0
        for k in range(1, longest + 1):
            fits = left[places] >= k
            places, number = places[fits], number[fits]
            key = number << 21 | codes[places + k - 1]
            _, first, number = np.unique(key, return_index=True, return_inverse=True)
            counts = np.bincount(number, weights[places])
            kept = (counts >= 2) | (k == 1)
            pieces.append((places[first[kept]], np.full(kept.sum(), k), counts[kept] * k))
            fits = kept[number]
            places, number = places[fits], (np.cumsum(kept) - 1)[number[fits]]
            edges.append((places, places + k, number + n_found))
            n_found += kept.sum()
        first, length, score = map(np.concatenate, zip(*pieces, strict=True))
        longer = np.sort(score[length > 1])
        limit = longer[-n_pieces - 1] if len(longer) > n_pieces else 0
        kept = (score > limit) | (length == 1)
        self.edges = [np.concatenate(column, dtype=np.int32) for column in zip(*edges, strict=True)]
        self.keep(kept)
        return [text[i : i + k] for i, k in zip(first[kept].tolist(), length[kept].tolist(), strict=True)]

    def keep(self, kept) -> None:
        """Drop the edges of pieces that are gone, number the rest anew, and put them in order."""
        fits = kept[self.edges[2]]
        source, target, piece = (column[fits] for column in self.edges)
        level = target - self.begins[self.word[target]]
        order = np.argsort(level, kind="stable")
        piece = np.cumsum(kept, dtype=np.int32)[piece] - 1
        self.edges = [column[order] for column in (source, target, piece)]
        bounds = np.searchsorted(level[order], np.arange(1, level.max() + 2))
        self.levels = [slice(*pair) for pair in pairwise(bounds)]

    def expect(self, p):
        """Compute how often each piece is expected, by forward and backward sums -> (counts, each word's p).

        A probability is multiplied by CHAR_SCALE for each character, so that no product of many underflows.
        """
        source, target, piece = self.edges
        weight = p[piece] * CHAR_SCALE ** (target - source).astype(float)
        forward, backward = np.zeros((2, len(self.word)))
        forward[self.begins] = 1
        for at in self.levels:
            np.add.at(forward, target[at], forward[source[at]] * weight[at])
        whole = forward[self.ends]
        backward[self.ends] = self.weights / whole
        for at in reversed(self.levels):
            np.add.at(backward, source[at], backward[target[at]] * weight[at])
        return np.bincount(piece, forward[source] * weight * backward[target], len(p)), whole

def train_unigram(words: dict, size: int, watch=iter) -> dict:
    """Learn pieces and their log probabilities (1804.10959): begin with many, fit them by EM, drop those
    that the text misses least, until `size` are left -> {piece: log p}. All characters stay.

    The text of each piece stands in the lattice beside the words, with weight zero: without the piece it
    would be cut otherwise, with probability p(text) - p(piece), and that is what its loss is measured by."""
    seeds = Lattice([*words], [*words.values()]).find_pieces(MAX_PIECE_CHARS, SEED_FACTOR * size)
    n_chars = sum(len(piece) == 1 for piece in seeds)
    size = min(max(size, n_chars), len(seeds))
    lattice = Lattice([*words, *seeds], [*words.values(), *[0] * len(seeds)])
    pieces = lattice.find_pieces(MAX_PIECE_CHARS, SEED_FACTOR * size)
    own = {piece: row for row, piece in enumerate(seeds, len(words))}
    p = np.ones(len(pieces)) / len(pieces)
    rounds = math.ceil(math.log(len(pieces) / size) / -math.log(0.75)) + 1
    for _ in watch(range(rounds)):
        for _ in range(2):
            counts, whole = lattice.expect(p)
            p = np.maximum(counts - 0.5, 1e-3)  # SentencePiece's estimate: n - 1/2 is near exp(digamma(n))
            p = p / p.sum()
        if len(pieces) == size:
            break
        counts, whole = lattice.expect(p)
        rows = [own[piece] for piece in pieces]
        lengths = np.array([*map(len, pieces)], dtype=float)
        share = whole[rows] / CHAR_SCALE**lengths
        loss = counts * (np.log(p) - np.log(np.maximum(share - p, 1e-300)))
        loss[lengths == 1] = np.inf
        left = max(int(0.75 * len(pieces)), size)
        kept = np.zeros(len(pieces), dtype=bool)
        kept[np.argsort(-loss, kind="stable")[:left]] = True
        pieces = [*compress(pieces, kept)]
        lattice.keep(kept)
        p = p[kept] / p[kept].sum()
    # in steps of 2^-20, sums are exact: ties are ties, whether a text is cut whole or word by word
    costs = np.round(-np.log(p) / LOGP_STEP) * LOGP_STEP
    ranked = sorted(zip(costs.tolist(), pieces, strict=True))
    return {piece: -cost for cost, piece in ranked}

def viterbi(text: str, logp: dict, longest: int, unknown: float) -> list[str]:
    """Cut a text into the pieces whose log p add up to most; of equal ways the one with the longest last.

    A character that is no piece costs `unknown`."""
    best = [0.0] + [-math.inf] * len(text)
    came = [0] * (len(text) + 1)
    for i in range(len(text)):
        for j in range(i + 1, min(i + longest, len(text)) + 1):
            score = logp.get(text[i:j], unknown if j == i + 1 else None)
            if score is not None and best[i] + score > best[j]:
                best[j] = best[i] + score
                came[j] = i
    pieces = []
    end = len(text)
    while end:
        pieces.append(text[came[end] : end])
        end = came[end]
    return pieces[::-1]

def n_best(text: str, logp: dict, longest: int, unknown: float, n: int) -> list[tuple[float, list[str]]]:
    """List the n likeliest ways to cut a text, (log p, pieces), the best first."""
    ways = [[(0.0, [])]]
    for j in range(1, len(text) + 1):
        found = []
        for i in range(max(0, j - longest), j):
            score = logp.get(text[i:j], unknown if j == i + 1 else None)
            if score is not None:
                found += [(total + score, [*pieces, text[i:j]]) for total, pieces in ways[i]]
        ways.append(sorted(found, reverse=True)[:n])
    return ways[-1]

def sample_pieces(text: str, logp: dict, longest: int, unknown: float, alpha: float, rng) -> list[str]:
    """Draw a way to cut a text, with p(way)^alpha (subword regularization, 1804.10959): sums go forward,
    draws backward. alpha 0: all ways alike; large: the best."""
    total = [0.0]
    steps = [[]]
    for j in range(1, len(text) + 1):
        found = []
        for i in range(max(0, j - longest), j):
            score = logp.get(text[i:j], unknown if j == i + 1 else None)
            if score is not None:
                found.append((i, total[i] + alpha * score))
        steps.append(found)
        top = max(score for _, score in found)
        total.append(top + math.log(sum(math.exp(score - top) for _, score in found)))
    pieces = []
    j = len(text)
    while j:
        starts, scores = zip(*steps[j], strict=True)
        i = rng.choices(starts, [math.exp(score - total[j]) for score in scores])[0]
        pieces.append(text[i:j])
        j = i
    return pieces[::-1]

# ---- Text before it is cut into tokens ---------------------------------------------------------------------

def strip_accents(text: str) -> str:
    return "".join(c for c in text if unicodedata.category(c)[0] != "M")

def bert_normalizer(step: dict):
    """Clean a text as BERT does: no control characters, spaces around Chinese ones, plain small letters."""

    clean, chinese, small = (step[name] for name in ("clean_text", "handle_chinese_chars", "lowercase"))
    bare = small if step["strip_accents"] is None else step["strip_accents"]

    def normalize(text: str) -> str:
        if clean:
            gone = ("Cc", "Cf", "Co")
            kept = (c for c in text if c in "\t\n\r" or c != "\ufffd" and unicodedata.category(c) not in gone)
            text = re.sub(r"\s", " ", "".join(kept))
        if chinese:
            text = re.sub(CHINESE, r" \g<0> ", text)
        if bare:
            text = "".join(c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
        return lower(text) if small else text

    return normalize

def lower(text: str) -> str:
    """Make small letters, each by itself: Python's own `lower` also looks at a letter's neighbours."""
    return text.lower() if text.isascii() else "".join(map(str.lower, text))

def prepend(before: str, text: str) -> str:
    return before + text if text else text

def pattern_of(step: dict) -> str:
    return step["pattern"]["Regex"] if "Regex" in step["pattern"] else regex.escape(step["pattern"]["String"])

def replace(step: dict):
    content = step["content"]
    return partial(regex.compile(pattern_of(step)).sub, lambda match: content)

def strip(step: dict):
    ends = [r"^\s+"] * step["strip_left"] + [r"\s+$"] * step["strip_right"]
    return partial(regex.compile("|".join(ends) or NEVER).sub, "")

def precompiled(step: dict):
    """Map characters as SentencePiece's table says: a trie of bytes in a double array (darts-clone), whose
    leaves point into a string of texts that end with a zero."""
    data = base64.b64decode(step["precompiled_charsmap"])
    size = int.from_bytes(data[:4], "little")
    units = np.frombuffer(data[4 : 4 + size], dtype="<u4").tolist()
    texts = data[4 + size :]

    def jump(unit: int) -> int:
        return (unit >> 10) << ((unit & 1 << 9) >> 6)

    @functools.lru_cache(2**16)
    def transform(part: str) -> str | None:
        place = jump(units[0])
        for byte in part.encode():
            place ^= byte
            unit = units[place]
            if byte == 0 or unit & (1 << 31 | 255) != byte:
                return None
            place ^= jump(unit)
            if unit >> 8 & 1:
                start = units[place] & ~(1 << 31)
                return texts[start : texts.index(b"\0", start)].decode()
        return None

    def normalize(text: str) -> str:
        out = []
        for cluster in regex.findall(r"\X", text):
            whole = len(cluster.encode()) < 6 and transform(cluster) is not None
            for part in [cluster] if whole else cluster:
                found = transform(part)
                out.append(part if found is None else found)
        return "".join(out)

    return normalize

NORMALIZERS = {
    **dict.fromkeys(("NFC", "NFD", "NFKC", "NFKD"), lambda s: partial(unicodedata.normalize, s["type"])),
    "Lowercase": lambda step: lower,
    "StripAccents": lambda step: strip_accents,
    "Prepend": lambda step: partial(prepend, step["prepend"] if step["place"] < INSIDE else ""),
    "Replace": replace,
    "Strip": strip,
    "Precompiled": precompiled,
    "BertNormalizer": bert_normalizer,
}

def cut_out(text: str, matches, label) -> list[tuple]:
    """Cut a text into what was found, with its label, and what lies between, with None; nothing is empty."""
    parts = []
    end = 0
    for match in matches:
        start, stop = match.span()
        if stop > start:
            parts += [(text[end:start], None), (text[start:stop], label(match))]
            end = stop
    return [part for part in (*parts, (text[end:], None)) if part[0]]

# Does a part join the one before? Each of the two was found by the pattern, or lies between.
BEHAVIORS = {
    "Isolated": None,
    "Removed": None,
    "MergedWithPrevious": lambda before, found: found and not before,
    "MergedWithNext": lambda before, found: before and not found,
    "Contiguous": lambda before, found: before == found,
}

def split_at(pattern: str, behavior: str = "Isolated", invert: bool = False):
    """Cut texts at each place where a pattern is found; behavior: what becomes of what it found."""
    find = regex.compile(pattern, regex.MULTILINE).finditer
    joins = BEHAVIORS[behavior]

    def cut(text: str) -> list[str]:
        pieces = []
        before = None
        for part, found in cut_out(text, find(text), bool):
            found = bool(found) != invert
            if joins and pieces and joins(before, found):
                pieces[-1] += part
            elif behavior != "Removed" or not found:
                pieces.append(part)
            before = found
        return pieces

    return cut

def metaspace(step: dict):
    """Write spaces as a visible sign, one before the text too, and cut before each."""
    sign = step["replacement"]
    scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    before = step["place"] < {"always": INSIDE, "first": AFTER_TOKEN, "never": START}[scheme]
    cut = split_at(re.escape(sign), "MergedWithNext") if step.get("split", True) else lambda text: [text]

    def split(text: str) -> list[str]:
        text = text.replace(" ", sign)
        return cut(sign + text if before and not text.startswith(sign) else text)

    return split

def byte_level(step: dict):
    """Cut as GPT-2 does, unless an earlier step has; the bytes are the model's affair."""
    cut = split_at(PATTERNS["gpt2"]) if step.get("use_regex", True) else lambda text: [text]
    before = step.get("add_prefix_space", True)
    return lambda text: cut(" " + text if before and not text.startswith(" ") else text)

def is_odd(pattern: str) -> bool:
    """Tell whether a pattern can find nothing, or repeats a repetition: libraries differ there."""
    found = regex.finditer(pattern, "a1 \n.\r\n  'é")
    return any(m.start() == m.end() for m in found) or bool(re.search(r"\{[\d,]*\}\+", pattern))

def split_step(step: dict):
    pattern = pattern_of(step)
    odd = "is not supported: it matches nothing, or repeats a repetition"
    check(not is_odd(pattern), f"the pattern {pattern!r} {odd}")
    return split_at(pattern, step["behavior"], step.get("invert", False))

PUNCTUATION = r"[!-/:-@\[-`{-~\p{P}]"
PRE_TOKENIZERS = {
    "Split": split_step,
    "ByteLevel": byte_level,
    "Metaspace": metaspace,
    "Digits": lambda step: split_at(r"\p{N}", "Isolated" if step["individual_digits"] else "Contiguous"),
    "Punctuation": lambda step: split_at(PUNCTUATION, step.get("behavior", "Isolated")),
    "Whitespace": lambda step: split_at(r"\w+|[^\w\s]+", "Removed", invert=True),
    "WhitespaceSplit": lambda step: split_at(r"\s", "Removed"),
    "BertPreTokenizer": lambda step: compose([split_at(r"\s", "Removed"), split_at(PUNCTUATION)]),
}

def compose(cuts: list):
    """Make one function of several that cut, one after the other."""

    def cut(text: str) -> list[str]:
        pieces = [text] if text else []
        for step in cuts:
            pieces = [part for piece in pieces for part in step(piece)]
        return pieces

    return cut

# ---- The tokenizer's file ----------------------------------------------------------------------------------

def describe_tokenizer(model: dict, special: tuple = SPECIAL, **parts) -> dict:
    """Describe a tokenizer as a tokenizer.json: its model, the special tokens after it, other parts."""
    spec = json.loads(SKELETON) | parts
    spec["model"] = model
    known = vocabulary(model)
    for name in special:
        check(name not in known, f"the special token {name!r} is an ordinary token here: choose another")
        known[name] = len(known)
        spec["added_tokens"].append({"id": known[name], "content": name, **json.loads(FLAGS)})
    return spec

def bpe_file(merges: list, pattern: str, special: tuple = SPECIAL) -> dict:
    """Describe byte-level BPE: bytes, merges, special tokens."""
    split = {"type": "Split", "pattern": {"Regex": PATTERNS[pattern]}, "behavior": "Isolated"}
    split["invert"] = False
    level = json.loads(BYTE_LEVEL)
    steps = {"type": "Sequence", "pretokenizers": [split, level]}
    return describe_tokenizer(bpe_model(CHAR.values(), merges), special, pre_tokenizer=steps, decoder=level)

def bpe_model(alphabet, merges: list, before=(), **options) -> dict:
    """Describe BPE: tokens that no merge makes, the alphabet, what each merge makes of two of these."""
    names = list(alphabet)
    pairs = []
    for a, b in merges:
        pairs.append([names[a], names[b]])
        names.append(names[a] + names[b])
    vocab = {name: i for i, name in enumerate([*before, *names])}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    return model | options | {"vocab": vocab, "merges": pairs}

def char_file(names: list[str], special: tuple = SPECIAL) -> dict:
    """Describe a tokenizer with one id a character: BPE that merges nothing."""
    return describe_tokenizer(bpe_model(names, []), special)

def sentencepiece_file(model: dict, special: tuple, nfkc: bool) -> dict:
    """Describe a tokenizer that writes a space as a sign, one before the text, and unknown bytes by name."""
    steps = [{"type": "NFKC"}] * nfkc
    steps += [{"type": "Prepend", "prepend": SPACE}]
    steps += [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
    normalizer = {"type": "Sequence", "normalizers": steps}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    ends = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    decoder = {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, ends]}
    return describe_tokenizer(model, special, normalizer=normalizer, decoder=decoder)

def wordpiece_file(names: list[str], special: tuple, lowercase: bool) -> dict:
    """Describe WordPiece with BERT's normalizer and pre-tokenizer."""
    model = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
             "max_input_chars_per_word": 100, "vocab": {name: i for i, name in enumerate(names)}}
    normalizer = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                  "strip_accents": None, "lowercase": lowercase}
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": False}
    return describe_tokenizer(model, special, normalizer=normalizer, decoder=decoder,
                              pre_tokenizer={"type": "BertPreTokenizer"})

def read_ranks(path: Path) -> dict:
    """Describe a .tiktoken file, tokens with their ranks, as a tokenizer.json. Pattern and special tokens,
    which the file does not hold, are known by its name."""
    pattern, end = RANK_FILES.get(path.stem, (None, None))
    check(pattern, f"{path.name} does not say which pattern cuts the text: known are {', '.join(RANK_FILES)}")
    names = {}
    for line in filter(None, path.read_bytes().splitlines()):
        token, rank = line.split()
        names["".join(map(CHAR.get, base64.b64decode(token)))] = int(rank)
    merges = []
    for name in sorted(names.keys() - CHAR.values(), key=names.get):
        merges.append(list(split_by_earlier_merges(name, names)))
        check(len(merges[-1]) == 2, f"no two tokens before it make {name!r}")
    spec = bpe_file([], pattern, ())
    spec["model"] |= {"vocab": names, "merges": merges}
    for token, i in end.items():
        spec["added_tokens"].append({"id": i, "content": token, **json.loads(FLAGS)})
    return spec

def vocabulary(model: dict) -> dict:
    """Read {token: id} of a file's model: Unigram has a list of (token, log p), the others a dictionary."""
    if model.get("type") == "Unigram":
        return {name: i for i, (name, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])

def read_ids(spec: dict) -> dict:
    """Read {token: id}; refuse, by name, what a tokenizer.json may not ask for, and ids that cannot be."""
    model = spec["model"]
    added = spec.get("added_tokens", [])
    refused = ["truncation", "padding", "dropout", "end_of_word_suffix"]
    refused += ["continuing_subword_prefix"] * (model.get("type") != "WordPiece")
    for option in refused:
        check(not (spec.get(option) or model.get(option)), f"the option {option} is not supported yet")
    ids = vocabulary(model)
    free = len(ids)
    for token in added:  # `tokenizers` gives it its id in the vocabulary, or the next that is free
        name = token["content"]
        expected = ids.setdefault(name, max(free, token["id"]))
        check(name and token["id"] == expected, f"the added token {name!r} has to have the id {expected}")
        free = max(free, expected + 1)
    for name, i in ids.items():
        check(type(i) is int and 0 <= i < 2**24, f"{i} cannot be the id of {name!r}")
    check(len(set(ids.values())) == len(ids), "two tokens have the same id")
    return ids

def steps_of(spec: dict, part: str, known) -> list:
    """List the steps of a part of the file: none, one, or a Sequence's; refuse by name those not known."""
    steps = []
    waiting = [spec.get(part) or {"type": "Sequence"}]
    while waiting:
        step = waiting.pop()
        if step["type"] == "Sequence":  # a list of steps, under a name of its own in each part of the file
            inner = chain.from_iterable(value for value in step.values() if isinstance(value, list))
            waiting += reversed(list(inner))
        else:
            check(step["type"] in known, f"the {part} {step} is not supported yet")
            steps.append(step)
    return steps

# ---- Words to ids, for each kind of model ------------------------------------------------------------------

# A codec reads a file -> {id: bytes} and a function from a piece of text to ids.

def bytes_codec(spec: dict):
    """Read BPE on bytes; tiktoken merges, and cuts where one pattern does."""
    vocab = spec["model"]["vocab"]
    names = read_merges(spec, list(CHAR.values()))
    ids = np.array([vocab[name] for name in names], dtype=np.uint32)
    tokens = {}
    for name, i in vocab.items():  # a token that is not spelled in bytes stands for itself
        tokens[i] = bytes(map(BYTE.get, name)) if set(name) <= BYTE.keys() else name.encode()
    ranks = {tokens[i]: rank for rank, i in enumerate(ids.tolist())}
    merge_text = tiktoken_merges(ranks, one_pattern(spec) or r"[\s\S]+")
    return tokens, lambda text: ids[merge_text(text)]

def tiktoken_merges(ranks: dict, pattern: str):
    """Make a function that gives the ranks of a text's tokens, as tiktoken merges them."""
    # one special token, which no text is allowed: without any, tiktoken looks for the empty string everywhere
    special = {"<|special|>": len(ranks)}
    encoding = tiktoken.Encoding("octavo", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)

    def merge_text(text: str) -> np.ndarray:
        try:
            return encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # the pattern's backtracking is limited
            raise UserError("a million spaces in a row are too many for tiktoken: cut the text") from None

    return merge_text

def chars_codec(spec: dict):
    """Read BPE on characters; tiktoken merges here too: first the bytes of each character, then as listed.

    A character without an id is written as the ids of its bytes, or as the unknown token."""
    model = spec["model"]
    vocab = model["vocab"]
    chars = [name for name in vocab if len(name) == 1]
    names = read_merges(spec, chars)
    ranks = {bytes([b]): b for b in range(256)}
    for c in chars:
        for end in range(2, len(c.encode()) + 1):
            ranks.setdefault(c.encode()[:end], len(ranks))
    for name in names[len(chars) :]:
        ranks.setdefault(name.encode(), len(ranks))
    parts = list(ranks)
    spelled = {name.encode(): vocab[name] for name in names}
    ids = np.array([spelled.get(part, -1) for part in parts])
    merge_text = tiktoken_merges(ranks, cut_pattern(names))

    def encode(text: str) -> np.ndarray:
        found = merge_text(text)
        unknown = ids[found] < 0
        if not unknown.any():
            return ids[found]
        out = []
        for run in np.split(found, np.flatnonzero(np.diff(unknown)) + 1):
            some = ids[run]
            if some[0] < 0:
                some = unknown_ids(b"".join(parts[rank] for rank in run).decode(), vocab, model)
            out.append(some)
        return np.concatenate(out)

    return tokens_of(model), encode

def tokens_of(model: dict) -> dict:
    """Spell the tokens of a model that writes spaces as a sign -> {id: bytes}."""
    byte = r"<0x([0-9A-F]{2})>" if model.get("byte_fallback") else NEVER
    tokens = {}
    for name, i in vocabulary(model).items():
        match = re.fullmatch(byte, name)
        tokens[i] = bytes.fromhex(match[1]) if match else name.encode()
    return tokens

def unknown_ids(text: str, vocab: dict, model: dict) -> list[int]:
    """Spell characters that have no id: by their bytes, or by the unknown token."""
    out = []
    for c in text:
        ids = [vocab.get(f"<0x{b:02X}>") for b in c.encode()] if model.get("byte_fallback") else [None]
        if None in ids:
            unknown = vocab.get(model.get("unk_token"))
            check(unknown is not None, f"the character {c!r} is not in the vocabulary of this tokenizer")
            ids = [] if out[-1:] == [unknown] and model.get("fuse_unk") else [unknown]
        out += ids
    return out

def cut_pattern(names: list[str]) -> str:
    """Find the finest pattern that cuts no token: words that are cut there can be encoded one by one."""
    if all(len(name) == 1 for name in names):
        return r"[\s\S]"
    for pattern in (PATTERNS["words"], r" *[^ ]+| +"):
        pattern = pattern.replace(" ", SPACE)
        find = regex.compile(pattern).findall
        if all(len(find(name)) == 1 for name in names):
            return pattern
    return r"[\s\S]+"

def wordpiece_codec(spec: dict):
    """Read WordPiece: of a word the longest piece that is a token, then of the rest, and so on."""
    model = spec["model"]
    vocab = model["vocab"]
    prefix = model["continuing_subword_prefix"]
    unknown = vocab[model["unk_token"]]
    longest = model["max_input_chars_per_word"]

    @functools.lru_cache(2**18)  # most words of a text come again
    def encode(word: str) -> list[int]:
        ids = []
        start = 0
        while start < len(word) <= longest:
            before = prefix if start else ""
            ends = range(len(word), start, -1)
            end = next((end for end in ends if before + word[start:end] in vocab), None)
            if end is None:
                return [unknown]
            ids.append(vocab[before + word[start:end]])
            start = end
        return ids or [unknown]

    tokens = {}
    for name, i in vocab.items():
        tokens[i] = name.removeprefix(prefix).encode() if name.startswith(prefix) else b" " + name.encode()
    return tokens, encode

class Unigram:
    """Read Unigram: the likeliest way to cut a piece, word by word where no token goes across."""

    def __init__(self, spec: dict):
        model = spec["model"]
        self.vocab = vocabulary(model)
        unknown = model.get("unk_id")
        special = {token["content"] for token in spec.get("added_tokens", [])}  # never out of ordinary text
        logp = {name: score for i, (name, score) in enumerate(model["vocab"]) if i != unknown}
        logp = {name: score for name, score in logp.items() if name not in special}
        self.costs = (logp, max(map(len, logp)), min(logp.values()) - 10)  # the last: of an unknown character
        name = None if unknown is None else model["vocab"][unknown][0]
        self.fallback = model | {"fuse_unk": True, "unk_token": name}
        exact = all(score % LOGP_STEP == 0 for score in logp.values())
        texts = {name: p for name, p in logp.items() if not re.fullmatch("<0x..>", name)}
        self.text_costs = (texts, *self.costs[1:])  # no way but the likeliest may take a byte's name for it
        self.find = regex.compile(cut_pattern(list(texts)) if exact else r"[\s\S]+").findall
        self.cut_word = lambda word: viterbi(word, *self.costs)
        if exact:  # (else a word is a whole text, which does not come again)
            self.cut_word = functools.lru_cache(2**18)(self.cut_word)

    def __call__(self, text: str) -> list[int]:
        return self.number(chain.from_iterable(map(self.cut_word, self.find(text))))

    def number(self, pieces) -> list[int]:
        """Give pieces their ids, and characters without one those of their bytes, or of the unknown token."""
        out = []
        for known, group in groupby(pieces, self.costs[0].__contains__):
            parts = list(group)
            if known:
                out += map(self.vocab.get, parts)
            else:
                out += unknown_ids("".join(parts), self.vocab, self.fallback)
        return out

def read_merges(spec: dict, alphabet: list[str]) -> list[str]:
    """List the alphabet and what the merges make of it, in the order of their ranks.

    A tokenizer.json ranks pairs, tiktoken ranks tokens. The ids are the same if each token, spelled in the
    alphabet and merged by those before it, ends as a pair that is listed for it."""
    vocab = spec["model"]["vocab"]
    pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in spec["model"]["merges"]]
    made = [name for name, _ in groupby(a + b for a, b in pairs)]  # several pairs may make one token
    names = [*alphabet, *made]
    lacks = [name for name in names if name not in vocab]
    check(not lacks, f"merges of what the vocabulary has not are not supported: it lacks {lacks[:1]}")
    rank = {name: i for i, name in enumerate(names)}
    parts = {}  # token -> the two that are left of it when all merges before its own are done
    for a, b in pairs:
        own = rank[a + b]
        known = rank.get(a, own) < own > rank.get(b, own)
        if known and a + b not in parts and stay_apart(a, b, own, rank, parts):
            parts[a + b] = (a, b)
    odd = [name for name in made if name not in parts]
    ordered = not odd and len(rank) == len(names)
    check(ordered, f"merges in an order of their own are not supported: see {odd[:1]}")
    added = {token["content"] for token in spec.get("added_tokens", [])}
    other = [name for name in vocab.keys() - rank.keys() - added if not re.fullmatch("<0x..>", name)]
    refused = other and spec["model"].get("ignore_merges")
    check(not refused, f"the option ignore_merges is not supported where no merge makes {other[:1]}")
    return names

def stay_apart(a: str, b: str, end: int, rank: dict, parts: dict) -> bool:
    """Tell whether the texts of two tokens, side by side, are just these two after the merges below `end`.

    Only what touches the border could join across it. So go back in time, and undo the later merge of the two
    that touch: what touched before it must not join before it either. Of equal merges the left one is first.
    """
    while True:
        if rank.get(a + b, end) < end:
            return False
        left, right = parts.get(a), parts.get(b)
        if left and (not right or rank[a] > rank[b]):
            end, a = rank[a], left[1]
        elif right:
            end, b = rank[b] + 1, right[0]
        else:
            return True

def split_by_earlier_merges(name: str, rank: dict) -> tuple:
    """Merge the letters of a token by all tokens before it -> the parts: two where all is well."""
    parts = list(name)
    own = rank[name]
    while len(parts) > 1:
        first, i = min((rank.get(a + b, own), i) for i, (a, b) in enumerate(pairwise(parts)))
        if first >= own:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(parts)

def one_pattern(spec: dict) -> str | None:
    """Find the one regular expression that a byte-level file's pre-tokenizer amounts to: tiktoken's way."""
    steps = steps_of(spec, "pre_tokenizer", PRE_TOKENIZERS)
    asked = []
    for step in steps:
        form = (step["type"], step.get("use_regex", True), step.get("add_prefix_space", False))
        asked.append((*form, step.get("behavior"), step.get("invert", False)))
    if asked == [("ByteLevel", True, False, None, False)]:
        return PATTERNS["gpt2"]
    known = asked == [("Split", True, False, "Isolated", False), ("ByteLevel", False, False, None, False)]
    pattern = steps[0]["pattern"].get("Regex") if known else None
    if pattern is None or pattern in PATTERNS.values():
        return pattern
    if is_odd(pattern):
        return None
    # Hugging Face keeps what lies between two matches as a piece, tiktoken would drop it; and its ^ and $ are
    # those of any line.
    return rf"(?m:{pattern})|(?:(?!(?m:{pattern}))[\s\S])+"

def find_tokens(added: list[dict], text: str) -> list[tuple]:
    """Cut added tokens out of a text: [{"content": "<a>", "id": 7}], "x<a>" -> [("x", None), ("<a>", 7)]"""
    if not added:
        return [(text, None)]
    order = sorted(added, key=lambda token: -len(token["content"]))  # the longest first
    forms = []
    for token in order:
        form = re.escape(token["content"])
        form = rf"(?<!\w){form}(?!\w)" if token.get("single_word") else form
        form = rf"\s*{form}" if token.get("lstrip") else form
        forms.append(f"({form})" + r"\s*" * bool(token.get("rstrip")))
    return cut_out(text, re.finditer("|".join(forms), text), lambda match: order[match.lastindex - 1]["id"])

def read_frame(spec: dict) -> tuple[tuple, tuple]:
    """Find the ids that a file's post-processor puts before and after a text."""
    known = ("TemplateProcessing", "ByteLevel", "BertProcessing", "RobertaProcessing")
    steps = [step for step in steps_of(spec, "post_processor", known) if step["type"] != "ByteLevel"]
    check(len(steps) < 2, "several steps of the post_processor are not supported yet")
    for step in steps:
        if "cls" in step:
            return (step["cls"][1],), (step["sep"][1],)
    frame = []
    for part in steps[0]["single"] if steps else [{"Sequence": "A"}]:
        name = part.get("SpecialToken", {}).get("id")
        frame += steps[0]["special_tokens"][name]["ids"] if name else [None]
    check(frame.count(None) == 1, "the post_processor takes the text more than once")
    place = frame.index(None)
    return tuple(frame[:place]), tuple(frame[place + 1 :])

DECODERS = ("ByteLevel", "Fuse", "Replace", "ByteFallback", "Strip", "Metaspace", "WordPiece")

def read_decoder(spec: dict) -> tuple[str | None, bool]:
    """Find how a file's decoder writes tokens -> (the sign for a space, does it drop the first space?)."""
    steps = steps_of(spec, "decoder", DECODERS)
    check(steps, "a tokenizer without a decoder is not supported")
    sign = None
    first = False
    for step in steps:
        fits = True
        if step["type"] == "Replace":
            fits = step["content"] == " " and "String" in step["pattern"]
            sign = step["pattern"].get("String")
        elif step["type"] == "Metaspace":
            sign = step["replacement"]
            first = step.get("prepend_scheme", "always") != "never"
        elif step["type"] == "Strip":
            fits = (step["content"], step["start"], step["stop"]) == (" ", 1, 0)
            first = True
        elif step["type"] == "WordPiece":  # its cleaning up ("a ." to "a.") is for people and left out
            first = True
        check(fits, f"the decoder {step} is not supported yet")
    return sign, first

# ---- Conversations -----------------------------------------------------------------------------------------

MARK = "\ue000(\\d+)\ue001"  # stands in the place of a message's content
CHAT_FORMATS = {  # name: the Jinja template, the special tokens that it spells, the one that ends a turn
    "chatml": (
        r"{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        r"{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    # Llama 2 and Mistral: the system's words are part of the first user's
    "llama2": (
        r"{% set said = namespace(system='') %}{% for m in messages %}{% if m['role'] == 'system' %}"
        r"{% set said.system = '<<SYS>>\n' + m['content'] + '\n<</SYS>>\n\n' %}"
        r"{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' </s>' }}"
        r"{% else %}{{ '<s>' + '[INST] ' + said.system + m['content'] + ' [/INST]' }}"
        r"{% set said.system = '' %}{% endif %}{% endfor %}", ("<s>", "</s>"), "</s>"),
    "mistral": (
        r"{{ '<s>' }}{% set said = namespace(system='') %}{% for m in messages %}"
        r"{% if m['role'] == 'system' %}{% set said.system = m['content'] + '\n\n' %}"
        r"{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + '</s>' }}"
        r"{% else %}{{ '' + '[INST] ' + said.system + m['content'] + ' [/INST]' }}"
        r"{% set said.system = '' %}{% endif %}{% endfor %}", ("<s>", "</s>", "[INST]", "[/INST]"), "</s>"),
    "llama3": (
        r"{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + "
        r"'<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "gemma": (
        r"{{ '<bos>' }}{% for m in messages %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' "
        r"else 'user') + '\n' + m['content'] + '<end_of_turn>\n' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ("<bos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>"),
    "phi3": (
        r"{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        r"{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
        ("<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"), "<|end|>"),
}

def compile_template(text: str):
    """Compile a chat template in Jinja's sandbox: it comes from outside."""
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message):
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(text)

# ---- The tokenizer -----------------------------------------------------------------------------------------

class Tokenizer:
    """Turn text into ids and back, as a tokenizer.json and the settings beside it in a folder say.

    special: {text: id} of the special tokens. Ordinary text never gives them: whoever wants them names them.
    prefix, suffix: the ids that belong before and after a text, () where there are none; encode adds none.
    names: {"eos_token": text, ...} as the folder says, those that the vocabulary has.
    chat_template: the folder's own, ChatML where it has none and the tokens are there, or None.
    eot_id, pad_id, mask_id, im_start_id, im_end_id (the end of a turn in another format): ids, or None.
    token_bytes: the bytes of each id, n_vocab of them."""

    def __init__(self, spec: dict):
        self.spec = spec
        self.ids = read_ids(spec)
        added = spec.get("added_tokens", [])
        steps = steps_of(spec, "pre_tokenizer", PRE_TOKENIZERS)
        on_bytes = any(step["type"] == "ByteLevel" for step in steps)
        kind = spec["model"].get("type", "BPE") + " on bytes" * on_bytes
        check(kind in CODECS, f"tokenizers of the type {kind} are not supported")
        tokens, self.encode_words = CODECS[kind](spec)
        pattern = one_pattern(spec) if on_bytes else None  # then tiktoken cuts, too
        normalizers = steps_of(spec, "normalizer", NORMALIZERS)
        self.normalizers = []  # for each place
        self.cuts = []
        for place in (START, AFTER_TOKEN, INSIDE):
            self.normalizers.append([NORMALIZERS[s["type"]](s | {"place": place}) for s in normalizers])
            cuts = [] if pattern else [PRE_TOKENIZERS[s["type"]](s | {"place": place}) for s in steps]
            self.cuts.append(compose(cuts))
        sign, self.drops_space = read_decoder(spec)
        decoded = any(step["type"] == "ByteLevel" for step in steps_of(spec, "decoder", DECODERS))
        check(decoded == on_bytes, "pre_tokenizer and decoder do not fit together")
        if sign:
            tokens = {i: token.replace(sign.encode(), b" ") for i, token in tokens.items()}
        tokens |= {token["id"]: token["content"].encode() for token in added}
        self.prefix, self.suffix = read_frame(spec)
        self.special = {token["content"]: token["id"] for token in added if token["special"]}
        # Tokens that ordinary text gives are found in the text as it is, or after the normalizer.
        plain = [token for token in added if not token["special"]]
        self.raw = [token for token in plain if not token["normalized"]]
        found = [t | {"content": self.normalize(t["content"])} for t in plain if t["normalized"]]
        self.normalized = [token for token in found if token["content"]]
        self.added = {token["content"]: token for token in added}
        self.n_vocab = max(tokens) + 1
        self.token_bytes = [tokens.get(i, b"") for i in range(self.n_vocab)]  # a file may leave an id out
        named = [self.ids.get(name) for name in SPECIAL[:5]]  # None where the file has no such token
        self.eot_id, self.pad_id, self.mask_id, self.im_start_id, self.im_end_id = named
        self.names = {}
        self.compiled = None, None
        self.chat_template = CHAT_FORMATS["chatml"][0] if None not in named[3:] else None

    @classmethod
    def load(cls, path) -> Tokenizer:
        """Load a folder's tokenizer and what lies beside it, or a tokenizer.json or .tiktoken file alone."""
        folder = Path(path)
        path = folder / "tokenizer.json" if folder.is_dir() else folder
        check(path.is_file(), f"there is no tokenizer at {path}")
        problem = f"{path} is not a tokenizer.json that can be used"
        try:
            ranks = path.suffix == ".tiktoken"
            tokenizer = cls(read_ranks(path) if ranks else parse_json(path.read_bytes(), path))
            if folder.is_dir():
                problem = f"what stands beside {path} cannot be used"
                tokenizer.read_settings(folder)
            return tokenizer
        except (UserError, LookupError, ValueError, TypeError, AttributeError, regex.error) as e:
            why = e if isinstance(e, UserError) else f"it is damaged ({e!r})"
            raise UserError(f"{problem}: {why}") from None

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
        self.chat_template = template or self.chat_template
        for known, _, end in CHAT_FORMATS.values():
            if known == template:
                self.im_end_id = self.ids.get(end)
        if self.eot_id is None:
            self.eot_id = self.ids.get(self.names.get("eos_token"))

    def describe_settings(self) -> str:
        """Write what a folder says beside a tokenizer.json: names of tokens, another chat template; or ""."""
        ours = (None, CHAT_FORMATS["chatml"][0])
        settings = self.names | ({} if self.chat_template in ours else {"chat_template": self.chat_template})
        return json.dumps(settings, indent=2) + "\n" if settings else ""

    def save(self, path: Path):
        """Save the tokenizer to a file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.new")
        text = json.dumps(self.spec, ensure_ascii=False, indent=2)
        beside.write_text(f"{text}\n", encoding="utf-8", newline="\n")
        os.replace(beside, path)

    def normalize(self, text: str, place: int = START) -> str:
        for step in self.normalizers[place]:
            text = step(text)
        return text

    def encode(self, text: str, special=()) -> list[int]:
        """Encode a text. special: "all", a name or names of special tokens that the text may spell out."""
        names = self.special if special == "all" else [special] if isinstance(special, str) else special
        for name in names:
            check(name in self.special, f"there is no special token {name!r}, only {', '.join(self.special)}")
        return self.encode_array(text, names).tolist()

    def cut_text(self, text: str, special=(), place: int = START):
        """Cut a text into ids of added tokens, and pieces that the model encodes one by one."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("the text is not UTF-8: a character is cut in half, or a byte is none") from None
        for piece, i in find_tokens([*self.raw, *(self.added[name] for name in special)], text):
            parts = [("", i)]
            if i is None:
                parts = find_tokens(self.normalized, self.normalize(piece, place))
            for part, i in parts:
                yield from self.cuts[place](part) if i is None else [i]
                place = AFTER_TOKEN

    def encode_array(self, text: str, special=(), place: int = START) -> np.ndarray:
        """Encode a text as uint32; in several threads at once. special: names; place: where it begins."""
        rows = [np.empty(0, np.uint32)]
        for piece in self.cut_text(text, special, place):
            ids = self.encode_words(piece) if isinstance(piece, str) else [piece]
            rows.append(np.asarray(ids, dtype=np.uint32))
        return np.concatenate(rows)

    def encode_ways(self, text: str, n: int | None, alpha: float, rng) -> list[list[int]]:
        """Encode an ordinary text in other ways: the n likeliest, or one drawn, as Unigram can."""
        model = self.encode_words
        check(isinstance(model, Unigram), "only a unigram tokenizer knows several ways to cut a text")
        ways = [(0.0, [])]
        for piece in self.cut_text(text):
            if not isinstance(piece, str):
                found = [(0.0, [piece])]
            elif n:
                found = [(p, model.number(pieces)) for p, pieces in n_best(piece, *model.text_costs, n)]
            else:
                found = [(0.0, model.number(sample_pieces(piece, *model.text_costs, alpha, rng)))]
            ways = [(p + q, ids + more) for p, ids in ways for q, more in found]
            ways = sorted(ways, reverse=True)[: n or 1]
        return [ids for _, ids in ways]

    def decode_bytes(self, ids) -> bytes:
        """Decode ids to their exact bytes; special tokens to their names."""
        for i in ids:
            if not 0 <= i < self.n_vocab:
                raise UserError(f"token id {i} is not in the vocabulary of {self.n_vocab} ids")
        return b"".join([self.token_bytes[i] for i in ids])

    def decode(self, ids) -> str:
        """Decode the ids of a text; bytes that are not UTF-8 become U+FFFD."""
        text = self.decode_bytes(ids).decode(errors="replace")
        return text.removeprefix(" ") if self.drops_space else text

    def render(self, messages: list[dict], reply: bool = False) -> tuple[list[int], list[bool]]:
        """Turn [{"role", "content"}, ...] into ids by the chat template -> (ids, is it the assistant's?).

        The end of the assistant's turn counts as its own: fine-tuning trains it. reply: end with the header
        of the assistant's turn. Content is ordinary text: a user who writes <|im_end|> ends nothing. What
        stands between contents is encoded apart from them, so a prompt is always how its answer's
        conversation begins; where content begins with white space that the tokenizer would join to the
        header's line break, the ids are not those of the whole text encoded at once."""
        check(self.chat_template, "This tokenizer was not made for conversations: no chat template.")
        ids = []
        own = []
        place = START
        for run, written in self.spell(messages, reply):
            text = isinstance(run, str)
            piece = self.encode_array(run, (), place).tolist() if text else [run]
            place = INSIDE if text else AFTER_TOKEN
            ids += piece
            own += [written] * len(piece)
        return ids, own

    def spell(self, messages: list[dict], reply: bool) -> list[tuple]:
        """Spell a conversation -> (text, or the id of a special token; did the assistant write it?).

        The template is asked with a mark in the place of each content: so what stands between them is known,
        and special tokens are found there only."""
        from jinja2 import TemplateError

        whole = all(isinstance(m.get(key), str) for m in messages for key in ("role", "content"))
        check(whole, "A message is a role and a content, both of them texts.")
        marks = [m | {"content": f"\ue000{i}\ue001"} for i, m in enumerate(messages)]
        asked = {}  # answer -> what stands before it
        try:
            if self.compiled[0] != self.chat_template:
                self.compiled = self.chat_template, compile_template(self.chat_template)
            fill = partial(self.compiled[1].render, **self.names)
            text = fill(messages=marks, add_generation_prompt=reply)
            whole = fill(messages=messages, add_generation_prompt=reply)
            for i, m in enumerate(messages):
                if m["role"] == "assistant":
                    asked[i] = fill(messages=marks[:i], add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise UserError(f"The chat template does not take this conversation: {error}.") from None

        def fill_marks(contents: list[str]) -> str:
            return re.sub(MARK, lambda mark: contents[int(mark[1])], text)

        contents = [m["content"] for m in messages]
        forms = [contents, [content.strip() for content in contents]]  # some templates trim
        if reply:  # some leave out what the assistant thought before its earlier answers
            answers = [m["content"].split("</think>")[-1] if m["role"] == "assistant" else m["content"]
                       for m in messages]
            forms += [answers, [answer.lstrip("\n") for answer in answers]]
            asked = {i: head for i, head in asked.items() if text.startswith(head)}  # others end in <think>
        contents = next((form for form in forms if fill_marks(form) == whole), None)
        fits = [int(i) for i in re.findall(MARK, text)] == list(range(len(messages)))
        fits = fits and contents is not None and all(map(text.startswith, asked.values()))
        check(fits, "The chat template changes or leaves out messages, which is not supported.")
        return self.take_apart(text, contents, asked)

    def take_apart(self, text: str, contents: list[str], asked: dict) -> list[tuple]:
        """Cut a text with marks at special tokens, and where the assistant begins and ends."""
        special = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or NEVER
        bounds = [0]  # every second part is the assistant's: its content, and a special token right after it
        for i, before in asked.items():
            content = re.compile(rf"\ue000{i}\ue001(?:\s*(?:{special}))?").search(text)
            bounds += [max(bounds[-1], len(before)), content.end()]
        runs = []
        for k, (start, end) in enumerate(pairwise([*bounds, len(text)])):
            for part in filter(None, re.split(f"({special}|\ue000\\d+\ue001)", text[start:end])):
                mark = re.fullmatch(MARK, part)
                run = contents[int(mark[1])] if mark else self.special.get(part, part)
                runs.append((run, k % 2 == 1))
        joined = []
        for (text, written), group in groupby(runs, lambda run: (isinstance(run[0], str), run[1])):
            found = [run for run, _ in group]
            joined += [("".join(found), written)] if text else [(i, written) for i in found]
        return joined

# ---- Learning a tokenizer ----------------------------------------------------------------------------------

def count_words(texts: list[str], pattern: str, prepare=str) -> Counter:
    """Count the pieces of the pattern: count_words(["a b b"], "gpt2") -> {"a": 1, " b": 2}"""
    find = regex.compile(PATTERNS[pattern]).findall
    # `re` is twice as fast, but knows no Unicode classes: it takes the texts that are plain ASCII.
    plain = PATTERNS[pattern].replace(r"\p{L}\p{M}", "a-zA-Z").replace(r"\p{L}\p{N}", "a-zA-Z0-9")
    plain = plain.replace(r"\p{L}", "[a-zA-Z]").replace(r"\p{N}", "[0-9]")
    find_ascii = re.compile(plain, re.ASCII).findall
    words = Counter()
    for text in texts:
        text = prepare(text)
        words.update(find_ascii(text) if text.isascii() else find(text))
    return words

def count_pieces(texts: list[str], spec: dict) -> Counter:
    """Count the words that a file's normalizer and pre-tokenizer make of texts."""
    tokenizer = Tokenizer(spec)
    words = Counter()
    for text in texts:
        words.update(tokenizer.cut_text(text))
    return words

def cut(text: str, size: int) -> list[str]:
    """Cut a text into parts of `size` characters or more: cut("one two six", 2) -> ["one", " two", " six"]"""
    # always before the space between two words, where a piece of every pattern begins
    return re.findall(rf"(?s).{{{size}}}.*?\S(?= \S)|.+", text)

def spaced(text: str, nfkc: bool) -> str:
    """Prepare a part of a text for SentencePiece's words: with the space that is written before a text."""
    text = unicodedata.normalize("NFKC", text) if nfkc else text
    return text.replace(SPACE, " ") if text.startswith(" ") else " " + text.replace(SPACE, " ")

def count_parts(texts, count) -> Counter:
    """Count words over all cores, a few megabytes at a time."""
    parts = (part for text in texts for part in cut(text, 20_000))
    words = Counter()
    for counts in compute(count, group(parts, 4_000_000), processes=True):
        words.update(counts)
    return words

def choose_alphabet(words: dict, coverage: float) -> list[str]:
    """List the characters that make up this share of the text, the most frequent first."""
    counts = count_units(words.items())
    ranked = sorted(counts, key=lambda c: (-counts[c], c))
    before = accumulate((counts[c] for c in ranked), initial=0)
    return [c for c, n in zip(ranked, before, strict=False) if n < coverage * counts.total()]

def train_tokenizer(texts, algorithm="bpe", vocab_size=4096, pattern="gpt4", normalizer=None, coverage=0.9995,
                    special=(), chat="chatml"):
    """Learn a tokenizer from texts, an iterable that is read once -> it, how many tokens it makes of them.

    special: tokens beside the usual ones. chat: the format of conversations, whose tokens it gets."""
    names = tuple(dict.fromkeys((*SPECIAL, *CHAT_FORMATS[chat][1], *special)))
    learn = {"bpe": learn_bpe, "byte": learn_bytes, "char": learn_chars, "wordpiece": learn_wordpiece,
             "spm-bpe": learn_sentencepiece, "unigram": learn_sentencepiece}[algorithm]
    gc.disable()  # millions of pairs and none in a circle: looking for one takes a fourth of the time
    try:
        spec, n_tokens = learn(texts, names, algorithm=algorithm, vocab_size=vocab_size, pattern=pattern,
                               normalizer=normalizer, coverage=coverage)
    finally:
        gc.enable()
    tokenizer = Tokenizer(spec)
    tokenizer.chat_template = CHAT_FORMATS[chat][0]
    if algorithm not in ("byte", "char") and tokenizer.n_vocab < vocab_size:
        say(f"warning: the text gives {tokenizer.n_vocab} ids only, {vocab_size} were asked for")
    return tokenizer, n_tokens

def learn_bytes(texts, special, **options):
    return bpe_file([], "gpt4", special), sum(len(text.encode()) for text in texts)

def learn_chars(texts, special, **options):
    counts = Counter()
    for text in texts:
        counts.update(text)
    return char_file(sorted(counts), special), counts.total()

def show_merging(steps):
    return track(steps, "merging")

def learn_bpe(texts, special, vocab_size, pattern, **options):
    """Learn byte-level BPE."""
    n_merges = vocab_size - 256 - len(special)
    check(n_merges > 0, f"{vocab_size} ids are too few for 256 bytes and {len(special)} special tokens")
    words = count_parts(texts, partial(count_words, pattern=pattern))
    merges, n_tokens = train_bpe(in_bytes(words), n_merges, watch=show_merging)
    return bpe_file(merges, pattern, special), n_tokens

def in_bytes(words: dict) -> dict:
    """Spell words as the ids of their bytes."""
    return {word.encode().translate(BYTE_TO_ID): n for word, n in words.items()}

def count_tokens(spec: dict, words: dict) -> int:
    """Count the tokens that a tokenizer makes of counted words."""
    encode = Tokenizer(spec).encode_words
    return sum(len(encode(word)) * n for word, n in words.items())

def learn_wordpiece(texts, special, vocab_size, normalizer, coverage, **options):
    """Learn WordPiece: of each character one token for a word's first place, one for the others."""
    spec = wordpiece_file(["[UNK]"], special, normalizer != "cased")
    words = count_parts(texts, partial(count_pieces, spec=spec))
    chars = sorted(choose_alphabet(words, coverage))
    first = sorted({word[0] for word in words} & set(chars))
    rest = sorted({c for word in words for c in word[1:]} & set(chars))
    names = [*first, *(f"##{c}" for c in rest)]
    enough = vocab_size > len(names) + len(special) + 1
    check(enough, f"{vocab_size} ids are too few for {len(names)} characters: give a larger --vocab-size")
    number = {name: i for i, name in enumerate(names)}
    rows = {}
    for word, n in words.items():
        ids = tuple(number.get(f"##{c}" if i else c) for i, c in enumerate(word))
        if None not in ids:
            rows[ids] = n
    check(rows, f"no word is left of the characters that --coverage {coverage} keeps: give a larger one")
    n_merges = vocab_size - len(names) - len(special) - 1
    merges = train_wordpiece(rows, n_merges, len(names), show_merging)
    for a, b in merges:
        names.append(names[a] + names[b].removeprefix("##"))
    spec = wordpiece_file(list(dict.fromkeys(["[UNK]", *names])), special, normalizer != "cased")
    return spec, count_tokens(spec, words)

def learn_sentencepiece(texts, special, algorithm, vocab_size, normalizer, coverage, **options):
    """Learn SentencePiece's BPE or Unigram: on characters, a space is one of them, rare ones become bytes."""
    nfkc = normalizer == "nfkc"
    found = count_parts(texts, partial(count_words, pattern="words", prepare=partial(spaced, nfkc=nfkc)))
    words = Counter()
    for word, n in found.items():
        for start in range(0, len(word), MAX_WORD_CHARS):
            words[word[start : start + MAX_WORD_CHARS].replace(" ", SPACE)] += n
    alphabet = choose_alphabet(words, coverage)
    unigram = algorithm == "unigram"
    if unigram:  # else a text that spells the name of a byte, <0x41>, could be cut into that token
        alphabet = list(dict.fromkeys([*alphabet, *"<0x123456789ABCDEF>"]))
    base = ["<unk>", *(f"<0x{b:02X}>" for b in range(256))]
    room = vocab_size - len(base) - len(special)
    check(room > len(alphabet), f"{vocab_size} ids are too few for {len(alphabet)} characters and 256 bytes: "
          "give a larger --vocab-size, or a smaller --coverage")
    known = set(alphabet)
    parts = Counter()
    for word, n in words.items():
        for there, cs in groupby(word, known.__contains__):
            if there:
                parts["".join(cs)] += n
    if unigram:
        parts.update(dict.fromkeys(alphabet, 0))
        logp = train_unigram(parts, room, lambda steps: track(steps, "fitting"))
        vocab = [[name, RARE_PIECE] for name in base] + [[piece, p] for piece, p in logp.items()]
        model = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": True}
    else:
        number = {c: i for i, c in enumerate(alphabet)}
        rows = {tuple(map(number.get, word)): n for word, n in parts.items()}
        merges, _ = train_bpe(rows, room - len(alphabet), len(alphabet), show_merging)
        model = bpe_model(alphabet, merges, base, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    spec = sentencepiece_file(model, special, nfkc)
    return spec, count_tokens(spec, words)

CODECS = {
    "BPE": chars_codec,
    "BPE on bytes": bytes_codec,
    "WordPiece": wordpiece_codec,
    "Unigram": lambda spec: (tokens_of(spec["model"]), Unigram(spec)),
}

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

    Folders that are links, hold earlier output or cannot be opened are listed too: to be counted."""
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

def read_lines(path: Path, lines):
    """Yield the number and the value of each line of JSON that is not empty."""
    for i, line in enumerate(lines, 1):
        if line.strip():
            yield i, parse_json(without_mark(line), f"line {i} of {path}")

def read_records(path: Path, file, field: str):
    """Yield one field of each object of a JSON file: one a line, or one array or object in all.

    Lines are read one by one; what is no line of its own is held whole."""
    rows = read_lines(path, file)
    first = None
    with contextlib.suppress(UserError):
        first = next(rows, None)
    if first and isinstance(first[1], dict):
        rows = chain([first], rows)
    else:
        file.seek(0)
        data = file.read()
        try:
            whole = parse_json(data, path)
            rows = enumerate(whole if isinstance(whole, list) else [whole], 1)
        except UserError:
            rows = read_lines(path, without_mark(data).splitlines())
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

    reason: why there is no document where one could have been, or None."""
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
                contents = read_records(path, file, field) if suffix in JSON_FILES else [file.read()]
                if suffix == ".json" and not named:  # settings, maybe
                    records = contents
                    contents = []
                    with contextlib.suppress(UserError):
                        contents = list(records)
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

def judge(filters: dict, signed: bool, batch: list) -> list:
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
        signature = sign(text) if signed and not reason else b""
        text = text[:200] if reason else text
        judged.append((source, name, named, text, reason, len(data), key, signature))
    return judged

def open_beside(output: Path | None):
    """Open a file without a name on the disk where the output will be."""
    places = (output.resolve(), *output.resolve().parents) if output else ()
    return tempfile.TemporaryFile(dir=next(filter(Path.is_dir, places), None))

class Documents:
    """Keep texts in a file without a name, so that a kill leaves nothing, and some 350 bytes of each here."""

    def __init__(self, output: Path | None, seed: int):
        self.seed = seed
        self.output = output
        self.file = open_beside(output)
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
        yield from map(self.text, track(rows, what))

def read_documents(files: list, field: str, filters=None, output=None, seed=0, signed=True) -> tuple:
    """Read files: return Documents, {reason: what was dropped}, [source, name, hash] of each.

    A text file that the user named only has to be text, and what was asked for; all others, and the records
    of every JSON file, pass all filters. Of equal texts one is kept. signed: MinHash is needed later."""
    used = field == "text" or any(unpacked(path).suffix.lower() in JSON_FILES for _, _, path, _ in files)
    check(used, f"--field {field} is for JSON files, and there are none")
    filters = choose_filters([]) if filters is None else filters
    documents = Documents(output, seed)
    dropped = {}
    for reason in ("not a file", "without the field", *filters, "duplicate"):
        dropped[reason] = {"documents": 0, "bytes": 0}
    hashes = []
    n_bytes = sum(path.stat().st_size for _, _, path, _ in files if path.is_file())
    contents = track(read_contents(files, field, hashes), "reading", n_bytes, lambda content: content[-1])
    batches = group(contents, 4_000_000, lambda content: len(content[3]))
    for judged in compute(partial(judge, filters, signed), batches, processes=True):
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
        check(len(text) > 1, "a text of one character cannot be split: give more")
        end = min(max(1, int(len(text) * (1 - val_fraction))), len(text) - 1)
        source = documents.sources[documents.source[rows[0]]]
        for name, part in ("train", text[:end]), ("val", text[end:]):  # the two may be equal
            documents.add(source, part, hashlib.sha256(f"{name} {part}".encode()).digest(), sign(part))
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

    The whole stays as large as it was: of a source that gets twice its bytes, each document comes twice."""
    sizes = documents.sizes()[train]
    place = np.array(documents.source)[train]
    order = np.array(documents.order)[train]
    rows, keys = [], []
    for name, weight in weights.items():
        own = np.flatnonzero(place == documents.sources.index(name)) if name in documents.sources else []
        check(len(own), f"--weight: nothing of {name} is left for training")
        epochs = weight / sum(weights.values()) * sizes.sum() / sizes[own].sum()
        check(epochs <= 100, f"--weight: {name} would be repeated {epochs:.0f} times; 100 is the most")
        ends = np.cumsum(sizes[own])
        taken = 0
        for copy in range(int(np.ceil(epochs))):
            part = own[ends <= (epochs - copy) * ends[-1]]  # all of it, but for the last copy
            taken += int(sizes[part].sum())
            rows.append(train[part])
            keys.append(order[part] * np.uint64(2 * copy + 1))  # the copies lie apart
        check(taken, f"--weight: no document of {name} is as small as its share: give it more, or cut it up")
        sources[name] |= {"weight": weight, "epochs": round(taken / int(ends[-1]), 4)}
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
    24 of 27 that are; of 500 letters none and all."""
    english = {gram.replace("_", " ") for gram in ENGLISH.split()}
    if name == "en":
        return english, 0.25
    found = trigrams(read_text(name))
    check(len(found) > 2000, f"--language {name} is too short: give some pages")
    check(share_of(english, found) < 0.15, f"--language {name} is English: write --language en")
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
    all shingles: it is the same in two signatures if it is in both texts."""
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
    the reference than in the corpus (as in DSIR, Xie et al. 2023, 2302.03169). A text's score is the mean."""
    check(len(rows) >= 1 / share, f"--quality drops a share of {share}: {len(rows)} texts are too few for it")
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

def compute(function, items, processes=False):
    """Yield function(item) for each item in turn, computed on all cores; a few items are held at a time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    items = iter(items)
    first = list(islice(items, cores))
    # Threads are enough for tiktoken. Worker processes start the program that runs: it has to be this file.
    if processes and len(first) > 1 and __name__ == "__main__":
        context = multiprocessing.get_context("spawn")  # the one way that all systems have
        ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is answered by this process alone
        pool = ProcessPoolExecutor(len(first), context, signal.signal, ignore)
    else:
        pool = ThreadPoolExecutor(cores)
    with delayed_ctrl_c():  # the workers inherit this, so they are quiet while they start, too
        window = deque(pool.submit(function, item) for item in first)
    try:
        for item in items:
            window.append(pool.submit(function, item))
            yield window.popleft().result()
        for future in window:
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)

def delayed_ctrl_c():
    """Hold a Ctrl-C back until the end of a block, where the system can."""
    stack = contextlib.ExitStack()
    if hasattr(signal, "pthread_sigmask"):
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        stack.callback(signal.pthread_sigmask, signal.SIG_SETMASK, before)
    return stack

def track(items, what, total=None, size_of=lambda item: 1):
    """Go through items with a bar and the time left. total: of their sizes."""
    from rich import console, progress  # here, as `encode` has to start fast
    with progress.Progress(console=console.Console(stderr=True)) as bar:
        task = bar.add_task(what, total=len(items) if total is None else total)
        for item in items:
            yield item
            bar.advance(task, size_of(item))

def say(text: str):
    """Print a line for people; standard output is for results."""
    print(text, file=sys.stderr, flush=True)

# ---- Report ------------------------------------------------------------------------------------------------

EXAMPLES = ("Hello world!", "Supercalifragilisticexpialidocious", "Hello", "नमस्ते")
UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"
LOST = "\ufffd", "[UNK]", "<unk>"  # a piece that has or is one of these shows no text

def read_sentences(path: Path | None) -> dict:
    """Read parallel sentences, {language: [sentence, ...]}; by default those beside the tests."""
    file = path or Path(__file__).parent / "tests" / "parallel_sentences.json"
    check(path or file.is_file(), f"{file} is missing, it comes with a clone: give your own --sentences")
    languages = parse_json(file.read_bytes(), file)
    rows = list(languages.values()) if isinstance(languages, dict) else []
    lists = rows and all(isinstance(row, list) and row and len(row) == len(rows[0]) for row in rows)
    whole = lists and all(isinstance(text, str) and re.search(r"\w", text) for row in rows for text in row)
    check(whole, f'{file} is not {{"language": ["sentence", ...], ...}} with as many sentences for each')
    return languages

def spell(tokenizer: Tokenizer, text: str) -> list[tuple]:
    """Encode a text as pairs (piece, id); a part of a character is U+FFFD. [] where a character has no id."""
    with contextlib.suppress(UserError):
        ids = tokenizer.encode_array(text).tolist()
        return [(tokenizer.token_bytes[i].decode(errors="replace"), i) for i in ids]
    return []

def measure_tokenizer(tokenizer: Tokenizer, languages: dict, width: int) -> dict:
    """Measure a tokenizer on parallel sentences, and on the chapter's examples.

    tokens_per_word: a word stands between spaces and has a letter; None where a script has no spaces.
    partial_or_unknown: the share of tokens that stand for a part of a character (SentencePiece calls it byte
    fallback), or for an unknown one. Unknown words make a text short, and it is lost."""
    rows = {}
    first = None
    for language, sentences in languages.items():
        spelled = [spell(tokenizer, text) for text in sentences]
        pieces = [piece.strip() for pairs in spelled for piece, _ in pairs]
        n = len(pieces) if all(spelled) else np.nan
        first = first or n
        text = " ".join(sentences)
        words = np.nan if regex.search(UNSPACED, text) else len(re.findall(r"\S*\w\S*", text))
        size = len("".join(sentences).encode("utf-8", "surrogatepass"))
        row = {"bytes_per_token": size / n, "tokens_per_word": n / words, "against_first": n / first}
        row["partial_or_unknown"] = sum(LOST[0] in piece or piece in LOST for piece in pieces) / n
        rows[language] = {name: None if np.isnan(x) else x for name, x in row.items()}
    row = {"ids": tokenizer.n_vocab, "embedding_parameters": tokenizer.n_vocab * width}
    return row | {"languages": rows, "examples": {text: spell(tokenizer, text) for text in EXAMPLES}}

def measure_data(tokenizer: Tokenizer, folder: Path) -> dict:
    """Measure a data folder: ids that its training text hardly uses, bytes per token of its validation."""
    meta = parse_json((folder / "meta.json").read_bytes(), folder)
    ids = np.fromfile(folder / "train.bin", np.dtype(meta["dtype"]).newbyteorder("<"))
    counts = np.delete(np.bincount(ids, minlength=tokenizer.n_vocab), [*tokenizer.special.values()])
    rare = {"ids_never_used": int((counts == 0).sum()), "ids_used_below_10": int((counts < 10).sum())}
    val = meta["splits"]["val"]
    return rare | {"bytes_per_token": val["bytes"] / val["tokens"]}

def run_script(script: str, *args, enough=lambda: False):
    """Run a script of this repository to its end, or until enough() is true; refuse as it refuses."""
    line = [sys.executable, str(Path(__file__).with_name(script)), *map(str, args)]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as words:
        with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=words) as process:
            while process.poll() is None and not enough():
                time.sleep(0.1)
            process.terminate()
        words.seek(0)
        refusal = " ".join(words.read().rpartition("rror: ")[2].split())
    check(process.returncode == 0 or enough(), refusal)

def train_small(data: Path, seconds: int) -> dict:
    """Train a small model for so many seconds; return its bits per byte on the validation text.

    The learning rate is constant over the first 60 % of a run. So the run is stopped at half time; by then it
    is known which step the last one will be, and the run goes on to there."""
    log = data / "model" / "metrics.jsonl"

    def spent() -> list[float]:
        lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
        return [json.loads(line).get("ms_per_step", 0) / 1000 for line in lines if line.endswith("}")]

    options = ("--preset", "nano", "--max-steps", 10**6, "--eval-interval", 10**6, "--compile", "off")
    run_script("train.py", "--data", data, "--out", log.parent, *options,
               enough=lambda: sum(spent()) > seconds / 2)
    steps = 1 + int(len(spent()) * seconds / sum(spent()))
    run_script("train.py", "--resume", log.parent, "--max-steps", steps)
    result = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    return {"bits_per_byte": result["val_bpb"], "steps": steps, "seconds": sum(spent())}

def column(row: dict) -> dict:
    """Write the figures of a tokenizer as the cells of its column in a table."""
    figures = [(name.replace("_", " "), x) for name, x in row.items() if not isinstance(x, dict)]
    cells = {name: f"{round(x, 3):,}" for name, x in figures}
    cells["bytes a token, tokens a word and against first, partial or unknown"] = ""
    for language, found in row["languages"].items():
        cells[language] = " ".join("    -" if x is None else f"{x:5.2f}" for x in found.values())
    for text, pairs in row["examples"].items():
        cells[text] = " ".join(f"{piece!r} {i}" for piece, i in pairs)
    return cells

def draw(rows: list[dict], path: Path):
    """Draw what depends on the number of ids, a panel for each figure."""
    from matplotlib.figure import Figure
    panels = [name for name in ("bytes_per_token", "ids_used_below_10", "bits_per_byte") if name in rows[0]]
    figure = Figure(figsize=(3.5 * len(panels), 3), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(panels)), panels, strict=True):
        axis.semilogx([row["ids"] for row in rows], [row[name] for row in rows], "o", base=2)
        axis.set(title=name.replace("_", " "), xlabel="ids")
    figure.savefig(path)

# ---- Commands ----------------------------------------------------------------------------------------------

def train(
    inputs: Annotated[list[str], typer.Option("--input", help="Text, folder or .jsonl; can be repeated.")],
    output: Annotated[Path, typer.Option(help="The tokenizer.json to write.")],
    # as `prepare` declares them
    algorithm=None, vocab_size=None, pattern=None, normalizer=None, coverage=None, special=(), chat=None,
    field="text", overwrite=False,
):
    """Learn a tokenizer from text."""
    files = find_files(inputs)
    options = choose_tokenizer(None, algorithm, vocab_size, pattern, normalizer, coverage, special, chat)
    ours = output.is_file() and b'"added_tokens"' in output.read_bytes()
    check_output(output, output.exists(), ours, overwrite, files)
    beside = output.with_name(SETTINGS)
    free = overwrite or not beside.exists()
    check(free, f"{beside} belongs to another tokenizer: pass --overwrite to replace it, or another --output")
    documents, _, _ = read_documents(files, field, signed=False)
    texts = documents.read(range(len(documents)), "learning")
    tokenizer, n_tokens = train_tokenizer(texts, **options)
    tokenizer.save(output)
    beside.unlink(missing_ok=True)
    if settings := tokenizer.describe_settings():
        beside.write_text(settings, encoding="utf-8")
    n_bytes = documents.sizes().sum()
    say(f"{output}: {tokenizer.n_vocab:,} ids, {n_bytes / n_tokens:.3f} bytes per token")

def encode(
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer.json, or a folder that holds one.")],
    text: Annotated[str, typer.Argument(help="The text; by default standard input.")] = None,
    special: Annotated[list[str], typer.Option(help="Special token that the text may spell, or: all.")] = (),
    n_best: Annotated[int, typer.Option(help="unigram: so many ways to cut, the best first.")] = None,
    sample: Annotated[float, typer.Option(help="unigram: draw a way, by p to this power (0.1).")] = None,
    seed: Annotated[int, typer.Option(help="Of --sample.")] = 0,
):
    """Print the ids of a text as one JSON list."""
    other = n_best is not None or sample is not None
    check(n_best is None or sample is None, "--n-best and --sample: one of them")
    check(not (other and special), "--special goes with neither --n-best nor --sample")
    check(n_best is None or 1 <= n_best <= 1000, f"--n-best {n_best} is out of range: 1 to 1000")
    check(sample is None or 0 <= sample < 1000, f"--sample {sample} is out of range: 0 (all alike) to 1000")
    check(0 <= seed < 2**31, f"--seed {seed} is out of range: 0 at least, and below 2^31")
    tok = Tokenizer.load(tokenizer)
    if text is None:
        text = without_mark(sys.stdin.buffer.read()).decode(errors="surrogateescape")
    if other:
        ways = tok.encode_ways(text, n_best, sample, random.Random(seed))
    else:
        ways = [tok.encode(text, "all" if "all" in special else special)]
    for ids in ways:
        print(json.dumps(ids))

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

def report(
    tokenizers: Annotated[list[str], typer.Argument(help="tokenizer.json files, or folders.")] = None,
    sweep: Annotated[str, typer.Option(help="Sizes to learn a tokenizer of each: 512,1024,4096.")] = "",
    algorithm: Annotated[Algorithm, typer.Option(help="Of --sweep; bpe.")] = None,
    inputs: Annotated[list[str], typer.Option("--input", help="Text to learn from, and to count on.")] = (),
    sentences: Annotated[Path, typer.Option(help="JSON: a list of parallel sentences a language.")] = None,
    width: Annotated[int, typer.Option(help="n_embd, for the embedding's parameters.")] = 768,
    seconds: Annotated[int, typer.Option("--train", help="Seconds to train a small model with each.")] = 0,
    plot: Annotated[Path, typer.Option(help="Picture to write of the sizes (needs matplotlib).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
):
    """Compare tokenizers, or vocabulary sizes: languages, unused ids, a small model in equal time.

    Without --input, a sweep and --train take what `prepare` takes: the sources of this Python."""
    check(1 <= width <= 2**20, f"--width {width} is out of range: 1 to 2^20")
    check(0 <= seconds <= 10**6, f"--train {seconds} is out of range: seconds, 0 for none")
    check(tokenizers or sweep, "name a tokenizer.json, or sizes to learn: --sweep 512,1024,4096")
    check(sweep or not algorithm, "--algorithm is for --sweep: leave it out")
    algorithm = algorithm or "bpe"
    check(algorithm in ("bpe", *LEARNED_ON_WORDS), f"--algorithm {algorithm} has one size only")
    check(re.fullmatch(r"(\d+(,\d+)*)?", sweep), f"--sweep {sweep} is no list of sizes: write 512,1024,4096")
    reads = bool(inputs or sweep or seconds)
    if plot:
        check(reads, "--plot draws what a text shows: give --input, --sweep or --train")
        check(importlib.util.find_spec("matplotlib"), "--plot needs matplotlib: pip install matplotlib")
        fine = plot.parent.is_dir() and plot.suffix in (".png", ".svg", ".pdf")
        check(fine, f"--plot {plot} has to be a .png, .svg or .pdf in a folder that exists")
    languages = read_sentences(sentences)
    loaded = {name: Tokenizer.load(name) for name in tokenizers or ()}
    wanted = {name: ["--tokenizer", name] for name in loaded}
    for size in re.findall(r"\d+", sweep):
        wanted[f"{algorithm} {size}"] = ["--algorithm", algorithm, "--vocab-size", size]
    rows = {}
    with tempfile.TemporaryDirectory() as work:
        for name, options in wanted.items():
            say(f"{name} ...")
            folder = Path(work, f"{len(rows)}")
            if reads:
                run_script("tokenize.py", "prepare", *inputs, "--output", folder, *options)
            tokenizer = loaded.get(name) or Tokenizer.load(folder)
            rows[name] = measure_tokenizer(tokenizer, languages, width)
            rows[name] |= measure_data(tokenizer, folder) if reads else {}
            rows[name] |= train_small(folder, seconds) if seconds else {}
    if plot:
        draw([*rows.values()], plot)
    if as_json:
        return print(json.dumps(rows))
    from rich import console, table
    screen = console.Console(width=None if sys.stdout.isatty() else 100, markup=False, emoji=False)
    columns = {name: column(row) for name, row in rows.items()}
    beside = max(1, (screen.width - 22) // 26)
    for start in range(0, len(rows), beside):
        names = [*rows][start : start + beside]
        heads = [table.Column(name, min_width=23, overflow="fold") for name in names]
        grid = table.Table(table.Column(max_width=18, overflow="fold"), *heads)
        for label in columns[names[0]]:
            grid.add_row(label, *(columns[name][label] for name in names))
        screen.print(grid)

def prepare(
    inputs: Annotated[list[str], typer.Argument(help="File, folder, NAME=PATH; else this Python.")] = None,
    output: Annotated[Path, typer.Option(help="Folder to write; else data/ and the source's name.")] = None,
    tokenizer: Annotated[Path, typer.Option(help="Use this tokenizer.json instead of learning one.")] = None,
    algorithm: Annotated[Algorithm, typer.Option(help="How tokens are learned; bpe.")] = None,
    vocab_size: Annotated[int, typer.Option(help="All ids, special tokens too; 4096.")] = None,
    pattern: Annotated[Literal["gpt2", "gpt4"], typer.Option(help="bpe: how text is cut; gpt4.")] = None,
    normalizer: Annotated[Normalizer, typer.Option(help="nfkc: spm-bpe, unigram; others: wordpiece.")] = None,
    coverage: Annotated[float, typer.Option(help="Share of the text with characters of its own.")] = None,
    special: Annotated[list[str], typer.Option(help="One more special token; can be repeated.")] = (),
    chat: Annotated[Chat, typer.Option(help="How conversations are spelled; chatml.")] = None,
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
    check_numbers(val_fraction, seed, near_duplicates)
    options = choose_tokenizer(tokenizer, algorithm, vocab_size, pattern, normalizer, coverage, special, chat)
    tok = load_for_data(tokenizer) if tokenizer else None
    chosen = choose_filters(filter, language, toxic)
    reference = read_text(quality) if quality else None
    files = find_files(inputs) if inputs else find_python()
    shares = read_weights(weight, {source for source, *_ in files})
    output = output or Path("data") / (files[0][0] if inputs else "python")
    finish_save(output)
    check_folder(output, overwrite, files)
    # 2. documents; what is written on the way has no name on the disk, so a kill leaves nothing
    documents, dropped, hashes = read_documents(files, field, chosen, output, seed)
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
    save_train = encode_documents(tok, documents, train, "train", meta)
    save_val = encode_documents(tok, documents, val, "val", meta)
    near = count_contaminated(documents, train, val)
    meta |= {"near_duplicates": near, "filters": dropped, "command": command}
    # 5. the folder
    parts = (save_train, save_val, tok.save, describe_data(meta, hashes), tok.describe_settings())
    contents = {name: part for name, part in zip((*DATA_FILES, SETTINGS), parts, strict=True) if part}
    save_files(output, contents, {SETTINGS} - contents.keys())
    show_meta(output, meta, as_json)

def load_for_data(path: Path) -> Tokenizer:
    """Load the tokenizer that --tokenizer names; it has to know how a document ends."""
    tokenizer = Tokenizer.load(path)
    check(tokenizer.eot_id is not None, f"{path} names no token to end a document with")
    return tokenizer

def describe_data(meta: dict, hashes: list) -> str:
    """Write meta.json: what is known of the data, and of each file its hash."""
    meta["files_sha256"] = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    return json.dumps(meta | {"files": hashes if len(hashes) <= 10_000 else []}, indent=1) + "\n"

def check_numbers(val_fraction: float, seed: int, near_duplicates: float):
    """Refuse what is out of range."""
    check(0 < val_fraction < 1, f"--val-fraction {val_fraction} is not between 0 and 1")
    check(0 <= seed < 2**31, f"--seed {seed} is out of range: it has to be 0 at least, and below 2^31")
    fits = near_duplicates == 0 or 0.1 <= near_duplicates <= 1
    check(fits, f"--near-duplicates {near_duplicates} is out of range: 0 (none is dropped), or 0.1 to 1")

def check_folder(output: Path, overwrite: bool, files: list):
    """Refuse a folder that is not empty and no data folder, or one that has to stay."""
    # a save that was killed may leave these
    left = {f"{name}.new" for name in (*DATA_FILES, SETTINGS, "commit.json")}
    there = any(not path.is_dir() and path.name not in left for path in output.resolve().rglob("*"))
    meta = output / "meta.json"
    ours = meta.is_file() and b'"splits"' in meta.read_bytes()
    check_output(output, there, ours, overwrite, files)

def read_weights(weights: list[str], sources: set) -> dict:
    """Read NAME=SHARE of every source."""
    shares = {}
    for weight in weights:
        name, _, share = weight.rpartition("=")
        fits = name in sources and re.fullmatch(r"\d*\.?\d+", share) and float(share) > 0
        check(name not in shares, f"--weight {weight}: {name} has one already")
        check(fits, f"--weight {weight}: write NAME=SHARE, above 0, NAME of {', '.join(sorted(sources))}")
        shares[name] = float(share)
    missing = sources - set(shares) if shares else ()
    check(not missing, f"--weight has to name every source: {', '.join(sorted(missing))} is missing")
    return shares

def encode_documents(tok: Tokenizer, documents: Documents, rows: np.ndarray, split: str, meta: dict):
    """Encode a split as one row of ids, an end-of-text after each document; add its counts to meta.

    Returns a function that writes the ids to a path."""
    for count in (meta["splits"], *meta["sources"].values()):
        count[split] = {"documents": 0, "tokens": 0, "bytes": 0}
    dtype = np.dtype(meta["dtype"]).newbyteorder("<")
    sizes = documents.sizes()
    file = open_beside(documents.output)

    def encode(texts: list[str]) -> list[np.ndarray]:
        return [np.append(tok.encode_array(text), tok.eot_id).astype(dtype) for text in texts]

    def save(path: Path):
        file.seek(0)
        with open(path, "wb") as target:
            shutil.copyfileobj(file, target, 2**20)

    texts = group(documents.read(rows, f"encoding {split}"), 200_000)
    encoded = chain.from_iterable(compute(encode, texts))
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
    words = ["python", "tokenize.py", "prepare"]
    for item in inputs or ():
        name, equals, path = item.rpartition("=")
        words.append(name + equals + shorten(Path(path)))
    for name, value in options.items():
        for given in value if isinstance(value, (list, tuple)) else [value]:
            text = shorten(given) if isinstance(given, Path) else str(given)
            words += [f"--{name.replace('_', '-')}", text] if given or name == "seed" else []
    return shlex.join(words)

def shorten(path: Path) -> str:
    return path.name if path.is_absolute() else str(path)

def show_meta(output: Path, meta: dict, as_json: bool):
    """Print what each source gave, and what was dropped; for programs all of it."""
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
    if as_json:
        print(json.dumps({"output": str(output)} | meta))

def choose_tokenizer(tokenizer: Path | None, algorithm, vocab_size, pattern, normalizer=None, coverage=None,
                     special=(), chat=None) -> dict:
    """Collect the options that make a tokenizer, and refuse those that would do nothing."""
    options = {"algorithm": algorithm, "vocab_size": vocab_size, "pattern": pattern, "normalizer": normalizer,
               "coverage": coverage, "special": tuple(special) or None, "chat": chat}
    options = {name: value for name, value in options.items() if value is not None}
    free = not (tokenizer and options)
    given = ", ".join(f"--{name.replace('_', '-')}" for name in options)
    check(free, f"--tokenizer says it all: leave out {given}")
    kind = algorithm or "bpe"
    for name in OPTION_ALGORITHMS.keys() & options.keys():
        kinds = OPTION_ALGORITHMS[name]
        flag = f"--{name.replace('_', '-')}"
        check(kind in kinds, f"{flag} is for {', '.join(kinds)}, not for {kind}: leave it out")
    fits = normalizer is None or normalizer in LEARNED_ON_WORDS[kind]
    check(fits, f"--normalizer {normalizer} is not for {kind}")
    check(0 < options.get("coverage", 1) <= 1, f"--coverage {coverage} is not between 0 and 1")
    least = LEAST_VOCAB if kind == "bpe" else len(SPECIAL) + 2
    check(least <= options.get("vocab_size", least) < 2**24,
          f"--vocab-size {vocab_size} is out of range: at least {least}, below 2^24")
    printable = all(name.strip() and name.isprintable() for name in special)
    check(printable, "--special has to be a printable text")
    return options

def check_output(output: Path, there: bool, ours: bool, overwrite: bool, files: list):
    """Refuse, before any work, an output that would replace what has to stay."""
    target = output.resolve()
    for _, _, path, _ in files:
        place = path.resolve()
        kept = target not in (place, *place.parents) or path.is_dir()
        check(kept, f"{path} is input, so it has to stay: choose another --output")
    if there:
        check(ours, f"{output} is not empty, and is no data folder or tokenizer of ours: "
              "choose another --output")
        check(overwrite, f"{output} exists: pass --overwrite to replace it, or another --output")

def main():
    """Run the command that the user typed; print an error as one sentence."""
    app = typer.Typer(help="Turn text into tokens, and into a data folder.", no_args_is_help=True,
                      add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    train.__annotations__ = prepare.__annotations__ | train.__annotations__
    for command in (train, encode, decode, report, prepare):
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
