"""`carso export`: programs that give the defence's own answers, without carso."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from carso_cli import load_defence
from carso_cli.build import classifier_fingerprint, load_images
from carso_cli.cli.app import run as carso
from carso_cli.defence.aggregation import RULES
from carso_cli.defence.defended_model import Defence
from carso_cli.defence.vae import Purifier
from carso_cli.errors import NumericsError, StateError, UsageError
from carso_cli.io.checksum import file_digest
from carso_cli.recipe.load import load_recipe
from carso_cli.runtime.reporter import SilentReporter
from carso_cli.tools import export as module
from carso_cli.tools.export import check_program, export_run, open_program, trace

SMALL = (
    "purifier.condition_features=12",
    "purifier.latent_features=4",
    "representation.layers=[layer.0.block.0.conv_1, layer.1.block.0.shortcut]",
)
NO_CARSO = """
import sys
sys.modules["carso_cli"] = None
import torch
program = torch.export.load(sys.argv[1]).module()
inputs = torch.load(sys.argv[2], weights_only=True)
torch.save(program(inputs["images"], inputs["latents"]), sys.argv[3])
"""


@pytest.fixture(scope="module")
def run(make_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "digits", *SMALL)


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return load_images(load_recipe("digits"), "test", limit=20).pixels(slice(0, 5))


@pytest.fixture(scope="module")
def out(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("programs")
    assert carso(["export", "--run", str(run), "--out", str(folder), "--n-samples", "3", "--json"]) == 0
    return folder


@pytest.fixture
def tiny() -> Defence:
    torch.manual_seed(1)
    classifier = nn.Sequential(nn.Conv2d(1, 2, 3, stride=8), nn.Flatten(), nn.Linear(32, 4))
    purifier = Purifier(
        {"0": (2, 4, 4)},
        channels=1,
        image_size=28,
        mean=[0.5],
        std=[0.5],
        condition_features=4,
        latent_features=2,
    )
    return Defence(classifier, purifier, ["0"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["defence.pt2", "defence.onnx"])
def test_programs_agree_with_the_defence(run: Path, out: Path, digits: Tensor, name: str) -> None:
    defence, program = load_defence(run, device="cpu", n_samples=3), open_program(out / name)
    for count in (1, 2, 5):
        images, latents = digits[:count], defence.draw_latents(count)
        found = program(images, latents)
        torch.testing.assert_close(found, defence(images, latents=latents), rtol=1e-4, atol=1e-4)
        # Neither input is baked in.
        for changed in ((images, latents + 1.0), (1.0 - images, latents)):
            assert (program(*changed) - found).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_can_be_traced(tiny: Defence, rule: str) -> None:
    tiny.aggregation = rule
    program = trace(tiny, (torch.rand(3, 1, 28, 28), tiny.draw_latents(3, 2))).module()
    images, latents = torch.rand(5, 1, 28, 28), tiny.draw_latents(5, 2)
    torch.testing.assert_close(program(images, latents), tiny(images, latents=latents), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_program_runs_without_carso(run: Path, out: Path, digits: Tensor, tmp_path: Path) -> None:
    defence = load_defence(run, device="cpu", n_samples=3)
    latents = defence.draw_latents(len(digits))
    torch.save({"images": digits, "latents": latents}, tmp_path / "inputs.pt")
    places = [str(out / "defence.pt2"), str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt")]
    subprocess.run([sys.executable, "-c", NO_CARSO, *places], check=True)
    found = torch.load(tmp_path / "outputs.pt", weights_only=True)
    torch.testing.assert_close(found, defence(digits, latents=latents), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_description_says_what_a_program_takes(run: Path, out: Path) -> None:
    stored = json.loads((out / "defence.json").read_text())
    assert stored["inputs"]["images"]["shape"] == ["batch", 3, 32, 32]
    assert stored["inputs"]["latents"]["shape"] == ["batch", 3, 4]
    assert stored["outputs"]["log_probabilities"]["shape"] == ["batch", 10]
    assert (stored["aggregation"], stored["n_samples"]) == ("doubly-exponential", 3)
    assert stored["classes"] == [str(digit) for digit in range(10)]
    assert stored["standardisation"] == {"mean": [0.3051] * 3, "std": [0.3238] * 3}
    assert stored["weights"]["classifier"] == classifier_fingerprint(load_defence(run).classifier)
    assert sorted(stored["files"]) == ["defence.onnx", "defence.pt2"]
    for name, facts in stored["files"].items():
        assert facts["sha256"] == file_digest(out / name)
        assert facts["largest_difference"] <= 1e-4


@pytest.mark.slow
def test_a_program_that_differs_is_removed(tiny: Defence, tmp_path: Path) -> None:
    inputs = torch.rand(3, 1, 28, 28), tiny.draw_latents(3, 2)
    path = tmp_path / "defence.pt2"
    torch.export.save(trace(tiny, inputs), path)
    assert check_program(path, tiny, inputs) <= 1e-4
    tiny.get_parameter("classifier.2.bias")[0] += 1e-2
    with pytest.raises(
        NumericsError, match=r"defence\.pt2 gives other log-probabilities.*0\.0001 is allowed"
    ):
        check_program(path, tiny, inputs)
    assert not path.exists()


@pytest.mark.slow
def test_the_command_where_onnx_is_missing(
    run: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Tracing again would take seconds and show nothing new.
    monkeypatch.setattr(module, "trace", lambda *_: torch.export.load(out / "defence.pt2"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    assert carso(["export", "--run", str(run), "--out", str(tmp_path), "--n-samples", "3"]) == 0
    shown = capsys.readouterr().out
    assert "latents: batch x 3 x 4, independent standard normal draws" in shown
    assert "for ONNX as well: pip install 'carso[onnx]'" in shown
    assert sorted(path.name for path in tmp_path.iterdir()) == ["defence.json", "defence.pt2"]
    assert carso(["export", "--run", str(tmp_path / "nowhere")]) == StateError.exit_code


@pytest.mark.slow
def test_weights_beyond_what_onnx_holds(
    run: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "trace", lambda *_: torch.export.load(out / "defence.pt2"))
    monkeypatch.setattr(module, "_LARGEST_ONNX", 1000)
    with pytest.raises(UsageError, match=r"at most 2 GB; the defence's weights are 0\.0 GB"):
        export_run(run, out=tmp_path, reporter=SilentReporter(), n_samples=3)
