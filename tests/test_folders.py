"""The checkpoint folder and the data folder: nothing is lost, and what is damaged is a sentence."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import model as octavo
from model import IGNORE, Config, Tokens, Transformer, UserError, find_checkpoint, load_model, save_checkpoint

ROOT = Path(octavo.__file__).parent
TINY = Config(vocab_size=64, seq_len=32, n_layer=2, n_head=2, n_kv_head=1, n_embd=16, head_dim=8, ffn_dim=24)


def make(seed=0, config=TINY):
    return Transformer(config).init_weights(seed)


def same(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def vocab(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"vocab": {"é": 0}}}, ensure_ascii=False), encoding="utf-8")
    return path


@pytest.fixture
def saved(tmp_path, vocab):
    save_checkpoint(tmp_path / "out", make(), vocab)
    return tmp_path / "out"


# ---- checkpoints ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [dict(), dict(tie=False), dict(causal=False), dict(qk_norm=False, qkv_bias=True, window=(4, None))]
)
def test_a_model_comes_back(changes, tmp_path, vocab):
    net = make(config=TINY.replace(**changes))
    save_checkpoint(tmp_path / "a" / "b" / "out", net, vocab, metrics='{"step": 1}\n')
    folder = tmp_path / "a" / "b" / "out"
    again = load_model(folder)
    assert again.config == net.config and same(net, again)
    assert again.config.tie == (again.lm_head.weight is again.embed_tokens.weight)
    assert all(p.requires_grad for p in again.parameters())
    x = torch.arange(8)[None]
    assert torch.equal(net.eval()(x)[0], again(x)[0])
    assert load_model(folder, dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16
    assert (folder / "tokenizer.json").read_bytes() == vocab.read_bytes()
    assert (folder / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert [p.name for p in folder.parent.iterdir()] == ["out"]  # nothing beside it is left over


def test_a_model_that_is_not_causal_says_what_it_is(tmp_path, vocab):
    save_checkpoint(tmp_path / "out", make(config=TINY.replace(causal=False)), vocab)
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf["model_type"] == "octavo"
    assert load_model(tmp_path / "out").config.causal is False


def test_the_state_of_a_run_comes_back(tmp_path, vocab):
    tensors = {"a.weight/exp_avg": torch.randn(3, 4).bfloat16(), "a.weight/step": torch.tensor(7.0)}
    facts = {"step": 7, "rng": [1, 2**63], "loss_scale": 65536.0, "best": 1.5e-7, "text": "é"}
    save_checkpoint(tmp_path / "out", make(), vocab, state=(tensors, facts))
    got_tensors, got_facts = octavo.load_state(tmp_path / "out")
    assert got_facts == facts and got_tensors.keys() == tensors.keys()
    for key, value in tensors.items():
        assert got_tensors[key].dtype == value.dtype and torch.equal(got_tensors[key], value)
    save_checkpoint(tmp_path / "out", make(), vocab)
    with pytest.raises(UserError, match="without the state"):
        octavo.load_state(tmp_path / "out")


class Killed(BaseException):
    """As SIGKILL does: no `except Exception`, no clean-up that anybody could rely on."""


class Disk:
    """Counts what is done to the disk, and fails at one of them: before it, half-way, or after it."""

    def __init__(self, monkeypatch, error, at: int, when: str):
        self.error, self.at, self.when, self.n = error, at, when, -1
        for owner, name in (
            (octavo, "save_tensors"), (octavo, "write_text"), (os, "replace"), (shutil, "rmtree"), (Path, "mkdir")
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, self.wrap(name, getattr(owner, name)))

    def wrap(self, name, real):
        def call(path, *args, **kw):
            self.n += 1
            if self.n != self.at:
                return real(path, *args, **kw)
            if isinstance(self.error, OSError) and name == "rmtree":
                return None  # it ignores errors: nothing is removed
            if self.when == "half" and name == "rmtree" and Path(path).is_dir():
                os.unlink(sorted(Path(path).glob("*.*"))[0])
            if self.when == "half" and name in ("save_tensors", "write_text"):
                Path(path).write_bytes(b"{")
            if self.when == "after":
                real(path, *args, **kw)
            raise self.error

        return call


@pytest.mark.parametrize("when", ["before", "half", "after"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(when, exists, tmp_path, vocab, monkeypatch):
    old, new, folder = make(1), make(2), tmp_path / "out"
    state = ({"a/b": torch.ones(2)}, {"step": 2})
    if exists:
        save_checkpoint(folder, old, vocab, state=({"a/b": torch.zeros(2)}, {"step": 1}))
    spare = tmp_path / "spare"
    if exists:
        shutil.copytree(folder, spare)
    outcomes = []
    for at in itertools.count():
        with monkeypatch.context() as patch:
            disk = Disk(patch, Killed(), at, when)
            try:
                save_checkpoint(folder, new, vocab, state=state)
            except Killed:
                pass
        try:
            found = load_model(folder)
            outcomes.append("new" if same(found, new) else "old" if same(found, old) else "mixed")
            tensors, facts = octavo.load_state(folder)
            assert (facts["step"] == 2) == (outcomes[-1] == "new") == bool(tensors["a/b"][0] == 1)
        except UserError:
            outcomes.append("none")
        save_checkpoint(folder, new, vocab, state=state)  # the next save is not in the way of what the kill left
        assert same(load_model(folder), new)
        assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("out")) == ["out"]
        if disk.n < at:
            break
        shutil.rmtree(folder)
        if exists:
            shutil.copytree(spare, folder)
    first, steps = ("old" if exists else "none"), len(outcomes)
    assert steps > 10 and outcomes[-1] == "new"
    assert outcomes == [first] * outcomes.count(first) + ["new"] * outcomes.count("new")
    assert outcomes.count(first) > 8


@pytest.mark.parametrize("when", ["before", "half"])
def test_a_full_disk_is_a_sentence_and_keeps_the_old_one(when, tmp_path, vocab, monkeypatch):
    old, folder = make(1), tmp_path / "out"
    save_checkpoint(folder, old, vocab)
    failed = 0
    for at in itertools.count():
        with monkeypatch.context() as patch:
            disk = Disk(patch, OSError(errno.ENOSPC, "No space left on device"), at, when)
            try:
                save_checkpoint(folder, make(2), vocab, state=({"a/b": torch.ones(2)}, {}))
            except UserError as error:
                failed += 1
                assert "No space left" in str(error) and "is whole" in str(error)
                assert same(load_model(folder), old)
                assert find_checkpoint(folder) == folder and not (tmp_path / "out.new").exists()
        save_checkpoint(folder, old, vocab)
        if disk.n < at:
            break
    assert failed >= 10


def test_only_the_old_one_is_there(saved):
    os.replace(saved, saved.with_name("out.old"))
    assert find_checkpoint(saved) == saved.with_name("out.old")
    assert same(load_model(saved), make())


def test_a_folder_named_by_a_dot_opens(saved, monkeypatch):
    monkeypatch.chdir(saved)
    assert same(load_model("."), make())
    monkeypatch.chdir(saved.parent)
    with pytest.raises(UserError, match="holds no checkpoint"):
        load_model(".")


def test_no_checkpoint_is_a_sentence(tmp_path):
    for name in ("absent", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="holds no checkpoint"):
            load_model(tmp_path / name)


def test_a_missing_tokenizer_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="tokenizer.json"):
        save_checkpoint(tmp_path / "out", make(), tmp_path / "tokenizer.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keep", [0, 4, 200, -1, -500])
def test_a_file_cut_off_is_a_sentence(keep, saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="model.safetensors is damaged or cut off"):
        load_model(saved)


def test_a_state_cut_off_is_a_sentence(tmp_path, vocab):
    save_checkpoint(tmp_path / "out", make(), vocab, state=({"a/b": torch.ones(9)}, {"step": 1}))
    path = tmp_path / "out" / "state" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="optimizer.safetensors is damaged or cut off"):
        octavo.load_state(tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match="optimizer.safetensors"):
        octavo.load_state(tmp_path / "out")


def test_a_state_json_cut_off_is_a_sentence(tmp_path, vocab):
    save_checkpoint(tmp_path / "out", make(), vocab, state=({"a/b": torch.ones(9)}, {"step": 1}))
    path = tmp_path / "out" / "state" / "state.json"
    path.write_text(path.read_text()[:-3])
    with pytest.raises(UserError, match="state.json cannot be read"):
        octavo.load_state(tmp_path / "out")


def damage(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop(UP), "lacks 1 tensors, layers.1.mlp.up_proj.weight"),
        (lambda t: t.update({UP: torch.zeros(3, 3)}), r"layers.1.mlp.up_proj.weight is \(3, 3\).*\(24, 16\)"),
        (lambda t: t.update({"model.surprise": torch.zeros(1)}), "'surprise'.*no place"),
        (lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.zeros(16)}), "layers.2.*no place"),
    ],
)
def test_tensors_that_do_not_fit_are_a_sentence(change, words, saved):
    damage(saved, change)
    with pytest.raises(UserError, match=words):
        load_model(saved)


def test_tensors_that_others_add_are_passed_over(saved):
    damage(saved, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert same(load_model(saved), make())


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"architectures": ["LlamaForCausalLM"]}'])
def test_a_config_that_cannot_be_read_is_a_sentence(text, saved):
    path = saved / "config.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=r"\w+ \w+ \w+"):
        load_model(saved)


def test_other_safetensors_in_the_folder_are_not_the_models(saved):
    """Mistral's folders hold the same weights once more under other names; a state or an adapter may lie there."""
    save_file({"tok_embeddings.weight": torch.zeros(2, 2)}, saved / "consolidated.safetensors")
    assert same(load_model(saved), make())


