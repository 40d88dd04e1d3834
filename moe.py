"""Mixture of experts: the layer in the place of a feed-forward network, and what its experts learn.

    python train.py --set n_expert=8 --out out/moe    # train one (n_expert_active, balance, capacity ...)
    python moe.py study out/moe                       # which tokens go to which expert
    python moe.py upcycle out/python out/upcycled     # make a mixture of a dense checkpoint
    python moe.py speed                               # time the layer against a dense one of equal FLOPs

A router scores the experts for each token, the best few compute, and their outputs are added by weight
(Shazeer et al. 2017, 1701.06538). So a model has many parameters and a token meets few of them. Part I is
the layer, II its place in configs, folders and logs, III the study of a trained one, IV the commands, V what
makes the layer fast. parallel.py spreads experts over ranks.

Mixtral: Jiang et al. 2024 (2401.04088). Qwen3-MoE: 2505.09388. DeepSeek-V2: 2405.04434, -V3: 2412.19437;
shared and fine-grained experts: Dai et al. 2024 (2401.06066).
"""

import functools
import importlib.util
import io
import json
import keyword
import math
import re
import sys
import time
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).parent))  # `python -P` leaves this folder out
from model import (  # before torch: it says how OpenMP's threads wait
    AUX, MLP, QWEN, Config, Family, Linear, Tokens, Transformer, check, check_memory, check_out, config_to_hf,
    count_params, evaluate, find_checkpoint, load_model, load_tokenizer, opt, pick_device,
    pick_dtype, read_tokenizer, resize, run_app, save_checkpoint, save_files, say, synchronize,
)

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import typer

# B sequences, T tokens of a sequence, N = B*T, C n_embd, L layers, E experts, A active experts of a token.

# ---- Part I: the layer -------------------------------------------------------------------------------------

def route(logits, config: Config, bias=None):
    """Choose experts and their weights: (N, E) float32 -> scores (N, E), chosen (N, A), weights (N, A).

    softmax, normalized: Mixtral and Qwen3-MoE; the same as a softmax over the chosen logits alone. sigmoid
    with a bias that acts on the choice only: DeepSeek-V3 (2412.19437, eq. 12-16).

    >>> _, chosen, weights = route(torch.tensor([[2.0, 0.0, 1.0]]), Config(n_expert=3))  # two of them active
    >>> chosen.tolist(), [round(w, 2) for w in weights[0].tolist()]
    ([[0, 2]], [0.73, 0.27])
    """
    scores = logits.softmax(-1) if config.router == "softmax" else logits.sigmoid()
    ranked = scores.detach()
    if bias is not None:
        ranked = ranked + bias
    if config.n_group > 1:
        ranked = keep_best_groups(ranked, config)
    chosen = ranked.topk(config.n_expert_active, -1).indices
    weights = scores.gather(1, chosen)
    if config.router_normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return scores, chosen, weights * config.router_scale

def keep_best_groups(ranked, config: Config):
    """Leave each token the experts of its best `topk_group` groups: (N, E) -> (N, E), -inf for the others.

    A group is judged by its best expert (DeepSeek-V2, softmax) or by its best two (V3, sigmoid).
    """
    groups = ranked.view(len(ranked), config.n_group, -1)
    judges = 1 if config.router == "softmax" else min(2, groups.shape[-1])
    best = groups.topk(judges, -1).values.sum(-1)  # (N, groups)
    kept = best.topk(config.topk_group, -1).indices
    closed = torch.ones_like(best, dtype=torch.bool).scatter(1, kept, False)
    return groups.masked_fill(closed.unsqueeze(-1), -torch.inf).flatten(1)

def expert_load(chosen, E: int):
    """Count the share of a sequence's tokens that goes to each expert: (B, T, A) -> (B, E), adding up to A.

    >>> expert_load(torch.tensor([[[0], [0], [2], [0]]]), 3).tolist()
    [[0.75, 0.0, 0.25]]
    """
    B, T, _ = chosen.shape
    ones = torch.ones_like(chosen, dtype=torch.float32).flatten(1)
    return ones.new_zeros(B, E).scatter_add_(1, chosen.flatten(1), ones) / T

