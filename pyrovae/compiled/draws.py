"""Drawing a chunk of log weights with a recorded program, without Pyro's overhead."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyrovae.common.arguments import map_tensors
from pyrovae.compiled.record import Extracted, all_ours, extract
from pyrovae.programs.reach import modules_behind
from pyrovae.programs.traces import Program

__all__ = ["RecordedDraw", "pays_off", "record_draw"]

# Weights times parameters above which compiling saves time on two cores. This is a constant and not measured at run
# time, so that the same call always takes the same path.
_WORTH = 1.5e12

Draw = Callable[[Tensor | None, tuple, dict], Tensor]


def pays_off(num_weights: int, model: Program, guide: Program) -> bool:
    """Whether `compile="auto"` compiles: only known components, and enough work to make up for the compilation."""
    size = sum(parameter.numel() for module in modules_behind(model) for parameter in module.parameters())
    return num_weights * size > _WORTH and all_ours(model, guide)


def record_draw(
    draw: Draw, modules: Sequence[nn.Module], encoded: Tensor | None, args: tuple, kwargs: dict
) -> "RecordedDraw | None":
    """Record draw(encoded, args, kwargs) -> log weights (S, N); return None and log the reason if that fails."""

    def flat(*tensors: Tensor) -> tuple[Tensor]:
        rest = iter(tensors)
        given = None if encoded is None else next(rest)
        return (draw(given, *map_tensors(lambda _: next(rest), (args, kwargs))),)

    extracted = extract(flat, modules, _flatten(encoded, args, kwargs))
    return None if extracted is None else RecordedDraw(draw, extracted)


class RecordedDraw:
    """Draws by the recorded program, and again eagerly if a weight is NaN or +inf, so that the error names the site."""

    def __init__(self, draw: Draw, extracted: Extracted):
        self.draw, self.extracted = draw, extracted

    def given(self, encoded: Tensor | None, args: tuple, kwargs: dict) -> Callable[[], Tensor]:
        """Return a function that draws the next chunk for these data."""
        tensors = _flatten(encoded, args, kwargs)
        devices = {tensor.device for tensor in (*tensors, *self.extracted.modules.parameters()) if tensor.is_cuda}
        run = self.extracted.at(*tensors)

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