# ---- data ----------------------------------------------------------------------------------------------------


def write_data(folder, ids, dtype="uint16", vocab_size=64, eot_id=0, split="train", size=None, **meta):
    folder.mkdir(exist_ok=True)
    np.asarray(ids, dtype=np.dtype(dtype).newbyteorder("<")).tofile(folder / f"{split}.bin")
    counts = {"tokens": len(ids), "bytes": size or len(ids), "documents": 1}
    meta = {"dtype": dtype, "vocab_size": vocab_size, "eot_id": eot_id, "splits": {split: counts}} | meta
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def numbered(tmp_path, n):
    """A text whose token at place i is i, so that a target names its own place."""
    return Tokens(write_data(tmp_path / "data", np.arange(n), vocab_size=n, eot_id=n - 1), "train")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_reading(dtype, tmp_path):
    high = np.iinfo(dtype).max
    tokens = Tokens(write_data(tmp_path / "d", [5, high, 7], dtype, vocab_size=high + 1), "train")
    assert tokens.read(0, 3).tolist() == [5, high, 7]
    assert tokens.read(2, 5).tolist() == [7, 5, high, 7, 5]  # the text is a circle
    assert tokens.read(4, 1).tolist() == [high]


@pytest.mark.parametrize("n, T", [(60, 10), (61, 10), (59, 10), (60, 1), (60, 60), (7, 10), (2, 5)])
def test_each_token_is_a_target_once_an_epoch(n, T, tmp_path):
    tokens = numbered(tmp_path, n)
    K = tokens.windows(T)
    assert K == math.ceil(n / T)
    epochs = []
    for epoch in range(3):
        x, y = tokens.batch(epoch * K, K, T, seed=5)
        assert x.shape == y.shape == (K, T) and x.dtype == y.dtype == torch.int64
        real = y != IGNORE
        assert sorted(y[real].tolist()) == list(range(n))
        assert torch.equal((x[real] + 1) % n, y[real])  # the target is the token after
        assert torch.equal(x[:, 1:][real[:, :-1]], y[:, :-1][real[:, :-1]])
        epochs.append(y)
    if n == 60 and T == 10:
        assert not torch.equal(epochs[0], epochs[1]) and not torch.equal(epochs[1], epochs[2])