def balance_loss(share, load):
    """Compute E * sum over experts of load * mean share: (B, T, E), (B, E) -> scalar; A if all are alike.

    share: a token's scores divided by their sum; load: counted, without a gradient. Switch's auxiliary loss
    (Fedus et al. 2021, 2101.03961, eq. 4), as Mixtral's code has it for several choices, but of each sequence
    by itself (2412.19437, eq. 17-20), averaged: so it does not depend on what else is in the micro-batch, and
    accumulation and any number of ranks leave the gradient what it is.
    """
    mean_share = share.mean(1)  # (B, E)
    return share.shape[-1] * (load * mean_share).sum(-1).mean()

def router_z_loss(logits):
    """Compute the mean of (log sum exp logits)^2: it keeps logits where exp is exact (2202.08906, eq. 5)."""
    return logits.logsumexp(-1).square().mean()

def within_capacity(chosen, E: int, capacity: float):
    """Tell which choices find room when an expert takes at most capacity * A * T / E tokens of a sequence.

    (B, T, A) -> bool (B, T, A). First come, first served: a token's place must not depend on later ones, nor
    on other sequences (in Switch a batch competes).

    >>> within_capacity(torch.tensor([[[0], [0], [0], [1]]]), 2, 1.0).flatten().tolist()
    [True, True, False, True]
    """
    B, T, A = chosen.shape
    room = math.ceil(capacity * A * T / E)
    order = chosen.flatten(1)  # (B, T*A): in the order of the tokens
    count = F.one_hot(order, E).cumsum(1)  # (B, T*A, E): how often each expert was chosen so far
    place = count.gather(2, order.unsqueeze(-1))
    return place.view(B, T, A) <= room

def loop(experts, x, chosen, weights):
    """Compute the mixture as it reads: each expert finds its tokens, computes, and adds its part.

    x (N, C), chosen (N, A), weights (N, A) -> (N, C). A choice that was dropped says E, which is no expert.
    """
    y = torch.zeros_like(x)
    for e, expert in experts.items():
        token, choice = (chosen == int(e)).nonzero(as_tuple=True)
        weight = weights[token, choice].to(x.dtype)
        part = weight.unsqueeze(1) * expert(x[token])
        y = y.index_add(0, token, part)
    return y

class Router(Linear):
    """Score the experts by a matrix (E, C), in float32: bfloat16 would round near ties (2101.03961, 2.4)."""

    def __init__(self, config: Config):
        super().__init__(config.n_embd, config.n_expert, bias=False)
        self.config = config
        bias = torch.zeros(config.n_expert) if config.router_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x):  # (N, C) -> logits, scores (N, E), chosen, weights (N, A)
        logits = F.linear(x.float(), self.weight.float())
        return logits, *route(logits, self.config, self.e_score_correction_bias)

class Experts(nn.ModuleDict):
    """Hold the experts by number; parallel.py puts others in their place, which deal them out to ranks."""

    def forward(self, x, chosen, weights):
        return dispatch(self, x, chosen, weights)

class MoE(nn.Module):
    """Join router, experts and shared experts under their published names, as `experts.3.up_proj.weight`."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.gate = Router(config)
        self.experts = Experts()
        for e in range(config.n_expert):
            self.experts[str(e)] = MLP(config, config.expert_dim)
        self.shared_experts = self.shared_expert_gate = None
        if config.n_expert_shared and config.shared_gate:
            self.shared_expert_gate = Linear(config.n_embd, 1, bias=False)
        if config.n_expert_shared:
            self.shared_experts = MLP(config, config.expert_dim * config.n_expert_shared)

    def forward(self, x):
        """Compute (B, T, C) -> (B, T, C), and the layer's row of `aux`: zeros unless training."""
        B, T, C = x.shape
        E = self.config.n_expert
        flat = x.reshape(-1, C)  # (N, C)
        logits, scores, chosen, weights = self.gate(flat)
        taken = chosen
        if self.training and self.config.capacity is not None:
            fits = within_capacity(chosen.view(B, T, -1), E, self.config.capacity)
            taken = chosen.masked_fill(~fits.view_as(chosen), E)
        y = self.experts(flat, taken, weights).view_as(x)
        if self.shared_experts is not None:
            shared = self.shared_experts(x)
            if self.shared_expert_gate is not None:
                shared = shared * self.shared_expert_gate(x).sigmoid()
            y = y + shared
        if not self.training:
            return y, logits.new_zeros(len(AUX) + E)
        dropped = (taken == E).float().mean()
        return y, self.row(logits, scores.view(B, T, E), chosen.view(B, T, -1), dropped)

    def row(self, logits, scores, chosen, dropped):
        """Measure the columns of model.AUX, then the loads: (5 + E,), means over sequences, with any pads."""
        c = self.config
        load = expert_load(chosen, c.n_expert)
        share = scores / scores.sum(-1, keepdim=True)
        balance = balance_loss(share, load)
        z = router_z_loss(logits)
        weight = balance_rate(c) if c.balance == "loss" else 0.0
        loss = weight * balance + c.z_loss * z
        surprise = -share.clamp(min=1e-20).log()
        entropy = (share * surprise).sum(-1).mean()
        entropy = entropy / math.log(max(c.n_expert, 2))  # 1: it cannot decide
        seen = torch.stack((balance, z, dropped, entropy)).detach()
        return torch.cat((loss[None], seen, load.mean(0)))

