"""Target tokens of a step: stored or computed, precision, and order."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from repa.alignment import Alignment
from repa.alignment.config import AlignmentConfig
from repa.base.device import autocast
from repa.base.errors import UserError
from repa.data.reader import ShardReader
from repa.encoders import load_encoder
from repa.models.config import ModelConfig
from repa.performance.batches import Synthetic
from repa.training import TrainConfig, inputs
from repa.training.inputs import EncoderFeatures, prefetched

CPU = torch.device("cpu")
TINY = AlignmentConfig(target="tiny", depth=1)


def configuration(**changes) -> TrainConfig:
    model = ModelConfig(name="SiT-S/4", hidden_dim=32, depth=2, num_heads=2, latent_size=16, latent_channels=3)
    return TrainConfig(model=model, alignments=(TINY,), batch_size=4, precision="bf16").override(**changes)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    """A DINOv2 of two layers with random weights in the hub's format."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=70)
    folder = tmp_path_factory.mktemp("dinov2")
    Dinov2Model(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["tiny", "dinov2-b"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_weights_rounded_once_give_the_same_tokens_as_autocast(name, precision, dinov2):
    encoder = load_encoder(name, weights=dinov2 if name == "dinov2-b" else None)
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    before = sum(p.nbytes for p in encoder.parameters())
    with torch.no_grad(), autocast(CPU, precision):
        wanted = encoder(images, 4).patches
        encoder.round_weights(torch.bfloat16 if precision == "bf16" else torch.float16)
        found = encoder(images, 4).patches
    assert torch.equal(found, wanted)
    assert sum(p.nbytes for p in encoder.parameters()) < 0.7 * before


def test_an_encoder_compiles_in_one_graph(dinov2):
    encoder = load_encoder("dinov2-b", weights=dinov2)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    wanted = encoder(images, 3).patches
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    encoder.net.compile(backend=counter, fullgraph=True)
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(encoder(images, 3).patches, wanted)
    assert counter.frame_count == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_computed_tokens_can_be_alignment_targets(precision):
    """They are computed in inference mode, whose tensors autograd cannot save."""
    data = Synthetic({}, 4)
    config = configuration(precision=precision)
    encoders = EncoderFeatures(config, data, CPU)
    batch = data.batch(config, CPU, 16)
    patches = encoders(batch, encoders.wanted)["tiny"].patches
    assert not patches.is_inference()
    hidden = torch.randn(4, 16, 32, requires_grad=True)
    Alignment(TINY, 32, encoders.dims["tiny"]).compare(hidden, patches).sum().backward()
    assert hidden.grad.abs().sum() > 0
    exact = load_encoder("tiny")(batch.images, 4).patches
    assert (patches.float() - exact).norm() < (0.02 if precision == "bf16" else 1e-6) * exact.norm()


def test_an_unused_encoder_is_neither_run_nor_given_images(monkeypatch):
    encoders = EncoderFeatures(configuration(), Synthetic({}, 4), CPU)
    assert encoders.reads_images(encoders.wanted)
    assert not encoders.reads_images(())
    assert encoders.stored(encoders.wanted) == ()
    monkeypatch.setitem(encoders.encoders, "tiny", None)  # a call would raise
    batch = Synthetic({}, 4).batch(configuration(), CPU, 16)._replace(images=None)
    assert encoders(batch, ()) == {}


def test_stored_tokens_are_read_while_they_are_needed():
    data = Synthetic({"tiny": 7}, 4)
    encoders = EncoderFeatures(configuration(), data, CPU)
    assert (encoders.dims, encoders.encoders) == ({"tiny": 7}, {})
    assert encoders.stored(encoders.wanted) == ("tiny",)
    assert encoders.stored(()) == ()
    assert not encoders.reads_images(encoders.wanted)
    assert EncoderFeatures(configuration(), Synthetic({"tiny": 7}, 4, has_moments=False), CPU).reads_images(())


def test_the_error_about_a_missing_encoder_names_the_stored_tokens(monkeypatch):
    def absent(name, **_):
        raise UserError(f"no weights of {name}.")

    monkeypatch.setattr(inputs, "load_encoder", absent)
    config = configuration()
    with pytest.raises(UserError, match=r"^no weights of tiny\. .*\(other\): --alignments\.0\.target other\.$"):
        EncoderFeatures(config, Synthetic({"other": 7}, 4), CPU)
    with pytest.raises(UserError, match=r"^no weights of tiny\.$"):
        EncoderFeatures(config, Synthetic({}, 4), CPU)


def test_every_batch_comes_with_the_tokens_of_its_step():
    config, data = configuration(precision="fp32"), Synthetic({}, 4)
    encoders = EncoderFeatures(config, data, CPU)
    first = data.batch(config, CPU, 16)
    batches = [first._replace(images=first.images.roll(n, 0), labels=torch.tensor([n])) for n in range(4)]
    wanted = {5: encoders.wanted, 6: (), 7: encoders.wanted, 8: encoders.wanted}
    pairs = list(encoders.iterate(iter(batches), 5, wanted.__getitem__))
    assert [int(batch.labels) for batch, _ in pairs] == [0, 1, 2, 3]
    assert [tuple(features) for _, features in pairs] == [("tiny",), (), ("tiny",), ("tiny",)]
    for batch, features in pairs:
        if features:
            torch.testing.assert_close(features["tiny"].patches, encoders(batch, encoders.wanted)["tiny"].patches)


def test_non_finite_features_are_refused_at_the_first_step_that_uses_them():
    """With a weight that warms up from 0 this is not the first step."""
    data = Synthetic({}, 4)
    config = configuration()
    encoders = EncoderFeatures(config, data, CPU)
    with torch.no_grad():
        next(encoders.encoders["tiny"].net.parameters()).fill_(float("nan"))
    batches = (data.batch(config, CPU, 16) for _ in range(3))
    steps = encoders.iterate(batches, 0, lambda step: encoders.wanted if step else ())
    assert next(steps)[1] == {}
    with pytest.raises(UserError, match="'tiny', computed now, are not finite"):
        next(steps)


@pytest.mark.parametrize("num", [0, 1, 2, 5])
def test_one_ahead_requests_the_next_item_before_returning_the_current(num):
    asked = []

    def items():
        for number in range(num):
            asked.append(number)
            yield number

    got = []
    for number in prefetched(items()):
        got.append(number)
        assert len(asked) == min(number + 2, num)
    assert got == list(range(num))


@pytest.mark.parametrize("measured_twice", [False, True])
def test_stored_tokens_are_not_read_after_their_weight_becomes_zero(
    measured_twice, tiny_config, run_training, tmp_path, monkeypatch
):
    stops = tiny_config.alignments[0].override(schedule="stop:step=3")
    others = (stops.override(depth=2, schedule="stop:step=6"),) if measured_twice else ()
    read, gather = [], ShardReader.gather
    monkeypatch.setattr(
        ShardReader, "gather", lambda data, field, *a, **k: read.append(field) or gather(data, field, *a, **k)
    )
    run_training(tiny_config.override(alignments=(stops, *others)), tmp_path / "r")
    assert read.count("features.tiny") == (6 if measured_twice else 3)
    assert read.count("images") >= 10  # the latents of this data are the pixels
    assert not any(field.startswith("pooled") for field in read)
