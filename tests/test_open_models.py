"""Every open family: their folders give their logits here, and ours, saved as one of them, the same there."""


import model as octavo
import pytest
import torch
from model import Cache, generate, load_model, save_checkpoint

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
        for key, p in net.named_parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.dim() < 2 else p.shape[-1] ** -0.5) + (p.dim() < 2) * p)
        for key, b in net.named_buffers():
            if key.endswith("correction_bias"):
                b.copy_(torch.randn_like(b) * 0.1)
    return net


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
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
