"""Discrete sites that are summed out exactly: programs run with all values of these sites at once, and their tables.

A site marked with infer={"enumerate": ...} (by hand or by `config_enumerate`) that the guide does not draw has no value
in a trace. Pyro's `enum` handler runs the program with all its values along a new batch dimension, left of plates and
particles, so that log densities become tables. `contracted` sums over the values, with the terms of each datum and
particle apart:

    log p(x, z) = log sum_y p(y) p(z | y) p(x | z, y)

Along a `pyro.markov` chain the cost is linear in its length. How a site is marked, "parallel" or "sequential", and
"num_samples" make no difference: the sum is exact.
"""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from pyro import poutine
from pyro.ops.contract import contract_tensor_tree
from pyro.ops.packed import pack
from pyro.ops.rings import LogRing
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyrovae.common.arguments import checks_values
from pyrovae.programs.supports import innermost

__all__ = [
    "SummedOut",
    "at_any",
    "at_best",
    "check_enumerable",
    "contracted",
    "holds_sums",
    "is_summed",
    "summed_dims",
    "without_sums",
]

_SUMMED = "_pyrovae_summed"
# What the `enum` and `markov` handlers note at a site, which another run must not take over.
_KEYS_OF_PYRO = {
    "_dim_to_id",
    "_dim_to_symbol",
    "_enumerate_dim",
    "_enumerate_symbol",
    "_markov_scope",
    "_markov_depth",
}


@dataclass(frozen=True)
class SummedOut:
    """A program some of whose sites are summed out: a run of it holds tables over their values.

    Attributes:
        drawn: The program itself, which draws these sites.
        names: The sites that are summed out.
        max_plate_nesting: The number of batch dimensions that plates use; one more is left free for particles.
    """

    drawn: Callable[..., Any]
    names: frozenset[str]
    max_plate_nesting: int

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with poutine.enum(first_available_dim=-2 - self.max_plate_nesting), _Marks(self.names):
            return self.drawn(*args, **kwargs)

    def around(self, program: Callable[..., Any]) -> "SummedOut":
        """The same sums in another program."""
        return SummedOut(program, self.names, self.max_plate_nesting)

    def clean(self, trace: poutine.Trace) -> poutine.Trace:
        """The latents of a trace to replay: without the sites that are summed out, and what handlers noted there."""
        cleaned = poutine.Trace()
        for name, site in trace.nodes.items():
            if site["type"] == "sample" and name not in self.names and not is_summed(site):
                infer = {key: value for key, value in site["infer"].items() if key not in _KEYS_OF_PYRO}
                cleaned.add_node(name, **{**site, "infer": infer})
        return cleaned


class _Marks(Messenger):
    """Marks these sites for `poutine.enum`, and no others."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__()
        self.names = names
        self.seen: set[str] = set()

    def __enter__(self) -> "_Marks":
        self.seen = set()
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        # `enum` looks up each site of a markov scope, and cannot find those that a `block` inside hides from it.
        self.seen.add(msg["name"])
        if (scope := msg["infer"].get("_markov_scope")) is not None:
            seen = type(scope)({name: depth for name, depth in scope.items() if name in self.seen})
            msg["infer"] = {**msg["infer"], "_markov_scope": seen}
        if msg["name"] in self.names and not msg["is_observed"]:
            infer = {"enumerate": "parallel", "expand": False, "num_samples": None, _SUMMED: True}
            msg["infer"] = {**msg["infer"], **infer}
        elif msg["infer"].get("enumerate"):
            msg["infer"] = {**msg["infer"], "enumerate": None}


def is_summed(site: dict) -> bool:
    """Whether a site of a trace holds all its values, to be summed out."""
    return _SUMMED in site["infer"]


def holds_sums(trace: poutine.Trace) -> bool:
    """Whether some site of a trace is summed out."""
    return any(site["type"] == "sample" and is_summed(site) for site in trace.nodes.values())


def check_enumerable(site: dict, program: str) -> None:
    """Raise ValueError if the values of a site cannot be listed."""
    distribution, name = site["fn"], site["name"]
    problem = f"site '{name}' of the {program} is marked for enumeration, and the values of {distribution} "
    if distribution.has_enumerate_support:
        try:
            distribution.enumerate_support(expand=False)
            return
        except NotImplementedError as error:
            raise ValueError(
                f"{problem}cannot be listed ({error}): give all elements the same number of values, or sample the site "
                f"in both programs without the mark"
            ) from error
    remedy = "sample the site in both programs without the mark"
    if innermost(distribution) is not distribution and innermost(distribution).has_enumerate_support:
        remedy = f"replace .to_event(...) by a plate inside the datum, or {remedy}"
    elif getattr(distribution.support, "is_discrete", False):
        remedy = f"give it a distribution with few values (Categorical, Binomial), or {remedy}"
    raise ValueError(f"{problem}cannot be listed: {remedy}")


def summed_dims(site: dict, batch_shape: Sequence[int]) -> list[int]:
    """The dimensions of a site's table that stand for values of summed sites, negative."""
    dims = site["infer"].get("_dim_to_id", ())
    return [dim for dim in range(-len(batch_shape), 0) if dim in dims and batch_shape[dim] > 1]


