"""The checkpoint folder and the data folder: nothing is lost, and what is damaged is a sentence."""

import contextlib
import errno
import itertools
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import model as octavo
import numpy as np
import pytest
import torch
from model import (
    IGNORE, Config, Tokens, Transformer, UserError, find_checkpoint, finish_save, load_config, load_model,
    load_state, save_checkpoint, save_files,
)
from safetensors.torch import load_file, save_file

SIZES = {"n_layer": 2, "n_head": 2, "n_kv_head": 1, "n_embd": 16, "head_dim": 8, "ffn_dim": 24}
TINY = Config(vocab_size=64, seq_len=32, **SIZES)
RUN = {"at": 1, "finished": True, "command": "pretrain", "options": {}, "scale": 1.0, "good": 0, "skipped": 0}


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


FILES = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json"]


# ---- checkpoints -------------------------------------------------------------------------------------------


KINDS = [{}, {"tie": False}, {"causal": False}, {"head": "score"}, {"qkv_bias": True, "window": (4, None)}]


@pytest.mark.parametrize("changes", KINDS, ids=str)
def test_a_model_comes_back(changes, tmp_path, vocab):
    net = make(config=TINY.replace(**changes))
    folder = tmp_path / "a" / "b" / "out"
    save_checkpoint(folder, net, vocab)
    again = load_model(folder)
    assert again.config == net.config and same(net, again)
    if changes.get("head") != "score":
        assert again.config.tie == (again.lm_head.weight is again.embed_tokens.weight)
    assert all(p.requires_grad for p in again.parameters())
    x = torch.arange(8)[None]
    assert torch.equal(net.eval()(x)[0], again(x)[0])
    assert load_model(folder, dtype=torch.bfloat16).norm.weight.dtype == torch.bfloat16
    assert (folder / "tokenizer.json").read_bytes() == vocab.read_bytes()
    assert sorted(p.name for p in folder.rglob("*")) == FILES  # nothing else is left over
    assert [p.name for p in folder.parent.iterdir()] == ["out"]


def test_a_model_that_is_not_causal_says_what_it_is(tmp_path, vocab):
    save_checkpoint(tmp_path / "out", make(config=TINY.replace(causal=False)), vocab)
    hf = json.loads((tmp_path / "out" / "config.json").read_text())
    assert hf["model_type"] == "octavo"
    assert load_model(tmp_path / "out").config.causal is False


def test_the_state_of_a_run_comes_back(tmp_path, vocab):
    tensors = {"a.weight/exp_avg": torch.randn(3, 4).bfloat16(), "a.weight/step": torch.tensor(7.0)}
    facts = RUN | {"step": 7, "rng": [1, 2**63], "loss_scale": 65536.0, "best": 1.5e-7, "text": "é"}
    save_checkpoint(tmp_path / "out", make(), vocab, state=(tensors, facts))
    got_tensors, got_facts = load_state(tmp_path / "out")
    assert got_facts == facts and got_tensors.keys() == tensors.keys()
    for key, value in tensors.items():
        assert got_tensors[key].dtype == value.dtype and torch.equal(got_tensors[key], value)
    save_checkpoint(tmp_path / "out", make(), vocab)
    with pytest.raises(UserError, match="without the state"):
        load_state(tmp_path / "out")


class Killed(BaseException):
    """Stand for SIGKILL: no `except Exception` catches it, and no clean-up can be relied on."""


