"""Conversion of a DiT to and from diffusers' DiTTransformer2DModel, without importing diffusers.

The architecture differs only in the sinusoid of the time, with frequencies 10000^(-k/127) in diffusers and 10000^(-k/128)
in DiT, SiT and REPA. For times in [0, 1] the difference is folded into the weights, exactly to float32. For the integer
timesteps of DDPM this is impossible, and the user must set `downscale_freq_shift = 0` (see exact_times).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from repa.base.errors import UserError
from repa.models.layers import NORM_EPS, sincos_positions
from repa.models.published import FIRST_TIME_LAYER, constructor_arguments, not_plain

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"  # as diffusers names them
OLD_WEIGHTS = "diffusion_pytorch_model.bin"
OLD_CLASS = "Transformer2DModel"  # which older configurations name, for every kind of transformer
FACTS = "repa.json"  # facts that diffusers' configuration cannot hold: objective, autoencoder, step
MOST_TOKENS = 256**2  # largest number of tokens of a network to read, as for images of 4,096 pixels
STENCIL = 8  # neighbouring frequencies in the interpolation: error below 1e-7 for t in [0, 1]
MLP_RATIO = 4  # the only ratio of DiTTransformer2DModel

# In diffusers every block embeds time and label, with the same weights.
EMBEDDINGS = {
    "t_embedder.mlp.0": "timestep_embedder.linear_1",
    "t_embedder.mlp.2": "timestep_embedder.linear_2",
    "y_embedder.embedding_table": "class_embedder.embedding_table",
}
IN_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
OUTSIDE = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}


def to_diffusers(
    state: Mapping[str, Tensor], num_heads: int, *, unit_times: bool
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, state dict) of the DiTTransformer2DModel that is equivalent to our DiT with this state dict.

    Args:
        state: state dict of our DiT.
        num_heads: its number of attention heads.
        unit_times: whether it was trained with t in [0, 1] (SiT, REPA) or with integer timesteps (DiT).

    Raises:
        UserError: a network that diffusers' class does not support, with other blocks than DiT's or another MLP ratio.
    """
    arguments = constructor_arguments(state, num_heads)
    other = not_plain(arguments, state)
    if arguments["qk_norm"] != "none":
        other = other or f"qk_norm is {arguments['qk_norm']}"
    if arguments["mlp_ratio"] != MLP_RATIO:
        other = other or f"MLP ratio is not {MLP_RATIO}"
    if other:
        raise UserError(
            f"diffusers' DiTTransformer2DModel does not support this network ({other}): export safetensors."
        )
    config = {
        "_class_name": "DiTTransformer2DModel",
        "num_attention_heads": num_heads,
        "attention_head_dim": arguments["hidden_dim"] // num_heads,
        "in_channels": arguments["latent_channels"],
        "out_channels": arguments["latent_channels"] * (2 if arguments["learn_sigma"] else 1),
        "num_layers": arguments["depth"],
        "sample_size": arguments["latent_size"],
        "patch_size": arguments["patch_size"],
        "num_embeds_ada_norm": arguments["num_classes"],
        "norm_eps": NORM_EPS,
    }
    if unit_times:
        state = {**state, FIRST_TIME_LAYER: for_frequencies_of_diffusers(state[FIRST_TIME_LAYER])}
    out = {theirs: state[ours] for ours, theirs in _names(OUTSIDE)}
    for block in range(arguments["depth"]):
        ours, theirs = f"blocks.{block}.", f"transformer_blocks.{block}."
        # Copies, as for the three parts of qkv below, because safetensors refuses tensors that share memory.
        out |= {b: state[a].clone() for a, b in _names(EMBEDDINGS, "", f"{theirs}norm1.emb.")}
        out |= {b: state[a] for a, b in _names(IN_BLOCK, ours, theirs)}
        for kind in ("weight", "bias"):
            parts = state[f"{ours}attn.qkv.{kind}"].chunk(3)
            out |= {f"{theirs}attn1.to_{n}.{kind}": part.clone() for n, part in zip("qkv", parts, strict=True)}
    return config, out


