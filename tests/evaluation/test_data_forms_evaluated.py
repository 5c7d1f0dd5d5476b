"""Whatever form the data come in, the evaluation is that of the plain tensors, number for number."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from shared.networks import normal_model
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

import pyrovae as pv

np = pytest.importorskip("numpy")
pd = pytest.importorskip("pandas")

X, SHIFT = torch.randn(23, 3, generator=torch.Generator().manual_seed(1)), torch.linspace(-1, 1, 23)


def model(x, shift, scale=1.0):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(shift, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(*z.shape, 3), scale).to_event(1), obs=x)


def guide(x, shift, scale=1.0):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal((shift + x.sum(-1)) / 4, 0.6))


class Items(Dataset):
    def __init__(self, as_mapping):
        self.as_mapping = as_mapping

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return {"x": X[index], "shift": SHIFT[index]} if self.as_mapping else (X[index], SHIFT[index])


WHOLE = {
    "arguments": (X, SHIFT),
    "arrays": (X.numpy(), SHIFT.numpy()),
    "tuple": ((X, SHIFT),),
    "list": ([X, SHIFT.numpy()],),
    "mapping": ({"shift": SHIFT, "x": X},),
    "data set of tensors": (TensorDataset(X, SHIFT),),
    "frame and series": (pd.DataFrame(X.numpy(), columns=list("abc")), pd.Series(SHIFT.numpy())),
}
STREAMS = {
    "loader of tuples": lambda: DataLoader(TensorDataset(X, SHIFT), batch_size=10),
    "loader of mappings": lambda: DataLoader(Items(True), batch_size=10),
    "data set": lambda: Items(False),
}


def evaluate(*args, **options):
    pyro.set_rng_seed(0)
    return pv.log_marginal_likelihood(model, guide, *args, num_particles=30, **options)


@pytest.mark.parametrize("form", WHOLE)
def test_forms_in_one_piece(form):
    assert torch.equal(evaluate(*WHOLE[form]).log_prob, evaluate(X, SHIFT).log_prob)


@pytest.mark.parametrize("form", STREAMS)
def test_streams(form):
    """Batch by batch: the same estimates within their errors, for all data, in order."""
    found, whole = evaluate(STREAMS[form]()), evaluate(X, SHIFT)
    assert len(found) == len(X)
    assert ((found.log_prob - whole.log_prob).abs() < 6 * (found.stderr + whole.stderr) + 0.02).all()


def test_a_stream_by_annealing_and_populations(uncompiled, short_pilots):
    loader = DataLoader(TensorDataset(X[:6], SHIFT[:6]), batch_size=4)
    exact = evaluate(X[:6], SHIFT[:6]).log_prob
    options = {"num_temperatures": 60, "num_leapfrog_steps": 3}
    for found in (
        pv.annealed_importance_sampling(model, loader, **options),
        pv.sequential_monte_carlo(model, loader, num_chains=8, **options),
    ):
        assert len(found) == 6
        assert ((found.log_prob - exact).abs() < 0.25).all()


def test_transform_leaves_labels_out():
    loader = DataLoader(TensorDataset(torch.arange(23), X[:, 0]), batch_size=10)

    def normal_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    def one(x):
        return normal_model(x)

    found = pv.log_marginal_likelihood(one, normal_guide, loader, num_particles=50, transform=lambda batch: batch[1])
    whole = pv.log_marginal_likelihood(one, normal_guide, X[:, 0], num_particles=50)
    assert ((found.log_prob - whole.log_prob).abs() < 6 * (found.stderr + whole.stderr) + 0.02).all()
    with pytest.raises(TypeError, match=r"2 items.*transform=lambda batch: batch\[0\]"):
        pv.log_marginal_likelihood(one, normal_guide, loader, num_particles=50)


def test_a_program_of_one_argument_gets_the_whole_batch():
    found = {}

    def whole(batch):
        found[type(batch)] = True
        return model(*batch.values()) if isinstance(batch, dict) else model(*batch)

    for batch in ((X, SHIFT), {"x": X, "shift": SHIFT}):
        pyro.set_rng_seed(0)
        result = pv.log_marginal_likelihood(
            whole, lambda batch: guide(X, SHIFT), batch, num_particles=30, data_batch_size=None
        )
        assert torch.equal(result.log_prob, evaluate(X, SHIFT, data_batch_size=None).log_prob)
    assert found.keys() == {tuple, dict}


@pytest.mark.parametrize(
    ("args", "options", "error", "words"),
    [
        (lambda: (DataLoader(Items(False), shuffle=True),), {}, ValueError, "shuffle=False"),
        (lambda: (DataLoader(Items(False), batch_size=5, drop_last=True),), {}, ValueError, "drop_last=False"),
        (lambda: (DataLoader(Items(False), sampler=SubsetRandomSampler(range(5))),), {}, ValueError, "SubsetRandom"),
        (
            lambda: (DataLoader(Items(False), batch_sampler=BatchSampler(RandomSampler(Items(False)), 4, False)),),
            *({}, ValueError, "order of a RandomSampler"),
        ),
        (
            lambda: (DataLoader(Items(False), batch_sampler=BatchSampler(SequentialSampler(Items(False)), 4, True)),),
            *({}, ValueError, "leaves data out"),
        ),
        (lambda: (X, SHIFT), {"transform": lambda batch: batch}, TypeError, "one argument"),
        (lambda: (X,), {"transform": 3}, TypeError, "function of a batch"),
        (lambda: (pd.DataFrame({"age": [1.0], "sex": ["f"]}), SHIFT[:1]), {}, TypeError, "column 'sex'"),
        (lambda: (DataLoader(Items(False)), SHIFT), {}, TypeError, "only argument"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(args, options, error, words):
    with pytest.raises(error, match=words):
        evaluate(*args(), **options)


def test_an_interrupted_stream_gives_what_is_done(monkeypatch):
    from pyrovae.evaluation import importance_sampling

    original, calls = importance_sampling.log_weight_blocks, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(importance_sampling, "log_weight_blocks", interrupted)
    with pytest.warns(RuntimeWarning, match="first 10 of 23 data"):
        assert len(evaluate(STREAMS["loader of tuples"]())) == 10
