"""The decoder against transformers, torch's own formulas and itself; tiny sizes, CPU."""

import ast
import itertools
import math
import subprocess
import sys

import model as octavo
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SCRIPTS
from model import IGNORE, PRESETS, Cache, Config, Transformer, UserError
from model import config_from_hf, config_to_hf, generate, resize
from safetensors.torch import save_file

TINY = Config(vocab_size=64, seq_len=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=8, ffn_dim=48)


def make(config=TINY, seed=0, **changes) -> Transformer:
    """A model whose every parameter matters: norms are not one, biases not zero, logits not tiny."""
    net = Transformer(config.replace(**changes)).init_weights(seed)
    randomize(net, seed)
    return net.eval()


@torch.no_grad()
def randomize(net, seed=0):
    rng = torch.Generator().manual_seed(seed + 1)
    for p in net.parameters():
        p.copy_(torch.randn(p.shape, generator=rng) * 0.2 + (p.dim() == 1))


def ids(*shape, vocab=64, seed=0):
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape, seed=0, **kw):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(**kw)


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert (a - b).abs().max().item() <= tolerance


def relative(a, b) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


# ---- Config ------------------------------------------------------------------------------------------------

CONFIGS = {  # stock class -> a config that it exactly is
    "LlamaForCausalLM": [
        TINY.replace(qk_norm=False, tie=False, norm_eps=1e-5, rope_theta=5000.0, eos_id=3, pad_id=0),
        TINY.replace(qk_norm=False, head_dim=16, n_kv_head=4),
    ],
    "MistralForCausalLM": [TINY.replace(qk_norm=False, tie=False, window=(5, 5))],
    "Qwen2ForCausalLM": [
        TINY.replace(qk_norm=False, qkv_bias=True),
        TINY.replace(qk_norm=False, qkv_bias=True, tie=False, window=(None, 5)),
    ],
    "Qwen3ForCausalLM": [
        TINY,
        TINY.replace(tie=False, head_dim=16, n_kv_head=1, window=(5, None)),
        TINY.replace(window=(5, 5)),
    ],
}
STOCK = [
    pytest.param(name, config, id=f"{name[:-11]}{i}")
    for name, configs in CONFIGS.items()
    for i, config in enumerate(configs)
]
OWN = [  # what no stock class is
    TINY.replace(causal=False),
    TINY.replace(qkv_bias=True),
    TINY.replace(window=(4, 8)),
    TINY.replace(qk_norm=False, window=(4, None)),
    TINY.replace(qk_norm=False, qkv_bias=True, head_dim=16),
]


@pytest.mark.parametrize("name, config", STOCK)
def test_config_is_saved_as_the_class_it_is(name, config):
    hf = config_to_hf(config)
    assert hf["architectures"] == [name] and hf["model_type"] == name[:-11].lower()
    assert config_from_hf(hf) == config


@pytest.mark.parametrize("config", OWN)
def test_config_that_no_class_expresses_is_octavo(config):
    hf = config_to_hf(config)
    assert hf["model_type"] == "octavo"
    assert config_from_hf(hf) == config


def test_what_acts_in_training_only_is_not_saved():
    trained = TINY.replace(dropout=0.3)
    assert config_from_hf(config_to_hf(trained)) == TINY


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_stock_classes(name):
    published = {"llama": "Llama", "mistral": "Mistral", "mixtral": "Mixtral", "qwen3": "Qwen3Moe", "gemma": "Gemma",
                 "qwen2.5": "Qwen2", "phi": "Mistral", "gpt": "GPT2"}.get(name.split("-")[0], "Qwen3")
    published = {"deepseek-v2": "DeepseekV2", "deepseek-v3": "DeepseekV3"}.get(name, published)
    assert config_to_hf(PRESETS[name])["architectures"][0].startswith(published)


CANNOT_BE = [
    {"norm_plus_one": True, "norm": "layer"}, {"position": "alibi", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"global_tokens": 3}, {"kv_rank": 8}, {"kv_rank": 8, "rope_dim": 4, "nope_dim": 4, "v_dim": 4, "o_bias": True},
    {"rope_dim": 3}, {"rope_dim": 64}, {"position": "spiral"}, {"act": "step"}, {"gated": False, "n_expert": 4},
    {"n_kv_head": 3}, {"head_dim": 7}, {"n_embd": 0}, {"n_layer": -1}, {"ffn_dim": 1.5},
    {"window": (4, 4, 4)}, {"window": 0}, {"norm_eps": 0.0}, {"rope_theta": -1.0}, {"head": "tail"},
    {"dropout": 1.0}, {"dropout": -0.1}, {"vocab_size": -1}, {"seq_len": 1.0},
    {"n_expert": 4, "router": "coin"}, {"n_expert": 4, "balance": "hope"}, {"n_expert": 4, "capacity": 0.0},
    {"n_expert": 4, "n_expert_active": 5}, {"n_expert": 4, "n_group": 3}, {"n_expert": 4, "balance": "bias"},
]


@pytest.mark.parametrize("changes", CANNOT_BE, ids=str)
def test_config_that_cannot_be_is_refused_in_a_sentence(changes):
    with pytest.raises(UserError, match=r"\w+ \w+.*\.$"):
        Transformer(TINY.replace(**changes))


