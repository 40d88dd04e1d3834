"""The decoder, the folder it lives in, and what surrounds every run.

Part I    the decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU; one mask, one cache, one loss a token;
          then what other open families have in their place: further positions, norms, latent attention.
Part II   the folders: a checkpoint *is* a Hugging Face folder; a data folder is a flat file of token ids.
Part III  the run: devices, optimizer, options, the loop around a step, errors that are one sentence.
Part IV   the same, faster on a CPU.

The other scripts import this file and none of the others. Two doors open from here, and only when asked:
`load_tokenizer` to tokenize.py and `load_moe` to moe.py. Left out: the steps of training (train.py,
parallel.py, align.py) and sampling (sample.py).

    python -c "from model import *; print(Transformer(PRESETS['nano'].replace(vocab_size=256)))"

RoPE: Su et al. 2021 (2104.09864). GQA: Ainslie et al. 2023 (2305.13245). SwiGLU: Shazeer 2020 (2002.05202).
RMSNorm: Zhang & Sennrich 2019 (1910.07467). QK norm: after Henry et al. 2020 (2010.04245), as Qwen3
has it. Muon: Jordan 2024.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

if "OMP_WAIT_POLICY" not in os.environ:  # idle threads spin for a moment, not for long: see RESULTS.md
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # GCC's OpenMP (Linux)
    os.environ.setdefault("KMP_BLOCKTIME", "1")  # LLVM's and Intel's (macOS, Windows), in milliseconds
START = time.perf_counter()  # before torch is imported, which is part of what a run costs

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import typer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

# B batch, T query length, S key length, C n_embd, V vocabulary, H heads, K KV heads, D head_dim, I ffn_dim,
# N = B*T tokens, L layers, E experts.

IGNORE = -100  # a target that is not trained on, as in torch.nn.functional.cross_entropy

class UserError(Exception):
    """Say in one sentence what a user can put right; commands print it and exit with code 2."""

def check(ok, sentence: str) -> None:
    """Raise a UserError with this sentence unless ok."""
    if not ok:
        raise UserError(sentence)


# ------------------------------------------------------------------------------------------------------------
# Part I: the decoder
# ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    """Hold the sizes and choices that make a model; `config_to_hf` knows Hugging Face's names for them."""

    vocab_size: int = 0  # padded to a multiple of 64
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
    window: tuple[int | None, ...] = ()  # of each layer: a token sees so many, itself included; (): all
    causal: bool = True  # False: every token sees every other (masked language modelling)
    tie: bool = True  # the output matrix is the embedding
    head: str = "lm"  # or "score": one number a token, for a reward model or a critic
    eos_id: int | tuple[int, ...] | None = None  # one id that ends a text, or several
    pad_id: int | None = None
    # what sets the open families apart: see FAMILIES
    position: str = "rope"  # or "learned" (a vector a place), "alibi" (a penalty for distance), "none"
    rope_scaling: dict = ()  # as config.json has it (see `slow_down`); kept as pairs, which can be hashed
    rope_dim: int | None = None  # so many numbers of a head are rotated; None: all
    rope_local_theta: float | None = None  # of the layers that have a window, without rope_scaling
    global_tokens: int = 0  # so many first tokens of a text stay visible beyond any window
    norm: str = "rms"  # or "layer": LayerNorm, with a bias
    norm_plus_one: bool = False  # RMSNorm multiplies by 1 + weight
    post_norm: bool = False  # further norms behind attention and behind the feed-forward network
    parallel_block: bool = False  # attention and feed-forward network read the same norm and are added
    act: str = "silu"  # see ACTIVATIONS
    gated: bool = True  # False: a feed-forward network of two matrices, down(act(up))
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    scale_embedding: bool = False  # by sqrt(n_embd)
    attn_scalar: float | None = None  # scores are divided by its root; None: of head_dim
    attn_cap: float | None = None  # scores s become cap * tanh(s / cap)
    logit_cap: float | None = None
    kv_rank: int | None = None  # multi-head latent attention: the width of what is cached of a token
    q_rank: int | None = None  # None: queries are made in one step
    nope_dim: int = 0  # of a latent head's key, not rotated; with rope_dim it makes up head_dim
    v_dim: int = 0  # width of a latent head's value
    # experts in the place of the feed-forward networks: see moe.py
    n_expert: int = 0  # 0: every layer is dense
    n_expert_active: int = 2  # experts that a token goes to
    n_expert_shared: int = 0  # experts that every token goes to, as one network so many times as wide
    shared_gate: bool = False  # their output is multiplied by sigmoid(w . x)
    expert_dim: int = 512  # feed-forward width of one expert
    dense_layers: tuple[int, ...] = ()  # layers that keep a network without experts
    router: str = "softmax"  # over all experts, or "sigmoid" of each
    router_normalize: bool = True  # the weights of the chosen experts add up to one
    router_scale: float = 1.0  # of the experts' sum, beside the shared ones
    router_bias: bool = False  # added to the scores for the choice only: DeepSeek-V3's balance without a loss
    n_group: int = 1  # experts stand in groups; a token's best `topk_group` groups are open to it
    topk_group: int = 1
    # training only: a checkpoint does not carry these
    dropout: float = 0.0
    balance: str = "loss"  # what spreads tokens over experts: Switch's "loss", DeepSeek's "bias", or "none"
    balance_rate: float | None = None  # weight of that loss (0.01), or a step of the bias (0.001)
    z_loss: float = 0.0  # weight of the router's z-loss; 0.001 keeps its logits small
    capacity: float | None = None  # tokens of a sequence that an expert takes at most, in means

    def __post_init__(self):
        for name, value in checked_fields(self).items():
            object.__setattr__(self, name, value)

    def replace(self, **changes) -> "Config":
        return dataclasses.replace(self, **changes)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Give the window of each layer; None where it sees all."""
        return self.window or (None,) * self.n_layer

    @property
    def eos_ids(self) -> set[int]:
        """Give all ids that end a text."""
        return set(self.eos_id) if isinstance(self.eos_id, tuple) else {self.eos_id} - {None}

    @property
    def cached(self) -> tuple[int, int, int]:
        """Give what a layer keeps of a token: heads, and the widths of a head's two parts, key and value."""
        latent = (1, self.kv_rank, self.rope_dim)  # MLA: what keys and values are made of, and a key's rest
        return latent if self.kv_rank else (self.n_kv_head, self.head_dim, self.head_dim)

    @property
    def rereads_at(self) -> int | None:
        """Give the place from which on LongRoPE rotates all keys otherwise: a cache has to be filled anew."""
        how = dict(self.rope_scaling)
        return how["original_max_position_embeddings"] if how.get("rope_type") == "longrope" else None

    def is_local(self, layer: int) -> bool:
        """Tell whether a layer rotates by a theta of its own, as those with a window do in Gemma 3."""
        return self.rope_local_theta is not None and self.windows[layer] is not None

    def is_sparse(self, layer: int) -> bool:
        return self.n_expert > 0 and layer not in self.dense_layers

class Linear(nn.Linear):
    """Keep a matrix in the precision of training (float32) and multiply in the precision of the input."""

    def forward(self, x):  # (..., in) -> (..., out)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if is_compiled_row(x):
            return multiply_row(x, self.weight, bias)
        return F.linear(x, self.weight.to(x.dtype), bias)

class RMSNorm(nn.Module):
    """Compute x / sqrt(mean(x^2) + eps) * weight over the last dimension (1910.07467, eq. 4)."""

    def __init__(self, dim: int, eps: float, plus_one: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.plus_one = plus_one  # Gemma's way: the weight is what is added to one

    def forward(self, x):
        if self.plus_one:
            return F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight.float(), self.eps).to(x.dtype)
        weight = self.weight.to(x.dtype)
        if x.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return RMSNormCPU.apply(x, weight, self.eps)
        return F.rms_norm(x, weight.shape, weight, self.eps)

def rope_angles(positions, frequencies, factor: float = 1.0):
    """Compute cos and sin of position * frequency for each pair (2104.09864, eq. 15).

    positions (T,) or (B, T), (R/2,) -> two (..., T, 1, R/2), float32: bfloat16 would be off by 256 at 1e5.
    """
    angles = positions.float().unsqueeze(-1) * frequencies
    cos, sin = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)
    return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)

def apply_rope(x, cos, sin):  # (B, T, H, D) -> (B, T, H, D)
    """Rotate the pairs (x_i, x_{i+R/2}) by their angles, in float32 (2104.09864, eq. 34).

    The first R numbers of a head are rotated, all of them in most families. Hugging Face pairs the halves,
    the paper neighbours: the same but for the order of q's and k's rows.
    """
    R = 2 * cos.shape[-1]
    a, b = x[..., :R].chunk(2, dim=-1)
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return rotated if R == x.shape[-1] else torch.cat((rotated, x[..., R:]), dim=-1)

def visible(q_pos, k_pos, q_doc=None, k_doc=None, q_trunk=None, *, causal=True, window=None, n_global=0):
    """Decide THE mask: may the query at q_pos look at the key at k_pos?

    q_pos (..., T), k_pos (..., S) -> bool (..., T, S). A slot at position -1 is empty. With documents a query
    sees the keys of its own, and of its trunk: a document that several others go on from. The first n_global
    tokens are seen beyond the window, too.

    >>> visible(torch.arange(3), torch.arange(3), window=2).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    distance = q_pos.unsqueeze(-1) - k_pos.unsqueeze(-2)
    mask = (k_pos >= 0).unsqueeze(-2).expand(distance.shape)
    if causal:
        mask = mask & (distance >= 0)
    if window is not None:
        near = (distance < window) & (distance > -window)
        mask = mask & (near if not n_global else near | (k_pos < n_global).unsqueeze(-2))
    if q_doc is not None:
        same = q_doc.unsqueeze(-1) == k_doc.unsqueeze(-2)
        if q_trunk is not None:
            same = same | (q_trunk.unsqueeze(-1) == k_doc.unsqueeze(-2))
        mask = mask & same
    return mask

def attend(q, k, v, mask=None, scale=None, cap=None):
    """Compute softmax(q k^T * scale) v: the one place that picks a kernel.

    q (B, H, T, D), k (B, K, S, D) and v (B, K, S, E) with K dividing H -> (B, H, T, E). mask: None (all),
    "causal", bool (B or 1, T, S), or float (B or 1, H, T, S), which is added. scale: D^-0.5 unless given.
    """
    if isinstance(mask, list):
        return attend_pieces(q, k, v, mask, scale, cap)
    if cap is not None:
        return attend_capped(q, k, v, mask, scale or q.shape[-1] ** -0.5, cap)
    added = isinstance(mask, torch.Tensor) and mask.dim() == 4
    if q.shape[2] == 1 and is_compiled_on_cpu(q) and isinstance(mask, torch.Tensor) and not added:
        return attend_compiled(q, k, v, mask, scale or q.shape[-1] ** -0.5)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not added and takes_plain_products(q, k, v):
        return attend_on_cpu(q, k, v, mask, scale or q.shape[-1] ** -0.5)
    gqa = q.shape[1] != k.shape[1]
    if gqa and isinstance(mask, torch.Tensor) and q.is_cuda:  # its fast kernel with a mask knows no groups
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if isinstance(mask, str):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    if mask is not None:
        mask = mask.to(q.dtype) if added else mask.unsqueeze(1)  # (B or 1, 1 or H, T, S)
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=gqa)

class Attention(nn.Module):
    """Let each token read earlier ones: H query heads share K heads of keys and values (2305.13245)."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = D = config.head_dim
        C, H, K = config.n_embd, config.n_head, config.n_kv_head
        self.scale = None if config.attn_scalar is None else config.attn_scalar**-0.5
        self.cap = config.attn_cap
        self.q_proj = Linear(C, H * D, bias=config.qkv_bias)
        self.k_proj = Linear(C, K * D, bias=config.qkv_bias)
        self.v_proj = Linear(C, K * D, bias=config.qkv_bias)
        self.o_proj = Linear(H * D, C, bias=config.o_bias)
        self.q_norm = make_norm(config, D) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, D) if config.qk_norm else nn.Identity()

    def forward(self, x, cos, sin, mask=None, cache=None):
        B, T, _ = x.shape
        # -1, not H: under tensor parallelism a rank's projections return its share of the heads
        q = self.q_norm(self.q_proj(x).view(B, T, -1, self.head_dim))  # (B, T, H, D)
        k = self.k_norm(self.k_proj(x).view(B, T, -1, self.head_dim))  # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        if cos is not None:
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, T, D), (B, K, T, D) twice
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D)
        y = attend(q, k, v, mask, self.scale, self.cap)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)

class MLP(nn.Module):
    """Compute SwiGLU, down(silu(gate(x)) * up(x)) (2002.05202, eq. 6), or down(act(up(x))) without a gate."""

    def __init__(self, config: Config, width: int):
        super().__init__()
        self.act = ACTIVATIONS[config.act]
        self.gate_proj = Linear(config.n_embd, width, bias=config.mlp_bias) if config.gated else None
        self.up_proj = Linear(config.n_embd, width, bias=config.mlp_bias)
        self.down_proj = Linear(width, config.n_embd, bias=config.mlp_bias)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(self.act(self.up_proj(x)))
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))

# Columns of `aux`, a row for each layer: what it adds to the loss, and what its router did; then E loads.
AUX = ("aux_loss", "balance_loss", "z_loss", "dropped", "router_entropy")

