"""Tokens that skip some blocks: compared with one token at a time, and what is refused."""

import pytest
import torch

from repa.base.errors import UserError
from repa.models import Condition, DiT, Tap, TwoTimes, build
from repa.models.config import ModelConfig, Route
from repa.models.routing import draw_route
from tests.oracles import sprint as oracle

SIZES = {"latent_size": 8, "latent_channels": 4, "hidden_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
KEEP = torch.tensor([[2, 4, 11], [15, 0, 6]])  # in any order


def network(route=None, **settings) -> DiT:
    torch.manual_seed(0)
    model = DiT(**{**SIZES, "patch_size": 2, "route": route, **settings}).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model


def inputs(num=2):
    stream = torch.Generator().manual_seed(1)
    x = torch.randn(num, 4, 8, 8, generator=stream, dtype=torch.float64)
    return {"x": x}, torch.rand(num, generator=stream, dtype=torch.float64), Condition(torch.arange(num))


def by_hand(model, state, t, condition, keep, dropped):
    """Tokens before the final layer by the equations of TREAD and SPRINT, one image and token at a time."""
    blocks, route = model.blocks, model.route
    silu_c, _ = model._conditioning(t, condition.labels)
    tokens = model.x_embedder(state["x"]) + model.pos_embed
    images = []
    for n in range(len(t)):
        c, x = silu_c[n : n + 1], tokens[n : n + 1]
        for block in blocks[: route.first - 1]:
            x = block(x, c)[0]
        deep = torch.stack([x[0, place] for place in keep[n]])[None]
        for block in blocks[route.first - 1 : route.last]:
            deep = block(deep, c)[0]
        rows = []
        for place in range(x.shape[1]):
            back = x[0, place] if route.merge == "identity" else model.router.mask_token
            if place in keep[n].tolist() and not dropped[n]:
                back = deep[0, keep[n].tolist().index(place)]
            if route.merge == "fuse":
                back = model.router.fuse.weight @ torch.cat([back, x[0, place]]) + model.router.fuse.bias
            rows.append(back)
        x = torch.stack(rows)[None]
        for block in blocks[route.last :]:
            x = block(x, c)[0]
        images.append(x[0])
    return torch.stack(images)


@pytest.mark.parametrize("keep", [KEEP, None])
def test_sprint_equals_its_literal_network(keep):
    """Rotary positions alone, with all tokens and with some; the second image has its path dropped, as in path-drop guidance."""
    model = network(Route(2, 3, 0.25, 2, "fuse", 0.1), rotary=True, positions=False, qk_norm="rms")
    state, t, condition = inputs()
    dropped = torch.tensor([False, True])
    found = model(state, t, condition, (), keep, dropped).prediction["x"]
    kept = torch.arange(16).expand(2, -1) if keep is None else keep
    for n in range(2):
        one = (state["x"][n], float(t[n]), n, 2, (2, 3), kept[n], bool(dropped[n]))
        torch.testing.assert_close(found[n], oracle.forward(model.state_dict(), *one), rtol=0, atol=1e-6)
    nobody = model(state, t, condition, (), torch.empty(2, 0, dtype=torch.long)).prediction["x"]
    torch.testing.assert_close(nobody[1], found[1])


@pytest.mark.parametrize("merge", ["identity", "fuse"])
@pytest.mark.parametrize("blocks", [(2, 3), (1, 4), (3, 3)])
def test_routed_blocks_skip_tokens_that_return_later(merge, blocks):
    model, given = network(Route(*blocks, 0.25, 0, merge, 0.1)), inputs()
    dropped = torch.tensor([False, True])
    taps = (Tap(1), Tap(blocks[0]), Tap(4))
    found = model(*given, taps, KEEP, dropped)
    wanted = by_hand(model, *given, KEEP, dropped)
    silu_c, _ = model._conditioning(given[1], given[2].labels)
    whole = model.final_layer(wanted, silu_c)
    torch.testing.assert_close(found.prediction["x"].mean(1), _pixels(whole).mean(1), rtol=0, atol=1e-12)
    for tap in set(taps):
        assert found.taps[tap].shape[1] == (3 if model.route.covers(tap.depth) else 16)
    assert found.kept is KEEP


def _pixels(tokens):
    n = len(tokens)
    return tokens.reshape(n, 4, 4, 2, 2, 4).permute(0, 5, 1, 3, 2, 4).reshape(n, 4, 8, 8)


def test_an_identity_route_with_all_tokens_equals_the_plain_network():
    plain, routed, given = network(), network(Route(2, 3, 0.5)), inputs()
    assert plain.state_dict().keys() == routed.state_dict().keys()
    everyone = torch.arange(16).expand(2, -1)
    wanted = plain(*given, (Tap(3, "attention"),))
    for keep in (None, everyone):
        found = routed(*given, (Tap(3, "attention"),), keep)
        torch.testing.assert_close(found.prediction, wanted.prediction)
        torch.testing.assert_close(found.taps, wanted.taps)


@pytest.mark.parametrize("merge", ["identity", "fuse"])
def test_keeping_no_tokens_skips_the_route(merge):
    model, given = network(Route(2, 3, 0.25, 0, merge, 0.1)), inputs()
    nobody = torch.empty(2, 0, dtype=torch.long)
    dropped = model(*given, (), None, torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(model(*given, (), nobody).prediction, dropped.prediction)
    model.blocks[1].attn.qkv.weight.data.fill_(torch.nan)  # a block of the route, which must not run
    assert model(*given, (), nobody).prediction["x"].isfinite().all()


@pytest.mark.parametrize("merge", ["identity", "fuse"])
def test_stream_tokens_are_never_skipped(merge):
    """The route's blocks change the vector's prediction for any kept tokens, and taps begin with the vector's token."""
    model = network(Route(2, 3, 0.25, 0, merge, 0.1), streams={"class": 6})
    state, *rest = inputs()
    state["class"] = torch.ones(2, 6, dtype=torch.float64)
    found = model(state, *rest, (Tap(2), Tap(3, "attention")), KEEP)
    assert found.taps[Tap(2)].shape == (2, 4, 32)
    assert found.taps[Tap(3, "attention")].shape == (2, 2, 3, 3)
    everyone = torch.arange(16).expand(2, -1)
    torch.testing.assert_close(model(state, *rest).prediction, model(state, *rest, (), everyone).prediction)


def test_a_time_per_token_stays_with_its_token():
    model, (state, _, condition) = network(Route(2, 3, 0.25), separate_times=True), inputs()
    times = torch.rand(2, 2, dtype=torch.float64).gather(1, torch.arange(16).expand(2, -1) % 2)
    alone = torch.arange(0, 16, 2).expand(2, -1)  # the tokens of the first time see no others
    found = model(state, times, condition, (Tap(3),), alone).taps[Tap(3)]
    whole = network(Route(1, 1), separate_times=True)(state, times, condition, (Tap(3),)).taps[Tap(3)]
    torch.testing.assert_close(found, whole[:, ::2])
    some = torch.tensor([[0, 1, 4], [3, 5, 8]])
    mixed = model(state, times, condition, (Tap(2),), some).taps[Tap(2)]
    turned = model(state, times, condition, (Tap(2),), some.flip(1)).taps[Tap(2)]
    torch.testing.assert_close(mixed, turned.flip(1))


def test_one_of_two_times_stays_with_its_token():
    """The result equals that of one time per token."""
    model, (state, _, condition) = network(Route(2, 3, 0.25), separate_times=True), inputs()
    values = torch.tensor([[0.2, 0.7], [0.9, 0.4]], dtype=torch.float64)
    second = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)) < 0.5
    for keep in (None, KEEP):
        found = model(state, TwoTimes(values, second), condition, (Tap(2),), keep)
        wanted = model(state, torch.where(second, values[:, 1:], values[:, :1]), condition, (Tap(2),), keep)
        torch.testing.assert_close(found.taps, wanted.taps)
        torch.testing.assert_close(found.prediction, wanted.prediction)


