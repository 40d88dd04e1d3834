"""A decoder-only transformer, the folder it lives in, and what every run of it needs.

Part I   the decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU; one mask, one cache, one loss per token.
Part II  the folder: a checkpoint *is* a Hugging Face folder; a data folder is a flat file of token ids.
Part III the run: devices, optimizers, evaluation, and errors that are one sentence.

The other scripts import this file and none of the others (tokenize.py stands without it: it needs no torch). Two
doors open from here, and only when asked: `load_tokenizer` reads tokenize.py by its path, and a layer with experts
takes them from moe.py. Left out: training loops (train.py), sampling (sample.py).

    python -c "from model import *; m = Transformer(PRESETS['nano'].replace(vocab_size=256)); print(m)"

RoPE: Su et al. 2021 (2104.09864). GQA: Ainslie et al. 2023 (2305.13245). SwiGLU: Shazeer 2020 (2002.05202).
RMSNorm: Zhang & Sennrich 2019 (1910.07467). QK norm: Henry et al. 2020 (2010.04245). Muon: Jordan et al. 2024.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

# B batch, T query length, S key length, C n_embd, V vocabulary, H heads, K KV heads, D head_dim, I ffn_dim,
# N = B*T tokens, L layers, W ranks, E experts.

IGNORE = -100  # a target that is not trained on, as in torch.nn.functional.cross_entropy


class UserError(Exception):
    """What a user can put right: one sentence that says how. Commands print it and exit with code 2."""


# ------------------------------------------------------------------------------------------------------------
# Part I: the decoder
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MoEConfig:
    """Experts in the place of a layer's feed-forward network, and how a token's are chosen: see moe.py."""

    n_expert: int = 8
    n_active: int = 2  # experts that a token goes to
    ffn_dim: int = 512  # width of one
    n_shared: int = 0  # experts that every token goes to, as one network n_shared times as wide
    dense: tuple[int, ...] = ()  # layers that keep a network without experts
    score: str = "softmax"  # over all experts, or "sigmoid" of each
    normalize: bool = True  # the weights of the chosen add up to one (for softmax: it is taken over the chosen)
    scale: float = 1.0  # of the experts' sum, beside the shared ones
    bias: bool = False  # added to the scores for the choice only: DeepSeek-V3's balance without a loss
    n_group: int = 1  # experts in groups, of which a token's best `topk_group` are open to it
    topk_group: int = 1

    def __post_init__(self):
        for name in ("n_expert", "n_active", "ffn_dim", "n_group", "topk_group"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise UserError(f"{name} of the experts is {getattr(self, name)!r}; it has to be a positive whole number.")
        if self.n_expert % self.n_group or self.topk_group > self.n_group:
            raise UserError(f"{self.n_expert} experts do not go into {self.n_group} groups with {self.topk_group} of them open.")
        if self.n_active > self.n_expert // self.n_group * self.topk_group:
            raise UserError(f"A token cannot go to {self.n_active} experts: {self.n_expert // self.n_group * self.topk_group} "
                            "are open to it.")  # fmt: skip
        if self.score not in ("softmax", "sigmoid"):
            raise UserError(f"A router scores by softmax or sigmoid, not by {self.score!r}.")


@dataclass(frozen=True)
class Config:
    """The sizes and choices that make a model; what a checkpoint's config.json says, in the names used here."""

    vocab_size: int = 0  # padded to a multiple of 64: see pad_vocab
    seq_len: int = 256  # the context it is trained at
    n_layer: int = 6
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 384
    head_dim: int = 64
    ffn_dim: int = 1024
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    qk_norm: bool = True  # RMSNorm on each head's query and key, before they are rotated
    qkv_bias: bool = False
    window: tuple[int | None, ...] = ()  # per layer: a token sees the last `window` ones, itself included
    causal: bool = True  # False: every token sees every other (masked language modelling)
    tie: bool = True  # the output matrix is the embedding
    head: str = "lm"  # or "score": one number a token, for a reward model or a critic
    eos_id: int | None = None
    pad_id: int | None = None
    moe: MoEConfig | None = None  # None: every layer is dense

    def __post_init__(self):
        if not self.window:
            object.__setattr__(self, "window", (None,) * self.n_layer)
        for name in ("vocab_size", "seq_len", "n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "ffn_dim"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < (name != "vocab_size"):
                raise UserError(f"{name} is {getattr(self, name)!r}; it has to be a positive whole number.")
        if self.n_head % self.n_kv_head:
            raise UserError(
                f"{self.n_head} heads cannot share {self.n_kv_head} key-value heads evenly: "
                "choose n_kv_head among the divisors of n_head."
            )
        if self.head not in ("lm", "score"):
            raise UserError(f"A model ends in a head of kind lm or score, not {self.head!r}.")
        if self.head_dim % 2:
            raise UserError(f"head_dim is {self.head_dim}, but RoPE rotates pairs: choose an even one.")
        if len(self.window) != self.n_layer:
            raise UserError(f"{len(self.window)} windows were given for {self.n_layer} layers: one a layer.")

    def replace(self, **changes) -> Config:
        if "n_layer" in changes and "window" not in changes:
            changes["window"] = ()
        return dataclasses.replace(self, **changes)

    def to_hf(self) -> dict:
        """config.json as the stock class that this config exactly is, or as model_type "octavo"."""
        name, family = next(((n, f) for n, f in FAMILIES.items() if f.fits(self)), (None, None))
        name = name or ("OctavoForCausalLM" if self.causal else "OctavoForMaskedLM")
        name = name if self.head == "lm" else f"{name.partition('For')[0]}{SCORE}"
        hf = {key: getattr(self, ours) for ours, key in HF_KEYS.items()}
        hf |= {"architectures": [name], "model_type": family.model_type if family else "octavo"}
        hf |= {"hidden_act": "silu", "initializer_range": 0.02, "use_cache": True, "dtype": "float32"}
        hf |= {"rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta}}
        if self.head == "score":
            hf |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}  # transformers counts the scores by these
        if not family:
            return hf | {"qk_norm": self.qk_norm, "qkv_bias": self.qkv_bias, "window": list(self.window),
                         "causal": self.causal, "moe": self.moe and dataclasses.asdict(self.moe)}  # fmt: skip
        if self.moe:
            hf |= {key: getattr(self.moe, ours) for ours, key in MOE_KEYS[family.model_type].items()}
            if family.model_type == "qwen3_moe":
                hf |= {"mlp_only_layers": list(self.moe.dense), "decoder_sparse_step": 1}
            if family.model_type == "dots1":
                hf |= {"first_k_dense_replace": len(self.moe.dense)}
        sliding = [w for w in self.window if w is not None]
        hf["sliding_window"] = sliding[0] if sliding else None
        if family.layer_types:
            hf["use_sliding_window"] = bool(sliding)
            hf["layer_types"] = ["sliding_attention" if w else "full_attention" for w in self.window]
        return hf

    @staticmethod
    def from_hf(hf: dict) -> Config:
        """The config of a Hugging Face folder; a UserError that names what is not supported."""
        arch = (hf.get("architectures") or ["?"])[0]
        ours = hf.get("model_type") == "octavo"
        head = "score" if arch.endswith(SCORE) else "lm"
        if head == "score":
            arch = arch.replace(SCORE, "ForCausalLM")
            if (scores := len(hf.get("id2label") or (0, 1))) != 1:
                raise UserError(f"This model gives {scores} scores to a text; only one (a reward) is supported.")
        if not ours and arch not in FAMILIES:
            raise UserError(f"A {arch} cannot be opened yet; the families are {', '.join(FAMILIES)}.")
        rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"Rotary positions of type {kind!r} are not supported yet, only the plain ones.")
        if hf.get("hidden_act", "silu") != "silu":
            raise UserError(f"The activation {hf['hidden_act']!r} is not supported yet, only silu (SwiGLU).")
        fields = {name: hf[key] for name, key in HF_KEYS.items() if hf.get(key) is not None}
        if lacks := [k for k in ("vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size",
                                 "intermediate_size") if hf.get(k) is None]:  # fmt: skip
            raise UserError(f"config.json does not say {', '.join(lacks)}.")
        fields["rope_theta"] = float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0)))
        fields.setdefault("tie", False)  # the classes' default, not ours
        fields.setdefault("n_kv_head", fields["n_head"])
        fields.setdefault("head_dim", fields["n_embd"] // fields["n_head"])
        fields["head"] = head
        if isinstance(fields.get("eos_id"), list):
            fields["eos_id"] = fields["eos_id"][0]
        if ours:
            moe = MoEConfig(**{**hf["moe"], "dense": tuple(hf["moe"]["dense"])}) if hf.get("moe") else None
            return Config(**fields, **{k: hf[k] for k in ("qk_norm", "qkv_bias", "causal")}, window=tuple(hf["window"]),
                          moe=moe)  # fmt: skip
        family, n_layer, width = FAMILIES[arch], fields["n_layer"], hf.get("sliding_window")
        if hf.get("attention_bias") or hf.get("mlp_bias"):
            raise UserError(f"A {arch} with biases on every matrix is not supported yet.")
        full = min(n_layer, hf.get("max_window_layers", 28)) if family.layer_types else 0  # Qwen's older folders
        types = hf.get("layer_types") or ["full_attention"] * full + ["sliding_attention"] * (n_layer - full)
        sliding = width is not None and (not family.layer_types or hf.get("use_sliding_window", False))
        window = tuple(width if sliding and t == "sliding_attention" else None for t in types)
        moe = moe_from_hf(hf, n_layer) if family.moe else None
        return Config(**fields, qk_norm=family.qk_norm, qkv_bias=family.qkv_bias, window=window, moe=moe)

    def is_sparse(self, layer: int) -> bool:
        return self.moe is not None and layer not in self.moe.dense

    def ffn_params(self, layer: int, active: bool = False) -> int:
        """Of a layer's feed-forward part, the router's matrix included; active: those that a token meets."""
        if not self.is_sparse(layer):
            return 3 * self.n_embd * self.ffn_dim
        m = self.moe
        experts = (m.n_active if active else m.n_expert) + m.n_shared
        return 3 * self.n_embd * m.ffn_dim * experts + self.n_embd * m.n_expert

    @property
    def matrix_params(self) -> int:
        """Weights that multiply a token: its layers' matrices and the output matrix (the lookup is free)."""
        out = self.vocab_size if self.head == "lm" else 1
        attn = self.n_embd * self.head_dim * (2 * self.n_head + 2 * self.n_kv_head)
        ffn = sum(self.ffn_params(i, active=True) for i in range(self.n_layer))
        return self.n_layer * attn + ffn + out * self.n_embd

    def block_params(self, layer: int, active: bool = False) -> int:
        """Of one layer, norms and biases included."""
        heads = self.head_dim * (2 * self.n_head + 2 * self.n_kv_head)
        norms = 2 * self.n_embd + 2 * self.head_dim * self.qk_norm
        biases = self.head_dim * (self.n_head + 2 * self.n_kv_head) * self.qkv_bias
        return self.n_embd * heads + self.ffn_params(layer, active) + norms + biases

    def n_params(self, active: bool = False) -> int:
        """All parameters, in closed form, or those that a token meets; a test holds it equal to the sum over the module."""
        out = 1 if self.head == "score" else 0 if self.tie else self.vocab_size
        tables = (self.vocab_size + out) * self.n_embd
        return sum(self.block_params(i, active) for i in range(self.n_layer)) + self.n_embd + tables

    def flops_per_token(self, T: int | None = None) -> float:
        """Of forward and backward, per token, at context T: 6 for each weight that multiplies it (2 forward, 4
        backward), and 12*D*H a layer for each key it sees. Causal tokens see (T+1)/2 keys on average: work that
        a mask throws away is not counted, nor what recomputation adds (so this is MFU's numerator, not HFU's)."""
        T = T or self.seq_len
        keys = 0.0
        for w in self.window:
            w = min(w or T, T)  # the first w tokens see 1, 2 .. w keys, the rest see w
            keys += (w * (w + 1) / 2 + (T - w) * w) / T if self.causal else T
        return 6.0 * self.matrix_params + 12.0 * self.n_head * self.head_dim * keys

    def kv_bytes(self, B: int, T: int, bytes_per_element: int = 2) -> int:
        """Of the keys and values that B sequences of T tokens keep."""
        return 2 * B * T * self.n_layer * self.n_kv_head * self.head_dim * bytes_per_element


def zero_bytes(n: float, ranks: int, zero: int) -> tuple[float, float, float]:
    """Bytes of (parameters, gradients, optimizer) on a rank for n parameters in float32 with AdamW's two moments.

    ZeRO shards the optimizer (1), the gradients too (2), the parameters too (3): 1910.02054, figure 1.

    >>> [round(b / 1e9, 2) for b in zero_bytes(175e9, 64, 1)]
    [700.0, 700.0, 21.88]
    """
    return 4 * n / (ranks if zero >= 3 else 1), 4 * n / (ranks if zero >= 2 else 1), 8 * n / (ranks if zero >= 1 else 1)


def training_bytes(config: Config, B: int, T: int, *, dp=1, tp=1, zero=0, replicate=1, recompute="none", e=2) -> dict:
    """What stands in a rank's memory when it trains on B sequences of T tokens at once, in bytes.

    {"parameters", "gathered", "gradients", "optimizer", "activations"}; e: bytes of an activation. The engine keeps
    a shard beside what it has gathered: all of the model with ZeRO-2, the embedding and two blocks with ZeRO-3.
    Activations are what a block's backward pass keeps with attention that is not written out, and the matrices in
    the precision of the products where that is not theirs."""
    c, L = config, config.n_layer
    shards = 1 if zero == 0 else dp if zero == 1 else dp // replicate
    block = sum(c.block_params(i) for i in range(L)) / L / tp
    n = L * block + c.n_embd + c.vocab_size * c.n_embd * (1 if c.tie else 2) / tp
    parameters, gradients, optimizer = zero_bytes(n, shards, zero)
    gathered = e * n if e < 4 or dp > 1 and tp > 1 else 0.0  # (what DDP cannot do is fully_shard's, on an axis of one)
    if zero >= 2 and shards > 1:
        parameters, gathered = 4 * n / shards, e * (n if zero == 2 else n - max(0, L - 2) * block)
    q, kv, I = c.n_head * c.head_dim / tp, c.n_kv_head * c.head_dim / tp, c.ffn_dim / tp
    if c.moe:  # the rows that go to the experts, and what comes back, stand beside the tokens
        I = c.moe.ffn_dim * (c.moe.n_active + c.moe.n_shared) + c.n_embd * c.moe.n_active / 2
    layer = 4 * c.n_embd + 3 * q + 3 * kv + 4 * I + (q + kv if c.qk_norm else 0)  # both norms' inputs and outputs; q, k, v, y
    logits = min(B * T * c.vocab_size / tp, KEEP_LOGITS)
    kept = L * layer if recompute == "none" else L * c.n_embd + layer
    return {"parameters": parameters, "gathered": gathered, "gradients": gradients, "optimizer": optimizer,
            "activations": e * B * T * kept + 4 * logits}  # fmt: skip


def communication(config: Config, N: int, *, dp=1, tp=1, zero=0, replicate=1, sequence=False, recompute="none", e=2) -> list:
    """What a step with one micro-batch of N tokens a rank sends: [(phase, collective, axis, how many, bytes of the wholes)].

    Tensor parallelism: two all-reduces of the activations (N, C) a block, forward and backward (1909.08053, 3); with
    the sequence split (2205.05198, figure 5) each is an all-gather and a reduce-scatter. Data parallelism: the gradients once;
    ZeRO-3 also the weights, forward and backward (1910.02054, 7). The small ones too: a loss over a split vocabulary sums
    three numbers a token, and norms that see a part of the heads or the sequence have terms of a gradient."""
    c, L, rows = config, config.n_layer, []
    n = sum(c.block_params(i) for i in range(L)) / tp + c.n_embd + c.vocab_size * c.n_embd * (1 if c.tie else 2) / tp
    NC = N * c.n_embd
    again = L if recompute != "none" else 0  # a block that is computed again sends again what its first half sent
    if tp > 1:
        chunks = -(-N // max(64, CHUNK_LOGITS // c.vocab_size))  # of a CPU; see token_losses
        rows += [("forward", "all_reduce", "tensor", 3 * chunks, 3 * 4 * N)]
        norms = 2 * L * c.qk_norm, 2 * L * c.qk_norm * c.head_dim
        if sequence:
            norms = norms[0] + 2 * L + 1, norms[1] + (2 * L + 1) * c.n_embd
        if norms[0]:  # fully_shard sends each by itself
            rows += [("backward", "all_reduce", "tensor", norms[0] if dp > 1 else 1, 4 * norms[1])]
        if sequence:
            rows += [("forward", "all_gather", "tensor", 2 * L + 1, (2 * L + 1) * e * NC),
                     ("forward", "reduce_scatter", "tensor", 2 * L + 1, (2 * L * e + 4) * NC),
                     ("backward", "all_gather", "tensor", 2 * L + 1 + 2 * again, ((2 * L + 2 * again) * e + 4) * NC),
                     ("backward", "reduce_scatter", "tensor", 2 * L + again, (2 * L + again) * e * NC),
                     ("backward", "all_reduce", "tensor", chunks, e * NC)]  # fmt: skip
        else:
            rows += [("forward", "all_reduce", "tensor", 2 * L + 1, (2 * L * e + 4) * NC),
                     ("backward", "all_reduce", "tensor", 2 * L + again + chunks, (2 * L + again + 1) * e * NC)]  # fmt: skip
    if dp > 1:
        shards = dp // replicate if zero >= 2 else 1
        if shards > 1:
            rows += [("forward", "all_gather", "shard", L + 1, e * n)]
            if zero == 3:
                rows += [("backward", "all_gather", "shard", L + 1, e * n)]
            rows += [("backward", "reduce_scatter", "shard", L + 1, 4 * n)]
        if dp > shards:
            count = L + 1 if zero >= 2 or tp > 1 else -(-int(4 * n) // 2**25)
            rows += [("backward", "all_reduce", "replicate", count, 4 * n / shards)]
        if zero == 1:
            rows += [("step", "all_gather", "replicate", None, 4 * n)]
    return rows


def pad_vocab(n: int, multiple: int = 64) -> int:
    """Rows of the embedding for n ids: a multiple of 64 keeps matrix kernels on whole tiles.

    >>> pad_vocab(76), pad_vocab(4096)
    (128, 4096)
    """
    return -(-n // multiple) * multiple


SCORE = "ForSequenceClassification"  # how a stock class with a score head is called, after its family's name

# Our field -> the key in config.json. All four families share these.
HF_KEYS = {
    "vocab_size": "vocab_size", "seq_len": "max_position_embeddings", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size",
    "head_dim": "head_dim", "ffn_dim": "intermediate_size", "norm_eps": "rms_norm_eps",
    "tie": "tie_word_embeddings", "eos_id": "eos_token_id", "pad_id": "pad_token_id",
}  # fmt: skip


@dataclass(frozen=True)
class Family:
    """What sets one published architecture apart from its neighbours."""

    model_type: str
    qk_norm: bool = False
    qkv_bias: bool = False
    window: str = "none"  # which windows its class can express: "none", "all" (every layer the same) or "any"
    moe: MoEConfig | None = None  # what its class fixes of the experts; MOE_KEYS has what its config.json says

    @property
    def layer_types(self) -> bool:
        return self.window == "any"

    def fits(self, config: Config) -> bool:
        if (self.moe is None) != (config.moe is None):
            return False
        if config.moe:
            free = {*MOE_KEYS[self.model_type], "dense"}
            fixed = [f.name for f in dataclasses.fields(MoEConfig) if f.name not in free]
            dense = {"mixtral": config.moe.dense == (), "qwen3_moe": True,
                     "dots1": config.moe.dense == tuple(range(len(config.moe.dense)))}[self.model_type]  # fmt: skip
            shared = self.model_type != "dots1" or config.moe.n_shared > 0
            if not (dense and shared and all(getattr(self.moe, n) == getattr(config.moe, n) for n in fixed)):
                return False
        sizes = set(config.window)
        windows = {"none": sizes == {None}, "all": len(sizes) == 1 and None not in sizes,
                   "any": len(sizes - {None}) <= 1}[self.window]  # fmt: skip
        # Qwen2 derives head_dim from the width and does not read the key
        head = self.model_type != "qwen2" or config.head_dim * config.n_head == config.n_embd
        same = (self.qk_norm, self.qkv_bias) == (config.qk_norm, config.qkv_bias)
        same = same and (config.head == "lm" or self.model_type != "dots1")  # transformers has no such class
        return config.causal and same and windows and head


FAMILIES = {
    "LlamaForCausalLM": Family("llama"),
    "MistralForCausalLM": Family("mistral", window="all"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, window="any"),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, window="any"),
    "MixtralForCausalLM": Family("mixtral", moe=MoEConfig()),
    "Qwen3MoeForCausalLM": Family("qwen3_moe", qk_norm=True, moe=MoEConfig()),
    "Dots1ForCausalLM": Family("dots1", qk_norm=True, moe=MoEConfig(score="sigmoid", bias=True)),  # DeepSeek-V3's experts
}

# Field of MoEConfig -> the key in config.json, by model_type.
_DEEPSEEK = {"n_expert": "n_routed_experts", "n_active": "num_experts_per_tok", "ffn_dim": "moe_intermediate_size",
             "n_shared": "n_shared_experts", "scale": "routed_scaling_factor", "n_group": "n_group",
             "topk_group": "topk_group", "normalize": "norm_topk_prob"}  # fmt: skip
MOE_KEYS = {
    "mixtral": {"n_expert": "num_local_experts", "n_active": "num_experts_per_tok", "ffn_dim": "intermediate_size"},
    "qwen3_moe": {"n_expert": "num_experts", "n_active": "num_experts_per_tok", "ffn_dim": "moe_intermediate_size",
                  "normalize": "norm_topk_prob"},
    "dots1": _DEEPSEEK, "deepseek_v3": _DEEPSEEK,
    "deepseek_v2": {k: v for k, v in _DEEPSEEK.items() if k != "normalize"},
}  # fmt: skip


def moe_from_hf(hf: dict, n_layer: int) -> MoEConfig:
    """The experts of a config.json of one of the families of MOE_KEYS."""
    kind = hf["model_type"]
    fields = {ours: hf[key] for ours, key in MOE_KEYS[kind].items() if hf.get(key) is not None}
    for key in ("num_local_experts", "num_experts"):  # transformers writes either spelling
        if hf.get(key) is not None:
            fields.setdefault("n_expert", hf[key])
    if kind == "qwen3_moe":
        fields.setdefault("normalize", False)  # the class's default
        step, only = hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or []
        fields["dense"] = tuple(i for i in range(n_layer) if i in only or (i + 1) % step)
    elif kind != "mixtral":
        fields["dense"] = tuple(range(min(n_layer, hf.get("first_k_dense_replace", 0))))
    if kind in ("dots1", "deepseek_v3"):
        fields |= {"score": "sigmoid", "bias": True}
    if kind == "deepseek_v2":
        fields |= {"normalize": False}
        if hf.get("topk_method", "greedy") == "greedy":
            fields |= {"n_group": 1, "topk_group": 1}
    return MoEConfig(**fields)


# Sizes by name. `nano` learns in a minute, `micro` in the ten minutes of the default run; `small` is GPT-2's.
PRESETS = {
    "nano": Config(n_layer=4, n_head=4, n_kv_head=4, n_embd=128, head_dim=32, ffn_dim=384, seq_len=128),
    "micro": Config(n_layer=4, n_head=3, n_kv_head=3, n_embd=192, head_dim=64, ffn_dim=512, seq_len=256),
    "mini": Config(n_layer=6, n_head=6, n_kv_head=6, n_embd=384, head_dim=64, ffn_dim=1024, seq_len=256),
    "small": Config(n_layer=12, n_head=12, n_kv_head=12, n_embd=768, head_dim=64, ffn_dim=2048, seq_len=1024),
    "medium": Config(n_layer=24, n_head=16, n_kv_head=8, n_embd=1024, head_dim=64, ffn_dim=2816, seq_len=1024),
    "1b": Config(n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, head_dim=64, ffn_dim=8192, seq_len=4096,
                 rope_theta=500_000.0),
    "llama-2-7b": Config(vocab_size=32_000, n_layer=32, n_head=32, n_kv_head=32, n_embd=4096, head_dim=128,
                         ffn_dim=11_008, seq_len=4096, norm_eps=1e-5, qk_norm=False, tie=False),
    "llama-2-70b": Config(vocab_size=32_000, n_layer=80, n_head=64, n_kv_head=8, n_embd=8192, head_dim=128,
                          ffn_dim=28_672, seq_len=4096, norm_eps=1e-5, qk_norm=False, tie=False),
    "llama-3-8b": Config(vocab_size=128_256, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, head_dim=128,
                         ffn_dim=14_336, seq_len=8192, norm_eps=1e-5, qk_norm=False, tie=False, rope_theta=500_000.0),
    "mixtral-8x7b": Config(vocab_size=32_000, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, head_dim=128,
                           ffn_dim=14_336, seq_len=32_768, norm_eps=1e-5, qk_norm=False, tie=False,
                           rope_theta=1_000_000.0, moe=MoEConfig(8, 2, 14_336)),
    "qwen3-30b-a3b": Config(vocab_size=151_936, n_layer=48, n_head=32, n_kv_head=4, n_embd=2048, head_dim=128,
                            ffn_dim=6144, seq_len=40_960, tie=False, rope_theta=1_000_000.0, moe=MoEConfig(128, 8, 768)),
}  # fmt: skip


class Linear(nn.Linear):
    """A matrix kept in the precision of training (float32) and multiplied in the precision of its input."""

    def forward(self, x):  # (..., in) -> (..., out)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (1910.07467, eq. 4)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        weight = self.weight.to(x.dtype)
        if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _RMSNormCPU.apply(x, weight, self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)


class _RMSNormCPU(torch.autograd.Function):
    """rms_norm with its gradient by hand: on CPU, autograd through the composite form takes ten times as long."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        C = x.shape[-1]
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        r = (norm.square() / C + ctx.eps).rsqrt()  # y = x r w, and dr/dx = -r^3 x / C
        gw = grad * weight
        dot = (gw * x).sum(-1, keepdim=True, dtype=torch.float32)
        grad_x = torch.addcmul(gw * r.to(x.dtype), x, (r.pow(3) * dot / -C).to(x.dtype))
        grad_weight = (grad * (x * r.to(x.dtype))).sum(tuple(range(x.dim() - 1)), dtype=torch.float32)
        return grad_x, grad_weight.to(weight.dtype), None


def rope_angles(positions, head_dim: int, theta: float):
    """cos and sin of position * theta^(-2i/D) for pair i (2104.09864, eq. 15).

    positions (T,) or (B, T) -> two (..., T, 1, D/2), float32: at position 100,000 bfloat16 would be off by 256.
    """
    i = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    angles = positions.float().unsqueeze(-1) * theta ** (-i / head_dim)
    return angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)


class _Rope(torch.autograd.Function):
    """Rotate the pairs (x_i, x_{i+D/2}); the gradient is the rotation the other way, one more call of the same."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        a, b = x.chunk(2, dim=-1)  # Hugging Face pairs the halves, the paper neighbours: a permutation of q and k
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        a, b = grad.chunk(2, dim=-1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1), None, None


def apply_rope(x, cos, sin):  # (B, T, H, D) -> (B, T, H, D)
    return _Rope.apply(x, cos, sin)


def visible(q_pos, k_pos, q_doc=None, k_doc=None, q_trunk=None, *, causal=True, window=None):
    """THE mask: may the query at q_pos look at the key at k_pos?

    q_pos (..., T), k_pos (..., S) -> bool (..., T, S), True = visible. A slot at position -1 is empty. With documents only
    keys of the query's own are, and of its trunk: a document that several others go on from.

    >>> visible(torch.arange(3), torch.arange(3), window=2).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    distance = q_pos.unsqueeze(-1) - k_pos.unsqueeze(-2)
    mask = (k_pos >= 0).unsqueeze(-2).expand(distance.shape)
    if causal:
        mask = mask & (distance >= 0)
    if window is not None:
        mask = mask & (distance < window) & (distance > -window)
    if q_doc is not None:
        same = q_doc.unsqueeze(-1) == k_doc.unsqueeze(-2)
        mask = mask & (same if q_trunk is None else same | (q_trunk.unsqueeze(-1) == k_doc.unsqueeze(-2)))
    return mask


CPU_SHORT = 512  # keys up to which a CPU does attention as plain matrix products: half the time of its flash kernel


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v: the one place that picks a kernel.

    q (B, H, T, D), k and v (B, K, S, D) with K dividing H; mask None (all), "causal" or bool (B or 1, T, S).
    """
    gqa = q.shape[1] != k.shape[1]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and (q.shape[2] == 1 or k.shape[2] <= CPU_SHORT):
        return _AttendCPU.apply(q, k, v, mask)
    if isinstance(mask, str):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    return F.scaled_dot_product_attention(q, k, v, None if mask is None else mask.unsqueeze(1), enable_gqa=gqa)


class _AttendCPU(torch.autograd.Function):
    """Attention as it is written on paper, in bfloat16 products: the scores (B, H, T, S) do stand in memory.

    For a group of query heads that share a key head, the queries are stacked: (B*K, G*T, D) x (B*K, D, S).
    """

    @staticmethod
    def forward(ctx, q, k, v, mask):
        B, H, T, D = q.shape
        K, S = k.shape[1], k.shape[2]
        G = H // K
        if isinstance(mask, str):
            mask = torch.ones(T, S, dtype=torch.bool).tril().unsqueeze(0)
        q, k, v = q.reshape(B * K, G * T, D), k.reshape(B * K, S, D), v.reshape(B * K, S, D)
        if mask is None:
            scores = torch.bmm(q, k.transpose(1, 2)).mul_(D**-0.5)  # (B*K, G*T, S)
        else:
            bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf).repeat(1, G, 1)  # (B or 1, G*T, S)
            bias = bias if len(bias) == 1 else bias.repeat_interleave(K, 0)
            scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=D**-0.5)
        p = torch.softmax(scores, -1)
        ctx.save_for_backward(q, k, v, p)
        return torch.bmm(p, v).view(B, H, T, D)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, p = ctx.saved_tensors
        B, H, T, D = grad.shape
        grad = grad.reshape(q.shape)
        grad_v = torch.bmm(p.transpose(1, 2), grad)
        grad_p = torch.bmm(grad, v.transpose(1, 2))
        grad_s = torch.ops.aten._softmax_backward_data(grad_p, p, -1, p.dtype)  # p * (grad_p - sum(grad_p * p))
        grad_q = torch.baddbmm(q, grad_s, k, beta=0, alpha=D**-0.5)
        grad_k = torch.baddbmm(k, grad_s.transpose(1, 2), q, beta=0, alpha=D**-0.5)
        K = k.shape[0] // B
        return grad_q.view(B, H, T, D), grad_k.view(B, K, -1, D), grad_v.view(B, K, -1, D), None


class Attention(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        c, self.layer, self.head_dim = config, layer, config.head_dim
        self.q_proj = Linear(c.n_embd, c.n_head * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.n_embd, c.n_kv_head * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.n_head * c.head_dim, c.n_embd, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, mask=None, cache: Cache | Branches | None = None):
        B, T, _ = x.shape
        # -1, not H: under tensor parallelism a rank's projections return its share of the heads
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim))  # (B, T, H, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim))  # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D)
            y = cache.attend(self.layer, q, k, v, mask)
        else:
            y = attend(q, k, v, mask)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (2002.05202, eq. 6)."""

    def __init__(self, n_embd: int, ffn_dim: int):
        super().__init__()
        self.gate_proj = Linear(n_embd, ffn_dim, bias=False)
        self.up_proj = Linear(n_embd, ffn_dim, bias=False)
        self.down_proj = Linear(ffn_dim, n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def expert_layer(config: Config) -> nn.Module:
    """The mixture of experts, in the place of MLP: the door to moe.py, which only a config with experts opens."""
    import moe

    return moe.MoE(config)


AUX = ("aux_loss", "balance_loss", "z_loss", "dropped", "router_entropy", "load")  # columns; load: one for each expert


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer, self.sparse = layer, config.is_sparse(layer)
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = expert_layer(config) if self.sparse else MLP(config.n_embd, config.ffn_dim)
        self.dropout = 0.0  # set by Transformer.set_dropout

    def forward(self, x, aux, cos, sin, mask=None, cache=None):
        x = x + drop(self.self_attn(self.input_layernorm(x), cos, sin, mask, cache), self.dropout, self.training)
        y = self.mlp(self.post_attention_layernorm(x))
        if self.sparse:
            y, row = y
            aux = torch.cat((aux[: self.layer], row[None], aux[self.layer + 1 :]))
        return x + drop(y, self.dropout, self.training), aux  # aux is passed on and never kept in self


def drop(x, p: float, training: bool):
    """Dropout whose mask is drawn once a sequence and channel, (B, 1, C), and held over all its positions.

    T times fewer random numbers than the usual form, which on CPU cost as much as the layer itself
    (Gal & Ghahramani 2016, 1512.05287, draw it so for recurrent networks).
    """
    if p == 0.0 or not training:
        return x
    keep = torch.rand(x.shape[0], 1, x.shape[-1], device=x.device) >= p
    return x * (keep / (1 - p)).to(x.dtype)


def keep_products():
    """Selective recomputation: results of matrix products are kept, the cheap rest is computed again."""
    aten = torch.ops.aten
    kept = [aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten._scaled_dot_product_flash_attention,
            aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_efficient_attention]  # fmt: skip
    return create_selective_checkpoint_contexts([op.default for op in kept])


class Transformer(nn.Module):
    """The decoder. Modules carry Hugging Face's names, so a checkpoint needs no renaming.

    layers: which of them to build (a pipeline stage is the same class with some); all by default. The embedding
    lives where layer 0 is, the last norm and the output matrix where the last layer is.
    """

    def __init__(self, config: Config, layers: range | None = None):
        super().__init__()
        self.config, layers = config, layers if layers is not None else range(config.n_layer)
        self.first, self.last = 0 in layers, config.n_layer - 1 in layers
        self.compute_dtype: torch.dtype | None = None  # of activations; None: as the parameters
        self.recompute = "none"  # activations kept for the backward pass: all; see `remember`
        if self.first or config.tie and self.last and config.head == "lm":
            self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in layers})
        if self.last:
            self.norm = RMSNorm(config.n_embd, config.norm_eps)
            if config.head == "score":
                self.score = Linear(config.n_embd, 1, bias=False)
                return
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
            if config.tie:
                self.lm_head.weight = self.embed_tokens.weight

    def forward(self, x, targets=None, *, positions=None, doc_ids=None, trunk_ids=None, at=None, cache=None, aux=None,
                output="logits"):  # fmt: skip
        """ids (B, T), or hidden (B, T, C) on a later stage -> (result, aux).

        targets (B, T)  given: the result is the loss PER TOKEN (B, T) in nats, float32, 0 where IGNORE
        positions       (T,) consecutive or (B, T) any, 0.. by default (with a cache: from its end); -1 is padding
        doc_ids (B, T)  tokens of different documents do not see each other
        trunk_ids       (B, T) a document that a token sees beside its own: a prompt that several answers share
        at (N,)         the places in the flattened (B, T) that the result is wanted of: it, and targets, are then (N, ..)
        output          "logits" (B, T, V) | "last" (B, 1, V): the last position's | "hidden" (B, T, C)
                        with a score head, in the place of the logits: a number a token (B, T) or (B, 1), float32
        aux             (L, 1), with experts (L, 5 + E): what each layer adds to the loss, and what it saw (`AUX`; while
                        training). A later stage is given the earlier one's
        """
        B, T = x.shape[:2]
        if positions is None:
            start = cache.n if cache is not None else 0
            positions = torch.arange(start, start + T, device=x.device)
        if cache is not None:
            if doc_ids is not None:
                raise ValueError("a cache holds one document a row: give doc_ids or a cache, not both")
            cache.claim(positions)
        masks = self.masks(positions, doc_ids, trunk_ids, cache, T)
        if self.first:
            x = self.embed_tokens(x)  # (B, T, C)
        x = x.to(self.compute_dtype or x.dtype)
        cos, sin = (a.to(x.dtype) for a in rope_angles(positions, self.config.head_dim, self.config.rope_theta))
        if aux is None:
            columns = len(AUX) - 1 + self.config.moe.n_expert if self.config.moe else 1
            aux = x.new_zeros((self.config.n_layer, columns), dtype=torch.float32)
        for i, block in self.layers.items():
            args = (x, aux, cos, sin, masks[self.config.window[int(i)]], cache)
            x, aux = self.remember(block, *args)
        if not self.last:
            return x, aux
        x = x[:, -1:] if output == "last" else x if at is None else x.flatten(0, 1).index_select(0, at)
        x = self.norm(x)
        if output == "hidden":
            return x, aux
        if self.config.head == "score":
            return self.score(x).squeeze(-1).float(), aux
        if targets is None:
            return self.lm_head(x), aux
        return token_losses(x, self.lm_head, targets, self.config.vocab_size), aux

    def remember(self, block, *args):
        """Run a block, keeping what its backward pass needs: everything, or its input only ("block"), or the
        results of its matrix products ("selective"), the rest being computed again from these."""
        if args[-1] is not None:  # with a cache every length is new: a compiled block would be compiled anew
            return block._call_impl(*args)
        if self.recompute == "none" or not torch.is_grad_enabled():
            return block(*args)
        if self.recompute == "block":
            return checkpoint(block, *args, use_reentrant=False)
        return checkpoint(block, *args, use_reentrant=False, context_fn=keep_products)

    def masks(self, positions, doc_ids, trunk_ids, cache, T) -> dict:
        """The mask of each window size in use, made once for all layers that share it."""
        full = {}
        for window in set(self.config.window):
            S = T if cache is None else cache.n
            plain = doc_ids is None and positions.dim() == 1 and (cache is None or not cache.ragged)
            if plain and (window is None or S <= window):
                if not self.config.causal or (cache is not None and T == 1):
                    full[window] = None
                    continue
                if S == T:
                    full[window] = "causal"
                    continue
            k_pos = positions if cache is None else cache.seen()
            mask = visible(positions, k_pos, doc_ids, doc_ids, trunk_ids, causal=self.config.causal, window=window)
            if positions.dim() == 2:  # a row of padding sees nothing, and a softmax over nothing is NaN: let it see all
                mask = mask | (positions < 0).unsqueeze(-1)
            full[window] = mask if mask.dim() == 3 else mask.unsqueeze(0)  # (B or 1, T, S)
        return full

    def set_dropout(self, p: float) -> None:
        for block in self.layers.values():
            block.dropout = p

    def set_balance(self, o: Options) -> None:
        """What training adds to a mixture of experts so that all are used; nothing where the model is dense."""
        for block in (b for b in self.layers.values() if b.sparse):
            block.mlp.balance = o.balance_rate if o.balance == "loss" else 0.0
            block.mlp.z_loss, block.mlp.capacity = o.z_loss, o.capacity

    @torch.no_grad()
    def shift_bias(self, aux, rate: float) -> None:
        """After a step: experts that were chosen more often than the mean become less likely to be, and the other way
        round (Wang et al. 2024, 2408.15664, algorithm 1). aux: the step's, of all ranks: the loads may have any scale."""
        for block in (b for b in self.layers.values() if b.sparse):
            load = aux[block.layer, len(AUX) - 1 :]
            block.mlp.gate.e_score_correction_bias += rate * torch.sign(load.mean() - load)

    def compile_blocks(self) -> None:
        """torch.compile one block and use it for all: a start-up of one layer, and names stay as they are."""
        for block in self.layers.values():
            block.compile(dynamic=False)

    @torch.no_grad()
    def init_weights(self, seed: int = 0, mup_base: int | None = None) -> Transformer:
        """Each tensor from its own generator, seeded by (seed, name): any sharding of the model starts equal.

        Normal with standard deviation 1/sqrt(fan_in) (the embedding: 0.02), and the two matrices that write to
        the residual stream start smaller by sqrt(2 L), as in GPT-2, so that its variance stays about one.

        mup_base: the width at which a learning rate was found. Then logits shrink as base / width (Yang et al. 2022,
        2203.03466, table 8), by way of the last norm's gain, so that the folder is still that of a stock class."""
        for name, p in self.named_parameters():
            if p.dim() < 2:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            generator = torch.Generator().manual_seed(seed_of(seed, name))
            std = 0.02 if "embed_tokens" in name or "lm_head" in name else p.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * self.config.n_layer)
            full = torch.randn(p.shape, generator=generator) * std
            if hasattr(p, "placements"):  # a rank's share of it (parallel.py): drawn whole, as one process would
                from torch.distributed.tensor import distribute_tensor

                full = distribute_tensor(full.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
            p.copy_(full)
        for buffer in self.buffers():  # the routers' bias
            buffer.zero_()
        if mup_base and self.last:
            self.norm.weight.fill_(mup_base / self.config.n_embd)
        return self


def seed_of(*parts) -> int:
    """A 63-bit seed from anything printable, the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


CHUNK_LOGITS = 2**22  # logits that stand in memory at once: 16 MB of float32, about what a CPU's cache holds
KEEP_LOGITS = 2**27  # beyond this many in all, they are computed again in the backward pass instead of kept


def token_losses(hidden, head: nn.Module, targets, V: int):
    """-log p(target) of each token: (B, T, C), (B, T) -> (B, T) (or (N, C), (N,) -> (N,)) float32, 0 where the target is IGNORE.

    In chunks of tokens, so that the (N, V) logits of a large vocabulary never stand in memory at once.
    """
    x, t = hidden.flatten(0, -2), targets.flatten()
    rows = max(64, CHUNK_LOGITS // V) if x.device.type == "cpu" else max(1024, 2**26 // V)
    again = torch.is_grad_enabled() and x.shape[0] * V > KEEP_LOGITS

    def chunk(x, t):
        return F.cross_entropy(head(x).float(), t, ignore_index=IGNORE, reduction="none")

    losses = [
        checkpoint(chunk, x[i : i + rows], t[i : i + rows], use_reentrant=False)
        if again
        else chunk(x[i : i + rows], t[i : i + rows])
        for i in range(0, x.shape[0], rows)
    ]
    return torch.cat(losses).view(targets.shape)


class Cache:
    """Keys and values of all layers, in slots that remember their positions.

    For up to `slots` tokens a sequence. A slot whose position is -1 (padding, or never written) is invisible, so prompts of
    unequal length share a batch: pad on either side, give the pads position -1. All rows take the same next slots.
    """

    def __init__(self, config: Config, batch: int, slots: int, device=None, dtype=None):
        shape = (config.n_layer, batch, config.n_kv_head, slots, config.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.positions = torch.full((batch, slots), -1, device=device)
        self.clear()

    def clear(self) -> None:
        self.n, self.ragged = 0, False  # slots in use; does any row differ from 0, 1, 2 ...?
        self.positions.fill_(-1)

    def claim(self, positions) -> None:
        """Take the next T slots for tokens at these positions ((T,) or (B, T)); called once a forward pass."""
        T, slots = positions.shape[-1], self.positions.shape[1]
        if self.n + T > slots:
            raise UserError(f"{self.n + T} tokens do not fit a cache of {slots}: ask for fewer.")
        self.positions[:, self.n : self.n + T] = positions
        self.ragged |= positions.dim() > 1
        self.n += T

    def update(self, layer: int, k, v):
        """Write one layer's keys and values (B, K, T, D) into the claimed slots; all so far (B, K, S, D)."""
        start = self.n - k.shape[2]
        self.k[layer, :, :, start : self.n], self.v[layer, :, :, start : self.n] = k, v
        return self.k[layer, :, :, : self.n], self.v[layer, :, :, : self.n]

    def seen(self):
        """The positions of the keys that `attend` is given: (B, S)."""
        return self.positions[:, : self.n]

    def attend(self, layer: int, q, k, v, mask):
        """Of the keys and values that `update` gave: all of them, so the layer's number says nothing more."""
        return attend(q, k, v, mask)

    def rewind(self, n: int) -> None:
        """Forget all but the first n slots (a rejected draft, a turn taken back)."""
        self.positions[:, n:] = -1
        self.n = n

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


def closing(keep: list[int]) -> tuple[list[int], list[int]]:
    """To have these rows first: which to move, and where to.

    >>> closing([0, 3, 4])
    ([3, 4], [1, 2])
    """
    return [r for r in keep if r >= len(keep)], sorted(set(range(len(keep))) - set(keep))


class Branches:
    """In the place of a Cache, for texts that go on from prompts, a token at a time.

    A prompt's keys and values stand in a trunk, and are read, once for all texts that go on from it: a copy for each is most
    of what decoding would read (Hydragen: Juravsky et al. 2024, 2402.05099). Behind it each text has slots of its own, at its
    own pace, which come in use a block at a time: keys that are read together stand together.
    R texts, P trunks of up to U tokens.
    """

    BLOCK = 32

    def __init__(self, config: Config, device=None, dtype=None):
        self.config, self.memory, self.ragged = config, torch.empty(0, device=device, dtype=dtype), True

    def begin(self, rows: int, slots: int, trunks: int, longest: int) -> None:
        """Empty, for so many texts of so many tokens, behind so many prompts; in the memory of before, where that is enough:
        on a CPU new memory costs as much as a fifth of the decoding."""
        c, self.limit = self.config, slots
        sizes = [2 * c.n_layer * c.n_kv_head * c.head_dim * n for n in (trunks * longest, rows * slots)]
        if len(self.memory) < sum(sizes):
            self.k = self.v = self.trunk_k = self.trunk_v = self.own = None  # let go of the old before the new is there
            self.memory = self.memory[:0].clone()
            self.memory = self.memory.new_empty(sum(sizes))
        trunk, self.own = self.memory[: sum(sizes)].split(sizes)
        self.trunk_k, self.trunk_v = self.lay(trunk, trunks, longest)
        self.k, self.v = self.lay(self.own, rows, 0)
        self.n, self.positions = 0, torch.full((rows, slots), -1, device=self.memory.device)

    def lay(self, memory, rows: int, slots: int):
        """k and v, (L, rows, K, slots, D), all zero: what the mask hides must be a number all the same."""
        shape = (2, self.config.n_layer, rows, self.config.n_kv_head, slots, self.config.head_dim)
        return memory[: math.prod(shape)].view(shape).zero_()

    def plant(self, prompts: Cache, trunks: list[int]) -> None:
        """Prompts that have been read become these trunks."""
        for trunk, read in ((self.trunk_k, prompts.k), (self.trunk_v, prompts.v)):
            trunk[:, trunks, :, : prompts.n] = read

    def seat(self, trunks: list[int | None], starts: list[int]) -> None:
        """Which trunk each text goes on from (None: the row is idle), and at what position: the trunk's length."""
        (_, P, K, U, _), device = self.trunk_k.shape, self.trunk_k.device
        groups = [[r for r, t in enumerate(trunks) if t == trunk] for trunk in range(P)]
        n = max(1, *map(len, groups))
        at = {r: t * K * n + i for t, group in enumerate(groups) for i, r in enumerate(group)}
        heads = torch.arange(K, device=device)
        seats = torch.tensor([group + [0] * (n - len(group)) for group in groups], device=device)
        self.seats = seats[:, None] * K + heads[:, None]  # (P, K, n): the queries, of (text, head), that ask a trunk's head
        self.place = torch.tensor([at.get(r, 0) for r in range(len(trunks))], device=device)[:, None] + heads * n  # (R, K): their seats
        self.starts = torch.tensor(starts, device=device)[:, None]
        slots = torch.arange(U, device=device).expand(len(starts), U)
        self.before = slots.masked_fill(slots >= self.starts, -1)  # (R, U) positions

    def claim(self, positions) -> None:
        """positions (R, 1): one token for each text, in the slot so far behind the text's start."""
        slots = positions - self.starts
        if (end := int(slots.max()) + 1) > self.limit:
            raise UserError(f"{end} tokens do not fit a cache of {self.limit}: ask for fewer.")
        if end > self.n:
            old, had, self.n = (self.k.clone(), self.v.clone()), self.n, min(-(-end // self.BLOCK) * self.BLOCK, self.limit)
            self.k, self.v = self.lay(self.own, len(positions), self.n)
            self.k[..., :had, :], self.v[..., :had, :] = old
        self.rows, self.slots = torch.arange(len(slots), device=slots.device), slots[:, 0]
        self.positions.scatter_(1, slots, positions)

    def update(self, layer: int, k, v):
        """Write one layer's keys and values (R, K, 1, D); the texts' own so far (R, K, S, D)."""
        self.k[layer][self.rows, :, self.slots], self.v[layer][self.rows, :, self.slots] = k[:, :, 0], v[:, :, 0]
        return self.k[layer], self.v[layer]

    def seen(self):
        """The positions of the keys that `attend` looks at, the trunk's before the text's own: (R, U + S)."""
        return torch.cat((self.before, self.positions[:, : self.n]), -1)

    def attend(self, layer: int, q, k, v, mask):
        """`attend` for one token a text: q (R, H, 1, D), its own k and v (R, K, S, D), mask (R, 1, U + S)."""
        (R, H, _, D), (P, K, U, _), n = q.shape, self.trunk_k[layer].shape, self.seats.shape[-1]
        G, S = H // K, k.shape[2]

        def seated(x):  # (R*K, G, E) -> (P*K, n*G, E)
            return x.flatten(1)[self.seats.flatten()].view(P * K, n * G, -1)

        def back(x):  # (P*K, n*G, E) -> (R*K, G, E)
            return x.view(P * K * n, -1)[self.place.flatten()].view(R * K, G, -1)

        q = (q * D**-0.5).reshape(R * K, G, D)
        shared = torch.bmm(seated(q), self.trunk_k[layer].reshape(P * K, U, D).transpose(1, 2))
        own = torch.bmm(q, k.reshape(R * K, S, D).transpose(1, 2))
        scores = torch.cat((back(shared), own), -1)
        scores.view(R, H, U + S).masked_fill_(~mask, -torch.inf)
        p_shared, p_own = (p.contiguous() for p in scores.softmax(-1).split((U, S), -1))
        shared = torch.bmm(seated(p_shared), self.trunk_v[layer].reshape(P * K, U, D))
        return (torch.bmm(p_own, v.reshape(R * K, S, D)) + back(shared)).view(R, H, 1, D)

    def cut(self, rows: list[int], trunks: list[int]) -> None:
        """Go on with these only; they become the first ones (`closing`). Then they have to be seated anew."""
        moved, holes = closing(rows)
        for x in (self.k, self.v):
            x[:, holes] = x[:, moved]
        self.positions[holes] = self.positions[moved]
        self.k, self.v, self.positions = self.k[:, : len(rows)], self.v[:, : len(rows)], self.positions[: len(rows)]
        moved, holes = closing(trunks)
        for x in (self.trunk_k, self.trunk_v):
            x[:, holes] = x[:, moved]
        self.trunk_k, self.trunk_v = self.trunk_k[:, : len(trunks)], self.trunk_v[:, : len(trunks)]


@torch.inference_mode()
def generate(model, prompts: list[list[int]], max_new_tokens, pick: Callable | None = None, eos_id=(), samples: int = 1, rows=None,
             cache: Branches | None = None):  # fmt: skip
    """Continue each prompt: batched, cached. -> the new ids of each, up to and with eos_id (one, or several).

    max_new_tokens: of all, or a list with each prompt's. pick: logits (B, V) -> ids (B,), greedy by default; sample.py has
    the others. samples: so many continuations of each prompt, one after the other in the result; it is read once for all.
    rows: the most texts at once; as some end, waiting prompts take their places (continuous batching: Yu et al. 2022,
    Orca), the longest first: prompts that are read together are then about as long. cache: to work in, of a caller that
    generates again and again.
    """
    model.eval()
    if not prompts or not all(prompts):
        raise UserError("A prompt needs at least one token: begin with the end-of-text token.")
    device, dtype = (p := next(model.parameters())).device, model.compute_dtype or p.dtype
    pick, stop = pick or greedy, set(eos_id) if isinstance(eos_id, (list, tuple, set, frozenset)) else {eos_id}
    limit = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    out, waiting = [[] for _ in range(len(prompts) * samples)], sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    rows = max(samples, min(rows or len(out), len(out)))
    trunks = min(samples, 2) * rows // samples  # room for prompts of which only some texts still go on
    cache = cache or Branches(model.config, device, dtype)
    cache.begin(rows, max(limit), trunks, max(map(len, prompts)))
    owner: list = [None] * rows  # the text of each row
    home: dict[int, int] = {}  # the trunk of each prompt

    def seat():  # -> where each row's own slots begin
        starts = [0 if i is None else len(prompts[i // samples]) for i in owner]
        cache.seat([None if i is None else home[i // samples] for i in owner], starts)
        return starts

    def put(tokens, places):  # write the tokens down; rows whose text ends with them are free
        for token, r in zip(tokens.tolist(), places, strict=True):
            if (i := owner[r]) is not None:
                out[i].append(token)
                if len(out[i]) >= limit[i // samples] or token in stop:
                    owner[r] = None

    while True:
        free = [r for r in range(rows) if owner[r] is None]
        home = {p: home[p] for p in {i // samples for i in owner if i is not None}}
        spare = [t for t in range(trunks) if t not in home.values()]
        if waiting and spare and len(free) >= max(samples, rows // 8):
            take = waiting[: min(len(free) // samples, len(spare))]
            take = [p for p in take if len(prompts[p]) > 0.75 * len(prompts[take[0]]) - 8]  # alike: padding is read as well
            waiting = waiting[len(take) :]
            logits, read = prefill(model, [prompts[p] for p in take], dtype)
            home |= zip(take, spare, strict=False)
            places = free[: len(take) * samples]
            for n, r in enumerate(places):
                owner[r] = take[n // samples] * samples + n % samples
            cache.plant(read, spare[: len(take)])
            cache.positions[places] = -1
            starts = seat()
            put(pick(logits.repeat_interleave(samples, 0)), places)
        elif len(free) == rows:
            return out
        else:
            if not waiting and len(free) >= rows / 8:  # rows that have ended cost as much as the others: let them go
                keep = [r for r in range(rows) if owner[r] is not None], sorted(home.values())
                cache.cut(*keep)
                for r, hole in zip(*closing(keep[0]), strict=True):
                    owner[hole] = owner[r]
                moved = dict(zip(*closing(keep[1]), strict=True))
                home = {p: moved.get(t, t) for p, t in home.items()}
                rows, trunks = map(len, keep)
                owner = owner[:rows]
                starts = seat()
            ids = [[0] if i is None else out[i][-1:] for i in owner]
            ends = [[starts[r] if i is None else starts[r] + len(out[i]) - 1] for r, i in enumerate(owner)]
            logits, _ = model(torch.tensor(ids, device=device), positions=torch.tensor(ends, device=device), cache=cache, output="last")
            put(pick(logits[:, -1].float()), range(rows))


def prefill(model, prompts: list[list[int]], dtype):
    """Read the prompts: -> logits of each next token (B, V), a cache. Shorter ones are padded on the right, where, being
    causal, no token of theirs sees the pads, and the text that they go on with overwrites them."""
    T, device = max(map(len, prompts)), next(model.parameters()).device
    ids = torch.tensor([p + [0] * (T - len(p)) for p in prompts], device=device)
    cache = Cache(model.config, len(prompts), T, device, dtype)
    ends = torch.tensor([i * T + len(p) - 1 for i, p in enumerate(prompts)], device=device)
    return model(ids, at=ends, cache=cache)[0].float(), cache


def greedy(logits):  # (B, V) -> (B,)
    return logits.argmax(-1)


# ------------------------------------------------------------------------------------------------------------
# Part II: the folders
# ------------------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (  # ChatML
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def render(tokenizer, messages: list[dict], reply: bool = False) -> tuple[list[int], list[bool]]:
    """CHAT_TEMPLATE in tokens: the ids of [{"role", "content"}, ...], and of each whether the assistant wrote it (the end
    of its turn included), which is what fine-tuning trains.

    reply: with the header of the assistant's turn at the end, for it to go on. What a message contains is ordinary
    text: a user who writes <|im_end|> ends nothing.
    """
    if tokenizer.im_start_id is None or tokenizer.im_end_id is None:
        raise UserError("This tokenizer has no <|im_start|> and <|im_end|>: it was not made for conversations.")
    ids, own, newline = [], [], tokenizer.encode("\n")
    for message in messages:
        header = len(tokenizer.encode(message["role"] + "\n"))
        text = tokenizer.encode(f"{message['role']}\n{message['content']}")
        ids += [tokenizer.im_start_id, *text, tokenizer.im_end_id, *newline]
        own += [False] * (1 + header) + [message["role"] == "assistant"] * (len(text) - header + 1) + [False] * len(newline)
    if reply:
        header = [tokenizer.im_start_id, *tokenizer.encode("assistant\n")]
        ids, own = ids + header, own + [False] * len(header)
    return ids, own


def load_tokenizer(folder: str | Path):
    """The tokenizer of a data or checkpoint folder. tokenize.py is opened by its path, since `import tokenize`
    gives Python's own module of that name (see the head of that file)."""
    tokenize = sys.modules.get("octavo_tokenize")
    if tokenize is None:
        spec = importlib.util.spec_from_file_location("octavo_tokenize", Path(__file__).with_name("tokenize.py"))
        tokenize = sys.modules["octavo_tokenize"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tokenize)
    tokenize.UserError = UserError  # what it raises from here on, in encode too, is answered like our own
    return tokenize.Tokenizer.load(folder)


def find_checkpoint(folder: str | Path) -> Path:
    """The folder, or its `.old` when a save was cut off between its two renames. UserError when neither is one."""
    folder = Path(folder)
    for path in (folder, Path(f"{folder}.old")):
        if (path / "config.json").is_file() and any(path.glob("model*.safetensors")):
            return path
    if (folder / "state" / "shards").is_dir():
        raise UserError(f"{folder} holds the shards of several processes: `python parallel.py export {folder}` joins them.")
    raise UserError(f"{folder} holds no checkpoint (config.json and model.safetensors): train one with train.py.")


def save_checkpoint(folder: str | Path, model, tokenizer: str | Path, *, state=None, metrics="", weights=None) -> None:
    """Write a Hugging Face folder beside `folder`, then put it in its place: a kill leaves a whole one.

    tokenizer: the tokenizer.json to carry along. state: (tensors by name, JSON object) of a run that can go on.
    weights: by our names, where `model` holds only a rank's share of them.
    """
    folder = Path(folder)
    weights = weights or model.state_dict()
    weights = {hf_name(n, model.config): p.detach().cpu().contiguous() for n, p in weights.items()}
    if model.config.tie:
        weights.pop("lm_head.weight", None)
    with replacing(folder) as new:
        write_folder(new, model.config, tokenizer, metrics)
        save_tensors(new / "model.safetensors", weights, {"format": "pt"})
        if state is not None:
            (new / "state").mkdir()
            save_tensors(new / "state" / "optimizer.safetensors", state[0])
            write_text(new / "state" / "state.json", json.dumps(state[1], indent=1) + "\n")


def write_folder(new: Path, config: Config, tokenizer: str | Path, metrics: str = "") -> None:
    """All of a checkpoint folder but its tensors."""
    text = {
        "config.json": config.to_hf(),
        "generation_config.json": {"eos_token_id": config.eos_id, "pad_token_id": config.pad_id,
                                   "do_sample": True, "temperature": 0.7, "top_p": 0.9},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>",
                                  "pad_token": "<|pad|>", "mask_token": "<|mask|>",
                                  "model_max_length": config.seq_len, "clean_up_tokenization_spaces": False,
                                  "chat_template": CHAT_TEMPLATE},
    }  # fmt: skip
    for name, content in text.items():
        write_text(new / name, json.dumps(content, indent=2) + "\n")
    write_text(new / "tokenizer.json", Path(tokenizer).read_text(encoding="utf-8"))
    write_text(new / "metrics.jsonl", metrics)


@contextlib.contextmanager
def replacing(folder: Path):
    """An empty folder to write into, put in the place of `folder` at the end; what was there is then in `.old`."""
    new, old = Path(f"{folder}.new"), Path(f"{folder}.old")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(new, folder)
    except (OSError, SafetensorError) as error:
        with contextlib.suppress(OSError):
            if not folder.exists():
                os.replace(old, folder)
        shutil.rmtree(new, ignore_errors=True)
        kept = f"; the last one in {folder} is whole" if folder.exists() else ""
        raise UserError(f"The checkpoint could not be written to {new} ({error}){kept}.") from None
    shutil.rmtree(old, ignore_errors=True)


MIXTRAL = {".mlp.gate.": ".block_sparse_moe.gate.", ".mlp.experts.": ".block_sparse_moe.experts.",
           ".gate_proj.": ".w1.", ".down_proj.": ".w2.", ".up_proj.": ".w3."}  # fmt: skip


def hf_name(name: str, config: Config) -> str:
    """layers.0.mlp.up_proj.weight -> model.layers.0.mlp.up_proj.weight; the heads stand outside of `model`."""
    if config.moe and FAMILIES["MixtralForCausalLM"].fits(config):
        for ours, theirs in MIXTRAL.items():
            name = name.replace(ours, theirs)
    return name if name.startswith(("lm_head.", "score.")) else f"model.{name}"


def save_tensors(path: Path, tensors: dict, metadata: dict | None = None) -> None:
    save_file(tensors, path, metadata)
    with open(path, "rb+") as file:  # on the disk before the rename is, or a power cut leaves an empty file
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it is not a JSON object")
        return content
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None


def read_tensors(path: Path, device="cpu") -> Iterator:
    """(name, tensor) of a safetensors file, one at a time; a UserError when the file is cut off or damaged."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged or cut off ({error}).") from None


def load_model(folder: str | Path, device="cpu", dtype: torch.dtype | None = None) -> Transformer:
    """A model of a supported family from its Hugging Face folder, in evaluation mode."""
    folder = find_checkpoint(folder)
    config = Config.from_hf(read_json(folder / "config.json"))
    with torch.device("meta"):
        model = Transformer(config)
    want, found = dict(model.named_parameters()) | dict(model.named_buffers()), {}
    ours = {hf_name(n, config): n for n in want}
    for path in sorted(folder.glob("model*.safetensors")):  # one file, or the shards of a large model
        for name, tensor in read_tensors(path, device):
            name = ours.get(name, name.removeprefix("model."))
            if name not in want:
                if name == "lm_head.weight" and config.tie or name.endswith("rotary_emb.inv_freq"):
                    continue
                raise UserError(f"{path} holds a tensor {name!r} that its config.json has no place for.")
            if tensor.shape != want[name].shape:
                raise UserError(
                    f"{path}: {name} is {tuple(tensor.shape)}, and config.json says {tuple(want[name].shape)}."
                )
            found[name] = tensor.to(dtype or tensor.dtype)
    if missing := want.keys() - found.keys():
        raise UserError(f"{folder} lacks {len(missing)} tensors, {sorted(missing)[0]} among them.")
    model.load_state_dict(found, strict=False, assign=True)
    if config.tie and config.head == "lm":
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


def load_state(folder: str | Path) -> tuple[dict, dict]:
    """What a run needs to go on exactly: (optimizer tensors by name, JSON object)."""
    folder = find_checkpoint(folder) / "state"
    if not (folder / "state.json").is_file():
        raise UserError(f"{folder.parent} is a finished model without the state of its run: it cannot be resumed.")
    return dict(read_tensors(folder / "optimizer.safetensors")), read_json(folder / "state.json")


class Tokens:
    """One split of a data folder: windows of T tokens and the token after each.

    The text is a circle (the last document's end is followed by the first document), cut into windows anew in
    each epoch from a random starting point, and the windows come in a random order. Both depend on (seed, epoch)
    alone, so a position, the number of windows taken so far, says exactly what comes next, for any batch size
    and any number of ranks; and each token is a target once an epoch.
    """

    def __init__(self, folder: str | Path, split: str):
        self.folder, self.path = Path(folder), Path(folder) / f"{split}.bin"
        meta = read_json(self.folder / "meta.json")
        try:
            self.dtype, self.n = np.dtype(meta["dtype"]).newbyteorder("<"), meta["splits"][split]["tokens"]
            self.bytes, self.vocab_size, self.eot_id = meta["splits"][split]["bytes"], meta["vocab_size"], meta["eot_id"]
            self.file = open(self.path, "rb")
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder}/meta.json is not of a data folder ({error!r}): run tokenize.py prepare.") from None
        except OSError as error:
            raise UserError(f"{self.path} cannot be read ({error.strerror}): run tokenize.py prepare.") from None
        self.meta, self._order = meta, (None, None)
        size = os.fstat(self.file.fileno()).st_size
        if size != self.n * self.dtype.itemsize:
            raise UserError(
                f"{self.path} has {size} bytes where meta.json counts {self.n} tokens of {self.dtype.itemsize}: "
                "it is cut off; run tokenize.py prepare again."
            )
        if self.n < 2:
            raise UserError(f"{self.path} has {self.n} tokens, too few to predict one: prepare more text.")

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens [start, start + count) of the circle. Read, not mapped: a mapped file that shrinks underneath
        ends the process without a word."""
        start %= self.n
        head = min(count, self.n - start)
        self.file.seek(start * self.dtype.itemsize)
        ids = np.frombuffer(self.file.read(head * self.dtype.itemsize), dtype=self.dtype)
        if len(ids) < head:
            raise UserError(f"{self.path} became shorter while it was read: restore it, then --resume.")
        if ids.size and int(ids.max()) >= self.vocab_size:
            raise UserError(
                f"{self.path} holds token {int(ids.max())}, beyond the vocabulary of {self.vocab_size}: "
                "it was not made with this folder's tokenizer."
            )
        return ids if head == count else np.concatenate([ids, self.read(0, count - head)])

    def windows(self, T: int) -> int:
        """In an epoch."""
        return -(-self.n // T)

    def batch(self, position: int, count: int, T: int, seed: int = 0):
        """Windows number position .. position + count of the endless order -> inputs, targets (count, T) int64."""
        K = self.windows(T)
        x, y = np.empty((count, T), np.int64), np.full((count, T), IGNORE, np.int64)
        for row, (epoch, i) in enumerate(divmod(position + r, K) for r in range(count)):
            offset, order = self.order(epoch, T, seed)
            window = int(order[i])
            ids = self.read(offset + window * T, T + 1)
            valid = min(T, self.n - window * T)  # the last window runs on into the first: count its tokens once
            x[row], y[row, :valid] = ids[:-1], ids[1 : valid + 1]
        return torch.from_numpy(x), torch.from_numpy(y)

    def order(self, epoch: int, T: int, seed: int) -> tuple[int, np.ndarray]:
        key = (epoch, T, seed)
        if self._order[0] != key:
            rng = np.random.default_rng([seed, epoch])
            self._order = key, (int(rng.integers(T)), rng.permutation(self.windows(T)))
        return self._order[1]

    def in_order(self, T: int, B: int, limit: int | None = None, rank: int = 0, world: int = 1):
        """Batches of the text from its first token to its last, each a target once: (inputs, targets).

        limit: about how many tokens, as evenly spread windows; these are the same ones at every call. All batches
        have B rows and all ranks the same number of them (rows without a target fill up): a rank that has none left
        would let the others wait, and a batch of another size be compiled anew.
        """
        windows = np.arange(0, self.n - 1, T)
        if limit is not None and limit < self.n:
            windows = windows[np.linspace(0, len(windows) - 1, max(1, limit // T)).astype(int)]
        share = -(-len(windows) // world)
        windows, B = windows[rank::world], min(B, share)
        for i in range(0, share, B):
            starts = windows[i : i + B]
            x, y = np.full((B, T), self.eot_id, np.int64), np.full((B, T), IGNORE, np.int64)
            for row, start in enumerate(starts):
                ids = self.read(int(start), min(T + 1, self.n - int(start)))
                x[row, : len(ids) - 1], y[row, : len(ids) - 1] = ids[:-1], ids[1:]
            yield torch.from_numpy(x), torch.from_numpy(y)

    def documents(self, x):
        """Which document each token is of, counted within its row: (B, T) -> (B, T); its end belongs to it."""
        ends = (x == self.eot_id).int()
        return ends.cumsum(1) - ends

    @property
    def token_bytes(self) -> torch.Tensor:
        """Bytes of text that each id stands for (V,); 0 for special tokens, which nobody wrote."""
        if not hasattr(self, "_token_bytes"):
            tokenizer = load_tokenizer(self.folder)
            special = set(tokenizer.special.values())
            sizes = [0 if i in special else len(b) for i, b in enumerate(tokenizer.token_bytes)]
            self._token_bytes = torch.tensor(sizes)
        return self._token_bytes


class Mixture:
    """Several sources, each in its own seeded order, drawn by weight.

    `taken`, the windows of each source so far, is all that a run has to remember of its data.
    """

    def __init__(self, sources: list[Tokens], weights: list[float], seed: int):
        self.sources, self.seed = sources, seed
        self.share = np.array(weights) / sum(weights)

    def draw(self, step: int, count: int, taken: list[int]) -> tuple[list[tuple[int, int]], list[int]]:
        """The windows of a global batch, the same on all ranks: [(source, position in its order)], new `taken`."""
        rng = np.random.default_rng([self.seed, step])
        picks = rng.choice(len(self.share), count, p=self.share) if len(self.share) > 1 else np.zeros(count, int)
        plan, taken = [], list(taken)
        for source in picks.tolist():
            plan.append((source, taken[source]))
            taken[source] += 1
        return plan, taken

    def read(self, plan: list[tuple[int, int]], T: int):
        """-> inputs, targets (len(plan), T)."""
        rows = [self.sources[s].batch(position, 1, T, self.seed) for s, position in plan]
        return torch.cat([x for x, _ in rows]), torch.cat([y for _, y in rows])


def open_data(specs: tuple[str, ...]) -> tuple[list[Tokens], list[Tokens], list[float]]:
    """FOLDER or FOLDER:WEIGHT, several -> training splits, validation splits, weights."""
    train, val, weights = [], [], []
    for spec in specs:
        folder, colon, weight = spec.rpartition(":")
        if not colon or Path(spec).exists() or "/" in weight or "\\" in weight:  # no weight, or a drive's colon
            folder, weight = spec, "1"
        try:
            weights.append(float(weight))
        except ValueError:
            raise UserError(f"--data {spec}: {weight!r} is not a weight; write FOLDER or FOLDER:WEIGHT.") from None
        if not weights[-1] > 0:
            raise UserError(f"--data {spec}: a weight has to be above zero.")
        if not Path(folder).is_dir():
            raise UserError(f"There is no data folder {folder}: make one with `python tokenize.py prepare`.")
        train.append(Tokens(folder, "train"))
        val.append(Tokens(folder, "val"))
    texts = {(t.folder / "tokenizer.json").read_bytes() for t in train if (t.folder / "tokenizer.json").exists()}
    if len(texts) != 1:
        raise UserError("The data folders have different tokenizers (or none): prepare them with the same --tokenizer.")
    return train, val, weights


def fingerprint(sources: list[Tokens]) -> list:
    """Enough to notice that a data folder is not the one it was: sizes, files, tokenizer."""
    return [[t.n, t.meta.get("files_sha256"), seed_of((t.folder / "tokenizer.json").read_bytes())] for t in sources]


@torch.no_grad()
def evaluate(model, tokens: Tokens, T: int, B: int = 16, limit: int | None = None, forward: Callable | None = None,
             share: tuple[int, int] | None = None):
    """{"val_loss": nats per token, "val_bpb": bits per byte of text, "val_tokens"}; the same number in every chapter.

    forward: (inputs, targets) -> loss per token, the model's own by default. Sums over all ranks; share: which part
    of the text is this rank's, (rank, world) where ranks that split a model read the same.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    rank, world = share or rank_and_world()
    total = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    sizes = tokens.token_bytes
    for x, y in tokens.in_order(T, B, limit, rank, world):
        xd, yd = x.to(device), y.to(device)
        losses = forward(xd, yd) if forward else model(xd, yd)[0]
        real = y[y != IGNORE]
        total += torch.tensor([losses.cpu().double().sum().item(), len(real), sizes[real].sum()], dtype=torch.float64)
    if rank_and_world()[1] > 1:
        total = total.to(device)
        torch.distributed.all_reduce(total)
        total /= rank_and_world()[1] / world
    model.train(was_training)
    nats, count, size = total.tolist()
    return {"val_loss": nats / count, "val_bpb": nats / math.log(2) / max(size, 1), "val_tokens": int(count)}


# ------------------------------------------------------------------------------------------------------------
# Part III: the run
# ------------------------------------------------------------------------------------------------------------


def pick_device(name: str = "auto") -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"Device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of activations and matrix products. auto: bf16 where the machine multiplies it faster, else fp32."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name in named:
        return named[name]
    if name != "auto":
        raise UserError(f"--dtype is one of auto, {', '.join(named)}; not {name!r}.")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu":
        cpu = torch.cpu  # public names in 2.13, private ones before
        has = cpu.get_capabilities() if hasattr(cpu, "get_capabilities") else {}
        amx = has.get("amx_bf16") or getattr(cpu, "_is_amx_tile_supported", bool)()
        avx = has.get("avx512_bf16") or getattr(cpu, "_is_avx512_bf16_supported", bool)()
        return torch.bfloat16 if amx or avx else torch.float32
    return torch.float32


def synchronize(device: torch.device) -> None:
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.15, kept: str | Path = "") -> float:
    """FLOP/s of the best large matrix product on this machine, measured now: the denominator of MFU.

    kept: the file that `bench.py machine` writes; what it says is taken where it is of this hour and this machine.
    """
    with contextlib.suppress(OSError, ValueError, KeyError):
        facts = json.loads(Path(kept).read_text()) if kept else {}
        same = facts["device"] == device.type and facts["threads"] == torch.get_num_threads()
        if same and time.time() - Path(kept).stat().st_mtime < 3600:
            return facts["flops"][{torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]]
    n = 8192 if device.type == "cuda" else 256 if dtype == torch.float16 and device.type == "cpu" else 2048  # slow there
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    a @ b
    best, end = 0.0, time.perf_counter() + seconds
    while best == 0 or time.perf_counter() < end:
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


@dataclass
class Ranks:
    """Where this process stands among those that torchrun started; one of one without it."""

    rank: int = 0
    local_rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")


def setup_distributed(device: str = "auto", timeout: float = 600) -> Ranks:
    """Join the process group that torchrun's environment describes: NCCL for CUDA's tensors, gloo for the CPU's.

    timeout: seconds after which a rank that does not answer counts as dead."""
    if "RANK" not in os.environ:
        return Ranks(device=pick_device(device))
    if device == "auto" and not torch.cuda.is_available():
        device = "cpu"  # gloo moves no tensors of Apple's GPU
    rank, local, world = (int(os.environ[k]) for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(local)  # before the first tensor: else every rank opens a context on GPU 0
    picked = pick_device(device)
    if picked.type == "cuda":
        picked = torch.device("cuda", local)
    if not torch.distributed.is_initialized():
        options = {"timeout": datetime.timedelta(seconds=timeout)}
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        if attempt != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun's store still has the addresses of the processes before the restart: look elsewhere in it
            dist = torch.distributed
            store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), world, False)
            options |= {"store": dist.PrefixStore(f"attempt_{attempt}", store), "rank": rank, "world_size": world}
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo", **options)
    return Ranks(rank, local, world, picked)


def rank_and_world() -> tuple[int, int]:
    dist = torch.distributed
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


class Optimizer:
    """One or two of torch.optim's optimizers behind one face; its state is keyed by parameter name."""

    def __init__(self, named: dict[str, nn.Parameter], parts: list[torch.optim.Optimizer]):
        self.parts = parts
        self.names = {p: n for n, p in named.items()}

    def set_lr(self, lr: float) -> None:
        for group in (g for part in self.parts for g in part.param_groups):
            group["lr"] = lr * group["lr_scale"]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        """{"layers.0.mlp.up_proj.weight/exp_avg": tensor, ...}"""
        state = ((self.names[p], s) for part in self.parts for p, s in part.state.items())
        return {f"{name}/{key}": torch.as_tensor(v).cpu().contiguous() for name, s in state for key, v in s.items()}

    def load_state_dict(self, tensors: dict) -> None:
        for part in self.parts:
            for p in (p for group in part.param_groups for p in group["params"]):
                own = {k.rpartition("/")[2]: v for k, v in tensors.items() if k.rpartition("/")[0] == self.names[p]}
                part.state[p] = {k: v.to(p.device) for k, v in own.items()}  # fused: the step count too


def build_optimizer(
    model, name: str = "muon", lr: float = 1e-3, weight_decay: float = 0.1, betas=(0.9, 0.95), mup_base=None,
    stand_ins: dict | None = None,
):
    """AdamW on everything; or Muon on the layers' matrices (of experts one by one) and AdamW on the rest (embedding, norms,
    biases).

    Weight decay acts on matrices only. Muon's update is scaled to the root mean square of AdamW's
    (Liu et al. 2025, 2502.16982, eq. 4), so that one learning rate serves both. mup_base: the width at which lr was
    found; the steps of this width are scaled so that it stays the best one (see init_weights).
    stand_ins: {name: tensor to update in the parameter's place, or None where another rank does} (parallel.py).
    """
    if name not in ("adamw", "muon"):
        raise UserError(f"--optimizer is adamw or muon, not {name!r}.")
    m = model.config.n_embd / mup_base if mup_base else 1.0
    named = {n: p for n, p in model.named_parameters() if p.requires_grad} | (stand_ins or {})
    named = {n: p for n, p in named.items() if p is not None}
    hidden = [p for n, p in named.items() if p.dim() == 2 and n.startswith("layers.")]
    tables = [p for n, p in named.items() if p.dim() == 2 and not n.startswith("layers.")]
    vectors = [p for n, p in named.items() if p.dim() < 2 and n != "norm.weight"]
    assert all(p.dim() <= 2 for p in named.values()), "a tensor of three dimensions would be in no group"
    adamw = [
        {"params": tables, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": vectors, "weight_decay": 0.0, "lr_scale": 1.0},
        {"params": [p for n, p in named.items() if n == "norm.weight"], "weight_decay": 0.0, "lr_scale": 1 / m},
    ]
    parts = []
    if name == "adamw":
        adamw.append({"params": hidden, "weight_decay": weight_decay * m, "lr_scale": 1 / m})
    elif hidden:  # an orthogonal update times sqrt(width) is to be as large, as an operator, at every width
        group = {"params": hidden, "weight_decay": weight_decay * m**0.5, "lr_scale": m**-0.5}
        parts.append(torch.optim.Muon([group], lr, adjust_lr_fn="match_rms_adamw"))
    fused = next(model.parameters()).device.type in ("cpu", "cuda", "mps")
    if adamw := [g for g in adamw if g["params"]]:  # (with LoRA Muon may have them all)
        parts.append(torch.optim.AdamW(adamw, lr, betas, eps=1e-10, fused=fused))
    return Optimizer(named, parts)


def option(default, help: str):
    """A field of Options: its default and what --help says of it."""
    return dataclasses.field(default=default, metadata={"help": help})


@dataclass
class Options:
    """A run, as its checkpoint remembers it. None: derived (see `derive`), and then stored as what it became."""

    data: tuple[str, ...] = option(("data/python",), "Data folder, or FOLDER:WEIGHT; several times for a mixture.")
    out: str = option("out/python", "Checkpoint folder to write.")
    objective: str = option("clm", "clm: the next token. mlm: masked tokens, bidirectional.")
    init: str | None = option(None, "Start from the weights of this checkpoint folder (an upcycled one, say).")
    preset: str = option("micro", f"Size of the model: {', '.join(PRESETS)}.")
    n_layer: int | None = option(None, "Layers, instead of the preset's.")
    n_head: int | None = option(None, "Attention heads.")
    n_kv_head: int | None = option(None, "Key-value heads (a divisor of the heads).")
    n_embd: int | None = option(None, "Width; the feed-forward width follows in proportion.")
    seq_len: int | None = option(None, "Context in tokens.")
    n_expert: int = option(0, "Experts in each layer's feed-forward part (moe.py); 0: dense.")
    n_expert_active: int = option(2, "Experts that a token goes to.")
    n_expert_shared: int = option(0, "Experts that every token goes to, beside those.")
    expert_dim: int | None = option(None, "Width of an expert; so that a token costs what the dense model's does.")
    router: str = option("softmax", "softmax over the experts, or sigmoid of each.")
    balance: str = option("loss", "loss: Switch's auxiliary loss. bias: DeepSeek's, without one. none.")
    balance_rate: float | None = option(None, "Weight of that loss (0.01), or the bias's step (0.001).")
    z_loss: float = option(0.0, "Weight of the router's z-loss; 0.001 keeps its logits small.")
    capacity: float | None = option(None, "Most tokens of a sequence that an expert takes, in means; the rest is dropped.")
    max_steps: int = option(1000, "Optimizer steps.")
    tokens_per_step: int = option(4096, "Tokens of a step, over all ranks and micro-batches.")
    micro_batch: int | None = option(None, "Sequences at once on a device: memory and speed only.")
    batch_ramp: int = option(0, "Steps over which the batch grows from an eighth.")
    optimizer: str = option("muon", "muon (matrices; AdamW on the rest) or adamw.")
    lr: float = option(1e-2, "Peak learning rate; 2e-3 to 2e-2 with muon, 3e-4 to 3e-3 with adamw.")
    warmup_steps: int = option(30, "Steps of linear warm-up.")
    schedule: str = option("wsd", "wsd (stable, then a line down), cosine or constant.")
    min_lr: float = option(0.1, "Where the schedule ends, as a fraction of --lr.")
    weight_decay: float = option(0.1, "Of matrices only.")
    grad_clip: float = option(1.0, "Largest norm of the gradient.")
    dropout: float = option(0.0, "For data that is seen many times: 0.1 to 0.3.")
    mup_base: int | None = option(None, "Width at which --lr was found: scale it to this one (muP).")
    doc_mask: bool = option(False, "Tokens see their own document only.")
    dtype: str = option("auto", "auto, fp32, bf16 or fp16 (with loss scaling).")
    device: str = option("auto", "auto, cpu, cuda or mps.")
    compile: str = option("auto", "auto (when the run is long enough to win), on or off.")
    recompute: str = option("none", "block: keep only each block's input; none, selective.")
    eval_interval: int = option(250, "Steps between evaluations.")
    eval_tokens: int | None = option(100_000, "Validation tokens of each; 0: all. The last takes all.")
    save_interval: int = option(250, "Steps between checkpoints.")
    target_loss: float | None = option(None, "Stop at the first evaluation at or below it.")
    patience: int | None = option(None, "Stop after so many evaluations without a better one; kept in OUT-best.")
    noise_scale: bool = option(False, "Measure the critical batch size.")
    seed: int = option(0, "Of the weights and the order of the data.")


def run_command(main: Callable, leave_out: tuple[str, ...] = (), options: type = Options) -> Callable:
    """`main(given, ...)` as a typer command that also has the Options (but those left out) as its options.

    given: those that the user wrote, as Options takes them; what was left at its default is not in it.
    """
    import inspect
    from typing import Annotated, get_type_hints

    import typer

    types = get_type_hints(options)
    fields = [f for f in dataclasses.fields(options) if f.name not in leave_out]

    def command(ctx: typer.Context, **values):
        if ctx.invoked_subcommand:  # where this is the callback of a group of commands
            return None
        written = {k for k in values if ctx.get_parameter_source(k).name == "COMMANDLINE"}
        given = {f.name: values.pop(f.name) for f in fields}
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in written}
        if given.get("eval_tokens") == 0:
            given["eval_tokens"] = None
        return main(given, **values)

    def parameter(f):
        several = isinstance(f.default, tuple)
        kind, names = (list[str] if several else types[f.name]), ()
        if kind is bool:  # a flag, without its --no-
            names = (f"--{f.name.replace('_', '-')}",)
        default = list(f.default) if several else f.default
        note = Annotated[kind, typer.Option(*names, help=f.metadata["help"])]
        return inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=note)

    own = list(inspect.signature(main, eval_str=True).parameters.values())[1:]
    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context)
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
    command.__signature__ = inspect.Signature([context, *[parameter(f) for f in fields], *own])
    command.__annotations__ = {name: p.annotation for name, p in command.__signature__.parameters.items()}
    command.__doc__ = main.__doc__
    return command


def lr_at(step: int, max_steps: int, warmup_steps: int, schedule: str = "cosine", min_lr: float = 0.1) -> float:
    """The fraction of the peak learning rate at a step, 0-based; it ends at min_lr, a tenth by default.

    Warm-up is linear. Then cosine (Loshchilov & Hutter 2016, 1608.03983), or warm-up-stable-decay (Hu et al. 2024,
    2404.06395): constant, and in the last 40 % a straight line down. "constant" stays.

    >>> [round(lr_at(s, 100, 10), 2) for s in (0, 9, 55, 99)]
    [0.1, 1.0, 0.55, 0.1]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = (step - warmup_steps + 1) / max(1, max_steps - warmup_steps)  # in (0, 1]
    if schedule == "cosine":
        return min_lr + (1 - min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return min_lr + (1 - min_lr) * min(1.0, max(0.0, 1 - done) / 0.4)


def windows_at(step: int, full: int, ramp_steps: int, world: int = 1) -> int:
    """Sequences in a step: while the batch ramps, from an eighth up to all, in whole multiples of the ranks.

    >>> [windows_at(s, 64, 4) for s in range(6)]
    [8, 22, 36, 50, 64, 64]
    """
    if step >= ramp_steps:
        return full
    return max(1, int(full * (0.125 + 0.875 * step / ramp_steps)) // world) * world


def routing_record(aux, config: Config) -> dict:
    """What metrics.jsonl says of a step's routing: means over the layers with experts; {} where there are none."""
    if not config.moe:
        return {}
    aux = aux[[i for i in range(config.n_layer) if config.is_sparse(i)]].float().cpu()
    load = aux[:, len(AUX) - 1 :]
    record = {name: float(column) for name, column in zip(AUX, aux.mean(0), strict=False) if name != "load"}
    record |= {"aux_loss": float(aux[:, 0].sum()), "load_max": float((load.amax(1) / load.mean(1)).max())}
    return record | {"load": [[round(x, 4) for x in row] for row in load.tolist()]}


def make_config(o: Options, tokens: Tokens) -> Config:
    sized = ("n_layer", "n_head", "n_kv_head", "n_embd", "n_expert", "n_expert_shared", "expert_dim")
    if o.init:
        if given := [name for name in sized if getattr(o, name)]:
            raise UserError(f"--{given[0].replace('_', '-')} cannot be chosen: the sizes are those of --init {o.init}.")
        folder = find_checkpoint(o.init)
        if (folder / "tokenizer.json").read_bytes() != (tokens.folder / "tokenizer.json").read_bytes():
            raise UserError(f"{o.init} and {tokens.folder} have different tokenizers: prepare the text with the former's "
                            f"(tokenize.py prepare --tokenizer {o.init}/tokenizer.json).")  # fmt: skip
        config = Config.from_hf(read_json(folder / "config.json"))
        if config.causal != (o.objective == "clm"):
            raise UserError(f"{o.init} is a {'causal' if config.causal else 'masked'} model: --objective has to be its own.")
        return config.replace(seq_len=o.seq_len) if o.seq_len else config
    if not o.n_expert and not getattr(PRESETS.get(o.preset), "moe", None) and (o.n_expert_shared or o.expert_dim or o.capacity or o.z_loss):
        raise UserError("Options of a mixture need --n-expert, the number of experts.")
    if o.preset not in PRESETS:
        raise UserError(f"--preset is one of {', '.join(PRESETS)}; not {o.preset!r}.")
    config = PRESETS[o.preset]
    sizes = {k: getattr(o, k) for k in ("n_layer", "n_head", "n_kv_head", "n_embd", "seq_len")}
    sizes = {k: v for k, v in sizes.items() if v is not None}
    if "n_embd" in sizes:  # the other widths follow, in the preset's proportions
        if "n_head" not in sizes:
            sizes["n_head"] = max(1, sizes["n_embd"] // config.head_dim)
        if sizes["n_embd"] % sizes["n_head"]:
            raise UserError(f"A width of {sizes['n_embd']} does not divide into {sizes['n_head']} heads.")
        sizes["head_dim"] = sizes["n_embd"] // sizes["n_head"]
        sizes["ffn_dim"] = pad_vocab(round(sizes["n_embd"] * config.ffn_dim / config.n_embd), 32)
    if "n_head" in sizes:
        group = config.n_head // config.n_kv_head
        sizes.setdefault("n_kv_head", sizes["n_head"] // group if sizes["n_head"] % group == 0 else sizes["n_head"])
    if o.n_expert:
        width = o.expert_dim or max(8, round(sizes.get("ffn_dim", config.ffn_dim) / (o.n_expert_active + o.n_expert_shared)))
        sizes["moe"] = MoEConfig(o.n_expert, o.n_expert_active, width, o.n_expert_shared, score=o.router,
                                 bias=o.balance == "bias")  # fmt: skip
    special = load_tokenizer(tokens.folder).special
    return config.replace(
        vocab_size=pad_vocab(tokens.vocab_size), causal=o.objective == "clm", eos_id=tokens.eot_id,
        pad_id=special.get("<|pad|>"), **sizes,
    )  # fmt: skip


def derive(o: Options, config: Config, world: int, device: torch.device) -> None:
    """Check what a user can get wrong, and fill in what follows from the rest."""
    named = {"objective": ("clm", "mlm"), "schedule": ("cosine", "wsd", "constant"),
             "compile": ("auto", "on", "off"), "recompute": ("none", "block", "selective"),
             "balance": ("loss", "bias", "none"), "router": ("softmax", "sigmoid")}  # fmt: skip
    for name, allowed in named.items():
        if getattr(o, name) not in allowed:
            raise UserError(f"--{name} is one of {', '.join(allowed)}; not {getattr(o, name)!r}.")
    for name in ("max_steps", "eval_interval", "save_interval", "tokens_per_step", "lr", "grad_clip"):
        if getattr(o, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} has to be above zero.")
    if not 0 <= o.dropout < 1:
        raise UserError(f"--dropout {o.dropout} is not a share of the activations: 0 up to, not with, 1.")
    if config.moe and o.balance == "bias" and not config.moe.bias:
        raise UserError(f"--balance bias needs a router that has a bias, and that of {o.init or o.preset} has none: use --balance loss.")
    if o.capacity is not None and not o.capacity > 0:
        raise UserError("--capacity has to be above zero; 1.25 leaves a quarter of room over the mean.")
    if o.balance_rate is None:
        o.balance_rate = {"loss": 0.01, "bias": 0.001, "none": 0.0}[o.balance]
    windows = o.tokens_per_step // config.seq_len
    if windows == 0 or windows % world:
        near = config.seq_len * world * max(1, round(windows / world))
        raise UserError(
            f"--tokens-per-step {o.tokens_per_step} does not divide into sequences of {config.seq_len} on {world} "
            f"process{'es' * (world > 1)}: {near} does."
        )
    if o.micro_batch is None:  # a CPU is busy with 8k tokens; a GPU takes what its logits and activations allow
        o.micro_batch = max(1, (8192 if device.type == "cpu" else 32768) // config.seq_len)
    if o.compile == "auto":
        # Start-up is some 40 s, and what is won per step some 10 % on CPU, a third on CUDA: it has to be a long run.
        # Judged by operations, not by the clock, so that a resumed run decides the same.
        flops = config.flops_per_token() * o.tokens_per_step * o.max_steps
        o.compile = "on" if flops > {"cpu": 3e14, "cuda": 2e16}.get(device.type, math.inf) else "off"
    o.dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[pick_dtype(o.dtype, device)]


def resumed(folder: str, given: dict, state: dict | None = None, kind: type = Options) -> Options:
    """The options of a run to go on with, those given now on top where that keeps the run the same run."""
    state = state or load_state(folder)[1]
    if state["finished"] and given.get("max_steps", 0) <= state["at"]:
        raise UserError(f"{folder} is finished: there is nothing to resume (a larger --max-steps trains it further).")
    free = {"max_steps", "device", "micro_batch", "save_interval", "eval_interval", "eval_tokens", "target_loss",
            "patience", "noise_scale", "recompute", "micro_tokens"}  # fmt: skip
    kept = {k: tuple(v) if isinstance(v, list) else v for k, v in state["options"].items()}
    if state.get("stage", kind.__name__) != kind.__name__ or kept.keys() - {f.name for f in dataclasses.fields(kind)}:
        raise UserError(f"{folder} was made by another command: resume it with that one.")
    options = kind(**kept | {"out": folder})
    for name, value in given.items():
        if name in free:
            setattr(options, name, value)
        elif value != getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')} cannot change on --resume: start a run of its own (--out).")
    return options


def default_data(folder: str) -> None:
    """No data folder yet: let tokenize.py make the embedded one, as a command of its own."""
    say(f"No data in {folder}: preparing the sources of this Python (python tokenize.py prepare), once.")
    command = [sys.executable, str(Path(__file__).with_name("tokenize.py")), "prepare", "--output", folder]
    code = subprocess.run(command).returncode
    if code:
        raise UserError(f"tokenize.py prepare ended with exit code {code}; its words above say why.")


def check_out(out: Path, overwrite: bool) -> None:
    """Nothing that exists is lost: a run's folder needs --overwrite, anything else is never replaced."""
    is_run = (out / "config.json").exists() or Path(f"{out}.old").exists()
    if is_run and not overwrite:
        raise UserError(f"{out} holds a run already: --resume {out} goes on with it, --overwrite begins again.")
    if not is_run and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not a checkpoint folder: choose another --out.")


class Stopping:
    """Ctrl-C and SIGTERM ask the loop to save and end; a second Ctrl-C ends it at once."""

    def __init__(self):
        self.asked = False
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Log:
    """metrics.jsonl for programs, a progress bar for people; lines where there is no terminal."""

    def __init__(self, folder: Path, lines: list[str], steps: int, done: int, rank: int):
        self.path, self.lines, self.rank, self.file = folder / "metrics.jsonl", lines, rank, None
        self.shown, self.bar = time.perf_counter(), None
        if rank == 0 and console().is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = ("step", MofNCompleteColumn(), BarColumn(24), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Progress(*columns, console=console())
            self.task = self.bar.add_task("", total=steps, completed=done, text="")
            self.bar.start()
        self.steps = steps

    def open(self) -> None:
        """Continue the file in the checkpoint folder (a save has just put a new folder in its place)."""
        if self.rank == 0:
            self.file = self.guard(lambda: open(self.path, "a", encoding="utf-8"))

    def text(self) -> str:
        return "".join(line + "\n" for line in self.lines)

    def close(self) -> None:
        file, self.file = self.file, None
        if file:
            self.guard(file.close)

    def guard(self, write):
        try:
            return write()
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}).") from None

    def write(self, record: dict) -> None:
        if self.rank == 0:
            self.lines.append(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()}))
            self.guard(lambda: (self.file.write(self.lines[-1] + "\n"), self.file.flush()))

    def show(self, step: int, text: str, left: float) -> None:
        if self.bar:
            self.bar.update(self.task, completed=step, text=text)
        elif time.perf_counter() - self.shown > 10 or step == self.steps:
            say(f"step {step}/{self.steps}  {left / 60:.1f} min left  {text}")
            self.shown = time.perf_counter()

    def say(self, text: str) -> None:
        if self.rank == 0:
            (self.bar.console if self.bar else console()).print(text, highlight=False)

    def stop(self) -> None:
        self.close()
        if self.bar:
            self.bar.stop()
            self.bar = None


def say(message: str = "", **style) -> None:
    """To the terminal (standard error: standard output is for results), from rank 0 alone."""
    if int(os.environ.get("RANK", 0)) == 0:
        console().print(message, highlight=False, **style)


def console():
    from rich.console import Console  # a tenth of a second that a command with no words for people saves

    return Console(stderr=True, soft_wrap=True)


def run_app(app: Callable) -> None:
    """Run a typer app or command: a UserError is one sentence and exit code 2, Ctrl-C is 130, never a traceback."""
    code = 0
    try:
        app()
    except UserError as error:
        from rich.markup import escape

        say(f"[bold red]error:[/] {escape(str(error))}")
        code = 2
    except KeyboardInterrupt:
        code = 130
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            with contextlib.suppress(RuntimeError):
                torch.distributed.destroy_process_group()
    if code:
        sys.exit(code)
