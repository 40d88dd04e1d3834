"""Turn text into tokens, and documents into a data folder.

A tokenizer is learned from text and kept in one file, Hugging Face's tokenizer.json. Byte-level BPE starts
from the 256 bytes and joins the most frequent pair of neighbours into a new token, again and again. That is
`get_pairs`, `merge` and `train_bpe_plain`; `train_bpe` learns the same merges faster. `prepare` cleans,
deduplicates and splits documents and writes them as one long row of token ids.
Left out so far: WordPiece, Unigram, normalizers, near-duplicates. All text is held in memory at once.

    python tokenize.py prepare                          # the Python that is installed here -> data/python
    python tokenize.py prepare shakespeare.txt --output data/shakespeare --algorithm char --val-fraction 0.1
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
    import zlib
    from collections import Counter, defaultdict
    from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
    from functools import partial
    from itertools import pairwise
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
# No tokenizer file may ask for these: options of BPE, and of an added token.
UNSUPPORTED = "dropout continuing_subword_prefix end_of_word_suffix byte_fallback single_word lstrip rstrip"
# Our own tokenizer files begin as this; what is empty here is filled in by `tokenizer_file` and `bpe_file`.
SKELETON = """{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
"pre_tokenizer": null, "post_processor": null, "decoder": {"type": "Fuse"}, "model": {"type": "BPE",
"dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
"fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": {}, "merges": []}}"""
FLAGS = '{"single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}'
BYTE_LEVEL = '{"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true}'
GAP = -1  # stands between two words, where no pair is counted
# The embedded default reads the standard library and these packages, which requirements.txt installs.
PACKAGES = "torch numpy tiktoken regex typer rich pytest safetensors"
# It skips what is hidden or outside (".."), folders of these names, and tests.
SKIPPED = r"(^|/)(\.|(test|tests|testing|idlelib|site-packages|dist-packages|__pycache__)/"
SKIPPED += r"|test_[^/]*$|[^/]*_test\.py$|conftest\.py$)"
DATA_FILES = ("train.bin", "val.bin", "tokenizer.json", "meta.json")
LETTERS = bytes([*range(65, 91), *range(97, 123), *range(128, 256)])  # ASCII letters, all that is not ASCII
# A document is dropped for the first of these that is true. text is data with U+FFFD where it is not UTF-8.
FILTERS = {
    "binary": lambda data, text: b"\0" in data,
    "not_utf8": lambda data, text: text.encode() != data,
    "short": lambda data, text: len(text.strip()) < 64,
    "long_lines": lambda data, text: max(map(len, text.splitlines())) > 20_000,  # minified code, dumps
    "data": lambda data, text: len(data.translate(None, LETTERS)) > 0.75 * len(data),  # tables of numbers
    "repetitive": lambda data, text: len(zlib.compress(data, 1)) < 0.1 * len(data),
}
MUST_PASS = ("binary", "not_utf8")  # a file that the user named passes these too

# model.py loads this file too, and catches its own UserError: ours is then a kind of that one.
class UserError(getattr(sys.modules.get("model"), "UserError", Exception)):
    """Tell the user in one sentence what to mend; `main` prints it without a traceback, with exit code 2."""

def check(ok, sentence: str):
    """Refuse with this sentence unless all is well."""
    if not ok:
        raise UserError(sentence)

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
    """Replace a pair by one token, from left to right: merge([1, 2, 3, 1, 2], (1, 2), 4) -> [4, 3, 4]"""
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
    spec["decoder"] = json.loads(BYTE_LEVEL) | {"add_prefix_space": True}
    spec["pre_tokenizer"] = json.loads(BYTE_LEVEL)
    if pattern != "gpt2":
        expression = {"Regex": PATTERNS[pattern]}
        split = {"type": "Split", "pattern": expression, "behavior": "Isolated", "invert": False}
        steps = [split, json.loads(BYTE_LEVEL) | {"use_regex": False}]
        spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    return spec

def tokenizer_file(names: list[str]) -> dict:
    """Describe a tokenizer that has these tokens and the special ones, and merges nothing."""
    spec = json.loads(SKELETON)
    spec["model"]["vocab"] = {name: i for i, name in enumerate(names)}
    for i, name in enumerate(SPECIAL, len(names)):
        spec["added_tokens"].append({"id": i, "content": name, **json.loads(FLAGS)})
    return spec

def codec(spec: dict):
    """Choose the codec of a file by its kind of model: return {id: bytes} and a function from text to ids."""
    model = spec["model"]
    kind = model.get("type", "BPE") if model.get("merges") != [] else "characters"
    codecs = {"BPE": bpe_codec, "characters": char_codec}
    check(kind in codecs, f"tokenizers of the type {kind} are not supported yet")
    check(not spec["normalizer"], f"the normalizer {spec['normalizer']} is not supported yet")
    for part in (model, *spec["added_tokens"]):
        for option in UNSUPPORTED.split():
            check(not part.get(option), f"the option {option} is not supported yet")
    return codecs[kind](spec)

def bpe_codec(spec: dict):
    """Read a byte-level BPE file; encoding is tiktoken's."""
    vocab = spec["model"]["vocab"]
    pairs = [m.split(" ") if isinstance(m, str) else m for m in spec["model"]["merges"]]
    names = dict.fromkeys([*CHAR.values(), *(a + b for a, b in pairs)])  # in the order of their ranks
    lacks = [name for name in names if name not in vocab]
    check(not lacks, f"only byte-level BPE with all 256 bytes is supported: the vocabulary lacks {lacks[:1]}")
    ids = np.array(list(map(vocab.get, names)), dtype=np.uint32)
    ranks = {bytes(map(BYTE.get, name)): rank for rank, name in enumerate(names)}
    pattern = read_pattern(spec["pre_tokenizer"])
    try:
        encoding = tiktoken.Encoding("octavo", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    except ValueError as e:
        raise UserError(f"tiktoken cannot read the split pattern of this tokenizer: {e}") from None

    def encode(text: str) -> np.ndarray:
        try:
            return ids[encoding.encode_to_numpy(text, disallowed_special=())]
        except ValueError:  # the pattern's backtracking is limited
            raise UserError("a million spaces in a row are too many for tiktoken: cut the text") from None

    return dict(zip(ids.tolist(), ranks, strict=True)), encode

def read_pattern(pre_tokenizer) -> str:
    """Find the one regular expression that a file's pre-tokenizer amounts to."""
    steps = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    keys = ("type", "use_regex", "add_prefix_space", "behavior", "invert")
    asked = [tuple(step.get(key) for key in keys) for step in steps]
    if asked == [("ByteLevel", True, False, None, None)]:
        return PATTERNS["gpt2"]
    known = asked == [("Split", None, None, "Isolated", False), ("ByteLevel", False, False, None, None)]
    check(known and "Regex" in steps[0]["pattern"], f"the pre-tokenizer {pre_tokenizer} is not supported yet")
    pattern = steps[0]["pattern"]["Regex"]
    # Hugging Face keeps what lies between two matches as a piece of its own, tiktoken would drop it.
    return pattern if pattern in PATTERNS.values() else rf"{pattern}|(?:(?!{pattern})[\s\S])+"

def char_codec(spec: dict):
    """Read a file with one id a character."""
    vocab = spec["model"]["vocab"]
    check(set(map(len, vocab)) <= {1}, "a BPE tokenizer without merges has to have single characters only")

    def encode(text: str) -> np.ndarray:
        try:
            return np.array([vocab[c] for c in text], dtype=np.uint32)
        except KeyError as e:
            raise UserError(f"the character {e} is not in the vocabulary of this tokenizer") from None

    return {i: c.encode() for c, i in vocab.items()}, encode

class Tokenizer:
    """Turn text into ids and back, as a tokenizer.json says.

    special: name of a special token -> id. They never come of ordinary text: whoever wants them names them.
    encode_array: encodes ordinary text as uint32; fast, and in several threads at once where it is BPE.
    """

    def __init__(self, spec: dict):
        self.spec = spec
        self.special = {token["content"]: token["id"] for token in spec["added_tokens"]}
        tokens, self.encode_array = codec(spec)
        tokens |= {i: name.encode() for name, i in self.special.items()}
        self.n_vocab = max(tokens) + 1
        self.token_bytes = [tokens.get(i, b"") for i in range(self.n_vocab)]  # a file may leave an id out
        ids = map(self.special.get, SPECIAL[:5])  # None where the file has no such token
        self.eot_id, self.pad_id, self.mask_id, self.im_start_id, self.im_end_id = ids

    @classmethod
    def load(cls, path) -> Tokenizer:
        """Load a tokenizer.json, or the one in a folder."""
        path = Path(path, "tokenizer.json") if Path(path).is_dir() else Path(path)
        check(path.exists(), f"there is no tokenizer at {path}")
        try:
            return cls(json.loads(path.read_text(encoding="utf-8")))
        except (UserError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise UserError(f"{path} is not a tokenizer.json that can be used: {e}") from None

    def save(self, path: Path):
        """Save the tokenizer to a file, whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f"{path.name}.new")
        text = json.dumps(self.spec, ensure_ascii=False, indent=2)
        beside.write_text(f"{text}\n", encoding="utf-8", newline="\n")
        os.replace(beside, path)

    def encode(self, text: str, special=()) -> list[int]:
        """Encode a text. special: "all", a name or names of special tokens that the text may spell out."""
        if not special:
            return self.encode_array(text).tolist()
        names = self.special if special == "all" else [special] if isinstance(special, str) else special
        for name in names:
            check(name in self.special, f"there is no special token {name!r}, only {', '.join(self.special)}")
        longest_first = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
        ids = []
        for piece in re.split(f"({longest_first})", text):
            ids += [self.special[piece]] if piece in names else self.encode_array(piece).tolist()
        return ids

    def decode_bytes(self, ids) -> bytes:
        """Decode ids to their exact bytes; special tokens to their names."""
        for i in ids:
            if not 0 <= i < self.n_vocab:
                raise UserError(f"token id {i} is not in the vocabulary of {self.n_vocab} ids")
        return b"".join([self.token_bytes[i] for i in ids])

    def decode(self, ids) -> str:
        """Decode ids to text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

def train_tokenizer(texts: list, algorithm: str, vocab_size: int, pattern: str):
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
        check(path.exists(), f"there is no file or folder {path}")
        if path.is_dir():
            found += [(source, name, path / name, False) for name in walk(path)]
        else:
            found.append((source, path.name, path, True))
    check(found, f"there are no files in {', '.join(inputs)}")
    return sorted(found)

def walk(folder: Path, skipped=r"^\.") -> list[str]:
    """List the files below a folder, without those that match `skipped`; a folder's name ends in a slash."""
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not re.search(skipped, f"{name}/")]
        files = [name for name in files if not re.search(skipped, name)]
        names += [Path(root, name).relative_to(folder).as_posix() for name in files]
    return names

def find_python() -> list:
    """Find the embedded default: the standard library and the packages of requirements.txt, without tests."""
    library = Path(sysconfig.get_paths()["stdlib"])
    found = [("python", name, library / name, False) for name in walk(library, SKIPPED)]
    for package in PACKAGES.split():
        for installed in list(importlib.metadata.distributions(name=package))[:1]:
            files = [file for file in installed.files or [] if not re.search(SKIPPED, file.as_posix())]
            found += [(package, file.as_posix(), Path(file.locate()), False) for file in files]
    return sorted(file for file in found if file[1].endswith(".py") and file[2].is_file())

def read_lines(path: Path, data: bytes, field: str) -> list[bytes]:
    """Read one field of each line of a .jsonl file."""
    texts = []
    for number, line in enumerate(data.splitlines(), 1):
        try:
            if line.strip():
                texts.append(json.loads(line)[field].encode("utf-8", "surrogatepass"))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f'line {number} of {path} is no JSON object with a text in "{field}"') from None
    return texts

