"""Files of arrays that anyone may have written, or a disk may have changed."""

import io

import numpy as np

from repa.base.arrays import load_npz
from repa.base.errors import UserError


def test_no_flipped_bit_changes_or_hides_an_array(tmp_path):
    arrays = {"mu": np.arange(3.0), "sigma": np.eye(3), "count": np.array(7)}
    file = io.BytesIO()
    np.savez(file, **arrays)
    whole, path = file.getvalue(), tmp_path / "a.npz"
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            found = load_npz(path, "a reference")
        except UserError:
            continue
        assert found.keys() == arrays.keys(), position
        assert all(np.array_equal(found[name], arrays[name]) for name in arrays), position
