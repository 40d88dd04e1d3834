"""Test sample.py's batches, quantized weights, proposals and server: all must equal one plain text."""

import http.client
import io
import itertools
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial

from model import (
    Config, Linear, Transformer, UserError, generate, load_config, load_model, load_tokenizer,
    save_checkpoint,
)

import pytest
import torch
from conftest import ROOT, command
from test_sample import folder, make, one_thread, run, vocab  # noqa: F401 (fixtures)

import sample as sampling
from sample import Choice, Engine, Int4, Int8, Reader, Request, Writer, adjust, open_model, speculate

GREEDY = Choice(temperature=0)


def prompts(lengths, V=300, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, V, (n,), generator=generator).tolist() for n in lengths]


def finish(engine, limit=2000):
    for _ in range(limit):
        if not engine.busy:
            return
        engine.step()
    raise AssertionError("the engine does not end")


# --- the samplers ---


def test_min_p_and_penalty():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert adjust(logits, min_p=0.5).isfinite()[0].tolist() == [True, True, False, False]
    assert adjust(logits, min_p=1.0).isfinite()[0].tolist() == [True, False, False, False]
    assert adjust(logits, temperature=2.0, min_p=0.5).isfinite()[0].tolist() == [True, True, True, False]
    seen = Choice(repetition_penalty=2.0).seen([[1]], logits)
    assert adjust(torch.tensor([[1.0, 3.0]]), repetition_penalty=2.0, seen=torch.tensor([[False, True]]))[0].diff() == 0.5
    assert seen.tolist() == [[False, True, False, False]]
    assert Choice().seen([[1]], logits) is None


def test_options_reach_the_text(folder, capsys):  # noqa: F811
    [plain] = run(capsys, folder, prompt="a", temperature=0.0)
    [other] = run(capsys, folder, prompt="a", temperature=0.0, repetition_penalty=5.0)
    new = other["ids"]["continuation"]
    assert new != plain["ids"]["continuation"] and len(set(new)) > len(set(plain["ids"]["continuation"]))
    [one] = run(capsys, folder, prompt="a", min_p=1.0)
    assert one["ids"] == plain["ids"]
    [told] = run(capsys, folder, prompt="a", temperature=0.0, logprobs=True)
    net = load_model(folder)
    ids = told["ids"]["prompt"] + told["ids"]["continuation"]
    logits = net(torch.tensor([ids]))[0][0, :, : load_tokenizer(folder).n_vocab].float().log_softmax(-1)
    want = [logits[len(told["ids"]["prompt"]) + i - 1, t].item() for i, t in enumerate(told["ids"]["continuation"])]
    assert told["logprobs"] == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize("options, words", [
    (dict(top_p=0.0), "--top-p"), (dict(top_p=1.5), "--top-p"), (dict(min_p=1.5), "--min-p"),
    (dict(logprobs=True), "--json"), (dict(save="x"), "--quantize"), (dict(rows=3), "--prompts"),
])
def test_options_out_of_range(options, words):
    with pytest.raises(UserError, match=words):
        sampling.Options(**options)


# --- text from tokens ---


def test_stop_strings_across_tokens(folder):  # noqa: F811
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("one größe two STOP three")
    for stops, want in (((), "one größe two STOP three"), (("STOP",), "one größe two "), (("zz", "ße t"), "one grö"),
                        (("three!",), "one größe two STOP three")):
        writer = Writer(tokenizer, stops=stops)
        parts = [writer.add([i]) for i in ids] + [writer.add([], last=True)]
        assert "".join(parts) == want and writer.ended == (want != "one größe two STOP three")
        seen = ""
        for part in parts:  # nothing of the stop is ever shown
            seen += part
            assert want.startswith(seen) and "\ufffd" not in seen


def test_stop_ends_the_text(folder, capsys):  # noqa: F811
    [plain] = run(capsys, folder, prompt="a", seed=1)
    middle = plain["text"][8:11]
    [cut] = run(capsys, folder, prompt="a", seed=1, stop=[middle])
    assert cut["text"] == plain["text"][: plain["text"].index(middle)] and cut["finish_reason"] == "stop"
    tokenizer = load_tokenizer(folder)
    last = next(n for n in range(1, 99) if middle in tokenizer.decode(plain["ids"]["continuation"][:n]))
    [cut] = run(capsys, folder, prompt="a", seed=1, stop=[middle], max_new_tokens=last)
    assert cut["finish_reason"] == "stop"  # also when the last token that was allowed completes it


# --- the engine ---

KINDS = {
    "plain": {}, "window": {"window": (5, None)}, "alibi": {"position": "alibi"}, "learned": {"position": "learned"},
    "latent": dict(kv_rank=16, rope_dim=8, nope_dim=8, v_dim=8, head_dim=16, n_kv_head=2),
    "longrope": {"rope_scaling": (("rope_type", "longrope"), ("short_factor", (1.0,) * 8), ("long_factor", (2.0,) * 8),
                                  ("original_max_position_embeddings", 24), ("factor", 2.0))},
}


