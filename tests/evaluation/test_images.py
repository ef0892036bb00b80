"""Reading samples from an .npz or a folder: order, formats and damage."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from repa.base.errors import UserError
from repa.evaluation import open_images


def pixels(num=7, height=6, width=4):
    return np.random.default_rng(0).integers(0, 256, (num, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_batches_are_the_images_in_order(save, size, tmp_path):
    save(tmp_path / "s.npz", arr_0=pixels(), arr_1=np.arange(7))  # with labels, as in ADM's files
    file = open_images(tmp_path / "s.npz")
    assert (file.num, file.height, file.width) == (7, 6, 4)
    indices, batches = zip(*file.batches(size), strict=True)
    assert torch.cat(indices).tolist() == list(range(7))
    assert [len(batch) for batch in batches] == [min(size, 7 - start) for start in range(0, 7, size)]
    assert batches[0].dtype == torch.uint8
    assert torch.equal(torch.cat(batches), torch.from_numpy(pixels()).permute(0, 3, 1, 2))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_fortran_order_is_read(save, tmp_path):
    save(tmp_path / "s.npz", arr_0=np.asfortranarray(pixels()))
    batches = [batch for _, batch in open_images(tmp_path / "s.npz").batches(3)]
    assert torch.equal(torch.cat(batches), torch.from_numpy(pixels()).permute(0, 3, 1, 2))


def test_samples_need_no_labels(tmp_path):
    """Loose images, split folders and nested folders, which `prepare` would ask about, are all measured."""
    places = ["0.png", "more/1.png", "train/2.png", "test/a/3.png", "test/b/c/4.png"]
    for place, image in zip(places, pixels(), strict=False):
        path = tmp_path / "samples" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    (tmp_path / "samples" / "0.txt").write_bytes("caf\u00e9".encode("latin-1"))
    found = open_images(tmp_path / "samples").rows(np.arange(5))
    assert {image.numpy().tobytes() for image in found} == {
        torch.from_numpy(image).permute(2, 0, 1).numpy().tobytes() for image in pixels()[:5]
    }


def test_newer_npy_headers_are_read(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, pixels(), version=(2, 0))
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue())
    assert torch.equal(open_images(tmp_path / "s.npz").rows(np.arange(7)).permute(0, 2, 3, 1),
                       torch.from_numpy(pixels()))  # fmt: skip


@pytest.mark.parametrize(
    "array",
    [
        pixels().astype(np.float32),
        pixels().astype(np.int8),
        pixels()[0],
        pixels().transpose(0, 3, 1, 2),
        np.uint8(3),
    ],
)
def test_an_array_of_another_form_is_refused(array, tmp_path):
    np.savez(tmp_path / "s.npz", arr_0=array)
    with pytest.raises(UserError, match=r"s\.npz: arr_0 must be uint8 \(N, H, W, 3\), but is"):
        open_images(tmp_path / "s.npz")


def test_nothing_is_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("executed",)

    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|O", "fortran_order": False, "shape": (2, 4, 4, 3)})
    buffer.write(pickle.dumps(Bomb()))
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue())
    with pytest.raises(UserError, match="arr_0 must be uint8"):
        open_images(tmp_path / "s.npz")


def test_a_file_truncated_anywhere_gives_a_one_line_error(tmp_path):
    path = tmp_path / "s.npz"
    np.savez(path, arr_0=pixels())
    whole = path.read_bytes()
    for end in range(0, len(whole), 37):
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match=r"s\.npz cannot be read as images"):
            open_images(path)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_changed_bytes_give_a_one_line_error(save, order, tmp_path):
    path = tmp_path / "s.npz"
    save(path, arr_0=np.array(pixels(500), order=order))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"s\.npz (is damaged|is truncated|cannot be read)"):
        list(open_images(path).batches(4))


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (3, 0, 0, 3)])
def test_a_file_without_images_is_refused(shape, tmp_path):
    np.savez(tmp_path / "s.npz", arr_0=np.zeros(shape, np.uint8))
    with pytest.raises(UserError, match=r"s\.npz holds no images: arr_0 has the shape"):
        open_images(tmp_path / "s.npz")


@pytest.mark.parametrize("packing", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_arrays_are_refused(packing, tmp_path):
    with zipfile.ZipFile(tmp_path / "s.npz", "w", packing) as archive:
        for array in (pixels(), 255 - pixels()):
            with archive.open("arr_0.npy", "w") as file:
                np.lib.format.write_array(file, array)
    with pytest.raises(UserError, match=r"s\.npz cannot be read as images: it holds 'arr_0\.npy' twice"):
        open_images(tmp_path / "s.npz")


def test_fewer_images_than_announced_are_refused(tmp_path):
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": (9, 6, 4, 3)})
    buffer.write(pixels().tobytes())
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        archive.writestr("arr_0.npy", buffer.getvalue())
    with pytest.raises(UserError, match="is truncated: it declares 9 images but holds 7"):
        open_images(tmp_path / "s.npz")


def test_a_file_that_is_not_an_npz_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"There is no file .*nothing\.npz"):
        open_images(tmp_path / "nothing.npz")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(UserError, match=r"folder\.npz: is a directory"):
        open_images(tmp_path / "folder.npz")
    (tmp_path / "text.npz").write_text("hello")
    np.save(tmp_path / "array.npz.npy", pixels())
    (tmp_path / "array.npz.npy").rename(tmp_path / "array.npz")
    np.savez(tmp_path / "named.npz", images=pixels())
    for name in ("text.npz", "array.npz", "named.npz"):
        with pytest.raises(
            UserError, match="cannot be read as images: .* must be an .npz with uint8 images under arr_0"
        ):
            open_images(tmp_path / name)
