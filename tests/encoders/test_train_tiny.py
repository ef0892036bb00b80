"""The tool that trained the two networks: folding keeps their output, and the losses match their definitions."""

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from repa.encoders import load_encoder
from repa.encoders.packaged import SHAPES, ConvNet

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(TOOLS))
    yield importlib.import_module("train_tiny")
    sys.path.remove(str(TOOLS))


@pytest.mark.parametrize("name", SHAPES)
def test_folding_keeps_the_network(tool, name):
    """Normalisation with statistics far from (0, 1) is folded into the convolutions up to fp16 rounding."""
    torch.manual_seed(0)
    net = ConvNet(SHAPES[name])
    tool.add_norm(net)
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.3, 2)
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0, 0.3)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        expected, shipped = net.eval()(images), tool.folded(net, name)(images)
    assert F.cosine_similarity(expected, shipped, dim=-1).min() > 0.9999


def test_unfolding_and_folding_again_keeps_the_network(tool):
    torch.manual_seed(0)
    shipped, net = load_encoder("tiny").net, ConvNet(SHAPES["tiny"])
    tool.add_norm(net)
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        tool.unfold(net, shipped, torch.rand(8, 3, 32, 32) * 2 - 1)
        assert net.training
        torch.testing.assert_close(net.eval()(images), shipped(images), rtol=1e-4, atol=1e-4)
        assert F.cosine_similarity(tool.folded(net, "tiny")(images), shipped(images), dim=-1).min() > 0.9999


def test_agree_across_is_cross_entropy_over_images(tool):
    """All tokens of an image are equal, so the drawn positions do not matter; images without overlap are left out."""
    generator = torch.Generator().manual_seed(0)
    here, there = (F.normalize(torch.randn(4, 1, 5, generator=generator), dim=2).expand(4, 6, 5) for _ in range(2))
    seen = torch.rand(4, 6, generator=generator) < 0.5
    seen[:, 0] = torch.tensor([True, True, False, True])
    seen[2] = False
    rows = [0, 1, 3]
    logits = [[math.exp(float(here[i, 0] @ there[j, 0]) / 0.5) for j in rows] for i in rows]
    expected = 0.0
    for k in range(3):
        column = sum(logits[i][k] for i in range(3))
        expected -= math.log(logits[k][k] / sum(logits[k])) / 6 + math.log(logits[k][k] / column) / 6
    assert float(tool.agree_across(here, there, seen, 0.5)) == pytest.approx(expected, rel=1e-5)


def test_agree_is_the_decoupled_contrastive_loss(tool):
    z = F.normalize(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), dim=1).double()
    expected = 0.0
    for i in range(6):
        partner = (i + 3) % 6
        others = [math.exp(float(z[i] @ z[j]) / 0.5) for j in range(6) if j not in (i, partner)]
        expected += -float(z[i] @ z[partner]) / 0.5 + math.log(sum(others))
    assert float(tool.agree(z, 0.5)) == pytest.approx(expected / 6)


def test_crop_boxes_stay_inside_the_image(tool):
    torch.manual_seed(0)
    boxes = tool.random_boxes(500, 0.2)
    corners = boxes[:, :, 2:] + boxes[:, :, :2] @ torch.tensor([[-1.0, 1, -1, 1], [-1, -1, 1, 1]])
    assert corners.abs().max() <= 1 + 1e-6
    area = boxes[:, 0, 0].abs() * boxes[:, 1, 1]
    assert 0.19 < area.min() < 0.25
    assert area.max() > 0.9
    assert 0.4 < (boxes[:, 0, 0] < 0).float().mean() < 0.6


def test_agree_by_place_uses_the_crop_boxes(tool):
    """Tokens that encode their image position agree with the right boxes, but not with a box shifted in x."""
    torch.manual_seed(0)
    boxes = [tool.random_boxes(32, 0.4) for _ in range(2)]

    def tokens(box):
        place = F.affine_grid(box, [32, 1, 8, 8], align_corners=False).flatten(1, 2)  # (N, T, 2)
        waves = place[..., None] * torch.tensor([1.0, 2, 3])
        return F.normalize(torch.cat([waves.sin(), waves.cos()], -1).flatten(2), dim=-1)

    def loss(first, second):
        return tool.agree_by_place(*tool.places(tokens(boxes[0]), tokens(boxes[1]), first, second), 0.02)

    right = loss(*boxes)
    shift = torch.zeros(32, 2, 3)
    shift[:, 0, 2] = 0.3
    wrong = loss(boxes[0] + shift, boxes[1])
    assert right < 0.5
    assert wrong > 2


def test_colour_jitter_can_make_grey_or_change_nothing(tool):
    torch.manual_seed(0)
    images = torch.rand(64, 3, 8, 8) * 2 - 1
    torch.testing.assert_close(tool.jitter(images, strength=0.0, grey=0.0), images, atol=1e-5, rtol=0)
    grey = tool.jitter(images, strength=0.0, grey=1.0)
    torch.testing.assert_close(grey, images.mean(1, keepdim=True).expand_as(images), atol=1e-5, rtol=0)