class Disk:
    """Count what is done to the disk, and fail at one of these: before it, half-way, or after it.

    It stands between the code and the calls that change a disk, whoever makes them; `only` counts some.
    """

    CALLS = dict.fromkeys(["mkdir", "rmdir", "unlink", "replace", "fsync"], os)
    CALLS |= {"write_text": Path, "save_file": octavo}

    def __init__(self, monkeypatch, error, at: int, when: str = "before", only=CALLS):
        self.error, self.at, self.when, self.n = error, at, when, -1
        for name in only:
            owner = self.CALLS[name]
            monkeypatch.setattr(owner, name, self.wrap(name, getattr(owner, name)))

    def wrap(self, name, real):
        def call(*args, **kw):
            self.n += 1
            if self.n != self.at:
                return real(*args, **kw)
            if self.when == "half" and name in ("write_text", "save_file"):
                path = args[0] if name == "write_text" else args[1]
                Path(path).write_bytes(b"{")
            if self.when == "after":
                with contextlib.suppress(OSError):
                    real(*args, **kw)
            raise self.error

        return call


OTHER = TINY.replace(n_layer=1, n_embd=8)  # nothing of it can pass for a part of TINY


def save_run(folder, step: int) -> None:
    """Save a checkpoint of which every file says its step, 1 or 2."""
    vocab = folder.with_name(f"tokenizer{step}.json")
    vocab.write_bytes(json.dumps({"step": step}).encode())
    net = make(step, OTHER if step == 1 else TINY)
    save_checkpoint(folder, net, vocab, state=({"a/b": torch.ones(step)}, RUN | {"step": step}))


def read_run(folder) -> int | None:
    """Read the step that a checkpoint is of; None where there is none. All its files have to agree."""
    try:
        net = load_model(folder)
    except UserError as error:
        assert "holds no checkpoint" in str(error)
        return None
    tensors, state = load_state(folder)
    step = state["step"]
    assert same(net, make(step, OTHER if step == 1 else TINY))
    assert len(tensors["a/b"]) == step
    assert json.loads((folder / "tokenizer.json").read_text()) == {"step": step}
    return step


def cut_off(monkeypatch, save, at, **disk) -> bool:
    """Kill a save at its call number `at` to the disk -> was there so late a call?"""
    with monkeypatch.context() as patch:
        counted = Disk(patch, Killed(), at, **disk)
        try:
            save()
        except Killed:
            return True
    assert counted.n < at
    return False


def pending(monkeypatch, save) -> None:
    """Kill a save between its journal and the first of its files: every file is new, none is in its place."""
    assert cut_off(monkeypatch, save, 1, only=["replace"])


@pytest.mark.parametrize("when", ["before", "half", "after"])
@pytest.mark.parametrize("exists", [True, False])
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(when, exists, tmp_path, monkeypatch):
    found = []
    for at in itertools.count():
        folder = tmp_path / f"{at}" / "out"
        folder.parent.mkdir()
        if exists:
            save_run(folder, 1)
        killed = cut_off(monkeypatch, lambda: save_run(folder, 2), at, when=when)  # noqa: B023
        found.append(read_run(folder))
        save_run(folder, 2)  # the next save is not in the way of what the kill left
        assert read_run(folder) == 2
        assert [p for p in folder.rglob("*.new")] == [] and len(list(folder.parent.glob("out*"))) == 1
        if not killed:
            break
    first = 1 if exists else None
    assert found == [first] * found.count(first) + [2] * found.count(2)
    assert found.count(first) > 12 and found.count(2) > 7


def test_finishing_may_be_cut_off_as_well(tmp_path, monkeypatch):
    """The journal stands; a reader is killed at any of its calls to the disk; the next finds what is new."""
    for at in itertools.count():
        folder = tmp_path / f"{at}" / "out"
        folder.parent.mkdir()
        save_run(folder, 1)
        pending(monkeypatch, lambda: save_run(folder, 2))  # noqa: B023
        killed = cut_off(monkeypatch, lambda: load_model(folder), at)  # noqa: B023
        assert read_run(folder) == 2
        if not killed:
            break
    assert at > 7


def step_in(path: Path) -> int:
    return json.loads(path.read_text())["step"]


