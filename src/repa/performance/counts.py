"""FLOPs and bytes of a training step, counted with torch and autograd on networks without weights."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from repa.alignment import Alignment, AlignmentConfig, ProjectorContext
from repa.alignment.targets import build_target
from repa.base.device import autocast
from repa.base.registry import parse_spec
from repa.models import Backbone, Condition, Tap, build
from repa.models.config import ROUTING, ModelConfig
from repa.models.cost import example_inputs
from repa.models.routing import placeholder, tokens_at
from repa.performance.batches import random_condition, random_features
from repa.training.config import TrainConfig
from repa.training.inputs import encoder_needs
from repa.training.objective import Draws, Objective


def flops_per_image(config: TrainConfig, dims: Mapping[str, int]) -> int:
    """FLOPs of the matrix products of network and projectors for one image, forward and backward, counted by torch.

    A multiplication and an addition count as two. Recomputation by activation checkpointing is not counted.
    """
    num, size, channels = 2, config.model.latent_size, config.model.latent_channels  # nt_xent has no loss for one image
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH):  # its two products are counted on every device
        model = build(config.model)
        tokens = model.grid[0] * model.grid[1]
        alignments = [Alignment.of(a, model, dims) for a in config.alignments]
        objective = Objective(model, alignments, config.diffusion, label_dropout=0.0, seed=0, streams=config.streams)
        features = {n.encoder: random_features(num, tokens, dims[n.encoder], n) for n in encoder_needs(config)}
        clean = objective.clean(torch.zeros(num, channels, size, size), features)
        zeros, keep = torch.zeros(num), placeholder(model.route, num, model.grid)
        _, t, _ = example_inputs(model, num, token_times=config.diffusion.token_times > 0)
        cleanest = any(target.cleanest for target in objective.averaging)
        # The count does not depend on values, so all weights and inputs are zeros.
        draws, weights = Draws(t, clean, zeros.bool(), zeros if cleanest else t, keep), torch.zeros(1 + len(alignments))
        condition = model.completed(random_condition(config, zeros.long()))
        with FlopCounterMode(display=False) as counter:  # also counts the backward pass
            averaged = objective.averaged(model, clean, condition, draws) if objective.averages(0) else None
            objective(clean, condition, features, draws, weights, averaged).total.sum().backward()
    return counter.get_total_flops() // num


def product_shapes(config: TrainConfig) -> dict[str, tuple[int, int, int]]:
    """(M, K, N) of the products of a block, (M, K) @ (K, N), for one micro-batch: forward, gradient of the input, of the weight."""
    dims = config.model.dims()
    width, tokens = dims.hidden_dim, (config.model.latent_size // dims.patch_size) ** 2
    rows, found = config.batch_size // config.accumulate * tokens, {}
    for name, (into, out) in {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}.items():
        into, out = into * width, out * width
        found[f"{name} forward"] = (rows, into, out)
        found[f"{name} input"] = (rows, out, into)
        found[f"{name} weight"] = (out, rows, into)
    return found


def activation_bytes(config: TrainConfig, dims: dict[str, int]) -> int:
    """Bytes per image that autograd stores between forward and backward.

    Counted with networks of one and two blocks (with a DDT's complete head in both) and extrapolated, as all blocks are equal.
    Nothing is computed: PyTorch's fake tensors have the shapes and dtypes of a CPU. Matrices of attention weights (T, T) are
    excluded, because fused attention on a GPU never stores them. Any precision other than fp32 counts as bf16.

    Args:
        config: with latent size and channels filled in.
        dims: target -> width of its tokens.
    """
    model, route = config.model, config.model.routing
    grid = (model.latent_size // model.dims().patch_size,) * 2
    least = 1 + parse_spec(config.model.backbone)[1].get("head_depth", 0)  # blocks of the smaller network
    num_routed = route.last - route.first + 1 if route else 0
    routed_block = 0
    with FakeTensorMode():
        # The difference is one block: the layers before and after the blocks, and the terms, are in both.
        smaller = _saved_bytes_of_blocks(config, least, dims)
        block = _saved_bytes_of_blocks(config, least + 1, dims) - smaller
        if route:
            one_routed = _saved_bytes_of_blocks(config, 2, dims, routed=1)
            routed_block = _saved_bytes_of_blocks(config, 3, dims, routed=2) - one_routed
            # all outside the blocks, one block with all tokens, the fusion, and the terms at routed blocks
            smaller = one_routed - routed_block
    if config.checkpoint_activations:  # the inputs of all blocks, and all activations of one block at a time
        block = 4 * grid[0] * grid[1] * model.dims().hidden_dim
        routed_block = 4 * route.num_kept(grid) * model.dims().hidden_dim if route else 0
    return smaller + (model.dims().depth - num_routed - least) * block + num_routed * routed_block


def _saved_bytes_of_blocks(config: TrainConfig, depth: int, dims: dict[str, int], routed: int = 0) -> int:
    """Bytes of a network of `depth` blocks, of which the last `routed` are in its route: the difference between three images and
    two, which excludes weights; nt_xent has no loss for one image."""
    shape: dict[str, Any] = {"depth": depth, "heads": (1,) * bool(config.model.heads)}
    if config.model.route and not routed:
        shape |= {"route": (), **{name: ModelConfig.model_fields[name].default for name in ROUTING}}
    elif routed:
        shape["route"] = (depth - routed + 1, depth)
    model = build(config.model.override(**shape))
    tokens = model.grid[0] * model.grid[1]
    terms = [
        Alignment(a, model.hidden_dim, _target_width(a, model, dims), model.grid, num_classes=model.num_classes)
        for a in config.alignments
    ]
    whole, route = config.model.routing, model.route  # of the real network, and of this small one
    inside = [bool(routed) and whole is not None and whole.covers(a.depth) for a in config.alignments]
    taps = [
        Tap(route.first if route and within else 1, term.tap.kind) for term, within in zip(terms, inside, strict=True)
    ]

    def forward(num: int) -> Tensor:
        # Whether a tensor is saved depends only on types and the graph, so any values will do.
        inputs = example_inputs(model, num, token_times=config.diffusion.token_times > 0)
        output = model(*inputs, tuple(set(taps)), placeholder(model.route, num, model.grid))
        losses = [_loss_of_tap(term, output.taps[tap], model) for term, tap in zip(terms, taps, strict=True)]
        predicted = [part.square().flatten(1).mean(1) for part in (*output.prediction.values(), *output.heads.values())]
        return sum(losses) + sum(predicted)

    seen = {tokens_at(model.route, depth, model.grid), tokens}
    with autocast(torch.device("cpu"), "fp32" if config.precision == "fp32" else "bf16"):
        return saved_bytes(lambda: forward(3), *seen) - saved_bytes(lambda: forward(2), *seen)


def _target_width(alignment: AlignmentConfig, model: Backbone, dims: dict[str, int]) -> int:
    """The term's target, for a network that shares only the width of the run's."""
    encoder, _ = alignment.encoder
    if encoder or parse_spec(alignment.target)[0] in ("latent", "text"):
        return build_target(alignment, model, dims).dim
    return model.hidden_dim


def _loss_of_tap(term: Alignment, tap: Tensor, model: Backbone) -> Tensor:
    """The loss between a tap of the first block and existing tokens."""
    if term.tap.kind == "attention":
        return term.compare(tap, torch.randn(tap.shape))
    student = tap[:, model.prefix_tokens :]
    num = len(student)
    target = None if term.config.target == "none" else torch.randn(*student.shape[:2], term.feature_dim)
    context = ProjectorContext(
        torch.rand(num), Condition(torch.zeros(num, dtype=torch.int64)), torch.ones(student.shape[:2]).bool()
    )
    return term.compare(student, target, context=context)


def saved_bytes(forward: Callable[[], Tensor], *num_tokens: int) -> int:
    """Bytes of the storages that autograd saves in a forward pass, each counted once, without attention weights (T, T)."""
    storages: dict[int, torch.UntypedStorage] = {}  # by identity; kept alive, so that identities stay unique

    def pack(tensor: Tensor) -> Tensor:
        # Views share a storage, which is stored once however many of them are saved.
        if all(tensor.shape[-2:] != (number, number) for number in num_tokens):
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    assert result.requires_grad
    return sum(storage.nbytes() for storage in storages.values())
