"""Call a network: with data, with a context if it takes one, and with the mask of known values if it asks for it."""

import inspect
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyrovae.common.arguments import check_count, checks_values, run_network

__all__ = [
    "Inputs",
    "broadcast_context",
    "call_network",
    "check_context",
    "check_mask",
    "encoding_of",
    "features_of",
    "given",
    "needs_context",
    "takes_context",
    "takes_keyword",
    "width_of_features",
]


def takes_context(part: Any, inputs: int = 1) -> bool:
    """Whether a module takes a context.

    Its attribute `takes_context` says so if it has one; otherwise it does if its `forward` has a positional argument
    after its own inputs.

    Args:
        part: A network, a prior, ...
        inputs: Number of arguments before the context: 1 for a network, 0 for a prior.
    """
    declared = getattr(part, "takes_context", None)
    return declared if isinstance(declared, bool) else len(_positional(part)) > inputs


def needs_context(part: Any, inputs: int = 1) -> bool:
    """Like `takes_context`, for an argument without a default."""
    return takes_context(part, inputs) and sum(not optional for optional in _positional(part)) > inputs


def takes_keyword(part: Any, name: str) -> bool:
    """Whether a module's `forward` has a parameter of this name."""
    return name in _parameters(part)


def _positional(part: Any) -> list[bool]:
    """For each positional parameter of a module's `forward` except the mask: whether it is optional.

    `*args` counts as two optional ones.
    """
    found = []
    for name, parameter in _parameters(part).items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            found += [True, True]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD) and name != "observed":
            found.append(parameter.default is not parameter.empty)
    return found


def _parameters(part: Any) -> dict[str, inspect.Parameter]:
    forward = getattr(part, "forward", part)
    function = getattr(forward, "__func__", None)
    # A bound method is looked up by its function, which all instances of a class share.
    return _signature(forward) if function is None else dict(list(_signature(function).items())[1:])


@lru_cache(maxsize=1024)
def _signature(function: Callable) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a compiled function without a signature
        return {}


