"""Agreement of images and prompts: by words learned from a reference, and by CLIP compared with transformers."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from repa.base.errors import UserError
from repa.cli.main import run as repa
from repa.evaluation import EvaluateConfig, evaluate_file
from repa.evaluation.captions import CaptionAgreement, ClipScore, agreement
from tests.conditions.hub import make

CPU = torch.device("cpu")
COLOURS, PLACES = ("red", "green", "blue"), ("left", "right")


def test_agreement_counts_prompts_that_fit_worse():
    scores = torch.tensor([[3.0, 1, 2], [0, 0, 5], [1, 2, 3]])
    # the two other prompts: both worse; one tied and one better; one better and one worse
    own, shuffled = agreement(lambda rows: scores[rows], torch.tensor([0, 1, 1]))
    assert own == pytest.approx((1 + 0.25 + 0.5) / 3)
    assert shuffled == pytest.approx((0 + 0.25 + 0) / 3)  # of prompts 1, 1, 0
    with pytest.raises(UserError, match="several"):
        agreement(lambda rows: scores[rows, :1], torch.zeros(3, dtype=torch.int64))


def features_of(words, stream):
    """A direction per word, with noise."""
    basis = torch.eye(8)
    rows = [basis[COLOURS.index(c)] + basis[3 + PLACES.index(p)] for c, p in words]
    return torch.stack(rows) + 0.05 * torch.randn(len(rows), 8, generator=stream)


def test_words_are_learned_from_a_captioned_reference():
    stream = torch.Generator().manual_seed(0)
    words = [(COLOURS[k % 3], PLACES[k // 3 % 2]) for k in range(600)]
    captions = [(f"a {c} ball", f"on the {p}") for c, p in words]
    samples = [words[k] for k in range(60)]
    prompts = [f"{c} {p}" for c, p in samples]
    measure = CaptionAgreement(features_of(words, stream), captions, prompts)
    assert measure.vocabulary == ["blue", "green", "left", "red", "right"]  # not "a", "ball", "on", "the"
    seen = features_of(samples, stream)
    for start in (30, 0):  # in any order, as with several processes
        measure.update(torch.arange(start, start + 30), torch.empty(0), seen[start : start + 30])
    found = measure.result()
    assert found["caption_agreement"] == 1
    assert found["caption_agreement_shuffled"] < 0.6
    half = CaptionAgreement(features_of(words, stream), captions, prompts)
    half.update(torch.arange(60), torch.empty(0), torch.randn(60, 8, generator=stream))
    assert 0.3 < half.result()["caption_agreement"] < 0.7
    with pytest.raises(UserError, match="words"):
        CaptionAgreement(features_of(words, stream), [("a ball",)] * 600, prompts)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    transformers.logging.set_verbosity_error()
    return make("clip-l", tmp_path_factory.mktemp("clip") / "clip-l")


def test_the_clip_score_equals_that_of_transformers(clip):
    prompts = ["a red cup", "two dogs on the grass", "a red cup", "the moon is dark"]
    images = torch.randint(256, (4, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    measure = ClipScore("clip-l", clip, prompts, CPU)
    measure.update(torch.tensor([2, 3]), images[2:], torch.empty(0))
    measure.update(torch.tensor([0, 1]), images[:2], torch.empty(0))
    found = measure.result()
    processor = transformers.CLIPImageProcessor.from_pretrained(clip)
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    model = transformers.CLIPModel.from_pretrained(clip).eval()
    pixels = processor([Image.fromarray(x) for x in images.permute(0, 2, 3, 1).numpy()], return_tensors="pt")
    with torch.no_grad():
        output = model(**tokenizer(prompts, padding=True, return_tensors="pt"), **pixels)
    cosines = (output.image_embeds * output.text_embeds).sum(1)
    assert found["clip_score"] == pytest.approx(float(100 * cosines.clamp_min(0).mean()), rel=0.02, abs=0.05)
    assert 0 <= found["clip_agreement"] <= 1


def test_captions_are_measured_on_data_samples_and_runs(captioned_data, text_run, clip, tmp_path, capsys):
    data = str(captioned_data / "stored")
    words = ["--features", "tiny-classifier", "--metrics", "fd", "caption_agreement"]
    out = tmp_path / "real.json"
    assert repa(["evaluate", data, "--reference", data, *words, "--out", str(out)]) == 0
    metrics = json.loads(out.read_text())["metrics"]
    assert list(metrics) == ["fd", "caption_agreement", "caption_agreement_shuffled"]
    assert metrics["caption_agreement"] > 0.9
    sampling = ["--num-images", "6", "--steps", "2"]
    assert repa(["evaluate", str(text_run), "--reference", data, "--prompt-data", data, *words, *sampling]) == 0
    assert "caption_agreement" in capsys.readouterr().out

    path = tmp_path / "samples.npz"
    assert repa(["sample", str(text_run), *sampling, "--prompt", "a dark picture", "number 3", "--out", str(path)]) == 0
    words[-1] = "clip_score"
    assert repa(["evaluate", str(path), "--reference", data, *words, "--clip-weights", str(clip)]) == 0
    (tmp_path / "few.txt").write_text("one\ntwo\n")
    assert repa(["evaluate", str(path), "--reference", data, *words, "--prompts", str(tmp_path / "few.txt")]) == 2
    assert "needs the prompts of all 6" in capsys.readouterr().err
    np.savez(path, arr_0=np.load(path)["arr_0"][::-1])  # the prompts beside it are those of other samples now
    assert repa(["evaluate", str(path), "--reference", data, *words, "--clip-weights", str(clip)]) == 2
    assert "needs the prompts of all 6 samples, but there are 0" in capsys.readouterr().err


def test_invalid_combinations_are_refused(captioned_data, data_folder, tmp_path):
    np.savez(tmp_path / "plain.npz", arr_0=np.zeros((5, 16, 16, 3), np.uint8))
    config = EvaluateConfig(features="tiny-classifier", metrics=("caption_agreement",))
    with pytest.raises(UserError, match="prompt"):
        evaluate_file(tmp_path / "plain.npz", captioned_data / "stored", config, device=CPU)
    (tmp_path / "plain.jsonl").write_text('{"prompt": "a"}\n' * 5)
    with pytest.raises(UserError, match="but the reference has none"):
        evaluate_file(tmp_path / "plain.npz", data_folder, config, device=CPU)
    with pytest.raises(UserError, match="have the same prompt"):
        evaluate_file(tmp_path / "plain.npz", captioned_data / "stored", config, device=CPU)
    with pytest.raises(UserError, match="Unknown CLIP"):
        ClipScore("t5-b", tmp_path, [], CPU)
