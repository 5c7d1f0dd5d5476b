"""A data set in three parts, and what makes its grey images binary or continuous."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

__all__ = ["Splits", "binarize", "dequantize"]


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

        Raises ValueError for another word, and for images already binarised.

        Source: Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders (2016), for dynamic;
        Larochelle & Murray, The Neural Autoregressive Distribution Estimator (2011), for static.
        """
        if binarization not in ("dynamic", "static", None):
            raise ValueError(f"binarization must be 'dynamic', 'static' or None, found {binarization!r}")
        self._refuse_drawn()
        if binarization is None:
            return self
        drawn = replace(self._drawn(binarize, data_seed), num_levels=2, binarization=binarization)
        if binarization == "dynamic":
            return drawn
        train = binarize(self.train, torch.Generator().manual_seed(3 * data_seed + 2))
        return replace(drawn, train=train, transform=None)

    def dequantized(self, data_seed: int = 0) -> "Splits":
        """These images made continuous: each pixel drawn evenly within its grey level, for densities on [0, 1].

        Training images are redrawn at every use, validation and test images once, as by `binarized`. With D pixels
        E log p(x) - D ln(num_levels) is a lower bound of the log mass of the levels, and minus it over D ln 2 is in bits
        per pixel.

        Raises ValueError for images drawn already.

        Source: Theis, van den Oord & Bethge, A note on the evaluation of generative models (2016).
        """
        self._refuse_drawn()
        return replace(self._drawn(partial(dequantize, num_levels=self.num_levels), data_seed), is_dequantized=True)

    def _refuse_drawn(self) -> None:
        if self.binarization is not None:
            raise ValueError(f"these images are binarised already ({self.binarization})")
        if self.is_dequantized:
            raise ValueError("these images are dequantised already: start from grey ones (binarization=None)")

    def _drawn(self, transform: Callable[..., Tensor], data_seed: int) -> "Splits":
        """With validation and test drawn once, and `train` left to be drawn at every use."""

        def draw(images: Tensor, stream: int) -> Tensor:
            return transform(images, generator=torch.Generator().manual_seed(3 * data_seed + stream))

        return replace(
            self,
            validation=None if self.validation is None else draw(self.validation, 1),
            test=draw(self.test, 0),
            data_seed=data_seed,
            transform=transform,
        )


def binarize(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw binary pixels with the grey values as probabilities, x ~ Bernoulli(images).

    Shapes: any, values in [0, 1]; the same shape and dtype, values 0 and 1. (`torch.bernoulli` draws from the same
    distribution and takes three times as long on a CPU.)

    >>> binarize(torch.tensor([0.0, 1.0]))
    tensor([0., 1.])
    """
    uniform = torch.rand(images.shape, generator=generator, dtype=images.dtype, device=images.device)
    return (uniform < images).to(images.dtype)


def dequantize(images: Tensor, num_levels: int = 256, generator: torch.Generator | None = None) -> Tensor:
    """Draw pixels evenly within their grey levels: k / (L - 1) becomes (k + u) / L, u ~ Uniform(0, 1).

    Shapes: any, values k / (num_levels - 1); the same shape and dtype, values in [0, 1].

    Source: Uria, Murray & Larochelle, RNADE: The real-valued neural autoregressive density-estimator (2013).

    >>> dequantize(torch.tensor([0.0, 1.0])).mul(256).floor()
    tensor([  0., 255.])
    """
    uniform = torch.rand(images.shape, generator=generator, dtype=images.dtype, device=images.device)
    return ((images * (num_levels - 1)).round() + uniform) / num_levels