READERS = {
    "load_model": lambda folder: load_model(folder).config.n_layer,
    "load_config": lambda folder: load_config(folder).n_layer,
    "load_state": lambda folder: load_state(folder)[1]["step"],
    "saved_state": lambda folder: octavo.saved_state(folder)["step"],
    "find_checkpoint": lambda folder: step_in(find_checkpoint(folder) / "tokenizer.json"),
    "save_files": lambda folder: save_files(folder, {}) or step_in(folder / "state" / "state.json"),
}


@pytest.mark.parametrize("name", READERS)
def test_every_reader_finishes_a_save_that_was_cut_off(name, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    save_run(folder, 1)
    pending(monkeypatch, lambda: save_run(folder, 2))
    assert list(folder.rglob("*.new"))
    assert READERS[name](folder) == 2
    names = [*FILES, "optimizer.safetensors", "state.json"]
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == sorted(names)


def test_load_tokenizer_finishes_a_save_that_was_cut_off(data, tmp_path, monkeypatch):
    new = (data / "tokenizer.json").read_text(encoding="utf-8")
    save_files(tmp_path, {"tokenizer.json": "{}"})
    pending(monkeypatch, lambda: save_files(tmp_path, {"tokenizer.json": new}))
    assert octavo.load_tokenizer(tmp_path).encode("def") == octavo.load_tokenizer(data).encode("def")


def test_a_data_folder_finishes_a_save_that_was_cut_off(tmp_path, monkeypatch):
    old, new = (write_data(tmp_path / str(n), range(n)) for n in (9, 12))
    meta, ids = (new / "meta.json").read_text(), (new / "train.bin").read_bytes()
    files = {"train.bin": lambda path: path.write_bytes(ids), "meta.json": meta}
    pending(monkeypatch, lambda: save_files(old, files))
    assert Tokens(old, "train").read(0, 12).tolist() == list(range(12))
    assert sorted(p.name for p in old.iterdir()) == ["meta.json", "train.bin"]  # no journal stays


def test_what_else_is_in_the_folder_stays(tmp_path, vocab):
    folder, outside = tmp_path / "out", tmp_path / "outside"
    (folder / "mine").mkdir(parents=True)
    (folder / "state").mkdir()
    outside.mkdir()
    for path in (folder / "notes.txt", folder / "mine" / "model.safetensors.bak", outside / "big.bin"):
        path.write_text("years of work")
    (folder / "link").symlink_to(outside)
    (folder / "model.safetensors").symlink_to(outside / "big.bin")  # as in a cache of downloads
    (folder / "state" / "shards").symlink_to(outside)  # a save removes shards: the link, not its end
    inode = folder.stat().st_ino
    save_checkpoint(folder, make(), vocab, state=({"a/b": torch.ones(1)}, {}))
    assert same(load_model(folder), make()) and not (folder / "state" / "shards").exists()
    assert folder.stat().st_ino == inode  # a mount, or a shell that stands in it, notices nothing
    for name in ("notes.txt", "mine/model.safetensors.bak", "link/big.bin"):
        assert (folder / name).read_text() == "years of work"


def test_files_and_folders_are_replaced_and_removed_together(tmp_path, monkeypatch):
    """Shards: a folder that stands as NAME.new takes the place of the one before; and names that go."""

    def prepare(folder):
        (folder / "state" / "shards").mkdir(parents=True)
        (folder / "state" / "shards" / "old").write_text("old")
        (folder / "state" / "shards.new").mkdir()
        (folder / "state" / "shards.new" / "new").write_text("new")
        for name in ("gone.json", "kept.json"):
            (folder / name).write_text("old")
        (folder / "gone").mkdir()

    def save(folder):
        files = {"state/shards": None, "a.json": "{}", "b/c.bin": lambda path: path.write_bytes(b"c")}
        save_files(folder, files, ["gone.json", "gone", "never/there"])

    def tree(folder):
        return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}

    new = {"state/shards/new": "new", "a.json": "{}", "b/c.bin": "c", "kept.json": "old"}
    old = {"state/shards/old": "old", "gone.json": "old", "kept.json": "old"}
    outcomes = []
    for at in itertools.count():
        folder = tmp_path / str(at)
        prepare(folder)
        killed = cut_off(monkeypatch, lambda: save(folder), at)  # noqa: B023
        finish_save(folder)
        found = {name: text for name, text in tree(folder).items() if ".new" not in name}
        assert found in (old, new)
        assert (found == new) != (folder / "gone").exists()
        outcomes.append(found == new)
        if not killed:
            break
    assert outcomes == sorted(outcomes) and outcomes.count(False) > 5 and outcomes.count(True) > 8


