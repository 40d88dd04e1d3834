"""Pretraining: a data folder in, a checkpoint folder out, on one device or on several under torchrun (DDP).

    python train.py                                    # prepare Python's own sources, train, show a sample
    python train.py --data data/mine --out out/mine    # your data (made by tokenize.py prepare)
    python train.py --resume out/mine                  # go on exactly where it was stopped or killed
    torchrun --nproc-per-node 8 train.py --preset small --tokens-per-step 524288

A step: take the next windows of the seeded order, sum the loss of each token in micro-batches, divide by the
number of tokens in the whole step (on all ranks), clip, update. So micro-batches and ranks change the speed
and nothing else, but for the random masks of dropout, which each rank draws for its micro-batches. What a run
needs to go on is a handful of numbers: weights, the optimizer's state, the step, and how many windows of each
source were taken; whatever is random is a function of the seed and one of these.

Objectives: causal (Radford et al. 2018) and masked (Devlin et al. 2018, 1810.04805) language modelling.
Left out: sharded and tensor-parallel training (parallel.py).
"""

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves this folder out
from model import (  # before torch: it says how OpenMP's threads wait
    IGNORE, START, Batches, Config, Run, Tokens, TrainOptions, Transformer, UserError, barrier,
    build_optimizer, check, check_out, clip_gradients, command, config_to_hf, count_params,
    default_data, derive, evaluate, evaluate_mixture, fingerprint, flops_per_token, generate, is_a,
    load_model, load_moe, load_state, load_tokenizer, make_config, open_data, open_run, opt, pick_dtype,
    rank_and_world, read_json, run_app, save_checkpoint, save_files, say, seed_of, setup_distributed,
    sum_over_ranks,
)

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch.nn.parallel import DistributedDataParallel as DDP

# B sequences of a micro-batch, T tokens of a sequence, L layers, V vocabulary.

@dataclass
class Options(TrainOptions):
    """Hold the options of this command: what any pretraining is told, and what this one adds."""

    objective: Annotated[str, opt("Model", "clm: the next token. mlm: masked tokens, bidirectional.",
                                  one_of=("clm", "mlm"))] = "clm"
    eval_tokens: Annotated[int, opt("Run", "Validation tokens of an evaluation, 0: all; the last takes all.",
                                    low=0)] = 100_000
    target_loss: Annotated[float | None, opt("Run", "Stop when an evaluation reaches it.", low=0)] = None
    patience: Annotated[int | None, opt("Run", "Stop after so many evaluations without a better one; "
                                        "OUT-best keeps the best.", low=1)] = None
    noise_scale: Annotated[bool, opt("Run", "Measure the critical batch size; a step takes a little longer.",
                                     "--noise-scale")] = False
    doc_mask: Annotated[bool, opt("Data", "Tokens see their own document only.", "--doc-mask")] = False

# ------------------------------------------------------------------------------------------------------------
# The ideas: masking, noise scale (the schedule and the order of the data are in model.py)
# ------------------------------------------------------------------------------------------------------------

def mask_tokens(x, mask_id: int, n_vocab: int, seeds: list):
    """Corrupt a text as BERT does (1810.04805, section 3.1): ids (B, T) -> inputs, targets (B, T).

    15 % of the tokens are targets, and one in each row at least. Of these 80 % show the mask, 10 % a random
    token, 10 % themselves, so that the model cannot know from the input which are asked for. One seed a row:
    the masks do not depend on the batch.
    """
    inputs = x.clone()
    targets = torch.full_like(x, IGNORE)
    for row, seed in enumerate(seeds):
        rng = np.random.default_rng(seed_of(*seed))
        chance = torch.from_numpy(rng.random(x.shape[1]))
        kind = torch.from_numpy(rng.random(x.shape[1]))
        noise = torch.from_numpy(rng.integers(n_vocab, size=x.shape[1]))
        chosen = chance < 0.15
        chosen[chance.argmin()] = True  # a short row may have none below
        to_random = chosen & (kind >= 0.9)
        targets[row, chosen] = x[row, chosen]
        inputs[row, chosen & (kind < 0.8)] = mask_id
        inputs[row, to_random] = noise[to_random]
    return inputs, targets

