"""Every open family: their folders give their logits here, and ours, saved as one of them, the same there."""


import json

import model as octavo
import pytest
import torch
from model import Cache, Config, UserError, generate, load_model, save_checkpoint

transformers = pytest.importorskip("transformers", reason="transformers is in requirements-dev.txt")

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.0]}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 160}
GEMMA = {"head_dim": 16, "max_position_embeddings": 160}
MOE = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}
MLA = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12,
       "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2,
       "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2}
SCALED = YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 0.707, "mscale_all_dim": 1.0}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
CASES = {  # what the case is about: class, its sizes
    "GPT-2": ("GPT2LMHeadModel", GPT2),
    "GPT-2, inner width": ("GPT2LMHeadModel", GPT2 | {"n_inner": 40, "tie_word_embeddings": False}),
    "LLaMA, all heads": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "LLaMA, one KV head": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "LLaMA, wide heads": ("LlamaForCausalLM", {"head_dim": 16, "tie_word_embeddings": True}),
    "LLaMA, biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "LLaMA 3.1": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "LLaMA, interpolated": ("LlamaForCausalLM", {"rope_parameters": LINEAR}),
    "LLaMA, YaRN": ("LlamaForCausalLM", {"rope_parameters": YARN}),
    "LLaMA, YaRN told": ("LlamaForCausalLM", {"rope_parameters": SCALED | {"truncate": False}}),
    "LLaMA, gelu": ("LlamaForCausalLM", {"hidden_act": "gelu"}),
    "Mistral": ("MistralForCausalLM", {"sliding_window": 6}),
    "Mistral, no window": ("MistralForCausalLM", {"sliding_window": None, "head_dim": 16}),
    "Mixtral": ("MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "Mixtral, window": ("MixtralForCausalLM", {"num_local_experts": 4, "sliding_window": 6}),
    "Qwen2": ("Qwen2ForCausalLM", {"tie_word_embeddings": True}),
    "Qwen2, windows": ("Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "Qwen2, YaRN": ("Qwen2ForCausalLM", {"rope_parameters": YARN}),
    "Qwen2-MoE": ("Qwen2MoeForCausalLM", MOE | {"shared_expert_intermediate_size": 48}),
    "Qwen2-MoE, dense first": ("Qwen2MoeForCausalLM", MOE | {"shared_expert_intermediate_size": 24, "mlp_only_layers": [0]}),
    "Qwen3": ("Qwen3ForCausalLM", {"head_dim": 16, "tie_word_embeddings": True}),
    "Qwen3, biases": ("Qwen3ForCausalLM", {"attention_bias": True}),
    "Qwen2-MoE, windows": ("Qwen2MoeForCausalLM", MOE | {"shared_expert_intermediate_size": 24, "sliding_window": 6,
                           "use_sliding_window": True, "max_window_layers": 2}),
    "Qwen3-MoE, window": ("Qwen3MoeForCausalLM", MOE | {"use_sliding_window": True, "sliding_window": 6}),
    "Qwen3-MoE": ("Qwen3MoeForCausalLM", MOE | {"head_dim": 16, "norm_topk_prob": True}),
    "Qwen3-MoE, dense": ("Qwen3MoeForCausalLM", MOE | {"mlp_only_layers": [1], "decoder_sparse_step": 1}),
    "Gemma": ("GemmaForCausalLM", GEMMA | {"num_key_value_heads": 1}),
    "Gemma, untied": ("GemmaForCausalLM", GEMMA | {"tie_word_embeddings": False}),
    "Gemma 2": ("Gemma2ForCausalLM", GEMMA | {"sliding_window": 6, "query_pre_attn_scalar": 24}),
    "Gemma 2, small caps": ("Gemma2ForCausalLM", GEMMA | {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.0}),
    "Gemma 3": ("Gemma3ForCausalLM", GEMMA | {"sliding_window": 6, "layer_types": SLIDING}),
    "Gemma 3, slowed": ("Gemma3ForCausalLM", GEMMA | {"sliding_window": 6, "layer_types": SLIDING, "rope_parameters": {
        "full_attention": LINEAR | {"rope_theta": 1e6}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    "Phi-2": ("PhiForCausalLM", {"num_key_value_heads": 4}),
    "Phi-1, few heads": ("PhiForCausalLM", {"partial_rotary_factor": 0.25, "hidden_act": "gelu"}),
    "Phi-3": ("Phi3ForCausalLM", {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}),
    "Phi-3, window": ("Phi3ForCausalLM", {"sliding_window": 6, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}),
    "Phi-4-mini": ("Phi3ForCausalLM", {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "num_key_value_heads": 1,
                   "original_max_position_embeddings": 16, "tie_word_embeddings": True,
                   "rope_parameters": LONG | {"partial_rotary_factor": 1.0}}),
    "Phi-3, part": ("Phi3ForCausalLM", {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "DeepSeek-V2": ("DeepseekV2ForCausalLM", MLA | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 1.5}),
    "DeepSeek-V2-Lite": ("DeepseekV2ForCausalLM", MLA | {"q_lora_rank": None, "n_group": 1, "topk_group": 1}),
    "DeepSeek-V2, YaRN": ("DeepseekV2ForCausalLM", MLA | {"rope_parameters": SCALED}),
    "DeepSeek-V3": ("DeepseekV3ForCausalLM", MLA | {"num_mtp_layers": 0}),
    "DeepSeek-V3, YaRN": ("DeepseekV3ForCausalLM", MLA | {"rope_parameters": SCALED, "norm_topk_prob": False}),
    "DeepSeek-V3, one step": ("DeepseekV3ForCausalLM", MLA | {"q_lora_rank": None, "first_k_dense_replace": 2}),
}
# What these are besides: the first class in the table that says all of it.
PLAIN = dict.fromkeys(["Mistral, no window", "Phi-3", "Phi-4-mini"], "LlamaForCausalLM")
PLAIN |= {"Phi-3, window": "MistralForCausalLM"}


def make(name: str, sizes: dict):
    """Build the stock class with random weights that make a difference everywhere."""
    cls = getattr(transformers, name)
    sizes = sizes if name == "GPT2LMHeadModel" else SIZES | sizes
    config = cls.config_class(**sizes)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    net = cls(config).float().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() < 2 else p.shape[-1] ** -0.5) + (p.dim() < 2) * p)
        for key, b in net.named_buffers():
            if key.endswith("correction_bias"):
                b.copy_(torch.randn_like(b) * 0.1)
    return net


QUICK = ["GPT-2", "LLaMA, wide heads", "LLaMA 3.1", "LLaMA, YaRN", "Mistral", "Mixtral", "Qwen2, windows", "Qwen2-MoE",
         "Qwen3", "Qwen3-MoE, window", "Gemma", "Gemma 2, small caps", "Gemma 3, slowed", "Phi-2", "Phi-4-mini",
         "DeepSeek-V2", "DeepSeek-V2-Lite", "DeepSeek-V3, YaRN"]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c not in QUICK)) for c in CASES])
