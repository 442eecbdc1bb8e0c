"""Which of a recipe's images are on this machine, and whole. Nothing is downloaded or unpacked."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path

from carso_cli.data.cifar import FOLDERS as CIFAR_FOLDERS
from carso_cli.data.cifar import cifar_class
from carso_cli.data.datasets import find_data
from carso_cli.data.tinyimagenet import MD5 as TINY_MD5
from carso_cli.data.tinyimagenet import NAME as TINY_NAME
from carso_cli.data.tinyimagenet import URL as TINY_URL
from carso_cli.data.zip_store import ZipStore
from carso_cli.errors import DataError
from carso_cli.io.checksum import file_digest
from carso_cli.io.download import fetch_command
from carso_cli.io.paths import data_home
from carso_cli.recipe.schema import Recipe
from carso_cli.tools.asset import DAMAGED, MISSING, PRESENT, Item, once, state_of


def data_items(recipe: Recipe) -> list[Item]:
    """Describe the images that a recipe trains and evaluates on."""
    root = Path(os.path.expanduser(recipe.data.root or data_home()))
    name = recipe.data.name
    if name == "digits":
        return [Item("data", "digits", PRESENT, True, "scikit-learn", note="come with scikit-learn")]
    if name in CIFAR_FOLDERS:
        return [_cifar(recipe, root)]
    if name == "tinyimagenet200" and not (recipe.data.train or recipe.data.test):
        return [_tinyimagenet(recipe, root)]
    sources = dict.fromkeys(filter(None, (recipe.data.train, recipe.data.test)))
    return [_folder_or_zip(name, source, root) for source in sources]


def _cifar(recipe: Recipe, root: Path) -> Item:
    facts = cifar_class(recipe.data.name)
    folder, archive = root / facts.base_folder, root / facts.filename
    members = [*facts.train_list, *facts.test_list, (facts.meta["filename"], facts.meta["md5"])]
    note, place, state = "", archive, MISSING
    if folder.is_dir():
        bad = [file for file, md5 in members if not _has_md5(folder / file, md5)]
        note = f"missing or not of the published checksum: {', '.join(bad)}; remove the folder" if bad else ""
        place, state = folder, DAMAGED if bad else PRESENT
    elif archive.is_file():
        whole = _has_md5(archive, facts.tgz_md5)
        note = "unpacked on first use" if whole else "not of the published checksum; remove it"
        place, state = archive, PRESENT if whole else DAMAGED
    return Item(
        "data",
        {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[recipe.data.name],
        state,
        True,
        str(place),
        (str(folder), str(archive)),
        note,
        facts.url,
        fetch_command(recipe.reference),
        facts.url,
        f"md5:{facts.tgz_md5}",
    )


def _has_md5(path: Path, expected: str) -> bool:
    return path.is_file() and once(_md5, path) == expected


def _md5(path: Path) -> str:
    return file_digest(path, "md5")


def _tinyimagenet(recipe: Recipe, root: Path) -> Item:
    archive = root / f"{TINY_NAME}.zip"
    found = find_data("tinyimagenet200", root=root)
    problem = once(_zip_problem, found) if found is not None else ""
    note = problem
    if found is not None and not problem and found.is_file() and not _has_md5(found, TINY_MD5):
        note = "not the published file, perhaps a part of it: name it with any result"
    return Item(
        "data",
        "TinyImageNet-200",
        state_of(found, problem),
        True,
        str(found or archive),
        (str(root / TINY_NAME), str(archive), str(root / f"{TINY_NAME}*.zip")),
        note,
        TINY_URL,
        fetch_command(recipe.reference),
        TINY_URL,
        f"md5:{TINY_MD5}",
    )


def _folder_or_zip(name: str, source: str, root: Path) -> Item:
    path = Path(os.path.expanduser(source))
    looked = (str(path),) if path.is_absolute() else (str(root / path), str(Path.cwd() / path))
    found = find_data(name, root=root, source=source)
    if found is None:
        note = "or elsewhere, with --set data.root=DIR"
        return Item("data", source, MISSING, True, looked[0], looked, note)
    problem = once(_zip_problem, found)
    return Item("data", source, DAMAGED if problem else PRESENT, True, str(found), looked, problem)


def _zip_problem(path: Path) -> str:
    """Say what is wrong with a zip file, checksums included; empty where nothing is, and for folders."""
    if path.is_dir():
        return ""
    try:
        ZipStore(path).close()
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except DataError as error:
        return error.message
    except (zipfile.BadZipFile, zlib.error, OSError) as error:
        return f"cannot be read: {error}"
    return f"{bad} in it is damaged" if bad else ""