def why_drop(data: bytes, filters=FILTERS) -> str | None:
    """Name the first filter that a document does not pass: why_drop(b"x = 1") -> "short" """
    text = data.decode(errors="replace")
    return next((name for name in filters if FILTERS[name](data, text)), None)

def read_documents(files: list, field: str, clean=True) -> tuple:
    """Read files: return {key: (source, text)}, {filter: what it dropped}, [source, name, hash] of each file.

    clean: apply all filters, and keep one of equal documents. A file that the user named only has to be text.
    """
    documents = {}
    dropped = {name: {"documents": 0, "bytes": 0} for name in (*FILTERS, "duplicate")}
    hashes = []
    for source, name, path, named in track(files, "reading", len(files)):
        data = path.read_bytes()
        hashes.append([source, name, hashlib.sha256(data).hexdigest()[:16]])
        lines = path.suffix == ".jsonl"
        filters = FILTERS if clean else MUST_PASS
        if named and not lines:
            filters = MUST_PASS
            check(data.strip(), f"{path} is empty")
            check(not why_drop(data, filters), f"{path} is not UTF-8 text")
        for content in read_lines(path, data, field) if lines else [data]:
            reason = why_drop(content, filters)
            text = content.decode(errors="replace")
            key = len(documents)
            if clean:  # line ends and trailing white space make no difference
                bare = "\n".join(map(str.rstrip, text.strip().splitlines()))
                key = hashlib.sha256(bare.encode()).hexdigest()
            reason = reason or ("duplicate" if key in documents else None)
            if reason:
                dropped[reason]["documents"] += 1
                dropped[reason]["bytes"] += len(content)
            else:
                documents[key] = source, text
    told = ", ".join(f"{name}: {count['documents']}" for name, count in dropped.items() if count["documents"])
    check(documents, f"no document is left to learn from ({told or 'there was no text'})")
    return documents, dropped, hashes

