"""Hold moe.py to its promises: equal to transformers, fast equal to plain, balance, folders, the commands."""

import doctest
import json
import math
import shutil

from conftest import call, refusal, records

import model
import moe
import train
from model import AUX, PRESETS, Config, Transformer, UserError

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

SIZES = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 32, "head_dim": 16, "ffn_dim": 48}
SMALL = Config(vocab_size=64, seq_len=32, **SIZES)


def mixture(n_expert=4, n_expert_active=2, expert_dim=16, **fields):
    """Put experts into SMALL."""
    return SMALL.replace(n_expert=n_expert, n_expert_active=n_expert_active, expert_dim=expert_dim, **fields)


SIGMOID = {"router": "sigmoid", "router_bias": True}
KINDS = {
    "softmax": mixture(6),
    "not normalized": mixture(6, 3, router_normalize=False),
    "sigmoid": mixture(6, **SIGMOID, router_scale=2.5),
    "shared": mixture(6, n_expert_shared=2),
    "groups": mixture(6, n_group=3, topk_group=2),
    "sigmoid groups": mixture(8, 3, **SIGMOID, n_group=2, topk_group=1, n_expert_shared=1),
    "groups of one": mixture(4, **SIGMOID, n_group=4, topk_group=3),
    "one": mixture(4, 1),
    "all": mixture(3, 3),
}


