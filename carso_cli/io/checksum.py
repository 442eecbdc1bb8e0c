"""Checksums: what has changed on disk is reported, and never read as a number or a weight.

- `seal`, `unseal`: a JSON object with its checksum in it;
- `tensor_seal`: the checksum of a file of tensors with metadata;
- `fingerprint`: of tensors alone, which is what models and images are told apart by.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from carso_cli.errors import StateError

if TYPE_CHECKING:
    from torch import Tensor

SEAL = "seal"
"""Name under which a checksum is stored in the object or header that it covers."""


def add_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its checksum as last entry.

    Raises:
        ValueError: If a number is NaN or infinite.
    """
    return {**values, SEAL: _digest(values)}


def remove_checksum(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return a sealed object without its checksum.

    Args:
        values: What was read.
        place: File, and line if it is one of many, for the message.

    Raises:
        StateError: If a value has changed since it was sealed, or it never was.
    """
    plain = {key: value for key, value in values.items() if key != SEAL}
    try:
        intact = values.get(SEAL) == _digest(plain)
    except ValueError:
        # A number that no file of ours can hold.
        intact = False
    if not intact:
        told = "do not match their checksum" if SEAL in values else "carry no checksum"
        raise StateError(
            f"{place} is damaged: its values {told}",
            hint="restore the file from a copy, or compute it anew",
        )
    return plain


def tensors_checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Return the checksum of tensors and the metadata that is stored with them, without the seal itself."""
    return _digest({"tensors": fingerprint(tensors), "metadata": dict(metadata)})


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and contents, independent of order and device."""
    # Not above: a report reads sealed JSON without waiting for torch.
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def _digest(values: Mapping[str, Any]) -> str:
    # By way of JSON, so that what is hashed on writing is what will be read: keys are texts, tuples lists.
    plain = json.loads(json.dumps(values, allow_nan=False))
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
