import pytest
import torch

from repa.alignment import Alignment, AlignmentConfig
from repa.alignment.targets import EncoderTarget
from repa.base.errors import UserError
from repa.encoders import Features
from tests.oracles import alignment as oracle


def build(**settings):
    torch.manual_seed(0)
    return Alignment(
        AlignmentConfig(target="tiny", depth=2, **{"projector": "mlp:width=16", **settings}),
        hidden_dim=8,
        feature_dim=6,
    )


def inputs(tokens=9, target_tokens=9):
    g = torch.Generator().manual_seed(1)
    return torch.randn(4, tokens, 8, generator=g), torch.randn(4, target_tokens, 6, generator=g)


def test_eq_8_projects_then_compares():
    alignment = build()
    hidden, target = inputs()
    expected = oracle.cosine(alignment.projector(hidden).detach(), target)
    assert torch.allclose(alignment.compare(hidden, target).double(), torch.tensor(expected).double(), atol=1e-6)


def test_gradients_reach_hidden_and_projector_but_not_the_target():
    alignment = build(loss="nt_xent", token_norm="zscore")
    hidden, target = (x.requires_grad_() for x in inputs())
    alignment.compare(hidden, target).mean().backward()
    assert hidden.grad.abs().sum() > 0
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in alignment.named_parameters() if "weight" in name)
    assert target.grad is None


@pytest.mark.parametrize("loss_name", ["cosine", "nt_xent"])
def test_autocast_does_not_reach_the_comparison(loss_name):
    """Under bf16 the projector runs in bf16; everything after it runs in float32."""
    alignment = build(loss=loss_name)
    hidden, target = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        projected = alignment.projector(hidden)
        loss = alignment.compare(hidden, target)
    assert projected.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    reference = oracle.cosine if loss_name == "cosine" else lambda a, b: oracle.nt_xent(a, b, 0.07)
    assert torch.allclose(
        loss.double(), torch.tensor(reference(projected.detach().float(), target)).double(), atol=1e-5
    )


def test_half_precision_target_with_huge_values_gives_no_nan():
    alignment = build()
    hidden, target = inputs()
    loss = alignment.compare(hidden, target.half() * 2e4)
    assert loss.isfinite().all()
    assert torch.allclose(loss, alignment.compare(hidden, target), atol=2e-3)


def test_the_target_is_resampled_to_the_students_grid():
    alignment = build(projector="linear")
    hidden, target = inputs(tokens=4, target_tokens=16)
    small = torch.stack(
        [target.view(4, 4, 4, 6)[:, r : r + 2, c : c + 2].mean((1, 2)) for r in (0, 2) for c in (0, 2)], 1
    )
    assert torch.allclose(alignment.compare(hidden, target), alignment.compare(hidden, small), atol=1e-6)


def test_token_norm_acts_on_the_matched_target():
    hidden, target = inputs()
    plain, normed = build(), build(token_norm="zscore:alpha=1.0")
    centred = (target - target.mean(1, keepdim=True)) / (target.std(1, keepdim=True) + 1e-6)
    assert torch.allclose(normed.compare(hidden, target), plain.compare(hidden, centred), atol=1e-6)


def test_the_weight_is_lambda_times_the_schedule():
    assert build().weight(10**7) == 0.5
    alignment = build(weight=0.8, schedule="stop:step=100")
    assert [alignment.weight(step) for step in (0, 99, 100, 101)] == [0.8, 0.8, 0.0, 0.0]


def test_several_alignments_train_their_own_projectors():
    first, second = build(), build(loss="nt_xent", projector="conv")
    hidden, target = inputs()
    (first.compare(hidden, target) + second.compare(hidden, target)).mean().backward()
    together = [p.grad.clone() for p in first.parameters()]
    first.zero_grad()
    first.compare(hidden, target).mean().backward()
    assert all(torch.allclose(a, p.grad, atol=1e-7) for a, p in zip(together, first.parameters(), strict=True))


def test_training_the_projector_aligns():
    alignment = build()
    hidden, target = inputs()
    optimizer = torch.optim.Adam(alignment.parameters(), lr=1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        loss = alignment.compare(hidden, target).mean()
        loss.backward()
        optimizer.step()
    assert loss < -0.9


def test_features_of_another_encoder_are_refused():
    hidden, target = inputs()
    with pytest.raises(UserError, match=r"'tiny' has 5 channels, but the projector was built for 6"):
        build().compare(hidden, target[..., :5])


@pytest.mark.parametrize(("own", "other"), [((2, 8), (4, 16)), ((4, 16), (2, 8)), ((3, 6), (6, 12))])
def test_a_rectangular_grid_is_resampled_to_the_targets_grid(own, other):
    """Of 16, 64 and 18 tokens, the first two would also fit a square."""
    stream = torch.Generator().manual_seed(0)
    hidden, target = (torch.randn(2, rows * columns, 5, generator=stream) for rows, columns in (own, other))
    config = AlignmentConfig(target="features", depth=1, projector="none", resample="target")
    resampled = oracle.bilinear if own < other else oracle.area
    for n, loss in enumerate(Alignment(config, 5, 5, own).compare(hidden, target)):
        maps = [resampled(hidden[n, :, channel].view(own).tolist(), *other) for channel in range(5)]
        assert loss.item() == pytest.approx(oracle.cosine([torch.tensor(maps).flatten(1).T], [target[n]])[0], abs=1e-6)


def test_unequal_grids_must_be_square():
    hidden, target = inputs(tokens=9, target_tokens=10)
    with pytest.raises(UserError, match="10 tokens are not a square grid"):
        build().compare(hidden, target)


def test_relational_losses_allow_different_widths():
    alignment = build(loss="gram", projector="none")
    hidden, target = inputs()
    cosines = [
        [torch.nn.functional.cosine_similarity(u[n, :, None], u[n, None], dim=-1) for u in (hidden, target)]
        for n in range(4)
    ]
    assert torch.allclose(
        alignment.compare(hidden, target), torch.stack([(a - b).square().mean() for a, b in cosines]), atol=1e-6
    )
    with pytest.raises(UserError, match="as wide as the tap"):
        build(loss="mse", projector="none")


def test_part_all_needs_an_encoder_with_pooled_features():
    patches = torch.randn(2, 9, 6)
    target = EncoderTarget("mylab.colours", 6, part="all")
    assert target.of(Features(patches, patches.mean(1))).shape == (2, 10, 6)
    with pytest.raises(UserError, match="mylab.colours has no pooled vector"):
        target.of(Features(patches, None))


def tokenwise(student, target):
    return (student - target).square().mean(2)


def column(student, target):
    return tokenwise(student, target).mean(1, keepdim=True)


@pytest.mark.parametrize(("loss", "shape"), [("tokenwise", r"\(4, 9\)"), ("column", r"\(4, 1\)")])
def test_a_loss_must_return_one_number_per_image(loss, shape):
    """A loss of shape (4, 1) would silently broadcast to (4, 4) with the denoising loss."""
    with pytest.raises(
        UserError, match=rf"{loss}' must return one loss per image, of shape \(4,\), but returned {shape}"
    ):
        build(loss=f"{__name__}.{loss}").compare(*inputs())


def test_a_target_of_unknown_width_must_match_the_tap():
    hidden, target = inputs()
    term = Alignment(AlignmentConfig(target="features", depth=2, projector="none"), hidden_dim=8, feature_dim=0)
    with pytest.raises(UserError, match="has 6 channels, but the projector was built for 8: .* must set dim"):
        term.compare(hidden, target)
