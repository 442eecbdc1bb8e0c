"""Checksums: a value that has changed on disk is an error, and never read as a number or a weight.

- `add_checksum`, `remove_checksum`: a JSON object with its checksum in it;
- `tensors_checksum`: of a file of tensors with metadata;
- `fingerprint`: of tensors alone, which identifies models and images;
- `file_digest`: of a whole file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carso_cli.errors import StateError

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUM_KEY = "seal"
"""Name under which a checksum is stored in the object or header that it covers."""

RESTORE = "restore the file from a copy, or compute it again"
"""Hint for a damaged file."""


def add_checksum(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with its checksum as last entry.

    Raises:
        ValueError: If a number is NaN or infinite.
    """
    return {**values, CHECKSUM_KEY: _digest(values)}


def remove_checksum(values: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return a JSON object without its checksum, once that is verified.

    Args:
        values: What was read.
        place: File, and line if it is one of many, for the message.

    Raises:
        StateError: If a value has changed since `add_checksum`, or there is no checksum.
    """
    plain = {key: value for key, value in values.items() if key != CHECKSUM_KEY}
    try:
        intact = values.get(CHECKSUM_KEY) == _digest(plain)
    except ValueError:
        # NaN or an infinity, which `add_checksum` refuses.
        intact = False
    if not intact:
        problem = "do not match their checksum" if CHECKSUM_KEY in values else "carry no checksum"
        raise StateError(f"{place} is damaged: its values {problem}", hint=RESTORE)
    return plain


def tensors_checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Return the checksum of tensors and of the metadata that is stored with them."""
    return _digest({"tensors": fingerprint(tensors), "metadata": dict(metadata)})


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of names, types, shapes and contents, independent of order and device."""
    # Not at the top: a report reads JSON files without loading torch.
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        # Contiguous: a strided tensor cannot be viewed as bytes.
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        # As bytes, since numpy has no bfloat16.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()


def file_digest(path: Path, algorithm: str = "sha256") -> str:
    """Return a file's checksum in hexadecimal digits; `algorithm` is a name of hashlib."""
    with path.open("rb") as stream:
        # Without `usedforsecurity=False`, FIPS systems refuse MD5, in which some checksums are published.
        return hashlib.file_digest(stream, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def _digest(values: Mapping[str, Any]) -> str:
    # Through JSON first, so that what is hashed equals what will be read: keys as texts, tuples as lists.
    plain = json.loads(json.dumps(values, allow_nan=False))
    # Sorted, so that the order of keys does not count.
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    # 128 bits suffice to find damage; without a key no length would stop a forger.
    return hashlib.sha256(text.encode()).hexdigest()[:32]