def net_of(**changes):
    sizes = dict(vocab_size=320, seq_len=128, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, head_dim=16, ffn_dim=48)
    net = Transformer(Config(**sizes | changes)).init_weights(1).eval()
    with torch.no_grad():
        net.lm_head.weight.mul_(20)
    return net


@pytest.mark.parametrize("kind", KINDS)
def test_every_text_of_a_batch_is_what_it_is_alone(kind):
    net = net_of(**KINDS[kind])
    texts = prompts([1, 9, 30, 2, 17, 5, 41, 3])
    limits = [20, 3, 12, 1, 30, 8, 5, 16]
    engine = Engine(net, 3, 100, piece=7)
    requests = [engine.submit(Request(ids, n, GREEDY)) for ids, n in zip(texts, limits, strict=True)]
    finish(engine)
    assert [request.new for request in requests] == generate(net, texts, limits)
    assert {request.finish for request in requests} == {"length"}


def test_a_text_depends_on_its_own_seed_alone():
    net = net_of()
    texts = prompts([5, 9, 3, 12])
    choices = [Choice(0.9, top_p=0.9), Choice(1.2, top_k=20), GREEDY, Choice(1.0, repetition_penalty=1.3)]

    def write(rows, some):
        engine = Engine(net, rows, 100)
        requests = [engine.submit(Request(texts[i], 20, choices[i], seed=i)) for i in some]
        finish(engine)
        return {i: request.new for i, request in zip(some, requests, strict=True)}

    together = write(4, range(4))
    for i in range(4):
        assert write(1, [i])[i] == together[i]
    assert write(2, [3, 1, 0, 2]) == together


def test_rows_come_and_go():
    """A text that is cancelled frees its row, one that ends gives it to the next; none is lost."""
    net = net_of()
    engine = Engine(net, 2, 100, piece=4)
    texts = prompts([3, 40, 3, 3])
    requests = [engine.submit(Request(ids, 30, GREEDY)) for ids in texts]
    for _ in range(5):
        engine.step()
    requests[0].finish = "cancelled"
    requests[3].finish = "cancelled"  # while it waits
    finish(engine)
    assert len(requests[0].new) < 30 and not requests[3].new
    alone = generate(net, texts[1:3], 30)
    assert [requests[1].new, requests[2].new] == alone


def test_what_a_row_holds_is_not_read_again(monkeypatch):
    net = net_of()
    engine = Engine(net, 2, 100)
    first = engine.submit(Request(prompts([30])[0], 10, GREEDY))
    finish(engine)
    reads = []
    forward = net.forward
    monkeypatch.setattr(net, "forward", lambda ids, **more: reads.append(ids.shape[1]) or forward(ids, **more))
    longer = first.ids + first.new + [5, 6, 7]
    second = engine.submit(Request(longer, 10, GREEDY))
    other = engine.submit(Request(first.ids[:20] + [9] * 5, 10, GREEDY))
    finish(engine)
    assert sum(reads) < 70  # 43 + 25 + 20 new ones without
    assert [second.new, other.new] == generate(net, [longer, other.ids], 10)


def test_prompts_of_like_length_are_read_in_one_pass(monkeypatch):
    """In whichever rows: those between them write on. A prompt of less than half the length has its own pass."""
    net = net_of()
    engine = Engine(net, 5, 100)
    texts = prompts([9, 9, 9, 9, 9, 12, 20, 15, 6])
    limits = [1, 60, 1, 1, 1, 10, 10, 10, 10]
    requests = [engine.submit(Request(ids, n, GREEDY)) for ids, n in zip(texts[:5], limits, strict=False)]
    engine.step()
    reads = []
    forward = net.forward
    monkeypatch.setattr(net, "forward", lambda ids, **more: reads.append(tuple(ids.shape)) or forward(ids, **more))
    requests += [engine.submit(Request(ids, n, GREEDY)) for ids, n in zip(texts[5:], limits[5:], strict=True)]
    engine.step()
    assert reads == [(3, 19), (1, 5), (5, 1)]
    finish(engine)
    assert [request.new for request in requests] == generate(net, texts, limits)


def test_prompts_share_what_a_step_reads():
    """A short one is whole at once, whichever row it has, and long ones have what it leaves."""
    engine = Engine(net_of(), 4, 120, piece=32)
    first = engine.submit(Request(prompts([2])[0], 60, GREEDY))
    engine.step()
    long, short, longer = (engine.submit(Request(ids, 5, GREEDY)) for ids in prompts([60, 9, 90]))
    engine.step()
    assert (long.read, short.read, longer.read) == (12, 9, 12) and len(short.new) == 1 and len(first.new) == 2
    finish(engine)
    assert [r.new for r in (long, short, longer)] == generate(net_of(), prompts([60, 9, 90]), 5)


