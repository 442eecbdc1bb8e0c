"""The `carso` command line: which commands there are, and how an error becomes an exit code.

A command is a module with an object `command`: a function that Typer reads, or a `typer.Typer` with
subcommands. To add one, write the module and add a line to `COMMANDS`; the module is imported only when
its command is called or asked for help, and imports torch only inside the function.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from carso_cli import __version__
from carso_cli.cli.console import messages, show_error
from carso_cli.cli.processes import check_command, claim_error, lost_process, one_writer
from carso_cli.errors import RESUME, CarsoError, InterruptedRun, UsageError, nearest
from carso_cli.runtime.memory import is_out_of_memory

COMMANDS: tuple[tuple[str, str, str], ...] = (
    # (command, module, one line of help), in the order in which help lists them
    ("evaluate", "carso_cli.cli.evaluate", "Measure clean and robust accuracy."),
    ("audit", "carso_cli.cli.audit", "Measure the robust accuracy of any PyTorch model."),
    ("attack", "carso_cli.cli.attack", "Make adversarial examples and save them."),
    ("ablate", "carso_cli.cli.ablate", "Measure robust accuracy while varying one setting."),
    ("bench", "carso_cli.cli.bench", "Measure the speed of training, attack and inference."),
    ("quickstart", "carso_cli.cli.quickstart", "Run the whole method on digits, in about three minutes."),
    ("train-classifier", "carso_cli.cli.train_classifier", "Train a recipe's classifier."),
    ("train-purifier", "carso_cli.cli.train_purifier", "Train a recipe's purifier."),
    ("harden", "carso_cli.cli.harden", "Make a classifier robust without changing its weights."),
    ("predict", "carso_cli.cli.predict", "Classify image files with a trained defence."),
    ("export", "carso_cli.cli.export", "Export a trained defence to torch.export and ONNX."),
    ("import-release", "carso_cli.cli.import_release", "Turn the authors' published purifier into a run."),
    ("reproduce", "carso_cli.cli.reproduce", "Evaluate the authors' own files beside the paper's row."),
    ("report", "carso_cli.cli.report", "Show the paper's tables, filled from stored results."),
    ("runs", "carso_cli.cli.runs", "List runs with their results."),
    ("attacks", "carso_cli.cli.attacks", "List attacks and protocols."),
    ("recipes", "carso_cli.cli.recipes", "List, show, copy and validate recipes."),
    ("extract", "carso_cli.cli.extract", "List layers, or write the internal representation."),
    ("run", "carso_cli.cli.launch", "Run a command in several processes, one per GPU."),
    ("doctor", "carso_cli.cli.doctor", "Check the installation, data and weights."),
)
PANELS = {
    "Measure": ("evaluate", "audit", "attack", "ablate", "reproduce", "bench"),
    "Defend": (
        "quickstart",
        "train-classifier",
        "train-purifier",
        "harden",
        "predict",
        "export",
        "import-release",
    ),
    "Look": ("report", "runs", "attacks", "recipes", "extract"),
    "Manage": ("run", "doctor"),
}
"""Headings under which help lists the commands; any other command stands under the last."""
_PANEL_OF = {command: panel for panel, commands in PANELS.items() for command in commands}


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"carso {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        # Eager, so that it answers although no command is named.
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """CARSO: purify images conditioned on a classifier's internal representation; measure robust accuracy."""


def build_app(arguments: Sequence[str]) -> typer.Typer:
    """Return the Typer application for a command line (without the program's name).

    Only the called command's module is imported.
    """
    app = typer.Typer(
        # `run` shows every error in one form; Typer's own panel would show a traceback.
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    called = _command_of(arguments)
    for name, module_name, summary in COMMANDS:
        panel = _PANEL_OF.get(name, [*PANELS][-1])
        if name != called:
            # Help lists every command; a stub spares the import of those that are not called.
            app.command(name, help=summary, rich_help_panel=panel)(lambda: None)
            continue
        module = importlib.import_module(module_name)
        command: typer.Typer | Callable[..., None] = module.command
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name, rich_help_panel=panel)
        else:
            # Rich keeps the docstring's line ends, which are not where a terminal's lines end.
            text = re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(command.__doc__ or ""))
            settings = getattr(module, "CONTEXT", None)
            app.command(name, help=text, rich_help_panel=panel, context_settings=settings)(command)
    return app


def _command_of(arguments: Sequence[str]) -> str | None:
    # No global option takes a value, so the first word that is no option is the command.
    return next((argument for argument in arguments if not argument.startswith("-")), None)


def _completes() -> bool:
    """Say whether a shell asks for completions; it calls without arguments."""
    return "_CARSO_COMPLETE" in os.environ


def _words_to_complete() -> list[str]:
    """Return the command line that a shell asks completions for, without the program's name."""
    # bash, then the other shells; the last word is the one being typed.
    line = os.environ.get("COMP_WORDS", os.environ.get("_TYPER_COMPLETE_ARGS", ""))
    return line.split()[1:]


