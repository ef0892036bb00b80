"""Methods related to REPA as configurations: on SiT-B/2, on SiT-XL/2, and on a small network for a CPU.

docs/methods/ explains each one: equation, tap, use and cost.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from repa.alignment.config import AlignmentConfig
from repa.diffusion.config import DiffusionConfig
from repa.models.config import ModelConfig
from repa.recipes.paper import commands_of
from repa.recipes.recipe import PUBLISHED, Recipe, headline, paragraphs, results_table
from repa.recipes.small import cifar10
from repa.training.config import StreamConfig, TrainConfig


class Scale(NamedTuple):
    """A network for the recipes of methods; blocks are counted from 1."""

    name: str  # prefix of the recipes' names
    model: str
    aligned: int
    deep: int
    last: int
    encoder: str = "dinov2-b"
    projector: str = "mlp"


B = Scale("sit-b2", "SiT-B/2", aligned=4, deep=8, last=12)
XL = Scale("sit-xl2", "SiT-XL/2", aligned=8, deep=20, last=28)
SMALL = Scale("cifar10", "a small SiT", aligned=2, deep=4, last=6, encoder="tiny", projector="mlp:width=256")

Parts = dict[str, Any]  # arguments of TrainConfig that differ from the baseline


@dataclass(frozen=True)
class Method:
    """A training method."""

    title: str
    paper: str
    """arXiv number."""
    page: str
    """Page in docs/methods/."""
    parts: Callable[[Scale], Parts]
    notes: tuple[str, ...] = ()
    """Choices that the paper leaves open, and parts of the paper that are not implemented."""
    guidance: str = ""
    """Guidance of samples, if the method includes one; {aligned} is the block."""


def irepa(place: Scale) -> Parts:
    return _terms(_encoder_term(place, projector="conv", token_norm="zscore:alpha=0.6", weight=1.0))


def haste(place: Scale) -> Parts:
    """Aligns the attention of the four blocks up to the aligned one with that of the last four of the encoder's twelve."""
    stop = "stop:step=250000"
    attention = [
        AlignmentConfig(
            target=f"{place.encoder}:part=attention,layer={9 + k}", tap="attention", depth=place.aligned - 3 + k,
            loss="attention_ce:heads=12", projector="none", weight=0.125, schedule=stop, name=f"attention{9 + k}",
        )
        for k in range(4)
    ]  # fmt: skip
    return _terms(_encoder_term(place, schedule=stop), *attention)


def reg(place: Scale) -> Parts:
    target = f"{place.encoder}:part=all"
    term = AlignmentConfig(target=target, depth=place.aligned, projector=place.projector, name=place.encoder)
    return {**_terms(term), "streams": (StreamConfig(name="class", source=place.encoder, weight=0.03),)}


def sra(place: Scale) -> Parts:
    return _terms(
        AlignmentConfig(
            target=f"ema:depth={place.deep},earlier=0.2", depth=place.aligned, loss="smooth_l1:beta=0.05",
            projector="mlp2", weight=0.2, name="averaged",
        )
    )  # fmt: skip


def sra_dts_as(place: Scale) -> Parts:
    return {
        **_terms(
            AlignmentConfig(
                target=f"ema:depth={place.deep},earlier=0.2", depth=3 if place is B else place.aligned,
                projector="mlp2", name="averaged",
            )
        ),
        "model": {"separate_times": True},
        "diffusion": DiffusionConfig(token_times=0.25),
    }  # fmt: skip


def self_flow(place: Scale) -> Parts:
    target = f"ema:depth={place.deep},cleanest=true"
    term = AlignmentConfig(target=target, depth=place.aligned, projector=place.projector, name="averaged")
    return {**_terms(term), "diffusion": DiffusionConfig(token_times=0.25)}


def layersync(place: Scale) -> Parts:
    deep = 16 if place is XL else place.deep
    return _terms(
        AlignmentConfig(target=f"block:depth={deep}", depth=place.aligned, projector="none", weight=0.2, name="deeper")
    )


def vae_repa(place: Scale) -> Parts:
    return _terms(AlignmentConfig(target="latent", depth=place.aligned, projector="mlp2"))