def at_best(log_prob: Tensor, site: dict) -> Tensor:
    """The largest entry of a site's table over the values of summed sites, with the batch shape without them."""
    return _without_sums(log_prob, site, 0, lambda table, dim: table.amax(dim, keepdim=True))


def at_any(elements: Tensor, site: dict, parts: int) -> Tensor:
    """Elements (*batch_shape, *parts) that are marked at one value of the summed sites or more."""
    return _without_sums(elements, site, parts, lambda table, dim: table.any(dim, keepdim=True))


def without_sums(mask: Tensor, site: dict, parts: int) -> Tensor:
    """A mask (*batch_shape, *parts) without the dimensions of summed sites, on which it must not depend."""

    def first(mask: Tensor, dim: int) -> Tensor:
        if checks_values() and not (mask == mask.narrow(dim, 0, 1)).all():
            raise ValueError(
                f"the mask of site '{site['name']}' depends on a site that is summed out, so there is no mask of the "
                f"latent for all values: sample the summed site in both programs without the mark for enumeration"
            )
        return mask.narrow(dim, 0, 1)

    return _without_sums(mask, site, parts, first)


def _without_sums(table: Tensor, site: dict, parts: int, remove: Callable[[Tensor, int], Tensor]) -> Tensor:
    dims = summed_dims(site, table.shape[: table.ndim - parts])
    for dim in dims:
        table = remove(table, dim - parts)
    # Only plates and particles stand right of the dimensions of summed sites.
    return table.reshape(table.shape[table.ndim - parts + max(dims) + 1 :]) if dims else table


def contracted(tables: Iterable[tuple[dict, Tensor]], kept: Sequence[str]) -> Tensor:
    """Sum products of tables over the values of summed sites; add up over plates, except those kept.

    Args:
        tables: Sites of a trace with their log densities.
        kept: Plates whose elements stay apart.

    Returns:
        The log of the sum, with one dimension for each kept plate, in order; its size is 1 if no table has it.

    Raises:
        ValueError: If a site outside a plate depends on a summed site inside.
    """
    plates: dict[str, str] = {}
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    values: set[str] = set()
    names: list[str] = []
    for site, table in tables:
        symbols = {dim: _symbol(1 + 2 * id) for dim, id in site["infer"].get("_dim_to_id", {}).items()}
        values |= set(symbols.values())
        within = set()
        for frame in site["cond_indep_stack"]:
            if frame.vectorized:
                symbol = plates.setdefault(frame.name, _symbol(2 * len(plates)))
                symbols[frame.dim] = symbol
                within |= {symbol} if frame.name not in kept else set()
        tree.setdefault(frozenset(within), []).append(pack(table, symbols))
        names += [site["name"]] if is_summed(site) else []
    present = {symbol for terms in tree.values() for term in terms for symbol in _dims(term)}
    try:
        summed = contract_tensor_tree(tree, values & present, ring=_LogSums())
    except (NotImplementedError, ValueError) as error:
        raise ValueError(
            f"the values of site(s) {sorted(names)} cannot be summed out, because a site outside a plate depends on one "
            f"that is summed out inside of it ({' '.join(str(error).split())}): move the site into the plate, or sample "
            f"the summed site in both programs without the mark for enumeration"
        ) from error
    order = [plates.get(plate, "") for plate in kept]
    return reduce(add, (_laid_out(term, order) for terms in summed.values() for term in terms))


