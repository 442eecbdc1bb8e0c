"""Freed memory stays with the process: a second pass over large blocks maps no page anew."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")

# Blocks of 64 MB, above every size that glibc keeps by default.
PROGRAM = """
import resource
from carso_cli.runtime.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        b'1' * 2**26
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

kept = keep_freed_memory()
for _ in range(4):  # the heap grows until its blocks fit
    faults()
print(kept, faults())
"""


def run(**variables: str) -> tuple[str, int]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", PROGRAM]
    found = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True)
    kept, faults = found.stdout.split()
    return kept, int(faults)


def test_freed_blocks_are_reused() -> None:
    kept, faults = run()
    if kept == "False":
        pytest.skip("the C library is not glibc")
    assert faults < 1000  # 3 blocks are 49,152 pages of 4 kB


def test_thresholds_of_the_environment_hold() -> None:
    kept, faults = run(MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == "False"
    assert faults > 20_000
