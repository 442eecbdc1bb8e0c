"""The classifiers that carso knows by name: architecture, weights, and who made them.

Each is a `ClassifierRecord`; `find_record` looks one up.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from carso_cli.errors import RecipeError, nearest

Source = Literal["shipped", "robustbench"]
Channels = tuple[float, float, float]

SHIPPED_FOLDER = Path(__file__).parent / "digits"

# The images are grey, repeated to three equal channels.
_DIGITS: tuple[Channels, Channels] = ((0.3051, 0.3051, 0.3051), (0.3238, 0.3238, 0.3238))
_CIFAR10: tuple[Channels, Channels] = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
_CIFAR100: tuple[Channels, Channels] = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))

_CUI = "Cui et al., Decoupled Kullback-Leibler Divergence Loss, 2023, https://arxiv.org/abs/2305.13948"
_REBUFFI = "Rebuffi et al., Data Augmentation Can Improve Robustness, 2021, https://arxiv.org/abs/2111.05328"
_GOWAL = (
    "Gowal et al., Uncovering the Limits of Adversarial Training against Norm-Bounded Adversarial Examples, "
    "2020, https://arxiv.org/abs/2010.03593"
)


@dataclass(frozen=True)
class Published:
    """Where weights can be downloaded."""

    url: str
    """Address of the file itself."""
    page: str = ""
    """Address for a browser, where that is another one."""


RELEASE_URL = "https://bucket.ballarin.cc/aimldl/carso2024cnn/"
"""Where the paper's authors publish their files (github.com/emaballarin/CARSO, `models/get_models_*.sh`)."""


@dataclass(frozen=True)
class Release:
    """What the paper's authors publish around one classifier.

    Args:
        folder: Their folder, below `RELEASE_URL`.
        classifier: File of the classifier.
        purifier: Common beginning of the names of the purifier's three files.
        listed: Whether their lists of downloads name the purifier; otherwise their evaluation does.
    """

    folder: str
    classifier: str
    purifier: str
    listed: bool = True

    @property
    def url(self) -> str:
        """Address of the folder, with a slash at the end."""
        return f"{RELEASE_URL}{self.folder}/"


RELEASES = {
    ("cifar10", "at"): Release(
        "cifar_10_cuiwrn2810/models", "cifar10_a3_b10_t4_20m_w.safetensors", "wrn_28_10_cifar_10_cui_2023"
    ),
    ("cifar100", "at"): Release(
        "cifar_100_cuiwrn2810/models", "cifar100_a5_b12_t4_50m_w.safetensors", "wrn_28_10_cifar_100_cui_2023"
    ),
    ("tinyimagenet200", "at"): Release(
        "tinyimagenet_wangwrn2810/models",
        "tiny_linf_wrn28_10_w.safetensors",
        "wrn_28_10_tinyimagenet_200_wang_2023",
    ),
    ("cifar10", "clean"): Release(
        "cifar_10_ownwrn2810", "WRN_28_10_cifar10_09428.safetensors", "wrn_28_10_cifar_10_own_2025"
    ),
    ("cifar100", "clean"): Release(
        "cifar_100_ownwrn2810", "WRN_28_10_cifar100_07476.safetensors", "wrn_28_10_cifar_100_own_2025"
    ),
    ("cifar10-gowal2020", "at"): Release(
        "cifar_10_gowalwrn2810",
        "cifar10_linf_wrn28-10_with.safetensors",
        "wrn_28_10_cifar_10_gowal_2020",
        listed=False,
    ),
    ("cifar10-rebuffi2021", "at"): Release(
        "cifar_10_rebuffiwrn2810",
        "cifar10_linf_wrn28-10_cutmix_ddpm_v2.safetensors",
        "wrn_28_10_cifar_10_rebuffi_2021",
        listed=False,
    ),
    ("cifar100-rebuffi2021", "at"): Release(
        "cifar_100_rebuffiwrn2810",
        "cifar100_linf_wrn28-10_cutmix_ddpm.safetensors",
        "wrn_28_10_cifar_100_rebuffi_2021",
        listed=False,
    ),
}
"""By recipe and training of the classifier, `at` or `clean`."""

PUBLISHED_FILES = {
    # By the name under which recipes look for the file; no checksums are published.
    "wang2023_tinyimagenet200_wrn28-10.pt": Published(
        "https://huggingface.co/wzekai99/DM-Improves-AT/resolve/main/checkpoint/tiny_linf_wrn28-10.pt"
    ),
    **{one.classifier: Published(one.url + one.classifier) for one in RELEASES.values()},
}
"""Weights that are not in RobustBench, and that recipes name as files."""


