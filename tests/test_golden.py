"""Hold the numbers of small runs, and every command's options, to those in golden.json.

A change that means to alter them renews the file, all of it or some of its parts:

    python tests/test_golden.py
    python tests/test_golden.py dpo grpo options

The runs take twenty steps in float32 on a text that is made here. The first steps have to agree within 2e-4 of
the number on any machine; later ones may drift, as rounding is amplified from step to step, by 2e-2. Answers
are drawn at random: once one token falls the other way GRPO goes another way, so of it only the first steps are
held, within 5e-3, since advantages are differences of rewards.
"""

import json
import math
import random
import runpy
import sys
import tempfile
from pathlib import Path

import pytest
import typer
from conftest import ROOT, call, command, prepare, records

import model

GOLDEN = Path(__file__).with_name("golden.json")
FIRST = 3  # steps that are held tightly
STEPS = 20
COMMON = ["--max-steps", STEPS, "--eval-interval", 100, "--save-interval", 100, "--device", "cpu",
          "--dtype", "fp32", "--seed", 0, "--schedule", "constant", "--warmup-steps", 2, "--optimizer", "adamw"]
SIZES = ["--preset", "nano", "--n-layer", 2, "--n-embd", 32, "--seq-len", 64, "--tokens-per-step", 256,
         "--set", "n_head=2", "--set", "n_kv_head=2", "--compile", "off"]
TOLERANCE = {"train": (2e-4, 2e-2), "parallel": (2e-4, 2e-2), "dpo": (2e-4, 2e-2), "grpo": (5e-3, math.inf)}


class Found(BaseException):
    """Carry a command out of the script that was about to run it."""


def app_of(name) -> typer.Typer:
    """Find the command that a script would run."""

    def stop(app):
        raise Found(app)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.Typer, "__call__", stop)
        patch.setattr(sys, "argv", [f"{name}.py"])
        patch.setattr(sys, "exit", lambda code: None)
        try:
            runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
        except Found as found:
            return found.args[0]


# ---- The options ----------------------------------------------------------------------------------------


def options() -> dict:
    """List every command's options: {"train.py": {"--out": "out/python", ...}, "align.py dpo": ...}."""
    found = {}
    for name in ("tokenize", "train", "parallel", "align", "moe", "sample", "bench"):
        top = typer.main.get_command(app_of(name))
        commands = {f"{name}.py": top} | {f"{name}.py {n}": c for n, c in getattr(top, "commands", {}).items()}
        for title, one in commands.items():
            shown = {p.opts[0]: p.default for p in one.params}
            shown = {n: d.as_posix() if isinstance(d, Path) else d for n, d in shown.items()}
            found[title] = {n: list(d) if isinstance(d, tuple) else d for n, d in shown.items()}
    return {title: known for title, known in found.items() if known}


# ---- The runs -------------------------------------------------------------------------------------------


def make_data(home):
    """Make up a text of simple functions, and pairs and prompts about them."""
    rng = random.Random(0)
    names = [f"{rng.choice('abcd')}{rng.choice('xyz')}{i}" for i in range(300)]
    text = "".join(f"def {n}(p, q):\n    return p {rng.choice('+-*')} q * {rng.randrange(9)}\n\n" for n in names)
    prepare(home / "data", text, "--vocab-size", "320", "--val-fraction", "0.1")
    pairs, prompts = [], []
    for n in names[:12]:
        prompts.append({"prompt": f"def {n}(p, q):"})
        pairs.append(prompts[-1] | {"chosen": f"    return p + {len(n)}", "rejected": "    pass"})
    for name, rows in (("pairs", pairs), ("prompts", prompts)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def train(home):
    out = home / "train"
    if not out.exists():
        call(app_of("train"), "--data", home / "data", "--out", out, *SIZES, *COMMON, "--lr", 3e-3)
    return out


def parallel(home):
    args = ["--data", home / "data", "--out", home / "parallel", *SIZES, *COMMON, "--lr", 3e-3, "--zero", 3]
    code, _, err = command("parallel.py", *args, ranks=2, env={"OMP_NUM_THREADS": "1"})
    assert code == 0, err
    return home / "parallel"


def align(name, home, data, *more):
    files = ["--data", home / data, "--val", home / data, "--out", home / name]
    call(app_of("align"), name, "--model", train(home), *files, *COMMON, "--batch-size", 4, *more)
    return home / name


def dpo(home):
    return align("dpo", home, "pairs.jsonl", "--lr", 1e-3)


def grpo(home):
    judge = ["--max-steps", 10, "--lr", 1e-2]  # any judge will do that tells answers apart
    scores = align("reward", home, "pairs.jsonl", *judge)
    more = ["--reward", scores, "--samples", 4, "--max-new-tokens", 8, "--lr", 1e-3]
    return align("grpo", home, "prompts.jsonl", *more)


RUNS = {"train": train, "parallel": parallel, "dpo": dpo, "grpo": grpo}


def numbers(folder) -> dict:
    steps = [r for r in records(folder) if "grad_norm" in r]
    return {name: [float(f"{r[name]:.7g}") for r in steps] for name in ("loss", "grad_norm")}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[pytest.mark.slow] * (name == "parallel")) for name in RUNS])
def test_a_run_gives_the_numbers_that_it_gave(name, home):
    found, recorded = numbers(RUNS[name](home)), json.loads(GOLDEN.read_text())
    # processors round differently, and a loss near 0 is a sum of larger numbers: GRPO has a recording of each
    goldens = [recorded[key] for key in recorded if key == name or key.startswith(f"{name} on ")]
    golden = min(goldens, key=lambda golden: math.dist(found["loss"][:FIRST], golden["loss"][:FIRST]))
    first, later = TOLERANCE[name]
    for what, values in found.items():
        assert len(values) == STEPS and all(map(math.isfinite, values))
        assert values[:FIRST] == pytest.approx(golden[what][:FIRST], rel=first, abs=1e-5), what
        assert values[FIRST:] == pytest.approx(golden[what][FIRST:], rel=later, abs=1e-5), what


def test_two_ranks_take_the_steps_of_one(home):
    """train.py and parallel.py are told the same, so their numbers are the same."""
    golden = json.loads(GOLDEN.read_text())
    assert golden["parallel"]["loss"] == pytest.approx(golden["train"]["loss"], rel=1e-3)


def test_options_are_those_that_were():
    golden = json.loads(GOLDEN.read_text())["options"]
    found = json.loads(json.dumps(options()))
    assert found.keys() == golden.keys()
    for title, known in found.items():
        assert known == golden[title], title


def renew(names) -> None:
    """Write golden.json anew, all of it or these parts."""
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        data = make_data(Path(folder))
        for name in names or [*RUNS, "options"]:
            golden[name] = options() if name == "options" else numbers(RUNS[name](data))
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    renew(sys.argv[1:])
    model.say(f"{GOLDEN} is new: look at what changed before you keep it.")
