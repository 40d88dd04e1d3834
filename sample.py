"""Write text with a checkpoint: streamed, in batches, in a chat, or for the programs of others over HTTP.

A language model gives a score (logit) to each token that could come next. Decoding is the choice among them,
over and over: sharpen or flatten the scores (temperature), cut off the unlikely (top-k, top-p, min-p), draw
one. Each token costs one read of all weights, so speed is memory bandwidth: a compiled step reads them at the
rate of the memory, int8 and int4 make them smaller, a batch shares the reading among its rows, and a draft
that is checked in one pass shares it among tokens. A masked model fills the gaps of a text instead. Any
Hugging Face folder of a family that model.py knows opens. Left out: beam search.

    python sample.py                                             # the newest checkpoint in out/, a new text
    python sample.py out/python --prompt "def fib(n):" --max-new-tokens 100 --temperature 0
    python sample.py out/python --num-samples 3 --seed 1 --json  # one JSON object a sample
    python sample.py out/python --prompts prompts.txt --rows 32  # a line is a prompt, a JSON object an answer
    python sample.py out/python --quantize int8 --data data/python   # smaller, and what that costs
    python sample.py out/large --draft out/python                # the small one proposes, the large decides
    python sample.py out/masked --fill "for i in <|mask|>(10):"  # a folder of `train.py --objective mlm`
    python sample.py out/sft --chat                              # talk with a folder of align.py
    python sample.py serve out/sft                               # OpenAI's API, and a page to talk
    python sample.py out/python --window 252 --max-new-tokens 9999 --ignore-eos  # on and on, in fixed memory

Top-p: Holtzman et al. 2020 (1904.09751). Top-k: Fan et al. 2018 (1805.04833). Min-p: 2407.01082. Penalty for
repetition: Keskar et al. 2019 (1909.05858). Gumbel-max: 1411.0030. Attention sinks: Xiao et al. 2023
(2309.17453). Continuous batching: Orca (Yu et al. 2022). Speculative decoding: Leviathan et al. 2023
(2211.17192). Prompt look-up: Saxena 2023. Int8 by channel: Dettmers et al. 2022 (2208.07339).
"""

import codecs
import copy
import itertools
import json
import math
import os
import queue
import select
import socket
import sys
import threading
import time
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves this folder out
from model import (  # before torch: it says how OpenMP's threads wait
    Cache, Config, Head, Linear, Tokens, Transformer, UserError, apply_rope, check, checkpoint_files, command,
    count_weights, evaluate, find_checkpoint, greedy, is_compiled_row, load_config, load_model,
    load_tokenizer, multiply_row, opt, pick_device, pick_dtype, progress, quantized_kind, read_json, reading,
    render, rope_angles, rope_frequencies, round_up, run_app, save_files, say,
)

import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file, save_file

KINDS = ("int8", "int4")  # of quantized weights

# B batch, T query length, V vocabulary, L layers, K KV heads, D head_dim.

@dataclass
class Options:
    """Hold the options of this command."""

    folder: Annotated[Path | None, typer.Argument(help="Checkpoint folder; or the newest in out/.")] = None
    prompt: Annotated[str, opt("Text", "Text to go on from (-: standard input). Empty: a new document.")] = ""
    max_new_tokens: Annotated[int, opt("Text", "Stop after so many tokens.", low=1)] = 256
    num_samples: Annotated[int, opt("Text", "Texts to write, one after the other.", low=1)] = 1
    ignore_eos: Annotated[bool, opt("Text", "Go on after the end of the text.", "--ignore-eos")] = False
    stop: Annotated[list[str] | None, opt("Text", "End before this text; may be given again.")] = None
    logprobs: Annotated[bool, opt("Text", "With --json: each token's log-probability.", "--logprobs")] = False
    prompts: Annotated[Path | None, opt("Text", "A file: a line is a prompt, or a JSON object's.")] = None
    fill: Annotated[str | None, opt("Text", "Fill a text's <|mask|>s (masked models).")] = None
    chat: Annotated[bool, opt("Text", "Talk: /help says how, Ctrl-C ends an answer.", "--chat")] = False
    json: Annotated[bool, opt("Text", "A JSON object a sample (text: without prompt).", "--json")] = False
    window: Annotated[int | None, opt("Memory", "Text without end: see so many last tokens.", low=1)] = None
    sinks: Annotated[int, opt("Memory", "Beside a --window: keep so many first tokens.", low=0)] = 4
    summaries: Annotated[int, opt("Memory", "Beside a --window: averages of older tokens.", low=0)] = 0
    temperature: Annotated[float, opt("Choice", "0: greedy, 0.5 to 1: usual, higher: wilder.", low=0)] = 0.7
    top_k: Annotated[int | None, opt("Choice", "Draw among the k likeliest tokens only.", low=1)] = None
    top_p: Annotated[float | None, opt("Choice", "Draw among the likeliest up to p; 1: all.", low=0)] = 0.9
    min_p: Annotated[float | None, opt("Choice", "Cut what is below p times the best.", low=0)] = None
    repetition_penalty: Annotated[float, opt("Choice", "1.1: less likely, what was said.", above=0)] = 1.0
    seed: Annotated[int | None, opt("Choice", "To get a text again; sample i has seed + i.", low=0)] = None
    rows: Annotated[int, opt("Speed", "Texts of --prompts at once.", low=1)] = 16
    compile: Annotated[bool | None, opt("Speed", "Faster steps after seconds to a minute; by itself for long "
                                        "texts.")] = None
    quantize: Annotated[str | None, opt("Speed", "int8 or int4: smaller weights.", one_of=KINDS)] = None
    data: Annotated[Path | None, opt("Speed", "With --quantize: data folder, to say what it costs.")] = None
    save: Annotated[Path | None, opt("Speed", "With --quantize: write the folder, no text.")] = None
    draft: Annotated[Path | None, opt("Speed", "A small model's folder: it proposes tokens.")] = None
    lookup: Annotated[bool, opt("Speed", "Propose what followed the same words before.", "--lookup")] = False
    dtype: Annotated[str, opt("Machine", "auto, fp32, bf16 or fp16 (for GPUs).")] = "auto"
    device: Annotated[str, opt("Machine", "auto, cpu, cuda or mps.")] = "auto"
    no_cache: Annotated[bool, opt("Machine", "Read the whole text for each token.", "--no-cache")] = False

    def __post_init__(self):
        """Refuse what cannot be, before anything is loaded."""
        changed = [name for name in vars(self) if getattr(self, name) != getattr(Options, name)]
        for mode, useless in USELESS.items():
            given = [f"--{name}" for name in useless if mode in changed and name in changed]
            check(not given, f"--{mode} has no use for {', '.join(given).replace('_', '-')}: leave it out.")
        if self.top_p is not None:
            check(0 < self.top_p <= 1, f"--top-p is {self.top_p}; it has to be above 0 and at most 1.")
        check((self.min_p or 0) <= 1, f"--min-p is {self.min_p}; it has to be at most 1.")
        for name, needed in NEEDS.items():
            given = any(one in changed for one in needed)
            check(name not in changed or given,
                  f"--{name} stands beside --{' or --'.join(needed)}: give that, too.")
        stray = self.window is None and {"sinks", "summaries"} & {*changed}
        check(not stray, "--sinks and --summaries stand beside a --window: give that, too.")
        if self.seed is None:
            self.seed = torch.Generator().seed() % 2**31

# What generation_config.json may ask for; beside it what changes nothing.
OTHER_SETTINGS = {"temperature": None, "top_k": None, "top_p": None, "repetition_penalty": None, "min_p": 0.0,
                  "typical_p": 1.0, "num_beams": 1, "no_repeat_ngram_size": 0, "stop_strings": None,
                  "suppress_tokens": None, "bad_words_ids": None}
CHOICE = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
MEMORY = ("window", "sinks", "summaries")
SPEED = ("rows", "compile", "draft", "lookup")
NEEDS = {"logprobs": ("json", "prompts"), "data": ("quantize",), "save": ("quantize",), "rows": ("prompts",)}
USELESS = {"fill": ("prompt", "prompts", "max_new_tokens", "num_samples", "ignore_eos", "no_cache", "stop",
                    "logprobs", *MEMORY, *CHOICE, *SPEED),
           "chat": ("prompt", "prompts", "fill", "num_samples", "ignore_eos", "no_cache", *MEMORY, "json",
                    "stop", "logprobs", "save", "draft", "lookup"),
           "prompts": ("prompt", "num_samples", "no_cache", "json", "save", "draft", "lookup", *MEMORY),
           "window": ("no_cache", "compile", "draft", "lookup"), "no_cache": ("compile", "draft", "lookup"),
           "draft": ("lookup", "logprobs"), "lookup": ("logprobs",),
           "save": ("prompt", "fill", "json", "data", "stop", "ignore_eos", "no_cache", "max_new_tokens",
                    "num_samples", *CHOICE, *MEMORY, *SPEED)}

# ---- The idea: from logits to a token. Logits (B, V) in, (B, V) out; what is cut off is -inf. --------------

def keep_top_k(logits, k: int):
    """Keep exactly the k most likely tokens, also where several are equally likely.

    >>> keep_top_k(torch.tensor([2.0, 1.0, 3.0]), 2).tolist()
    [2.0, -inf, 3.0]
    """
    best, ids = logits.topk(min(k, logits.shape[-1]))
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, best)

def keep_top_p(logits, p: float):
    """Keep the nucleus: the fewest likeliest tokens whose probability reaches p (1904.09751, eq. 2).

    A token stays when those likelier than it do not reach p yet, so the one that crosses p stays, and the
    likeliest always does. (`cumsum <= p`, often seen, drops the one that crosses; where the first token has
    more than p, that is all of them.)

    >>> keep_top_p(torch.tensor([0.2, 0.5, 0.3]).log(), 0.6).isfinite().tolist()  # 0.5 alone is not enough
    [False, True, True]
    """
    if p >= 1:
        return logits  # and the sum of all, rounded, may reach 1 too early
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    before = ranked.softmax(-1).cumsum(-1).roll(1, -1)  # the probability of all that are likelier
    before[..., 0] = -1.0
    cut = before >= p
    return logits.masked_fill(cut.scatter(-1, order, cut), -torch.inf)

def keep_min_p(logits, p: float):
    """Keep the tokens that are at least p times as likely as the likeliest (2407.01082, eq. 2).

    >>> keep_min_p(torch.tensor([0.2, 0.5, 0.3]).log(), 0.5).isfinite().tolist()
    [False, True, True]
    """
    if p == 0:
        return logits
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -torch.inf)

def penalize(logits, seen, penalty: float):
    """Divide the positive scores of tokens seen before by the penalty, multiply the others (1909.05858, 4.1).

    seen: bool (B, V).

    >>> penalize(torch.tensor([2.0, -1.0, 3.0]), torch.tensor([True, True, False]), 2.0).tolist()
    [1.0, -2.0, 3.0]
    """
    lower = torch.where(logits > 0, logits / penalty, logits * penalty)
    return torch.where(seen, lower, logits)

def draw(logits, generator=None):
    """Draw a token with probability softmax(logits): (B, V) -> (B,). generator: one, or one for each row.

    Gumbel-max: the argmax of logits + Gumbel noise. No probabilities are summed up, and a GPU is not waited
    for; the noise is the same whatever the logits are, so texts of the same seed part late.
    """
    exponential = torch.empty_like(logits)
    if isinstance(generator, list):  # a text does not depend on its neighbours
        for row, own in zip(exponential, generator, strict=True):
            row.exponential_(generator=own)
    else:
        exponential.exponential_(generator=generator)
    return (logits - exponential.clamp_(min=1e-30).log()).argmax(-1)

def sample(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0, n_vocab=None,
           seen=None, generator=None):
    """Choose the next tokens, (B, V) -> ids (B,); partial(sample, top_p=0.9) is a `pick` for generate."""
    if temperature == 0 and repetition_penalty == 1.0:
        return greedy(logits[..., :n_vocab])
    logits = adjust(logits, temperature, top_k, top_p, min_p, repetition_penalty, n_vocab, seen)
    return draw(logits, generator)

