"""Weights files made by anyone: what fits is loaded, all else is named, and nothing runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

from carso_cli.classifiers.weights import load_strict, read_header, read_state_dict
from carso_cli.errors import CarsoError, StateError, WeightsError
from carso_cli.io.checksum import fingerprint
from carso_cli.runs.checkpoints import load_tensors, save_tensors
from tests.hostile.conftest import Bounded

NAME = "odd.safetensors"
_DTYPES = ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "X99", "", None, 7]
OTHER_DTYPES = [torch.int8, torch.int64, torch.bool, torch.float16, torch.float64, torch.complex64]
JUNK = st.one_of(
    st.none(), st.integers(-(2**70), 2**70), st.text(max_size=8), st.lists(st.integers(), max_size=3)
)


def module() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in module().state_dict().items()}


def named(error: CarsoError) -> str:
    assert NAME in error.message
    return error.message


def check(place: Path, bounded: Bounded) -> str:
    """Load a file in every way; return `loaded`, or what was said of it."""
    with bounded():
        for read in (read_header, load_tensors):
            try:
                read(place)
            except (WeightsError, StateError) as error:
                named(error)
        target = module()
        before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
        try:
            load_strict(target, read_state_dict(place), place, keys="classifier.depth")
        except WeightsError as error:
            unchanged = all(torch.equal(before[key], value) for key, value in target.state_dict().items())
            return named(error) if unchanged else "changed"
    assert all(bool(tensor.isfinite().all()) for tensor in target.state_dict().values())
    return "loaded"


def with_header(header: Any, body: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


@given(
    name=st.sampled_from(sorted(weights())),
    field=st.sampled_from(["dtype", "shape", "data_offsets", "name", "other", "gone"]),
    junk=JUNK | st.sampled_from(_DTYPES) | st.lists(st.integers(-1, 2**63), min_size=2, max_size=2),
    length=st.none() | st.integers(0, 2**64 - 1),
)
def test_wrong_headers_are_named(
    place: Path, bounded: Bounded, name: str, field: str, junk: Any, length: int | None
) -> None:
    content = save(weights())
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    if field == "name":
        header[str(junk)] = header.pop(name)
    elif field == "gone":
        del header[name]
    elif field == "other":
        header[name] = junk
    else:
        header[name][field] = junk
    place.write_bytes(with_header(header, content[end:], length))
    check(place, bounded)


@given(
    place_in_file=st.floats(0, 1), piece=st.binary(min_size=1, max_size=8), cut=st.floats(0, 1) | st.just(1.0)
)
def test_damage_to_a_sealed_file_is_always_found(
    place: Path, bounded: Bounded, place_in_file: float, piece: bytes, cut: float
) -> None:
    save_tensors(place, weights(), {"epochs": 3})
    whole = place.read_bytes()
    content = bytearray(whole)
    start = int(place_in_file * (len(content) - len(piece)))
    content[start : start + len(piece)] = piece
    place.write_bytes(content[: int(cut * len(content))])
    said = check(place, bounded)
    try:
        tensors, metadata = load_tensors(place)
    except StateError as error:
        named(error)
        assert place.read_bytes() != whole
    else:
        # Spared: another kind of white space after the header.
        assert (fingerprint(tensors), metadata) == (fingerprint(weights()), {"epochs": 3})
        assert said == "loaded"


@given(
    name=st.sampled_from([name for name, tensor in weights().items() if tensor.is_floating_point()]),
    value=st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    half=st.booleans(),
)
def test_weights_that_are_not_finite_are_named(
    place: Path, bounded: Bounded, name: str, value: float, half: bool
) -> None:
    state = weights()
    state[name].reshape(-1)[0] = value
    state[name] = state[name].half() if half else state[name]
    place.write_bytes(save(state))
    assert f"tensor '{name}' holds values that are NaN or infinite" in check(place, bounded)


@given(
    name=st.sampled_from(sorted(weights())),
    dtype=st.sampled_from(OTHER_DTYPES),
)
def test_weights_of_another_kind_are_named(
    place: Path, bounded: Bounded, name: str, dtype: torch.dtype
) -> None:
    state = weights()
    state[name] = torch.ones_like(state[name]).to(dtype)
    place.write_bytes(save(state))
    said = check(place, bounded)
    wanted = weights()[name].dtype
    if wanted.is_floating_point == dtype.is_floating_point and not dtype.is_complex:
        assert said == "loaded"
    else:
        assert f"{name} is {str(dtype).removeprefix('torch.')}" in said


@given(
    st.binary(max_size=400) | st.sampled_from([b"", b"\x80\x02}q\x00.", b"PK\x03\x04", b"\x00" * 1_000_000])
)
def test_other_files_are_named(place: Path, bounded: Bounded, content: bytes) -> None:
    place.write_bytes(content)
    assert check(place, bounded) != "loaded"


@pytest.mark.parametrize("length", [10**8 + 1, 2**40, 2**63, 2**64 - 1])
def test_an_overlong_header_costs_nothing(place: Path, bounded: Bounded, length: int) -> None:
    place.write_bytes(with_header(b"{" + b" " * 1000, b"", length))
    assert "not a readable safetensors file" in check(place, bounded)


def test_a_deeply_nested_header_is_refused(place: Path, bounded: Bounded) -> None:
    place.write_bytes(with_header(b'{"__metadata__": {"x": "' + b"[" * 200_000 + b'"}}', b""))
    assert check(place, bounded) != "loaded"
    with pytest.raises(CarsoError):
        load_tensors(place)
