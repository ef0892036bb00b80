"""Outputs of blocks of any network in its last pass: blocks are found by name and recorded by hooks.

torch.compile traces hooks that only store values like the rest of a network, without a graph break, if they were registered
before compilation.
"""

import inspect
import math
import weakref
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from repa.base.errors import UserError, nearest, require_type

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # parts of names added by wrappers
Grid = tuple[int, ...]  # (rows, columns), or (frames, rows, columns) of a video


class NamedBlock(NamedTuple):
    """A module, and its name in the network without the parts added by wrappers."""

    name: str
    module: nn.Module


def find_blocks(net: nn.Module, pattern: str) -> list[NamedBlock]:
    """Modules by name, "transformer_blocks.7", or by a pattern with * and [4-8], which match within one part of a name.

    A name may lack its leading parts, so that it also works for a wrapped network.

    Raises:
        UserError: no module matches, or several match a name without * or [; the message lists candidates.
    """
    require_type(pattern, str, "A block is given by its name, such as 'transformer_blocks.7'")
    found = {}
    for name, module in net.named_modules():
        parts = tuple(part for part in name.split(".") if part and part not in WRAPPERS)
        if parts and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            # A wrapper comes before its module and has the same name without the wrapper's part, so the later one, the
            # module to hook, replaces it.
            found[parts] = module
    wanted = tuple(pattern.split("."))
    # A complete name takes precedence over the same name in another module: "blocks.0" must not also match
    # "head.blocks.0".
    whole = [parts for parts in found if _matches(parts, wanted)]
    matching = whole or [parts for parts in found if _matches(parts[-len(wanted) :], wanted)]
    if not matching:
        near = [".".join(parts) for parts in found if len(parts) <= len(wanted) + 1]
        raise UserError(
            f"{type(net).__name__} has no block {pattern!r}: it has {_candidates(net)}.{nearest(pattern, near)}"
        )
    if len(matching) > 1 and not any(sign in pattern for sign in "*?["):
        names = ", ".join(".".join(parts) for parts in matching[:4])
        raise UserError(
            f"{pattern!r} matches {len(matching)} blocks of {type(net).__name__} ({names} ...): give the complete name, or a "
            f"pattern with * for all."
        )
    return [NamedBlock(".".join(parts), found[parts]) for parts in matching]


def _matches(parts: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _candidates(net: nn.Module) -> str:
    """The outermost lists of blocks, "transformer_blocks.0 to .27", and the modules without a list."""
    found: list[str] = []
    lists: list[str] = []
    for name, module in net.named_modules():
        if any(name.startswith(f"{outer}.") for outer in lists):
            continue
        if isinstance(module, nn.ModuleList) and len(module):
            lists.append(name)
            found.append(f"{name}.0 to .{len(module) - 1}" if len(module) > 1 else f"{name}.0")
    found += [
        name for name, child in net.named_children() if name.endswith("block") and not isinstance(child, nn.ModuleList)
    ]
    found = found or [name for name, _ in net.named_children()]
    return ", ".join(found[:8]) + (" ..." if len(found) > 8 else "") if found else "no parts"


class Pass(NamedTuple):
    """Input and output of a block in a pass."""

    output: Any
    shape: tuple[int, ...] | None
    """Shape of the block's first argument."""


class Record:
    """The recorded values of a network's last pass. Copies of its owner share it."""

    def __init__(self) -> None:
        self.image: tuple[int, ...] | None = None  # shape of the network's first argument
        self.passes: dict[str, Pass] = {}
        self.attention: dict[str, Tensor] = {}
        self.handles: list[Any] = []

    def begin(self, image: tuple[int, ...] | None) -> None:
        """Clear the record at the start of a pass on an input of this shape."""
        self.image = image
        self.passes.clear()
        self.attention.clear()

    def __deepcopy__(self, memo: dict) -> "Record":
        return self

    def __reduce__(self) -> tuple:  # activations and handles belong to this process
        return Record, ()


class Watcher:
    """Records the outputs of a network's blocks.

    Args:
        net: may be wrapped by DDP, torch.compile or peft; must be watched before compilation.
    """

    def __init__(self, net: nn.Module):
        require_type(net, nn.Module, "The network must be a torch.nn.Module")
        inner = unwrapped(net)
        self.record, self.first, self.kind = Record(), _first_parameter(inner), type(inner).__name__
        self.patch = _patch_size(inner)
        # A weak reference, so that watching a network does not keep it in memory.
        self._net: Callable[[], nn.Module | None] = weakref.ref(net)
        for module in _called(net):
            self._keep(module.register_forward_pre_hook(_Begin(self.record, self.first), with_kwargs=True))

    def __reduce__(self) -> tuple:
        return _unattached, (self.first, self.kind, self.patch)

    def __deepcopy__(self, memo: dict) -> "Watcher":
        return self

    @property
    def net(self) -> nn.Module:
        net = self._net()
        if net is None:
            raise UserError("The network of this aligner was deleted: keep a reference to it, and attach again.")
        return net

    def watch(self, block: NamedBlock, *, attention: bool = False) -> None:
        """Record a block's output in each later pass, and with `attention` the logits of its first self-attention."""
        if attention:
            watcher = _Attention(block.name, self.record)
            self._keep(block.module.register_forward_pre_hook(watcher.enter))
            # always_call: the mode must also end after an error in the block, or it would stay active.
            self._keep(block.module.register_forward_hook(watcher.leave, always_call=True))
        hook = _See(self.record, _first_parameter(block.module), block.name)
        self._keep(block.module.register_forward_hook(hook, with_kwargs=True))

    def close(self) -> None:
        for handle in self.record.handles:
            handle.remove()
        self.record.handles.clear()
        self.record.begin(None)

    def _keep(self, handle: Any) -> None:
        self.record.handles.append(handle)


def _unattached(first: str, kind: str, patch: Grid | None) -> Watcher:
    """A watcher after unpickling, which records nothing until it is attached again."""
    watcher = object.__new__(Watcher)
    watcher.record, watcher.first, watcher.kind, watcher.patch = Record(), first, kind, patch
    watcher._net = lambda: None
    return watcher


class _Hook:
    """Writes to a record. A class and not a closure, so that a copy of the network, such as its average, does not write to it."""

    def __init__(self, record: Record, first: str, name: str = ""):
        self.record, self.first, self.name = record, first, name

    def __deepcopy__(self, memo: dict) -> Self:
        return type(self)(Record(), self.first, self.name)


class _Begin(_Hook):
    """Starts a pass."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.record.begin(_shape(args, kwargs, self.first))


class _See(_Hook):
    """Records a block's output."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not _recomputed():
            self.record.passes[self.name] = Pass(output, _shape(args, kwargs, self.first))


class _Attention(TorchFunctionMode):
    """Computes the logits of a block's first self-attention from its arguments, so they include norms and rotations."""

    def __init__(self, name: str, record: Record):
        super().__init__()
        self.name, self.record = name, record

    def __deepcopy__(self, memo: dict) -> "_Attention":
        return _Attention(self.name, Record())

    def enter(self, module: nn.Module, args: tuple) -> None:
        self.__enter__()

    def leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.__exit__(None, None, None)

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and self.name not in self.record.attention and not _recomputed():
            query, key = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key")))
            # Cross-attention has another number of keys; only self-attention is recorded.
            if query.shape[-2] == key.shape[-2]:
                key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)  # grouped queries
                scale = kwargs.get("scale") or query.shape[-1] ** -0.5
                self.record.attention[self.name] = query @ key.mT * scale  # (N, h, T, T)
        return function(*args, **kwargs)


