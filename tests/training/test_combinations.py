"""Every two settings of the engine can be combined or are refused; accumulation and compilation give the same result.

A new method is one line in SETTINGS; a pair that is refused is a line in REFUSED.
"""

import itertools

import pytest
import torch

from repa.base.errors import UserError
from repa.data import open_data
from repa.encoders.contract import Features
from repa.models import Condition, Hooked
from repa.runs import read_metrics
from repa.training import TrainConfig, train
from repa.training.inputs import encoder_needs
from repa.training.loop import backward
from repa.training.resolve import with_streams
from repa.training.state import build_state
from repa.training.update import update
from tests.training.processes import run_all

CPU, NUM, TOKENS, WIDTH = torch.device("cpu"), 4, 16, 12
MODEL = {
    "name": "SiT-S/2", "hidden_dim": 16, "depth": 4, "num_heads": 2, "latent_size": 8, "latent_channels": 3, "num_classes": 3,
}  # fmt: skip


def term(name: str, **settings) -> dict:
    return {"alignments": [{"target": "tiny", "depth": 2, "projector": "linear", "name": name, **settings}]}


SETTINGS: dict[str, dict] = {
    "repa": term("repa", projector="mlp:width=8"),
    "irepa": term("irepa", projector="conv", token_norm="zscore"),
    "attention": term(
        "attention", target="tiny:part=attention,layer=1", tap="attention", projector="none", loss="attention_ce"
    ),
    "reg": {**term("reg", target="tiny:part=all"), "streams": [{"source": "tiny"}]},
    "sra": term("sra", target="ema:depth=4,earlier=0.2", projector="mlp2", loss="smooth_l1"),
    "two times": {
        **term("self", target="ema:depth=4,earlier=0.2"), "diffusion": {"token_times": 0.25}, "model": {"separate_times": True}
    },
    "layersync": term("layersync", target="block:depth=4", projector="none"),
    "latent": term("latent", target="latent", loss="mse", times=[0.4, 0.7]),
    "dispersive": term("dispersive", target="none", projector="none", loss="dispersive"),
    "nt_xent": term("nt_xent", loss="nt_xent"),
    "shared": {
        "alignments": [
            *term("tokens", resample="target")["alignments"],
            *term("relations", loss="gram", resample="target", projector_of="tokens")["alignments"],
        ]
    },
    "adapter": term("adapter", projector="adapter:heads=2,class_tokens=2"),
    "pool": term("pool", pool=True, time_weight="cosine"),
    "measured": term("measured", measure_only=True, schedule="plateau"),
    "head": {"model": {"heads": [3]}},
    "contrastive": {"diffusion": {"contrastive": 0.1, "velocity_cosine": 0.5}},
    "data": {"diffusion": {"prediction": "data", "loss_weight": "velocity"}},
    "ddpm": {"diffusion": {"objective": "ddpm"}, "model": {"name": "DiT-S/2"}},
    "warmup": {"denoising_schedule": "warmup:steps=2"},
    "tread": {"model": {"route": [2, 3], "keep": 0.5}},
    "sprint": {"model": {"route": [2, 3], "keep": 0.5, "merge": "fuse", "path_drop": 0.1}},
    "modern blocks": {"model": {"norm": "rms", "mlp": "swiglu", "qk_norm": "rms", "rotary": True}},
    "jit": {"model": {"backbone": "jit:bottleneck=4,class_tokens=2"}},
    "ddt": {"model": {"backbone": "ddt:head_depth=1"}},
    "hooked": {"model": {"backbone": f"{__name__}.hooked"}},
    "in parts": {"accumulate": 2},
    "recomputed": {"checkpoint_activations": True},
    "muon": {"optimizer": {"name": "muon"}},
    "bf16": {"precision": "bf16"},
}  # fmt: skip