def encoding_of(guide: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Return guide.encode(*args, **kwargs); TypeError if a guide's own `encode` lacks the context or the mask given."""
    lacks = None
    if len(args) == 2 and not takes_context(guide.encode):
        lacks = "context"
    elif "observed" in kwargs and not takes_keyword(guide.encode, "observed"):
        kinds = {parameter.kind for parameter in _parameters(guide.encode).values()}
        lacks = None if inspect.Parameter.VAR_KEYWORD in kinds else "observed"
    if lacks is not None:
        raise TypeError(
            f"{type(guide).__name__}.encode takes no {lacks}, and one was given: give it an argument {lacks}, "
            f"def encode(self, x, context=None, *, observed=None), or call without {lacks}"
        )
    return guide.encode(*args, **kwargs)


def given(context: Tensor | None, observed: Tensor | None = None) -> tuple[tuple, dict]:
    """Return (args, kwargs) that hold what is not None: programs written for data alone are called with data alone."""
    return () if context is None else (context,), {} if observed is None else {"observed": observed}


class Inputs(NamedTuple):
    """What programs are called with: data, and a context and the mask of what is known if there are any."""

    x: Tensor
    context: Tensor | None
    observed: Tensor | None

    @property
    def args(self) -> tuple[Tensor, ...]:
        """Positional arguments of a program."""
        return (self.x,) if self.context is None else (self.x, self.context)

    @property
    def kwargs(self) -> dict[str, Any]:
        """Keyword arguments of a program."""
        return {} if self.observed is None else {"observed": self.observed}

    def map(self, function: Callable[[Tensor], Tensor]) -> "Inputs":
        """Return the same with `function` of each tensor."""
        return Inputs(
            function(self.x),
            None if self.context is None else function(self.context),
            None if self.observed is None else function(self.observed),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are not None."""
        return tuple(tensor for tensor in self if tensor is not None)

    def of(self, tensors: Iterable[Tensor]) -> "Inputs":
        """Return inputs with these tensors instead of its own, in the order of `tensors`."""
        rest = iter(tensors)
        return self.map(lambda _: next(rest))


def call_network(
    net: nn.Module, x: Tensor, advice: str, context: Tensor | None = None, observed: Tensor | None = None
) -> Tensor:
    """Return what the network gives for data x, with the context and the mask if it takes them.

    Args:
        net: The network.
        x: Its first input (N, ...).
        advice: How to fix a wrong shape.
        context: (N, ...); passed as the second argument to networks that take one.
        observed: Mask of what is known, shaped like x; passed as the keyword `observed` to networks that have it.

    Raises:
        ValueError: The network needs a context and none is given, or it does not take these shapes.
    """
    if context is None and needs_context(net):
        raise ValueError(
            f"the network {type(net).__name__} takes a context as its second argument, and none was given: call "
            f"model(x, context) and guide(x, context), and pass context= to generate, decode and the like"
        )
    more = (context,) if context is not None and takes_context(net) else ()
    options = {"observed": observed} if observed is not None and takes_keyword(net, "observed") else {}
    return run_network(net, x, advice, None, *more, **options)


def check_context(context: Any, num_data: int) -> None:
    """Check that a context is a tensor with one row for each datum.

    Raises:
        TypeError: It is no tensor.
        ValueError: It has another number of rows.
    """
    if not isinstance(context, Tensor):
        raise TypeError(
            f"the context must be a tensor (N, ...), found {type(context).__name__}: torch.as_tensor(context), or "
            f"leave it out of the batches of a loader: transform=lambda batch: batch[0]"
        )
    if context.ndim == 0 or context.shape[0] != num_data:
        raise ValueError(
            f"the context must have one row for each of the {num_data} data, found shape {tuple(context.shape)}: pass "
            f"labels (N,), covariates (N, C) or images (N, ...) in the order of the data"
        )


def check_mask(observed: Any, x: Tensor) -> Tensor:
    """Return the mask of what is known as bool.

    Args:
        observed: True or 1 if the element of x is known; shaped like x.
        x: Data (N, *data_shape).

    Raises:
        TypeError: It is no tensor.
        ValueError: It has another shape, or values other than 0 and 1.
    """
    if not isinstance(x, Tensor):
        raise TypeError(
            f"the data beside observed= must be a tensor, found {type(x).__name__}: pass the values and the mask apart, as "
            f"impute(model, guide, x, observed=mask) takes them"
        )
    if not isinstance(observed, Tensor):
        raise TypeError(f"observed must be a tensor, found {type(observed).__name__}: torch.as_tensor(observed)")
    if observed.shape != x.shape:
        raise ValueError(
            f"observed must be a mask of the data's shape {tuple(x.shape)}, True if an element is known; found shape "
            f"{tuple(observed.shape)}: ~x.isnan() is the mask of data with NaN for what is missing"
        )
    if observed.dtype == torch.bool:
        return observed
    if checks_values() and not ((observed == 0) | (observed == 1)).all():
        found = observed[(observed != 0) & (observed != 1)][0].item()
        raise ValueError(f"observed must hold True or False (1 or 0), found {found}: ~x.isnan(), or (mask > 0.5)")
    return observed != 0


def broadcast_context(z: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
    """Return latents (*batch, D) and contexts (*batch, *row) with the same leading dimensions.

    Args:
        z: Latents (..., D).
        context: (N, *row); N belongs to the last dimension of z before D.

    Raises:
        ValueError: z has neither 1 nor N rows there.
    """
    batch_shape, row = z.shape[:-1], context.shape[1:]
    if batch_shape and batch_shape[-1] != 1 and context.shape[0] not in (1, batch_shape[-1]):
        raise ValueError(
            f"latents of shape {tuple(z.shape)} and a context of shape {tuple(context.shape)} do not belong together: "
            f"pass one row of context for each of the {batch_shape[-1]} data, or one row for all"
        )
    if batch_shape or context.shape[0] != 1:
        batch_shape = torch.broadcast_shapes(batch_shape, context.shape[:1])
    else:
        context = context[0]
    return z.expand(*batch_shape, -1), context.expand(*batch_shape, *row)


def width_of_features(net: nn.Module, num_features: int | None) -> int:
    """Return `num_features`, or the network's `out_features`; raise ValueError if neither is known.

    For an `nn.Embedding`, it is the `embedding_dim`.
    """
    for name in ("out_features", "embedding_dim"):
        num_features = getattr(net, name, None) if num_features is None else num_features
    if num_features is None:
        raise ValueError(
            f"cannot tell how many features {type(net).__name__} gives: it has no `out_features`; pass num_features="
        )
    return check_count("num_features", num_features)


def features_of(
    net: nn.Module,
    x: Tensor,
    num_features: int,
    context: Tensor | None = None,
    observed: Tensor | None = None,
) -> Tensor:
    """Return the features (N, num_features) of x (N, ...), with zeros in place of what is missing.

    Args:
        net: The network.
        x: Data (N, ...).
        num_features: Width of the features.
        context: See `call_network`.
        observed: Mask of what is known, shaped like x.

    Raises:
        ValueError: The features have the wrong shape, or context or mask do not match x.
    """
    if context is not None:
        check_context(context, x.shape[0])
    if observed is not None:
        observed = check_mask(observed, x)
        x = torch.where(observed, x, 0)
    advice = "pass data of the shape it was made for, in the dtype of its parameters, or make it for these data"
    features = call_network(net, x, advice, context, observed)
    # For data (N, 1, D), a network that keeps dimensions returns (N, 1, num_features).
    if features.ndim > 2 and features.shape[1:-1].numel() == 1:
        features = features.flatten(1)
    if features.shape != (x.shape[0], num_features):
        raise ValueError(
            f"the network must give features ({len(x)}, {num_features}), found {tuple(features.shape)}: "
            f"flatten its output, or set num_features="
        )
    return features