def test_a_published_folder_is_what_it_is_there(case, tmp_path):
    name, sizes = CASES[case]
    theirs = make(name, sizes)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs")
    x = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1))
    expected = theirs(x).logits
    logits = ours(x)[0]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert octavo.count_params(ours.config)[0] == theirs.num_parameters()
    for chunks in ([24], [1] * 24, [3, 1, 8, 12]):  # with a cache, token by token and in pieces
        cache = Cache(ours.config, 2, 24)
        cached = torch.cat([ours(part, cache=cache)[0] for part in x.split(chunks, 1)], 1)
        if "longrope" not in str(ours.config.rope_scaling):  # (which goes by what was read so far)
            torch.testing.assert_close(cached, logits, atol=1e-4, rtol=0)
    short = x[:1, :10]  # what is written goes on beyond any window, and beyond LongRoPE's first context
    want = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "top_p": None, "temperature": None}
    text = theirs.generate(short, attention_mask=torch.ones_like(short), max_new_tokens=70, min_new_tokens=70, **want)
    assert text[0, 10:].tolist() == generate(ours, short.tolist(), 70)[0]
    (tmp_path / "tokenizer.json").write_text("{}")
    save_checkpoint(tmp_path / "ours", ours, tmp_path / "tokenizer.json")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert type(again).__name__ == PLAIN.get(case, name)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(again(x).logits, expected, atol=1e-4, rtol=0)
    assert load_model(tmp_path / "ours").config == ours.config


