"""A data set in three parts, and what makes its grey images binary or continuous."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from pyrovae.common.arguments import check_count, checks_values

__all__ = ["Splits", "binarize", "check_grey_values", "dequantize"]

_ROUNDING = 1e-3  # outside [0, 1], as half precision or a resized image leaves behind; in `dequantize`, of a level


@dataclass(frozen=True)
class Splits:
    """A data set in three parts, images (N, channels, height, width) in [0, 1] with their labels (N,), None without any.

    `validation` is None where all of its images went to `train`. Images are grey levels k / (num_levels - 1) as they are
    loaded, which `binarized` makes binary (num_levels is then 2) and `dequantized` continuous (num_levels tells from how
    many). `transform` makes a batch of `train` ready for use: it redraws grey images at every use (dynamic), and is None
    where nothing is left to do. `validation` and `test` are ready as they are: drawn once, from `data_seed`.
    """

    name: str
    train: Tensor
    validation: Tensor | None
    test: Tensor
    train_labels: Tensor | None
    validation_labels: Tensor | None
    test_labels: Tensor | None
    num_levels: int = 256
    binarization: str | None = None
    is_dequantized: bool = False
    data_seed: int | None = None
    transform: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        for part in ("train", "validation", "test"):
            images, labels = getattr(self, part), getattr(self, f"{part}_labels")
            num_images = 0 if images is None else len(images)
            if labels is not None and len(labels) != num_images:
                raise ValueError(
                    f"{self.name!r} has {num_images:,} {part} images and {len(labels):,} {part} labels: give a label for each "
                    f"image, or {part}_labels=None"
                )

    def __repr__(self) -> str:
        parts = ((name, getattr(self, name)) for name in ("train", "validation", "test"))
        sizes = ", ".join(f"{0 if images is None else len(images):,} {name}" for name, images in parts)
        if self.binarization is not None:
            kind = f"binary ({self.binarization})"
        else:
            kind = f"{self.num_levels} grey levels" + (", dequantised" if self.is_dequantized else "")
        return f"Splits({self.name}: {sizes} images of {'x'.join(map(str, self.data_shape))}, {kind})"

    @property
    def data_shape(self) -> torch.Size:
        """Shape of one image."""
        return self.train.shape[1:]

    def binarized(self, binarization: str | None = "dynamic", data_seed: int = 0) -> "Splits":
        """These images made binary, x ~ Bernoulli(grey value).

        dynamic: training images are redrawn at every use; static: drawn once; None: all images stay grey.
        Validation and test images are drawn once in either case, each split by a generator of its own from
        `data_seed`, so that a test set is the same for every training seed, device and choice of splits.

        Raises ValueError for another word, for images already binarised, and for values outside [0, 1] or not finite.

        Source: Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders (2016), for dynamic;
        Larochelle & Murray, The Neural Autoregressive Distribution Estimator (2011), for static.
        """
        if binarization not in ("dynamic", "static", None):
            raise ValueError(f"binarization must be 'dynamic', 'static' or None, found {binarization!r}")
        self._refuse_drawn()
        self._check_grey_values()
        if binarization is None:
            return self
        drawn = replace(self._drawn(binarize, data_seed), num_levels=2, binarization=binarization)
        if binarization == "dynamic":
            return drawn
        train = binarize(self.train, _generator(3 * data_seed + 2))
        return replace(drawn, train=train, transform=None)

    def dequantized(self, data_seed: int = 0) -> "Splits":
        """These images made continuous: each pixel drawn evenly within its grey level, for densities on [0, 1].

        Training images are redrawn at every use, validation and test images once, as by `binarized`. With D pixels
        E log p(x) - D ln(num_levels) is a lower bound of the log mass of the levels, and minus it over D ln 2 is in bits
        per pixel.

        Raises ValueError for images drawn already, and for values that are not the levels k / (num_levels - 1).

        Source: Theis, van den Oord & Bethge, A note on the evaluation of generative models (2016).
        """
        self._refuse_drawn()
        self._check_grey_values(self.num_levels)
        return replace(self._drawn(partial(dequantize, num_levels=self.num_levels), data_seed), is_dequantized=True)

    def _refuse_drawn(self) -> None:
        if self.binarization is not None:
            raise ValueError(f"these images are binarised already ({self.binarization})")
        if self.is_dequantized:
            raise ValueError("these images are dequantised already: start from grey ones (binarization=None)")

    def _check_grey_values(self, num_levels: int | None = None) -> None:
        """Check every part here, under its name: `train` may otherwise be looked at only in the first step of training."""
        for name in ("train", "validation", "test"):
            if (images := getattr(self, name)) is not None:
                check_grey_values(f"the {name} images of {self.name!r}", images)
                if num_levels is not None:
                    _check_levels(f"the {name} images of {self.name!r}", images * (num_levels - 1), num_levels)

    def _drawn(self, transform: Callable[..., Tensor], data_seed: int) -> "Splits":
        """With validation and test drawn once, and `train` left to be drawn at every use."""

        def draw(images: Tensor, stream: int) -> Tensor:
            return transform(images, generator=_generator(3 * data_seed + stream))

        return replace(
            self,
            validation=None if self.validation is None else draw(self.validation, 1),
            test=draw(self.test, 0),
            data_seed=data_seed,
            transform=transform,
        )


def binarize(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw binary pixels with the grey values as probabilities, x ~ Bernoulli(images).

    (`torch.bernoulli` draws from the same distribution and takes three times as long on a CPU.)

    Shapes: any, values in [0, 1]; the same shape and dtype, values 0 and 1.

    Args:
        images: Grey values in [0, 1], floating point.
        generator: Where the random numbers come from; by default torch's own.

    Returns:
        A tensor like `images`, of zeros and ones.

    Raises:
        TypeError: `images` is no floating-point tensor.
        ValueError: A value lies outside [0, 1] or is not finite. A recorded training step does not look at values: the
            first epoch, which is not recorded, has looked at them.

    >>> binarize(torch.tensor([0.0, 1.0]))
    tensor([0., 1.])
    """
    check_grey_values("binarize: images", images)
    uniform = torch.rand(images.shape, generator=generator, dtype=images.dtype, device=images.device)
    return (uniform < images).to(images.dtype)


