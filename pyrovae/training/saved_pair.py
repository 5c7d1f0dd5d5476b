"""Save and load a model and its guide."""

import os
import platform
from typing import Any

import pyro
import torch
from torch import nn

from pyrovae.training.checkpoint_file import plain, read, write
from pyrovae.training.description import Description, describe_module, difference
from pyrovae.training.specification import NotSpecifiedError, build, specify

__all__ = ["described_in", "load", "pair_content", "save", "versions"]


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
    them, which must be the same as those saved, and the extra values are returned.

    The same: tensors of the same names, shapes and dtypes, modules of the same classes (an activation, for instance) with the
    same hooks, and the same constants: whatever a module holds as an attribute (the scale of a likelihood, a dict of options),
    but for what its use changes: what `forward` and the methods that it calls assign or fill, such as a counter. Free to differ
    are devices and, in classes of your own, paths, seeds and numbers of data by their attributes' names (`num_data`,
    `batch_size`). What only initial values come from is not compared. The code of a `forward` is not compared either.

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
    if given:
        for name, described in described_in(content).items():
            if (module := {"model": model, "guide": guide}.get(name)) is not None:
                _check_same(path, name, described, module)
    for name, module in (("model", model), ("guide", guide)):
        if module is not None:
            module.load_state_dict(content[name])
    extra = content.get("extra", {})
    return extra if given else {**extra, "model": model, "guide": guide}


def pair_content(model: nn.Module, guide: nn.Module) -> dict[str, Any]:
    """What a checkpoint holds of a pair."""
    content = {"versions": versions(), "model": model.state_dict(), "guide": guide.state_dict()}
    content["description"] = {"model": describe_module(model), "guide": describe_module(guide)}
    try:
        return content | {"specification": specify(model, guide)}
    except NotSpecifiedError as error:
        return content | {"not_specified": str(error)}


def described_in(content: dict[str, Any]) -> dict[str, Description]:
    """What a checkpoint tells of its modules beside their tensors; of an older one, what its specification makes."""
    if "description" in content or "specification" not in content:
        return content.get("description", {})
    with torch.random.fork_rng(devices=[]):
        try:
            modules = build(content["specification"])
        except Exception:  # what a constructor of another version makes of these arguments is not one type
            return {}
    return dict(zip(("model", "guide"), map(describe_module, modules), strict=True))


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
    there, here = ({key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} for tensors in (found, expected))
    for key in sorted(here.keys() | there.keys()):
        (shape, dtype), (own_shape, own_dtype) = (side.get(key, ("none", "none")) for side in (there, here))
        if shape != own_shape:
            raise ValueError(
                f"{path} does not fit the {name}: '{key}' has shape {shape} in the file and {own_shape} in the module: "
                f"build it as it was when saved"
            )
        if dtype != own_dtype:
            raise ValueError(
                f"{path} does not fit the {name}: '{key}' is {dtype} in the file and {own_dtype} in the module: convert "
                f"the module first, by {name}.to({dtype})"
            )


def _check_same(path: Any, name: str, described: Description, module: nn.Module) -> None:
    if found := difference(described, describe_module(module)):
        raise ValueError(
            f"{path} is of another {name}: {found}: build it as it was when saved; if it computes the same all the same, "
            f"take the tensors alone: {name}.load_state_dict(torch.load(path)['{name}'])"
        )
