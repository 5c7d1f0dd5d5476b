"""Series of different lengths, padded; a data set of them that a package ships."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pyrovae.data.tables import RowSplits

__all__ = ["Series", "japanese_vowels"]

_SPLIT_SEED = 0


@dataclass(frozen=True)
class Series:
    """Series of different lengths.

    Attributes:
        values: (N, longest, channels); 0 after the end of a series.
        lengths: Length of each series (N,).
    """

    values: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.values)

    @property
    def mask(self) -> Tensor:
        """Which steps are part of a series, (N, longest)."""
        return torch.arange(self.values.shape[1], device=self.lengths.device) < self.lengths.unsqueeze(-1)


def japanese_vowels() -> RowSplits[Series]:
    """Load the Japanese vowels: 640 utterances of 7 to 29 steps of 12 cepstral coefficients, by nine speakers.

    The test set of 370 is the published one; a fixed seed splits the other 270 into 216 for training and 54 for
    validation. Labels: the speakers. It needs the package `aeon` (pip install pyrovae[series]), which holds the files.

    Returns:
        The series, split in three.

    Raises:
        ImportError: `aeon` is not installed.
        ValueError: A file is damaged. The message names it.

    References:
        Kudo, Toyama & Shimbo, Multidimensional curve classification using passing-through regions (1999).
    """
    found = importlib.util.find_spec("aeon")  # its import would compile for seconds, and is not needed
    if found is None or found.origin is None:
        raise ImportError(
            "the series japanese_vowels come with the package aeon: pip install pyrovae[series], or pip install aeon"
        )
    folder = Path(found.origin).parent / "datasets/data/JapaneseVowels"
    series, speakers = _read_series(folder / "JapaneseVowels_TRAIN.ts")
    test, test_speakers = _read_series(folder / "JapaneseVowels_TEST.ts")
    longest = max(map(len, series + test))
    names = tuple(sorted(set(speakers)))
    order = torch.randperm(len(series), generator=torch.Generator().manual_seed(_SPLIT_SEED)).tolist()
    splits = [[(series[place], speakers[place]) for place in part] for part in (order[:-54], order[-54:])]
    splits.append(list(zip(test, test_speakers, strict=True)))
    train, validation, held_out = (_padded([one for one, _ in rows], longest) for rows in splits)
    labels = [torch.tensor([names.index(speaker) for _, speaker in rows]) for rows in splits]
    return RowSplits("japanese_vowels", train, validation, held_out, labels[0], labels[1], labels[2], names)


def _padded(series: list[Tensor], longest: int) -> Series:
    values = torch.zeros(len(series), longest, series[0].shape[1])
    for row, one in zip(values, series, strict=True):
        row[: len(one)] = one
    return Series(values, torch.tensor([len(one) for one in series]))


def _read_series(path: Path) -> tuple[list[Tensor], list[str]]:
    """Read a file of the format ts: the channels of a series separated by ':', its steps by ',', its class last.

    Returns:
        The series, (length, channels) each, and their classes.

    Raises:
        ValueError: The file is damaged.
    """
    series, classes = [], []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip() or line.startswith(("#", "@")):  # what the file says about itself
            continue
        try:
            *channels, name = line.strip().split(":")
            values = torch.tensor([[float(value) for value in channel.split(",")] for channel in channels]).T
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}, is no series ({error}): replace the file by an intact one"
            ) from error
        series.append(values)
        classes.append(name)
    if not series or len({one.shape[1] for one in series}) != 1 or not all(one.isfinite().all() for one in series):
        raise ValueError(f"{path} is truncated or damaged: it holds no series of equally many finite channels")
    return series, classes
