"""Validation: measure the bounds on the same data, in the same order and with the same noise, after every epoch."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from pyro.infer import ELBO, Trace_ELBO
from torch.utils.data import DataLoader

from pyrovae.common.random_numbers import seeded
from pyrovae.data.forms import Batch, as_batch, is_stream
from pyrovae.programs.reach import evaluation_mode
from pyrovae.programs.traces import Program
from pyrovae.training.batches import Batches, form_of, on_device, read_items, transformed
from pyrovae.training.loaders import in_one_order, length_of
from pyrovae.training.losses import EpochSums, ReportingLoss, bound_name, elbo_of, pyro_checks, sums_out

__all__ = ["ValidationData", "validate", "validate_ends"]

_COLUMNS = ("validation_bound", "validation_elbo", "validation_reconstruction", "validation_kl")
_ROWS, _SEED = 500, 20260101


class ValidationData:
    """The validation data of a run, as the programs take them.

    Data with the several items of the training data go through its transform, too: `lambda batch: batch[0]` leaves the
    labels of both out. A single tensor does not: it is what the programs are called with.

    Args:
        data: what `fit` takes to train on: data in memory, a `Dataset` or a `DataLoader`.
        train: the training data.

    Attributes:
        device: device of the blocks.
        is_cut: whether data in memory are cut into blocks; not if a latent is shared by all of them.

    Raises:
        TypeError, ValueError: if the data cannot be what programs are called with, or there are none.
    """

    def __init__(self, data: Any, train: Batches):
        self.train, self.device, self.is_cut = train, train.device, True
        self.transform = getattr(train, "of_items", train.transform)
        self.items: Batch | None = None
        self.stream: Any = None
        if not is_stream(data):
            self.items = read_items("validation", data, self.transform, train.numbers).to(self.device)
        else:
            self.stream = data
            if not isinstance(data, DataLoader):
                length_of(data, "validation")

    def blocks(self, size: int, only_ends: bool = False) -> Iterator[Batch]:
        """Yield the data in blocks, of `size` data unless a `DataLoader` makes them; only the first and last (of a
        stream, only the first), if `only_ends`.
        """
        if self.items is not None:
            for block in self.items.blocks(size if self.is_cut else self.items.num_data, only_ends):
                yield (block if self.transform is None else self._made(block.form)).by_position()
            return
        loader = self.stream
        if not isinstance(loader, DataLoader):
            loader = DataLoader(self.stream, batch_size=size)
        found = False
        for item in in_one_order(loader):
            found = True
            yield self._made(item).to(self.device, non_blocking=True).by_position()
            if only_ends:
                break
        if not found:
            raise ValueError("validation must have at least one batch, found a DataLoader that gave none")

    def _made(self, item: Any) -> Batch:
        form, numbers = form_of(item), self.train.numbers
        if self.transform is not None and form is not None and form == self.train.form:
            return transformed(on_device(item, numbers, self.device), self.transform, numbers)
        return as_batch(item, numbers, "validation")


def validate(
    model: Program, guide: Program, data: ValidationData | Batch | None, loss: ELBO, batch_size: int
) -> dict[str, float]:
    """Measure the bounds on validation data, with the same noise at every call.

    Args:
        model, guide: the programs.
        data: validation data, or None.
        loss: loss of the training.
        batch_size: batch size of the training, because that many data are known to fit with the particles of the loss.

    Returns:
        Columns of the history, in nats per datum; NaN without data. validation_bound chooses the best epoch. It is the
        importance-weighted bound, with as many particles, if that is trained (`bound_name`); the loss itself for
        losses that sum latents out; otherwise the ELBO, however the objective weighs its parts. validation_elbo,
        validation_reconstruction and validation_kl use the same particles; the last two are NaN if latents are summed
        out.
    """
    if data is None:  # use no random numbers
        return dict.fromkeys(_COLUMNS, math.nan)
    return _measured(model, guide, data.blocks(_rows(loss, batch_size)), loss, data.device)


def validate_ends(
    model: Program,
    guide: Program,
    data: ValidationData,
    loss: ELBO,
    batch_size: int,
    check: Callable[[Batch], object],
) -> None:
    """Run `check` and `validate` on the first and the last block of the data only, to see that the programs accept them;
    of a stream, on the first.
    """

    def blocks() -> Iterator[Batch]:
        for block in data.blocks(_rows(loss, batch_size), only_ends=True):
            check(block)
            yield block

    _measured(model, guide, blocks(), loss, data.device)


def _measured(
    model: Program, guide: Program, blocks: Iterable[Batch], loss: ELBO, device: torch.device
) -> dict[str, float]:
    by_loss = _is_measured_by_loss(loss)
    reporting = ReportingLoss(loss if by_loss else Trace_ELBO())
    sums, num_data = torch.zeros(len(_COLUMNS), dtype=torch.float64), 0
    with seeded(_SEED, device), evaluation_mode(model, guide), torch.no_grad(), pyro_checks(False):
        for block in blocks:
            try:
                value, parts = reporting.loss(model, guide, *block.args, **block.kwargs)
            except (TypeError, ValueError, RuntimeError) as error:
                error.args = (f"with the data of validation=: {error}",)
                raise
            of_block = EpochSums()
            of_block.add(parts, block.num_data)
            elbo, reconstruction, kl = of_block.means()
            bound = -value / of_block.num_data if by_loss else elbo
            elbo = elbo_of(loss, elbo, bound)
            sums += block.num_data * torch.tensor([bound, elbo, reconstruction, kl], dtype=torch.float64)
            num_data += block.num_data
    return dict(zip(_COLUMNS, (sums / num_data).tolist(), strict=True))


def _is_measured_by_loss(loss: ELBO) -> bool:
    # Latents that the loss sums out are not in the guide: drawing them would take them from the prior.
    return bound_name(loss) != "ELBO" or sums_out(loss)


def _rows(loss: ELBO, batch_size: int) -> int:
    return batch_size if _is_measured_by_loss(loss) else _ROWS