def test_one_window_serves_all_layers():
    assert TINY.replace(window=5).windows == TINY.replace(window=(5,)).windows == (5, 5)
    assert TINY.windows == TINY.replace(window=(None, None)).windows == (None, None)
    assert TINY.replace(window=(None, None)) == TINY


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"architectures": ["BertForMaskedLM"]}, "BertForMaskedLM"),
        ({"architectures": None, "model_type": "bert"}, "cannot be opened"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn does not say factor"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta": 1}}, "does not know beta"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -4.0}}, "factor -4.0"),
        ({"rope_parameters": {"rope_type": "linear", "factor": [4.0]}}, "factor"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": "x", "factor": 2}}, "rope_theta 'x'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": ["yarn"], "factor": 4.0}}, "yarn"),
        ({"hidden_act": "mish"}, "mish"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_folder_of_something_else_is_refused_in_a_sentence(changes, word):
    with pytest.raises(UserError, match=rf"{word}.*\.$"):
        config_from_hf(config_to_hf(TINY) | changes)


def test_config_json_that_lacks_a_size_is_refused_in_a_sentence():
    hf = config_to_hf(TINY)
    for key in ("num_attention_heads", "hidden_size", "num_hidden_layers"):
        with pytest.raises(UserError, match=key):
            config_from_hf({k: v for k, v in hf.items() if k != key})


def test_older_config_json():
    """theta at the top level, no head_dim, no key-value heads, nothing on tying (their default is no)."""
    hf = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "max_position_embeddings": 32, "rms_norm_eps": 1e-5, "rope_theta": 5000.0,
        "rope_scaling": None, "eos_token_id": [7, 8],
    }
    config = config_from_hf(hf)
    assert (config.rope_theta, config.head_dim, config.n_kv_head, config.eos_id) == (5000.0, 8, 4, (7, 8))
    assert config.tie is False


def test_qwen2_windows_begin_at_max_window_layers():
    hf = config_to_hf(TINY.replace(qk_norm=False, qkv_bias=True))
    del hf["layer_types"]
    hf |= {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    assert config_from_hf(hf).windows == (None, 4)
    assert config_from_hf(hf | {"use_sliding_window": False}).windows == (None, None)


PUBLISHED = {  # all parameters, and those that a token meets, as the models' cards count them
    "llama-2-7b": (6_738_415_616, 6_738_415_616),
    "llama-2-70b": (68_976_648_192, 68_976_648_192),
    "llama-3-8b": (8_030_261_248, 8_030_261_248),
    "mixtral-8x7b": (46_702_792_704, 12_879_925_248),
    "qwen2.5-0.5b": (494_032_768, 494_032_768),
    "qwen2.5-7b": (7_615_616_512, 7_615_616_512),
    "phi-3-3.8b": (3_821_079_552, 3_821_079_552),
}
ROUNDED = {  # as papers and cards give them, in 1e9
    "gpt-3-175b": (174.6, 174.6), "llama-7b": (6.7, 6.7), "llama-13b": (13.0, 13.0), "llama-30b": (32.5, 32.5),
    "llama-65b": (65.2, 65.2), "llama-2-13b": (13.0, 13.0), "llama-3-70b": (70.6, 70.6),
    "llama-3.1-405b": (405.9, 405.9), "mistral-7b": (7.24, 7.24), "mixtral-8x22b": (140.6, 39.1),
    "gemma-2b": (2.51, 2.51), "gemma-7b": (8.54, 8.54), "qwen2.5-1.5b": (1.54, 1.54), "qwen2.5-3b": (3.09, 3.09),
    "qwen2.5-14b": (14.8, 14.8), "qwen2.5-32b": (32.8, 32.8), "qwen2.5-72b": (72.7, 72.7),
    "qwen3-30b-a3b": (30.5, 3.35), "deepseek-v2": (235.7, 21.4), "deepseek-v3": (671.0, 37.5),
}


@pytest.mark.parametrize("name", PRESETS)
def test_published_models_have_the_parameters_that_they_are_known_for(name):
    if name in PUBLISHED:
        assert octavo.count_params(PRESETS[name]) == PUBLISHED[name]
    elif name in ROUNDED:
        assert [n / 1e9 for n in octavo.count_params(PRESETS[name])] == pytest.approx(ROUNDED[name], rel=0.01)
    else:
        assert name in octavo.OURS


@pytest.mark.parametrize("config", [c for cs in CONFIGS.values() for c in cs] + OWN)
def test_weights_that_multiply_a_token_are_those_of_the_matrices(config):
    linear = [m for m in Transformer(config).modules() if isinstance(m, torch.nn.Linear)]
    assert octavo.count_weights(config)[2] == sum(m.weight.numel() for m in linear)


def test_flops_per_token_by_hand():
    T, per_key = 8, 12 * TINY.n_head * TINY.head_dim
    count = {None: sum(range(1, T + 1)), 3: 1 + 2 + 3 * 6, 100: sum(range(1, T + 1))}  # keys seen by 8 tokens
    for window, keys in count.items():
        config = TINY.replace(window=(window, window))
        assert octavo.flops_per_token(config, T) == pytest.approx(6 * octavo.count_weights(config)[2] + 2 * per_key * keys / T)
    far = TINY.replace(window=3, global_tokens=2)
    seen = octavo.visible(torch.arange(T), torch.arange(T), window=3, n_global=2).sum().item()
    assert octavo.flops_per_token(far, T) == pytest.approx(6 * octavo.count_weights(far)[2] + 2 * per_key * seen / T)
    both = TINY.replace(causal=False)
    assert octavo.flops_per_token(both, T) == pytest.approx(6 * octavo.count_weights(both)[2] + 2 * per_key * T)
    assert octavo.flops_per_token(TINY) == octavo.flops_per_token(TINY, TINY.seq_len)


RESIZED = [  # preset, what is given -> n_head, n_kv_head, head_dim, ffn_dim
    ("nano", {}, (4, 4, 32, 384)),
    ("micro", {"n_embd": 256}, (4, 4, 64, 704)),  # 512/192 of the width, up to the next multiple of 64
    ("medium", {"n_embd": 512}, (8, 4, 64, 1408)),  # two query heads share a key-value head, as before
    ("medium", {"n_embd": 192}, (3, 3, 64, 576)),  # three heads do not go in pairs
    ("nano", {"n_head": 2}, (2, 2, 64, 384)),
    ("nano", {"n_embd": 64, "n_head": 4, "n_kv_head": 2, "ffn_dim": 100}, (4, 2, 16, 100)),
]


@pytest.mark.parametrize("preset, given, sizes", RESIZED)
def test_other_sizes_follow_the_width_in_the_presets_proportions(preset, given, sizes):
    config = resize(preset, **given)
    assert (config.n_head, config.n_kv_head, config.head_dim, config.ffn_dim) == sizes
    assert config.n_head * config.head_dim == config.n_embd


def test_experts_of_a_resized_model_cost_what_the_dense_network_does():
    config = resize("nano", n_expert=8, n_expert_active=2, n_expert_shared=1)
    assert config.expert_dim == PRESETS["nano"].ffn_dim // 3
    assert resize("nano", n_expert=8, balance="bias").router_bias


def test_a_window_goes_along_when_the_layers_change():
    assert resize("mistral-7b", n_layer=3).windows == (4096,) * 3


def test_sizes_that_cannot_be_resized_to_are_refused_in_a_sentence():
    for given, words in (
        ({"preset": "huge"}, "--preset is one of nano"),
        ({"preset": "nano", "n_embd": 100, "n_head": 3}, "100 does not divide into 3 heads"),
        ({"preset": "nano", "expert_dim": 8}, "expert_dim needs experts"),
        ({"preset": "nano", "n_head": 4, "n_kv_head": 3}, "cannot share 3 key-value heads"),
    ):
        with pytest.raises(UserError, match=words):
            resize(**given)


# ---- against transformers ----------------------------------------------------------------------------------


def theirs(config: Config, name: str):
    """The stock class with its own words for the sizes (not those that config_to_hf writes)."""
    tf = pytest.importorskip("transformers")
    sizes = dict(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=config.ffn_dim,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
        num_key_value_heads=config.n_kv_head,
        max_position_embeddings=config.seq_len, rms_norm_eps=config.norm_eps, tie_word_embeddings=config.tie,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        bos_token_id=None, eos_token_id=config.eos_id, pad_token_id=config.pad_id,
    )
    if name != "Qwen2ForCausalLM":
        sizes["head_dim"] = config.head_dim
    windows = [w for w in config.windows if w]
    if name == "MistralForCausalLM":
        sizes["sliding_window"] = windows[0] if windows else None
    elif windows:
        types = ["sliding_attention" if w else "full_attention" for w in config.windows]
        sizes |= dict(use_sliding_window=True, sliding_window=windows[0], layer_types=types)
    cls = getattr(tf, name)
    net = cls(cls.config_class(**sizes)).eval()
    randomize(net)
    return net


@torch.no_grad()
def same_model(hf, ours: Transformer, greedy=True):
    x = ids(2, 20)
    close(hf(x).logits, ours(x)[0], 1e-4)
    if greedy:
        hf.generation_config.eos_token_id = None
        hf.generation_config.pad_token_id = 0
        hf.generation_config.do_sample = False
        hf.generation_config.top_p = hf.generation_config.temperature = None
        got = hf.generate(x[:1], attention_mask=torch.ones(1, 20), max_new_tokens=12)
        assert got[0, 20:].tolist() == generate(ours, x[:1].tolist(), 12)[0]


@pytest.mark.parametrize("name, config", STOCK)
def test_their_folder_opens_here(name, config, tmp_path):
    hf = theirs(config, name)
    hf.save_pretrained(tmp_path)
    ours = octavo.load_model(tmp_path)
    assert ours.config == config and not ours.training
    assert octavo.count_params(config)[0] == hf.num_parameters()
    same_model(hf, ours)


@pytest.mark.parametrize("name, config", STOCK)
def test_our_folder_opens_there(name, config, tmp_path):
    tf = pytest.importorskip("transformers")
    ours = make(config)
    (tmp_path / "tokenizer.json").write_text("{}")
    octavo.save_checkpoint(tmp_path / "out", ours, tmp_path / "tokenizer.json")
    hf = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert type(hf).__name__ == name
    same_model(hf, ours)


def test_a_folder_in_shards_opens(tmp_path):
    hf = theirs(CONFIGS["LlamaForCausalLM"][0], "LlamaForCausalLM")
    hf.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    same_model(hf, octavo.load_model(tmp_path), greedy=False)


# ---- the pieces --------------------------------------------------------------------------------------------


def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def frequencies(width):
    return octavo.rope_frequencies(TINY.replace(head_dim=width), torch.arange(1))[0]


def test_rope_depends_on_the_distance_only():
    q, k = randn(1, 1, 1, 16, dtype=torch.float64), randn(1, 1, 1, 16, seed=1, dtype=torch.float64)

    def product(i, j):
        a, b = (octavo.rope_angles(torch.tensor([position]), frequencies(16)) for position in (i, j))
        return (octavo.apply_rope(q, *a) * octavo.apply_rope(k, *b)).sum().item()

    assert product(7, 3) == pytest.approx(product(104, 100), abs=1e-4)
    assert product(7, 3) != pytest.approx(product(7, 4), abs=1e-2)
    assert product(0, 0) == pytest.approx((q * k).sum().item(), abs=1e-12)


def test_rope_angles_at_far_positions_are_exact():
    cos, _ = octavo.rope_angles(torch.tensor([100_000]), frequencies(8))
    exact = [math.cos(100_000 * 1e4 ** (-2 * i / 8)) for i in range(4)]
    assert cos.dtype == torch.float32
    assert cos.flatten().tolist() == pytest.approx(exact, abs=1e-2)


def test_rope_gradient_is_autograds():
    cos, sin = octavo.rope_angles(torch.arange(5), frequencies(8))
    grads = []
    for f in (octavo.apply_rope, rotate):
        x = randn(2, 5, 3, 8).requires_grad_()
        (f(x, cos, sin) * randn(2, 5, 3, 8, seed=1)).sum().backward()
        grads.append(x.grad)
    close(*grads, 1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rms_norm_value_and_gradient(dtype, tolerance):
    x, w, g = randn(3, 5, 16) * 3, randn(16, seed=1) + 1, randn(3, 5, 16, seed=2)
    norm = octavo.RMSNorm(16, 1e-3)
    with torch.no_grad():
        norm.weight.copy_(w)
    ours = x.clone().to(dtype).requires_grad_()
    y = norm(ours)
    y.backward(g.to(dtype))
    exact, weight = x.double().requires_grad_(), w.double().requires_grad_()
    want = exact / (exact.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    want.backward(g.double())
    assert y.dtype == dtype
    for a, b in ((y, want), (ours.grad, exact.grad), (norm.weight.grad, weight.grad)):
        assert relative(a, b) < tolerance
    with torch.no_grad():  # the road without gradients gives the same
        assert torch.equal(norm(ours), y)


def attention_case(mask):
    T = 12
    if mask == "bool":  # documents of 5 and 7 tokens, another split in the second row
        doc = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [1] * 3])
        mask = octavo.visible(torch.arange(T), torch.arange(T), doc, doc, window=4)
    return mask


@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("width", [16, 8])
def test_attention_in_bf16_in_inference_mode(queries, heads, width, monkeypatch):
    """Torch's kernel in inference mode, the one of training under no_grad; where v is narrower always that."""
    H, K = heads
    q, k, v = (randn(2, n, 12, 16, seed=n + i).bfloat16() for i, n in enumerate((H, K, K)))
    v = v[..., :width]
    mask = attention_case("bool")[:, -queries:]
    called = []
    plain = octavo.attend_on_cpu
    monkeypatch.setattr(octavo, "attend_on_cpu", lambda *args: called.append(1) or plain(*args))
    with torch.no_grad():
        compared = octavo.attend(q[:, :, -queries:], k, v, mask)
    trained = octavo.attend(q[:, :, -queries:].clone().requires_grad_(), k, v, mask)
    assert len(called) == 2 and torch.equal(compared, trained)
    with torch.inference_mode():
        y = octavo.attend(q[:, :, -queries:], k, v, mask)
    assert len(called) == (2 if width == 16 else 3)
    assert relative(y, octavo.attend(q[:, :, -queries:].float(), k.float(), v.float(), mask)) < 2e-2


@pytest.mark.parametrize("mask", [None, "causal", "bool"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("short", [True, False])
def test_attention_in_bf16_on_cpu(mask, heads, short, monkeypatch):
    """Written as on paper (short) or by torch's kernel: both are what float32 says, gradients too."""
    monkeypatch.setattr(octavo, "CPU_SHORT", 512 if short else 0)
    H, K = heads
    mask = attention_case(mask)
    q, k, v = (randn(2, n, 12, 16, seed=n + i) for i, n in enumerate((H, K, K)))
    g = randn(2, H, 12, 16, seed=9)
    low = [a.bfloat16().requires_grad_() for a in (q, k, v)]
    y = octavo.attend(*low, mask)
    y.backward(g.bfloat16())
    full = [a.detach().float().requires_grad_() for a in low]
    k4, v4 = (a.repeat_interleave(H // K, 1) for a in full[1:])
    scores = full[0] @ k4.transpose(2, 3) / 16**0.5  # (B, H, T, S)
    hidden = torch.zeros(12, 12, dtype=torch.bool) if mask is None else ~torch.ones(12, 12).tril().bool()
    hidden = ~mask.unsqueeze(1) if isinstance(mask, torch.Tensor) else hidden
    want = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v4
    want.backward(g.bfloat16().float())
    assert y.dtype == torch.bfloat16
    for a, b in [(y, want)] + [(x.grad, z.grad) for x, z in zip(low, full, strict=True)]:
        assert relative(a, b) < 2e-2


def test_attention_reads_only_what_the_mask_shows():
    mask = attention_case("bool")
    q, k, v = (randn(2, n, 12, 16, seed=n + i) for i, n in enumerate((4, 2, 2)))
    y = octavo.attend(q, k, v, mask)
    k[:, :, 0], v[:, :, 0] = 50.0, 50.0  # a key that the last row's tokens do not see
    again = octavo.attend(q, k, v, mask)
    seen = mask[:, :, 0]  # (B, T)
    assert torch.equal(y.transpose(1, 2)[~seen], again.transpose(1, 2)[~seen])
    assert not torch.allclose(y.transpose(1, 2)[seen], again.transpose(1, 2)[seen])


def test_visible_by_hand():
    p = torch.arange(4)

    def rows(*args, **kw):
        return ["".join("x" if v else "." for v in row) for row in octavo.visible(*args, **kw)]

    assert rows(p, p) == ["x...", "xx..", "xxx.", "xxxx"]
    assert rows(p, p, window=2) == ["x...", "xx..", ".xx.", "..xx"]
    assert rows(p, p, causal=False) == ["xxxx"] * 4
    assert rows(p, p, causal=False, window=2) == ["xx..", "xxx.", ".xxx", "..xx"]
    doc = torch.tensor([0, 0, 1, 1])
    assert rows(p, p, doc, doc) == ["x...", "xx..", "..x.", "..xx"]
    fork, place = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 2, 2])  # two answers to the prompt 0
    assert rows(place, place, fork, fork, torch.zeros(4)) == ["x...", "xx..", "xxx.", "xx.x"]
    slots = torch.tensor([-1, 0, 3, 2, -1, 1])  # in any order, or empty
    assert rows(torch.tensor([2]), slots) == [".x.x.x"]
    assert octavo.visible(torch.zeros(3, 4), torch.zeros(3, 5)).shape == (3, 4, 5)


# ---- the whole ---------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("window", [(None, None), (3, None)])
def test_a_token_sees_none_that_follow(window):
    net, x = make(window=window), ids(1, 12)
    y = x.clone()
    y[0, 8] = (y[0, 8] + 1) % 64
    a, b = net(x)[0], net(y)[0]
    assert torch.equal(a[:, :8], b[:, :8]) and not torch.allclose(a[:, 8], b[:, 8])
    both = make(causal=False)
    assert not torch.allclose(both(x)[0][:, 0], both(y)[0][:, 0])


@torch.no_grad()
@pytest.mark.parametrize("window", [(None, None), (3, 6)])
@pytest.mark.parametrize("restart", [True, False])
def test_packed_documents_are_as_if_alone(window, restart):
    net, lengths = make(window=window), (5, 9, 2)
    x, y = ids(1, 16), ids(1, 16, seed=1)
    doc = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(n) for n in lengths])[None] if restart else None
    packed, _ = net(x, y, doc_ids=doc, positions=positions)
    alone = [net(a, b)[0] for a, b in zip(x.split(lengths, 1), y.split(lengths, 1), strict=True)]
    close(packed, torch.cat(alone, 1))
    assert (net(x, y)[0] - packed).abs().max() > 1e-2  # the mask is what does it


@torch.no_grad()
@pytest.mark.parametrize("window", [(None, None), (3, 6)])
def test_answers_that_share_a_prompt_are_as_if_alone(window):
    """One row: a prompt of 5 tokens, then two answers to it, of 4 and 3, that do not see each other."""
    net, x, y = make(window=window), ids(1, 12), ids(1, 12, seed=1)
    prompt, answers = slice(0, 5), (slice(5, 9), slice(9, 12))
    doc = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3])
    positions = torch.tensor([[*range(5), *range(5, 9), *range(5, 8)]])
    shared, _ = net(x, y, doc_ids=doc, trunk_ids=torch.zeros_like(doc), positions=positions)
    for answer in answers:
        alone = [torch.cat((t[:, prompt], t[:, answer]), 1) for t in (x, y)]
        close(torch.cat((shared[:, prompt], shared[:, answer]), 1), net(*alone)[0])


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.3)])
def test_padding_changes_nothing(dtype, tolerance):
    """A row of padding sees nothing, and a softmax over nothing is NaN, which spreads: bf16 would show it."""
    net, x = make(), ids(1, 7)
    net.compute_dtype = dtype
    padded = torch.cat([ids(1, 3, seed=5), x], 1)
    positions = torch.tensor([[-1, -1, -1, 0, 1, 2, 3, 4, 5, 6]])
    got = net(padded, positions=positions)[0]
    assert got.isfinite().all()
    close(got[:, 3:], net(x)[0], tolerance)