def test_a_long_prompt_is_read_in_pieces_beside_others():
    net = net_of()
    engine = Engine(net, 2, 120, piece=5)
    short = engine.submit(Request(prompts([2])[0], 60, GREEDY))
    for _ in range(3):
        engine.step()
    long = engine.submit(Request(prompts([80])[0], 4, GREEDY))
    before = len(short.new)
    while not long.new:
        engine.step()
    assert len(short.new) - before >= 15  # it wrote on meanwhile
    finish(engine)
    assert long.new == generate(net, [long.ids], 4)[0]


def test_refusals_of_the_engine():
    engine = Engine(net_of(), 1, 20)
    for ids, words in (([], "at least one"), ([5] * 20, "no room"), ([400], "knows 320 ids")):
        with pytest.raises(UserError, match=words):
            engine.submit(Request(ids, 5))
    request = engine.submit(Request([5] * 18, 50, GREEDY))
    finish(engine)
    assert len(request.new) == 2 and request.finish == "length"


def test_prompts_of_a_file(folder, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "p.jsonl"
    texts = ["def a", "x", "größe größe", "import os"]
    file.write_text("\n".join(json.dumps({"prompt": text}) for text in texts), encoding="utf-8")
    sampling.main(sampling.Options(folder, prompts=file, rows=2, max_new_tokens=12, seed=0, device="cpu"))
    got = {(line := json.loads(row))["index"]: line for row in capsys.readouterr().out.splitlines()}
    assert sorted(got) == [0, 1, 2, 3]
    for i, text in enumerate(texts):
        [alone] = run(capsys, folder, prompt=text, max_new_tokens=12, seed=i)
        assert got[i]["text"] == alone["text"] and got[i]["ids"] == alone["ids"]
    for content, words in (("", "no prompt"), ('{"prompt": 5}', "line 1"), ("[", "line 1")):
        file.write_text(content)
        with pytest.raises(UserError, match=words):
            sampling.main(sampling.Options(folder, prompts=file, device="cpu"))


# --- the compiled step ---


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"window": (6, None), "qkv_bias": True, "tie": False, "logit_cap": 20.0},
                                     KINDS["latent"], KINDS["learned"], {"n_expert": 4, "n_expert_active": 2, "expert_dim": 32}])
def test_a_compiled_step_is_the_plain_one(changes):
    """Logits of one row and of four, in parts of growing length, also past a window."""
    torch._dynamo.reset()  # else the limit of versions is reached, and nothing is compiled
    net = net_of(**changes)
    for rows in (1, 4):
        plain, fast = Engine(net, rows, 120), Engine(net, rows, 120, compiled=True)
        steps = []
        for engine in (plain, fast):
            step = engine.step_rows

            def keep(*args, step=step, steps=steps):
                steps.append(step(*args))
                return steps[-1]

            keep.span, keep.compiled = step.span, step.compiled
            engine.step_rows = keep
            some = [engine.submit(Request(ids, 90 - len(ids), GREEDY)) for ids in prompts([3, 9, 20, 5][:rows])]
            finish(engine)
            steps.append([request.new for request in some])
        assert step.compiled  # it has not given up
        middle = len(steps) // 2
        assert steps[middle - 1] == steps[-1]
        for a, b in zip(steps[: middle - 1], steps[middle:-1], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_compiled_row_times_matrices_of_any_height():
    """Heights that four parts share evenly, unevenly, and that are fewer than four."""
    torch.manual_seed(0)
    matrices = [Linear(48, height, bias=height % 2 == 0) for height in (1, 2, 3, 5, 10, 64)]

    def multiply(x):
        return [matrix(x) for matrix in matrices]

    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(1, 1, 48, dtype=dtype)
            for a, b in zip(torch.compile(multiply, dynamic=False)(x), multiply(x), strict=True):
                torch.testing.assert_close(a, b, **({} if dtype == torch.float32 else {"atol": 0.02, "rtol": 0.02}))


@pytest.mark.slow
def test_compiled_models_of_one_shape_do_not_share_code():
    nets = [net_of(), net_of()]
    nets[1].init_weights(2).lm_head.weight.data.mul_(20)
    texts = []
    for net in (*nets, *nets):  # the first one's code again, when the second has been compiled
        engine = Engine(net, 1, 60, compiled=True)
        texts.append(engine.submit(Request([1, 2, 3], 10, GREEDY)))
        finish(engine)
    assert [request.new for request in texts] == 2 * [generate(net, [[1, 2, 3]], 10)[0] for net in nets]
    assert texts[0].new != texts[1].new


@pytest.mark.slow
def test_a_step_of_several_rows_is_frozen_and_does_without(monkeypatch, capsys):
    """It keeps the weights that it was made with; where it cannot be frozen, it is compiled all the same."""
    net = net_of(tie=False)
    ids, positions = torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 1, dtype=torch.int64)
    rows = sampling.RowCache(net.config, 4, 60)
    cache = rows.part(slice(0, 4), 64)
    step = sampling.Step(net, True)
    before = step(ids, positions, cache)
    net.lm_head.weight.data.mul_(2)
    assert torch.equal(step(ids, positions, cache), before)
    torch.testing.assert_close(step(ids[:1], positions[:1], rows.part(slice(0, 1), 64))[0], 2 * before[0])

    step = sampling.Step(net, True)
    monkeypatch.setattr(step, "run_more", lambda *args: 1 / 0)
    torch.testing.assert_close(step(ids, positions, cache), 2 * before)
    assert step.compiled and not step.frozen and "not compiled" not in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("kind, rows", [("int8", 4), ("int8", 12), ("int4", 4)])