def split_documents(documents: dict, val_fraction: float, seed: int) -> dict:
    """Put whole documents into train or val, in an order that only their content and the seed decide."""
    if len(documents) == 1:  # cut it at the character where nanoGPT cuts tiny Shakespeare
        say("a single document: its tail becomes the validation split")
        ((source, text),) = documents.values()
        end = int(len(text) * (1 - val_fraction))
        check(0 < end < len(text), f"{len(text)} characters are too few to split")
        return {"train": [(source, text[:end])], "val": [(source, text[end:])]}
    order = sorted(documents, key=lambda key: hashlib.sha256(f"{seed} {key}".encode()).digest())
    shuffled = [documents[key] for key in order]
    sizes = np.array([len(text.encode()) for _, text in reversed(shuffled)])
    middles = sizes.cumsum() - sizes / 2  # of each document, in bytes from the end
    n = int(sum(middles < val_fraction * sizes.sum()))
    n = min(max(n, 1), len(shuffled) - 1)
    return {"train": shuffled[:-n], "val": shuffled[-n:][::-1]}

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
    algorithm: Annotated[Literal["bpe", "char"], typer.Option(help="Byte-level BPE, or characters.")] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="bpe: all ids, special tokens too; 268 or more.")] = 4096,
    pattern: Annotated[Literal["gpt2", "gpt4"], typer.Option(help="bpe: how text is cut.")] = "gpt4",
    field: Annotated[str, typer.Option(help="Field of a .jsonl line that holds the text.")] = "text",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
):
    """Learn a tokenizer from text."""
    files = find_files(inputs)
    check_plan(algorithm, vocab_size, files, [output], overwrite)
    documents, _, _ = read_documents(files, field, clean=False)
    texts = [text for _, text in documents.values()]
    tokenizer, n_tokens = train_tokenizer(texts, algorithm, vocab_size, pattern)
    tokenizer.save(output)
    n_bytes = sum(len(text.encode()) for text in texts)
    say(f"{output}: {tokenizer.n_vocab:,} ids, {n_bytes / n_tokens:.3f} bytes per token")

