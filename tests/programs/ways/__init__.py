"""Pyro's ways of writing a model and a guide, each with its exact evidence or the refusal it must get.

Each file beside this one is a list; `test_pyro_ways.py` judges them, and `PYTHONPATH=tests/programs python -m ways [WORD]` runs
all of them, or those with this word in their name, and prints what is wrong and the table of `tests/README.md`.
"""

import importlib
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyrovae as pv

LISTS = (
    "guides",
    "guides_together",
    "masks",
    "scales",
    "discrete",
    "supports",
    "angles",
    "flows",
    "reparam",
    "reparam_auxiliary",
    "calls",
    "statements",
    "plates",
    "sequences",
    "axes",
    "coupled",
)
NUM_PARTICLES = 4000
# A number that is known no better could hardly be found wrong, and above this k its error is not to be trusted.
LARGEST_STDERR, LARGEST_K = 0.1, 0.7


class Pair(NamedTuple):
    """A pair of programs with the arguments they are called with.

    exact: log p per datum (N,), or of the whole program (1,); None for a pair that must be refused
    options: further options of `log_marginal_likelihood`
    """

    model: Callable
    guide: Callable
    args: tuple = ()
    exact: Tensor | None = None
    kwargs: dict[str, Any] = {}
    options: dict[str, Any] = {}


class Way(NamedTuple):
    """One way. refusal: words that the error must hold; None: it must be right."""

    kind: str
    make: Callable[[], Pair]
    refusal: str | None


WAYS: dict[str, Way] = {}


def way(kind: str, refusal: str | None = None, *, name: str | None = None) -> Callable:
    """Decorator: put a function that makes a pair on the list."""

    def register(make: Callable[[], Pair]) -> Callable[[], Pair]:
        title = f"{kind}: {name or make.__name__.replace('_', ' ').strip()}"
        assert title not in WAYS, title
        WAYS[title] = Way(kind, make, refusal)
        return make

    return register


def judge(pair: Pair, refusal: str | None) -> tuple[str, str]:
    """("right" | "refused" | "wrong", why): what the library makes of a pair."""
    options = {"num_particles": NUM_PARTICLES, **pair.options}
    try:
        with warnings.catch_warnings():
            # Correct, only slow: that it says so is tested elsewhere.
            warnings.filterwarnings("ignore", message="particles are drawn one by one")
            result = pv.log_marginal_likelihood(pair.model, pair.guide, *pair.args, **options, **pair.kwargs)
    except (ValueError, TypeError) as error:
        if refusal is None:
            return "wrong", f"refused, and there is an answer: {error}"
        if re.search(refusal, str(error)):
            return "refused", str(error)
        return "wrong", f"refused for another reason than {refusal!r}: {error}"
    if refusal is not None:
        right = "" if pair.exact is None else f"; the right value is {_rounded(pair.exact)}"
        return "wrong", f"not refused ({refusal!r}): {_rounded(result.log_prob)}{right}"
    assert pair.exact is not None
    found, exact = result.log_prob, pair.exact.detach().double().reshape(-1)
    said = f"{_rounded(found)} +- {_rounded(result.stderr)}, exact {_rounded(exact)}"
    if found.shape != exact.shape:
        return "wrong", f"{len(found)} numbers for {len(exact)}: {said}"
    if not (result.stderr <= LARGEST_STDERR).all() or (result.pareto_k > LARGEST_K).any():
        return "wrong", f"the error is too large to tell (k {_rounded(result.pareto_k)}): {said}"
    # 4.5 standard errors: a right number fails by chance once in 150,000; the summand is rounding, for exact guides.
    if not ((found - exact).abs() <= 4.5 * result.stderr + 1e-7).all():
        return "wrong", said
    return "right", said


def _rounded(tensor: Tensor) -> list[float]:
    return [round(number, 4) for number in tensor.flatten().tolist()][:6]


def table(count: Counter[tuple[str, str]]) -> list[str]:
    """Rows of the README's table, of how often each (kind, outcome) occurs."""
    outcomes = ("right", "refused", "wrong")
    kinds = sorted({kind for kind, _ in count})
    rows = [["kind", *outcomes]]
    rows += [[kind, *(str(count[kind, outcome]) for outcome in outcomes)] for kind in kinds]
    rows.append(["all", *(str(sum(count[kind, outcome] for kind in kinds)) for outcome in outcomes)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|---|---|---|---|", *lines[1:]]


def load() -> dict[str, Way]:
    """All ways, by name."""
    for module in LISTS:
        importlib.import_module(f"ways.{module}")
    return WAYS


# --- a pair that many ways vary: z ~ N(0, 1), x ~ N(z, 1), so that x ~ N(0, 2) and z | x ~ N(x / 2, 1 / 2) --------------

X = (0.5, -1.0, 2.0)


def normal_data() -> Tensor:
    return torch.tensor(X)


def normal_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def wide_guide(x: Tensor) -> None:
    """Somewhat wider than the posterior, so that the weights are bounded and not constant."""
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, 0.8))


def normal_evidence(x: Tensor) -> Tensor:
    return dist.Normal(0.0, math.sqrt(2)).log_prob(x)


def on_grid(log_joint: Callable[[Tensor], Tensor], low: float, high: float, num: int = 20_001) -> Tensor:
    """log of the integral of exp(log_joint(z)) dz over [low, high]; z (num, 1) -> (num, N)."""
    edges = torch.linspace(low, high, num + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    return log_joint(middles.unsqueeze(1)).logsumexp(0) + math.log((high - low) / num)


def given(model, guide, *args, exact=normal_evidence, **kwargs) -> Pair:
    """A pair called with these arguments, whose evidence is a function of `normal_data()`."""
    return Pair(model, guide, args, exact(normal_data()), kwargs)


def proposal(*sites: tuple[str, Callable[[Tensor], Any]]) -> Callable:
    """A guide of (name, distribution given the data) in the plate of the data."""

    def guide(x):
        with pyro.plate("data", len(x)):
            for name, make in sites:
                pyro.sample(name, make(x))

    return guide