def test_outputs():
    net, x = make(), ids(2, 6)
    with torch.no_grad():
        logits, aux = net(x)
        assert aux.shape == (TINY.n_layer, 1) and not aux.any()
        close(net(x, output="last")[0], logits[:, -1:])
        close(net.lm_head(net(x, output="hidden")[0]), logits)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("tie", [True, False])
def test_loss_per_token_in_chunks(keep, tie, monkeypatch):
    """Chunks, with their logits kept or computed again, against F.cross_entropy on all logits at once."""
    monkeypatch.setattr(octavo, "CHUNK_LOGITS", {"cpu": 64})  # 64 rows, the least a chunk has
    monkeypatch.setattr(octavo, "KEEP_LOGITS", 2**40 if keep else 0)
    net = make(tie=tie)
    x, y = ids(5, 30), ids(5, 30, seed=1)  # 150 tokens: three chunks
    y[0, :4] = y[4, 29] = IGNORE
    losses, _ = net(x, y)
    assert losses.shape == (5, 30) and losses.dtype == torch.float32
    losses.sum().backward()
    grads = {n: p.grad.clone() for n, p in net.named_parameters()}
    net.zero_grad()
    want = F.cross_entropy(net(x)[0].flatten(0, 1), y.flatten(), reduction="none").view(5, 30)
    want.sum().backward()
    close(losses, want)
    assert (losses[y == IGNORE] == 0).all() and (losses[y != IGNORE] > 0).all()
    for name, p in net.named_parameters():
        assert relative(grads[name], p.grad) < 1e-5, name


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_changes_no_bit(dropout):
    results = []
    for recompute in (False, True):
        net = make(dropout=dropout).train()
        net.recompute = recompute
        calls = []
        net.layers["0"].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(0)
        loss = net(ids(2, 16), ids(2, 16, seed=1))[0].mean()
        loss.backward()
        results.append([loss.detach()] + [p.grad for p in net.parameters()])
        assert len(calls) == 1 + recompute  # it did run again
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_dropout():
    x = torch.ones(400, 7, 300)
    torch.manual_seed(0)
    y = octavo.drop(x, 0.25, training=True)
    assert y.mean().item() == pytest.approx(1, abs=0.01)
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert torch.equal(y[:, :1].expand_as(y), y)  # one mask for all positions of a sequence
    assert octavo.drop(x, 0.25, training=False) is x and octavo.drop(x, 0.0, training=True) is x
    net, tokens = make(dropout=0.5), ids(2, 8)
    plain = make()(tokens)[0]
    assert torch.equal(net(tokens)[0], plain)  # off in evaluation
    assert not torch.allclose(net.train()(tokens)[0], plain)
    for part in ("self_attn.o_proj", "mlp.down_proj"):  # what either half adds to the residual stream
        half = make(dropout=0.5).train()
        for i in range(TINY.n_layer):
            half.get_submodule(f"layers.{i}.{part}").weight.data.zero_()
        assert not torch.allclose(half(tokens)[0], half.eval()(tokens)[0])