def balance_rate(config: Config) -> float:
    """Give the weight of the balance loss, or the step of the bias: the usual one where none is set."""
    usual = {"loss": 0.01, "bias": 0.001, "none": 0.0}
    return usual[config.balance] if config.balance_rate is None else config.balance_rate

@torch.no_grad()
def shift_bias(model: Transformer, aux) -> None:
    """Make experts that were chosen more often than the mean less likely to be, and the other way round.

    Wang et al. 2024 (2408.15664), algorithm 1. aux (L, 5 + E): a step's, of all ranks; loads in any scale.
    """
    if model.config.balance != "bias":
        return
    for block in model.layers.values():
        if block.sparse:
            load = aux[block.layer, len(AUX) :]
            step = balance_rate(model.config) * torch.sign(load.mean() - load)
            block.mlp.gate.e_score_correction_bias += step

# ---- Part II: its place in configs, folders and logs -------------------------------------------------------

def check_experts(c: Config) -> None:
    """Refuse experts that cannot be."""
    check(c.router in ("softmax", "sigmoid"), f"A router scores by softmax or sigmoid, not by {c.router!r}.")
    check(c.balance in ("loss", "bias", "none"), f"balance is loss, bias or none; not {c.balance!r}.")
    check(any(map(c.is_sparse, range(c.n_layer))), "dense_layers leaves no layer to the experts: name fewer.")
    check(c.gated and c.act == "silu" and not c.mlp_bias, "Experts are SwiGLU networks without a bias.")
    check(c.n_expert % c.n_group == 0 and c.topk_group <= c.n_group,
          f"{c.n_expert} experts do not go into {c.n_group} groups with {c.topk_group} of them open.")
    reachable = c.n_expert // c.n_group * c.topk_group
    check(c.n_expert_active <= reachable,
          f"A token cannot go to {c.n_expert_active} experts: {reachable} are open to it.")
    check(c.balance != "bias" or c.router_bias,
          "balance=bias needs a router that has a bias, and this one has none: use balance=loss.")

# Field of Config -> its key in config.json.
MIXTRAL_KEYS = {"n_expert": "num_local_experts", "n_expert_active": "num_experts_per_tok",
                "expert_dim": "intermediate_size"}
QWEN_KEYS = {"n_expert": "num_experts", "n_expert_active": "num_experts_per_tok",
             "expert_dim": "moe_intermediate_size", "router_normalize": "norm_topk_prob"}
DEEPSEEK_KEYS = QWEN_KEYS | {
    "n_expert": "n_routed_experts", "n_expert_shared": "n_shared_experts",
    "router_scale": "routed_scaling_factor", "n_group": "n_group", "topk_group": "topk_group"}
LATENT_KEYS = {"head_dim": None, "kv_rank": "kv_lora_rank", "q_rank": "q_lora_rank", "v_dim": "v_head_dim",
               "nope_dim": "qk_nope_head_dim", "rope_dim": "qk_rope_head_dim"}
MIXTRAL_NAMES = {".mlp.gate.": ".block_sparse_moe.gate.", ".mlp.experts.": ".block_sparse_moe.experts.",
                 ".gate_proj.": ".w1.", ".down_proj.": ".w2.", ".up_proj.": ".w3."}
