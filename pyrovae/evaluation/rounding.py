"""How much rounding changes log p(x): the error that another precision than float32 makes, on the same draws."""

import torch
from torch import Tensor

from pyrovae.compiled.compiler import float32_products
from pyrovae.evaluation.drawing import draw
from pyrovae.programs.pair import Block, EncodesOnce, Pair, encode_once
from pyrovae.programs.particles import collect_chunks

__all__ = ["measured_rounding"]

# Rounding is measured with 1 % as many weights as the evaluation has, at least one chunk and at most _MOST_MEASURED,
# because all are kept at once. Each is drawn eagerly in both precisions, which takes about 4 % of the time.
_MEASURED_DATA, _MEASURED_PART, _MOST_MEASURED = 32, 100, 2**19


@torch.no_grad()
def measured_rounding(exact: Pair, rounded: Pair, num_particles: int, vectorised: bool, medium: bool) -> Tensor:
    """How much rounding changes log p(x): the estimate with rounding minus the one without, from the same draws.

    Measured on some data, evenly spaced, with fewer particles than the evaluation if all would take too long. The
    differences are then larger than those of the evaluation, because rounding averages out over fewer particles. torch's
    generators keep their state.

    Returns:
        (N,) in nats; NaN for data on which it is not measured.
    """
    positions, block = _some_data(exact)
    count = len(positions)
    total = max(min(exact.num_data * num_particles // _MEASURED_PART, _MOST_MEASURED), exact.rows)
    size = max(1, min(num_particles, total // count))
    if not vectorised:  # a particle takes a run of its own, in which the number of data matters little
        size = min(size, max(1, num_particles // _MEASURED_PART))
    devices = list(range(torch.cuda.device_count())) if exact.is_cuda else []

    def chunk(size: int | None, _: bool) -> Tensor:
        with torch.random.fork_rng(devices), float32_products():
            without = draw(exact, block, size).log_weights
        with float32_products(medium):
            return torch.cat([without, draw(rounded, block, size).log_weights], 1)

    chunk_size = max(1, exact.rows // count) if vectorised else None
    with torch.random.fork_rng(devices):
        weights, _ = collect_chunks(chunk, lambda weights: weights, size, chunk_size, count)
    without, log_prob = weights.double().cpu().logsumexp(0).split(count)
    rounding = torch.full((exact.num_data,), torch.nan, dtype=torch.float64)
    rounding[positions] = torch.where(log_prob == without, 0.0, log_prob - without)  # -inf is equal to -inf
    return rounding


def _some_data(pair: Pair) -> tuple[Tensor, Block]:
    """Some data of a pair, evenly spaced: their positions, and a block of them. All data if they cannot be cut."""
    if pair.split_size is None:
        return torch.arange(pair.num_data), pair.block(0, pair.num_data)
    count = min(pair.num_data, _MEASURED_DATA)
    positions = torch.arange(count) * (pair.num_data - 1) // max(1, count - 1)
    args, kwargs = pair.cut(positions)
    guide = pair.guide.outline() if isinstance(pair.guide, EncodesOnce) else pair.guide  # any proposals will do
    return positions, Block(args, kwargs, pair.layout_of(0, count), encode_once(guide, args, kwargs))
