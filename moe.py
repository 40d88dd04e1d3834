"""Mixture of experts: the layer that model.py puts in the place of a feed-forward network, and its studies.

    python train.py --n-expert 8 --n-expert-active 2 --out out/moe   # train one (the layer below is what it trains)
    python moe.py size mixtral-8x7b                                  # all parameters, active ones, bytes a token reads
    python moe.py speed                                              # the layer against a dense one of equal FLOPs
    python moe.py upcycle out/python out/upcycled                    # a dense checkpoint becomes a mixture
    python moe.py study out/moe                                      # which tokens go to which expert
    python moe.py race                                               # dense against mixture: equal FLOPs, equal time

A router scores the experts for each token, the best few compute, and their outputs are added by weight (Shazeer et
al. 2017, 1701.06538). So a model has many parameters and a token meets few of them. Part I is the layer: routing,
balance, capacity, dispatch. Part II is what can be done with it.

Mixtral: Jiang et al. 2024 (2401.04088). Qwen3-MoE: 2505.09388. DeepSeek-V2: 2405.04434, -V3: 2412.19437; shared and
fine-grained experts: Dai et al. 2024 (2401.06066). Left out: experts on several ranks (expert parallelism).
"""

from __future__ import annotations

import io
import json
import keyword
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import typer

from model import (
    MLP,
    PRESETS,
    Config,
    Linear,
    MoEConfig,
    Tokens,
    Transformer,
    UserError,
    check_out,
    console,
    evaluate,
    find_checkpoint,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
    read_json,
    run_app,
    save_checkpoint,
    say,
    synchronize,
)  # fmt: skip

# B sequences, T tokens of a sequence, N = B*T, C n_embd, E experts, k active ones, I width of an expert.


# ------------------------------------------------------------------------------------------------------------
# Part I: the layer
# ------------------------------------------------------------------------------------------------------------


def route(logits, m: MoEConfig, bias=None):
    """Which experts, and with what weight: logits (N, E) float32 -> scores (N, E), chosen (N, k), weights (N, k).

    softmax, normalized: Mixtral and Qwen3-MoE; the same as a softmax over the chosen logits alone. sigmoid with a bias
    that acts on the choice only: DeepSeek-V3 (2412.19437, eq. 12-16). Groups: a token's experts come from its best
    `topk_group` groups, judged by their best expert (DeepSeek-V2) or their best two (V3).
    """
    scores = logits.softmax(-1) if m.score == "softmax" else logits.sigmoid()
    ranked = scores.detach() if bias is None else scores.detach() + bias
    if m.n_group > 1:
        groups = ranked.view(len(ranked), m.n_group, -1)
        best = groups.amax(-1) if m.score == "softmax" else groups.topk(2, -1).values.sum(-1)
        open_ = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(m.topk_group, -1).indices, True)
        ranked = groups.masked_fill(~open_.unsqueeze(-1), -torch.inf).flatten(1)
    chosen = ranked.topk(m.n_active, -1).indices
    weights = scores.gather(1, chosen)
    if m.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return scores, chosen, weights * m.scale


def loads(chosen, E: int):
    """The share of a sequence's tokens that each expert is chosen by: (B, T, k) -> (B, E), adding up to k."""
    B, T, _ = chosen.shape
    ones = torch.ones((), device=chosen.device).expand(B, chosen[0].numel())
    return torch.zeros(B, E, device=chosen.device).scatter_add_(1, chosen.flatten(1), ones) / T


def balance_loss(scores, load):
    """E * sum over the experts of load * mean score: (B, T, E), (B, E) -> scalar; k where all are used alike.

    Switch's auxiliary loss (Fedus et al. 2021, 2101.03961, eq. 4), as Mixtral's code has it for k choices, but of each
    sequence by itself (2412.19437, eq. 17-20), averaged: so it does not depend on what else is in the micro-batch,
    and accumulation and any number of ranks leave the gradient what it is. Scores of a sigmoid are first divided by
    their sum. The load is counted, and has no gradient.
    """
    share = scores / scores.sum(-1, keepdim=True)
    return scores.shape[-1] * (load * share.mean(1)).sum(-1).mean()


def z_loss(logits):
    """The mean of (log sum exp logits)^2: keeps them where exp is exact (Zoph et al. 2022, 2202.08906, eq. 5)."""
    return logits.logsumexp(-1).square().mean()


