"""The texts that samples are of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from repa.conditions import Text


@dataclass(frozen=True)
class Prompts:
    """Texts in turn: image i is of text i modulo their number.

    Args:
        texts: P of them.
        encode: their tokens, by their numbers 0 ... P - 1.
        negative: tokens (1, S, E) of what guidance walks away from; None: the empty text.
    """

    texts: Sequence[str]
    encode: Callable[[Sequence[int]], Text]
    negative: Text | None = None

    def of(self, indices: Sequence[int]) -> Text:
        """Tokens (N, S, E) of the texts of N images."""
        return self.encode([int(index) % len(self.texts) for index in indices])

    def texts_of(self, indices: Sequence[int]) -> list[str]:
        """The texts themselves."""
        return [self.texts[int(index) % len(self.texts)] for index in indices]
