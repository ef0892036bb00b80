"""`repa.attach` on other networks: the right tokens, the loss of the training loop, and an unchanged network."""

import copy
import math
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

import repa
from repa.alignment import Alignment, AlignmentConfig
from repa.base.errors import UserError
from repa.diffusion.config import DiffusionConfig
from repa.encoders.contract import Features
from repa.models import Condition, Tap, build_model
from repa.models.hooked import image_grid
from repa.models.taps import find_blocks
from repa.training import Objective
from tests.alignment.networks import CASES, NUM


class Block(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))


class Net(nn.Module):
    """Tokens (N, T, 8) in and out; `text` adds that many tokens after those of the image."""

    def __init__(self, depth=3, text=0, recompute=None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(8) for _ in range(depth))
        self.out, self.text, self.recompute = nn.Linear(8, 8), text, recompute

    def forward(self, x):
        image = x.shape[1]
        x = torch.cat([x, x[:, : self.text]], 1)
        for block in self.blocks:
            x = block(x) if self.recompute is None else checkpoint(block, x, use_reentrant=self.recompute)
        return self.out(x)[:, :image]


def net_and_batch(**settings):
    torch.manual_seed(0)
    return Net(**settings), torch.randn(4, 9, 8), torch.randn(4, 9, 5)


def gradients(net):
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("name", CASES)
def test_diffusers_networks_give_the_tokens_of_the_image(name):
    torch.manual_seed(0)
    case = CASES[name]()
    aligner, gave = repa.attach(case.net, case.block), []
    case.net.get_submodule(case.block).register_forward_hook(lambda module, args, out: gave.append(out))
    case.run()
    expected = case.image(gave[0])
    (tokens,) = aligner.taps().values()
    assert torch.equal(tokens, expected)
    frames = case.grid[:-2]
    features = torch.randn(NUM, *frames, 16, 7)
    side = case.grid[-2:]
    loss = aligner.loss(features)
    alignment = Alignment(AlignmentConfig(target="features", depth=1, loss="gram", projector="none"), 0, 0, side)
    student = expected.reshape(-1, side[0] * side[1], expected.shape[2])
    torch.testing.assert_close(loss, 0.5 * alignment.compare(student, features.reshape(-1, 16, 7)).mean())
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in case.net.parameters())


def test_the_loss_and_its_gradients_equal_those_of_the_training_loop():
    """On one DiT with one projector, the loss and every gradient are equal bit for bit."""
    torch.manual_seed(0)
    model = build_model("SiT-S/2", latent_size=4, latent_channels=2, num_classes=3, hidden_dim=16, depth=3, num_heads=2)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    config = AlignmentConfig(target="tiny", depth=2, weight=0.7, projector="mlp:width=8", token_norm="zscore")
    objective = Objective(
        model, [Alignment.of(config, model, {"tiny": 5})], DiffusionConfig(), label_dropout=0.1, seed=0
    )
    clean, condition = {"x": torch.randn(6, 2, 4, 4)}, Condition(torch.randint(3, (6,)))
    features = {"tiny": Features(torch.randn(6, 4, 5), None)}
    draws = objective.draw(clean, 3)
    own = objective(clean, condition, features, draws, objective.weights(3, torch.device("cpu")))
    own.total.mean().backward()
    wanted = gradients(model), gradients(objective.alignments["tiny@2"])
    objective.zero_grad()

    settings = {key: getattr(config, key) for key in ("weight", "loss", "projector", "token_norm")}
    aligner = repa.attach(model, "blocks.1", features=5, **settings)
    aligner.terms["blocks_1"].load_state_dict(objective.alignments["tiny@2"].state_dict())
    off = objective(clean, condition, {}, draws, objective.weights(3, torch.device("cpu")))  # denoising only
    total = off.total.mean() + aligner.loss(features["tiny"])
    assert torch.equal(aligner.values["blocks.1"], own.terms["alignment/tiny@2"].mean())
    torch.testing.assert_close(total, own.total.mean(), rtol=1e-6, atol=0)
    total.backward()
    for got, expected in zip((gradients(model), gradients(aligner)), wanted, strict=True):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_attention_taps_equal_the_networks_attention():
    torch.manual_seed(0)
    model = build_model(
        "SiT-S/2", latent_size=4, latent_channels=2, num_classes=3, hidden_dim=16, depth=2, num_heads=2, qk_norm=True
    )
    state, t, condition = {"x": torch.randn(3, 2, 4, 4)}, torch.rand(3), Condition(torch.arange(3))
    expected = model(state, t, condition, (Tap(2, "attention"),)).taps[Tap(2, "attention")]
    aligner = repa.attach(model, "blocks.1", tap="attention", loss="attention_ce:heads=2")
    model(state, t, condition)
    (logits,) = aligner._watcher.record.attention.values()
    torch.testing.assert_close(logits, expected)
    target = torch.randn(3, 2, 4, 4)
    wanted = -(target.softmax(-1) * expected.log_softmax(-1)).sum(-1).mean((1, 2)).mean()
    torch.testing.assert_close(aligner.loss(target), 0.5 * wanted)