class Net(torch.nn.Module):
    """A foreign network with a list of blocks."""

    def __init__(self, dim: int, depth: int):
        super().__init__()
        self.first, self.last = torch.nn.Conv2d(3, dim, 2, 2), torch.nn.ConvTranspose2d(dim, 3, 2, 2)
        self.label, self.time = torch.nn.Embedding(4, dim), torch.nn.Linear(1, dim)
        self.blocks = torch.nn.ModuleList(torch.nn.Conv2d(dim, dim, 3, padding=1) for _ in range(depth))

    def forward(self, x, t, labels):
        t = t[:, None] if t.ndim == 1 else t.mean(1, keepdim=True)
        x = self.first(x) + (self.label(labels) + self.time(t))[..., None, None]
        for block in self.blocks:
            x = x + block(x.relu())
        return self.last(x)


def hooked(config):
    net = Net(config.dims().hidden_dim, config.dims().depth)
    return Hooked(
        net, net.blocks, lambda net, state, t, condition: net(state["x"], t, condition.labels),
        hidden_dim=config.dims().hidden_dim, grid=(4, 4), null_label=3, state_shape=(3, 8, 8),
    )  # fmt: skip


def together(*names: str) -> TrainConfig:
    """Combine settings: terms and streams of all; for other settings the last one wins."""
    found: dict = {
        "model": dict(MODEL),
        "diffusion": {},
        "alignments": [],
        "streams": [],
        "batch_size": NUM,
        "precision": "fp32",
    }
    for name in names:
        for key, value in SETTINGS[name].items():
            if isinstance(value, dict) and key in found:
                found[key] = {**found[key], **value}
            elif isinstance(value, list):
                found[key] = [*found[key], *value]
            else:
                found[key] = value
    return with_streams(TrainConfig.parse(found), {"tiny": WIDTH})


def one_step(config: TrainConfig, *, compiled: bool = False, seed: int = 0):
    """The losses and gradients of a step without zero parameters."""
    state = build_state(config, {"tiny": WIDTH}, CPU)
    stream = torch.Generator().manual_seed(seed)
    for network in (state.objective, state.ema.model):
        for p in network.parameters():
            p.data = 0.1 * torch.randn(p.shape, generator=stream)
    objective = state.objective
    x, labels = torch.randn(NUM, 3, 8, 8, generator=stream), torch.randint(3, (NUM,), generator=stream)
    patches, pooled = torch.randn(NUM, TOKENS, WIDTH, generator=stream), torch.randn(NUM, WIDTH, generator=stream)
    logits = torch.randn(NUM, 2, TOKENS, TOKENS, generator=stream)
    features = {
        n.encoder: Features(patches, pooled, {1: logits} if n.attention else None) for n in encoder_needs(config)
    }
    clean = objective.clean(x, features)
    state.step = 1
    module = torch.compile(objective, fullgraph=True, backend="aot_eager") if compiled else objective
    losses = backward(state, module, clean, Condition(labels), features)
    gradients = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    update(state, objective.clipping_groups())
    return losses, gradients, objective


ROUTES = ("tread", "sprint")
REASONS: dict[str, list[tuple[str, str]]] = {
    "needs all tokens": [*itertools.product(("irepa", "attention", "dispersive", "nt_xent", "shared", "adapter"), ROUTES)],
    "process only a share of the tokens": [*itertools.product(("head",), ROUTES)],
    "works only on grid tokens": [("reg", "two times")],
    "needs one time per image": [("adapter", "two times")],
    "needs a variance": [("reg", "ddpm")],
    "applies only to the objective flow": [("two times", "ddpm"), ("contrastive", "ddpm"), ("data", "ddpm")],
    "compares the images of the whole batch": [("dispersive", "in parts"), ("nt_xent", "in parts")],
    "The backbone 'jit' has no": [*itertools.product(("jit",), ("reg", "two times", "head", "modern blocks", *ROUTES))],
    "The backbone 'jit' does not support the learned variance": [("jit", "ddpm")],
    "The backbone 'ddt' has no": [*itertools.product(("ddt",), ("reg", "two times", *ROUTES))],
    "The backbone 'ddt' does not support the learned variance": [("ddt", "ddpm")],
    "supports neither attention taps nor token routing": [("attention", "hooked")],
    "0 tokens before its grid": [("reg", "hooked")],
    "learned variance, but the network outputs 3": [("ddpm", "hooked")],
    "does not support checkpoint_activations": [("hooked", "recomputed")],
    "lists none": [("hooked", "muon")],
}  # fmt: skip
REFUSED = {frozenset(pair): words for words, pairs in REASONS.items() for pair in pairs}


