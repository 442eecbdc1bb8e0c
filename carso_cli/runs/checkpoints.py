"""Tensors on disk: one safetensors file with typed metadata and a checksum in its header.

Nothing is ever unpickled. The checksum covers the metadata and the names, shapes and bytes of all tensors,
so a flipped bit is reported and never loaded.

- `save_tensors`, `load_tensors`: one file;
- `StateFile`: a state that is replaced now and then during a training, in the background, with the one before
  kept beside it; `load_state` reads it.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from carso_cli.errors import CarsoError, StateError
from carso_cli.io.checksum import CHECKSUM_KEY, RESTORE, tensors_checksum
from carso_cli.io.files import sync_folder
from carso_cli.io.json_files import write_atomically, writing
from carso_cli.runs.folder import previous_state
from carso_cli.runtime.reporter import Reporter


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and metadata atomically.

    Args:
        path: The safetensors file to replace.
        tensors: Names to tensors, any device.
        metadata: JSON-serialisable values; stored under their names, with a checksum added.

    Raises:
        CarsoError: If the file cannot be written; an earlier file is then intact.
    """
    _write(path, _copied(tensors), metadata)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # safetensors refuses tensors that share memory, as tied weights do: each is copied.
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def _write(path: Path, copied: dict[str, Tensor], metadata: Mapping[str, Any]) -> None:
    # The header of a safetensors file holds texts only.
    header = {key: json.dumps(value, allow_nan=False) for key, value in metadata.items()}
    header[CHECKSUM_KEY] = json.dumps(tensors_checksum(copied, metadata))
    # Not `save_file`, which writes in place: a kill would leave half a file.
    write_atomically(path, save(copied, metadata=header))


def save_npz(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors as NumPy arrays, and the metadata as JSON text under `metadata`, atomically.

    Raises:
        CarsoError: If the file cannot be written; an earlier file is then intact.
    """
    import numpy as np

    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
    buffer = BytesIO()
    np.savez(buffer, **arrays, metadata=np.array(json.dumps(metadata, allow_nan=False)))  # type: ignore[arg-type]
    write_atomically(path, buffer.getvalue())


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
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise StateError(f"{path} is not a readable safetensors file: {error}", hint=RESTORE) from error
    if metadata.pop(CHECKSUM_KEY, None) != tensors_checksum(tensors, metadata):
        raise StateError(
            f"{path} is damaged: its contents do not match the checksum in its header", hint=RESTORE
        )
    return tensors, metadata


class StateFile:
    """The newest state of a training, and the one before it.

    Whenever this is interrupted, `load_state` finds the newer or the older state undamaged.

    Args:
        path: Where the newest one is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._pending: Future[None] | None = None

    def save(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """Copy a state, then write and verify it in the background while training goes on.

        Args:
            tensors: Names to tensors, any device.
            metadata: JSON-serialisable values.

        Raises:
            CarsoError: As `wait`, about the state before: only one is written at a time.
        """
        self.wait()
        # Copied here, as the next step changes weights and metrics in place.
        copied, pool = _copied(tensors), ThreadPoolExecutor(1, "state")
        self._pending = pool.submit(self._replace, copied, copy.deepcopy(dict(metadata)))
        # Its thread ends with its work; Python waits for it before it exits.
        pool.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until the state that is being written is there.

        Raises:
            CarsoError: If it cannot be written, or is damaged when read back; the state before is intact.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self, metadata: Mapping[str, Any]) -> None:
        """Keep the metadata alone: nothing resumes from the tensors any more.

        Raises:
            CarsoError: If it cannot be written.
        """
        self.wait()
        save_tensors(self.path, {}, metadata)
        with writing(self.path):
            for old in (previous_state(self.path), self._fresh):
                old.unlink(missing_ok=True)

    @property
    def _fresh(self) -> Path:
        # A third name: until the new state is proven, both older ones stay.
        return self.path.with_name(f"next-{self.path.name}")

    def _replace(self, copied: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        path, fresh = self.path, self._fresh
        _write(fresh, copied, metadata)
        try:
            load_tensors(fresh)
        except StateError as error:
            raise CarsoError(
                f"{error.message}, though it was written just now: the disk may be failing",
                hint=f"free or replace the disk, then resume with --resume: {path} is intact",
            ) from error
        with writing(path):
            # Between the two renames `path` is missing, and `load_state` finds the state before. A state that
            # has been damaged since must not take the place of that one.
            if _is_intact(path):
                os.replace(path, previous_state(path))
            os.replace(fresh, path)
            # The renames too must outlast a power cut.
            sync_folder(path.parent)


def _is_intact(path: Path) -> bool:
    try:
        load_tensors(path)
    except StateError:
        return False
    return True


def load_state(path: Path, reporter: Reporter) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the newest undamaged state; None if none was ever saved.

    Args:
        path: Where `StateFile` puts the newest.
        reporter: Warned when the newest is damaged and the one before it is used.

    Raises:
        StateError: If every state there is is damaged, naming the files.
    """
    candidates = [one for one in (path, previous_state(path)) if one.exists()]
    # Kept for the warning or the error: an older state may be whole.
    damage: list[str] = []
    for candidate in candidates:
        try:
            found = load_tensors(candidate)
        except StateError as error:
            damage.append(error.message)
            continue
        if candidate != path:
            reason = damage[0] if damage else f"{path} does not exist"
            reporter.warning(f"{reason}; resuming from {candidate}, the state before it")
        return found
    if not candidates:
        return None
    raise StateError(
        "; ".join(damage),
        hint="restore a state from a copy, or train again into another folder with --run DIR",
    )
