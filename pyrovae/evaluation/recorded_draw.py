"""Drawing a chunk of log weights with a recorded program, without Pyro's overhead."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyrovae.common.arguments import map_tensors
from pyrovae.compiled.record import Recording, record

__all__ = ["RecordedDraw", "record_draw"]

Draw = Callable[[Tensor | None, tuple, dict], Tensor]


def record_draw(
    draw: Draw, modules: Sequence[nn.Module], encoded: Tensor | None, args: tuple, kwargs: dict, medium: bool = False
) -> "RecordedDraw | None":
    """Record draw(encoded, args, kwargs) -> log weights (S, N); return None and log the reason if that fails.

    `medium` allows bfloat16 inside the products of float32 matrices: see `float32_products`.
    """

    def flat(*tensors: Tensor) -> tuple[Tensor]:
        rest = iter(tensors)
        given = None if encoded is None else next(rest)
        return (draw(given, *map_tensors(lambda _: next(rest), (args, kwargs))),)

    recording = record(flat, modules, _flatten(encoded, args, kwargs), medium=medium)
    return None if recording is None else RecordedDraw(draw, recording)


class RecordedDraw(NamedTuple):
    """Draws by the recorded program, and again eagerly if a weight is NaN or +inf, so that the error names the site."""

    draw: Draw
    recording: Recording

    def given(self, encoded: Tensor | None, args: tuple, kwargs: dict) -> Callable[[], Tensor]:
        """Return a function that draws the next chunk for these data."""
        tensors = _flatten(encoded, args, kwargs)
        devices = {tensor.device for tensor in (*tensors, *self.recording.modules.parameters()) if tensor.is_cuda}
        run = self.recording.at(*tensors)

        def drawn() -> Tensor:
            before = torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in devices}
            (log_weights,), _ = run()
            if (log_weights < torch.inf).all():
                return log_weights
            torch.set_rng_state(before[0])
            for device, state in before[1].items():
                torch.cuda.set_rng_state(state, device)
            return self.draw(encoded, args, kwargs)

        return drawn


def _flatten(encoded: Tensor | None, args: tuple, kwargs: dict) -> list[Tensor]:
    tensors: list[Any] = [] if encoded is None else [encoded]
    map_tensors(tensors.append, (args, kwargs))
    return tensors
