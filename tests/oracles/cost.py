"""FLOPs by formula, as in the papers' tables. A multiply-add counts as two FLOPs."""


def dit_forward(width: int, depth: int, tokens: int, patch_values: int, out_values: int) -> int:
    """Matrix products of a diffusion transformer on one image (Peebles and Xie, arXiv 2212.09748)."""
    macs = tokens * patch_values * width  # patches in
    macs += 256 * width + width * width  # MLP of the time
    block = tokens * width * 3 * width + tokens * width * width  # q, k, v and the projection
    block += 2 * tokens * tokens * width  # logits and weighted values
    block += 2 * tokens * width * 4 * width  # MLP
    block += width * 6 * width  # adaLN, once per image
    macs += depth * block
    macs += width * 2 * width + tokens * width * out_values  # head
    return 2 * macs


def vit_forward(width: int, depth: int, tokens: int, prefix: int, patch: int) -> int:
    """Matrix products of a vision transformer on one image."""
    macs = tokens * 3 * patch * patch * width
    length = tokens + prefix
    macs += depth * (length * 4 * width * width + 2 * length * length * width + length * 8 * width * width)
    return 2 * macs