def test_the_order_is_a_function_of_seed_and_position(tmp_path):
    tokens = numbered(tmp_path, 103)
    T, total = 10, 37  # over three epochs of 11 windows
    whole = tokens.batch(0, total, T, seed=1)
    for size in (1, 2, 5, 12):
        parts = [tokens.batch(i, min(size, total - i), T, seed=1) for i in range(0, total, size)]
        for j in (0, 1):
            assert torch.equal(torch.cat([p[j] for p in parts]), whole[j])
    step, world = 6, 3  # each rank takes its slice of a step's windows
    ranks = [tokens.batch(12 + r * step // world, step // world, T, seed=1)[0] for r in range(world)]
    assert torch.equal(torch.cat(ranks), whole[0][12:18])
    again = Tokens(tokens.folder, "train")
    assert torch.equal(again.batch(30, 2, T, seed=1)[0], whole[0][30:32])  # no need to have been there before
    assert not torch.equal(again.batch(0, total, T, seed=2)[0], whole[0])


@pytest.mark.parametrize("n, T, B", [(61, 10, 2), (60, 10, 4), (60, 7, 3), (5, 10, 1)])
def test_in_order_covers_every_target_once(n, T, B, tmp_path):
    tokens = numbered(tmp_path, n)
    for world in (1, 2, 3):
        targets = []
        for rank in range(world):
            for x, y in tokens.in_order(T, B, rank=rank, world=world):
                assert x.shape == y.shape and x.shape[0] <= B and x.shape[1] == T
                real = y != IGNORE
                assert torch.equal(x[real] + 1, y[real])
                targets += y[real].tolist()
        assert sorted(targets) == list(range(1, n))


def test_in_order_with_a_limit_is_spread_and_fixed(tmp_path):
    tokens = numbered(tmp_path, 1000)
    some = [torch.cat([y for _, y in tokens.in_order(10, 4, limit=200)]) for _ in range(2)]
    assert torch.equal(*some)
    first = some[0][:, 0]
    assert len(first) == 20 == len(set(first.tolist()))
    assert first.min() == 1 and first.max() > 900
    everything = [torch.cat([y for _, y in tokens.in_order(10, 4, limit=n)]) for n in (None, 1000, 10**9)]
    assert all(torch.equal(y, everything[0]) for y in everything)


def test_documents(tmp_path):
    tokens = Tokens(write_data(tmp_path / "d", range(9)), "train")
    x = torch.tensor([[5, 6, 0, 7, 0, 0, 8], [0, 1, 2, 3, 4, 5, 6]])
    assert tokens.documents(x).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]


def test_a_cut_off_bin_is_a_sentence(tmp_path):
    folder = write_data(tmp_path / "d", range(20))
    path = folder / "train.bin"
    for size in (0, 1, 38, 39):
        path.write_bytes(b"\0" * size)
        with pytest.raises(UserError, match="cut off"):
            Tokens(folder, "train")
    path.unlink()
    with pytest.raises(UserError, match="train.bin cannot be read"):
        Tokens(folder, "train")


def test_a_bin_that_shrinks_while_open_is_a_sentence(tmp_path):
    tokens = Tokens(write_data(tmp_path / "d", range(60)), "train")
    tokens.batch(0, 6, 10)
    os.truncate(tokens.path, 40)
    with pytest.raises(UserError, match="became shorter"):
        tokens.batch(0, 6, 10)


def test_ids_beyond_the_vocabulary_are_a_sentence(tmp_path):
    tokens = Tokens(write_data(tmp_path / "d", [1, 2, 64, 3], vocab_size=64), "train")
    with pytest.raises(UserError, match="token 64, beyond the vocabulary of 64"):
        tokens.batch(0, 1, 4)


@pytest.mark.parametrize("text", [None, "{", "{}", "[]", '{"dtype": "no"}', '{"splits": {}}'])
def test_a_bad_meta_is_a_sentence(text, tmp_path):
    folder = write_data(tmp_path / "d", range(20))
    path = folder / "meta.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match="meta.json"):
        Tokens(folder, "train")


def test_a_split_without_a_token_to_predict_is_a_sentence(tmp_path):
    for n in (0, 1):
        folder = write_data(tmp_path / "d", range(n))
        with pytest.raises(UserError, match=r"train.*too (short|few)"):
            Tokens(folder, "train")


# ---- evaluation ----------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path, monkeypatch):
    """23 tokens; an id stands for as many bytes as its number has bits, special 0 and 1 for none."""
    spelled = [b"<|endoftext|>", b"<|pad|>"] + [b"x" * i.bit_length() for i in range(2, 64)]
    tokenizer = SimpleNamespace(special={"<|endoftext|>": 0, "<|pad|>": 1}, token_bytes=spelled)
    monkeypatch.setattr(octavo, "load_tokenizer", lambda folder: tokenizer)
    ids = [5, 9, 33, 0, 2, 3, 40, 41, 0, 7, 7, 7, 8, 63, 12, 0, 21, 1, 4, 4, 50, 6, 0]
    return Tokens(write_data(tmp_path / "data", ids, split="val"), "val")


@pytest.mark.parametrize("B", [1, 2, 16])
def test_evaluate_is_the_direct_sum(B, text):
    net = make().train()
    got = octavo.evaluate(net, text, T=5, B=B)
    assert net.training
    ids = torch.from_numpy(text.read(0, 23).astype(np.int64))
    nats = 0.0
    with torch.no_grad():
        for start in range(0, 22, 5):
            window = ids[start : start + 6]
            logp = net.eval()(window[None, :-1])[0][0].double().log_softmax(-1)
            nats -= logp.gather(1, window[1:, None]).sum().item()
    size = sum(int(i).bit_length() for i in ids[1:] if i > 1)
    assert got["val_tokens"] == 22
    assert got["val_loss"] == pytest.approx(nats / 22, rel=1e-5)
    assert got["val_bpb"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_bits_per_byte_by_hand(text):
    """One bit for each token: 22 bits; the bytes are counted on the fingers."""
    by_hand = 4 + 6 + 0 + 2 + 2 + 6 + 6 + 0 + 3 + 3 + 3 + 4 + 6 + 4 + 0 + 5 + 0 + 3 + 3 + 6 + 3 + 0  # 5 is no target
    got = octavo.evaluate(make(), text, T=5, forward=lambda x, y: (y != IGNORE).float() * math.log(2))
    assert got["val_loss"] == pytest.approx(math.log(2))
    assert got["val_bpb"] == pytest.approx(22 / by_hand)


def test_bytes_of_ids_come_from_the_tokenizer_of_the_folder(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers writes the file that this test reads")
    if not (ROOT / "tokenize.py").exists():
        pytest.skip("tokenize.py is not there")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate([*alphabet, "Ã©"])}, [("Ã", "©")]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>"])
    ids = bpe.encode("éè!<|endoftext|>").ids  # two bytes in one token, two in two, one, none
    folder = write_data(tmp_path / "d", ids, vocab_size=258, eot_id=257)
    bpe.save(str(folder / "tokenizer.json"))
    tokens = Tokens(folder, "train")
    assert tokens.token_bytes[torch.tensor(ids)].tolist() == [2, 1, 1, 1, 0]
    assert tokens.token_bytes.sum() == 258