def as_before(facts: dict) -> dict:
    """Say the same in the places where config.json had it before rope_parameters."""
    rope = facts.pop("rope_parameters", {})
    if "full_attention" in rope:
        facts["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        facts["sliding_window_pattern"] = 2
        facts.pop("layer_types")
        rope = rope["full_attention"]
    if rope:
        facts["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        facts["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type", "default")
    word = "rope_type" if "rope_local_base_freq" in facts else "type"  # Gemma 3 always said rope_type
    facts["rope_scaling"] = None if kind == "default" else {word: kind} | rope
    if kind == "longrope":  # as Phi-3's folders were first published
        facts["rope_scaling"]["type"] = "su"
    facts["torch_dtype"] = facts.pop("dtype", None)
    facts.pop("layer_types", None)
    return facts


OLD = ["GPT-2", "Qwen2-MoE, windows", "Qwen3-MoE, window", "LLaMA 3.1", "LLaMA, interpolated", "LLaMA, YaRN", "Mistral", "Mixtral, window", "Qwen2, windows", "Qwen2, YaRN",
       "Qwen3", "Gemma 2", "Gemma 3, slowed", "Phi-2", "Phi-4-mini", "DeepSeek-V2, YaRN", "DeepSeek-V3, YaRN"]  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("case", OLD)
def test_an_older_config_json_says_the_same(case, tmp_path):
    name, sizes = CASES[case]
    theirs = make(name, sizes)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(as_before(json.loads(path.read_text()))))
    x = torch.randint(64, (2, 24), generator=torch.Generator().manual_seed(1))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(again(x).logits, theirs(x).logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(load_model(tmp_path)(x)[0], theirs(x).logits, atol=1e-4, rtol=0)


# ---- What holds for every way of positions


TINY = Config(vocab_size=64, seq_len=48, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_dim=8, ffn_dim=48)
LATENT = TINY.replace(kv_rank=16, nope_dim=8, rope_dim=8, v_dim=12, n_kv_head=4, qk_norm=False)
WAYS = {
    "rope": TINY, "half rotated": TINY.replace(rope_dim=4), "latent": LATENT, "latent, low rank": LATENT.replace(q_rank=12),
    "linear": TINY.replace(rope_scaling=LINEAR | {"rope_theta": None}),
    "ntk": TINY.replace(rope_scaling={"rope_type": "ntk", "factor": 4.0}),
    "yarn": TINY.replace(rope_scaling=YARN | {"rope_theta": None}),
    "llama3": TINY.replace(rope_scaling=LLAMA3 | {"rope_theta": None}),
    "alibi": TINY.replace(position="alibi"), "alibi, three heads": TINY.replace(position="alibi", n_head=3, n_kv_head=1),
    "none": TINY.replace(position="none"), "learned": TINY.replace(position="learned"),
    "window": TINY.replace(window=5), "window and global": TINY.replace(window=5, global_tokens=2),
    "window, alibi": TINY.replace(window=(5, None), position="alibi"), "capped": TINY.replace(attn_cap=1.0, window=(5, None)),
    "after norms": TINY.replace(post_norm=True, norm_plus_one=True, scale_embedding=True, attn_scalar=20.0),
    "parallel": TINY.replace(parallel_block=True, norm="layer", gated=False, mlp_bias=True, o_bias=True, head_bias=True),
}


def ours(config, seed=0):
    """Build a model of ours whose biases and norms make a difference, too."""
    net = octavo.Transformer(config).init_weights(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() < 2:
                p += 0.3 * torch.randn(p.shape, generator=generator)
    return net


def draw(B, T, seed=0):
    return torch.randint(64, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_whatever_the_positions(way, tmp_path):
    """A later token changes nothing; a cache, padding and a folder neither."""
    net, x = ours(WAYS[way]), draw(2, 20)
    logits = net(x)[0]
    y = x.clone()
    y[:, 12] = (y[:, 12] + 1) % 64
    torch.testing.assert_close(net(y)[0][:, :12], logits[:, :12], atol=1e-6, rtol=0)
    assert (net(y)[0][:, 12:] - logits[:, 12:]).abs().max() > 1e-3
    for chunks in ([1] * 20, [7, 1, 12]):
        cache = Cache(net.config, 2, 20)
        cached = torch.cat([net(part, cache=cache)[0] for part in x.split(chunks, 1)], 1)
        torch.testing.assert_close(cached, logits, atol=1e-5, rtol=0)
    left = torch.cat((draw(2, 5, seed=9), x), 1)
    positions = torch.cat((torch.full((5,), -1), torch.arange(20))).expand(2, -1)
    torch.testing.assert_close(net(left, positions=positions)[0][:, 5:], logits, atol=1e-5, rtol=0)
    (tmp_path / "tokenizer.json").write_text("{}")
    save_checkpoint(tmp_path / "out", net, tmp_path / "tokenizer.json")
    again = load_model(tmp_path / "out")
    assert again.config == net.config and torch.equal(again(x)[0], logits)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_a_text_may_begin_anywhere(way):
    """All positions shifted: the same, but where places are learned or some tokens are global."""
    net, x = ours(WAYS[way]), draw(2, 12)
    shifted = net(x, positions=torch.arange(12) + 9)[0]
    same = way not in ("learned", "window and global")
    assert torch.allclose(shifted, net(x)[0], atol=2e-4) == same


def test_alibi_is_a_penalty_that_grows_with_the_distance():
    """Slopes as in the paper, section 3 and its code: also where the heads are no power of two."""
    assert octavo.alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert octavo.alibi_slopes(12)[8:] == [2.0**-x for x in (0.5, 1.5, 2.5, 3.5)]
    positions = torch.arange(6)
    mask = octavo.visible(positions, positions)[None]
    bias = octavo.alibi_bias(mask, positions, positions, 12)
    for head, slope in enumerate(octavo.alibi_slopes(12)):
        for q in range(6):
            for k in range(6):
                assert bias[0, head, q, k] == pytest.approx(-slope * (q - k) if k <= q else -torch.inf)


def test_a_global_token_is_seen_beyond_the_window():
    positions = torch.arange(6)
    seen = octavo.visible(positions, positions, window=2, n_global=1)
    assert seen.int().tolist()[4] == [1, 0, 0, 1, 1, 0] and not seen[0, 1]


def test_what_a_forward_pass_cannot_do_is_refused_at_the_door():
    net = ours(TINY)
    cache = Cache(net.config, 2, 8)
    positions = torch.tensor([[0, 1, 2], [0, -1, -1]])
    net(draw(2, 3), positions=positions, cache=cache)
    with pytest.raises(UserError, match="say the positions"):
        net(draw(2, 1), cache=cache)
    learned = ours(WAYS["learned"])
    cache = Cache(learned.config, 1, 99)
    with pytest.raises(UserError, match="learned 48 places"):
        learned(draw(1, 49), cache=cache)
    assert cache.n == 0


def test_longrope_stays_what_it_was_when_the_context_is_trained_shorter():
    config = octavo.config_from_hf(make(*CASES["Phi-4-mini"]).config.to_dict() | {"architectures": ["Phi3ForCausalLM"]})
    x = torch.arange(3)
    assert octavo.rope_frequencies(config, x)[1] == octavo.rope_frequencies(config.replace(seq_len=8), x)[1] > 1.1


@torch.no_grad()
def test_a_routers_bias_stays_in_float32(tmp_path):
    theirs = make(*CASES["DeepSeek-V3"])
    theirs.save_pretrained(tmp_path)
    net = load_model(tmp_path, dtype=torch.bfloat16)
    kept = net.layers["2"].mlp.gate.e_score_correction_bias
    assert kept.dtype == torch.float32 and torch.equal(kept, theirs.model.layers[2].mlp.gate.e_score_correction_bias)
    actor = octavo.cast(octavo.Transformer(net.config), "cpu", torch.bfloat16)
    assert {p.dtype for p in actor.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in actor.buffers()} == {torch.float32}


@pytest.mark.parametrize("changes", [
    {"pad_token_id": -1}, {"rope_theta": 3580165449.0, "rope_parameters": None}, {"hidden_act": "swish"}, {"architectures": None},
    {"rope_parameters": YARN | {"finetuned": True, "mscale_all_dim": 0}},
], ids=str)  # fmt: skip
def test_what_published_files_say_in_odd_ways_is_read(changes, tmp_path):
    folder = published(tmp_path)
    change_config(folder, **changes)
    load_model(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_an_end_of_text_of_minus_one_is_none(name, tmp_path):
    folder = published(tmp_path)
    change_config(folder, eos_token_id=-1 if name == "config.json" else 7)
    (folder / "generation_config.json").write_text(json.dumps({} if name == "config.json" else {"eos_token_id": -1}))
    assert load_model(folder).config.eos_ids == set()


def test_the_token_that_begins_a_text_is_kept(tmp_path):
    folder = published(tmp_path)
    change_config(folder, bos_token_id=7)
    (folder / "tokenizer.json").write_text("{}")
    save_checkpoint(tmp_path / "out", load_model(folder), folder / "tokenizer.json")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["bos_token_id"] == 7


def test_learned_places_end():
    net = ours(WAYS["learned"])
    with pytest.raises(UserError, match="learned 48 places"):
        net(draw(1, 49))
    assert len(generate(net, draw(1, 40).tolist(), 30)[0]) == 9  # the last of them is not read


@pytest.mark.slow
@pytest.mark.parametrize("way", ["rope", "yarn", "alibi", "latent", "capped", "parallel", "after norms"])
def test_a_block_is_compiled_whole(way):
    net = ours(WAYS[way]).train()
    x = draw(2, 16)
    explained = torch._dynamo.explain(lambda x: net(x, x)[0].sum())(x)
    assert explained.graph_break_count == 0


# ---- Folders that cannot be opened


def published(tmp_path, case="LLaMA, all heads"):
    make(*CASES[case]).save_pretrained(tmp_path)
    return tmp_path


def change_config(folder, **changes):
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | changes))


@pytest.mark.parametrize("case, changes, word", [
    ("LLaMA, all heads", {"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM"),
    ("LLaMA, all heads", {"architectures": ["Gemma3ForConditionalGeneration"]}, "Gemma3ForConditionalGeneration"),
    ("LLaMA, all heads", {"num_hidden_layers": 4}, "lacks 9 tensors"),
    ("LLaMA, all heads", {"num_hidden_layers": 2}, "no place"),
    ("LLaMA, all heads", {"intermediate_size": 50}, "not floats of"),
    ("LLaMA, all heads", {"rope_parameters": LINEAR | {"factor": "4"}}, "factor"),
    ("LLaMA, all heads", {"rope_parameters": "fast"}, "has to be an object"),
    ("LLaMA, all heads", {"architectures": [["LlamaForCausalLM"]]}, "cannot be opened"),
    ("Mistral", {"num_hidden_layers": 10**30}, "n_layer"),
    ("DeepSeek-V2, YaRN", {"rope_parameters": SCALED | {"mscale_all_dim": 1e300}}, "mscale_all_dim"),
    ("Gemma 2", {"query_pre_attn_scalar": 0}, "attn_scalar"),
    ("Gemma 2", {"final_logit_softcapping": 0}, "logit_cap"),
    ("Phi-2", {"partial_rotary_factor": 1e-3, "rope_parameters": None}, "rope_dim"),
    ("LLaMA, all heads", {"hidden_size": 10**7, "intermediate_size": 10**8}, "GiB"),
    ("Qwen3-MoE", {"num_experts": 90, "moe_intermediate_size": 10**9}, "GiB"),
    ("Qwen2-MoE", {"shared_expert_intermediate_size": 50}, "shared expert"),
    ("Gemma 3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
    ("Gemma", {"hidden_activation": "relu"}, "hidden_activation"),
    ("Phi-4-mini", {"rope_parameters": LONG | {"long_factor": [1.0, 2.0]}}, "long_factor"),
    ("Phi-2", {"partial_rotary_factor": "half", "rope_parameters": None}, "partial_rotary_factor"),
    ("Phi-2", {"qk_layernorm": True}, "qk_layernorm"),
    ("GPT-2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("GPT-2", {"n_embd": "many"}, "n_embd"),
    ("DeepSeek-V3", {"rope_interleave": False}, "rope_interleave"),
    ("DeepSeek-V3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ("DeepSeek-V2", {"topk_method": "noaux_tc"}, "topk_method"),
    ("DeepSeek-V2", {"n_shared_experts": 0}, "shared experts"),
    ("DeepSeek-V2", {"v_head_dim": None}, "v_dim"),
], ids=str)  # fmt: skip
def test_a_folder_that_says_something_else_is_refused(case, changes, word, tmp_path):
    folder = published(tmp_path, case)
    change_config(folder, **changes)
    with pytest.raises(UserError, match=word):
        load_model(folder)


def test_pickled_weights_are_never_opened(tmp_path):
    folder = published(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pytorch_model.bin"):
        load_model(folder)


def test_a_shard_that_is_absent_or_elsewhere(tmp_path):
    folder = tmp_path / "a"
    make(*CASES["LLaMA, all heads"]).save_pretrained(folder, max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = sorted(set(index["weight_map"].values()))[-1]
    (folder / shard).rename(tmp_path / shard)
    with pytest.raises(UserError, match=f"{shard} is missing"):
        load_model(folder)
    index["weight_map"] = {name: f"../{shard}" if file == shard else file for name, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside of its folder"):
        load_model(folder)


def test_weights_stay_as_they_are_stored(tmp_path):
    make(*CASES["Gemma 2"]).bfloat16().save_pretrained(tmp_path / "in")
    net = load_model(tmp_path / "in")
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    (tmp_path / "tokenizer.json").write_text("{}")
    save_checkpoint(tmp_path / "out", net, tmp_path / "tokenizer.json")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    again = load_model(tmp_path / "out")
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), again.parameters(), strict=True))
    assert load_model(tmp_path / "in", dtype=torch.float32).norm.weight.dtype == torch.float32
