import json

import numpy as np
import pytest

from repa.base.errors import UserError
from repa.data import PrepareConfig, open_data, open_source, prepare
from tests.oracles.data import noise_image


@pytest.fixture
def coco(tmp_path):
    """Images 7, 3 and 12, not sorted by id; 12 has no caption."""
    (tmp_path / "val2014").mkdir()
    (tmp_path / "annotations").mkdir()
    for number in (3, 7, 12):
        noise_image(number).save(tmp_path / f"val2014/{number:06d}.png")
    values = {
        "info": {"year": 2014},
        "images": [{"id": n, "file_name": f"{n:06d}.png", "height": 9} for n in (7, 3, 12)],
        "annotations": [
            {"id": 5, "image_id": 7, "caption": "second  of\nseven."},
            {"id": 2, "image_id": 7, "caption": "First of seven"},
            {"id": 9, "image_id": 3, "caption": "of three"},
        ],
    }
    path = tmp_path / "annotations/captions_val2014.json"
    path.write_text(json.dumps(values))
    return path


def test_images_are_ordered_by_id_with_all_captions(coco, tmp_path):
    source = open_source(coco)
    assert [source.name(k) for k in range(3)] == ["000003.png", "000007.png", "000012.png"]
    assert [source.captions(k) for k in range(3)] == [("of three",), ("First of seven", "second of seven."), ()]
    np.testing.assert_array_equal(np.asarray(source.decode(1)), np.asarray(noise_image(7).convert("RGB")))
    config = PrepareConfig(resolution=8, num_workers=0, text="tiny-text:tokens=4,width=8")
    prepare(str(coco), tmp_path / "out", config)
    data = open_data(tmp_path / "out")
    assert data.captions([1]) == [("First of seven", "second of seven.")]
    assert data.texts.gather([0, 2]).tokens.shape == (2, 4, 8)
    (tmp_path / "val2014").rename(tmp_path / "pictures")
    with pytest.raises(UserError, match="images=FOLDER"):
        open_source(coco)
    again = open_source(f"{coco}:images={tmp_path / 'pictures'}")
    assert again.identity == source.identity


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.pop("annotations"),
        lambda v: v["images"][0].update(file_name="../secret.png"),
        lambda v: v["images"][0].update(file_name=3),
        lambda v: v["images"][0].update(file_name="\ud800.png"),
        lambda v: v["images"][0].pop("id"),
        lambda v: v["annotations"][0].update(caption=None),
        lambda v: v["annotations"][0].update(image_id=99),
        lambda v: v.update(images=[]),
        lambda v: v["annotations"].append(4),
    ],
)
def test_invalid_annotation_files_give_a_one_line_error(coco, change):
    values = json.loads(coco.read_text())
    change(values)
    coco.write_text(json.dumps(values))
    with pytest.raises(UserError):
        open_source(coco)


def test_a_missing_image_is_named(coco, tmp_path):
    (tmp_path / "val2014/000003.png").unlink()
    with pytest.raises(UserError, match=r"000003\.png"):
        open_source(coco)


def test_an_oversized_annotation_file_is_refused_unread(coco):
    with open(coco, "ab") as file:
        file.truncate(2**28 + 1)  # sparse
    with pytest.raises(UserError, match=r"256\.0 MiB"):
        open_source(coco)


@pytest.mark.parametrize(
    ("part", "entry", "why"),
    [
        ("images", {"id": 3, "file_name": "000012.png"}, "two images have the id 3"),
        ("images", {"id": 3.5, "file_name": "x.png"}, "id 3.5 is not a whole number"),
        ("images", {"id": True, "file_name": "x.png"}, "id True is not a whole number"),
        ("annotations", {"id": 1, "image_id": 99, "caption": "x"}, "image_id 99 is none of its images"),
        ("annotations", {"id": 1, "image_id": 3, "bbox": []}, "caption. Give a file such as captions_val2014.json"),
    ],
)
def test_entries_that_name_no_image_are_refused(coco, part, entry, why):
    values = json.loads(coco.read_text())
    values[part].append(entry)
    coco.write_text(json.dumps(values))
    with pytest.raises(UserError, match=why):
        open_source(coco)
