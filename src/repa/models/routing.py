"""Token routing: some blocks process only a share of the tokens (TREAD, SPRINT), in training or on request.

N batch, T tokens of the grid, K kept tokens, P tokens in front of the grid, which are always kept, D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from repa.models.config import Route
from repa.models.layers import Conditioning, TwoConditions

MASK_STD = 0.02


class Context(NamedTuple):
    """Inputs of blocks in addition to the tokens."""

    silu_c: Conditioning
    """SiLU of time and label."""
    mask: Tensor | None
    """(N, T, T) bool, the attention mask."""
    rotation: tuple[Tensor, Tensor] | None
    """Cosines and sines of the positions, (P + T, D / h) each."""


def draw_route(
    route: Route, num: int, grid: tuple[int, int], stream: torch.Generator
) -> tuple[Tensor | None, Tensor | None]:
    """Indices of the kept tokens (num, K), ascending, and the images with dropped path (num,), on the generator's device.

    The first is None if all tokens are kept, the second if no path can be dropped.
    """
    keep = dropped = None
    if route.keep < 1:
        groups = token_groups(grid, route.groups).to(stream.device)  # (G, S)
        each = route.num_kept(grid) // len(groups)
        # Ranks of random numbers give a random choice without repetition, in one call for all images and groups.
        scores = torch.rand((num, *groups.shape), generator=stream, device=stream.device)
        chosen = scores.argsort(2)[:, :, :each]  # (num, G, K / G)
        keep = groups.expand(num, -1, -1).gather(2, chosen).flatten(1).sort(1).values
    # With a mask token the second is never None, even at probability 0, because DDP needs its gradient at every step.
    if route.path_drop or route.merge == "fuse":
        dropped = torch.rand(num, generator=stream, device=stream.device) < route.path_drop
    return keep, dropped


def placeholder(route: Route | None, num: int, grid: tuple[int, int]) -> Tensor | None:
    """Indices (num, K) of 0 with the shape of `draw_route`, for passes in which values do not matter."""
    if route is None or route.keep == 1:
        return None
    return torch.zeros(num, route.num_kept(grid), dtype=torch.int64)


def tokens_at(route: Route | None, depth: int, grid: tuple[int, int]) -> int:
    """Number of tokens per image in a block in training; depth 0: outside the blocks."""
    return route.num_kept(grid) if route and route.covers(depth) else grid[0] * grid[1]


def token_groups(grid: tuple[int, int], side: int) -> Tensor:
    """(G, S) indices of the tokens of each square group, row-major; one group of all T tokens if the side is 0."""
    rows, columns = grid
    ids = torch.arange(rows * columns).view(1, rows * columns)
    if not side:
        return ids
    cut = ids.view(rows // side, side, columns // side, side)
    return cut.transpose(1, 2).reshape(-1, side * side)


class Router(nn.Module):
    """Selects the kept tokens, and merges them with the others after the route."""

    def __init__(self, route: Route, dim: int, prefix_tokens: int):
        super().__init__()
        self.route, self.prefix_tokens = route, prefix_tokens
        self.fuse = nn.Linear(2 * dim, dim) if route.merge == "fuse" else None
        # Trained here, but random and fixed in the released code.
        self.mask_token = nn.Parameter(torch.zeros(dim)) if route.merge == "fuse" else None

    def initialise(self) -> None:
        if self.mask_token is not None:
            nn.init.normal_(self.mask_token, std=MASK_STD)

    def take(self, x: Tensor, keep: Tensor) -> Tensor:
        """(N, P + T, ...) -> (N, P + K, ...): the tokens in front, and the grid's tokens `keep` (N, K)."""
        return x.gather(1, self._places(keep)[:, :, None].expand(-1, -1, x.shape[2]))

    def take_context(self, context: Context, keep: Tensor) -> Context:
        """The context for the tokens of `take`."""
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
            shallow: (N, P + T, D) tokens before the first routed block.
            deep: (N, P + K, D) tokens after the last routed block; None if no tokens are kept.
            keep: (N, K) indices of the kept tokens; None: all T.
            dropped: (N,) bool, images with discarded deep tokens; None: none.
        """
        # TREAD returns skipped tokens unchanged; SPRINT replaces them by the mask token and mixes deep and shallow tokens.
        absent = shallow if self.mask_token is None else self.mask_token.to(shallow.dtype).expand_as(shallow)
        if deep is None:
            deep = absent
        elif keep is not None:
            deep = absent.scatter(1, self._places(keep)[:, :, None].expand_as(deep), deep)
        if dropped is not None:
            deep = torch.where(dropped[:, None, None], absent, deep)
        if self.fuse is None:
            return deep
        # Under autocast the linear layer returns half precision, but the residual stream stays in float32.
        return self.fuse(torch.cat([deep, shallow], dim=2)).to(shallow.dtype)

    def _places(self, keep: Tensor) -> Tensor:
        """(N, P + K) indices among P + T of the tokens in front and of the kept ones."""
        if not self.prefix_tokens:
            return keep
        front = torch.arange(self.prefix_tokens, device=keep.device).expand(len(keep), -1)
        return torch.cat([front, keep + self.prefix_tokens], dim=1)
