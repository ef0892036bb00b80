"""Train a LoRA of a diffusers network with alignment: peft's weights are trained, and the network is frozen.

    python examples/diffusers_lora.py [OUT]

The network is a small random U-Net of SD 1.5's structure on pixels of photographs, so that the example runs anywhere in
seconds. For real training use `UNet2DConditionModel.from_pretrained(...)`, latents and "dinov2-b". The LoRA is written
to OUT in the format of diffusers.
"""

import sys
from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

import repa
from repa.base.images import to_tensor
from repa.data import open_source


def main(num_steps: int = 30, out: str | Path | None = None) -> list[tuple[float, float]]:
    """(denoising loss, alignment loss) of every step."""
    torch.manual_seed(0)
    source = open_source("photographs:num=32")
    images = torch.stack([to_tensor(source.image(i, 16)) for i in range(len(source))])
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=3, out_channels=3, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    scheduler, empty_text = DDPMScheduler(), torch.zeros(4, 4, 16)

    unet.requires_grad_(False)
    unet.add_adapter(
        LoraConfig(
            r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"], init_lora_weights="gaussian"
        )
    )
    encoder = repa.load_encoder("tiny")
    # The default loss compares relations between tokens, so there is no projector to train or save.
    aligner = repa.attach(unet, "mid_block")
    lora = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(lora, lr=3e-3)

    history = []
    for _ in range(num_steps):
        batch = images[torch.randint(len(images), (4,))]
        x = batch / 127.5 - 1
        noise, timesteps = torch.randn_like(x), torch.randint(1000, (len(x),))
        prediction = unet(scheduler.add_noise(x, noise, timesteps), timesteps, empty_text).sample
        denoising = (prediction - noise).square().mean()
        loss = denoising + aligner.loss(encoder(batch, grid=8))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        aligner.step()
        history.append((denoising.item(), aligner.values["mid_block"].item()))
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        save_file(get_peft_model_state_dict(unet), Path(out) / "pytorch_lora_weights.safetensors")
    return history


if __name__ == "__main__":
    for step, (denoising, aligned) in enumerate(main(out=sys.argv[1] if len(sys.argv) > 1 else None)):
        if step % 10 == 9:
            print(f"step {step + 1:4d}  denoising {denoising:.3f}  relations {aligned:.4f}")