@pytest.mark.parametrize("how", ["whole", "in place", "blocks"])
def test_torch_compile_keeps_one_graph(how):
    net, x, features = net_and_batch()
    aligner = repa.attach(net, "blocks.1", features=5, loss="cosine", hidden_dim=8)
    (net(x).square().mean() + aligner(features)).backward()
    expected = gradients(net)
    net.zero_grad()
    torch.compiler.reset()
    run = net
    if how == "whole":
        run = torch.compile(net, fullgraph=True, backend="aot_eager")
    elif how == "in place":
        net.compile(fullgraph=True, backend="aot_eager")
    else:
        for block in net.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        net.zero_grad()
        (run(x).square().mean() + aligner(features)).backward()
        for a, b in zip(gradients(net), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_activation_checkpointing_gives_the_same_loss_and_keeps_no_stale_taps():
    net, x, features = net_and_batch()
    aligner = repa.attach(net, "blocks.1")
    (net(x).square().mean() + aligner(features)).backward()
    expected = gradients(net)
    for net.recompute in (False, True):  # with use_reentrant
        net.zero_grad()
        (net(x.requires_grad_()).square().mean() + aligner(features)).backward()
        for a, b in zip(gradients(net), expected, strict=True):
            torch.testing.assert_close(a, b)
        with pytest.raises(UserError, match="has not run since"):  # the blocks ran again in backward
            aligner(features)


def test_a_block_without_trained_weights_is_refused():
    net, x, features = net_and_batch()
    aligner = repa.attach(net, "blocks.0")
    net.blocks[0].requires_grad_(False)
    net(x)
    with pytest.raises(UserError, match="has no gradient"):
        aligner(features)
    with torch.no_grad():  # as in an evaluation
        net(x)
        aligner(features)


def test_attaching_does_not_change_the_network():
    net, x, features = net_and_batch()
    keys, before = list(net.state_dict()), net(x)
    aligner = repa.attach(net, "blocks.*", features=5, loss="cosine", hidden_dim=8)
    assert list(net.state_dict()) == keys
    assert list(aligner.terms) == ["blocks_0", "blocks_1", "blocks_2"]
    assert torch.equal(net(x), before)
    average = copy.deepcopy(net)
    average(torch.zeros_like(x))  # runs without the aligner
    expected = sum(
        0.5 * aligner._term_called(name).term.compare(tokens, features).mean()
        for name, tokens in aligner.taps().items()
    )
    twin = copy.deepcopy(aligner)  # as peft makes for modules_to_save
    assert torch.equal(twin(features), expected)
    assert pickle.loads(pickle.dumps(net)).blocks[0].linear.weight.shape == (8, 8)
    pickle.loads(pickle.dumps(aligner))
    aligner.detach()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    with pytest.raises(UserError, match="call attach again"):
        aligner(features)


def test_training_resumes_exactly_from_a_state_dict(tmp_path):
    def start():
        net, _, _ = net_and_batch()
        aligner = repa.attach(net, "blocks.0", 5, loss="cosine", hidden_dim=8, schedule="linear:steps=20")
        aligner.add("blocks.1", schedule="plateau:span=3,gain=0.5", name="relations")
        return net, aligner, torch.optim.AdamW([*net.parameters(), *aligner.parameters()], lr=1e-2)

    def steps(net, aligner, optimizer, numbers):
        history = []
        for n in numbers:
            generator = torch.Generator().manual_seed(n)
            x, features = torch.randn(4, 9, 8, generator=generator), torch.randn(4, 9, 5, generator=generator)
            loss = net(x).square().mean() + aligner.loss(features)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            aligner.step()
            history.append((loss.item(), aligner.weight("blocks.0"), aligner.weight("relations")))
        return history

    whole = steps(*start(), range(12))
    net, aligner, optimizer = start()
    first = steps(net, aligner, optimizer, range(5))
    save_file(aligner.state_dict(), tmp_path / "aligner.safetensors")
    saved = net.state_dict(), optimizer.state_dict()
    net, aligner, optimizer = start()
    net.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    aligner.load_state_dict(load_file(tmp_path / "aligner.safetensors"))
    assert aligner.steps == 5
    assert first + steps(net, aligner, optimizer, range(5, 12)) == whole
    assert whole[-1][1] == pytest.approx(0.5 * (1 - 12 / 20))
    assert whole[0][2] == 0.5
    assert whole[-1][2] == 0  # after three steps


def test_a_term_with_weight_zero_needs_no_features():
    net, x, features = net_and_batch()
    aligner = repa.attach(net, "blocks.1", 5, loss="cosine", hidden_dim=8, schedule="stop:step=1")
    assert aligner.active
    net(x)
    aligner(features)
    aligner.step()
    assert not aligner.active
    net(x)
    loss = aligner()
    assert loss.item() == 0
    loss.backward()  # DDP needs every gradient
    assert all(p.grad is not None and not p.grad.any() for p in aligner.parameters())


def test_video_frames_count_as_images_and_merge_as_in_the_autoencoder():
    net, _, _ = net_and_batch()
    x, features = torch.randn(2, 2 * 6, 8), torch.randn(2, 4, 6, 5)
    aligner = repa.attach(net, "blocks.1", grid=(2, 2, 3))
    net(x)
    (tokens,) = aligner.taps().values()
    expected = 0.0
    for n in range(2):
        for frame in range(2):
            target = (features[n, 2 * frame] + features[n, 2 * frame + 1]) / 2
            student = tokens[n].unflatten(0, (2, 6))[frame]
            cosines = [torch.nn.functional.cosine_similarity(u[:, None], u[None], dim=-1) for u in (student, target)]
            expected += (cosines[0] - cosines[1]).square().mean() / 4
    torch.testing.assert_close(aligner(features), 0.5 * expected)
    net(x)
    with pytest.raises(UserError, match="frames"):
        aligner(torch.randn(2, 6, 5))


class Convolved(nn.Module):
    """Tokens of a rectangular image: 2 x 8 patches."""

    def __init__(self):
        super().__init__()
        self.patch_size, self.embed, self.block = 2, nn.Conv2d(3, 8, 2, 2), Block(8)

    def forward(self, x):
        return self.block(self.embed(x).flatten(2).transpose(1, 2))


def test_the_grid_is_found_from_the_input_of_a_convolutional_network():
    """The 16 tokens would also fit a square of 4 x 4, and the aligner is not given their grid."""
    torch.manual_seed(0)
    net, x, same, finer = Convolved(), torch.randn(2, 3, 4, 16), torch.randn(2, 16, 5), torch.randn(2, 64, 5)
    settings = {"features": 5, "hidden_dim": 8, "loss": "cosine"}
    aligner = repa.attach(net, "block", projector="conv", name="conv", **settings)
    aligner.add("block", projector="linear", resample="target", name="resampled", **settings)
    net(x)
    (tokens, _) = aligner.taps().values()
    aligner({"conv": same, "resampled": finer})
    conv, linear = (aligner._term_called(name).term.projector for name in ("conv", "resampled"))
    image = conv.conv(tokens.transpose(1, 2).unflatten(2, (2, 8)))
    larger = nn.functional.interpolate(linear(tokens).transpose(1, 2).unflatten(2, (2, 8)), (4, 16), mode="bilinear")
    for name, projected, target in (("conv", image, same), ("resampled", larger, finer)):
        cosines = nn.functional.cosine_similarity(projected.flatten(2).transpose(1, 2), target, dim=-1)
        torch.testing.assert_close(aligner.values[name], -cosines.mean().detach())


def test_a_block_of_a_video_network_can_be_the_target():
    net, _, _ = net_and_batch()
    x = torch.randn(2, 2 * 6, 8)
    aligner = repa.attach(net, "blocks.0", target="blocks.2", loss="cosine", token_norm="zscore", grid=(2, 2, 3))
    aligner.add("blocks.2", target="none", loss="dispersive", name="seen", grid=(2, 2, 3))
    net(x)
    own, other = (tokens.unflatten(1, (2, 6)) for tokens in aligner.taps().values())  # (N, frames, T, D)
    aligner()
    other = (other - 0.6 * other.mean(2, keepdim=True)) / (other.std(2, keepdim=True) + 1e-6)
    cosine = nn.functional.cosine_similarity(own, other, dim=-1).mean()
    torch.testing.assert_close(aligner.values["blocks.0"], -cosine.detach())


def test_crepa_compares_neighbouring_video_frames():
    net, _, _ = net_and_batch()
    x, features = torch.randn(2, 3 * 4, 8), torch.randn(2, 3, 16, 5)  # grids of 2 x 2 and 4 x 4
    settings = {"features": 5, "hidden_dim": 8, "projector": "linear", "grid": (3, 2, 2)}
    aligner = repa.attach(net, "blocks.1", loss="crepa:frames=3", name="crepa", **settings)
    net(x)
    (tokens,) = aligner.taps().values()
    aligner(features)
    own = aligner._term_called("crepa").term.projector(tokens).unflatten(1, (3, 4))
    target = (
        nn.functional.avg_pool2d(features.flatten(0, 1).mT.unflatten(2, (4, 4)), 2).flatten(2).mT.unflatten(0, (2, 3))
    )
    total = 0.0
    for i in range(3):
        for j in range(max(0, i - 1), min(3, i + 2)):
            cosine = nn.functional.cosine_similarity(own[:, i], target[:, j], dim=-1).mean()
            total -= math.exp(-abs(i - j)) * float(cosine.detach()) / 3
    assert float(aligner.values["crepa"]) == pytest.approx(total, abs=1e-6)
    other = repa.attach(net, "blocks.1", loss="crepa:frames=2", **settings)  # would split the four tokens of a frame
    net(x)
    with pytest.raises(UserError, match="set frames=3"):
        other(features)


@pytest.mark.parametrize("scope", ["sample", "clip"])
def test_relations_are_those_of_a_frame_or_of_all_frames_as_in_videorepa(scope):
    """VideoREPA compares the tokens of each frame with those of all frames, and counts differences above 0.1."""
    net, _, _ = net_and_batch()
    x, features = torch.randn(2, 3 * 4, 8), torch.randn(2, 3, 4, 5)
    aligner = repa.attach(net, "blocks.1", loss=f"gram:norm=l1,margin=0.1,scope={scope}", grid=(3, 2, 2))
    net(x)
    (tokens,) = (value.detach().unflatten(1, (3, 4)) for value in aligner.taps().values())
    aligner(features)
    total, cosine = 0.0, nn.functional.cosine_similarity
    for n in range(2):
        for frame in range(3):
            others = [frame] if scope == "sample" else [0, 1, 2]
            own, wanted = (
                cosine(u[n, frame][:, None], u[n, others].flatten(0, 1)[None], dim=-1) for u in (tokens, features)
            )
            total += float(((own - wanted).abs() - 0.1).relu().mean()) / 6
    assert float(next(iter(aligner.values.values()))) == pytest.approx(total, abs=1e-6)


def of_frames(student, target):
    return torch.full((len(student),), float(student.shape[1]))


of_frames.compares_frames = True


def test_a_private_loss_receives_all_frames_of_a_video():
    net, _, _ = net_and_batch()
    aligner = repa.attach(net, "blocks.1", features=8, loss=f"{__name__}.of_frames", projector="none", grid=(3, 2, 2))
    net(torch.randn(2, 3 * 4, 8))
    aligner(torch.randn(2, 3, 4, 8))
    assert float(aligner.values["blocks.1"]) == 12  # three frames of four tokens


def test_text_tokens_before_or_after_the_image_are_left_out():
    net, x, _ = net_and_batch(text=4)
    for text, part in (("behind", slice(9)), ("front", slice(4, None))):
        aligner = repa.attach(net, "blocks.1", text=text)
        gave = []
        handle = net.blocks[1].register_forward_hook(lambda module, args, out, gave=gave: gave.append(out))
        net(x)
        handle.remove()
        assert torch.equal(aligner.taps()["blocks.1"], gave[0][:, part])
        aligner.detach()


def test_the_target_may_be_another_block_or_nothing():
    net, x, _ = net_and_batch()
    aligner = repa.attach(net, "blocks.0", target="blocks.2", loss="cosine")  # LayerSync
    aligner.add("blocks.1", target="none", loss="dispersive", name="spread", weight=0.25)
    gave = []
    for block in net.blocks:
        block.register_forward_hook(lambda module, args, out: gave.append(out.detach()))
    net(x)
    total = aligner()
    cosine = -torch.nn.functional.cosine_similarity(gave[0], gave[2], dim=-1).mean()
    torch.testing.assert_close(aligner.values["blocks.0"], cosine)
    torch.testing.assert_close(total, 0.5 * cosine + 0.25 * aligner.values["spread"])


def test_only_images_within_the_time_interval_count():
    net, x, features = net_and_batch()
    aligner = repa.attach(net, "blocks.1", times=(0.0, 0.5))
    net(x)
    (tokens,) = aligner.taps().values()
    t = torch.tensor([0.1, 0.9, 0.5, 0.6])
    losses = aligner._term_called("blocks.1").term.compare(tokens, features)
    torch.testing.assert_close(aligner(features, t=t), 0.5 * (losses[0] + losses[2]) / 4)
    net(x)
    with pytest.raises(UserError, match="pass t"):
        aligner(features)


def test_half_precision_networks_keep_their_projectors_in_float32():
    net, x, features = net_and_batch()
    aligner = repa.attach(net.bfloat16(), "blocks.1", 5, loss="cosine", hidden_dim=8)
    net(x.bfloat16())
    loss = aligner(features.bfloat16())
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in aligner.parameters())


