"""MMDiT on captions: stored or computed text tokens, exact resume, and several processes."""

import json

import pytest
import torch

from repa.base.errors import UserError
from repa.conditions import load_text_encoder
from repa.data import Loader, open_data
from repa.runs import load_run
from repa.runs.checkpoint import load_checkpoint
from repa.training import train
from repa.training.inputs import TextConditions
from tests.training import processes

TINY = "tiny-text:tokens=4,width=8"
CPU = torch.device("cpu")


@pytest.fixture
def config(tiny_config):
    return tiny_config.override(model=tiny_config.model.override(backbone="mmdit"), num_steps=6, save_every=3)


def start(config, data, run, **options):
    return train(config, open_data(data), run, device=CPU, say=lambda text: None, **options)


def losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_one_caption_per_image_is_read_and_processes_share_the_batch(captioned_data):
    data = open_data(captioned_data / "stored")
    whole = Loader(data, batch_size=8, seed=3, text="captions")
    batches = [whole.batch(step) for step in range(10)]
    for step, batch in enumerate(batches):
        texts = data.captions(whole.indices(step))
        assert all(text in (of_image or ("",)) for text, of_image in zip(batch.captions, texts, strict=True))
        shares = [Loader(data, batch_size=8, seed=3, text="captions", rank=r, world=2).batch(step) for r in (0, 1)]
        assert [*shares[0].captions, *shares[1].captions] == batch.captions
    seen = [text for batch in batches for text in batch.captions]
    assert 20 < sum(text.startswith("number") for text in seen) < 60  # about half of 80
    assert "" in seen
    tokens = Loader(data, batch_size=8, seed=3, text="tokens").batch(4).text
    wanted = load_text_encoder(TINY)(batches[4].captions)
    torch.testing.assert_close(tokens.tokens, wanted.tokens, rtol=1e-3, atol=2e-3)
    assert torch.equal(tokens.mask, wanted.mask)


def test_training_resumes_exactly_and_can_be_loaded(captioned_data, config, tmp_path):
    start(config, captioned_data / "stored", tmp_path / "whole")
    start(config.override(num_steps=3), captioned_data / "stored", tmp_path / "parts")
    start(config, captioned_data / "stored", tmp_path / "parts")
    whole, parts = (load_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    for file, tensors in whole.tensors.items():
        assert all(torch.equal(value, parts.tensors[file][key]) for key, value in tensors.items()), file
    assert all(0 < loss < 100 for loss in losses(tmp_path / "whole"))
    model = load_run(tmp_path / "whole").model
    empty = load_text_encoder(TINY)([""])
    torch.testing.assert_close(model.null_text, empty.tokens[0], rtol=1e-3, atol=2e-3)
    assert torch.equal(model.null_mask, empty.mask[0])
    assert model.context_embedder.weight.grad is None
    record = json.loads((tmp_path / "whole/data.json").read_text())["text"]
    assert record == load_text_encoder(TINY).identity


def test_text_tokens_computed_during_training_give_the_same_run(captioned_data, config, tmp_path):
    start(config, captioned_data / "stored", tmp_path / "stored")
    start(config.override(text=TINY), captioned_data / "plain", tmp_path / "online")
    assert losses(tmp_path / "online") == pytest.approx(losses(tmp_path / "stored"), rel=1e-3)
    start(config.override(text=TINY, accumulate=2), captioned_data / "plain", tmp_path / "parts")
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "online"), rel=1e-4)


def test_two_processes_train_like_one(captioned_data, config, tmp_path):
    """With DDP, and with FSDP and the text encoder in both processes."""
    config = config.override(num_steps=3)
    start(config, captioned_data / "stored", tmp_path / "one")
    online = config.override(parallel="fsdp", text=TINY)
    jobs = [(config, "stored", "ddp"), (online, "plain", "fsdp")]
    processes.run_all([(c, captioned_data / data, tmp_path / run) for c, data, run in jobs], 2, tmp_path)
    for run, tolerance in (("ddp", 1e-5), ("fsdp", 1e-3)):
        assert losses(tmp_path / run) == pytest.approx(losses(tmp_path / "one"), rel=tolerance)
        assert load_run(tmp_path / run).model.null_text.any()