def adjust(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=1.0, n_vocab=None,
           seen=None):
    """Make of a model's logits (B, V) those that are drawn from.

    In this order: no id at n_vocab or above (they only round the vocabulary up), the penalty on the ids seen
    (bool (B, V)), temperature (0: the best alone), top-k, min-p, then top-p of what is left. None is off.
    """
    logits = logits[..., :n_vocab]
    if repetition_penalty != 1.0 and seen is not None:
        logits = penalize(logits, seen[..., :n_vocab], repetition_penalty)
    if temperature == 0:
        return keep_top_k(logits, 1)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the best at 0: nothing overflows
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if min_p is not None:
        logits = keep_min_p(logits, min_p)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return logits

@dataclass(frozen=True)
class Choice:
    """Hold how the tokens of a text are chosen; see `adjust`."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    n_vocab: int | None = None

    def seen(self, texts: list[list[int]], logits):
        """Mark the ids of texts -> bool (B, V), or None where nobody asks."""
        if self.repetition_penalty == 1.0:
            return None
        seen = torch.zeros(logits.shape, dtype=torch.bool)
        for row, ids in zip(seen, texts, strict=True):
            row[ids] = True
        return seen.to(logits.device)

# ---- A cache that forgets: text without end in constant memory ---------------------------------------------

class RollingCache(Cache):
    """Keep the last `window` tokens of a text without end, and what helps beside them, in constant memory.

    A token costs the same however long the text is. The slots are [sinks | summaries | ring]:

    ring       A new token takes the slot of the oldest. If all layers of a model have a window (Mistral) and
               `window` is no smaller, the logits are exactly the full cache's; sinks and summaries, which no
               layer would see, are left out.
    sinks      The first tokens stay: heads of large models leave there the attention that they have no use
               for, and without those tokens the scores fall apart (2309.17453).
    summaries  Tokens that leave the window are averaged, `each` consecutive ones in an entry. When all
               entries are full, neighbours are merged and `each` doubles: all that was forgotten is covered
               evenly. Keys are averaged as if all stood at position 0; an entry weighs as one token.

    Sinks and summaries stand directly before the window (3.2): no query is further from a key than window +
    sinks + summaries, so the text may go on beyond the model's context. RoPE is relative: a kept key is
    rotated on as the window moves, always from the original, so no error adds up.

    Up to `block` tokens may be read at once, T say, and no more than `window`. Without sinks and summaries
    each sees exactly `window` tokens: the ring is longer by block - 1. With them the T oldest tokens make
    room first, as in the paper's code: the last of the block sees `window` tokens, the first T - 1 fewer.
    Rows have equal lengths.
    """

    limit = 4096  # positions stay below limit + slots, so that their float32 angles stay exact

    def __init__(self, config: Config, batch: int, window: int, sinks: int = 0, summaries: int = 0,
                 block: int = 1, device=None, dtype=None):
        check(config.position != "learned", "A model with learned positions has none for a text without end.")
        check(config.rereads_at is None, "LongRoPE rotates a long text otherwise: it cannot roll on.")
        check(not config.global_tokens, "A model with global tokens looks back to them: it cannot roll on.")
        if all(w is not None and w <= window for w in config.windows):
            window, sinks, summaries = max(config.windows), 0, 0
        self.sinks, self.summaries, self.block = sinks, summaries, min(block, window)
        self.fixed = sinks + summaries  # slots beside the ring
        self.ring = window if self.fixed else window + self.block - 1
        super().__init__(config, batch, self.fixed + self.ring, device, dtype)
        self.window = window + self.fixed
        self.ragged = True  # slots are in no order: the mask goes by their positions
        self.read = 0  # tokens of the text; n is the next one's position, which is turned back at times
        self.each = 1  # tokens in a full summary
        self.config = config
        keys, values = self.parts
        self.kept = torch.zeros_like(keys[..., : self.fixed, :])  # sinks as first rotated, summaries at 0
        self.sums = [torch.zeros_like(x[..., :summaries, :], dtype=torch.float32) for x in (keys, values)]
        local = map(config.is_local, range(config.n_layer))
        frequencies = torch.stack([rope_frequencies(config, keys, here)[0] for here in local])
        self.frequencies = frequencies.view(config.n_layer, 1, 1, 1, -1)  # (L, 1, 1, 1, R/2)

    @property
    def parts(self):
        """Give what is cached of keys and is rotated, then the other part; with MLA the former is v."""
        return (self.v, self.k) if self.config.kv_rank else (self.k, self.v)

    def rotate(self, keys, by):  # (L, B, K, S, D), (S,) -> (L, B, K, S, D)
        """Rotate keys on by so many positions, each layer's with its own frequencies."""
        if self.config.position != "rope":
            return keys
        cos, sin = rope_angles(by, self.frequencies)  # (L, 1, 1, S, 1, R/2)
        return apply_rope(keys, cos.squeeze(-2), sin.squeeze(-2))

    def claim(self, positions) -> None:
        """Take the slots of the oldest tokens for T new ones at consecutive positions (T,)."""
        check(positions.dim() == 1, "A rolling cache has rows of equal length: leave positions out.")
        T = positions.shape[0]
        check(T <= self.block, f"This cache takes {self.block} tokens at once, not {T}.")
        i = torch.arange(self.read, self.read + T, device=positions.device)
        self.slots = torch.where(i < self.sinks, i, self.fixed + (i - self.sinks) % self.ring)
        self.read += T
        self.n += T
        gone = self.read - self.sinks - self.ring  # tokens that have left the ring when this block is in it
        if gone > 0 and self.fixed:
            if gone <= T:  # the first ones: no sink was rotated on yet
                self.kept[..., : self.sinks, :] = self.parts[0][..., : self.sinks, :]
            if self.summaries:
                self.average(self.slots[-gone:], gone)
            self.place(self.n - self.ring, gone)
        self.positions[:, self.slots] = positions

    def average(self, slots, gone: int) -> None:
        """Add what these slots hold to the summaries, which then cover `gone` tokens."""
        keys, values = self.parts
        number = torch.arange(self.summaries, device=slots.device)
        while gone > self.summaries * self.each:  # all are full: merge neighbours
            self.sums = [torch.zeros_like(x).index_add_(3, number // 2, x) for x in self.sums]
            self.each *= 2
        entry = torch.arange(gone - len(slots), gone, device=slots.device) // self.each
        at_zero = self.rotate(keys[..., slots, :], -self.positions[0, slots])
        self.sums[0].index_add_(3, entry, at_zero.float())
        self.sums[1].index_add_(3, entry, values[..., slots, :].float())
        counts = (gone - self.each * number).clamp(1, self.each)[:, None]
        self.kept[..., self.sinks :, :] = self.sums[0] / counts
        values[..., self.sinks : self.fixed, :] = self.sums[1] / counts

    def place(self, first: int, gone: int) -> None:
        """Let sinks and summaries stand directly before position `first`, where the window begins."""
        used = self.sinks + min(self.summaries, math.ceil(gone / self.each))
        number = torch.arange(self.fixed, device=self.k.device)
        place = first - used + number
        self.positions[:, : self.fixed] = place.where(number < used, -1)
        by = torch.where(number < self.sinks, first - used, place)  # sink i was rotated to i already
        self.parts[0][..., : self.fixed, :] = self.rotate(self.kept, by)

    def update(self, layer: int, k, v):
        """Write a layer's keys and values (B, K, T, D) into the claimed slots -> all slots (B, K, S, D)."""
        self.k[layer, :, :, self.slots] = k
        self.v[layer, :, :, self.slots] = v
        seen = self.k[layer], self.v[layer]
        if layer == len(self.k) - 1 and self.n >= self.limit + self.span:
            self.turn_back()
        return seen

    def turn_back(self) -> None:
        """Lower all positions, the next one to the number of slots; all distances stay."""
        by = self.n - self.span
        keys = self.parts[0].clone()  # the last layer is still reading the old ones
        back = torch.full((self.ring,), -by, device=keys.device)
        keys[..., self.fixed :, :] = self.rotate(keys[..., self.fixed :, :], back)
        self.k, self.v = (self.k, keys) if self.config.kv_rank else (keys, self.v)
        self.positions[:, self.fixed :] -= by  # sinks and summaries are placed anew for each block
        self.n -= by

    def rewind(self, n: int) -> None:
        """Go back to the first n tokens, as long as none of them was overwritten; 0: forget all."""
        if n == self.read:
            return
        check(n == 0 or self.read <= self.sinks + self.ring, "What has left the window cannot be had back.")
        self.positions[self.positions >= n] = -1
        self.read = self.n = n
        self.each = 1
        self.sums = [torch.zeros_like(x) for x in self.sums]

    def select(self, rows) -> None:
        """Keep these rows, in this order and as often as they are named."""
        super().select(rows)
        self.kept = self.kept[:, rows]
        self.sums = [x[:, rows] for x in self.sums]

# ---- Smaller weights ---------------------------------------------------------------------------------------

class Int8(Linear):
    """Hold a matrix as int8 (N, K) and a scale for each of its rows: weight = int8 * scale."""

    def add_buffers(self, N: int, K: int) -> None:
        """Take the places of weight and scales, on the meta device."""
        self.register_buffer("weight", torch.empty(N, K, dtype=torch.int8, device="meta"))
        self.register_buffer("scales", torch.empty(N, device="meta"))

    @staticmethod
    def pack(weight) -> tuple:
        """Round each row to 255 steps, the largest at 127 -> int8 (N, K), scales (N,)."""
        scales = (weight.float().abs().amax(1) / 127).clamp(min=1e-12)
        return (weight.float() / scales[:, None]).round().to(torch.int8), scales

    def forward(self, x):  # (..., K) -> (..., N)
        if is_compiled_row(x):
            y = multiply_row(x, self.weight) * self.scales
        elif x.is_cpu and x.dtype == torch.bfloat16 and x.numel() <= 8 * x.shape[-1]:
            scales = self.scales.to(x.dtype).as_strided(self.scales.shape, (1,))  # the kernel wants a buffer
            y = torch._weight_int8pack_mm(x.flatten(0, -2), self.weight, scales)
            y = y.view(*x.shape[:-1], -1)
        else:
            y = F.linear(x, self.weight.to(x.dtype)) * self.scales
        return (y if self.bias is None else y + self.bias).to(x.dtype)

class Int4(Linear):
    """Hold a matrix as 4-bit numbers, with scale and zero for each `group` of a row's neighbours.

    weight = (q - 8) * scale + zero, with q from 0 to 15. On disk two q's share a byte, the first one above
    (N, K/2); `arrange` brings them into the order that this machine's kernel reads. Products are bfloat16.
    """

    group = 64

    def add_buffers(self, N: int, K: int) -> None:
        """Take the places of weight and scales, on the meta device."""
        self.width = N
        self.register_buffer("weight", torch.empty(N, K // 2, dtype=torch.uint8, device="meta"))
        self.register_buffer("scales", torch.empty(K // self.group, N, 2, device="meta"))

    @classmethod
    def pack(cls, weight) -> tuple:
        """Round each group to 16 steps from its smallest to its largest -> (N, K/2), (K/group, N, 2)."""
        groups = weight.float().view(len(weight), -1, cls.group)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp(min=1e-8)
        q = ((groups - low) / scale).round().clamp(0, 15).to(torch.uint8).view(len(weight), -1)
        scales = torch.cat((scale, low + 8 * scale), -1).transpose(0, 1).contiguous()
        return q[:, ::2] << 4 | q[:, 1::2], scales

    def arrange(self) -> None:
        """Bring weight and scales into the form that the kernel wants."""
        self.scales = self.scales.to(torch.bfloat16)
        if self.weight.is_cuda:
            tiles = 8 if self.weight.shape[1] % 64 == 0 else 4  # of 16 columns, read at once
            self.weight = torch._convert_weight_to_int4pack(self.weight, tiles)
        else:
            q = torch.stack((self.weight >> 4, self.weight & 15), -1).flatten(1).int()
            self.weight = torch._convert_weight_to_int4pack_for_cpu(q, 1)

    def forward(self, x):  # (..., K) -> (..., N)
        multiply = torch._weight_int4pack_mm if x.is_cuda else torch._weight_int4pack_mm_for_cpu
        y = multiply(x.flatten(0, -2).to(torch.bfloat16), self.weight, self.group, self.scales)
        y = y.view(*x.shape[:-1], self.width).to(x.dtype)
        return y if self.bias is None else y + self.bias

class Int8Head(Head, Int8):
    """Multiply by an int8 output matrix, then do what `Head` does to the logits."""

class Quantizer:
    """Quantize a model's matrices while load_model reads them, so that the whole is never in memory.

    The embedding stays as it is: a look-up reads one row. The output matrix is a copy of its own, always in
    int8: it is the largest read of a small model, and its errors go straight into the logits. Matrices that
    int4's kernels do not take (K no multiple of the group, N of 32) are int8; a router's, and what latent
    attention folds into its queries, stay. (Experts are tensors of three dimensions and stay, too.)
    """

    def __init__(self, kind: str):
        self.kind = kind
        self.itemsize = {"int8": 1.1, "int4": 0.7}[kind]  # bytes a weight, with scales and the output matrix

    def class_of(self, name: str, module) -> type | None:
        """Return the class that holds this module's matrix, or None where it stays as it is."""
        if name == "lm_head":
            return Int8Head
        if type(module) is not Linear or name.endswith(("kv_b_proj", "score")):
            return None
        fits = module.in_features % Int4.group == 0 and module.out_features % 32 == 0
        return Int4 if self.kind == "int4" and fits else Int8

    def prepare(self, model: Transformer) -> None:
        """Change the classes of the modules of a model on the meta device."""
        self.tied = model.config.tie
        model.config = model.config.replace(tie=False)
        self.classes = {}
        for name, module in model.named_modules():
            kind = self.class_of(name, module)
            if kind is not None:
                self.classes[f"{name}.weight"] = kind
                N, K = module.weight.shape
                del module.weight
                module.__class__ = kind
                module.add_buffers(N, K)

    def pack(self, name: str, weight, dtype) -> dict:
        """Quantize a tensor -> what the model holds of it, by name."""
        if name == "embed_tokens.weight" and self.tied:
            return {name: weight.to(dtype), **self.pack("lm_head.weight", weight, dtype)}
        kind = self.classes.get(name)
        if kind is None:
            return {name: weight.to(dtype)}
        q, scales = kind.pack(weight)
        return {name: q, name.removesuffix("weight") + "scales": scales}

def open_model(folder: Path, device, dtype, kind: str | None = None) -> Transformer:
    """Load a model; kind: int8 or int4, made while it is read, or what a folder of --save holds already."""
    hf = read_json(folder / "config.json")
    saved = quantized_kind(hf) if isinstance(hf, dict) else None
    check(saved in (None, kind) or kind is None, f"{folder} holds {saved} weights: not {kind}.")
    kind = saved or kind
    if kind is None:
        return load_model(folder, device, dtype)
    check(kind in KINDS, f"{folder}/config.json names weights of a kind {kind!r}, which is not known.")
    quantizer = Quantizer(kind)
    if saved is None:
        model = load_model(folder, device, dtype, quantizer)
    else:
        with torch.device("meta"):
            model = Transformer(load_config(folder, quantized=True))
        quantizer.prepare(model)
        with reading(folder / "model.safetensors"):
            found = load_file(folder / "model.safetensors", str(device))
        exact = dict(model.named_buffers())  # quantized weights, scales, the routers' biases
        expected = model.state_dict()
        wrong = found.keys() ^ expected.keys()
        wrong |= {name for name in found.keys() & expected.keys() if found[name].shape != expected[name].shape
                  or (name in exact and found[name].dtype != exact[name].dtype)}
        names = ", ".join(sorted(wrong)[:1])
        check(not wrong, f"{folder}/model.safetensors does not fit its config.json ({names}).")
        found = {name: x if name in exact else x.to(dtype) for name, x in found.items()}
        model.load_state_dict(found, assign=True)
    for module in model.modules():
        if isinstance(module, Int4):
            module.arrange()
    return model.eval()

def save_quantized(source: Path, folder: Path, kind: str) -> None:
    """Write a folder with quantized weights, which this script opens again."""
    check(not (folder / "config.json").exists(), f"{folder} holds a checkpoint already: --save elsewhere.")
    config = load_config(source)
    model = load_model(source, "cpu", torch.bfloat16, Quantizer(kind))
    files = checkpoint_files(config, source / "tokenizer.json", "bfloat16")
    hf = json.loads(files["config.json"]) | {"quantization_config": {"quant_method": "octavo", "kind": kind}}
    files["config.json"] = json.dumps(hf, indent=2) + "\n"
    files["model.safetensors"] = lambda path: save_file(model.state_dict(), path, {"format": "pt"})
    save_files(folder, files)
    say(f"{folder}: {kind}, {bytes_of(model) / 1e6:.1f} MB of weights")

def bytes_of(model) -> int:
    """Count the bytes of a model's weights, shared ones once."""
    return sum({x.data_ptr(): x.nbytes for x in (*model.parameters(), *model.buffers())}.values())

def say_cost(folder: Path, model, data: Path, device, dtype) -> None:
    """Print bytes and bits per byte of a quantized model beside those of the folder as it is."""
    tokens = Tokens(data, "val")
    check(tokens.vocab_size <= model.config.vocab_size, f"{data} was made with another tokenizer.")
    T = min(model.config.seq_len, 1024)
    plain = load_model(folder, device, dtype)
    rows = []
    for one in (plain, model):
        rows.append((bytes_of(one), evaluate(one, tokens, T, limit=200_000)["val_bpb"]))
    (before, bpb), (after, quantized_bpb) = rows
    say(f"weights {before / 1e6:.1f} -> {after / 1e6:.1f} MB; bits per byte {bpb:.4f} -> {quantized_bpb:.4f} "
        f"({(quantized_bpb / bpb - 1) * 100:+.2f} %) on {data}")

# ---- A cache whose rows live by themselves, and the step that is compiled ----------------------------------

class RowCache(Cache):
    """Hold texts that begin and end by themselves: the token at position p of a row is in its slot p.

    What a row held before needs no erasing: no query sees a slot beyond its own position. Each layer has
    tensors of its own, which a compiled step writes in place. A pass sees a `part`: some rows, some slots.
    """

    def __init__(self, config: Config, rows: int, slots: int, device=None, dtype=None):
        heads, *widths = config.cached
        self.slots = slots
        # never all of the slots are read: to the compiler a whole tensor has another shape than a part
        shapes = [(rows, heads, round_up(slots) + 64, width) for width in widths]
        self.whole = [[torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
                      for shape in shapes]

    def part(self, rows: slice | list[int], span: int, ragged: bool = True) -> "RowCache":
        """View these rows' first `span` slots; a list of rows is copied. ragged: unequal positions."""
        part = copy.copy(self)
        part.k, part.v = ([x[rows, :, :span] for x in layers] for layers in self.whole)
        part.positions = torch.arange(span, device=part.k[0].device).expand(len(part.k[0]), span)
        part.ragged = ragged
        part.n = span
        if ragged:
            for x, dim in [(part.positions, 1), *((x, 2) for x in (*part.k, *part.v))]:
                torch._dynamo.maybe_mark_dynamic(x, dim)
        return part

    def write_back(self, rows: list[int], part: "RowCache") -> None:
        """Write back a part that is a copy."""
        for whole, own in zip(self.whole, (part.k, part.v), strict=True):
            for layer, x in zip(whole, own, strict=True):
                layer[rows, :, : part.span] = x

    def claim(self, positions) -> None:
        """Note where the keys and values of this pass go: positions (T,) or (B, T)."""
        self.at = positions.expand(self.positions.shape[0], -1)

    def update(self, layer: int, k, v):
        """Write keys and values (B, K, T, D) into their slots -> all that the pass may see."""
        rows = torch.arange(self.at.shape[0], device=self.at.device)[:, None]
        self.k[layer][rows, :, self.at] = k.transpose(1, 2)
        self.v[layer][rows, :, self.at] = v.transpose(1, 2)
        return self.k[layer], self.v[layer]

    def rewind(self, n: int) -> None:
        """Forget all but the first n tokens: nothing to do, as later ones are written over."""

ROOM = 2**30  # bytes of matrices up to which a step has copies: a larger model may fill the memory

class Step:
    """Read the next tokens of some rows, ids (B, T) at positions (B, T) -> logits (B, T, V), float32.

    compiled: as one piece of code. On a CPU what reads several tokens has code of its own, which is frozen:
    the compiler keeps a copy of each matrix in the order in which a product of so many rows reads it, 1.3 to
    2 times as fast. So a model that has a Step keeps its classes, its dtype and its weights. On CUDA kernels
    are recorded once for each shape and replayed, since starting them one by one takes longer than they do.
    """

    def __init__(self, model, compiled: bool):
        self.model = model
        self.compiled = compiled
        weight = next(model.parameters())
        self.is_cuda = weight.is_cuda
        matrices = [module for module in model.modules() if isinstance(module, Linear)]
        small = sum(m.in_features * m.out_features for m in matrices) * weight.itemsize <= ROOM
        self.frozen = compiled and weight.device.type == "cpu" and small and not model.config.n_expert
        self.run_one = self.compile() if compiled else self.forward
        if self.frozen:
            self.run_more = self.compile()
        self.graphs = {}

    def forward(self, ids, positions, cache):
        logits, _ = self.model(ids, positions=positions, cache=cache)
        return logits.float()

    def compile(self):
        """Compile forward for this model alone.

        The compiler would check at each call that no module has changed, which takes longer than a small
        model does. These checks are left out. They also tell models apart, as the compiler keeps code with
        the function that it was made of; so each code is made of a copy of the function. (Experts have
        compiled parts of their own, which models share: they keep the checks.)
        """
        options = {"cpp.enable_floating_point_contract_flag": "fast"}  # on a CPU: x * y + z as one operation
        if self.model.config.n_expert:
            return torch.compile(self.forward, dynamic=False, options=options)
        options["guard_filter_fn"] = torch.compiler.skip_guard_on_all_nn_modules_unsafe
        options["size_asserts"] = False  # nor are the weights' shapes looked at in each call
        own = types.FunctionType(Step.forward.__code__.replace(), globals())  # replace() copies the code
        return torch.compile(types.MethodType(own, self), fullgraph=True, dynamic=False, options=options)

    def run(self, ids, positions, cache):
        """Run the code for so many tokens."""
        if ids.numel() == 1 or not self.frozen:
            return self.run_one(ids, positions, cache)
        with torch._inductor.config.patch(freezing=True):  # (as an option it would come too late)
            return self.run_more(ids, positions, cache)

    @torch.inference_mode()
    def __call__(self, ids, positions, cache):
        try:
            return self.replay(ids, positions, cache)
        except Exception as error:  # no C++ compiler on this machine, or one that fails
            if not self.compiled or isinstance(error, (torch.OutOfMemoryError, UserError)):
                raise
            if self.frozen and ids.numel() > 1:  # without copies it may do
                self.frozen = False
                return self(ids, positions, cache)
            reason = str(error).strip().partition("\n")[0]
            say(f"the step is not compiled: {reason}", style="yellow", markup=False)
            self.compiled = self.frozen = False
            self.run_one = self.forward
            return self.run(ids, positions, cache)

    def replay(self, ids, positions, cache):
        """Run the step; on CUDA replay its record, made at the first pass of this shape."""
        if not (self.compiled and self.is_cuda) or self.model.config.position == "learned":
            return self.run(ids, positions, cache)
        key = (ids.shape, cache.k[0].data_ptr(), cache.span)
        if key not in self.graphs:
            self.graphs[key] = self.record(ids, positions, cache)
        graph, inputs, logits = self.graphs[key]
        inputs[0].copy_(ids)
        inputs[1].copy_(positions)
        graph.replay()
        return logits.clone()

    def record(self, ids, positions, cache):
        """Record a pass as a CUDA graph -> the graph, its inputs, its result."""
        inputs = (ids.clone(), positions.clone())
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # kernels are compiled, workspaces taken
                self.run(*inputs, cache)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.run(*inputs, cache)
        return graph, inputs, logits

    def span(self, n: int, limit: int) -> int:
        """Round a number of slots up: few shapes on CUDA, where each is recorded; else 16 at a time."""
        if self.is_cuda:
            return min(max(256, 1 << (n - 1).bit_length()), round_up(limit))
        return max(64, round_up(n, 16))

# ---- Many texts at once ------------------------------------------------------------------------------------

@dataclass(eq=False)
class Request:
    """Hold a text that the engine is to write, and what it has written."""

    ids: list[int]
    max_new_tokens: int
    choice: Choice = Choice()
    seed: int = 0
    stop: frozenset = frozenset()  # ids that end the text
    logprobs: int | None = None  # so many of the likeliest tokens are reported beside the chosen one
    new: list[int] = field(default_factory=list)
    reports: list[dict] = field(default_factory=list)  # of each new token, where logprobs were asked for
    read: int = 0  # tokens whose keys and values are in the cache
    offset: int = 0  # characters of the tokens that an answer has reported
    finish: str | None = None  # "stop", "length" or "cancelled"

    @property
    def unread(self) -> int:
        return len(self.ids) + len(self.new) - self.read

    def text(self, end: int) -> list[int]:
        """Return the tokens from the first unread one up to `end`."""
        prompt = len(self.ids)
        return self.ids[self.read : end] + self.new[max(0, self.read - prompt) : max(0, end - prompt)]

class Engine:
    """Write many texts at once, each in a row of a batch: continuous batching (Orca: Yu et al. 2022).

    A step admits waiting texts to the free rows, reads a piece of the prompts, writes a token of each text
    whose prompt is read, and frees the rows of those that have ended. So a short text waits for no long one,
    and a long prompt holds up the others for a piece only.
    """

    def __init__(self, model, rows: int, slots: int, compiled: bool = False, piece: int = 512):
        weight = next(model.parameters())
        self.model = model.eval()
        self.device = weight.device
        self.step_rows = Step(model, compiled)
        self.cache = RowCache(model.config, rows, slots, self.device, model.compute_dtype or weight.dtype)
        self.piece = piece  # tokens of prompts that a step reads while others write
        self.waiting: list[Request] = []
        self.running: list[Request | None] = [None] * rows
        self.held: list[list[int]] = [[] for _ in range(rows)]  # what a free row still has in the cache
        self.part = (None, None)

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or any(self.running)

    def warm_up(self) -> None:
        """Compile what is going to run: the step of all rows, and that of a text alone."""
        if self.step_rows.compiled:
            say("compiling the step: seconds to a minute", style="dim")
            for rows in sorted({1, len(self.running)}):
                for _ in range(rows):
                    self.submit(Request([0], 70))  # past a part of 64 slots: the next one has another shape
                while self.busy:
                    self.step()

    def submit(self, request: Request) -> Request:
        """Put a text into the queue, or refuse it."""
        check(request.ids, "A prompt needs at least one token.")
        have = self.cache.slots - len(request.ids)
        check(have > 0, f"A prompt of {len(request.ids)} tokens leaves no room in a context of "
              f"{self.cache.slots}: say it shorter.")
        request.max_new_tokens = min(request.max_new_tokens, have)
        known(request.ids, self.model.config)
        request.generator = torch.Generator(self.device).manual_seed(request.seed)
        self.waiting.append(request)
        return request

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Go on by a token -> the texts that have one more."""
        self.retire()
        self.admit()
        self.read_prompts()
        written = self.write()
        self.retire()
        return written

    def admit(self) -> None:
        """Give each free row to the next text; one that begins as the row's last text did reads the rest."""
        self.waiting = [request for request in self.waiting if request.finish is None]
        free = [row for row, request in enumerate(self.running) if request is None]
        while free and self.waiting:
            request = self.waiting.pop(0)
            same = {row: common_start(self.held[row], request.ids[:-1]) for row in free}
            row = max(free, key=lambda row: (same[row], -len(self.held[row])))
            request.read = 0 if self.model.config.rereads_at is not None else same[row]
            self.running[row] = request
            self.held[row] = []
            free.remove(row)

    def read_prompts(self) -> None:
        """Read of the prompts all but the last token; if others are writing, a piece."""
        writing = any(request and request.unread == 1 for request in self.running)
        left = self.piece if writing else 8 * self.piece
        border = self.model.config.rereads_at
        for row, request in enumerate(self.running):
            if request and border is not None and request.read <= border < request.read + request.unread:
                request.read = 0  # beyond the border LongRoPE turns all keys otherwise: at once, the last too
                self.read({row: request.unread})
                request.read -= 1
        counts = {}
        unread = sorted((r.unread - 1, row) for row, r in enumerate(self.running) if r and r.unread > 1)
        for i, (count, row) in enumerate(unread):  # short ones whole; what they leave is the long ones'
            counts[row] = min(count, max(1, left // (len(unread) - i)))
            left -= counts[row]
        while counts:
            longest = max(counts.values())
            together = {row: counts[row] for row in sorted(counts) if 2 * counts[row] >= longest}
            self.read(together)
            counts = {row: count for row, count in counts.items() if row not in together}

    def read(self, counts: dict[int, int]) -> None:
        """Read the next tokens of some rows' texts, so many of each, in one pass."""
        rows = list(counts)
        longest = max(counts.values())
        texts, starts, ends = [], [], []
        for row, count in counts.items():
            request = self.running[row]
            starts.append(request.read)
            ends.append(request.read + count)
            texts.append(request.text(request.read + count) + [0] * (longest - count))
            request.read += count
        positions = torch.tensor(starts)[:, None] + torch.arange(longest)
        # zeros behind a shorter text go into the slot of its next token, which will write over them
        positions = positions.minimum(torch.tensor(ends)[:, None]).to(self.device)
        ragged = len({*starts}) > 1 or len({*ends}) > 1
        span = max(ends) + 1 if ragged else ends[0]
        consecutive = rows[-1] - rows[0] == len(rows) - 1
        part = self.cache.part(slice(rows[0], rows[-1] + 1) if consecutive else rows, span, ragged)
        self.model(torch.tensor(texts, device=self.device), positions=positions if ragged else positions[0],
                   cache=part, output="hidden")
        if not consecutive:
            self.cache.write_back(rows, part)

    def write(self) -> list[Request]:
        """Write a token of each text whose prompt is read."""
        ready = [row for row, request in enumerate(self.running) if request and request.unread == 1]
        if not ready:
            return []
        first, end = (ready[0], ready[0] + 1) if len(ready) == 1 else (0, len(self.running))
        # a row that does not write puts what is ignored behind what it holds, or forgets to make room for it
        requests = [self.running[row] for row in ready]
        longest = max(request.read for request in self.running[first:end] if request)
        span = self.step_rows.span(longest + 1, self.cache.slots)
        last, at = [], []
        for row in range(first, end):
            request = self.running[row]
            self.held[row] = self.held[row][: span - 1]
            at.append(request.read if request else len(self.held[row]))
            last.append(request.text(request.read + 1)[0] if request in requests else 0)
        if self.part[0] != (first, end, span):
            self.part = ((first, end, span), self.cache.part(slice(first, end), span))
        ids = torch.tensor(last, device=self.device)[:, None]
        positions = torch.tensor(at, device=self.device)[:, None]
        logits = self.step_rows(ids, positions, self.part[1])[:, 0]  # (B, V)
        if len(ready) < end - first:
            logits = logits[[row - first for row in ready]]
        self.choose(logits, requests)
        return requests

    def choose(self, logits, requests: list[Request]) -> None:
        """Choose a token for each text, those with the same settings together; note where a text ends."""
        check(math.isfinite(logits.sum()), NOT_FINITE)
        tokens = {}
        for choice in {request.choice for request in requests}:
            rows = [i for i, request in enumerate(requests) if request.choice == choice]
            some = logits if len(rows) == len(requests) else logits[rows]
            seen = choice.seen([requests[i].ids + requests[i].new for i in rows], some)
            generators = [requests[i].generator for i in rows]
            chosen = sample(some, **vars(choice), seen=seen, generator=generators)
            tokens |= zip(rows, chosen.tolist(), strict=True)
        for i, request in enumerate(requests):
            token = tokens[i]
            request.read += 1
            request.new.append(token)
            if request.logprobs is not None:
                request.reports.append(report(logits[i, : request.choice.n_vocab], token, request.logprobs))
            if token in request.stop:
                request.finish = "stop"
            elif len(request.new) >= request.max_new_tokens:
                request.finish = "length"

    def retire(self) -> None:
        """Free the rows of texts that have ended; what they hold may be another text's beginning."""
        for row, request in enumerate(self.running):
            if request and request.finish is not None:
                self.held[row] = (request.ids + request.new)[: request.read]
                self.running[row] = None

def common_start(a: list[int], b: list[int]) -> int:
    """Count the tokens that two texts begin with alike.

    >>> common_start([1, 2, 3], [1, 2, 4, 5])
    2
    """
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

def report(logits, token: int, top: int) -> dict:
    """Report a token's log-probability, and the likeliest others', before temperature and cuts."""
    logprobs = logits.float().log_softmax(-1)
    best, ids = logprobs.topk(min(top, len(logprobs)))
    return {"id": token, "logprob": float(logprobs[token]),
            "top": list(zip(ids.tolist(), best.tolist(), strict=True))}

# ---- A text being written ----------------------------------------------------------------------------------

class Reader:
    """Read one text with a model: with a cache each token once, without one the whole text every time.

    window, sinks, summaries: of a RollingCache, for a text without end, whose ids are not kept either.
    step, slots: a compiled Step, for texts of so many tokens; it reads one token or `width` at a time.
    """

    def __init__(self, model, cached: bool = True, window: int | None = None, sinks=0, summaries=0,
                 step: Step | None = None, slots: int = 0, width: int = 1):
        weight = next(model.parameters())
        self.model = model
        self.step = step
        self.width = width
        self.ids = torch.empty((1, 0), dtype=torch.int64, device=weight.device)  # the text so far
        dtype = model.compute_dtype or weight.dtype
        self.cache = Cache(model.config, 1, 0, weight.device, dtype) if cached else None
        self.long = False  # is what the cache holds rotated as a text beyond LongRoPE's border?
        self.rolls = window is not None
        if self.rolls:  # short blocks: a block's first token sees less
            self.cache = RollingCache(model.config, 1, window, sinks, summaries, max(1, window // 8),
                                      weight.device, dtype)
        elif step is not None:
            self.cache = RowCache(model.config, 1, slots, weight.device, dtype)

    @torch.inference_mode()
    def read(self, ids, output: str = "last"):
        """Read ids (1, T) behind the text so far -> the logits of the next token (1, V), float32.

        output: "logits" returns those behind each of them, (T, V).
        """
        if self.rolls:
            for block in ids.split(self.cache.block, dim=1):
                logits, _ = self.model(block, cache=self.cache, output="last")
            return logits[:, -1].float()
        count = ids.shape[1]
        text = torch.cat((self.ids, ids), dim=1)
        border = self.model.config.rereads_at
        long = border is not None and text.shape[1] > border
        if long != self.long and self.cache is not None:
            self.rewind(0)
            ids = text
        self.long = long
        if self.step is not None:
            logits = self.read_rows(ids, text.shape[1], output)
        else:
            if self.cache is not None and text.shape[1] > self.cache.positions.shape[1]:
                self.cache.grow(ids.shape[1] + 255)  # in blocks, since all of it is moved
            logits, _ = self.model(text if self.cache is None else ids, cache=self.cache, output=output)
        self.ids = text
        return logits[0, -count:].float() if output == "logits" else logits[0, -1:].float()

    def read_rows(self, ids, end: int, output: str):
        """Read with the compiled step where there is one of this width, else as a prompt."""
        positions = torch.arange(end - ids.shape[1], end, device=ids.device)
        if ids.shape[1] in (1, self.width):
            span = self.step.span(end, self.cache.slots)
            return self.step(ids, positions[None], self.cache.part(slice(1), span))
        part = self.cache.part(slice(1), end, ragged=False)
        return self.model(ids, positions=positions, cache=part, output=output)[0]

    @torch.inference_mode()
    def rewind(self, n: int) -> None:
        """Go back to the first n tokens."""
        self.ids = self.ids[:, :n]
        if self.cache is not None:
            self.cache.rewind(n)

    def read_text(self, ids: list[int]):
        """Read a whole text, but for what is known of its beginning -> the next token's logits (1, V)."""
        same = common_start(self.ids[0].tolist(), ids[:-1])  # the last one has to be read in any case
        self.rewind(same)
        return numbers(self.read(torch.tensor([ids[same:]], device=self.ids.device)))

NOT_FINITE = "The model gives logits that are not numbers (NaN): try --dtype fp32."

def numbers(logits):
    """Return the logits, or refuse them: of NaN any token would be as good as another."""
    check(math.isfinite(logits.sum()), NOT_FINITE)
    return logits

def stream(reader: Reader, logits, max_new_tokens: int, pick=greedy, stop=frozenset()) -> Iterator[int]:
    """Yield the ids that follow, up to and with the first one in `stop`; logits: those of the last read."""
    for left in reversed(range(max_new_tokens)):
        ids = pick(logits)  # (1,), and it stays on the device
        token = ids.item()  # the one wait for the device
        yield token
        if token in stop or not left:
            return
        logits = reader.read(ids[:, None])

PROPOSED = 4  # tokens that are proposed at once

@torch.inference_mode()
def speculate(reader: Reader, propose: Callable, ids: list[int], max_new_tokens: int, choice: Choice,
              generator, stop=frozenset(), counts=None) -> Iterator[int]:
    """Yield what `stream` would, after the text ids, with several tokens a pass (2211.17192, algorithm 1).

    propose: text -> up to PROPOSED ids, and the probabilities q (n, V) that they were drawn with. The model
    reads all of them in one pass. With its own probability p it keeps one with min(1, p/q); the first that it
    does not keep is drawn anew from max(0, p - q). So each token has the probability p, whatever q is.
    counts: a list that is given (proposed, kept) of each pass.
    """
    text = list(ids)
    reader.read_text(text)
    reader.rewind(len(text) - 1)
    device = reader.ids.device
    end = len(text) + max_new_tokens
    while len(text) < end:
        guesses, q = propose(text) if end - len(text) > 1 else ([], None)
        guesses = guesses[: end - len(text) - 1]  # a model with learned places has none beyond the end
        unread = torch.tensor([text[-1:] + guesses], device=device)
        logits = reader.read(unread, output="logits")  # (n + 1, V)
        kept = 0
        for i, row in enumerate(logits.split(1)):
            p = adjust(row, **vars(choice), seen=choice.seen([text], row)).softmax(-1)[0]  # (V,)
            if i < len(guesses):
                token = guesses[i]
                if torch.rand((), generator=generator, device=device) * q[i, token] < p[token]:
                    kept += 1
                else:
                    p = (p - q[i].to(device)).clamp(min=0)
                    token = draw(p.log(), generator).item()
            else:
                token = draw(p.log(), generator).item()
            text.append(token)
            yield token
            if token in stop or len(text) == end:
                break
            if i < len(guesses) and kept <= i:
                break
        if counts is not None:
            counts.append((len(guesses), kept))
        if text[-1] in stop:
            return
        reader.rewind(len(text) - 1)

def propose_draft(draft: Reader, choice: Choice, generator, text: list[int]):
    """Let a small model write the next tokens -> ids, the probabilities (n, V) that each was drawn from."""
    ids, q = [], []
    logits = draft.read_text(text)
    for left in reversed(range(PROPOSED)):
        logits = adjust(logits, **vars(choice), seen=choice.seen([text + ids], logits))
        q.append(logits.softmax(-1))
        token = draw(logits, generator)
        ids.append(token.item())
        if left:
            logits = draft.read(token[:, None])
    return ids, torch.cat(q)

def propose_lookup(n_vocab: int, text: list[int], longest: int = 3):
    """Propose what followed the last words where they stood before: certain of itself, q is 1.

    >>> propose_lookup(10, [5, 1, 2, 3, 4, 6, 1, 2])[0]
    [3, 4, 6, 1]
    """
    for n in range(longest, 1, -1):
        for start in range(len(text) - n - 1, -1, -1):
            if text[start : start + n] == text[-n:]:
                ids = text[start + n : start + n + PROPOSED]
                ids += ids[-1:] * (PROPOSED - len(ids))  # always so many: a shape is compiled once
                return ids, torch.nn.functional.one_hot(torch.tensor(ids), n_vocab).float()
    return [], None

class Writer:
    """Turn tokens into text as they come: whole characters only, and nothing of a text that ends it.

    A character's bytes may be spread over several tokens, a stop string too: both are held back until it is
    known what they are. stop: ids without text. stops: strings.
    """

    def __init__(self, tokenizer, stop=frozenset(), stops=()):
        self.utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.tokenizer = tokenizer
        self.stop = stop
        self.stops = [text for text in stops if text]
        self.held = ""
        self.ended = False  # was a stop string met?

    def add(self, tokens: Iterable[int], last: bool = False) -> str:
        """Return the text that is certain now. last: nothing follows."""
        if self.ended:
            return ""
        data = self.tokenizer.decode_bytes([token for token in tokens if token not in self.stop])
        text = self.held + self.utf8.decode(data, final=last)
        met = [text.index(stop) for stop in self.stops if stop in text]
        if met:
            self.ended = True
            self.held = ""
            return text[: min(met)]
        keep = 0
        if not last:
            keep = max((n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])),
                       default=0)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep]

def pieces(tokens: Iterable[int], writer: Writer, ids: list[int]) -> Iterator[str]:
    """Yield the text of each token as it comes, and put the token into `ids`; a stop token has no text."""
    for token in tokens:
        ids.append(token)
        yield writer.add([token])
        if writer.ended:
            return
    yield writer.add([], last=True)

def write(texts: Iterable[str]) -> None:
    """Print texts as they come, and the end of the line."""
    try:
        for text in texts:
            print(text, end="", flush=True)
    finally:
        print(flush=True)

@torch.inference_mode()
def fill(model, ids: list[int], mask_id: int, n_vocab: int, banned=()) -> tuple[list[int], list[tuple]]:
    """Replace each mask by the model's most likely token -> ids, [(place, id, probability)] in their order.

    One pass over the text for each: the surest gap is filled first, and the next pass sees it.
    """
    x = torch.tensor([ids], device=next(model.parameters()).device)  # (1, T)
    gaps = [i for i, token in enumerate(ids) if token == mask_id]
    filled = []
    while gaps:
        logits = numbers(model(x)[0][0, gaps, :n_vocab].float())  # (gaps, V)
        logits[:, [i for i in banned if i < logits.shape[1]]] = -torch.inf
        probability, best = logits.softmax(-1).max(-1)
        surest = int(probability.argmax())
        place = gaps.pop(surest)
        x[0, place] = best[surest]
        filled.append((place, int(best[surest]), float(probability[surest])))
    return x[0].tolist(), filled

# ---- A chat ------------------------------------------------------------------------------------------------

CHAT_HELP = """/reset forgets what was said; /system TEXT tells the model how to be (and forgets); /save FILE
writes the conversation as a line of JSON; /exit ends, Ctrl-C ends an answer. Lines pasted at once are one
message; a line goes on after \\ at its end."""

def talk(model, tokenizer, max_new_tokens: int, pick, stop: set, step: Step | None = None) -> None:
    """Answer each message on standard input until /exit or the input's end.

    Ctrl-C ends an answer; while nothing is being answered, the program.
    """
    reader = Reader(model, step=step, slots=model.config.seq_len)
    no_text = {*tokenizer.special.values(), *stop}
    system, messages = [], []
    say("/help says what there is; /exit ends, Ctrl-C ends an answer", style="dim")
    while (message := read_message()) and message.strip() != "/exit":
        name, _, rest = message.strip().partition(" ")
        if name in COMMANDS:
            try:
                system, messages = COMMANDS[name](rest.strip(), system, messages)
            except (UserError, OSError) as error:
                say(f"warning: {error}", markup=False, style="yellow")
            continue
        if "\ufffd" in message:
            say("warning: bytes that are no text are read as U+FFFD", style="yellow")
        messages.append({"role": "user", "content": message})
        try:
            ids = conversation(tokenizer, messages, model.config, max_new_tokens, system)
        except UserError as error:  # of this message: the next one may do
            say(f"warning: {error}", markup=False, style="yellow")
            messages.pop()
            continue
        new = []
        if hasattr(pick, "written"):  # the penalty is for what was said in this conversation
            pick.written[:] = [token for token in ids if token not in no_text]
        start = time.perf_counter()
        try:
            left = min(max_new_tokens, model.config.seq_len - len(ids))
            tokens = stream(reader, reader.read_text(ids), left, pick, stop)
            write(pieces(tokens, Writer(tokenizer, stop), new))
        except KeyboardInterrupt:
            pass  # what was written so far is the answer
        if sys.stderr.isatty():
            say(f"{len(new)} tokens, {len(new) / (time.perf_counter() - start):.1f} tok/s", style="dim")
        answer = tokenizer.decode([token for token in new if token not in no_text])
        messages.append({"role": "assistant", "content": answer})

def forget(rest: str, system: list, messages: list):
    say("forgotten", style="dim")
    return system, []

def set_system(rest: str, system: list, messages: list):
    say("the conversation begins anew" + (f" under: {rest}" if rest else " without a system message"),
        style="dim", markup=False)
    return [{"role": "system", "content": rest}] if rest else [], []

def save_chat(rest: str, system: list, messages: list):
    """Add the conversation to a JSON-lines file, as align.py's sft reads it."""
    check(rest, "/save needs the name of a file.")
    with open(rest, "a", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps({"messages": system + messages}, ensure_ascii=False) + "\n")
    say(f"saved {len(messages)} messages to {rest}", style="dim", markup=False)
    return system, messages

def say_help(rest: str, system: list, messages: list):
    say(CHAT_HELP, style="dim", markup=False)
    return system, messages

COMMANDS = {"/reset": forget, "/system": set_system, "/save": save_chat, "/help": say_help}

def conversation(tokenizer, messages, config: Config, max_new_tokens: int, system=()) -> list[int]:
    """Encode a conversation up to where the answer begins; of what does not fit, the oldest turns go.

    system: the message that always stays in front.
    """
    system = list(system)
    alone, _ = render(tokenizer, system + messages[-1:], reply=True)
    check(len(alone) < config.seq_len, f"{len(alone)} tokens are more than the context: say it shorter.")
    room = config.seq_len - min(max_new_tokens, config.seq_len // 4)
    ids, _ = render(tokenizer, system + messages, reply=True)
    while len(messages) > 1 and len(ids) > room:
        say(f"(the oldest turns are forgotten: the context has {config.seq_len} tokens)", style="dim")
        del messages[:2]
        ids, _ = render(tokenizer, system + messages, reply=True)
    return known(ids, config)

def read_message() -> str | None:
    """Read a message, up to a line that does not end in a backslash; None at the end of the input.

    On a terminal, lines that come at once were pasted: they are one message.
    """
    text = ""
    while True:
        if sys.stdin.isatty():
            print("... " if text else "> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        while line and is_more_typed():
            line += sys.stdin.readline()
        text += line
        if line.endswith("\\\n"):
            continue
        message = text.removesuffix("\n").removesuffix("\\").replace("\\\n", "\n")
        if message.strip() or not line:
            return message.strip() and message or None
        text = ""

def is_more_typed() -> bool:
    """Tell whether a further line stands ready on the terminal; a person does not type one in 50 ms."""
    if not sys.stdin.isatty() or os.name == "nt":  # select knows only sockets there
        return False
    return bool(select.select([sys.stdin], [], [], 0.05)[0])

# ---- The command -------------------------------------------------------------------------------------------

def newest_checkpoint(root: str | Path = "out") -> Path:
    """Find the checkpoint in `root` whose config.json was written last."""
    configs = [p for p in Path(root).glob("**/config.json") if any(p.parent.glob("model*.safetensors"))]
    check(configs, f"There is no checkpoint in {root}/ yet: run `python train.py` first, or name a folder.")
    return max(configs, key=lambda p: p.stat().st_mtime).parent

def read_prompt(o: Options, tokenizer, config: Config) -> tuple[str, list[int]]:
    """Read and encode --prompt or --fill -> (text, ids) with the tokens that the tokenizer puts around it."""
    text = o.prompt if o.fill is None else o.fill
    try:  # an argument that was no UTF-8 reaches Python with its bytes as lone surrogates
        data = sys.stdin.buffer.read() if text == "-" else text.encode("utf-8", "surrogateescape")
        text = data.decode("utf-8")
    except UnicodeError:
        raise UserError("The prompt is not UTF-8 text.") from None
    special = () if o.fill is None else ("<|mask|>",)
    ids = [*tokenizer.prefix, *tokenizer.encode(text, special)]
    if o.fill is not None:
        ids += tokenizer.suffix
        check(tokenizer.mask_id in ids, "There is nothing to fill: write <|mask|> where a token is missing.")
    if not ids:  # a new document
        begin = (tokenizer.special.get(tokenizer.names.get("bos_token")), tokenizer.eot_id)
        ids = [i for i in begin if i is not None][:1]
    check(ids, "This tokenizer has no token to begin a document with: give a --prompt.")
    if config.position == "learned":
        places = config.seq_len - len(ids)
        check(places > 0, f"A prompt of {len(ids)} tokens fills all {config.seq_len} places: say it shorter.")
        o.max_new_tokens = min(o.max_new_tokens, places)
    total = len(ids) + o.max_new_tokens * config.causal
    if o.window is not None:  # then no token looks further back than that
        total = min(total, o.window + o.sinks + o.summaries)
    if total > config.seq_len:
        say(f"warning: {total} tokens, more than the {config.seq_len} of its training", style="yellow")
    return text, known(ids, config)

def known(ids: list[int], config: Config) -> list[int]:
    """Return the ids, or refuse those that the model has no embedding for."""
    check(max(ids) < config.vocab_size, f"The text has a token of id {max(ids)}, and the model knows "
          f"{config.vocab_size} ids: the token was added later, or the tokenizer is another model's.")
    return ids

def main(o: Options) -> None:
    """Write text with a checkpoint, after the prompt, to standard output; how fast, to standard error."""
    sys.stdin = sys.stdin or open(os.devnull)  # it may be closed
    folder = newest_checkpoint() if o.folder is None else find_checkpoint(o.folder)
    if o.save is not None:
        save_quantized(folder, o.save, o.quantize)
        return
    config = load_config(folder, quantized=True)
    tokenizer = load_tokenizer(folder)
    filling = o.fill is not None
    check(config.head == "lm", f"{folder} is a reward model: it gives scores, not text.")
    check(config.causal or filling, f"{folder} is a masked model: give it gaps to --fill, no --prompt.")
    check(not config.causal or not filling, f"{folder} is no masked model: give it a --prompt, not --fill.")
    if o.chat:  # a folder without conversations is refused now, not after the first message
        known(render(tokenizer, [{"role": "user", "content": "?"}], reply=True)[0], config)
    elif o.prompts is not None:
        requests = read_requests(o, tokenizer, config)
    else:
        text, ids = read_prompt(o, tokenizer, config)
    name_other_settings(folder, o)
    model = open_folder(folder, o, config)
    draft = None
    if o.draft is not None:
        draft_folder = find_checkpoint(o.draft)
        same = load_tokenizer(draft_folder).token_bytes == tokenizer.token_bytes
        check(same, f"{o.draft} has another vocabulary than {folder}: a draft has to speak the same tokens.")
        small = load_config(draft_folder, quantized=True)
        proposes = small.head == "lm" and small.causal and small.vocab_size >= tokenizer.n_vocab
        check(proposes, f"{o.draft} is no model that could propose a text's tokens.")
        reads = len(ids) + o.max_new_tokens + PROPOSED
        check(small.position != "learned" or reads <= small.seq_len,
              f"{o.draft} has {small.seq_len} places, and would read {reads} tokens: ask for fewer.")
        o.data = None  # the cost is said once
        draft = open_folder(draft_folder, o, small)
    for file, how in ((sys.stdout, {"encoding": "utf-8"}), (sys.stdin, {"errors": "replace"})):
        if hasattr(file, "reconfigure"):
            file.reconfigure(**how)  # also where the terminal's language is another
    stop = set() if o.ignore_eos else {tokenizer.eot_id, tokenizer.im_end_id, *config.eos_ids}
    if filling:
        print_filled(model, tokenizer, ids, o.json)
    elif o.chat:
        pick = picker(o, tokenizer.n_vocab, next(model.parameters()).device)
        step = Step(model, True) if o.compile and can_compile(config, o) else None
        talk(model, tokenizer, o.max_new_tokens, pick, stop, step)
    elif o.prompts is not None:
        print_requests(o, model, tokenizer, requests, stop)
    else:
        print_samples(o, model, tokenizer, text, ids, stop, draft)

def open_folder(folder: Path, o, config: Config) -> Transformer:
    """Load a model where and as the options say; smaller than the memory if it does not fit as it is."""
    device = pick_device(o.device)
    if device.type == "cuda":  # cuDNN plans attention anew for each length: 41 ms a token instead of 6 (H200)
        torch.backends.cuda.enable_cudnn_sdp(False)
    small = device.type == "cpu" and count_weights(config)[2] < 2**28  # bf16 is no faster, and near ties move
    kind = o.quantize or quantized_kind(read_json(folder / "config.json"))
    dtype = "fp32" if o.dtype == "auto" and small and not kind else o.dtype
    dtype = torch.bfloat16 if kind and o.dtype == "auto" else pick_dtype(dtype, device)
    if kind is None:
        kind = kind_that_fits(config, device, dtype)
    model = open_model(folder, device, dtype, kind)
    if o.data is not None:
        say_cost(folder, model, o.data, device, dtype)
    return model

def kind_that_fits(config: Config, device, dtype) -> str | None:
    """Choose the largest of the kinds of weights that leaves a tenth of the memory free; None: as they are.

    int8 costs next to nothing in quality, int4 some percent: so it comes last.
    """
    weights = count_weights(config)[0]
    if device.type == "cuda":
        have = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return None
    for kind, size in ((None, dtype.itemsize), ("int8", 1.1), ("int4", 0.7)):
        if weights * size < 0.9 * have:
            if kind is not None:
                say(f"the weights do not fit the memory as they are: {kind}", style="yellow")
            return kind
    return None  # and loading says so

def name_other_settings(folder: Path, o: Options) -> None:
    """Say what a folder's generation_config.json asks for and this command does not do."""
    path = folder / "generation_config.json"
    asked = read_json(path) if path.is_file() else {}
    asked = {name: asked[name] for name in OTHER_SETTINGS if asked.get(name) is not None}
    used = OTHER_SETTINGS | vars(choice_of(o, 0)) | {"min_p": o.min_p or 0.0}
    other = [f"{name} {value}" for name, value in asked.items() if value != used[name]]
    if other and o.fill is None:
        say(f"generation_config.json suggests {', '.join(other)}: not followed; see --help", style="dim")

def choice_of(o, n_vocab: int) -> Choice:
    """Return how these options choose tokens."""
    names = [name for name in Choice.__dataclass_fields__ if name != "n_vocab"]
    return Choice(**{name: getattr(o, name) for name in names}, n_vocab=n_vocab)

def picker(o: Options, n_vocab: int, device, i: int = 0):
    """Make the `pick` of sample number i for a single text: the same seed gives the same text."""
    generator = torch.Generator(device).manual_seed(o.seed + i)
    choice = choice_of(o, n_vocab)
    if choice.repetition_penalty == 1.0:
        return partial(sample, **vars(choice), generator=generator)
    written = []

    def pick(logits):
        ids = sample(logits, **vars(choice), seen=choice.seen([written], logits), generator=generator)
        written.append(ids.item())
        return ids

    pick.written = written
    return pick

LONG = 5000  # steps from which compiling pays by itself: it takes 15 to 40 s, and saves 3 to 20 ms a step

def print_samples(o: Options, model, tokenizer, text: str, ids: list[int], stop: set, draft=None) -> None:
    """Write --num-samples continuations of a prompt, which is read once for all; sample i has seed + i."""
    slots = len(ids) + o.max_new_tokens + PROPOSED
    long = o.num_samples * o.max_new_tokens >= LONG and slots < 2**16  # their room is taken at once
    compiled = o.compile if o.compile is not None else long
    step = Step(model, True) if compiled and can_compile(model.config, o) else None
    proposing = draft is not None or o.lookup
    width = 1 + PROPOSED * proposing
    reader = Reader(model, not o.no_cache, o.window, o.sinks, o.summaries, step, slots, width)
    helper = None if draft is None else Reader(draft, step=step and Step(draft, True), slots=slots)
    if step is not None:  # compiled now, not within the text
        reader.read_text(ids[:1])
        for tokens in (1, width):
            reader.read(torch.tensor([ids[:1] * tokens], device=reader.ids.device))
            reader.rewind(0)
    start = time.perf_counter()
    logits = reader.read_text(ids)
    prefill = (time.perf_counter() - start) * 1e3  # milliseconds
    for i in range(o.num_samples):
        if o.num_samples > 1 and not o.json:
            say(f"--- {i + 1} of {o.num_samples} ---", style="dim")
        if i and reader.rolls:  # the prompt may have left the window
            logits = reader.read_text(ids)
        else:
            reader.rewind(len(ids))
        counts = []
        new = []
        reports = []
        if proposing:
            choice = choice_of(o, tokenizer.n_vocab)
            generator = torch.Generator(logits.device).manual_seed(o.seed + i)
            propose = partial(propose_lookup, tokenizer.n_vocab)
            if helper is not None:
                propose = partial(propose_draft, helper, choice, generator)
            tokens = speculate(reader, propose, ids, o.max_new_tokens, choice, generator, stop, counts)
        else:
            pick = picker(o, tokenizer.n_vocab, logits.device, i)
            if hasattr(pick, "written"):
                pick.written.extend(ids)
            if o.logprobs:
                pick = partial(pick_and_report, pick, reports, tokenizer.n_vocab)
            tokens = stream(reader, logits, o.max_new_tokens, pick, stop)
        writer = Writer(tokenizer, stop, o.stop or ())
        texts = pieces(tokens, writer, new)
        start = time.perf_counter()
        written = "".join(texts) if o.json else write(itertools.chain([text], texts))
        # a token is one pass over the weights; that of the first one was the prefill
        speed = (len(new) - 1) / (time.perf_counter() - start) if len(new) > 1 else None
        proposed, kept = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
        if o.json:
            ended = writer.ended or new[-1] in stop
            facts = {"text": written, "ids": {"prompt": ids, "continuation": new}, "seed": o.seed + i,
                     "finish_reason": "stop" if ended else "length",
                     "prefill_ms": round(prefill, 3), "tok_per_s": speed and round(speed, 2)}
            facts |= {"proposed": proposed, "kept": kept, "passes": len(counts)} if proposing else {}
            facts |= {"logprobs": [report["logprob"] for report in reports]} if o.logprobs else {}
            print(json.dumps(facts), flush=True)
        elif sys.stderr.isatty():
            rate = f", then {speed:.1f} tok/s" if speed else ""
            rate += f", {kept} of {proposed} proposed tokens kept" if proposing else ""
            say(f"a prompt of {len(ids)} tokens in {prefill:.0f} ms{rate}; --seed {o.seed + i}", style="dim")

def can_compile(config: Config, o) -> bool:
    """Tell whether a model's step is compiled; say it where that was asked for and is not possible."""
    possible = config.rereads_at is None and o.window is None and not o.no_cache
    if not possible and o.compile:
        say("LongRoPE's step is not compiled: its frequencies change with the text", style="yellow")
    return possible

def pick_and_report(pick, reports: list[dict], n_vocab: int, logits):
    """Pick, and add to `reports` what the model thought of the token."""
    ids = pick(logits)
    reports.append(report(logits[0, :n_vocab], ids.item(), 0))
    return ids

# ---- A file of prompts -------------------------------------------------------------------------------------

def read_requests(o: Options, tokenizer, config: Config) -> list[Request]:
    """Read --prompts: each line is a prompt, or in a .jsonl file an object with "prompt" (and seed)."""
    with reading(o.prompts):
        lines = o.prompts.read_text(encoding="utf-8-sig").split("\n")
    requests = []
    choice = choice_of(o, tokenizer.n_vocab)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        seed = o.seed + len(requests)
        if o.prompts.suffix.lower() in (".jsonl", ".ndjson", ".jsonlines"):
            with reading(f"{o.prompts}, line {number}"):
                entry = json.loads(line)
                line, seed = entry["prompt"], entry.get("seed", seed)
            check(type(seed) is int and 0 <= seed < 2**63, f"{o.prompts}, line {number}: what seed is that?")
            check(isinstance(line, str) and line, f"{o.prompts}, line {number}: \"prompt\" is no text.")
        ids = [*tokenizer.prefix, *tokenizer.encode(line)]
        check(ids, f"{o.prompts}, line {number} has no token.")
        requests.append(Request(known(ids, config), o.max_new_tokens, choice, seed,
                                logprobs=0 if o.logprobs else None))
    check(requests, f"{o.prompts} holds no prompt.")
    return requests

def print_requests(o: Options, model, tokenizer, requests: list[Request], stop: set) -> None:
    """Write a JSON object for each prompt of a file, as they end; "index" is the prompt's number."""
    longest = max(len(request.ids) for request in requests) + o.max_new_tokens
    if model.config.position == "learned":
        longest = min(longest, model.config.seq_len)
    rows = min(o.rows, len(requests))
    steps = sum(request.max_new_tokens for request in requests) / rows
    compiled = o.compile if o.compile is not None else steps >= LONG
    engine = Engine(model, rows, longest, compiled and can_compile(model.config, o))
    texts = {}
    engine.warm_up()
    for request in requests:
        request.stop = frozenset(stop)
        texts[engine.submit(request)] = [Writer(tokenizer, stop, o.stop or ()), ""]
    index = {request: i for i, request in enumerate(requests)}
    start = time.perf_counter()
    with progress("texts", len(requests)) as advance:
        while engine.busy:
            for request in engine.step():
                writer, _ = texts[request]
                texts[request][1] += writer.add(request.new[-1:], last=request.finish is not None)
                if writer.ended:
                    request.finish = "stop"
                if request.finish is not None:
                    print_request(index[request], request, texts.pop(request)[1])
                    advance(len(requests) - len(texts))
    seconds = time.perf_counter() - start
    written = sum(len(request.new) for request in requests)
    say(f"{written:,} tokens of {len(requests):,} texts in {seconds:.1f} s: {written / seconds:,.0f} tok/s")

def print_request(index: int, request: Request, text: str) -> None:
    """Print what became of a prompt."""
    facts = {"index": index, "text": text, "ids": {"prompt": request.ids, "continuation": request.new},
             "seed": request.seed, "finish_reason": request.finish}
    facts |= {"logprobs": [report["logprob"] for report in request.reports]} if request.reports else {}
    print(json.dumps(facts), flush=True)

def print_filled(model, tokenizer, ids: list[int], as_json: bool) -> None:
    """Fill the gaps of a text and print it; as JSON with each step."""
    whole, filled = fill(model, ids, tokenizer.mask_id, tokenizer.n_vocab, tokenizer.special.values())
    text = tokenizer.decode(whole)
    steps = [{"place": i, "text": tokenizer.decode([t]), "probability": round(p, 6)} for i, t, p in filled]
    facts = {"text": text, "ids": {"prompt": ids, "filled": whole}, "steps": steps}
    print(json.dumps(facts) if as_json else text, flush=True)

# ---- A server ----------------------------------------------------------------------------------------------

@dataclass
class ServeOptions:
    """Hold the options of `serve`."""

    folder: Annotated[Path | None, typer.Argument(help="Checkpoint folder; or the newest in out/.")] = None
    port: Annotated[int, opt("Server", "Port; 0: any free one.", low=0)] = 8000
    host: Annotated[str, opt("Server", "Address to listen on; 0.0.0.0: all.")] = "127.0.0.1"
    rows: Annotated[int, opt("Server", "Texts written at once.", low=1)] = 8
    waiting: Annotated[int, opt("Server", "Texts that may wait; more are told to come back.", low=1)] = 256
    context: Annotated[int | None, opt("Server", "Most tokens of a text; else the model's.", low=2)] = None
    max_new_tokens: Annotated[int, opt("Server", "Of a request that does not say.", low=1)] = 256
    timeout: Annotated[float, opt("Server", "Seconds until a text is ended.", above=0)] = 300.0
    compile: Annotated[bool, opt("Speed", "Faster steps, after seconds to a minute.")] = True
    quantize: Annotated[str | None, opt("Speed", "int8 or int4: smaller weights.", one_of=KINDS)] = None
    dtype: Annotated[str, opt("Machine", "auto, fp32, bf16 or fp16 (for GPUs).")] = "auto"
    device: Annotated[str, opt("Machine", "auto, cpu, cuda or mps.")] = "auto"

class ApiError(UserError):
    """Say what is wrong with a request, with the status of HTTP and the name of the parameter."""

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.body = {"message": message, "param": param, "code": code,
                     "type": "server_error" if status >= 500 else "invalid_request_error"}

PAUSE = 0.04  # seconds between two pieces of a text: sending each token by itself takes the step's time
BODY = 2**20  # bytes of a request at most
# What a request may say: its kind, its range, and what stands where it says nothing.
FIELDS = {"model": (str, None, None), "stream": (bool, None, False), "stream_options": (dict, None, {}),
          "max_tokens": (int, (1, 2**31), None), "max_completion_tokens": (int, (1, 2**31), None),
          "temperature": (float, (0, 100), 1.0), "top_p": (float, (0, 1), 1.0),
          "top_k": (int, (1, 2**31), None),
          "min_p": (float, (0, 1), None), "repetition_penalty": (float, (0.01, 100), 1.0),
          "seed": (int, (-2**63, 2**63 - 1), None), "n": (int, (1, 16), 1), "stop": ((str, list), None, []),
          "user": (str, None, None), "metadata": (dict, None, None), "store": (bool, None, None),
          "parallel_tool_calls": (bool, None, None)}
CHAT_FIELDS = {"messages": (list, None, None), "logprobs": (bool, None, False),
               "top_logprobs": (int, (0, 20), 0)}
TEXT_FIELDS = {"prompt": ((str, list), None, ""), "logprobs": (int, (0, 5), None)}
OFF = (0, False, [], {}, "auto", "none", {"type": "text"})  # a field that is not known asks for nothing

def read_fields(body, fields: dict) -> dict:
    """Check a request's body -> its fields, with what stands where it says nothing."""
    if not isinstance(body, dict):
        raise ApiError("The body has to be a JSON object.")
    given = {name: value for name, value in body.items() if value is not None}
    unknown = [name for name, value in given.items() if name not in fields and value not in OFF]
    if unknown:
        raise ApiError(f"{unknown[0]} is not supported here: leave it out.", param=unknown[0])
    out = {}
    for name, (kind, limits, default) in fields.items():
        value = given.get(name, default)
        out[name] = value
        if name not in given:
            continue
        right = isinstance(value, (int, float) if kind is float else kind)
        if not right or (isinstance(value, bool) and kind is not bool):
            raise ApiError(f"{name} is of another kind.", param=name)
        if limits and not limits[0] <= value <= limits[1]:
            raise ApiError(f"{name} is {value}; it has to be from {limits[0]} to {limits[1]}.", param=name)
    if out["top_p"] == 0:
        raise ApiError("top_p is 0; it has to be above 0.", param="top_p")
    stops = [out["stop"]] if isinstance(out["stop"], str) else out["stop"]
    if len(stops) > 16 or not all(isinstance(text, str) and text for text in stops):
        raise ApiError("stop is a text or up to 16 of them.", param="stop")
    out["stop"] = stops
    return out

class Service:
    """Run the engine beside the clients' threads; each request's tokens come to it through a queue."""

    def __init__(self, engine: Engine, tokenizer, name: str, o: ServeOptions, stop: frozenset):
        self.engine = engine
        self.tokenizer = tokenizer
        self.name = name
        self.o = o
        self.stop = stop
        self.started = int(time.time())
        self.lock = threading.Condition()
        self.tokens = 0

    def work(self) -> None:
        """Step while there is work, for ever.

        This is the main thread's work, and clients get threads: OpenMP keeps workers for each thread that
        ever called it, and with more of them than cores all wait in a slower way (0.6 times the speed here).
        """
        while True:
            with self.lock:
                while not self.engine.busy:
                    self.lock.wait()
                try:
                    written = self.engine.step()
                except Exception as error:  # a text that breaks the step takes the running ones with it
                    written = [request for request in self.engine.running if request]
                    for request in written:
                        request.finish = "error"
                        request.error = str(error)
                    self.engine.retire()
                    self.engine.held = [[] for _ in self.engine.held]  # who knows what was written
                    for x in itertools.chain(*self.engine.cache.whole):
                        x.zero_()  # a NaN that no query sees would still be a NaN: 0 * NaN
            now = time.monotonic()
            for request in written:
                self.tokens += 1
                if request.finish is not None or now >= request.next_piece:
                    request.out.put((request.new[request.told :], request.finish))
                    request.told = len(request.new)
                    request.next_piece = now + PAUSE
            time.sleep(0)  # let those who wait for the lock have it

    def submit(self, request: Request) -> Request:
        """Queue a text, or say that there are too many."""
        request.out = queue.SimpleQueue()
        request.told = 0  # tokens that went into it
        request.next_piece = 0.0  # when the next ones may
        with self.lock:
            if len(self.engine.waiting) >= self.o.waiting:
                raise ApiError("Too many texts are waiting: come back in a moment.", 429, code="queue_full")
            self.engine.submit(request)
            self.lock.notify()
        return request

    def requests(self, fields: dict, chat: bool) -> list[Request]:
        """Make of a request's fields the texts to be written, n of each prompt."""
        if fields["model"] not in (None, self.name):
            raise ApiError(f"The model {fields['model']!r} does not exist here: {self.name!r} does.", 404,
                           "model", "model_not_found")
        prompts = [self.read_chat(fields["messages"])] if chat else self.read_prompts(fields["prompt"])
        limit = fields["max_completion_tokens"] or fields["max_tokens"] or self.o.max_new_tokens
        seed = fields["seed"] if fields["seed"] is not None else torch.Generator().seed() % 2**31
        choice = Choice(fields["temperature"], fields["top_k"], fields["top_p"], fields["min_p"],
                        fields["repetition_penalty"], self.tokenizer.n_vocab)
        logprobs = fields["logprobs"]
        if chat:
            logprobs = fields["top_logprobs"] if logprobs else None
        slots = self.engine.cache.slots
        for ids in prompts:
            if len(ids) >= slots:
                raise ApiError(f"The prompt has {len(ids)} tokens, and the context {slots}.", 400,
                               "messages" if chat else "prompt", "context_length_exceeded")
        texts = [ids for ids in prompts for _ in range(fields["n"])]
        if len(texts) > self.o.waiting:
            raise ApiError(f"{len(texts)} texts are more than {self.o.waiting}.", param="n")
        return [Request(ids, limit, choice, (seed + i) % 2**63, self.stop, logprobs)
                for i, ids in enumerate(texts)]

    def read_prompts(self, prompt) -> list[list[int]]:
        """Encode a text, texts, ids or lists of ids."""
        many = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
        prompts = []
        for one in prompt if many else [prompt]:
            if isinstance(one, str):
                ids = [*self.tokenizer.prefix, *self.tokenizer.encode(one)] or [self.tokenizer.eot_id]
            else:
                ids = one
            n_vocab = self.tokenizer.n_vocab
            whole = isinstance(ids, list) and all(type(i) is int and 0 <= i < n_vocab for i in ids)
            if not whole or not ids:
                raise ApiError("prompt is a text, a list of texts, ids, or lists of ids.", param="prompt")
            prompts.append(ids)
        if len(prompts) > self.o.waiting:
            raise ApiError(f"{len(prompts)} prompts are more than {self.o.waiting}.", param="prompt")
        return prompts

    def read_chat(self, messages) -> list[int]:
        """Encode a conversation, each message's content a text or a list of texts."""
        plain = []
        for message in messages or [None]:
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, list) and all(isinstance(part, dict) for part in content):
                parts = [part.get("text") for part in content if part.get("type") == "text"]
                whole = len(parts) == len(content) and all(isinstance(part, str) for part in parts)
                content = "".join(parts) if whole else None
            if not isinstance(content, str) or not isinstance(message.get("role"), str):
                raise ApiError("messages is a list of objects with the texts role and content.",
                               param="messages")
            plain.append({"role": message["role"], "content": content})
        try:
            ids, _ = render(self.tokenizer, plain, reply=True)
        except UserError as error:
            raise ApiError(str(error), param="messages") from None
        return ids

class Handler(BaseHTTPRequestHandler):
    """Answer as OpenAI's API does: /v1/completions, /v1/chat/completions, /v1/models; /health; / a page."""

    protocol_version = "HTTP/1.1"
    service: Service
    timeout = 60  # seconds that a client may take to say what it wants

    def log_message(self, *args) -> None:
        """Say nothing: the terminal is the owner's."""

    def do_GET(self) -> None:
        service = self.service
        model = {"id": service.name, "object": "model", "created": service.started, "owned_by": "octavo"}
        path = self.path.split("?")[0].rstrip("/")
        if path == "":
            self.send(200, PAGE.encode(), "text/html; charset=utf-8")
        elif path == "/health":
            engine = service.engine
            self.send_json({"status": "ok", "running": sum(map(bool, engine.running)),
                            "waiting": len(engine.waiting), "tokens": service.tokens})
        elif path == "/v1/models":
            self.send_json({"object": "list", "data": [model]})
        elif path == f"/v1/models/{service.name}":
            self.send_json(model)
        else:
            self.send_error_body(ApiError(f"There is no {path} here.", 404))

    def do_POST(self) -> None:
        path = self.path.split("?")[0].rstrip("/")
        try:
            chat = {"/v1/chat/completions": True, "/v1/completions": False}.get(path)
            if chat is None:
                self.close_connection = True  # the body is not read
                raise ApiError(f"There is no {path} here.", 404)
            self.answer(read_fields(self.read_body(), FIELDS | (CHAT_FIELDS if chat else TEXT_FIELDS)), chat)
        except ApiError as error:
            self.send_error_body(error)
        except UserError as error:
            self.send_error_body(ApiError(str(error)))
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            self.close_connection = True  # the client went away
        except Exception as error:
            say(f"a request failed: {error!r}", markup=False, style="yellow")
            self.close_connection = True
            self.send_error_body(ApiError("The server failed.", 500))

    def read_body(self):
        """Read a JSON body of a size that is allowed."""
        size = self.headers.get("Content-Length", "")
        if not size.isdecimal():
            self.close_connection = True
            raise ApiError("A body with a Content-Length is needed.", 411)
        if int(size) > BODY:
            self.close_connection = True
            left = min(int(size), 64 * BODY)
            while left > 0 and (read := self.rfile.read(min(left, BODY))):  # else the client never reads why
                left -= len(read)
            raise ApiError(f"A body of {size} bytes is larger than {BODY}.", 413, code="body_too_large")
        try:
            return json.loads(self.rfile.read(int(size)))
        except (ValueError, RecursionError):
            raise ApiError("The body is no JSON.") from None

    def answer(self, fields: dict, chat: bool) -> None:
        """Submit a request's texts and send what becomes of them, as it comes or whole."""
        requests = self.service.requests(fields, chat)
        submitted = []
        try:
            for request in requests:
                submitted.append(self.service.submit(request))
            if fields["stream"]:
                self.stream(requests, fields, chat)
            else:
                self.send_json(self.whole(requests, fields, chat))
        finally:
            for request in submitted:  # whoever went away, or was refused halfway: the row is free
                request.finish = request.finish or "cancelled"

    def events(self, requests: list[Request], stops: list[str]):
        """Yield (index, text, new tokens, finish) of all texts as they come, until each has ended."""
        service = self.service
        end = time.monotonic() + service.o.timeout
        writers = [Writer(service.tokenizer, service.stop, stops) for _ in requests]
        open_texts = dict(enumerate(requests))
        while open_texts:
            for index, request in list(open_texts.items()):
                try:
                    tokens, finish = request.out.get(timeout=0.2 / len(open_texts))
                except queue.Empty:
                    tokens, finish = [], None
                if self.is_gone():
                    raise BrokenPipeError
                if finish == "error":
                    raise ApiError(f"The text could not be written: {request.error}", 500)
                if finish is None and time.monotonic() >= end:
                    request.finish = "cancelled"
                    finish = "length"
                text = writers[index].add(tokens, last=finish is not None)
                if writers[index].ended:
                    request.finish = finish = "stop"
                if finish is not None:
                    del open_texts[index]
                yield index, text, len(tokens), finish

    def is_gone(self) -> bool:
        """Tell whether the client has closed its end."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def head(self, chat: bool, chunk: bool) -> dict:
        """Begin an answer's object."""
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if chat else "text_completion"
        name = f"{'chatcmpl' if chat else 'cmpl'}-{os.urandom(12).hex()}"
        return {"id": name, "object": kind, "created": int(time.time()), "model": self.service.name}

    def logprobs_of(self, request: Request, chat: bool, first: int, end: int):
        """Report the log-probabilities of some new tokens as the API does; None where nobody asked."""
        if request.logprobs is None:
            return None
        reports = request.reports[first:end]

        def name(i):
            return self.service.tokenizer.decode_bytes([i])

        def entry(i, logprob):
            return {"token": name(i).decode("utf-8", "replace"), "logprob": logprob, "bytes": [*name(i)]}

        if chat:
            return {"content": [entry(r["id"], r["logprob"])
                                | {"top_logprobs": [entry(*one) for one in r["top"]]} for r in reports]}
        texts = [name(r["id"]).decode("utf-8", "replace") for r in reports]
        *offsets, request.offset = itertools.accumulate(map(len, texts), initial=request.offset)
        tops = [{name(i).decode("utf-8", "replace"): p for i, p in r["top"]} for r in reports]
        return {"tokens": texts, "token_logprobs": [r["logprob"] for r in reports],
                "top_logprobs": tops, "text_offset": offsets}

    def usage(self, requests: list[Request], told: list[int], n: int) -> dict:
        """Count the tokens of a request: a prompt once, however many answers it has; told: of the answers."""
        prompt = sum(len(request.ids) for request in requests[::n])
        new = sum(told)
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def whole(self, requests: list[Request], fields: dict, chat: bool) -> dict:
        """Wait for all texts -> the answer's object."""
        texts = [""] * len(requests)
        ends = [None] * len(requests)
        told = [0] * len(requests)
        for index, text, count, finish in self.events(requests, fields["stop"]):
            told[index] += count
            texts[index] += text
            ends[index] = finish
        choices = []
        for index, (request, text, end) in enumerate(zip(requests, texts, ends, strict=True)):
            what = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            choices.append({"index": index, **what, "finish_reason": end,
                            "logprobs": self.logprobs_of(request, chat, 0, told[index])})
        return self.head(chat, False) | {"choices": choices, "usage": self.usage(requests, told, fields["n"])}

    def stream(self, requests: list[Request], fields: dict, chat: bool) -> None:
        """Send each piece of text as a server-sent event."""
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Cache-Control", "no-cache")
        self.send_header("Connection", "close")  # its end is the end of the answer
        self.end_headers()
        self.close_connection = True
        head = self.head(chat, True)
        told = [0] * len(requests)
        said = [0] * len(requests)
        if chat:
            for index in range(len(requests)):
                self.send_event(head | {"choices": [{"index": index, "finish_reason": None,
                                                     "delta": {"role": "assistant", "content": ""}}]})
        try:
            for index, text, count, finish in self.events(requests, fields["stop"]):
                told[index] += count
                if not text and finish is None:
                    continue
                what = {"delta": {"content": text} if text else {}} if chat else {"text": text}
                logprobs = self.logprobs_of(requests[index], chat, said[index], told[index])
                said[index] = told[index]
                self.send_event(head | {"choices": [{"index": index, **what, "finish_reason": finish,
                                                     "logprobs": logprobs}]})
        except ApiError as error:  # too late for a status
            self.send_event({"error": error.body})
            return
        if fields["stream_options"].get("include_usage"):
            self.send_event(head | {"choices": [], "usage": self.usage(requests, told, fields["n"])})
        self.wfile.write(b"data: [DONE]\n\n")

    def send_event(self, what: dict) -> None:
        self.wfile.write(f"data: {json.dumps(what)}\n\n".encode())

    def send_json(self, what: dict, status: int = 200) -> None:
        self.send(status, json.dumps(what).encode(), "application/json")

    def send_error_body(self, error: ApiError) -> None:
        try:
            self.send_json({"error": error.body}, error.status)
        except OSError:
            self.close_connection = True

    def send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

PAGE = """<!doctype html>
<meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Octavo</title>
<style>
body { max-width: 44rem; margin: 2rem auto; padding: 0 1rem; font: 1rem/1.5 system-ui }
p { white-space: pre-wrap; margin: .6rem 0 } .user { color: #555 } .error { color: #b00 }
form { display: flex; gap: .5rem } textarea { flex: 1; font: inherit }
</style>
<main></main>
<form><textarea rows="3" autofocus placeholder="A message; Enter sends it"></textarea>
<button>Send</button><button type="button" id="stop" disabled>Stop</button></form>
<script>
const $ = (name) => document.querySelector(name), messages = []
let running = null
function add(kind, text) {
  const p = document.createElement('p')
  p.className = kind
  p.textContent = text
  $('main').append(p)
  return p
}
async function send() {
  const text = $('textarea').value.trim()
  if (!text || running) return
  $('textarea').value = ''
  messages.push({role: 'user', content: text})
  add('user', text)
  const p = add('assistant', '')
  running = new AbortController()
  $('#stop').disabled = false
  try {
    const answer = await fetch('/v1/chat/completions', {method: 'POST', signal: running.signal,
      body: JSON.stringify({messages, stream: true, temperature: 0.7, top_p: 0.9})})
    if (!answer.ok) throw new Error((await answer.json()).error.message)
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader()
    for (let held = '', got; !(got = await reader.read()).done;) {
      const events = (held + got.value).split('\\n\\n')
      held = events.pop()
      for (const event of events) {
        if (event === 'data: [DONE]') continue
        const data = JSON.parse(event.slice(6))
        if (data.error) throw new Error(data.error.message)
        p.textContent += data.choices[0]?.delta.content ?? ''
      }
    }
  } catch (error) {
    if (error.name !== 'AbortError') add('error', error.message)
  }
  if (p.textContent) messages.push({role: 'assistant', content: p.textContent})
  else messages.pop()  // what was not answered was not said
  running = null
  $('#stop').disabled = true
}
$('form').onsubmit = (event) => { event.preventDefault(); send() }
$('#stop').onclick = () => running?.abort()
$('textarea').onkeydown = (event) => {
  if (event.key === 'Enter' && !event.shiftKey) { event.preventDefault(); send() }
}
</script>
"""

class Server(ThreadingHTTPServer):
    """Listen, with a thread for each client."""

    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address) -> None:
        """A client that breaks off is no event."""

def make_server(folder: Path, o: ServeOptions) -> tuple[Server, Service]:
    """Load the model, compile its steps, open the port; `serve_forever` and `work` begin to answer."""
    config = load_config(folder, quantized=True)
    tokenizer = load_tokenizer(folder)
    check(config.head == "lm" and config.causal, f"{folder} is no model that writes text.")
    o.data = None
    model = open_folder(folder, o, config)
    slots = o.context or min(config.seq_len, 8192)
    check(config.position != "learned" or slots <= config.seq_len, f"The model has {config.seq_len} places.")
    try:
        server = Server((o.host, o.port), Handler)
    except (OSError, OverflowError) as error:
        raise UserError(f"{o.host}:{o.port} cannot be listened on ({error}): name another --port.") from None
    engine = Engine(model, o.rows, slots, o.compile and config.rereads_at is None)
    engine.warm_up()
    stop = frozenset({tokenizer.eot_id, tokenizer.im_end_id, *config.eos_ids} - {None})
    service = Service(engine, tokenizer, folder.resolve().name, o, stop)
    server.RequestHandlerClass = type("Handler", (Handler,), {"service": service})
    return server, service

def serve(o: ServeOptions) -> None:
    """Serve a checkpoint over HTTP as OpenAI's API does, with a page to talk to it."""
    server, service = make_server(newest_checkpoint() if o.folder is None else find_checkpoint(o.folder), o)
    host, port = server.server_address[:2]
    try:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        say(f"http://{host}:{port}/ has a page, http://{host}:{port}/v1 is the API; Ctrl-C ends")
        service.work()
    except KeyboardInterrupt:
        say("the server has ended")
    finally:
        server.server_close()

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    if sys.argv[1:2] == ["serve"]:
        del sys.argv[1]
        app.command()(command(ServeOptions, serve))
    else:
        app.command()(command(Options, main))
    run_app(app)