def self_transcendence(place: Scale) -> Parts:
    return _terms(
        AlignmentConfig(target="latent", depth=place.last // 3, loss="mse", projector=place.projector, times=(0.4, 0.7))
    )


def dispersive(place: Scale) -> Parts:
    return _terms(
        AlignmentConfig(target="none", depth=place.last // 4, loss="dispersive:temperature=0.5", projector="none")
    )


def dispersive_last(place: Scale) -> Parts:
    loss = "dispersive:temperature=1,scope=device"
    return _terms(AlignmentConfig(target="none", depth=place.last, loss=loss, projector="none", weight=0.25))


def reed(place: Scale) -> Parts:
    """Warm-up for an eighth of the steps, 50K of 400K."""
    steps = 125 if place is SMALL else 50_000
    return {**_terms(_encoder_term(place)), "denoising_schedule": f"warmup:steps={steps}"}


def urepa(place: Scale) -> Parts:
    tokens = _encoder_term(place, resample="target", name="tokens")
    return _terms(tokens, _relation_term(place, "gram", 1.5, resample="target", projector_of="tokens"))


def trd(place: Scale) -> Parts:
    return _terms(_relation_term(place, "gram:norm=l1,margin=0.1", 0.5))


def sara(place: Scale) -> Parts:
    return _terms(_encoder_term(place, name="tokens"), _relation_term(place, "gram", 0.5, projector_of="tokens"))


def internal_guidance(place: Scale) -> Parts:
    return {"model": {"heads": (place.aligned,)}, "head_weight": 0.5}


def contrastive(place: Scale) -> Parts:
    return {"diffusion": DiffusionConfig(contrastive=0.05)}


def tread(place: Scale) -> Parts:
    """Half of the tokens skip the blocks from the third to the fifth last."""
    blocks = (3, place.last - 4) if place.last > 6 else (2, 4)
    return {"model": {"route": blocks, "keep": 0.5}}


def sprint(place: Scale) -> Parts:
    """All blocks except the first two and the last two process one token of every 2 x 2."""
    route = {"route": (3, place.last - 2), "keep": 0.25, "keep_groups": 2, "merge": "fuse", "path_drop": 0.1}
    if place is not XL:
        return {"model": route}
    blocks = {"rotary": True, "positions": False, "qk_norm": "rms"}
    return {"model": route | blocks, "diffusion": DiffusionConfig(timesteps="logit_normal")}


_BLOCKS_OF_B = "The paper gives the blocks of SiT-XL/2; those of SiT-B/2 are chosen in proportion."
METHODS: dict[str, Method] = {
    "irepa": Method("iREPA", "2512.10794", "encoder.md", irepa),
    "haste": Method("HASTE", "2505.16792", "encoder.md", haste, (_BLOCKS_OF_B, "In a shorter run, stop earlier in proportion.")),
    "reed": Method(
        "REED's warm-up", "2507.08980", "encoder.md", reed,
        (
            "The paper's second term, for captions, needs data with texts: docs/methods/encoder.md has the command.",
            "The paper gives the blocks of SiT-XL/2; those of SiT-B/2 are chosen in proportion.",
        ),
    ),
    "urepa": Method(
        "U-REPA's two terms", "2503.18414", "relations.md", urepa,
        ("The paper's network is a U-Net; here it is SiT.",),
    ),
    "trd": Method(
        "token relation distillation", "2505.23656", "relations.md", trd,
        ("The paper fine-tunes a video network; here an image network is trained from random weights, or from `--init`.",),
    ),
    "sara": Method(
        "SARA without its adversarial term", "2503.08253", "relations.md", sara,
        ("The paper's loss weights are unknown: 0.5 is chosen here. Its adversarial term is not implemented.",),
    ),
    "reg": Method("REG", "2507.01467", "reg.md", reg),
    "sra": Method(
        "SRA", "2505.02831", "self.md", sra,
        (
            "The paper decreases the weight slowly after 150 epochs; this recipe's 400K steps end earlier.",
            "The authors later recommended the cosine loss: --alignments.0.loss cosine --alignments.0.weight 0.5.",
        ),
    ),
    "sra-dts-as": Method(
        "SRA with two times per image and separate attention", "2607.02508", "self.md", sra_dts_as,
        ("The blocks of SiT-XL/2 are those of SRA, the blocks of SiT-B/2 those of the paper.",),
    ),
    "self-flow": Method(
        "Self-Flow", "2603.06507", "self.md", self_flow, ("Weight and blocks are chosen here, because no training code was released.",)
    ),
    "layersync": Method("LayerSync", "2510.12581", "self.md", layersync, (_BLOCKS_OF_B,)),
    "vae-repa": Method(
        "VAE-REPA", "2601.17830", "self.md", vae_repa, ("Loss, weight and projector are chosen here, because no code was released.",)
    ),
    "self-transcendence": Method(
        "Self-Transcendence, first stage", "2601.07773", "self.md", self_transcendence,
        (
            "The paper's first stage has about 200K steps: --num-steps 200000.",
            "Its second stage aligns a new network to this one's guided features: docs/methods/self.md has the command.",
        ),
    ),
    "dispersive": Method("dispersive loss", "2506.09027", "dispersive.md", dispersive),
    "dispersive-last": Method(
        "dispersive loss with the settings of the PyTorch release", "2506.09027", "dispersive.md", dispersive_last,
        ("Distances are computed within each process, as in the release: its results use eight processes of 32 images.",),
    ),
    "cfm": Method(
        "contrastive flow matching", "2506.05350", "cfm.md", contrastive,
        ("The weight 0.05 is chosen here.", "It can be combined with REPA: repa train sit-xl2-repa --diffusion.contrastive 0.05."),
    ),
    "internal-guidance": Method(
        "internal guidance", "2512.24176", "internal-guidance.md", internal_guidance, (_BLOCKS_OF_B,),
        "internal:head={aligned},scale=1.4",
    ),
    "tread": Method(
        "TREAD", "2501.04765", "routing.md", tread,
        (
            "The route is the authors' r(2, B - 4) with half of the tokens; we read this as starting at the third block.",
            "For the guided result they continue training with all tokens: repa train RECIPE --init RUN --model.keep 1.",
            "Their network is DiT-XL/2 with EDM's parameterisation; here it is SiT.",
        ),
    ),
    "sprint": Method(
        "SPRINT, first stage", "2510.21986", "routing.md", sprint,
        (
            "The paper's first stage has 2M steps, --num-steps 2000000; on SiT-XL/2 times, queries and keys are as in the paper.",
            "Its second uses all tokens: --init RUN --model.keep 1 --num-steps 200000 --batch-size 1024 --optimizer.learning-rate 2e-4",
            "--optimizer.warmup-steps 5000. With REPA: --alignments.0.target dinov2-b --alignments.0.depth 8, compared at the kept tokens.",
            "The mask token is trained here, but stays random in the released code.",
        ),
        "path_drop:scale=3",
    ),
}  # fmt: skip

_WITHOUT_ATTENTION = ("haste",)  # the package's encoder is a convolutional network


def method_recipes() -> dict[str, Recipe]:
    """The recipes `sit-b2-irepa`, `sit-xl2-irepa`, `cifar10-irepa` and so on."""
    full = {f"{place.name}-{key}": _on_imagenet(place, key) for place in (B, XL) for key in METHODS}
    return full | {f"{SMALL.name}-{key}": _on_cifar10(key) for key in METHODS if key not in _WITHOUT_ATTENTION}


def _on_imagenet(place: Scale, key: str) -> Recipe:
    """On ImageNet."""
    name, method, known = f"{place.name}-{key}", METHODS[key], PUBLISHED.get(key, ())
    parts = [
        [f"{name}: {place.model} with {method.title}, arXiv {method.paper}. docs/methods/{method.page} explains it."],
        [f"The settings that do not belong to the method are those of {place.name}-repa, unless noted.", *method.notes],
        commands_of(name, guidance=method.guidance.format(aligned=place.aligned)),
        results_table(known),
    ]
    return Recipe(
        lambda: method_config(method, place, TrainConfig(model=ModelConfig(name=place.model))),
        f"{method.title} (arXiv {method.paper}): {headline(known, place.model)}",
        paragraphs(*parts),
        group=f"Methods on {place.model}",
    )


def _on_cifar10(key: str) -> Recipe:
    """The recipe cifar10 with a method."""
    method = METHODS[key]
    about = f"cifar10 with {method.title} (arXiv {method.paper})"
    promise = f"{about}, for a CPU. docs/methods/{method.page} explains it; no paper reports results of this network."
    baseline = cifar10().override(alignments=())
    return Recipe(
        lambda: method_config(method, SMALL, baseline),
        about,
        promise,
        group="Methods on CIFAR-10, for a CPU",
        pixels=32,
    )


def method_config(method: Method, place: Scale, baseline: TrainConfig) -> TrainConfig:
    parts = method.parts(place)
    return baseline.override(**{**parts, "model": baseline.model.override(**parts.get("model", {}))})


def _terms(*terms: AlignmentConfig) -> Parts:
    return {"alignments": terms}


def _encoder_term(place: Scale, **settings: Any) -> AlignmentConfig:
    """REPA's term."""
    return AlignmentConfig(
        **{"target": place.encoder, "depth": place.aligned, "projector": place.projector, **settings}
    )


def _relation_term(place: Scale, loss: str, weight: float, **settings: Any) -> AlignmentConfig:
    """A term that compares relations between tokens instead of the tokens."""
    return _encoder_term(place, loss=loss, weight=weight, name="relations", **settings)
