"""RobustBench's model zoo: its architectures, with weights that are read without running any code in them.

    found = find_entry("Wong2020Fast", dataset="cifar10", norm="linf")
    model = load_zoo_model(found, reporter=reporter)

The robustbench package gives the architectures and says where the weights are published; it would read them
with `pickle`, which runs what a file asks for. Here they are downloaded by `carso_cli.io.download` to
CARSO_HOME's `weights` folder, in the layout in which RobustBench caches them (`cifar10/Linf/NAME.pt`), and
read by `carso_cli.classifiers.weights`. Files in `./models`, RobustBench's own cache, are found too.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from carso_cli.classifiers.weights import load_strict, read_checkpoint, read_state_dict, require_finite
from carso_cli.errors import CarsoError, MissingError, UsageError, WeightsError, nearest
from carso_cli.io.download import fetch, recorded_problem
from carso_cli.io.paths import weights_home
from carso_cli.runtime.reporter import Reporter
from carso_cli.runtime.third_party import import_robustbench, prepare, quiet

ZOO = "robustbench:"
"""What the name of a model of the zoo begins with, where other things may be named too."""
DATASETS = ("cifar10", "cifar100", "imagenet")
NORMS = {"linf": "Linf", "l2": "L2"}
"""Our names of the threat models -> RobustBench's."""

# Without `confirm`, a web page comes first that asks whether to go on without a virus scan.
DRIVE = "https://drive.usercontent.google.com/download?id={}&export=download&confirm=t"
DRIVE_PAGE = "https://drive.google.com/file/d/{}"

_STANDARDISATION = ("mu", "sigma", "mean", "std")
"""Buffers of the architecture that many published files lack; the architecture's own values hold."""
_LEFT_OVER = ("model_preact_hl1.", "scores")
"""Parts of training that published files hold and the architecture does not have."""
_LAST = ("Kireev2021Effectiveness", "Andriushchenko2020Understanding")
_SWIN = ("Liu2023Comprehensive_Swin", "Mo2022When_Swin", "RodriguezMunoz2024Characterizing_Swin")
_PREFIXED_ALREADY = (
    *("Singh2023Revisiting_", "Peng2023Robust", "Chen2024Data_WRN_50_2", "Xu2024MIMIR_Swin-"),
)


@dataclass(frozen=True)
class ZooEntry:
    """One model of the zoo.

    Args:
        name: Its key.
        dataset: One of `DATASETS`.
        threat: `Linf` or `L2`.
        files: Where each file of weights is published: an id of Google Drive, or an address.
        build: Returns the untrained architecture.
        library: Name in timm, where the architecture is registered there; its parts then lie in `model`.
    """

    name: str
    dataset: str
    threat: str
    files: tuple[str, ...]
    build: Callable[[], nn.Module]
    library: str = ""

    @property
    def reference(self) -> str:
        """What names it without doubt: `cifar10/Linf/NAME`."""
        return f"{self.dataset}/{self.threat}/{self.name}"

    def paths(self) -> list[Path]:
        """Return where each file of weights belongs, relative to the folder of all weights."""
        folder = Path(self.dataset) / self.threat
        if self.library:
            return [folder / f"{self.name}.pth.tar"]
        if len(self.files) == 1:
            return [folder / f"{self.name}.pt"]
        return [folder / f"{self.name}.pt_m{place}.pt" for place in range(len(self.files))]


def find_entry(reference: str, *, dataset: str | None = None, norm: str | None = None) -> ZooEntry:
    """Find a model of the zoo.

    Args:
        reference: `NAME`, or `DATASET/THREAT/NAME` such as `cifar10/Linf/Wong2020Fast`.
        dataset: Data set that is attacked, which decides where a name stands for several models.
        norm: `linf` or `l2`, likewise.

    Raises:
        UsageError: If there is none of that name, or several that nothing tells apart.
        MissingError: If robustbench cannot be imported.
    """
    zoo = _zoo()
    parts = reference.split("/")
    if len(parts) == 3:
        place = (parts[0].lower(), NORMS.get(parts[1].lower(), parts[1]))
        if place not in zoo:
            known = ", ".join("/".join(each) for each in zoo)
            raise UsageError(f"robustbench has no models for {'/'.join(place)}", hint=f"it has {known}")
        candidates = {place: zoo[place]}
    else:
        candidates = zoo
    name = parts[-1]
    found = [place for place, models in candidates.items() if name in models]
    if not found:
        names = sorted({key for models in candidates.values() for key in models})
        where = f" for {'/'.join(parts[:2])}" if len(parts) == 3 else ""
        raise UsageError(
            f"robustbench has no model '{name}'{where}",
            hint=nearest(name, names) or f"it has {len(names)}, such as {', '.join(names[:3])}",
        )
    for wanted, part in ((dataset, 0), (NORMS.get(norm or ""), 1)):
        # A preference, and no condition: a model may be attacked in another norm than it was trained for.
        narrowed = [place for place in found if place[part] == wanted]
        found = narrowed or found
    if len(found) > 1:
        every = " or ".join(f"robustbench:{'/'.join(place)}/{name}" for place in found)
        raise UsageError(f"robustbench has {len(found)} models '{name}'", hint=f"name one: {every}")
    return _entry(found[0], name, candidates[found[0]][name])


