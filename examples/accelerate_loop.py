"""Alignment with `accelerate`: one process or several, cached encoder features, and resuming.

    python examples/accelerate_loop.py OUT
    torchrun --nproc-per-node 2 examples/accelerate_loop.py OUT

Running the same command again continues the training.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from diffusers import DiTTransformer2DModel
from torch.utils.data import DataLoader, Dataset

import repa
from repa.base.images import to_tensor
from repa.data import FeatureCache, open_source


class Photographs(Dataset):
    """Pairs of an image's number and the uint8 image; the numbers are the keys of the feature cache."""

    def __init__(self, num: int):
        self.source = open_source(f"photographs:num={num}")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, number: int) -> tuple[int, torch.Tensor]:
        return number, to_tensor(self.source.image(number, 16))


def main(out: str | Path, num_epochs: int = 2) -> list[float]:
    """The loss of every step."""
    out = Path(out)
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=16, in_channels=3, num_layers=4, sample_size=16, patch_size=2,
        num_embeds_ada_norm=1000,
    )  # fmt: skip
    encoder = repa.load_encoder("tiny", device=accelerator.device)
    aligner = repa.attach(
        network, "transformer_blocks.1", features=encoder.dim, loss="cosine", schedule="linear:steps=40"
    )
    optimizer = torch.optim.AdamW([*network.parameters(), *aligner.parameters()], lr=1e-3)
    loader = DataLoader(Photographs(32), batch_size=8, shuffle=True)
    network, aligner, optimizer, loader = accelerator.prepare(network, aligner, optimizer, loader)
    cache = FeatureCache.open(out / "features", encoder)
    if (out / "state").is_dir():
        accelerator.load_state(out / "state")

    history = []
    for _ in range(num_epochs):
        for keys, images in loader:
            x = images / 127.5 - 1
            noise, t = torch.randn_like(x), torch.rand(len(x), device=x.device)
            x_t = x + t.view(-1, 1, 1, 1) * (noise - x)
            labels = torch.zeros(len(x), dtype=torch.long, device=x.device)
            prediction = network(x_t, timestep=(t * 1000).long(), class_labels=labels).sample[:, :3]
            features = cache.fill(
                keys.tolist(), lambda missing, images=images: encoder(images[missing], grid=8).patches
            )
            loss = (prediction - (noise - x)).square().mean() + aligner(features.to(x.device))
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            accelerator.unwrap_model(aligner).step()
            history.append(loss.item())
    accelerator.save_state(out / "state")
    return history


if __name__ == "__main__":
    for step, loss in enumerate(main(sys.argv[1]), start=1):
        if PartialState().is_main_process:  # its own part of each batch
            print(f"step {step:3d}  loss {loss:.3f}")
