"""Write text with a checkpoint: greedy, temperature, top-k and top-p, streamed as it is written.

A language model gives a score (logit) to each token that could come next. Decoding is the choice among them,
over and over: sharpen or flatten the scores (temperature), cut off the unlikely (top-k, top-p), draw one. A
masked model fills the gaps of a text instead. Any Hugging Face folder of a family that model.py knows opens.
Left out: beam search, penalties for repetition.

    python sample.py                                             # the newest checkpoint in out/, a new text
    python sample.py out/python --prompt "def fib(n):" --max-new-tokens 100 --temperature 0
    python sample.py out/python --num-samples 3 --seed 1 --json  # one JSON object a sample
    python sample.py out/masked --fill "for i in <|mask|>(10):"  # a folder of `train.py --objective mlm`
    python sample.py out/sft --chat                              # talk with a folder of align.py
    python sample.py out/python --window 252 --max-new-tokens 9999 --ignore-eos  # on and on, in fixed memory

Top-p: Holtzman et al. 2020 (1904.09751). Top-k: Fan et al. 2018 (1805.04833). Gumbel-max: 1411.0030.
Attention sinks: Xiao et al. 2023 (2309.17453).
"""

import codecs
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from model import (  # before torch: it says how OpenMP's threads wait
    Cache, Config, UserError, apply_rope, check, command, console, count_weights, find_checkpoint, greedy,
    load_config, load_model, load_tokenizer, opt, pick_device, pick_dtype, read_json, render, rope_angles,
    rope_frequencies, run_app, say,
)

import torch
import typer

# B batch, T query length, V vocabulary, L layers, K KV heads, D head_dim.

@dataclass
class Options:
    """Hold the options of this command."""

    folder: Annotated[Path | None, typer.Argument(help="Checkpoint folder; or the newest in out/.")] = None
    prompt: Annotated[str, opt("Text", "Text to go on from (-: standard input). Empty: a new document.")] = ""
    max_new_tokens: Annotated[int, opt("Text", "Stop after so many tokens.", low=1)] = 256
    num_samples: Annotated[int, opt("Text", "Texts to write, one after the other.", low=1)] = 1
    ignore_eos: Annotated[bool, opt("Text", "Go on after the end of the text.", "--ignore-eos")] = False
    fill: Annotated[str | None, opt("Text", "Fill a text's <|mask|>s (masked models).")] = None
    chat: Annotated[bool, opt("Text", "Talk: /reset forgets, Ctrl-C ends an answer.", "--chat")] = False
    json: Annotated[bool, opt("Text", "A JSON object a sample (text: without prompt).", "--json")] = False
    window: Annotated[int | None, opt("Memory", "Text without end: see so many last tokens.", low=1)] = None
    sinks: Annotated[int, opt("Memory", "Beside a --window: keep so many first tokens.", low=0)] = 4
    summaries: Annotated[int, opt("Memory", "Beside a --window: averages of older tokens.", low=0)] = 0
    temperature: Annotated[float, opt("Choice", "0: greedy, 0.5 to 1: usual, higher: wilder.", low=0)] = 0.7
    top_k: Annotated[int | None, opt("Choice", "Draw among the k likeliest tokens only.", low=1)] = None
    top_p: Annotated[float | None, opt("Choice", "Draw among the likeliest up to p; 1: all.", low=0)] = 0.9
    seed: Annotated[int | None, opt("Choice", "To get a text again; sample i has seed + i.", low=0)] = None
    dtype: Annotated[str, opt("Machine", "auto, fp32, bf16 or fp16 (for GPUs).")] = "auto"
    device: Annotated[str, opt("Machine", "auto, cpu, cuda or mps.")] = "auto"
    no_cache: Annotated[bool, opt("Machine", "Read the whole text for each token.", "--no-cache")] = False

    def __post_init__(self):
        """Refuse what cannot be, before anything is loaded."""
        changed = [name for name in vars(self) if getattr(self, name) != getattr(Options, name)]
        for mode, useless in USELESS.items():
            given = [f"--{name}" for name in useless if mode in changed and name in changed]
            check(not given, f"--{mode} has no use for {', '.join(given).replace('_', '-')}: leave it out.")
        stray = self.window is None and {"sinks", "summaries"} & {*changed}
        check(not stray, "--sinks and --summaries stand beside a --window: give that, too.")
        if self.seed is None:
            self.seed = torch.Generator().seed() % 2**31

