"""A decoder-only transformer, the folder it lives in, and what every run of it needs.

Part I   the decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU; one mask, one cache, one loss per token.
Part II  the folder: a checkpoint *is* a Hugging Face folder; a data folder is a flat file of token ids.
Part III the run: devices, optimizers, evaluation, and errors that are one sentence.

The other scripts import this file and none of the others (tokenize.py stands without it: it needs no torch). One
door opens from here, and only when asked: `load_tokenizer` reads tokenize.py by its path. Left out: training loops
(train.py), sampling (sample.py).

    python -c "from model import *; m = Transformer(PRESETS['nano'].replace(vocab_size=256)); print(m)"

RoPE: Su et al. 2021 (2104.09864). GQA: Ainslie et al. 2023 (2305.13245). SwiGLU: Shazeer 2020 (2002.05202).
RMSNorm: Zhang & Sennrich 2019 (1910.07467). QK norm: Henry et al. 2020 (2010.04245). Muon: Jordan et al. 2024.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import shutil
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
# N = B*T tokens, L layers, W ranks.

IGNORE = -100  # a target that is not trained on, as in torch.nn.functional.cross_entropy


class UserError(Exception):
    """What a user can put right: one sentence that says how. Commands print it and exit with code 2."""


# ------------------------------------------------------------------------------------------------------------
# Part I: the decoder
# ------------------------------------------------------------------------------------------------------------


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
    eos_id: int | None = None
    pad_id: int | None = None

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
        name, family = next(((n, f) for n, f in FAMILIES.items() if f.fits(self)), ("OctavoForMaskedLM", None))
        hf = {key: getattr(self, ours) for ours, key in HF_KEYS.items()}
        hf |= {"architectures": [name], "model_type": family.model_type if family else "octavo"}
        hf |= {"hidden_act": "silu", "initializer_range": 0.02, "use_cache": True, "dtype": "float32"}
        hf |= {"rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta}}
        if not family:
            return hf | {"qk_norm": self.qk_norm, "qkv_bias": self.qkv_bias, "window": list(self.window),
                         "causal": self.causal}  # fmt: skip
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
        if isinstance(fields.get("eos_id"), list):
            fields["eos_id"] = fields["eos_id"][0]
        if ours:
            return Config(**fields, **{k: hf[k] for k in ("qk_norm", "qkv_bias", "causal")}, window=tuple(hf["window"]))
        family, n_layer, width = FAMILIES[arch], fields["n_layer"], hf.get("sliding_window")
        if hf.get("attention_bias") or hf.get("mlp_bias"):
            raise UserError(f"A {arch} with biases on every matrix is not supported yet.")
        full = min(n_layer, hf.get("max_window_layers", 28)) if family.layer_types else 0  # Qwen's older folders
        types = hf.get("layer_types") or ["full_attention"] * full + ["sliding_attention"] * (n_layer - full)
        sliding = width is not None and (not family.layer_types or hf.get("use_sliding_window", False))
        window = tuple(width if sliding and t == "sliding_attention" else None for t in types)
        return Config(**fields, qk_norm=family.qk_norm, qkv_bias=family.qkv_bias, window=window)

    @property
    def matrix_params(self) -> int:
        """Weights that multiply every token: the layers' matrices and the output matrix (the lookup is free)."""
        attn = self.n_embd * self.head_dim * (2 * self.n_head + 2 * self.n_kv_head)
        return self.n_layer * (attn + 3 * self.n_embd * self.ffn_dim) + self.vocab_size * self.n_embd

    def n_params(self) -> int:
        """All parameters, in closed form; a test holds it equal to the sum over the module."""
        norms = self.n_layer * (2 * self.n_embd + 2 * self.head_dim * self.qk_norm) + self.n_embd
        biases = self.n_layer * self.head_dim * (self.n_head + 2 * self.n_kv_head) * self.qkv_bias
        return self.matrix_params + norms + biases + (0 if self.tie else self.vocab_size * self.n_embd)

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


