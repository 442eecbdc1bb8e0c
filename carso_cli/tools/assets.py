"""Which of a recipe's data and weights are on this machine, undamaged, and how to get those that are not.

- `take_stock` looks, and changes nothing: no download, no unpacking, no model;
- `fetch_missing` downloads what is published.
"""

from __future__ import annotations

import functools
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Literal

from carso_cli.build import search_folders, start_file
from carso_cli.classifiers.architectures import check_architecture
from carso_cli.classifiers.load import ENTRY_POINT_GROUP, robustbench_places, weights_places
from carso_cli.classifiers.registry import PUBLISHED_FILES, RELEASES, Release, find_record
from carso_cli.classifiers.weights import read_tensors, require_uncompressed
from carso_cli.data import tinyimagenet
from carso_cli.data.cifar import FOLDERS as CIFAR_FOLDERS
from carso_cli.data.cifar import cifar_class
from carso_cli.data.datasets import find_data, source_places
from carso_cli.data.file_tree import ZipStore
from carso_cli.data.mnist import FOLDERS as MNIST_FOLDERS
from carso_cli.data.mnist import TITLES, mnist_files
from carso_cli.defence.release_format import PUBLISHED_PARTS
from carso_cli.errors import DataError, RecipeError, WeightsError
from carso_cli.io.checksum import file_digest
from carso_cli.io.download import fetch, fetch_command, recorded_problem
from carso_cli.io.paths import data_home, weights_home
from carso_cli.recipe.schema import Recipe, Weights
from carso_cli.recipe.shipped import start_command
from carso_cli.runtime.reporter import Reporter

State = Literal["present", "missing", "damaged"]
PRESENT: State = "present"
MISSING: State = "missing"
DAMAGED: State = "damaged"

# How PyTorch files began before they were zip files: a bare pickle of protocol 2, without checksums.
_LEGACY_PICKLE = b"\x80\x02"


@dataclass(frozen=True)
class Item:
    """One thing that a recipe needs.

    Args:
        role: `data`, `at`, `clean`, `start` for the purifier that training starts from, or `purifier` for the
            authors' own.
        what: Its name for people.
        state: Whether it is there and undamaged.
        required: Whether the recipe cannot run without it; clean classifiers serve the ablation only, the
            authors' purifier `carso reproduce`.
        place: Where it lies or, where it is missing, belongs.
        looked: Every place looked at.
        note: What is wrong with it, or known about it.
        source: Address from which it comes, if there is one.
        command: Command that gets it, if there is one.
        download: Address of the file that belongs at `place`, if there is one.
        checksum: The file's published checksum, as `fetch` takes it.
    """

    role: str
    what: str
    state: State
    required: bool
    place: str
    looked: tuple[str, ...] = ()
    note: str = ""
    source: str = ""
    command: str = ""
    download: str = ""
    checksum: str = ""


def take_stock(recipe: Recipe) -> list[Item]:
    """List everything a recipe needs, data first.

    Raises:
        RecipeError: If the recipe names a classifier or an architecture that is not known.
        MissingError: If the architecture's library is not installed.
    """
    if recipe.classifier.architecture is not None:
        check_architecture(recipe.classifier.family, recipe.classifier.architecture)
    items = _data_items(recipe)
    for kind, weights in (("at", recipe.classifier.at), ("clean", recipe.classifier.clean)):
        # A recipe may name both kinds; it runs with those that its two classifier instances use.
        required = kind in (recipe.representation.kind, recipe.evaluation.second_kind)
        if weights is not None:
            items.append(_weights_item(recipe, kind, weights, required))
        elif required:
            raise RecipeError(f"recipe '{recipe.name}' names no weights for classifier.{kind}")
    if recipe.training.initial is not None:
        start = start_file(recipe)
        state = PRESENT if start.is_file() else MISSING
        item = Item("start", start.name, state, True, str(start), (str(start),), note="see training.initial")
        items.append(replace(item, command=start_command(recipe)))
    if release := RELEASES.get((recipe.name, recipe.representation.kind)):
        items.append(_authors_purifier(recipe, release))
    return items


def purifier_files(release: Release) -> dict[str, Path]:
    """Return where the three files of an authors' purifier come from, and where they belong."""
    folder = weights_home() / "carso2024cnn" / release.purifier
    names = [f"{release.purifier}_{part}.safetensors" for part in PUBLISHED_PARTS]
    return {release.url + name: folder / name for name in names}


def _authors_purifier(recipe: Recipe, release: Release) -> Item:
    files = purifier_files(release).values()
    folder = next(iter(files)).parent
    problems = [problem for path in files if path.is_file() and (problem := _once(_weights_problem, path))]
    state = DAMAGED if problems else PRESENT if all(path.is_file() for path in files) else MISSING
    what, kind = f"the authors' purifier {release.purifier}", recipe.representation.kind
    # With another second instance the purifier is the same.
    command = f"carso reproduce {recipe.name}" + (f" --first {kind}" if kind != "at" else "")
    item = Item("purifier", what, state, False, str(folder), (str(folder),), "; ".join(problems), release.url)
    return replace(item, command=command)


