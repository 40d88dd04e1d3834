"""Pretraining: a data folder in, a checkpoint folder out, on one device or on several under torchrun (DDP).

    python train.py                                    # prepare Python's own sources, train, show a sample
    python train.py --data data/mine --out out/mine    # your data (made by tokenize.py prepare)
    python train.py --resume out/mine                  # go on exactly where it was stopped or killed
    torchrun --nproc-per-node 8 train.py --preset small --tokens-per-step 524288

A step: take the next windows of the seeded order, sum the loss of each token in micro-batches, divide by the
number of tokens in the whole step (on all ranks), clip, update. So micro-batch and accumulation change the
speed and nothing else. What a run needs to go on is a handful of numbers: weights, the optimizer's state, the
step, and how many windows of each source were taken; whatever is random is a function of the seed and one of
these.

Objectives: causal (Radford et al. 2018) and masked (Devlin et al. 2018, 1810.04805) language modelling.
Left out: sharded and tensor-parallel training (parallel.py).
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from model import (  # before torch: it says how OpenMP's threads wait
    IGNORE, START, Batches, Config, Run, Tokens, TrainOptions, Transformer, barrier, build_optimizer, check,
    clip_gradients, command, config_to_hf, console, count_params, default_data, derive, evaluate,
    evaluate_mixture, fingerprint, generate, load_model, load_moe, load_state, load_tokenizer, make_config,
    open_data, open_run, opt, pick_dtype, rank_and_world, run_app, save_checkpoint, say, seed_of,
    setup_distributed, sum_over_ranks,
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
    target_loss: Annotated[float | None, opt("Run", "Stop at the first evaluation at or below it.")] = None
    patience: Annotated[int | None, opt("Run", "Stop after so many evaluations without a better one; "
                                        "OUT-best keeps the best.", low=1)] = None
    noise_scale: Annotated[bool, opt("Run", "Measure the critical batch size.", "--noise-scale")] = False
    doc_mask: Annotated[bool, opt("Data", "Tokens see their own document only.", "--doc-mask")] = False


# ------------------------------------------------------------------------------------------------------------
# The ideas: masking, noise scale (the schedule and the order of the data are in model.py)
# ------------------------------------------------------------------------------------------------------------


def mask_tokens(x, mask_id: int, n_vocab: int, seeds: list):
    """Corrupt a text as BERT does (1810.04805, section 3.1): ids (B, T) -> inputs, targets (B, T).

    15 % of the tokens are targets. Of these 80 % show the mask, 10 % a random token, 10 % themselves, so that
    the model cannot know from the input which are asked for. One seed a row: the masks do not depend on the
    batch.
    """
    inputs = x.clone()
    targets = torch.full_like(x, IGNORE)
    for row, seed in enumerate(seeds):
        rng = np.random.default_rng(seed_of(*seed))
        u = rng.random(x.shape[1])
        kind = rng.random(x.shape[1])
        chosen, to_mask, to_random = (torch.from_numpy(m) for m in (u < 0.15, kind < 0.8, kind >= 0.9))
        targets[row, chosen] = x[row, chosen]
        inputs[row, chosen & to_mask] = mask_id
        noise = torch.from_numpy(rng.integers(n_vocab, size=x.shape[1]))
        inputs[row, chosen & to_random] = noise[chosen & to_random]
    return inputs, targets

def noise_scale(norms_small: list[float], norm_big: float) -> float:
    """Estimate the critical batch size, tr(S) / |G|^2, in units of the small batch (1812.06162, A.1).

    norms_small: squared norms of the mean gradients of k batches of one unit; norm_big: of the mean of them
    all. E|G_b|^2 = |G|^2 + tr(S)/b gives two equations, at b = 1 and b = k.

    >>> noise_scale([5.0, 5.0], 3.0)       # |G|^2 = 1, tr(S) = 4
    4.0
    """
    k = len(norms_small)
    small = sum(norms_small) / k
    g2 = (k * norm_big - small) / (k - 1)
    trace = (small - norm_big) / (1 - 1 / k)
    return trace / g2 if g2 > 0 else math.inf

def measure_noise(model: Transformer, micro_batches: list, parts: int = 8) -> float:
    """Measure the critical batch size in tokens, from the gradients of `parts` pieces of a step's windows."""
    x = torch.cat([b[0] for b in micro_batches])
    y = torch.cat([b[1] for b in micro_batches])
    k = min(parts, len(x))
    check(k > 1, "--noise-scale needs two sequences a rank in a step: raise --tokens-per-step.")
    whole, small = None, []
    for xs, ys in zip(x.tensor_split(k), y.tensor_split(k), strict=True):
        losses, _ = model(xs, ys)
        gradient = torch.autograd.grad(losses.sum() / (ys != IGNORE).sum(), list(model.parameters()))
        small.append(sum(float(g.double().square().sum()) for g in gradient))
        whole = gradient if whole is None else torch._foreach_add(whole, gradient)
    big = sum(float(g.double().square().sum()) for g in whole) / k**2
    return noise_scale(small, big) * x.numel() / k


