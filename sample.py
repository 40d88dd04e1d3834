"""Text from a checkpoint: greedy, temperature, top-k and top-p, streamed as it is written.

A language model gives a score (logit) to each token that could come next. Decoding is the choice among them, over
and over: sharpen or flatten the scores (temperature), cut off the unlikely tail (top-k, top-p), draw one, read it,
go on. The prompt is read at once (prefill); after that each token is one pass over all weights, with the keys and
values of the text so far kept in the cache. A masked model fills the gaps of a text instead, the surest one first.

Any Hugging Face folder of a family that model.py knows can be sampled from. Left out: beam search, penalties for
repetition.

    python sample.py                                             # the newest checkpoint under out/, a new document
    python sample.py out/python --prompt "def fib(n):" --max-new-tokens 100 --temperature 0
    python sample.py out/python --num-samples 3 --seed 1 --json  # one JSON object a sample
    python sample.py out/masked --fill "for i in <|mask|>(10):"  # a folder of `train.py --objective mlm`
    python sample.py out/sft --chat                              # talk with a folder of align.py

Top-p (nucleus): Holtzman et al. 2020 (1904.09751). Top-k: Fan et al. 2018 (1805.04833). The Gumbel-max trick:
Gumbel 1954; Maddison et al. 2014 (1411.0030).
"""

from __future__ import annotations

import codecs
import json
import math
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import typer

from model import (
    Cache,
    Config,
    UserError,
    console,
    find_checkpoint,
    greedy,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
    read_json,
    render,
    run_app,
    say,
    synchronize,
)  # fmt: skip

# B batch, T query length, V vocabulary.

EXACT_PARAMS = 2**28  # up to this size `--dtype auto` keeps to float32 on a CPU: see decode_dtype

# ---------------------------------------------------------------------------------------------------------------------
# The idea: from logits to a token. Logits (B, V) in, (B, V) out; what is cut off is -inf.


def temper(logits, temperature: float):
    """Divide by the temperature: below 1 the likely become likelier, above 1 all come closer.

    The best logit is moved to 0 first, which changes no probability: so no temperature overflows.

    >>> temper(torch.tensor([1.0, 3.0]), 0.5).tolist()
    [-4.0, 0.0]
    """
    return (logits - logits.amax(-1, keepdim=True)) / temperature


def keep_top_k(logits, k: int):
    """Exactly the k most likely tokens, also where several are equally likely.

    >>> keep_top_k(torch.tensor([2.0, 1.0, 3.0]), 2).tolist()
    [2.0, -inf, 3.0]
    """
    best, ids = logits.topk(min(k, logits.shape[-1]))
    return torch.full_like(logits, -torch.inf).scatter(-1, ids, best)


def keep_top_p(logits, p: float):
    """The nucleus: the smallest set of most likely tokens whose probability reaches p (1904.09751, eq. 2).

    A token stays when those likelier than it do not reach p yet, so the one that crosses p stays, and the likeliest
    always does. (`cumsum <= p`, often seen, drops the one that crosses; where the first token has more than p, that
    is all of them.)

    >>> keep_top_p(torch.tensor([0.2, 0.5, 0.3]).log(), 0.6).isfinite().tolist()  # 0.5 is not 0.6, 0.5 + 0.3 is
    [False, True, True]
    """
    if p >= 1:
        return logits  # and the sum of all, rounded, may reach 1 too early
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)
    before = ranked.softmax(-1).cumsum(-1).roll(1, -1)  # the probability of all that are likelier
    before[..., 0] = -1.0
    return logits.masked_fill((before >= p).scatter(-1, order, before >= p), -torch.inf)


def draw(logits, generator: torch.Generator | None = None):
    """A token with probability softmax(logits): (B, V) -> (B,).

    Gumbel-max: the argmax of logits + Gumbel noise. No probabilities are summed up, and a GPU is not waited for;
    the noise is the same whatever the logits are, so texts of the same seed part late.
    """
    exponential = torch.empty_like(logits).exponential_(generator=generator)
    return (logits - exponential.clamp_(min=1e-30).log()).argmax(-1)


