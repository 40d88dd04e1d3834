"""moe.py: routers and layers against transformers, fast dispatch against the loop, balance, the commands."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import command as launch

import moe
from model import (
    AUX,
    PRESETS,
    Config,
    MoEConfig,
    Options,
    Transformer,
    UserError,
    build_optimizer,
    generate,
    load_model,
    moe_from_hf,
    routing_record,
    save_checkpoint,
)

SMALL = Config(vocab_size=64, seq_len=32, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, head_dim=16, ffn_dim=48)
QWEN = SMALL.replace(moe=MoEConfig(4, 2, 24))
KINDS = {
    "softmax": MoEConfig(6, 2, 16),
    "before": MoEConfig(6, 3, 16, normalize=False),
    "sigmoid": MoEConfig(6, 2, 16, score="sigmoid", bias=True, scale=2.5),
    "shared": MoEConfig(6, 2, 16, n_shared=2),
    "groups": MoEConfig(6, 2, 16, n_group=3, topk_group=2),
    "sigmoid groups": MoEConfig(8, 3, 16, score="sigmoid", bias=True, n_group=2, topk_group=1, n_shared=1),
    "one": MoEConfig(4, 1, 16),
    "all": MoEConfig(3, 3, 16),
}


def net(config, seed=0):
    model = Transformer(config).init_weights(seed)
    with torch.no_grad():  # a bias of zero would hide whether it acts
        for buffer in model.buffers():
            buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return model


def ids(config, B=2, T=16, seed=0):
    return torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def command(*args, **kwargs):
    return SimpleNamespace(**dict(zip(("returncode", "stdout", "stderr"), launch(*args, **kwargs), strict=True)))


def options(**changes):
    return Options(**{"balance_rate": 0.01, **changes})


# --- against transformers ---

HF = {
    "mixtral": (SMALL.replace(qk_norm=False, tie=False, moe=MoEConfig(4, 2, 40), ffn_dim=40), "MixtralForCausalLM"),
    "mixtral, one of 8": (SMALL.replace(qk_norm=False, moe=MoEConfig(8, 1, 40), ffn_dim=40), "MixtralForCausalLM"),
    "qwen3": (QWEN, "Qwen3MoeForCausalLM"),
    "qwen3, 16 fine": (SMALL.replace(moe=MoEConfig(16, 4, 8, normalize=False), tie=False), "Qwen3MoeForCausalLM"),
    "qwen3, a dense layer": (SMALL.replace(moe=MoEConfig(4, 2, 24, dense=(1,))), "Qwen3MoeForCausalLM"),
    "deepseek-v3's experts": (SMALL.replace(moe=MoEConfig(8, 2, 16, 1, (0,), "sigmoid", True, 1.7, True, 4, 2)), "Dots1ForCausalLM"),
}


@pytest.mark.parametrize("name", HF)
def test_logits_equal_transformers_and_its_folders_open_here(name, tmp_path, data):
    transformers = pytest.importorskip("transformers")
    config, cls = HF[name]
    model = net(config).eval()
    save_checkpoint(tmp_path / "ours", model, data / "tokenizer.json")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [cls]
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs).__name__ == cls
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x = ids(config, 3, 20)
    with torch.no_grad():
        ours = model(x)[0]
        torch.testing.assert_close(ours, theirs(x).logits, atol=1e-4, rtol=0)
        theirs.save_pretrained(tmp_path / "theirs")  # as they write it, back to us
        again = load_model(tmp_path / "theirs")
        assert again.config.replace(pad_id=None, eos_id=None) == config.replace(pad_id=None, eos_id=None)
        torch.testing.assert_close(again(x)[0], ours, atol=1e-6, rtol=0)


@pytest.mark.parametrize("version", ["v2", "v2 greedy", "v3"])
def test_deepseek_layers_equal_transformers(version):
    pytest.importorskip("transformers")
    common = dict(hidden_size=32, moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2,
                  n_group=4, topk_group=2, routed_scaling_factor=1.5, first_k_dense_replace=1, num_hidden_layers=2)  # fmt: skip
    if version == "v3":
        from transformers import DeepseekV3Config as HFConfig
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE as Layer
    else:
        from transformers import DeepseekV2Config as HFConfig
        from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Moe as Layer

        common["topk_method"] = "greedy" if "greedy" in version else "group_limited_greedy"
    theirs = HFConfig(**common)
    theirs._experts_implementation = "eager"
    m = moe_from_hf(theirs.to_dict(), 2)
    assert m.dense == (0,) and m.n_shared == 2 and m.n_expert == 8
    config = SMALL.replace(moe=m)
    block = net(config).layers["1"]
    layer, state = Layer(theirs), dict(block.mlp.state_dict())
    stack = {"gate_up_proj": torch.stack([torch.cat([state[f"experts.{e}.{p}_proj.weight"] for p in ("gate", "up")]) for e in range(8)]),
             "down_proj": torch.stack([state[f"experts.{e}.down_proj.weight"] for e in range(8)])}  # fmt: skip
    own = {k: v for k, v in state.items() if not k.startswith("experts.")}
    layer.load_state_dict(own | {f"experts.{k}": v for k, v in stack.items()})
    x = torch.randn(2, 9, 32)
    with torch.no_grad():
        torch.testing.assert_close(block.mlp.eval()(x)[0], layer.eval()(x), atol=1e-5, rtol=0)


def test_what_no_stock_class_can_say_is_octavos_own():
    for m in (KINDS["shared"], KINDS["groups"], MoEConfig(4, 2, 16, bias=True)):
        config = SMALL.replace(moe=m)
        hf = json.loads(json.dumps(config.to_hf()))
        assert hf["model_type"] == "octavo" and hf["architectures"] == ["OctavoForCausalLM"]
        assert Config.from_hf(hf) == config


def test_deepseek_attention_is_refused_by_name():
    with pytest.raises(UserError, match="DeepseekV3ForCausalLM cannot be opened yet"):
        Config.from_hf({"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3"})


def test_softmax_before_normalized_is_softmax_over_the_chosen():
    logits = torch.randn(50, 8)
    _, chosen, weights = moe.route(logits, MoEConfig(8, 2, 8))
    torch.testing.assert_close(weights, logits.gather(1, chosen).softmax(-1))
    _, _, before = moe.route(logits, MoEConfig(8, 2, 8, normalize=False))
    assert (before.sum(-1) < 1).all()


def test_the_bias_moves_the_choice_and_not_the_weight():
    m, logits = MoEConfig(4, 1, 8, score="sigmoid", bias=True, normalize=False), torch.zeros(5, 4)
    scores, chosen, weights = moe.route(logits, m, torch.tensor([0.0, 0.0, 3.0, 0.0]))
    assert (chosen == 2).all() and (weights == 0.5).all() and (scores == 0.5).all()


# --- dispatch ---


def layer_of(m, seed=0):
    return net(SMALL.replace(moe=m, n_layer=1), seed).layers["0"].mlp


@pytest.mark.parametrize("fill", ["as routed", "one gets none", "one gets all", "dropped", "all dropped"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["runs", "grouped"])
def test_dispatch_equals_the_loop(kind, fill, way, monkeypatch, request):
    m = KINDS[kind]
    layer, x = layer_of(m), torch.randn(24, 32, requires_grad=True)
    monkeypatch.setattr(moe, "grouped", lambda x: way == "grouped")  # what CUDA does; this product runs on CPU too
    _, _, chosen, weights = layer.gate(x)
    if fill == "one gets none":
        chosen = chosen.where(chosen != 0, m.n_expert - 1)
    if fill == "one gets all":
        chosen = torch.zeros_like(chosen)
    if "dropped" in fill:
        chosen = chosen.masked_fill(torch.rand(chosen.shape) < (0.3 if fill == "dropped" else 2), m.n_expert)
    params = [x, *layer.parameters()]
    results = []
    # torch.empty is filled with NaN then: the grouped product leaves the rows of dropped choices as it found them
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    torch.use_deterministic_algorithms(True)
    for f in (moe.loop, moe.dispatch):
        y = f(layer.experts, x, chosen, weights)
        grads = torch.autograd.grad((y * torch.arange(32.0)).sum(), params, allow_unused=True, retain_graph=True)
        results.append((y, [g if g is not None else torch.zeros_like(p) for g, p in zip(grads, params, strict=True)]))
    for a, b in zip([results[0][0], *results[0][1]], [results[1][0], *results[1][1]], strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def test_every_expert_has_a_gradient_also_without_tokens():
    layer = layer_of(MoEConfig(8, 1, 16)).train()
    layer(torch.randn(1, 3, 32))[0].sum().backward()
    assert all(p.grad is not None for p in layer.experts.parameters())
    assert sum(bool(e.up_proj.weight.grad.any()) for e in layer.experts.values()) <= 3


def test_capacity_drops_the_late_ones_within_a_sequence():
    chosen = torch.tensor([[[0], [0], [0], [1]], [[1], [1], [0], [1]]])
    fits = moe.within_capacity(chosen, 2, 1.0)  # room for 1.0 * 1 * 4 / 2 = 2 tokens
    assert fits[..., 0].tolist() == [[True, True, False, True], [True, True, True, False]]
    assert moe.within_capacity(chosen, 2, 2.0).all()


def test_capacity_acts_in_training_only_and_is_causal():
    layer = layer_of(MoEConfig(4, 2, 16))
    x = torch.randn(2, 16, 32)
    free = layer.train()(x)
    layer.capacity = 0.5
    tight = layer(x)
    assert free[1][AUX.index("dropped")] == 0 and tight[1][AUX.index("dropped")] >= 0.5
    assert not torch.equal(free[0], tight[0])
    assert torch.equal(layer.eval()(x)[0], layer_eval(layer, x))
    layer.train()
    changed = x.clone()
    changed[:, 8:] = torch.randn(2, 8, 32)
    torch.testing.assert_close(layer(changed)[0][:, :8], tight[0][:, :8])  # later tokens take nobody's place


def layer_eval(layer, x):
    held, layer.capacity = layer.capacity, None
    y = layer(x)[0]
    layer.capacity = held
    return y


# --- balance ---


def test_balance_loss_equals_transformers_on_one_sequence():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(1, 40, 6)
    scores, chosen, _ = moe.route(logits[0], MoEConfig(6, 2, 8))
    ours = moe.balance_loss(scores[None], moe.loads(chosen[None], 6))
    theirs = mixtral.load_balancing_loss_func((logits[0],), 6, 2)
    torch.testing.assert_close(ours, theirs)
    even = torch.full((1, 40, 6), 1 / 6)
    assert moe.balance_loss(even, torch.full((1, 6), 2 / 6)).item() == pytest.approx(2.0)


@pytest.mark.parametrize("kind", ["softmax", "before", "sigmoid"])
def test_gradients_of_the_losses_equal_finite_differences(kind):
    m = KINDS[kind]
    logits = torch.randn(2, 12, 6, dtype=torch.float64, requires_grad=True)

    def losses(logits):
        scores, chosen, _ = moe.route(logits.flatten(0, 1), m, None)
        load = moe.loads(chosen.view(2, 12, -1), 6).double()
        return moe.balance_loss(scores.view(2, 12, 6), load), moe.z_loss(logits)

    assert torch.autograd.gradcheck(losses, logits, eps=1e-6, atol=1e-8)
    balance, z = losses(logits)
    assert torch.autograd.grad(balance + z, logits)[0].abs().max() > 0


def collapsed(m, seed=0):
    """A layer whose router sends every token to experts 0 and 1, and inputs for it."""
    layer = layer_of(m, seed).train()
    direction = torch.nn.functional.normalize(torch.ones(32), dim=0)
    with torch.no_grad():
        layer.gate.weight.mul_(0.3)
        layer.gate.weight[:2] += 0.3 * direction
    return layer, lambda rng: torch.randn(8, 32, 32, generator=rng) * 0.5 + 3 * direction


@pytest.mark.parametrize("balance", ["loss", "bias", "none"])
def test_a_collapsed_router_comes_back(balance):
    """Trained on a task that any expert can learn, with AdamW on all of it; the figures are in the README."""
    torch.manual_seed(0)
    m = MoEConfig(8, 2, 16, score="sigmoid" if balance == "bias" else "softmax", bias=balance == "bias")
    layer, draw = collapsed(m)
    layer.balance = 0.03 if balance == "loss" else 0.0
    target = torch.randn(32, 32, generator=torch.Generator().manual_seed(3)) / 6
    optimizer, rng = torch.optim.AdamW(layer.parameters(), 1e-3), torch.Generator().manual_seed(4)
    largest = []
    for _ in range(400):
        x = draw(rng)
        y, row = layer(x)
        ((y - x @ target).square().mean() + row[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        load = row[5:].detach()
        if balance == "bias":
            with torch.no_grad():
                layer.gate.e_score_correction_bias += 0.01 * torch.sign(load.mean() - load)
        largest.append(float(load.max() / load.mean()))
    print(f"{balance}: largest load {largest[0]:.2f} -> {np.mean(largest[-20:]):.2f} times the mean")
    assert largest[0] > 3.5  # 4 would be all tokens to two of eight
    assert (np.mean(largest[-20:]) <= 1.5) == (balance != "none")


def test_shift_bias_goes_against_the_load():
    model = net(SMALL.replace(moe=MoEConfig(4, 1, 16, bias=True)))
    before = [b.clone() for b in model.buffers()]
    aux = torch.zeros(2, 9)
    aux[:, 5:] = torch.tensor([0.7, 0.1, 0.1, 0.1])
    model.shift_bias(aux, 0.5)
    for a, b in zip(before, model.buffers(), strict=True):
        torch.testing.assert_close(b - a, torch.tensor([-0.5, 0.5, 0.5, 0.5]))


# --- in the model ---


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_in_closed_form(kind):
    config = SMALL.replace(moe=KINDS[kind])
    assert config.n_params() == sum(p.numel() for p in Transformer(config).parameters())
    counted = moe.sizes(config)
    assert counted == {"parameters": config.n_params(), "active": config.n_params(active=True)}


def test_mixtral_has_47_billion_and_13_active():
    counted = moe.sizes(PRESETS["mixtral-8x7b"])
    assert counted == {"parameters": 46_702_792_704, "active": 12_879_925_248}
    counted = moe.sizes(PRESETS["qwen3-30b-a3b"])
    assert 30.5e9 < counted["parameters"] < 30.6e9 and 3.3e9 < counted["active"] < 3.4e9


def test_decoding_reads_the_active_experts_only():
    config = SMALL.replace(moe=MoEConfig(8, 2, 16, 1), vocab_size=64)
    model = net(config)
    read = moe.bytes_read(model, ids(config, 1, 1))
    lookup = 0 if config.tie else config.vocab_size * config.n_embd
    assert read == 4 * (config.n_params(active=True) - lookup)
    assert moe.bytes_read(model, ids(config, 4, 16)) > read  # many tokens, more experts


def test_recomputation_and_accumulation_leave_the_gradient():
    config = SMALL.replace(moe=MoEConfig(6, 2, 16, 1))
    x, y = ids(config, 4, 16), ids(config, 4, 16, 1)
    o = options(z_loss=0.001, capacity=1.0, balance_rate=0.1)

    def gradients(parts, recompute):
        model = net(config).train()
        model.set_balance(o)
        model.recompute = recompute
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            losses, aux = model(xs, ys)
            (losses.sum() / y.numel() + aux[:, 0].sum() / parts).backward()
        return {n: p.grad for n, p in model.named_parameters()}

    whole = gradients(1, "none")
    assert whole["layers.0.mlp.gate.weight"].abs().max() > 0
    for parts, recompute in ((4, "none"), (1, "block"), (2, "selective")):
        other = gradients(parts, recompute)
        for name, grad in whole.items():
            torch.testing.assert_close(other[name], grad, atol=1e-6, rtol=1e-4)


def test_the_cache_changes_nothing_and_sampling_works():
    model = net(QWEN).eval()
    x = ids(QWEN, 1, 8)
    new = generate(model, x.tolist(), 6)[0]
    for i, token in enumerate(new):
        assert model(torch.cat((x, torch.tensor([new[:i]], dtype=torch.long)), 1))[0][0, -1].argmax() == token


def test_muon_takes_each_experts_matrices():
    model = net(QWEN)
    optimizer = build_optimizer(model, "muon")
    muon = {optimizer.names[p] for g in optimizer.parts[0].param_groups for p in g["params"]}
    assert "layers.0.mlp.experts.3.up_proj.weight" in muon and "layers.0.mlp.gate.weight" in muon


def test_the_record_says_what_the_router_did():
    config = SMALL.replace(moe=MoEConfig(4, 2, 16, dense=(0,)))
    model = net(config).train()
    model.set_balance(options())
    record = routing_record(model(ids(config))[1].detach(), config)
    assert len(record["load"]) == 1 and sum(record["load"][0]) == pytest.approx(2, abs=1e-3)
    assert record["load_max"] == pytest.approx(max(record["load"][0]) / 0.5, abs=1e-2)
    assert 0 < record["router_entropy"] <= 1 and record["dropped"] == 0
    assert record["aux_loss"] == pytest.approx(0.01 * record["balance_loss"], rel=1e-4)
    assert routing_record(torch.zeros(2, 1), SMALL) == {}


@pytest.mark.parametrize(
    "kwargs, words",
    [({"n_active": 9}, "cannot go to 9"), ({"n_group": 3}, "do not go into 3 groups"), ({"score": "tanh"}, "not by 'tanh'")],
)
def test_a_config_that_cannot_be_is_a_sentence(kwargs, words):
    with pytest.raises(UserError, match=words):
        MoEConfig(**{"n_expert": 8, **kwargs})


# --- upcycling, studies, commands ---


def test_an_upcycled_model_computes_what_the_dense_one_does():
    for config in (SMALL, SMALL.replace(qk_norm=False, tie=False), SMALL.replace(qkv_bias=True)):
        dense = net(config).eval()
        for n, k in ((4, 2), (3, 1), (2, 2)):
            model = moe.upcycled(dense, n, k)
            x = ids(config, 2, 12)
            torch.testing.assert_close(model(x)[0], dense(x)[0], atol=1e-5, rtol=0)
            assert all(layer.mlp.gate.weight.abs().sum() > 0 for layer in model.layers.values())


def test_classes_of_tokens():
    text = 'def f(x):\n    # no\n    return f"é{x}" + 12\n'
    whole = [bytes([b]) for b in text.encode()]
    classes = moe.token_classes(whole)
    named = ["".join(chr(b[0]) for b, c in zip(whole, classes, strict=True) if moe.CLASSES[c] == kind) for kind in moe.CLASSES]
    got = dict(zip(moe.CLASSES, named, strict=True))
    assert got["keyword"] == "defreturn" and got["number"] == "12" and got["comment"] == "#no"
    assert got["name"].startswith("fx") and "+" in got["operator"] and "é".encode().decode("latin-1") in got["string"]
    pieces = [b"if", b" x", b":\n", b"  ", b"y\n"]  # a token is of the class of its first byte that is no blank
    assert [moe.CLASSES[c] for c in moe.token_classes(pieces)] == ["keyword", "name", "operator", "indentation", "name"]
    assert moe.token_classes([b"def (("]) is None and moe.token_classes([b"\xff\xfe"]) is None


def test_what_experts_learned_is_told_from_chance():
    rng = np.random.default_rng(0)
    classes = rng.integers(len(moe.CLASSES), size=4000)
    sorted_out = np.stack([classes % 4, (classes % 4 + 1) % 4], 1)  # an expert for each class
    anyhow = np.stack([rng.permutation(4)[:2] for _ in classes])
    table, bits = moe.specialization(sorted_out, classes, 4)
    assert bits > 0.8 and table[0, 0] == pytest.approx(0.5)
    assert moe.specialization(anyhow, classes, 4)[1] < 0.01
    together = moe.pairs(sorted_out, 4)
    assert together[0, 1] > 1.2 and together[0, 2] == 0
    assert moe.pairs(anyhow, 4)[0, 1] == pytest.approx(1, abs=0.1)


TRAIN = ("--preset", "nano", "--n-layer", "2", "--n-embd", "32", "--n-head", "2", "--seq-len", "32", "--tokens-per-step", "256",
         "--warmup-steps", "2", "--eval-tokens", "512", "--eval-interval", "100", "--dtype", "fp32")  # fmt: skip


@pytest.fixture(scope="module")
def trained(modules, tmp_path_factory):
    out = tmp_path_factory.mktemp("moe") / "run"
    done = command("train.py", "--data", modules, "--out", out, *TRAIN, "--max-steps", "6", "--n-expert", "4",
                   "--n-expert-active", "2", "--z-loss", "0.001", "--capacity", "1.25")  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "how often each expert was chosen" in done.stderr
    return out


def test_train_sample_and_the_log(trained):
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    step = next(r for r in records if "load" in r)
    assert {"aux_loss", "balance_loss", "z_loss", "dropped", "router_entropy", "load_max"} <= step.keys()
    assert np.array(step["load"]).shape == (2, 4) and step["dropped"] > 0
    config = json.loads((trained / "config.json").read_text())
    assert (config["architectures"], config["num_experts"], config["moe_intermediate_size"]) == (["Qwen3MoeForCausalLM"], 4, 48)
    done = command("sample.py", trained, "--prompt", "def", "--max-new-tokens", "5")
    assert done.returncode == 0 and done.stdout.strip(), done.stderr[-500:]


@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_resume_is_exact_to_the_bit(balance, modules, tmp_path):
    args = (*TRAIN, "--data", modules, "--n-expert", "4", "--balance", balance, "--router", "sigmoid" if balance == "bias" else "softmax")
    args = (*args, "--save-interval", "3", "--schedule", "constant")
    whole, part = tmp_path / "whole", tmp_path / "part"
    assert command("train.py", *args, "--out", whole, "--max-steps", "6").returncode == 0
    assert command("train.py", *args, "--out", part, "--max-steps", "3").returncode == 0
    assert command("train.py", "--resume", part, "--max-steps", "6").returncode == 0
    a, b = load_model(whole).state_dict(), load_model(part).state_dict()
    assert all(torch.equal(a[n], b[n]) for n in a)
    biases = [n for n in a if n.endswith("correction_bias")]
    assert len(biases) == (2 if balance == "bias" else 0) and all(a[n].abs().max() > 0 for n in biases)


def test_upcycle_study_size_and_init(trained, modules, tmp_path):
    dense, mixture = tmp_path / "dense", tmp_path / "mixture"
    assert command("train.py", "--data", modules, "--out", dense, *TRAIN, "--max-steps", "3").returncode == 0
    done = command("moe.py", "upcycle", dense, mixture, "--data", modules, "--n-expert", "4")
    assert done.returncode == 0, done.stderr[-800:]
    a, b = (float(w) for w in done.stderr.replace(",", " ").split() if w.count(".") == 1 and len(w) == 8 and w[0].isdigit())
    assert a == pytest.approx(b, abs=2e-6)
    done = command("train.py", "--data", modules, "--out", tmp_path / "on", "--init", mixture, "--max-steps", "2",
                   "--tokens-per-step", "256", "--eval-tokens", "512")  # fmt: skip
    assert done.returncode == 0, done.stderr[-800:]
    first = json.loads((tmp_path / "on" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(a, abs=0.5) and len(first["load"][0]) == 4
    done = command("train.py", "--data", modules, "--out", tmp_path / "no", "--init", mixture, "--n-layer", "3")
    assert done.returncode == 2 and "--n-layer cannot be chosen" in done.stderr
    done = command("train.py", "--data", modules, "--out", tmp_path / "no", "--init", mixture, "--balance", "bias")
    assert done.returncode == 2 and "has none" in done.stderr
    done = command("moe.py", "study", trained, "--data", modules, "--tokens", "2000", "--off-tokens", "256")
    assert done.returncode == 0, done.stderr[-800:]
    result = json.loads((trained / "study.json").read_text())
    assert len(result["layers"]["0"]["switched_off"]) == 4 and "costliest to switch off" in done.stderr
    done = command("moe.py", "size", trained)
    assert done.returncode == 0 and "active for a token" in done.stderr
    done = command("moe.py", "study", dense, "--data", modules)
    assert done.returncode == 2 and "dense model" in done.stderr


def test_race_runs_and_writes_its_figures(modules, tmp_path):
    done = command("moe.py", "race", "--data", modules, "--out", tmp_path / "race", "--preset", "nano", "--max-steps", "6",
                   "--seeds", "1", "--sweep", "", "--tokens-per-step", "512", timeout=400)  # fmt: skip
    assert done.returncode == 0, done.stderr[-800:]
    runs = json.loads((tmp_path / "race" / "race.json").read_text())
    assert set(runs) == {"dense", "8 experts", "dense, equal time"}
    assert all(math.isfinite(r["val_bpb"]) for results in runs.values() for r in results)
    assert runs["8 experts"][0]["peak_bytes"] > 0
    done = command("moe.py", "race", "--sweep", "4;8", "--data", modules, "--out", tmp_path / "no")
    assert done.returncode == 2


def test_speed_times_every_form():
    times = moe.speed("nano", tokens=64, n_expert=4, n_expert_active=2, rounds=1, dtype="fp32", device="cpu")
    assert {"dense, equal FLOPs", "dispatch", "loop"} <= times.keys() and all(t > 0 for t in times.values())


def test_options_of_a_mixture_need_experts(modules, tmp_path):
    done = command("train.py", "--data", modules, "--out", tmp_path / "x", "--capacity", "1.5")
    assert done.returncode == 2 and "--n-expert" in done.stderr
