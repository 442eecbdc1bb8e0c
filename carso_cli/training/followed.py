"""The images whose accuracy is followed while a purifier or classifier trains.

They are held out of training (`data.holdout`). Where nothing is, as in the paper, they are a fixed slice of
the training images, or the test split where `data.follow` asks for it; neither changes what is trained.
"""

from __future__ import annotations

from carso_cli.build import load_images
from carso_cli.data.image_set import ImageSet, split_holdout
from carso_cli.recipe.schema import Recipe
from carso_cli.runtime.reporter import Reporter

_SLICE = 0.02


def training_and_followed(recipe: Recipe, images: ImageSet, reporter: Reporter) -> tuple[ImageSet, ImageSet]:
    """Split the images of training into those to train on and those to follow."""
    data = recipe.data
    if data.holdout:
        return split_holdout(images, data.holdout, recipe.seed)
    if data.follow == "test":
        return images, load_images(recipe, "test", reporter=reporter)
    return images, split_holdout(images, _SLICE, recipe.seed)[1]


def followed_on(recipe: Recipe) -> str:
    """Return where the followed images come from: `held-out`, `train` or `test`."""
    return "held-out" if recipe.data.holdout else recipe.data.follow