def pad_vocab(n: int, multiple: int = 64) -> int:
    """Rows of the embedding for n ids: a multiple of 64 keeps matrix kernels on whole tiles.

    >>> pad_vocab(76), pad_vocab(4096)
    (128, 4096)
    """
    return -(-n // multiple) * multiple


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

    @property
    def layer_types(self) -> bool:
        return self.window == "any"

    def fits(self, config: Config) -> bool:
        sizes = set(config.window)
        windows = {"none": sizes == {None}, "all": len(sizes) == 1 and None not in sizes,
                   "any": len(sizes - {None}) <= 1}[self.window]  # fmt: skip
        # Qwen2 derives head_dim from the width and does not read the key
        head = self.model_type != "qwen2" or config.head_dim * config.n_head == config.n_embd
        same = (self.qk_norm, self.qkv_bias) == (config.qk_norm, config.qkv_bias)
        return config.causal and same and windows and head


FAMILIES = {
    "LlamaForCausalLM": Family("llama"),
    "MistralForCausalLM": Family("mistral", window="all"),
    "Qwen2ForCausalLM": Family("qwen2", qkv_bias=True, window="any"),
    "Qwen3ForCausalLM": Family("qwen3", qk_norm=True, window="any"),
}

# Sizes by name. `nano` learns in a minute, `micro` in the ten minutes of the default run; `small` is GPT-2's.
PRESETS = {
    "nano": Config(n_layer=4, n_head=4, n_kv_head=4, n_embd=128, head_dim=32, ffn_dim=384, seq_len=128),
    "micro": Config(n_layer=4, n_head=3, n_kv_head=3, n_embd=192, head_dim=64, ffn_dim=512, seq_len=256),
    "mini": Config(n_layer=6, n_head=6, n_kv_head=6, n_embd=384, head_dim=64, ffn_dim=1024, seq_len=256),
    "small": Config(n_layer=12, n_head=12, n_kv_head=12, n_embd=768, head_dim=64, ffn_dim=2048, seq_len=1024),
    "medium": Config(n_layer=24, n_head=16, n_kv_head=8, n_embd=1024, head_dim=64, ffn_dim=2816, seq_len=1024),
    "1b": Config(n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, head_dim=64, ffn_dim=8192, seq_len=4096,
                 rope_theta=500_000.0),
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
        grad_weight = (grad * (x * r.to(x.dtype))).flatten(0, -2).sum(0, dtype=torch.float32)
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


def visible(q_pos, k_pos, q_doc=None, k_doc=None, *, causal=True, window=None):
    """THE mask: may the query at q_pos look at the key at k_pos?

    q_pos (..., T), k_pos (..., S) -> bool (..., T, S), True = visible. A slot at position -1 is empty.

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
        mask = mask & (q_doc.unsqueeze(-1) == k_doc.unsqueeze(-2))
    return mask


CPU_SHORT = 512  # keys up to which a CPU does attention as plain matrix products: half the time of its flash kernel


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v: the one place that picks a kernel.

    q (B, H, T, D), k and v (B, K, S, D) with K dividing H; mask None (all), "causal" or bool (B or 1, T, S).
    """
    gqa = q.shape[1] != k.shape[1]
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and 1 < q.shape[2] and k.shape[2] <= CPU_SHORT:
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
            bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)  # (B or 1, T, S)
            bias = bias[:, None, None].expand(B, K, G, T, S).reshape(B * K, G * T, S)
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
        grad_s = p * (grad_p - (grad_p * p).sum(-1, keepdim=True)) * D**-0.5
        grad_q, grad_k = torch.bmm(grad_s, k), torch.bmm(grad_s.transpose(1, 2), q)
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

    def forward(self, x, cos, sin, mask=None, cache: Cache | None = None):
        B, T, _ = x.shape
        # -1, not H: under tensor parallelism a rank's projections return its share of the heads
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim))  # (B, T, H, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim))  # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, D)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D)
        y = attend(q, k, v, mask)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (2002.05202, eq. 6)."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = Linear(config.n_embd, config.ffn_dim, bias=False)
        self.up_proj = Linear(config.n_embd, config.ffn_dim, bias=False)
        self.down_proj = Linear(config.ffn_dim, config.n_embd, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.n_embd, config.norm_eps)
        self.mlp = MLP(config)
        self.dropout = 0.0  # set by Transformer.set_dropout

    def forward(self, x, aux, cos, sin, mask=None, cache=None):
        x = x + drop(self.self_attn(self.input_layernorm(x), cos, sin, mask, cache), self.dropout, self.training)
        x = x + drop(self.mlp(self.post_attention_layernorm(x)), self.dropout, self.training)
        return x, aux  # aux: losses of the layers so far (a mixture's balance), passed on and never kept in self


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
        if self.first or config.tie and self.last:
            self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in layers})
        if self.last:
            self.norm = RMSNorm(config.n_embd, config.norm_eps)
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
            if config.tie:
                self.lm_head.weight = self.embed_tokens.weight

    def forward(self, x, targets=None, *, positions=None, doc_ids=None, cache=None, aux=None, output="logits"):
        """ids (B, T), or hidden (B, T, C) on a later stage -> (result, aux).

        targets (B, T)  given: the result is the loss PER TOKEN (B, T) in nats, float32, 0 where IGNORE
        positions       (T,) consecutive or (B, T) any, 0.. by default (with a cache: from its end); -1 is padding
        doc_ids (B, T)  tokens of different documents do not see each other
        output          "logits" (B, T, V) | "last" (B, 1, V): the last position's | "hidden" (B, T, C)
        aux             the earlier stage's auxiliary losses; a scalar, zero for a dense model
        """
        B, T = x.shape[:2]
        if positions is None:
            start = cache.n if cache is not None else 0
            positions = torch.arange(start, start + T, device=x.device)
        if cache is not None:
            if doc_ids is not None:
                raise ValueError("a cache holds one document a row: give doc_ids or a cache, not both")
            cache.claim(positions)
        masks = self.masks(positions, doc_ids, cache, T)
        if self.first:
            x = self.embed_tokens(x)  # (B, T, C)
        x = x.to(self.compute_dtype or x.dtype)
        cos, sin = (a.to(x.dtype) for a in rope_angles(positions, self.config.head_dim, self.config.rope_theta))
        aux = x.new_zeros((), dtype=torch.float32) if aux is None else aux
        for i, block in self.layers.items():
            args = (x, aux, cos, sin, masks[self.config.window[int(i)]], cache)
            x, aux = self.remember(block, *args)
        if not self.last:
            return x, aux
        x = self.norm(x[:, -1:] if output == "last" else x)
        if output == "hidden":
            return x, aux
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

    def masks(self, positions, doc_ids, cache, T) -> dict:
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
            k_pos = positions if cache is None else cache.positions[:, : cache.n]
            mask = visible(positions, k_pos, doc_ids, doc_ids, causal=self.config.causal, window=window)
            if positions.dim() == 2:  # a row of padding sees nothing, and a softmax over nothing is NaN: let it see all
                mask = mask | (positions < 0).unsqueeze(-1)
            full[window] = mask if mask.dim() == 3 else mask.unsqueeze(0)  # (B or 1, T, S)
        return full

    def set_dropout(self, p: float) -> None:
        for block in self.layers.values():
            block.dropout = p

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
            p.copy_(torch.randn(p.shape, generator=generator) * std)
        if mup_base and self.last:
            self.norm.weight.fill_(mup_base / self.config.n_embd)
        return self