def encode(
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer.json, or a folder that holds one.")],
    text: Annotated[str, typer.Argument(help="The text; by default standard input, byte for byte.")] = None,
    special: Annotated[list[str], typer.Option(help="Special token that the text may spell, or: all.")] = (),
):
    """Print the ids of a text as one JSON list."""
    tok = Tokenizer.load(tokenizer)
    text = sys.stdin.buffer.read().decode(errors="surrogateescape") if text is None else text
    check(not re.search(r"[\ud800-\udfff]", text), "the text is not UTF-8")
    print(json.dumps(tok.encode(text, "all" if "all" in special else special)))

def decode(
    tokenizer: Annotated[Path, typer.Option(help="A tokenizer.json, or a folder that holds one.")],
    ids: Annotated[str, typer.Argument(help="A JSON list; by default standard input.")] = None,
):
    """Write the bytes that a JSON list of ids stands for."""
    tok = Tokenizer.load(tokenizer)
    try:
        numbers = json.loads(sys.stdin.buffer.read() if ids is None else ids)
    except ValueError:
        numbers = None
    ok = isinstance(numbers, list) and all(type(i) is int for i in numbers)
    check(ok, "the ids are not a JSON list of whole numbers")
    sys.stdout.buffer.write(tok.decode_bytes(numbers))

