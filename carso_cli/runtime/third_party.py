"""Patches for faults in the packaging of our dependencies, applied before their first import.

- `prepare` applies them; functions call it before they import torchvision, advertorch or AutoAttack;
- `import_robustbench` imports robustbench, patched and without its warnings;
- `patches` lists them, for `carso doctor`. Each says what goes wrong and when it can be deleted; the tests
  fail when one is no longer needed.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from carso_cli.errors import MissingError


@dataclass(frozen=True)
class Patch:
    """One fault and its remedy.

    Args:
        name: Short name.
        reason: What goes wrong without the remedy.
        until: When the patch can be deleted.
        needed: Whether the fault is present here; imports none of the faulty libraries.
        remedy: Removes the fault.
    """

    name: str
    reason: str
    until: str
    needed: Callable[[], bool]
    remedy: Callable[[], None]

    @property
    def active(self) -> bool:
        """Whether the fault is or was present here, patched or not."""
        # Once it is patched, the fault is no longer seen.
        return self.name in _applied or self.needed()

    def apply(self) -> None:
        """Apply the remedy if the fault is present, without showing the libraries' own warnings."""
        if self.needed():
            with quiet():
                self.remedy()
            _applied.add(self.name)


_applied: set[str] = set()


def _autoattack_is_absent() -> bool:
    return "autoattack" not in sys.modules and importlib.util.find_spec("autoattack") is None


def _alias_autoattack() -> None:
    import pyautoattack
    from pyautoattack import state

    sys.modules["autoattack"] = pyautoattack
    # The alias of a package does not cover its modules.
    sys.modules["autoattack.state"] = state


def _gradcheck_module() -> types.ModuleType:
    # As an attribute of torch.autograd, `gradcheck` is a function; the module is found by its name only.
    importlib.import_module("torch.autograd.gradcheck")
    return sys.modules["torch.autograd.gradcheck"]


def _zero_gradients(tensor: torch.Tensor) -> None:
    if tensor.grad is not None:
        tensor.grad.detach_().zero_()


def _restore_zero_gradients() -> None:
    _gradcheck_module().__dict__["zero_gradients"] = _zero_gradients


def _folder_of(package: str) -> Path | None:
    """Return where a package lies, without importing it; None where it is not installed."""
    found = importlib.util.find_spec(package)
    locations = found.submodule_search_locations if found is not None else None
    return Path(next(iter(locations))) if locations else None


def _operators_are_missing() -> bool:
    """Say whether torchvision's compiled operators fail to load; where they load, they stay loaded."""
    # Importing the package is what fails.
    folder = _folder_of("torchvision")
    if folder is None or hasattr(torch.ops.torchvision, "nms"):
        return False
    for library in (*folder.glob("_C.so"), *folder.glob("_C.*.so"), *folder.glob("_C*.pyd")):
        try:
            torch.ops.load_library(str(library))  # type: ignore[no-untyped-call]  # torch leaves it untyped
        except OSError:
            return True
    return not hasattr(torch.ops.torchvision, "nms")


_declared: list[torch.library.Library] = []


def _declare_operators() -> None:
    fragment = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]  # untyped in torch
    # While it is imported, torchvision registers functions for these two; carso calls neither.
    for operator in ("nms", "qnms"):
        schema = f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        fragment.define(schema)  # type: ignore[no-untyped-call]  # untyped in torch
    # The schemas live only as long as this object does.
    _declared.append(fragment)


def _pkg_resources_is_absent() -> bool:
    return importlib.util.find_spec("pkg_resources") is None


def _ask_for_setuptools() -> None:
    raise MissingError(
        "robustbench imports pkg_resources, which setuptools 81 and newer do not have",
        hint="pip install 'setuptools<81'",
    )


_SWISH_MODULES = ("dm_wide_resnet", "dm_rn", "Meansparse_wrn_70_16", "Meansparse_wrn_94_16")


def _swish_reads_saved_variables() -> bool:
    folder = _folder_of("robustbench")
    if folder is None:
        return False
    sources = (folder / "model_zoo" / "architectures" / f"{name}.py" for name in _SWISH_MODULES)
    return any(source.is_file() and "saved_variables" in source.read_text("utf-8") for source in sources)


def _silu(_: torch.nn.Module, features: torch.Tensor) -> torch.Tensor:
    return F.silu(features)


def _compute_swish_by_silu() -> None:
    # The class is patched, not its name: the model zoo has bound the class already.
    for name in _SWISH_MODULES:
        module = sys.modules.get(f"robustbench.model_zoo.architectures.{name}")
        if module is not None:
            module.Swish.forward = _silu


_BEFORE_IMPORT = (
    Patch(
        "autoattack",
        "robustbench imports `autoattack`, which is not on PyPI; pyautoattack is the same code",
        "robustbench imports pyautoattack, or autoattack is published",
        _autoattack_is_absent,
        _alias_autoattack,
    ),
    Patch(
        "zero_gradients",
        "advertorch imports `zero_gradients` from torch.autograd.gradcheck, gone since torch 1.9",
        "a release of advertorch without that import",
        lambda: not hasattr(_gradcheck_module(), "zero_gradients"),
        _restore_zero_gradients,
    ),
    Patch(
        "torchvision::nms",
        "torchvision's CUDA build cannot load its operators beside a CPU-only torch, and fails on import",
        "torch and torchvision come from one place, or torchvision imports without its operators",
        _operators_are_missing,
        _declare_operators,
    ),
)


_ROBUSTBENCH_ALONE = (
    Patch(
        "pkg_resources",
        "robustbench imports `pkg_resources`, which setuptools 81 dropped",
        "robustbench reads its files with importlib.resources",
        _pkg_resources_is_absent,
        _ask_for_setuptools,
    ),
    Patch(
        "Swish",
        "the gradient of robustbench's Swish reads `ctx.saved_variables`, which torch is giving up: it warns "
        "at every step; nn.SiLU is the same function",
        "robustbench reads ctx.saved_tensors, or uses nn.SiLU",
        _swish_reads_saved_variables,
        _compute_swish_by_silu,
    ),
)


def patches() -> tuple[Patch, ...]:
    """Return all patches."""
    return _BEFORE_IMPORT + _ROBUSTBENCH_ALONE


@functools.cache
def prepare() -> None:
    """Apply what torchvision, advertorch and AutoAttack need, once; call it before they are imported."""
    for patch in _BEFORE_IMPORT:
        patch.apply()


def quiet() -> warnings.catch_warnings[None]:
    """Return a context in which importing a library shows none of its own warnings."""
    return warnings.catch_warnings(action="ignore")


@functools.cache
def import_robustbench() -> types.ModuleType:
    """Import robustbench, whose models then have gradients without warnings.

    Raises:
        MissingError: If setuptools is too new for it, or it is not installed.
    """
    prepare()
    setuptools, swish = _ROBUSTBENCH_ALONE
    setuptools.apply()
    with quiet():
        try:
            module = importlib.import_module("robustbench")
        except ModuleNotFoundError as error:
            raise MissingError(
                f"robustbench cannot be imported: {error}", hint="pip install robustbench"
            ) from error
    swish.apply()
    return module