@pytest.mark.parametrize("name", ["../precious", "a/../../precious", "{tmp}/precious", "."])
@pytest.mark.parametrize("key", ["ready", "remove"])
def test_a_journal_of_files_outside_of_the_folder_is_refused(key, name, tmp_path, vocab):
    """A folder that somebody sends must not be able to take away what is not in it."""
    folder = tmp_path / "out"
    save_checkpoint(folder, make(), vocab, state=({"a/b": torch.ones(1)}, {}))
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "precious.new").write_text("theirs")
    name = name.format(tmp=tmp_path)
    (folder / "state" / "commit.json").write_text(json.dumps({"ready": [], "remove": []} | {key: [name]}))
    with pytest.raises(UserError, match="outside of its folder"):
        load_model(folder)
    assert (tmp_path / "precious").read_text() == "mine" and (folder / "config.json").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"ready": ["a"]}', '{"ready": 1, "remove": []}'])
def test_a_journal_that_cannot_be_read_is_a_sentence(text, saved):
    (saved / "state").mkdir()
    (saved / "state" / "commit.json").write_text(text)
    with pytest.raises(UserError, match=r"commit.json \w+"):
        load_model(saved)
    (saved / "state" / "commit.json").write_text('{"ready": ["a\\u0000b"], "remove": []}')
    with pytest.raises(UserError, match="could not be finished"):
        load_model(saved)


@pytest.mark.parametrize("when", ["before", "half"])
def test_a_full_disk_is_a_sentence_and_keeps_the_old_one(when, tmp_path, monkeypatch):
    """Before the journal stands what was there is whole; after it, the next reader finishes the save."""
    refused = []
    for at in itertools.count():
        folder = tmp_path / str(at) / "out"
        folder.parent.mkdir()
        save_run(folder, 1)
        with monkeypatch.context() as patch:
            disk = Disk(patch, OSError(errno.ENOSPC, "No space left on device"), at, when)
            try:
                save_run(folder, 2)
            except UserError as error:
                refused.append(str(error))
                assert "No space left" in refused[-1] and str(folder) in refused[-1]
            else:  # it did without: the folder was there already
                refused.append(None)
        assert read_run(folder) == (1 if refused[-1] and "is whole" in refused[-1] else 2)
        assert list(folder.rglob("*.new")) == []
        if disk.n < at:
            break
    assert len([words for words in refused if words and "is whole" in words]) > 12


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
    save_checkpoint(tmp_path / "out", make(), vocab, state=({"a/b": torch.ones(9)}, RUN))
    path = tmp_path / "out" / "state" / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="optimizer.safetensors is damaged or cut off"):
        load_state(tmp_path / "out")
    path.unlink()
    with pytest.raises(UserError, match="optimizer.safetensors"):
        load_state(tmp_path / "out")


def test_a_state_json_cut_off_is_a_sentence(tmp_path, vocab):
    save_checkpoint(tmp_path / "out", make(), vocab, state=({"a/b": torch.ones(9)}, RUN))
    path = tmp_path / "out" / "state" / "state.json"
    path.write_text(path.read_text()[:-3])
    with pytest.raises(UserError, match="state.json is damaged"):
        load_state(tmp_path / "out")


