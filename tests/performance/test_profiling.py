"""Profiling: categories of kernel names, and time that is spent on purpose."""

import json
import time

import pytest
import torch

from repa.base import device
from repa.base.device import sustained_product_rate
from repa.models.config import ModelConfig
from repa.performance.counts import product_shapes
from repa.performance.profiling import (
    CATEGORIES,
    OTHER,
    category_of,
    device_state,
    profiled,
    shape_rates,
    summary,
    union,
)
from repa.training import TrainConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "category"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopB_TNT", "product"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "product"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm>", "product"),
        ("aten::addmm", "product"),
        ("void flash_fwd_kernel<Flash_fwd_kernel_traits<96, 128, 64>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob", "attention"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("aten::_fused_adamw_", "optimizer"),
        ("triton_poi_fused_gelu_3", "pointwise"),
        ("triton_red_fused_native_layer_norm_mul_5", "norm and sum"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::BUnaryFunctor>", "pointwise"),
        ("aten::copy_", "copy"),
        ("Memcpy HtoD (Pinned -> Device)", "copy"),
        ("aten::native_layer_norm", "norm and sum"),
        ("ncclDevKernel_AllGather_RING_LL", OTHER),
    ],
)
def test_kernel_names_are_assigned_to_categories(name, category):
    assert category_of(name) == category


def test_profiled_time_is_assigned_to_the_right_category(tmp_path):
    """One step of only matrix products, then one that mostly waits."""
    a = torch.randn(300, 300)
    trace = tmp_path / "trace.json.gz"
    found = profiled(lambda: [a @ a for _ in range(30)], CPU, trace=trace)
    assert set(found.categories) == {*CATEGORIES, OTHER}
    assert found.categories["product"] > 0.9 * sum(found.categories.values())
    assert found.longest[0]["name"] == "aten::mm"
    assert found.longest[0]["calls"] == 30
    assert trace.stat().st_size > 1000
    idle = profiled(lambda: (time.sleep(0.1), a + a), CPU)
    assert idle.busy < 0.3
    assert idle.seconds >= 0.1


def test_overlapping_spans_count_once():
    assert union([]) == 0
    assert union([(0, 2), (1, 3), (5, 6), (5.5, 5.7)]) == 4
    assert union([(5, 6), (0, 10)]) == 10


def test_the_products_of_a_block_add_up_to_its_work(monkeypatch):
    """Forward and both gradients have equal FLOPs, together 3 x 24 width^2 per token."""
    config = TrainConfig(
        model=ModelConfig(name="SiT-S/2", hidden_dim=32, num_heads=2, latent_size=8, latent_channels=4), batch_size=4,
        precision="fp32", accumulate=2,
    )  # fmt: skip
    shapes = product_shapes(config)
    assert len(shapes) == 12
    assert sum(2 * m * k * n for m, k, n in shapes.values()) == 3 * 24 * 32**2 * 2 * 16
    assert all(rate > 0 for rate in shape_rates(config, CPU, repeats=1).values())
    monkeypatch.setitem(device.PRODUCT_SIDE, "cpu", 64)
    assert sustained_product_rate("fp32", CPU, seconds=0.01) > 0


def test_a_machine_without_sensors_gives_an_empty_state():
    assert device_state(CPU) == {}


def test_the_summary_describes_the_row():
    profile = {"categories": {"product": 3.0, "copy": 1.0, "other": 0.0}, "launches": 1234.0, "busy": 0.5}
    row = {"profile": profile, "products_of_the_rate": {"qkv forward": 0.8, "qkv input": 0.6}}
    said = summary(json.loads(json.dumps(row)))
    assert "Kernels: product 75%, copy 25%; 1,234 per step; the device is busy 50%" in said
    assert "reach 70% of the rate" in said
