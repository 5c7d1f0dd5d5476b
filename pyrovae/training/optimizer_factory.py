"""What `optimizer=` of `fit` may be, and the one torch optimizer that it makes over all parameters."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import Parameter, signature
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.optim import Optimizer

from pyrovae.training.values import DEPTH, describe, describe_callable

__all__ = ["OptimizerFactory", "fused_adam", "optimizer_factory"]

_DEFAULT = "fused Adam"


@dataclass(frozen=True)
class OptimizerFactory:
    """Make the optimizer of a run.

    Attributes:
        function: makes a `torch.optim.Optimizer` of a list of parameters.
        described: class and settings in words, which must be the same when a run is resumed.
        names: of the parameters, for messages.
        is_scheduled: whether a schedule scales the learning rates.
    """

    function: Callable[[list[Tensor]], Optimizer]
    described: str
    names: Mapping[Tensor, str] = field(default_factory=dict)
    is_scheduled: bool = False

    @property
    def is_default(self) -> bool:
        """Whether it makes the fused Adam that `fit` trains with by default."""
        return self.described == _DEFAULT

    def __call__(self, parameters: list[Tensor]) -> Optimizer:
        """Make the optimizer of these parameters; each group keeps its own rate as "initial_lr".

        Raises:
            TypeError, ValueError: if the function makes no optimizer that `fit` can use, or one of other parameters.
        """
        made = self.function(parameters)
        _check(made, parameters, self.is_scheduled, self.names)
        for group in made.param_groups:
            if "lr" in group:
                group.setdefault("initial_lr", group["lr"])
        return made


def fused_adam(learning_rate: float) -> OptimizerFactory:
    """The default: Adam, with one fused kernel over all parameters."""
    return OptimizerFactory(lambda parameters: torch.optim.Adam(parameters, lr=learning_rate, fused=True), _DEFAULT)


def optimizer_factory(given: Any, names: Mapping[Tensor, str], is_scheduled: bool) -> OptimizerFactory:
    """Check what `optimizer=` was given.

    Args:
        given: a function from a list of parameters to a `torch.optim.Optimizer`, or a wrapper of `pyro.optim`.
        names: the parameters of the modules with their names. An optimizer of them is made once, as a check.
        is_scheduled: whether a schedule scales the learning rates.

    Raises:
        TypeError, ValueError: if it cannot be used, with what can.
    """
    if isinstance(given, Optimizer):
        raise TypeError(
            f"optimizer must be a function that makes an optimizer from a list of parameters, found a finished "
            f"{type(given).__name__}: give functools.partial(torch.optim.{type(given).__name__}, lr=...)"
        )
    if isinstance(given, pyro.optim.PyroOptim):
        function = _unwrapped(given, names)
    elif callable(given):
        function = given
    else:
        raise TypeError(
            f"optimizer must be a function that makes a torch.optim.Optimizer of a list of parameters, as "
            f"functools.partial(torch.optim.AdamW, lr=1e-3), or a wrapper such as pyro.optim.Adam({{'lr': 1e-3}}); found {given!r}"
        )
    factory = OptimizerFactory(function, describe_callable(given), names, is_scheduled)
    if not names:  # all parameters are made by pyro.param in the first step
        return factory
    return replace(factory, described=_described(factory(list(names))))


def _unwrapped(wrapper: pyro.optim.PyroOptim, names: Mapping[Tensor, str]) -> Callable[[list[Tensor]], Optimizer]:
    """A factory of one optimizer over all parameters from a wrapper, which would make one of each."""
    name = type(wrapper).__name__
    if isinstance(wrapper, pyro.optim.PyroLRScheduler):
        raise TypeError(
            f"found optimizer={name}, whose scheduler would change the rate beside fit's own: give the optimizer alone, and "
            f"schedule= a function from the fraction of training done to a factor of its rate"
        )
    if isinstance(wrapper, pyro.optim.HorovodOptimizer):
        raise TypeError(
            f"found optimizer={name}: start several processes with torchrun instead, and give the optimizer alone"
        )
    if wrapper.pt_clip_args:
        raise ValueError(
            f"found optimizer={name} with clip_args, which clip the gradient of each parameter by itself: leave them out, and "
            f"give fit clip_norm=, which bounds the norm of all gradients together"
        )
    make: Any = wrapper.pt_optim_constructor
    arguments = wrapper.pt_optim_args
    if isinstance(arguments, dict):
        return partial(_made, make, arguments)
    if wrapper.pt_optim_args_argc != 1:
        raise TypeError(
            f"optimizer={name}: the function for its settings takes {wrapper.pt_optim_args_argc} arguments, expected one, the "
            f"name of a parameter"
        )

    def grouped(parameters: list[Tensor]) -> Optimizer:
        groups: list[tuple[dict[str, Any], list[Tensor]]] = []
        for parameter in parameters:
            own = arguments(_name(parameter, names))
            members = next((members for of, members in groups if of == own), None)
            if members is None:
                groups.append((own, members := []))
            members.append(parameter)
        return _made(make, {}, [{**own, "params": members} for own, members in groups])

    return grouped


def _made(make: Any, arguments: dict[str, Any], parameters: list[Any]) -> Optimizer:
    made: Optimizer = make(parameters, **arguments)
    return made


def _name(parameter: Tensor, names: Mapping[Tensor, str]) -> str:
    """The name in Pyro's store, as `pyro.optim` gives it to a function of names; otherwise the one in the module."""
    name = pyro.get_param_store().param_name(parameter)
    return name.replace("$$$", ".") if name else names.get(parameter, f"one of shape {tuple(parameter.shape)}")