def _symbol(number: int) -> str:
    """A character as the name of a dimension: even numbers for plates, odd ones for summed sites."""
    return chr(256 + number)


def _dims(term: Tensor) -> str:
    """The names of a packed tensor's dimensions, where Pyro's contraction looks for them."""
    return term._pyro_dims  # type: ignore[attr-defined]


def _name(term: Tensor, dims: str) -> None:
    term._pyro_dims = dims  # type: ignore[attr-defined]


def _laid_out(term: Tensor, order: Sequence[str]) -> Tensor:
    """A term with these dimensions in order; summed over all others."""
    if others := [position for position, symbol in enumerate(_dims(term)) if symbol not in order]:
        dims = [symbol for symbol in _dims(term) if symbol in order]
        term = term.sum(others)
    else:
        dims = list(_dims(term))
    term = term.permute([dims.index(symbol) for symbol in order if symbol in dims])
    sizes = iter(term.shape)
    return term.reshape([next(sizes) if symbol in dims else 1 for symbol in order])


class _LogSums(LogRing):
    """Sums and products of tables in log space.

    Pyro's own ring multiplies exp(log p - its maximum) of each table. If the maxima of two tables lie apart by some
    hundred nats, as those of p(z | y) and p(x | z, y) of images do, all the products are 0 in floating point. Here,
    log densities are added before the exponential.
    """

    def sumproduct(self, terms: Sequence[Tensor], dims: set[str]) -> Tensor:
        """Eliminate one dimension after the other, the one with the smallest table first."""
        terms = list(terms)
        sizes = {symbol: size for term in terms for symbol, size in zip(_dims(term), term.shape, strict=True)}
        holders: dict[str, list[Tensor]] = {dim: [term for term in terms if dim in _dims(term)] for dim in dims}

        def cost(dim: str) -> int:
            return math.prod(sizes[symbol] for symbol in {s for term in holders[dim] for s in _dims(term)})

        costs = {dim: cost(dim) for dim in sorted(dims)}
        while costs:
            dim = min(costs, key=costs.__getitem__)
            del costs[dim]
            used = holders.pop(dim)
            product = _product(used)
            left = _dims(product)
            term = _logsumexp(product, left.index(dim))
            _name(term, left.replace(dim, ""))
            gone = set(map(id, used))
            terms = [*(other for other in terms if id(other) not in gone), term]
            for other in holders:
                if other in left:
                    holders[other] = [*(held for held in holders[other] if id(held) not in gone), term]
                    costs[other] = cost(other)
        return _product(terms)


def _logsumexp(terms: Tensor, dim: int) -> Tensor:
    """torch.logsumexp with a gradient of 0, not NaN, if all terms are -inf (a state that cannot be reached)."""
    largest = terms.detach().amax(dim, keepdim=True).clamp_min(torch.finfo(terms.dtype).min)
    total = (terms - largest).exp().sum(dim)
    nothing = total == 0
    return torch.where(nothing, -torch.inf, torch.where(nothing, 1.0, total).log() + largest.squeeze(dim))


def _product(terms: Sequence[Tensor]) -> Tensor:
    """The sum of logs, aligned by the names of their dimensions."""
    dims = "".join(sorted({symbol for term in terms for symbol in _dims(term)}))
    total = None
    for term in terms:
        own = _dims(term)
        aligned = term.permute([own.index(symbol) for symbol in dims if symbol in own])
        sizes = iter(aligned.shape)
        aligned = aligned.reshape([next(sizes) if symbol in own else 1 for symbol in dims])
        total = aligned if total is None else total + aligned
    assert total is not None
    total = total.clone() if len(terms) == 1 else total  # the name of the dimensions is noted on a tensor of its own
    _name(total, dims)
    return total
