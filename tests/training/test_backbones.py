import json

import pytest
import torch

from repa.base.errors import UserError
from repa.models import BACKBONES, DDT, Condition, JiT, MMDiT, ModelConfig, build
from repa.runs import load_run
from repa.runs.export import export_run
from repa.sampling import SampleConfig, generate

JIT = "jit:bottleneck=6,class_tokens=2,class_tokens_from=1"
COMPLETE = {"latent_size": 8, "latent_channels": 3, "num_classes": 3, "hidden_dim": 16, "depth": 2, "num_heads": 2}


def not_a_network(config):
    return torch.nn.Linear(1, 1)


def test_backbones_have_the_sizes_of_the_configuration():
    assert BACKBONES.names() == ["ddt", "dit", "hooked", "jit", "mmdit"]
    network = build(ModelConfig(backbone=JIT, patch_size=4, **COMPLETE))
    assert isinstance(network, JiT)
    assert (network.grid, network.hidden_dim, network.class_tokens_from) == ((2, 2), 16, 1)
    network = build(ModelConfig(backbone="mmdit", text_shape=(3, 5), **COMPLETE))
    assert isinstance(network, MMDiT)
    assert network.null(Condition(torch.zeros(2, dtype=torch.int64))).text.shape == (2, 3, 5)
    assert build(ModelConfig(patch_size=8, **COMPLETE)).grid == (1, 1)


def test_invalid_backbones_are_refused():
    with pytest.raises(UserError, match="hooked"):
        ModelConfig().override(backbone="unet")
    with pytest.raises(UserError, match="heads"):
        build(ModelConfig(backbone=JIT, patch_size=4, heads=(1,), **COMPLETE))
    with pytest.raises(UserError, match="Linear"):
        build(ModelConfig(backbone=f"{__name__}.not_a_network", **COMPLETE))


def test_jit_trains_and_can_be_loaded(run_training, tiny_config, tmp_path):
    config = tiny_config.override(
        num_steps=3,
        save_every=3,
        model=tiny_config.model.override(backbone=JIT, num_heads=4),
        diffusion=tiny_config.diffusion.override(prediction="data", loss_weight="velocity"),
    )
    run_training(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 3
    assert all(0 < loss < 100 for loss in losses)
    model = load_run(tmp_path / "run").model
    assert isinstance(model, JiT)
    assert model.final_layer.linear.weight.any()  # zero before training
    with pytest.raises(UserError, match="jit"):
        export_run(tmp_path / "run", tmp_path / "out")


RAE = "ddt:head_depth=1,head_dim=24,head_heads=3,positions=true,times=fourier,silu_twice=true"


def test_ddt_trains_and_samples_and_unsupported_uses_are_refused(run_training, tiny_config, tmp_path):
    blocks = {"norm": "rms", "mlp": "swiglu", "qk_norm": "rms", "rotary": True, "heads": (1,)}
    model = tiny_config.model.override(backbone=RAE, depth=3, num_heads=2, **blocks)
    config = tiny_config.override(num_steps=3, save_every=3, model=model)
    run_training(config, tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert isinstance(run.model, DDT)
    assert run.model.final_layer.linear.weight.any()
    assert run.model.heads["1"].linear.weight.any()
    config = SampleConfig(sampler="heun", steps=3, guidance=("internal:head=1,scale=1.4", "cfg:scale=2"))
    assert generate(run, config, range(2)).images.float().std() > 0
    with pytest.raises(UserError, match="but .* has 'ddt"):
        export_run(tmp_path / "run", tmp_path / "out")
    with pytest.raises(UserError, match="a DiT, but the network is a DDT"):
        run_training(tiny_config.override(model=model, init=str(tmp_path / "run")), tmp_path / "second")
