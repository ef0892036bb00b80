"""Cost of a training step and of a run: estimated from shapes, measured on this machine, with advice on what to change."""

# Devices that `repa estimate` knows.
PEAKS = {  # TFLOP/s of dense bf16 products, from the makers' data sheets
    "a100": 312.0,  # NVIDIA A100 Tensor Core GPU data sheet
    "h100": 989.4,  # NVIDIA H100 data sheet, SXM; printed there with sparsity, which doubles it
    "h200": 989.4,  # NVIDIA H200 data sheet, SXM; the same
    "b200": 2250.0,  # NVIDIA Blackwell architecture brief, HGX B200, per GPU; the same
    "l40s": 362.05,  # NVIDIA L40S data sheet
    "rtx4090": 165.2,  # NVIDIA Ada architecture white paper, accumulating in float32
    "mi300x": 1307.4,  # AMD Instinct MI300X data sheet
}
MEMORY = {
    "a100": 80,
    "h100": 80,
    "h200": 141,
    "b200": 180,
    "l40s": 48,
    "rtx4090": 24,
    "mi300x": 192,
}  # GB, from the same sheets
