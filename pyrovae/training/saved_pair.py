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
    """Save a model and a guide, with any plain values.

    The file is written under a temporary name and renamed when complete, so that it is never half written. Tensors that
    model and guide share are saved once and loaded into both. If the two consist of parts of this library, the file
    also says how to build them: the names of their classes and the arguments of their constructors.

    Args:
        path: file to write.
        model, guide: the modules to save.
        extra: tensors, numbers, strings, and lists and dicts of them.

    Raises:
        TypeError: if an extra value could only be pickled.
        OSError: if the file cannot be written.
    """
    write(path, {**pair_content(model, guide), "extra": plain("extra", extra)})


def load(path: str | os.PathLike, model: nn.Module | None = None, guide: nn.Module | None = None) -> dict[str, Any]:
    """Load what `save`, or `fit` with a checkpoint, wrote.

    Without a model and a guide, both are built again from the file. This works only for parts of this library. With one
    or both, the file is loaded into them, and they must be the same as those saved.

    The same: tensors of the same names, shapes and dtypes, modules of the same classes (an activation, for instance) with the
    same hooks, and the same constants: whatever a module holds as an attribute (the scale of a likelihood, a dict of options),
    but for what its use changes: what `forward` and the methods that it calls assign or fill, such as a counter. Free to differ
    are devices and, in classes of your own, paths, seeds and numbers of data by their attributes' names (`num_data`,
    `batch_size`). What only initial values come from is not compared. The code of a `forward` is not compared either.

    Only tensors and plain values are read: a file that contains code is refused, and none of it runs.

    Args:
        path: file to read.
        model, guide: modules to load into, or None to build them from the file.

    Returns:
        The extra values; if neither module is given, also the two modules, under "model" and "guide".

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or no checkpoint of this library, does not fit the modules (which then stay
            unchanged), or holds third-party parts and no modules are given.
    """
    content = read(path)
    if content.get("model") is None:
        raise ValueError(
            f"{path} holds no model and guide: a run on plain functions can only be resumed, with fit(..., resume=True)"
        )
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
    """The content of a checkpoint for a model and a guide."""
    content = {"versions": versions(), "model": model.state_dict(), "guide": guide.state_dict()}
    content["description"] = {"model": describe_module(model), "guide": describe_module(guide)}
    try:
        return content | {"specification": specify(model, guide)}
    except NotSpecifiedError as error:
        return content | {"not_specified": str(error)}


def described_in(content: dict[str, Any]) -> dict[str, Description]:
    """The descriptions of the modules in a checkpoint; for older files, those of the modules that it specifies."""
    if "description" in content or "specification" not in content:
        return content.get("description", {})
    with torch.random.fork_rng(devices=[]):
        try:
            modules = build(content["specification"])
        except Exception:  # constructors of another version may raise any error
            return {}
    return dict(zip(("model", "guide"), map(describe_module, modules), strict=True))


def versions() -> dict[str, str]:
    """The versions that write a file, for the record."""
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
            f"{path} does not say how to make its model and guide ({reason}): make them as they were, and give them to load: "
            f"load(path, model, guide)"
        )
    try:
        return build(content["specification"])
    except Exception as error:  # constructors of another version may raise any error
        raise ValueError(
            f"this version of pyrovae cannot make the model and guide of {path} again ({error}; written by "
            f"{content['versions']}): make them yourself, and give them to load: load(path, model, guide)"
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
            f"{path} is of another {name}: {found}: build it as it was when saved. If the two compute the same anyway, "
            f"load only the tensors: {name}.load_state_dict(torch.load(path)['{name}'])"
        )
