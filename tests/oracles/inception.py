"""Inception-v3 of 2015-12-05 from public descriptions: a table of convolutions, and its parts as float64 loops."""

import numpy as np
import torch

STEM = {
    "Conv2d_1a_3x3": (3, 32, 3, 3), "Conv2d_2a_3x3": (32, 32, 3, 3), "Conv2d_2b_3x3": (32, 64, 3, 3),
    "Conv2d_3b_1x1": (64, 80, 1, 1), "Conv2d_4a_3x3": (80, 192, 3, 3),
}  # fmt: skip


def block_a(n, pool):
    return {
        "branch1x1": (n, 64, 1, 1), "branch5x5_1": (n, 48, 1, 1), "branch5x5_2": (48, 64, 5, 5),
        "branch3x3dbl_1": (n, 64, 1, 1), "branch3x3dbl_2": (64, 96, 3, 3), "branch3x3dbl_3": (96, 96, 3, 3),
        "branch_pool": (n, pool, 1, 1),
    }  # fmt: skip


def block_b(n):
    return {
        "branch3x3": (n, 384, 3, 3), "branch3x3dbl_1": (n, 64, 1, 1), "branch3x3dbl_2": (64, 96, 3, 3),
        "branch3x3dbl_3": (96, 96, 3, 3),
    }  # fmt: skip


def block_c(n, c):
    return {
        "branch1x1": (n, 192, 1, 1), "branch7x7_1": (n, c, 1, 1), "branch7x7_2": (c, c, 1, 7),
        "branch7x7_3": (c, 192, 7, 1), "branch7x7dbl_1": (n, c, 1, 1), "branch7x7dbl_2": (c, c, 7, 1),
        "branch7x7dbl_3": (c, c, 1, 7), "branch7x7dbl_4": (c, c, 7, 1), "branch7x7dbl_5": (c, 192, 1, 7),
        "branch_pool": (n, 192, 1, 1),
    }  # fmt: skip


def block_d(n):
    return {
        "branch3x3_1": (n, 192, 1, 1), "branch3x3_2": (192, 320, 3, 3), "branch7x7x3_1": (n, 192, 1, 1),
        "branch7x7x3_2": (192, 192, 1, 7), "branch7x7x3_3": (192, 192, 7, 1), "branch7x7x3_4": (192, 192, 3, 3),
    }  # fmt: skip


def block_e(n):
    return {
        "branch1x1": (n, 320, 1, 1), "branch3x3_1": (n, 384, 1, 1), "branch3x3_2a": (384, 384, 1, 3),
        "branch3x3_2b": (384, 384, 3, 1), "branch3x3dbl_1": (n, 448, 1, 1), "branch3x3dbl_2": (448, 384, 3, 3),
        "branch3x3dbl_3a": (384, 384, 1, 3), "branch3x3dbl_3b": (384, 384, 3, 1), "branch_pool": (n, 192, 1, 1),
    }  # fmt: skip


BLOCKS = {
    "Mixed_5b": block_a(192, 32), "Mixed_5c": block_a(256, 64), "Mixed_5d": block_a(288, 64), "Mixed_6a": block_b(288),
    "Mixed_6b": block_c(768, 128), "Mixed_6c": block_c(768, 160), "Mixed_6d": block_c(768, 160),
    "Mixed_6e": block_c(768, 192), "Mixed_7a": block_d(768), "Mixed_7b": block_e(1280), "Mixed_7c": block_e(2048),
}  # fmt: skip