def _recomputed() -> bool:
    """Whether this is a recomputation of activation checkpointing in the backward pass, which must not be recorded."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def unwrapped(net: nn.Module) -> nn.Module:
    """The network inside DDP, torch.compile and peft."""
    return _called(net)[-1]


def _called(net: nn.Module) -> list[nn.Module]:
    """The network, and before it peft's wrappers, which call its forward without its hooks."""
    found = []
    while True:
        if isinstance(net, nn.parallel.DistributedDataParallel):
            net = net.module
        elif (compiled := getattr(net, "_orig_mod", None)) is not None:
            net = compiled
        # A peft wrapper, recognised by its method, because the class would require importing peft.
        elif (base := getattr(net, "get_base_model", None)) is not None:
            found.append(net)
            net = base()
        else:
            return [*found, net]


def width_of(net: nn.Module, block: NamedBlock) -> int | None:
    """Channels of a block's output, if an attribute of block, network or a module between them gives them; None if unknown."""
    resnets = getattr(block.module, "resnets", None)
    widths = [getattr(resnets[-1] if resnets else block.module, "out_channels", None)]
    owner: Any = unwrapped(net)
    for part in block.name.split("."):
        config = getattr(owner, "config", None)
        widths += [vars(owner).get(name) for name in ("inner_dim", "hidden_dim", "hidden_size", "embed_dim")]
        widths += [getattr(config, name, None) for name in ("hidden_size", "dim")]
        widths += [_product(config, "num_attention_heads", "attention_head_dim")]
        # The block is the last part of the name; names do not include wrappers.
        if not isinstance(owner := getattr(owner, part, None), nn.Module):
            break
    for value in widths:
        if type(value) is int and value > 0:
            return value
    return None


def _product(config: Any, *names: str) -> int | None:
    values = [value for name in names if type(value := getattr(config, name, None)) is int]
    return math.prod(values) if len(values) == len(names) else None


def _patch_size(net: nn.Module) -> Grid | None:
    """Patch size in latent pixels, (rows, columns) or (frames, rows, columns); None if the network does not give it."""
    value = getattr(getattr(net, "config", net), "patch_size", None)
    if type(value) is int and value > 0:
        return value, value
    if isinstance(value, (tuple, list)) and len(value) in (2, 3) and all(type(v) is int and v > 0 for v in value):
        return tuple(value)
    return None


def _first_parameter(module: nn.Module) -> str:
    names = [p.name for p in inspect.signature(module.forward).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    return names[0] if names else ""


def _shape(args: tuple, kwargs: dict, first: str) -> tuple[int, ...] | None:
    """Shape of the first argument, or of the first tensor in it if it is a dictionary of several."""
    value = args[0] if args else kwargs.get(first)
    if isinstance(value, dict):
        value = next(iter(value.values()), None)
    return tuple(value.shape) if isinstance(value, Tensor) else None
