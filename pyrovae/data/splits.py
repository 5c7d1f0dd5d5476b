"""A data set in three splits, and how its grey images become binary or continuous."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pyrovae.common.arguments import check_count, checks_values

__all__ = ["Splits", "binarize", "check_grey_values", "dequantize"]

# Tolerance outside [0, 1], for half precision and resized images; in `dequantize`, in units of a level.
_ROUNDING = 1e-3
# Published draws of validation and test images, with the seed of NumPy's generator.
_DRAWS = {"seed-777": 777}


@dataclass(frozen=True)
class Splits:
    """A data set in three splits: images (N, channels, height, width) in [0, 1] and their labels (N,), or None without
    labels.

    Loaded images are grey levels k / (num_levels - 1). `binarized` makes them binary (num_levels becomes 2),
    `dequantized` makes them continuous (num_levels says from how many levels).

    Attributes:
        name: Name of the data set.
        train: Training images; apply `transform` before use.
        validation: Validation images, drawn once from `data_seed`; None if all of them went to `train`.
        test: Test images, drawn once from `data_seed`.
        train_labels: Labels of the training images, or None.
        validation_labels: Labels of the validation images, or None.
        test_labels: Labels of the test images, or None.
        num_levels: Number of grey levels.
        binarization: 'dynamic', 'static', or None for images that are not binary.
        is_dequantized: Whether the images are dequantised.
        data_seed: The seed of the draws, or None before any and for a published draw.
        transform: Makes a batch of `train` ready for use: it redraws grey images at every use (dynamic). None if there
            is nothing to do.
        draw: Name of the published draw of validation and test images, or None.
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
    draw: str | None = None

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

    def binarized(self, binarization: str | None = "dynamic", data_seed: int = 0, draw: str | None = None) -> "Splits":
        """Make the images binary, x ~ Bernoulli(grey value).

        Validation and test images are drawn once in any case. Each split has its own generator, seeded from
        `data_seed`, so that a test set is the same for every training seed, device and choice of splits.

        Args:
            binarization: 'dynamic' redraws training images at every use; 'static' draws them once; None leaves all
                images grey.
            data_seed: Seed of the draws.
            draw: Published draw of validation and test images, for a comparison on the same binary images: 'seed-777'
                is that of the VampPrior paper's code, by NumPy's generator with that seed, validation images first. By default the images are drawn from `data_seed`.

        Raises:
            ValueError: `binarization` or `draw` is something else, the images are already binarised or dequantised, or
                values are outside [0, 1] or not finite. Or `draw` is given with another binarisation than 'dynamic',
                with a `data_seed`, or without validation images.

        References:
            Tomczak & Welling, VAE with a VampPrior (2018): 'seed-777'.
            Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders (2016): dynamic.
            Larochelle & Murray, The Neural Autoregressive Distribution Estimator (2011): static.
        """
        if binarization not in ("dynamic", "static", None):
            raise ValueError(f"binarization must be 'dynamic', 'static' or None, found {binarization!r}")
        if draw is not None:
            self._check_draw(draw, binarization, data_seed)
        self._refuse_drawn()
        self._check_grey_values()
        if binarization is None:
            return self
        if draw is not None:
            return self._as_published(draw)
        drawn = replace(self._drawn(binarize, data_seed), num_levels=2, binarization=binarization)
        if binarization == "dynamic":
            return drawn
        train = binarize(self.train, _generator(3 * data_seed + 2))
        return replace(drawn, train=train, transform=None)

    def dequantized(self, data_seed: int = 0) -> "Splits":
        """Make the images continuous, for densities on [0, 1]: draw each pixel uniformly within its grey level.

        Training images are redrawn at every use, validation and test images are drawn once, as by `binarized`. With D
        pixels, E log p(x) - D ln(num_levels) is a lower bound of the log mass of the levels; its negative over D ln 2
        is in bits per pixel.

        Args:
            data_seed: Seed of the draws.

        Raises:
            ValueError: The images are already binarised or dequantised, or values are not levels k / (num_levels - 1).

        References:
            Theis, van den Oord & Bethge, A note on the evaluation of generative models (2016).
        """
        self._refuse_drawn()
        self._check_grey_values(self.num_levels)
        return replace(self._drawn(partial(dequantize, num_levels=self.num_levels), data_seed), is_dequantized=True)

    def _check_draw(self, draw: str, binarization: str | None, data_seed: int) -> None:
        if draw not in _DRAWS:
            raise ValueError(f"draw must be {' or '.join(map(repr, _DRAWS))} or None, found {draw!r}")
        if binarization != "dynamic" or data_seed:
            raise ValueError(
                f"draw={draw!r} redraws training images at every use and has a seed of its own, found binarization="
                f"{binarization!r} and data_seed={data_seed}: leave both out"
            )

    def _as_published(self, draw: str) -> "Splits":
        if self.validation is None:
            raise ValueError(
                f"draw={draw!r} draws the validation images before the test images, and {self.name!r} has none: set "
                f"train_on_all=False"
            )
        # NumPy's legacy generator gives the same numbers in every version.
        generator = np.random.RandomState(_DRAWS[draw])

        def drawn(images: Tensor) -> Tensor:
            return torch.from_numpy(generator.binomial(1, images.cpu().numpy())).to(images)

        return replace(
            self,
            validation=drawn(self.validation),
            test=drawn(self.test),
            num_levels=2,
            binarization="dynamic",
            draw=draw,
            transform=binarize,
        )

    def _refuse_drawn(self) -> None:
        if self.binarization is not None:
            raise ValueError(
                f"these images are already binarised ({self.binarization}): start from grey images (binarization=None)"
            )
        if self.is_dequantized:
            raise ValueError("these images are already dequantised: start from grey images (binarization=None)")

    def _check_grey_values(self, num_levels: int | None = None) -> None:
        """Check and name every split now, because training may check `train` only in its first step."""
        for name in ("train", "validation", "test"):
            if (images := getattr(self, name)) is not None:
                check_grey_values(f"the {name} images of {self.name!r}", images)
                if num_levels is not None:
                    _check_levels(f"the {name} images of {self.name!r}", images * (num_levels - 1), num_levels)

    def _drawn(self, transform: Callable[..., Tensor], data_seed: int) -> "Splits":
        """Draw validation and test once, and leave `train` to be drawn at every use."""

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

    `torch.bernoulli` draws from the same distribution but takes three times as long on a CPU.

    Shapes: any, with values in [0, 1]; the result has the same shape and dtype and the values 0 and 1.

    Args:
        images: Grey values in [0, 1], floating point.
        generator: Source of the random numbers; by default torch's own.

    Returns:
        A tensor like `images`, of zeros and ones.

    Raises:
        TypeError: `images` is not a floating-point tensor.
        ValueError: A value is outside [0, 1] or not finite. Recorded training steps skip this check: the first epoch,
            which is not recorded, has already done it.

    Example:
        >>> binarize(torch.tensor([0.0, 1.0]))
        tensor([0., 1.])
    """
    check_grey_values("binarize: images", images)
    uniform = torch.rand(images.shape, generator=generator, dtype=images.dtype, device=images.device)
    return (uniform < images).to(images.dtype)


def dequantize(images: Tensor, num_levels: int = 256, generator: torch.Generator | None = None) -> Tensor:
    """Draw pixels uniformly within their grey levels: k / (L - 1) becomes (k + u) / L, u ~ Uniform(0, 1).

    Shapes: any, with values k / (num_levels - 1); the result has the same shape and dtype and values in [0, 1].

    Args:
        images: Grey levels k / (num_levels - 1), floating point.
        num_levels: L, 2 or more: 256 for bytes over 255, 17 for scikit-learn's digits.
        generator: Source of the random numbers; by default torch's own.

    Returns:
        A tensor like `images`, of continuous values.

    Raises:
        TypeError: `images` is not a floating-point tensor.
        ValueError: A value is not one of the levels. Recorded training steps skip this check, as for `binarize`.

    Example:
        >>> dequantize(torch.tensor([0.0, 1.0])).mul(256).floor()
        tensor([  0., 255.])

    References:
        Uria, Murray & Larochelle, RNADE: The real-valued neural autoregressive density-estimator (2013).
    """
    num_levels = check_count("num_levels", num_levels, least=2)
    check_grey_values("dequantize: images", images)
    levels = images * (num_levels - 1)
    _check_levels("dequantize: images", levels, num_levels)
    uniform = torch.rand(images.shape, generator=generator, dtype=images.dtype, device=images.device)
    return (levels.round() + uniform) / num_levels


def check_grey_values(what: str, images: Tensor) -> None:
    """Check that `images` are floating-point values in [0, 1].

    This is one pass over a batch: 25 of 450 microseconds for 200 MNIST images on a CPU. On a GPU it waits for the
    batch, as `Likelihood.check` and Pyro's loss do in the same step.

    Args:
        what: Start of the error message.
        images: The values to check.

    Raises:
        TypeError: `images` is not a floating-point tensor.
        ValueError: A value is outside [0, 1] or not finite; the message says how to scale it.
    """
    if isinstance(images, Mapping | tuple | list):
        items = (
            f"{{**batch, {next(iter(images), 'x')!r}: data.transform(batch[{next(iter(images), 'x')!r}])}}"
            if isinstance(images, Mapping)
            else f"(data.transform(batch[0]){', batch[1]' if len(images) == 2 else ', *batch[1:]'})"
        )
        raise TypeError(
            f"{what} must be a tensor, found a {type(images).__name__} of {len(images)} items: transform=lambda batch: {items}"
        )
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
    if low >= -_ROUNDING and high <= 1 + _ROUNDING:  # False for NaN
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
        f"{what} must be values in [0, 1], found {low:g} to {high:g}: {remedy}; data that are not grey images need a "
        f"likelihood for real values (pyrovae.likelihoods.LearnedScaleNormal) instead"
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
            f"{num_levels - 1}: set num_levels= to the number of levels of these data (bytes are divided by 255, not 256); do "
            f"not dequantise data that are already continuous"
        )


def _not_finite(images: Tensor) -> str:
    """Describe the values that are not finite, by datum."""
    bad = ~images.isfinite()
    if images.ndim == 0:
        return f"{images.item():g}"
    data = bad.reshape(len(images), -1).any(1).nonzero().squeeze(1)
    return f"{images[bad][0].item():g} in {len(data)} of {len(images)} data, the first x[{int(data[0])}]"


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed))