def net(config, seed=0):
    """Build a model whose routers' bias is not zero: zero would hide whether it acts."""
    made = Transformer(config).init_weights(seed)
    with torch.no_grad():
        for buffer in made.buffers():
            buffer.copy_(torch.randn(buffer.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    return made


def layer_of(config, seed=0) -> moe.MoE:
    return net(config.replace(n_layer=1), seed).layers["0"].mlp


def ids(config, B=2, T=16, seed=0):
    return torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def test_examples_in_the_docstrings():
    result = doctest.testmod(moe)
    assert result.failed == 0 and result.attempted >= 5


# --- Against transformers ---

DOTS = mixture(8, n_expert_shared=1, dense_layers=(0,), **SIGMOID, router_scale=1.7, n_group=4, topk_group=2)
STOCK = {
    "mixtral": ("MixtralForCausalLM", mixture(4, 2, 40, ffn_dim=40, qk_norm=False, tie=False)),
    "mixtral, one of 8": ("MixtralForCausalLM", mixture(8, 1, 40, ffn_dim=40, qk_norm=False)),
    "qwen3": ("Qwen3MoeForCausalLM", mixture(4, 2, 24)),
    "qwen3, 16 fine": ("Qwen3MoeForCausalLM", mixture(16, 4, 8, router_normalize=False, tie=False)),
    "qwen3, a dense layer": ("Qwen3MoeForCausalLM", mixture(4, 2, 24, dense_layers=(1,))),
    "dots1": ("Dots1ForCausalLM", DOTS),
    "dots1, plain": ("Dots1ForCausalLM", mixture(4, n_expert_shared=2, **SIGMOID, router_normalize=False)),
}


@pytest.mark.parametrize("name", STOCK)
def test_logits_equal_transformers_and_its_folders_open_here(name, tmp_path, data):
    transformers = pytest.importorskip("transformers")
    cls, config = STOCK[name]
    ours = net(config).eval()
    model.save_checkpoint(tmp_path / "ours", ours, data / "tokenizer.json")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [cls]
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True)
    assert type(theirs).__name__ == cls
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x = ids(config, 3, 20)
    with torch.no_grad():
        logits = ours(x)[0]
        torch.testing.assert_close(logits, theirs(x).logits, atol=1e-4, rtol=0)
        theirs.save_pretrained(tmp_path / "theirs")  # as they write it, back to us
        again = model.load_model(tmp_path / "theirs")
        assert again.config.replace(pad_id=None, eos_id=None) == config
        torch.testing.assert_close(again(x)[0], logits, atol=1e-6, rtol=0)


OWN = {"shared": KINDS["shared"], "groups": KINDS["groups"], "bias on softmax": mixture(router_bias=True),
       "no shared experts": KINDS["sigmoid"], "a dense layer in the middle": DOTS.replace(dense_layers=(1,))}


@pytest.mark.parametrize("name", OWN)
def test_experts_that_no_stock_class_has_are_octavos_own(name):
    config = OWN[name].replace(dropout=0.1, capacity=1.5)
    hf = json.loads(json.dumps(model.config_to_hf(config)))
    assert hf["model_type"] == "octavo" and hf["architectures"] == ["OctavoForCausalLM"]
    assert model.config_from_hf(hf) == config.replace(dropout=0.0, capacity=None)


def test_a_folder_of_an_earlier_version_opens():
    config = KINDS["sigmoid groups"].replace(dense_layers=(1,), router_scale=1.5)
    hf = json.loads(json.dumps(model.config_to_hf(config.replace(n_expert=0))))  # (then without its experts)
    hf["model_type"] = "octavo"
    hf["moe"] = {"n_expert": 8, "n_active": 3, "ffn_dim": 16, "n_shared": 1, "dense": [1], "score": "sigmoid",
                 "normalize": True, "scale": 1.5, "bias": True, "n_group": 2, "topk_group": 1}
    assert model.config_from_hf(hf) == config


def test_either_spelling_of_the_number_of_experts_is_read_and_none_is_refused():
    _, config = STOCK["qwen3"]
    hf = model.config_to_hf(config)
    count = hf.pop("num_experts")
    assert model.config_from_hf(hf | {"num_local_experts": count}) == config
    with pytest.raises(UserError, match="does not say num_experts"):
        model.config_from_hf(hf)


# --- Routing ---


def test_softmax_before_normalized_is_softmax_over_the_chosen():
    logits = torch.randn(50, 8)
    _, chosen, weights = moe.route(logits, mixture(8))
    torch.testing.assert_close(weights, logits.gather(1, chosen).softmax(-1))
    _, _, before = moe.route(logits, mixture(8, router_normalize=False))
    assert (before.sum(-1) < 1).all()


def test_the_bias_moves_the_choice_and_not_the_weight():
    config = mixture(4, 1, **SIGMOID, router_normalize=False)
    scores, chosen, weights = moe.route(torch.zeros(5, 4), config, torch.tensor([0.0, 0.0, 3.0, 0.0]))
    assert (chosen == 2).all() and (weights == 0.5).all() and (scores == 0.5).all()


REFUSED = [
    ({"n_expert_active": 9}, "cannot go to 9"),
    ({"n_group": 3}, "do not go into 3 groups"),
    ({"n_group": 4, "topk_group": 1, "n_expert_active": 3}, "2 are open"),
    ({"dense_layers": (0, 1)}, "no layer to the experts"),
    ({"n_layer": 1, "dense_layers": 0}, "no layer to the experts"),
    ({"router": "tanh"}, "not by 'tanh'"),
    ({"balance": "luck"}, "not 'luck'"),
    ({"balance": "bias"}, "use balance=loss"),
    ({"capacity": 0.0}, "positive"),
]


@pytest.mark.parametrize("fields, words", REFUSED)
def test_experts_that_cannot_be_are_a_sentence(fields, words):
    with pytest.raises(UserError, match=words):
        Transformer(mixture(8).replace(**fields))


# --- The fast form and the plain one ---


@pytest.mark.parametrize("fill", ["as routed", "one gets none", "one gets all", "dropped", "all dropped"])
@pytest.mark.parametrize("kind", KINDS)
def test_dispatch_equals_the_loop(kind, fill):
    config = KINDS[kind]
    layer = layer_of(config)
    x = torch.randn(24, 32)
    _, _, chosen, weights = layer.gate(x)
    if fill == "one gets none":
        chosen = chosen.where(chosen != 0, config.n_expert - 1)
    if fill == "one gets all":
        chosen = torch.zeros_like(chosen)
    if "dropped" in fill:
        late = torch.rand(chosen.shape) < (0.3 if fill == "dropped" else 2)
        chosen = chosen.masked_fill(late, config.n_expert)
    layer.double()
    x = x.detach().double().requires_grad_()
    weights = weights.detach().double().requires_grad_()
    params = [x, weights, *layer.experts.parameters()]
    results = []
    for form in (moe.loop, moe.dispatch):
        y = form(layer.experts, x, chosen, weights)
        loss = (y * torch.arange(32.0)).sum()
        results.append((y, *torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)))
    for plain, fast in zip(*results, strict=True):
        torch.testing.assert_close(plain, fast, atol=1e-10, rtol=1e-10)


