"""Write text with a checkpoint: greedy, temperature, top-k and top-p, streamed as it is written.

A language model gives a score (logit) to each token that could come next. Decoding is the choice among them,
over and over: sharpen or flatten the scores (temperature), cut off the unlikely (top-k, top-p), draw one. The
prompt is read at once (prefill); after that each token is one pass over all weights, with the keys and values
of the text so far kept in the cache. A masked model fills the gaps of a text instead.

Any Hugging Face folder of a family that model.py knows can be sampled from. Left out: beam search, penalties
for repetition.

    python sample.py                                             # the newest checkpoint in out/, a new text
    python sample.py out/python --prompt "def fib(n):" --max-new-tokens 100 --temperature 0
    python sample.py out/python --num-samples 3 --seed 1 --json  # one JSON object a sample
    python sample.py out/masked --fill "for i in <|mask|>(10):"  # a folder of `train.py --objective mlm`
    python sample.py out/sft --chat                              # talk with a folder of align.py

Top-p (nucleus): Holtzman et al. 2020 (1904.09751). Top-k: Fan et al. 2018 (1805.04833). The Gumbel-max trick:
Gumbel 1954; Maddison et al. 2014 (1411.0030).
"""

import codecs
import inspect
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

from model import (  # before torch: it says how OpenMP's threads wait
    Cache, Config, UserError, check, console, count_params, find_checkpoint, greedy, load_config, load_model,
    load_tokenizer, opt, pick_device, pick_dtype, render, run_app, say,
)

import torch
import typer

# B batch, T query length, V vocabulary.

@dataclass
class Options:
    """Hold the options of this command."""

    folder: Annotated[Path | None, typer.Argument(help="Checkpoint folder; or the newest in out/.")] = None
    prompt: Annotated[str, opt("Text", "Text to go on from (-: standard input). Empty: a new document.")] = ""
    max_new_tokens: Annotated[int, opt("Text", "Stop after so many tokens.")] = 256
    num_samples: Annotated[int, opt("Text", "Texts to write, one after the other.")] = 1
    ignore_eos: Annotated[bool, opt("Text", "Go on after the end of the text.", "--ignore-eos")] = False
    fill: Annotated[str | None, opt("Text", "Fill a text's <|mask|>s (masked models).")] = None
    chat: Annotated[bool, opt("Text", "Talk: /reset forgets, Ctrl-C ends an answer.", "--chat")] = False
    as_json: Annotated[bool, opt("Text", "A JSON object a sample (text: without prompt).", "--json")] = False
    temperature: Annotated[float, opt("Choice", "0 is greedy, 0.5 to 1 usual; higher is wilder.")] = 0.7
    top_k: Annotated[int | None, opt("Choice", "Draw among the k likeliest tokens only.")] = None
    top_p: Annotated[float | None, opt("Choice", "Draw among the likeliest that together reach p.")] = 0.9
    seed: Annotated[int | None, opt("Choice", "The same seed, the same text; sample i has seed + i.")] = None
    dtype: Annotated[str, opt("Machine", "auto, fp32, bf16 or fp16 (for GPUs).")] = "auto"
    device: Annotated[str, opt("Machine", "auto, cpu, cuda or mps.")] = "auto"
    no_cache: Annotated[bool, opt("Machine", "Read the whole text for each token.", "--no-cache")] = False

    def __post_init__(self):
        """Refuse what cannot be, before anything is loaded."""
        for name in ("max_new_tokens", "num_samples", "top_k"):
            n = getattr(self, name)
            check(n is None or n >= 1, f"--{name.replace('_', '-')} is {n}; it has to be at least 1.")
        if self.seed is None:
            self.seed = torch.Generator().seed() % 2**31
        t, p, seed = self.temperature, self.top_p, self.seed
        check(0 <= t < math.inf, f"--temperature is {t}; it is 0 (greedy) or more.")
        check(p is None or 0 < p <= 1, f"--top-p is {p}; it lies above 0 and is at most 1 (off).")
        check(0 <= seed < 2**62, f"--seed is {seed}; it is a whole number from 0 to 2^62.")
        check(self.fill is None or not self.prompt, "--fill has the whole text already: leave out --prompt.")
        check(not self.chat or (self.fill is None and not self.as_json and not self.prompt),
              "--chat reads what you type: no --prompt, --fill or --json.")


# ------------------------------------------------------------------------------------------------------------
# The idea: from logits to a token. Logits (B, V) in, (B, V) out; what is cut off is -inf.
# ------------------------------------------------------------------------------------------------------------

def temper(logits, temperature: float):
    """Divide by the temperature: below 1 the likely become likelier, above 1 all come closer.

    The best logit is moved to 0 first, which changes no probability: so no temperature overflows.

    >>> temper(torch.tensor([1.0, 3.0]), 0.5).tolist()
    [-4.0, 0.0]
    """
    return (logits - logits.amax(-1, keepdim=True)) / temperature

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
    logits = temper(logits, temperature)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return draw(logits, generator)

# ---- A text being written ----------------------------------------------------------------------------------

