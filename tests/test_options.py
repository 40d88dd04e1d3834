"""Every number that a command takes: what makes no sense is refused in a sentence that names it."""

import contextlib
import inspect
import runpy
import subprocess
import sys

import model
import pytest
import typer
from conftest import ROOT, SCRIPTS
from typer.models import OptionInfo

SENSELESS = {int: ["-1", "-99999999999999999999", "99999999999999999999"], float: ["nan", "inf", "-inf", "-1"]}
# What has to be there before the numbers are looked at.
NEEDED = {"tokenize train": ["--input", "x.txt", "--output", "y.json"], "tokenize prepare": ["x.txt", "--output", "y"],
          "tokenize encode": ["--tokenizer", "y.json", "x"]}  # fmt: skip


def app_of(name: str) -> typer.Typer:
    """Take a script's typer app, as its last lines make it."""
    found = []

    def capture(app):
        found.append(app)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(SystemExit):
        patch.setattr(typer.Typer, "__call__", capture)
        patch.setattr(sys, "argv", [f"{name}.py", "--help"])
        runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    return found[0]


def numbers(function) -> dict[str, type]:
    """Find the options of a command that take a number."""
    found = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        declared = getattr(parameter.annotation, "__origin__", parameter.annotation)
        option = getattr(parameter.annotation, "__metadata__", [None])[0]
        if isinstance(option, OptionInfo):
            flag = max(option.param_decls or ["--" + name.replace("_", "-")], key=len)
            found |= {f: k for f, k in [(flag, int), (flag, float)] if declared in (k, k | None)}
    return found


def refuse(app, args: list[str]) -> str:
    """Run a command that has to refuse -> its sentence."""
    try:
        typer.main.get_command(app).main(args, standalone_mode=False)
    except Exception as error:
        assert isinstance(error, model.UserError) or getattr(error, "exit_code", 0) == 2, args
        return getattr(error, "message", "") or str(error)
    return ""


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "model"])
def test_numbers_that_make_no_sense_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("some text\n" * 100)
    app = app_of(name)
    top = app.registered_callback
    several = len(app.registered_commands) > 1 or top
    commands = {c.name or c.callback.__name__: c.callback for c in app.registered_commands}
    commands |= {"": top.callback} if top else {}
    taken, tried = [], 0
    for command, function in commands.items():
        for option, kind in numbers(function).items():
            for value in SENSELESS[kind]:
                tried += 1
                start = [command] if several and command else []
                words = refuse(app, [*start, *NEEDED.get(f"{name} {command}", []), f"{option}={value}"])
                field = option.strip("-").replace("-", "_")
                if not any(w in words for w in (option, value, field)):
                    taken.append(f"{name}.py {command} {option}={value}: {words[:90]}")
    assert tried
    assert not taken, "\n".join(taken)


def test_scripts_find_model_without_their_folder_on_the_path():
    """`python -P`, `-I` and PYTHONSAFEPATH leave the script's folder out of the import path."""
    code = ("import runpy, sys\npath = list(sys.path)\nfor script in sys.argv[1:]:\n    runpy.run_path(script)\n"
            "    sys.path[:] = path\n    sys.modules.pop('model', None)\n")
    scripts = [str(ROOT / f"{name}.py") for name in SCRIPTS]
    done = subprocess.run([sys.executable, "-P", "-c", code, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("changed", [{"RANK": "x"}, {"RANK": "2"}, {"WORLD_SIZE": "0"}, {"LOCAL_RANK": "-1"},
                                     {"MASTER_PORT": "http"}, {"MASTER_PORT": "99999"}])  # fmt: skip
def test_what_torchrun_sets_has_to_make_sense(changed, monkeypatch, capsys):
    usual = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in (usual | changed).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(model.UserError, match="start several processes with torchrun"):
        model.setup_distributed("cpu")
    model.say("words")  # whatever RANK is