def test_every_expert_has_a_gradient_also_without_tokens():
    layer = layer_of(mixture(8, 1)).train()
    layer(torch.randn(1, 3, 32))[0].sum().backward()
    assert all(p.grad is not None for p in layer.experts.parameters())
    assert sum(bool(e.up_proj.weight.grad.any()) for e in layer.experts.values()) <= 3


def test_decoding_computes_the_active_experts_only():
    config = mixture(8, 2, n_expert_shared=1)
    made = net(config).eval()
    called = []
    for block in made.layers.values():
        for expert in block.mlp.experts.values():
            expert.register_forward_hook(lambda *_: called.append(1))
    with torch.inference_mode():
        made(ids(config, 1, 1))
        assert len(called) == 2 * 2  # two layers
        made(ids(config, 4, 16))
    assert len(called) > 8  # many tokens, more experts


def test_capacity_acts_in_training_only_and_is_causal():
    config = mixture()
    free = layer_of(config)
    tight = layer_of(config.replace(capacity=0.5))
    x = torch.randn(2, 16, 32)
    y, row = free.train()(x)
    z, tight_row = tight.train()(x)
    dropped = AUX.index("dropped")
    assert row[dropped] == 0 and tight_row[dropped] >= 0.5 and not torch.equal(y, z)
    assert torch.equal(tight.eval()(x)[0], free.eval()(x)[0])
    changed = x.clone()
    changed[:, 8:] = torch.randn(2, 8, 32)
    torch.testing.assert_close(tight.train()(changed)[0][:, :8], z[:, :8])  # later tokens take nobody's place


def test_room_by_hand():
    """Each of 2 experts takes ceil(capacity * A * T / E) choices of a sequence, and no other sequence counts."""
    one = torch.tensor([[[0], [0], [0]]])
    assert moe.within_capacity(one, 2, 1.0).flatten().tolist() == [True, True, False]  # ceil(1.5)
    assert moe.within_capacity(one, 2, 2.0).all()
    two = torch.tensor([[[0, 1], [0, 1], [0, 2], [0, 3]]])  # 2 of 4 experts: 2 choices of each
    assert moe.within_capacity(two, 4, 1.0).tolist() == [[[True, True], [True, True], [False, True], [False, True]]]
    both = torch.cat([one, one])
    assert moe.within_capacity(both, 2, 1.0).tolist() == [[[True], [True], [False]]] * 2


# --- Balance ---


def test_the_router_computes_in_float32():
    config = Config(n_embd=64, n_expert=8)
    router, x = moe.Router(config), torch.randn(32, 64).bfloat16()
    torch.testing.assert_close(router(x)[0], x.float() @ router.weight.T)


def test_z_loss_by_hand():
    """ln(e^0 + e^0) = ln 2 and ln(e^1 + e^1) = 1 + ln 2, squared, on average (2202.08906, eq. 5)."""
    logits = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    want = (math.log(2) ** 2 + (1 + math.log(2)) ** 2) / 2
    assert moe.router_z_loss(logits).item() == pytest.approx(want, rel=1e-6)


def test_balance_loss_equals_transformers_on_one_sequence():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(1, 40, 6)
    scores, chosen, _ = moe.route(logits[0], mixture(6))
    ours = moe.balance_loss(scores[None], moe.expert_load(chosen[None], 6))
    torch.testing.assert_close(ours, mixtral.load_balancing_loss_func((logits[0],), 6, 2))
    even = torch.full((1, 40, 6), 1 / 6)
    assert moe.balance_loss(even, torch.full((1, 6), 2 / 6)).item() == pytest.approx(2.0)


