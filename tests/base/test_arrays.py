"""Array files that may be foreign or damaged."""

import io
import warnings
import zipfile

import numpy as np
import pytest

from repa.base.arrays import load_npz, map_npz
from repa.base.errors import UserError


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_flipped_bit_never_changes_or_hides_an_array(every, tmp_path):
    arrays = {"mu": np.arange(3.0), "sigma": np.eye(3), "count": np.array(7)}
    file = io.BytesIO()
    np.savez(file, **arrays)
    whole, path = file.getvalue(), tmp_path / "a.npz"
    for position in range(0, len(whole), every):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            found = load_npz(path, "a reference")
        except UserError:
            continue
        assert found.keys() == arrays.keys(), position
        assert all(np.array_equal(found[name], arrays[name]) for name in arrays), position


@pytest.mark.parametrize("read", [lambda path: load_npz(path, "arrays"), lambda path: map_npz(path, "arrays", "mu")])
def test_a_duplicate_array_is_refused(read, tmp_path):
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        warnings.simplefilter("ignore")  # zipfile warns about the duplicate name
        for value in (1.0, 2.0):
            file = io.BytesIO()
            np.save(file, np.full(3, value))
            archive.writestr("mu.npy", file.getvalue())
    with pytest.raises(UserError, match=r"'mu\.npy' twice"):
        read(tmp_path / "a.npz")