# What generation_config.json may ask for; beside it what changes nothing.
OTHER_SETTINGS = {"temperature": None, "top_k": None, "top_p": None, "repetition_penalty": 1.0, "min_p": 0.0,
                  "typical_p": 1.0, "num_beams": 1, "no_repeat_ngram_size": 0, "stop_strings": None,
                  "suppress_tokens": None, "bad_words_ids": None}
CHOICE = ("temperature", "top_k", "top_p", "seed")
MEMORY = ("window", "sinks", "summaries")
USELESS = {"fill": ("prompt", "max_new_tokens", "num_samples", "ignore_eos", "no_cache", *MEMORY, *CHOICE),
           "chat": ("prompt", "fill", "num_samples", "ignore_eos", "no_cache", *MEMORY, "json"),
           "window": ("no_cache",)}

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

def draw(logits, generator: torch.Generator | None = None):
    """Draw a token with probability softmax(logits): (B, V) -> (B,).

    Gumbel-max: the argmax of logits + Gumbel noise. No probabilities are summed up, and a GPU is not waited
    for; the noise is the same whatever the logits are, so texts of the same seed part late.
    """
    exponential = torch.empty_like(logits).exponential_(generator=generator)
    return (logits - exponential.clamp_(min=1e-30).log()).argmax(-1)

def sample(logits, temperature=1.0, top_k=None, top_p=None, n_vocab=None, generator=None):
    """Choose the next tokens: (B, V) -> ids (B,); partial(sample, top_p=0.9) is a `pick` for model.generate.

    In this order: no id at n_vocab or above (they only round the vocabulary up), temperature (0: greedy),
    top-k, then top-p of what is left. None is off.
    """
    logits = logits[..., :n_vocab]
    if temperature == 0:
        return greedy(logits)
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # the best at 0: nothing overflows
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return draw(logits, generator)

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

# ---- A text being written ----------------------------------------------------------------------------------

