"""The table of encoders against figures computed separately."""

import numpy as np
import pytest
import torch

from repa.analysis import cknna, compare_encoders, encoders, rms_spatial_contrast
from repa.analysis.config import EncodersConfig
from repa.base.errors import UserError
from repa.encoders import load_encoder
from tests.analysis.stand_ins import Rearranged


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(encoders, "SECONDS", 0.0)


def test_every_figure_matches_one_computed_separately(data):
    config = EncodersConfig(
        encoders=("tiny", "tiny-classifier"), num_images=0, neighbours=5, epochs=5, learning_rates=(1e-9, 1e-2)
    )
    seen = []
    found = compare_encoders(data, config, val=data, progress=lambda *n: seen.append(n))
    images = torch.from_numpy(data.gather("images", np.arange(40)))
    patches = {name: load_encoder(name)(images, grid).patches for name, grid in (("tiny", 4), ("tiny-classifier", 2))}
    for row in found.encoders:
        own = patches[row["encoder"]]
        assert (row["dim"], row["grid"] ** 2) == (own.shape[2], own.shape[1])
        assert row["rmsc"] == pytest.approx(rms_spatial_contrast(own).mean().item(), rel=1e-5)
        assert row["bytes_fp16"] == own[0].half().nbytes
        assert row["bytes_int8"] == own[0].to(torch.int8).nbytes + 4 * own.shape[1]
        assert row["images_per_second"] > 0
        assert row["top1"] > 0.8  # with the better learning rate
        assert row["cds"] is None  # no distance of 8 on a grid of 4
    assert found.encoders[0]["lds"] is not None
    assert found.encoders[1]["lds"] is None  # a grid of 2 has no distance of 6
    (pair,) = found.pairs
    expected = cknna(patches["tiny"].mean(1), patches["tiny-classifier"].mean(1), 5)
    assert pair == {"a": "tiny", "b": "tiny-classifier", "cknna": pytest.approx(expected, abs=1e-5)}
    assert seen[-1] == (160, 160)


def test_the_accuracy_is_from_the_best_learning_rate(data, monkeypatch):
    found = [{"lr": rate, "top1": top1, "top5": top1 + 0.1} for rate, top1 in ((1e-4, 0.3), (1e-3, 0.6), (1e-2, 0.5))]
    monkeypatch.setattr(encoders, "probe_rows", lambda *_: found)
    (row,) = compare_encoders(data, EncodersConfig(encoders=("tiny",), neighbours=5)).encoders
    assert (row["top1"], row["top5"]) == (0.6, 0.7)


def test_a_finer_grid_fills_every_column(data):
    config = EncodersConfig(encoders=("tiny",), grid=8, neighbours=5, epochs=1)
    (row,) = compare_encoders(data, config).encoders
    assert None not in (row["lds"], row["cds"], row["rmsc"])
    assert row["grid"] == 8


def test_data_of_one_class_has_no_probe(data):
    config = EncodersConfig(encoders=("tiny",), neighbours=5)
    (row,) = compare_encoders(Rearranged(data, num_classes=1), config).encoders
    assert row["top1"] is None
    assert row["rmsc"] > 0


def test_missing_weights_are_reported_before_any_work(data, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("an encoder worked")

    monkeypatch.setattr(encoders, "features_of_encoder", never)
    weights = {"tiny-classifier": str(tmp_path / "nowhere")}
    with pytest.raises(UserError, match="nowhere .* does not exist"):
        compare_encoders(data, EncodersConfig(neighbours=5, encoder_weights=weights))


def test_invalid_input_is_refused(data):
    with pytest.raises(UserError, match="10 neighbours need more than 10 images, but there are 10"):
        compare_encoders(data, EncodersConfig(num_images=10))
    with pytest.raises(UserError, match="must name at least one encoder, each once"):
        EncodersConfig.parse({"encoders": ("tiny", "tiny")})
    with pytest.raises(UserError, match="encoder 'tinny'"):
        EncodersConfig.parse({"encoders": ("tinny",)})
    with pytest.raises(UserError, match="stores no images"):
        compare_encoders(Rearranged(data, has_images=False), EncodersConfig())