def damage(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda t: t.pop(UP), "lacks 1 tensors, layers.1.mlp.up_proj.weight"),
        (lambda t: t.update({UP: torch.zeros(3, 3)}), r"layers.1.mlp.up_proj.weight is .*\(3, 3\).*\(24, 16\)"),
        (lambda t: t.update({"model.surprise": torch.zeros(1)}), "surprise'.*no place"),
        (lambda t: t.update({UP.replace("1", "2"): torch.zeros(24, 16)}), "layers.2.*no place"),
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
    """Mistral's folders hold the weights once more under other names; an adapter may lie there."""
    save_file({"tok_embeddings.weight": torch.zeros(2, 2)}, saved / "consolidated.safetensors")
    assert same(load_model(saved), make())


def shards(folder, files: dict, index: dict | None):
    """Put shards and an index in the place of the one file of weights."""
    (folder / "model.safetensors").unlink()
    for name, tensors in files.items():
        save_file(tensors, folder / name)
    if index is not None:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_the_index_says_which_files_are_the_weights(saved):
    """Shards of an earlier save, or a copy under a name that sorts last, take no part."""
    weights = load_file(saved / "model.safetensors")
    old = {name: torch.zeros_like(w) for name, w in weights.items()}
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:5], "model-00002-of-00002.safetensors": names[5:]}
    files = {file: {n: (weights if n in own else old)[n].clone() for n in names} for file, own in parts.items()}
    index = {name: file for file, own in parts.items() for name in own}
    shards(saved, files | {"model-00003-of-00003.safetensors": old, "model_ema.safetensors": old}, index)
    assert same(load_model(saved), make())
    index[names[0]] = "../elsewhere.safetensors"
    (saved / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(UserError, match="outside of its folder"):
        load_model(saved)


def test_shards_without_an_index_open_unless_two_hold_the_same(saved):
    weights = load_file(saved / "model.safetensors")
    names = sorted(weights)
    files = {f"model-0000{i + 1}-of-00002.safetensors": {n: weights[n] for n in own}
             for i, own in enumerate((names[:5], names[5:]))}
    shards(saved, files | {"model_ema.safetensors": {n: w * 0 for n, w in weights.items()}}, None)
    assert same(load_model(saved), make())
    save_file({names[0]: weights[names[0]]}, saved / "model-00001-of-00003.safetensors")
    with pytest.raises(UserError, match="once more"):
        load_model(saved)


def test_one_file_wins_over_shards_and_other_weights_beside_it(saved):
    zeros = {name: w * 0 for name, w in load_file(saved / "model.safetensors").items()}
    for name in ("model_ema", "model-00001-of-00001", "model.fp16"):
        save_file(zeros, saved / f"{name}.safetensors")
    assert same(load_model(saved), make())


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_weights_that_are_no_floats_are_a_sentence(dtype, saved):
    damage(saved, lambda t: t.update({UP: torch.zeros(24, 16, dtype=dtype)}))
    with pytest.raises(UserError, match="not floats"):
        load_model(saved)


@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("eos", [[5, 9], 9, [9]], ids=str)
def test_all_ids_that_end_a_text_are_kept(where, eos, saved, tmp_path):
    """generation_config.json wins, as in transformers; both say it after the next save."""
    (saved / "generation_config.json").unlink()
    path = saved / where
    facts = json.loads(path.read_text()) if path.exists() else {"top_k": 3}
    path.write_text(json.dumps(facts | {"eos_token_id": eos}))
    net = load_model(saved)
    assert net.config.eos_ids == set(eos if isinstance(eos, list) else [eos])
    save_checkpoint(tmp_path / "next", net, saved / "tokenizer.json")
    assert json.loads((tmp_path / "next" / "config.json").read_text())["eos_token_id"] == eos
    assert load_config(tmp_path / "next").eos_ids == net.config.eos_ids
    if where == "generation_config.json":
        assert (tmp_path / "next" / where).read_bytes() == path.read_bytes()


def test_a_folder_of_others_keeps_what_it_says_of_tokens_and_template(saved, tmp_path):
    theirs = {"tokenizer_config.json": {"eos_token": "</s>", "chat_template": "{{ messages }}"},
              "special_tokens_map.json": {"bos_token": "<s>"}, "generation_config.json": {"top_k": 5}}
    for name, content in theirs.items():
        (saved / name).write_text(json.dumps(content))
    (saved / "chat_template.jinja").write_text("{{ bos_token }}")
    save_checkpoint(tmp_path / "tuned", load_model(saved), saved / "tokenizer.json")
    for name in [*theirs, "chat_template.jinja"]:
        assert (tmp_path / "tuned" / name).read_bytes() == (saved / name).read_bytes()


@pytest.mark.parametrize("special", [[], ["<|endoftext|>"], ["<|pad|>", "<|im_start|>"]], ids=len)
def test_a_folder_names_only_tokens_that_its_tokenizer_has(special, tmp_path):
    tokens = [{"content": token, "id": i} for i, token in enumerate(special)]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"added_tokens": tokens, "model": {}}))
    save_checkpoint(tmp_path / "out", make(), path)
    about = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert {v for k, v in about.items() if k.endswith("_token")} == set(special) - {"<|im_start|>"}
    assert ("chat_template" in about) == ("<|im_start|>" in special)