def within_capacity(chosen, E: int, capacity: float):
    """Which choices find room when an expert takes at most capacity * k * T / E tokens of a sequence.

    (B, T, k) -> bool (B, T, k). First come, first served: a token's place must not depend on later ones
    (Switch lets a batch compete; within a sequence the order is the one that generation has, too).
    """
    B, T, k = chosen.shape
    room = math.ceil(capacity * k * T / E)
    order = chosen.flatten(1)  # (B, T*k): in the order of the tokens
    place = F.one_hot(order, E).cumsum(1).gather(2, order.unsqueeze(-1)).view(B, T, k)  # 1 for an expert's first
    return place <= room


class _Spread(torch.autograd.Function):
    """Rows of x (N, C) in the order of their experts: (n, C), n <= N*k. Its gradient gathers; autograd's would scatter."""

    @staticmethod
    def forward(ctx, x, order, place):
        ctx.save_for_backward(place)
        return x.index_select(0, order // place.shape[1])

    @staticmethod
    def backward(ctx, grad):
        (place,) = ctx.saved_tensors
        return gather(grad, place, torch.ones_like(place, dtype=grad.dtype)), None, None


class _Combine(torch.autograd.Function):
    """The experts' rows back to their tokens, added by weight: (n, C), (N, k) -> (N, C)."""

    @staticmethod
    def forward(ctx, y, weights, order, place):
        ctx.save_for_backward(y, weights, order, place)
        return gather(y, place, weights)

    @staticmethod
    def backward(ctx, grad):
        y, weights, order, place = ctx.saved_tensors
        rows = grad.index_select(0, order // place.shape[1])  # (n, C)
        dots = torch.cat(((rows * y).sum(-1, dtype=torch.float32), rows.new_zeros(1)))  # the last: of dropped choices, -1
        grad_weights = dots[place].to(weights.dtype)
        return rows * weights.flatten().index_select(0, order).unsqueeze(1), grad_weights, None, None


def gather(rows, place, weights):
    """The sum over a token's k choices of weight * rows[place]: (n, C), (N, k), (N, k) -> (N, C). A place of -1, a choice
    that was dropped, adds nothing."""
    if not len(rows):
        return rows.new_zeros(len(place), rows.shape[1])
    dropped = place < 0
    weights, place = weights.masked_fill(dropped, 0), place.clamp(min=0)
    if rows.device.type == "cpu":  # one pass, where the other form takes ten times as long
        y = F.embedding_bag(place, rows, per_sample_weights=weights, mode="sum")
    else:
        y = torch.bmm(weights.unsqueeze(1), rows.index_select(0, place.flatten()).view(*place.shape, -1)).squeeze(1)
    # where every choice of the batch was dropped, row 0 is what a grouped product left unwritten, and 0 * NaN is NaN
    return y.masked_fill_(dropped.all(1, keepdim=True), 0)


def loop(experts, x, chosen, weights):
    """The mixture as it reads: each expert finds its tokens, computes, and adds its part. (N, C) -> (N, C)."""
    y = torch.zeros_like(x)
    for e, expert in experts.items():
        token, choice = (chosen == int(e)).nonzero(as_tuple=True)
        y = y.index_add(0, token, weights[token, choice, None].to(x.dtype) * expert(x[token]))
    return y


@torch.compiler.disable  # how many tokens an expert gets is new in every step: a compiled form would be made anew
def dispatch(experts, x, chosen, weights):
    """The same, fast: sort the choices by expert, let each expert multiply its run of rows, put the rows back.

    x (N, C), chosen (N, k), weights (N, k) -> (N, C); a choice of E or above is of no expert: it was dropped. On CPU
    each run is a product of its own: that was as fast as torch's grouped product and faster than one product over runs
    padded to the longest, which both have to stack the weights first (`moe.py speed`). On CUDA the grouped product
    leaves the counts on the device: nothing waits for the host.
    """
    E, n = len(experts), chosen.numel()
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(n, device=x.device))
    counts = torch.bincount(flat, minlength=E)
    if grouped(x):
        place = place.masked_fill(flat >= E, -1).view_as(chosen)
        y = grouped_mlp(experts, _Spread.apply(x, order, place), counts[:E].cumsum(0).int())
        return _Combine.apply(y, weights.to(x.dtype), order, place)
    runs = counts[:E].tolist()
    if sum(runs) < n:
        order = order[: sum(runs)]
        place = place.masked_fill(flat >= E, -1)
    place = place.view_as(chosen)
    rows = _Spread.apply(x, order, place).split(runs)
    # while training an expert without tokens computes on no rows: its gradient is zero and not missing
    y = [expert(r) for expert, r in zip(experts.values(), rows, strict=True) if len(r) or torch.is_grad_enabled()]
    return _Combine.apply(torch.cat(y), weights.to(x.dtype), order, place)


def grouped(x) -> bool:
    """Does this device multiply runs of rows by their own matrices in one call?"""
    return x.device.type == "cuda" and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 0)