SIGMOID = {"router": "sigmoid", "router_bias": True}
QWEN_MOE = QWEN | {"norm_topk_prob": False}
DEEPSEEK_V3 = {"norm_topk_prob": True, "n_shared_experts": 1, "n_group": 8, "topk_group": 4,
               "first_k_dense_replace": 3, "routed_scaling_factor": 2.5}
V2_METHODS = {False: "greedy", True: "group_limited_greedy"}  # does it choose groups first?
# One layer more, in DeepSeek-V3's files, predicts the token after the next: the class has no use for it.
LATENT = {"interleaved": True, "dense_layers": "first", "ignored": r"\.layers\.{n_layer}\."}
FAMILIES = {
    "MixtralForCausalLM": Family("mixtral", {}, MIXTRAL_KEYS, window="all", renames=MIXTRAL_NAMES,
                                 defaults={"rope_theta": 1e6}),
    "Qwen2MoeForCausalLM": Family(
        "qwen2_moe", {"qkv_bias": True, "shared_gate": True}, QWEN_KEYS | {"head_dim": None}, window="any",
        every=2, renames={".shared_experts.": ".shared_expert."}, dense_layers="any", defaults=QWEN_MOE),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", {"qk_norm": True}, QWEN_KEYS, window="all", dense_layers="any",
                                  defaults=QWEN_MOE),
    "Dots1ForCausalLM": Family(
        "dots1", {"qk_norm": True, **SIGMOID}, DEEPSEEK_KEYS, dense_layers="first", has_score=False,
        neutral={"sliding_window": None}, defaults={"sliding_window": 4096, "n_shared_experts": 1}),
    "DeepseekV2ForCausalLM": Family(
        "deepseek_v2", {"router_normalize": False}, DEEPSEEK_KEYS | LATENT_KEYS, **LATENT,
        neutral={"norm_topk_prob": False, "scoring_func": "softmax",
                 "topk_method": tuple(V2_METHODS.values())},
        defaults={"n_shared_experts": 2, "topk_method": "greedy"}),
    "DeepseekV3ForCausalLM": Family("deepseek_v3", SIGMOID, DEEPSEEK_KEYS | LATENT_KEYS, **LATENT,
                                    neutral={"scoring_func": "sigmoid"}, defaults=DEEPSEEK_V3),
}

def experts_from_hf(hf: dict, family: Family, fields: dict) -> dict:
    """Read what `keys` does not say of a family's experts: a second name, and which layers have none."""
    n_expert = fields.get("n_expert") or hf.get("num_local_experts") or hf.get("num_experts")
    check(n_expert, f"config.json does not say {family.keys['n_expert']}.")
    found = {"n_expert": n_expert}
    shared = fields.get("n_expert_shared", 1)
    if "shared_gate" in family.fixed:
        shared, rest = divmod(hf.get("shared_expert_intermediate_size", 0), fields["expert_dim"])
        check(not rest, "A shared expert of another width than some experts together is not supported.")
        found["n_expert_shared"] = shared
    check(shared, "config.json says that there are no shared experts, which its class always has.")
    if hf.get("topk_method") == V2_METHODS[False]:
        found |= {"n_group": 1, "topk_group": 1}  # it says some, and does without
    step = hf.get("decoder_sparse_step", 1)
    dense = hf.get("mlp_only_layers") or range(hf.get("first_k_dense_replace") or 0)
    n_layer = fields["n_layer"]
    return found | {"dense_layers": tuple(i for i in range(n_layer) if i in dense or (i + 1) % step)}

def experts_to_hf(config: Config, family: Family) -> dict:
    """Write the same, as far as a family can say it."""
    hf = {}
    if "shared_gate" in family.fixed:
        hf["shared_expert_intermediate_size"] = config.n_expert_shared * config.expert_dim
    if "topk_method" in family.defaults:
        hf["topk_method"] = V2_METHODS[config.n_group > 1]
    if family.dense_layers == "any":
        hf |= {"mlp_only_layers": list(config.dense_layers), "decoder_sparse_step": 1}
    if family.dense_layers == "first":
        hf["first_k_dense_replace"] = len(config.dense_layers)
    return hf

def read_earlier(moe: dict) -> dict:
    """Read the nested experts of an earlier octavo folder -> fields of Config."""
    names = {"n_active": "n_expert_active", "ffn_dim": "expert_dim", "n_shared": "n_expert_shared",
             "dense": "dense_layers", "score": "router", "normalize": "router_normalize",
             "scale": "router_scale", "bias": "router_bias"}
    return {names.get(name, name): value for name, value in moe.items()}