def test_rotary_positions_stay_with_their_tokens():
    """A stream's prefix token is not rotated; kept tokens are rotated by their original positions."""
    model = network(Route(2, 3, 0.25), rotary=True, qk_norm="rms", streams={"class": 6})
    state, *rest = inputs()
    state["class"] = torch.ones(2, 6, dtype=torch.float64)
    found = model(state, *rest, (Tap(3),), KEEP).taps[Tap(3)]
    turned = model(state, *rest, (Tap(3),), KEEP.flip(1)).taps[Tap(3)]
    torch.testing.assert_close(found[:, 1:], turned[:, 1:].flip(1))
    everyone = torch.arange(16).flip(0).expand(2, -1)
    torch.testing.assert_close(model(state, *rest, (), everyone).prediction, model(state, *rest).prediction)


def test_recomputed_blocks_give_the_same_gradients():
    gradients = []
    for again in (False, True):
        model = network(Route(2, 3, 0.25, 0, "fuse", 0.5))
        model.checkpoint_activations = again
        model(*inputs(), (), KEEP, torch.tensor([True, False])).prediction["x"].square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_draws_keep_the_same_share_of_every_image_and_group():
    stream = torch.Generator().manual_seed(0)
    keep, dropped = draw_route(Route(2, 3, 0.25, 2, "fuse", 0.5), 400, (4, 6), stream)
    assert keep.shape == (400, 6)
    assert (keep[:, 1:] > keep[:, :-1]).all()
    groups = keep // 12 * 3 + keep % 6 // 2  # 2 x 3 groups of a 4 x 6 grid
    assert (groups.sort(1).values == torch.arange(6)).all()
    counts = keep.flatten().bincount(minlength=24)
    assert (counts - 100).abs().max() < 40  # all tokens of a group are equally likely
    assert 0.4 < dropped.double().mean() < 0.6
    keep, dropped = draw_route(Route(2, 3, 0.5), 400, (4, 6), stream)
    assert (keep.shape, dropped) == ((400, 12), None)
    assert keep.flatten().bincount(minlength=24).double().std() < 20
    assert draw_route(Route(2, 3), 4, (4, 6), stream) == (None, None)


