"""Fetching RobustBench's weights from Google Drive, where RobustBench keeps them."""

from __future__ import annotations

import os
from pathlib import Path

from carso_cli.errors import WeightsError


def source_address(gdrive_id: str) -> str:
    """Return the address at which a browser finds a file."""
    return f"https://drive.google.com/file/d/{gdrive_id}"


def download_weights(gdrive_id: str, destination: Path) -> Path:
    """Fetch one file, whole or not at all.

    Args:
        gdrive_id: Its id on Google Drive.
        destination: Where it belongs; folders are made.

    Returns:
        `destination`.

    Raises:
        WeightsError: If it cannot be fetched or written.
    """
    partial = destination.with_name(f".{destination.name}.{os.getpid()}.part")
    try:
        # Comes with robustbench; its import takes a second that only a download is worth.
        import gdown  # type: ignore[import-untyped]  # it has no types

        destination.parent.mkdir(parents=True, exist_ok=True)
        if gdown.download(id=gdrive_id, output=str(partial), quiet=True) is None:
            raise OSError("the server sent no file")
        os.replace(partial, destination)
    # gdown and the network below it raise many kinds.
    except Exception as error:
        partial.unlink(missing_ok=True)
        raise WeightsError(
            f"cannot download {source_address(gdrive_id)}: {error}",
            hint=f"fetch it by a browser and save it as {destination}",
        ) from error
    return destination