class Reader:
    """Read a text with a model: with a cache each token once, without one the whole text every time.

    window, sinks, summaries: of a RollingCache, for a text without end, whose ids are not kept either.
    """

    def __init__(self, model, cached: bool = True, window: int | None = None, sinks=0, summaries=0):
        weight = next(model.parameters())
        self.model = model
        self.ids = torch.empty((1, 0), dtype=torch.int64, device=weight.device)  # the text so far
        dtype = model.compute_dtype or weight.dtype
        self.cache = Cache(model.config, 1, 0, weight.device, dtype) if cached else None
        self.rolls = window is not None
        if self.rolls:  # short blocks: a block's first token sees less
            self.cache = RollingCache(model.config, 1, window, sinks, summaries, max(1, window // 8),
                                      weight.device, dtype)

    @torch.inference_mode()
    def read(self, ids):
        """Read ids (1, T) behind the text so far -> the logits of the next token (1, V), float32."""
        if self.rolls:
            for block in ids.split(self.cache.block, dim=1):
                logits, _ = self.model(block, cache=self.cache, output="last")
            return logits[:, -1].float()
        text = torch.cat((self.ids, ids), dim=1)
        border = self.model.config.rereads_at
        if border is not None and self.ids.shape[1] <= border < text.shape[1] and self.cache is not None:
            self.rewind(0)
            ids = text
        if self.cache is not None and text.shape[1] > self.cache.positions.shape[1]:
            self.cache.grow(ids.shape[1] + 255)  # in blocks, since all of it is moved
        logits, _ = self.model(text if self.cache is None else ids, cache=self.cache, output="last")
        self.ids = text
        return logits[:, -1].float()

    @torch.inference_mode()
    def rewind(self, n: int) -> None:
        """Go back to the first n tokens."""
        self.ids = self.ids[:, :n]
        if self.cache is not None:
            self.cache.rewind(n)

    def read_text(self, ids: list[int]):
        """Read a whole text, but for what is known of its beginning -> the next token's logits (1, V)."""
        known = self.ids[0].tolist()[: len(ids) - 1]  # the last one has to be read in any case
        same = next((i for i, token in enumerate(known) if token != ids[i]), len(known))
        self.rewind(same)
        return numbers(self.read(torch.tensor([ids[same:]], device=self.ids.device)))

def numbers(logits):
    """Return the logits, or refuse them: of NaN any token would be as good as another."""
    check(logits.isfinite().all(), "The model gives logits that are not numbers (NaN): try --dtype fp32.")
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

def pieces(tokens: Iterable[int], tokenizer, stop, ids: list[int]) -> Iterator[str]:
    """Yield the text of each token as it comes, and put the token into `ids`; a stop token has no text.

    A character's bytes may be spread over several tokens: they are held back until it is whole.
    """
    utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        ids.append(token)
        if token not in stop:
            yield utf8.decode(tokenizer.decode_bytes([token]))
    yield utf8.decode(b"", final=True)

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

def talk(model, tokenizer, max_new_tokens: int, pick, stop: set) -> None:
    """Answer each message on standard input; /reset forgets what was said, /exit or the input's end ends.

    Ctrl-C ends an answer; while nothing is being answered, the program.
    """
    reader = Reader(model)
    no_text = {*tokenizer.special.values(), *stop}
    messages = []
    say("/reset forgets, /exit ends, Ctrl-C ends an answer; a line goes on after \\ at its end", style="dim")
    while (message := read_message()) and message.strip() != "/exit":
        if message.strip() == "/reset":
            messages = []
            say("forgotten", style="dim")
            continue
        if "\ufffd" in message:
            say("warning: bytes that are no text are read as U+FFFD", style="yellow")
        messages.append({"role": "user", "content": message})
        try:
            ids = conversation(tokenizer, messages, model.config, max_new_tokens)
        except UserError as error:  # of this message: the next one may do
            say(f"warning: {error}", markup=False, style="yellow")
            messages.pop()
            continue
        new = []
        try:
            left = min(max_new_tokens, model.config.seq_len - len(ids))
            tokens = stream(reader, reader.read_text(ids), left, pick, stop)
            write(pieces(tokens, tokenizer, stop, new))
        except KeyboardInterrupt:
            pass  # what was written so far is the answer
        answer = tokenizer.decode([token for token in new if token not in no_text])
        messages.append({"role": "assistant", "content": answer})

def conversation(tokenizer, messages: list[dict], config: Config, max_new_tokens: int) -> list[int]:
    """Encode a conversation up to where the answer begins; of what does not fit, the oldest turns go."""
    alone, _ = render(tokenizer, messages[-1:], reply=True)
    check(len(alone) < config.seq_len, f"{len(alone)} tokens are more than the context: say it shorter.")
    room = config.seq_len - min(max_new_tokens, config.seq_len // 4)
    ids, _ = render(tokenizer, messages, reply=True)
    while len(messages) > 1 and len(ids) > room:
        say(f"(the oldest turns are forgotten: the context has {config.seq_len} tokens)", style="dim")
        del messages[:2]
        ids, _ = render(tokenizer, messages, reply=True)
    return known(ids, config)

def read_message() -> str | None:
    """Read a message, up to a line that does not end in a backslash; None at the end of the input."""
    text = ""
    while True:
        if sys.stdin.isatty():
            print("... " if text else "> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        text += line
        if line.endswith("\\\n"):
            continue
        message = text.removesuffix("\n").removesuffix("\\").replace("\\\n", "\n")
        if message.strip() or not line:
            return message.strip() and message or None
        text = ""

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
    device = pick_device(o.device)
    folder = newest_checkpoint() if o.folder is None else find_checkpoint(o.folder)
    config = load_config(folder)
    tokenizer = load_tokenizer(folder)
    filling = o.fill is not None
    check(config.head == "lm", f"{folder} is a reward model: it gives scores, not text.")
    check(config.causal or filling, f"{folder} is a masked model: give it gaps to --fill, no --prompt.")
    check(not config.causal or not filling, f"{folder} is no masked model: give it a --prompt, not --fill.")
    if o.chat:  # a folder without conversations is refused now, not after the first message
        known(render(tokenizer, [{"role": "user", "content": "?"}], reply=True)[0], config)
    else:
        text, ids = read_prompt(o, tokenizer, config)
    name_other_settings(folder, o)
    small = device.type == "cpu" and count_weights(config)[2] < 2**28  # bf16 is no faster, and near ties move
    dtype = "fp32" if o.dtype == "auto" and small else o.dtype
    model = load_model(folder, device, pick_dtype(dtype, device))
    for file, how in ((sys.stdout, {"encoding": "utf-8"}), (sys.stdin, {"errors": "replace"})):
        if hasattr(file, "reconfigure"):
            file.reconfigure(**how)  # also where the terminal's language is another
    stop = set() if o.ignore_eos else {tokenizer.eot_id, tokenizer.im_end_id, *config.eos_ids}
    if filling:
        print_filled(model, tokenizer, ids, o.json)
    elif o.chat:
        talk(model, tokenizer, o.max_new_tokens, picker(o, tokenizer.n_vocab, device), stop)
    else:
        print_samples(o, model, tokenizer, text, ids, stop)

def name_other_settings(folder: Path, o: Options) -> None:
    """Say what a folder's generation_config.json asks for and this command does not do."""
    path = folder / "generation_config.json"
    asked = read_json(path) if path.is_file() else {}
    asked = {name: asked[name] for name in OTHER_SETTINGS if asked.get(name) is not None}
    used = OTHER_SETTINGS | {"temperature": o.temperature, "top_p": o.top_p, "top_k": o.top_k}
    other = [f"{name} {value}" for name, value in asked.items() if value != used[name]]
    if other and o.fill is None:
        say(f"generation_config.json suggests {', '.join(other)}: not followed; see --help", style="dim")

def picker(o: Options, n_vocab: int, device, i: int = 0):
    """Make the `pick` of sample number i: the same seed gives the same text."""
    generator = torch.Generator(device).manual_seed(o.seed + i)
    return partial(sample, temperature=o.temperature, top_k=o.top_k, top_p=o.top_p, n_vocab=n_vocab,
                   generator=generator)

def print_samples(o: Options, model, tokenizer, text: str, ids: list[int], stop: set) -> None:
    """Write --num-samples continuations of a prompt, which is read once for all; sample i has seed + i."""
    reader = Reader(model, not o.no_cache, o.window, o.sinks, o.summaries)
    start = time.perf_counter()
    logits = reader.read_text(ids)
    prefill = (time.perf_counter() - start) * 1e3  # milliseconds
    for i in range(o.num_samples):
        if o.num_samples > 1 and not o.json:
            console().rule(f"{i + 1} of {o.num_samples}", style="dim")
        if i and reader.rolls:  # the prompt may have left the window
            logits = reader.read_text(ids)
        else:
            reader.rewind(len(ids))
        pick = picker(o, tokenizer.n_vocab, logits.device, i)
        new = []
        texts = pieces(stream(reader, logits, o.max_new_tokens, pick, stop), tokenizer, stop, new)
        start = time.perf_counter()
        written = "".join(texts) if o.json else write(itertools.chain([text], texts))
        # a token is one pass over the weights; that of the first one was the prefill
        speed = (len(new) - 1) / (time.perf_counter() - start) if len(new) > 1 else None
        if o.json:
            facts = {"text": written, "ids": {"prompt": ids, "continuation": new}, "seed": o.seed + i,
                     "finish_reason": "stop" if new[-1] in stop else "length",
                     "prefill_ms": round(prefill, 3), "tok_per_s": speed and round(speed, 2)}
            print(json.dumps(facts), flush=True)
        elif sys.stderr.isatty():
            rate = f", then {speed:.1f} tok/s" if speed else ""
            say(f"a prompt of {len(ids)} tokens in {prefill:.0f} ms{rate}; --seed {o.seed + i}", style="dim")

def print_filled(model, tokenizer, ids: list[int], as_json: bool) -> None:
    """Fill the gaps of a text and print it; as JSON with each step."""
    whole, filled = fill(model, ids, tokenizer.mask_id, tokenizer.n_vocab, tokenizer.special.values())
    text = tokenizer.decode(whole)
    steps = [{"place": i, "text": tokenizer.decode([t]), "probability": round(p, 6)} for i, t, p in filled]
    facts = {"text": text, "ids": {"prompt": ids, "filled": whole}, "steps": steps}
    print(json.dumps(facts) if as_json else text, flush=True)

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command(Options, main))
    run_app(app)