def seed_of(*parts) -> int:
    """A 63-bit seed from anything printable, the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


CHUNK_LOGITS = 2**22  # logits that stand in memory at once: 16 MB of float32, about what a CPU's cache holds
KEEP_LOGITS = 2**27  # beyond this many in all, they are computed again in the backward pass instead of kept


def token_losses(hidden, head: nn.Module, targets, V: int):
    """-log p(target) of each token: (B, T, C), (B, T) -> (B, T) float32, 0 where the target is IGNORE.

    In chunks of tokens, so that the (N, V) logits of a large vocabulary never stand in memory at once.
    """
    x, t = hidden.flatten(0, 1), targets.flatten()
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

    Preallocated for `slots` tokens a sequence. A slot whose position is -1 (padding, or never written) is
    invisible, so prompts of unequal length share a batch: pad on either side, give the pads position -1.
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
        T = positions.shape[-1]
        if self.n + T > self.positions.shape[1]:
            raise UserError(f"{self.n + T} tokens do not fit a cache of {self.positions.shape[1]}: ask for fewer.")
        self.positions[:, self.n : self.n + T] = positions
        self.ragged |= positions.dim() > 1
        self.n += T

    def update(self, layer: int, k, v):
        """Write one layer's keys and values (B, K, T, D) into the claimed slots; all so far (B, K, S, D)."""
        start = self.n - k.shape[2]
        self.k[layer, :, :, start : self.n] = k
        self.v[layer, :, :, start : self.n] = v
        return self.k[layer, :, :, : self.n], self.v[layer, :, :, : self.n]

    def rewind(self, n: int) -> None:
        """Forget all but the first n slots (a rejected draft, a turn taken back)."""
        self.positions[:, n:] = -1
        self.n = n

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes


