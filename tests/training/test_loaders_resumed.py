"""Loaders whose order or noise comes from generators of their own: resumed bit for bit, whatever holds the generator."""

import random

import numpy as np
import pyro
import pytest
import torch
from shared.runs import binary, make, parameters
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

import pyrovae as pv

DATA = binary(37)


class Stop(Exception):
    pass


class Order(Sampler):
    """Positions shuffled by a generator under a name of its own."""

    def __init__(self, numbers):
        self.numbers = numbers

    def __len__(self):
        return len(DATA)

    def __iter__(self):
        if isinstance(self.numbers, torch.Generator):
            return iter(torch.randperm(len(DATA), generator=self.numbers).tolist())
        if isinstance(self.numbers, random.Random):
            return iter(self.numbers.sample(range(len(DATA)), len(DATA)))
        return iter(self.numbers.permutation(len(DATA)).tolist())


class Noisy(Dataset):
    def __init__(self, numbers):
        self.numbers = numbers

    def __len__(self):
        return len(DATA)

    def __getitem__(self, position):
        return DATA[position] if self.numbers.random() < 0.9 else 1 - DATA[position]


LOADERS = {
    "torch": lambda seed: DataLoader(DATA, 10, sampler=Order(torch.Generator().manual_seed(seed))),
    "numpy": lambda seed: DataLoader(DATA, 10, sampler=Order(np.random.default_rng(seed))),
    "mersenne twister": lambda seed: DataLoader(DATA, 10, sampler=Order(np.random.Generator(np.random.MT19937(seed)))),
    "numpy, old": lambda seed: DataLoader(DATA, 10, sampler=Order(np.random.RandomState(seed))),
    "python": lambda seed: DataLoader(DATA, 10, sampler=Order(random.Random(seed))),
    "data": lambda seed: DataLoader(Noisy(np.random.default_rng(seed)), 10),
    "subset": lambda seed: DataLoader(Subset(Noisy(random.Random(seed)), range(31)), 10),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_generators_of_their_own_are_resumed(kind, tmp_path):
    """In the resumed process everything is made anew, with another seed; validation has the same order at all times."""

    def run(seed, stop=False, **more):
        def callback(progress):
            if stop and progress.epoch == 2:
                raise Stop

        model, guide = make(seed)
        pyro.set_rng_seed(seed)
        options = {"epochs": 4, "learning_rate": 0.02, "compile": False, "progress": False, "callback": callback}
        pv.fit(model, guide, LOADERS[kind](seed), validation=LOADERS[kind](seed), **options, **more)
        return parameters(model, guide)

    expected = run(0)
    file = {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 0}
    with pytest.raises(Stop):
        run(0, stop=True, **file)
    found = run(7, resume=True, **file)
    assert all(torch.equal(*pair) for pair in zip(expected, found, strict=True))
    assert not all(torch.equal(*pair) for pair in zip(expected, run(8), strict=True))