def prepare(
    inputs: Annotated[list[str], typer.Argument(help="File, folder, NAME=PATH; else this Python.")] = None,
    output: Annotated[Path, typer.Option(help="Folder to write; else data/ and the source's name.")] = None,
    tokenizer: Annotated[Path, typer.Option(help="Use this tokenizer.json instead of learning one.")] = None,
    algorithm: Annotated[Literal["bpe", "char"], typer.Option(help="Byte-level BPE, or characters.")] = "bpe",
    vocab_size: Annotated[int, typer.Option(help="bpe: all ids, special tokens too; 268 or more.")] = 4096,
    pattern: Annotated[Literal["gpt2", "gpt4"], typer.Option(help="bpe: how text is cut.")] = "gpt4",
    val_fraction: Annotated[float, typer.Option(help="Share of the bytes for validation, 0 to 1.")] = 0.02,
    seed: Annotated[int, typer.Option(help="Another seed gives another split and order.")] = 0,
    field: Annotated[str, typer.Option(help="Field of a .jsonl line that holds the text.")] = "text",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print meta.json, less its files.")] = False,
):
    """Turn text into a data folder: train.bin, val.bin, tokenizer.json, meta.json."""
    # 1. what can be wrong, before any work
    check(0 < val_fraction < 1, f"--val-fraction {val_fraction} is not between 0 and 1")
    tok = Tokenizer.load(tokenizer) if tokenizer else None
    check(not tok or tok.eot_id is not None, f"{tokenizer} has no {SPECIAL[0]} to end a document with")
    files = find_files(inputs) if inputs else find_python()
    output = output or Path("data") / (files[0][0] if inputs else "python")
    there = os.listdir(output) if output.exists() else []
    there = [name for name in there if not name.endswith(".new")]  # a killed save may leave these
    ours = not there or "meta.json" in there or (output / "state" / "commit.json").exists()
    check(ours, f"{output} is not empty and is no data folder: choose another --output")
    check_plan(algorithm, vocab_size, files, [output / name for name in DATA_FILES], overwrite)
    # 2. documents
    documents, dropped, hashes = read_documents(files, field)
    splits = split_documents(documents, val_fraction, seed)
    # 3. the tokenizer: merges from train alone; characters from all, or val might have one without an id
    options = {"tokenizer": tokenizer} if tokenizer else {"algorithm": algorithm}
    if not tok:
        learn_from = documents.values() if algorithm == "char" else splits["train"]
        tok, _ = train_tokenizer([text for _, text in learn_from], algorithm, vocab_size, pattern)
        options |= {"vocab-size": vocab_size, "pattern": pattern} if algorithm == "bpe" else {}
    # 4. the ids, and the account of it all
    dtype = "uint16" if tok.n_vocab <= 2**16 else "uint32"
    meta = {"dtype": dtype, "vocab_size": tok.n_vocab, "eot_id": tok.eot_id, "splits": {}}
    meta["sources"] = {source: {} for source, *_ in files}
    train_ids = encode_documents(tok, splits["train"], "train", meta)
    val_ids = encode_documents(tok, splits["val"], "val", meta)
    meta["filters"] = dropped
    options |= {"val-fraction": val_fraction, "seed": seed, "field": field}
    meta["command"] = command_line(inputs or [], options)
    meta["files_sha256"] = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
    account = json.dumps(meta | {"files": hashes if len(hashes) <= 10_000 else []}, indent=1)
    # 5. the folder
    from model import save_files  # here, since it loads torch, and the other commands have to start fast
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
        words += [f"--{name}", str(value)]
    return shlex.join(Path(w).name if Path(w).is_absolute() else w for w in words)

def show_meta(output: Path, meta: dict):
    """Print what each source gave, and what was dropped."""
    for name, split in (meta["sources"] | {f"{output}": meta["splits"]}).items():
        for part, n in split.items():
            numbers = f"{n['documents']:>9,} documents {n['bytes']:>14,} bytes {n['tokens']:>14,} tokens"
            say(f"{name:12} {part:5} {numbers}")
    say("dropped: " + ", ".join(f"{n['documents']} {name}" for name, n in meta["filters"].items()))

def check_plan(algorithm: str, vocab_size: int, files: list, outputs: list, overwrite: bool):
    """Refuse, before any work, too small a vocabulary, and an output that would replace what has to stay."""
    small = algorithm == "bpe" and vocab_size < LEAST_VOCAB
    check(not small, f"--vocab-size {vocab_size} is too small: it has to be {LEAST_VOCAB} at least")
    for path in outputs:
        free = not path.exists() or (overwrite and path.is_file())
        check(free, f"{path} exists: pass --overwrite to replace a file, or another --output")
    replaced = {path.resolve() for path in outputs}
    for _, _, path, _ in files:
        check(path.resolve() not in replaced, f"{path} is input, so it has to stay: choose another --output")

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
