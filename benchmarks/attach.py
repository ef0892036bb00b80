"""Measure what `repa.attach` costs in a training step, compared with the same term from the network's own tap.

    python benchmarks/attach.py --rounds 15

Three variants take turns on one DiT: no alignment; the term as the training loop computes it, from a tap that the
network returns; the term through an aligner. Prints medians and ratios of the process's CPU time for forward and
backward.
"""

import argparse
import time
from statistics import median

import torch

import repa
from repa.alignment import Alignment, AlignmentConfig
from repa.models import Condition, Tap, build_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="SiT-S/2")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = build_model(args.model, latent_size=32, latent_channels=4, num_classes=1000)
    config = AlignmentConfig(target="features", depth=4, projector="mlp:width=2048")
    own = Alignment(config, model.hidden_dim, 768, model.grid)
    other = build_model(args.model, latent_size=32, latent_channels=4, num_classes=1000)
    other.load_state_dict(model.state_dict())
    aligner = repa.attach(other, "blocks.3", features=768, loss="cosine", projector="mlp:width=2048")
    aligner.terms["blocks_3"].load_state_dict(own.state_dict())
    x, t = torch.randn(args.batch, 4, 32, 32), torch.rand(args.batch)
    condition, features = Condition(torch.randint(1000, (args.batch,))), torch.randn(args.batch, 256, 768)

    def none() -> torch.Tensor:
        return model({"x": x}, t, condition).prediction["x"].square().mean()

    def tap() -> torch.Tensor:
        output = model({"x": x}, t, condition, (Tap(4),))
        return output.prediction["x"].square().mean() + 0.5 * own.compare(output.taps[Tap(4)], features).mean()

    def attached() -> torch.Tensor:
        return other({"x": x}, t, condition).prediction["x"].square().mean() + aligner(features)

    ways = {"no alignment": none, "tap of the network": tap, "repa.attach": attached}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses = {}
    for number in range(args.rounds + 2):  # the first two rounds warm up
        for name, way in ways.items():
            start = time.process_time()
            loss = way()
            loss.backward()
            for module in (model, other, own, aligner):
                module.zero_grad()
            if number >= 2:
                seconds[name].append(time.process_time() - start)
            losses[name] = loss.item()
    middle = {name: median(values) for name, values in seconds.items()}
    for name, value in middle.items():
        ratio = value / middle["tap of the network"]
        print(f"{name:20s} {1000 * value:8.1f} ms   {ratio:.3f} of the tap's   loss {losses[name]:.7f}")


if __name__ == "__main__":
    main()