def grouped_mlp(experts, rows, ends):
    """SwiGLU of each run of rows with its own matrices: (n, C), ends (E,) int32 -> (n, C)."""
    gate, up, down = (torch.stack([getattr(e, name).weight for e in experts.values()]).to(rows.dtype).transpose(1, 2)
                      for name in ("gate_proj", "up_proj", "down_proj"))  # fmt: skip
    product = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm
    hidden = F.silu(product(rows, gate, offs=ends)) * product(rows, up, offs=ends)
    return product(hidden, down, offs=ends)


class Router(Linear):
    """The matrix (E, C) that scores the experts, in float32: bfloat16 would turn near ties round (2101.03961, 2.4)."""

    def __init__(self, n_embd: int, m: MoEConfig):
        super().__init__(n_embd, m.n_expert, bias=False)
        self.m, self.off = m, None  # off: experts switched off (a study), as a bool (E,)
        if m.bias:
            self.register_buffer("e_score_correction_bias", torch.zeros(m.n_expert))
        else:
            self.e_score_correction_bias = None

    def forward(self, x):  # (N, C) -> logits, scores (N, E), chosen, weights (N, k)
        logits = F.linear(x.float(), self.weight.float())
        if self.off is not None:
            logits = logits.masked_fill(self.off, -torch.inf)
        return logits, *route(logits, self.m, self.e_score_correction_bias)


class MoE(nn.Module):
    """Router, experts, shared experts. Each expert is an MLP under its published name, `experts.3.up_proj.weight`."""

    def __init__(self, config: Config):
        super().__init__()
        m = self.m = config.moe
        self.gate = Router(config.n_embd, m)
        self.experts = nn.ModuleDict({str(e): MLP(config.n_embd, m.ffn_dim) for e in range(m.n_expert)})
        self.shared_experts = MLP(config.n_embd, m.ffn_dim * m.n_shared) if m.n_shared else None
        self.balance, self.z_loss, self.capacity = 0.0, 0.0, None  # set by Transformer.set_balance

    def forward(self, x):
        """(B, T, C) -> (B, T, C), and the layer's row of `aux`: its losses and what the router did; while training."""
        B, T, C = x.shape
        logits, scores, chosen, weights = self.gate(x.reshape(-1, C))
        E, taken, dropped = self.m.n_expert, chosen, 0.0
        if self.training and self.capacity is not None:
            fits = within_capacity(chosen.view(B, T, -1), E, self.capacity).view_as(chosen)
            taken, dropped = chosen.masked_fill(~fits, E), 1 - fits.float().mean()
        y = dispatch(self.experts, x.reshape(-1, C), taken, weights).view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, self.row(logits.view(B, T, E), scores.view(B, T, E), chosen.view(B, T, -1), dropped)

    def row(self, logits, scores, chosen, dropped):
        """The columns of model.AUX, each a mean over sequences of equal length."""
        E = self.m.n_expert
        if not self.training:
            return logits.new_zeros(5 + E)
        load = loads(chosen, E)
        balance, z = balance_loss(scores, load), z_loss(logits)
        share = (scores / scores.sum(-1, keepdim=True)).detach()
        entropy = -(share * share.clamp(min=1e-20).log()).sum(-1).mean() / math.log(max(E, 2))  # 1: it cannot decide
        loss = self.balance * balance + self.z_loss * z
        dropped = torch.as_tensor(dropped, device=logits.device, dtype=torch.float32)
        seen = torch.stack((balance.detach(), z.detach(), dropped, entropy))
        return torch.cat((loss[None], seen, load.mean(0)))


# ------------------------------------------------------------------------------------------------------------
# Part II: what can be done with it
# ------------------------------------------------------------------------------------------------------------


def sizes(config: Config) -> dict:
    """All parameters and those a token meets, counted over the modules (on the meta device: nothing is allocated)."""
    with torch.device("meta"):
        model = Transformer(config)
    total = sum(p.numel() for p in model.parameters())
    idle = 0.0
    for block in (b for b in model.layers.values() if b.sparse):
        one = sum(p.numel() for p in block.mlp.experts["0"].parameters())
        idle += one * (config.moe.n_expert - config.moe.n_active)
    return {"parameters": total, "active": int(total - idle)}


