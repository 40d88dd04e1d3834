"""Test the cache that forgets: by the full cache, and by texts read anew, where nothing depends on more."""

import json

from model import Cache, Config, Transformer, UserError, load_tokenizer, round_up, save_checkpoint

import model
import pytest
import torch
from conftest import refusal

import sample as sampling
from sample import Reader, RollingCache

TINY = Config(vocab_size=64, seq_len=32, n_layer=1, n_head=4, n_kv_head=2, n_embd=32, head_dim=8, ffn_dim=48,
              qk_norm=False)
MLA = dict(kv_rank=16, nope_dim=8, rope_dim=4, head_dim=12, v_dim=8, n_kv_head=4)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
WAYS = {
    "grouped": {}, "latent": MLA, "alibi": dict(position="alibi"), "no position": dict(position="none"),
    "part of a head": dict(rope_dim=4), "yarn": dict(rope_scaling=YARN),
    "another theta where there is a window": dict(window=(64,), rope_local_theta=100.0),
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny models wait for a second thread more than it helps them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


def build(**changes):
    """Build a model whose attention is sharp: a key at a wrong place is seen in the logits."""
    net = Transformer(TINY.replace(**changes)).init_weights().eval()
    for name, p in net.named_parameters():
        if p.dim() > 1:
            p.mul_(2.0 if "attn" in name else 6.0 if "embed" in name else 1.0)
    return net


def text(B, T, seed=0):
    return torch.randint(64, (B, T), generator=torch.Generator().manual_seed(seed))


def read(net, x, cache, sizes):
    """Read x (B, T) in blocks of these sizes, over and over -> logits (B, T, V)."""
    out = []
    while x.shape[1]:
        size = sizes[len(out) % len(sizes)]
        out.append(net(x[:, :size], cache=cache)[0])
        x = x[:, size:]
    return torch.cat(out, 1)


def tensors(cache) -> list:
    """Find all tensors that a cache holds."""
    values = [y for x in vars(cache).values() for y in (x if isinstance(x, list) else [x])]
    return [x for x in values if isinstance(x, torch.Tensor)]


def close(a, b, atol):
    assert b.abs().max() > 1  # or the tolerance would say little
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


# --- the ring ---


@pytest.mark.parametrize("ways", [{}, MLA, dict(n_kv_head=1)], ids=str)
@pytest.mark.parametrize("sizes", [[1], [5], [3, 1, 5, 1, 1]], ids=str)
def test_where_the_model_has_a_window_nothing_is_lost(sizes, ways):
    net = build(n_layer=3, window=(6, 6, 6), **ways)
    x = text(2, 60)
    want = net(x, cache=Cache(net.config, 2, 60))[0]
    cache = RollingCache(net.config, 2, 6, block=max(sizes))
    assert cache.positions.shape[1] == 6 + max(sizes) - 1
    close(read(net, x, cache, sizes), want, 1e-5)
    close(want, net(x)[0], 1e-5)
    cache = RollingCache(net.config, 2, 9, sinks=4, summaries=8)  # longer than it needs, and what none sees
    close(read(net, x, cache, [1]), want, 1e-5)
    assert cache.positions.shape[1] == 6


@pytest.mark.parametrize("sizes", [[1], [4]], ids=str)
def test_a_window_of_its_own_is_the_models_window(sizes):
    """A ring gives a model without a window, or with a wider one, what it would give with this one."""
    x = text(2, 50)
    want = build(n_layer=2, window=(7, 7))(x)[0]
    for windows in ((), (9, None), (8, 30)):
        net = build(n_layer=2, window=windows)
        close(read(net, x, RollingCache(net.config, 2, 7, block=max(sizes)), sizes), want, 1e-5)
    assert (want - net(x)[0])[:, 7:].abs().max() > 0.1


# --- sinks ---


@pytest.mark.parametrize("limit", [4096, 20])
@pytest.mark.parametrize("way", WAYS)
def test_sinks_stand_before_the_window(way, limit):
    """With one layer a key depends on its token alone: reading [sinks + window] anew gives the same."""
    net = build(**WAYS[way])
    x = text(2, 90)
    cache = RollingCache(net.config, 2, 12, sinks=3)
    cache.limit = limit  # 20: positions are turned back time and again
    got = read(net, x, cache, [1])
    for t in (2, 10, 14, 15, 16, 40, 89):
        seen = x[:, : t + 1] if t < 15 else torch.cat((x[:, :3], x[:, t - 11 : t + 1]), 1)
        close(got[:, t], net(seen)[0][:, -1], 1e-4)
    far = net(x)[0][:, -1]
    assert (got[:, -1] - far).abs().max() > 0.01


def test_a_block_makes_room_first():
    net = build()
    x = text(2, 60)
    for sizes in ([5], [12, 3, 1], [7, 12]):
        got = read(net, x, RollingCache(net.config, 2, 12, sinks=3, block=12), sizes)
        seen = torch.cat((x[:, :3], x[:, 48:]), 1)
        close(got[:, -1], net(seen)[0][:, -1], 1e-4)  # the block's last token sees the whole window


# --- summaries ---


def test_summaries_are_averages_in_one_frame():
    """Values are plain means; keys of one token, rotated back, are that token's key."""
    x = text(1, 40)
    cache = RollingCache(TINY, 1, 8, sinks=2, summaries=5)
    full = Cache(TINY, 1, 40)
    net = build()
    net(x, cache=full)
    read(net, x, cache, [1])
    assert cache.each == 8  # of the tokens 2 to 31, the fourth entry has six; the fifth is empty
    for i, mean in enumerate(cache.v[0, 0, :, 2:6].unbind(1)):
        old = full.v[0, 0, :, 2 + 8 * i : min(10 + 8 * i, 32)]
        torch.testing.assert_close(mean, old.mean(1), atol=1e-5, rtol=0)
    x[:, 2:32] = 7  # one token again and again: every average is that token, four times before the window
    got = read(net, x, RollingCache(TINY, 1, 8, sinks=2, summaries=5), [1])
    close(got[:, -1], net(torch.cat((x[:, :6], x[:, -8:]), 1))[0][:, -1], 1e-4)


@pytest.mark.parametrize("way", ["grouped", "latent", "alibi"])
def test_in_blocks_the_summaries_are_the_same(way):
    """With one layer what is averaged does not depend on what a block's tokens see."""
    net = build(**WAYS[way])
    x = text(2, 61)
    want = RollingCache(net.config, 2, 8, sinks=2, summaries=5)
    read(net, x, want, [1])
    for sizes in ([3], [8, 1]):
        cache = RollingCache(net.config, 2, 8, sinks=2, summaries=5, block=8)
        read(net, x, cache, sizes)
        for a, b in zip(tensors(cache), tensors(want), strict=True):
            if a.shape == b.shape and a.is_floating_point():
                torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_memory_is_constant():
    net = build()
    cache = RollingCache(net.config, 1, 10, sinks=2, summaries=4, block=8)
    cache.limit = 300
    shapes = [x.shape for x in tensors(cache)]
    for block in text(1, 5000).split(8, 1):
        logits = net(block, cache=cache)[0]
        assert cache.n < 316 and cache.positions.max() < 324
    assert [x.shape for x in tensors(cache) if x is not cache.slots] == shapes
    assert logits.isfinite().all() and cache.each == 2048  # 4,988 tokens in 4 entries


# --- positions, rows, going back ---


@pytest.mark.parametrize("ways", [{}, MLA, dict(window=(5, None)), dict(position="alibi")], ids=str)
@pytest.mark.parametrize("extra", [{}, dict(sinks=3), dict(sinks=1, summaries=4)], ids=str)
def test_turning_positions_back_changes_nothing(ways, extra):
    net = build(n_layer=2, **ways)
    x = text(2, 150)
    caches = [RollingCache(net.config, 2, 9, block=4, **extra) for _ in range(2)]
    caches[1].limit = 16
    want, got = (read(net, x, cache, [1, 4, 2]) for cache in caches)
    assert caches[0].n == 150 and caches[1].n < 40
    close(got, want, 1e-4)


def test_positions_are_exact_in_bfloat16():
    """Beyond 256 bfloat16 knows no odd numbers: positions and angles must not be made of it."""
    net = build()
    net.compute_dtype = torch.bfloat16
    x = text(1, 420)
    caches = [RollingCache(net.config, 1, 9, sinks=2, dtype=torch.bfloat16) for _ in range(2)]
    caches[1].limit = 301  # positions are lowered by an odd number
    want, got = (read(net, x, cache, [1]).float() for cache in caches)
    assert caches[0].n == 420 and caches[1].n < 130
    torch.testing.assert_close(got, want, atol=0.1, rtol=0)
    anew = net(torch.cat((x[:, :2], x[:, -9:]), 1))[0][:, -1].float()
    torch.testing.assert_close(got[:, -1], anew, atol=0.1, rtol=0)


def test_rows_are_chosen():
    net = build(n_layer=2)
    x = text(3, 70)
    cache = RollingCache(net.config, 3, 9, sinks=2, summaries=4)
    read(net, x[:, :50], cache, [1])
    cache.select(torch.tensor([2, 0, 2]))
    got = read(net, x[[2, 0, 2], 50:], cache, [1])
    want = read(net, x, RollingCache(net.config, 3, 9, sinks=2, summaries=4), [1])
    close(got, want[[2, 0, 2], 50:], 1e-5)


def test_going_back():
    net = build(n_layer=2)
    x = text(1, 40)
    cache = RollingCache(net.config, 1, 9, sinks=2, summaries=3)
    want = read(net, x, cache, [1])
    cache.rewind(40)  # where it is
    with pytest.raises(UserError, match="cannot be had back"):
        cache.rewind(39)
    cache.rewind(0)
    read(net, x[:, :6], cache, [1])
    read(net, text(1, 5, seed=1), cache, [1])
    cache.rewind(6)  # nothing was overwritten yet
    close(read(net, x[:, 6:], cache, [1]), want[:, 6:], 1e-5)


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(position="learned"), "learned positions"),
        (dict(rope_scaling={"rope_type": "longrope", "factor": 2.0, "original_max_position_embeddings": 16,
                            "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}), "LongRoPE"),
        (dict(global_tokens=2, window=(8,)), "global tokens"),
    ],
)  # fmt: skip
def test_models_that_cannot_roll(changes, words):
    with pytest.raises(UserError, match=words):
        RollingCache(TINY.replace(**changes), 1, 8)


def test_blocks_and_rows_that_do_not_fit():
    net, cache = build(), RollingCache(TINY, 2, 8, block=4)
    with pytest.raises(UserError, match="4 tokens at once, not 5"):
        net(text(2, 5), cache=cache)
    with pytest.raises(UserError, match="equal length"):
        net(text(2, 4), positions=torch.arange(4).expand(2, 4), cache=cache)
    assert RollingCache(TINY, 2, 8, block=9).block == 8


# --- the command ---


@pytest.fixture(scope="module")
def folder(modules, tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    tokenizer = load_tokenizer(modules)
    facts = dict(vocab_size=round_up(tokenizer.n_vocab), eos_id=tokenizer.eot_id, pad_id=tokenizer.pad_id)
    save_checkpoint(folder, build(n_layer=2, **facts), modules / "tokenizer.json")
    return folder


def write(capsys, folder, **options):
    """Run the command -> its JSON lines, and what it says beside them."""
    options = dict(prompt="import", seed=0, json=True, ignore_eos=True, max_new_tokens=60) | options
    sampling.main(sampling.Options(folder, device="cpu", **options))
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], " ".join(err.split())


@pytest.mark.slow
def test_text_without_end(folder, capsys):
    [plain], said = write(capsys, folder)
    assert "more than the 32" in said
    ways = dict(window={}, sinks=dict(sinks=0), summaries=dict(summaries=4))
    texts = {}
    for name, more in ways.items():
        [facts], said = write(capsys, folder, window=16, **more)
        assert not said and len(facts["ids"]["continuation"]) == 60
        texts[name] = facts["text"]
    assert len({plain["text"], *texts.values()}) == 4  # each option changes something
    for window in (31, 64):
        [_], said = write(capsys, folder, window=window)
        assert f"{min(window + 4, 60 + len(plain['ids']['prompt']))} tokens, more than the 32" in said
    assert write(capsys, folder, window=80)[0][0]["text"] == plain["text"]  # nothing is forgotten


def test_samples_of_a_long_prompt(folder, capsys):
    """The prompt has left the window when the second sample begins: it is read again."""
    long = dict(prompt="def f(a, b):\n    return a\n" * 4, window=16)
    both, _ = write(capsys, folder, num_samples=2, **long)
    [second], _ = write(capsys, folder, **long | {"seed": 1})
    assert both[1]["ids"] == second["ids"] != both[0]["ids"]


def test_a_reader_reads_a_long_prompt_in_blocks():
    net = build(n_layer=2, window=(16, 16))
    x = text(1, 70)
    reader = Reader(net, window=400, sinks=4)  # blocks of 50 would not fit the 16 that the model looks back
    close(reader.read(x), net(x)[0][:, -1], 1e-5)
    assert reader.cache.positions.shape[1] == 16 + 15
    close(reader.read_text(x[0, 3:].tolist()), net(x[:, 3:])[0][:, -1], 1e-5)


def test_options_that_do_nothing_are_refused():
    wrong = [(dict(sinks=2), "beside a --window"), (dict(summaries=8), "beside a --window"),
             (dict(window=9, no_cache=True), "no use for --no-cache"),
             (dict(window=9, chat=True), "no use for --window")]  # fmt: skip
    wrong += [({"fill": "<|mask|>", name: 9}, f"no use for --{name}") for name in ("window", "sinks", "summaries")]
    for options, words in wrong:
        with pytest.raises(UserError, match=words):
            sampling.Options(**options)
    for name, least in dict(window=1, sinks=0, summaries=0).items():
        words = refusal(model.command(sampling.Options, sampling.main), f"--{name}", least - 1)
        assert words.startswith(f"--{name} is ")
