"""DiT: the backbone of DiT and SiT, with streams (REG), heads (internal guidance), and a time per token.

N batch, C channels, T tokens of the grid, P tokens of streams in front of it, D width. No label dropout, loss, time
sampling or guidance: train() and eval() agree.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repa.base import files, lock
from repa.base.errors import UserError, require_type
from repa.base.pretrained import CONFIG, Repository
from repa.models import BACKBONES
from repa.models.config import BLOCK_OPTIONS, FAMILIES, ModelConfig, Route, dimensions
from repa.models.contract import Backbone, Condition, Output, State, Tap, Times, TwoTimes
from repa.models.jit import JiT, jit_dimensions
from repa.models.layers import (
    Block,
    BlockOptions,
    Conditioning,
    FinalLayer,
    LabelEmbedding,
    PatchEmbedding,
    Rotation,
    Stream,
    TimestepEmbedding,
    TwoConditions,
    adaln_zero,
    normal_matrices,
    sincos_positions,
    unpatchify,
    xavier_layers,
    xavier_patches,
)
from repa.models.routing import Context, Router


class DiT(Backbone):
    """Diffusion transformer with adaLN-Zero (arXiv 2212.09748; SiT, arXiv 2401.08740, is the same network).

    Args:
        latent_size: side of the latent, or (height, width); multiples of patch_size.
        latent_channels: C.
        num_classes: K; labels 0 ... K-1 are classes, `null_label` = K is "no label". 0 for unlabelled data.
        learn_sigma: 2C output channels, [prediction, variance].
        norm, mlp, qk_norm, bias: layers of the blocks (see BlockOptions); the defaults are DiT's.
        rotary: use rotary positions for queries and keys, in addition to the fixed ones.
        positions: add the fixed positions to the tokens.
        streams: name -> width of a vector that is noised and predicted with the latents; each is one token in front.
        heads: depths of blocks that also predict x, each with a separate final layer.
        patch_overlap: overlap of patches on each side, in latent pixels; predictions are summed.
        separate_times: with a time per token, tokens attend only to tokens of the same time (arXiv 2607.02508).
        route: token routing for calls with `keep`.

    Raises:
        UserError: incompatible sizes.
    """

    pos_embed: Tensor

    def __init__(
        self,
        *,
        latent_size: int | Sequence[int],
        latent_channels: int = 4,
        patch_size: int = 2,
        hidden_dim: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = False,
        norm: Literal["layer", "rms"] = "layer",
        mlp: Literal["gelu", "swiglu"] = "gelu",
        qk_norm: Literal["none", "layer", "rms"] = "none",
        bias: bool = True,
        rotary: bool = False,
        positions: bool = True,
        streams: Mapping[str, int] | None = None,
        heads: Sequence[int] = (),
        separate_times: bool = False,
        patch_overlap: int = 0,
        route: Route | Sequence | None = None,
    ):
        super().__init__()
        self.take_sizes(latent_size, latent_channels, patch_size, hidden_dim, depth, num_heads)
        if min(*self.state_shapes["x"]) < 1 or num_classes < 0:
            raise UserError(
                f"A model needs latent_size and latent_channels of at least 1 and num_classes of at least 0, "
                f"but got {latent_size}, {latent_channels} and {num_classes}."
            )
        streams = dict(streams or {})
        self.num_classes = self.null_label = num_classes
        self.num_heads, self.separate_times = num_heads, separate_times
        self.prefix_tokens = len(streams)
        self.state_shapes = {**self.state_shapes, **{name: (dim,) for name, dim in streams.items()}}
        options = BlockOptions(norm, mlp, qk_norm, bias)
        self.patch_overlap = patch_overlap
        patch_features = (patch_size + 2 * patch_overlap) ** 2 * latent_channels * (2 if learn_sigma else 1)

        # Stored in state dicts although a formula gives it: released checkpoints have it, and it determines their grid.
        # Zeros without positions, so that a state dict also determines whether there are any.
        self.register_buffer("pos_embed", sincos_positions(hidden_dim, self.grid) * positions)  # (1, T, D)
        self.rotation = Rotation(hidden_dim // num_heads, self.grid) if rotary else None
        self.x_embedder = PatchEmbedding(latent_channels, hidden_dim, patch_size, patch_overlap)
        self.t_embedder = TimestepEmbedding(hidden_dim)
        self.y_embedder = LabelEmbedding(num_classes, hidden_dim)
        self.blocks = nn.ModuleList(Block(hidden_dim, num_heads, mlp_ratio, options) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_dim, patch_features, norm)
        self.streams = nn.ModuleDict({name: Stream(dim, hidden_dim) for name, dim in streams.items()})
        self.heads = nn.ModuleDict({str(tap): FinalLayer(hidden_dim, patch_features, norm) for tap in sorted(heads)})
        self.router: Router | None = None
        if route:
            self.route = Route(*route)
            self.route.check(depth, heads, self.grid)
            self.router = Router(self.route, hidden_dim, len(streams))
        # Depths of heads follow the same rules as taps, so the same check applies.
        for depth_of_head in heads:
            self.checked(Tap(depth_of_head))
        self.initialise()

    def initialise(self) -> None:
        """Blocks start as the identity and every prediction as zero (adaLN-Zero)."""
        xavier_layers(self, nn.Linear)
        xavier_patches(self.x_embedder.proj)
        normal_matrices(self.y_embedder, self.t_embedder)
        adaln_zero(self)
        if self.router:
            self.router.initialise()

    def forward(
        self,
        state: State,
        t: Times,
        condition: Condition,
        taps: tuple[Tap, ...] = (),
        keep: Tensor | None = None,
        path_dropped: Tensor | None = None,
    ) -> Output:
        """Predict from the noised state; see `Backbone.forward`.

        t is not scaled: t in [0, 1], or the integer timesteps of DDPM as floats. Hidden taps have the tokens of streams in
        front, (N, P + T, D); attention taps are of the grid only, (N, h, T, T). With `keep` taps of the routed blocks have K
        tokens instead of T; with K = 0 these blocks do not run and have no taps.

        Raises:
            UserError: the state has other shapes, a tap is not a block, or `keep` is given without a route.
        """
        self.check(state, taps)
        if self.router is None and not (keep is None and path_dropped is None):
            raise UserError("This DiT has no route: do not give keep, or build it with --model.route FIRST LAST.")
        x = self.x_embedder(state["x"]) + self.pos_embed  # (N, T, D)
        # Each iteration prepends a token, so the reversed loop gives the order of the streams.
        for name, stream in reversed([*self.streams.items()]):
            x = torch.cat([stream(state[name]), x], dim=1)  # (N, P + T, D)
        # SiLU once for all blocks, because each modulation begins with the same one.
        silu_c, mask = self._conditioning(t, condition.labels)
        rotation = None if self.rotation is None else self.rotation(self.prefix_tokens)  # (P + T, D / h) twice
        context = Context(silu_c, mask, rotation)
        seen = Output({}, {}, {}, keep)
        if self.router is None:
            x = self._through(range(1, len(self.blocks) + 1), x, context, taps, seen)
        else:
            first, last = self.router.route.first, self.router.route.last
            x = self._through(range(1, first), x, context, taps, seen)
            deep = self._routed(self.router, x, context, taps, seen)
            x = self.router.merge(x, deep, keep, path_dropped)
            x = self._through(range(last + 1, len(self.blocks) + 1), x, context, taps, seen)
        # Norm and projection are separate: tokens of streams share the norm, but each stream has its own projection.
        x = self.final_layer.normed(x, silu_c)
        tokens = self.final_layer.linear(x[:, self.prefix_tokens :])  # (N, T, p * p * C), wider for overlapping patches
        seen.prediction["x"] = self._image(tokens)
        for place, (name, stream) in enumerate(self.streams.items()):
            assert isinstance(stream, Stream)
            seen.prediction[name] = stream.linear(x[:, place])  # (N, F)
        return seen

    def _through(self, depths: range, x: Tensor, context: Context, taps: tuple[Tap, ...], seen: Output) -> Tensor:
        """Tokens x (N, P + T, D) after some blocks; their taps and heads are written into `seen`."""
        for depth in depths:
            (x,) = self.run(depth, x, *context, taps=taps, seen=seen.taps, front=self.prefix_tokens)
            if str(depth) in self.heads:
                tokens = self.heads[str(depth)](x[:, self.prefix_tokens :], context.silu_c)
                seen.heads[depth] = self._image(tokens)
        return x

    def _routed(
        self, router: Router, x: Tensor, context: Context, taps: tuple[Tap, ...], seen: Output
    ) -> Tensor | None:
        """The kept tokens (N, P + K, D) after the routed blocks; None if no token is kept."""
        if seen.kept is not None:
            # Path-drop guidance needs a prediction without these blocks: running them on no tokens would still
            # launch every kernel.
            if seen.kept.shape[1] == 0:
                return None
            x, context = router.take(x, seen.kept), router.take_context(context, seen.kept)
        return self._through(range(router.route.first, router.route.last + 1), x, context, taps, seen)

    def _image(self, tokens: Tensor) -> Tensor:
        return unpatchify(tokens, self.grid, self.patch_size, self.patch_overlap)  # (N, C, H, W)

    def _conditioning(self, t: Times, labels: Tensor) -> tuple[Conditioning, Tensor | None]:
        """SiLU of time and label, and the attention mask (N, T, T)."""
        label = self.y_embedder(labels)  # (N, D)
        if t.ndim == 1:
            return F.silu(self.t_embedder(t) + label), None
        if self.streams:
            raise UserError("This network has streams, which do not support a time per token: turn token times off.")
        # Groups for the mask: equal times, or with two times per image the choice itself.
        values, which = t if isinstance(t, TwoTimes) else (t, t)  # (N, 2 or T), (N, T)
        mask = which[:, :, None] == which[:, None, :] if self.separate_times else None
        silu_c = F.silu(self.t_embedder(values) + label[:, None])  # (N, 2 or T, D)
        return TwoConditions(silu_c, which[..., None]) if isinstance(t, TwoTimes) else silu_c, mask

    # Methods as in transformers and diffusers. Without PyTorchModelHubMixin of huggingface_hub: it writes its own config.json of
    # the constructor's arguments, unlike `repa export`, and a model card that needs jinja2. The module that reads and writes
    # these folders builds a DiT, so it is imported in the methods.

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, token: str | None = None) -> "DiT":
        """The network of a folder of `repa export` or `save_pretrained`, or of a hub repository; in eval mode, trainable.

        Raises:
            UserError: no such folder or repository, or another kind of network.
        """
        from repa.models.exported import WEIGHTS, load_exported

        folder = Path(name)
        if not folder.is_dir():
            repository = Repository("network", str(name), ((CONFIG,), (WEIGHTS,)), "give a folder of `repa export`")
            folder = repository.fetched(revision=revision, token=token)
        return load_exported(folder).requires_grad_(True)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors into a new folder; raises UserError for a network with a route."""
        from repa.models.exported import WEIGHTS, save_exported
        from repa.models.published import constructor_arguments

        if self.route:
            raise UserError("save_pretrained does not support a network with a route: use `repa export RUN FOLDER`.")
        state, folder = self.state_dict(), Path(folder)
        arguments = constructor_arguments(state, self.num_heads, self.patch_overlap)
        # A state dict does not determine the sides of a non-square grid and separate_times.
        arguments |= {"latent_size": list(self.state_shapes["x"][1:]), "separate_times": self.separate_times}
        with lock.exclusive(folder, "save_pretrained"), files.new_folder(folder, WEIGHTS, "the network") as temporary:
            save_exported(temporary, state, arguments, {})

    def push_to_hub(self, name: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload the output of `save_pretrained` to a hub repository, which is created if needed; returns its address."""
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(name, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / "network"
            self.save_pretrained(saved)
            commit = api.upload_folder(repo_id=name, folder_path=saved, commit_message="A network of repa")
        return str(commit.commit_url)


def build_model(name: str, **overrides: Any) -> Backbone:
    """A network by name, such as "SiT-B/2", "DiT-XL/2" or "JiT-B/16"; `overrides` are arguments of DiT or JiT.

    latent_size, and for labelled data num_classes, come from the data and must be among the overrides.

    Raises:
        UserError: an unknown name (with the nearest one) or incompatible sizes.
    """
    sizes, family = dimensions(name)._asdict(), name.partition("-")[0]
    if family == "JiT":
        return JiT(**{**jit_dimensions(name), **overrides})
    return DiT(**{**sizes, "learn_sigma": FAMILIES[family], **overrides})


def dit(config: ModelConfig) -> DiT:
    """The backbone `dit`."""
    own = config.given(
        "num_classes", "learn_sigma", *BLOCK_OPTIONS, "positions", "heads", "separate_times", "patch_overlap"
    )
    return DiT(**config.sizes(), **own, streams=dict(config.streams), route=config.routing)


def build(config: ModelConfig) -> Backbone:
    """The network of a complete configuration, with latent size and channels from the data.

    Raises:
        UserError: incompatible sizes, or a private backbone that does not return a Backbone.
    """
    require_type(config, ModelConfig, "A network is built from a ModelConfig (repa.build_model takes a name)")
    return BACKBONES.instance(config.backbone, BACKBONES.build(config.backbone)(config), Backbone)
