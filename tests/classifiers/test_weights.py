from __future__ import annotations

import argparse
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from carso_cli.classifiers.weights import load_strict, read_header, read_state_dict, split_standardisation
from carso_cli.errors import WeightsError

TENSORS = {"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])}


def assert_tensors(state: dict[str, Tensor]) -> None:
    assert sorted(state) == ["bias", "weight"]
    for name, tensor in TENSORS.items():
        assert torch.equal(state[name], tensor)


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("raise SystemExit('code of the file ran')",)


def test_reads_safetensors(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.safetensors")
    assert_tensors(read_state_dict(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    "content",
    [
        TENSORS,
        OrderedDict(TENSORS),
        {"state_dict": TENSORS, "epoch": 3},
        {"model_state_dict": TENSORS},
        {f"module.{name}": tensor for name, tensor in TENSORS.items()},
        {"model_state_dict": {f"module.0.{name}": tensor for name, tensor in TENSORS.items()}},
        {f"model.{name}": tensor for name, tensor in TENSORS.items()},
        {"state_dict": {f"module.model.{name}": tensor for name, tensor in TENSORS.items()}},
        {f"_orig_mod.{name}": tensor for name, tensor in TENSORS.items()},
        {f"module._orig_mod.{name}": tensor for name, tensor in TENSORS.items()},
        {f"_orig_mod.module.{name}": tensor for name, tensor in TENSORS.items()},
        {"net": {"state_dict": TENSORS}, "acc": np.float64(0.5), "epoch": np.int64(3)},
        {"model": TENSORS, "args": argparse.Namespace(lr=0.1)},
        {"params": TENSORS, "ema": {"weight": torch.zeros(1)}},
    ],
    ids=[
        *("plain", "ordered", "state_dict", "model_state_dict", "module", "module.0", "model", "all"),
        *("compiled", "compiled in DDP", "DDP compiled", "nested twice", "arguments", "averages beside"),
    ],
)
@pytest.mark.parametrize("name", ["a.pt", "a.pth"])
def test_unwraps_pytorch_files(tmp_path: Path, content: Any, name: str) -> None:
    torch.save(content, tmp_path / name)
    assert_tensors(read_state_dict(tmp_path / name))


def test_the_content_decides_and_not_the_name(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "a.pt", metadata={"activation": '"silu"'})
    torch.save(TENSORS, tmp_path / "b.safetensors")
    torch.save(TENSORS, tmp_path / "c", _use_new_zipfile_serialization=False)
    for name in ("a.pt", "b.safetensors", "c"):
        assert_tensors(read_state_dict(tmp_path / name))
    assert read_header(tmp_path / "a.pt") == {"activation": "silu"}
    assert read_header(tmp_path / "b.safetensors") == {}


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize(
    ("content", "kind", "hint"),
    [
        (b"\n <!DOCTYPE html><html>", "a web page", "browser"),
        (LFS, "a Git LFS pointer", "git lfs pull"),
        (b"\x1f\x8b" + bytes(20), "compressed by gzip", "unpack"),
        (b"\x89HDF\r\n" + bytes(20), "an HDF5 file", "own framework"),
        (b"\x93NUMPY" + bytes(20), "a NumPy array", "state dict"),
    ],
)
def test_says_what_a_file_is_instead(tmp_path: Path, name: str, content: bytes, kind: str, hint: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match=f"{name} is {kind}") as caught:
        read_state_dict(tmp_path / name)
    assert hint in caught.value.hint


def test_says_that_an_archive_is_torchscript_or_no_weights(tmp_path: Path) -> None:
    module = torch.jit.trace(nn.Linear(2, 1), torch.ones(1, 2))  # type: ignore[no-untyped-call]
    torch.jit.save(module, tmp_path / "script.pt")
    with pytest.raises(WeightsError, match=r"script\.pt is a TorchScript archive") as caught:
        read_state_dict(tmp_path / "script.pt")
    assert "torch.jit.load(FILE).state_dict()" in caught.value.hint
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as archive:
        archive.writestr("photos/cat.png", b"1")
    with pytest.raises(WeightsError, match="zip file without weights of PyTorch"):
        read_state_dict(tmp_path / "other.pt")
    torch.save(nn.Linear(2, 1), tmp_path / "whole.pt")
    with pytest.raises(WeightsError, match=r"torch\.nn\.modules\.linear\.Linear") as caught:
        read_state_dict(tmp_path / "whole.pt")
    assert "model.state_dict()" in caught.value.hint


@pytest.mark.parametrize(
    ("prefix", "mean", "std"),
    [("1.", "0.mean", "0.std"), ("model.", "normalize.mu", "normalize.sigma"), ("", "mean", "std")],
)
def test_splits_off_a_layer_that_standardises(prefix: str, mean: str, std: str) -> None:
    state = {f"{prefix}{name}": tensor for name, tensor in TENSORS.items()}
    state |= {mean: torch.tensor([0.25, 0.5, 0.75]).reshape(1, 3, 1, 1), std: torch.tensor([0.125])}
    rest, own = split_standardisation(state)
    if prefix:
        assert_tensors(rest)
    assert own == {"mean": (0.25, 0.5, 0.75), "std": (0.125,)}
    # Batch statistics, or a lone parameter of that name, are the network's own.
    plain = {"running_mean": torch.ones(3), "head.mean": torch.ones(3), "weight": torch.ones(2)}
    assert split_standardisation(plain) == (plain, {})


def test_keeps_a_prefix_that_some_names_lack(tmp_path: Path) -> None:
    torch.save({"model.weight": torch.ones(1), "head": torch.ones(1)}, tmp_path / "a.pt")
    assert sorted(read_state_dict(tmp_path / "a.pt")) == ["head", "model.weight"]


@pytest.mark.parametrize("form", ["zip", "legacy"])
@pytest.mark.parametrize("content", [{"state_dict": Payload()}, nn.Linear(2, 1)], ids=["code", "module"])
def test_refuses_more_than_tensors_and_never_runs_it(tmp_path: Path, content: Any, form: str) -> None:
    path = tmp_path / "evil.pt"
    torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(WeightsError, match=r"evil\.pt holds more than tensors") as caught:
        read_state_dict(path)
    assert caught.value.exit_code == 3


def test_never_runs_code_of_a_plain_pickle(tmp_path: Path) -> None:
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(Payload()))
    with pytest.raises(WeightsError, match=r"evil\.pkl"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [{}, {"weight": 3}, [torch.ones(1)], torch.ones(2)])
def test_refuses_what_is_no_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "odd.pt")
    with pytest.raises(WeightsError, match=r"odd\.pt holds no state dict"):
        read_state_dict(tmp_path / "odd.pt")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("damage", ["text", "empty", "cut", "flipped header"])
def test_names_a_damaged_file(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    if name.endswith(".pt"):
        torch.save(TENSORS, path)
    else:
        save_file(TENSORS, path)
    whole = path.read_bytes()
    contents = {"text": b"not weights", "empty": b"", "cut": whole[: len(whole) // 2]}
    path.write_bytes(contents.get(damage, b"\xff" * 8 + whole[8:]))
    with pytest.raises(WeightsError, match=f"{name} is not a readable"):
        read_state_dict(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_names_a_tensor_that_is_not_finite(tmp_path: Path, value: float) -> None:
    save_file(TENSORS | {"broken": torch.tensor([0.0, value])}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"a\.safetensors: tensor 'broken' holds values that are NaN"):
        read_state_dict(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(2**40),
        torch.zeros(1, dtype=torch.int64).expand(2**40),
        torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (2**40,), check_invariants=True),
        torch.empty(3, device="meta"),
        torch.ones(3).to(torch.float8_e4m3fn),
    ],
    ids=["more than there is", "more integers", "sparse", "without values", "eight bits"],
)
def test_names_a_tensor_that_is_no_plain_array(tmp_path: Path, tensor: Tensor) -> None:
    torch.save({"fine": torch.ones(1), "odd": tensor}, tmp_path / "a.pt")
    with pytest.raises(WeightsError, match=r"a\.pt: tensor 'odd' is no plain array"):
        read_state_dict(tmp_path / "a.pt")


def test_refuses_a_pytorch_file_that_would_unpack_to_any_size(tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(1000)}, tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "a.pt") as plain, zipfile.ZipFile(tmp_path / "b.pt", "w") as packed:
        for part in plain.namelist():
            packed.writestr(part, plain.read(part), zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match=r"b\.pt holds compressed parts"):
        read_state_dict(tmp_path / "b.pt")


def test_reads_our_header_and_ignores_that_of_others(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "ours.safetensors", metadata={"activation": '"silu"', "std": "[0.5]"})
    save_file(TENSORS, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert read_header(tmp_path / "ours.safetensors") == {"activation": "silu", "std": [0.5]}
    assert read_header(tmp_path / "theirs.safetensors") == {}


def test_loads_strictly() -> None:
    module = nn.Linear(2, 1)
    load_strict(module, TENSORS, "a.pt", keys="depth")
    assert torch.equal(module.weight, TENSORS["weight"])


def test_lists_what_does_not_fit() -> None:
    module = nn.Sequential(nn.Linear(2, 12), nn.Linear(12, 3))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    state["0.weights"] = state.pop("0.weight")
    state["1.weight"] = torch.ones(5, 12)
    with pytest.raises(WeightsError) as caught:
        load_strict(module, state, "a.pt", keys="classifier.depth")
    assert caught.value.message.splitlines() == [
        "a.pt does not fit the architecture:",
        "1 missing: 0.weight (did you mean '0.weights'?)",
        "1 unexpected: 0.weights (did you mean '0.weight'?)",
        "1 of another shape: 1.weight is (5, 12), not (3, 12)",
    ]
    assert caught.value.hint == "check classifier.depth, data.classes and data.channels in the recipe"
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_lists_eight_names_and_the_count() -> None:
    module = nn.Sequential(*(nn.Linear(1, 1) for _ in range(6)))
    with pytest.raises(WeightsError) as caught:
        load_strict(module, {}, "a.pt", keys="depth")
    line = caught.value.message.splitlines()[1]
    assert line.startswith("12 missing: 0.weight, 0.bias,")
    assert line.endswith("3.weight, 3.bias, …")
