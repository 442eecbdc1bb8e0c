"""The key map between the authors' published files and our purifier.

They publish three safetensors files per purifier, without the three that training needs. Their parts are
nested sequences with positions as keys; ours have names.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

PUBLISHED_PARTS = ("repr_compressors", "repr_fcn_compressor", "decoder")
"""Suffixes of the published files, enough for inference."""

TRAINING_PARTS = ("input_compressor", "joint_fcn_compressor", "neck")
"""Suffixes of the encoder's files, needed to train and not published."""

# (prefix in their file, prefix in our state dict); the rest of a key is common to both.
_PREFIXES: dict[str, tuple[tuple[str, str], ...]] = {
    "repr_compressors": (("", "representation_encoder.layer_encoders."),),
    # Their sequences begin with the concatenation of Tables 10 and 11, which has no weights: hence 1.
    "repr_fcn_compressor": (("1.", "representation_encoder.compressor."),),
    "decoder": (
        ("0.1.", "decoder.stem.0."),
        ("1.", "decoder.blocks.0."),
        ("2.", "decoder.blocks.1."),
        ("3.", "decoder.blocks.2."),
        ("4.", "decoder.blocks.3."),
        ("5.", "decoder.last."),
    ),
    "input_compressor": (("", "input_encoder."),),
    "joint_fcn_compressor": (("1.", "joint_encoder."),),
    "neck": (("x_to_mu.", "to_mean."), ("x_to_log_var.", "to_log_variance.")),
}


def from_release(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of one published part to our keys.

    Args:
        part: One of `PUBLISHED_PARTS` or `TRAINING_PARTS`.
        tensors: The file's tensors under their own keys.

    Raises:
        KeyError: If a key has none of the part's known prefixes. What is missing, strict loading will find.
    """
    renamed = {}
    for key, tensor in tensors.items():
        for theirs, ours in _PREFIXES[part]:
            # No prefix of a part begins another one, so the first match is the only one.
            if key.startswith(theirs):
                renamed[ours + key.removeprefix(theirs)] = tensor
                break
        else:
            raise KeyError(key)
    return renamed


def to_release(part: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select one part from our state dict and rename its tensors to the published form."""
    return {
        theirs + key.removeprefix(ours): tensor
        for theirs, ours in _PREFIXES[part]
        for key, tensor in state.items()
        if key.startswith(ours)
    }
