"""Train one of the two small packaged networks on one CPU core.

    python tools/train_tiny.py target --data cifar10-train.zip --test cifar10-test.zip --minutes 46 \
        --pooled 1 --across 0
    python tools/train_tiny.py target --data cifar10-train.zip --test cifar10-test.zip --minutes 42 --rate 1e-3 \
        --start src/repa/encoders/weights/tiny.safetensors --state build/tiny-2.pt
    python tools/train_tiny.py classifier --data cifar10-train.zip --test cifar10-test.zip --minutes 12

`target` (the encoder `tiny`) is trained without labels: two augmented views of an image must agree, pooled and token by
token. Its second command continues from the weights of the first and puts more weight on single tokens. `classifier`
(`tiny-classifier`) is trained on the labels.

The same command resumes from --state, and a kill loses at most two minutes. Learning rate and image size follow the
processor time, so that other programs only make the training take longer. --out is usable from the first checkpoint on.
"""

import argparse
import functools
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from evaluate_tiny import pooled_features, probe, read_images, to_input
from repa.base import files
from repa.base.device import autocast
from repa.encoders import load_encoder
from repa.encoders.packaged import SHAPES, ConvNet

NAMES = {"target": "tiny", "classifier": "tiny-classifier"}
OBJECTIVES = {
    "target": "self-supervised: two views agree token by token, within and across images, and in pooled features",
    "classifier": "supervised: cross-entropy on the ten labels, label smoothing 0.1",
}
PRINT_SECONDS, CHECKPOINT_SECONDS = 15, 120
BATCH = 256
SIDES, SHARES = (24, 32, 40), (0.5, 0.4, 0.1)  # sides of a batch's views in pixels, and how often each is drawn


# -------------------- augmentation of a whole batch


def random_boxes(n: int, smallest: float) -> Tensor:
    """(N, 2, 3) affine maps from view to image coordinates, in [-1, 1]: random crop, aspect ratio and flip."""
    area = torch.empty(n).uniform_(smallest, 1)
    ratio = torch.empty(n).uniform_(math.log(3 / 4), math.log(4 / 3)).exp()
    half = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)  # (N, 2) x, y
    centre = (1 - half) * torch.empty(n, 2).uniform_(-1, 1)
    flip = torch.stack([torch.randint(2, (n,)) * 2 - 1, torch.ones(n)], 1)
    return torch.cat([torch.diag_embed(half * flip), centre[:, :, None]], 2)


def crop(images: Tensor, boxes: Tensor, side: int) -> Tensor:
    """uint8 (N, 3, H, W) -> (N, 3, side, side) in [-1, 1]."""
    grid = F.affine_grid(boxes, [len(boxes), 3, side, side], align_corners=False)
    return F.grid_sample(to_input(images), grid, padding_mode="reflection", align_corners=False)


def jitter(images: Tensor, strength: float, grey: float) -> Tensor:
    """Vary brightness, contrast, saturation, hue and grey by one random affine map of the colours per image."""
    n = len(images)
    applied = (torch.rand(n) < 0.8).float() * strength
    brightness, contrast, saturation = (1 + torch.empty(3, n).uniform_(-1, 1) * applied).unbind()
    saturation = torch.where(torch.rand(n) < grey, 0.0, saturation)
    angle = torch.empty(n).uniform_(-1, 1) * applied * math.pi / 2
    axis = torch.full((3, 3), 1 / 3)  # projects colours onto grey
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    chroma = torch.cos(angle)[:, None, None] * (torch.eye(3) - axis) + torch.sin(angle)[:, None, None] * cross
    colour = (brightness * contrast)[:, None, None] * (axis + saturation[:, None, None] * chroma)  # (N, 3, 3)
    level = (1 - contrast) * brightness * images.mean((1, 2, 3)) + brightness - 1
    return (torch.einsum("nij,njhw->nihw", colour, images) + level[:, None, None, None]).clamp(-1, 1)


# -------------------- objectives