def test_blocks_are_found_by_the_end_of_their_name_and_by_patterns():
    net = nn.ModuleDict({"a": Net(), "b": Net(2)})
    assert [b.name for b in find_blocks(net, "blocks.2")] == ["a.blocks.2"]
    assert [b.name for b in find_blocks(net, "blocks.[12]")] == ["a.blocks.1", "a.blocks.2", "b.blocks.1"]
    assert find_blocks(torch.compile(net), "a.blocks.0")[0].module is net["a"].blocks[0]
    assert find_blocks(nn.Sequential(net), "a.blocks.0")[0].name == "0.a.blocks.0"
    with pytest.raises(UserError, match="give the complete name"):
        find_blocks(net, "blocks.1")
    with pytest.raises(UserError, match=r"a\.blocks\.0 to \.2.*Did you mean 'a\.blocks\.0'"):
        find_blocks(net, "a.block.0")


def test_the_grid_is_computed_from_the_shape_of_the_input():
    assert image_grid((1, 4, 32, 48), (2, 2), 16 * 24 + 77) == (16, 24)
    assert image_grid((1, 4, 32, 48), None, 8 * 12) == (8, 12)
    assert image_grid((1, 16, 5, 32, 48), (1, 2, 2), 5 * 16 * 24) == (5, 16, 24)
    assert image_grid((1, 16, 5, 32, 48), (2, 2), 5 * 16 * 24) == (5, 16, 24)
    assert image_grid((1, 4, 32, 48), None, 1000) is None
    assert image_grid((1, 256, 64), (1, 1), 256) is None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"loss": "cosine"}, "needs the width of the features"),
        ({"loss": "cosine", "features": 5}, "pass hidden_dim"),
        ({"loss": "cosine", "features": -1}, "Widths are at least 1, but features is -1"),
        ({"loss": "cosine", "features": 5, "hidden_dim": -8}, "Widths are at least 1"),
        ({"loss": "cosin"}, "Did you mean 'cosine'"),
        ({"text": "left"}, "'front' or 'behind'"),
        ({"grid": (3,)}, "A grid must be"),
        ({"block": "blocks.*", "name": "one"}, "only one can have the name"),
        ({"target": "blocks.*"}, "A target must be one block"),
    ],
)
def test_invalid_settings_are_refused(settings, sentence):
    net, _, _ = net_and_batch()
    with pytest.raises(UserError, match=sentence):
        repa.attach(net, settings.pop("block", "blocks.1"), **settings)