# ------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------


def train(o: Options) -> dict:
    """Train a model on a data folder; without options, a small one on the sources of the installed Python."""
    # 1. Where, with what, and which model
    ranks = setup_distributed(o.device)
    saved = open_run(o)
    default_data(o.data[0], ranks)
    sources, val, weights = open_data(o.data)
    data = fingerprint(sources)
    check(saved.get("data", data) == data, f"The data is not what {o.out} was trained on: restore it.")
    causal = o.objective == "clm"
    config = make_config(o, sources[0], bool(saved), causal=causal)
    check(config.causal == causal, f"{o.resume or o.init} has the other --objective: choose its own.")
    derive(o, config, ranks.world, ranks.device)
    T = config.seq_len
    check_lengths(sources + val, T)
    say(describe(o, config, sources, ranks))

    # 2. What a step needs, and what surrounds it
    model, optimizer = open_model(o, config, ranks)
    forward = DDP(model) if ranks.world > 1 else model
    corrupt = None if causal else Corrupt(o.seed, load_tokenizer(sources[0].folder))
    place = (ranks.device, ranks.rank, ranks.world)
    batches = Batches(sources, weights, o, T, *place, saved.get("taken"), corrupt)
    moe = load_moe() if config.n_expert else None
    stopper = Stopper(o, saved)

    def save(folder: Path, state: dict | None) -> None:
        if state is not None:
            state = (optimizer.state_dict(), state | stopper.state | {"taken": batches.taken, "data": data})
        if ranks.rank == 0:
            save_checkpoint(folder, model, sources[0].folder / "tokenizer.json", state=state)
        barrier()

    def measure(last: bool) -> dict:
        result = assess(o, model, val, weights, corrupt, last) | noise_of(o, model, batches, last)
        return result if last else result | stopper.judge(result["val_loss"], save)

    # 3. The steps
    run = Run(o, ranks, save, measure, saved, config.flops_per_token())
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
        loss, aux = sum_over_ranks(loss), sum_over_ranks(aux)
        routing = moe.routing_record(aux, config) if moe else {}
        if run.update(optimizer, lr, loss=loss, grad_norm=grad_norm, tokens=windows * T, **routing) and moe:
            moe.shift_bias(model, aux)

    if ranks.rank == 0:
        report(o, run, model, batches, val)
    return run.result

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

    def __init__(self, seed: int, tokenizer):
        self.seed = seed
        self.mask_id = tokenizer.mask_id
        self.n_vocab = tokenizer.n_vocab
        check(self.mask_id is not None, "A masked model needs a tokenizer with a <|mask|> token.")

    def __call__(self, x, y, rows):
        """Mask for training: a window's masks depend on the seed and on its place in the source's order."""
        return mask_tokens(x, self.mask_id, self.n_vocab, [(self.seed, *row) for row in rows])

    def fixed(self, x):
        """Mask for an evaluation, always in the same way: the masks depend on the window's text alone."""
        return mask_tokens(x, self.mask_id, self.n_vocab, [("val", row.numpy().tobytes()) for row in x])

