"""Save and load: tensors and plain values only, so that loading a file never runs code from it."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

__all__ = ["load", "save"]

_FORMAT = 1


def save(path: str | os.PathLike, model: nn.Module, guide: nn.Module, **extra: Any) -> None:
    """Save the state of a model and a guide, with whatever plain values are given.

    extra: tensors, numbers, strings, lists and dicts of them

    The file is written beside its place and moved there when complete, so that no half-written file is left under its
    name. Tensors that model and guide share are saved once and loaded into both.

    Raises TypeError for an extra value that could only be pickled.
    """
    path = Path(path)
    content = {
        "format": _FORMAT,
        "model": model.state_dict(),
        "guide": guide.state_dict(),
        "extra": _plain("extra", extra),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike, model: nn.Module | None = None, guide: nn.Module | None = None) -> dict[str, Any]:
    """Load what `save` wrote, into a model and a guide of the same architecture if they are given.

    Returns the extra values. Without model and guide the states come with them, under "model" and "guide".

    Raises ValueError for a file that is no checkpoint of this library, is damaged, or does not fit the modules; the
    modules are then as they were. Only tensors and plain values are read: a file with code in it is refused.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # what torch raises for a damaged file is not one type
        raise ValueError(f"{path} is damaged or no checkpoint ({type(error).__name__}: {error})") from error
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f"{path} is no checkpoint of pyrovae: save one with pyrovae.save")
    if content["format"] > _FORMAT:
        raise ValueError(
            f"{path} has format {content['format']}, this version of pyrovae reads up to {_FORMAT}: update it"
        )
    for name, module in (("model", model), ("guide", guide)):
        if module is not None:
            _check_fit(path, name, module.state_dict(), content[name])
    for name, module in (("model", model), ("guide", guide)):
        if module is not None:
            module.load_state_dict(content[name])
    given = model is not None or guide is not None
    return content["extra"] if given else {**content["extra"], "model": content["model"], "guide": content["guide"]}


def _check_fit(path: Any, name: str, expected: dict, found: dict) -> None:
    shapes = {key: tuple(tensor.shape) for key, tensor in expected.items()}
    found_shapes = {key: tuple(tensor.shape) for key, tensor in found.items()}
    for key in sorted(shapes.keys() | found_shapes.keys()):
        if shapes.get(key) != found_shapes.get(key):
            raise ValueError(
                f"{path} does not fit the {name}: '{key}' has shape {found_shapes.get(key, 'none')} in the file and "
                f"{shapes.get(key, 'none')} in the module: build it as it was when saved"
            )


def _plain(name: str, value: Any) -> Any:
    if value is None or isinstance(value, torch.Tensor):
        return value
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)  # NumPy's float64 is a float that would be pickled as NumPy's
    if isinstance(value, dict):
        return {key: _plain(f"{name}[{key!r}]", item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(name, item) for item in value]
    raise TypeError(
        f"{name} is a {type(value).__name__}; a checkpoint holds tensors, numbers, strings, lists and dicts"
    )
