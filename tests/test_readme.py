"""Run what the README and the files' heads show, in order, at a tiny size, in a copy of the scripts; and the
examples in docstrings."""

import ast
import doctest
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SCRIPTS, script, wait_for

STEPS = {"--max-steps": "3", "--tokens-per-step": "512", "--warmup-steps": "1", "--eval-interval": "2",
         "--save-interval": "2"}
SHAPE = {"--n-layer": "1", "--n-embd": "32", "--seq-len": "128"}
STAGE = {"--max-steps": "2", "--batch-size": "2", "--eval-interval": "1"}
PLAY = {**STAGE, "--samples": "2", "--max-new-tokens": "16"}
TINY = {  # script and command -> options that make it small; those that are shown are replaced
    "train.py": STEPS | SHAPE | {"--eval-tokens": "256"},
    "parallel.py": STEPS | SHAPE | {"--n-layer": "2"},
    "sample.py": {"--max-new-tokens": "8"},
    "sample.py serve": {"--port": "0"},
    "moe.py study": {"--tokens": "500", "--off-tokens": "128"},
    "moe.py speed": {"--tokens": "64", "--rounds": "1"},
    "align.py data": {"--limit": "20", "--max-tokens": "128"},
    # an answer that a small model learns by heart in seconds: else none is good, and `pairs` has none to rank
    "align.py sft": {"--data": "data/easy.jsonl", "--val": "data/easy.jsonl", "--max-steps": "60",
                     "--lr": "1e-2", "--batch-size": "4", "--eval-interval": "60"},
    "align.py pairs": {"--prompts": "data/easy.jsonl", "--limit": "8", "--temperature": "1.2",
                       "--samples": "8"},
    "align.py dpo": STAGE,
    "align.py reward": STAGE,
    "align.py grpo": PLAY,
    "align.py ppo": PLAY,
    "align.py evaluate": {"--limit": "3"},
    "align.py label": {"--limit": "2"},
    "bench.py train": {"--preset": "nano", "--batch": "2", "--steps": "2", "--seq-len": "32"},
    "bench.py decode": {"--new": "4", "--prompt": "8", "--rounds": "1"},
    "bench.py context": {"--texts": "2", "--needles": "1"},
    "tokenize.py train": {"--vocab-size": "300"},
}


def split(text: str) -> list[str]:
    """List the commands of a block: `a && b` is two, comments go."""
    lines = [line.split("  #")[0].strip() for line in text.replace("\\\n", " ").splitlines()]
    return [part.strip() for line in lines if line and not line.startswith("#") for part in line.split("&&")]


