"""Write a trained defence as programs that run without carso: torch.export's, and ONNX.

    result = export_run(Path("runs/digits"), out=Path("programs"), reporter=reporter)
    result["files"]["defence.pt2"]["largest_difference"]

Images and latents are inputs, so a program is deterministic. It takes any number of images at once; N, the
number of samples, is fixed. Each program's output is compared with the defence's before it is kept.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from carso_cli import __version__
from carso_cli.build import classifier_fingerprint, load_defence
from carso_cli.defence.defended_model import Defence
from carso_cli.errors import NumericsError, UsageError
from carso_cli.io.checksum import file_digest, fingerprint
from carso_cli.io.json_files import ensure_folder, write_atomically, write_json
from carso_cli.recipe.load import load_recipe
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.description import class_names
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import Reporter
from carso_cli.runtime.seed import generator
from carso_cli.tools.target import given_classifier

TOLERANCE = 1e-4
"""Largest difference of a program's log P from the defence's, relative where |log P| is above 1."""

_ONNX_LIBRARIES = ("onnx", "onnxscript", "onnxruntime")
# The keys are arguments of `_Deterministic.forward`. The batch alone is free: N stays as traced.
_BATCH = {"images": {0: Dim("batch")}, "latents": {0: Dim("batch")}}
# protobuf, the format of ONNX files, counts bytes in signed 32-bit integers.
_LARGEST_ONNX = 2**31


class _Deterministic(nn.Module):
    """The defence with latents as an input, (B, channels, H, W) and (B, N, Z) to log P, (B, C)."""

    def __init__(self, defence: Defence) -> None:
        super().__init__()
        # Contiguous memory: whatever reads the file need not support channels-last.
        self.defence = copy.deepcopy(defence).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def forward(self, images: Tensor, latents: Tensor) -> Tensor:
        log_probabilities: Tensor = self.defence(images, latents=latents)
        return log_probabilities


def export_run(
    run: Path,
    *,
    out: Path,
    reporter: Reporter,
    n_samples: int | None = None,
    aggregation: str | None = None,
    classifier: str | None = None,
) -> dict[str, Any]:
    """Write a run's defence as programs, with a description of them.

    `defence.pt2` is torch.export's, `defence.onnx` is written where the `onnx` extra is installed, and
    `defence.json` says what they take and give.

    Args:
        run: Run folder of `carso train-purifier` or `carso import-release`.
        out: Folder to write to; it is made.
        reporter: Where progress goes.
        n_samples: N, reconstructions per image; the recipe's when None.
        aggregation: Aggregation rule; the recipe's when None.
        classifier: What names the run's classifier, where its recipe names none; see `load_target`.

    Returns:
        The content of `defence.json`, with `out` added.

    Raises:
        StateError: If the run is absent, unfinished or damaged.
        NumericsError: If a program's outputs are not those of the defence.
        CarsoError: If the folder cannot be written.
    """
    given = given_classifier(classifier, reporter=reporter)
    defence = load_defence(run, device="cpu", n_samples=n_samples, aggregation=aggregation, classifier=given)
    # Whoever runs the program chooses its precision.
    defence.precision = "fp32"
    recipe = load_recipe(str(RunFolder(run).recipe.resolve()))
    ensure_folder(out)
    source, size = generator(recipe.seed, "export"), recipe.data.image_size
    # Three images, since torch.export takes a batch of one for a constant.
    images = torch.rand(3, recipe.data.channels, size, size, generator=source)
    inputs = images, defence.draw_latents(3, generator=source)
    reporter.info("tracing the defence")
    program = trace(defence, inputs)
    forms = {"defence.pt2": _torch_bytes}
    if all(importlib.util.find_spec(name) is not None for name in _ONNX_LIBRARIES):
        forms["defence.onnx"] = _onnx_bytes
    files = {}
    for name, serialise in forms.items():
        reporter.info(f"writing {out / name}")
        write_atomically(out / name, serialise(program))
        # The written file is read back: what is checked is what is kept.
        difference = check_program(out / name, defence, inputs)
        files[name] = {"sha256": file_digest(out / name), "largest_difference": difference}
    facts = _facts(defence, recipe, class_names(RunFolder(run), recipe)) | {"files": files}
    write_json(out / "defence.json", facts)
    return {"out": str(out), **facts}


def trace(defence: Defence, inputs: tuple[Tensor, Tensor]) -> ExportedProgram:
    """Trace a defence into a program that takes any number of images.

    Args:
        defence: The defence.
        inputs: Example images (B, channels, H, W) and latents (B, N, Z), with B from 2.
    """
    # Hooks record the representation, which only the non-strict tracer follows.
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        return torch.export.export(_Deterministic(defence), inputs, dynamic_shapes=_BATCH, strict=False)


def _torch_bytes(program: ExportedProgram) -> bytes:
    stream = io.BytesIO()
    torch.export.save(program, stream)
    return stream.getvalue()


def _onnx_bytes(program: ExportedProgram) -> bytes:
    weights = sum(tensor.nbytes for tensor in program.state_dict.values())
    if weights >= _LARGEST_ONNX:
        raise UsageError(f"an ONNX file holds at most 2 GB; the defence's weights are {weights / 1e9:.1f} GB")
    with warnings.catch_warnings(action="ignore"):
        converted: Any = torch.onnx.export(
            program,
            dynamo=True,
            input_names=["images", "latents"],
            output_names=["log_probabilities"],
            dynamic_shapes=_BATCH,
            verbose=False,
        )
    content: bytes = converted.model_proto.SerializeToString()
    return content


def open_program(path: Path) -> Callable[[Tensor, Tensor], Tensor]:
    """Load an exported program, to be called with (B, channels, H, W) images and (B, N, Z) latents."""
    if path.suffix == ".onnx":
        # Here, since it comes with the extra `onnx` only.
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda images, latents: torch.from_numpy(
            session.run(None, {"images": images.numpy(), "latents": latents.numpy()})[0]
        )
    return torch.export.load(path).module()


def check_program(path: Path, defence: Defence, inputs: tuple[Tensor, Tensor]) -> float:
    """Compare a program with the defence, for one image and for all that are given.

    Args:
        path: The program.
        defence: What it was traced from.
        inputs: Images (B, channels, H, W) and latents (B, N, Z).

    Returns:
        The largest difference, as `TOLERANCE` measures it.

    Raises:
        NumericsError: If it is above `TOLERANCE`; the program is then removed.
    """
    program, difference = open_program(path), 0.0
    # One image alone shows whether the size of the batch was traced as a constant.
    for count in (1, len(inputs[0])):
        images, latents = (values[:count] for values in inputs)
        expected = defence(images, latents=latents)
        scale = expected.abs().clamp(min=1.0)
        difference = max(difference, ((program(images, latents) - expected).abs() / scale).max().item())
    if not difference <= TOLERANCE:  # NaN compares false
        path.unlink()
        raise NumericsError(
            f"{path.name} gives other log-probabilities than the defence: {difference:.1e} apart, "
            f"{TOLERANCE} is allowed; it was removed"
        )
    return difference


def _facts(defence: Defence, recipe: Recipe, classes: tuple[str, ...]) -> dict[str, Any]:
    data = recipe.data

    def tensor(shape: list[int | str], values: str) -> dict[str, Any]:
        return {"shape": shape, "type": "float32", "values": values}

    return {
        "carso": __version__,
        "recipe": recipe.name,
        "inputs": {
            "images": tensor(
                ["batch", data.channels, data.image_size, data.image_size],
                "pixels in [0, 1]; the program standardises them itself",
            ),
            "latents": tensor(
                ["batch", defence.n_samples, defence.latent_features],
                "independent standard normal draws, fresh for each image",
            ),
        },
        "outputs": {
            "log_probabilities": tensor(["batch", data.classes], "natural logarithms of probabilities")
        },
        "standardisation": {"mean": list(data.mean), "std": list(data.std)},
        "aggregation": defence.aggregation,
        "n_samples": defence.n_samples,
        "classes": list(classes),
        "weights": {
            "classifier": classifier_fingerprint(defence.classifier),
            "purifier": fingerprint(defence.purifier.state_dict()),
        },
    }
