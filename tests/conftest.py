"""Share what several test files use: the scripts as modules and as commands, and small folders."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "2")  # more would add in another order: resume is held bit for bit

import model  # before torch: it says how OpenMP's threads wait

import pytest

SCRIPTS = ("tokenize", "model", "train", "parallel", "moe", "align", "sample", "bench")


def script(name):
    """Import one of the eight files; tokenize.py by its path, as model.py does."""
    if name != "tokenize":
        return importlib.import_module(name)
    if "octavo_tokenize" not in sys.modules:
        spec = importlib.util.spec_from_file_location("octavo_tokenize", ROOT / "tokenize.py")
        module = sys.modules["octavo_tokenize"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["octavo_tokenize"]


def command(script, *args, ranks=1, env=None, cwd=None, timeout=240, kill_after=None, once=None,
            sign=signal.SIGKILL):
    """Run a script as a user would -> (exit code, stdout, stderr).

    kill_after: seconds until it gets the signal `sign`, counted from when the file `once` is there.
    """
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    args = [*launch, str(ROOT / script), *map(str, args)]
    env = {**os.environ, "PYTHONUTF8": "1", "COLUMNS": "120", **(env or {})}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(args, cwd=cwd or ROOT, env=env, **pipes)
    while once and not once.exists() and process.poll() is None:
        time.sleep(0.01)
    try:
        out, err = process.communicate(timeout=kill_after or timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(sign if kill_after else signal.SIGKILL)
        out, err = process.communicate()
        assert kill_after, f"{args} did not end within {timeout} s:\n{err[-2000:]}"
    return process.returncode, out, err


def call(app, *args):
    """Run a typer app, or what `model.command` made, without a process of its own -> what it returns."""
    import typer

    if not isinstance(app, typer.Typer):
        function, app = app, typer.Typer()
        app.command()(function)
    return typer.main.get_command(app).main([str(a) for a in args], standalone_mode=False)


def refusal(app, *args) -> str:
    """Run a command that has to refuse what a user typed -> the sentence."""
    with pytest.raises(model.UserError) as error:
        call(app, *args)
    return str(error.value)


def records(folder) -> list[dict]:
    """Read what a run logged."""
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def wait_for(path: Path, seconds=60):
    end = time.time() + seconds
    while not path.exists():
        assert time.time() < end, f"{path} did not appear"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def fast_disk(monkeypatch):
    """Wait for no disk: a test may be killed, but the power stays on."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(scope="session")
def text():
    """Real text that every Python has: 120 kB of the standard library."""
    import argparse
    import textwrap

    return (Path(argparse.__file__).read_text() + Path(textwrap.__file__).read_text())[:120_000]


def prepare(folder, text, *args):
    """Make a data folder of a text."""
    source = folder.with_suffix(".txt")
    source.write_text(text)
    code, _, err = command("tokenize.py", "prepare", source, "--output", folder, *args)
    assert code == 0, err
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory, text):
    """A data folder of characters, split at its tail."""
    folder = tmp_path_factory.mktemp("data") / "chars"
    return prepare(folder, text, "--algorithm", "char", "--val-fraction", "0.1")


@pytest.fixture(scope="session")
def modules(tmp_path_factory):
    """A data folder of whole Python files, in BPE."""
    home = tmp_path_factory.mktemp("modules")
    (home / "lib").mkdir()
    for name in "bisect textwrap heapq shlex string colorsys fnmatch glob sched queue".split():
        shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py", home / "lib")
    sizes = ("--vocab-size", "400", "--val-fraction", "0.3")
    code, _, err = command("tokenize.py", "prepare", home / "lib", "--output", home / "data", *sizes)
    assert code == 0, err
    return home / "data"


@pytest.fixture(scope="session")
def base(tmp_path_factory, modules):
    """A small model with random weights and the tokenizer of `modules`."""
    tokenizer = model.load_tokenizer(modules)
    sizes = {"n_layer": 2, "n_head": 2, "n_kv_head": 2, "n_embd": 32, "head_dim": 16, "ffn_dim": 64}
    ids = {"vocab_size": 448, "eos_id": tokenizer.eot_id, "pad_id": tokenizer.pad_id}
    net = model.Transformer(model.Config(seq_len=128, **sizes, **ids)).init_weights(1)
    folder = tmp_path_factory.mktemp("align") / "base"
    model.save_checkpoint(folder, net, modules / "tokenizer.json")
    return folder


@pytest.fixture(scope="session")
def lines(tmp_path_factory):
    """Conversations, pairs and prompts, as JSON lines."""
    home = tmp_path_factory.mktemp("lines")
    names = [f"f{i}" for i in range(12)]
    sft, pairs = [], []
    for i, n in enumerate(names):
        sft.append({"instruction": f"def {n}(a, b):", "input": "", "output": f"    return a + b * {i}"})
        pairs.append({"prompt": f"def {n}(a):", "chosen": f"    return a + {i}", "rejected": "    pass"})
    rank = [{"prompt": "def g(a):", "answers": ["    return a", "    pass", ""]}] * 2
    check = {"task": "body", "before": "def f(a):\n", "after": "", "shown": "def f(a):", "name": "f"}
    check |= {"answer": "    return a + 1", "params": ["a"], "known": []}
    prompts = [{"prompt": f"def {n}(a):", "task": "body", "check": check} for n in names[:4]]
    files = {"sft": sft, "pairs": pairs, "ranking": pairs + rank, "prompts": prompts}
    for name, rows in files.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home