class Block(nn.Module):
    """Add to the residual stream what attention finds, then what the feed-forward network makes of it."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.sparse = config.is_sparse(layer)
        self.dropout = config.dropout
        self.parallel = config.parallel_block
        self.input_layernorm = make_norm(config, config.n_embd)
        self.self_attn = (LatentAttention if config.kv_rank else Attention)(config, layer)
        if not self.parallel:
            self.post_attention_layernorm = make_norm(config, config.n_embd)
        self.mlp = load_moe().MoE(config) if self.sparse else MLP(config, config.ffn_dim)
        self.attn_out_norm = make_norm(config, config.n_embd) if config.post_norm else nn.Identity()
        self.mlp_out_norm = make_norm(config, config.n_embd) if config.post_norm else nn.Identity()

    def forward(self, x, aux, cos, sin, mask=None, cache=None, dtype=None):
        """dtype: of the products; the residual stream x keeps its own, float32 in training."""
        read = self.input_layernorm(x).to(dtype)
        y = self.attn_out_norm(self.self_attn(read, cos, sin, mask, cache))
        x = x + drop(y, self.dropout, self.training)
        y = self.mlp(read if self.parallel else self.post_attention_layernorm(x).to(dtype))
        if self.sparse:
            y, row = y
            # a new tensor, nothing written in place: a block that is computed again would write twice
            aux = torch.cat((aux[: self.layer], row[None], aux[self.layer + 1 :]))
        return x + drop(self.mlp_out_norm(y), self.dropout, self.training), aux

class Transformer(nn.Module):
    """Hold the decoder. Modules carry Hugging Face's names, so a checkpoint needs no renaming.

    layers: the ones to build (a pipeline stage is the same class with some); all by default. The embedding
    lives where layer 0 is, the last norm and the output matrix where the last layer is.
    """

    def __init__(self, config: Config, layers: range | None = None):
        super().__init__()
        if config.n_expert:
            load_moe().check_experts(config)
        layers = range(config.n_layer) if layers is None else layers
        self.config = config
        self.first = 0 in layers
        self.last = config.n_layer - 1 in layers
        self.compute_dtype: torch.dtype | None = None  # of products; None: as the parameters
        self.recompute = False  # keep only each block's input, and compute the rest again
        if self.first or (config.tie and self.last and config.head == "lm"):
            self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        if self.first and config.position == "learned":
            self.embed_positions = nn.Embedding(config.seq_len, config.n_embd)
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in layers})
        if not self.last:
            return
        self.norm = make_norm(config, config.n_embd)
        if config.head == "score":
            self.score = Linear(config.n_embd, 1, bias=False)
            return
        self.lm_head = Head(config)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the output matrix the embedding where the config says so."""
        if self.config.tie and self.config.head == "lm" and self.last:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, x, targets=None, *, positions=None, doc_ids=None, trunk_ids=None, at=None, cache=None,
                aux=None, output="logits"):
        """Read ids (B, T), or hidden (B, T, C) on a later stage -> (result, aux).

        targets (B, T)  given: the result is the loss PER TOKEN (B, T) in nats, float32, 0 where IGNORE
        positions       (T,) consecutive or (B, T) any; by default from 0, or a cache's end; -1 is padding
        doc_ids (B, T)  tokens of different documents do not see each other
        trunk_ids       (B, T) a document that a token sees beside its own: a prompt that answers share
        at (N,)         places in the flattened (B, T) to give the result for; with targets (N,)
        output          "logits" (B, T, V) | "last" (B, 1, V): of the last position | "hidden" (B, T, C)
                        with a score head, in the place of logits: a number a token (B, T) or (B, 1), float32
        aux             (L, 1), with experts (L, 5 + E): what each layer adds to the loss, and what its router
                        did (`AUX`; while training). A later stage is given the earlier one's
        """
        c = self.config
        T = x.shape[1]
        if positions is None:
            unequal = cache is not None and cache.ragged and cache.window is None
            check(not unequal, "The rows of this cache differ in length: say the positions.")
            start = cache.n if cache is not None else 0
            positions = torch.arange(start, start + T, device=x.device)
        if self.first:
            x = self.embed(x, positions)  # (B, T, C)
        if cache is not None:
            check(doc_ids is None, "A cache holds one document a row: give doc_ids or a cache, not both.")
            cache.claim(positions)
        masks = self.masks(positions, doc_ids, trunk_ids, cache, T)
        dtype = self.compute_dtype or x.dtype
        angles = self.angles(positions)
        if aux is None:
            columns = len(AUX) + c.n_expert if c.n_expert else 1
            aux = x.new_zeros((c.n_layer, columns), dtype=torch.float32)
        for i, block in self.layers.items():
            cos, sin = angles[c.is_local(int(i))]
            x, aux = self.run_block(block, x, aux, cos, sin, masks[c.windows[int(i)]], cache, dtype)
        if not self.last:
            return x, aux
        if output == "last":
            x = x[:, -1:]
        elif at is not None:
            x = x.flatten(0, 1).index_select(0, at)  # (N, C)
        x = self.norm(x).to(dtype)
        if output == "hidden":
            return x, aux
        if c.head == "score":
            return self.score(x).squeeze(-1).float(), aux
        if targets is None:
            return self.lm_head(x), aux
        return token_losses(x, self.lm_head, targets, c.vocab_size), aux

    def embed(self, ids, positions):  # (B, T) -> (B, T, C)
        """Look up the tokens, and their places where these are learned."""
        c = self.config
        x = self.embed_tokens(ids)
        if c.scale_embedding:
            x = x * torch.tensor(math.sqrt(c.n_embd), dtype=x.dtype)  # rounded as the weights are (Gemma)
        if c.position == "learned":
            if not torch.compiler.is_compiling():  # (whoever compiles has checked it)
                last = int(positions.max())
                check(last < c.seq_len,
                      f"A text of {last + 1} tokens: the model has learned {c.seq_len} places.")
            x = x + self.embed_positions(positions.clamp(min=0))
        return x

    def angles(self, positions) -> dict:
        """Compute (cos, sin) once for all layers that share a theta: {is it the local one?: (cos, sin)}."""
        c = self.config
        if c.position != "rope":
            return dict.fromkeys((False, True), (None, None))
        kinds = {c.is_local(layer) for layer in range(c.n_layer)}
        return {local: rope_angles(positions, *rope_frequencies(c, positions, local)) for local in kinds}

    def run_block(self, block, *args):
        """Run a block; while training and with `recompute`, keep only its input for the backward pass."""
        *_, cache, _ = args
        if cache is not None:  # every length is new: a compiled block would be compiled anew
            return block._call_impl(*args)
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def masks(self, positions, doc_ids, trunk_ids, cache, T) -> dict:
        """Make the mask of each window size in use, once for all layers that share it."""
        causal, n_global = self.config.causal, self.config.global_tokens
        alibi = self.config.position == "alibi"
        S = T if cache is None else cache.n
        plain = doc_ids is None and positions.dim() == 1 and (cache is None or not cache.ragged) and not alibi
        masks = {}
        for window in set(self.config.windows):
            sees_all = plain and (window is None or S <= window)
            if sees_all and (not causal or (cache is not None and T == 1)):
                masks[window] = None
            elif sees_all and S == T:
                masks[window] = "causal"
            else:
                k_pos = positions if cache is None else cache.positions[:, : cache.span]
                near = [w for w in (window, cache and cache.window) if w is not None]
                mask = visible(positions, k_pos, doc_ids, doc_ids, trunk_ids, causal=causal,
                               window=min(near, default=None), n_global=n_global)
                if positions.dim() == 2:  # a softmax over nothing is NaN: let padding see all
                    mask = mask | (positions < 0).unsqueeze(-1)
                mask = mask if mask.dim() == 3 else mask.unsqueeze(0)  # (B or 1, T, S)
                masks[window] = alibi_bias(mask, positions, k_pos, self.config.n_head) if alibi else mask
        return masks

    def compile_blocks(self) -> None:
        """Compile each block: those of one kind share the code, and names stay as they are."""
        for block in self.layers.values():
            block.compile(dynamic=False)

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> "Transformer":
        """Fill each tensor from a generator of its own, seeded by (seed, name): any sharding starts equal.

        Normal with standard deviation 1/sqrt(fan_in) (embedding and output matrix: 0.02); the two matrices
        that write to the residual stream are smaller by sqrt(2 L), as in GPT-2, so that what all layers add
        to it has a variance of about one at most.
        """
        for name, p in self.named_parameters():
            if p.dim() < 2:
                p.fill_(0.0 if name.endswith("bias") or self.config.norm_plus_one else 1.0)
                continue
            generator = torch.Generator().manual_seed(seed_of(seed, name))
            std = 0.02 if "embed_" in name or "lm_head" in name else p.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * self.config.n_layer)
            fill(p, torch.randn(p.shape, generator=generator) * std)
        for buffer in self.buffers():  # the routers' bias
            buffer.zero_()
        return self

def cast(model: Transformer, device, dtype) -> Transformer:
    """Move a model and bring its weights to a precision, but routers' biases, which decide near ties."""
    model.to(device)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model

@torch.no_grad()
def fill(target, whole) -> None:
    """Copy a whole tensor into a parameter, or into this rank's share of one (a DTensor); nothing is sent."""
    if hasattr(target, "placements"):
        from torch.distributed.tensor import distribute_tensor

        whole = whole.to(target.device_mesh.device_type)
        whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
    target.copy_(whole)

def seed_of(*parts) -> int:
    """Make a 63-bit seed from anything printable, the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1

def drop(x, p: float, training: bool):
    """Apply dropout whose mask is drawn once a sequence and channel, (B, 1, C), and held over all positions.

    T times fewer random numbers than the usual form, which on CPU cost as much as the layer itself
    (Gal & Ghahramani 2016, 1512.05287, draw it so for recurrent networks).
    """
    if p == 0.0 or not training:
        return x
    keep = torch.rand(x.shape[0], 1, x.shape[-1], device=x.device) >= p
    return x * (keep / (1 - p)).to(x.dtype)

CHUNK_LOGITS = {"cpu": 2**22, "cuda": 2**26}  # logits that stand in memory at once: 16 MB fit a CPU's cache
KEEP_LOGITS = 2**27  # beyond this many in all, they are computed again in the backward pass instead of kept

def token_losses(hidden, head: nn.Module, targets, V: int):
    """Compute -log p(target) of each token: (B, T, C), (B, T) -> (B, T), or (N, C), (N,) -> (N,); float32.

    0 where the target is IGNORE. In chunks of tokens: (N, V) logits at once would fill the memory.
    """
    x = hidden.flatten(0, -2)  # (N, C)
    t = targets.flatten()
    rows = max(64, CHUNK_LOGITS.get(x.device.type, 2**26) // V)
    again = torch.is_grad_enabled() and x.shape[0] * V > KEEP_LOGITS

    def chunk(x, t):
        return F.cross_entropy(head(x).float(), t, ignore_index=IGNORE, reduction="none")

    step = functools.partial(checkpoint, chunk, use_reentrant=False) if again else chunk
    losses = [step(*part) for part in zip(x.split(rows), t.split(rows), strict=True)]
    return torch.cat(losses).view(targets.shape)

@functools.lru_cache
def count_weights(config: Config) -> tuple[int, int, int]:
    """Count all parameters, those that one token meets, and those that multiply it, on the meta device.

    One block of each kind is built there, which allocates nothing. What only is looked up multiplies nothing.
    """
    c = config
    ends = c.replace(n_layer=1, window=c.windows[:1], dense_layers=(), n_expert=0)
    kinds = {}
    with torch.device("meta"):
        total = sum(p.numel() for n, p in Transformer(ends).named_parameters() if not n.startswith("layers."))
        for i in range(c.n_layer):
            if c.is_sparse(i) not in kinds:
                kinds[c.is_sparse(i)] = list(Block(c, i).named_parameters())
    active = total
    products = c.n_embd * (c.vocab_size if c.head == "lm" else 1)
    for i in range(c.n_layer):
        for name, p in kinds[c.is_sparse(i)]:
            met = p.numel() * (c.n_expert_active / c.n_expert if ".experts." in name else 1)
            total += p.numel()
            active += met
            products += met * (p.dim() > 1)
    return total, round(active), round(products)

def count_params(config: Config) -> tuple[int, int]:
    """Count all parameters, and those that one token meets."""
    return count_weights(config)[:2]

def flops_per_token(config: Config, T: int | None = None) -> float:
    """Count the operations of forward and backward for one token at context T.

    6 for each weight that multiplies it (2 forward, 4 backward), and 12 D H a layer for each key it sees.
    A causal token sees (T+1)/2 keys on average: work that a mask throws away is not counted, nor what
    recomputation adds, so this is the numerator of MFU and not of HFU.
    """
    T = T or config.seq_len
    pairs = 0  # of a query and a key that it sees, in all layers
    for w in (min(w or T, T) for w in config.windows):
        causal = w * (w + 1) / 2 + (T - w) * w  # the first w tokens see 1, 2 .. w keys, the rest see w
        far = max(0, T - w)  # the last of these see a global token that a window does not show
        causal += sum(max(0, far - i) for i in range(min(config.global_tokens, far)))
        pairs += causal if config.causal else 2 * causal - T
    widths = config.head_dim + (config.v_dim or config.head_dim)
    return 6.0 * count_weights(config)[2] + 6.0 * config.n_head * widths * pairs / T

# ---- Further parts, which some families have ----

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu,
               "gelu_pytorch_tanh": functools.partial(F.gelu, approximate="tanh")}
ACTIVATIONS |= {"gelu_new": ACTIVATIONS["gelu_pytorch_tanh"], "swish": F.silu}  # other names
CHOICES = {"head": ("lm", "score"), "position": ("rope", "learned", "alibi", "none"),
           "norm": ("rms", "layer"), "act": tuple(ACTIVATIONS)}

class LayerNorm(nn.LayerNorm):
    """Compute (x - mean(x)) / sqrt(var(x) + eps) * weight + bias (1607.06450, eq. 4)."""

    def forward(self, x):
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)

def make_norm(config: Config, dim: int) -> nn.Module:
    """Make the norm that a config names."""
    if config.norm == "layer":
        return LayerNorm(dim, config.norm_eps)
    return RMSNorm(dim, config.norm_eps, config.norm_plus_one)

class Head(Linear):
    """Compute the logits, softly kept below a cap where the config has one."""

    def __init__(self, config: Config):
        super().__init__(config.n_embd, config.vocab_size, bias=config.head_bias)
        self.cap = config.logit_cap

    def forward(self, x):
        logits = super().forward(x)
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

def rope_frequencies(config: Config, positions, local: bool = False):
    """Compute theta^(-2i/R) of each pair i, slowed down as the config says -> ((R/2,), factor of cos, sin).

    R of a head's numbers are rotated. local: of layers with a window, where these have a theta of their own.
    """
    theta = config.rope_local_theta if local else config.rope_theta
    R = config.rope_dim or config.head_dim
    i = torch.arange(0, R, 2, dtype=torch.float32, device=positions.device)
    frequencies = theta ** (-i / R)
    if local or not config.rope_scaling:
        return frequencies, 1.0
    return slow_down(frequencies, positions, config)

def slow_down(frequencies, positions, config: Config):
    """Slow the rotation down, so that a longer text turns no further -> (frequencies (R/2,), factor).

    linear    all pairs alike: position interpolation (2306.15595)
    llama3    pairs that make few turns in the original context by `factor`, those that make many not at all
    yarn      the same with other bounds, and with larger scores (2309.00071, eq. 17, 23 and 22)
    longrope  each pair by a number that was searched for, another one in long texts (2402.13753)
    """
    how = dict(config.rope_scaling)
    kind, factor = how["rope_type"], how.get("factor")
    i = torch.arange(len(frequencies), device=frequencies.device)
    if kind == "linear":
        return frequencies / factor, 1.0
    original = how["original_max_position_embeddings"]
    if kind == "longrope":
        long = torch.tensor(how["long_factor"], device=i.device)
        short = torch.tensor(how["short_factor"], device=i.device)
        usual = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        last = positions.amax(-1, keepdim=True).unsqueeze(-1)  # of each row
        by = torch.where(last >= original, long, short)
        return frequencies / by, how.get("attention_factor") or usual
    if kind == "llama3":
        turns = original * frequencies / (2 * math.pi)
        low, high = how["low_freq_factor"], how["high_freq_factor"]
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * kept + frequencies / factor * (1 - kept), 1.0

    R = 2 * len(frequencies)

    def pair_with(turns):  # in the original context
        return R * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = pair_with(how.get("beta_fast") or 32), pair_with(how.get("beta_slow") or 1)
    if how.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, R - 1)
    kept = 1 - ((i - first) / max(last - first, 0.001)).clamp(0, 1)
    larger = yarn_factor(factor)
    if how.get("mscale") and how.get("mscale_all_dim"):  # DeepSeek's: the rest of it is in LatentAttention
        larger = yarn_factor(factor, how["mscale"]) / yarn_factor(factor, how["mscale_all_dim"])
    return frequencies * kept + frequencies / factor * (1 - kept), how.get("attention_factor") or larger

def yarn_factor(factor: float, mscale: float = 1.0) -> float:
    """Compute YaRN's sqrt(1/t) = 0.1 ln(factor) + 1 (eq. 22), with a weight for its first term."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

