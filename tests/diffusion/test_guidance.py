"""Guidance: which predictions are mixed, when, on which channels and parts, and in which order."""

import pytest
import torch

from repa.base.errors import UserError
from repa.diffusion import GUIDANCES, PATHS, Denoiser, Layout, guided
from tests.golden import check, load, tensor

X = torch.randn(2, 4, 1, 1, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([2.0, 5.0])
VALUES = {"conditional": LABELS, "null": 10.0, "weak": 3.0, "routed": 7.0, "head@8": LABELS + 1, "null/head@8": 9.0}


class Network:
    """Returns value * (channel + 1), so that all mixtures differ, and records which predictions were requested."""

    def __init__(self, out_channels=4, dtype=torch.float32, **values):
        self.out_channels, self.dtype, self.values, self.asked = out_channels, dtype, VALUES | values, []

    def __call__(self, x_t, t, names):
        self.asked.append(set(names))
        channels = torch.arange(1, self.out_channels + 1, dtype=self.dtype).reshape(1, -1, 1, 1)
        rows = {name: torch.as_tensor(self.values[name], dtype=self.dtype).expand(len(x_t)) for name in names}
        return {name: value.reshape(-1, 1, 1, 1) * channels for name, value in rows.items()}


def of(network, *specs, **kwargs):
    return guided(network, [GUIDANCES.build(spec) for spec in specs], **kwargs)


@pytest.mark.parametrize(
    ("spec", "other", "expected"),
    [
        ("cfg:scale=1.5", "null", [10 + 1.5 * (2 - 10), 10 + 1.5 * (5 - 10)]),
        ("internal:head=8,scale=1.5", "head@8", [3 + 1.5 * (2 - 3), 6 + 1.5 * (5 - 6)]),
        ("autoguidance:scale=1.5", "weak", [3 + 1.5 * (2 - 3), 3 + 1.5 * (5 - 3)]),
        ("path_drop:scale=1.5", "routed", [7 + 1.5 * (2 - 7), 7 + 1.5 * (5 - 7)]),
    ],
)
def test_each_guidance_extrapolates_from_its_other_prediction(spec, other, expected):
    network = Network()
    out = of(network, spec)(X, 0.5)
    assert out[:, 0, 0, 0].tolist() == pytest.approx(expected)
    assert out[:, 3, 0, 0].tolist() == pytest.approx([4 * value for value in expected])
    assert network.asked == [{"conditional", other}]


def test_the_mixture_equals_that_of_the_released_code():
    golden = load("autoguidance")
    main, ref = tensor(golden["inputs"]["main"]), tensor(golden["inputs"]["ref"])
    for scale, expected in golden["expected"].items():
        check(GUIDANCES.build(f"autoguidance:scale={scale}").mix({"conditional": main, "weak": ref}, 0.5), expected)


@pytest.mark.parametrize(
    ("t", "on"), [(0.2, True), (0.7, True), (0.70001, False), (0.19999, False), (1.0, False), (0.0, False)]
)
def test_outside_the_closed_interval_only_the_conditional_is_evaluated(t, on):
    network = Network()
    out = of(network, "cfg:scale=2,low=0.2,high=0.7")(X, t)
    assert network.asked == [{"conditional", "null"} if on else {"conditional"}]
    assert out[:, 0, 0, 0].tolist() == ([-6.0, 0.0] if on else [2.0, 5.0])


def test_scale_one_needs_no_extra_pass_and_scale_zero_is_unconditional():
    network = Network()
    assert of(network, "cfg:scale=1", "internal:head=8,scale=1")(X, 0.5)[:, 0, 0, 0].tolist() == [2, 5]
    assert network.asked == [{"conditional"}]
    assert of(network, "cfg:scale=0")(X, 0.5)[:, 0, 0, 0].tolist() == [10, 10]


def test_internal_guidance_is_applied_to_each_branch_before_cfg():
    """As in the released code, the velocity of each branch is guided first, then cfg mixes the branches."""
    network = Network()
    out = of(network, "internal:head=8,scale=1.4", "cfg:scale=1.35,high=0.7")(X, 0.5)
    null = 9 + 1.4 * (10 - 9)
    each = [c + 1 + 1.4 * (c - (c + 1)) for c in (2, 5)]
    assert out[:, 0, 0, 0].tolist() == pytest.approx([null + 1.35 * (c - null) for c in each])
    assert network.asked == [{"conditional", "null", "head@8", "null/head@8"}]
    out = of(network, "internal:head=8,scale=1.4", "cfg:scale=1.35,high=0.7")(X, 0.8)
    assert out[:, 0, 0, 0].tolist() == pytest.approx(each)
    assert network.asked[-1] == {"conditional", "head@8"}


def test_the_order_of_guidances_matters_and_a_weak_network_keeps_the_null():
    network = Network()
    out = of(network, "autoguidance:scale=2", "cfg:scale=1.5")(X, 0.5)
    assert out[:, 0, 0, 0].tolist() == pytest.approx([10 + 1.5 * (3 + 2 * (c - 3) - 10) for c in (2, 5)])
    out = of(network, "cfg:scale=1.5", "autoguidance:scale=2")(X, 0.5)
    assert out[:, 0, 0, 0].tolist() == pytest.approx([3 + 2 * (10 + 1.5 * (c - 10) - 3) for c in (2, 5)])
    assert network.asked == [{"conditional", "null", "weak"}] * 2


@pytest.mark.parametrize(("channels", "guides"), [(3, 3), (1, 1), (0, 4)])
def test_channels_and_learned_variance_keep_conditional_values(channels, guides):
    out = of(Network(out_channels=8), f"cfg:scale=2,channels={channels}")(X, 0.5)
    values = (out / torch.arange(1.0, 9).reshape(1, -1, 1, 1))[0, :, 0, 0]
    assert values.tolist() == pytest.approx([-6.0] * guides + [2.0] * (8 - guides))


@pytest.mark.parametrize(("streams", "scale"), [("", 2.0), (",streams=1", 1.0), (",streams=3", 3.0)])
def test_each_part_of_a_state_has_its_own_guidance(streams, scale):
    layout = Layout({"x": (2, 1, 2), "class": (3,)})

    def network(x_t, t, names):
        return {name: layout.pack({"x": torch.full((2, 2, 1, 2), v), "class": torch.full((2, 3), v)})
                for name, v in {"conditional": 2.0, "null": 10.0}.items() if name in names}  # fmt: skip

    found = layout.unpack(of(network, "cfg:scale=2,channels=1" + streams, layout=layout)(torch.zeros(2, 7), 0.5))
    assert found["x"].flatten(2).tolist() == [[[-6.0, -6.0], [2.0, 2.0]]] * 2
    assert found["class"].tolist() == [[10 + scale * (2 - 10)] * 3] * 2


def test_internal_guidance_does_not_change_a_guided_stream():
    """Heads predict only the latents, so the vector of a stream is guided by cfg alone."""
    layout = Layout({"x": (2, 1, 2), "class": (3,)})
    # values for the latents and for the stream
    values = {"conditional": (2.0, 2.0), "null": (10.0, 10.0), "head@8": (3.0, 2.0)}

    def network(x_t, t, names):
        return {name: layout.pack({"x": torch.full((2, 2, 1, 2), values[name][0]), "class": torch.full((2, 3), values[name][1])})
                for name in names}  # fmt: skip

    found = of(network, "cfg:scale=2", "internal:head=8,scale=1.5", layout=layout)(torch.zeros(2, 7), 0.5)
    cfg = 10 + 2 * (2 - 10)
    assert layout.unpack(found)["class"].tolist() == [[cfg] * 3] * 2
    assert layout.unpack(found)["x"].unique().tolist() == [3 + 1.5 * (cfg - 3)]


def test_each_sample_is_guided_by_its_own_time():
    network = Network()
    guide = of(network, "cfg:scale=2,high=0.5")
    assert guide(X, torch.tensor([0.4, 0.6]))[:, 0, 0, 0].tolist() == [-6.0, 5.0]
    assert guide(X, torch.tensor([0.9, 0.6]))[:, 0, 0, 0].tolist() == [2.0, 5.0]
    assert network.asked == [{"conditional", "null"}, {"conditional"}]


def test_half_precision_outputs_are_mixed_in_float32():
    out = of(Network(dtype=torch.bfloat16, conditional=9.0), "cfg:scale=1.003")(X, 0.5)
    assert out.dtype == torch.float32
    assert out[0, 0, 0, 0].item() == pytest.approx(10 - 1.003, abs=1e-5)


def test_the_guidance_interval_is_decided_with_the_samplers_float():
    """0.1 in float32 is greater than 0.1, so a decision in float32 would lose the closed end."""
    network = Network()
    Denoiser(of(network, "cfg:scale=2,high=0.7"), PATHS.build("linear")).velocity(X.double(), 0.7)
    assert torch.tensor(0.1, dtype=torch.float32).item() > 0.1
    Denoiser(of(network, "cfg:scale=2,high=0.1"), PATHS.build("linear")).velocity(X.double(), 0.1)
    assert network.asked == [{"conditional", "null"}] * 2


def test_more_channels_than_the_data_has_are_refused():
    with pytest.raises(UserError, match="there are only 4"):
        of(Network(), "cfg:scale=2,channels=5")(X, 0.5)


def test_a_private_guidance_is_a_class():
    class Halfway:
        def needs(self, t):
            return frozenset(("conditional", "null"))

        def mix(self, predictions, t):
            return (predictions["conditional"] + predictions["null"]) / 2

    assert guided(Network(), [Halfway()])(X, 0.5)[:, 0, 0, 0].tolist() == [6.0, 7.5]
    Halfway.needs = lambda self, t: ["conditional", "null"]  # any collection
    assert guided(Network(), [Halfway()])(X, 0.5)[:, 0, 0, 0].tolist() == [6.0, 7.5]


def test_a_function_as_guidance_is_refused():
    with pytest.raises(
        UserError, match=r"must be a class with the methods of repa.diffusion.guidance.Guidance, but is function"
    ):
        GUIDANCES.build(f"{__name__}.guided")


class WithoutTime:
    """Its `needs` has no argument t."""

    def needs(self):
        return frozenset()

    def mix(self, predictions, t):
        return predictions["conditional"]


def test_a_private_guidance_needs_the_arguments_of_the_protocol():
    with pytest.raises(UserError, match=r"WithoutTime.needs' takes \(self\), but is called with \(self, t\)"):
        GUIDANCES.build(f"{__name__}.WithoutTime")