def noise_parts(small: float, big: float, k: int) -> tuple[float, float]:
    """Estimate |G|^2 and tr(S), whose ratio tr(S) / |G|^2 is the critical batch size (1812.06162, A.1).

    small, big: squared norms of the gradient of one sequence (a mean over some) and of k sequences.
    E|G_b|^2 = |G|^2 + tr(S)/b gives two equations, at b = 1 and b = k.

    >>> noise_parts(5.0, 3.0, 2)
    (1.0, 4.0)
    """
    g2 = (k * big - small) / (k - 1)
    trace = (small - big) * k / (k - 1)
    return g2, trace

class NoiseScale:
    """Average numerator and denominator apart, over the steps since the last evaluation: one says little."""

    def __init__(self, saved: dict):
        self.state = {"noise": saved.get("noise", [0.0, 0.0, 0])}  # |G|^2, tr(S), steps

    def measure(self, model: Transformer, micro_batch, windows: int, grad_norm, scale: float) -> None:
        """Measure on a step: the norm of its gradient, and those of four of its sequences by themselves."""
        check(windows > 1, "--noise-scale needs two sequences in a step: raise --tokens-per-step.")
        x, y, documents = micro_batch
        squares = []
        for row in torch.arange(min(4, len(x))).split(1):
            seen = None if documents is None else documents[row]
            losses, layers = model(x[row], y[row], doc_ids=seen)
            loss = losses.sum() / (y[row] != IGNORE).sum() + layers[:, 0].sum()
            gradient = torch.autograd.grad(loss * scale, list(model.parameters()))
            squares.append((torch.nn.utils.get_total_norm(gradient) / scale).square())
        small = sum_over_ranks(torch.stack(squares).mean()) / rank_and_world()[1]
        parts = noise_parts(float(small), float(grad_norm) ** 2, windows)
        if all(map(math.isfinite, parts)):
            old = self.state["noise"]
            self.state["noise"] = [a + b for a, b in zip(old, (*parts, 1), strict=True)]

    def figures(self, T: int) -> dict:
        """Give the critical batch size in tokens, with the number of steps that it rests on."""
        g2, trace, steps = self.state["noise"]
        self.state["noise"] = [0.0, 0.0, 0]
        known = {"noise_steps": steps} if steps else {}
        if g2 > 0:  # else all of it is noise
            known["critical_batch_tokens"] = trace / g2 * T
        return known

# ------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------

def train(o: Options) -> dict:
    """Train a model on a data folder; without options, a small one on the sources of the installed Python."""
    # 1. Where, with what, and which model
    ranks = setup_distributed(o.device)
    saved = open_run(o)
    config, sources, val, weights = open_inputs(o, ranks, saved)
    data = fingerprint(sources)
    check(saved.get("data", data) == data, f"--data is not what {o.out} was trained on: name that again.")
    corrupt = None if config.causal else Corrupt(o.seed, sources[0].folder)
    stopper = Stopper(o, saved)
    noise = NoiseScale(saved)

    # 2. What a step needs, and what surrounds it
    model, optimizer = open_model(o, config, ranks)
    forward = DDP(model) if ranks.world > 1 else model
    batches = Batches(sources, weights, o, config.seq_len, ranks.device, ranks.rank, ranks.world,
                      saved.get("taken"), corrupt)
    moe = load_moe() if config.n_expert else None
    tokenizer = Path(o.resume or o.init or sources[0].folder, "tokenizer.json")  # its folder's template too

    def save(folder: Path, state: dict | None) -> None:
        if ranks.rank == 0 and state is not None:
            state |= stopper.state | noise.state | {"taken": batches.taken, "data": data}
            state = (optimizer.state_dict(), state)
        if ranks.rank == 0:
            save_checkpoint(folder, model, tokenizer, state=state)
        barrier()

    def measure(last: bool) -> dict:
        result = noise.figures(config.seq_len)
        if o.patience or not last:  # the best and the last are compared over the same part of the text
            result |= assess(o, model, val, weights, corrupt, o.eval_tokens)
            result |= stopper.judge(result["val_loss"], save)
        if last or "stop" in result:
            result |= assess(o, model, val, weights, corrupt, None)
        return result

    # 3. The steps
    run = Run(o, ranks, save, measure, saved, flops_per_token(config))
    for step, lr in run.steps():
        micro_batches, targets, windows = batches.at(step)
        torch.manual_seed(seed_of(o.seed, step, ranks.rank))  # of dropout
        loss = aux = torch.zeros((), device=ranks.device)
        for i, (x, y, documents) in enumerate(micro_batches):
            with sync_gradients(forward, i == len(micro_batches) - 1):
                losses, layers = forward(x, y, doc_ids=documents)  # (B, T): nats of each token; (L, ..)
                layers = layers * (len(x) / windows)  # what each layer adds: means over sequences
                part = losses.sum() / targets + layers[:, 0].sum()
                (part * (run.scale * ranks.world)).backward()  # DDP divides by the number of ranks: undo that
            loss = loss + losses.detach().sum() / targets
            aux = aux + layers.detach()
        grad_norm = clip_gradients(model.parameters(), o.grad_clip, run.scale)
        if o.noise_scale:
            noise.measure(model, micro_batches[0], windows, grad_norm, run.scale)
        loss, aux = sum_over_ranks(loss), sum_over_ranks(aux)
        facts = {"tokens": o.tokens_per_step} | (moe.routing_record(aux, config) if moe else {})
        if run.update(optimizer, lr, loss=loss, grad_norm=grad_norm, **facts) and moe:
            moe.shift_bias(model, aux)
    report(o, run, model, batches)
    return run.result

