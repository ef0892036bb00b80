"""Which blocks the prediction hangs on: leave one out at a time, and see how far the prediction moves (AG-REPA, arXiv 2603.01006)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from repa.analysis.config import DepthConfig
from repa.analysis.images import batches, check_run, device_of, latents, spread
from repa.base.rng import SampleStreams
from repa.data import DataSet
from repa.diffusion import interpolate
from repa.models import Backbone, Condition
from repa.runs import LoadedRun


@torch.inference_mode()
def depth_effects(
    run: LoadedRun, data: DataSet, config: DepthConfig, progress: Callable[[int, int], None] = lambda done, total: None
) -> list[dict[str, Any]]:
    """Rows {t, depth, change, share}: the mean over images of |v - v without the block| / |v|, and its share of all blocks' sum.

    A block is left out by handing on what went into it. Images are noised by a stream each and no class is given, so that
    every block sees the same inputs. Each image costs a forward pass, and one more for each block.

    Raises:
        UserError: a depth that does not exist, or data that the run cannot read.
    """
    depths = check_run(run, data, config.depths)
    indices = spread(data, config.num_images)
    sums = {(t, depth): 0.0 for t in config.times for depth in depths}
    done = 0
    for part in batches(indices, config.batch_size):
        x = latents(run, data, part, config.seed)
        noise = SampleStreams(config.seed, part, x.device).randn_like(x)
        for t in config.times:
            times = torch.full((len(x),), t, device=device_of(run))
            x_t, _ = interpolate(run.path, x, noise, times)
            whole = _prediction(run, x_t, times)
            for depth in depths:
                with left_out(run.model, depth):
                    without = _prediction(run, x_t, times)
                change = (whole - without).flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1).clamp_min(1e-12)
                sums[t, depth] += float(change.double().sum())
        done += len(x)
        progress(done, len(indices))
    rows = [{"t": t, "depth": depth, "change": total / len(indices)} for (t, depth), total in sums.items()]
    of_all = {t: sum(row["change"] for row in rows if row["t"] == t) for t in config.times}
    return [{**row, "share": row["change"] / of_all[row["t"]] if of_all[row["t"]] else 0.0} for row in rows]


class left_out:
    """While the block runs, hand on its input in place of its output: every stream of it, as text and image of an MMDiT."""

    def __init__(self, model: Backbone, depth: int):
        self.block = model.blocks[depth - 1]

    def __enter__(self) -> None:
        self.handle = self.block.register_forward_hook(_as_it_came)

    def __exit__(self, *_: object) -> None:
        self.handle.remove()


def _as_it_came(block: nn.Module, inputs: tuple, output: Any) -> Any:
    if not isinstance(output, tuple):
        return inputs[0]
    streams = [_is_stream(given, made) for given, made in zip(inputs, output, strict=False)]
    return tuple(inputs[i] if i < len(streams) and streams[i] else made for i, made in enumerate(output))


def _is_stream(given: Any, made: Any) -> bool:
    """Do a block's argument and its result at the same place hold the same tokens? Other results, as attention logits, do not."""
    return isinstance(given, Tensor) and isinstance(made, Tensor) and given.shape == made.shape


def _prediction(run: LoadedRun, x_t: Tensor, times: Tensor) -> Tensor:
    condition = run.model.null(Condition(torch.zeros(len(x_t), dtype=torch.int64, device=x_t.device)))
    return run.model({"x": x_t}, run.process.network_time(times), condition).prediction["x"].float()