def fetch_missing(recipe: Recipe, reporter: Reporter) -> list[Item]:
    """Download what a recipe needs, lacks, and has a published address.

    Raises:
        MissingError: See `carso_cli.io.download.fetch`; what was downloaded before stays.
    """
    # Not what is damaged: no file of the user's is overwritten, and `doctor` asks to remove it.
    lacking = [item for item in take_stock(recipe) if item.required and item.state == MISSING]
    fetched = [item for item in lacking if item.download]
    for item in fetched:
        fetch(
            item.download,
            Path(item.place),
            name=item.what,
            reporter=reporter,
            checksum=item.checksum,
            page=item.source,
        )
    return fetched


def _look_at(
    item: Item, found: Path | None, belongs: Path, looked: Iterable[Path], check: Callable[[Path], str]
) -> Item:
    """Fill in the state of an item, by where it was found and what a check says is wrong with it."""
    problem = "" if found is None else _once(check, found)
    state = MISSING if found is None else DAMAGED if problem else PRESENT
    return replace(
        item, state=state, place=str(found or belongs), looked=tuple(map(str, looked)), note=problem
    )


def _once(check: Callable[[Path], str], path: Path) -> str:
    """Return what a check of a file says, without reading again a file that several recipes share."""
    # With size and time of change, so that a file put in its place is read again.
    status = path.stat()
    return _checked(check, path, status.st_size, status.st_mtime_ns)


@functools.cache
def _checked(check: Callable[[Path], str], path: Path, size: int, modified: int) -> str:
    return check(path)


# --- data ---


def _data_items(recipe: Recipe) -> list[Item]:
    """Describe the images that a recipe trains and evaluates on."""
    # `Path.expanduser` would raise for an unknown user, as in `~nobody`.
    root = Path(os.path.expanduser(recipe.data.root or data_home()))
    name = recipe.data.name
    if name == "digits":
        return [Item("data", "digits", PRESENT, True, "scikit-learn", note="come with scikit-learn")]
    if name in CIFAR_FOLDERS:
        return [_cifar(recipe, root)]
    if name in MNIST_FOLDERS:
        return _mnist(recipe, root / MNIST_FOLDERS[name])
    if name == "tinyimagenet200" and not (recipe.data.train or recipe.data.test):
        return [_tinyimagenet(recipe, root)]
    sources = dict.fromkeys(filter(None, (recipe.data.train, recipe.data.test)))
    return [_folder_or_zip(name, source, root) for source in sources]


def _cifar(recipe: Recipe, root: Path) -> Item:
    facts = cifar_class(recipe.data.name)
    folder, archive = root / facts.base_folder, root / facts.filename
    note, place, state = "", archive, MISSING
    if folder.is_dir():
        # File by file, since an unpacking that was cut short leaves a folder that looks whole.
        members = [*facts.train_list, *facts.test_list, (facts.meta["filename"], facts.meta["md5"])]
        bad = [file for file, md5 in members if not _has_md5(folder / file, md5)]
        note = f"missing or not of the published checksum: {', '.join(bad)}; remove the folder" if bad else ""
        place, state = folder, DAMAGED if bad else PRESENT
    elif archive.is_file():
        intact = _has_md5(archive, facts.tgz_md5)
        note = "unpacked on first use" if intact else "not of the published checksum; remove it"
        state = PRESENT if intact else DAMAGED
    what = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[recipe.data.name]
    item = Item("data", what, state, True, str(place), (str(folder), str(archive)), note)
    return _downloadable(item, recipe, facts.url, checksum=f"md5:{facts.tgz_md5}")


def _mnist(recipe: Recipe, folder: Path) -> list[Item]:
    items = []
    for file, (url, md5) in mnist_files(recipe.data.name).items():
        packed, plain = folder / file, folder / file.removesuffix(".gz")
        damaged = packed.is_file() and not plain.is_file() and not _has_md5(packed, md5)
        state: State = DAMAGED if damaged else PRESENT if plain.is_file() or packed.is_file() else MISSING
        note = "not of the published checksum; remove it" if damaged else ""
        place = plain if plain.is_file() else packed
        what = f"{TITLES[recipe.data.name]} {file.removesuffix('.gz')}"
        item = Item("data", what, state, True, str(place), (str(plain), str(packed)), note)
        items.append(_downloadable(item, recipe, url, checksum=f"md5:{md5}"))
    return items