class Reader:
    """Read a text with a model: with a cache each token once, without one the whole text every time."""

    def __init__(self, model, slots: int, cached: bool = True):
        weight = next(model.parameters())
        self.model = model
        self.device = weight.device
        self.ids = torch.empty((1, 0), dtype=torch.int64, device=self.device)  # the text so far
        dtype = model.compute_dtype or weight.dtype
        self.cache = Cache(model.config, 1, slots, self.device, dtype) if cached else None

    @torch.inference_mode()
    def read(self, ids):
        """Read ids (1, T) behind the text so far -> the logits of the next token (1, V), float32."""
        text = torch.cat((self.ids, ids), dim=1)
        logits, _ = self.model(text if self.cache is None else ids, cache=self.cache, output="last")
        self.ids = text
        return logits[:, -1].float()

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
        return self.read(torch.tensor([ids[same:]], device=self.device))

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
        logits = model(x)[0][0, gaps, :n_vocab].float()  # (gaps, V)
        logits[:, list(banned)] = -torch.inf
        probability, best = logits.softmax(-1).max(-1)
        surest = int(probability.argmax())
        place = gaps.pop(surest)
        x[0, place] = best[surest]
        filled.append((place, int(best[surest]), float(probability[surest])))
    return x[0].tolist(), filled

# ---- A chat ------------------------------------------------------------------------------------------------

