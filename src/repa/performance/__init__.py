"""Cost of a training step and of a run: estimated from shapes, measured on this machine, with advice on what to change."""

# Devices that `repa estimate` knows: TFLOP/s of dense bf16 products, and GB of memory, from the makers' data sheets.
DEVICES = {
    "a100": (312.0, 80),  # NVIDIA A100 Tensor Core GPU data sheet
    "h100": (989.4, 80),  # NVIDIA H100 data sheet, SXM; the rate is printed there with sparsity, which doubles it
    "h200": (989.4, 141),  # NVIDIA H200 data sheet, SXM; the same
    "b200": (2250.0, 180),  # NVIDIA Blackwell architecture brief, HGX B200, per GPU; the same
    "l40s": (362.05, 48),  # NVIDIA L40S data sheet
    "rtx4090": (165.2, 24),  # NVIDIA Ada architecture white paper, accumulating in float32
    "mi300x": (1307.4, 192),  # AMD Instinct MI300X data sheet
}
