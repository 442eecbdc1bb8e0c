"""What a run ran on: versions, device, threads, peak memory."""

from __future__ import annotations

import platform
import resource
import sys
from importlib import metadata
from typing import Any

import torch

from carso_cli import __version__

_LIBRARIES = (
    "torch",
    "torchvision",
    "advertorch",
    "pyautoattack",
    "robustbench",
    "safetensors",
    "numpy",
    "scikit-learn",
)


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Return versions and hardware as JSON-serialisable values."""
    versions: dict[str, str | None] = {}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            versions[library] = None
    return {
        "carso": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": versions,
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: allocated on the GPU, or resident in this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