def dequantize(images: Tensor, num_levels: int = 256, generator: torch.Generator | None = None) -> Tensor:
    """Draw pixels evenly within their grey levels: k / (L - 1) becomes (k + u) / L, u ~ Uniform(0, 1).

    Shapes: any, values k / (num_levels - 1); the same shape and dtype, values in [0, 1].

    Args:
        images: Grey levels k / (num_levels - 1), floating point.
        num_levels: L, 2 or more: 256 for bytes over 255, 17 for scikit-learn's digits.
        generator: Where the random numbers come from; by default torch's own.

    Returns:
        A tensor like `images`, of continuous values.

    Raises:
        TypeError: `images` is no floating-point tensor.
        ValueError: A value is none of the levels (see `binarize` for recorded training steps).

    Source: Uria, Murray & Larochelle, RNADE: The real-valued neural autoregressive density-estimator (2013).

    >>> dequantize(torch.tensor([0.0, 1.0])).mul(256).floor()
    tensor([  0., 255.])
    """
    num_levels = check_count("num_levels", num_levels, least=2)
    check_grey_values("dequantize: images", images)
    levels = images * (num_levels - 1)
    _check_levels("dequantize: images", levels, num_levels)
    uniform = torch.rand(images.shape, generator=generator, dtype=images.dtype, device=images.device)
    return (levels.round() + uniform) / num_levels


def check_grey_values(what: str, images: Tensor) -> None:
    """Raise unless `images` are floating-point values in [0, 1]; the message begins with `what` and says how to scale them.

    One pass over a batch: 25 microseconds of 450 for 200 MNIST images on a CPU. On a GPU it waits for the batch, as
    `Likelihood.check` and Pyro's loss do in the same step.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"{what} must be a tensor, found {type(images).__name__}: torch.as_tensor(x)")
    if not images.is_floating_point():
        remedy = (
            "x.float()" if images.dtype == torch.bool else "x.float() / 255 for bytes, x.float() for zeros and ones"
        )
        raise TypeError(f"{what} must be floating-point values in [0, 1], found {images.dtype}: {remedy}")
    if not checks_values() or images.numel() == 0:
        return
    low, high = torch.stack(images.detach().aminmax()).tolist()
    if low >= -_ROUNDING and high <= 1 + _ROUNDING:  # false of NaN too
        return
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            f"{what} must be values in [0, 1], found {_not_finite(images)}: remove these data, or fill in their values"
        )
    if low >= 0:
        remedy = "divide grey images by their largest level (x / 255 for bytes)"
    elif low >= -1 and high <= 1:
        remedy = "scale images in [-1, 1] back by (x + 1) / 2"
    else:
        remedy = "undo the standardisation of grey images (x * std + mean)"
    raise ValueError(
        f"{what} must be values in [0, 1], found {low:g} to {high:g}: {remedy}; data that are no grey images need a likelihood "
        f"for real values (pyrovae.likelihoods.LearnedScaleNormal), not this"
    )


def _check_levels(what: str, levels: Tensor, num_levels: int) -> None:
    """Raise ValueError unless `levels`, images times L - 1, are whole numbers up to rounding."""
    tolerance = max(_ROUNDING, (num_levels - 1) * torch.finfo(levels.dtype).eps)
    if not checks_values() or levels.numel() == 0:
        return
    off = (levels.detach() - levels.detach().round()).abs()
    if off.max().item() > tolerance:
        found = levels.detach().flatten()[off.flatten().argmax()].item()
        raise ValueError(
            f"{what} must be grey levels k / {num_levels - 1}, found {found / (num_levels - 1):g} = {found:g} / "
            f"{num_levels - 1}: set num_levels= to the number of levels these data have (bytes are divided by 255, not 256), or "
            f"leave data that are continuous already as they are"
        )


def _not_finite(images: Tensor) -> str:
    """Where NaN or infinity stands, by datum."""
    bad = ~images.isfinite()
    if images.ndim == 0:
        return f"{images.item():g}"
    data = bad.reshape(len(images), -1).any(1).nonzero().squeeze(1)
    return f"{images[bad][0].item():g} in {len(data)} of {len(images)} data, the first x[{int(data[0])}]"


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed))
