"""Guidance: what is mixed, when, on which channels, and what the network is asked."""

import pytest
import torch

from repa.base.errors import UserError
from repa.diffusion import PATHS, Denoiser, guided

NULL = 10


class Network:
    """Answers label * (channel + 1), so that every mix can be told from every other."""

    def __init__(self, out_channels=4, dtype=torch.float32):
        self.out_channels, self.dtype, self.calls = out_channels, dtype, []

    def __call__(self, x_t, t, labels):
        self.calls.append((x_t, t, labels))
        channels = torch.arange(1, self.out_channels + 1, dtype=self.dtype).reshape(1, -1, 1, 1)
        return (labels.to(self.dtype).reshape(-1, 1, 1, 1) * channels).expand(-1, -1, *x_t.shape[2:])


LABELS = torch.tensor([2, 5])
X = torch.randn(2, 4, 1, 1, generator=torch.Generator().manual_seed(0))


def test_the_mix_is_null_plus_scale_times_the_difference():
    network = Network()
    out = guided(network, LABELS, NULL, 1.5)(X, 0.5)
    expected = torch.tensor([10 + 1.5 * (2 - 10), 10 + 1.5 * (5 - 10)])
    torch.testing.assert_close(out[:, 0, 0, 0], expected)
    torch.testing.assert_close(out[:, 3, 0, 0], 4 * expected)
    x_t, t, labels = network.calls[0]
    assert labels.tolist() == [2, 5, NULL, NULL]  # [conditional; null]
    assert torch.equal(x_t, torch.cat([X, X]))
    assert torch.equal(t, torch.full((4,), 0.5))


@pytest.mark.parametrize(("t", "rows"), [(0.2, 4), (0.7, 4), (0.70001, 2), (0.19999, 2), (1.0, 2), (0.0, 2)])
def test_outside_the_closed_interval_only_the_conditional_batch_is_run(t, rows):
    network = Network()
    out = guided(network, LABELS, NULL, 2.0, interval=(0.2, 0.7))(X, t)
    assert [len(call[2]) for call in network.calls] == [rows]
    assert out[:, 0, 0, 0].tolist() == ([-6.0, 0.0] if rows == 4 else [2.0, 5.0])


def test_scale_one_runs_only_the_conditional_batch_and_zero_is_unconditional():
    network = Network()
    assert guided(network, LABELS, NULL, 1.0)(X, 0.5)[:, 0, 0, 0].tolist() == [2, 5]
    assert len(network.calls[0][2]) == 2
    assert guided(network, LABELS, NULL, 0.0)(X, 0.5)[:, 0, 0, 0].tolist() == [NULL, NULL]


@pytest.mark.parametrize(("channels", "guides"), [(3, 3), (1, 1), (None, 4), (0, 4)])
def test_channels_and_learned_variance_keep_conditional_values(channels, guides):
    out = guided(Network(out_channels=8), LABELS, NULL, 2.0, channels=channels)(X, 0.5)
    values = (out / torch.arange(1.0, 9).reshape(1, -1, 1, 1))[0, :, 0, 0]
    assert values.tolist() == pytest.approx([-6.0] * guides + [2.0] * (8 - guides))


def test_times_per_sample_are_guided_each_by_its_own():
    network = Network()
    out = guided(network, LABELS, NULL, 2.0, interval=(0.0, 0.5))(X, torch.tensor([0.4, 0.6]))
    assert out[:, 0, 0, 0].tolist() == [-6.0, 5.0]
    out = guided(network, LABELS, NULL, 2.0, interval=(0.0, 0.5))(X, torch.tensor([0.9, 0.6]))
    assert out[:, 0, 0, 0].tolist() == [2.0, 5.0]
    assert [len(call[2]) for call in network.calls] == [4, 2]


def test_half_precision_outputs_are_mixed_in_float32():
    out = guided(Network(dtype=torch.bfloat16), torch.tensor([9, 9]), NULL, 1.003)(X, 0.5)
    assert out.dtype == torch.float32
    assert out[0, 0, 0, 0].item() == pytest.approx(10 - 1.003, abs=1e-5)


def test_through_a_denoiser_the_decision_sees_the_samplers_float():
    """0.1 in float32 lies above 0.1: decided in float32, the closed end would be lost."""
    network = Network()
    Denoiser(guided(network, LABELS, NULL, 2.0, interval=(0.0, 0.7)), PATHS.build("linear")).velocity(X.double(), 0.7)
    assert torch.tensor(0.1, dtype=torch.float32).item() > 0.1
    Denoiser(guided(network, LABELS, NULL, 2.0, interval=(0.0, 0.1)), PATHS.build("linear")).velocity(X.double(), 0.1)
    assert [len(call[2]) for call in network.calls] == [4, 4]


def test_mistakes_are_named():
    for interval in ((0.7, 0.2), (-0.1, 0.5), (0.0, 1.5)):
        with pytest.raises(UserError, match="interval"):
            guided(Network(), LABELS, NULL, 2.0, interval)
    with pytest.raises(UserError, match="negative"):
        guided(Network(), LABELS, NULL, -1.0)
    with pytest.raises(UserError, match="one per sample"):
        guided(Network(), LABELS, NULL, 2.0)(X[:1], 0.5)
    with pytest.raises(UserError, match="only 4"):
        guided(Network(), LABELS, NULL, 2.0, channels=5)(X, 0.5)
