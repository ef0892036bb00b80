"""Which cached hub folders are complete, and what is requested from the hub otherwise."""

import json

import pytest

from repa.base.errors import UserError
from repa.base.pretrained import Repository, weights_named

FILES = (("config.json",), weights_named("model", "pytorch_model"))
REPOSITORY = Repository("network", "me/net", FILES, "give a folder", subfolder="part")


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """A function that writes files into the hub's cache; the hub has no other files, and `asked` records requests."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "models--me--net" / "snapshots" / ("0" * 40)
    (folder / "part").mkdir(parents=True)
    (tmp_path / "models--me--net" / "refs").mkdir()
    (tmp_path / "models--me--net" / "refs" / "main").write_text("0" * 40)

    def write(**contents):
        for name, content in contents.items():
            (folder / "part" / name.replace("__", "-").replace("_", ".")).write_text(content)
        return folder / "part"

    write.asked = []
    monkeypatch.setattr(
        "huggingface_hub.snapshot_download",
        lambda name, allow_patterns, **_: write.asked.append(allow_patterns) or folder,
    )
    return write


def test_a_complete_cached_folder_is_used_without_a_request(snapshot):
    folder = snapshot(config_json="{}", model_safetensors="")
    assert REPOSITORY.folder() == REPOSITORY.cached() == folder
    assert not snapshot.asked


def test_a_weight_index_needs_all_its_files(snapshot):
    parts = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}
    folder = snapshot(config_json="{}", model_safetensors_index_json=json.dumps({"weight_map": parts}))
    snapshot(model__1_safetensors="")
    assert REPOSITORY.cached() is None
    snapshot(model__2_safetensors="")
    assert REPOSITORY.cached() == folder


def test_pickles_are_requested_last(snapshot):
    snapshot(config_json="{}")
    with pytest.raises(UserError, match=r"it has no model\.safetensors.* or give a folder"):
        REPOSITORY.folder()
    first, second = ({pattern.removeprefix("part/") for pattern in asked} for asked in snapshot.asked)
    assert first == {"config.json", "model.safetensors", "model.safetensors.index.json", "model-*.safetensors"}
    assert second - first == {"pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"}


def test_an_invalid_hub_name_is_refused():
    with pytest.raises(UserError, match="could not be downloaded"):
        Repository("network", "a/b/c", FILES, "give a folder").fetched()
