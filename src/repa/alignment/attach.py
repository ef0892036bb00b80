"""Alignment in your own network, trainer and loop: `repa.attach`."""

import html
import json
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repa.alignment.aligner_inputs import Given, checked_grid, features_of, frames_as_images
from repa.alignment.alignment import Alignment
from repa.alignment.config import AlignmentConfig
from repa.base import dist
from repa.base.errors import UserError, choices
from repa.base.registry import declared, parse_spec
from repa.models.image_tokens import Tokens, image_tokens
from repa.models.taps import Grid, NamedBlock, Watcher, find_blocks, width_of

WITHOUT_WIDTH = ("gram", "dispersive")  # losses that need no projector to one width


def attach(net: nn.Module, block: str, features: int = 0, **settings: Any) -> "Aligner":
    """Alignment terms for any network; its forward, weights and names do not change.

        aligner = repa.attach(net, "transformer_blocks.7")          # before torch.compile, DDP and the optimizer
        optimizer = AdamW([*net.parameters(), *aligner.parameters()])
        ...
        loss = denoising_loss(net(...)) + aligner(features)         # features (N, M, F) of the clean images
        loss.backward(); optimizer.step(); aligner.step()

    By default the term compares how similar the tokens of an image are to each other (loss gram), without a projector: a
    pretrained network keeps its hidden states, of which only the relations are asked to change (SGA, arXiv 2605.20808).
    For a network that trains from scratch: `attach(net, block, features=768, loss="cosine")`.

    Args:
        net: the network, also one inside DDP, torch.compile (not yet run) or peft.
        block: a name, or a pattern: then each block that fits has a term. See `find_blocks`.
        features: width F of the features, where a projector maps to it.
        settings: of `Aligner.add`.

    Raises:
        UserError: there is no such block, or settings that do not fit; the message lists the blocks.
    """
    return Aligner(net).add(block, features, **settings)


