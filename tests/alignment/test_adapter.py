"""PixelREPA's adapter as the projector of a term: its inputs, its masks, and where it is refused."""

import pytest
import torch

from repa.alignment import PROJECTORS, Alignment, AlignmentConfig
from repa.base import dist
from repa.base.errors import UserError
from repa.diffusion.config import DiffusionConfig
from repa.encoders.contract import Features
from repa.models import Condition, DiT
from repa.training import Objective
from repa.training.objective import select_samples

TERM = {"target": "tiny", "depth": 1, "projector": "adapter:masked=0.3,heads=2,class_tokens=2"}


def network(**settings) -> DiT:
    torch.manual_seed(0)
    sizes = {"latent_size": 8, "latent_channels": 3, "patch_size": 2, "hidden_dim": 16, "depth": 2, "num_heads": 2}
    return DiT(**sizes, num_classes=3, **settings)


def objective(term=TERM, diffusion=None, **settings) -> Objective:
    model = network(**settings)
    terms = [Alignment.of(AlignmentConfig(**term), model, {"tiny": 5})]
    for parameter in terms[0].parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # adaLN-Zero would hide the inputs of a block
    return Objective(model, terms, DiffusionConfig(**(diffusion or {})), label_dropout=0.3, seed=3)


def batch(num=8):
    stream = torch.Generator().manual_seed(1)
    x, patches = torch.randn(num, 3, 8, 8, generator=stream), torch.randn(num, 16, 5, generator=stream)
    return x, Condition(torch.randint(3, (num,), generator=stream)), {"tiny": Features(patches, None)}


def test_the_adapter_receives_times_dropped_labels_and_mask():
    part = objective()
    x, condition, features = batch()
    clean = part.clean(x, features)
    draws = part.draw(clean, 5)
    given = []
    (term,) = part.alignments.values()
    term.projector.register_forward_pre_hook(lambda _, args: given.append(args))
    losses = part(clean, condition, features, draws, part.weights(5, x.device))
    _, t, seen, visible = given[0]
    assert torch.equal(t, draws.t)
    assert torch.equal(seen.labels, torch.where(draws.dropped, 3, condition.labels))
    assert torch.equal(visible, draws.visible["tiny@1"])
    losses.total.mean().backward()
    assert [name for name, p in term.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_masks_depend_on_seed_and_step_and_have_the_configured_share():
    part, (x, _, features) = objective(), batch(400)
    clean = part.clean(x, features)
    masks = [part.draw(clean, step).visible["tiny@1"] for step in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert float((~masks[0]).float().mean()) == pytest.approx(0.3, abs=0.02)
    some = select_samples(part.draw(clean, 0), slice(3, 7))
    assert torch.equal(some.visible["tiny@1"], masks[0][3:7])


def test_two_processes_draw_the_same_masks_as_one(monkeypatch):
    part, (x, _, features) = objective(), batch()
    whole = part.draw(part.clean(x, features), 2)
    monkeypatch.setattr(dist, "world", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "rank", lambda rank=rank: rank)
        rows = slice(4 * rank, 4 * rank + 4)
        found = part.draw(part.clean(x[rows], features), 2)
        assert torch.equal(found.visible["tiny@1"], whole.visible["tiny@1"][rows])


def test_the_adapter_does_not_change_other_random_draws():
    x, _, features = batch()
    with_mask, without = objective(), objective({**TERM, "projector": "linear"})
    for part in (with_mask, without):
        part.clean(x, features)
    first, second = (part.draw(part.clean(x, features), 1) for part in (with_mask, without))
    assert torch.equal(first.t, second.t)
    assert torch.equal(first.noise["x"], second.noise["x"])
    assert second.visible == {}


@pytest.mark.parametrize("setting", ["masked=1", "masked=half", "depth=0", "heads=3", "heads=0.5", "class_tokens=0"])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(UserError, match="adapter"):
        PROJECTORS.build(f"adapter:{setting}")(16, 5, (4, 4), 3)


def test_an_adapter_in_an_unsupported_place_is_refused():
    with pytest.raises(UserError, match="one time per image"):
        objective(diffusion={"token_times": 0.25})
    for projector in (TERM["projector"], "conv"):
        with pytest.raises(UserError, match="part=patches"):
            objective({**TERM, "projector": projector, "target": "tiny:part=all"}, streams={"class": 5})
    term = Alignment(AlignmentConfig(**TERM), 16, 5, (4, 4), num_classes=3)
    with pytest.raises(UserError, match="ProjectorContext"):
        term.compare(torch.zeros(2, 16, 16), torch.zeros(2, 16, 5))
