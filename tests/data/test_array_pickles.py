from __future__ import annotations

import io
import pickle

import numpy as np
import pytest

from carso_cli.data import array_pickles

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 12), dtype=np.uint8)
# A dictionary of an 8-bit text of Python 2, as the published files hold: {'label': 'caf\xe9'}.
OF_PYTHON_2 = b"(dp0\nS'label'\np1\nS'caf\\xe9'\np2\ns."


@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_and_containers_come_back(protocol: int) -> None:
    content = {"data": PIXELS, "labels": [1, 2, 3], "names": ("a", b"b"), "scale": 0.5}
    found = array_pickles.load(io.BytesIO(pickle.dumps(content, protocol=protocol)))
    np.testing.assert_array_equal(found.pop("data"), PIXELS)
    assert found == {"labels": [1, 2, 3], "names": ("a", b"b"), "scale": 0.5}


def test_texts_of_python_2_are_decoded_as_asked() -> None:
    assert array_pickles.load(io.BytesIO(OF_PYTHON_2), encoding="latin1") == {"label": "caf\xe9"}


@pytest.mark.parametrize("value", [print, np.load, array_pickles.load, OSError("x")])
def test_all_else_is_refused(value: object) -> None:
    with pytest.raises(pickle.UnpicklingError, match="neither an array nor a plain container"):
        array_pickles.load(io.BytesIO(pickle.dumps({"data": [value]})))
