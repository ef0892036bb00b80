"""Networks beside the values that their released code gave: 1e-6, since the times there are embedded in float32."""

import pytest
import torch

from repa.alignment import Alignment, AlignmentConfig, Beside
from repa.models import Condition, DiT, Tap
from repa.models.jit import JiT
from tests import golden

TOLERANCE = 1e-6


def fill(module, case, renamed=lambda name: name, absent=()):
    """Give the parameters that the case names its values, and check that it names them all."""
    parameters, filled = dict(module.named_parameters()), set()
    for k, name, shape in case["weights"]["names"]:
        ours = renamed(name)
        if ours.startswith(absent):
            continue
        parameter = parameters[ours]
        assert list(parameter.shape) == shape, ours
        index = torch.arange(parameter.numel(), dtype=torch.float64)
        with torch.no_grad():
            parameter.copy_((0.3 * torch.sin(0.37 * index + 0.5 * k + 0.1)).reshape(shape))
        filled.add(ours)
    return set(parameters) - filled


def inputs(case):
    given = case["inputs"]
    return golden.tensor(given["x"]), torch.tensor(given["t"], dtype=torch.float64), Condition(torch.tensor(given["y"]))


def dit(**arguments):
    return DiT(latent_size=4, hidden_dim=16, depth=2, num_heads=2, num_classes=3, **arguments).double()


def test_internal_guidance_is_a_head():
    case = golden.load("ig_network")
    model = dit(heads=(1,))
    assert not fill(model, case, lambda name: name.replace("final_layer_xr", "heads.1"))
    x, t, condition = inputs(case)
    output = model({"x": x}, t, condition)
    golden.check(output.prediction["x"], case["expected"]["v"], TOLERANCE)
    golden.check(output.heads[1], case["expected"]["v_mid"], TOLERANCE)


def test_reg_is_a_stream():
    case = golden.load("reg_network")
    model = dit(streams={"class": 6})
    names = {"cls_projectors2": "streams.class.embed", "wg_norm": "streams.class.norm"}
    names["final_layer.linear_cls"] = "streams.class.linear"

    def renamed(name):
        for official, ours in names.items():
            name = name.replace(official, ours)
        return name

    assert not fill(model, case, renamed, absent=("projectors",))
    x, t, condition = inputs(case)
    state = {"x": x, "class": golden.tensor(case["inputs"]["cls"])}
    output = model(state, t, condition, (Tap(1),))
    golden.check(output.prediction["x"], case["expected"]["v"], TOLERANCE)
    golden.check(output.prediction["class"], case["expected"]["cls"], TOLERANCE)
    projector = torch.nn.Sequential(
        torch.nn.Linear(16, 8), torch.nn.SiLU(), torch.nn.Linear(8, 8), torch.nn.SiLU(), torch.nn.Linear(8, 6)
    ).double()
    assert not fill(projector, case, lambda name: name.removeprefix("projectors.0."), absent=OTHERS)
    golden.check(projector(output.taps[Tap(1)]), case["expected"]["z"], TOLERANCE)


OTHERS = ("blocks", "cls_projectors2", "final_layer", "t_embedder", "wg_norm", "x_embedder", "y_embedder")


def jit():
    case = golden.load("jit_network")
    model = JiT(
        latent_size=8,
        patch_size=4,
        hidden_dim=16,
        depth=3,
        num_heads=2,
        num_classes=3,
        bottleneck=6,
        class_tokens=2,
        class_tokens_from=1,
    ).double()
    assert not fill(model, case, absent=("mask_token",))
    return case, model


def test_jit():
    case, model = jit()
    x, t, condition = inputs(case)
    output = model({"x": x}, t, condition, (Tap(1),))
    golden.check(output.taps[Tap(1)], case["expected"]["h_before_context"], TOLERANCE)
    golden.check(output.prediction["x"], case["expected"]["x_hat"], TOLERANCE)


def test_adapter_of_pixelrepa():
    """As the projector of a term: the prediction, and the released loss, which is 1 - cosine."""
    case, model = jit()
    x, t, condition = inputs(case)
    hidden = model({"x": x}, t, condition, (Tap(1),)).taps[Tap(1)]
    case = golden.load("pixelrepa_mta")
    config = AlignmentConfig(target="tiny", depth=1, projector="adapter:heads=2,class_tokens=2")
    term = Alignment(config, 16, 5, model.grid, num_classes=3).double()
    adapter = term.projector
    assert fill(adapter, case, lambda name: name.replace("projection_layer.mlp", "projection")) == {"mask_token"}
    with torch.no_grad():
        adapter.mask_token.copy_(golden.tensor(case["inputs"]["mask_token"]))
    beside = Beside(t, condition, torch.tensor(case["inputs"]["keep_mask"], dtype=torch.bool))
    golden.check(term.project(hidden, beside), case["expected"]["pred"], TOLERANCE)
    loss = term.compare(hidden, golden.tensor(case["inputs"]["z"]), beside=beside)
    assert 1 + float(loss.detach().mean()) == pytest.approx(case["expected"]["loss"], rel=TOLERANCE)
