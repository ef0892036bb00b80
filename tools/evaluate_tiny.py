"""Evaluate the packaged encoders: a linear probe on CIFAR-10, and the spatial structure of their tokens.

    python tools/evaluate_tiny.py tiny --data cifar10-train.zip --test cifar10-test.zip [--weights FILE]

Prints both figures for the trained network and for the same network with random weights. The zips contain
`<class>/<number>.jpg`, 32 x 32 pixels.
"""

import argparse
import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from repa.analysis import linear_probes, local_distance_similarity
from repa.encoders import load_encoder
from repa.encoders.packaged import SHAPES, ConvNet

Labelled = tuple[Tensor, Tensor]


def read_images(path: Path) -> Labelled:
    """Images uint8 (N, 3, 32, 32) and labels (N,), classes in alphabetical order."""
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
        pixels = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names]
    classes = sorted({name.split("/")[-2] for name in names})
    labels = torch.tensor([classes.index(name.split("/")[-2]) for name in names])
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), labels


def to_input(images: Tensor) -> Tensor:
    """uint8 -> [-1, 1], in the memory layout that is fastest for convolutions."""
    return (images.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def pooled_features(net: nn.Module, images: Tensor) -> Tensor:
    """The mean token of each image (N, D)."""
    return torch.cat([net(to_input(batch)).mean(1) for batch in images.split(500)])


def probe(net: nn.Module, train: Labelled, test: Labelled) -> float:
    """Test accuracy of a linear classifier on frozen pooled features, trained to convergence."""
    features = [pooled_features(net, images) for images, _ in (train, test)]
    return linear_probes(features[0], train[1], features[1], test[1], epochs=30, batch_size=500)[0].top1


@torch.no_grad()
def spatial_structure(net: nn.Module, images: Tensor) -> float:
    """LDS averaged over the images, at its authors' distance of 6 tokens (arXiv 2512.10794)."""
    return float(local_distance_similarity(net(to_input(images))).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("--data", type=Path, required=True, help="zip of training images")
    parser.add_argument("--test", type=Path, required=True, help="zip of test images")
    parser.add_argument("--weights", type=Path, help="weight file; default: the packaged one")
    args = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(0)
    train, test = read_images(args.data), read_images(args.test)
    trained = load_encoder(args.name, weights=args.weights).net
    for title, net in (("trained", trained), ("random weights", ConvNet(SHAPES[args.name]))):
        accuracy, structure = probe(net, train, test), spatial_structure(net, test[0][:2000])
        print(f"{args.name}, {title}: linear probe {accuracy:.4f}, LDS {structure:.3f}", flush=True)


if __name__ == "__main__":
    main()