def test_text_reaches_the_network(captioned_data, config, tmp_path):
    """With open gates the text layers have a gradient in the first step, and captions change the prediction."""
    data = open_data(captioned_data / "stored")
    config = config.override(model=config.model.override(backbone="mmdit:reference_init=true"))
    start(config, data.folder, tmp_path / "run")
    model = load_run(tmp_path / "run").model
    texts = TextConditions(config.override(text=TINY), data, CPU)
    batch = Loader(data, batch_size=8, seed=0, text="tokens").batch(0)
    condition, state = texts(batch), {"x": torch.randn(8, *model.state_shapes["x"])}
    own = model(state, torch.full((8,), 0.5), condition).prediction["x"]
    none = model(state, torch.full((8,), 0.5), model.null(condition)).prediction["x"]
    assert (own - none).abs().amax((1, 2, 3)).min() > 1e-6


def test_incompatible_data_and_settings_are_refused(captioned_data, config, data_folder, tmp_path):
    with pytest.raises(UserError, match="no captions"):
        start(config, data_folder, tmp_path / "a")
    with pytest.raises(UserError, match="--text"):
        start(config, captioned_data / "plain", tmp_path / "b")
    with pytest.raises(UserError, match="--model.text-shape"):
        start(
            config.override(model=config.model.override(text_shape=(5, 8))), captioned_data / "stored", tmp_path / "c"
        )
    with pytest.raises(UserError, match="reads no text"):
        config.override(text=TINY, model=config.model.override(backbone="dit"))
    start(config.override(num_steps=1), captioned_data / "stored", tmp_path / "d")
    with pytest.raises(UserError, match="text"):
        start(config.override(text="tiny-text:tokens=4,width=10"), captioned_data / "stored", tmp_path / "d")


def test_changed_weights_of_the_text_encoder_are_refused(captioned_data, config, tmp_path, monkeypatch):
    start(config.override(num_steps=1, text=TINY), captioned_data / "plain", tmp_path / "run")
    from repa.training import inputs

    def another(*arguments, **options):
        encoder = load_text_encoder(*arguments, **options)
        encoder.identity = {**encoder.identity, "weights_sha256": "other"}
        return encoder

    monkeypatch.setattr(inputs, "load_text_encoder", another)
    with pytest.raises(UserError, match=r"other data .*text"):
        start(config.override(text=TINY), captioned_data / "plain", tmp_path / "run")


def test_previews_use_captions_and_the_report_shows_them(captioned_data, config, tmp_path):
    from repa.cli.hooks import preview_hooks
    from repa.report import write_report
    from repa.runs import layout

    preview = config.preview.override(every=3, num_images=4, num_steps=2, num_scored=6, features="tiny")
    run, data = tmp_path / "run", open_data(captioned_data / "stored")
    start(config.override(preview=preview), data.folder, run, make_hooks=preview_hooks(run, data, CPU))
    prompts = json.loads(layout.prompts_file(run).read_text())
    assert prompts == [next(iter(texts), "") for texts in data.captions([0, 7, 15, 23])]
    page = write_report([run], tmp_path / "page.html").read_text()
    assert page.count("<figcaption>a dark picture</figcaption>") == 3
    layout.prompts_file(run).write_text('["<b>bold", "' + 1000 * "x" + '"]')
    page = write_report([run], tmp_path / "page.html").read_text()
    assert "<figcaption>&lt;b&gt;bold</figcaption>" in page
    assert 301 * "x" not in page
    layout.prompts_file(run).write_text("{}")
    with pytest.raises(UserError, match=r"prompts\.json"):
        write_report([run], tmp_path / "page.html")