def assess(o: Options, model, val: list[Tokens], weights, corrupt: Corrupt | None, last: bool) -> dict:
    """Evaluate on the validation text; of masked models also how many masked tokens they get right."""
    T = model.config.seq_len
    limit = None if last else o.eval_tokens

    def one(tokens: Tokens) -> dict:
        if corrupt:
            return evaluate_masked(model, tokens, T, o.micro_batch, limit, corrupt)
        return evaluate(model, tokens, T, o.micro_batch, limit, doc_mask=o.doc_mask)

    result = evaluate_mixture(one, val, weights)
    return result | {"val_ppl": math.exp(min(result["val_loss"], 50))}

class Stopper:
    """End a run early: at --target-loss, or after --patience evaluations without a better one."""

    def __init__(self, o: Options, saved: dict):
        self.o = o
        self.state = {"best": saved.get("best"), "waited": saved.get("waited", 0)}

    def judge(self, loss: float, save: Callable) -> dict:
        """Count an evaluation, and keep the best -> {"stop": the reason} if the run has to end."""
        o, best = self.o, self.state["best"]
        better = best is None or loss < best
        self.state |= {"best": loss, "waited": 0} if better else {"waited": self.state["waited"] + 1}
        if better and o.patience:
            save(Path(f"{o.out}-best"), None)
        if o.target_loss is not None and loss <= o.target_loss:
            return {"stop": f"The target of {o.target_loss} is reached."}
        if o.patience and self.state["waited"] >= o.patience:
            return {"stop": f"No better for {o.patience} evaluations; the best is in {o.out}-best."}
        return {}

def noise_of(o: Options, model, batches: Batches, last: bool) -> dict:
    """Measure the critical batch size on the next step's windows, if --noise-scale asks for it."""
    if not o.noise_scale or last:
        return {}
    return {"critical_batch_tokens": measure_noise(model, batches.peek())}

@torch.no_grad()
def evaluate_masked(model, tokens: Tokens, T: int, B: int, limit: int | None, corrupt: Corrupt) -> dict:
    """Measure loss and accuracy on masked tokens, the same ones at every call."""
    device = next(model.parameters()).device
    rank, world = rank_and_world()
    model.eval()
    total = torch.zeros(3, device=device)  # nats, right, masked
    for x, y in tokens.in_order(T, B, limit, rank, world):
        real = y != IGNORE  # the last window is padded
        x, y = corrupt.fixed(x)
        y[~real] = IGNORE
        x, y = x.to(device), y.to(device)
        logits = model(x)[0][y != IGNORE].float()  # (masked, V)
        right = logits.argmax(-1) == y[y != IGNORE]
        nats = F.cross_entropy(logits, y[y != IGNORE], reduction="sum")
        total += torch.stack([nats, right.sum(), torch.tensor(len(logits), device=device)])
    model.train()
    nats, right, count = sum_over_ranks(total).tolist()
    return {"val_loss": nats / count, "val_acc": right / count, "val_tokens": int(count)}


# ------------------------------------------------------------------------------------------------------------
# Words and pictures
# ------------------------------------------------------------------------------------------------------------


def check_lengths(splits: list[Tokens], T: int) -> None:
    for tokens in splits:
        check(tokens.n > T, f"{tokens.path} has {tokens.n} tokens, no more than a context: lower --seq-len.")

def describe(o: Options, config: Config, sources: list[Tokens], ranks) -> str:
    """Say what is about to be trained, on what, and as which class it is saved."""
    arch = config_to_hf(config)["architectures"][0]
    why = "has these experts" if config.causal else "is bidirectional"
    kind = f"saved as {arch}"
    if arch.startswith("Octavo"):
        kind = f'saved as model_type "octavo": no stock class {why}'
    total, active = count_params(config)
    part = f", {active / 1e6:.1f}M of them active" if config.n_expert else ""
    epochs = o.tokens_per_step * o.max_steps / sum(t.n for t in sources)
    many = f" x {ranks.world}" if ranks.world > 1 else ""
    return (f"{total / 1e6:.1f}M parameters{part} ({config.n_layer} layers, {config.n_embd} wide, context "
            f"{config.seq_len}), {kind}\n{o.max_steps} steps of {o.tokens_per_step:,} tokens = {epochs:.2f} "
            f"epochs of {', '.join(str(t.folder) for t in sources)}; {o.optimizer}, {o.dtype} on "
            f"{ranks.device.type}{many}")

