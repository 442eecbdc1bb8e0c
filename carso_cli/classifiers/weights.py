"""Reading classifier weights: safetensors, or PyTorch files without running any code in them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from carso_cli.errors import WeightsError, nearest

_WRAPPERS = ("state_dict", "model_state_dict", "model", "net")
_PREFIXES = ("module.", "model.")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a `.safetensors` file or from a PyTorch file.

    PyTorch files are read with `weights_only=True`: tensors and plain containers, never code. A state dict
    wrapped in a checkpoint (`state_dict`, …) is unwrapped, and a prefix that all its keys share is removed.

    Raises:
        WeightsError: If the file is damaged, holds more than tensors, or holds values that are not finite.
    """
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pytorch(path)
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise WeightsError(f"{path}: tensor '{name}' holds values that are NaN or infinite")
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error


def _read_pytorch(path: Path) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path} holds more than tensors; loading it could run code and is refused",
            hint="save the state dict alone, best as safetensors",
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise WeightsError(f"{path} is not a readable PyTorch file: {reason}") from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise WeightsError(f"{path} holds no state dict: a mapping from names to tensors is needed")
    state = {str(name): tensor for name, tensor in content.items()}
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return state


def load_strict(module: nn.Module, state: Mapping[str, Tensor], origin: str | Path) -> None:
    """Load a state dict whose names and shapes must all agree.

    Args:
        module: The module to fill.
        state: Names to tensors.
        origin: Where they come from, for the message.

    Raises:
        WeightsError: Listing what is missing, what is unexpected and which shapes differ.
    """
    expected = module.state_dict()
    missing = sorted(expected.keys() - state.keys())
    unexpected = sorted(state.keys() - expected.keys())
    problems = []
    for title, names, known in (("missing", missing, unexpected), ("unexpected", unexpected, missing)):
        if names:
            shown = ", ".join(f"{name} {nearest(name, known, limit=1)}".rstrip() for name in names[:4])
            problems.append(f"{len(names)} {title}: {shown}{', …' if len(names) > 4 else ''}")
    shapes = [
        f"{name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if shapes:
        problems.append(
            f"{len(shapes)} of another shape: {'; '.join(shapes[:4])}{'; …' if shapes[4:] else ''}"
        )
    if problems:
        raise WeightsError(
            f"{origin} does not fit the architecture. " + ". ".join(problems),
            hint="check depth, width, classes and channels in the recipe's classifier and data sections",
        )
    module.load_state_dict(dict(state))
