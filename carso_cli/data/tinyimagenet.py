"""TinyImageNet-200 (Chrabaszcz et al., 2017, in the paper's citation), in its official layout.

    tiny-imagenet-200/wnids.txt, words.txt
    tiny-imagenet-200/train/<wnid>/images/<image>
    tiny-imagenet-200/val/images/<image>, val/val_annotations.txt

unpacked or inside a zip file. Classes are numbered in the order of their sorted wnids. The
labels of the official test part were never published; the test split here is `val`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from carso_cli.data.file_tree import FileTree, open_tree
from carso_cli.data.image_folder import Listing, check_class_count, load_listing, name_some
from carso_cli.data.image_set import ImageSet
from carso_cli.errors import DataError
from carso_cli.io.download import fetch
from carso_cli.runtime.reporter import Reporter

NAME = "tiny-imagenet-200"
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
# The address is plain http: this checksum is what vouches for the file.
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
OFFICIAL_COUNTS = {"train": 100_000, "test": 10_000}


def load_tinyimagenet_split(
    split: str,
    *,
    classes: int,
    channels: int,
    image_size: int,
    root: Path,
    reporter: Reporter,
    source: Path | None = None,
) -> ImageSet:
    """Load a split, downloading the data set to `root` on first use.

    Args as `carso_cli.data.datasets.load_split`; the `"test"` split is the official validation images, and
    `source` is the folder or zip file to use instead of searching `root`.

    Raises:
        MissingError: If the data set is absent and cannot be downloaded, or (`DataError`) is incomplete, or
            holds a damaged image.
    """
    path = source or find_tinyimagenet(root)
    if path is None:
        path = root / f"{NAME}.zip"
        fetch(URL, path, checksum=f"md5:{MD5}", name="tinyimagenet200", reporter=reporter)
    with open_tree(path) as tree:
        listing = list_official_split(tree, split)
        check_class_count(listing.classes, classes, where=str(path))
        # Not refused: a subset is fit for trying things out, but its figures are not those of the data set.
        if len(listing.names) != OFFICIAL_COUNTS[split]:
            reporter.warning(
                f"{path} holds {len(listing.names)} {split} images;"
                f" the official data set has {OFFICIAL_COUNTS[split]}: name the subset with any result"
            )
        return load_listing(tree, listing, split, channels=channels, image_size=image_size, reporter=reporter)


def find_tinyimagenet(root: Path) -> Path | None:
    """Return the data set's folder or zip file under `root`, or None.

    `root` may also be that folder or zip file itself. The full zip file is preferred to any
    other whose name begins with `tiny-imagenet-200`.
    """
    if root.is_file() or (root / "wnids.txt").is_file():
        return root
    for candidate in (root / NAME, root / f"{NAME}.zip", *sorted(root.glob(f"{NAME}*.zip"))):
        if candidate.exists():
            return candidate
    return None


def list_official_split(tree: FileTree, split: str) -> Listing:
    """List a split's images without reading any.

    Raises:
        DataError: If a file of the layout is missing, or a class has no images in either split.
    """
    base = _base(tree)
    wnids = sorted(_lines(tree, f"{base}wnids.txt"))
    if not wnids or len(set(wnids)) != len(wnids):
        fault = "names a class twice" if wnids else "names no class"
        raise DataError(f"{tree.where(f'{base}wnids.txt')} {fault}")
    # One split alone is enough to work on it; the other is checked where it is present.
    present = tree.subfolders(base.rstrip("/"))
    train = _list_train(tree, base, wnids) if split == "train" or "train" in present else []
    val = _list_val(tree, base, wnids) if split == "test" or "val" in present else []
    lines = _lines(tree, f"{base}words.txt") if f"{base}words.txt" in tree.files else []
    # A line is a wnid, a tab, and synonyms between commas, of which the first names the class.
    words = {
        wnid: text.partition(",")[0].strip() for wnid, _, text in (line.partition("\t") for line in lines)
    }
    classes = tuple(f"{wnid} {words[wnid]}" if wnid in words else wnid for wnid in wnids)
    # Not empty: the lists above refuse a class without images.
    names, labels = zip(*(train if split == "train" else val), strict=True)
    return Listing(base + ("train" if split == "train" else "val"), classes, names, labels)


def _base(tree: FileTree) -> str:
    top = tree.subfolders("")
    for base in ("", *(f"{name}/" for name in top)):
        if f"{base}wnids.txt" in tree.files:
            return base
    raise DataError(
        f"{tree.path} holds no wnids.txt, so it is not laid out as {NAME}; it holds {name_some(top)}",
        hint=f"fetch {URL} and use it as it is, or use data.name=image-folder for another layout",
    )


def _list_train(tree: FileTree, base: str, wnids: Sequence[str]) -> list[tuple[str, int]]:
    found = tree.subfolders(f"{base}train")
    if unknown := sorted(set(found) - set(wnids)):
        raise DataError(f"{tree.where(f'{base}train')} holds {name_some(unknown)}, not named in wnids.txt")
    if missing := sorted(set(wnids) - set(found)):
        raise DataError(f"{tree.where(f'{base}train')} lacks the classes {name_some(missing)} of wnids.txt")
    pairs: list[tuple[str, int]] = []
    for label, wnid in enumerate(wnids):
        folder = f"{base}train/{wnid}/images"
        if not (names := tree.images(folder)):
            raise DataError(f"{tree.where(folder)} holds no images: the class {wnid!r} is empty")
        pairs += [(name, label) for name in names]
    return pairs


def _list_val(tree: FileTree, base: str, wnids: Sequence[str]) -> list[tuple[str, int]]:
    """Pair the validation images with the labels that `val_annotations.txt` gives them."""
    file = f"{base}val/val_annotations.txt"
    label_of = {wnid: label for label, wnid in enumerate(wnids)}
    labels: dict[str, int] = {}
    for number, line in enumerate(_lines(tree, file), 1):
        image, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]  # what follows is a bounding box
        if wnid not in label_of:
            raise DataError(f"{tree.where(file)}, line {number}: {wnid!r} is not a class of wnids.txt")
        labels[f"{base}val/images/{image}"] = label_of[wnid]
    found = tree.images(f"{base}val/images")
    if missing := sorted(set(labels) - set(found)):
        raise DataError(f"{tree.where(missing[0])} is missing, and val_annotations.txt names it")
    if unnamed := sorted(set(found) - set(labels)):
        raise DataError(f"{tree.where(unnamed[0])} has no label: val_annotations.txt does not name it")
    if empty := [wnid for wnid, label in label_of.items() if label not in set(labels.values())]:
        raise DataError(f"{tree.where(file)} names no image of {name_some(empty)}: every class needs one")
    return [(name, labels[name]) for name in found]


def _lines(tree: FileTree, name: str) -> list[str]:
    if name not in tree.files:
        raise DataError(f"{tree.where(name)} is missing", hint=f"it comes with {URL}")
    # A damaged name in words.txt is no reason to stop; a damaged wnid is found to be unknown.
    lines = [line.strip() for line in tree.read(name).decode("utf-8", errors="replace").splitlines()]
    return [line for line in lines if line]
