"""`tiny-text`: a text encoder without weights, for tests and the offline demonstration."""

import functools
import math
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from repa.base.errors import UserError
from repa.base.rng import generator
from repa.conditions.contract import Text, TextEncoder

WORD = re.compile(r"\w+")
BEGIN = ""  # first token of every text, so that the empty text has one
POSITION = 0.3  # scale of the positions relative to words of unit variance, so that words count more than their order


class WordHashes(TextEncoder):
    """A token per word: a Gaussian vector seeded by the word's letters, plus sines and cosines of its position.

    Equal words have equal vectors, and different words nearly orthogonal ones (|cos| about 1/sqrt(E)). Nothing is learned, so
    "cup" is as far from "mug" as from "sky".
    """

    positions: Tensor

    def __init__(self, name: str, num_tokens: int, dim: int):
        super().__init__()
        self.name, self.num_tokens, self.dim, self.masked = name, num_tokens, dim, True
        self.identity = {
            "name": name, "weights_sha256": None,
            "preprocessing": f"NFKC, lower case, words of letters and digits; {num_tokens} tokens of {dim} numbers",
        }  # fmt: skip
        self.register_buffer("positions", POSITION * positions(num_tokens, dim), persistent=False)  # (S, E)
        self._vector = functools.lru_cache(100_000)(lambda word: word_vector(word, dim))

    def encode(self, texts: Sequence[str]) -> Text:
        tokens = torch.zeros(len(texts), self.num_tokens, self.dim)
        mask = torch.zeros(len(texts), self.num_tokens, dtype=torch.bool)
        for row, text in enumerate(texts):
            words = [BEGIN, *split_words(text)][: self.num_tokens]
            tokens[row, : len(words)] = torch.stack([self._vector(word) for word in words])
            mask[row, : len(words)] = True
        device = self.positions.device
        tokens, mask = tokens.to(device), mask.to(device)
        return Text((tokens + self.positions) * mask[..., None], mask)


def split_words(text: str) -> list[str]:
    """The words of a text in lower case, in order."""
    return WORD.findall(unicodedata.normalize("NFKC", text).lower())


def word_vector(word: str, dim: int) -> Tensor:
    """(E,) standard normal."""
    return torch.randn(dim, generator=generator(0, "word", word))


def positions(num: int, dim: int) -> Tensor:
    """(num, dim): sines, then cosines, with wavelengths from 2 pi to 2 pi 100, because texts are short."""
    rates = 100 ** (-torch.arange(dim // 2) / (dim // 2))
    angles = torch.arange(num)[:, None] * rates
    return math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], 1)


def load_words(
    name: str,
    weights: Path | None,
    *,
    tokens: Annotated[int, Field(ge=1, le=512)] = 16,
    width: Annotated[int, Field(ge=2, le=4096, multiple_of=2)] = 64,
) -> WordHashes:
    """A vector per word, seeded by its letters, without weights; for tests and the demonstration.

    Raises:
        UserError: weights are given.
    """
    if weights is not None:
        raise UserError(f"The text encoder {name} has no weights, but got {weights}: remove the option.")
    return WordHashes(name, tokens, width)
