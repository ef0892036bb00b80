"""Networks against values of their released code, to 1e-6, because it embeds times in float32."""

import pytest
import torch

from repa.alignment import Alignment, AlignmentConfig, ProjectorContext
from repa.models import DDT, Condition, DDTOptions, DiT, Tap
from repa.models.jit import JiT
from repa.models.layers import BlockOptions
from tests import golden

TOLERANCE = 1e-6


def fill(module, case, renamed=lambda name: name, absent=()):
    """Set the parameters that the case names, and check that it names all of them."""
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


def test_a_head_equals_internal_guidances_released_network():
    case = golden.load("ig_network")
    model = dit(heads=(1,))
    assert not fill(model, case, lambda name: name.replace("final_layer_xr", "heads.1"))
    x, t, condition = inputs(case)
    output = model({"x": x}, t, condition)
    golden.check(output.prediction["x"], case["expected"]["v"], TOLERANCE)
    golden.check(output.heads[1], case["expected"]["v_mid"], TOLERANCE)


def test_a_stream_equals_regs_released_network():
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


def test_jit_equals_the_released_network():
    case, model = jit()
    x, t, condition = inputs(case)
    output = model({"x": x}, t, condition, (Tap(1),))
    golden.check(output.taps[Tap(1)], case["expected"]["h_before_context"], TOLERANCE)
    golden.check(output.prediction["x"], case["expected"]["x_hat"], TOLERANCE)


def test_the_adapter_equals_pixelrepas_released_one():
    """Used as the projector of a term: the prediction, and the released loss, which is 1 - cosine."""
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
    context = ProjectorContext(t, condition, torch.tensor(case["inputs"]["keep_mask"], dtype=torch.bool))
    golden.check(term.project(hidden, context), case["expected"]["pred"], TOLERANCE)
    loss = term.compare(hidden, golden.tensor(case["inputs"]["z"]), context=context)
    assert 1 + float(loss.detach().mean()) == pytest.approx(case["expected"]["loss"], rel=TOLERANCE)


def permuted(tensor, heads, dim=0):
    """Reorder query or key channels from DDT's alternating (column, row) pairs to ours: rows first, then columns."""
    pairs = tensor.unflatten(dim, (heads, -1, 2, 2))  # per head: frequency, column or row, the two of a pair
    return pairs.movedim(dim + 2, dim + 1).flip(dim + 1).flatten(dim, dim + 3)


def test_ddt_equals_the_released_network():
    case = golden.load("ddt_network")
    sizes = case["config"]
    head_depth = sizes["blocks"] - sizes["encoder_blocks"]
    model = DDT(
        DDTOptions(head_depth, final_norm="layer", extent=16.0, max_period=10.0),
        BlockOptions("rms", "swiglu", qk_norm="rms", bias=False),
        latent_size=4, hidden_dim=16, depth=3, num_heads=2, num_classes=3,
    ).double()  # fmt: skip
    values = {name: value(k, shape) for k, name, shape in case["weights"]["names"]}
    for block in range(3):
        at = f"blocks.{block}."
        values[at + "mlp.w12.weight"] = torch.cat([values.pop(at + "mlp.w1.weight"), values.pop(at + "mlp.w3.weight")])
        values[at + "mlp.w3.weight"] = values.pop(at + "mlp.w2.weight")
        q, k, v = values[at + "attn.qkv.weight"].chunk(3)
        values[at + "attn.qkv.weight"] = torch.cat([permuted(q, 2), permuted(k, 2), v])
        for norm in ("q_norm", "k_norm"):
            values[f"{at}attn.{norm}.weight"] = permuted(values[f"{at}attn.{norm}.weight"], 1)
    for name in [name for name in values if "adaLN_modulation.0" in name]:
        values[name.replace("adaLN_modulation.0", "adaLN_modulation.1")] = values.pop(name)
    for name in ("x_embedder.proj.weight", "s_embedder.proj.weight"):
        values[name] = values[name].unflatten(1, (4, 2, 2))
    for name in (
        "final_layer.linear.weight",
        "final_layer.linear.bias",
    ):  # (channel, row, column) -> (row, column, channel)
        values[name] = values[name].unflatten(0, (4, 2, 2)).movedim(0, 2).flatten(0, 2)
    load(model, values)
    x, t, condition = inputs(case)
    encoded = model.encode({"x": x}, t, condition)
    expected = case["expected"]
    golden.check(encoded.self_condition, expected["s"], TOLERANCE)
    golden.check(model({"x": x}, t, condition).prediction["x"], expected["v"], TOLERANCE)
    other = golden.tensor(expected["second_input"]["x"])
    shared = model.decode({"x": other}, encoded)
    golden.check(shared.prediction["x"], expected["v_with_shared_s_other_x_t"], TOLERANCE)


def test_raev2_equals_the_released_network():
    case = golden.load("raev2_network")
    model = DDT(
        DDTOptions(1, head_dim=24, head_heads=2, times="fourier", silu_twice=True, time_tokens=2, class_tokens=3),
        BlockOptions("rms", "swiglu", qk_norm="rms"),
        latent_size=2, latent_channels=3, patch_size=1, hidden_dim=16, depth=3, num_heads=2, num_classes=3, heads=(1,),
    ).double()  # fmt: skip
    values = {name: value(k, shape) for k, name, shape in case["weights"]["names"]}
    for block in range(3):
        at = f"blocks.{block}."
        for kind in ("weight", "bias"):
            values[f"{at}attn.qkv.{kind}"] = torch.cat([values.pop(f"{at}attn.{part}.{kind}") for part in "qkv"])
            values[f"{at}mlp.w12.{kind}"] = torch.cat([values.pop(f"{at}mlp.{part}.{kind}") for part in ("w1", "w2")])
    names = {
        "adaln": "adaLN", "base_final_layer": "heads.1", "layer.norm": "layer.norm_final", "heads.1.norm": "heads.1.norm_final",
        "ctx_embedder.embedding": "y_embedder.embedding", "ctx_embedder.learnable_tokens": "class_tokens",
        "t_embedder.learnable_tokens": "time_tokens",
    }  # fmt: skip
    for official, ours in names.items():
        values = {name.replace(official, ours): v for name, v in values.items()}
    values = {name: v[None] if name.endswith("_tokens") else v for name, v in values.items()}
    load(model, values)
    model.t_embedder.W.copy_(torch.sin(0.37 * torch.arange(256, dtype=torch.float64) + 0.9))
    x, t, condition = inputs(case)
    output = model({"x": x}, t, condition)
    golden.check(output.prediction["x"], case["expected"]["x_hat"], TOLERANCE)
    golden.check(output.heads[1], case["expected"]["x_base"], TOLERANCE)


def value(k, shape):
    count = int(torch.tensor(shape).prod())
    return (0.3 * torch.sin(0.37 * torch.arange(count, dtype=torch.float64) + 0.5 * k + 0.1)).reshape(shape)


def load(model, values):
    missing, unexpected = model.load_state_dict(values, strict=False)
    buffers = {name for name, _ in model.named_buffers()}
    assert (set(missing) - buffers, unexpected) == (set(), [])
