"""Each remedy works, and each fault is still there: a test that fails says which remedy can go."""

from __future__ import annotations

import subprocess
import sys

import pytest

from carso_cli.errors import MissingError
from carso_cli.runtime import third_party

pytestmark = pytest.mark.slow  # each starts an interpreter, where nothing is patched yet

NAMES = ("autoattack", "zero_gradients", "torchvision::nms", "pkg_resources", "Swish")


def run(code: str, *, warnings: str = "ignore") -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter, where nothing is mended yet."""
    return subprocess.run(
        [sys.executable, "-W", warnings, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )


def assert_fault(code: str, message: str, *, warnings: str = "ignore") -> None:
    finished = run(code, warnings=warnings)
    assert finished.returncode != 0, "the fault is gone: its entry in carso_cli/runtime/third_party.py can go"
    assert message in finished.stderr


def assert_passes(code: str, *, warnings: str = "ignore") -> None:
    finished = run(code, warnings=warnings)
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""


def entry(name: str) -> third_party.Patch:
    return next(entry for entry in third_party.patches() if entry.name == name)


SWISH_GRADIENT = """
import torch
from robustbench.model_zoo.architectures import dm_wide_resnet as zoo
x = torch.linspace(-6, 6, 101, requires_grad=True)
{enter}
(gradient,) = torch.autograd.grad(zoo.Swish()(x).sum(), x)
sigmoid = x.sigmoid()
torch.testing.assert_close(gradient, sigmoid * (1 + x * (1 - sigmoid)))
"""


def test_every_entry_says_why_and_until_when() -> None:
    assert tuple(entry.name for entry in third_party.patches()) == NAMES
    assert all(entry.reason and entry.until for entry in third_party.patches())


def test_autoattack_is_still_absent() -> None:
    assert_fault("import autoattack", "No module named 'autoattack'")


def test_advertorch_still_imports_zero_gradients() -> None:
    assert_fault(
        # Apart from torchvision's own fault, which advertorch may run into first.
        "from carso_cli.runtime.third_party import patches; patches()[2].apply(); import advertorch.attacks",
        "cannot import name 'zero_gradients'",
    )


def test_torchvision_still_needs_its_operators() -> None:
    if not entry("torchvision::nms").active:
        pytest.skip("torchvision's compiled operators load here")
    assert_fault("import torchvision", "operator torchvision::nms does not exist")


def test_robustbench_still_imports_pkg_resources() -> None:
    code = """
import sys
from carso_cli.runtime import third_party
third_party.prepare()
sys.modules["pkg_resources"] = None
import robustbench.loaders
"""
    assert_fault(code, "pkg_resources")


def test_swish_still_reads_saved_variables() -> None:
    code = (
        "from carso_cli.runtime import third_party; third_party.prepare()\nimport warnings"
        + SWISH_GRADIENT.format(enter="warnings.simplefilter('error')")
    )
    assert_fault(code, "saved_variables")


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
"""
    assert_passes(code)


def test_robustbench_imports_without_a_warning_and_its_swish_has_a_gradient() -> None:
    code = """
from carso_cli.runtime import third_party
assert third_party.import_robustbench() is third_party.import_robustbench()
import robustbench
assert 'Cui2023Decoupled_WRN-28-10' in robustbench.model_zoo.model_dicts[
    robustbench.model_zoo.enums.BenchmarkDataset.cifar_10
][robustbench.model_zoo.enums.ThreatModel.Linf]
""" + SWISH_GRADIENT.format(enter="")
    assert_passes(code, warnings="error")


def test_a_mended_fault_stays_listed_as_active() -> None:
    third_party.prepare()
    assert entry("autoattack").active
    assert not entry("autoattack").needed()


def test_setuptools_without_pkg_resources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingError, match="setuptools 81") as caught:
        entry("pkg_resources").apply()
    assert caught.value.hint == "pip install 'setuptools<81'"
    assert caught.value.exit_code == 3