def test_bf16_activations_are_close():
    net, x, y = make(), ids(4, 16), ids(4, 16, seed=1)
    want = net(x, y)[0]
    net.compute_dtype = torch.bfloat16
    got = net(x, y)[0]
    assert got.dtype == torch.float32 and relative(got, want) < 0.03
    got.mean().backward()
    assert all(p.grad.dtype == p.dtype == torch.float32 for p in net.parameters())


# ---- cache and generation ----------------------------------------------------------------------------------

WINDOWS = [(None, None), (3, None), (4, 4)]


@torch.no_grad()
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("pieces", [[20], [7] + [1] * 13, [6, 6, 8], [1] * 20, [9, 1, 9, 1]])
def test_cached_logits_equal_uncached(window, pieces):
    net, x = make(window=window), ids(2, 20)
    cache = Cache(net.config, 2, 20)
    got = torch.cat([net(piece, cache=cache)[0] for piece in x.split(pieces, 1)], 1)
    close(got, net(x)[0])


@torch.no_grad()
@pytest.mark.parametrize("window", WINDOWS)
def test_rewind_is_never_having_gone_there(window):
    net, x = make(window=window), ids(2, 16)
    cache = Cache(net.config, 2, 20)
    net(x[:, :8], cache=cache)
    net(ids(2, 7, seed=3), cache=cache)
    cache.rewind(8)
    close(net(x[:, 8:], cache=cache)[0], net(x)[0][:, 8:])
    cache.rewind(0)
    close(net(x, cache=cache)[0], net(x)[0])