def sample(logits, temperature=1.0, top_k=None, top_p=None, n_vocab=None, generator=None):
    """Logits (B, V) -> ids (B,), as `model.generate(..., pick=partial(sample, top_p=0.9))` wants it.

    In this order: no id at n_vocab or above (rows that only round the vocabulary up), temperature (0: greedy),
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


# ---------------------------------------------------------------------------------------------------------------------
# A text being written


class Reader:
    """A model and the text it has read: with a cache each `read` costs its own tokens, without one the whole text."""

    def __init__(self, model, slots: int, cached: bool = True):
        weight = next(model.parameters())
        self.model, self.ids = model, torch.empty((1, 0), dtype=torch.int64, device=weight.device)
        dtype = model.compute_dtype or weight.dtype
        self.cache = Cache(model.config, 1, slots, weight.device, dtype) if cached else None

    @torch.inference_mode()
    def read(self, ids):  # (1, T) -> logits of the token after them (1, V), float32
        if self.cache is None:
            ids = self.ids = torch.cat((self.ids, ids), dim=1)
        logits, _ = self.model(ids, cache=self.cache, output="last")
        return logits[:, -1].float()

    def rewind(self, n: int) -> None:
        """Back to the first n tokens."""
        self.ids = self.ids[:, :n]
        if self.cache is not None:
            self.cache.rewind(n)


def stream(reader: Reader, logits, max_new_tokens: int, pick=greedy, stop=frozenset()) -> Iterator[int]:
    """The ids that follow, one by one, up to and with the first one in `stop`; logits: what `reader.read` gave."""
    for left in reversed(range(max_new_tokens)):
        ids = pick(logits)  # (1,), and it stays on the device
        token = ids.item()  # the one wait for the device
        yield token
        if token in stop or not left:
            return
        logits = reader.read(ids[:, None])


@torch.inference_mode()
def fill(model, ids: list[int], mask_id: int, n_vocab: int, banned=()) -> list[tuple[int, int, float]]:
    """Replace every mask by the model's most likely token: [(place, id, probability)] in the order they were filled.

    One pass over the text for each: the gap that the model is surest of is filled first, and the next pass sees it.
    """
    x = torch.tensor([ids], device=next(model.parameters()).device)  # (1, T)
    gaps, filled = [i for i, token in enumerate(ids) if token == mask_id], []
    while gaps:
        logits = model(x)[0][0, gaps, :n_vocab].float()  # (gaps, V)
        logits[:, list(banned)] = -torch.inf
        probability, best = logits.softmax(-1).max(-1)
        surest = int(probability.argmax())
        place = gaps.pop(surest)
        x[0, place] = best[surest]
        filled.append((place, int(best[surest]), float(probability[surest])))
    return filled


# ---------------------------------------------------------------------------------------------------------------------
# Files and words


def newest_checkpoint(root: str | Path = "out") -> Path:
    """The checkpoint under `root` whose config.json was written last."""
    configs = [p for p in Path(root).glob("**/config.json") if p.parent.suffix != ".new"]  # .new: being written
    configs = [p for p in configs if any(p.parent.glob("model*.safetensors"))]
    if not configs:
        raise UserError(f"There is no checkpoint under {root}/ yet: run `python train.py` first, or name a folder.")
    return max(configs, key=lambda p: p.stat().st_mtime).parent


def read_text(text: str) -> str:
    """An argument, or standard input for "-", to its last byte."""
    try:  # an argument that was no UTF-8 reaches Python with its bytes as lone surrogates
        data = sys.stdin.buffer.read() if text == "-" else text.encode("utf-8", "surrogateescape")
        return data.decode("utf-8")
    except UnicodeError:
        raise UserError("The prompt is not UTF-8 text.") from None


def decode_dtype(name: str, device: torch.device, config: Config) -> torch.dtype:
    """auto: on a CPU float32 up to EXACT_PARAMS, since batch 1 at that size waits for calls rather than for memory,
    and bfloat16's rounding would let near ties fall otherwise with the cache than without it. Else what is fastest."""
    if name == "auto" and device.type == "cpu" and config.n_params() <= EXACT_PARAMS:
        return torch.float32
    return pick_dtype(name, device)


def encode_prompt(tokenizer, config: Config, text: str, special=()) -> list[int]:
    """Ids of a prompt; of an empty one the end-of-text token, after which a document begins."""
    start = tokenizer.eot_id if tokenizer.eot_id is not None else config.eos_id
    if not text and start is None:
        raise UserError("This tokenizer has no end-of-text token to begin a document with: give a --prompt.")
    return tokenizer.encode(text, special) if text else [start]


def write_stream(text: str, tokens: Iterator[int], tokenizer, stop, ids: list[int], out=None) -> str:
    """Write the tokens' text as they come, after `text`, and put them into `ids`; the text of a stop token is none.

    A character's bytes may be spread over several tokens: they are held back until it is whole.
    """
    utf8, parts = codecs.getincrementaldecoder("utf-8")(errors="replace"), []

    def put(piece: str) -> None:
        if out is not None and piece:
            out.write(piece)
            out.flush()

    put(text)
    for token in tokens:
        ids.append(token)
        if token not in stop:
            parts.append(utf8.decode(tokenizer.decode_bytes([token])))
            put(parts[-1])
    parts.append(utf8.decode(b"", final=True))
    put(parts[-1] + "\n")
    return "".join(parts)


