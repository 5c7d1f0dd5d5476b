"""Any reparameterised Pyro guide as a `Guide`: the distributions of its sites, with parameters that are free per datum.

A hand-written guide does not say what its family is. It is taken to be that of its sites: every distribution that a
site can have at one datum, with any parameters that its constraints (`arg_constraints`) allow.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Independent, TransformedDistribution, biject_to, transform_to
from torch.distributions import transforms as maps

from pyrovae.common.networks import given
from pyrovae.guides.base import Guide
from pyrovae.programs.pair import HEAD
from pyrovae.programs.splitting import inspect
from pyrovae.programs.traces import Layout, Program, as_guide, sample_sites, trace_program

__all__ = ["ProgramGuide", "guide_of"]

_ADVICE = "write the guide as a pyrovae.guides.Guide, whose `encode` gives what is refined"
# If the second is among a distribution's parameters, the first ones are redundant.
_REDUNDANT = ({"covariance_matrix", "precision_matrix"}, "scale_tril"), ({"probs"}, "logits")
_FIXED: tuple[type, ...] = (
    *(maps.ExpTransform, maps.SigmoidTransform, maps.SoftplusTransform, maps.TanhTransform),
    *(maps.StickBreakingTransform, maps.LowerCholeskyTransform, maps.CorrCholeskyTransform),
)


def guide_of(model: Program, program: Program, args: tuple, kwargs: dict, plate: str | None = None) -> Guide:
    """Return a guide as a `Guide` of encode and distribution: itself if it is one, otherwise a `ProgramGuide`.

    Args:
        model: Pyro program of the data.
        program: Its guide.
        args: Arguments of both programs: data (N, ...) first.
        kwargs: Their keyword arguments.
        plate: Name of the plate that indexes the data; found from the programs by default.

    Raises:
        ValueError: Naming the site, for everything that `log_marginal_likelihood` refuses, and for sites whose
            distribution cannot be given parameters of its own at each datum.
    """
    if isinstance(program, Guide) and program.encodes_once:
        return program
    pair = inspect(model, program, args, kwargs, plate)
    if pair.layout.dim is None:
        raise ValueError(
            "gaps are per datum, and the guide has no vectorised plate for the data: put the sites of model and guide "
            "into 'with pyro.plate(\"data\", len(x))'"
        )
    if pair.num_data != len(args[0]):
        raise ValueError(
            f"the programs have {pair.num_data:,} data and x has {len(args[0]):,} rows: their data plate must take its "
            f"size from x, so that data can be refined one by one"
        )
    if pair.split_size is None and pair.num_data > 1:
        raise ValueError(
            f"the guide cannot be refined datum by datum, because the programs cannot be run on some of the "
            f"{pair.num_data:,} data alone: data influence each other (batch normalisation, a shared latent), the size "
            f"of the data plate is not that of x, or a flow has no inverse (planar, radial, Sylvester)"
        )
    args, kwargs = pair.cut(slice(0, HEAD))
    layout = pair.layout_of(0, min(HEAD, pair.num_data))
    runs = [dict(sample_sites(trace_program(as_guide(program), args, kwargs))) for _ in range(2)]
    families = []
    for name, site in runs[0].items():
        family = _family_of(site, layout)
        again = family.read(runs[1][name])
        if not torch.allclose(family.read(site), again, rtol=1e-4, atol=1e-5):
            others = [other for other in runs[0] if other != name]
            raise ValueError(
                f"the parameters of site '{name}' of the guide change from run to run, because they depend on draws "
                f"(other sites: {others}): they are not constants of a datum that could be refined; {_ADVICE}, and "
                f"`latents` visits the sites"
            )
        families.append(family)
    return ProgramGuide(as_guide(program), families)


class ProgramGuide(Guide):
    """A Pyro guide whose sites do not depend on each other's draws, with the parameters of each site as its encoding.

        encode(x)_n = ( T^-1(arguments of each site's distribution at datum n) ),   T maps real numbers to `arg_constraints`

    Args:
        program: The guide.
        families: Its sites; see `guide_of`.
    """

    def __init__(self, program: Program, families: "list[_Family]"):
        super().__init__(max(1, sum(family.size for family in families)))
        self.program, self.families = program, families

    def encode(self, x: Tensor, context: Tensor | None = None, *, observed: Tensor | None = None) -> Tensor:
        more, options = given(context, observed)
        sites = dict(sample_sites(trace_program(self.program, (x, *more), options)))
        return torch.cat([family.read(sites[family.name]) for family in self.families], 1)

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        if len(self.families) > 1:
            raise TypeError(f"a guide of {len(self.families)} sites has no single distribution: use `latents`")
        return self.families[0].per_datum(parameters)

    def latents(self, parameters: Tensor, visit: Callable[[str, dist.TorchDistribution], Tensor]) -> Tensor:
        values = [visit(f.name, f.per_datum(part)) for f, part in self._parts(parameters)]
        pairs = zip(self.families, values, strict=True)
        return torch.cat([z.reshape(*z.shape[: z.ndim - len(family.event)], -1) for family, z in pairs], -1)

    def given(self, parameters: Tensor) -> Callable[..., Any]:
        def run(*_: Any, **__: Any) -> None:
            plates: dict[str, Any] = {}
            for family, part in self._parts(parameters):
                with ExitStack() as around:
                    for frame in family.plates:
                        if frame.name not in plates:
                            size = len(parameters) if frame.dim == family.dim else frame.size
                            plates[frame.name] = pyro.plate(frame.name, size, dim=frame.dim)
                        around.enter_context(plates[frame.name])
                    pyro.sample(family.name, family.in_place(part))

        return run

    def in_model(self, name: str, value: Tensor) -> Tensor:
        axis = next(family.axis for family in self.families if family.name == name)
        return value.movedim(0, axis)

    def _parts(self, parameters: Tensor) -> "list[tuple[_Family, Tensor]]":
        parts = parameters.split([family.num_parameters for family in self.families], -1)
        return list(zip(self.families, parts, strict=True))


class _Argument(NamedTuple):
    """An argument of a distribution as free numbers: its name, its map from real numbers, their shape for one datum."""

    name: str
    constrain: Any
    shape: torch.Size


class _Family(NamedTuple):
    """The distributions that a site can have at each datum.

    Attributes:
        name: Name of the site.
        like: Its distribution at some data.
        arguments: What is free.
        axis: Position of the data in its batch shape.
        dim: The same from the right, negative.
        plates: Frames of the vectorised plates around it.
        event: Shape of its value at one datum.
    """

    name: str
    like: Any
    arguments: list[_Argument]
    axis: int
    dim: int
    plates: list[Any]
    event: torch.Size

    @property
    def size(self) -> int:
        return self.event.numel()

    @property
    def num_parameters(self) -> int:
        return sum(argument.shape.numel() for argument in self.arguments)

    def read(self, site: dict) -> Tensor:
        """Parameters (N, P) of the distribution of this site in a trace."""
        leaf = _leaf(site["fn"])
        free = [_free(leaf, name, constrain).movedim(self.axis, 0) for name, constrain, _ in self.arguments]
        return torch.cat([numbers.reshape(len(numbers), -1) for numbers in free], 1)

    def in_place(self, parameters: Tensor) -> Any:
        """The distribution as the guide has it: batch shape of its plates, event shape of the site."""
        return self._of(parameters, lambda numbers: numbers.movedim(0, self.axis))

    def per_datum(self, parameters: Tensor) -> Any:
        """The same with batch shape (N,): what plates repeat within a datum belongs to the event."""
        found = self._of(parameters, lambda numbers: numbers)
        return found.to_event(len(found.batch_shape) - 1)

    def _of(self, parameters: Tensor, arrange: Callable[[Tensor], Tensor]) -> Any:
        parts = parameters.split([argument.shape.numel() for argument in self.arguments], 1)
        values = {
            name: constrain(arrange(part.reshape(-1, *shape)))
            for (name, constrain, shape), part in zip(self.arguments, parts, strict=True)
        }
        return _around(self.like, type(_leaf(self.like))(**values))


def _family_of(site: dict, layout: Layout) -> _Family:
    """The family of a site; ValueError if its distribution cannot be made again from parameters per datum."""
    name, distribution, dim = site["name"], site["fn"], layout.dim
    assert dim is not None  # `guide_of` has checked it
    leaf, transforms = _opened(distribution)
    kind = type(leaf).__name__
    if not distribution.has_rsample:
        raise ValueError(
            f"refinement needs reparameterised draws, and site '{name}' of the guide has none ({kind}): take another "
            f"distribution there, or sum the site out"
        )
    if site["mask"] is not None:
        raise ValueError(f"site '{name}' of the guide is masked, and {kind} is refined as a whole: {_ADVICE}")
    for transform in transforms:
        if not _is_fixed(transform):
            raise ValueError(
                f"the transform {type(transform).__name__} of site '{name}' of the guide may hold parameters of each "
                f"datum, which cannot be told from those that all data share: {_ADVICE}"
            )
    names = set(leaf.arg_constraints)
    for others, kept in _REDUNDANT:
        names -= others if kept in names else set()
    axis = len(distribution.batch_shape) + dim
    arguments = []
    try:
        for key in sorted(names):
            constrain = _map_to(leaf.arg_constraints[key])
            if not _is_fixed(constrain):
                raise ValueError(f"what '{key}' may be depends on other arguments")
            shape = _free(leaf, key, constrain).movedim(axis, 0).shape[1:]
            arguments.append(_Argument(key, constrain, shape))
        plates = [frame for frame in site["cond_indep_stack"] if frame.dim is not None]
        shape = site["value"].shape
        event = shape[:axis] + shape[axis + 1 :]
        family = _Family(name, distribution, arguments, axis, dim, plates, event)
        parameters, value = family.read(site), site["value"]
        # The same class with the same named arguments may still be another distribution, for example of a subclass.
        first = distribution.log_prob(value)
        second = family.in_place(parameters).log_prob(value)
        third = family.per_datum(parameters[-1:]).log_prob(value.movedim(axis, 0)[-1:])
        same = torch.allclose(first, second, rtol=1e-4, atol=1e-3)
        same = same and torch.allclose(first.movedim(axis, 0)[-1].sum(), third, rtol=1e-4, atol=1e-3)
    except Exception as error:
        raise ValueError(_cannot(name, kind, f"{type(error).__name__}: {error}".splitlines()[0])) from error
    if not same:
        raise ValueError(_cannot(name, kind, "its density is then another one"))
    return family


def _cannot(name: str, kind: str, reason: str) -> str:
    return f"{kind} at site '{name}' of the guide cannot be made again from its `arg_constraints` ({reason}): {_ADVICE}"


def _free(leaf: Any, name: str, constrain: Any) -> Tensor:
    """An argument as real numbers, with the batch shape of its distribution in front."""
    value = getattr(leaf, name)
    event = value.shape[value.ndim - leaf.arg_constraints[name].event_dim :]
    return constrain.inv(value.expand(leaf.batch_shape + event))


def _map_to(constraint: Any) -> Any:
    """The map from real numbers to what a constraint allows; NotImplementedError if there is none."""
    try:
        return biject_to(constraint)
    except NotImplementedError:  # lower triangular matrices: the numbers above the diagonal are left out
        return transform_to(constraint)


def _leaf(distribution: Any) -> Any:
    """The distribution whose arguments are free: inside `to_event` and fixed transforms."""
    return _opened(distribution)[0]


def _opened(distribution: Any) -> tuple[Any, list[Any]]:
    """(`_leaf` of a distribution, the transforms around it)."""
    found: list[Any] = []
    while isinstance(distribution, Independent) or _is_transformed(distribution):
        found += getattr(distribution, "transforms", [])
        distribution = distribution.base_dist
    return distribution, found


def _is_transformed(distribution: Any) -> bool:
    """Whether it is a `TransformedDistribution` and no family of its own with named arguments, as LogNormal is."""
    return isinstance(distribution, TransformedDistribution) and not distribution.arg_constraints


def _is_fixed(transform: Any) -> bool:
    """Whether a transform has no parameters, or numbers only."""
    if isinstance(transform, maps.ComposeTransform):
        return all(map(_is_fixed, transform.parts))
    if isinstance(transform, maps.IndependentTransform):
        return _is_fixed(transform.base_transform)
    if isinstance(transform, maps._InverseTransform):
        return _is_fixed(transform.inv)
    if isinstance(transform, maps.AffineTransform | maps.PowerTransform):
        numbers = [vars(transform).get(name, 0.0) for name in ("loc", "scale", "exponent")]
        return all(torch.as_tensor(number).ndim == 0 for number in numbers)
    return isinstance(transform, _FIXED)


def _around(like: Any, leaf: Any) -> Any:
    """`leaf` inside what `like` has around its own."""
    if isinstance(like, Independent):
        return dist.Independent(_around(like.base_dist, leaf), like.reinterpreted_batch_ndims)
    if _is_transformed(like):
        return dist.TransformedDistribution(_around(like.base_dist, leaf), like.transforms)
    return leaf