def test_a_compiled_batch_of_quantized_weights(kind, rows, vocab, tmp_path):  # noqa: F811
    """It stays compiled, and its logits are those of the plain step within bfloat16's rounding."""
    source = make(vocab, tmp_path / "m", n_embd=64, ffn_dim=128)
    net = sampling.open_model(source, torch.device("cpu"), torch.bfloat16, kind)
    logits = []
    for compiled in (False, True):
        step = sampling.Step(net, compiled)
        generator = torch.Generator().manual_seed(0)
        cache = sampling.RowCache(net.config, rows, 60, dtype=torch.bfloat16)
        for x in itertools.chain(*cache.whole):
            x.normal_(generator=generator)
        part = cache.part(slice(0, rows), 64)
        logits.append(step(torch.arange(rows)[:, None], torch.full((rows, 1), 5), part))
        assert step.compiled == compiled
    assert (logits[0] - logits[1]).abs().max() < 0.02 * logits[0].abs().max()


def test_without_a_compiler_the_step_runs_as_it_is(monkeypatch, capsys):
    def fails(*args, **more):
        raise torch._dynamo.exc.InternalTorchDynamoError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", lambda *args, **more: fails)
    net = net_of()
    engine = Engine(net, 2, 60, compiled=True)
    engine.warm_up()
    requests = [engine.submit(Request(ids, 8, GREEDY)) for ids in prompts([3, 9])]
    finish(engine)
    assert [request.new for request in requests] == generate(net, [request.ids for request in requests], 8)
    assert "not compiled" in capsys.readouterr().err


@pytest.mark.slow
def test_a_compiled_reader_is_the_plain_one(folder, capsys):  # noqa: F811
    [plain] = run(capsys, folder, prompt="def a", temperature=0.0)
    [fast] = run(capsys, folder, prompt="def a", temperature=0.0, compile=True)
    [more] = run(capsys, folder, prompt="def a", temperature=0.0, compile=True, lookup=True)
    assert plain["ids"] == fast["ids"] == more["ids"]


# --- quantized weights ---