# ---------------------------------------------------------------------------------------------------------------------
# The command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    folder: Annotated[Path | None, typer.Argument(help="Checkpoint folder. Default: the newest under out/.")] = None,
    prompt: Annotated[str, typer.Option(help="Text to go on from (-: standard input). Empty: a new document.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy, 0.5 to 1 usual; higher is wilder.")] = 0.7,
    top_k: Annotated[int | None, typer.Option(help="Draw among the k likeliest tokens only.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw among the likeliest that together reach p.")] = 0.9,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same text; sample i has seed + i.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, fp32, bf16 or fp16 (for GPUs).")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    num_samples: Annotated[int, typer.Option(help="Texts to write, one after the other.")] = 1,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end of the text.")] = False,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Read the whole text anew for each token.")] = False,
    fill_text: Annotated[str | None, typer.Option("--fill", help="Fill a text's <|mask|>s (masked models).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a sample (text: without prompt).")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Talk with it: /reset forgets, Ctrl-C ends an answer.")] = False,
) -> None:
    """Write text with a checkpoint, after the prompt, to standard output; how fast it went to standard error."""
    for ok, sentence in (
        (max_new_tokens >= 1, f"--max-new-tokens is {max_new_tokens}; it has to be at least 1."),
        (num_samples >= 1, f"--num-samples is {num_samples}; it has to be at least 1."),
        (0 <= temperature < math.inf, f"--temperature is {temperature}; it is 0 (greedy) or more."),
        (top_k is None or top_k >= 1, f"--top-k is {top_k}; it has to be at least 1."),
        (top_p is None or 0 < top_p <= 1, f"--top-p is {top_p}; it lies above 0 and is at most 1 (off)."),
        (seed is None or 0 <= seed < 2**62, f"--seed is {seed}; it is a whole number from 0 to 2^62."),
    ):
        check(ok, sentence)
    where = pick_device(device)
    folder = newest_checkpoint() if folder is None else find_checkpoint(folder)
    config, tokenizer = Config.from_hf(read_json(folder / "config.json")), load_tokenizer(folder)
    check(config.causal or fill_text is not None, f"{folder} is a masked model: give it gaps to --fill, no --prompt.")
    check(not config.causal or fill_text is None, f"{folder} is no masked model: give it a --prompt, not --fill.")
    check(tokenizer.n_vocab <= config.vocab_size, f"The tokenizer of {folder} is another model's: it has "
          f"{tokenizer.n_vocab} ids, and config.json {config.vocab_size}.")  # fmt: skip
    check(config.head == "lm", f"{folder} is a reward model: it gives scores, not text.")
    if chat:
        check(fill_text is None and not as_json and not prompt, "--chat reads what you type: no --prompt, --fill or --json.")
        seed = torch.Generator().seed() % 2**31 if seed is None else seed
        pick = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, n_vocab=tokenizer.n_vocab,
                       generator=torch.Generator(where).manual_seed(seed))  # fmt: skip
        return talk(load_model(folder, where, decode_dtype(dtype, where, config)), tokenizer, max_new_tokens, pick)
    text = read_text(prompt if fill_text is None else fill_text)
    ids = encode_prompt(tokenizer, config, text, ("<|mask|>",) if fill_text is not None else ())
    total = len(ids) + max_new_tokens * config.causal
    if total > config.seq_len:
        say(f"[yellow]warning:[/] {total} tokens are more than the {config.seq_len} that this model was trained on.")
    model = load_model(folder, where, decode_dtype(dtype, where, config))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(encoding="utf-8")  # also where the terminal's language is another
    if fill_text is not None:
        return print_filled(model, tokenizer, ids, as_json)

    reader, start = Reader(model, total, not no_cache), time.perf_counter()
    logits = reader.read(torch.tensor([ids], device=where))
    check(bool(logits.isfinite().all()), f"{folder} gives logits that are not numbers (NaN): try --dtype fp32.")
    synchronize(where)
    prefill_ms = (time.perf_counter() - start) * 1e3
    stop = frozenset({tokenizer.eot_id, tokenizer.im_end_id, config.eos_id} - {None} if not ignore_eos else ())
    seed = torch.Generator().seed() % 2**31 if seed is None else seed
    pick = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p, n_vocab=tokenizer.n_vocab)
    for i in range(num_samples):
        if num_samples > 1 and not as_json:
            console().rule(f"{i + 1} of {num_samples}", style="dim")
        reader.rewind(len(ids))  # the prompt is read once for all
        draws = partial(pick, generator=torch.Generator(where).manual_seed(seed + i))
        new, start = [], time.perf_counter()
        tokens = stream(reader, logits, max_new_tokens, draws, stop)
        written = write_stream(text, tokens, tokenizer, stop, new, None if as_json else sys.stdout)
        # a token is one pass over the weights; that of the first one was the prefill
        speed = (len(new) - 1) / (time.perf_counter() - start) if len(new) > 1 else None
        if as_json:
            facts = {"text": written, "ids": {"prompt": ids, "continuation": new}}
            facts |= {"finish_reason": "stop" if new[-1] in stop else "length", "prefill_ms": round(prefill_ms, 3)}
            print(json.dumps(facts | {"tok_per_s": speed and round(speed, 2), "seed": seed + i}), flush=True)
        elif sys.stderr.isatty():
            rate = f", then {speed:.1f} tok/s" if speed else ""
            say(f"[dim]a prompt of {len(ids)} tokens in {prefill_ms:.0f} ms{rate}; --seed {seed + i}[/]")


