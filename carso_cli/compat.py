"""Faults in the packaging of our dependencies, mended before their first import.

`prepare()` is called, inside functions, before torchvision, robustbench, advertorch or AutoAttack are
imported. Each `Entry` says what is wrong, why, and when it can go; a test fails when one is no longer
needed.
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
from typing import Any

import torch

from carso_cli.errors import MissingError


@dataclass(frozen=True)
class Entry:
    """One fault and its remedy.

    Args:
        name: Short name, shown by `carso doctor`.
        reason: What goes wrong without it.
        until: When it can be removed.
        needed: Whether the fault is present here.
        apply: Mends it; called once, only where needed.
    """

    name: str
    reason: str
    until: str
    needed: Callable[[], bool]
    apply: Callable[[], None]


def _alias_autoattack() -> None:
    import pyautoattack
    from pyautoattack import state

    sys.modules["autoattack"] = pyautoattack
    sys.modules["autoattack.state"] = state


def _gradcheck_module() -> types.ModuleType:
    # `torch.autograd.gradcheck` as an attribute is a function; the module is found under its name only.
    importlib.import_module("torch.autograd.gradcheck")
    return sys.modules["torch.autograd.gradcheck"]


def _zero_gradients(tensor: torch.Tensor) -> None:
    if tensor.grad is not None:
        tensor.grad.detach_().zero_()


def _restore_zero_gradients() -> None:
    _gradcheck_module().__dict__["zero_gradients"] = _zero_gradients


_libraries: list[torch.library.Library] = []


def _operators_load() -> bool:
    """Say whether torchvision's compiled operators load beside this torch, without importing torchvision."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.submodule_search_locations is None:
        return True
    if hasattr(torch.ops.torchvision, "nms"):
        return True
    folder = Path(next(iter(found.submodule_search_locations)))
    for library in (*folder.glob("_C.so"), *folder.glob("_C.*.so"), *folder.glob("_C.pyd")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            return False
    return hasattr(torch.ops.torchvision, "nms")


def _declare_nms() -> None:
    fragment = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        fragment.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(fragment)  # the schema lives as long as this object


def _check_pkg_resources() -> None:
    raise MissingError(
        "robustbench imports pkg_resources, which setuptools 81 and newer do not have",
        hint="pip install 'setuptools<81'",
    )


def _swish_is_broken() -> bool:
    return importlib.util.find_spec("robustbench") is not None


def _replace_swish() -> None:
    from robustbench.model_zoo.architectures import dm_wide_resnet

    dm_wide_resnet.Swish = torch.nn.SiLU


_ENTRIES = (
    Entry(
        "autoattack",
        "robustbench imports `autoattack`, which is not on PyPI; pyautoattack is the same code",
        "robustbench imports pyautoattack, or autoattack is published",
        lambda: importlib.util.find_spec("autoattack") is None,
        _alias_autoattack,
    ),
    Entry(
        "zero_gradients",
        "advertorch imports `zero_gradients` from torch.autograd.gradcheck, gone since torch 1.9",
        "advertorch drops that import",
        lambda: not hasattr(_gradcheck_module(), "zero_gradients"),
        _restore_zero_gradients,
    ),
    Entry(
        "torchvision::nms",
        "torchvision's CUDA build cannot load its operators beside a CPU-only torch, and fails on import",
        "torchvision's CPU build comes from the same place as torch's",
        lambda: not _operators_load(),
        _declare_nms,
    ),
    Entry(
        "pkg_resources",
        "robustbench imports pkg_resources from setuptools",
        "robustbench uses importlib.resources",
        lambda: importlib.util.find_spec("pkg_resources") is None,
        _check_pkg_resources,
    ),
)

_SWISH = Entry(
    "robustbench Swish",
    "its backward reads `ctx.saved_variables`, gone from torch; Rebuffi 2021 and Gowal 2020 use it",
    "robustbench reads ctx.saved_tensors",
    _swish_is_broken,
    _replace_swish,
)


def entries() -> tuple[Entry, ...]:
    """Return all known faults, in the order in which they are mended."""
    return (*_ENTRIES, _SWISH)


@functools.cache
def prepare() -> None:
    """Mend what needs mending, once.

    Raises:
        MissingError: If a dependency is absent that cannot be stood in for.
    """
    for entry in _ENTRIES:
        if entry.needed():
            entry.apply()


def import_robustbench_architectures() -> Any:  # noqa: ANN401  (a module)
    """Import robustbench's `DMWideResNet` module with its Swish replaced by `nn.SiLU`."""
    prepare()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _replace_swish()
        return importlib.import_module("robustbench.model_zoo.architectures.dm_wide_resnet")
