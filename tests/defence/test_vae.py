from __future__ import annotations

import pytest
import torch
from torch import nn

from carso_cli.defence.conditioning import RepresentationEncoder, layer_encoder
from carso_cli.defence.decoder import Decoder, upsampling_plan
from carso_cli.defence.vae import Purifier
from carso_cli.errors import UsageError

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def wide_resnet_28_10_shapes(size: int) -> dict[str, tuple[int, int, int]]:
    """Shapes of the 26 layers of Table 7, in its order."""
    shapes = {}
    for group, (channels, side) in enumerate([(160, size), (320, size // 2), (640, size // 4)]):
        for block in range(4):
            for name in ("conv_0", "conv_1"):
                shapes[f"layer.{group}.block.{block}.{name}"] = (channels, side, side)
            if group and block == 0:
                shapes[f"layer.{group}.block.0.shortcut"] = (channels, side, side)
    return shapes


def count(*modules: nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


@pytest.mark.parametrize(
    ("size", "condition", "latent", "layer_encoders", "features", "compressor", "joint", "heads", "decoder"),
    [
        (32, 512, 128, 28_442_960, 147_040, 75_285_504, 164_096, 33_024, 2_455_107),
        (64, 768, 192, 28_782_600, 377_600, 289_998_336, 737_664, 74_112, 4_914_979),
    ],
)
def test_parameter_counts_of_the_paper(
    size: int,
    condition: int,
    latent: int,
    layer_encoders: int,
    features: int,
    compressor: int,
    joint: int,
    heads: int,
    decoder: int,
) -> None:
    with torch.device("meta"):
        purifier = Purifier(
            wide_resnet_28_10_shapes(size),
            channels=3,
            image_size=size,
            mean=MEAN,
            std=STD,
            condition_features=condition,
            latent_features=latent,
        )
    encoder = purifier.representation_encoder
    assert len(encoder.layers) == 26
    assert count(purifier.input_encoder) == 846
    assert count(encoder.layer_encoders) == layer_encoders
    assert encoder.concatenated_features == features
    assert count(encoder.compressor) == compressor
    assert count(purifier.joint_encoder) == joint
    assert count(purifier.to_mean, purifier.to_log_variance) == heads
    assert count(purifier.decoder) == decoder


def test_upsampling_plans_of_tables_12_and_13() -> None:
    assert upsampling_plan(32) == (3, (0, 0, 0, 0), 2)
    assert upsampling_plan(64) == (4, (1, 1, 1, 1), 3)


@pytest.mark.parametrize("size", range(28, 97))
def test_decoder_gives_every_size(size: int) -> None:
    with torch.device("meta"):
        decoder = Decoder(4, 6, channels=1, image_size=size)
        images = decoder(torch.zeros(2, 4), torch.zeros(2, 6))
    assert images.shape == (2, 1, size, size)


def test_layer_encoder_halves_channels_rounding_up_and_shrinks_by_two() -> None:
    encoder, features = layer_encoder(5, 9, 3)
    convolutions = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)]
    assert [convolution.out_channels for convolution in convolutions] == [3, 2, 1]
    output = encoder.eval()(torch.zeros(2, 5, 9, 9))
    assert output.shape == (2, 1, 3, 3)
    assert features == 9


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_small_maps_are_padded_not_refused(size: int) -> None:
    encoder, features = layer_encoder(16, size, 4)
    assert encoder.eval()(torch.zeros(2, 16, size, size)).flatten(1).shape == (2, features)


def test_layers_without_maps_are_refused() -> None:
    with pytest.raises(UsageError, match=r"layer 'logits' gives outputs of shape \(10,\)"):
        RepresentationEncoder({"logits": (10,)}, 4, 3)


def test_one_channel_purifier_trains_on_28_pixels() -> None:
    purifier = Purifier(
        {"conv": (8, 28, 28)},
        channels=1,
        image_size=28,
        mean=(0.5,),
        std=(0.25,),
        condition_features=12,
        latent_features=4,
    )
    images = torch.rand(3, 1, 28, 28)
    reconstruction, mean, log_variance = purifier(
        images, {"conv": torch.rand(3, 8, 28, 28)}, torch.randn(3, 4)
    )
    assert reconstruction.shape == images.shape
    assert mean.shape == log_variance.shape == (3, 4)
    torch.autograd.backward(reconstruction.sum())
    missing = [name for name, p in purifier.named_parameters() if p.grad is None]
    assert missing == []
