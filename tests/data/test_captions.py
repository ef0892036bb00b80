"""Captions from the source to the prepared data."""

import pytest

from repa.base.errors import UserError
from repa.data import PrepareConfig, open_data, prepare
from repa.data.reader import texts_of

CONFIG = PrepareConfig(resolution=8, shard_size=3, batch_size=2, num_workers=0)


@pytest.fixture
def out(folder, tmp_path):
    """Every other image of `ants` has captions; the last image of `bees` has one with unusual characters."""
    for i in (0, 2, 4, 6):
        (folder / "ants" / f"{i:03d}.txt").write_text(f"ant {i}\na small ant\n")
    (folder / "bees" / "003.txt").write_text("bee \u2028 \x85 \u00fc \U0001f41d\n")
    prepare(folder, tmp_path / "out", CONFIG.override(flip=True))
    return tmp_path / "out"


def test_captions_belong_to_their_images_and_mirrored_copies(out):
    data = open_data(out)
    assert data.has_captions
    wanted = [(f"ant {i}", "a small ant") if i % 2 == 0 else () for i in range(7)] + [(), (), ()]
    bee = data.captions([10])[0]
    assert bee[0].startswith("bee")
    assert bee[-1].endswith("\u00fc \U0001f41d")
    assert data.captions(range(22)) == [*wanted, bee] * 2
    assert data.captions([21, 2, 0, 2]) == [bee, wanted[2], wanted[0], wanted[2]]
    with pytest.raises(IndexError, match="images 0 to 21"):
        data.captions([22])


def test_data_without_captions_has_none(folder, tmp_path):
    prepare(folder, tmp_path / "out", CONFIG)
    data = open_data(tmp_path / "out")
    assert not data.has_captions
    assert data.captions([3, 1]) == [(), ()]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda text: text.replace("[", "{", 1), r"captions-00000\.jsonl is damaged in line 1"),
        (lambda text: text.replace("\n", " ", 1), r"has captions of 2 images, but its shard has 3"),
    ],
)
def test_damaged_captions_are_named(out, change, sentence):
    path = out / "captions-00000.jsonl"
    path.write_text(change(path.read_text()))
    with pytest.raises(UserError, match=sentence):
        open_data(out).captions([0])


def test_lone_surrogates_in_captions_are_replaced(tmp_path):
    """JSON can contain them, but UTF-8 files, tokenizers and pages cannot."""
    assert texts_of(b'["a \\ud800 b", "\\ud83d\\ude00"]', 0, tmp_path / "x") == ("a \ufffd b", "\U0001f600")