@pytest.mark.parametrize("kind, steps", [(Int8, 254), (Int4, 15)])
def test_rounding_is_to_the_nearest_step(kind, steps):
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    q, scales = kind.pack(weight)
    if kind is Int8:
        back, step = q.float() * scales[:, None], scales[:, None].expand_as(weight)
    else:
        numbers = torch.stack((q >> 4, q & 15), -1).view(32, 128 // Int4.group, Int4.group).float()
        scale, zero = scales.transpose(0, 1).unbind(-1)
        back = ((numbers - 8) * scale[..., None] + zero[..., None]).view(32, 128)
        step = scale.repeat_interleave(Int4.group, 1)
    assert ((back - weight).abs() <= step * 0.5001).all()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantized_products(kind, vocab, tmp_path):  # noqa: F811
    """Each product is that of the dequantized matrix, for one row and for many, and the text goes on."""
    source = make(vocab, tmp_path / "a", n_embd=64, ffn_dim=128, qkv_bias=True)
    plain = load_model(source)
    net = open_model(source, "cpu", torch.bfloat16, kind)
    changed = {name: m for name, m in net.named_modules() if isinstance(m, (Int8, Int4))}
    assert len(changed) == 15 and "lm_head" in changed
    assert (kind == "int4") == any(isinstance(m, Int4) for m in changed.values())
    for name, module in changed.items():
        original = plain.get_submodule(name)
        q, scales = type(module).pack(original.weight)
        if isinstance(module, Int8):
            weight = q.float() * scales[:, None]
        else:
            scales = scales.bfloat16().float()
            q = torch.stack((q >> 4, q & 15), -1).view(len(q), -1, Int4.group).float()
            scale, zero = scales.transpose(0, 1).unbind(-1)
            weight = ((q - 8) * scale[..., None] + zero[..., None]).flatten(1)
        for rows in (1, 3, 40):
            x = torch.randn(rows, weight.shape[1], generator=torch.Generator().manual_seed(rows)).bfloat16()
            want = x.float() @ weight.T + (0 if module.bias is None else module.bias.float())
            torch.testing.assert_close(module(x).float(), want, atol=0.03 * want.abs().max().item(), rtol=0.02)
    assert sampling.bytes_of(net) < sampling.bytes_of(plain)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantized_folder_opens_again(kind, vocab, tmp_path, capsys):  # noqa: F811
    source = make(vocab, tmp_path / "a", n_embd=64, ffn_dim=128)
    [made] = run(capsys, source, prompt="def a", quantize=kind)
    sampling.main(sampling.Options(source, quantize=kind, save=tmp_path / "q"))
    [opened] = run(capsys, tmp_path / "q", prompt="def a")
    assert opened["ids"] == made["ids"]
    with pytest.raises(UserError, match="already"):
        sampling.main(sampling.Options(source, quantize=kind, save=tmp_path / "q"))
    with pytest.raises(UserError, match="sample.py alone"):
        load_config(tmp_path / "q")
    code, _, err = command("train.py", "--init", tmp_path / "q", "--out", tmp_path / "o")
    assert code == 2 and "sample.py alone" in err
    text = (tmp_path / "q/config.json").read_text()
    other = "int4" if kind == "int8" else "int8"
    (tmp_path / "q/config.json").write_text(text.replace(f'"{kind}"', f'"{other}"'))
    with pytest.raises(UserError, match="does not fit"):
        run(capsys, tmp_path / "q", prompt="def a")


def test_the_cost_is_printed(folder, data, tmp_path, capsys):  # noqa: F811
    tokenizer = load_tokenizer(data)
    sizes = dict(seq_len=64, n_layer=1, n_head=2, n_kv_head=1, n_embd=64, head_dim=32, ffn_dim=128)
    net = Transformer(Config(**sizes, vocab_size=(tokenizer.n_vocab + 63) // 64 * 64, eos_id=tokenizer.eot_id,
                             pad_id=tokenizer.pad_id)).init_weights()
    save_checkpoint(tmp_path / "m", net, data / "tokenizer.json")
    sampling.main(sampling.Options(tmp_path / "m", quantize="int8", data=data, prompt="a", max_new_tokens=2,
                                   device="cpu"))
    err = capsys.readouterr().err
    assert "bits per byte" in err and "MB" in err and "%" in err


# --- proposals ---


def write_with(net, propose, ids, n, choice, seed, counts=None, stop=frozenset()):
    generator = torch.Generator().manual_seed(seed)
    if propose == "lookup":
        propose = partial(sampling.propose_lookup, net.config.vocab_size)
    else:
        propose = partial(sampling.propose_draft, Reader(propose), choice, generator)
    return list(speculate(Reader(net), propose, ids, n, choice, generator, stop, counts))


@pytest.mark.parametrize("changes", [{}, {"window": (6, 6)}])
def test_proposals_change_no_greedy_text(changes):
    net, other = net_of(**changes), net_of(n_layer=1)
    for ids in prompts([1, 4, 30]):
        [want] = generate(net, [ids], 40)
        for propose in (net, other, "lookup"):
            counts = []
            assert write_with(net, propose, ids, 40, GREEDY, 0, counts) == want
            if propose is net:  # whoever proposes what the model would say is always right
                assert all(kept == proposed or i == len(counts) - 1 for i, (proposed, kept) in enumerate(counts))
                assert len(counts) == 8
    end = want[20]
    first = want.index(end)
    assert write_with(net, net, ids, 40, GREEDY, 0, stop={end}) == want[: first + 1]


@pytest.mark.parametrize("kind", ["learned", "longrope"])
def test_proposals_at_a_border(kind):
    """At the last of the learned places, and over LongRoPE's border, where the text is read anew."""
    net = net_of(**KINDS[kind])
    ids = prompts([20])[0]
    n = 108 if kind == "learned" else 30
    [want] = generate(net, [ids], n)
    assert write_with(net, "lookup", ids, n, GREEDY, 0) == want


def test_a_text_taken_back_over_longropes_border():
    net = net_of(**KINDS["longrope"])
    reader = Reader(net)
    ids = prompts([40])[0]
    reader.read_text(ids)
    torch.testing.assert_close(reader.read_text(ids[:10]), Reader(net).read_text(ids[:10]))


@pytest.mark.parametrize("propose", ["draft", "lookup"])
def test_proposals_keep_the_distribution(propose):
    """Chi-square of 3,000 texts of two tokens on a vocabulary of eight, each against its exact probability."""
    sizes = dict(vocab_size=8, seq_len=32, n_layer=1, n_head=1, n_kv_head=1, n_embd=16, head_dim=16, ffn_dim=16)
    net, draft = (Transformer(Config(**sizes)).init_weights(seed).eval() for seed in (0, 1))
    with torch.no_grad():
        net.embed_tokens.weight.mul_(60)
        draft.embed_tokens.weight.mul_(60)
    ids = [1, 2, 3, 1, 2]
    choice = Choice(temperature=1.0, top_k=6)
    first = adjust(net(torch.tensor([ids]))[0][:, -1].float(), **vars(choice)).softmax(-1)[0]
    exact = {}
    for a in range(8):
        second = adjust(net(torch.tensor([ids + [a]]))[0][:, -1].float(), **vars(choice)).softmax(-1)[0]
        exact |= {(a, b): (first[a] * second[b]).item() for b in range(8)}
    n = 3000
    counts = dict.fromkeys(exact, 0)
    kept = []
    for seed in range(n):
        text = write_with(net, draft if propose == "draft" else "lookup", ids, 2, choice, seed, kept)
        counts[tuple(text)] += 1
    assert all(counts[pair] == 0 for pair, p in exact.items() if p == 0)
    often = {pair: p for pair, p in exact.items() if n * p >= 5}
    rest = 1 - sum(often.values())
    chi = sum((counts[pair] - n * p) ** 2 / (n * p) for pair, p in often.items())
    rare = n - sum(counts[pair] for pair in often)
    chi += (rare - n * rest) ** 2 / (n * rest) if rest * n > 1 else 0
    degrees = len(often)
    assert chi < degrees + 4 * math.sqrt(2 * degrees)
    assert 0 < sum(k for _, k in kept) < sum(proposed for proposed, _ in kept)  # some are kept, some are not


def test_a_draft_with_another_vocabulary_is_refused(folder, data, tmp_path):  # noqa: F811
    tokenizer = load_tokenizer(data)
    net = net_of(vocab_size=(tokenizer.n_vocab + 63) // 64 * 64, eos_id=tokenizer.eot_id, pad_id=tokenizer.pad_id)
    save_checkpoint(tmp_path / "d", net, data / "tokenizer.json")
    with pytest.raises(UserError, match="another vocabulary"):
        sampling.main(sampling.Options(folder, draft=tmp_path / "d", prompt="a", device="cpu"))


# --- a chat ---


def test_chat_commands(folder, monkeypatch, capsys, tmp_path):  # noqa: F811

    saved = tmp_path / "chat.jsonl"
    text = f"hello\n/save {saved}\n/system be brief\nagain\n/save {saved}\n/save\n/help\n/nothing\n/exit\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    sampling.main(sampling.Options(folder, chat=True, max_new_tokens=5, seed=0, device="cpu"))
    first, second = (json.loads(line)["messages"] for line in saved.read_text(encoding="utf-8").splitlines())
    assert [m["role"] for m in first] == ["user", "assistant"] and first[0]["content"] == "hello"
    assert [m["role"] for m in second] == ["system", "user", "assistant"] and second[0]["content"] == "be brief"
    err = capsys.readouterr().err
    assert "needs the name of a file" in err and "/system TEXT" in err


def test_lines_pasted_at_once_are_one_message():

    pty = pytest.importorskip("pty")
    controller, terminal = pty.openpty()
    code = "import sys; sys.path.insert(0, '.'); from sample import read_message; print(repr(read_message()))"

    process = subprocess.Popen([sys.executable, "-c", code], stdin=terminal, stdout=subprocess.PIPE, text=True,
                               cwd=ROOT)
    os.write(controller, b"def f(x):\n    return x\n\nwhat is this?\n")
    out, _ = process.communicate(timeout=60)
    assert out.strip() == repr("def f(x):\n    return x\n\nwhat is this?")


# --- the server ---


@pytest.fixture(scope="module")
def server(vocab, tmp_path_factory):  # noqa: F811
    """A server in a thread of this process, on a free port."""
    source = make(vocab, tmp_path_factory.mktemp("served") / "tiny", tie=False, seq_len=256)
    o = sampling.ServeOptions(source, port=0, rows=4, waiting=200, compile=False, device="cpu")
    server, service = sampling.make_server(source, o)
    for job in (server.serve_forever, service.work):
        threading.Thread(target=job, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def post(server, path, body, read=True):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, data, {"Content-Type": "application/json"})
    if not read:
        return connection
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def get(server, path):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()


def service_of(server):
    return server.RequestHandlerClass.service


def alone(server, ids, n, choice, seed=0):
    engine = Engine(service_of(server).engine.model, 1, 256)
    request = engine.submit(Request(ids, n, choice, seed, service_of(server).stop))
    finish(engine)
    return request.new


def test_completions(server):
    tokenizer = service_of(server).tokenizer
    status, body = post(server, "/v1/completions", {"model": "tiny", "prompt": "def a", "max_tokens": 9,
                                                    "temperature": 0, "logprobs": 2})
    assert status == 200 and body["object"] == "text_completion" and body["model"] == "tiny"
    new = alone(server, tokenizer.encode("def a"), 9, Choice(0, n_vocab=tokenizer.n_vocab))
    [choice] = body["choices"]
    assert choice["text"] == tokenizer.decode([i for i in new if i not in service_of(server).stop])
    assert len(choice["logprobs"]["token_logprobs"]) == len(new) == body["usage"]["completion_tokens"]
    assert choice["finish_reason"] in ("length", "stop")
    status, body = post(server, "/v1/completions", {"prompt": ["a", "b"], "n": 2, "max_tokens": 4, "seed": 1})
    assert [c["index"] for c in body["choices"]] == [0, 1, 2, 3]
    assert body["usage"]["prompt_tokens"] == 2
    again = post(server, "/v1/completions", {"prompt": ["a", "b"], "n": 2, "max_tokens": 4, "seed": 1})[1]
    assert [c["text"] for c in again["choices"]] == [c["text"] for c in body["choices"]]
    by_ids = post(server, "/v1/completions", {"prompt": tokenizer.encode("def a"), "max_tokens": 9, "temperature": 0})
    assert by_ids[1]["choices"][0]["text"] == choice["text"]
    cut = post(server, "/v1/completions", {"prompt": "def a", "max_tokens": 9, "temperature": 0,
                                           "stop": choice["text"][2:4]})[1]["choices"][0]
    assert cut["text"] == choice["text"][: choice["text"].index(choice["text"][2:4])]
    assert cut["finish_reason"] == "stop"


def test_openai_client(server):
    openai = pytest.importorskip("openai", reason="the client is in requirements-dev.txt")
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{server.server_address[1]}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "größe?"}]
    more = dict(model="tiny", messages=messages, max_tokens=20, temperature=0)
    whole = client.chat.completions.create(**more, logprobs=True, top_logprobs=2)
    text = whole.choices[0].message.content
    assert text and whole.usage.completion_tokens == len(whole.choices[0].logprobs.content)
    parts, usage = [], None
    for event in client.chat.completions.create(**more, stream=True, stream_options={"include_usage": True}):
        parts += [choice.delta.content or "" for choice in event.choices]
        usage = event.usage or usage
    assert "".join(parts) == text and usage == whole.usage and len(parts) > 1
    completion = client.completions.create(model="tiny", prompt="def a", max_tokens=10, temperature=0)
    same = dict(model="tiny", prompt="def a", temperature=0, logprobs=0)
    whole = client.completions.create(**same, max_tokens=200).choices[0]
    streamed = list(client.completions.create(**same, max_tokens=200, stream=True))
    assert "".join(event.choices[0].text for event in streamed) == whole.text
    assert whole.text.startswith(completion.choices[0].text) and len(streamed) > 1
    offsets = [place for event in streamed for place in event.choices[0].logprobs.text_offset]
    assert offsets == whole.logprobs.text_offset and offsets == sorted(offsets)
    more |= {"seed": -1, "extra_body": {"parallel_tool_calls": True}}  # both are the API's
    assert client.chat.completions.create(**more).choices[0].message.content == text
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="gpt-4", prompt="a")
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="tiny", prompt="a b " * 300)