def _check(made: Any, parameters: list[Tensor], is_scheduled: bool, names: Mapping[Tensor, str]) -> None:
    name = type(made).__name__
    if not isinstance(made, Optimizer):
        raise TypeError(f"optimizer must make a torch.optim.Optimizer of a list of parameters, and made {made!r}")
    closure = signature(type(made).step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        raise TypeError(
            f"found optimizer={name}, whose step evaluates the loss several times, on a batch whose noise changes: take "
            f"an optimizer of single gradients, torch.optim.AdamW for example"
        )
    held = {parameter for group in made.param_groups for parameter in group["params"]}
    if missing := [parameter for parameter in parameters if parameter not in held]:
        raise ValueError(
            f"optimizer made {name} without {len(missing)} of {len(parameters)} parameters ({_shown(missing, names)}): put each one that "
            f"it is given into a group; to leave one as it is, requires_grad_(False) on it, or a group of lr=0"
        )
    if strange := held.difference(parameters):
        raise ValueError(
            f"optimizer made {name} with {len(strange)} parameters that it was not given ({_shown(list(strange), names)}): make it of the "
            f"list of its argument"
        )
    if is_scheduled and any("lr" not in group for group in made.param_groups):
        raise ValueError(f"found optimizer={name}, which has no lr that a schedule could scale: give schedule=None")
    if any(group.get("lrd", 1.0) != 1.0 for group in made.param_groups):
        raise ValueError(
            f"found optimizer={name} with lrd, which lowers the rate at every step beside fit's own schedule: leave lrd out, and "
            f"give schedule= a function from the fraction of training done to a factor of the rate"
        )


def _shown(parameters: list[Tensor], names: Mapping[Tensor, str]) -> str:
    return ", ".join(_name(p, names) for p in parameters[:3]) + (", ..." if len(parameters) > 3 else "")


def _described(optimizer: Optimizer) -> str:
    """'AdamW(lr=0.001, betas=(0.9, 0.999), ...)', with each group's number of tensors if there are several."""
    groups = [
        ", ".join(
            f"{name}={describe(value, DEPTH)}"
            for name, value in group.items()
            if name not in ("params", "initial_lr") and value is not None and value is not False
        )
        for group in optimizer.param_groups
    ]
    if len(groups) > 1:
        counts = [len(group["params"]) for group in optimizer.param_groups]
        groups = [f"{count} tensors: {text}" for count, text in zip(counts, groups, strict=True)]
    return f"{type(optimizer).__qualname__}({'; '.join(groups)})"
