"""The recipe: one frozen model per YAML section, extra keys forbidden everywhere.

Section to paper: `representation` Table 7; `purifier` Tables 6 and 8-13 with the sizes of
Table 15; `training` Table 16; `training.attack_mix` Section 4.4 and Table 14; `evaluation`
Section 5.1 and Table 14. Defaults exist here and nowhere else. Perturbation sizes are in
pixel units of images in [0, 1]; counts of epochs are whole numbers from 1.
"""

from __future__ import annotations

import shlex
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator

from carso_cli.recipe.purifier_training import Training
from carso_cli.recipe.section import (
    Fraction,
    NonNegative,
    NonNegativeInt,
    Parsed,
    Positive,
    PositiveInt,
    Section,
    Text,
    no_truth,
    too_large,
)

DataName = Literal[
    "digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "tinyimagenet200", "image-folder", "given"
]
Aggregation = Literal["doubly-exponential", "logit-mean", "probability-mean", "majority-vote"]
View = Literal["exact", "log-probability", "released"]
Kind = Literal["at", "clean"]
Precision = Literal["fp32", "tf32", "bf16"]


AUTO = "auto"
"""In place of layers: those that the rule behind Table 7 chooses."""


class Data(Section):
    """Which images, and how they are laid out."""

    name: DataName
    """`given` for images that Python or a command line handed over: they cannot be loaded again."""
    classes: Annotated[int, Field(ge=2, strict=True)]
    """Number of classes C."""
    channels: Annotated[Literal[1, 3], BeforeValidator(no_truth)] = 3
    image_size: Annotated[int, Field(ge=28, le=224, strict=True)] = 32
    """Height and width in pixels."""
    mean: tuple[Fraction, ...]
    """Per-channel mean of the training images in [0, 1], for standardisation (Appendix C.1)."""
    std: tuple[Positive, ...]
    """Per-channel standard deviation of the same."""
    root: str | None = None
    """Folder searched for the data; by default the `data` folder of CARSO_HOME."""
    train: str | None = None
    """For `image-folder`: a folder or zip holding the training split, relative to `root`."""
    test: str | None = None
    """For `image-folder`: a folder or zip holding the test split, relative to `root`."""
    train_limit: PositiveInt | None = None
    """Use only this many training images, class-balanced and seeded; by default all."""
    holdout: Annotated[float, Field(ge=0.0, le=0.5), Parsed] = 0.02
    """Share of the training images held out to follow accuracies while training; 0 trains on every image."""
    follow: Literal["train", "test"] = "train"
    """With holdout 0: follow accuracies on a fixed fiftieth of the training images, or on the test split."""

    @model_validator(mode="after")
    def _channels_agree(self) -> Self:
        for key, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.channels:
                raise ValueError(f"{key} has {len(values)} values for {self.channels} channels")
        if self.name == "image-folder" and not (self.train and self.test):
            raise ValueError("an image-folder needs both 'train' and 'test': a folder or a zip each")
        return self


class Weights(Section):
    """Where a classifier's weights come from."""

    source: Literal["shipped", "robustbench", "file", "entry-point"]
    name: Text | None = None
    """Name of a shipped, RobustBench or entry-point classifier."""
    file: Text | None = None
    """For `file`: safetensors or PyTorch weights; looked for as given, then in CARSO_HOME's weights."""

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.source == "file" and (self.file is None or self.name is not None):
            raise ValueError("source 'file' needs 'file' and takes no 'name'")
        if self.source != "file" and (self.name is None or self.file is not None):
            raise ValueError(f"source '{self.source}' needs 'name' and takes no 'file'")
        return self


class ClassifierTraining(Section):
    """How `carso train-classifier` trains: SGD with a one-cycle learning rate."""

    epochs: PositiveInt = 15
    batch_size: PositiveInt = 128
    peak_learning_rate: Positive = 0.2
    warmup_share: Fraction = 0.4
    """Share of the steps over which the rate rises; afterwards it falls."""
    schedule: Literal["triangular", "cosine"] = "triangular"
    """Rise and fall in straight lines, or along half a cosine each."""
    initial_learning_rate: NonNegative = 0.0
    final_learning_rate: NonNegative = 0.0
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 5e-4
    method: Literal["fast", "pgd"] = "fast"
    """One FGSM step from a random start (Wong et al., 2020), or PGD (Madry et al., 2018)."""
    step_size: Positive | None = None
    """Attack step in pixel units; by default 1.25 eps for `fast` and 2.5 eps / steps for `pgd`."""
    steps: PositiveInt = 7
    """Attack steps; used by `pgd`."""
    augment: bool = True
    """Random crops with a 4-pixel margin and horizontal flips; shifts only where flips change the class."""
    flip: bool = True
    label_smoothing: Fraction = 0.0
    mixup: NonNegative = 0.0
    """Alpha of mixup, for clean training; adversarial training leaves it out, and 0 everywhere."""
    initial: Kind | None = None
    """Start from the recipe's own weights of this kind instead of random ones."""


