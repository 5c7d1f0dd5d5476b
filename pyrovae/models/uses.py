"""Uses of a trained pair: codes and images of data, from a model's `decode` and a guide's `posterior`.

A code is a point z of the latent space; the code of a datum (its embedding) is the mean of q(z|x). Everything is
evaluated in eval mode, without gradients, on the device of the modules; results are on the device of the data given.

For a hierarchical pair, z holds all layers side by side. `decode` accepts upper layers alone too, so with a
`TopDownGuide` every function here works on the top layer if it is given `guide.top` as the guide: `interpolate(model,
guide.top, a, b)`.

Of a pair that is called with a context, every function takes `context=`, one row for each datum; of data with missing
values, `embed`, `sample_posterior` and `reconstruct` take the mask `observed=`. NumPy arrays and frames are taken in
place of tensors, and become tensors of the programs' dtype.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyrovae.common.arguments import check_count
from pyrovae.common.networks import check_context
from pyrovae.data.conversion import check_same_columns, check_same_rows
from pyrovae.guides.base import Guide
from pyrovae.models.generative import LatentVariableModel
from pyrovae.models.guide_inputs import batches, data_of, given_tensor, inputs_of
from pyrovae.programs.reach import evaluation_mode

__all__ = ["attribute_direction", "edit", "embed", "interpolate", "reconstruct", "sample_posterior", "traverse"]

_ROWS = 500  # number of data or codes that pass through the networks at once


def embed(guide: Guide, x: Tensor, *, context: Tensor | None = None, observed: Tensor | None = None) -> Tensor:
    """Return the codes of data, the means of q(z|x).

        z_n = E_q(z|x_n) [ z ]

    Args:
        guide: guide of the pair
        x: data (N, *data_shape)
        context: what the pair is conditioned on, (N, ...)
        observed: mask of what is known of x, shaped like x

    Returns:
        (N, D). A Monte Carlo mean if the guide has no closed-form mean (flows).

    References:
        Kingma & Welling, Auto-Encoding Variational Bayes (2014).
    """
    return _of_posterior(guide, x, context, observed, lambda posterior: posterior.mean, dim=0)


def sample_posterior(
    guide: Guide, x: Tensor, num_samples: int, *, context: Tensor | None = None, observed: Tensor | None = None
) -> Tensor:
    """Draw codes of data from q(z|x).

        z_sn ~ q(z|x_n)

    Args:
        guide: guide of the pair
        x: data (N, *data_shape)
        num_samples: draws per datum
        context: what the pair is conditioned on, (N, ...)
        observed: mask of what is known of x, shaped like x

    Returns:
        (num_samples, N, D), as `model.decode` accepts them.

    Raises:
        TypeError, ValueError: unless `num_samples` is a whole number of 1 or more.
    """
    num_samples = check_count("num_samples", num_samples)
    return _of_posterior(guide, x, context, observed, lambda posterior: posterior.sample((num_samples,)), dim=1)


def reconstruct(
    model: LatentVariableModel,
    guide: Guide,
    x: Tensor,
    *,
    mean: bool = True,
    context: Tensor | None = None,
    observed: Tensor | None = None,
) -> Tensor:
    """Encode data and decode them again.

        E[x' | z = E_q(z|x) z],   or with `mean=False` a draw x' ~ p(x'|z), z ~ q(z|x)

    Args:
        model, guide: the pair
        x: data (N, *data_shape)
        mean: use means instead of draws; for three or more `Categories` the most probable one
        context: what the pair is conditioned on, (N, ...)
        observed: mask of what is known of x, shaped like x

    Returns:
        (N, *data_shape).
    """
    check_same_rows(x=x, context=context, observed=observed)
    x = data_of(x, guide, model)
    context = given_tensor("context", context, guide)
    known = {"context": context, "observed": observed}
    z = embed(guide, x, **known) if mean else sample_posterior(guide, x, 1, **known)[0]
    return _decode(model, z, context, mean=mean)


def interpolate(
    model: LatentVariableModel,
    guide: Guide,
    a: Tensor,
    b: Tensor,
    num_steps: int = 10,
    *,
    spherical: bool = False,
    context: Tensor | None = None,
) -> Tensor:
    """Return images on the way from one datum to another, through the space of codes.

        x(t) = E[x | z(t)],   t = 0 ... 1 in num_steps steps,   z_a, z_b the codes of a and b,
        z(t) = (1 - t) z_a + t z_b,   or with `spherical`
        z(t) = [ sin((1 - t) w) z_a + sin(t w) z_b ] / sin w,   w the angle between z_a and z_b

    The straight line is the default, because it assumes nothing about the prior. Between draws from a standard normal
    of many dimensions, it passes closer to 0 than any draw lies; the arc does not. Under a learned prior, and for codes
    of different lengths, the arc has no such justification. (If the codes point in the same or opposite directions, the
    line is used.)

    Args:
        model, guide: the pair
        a, b: data to start from and to end at (N, *data_shape)
        num_steps: images per pair of data, both ends included
        spherical: follow the arc instead of the line
        context: what the pair is conditioned on, (N, ...), for both ends and on the way

    Returns:
        (N, num_steps, *data_shape); the first and last images are the reconstructions.

    Raises:
        ValueError: for shapes that differ or fewer than 2 steps.

    References:
        White, Sampling Generative Networks (2016).
    """
    check_same_columns(a=a, b=b)
    a, b = (data_of(end, guide, model, name) for name, end in (("a", a), ("b", b)))
    context = given_tensor("context", context, guide)
    if a.shape != b.shape:
        raise ValueError(f"a and b must have the same shape, found {tuple(a.shape)} and {tuple(b.shape)}")
    num_steps = check_count("num_steps", num_steps)
    if num_steps < 2:
        raise ValueError(f"num_steps counts both ends and must be 2 or more, found {num_steps}")
    z_a, z_b = (embed(guide, end, context=context).unsqueeze(1) for end in (a, b))
    t = torch.linspace(0, 1, num_steps, dtype=z_a.dtype, device=z_a.device).unsqueeze(-1)
    z = (1 - t) * z_a + t * z_b
    if spherical:
        angle = torch.linalg.vecdot(*(torch.nn.functional.normalize(code, dim=-1) for code in (z_a, z_b)))
        angle = angle.clamp(-1, 1).acos().unsqueeze(-1)
        arc = (((1 - t) * angle).sin() * z_a + (t * angle).sin() * z_b) / angle.sin()
        z = torch.where(angle.sin() < 1e-3, z, arc)
    return _decode(model, z, context)


def traverse(
    model: LatentVariableModel,
    z: Tensor,
    dimension: int,
    values: Sequence[float] | Tensor,
    *,
    context: Tensor | None = None,
) -> Tensor:
    """Return images as one latent dimension changes and all others stay fixed.

        E[x | z_1, ..., z_d = v, ..., z_D]   for each value v

    Args:
        model: model of the pair
        z: codes to start from (N, D): `embed(guide, x)`, or draws from the prior
        dimension: d, counted from 0
        values: values v; for a standard normal prior, from -3 to 3
        context: what the model is conditioned on, (N, ...)

    Returns:
        (N, len(values), *data_shape).

    Raises:
        ValueError: if z is not (N, D), there are no values, or there is no such dimension.
    """
    z = given_tensor("z", z, model)
    context = given_tensor("context", context, model)
    if z.ndim != 2 or not -z.shape[-1] <= dimension < z.shape[-1]:
        raise ValueError(f"expected codes z (N, D) and a dimension below D, found {tuple(z.shape)} and {dimension}")
    values = _numbers("values", values, z)
    z = z.unsqueeze(1).repeat(1, len(values), 1)
    z[..., dimension] = values
    return _decode(model, z, context)


def attribute_direction(
    guide: Guide, x: Tensor, mask: Tensor, *, groups: Tensor | None = None, context: Tensor | None = None
) -> Tensor:
    """Return the direction of an attribute in the space of codes.

    It leads from the mean code of data without the attribute to that of data with it.

        v = mean( z_n : mask_n ) - mean( z_n : not mask_n ),   z_n the code of x_n

    With `groups`, v is the mean of the v_g found in each group g, weighted by the number of data in the group.

    Args:
        guide: guide of the pair
        x: data (N, *data_shape)
        mask: which data have the attribute, bool (N,): `labels == 7`, or a measured attribute cut in two, `slant >
            slant.median()`
        groups: what to hold constant, whole numbers (N,). For example, bold digits are rarely ones, so without
            `groups=labels` the direction "less bold" turns every digit into a one. A group whose data all have the
            attribute, or all lack it, is left out
        context: what the guide is conditioned on, (N, ...)

    Returns:
        (D,).

    Raises:
        ValueError: unless the mask is bool (N,), groups are whole numbers (N,), and some group has data with and
            without the attribute.

    References:
        Larsen, Sønderby, Larochelle & Winther, Autoencoding beyond pixels using a learned similarity metric (2016).
        White, Sampling Generative Networks (2016), for groups.
    """
    check_same_rows(x=x, mask=mask, groups=groups, context=context)
    x, mask = data_of(x, guide), given_tensor("mask", mask, guide)
    if mask.dtype != torch.bool or mask.shape != x.shape[:1]:
        raise ValueError(
            f"mask must be bool ({len(x)},), for instance labels == 7; found {mask.dtype}, shape {tuple(mask.shape)}"
        )
    groups = torch.zeros_like(mask, dtype=torch.long) if groups is None else given_tensor("groups", groups, guide)
    if groups.is_floating_point() or groups.shape != mask.shape:
        raise ValueError(
            f"groups must be whole numbers ({len(x)},), for instance labels; found {groups.dtype}, shape "
            f"{tuple(groups.shape)}"
        )
    z, mask, groups = embed(guide, x, context=context), mask.to(x.device), groups.to(x.device)
    total, count = torch.zeros_like(z[0]), 0
    for group in groups.unique():
        here = groups == group
        if (here & mask).any() and (here & ~mask).any():
            total += here.sum() * (z[here & mask].mean(0) - z[here & ~mask].mean(0))
            count += int(here.sum())
    if count == 0:
        raise ValueError(
            f"a direction needs data with and without the attribute in the same group; found {int(mask.sum())} of "
            f"{len(x)} with it"
        )
    return total / count


def edit(
    model: LatentVariableModel,
    guide: Guide,
    x: Tensor,
    direction: Tensor,
    amounts: Sequence[float] | Tensor,
    *,
    context: Tensor | None = None,
) -> Tensor:
    """Return images of data moved along a direction (latent arithmetic): "more bold", "less slanted".

        E[x' | z + c v]   for each amount c,   z the code of x

    Args:
        model, guide: the pair
        x: data (N, *data_shape)
        direction: v (D,), for instance from `attribute_direction`
        amounts: amounts c; 0 gives the reconstruction, 1 goes as far as from the data without the attribute to those
            with it
        context: what the pair is conditioned on, (N, ...)

    Returns:
        (N, len(amounts), *data_shape).

    Raises:
        ValueError: for a direction that is not (D,), or no amounts.

    References:
        Larsen, Sønderby, Larochelle & Winther, Autoencoding beyond pixels using a learned similarity metric (2016).
    """
    check_same_rows(x=x, context=context)
    x, direction = data_of(x, guide, model), given_tensor("direction", direction, guide)
    context = given_tensor("context", context, guide)
    z = embed(guide, x, context=context)
    if direction.shape != z.shape[1:]:
        raise ValueError(f"the direction must be ({z.shape[1]},), like the codes, found {tuple(direction.shape)}")
    amounts = _numbers("amounts", amounts, z).unsqueeze(-1)
    return _decode(model, z.unsqueeze(1) + amounts * direction.to(z), context)


@torch.no_grad()
def _of_posterior(
    guide: Guide, x: Tensor, context: Tensor | None, observed: Tensor | None, take: Callable, dim: int
) -> Tensor:
    """Return take(q(z|x)) of all data, in batches that lie along `dim` of the result."""
    data = inputs_of(guide, x, context, observed)
    with evaluation_mode(guide) as device:
        parts = [
            take(guide.posterior(*batch.args, **batch.kwargs)).to(data.x.device)
            for batch in batches(data, _ROWS, device)
        ]
    return torch.cat(parts, dim)


def _decode(model: LatentVariableModel, z: Tensor, context: Tensor | None = None, *, mean: bool = True) -> Tensor:
    """Decode codes (N, ..., D) of data, with their context (N, ...), in batches."""
    flat = z.flatten(0, -2)
    if context is not None:
        check_context(context, len(z))
        context = context.repeat_interleave(len(flat) // len(z), 0)
    pictures = []
    with evaluation_mode(model) as device:
        for start in range(0, len(flat), _ROWS):
            rows = slice(start, start + _ROWS)
            options = {} if context is None else {"context": context[rows].to(device)}
            pictures.append(model.decode(flat[rows].to(device), mean=mean, **options))
    return torch.cat(pictures).to(z.device).unflatten(0, z.shape[:-1])


def _numbers(name: str, values: Sequence[float] | Tensor, like: Tensor) -> Tensor:
    values = torch.as_tensor(values, dtype=like.dtype, device=like.device)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name} must be a list of at least one number, found shape {tuple(values.shape)}")
    return values
