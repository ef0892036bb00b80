import pytest
import torch
from torch import nn

from repa.analysis import collect_hidden
from repa.base.errors import UserError
from repa.base.rng import SampleStreams
from repa.diffusion import PATHS
from repa.models import Backbone, Output


class Recorder(Backbone):
    """A network whose hidden state at depth k is k times the tokens of x_t (1 x 1 patches), plus label and time."""

    def __init__(self):
        super().__init__()
        self.state_shapes = {"x": (4, 2, 2)}
        self.anchor = nn.Parameter(torch.zeros(()))

    def null(self, like):
        return like._replace(labels=torch.full_like(like.labels, 7))

    def matrices(self):
        return []

    def forward(self, state, t, condition, taps=(), keep=None):
        x_t, labels = state["x"], condition.labels
        tokens = x_t.flatten(2).transpose(1, 2)  # (N, T, C)
        rest = 100 * labels[:, None, None] + 1000 * t[:, None, None]
        return Output({"x": x_t}, {tap: tap.depth * tokens + rest for tap in taps}, {})


def collect(batches, **settings):
    settings = {"depths": (1, 3), "t": 0.25, "path": PATHS.build("linear"), **settings}
    return collect_hidden(Recorder(), batches, **settings)


def latents(num=5):
    return torch.randn(num, 4, 2, 2, generator=torch.Generator().manual_seed(0))


def test_features_are_token_means_at_the_noised_latent_with_the_null_label():
    x = latents()
    noise = SampleStreams(3, range(5)).randn(4, 2, 2)
    expected = (0.75 * x + 0.25 * noise).mean((2, 3))  # t = 0 is data
    got = collect([x], seed=3)
    assert got.keys() == {1, 3}
    assert torch.allclose(got[1], expected + 700 + 250, atol=1e-3)
    assert torch.allclose(got[3], 3 * expected + 700 + 250, atol=1e-3)


def test_features_do_not_depend_on_the_batch_size():
    x = latents()
    whole, parts = collect([x]), collect(x.split(2))
    assert all(torch.allclose(whole[depth], parts[depth]) for depth in (1, 3))
    assert whole[1].shape == (5, 4)


def test_the_seed_changes_noised_features_but_not_clean_ones():
    x = latents()
    assert not torch.allclose(collect([x], seed=0)[1], collect([x], seed=1)[1])
    assert torch.allclose(collect([x], t=0.0)[1], x.mean((2, 3)) + 700, atol=1e-4)


@pytest.mark.parametrize("settings", [{"depths": ()}, {"t": 1.5}, {"t": -0.1}])
def test_invalid_input_is_refused(settings):
    with pytest.raises(UserError, match="at least one depth and a t in"):
        collect([latents()], **settings)


def test_no_latents_are_refused():
    with pytest.raises(UserError, match="no latents"):
        collect([])


def test_a_real_network_gives_its_hidden_states():
    from repa.models import DiT

    model = DiT(latent_size=4, patch_size=2, hidden_dim=16, depth=3, num_heads=2, num_classes=3)
    got = collect_hidden(
        model,
        [latents(3).repeat(1, 1, 2, 2)],
        depths=(2,),
        t=0.5,
        path=PATHS.build("linear"),
    )
    assert got[2].shape == (3, 16)
    assert got[2].std(0).min() > 0