@pytest.mark.parametrize("kind", ["softmax", "not normalized", "sigmoid"])
def test_gradients_of_the_losses_equal_finite_differences(kind):
    logits = torch.randn(2, 12, 6, dtype=torch.float64, requires_grad=True)

    def losses(logits):
        scores, chosen, _ = moe.route(logits.flatten(0, 1), KINDS[kind])
        share = scores / scores.sum(-1, keepdim=True)
        load = moe.expert_load(chosen.view(2, 12, -1), 6).double()
        return moe.balance_loss(share.view(2, 12, 6), load), moe.router_z_loss(logits)

    assert torch.autograd.gradcheck(losses, logits, eps=1e-6, atol=1e-8)
    for loss in losses(logits):
        assert torch.autograd.grad(loss, logits, retain_graph=True)[0].abs().max() > 0


def test_what_a_layer_adds_to_the_loss_follows_from_the_config():
    x = torch.randn(2, 16, 32)
    columns = AUX.index("aux_loss"), AUX.index("balance_loss"), AUX.index("z_loss")

    def added(**fields):
        row = layer_of(mixture(**fields)).train()(x)[1]
        return row[list(columns)].tolist()

    loss, balance, z = added()
    assert loss == pytest.approx(0.01 * balance) and balance > 1.9
    assert added(balance_rate=0.5)[0] == pytest.approx(0.5 * balance)
    assert added(balance="none")[0] == 0
    assert added(balance="none", z_loss=0.25)[0] == pytest.approx(0.25 * z)
    assert added(balance="bias", router_bias=True, balance_rate=0.5)[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("balance", ["loss", "bias", "none"])
def test_a_collapsed_router_comes_back(balance):
    """Begin where a router sends every token to two of eight experts; any expert can learn the task."""
    torch.manual_seed(0)
    fields = SIGMOID if balance == "bias" else {}
    rate = {"loss": 0.03, "bias": 0.01, "none": None}[balance]
    one = net(mixture(8, balance=balance, balance_rate=rate, **fields).replace(n_layer=1))
    layer = one.layers["0"].mlp.train()
    direction = torch.nn.functional.normalize(torch.ones(32), dim=0)
    with torch.no_grad():
        layer.gate.weight.mul_(0.3)
        layer.gate.weight[:2] += 0.3 * direction
    target = torch.randn(32, 32, generator=torch.Generator().manual_seed(3)) / 6
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-3)
    rng = torch.Generator().manual_seed(4)
    largest = []
    for _ in range(400):
        x = torch.randn(8, 32, 32, generator=rng) * 0.5 + 3 * direction
        y, row = layer(x)
        ((y - x @ target).square().mean() + row[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        moe.shift_bias(one, row[None].detach())
        load = row[len(AUX) :].detach()
        largest.append(float(load.max() / load.mean()))
    print(f"{balance}: largest load {largest[0]:.2f} -> {np.mean(largest[-20:]):.2f} times the mean")
    assert largest[0] > 3.5  # 4 would be all tokens to two of eight
    assert (np.mean(largest[-20:]) <= 1.5) == (balance != "none")


def test_shift_bias_goes_against_the_load():
    aux = torch.zeros(2, len(AUX) + 4)
    aux[0, len(AUX) :] = torch.tensor([0.7, 0.1, 0.1, 0.1])
    aux[1, len(AUX) :] = torch.tensor([1.0, 1.0, 1.0, 17.0])  # each layer by its own loads, in any scale
    for fields, step in (({"balance_rate": 0.5}, 0.5), ({}, 0.001), ({"balance": "loss"}, 0.0)):
        made = net(mixture(4, 1, router_bias=True, **{"balance": "bias", **fields}))
        before = [b.clone() for b in made.buffers()]
        moe.shift_bias(made, aux)
        moved = [b - a for a, b in zip(before, made.buffers(), strict=True)]
        torch.testing.assert_close(moved[0], torch.tensor([-step, step, step, step]), atol=1e-7, rtol=0)
        torch.testing.assert_close(moved[1], torch.tensor([step, step, step, -step]), atol=1e-7, rtol=0)


# --- In the model ---


@pytest.mark.parametrize("kind", KINDS)
def test_active_parameters_are_those_that_a_token_meets(kind):
    config = KINDS[kind]
    made = Transformer(config)
    total, active = model.count_params(config)
    expert = sum(p.numel() for p in made.layers["0"].mlp.experts["0"].parameters())
    assert total == sum(p.numel() for p in made.parameters())
    assert active == total - 2 * (config.n_expert - config.n_expert_active) * expert


def test_mixtral_has_47_billion_and_13_active():
    assert model.count_params(PRESETS["mixtral-8x7b"]) == (46_702_792_704, 12_879_925_248)
    total, active = model.count_params(PRESETS["qwen3-30b-a3b"])
    assert 30.5e9 < total < 30.6e9 and 3.3e9 < active < 3.4e9


def test_recomputation_and_accumulation_leave_the_gradient():
    config = mixture(6, n_expert_shared=1, z_loss=0.001, capacity=1.0, balance_rate=0.1)
    x, y = ids(config, 4, 16), ids(config, 4, 16, 1)

    def gradients(parts, recompute):
        made = net(config).train()
        made.recompute = recompute
        for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
            losses, aux = made(xs, ys)
            (losses.sum() / y.numel() + aux[:, 0].sum() / parts).backward()
        return {name: p.grad for name, p in made.named_parameters()}

    whole = gradients(1, False)
    assert whole["layers.0.mlp.gate.weight"].abs().max() > 0
    for parts, recompute in ((4, False), (1, True), (2, True)):
        other = gradients(parts, recompute)
        for name, grad in whole.items():
            torch.testing.assert_close(other[name], grad, atol=1e-6, rtol=1e-4)


def test_the_cache_changes_nothing():
    config = mixture()
    made = net(config).eval()
    x = ids(config, 1, 8)
    new = model.generate(made, x.tolist(), 6)[0]
    for i, token in enumerate(new):
        assert made(torch.cat((x, torch.tensor([new[:i]], dtype=torch.long)), 1))[0][0, -1].argmax() == token


def test_the_record_says_what_the_router_did():
    config = mixture(dense_layers=(0,))
    record = moe.routing_record(net(config).train()(ids(config))[1].detach(), config)
    assert len(record["load"]) == 1 and sum(record["load"][0]) == pytest.approx(2, abs=1e-3)
    assert record["load_max"] == pytest.approx(max(record["load"][0]) / 0.5, abs=1e-2)
    assert 0 < record["router_entropy"] <= 1 and record["dropped"] == 0
    assert record["aux_loss"] == pytest.approx(0.01 * record["balance_loss"], rel=1e-4)
    config = mixture()  # of two layers with experts: what they add to the loss is added up, the rest averaged
    aux = net(config).train()(ids(config))[1].detach()
    record = moe.routing_record(aux, config)
    assert record["aux_loss"] == pytest.approx(aux[:, 0].sum().item(), rel=1e-5)
    assert record["z_loss"] == pytest.approx(aux[:, AUX.index("z_loss")].mean().item(), rel=1e-5)
    bars = moe.load_bars([[0.5, 0.5, 1.0, 0.0]]).splitlines()[1]
    assert "│▄▄█ │ 2.00" in bars


def test_an_upcycled_model_computes_what_the_dense_one_does():
    for config in (SMALL, SMALL.replace(qk_norm=False, tie=False), SMALL.replace(qkv_bias=True)):
        dense = net(config).eval()
        for n, k in ((4, 2), (3, 1), (2, 2)):
            made = moe.upcycled(dense, n, k)
            x = ids(config, 2, 12)
            torch.testing.assert_close(made(x)[0], dense(x)[0], atol=1e-5, rtol=0)
            assert all(block.mlp.gate.weight.abs().sum() > 0 for block in made.layers.values())


# --- Studies ---


def test_classes_of_tokens():
    text = 'def f(x):\n    # no\n    return f"é{x}" + 12\n'
    whole = [bytes([b]) for b in text.encode()]
    got = dict.fromkeys(moe.CLASSES, "")
    for byte, c in zip(whole, moe.token_classes(whole), strict=True):
        got[moe.CLASSES[c]] += chr(byte[0])
    assert got["keyword"] == "defreturn" and got["number"] == "12" and got["comment"] == "#no"
    assert got["name"].startswith("fx") and "+" in got["operator"]
    assert "é".encode().decode("latin-1") in got["string"]
    pieces = [b"if", b" x", b":\n", b"  ", b"y\n"]  # a token has the class of its first byte that is no blank
    names = [moe.CLASSES[c] for c in moe.token_classes(pieces)]
    assert names == ["keyword", "name", "operator", "indentation", "name"]
    assert moe.token_classes([b"def (("]) is None and moe.token_classes([b"\xff\xfe"]) is None


def test_a_form_feed_is_no_new_line():
    """Python's sources have them: str.splitlines breaks there, Python's lexer does not."""
    pieces = [b"x", b" =", b" 1", b"\n", b"\x0c", b"\n", b"# a", b"\n", b"y", b" =", b" 2", b"\n"]
    names = [moe.CLASSES[c] for c in moe.token_classes(pieces)]
    assert [n for n in names if n != "indentation"] == [
        "name", "operator", "number", "comment", "name", "operator", "number"]


def test_what_experts_learned_is_told_from_chance():
    rng = np.random.default_rng(0)
    classes = rng.integers(len(moe.CLASSES), size=4000)
    by_class = np.stack([classes % 4, (classes % 4 + 1) % 4], 1)  # the class says which two
    anyhow = np.stack([rng.permutation(4)[:2] for _ in classes])
    table, bits = moe.specialization(by_class, classes, 4)
    assert bits > 0.8 and table[0, 0] == pytest.approx(0.5) and table[0, 2] == 0
    assert moe.specialization(anyhow, classes, 4)[1] < 0.01
    chosen, by_hand = np.array([[0], [0], [0], [1]]), np.array([0, 0, 0, 1])
    table, bits = moe.specialization(chosen, by_hand, 2)  # the class says the expert: its entropy
    assert bits == pytest.approx(0.75 * math.log2(4 / 3) + 0.25 * 2)
    assert table[:2].tolist() == [[1, 0], [0, 1]]


def test_a_planted_specialist_is_found(modules):
    """Let the router read a token's embedding, and give names to expert 0 and the rest to expert 1."""
    tokens = model.Tokens(modules, "val")
    tokenizer = model.load_tokenizer(modules)
    config = mixture(2, 1, vocab_size=448, n_layer=1, seq_len=512)
    made = net(config).eval()
    text = [tokenizer.token_bytes[i] for i in tokens.read(0, 400).tolist()]
    words = {piece for piece in text if piece.strip().isalpha()}
    with torch.no_grad():
        made.layers["0"].self_attn.o_proj.weight.zero_()
        made.layers["0"].mlp.gate.weight.zero_()
        made.layers["0"].mlp.gate.weight[0, 0] = 1.0
        made.embed_tokens.weight[:, 0] = -1.0
        for i, piece in enumerate(tokenizer.token_bytes):
            if piece in words:
                made.embed_tokens.weight[i, 0] = 1.0
    layer = moe.study_of(made, tokens, 2000, 500)["layers"][0]
    share = dict(zip(moe.CLASSES, layer["by_class"][:, 0], strict=True))
    assert share["keyword"] > 0.5 and share["operator"] < 0.1 and share["indentation"] < 0.1
    assert layer["bits"] > 10 * layer["bits_by_chance"]
    with torch.no_grad():  # what an expert without tokens adds to the loss is nothing
        made.layers["0"].mlp.gate.weight[0, 0] = 0.0
        made.embed_tokens.weight[:, 0] = 1.0
        made.layers["0"].mlp.gate.weight[1, 0] = 5.0
    off = moe.study_of(made, tokens, 500, 500)["layers"][0]["switched_off"]
    assert off[0] == 0 and off[1] != 0
    assert made.layers["0"].mlp.gate.e_score_correction_bias is None  # as it was


# --- The commands ---

TINY = {"preset": "nano", "n_layer": 2, "n_embd": 32, "seq_len": 32, "tokens_per_step": 256, "max_steps": 6,
        "warmup_steps": 2, "eval_tokens": 512, "eval_interval": 100, "dtype": "fp32"}


def run(data, out, sets=(), **changes):
    """Train in this process."""
    sets = list(sets) if "init" in changes else ["n_head=2", *sets]
    return train.train(train.Options(**TINY | {"data": [str(data)], "out": str(out), "set": sets} | changes))


@pytest.fixture(scope="module")
def trained(modules, tmp_path_factory):
    out = tmp_path_factory.mktemp("moe") / "run"
    run(modules, out, ["n_expert=4", "n_expert_active=2", "z_loss=0.001", "capacity=1.25"])
    return out


@pytest.fixture(scope="module")
def dense(modules, tmp_path_factory):
    out = tmp_path_factory.mktemp("moe") / "dense"
    run(modules, out, max_steps=3)
    return out


def test_a_run_logs_its_routing(trained):
    step = next(r for r in records(trained) if "load" in r)
    assert {"aux_loss", "balance_loss", "z_loss", "dropped", "router_entropy", "load_max"} <= step.keys()
    assert np.array(step["load"]).shape == (2, 4) and step["dropped"] > 0
    config = json.loads((trained / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"] and config["num_experts"] == 4
    assert config["moe_intermediate_size"] == config["intermediate_size"] / 2  # a token costs what it did
    assert len(model.generate(model.load_model(trained), [[1]], 5)[0]) == 5


@pytest.mark.parametrize("balance", ["loss", pytest.param("bias", marks=pytest.mark.slow)])
def test_resume_is_exact_to_the_bit(balance, modules, tmp_path):
    sets = ["n_expert=4", f"balance={balance}", f"router={'sigmoid' if balance == 'bias' else 'softmax'}"]
    steady = {"save_interval": 3, "schedule": "constant"}
    run(modules, tmp_path / "whole", sets, **steady)
    run(modules, tmp_path / "part", sets, **steady, max_steps=3)
    train.train(model.resumed(train.Options, tmp_path / "part", max_steps=6))
    a, b = (model.load_model(tmp_path / name).state_dict() for name in ("whole", "part"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    biases = [a[name] for name in a if name.endswith("correction_bias")]
    assert len(biases) == (2 if balance == "bias" else 0) and all(bias.abs().max() > 0 for bias in biases)


def test_options_of_a_mixture_need_experts(modules, tmp_path):
    with pytest.raises(UserError, match="n_expert"):
        run(modules, tmp_path / "x", ["capacity=1.5"])


@pytest.mark.slow
def test_upcycle_and_train_on(dense, modules, tmp_path):
    mixed = tmp_path / "mixed"
    losses = call(moe.upcycle, dense, mixed, "--data", modules, "--n-expert", "4")
    assert losses["dense"] == pytest.approx(losses["mixture"], abs=2e-6)
    sizes = {"preset": "micro", "n_layer": None, "n_embd": None, "seq_len": None, "init": str(mixed), "max_steps": 2}
    run(modules, tmp_path / "on", **sizes)
    first = records(tmp_path / "on")[0]
    assert first["loss"] == pytest.approx(losses["dense"], abs=0.5) and len(first["load"][0]) == 4
    with pytest.raises(UserError, match="cannot be chosen"):
        run(modules, tmp_path / "no", ["n_head=2"], init=str(mixed))
    with pytest.raises(UserError, match="has none"):
        run(modules, tmp_path / "no", ["balance=bias"], **sizes)
    assert "has experts already" in refusal(moe.upcycle, mixed, tmp_path / "no")
    assert "--overwrite" in refusal(moe.upcycle, dense, mixed)
    assert "what it begins with" in refusal(moe.upcycle, dense, dense, "--overwrite")


def test_study_shows_and_writes_what_it_measures(trained, dense, modules, tmp_path, capsys):
    result = call(moe.study, trained, "--data", modules, "--tokens", "2000", "--off-tokens", "256")
    shown = capsys.readouterr().err
    saved = json.loads((trained / "study.json").read_text())
    assert saved["tokens"] == result["tokens"] >= 32
    for layer in saved["layers"].values():
        assert len(layer["switched_off"]) == 4 and sum(layer["load"]) == pytest.approx(1, abs=1e-3)
    assert "layer 1" in shown and "costliest off" in shown and "... if shuffled" in shown
    model.load_model(trained)  # the folder is a checkpoint as before
    call(moe.study, trained, "--data", modules, "--tokens", "500", "--off-tokens", "0")
    assert "costliest" not in capsys.readouterr().err
    assert "dense model" in refusal(moe.study, dense, "--data", modules)
    prose = shutil.copytree(modules, tmp_path / "prose")
    ids = np.fromfile(prose / "val.bin", "<u2")
    ids[ids != ids[-1]] = model.load_tokenizer(modules).encode("(")[0]
    ids.tofile(prose / "val.bin")
    assert "holds no Python" in refusal(moe.study, trained, "--data", prose)
    assert "tokenize.py prepare" in refusal(moe.study, trained, "--data", "nowhere")


def test_data_of_another_tokenizer(trained, dense, data, tmp_path):
    """Its ids would be other texts, or none at all: refused in a study, not compared on by upcycle."""
    assert "different tokenizers" in refusal(moe.study, trained, "--data", data)
    assert call(moe.upcycle, dense, tmp_path / "mixed", "--data", data) == {}
    assert model.load_config(tmp_path / "mixed").n_expert == 8


RANGES = [(moe.upcycle, "--n-expert", (0, -1, "nan")), (moe.upcycle, "--n-expert-active", (0, -1)),
          (moe.study, "--tokens", (0, -5)), (moe.study, "--off-tokens", (-1, "inf")),
          (moe.speed, "--tokens", (0, -1, 2**21, 10**12)), (moe.speed, "--rounds", (0, -3)),
          (moe.speed, "--n-expert", (0, -1)), (moe.speed, "--n-expert-active", (0, -1))]


@pytest.mark.parametrize("function, option, values", RANGES)
def test_numbers_out_of_range_are_refused(function, option, values, tmp_path):
    folders = {moe.upcycle: [tmp_path / "a", tmp_path / "b"], moe.study: [tmp_path / "a"], moe.speed: []}
    for value in values:
        if isinstance(value, int):
            assert refusal(function, *folders[function], option, value).startswith(f"{option} is {value}; ")
        else:  # of another type: a usage error
            app = typer.Typer()
            app.command()(function)
            result = CliRunner().invoke(app, [*map(str, folders[function]), option, str(value)])
            assert result.exit_code == 2 and option in result.output


def test_more_experts_than_memory_or_than_a_token_can_reach(dense, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(model.os, "sysconf", lambda name: 512)  # pages of 512 bytes, 512 of them
        assert "GiB" in refusal(moe.upcycle, dense, tmp_path / "no", "--n-expert", 100)
        assert "GiB" in refusal(moe.speed, "--preset", "llama-2-70b")
    assert "n_expert is" in refusal(moe.upcycle, dense, tmp_path / "no", "--n-expert", 10**9)
    assert "cannot go to 5" in refusal(moe.upcycle, dense, tmp_path / "no", "--n-expert", 4, "--n-expert-active", 5)
    assert "cannot go to 9" in refusal(moe.speed, "--preset", "nano", "--n-expert-active", 9)
    assert not (tmp_path / "no").exists()


def test_speed_times_every_form():
    times = moe.speed("nano", tokens=64, n_expert=4, n_expert_active=2, rounds=1, dtype="fp32", device="cpu")
    assert {"dense, equal FLOPs", "dispatch", "loop"} <= times.keys()
    assert all(0 < t < math.inf for t in times.values())