@torch.no_grad()
def test_rewind_to_the_middle_of_a_padding():
    """What stood behind is forgotten, the padding before it stays unseen."""
    net, x = make(), ids(1, 4)
    cache = Cache(net.config, 1, 8)
    net(torch.cat([x[:, :3], ids(1, 4, seed=3)], 1), positions=torch.tensor([[0, 1, 2, -1, -1, 3, 4]]), cache=cache)
    cache.rewind(4)
    close(net(x[:, 3:], positions=torch.tensor([3]), cache=cache)[0], net(x)[0][:, 3:])


@torch.no_grad()
def test_cache_of_unequal_rows_padded_on_either_side():
    net, x = make(), ids(2, 6)
    want = [net(x[:1])[0][0], net(x[1:, :4])[0][0]]
    for pad in ([4, 5], [0, 1]):  # where the second row's two pads stand
        real = [i for i in range(6) if i not in pad]
        tokens, positions = x.clone(), torch.arange(6).repeat(2, 1)
        tokens[1, real], tokens[1, pad] = x[1, :4], 63
        positions[1, real], positions[1, pad] = torch.arange(4), -1
        cache = Cache(net.config, 2, 8)
        read = net(tokens, positions=positions, cache=cache)[0]
        close(read[0], want[0])
        close(read[1, real], want[1])
        step = ids(2, 1, seed=2)
        got = net(step, positions=torch.tensor([[6], [4]]), cache=cache)[0]
        close(got[0], net(torch.cat([x[:1], step[:1]], 1))[0][0, -1:])
        close(got[1], net(torch.cat([x[1:, :4], step[1:]], 1))[0][0, -1:])


