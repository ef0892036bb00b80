"""Alignment in your own training loop: any network, plain PyTorch; only the lines marked with + are needed.

    python examples/your_own_loop.py

The network is a small convolutional denoiser on 32-pixel crops of the packaged photographs. It is trained from scratch,
so it uses REPA's original loss. For a pretrained network `repa.attach(net, block)` is enough (docs/own-network.md).
"""

import torch
from torch import nn

import repa  # +
from repa.base.images import to_tensor
from repa.data import open_source


def main(num_steps: int = 100) -> list[tuple[float, float]]:
    """(denoising loss, alignment loss) of every step."""
    torch.manual_seed(0)
    source = open_source("photographs:num=128")
    images = torch.stack([to_tensor(source.image(i, 32)) for i in range(len(source))])  # uint8 (128, 3, 32, 32)
    network = nn.Sequential(
        nn.Conv2d(4, 96, 4, stride=4), nn.GELU(), nn.Conv2d(96, 96, 3, padding=1), nn.GELU(),
        nn.Conv2d(96, 96, 3, padding=1), nn.GELU(), nn.ConvTranspose2d(96, 3, 4, stride=4),
    )  # fmt: skip

    encoder = repa.load_encoder("tiny")  # + frozen; or "dinov2-b" from the hub
    projector = "mlp:width=256"  # +
    aligner = repa.attach(network, "2", features=encoder.dim, loss="cosine", projector=projector)  # +
    optimizer = torch.optim.AdamW([*network.parameters(), *aligner.parameters()], lr=1e-3)  # + its parameters

    history = []
    for _ in range(num_steps):
        batch = images[torch.randint(len(images), (16,))]
        x = batch / 127.5 - 1
        noise, t = torch.randn_like(x), torch.rand(len(x), 1, 1, 1)  # t = 0 is data, t = 1 is noise
        x_t = (1 - t) * x + t * noise
        prediction = network(torch.cat([x_t, t.expand(-1, 1, 32, 32)], dim=1))
        denoising = (prediction - (noise - x)).square().mean()
        loss = denoising + aligner.loss(encoder(batch, grid=8))  # +
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        aligner.step()  # +
        history.append((denoising.item(), aligner.values["2"].item()))
    return history


if __name__ == "__main__":
    for step, (denoising, aligned) in enumerate(main()):
        if step % 20 == 19:
            print(f"step {step + 1:4d}  denoising {denoising:.3f}  alignment {aligned:+.3f}")