class Target(nn.Module):
    """Two views must agree token by token and in pooled features (SimCLR with the loss of arXiv 2110.06848).

    `pooled` and `across` are the weights of pooled features and of tokens compared across images.
    """

    peak, decay = 2e-3, 0.02

    def __init__(self, net: ConvNet, dim: int, pooled: float, across: float):
        super().__init__()
        self.net, self.weights = net, (pooled, across)
        self.pooled = nn.Sequential(nn.Linear(dim, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 128))
        self.dense = nn.Sequential(nn.Linear(dim, 192), nn.ReLU(), nn.Linear(192, 64))

    def forward(self, images: Tensor, labels: Tensor, side: int) -> Tensor:
        boxes = [random_boxes(len(images), 0.2) for _ in range(2)]
        views = [jitter(crop(images, box, side), strength=0.4, grey=0.2) for box in boxes]
        tokens = self.net(torch.cat(views).contiguous(memory_format=torch.channels_last))  # (2N, T, D)
        pooled = F.normalize(self.pooled(tokens.mean(1)).float(), dim=1)
        dense = F.normalize(self.dense(tokens).float(), dim=2)
        first, second = dense.chunk(2)
        here, there, seen = places(first, second, boxes[0], boxes[1])
        weight, across = self.weights
        loss = weight * agree(pooled, 0.1) + 0.4 * agree_by_place(here, there, seen, 0.2)
        return loss + across * agree_across(here, there, seen, 0.1) if across else loss


def agree(z: Tensor, temperature: float) -> Tensor:
    """Decoupled NT-Xent: rows n and n + N of z (2N, d) are one image, and the denominator excludes this pair."""
    half = len(z) // 2
    logits = z @ z.T / temperature
    positive = (z[:half] * z[half:]).sum(1) / temperature
    own = torch.eye(half, dtype=torch.bool).repeat(2, 2)
    return logits.masked_fill(own, -torch.inf).logsumexp(1).mean() - positive.mean()