@pytest.mark.parametrize(
    ("settings", "shape", "sentence"),
    [
        ({}, None, r"needs features \(N, M, F\)"),
        ({}, (4, 5), r"got \(4, 5\)"),
        ({}, (3, 9, 5), "saw 4 samples"),
        ({}, (4, 2, 9, 5), "of a video"),
        ({"grid": (4, 4)}, (4, 9, 5), "fewer than the 4 x 4"),
        ({"loss": "cosine", "projector": "none"}, (4, 9, 5), "equal widths"),
        ({"loss": "cosine", "features": 5, "hidden_dim": 6}, (4, 9, 5), "hidden_dim=8"),
        ({"loss": "cosine", "features": 6, "hidden_dim": 8}, (4, 9, 5), "channels"),
        ({"output": 1}, (4, 9, 5), "has no output 1"),
        ({"tap": "attention"}, (4, 2, 9, 9), "No self-attention"),
    ],
)
def test_mismatched_shapes_give_a_one_line_error(settings, shape, sentence):
    net, x, _ = net_and_batch()
    aligner = repa.attach(net, "blocks.1", **settings)
    net(x)
    with pytest.raises(UserError, match=sentence):
        aligner(None if shape is None else torch.randn(shape))


def test_a_damaged_state_is_refused():
    net, _, _ = net_and_batch()
    aligner = repa.attach(net, "blocks.1")
    for text in (b"{", b'{"steps": -1, "schedules": {}}', b'{"steps": 1, "schedules": {"other": {}}}'):
        with pytest.raises(UserError, match="damaged"):
            aligner.load_state_dict({"_extra_state": torch.tensor(list(text), dtype=torch.uint8)})