def _hide_flag_types(command: Any) -> None:  # noqa: ANN401  (click's own types are no public part of Typer)
    """Show flags in help without a type: they take no value."""
    for one in (command, *getattr(command, "commands", {}).values()):
        # Made only when it is asked for, and kept.
        help_option = one.get_help_option(typer.Context(one, help_option_names=["-h", "--help"]))
        for option in (*one.params, help_option):
            if getattr(option, "is_flag", False):
                option.metavar = ""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code; no exception leaves this function.

    Args:
        arguments: The command line without the program's name; by default this process's.
    """
    chosen = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with one_writer():
            code = _call(chosen or ["--help"])
        # Here, so that a full disk or a closed pipe meets a handler below, not the interpreter's exit.
        sys.stdout.flush()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except (KeyboardInterrupt, typer.Abort) as stop:
        # torchrun interrupts the processes that are left when one dies; a collective may have failed before.
        if died := lost_process(stop.__context__):
            return _report(died, chosen)
        code = 130
    except OSError as error:
        # A reader that closed the pipe, such as `head`, expects no message.
        code = 1 if isinstance(error, BrokenPipeError) else _report(error, chosen)
        _drop_unwritable()
        return code
    except Exception as error:
        return _report(error, chosen)
    if code == 130 and claim_error() is not None:
        messages().print("interrupted", style="yellow")
    # Without a command, help was shown; that is a usage error all the same.
    return code if chosen or _completes() else 2


def _drop_unwritable() -> None:
    """Redirect a stdout that cannot be written, or the interpreter's flush at exit would fail again."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _call(arguments: list[str]) -> int:
    check_command(_command_of(arguments))
    command = typer.main.get_command(build_app(_words_to_complete() if _completes() else arguments))
    _hide_flag_types(command)
    # Outside standalone mode Typer raises its errors instead of printing them and leaving the process.
    code = command.main(args=arguments, prog_name="carso", standalone_mode=False, obj=tuple(arguments))
    return code if isinstance(code, int) else 0


def _report(error: Exception, arguments: Sequence[str]) -> int:
    known = _as_known(error)
    code = 1 if known is None else known.exit_code
    # Claimed before anything is printed: of several processes that fail, only the first shows its error.
    process = claim_error()
    if process is None:
        return code
    debugging = os.environ.get("CARSO_DEBUG") == "1"
    if debugging:
        messages().print("".join(traceback.format_exception(error)), soft_wrap=True)
    # A Ctrl-C reaches every process alike, so an interruption names none.
    where = f" in {process}" if process and not isinstance(known, InterruptedRun) else ""
    if known is None:
        show_error(_as_bug(error, debugging), title=f"this is a bug in carso{where}")
    else:
        known.hint = known.hint.replace(RESUME, f"resume with: {_resuming(arguments)}")
        show_error(known, title=f"error{where}")
    return code


def _resuming(arguments: Sequence[str]) -> str:
    """Return the command line that resumes what these arguments began, to be pasted into a shell."""
    kept = [word for word in arguments if word not in ("--resume", "--force")]
    # `quickstart` resumes by itself.
    return shlex.join(["carso", *kept, *([] if _command_of(kept) == "quickstart" else ["--resume"])])


def _as_known(error: Exception) -> CarsoError | None:
    if isinstance(error, CarsoError):
        return error
    if is_out_of_memory(error):
        return CarsoError(
            f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            hint="lower evaluation.samples_per_pass, evaluation.batch_size or training.batch_size with --set",
        )
    if isinstance(error, OSError) and error.strerror:
        named = f": {error.filename}" if error.filename else ""
        return CarsoError(
            f"operating system error: {error.strerror}{named}",
            hint="set CARSO_DEBUG=1 to see the traceback",
        )
    if died := lost_process(error):
        return died
    # Some releases of Typer carry their own copy of click, others import it: recognised by its attributes.
    if hasattr(error, "format_message") and getattr(error, "exit_code", None) is not None:
        return _as_usage_error(error)
    return None


def _as_usage_error(error: Exception) -> UsageError:
    message = str(error.format_message()).rstrip(".")  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    option = getattr(error, "option_name", None)
    # The unknown name stands in the message alone.
    if message.startswith("No such command"):
        name = message.split("'")[1]
        known = list(getattr(getattr(context, "command", None), "commands", ()))
        message = "; ".join(filter(None, (f"there is no command '{name}'", nearest(name, known))))
    elif message.startswith("No such option") and option and context is not None:
        known = [text for parameter in context.command.params for text in parameter.opts]
        message = "; ".join(filter(None, (f"there is no option '{option}'", nearest(option, known))))
    path = context.command_path if context is not None else "carso"
    return UsageError(message, hint=f"see `{path} --help`")


def _as_bug(error: Exception, debugging: bool) -> CarsoError:
    package = str(Path(__file__).resolve().parents[1])
    frames = traceback.extract_tb(error.__traceback__)
    # The innermost frame of our own says more than one deep inside a library.
    ours = [frame for frame in frames if frame.filename.startswith(package)] or list(frames)
    where = f"\nin {ours[-1].name}, {ours[-1].filename}:{ours[-1].lineno}" if ours else ""
    hint = "" if debugging else "set CARSO_DEBUG=1 to see the traceback"
    return CarsoError(f"{type(error).__name__}: {error}{where}", hint=hint)
