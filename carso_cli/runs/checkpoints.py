"""Tensors on disk: one safetensors file with typed metadata and a checksum in its header.

Nothing is ever unpickled. The checksum covers names, shapes and bytes of all tensors, so a flipped
bit is reported and never loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from carso_cli.errors import StateError
from carso_cli.runs.files import write_atomically


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and contents, independent of order and device."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and metadata atomically.

    Args:
        path: The safetensors file to replace.
        tensors: Names to tensors, any device.
        metadata: JSON-serialisable values; stored under their names, with `checksum` added.

    Raises:
        CarsoError: If the file cannot be written; an earlier file is then intact.
    """
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {key: json.dumps(value, allow_nan=False) for key, value in metadata.items()}
    header["checksum"] = json.dumps(fingerprint(plain))
    write_atomically(path, save(plain, metadata=header))


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what `save_tensors` wrote.

    Returns:
        Tensors on the CPU, and the metadata.

    Raises:
        StateError: If the file is absent, is no safetensors file, or its checksum does not match.
    """
    if not path.is_file():
        raise StateError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118  (not a dict)
            metadata = {key: json.loads(value) for key, value in (stream.metadata() or {}).items()}
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise StateError(f"{path} is not a readable safetensors file: {error}") from error
    if metadata.get("checksum") != fingerprint(tensors):
        raise StateError(
            f"{path} is damaged: its contents do not match the checksum in its header",
            hint="restore the file from a copy, or train again into another folder with --run DIR",
        )
    return tensors, metadata