@torch.inference_mode()
def bytes_read(model: Transformer, ids) -> int:
    """Bytes of the weights that one pass over ids (B, T) multiplies with: of the modules that were called."""
    seen = {}

    def note(module, *_):
        for p in module.parameters(recurse=False):
            seen[p] = p.nbytes

    hooks = [m.register_forward_hook(note) for m in model.modules() if not isinstance(m, nn.Embedding)]
    model.eval()(ids)
    for hook in hooks:
        hook.remove()
    return sum(seen.values())


def upcycled(dense: Transformer, n_expert: int, n_active: int, seed: int = 0) -> Transformer:
    """A mixture whose experts are copies of the dense feed-forward networks (Komatsuzaki et al. 2022, 2212.05055).

    The weights of the chosen add up to one, so it computes what the dense model does, whatever the new routers say.
    """
    config = dense.config.replace(moe=MoEConfig(n_expert, n_active, dense.config.ffn_dim))
    model = Transformer(config).init_weights(seed)  # the routers keep this
    weights = dense.state_dict()
    for name in model.state_dict():
        if ".mlp.experts." in name:
            layer, _, rest = name.partition(".mlp.experts.")
            weights[name] = weights[f"{layer}.mlp.{rest.partition('.')[2]}"].clone()
    own = {n: t for n, t in weights.items() if n in model.state_dict()}
    model.load_state_dict(own | {n: t for n, t in model.state_dict().items() if n not in own})
    return model.eval()


CLASSES = ("keyword", "name", "string", "comment", "number", "operator", "indentation")