def from_diffusers(
    config: Mapping[str, Any], state: Mapping[str, Tensor], *, unit_times: bool
) -> tuple[dict[str, Tensor], int]:
    """(state dict of our DiT, its number of heads) from configuration and state dict of a DiTTransformer2DModel.

    Args:
        unit_times: as for `to_diffusers`.

    Raises:
        UserError: not a DiT of diffusers, or a network that our DiT does not support.
    """
    kinds = ("num_attention_heads", "attention_head_dim", "num_layers", "sample_size", "patch_size")
    if any(type(config.get(kind)) is not int or config[kind] < 1 for kind in kinds):
        raise UserError(
            f"This is not a DiTTransformer2DModel of diffusers: its configuration must have numbers for {', '.join(kinds)}."
        )
    # diffusers' default, which its copies of the released DiTs have: the outputs are equal to 1e-5
    if (eps := config.get("norm_eps", 1e-5)) not in (NORM_EPS, 1e-5):
        raise UserError(f"This DiT has norm_eps {eps}, but repa's has {NORM_EPS}: it cannot be converted.")
    heads, side = config["num_attention_heads"], config["sample_size"] // config["patch_size"]
    # config.json is untrusted, and it determines the size of the table of positions below.
    if not 1 <= side**2 <= MOST_TOKENS:
        raise UserError(
            f"A sample_size of {config['sample_size']} in patches of {config['patch_size']} gives {side**2:,} tokens, but a DiT must have "
            f"1 to {MOST_TOKENS:,}: correct them."
        )
    first = "transformer_blocks.0.norm1.emb."
    try:
        own = {ours: state[theirs] for ours, theirs in (*_names(OUTSIDE), *_names(EMBEDDINGS, "", first))}
        for block in range(config["num_layers"]):
            ours, theirs = f"blocks.{block}.", f"transformer_blocks.{block}."
            own |= {a: state[b] for a, b in _names(IN_BLOCK, ours, theirs)}
            for kind in ("weight", "bias"):
                own[f"{ours}attn.qkv.{kind}"] = torch.cat([state[f"{theirs}attn1.to_{n}.{kind}"] for n in "qkv"])
            for embedding in (name.removeprefix(first) for name in state if name.startswith(first)):
                if not torch.equal(state[f"{theirs}norm1.emb.{embedding}"], state[first + embedding]):
                    raise UserError(
                        "The blocks of this DiT have different embeddings of time and label, but repa's share one: it cannot be converted."
                    )
        if unit_times:
            own[FIRST_TIME_LAYER] = from_frequencies_of_diffusers(own[FIRST_TIME_LAYER])
    except KeyError as error:
        raise UserError(f"These are not the weights of a DiTTransformer2DModel: {error.args[0]} is missing.") from None
    width, _, *kernel = own["x_embedder.proj.weight"].shape
    if heads * config["attention_head_dim"] != width or kernel != [config["patch_size"]] * 2:
        raise UserError(
            "The weights of this DiT have another width or patch size than its configuration: restore both from one copy."
        )
    own["pos_embed"] = sincos_positions(heads * config["attention_head_dim"], (side, side))
    return own, heads


def exact_times(transformer: Any) -> Any:
    """Set DiT's frequencies in a loaded DiTTransformer2DModel, for networks of integer timesteps. Returns it."""
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return transformer


def _names(table: Mapping[str, str], ours: str = "", theirs: str = "") -> list[tuple[str, str]]:
    """(our name, diffusers' name) of weight and bias of every layer in `table`; an embedding has no bias."""
    return [
        (f"{ours}{a}.{kind}", f"{theirs}{b}.{kind}")
        for a, b in table.items()
        for kind in (("weight",) if a.endswith("embedding_table") else ("weight", "bias"))
    ]


def for_frequencies_of_diffusers(weight: Tensor) -> Tensor:
    """The W' that is equivalent on diffusers' frequencies to W on ours, only for t in [0, 1].

    Our (and DiT's) frequencies are 10000^(-k/F), those of diffusers 10000^(-k/(F-1)), k = 0 ... F-1. For f t <= 1,
    cos(f t) and sin(f t) are so smooth in log f that interpolation between neighbouring frequencies is exact to float32.
    """
    num = weight.shape[1] // 2
    return _on_other_frequencies(weight, [k * (num - 1) / num for k in range(num)])


def from_frequencies_of_diffusers(weight: Tensor) -> Tensor:
    """The inverse, with the same accuracy: the W on our frequencies that is equivalent to W' on diffusers', for t in [0, 1]."""
    num = weight.shape[1] // 2
    return _on_other_frequencies(weight, [k * num / max(num - 1, 1) for k in range(num)])


def _on_other_frequencies(weight: Tensor, places: list[float]) -> Tensor:
    """W for features at the integers 0, 1, ... instead of `places`, both in units of the logarithm of the frequency."""
    num = len(places)
    weights = torch.zeros(num, num, dtype=torch.float64)  # row: a frequency of W, column: one of the result
    size = min(STENCIL, num)
    for k, place in enumerate(places):
        # At the ends of the table the stencil is shifted inward.
        first = min(max(math.floor(place) - size // 2 + 1, 0), num - size)
        nodes = range(first, first + size)
        for node in nodes:  # Lagrange
            weights[k, node] = math.prod((place - other) / (node - other) for other in nodes if other != node)
    on_cos, on_sin = weight.double().chunk(2, dim=1)
    return torch.cat([on_cos @ weights, on_sin @ weights], dim=1).to(weight.dtype)