def routing_record(aux, config: Config) -> dict:
    """Summarize a step's routing for metrics.jsonl: aux (L, 5 + E) -> means over the layers with experts."""
    sparse = [layer for layer in range(config.n_layer) if config.is_sparse(layer)]
    aux = aux[sparse].float().cpu()
    load = aux[:, len(AUX) :]
    record = dict(zip(AUX, aux.mean(0).tolist(), strict=False))
    record["aux_loss"] = aux[:, 0].sum().item()
    largest = load.amax(1) / load.mean(1)
    record["load_max"] = largest.max().item()
    record["load"] = [[round(x, 4) for x in row] for row in load.tolist()]
    return record

def load_bars(load: list[list[float]]) -> str:
    """Draw a bar for each expert of each layer, of full height at twice the mean."""
    lines = ["how often each expert was chosen in the last step (half height: the mean; largest beside it)"]
    for i, row in enumerate(load):
        relative = [x * len(row) / sum(row) for x in row]
        bars = "".join(" ▁▂▃▄▅▆▇█"[min(8, round(r * 4))] for r in relative)
        lines.append(f"  layer {i:2} │{bars}│ {max(relative):.2f}")
    return "\n".join(lines)

@torch.no_grad()
def upcycled(dense: Transformer, n_expert: int, n_expert_active: int) -> Transformer:
    """Build a mixture whose experts are copies of the dense networks (Komatsuzaki et al. 2022, 2212.05055).

    The weights of the chosen add up to one: it computes what the dense model does, whatever the routers say.
    """
    fields = {"n_expert": n_expert, "n_expert_active": n_expert_active, "expert_dim": dense.config.ffn_dim}
    config = dense.config.replace(**fields)
    check_memory(config, torch.device("cpu"), 4)
    model = Transformer(config).init_weights()
    weights = dense.state_dict()
    for name, tensor in model.state_dict().items():
        source = re.sub(r"\.experts\.\d+", "", name)
        if source in weights:  # the routers keep their random start
            tensor.copy_(weights[source])
    return model.eval()

# ---- Part III: what the experts of a trained model do ------------------------------------------------------

CLASSES = ("keyword", "name", "string", "comment", "number", "operator", "indentation")
KINDS = {"NAME": "name", "COMMENT": "comment", "NUMBER": "number", "OP": "operator"}  # of Python's lexer

def token_classes(pieces: list[bytes]) -> np.ndarray | None:
    """Classify each token of a Python source by its first byte that is no blank -> indices into CLASSES.

    None where Python's lexer gives up.

    >>> [CLASSES[c] for c in token_classes([b"if", b" x", b":", b" pass"])]
    ['keyword', 'name', 'operator', 'keyword']
    """
    import tokenize  # Python's own: ours hands it over

    rest = CLASSES.index("indentation")  # what no token of the lexer covers: line ends, blanks
    try:
        text = b"".join(pieces).decode("utf-8")
        lines = io.StringIO(text, newline="").readlines()
        starts = np.cumsum([0] + [len(line) for line in lines])
        of_char = np.full(len(text), rest)
        for token in tokenize.generate_tokens(iter(lines).__next__):
            kind = tokenize.tok_name[token.type]
            kind = "string" if "STRING" in kind else KINDS.get(kind)  # FSTRING_START, FSTRING_MIDDLE ...
            if kind:
                kind = "keyword" if keyword.iskeyword(token.string) else kind
                begin = starts[token.start[0] - 1] + token.start[1]
                end = starts[token.end[0] - 1] + token.end[1]
                of_char[begin:end] = CLASSES.index(kind)
    except (UnicodeDecodeError, tokenize.TokenError, SyntaxError, IndexError):
        return None
    of_byte = np.repeat(of_char, [len(char.encode()) for char in text])
    classes = []
    begin = 0
    for piece in pieces:
        blanks = len(piece) - len(piece.lstrip(b" \t\r\n\f"))
        classes.append(of_byte[begin + blanks] if blanks < len(piece) else rest)
        begin += len(piece)
    return np.array(classes)