@pytest.mark.parametrize("key, value", [
    ("quantization_config", {"bits": 4}), ("partial_rotary_factor", 0.5), ("mlp_bias", True),
    ("final_logit_softcapping", 30.0), ("hidden_act", "swish2"), ("rope_scaling", {"rope_type": "yarn"}),
])
def test_what_config_json_says_and_we_cannot_do_is_refused_by_name(key, value, saved):
    path = saved / "config.json"
    facts = json.loads(path.read_text()) | {"rope_parameters": None, "rope_theta": 1e4}
    path.write_text(json.dumps(facts))
    assert same(load_model(saved), make())
    path.write_text(json.dumps(facts | {key: value}))
    with pytest.raises(UserError, match={"rope_scaling": "yarn", "hidden_act": "act is"}.get(key, key)):
        load_model(saved)


KEYS = ["architectures", "vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size", "head_dim",
        "rope_parameters", "tie_word_embeddings", "rms_norm_eps", "eos_token_id", "layer_types"]


@pytest.mark.parametrize("key", KEYS)
def test_a_config_of_unexpected_shape_is_a_sentence(key, saved):
    path = saved / "config.json"
    facts = json.loads(path.read_text())
    for value in ("x", -1, 0.5, [], [[]], {}, {"a": 1}, 10**9, 10**30, True, ["x"], [None]):
        path.write_text(json.dumps(facts | {key: value}))
        with contextlib.suppress(UserError):
            load_model(saved)


def test_json_that_is_deep_or_has_a_byte_order_mark(saved):
    path = saved / "config.json"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert same(load_model(saved), make())
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="RecursionError"):
        load_model(saved)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(saved, tmp_path):
    data = write_data(tmp_path / "d", range(20))
    for path in (data / "train.bin", data / "meta.json", saved / "model.safetensors", saved / "config.json"):
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(UserError, match="is missing|holds no checkpoint"):
            Tokens(data, "train") if path.parent == data else load_model(saved)
    os.mkfifo(tmp_path / "metrics.jsonl")
    assert octavo.read_metrics(tmp_path / "metrics.jsonl") == []


def test_a_model_larger_than_the_memory_is_a_sentence(saved):
    path = saved / "config.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"hidden_size": 10**6, "intermediate_size": 10**7}))
    with pytest.raises(UserError, match="GiB"):
        load_model(saved)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e12])
def test_weights_that_are_no_numbers_are_not_saved(value, saved):
    net = make(1)
    net.layers["0"].mlp.up_proj.weight.data[0, 0] = value
    with pytest.raises(UserError, match="not finite, or too large"):
        save_checkpoint(saved, net, saved / "tokenizer.json")
    assert same(load_model(saved), make())