@dataclass(frozen=True)
class ClassifierRecord:
    """One known WideResNet with its weights.

    Args:
        name: Its key; author, year and variant for RobustBench's.
        source: `shipped` with carso, or `robustbench`.
        dataset: Name of the data set it was trained on.
        classes: C.
        standardisation: Per-channel mean and standard deviation it was trained with, whatever a recipe says.
        citation: Who published it.
        depth: Depth of the WideResNet.
        width: Width of the WideResNet.
        activation: `relu` or `silu`.
        gdrive_id: RobustBench's file id on Google Drive.
        sha256: Checksum of a shipped file.
    """

    name: str
    source: Source
    dataset: str
    classes: int
    standardisation: tuple[Channels, Channels]
    citation: str
    depth: int = 28
    width: int = 10
    # The Swish of RobustBench's Rebuffi 2021 and Gowal 2020 models is SiLU under its older name.
    activation: str = "silu"
    gdrive_id: str = ""
    sha256: str = ""

    @property
    def architecture(self) -> str:
        """Depth, width and activation in words."""
        return f"WideResNet-{self.depth}-{self.width} with {self.activation}"

    @property
    def published(self) -> Published:
        """Where RobustBench keeps the weights; it states no checksums."""
        return Published(
            # Without `confirm`, Google sends a web page that asks whether to skip the virus scan.
            f"https://drive.usercontent.google.com/download?id={self.gdrive_id}&export=download&confirm=t",
            page=f"https://drive.google.com/file/d/{self.gdrive_id}",
        )

    @property
    def file(self) -> Path:
        """The weights file: its place in this package, or relative to the folder of all weights."""
        if self.source == "shipped":
            return SHIPPED_FOLDER / f"{self.name}.safetensors"
        # The layout in which RobustBench caches its downloads.
        return Path(self.dataset) / "Linf" / f"{self.name}.pt"


def _shipped(name: str, citation: str, sha256: str) -> ClassifierRecord:
    return ClassifierRecord(
        name, "shipped", "digits", 10, _DIGITS, citation, depth=10, width=1, activation="relu", sha256=sha256
    )


def _robustbench(name: str, dataset: str, citation: str, gdrive_id: str) -> ClassifierRecord:
    classes, standardisation = (10, _CIFAR10) if dataset == "cifar10" else (100, _CIFAR100)
    return ClassifierRecord(
        name, "robustbench", dataset, classes, standardisation, citation, gdrive_id=gdrive_id
    )


RECORDS = (
    _shipped(
        "digits-at",
        "carso, trained adversarially at eps 0.1; see MODEL_CARD.md",
        "26d71ac78149044599fbd4f3ff17a2dd06c78a10eed6ad34503893ccb790cdff",
    ),
    _shipped(
        "digits-clean",
        "carso, trained on clean images; see MODEL_CARD.md",
        "a963d2d7291e0aff7745e448ad2643da79b8ee0ea41071d205b10fe7b9a30d15",
    ),
    _robustbench("Cui2023Decoupled_WRN-28-10", "cifar10", _CUI, "1-AaTrYt23WJFR22hXgBd-i6kjpsz6Hf2"),
    _robustbench("Cui2023Decoupled_WRN-28-10", "cifar100", _CUI, "15BwWdWbNfoarTEWWugicOVkTjh3nXH36"),
    _robustbench(
        "Rebuffi2021Fixing_28_10_cutmix_ddpm", "cifar10", _REBUFFI, "1-0EChXbc6pOvx26O17av263bCeqIAz6s"
    ),
    _robustbench(
        "Rebuffi2021Fixing_28_10_cutmix_ddpm", "cifar100", _REBUFFI, "1-P7cs82Tj6UVx7Coin3tVurVKYwXWA9p"
    ),
    _robustbench("Gowal2020Uncovering_28_10_extra", "cifar10", _GOWAL, "1MBAWGxiZxKt-GfqEqtLcXcd3tAxPhvV2"),
)


def find_record(source: str, name: str, dataset: str) -> ClassifierRecord:
    """Look a classifier up.

    Args:
        source: `shipped` or `robustbench`.
        name: Its key.
        dataset: The recipe's data set.

    Raises:
        RecipeError: If no record has this name, or none for this data set.
    """
    records = [record for record in RECORDS if record.source == source]
    # One name may have weights for several data sets.
    named = {record.dataset: record for record in records if record.name == name}
    if dataset in named:
        return named[dataset]
    if named:
        sets = " and ".join(named)
        raise RecipeError(
            f"the {source} classifier '{name}' was trained on {sets}, not on {dataset}",
            hint="train one with carso train-classifier RECIPE --kind at, and name its file in classifier.at",
        )
    names = sorted({record.name for record in records})
    raise RecipeError(
        f"there is no {source} classifier '{name}'; there are {', '.join(names)}", hint=nearest(name, names)
    )