def _tinyimagenet(recipe: Recipe, root: Path) -> Item:
    folder, archive = root / tinyimagenet.NAME, root / f"{tinyimagenet.NAME}.zip"
    found = find_data("tinyimagenet200", root=root)
    item = Item("data", "TinyImageNet-200", MISSING, True, "")
    item = _look_at(item, found, archive, (folder, archive, root / f"{tinyimagenet.NAME}*.zip"), _zip_problem)
    # A zip file of some of the classes can be used, but what it gives is no result on the data set.
    if found is not None and not item.note and found.is_file() and not _has_md5(found, tinyimagenet.MD5):
        item = replace(item, note="not the published file, perhaps a part of it: name it with any result")
    return _downloadable(item, recipe, tinyimagenet.URL, checksum=f"md5:{tinyimagenet.MD5}")


def _folder_or_zip(name: str, source: str, root: Path) -> Item:
    looked = source_places(source, root)
    found = find_data(name, root=root, source=source)
    item = Item("data", source, MISSING, True, "")
    item = _look_at(item, found, looked[0], looked, _zip_problem)
    return item if found else replace(item, note="or elsewhere, with --set data.root=DIR")


def _downloadable(item: Item, recipe: Recipe, url: str, *, page: str = "", checksum: str = "") -> Item:
    command = fetch_command(recipe.reference)
    return replace(item, source=page or url, command=command, download=url, checksum=checksum)


def _has_md5(path: Path, expected: str) -> bool:
    return path.is_file() and _once(_md5, path) == expected


def _md5(path: Path) -> str:
    return file_digest(path, "md5")


def _zip_problem(path: Path) -> str:
    """Say what is wrong with a zip file of images, checksums included; empty if nothing, or for a folder."""
    if path.is_dir():
        return ""
    try:
        # `ZipStore` refuses unsafe names and sizes before `testzip` unpacks every member.
        with ZipStore(path), zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except DataError as error:
        return error.message
    except (zipfile.BadZipFile, zlib.error, OSError) as error:
        return f"cannot be read: {error}"
    return f"{bad} in it is damaged" if bad else ""


# --- weights ---


def _weights_item(recipe: Recipe, kind: str, weights: Weights, required: bool) -> Item:
    """Describe the weights of one kind of training.

    Raises:
        RecipeError: If the recipe names a classifier that is not known.
    """
    name, family = weights.name or "", recipe.classifier.family
    if weights.source == "entry-point":
        offered = name in {point.name for point in entry_points(group=ENTRY_POINT_GROUP)}
        note = "" if offered else "install the package that offers it into this environment"
        place = f"entry point {name} of {ENTRY_POINT_GROUP}"
        return Item(kind, name, PRESENT if offered else MISSING, required, place, note=note)
    if weights.source == "file":
        what = weights.file or ""
        published, places = PUBLISHED_FILES.get(what), weights_places(what, family, search_folders(recipe))
        # `train-classifier` writes where it is called; anything else is put into CARSO_HOME.
        belongs = places[0] if family == "wide-resnet" and published is None else weights_home() / what
    else:
        record = find_record(weights.source, name, recipe.data.name)
        if weights.source == "shipped":
            there = record.file.is_file()
            intact = there and file_digest(record.file) == record.sha256
            state = PRESENT if intact else DAMAGED if there else MISSING
            note = "" if intact else "install carso again"
            return Item(kind, name, state, required, str(record.file), note=note)
        what, published = f"{name} ({recipe.data.name})", record.published
        places = robustbench_places(record)
        belongs = places[0]
    found = next((path for path in places if path.is_file()), None)
    item = _look_at(Item(kind, what, MISSING, required, ""), found, belongs, places, _weights_problem)
    if published is not None:
        return _downloadable(item, recipe, published.url, page=published.page)
    trainable = family == "wide-resnet"
    command = f"carso train-classifier {recipe.reference} --kind {kind}" if trainable else ""
    release = RELEASES.get((recipe.name, kind))
    note = item.note or (f"the authors publish theirs: {release.url}{release.classifier}" if release else "")
    return replace(item, command=command, note=note)


def _weights_problem(path: Path) -> str:
    """Say what is wrong with a weights file, without building a model; empty if nothing is.

    A safetensors file of carso carries a checksum, and a download comes with one; a PyTorch file is a zip
    file, whose members carry one each.
    """
    try:
        # First, since the checksum of a download covers the whole file, whatever its format.
        if problem := recorded_problem(path):
            return problem
        if path.suffix == ".safetensors":
            read_tensors(path)
            return ""
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # Before `testzip`, since compressed parts could unpack to any size.
                require_uncompressed(archive, path)
                bad = archive.testzip()
            return f"{bad} in it is damaged" if bad else ""
        with path.open("rb") as stream:
            legacy = stream.read(2) == _LEGACY_PICKLE
    except WeightsError as error:
        return error.message
    except (zipfile.BadZipFile, zlib.error, OSError) as error:
        return f"cannot be read: {error}"
    return "" if legacy else "no PyTorch file; perhaps the web page that offers it"