# branches of each block; convolutions with stride 2 and no padding end in /2; the ends of a fork are concatenated
BRANCHES = {
    "a": ["branch1x1", "branch5x5_1 branch5x5_2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3", "avg branch_pool"],
    "b": ["branch3x3/2", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3/2", "max/2"],
    "c": ["branch1x1", "branch7x7_1 branch7x7_2 branch7x7_3",
          "branch7x7dbl_1 branch7x7dbl_2 branch7x7dbl_3 branch7x7dbl_4 branch7x7dbl_5", "avg branch_pool"],
    "d": ["branch3x3_1 branch3x3_2/2", "branch7x7x3_1 branch7x7x3_2 branch7x7x3_3 branch7x7x3_4/2", "max/2"],
    "e": ["branch1x1", "branch3x3_1 branch3x3_2a", "branch3x3_1 branch3x3_2b",
          "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3b",
          "avg branch_pool"],
    "e, the last": ["branch1x1", "branch3x3_1 branch3x3_2a", "branch3x3_1 branch3x3_2b",
                    "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3a", "branch3x3dbl_1 branch3x3dbl_2 branch3x3dbl_3b",
                    "max branch_pool"],
}  # fmt: skip


def shapes():
    """Names and shapes of all parameters and buffers of the published file."""
    convolutions = STEM | {f"{b}.{name}": shape for b, table in BLOCKS.items() for name, shape in table.items()}
    found = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for name, (inputs, outputs, height, width) in convolutions.items():
        found[f"{name}.conv.weight"] = (outputs, inputs, height, width)
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.bn.{part}"] = (outputs,)
        found[f"{name}.bn.num_batches_tracked"] = ()
    return found


def random_weights(wanted, seed=0):
    """Random values of typical size for these names and shapes, in the order of names."""
    g = torch.Generator().manual_seed(seed)
    weights = {}
    for name in sorted(wanted):
        shape = tuple(wanted[name])
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)
        elif len(shape) == 4:
            weights[name] = torch.randn(shape, generator=g) * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        elif name == "fc.weight":
            weights[name] = torch.randn(shape, generator=g) * 0.05
        elif name.endswith(("bn.weight", "running_var")):
            weights[name] = torch.rand(shape, generator=g) + 0.5
        else:
            weights[name] = torch.randn(shape, generator=g) * 0.1
    return weights


def resize(image, side):
    """TensorFlow 1's bilinear resize with align_corners False: (H, W) -> (side, side), one pixel at a time."""
    height, width = image.shape
    out = np.zeros((side, side))
    for i in range(side):
        for j in range(side):
            y, x = i * height / side, j * width / side
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            a = image[top, left] * (1 - (x - left)) + image[top, right] * (x - left)
            b = image[bottom, left] * (1 - (x - left)) + image[bottom, right] * (x - left)
            out[i, j] = a * (1 - (y - top)) + b * (y - top)
    return out


def windows(x, height, width, stride, pad):
    """(C, H, W) -> the existing pixels under each window: yields (i, j, (C, at most height * width))."""
    rows, columns = x.shape[1] + 2 * pad[0] - height + 1, x.shape[2] + 2 * pad[1] - width + 1
    for i in range(0, rows, stride):
        for j in range(0, columns, stride):
            top, left = i - pad[0], j - pad[1]
            inside = x[:, max(top, 0) : top + height, max(left, 0) : left + width]
            yield i // stride, j // stride, inside.reshape(len(x), -1)


def pool(x, kind, stride):
    pad = (1, 1) if stride == 1 else (0, 0)
    found = {(i, j): (w.mean(1) if kind == "avg" else w.max(1)) for i, j, w in windows(x, 3, 3, stride, pad)}
    side = max(i for i, _ in found) + 1, max(j for _, j in found) + 1
    return np.stack([[found[i, j] for j in range(side[1])] for i in range(side[0])]).transpose(2, 0, 1)


def convolution(x, weights, name, stride):
    """Convolution without bias, batch normalisation with eps 0.001, ReLU; stride 1 keeps the size."""
    kernel = weights[f"{name}.conv.weight"].double().numpy()
    height, width = kernel.shape[2:]
    pad = (height // 2, width // 2) if stride == 1 else (0, 0)
    x = np.pad(x, ((0, 0), (pad[0], pad[0]), (pad[1], pad[1])))
    flat = kernel.reshape(len(kernel), -1)
    found = {(i, j): flat @ w.reshape(-1) for i, j, w in windows(x, height, width, stride, (0, 0))}
    side = max(i for i, _ in found) + 1, max(j for _, j in found) + 1
    y = np.stack([[found[i, j] for j in range(side[1])] for i in range(side[0])]).transpose(2, 0, 1)
    gain, bias, mean, var = (
        weights[f"{name}.bn.{part}"].double().numpy()[:, None, None]
        for part in ("weight", "bias", "running_mean", "running_var")
    )
    return np.maximum((y - mean) / np.sqrt(var + 0.001) * gain + bias, 0)


def block(kind, x, weights):
    """One image (C, H, W) through a block."""
    ends = []
    for branch in BRANCHES[kind]:
        y = x
        for part in branch.split():
            name, _, stride = part.partition("/")
            stride = int(stride or 1)
            y = pool(y, name, stride) if name in ("avg", "max") else convolution(y, weights, name, stride)
        ends.append(y)
    return np.concatenate(ends)