@torch.no_grad()
@pytest.mark.parametrize("window", WINDOWS)
def test_rows_of_a_cache_in_any_order(window):
    """One row goes, one is there twice, and each of the two goes on in its own way."""
    net, x, rows = make(window=window), ids(3, 9), torch.tensor([2, 0, 2])
    cache = Cache(net.config, 3, 9)
    net(x[:, :7], cache=cache)
    cache.select(rows)
    ends = ids(3, 2, seed=5)
    want = net(torch.cat((x[rows, :7], ends), 1))[0]
    close(net(ends, cache=cache)[0], want[:, 7:])


@torch.no_grad()
@pytest.mark.parametrize("window", WINDOWS)
def test_a_cache_in_any_order_of_events(window):
    """Rows step, take a step back, leave, come twice, and the cache grows: a row's logits are what its own
    tokens give alone and uncached."""
    hypothesis = pytest.importorskip("hypothesis")
    from hypothesis import strategies as st

    net = make(window=window, seq_len=64)
    token = st.integers(0, 63)
    rows = st.lists(st.integers(0, 5), min_size=1, max_size=4)
    event = st.one_of(st.tuples(st.just("step"), st.lists(token, min_size=6, max_size=6)),
                      st.tuples(st.just("select"), rows), st.tuples(st.just("grow"), st.integers(1, 3)),
                      st.tuples(st.just("rewind"), st.just(1)))

    @hypothesis.settings(max_examples=40, deadline=None, database=None)
    @hypothesis.given(st.lists(st.lists(token, min_size=1, max_size=5), min_size=1, max_size=4),
                      st.lists(event, max_size=12))
    def hold(prompts, events):
        texts = [list(p) for p in prompts]
        T = max(map(len, texts))
        x = torch.tensor([t + [0] * (T - len(t)) for t in texts])
        positions = torch.tensor([[i if i < len(t) else -1 for i in range(T)] for t in texts])
        cache = Cache(net.config, len(texts), T)
        net(x, positions=positions, cache=cache)
        written = []  # whether the last slots hold a token of every row
        for what, how in events:
            if what == "select":
                keep = [i % len(texts) for i in how]
                texts = [list(texts[i]) for i in keep]
                cache.select(keep)
            elif what == "grow":
                cache.grow(how)
            elif what == "rewind" and written:
                written.pop()
                cache.rewind(cache.n - 1)
                texts = [t[:-1] for t in texts]
            elif what == "step":
                if cache.n == cache.positions.shape[1]:
                    cache.grow(1)
                new = how[: len(texts)]
                at = torch.tensor([[len(t)] for t in texts])
                logits = net(torch.tensor(new)[:, None], positions=at, cache=cache, output="last")[0][:, -1]
                texts = [[*t, n] for t, n in zip(texts, new, strict=True)]
                written.append(True)
                for row, text in zip(logits, texts, strict=True):
                    close(row, net(torch.tensor([text]))[0][0, -1], 1e-4)

    hold()


def test_memory_of_a_cache():
    """Keys and values: layers x rows x key-value heads x slots x head size."""
    for dtype in (torch.float32, torch.bfloat16):
        cache = Cache(TINY, 3, 10, dtype=dtype)
        assert cache.k.nbytes + cache.v.nbytes == 2 * 2 * 3 * 2 * 10 * 8 * dtype.itemsize


