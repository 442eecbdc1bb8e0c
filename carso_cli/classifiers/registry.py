"""The classifiers that carso knows by name: where their weights come from and who made them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from carso_cli.errors import RecipeError, nearest


@dataclass(frozen=True)
class ClassifierRecord:
    """One known set of weights.

    Args:
        name: Its key.
        dataset: Name of the data set it was trained on.
        depth: Depth of the WideResNet.
        width: Width of the WideResNet.
        activation: `relu` or `silu`.
        citation: Who published it.
        gdrive_id: RobustBench's file id on Google Drive; empty for shipped weights.
    """

    name: str
    dataset: str
    depth: int
    width: int
    activation: str
    citation: str
    gdrive_id: str = ""


SHIPPED_FOLDER = Path(__file__).parent / "digits"

SHIPPED = (
    ClassifierRecord(
        "digits-at", "digits", 10, 1, "relu", "carso; adversarially trained at eps 0.1, see MODEL_CARD.md"
    ),
    ClassifierRecord(
        "digits-clean", "digits", 10, 1, "relu", "carso; trained on clean images, see MODEL_CARD.md"
    ),
)

_CUI = "Cui et al., Decoupled Kullback-Leibler Divergence Loss, 2023"
_REBUFFI = "Rebuffi et al., Data Augmentation Can Improve Robustness, 2021"
_GOWAL = "Gowal et al., Uncovering the Limits of Adversarial Training, 2020"
_R28 = "Rebuffi2021Fixing_28_10_cutmix_ddpm"

# Swish, in RobustBench's Rebuffi 2021 and Gowal 2020 models, is SiLU under its older name.
ROBUSTBENCH = (
    ClassifierRecord(
        "Cui2023Decoupled_WRN-28-10", "cifar10", 28, 10, "silu", _CUI, "1-AaTrYt23WJFR22hXgBd-i6kjpsz6Hf2"
    ),
    ClassifierRecord(
        "Cui2023Decoupled_WRN-28-10", "cifar100", 28, 10, "silu", _CUI, "15BwWdWbNfoarTEWWugicOVkTjh3nXH36"
    ),
    ClassifierRecord(_R28, "cifar10", 28, 10, "silu", _REBUFFI, "1-0EChXbc6pOvx26O17av263bCeqIAz6s"),
    ClassifierRecord(_R28, "cifar100", 28, 10, "silu", _REBUFFI, "1-P7cs82Tj6UVx7Coin3tVurVKYwXWA9p"),
    ClassifierRecord(
        "Gowal2020Uncovering_28_10_extra",
        "cifar10",
        28,
        10,
        "silu",
        _GOWAL,
        "1MBAWGxiZxKt-GfqEqtLcXcd3tAxPhvV2",
    ),
)


def find_record(records: tuple[ClassifierRecord, ...], name: str, dataset: str) -> ClassifierRecord:
    """Look a classifier up.

    Raises:
        RecipeError: If no record has this name, or none for this data set.
    """
    named = [record for record in records if record.name == name]
    for record in named:
        if record.dataset == dataset:
            return record
    if named:
        sets = ", ".join(record.dataset for record in named)
        raise RecipeError(f"classifier '{name}' is known for {sets}, not for {dataset}")
    names = sorted({record.name for record in records})
    raise RecipeError(
        f"unknown classifier '{name}'; known are {', '.join(names)}. {nearest(name, names)}".rstrip()
    )
