"""Configuration of the network: its backbone, size and options. Torch-free."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, model_validator

from repa.base.config import Config, option
from repa.base.errors import UserError, nearest
from repa.base.registry import Spec, parse_spec
from repa.models import BACKBONES


class Dimensions(NamedTuple):
    """Width of the tokens, number of blocks, number of attention heads, and side of a patch in latent pixels."""

    hidden_dim: int
    depth: int
    num_heads: int
    patch_size: int


# hidden_dim, depth, num_heads
SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
PATCH_SIZES = (1, 2, 4, 8)
FAMILIES = {"SiT": False, "DiT": True}  # whether the network also predicts the variance (learn_sigma)
JIT_SIZES = {"B": (768, 12, 12), "L": (1024, 24, 16), "H": (1280, 32, 16)}  # arXiv 2511.13720, table 9
JIT_PATCH_SIZES = (16, 32)  # in pixels
NAMED = {
    **{f"{f}-{size}/{p}": Dimensions(*SIZES[size], p) for f in FAMILIES for size in SIZES for p in PATCH_SIZES},
    **{f"JiT-{size}/{p}": Dimensions(*JIT_SIZES[size], p) for size in JIT_SIZES for p in JIT_PATCH_SIZES},
}
BLOCK_OPTIONS = ("norm", "mlp", "qk_norm", "bias", "rotary")  # fields of ModelConfig for the layers of blocks
# further fields, of a DiT only
DIT_OPTIONS = ("positions", "heads", "streams", "separate_times", "patch_overlap", "route")


def model_names() -> list[str]:
    """All names of build_model: SiT-S/1 ... DiT-XL/8, JiT-B/16 ... JiT-H/32."""
    return list(NAMED)


def dimensions(name: str) -> Dimensions:
    """The size of a name such as "SiT-XL/2"; raises UserError with the nearest name if it is unknown."""
    if name not in NAMED:
        raise UserError(
            f"Unknown model {name!r}: a name is {' or '.join(FAMILIES)} with a size ({', '.join(SIZES)}) and a patch size "
            f"({', '.join(map(str, PATCH_SIZES))}), as in 'SiT-XL/2'; or JiT with {', '.join(JIT_SIZES)} and "
            f"{' or '.join(map(str, JIT_PATCH_SIZES))}, as in 'JiT-B/16'.{nearest(name, NAMED)}"
        )
    return NAMED[name]


def check_dimensions(hidden_dim: int, depth: int, num_heads: int, patch_size: int, latent_size: int) -> None:
    """Raises UserError unless the sizes of a network are compatible; `latent_size` 0: not known yet."""
    if min(hidden_dim, depth, num_heads, patch_size) < 1:
        raise UserError(
            f"hidden_dim, depth, num_heads and patch_size must be at least 1, "
            f"but got {hidden_dim}, {depth}, {num_heads}, {patch_size}."
        )
    if hidden_dim % num_heads:
        raise UserError(f"hidden_dim {hidden_dim} is not a multiple of num_heads {num_heads}: choose a multiple.")
    if hidden_dim % 4:
        raise UserError(
            f"hidden_dim {hidden_dim} must be a multiple of 4 (sine and cosine of row and column), "
            f"for example {hidden_dim + 4 - hidden_dim % 4}."
        )
    if latent_size % patch_size:
        raise UserError(
            f"latent_size {latent_size} cannot be cut into patches of {patch_size}: choose a model with another patch "
            f"size ({', '.join(map(str, PATCH_SIZES))}) or other data."
        )


def check_rotary(head_dim: int) -> None:
    """Raises UserError unless rotary positions support heads of this width."""
    if head_dim % 4:
        raise UserError(
            "rotary rotates pairs of channels by row and by column, so the width of a head must be a multiple of 4, but it is "
            f"{head_dim}: choose another hidden_dim or num_heads."
        )


# Here and not in routing.py, which imports torch: checking a configuration must not need torch.
class Route(NamedTuple):
    """Token routing: the routed blocks, their share of the tokens, and the merge. Blocks are counted from 1.

    Attributes:
        first, last: the first and the last routed block.
        keep: share of an image's tokens in these blocks in training; 1: all.
        groups: side of square groups of tokens that each keep the same share; 0: tokens are chosen from the whole image.
        merge: identity: skipped tokens return unchanged (TREAD, arXiv 2501.04765); fuse: a mask token replaces them, and a
            linear layer joins all with the tokens before the first routed block (SPRINT, arXiv 2510.21986).
        path_drop: probability that the output of these blocks is discarded for an image, so that the network can also
            predict without them (the guidance path_drop).
    """

    first: int
    last: int
    keep: float = 1.0
    groups: int = 0
    merge: Literal["identity", "fuse"] = "identity"
    path_drop: float = 0.0

    def check(self, depth: int, heads: Sequence[int], grid: tuple[int, int]) -> None:
        """Raises UserError unless the route fits the depth, heads and grid (0: not known yet) of a network."""
        if not 1 <= self.first <= self.last <= depth:
            raise UserError(
                f"route {self.first} {self.last} is not a range of blocks within 1 to {depth}: give the first and the last "
                "routed block."
            )
        if inside := [head for head in heads if self.covers(head)]:
            raise UserError(
                f"The head at block {inside[0]} predicts all of x, but blocks {self.first} to {self.last} process only a share of the "
                "tokens: choose a block before or after them."
            )
        if not min(grid):
            return
        size = self.groups**2 if self.groups else grid[0] * grid[1]
        if self.groups and (grid[0] % self.groups or grid[1] % self.groups):
            raise UserError(
                f"keep_groups {self.groups} does not divide the {grid[0]} x {grid[1]} tokens of this network: choose a divisor, or 0 "
                "for no groups."
            )
        if round(self.keep * size) < 1 or (self.groups and abs(self.keep * size - round(self.keep * size)) > 1e-6):
            raise UserError(
                f"keep {self.keep:g} of {size} tokens is not an integer of at least 1: choose another share"
                f"{' or other keep_groups' if self.groups else ''}."
            )

    def covers(self, depth: int) -> bool:
        """Whether this block is routed."""
        return self.first <= depth <= self.last

    def num_kept(self, grid: tuple[int, int]) -> int:
        """K, the number of tokens per image in the routed blocks in training."""
        # Rounded per group and then multiplied, because every group keeps the same number of tokens.
        groups = (grid[0] // self.groups) * (grid[1] // self.groups) if self.groups else 1
        return groups * round(self.keep * (grid[0] * grid[1] // groups))


ROUTING = ("keep", "keep_groups", "merge", "path_drop")  # fields of routing, in the order of Route
TEXT_BACKBONES = ("mmdit",)


def reads_text(backbone: str) -> bool:
    """Whether this backbone reads `Condition.text`. A private backbone is trained on text if the run names a text encoder."""
    return parse_spec(backbone)[0] in TEXT_BACKBONES


class ModelConfig(Config):
    """The network to train."""

    name: str = "SiT-B/2"
    """Family, size, patch: {SiT,DiT}-{S,B,L,XL}/{1,2,4,8}, or with the backbone jit JiT-{B,L,H}/{16,32}. DiT learns a variance."""
    backbone: Annotated[str, Spec(BACKBONES)] = "dit"
    """Which network: dit, ddt (encoder and head), jit (pixels), mmdit (text), hooked:net=mylab.nets.unet,blocks=down_blocks.*
    (any module), or a dotted name: a function (ModelConfig) -> Backbone."""
    patch_size: int = Field(default=0, ge=0, le=1_024)
    """Side of a patch; 0: from the name."""
    latent_size: int = Field(default=0, ge=0, le=65_536)
    """Side of the latents; 0: from the data."""
    latent_channels: int = Field(default=0, ge=0, le=65_536)
    """Channels of the latents; 0: from the data."""
    num_classes: int = Field(default=0, ge=0, le=10_000_000)
    """Number of classes without the null class; 0: from the data."""
    hidden_dim: int = Field(default=0, ge=0, le=65_536)
    """Width of the tokens; 0: from the name."""
    depth: int = Field(default=0, ge=0, le=1_000)
    """Number of blocks; 0: from the name."""
    num_heads: int = Field(default=0, ge=0, le=65_536)
    """Number of attention heads; 0: from the name."""
    norm: Literal["layer", "rms"] = "layer"
    """What adaLN modulates: LayerNorm without weights (DiT), or RMSNorm with a weight for each channel (LightningDiT, RAE)."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """The MLP of a block: GELU (DiT), or SwiGLU, three matrices of two thirds of the width (LightningDiT, RAE)."""
    qk_norm: Literal["none", "layer", "rms"] = "none"
    """Normalisation of queries and keys per head: none, LayerNorm or RMSNorm (more stable in low precision)."""
    bias: bool = True
    """Biases of queries, keys, values and the MLP; DDT has none."""
    rotary: bool = False
    """Rotary positions of queries and keys, in addition to the fixed ones (LightningDiT, RAE)."""
    positions: bool = True
    """Fixed positions, sines of row and column, added to the tokens; SPRINT has only rotary ones."""
    heads: tuple[int, ...] = ()
    """Blocks with an auxiliary head that predicts x; trained with head_weight, used by the guidance `internal`."""
    separate_times: bool = False
    """If tokens have two times (diffusion.token_times), they attend only to tokens of the same time."""
    patch_overlap: int = Field(default=0, ge=0, le=1_024)
    """Overlap of patches on each side, in latent pixels; half a patch removes visible edges between patches."""
    route: tuple[int, int] | tuple[()] = ()
    """First and last block that see a share of the tokens in training (TREAD, SPRINT); empty: all blocks see all."""
    keep: float = Field(1.0, gt=0, le=1)
    """Share of an image's tokens in the routed blocks; 1: all."""
    keep_groups: int = Field(0, ge=0, le=1_024)
    """Side in tokens of squares that each keep the same share; 0: tokens are chosen from the whole image."""
    merge: Literal["identity", "fuse"] = "identity"
    """Merge after the route: identity (skipped tokens return unchanged) or fuse (a linear layer joins both paths)."""
    path_drop: float = Field(0.0, ge=0, lt=1)
    """Probability that an image skips the route's blocks, which the guidance path_drop needs."""
    text_shape: tuple[Annotated[int, Field(ge=0, le=65_536)], Annotated[int, Field(ge=0, le=65_536)]] = (0, 0)
    """Number and width of text tokens, for networks that read text; 0 0: from the data."""
    streams: tuple[tuple[str, int], ...] = ()
    """Name and width of each vector that is noised with the latents; filled in from the setting `streams` of the run."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_dimensions(*self.dims(), latent_size=self.latent_size)
        if self.name.startswith("JiT") and parse_spec(self.backbone)[0] == "dit":
            raise UserError(f"{self.name} is a JiT, but the backbone is dit: give --model.backbone jit.")
        if self.rotary:
            check_rotary(self.dims().hidden_dim // self.dims().num_heads)
        elif not self.positions:
            raise UserError("A network without positions cannot tell where its tokens are: add --model.rotary true.")
        # The network repeats these checks when it is built; here they need no torch.
        for depth in self.heads:
            if not 1 <= depth <= self.dims().depth:
                raise UserError(
                    f"heads has block {depth}, but {self.name} has blocks 1 to {self.dims().depth}: choose one of them."
                )
        if routing := self.routing:
            routing.check(self.dims().depth, self.heads, (self.latent_size // self.dims().patch_size,) * 2)
        elif asked := [name for name in ROUTING if getattr(self, name) != type(self).model_fields[name].default]:
            raise UserError(
                f"{asked[0]} is an option of token routing, but there is no route: give its blocks, route FIRST LAST."
            )
        return self

    def idle(self) -> dict[str, str]:
        return {} if self.route else dict.fromkeys(ROUTING, "without --route")

    @property
    def routing(self) -> Route | None:
        """Token routing; None: no routing."""
        return Route(*self.route, *(getattr(self, name) for name in ROUTING)) if self.route else None

    def dims(self) -> Dimensions:
        """(hidden_dim, depth, num_heads, patch_size), from the name unless a field overrides them."""
        named = dimensions(self.name)
        return named._replace(
            hidden_dim=self.hidden_dim or named.hidden_dim,
            depth=self.depth or named.depth,
            num_heads=self.num_heads or named.num_heads,
            patch_size=self.patch_size or named.patch_size,
        )

    @property
    def learn_sigma(self) -> bool:
        """Whether the network also predicts the variance (the DiT family)."""
        return FAMILIES.get(self.name.partition("-")[0], False)

    def refuse_dit_options(self, allowed: tuple[str, ...] = ()) -> None:
        """Raises UserError if an option of DiT is set that is not in `allowed`, for networks that support only these."""
        fields = type(self).model_fields
        options = [name for name in (*BLOCK_OPTIONS, *DIT_OPTIONS) if name not in allowed]
        asked = [name for name in options if getattr(self, name) != fields[name].default]
        backbone = parse_spec(self.backbone)[0]
        if self.learn_sigma:
            raise UserError(
                f"The backbone {backbone!r} does not support the learned variance of {self.name}: give a name that begins with SiT."
            )
        if asked:
            name, default = asked[0], fields[asked[0]].default
            typed = " ".join(map(str, default)) if isinstance(default, tuple) else default
            raise UserError(
                f"The backbone {backbone!r} has no {name}: give {option(f'model.{name}')} {typed}".rstrip()
                + ", or choose the backbone dit."
            )

    def sizes(self) -> dict[str, Any]:
        """Arguments of all networks of this package; needs the fields that come from the data."""
        assert min(self.latent_size, self.latent_channels) > 0, "latent_size and latent_channels come from the data"
        return {**self.dims()._asdict(), **self.given("latent_size", "latent_channels")}

    def given(self, *fields: str) -> dict[str, Any]:
        """The values of some fields, by name."""
        return {name: getattr(self, name) for name in fields}
