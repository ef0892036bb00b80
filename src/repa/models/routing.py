"""Token routing: between two blocks of a network only a share of its tokens goes on (TREAD, SPRINT), in training or where asked.

N batch, T tokens of the grid, K of them kept, P tokens in front of the grid, which always go on, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from repa.models.config import Route
from repa.models.layers import Conditioning, TwoConditions

MASK_STD = 0.02


class Context(NamedTuple):
    """What blocks get in addition to the tokens."""

    silu_c: Conditioning
    """SiLU of time and label."""
    mask: Tensor | None
    """(N, T, T) bool, who may look at whom."""
    rotation: tuple[Tensor, Tensor] | None
    """Cosines and sines of the places, (P + T, D / h) each."""


def draw_route(
    route: Route, num: int, grid: tuple[int, int], stream: torch.Generator
) -> tuple[Tensor | None, Tensor | None]:
    """For `num` images, on the generator's device: ids of the kept tokens (num, K), ascending, and whose path is dropped (num,).

    None where nothing is left out, and where nothing can be dropped.
    """
    keep = dropped = None
    if route.keep < 1:
        groups = token_groups(grid, route.groups).to(stream.device)  # (G, S)
        each = route.num_kept(grid) // len(groups)
        # The ranks of random numbers are a random choice without repetition, in one call for all images and groups.
        scores = torch.rand((num, *groups.shape), generator=stream, device=stream.device)
        chosen = scores.argsort(2)[:, :, :each]  # (num, G, K / G)
        keep = groups.expand(num, -1, -1).gather(2, chosen).flatten(1).sort(1).values
    # With a mask token the choice is drawn even at probability 0: DDP waits for its gradient at every step.
    if route.path_drop or route.merge == "fuse":
        dropped = torch.rand(num, generator=stream, device=stream.device) < route.path_drop
    return keep, dropped


def placeholder(route: Route | None, num: int, grid: tuple[int, int]) -> Tensor | None:
    """Ids (num, K) as `draw_route` gives them in shape, all 0, where only the arithmetic counts."""
    if route is None or route.keep == 1:
        return None
    return torch.zeros(num, route.num_kept(grid), dtype=torch.int64)


def tokens_at(route: Route | None, depth: int, grid: tuple[int, int]) -> int:
    """How many tokens of an image a block sees in training; depth 0 stands for what is not in blocks."""
    return route.num_kept(grid) if route and route.covers(depth) else grid[0] * grid[1]


def token_groups(grid: tuple[int, int], side: int) -> Tensor:
    """(G, S) ids of the tokens of each square group, row by row; one group of all T where the side is 0."""
    rows, columns = grid
    ids = torch.arange(rows * columns).view(1, rows * columns)
    if not side:
        return ids
    cut = ids.view(rows // side, side, columns // side, side)
    return cut.transpose(1, 2).reshape(-1, side * side)


class Router(nn.Module):
    """Takes the kept tokens out of all, and puts them back among the others as the route says."""

    def __init__(self, route: Route, dim: int, prefix_tokens: int):
        super().__init__()
        self.route, self.prefix_tokens = route, prefix_tokens
        self.fuse = nn.Linear(2 * dim, dim) if route.merge == "fuse" else None
        # Learned, where the released code keeps its random numbers.
        self.mask_token = nn.Parameter(torch.zeros(dim)) if route.merge == "fuse" else None

    def initialise(self) -> None:
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=MASK_STD)

    def take(self, x: Tensor, keep: Tensor) -> Tensor:
        """(N, P + T, ...) -> (N, P + K, ...): of the grid those of `keep` (N, K)."""
        return x.gather(1, self._places(keep)[:, :, None].expand(-1, -1, x.shape[2]))

    def take_context(self, context: Context, keep: Tensor) -> Context:
        """What blocks are given for the tokens that `take` gives."""
        silu_c, mask, rotation = context
        if isinstance(silu_c, TwoConditions):
            silu_c = silu_c._replace(second=self.take(silu_c.second, keep))  # (N, K, 1)
        elif silu_c.ndim == 3:
            silu_c = self.take(silu_c, keep)  # (N, K, D)
        if mask is not None:
            mask = self.take(self.take(mask, keep).mT, keep).mT  # (N, K, K)
        if rotation is not None:
            places = self._places(keep)
            cos, sin = rotation
            rotation = cos[places][:, None], sin[places][:, None]  # (N, 1, P + K, D / h), the same for every head
        return Context(silu_c, mask, rotation)

    def merge(self, shallow: Tensor, deep: Tensor | None, keep: Tensor | None, dropped: Tensor | None) -> Tensor:
        """Tokens for the block after the route, (N, P + T, D).

        Args:
            shallow: (N, P + T, D) tokens before its first block.
            deep: (N, P + K, D) tokens after its last; None where no token went through.
            keep: (N, K) which tokens those are; None: all T.
            dropped: (N,) bool, images whose deep tokens are thrown away; None: no image's.
        """
        # TREAD leaves skipped tokens as they were; SPRINT marks them by the mask token and mixes both streams.
        absent = shallow if self.mask_token is None else self.mask_token.to(shallow.dtype).expand_as(shallow)
        if deep is None:
            deep = absent
        elif keep is not None:
            deep = absent.scatter(1, self._places(keep)[:, :, None].expand_as(deep), deep)
        if dropped is not None:
            deep = torch.where(dropped[:, None, None], absent, deep)
        if self.fuse is None:
            return deep
        # The linear layer gives half precision under autocast; the residual stream stays in float32.
        return self.fuse(torch.cat([deep, shallow], dim=2)).to(shallow.dtype)

    def _places(self, keep: Tensor) -> Tensor:
        """(N, P + K) places of the tokens in front and of the kept ones among P + T."""
        if not self.prefix_tokens:
            return keep
        front = torch.arange(self.prefix_tokens, device=keep.device).expand(len(keep), -1)
        return torch.cat([front, keep + self.prefix_tokens], dim=1)