def talk(model, tokenizer, max_new_tokens: int, pick) -> None:
    """A chat: each line of standard input is a message (one that ends in a backslash goes on in the next line), and the
    answer is written as it comes. /reset forgets what was said, /exit or the end of the input ends.

    Ctrl-C ends the answer; while nothing is being answered, the program. Of a talk that outgrows the context the oldest
    turns are forgotten, and that is said."""
    context, device = model.config.seq_len, next(model.parameters()).device
    reader, turns, read = Reader(model, context), [], 0  # turns: the ids of each question with its answer; read: in the cache
    stop = frozenset({tokenizer.im_end_id, tokenizer.eot_id} - {None})
    say("[dim]/reset forgets, /exit ends, Ctrl-C ends an answer; a line that ends in \\\\ goes on in the next[/]")
    while (line := read_message()) is not None:
        if line.strip() == "/reset":
            turns, read = [], 0
            say("[dim]forgotten[/]")
            continue
        if line.strip() == "/exit":
            return
        question, _ = render(tokenizer, [{"role": "user", "content": line}], reply=True)
        if len(question) >= context:
            say(f"[yellow]warning:[/] that is {len(question)} tokens, more than the context of {context}: say it shorter.")
            continue
        before = len(turns)
        while sum(map(len, turns)) + len(question) + min(max_new_tokens, context // 4) > context and turns:
            turns, read = turns[1:], 0
        if len(turns) < before:
            say(f"[dim](the oldest {before - len(turns)} of {before} turns are forgotten: the context has {context} tokens)[/]")
        ids = [*sum(turns, []), *question]
        reader.rewind(read)
        logits, new = reader.read(torch.tensor([ids[read:]], device=device)), []
        tokens = stream(reader, logits, min(max_new_tokens, context - len(ids)), pick, stop)
        try:
            write_stream("", tokens, tokenizer, stop, new, sys.stdout)
        except KeyboardInterrupt:
            print(flush=True)
        # the last token was not read; and a turn that was cut off is ended, as all that the model has seen were
        read = len(ids) + max(0, len(new) - 1)
        ended = new[:-1] if new and new[-1] in stop else new
        turns.append([*question, *ended, tokenizer.im_end_id, *tokenizer.encode("\n")])


def read_message() -> str | None:
    """What the user types up to a line that does not end in a backslash; None at the end of the input."""
    lines = []
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("... " if lines else "> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line:
            return "\n".join(lines) or None
        if not (line := line.rstrip("\r\n")).endswith("\\"):
            lines.append(line)
            if any(part.strip() for part in lines):
                return "\n".join(lines)
            lines = []
            continue
        lines.append(line[:-1])


def print_filled(model, tokenizer, ids: list[int], as_json: bool) -> None:
    mask_id = tokenizer.special["<|mask|>"]
    check(mask_id in ids, "There is nothing to fill: write <|mask|> where a token is missing.")
    filled, whole = fill(model, ids, mask_id, tokenizer.n_vocab, tokenizer.special.values()), list(ids)
    for place, token, _ in filled:
        whole[place] = token
    text = tokenizer.decode(whole)
    steps = [{"place": i, "text": tokenizer.decode([token]), "probability": round(p, 6)} for i, token, p in filled]
    facts = {"text": text, "ids": {"prompt": ids, "filled": whole}, "steps": steps}
    print(json.dumps(facts) if as_json else text, flush=True)


def check(ok: bool, sentence: str) -> None:
    if not ok:
        raise UserError(sentence)


if __name__ == "__main__":
    run_app(app)