def test_many_clients_at_once(server):
    """A hundred requests of 32 clients: each text is what it is alone."""
    tokenizer = service_of(server).tokenizer
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (100, 2), generator=generator).tolist()
    asked = [(prompts([n], 290, i)[0], new) for i, (n, new) in enumerate(lengths)]
    answers = [None] * 100
    waiting = list(range(100))
    lock = threading.Lock()

    def client():
        while True:
            with lock:
                if not waiting:
                    return
                i = waiting.pop()
            ids, new = asked[i]
            answers[i] = post(server, "/v1/completions", {"prompt": ids, "max_tokens": new, "seed": i,
                                                          "temperature": 0.8})

    threads = [threading.Thread(target=client) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    stop = service_of(server).stop
    for i in range(0, 100, 9):
        new = alone(server, *asked[i], Choice(0.8, top_p=1.0, n_vocab=tokenizer.n_vocab), seed=i)
        assert answers[i][1]["choices"][0]["text"] == tokenizer.decode([t for t in new if t not in stop])
    assert all(status == 200 for status, _ in answers)


def test_whoever_goes_away_frees_the_row(server):
    engine = service_of(server).engine
    for stream in (True, False):
        connection = post(server, "/v1/completions", {"prompt": "a", "max_tokens": 240, "stream": stream,
                                                      "logit_bias": {}, "seed": 3}, read=False)
        end = time.monotonic() + 20
        while not engine.busy and time.monotonic() < end:
            time.sleep(0.001)
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        while engine.busy and time.monotonic() < end:
            time.sleep(0.01)
        assert not engine.busy
    assert post(server, "/v1/completions", {"prompt": "a", "max_tokens": 2})[0] == 200


BAD = [
    (b"{", 400, "no JSON"), (b"[1]", 400, "object"), (b"\xff\xfe", 400, "no JSON"), (b"[" * 100000, 400, "no JSON"),
    ({"prompt": "a", "model": "gpt-4"}, 404, "does not exist"), ({"prompt": "a", "top_p": 0}, 400, "top_p"),
    ({"prompt": "a", "top_p": 1.1}, 400, "top_p"), ({"prompt": "a", "temperature": -1}, 400, "temperature"),
    ({"prompt": "a", "temperature": "hot"}, 400, "temperature"), ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ({"prompt": "a", "max_tokens": True}, 400, "max_tokens"), ({"prompt": 5}, 400, "prompt"),
    ({"prompt": [10**9]}, 400, "prompt"), ({"prompt": [[1], "a"]}, 200, None), ({"prompt": [[]]}, 400, "prompt"),
    ({"prompt": "a", "tools": [{}]}, 400, "tools"), ({"prompt": "a", "n": 99}, 400, "n is"),
    ({"prompt": "a", "stop": [""]}, 400, "stop"), ({"prompt": "a", "stop": 5}, 400, "stop"),
    ({"prompt": "x " * 400}, 400, "context"), ({"prompt": "x" * 10_000_000}, 413, "larger"),
    ({"prompt": "a", "temperature": float("nan")}, 400, "temperature"), ({"prompt": ["a"] * 300}, 400, "300"),
    ({"prompt": "\ud800", "max_tokens": 1}, 400, ""), ({"prompt": "", "max_tokens": 1}, 200, None),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_bad_requests(server, number):
    body, status, words = BAD[number]
    got, answer = post(server, "/v1/completions", body)
    assert got == status, answer
    if words is not None:
        assert words in answer["error"]["message"] and answer["error"]["type"] == "invalid_request_error"
    assert get(server, "/health")[0] == 200


def test_bad_chats_and_paths(server):
    for messages in (None, [], [5], [{"role": "user"}], [{"role": 5, "content": "a"}],
                     [{"role": "user", "content": [{"type": "image_url"}]}]):
        status, answer = post(server, "/v1/chat/completions", {"messages": messages, "max_tokens": 1})
        assert status == 400 and answer["error"]["param"] == "messages"
    assert post(server, "/v1/nothing", {})[0] == 404 and get(server, "/nothing")[0] == 404
    parts = [{"type": "text", "text": "a"}]
    assert post(server, "/v1/chat/completions", {"messages": [{"role": "user", "content": parts}], "max_tokens": 1})[0] == 200
    raw = socket.create_connection(("127.0.0.1", server.server_address[1]))
    raw.sendall(b"POST /v1/completions HTTP/1.1\r\n\r\n")
    assert b" 411 " in raw.recv(100)
    raw.close()
    status, health = get(server, "/health")
    assert status == 200 and json.loads(health)["status"] == "ok"


def test_a_full_queue_says_so(server):
    service = service_of(server)
    service.o.waiting, before = 1, service.o.waiting
    try:
        answers = []
        threads = [threading.Thread(target=lambda: answers.append(
            post(server, "/v1/completions", {"prompt": "a", "max_tokens": 100}))) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        service.o.waiting = before
    statuses = {status for status, _ in answers}
    assert len(answers) == 16 and statuses <= {200, 429} and 200 in statuses


def test_the_page(server):
    status, page = get(server, "/")
    assert status == 200 and b"/v1/chat/completions" in page and b"http" not in page.replace(b"https", b"http")


@pytest.mark.slow
def test_the_page_in_a_browser(server):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("there is no Chromium here: the page was not opened in a browser")
    api = pytest.importorskip("playwright.sync_api", reason="playwright is in requirements-dev.txt")
    with api.sync_playwright() as play:
        page = play.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page()
        page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
        page.fill("textarea", "hello")
        page.press("textarea", "Enter")
        page.wait_for_function("!running && document.querySelectorAll('.assistant').length == 1", timeout=60_000)
        assert page.inner_text(".user") == "hello" and page.query_selector(".error") is None
        assert page.evaluate("messages.at(-1).content.length") > 0


@pytest.mark.slow
def test_the_command_serves(folder):  # noqa: F811

    process = subprocess.Popen([sys.executable, "sample.py", "serve", str(folder), "--port", "0", "--no-compile"],
                               cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"})
    line = next(line for line in process.stderr if "http://" in line)
    port = int(line.split("http://127.0.0.1:")[1].split("/")[0])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/health")
    assert json.loads(connection.getresponse().read())["status"] == "ok"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) in (0, 130)


def test_the_options_of_serve_reach_the_server(vocab, tmp_path):  # noqa: F811
    """--context bounds a text, --timeout ends one, --quantize packs the weights, --host is listened on."""
    source = make(vocab, tmp_path / "tiny", seq_len=256, n_embd=64, ffn_dim=128)
    o = sampling.ServeOptions(source, port=0, host="localhost", rows=1, context=100, timeout=0.05, quantize="int8",
                              compile=False, device="cpu")
    server, service = sampling.make_server(source, o)
    for job in (server.serve_forever, service.work):
        threading.Thread(target=job, daemon=True).start()
    service.stop = frozenset()
    assert any(isinstance(module, Int8) for module in service.engine.model.modules())
    assert "context 100" in post(server, "/v1/completions", {"prompt": [5] * 100})[1]["error"]["message"]
    step = service.engine.step
    service.engine.step = lambda: time.sleep(0.02) or step()
    answer = post(server, "/v1/completions", {"prompt": "a", "max_tokens": 90})[1]
    assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] < 50
    server.shutdown()
    server.server_close()
    o.host = "no.such.host.invalid"
    with pytest.raises(UserError, match="cannot be listened on"):
        sampling.make_server(source, o)