def _zoo() -> dict[tuple[str, str], Mapping[str, Any]]:
    """Return (data set, threat) -> name -> RobustBench's own entry."""
    import_robustbench()
    with quiet():
        from robustbench.model_zoo import model_dicts
    return {
        (dataset.value, threat.value): models
        for dataset, threats in model_dicts.items()
        for threat, models in threats.items()
        if dataset.value in DATASETS and threat.value in NORMS.values()
    }


def _entry(place: tuple[str, str], name: str, found: Mapping[str, Any]) -> ZooEntry:
    dataset, threat = place
    library = f"{name}_{dataset}_{threat}".lower().replace("-", "_")
    with quiet():
        import timm

        if timm.is_model(library):
            from robustbench.model_zoo.architectures import xcit

            # RobustBench's own entry names an architecture that timm does not have.
            url = xcit.default_cfgs[library]["url"]
            return ZooEntry(
                name, dataset, threat, (url,), lambda: timm.create_model(library, pretrained=False), library
            )
    given = found["gdrive_id"]
    files = tuple(given) if isinstance(given, list) else (given,) if given else ()
    return ZooEntry(name, dataset, threat, files, found["model"])


def load_zoo_model(entry: ZooEntry, *, reporter: Reporter) -> nn.Module:
    """Build a model of the zoo and load its weights, frozen and in evaluation mode.

    Args:
        entry: What `find_entry` found.
        reporter: Where progress of a download goes.

    Returns:
        The model: (B, 3, H, W) images in [0, 1] to (B, C) scores.

    Raises:
        MissingError: If weights are neither here nor can be downloaded.
        WeightsError: If a file is damaged, fits another architecture, or could only be read by running code.
    """
    prepare()
    with quiet(), _library_weights(reporter):
        try:
            model = entry.build()
        except CarsoError:
            raise
        # The code of others may fail in any way; the user needs to know whose it was.
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise MissingError(f"robustbench fails to build {entry.reference}: {reason}") from error
    # These come with torchvision's own weights, which building has loaded.
    if entry.dataset == "imagenet" and "Standard" in entry.name:
        return model.eval().requires_grad_(False)
    if not entry.files:
        raise MissingError(f"robustbench does not say where the weights of {entry.reference} are published")
    for place, (relative, published) in enumerate(zip(entry.paths(), entry.files, strict=True)):
        path = _obtain(entry, relative, published, reporter)
        _load_part(model, entry, place, path)
    return model.eval().requires_grad_(False)


def _obtain(entry: ZooEntry, relative: Path, published: str, reporter: Reporter) -> Path:
    """Return the path of a file of weights, downloaded where it is not here."""
    places = (weights_home() / relative, Path("models") / relative)
    path = next((each for each in places if each.is_file()), places[0])
    if not path.is_file():
        is_address = "://" in published
        url = published if is_address else DRIVE.format(published)
        page = "" if is_address else DRIVE_PAGE.format(published)
        fetch(url, path, name=f"robustbench's {entry.reference}", reporter=reporter, page=page)
    if problem := recorded_problem(path):
        raise WeightsError(f"{path}: {problem}")
    return path


def _load_part(model: nn.Module, entry: ZooEntry, place: int, path: Path) -> None:
    """Load one file into the part of the model that it belongs to, as RobustBench does."""
    content = _checkpoint(path)
    if len(entry.files) == 1:
        _load(model, _single_state(model, entry, content, path), entry, path)
    elif entry.name.startswith("Bai2023Improving"):
        mixed: Any = model.get_submodule("comp_model")
        if place < 2:
            _load(mixed.models[place], _plain_state(content, path), entry, path)
        else:
            parts = content.get("state_dict", content)
            for name, module in (("model", mixed.policy_net), ("bn", mixed.bn)):
                _load(module, _plain_state(parts[name], path), entry, path)
    elif entry.name.startswith("Bai2024MixedNUTS"):
        state = _plain_state(content, path)
        part = model.get_submodule("std_model" if place == 0 else "rob_model")
        if place == 1 and entry.dataset == "imagenet":
            state = _prefixed(_swin_names(state, part.get_submodule("model")))
        _load(part, state, entry, path)
    else:
        ensemble = model.get_submodule("models")
        _load(list(ensemble.children())[place], _plain_state(content, path), entry, path)