def test_a_full_cache_says_so():
    net = make()
    cache = Cache(net.config, 1, 8)
    with torch.no_grad():
        net(ids(1, 8), cache=cache)
        with pytest.raises(UserError, match="9 tokens do not fit a cache of 8"):
            net(ids(1, 1), cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("window", WINDOWS)
def test_generate_is_the_plain_loop(window):
    """Batched, cached, unequal prompts: what one prompt at a time gives without any cache."""
    net = make(window=window)
    prompts = [ids(n, seed=n).tolist() for n in (1, 5, 9, 9)]
    want = []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(10):
            text.append(int(net(torch.tensor([text]))[0][0, -1].argmax()))
        want.append(text[len(prompt) :])
    assert generate(net, prompts, 10) == want
    assert [generate(net, [p], 10)[0] for p in prompts] == want
    eos = want[1][4]
    cut = [w[: w.index(eos) + 1] if eos in w else w for w in want]
    assert generate(net, prompts, 10, eos_id=eos) == cut


@pytest.mark.slow
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("rows", [1, 3, 8, 256])
def test_generate_in_rows_of_any_number(window, rows):
    """Any number of rows, samples and limits of their own: the same texts as one by one."""
    net = make(window=window)
    prompts = [ids(1 + n % 7, seed=n).tolist() for n in range(11)]
    limits = [3 + 5 * n % 9 for n in range(11)]
    alone = [generate(net, [p], n)[0] for p, n in zip(prompts, limits, strict=True)]
    stop = {alone[3][1], alone[8][-1]}
    want = [next((text[: i + 1] for i, token in enumerate(text) if token in stop), text) for text in alone]
    assert generate(net, prompts, limits, eos_id=stop, rows=rows) == want
    twice = [text for text in want for _ in range(2)]
    assert generate(net, prompts, limits, eos_id=stop, rows=rows, samples=2) == twice


def test_generate_takes_a_picker_and_refuses_an_empty_prompt():
    shapes = []

    def pick(logits):
        shapes.append(tuple(logits.shape))
        return torch.full((len(logits),), 7)

    assert generate(make(), [[1], [2, 3]], 3, pick) == [[7] * 3, [7] * 3]
    assert shapes == [(2, 64)] * 3
    for bad in ([], [[]], [[1], []]):
        with pytest.raises(UserError, match="at least one token"):
            generate(make(), bad, 3)


@torch.no_grad()
@pytest.mark.parametrize("rows", [5, 8, 256])
def test_samples_of_several_prompts(rows):
    """Samples that differ, each as if it had been alone, however many are in memory and whichever ends first;
    those that have ended are not computed any longer."""
    net, prompts = make(), [ids(1, n, seed=n)[0].tolist() for n in (3, 17, 9, 5)]
    drawn = []

    def pick(logits):  # one of the best two
        best, second = logits.topk(2).indices.T
        drawn.append(len(logits))
        return torch.where(torch.rand(len(logits), generator=generator) < 0.5, best, second)

    generator = torch.Generator().manual_seed(0)
    texts = generate(net, prompts, [20, 7, 20, 12], pick, eos_id=list(range(0, 64, 13)), samples=3, rows=rows)
    assert len({tuple(t) for t in texts}) > 8
    assert max(drawn) <= rows and len(drawn) < sum(map(len, texts)) / 2 and min(drawn) < max(drawn)
    for i, text in enumerate(texts):
        logits = net(torch.tensor([prompts[i // 3] + text]))[0][0, len(prompts[i // 3]) - 1 : -1]
        assert all(token in logits[n].topk(2).indices for n, token in enumerate(text))
        assert len(text) == [20, 7, 20, 12][i // 3] or text[-1] % 13 == 0


@torch.no_grad()
@pytest.mark.parametrize("head", ["lm", "score"])
def test_the_result_at_some_places(head):
    net, x, y, at = make(head=head), ids(2, 12), ids(2, 12, seed=1), torch.tensor([3, 3, 20, 11])
    close(net(x, at=at)[0], net(x)[0].flatten(0, 1)[at])
    close(net(x, at=at, output="hidden")[0], net(x, output="hidden")[0].flatten(0, 1)[at])
    if head == "lm":
        close(net(x, y.flatten()[at], at=at)[0], net(x, y)[0].flatten()[at])


# ---- initialisation and stages -----------------------------------------------------------------------------


@pytest.mark.parametrize("tie", [True, False])
def test_two_stages_are_one_model(tie):
    config = TINY.replace(n_layer=4, tie=tie, window=(None, 3, None, 5))
    whole = Transformer(config).init_weights(1).eval()
    stages = [Transformer(config, layers).init_weights(1) for layers in (range(0, 2), range(2, 4))]
    tensors = dict(whole.named_parameters())
    for stage in stages:
        for name, p in stage.eval().named_parameters():
            assert torch.equal(p, tensors[name]), name
    assert {n for s in stages for n, _ in s.named_parameters()} == tensors.keys()
    x, y = ids(2, 12), ids(2, 12, seed=1)
    hidden, aux = stages[0](x)
    assert hidden.shape == (2, 12, config.n_embd)
    close(stages[1](hidden, aux=aux)[0], whole(x)[0])
    close(stages[1](hidden, y, aux=aux)[0], whole(x, y)[0])


def test_auxiliary_losses_are_passed_on():
    net = make()
    earlier = torch.full((TINY.n_layer, 1), 1.5)
    assert torch.equal(net(ids(1, 4), aux=earlier)[1], earlier)


def test_initialisation_depends_on_seed_and_name():
    a, b, c = (dict(Transformer(TINY).init_weights(s).named_parameters()) for s in (0, 0, 1))
    assert all(torch.equal(a[n], b[n]) for n in a)
    matrices = [n for n in a if a[n].dim() == 2]
    assert not any(torch.equal(a[n], c[n]) for n in matrices)
    assert len({a[n].flatten()[0].item() for n in matrices}) == len(matrices)  # no two from one stream
    up, down = a["layers.0.mlp.up_proj.weight"], a["layers.0.mlp.down_proj.weight"]
    assert up.std().item() == pytest.approx(32**-0.5, rel=0.1)
    assert down.std().item() == pytest.approx(48**-0.5 / 2, rel=0.1)  # smaller by sqrt(2 L)
    loss = Transformer(TINY).init_weights()(ids(4, 32), ids(4, 32, seed=1))[0].mean().item()
    assert loss == pytest.approx(math.log(64), abs=0.1)  # it knows nothing yet


def test_every_matrix_product_is_a_linear_child_called_as_a_module():
    """So LoRA, int8 and tensor parallelism can be put on from outside."""
    net = make(tie=False)
    called = set()
    for name, m in net.named_modules():
        if isinstance(m, torch.nn.Linear):
            m.register_forward_hook(lambda *_, name=name: called.add(name))
    net(ids(1, 4), ids(1, 4))
    matrices = {n.removesuffix(".weight") for n, p in net.named_parameters() if p.dim() == 2}
    assert called == matrices - {"embed_tokens"}


def test_names_do_not_change_when_compiled():
    net = make()
    names = list(net.state_dict())
    net.compile_blocks()
    net.recompute = True
    assert list(net.state_dict()) == names


# ---- optimizers --------------------------------------------------------------------------------------------


def step(net, optimizer, i):
    net(ids(4, 16, seed=i), ids(4, 16, seed=i + 100))[0].mean().backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("tie", [True, False])
def test_weight_decay_is_of_matrices_and_muon_of_those_inside_layers(name, tie):
    """Without a gradient a step is nothing but decay: matrices shrink by lr x 0.1, norms and biases stay."""
    net = make(tie=tie, qk_norm=False, qkv_bias=True)
    optimizer = octavo.build_optimizer(net, name, lr=1e-3, weight_decay=0.1)
    optimizer.set_lr(0.5)
    before = {n: p.clone() for n, p in net.named_parameters()}
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for n, p in net.named_parameters():
        torch.testing.assert_close(p, before[n] * (1 - 0.5 * 0.1 if p.dim() == 2 else 1.0))
    kept = {}
    for key in optimizer.state_dict():
        owner, _, kind = key.rpartition("/")
        kept.setdefault(owner, set()).add(kind)
    assert kept.keys() == before.keys()
    for n, p in before.items():
        inner = p.dim() == 2 and n.startswith("layers.")
        assert ("momentum_buffer" in kept[n]) == (name == "muon" and inner), n


def test_optimizer_unknown():
    with pytest.raises(UserError, match="adamw or muon"):
        octavo.build_optimizer(make(), "sgd")


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_goes_on_bit_for_bit(name, tmp_path):
    net = make(seed=3)
    optimizer = octavo.build_optimizer(net, name, lr=1e-2)
    for i in range(3):
        step(net, optimizer, i)
    save_file(optimizer.state_dict(), tmp_path / "o.safetensors")  # through the disk, as a run does
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    for i in range(3, 6):
        step(net, optimizer, i)

    other = make()
    other.load_state_dict(weights)
    fresh = octavo.build_optimizer(other, name, lr=1e-2)
    fresh.load_state_dict(dict(octavo.read_tensors(tmp_path / "o.safetensors")))
    for i in range(3, 6):
        step(other, fresh, i)
    for (key, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), key
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, optimizer.state_dict()[key]), key
    cold = make()
    cold.load_state_dict(weights)
    optimizer = octavo.build_optimizer(cold, name, lr=1e-2)
    step(cold, optimizer, 3)
    assert optimizer.state_dict().keys() == fresh.state_dict().keys()  # all state comes and goes
    assert any(not torch.equal(a, b) for a, b in zip(cold.parameters(), other.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_learns(name):
    net = Transformer(TINY).init_weights()
    optimizer = octavo.build_optimizer(net, name, lr=1e-2)
    x = ids(4, 16)
    for _ in range(40):
        loss = net(x[:, :-1], x[:, 1:])[0].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 1.0 < math.log(64)


# ---- the run -----------------------------------------------------------------------------------------------


def test_import_does_nothing():
    """No words, no threads, no CUDA, no command: of model.py alone, then of all eight files."""
    code = f"""
import sys, threading, torch
before = threading.active_count(), torch.get_num_threads()
import model
files = {{name: getattr(module, "__file__", None) or "" for name, module in sys.modules.items()}}
here = {{name for name, file in files.items() if file.rpartition("/")[0] == {str(ROOT)!r}}} - {{"__main__"}}
assert here <= {{"model", "tokenize"}}, here  # tokenize: the standard module, which that file hands over
assert "octavo_tokenize" not in sys.modules and "rich" not in sys.modules
sys.path.insert(0, {str(ROOT / "tests")!r})
from conftest import SCRIPTS, script
for name in SCRIPTS:
    script(name)
assert (threading.active_count(), torch.get_num_threads()) == before
assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
assert not {{"matplotlib", "transformers"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def imports(node) -> set[str]:
    """List the scripts that a piece of source imports."""
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Import):
            names |= {alias.name for alias in part.names}
        elif isinstance(part, ast.ImportFrom):
            names.add(part.module)
    return names & set(SCRIPTS) - {"tokenize"}  # that name is Python's own module


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_are_a_star(name):
    """Every script imports model.py and no other; model.py opens moe.py, in one function, when asked."""
    tree = ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))
    if name != "model":
        assert imports(tree) == {"model"}
        return
    doors = [part.name for part in ast.walk(tree) if isinstance(part, ast.FunctionDef) and imports(part)]
    assert imports(tree) == {"moe"} and doors == ["load_moe"]
    assert not any(imports(part) for part in tree.body if not isinstance(part, ast.FunctionDef))


def test_device_and_dtype():
    cpu = octavo.pick_device("cpu")
    assert cpu == torch.device("cpu")
    assert octavo.pick_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(UserError, match="--device is auto, cpu"):
        octavo.pick_device("no-such-device")
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert {n: octavo.pick_dtype(n, cpu) for n in named} == named
    assert octavo.pick_dtype("auto", cpu) in (torch.float32, torch.bfloat16)
    assert octavo.pick_dtype("auto", torch.device("mps")) == torch.float32
    with pytest.raises(UserError, match="fp8"):
        octavo.pick_dtype("fp8", cpu)


def test_peak_is_positive_even_when_one_product_takes_longer_than_the_time_given():
    assert octavo.peak_flops(torch.device("cpu"), torch.float32, seconds=1e-6) > 0


def test_commands_end_in_a_sentence(capsys):
    def fail():
        raise UserError("The [moon] is full; try tomorrow.")

    with pytest.raises(SystemExit) as stop:
        octavo.run_app(fail)
    assert stop.value.code == 2
    assert "error: The [moon] is full; try tomorrow." in capsys.readouterr().err

    def interrupt():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        octavo.run_app(interrupt)
    assert stop.value.code == 130


def test_seeds_are_distinct_and_stable():
    seeds = [octavo.seed_of(s, n) for s, n in itertools.product(range(4), "abcd")]
    assert len(set(seeds)) == 16 and all(0 <= s < 2**63 for s in seeds)
    assert octavo.seed_of(0, "layers.0.mlp.up_proj.weight") == 4431477015680328530  # on every machine
