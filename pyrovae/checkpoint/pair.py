"""Save and load a model and its guide."""

import os
import platform
from typing import Any

import pyro
import torch
from torch import nn

from pyrovae.checkpoint.files import plain, read, write
from pyrovae.checkpoint.specification import NotSpecifiedError, build, specify

__all__ = ["load", "pair_content", "save", "versions"]


def save(path: str | os.PathLike, model: nn.Module, guide: nn.Module, **extra: Any) -> None:
    """Save a model and a guide, with whatever plain values are given.

    extra: tensors, numbers, strings, lists and dicts of them

    The file is written beside its place and moved there when complete, so that no half-written file is left under its
    name. Tensors that model and guide share are saved once and loaded into both. With them goes how to make the two again,
    where they consist of parts of this library: classes by name, and the arguments that they were made with.

    Raises TypeError for an extra value that could only be pickled, OSError where the file cannot be written.
    """
    write(path, {**pair_content(model, guide), "extra": plain("extra", extra)})


def load(path: str | os.PathLike, model: nn.Module | None = None, guide: nn.Module | None = None) -> dict[str, Any]:
    """Load what `save`, or `fit` with a checkpoint, wrote.

    Without a model and a guide, both are made again, as they were saved, and come under "model" and "guide" with the
    extra values; parts that are not this library's cannot be made from a file. With one or both, the file is loaded into
    them, which must be of the same architecture, and the extra values are returned.

    Raises ValueError for a file that is no checkpoint of this library, is damaged, does not fit the modules (which are
    then as they were) or holds parts of your own where none are given; FileNotFoundError. Only tensors and plain values
    are read: a file with code in it is refused, and none of it runs.
    """
    content = read(path)
    if content.get("model") is None:
        raise ValueError(f"{path} holds no model and guide: a run on plain functions goes on by fit(..., resume=True)")
    given = model is not None or guide is not None
    if not given:
        model, guide = _built(path, content)
    for name, module in (("model", model), ("guide", guide)):
        if module is not None:
            _check_fit(path, name, module.state_dict(), content[name])
    for name, module in (("model", model), ("guide", guide)):
        if module is not None:
            module.load_state_dict(content[name])
    extra = content.get("extra", {})
    return extra if given else {**extra, "model": model, "guide": guide}


def pair_content(model: nn.Module, guide: nn.Module) -> dict[str, Any]:
    """What a checkpoint holds of a pair."""
    content = {"versions": versions(), "model": model.state_dict(), "guide": guide.state_dict()}
    try:
        return content | {"specification": specify(model, guide)}
    except NotSpecifiedError as error:
        return content | {"not_specified": str(error)}


def versions() -> dict[str, str]:
    """Which versions wrote a file, for whoever wonders later."""
    from pyrovae import __version__

    return {
        "pyrovae": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "pyro": pyro.__version__,
    }


def _built(path: Any, content: dict[str, Any]) -> list[nn.Module]:
    if "specification" not in content:
        reason = content.get("not_specified", "it is an older file")
        raise ValueError(
            f"{path} does not tell how to make its model and guide ({reason}): make them as they were, and give them, "
            f"load(path, model, guide)"
        )
    try:
        return build(content["specification"])
    except Exception as error:  # what a constructor of another version makes of these arguments is not one type
        raise ValueError(
            f"this version of pyrovae cannot make the model and guide of {path} again ({error}; written by "
            f"{content['versions']}): make them yourself, and give them, load(path, model, guide)"
        ) from error


def _check_fit(path: Any, name: str, expected: dict, found: dict) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in expected.items()}
    found_shapes = {key: tuple(tensor.shape) for key, tensor in found.items()}
    for key in sorted(shapes.keys() | found_shapes.keys()):
        if shapes.get(key) != found_shapes.get(key):
            raise ValueError(
                f"{path} does not fit the {name}: '{key}' has shape {found_shapes.get(key, 'none')} in the file and "
                f"{shapes.get(key, 'none')} in the module: build it as it was when saved"
            )