def curve(records: list[dict], width: int = 72, height: int = 12) -> str:
    """Draw the loss over the steps with characters; `o` marks the validation losses."""
    train = [(r["step"], r["loss"]) for r in records if math.isfinite(r.get("loss", math.nan))]
    val = [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]
    if len(train) < 2:
        return ""
    first = train[0][0]
    last = max(train[-1][0], first + 1)
    columns = [[] for _ in range(width)]
    for step, loss in train:
        columns[(step - first) * (width - 1) // (last - first)].append(loss)
    means = [(x, sum(c) / len(c)) for x, c in enumerate(columns) if c]
    # the first losses are far above the rest: the highest twentieth is cut off at the top
    seen = [mean for _, mean in means] + [v for _, v in val]
    low = min(seen)
    high = sorted(seen)[-max(1, len(seen) // 20)]
    rows = [[" "] * width for _ in range(height)]

    def put(x, value, mark):
        rows[round((high - min(value, high)) / max(high - low, 1e-9) * (height - 1))][x] = mark

    for x, mean in means:
        put(x, mean, "·")
    for step, value in val:
        put(min(width - 1, max(0, (step - first) * (width - 1) // (last - first))), value, "o")
    labels = [high - (high - low) * i / (height - 1) for i in range(height)]
    lines = [f"{label:6.2f} │{''.join(row).rstrip()}" for label, row in zip(labels, rows, strict=True)]
    axis = f"step {first}{last:>{width - 5 - len(str(first))}}"
    return "\n".join([*lines, f"       └{'─' * width}", f"        {axis}   · train   o val"])

def report(o: Options, run: Run, model: Transformer, batches: Batches, val: list[Tokens]) -> None:
    """Show the curve, the figures of the run, and a sample."""
    from rich.table import Table

    say(curve(run.records), markup=False)
    table = Table("figure", "value", title=o.out, title_justify="left")
    for key, value in ((k, v) for k, v in run.result.items() if k != "stop"):
        table.add_row(key, f"{value:,.4f}" if isinstance(value, float) else f"{value:,}")
    if len(val) > 1:
        shares = np.array(batches.taken) / sum(batches.taken)
        words = [f"{t.folder.name} {s:.1%}" for t, s in zip(val, shares, strict=True)]
        table.add_row("share of each source", ", ".join(words))
    steps = [r for r in run.records if "mfu" in r]
    for name, form in (("tok_per_s", "{:,.0f}"), ("mfu", "{:.1%}")):
        if steps:
            table.add_row(f"{name}, median", form.format(np.median([r[name] for r in steps])))
    table.add_row("steps skipped", str(run.skipped))
    table.add_row("seconds, of them evaluation", f"{time.perf_counter() - START:.1f}, {run.eval_seconds:.1f}")
    console().print(table)
    if steps and "load" in steps[-1]:
        say(load_moe().load_bars(steps[-1]["load"]), markup=False)
    if o.objective == "clm":
        say("[bold]A sample[/] (`python sample.py` for more):")
        say(write_sample(model, load_tokenizer(o.out), o.seed), markup=False, style="cyan")

def write_sample(model: Transformer, tokenizer, seed: int) -> str:
    """Let the model write 200 tokens of a new document."""
    generator = torch.Generator().manual_seed(seed)

    def pick(logits):
        p = (logits[:, : tokenizer.n_vocab].cpu() / 0.7).softmax(-1)
        return torch.multinomial(p, 1, generator=generator)[:, 0].to(logits.device)

    eos_id = tokenizer.eot_id
    return tokenizer.decode(generate(model, [[eos_id]], 200, pick, eos_id=eos_id)[0])

if __name__ == "__main__":
    app = typer.Typer(add_completion=False)
    app.command()(command(Options, train))
    run_app(app)
