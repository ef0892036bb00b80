"""Text tokens of captions, written by `prepare` and read per image."""

import json

import numpy as np
import pytest
import torch

from repa.base.errors import UserError
from repa.base.files import read_json
from repa.conditions import encoders, load_text_encoder
from repa.data import PrepareConfig, add, check_bytes, check_models, open_data, pipeline, prepare, remove
from repa.data.manifest import Manifest
from tests.data.conftest import content

TINY = "tiny-text:tokens=5,width=8"
CONFIG = PrepareConfig(resolution=8, shard_size=3, batch_size=2, num_workers=0, text=TINY)
CAPTIONS = {("ants", i): (f"ant {i}", "a small ant")[: 1 + i % 2] for i in range(0, 7, 2)} | {("bees", 3): ("a bee",)}
IMAGES = [("ants", i) for i in range(7)] + [("bees", i) for i in range(4)]


@pytest.fixture
def source(folder):
    for (name, i), texts in CAPTIONS.items():
        (folder / name / f"{i:03d}.txt").write_text("\n".join(texts))
    return folder


def tokens_of(text):
    """Tokens (S, E) and mask (S,) from the encoder."""
    found = load_text_encoder(TINY)([text])
    return found.tokens[0], found.mask[0]


@pytest.mark.parametrize(("form", "tolerance"), [("fp16", 2e-3), ("int8", 0.03)])
def test_each_image_has_its_own_captions(source, tmp_path, form, tolerance, monkeypatch):
    manifest = prepare(source, tmp_path / "out", CONFIG.override(text_form=form, flip=True))
    assert manifest.text.fields["text"] == ({"fp16": "float16", "int8": "int8"}[form], (5, 8))
    assert [bool(shard.text) for shard in manifest.shards] == [True] * 4 + [False] * 4
    data = open_data(tmp_path / "out")
    indices = np.array([21, 2, 0, 13, 4, 1])  # indices from 11 on are flipped copies
    for key in range(3):
        text = data.texts.gather(indices, [key] * 6).unpacked()
        for row, index in enumerate(indices):
            texts = CAPTIONS.get(IMAGES[index % 11], ("",))
            tokens, mask = tokens_of(texts[key % len(texts)])
            torch.testing.assert_close(text.tokens[row], tokens, rtol=tolerance, atol=tolerance)
            assert torch.equal(text.mask[row], mask)
    empty = data.texts.empty().unpacked()
    torch.testing.assert_close(empty.tokens[0], tokens_of("")[0], rtol=tolerance, atol=tolerance)
    assert check_bytes(tmp_path / "out") > 0
    (finding,) = [found for found in check_models(tmp_path / "out") if found.field == "text"]
    assert 0 <= finding.error < 2 * tolerance
    assert finding.trouble == ""
    monkeypatch.setattr(encoders, "POSITION", 3.0)  # simulates other weights under the same name
    (finding,) = [found for found in check_models(tmp_path / "out") if found.field == "text"]
    assert "differs" in finding.trouble


@pytest.mark.parametrize("more", [{}, {"text_weights": "nowhere"}])
def test_a_missing_text_encoder_is_reported_before_any_image_is_read(source, tmp_path, monkeypatch, more):
    monkeypatch.setenv("REPA_CACHE", str(tmp_path))
    monkeypatch.setattr(pipeline, "write_shard", lambda *_: pytest.fail("a shard was written"))
    with pytest.raises(UserError, match="text encoder clip-b"):
        prepare(source, tmp_path / "out", CONFIG.override(text="clip-b", **more))


def interrupt_at_the_third_shard(monkeypatch):
    """A list that records every shard written from now on; the third is interrupted."""
    real, calls = pipeline.write_shard, []

    def stops(*arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(pipeline, "write_shard", stops)
    return calls


def test_text_tokens_are_added_later_resumed_and_removed(source, tmp_path, monkeypatch):
    prepare(source, tmp_path / "whole", CONFIG)
    out = tmp_path / "out"
    prepare(source, out, CONFIG.override(text=""))
    before = content(out)
    assert open_data(out).text is None

    calls = interrupt_at_the_third_shard(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        add(out, f"text:{TINY}")
    assert open_data(out).text is None  # the old manifest is valid until everything is written
    assert add(out, f"text:{TINY}", rank=0, world=2) is None  # a single process's share does not finish it
    assert add(out, "text").text.num_tokens == 5
    assert len(calls) == 3 + 2  # two shards were finished before
    assert content(out) == content(tmp_path / "whole")
    assert prepare(source, out, CONFIG) == Manifest.open(out)
    remove(out, "text")
    changed = {"manifest.json"}
    assert {k: v for k, v in content(out).items() if k not in changed} == {
        k: v for k, v in before.items() if k not in changed
    }
    assert open_data(out).text is None


def test_finished_text_tokens_stay_when_an_encoder_is_removed(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare(source, out, CONFIG.override(text="", features=("tiny",)))
    calls = interrupt_at_the_third_shard(monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        add(out, f"text:{TINY}")
    remove(out, "features:tiny")
    add(out, "text")
    assert len(calls) == 3 + 2  # two shards were finished before
    prepare(source, tmp_path / "whole", CONFIG)
    assert content(out) == content(tmp_path / "whole")


def test_changed_text_settings_and_missing_captions_are_refused(source, folder, tmp_path):
    out = tmp_path / "out"
    prepare(source, out, CONFIG)
    with pytest.raises(UserError, match=r"\(text: "):
        prepare(source, out, CONFIG.override(text="tiny-text:tokens=6,width=8"))
    with pytest.raises(UserError, match=r"\(text_form: "):
        prepare(source, out, CONFIG.override(text_form="int8"))
    assert prepare(source, out, CONFIG.override(text="")).config.text == TINY
    for path in folder.rglob("*.txt"):
        path.unlink()
    with pytest.raises(UserError, match="no captions"):
        prepare(folder, tmp_path / "other", CONFIG)
    prepare(folder, tmp_path / "plain", CONFIG.override(text=""))
    with pytest.raises(UserError, match="no captions"):
        add(tmp_path / "plain", f"text:{TINY}")


def test_manifests_and_rows_that_disagree_are_refused(source, tmp_path):
    out = tmp_path / "out"
    prepare(source, out, CONFIG)
    manifest = read_json(out / "manifest.json")
    for change in (
        lambda m: m["shards"][0]["text"].pop("text_mask"),
        lambda m: m["text"].update(num_tokens=6),
        lambda m: m.update(text=None),
        lambda m: m["shards"][1]["text"]["text"].update(file="../text.npy"),
        lambda m: m["shards"][1]["text"]["text"].update(shape=[1, 5, 8]),
    ):
        changed = json.loads(json.dumps(manifest))
        change(changed)
        (out / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(UserError):
            open_data(out)
    (out / "manifest.json").write_text(json.dumps(manifest))
    rows = np.load(out / "text_rows-00000.npy")
    rows[1] = [2, 10]
    np.save(out / "text_rows-00000.npy", rows)
    with pytest.raises(UserError, match="image 1"):
        open_data(out).texts.gather([1])