def read_python(tokens: Tokens, T: int, limit: int) -> tuple[list, list]:
    """Read the first T tokens of documents that are Python, some `limit` in all -> ids, classes of each."""
    token_bytes = load_tokenizer(tokens.folder).token_bytes
    text = tokens.read(0, tokens.n).astype(np.int64)
    documents, labels = [], []
    for ids in np.split(text, np.flatnonzero(text == tokens.eot_id)):
        ids = ids[ids != tokens.eot_id]
        if len(ids) < 2 or sum(map(len, labels)) >= limit:
            continue
        classes = token_classes([token_bytes[i] for i in ids])
        if classes is not None:
            documents.append(ids[:T])
            labels.append(classes[:T])
    check(documents, f"{tokens.folder} holds no Python that its lexer can read: the classes are Python's.")
    return documents, labels

@torch.inference_mode()
def read_routes(model: Transformer, documents) -> np.ndarray:
    """Record the experts that each token of the documents goes to: (tokens, layers with experts, A)."""
    routes = {block.mlp.gate: [] for block in model.layers.values() if block.sparse}

    def record(gate, _, result):
        routes[gate].append(result[2].numpy())

    hooks = [gate.register_forward_hook(record) for gate in routes]
    for ids in documents:
        model(torch.from_numpy(ids[None]), output="hidden")
    for hook in hooks:
        hook.remove()
    return np.stack([np.concatenate(chosen) for chosen in routes.values()], 1)

def specialization(chosen, classes, E: int) -> tuple[np.ndarray, float]:
    """Measure P(expert | class), (classes, E), and the bits that the class says of the expert, in one layer.

    chosen (tokens, A), classes (tokens,). The bits are the mutual information of class and expert.
    """
    counts = np.zeros((len(CLASSES), E))
    np.add.at(counts, (classes[:, None], chosen), 1)
    joint = counts / counts.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    some = joint > 0
    ratio = joint[some] / independent[some]
    bits = float((joint[some] * np.log2(ratio)).sum())
    return counts / np.maximum(counts.sum(1, keepdims=True), 1), bits

def losses_without(gate: Router, loss) -> list[float]:
    """Evaluate the model by `loss()` without each expert of one layer: tokens go to their next best."""
    bias = gate.e_score_correction_bias
    start = torch.zeros(len(gate.weight)) if bias is None else bias
    losses = []
    for e in range(len(gate.weight)):
        closed = start.clone()
        closed[e] = -torch.inf
        gate.e_score_correction_bias = closed
        losses.append(loss()["val_loss"])
    gate.e_score_correction_bias = bias
    return losses

def study_of(model: Transformer, tokens: Tokens, limit: int, off_limit: int) -> dict:
    """Measure what the experts learned: see the command `study`."""
    E = model.config.n_expert
    documents, labels = read_python(tokens, model.config.seq_len, limit)
    classes = np.concatenate(labels)
    routes = read_routes(model, documents)
    rng = np.random.default_rng(0)
    share = np.bincount(classes, minlength=len(CLASSES)) / len(classes)
    result = {"tokens": len(classes), "share_of_class": share, "layers": {}}
    loss = functools.partial(evaluate, model, tokens, model.config.seq_len, 16, off_limit)
    if off_limit:
        result["loss"] = loss()["val_loss"]
    sparse = [block for block in model.layers.values() if block.sparse]
    for row, block in enumerate(sparse):
        chosen = routes[:, row]
        table, bits = specialization(chosen, classes, E)
        _, chance = specialization(chosen, rng.permutation(classes), E)
        load = np.bincount(chosen.ravel(), minlength=E) / chosen.size
        layer = {"load": load, "by_class": table, "bits": bits, "bits_by_chance": chance}
        reachable = E // model.config.n_group * model.config.topk_group
        if off_limit and reachable > model.config.n_expert_active:
            losses = losses_without(block.mlp.gate, loss)
            layer["switched_off"] = np.array(losses) - result["loss"]
        result["layers"][block.layer] = layer
    return result