@torch.inference_mode()
def generate(model, prompts: list[list[int]], max_new_tokens: int, pick: Callable | None = None, eos_id=None):
    """Continue each prompt: plain, batched, cached. -> the new ids of each, up to and with eos_id.

    pick: logits (B, V) -> ids (B,), greedy by default; sample.py has the others. Prompts are padded on the left
    with position -1, so every row's next token is in the same slot; positions, not slots, are what counts.
    """
    model.eval()
    if not prompts or not all(prompts):
        raise UserError("A prompt needs at least one token: begin with the end-of-text token.")
    device = next(model.parameters()).device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    B, T = len(prompts), int(lengths.max())
    ids = torch.tensor([[p[0]] * (T - len(p)) + p for p in prompts], device=device)
    pads = T - lengths  # (B,)
    positions = torch.arange(T, device=device) - pads[:, None]  # pads come out negative
    positions = positions.clamp(min=-1) if pads.any() else positions[0]
    dtype = model.compute_dtype or next(model.parameters()).dtype
    cache = Cache(model.config, B, T + max_new_tokens, device, dtype)
    out, done = [[] for _ in prompts], [False] * B
    for _ in range(max_new_tokens):
        logits, _ = model(ids, positions=positions, cache=cache, output="last")
        ids = (pick or greedy)(logits[:, -1].float())[:, None]  # (B, 1)
        positions = positions[..., -1:] + 1
        for row, token in enumerate(ids[:, 0].tolist()):
            if not done[row]:
                out[row].append(token)
                done[row] = token == eos_id
        if all(done):
            break
    return out


def greedy(logits):  # (B, V) -> (B,)
    return logits.argmax(-1)


# ------------------------------------------------------------------------------------------------------------
# Part II: the folders
# ------------------------------------------------------------------------------------------------------------