class Classifier(Section):
    """The frozen classifier f: architecture, and weights by kind of training."""

    family: Literal["wide-resnet", "torchvision", "timm", "external", "given"] = "wide-resnet"
    """`external` takes architecture and weights together from an entry point; `given` is a model that Python
    or a command line hands over."""
    given: Text | None = None
    """For `given`: what names the model on a command line."""
    architecture: Text | None = None
    """Name that torchvision or timm has for the architecture; its weights come from a file."""
    architecture_options: dict[Text, Any] = Field(default_factory=dict)
    """Arguments of its constructor (`{img_size: 32, patch_size: 4}`); `cifar_stem: true` gives a ResNet
    a stem that keeps the size of small images."""
    depth: Annotated[int, Field(ge=10, strict=True)] = 28
    width: PositiveInt = 10
    activation: Literal["relu", "silu"] = "silu"
    at: Weights | None = None
    """Adversarially trained weights: the paper's classifier."""
    clean: Weights | None = None
    """Cleanly trained weights, for the ablation of Appendix D."""
    training: ClassifierTraining = ClassifierTraining()

    def __hash__(self) -> int:
        """Hash by value: the options are a mapping, which has no hash of its own."""
        return hash(self.model_dump_json())

    @model_validator(mode="after")
    def _depth_fits(self) -> Self:
        # Three groups of k blocks of two convolutions; WideResNets count four layers more.
        if (self.depth - 4) % 6:
            raise ValueError(
                f"a WideResNet has 6 k + 4 layers (10, 16, 22, 28, 34); {self.depth} is not one of these"
            )
        return self

    @model_validator(mode="after")
    def _architecture_fits(self) -> Self:
        named = self.family in ("torchvision", "timm")
        if named != (self.architecture is not None):
            needs = "needs" if named else "takes no"
            raise ValueError(f"family '{self.family}' {needs} 'architecture'")
        if self.architecture_options and not named:
            raise ValueError(f"family '{self.family}' takes no 'architecture_options'")
        if named and any(weights and weights.source != "file" for weights in (self.at, self.clean)):
            raise ValueError(f"family '{self.family}' takes weights of source 'file' only")
        return self


def _auto(value: object) -> object:
    return (AUTO,) if value == AUTO else value


class Representation(Section):
    """Which layers make up the internal representation (Table 7)."""

    kind: Kind = "at"
    """Training of the first classifier instance, which yields the representation."""
    layers: Annotated[tuple[Text, ...], Field(min_length=1), BeforeValidator(_auto)]
    """Names as in `carso extract RECIPE --list`; `auto` takes those that it proposes. An output is what
    the layer returns, and of a layer that runs twice, the first; `image`,
    beyond the paper, stands for the classifier's input itself."""

    @model_validator(mode="after")
    def _unique(self) -> Self:
        if len(set(self.layers)) != len(self.layers):
            raise ValueError("a layer is named twice")
        return self


class Purifier(Section):
    """Sizes of the conditional VAE (Tables 6 and 8-13, sizes of Table 15)."""

    condition_features: PositiveInt = 512
    """`fcrepr`: features of the compressed internal representation."""
    latent_features: NonNegativeInt = 128
    """`fjoint`: features of the latent, and of the joint encoding; 0 leaves out both, beyond the paper."""
    layer_convolutions: Annotated[int, Field(ge=1, le=5, strict=True)] | None = None
    """Convolutions per layer encoder; by default 3 (Table 8) up to 32 pixels, 4 (Table 9) above."""
    input_share: Annotated[float, Field(ge=0.0, lt=1.0), Parsed] = 0.0
    """Share of the input image in what is classified, the rest being its reconstruction: a skip connection
    around the purifier, beyond the paper. The ELBO is that of the reconstruction alone."""


