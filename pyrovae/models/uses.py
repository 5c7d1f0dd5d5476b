"""What a trained pair is used for: pictures and codes of data, from a model's `decode` and a guide's `posterior`.

A code is a point z of the latent space; that of a datum is its embedding, the mean of q(z|x). Everything is evaluated in
eval mode, without gradients, on the device of the modules; results are on the device of the data given.

Of a hierarchical pair z is all layers side by side. `decode` takes upper layers alone too, so with a `TopDownGuide` every
function here works on the top layer where `guide.top` stands for the guide: `interpolate(model, guide.top, a, b)`.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyrovae.common.arguments import check_count
from pyrovae.guides.base import Guide
from pyrovae.models.generative import LatentVariableModel
from pyrovae.programs.reach import evaluation_mode

__all__ = ["attribute_direction", "edit", "embed", "interpolate", "reconstruct", "sample_posterior", "traverse"]

_ROWS = 500  # data or codes that go through the networks at once


def embed(guide: Guide, x: Tensor) -> Tensor:
    """Codes of data: the means of q(z|x).

    z_n = E_q(z|x_n) [ z ]

    Shapes: x (N, *data_shape) -> (N, D). A Monte Carlo mean where the guide has no other (flows).

    Source: Kingma & Welling, Auto-Encoding Variational Bayes (2014).
    """
    return _of_posterior(guide, x, lambda posterior: posterior.mean, dim=0)


def sample_posterior(guide: Guide, x: Tensor, num_samples: int) -> Tensor:
    """Draw codes of data from q(z|x).

    z_sn ~ q(z|x_n)

    Shapes: x (N, *data_shape) -> (num_samples, N, D); `model.decode` takes them as they are.

    Raises TypeError/ValueError unless `num_samples` is a whole number of 1 or more.
    """
    num_samples = check_count("num_samples", num_samples)
    return _of_posterior(guide, x, lambda posterior: posterior.sample((num_samples,)), dim=1)


def reconstruct(model: LatentVariableModel, guide: Guide, x: Tensor, *, mean: bool = True) -> Tensor:
    """Data as the pair remembers them: encoded, and decoded again.

    E[x' | z = E_q(z|x) z],   or with `mean=False` a draw x' ~ p(x'|z), z ~ q(z|x)

    Shapes: x (N, *data_shape) -> (N, *data_shape).

    Source: Kingma & Welling, Auto-Encoding Variational Bayes (2014).
    """
    z = embed(guide, x) if mean else sample_posterior(guide, x, 1)[0]
    return _decode(model, z, mean=mean)


def interpolate(
    model: LatentVariableModel, guide: Guide, a: Tensor, b: Tensor, num_steps: int = 10, *, spherical: bool = False
) -> Tensor:
    """Pictures on the way from one datum to another, through the space of codes.

    x(t) = E[x | z(t)],   t = 0 ... 1 in num_steps steps,   z_a, z_b the codes of a and b,
    z(t) = (1 - t) z_a + t z_b,   or with `spherical`  [ sin((1 - t) w) z_a + sin(t w) z_b ] / sin w,  w the angle between

    The straight line is the default, as it supposes nothing of the prior. Between draws from a standard normal of many
    dimensions it passes closer to 0 than any draw lies, and the arc does not; under a learned prior, and for codes of
    unlike lengths, the arc has no such meaning. (Where the codes point the same way or are opposite, the line is taken.)

    Shapes: a, b (N, *data_shape) -> (N, num_steps, *data_shape); the first and last pictures are the reconstructions.

    Raises ValueError for shapes that differ or fewer than 2 steps.

    Source: White, Sampling Generative Networks (2016).
    """
    if a.shape != b.shape:
        raise ValueError(f"a and b must be as many data of one shape, found {tuple(a.shape)} and {tuple(b.shape)}")
    num_steps = check_count("num_steps", num_steps)
    if num_steps < 2:
        raise ValueError(f"num_steps counts both ends and must be 2 or more, found {num_steps}")
    z_a, z_b = embed(guide, a).unsqueeze(1), embed(guide, b).unsqueeze(1)
    t = torch.linspace(0, 1, num_steps, dtype=z_a.dtype, device=z_a.device).unsqueeze(-1)
    z = (1 - t) * z_a + t * z_b
    if spherical:
        angle = torch.linalg.vecdot(*(torch.nn.functional.normalize(code, dim=-1) for code in (z_a, z_b)))
        angle = angle.clamp(-1, 1).acos().unsqueeze(-1)
        arc = (((1 - t) * angle).sin() * z_a + (t * angle).sin() * z_b) / angle.sin()
        z = torch.where(angle.sin() < 1e-3, z, arc)
    return _decode(model, z)


def traverse(model: LatentVariableModel, z: Tensor, dimension: int, values: Sequence[float] | Tensor) -> Tensor:
    """Pictures as one latent takes other values and all others stay.

    E[x | z_1, ..., z_d = v, ..., z_D]   for each value v

    z: where to start, (N, D): `embed(guide, x)`, or draws from the prior
    dimension: d, from 0; values: -3 to 3 under a standard normal prior

    Shapes: -> (N, len(values), *data_shape).

    Raises ValueError if z is not (N, D), there are no values or no such dimension.
    """
    if z.ndim != 2 or not -z.shape[-1] <= dimension < z.shape[-1]:
        raise ValueError(f"expected codes z (N, D) and a dimension below D, found {tuple(z.shape)} and {dimension}")
    values = _numbers("values", values, z)
    z = z.unsqueeze(1).repeat(1, len(values), 1)
    z[..., dimension] = values
    return _decode(model, z)


def attribute_direction(guide: Guide, x: Tensor, mask: Tensor, *, groups: Tensor | None = None) -> Tensor:
    """Direction of an attribute in the space of codes: from the mean code of data without it to that of data with it.

    v = mean( z_n : mask_n ) - mean( z_n : not mask_n ),   z_n the code of x_n;   with `groups`, the mean of the v_g found
    in each group g, a group counting as often as it has data

    mask: which data have it, bool (N,): `labels == 7`, or a measured attribute cut in two, `slant > slant.median()`
    groups: what to hold constant, whole numbers (N,): bold digits are rarely ones, and without `groups=labels` the
        direction "less bold" turns every digit into a one. A group with only one kind of data tells nothing and is left out

    Shapes: x (N, *data_shape) -> (D,).

    Raises ValueError unless the mask is bool (N,), groups are whole numbers (N,), and some data of a group have the
    attribute and some do not.

    Source: Larsen, Sønderby, Larochelle & Winther, Autoencoding beyond pixels using a learned similarity metric (2016);
    groups: White, Sampling Generative Networks (2016).
    """
    if mask.dtype != torch.bool or mask.shape != x.shape[:1]:
        raise ValueError(
            f"mask must be bool ({len(x)},), labels == 7 for instance; found {mask.dtype}, shape {tuple(mask.shape)}"
        )
    groups = torch.zeros_like(mask, dtype=torch.long) if groups is None else groups
    if groups.is_floating_point() or groups.shape != mask.shape:
        raise ValueError(
            f"groups must be whole numbers ({len(x)},), labels for instance; found {groups.dtype}, shape "
            f"{tuple(groups.shape)}"
        )
    z, mask, groups = embed(guide, x), mask.to(x.device), groups.to(x.device)
    total, count = torch.zeros_like(z[0]), 0
    for group in groups.unique():
        here = groups == group
        if (here & mask).any() and (here & ~mask).any():
            total += here.sum() * (z[here & mask].mean(0) - z[here & ~mask].mean(0))
            count += int(here.sum())
    if count == 0:
        raise ValueError(
            f"a direction needs data with and without the attribute in one group, found {int(mask.sum())} of {len(x)} with it"
        )
    return total / count


def edit(
    model: LatentVariableModel, guide: Guide, x: Tensor, direction: Tensor, amounts: Sequence[float] | Tensor
) -> Tensor:
    """Pictures of data moved along a direction: latent arithmetic, "more bold", "less slanted".

    E[x' | z + c v]   for each amount c,   z the code of x

    direction: v (D,), of `attribute_direction` for instance
    amounts: 0 gives the reconstruction, 1 goes as far as from the data without the attribute to those with it

    Shapes: x (N, *data_shape) -> (N, len(amounts), *data_shape).

    Raises ValueError for a direction that is not (D,), or no amounts.

    Source: Larsen, Sønderby, Larochelle & Winther, Autoencoding beyond pixels using a learned similarity metric (2016).
    """
    z = embed(guide, x)
    if direction.shape != z.shape[1:]:
        raise ValueError(f"the direction must be ({z.shape[1]},), as codes are, found {tuple(direction.shape)}")
    amounts = _numbers("amounts", amounts, z).unsqueeze(-1)
    return _decode(model, z.unsqueeze(1) + amounts * direction.to(z))


@torch.no_grad()
def _of_posterior(guide: Guide, x: Tensor, take: Callable, dim: int) -> Tensor:
    """take(q(z|x)) of all data, in batches that lie along `dim` of the result."""
    with evaluation_mode(guide) as device:
        return torch.cat([take(guide.posterior(rows.to(device))).to(x.device) for rows in x.split(_ROWS)], dim)


def _decode(model: LatentVariableModel, z: Tensor, *, mean: bool = True) -> Tensor:
    """Pictures of codes (..., D), in batches."""
    with evaluation_mode(model) as device:
        pictures = [model.decode(codes.to(device), mean=mean) for codes in z.flatten(0, -2).split(_ROWS)]
    return torch.cat(pictures).to(z.device).unflatten(0, z.shape[:-1])


def _numbers(name: str, values: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    values = torch.as_tensor(values, dtype=like.dtype, device=like.device)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name} must be a list of at least one number, found shape {tuple(values.shape)}")
    return values
