"""Each patch works, and each fault is still there: a test that fails says which patch can go."""

from __future__ import annotations

import subprocess
import sys

import pytest

from carso_cli.runtime import third_party

FAULTS = {
    "autoattack": ("import autoattack", "No module named 'autoattack'"),
    # torchvision's own fault comes first where both are present.
    "zero_gradients": (
        "from carso_cli.runtime.third_party import patches; patches()[2].apply(); import advertorch.attacks",
        "cannot import name 'zero_gradients'",
    ),
    "torchvision::nms": ("import torchvision", "operator torchvision::nms does not exist"),
}


def run(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, where nothing is patched yet."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def patch(name: str) -> third_party.Patch:
    return next(patch for patch in third_party.patches() if patch.name == name)


def test_every_patch_says_why_and_until_when() -> None:
    assert [patch.name for patch in third_party.patches()] == list(FAULTS)
    assert all(patch.reason and patch.until for patch in third_party.patches())


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_the_fault_is_still_there(name: str) -> None:
    if name == "torchvision::nms" and not patch(name).active:
        pytest.skip("torchvision's compiled operators load here")
    code, message = FAULTS[name]
    finished = run(code)
    assert finished.returncode != 0, f"the fault is gone: {name} can go from carso_cli/runtime/third_party.py"
    assert message in finished.stderr


@pytest.mark.slow
def test_imports_work_after_prepare() -> None:
    code = """
from carso_cli.runtime import third_party
third_party.prepare()
third_party.prepare()
import torchvision, torchvision.datasets, torchvision.transforms, torchvision.utils
import advertorch.attacks
import pyautoattack, autoattack, autoattack.state
assert autoattack.AutoAttack is pyautoattack.AutoAttack
from autoattack.state import EvaluationState
import torch
from torch.autograd.gradcheck import zero_gradients
x = torch.ones(2, requires_grad=True)
zero_gradients(x)
x.sum().backward()
zero_gradients(x)
assert x.grad.tolist() == [0, 0]
assert callable(torch.autograd.gradcheck)
import robustbench
assert 'Cui2023Decoupled_WRN-28-10' in robustbench.model_zoo.model_dicts[
    robustbench.model_zoo.enums.BenchmarkDataset.cifar_10
][robustbench.model_zoo.enums.ThreatModel.Linf]
"""
    finished = run(code)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""


def test_an_applied_patch_stays_listed_as_active() -> None:
    third_party.prepare()
    assert patch("autoattack").active
    assert not patch("autoattack").needed()
