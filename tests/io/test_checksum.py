from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from carso_cli.errors import StateError
from carso_cli.io.checksum import CHECKSUM_KEY, add_checksum, file_digest, fingerprint, remove_checksum
from carso_cli.io.json_files import append_json_lines, read_json, read_json_lines, write_json

VALUES: dict[Any, Any] = {"accuracy": 0.25, "job": "defence/pgd", "steps": [1, (2.5, None)], 3: {"é": True}}


def test_what_was_sealed_comes_back() -> None:
    stored = json.loads(json.dumps(add_checksum(VALUES)))
    assert remove_checksum(stored, "here") == json.loads(json.dumps(VALUES))


def test_layout_and_order_do_not_matter() -> None:
    stored = json.loads(json.dumps(dict(reversed(add_checksum(VALUES).items())), indent=3))
    assert remove_checksum(stored, "here") == json.loads(json.dumps(VALUES))


def test_a_changed_value_is_named() -> None:
    stored = {**add_checksum({"accuracy": 0.25}), "accuracy": 0.75}
    with pytest.raises(StateError, match="here is damaged: its values do not match"):
        remove_checksum(stored, "here")
    with pytest.raises(StateError, match="here is damaged: its values carry no checksum"):
        remove_checksum({"accuracy": 0.75}, "here")
    with pytest.raises(StateError, match="here is damaged: its values do not match"):
        remove_checksum({**add_checksum({"accuracy": 0.25}), "accuracy": math.inf}, "here")
    assert CHECKSUM_KEY not in remove_checksum(add_checksum({}), "here")


@pytest.mark.parametrize("kind", ["object", "lines"])
def test_no_flipped_bit_of_a_stored_number_is_read_as_a_number(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    records = [{"correct": 13, "draws": 20}, {"correct": 7, "draws": 20}]
    if kind == "lines":
        append_json_lines(path, records)
    else:
        write_json(path, records[0])
    whole, named = path.read_bytes(), set[bool]()
    for place in range(0, 8 * len(whole), 5):
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(bytes(content))
        try:
            found = read_json_lines(path) if kind == "lines" else [read_json(path)]
        except StateError as error:
            named.add(str(path) in error.message)
            continue
        # Spared: white space, and a last line cut off with its newline.
        values = [{key: one[key] for key in records[0]} for one in found]
        assert values == records[: len(values)]
    assert named == {True}


def test_fingerprint_depends_on_names_and_shapes() -> None:
    values = torch.arange(6.0)
    assert fingerprint({"a": values}) != fingerprint({"b": values})
    assert fingerprint({"a": values}) != fingerprint({"a": values.reshape(2, 3)})
    assert fingerprint({"a": values, "b": values}) == fingerprint({"b": values.clone(), "a": values})


def test_digests(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a", "md5") == "900150983cd24fb0d6963f7d28e17f72"
    assert file_digest(tmp_path / "a", "sha256").startswith("ba7816bf8f01cfea414140de5dae2223b00361a3")