@pytest.mark.parametrize("key", RUN)
def test_a_state_that_says_nothing_of_its_run_is_a_sentence(key, saved):
    for value in (None, [], {"a": 1} if key != "options" else 1, "x" if key != "command" else 7):
        save_checkpoint(saved, make(), saved / "tokenizer.json", state=({}, RUN | {key: value}))
        with pytest.raises(UserError, match=key):
            load_state(saved)


@pytest.mark.parametrize("key, value", [("taken", 5), ("taken", [-1]), ("best", "low"), ("waited", [1]),
                                        ("noise", None), ("noise", [1.0]), ("kl_coef", {})])  # fmt: skip
def test_what_only_some_runs_say_is_looked_at_too(key, value, saved):
    save_checkpoint(saved, make(), saved / "tokenizer.json", state=({}, RUN | {key: value}))
    with pytest.raises(UserError, match=f"does not say {key}"):
        load_state(saved)


def test_shards_without_a_config_are_not_to_be_joined(tmp_path):
    (tmp_path / "state" / "shards").mkdir(parents=True)
    (tmp_path / "state" / "shards" / "x.safetensors").touch()
    with pytest.raises(UserError, match="no checkpoint .config.json"):
        octavo.find_checkpoint(tmp_path, shards=True)


def test_another_rank_finishes_a_save_that_nobody_else_does(tmp_path, vocab, monkeypatch):
    """On a disk of its own machine no first rank comes by: it waits for a while, and not for ever."""
    (tmp_path / "state").mkdir()
    (tmp_path / "a.txt.new").write_text("whole")
    (tmp_path / "state" / "commit.json").write_text('{"ready": ["a.txt"], "remove": []}')
    clock = itertools.count(step=4.0)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(octavo.time, "monotonic", lambda: next(clock))
    finish_save(tmp_path)
    assert (tmp_path / "a.txt").read_text() == "whole" and not (tmp_path / "state").exists()


# ---- data --------------------------------------------------------------------------------------------------


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
    begins = {tuple(sorted(set((whole[0][i : i + 11, 0] % T).tolist()))) for i in (0, 11, 22)}
    assert len(begins) > 1  # each epoch cuts its windows from a place of its own


def test_a_mixtures_loss_is_the_mean_by_weight():
    sources = [SimpleNamespace(folder=Path(name), loss=loss) for name, loss in (("a", 2.0), ("b", 4.0))]
    one = lambda t: {"val_loss": t.loss, "val_tokens": 5}  # noqa: E731
    found = octavo.evaluate_mixture(one, sources, [3.0, 1.0])
    assert found == {"val_loss": 2.5, "val_tokens": 10, "val_loss_a": 2.0, "val_loss_b": 4.0}


@pytest.mark.parametrize("n, T, B", [(61, 10, 2), (60, 10, 4), (60, 7, 3), (5, 10, 1)])
def test_in_order_covers_every_target_once(n, T, B, tmp_path):
    tokens = numbered(tmp_path, n)
    for world in (1, 2, 3):
        targets, shapes = [], []
        for rank in range(world):
            batches = list(tokens.in_order(T, B, rank=rank, world=world))
            shapes.append([tuple(x.shape) for x, _ in batches])
            for x, y in batches:
                assert x.shape == y.shape and x.shape[0] <= B and x.shape[1] == T
                real = y != IGNORE
                assert torch.equal(x[real] + 1, y[real])
                targets += y[real].tolist()
        assert sorted(targets) == list(range(1, n))
        assert all(s == shapes[0] for s in shapes) and len(set(shapes[0])) == 1  # no rank waits for another


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
    with pytest.raises(UserError, match="train.bin is missing"):
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


# ---- evaluation --------------------------------------------------------------------------------------------