def test_the_plain_network_is_the_default_and_refuses_tokens_to_keep():
    model = build(ModelConfig(name="SiT-S/2", latent_size=4, latent_channels=2, num_classes=3))
    assert model.route is None
    assert not any("router" in name for name in model.state_dict())
    with pytest.raises(UserError, match="has no route"):
        network()(*inputs(), (), KEEP)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"route": (0, 3)}, "not a range of blocks within 1 to 12"),
        ({"route": (5, 13)}, "not a range of blocks within 1 to 12"),
        ({"route": (5, 4)}, "not a range of blocks"),
        ({"route": (3, 8), "heads": (5,)}, "head at block 5"),
        ({"keep": 0.5}, "keep is an option of token routing, but there is no route"),
        ({"merge": "fuse"}, "merge is an option"),
        ({"route": (3, 8), "keep": 0.25, "keep_groups": 3, "latent_size": 32}, "does not divide"),
        ({"route": (3, 8), "keep": 0.3, "keep_groups": 2, "latent_size": 32}, "is not an integer"),
        ({"route": (3, 8), "keep": 0.001, "latent_size": 32}, "is not an integer"),
    ],
)
def test_invalid_routes_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        ModelConfig.parse({"name": "SiT-S/2", **settings})


@pytest.mark.parametrize("backbone", ["jit", "mmdit"])
def test_other_backbones_refuse_a_route(backbone):
    config = ModelConfig(
        name="SiT-S/2", backbone=backbone, route=(2, 3), latent_size=32, latent_channels=3, patch_size=16
    )
    with pytest.raises(UserError, match="has no route"):
        build(config)
