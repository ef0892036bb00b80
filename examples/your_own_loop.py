"""Only the alignment loss (Eq. 8), in a training loop of your own: any network, one forward hook, plain PyTorch.

    python examples/your_own_loop.py

The network is a small convolutional denoiser on 32-pixel crops of the photographs inside the package.
"""

import torch
from torch import nn

from repa.alignment import Alignment, AlignmentConfig
from repa.base.images import to_tensor
from repa.data import open_source
from repa.encoders import load_encoder


def main(num_steps: int = 100) -> list[tuple[float, float]]:
    """(denoising loss, alignment loss) of every step."""
    torch.manual_seed(0)
    source = open_source("photographs:num=128")
    images = torch.stack([to_tensor(source.image(i, 32)) for i in range(len(source))])  # uint8 (128, 3, 32, 32)
    network = nn.Sequential(
        nn.Conv2d(4, 96, 4, stride=4), nn.GELU(), nn.Conv2d(96, 96, 3, padding=1), nn.GELU(),
        nn.Conv2d(96, 96, 3, padding=1), nn.GELU(), nn.ConvTranspose2d(96, 3, 4, stride=4),
    )  # fmt: skip

    encoder = load_encoder("tiny")  # frozen; "dinov2-b" where its weights can be had
    config = AlignmentConfig(target="tiny", depth=1, weight=0.5, projector="mlp:width=256")
    alignment = Alignment(config, hidden_dim=96, feature_dim=encoder.dim)
    hidden = []  # what the hook catches: (N, D, 8, 8) as tokens (N, 64, D), row-major
    network[2].register_forward_hook(lambda module, args, output: hidden.append(output.flatten(2).transpose(1, 2)))
    optimizer = torch.optim.AdamW([*network.parameters(), *alignment.parameters()], lr=1e-3)

    history = []
    for step in range(num_steps):
        batch = images[torch.randint(len(images), (16,))]
        x = batch / 127.5 - 1
        noise, t = torch.randn_like(x), torch.rand(len(x), 1, 1, 1)  # t = 0 is data, t = 1 is noise
        x_t = (1 - t) * x + t * noise
        prediction = network(torch.cat([x_t, t.expand(-1, 1, 32, 32)], dim=1))
        denoising = (prediction - (noise - x)).square().mean()
        aligned = alignment.compare(hidden.pop(), encoder(batch, grid=8).patches).mean()  # (N,) -> mean
        (denoising + alignment.weight(step) * aligned).backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append((denoising.item(), aligned.item()))
    return history


if __name__ == "__main__":
    for step, (denoising, aligned) in enumerate(main()):
        if step % 20 == 19:
            print(f"step {step + 1:4d}  denoising {denoising:.3f}  alignment {aligned:+.3f}")