class ThreatModel(Section):
    """The attacker's budget, in training and in evaluation."""

    norm: Literal["linf", "l2"] = "linf"
    eps: Positive = 8 / 255
    """Radius in pixel units of images in [0, 1]."""

    @model_validator(mode="after")
    def _in_pixel_units(self) -> Self:
        if problem := too_large(self.eps, self.norm):
            raise ValueError(problem)
        return self


class Evaluation(Section):
    """Inference and the budget of the evaluation's attacks (Section 5.1, Table 14)."""

    n_samples: PositiveInt = 8
    """N: reconstructions per image."""
    aggregation: Aggregation = "doubly-exponential"
    second_kind: Kind = "at"
    """Training of the second classifier instance, which classifies the reconstructions."""
    images: PositiveInt | None = None
    """Test images, class-balanced and seeded, unless `--limit` says otherwise; by default all."""
    batch_size: PositiveInt = 128
    """Images scored or attacked together."""
    pgd_steps: PositiveInt = 40
    """Steps of the plain `pgd` attack."""
    pgd_step_size: Positive = 0.01
    apgd_steps: PositiveInt = 100
    """Steps of the APGD attacks and of FAB."""
    eot_draws: PositiveInt | None = None
    """Expectation-over-Transformation draws per gradient; when left out, as many as make two agree."""
    gradient_precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of the defence's gradients, at most `precision`: `auto` is bf16 where that is fast and agrees."""
    pgd_eot_steps: PositiveInt = 200
    pgd_eot_step_size: Positive = 0.007
    square_queries: PositiveInt = 5000
    restarts: PositiveInt = 1
    """Random restarts of the adaptive protocol's strongest attack."""
    scoring_draws: Annotated[int, Field(ge=2, strict=True)] = 20
    """R: fresh draws of the defence on which every adversarial example is scored."""
    samples_per_pass: PositiveInt = 4096
    """Most reconstructions classified in one pass; bounds the memory of an attack step."""


class Recipe(Section):
    """Everything that determines a run."""

    name: Annotated[
        str,
        Field(
            pattern=r"^[a-z0-9][a-z0-9._-]*$",
            max_length=80,
            description="up to 80 lower-case letters, digits, dots, hyphens and underscores",
        ),
    ]
    """Name of the recipe, and of its run folder by default; lower case."""
    description: Text
    reproduces: str = ""
    """The row or table of the paper that this recipe reproduces, if any."""
    seed: NonNegativeInt = 0
    precision: Precision = "fp32"
    """Of products and convolutions: TF32 on NVIDIA GPUs, or bfloat16; aggregation and losses are float32."""
    compile: bool = False
    """Compile what attacks call with torch.compile; results change by rounding only."""
    data: Data
    threat: ThreatModel = ThreatModel()
    classifier: Classifier
    representation: Representation
    purifier: Purifier = Purifier()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    # No field: where a file lies must not enter hashes, stored recipes or comparisons.
    _path: str = PrivateAttr("")

    def read_from(self, path: Path) -> Recipe:
        """Return the recipe with the path of the user's file that it was read from."""
        # A copy, since recipes are frozen; pydantic lets private attributes be set all the same.
        found = self.model_copy()
        found._path = str(path)
        return found

    @property
    def file(self) -> Path | None:
        """The user's file that it was read from; None for a shipped recipe or one made in Python."""
        return Path(self._path) if self._path else None

    @property
    def reference(self) -> str:
        """How a command line refers to it: the path of its file, quoted for a shell, or a shipped name."""
        return shlex.quote(self._path) if self._path else self.name

    def __eq__(self, other: object) -> bool:
        """Compare values, wherever they were read from."""
        # pydantic would compare private attributes too.
        return isinstance(other, Recipe) and dict(self) == dict(other)

    # Python drops the inherited one from a class that defines `__eq__`.
    __hash__ = Section.__hash__

    @model_validator(mode="after")
    def _objective_has_gradients(self) -> Self:
        objective = self.training.objective
        if objective != "elbo" and self.evaluation.aggregation == "majority-vote":
            raise ValueError(
                f"training.objective '{objective}' needs an evaluation.aggregation with gradients; "
                "majority-vote has none"
            )
        return self

    @property
    def run_folder(self) -> str:
        """Default run folder, relative to the working directory."""
        return str(PurePath("runs") / self.name)
