"""Sampling from prompts and negative prompts."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from repa.base import files
from repa.base.errors import UserError
from repa.cli.main import run as repa
from repa.conditions import load_text_encoder
from repa.conditions.loading import prompts_in
from repa.models import Condition
from repa.runs import load_run
from repa.sampling import SampleConfig, generate, prepared, write_samples

TINY = "tiny-text:tokens=4,width=8"
CONFIG = SampleConfig(sampler="heun", steps=3, precision="fp32", prompt=("a dark picture", "a light picture"))


def images(run, config, indices):
    loaded = prepared(load_run(run), config)
    return generate(loaded, config, indices).images


def test_an_image_depends_only_on_its_seed_and_prompt(text_run):
    both = images(text_run, CONFIG, range(4))
    one = images(text_run, CONFIG.override(prompt=("a light picture",)), [1, 2])
    assert torch.equal(one[0], both[1])
    assert not torch.equal(one[1], both[2])  # the same noise with another text


def test_guidance_extrapolates_between_the_two_prompts(text_run):
    run = load_run(text_run)
    encoder = load_text_encoder(TINY)
    own, negative = encoder(["a dark picture"]), encoder(["number 3"])
    x, t, labels = torch.randn(1, *run.latent_shape), torch.tensor([0.4]), torch.zeros(1, dtype=torch.int64)

    def velocity(text):
        return run.model({"x": x}, t, Condition(labels, *text)).prediction["x"]

    for other, given in ((encoder([""]), None), (negative, negative)):
        wanted = velocity(other) + 3 * (velocity(own) - velocity(other))
        found = run.denoiser(labels, ["cfg:scale=3"], text=own, negative=given).velocity(x, 0.4)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-2)


def test_prompts_come_from_a_file_or_from_data(text_run, captioned_data, tmp_path):
    (tmp_path / "a.txt").write_text("a dark picture\n\n  a light picture \n")
    (tmp_path / "a.jsonl").write_text('{"tag": "one", "prompt": "a dark picture"}\n{"caption": "a light picture"}\n')
    wanted = images(text_run, CONFIG, range(2))
    for name in ("a.txt", "a.jsonl"):
        config = CONFIG.override(prompt=(), prompt_file=str(tmp_path / name))
        assert torch.equal(images(text_run, config, range(2)), wanted)
    config = CONFIG.override(prompt=(), prompt_data=str(captioned_data / "stored"))
    loaded = prepared(load_run(text_run), config)
    assert loaded.prompts.texts_of([0, 3, 20, 41]) == ["a dark picture", "", "a light picture", "a dark picture"]
    out = write_samples(loaded, config.override(batch_size=3), 5, tmp_path / "s.npz")
    lines = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == loaded.prompts.texts_of(range(5))
    assert np.load(out)["arr_0"].shape == (5, 16, 16, 3)
    record = json.loads((tmp_path / "s.json").read_text())
    assert record["num_prompts"] == 40
    with pytest.raises(UserError, match="another job"):
        changed = replace(loaded, prompts=replace(loaded.prompts, texts=loaded.prompts.texts[1:]))
        write_samples(changed, config.override(batch_size=3), 5, tmp_path / "s.npz")


def test_invalid_prompts_are_refused(text_run, random_run, tmp_path, captioned_data):
    for run, change, sentence in (
        (text_run, {"prompt": ()}, "trained on captions"),
        (text_run, {"negative_prompt": "blue"}, "guidance"),
        (text_run, {"labels": "0"}, "trained on captions"),
        (text_run, {"labels": "dark"}, "trained on captions"),
        (text_run, {"prompt": (), "prompt_file": str(tmp_path / "no.txt")}, "no such file"),
        (random_run, {}, "on labels, not on captions"),
    ):
        with pytest.raises(UserError, match=sentence):
            images(run, CONFIG.override(**change), [0])
    with pytest.raises(UserError, match="exclude each other"):
        CONFIG.override(prompt_file="a.txt")
    for text in ("", "\n \n", "nothing", "[1]", '{"tag": 1}', "[" * 100_000):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(UserError):
            prompts_in(tmp_path / "bad.jsonl")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError):
        prompts_in(tmp_path / "bad.txt")


def test_another_text_encoder_is_refused(text_run, tmp_path):
    import shutil

    run = tmp_path / "run"
    shutil.copytree(text_run, run)
    data = files.read_json(run / "data.json")  # without the seal
    data["text"]["preprocessing"] = "other"
    (run / "data.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match="preprocessing"):
        prepared(load_run(run), CONFIG)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(f"text: {TINY}", "text: strangers.code.load"))
    with pytest.raises(UserError, match="strangers"):
        load_run(run)


def test_the_command_samples_prompts(text_run, tmp_path, capsys):
    out = tmp_path / "cats.npz"
    words = ["sample", str(text_run), "--num-images", "4", "--steps", "2", "--out", str(out)]
    assert (
        repa(
            [
                *words,
                "--prompt",
                "a dark picture",
                "a light one",
                "--guidance",
                "cfg:scale=2",
                "--negative-prompt",
                "red",
            ]
        )
        == 0
    )
    assert "4 images" in capsys.readouterr().out
    assert len((tmp_path / "cats.jsonl").read_text().splitlines()) == 4


def test_each_prompt_can_have_a_folder(text_run, random_run, tmp_path, capsys):
    lines = [
        '{"tag": "single", "include": [{"class": "cat"}], "prompt": "a dark picture"}',
        '{"prompt": "a light one"}',
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    words = [
        "sample",
        str(text_run),
        "--num-images",
        "6",
        "--steps",
        "2",
        "--prompt-file",
        str(tmp_path / "prompts.jsonl"),
    ]
    for _ in range(2):  # the second call samples nothing
        assert repa([*words, "--out", str(tmp_path / "s.npz"), "--folders", str(tmp_path / "geneval")]) == 0
    assert (tmp_path / "geneval/00000/metadata.jsonl").read_text() == lines[0] + "\n"
    assert sorted(p.name for p in (tmp_path / "geneval/00001/samples").iterdir()) == [f"0000{k}.png" for k in range(3)]
    images = np.load(tmp_path / "s.npz")["arr_0"]
    shown = np.asarray(Image.open(tmp_path / "geneval/00001/samples/00002.png"))
    np.testing.assert_array_equal(shown, images[5])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("")
    assert repa([*words, "--out", str(tmp_path / "s.npz"), "--folders", str(tmp_path / "mine")]) == 2
    words = ["sample", str(random_run), "--num-images", "2", "--steps", "2", "--out", str(tmp_path / "b.npz")]
    assert repa([*words, "--folders", str(tmp_path / "b")]) == 2
    assert "trained on labels" in capsys.readouterr().err


def test_invalid_prompt_files_are_refused(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a \\ud800 cat"}\n')
    assert prompts_in(path) == ["a \ufffd cat"]
    for line in ('{"prompt": "  "}', "[" * 100_000, '{"prompt": 3}', '{"x": ' + "9" * 5000 + "}", "null"):
        path.write_text(line)
        with pytest.raises(UserError, match="Line 1"):
            prompts_in(path)
    with pytest.raises(UserError, match="a device"):
        prompts_in(Path("/dev/zero"))