def said(*names: str) -> str:
    """The error of a step with these settings; "" where it trains with finite losses and weights."""
    try:
        losses, _, objective = one_step(together(*dict.fromkeys(names)))
    except UserError as error:
        return str(error)
    assert losses.total.isfinite().all(), names
    assert all(p.isfinite().all() for p in objective.parameters()), names
    return ""


@pytest.mark.parametrize("first", SETTINGS)
def test_every_two_settings_train_or_are_refused(first):
    names = list(SETTINGS)
    for second in names[names.index(first) :]:
        wanted, found = REFUSED.get(frozenset((first, second)), ""), said(first, second)
        assert bool(found) == bool(wanted), (first, second, found)
        assert wanted in found, (first, second, found)


def test_accumulated_gradients_equal_those_of_the_whole_batch():
    for name in SETTINGS:
        if name == "in parts" or frozenset((name, "in parts")) in REFUSED:
            continue
        (whole, gradients, _), (parts, found, _) = one_step(together(name)), one_step(together(name, "in parts"))
        tolerance = 2e-2 if name == "bf16" else 1e-4
        torch.testing.assert_close(parts.total, whole.total, rtol=tolerance, atol=1e-5, msg=name)
        assert found.keys() == gradients.keys(), name
        for key, gradient in gradients.items():
            torch.testing.assert_close(
                found[key], gradient, rtol=tolerance, atol=1e-3 if name == "bf16" else 1e-5, msg=f"{name} {key}"
            )


@pytest.mark.parametrize(
    "names",
    [
        ("two times", "tread"),
        *(
            pytest.param(names, marks=pytest.mark.slow)
            for names in (("sprint", "reg"), ("adapter", "jit"), ("shared", "pool", "warmup"), ("ddt", "latent"))
        ),
    ],
)
def test_a_compiled_step_gives_the_same_loss_and_gradients(names):
    torch.compiler.reset()
    (wanted, gradients, _), (found, compiled, _) = (one_step(together(*names), compiled=c) for c in (False, True))
    torch.testing.assert_close(found.total, wanted.total, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled, gradients, rtol=1e-3, atol=1e-5)


PROCESSES = {
    "ddp": ("adapter", "shared", "pool", "warmup"),
    "fsdp": ("adapter", "shared", "pool", "modern blocks"),
    "ddp, two times": ("two times", "tread"),
    "fsdp, two times": ("two times", "sprint"),
}


def test_two_processes_train_like_one(data_folder, tmp_path):
    """Draws are made for the global batch, and every parameter has a gradient; three steps equal one process's."""
    jobs = []
    for name, names in PROCESSES.items():
        config = together(*names)
        model = config.model.override(latent_size=16, num_classes=2, patch_size=4)
        config = config.override(
            model=model, batch_size=8, num_steps=3, log_every=1, save_every=3, parallel=name[:4].rstrip(","),
            optimizer={"learning_rate": 1e-3},
        )  # fmt: skip
        jobs.append((config, data_folder, tmp_path / name))
        train(config, open_data(data_folder), tmp_path / f"{name} alone", device=CPU, say=lambda text: None)
    run_all(jobs, 2, tmp_path)
    for name in PROCESSES:
        both, alone = (
            [row for row in read_metrics(tmp_path / f"{name}{end}") if row["kind"] == "train"] for end in ("", " alone")
        )
        assert [row["loss"] for row in both] == pytest.approx([row["loss"] for row in alone], rel=1e-4, abs=1e-5), name
        assert [row["grad_norm"] for row in both] == pytest.approx([row["grad_norm"] for row in alone], rel=1e-3), name
