"""Live views of a training: TensorBoard and Weights & Biases, both optional packages.

A training tells its reporter what it measures, step by step and epoch by epoch. The reporter that `tracked`
gives writes that for a viewer, and passes everything else on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from carso_cli.errors import MissingError, UsageError, nearest
from carso_cli.io.json_files import ensure_folder
from carso_cli.recipe.schema import Recipe
from carso_cli.runs.folder import RunFolder
from carso_cli.runtime.reporter import Progress, Reporter


class _Viewer(Protocol):
    def figures(self, values: Mapping[str, float], step: int) -> None: ...

    def picture(self, name: str, image: Tensor, step: int) -> None: ...

    def close(self) -> None: ...


@contextmanager
def tracked(reporter: Reporter, names: Sequence[str], run: str | Path, recipe: Recipe) -> Iterator[Reporter]:
    """Give a reporter that also logs a training into its run folder, for each of the named viewers.

    Args:
        reporter: Where everything else goes.
        names: Of `VIEWERS`; without any, `reporter` itself is given.
        run: Run folder; nothing is written before the first step.
        recipe: What is trained.

    Raises:
        UsageError: If a name is unknown.
        MissingError: If the package of one is not installed.
    """
    for name in names:
        if name not in VIEWERS:
            known = " and ".join(VIEWERS)
            raise UsageError(f"{name!r} shows no training; {known} do", hint=nearest(name, VIEWERS))
    if not names:
        yield reporter
        return
    tracking = _Tracking(reporter, [VIEWERS[name](Path(run), recipe) for name in dict.fromkeys(names)])
    try:
        yield tracking
    finally:
        # Also after an interruption: what was measured up to it is not measured again.
        tracking.close()


class _Tracking:
    """A reporter that shows figures and pictures to viewers, and passes everything else on."""

    def __init__(self, reporter: Reporter, viewers: Sequence[_Viewer]) -> None:
        self._reporter, self._viewers = reporter, viewers

    def info(self, message: str) -> None:
        self._reporter.info(message)

    def warning(self, message: str) -> None:
        self._reporter.warning(message)

    def progress(
        self, description: str, total: int, unit: str = "images"
    ) -> AbstractContextManager[Progress]:
        return self._reporter.progress(description, total, unit)

    def measured(self, figures: Mapping[str, float], step: int) -> None:
        for viewer in self._viewers:
            viewer.figures(figures, step)

    def pictured(self, name: str, draw: Callable[[], Tensor], step: int) -> None:
        image = draw()
        for viewer in self._viewers:
            viewer.picture(name, image, step)

    def close(self) -> None:
        for viewer in self._viewers:
            viewer.close()


class _TensorBoard:
    def __init__(self, run: Path, recipe: Recipe) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise _missing("tensorboard", error) from error
        self._open: Callable[..., Any] = SummaryWriter
        self._folder, self._writer = RunFolder(run), None

    def _at(self, step: int) -> Any:  # noqa: ANN401  (an optional package's own type)
        if self._writer is None:
            folder = ensure_folder(self._folder.inside("tensorboard"))
            # Of a resumed training, the steps that are taken again replace the first ones.
            self._writer = self._open(str(folder), purge_step=step)
        return self._writer

    def figures(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._at(step).add_scalar(name, value, step)

    def picture(self, name: str, image: Tensor, step: int) -> None:
        self._at(step).add_image(name, image, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _WandB:
    def __init__(self, run: Path, recipe: Recipe) -> None:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise _missing("wandb", error) from error
        self._wandb: Any = wandb
        self._folder, self._recipe, self._run = RunFolder(run), recipe, None

    def _opened(self) -> Any:  # noqa: ANN401  (an optional package's own type)
        if self._run is None:
            # It writes into a folder of its own name, which must not lead out of the run.
            self._folder.inside("wandb")
            self._run = self._wandb.init(
                project="carso",
                name=self._folder.path.name,
                dir=str(self._folder.path),
                config=self._recipe.model_dump(mode="json"),
            )
        return self._run

    def figures(self, values: Mapping[str, float], step: int) -> None:
        self._opened().log(dict(values), step=step)

    def picture(self, name: str, image: Tensor, step: int) -> None:
        pixels = image.mul(255).round().byte().permute(1, 2, 0).cpu().numpy()
        self._opened().log({name: self._wandb.Image(pixels)}, step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def _missing(name: str, error: ModuleNotFoundError) -> MissingError:
    return MissingError(f"--log {name} needs {name}: {error}", hint=f"pip install 'carso[{name}]'")


VIEWERS: dict[str, Callable[[Path, Recipe], _Viewer]] = {"tensorboard": _TensorBoard, "wandb": _WandB}
"""Where a training can be followed, by name."""
