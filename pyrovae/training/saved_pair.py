"""Save and load a model and its guide; compare a module with the description of one in a file.

A description holds what the state dict of a module does not: the class of each module in it, its hooks, and its
constants, the attributes that its use does not change.
"""

import os
import platform
from collections.abc import Iterator
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from pyrovae.training.attributes import changed_by_use, constants_of, hooks_of
from pyrovae.training.checkpoint_file import plain, read, write
from pyrovae.training.specification import NotSpecifiedError, build, specify
from pyrovae.training.values import DEPTH, describe, same_text

__all__ = ["Description", "describe_module", "described_in", "difference", "load", "pair_content", "save", "versions"]

Description = dict[str, dict[str, Any]]

_CLASS, _NOTHING = "class", "nothing"
_ABSENT = {_CLASS: _NOTHING, "hooks": "()"}
# They hold others or reshape: what they hold is described by itself, and a wrong shape is noticed anyway.
_PASSIVE = {
    *(nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict),
    *(nn.Identity, nn.Flatten, nn.Unflatten, pyro.nn.PyroModule, pyro.nn.PyroModuleList),
}
_LARGEST = 4096  # larger tensors outside the state dict are not compared


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
        TypeError: if model or guide is no module, or an extra value could only be pickled.
        OSError: if the file cannot be written.
    """
    for name, module in (("model", model), ("guide", guide)):
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"{name} must be a module, found {type(module).__name__}: save(path, model, guide), the path first"
            )
    write(path, {**pair_content(model, guide), "extra": plain("extra", extra)})


def load(path: str | os.PathLike, model: nn.Module | None = None, guide: nn.Module | None = None) -> dict[str, Any]:
    """Load what `save`, or `fit` with a checkpoint, wrote.

    Without a model and a guide, both are built again from the file. This works only for parts of this library. With one
    or both, the file is loaded into them, and they must be the same as those saved.

    "The same" means: tensors of the same names, shapes and dtypes; modules of the same classes (an activation, for
    instance) with the same hooks; and the same constants. A constant is an attribute of a module (the scale of a
    likelihood, a dict of options) that `forward`, and the methods that it calls, neither assign nor fill: a counter is
    not one. These may differ: devices and, in classes of your own, attributes whose names say that they hold paths, seeds
    or numbers of data (`num_data`, `batch_size`). Arguments that only set initial values are not compared, and neither
    is the code of a `forward`.

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


def describe_module(module: nn.Module) -> Description:
    """{"likelihood": {"class": "Normal", "hooks": "()", "scale": "0.5"}, ...}.

    Values are text or small tensors. A lazy module has an empty description before its first call, which matches any
    other.
    """
    found = {path: _constants(part) for path, part in _parts(module, "")}
    return {path: part for path, part in found.items() if part != _ABSENT}


def difference(there: Description, here: Description) -> str | None:
    """The first difference, "'likelihood' (Normal) has scale=0.5 in the file and scale=1 here"; None if there is none.

    An attribute that only one side has does not count: the class may have gained it since the file was written.
    """
    for path in dict.fromkeys((*there, *here)):
        found, expected = (side.get(path, _ABSENT) for side in (there, here))
        where = f"'{path}'" if path else "it"
        kind = "" if found.get(_CLASS) == _NOTHING else f" ({found.get(_CLASS)})"
        for name in found:
            if name not in expected or _equal(found[name], expected[name]):
                continue
            if name == _CLASS:
                return f"{where} is {found[name]} in the file and {expected[name]} here"
            values = [_shown(side[name]) for side in (found, expected)]
            if values[0] == values[1]:
                values = [f"{values[0]}{other}" for other in ("", " with other values")]
            return f"{where}{kind} has {name}={values[0]} in the file and {name}={values[1]} here"
    return None


def _parts(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """A module and its submodules; shared ones come under each of their names."""
    yield path, module
    if not isinstance(module, AutoGuide):  # it creates its submodules at the first call
        for name, child in module._modules.items():
            if child is not None:
                yield from _parts(child, f"{path}.{name}" if path else name)


def _is_passive(kind: type) -> bool:
    return kind in _PASSIVE or (kind.__name__.startswith("_") and kind.__module__.startswith("pyrovae."))


def _constants(module: nn.Module) -> dict[str, Any]:
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return {}
    found: dict[str, Any] = {_CLASS: _NOTHING if _is_passive(type(module)) else type(module).__name__}
    found["hooks"] = str(describe(hooks_of(module), DEPTH))
    if isinstance(module, AutoGuide):  # its arguments tell where it starts
        return found
    values = constants_of(module)
    unsaved = module._non_persistent_buffers_set.difference(*changed_by_use(type(module)))
    values |= {name: module._buffers[name] for name in sorted(unsaved)}
    for name, value in values.items():
        if isinstance(value, list | dict | set) and not value:
            continue  # it fills
        is_small = isinstance(value, Tensor) and value.layout is torch.strided and value.numel() <= _LARGEST
        if is_small and not value.requires_grad and not value.is_meta:
            found[name] = value.detach().to("cpu", copy=True)
        elif (text := describe(value, DEPTH)) is not None:
            found[name] = text
    return found


def _equal(there: Any, here: Any) -> bool:
    """Whether two values are equal, tensors up to rounding."""
    if isinstance(there, Tensor) and isinstance(here, Tensor):
        if there.shape != here.shape or there.is_complex() != here.is_complex():
            return False
        there, here = (side.to(torch.complex128 if side.is_complex() else torch.float64) for side in (there, here))
        return torch.allclose(there, here, rtol=1e-4, atol=1e-8, equal_nan=True)
    return isinstance(there, str) and isinstance(here, str) and same_text(there, here)


def _shown(value: Any) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    return f"{value.item():.7g}" if value.numel() == 1 else f"a tensor of shape {tuple(value.shape)}"
