"""Alignment in your own network, trainer and loop: `repa.attach`."""

import html
import json
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from repa.alignment.aligner_inputs import Given, checked_grid, features_of, frames_as_images
from repa.alignment.alignment import Alignment
from repa.alignment.config import AlignmentConfig
from repa.alignment.losses import compares
from repa.base import dist
from repa.base.errors import UserError, choices, require_type
from repa.base.registry import declared, parse_spec
from repa.models.hooked import Tokens, image_tokens
from repa.models.taps import Grid, NamedBlock, Watcher, find_blocks, width_of

WITHOUT_WIDTH = ("gram", "dispersive")  # losses that need no projector to the target's width


def attach(net: nn.Module, block: str, features: int = 0, **settings: Any) -> "Aligner":
    """Alignment terms for any network; its forward, weights and names do not change.

        aligner = repa.attach(net, "transformer_blocks.7")          # before torch.compile, DDP and the optimizer
        optimizer = AdamW([*net.parameters(), *aligner.parameters()])
        ...
        loss = denoising_loss(net(...)) + aligner(features)         # features (N, M, F) of the clean images
        loss.backward(); optimizer.step(); aligner.step()

    By default the term compares the similarities between the tokens of an image (loss gram), without a projector: it changes
    only the relations between the hidden states of a pretrained network (SGA, arXiv 2605.20808). For a network that is
    trained from scratch: `attach(net, block, features=768, loss="cosine")`.

    Args:
        net: the network; it may be wrapped in DDP, torch.compile (before its first run) or peft.
        block: name of a block, or a pattern, which adds a term for each matching block. See `find_blocks`.
        features: width F of the features, if a projector maps to it.
        settings: further arguments of `Aligner.add`.

    Raises:
        UserError: no such block (the message lists the blocks), or settings that do not fit.
    """
    return Aligner(net).add(block, features, **settings)