def show_study(layers: dict, share_of_class) -> None:
    """Show, a layer a column, favourite experts, bits, and losses without an expert."""
    from rich.table import Table

    table = Table("class of token", "share", *[f"layer {i}" for i in layers], title_justify="left",
                  title="Each class's favourite expert, its share of the class's choices, times its load")
    for c, share in enumerate(share_of_class):
        cells = []
        for layer in layers.values() if share else ():
            e = layer["by_class"][c].argmax()
            lift = layer["by_class"][c, e] / layer["load"][e]
            cells.append(f"e{e} {layer['by_class'][c, e]:.0%} x{lift:.1f}")
        table.add_row(CLASSES[c], f"{share:.1%}", *cells)
    table.add_section()
    for name, key in (("bits", "bits"), ("... if shuffled", "bits_by_chance")):
        table.add_row(name, "", *[f"{layer[key]:.3f}" for layer in layers.values()])
    losses = [layer["switched_off"] for layer in layers.values() if "switched_off" in layer]
    if losses:
        table.add_row("costliest off", "", *[f"e{off.argmax()} {off.max():+.4f}" for off in losses])
        table.add_row("cheapest off", "", *[f"e{off.argmin()} {off.min():+.4f}" for off in losses])
    say(table)
    say("bits: what the class says of the expert. off: nats that the loss rises without the expert.")

# ---- Part IV: the commands ---------------------------------------------------------------------------------

def same_tokenizer(*folders) -> bool:
    """Tell whether the ids of these folders are the same text."""
    return len({read_tokenizer(Path(folder, "tokenizer.json")) for folder in folders}) == 1

def upcycle(
    dense: Annotated[Path, typer.Argument(help="Checkpoint folder of a dense model.")],
    out: Annotated[Path, typer.Argument(help="Folder to write the mixture to.")],
    n_expert: Annotated[int, opt("", "Experts of a layer: copies of its network.", low=1)] = 8,
    n_expert_active: Annotated[int, opt("", "Experts that a token goes to.", low=1)] = 2,
    data: Annotated[str, typer.Option(help="Data folder to compare the two losses on.")] = "data/python",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what OUT holds.")] = False,
) -> dict:
    """Make a mixture that computes what a dense checkpoint does; train it on with `train.py --init OUT`."""
    check_out(out, overwrite, dense)
    source = load_model(dense)
    check(not source.config.n_expert, f"{dense} has experts already.")
    model = upcycled(source, n_expert, n_expert_active)
    save_checkpoint(out, model, find_checkpoint(dense) / "tokenizer.json")
    total, active = count_params(model.config)
    say(f"{out}: {total / 1e6:.1f}M parameters, {active / 1e6:.1f}M of them active; saved as "
        f"{config_to_hf(model.config)['architectures'][0]}.")
    losses = {}
    if Path(data).is_dir() and same_tokenizer(data, dense):
        tokens = Tokens(data, "val")
        for name, one in (("dense", source), ("mixture", model)):
            losses[name] = evaluate(one, tokens, one.config.seq_len, 8, 20_000)["val_loss"]
            say(f"Loss of the {name} model on 20,000 tokens of {data}: {losses[name]:.6f}")
    return losses

def study(
    folder: Annotated[Path, typer.Argument(help="Checkpoint folder of a mixture.")],
    data: Annotated[str, typer.Option(help="Data folder with Python: its validation text.")] = "data/python",
    tokens: Annotated[int, opt("", "Tokens to route and sort by class.", low=1)] = 50_000,
    off_tokens: Annotated[int, opt("", "Tokens of a loss without one; 0: none.", low=0)] = 10_000,
) -> dict:
    """Show what the experts learned: which tokens they take, and the loss without each."""
    model = load_model(folder)
    check(model.config.n_expert, f"{folder} is a dense model: there are no experts to study.")
    check(Path(data).is_dir(), f"There is no data folder {data}: `python tokenize.py prepare` makes one.")
    check(same_tokenizer(folder, data), f"{folder} and {data} have different tokenizers: name its own data.")
    result = study_of(model, Tokens(data, "val"), tokens, off_tokens)
    show_study(result["layers"], result["share_of_class"])
    text = json.dumps(result, default=lambda array: np.round(array, 5).tolist())
    save_files(folder, {"study.json": f"{text}\n"})
    say(f"All of it as numbers: {folder}/study.json")
    return result

