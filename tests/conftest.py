"""What several test files use: the scripts as modules, as commands, and a small data folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "2")  # sums in another order are other sums: resume is compared bit for bit


def command(script, *args, ranks=1, env=None, kill_after=None, once=None, sign=signal.SIGKILL, timeout=240, cwd=None):
    """Run a script as a user would -> (exit code, stdout, stderr); kill_after: seconds until it gets a signal, counted from
    when the file `once` is there."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    args = [sys.executable, *launch[1:], str(ROOT / script), *map(str, args)]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd or ROOT,
                               env={**os.environ, "PYTHONUTF8": "1", "COLUMNS": "120", **(env or {})})  # fmt: skip
    while once and not once.exists() and process.poll() is None:
        time.sleep(0.01)
    try:
        out, err = process.communicate(timeout=kill_after or timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(sign if kill_after else signal.SIGKILL)
        out, err = process.communicate()
        assert kill_after, f"{args} did not end within {timeout} s:\n{err[-2000:]}"
    return process.returncode, out, err


def refusal(app, *args) -> str:
    """What a command says of a user's mistake, without a process of its own: the text of its UserError."""
    import typer

    from model import UserError

    with pytest.raises(UserError) as error:
        typer.main.get_command(app).main([str(a) for a in args], standalone_mode=False)
    return str(error.value)


def wait_for(path: Path, seconds=60):
    end = time.time() + seconds
    while not path.exists():
        assert time.time() < end, f"{path} did not appear"
        time.sleep(0.01)


@pytest.fixture(scope="session")
def text():
    """Real text that every Python has: 120 kB of the standard library."""
    import argparse
    import textwrap

    return (Path(argparse.__file__).read_text() + Path(textwrap.__file__).read_text())[:120_000]


def prepare(folder, text, *args):
    source = folder.with_suffix(".txt")
    source.write_text(text)
    code, _, err = command("tokenize.py", "prepare", source, "--output", folder, "--no-baselines", *args)
    assert code == 0, err
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory, text):
    """A data folder of characters, split at its tail."""
    return prepare(tmp_path_factory.mktemp("data") / "chars", text, "--algorithm", "char", "--val-fraction", "0.1")


@pytest.fixture(scope="session")
def modules(tmp_path_factory):
    """A data folder of whole Python files, in BPE."""
    home = tmp_path_factory.mktemp("modules")
    (home / "lib").mkdir()
    for name in ("bisect", "textwrap", "heapq", "shlex", "string", "colorsys", "fnmatch", "glob", "sched", "queue"):
        shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py", home / "lib")
    code, _, err = command("tokenize.py", "prepare", home / "lib", "--output", home / "data", "--no-baselines",
                           "--vocab-size", "400", "--val-fraction", "0.3")  # fmt: skip
    assert code == 0, err
    return home / "data"


@pytest.fixture(scope="session")
def base(tmp_path_factory, modules):
    """A small model with random weights and the tokenizer of `modules`."""
    from model import Config, Transformer, load_tokenizer, save_checkpoint

    tokenizer = load_tokenizer(modules)
    config = Config(vocab_size=448, seq_len=128, n_layer=2, n_head=2, n_kv_head=2, n_embd=32, head_dim=16, ffn_dim=64,
                    eos_id=tokenizer.eot_id, pad_id=tokenizer.pad_id)  # fmt: skip
    folder = tmp_path_factory.mktemp("align") / "base"
    save_checkpoint(folder, Transformer(config).init_weights(1), modules / "tokenizer.json")
    return folder


@pytest.fixture(scope="session")
def lines(tmp_path_factory):
    """Conversations, pairs and prompts, as JSON lines."""
    home = tmp_path_factory.mktemp("lines")
    names = [f"f{i}" for i in range(12)]
    sft = [{"instruction": f"def {n}(a, b):", "input": "", "output": f"    return a + b * {i}"} for i, n in enumerate(names)]
    pairs = [{"prompt": f"def {n}(a):", "chosen": f"    return a + {i}", "rejected": "    pass"} for i, n in enumerate(names)]
    rank = [{"prompt": "def g(a):", "answers": ["    return a", "    pass", ""]}] * 2
    check = {"task": "body", "before": "def f(a):\n", "after": "", "shown": "def f(a):", "name": "f", "params": ["a"]}
    prompts = [{"prompt": f"def {n}(a):", "task": "body", "check": check} for n in names[:4]]
    for name, records in {"sft": sft, "pairs": pairs, "ranking": pairs + rank, "prompts": prompts}.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return home
