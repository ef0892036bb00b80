"""What every frozen text encoder promises: texts in, a fixed number of token features out."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repa.base.errors import UserError
from repa.base.frozen import Frozen

MAX_LETTERS = 10_000  # of a text; what follows is beyond every tokenizer's limit, and costs it time


class Text(NamedTuple):
    """Token features of N texts."""

    tokens: Tensor
    """(N, S, E)."""
    mask: Tensor | None
    """(N, S) bool, True where there is a token of the text; None where the network may look at all S."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Text":
        """The same change to every tensor: rows, a device, a type."""
        return Text(change(self.tokens), None if self.mask is None else change(self.mask))


class TextEncoder(Frozen):
    """Always in eval mode, never with gradients. Kinds implement `encode`.

    A text is encoded alone: its features depend neither on the other texts of a call nor on their number.

    Attributes:
        name: the name in the registry.
        dim: E, the width of a token.
        num_tokens: S, tokens of every text; longer ones are cut, shorter ones padded.
        masked: whether `mask` is given.
        identity: what stored features depend on, for their manifest: name, checksums of weights and tokenizer, how texts
            become tokens.
    """

    name: str
    dim: int
    num_tokens: int
    masked: bool
    identity: dict[str, Any]

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Text:
        """Features of N texts, float32, on the encoder's device; "" stands for no text and is one like any other.

        Raises:
            UserError: `encode` gave other shapes than `dim`, `num_tokens` and `masked` promise.
        """
        text = self.encode([text[:MAX_LETTERS] for text in texts])
        tokens, mask = text if isinstance(text, Text) else (None, None)
        wanted = (len(texts), self.num_tokens, self.dim)
        given = None if tokens is None else tuple(tokens.shape), None if mask is None else tuple(mask.shape)
        if given != (wanted, wanted[:2] if self.masked else None):
            raise UserError(
                f"The text encoder {self.name} must give a Text of tokens (N, S, E) = {wanted} "
                f"{'and' if self.masked else 'without'} a mask (N, S), but gave {given[0]} and {given[1]}."
            )
        return Text(text.tokens.float(), text.mask)

    def encode(self, texts: Sequence[str]) -> Text:
        """As `forward`."""
        raise NotImplementedError