def speed(
    preset: Annotated[str, typer.Option(help="Size of the dense layer.")] = "micro",
    tokens: Annotated[int, opt("", "Tokens at once.", low=1)] = 4096,
    n_expert: Annotated[int, opt("", "Experts; the active as wide as the dense layer.", low=1)] = 8,
    n_expert_active: Annotated[int, opt("", "Experts that a token goes to.", low=1)] = 2,
    rounds: Annotated[int, opt("", "Rounds; each times every form once.", low=1)] = 15,
    dtype: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
) -> dict:
    """Time one layer, forward and backward: dense, dispatch, the plain loop, transformers' if installed."""
    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    config = resize(preset, n_expert=n_expert, n_expert_active=n_expert_active)
    check_experts(config)
    check_memory(config.replace(n_layer=1), where, 4)
    check(tokens <= 2**20, f"--tokens is {tokens}; a layer's time shows with a million or less.")
    with where:
        dense, layer = MLP(config, config.ffn_dim), MoE(config)
        x = torch.randn(tokens, config.n_embd, dtype=kind, requires_grad=True)
        grad = torch.randn_like(x)

    def mixture(form):
        _, _, chosen, weights = layer.gate(x)
        return form(layer.experts, x, chosen, weights)

    forms = {"dense, equal FLOPs": lambda: dense(x), "dispatch": lambda: mixture(dispatch),
             "loop": lambda: mixture(loop)}
    if importlib.util.find_spec("transformers"):
        forms["transformers"] = transformers_form(config, x)
    times = {name: [] for name in forms}
    for _ in range(rounds + 1):
        for name, form in forms.items():
            synchronize(where)
            begin = time.perf_counter()
            form().backward(grad)
            synchronize(where)
            times[name].append(time.perf_counter() - begin)
    median = {name: float(np.median(t[1:])) for name, t in times.items()}  # the first round warms up
    say(f"{tokens} tokens, width {config.n_embd}, {n_expert_active} of {n_expert} experts of width "
        f"{config.expert_dim}, {kind}; medians of {rounds} rounds:")
    for name, seconds in median.items():
        say(f"  {name:18} {seconds * 1e3:8.1f} ms, {seconds / median['dispatch']:.2f} times dispatch")
    return median

def transformers_form(config: Config, x):
    """Build transformers' Mixtral layer, the faster form on CPU, with weights in x's precision."""
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    sizes = {"num_local_experts": config.n_expert, "num_experts_per_tok": config.n_expert_active}
    theirs = MixtralConfig(hidden_size=config.n_embd, intermediate_size=config.expert_dim, **sizes)
    theirs._experts_implementation = "grouped_mm"
    block = MixtralSparseMoeBlock(theirs).to(x.device, x.dtype)
    for p in block.parameters():
        nn.init.normal_(p, std=config.n_embd**-0.5)
    return lambda: block(x[None])[0]

# ---- Part V: the layer again, faster -----------------------------------------------------------------------

@torch.compiler.disable  # how many tokens an expert gets is new in every step: it would be compiled anew
def dispatch(experts, x, chosen, weights):
    """Compute what `loop` does: sort the choices by expert, multiply each expert's run, put the rows back.

    Forward and backward of 4,096 tokens on two busy cores, `loop` takes 1.1 to 1.2 times as long at width 192
    with 2 of 8 experts, 1.2 to 1.3 with 4 of 16, 1.1 at `--preset mini` (`python moe.py speed`); gradients by
    hand won nothing more. CUDA is not measured: `counts` waits for the device there.
    """
    N, A = chosen.shape
    flat = chosen.flatten()
    order = flat.argsort(stable=True)  # (N*A,): dropped choices, of expert E, come last
    counts = torch.bincount(flat, minlength=len(experts) + 1).tolist()
    *runs, dropped = x.index_select(0, order // A).split(counts)  # (rows of an expert, C)
    # while training an expert without tokens computes on no rows: its gradient is zero and not missing
    parts = [expert(run) for expert, run in zip(experts.values(), runs, strict=True)
             if len(run) or torch.is_grad_enabled()]
    y = torch.cat([*parts, torch.zeros_like(dropped)])  # (N*A, C)
    place = order.argsort().view(N, A)  # where each choice went
    weights = weights.to(x.dtype)
    if x.device.type == "cpu":  # gathers and adds in one pass
        return F.embedding_bag(place, y, per_sample_weights=weights, mode="sum")
    return (y[place] * weights.unsqueeze(-1)).sum(1)  # (N, A, C) -> (N, C)

if __name__ == "__main__":
    app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__.partition("\n")[0])
    for function in (study, upcycle, speed):
        app.command()(function)
    run_app(app)
