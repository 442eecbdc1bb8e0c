"""The script that measures on a GPU runs from end to end on a CPU, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "gpu_check.py"


@pytest.mark.slow
def test_every_phase_runs_and_stores_its_figures(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--cpu", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in (tmp_path / "phases.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["status"]) for line in lines] == [
        (phase, "done")
        for phase in ("machine", "tests", "agreement", "bench", "steps", "checkpoint", "train", "audit")
    ], lines
    assert done.returncode == 0, done.stderr
    found = {line["phase"]: line for line in lines}
    assert found["machine"]["tflops_bf16"] > 0
    assert found["tests"]["rc"] == 0
    # On a CPU both sides are the CPU.
    for name in ("loss", "gradient", "start"):
        assert found["agreement"][f"{name}_relative_difference"] == 0
    assert found["agreement"]["out_of_memory_passes"] == [8, 4, 2, *[1] * 8]
    assert found["agreement"]["sync_batch_norm_difference"] < 1e-5
    assert 0 < found["checkpoint"]["waits_seconds"] < found["checkpoint"]["written_seconds"]
    assert found["audit"].keys() >= {"classifier", "defence"}
