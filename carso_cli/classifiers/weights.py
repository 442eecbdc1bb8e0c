"""Reading classifier weights: safetensors, or PyTorch files without running any code in them.

What a file is, its first bytes say, not its name.

- `read_state_dict` reads names and tensors, `split_standardisation` takes mean and std out of them;
- `read_tensors` reads those of a safetensors file, its names unchanged, `read_header` its metadata;
- `require_finite` refuses NaN, infinities and tensors that are no plain arrays, `require_uncompressed`
  PyTorch files that would unpack to more than their size;
- `load_strict` loads them into a module whose names and shapes must all agree.
"""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from carso_cli.errors import WeightsError, nearest
from carso_cli.io.checksum import CHECKSUM_KEY, tensors_checksum

# Keys under which checkpoints keep the weights; the first that is there is taken.
_WRAPPERS = (
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "classifier", "module"),
    *("weights", "params", "parameters", "backbone", "student", "state_dict_ema", "model_ema", "ema"),
)
_MOST_WRAPPED = 3
# Of DataParallel and DDP, of torch.compile, of Lightning and others. In any order, as they can be nested;
# `0.` is that of nn.Sequential inside DataParallel, as in the files of Wang et al. (2023).
_PREFIXES = ("module.0.", "module.", "_orig_mod.", "model.", "net.", "network.", "classifier.")
_STANDARDISATION = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}
# (how a file begins, what it then is, what to do)
_KINDS = (
    (b"<", "is a web page, not weights", "open it in a browser to see why the download failed"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights", "fetch them with: git lfs pull"),
    (b"\x1f\x8b", "is compressed by gzip", "unpack it first"),
    (b"\x89HDF", "is an HDF5 file, as Keras writes", "load it in its own framework and save the tensors"),
    (b"\x93NUMPY", "is a NumPy array", "save a state dict, best as safetensors"),
)
_SHOWN = 8
_RESTORE = "restore the file from a copy, or train the classifier again"


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a safetensors or PyTorch file, whatever its name ends in.

    PyTorch files are read with `weights_only=True`: tensors and plain containers, never code. A state dict
    inside a checkpoint (`state_dict`, `model_state_dict`, `model` and other usual keys) is taken out, and
    prefixes that all names share (`module.`, `_orig_mod.`, `model.` and others) are removed.

    Returns:
        Names to tensors, on the CPU.

    Raises:
        WeightsError: If the file is damaged or of another kind, holds more than tensors, holds none, or holds
            values that are NaN or infinite; the message names the file and the tensor.
    """
    return require_finite(_unwrap(read_checkpoint(path), path), path)


def split_standardisation(
    state: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, tuple[float, ...]]]:
    """Split off the mean and standard deviation that a layer before the network holds in many files.

    Returns:
        The network's own tensors without the prefix that they share; `mean` and `std`, if both are there.
    """
    found = {name: _STANDARDISATION.get(name.rpartition(".")[2]) for name in state}
    beside = {kind: name for name, kind in found.items() if kind and state[name].numel() in (1, 3)}
    if set(beside) != {"mean", "std"}:
        return dict(state), {}
    rest = {name: tensor for name, tensor in state.items() if name not in beside.values()}
    heads = {name.partition(".")[0] for name in rest}
    if len(heads) == 1:
        rest = {name.partition(".")[2]: tensor for name, tensor in rest.items()}
    return rest, {kind: tuple(state[name].double().flatten().tolist()) for kind, name in beside.items()}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file, its names unchanged.

    Raises:
        WeightsError: If the file is damaged, or holds values that are NaN or infinite.
    """
    return require_finite(_read_safetensors(path), path)


def read_checkpoint(path: Path) -> Any:  # noqa: ANN401  (whatever the file holds)
    """Read whatever tensors and plain containers a file of weights holds, without running any code in it.

    Raises:
        WeightsError: If the file is damaged, or holds more than tensors and plain containers.
    """
    return _read_safetensors(path) if _is_safetensors(path) else _read_pytorch(path)


def _is_safetensors(path: Path) -> bool:
    """Return whether a file is safetensors by its first bytes, or by its name where those say nothing.

    Raises:
        WeightsError: If it is neither that nor a file of PyTorch; the message says what it is.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(64)
        size = path.stat().st_size
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror or error}") from error
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start:
        raise WeightsError(
            f"{path} is not a readable file of weights: it is empty (0 bytes)", hint="fetch it again"
        )
    for beginning, kind, hint in _KINDS:
        if text.startswith(beginning):
            raise WeightsError(f"{path} {kind}", hint=hint)
    # A zip file, or a pickle of protocol 2 or later.
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        return False
    # Eight bytes with the length of a header, which is JSON.
    framed = len(start) > 8 and int.from_bytes(start[:8], "little") <= size - 8 and start[8:9] == b"{"
    return framed or path.suffix == ".safetensors"


def require_finite(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return a state dict unchanged if it can be used.

    Raises:
        WeightsError: If it holds values that are NaN or infinite, or tensors that are no plain arrays,
            naming file and tensor.
    """
    for name, tensor in state.items():
        plain = (
            tensor.layout == torch.strided
            and tensor.device.type == "cpu"
            and not tensor.is_nested
            and not (tensor.is_floating_point() and tensor.element_size() < 2)
            # A view may claim any number of elements over a small storage.
            and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
        )
        if not plain:
            raise WeightsError(
                f"{path}: tensor '{name}' is no plain array of numbers in memory",
                hint="save plain tensors: dense, contiguous, of 16 bits or more",
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise WeightsError(f"{path}: tensor '{name}' holds values that are NaN or infinite")
    return state


def require_uncompressed(archive: ZipFile, path: Path) -> None:
    """Check that a PyTorch file is uncompressed, as those that PyTorch writes are.

    Raises:
        WeightsError: If a part of it is compressed.
    """
    # Before torch unpacks anything.
    if any(part.compress_type != ZIP_STORED for part in archive.infolist()):
        raise WeightsError(
            f"{path} holds compressed parts, which PyTorch does not write; it might unpack to any size",
            hint="load it where you trust it, and save the state dict again",
        )


def read_header(path: Path) -> dict[str, Any]:
    """Return the metadata of a safetensors file that carso wrote; empty for other files.

    Raises:
        WeightsError: If the file is damaged.
    """
    if not _is_safetensors(path):
        return {}
    try:
        with safe_open(path, framework="pt") as stream:
            metadata: Mapping[str, str] = stream.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        return {key: json.loads(value) for key, value in metadata.items()}
    except (ValueError, RecursionError) as error:
        # Only carso writes the key, and then every value as JSON.
        if CHECKSUM_KEY in metadata:
            raise WeightsError(f"{path} is damaged: unreadable header: {error}", hint=_RESTORE) from error
        # Other programs write plain text there.
        return {}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    header = read_header(path)
    try:
        tensors = load_file(path)
    # A damaged header may claim types and lengths that no tensor can have.
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error
    # Taken out first: the checksum covers the rest of the header.
    stored = header.pop(CHECKSUM_KEY, None)
    if stored is not None and stored != tensors_checksum(tensors, header):
        message = f"{path} is damaged: its contents do not match the checksum in its header"
        raise WeightsError(message, hint=_RESTORE)
    return tensors


def _read_pytorch(path: Path) -> Any:  # noqa: ANN401  (whatever the file holds)
    try:
        # Files from before torch 1.6 are plain pickles, which are never compressed.
        if is_zipfile(path):
            with ZipFile(path) as archive:
                _require_state_dict(archive, path)
                require_uncompressed(archive, path)
        # Its warnings are about old file formats, which it can read.
        with (
            warnings.catch_warnings(action="ignore"),
            torch.serialization.safe_globals(_harmless()),
            # Opened here: of a path torch believes the ending `.safetensors`.
            path.open("rb") as stream,
        ):
            return torch.load(stream, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # The file is no pickle at all.
        if "Unsupported operand" in str(error):
            message = f"{path} is not a readable PyTorch file: damaged, or of another kind"
            raise WeightsError(message) from error
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise WeightsError(
            f"{path} holds more than tensors{f' ({named[1]})' if named else ''}; reading it could run code, "
            "and is refused",
            hint="where you trust it, load it and save the state dict alone: "
            "torch.save(model.state_dict(), FILE)",
        ) from error
    # Before the handler of everything else, which would hide its hint.
    except WeightsError:
        raise
    # A damaged archive raises almost any kind of error.
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise WeightsError(f"{path} is not a readable PyTorch file: {reason}") from error


def _harmless() -> list[Any]:
    """Return what checkpoints hold beside tensors that runs no code: numbers of NumPy, parsed arguments."""
    kinds = [type(np.dtype(name)) for name in ("bool", "int32", "int64", "uint8", "float32", "float64")]
    scalar = np.float64(0).__reduce__()[0]
    # NumPy 2 moved it; files keep the name of their day.
    scalars = [(scalar, f"numpy.{home}.multiarray.scalar") for home in ("core", "_core")]
    return [*kinds, np.dtype, *scalars, argparse.Namespace]


def _require_state_dict(archive: ZipFile, path: Path) -> None:
    """Refuse archives that are no state dict of PyTorch, saying what they are."""
    inside = {name.partition("/")[2] for name in archive.namelist()}
    if any(name == "constants.pkl" or name.startswith("code/") for name in inside):
        raise WeightsError(
            f"{path} is a TorchScript archive: code and weights in one",
            hint="save its weights: torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')",
        )
    if "data.pkl" not in inside:
        raise WeightsError(
            f"{path} is a zip file without weights of PyTorch in it",
            hint="unpack it, and name the file of weights inside",
        )


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:  # noqa: ANN401  (whatever the file holds)
    for _ in range(_MOST_WRAPPED):
        if not isinstance(content, Mapping):
            break
        inner = [content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)]
        if not inner:
            break
        content = inner[0]
    if isinstance(content, Mapping):
        state = {str(name): value for name, value in content.items()}
        if state and all(isinstance(value, Tensor) for value in state.values()):
            return _without_prefixes(state)
    raise WeightsError(
        f"{path} holds no state dict: a mapping from names to tensors is needed, alone or as "
        f"'{_WRAPPERS[0]}', '{_WRAPPERS[1]}' or another usual key"
    )


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # All or none: a network may really have a child of that name.
    while shared := next((one for one in _PREFIXES if all(name.startswith(one) for name in state)), None):
        state = {name.removeprefix(shared): value for name, value in state.items()}
    return state


def load_strict(module: nn.Module, state: Mapping[str, Tensor], path: str | Path, *, keys: str) -> None:
    """Load a state dict whose names, shapes and kinds of numbers must all agree with the module's.

    Args:
        module: The module to fill.
        state: Names to tensors.
        path: Where they come from, for the message.
        keys: Keys of the recipe that decide the module's architecture, for the message.

    Raises:
        WeightsError: Listing what is missing, what is unexpected and which shapes and types differ; the
            module is then as it was.
    """
    expected = module.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    shapes, kinds = [], []
    for name in filter(state.__contains__, expected):
        given, wanted = state[name], expected[name]
        if given.shape != wanted.shape:
            shapes.append(f"{name} is {tuple(given.shape)}, not {tuple(wanted.shape)}")
        # The precision may differ, but not the sort of number.
        if given.is_complex() or given.is_floating_point() != wanted.is_floating_point():
            kinds.append(f"{name} is {_dtype(given)}, not {_dtype(wanted)}")
    problems = [
        _listing("missing", missing, unexpected),
        _listing("unexpected", unexpected, missing),
        _listing("of another shape", shapes, ()),
        _listing("of another type", kinds, ()),
    ]
    if any(problems):
        raise WeightsError(
            f"{path} does not fit the architecture:\n" + "\n".join(filter(None, problems)),
            hint=f"check {keys}, data.classes and data.channels in the recipe",
        )
    # Not before all is checked: torch would fill what fits and then raise.
    module.load_state_dict(dict(state))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _listing(title: str, names: Sequence[str], known: Sequence[str]) -> str:
    """Return one line: the number of names, and the first of them with the nearest known name of each."""
    if not names:
        return ""
    shown = []
    for name in names[:_SHOWN]:
        suggestion = nearest(name, known, limit=1)
        shown.append(f"{name} ({suggestion})" if suggestion else name)
    return f"{len(names)} {title}: {', '.join(shown)}{', …' if len(names) > _SHOWN else ''}"
