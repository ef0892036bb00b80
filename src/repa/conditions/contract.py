"""The interface of frozen text encoders: texts in, a fixed number of token features out."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from repa.base.errors import UserError, require_type
from repa.base.pretrained import Frozen

MAX_LETTERS = 10_000  # characters of a text; the rest exceeds every tokenizer's limit and would only cost time


class Text(NamedTuple):
    """Token features of N texts."""

    tokens: Tensor
    """(N, S, E)."""
    mask: Tensor | None
    """(N, S) bool, True for tokens of the text, False for padding; None: the network attends to all S."""

    def map(self, change: Callable[[Tensor], Tensor]) -> "Text":
        """Apply a function to every tensor, such as indexing, or a move to a device or type."""
        return Text(change(self.tokens), None if self.mask is None else change(self.mask))


class TextEncoder(Frozen):
    """A frozen encoder, always in eval mode and without gradients. Subclasses implement `encode`.

    The features of a text do not depend on the other texts of a call.

    Attributes:
        name: the name in the registry.
        dim: E, the width of a token.
        num_tokens: S, tokens per text; longer texts are truncated, shorter ones padded.
        masked: whether features have a `mask`.
        identity: the identity of stored features, for their manifest: name, checksums of weights and tokenizer, and the
            tokenization.
    """

    name: str
    dim: int
    num_tokens: int
    masked: bool
    identity: dict[str, Any]

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Text:
        """Features of N texts, float32, on the encoder's device; "" is the empty text and is encoded like any other.

        Raises:
            UserError: the shapes of `encode` contradict `dim`, `num_tokens` or `masked`.
        """
        require_type(texts, (list, tuple), "A text encoder takes a list of texts")
        text = self.encode([text[:MAX_LETTERS] for text in texts])
        tokens, mask = text if isinstance(text, Text) else (None, None)
        wanted = (len(texts), self.num_tokens, self.dim)
        given = None if tokens is None else tuple(tokens.shape), None if mask is None else tuple(mask.shape)
        if given != (wanted, wanted[:2] if self.masked else None):
            raise UserError(
                f"The text encoder {self.name} must return tokens of shape (N, S, E) = {wanted} "
                f"{'and' if self.masked else 'without'} a mask (N, S), but returned {given[0]} and {given[1]}."
            )
        return Text(text.tokens.float(), text.mask)

    def encode(self, texts: Sequence[str]) -> Text:
        """As `forward`."""
        raise NotImplementedError
