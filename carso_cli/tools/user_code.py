"""A model from code of the user: `FILE.py:NAME` or `PACKAGE.MODULE:NAME`. The code is run.

NAME is a function or class that returns the model, or the model itself: a module, or a function from
(B, channels, H, W) images in [0, 1] to (B, classes) scores. Something that can be called without arguments is
called, and what it returns is the model; what needs one argument is the model.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from carso_cli.errors import CarsoError, UsageError, nearest
from carso_cli.io.files import similar_file
from carso_cli.runtime.reporter import Reporter
from carso_cli.runtime.third_party import prepare

_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_EXPECTED = (
    "it must return, or be, a torch module or a function from (B, channels, height, width) images in [0, 1] "
    "to (B, classes) scores"
)


@dataclass(frozen=True)
class Reference:
    """A name in a file or module.

    Args:
        text: As it was written.
        place: Path of the file, or dotted name of the module.
        name: Dotted name inside it.
    """

    text: str
    place: str
    name: str

    @property
    def is_file(self) -> bool:
        """Whether `place` is a file."""
        return self.place.endswith(".py")


def split_reference(text: str) -> Reference | None:
    """Return what `FILE.py:NAME` or `PACKAGE.MODULE:NAME` says; None where a text has neither form."""
    place, colon, name = text.rpartition(":")
    if not colon or not (place.endswith(".py") or _MODULE.fullmatch(place)):
        return None
    return Reference(text, place, name)


def load_user_model(reference: Reference, *, reporter: Reporter) -> tuple[Callable[..., Any], Path | None]:
    """Run the code and return the model, frozen and in evaluation mode, with the file of the code.

    Args:
        reference: What to load.
        reporter: Told what was changed about the model.

    Raises:
        UsageError: If there is no such file, module or name, the code fails, or gives no model.
    """
    if not _MODULE.fullmatch(reference.name):
        raise UsageError(
            f"{reference.text}: '{reference.name}' is no name in Python",
            hint=f"write {reference.place}:NAME, where NAME is a function or class that returns the model",
        )
    # The code may import torchvision, whose operators another build of torch does not load.
    prepare()
    module = _from_file(reference) if reference.is_file else _from_package(reference)
    model = _model(_look_up(module, reference), reference)
    if isinstance(model, nn.Module):
        if any(part.training for part in model.modules()):
            model.eval()
            reporter.info(f"{reference.text} was in training mode; it is audited in evaluation mode")
        model.requires_grad_(False)
    file = getattr(module, "__file__", None)
    return model, Path(file) if file and os.path.isfile(file) else None


def _from_file(reference: Reference) -> ModuleType:
    path = Path(os.path.expanduser(reference.place))
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise UsageError(f"{reference.text}: {path} {kind}", hint=similar_file(path))
    # Of its own for each path, so that no other `model.py` is found in its place.
    name = f"_carso_target_{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:12]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # As `python FILE` does: files beside it can be imported; what pickles or copies its classes finds them.
    _search_first(path.resolve().parent)
    sys.modules[name] = module
    try:
        _run(lambda: spec.loader.exec_module(module), reference, str(path))  # type: ignore[union-attr]
    except UsageError:
        del sys.modules[name]
        raise
    return module


def _from_package(reference: Reference) -> ModuleType:
    _search_first(Path.cwd())
    try:
        found = importlib.util.find_spec(reference.place)
    # A parent package that is missing or fails.
    except Exception:
        found = None
    if found is None:
        beside = f"{reference.place.replace('.', '/')}.py"
        raise UsageError(
            f"{reference.text}: there is no module '{reference.place}', here or installed",
            hint=f"a file is named with its ending: {beside}:{reference.name}",
        )
    module: ModuleType = _run(
        lambda: importlib.import_module(reference.place), reference, found.origin or reference.place
    )
    return module


def _search_first(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _run(action: Callable[[], Any], reference: Reference, where: str) -> Any:  # noqa: ANN401  (what the code gives)
    """Run code of the user.

    Raises:
        UsageError: If it raises anything or ends the process, with the place in its file.
    """
    try:
        return action()
    except (CarsoError, KeyboardInterrupt, MemoryError):
        raise
    except SyntaxError as error:
        raise UsageError(
            f"{reference.text}: {error.filename or where}, line {error.lineno}: {error.msg}",
            hint="the file is not valid Python",
        ) from error
    # A script may also end the process, as by `sys.exit()` outside of `if __name__ == "__main__":`.
    except BaseException as error:
        reason = str(error).strip().partition("\n")[0]
        told = f"{type(error).__name__}{': ' if reason else ''}{reason}"
        raise UsageError(
            f"{reference.text}: its code fails{_line(error, where)}: {told}",
            hint="CARSO_DEBUG=1 in the environment shows the whole traceback",
        ) from error


def _line(error: BaseException, where: str) -> str:
    """Return where in a file code failed, as the part of a sentence."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _same(frame.filename, where)]
    return f" in {Path(where).name}, line {frames[-1].lineno}" if frames else ""


def _same(one: str, other: str) -> bool:
    return os.path.abspath(one) == os.path.abspath(other)


def _look_up(module: ModuleType, reference: Reference) -> Any:  # noqa: ANN401  (whatever the name stands for)
    found: Any = module
    for part in reference.name.split("."):
        if not hasattr(found, part):
            known = [
                name for name, value in vars(found).items() if callable(value) and not name.startswith("_")
            ]
            own = [name for name in known if getattr(vars(found)[name], "__module__", "") == module.__name__]
            shown = ", ".join((own or known)[:8]) or "nothing that can be called"
            hint = " ".join(filter(None, (nearest(part, known, limit=1), f"it has {shown}")))
            raise UsageError(f"{reference.text}: {reference.place} has no '{part}'", hint=hint)
        found = getattr(found, part)
    return found


def _model(found: Any, reference: Reference) -> Callable[..., Any]:  # noqa: ANN401  (whatever the name stands for)
    """Return the model that a name stands for, called where it is what makes the model."""
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise UsageError(f"{reference.text} is a {type(found).__name__}, no model", hint=_EXPECTED)
    needed = _needed_arguments(found)
    if not isinstance(found, type) and len(needed) == 1:
        model: Callable[..., Any] = found
        return model
    if needed:
        call = f"{reference.name}({', '.join(needed)})"
        raise UsageError(
            f"{reference.text} needs arguments: {call}",
            hint=f"write a function that returns the model: def build(): return {reference.name}(…)",
        )
    try:
        where = inspect.getsourcefile(inspect.unwrap(found))
    # An object that is no function, or one that is written in C.
    except TypeError:
        where = None
    made = _run(found, reference, where or reference.place)
    if not callable(made):
        kind = "None" if made is None else f"a {type(made).__name__}"
        raise UsageError(f"{reference.text} returns {kind}, no model", hint=_EXPECTED)
    if isinstance(made, type):
        raise UsageError(f"{reference.text} returns the class {made.__name__}", hint="return an object of it")
    result: Callable[..., Any] = made
    return result


def _needed_arguments(found: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments that have no default."""
    try:
        parameters = inspect.signature(found).parameters.values()
    # Some that are written in C do not say.
    except (TypeError, ValueError):
        return []
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        each.name
        for each in parameters
        if each.default is inspect.Parameter.empty and each.kind not in variable
    ]