# What rope_scaling has to say for each type, and what it may say.
SCALING = {
    "linear": (("factor",), ()), "ntk": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (("factor", "original_max_position_embeddings"),
             ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")),
    "longrope": (("factor", "short_factor", "long_factor", "original_max_position_embeddings"),
                 ("attention_factor",)),
}

def check_scaling(how) -> tuple:
    """Refuse a rope_scaling that is not known or not complete -> ((name, value), ...), to be hashed."""
    try:
        how = {name: tuple(x) if isinstance(x, list) else x for name, x in dict(how).items() if x is not None}
    except (TypeError, ValueError):
        raise UserError(f"rope_scaling is {how!r:.60}; it has to be an object.") from None
    if how.get("rope_type", "default") == "default":
        return ()
    kind = how["rope_type"]
    check(kind in list(SCALING), f"Rotary positions of type {kind!r:.40} are not supported; those of type "
          f"{', '.join(SCALING)} are.")
    needed, free = SCALING[kind]
    lacks = [name for name in needed if name not in how]
    odd = [name for name in how if name not in (*needed, *free, "rope_type")]
    check(not lacks, f"rope_scaling of type {kind} does not say {', '.join(lacks)}.")
    check(not odd, f"rope_scaling of type {kind} does not know {', '.join(odd)}.")
    for name in how.keys() - {"rope_type", "truncate"}:
        values = how[name] if isinstance(how[name], tuple) else (how[name],)
        fine = all(is_a(x, float) and 0 < x < 1e15 for x in values) and isinstance(how[name], tuple) == (
            name in ("short_factor", "long_factor"))
        check(fine, f"rope_scaling says {name} {how[name]!r:.60}; it has to be positive, and below 1e15.")
    return tuple(sorted(how.items()))

def alibi_slopes(H: int) -> list[float]:
    """Give the slopes 2^(-8/H), 2^(-16/H), ... of H heads (2108.12409, 3).

    Where H is no power of two: those of the power below, then every other one of the power above.

    >>> alibi_slopes(8)[:2], [round(x, 3) for x in alibi_slopes(3)]
    ([0.5, 0.25], [0.062, 0.004, 0.25])
    """
    power = 2 ** (H.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + (alibi_slopes(2 * power)[0::2][: H - power] if H > power else [])

def alibi_bias(mask, q_pos, k_pos, H: int):
    """Compute what ALiBi adds to the scores, -slope * distance: bool (B or 1, T, S) -> (B or 1, H, T, S)."""
    distance = (q_pos.unsqueeze(-1) - k_pos.unsqueeze(-2)).abs()
    distance = distance if distance.dim() == 3 else distance.unsqueeze(0)
    slopes = torch.tensor(alibi_slopes(H), device=mask.device).view(1, H, 1, 1)
    return (-slopes * distance.unsqueeze(1)).masked_fill(~mask.unsqueeze(1), -torch.inf)

def attend_pieces(q, k, v, masks: list, scale, cap):
    """Compute attention of pieces of the queries, each with the first keys, as many as its mask has."""
    pieces = zip(q.chunk(len(masks), 2), masks, strict=True)
    parts = [attend(x, k[:, :, : m.shape[-1]], v[:, :, : m.shape[-1]], m, scale, cap) for x, m in pieces]
    return torch.cat(parts, 2)

def attend_capped(q, k, v, mask, scale: float, cap: float):
    """Compute attention whose scores stay between -cap and cap: cap * tanh(score / cap) (2408.00118, 2.1)."""
    T, S, G = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)
    scores = cap * torch.tanh(q @ k.transpose(2, 3) * (scale / cap))  # (B, H, T, S)
    if isinstance(mask, str):
        mask = torch.ones(1, T, S, dtype=torch.bool, device=q.device).tril()
    if mask is not None and mask.dim() == 3:
        scores = scores.masked_fill(~mask.unsqueeze(1), -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v

class LatentAttention(nn.Module):
    """Make keys and values of all heads from one narrow vector a token, which is all that a cache keeps.

    Multi-head latent attention (DeepSeek-V2: 2405.04434, 2.1). The rotated part of a key, R wide, is made
    apart and shared by the heads. One token with a cache attends to the latent vectors themselves: the matrix
    that makes keys is folded into its query, and the one that makes values comes after attention (eq. 13).
    """

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.rank, self.rope = config.kv_rank, config.rope_dim
        self.nope, self.v = config.nope_dim, config.v_dim
        C, H, D = config.n_embd, config.n_head, config.head_dim
        self.low_rank = config.q_rank is not None
        if self.low_rank:
            self.q_a_proj = Linear(C, config.q_rank, bias=False)
            self.q_a_layernorm = RMSNorm(config.q_rank, 1e-6)
            self.q_b_proj = Linear(config.q_rank, H * D, bias=False)
        else:
            self.q_proj = Linear(C, H * D, bias=False)
        self.kv_a_proj_with_mqa = Linear(C, config.kv_rank + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(config.kv_rank, 1e-6)
        self.kv_b_proj = Linear(config.kv_rank, H * (self.nope + self.v), bias=False)
        self.o_proj = Linear(H * self.v, C, bias=False)
        how = dict(config.rope_scaling)
        self.scale = D**-0.5  # (the norms' eps above is what both classes fix)
        if how.get("mscale_all_dim"):
            self.scale *= yarn_factor(how["factor"], how["mscale_all_dim"]) ** 2

    def forward(self, x, cos, sin, mask=None, cache=None):
        B, T, _ = x.shape
        parts = (self.nope, self.rope)
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if self.low_rank else self.q_proj(x)
        q, q_rope = q.view(B, T, -1, sum(parts)).transpose(1, 2).split(parts, -1)  # (B, H, T, nope), (.., R)
        latent, k_rope = self.kv_a_proj_with_mqa(x).unsqueeze(1).split((self.rank, self.rope), -1)
        latent = self.kv_a_layernorm(latent)  # (B, 1, T, rank)
        q_rope, k_rope = (apply_rope(y.transpose(1, 2), cos, sin).transpose(1, 2) for y in (q_rope, k_rope))
        if cache is not None:
            latent, k_rope = cache.update(self.layer, latent, k_rope)  # (B, 1, S, rank), (B, 1, S, R)
        if cache is not None and T == 1 and type(self.kv_b_proj) is Linear:  # H queries share one wide key
            up = self.kv_b_proj.weight.to(x.dtype).view(-1, self.nope + self.v, self.rank)
            up_k, up_v = up.split((self.nope, self.v), 1)  # (H, nope, rank), (H, v, rank)
            q, k, v = q @ up_k, latent, latent
        else:
            kv = self.kv_b_proj(latent).view(B, latent.shape[2], -1, self.nope + self.v).transpose(1, 2)
            k, v = kv.split((self.nope, self.v), -1)  # (B, H, S, nope), (B, H, S, v)
            k_rope = k_rope.expand(-1, k.shape[1], -1, -1)
            up_v = None
        y = attend(torch.cat((q, q_rope), -1), torch.cat((k, k_rope), -1), v, mask, self.scale)
        y = y if up_v is None else y @ up_v.transpose(1, 2)  # (B, H, T, v)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)

class Cache:
    """Keep the keys and values of all layers for up to `slots` tokens a row, which remember their positions.

    A slot at position -1 (padding, or never written) is invisible, so prompts of unequal length share a
    batch: pad on either side, give the pads position -1. All rows take the same next slots.
    """

    window: int | None = None  # how far back a token sees; sample.py has caches that forget

    def __init__(self, config: Config, batch: int, slots: int, device=None, dtype=None):
        heads, *widths = config.cached
        shapes = [(config.n_layer, batch, heads, slots, width) for width in widths]
        self.k, self.v = (torch.zeros(shape, device=device, dtype=dtype) for shape in shapes)
        self.positions = torch.full((batch, slots), -1, device=device)
        self.n = 0  # slots in use
        self.ragged = False  # does any row differ from 0, 1, 2 ...?

    def claim(self, positions) -> None:
        """Take the next T slots for tokens at these positions, (T,) or (B, T): once a forward pass."""
        T = positions.shape[-1]
        slots = self.positions.shape[1]
        check(self.n + T <= slots, f"{self.n + T} tokens do not fit a cache of {slots}: ask for fewer.")
        self.positions[:, self.n : self.n + T] = positions
        self.ragged |= positions.dim() > 1
        self.n += T

    def update(self, layer: int, k, v):
        """Write a layer's keys and values (B, K, T, D) into the claimed slots -> all so far (B, K, S, D)."""
        start = self.n - k.shape[2]
        self.k[layer, :, :, start : self.n] = k
        self.v[layer, :, :, start : self.n] = v
        return self.k[layer, :, :, : self.span], self.v[layer, :, :, : self.span]

    @property
    def span(self) -> int:
        """Count the slots that are read: those in use; when ragged all, and the mask hides the empty ones."""
        return self.positions.shape[1] if self.ragged else self.n

    def grow(self, slots: int) -> None:
        """Make room for more tokens."""
        self.k = F.pad(self.k, (0, 0, 0, slots))
        self.v = F.pad(self.v, (0, 0, 0, slots))
        self.positions = F.pad(self.positions, (0, slots), value=-1)

    def rewind(self, n: int) -> None:
        """Forget all but the first n slots (a rejected draft, a turn taken back)."""
        self.positions[:, n:] = -1
        self.n = n
        self.ragged &= n > 0

    def select(self, rows) -> None:
        """Keep these rows, in this order and as often as they are named."""
        self.k = self.k[:, rows]
        self.v = self.v[:, rows]
        self.positions = self.positions[rows]

def greedy(logits):  # (B, V) -> (B,)
    return logits.argmax(-1)

@torch.inference_mode()
def generate(model, prompts, max_new_tokens, pick=greedy, eos_id=(), samples=1, rows=256) -> list[list[int]]:
    """Continue each prompt -> the new ids of each, up to and with eos_id (one id, or several).

    max_new_tokens: one number for all, or a list with each prompt's; learned places may end a text sooner.
    pick: logits (B, V) -> ids (B,); sample.py has others. samples: so many continuations of each prompt, one
    after the other in the result. rows: the most texts at once, but all samples of a prompt; prompts of like
    length are read together, so that little padding is read.
    """
    check(prompts and all(prompts), "A prompt needs at least one token: begin with the end-of-text token.")
    model.eval()
    device = next(model.parameters()).device
    stop = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
    if model.config.position == "learned":
        places = model.config.seq_len + 1  # (the last token of a text is not read)
        limits = [min(n, places - len(prompt)) for n, prompt in zip(limits, prompts, strict=True)]
    out = [[] for _ in range(len(prompts) * samples)]
    order = sorted((i for i, n in enumerate(limits) if n > 0), key=lambda i: -len(prompts[i]))
    size = max(1, rows // samples)
    for some in (order[i : i + size] for i in range(0, len(order), size)):
        # 1. read the prompts
        logits, positions, cache = read_prompts(model, [prompts[i] for i in some])
        # 2. a row for each sample
        alive = [i * samples + n for i in some for n in range(samples)]  # the text of each row
        rows_of = torch.arange(len(some), device=device).repeat_interleave(samples)
        cache.select(rows_of)
        logits, positions = logits[rows_of], positions[rows_of]
        ended = set()
        # 3. write a token of each text at a time; a text that has ended leaves the batch
        while True:
            ids = pick(logits.float())
            for text, token in zip(alive, ids.tolist(), strict=True):
                if text not in ended:
                    out[text].append(token)
            ended |= {t for t in alive if len(out[t]) >= limits[t // samples] or out[t][-1] in stop}
            going = [row for row, text in enumerate(alive) if text not in ended]
            if not going:
                break
            if len(going) <= 0.875 * len(alive):  # moving rows costs: let a few ended ones ride along
                alive = [alive[r] for r in going]
                ids, positions = ids[going], positions[going]
                cache.select(going)
            sizes = (len(prompts[t // samples]) + len(out[t]) for t in alive if t not in ended)
            if model.config.rereads_at is not None and model.config.rereads_at + 1 in sizes:
                texts = [prompts[t // samples] + out[t] for t in alive]
                logits, positions, cache = read_prompts(model, texts)
                continue
            if cache.n == cache.span:
                cache.grow(32)
            logits = model(ids[:, None], positions=positions, cache=cache, output="last")[0][:, -1]
            positions = positions + 1
    return out

def read_prompts(model, texts: list[list[int]]):
    """Read texts of unequal lengths -> logits of their next tokens (B, V), these' positions, the cache.

    Pads stand on the right, where no token of a text sees them.
    """
    weight = next(model.parameters())
    device = weight.device
    ids = nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True).to(device)
    lengths = torch.tensor([len(text) for text in texts], device=device)
    B, T = ids.shape
    cache = Cache(model.config, B, T, device, model.compute_dtype or weight.dtype)
    positions = torch.arange(T, device=device).expand(B, T)
    positions = positions.masked_fill(positions >= lengths[:, None], -1)
    ends = torch.arange(B, device=device) * T + lengths - 1
    logits, _ = model(ids, at=ends, positions=positions, cache=cache)
    cache.ragged = True
    return logits, lengths[:, None], cache


# ------------------------------------------------------------------------------------------------------------
# Part II: the folders
# ------------------------------------------------------------------------------------------------------------


def is_a(value, kind: type) -> bool:
    """Tell whether a value is of a kind; whole numbers are floats too, NaN and infinity are not."""
    return type(value) in (int, float) and math.isfinite(value) if kind is float else type(value) is kind

def kind_of(declared) -> type:
    """Find the plain kind in what a field was declared as: tuple[int | None, ...] -> int."""
    return next(kind for kind in (bool, str, float, int) if kind.__name__ in str(declared))

def fits(value, declared) -> bool:
    """Tell whether a value is what a field was declared as: int, float | None, list[str]."""
    declared = str(declared)
    if isinstance(value, (list, tuple)) and re.search("list|tuple", declared):
        one = declared.replace("list", "")
        return all(fits(x, one) and not isinstance(x, (list, tuple)) for x in value)
    if "list" in declared:
        return False
    return "None" in declared if value is None else is_a(value, kind_of(declared))

def check_field(name: str, value) -> None:
    """Refuse what a field of Config cannot be: of another kind, or a number that makes no sense."""
    field = Config.__dataclass_fields__[name]
    if field.type is dict:
        return  # see check_scaling
    words = {bool: "true or false", str: "a name"}.get(kind_of(field.type), "a positive number")
    check(fits(value, field.type), f"{name} is {value!r}; it has to be {words}.")
    may_be_0 = field.default == 0 or name in ("eos_id", "pad_id", "dense_layers", "balance_rate")
    least = 0 if may_be_0 else 1e-12
    most = 10_000 if name in ("n_layer", "n_head", "n_kv_head", "n_expert") else 2**31
    most = 1e15 if name == "rope_theta" else most
    numbers = [x for x in (value if isinstance(value, (list, tuple)) else [value]) if is_a(x, float)]
    check(all(least <= x < most for x in numbers), f"{name} is {value!r}; it has to be {words} below {most}.")

def checked_fields(config: Config) -> dict:
    """Refuse a config that cannot be -> the fields whose form or value follows from others."""
    c = config
    for name in c.__dataclass_fields__:
        check_field(name, getattr(c, name))
    for name, known in CHOICES.items():
        check(getattr(c, name) in known, f"{name} is one of {', '.join(known)}; not {getattr(c, name)!r}.")
    window, dense = (tuple(x if isinstance(x, (tuple, list)) else [x]) for x in (c.window, c.dense_layers))
    window *= c.n_layer if len(window) == 1 else 1  # one number serves all layers
    eos_id = tuple(c.eos_id) if isinstance(c.eos_id, list) else c.eos_id  # JSON knows lists only
    head_dim = c.nope_dim + (c.rope_dim or 0) if c.kv_rank else c.head_dim
    R = c.rope_dim or head_dim
    how = dict(check_scaling(c.rope_scaling))
    theta = c.rope_theta
    if how.get("rope_type") == "ntk":  # a larger theta slows the slowest pair by the factor, the fastest not:
        theta *= how["factor"] ** (R / max(R - 2, 1))  # it is kept as that, which all classes know
        how = {}
    check(c.n_head % c.n_kv_head == 0,
          f"{c.n_head} heads cannot share {c.n_kv_head} key-value heads evenly.")
    check(R % 2 == 0 or c.position != "rope", f"head_dim is {R}; RoPE rotates pairs: choose an even one.")
    check(R <= head_dim, f"rope_dim {R} is more than the {head_dim} of a head.")
    check(not c.kv_rank or (c.rope_dim and c.nope_dim and c.v_dim and c.position == "rope"),
          "Latent attention (kv_rank) needs rope_dim, nope_dim and v_dim, and rotary positions.")
    plain = not (c.qkv_bias or c.o_bias or c.attn_cap or c.attn_scalar or c.norm_plus_one)
    check(not c.kv_rank or (plain and c.norm == "rms"),
          "Latent attention (kv_rank) has no biases, caps or scalar, and plain norms.")
    check(c.norm == "rms" or not c.norm_plus_one, "norm_plus_one is for norms of kind rms.")
    check(c.position == "rope" or not how, "rope_scaling is for rotary positions.")
    check(not c.global_tokens or any(window), "global_tokens is for layers that have a window.")
    for name in how.keys() & {"short_factor", "long_factor"}:
        check(len(how[name]) == R // 2, f"{name} has to have {R // 2} numbers, one a pair.")
    check(len(window) in (0, c.n_layer), f"{len(window)} windows do not serve {c.n_layer} layers.")
    check(c.dropout < 1, f"dropout is {c.dropout}; it is a share, from 0 up to, not with, 1.")
    return {"window": () if set(window) == {None} else window, "dense_layers": dense,
            "eos_id": eos_id, "head_dim": head_dim, "rope_theta": theta, "rope_scaling": tuple(how.items()),
            "qk_norm": c.qk_norm and not c.kv_rank}

def sizes(base: Config, rows: str) -> dict[str, Config]:
    """Read sizes, a line each: name, layers, heads, key-value heads, widths: model, feed-forward, head."""
    found = {}
    for row in rows.strip().splitlines():
        name, *numbers = row.split()
        n_layer, n_head, n_kv_head, n_embd, ffn_dim, *head_dim = map(int, numbers)
        head_dim = head_dim[0] if head_dim else n_embd // n_head
        found[name] = base.replace(n_layer=n_layer, n_head=n_head, n_kv_head=n_kv_head, n_embd=n_embd,
                                   ffn_dim=ffn_dim, head_dim=head_dim, window=base.window[:1])
    return found

# `nano` learns in a minute, `micro` in the minutes of the default run; `small` is GPT-2's size.
OURS = sizes(Config(), """
    nano     4  4  4   128   384
    micro    4  3  3   192   512
    mini     6  6  6   384  1024
    small   12 12 12   768  2048
    medium  24 16  8  1024  2816
    1b      16 32  8  2048  8192""")
CONTEXTS = {"nano": 128, "small": 1024, "medium": 1024, "1b": 4096}
LLAMA = Config(norm_eps=1e-5, qk_norm=False, tie=False, vocab_size=32_000, seq_len=4096)
LLAMA_3 = LLAMA.replace(vocab_size=128_256, seq_len=8192, rope_theta=5e5)
LLAMA_31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}
QWEN_25 = LLAMA.replace(vocab_size=151_936, seq_len=32_768, rope_theta=1e6, qkv_bias=True, norm_eps=1e-6)
GPT_3 = LLAMA.replace(position="learned", norm="layer", act="gelu_new", gated=False, tie=True, qkv_bias=True,
                      o_bias=True, mlp_bias=True, vocab_size=50_257, seq_len=2048)
MIXTRAL = LLAMA.replace(seq_len=32_768, rope_theta=1e6, n_expert=8)
DEEPSEEK = LLAMA.replace(
    norm_eps=1e-6, seq_len=163_840, kv_rank=512, q_rank=1536, nope_dim=128, rope_dim=64, v_dim=128, n_group=8,
    rope_scaling={"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096,
                  "mscale": 1.0, "mscale_all_dim": 1.0})
PRESETS = {name: c.replace(seq_len=CONTEXTS.get(name, 256)) for name, c in OURS.items()}
PRESETS["1b"] = PRESETS["1b"].replace(rope_theta=5e5)
PUBLISHED = [  # what the rows have in common, the rows
    (GPT_3, "gpt-3-175b 96 96 96 12288 49152"),
    (LLAMA.replace(norm_eps=1e-6, seq_len=2048), """
        llama-7b          32   32  32   4096  11008
        llama-13b         40   40  40   5120  13824
        llama-30b         60   52  52   6656  17920"""),
    (LLAMA.replace(seq_len=2048), "llama-65b 80 64 64 8192 22016"),
    (LLAMA, """
        llama-2-7b        32   32  32   4096  11008
        llama-2-13b       40   40  40   5120  13824
        llama-2-70b       80   64   8   8192  28672"""),
    (LLAMA_3, """
        llama-3-8b        32   32   8   4096  14336
        llama-3-70b       80   64   8   8192  28672"""),
    (LLAMA_3.replace(seq_len=131_072, rope_scaling=LLAMA_31), "llama-3.1-405b 126 128 8 16384 53248"),
    (LLAMA.replace(seq_len=32_768, window=4096), "mistral-7b 32 32 8 4096 14336"),
    (MIXTRAL.replace(expert_dim=14_336), "mixtral-8x7b 32 32 8 4096 14336"),
    (MIXTRAL.replace(expert_dim=16_384, seq_len=65_536), "mixtral-8x22b 56 48 8 6144 16384"),
    (LLAMA.replace(norm_plus_one=True, scale_embedding=True, act="gelu_pytorch_tanh", tie=True, norm_eps=1e-6,
                   vocab_size=256_000, seq_len=8192), """
        gemma-2b          18    8   1   2048  16384  256
        gemma-7b          28   16  16   3072  24576  256"""),
    (QWEN_25.replace(tie=True), """
        qwen2.5-0.5b      24   14   2    896   4864
        qwen2.5-1.5b      28   12   2   1536   8960
        qwen2.5-3b        36   16   2   2048  11008"""),
    (QWEN_25.replace(vocab_size=152_064, seq_len=131_072), "qwen2.5-7b 28 28 4 3584 18944"),
    (QWEN_25.replace(vocab_size=152_064, seq_len=131_072, norm_eps=1e-5), """
        qwen2.5-14b       48   40   8   5120  13824
        qwen2.5-32b       64   40   8   5120  27648
        qwen2.5-72b       80   64   8   8192  29568"""),
    (Config(vocab_size=151_936, seq_len=40_960, tie=False, rope_theta=1e6, n_expert=128, n_expert_active=8,
            expert_dim=768), "qwen3-30b-a3b 48 32 4 2048 6144 128"),
    (LLAMA.replace(vocab_size=32_064, window=2047), "phi-3-3.8b 32 32 32 3072 8192"),
    (DEEPSEEK.replace(vocab_size=102_400, n_expert=160, n_expert_active=6, n_expert_shared=2, expert_dim=1536,
                      dense_layers=(0,), topk_group=3, router_scale=16.0, router_normalize=False),
     "deepseek-v2 60 128 128 5120 12288"),
    (DEEPSEEK.replace(vocab_size=129_280, n_expert=256, n_expert_active=8, n_expert_shared=1, expert_dim=2048,
                      dense_layers=(0, 1, 2), topk_group=4, router_scale=2.5, router="sigmoid",
                      router_bias=True), "deepseek-v3 61 128 128 7168 18432"),
]
for base, rows in PUBLISHED:
    PRESETS |= sizes(base, rows)

def round_up(n: int, multiple: int = 64) -> int:
    """Round a size up, since matrix kernels like whole tiles: 76 -> 128."""
    return -(-n // multiple) * multiple

def resize(preset: str, n_layer=None, n_embd=None, seq_len=None, **fields) -> Config:
    """Build a preset with other sizes and fields; those that are not given follow in its proportions."""
    check(preset in PRESETS, f"--preset is one of {', '.join(PRESETS)}; not {preset!r}.")
    base = PRESETS[preset]
    sizes = {"n_layer": n_layer, "n_embd": n_embd, "seq_len": seq_len}
    fields |= {name: size for name, size in sizes.items() if size is not None}
    for name, value in fields.items():
        check_field(name, value)
    width = fields.get("n_embd", base.n_embd)
    if fields.keys() & {"n_embd", "n_head"}:
        heads = fields.setdefault("n_head", max(1, base.n_head * width // base.n_embd))
        if base.head_dim * base.n_head == base.n_embd:  # else the heads are as wide as they are
            check(width % heads == 0, f"A width of {width} does not divide into {heads} heads.")
            fields.setdefault("head_dim", width // heads)
        group = base.n_head // base.n_kv_head
        fields.setdefault("n_kv_head", heads // group if heads % group == 0 else heads)
        fields.setdefault("ffn_dim", round_up(width * base.ffn_dim // base.n_embd))
    if base.n_expert:
        fields.setdefault("expert_dim", max(8, width * base.expert_dim // base.n_embd))
    elif fields.get("n_expert"):  # a token costs what the dense model's does
        used = fields.get("n_expert_active", base.n_expert_active) + fields.get("n_expert_shared", 0)
        fields.setdefault("expert_dim", max(8, fields.get("ffn_dim", base.ffn_dim) // max(1, used)))
        fields.setdefault("router_bias", fields.get("balance") == "bias")
    else:
        useless = [name for name in EXPERT_FIELDS if name in fields]
        check(not useless, f"--set {', '.join(useless)} needs experts: --set n_expert=8.")
    if len(set(base.window)) == 1:
        fields.setdefault("window", base.window[:1])
    return base.replace(**fields)

# Our field -> the key in config.json, in every family.
KEYS = {
    "vocab_size": "vocab_size", "seq_len": "max_position_embeddings", "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "n_embd": "hidden_size",
    "head_dim": "head_dim", "ffn_dim": "intermediate_size", "norm_eps": "rms_norm_eps",
    "tie": "tie_word_embeddings", "eos_id": "eos_token_id", "pad_id": "pad_token_id", "act": "hidden_act",
}
NAMES = list(Config.__dataclass_fields__)
TRAINING = ("dropout", "balance", "balance_rate", "z_loss", "capacity")  # no checkpoint carries these
CONTEXT = ("rope_theta", "rope_scaling", "window", "global_tokens")  # no weight depends on these
EXPERT_FIELDS = (*NAMES[NAMES.index("n_expert_active") : NAMES.index("dropout")], *TRAINING[1:])
SCORE = "ForSequenceClassification"  # ends the name of a stock class with a score head
# Keys of config.json that change what is computed, and the values at which they do not: others are refused,
# unless the family reads the key.
NEUTRAL = {"attention_bias": False, "mlp_bias": False, "quantization_config": None,
           "partial_rotary_factor": 1, "attn_logit_softcapping": None, "final_logit_softcapping": None,
           "embedding_multiplier": 1, "residual_multiplier": 1, "attention_multiplier": None,
           "logits_scaling": 1, "logit_scale": 1, "use_qk_norm": False, "qk_layernorm": False,
           "parallel_block": False, "clip_qkv": None, "use_bidirectional_attention": False,
           "add_cross_attention": False, "scale_attn_weights": True, "rope_interleave": True,
           "scale_attn_by_inverse_layer_idx": False}

@dataclass(frozen=True)
class Family:
    """Say what sets one published architecture apart from its neighbours."""

    model_type: str
    fixed: dict = dataclasses.field(default_factory=dict)  # fields of Config that its class fixes
    keys: dict = dataclasses.field(default_factory=dict)  # fields -> keys of its config.json; None: derived
    window: str = "none"  # which windows it can say: "none", "all" (every layer the same) or "any"
    every: int = 0  # where config.json does not say which layers slide: every so many sees all
    renames: dict = dataclasses.field(default_factory=dict)  # parts of our tensors' names -> of its own
    fused: dict = dataclasses.field(default_factory=dict)  # a matrix on disk -> the ones that stand in it
    transposed: tuple = ()  # matrices that stand on disk as (in, out)
    interleaved: bool = False  # on disk RoPE's pairs are neighbours, not halves
    prefix: str = "model."
    defaults: dict = dataclasses.field(default_factory=dict)  # what config.json means where it says nothing
    neutral: dict = dataclasses.field(default_factory=dict)  # more of NEUTRAL; of a tuple any will do
    ignored: str = "$^"  # tensors in published files that its class does not use: a pattern
    has_score: bool = True  # transformers has its class with a score head
    dense_layers: str = "none"  # which layers may stay dense among experts: "none", "any" or "first" (moe.py)

BIASES = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
LINEAR_BIASES = {"qkv_bias": True, "o_bias": True, "mlp_bias": True}
GEMMA = {"norm_plus_one": True, "scale_embedding": True}
GEMMA_2 = {"tie_word_embeddings": True, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
           "query_pre_attn_scalar": 256, "sliding_window": 4096, "use_sliding_window": True}
POST_NORMS = {".post_attention_layernorm.": ".pre_feedforward_layernorm.",
              ".attn_out_norm.": ".post_attention_layernorm.",
              ".mlp_out_norm.": ".post_feedforward_layernorm."}
QKV = ("q_proj", "k_proj", "v_proj")
QWEN = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
FAMILIES = {  # those with experts stand in moe.py
    "LlamaForCausalLM": Family("llama", {}, BIASES | {"mlp_bias": "mlp_bias"}),
    "MistralForCausalLM": Family("mistral", window="all", defaults={"sliding_window": 4096}),
    "Qwen2ForCausalLM": Family("qwen2", {"qkv_bias": True}, {"head_dim": None}, window="any", defaults=QWEN),
    "Qwen3ForCausalLM": Family("qwen3", {"qk_norm": True}, BIASES, window="any",
                               defaults=QWEN | {"head_dim": 128}),
    "GPT2LMHeadModel": Family(
        "gpt2", LINEAR_BIASES | {"position": "learned", "norm": "layer", "gated": False},
        {"seq_len": "n_positions", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
         "ffn_dim": "n_inner", "norm_eps": "layer_norm_epsilon", "act": "activation_function",
         "n_kv_head": None, "head_dim": None},
        renames={".embed_tokens.": ".wte.", ".embed_positions.": ".wpe.", ".layers.": ".h.",
                 ".norm.": ".ln_f.", ".input_layernorm.": ".ln_1.", ".post_attention_layernorm.": ".ln_2.",
                 ".self_attn.": ".attn.", ".o_proj.": ".c_proj.", ".up_proj.": ".c_fc.",
                 ".down_proj.": ".c_proj."},
        fused={"c_attn": QKV}, transposed=("c_attn", "c_proj", "c_fc"), prefix="transformer.",
        defaults={"tie_word_embeddings": True, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5},
        ignored=r"\.attn\.(masked_)?bias$", has_score=False),
    "GemmaForCausalLM": Family(
        "gemma", GEMMA | {"act": "gelu_pytorch_tanh"}, BIASES,
        defaults={"tie_word_embeddings": True, "head_dim": 256},
        neutral={"hidden_act": ("gelu", "gelu_pytorch_tanh"), "hidden_activation": "gelu_pytorch_tanh"}),
    "Gemma2ForCausalLM": Family(
        "gemma2", GEMMA | {"post_norm": True},
        BIASES | {"act": "hidden_activation", "attn_scalar": "query_pre_attn_scalar",
                  "attn_cap": "attn_logit_softcapping", "logit_cap": "final_logit_softcapping"},
        window="any", every=2, renames=POST_NORMS,
        defaults=GEMMA_2 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
    "Gemma3ForCausalLM": Family(
        "gemma3_text", GEMMA | {"post_norm": True, "qk_norm": True},
        BIASES | {"act": "hidden_activation", "attn_scalar": "query_pre_attn_scalar",
                  "logit_cap": "final_logit_softcapping", "rope_local_theta": "rope_local_base_freq"},
        window="any", every=6, renames=POST_NORMS,
        defaults=GEMMA_2 | {"rope_theta": 1e6, "rope_local_base_freq": 1e4}),
    "PhiForCausalLM": Family(
        "phi", LINEAR_BIASES | {"norm": "layer", "gated": False, "head_bias": True, "parallel_block": True},
        {"norm_eps": "layer_norm_eps", "rope_dim": "partial_rotary_factor", "head_dim": None},
        renames={".o_proj.": ".dense.", ".up_proj.": ".fc1.", ".down_proj.": ".fc2.",
                 ".norm.": ".final_layernorm."},
        defaults={"partial_rotary_factor": 0.5, "hidden_act": "gelu_new", "layer_norm_eps": 1e-5}),
    "Phi3ForCausalLM": Family(
        "phi3", {}, {"rope_dim": "partial_rotary_factor", "head_dim": None}, window="all",
        fused={"qkv_proj": QKV, "gate_up_proj": ("gate_proj", "up_proj")},
        defaults={"original_max_position_embeddings": 4096}),
}
OWN = Family("octavo")

@functools.lru_cache
def family_of(config: Config) -> tuple[str, Family]:
    """Find the stock class that a config exactly is: written as that class and read again it is the same."""
    config = config.replace(**{name: getattr(Config, name) for name in TRAINING})
    if config.n_expert and not config.dense_layers:
        config = config.replace(ffn_dim=config.expert_dim)  # no layer is dense: that width says nothing
    for name, family in (load_moe().FAMILIES if config.n_expert else FAMILIES).items():
        with contextlib.suppress(UserError):  # what this class cannot be
            can_score = family.has_score or config.head == "lm"
            if can_score and config_from_hf(write_as(config, name, family)) == config:
                return name, family
    return ("OctavoForCausalLM" if config.causal else "OctavoForMaskedLM"), OWN

def config_to_hf(config: Config) -> dict:
    """Write config.json as the stock class that the config exactly is, or as model_type "octavo"."""
    return write_as(config, *family_of(config))

def write_as(config: Config, name: str, family: Family) -> dict:
    """Write a config under the keys of a family, as far as it has some; our own family has our names."""
    hf = {"architectures": [name], "initializer_range": 0.02, "use_cache": True, "dtype": "float32",
          "model_type": family.model_type}
    hf |= {key: getattr(config, field) for field, key in (KEYS | family.keys).items() if key}
    if config.head == "score":  # transformers counts the scores by their labels
        hf |= {"architectures": [name.partition("For")[0] + SCORE], "id2label": {"0": "LABEL_0"},
               "label2id": {"LABEL_0": 0}}
    hf |= rope_to_hf(config, family)
    if family is OWN:
        own = {field: getattr(config, field) for field in NAMES if field not in (*KEYS, *TRAINING)}
        return hf | own
    sliding = [w for w in config.windows if w is not None]
    hf["sliding_window"] = sliding[0] if sliding else None
    if "use_sliding_window" in family.defaults:
        hf["use_sliding_window"] = bool(sliding)
    if family.window == "any":
        hf["layer_types"] = ["sliding_attention" if w else "full_attention" for w in config.windows]
    return hf | (load_moe().experts_to_hf(config, family) if config.n_expert else {})

def rope_to_hf(config: Config, family: Family) -> dict:
    """Write the rotary positions; `rope_from_hf` reads them."""
    if config.position != "rope":
        return {}
    how = dict(config.rope_scaling)
    rope = {"rope_type": "default", "rope_theta": config.rope_theta} | how
    hf = {"rope_parameters": rope}
    if "original_max_position_embeddings" in how:
        hf["original_max_position_embeddings"] = how["original_max_position_embeddings"]
    if "partial_rotary_factor" in family.keys.values():
        share = (config.rope_dim or config.head_dim) / config.head_dim
        rope["partial_rotary_factor"] = hf["partial_rotary_factor"] = share
    if "rope_local_base_freq" in family.keys.values():
        local = {"rope_type": "default", "rope_theta": config.rope_local_theta}
        hf["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    return hf

def family_named(hf: dict) -> tuple[Family, str]:
    """Find the family that a config.json names, and the kind of head."""
    name = (hf.get("architectures") or [None])[0]
    if name is None:  # then the first class of that type
        named = {family.model_type: name for name, family in (FAMILIES | load_moe().FAMILIES).items()}
        name = named.get(str(hf.get("model_type")), "?")
    name = str(name)
    head = "score" if name.endswith(SCORE) else "lm"
    name = name.replace(SCORE, "ForCausalLM")
    if hf.get("model_type") == "octavo":
        return OWN, head
    families = FAMILIES if name in FAMILIES else FAMILIES | load_moe().FAMILIES
    check(name in families, f"A {name} cannot be opened; the families are {', '.join(families)}.")
    return families[name], head

def config_from_hf(hf: dict) -> Config:
    """Read the config of a Hugging Face folder; a UserError names what is not supported."""
    family, head = family_named(hf)
    scores = len(hf.get("id2label") or (0, 1))
    check(head == "lm" or scores == 1, f"This model gives {scores} scores to a text; only one is supported.")
    keys = KEYS | family.keys
    hf = family.defaults | hf
    if keys["ffn_dim"] == "n_inner":  # GPT-2's default
        hf["n_inner"] = hf.get("n_inner") or hf.get("n_embd") and 4 * hf["n_embd"]
    missing = [keys[field] for field in ("vocab_size", "seq_len", "n_layer", "n_head", "n_embd", "ffn_dim",
                                         "norm_eps") if hf.get(keys[field]) is None]
    check(not missing, f"config.json does not say {', '.join(missing)}.")
    read = {key for field, key in keys.items() if field not in family.fixed}
    read |= set(NAMES if family is OWN else ())
    for key, neutral in (NEUTRAL | family.neutral).items():
        values = neutral if isinstance(neutral, tuple) else (neutral,)
        value = hf.get(key)
        check(key in read or value is None or value in values,
              f"config.json says {key} {value!r:.60}, which is not supported.")
    fields = {field: hf[key] for field, key in keys.items() if key and hf.get(key) is not None}
    for field in ("pad_id", "eos_id"):
        if fields.get(field) == -1:  # there is none, as early conversions of LLaMA say of padding
            del fields[field]
    n_layer, heads = fields["n_layer"], fields["n_head"]
    for field in ("n_layer", "n_head", "n_embd"):
        check_field(field, fields[field])
    fields = {"head": head, "tie": False, "n_kv_head": heads, "head_dim": fields["n_embd"] // heads} | fields
    fields |= rope_from_hf(hf, family, fields)
    if family is OWN:
        earlier = load_moe().read_earlier(hf["moe"]) if hf.get("moe") else {}
        own = {field: hf[field] for field in NAMES if field in hf and field not in TRAINING}
        return Config(**own | fields | earlier)
    if "n_expert" in keys:
        fields |= load_moe().experts_from_hf(hf, family, fields)
    window = windows_from_hf(hf, family, n_layer)
    return Config(**{"qk_norm": False} | fields | {"window": window} | family.fixed)

def rope_from_hf(hf: dict, family: Family, fields: dict) -> dict:
    """Read the rotary positions, which stand in one of three places."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    check(isinstance(rope, dict), f"config.json says of the rotation {rope!r:.60}; it has to be an object.")
    found = {}
    if "rope_local_base_freq" in family.keys.values():
        local = rope.get("sliding_attention") or {}
        kind = local.get("rope_type", "default")
        check(kind == "default", f"Rotary positions of type {kind!r} in a window's layers are not supported.")
        found["rope_local_theta"] = local.get("rope_theta", hf["rope_local_base_freq"])
        rope = rope.get("full_attention", rope)
    found["rope_theta"] = rope.get("rope_theta", hf.get("rope_theta", 10_000.0))
    for name, theta in found.items():
        check(is_a(theta, float), f"config.json says {name} {theta!r:.60}; it has to be a number.")
        found[name] = float(theta)
    share = rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1))
    partial = "partial_rotary_factor" in family.keys.values()
    check(is_a(share, float) if partial else share in (1, None),
          f"config.json says partial_rotary_factor {share!r:.60}, which is not supported.")
    if partial:
        rotated = int(fields["head_dim"] * share)
        found["rope_dim"] = None if rotated == fields["head_dim"] else rotated
    kind = rope.get("rope_type", rope.get("type")) or "default"
    if "short_factor" in rope:  # Phi-3's folders have called it su and yarn
        kind = "longrope"
    other = ("type", "partial_rotary_factor", "rope_theta")
    how = {name: value for name, value in rope.items() if name not in other}
    needs = SCALING.get(kind, ((), ()))[0] if isinstance(kind, str) else ()
    if "original_max_position_embeddings" in needs:
        inner = how.get("original_max_position_embeddings") or fields["seq_len"]
        original = hf.get("original_max_position_embeddings") or inner
        how["original_max_position_embeddings"] = original
        if kind == "longrope" and is_a(original, int) and original > 0:  # (a run may change seq_len)
            how.setdefault("factor", fields["seq_len"] / original)
    for name in ("mscale", "mscale_all_dim", "finetuned"):  # zero is absent, the last says nothing
        if name in how and (not how[name] or name == "finetuned"):
            del how[name]
    return found | {"rope_scaling": {} if kind == "default" else how | {"rope_type": kind}}

def windows_from_hf(hf: dict, family: Family, n_layer: int) -> tuple[int | None, ...]:
    """Read the window of each layer; older folders say from which layer on they slide, or which do not."""
    width = hf.get("sliding_window")
    off = "use_sliding_window" in family.defaults and not hf["use_sliding_window"]
    if width is None or family.window == "none" or off:
        return ()
    bound = hf.get("max_window_layers", n_layer if family.every else 0)
    if every := hf.get("sliding_window_pattern") or family.every:
        slides = [(i + 1) % every > 0 and i < bound for i in range(n_layer)]
    else:
        slides = [i >= bound for i in range(n_layer)]
    types = ["sliding_attention" if slide else "full_attention" for slide in slides]
    if family.window == "all":
        types = ["sliding_attention"] * n_layer
    elif hf.get("layer_types"):
        types = hf["layer_types"]
    other = set(types) - {"full_attention", "sliding_attention"}
    check(not other, f"Layers of type {', '.join(map(str, other))} are not supported yet.")
    return tuple(width if kind == "sliding_attention" else None for kind in types)

# ---- Tensors as they stand on disk: named, joined and turned as each family does

def hf_name(name: str, config: Config, family: Family | None = None) -> str:
    """Name a tensor as Hugging Face does: norm.weight -> model.norm.weight."""
    family = family or family_of(config)[1]
    if name.startswith(("lm_head.", "score.")):
        return name
    name = f".{name}"
    for ours, theirs in family.renames.items():
        name = name.replace(ours, theirs)
    return family.prefix + name.removeprefix(".")

def on_disk(names, config: Config, family: Family) -> dict[str, list[str]]:
    """List the tensors of a folder -> those of ours that stand in each, one below the other."""
    fused = {part: whole for whole, parts in family.fused.items() for part in parts}
    found = {}
    for name in names:
        parts = hf_name(name, config, family).split(".")
        theirs = ".".join(fused.get(part, part) for part in parts)
        found.setdefault(theirs, []).append(name)
    return found

def to_disk(weights: dict, config: Config) -> dict:
    """Turn tensors by our names into those of the folder."""
    family = family_of(config)[1]
    found = {}
    for theirs, names in on_disk(weights, config, family).items():
        parts = [weights[name].detach().cpu() for name in names]
        parts = [swap_rope_rows(p, n, config, family, back=True) for p, n in zip(parts, names, strict=True)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        found[theirs] = (whole.T if is_transposed(theirs, family) else whole).contiguous()
    return found

def from_disk(tensor, theirs: str, shapes: dict, config: Config, family: Family) -> dict | None:
    """Turn a tensor of the folder into ours, {name: tensor} for {name: shape}; None if they do not fit."""
    tensor = tensor.T if is_transposed(theirs, family) and tensor.dim() == 2 else tensor
    rows = [shape[0] for shape in shapes.values()]
    first = next(iter(shapes.values()))
    wide = tensor.is_floating_point() and tensor.dtype.itemsize > 1  # (fp8 has scales beside it)
    if not wide or tuple(tensor.shape) != (sum(rows), *first[1:]):
        return None
    parts = dict(zip(shapes, tensor.split(rows), strict=True))
    if len(parts) > 1 or not tensor.is_contiguous():  # a part would keep the whole alive
        parts = {name: part.clone(memory_format=torch.contiguous_format) for name, part in parts.items()}
    return {name: swap_rope_rows(part, name, config, family) for name, part in parts.items()}

def is_transposed(theirs: str, family: Family) -> bool:
    return theirs.endswith(tuple(f".{name}.weight" for name in family.transposed))

def swap_rope_rows(weight, name: str, config: Config, family: Family, back: bool = False):
    """Bring the rows that are rotated from pairs of neighbours to halves, where a family has them so."""
    made = ("self_attn.q_proj.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight")
    if not family.interleaved or not name.endswith(made):
        return weight
    R = config.rope_dim
    width = config.kv_rank + R if "kv_a" in name else config.head_dim
    kept, rotated = weight.view(-1, width, weight.shape[1]).split((width - R, R), 1)
    pairs = (2, R // 2) if back else (R // 2, 2)
    rotated = rotated.unflatten(1, pairs).transpose(1, 2).flatten(1, 2)
    return torch.cat((kept, rotated), 1).view_as(weight)

# ---- Saving: all of the old files or all of the new ones

JOURNAL = "state/commit.json"

def save_files(folder: str | Path, files: dict[str, str | Callable | None], remove=()) -> None:
    """Write files so that a kill at any moment leaves all of the old ones or all of the new ones.

    files: name -> a text, a function that writes to the path it is given, or None for what stands as NAME.new
    already. remove: names that go. What else is in the folder, the user's own, stays.

    Each is first written as NAME.new; then a journal that lists them is put in place by one rename; then they
    are renamed, and the journal goes. Cut off before the journal stands, the old files are whole; after it,
    the next reader goes on (`finish_save`).
    """
    folder = Path(folder)
    finish_save(folder)
    journal = json.dumps({"ready": list(files), "remove": list(remove)})
    try:
        for name, content in [*files.items(), (JOURNAL, journal)]:
            path = folder / f"{name}.new"
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True)
            if isinstance(content, str):
                path.write_text(content, encoding="utf-8", newline="\n")
            elif content is not None:
                content(path)
            if path.is_file():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())  # else a power cut after its rename would leave it empty
        os.replace(folder / f"{JOURNAL}.new", folder / JOURNAL)
    except (OSError, SafetensorError) as error:
        for name in [*files, JOURNAL]:
            clear(folder / f"{name}.new")
        raise UserError(f"{folder} could not be written ({error}); what it held before is whole.") from None
    finish_save(folder)

def finish_save(folder: str | Path) -> None:
    """Finish a save that was cut off after its journal stood; every reader of a folder begins so."""
    folder = Path(folder)
    journal = folder / JOURNAL
    end = time.monotonic() + 10 * (env_rank() > 0)
    while time.monotonic() < end and journal.is_file():
        time.sleep(0.05)  # of several ranks the first one does it, unless the disk is this machine's own
    if not journal.is_file():
        return
    record = read_json(journal)
    with reading(journal):
        names = [*map(Path, record["ready"]), *map(Path, record["remove"])]
    outside = [str(name) for name in names if name.is_absolute() or not name.parts or ".." in name.parts]
    check(not outside, f"{journal} names {', '.join(outside)}, outside of its folder: it is not ours.")
    try:
        for name in record["ready"]:
            new = folder / f"{name}.new"
            if new.is_dir():
                clear(folder / name)
            with contextlib.suppress(FileNotFoundError):  # renamed before the cut, or by another process
                os.replace(new, folder / name)
        for name in record["remove"]:
            clear(folder / name)
        journal.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        raise UserError(f"The save into {folder} could not be finished ({error}).") from None
    with contextlib.suppress(OSError):
        journal.parent.rmdir()  # a data folder keeps no state

def clear(path: Path) -> None:
    """Remove a file or a folder of our own, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

@contextlib.contextmanager
def reading(path: str | Path):
    """Turn whatever goes wrong with a file from outside into one sentence that names it."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError,
            SafetensorError) as error:
        raise UserError(f"{path} is damaged or cut off ({type(error).__name__}: {error}).") from None

def read_json(path: Path) -> dict:
    check(path.is_file(), f"{path} is missing.")  # (a pipe of that name would be waited for)
    with reading(path):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    check(isinstance(content, dict), f"{path} cannot be read: it is not a JSON object.")
    return content

def read_tensors(path: Path, device="cpu", names=None) -> Iterator:
    """Read (name, tensor) of a safetensors file, one at a time: of these names, or all."""
    check(path.is_file(), f"{path} is missing.")
    with reading(path), safe_open(path, framework="pt", device=str(device)) as file:
        for name in file.keys() if names is None else names:
            yield name, file.get_tensor(name)

# ---- The checkpoint folder

def render(tokenizer, messages: list[dict], reply: bool = False) -> tuple[list[int], list[bool]]:
    """Turn [{"role", "content"}, ...] into ids -> (ids, did the assistant write it?): `Tokenizer.render`."""
    return tokenizer.render(messages, reply)

def load_tokenize():
    """Load tokenize.py by its path: `import tokenize` gives Python's own module."""
    module = sys.modules.get("octavo_tokenize")
    if module is None:
        path = Path(__file__).with_name("tokenize.py")
        spec = importlib.util.spec_from_file_location("octavo_tokenize", path)
        module = sys.modules["octavo_tokenize"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module

def load_moe():
    """Open the door to moe.py, which only a config with experts does."""
    import moe

    return moe

def load_tokenizer(folder: str | Path):
    """Load a folder's tokenizer."""
    finish_save(folder)
    with reading(Path(folder) / "tokenizer.json"):
        return load_tokenize().Tokenizer.load(folder)

def find_checkpoint(folder: str | Path, shards: bool = False) -> Path:
    """Find the checkpoint in a folder, or say what there is instead. shards: those of a run count too."""
    folder = Path(folder)
    finish_save(folder)
    sharded = any(folder.glob("state/shards/*.safetensors"))
    there = (folder / "config.json").is_file()
    if there and (weight_files(folder) or (shards and sharded)):
        return folder
    check(not (there and sharded),
          f"{folder} holds the shards of a run: python parallel.py export {folder} joins them.")
    pickled = [p.name for p in folder.glob("*.bin") if there]
    check(not pickled, f"{folder} holds its weights as {', '.join(pickled[:1])}, which could run any code: "
          "save them as safetensors (transformers does with save_pretrained).")
    raise UserError(f"{folder} holds no checkpoint (config.json, model.safetensors): train one first.")

def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """Choose the files that hold the weights, as transformers does, and the tensors to take from each.

    model.safetensors; else what the index says, None being all of a file; else shards that have no index.
    """
    whole = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if whole.exists() or not index.is_file():
        return dict.fromkeys([whole] if whole.exists() else sorted(folder.glob("model-*-of-*.safetensors")))
    files = {}
    with reading(index):
        for name, file in read_json(index)["weight_map"].items():
            check(Path(file).name == file, f"{index} names {file}, outside of its folder.")
            files.setdefault(folder / file, []).append(name)
    return files

def save_checkpoint(folder, model, tokenizer: str | Path, *, state=None, weights: dict | None = None) -> None:
    """Write a Hugging Face folder.

    tokenizer: the tokenizer.json to carry along. state: (tensors, JSON object) of a run that can go on.
    weights: by our names, where `model` holds only a rank's share of them.
    """
    weights = dict(weights or model.state_dict())
    if model.config.tie:
        weights.pop("lm_head.weight", None)
    weights = to_disk(weights, model.config)
    broken = [name for name, p in weights.items() if not p.abs().max() < 65504]  # fp16's largest; NaN
    check(not broken, f"Weights are not finite, or too large for fp16 ({', '.join(broken[:1])}): {folder} "
          "keeps what it holds.")
    dtype = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    files = checkpoint_files(model.config, tokenizer, dtype)
    files["model.safetensors"] = lambda path: save_file(weights, path, {"format": "pt"})
    if state is not None:
        files["state/optimizer.safetensors"] = lambda path: save_file(state[0], path)
        files["state/state.json"] = json.dumps(state[1], indent=1) + "\n"
    stale = {"model.safetensors.index.json", "state/shards",
             "state/optimizer.safetensors", "state/state.json"}
    save_files(folder, files, stale - files.keys())

CARRIED = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
           "chat_template.jinja")

def checkpoint_files(config: Config, tokenizer: str | Path, dtype: str = "float32") -> dict[str, str]:
    """Make the texts of a checkpoint folder, all of it but the tensors.

    A tokenizer out of a checkpoint folder brings along what that folder says of tokens, template and
    generation. One out of a data folder gets ours, with the names of those tokens only that it has.
    """
    base = Path(tokenizer).parent
    text = read_tokenizer(tokenizer).decode()
    foreign = (base / "config.json").is_file()
    bos_id = read_json(base / "config.json").get("bos_token_id") if foreign else None
    about = json.dumps(config_to_hf(config) | {"dtype": dtype, "bos_token_id": bos_id}, indent=2) + "\n"
    files = {"config.json": about, "tokenizer.json": text}
    if foreign:
        own = [base / name for name in CARRIED if (base / name).is_file()]
        return files | {path.name: path.read_text(encoding="utf-8") for path in own}
    with reading(tokenizer):
        special = {token["content"] for token in json.loads(text).get("added_tokens", [])}
    names = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>", "mask_token": "<|mask|>"}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.seq_len,
             "clean_up_tokenization_spaces": False}
    about |= {name: token for name, token in names.items() if token in special}
    if "<|im_start|>" in special:
        about["chat_template"] = load_tokenize().CHAT_FORMATS["chatml"][0]
    settings = base / "tokenizer_config.json"
    about |= read_json(settings) if settings.is_file() else {}
    generation = {"eos_token_id": config.eos_id, "pad_token_id": config.pad_id, "do_sample": True,
                  "temperature": 0.7, "top_p": 0.9}
    files["generation_config.json"] = json.dumps(generation, indent=2) + "\n"
    files["tokenizer_config.json"] = json.dumps(about, indent=2) + "\n"
    return files

def load_config(folder: str | Path, shards: bool = False, quantized: bool = False) -> Config:
    """Read config.json, and the ids that end a text from generation_config.json where that names some.

    quantized: the caller knows what sample.py's own quantized folders hold.
    """
    folder = find_checkpoint(folder, shards)
    with reading(folder / "config.json"):
        hf = read_json(folder / "config.json")
        if isinstance(hf, dict) and quantized_kind(hf):
            check(quantized, f"{folder} holds {quantized_kind(hf)} weights, which sample.py alone opens.")
            del hf["quantization_config"]
        config = config_from_hf(hf)
    if (folder / "generation_config.json").is_file():
        eos_id = read_json(folder / "generation_config.json").get("eos_token_id")
        config = config if eos_id is None else config.replace(eos_id=None if eos_id == -1 else eos_id)
    return config

def quantized_kind(hf: dict) -> str | None:
    """Return int8 or int4 where a config.json is one of sample.py's quantized folders, else None."""
    how = hf.get("quantization_config")
    return how.get("kind") if isinstance(how, dict) and how.get("quant_method") == "octavo" else None

def load_model(folder: str | Path, device="cpu", dtype=None, quantizer=None) -> Transformer:
    """Load a model of a supported family from its Hugging Face folder, in evaluation mode.

    quantizer: sample.py's, which makes other modules of some and packs each tensor as it is read.
    """
    config = load_config(folder)
    check_memory(config, torch.device(device), quantizer.itemsize if quantizer else 2)
    with torch.device("meta"):
        model = Transformer(config)
    buffers = dict(model.named_buffers())
    expected = dict(model.named_parameters()) | buffers
    family, _ = family_named(read_json(Path(folder) / "config.json"))
    plan = on_disk(expected, config, family)
    if quantizer is not None:
        quantizer.prepare(model)
    unused = rf"rotary_emb\.inv_freq$|{family.ignored.format(n_layer=config.n_layer)}"
    unused += "|^lm_head.weight$" if config.tie else ""
    found = {}
    for path, wanted in weight_files(Path(folder)).items():
        for name, tensor in read_tensors(path, device, wanted):
            theirs = name if name in plan else family.prefix + name  # some files leave it out
            if theirs not in plan and re.search(unused, name):
                continue
            check(theirs in plan, f"{path} holds a tensor {name!r} that its config.json has no place for.")
            shapes = {ours: tuple(expected[ours].shape) for ours in plan[theirs]}
            parts = from_disk(tensor, theirs, shapes, config, family)
            check(parts, f"{path}: {name} is {tensor.dtype} {tuple(tensor.shape)}, not floats of "
                  f"{', '.join(map(str, shapes.values()))}, 16 bits or wider.")
            again = parts.keys() & found.keys()
            check(not again, f"{path} holds {name} once more: which of the files are the weights?")
            for ours, part in parts.items():  # the routers' biases decide near ties: they stay float32
                if ours in buffers:
                    found[ours] = part.float()
                elif quantizer is not None:
                    found |= quantizer.pack(ours, part, dtype or part.dtype)
                else:
                    found[ours] = part.to(dtype or part.dtype)
    missing = sorted(expected.keys() - found.keys())
    check(not missing, f"{folder} lacks {len(missing)} tensors, {', '.join(missing[:1])} among them.")
    model.load_state_dict(found, strict=False, assign=True)
    model.tie_weights()
    return model.eval()

def check_memory(config: Config, device: torch.device, itemsize: float) -> None:
    """Refuse a model whose weights alone, at so many bytes each, are larger than the memory."""
    need = count_weights(config)[0] * itemsize
    if device.type == "cuda":
        have = torch.cuda.get_device_properties(device).total_memory
    elif hasattr(os, "sysconf"):
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        return  # Windows says it in another way
    check(need < have, f"The model's weights are {need / 2**30:.3g} GiB, the memory {have / 2**30:.3g} GiB.")

def load_state(folder: str | Path) -> tuple[dict, dict]:
    """Load what a run needs to go on exactly: (optimizer tensors by name, JSON object)."""
    state = saved_state(folder)
    path = find_checkpoint(folder) / "state" / "optimizer.safetensors"
    tensors = dict(read_tensors(path))
    updates = state["at"] - state["skipped"]
    check(tensors or not updates, f"{path} is empty: start anew, or copy back what belongs there.")
    return tensors, state

# What every run says of itself, and below what some do.
STATE = {"at": int, "finished": bool, "command": str, "scale": float, "good": int, "skipped": int}
STATE_OF_SOME = {"taken": list[int], "best": float | None, "waited": int, "noise": list[float],
                 "kl_coef": float}

def saved_state(folder: str | Path) -> dict:
    """Read what a folder says of its run: the step, the options, the positions in the data."""
    path = find_checkpoint(folder, shards=True) / "state" / "state.json"
    check(path.is_file(), f"{folder} is a finished model without the state of its run: it cannot be resumed.")
    state = read_json(path)
    kinds = STATE | {name: kind for name, kind in STATE_OF_SOME.items() if name in state}
    wrong = [name for name, kind in kinds.items() if not fits(state.get(name), kind)]
    wrong += ["options"] * (not isinstance(state.get("options"), dict))
    if not wrong:
        wrong += ["a step that was done"] * (state["at"] < 0)
        wrong += ["taken"] * (min(state.get("taken", []), default=0) < 0)
        wrong += ["noise"] * (len(state.get("noise", [0, 0, 0])) != 3)
    check(not wrong, f"{path} does not say {', '.join(wrong)} of its run: it cannot be resumed.")
    return state

# ---- The data folder

class Tokens:
    """Read one split of a data folder: windows of T tokens and the token after each.

    The text is a circle (the last document's end is followed by the first document), cut into windows anew in
    each epoch from a random starting point, and the windows come in a random order. Both depend on (seed,
    epoch) alone, so a position, the number of windows taken so far, says exactly what comes next, for any
    batch size and any number of ranks; and each token is a target once an epoch.
    """

    def __init__(self, folder: str | Path, split: str):
        finish_save(folder)
        self.folder = Path(folder)
        self.path = self.folder / f"{split}.bin"
        self.meta = read_json(self.folder / "meta.json")
        with reading(self.folder / "meta.json"):
            self.dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[self.meta["dtype"]])
            self.n = int(self.meta["splits"][split]["tokens"])
            self.bytes = int(self.meta["splits"][split]["bytes"])
            self.vocab_size = int(self.meta["vocab_size"])
            self.eot_id = int(self.meta["eot_id"])
        check(0 <= self.eot_id < self.vocab_size, f"{folder}/meta.json says eot_id {self.eot_id}, beyond its "
              f"vocabulary of {self.vocab_size}: prepare it anew.")
        check(self.path.is_file(), f"{self.path} is missing: run tokenize.py prepare again.")
        self.file = open(self.path, "rb")
        size = os.fstat(self.file.fileno()).st_size
        check(size == self.n * self.dtype.itemsize, f"{self.path} is cut off: {size} bytes, where meta.json "
              f"counts {self.n} tokens of {self.dtype.itemsize}; run tokenize.py prepare again.")
        check(self.n >= 2, f"{self.path} has {self.n} tokens, too few to predict one: prepare more text.")

    def read(self, start: int, count: int) -> np.ndarray:
        """Read tokens [start, start + count) of the circle. Not mapped: a shrunken file would be a crash."""
        start %= self.n
        head = min(count, self.n - start)
        self.file.seek(start * self.dtype.itemsize)
        ids = np.frombuffer(self.file.read(head * self.dtype.itemsize), dtype=self.dtype)
        check(len(ids) == head, f"{self.path} became shorter while it was read: restore it, then --resume.")
        largest = int(ids.max(initial=0))
        check(largest < self.vocab_size, f"{self.path} holds token {largest}, beyond the vocabulary of "
              f"{self.vocab_size}: prepare it anew.")
        return ids if head == count else np.concatenate([ids, self.read(0, count - head)])

    def rows(self, starts, counts, T: int, B: int):
        """Read windows -> inputs, targets (B, T), of each window so many targets as `counts` says."""
        x = np.full((B, T), self.eot_id, np.int64)
        y = np.full((B, T), IGNORE, np.int64)
        for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
            ids = self.read(int(start), T + 1)
            x[row] = ids[:-1]
            y[row, :count] = ids[1 : count + 1]
        return torch.from_numpy(x), torch.from_numpy(y)

    def batch(self, position: int, count: int, T: int, seed: int = 0):
        """Read windows position .. position + count of the endless order -> inputs, targets (count, T)."""
        starts, counts = [], []
        for i in range(position, position + count):
            epoch, i = divmod(i, self.windows(T))  # which epoch, and which window of it
            offset, order = self.order(epoch, T, seed)
            starts.append(offset + int(order[i]) * T)
            counts.append(min(T, self.n - int(order[i]) * T))  # the last window runs on into the first
        return self.rows(starts, counts, T, count)

    def windows(self, T: int) -> int:
        """Count the windows of an epoch."""
        return -(-self.n // T)

    @functools.lru_cache(maxsize=64)  # noqa: B019 (one a source; they live as long as the process)
    def order(self, epoch: int, T: int, seed: int) -> tuple[int, np.ndarray]:
        """Draw an epoch's starting point and the order of its windows."""
        rng = np.random.default_rng([seed, epoch])
        return int(rng.integers(T)), rng.permutation(self.windows(T))

    def in_order(self, T: int, B: int, limit: int | None = None, rank: int = 0, world: int = 1):
        """Read the text from its first token to its last, each a target once: batches (inputs, targets).

        limit: about how many tokens, as evenly spread windows, the same ones at every call. All batches have
        B rows and all ranks the same number of them (rows without a target fill up): a rank that has none
        left would let the others wait, and a batch of another size would be compiled anew.
        """
        starts = np.arange(0, self.n - 1, T)
        if limit and limit < self.n:
            starts = starts[np.linspace(0, len(starts) - 1, max(1, limit // T)).astype(int)]
        share = -(-len(starts) // world)
        starts = starts[rank::world]
        B = min(B, share)
        for i in range(0, share, B):
            some = starts[i : i + B]
            yield self.rows(some, np.minimum(T, self.n - 1 - some), T, B)

    def documents(self, x):
        """Number the document of each token in its row: (B, T) -> (B, T); a document's end belongs to it."""
        ends = (x == self.eot_id).int()
        return ends.cumsum(1) - ends

    @functools.cached_property
    def token_bytes(self) -> torch.Tensor:
        """Count the bytes of text that each id stands for (V,); 0 for special tokens, which nobody wrote."""
        tokenizer = load_tokenizer(self.folder)
        special = set(tokenizer.special.values())
        return torch.tensor([0 if i in special else len(b) for i, b in enumerate(tokenizer.token_bytes)])

def open_data(specs) -> tuple[list[Tokens], list[Tokens], list[float]]:
    """Open FOLDER or FOLDER:WEIGHT, several -> training splits, validation splits, weights."""
    folders, weights = [], []
    check(specs, "--data names no folder.")
    for spec in specs:
        found = re.fullmatch(r"(.+?)(?::(\d*\.?\d+))?", spec)
        fine = found and 0 < float(found[2] or 1) < math.inf
        check(fine, f"--data {spec!r}: write FOLDER or FOLDER:WEIGHT, above 0.")
        folder, weight = found.groups("1")
        check(Path(folder).is_dir(), f"There is no data folder {folder}: name it with --data; tokenize.py "
              "prepare makes one.")
        folders.append(folder)
        weights.append(float(weight))
    check(len({read_tokenizer(f"{folder}/tokenizer.json") for folder in folders}) == 1,
          "The data folders have different tokenizers: prepare them with the same --tokenizer.")
    return [Tokens(f, "train") for f in folders], [Tokens(f, "val") for f in folders], weights

def read_tokenizer(path: str | Path) -> bytes:
    check(Path(path).is_file(), f"{path} is missing: prepare the data again, or copy what belongs there.")
    return Path(path).read_bytes()

def fingerprint(sources: list[Tokens]) -> list:
    """Note enough of data folders to notice that one is not what it was: size, tokenizer, 64 stretches."""
    found = []
    for t in sources:
        places = np.linspace(0, t.n - 1, 64).astype(int)
        sample = seed_of(*(t.read(int(i), min(2**16, t.n)).tobytes() for i in places))
        found.append([t.n, sample, seed_of(read_tokenizer(t.folder / "tokenizer.json"))])
    return found

class Batches:
    """Give a rank its micro-batches of each step, read one step ahead.

    The windows of a step are drawn from the sources by weight, as (seed, step) say, the same on all ranks;
    each source comes in its own seeded order. `taken`, the windows of each source so far, is all that a run
    remembers of its data. change: (x, y, rows) -> (x, y), an objective's own (train.mask_tokens).
    """

    def __init__(self, sources, weights, o, T: int, device, rank=0, world=1, taken=None, change=None):
        self.sources, self.o, self.T, self.device = sources, o, T, device
        self.rank, self.world, self.change = rank, world, change
        self.share = np.array(weights) / sum(weights)
        self.taken = list(taken or [0] * len(sources))
        check(len(self.taken) == len(sources), f"The run has read {len(self.taken)} sources of data.")
        self.pool = ThreadPoolExecutor(1)
        self.ahead = (None, None)  # the step that is being read, and its future

    def read(self, step: int, taken: list[int]):
        """Read a rank's part of a step -> [(inputs, targets, documents)], windows of all ranks, `taken`."""
        o, taken = self.o, list(taken)
        count = o.tokens_per_step // self.T
        rng = np.random.default_rng([o.seed, step])
        plan = []  # (source, position in its order) of each window of the global batch
        for source in rng.choice(len(self.share), count, p=self.share).tolist():
            plan.append((source, taken[source]))
            taken[source] += 1
        mine = plan[self.rank * count // self.world : (self.rank + 1) * count // self.world]
        batches = []
        for rows in (mine[i : i + o.micro_batch] for i in range(0, len(mine), o.micro_batch)):
            windows = [self.sources[source].batch(position, 1, self.T, o.seed) for source, position in rows]
            x, y = (torch.cat(parts) for parts in zip(*windows, strict=True))
            documents = self.sources[0].documents(x) if o.doc_mask else None
            if self.change:
                x, y = self.change(x, y, rows)
            batches.append((x, y, documents))
        return batches, count, taken

    def at(self, step: int):
        """Give this rank's micro-batches of a step, and how many targets and windows all ranks have in it."""
        if self.ahead[0] != step:
            self.ahead = (step, self.pool.submit(self.read, step, self.taken))
        batches, windows, self.taken = self.ahead[1].result()
        self.ahead = (step + 1, self.pool.submit(self.read, step + 1, self.taken))
        targets = torch.tensor(float(sum((y != IGNORE).sum() for _, y, _ in batches)), device=self.device)
        return self.move(batches), sum_over_ranks(targets), windows

    def move(self, batches):
        """Send micro-batches to the device; to a GPU from pinned memory, while it computes."""
        if self.device.type == "cuda":
            batches = [tuple(t if t is None else t.pin_memory() for t in batch) for batch in batches]
        return [tuple(t if t is None else t.to(self.device, non_blocking=True) for t in b) for b in batches]

@torch.no_grad()
def evaluate(model, tokens: Tokens, T: int, B: int = 16, limit: int | None = None, *, forward=None,
             share=None, doc_mask: bool = False) -> dict:
    """Measure {"val_loss": nats per token, "val_bpb": bits per byte of text, "val_tokens"}, whatever trains.

    forward: (inputs, targets, documents) -> loss per token, the model's own by default. Sums over all ranks;
    share: which part of the text is this rank's, (rank, world), where ranks that split a model read the same.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    rank, world = share or rank_and_world()
    total = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    for x, y in tokens.in_order(T, B, limit, rank, world):
        xd, yd = x.to(device), y.to(device)
        documents = tokens.documents(xd) if doc_mask else None
        losses = forward(xd, yd, documents) if forward else model(xd, yd, doc_ids=documents)[0]
        real = y[y != IGNORE]
        total += torch.tensor([losses.cpu().double().sum(), len(real), tokens.token_bytes[real].sum()])
    total = sum_over_ranks(total)
    model.train(was_training)
    nats, count, size = (total / (rank_and_world()[1] / world)).tolist()
    return {"val_loss": nats / count, "val_bpb": nats / math.log(2) / max(size, 1), "val_tokens": int(count)}

def evaluate_mixture(evaluate_one: Callable, sources: list[Tokens], weights) -> dict:
    """Evaluate each source -> the means by weight of what `evaluate_one` finds, and each source's loss."""
    results = [evaluate_one(tokens) for tokens in sources]
    share = np.array(weights) / sum(weights)
    total = {name: float(share @ [r[name] for r in results]) for name in results[0]}
    total["val_tokens"] = sum(r["val_tokens"] for r in results)
    if len(sources) > 1:
        names = [t.folder.name for t in sources]
        names = names if len(set(names)) == len(names) else [str(t.folder) for t in sources]
        total |= {f"val_loss_{name}": r["val_loss"] for name, r in zip(names, results, strict=True)}
    return total


# ------------------------------------------------------------------------------------------------------------
# Part III: the run
# ------------------------------------------------------------------------------------------------------------


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

def pick_device(name: str = "auto") -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    known = name.split(":")[0] in ("cpu", "cuda", "mps")
    check(known, f"--device is auto, cpu, cuda or mps; not {name!r}.")
    try:
        return torch.zeros(1, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"Device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None

def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Choose the precision of activations and products; auto: bf16 where the machine multiplies it faster."""
    check(name in (*DTYPES, "auto"), f"--dtype is one of auto, {', '.join(DTYPES)}; not {name!r}.")
    if name in DTYPES:
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    fast = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()  # public from 2.13 on
    return torch.bfloat16 if device.type == "cpu" and fast else torch.float32

def synchronize(device: torch.device) -> None:
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()

def peak_flops(device: torch.device, dtype: torch.dtype, seconds: float = 0.15) -> float:
    """Measure the FLOP/s of the best large matrix product on this machine, now: the denominator of MFU."""
    n = 8192 if device.type == "cuda" else 256 if dtype == torch.float16 and device.type == "cpu" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times = []
    end = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:  # the first one warms up
        synchronize(device)
        start = time.perf_counter()
        a @ b
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times[1:])

@dataclass
class Ranks:
    """Tell where this process stands among those that torchrun started; one of one without it."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

def setup_distributed(device: str = "auto", timeout: float = 600, **more) -> Ranks:
    """Join torchrun's process group: NCCL for CUDA's tensors, gloo for the CPU's.

    timeout: seconds after which a rank that does not answer counts as dead.
    """
    if "RANK" not in os.environ:
        return Ranks(device=pick_device(device))
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
    missing = [name for name in names if name not in os.environ]
    check(not missing, f"RANK is set, and {', '.join(missing)} not: start several processes with torchrun.")
    numbers = [os.environ[name] for name in names[:4]]
    fine = all(re.fullmatch(r"\d{1,9}", n) for n in numbers) and int(numbers[0]) < int(numbers[2])
    fine = fine and int(numbers[3]) < 2**16
    check(fine, f"{', '.join(names[:4])} are {', '.join(numbers)}: start several processes with torchrun.")
    rank, local, world, _ = map(int, numbers)
    if device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(local)  # before the first tensor: else every rank opens a context on GPU 0
        device = f"cuda:{local}"
    picked = pick_device("cpu" if device == "auto" else device)  # gloo moves no tensors of Apple's GPU
    if not torch.distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if picked.type == "cuda" else "gloo"
        torch.distributed.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout), **more)
    return Ranks(rank, world, picked)

def env_rank() -> int:
    """Read this process's rank as torchrun says it; 0 without torchrun, and where RANK is no number."""
    rank = os.environ.get("RANK", "0")
    return int(rank) if rank.isdecimal() else 0

def rank_and_world() -> tuple[int, int]:
    dist = torch.distributed
    there = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if there else (0, 1)

def sum_over_ranks(x):
    """Add up a tensor over all ranks, in place where there are several."""
    if rank_and_world()[1] > 1:
        torch.distributed.all_reduce(x)
    return x

def barrier() -> None:
    sum_over_ranks(torch.zeros(1))  # over gloo, which is there beside NCCL too

class Optimizer:
    """Show one or two of torch.optim's optimizers as one; its state is keyed by parameter name."""

    def __init__(self, named: dict[str, nn.Parameter], parts: list[torch.optim.Optimizer]):
        self.parts = parts
        self.names = {p: n for n, p in named.items()}

    def set_lr(self, lr: float) -> None:
        for group in (group for part in self.parts for group in part.param_groups):
            group["lr"] = lr

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict:
        """Give {"layers.0.mlp.up_proj.weight/exp_avg": tensor, ...}."""
        return {f"{self.names[p]}/{key}": torch.as_tensor(value).cpu().contiguous()
                for part in self.parts for p, state in part.state.items() for key, value in state.items()}

    def load_state_dict(self, tensors: dict) -> None:
        """Take the state that `state_dict` gave; before the first step there is none."""
        for part in self.parts:
            muon = isinstance(part, torch.optim.Muon)
            names = ["momentum_buffer"] if muon else ["exp_avg", "exp_avg_sq", "step"]
            found = set()  # the names of state that a parameter has: all of them, or none of any parameter
            for p in (p for group in part.param_groups for p in group["params"]):
                name = self.names[p] + "/"
                own = {key.removeprefix(name): v for key, v in tensors.items() if key.startswith(name)}
                found.add(tuple(sorted(own)))
                fits = all(v.dtype == p.dtype and v.shape == (() if key == "step" else p.shape)
                           for key, v in own.items())
                check(fits and found in ({()}, {tuple(names)}),
                      f"The optimizer's state of {name} does not fit: start anew.")
                part.state[p] = {key: v.to(p.device) for key, v in own.items()}

def build_optimizer(model, name="muon", lr=1e-3, weight_decay=0.1, betas=(0.9, 0.95), stand_ins=None):
    """Build AdamW for all parameters; or Muon for the layers' matrices and AdamW for the rest.

    Weight decay acts on matrices only. Muon's update is scaled to the root mean square of AdamW's (Liu et al.
    2025, 2502.16982, eq. 4), so that one learning rate serves both. stand_ins: {name: tensor to update in the
    parameter's place, or None where another rank does} (parallel.py).
    """
    check(name in ("adamw", "muon"), f"--optimizer is adamw or muon, not {name!r}.")
    named = {n: p for n, p in model.named_parameters() if p.requires_grad} | (stand_ins or {})
    named = {n: p for n, p in named.items() if p is not None}
    matrices = [p for n, p in named.items() if p.dim() > 1 and n.startswith("layers.")]
    tables = [p for n, p in named.items() if p.dim() > 1 and not n.startswith("layers.")]
    vectors = [p for p in named.values() if p.dim() < 2]
    parts = []
    if name == "muon" and matrices:
        parts.append(torch.optim.Muon(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw"))
        matrices = []
    groups = [{"params": tables + matrices, "weight_decay": weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    parts.append(torch.optim.AdamW(groups, lr, betas, eps=1e-10, fused=True))
    return Optimizer(named, parts)

def lr_at(step: int, max_steps: int, warmup_steps: int, schedule="cosine", min_lr: float = 0.1) -> float:
    """Compute the fraction of the peak learning rate at a step, 0-based; it ends at min_lr.

    Warm-up is linear. Then cosine (Loshchilov & Hutter 2016, 1608.03983), or warm-up-stable-decay (Hu et al.
    2024, 2404.06395): constant, and in the last 40 % a straight line down. "constant" stays.

    >>> [round(lr_at(s, 100, 10), 2) for s in (0, 9, 54, 99)]
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

# ---- Options: declared once, as the command's, the run's record, and what a test builds

def opt(panel: str, help: str, *names: str, low=0, above=None, one_of=None, **more):
    """Declare an option with its range: Annotated[int, opt("Run", "Steps.", low=1)] = 6.

    The command line checks the range, and so does a dataclass of options, whoever builds it.
    """

    def check_typed(param: typer.CallbackParam, value):
        check_range(param.opts[-1], value, option)
        return value

    more = {"callback": check_typed, "rich_help_panel": panel or None} | more
    option = typer.Option(*names, help=help, **more)
    option.limits = (low, above, one_of)
    return option

def check_range(name: str, value, option) -> None:
    """Refuse what is below an option's range, not among its choices, or larger than makes sense anywhere."""
    low, above, one_of = option.limits
    if isinstance(value, (int, float)):
        enough = value >= low if above is None else value > above
        words = f"at least {low}" if above is None else f"above {above}"
        check(enough and abs(value) < 2**31, f"{name} is {value}; it has to be {words}, and below 2^31.")
    if one_of and value is not None:
        check(value in one_of, f"{name} is one of {', '.join(one_of)}; not {value!r}.")

def restore(ctx: typer.Context, folder: str | None):
    """Make the options of the run in `folder` the defaults of this command line: what is typed wins."""
    if folder:
        ctx.default_map = saved_state(folder)["options"] | {"out": folder}
    return folder

SETTING = opt("", "")  # of a field that is no option

@dataclass
class RunOptions:
    """Hold what every training command is told; the checkpoint keeps it, for --resume.

    A field without an option is a setting that is seldom changed: `--set grad_clip=0.5` reaches it.
    """

    command: ClassVar[str] = "pretrain"  # a run goes on with the command that began it
    changeable: ClassVar[set] = {  # by a run that goes on
        "max_steps", "device", "micro_batch", "save_interval", "eval_interval", "eval_tokens", "recompute",
        "target_loss", "patience", "resume", "overwrite", "out", "data"}  # (what data holds is compared)
    out: Annotated[str, opt("Run", "Checkpoint folder to write.")] = "out/python"
    max_steps: Annotated[int, opt("Run", "Optimizer steps: more learn more and take longer.", low=1)] = 1000
    eval_interval: Annotated[int, opt("Run", "Steps between evaluations.", low=1)] = 250
    save_interval: Annotated[int, opt("Run", "Steps between checkpoints.", low=1)] = 250
    seed: Annotated[int, opt("Run", "Of the weights and the order of the data.", low=0)] = 0
    resume: Annotated[str | None, opt("Run", "Go on with the run in this folder, exactly.", is_eager=True,
                                      callback=restore)] = None
    overwrite: Annotated[bool, opt("Run", "Begin again where --out holds a run.", "--overwrite")] = False
    optimizer: Annotated[str, opt("Optimizer", "muon (matrices; AdamW on the rest) or adamw.",
                                  one_of=("muon", "adamw"))] = "muon"
    lr: Annotated[float, opt("Optimizer", "Peak learning rate: larger is faster, or breaks.", above=0)] = 1e-2
    warmup_steps: Annotated[int, opt("Optimizer", "Steps of linear warm-up.", low=0)] = 30
    schedule: Annotated[str, opt("Optimizer", "wsd (stable, then a line down), cosine or constant.",
                                 one_of=("wsd", "cosine", "constant"))] = "wsd"
    dtype: Annotated[str, opt("Machine", "auto, fp32, bf16 or fp16.", one_of=("auto", *DTYPES))] = "auto"
    device: Annotated[str, opt("Machine", "auto, cpu, cuda or mps.")] = "auto"
    set: Annotated[list[str], opt("Model", "FIELD=VALUE, several times: a size of the model (n_kv_head=2, "
                                  "n_expert=8, window=128) or a setting (grad_clip=1, min_lr=0.1).")] = ()
    min_lr: float = 0.1  # where the schedule ends, as a fraction of lr
    weight_decay: float = 0.1  # of matrices only
    grad_clip: float = 1.0  # largest norm of the gradient

    def __post_init__(self):
        """Apply --set to the settings, and refuse what is out of range."""
        types = {f.name: f.type for f in dataclasses.fields(self)}
        options = {name: getattr(kind, "__metadata__", [SETTING])[0] for name, kind in types.items()}
        self.fields_set = {}  # the rest of --set: fields of Config
        check(fits(self.set, list[str]), f"--set is {self.set!r}; it has to be a list of FIELD=VALUE.")
        for item in self.set:
            name, equals, value = item.partition("=")
            free = options.get(name, SETTING) is SETTING
            check(equals and free, f"--set {item}: write FIELD=VALUE; options are no fields.")
            with contextlib.suppress(ValueError):
                value = json.loads(value)
            if name in options:
                setattr(self, name, value)
            else:
                self.fields_set[name] = value
        for name, option in options.items():
            value = getattr(self, name)
            flag = "--" + name.replace("_", "-") if option is not SETTING else f"--set {name}"
            declared = getattr(types[name], "__origin__", types[name])
            check(fits(value, declared), f"{flag} is {value!r}; it has to be a {kind_of(declared).__name__}.")
            check_range(flag, value, option)
        check(self.grad_clip > 0, "--set grad_clip=0 would make every gradient zero; 1e9 never clips.")
        check(self.min_lr <= 1, f"--set min_lr={self.min_lr}: it is a fraction of --lr, at most 1.")

@dataclass
class TrainOptions(RunOptions):
    """Hold what pretraining is told, on one device (train.py) or on many (parallel.py)."""

    data: Annotated[list[str], opt("Data", "Folder, or FOLDER:WEIGHT; several are mixed.")] = ("data/python",)
    tokens_per_step: Annotated[int, opt("Data", "Tokens of a step, over all ranks.", low=1)] = 4096
    micro_batch: Annotated[int | None, opt("Data", "Sequences at once: memory and speed only.", low=1)] = None
    preset: Annotated[str, opt("Model", f"{', '.join(OURS)}; or a published size.", one_of=PRESETS)] = "micro"
    n_layer: Annotated[int | None, opt("Model", "Layers, instead of the preset's.", low=1)] = None
    n_embd: Annotated[int | None, opt("Model", "Width; heads and feed-forward follow it.", low=1)] = None
    seq_len: Annotated[int | None, opt("Model", "Context in tokens.", low=1)] = None
    init: Annotated[str | None, opt("Model", "Start from the weights of this checkpoint folder.")] = None
    compile: Annotated[str, opt("Machine", "auto (when the run is long enough to win), on or off.",
                                one_of=("auto", "on", "off"))] = "auto"
    recompute: Annotated[bool, opt("Machine", "Less memory, a quarter more time.", "--recompute")] = False
    eval_tokens: int = 100_000  # validation tokens of each evaluation but the last, which takes all; 0: all
    doc_mask: bool = False  # tokens see their own document only

def command(kind: type, main: Callable) -> Callable:
    """Make `main(o)` a typer command whose options are those of the dataclass `kind`."""

    def run(**values):
        folder = values.get("resume")
        return main(resumed(kind, folder, **values) if folder else kind(**values))

    parameters = inspect.signature(kind).parameters.values()
    run.__signature__ = inspect.Signature([p for p in parameters if hasattr(p.annotation, "__metadata__")])
    run.__doc__ = main.__doc__
    return run

def resumed(kind: type, folder: str | Path, **changes):
    """Build the options that go on with the run in `folder`: its own, where `kind` has them, and changes."""
    state = saved_state(folder)
    same = state.get("command") == kind.command
    check(same, f"{folder} was made by another command or an earlier version: it cannot be resumed here.")
    names = {f.name for f in dataclasses.fields(kind)}
    saved = {name: value for name, value in state["options"].items() if name in names}
    return kind(**saved | {"out": str(folder)} | changes | {"resume": str(folder)})

def open_run(o: RunOptions) -> dict:
    """Check --out, or what --resume may not change -> the state of the run to go on with, or {}."""
    if not o.resume:
        check_out(Path(o.out), o.overwrite, getattr(o, "init", None), getattr(o, "model", None))
        return {}
    state = saved_state(o.resume)
    same = Path(o.out).resolve() == Path(o.resume).resolve()
    check(same, f"A run goes on in its own folder: copy {o.resume} to {o.out} and --resume that.")
    for name, value in json.loads(json.dumps(dataclasses.asdict(o))).items():
        same = name in o.changeable or state["options"].get(name, value) == value
        check(same, f"--{name.replace('_', '-')} cannot change on --resume: start a run of its own (--out).")
    left = not state["finished"] or o.max_steps > state["at"]
    check(left, f"{o.resume} is finished: nothing to resume (a larger --max-steps trains it further).")
    return state

def check_out(out: Path, overwrite: bool, *read: str | Path | None) -> None:
    """Refuse to lose what exists: a run's folder needs --overwrite, anything else is never written into, nor
    is a folder that is read."""
    name = str(out)
    check("\0" not in name and name == name.encode(errors="ignore").decode(),
          f"{out!s:.100} is no name for a folder in UTF-8 text: choose another --out.")
    finish_save(out)
    check(out.resolve() not in [Path(folder).resolve() for folder in read if folder],
          f"{out} is what it begins with, and would be replaced: choose another folder to write.")
    if (out / "config.json").exists():
        check(overwrite, f"{out} holds a run already: --resume {out} goes on, --overwrite begins again.")
    else:
        # what a first save that was cut off left behind is in nobody's way
        free = not out.is_file() and all(p.is_dir() or p.suffix == ".new" for p in out.rglob("*"))
        check(free, f"{out} exists and is not a checkpoint folder: choose another --out.")

def default_data(folders, ranks: Ranks) -> None:
    """Let tokenize.py make the embedded data set where it is asked for and is missing."""
    folder = TrainOptions.data[0]
    if folder in folders and not Path(folder).exists() and ranks.rank == 0:
        say(f"No data in {folder}: preparing the sources of this Python (python tokenize.py prepare), once.")
        line = [sys.executable, str(Path(__file__).with_name("tokenize.py")), "prepare", "--output", folder]
        check(subprocess.run(line).returncode == 0, "tokenize.py prepare failed; its words above say why.")
    barrier()

def make_config(o: TrainOptions, tokens: Tokens, saved: bool = False, **fields) -> Config:
    """Make the config of a run: the preset's with other sizes, that of --init, or of the run that goes on."""
    ids = {"vocab_size": round_up(tokens.vocab_size), "eos_id": tokens.eot_id}
    free = set(NAMES) - {*ids, "pad_id", "head", "causal"}
    unknown = [name for name in o.fields_set if name not in free]
    check(not unknown, f"--set {', '.join(unknown)}: neither Config nor the run has such a field to set.")
    training = {name: value for name, value in o.fields_set.items() if name in TRAINING}
    if saved:
        return load_config(o.out, shards=True).replace(**training)
    if not o.init:
        ids["pad_id"] = load_tokenizer(tokens.folder).pad_id
        return resize(o.preset, o.n_layer, o.n_embd, o.seq_len, **fields | ids | o.fields_set)
    sizes = [n for n in ("preset", "n_layer", "n_embd") if getattr(o, n) != getattr(TrainOptions, n)]
    changes = {name: value for name, value in o.fields_set.items() if name in (*TRAINING, *CONTEXT)}
    sizes += o.fields_set.keys() - changes.keys()
    check(not sizes, f"{', '.join(sizes)} cannot be chosen: the sizes are those of --init {o.init}.")
    config = load_config(o.init)
    check(config.head == "lm", f"--init {o.init} is a reward model: it gives scores, and no next token.")
    texts = {read_tokenizer(Path(folder, "tokenizer.json")) for folder in (o.init, tokens.folder)}
    check(len(texts) == 1, f"{o.init} and {tokens.folder} have "
          f"different tokenizers: give tokenize.py prepare the --tokenizer {o.init}/tokenizer.json.")
    seq_len = o.seq_len or config.seq_len
    check(config.position != "learned" or seq_len == config.seq_len,
          f"--seq-len {seq_len} cannot be chosen: {o.init} has learned {config.seq_len} places.")
    return config.replace(seq_len=seq_len, **changes)

def derive(o: TrainOptions, config: Config, world: int, device: torch.device) -> None:
    """Fill in the options that follow from the rest; world: how many ranks read different tokens."""
    check_memory(config, device, 4 / rank_and_world()[1])  # the least that a rank holds
    windows = o.tokens_per_step // config.seq_len
    near = config.seq_len * world * max(1, round(windows / world))
    whole = o.tokens_per_step % (config.seq_len * world) == 0
    check(windows and whole, f"--tokens-per-step {o.tokens_per_step} does not divide into "
          f"sequences of {config.seq_len} on {world} process{'es' * (world > 1)}: {near} does.")
    check(windows <= 2**20, f"--tokens-per-step {o.tokens_per_step} is {windows} sequences of "
          f"{config.seq_len}: a million make a step at most.")
    if o.micro_batch is None:  # 8k tokens keep a CPU busy; a GPU takes what its memory allows
        o.micro_batch = max(1, (8192 if device.type == "cpu" else 32768) // config.seq_len)
    if o.compile == "auto":  # it starts in some 40 s and wins 10 % of a step on CPU, a third on CUDA
        flops = flops_per_token(config) * o.tokens_per_step * o.max_steps  # (a resumed run decides the same)
        o.compile = "on" if flops > {"cpu": 3e14, "cuda": 2e16}.get(device.type, math.inf) else "off"
    o.dtype = {dtype: name for name, dtype in DTYPES.items()}[pick_dtype(o.dtype, device)]

# ---- The loop around a step

def clip_gradients(parameters, limit: float, scale: float = 1.0):
    """Undo the loss scale of fp16 and clip the gradient's norm to `limit` -> the norm before."""
    parameters = [p for p in parameters if p.grad is not None]
    if scale != 1.0:
        torch._foreach_div_([p.grad for p in parameters], scale)
    return torch.nn.utils.clip_grad_norm_(parameters, limit)

class Run:
    """Do what surrounds the steps: clock, progress, log, Ctrl-C, evaluations and saves when they are due.

        for step, lr in run.steps():
            (loss * run.scale).backward()
            grad_norm = clip_gradients(model.parameters(), o.grad_clip, run.scale)
            run.update(optimizer, lr, loss=loss, grad_norm=grad_norm, tokens=n)

    save(folder, state)   writes a checkpoint; state: the run's own part of what --resume needs
    evaluate(last)        measures -> {name: number}, with "stop": a sentence if the run has to end here
    saved                 the state of the checkpoint that the run goes on from, {} for a new run
    flops                 FLOPs a token, for mfu; 0: not logged
    """

    def __init__(self, o: RunOptions, ranks: Ranks, save, evaluate, saved: dict, flops: float = 0.0):
        self.o, self.ranks, self.flops = o, ranks, flops
        self.write_checkpoint, self.measure = save, evaluate
        self.at = self.saved_at = saved.get("at", 0)  # steps done
        self.scale = float(saved.get("scale", 2.0**14 if o.dtype == "fp16" else 1.0))  # of the loss
        self.good = saved.get("good", 0)  # updates since one was last skipped
        self.skipped = saved.get("skipped", 0)
        self.bad = 0  # updates skipped one after the other
        self.sound = True  # was the last loss a number?
        self.eval_seconds = 0.0
        self.asked = False  # to stop
        self.values, self.result = {}, {}
        self.path = Path(o.out) / "metrics.jsonl"
        self.records = [r for r in read_metrics(self.path) if r["step"] <= self.at] if saved else []

    def steps(self) -> Iterator[tuple[int, float]]:
        """Yield (step, learning rate) for each step that is left; what is due happens between two of them."""
        o = self.o
        handlers = {s: signal.signal(s, self.ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            if not self.at:
                self.save()  # a disk that cannot be written to shows now, and any later kill can be resumed
            if self.ranks.rank == 0:  # lines after the checkpoint, or half a line, are dropped
                save_files(o.out, {"metrics.jsonl": "".join(json.dumps(r) + "\n" for r in self.records)})
            peak = peak_flops(self.ranks.device, DTYPES[o.dtype]) * self.ranks.world if self.flops else 0.0
            with progress("step", o.max_steps, self.at) as show:
                while self.at < o.max_steps and "stop" not in self.result:
                    self.values = {}
                    began = time.perf_counter()
                    lr = o.lr * lr_at(self.at, o.max_steps, o.warmup_steps, o.schedule, o.min_lr)
                    yield self.at, lr
                    self.at += 1
                    show(self.at, self.log_step(lr, time.perf_counter() - began, peak))
                    if self.at % o.eval_interval == 0 and self.at < o.max_steps:
                        self.evaluate(last=False)  # before a stop: what goes on begins after it
                    if sum_over_ranks(torch.tensor(float(self.asked), device=self.ranks.device)) > 0:
                        self.save()
                        say(f"Stopped at step {self.saved_at}; --resume {o.out} goes on from there.")
                        raise KeyboardInterrupt
                    if self.at % o.save_interval == 0 and self.at < o.max_steps:
                        self.save()
            if "stop" not in self.result:
                self.evaluate(last=True)
            self.save(finished=True)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def update(self, optimizer, lr: float, **metrics) -> bool:
        """Take the optimizer's step -> was it taken? A loss or grad_norm that is not finite skips it.

        metrics: `loss`, `grad_norm` and others, numbers or tensors of one element, of all ranks, to be
        logged: their mean, where a step has several updates. `tokens`, what was read, becomes tok_per_s.
        """
        tensors = {name: x.detach().float() for name, x in metrics.items() if isinstance(x, torch.Tensor)}
        if tensors:  # the one moment in a step when the host waits for the device: no update is made of a NaN
            metrics |= zip(tensors, torch.stack(list(tensors.values())).tolist(), strict=True)
        self.note(**metrics)
        self.sound = math.isfinite(metrics["loss"])
        fine = self.sound and math.isfinite(metrics["grad_norm"])
        if fine:
            optimizer.set_lr(lr)
            optimizer.step()
        optimizer.zero_grad()
        self.good = self.good + 1 if fine else 0
        self.bad = 0 if fine else self.bad + 1
        if self.o.dtype == "fp16":  # loss scaling (1710.03740)
            if not fine:
                self.scale /= 2
            elif self.good % 1000 == 0:
                self.scale *= 2
        if not fine:
            self.skipped += 1
            what = f"The loss or the gradient of step {self.at + 1} is not finite"
            say(f"{what}: the update is skipped ({self.skipped} so far).")
            check(self.bad < 5 or self.scale > 1, f"{what}, {self.bad} times running. {self.o.out} holds "
                  f"step {self.saved_at}; begin anew with a lower --lr or more --warmup-steps.")
        return fine

    def note(self, **metrics) -> None:
        """Add numbers to what is logged of this step."""
        for name, value in metrics.items():
            self.values.setdefault(name, []).append(value)

    def log_step(self, lr: float, seconds: float, peak: float) -> str:
        """Log what was noted of a step -> what the terminal shows of it."""
        speed = sum(self.values.pop("tokens", [0])) / seconds
        record = {name: v[0] if len(v) == 1 else sum(v) / len(v) for name, v in self.values.items()}
        shown = [f"{name.replace('_', ' ')} {v:.4g}" for name, v in record.items() if not isinstance(v, list)]
        shown = [*shown[:5], f"{speed:,.0f} tok/s"]
        record |= {"lr": lr, "ms_per_step": seconds * 1e3, "tok_per_s": speed}
        if peak:
            record["mfu"] = speed * self.flops / peak
            shown.append(f"MFU {record['mfu']:.0%}")
        self.write(record)
        return "  ".join(shown)

    def evaluate(self, last: bool) -> None:
        """Measure, log and say it."""
        began = time.perf_counter()
        self.result = self.measure(last)
        self.eval_seconds += time.perf_counter() - began
        seconds = time.perf_counter() - START - self.eval_seconds
        self.write({**self.result, "seconds": seconds})
        floats = {name: v for name, v in self.result.items() if isinstance(v, float)}
        words = [f"{name.replace('_', ' ')} {v:.4f}" for name, v in floats.items()]
        stop = self.result.get("stop", "")
        say(f"step {self.at}: {', '.join(words)} after {seconds:.1f} s of training. {stop}")

    def save(self, finished: bool = False) -> None:
        """Write a checkpoint; not while the loss is no number: what the folder holds is better."""
        if not self.sound:
            check(not finished, f"The loss is no number at the end: {self.o.out} holds step {self.saved_at}.")
            return
        state = {name: getattr(self, name) for name in ("at", "scale", "good", "skipped")}
        state |= {"finished": finished, "command": self.o.command, "options": dataclasses.asdict(self.o)}
        self.write_checkpoint(Path(self.o.out), state)
        self.saved_at = self.at

    def write(self, record: dict) -> None:
        """Append a line to metrics.jsonl."""
        record = json.loads(json.dumps({"step": self.at, **record}), **LOGGED)
        self.records.append(record)
        try:
            if self.ranks.rank == 0:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}).") from None

    def ask_to_stop(self, number, frame) -> None:
        """Let the step end and be saved; a second Ctrl-C ends the program at once."""
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

# How a log's numbers are read: nine digits; null in the place of NaN and infinity, which JSON does not know.
LOGGED = {"parse_float": lambda text: float(f"{float(text):.9g}"), "parse_constant": lambda name: None}

def read_metrics(path: Path) -> list[dict]:
    """Read a run's log; what a kill or a full disk left of a line is passed over."""
    records = []
    if not path.is_file():  # (a pipe of that name would be waited for)
        return records
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line, **LOGGED)
                if isinstance(record, dict) and is_a(record.get("step"), int):
                    records.append(record)
    return records

# ---- Words for people

@functools.cache
def console():
    from rich.console import Console  # a tenth of a second that a command with no words for people saves

    return Console(stderr=True, soft_wrap=True, highlight=False)

def say(message="", **style) -> None:
    """Print a text or a table to standard error (standard output is for results), from rank 0 alone."""
    if env_rank() == 0:
        with contextlib.suppress(OSError):  # a full disk behind it ends no run
            console().print(message, **{"markup": False, "emoji": False} | style)

@contextlib.contextmanager
def progress(what: str, total: int, done: int = 0):
    """Show a bar with time left on a terminal, elsewhere a line every ten seconds -> show(done, text)."""
    from rich import progress as rich

    columns = (what, rich.MofNCompleteColumn(), rich.BarColumn(24), rich.TimeRemainingColumn())
    terminal = console().is_terminal and env_rank() == 0
    started = shown = time.perf_counter()
    with rich.Progress(*columns, "{task.description}", console=console(), disable=not terminal) as bar:
        task = bar.add_task("", total=total, completed=done)

        def show(n: int, text: str = "") -> None:
            nonlocal shown
            bar.update(task, completed=n, description=text)
            now = time.perf_counter()
            if not terminal and (now - shown > 10 or n == total):
                left = (now - started) / max(1, n - done) * (total - n) / 60
                say(f"{what} {n}/{total}  {left:.1f} min left  {text}")
                shown = now

        yield show

def run_app(app: Callable) -> None:
    """Run a typer app: a UserError is one sentence and exit code 2, Ctrl-C is 130, without a traceback."""
    code = 0
    try:
        app()
    except SystemExit as done:  # typer's way to end
        code = done.code
    except (UserError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        traceback.clear_frames(error.__traceback__)  # ends the generators on its way, and their bars
        words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        if env_rank() > 0:
            time.sleep(3)  # where all ranks refuse, rank 0 says it and torchrun ends this one meanwhile
        with contextlib.suppress(OSError):
            console().print(f"error: {words}", style="red", markup=False, emoji=False)
        code = 2
    except KeyboardInterrupt:
        code = 130
    finally:
        world = rank_and_world()[1]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            with contextlib.suppress(RuntimeError):
                torch.distributed.destroy_process_group()
    if world > 1:  # on Python's own way out gloo's threads now and then abort the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(bool(code)))
    sys.exit(code)


# ------------------------------------------------------------------------------------------------------------
# Part IV: the same, faster on a CPU
# ------------------------------------------------------------------------------------------------------------


class RMSNormCPU(torch.autograd.Function):
    """Compute rms_norm with its gradient by hand, ten times as fast on CPU as autograd's."""

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

CPU_SHORT = 512  # keys up to which plain products are as fast with their gradients, or faster

def takes_plain_products(q, k, v) -> bool:
    """Tell whether attention in bfloat16 is computed as on paper: for one query, or for few keys.

    Not in inference mode, where torch's kernel is two to five times as fast, unless v is narrower than k.
    Without a gradient alone it is: a reference is compared with a policy that has one, to the last bit.
    """
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled() and q.shape[-1] == v.shape[-1]:
        return False
    return q.shape[2] == 1 or k.shape[2] <= CPU_SHORT

def attend_on_cpu(q, k, v, mask, scale: float):
    """Compute attention as on paper, in bfloat16 products: the scores (B, H, T, S) do stand in memory.

    Query heads that share a key head are stacked: (B*K, G*T, D) x (B*K, D, S).
    """
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2]
    G = H // K
    q, k, v = q.reshape(B * K, G * T, D), k.reshape(B * K, S, D), v.reshape(B * K, S, -1)
    bias = q.new_zeros(1, 1, 1)
    if isinstance(mask, str):
        mask = torch.ones(1, T, S, dtype=torch.bool).tril()
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf).repeat(1, G, 1)
        bias = bias if len(bias) == 1 else bias.repeat_interleave(K, 0)
    p = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale).softmax(-1)  # (B*K, G*T, S)
    return torch.bmm(p, v).view(B, H, T, -1)

def is_compiled_on_cpu(x) -> bool:
    """Tell whether torch.compile makes code of what is called now, for a CPU."""
    return torch.compiler.is_compiling() and x.device.type == "cpu"

def is_compiled_row(x) -> bool:
    """Tell whether x is a single row: then a product reads each weight for one multiplication."""
    return is_compiled_on_cpu(x) and x.numel() == x.shape[-1]

def multiply_row(x, weight, bias=None):  # (..., in) of one row, (out, in) -> (..., out)
    """Compute a row's product as a loop that torch.compile writes: it reads up to twice as fast as F.linear.

    Four parts of one height become one loop, a third faster and more than a loop over the whole: more of the
    matrix can be on its way from memory, and four sums wait less for each other. The row is read once for
    each row of the matrix. So it has to stand in memory, where as_strided puts it: else what makes it (a
    norm, an activation) would be computed anew each time.
    """
    row = x.float().reshape(-1).as_strided((x.shape[-1],), (1,))
    parts = weight.split(max(1, len(weight) // 4))  # what is left over is a part of its own
    y = torch.cat([(part.float() * row).sum(-1) for part in parts])
    y = y if bias is None else y + bias
    return y.to(x.dtype).view(*x.shape[:-1], -1)

def attend_compiled(q, k, v, mask, scale: float):
    """Compute attention of one query a row, its scores as a loop over the keys.

    A third faster than SDPA for a hundred slots, as fast for a thousand.
    """
    B, H, _, D = q.shape
    q = q.view(B, k.shape[1], -1, 1, D)  # (B, K, G, 1, D): the G query heads of each key head
    scores = (q.float() * k.unsqueeze(2).float()).sum(-1) * scale  # (B, K, G, S)
    p = scores.masked_fill(~mask.unsqueeze(1), -torch.inf).softmax(-1)
    return torch.matmul(p.to(v.dtype), v).reshape(B, H, 1, -1)
