"""Every command that the README shows is run, in order, at a tiny size, in a copy of the scripts."""

import json
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

TINY = {"--max-steps": "3", "--tokens-per-step": "256", "--seq-len": "128", "--n-layer": "1", "--n-embd": "32",
        "--n-head": "1", "--eval-interval": "2", "--eval-tokens": "256", "--save-interval": "2", "--warmup-steps": "1"}  # fmt: skip


def commands():
    """Lines of the ```sh blocks, `a && b` taken apart, comments off."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [part.strip() for line in lines if line and not line.startswith("#") for part in line.split("&&")]


def tiny(words):
    """The command as the README has it, at a size that takes seconds."""
    script = next((w for w in words if w.endswith(".py")), "")
    options = dict(TINY) if script == "train.py" and "--resume" not in words else {}
    if "--init" in words:  # its sizes are the folder's
        options = {k: v for k, v in TINY.items() if k not in ("--n-layer", "--n-embd", "--n-head", "--seq-len")}
    if script == "moe.py":
        options = {"study": {"--tokens": "500", "--off-tokens": "128"}, "speed": {"--tokens": "64", "--rounds": "1"},
                   "race": {"--preset": "nano", "--max-steps": "2", "--seeds": "1", "--sweep": "", "--tokens-per-step": "256"},
                   }.get(words[2], {})  # fmt: skip
    if script == "parallel.py" and "plan" not in words:
        options = {**TINY, "--n-head": "2"}
    if script == "align.py":
        tiny = {"data": {"--limit": "20", "--val-limit": "3", "--max-tokens": "128"}, "evaluate": {"--limit": "3"},
                "pairs": {"--limit": "3", "--out": "data/tiny.jsonl"}, "label": {"--limit": "2"}}  # fmt: skip
        options = tiny.get(words[2], {"--max-steps": "2", "--batch-size": "2"})
    if script == "sample.py":
        options = {"--max-new-tokens": "8"}
    if script == "tokenize.py" and words[words.index(script) + 1 :] == ["prepare"]:
        words = [*words, "argparse=lib", "--output", "data/python", "--overwrite", "--vocab-size", "300", "--val-fraction", "0.2"]
    if script == "bench.py" and "train" in words:
        options = {"--preset": "nano", "--batch": "2", "--steps": "2", "--seq-len": "32"}
    if script == "bench.py" and "claims" in words:
        words = [*words, "--quick"]
    if script == "bench.py" and "decode" in words:
        options = {"--new": "4"}
    for name, value in options.items():
        if name in words:
            words[words.index(name) + 1] = value
        else:
            words += [name, value]
    if "--nproc-per-node" in words:
        words[words.index("--nproc-per-node") + 1] = "2"
    return words


@pytest.fixture(scope="module")
def home(tmp_path_factory, text, modules):
    """A folder as a clone is, with small data under the names that the README uses."""
    home = tmp_path_factory.mktemp("clone")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, home)
    (home / "lib").mkdir()
    for i in range(8):
        (home / "lib" / f"part{i}.py").write_text(text[i * 9000 : (i + 1) * 9000])
    (home / "input.txt").write_text(text)
    (home / "data").mkdir()
    shutil.copytree(modules, home / "data" / "python")
    pair = {"prompt": "Name this function.", "chosen": "add", "rejected": "x"}
    (home / "data" / "pairs.jsonl").write_text((json.dumps(pair) + "\n") * 3)
    return home


def test_the_readme_has_commands():
    assert len(commands()) > 10


@pytest.mark.parametrize("line", commands())
def test_command(home, line):
    words = shlex.split(line)
    if words[:2] == ["pip", "install"]:
        assert all((ROOT / name).exists() for name in words if name.endswith(".txt"))
        return
    if words[:3] == ["python", "-m", "pytest"]:
        return  # that is what is running
    words = tiny(words)
    if words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
    assert words[0] in ("python", sys.executable), f"{line}: only Python commands are shown"
    out = words[words.index("--out") + 1] if "--out" in words else "out/python"
    if {"train.py", "parallel.py"} & set(words) and not {"--resume", "--count-communication", "plan"} & set(words):
        shutil.rmtree(home / out, ignore_errors=True)
    words[0] = sys.executable
    done = subprocess.run(words, cwd=home, capture_output=True, text=True, timeout=300, input="")
    finished = "is finished" in done.stderr and "--resume" in words  # the run before it was not interrupted
    finished |= "No prompt had a good answer" in done.stderr  # from a model that was trained for seconds
    assert done.returncode == 0 or finished, done.stderr[-2000:]