class Aligner(nn.Module):
    """Alignment terms of a network, created by `attach`; a call returns their weighted loss.

    Its parameters are those of the projectors; its state dict also holds the state of the schedules. With several processes,
    wrap it like the network (DDP, `accelerator.prepare`) and call it, so that the projectors' gradients are averaged.

    Attributes:
        values: term -> its loss in the last call, unweighted, detached.
        steps: number of completed optimiser steps, the input of the schedules.
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
        """Add a term, or several if the pattern `block` matches several blocks.

        Args:
            features: as for `attach`.
            target: "features" (an argument of each call), "none" (dispersive), or the name of another block.
            tap: "hidden", or "attention": the logits of the first self-attention in the block, recorded when it calls PyTorch's
                scaled_dot_product_attention; not with torch.compile.
            grid: (rows, columns) or (frames, rows, columns) of the tokens; None: from the network's input, or a square.
            hidden_dim: width of the block's tokens, if it cannot be read from the network or the block.
            output: index of the block's output, if the shapes do not determine it.
            text: position of text tokens in a sequence shared with the image's tokens, "front" or "behind".
            settings: fields of `AlignmentConfig`: loss, weight, schedule, projector, token_norm, times, name, measure_only.
        """
        net = self._watcher.net
        require_type(features, int, "The width of the features is a number such as encoder.dim")
        require_type(hidden_dim, (int, type(None)), "hidden_dim is the width of the block's tokens, a number")
        if min(features, hidden_dim or 0) < 0:
            raise UserError(
                f"Widths are at least 1, but features is {features} and hidden_dim {hidden_dim}: correct them."
            )
        if text not in ("front", "behind"):
            raise UserError(
                f"text must be 'front' or 'behind', the position of text tokens relative to the image's, but got {text!r}."
            )
        if grid is not None:
            grid = checked_grid(grid)
        other = None
        if target not in ("features", "none"):
            others = find_blocks(net, target)
            if len(others) != 1:
                raise UserError(f"A target must be one block, but {target!r} matches {len(others)}: name one of them.")
            # The aligner itself passes the block's tokens to the term, so the configuration names no target.
            (other,), target = others, "none"
        settings.setdefault("loss", "attention_ce" if tap == "attention" else "gram")
        unprojected = tap == "attention" or other or parse_spec(settings["loss"])[0] in WITHOUT_WIDTH
        settings.setdefault("projector", "none" if unprojected else "mlp")
        found = find_blocks(net, block)
        if "name" in settings and len(found) > 1:
            raise UserError(
                f"{block!r} matches {len(found)} blocks, but only one can have the name {settings['name']!r}: leave name out."
            )
        for each in found:
            config = AlignmentConfig.parse({"target": target, "depth": 1, "tap": tap, "name": each.name, **settings})
            if config.key in self._terms:
                raise UserError(f"A term {config.key!r} already exists: choose another name.")
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
                f"The projector {config.projector!r} needs times and labels, which an aligner does not have: use mlp, linear or conv."
            )
        # On the block's device, as a large network may be spread over several.
        weight = next(block.module.parameters(), None)
        return term.to(None if weight is None else weight.device)

    def _width(
        self, block: NamedBlock, given: int | None, config: AlignmentConfig, features: int, own_target: bool
    ) -> int:
        """Width of the tap; 0 if no projector needs it."""
        if config.projector == "none":
            return 0
        if not features and not own_target and config.target == "features":
            raise UserError(
                f"The projector {config.projector!r} needs the width of the features: call attach(net, {block.name!r}, features=768)."
            )
        width = given or width_of(self._watcher.net, block)
        if width is None:
            raise UserError(
                f"The width of the tokens of {block.name} is unknown: pass hidden_dim=..., their number of channels."
            )
        return width

    def weight(self, name: str) -> float:
        """Lambda of a term at this step."""
        return self._term_called(name).term.weight(self.steps)

    @property
    def active(self) -> bool:
        """Whether any term with a nonzero weight at this step reads features. If not, the encoder need not run."""
        terms = [attached.term for attached in self._terms.values()]
        return any(term.weight(self.steps) and term.config.target == "features" for term in terms)

    def forward(
        self, features: Given = None, *, t: Tensor | None = None, grid: tuple[int, ...] | None = None
    ) -> Tensor:
        """The weighted sum of the terms for the network's last pass, a scalar to add to the loss.

        Args:
            features: features of the clean images: tokens (N, M, F), for a video (N, frames, M, F), attention logits
                (N, h, M, M), or the output of an encoder of `repa.encoders`; or a dictionary of these by term.
            t: (N,) times in [0, 1], 0 is data, for terms with `times` or `time_weight`.
            grid: token grid of this batch, if it changes between batches and the network's input is packed.

        Raises:
            UserError: the network has not run since the last call, or shapes do not match.
        """
        total: Tensor | float = 0.0
        self.values = {}
        if not self._terms:
            raise UserError("This aligner has no terms because it was detached: call attach again.")
        for name, attached in self._terms.items():
            weight = attached.term.weight(self.steps)
            if weight == 0:
                total = total + attached.term.zero_loss()
                continue
            loss = self._loss(name, attached, features, t, grid)
            self.values[name] = loss.detach().mean()
            total = total + weight * loss.mean()
        # Cleared: the next call must not read this pass again, and its activations would stay in memory until then.
        self._watcher.record.begin(None)
        return total if isinstance(total, Tensor) else torch.tensor(total)

    def loss(self, features: Given = None, **more: Any) -> Tensor:
        """The same as a call, for a single process; see `forward`.

        Raises:
            UserError: several processes, whose projectors would diverge: wrap the aligner like the network, and call it.
        """
        if dist.world() > 1 and any(p.requires_grad for p in self.parameters()):
            raise UserError(
                "With several processes the gradients of projectors must be averaged: wrap the aligner like the network (DDP or "
                "accelerator.prepare) and call it, aligner(features), instead of its loss."
            )
        return self(features, **more)

    def taps(self) -> dict[str, Tensor]:
        """Term -> tokens (N, T, D) of the network's last pass, for analysis or as features for another network's aligner."""
        return {name: self._tokens(attached.block, attached, None).tokens for name, attached in self._terms.items()}

    def step(self) -> None:
        """Advance the schedules after an optimiser step."""
        self.steps += 1
        for name, attached in self._terms.items():
            schedule = attached.term.schedule
            # The mean over processes: a schedule that stopped in only one process would make their gradients differ.
            if hasattr(schedule, "watches") and schedule.watches(self.steps) and name in self.values:
                schedule.observe(self.steps, float(dist.mean_over(self.values[name])))

    def detach(self) -> None:
        """Remove the hooks from the network, which is then unchanged."""
        self._watcher.close()
        self._terms.clear()

    def get_extra_state(self) -> Tensor:
        """State of the schedules as bytes of JSON in a tensor, because safetensors stores only tensors."""
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
            raise UserError(f"The aligner's state is damaged or belongs to other terms: {error}.") from error
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
        """A table for notebooks: each term with its tap, its current weight and its last loss."""
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
        student, grid = self._student(attached, grid)
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
                f"Without a projector the loss {term.config.loss!r} needs equal widths, but block {attached.block} has "
                f"{student.shape[2]} and the target has {target.shape[2]}: use projector='mlp', or loss='gram'."
            )
        # Without autocast, a half-precision network outputs taps that a float32 projector cannot multiply.
        weight = next(term.parameters(), None)
        if weight is not None and not torch.is_autocast_enabled(student.device.type):
            student = student.to(weight.dtype)
        if compares("frames", term.loss):
            if frames > 1 and parse_spec(term.config.loss)[1].get("frames", frames) != frames:
                raise UserError(
                    f"Block {attached.block} outputs {frames} frames, but the loss is {term.config.loss!r}: set frames={frames}."
                )
            loss = term.compare(student, target, grid=rows_columns, frames=frames)  # (N,)
        else:  # every frame is an image
            loss = term.compare(student, target, grid=rows_columns).unflatten(0, (-1, frames)).mean(1)  # (N,)
        return term.at_times(loss, t)

    def _student(self, attached: "_AttachedTerm", grid: tuple[int, ...] | None) -> Tokens:
        """Tokens of the term's block, checked to train the block and to fit the projector."""
        student, grid = self._tokens(attached.block, attached, grid)
        if attached.term.config.measure_only:
            student = student.detach()
        elif torch.is_grad_enabled() and not student.requires_grad:
            raise UserError(
                f"The output of block {attached.block} has no gradient: train weights of this block or of an earlier one, and do not run "
                "the network under no_grad."
            )
        if attached.width and student.shape[2] != attached.width:
            raise UserError(
                f"Block {attached.block} outputs tokens of width {student.shape[2]}, but its projector was built for {attached.width}: "
                f"attach with hidden_dim={student.shape[2]}."
            )
        return Tokens(student, grid)

    def _tokens(self, block: str, attached: "_AttachedTerm", grid: tuple[int, ...] | None) -> Tokens:
        record = self._watcher.record
        if block not in record.passes:
            raise UserError(
                f"Block {block} has not run since the last call of the aligner: run the network first. If the network is compiled, "
                "attach before its first run."
            )
        grid = checked_grid(grid) if grid is not None else attached.grid
        seen, patch = record.passes[block], self._watcher.patch
        return image_tokens(
            seen, record.image, patch, where=block, grid=grid, output=attached.output, text=attached.text
        )

    def _attention(self, attached: "_AttachedTerm", grid: tuple[int, ...] | None) -> Tensor:
        """Attention logits (N, h, T, T) between the tokens of the image."""
        logits = self._watcher.record.attention.get(attached.block)
        if logits is None:
            raise UserError(
                f"No self-attention of block {attached.block} was recorded: it must run before the aligner, call PyTorch's "
                "scaled_dot_product_attention, and not be compiled. Otherwise use tap='hidden'."
            )
        number = self._tokens(attached.block, attached, grid).tokens.shape[1]
        cut = slice(logits.shape[-1] - number, None) if attached.text == "front" else slice(number)
        return logits[..., cut, cut]


class _AttachedTerm(NamedTuple):
    """A term and its tap; see `Aligner.add`."""

    term: Alignment
    block: str
    other: str | None  # the block that is its target
    grid: Grid | None
    output: int | str | None
    text: str
    width: int  # width of the tap if a projector needs it, else 0

    @property
    def target_name(self) -> str:
        """The target by name."""
        return self.other or self.term.config.target