def open_inputs(o: Options, ranks, saved: dict) -> tuple[Config, list[Tokens], list[Tokens], list[float]]:
    """Open the data and choose the model -> its config, training texts, validation texts, their weights."""
    default_data(o.data, ranks)
    sources, val, weights = open_data(o.data)
    causal = o.objective == "clm"
    config = make_config(o, sources[0], bool(saved), causal=causal)
    check(config.causal == causal, f"{o.resume or o.init} has the other --objective: choose its own.")
    derive(o, config, ranks.world, ranks.device)
    for tokens in sources + val:
        check(tokens.n > config.seq_len,
              f"{tokens.path} has {tokens.n} tokens, no more than a context: lower --seq-len.")
    say(describe(o, config, sources, ranks))
    return config, sources, val, weights

def sync_gradients(forward, last: bool):
    """Let DDP add the gradients up over the ranks once, in the backward pass of the last micro-batch."""
    return contextlib.nullcontext() if last or not isinstance(forward, DDP) else forward.no_sync()

def open_model(o: Options, config: Config, ranks):
    """Build model and optimizer: fresh from the seed, with the weights of --init, or as the run left them."""
    model = Transformer(config)
    if o.resume or o.init:
        model.load_state_dict(load_model(o.resume or o.init).state_dict())
    else:
        model.init_weights(o.seed)
    model.compute_dtype = pick_dtype(o.dtype, ranks.device)
    model.recompute = o.recompute
    model.to(ranks.device).train()
    optimizer = build_optimizer(model, o.optimizer, o.lr, o.weight_decay)
    if o.resume:
        optimizer.load_state_dict(load_state(o.resume)[0])
    if o.compile == "on":
        try_to_compile(model, o.micro_batch)
    return model, optimizer

def try_to_compile(model: Transformer, B: int) -> None:
    """Compile the blocks; say so in a line, and go on, where that cannot be done (no C++ compiler, say)."""
    device = next(model.parameters()).device
    ids = torch.zeros(B, model.config.seq_len, dtype=torch.long, device=device)
    say("Compiling (--compile off to begin at once) ...")
    model.compile_blocks()
    try:
        model(ids, ids)[0].sum().backward()
    except Exception as error:  # whatever a compiler may raise: the run goes on without it
        for block in model.layers.values():
            block._compiled_call_impl = None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:100]
        say(f"torch.compile does not work here ({reason}); going on without it.")
    model.zero_grad()

class Corrupt:
    """Make inputs and targets of a masked model from windows of text."""

    def __init__(self, seed: int, folder: Path):
        tokenizer = load_tokenizer(folder)
        self.seed = seed
        self.mask_id = tokenizer.mask_id
        self.n_vocab = tokenizer.n_vocab
        check(self.mask_id is not None, f"--objective mlm needs a tokenizer with a <|mask|> token: that of "
              f"{folder} has none, so prepare the data with another.")

    def __call__(self, x, y, rows):
        """Mask for training: a window's masks depend on the seed and on its place in the source's order."""
        return mask_tokens(x, self.mask_id, self.n_vocab, [(self.seed, *row) for row in rows])

    def fixed(self, x):
        """Mask for an evaluation, always in the same way: the masks depend on the window's text alone."""
        seeds = [("val", row.numpy().tobytes()) for row in x]
        return mask_tokens(x, self.mask_id, self.n_vocab, seeds)