def shown() -> list[tuple[str, str]]:
    """List (where it stands, command) of the README's blocks and table, then of the files' heads."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found = [("README", c) for block in re.findall(r"```sh\n(.*?)```", readme, re.S) for c in split(block)]
    found += [("hardware", c) for c in re.findall(r"(?m)^\| [^|]* \| `((?:python|torchrun) [^`]*)`", readme)]
    for name in ("train", "tokenize", "model", "sample", "parallel", "moe", "align", "bench"):
        head = ast.get_docstring(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8")))
        lines = re.findall(r"(?m)^ {4}((?:python|torchrun) .*)$", head)
        found += [(f"{name}.py", c) for c in split("\n".join(lines))]
    return found


def cases():
    """Make a case of each command that runs a script; all but the first two are slow."""
    runs = [(where, line) for where, line in shown() if ".py" in line or "python -c" in line]
    for i, (where, line) in enumerate(runs):
        yield pytest.param(line, id=f"{where}: {line}", marks=[pytest.mark.slow] * (i >= 2))


def value_of(words: list[str], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


def replace(words: list[str], options: dict) -> list[str]:
    """Give options other values, or add them where they are not shown."""
    words = list(words)
    for name, value in options.items():
        if name in words:
            words[words.index(name) + 1] = value
        else:
            words += [name, value]
    return words


def tiny(words: list[str], home) -> list[str]:
    """Turn a command as it is shown into one that takes seconds."""
    words = [w for w in words if w != "…"]
    name = next((w for w in words if w.endswith(".py")), "")
    if not name:
        return words
    following = words[words.index(name) + 1 : words.index(name) + 2]
    known = f"{name} {following[0]}" if following and not following[0].startswith("-") else name
    writes = name == "sample.py" and "--fill" not in words
    options = dict(TINY.get(known, TINY["sample.py"] if writes else {}))
    if known == "tokenize.py prepare":
        options = {"--val-fraction": "0.3"}
        options |= {"--vocab-size": "400"} if "char" not in words else {}
        if len(words) == 3:  # not the whole Python that is installed here
            words += ["lib", "--output", "data/python"]
        words += ["--overwrite"] * (home / value_of(words, "--output")).exists()
    if known in ("train.py", "parallel.py"):
        if "--resume" in words:  # the run before was not interrupted: let it go on for a step
            state = json.loads((home / value_of(words, "--resume") / "state" / "state.json").read_text())
            options = {"--max-steps": str(state["at"] + 1)}
        elif "--init" not in words:
            heads = 4 if known == "parallel.py" else 1
            words += ["--set", f"n_head={heads}", "--set", f"n_kv_head={heads}"]
    words += ["--no-compile"] * (known == "sample.py serve")
    if name == "bench.py" and "claims" in words:
        words += ["--quick"]
    words = replace(words, options)
    if "--nproc-per-node" in words:
        for flag in ("--nproc-per-node", "--tp"):
            if flag in words:
                words = replace(words, {flag: str(min(4, int(value_of(words, flag))))})
        for flag in ("--nnodes", "--rdzv-backend", "--rdzv-endpoint"):  # one machine stands for several
            if flag in words:
                del words[words.index(flag) : words.index(flag) + 2]
    return words


@pytest.fixture(scope="module")
def home(tmp_path_factory, text, modules):
    """A folder as a clone is, with small data under the names that are shown."""
    home = tmp_path_factory.mktemp("clone")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, home)
    shutil.copytree(modules.parent / "lib", home / "lib")
    for name in ("input.txt", "shakespeare.txt"):
        (home / name).write_text(text)
    (home / "prompts.txt").write_text("def f(\nimport\n")
    (home / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "parallel_sentences.json", home / "tests")
    (home / "data").mkdir()
    shutil.copytree(modules, home / "data" / "python")
    shown = "def f(a):"
    check = {"before": f"{shown}\n", "after": "", "shown": shown, "name": "f", "params": ["a"]}
    easy = {"prompt": shown, "instruction": shown, "input": "", "output": "    return a + 1", "task": "body"}
    easy["check"] = check | {"task": "body", "answer": "    return a + 1", "known": []}
    (home / "data" / "easy.jsonl").write_text((json.dumps(easy) + "\n") * 8)
    return home


def make_room(words: list[str], home) -> None:
    """Take away what an earlier command wrote where this one will write, and make what it needs to find."""
    folder = home / (value_of(words, "--out") or "out/python")
    trains = {"train.py", "parallel.py"} & set(words) and not {"plan", "export", "--resume"} & set(words)
    if trains:
        shutil.rmtree(folder, ignore_errors=True)
    if "align.py" in words and len(words) > 2 and (home / "out" / words[2]).exists():
        shutil.rmtree(home / "out" / words[2])
    if "upcycle" in words:
        shutil.rmtree(home / words[-1], ignore_errors=True)
    if "export" in words:
        stop_a_sharded_run(home)
    if "--fill" in words:
        train(home, "--objective", "mlm", "--out", "out/masked")
    if "sample.py" in words and not (home / "out" / "python" / "model.safetensors").exists():
        train(home)
    for name in ("sft", "large"):
        if f"out/{name}" in words and "sample.py" in words and not (home / "out" / name).exists():
            shutil.copytree(home / "out" / "python", home / "out" / name)


def train(home, *more) -> None:
    """Train a small model that an example needs and that no command before it made."""
    line = tiny(["python", "train.py", *more], home)
    subprocess.run([sys.executable, *line[1:]], cwd=home, check=True, capture_output=True)


def stop_a_sharded_run(home) -> None:
    """Leave shards in out/python, as a run does that was stopped."""
    shutil.rmtree(home / "out" / "python", ignore_errors=True)
    line = replace(tiny(["python", "parallel.py", "--zero", "3"], home), {"--max-steps": "100000"})
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.Popen([*launch, *line[1:]], cwd=home, stderr=subprocess.DEVNULL)
    wait_for(home / "out" / "python" / "state" / "shards", 120)
    process.send_signal(signal.SIGINT)
    process.wait(120)


def test_the_readme_and_the_heads_show_commands():
    assert len([c for where, c in shown() if where == "README"]) >= 5
    assert {where for where, _ in shown()} >= {"hardware", *(f"{name}.py" for name in SCRIPTS)}


def test_what_the_readme_installs_is_there():
    installs = [shlex.split(c) for where, c in shown() if where == "README" and c.startswith("pip")]
    assert installs and all((ROOT / w).exists() for words in installs for w in words if w.endswith(".txt"))


@pytest.mark.parametrize("line", cases())
def test_command(home, line):
    words = tiny(shlex.split(line), home)
    make_room(words, home)
    if words[0] == "torchrun":
        words = ["python", "-m", "torch.distributed.run", "--standalone", *words[1:]]
    assert words[0] == "python", f"{line}: only Python commands are shown"
    words[0] = sys.executable
    if "serve" in words:
        process = subprocess.Popen(words, cwd=home, stderr=subprocess.PIPE, text=True)
        assert any("http://" in line for line in process.stderr)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (0, 130)
        return
    done = subprocess.run(words, cwd=home, capture_output=True, text=True, timeout=300, input="")
    assert done.returncode == 0, done.stderr[:2000] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_readmes_python_opens_the_folder(home):
    pytest.importorskip("transformers")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    code = next(b for b in re.findall(r"```python\n(.*?)```", readme, re.S) if "from transformers" in b)
    if not (home / "out" / "python" / "model.safetensors").exists():
        train(home)
    code += """
written = model.generate(**tokenizer("def", return_tensors="pt"), max_new_tokens=4)
assert tokenizer.decode(written[0])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", SCRIPTS)
def test_examples_in_docstrings(name):
    module = script(name)
    found = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.ELLIPSIS)
    assert found.attempted > 0 and found.failed == 0
