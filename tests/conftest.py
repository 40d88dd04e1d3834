"""What several test files use: the scripts as modules, as commands, and a small data folder."""

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


def command(script, *args, ranks=1, env=None, kill_after=None, sign=signal.SIGKILL, timeout=240, cwd=None):
    """Run a script as a user would -> (exit code, stdout, stderr); kill_after: seconds until it gets a signal."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    args = [sys.executable, *launch[1:], str(ROOT / script), *map(str, args)]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd or ROOT,
                               env={**os.environ, "PYTHONUTF8": "1", "COLUMNS": "120", **(env or {})})  # fmt: skip
    try:
        out, err = process.communicate(timeout=kill_after or timeout)
    except subprocess.TimeoutExpired:
        process.send_signal(sign if kill_after else signal.SIGKILL)
        out, err = process.communicate()
        assert kill_after, f"{args} did not end within {timeout} s:\n{err[-2000:]}"
    return process.returncode, out, err


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
