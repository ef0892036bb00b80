"""Measure what a block of SiT-B/2 costs besides its matrix products, in processor time.

    python benchmarks/besides.py --precision bf16

Runs forward and backward of one block on one thread, with the matrix products replaced by uninitialised tensors, so any
CPU will do, even one without bfloat16 products. The best of several rounds is printed, followed by the operators sorted
by the bytes they read and write. Then come GELU and, in bfloat16, attention, each next to its slow version. Last comes
the optimizer update of as many weights as a block has: it is limited by memory bandwidth, so its GB/s gives a lower
bound for the time that the block's bytes take.
"""

import argparse
import contextlib
import functools
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor.graph import GraphLowering
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from repa.base.device import autocast
from repa.base.launch import keep_freed_memory
from repa.models.layers import Block, attend, by_head, gelu

CPU = torch.device("cpu")
IMAGES, TOKENS, WIDTH, HEADS = 8, 256, 768, 12
OF_UPDATE = 4 * (1 + 7 + 3)  # bytes per weight that the norm, AdamW and the average read and write
PRODUCTS = ("mm", "addmm", "bmm")
WITHOUT_BYTES = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "_unsafe_view", *PRODUCTS}


class Bytes(TorchDispatchMode):
    """Adds up the bytes that operators read and write, and counts their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if not function.is_view and name not in WITHOUT_BYTES and isinstance(out, Tensor | tuple | list):
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.bytes[name] += sum(x.numel() * x.element_size() for x in tensors)
            self.calls[name] += 1
        return out


def without_products() -> torch.library.Library:
    """Make matrix products return uninitialised tensors for as long as the returned library is alive."""
    library = torch.library.Library("aten", "IMPL")
    warnings.filterwarnings("ignore", message="Warning only once for all operators")

    def product(a: Tensor, b: Tensor) -> Tensor:
        return a.new_empty(*a.shape[:-1], b.shape[-1])

    def written(*factors: Tensor, out: Tensor, **_: Any) -> Tensor:  # compiled code passes the output
        return out

    for name in ("mm", "bmm"):
        library.impl(name, product, "CPU")
    library.impl("addmm", lambda bias, a, b, **_: product(a, b), "CPU")
    for name in PRODUCTS:
        library.impl(f"{name}.out", written, "CPU")
    return library


@contextlib.contextmanager
def bytes_of_compiled() -> Iterator[list[int]]:
    """The bytes that kernels of graphs compiled in this context read and write, without matrix products."""
    found: list[int] = []
    codegen = GraphLowering.codegen

    def counted(graph: GraphLowering) -> Any:
        made = codegen(graph)
        _, words, _ = graph.count_bytes()  # in words of four bytes
        found.extend(4 * size for node, size in words if not node.is_extern())
        return made

    with mock.patch.object(GraphLowering, "codegen", counted):
        yield found


def unpacked(qkv: Tensor) -> Tensor:
    """The slow version of attention: it copies keys column by column and writes the gradients of q, k and v twice."""
    q, k, v = qkv.unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v


def of_update(weights: int, rounds: int) -> tuple[float, float, float]:
    """Milliseconds for the gradient norm, AdamW and the average."""
    p, average = torch.nn.Parameter(torch.randn(weights)), torch.randn(weights)
    gradient, share = torch.randn(weights), torch.tensor(1e-4)
    p.grad = gradient
    optimizer = torch.optim.AdamW([p], fused=True)
    optimizer.step()
    return (
        best(lambda: torch.nn.utils.get_total_norm([gradient]), rounds),
        best(optimizer.step, rounds),
        best(lambda: torch._foreach_lerp_([average], [p.detach()], [share]), rounds),
    )


def forward_and_backward(kind: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> None:
    torch.autograd.grad(kind(x), x, gradient)


def best(run: Callable[[], object], rounds: int) -> float:
    """Milliseconds of processor time, the best of several rounds."""
    found = []
    for _ in range(rounds):
        begin = time.process_time()
        run()
        found.append(time.process_time() - begin)
    return 1000 * min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32

    hidden = torch.randn(IMAGES, TOKENS, 4 * WIDTH).to(dtype).requires_grad_()
    gradient = torch.randn_like(hidden)
    kinds: dict[str, Callable[[Tensor], Tensor]] = {
        "eager": gelu,
        "compiled, by tanh": torch.compile(lambda x: F.gelu(x, approximate="tanh"), dynamic=False),
        "compiled, ours": torch.compile(gelu, dynamic=False),
    }
    gelus = {
        name: best(functools.partial(forward_and_backward, kind, hidden, gradient), args.rounds)
        for name, kind in kinds.items()
    }

    products = without_products()
    block = Block(WIDTH, HEADS)
    x, condition = torch.randn(IMAGES, TOKENS, WIDTH, requires_grad=True), torch.randn(IMAGES, WIDTH)
    residual = torch.randn(IMAGES, TOKENS, WIDTH)

    def once() -> None:
        with autocast(CPU, args.precision):
            out, _ = block(x, condition)
        out.backward(residual)
        block.zero_grad()
        x.grad = None

    once()
    eager = best(once, args.rounds)
    with Bytes() as counted:
        once()
    block.compile(dynamic=False)
    torch._inductor.config.force_disable_caches = True  # graphs from the cache would not be counted
    with bytes_of_compiled() as kernels:
        once()
    compiled = best(once, args.rounds)
    qkv = torch.randn(IMAGES, TOKENS, 3 * WIDTH).to(dtype).requires_grad_()
    of_heads = torch.randn(IMAGES, HEADS, TOKENS, WIDTH // HEADS).to(dtype)
    kinds = {"ours": lambda x: attend(*by_head(x, HEADS)), "unpacked": unpacked}
    if args.precision == "fp32":  # one fused kernel, products included
        kinds = {}
    attentions = {
        name: best(functools.partial(forward_and_backward, kind, qkv, of_heads), args.rounds)
        for name, kind in kinds.items()
    }
    del products
    print(f"{args.precision}, {IMAGES} images, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}")
    print(f"a block besides its products, forward and backward: eager {eager:.1f} ms, compiled {compiled:.1f} ms")
    print(f"  compiled: {sum(kernels) / 1e6:.0f} MB read and written in {len(kernels)} loops")
    print(f"  eager: {sum(counted.bytes.values()) / 1e6:.0f} MB read and written in {counted.calls.total()} calls")
    for name, size in counted.bytes.most_common(12):
        print(f"  {name:<48}{counted.calls[name]:4}{size / 1e6:8.0f} MB")
    for name, milliseconds in gelus.items():
        print(f"GELU, {name}: {milliseconds:.1f} ms forward and backward")
    for name, milliseconds in attentions.items():
        print(f"attention besides its products, {name}: {milliseconds:.1f} ms forward and backward")
    weights = sum(p.numel() for p in block.parameters())
    norm, adamw, average = of_update(weights, args.rounds)
    print(f"update of {weights / 1e6:.1f}M weights: norm {norm:.1f}, AdamW {adamw:.1f}, average {average:.1f} ms")
    rate = OF_UPDATE * weights / (norm + adamw + average) / 1e6
    print(f"  {OF_UPDATE * weights / 1e6:.0f} MB read and written, {rate:.1f} GB/s")


if __name__ == "__main__":
    main()
