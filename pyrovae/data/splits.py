"""A data set in three splits, and how its grey images become binary or continuous."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from pyrovae.data.grey_values import binarize, check_grey_values, check_levels, dequantize

__all__ = ["Splits"]

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
                is that of the VampPrior paper's code, by NumPy's generator with that seed, validation images first. By
                default the images are drawn from `data_seed`.

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
                f"draw={draw!r} draws training images anew at every use and has its own seed, found binarization="
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
                    check_levels(f"the {name} images of {self.name!r}", images * (num_levels - 1), num_levels)

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


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed))
