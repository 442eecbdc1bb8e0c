"""The frame of the command line: exit codes, error display, and what is imported when."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from carso_cli import __version__
from carso_cli.cli import app, options, processes
from carso_cli.cli.options import find_recipe_of_run, read_recipe
from carso_cli.errors import (
    RESUME,
    CarsoError,
    DataError,
    InterruptedRun,
    NumericsError,
    RecipeError,
    SanityCheckError,
    StateError,
    UsageError,
    WeightsError,
)

CHECKOUT = Path(__file__).resolve().parents[2]
CARSO = f"{sys.executable} -m carso_cli"
Command = Callable[..., Any]


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[Command], None]:
    """Add a command `probe` that is the given function."""

    def add(command: Command) -> None:
        module = types.ModuleType("carso_probe")
        module.__dict__["command"] = command
        monkeypatch.setitem(sys.modules, "carso_probe", module)
        monkeypatch.setattr(app, "COMMANDS", (*app.COMMANDS, ("probe", "carso_probe", "Probe the frame.")))

    return add


@pytest.fixture
def failed(register: Callable[[Command], None], carso: Any) -> Callable[..., str]:
    """Run a command that raises an error; return what is shown of it on stderr."""

    def run(error: BaseException, code: int = 1) -> str:
        def command() -> None:
            raise error

        register(command)
        shown = carso("probe", code=code)
        assert shown.out == ""
        return str(shown.err)

    return run


# Exit codes


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (CarsoError("it failed"), 1),
        (NumericsError("loss is nan"), 1),
        (UsageError("no"), 2),
        (RecipeError("no"), 2),
        (DataError("no images"), 3),
        (WeightsError("no weights"), 3),
        (SanityCheckError("masked"), 4),
        (StateError("another recipe"), 5),
        (InterruptedRun("saved"), 130),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error: CarsoError, code: int, failed: Any) -> None:
    error.hint = "do this next"
    assert failed(error, code) == f"error: {error.message}\nhint: do this next\n"


def test_success_is_zero(register: Callable[[Command], None], carso: Any) -> None:
    register(lambda: typer.echo("done"))
    assert carso("probe").out == "done\n"


def test_a_command_may_choose_its_exit_code(failed: Any) -> None:
    assert failed(typer.Exit(4), 4) == ""


@pytest.mark.parametrize(
    ("arguments", "resumed"),
    [
        ("probe --limit 3 --set 'x=a b' --force", "carso probe --limit 3 --set 'x=a b' --resume"),
        ("probe --resume", "carso probe --resume"),
        ("quickstart --run x", "carso quickstart --run x"),
    ],
)
def test_the_command_that_resumes_is_shown_whole(arguments: str, resumed: str) -> None:
    assert app._resuming(shlex.split(arguments)) == resumed


def test_an_interruption_shows_the_command_that_resumes(failed: Any) -> None:
    shown = failed(InterruptedRun("stopped", hint=RESUME), 130)
    assert shown == "error: stopped\nhint: resume with: carso probe --resume\n"


def test_an_interrupt_is_130(failed: Any) -> None:
    assert failed(KeyboardInterrupt(), 130).strip() == "interrupted"


def test_markup_in_messages_is_shown_as_it_is(failed: Any) -> None:
    text = "layers [a, b] [bold]x[/bold] " + "long " * 40
    assert text.rstrip() in failed(CarsoError(text))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "error: out of memory"),
        (
            OSError(36, "Too long", "some-file"),
            "operating system error: Too long: some-file",
        ),
    ],
)
def test_limits_of_the_machine_are_no_bug(error: Exception, message: str, failed: Any) -> None:
    shown = failed(error)
    assert message in shown
    assert "bug" not in shown
    assert isinstance(error, OSError) or "evaluation.samples_per_pass" in shown


# Bugs


def test_an_unexpected_error_is_called_a_bug_without_a_traceback(failed: Any) -> None:
    shown = failed(ZeroDivisionError("division by zero"))
    assert "this is a bug in carso: ZeroDivisionError: division by zero" in shown
    assert "CARSO_DEBUG=1" in shown
    assert "Traceback" not in shown
    assert "in " in shown.splitlines()[1]


def test_debugging_shows_the_traceback(failed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARSO_DEBUG", "1")
    shown = failed(ZeroDivisionError("division by zero"))
    assert "Traceback (most recent call last)" in shown
    assert "test_app.py" in shown


def test_a_command_that_cannot_be_imported_is_a_bug(monkeypatch: pytest.MonkeyPatch, carso: Any) -> None:
    monkeypatch.setattr(app, "COMMANDS", (("probe", "carso_cli.cli.nowhere", "Nothing."),))
    shown = carso("probe", code=1).err
    assert "ModuleNotFoundError: No module named 'carso_cli.cli.nowhere'" in shown


# Torchrun


@pytest.fixture
def two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "x", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "SHARED", ("probe",))


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize(("rank", "shown"), [("0", "error in process 1 of 2: nan\n"), ("1", "")])
def test_one_process_reports_what_all_of_them_meet(
    rank: str, shown: str, failed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert failed(NumericsError("nan")) == shown


@pytest.mark.usefixtures("two_processes")
@pytest.mark.parametrize(("rank", "shown"), [("0", "done\n"), ("1", "")])
def test_one_process_writes_the_result(
    rank: str, shown: str, register: Callable[[Command], None], carso: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(lambda: typer.echo("done"))
    monkeypatch.setenv("RANK", rank)
    assert carso("probe").out == shown


@pytest.mark.usefixtures("two_processes")
def test_what_one_process_does_is_refused_to_several(carso: Any) -> None:
    shown = carso("recipes", "ls", code=2).err
    assert "torchrun started 2 processes, but carso recipes runs in one" in shown


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            "train-purifier cifar10 --device cuda:0,1,2",
            "carso run --nproc 3 train-purifier cifar10",
        ),
        (
            "evaluate --device=cuda:2,3 --attack quick",
            "CUDA_VISIBLE_DEVICES=2,3 carso run --nproc 2 evaluate --attack quick",
        ),
        (
            "evaluate 'my recipe.yaml' --set 'representation.layers=[a, b]' --device cuda:0,1",
            "carso run --nproc 2 evaluate 'my recipe.yaml' --set 'representation.layers=[a, b]'",
        ),
    ],
)
def test_more_devices_than_processes_are_met_with_a_line_to_paste(
    arguments: str, line: str, carso: Any
) -> None:
    shown = carso(*shlex.split(arguments), code=2).err
    assert "devices, and a process uses one" in shown
    assert f"hint: start one process per device: {line}\n" in shown


def test_one_rank_without_a_world_is_a_single_process(carso: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")
    assert carso("--version").out == f"carso {__version__}\n"


def test_a_malformed_world_is_named_and_shown(carso: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "all")
    carso("recipes", "ls", code=2, err="error: environment variable WORLD_SIZE='all' is not allowed")


@pytest.mark.parametrize(
    ("arguments", "started"),
    [
        (
            "run --nproc 8 train-purifier x --run runs/x --limit 3",
            "--nproc-per-node 8 --max-restarts 0 -m carso_cli train-purifier x --run-dir runs/x --limit 3",
        ),
        (
            "run --max-restarts 3 --nproc 2 evaluate --run=runs/x --json",
            "--nproc-per-node 2 --max-restarts 3 -m carso_cli evaluate --run-dir=runs/x --json",
        ),
    ],
)
def test_run_starts_torchrun(
    arguments: str, started: str, carso: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(os, "execv", lambda *given: seen.append(given))
    carso(*arguments.split())
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", *started.split()]
    assert seen == [(sys.executable, line)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --nproc 2 predict x.png", "carso run cannot start 'predict'"),
        ("run --nproc 2 evalute", "carso run cannot start 'evalute'; did you mean 'evaluate'"),
        ("run --nproc 0 evaluate", "'0' is not allowed; use a whole number from 1"),
        ("run evaluate", "Missing option '--nproc'"),
    ],
)
def test_run_refuses_what_does_not_share_its_work(arguments: str, message: str, carso: Any) -> None:
    carso(*arguments.split(), code=2, err=message)


# Usage errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipess"], "there is no command 'recipess'; did you mean 'recipes'?"),
        (["zzz"], "there is no command 'zzz'"),
        (["recipes", "lst"], "there is no command 'lst'; did you mean 'ls'?"),
        (["recipes", "ls", "--jsn"], "there is no option '--jsn'; did you mean '--json'?"),
        (["--verzion"], "there is no option '--verzion'; did you mean '--version'?"),
        (["recipes", "show"], "Missing argument 'NAME'"),
        (["recipes", "ls", "more"], "unexpected extra argument"),
        (["recipes", "show", "digits", "--set"], "Option '--set' requires an argument"),
        (["recipes"], "Missing command"),
    ],
)
def test_usage_errors_say_what_is_near_and_where_help_is(
    arguments: list[str], message: str, carso: Any
) -> None:
    shown = carso(*arguments, code=2)
    assert message in shown.err
    assert "hint: see `carso" in shown.err
    assert shown.out == ""


def test_no_arguments_show_help_and_are_a_usage_error(carso: Any) -> None:
    assert "Usage: carso" in carso(code=2).out


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_every_command_with_its_line(flag: str, carso: Any) -> None:
    shown = " ".join(carso(flag).out.replace("│", " ").split())
    for name, _, summary in app.COMMANDS:
        assert f"{name} {summary}" in shown


def test_help_groups_every_command(carso: Any) -> None:
    shown = carso("--help").out
    assert {name for names in app.PANELS.values() for name in names} == {name for name, *_ in app.COMMANDS}
    places = [shown.index(f" {heading} ─") for heading in app.PANELS]
    assert places == sorted(places)
    for (heading, names), end in zip(app.PANELS.items(), [*places[1:], len(shown)], strict=True):
        for name in names:
            assert f" {name} " in shown[shown.index(f" {heading} ─") : end]


def test_version(carso: Any) -> None:
    assert carso("--version").out == f"carso {__version__}\n"


@pytest.mark.parametrize("entry", app.COMMANDS, ids=lambda entry: entry[0])
def test_every_registered_command_has_help(entry: tuple[str, str, str], carso: Any) -> None:
    shown = carso(entry[0], "--help").out
    assert f"carso {entry[0]}" in shown
    # A flag takes no value, so it shows no type.
    assert "<bool>" not in shown
    # A docstring's "Args:" section is for Python readers; options have their own help.
    assert "Args:" not in shown


# Completion


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("carso ev", ["evaluate"]),
        ("carso recipes ", ["ls", "show", "cp", "validate"]),
        ("carso evaluate digits-a", ["digits-adversarial"]),
        ("carso evaluate digits --attack pgd-", ["pgd-eot", "pgd-eot-random-start", "pgd-eot-margin"]),
        ("carso evaluate --norm l", ["linf", "l2"]),
        ("carso attack --res", ["--resize"]),
        ("carso run --nproc 2 train-", ["train-classifier", "train-purifier"]),
    ],
)
def test_a_shell_completes_commands_options_and_names(
    line: str, completed: list[str], carso: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("_CARSO_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split(" ")) - 1))
    assert carso().lines == completed


# Shared options


@pytest.fixture
def probe(register: Callable[[Command], None]) -> dict[str, object]:
    seen: dict[str, object] = {}

    def command(
        recipe: options.RecipeArgument = None,
        overrides: options.SetOption = None,
        device: options.DeviceOption = "auto",
        seed: options.SeedOption = None,
        limit: options.LimitOption = None,
        n_samples: options.NSamplesOption = None,
        eps: options.EpsOption = None,
    ) -> None:
        """Probe the shared options."""
        seen.update(recipe=read_recipe(recipe, overrides, seed), device=device)
        seen.update(limit=limit, n_samples=n_samples, eps=eps)

    register(command)
    return seen


def test_shared_options_reach_the_command(probe: dict[str, object], carso: Any) -> None:
    arguments = "probe cifar10 --set evaluation.n_samples=3 --set training.epochs=8 --seed 5 --device cuda:1"
    carso(*arguments.split(), "--limit", "7", "--n-samples", "2", "--eps", "8/255")
    recipe = probe.pop("recipe")
    assert probe == {"device": "cuda:1", "limit": 7, "n_samples": 2, "eps": 8 / 255}
    assert recipe == read_recipe("cifar10", ["evaluation.n_samples=3", "training.epochs=8", "seed=5"])


def test_shared_options_may_all_be_left_out(probe: dict[str, object], carso: Any) -> None:
    carso("probe")
    assert probe.pop("recipe") == read_recipe("digits", None)
    assert probe == {"device": "auto", "limit": None, "n_samples": None, "eps": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--device gpu", "'gpu' is not allowed; use auto, cpu, cuda, cuda:N or mps; did you mean 'cpu'?"),
        ("--device cuda:x", "'cuda:x' is not allowed; use auto, cpu, cuda, cuda:N or mps"),
        ("--eps 8/0", "'8/0' is not allowed (the denominator is zero)"),
        ("--eps ten", "'ten' is not allowed (not a number or a fraction); use a number such as 8/255"),
        ("--eps -0.1", "'-0.1' is not allowed; use a number above 0"),
        ("--limit 0", "'0' is not allowed; use a whole number from 1"),
        ("--seed -1", "'-1' is not allowed; use a whole number from 0"),
        ("--n-samples many", "'many' is not allowed; use a whole number from 1"),
        ("--set training.epochs=x", "--set training.epochs=x, training.epochs: 'x' is not allowed"),
    ],
)
def test_shared_options_refuse_what_they_cannot_mean(
    arguments: str, message: str, probe: dict[str, object], carso: Any
) -> None:
    assert message in carso("probe", *arguments.split(), code=2).err
    assert probe == {}


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("probe digits --set training.epochs 3", "training.epochs=3"),
        ("probe --set data.root 'my data'", "'data.root=my data'"),
        ("probe --set training.epochs --seed 3", "training.epochs=VALUE"),
        ("probe --set training.epochs", "training.epochs=VALUE"),
    ],
)
def test_a_set_in_two_words_is_shown_in_one(
    arguments: str, meant: str, probe: dict[str, object], carso: Any
) -> None:
    shown = carso(*shlex.split(arguments), code=2).err
    assert "has no value: key and value are one word" in shown
    assert f"hint: write --set {meant}\n" in shown
    assert probe == {}


@pytest.mark.parametrize("left", ["purifier.safetensors", "state.safetensors"])
def test_a_trained_run_without_its_recipe_is_no_run_of_the_default_one(tmp_path: Path, left: str) -> None:
    (tmp_path / left).touch()
    with pytest.raises(StateError, match=r"recipe\.yaml is missing: how the purifier beside it was trained"):
        find_recipe_of_run(None, tmp_path, ())
    assert find_recipe_of_run("cifar10", tmp_path, ())[0].name == "cifar10"
    assert find_recipe_of_run(None, tmp_path / "new", ())[0].name == "digits"


def test_names_that_no_file_can_have_are_refused(carso: Any) -> None:
    for name in (f"{'a' * 5000}.yaml", "~nobody-of-that-name/x.yaml", "a" * 5000):
        assert name in carso("recipes", "validate", name, code=2).err


# Processes


def shell(command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command], cwd=CHECKOUT, capture_output=True, text=True, timeout=60, check=False
    )


HEAVY = ("torch", "torchvision", "numpy", "scipy", "sklearn", "matplotlib", "safetensors", "PIL")
LIGHT = f"""
import sys
from carso_cli.cli.app import run
code = run(sys.argv[1:])
heavy = [name for name in {HEAVY!r} if name in sys.modules]
assert not heavy, heavy
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("--help", 0),
        ("--version", 0),
        *((f"{name} --help", 0) for name, _, _ in app.COMMANDS),
        ("nonsense", 2),
        ("recipes ls", 0),
        ("recipes show digits --set training.epochs=ten", 2),
    ],
)
def test_help_and_recipe_errors_import_nothing_heavy(arguments: str, code: int) -> None:
    done = shell(f"{sys.executable} -c {shlex.quote(LIGHT)} {arguments}")
    assert (done.returncode, "AssertionError" in done.stderr) == (code, False), done.stderr


@pytest.mark.slow
def test_a_closed_pipe_is_quiet() -> None:
    # `exec <&-` closes the reading end at once; the writer then fails on its first flush.
    command = f"{CARSO} recipes show cifar10 --resolved"
    assert shell(f"({command}; echo left $? >&2) | (exec <&-; sleep 2)").stderr == "left 1\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ("digits > /dev/full", 1, "error: operating system error: No space left on device\n"),
        ("digits >&-", 0, ""),
        ("digits <&- >&- 2>&-", 0, ""),
        ("nothing", 2, "error: there is no file and no shipped recipe 'nothing'"),
    ],
)
def test_the_module_with_streams_that_are_full_or_closed(arguments: str, code: int, said: str) -> None:
    done = shell(f"{CARSO} recipes show {arguments}")
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith(said)
    assert said or not done.stderr
