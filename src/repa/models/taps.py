"""What blocks of any network gave in its last pass: found by name, seen by hooks.

Hooks that only keep what they see are traced by torch.compile like the rest of a network, without a graph break, when they were
registered before it compiles.
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

from repa.base.errors import UserError, nearest

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")  # parts of names that wrappers add
Grid = tuple[int, ...]  # (rows, columns), or (frames, rows, columns) of a video


class NamedBlock(NamedTuple):
    """A module, and its name in the network without the parts that wrappers add."""

    name: str
    module: nn.Module


def find_blocks(net: nn.Module, pattern: str) -> list[NamedBlock]:
    """Modules by name, "transformer_blocks.7", or by a pattern whose * and [4-8] stay within one part of a name.

    A name may lack what stands in front of it in the network, so that it holds for a wrapped network too.

    Raises:
        UserError: nothing has this name, or several have a name without * or [; the sentence names candidates.
    """
    found = {}
    for name, module in net.named_modules():
        parts = tuple(part for part in name.split(".") if part and part not in WRAPPERS)
        if parts and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            # A wrapper comes before the module that it wraps and has the same name without the wrapper's part: the
            # later one stays, and that is the one to hook.
            found[parts] = module
    wanted = tuple(pattern.split("."))
    # A complete name wins over the same name inside another module: "blocks.0" must not also mean
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
            f"{pattern!r} names {len(matching)} blocks of {type(net).__name__} ({names} ...): write the whole name, or a "
            f"pattern with * to take all."
        )
    return [NamedBlock(".".join(parts), found[parts]) for parts in matching]


def _matches(parts: tuple[str, ...], wanted: tuple[str, ...]) -> bool:
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def _candidates(net: nn.Module) -> str:
    """The outermost lists of blocks, "transformer_blocks.0 to .27", and the parts without a list."""
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
    """What a block was given and gave."""

    output: Any
    shape: tuple[int, ...] | None
    """Of the block's first argument."""


class Record:
    """What was seen in the last pass of one network. Copies of what holds a record share it."""

    def __init__(self) -> None:
        self.image: tuple[int, ...] | None = None  # shape of the network's first argument
        self.passes: dict[str, Pass] = {}
        self.attention: dict[str, Tensor] = {}
        self.handles: list[Any] = []

    def begin(self, image: tuple[int, ...] | None) -> None:
        """Forget the pass before, as another one begins on an input of this shape."""
        self.image = image
        self.passes.clear()
        self.attention.clear()

    def __deepcopy__(self, memo: dict) -> "Record":
        return self

    def __reduce__(self) -> tuple:  # activations and handles belong to this process
        return Record, ()


class Watcher:
    """Watches blocks of one network.

    Args:
        net: may be wrapped by DDP, torch.compile or peft; watched before it is compiled.
    """

    def __init__(self, net: nn.Module):
        inner = unwrapped(net)
        self.record, self.first, self.kind = Record(), _first_parameter(inner), type(inner).__name__
        self.patch = _patch_size(inner)
        # A weak reference: watching a network must not keep it in memory.
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
            raise UserError("The network of this aligner no longer exists: keep a reference to it, and attach again.")
        return net

    def watch(self, block: NamedBlock, *, attention: bool = False) -> None:
        """Record what a block gives in each pass from now on, and with `attention` the logits of its first self-attention."""
        if attention:
            watcher = _Attention(block.name, self.record)
            self._keep(block.module.register_forward_pre_hook(watcher.enter))
            # always_call: after an error in the block the mode must be left too, or it would see all later functions.
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
    """A watcher that was pickled sees nothing until it is attached again."""
    watcher = object.__new__(Watcher)
    watcher.record, watcher.first, watcher.kind, watcher.patch = Record(), first, kind, patch
    watcher._net = lambda: None
    return watcher


class _Hook:
    """Writes to a record. An object and no closure: a copy of the network, its average, must not write to this record."""

    def __init__(self, record: Record, first: str, name: str = ""):
        self.record, self.first, self.name = record, first, name

    def __deepcopy__(self, memo: dict) -> Self:
        return type(self)(Record(), self.first, self.name)


class _Begin(_Hook):
    """A pass begins."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.record.begin(_shape(args, kwargs, self.first))


class _See(_Hook):
    """A block gave something."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not _recomputed():
            self.record.passes[self.name] = Pass(output, _shape(args, kwargs, self.first))


class _Attention(TorchFunctionMode):
    """Computes the logits of the first self-attention within a block, as it is called: norms and rotations are in them."""

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
            # Cross-attention has other keys than queries; only attention among the same tokens is compared.
            if query.shape[-2] == key.shape[-2]:
                key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)  # grouped queries
                scale = kwargs.get("scale") or query.shape[-1] ** -0.5
                self.record.attention[self.name] = query @ key.mT * scale  # (N, h, T, T)
        return function(*args, **kwargs)


def _recomputed() -> bool:
    """Within backward: activation checkpointing runs a block again, and what it gives then is not for the loss."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def unwrapped(net: nn.Module) -> nn.Module:
    """The network within DDP, torch.compile and peft."""
    return _called(net)[-1]


def _called(net: nn.Module) -> list[nn.Module]:
    """The network itself last, and before it what peft wraps around it: that calls its forward, past its hooks."""
    found = []
    while True:
        if isinstance(net, nn.parallel.DistributedDataParallel):
            net = net.module
        elif (compiled := getattr(net, "_orig_mod", None)) is not None:
            net = compiled
        # peft's, known by its method: to ask for the class would import the package.
        elif (base := getattr(net, "get_base_model", None)) is not None:
            found.append(net)
            net = base()
        else:
            return [*found, net]


def width_of(net: nn.Module, block: NamedBlock) -> int | None:
    """Channels of what a block gives, where block or network tell, or a network in it: as U-Nets and transformers of diffusers do."""
    resnets = getattr(block.module, "resnets", None)
    found = [getattr(resnets[-1] if resnets else block.module, "out_channels", None)]
    owner: Any = unwrapped(net)
    for part in block.name.split("."):
        config = getattr(owner, "config", None)
        found += [vars(owner).get(name) for name in ("inner_dim", "hidden_dim", "hidden_size", "embed_dim")]
        found += [getattr(config, name, None) for name in ("hidden_size", "dim")]
        found += [_product(config, "num_attention_heads", "attention_head_dim")]
        # The block itself is the last part of the name; a wrapper stands in no name.
        if not isinstance(owner := getattr(owner, part, None), nn.Module):
            break
    for value in found:
        if type(value) is int and value > 0:
            return value
    return None


def _product(config: Any, *names: str) -> int | None:
    values = [value for name in names if type(value := getattr(config, name, None)) is int]
    return math.prod(values) if len(values) == len(names) else None


def _patch_size(net: nn.Module) -> Grid | None:
    """Pixels of the latent that a token covers, (rows, columns) or (frames, rows, columns), where the network tells."""
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
    """Shape of the first argument; of the first tensor in it, where it is a state of several."""
    value = args[0] if args else kwargs.get(first)
    if isinstance(value, dict):
        value = next(iter(value.values()), None)
    return tuple(value.shape) if isinstance(value, Tensor) else None
