"""Agreement of samples with their prompts, by the words of captioned reference images or by CLIP."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from repa.base.errors import UserError
from repa.conditions.encoders import locate_text_encoder, read_network, read_tokenizer, split_words
from repa.encoders.families import CLIP
from repa.evaluation.images import gather_rows

MOST_WORDS = 1000  # of the reference's captions, the most frequent ones
RARE, COMMON = 0.005, 0.95  # share of captions: rarer words cannot be learned, more common ones do not discriminate
RIDGE = 0.1  # for features of unit variance
CHUNK = 256  # samples per comparison with all prompts


class CaptionMeasure(Protocol):
    """A metric of samples and their prompts, updated in batches on every process."""

    def update(self, indices: Tensor, images: Tensor, pooled: Tensor) -> None:
        """Indices (n,), uint8 images (n, 3, H, W), and their features by the extractor (n, D)."""
        ...

    def result(self) -> dict[str, float]:
        """The metrics by name, the same in all processes."""
        ...


class CaptionAgreement:
    """Whether an image's features fit its own prompt better than other prompts.

    A ridge regression on the reference's features predicts the words of an image's caption. The disagreement of a sample and a
    prompt is the sum of squared differences between predicted and present words, each divided by the word's unexplained
    variance in the reference. `caption_agreement` is the share of other prompts with a larger disagreement than the sample's
    own, averaged over samples: 1 if prompts are followed, 0.5 if they are ignored. `caption_agreement_shuffled` is the same
    with prompts shifted by one sample, as the control for 0.5.

    Args:
        features: (M, D) of reference images.
        captions: of these images.
        prompts: of the samples, by their index.

    Raises:
        UserError: the captions have no words that distinguish images.
    """

    def __init__(self, features: Tensor, captions: Sequence[tuple[str, ...]], prompts: Sequence[str]):
        # An image may have several captions: their words are combined.
        word_sets = [set().union(*map(split_words, texts)) if texts else set() for texts in captions]
        counts = Counter(word for words in word_sets for word in words)
        useful = [word for word, num in counts.most_common() if RARE * len(word_sets) <= num <= COMMON * len(word_sets)]
        self.vocabulary = sorted(useful[:MOST_WORDS])
        if not self.vocabulary:
            raise UserError(
                "The captions of the reference have no words that distinguish its images: give prepared data with captions, or leave "
                "caption_agreement out of --metrics."
            )
        self.prompts = prompts
        self.rows: list[Tensor] = []
        self.places: list[Tensor] = []
        x, y = features.double().cpu(), self._word_matrix(word_sets)  # (M, D), (M, V)
        self.mean, self.std = x.mean(0), x.std(0).clamp_min(1e-6)
        self.base = y.mean(0)  # (V,), how frequent each word is
        x = (x - self.mean) / self.std
        # Ridge in closed form: with so many features and a few thousand captions, least squares would overfit.
        gram = x.T @ x / len(x) + RIDGE * torch.eye(x.shape[1], dtype=x.dtype)  # (D, D)
        self.weights = torch.linalg.solve(gram, x.T @ (y - self.base) / len(x))  # (D, V)
        # Words that the features do not show have an error as large as their variance, and so count little.
        self.unexplained = (y - self.base - x @ self.weights).square().mean(0).clamp_min(1e-4)  # (V,)

    def update(self, indices: Tensor, images: Tensor, pooled: Tensor) -> None:
        self.rows.append(pooled.float().cpu())
        self.places.append(indices)

    def result(self) -> dict[str, float]:
        x = (gather_rows(self.rows, self.places).double() - self.mean) / self.std
        predicted = self.base + x @ self.weights  # (N, V)
        # the distinct word sets (P, V) of the prompts, and the index of each prompt's set (N,)
        matrix = self._word_matrix([set(split_words(text)) for text in self.prompts[: len(x)]])
        words, own = torch.unique(matrix, dim=0, return_inverse=True)
        # -|p - w|^2 / u without |p|^2 / u, which is equal for all prompts of a sample: a product instead of (N, P, V) differences.
        of_words, weighted = (words.square() / self.unexplained).sum(1), (words / self.unexplained).T  # (P,), (V, P)
        own_share, shuffled = agreement(lambda rows: 2 * predicted[rows] @ weighted - of_words, own)
        return {"caption_agreement": own_share, "caption_agreement_shuffled": shuffled}

    def _word_matrix(self, word_sets: Sequence[set[str]]) -> Tensor:
        """(n, V): 1 if a caption has the word."""
        return torch.tensor([[word in words for word in self.vocabulary] for words in word_sets], dtype=torch.float64)


class ClipScore:
    """Similarity of images and their prompts according to CLIP.

    `clip_score` is the mean of max(0, 100 cos(image, text)); `clip_agreement` is the share of other prompts that are farther
    from an image than its own, and `clip_agreement_shuffled` the same with prompts shifted by one sample.

    Args:
        name: clip-b, clip-l or clip-h.
        weights: a folder as on the hub; None: the caches, or the hub.
        prompts: of the samples, by their index.
    """

    def __init__(self, name: str, weights: Path | None, prompts: Sequence[str], device: torch.device):
        if not name.startswith("clip-"):
            raise UserError(f"Unknown CLIP {name!r}: choose clip-b, clip-l or clip-h.")
        family, folder = locate_text_encoder(name, weights)
        self.net = read_network(name, "CLIPModel", folder).to(device).eval()
        self.tokenizer, self.device, self.prompts = read_tokenizer(name, folder), device, prompts
        self.num_tokens = min(family.num_tokens, self.net.config.text_config.max_position_embeddings)
        self.images: list[Tensor] = []
        self.texts: list[Tensor] = []
        self.places: list[Tensor] = []

    @torch.inference_mode()
    def update(self, indices: Tensor, images: Tensor, pooled: Tensor) -> None:
        texts = [self.prompts[int(index)] for index in indices]
        tokens = self.tokenizer(
            texts, padding="max_length", truncation=True, max_length=self.num_tokens, return_tensors="pt"
        ).to(self.device)
        pixels = clip_pixels(images, self.net.config.vision_config.image_size).to(self.device)
        seen = self.net(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
        self.images.append(F.normalize(seen.image_embeds.float(), dim=1).cpu())
        self.texts.append(F.normalize(seen.text_embeds.float(), dim=1).cpu())
        self.places.append(indices)

    def result(self) -> dict[str, float]:
        images, texts = gather_rows(self.images, self.places), gather_rows(self.texts, self.places)
        # Images with the same prompt share one entry.
        distinct: dict[str, int] = {}  # text -> the first image of it
        for index, text in enumerate(self.prompts[: len(images)]):
            distinct.setdefault(text, index)
        number = {text: place for place, text in enumerate(distinct)}
        own = torch.tensor([number[text] for text in self.prompts[: len(images)]])
        prompts = texts[list(distinct.values())].T  # (E, P)
        own_share, shuffled = agreement(lambda rows: images[rows] @ prompts, own)
        matching = (images * texts).sum(1)  # (N,), cosines
        return {
            "clip_score": float(100 * matching.clamp_min(0).mean()),
            "clip_agreement": own_share, "clip_agreement_shuffled": shuffled,
        }  # fmt: skip


def agreement(scores: Callable[[slice], Tensor], own: Tensor) -> tuple[float, float]:
    """The share of other prompts that fit a sample worse than its own, averaged over samples; a tie counts one half.

    Args:
        scores: function that returns some rows of the matrix (N, P) of scores; for 40,000 samples the full matrix has 6 GB.
        own: (N,), the index of each sample's prompt.

    Returns:
        That share, and the same with prompts shifted by one sample.

    Raises:
        UserError: fewer than two prompts.
    """
    shares: list[Tensor] = []
    shuffled = own.roll(-1)
    for start in range(0, len(own), CHUNK):
        rows = slice(start, start + CHUNK)
        found = scores(rows)  # (n, P)
        # Only now: the scores determine the number of distinct prompts.
        if found.shape[1] < 2:
            raise UserError("All samples have the same prompt, so agreement is undefined: give several prompts.")
        shares.append(torch.stack([_share_worse(found, numbers[rows]) for numbers in (own, shuffled)]))
    of_own, of_others = torch.cat(shares, 1).mean(1).tolist()
    return of_own, of_others


def _share_worse(scores: Tensor, numbers: Tensor) -> Tensor:
    """(n,): the share of other prompts with a lower score than prompt `numbers` (n,); a tie counts one half."""
    mine = scores.gather(1, numbers[:, None])  # (n, 1)
    below = (scores < mine).double() + 0.5 * (scores == mine).double()
    return (below.sum(1) - 0.5) / (scores.shape[1] - 1)  # it is a tie with itself


def clip_pixels(images: Tensor, side: int) -> Tensor:
    """CLIP's preprocessing, uint8 (n, 3, H, W) -> float (n, 3, side, side): bicubic resizing (Pillow), centre crop, mean and std."""
    found = []
    for image in images.permute(0, 2, 3, 1).cpu().numpy():
        height, width = image.shape[:2]
        scale = side / min(height, width)
        size = (side if width <= height else int(width * scale), side if height <= width else int(height * scale))
        resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        left, top = (size[0] - side) // 2, (size[1] - side) // 2
        found.append(np.asarray(resized.crop((left, top, left + side, top + side)), np.float32) / 255)
    pixels = (np.stack(found) - np.array(CLIP.mean, np.float32)) / np.array(CLIP.std, np.float32)
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2))