def python_classes(text: str) -> np.ndarray | None:
    """The class of each byte of a Python source, as an index into CLASSES; None where Python's lexer gives up."""
    import tokenize  # Python's own: ours hands it over

    kinds = {tokenize.STRING: 2, tokenize.COMMENT: 3, tokenize.NUMBER: 4, tokenize.OP: 5}
    kinds |= {getattr(tokenize, n): 2 for n in ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END") if hasattr(tokenize, n)}
    lines = text.splitlines(keepends=True)
    starts = np.cumsum([0] + [len(line) for line in lines])
    of_char = np.full(len(text), CLASSES.index("indentation"), np.int8)  # what no token covers: line ends, blanks
    try:
        for kind, string, (r0, c0), (r1, c1), _ in tokenize.generate_tokens(io.StringIO(text, newline="").readline):
            if kind == tokenize.NAME:
                kinds[kind] = 0 if keyword.iskeyword(string) else 1
            if kind in kinds:
                of_char[starts[r0 - 1] + c0 : starts[r1 - 1] + c1] = kinds[kind]
    except (tokenize.TokenError, SyntaxError, IndexError):
        return None
    if text.isascii():
        return of_char
    return np.repeat(of_char, [len(c.encode("utf-8", "surrogatepass")) for c in text])


def token_classes(pieces: list[bytes]) -> np.ndarray | None:
    """The class of each token of a document: that of its first byte that is no blank."""
    whole = b"".join(pieces)
    try:
        of_byte = python_classes(whole.decode("utf-8"))
    except UnicodeDecodeError:
        return None
    if of_byte is None or len(of_byte) != len(whole):
        return None
    out, at_byte = np.empty(len(pieces), np.int8), 0
    for i, piece in enumerate(pieces):
        ink = len(piece) - len(piece.lstrip(b" \t\r\n\f"))
        out[i] = of_byte[at_byte + ink] if ink < len(piece) else CLASSES.index("indentation")
        at_byte += len(piece)
    return out


def labelled(tokens: Tokens, T: int, limit: int):
    """Beginnings of documents that are Python, up to T tokens each: [(ids, classes)], some `limit` tokens in all."""
    tokenizer = load_tokenizer(tokens.folder)
    ids = tokens.read(0, tokens.n)
    ends = np.flatnonzero(ids == tokens.eot_id)
    out, total = [], 0
    for begin, end in zip(np.concatenate(([0], ends[:-1] + 1)), ends, strict=True):
        document = ids[begin:end]
        if len(document) < 2 or total >= limit:
            continue
        classes = token_classes([tokenizer.token_bytes[i] for i in document.tolist()])
        if classes is not None:
            out.append((document[:T].astype(np.int64), classes[:T]))
            total += len(out[-1][0])
    return out


@torch.inference_mode()
def routes(model: Transformer, documents) -> np.ndarray:
    """The experts that each token of the documents went to: (tokens, sparse layers, k)."""
    gates = [b.mlp.gate for b in model.layers.values() if b.sparse]
    held = [[] for _ in gates]
    hooks = [g.register_forward_hook(lambda m, a, out, i=i: held[i].append(out[2].cpu().numpy())) for i, g in enumerate(gates)]
    for ids, _ in documents:
        model(torch.from_numpy(ids)[None], output="hidden")
    for hook in hooks:
        hook.remove()
    return np.stack([np.concatenate(h) for h in held], 1)


def specialization(chosen, classes, E: int) -> tuple[np.ndarray, float]:
    """Of one layer: P(expert | class) (classes, E), and how many bits the class says of the expert (mutual information)."""
    counts = np.zeros((len(CLASSES), E))
    np.add.at(counts, (np.repeat(classes, chosen.shape[1]), chosen.ravel()), 1)
    joint = counts / counts.sum()
    expected = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    bits = float((joint * np.log2(np.where(joint > 0, joint / np.where(expected > 0, expected, 1), 1))).sum())
    return counts / np.maximum(counts.sum(1, keepdims=True), 1), bits


def pairs(chosen, E: int) -> np.ndarray:
    """How often two experts are chosen together, divided by what independent choices of the same loads would give."""
    hot = np.zeros((len(chosen), E))
    np.put_along_axis(hot, chosen, 1.0, 1)
    together, load = hot.T @ hot, hot.mean(0)
    expected = np.outer(load, load)
    np.fill_diagonal(together, 0)
    np.fill_diagonal(expected, 0)
    return together / max(together.sum(), 1) / np.where(expected > 0, expected / expected.sum(), 1)


def study_of(model: Transformer, tokens: Tokens, limit: int, off_limit: int, seed: int = 0) -> dict:
    """What the experts learned, as numbers: see the command `study`."""
    documents = labelled(tokens, model.config.seq_len, limit)
    if sum(len(c) for _, c in documents) < 100:
        raise UserError(f"{tokens.folder} holds too little Python that its lexer can read: the classes are Python's.")
    m, rng = model.config.moe, np.random.default_rng(seed)
    classes = np.concatenate([c for _, c in documents])
    chosen = routes(model, documents)
    sparse = [i for i in range(model.config.n_layer) if model.config.is_sparse(i)]
    result = {"tokens": len(classes), "share_of_class": np.bincount(classes, minlength=len(CLASSES)) / len(classes), "layers": {}}
    for row, layer in enumerate(sparse):
        table, bits = specialization(chosen[:, row], classes, m.n_expert)
        chance = [specialization(chosen[:, row], rng.permutation(classes), m.n_expert) for _ in range(10)]
        load = np.bincount(chosen[:, row].ravel(), minlength=m.n_expert) / chosen[:, row].size
        result["layers"][layer] = {
            "load": load, "by_class": table, "bits": bits, "bits_by_chance": max(b for _, b in chance),
            "chance": np.max([t for t, _ in chance], 0), "pairs": pairs(chosen[:, row], m.n_expert),
        }  # fmt: skip
    if off_limit:
        T, B = model.config.seq_len, 16
        result["loss"] = evaluate(model, tokens, T, B, off_limit)["val_loss"]
        for layer in sparse:
            gate, off = model.layers[str(layer)].mlp.gate, []
            for e in range(m.n_expert if m.n_expert > m.n_active else 0):
                gate.off = F.one_hot(torch.tensor(e), m.n_expert).bool()
                off.append(evaluate(model, tokens, T, B, off_limit)["val_loss"] - result["loss"])
            gate.off = None
            result["layers"][layer]["switched_off"] = np.array(off)
    return result


def show_study(result: dict, folder: Path) -> None:
    from rich.table import Table

    layers = result["layers"]
    table = Table("class", "share", *[f"layer {i}" for i in layers], title_justify="left",
                  title="Where each class of token goes: its favourite expert, the share of its choices, times that expert's "
                        "load")  # fmt: skip
    for c, name in enumerate(CLASSES):
        if not result["share_of_class"][c]:
            continue
        cells = []
        for x in layers.values():
            lift = x["by_class"][c] / np.maximum(x["load"], 1e-9)
            e = int(np.argmax(np.where(x["load"] > 0, x["by_class"][c], 0)))
            cells.append(f"e{e} {x['by_class'][c, e]:.0%} x{lift[e]:.1f}")
        table.add_row(name, f"{result['share_of_class'][c]:.1%}", *cells)
    table.add_row("bits that the class says of the expert", "", *[f"{x['bits']:.3f}" for x in layers.values()])
    table.add_row("... of shuffled classes, largest of 10", "", *[f"{x['bits_by_chance']:.3f}" for x in layers.values()])
    console().print(table)
    say("Share of each class's choices (columns) that each expert (rows) gets: from none to half and more")
    say("           " + " ".join(name[:5].ljust(5) for name in CLASSES))
    for layer, x in layers.items():
        for e in range(len(x["load"])):
            cells = " ".join(" ░▒▓█"[min(4, int(x["by_class"][c, e] * 10 + 0.5))] * 5 for c in range(len(CLASSES)))
            say(f"  {layer:2} e{e:<3}  │ {cells} │", markup=False)
    table = Table("layer", "most often together", "least", "costliest to switch off (nats)", "cheapest", title_justify="left",
                  title="Pairs, against independent choices; and the loss without an expert")  # fmt: skip
    for layer, x in layers.items():
        upper = np.triu(np.ones_like(x["pairs"], bool), 1) & (np.minimum.outer(x["load"], x["load"]) > 0)
        cells = ["", ""]
        if upper.any() and x["pairs"].any():
            for i, pick in enumerate((np.argmax(np.where(upper, x["pairs"], -1)), np.argmin(np.where(upper, x["pairs"], np.inf)))):
                a, b = np.unravel_index(pick, upper.shape)
                cells[i] = f"e{a} e{b} x{x['pairs'][a, b]:.2f}"
        off = x.get("switched_off", np.array([]))
        if len(off):
            cells += [f"e{off.argmax()} {off.max():+.4f}", f"e{off.argmin()} {off.min():+.4f}"]
        table.add_row(str(layer), *cells)
    console().print(table)
    try:
        import matplotlib
    except ImportError:
        return say("(pip install matplotlib, and the heat map is also drawn as experts.png)")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    whole = np.concatenate([x["by_class"].T for x in layers.values()])
    figure, axes = pyplot.subplots(figsize=(6, 1 + 0.16 * len(whole)))
    image = axes.imshow(whole, aspect="auto", cmap="magma")
    axes.set_xticks(range(len(CLASSES)), CLASSES, rotation=30)
    E = len(next(iter(layers.values()))["load"])
    axes.set_yticks([E * i for i in range(len(layers))], [f"layer {i}" for i in layers])
    figure.colorbar(image, label="share of the class's choices")
    figure.savefig(folder / "experts.png", dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def train(out: Path, *options: str) -> dict:
    """Run train.py as a command of its own -> what its metrics.jsonl says, and the most memory it held."""
    command = [sys.executable, str(Path(__file__).with_name("train.py")), "--out", str(out), "--overwrite", *options]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    words, peak = child.stderr.read(), math.nan
    if hasattr(os, "wait4"):
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode, peak = os.waitstatus_to_exitcode(status), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if child.wait():
        raise UserError(f"{' '.join(command[1:])} ended with exit code {child.returncode}: {words.strip()[-300:]}")
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [r for r in records if "tok_per_s" in r]
    return {"val_bpb": records[-1]["val_bpb"], "val_loss": records[-1]["val_loss"], "seconds": records[-1]["seconds"],
            "tok_per_s": float(np.median([r["tok_per_s"] for r in steps])), "peak_bytes": peak,
            "load_max": float(np.mean([r["load_max"] for r in steps[-50:]])) if "load_max" in steps[-1] else None}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------
# Commands
# ------------------------------------------------------------------------------------------------------------


def size(
    model: Annotated[str, typer.Argument(help=f"A checkpoint folder, or one of {', '.join(PRESETS)}.")] = "mixtral-8x7b",
) -> dict:
    """All parameters against the active ones: what has to fit in memory, and what a token costs."""
    config = PRESETS.get(model) or Config.from_hf(read_json(find_checkpoint(model) / "config.json"))
    if not config.vocab_size:
        config = config.replace(vocab_size=4096)
    n = sizes(config)
    n |= {"flops_per_token": 2.0 * config.matrix_params, "bytes_a_token": 2 * config.matrix_params}
    from rich.table import Table

    table, large = Table("figure", "value", title=model, title_justify="left"), n["parameters"] > 1e9
    unit, B, GB, G = (1e9, "B", "GB", "G") if large else (1e6, "M", "MB", "M")
    table.add_row("parameters", f"{n['parameters'] / unit:.2f}{B}")
    table.add_row("active for a token", f"{n['active'] / unit:.2f}{B} ({n['active'] / n['parameters']:.0%})")
    table.add_row("memory of all in bf16: they must all be there", f"{2 * n['parameters'] / unit:.2f} {GB}")
    table.add_row("... with gradients and AdamW in float32, to train", f"{16 * n['parameters'] / unit:.2f} {GB}")
    table.add_row("weights that one token of decoding reads, bf16", f"{n['bytes_a_token'] / unit:.2f} {GB}")
    table.add_row("FLOPs of a token, forward, without attention", f"{n['flops_per_token'] / unit:.2f} {G}")
    console().print(table)
    return n


def upcycle(
    dense: Annotated[Path, typer.Argument(help="Checkpoint folder of a dense model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the mixture to.")],
    n_expert: Annotated[int, typer.Option(help="Experts in each layer, each a copy of the dense network.")] = 8,
    n_expert_active: Annotated[int, typer.Option(help="Experts that a token goes to.")] = 2,
    data: Annotated[str, typer.Option(help="Data folder to compare the two losses on.")] = "data/python",
    seed: Annotated[int, typer.Option(help="Of the new routers.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT where it holds a checkpoint.")] = False,
) -> dict:
    """A dense checkpoint becomes a mixture that computes the same; train it with `train.py --init OUT`."""
    check_out(out, overwrite)
    source = load_model(dense)
    if source.config.moe:
        raise UserError(f"{dense} has experts already.")
    model = upcycled(source, n_expert, n_expert_active, seed)
    save_checkpoint(out, model, find_checkpoint(dense) / "tokenizer.json")
    say(f"{out}: {model.config.n_params() / 1e6:.1f}M parameters, {model.config.n_params(active=True) / 1e6:.1f}M active, of "
        f"{source.config.n_params() / 1e6:.1f}M; saved as {model.config.to_hf()['architectures'][0]}.")  # fmt: skip
    if not Path(data).is_dir():
        return {}
    T, tokens = model.config.seq_len, Tokens(data, "val")
    losses = {name: evaluate(m, tokens, T, 8, 20_000)["val_loss"] for name, m in (("dense", source), ("mixture", model))}
    say(f"Loss on 20,000 tokens of {data}: {losses['dense']:.6f} dense, {losses['mixture']:.6f} as a mixture.")
    return losses


def study(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder of a mixture.")],
    data: Annotated[str, typer.Option(help="Data folder with Python: its validation split is read.")] = "data/python",
    tokens: Annotated[int, typer.Option(help="Tokens to route and sort by class.")] = 50_000,
    off_tokens: Annotated[int, typer.Option(help="Tokens of each loss without an expert; 0: leave that out.")] = 10_000,
) -> dict:
    """What the experts learned: which tokens they take, which are chosen together, what the loss is without each."""
    model = load_model(folder)
    if not model.config.moe:
        raise UserError(f"{folder} is a dense model: there are no experts to study.")
    if not Path(data).is_dir():
        raise UserError(f"There is no data folder {data}: make one with `python tokenize.py prepare`.")
    result = study_of(model, Tokens(data, "val"), tokens, off_tokens)
    show_study(result, find_checkpoint(folder))
    plain = json.dumps(result, default=lambda x: np.round(x, 5).tolist() if isinstance(x, np.ndarray) else float(x))
    (find_checkpoint(folder) / "study.json").write_text(plain + "\n", encoding="utf-8")
    say(f"All of it as numbers: {folder}/study.json")
    return result


def speed(
    preset: Annotated[str, typer.Option(help="Whose width and feed-forward width; an expert has that over the active ones.")] = "micro",
    tokens: Annotated[int, typer.Option(help="Tokens at once.")] = 4096,
    n_expert: Annotated[int, typer.Option(help="Experts.")] = 8,
    n_expert_active: Annotated[int, typer.Option(help="Experts that a token goes to.")] = 2,
    rounds: Annotated[int, typer.Option(help="Rounds; each times every form once, in turn.")] = 15,
    dtype: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> dict:
    """Forward and backward of one layer: dense, our dispatch, the readable loop, and transformers' forms if installed."""
    where = pick_device(device)
    c, kind, k = PRESETS[preset], pick_dtype(dtype, where), n_expert_active
    m = MoEConfig(n_expert, k, c.ffn_dim // k)
    with where:
        dense, layer = MLP(c.n_embd, c.ffn_dim), MoE(c.replace(moe=m)).train()
        x = torch.randn(1, tokens, c.n_embd, dtype=kind, requires_grad=True)
        grad = torch.randn_like(x)

    def looped():
        _, _, chosen, weights = layer.gate(x[0])
        return loop(layer.experts, x[0], chosen, weights)[None]

    forms = {"dense, equal FLOPs": lambda: dense(x), "dispatch": lambda: layer(x)[0], "loop": looped}
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        for form in ("eager", "grouped_mm"):
            for weights in {kind, torch.float32}:
                theirs = MixtralConfig(hidden_size=c.n_embd, intermediate_size=m.ffn_dim, num_local_experts=n_expert,
                                       num_experts_per_tok=k)  # fmt: skip
                theirs._experts_implementation = form
                block = MixtralSparseMoeBlock(theirs).to(where, weights)
                for p in block.parameters():
                    nn.init.normal_(p, std=c.n_embd**-0.5)
                forms[f"transformers {form}, {weights}".replace("torch.", "")] = lambda b=block, w=weights: b(x.to(w))
    except ImportError:
        say("(transformers is not installed: without it)")
    times = {name: [] for name in forms}
    for _ in range(rounds + 1):
        for name, form in forms.items():
            synchronize(where)
            begin = time.perf_counter()
            y = form()
            y.backward(grad.to(y.dtype))
            synchronize(where)
            times[name].append(time.perf_counter() - begin)
    median = {name: float(np.median(t[1:])) for name, t in times.items()}
    from rich.table import Table

    table = Table("form", "ms, median", "of the dense layer's", "of dispatch's", title_justify="left",
                  title=f"{tokens} tokens, width {c.n_embd}, {n_expert} experts of {m.ffn_dim}, {k} active, {kind}")  # fmt: skip
    for name, t in median.items():
        table.add_row(name, f"{t * 1e3:.1f}", f"{t / median['dense, equal FLOPs']:.2f}", f"{t / median['dispatch']:.2f}")
    console().print(table)
    return median


def race(
    data: Annotated[str, typer.Option(help="Data folder.")] = "data/python",
    out: Annotated[Path, typer.Option(help="Folder for the runs and race.json.")] = Path("out/race"),
    preset: Annotated[str, typer.Option(help="The dense model; the mixtures cost the same for a token.")] = "micro",
    max_steps: Annotated[int, typer.Option(help="Steps of 4,096 tokens.")] = 250,
    seeds: Annotated[int, typer.Option(help="Seeds of the dense model and of the mixture.")] = 3,
    n_expert: Annotated[int, typer.Option(help="Experts of the mixture.")] = 8,
    sweep: Annotated[str, typer.Option(help="Other numbers of experts at the same cost for a token, one seed each.")] = "4,16",
    tokens_per_step: Annotated[int, typer.Option(help="Tokens of a step.")] = 4096,
) -> dict:
    """Dense against mixture: equal FLOPs for a token, and equal wall time (the dense model gets more steps)."""
    common = ["--data", data, "--preset", preset, "--tokens-per-step", str(tokens_per_step), "--eval-interval", "1000000",
              "--save-interval", "1000000"]  # fmt: skip
    runs, longer = {}, 0
    try:
        others = [int(n) for n in sweep.split(",") if n]
    except ValueError:
        raise UserError(f"--sweep is numbers of experts with commas between, as 4,16; not {sweep!r}.") from None

    def go(name: str, seed: int, steps: int, *options: str) -> dict:
        say(f"{name}, seed {seed}, {steps} steps ...")
        result = train(out / "run", *common, "--seed", str(seed), "--max-steps", str(steps), *options)
        runs.setdefault(name, []).append({"seed": seed, "steps": steps, **result})
        (out / "race.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
        say(f"   {result['val_bpb']:.4f} bits per byte, {result['tok_per_s']:,.0f} tok/s")
        return result

    out.mkdir(parents=True, exist_ok=True)
    for seed in range(seeds):
        one = go("dense", seed, max_steps)
        other = go(f"{n_expert} experts", seed, max_steps, "--n-expert", str(n_expert))
        longer = longer or round(max_steps * one["tok_per_s"] / other["tok_per_s"])  # of the first seed: one race
        go("dense, equal time", seed, longer)
    for n in others:
        go(f"{n} experts", 0, max_steps, "--n-expert", str(n))
    from rich.table import Table

    table = Table("run", "steps", "bits per byte (mean; lowest to highest)", "tok/s, median", "memory", "largest load / mean",
                  title=f"{preset}, {data}", title_justify="left")  # fmt: skip
    for name, results in runs.items():
        bpb = [r["val_bpb"] for r in results]
        load = "" if results[0]["load_max"] is None else f"{np.mean([r['load_max'] for r in results]):.2f}"
        table.add_row(name, str(results[0]["steps"]), f"{np.mean(bpb):.4f}; {min(bpb):.4f} to {max(bpb):.4f}",
                      f"{np.median([r['tok_per_s'] for r in results]):,.0f}",
                      f"{np.median([r['peak_bytes'] for r in results]) / 2**30:.2f} GiB", load)  # fmt: skip
    console().print(table)
    return runs


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__.partition("\n")[0])
    for function in (size, speed, upcycle, study, race):
        app.command()(function)
    run_app(app)