def places(a: Tensor, b: Tensor, box_a: Tensor, box_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of view a (N, T, d), of view b at the same image positions (N, T, d), and which of them b sees (N, T)."""
    n, t, d = a.shape
    side = int(t**0.5)
    place = F.affine_grid(box_a, [n, d, side, side], align_corners=False)  # (N, side, side, 2), image coordinates
    place = (place - box_b[:, None, None, :, 2]) / torch.diagonal(box_b[:, :, :2], dim1=1, dim2=2)[:, None, None]
    there = F.grid_sample(
        b.transpose(1, 2).reshape(n, d, side, side), place, padding_mode="border", align_corners=False
    )
    there = F.normalize(there.flatten(2), dim=1).transpose(1, 2)  # (N, T, d)
    return a, there, (place.abs() <= 1).all(-1).flatten(1)


def agree_by_place(here: Tensor, there: Tensor, seen: Tensor, temperature: float) -> Tensor:
    """Within an image, a token should match the other view at its position rather than at other positions.

    Neighbours are not negatives, because they see many of the same pixels and should stay similar.
    """
    n, t, _ = here.shape
    side = int(t**0.5)
    row, column = torch.arange(t) // side, torch.arange(t) % side
    near = ((row[:, None] - row).abs() <= 1) & ((column[:, None] - column).abs() <= 1)
    negative = seen[:, None, :] & ~(near & ~torch.eye(t, dtype=torch.bool))
    logits = (torch.bmm(here, there.transpose(1, 2)) / temperature).masked_fill(~negative, -1e4)
    return F.cross_entropy(logits[seen], torch.arange(t).expand(n, t)[seen])


def agree_across(here: Tensor, there: Tensor, seen: Tensor, temperature: float, num_places: int = 8) -> Tensor:
    """A token should match the other view at its position rather than tokens of other images (arXiv 2011.09157).

    `num_places` positions that both views see are drawn per image; the k-th tokens of all images are compared.
    """
    here, there, seen = (x[seen.any(1)] for x in (here, there, seen))
    places = torch.multinomial(seen.float(), num_places, replacement=True)  # (N, K)
    here, there = (torch.take_along_dim(x, places[..., None], 1).transpose(0, 1) for x in (here, there))  # (K, N, d)
    logits = here @ there.transpose(1, 2) / temperature  # (K, N, N)
    own = torch.arange(logits.shape[1]).expand(num_places, -1)
    return 0.5 * (F.cross_entropy(logits.transpose(1, 2), own) + F.cross_entropy(logits, own))


class Classifier(nn.Module):
    """A linear classifier of ten classes on the pooled feature."""

    peak, decay = 4e-3, 0.05

    def __init__(self, net: ConvNet, dim: int):
        super().__init__()
        self.net, self.classifier = net, nn.Linear(dim, 10)

    def forward(self, images: Tensor, labels: Tensor, side: int) -> Tensor:
        view = jitter(crop(images, random_boxes(len(images), 0.5), side), strength=0.2, grey=0.0)
        tokens = self.net(view.contiguous(memory_format=torch.channels_last))
        return F.cross_entropy(self.classifier(tokens.mean(1)).float(), labels, label_smoothing=0.1)


# -------------------- training


def add_norm(module: nn.Module) -> None:
    """Add batch normalisation after every convolution and drop its bias; each block starts as the identity."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Conv2d):
            settings = child.in_channels, child.out_channels, child.kernel_size, child.stride, child.padding
            norm = nn.BatchNorm2d(child.out_channels)
            if name == "conv2":
                nn.init.zeros_(norm.weight)
            setattr(module, name, nn.Sequential(nn.Conv2d(*settings, bias=False), norm))  # type: ignore[arg-type]  # its own sizes
        else:
            add_norm(child)


@torch.no_grad()
def unfold(net: ConvNet, shipped: ConvNet, images: Tensor) -> None:
    """Load shipped weights into a network with normalisation, so that it computes the same in eval mode.

    Each normalisation takes its statistics from the images, with a scale and shift that undo them.
    """
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    sources = [m for m in shipped.modules() if isinstance(m, nn.Conv2d)]

    def adopt(norm: nn.BatchNorm2d, bias: Tensor, output: Tensor) -> None:
        variance, mean = torch.var_mean(output, (0, 2, 3))
        state = {"running_mean": mean, "running_var": variance, "bias": mean + bias}
        norm.load_state_dict(state | {"weight": (variance + norm.eps).sqrt()}, strict=False)

    hooks = []
    for conv, norm, source in zip(convolutions, norms, sources, strict=True):
        assert source.bias is not None
        conv.weight.copy_(source.weight)
        bound = functools.partial(adopt, norm, source.bias)
        hooks.append(conv.register_forward_hook(lambda _, inputs, output, bound=bound: bound(output)))
    net.eval()(images)
    net.train()
    for hook in hooks:
        hook.remove()


def folded(net: ConvNet, name: str) -> ConvNet:
    """The network to ship: normalisation folded into the convolutions, weights rounded to fp16."""
    shipped = ConvNet(SHAPES[name]).eval()
    convolutions = [m for m in shipped.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    trained = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    for ours, conv, norm in zip(convolutions, trained, norms, strict=True):
        fused = fuse_conv_bn_eval(conv.eval(), norm.eval())
        ours.load_state_dict({key: value.half().float() for key, value in fused.state_dict().items()})
    net.train()
    return shipped


def ship(net: ConvNet, path: Path, facts: dict) -> None:
    tensors = {key: value.half().contiguous() for key, value in net.state_dict().items()}
    files.write_bytes(path, save(tensors, metadata={key: str(value) for key, value in facts.items()}))


def batches(images: Tensor, labels: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    order = torch.Generator().manual_seed(seed)
    while True:
        for rows in torch.randperm(len(images), generator=order).split(BATCH):
            if len(rows) == BATCH:
                yield images[rows], labels[rows]


class Training:
    """One model, its optimiser and its processor time, including the time before a restart."""

    def __init__(self, which: str, args: argparse.Namespace, images: Tensor):
        state, seed = args.state, args.seed
        self.name, self.state, self.seconds, self.seen = NAMES[which], state, 0.0, 0
        net = ConvNet(SHAPES[self.name])
        add_norm(net)
        if args.start and not state.exists():
            shipped = load_encoder(self.name, weights=args.start).net
            assert isinstance(shipped, ConvNet)
            unfold(net, shipped, to_input(images[:2000]))
        dim = SHAPES[self.name].dim
        model = Target(net, dim, args.pooled, args.across) if which == "target" else Classifier(net, dim)
        self.peak = args.rate or model.peak
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's types
        self.optimizer = torch.optim.AdamW(model.parameters(), weight_decay=model.decay, betas=(0.9, 0.98))
        if state.exists():
            saved = torch.load(state, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.seconds, self.seen = saved["seconds"], saved["seen"]
        self.start = time.process_time() - self.seconds
        torch.manual_seed(seed + self.seen)

    def step(self, images: Tensor, labels: Tensor, progress: float) -> float:
        rate = min(1, progress / 0.04 + 0.01) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * rate
        side = SIDES[torch.multinomial(torch.tensor(SHARES), 1)]
        with autocast(torch.device("cpu"), "auto"):
            loss = self.model(images, labels, side)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.seen += len(images)
        self.seconds = time.process_time() - self.start
        return loss.item()

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        with files.atomic_path(self.state) as path:
            torch.save(state | {"seconds": self.seconds, "seen": self.seen}, path)


def fit(training: Training, images: Tensor, labels: Tensor, args: argparse.Namespace) -> dict:
    """Train for `minutes` of processor time; returns the metadata for the weight file."""
    budget, losses, printed, saved = 60 * args.minutes, [], (training.seconds, training.seen), training.seconds
    facts: dict[str, str | float] = {"name": training.name, "objective": OBJECTIVES[args.which]}
    facts["data"] = "CIFAR-10 train, 50000 images (JPEG)"
    if args.start:
        facts["start"] = args.start_facts
    if args.which == "target":
        facts |= {"pooled": args.pooled, "across": args.across, "rate": training.peak}
    facts |= {"seed": args.seed, "torch": torch.__version__, "minutes": args.minutes, "batch": BATCH}
    for batch in batches(images, labels, args.seed + training.seen):
        losses.append(training.step(*batch, min(1, training.seconds / budget)))
        facts["epochs"] = f"{training.seen / len(images):.1f}"
        left = budget - training.seconds
        if left <= 0 or training.seconds - printed[0] > PRINT_SECONDS:
            speed = (training.seen - printed[1]) / (training.seconds - printed[0])
            progress = f"{training.name} epoch {facts['epochs']} loss {sum(losses) / len(losses):.4f}"
            print(f"{progress} {speed:.0f} images/s, {left / 60:.1f} min left", flush=True)
            losses, printed = [], (training.seconds, training.seen)
        if left <= 0 or training.seconds - saved > CHECKPOINT_SECONDS:
            training.save()
            ship(folded(training.model.net, training.name), args.out, facts)
            saved = training.seconds
        if left <= 0:
            break
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=NAMES)
    parser.add_argument("--data", type=Path, required=True, help="zip of training images")
    parser.add_argument("--test", type=Path, required=True, help="zip of test images")
    parser.add_argument("--minutes", type=float, required=True, help="budget of processor time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=Path, help="weights to start from, with a new schedule")
    parser.add_argument("--rate", type=float, help="peak learning rate")
    parser.add_argument("--pooled", type=float, default=0.3, help="target: weight of pooled features")
    parser.add_argument("--across", type=float, default=1.0, help="target: weight of tokens compared across images")
    parser.add_argument("--out", type=Path, help="weight file; default: the packaged one")
    parser.add_argument("--state", type=Path, help="checkpoint; default: build/<name>.pt")
    args = parser.parse_args()
    name = NAMES[args.which]
    weights = Path(__file__).parents[1] / "src/repa/encoders/weights"
    args.out, args.state = args.out or weights / f"{name}.safetensors", args.state or Path(f"build/{name}.pt")

    if args.start:
        with safe_open(args.start, "pt") as opened:
            args.start_facts = str(opened.metadata())

    torch.set_num_threads(1)
    train, test = read_images(args.data), read_images(args.test)
    torch.manual_seed(args.seed)
    training = Training(args.which, args, train[0])
    facts = fit(training, *train, args)
    net = folded(training.model.net, name)
    facts["linear_probe"] = f"{probe(net, train, test):.4f}"
    if args.which == "classifier":
        correct = training.model.classifier(pooled_features(net, test[0])).argmax(1) == test[1]
        facts["test_accuracy"] = f"{correct.float().mean():.4f}"
    ship(net, args.out, facts)
    print("finished", facts, f"{args.out.stat().st_size} bytes in {args.out}", flush=True)


if __name__ == "__main__":
    main()