CHAT_TEMPLATE = (  # ChatML
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


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
    raise UserError(f"{folder} holds no checkpoint (config.json and model.safetensors): train one with train.py.")


def save_checkpoint(folder: str | Path, model, tokenizer: str | Path, *, state=None, metrics: str = "") -> None:
    """Write a Hugging Face folder beside `folder`, then put it in its place: a kill leaves a whole one.

    tokenizer: the tokenizer.json to carry along. state: (tensors by name, JSON object) of a run that can go on.
    """
    folder = Path(folder)
    new, old = Path(f"{folder}.new"), Path(f"{folder}.old")
    shutil.rmtree(new, ignore_errors=True)
    config = model.config
    weights = {hf_name(n): p.detach().cpu().contiguous() for n, p in model.state_dict().items()}
    if config.tie:
        weights.pop("lm_head.weight")
    text = {
        "config.json": config.to_hf(),
        "generation_config.json": {"eos_token_id": config.eos_id, "pad_token_id": config.pad_id,
                                   "do_sample": True, "temperature": 0.7, "top_p": 0.9},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>",
                                  "pad_token": "<|pad|>", "mask_token": "<|mask|>",
                                  "model_max_length": config.seq_len, "clean_up_tokenization_spaces": False,
                                  "chat_template": CHAT_TEMPLATE},
    }  # fmt: skip
    try:
        new.mkdir(parents=True)
        save_tensors(new / "model.safetensors", weights, {"format": "pt"})
        for name, content in text.items():
            write_text(new / name, json.dumps(content, indent=2) + "\n")
        write_text(new / "tokenizer.json", Path(tokenizer).read_text(encoding="utf-8"))
        write_text(new / "metrics.jsonl", metrics)
        if state is not None:
            (new / "state").mkdir()
            save_tensors(new / "state" / "optimizer.safetensors", state[0])
            write_text(new / "state" / "state.json", json.dumps(state[1], indent=1) + "\n")
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


def hf_name(name: str) -> str:
    """layers.0.mlp.up_proj.weight -> model.layers.0.mlp.up_proj.weight; the heads stand outside of `model`."""
    return name if name.startswith("lm_head.") else f"model.{name}"


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
    want, found = dict(model.named_parameters()), {}
    for path in sorted(folder.glob("model*.safetensors")):  # one file, or the shards of a large model
        for name, tensor in read_tensors(path, device):
            name = name.removeprefix("model.")
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
    if config.tie:
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


@torch.no_grad()
def evaluate(model, tokens: Tokens, T: int, B: int = 16, limit: int | None = None, forward: Callable | None = None):
    """{"val_loss": nats per token, "val_bpb": bits per byte of text, "val_tokens"}; the same number in every chapter.

    forward: (inputs, targets) -> loss per token, the model's own by default. Sums over all ranks.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    rank, world = rank_and_world()
    total = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    sizes = tokens.token_bytes
    for x, y in tokens.in_order(T, B, limit, rank, world):
        xd, yd = x.to(device), y.to(device)
        losses = forward(xd, yd) if forward else model(xd, yd)[0]
        real = y[y != IGNORE]
        total += torch.tensor([losses.cpu().double().sum().item(), len(real), sizes[real].sum()], dtype=torch.float64)
    if world > 1:
        total = total.to(device)
        torch.distributed.all_reduce(total)
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


def setup_distributed(device: str = "auto") -> Ranks:
    """Join the process group that torchrun's environment describes: NCCL on CUDA, else gloo."""
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
        torch.distributed.init_process_group("nccl" if picked.type == "cuda" else "gloo")
    return Ranks(rank, local, world, picked)


def rank_and_world() -> tuple[int, int]:
    dist = torch.distributed
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


class Optimizer:
    """One or two of torch.optim's optimizers behind one face; its state is keyed by parameter name."""

    def __init__(self, model: nn.Module, parts: list[torch.optim.Optimizer]):
        self.parts = parts
        self.names = {p: n for n, p in model.named_parameters()}

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
    model, name: str = "muon", lr: float = 1e-3, weight_decay: float = 0.1, betas=(0.9, 0.95), mup_base=None
):
    """AdamW on everything; or Muon on the layers' matrices and AdamW on the rest (embedding, norms, biases).

    Weight decay acts on matrices only. Muon's update is scaled to the root mean square of AdamW's
    (Liu et al. 2025, 2502.16982, eq. 4), so that one learning rate serves both. mup_base: the width at which lr was
    found; the steps of this width are scaled so that it stays the best one (see init_weights).
    """
    if name not in ("adamw", "muon"):
        raise UserError(f"--optimizer is adamw or muon, not {name!r}.")
    m = model.config.n_embd / mup_base if mup_base else 1.0
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
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
    parts.append(torch.optim.AdamW([g for g in adamw if g["params"]], lr, betas, eps=1e-10, fused=fused))
    return Optimizer(model, parts)


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