class Aligner(nn.Module):
    """Alignment terms of a network, made by `attach`; calling it gives their weighted loss.

    Its parameters are the projectors', its state dict holds them and where schedules stand. In several processes wrap it
    as the network (DDP, `accelerator.prepare`) and call it: gradients of projectors are averaged as all others are.

    Attributes:
        values: term -> its loss in the last call, unweighted, without gradient.
        steps: optimiser steps done, which schedules depend on.
    """

    def __init__(self, net: nn.Module):
        super().__init__()
        self.terms = nn.ModuleDict()
        self.values: dict[str, Tensor] = {}
        self.steps = 0
        self._watcher = Watcher(net)
        self._terms: dict[str, _AttachedTerm] = {}

    def add(
        self,
        block: str,
        features: int = 0,
        *,
        target: str = "features",
        tap: str = "hidden",
        grid: tuple[int, ...] | None = None,
        hidden_dim: int | None = None,
        output: int | str | None = None,
        text: str = "front",
        **settings: Any,
    ) -> "Aligner":
        """A further term, or several where the pattern `block` fits several blocks.

        Args:
            features: as for `attach`.
            target: "features" that each call is given, "none" (dispersive), or the name of another block.
            tap: "hidden", or "attention": the logits of the first self-attention in the block, computed as PyTorch's
                scaled_dot_product_attention is called; without torch.compile.
            grid: (rows, columns) or (frames, rows, columns) of the tokens; None: from the network's input, or a square.
            hidden_dim: width of the block's tokens, where network and block do not tell.
            output: which of a block's outputs, where that is not clear from shapes.
            text: where text tokens stand in a sequence with the image's, "front" or "behind".
            settings: fields of `AlignmentConfig`: loss, weight, schedule, projector, token_norm, times, name, measure_only.
        """
        net = self._watcher.net
        if text not in ("front", "behind"):
            raise UserError(f"Text tokens stand in 'front' or 'behind' those of the image, but text is {text!r}.")
        if grid is not None:
            grid = checked_grid(grid)
        other = None
        if target not in ("features", "none"):
            others = find_blocks(net, target)
            if len(others) != 1:
                raise UserError(f"A target is one block, but {target!r} fits {len(others)}.")
            # A block is a target of the aligner's own, which the term is handed: to its configuration there is none.
            (other,), target = others, "none"
        settings.setdefault("loss", "attention_ce" if tap == "attention" else "gram")
        unprojected = tap == "attention" or other or parse_spec(settings["loss"])[0] in WITHOUT_WIDTH
        settings.setdefault("projector", "none" if unprojected else "mlp")
        found = find_blocks(net, block)
        if "name" in settings and len(found) > 1:
            raise UserError(f"{block!r} fits {len(found)} blocks, which cannot all have the name {settings['name']!r}.")
        for each in found:
            config = AlignmentConfig.parse({"target": target, "depth": 1, "tap": tap, "name": each.name, **settings})
            if config.key in self._terms:
                raise UserError(f"There is a term {config.key!r} already: give this one another name.")
            width = self._width(each, hidden_dim, config, features, other is not None)
            term = self._build(each, config, features, width, grid)
            self.terms[config.module] = term
            self._terms[config.key] = _AttachedTerm(term, each.name, other and other.name, grid, output, text, width)
            self._watcher.watch(each, attention=tap == "attention")
            if other:
                self._watcher.watch(other)
        return self

    def _build(
        self, block: NamedBlock, config: AlignmentConfig, features: int, width: int, grid: Grid | None
    ) -> Alignment:
        term = Alignment(
            config, width, (features or width) if width else 0, None if grid is None else (grid[-2], grid[-1])
        )
        if config.projector_of:
            term.share_projector_of(self._term_called(config.projector_of).term)
        if term.sees_condition:
            raise UserError(
                f"The projector {config.projector!r} looks at times and labels, which an aligner is not given: take mlp, linear or conv."
            )
        # Beside the block, wherever a large network keeps it.
        weight = next(block.module.parameters(), None)
        return term.to(None if weight is None else weight.device)

    def _width(
        self, block: NamedBlock, given: int | None, config: AlignmentConfig, features: int, own_target: bool
    ) -> int:
        """Width of the tap; 0 where no projector has to know it."""
        if config.projector == "none":
            return 0
        if not features and not own_target and config.target == "features":
            raise UserError(
                f"The projector {config.projector!r} needs the width of the features: attach(net, {block.name!r}, features=768)."
            )
        width = given or width_of(self._watcher.net, block)
        if width is None:
            raise UserError(
                f"How wide the tokens of {block.name} are is not known: give hidden_dim=..., their number of channels."
            )
        return width

    def weight(self, name: str) -> float:
        """Lambda of a term at this step."""
        return self._term_called(name).term.weight(self.steps)

    @property
    def active(self) -> bool:
        """Does a term count at this step that looks at features? If not, the encoder need not run."""
        terms = [attached.term for attached in self._terms.values()]
        return any(term.weight(self.steps) and term.config.target == "features" for term in terms)

    def forward(
        self, features: Given = None, *, t: Tensor | None = None, grid: tuple[int, ...] | None = None
    ) -> Tensor:
        """The weighted sum of the terms, a number to add to the loss, for the network's last pass.

        Args:
            features: of the clean images: tokens (N, M, F), of a video (N, frames, M, F), attention logits (N, h, M, M); or
                what an encoder of `repa.encoders` gives; or these by the names of terms.
            t: (N,) times in [0, 1], 0 is data, for terms with `times` or `time_weight`.
            grid: of this batch, where it changes from batch to batch and the network's input is packed.

        Raises:
            UserError: the network has not run since the last call, or shapes that do not fit together.
        """
        total: Tensor | float = 0.0
        self.values = {}
        if not self._terms:
            raise UserError("This aligner has no terms: it was detached. Attach again.")
        for name, attached in self._terms.items():
            weight = attached.term.weight(self.steps)
            if weight == 0:
                total = total + attached.term.zero_loss()
                continue
            loss = self._loss(name, attached, features, t, grid)
            self.values[name] = loss.detach().mean()
            total = total + weight * loss.mean()
        # Forgotten: the next call must not see this pass again, and its activations would stay in memory until then.
        self._watcher.record.begin(None)
        return total if isinstance(total, Tensor) else torch.tensor(total)

    def loss(self, features: Given = None, **more: Any) -> Tensor:
        """The same as calling it, for one process; see `forward`.

        Raises:
            UserError: in several processes, whose projectors would go apart: wrap the aligner as the network, and call it.
        """
        if dist.world() > 1 and any(p.requires_grad for p in self.parameters()):
            raise UserError(
                "In several processes the gradients of projectors must be averaged: wrap the aligner as the network (DDP or "
                "accelerator.prepare) and call it, aligner(features), instead of its loss."
            )
        return self(features, **more)

    def taps(self) -> dict[str, Tensor]:
        """Term -> tokens (N, T, D) of the network's last pass, for analysis, or as features of another network's aligner."""
        return {name: self._tokens(attached.block, attached, None).tokens for name, attached in self._terms.items()}

    def step(self) -> None:
        """An optimiser step is done: schedules move on."""
        self.steps += 1
        for name, attached in self._terms.items():
            schedule = attached.term.schedule
            # The mean of all processes: a schedule that stopped in one of them alone would part their gradients.
            if hasattr(schedule, "watches") and schedule.watches(self.steps) and name in self.values:
                schedule.observe(self.steps, float(dist.mean_over(self.values[name])))

    def detach(self) -> None:
        """Take the hooks out of the network, which is then as before."""
        self._watcher.close()
        self._terms.clear()

    def get_extra_state(self) -> Tensor:
        """Where schedules stand, as bytes of JSON: a tensor, as safetensors hold nothing else."""
        schedules = {name: attached.term.schedule for name, attached in self._terms.items()}
        observed = {name: schedule.state() for name, schedule in schedules.items() if hasattr(schedule, "watches")}
        text = json.dumps({"steps": self.steps, "schedules": observed})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        try:
            saved = json.loads(bytes(state.tolist()))
            steps, observed = saved["steps"], saved["schedules"]
            if type(steps) is not int or steps < 0:
                raise ValueError(f"steps is {steps!r}")
            for name, values in observed.items():
                self._term_called(name).term.schedule.load(values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"The state of an aligner is damaged, or of other terms: {error}.") from error
        self.steps = steps

    def extra_repr(self) -> str:
        lines, kind = [], self._watcher.kind
        for name, attached in self._terms.items():
            config = attached.term.config
            lines.append(
                f"{name}: {config.tap} of {kind}, {config.loss} against {attached.target_name}, weight {config.weight}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """A table for notebooks: each term, where it looks, its weight now and its last loss."""
        rows = []
        for name, attached in self._terms.items():
            config, value = attached.term.config, self.values.get(name)
            weight, last = f"{self.weight(name):g}", "" if value is None else f"{value:.4f}"
            cells = (name, attached.block, config.tap, config.loss, attached.target_name, weight, last)
            rows.append("".join(f"<td>{html.escape(cell)}</td>" for cell in cells))
        titles = ("term", "block", "tap", "loss", "against", "weight", "last loss")
        head = "".join(f"<th>{title}</th>" for title in titles)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<p>Aligner of {html.escape(self._watcher.kind)}, step {self.steps}</p><table><tr>{head}</tr>{body}</table>"

    def _term_called(self, name: str) -> "_AttachedTerm":
        if name not in self._terms:
            raise UserError(f"Unknown term {name!r}{choices(name, self._terms)}")
        return self._terms[name]

    def _loss(
        self, name: str, attached: "_AttachedTerm", features: Given, t: Tensor | None, grid: tuple[int, ...] | None
    ) -> Tensor:
        """(N,) of one term."""
        term = attached.term
        if term.tap.kind == "attention":
            student = self._attention(attached, grid)
            return term.at_times(term.compare(student, features_of(name, features, "attention")), t)
        student, grid = self._tokens(attached.block, attached, grid)
        if term.config.measure_only:
            student = student.detach()
        elif torch.is_grad_enabled() and not student.requires_grad:
            raise UserError(
                f"The output of block {attached.block} depends on no trained weight, or was computed without gradients: train weights "
                "of this block or in front of it."
            )
        if attached.width and student.shape[2] != attached.width:
            raise UserError(
                f"Block {attached.block} gives tokens of width {student.shape[2]}, but its projector was built for {attached.width}: "
                f"attach with hidden_dim={student.shape[2]}."
            )
        target: Tensor | None = None
        if attached.other:
            target, own = self._tokens(attached.other, attached, grid)
            target = target.detach()
            if own is not None and len(own) == 3:
                target = target.unflatten(1, (own[0], -1))
        elif term.config.target == "features":
            target = features_of(name, features, "patches")
        student, target, frames = frames_as_images(attached.block, student, target, grid)
        rows_columns = (grid[-2], grid[-1]) if grid else None
        needs_width = not attached.width and not declared(term.loss, "compares_relations")
        if target is not None and needs_width and student.shape[2] != target.shape[2]:
            raise UserError(
                f"Without a projector the loss {term.config.loss!r} needs tokens of one width, but block {attached.block} gives "
                f"{student.shape[2]} and the target has {target.shape[2]}: take projector='mlp', or loss='gram'."
            )
        # A network in half precision without autocast gives taps that a projector in float32 cannot multiply.
        weight = next(term.parameters(), None)
        if weight is not None and not torch.is_autocast_enabled(student.device.type):
            student = student.to(weight.dtype)
        if (
            parse_spec(term.config.loss)[0] == "crepa"
        ):  # it compares the frames of a video, which count as images for all other losses
            if frames > 1 and parse_spec(term.config.loss)[1]["frames"] != frames:
                raise UserError(
                    f"Block {attached.block} gives {frames} frames, but the loss is {term.config.loss!r}: give crepa:frames={frames}."
                )
            loss = term.compare(student, target, grid=rows_columns, frames=frames)  # (N,)
        else:
            loss = term.compare(student, target, grid=rows_columns).unflatten(0, (-1, frames)).mean(1)  # (N,)
        return term.at_times(loss, t)

    def _tokens(self, block: str, attached: "_AttachedTerm", grid: tuple[int, ...] | None) -> Tokens:
        record = self._watcher.record
        if block not in record.passes:
            raise UserError(
                f"Block {block} has not run since the last call of the aligner: run the network first. A network that was compiled "
                "must be attached to before its first run."
            )
        grid = checked_grid(grid) if grid is not None else attached.grid
        seen, patch = record.passes[block], self._watcher.patch
        return image_tokens(
            seen, record.image, patch, where=block, grid=grid, output=attached.output, text=attached.text
        )

    def _attention(self, attached: "_AttachedTerm", grid: tuple[int, ...] | None) -> Tensor:
        """Logits (N, h, T, T) between the tokens of the image."""
        logits = self._watcher.record.attention.get(attached.block)
        if logits is None:
            raise UserError(
                f"No self-attention of block {attached.block} was seen: it must run before the aligner is called, call PyTorch's "
                "scaled_dot_product_attention, and not be compiled. Otherwise take tap='hidden'."
            )
        number = self._tokens(attached.block, attached, grid).tokens.shape[1]
        cut = slice(logits.shape[-1] - number, None) if attached.text == "front" else slice(number)
        return logits[..., cut, cut]


class _AttachedTerm(NamedTuple):
    """A term and where it looks; see `Aligner.add`."""

    term: Alignment
    block: str
    other: str | None  # the block that is its target
    grid: Grid | None
    output: int | str | None
    text: str
    width: int  # of the tap, where a projector knows it; else 0

    @property
    def target_name(self) -> str:
        """The target by name."""
        return self.other or self.term.config.target
