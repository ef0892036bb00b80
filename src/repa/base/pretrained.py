"""Frozen pretrained networks: their common base, loading one from a spec, and their folders in the Hugging Face hub's format."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import nn

from repa.base import files, trust
from repa.base.device import checked_device
from repa.base.errors import UserError
from repa.base.registry import Registry, parse_spec

CONFIG, ADAPTER, INDEX = "config.json", "adapter_config.json", ".index.json"


class Frozen(nn.Module):
    """A module that is always in eval mode: a target must not change when the model around it trains."""

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode."""
        return super().train(False)

    def round_weights(self, dtype: torch.dtype) -> None:
        """Store the weights of linear layers and convolutions in `dtype`, for use under an autocast to it.

        Autocast would round them in every forward pass: results are bit-identical with half the memory (T5-XXL has 19 GB
        in float32). Norms and positions keep float32, in which they compute under autocast.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.to(dtype)


Kind = TypeVar("Kind", bound=Frozen)


def load_frozen(
    registry: Registry, kind: type[Kind], spec: str, weights: str | Path | None, device: str | torch.device
) -> Kind:
    """The network of a spec, in eval mode and without gradients; a spec names a `kind`, or a function (name, weights)
    -> `kind`.

    Raises:
        UserError: unknown name, unused weights, weights that are not finite, or a function that returns something else.
    """
    made = registry.build(spec)
    if not isinstance(made, kind):
        made = made(parse_spec(spec)[0], weights)
    elif weights is not None:
        raise UserError(f"The {registry.kind} {spec!r} needs no weights, but got {weights}: leave them out.")
    made = registry.instance(spec, made, kind).to(checked_device(device)).requires_grad_(False).eval()
    # A sum is the cheapest test: it reads every number once and stores none.
    if spoilt := next((name for name, p in made.named_parameters() if not p.sum(dtype=torch.float32).isfinite()), None):
        raise UserError(
            f"The weights of the {registry.kind} {spec!r} have numbers that are not finite, in {spoilt}: download or copy them again."
        )
    return made


def given_weights(weights: str | Path | None, what: str) -> Path | None:
    """The path that a user gave; UserError if it does not exist."""
    # A shell does not expand the ~ of ENCODER=~/folder.
    path = Path(weights).expanduser() if weights else None
    if path is not None and not path.exists():
        raise UserError(f"weights={path} for the {what} does not exist: give an existing file or folder.")
    return path


def weights_named(stem: str, pickled: str) -> tuple[str, ...]:
    """The files that may hold weights, as one file or an index of parts, in the order in which a library looks for them."""
    return tuple(f"{name}{end}" for name in (f"{stem}.safetensors", f"{pickled}.bin") for end in ("", INDEX))


class Repository(NamedTuple):
    """A model of the hub, or a folder with the same files."""

    what: str
    """In messages, as "encoder dinov2-b"."""
    name: str
    """owner/name on the hub."""
    groups: tuple[tuple[str, ...], ...]
    """A folder needs one file of each group; errors name the first."""
    by_hand: str
    """What to do without the hub, such as "give FOLDER"."""
    subfolder: str = ""

    def folder(self) -> Path:
        """The folder in the hub's cache; missing files are downloaded."""
        return self.cached() or self.fetched()

    def cached(self) -> Path | None:
        """The folder in the hub's cache, if complete. Makes no request, so nothing waits for a time-out offline."""
        from huggingface_hub import try_to_load_from_cache

        path = try_to_load_from_cache(self.name, f"{self.subfolder}/{CONFIG}".lstrip("/"))
        if not isinstance(path, str):
            return None
        # An interrupted download leaves a folder without its weights, or without parts of them.
        return None if self.lacks(Path(path).parent) else Path(path).parent

    def fetched(self, revision: str | None = None, token: str | None = None) -> Path:
        """The folder in the hub's cache, updated from the hub.

        Raises:
            UserError: the hub has no such repository, asks for a licence, or cannot be reached.
        """
        from huggingface_hub import constants, snapshot_download
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

        remedy = "check its name and the internet connection"
        try:
            # Pickled files are used only from repositories without safetensors.
            for pickled in (False, True):
                wanted = self._patterns(pickled)
                root = snapshot_download(self.name, allow_patterns=wanted, revision=revision, token=token)
                if not (absent := self.lacks(folder := Path(root, self.subfolder))):
                    return folder
            reason = f"it has no {absent}"
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            if constants.HF_HUB_OFFLINE and isinstance(error, LocalEntryNotFoundError):  # whose own text is long
                reason, remedy = "HF_HUB_OFFLINE is set", "unset it"
            elif isinstance(error, GatedRepoError):
                remedy = "accept its licence on the hub's page and log in (hf auth login)"
        raise UserError(
            f"The {self.what} ({self.name}) is not on this machine and could not be downloaded from the hub ({reason}): {remedy}, or "
            f"{self.by_hand}."
        )

    def _patterns(self, pickled: bool) -> list[str]:
        names = [name for group in self.groups for name in group if pickled or ".bin" not in name]
        # model.safetensors.index.json -> model-*.safetensors
        parts = [name.removesuffix(INDEX).replace(".", "-*.", 1) for name in names if name.endswith(INDEX)]
        return [f"{self.subfolder}/{pattern}".lstrip("/") for pattern in (*names, *parts)]

    def lacks(self, folder: Path) -> str:
        """The first missing file of a folder; empty if it is complete."""
        return next((group[0] for group in self.groups if not found_of(group, folder)), "")

    def check(self, folder: Path, kinds: Sequence[str], key: str = "model_type") -> dict[str, Any]:
        """The configuration of a folder; its `key` must be one of `kinds`.

        Raises:
            UserError: a file is missing, the model is of another kind, or its library would fetch code or read other
                files.
        """
        if name := self.lacks(folder):
            raise UserError(f"{folder} holds no {name}, which the {self.what} needs: {self.by_hand}.")
        # transformers would read the network that an adapter names, wherever it is.
        if (folder / ADAPTER).exists():
            raise UserError(f"{folder} holds an {ADAPTER}: merge the adapter into the weights, and remove the file.")
        trust.require_own_weights(folder)
        config = files.read_object(folder / CONFIG)
        trust.require_plain_model(config, folder / CONFIG)
        if (found := config.get(key)) not in kinds:
            allowed = " or ".join(map(repr, kinds))
            raise UserError(
                f"{folder} holds a model of type {found!r:.80}, but the {self.what} is of type {allowed}: give its own folder."
            )
        return config


def found_of(group: Sequence[str], folder: Path) -> list[Path]:
    """The file of a group that a library reads, or its parts if it is an index; empty if one of them is missing."""
    name = next((name for name in group if (folder / name).is_file()), None)
    if name is None:
        return []
    paths = [folder / name]
    if name.endswith(INDEX):
        paths = sorted(
            {folder / str(part) for part in files.read_object(paths[0], weight_map=dict)["weight_map"].values()}
        )
    return paths if all(path.is_file() for path in paths) else []