def assess(o: Options, model, val: list[Tokens], weights, corrupt: Corrupt | None, limit: int | None) -> dict:
    """Evaluate on the validation text; of masked models also how many masked tokens they get right."""
    size = (model.config.seq_len, o.micro_batch, limit)

    def one(tokens: Tokens) -> dict:
        if corrupt:
            return evaluate_masked(model, tokens, *size, corrupt, o.doc_mask)
        return evaluate(model, tokens, *size, doc_mask=o.doc_mask)

    result = evaluate_mixture(one, val, weights)
    return result | {"val_ppl": math.exp(min(result["val_loss"], 50))}

@torch.no_grad()
def evaluate_masked(model, tokens: Tokens, T: int, B: int, limit: int | None, corrupt: Corrupt,
                    doc_mask: bool) -> dict:
    """Measure loss and accuracy on masked tokens, the same ones at every call."""
    device = next(model.parameters()).device
    total = torch.zeros(3, dtype=torch.float64)  # nats, right, masked
    model.eval()
    for x, y in tokens.in_order(T, B, limit, *rank_and_world()):
        documents = tokens.documents(x).to(device) if doc_mask else None
        inputs, targets = corrupt.fixed(x)
        chosen = (targets != IGNORE) & (y != IGNORE)  # not beyond the text's end, nor rows that fill up
        logits = model(inputs.to(device), doc_ids=documents)[0][chosen.to(device)].float()  # (masked, V)
        targets = targets[chosen].to(device)
        nats = F.cross_entropy(logits, targets, reduction="sum")
        right = (logits.argmax(-1) == targets).sum()
        total += torch.tensor([nats, right, len(targets)])
    model.train()
    nats, right, count = sum_over_ranks(total).tolist()
    return {"val_loss": nats / count, "val_acc": right / count, "val_tokens": int(count)}

class Stopper:
    """End a run early: at --target-loss, or after --patience evaluations without a better one."""

    def __init__(self, o: Options, saved: dict):
        self.o = o
        self.folder = Path(f"{Path(o.out)}-best")
        self.state = {"run": str(time.time_ns()), "best": None, "waited": 0}
        self.state |= {name: saved[name] for name in self.state if name in saved}
        if not o.patience:
            return
        check(not o.init or self.folder.resolve() != Path(o.init).resolve(),
              f"--patience would keep the best model in {o.init}, which the run begins with: change --out.")
        size = o.eval_tokens
        if self.state["best"] is not None:
            size = saved["options"].get("eval_tokens", size)
        check(o.eval_tokens == size, f"--patience compares evaluations alike: leave --eval-tokens at {size}.")
        mark = self.folder / "best.json"
        try:
            begins = o.overwrite and not o.resume  # where a run of the same name left its best
            if not mark.is_file() or not (begins or read_json(mark).get("run") == self.state["run"]):
                check_out(self.folder, overwrite=False)
        except (UserError, OSError):
            raise UserError(f"--patience keeps the best model in {self.folder}, and that is not this run's: "
                            "move it away, or choose another --out.") from None

    def judge(self, loss: float, save: Callable) -> dict:
        """Count an evaluation, and keep the best -> {"stop": the reason} if the run has to end."""
        o, best = self.o, self.state["best"]
        if o.patience and loss < (math.inf if best is None else best):
            self.state |= {"best": loss, "waited": 0}
            mark = json.dumps({"run": self.state["run"], "val_loss": loss})
            if rank_and_world()[0] == 0:
                save_files(self.folder, {"best.json": mark + "\n"})
            save(self.folder, None)
        elif o.patience:
            self.state["waited"] += 1
        if o.target_loss is not None and loss <= o.target_loss:
            return {"stop": f"The target of {o.target_loss} is reached."}
        if o.patience and self.state["waited"] >= o.patience:
            return {"stop": f"No better for {o.patience} evaluations; the best is in {self.folder}."}
        return {}

# ------------------------------------------------------------------------------------------------------------
# Words and pictures
# ------------------------------------------------------------------------------------------------------------