def talk(model, tokenizer, max_new_tokens: int, pick) -> None:
    """Answer each message on standard input; /reset forgets what was said, /exit or the input's end ends.

    Ctrl-C ends an answer; while nothing is being answered, the program.
    """
    context = model.config.seq_len
    reader = Reader(model, context)
    turns = []  # the ids of each question with its answer
    stop = {tokenizer.im_end_id, tokenizer.eot_id}
    say("[dim]/reset forgets, /exit ends, Ctrl-C ends an answer; a line ending in \\ goes on in the next[/]")
    while (message := read_message()) is not None:
        if message.strip() == "/exit":
            return
        if message.strip() == "/reset":
            turns = []
            say("[dim]forgotten[/]")
            continue
        question, _ = render(tokenizer, [{"role": "user", "content": message}], reply=True)
        if len(question) >= context:
            say(f"[yellow]warning:[/] that is {len(question)} tokens, more than the context of {context}: "
                "say it shorter.")
            continue
        room = context - len(question) - min(max_new_tokens, context // 4)
        if turns and sum(map(len, turns)) > room:
            say(f"[dim](the oldest turns are forgotten: the context has {context} tokens)[/]")
        while turns and sum(map(len, turns)) > room:
            turns.pop(0)
        ids = [*sum(turns, []), *question]
        new = []
        try:
            logits = reader.read_text(ids)
            tokens = stream(reader, logits, min(max_new_tokens, context - len(ids)), pick, stop)
            write(pieces(tokens, tokenizer, stop, new))
        except KeyboardInterrupt:
            pass  # what was written so far is the answer
        if new and new[-1] in stop:
            new.pop()
        turns.append([*question, *new, tokenizer.im_end_id, *tokenizer.encode("\n")])

def read_message() -> str | None:
    """Read a message, up to a line that does not end in a backslash; None at the end of the input."""
    lines = []
    while True:
        if sys.stdin.isatty():
            print("... " if lines else "> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return "\n".join(lines) or None
        line = line.rstrip("\r\n")
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            if any(part.strip() for part in lines):
                return "\n".join(lines)
            lines = []


# ------------------------------------------------------------------------------------------------------------
# The command
# ------------------------------------------------------------------------------------------------------------

def newest_checkpoint(root: str | Path = "out") -> Path:
    """Find the checkpoint in `root` whose config.json was written last."""
    configs = [p for p in Path(root).glob("**/config.json") if any(p.parent.glob("model*.safetensors"))]
    check(configs, f"There is no checkpoint in {root}/ yet: run `python train.py` first, or name a folder.")
    return max(configs, key=lambda p: p.stat().st_mtime).parent

def decode_dtype(name: str, device: torch.device, config: Config) -> torch.dtype:
    """Choose the precision of the weights; auto: float32 for a small model on a CPU, else what is fastest.

    A small one gains nothing from bfloat16, whose rounding lets near ties fall otherwise with the cache than
    without it.
    """
    if name == "auto" and device.type == "cpu" and count_params(config)[0] <= 2**28:
        return torch.float32
    return pick_dtype(name, device)

def read_prompt(o: Options, tokenizer, config: Config) -> tuple[str, list[int]]:
    """Read and encode --prompt or --fill -> (text, ids); a new document begins with the end-of-text token."""
    text = o.prompt if o.fill is None else o.fill
    try:  # an argument that was no UTF-8 reaches Python with its bytes as lone surrogates
        data = sys.stdin.buffer.read() if text == "-" else text.encode("utf-8", "surrogateescape")
        text = data.decode("utf-8")
    except UnicodeError:
        raise UserError("The prompt is not UTF-8 text.") from None
    start = tokenizer.eot_id if tokenizer.eot_id is not None else config.eos_id
    check(text or start is not None,
          "This tokenizer has no end-of-text token to begin a document with: give a --prompt.")
    ids = tokenizer.encode(text, () if o.fill is None else ("<|mask|>",)) if text else [start]
    check(o.fill is None or tokenizer.mask_id in ids,
          "There is nothing to fill: write <|mask|> where a token is missing.")
    total = len(ids) + o.max_new_tokens * config.causal
    if total > config.seq_len:
        say(f"[yellow]warning:[/] {total} tokens are more than the {config.seq_len} that this model was "
            "trained on.")
    return text, ids

def main(o: Options) -> None:
    """Write text with a checkpoint, after the prompt, to standard output; how fast, to standard error."""
    device = pick_device(o.device)
    folder = newest_checkpoint() if o.folder is None else find_checkpoint(o.folder)
    config = load_config(folder)
    tokenizer = load_tokenizer(folder)
    filling = o.fill is not None
    check(config.causal or filling, f"{folder} is a masked model: give it gaps to --fill, no --prompt.")
    check(not config.causal or not filling, f"{folder} is no masked model: give it a --prompt, not --fill.")
    check(tokenizer.n_vocab <= config.vocab_size, f"The tokenizer of {folder} is another model's: it has "
          f"{tokenizer.n_vocab} ids, and config.json {config.vocab_size}.")
    check(config.head == "lm", f"{folder} is a reward model: it gives scores, not text.")
    text, ids = ("", []) if o.chat else read_prompt(o, tokenizer, config)
    model = load_model(folder, device, decode_dtype(o.dtype, device, config))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")  # also where the terminal's language is another
    if filling:
        return print_filled(model, tokenizer, ids, o.as_json)
    if o.chat:
        return talk(model, tokenizer, o.max_new_tokens, picker(o, tokenizer.n_vocab, device))
    print_samples(o, model, tokenizer, text, ids)

def picker(o: Options, n_vocab: int, device, i: int = 0):
    """Make the `pick` of sample number i: the same seed gives the same text."""
    generator = torch.Generator(device).manual_seed(o.seed + i)
    return partial(sample, temperature=o.temperature, top_k=o.top_k, top_p=o.top_p, n_vocab=n_vocab,
                   generator=generator)

def print_samples(o: Options, model, tokenizer, text: str, ids: list[int]) -> None:
    """Write --num-samples continuations of a prompt, which is read once for all; sample i has seed + i."""
    reader = Reader(model, len(ids) + o.max_new_tokens, not o.no_cache)
    start = time.perf_counter()
    logits = reader.read_text(ids)
    check(logits.isfinite().all(), "The model gives logits that are not numbers (NaN): try --dtype fp32.")
    prefill = (time.perf_counter() - start) * 1e3  # milliseconds
    stop = set() if o.ignore_eos else {tokenizer.eot_id, tokenizer.im_end_id, model.config.eos_id}
    for i in range(o.num_samples):
        if o.num_samples > 1 and not o.as_json:
            console().rule(f"{i + 1} of {o.num_samples}", style="dim")
        reader.rewind(len(ids))
        pick = picker(o, tokenizer.n_vocab, reader.device, i)
        new = []
        texts = pieces(stream(reader, logits, o.max_new_tokens, pick, stop), tokenizer, stop, new)
        start = time.perf_counter()
        if o.as_json:
            written = "".join(texts)
        else:
            print(text, end="", flush=True)
            write(texts)
        # a token is one pass over the weights; that of the first one was the prefill
        speed = (len(new) - 1) / (time.perf_counter() - start) if len(new) > 1 else None
        if o.as_json:
            facts = {"text": written, "ids": {"prompt": ids, "continuation": new}}
            facts |= {"finish_reason": "stop" if new[-1] in stop else "length", "seed": o.seed + i}
            facts |= {"prefill_ms": round(prefill, 3), "tok_per_s": speed and round(speed, 2)}
            print(json.dumps(facts), flush=True)
        elif sys.stderr.isatty():
            rate = f", then {speed:.1f} tok/s" if speed else ""
            say(f"[dim]a prompt of {len(ids)} tokens in {prefill:.0f} ms{rate}; --seed {o.seed + i}[/]")

def print_filled(model, tokenizer, ids: list[int], as_json: bool) -> None:
    """Fill the gaps of a text and print it; as JSON with each step."""
    whole, filled = fill(model, ids, tokenizer.mask_id, tokenizer.n_vocab, tokenizer.special.values())
    text = tokenizer.decode(whole)
    steps = [{"place": i, "text": tokenizer.decode([t]), "probability": round(p, 6)} for i, t, p in filled]
    facts = {"text": text, "ids": {"prompt": ids, "filled": whole}, "steps": steps}
    print(json.dumps(facts) if as_json else text, flush=True)

def cli(**values) -> None:
    main(Options(**values))

cli.__signature__ = inspect.signature(Options)

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=main.__doc__)(cli)
    run_app(app)
