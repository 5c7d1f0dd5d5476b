"""Export a trained pair as programs that run without pyrovae and without Pyro."""

import os
import tempfile
import warnings
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import pyro
import torch
from torch import Tensor, nn

from pyrovae.common.arguments import without_checks
from pyrovae.distributions.mixed import means_of
from pyrovae.guides.base import Guide
from pyrovae.models.generative import LatentVariableModel
from pyrovae.programs.reach import evaluation_mode

__all__ = ["Exported", "export"]

_EXAMPLES = 3  # rows of the example input; neither 0 nor 1, which torch.export takes for constants


class Exported(NamedTuple):
    """The files that `export` wrote.

    Attributes:
        encoder: Program x (N, *data_shape) -> E_q[z|x] (N, D).
        decoder: Program z (N, D) -> E[x|z] (N, *data_shape).
    """

    encoder: Path
    decoder: Path


class _Encoder(nn.Module):
    def __init__(self, guide: Guide):
        super().__init__()
        self.guide = guide

    def forward(self, x: Tensor, *context: Tensor) -> Tensor:
        return self.guide.posterior(x, *context).mean


class _Decoder(nn.Module):
    def __init__(self, model: LatentVariableModel):
        super().__init__()
        self.model = model

    def forward(self, z: Tensor, *context: Tensor) -> Tensor:
        return means_of(self.model.likelihood_at(z, *context))


@torch.no_grad()
def export(
    model: LatentVariableModel, guide: Guide, path: str | os.PathLike, *, context: Tensor | None = None
) -> Exported:
    """Write encoder mean and decoder mean as `torch.export` programs, which run wherever PyTorch runs.

        encoder.pt2:  x -> E_q(z|x)[ z ]         decoder.pt2:  z -> E[ x | z ]

    The programs are those of `pyrovae.uses.embed` and `model.decode`, likelihood included: the decoder network alone lacks
    what the likelihood adds to its output. They take batches of any size, on the CPU, in the dtype of the parameters:
    `torch.export.load("encoder.pt2").module()(x)`.

    Args:
        model: Model of the pair.
        guide: Guide of the pair; its posterior must have a mean.
        path: Folder for the two files; it is created if needed, and existing files are replaced.
        context: Rows of context (3 or more), if the pair is conditional; the programs then take (x, context) and
            (z, context). Only shape and dtype matter.

    Returns:
        The paths of the files.

    Raises:
        TypeError: Model or guide is not a part of this library.
        ValueError: torch.export does not take a network; the message says which program and why. No file is written.

    References:
        Ansel et al., PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and Graph
        Compilation (2024).
    """
    for name, part, kind, expected in (
        ("model", model, LatentVariableModel, "pyrovae.GenerativeModel or a hierarchical model"),
        ("guide", guide, Guide, "pyrovae.guides.Guide"),
    ):
        if not isinstance(part, kind):
            raise TypeError(
                f"{name} must be a {expected}, found {type(part).__name__}: call pyrovae.export(model, guide, path), the "
                f"path last"
            )
    extra = () if context is None else (context[:_EXAMPLES].cpu(),)
    if extra and len(extra[0]) < _EXAMPLES:
        raise ValueError(f"context must hold {_EXAMPLES} rows or more, found {len(extra[0])}")
    model, guide = deepcopy((model, guide))
    for module in (model, guide):
        module.cpu()
    dtype = next((p.dtype for p in guide.parameters() if p.is_floating_point()), torch.get_default_dtype())
    x = torch.rand(_EXAMPLES, *model.likelihood.data_shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
    with evaluation_mode(model, guide):
        z = guide.posterior(x, *extra).mean
        programs = {
            "encoder": _exported("encoder", _Encoder(guide), (x, *extra)),
            "decoder": _exported("decoder", _Decoder(model), (z, *extra)),
        }
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        for name, program in programs.items():
            torch.export.save(program, Path(unfinished) / f"{name}.pt2")
        for name in programs:
            os.replace(Path(unfinished) / f"{name}.pt2", folder / f"{name}.pt2")
    return Exported(folder / "encoder.pt2", folder / "decoder.pt2")


def _exported(name: str, module: nn.Module, example: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    size = torch.export.Dim("num_data")
    of_context = [({0: size},)] if len(example) > 1 else []
    shapes = ({0: size}, *of_context)
    try:
        # Checks of values cannot be part of a program for any values.
        with without_checks(), pyro.validation_enabled(False), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return torch.export.export(module.eval(), example, dynamic_shapes=shapes)
    except Exception as error:  # a network may fail in any way under tracing
        raise ValueError(
            f"torch.export does not take the {name} of this pair ({type(error).__name__}: {error}): its networks must not "
            f"branch on values, nor on the number of data"
        ) from error