def describe(o: Options, config: Config, sources: list[Tokens], ranks) -> str:
    """Say what is about to be trained, on what, and as which class it is saved."""
    arch = config_to_hf(config)["architectures"][0]
    kind = f"saved as {arch}"
    if arch.startswith("Octavo"):
        kind = 'saved as model_type "octavo": no stock class is all that this model is'
    total, active = count_params(config)
    part = f", {active / 1e6:.1f}M of them active" if config.n_expert else ""
    epochs = o.tokens_per_step * o.max_steps / sum(t.n for t in sources)
    many = f" x {ranks.world}" if ranks.world > 1 else ""
    return (f"{total / 1e6:.1f}M parameters{part} ({config.n_layer} layers, {config.n_embd} wide, context "
            f"{config.seq_len}), {kind}\n{o.max_steps} steps of {o.tokens_per_step:,} tokens = {epochs:.2f} "
            f"epochs of {', '.join(str(t.folder) for t in sources)}; {o.optimizer}, {o.dtype} on "
            f"{ranks.device.type}{many}")

def curve(records: list[dict], width: int = 72, height: int = 12) -> str:
    """Draw the losses over the steps with characters: the mean of each column."""
    columns = {}  # (mark, column) -> losses
    first = records[0]["step"]
    last = records[-1]["step"]
    for record in records:
        x = (record["step"] - first) * (width - 1) // max(1, last - first)
        for mark, name in (("·", "loss"), ("o", "val_loss")):
            if is_a(record.get(name), float):  # (a loss that was no number is null)
                columns.setdefault((mark, x), []).append(record[name])
    means = {place: sum(losses) / len(losses) for place, losses in columns.items()}
    if len(means) < 2:
        return ""
    # the first losses are far above the rest: the highest twentieth is cut off at the top
    ranked = sorted(means.values())
    low = ranked[0]
    high = ranked[-max(1, len(ranked) // 20)]
    rows = [[" "] * width for _ in range(height)]
    for (mark, x), mean in sorted(means.items(), reverse=True):  # validation comes last, and on top
        depth = (high - min(mean, high)) / max(high - low, 1e-9)
        rows[round(depth * (height - 1))][x] = mark
    lines = []
    for i, row in enumerate(rows):
        label = high - (high - low) * i / (height - 1)
        lines.append(f"{label:6.2f} │{''.join(row).rstrip()}")
    axis = f"step {first}{last:>{width - 5 - len(str(first))}}"
    return "\n".join([*lines, f"       └{'─' * width}", f"        {axis}   · train   o val"])

def report(o: Options, run: Run, model: Transformer, batches: Batches) -> None:
    """Show the curve, the figures of the run, and a sample, on rank 0."""
    from rich.table import Table
    from rich.text import Text

    if run.ranks.rank:
        return
    say(curve(run.records))
    facts = {}
    for name, value in run.result.items():
        if name != "stop":
            facts[name] = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"
    if len(batches.sources) > 1:
        shares = np.array(batches.taken) / sum(batches.taken)
        words = [f"{t.folder.name} {share:.1%}" for t, share in zip(batches.sources, shares, strict=True)]
        facts["share of each source"] = ", ".join(words)
    for name, form in (("tok_per_s", ",.0f"), ("mfu", ".1%")):
        values = [record[name] for record in run.records if is_a(record.get(name), float)]
        if values:
            facts[f"{name}, median"] = format(np.median(values), form)
    facts["steps skipped"] = str(run.skipped)
    facts["seconds, of them evaluation"] = f"{time.perf_counter() - START:.1f}, {run.eval_seconds:.1f}"
    table = Table("figure", "value", title=Text(o.out), title_justify="left")
    for name, value in facts.items():
        table.add_row(Text(name), Text(value))  # a folder's name is no markup
    say(table)
    loads = [record["load"] for record in run.records if "load" in record]
    if loads:
        say(load_moe().load_bars(loads[-1]))
    if o.objective == "clm":
        say("A sample (`python sample.py` for more):", style="bold")
        text = write_sample(model, load_tokenizer(o.out), batches.sources[0].eot_id, o.seed)
        say(text, style="cyan")

def write_sample(model: Transformer, tokenizer, eot_id: int, seed: int) -> str:
    """Let the model write 200 tokens of a new document."""
    generator = torch.Generator().manual_seed(seed)

    def pick(logits):
        p = (logits[:, : tokenizer.n_vocab].cpu() / 0.7).softmax(-1)
        return torch.multinomial(p, 1, generator=generator)[:, 0].to(logits.device)

    [ids] = generate(model, [[eot_id]], 200, pick, eos_id=eot_id)
    return tokenizer.decode(ids)

if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(command(Options, train))
    run_app(app)