def _checkpoint(path: Path) -> Any:  # noqa: ANN401  (whatever the file holds)
    """Read a checkpoint; plain numbers of numpy, such as an accuracy, are let through beside tensors."""
    kinds = [np.dtype, *(type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?"))]
    # The function by which numpy's numbers are stored, under whichever of its two names a file has it.
    scalar: Any = np.float64(0).__reduce__()[0]
    allowed = [*kinds, scalar, (scalar, "numpy.core.multiarray.scalar")]
    with torch.serialization.safe_globals(allowed):
        return read_checkpoint(path)


def _plain_state(content: Any, path: Path) -> dict[str, Tensor]:  # noqa: ANN401  (whatever the file holds)
    """Return names to tensors, without the prefixes of wrappers.

    Raises:
        WeightsError: If the file holds something else, or a value is NaN or infinite.
    """
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    values = content.items() if isinstance(content, Mapping) else ()
    state = {str(name): value for name, value in values if isinstance(value, Tensor)}
    if not state:
        raise WeightsError(f"{path} holds no state dict: a mapping from names to tensors is needed")
    for prefix in ("module.", "model."):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return require_finite(state, path)


def _single_state(model: nn.Module, entry: ZooEntry, content: Any, path: Path) -> dict[str, Tensor]:  # noqa: ANN401
    if entry.name.startswith(_LAST) and isinstance(content, Mapping) and "last" in content:
        content = content["last"]
    state = _plain_state(content, path)
    if entry.library:
        with quiet():
            from timm.models import xcit
        filtered: dict[str, Tensor] = xcit.checkpoint_filter_fn(state, model.get_submodule("model"))
        return _prefixed(filtered)
    if entry.dataset != "imagenet":
        return state
    if entry.name.startswith(_SWIN):
        state = _swin_names(state, model.get_submodule("model"))
    # The architecture of most is wrapped in a standardisation, the published file is that of the inside.
    return state if entry.name.startswith(_PREFIXED_ALREADY) else _prefixed(state)


def _swin_names(state: dict[str, Tensor], inside: nn.Module) -> dict[str, Tensor]:
    """Return a state dict of an older timm under the names of the installed one."""
    with quiet():
        from timm.models.swin_transformer import checkpoint_filter_fn
    renamed: dict[str, Tensor] = checkpoint_filter_fn(state, inside)
    return renamed


def _prefixed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{name}": value for name, value in state.items()}


def _load(module: nn.Module, state: dict[str, Tensor], entry: ZooEntry, path: Path) -> None:
    """Load a state dict strictly, but for standardisations and left-overs of training.

    Raises:
        WeightsError: If names or shapes differ otherwise.
    """
    own = module.state_dict()
    filled = {name: value for name, value in own.items() if name.rpartition(".")[2] in _STANDARDISATION}
    kept = {
        name: value
        for name, value in state.items()
        if name in own or not (name.startswith(_LEFT_OVER[0]) or name.rpartition(".")[2] == _LEFT_OVER[1])
    }
    try:
        load_strict(module, {**filled, **kept}, path, keys="")
    except WeightsError as error:
        raise WeightsError(
            error.message,
            hint=f"remove the file if it is not that of {entry.reference}; it is fetched again then",
        ) from None


@contextmanager
def _library_weights(reporter: Reporter) -> Iterator[None]:
    """Return a context in which torchvision's weights, too, come by our own download and reader."""

    def load(url: str, *_: object, **__: object) -> dict[str, Tensor]:
        name = url.rpartition("/")[2]
        places = (weights_home() / name, Path(torch.hub.get_dir()) / "checkpoints" / name)
        path = next((each for each in places if each.is_file()), places[0])
        if not path.is_file():
            fetch(url, path, name=f"torchvision's {name}", reporter=reporter)
        return read_state_dict(path)

    home = importlib.import_module("torchvision.models._api").__dict__
    original = home["load_state_dict_from_url"]
    home["load_state_dict_from_url"] = load
    try:
        yield
    finally:
        home["load_state_dict_from_url"] = original