@pytest.fixture
def spelled_out(tmp_path, monkeypatch):
    """23 tokens; an id stands for as many bytes as its number has bits, special 0 and 1 for none."""
    spelled = [b"<|endoftext|>", b"<|pad|>"] + [b"x" * i.bit_length() for i in range(2, 64)]
    tokenizer = SimpleNamespace(special={"<|endoftext|>": 0, "<|pad|>": 1}, token_bytes=spelled)
    monkeypatch.setattr(octavo, "load_tokenizer", lambda folder: tokenizer)
    ids = [5, 9, 33, 0, 2, 3, 40, 41, 0, 7, 7, 7, 8, 63, 12, 0, 21, 1, 4, 4, 50, 6, 0]
    return Tokens(write_data(tmp_path / "data", ids, split="val"), "val")


@pytest.mark.parametrize("B", [1, 2, 16])
def test_evaluate_is_the_direct_sum(B, spelled_out):
    net = make().train()
    got = octavo.evaluate(net, spelled_out, T=5, B=B)
    assert net.training
    ids = torch.from_numpy(spelled_out.read(0, 23).astype(np.int64))
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


def test_bits_per_byte_by_hand(spelled_out):
    """One bit for each token: 22 bits; the bytes are counted on the fingers."""
    # the first token is no target
    by_hand = 4 + 6 + 0 + 2 + 2 + 6 + 6 + 0 + 3 + 3 + 3 + 4 + 6 + 4 + 0 + 5 + 0 + 3 + 3 + 6 + 3 + 0

    def forward(x, y, documents):
        return (y != IGNORE).float() * math.log(2)

    got = octavo.evaluate(make(), spelled_out, T=5, forward=forward)
    assert got["val_loss"] == pytest.approx(math.log(2))
    assert got["val_bpb"] == pytest.approx(22 / by_hand)


def test_bytes_of_ids_come_from_the_tokenizer_of_the_folder(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers writes the file that this test reads")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate([*alphabet, "Ã©"])}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [("Ã", "©")]))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.add_special_tokens(["<|endoftext|>"])
    ids = bpe.encode("éè!<|endoftext|>").ids  # two bytes in one token, two in two, one, none
    folder = write_data(tmp_path / "d", ids, vocab_size=258, eot_id=257)
    bpe.save(str(folder / "tokenizer.json"))
    tokens = Tokens(folder, "train")
    assert tokens.token_bytes[torch.tensor(ids)].tolist() == [2, 1, 1, 1, 0]
    assert tokens.token_bytes.sum() == 258


def test_data_that_changed_is_noticed(tmp_path):
    """Another text of the same size and meta.json is another text."""
    folder = write_data(tmp_path / "d", range(20))
    (folder / "tokenizer.json").write_text("{}")
    before = octavo.fingerprint([Tokens(folder, "train")])
    assert octavo.fingerprint([Tokens(folder, "train")]) == before
    path = folder / "train.bin"
    changed = bytearray(path.read_bytes())
    changed[20] ^= 1
    path.write_bytes(changed)
    assert octavo.fingerprint([Tokens(folder, "train")]) != before


@pytest.mark.parametrize("key, value", [("dtype", "float16"), ("dtype", "uint8"), ("vocab_size", None),
                                        ("eot_id", None), ("eot_id", "x"), ("eot_id", -1), ("eot_id", 64),
                                        ("splits", []), ("splits", {"train": {"tokens": "x", "bytes": 1}})])
def test_a_meta_of_unexpected_shape_is_a_sentence(key, value, tmp_path):
    folder = write_data(tmp_path / "d", range(20))
    path = folder / "meta.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match="meta.json"):
        Tokens(folder, "train")


def test_a_source_is_a_folder_with_a_weight(tmp_path):
    for spec in ("", ":1", "x:0", "x:", f"x:{'9' * 400}"):
        with pytest.raises(UserError):
            octavo.open_data([spec])
