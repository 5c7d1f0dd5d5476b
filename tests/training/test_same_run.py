"""A run goes on with its own model, loss, functions and data: what computes anything else is refused with both values."""

import functools
from argparse import Namespace

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO
from shared.networks import Net, bernoulli, mlp
from shared.runs import binary, make, parameters, same
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)

import pyrovae as pv
from pyrovae.training.checkpoint_file import read, write
from pyrovae.training.values import checksum, describe_callable, same_text


def add(batch, amount=0.0):
    return batch + 0 * amount


class Add:
    def __init__(self, amount):
        self.amount, self.calls = amount, 0

    def __call__(self, batch):
        self.calls += 1
        return batch + 0 * self.amount

    def doubled(self, batch):
        return batch + 0 * self.amount


class Added(nn.Module):
    def __init__(self, amount):
        super().__init__()
        self.amount = amount

    def forward(self, batch):
        return batch + 0 * self.amount


def adding(amount):
    calls = []
    count = 0

    def transform(batch):
        nonlocal count
        count += 1
        calls.append(count)
        return batch + 0 * amount

    return transform


def go_on(first, second, path):
    """Run with the first options, then go on with the second."""
    common = {"epochs": 2, "checkpoint": path, "progress": False, "compile": False}
    torch.manual_seed(0)
    for number, options in enumerate((first, second)):
        options = {**common, "resume": number > 0, **options}
        train = options.pop("train", None)
        if not isinstance(train, DataLoader):
            options["batch_size"] = 20
        pv.fit(*options.pop("pair", make)(), binary() if train is None else train, **options)


def loader(x=None, dataset=None, **options):
    x = binary() if x is None else x
    return DataLoader(TensorDataset(x) if dataset is None else dataset, batch_size=20, **options)


class Computed(Dataset):
    """Items that are computed, or read from files, not held."""

    def __init__(self, brightness, draws=False):
        self.brightness, self.draws = brightness, draws

    def __len__(self):
        return 40

    def __getitem__(self, place):
        image = ((torch.arange(12.0).reshape(1, 4, 3) + place) % 3 < self.brightness).float()
        return (image + torch.rand(()) > 0.9).float() if self.draws else image


def other_labels(x, y):
    return TensorDataset(x, torch.full((len(x),), y))


def first_of(items):
    return torch.stack([item[0] for item in items])


def last_of(items):
    return torch.stack([item[-1] for item in items])


class Factor:
    def __init__(self, factor):
        self.factor = factor


def over(held):
    return lambda batch: batch + 0 * len(str(held))


class Buffered(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.register_buffer("weight", torch.tensor(value))

    def forward(self, batch):
        return batch + 0 * self.weight


class Weighted(Trace_ELBO):
    def __init__(self, **options):
        super().__init__()
        self.__dict__.update(options)


class Listed(Dataset):
    def __init__(self, images):
        self.images, self.files, self.read = list(images), ["a"] * len(images), {}

    def __len__(self):
        return len(self.images)

    def __getitem__(self, place):
        self.read[place] = self.images[place]
        return self.read[place]


def one_changed(images, place=7):
    images = images.clone()
    images[place] = 1 - images[place]
    return images


class Programs:
    """A user's plain object whose methods are model and guide."""

    def __init__(self, scale=1.0, activation=torch.tanh):
        torch.manual_seed(0)
        self.decoder, self.encoder = nn.Linear(2, 12), nn.Linear(12, 2)
        self.scale, self.activation = scale, activation

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Normal(x.new_zeros(2), 1.0).to_event(1))
            loc = self.activation(self.decoder(z))
            pyro.sample("x", pyro.distributions.Normal(loc, self.scale).to_event(1), obs=x.flatten(1))

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro.distributions.Normal(self.encoder(x.flatten(1)), 0.5).to_event(1))


def programs(wrap=None, **options):
    def made():
        pyro.clear_param_store()
        both = Programs(**options)
        return (both.model, both.guide) if wrap is None else (wrap(both), both.guide)

    return {"pair": made}


def closure(scale):
    return lambda both: lambda x: pyro.poutine.scale(both.model, scale=1.0 + 0 * scale)(x)


def scaled(scale):
    return lambda both: pyro.poutine.scale(both.model, scale=scale)


def batches_of(size):
    return DataLoader(TensorDataset(binary()), batch_sampler=BatchSampler(SequentialSampler(range(40)), size, False))


# (options of the run, options of the one that goes on, both values as the message tells them)
OTHERS = {
    "partial": (
        {"transform": functools.partial(add, amount=1)},
        {"transform": functools.partial(add, amount=2)},
        "amount=1",
        "amount=2",
    ),
    "partial by place": (
        {"transform": functools.partial(torch.clamp, min=0)},
        {"transform": functools.partial(torch.clamp, min=-1)},
        "min=0",
        "min=-1",
    ),
    "partial of a tensor": (
        {"transform": functools.partial(add, amount=torch.zeros(3))},
        {"transform": functools.partial(add, amount=torch.ones(3))},
        "checksum",
        "checksum",
    ),
    "closure": ({"transform": adding(1)}, {"transform": adding(2)}, "amount=1", "amount=2"),
    "lambda": ({"transform": lambda x: x + 0}, {"transform": lambda x: x * 1}, "lambda", "lambda"),
    "object": ({"transform": Add(1)}, {"transform": Add(2)}, "Add(amount=1)", "Add(amount=2)"),
    "method": ({"transform": Add(1).doubled}, {"transform": Add(2).doubled}, "Add(amount=1)", "Add(amount=2)"),
    "module": ({"transform": Added(1)}, {"transform": Added(2)}, "Added(amount=1)", "Added(amount=2)"),
    "schedule": (
        {"schedule": lambda fraction: 1.0},
        {"schedule": lambda fraction: 1.0 - fraction},
        "lambda",
        "lambda",
    ),
    "particles": ({"loss": Trace_ELBO(2)}, {"loss": Trace_ELBO(3)}, "num_particles=2", "num_particles=3"),
    "vectorised": (
        {"loss": Trace_ELBO(2, vectorize_particles=True)},
        {"loss": Trace_ELBO(2)},
        "vectorize_particles=True",
        "vectorize_particles=False",
    ),
    "alpha": (
        {"loss": RenyiELBO(alpha=0.5, num_particles=2)},
        {"loss": RenyiELBO(alpha=0.2, num_particles=2)},
        "alpha=0.5",
        "alpha=0.2",
    ),
    "activation": (
        {"pair": lambda: (bernoulli(mlp(nn.SiLU)), make()[1])},
        {"pair": lambda: (bernoulli(mlp(nn.Tanh)), make()[1])},
        "SiLU",
        "Tanh",
    ),
    "own scale": (
        {"pair": lambda: (bernoulli(Net(scale=0.5)), make()[1])},
        {"pair": lambda: (bernoulli(Net(scale=0.7)), make()[1])},
        "gain=1",
        "gain=1.4",
    ),
    **{
        f"transform over {name}": ({"transform": over(one)}, {"transform": over(other)}, *texts)
        for name, one, other, *texts in (
            ("a dict", {"k": 1}, {"k": 2}, "k=1", "k=2"),
            ("an array", np.ones(2), np.zeros(2), "checksum", "checksum"),
            ("an object", Factor(1), Factor(2), "factor=1", "factor=2"),
            ("functions", [lambda x: x + 1], [lambda x: x + 2], "lambda", "lambda"),
        )
    },
    "buffers of a transform": (
        {"transform": Buffered(1.0)},
        {"transform": Buffered(2.0)},
        "weight=() torch.float32",
        "weight=() torch.float32",
    ),
    "own loss": ({"loss": Weighted(beta=1.0)}, {"loss": Weighted(beta=4.0)}, "loss.beta=1", "loss.beta=4"),
    "scale of an object": (programs(scale=1.0), programs(scale=0.3), "scale=1", "scale=0.3"),
    "function of an object": (programs(), programs(activation=torch.relu), "activation=tanh", "activation=relu"),
    "closure of a program": (programs(closure(1.0)), programs(closure(2.0)), "scale=1", "scale=2"),
    "a program scaled": (programs(scaled(1.0)), programs(scaled(0.1)), "scale=1", "scale=0.1"),
    "own batches": ({"train": batches_of(20)}, {"train": batches_of(10)}, "batch", "batch"),
    "own batches, as many": (
        {"train": batches_of(25)},
        {"train": batches_of(29)},
        "batch_sampler.batch_size=25",
        "batch_sampler.batch_size=29",
    ),
    "a list in a data set": (
        {"train": loader(dataset=Listed(binary()))},
        {"train": loader(dataset=Listed(one_changed(binary())))},
        "checksum",
        "checksum",
    ),
    "data of a loader": ({"train": loader()}, {"train": loader(1 - binary())}, "checksum", "checksum"),
    "labels beside them": (
        {"train": loader(dataset=other_labels(binary(), 1), collate_fn=first_of)},
        {"train": loader(dataset=other_labels(binary(), 2), collate_fn=first_of)},
        "checksum",
        "checksum",
    ),
    "a subset": (
        {"train": loader(dataset=Subset(TensorDataset(binary()), range(20)))},
        {"train": loader(dataset=Subset(TensorDataset(binary()), range(20, 40)))},
        "checksum",
        "checksum",
    ),
    "a list": (
        {"train": loader(dataset=list(binary()))},
        {"train": loader(dataset=list(1 - binary()))},
        "checksum",
        "checksum",
    ),
    "computed items": (
        {"train": loader(dataset=Computed(1.5))},
        {"train": loader(dataset=Computed(0.5))},
        "checksum",
        "checksum",
    ),
    "sampler": (
        {"train": loader()},
        {"train": loader(sampler=WeightedRandomSampler(torch.ones(40), 40))},
        "SequentialSampler",
        "WeightedRandomSampler",
    ),
    "weights of the sampler": (
        {"train": loader(sampler=WeightedRandomSampler(torch.ones(40), 40))},
        {"train": loader(sampler=WeightedRandomSampler(torch.arange(1.0, 41.0), 40))},
        "weights",
        "weights",
    ),
    "collate_fn": (
        {"train": loader(dataset=TensorDataset(binary(), binary()), collate_fn=first_of)},
        {"train": loader(dataset=TensorDataset(binary(), binary()), collate_fn=last_of)},
        "first_of",
        "last_of",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_one_is_refused_with_both_values(name, tmp_path):
    first, second, there, here = OTHERS[name]
    path = tmp_path / "run.pt"
    go_on(first, first, path)
    path.unlink()
    go_on(first, {**first, "resume": True}, path)  # the same functions and objects after they were used
    with pytest.raises(ValueError, match=r"run\.pt (was written by a run with|is of a run of another) ") as caught:
        go_on({**second, "resume": True}, {}, path)
    message = str(caught.value)
    middle = ", and this one has " if ", and this one has " in message else " in the file and "
    in_file, _, in_this = message.partition(middle)
    assert there in in_file
    assert here in in_this
    assert in_file.rpartition("=")[2] != in_this


def test_methods_of_a_users_object_are_compared_by_the_modules_behind_them(tmp_path):
    """The usual way of Pyro's examples: an object with the methods model and guide."""

    class VAE(nn.Module):
        def __init__(self, activation):
            super().__init__()
            self.decoder = nn.Sequential(nn.Linear(2, 12), activation)
            self.encoder = nn.Linear(12, 4)

        def model(self, x):
            pyro.module("decoder", self.decoder)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", pyro.distributions.Normal(x.new_zeros(len(x), 2), 1.0).to_event(1))
                pyro.sample("x", pyro.distributions.Normal(self.decoder(z), 1.0).to_event(1), obs=x.flatten(1))

        def guide(self, x):
            pyro.module("encoder", self.encoder)
            with pyro.plate("data", len(x)):
                loc, scale = self.encoder(x.flatten(1)).chunk(2, -1)
                pyro.sample("z", pyro.distributions.Normal(loc, scale.exp()).to_event(1))

    def pair(activation):
        def made():
            pyro.clear_param_store()
            vae = VAE(activation)
            return vae.model, vae.guide

        return {"pair": made}

    path = tmp_path / "run.pt"
    go_on(pair(nn.Tanh()), pair(nn.Tanh()), path)
    with pytest.raises(ValueError, match=r"another module 0 \(VAE\): 'decoder.1' is Tanh in the file and SiLU here"):
        go_on({**pair(nn.SiLU()), "resume": True}, {}, path)
    pyro.clear_param_store()


def test_random_items_of_a_data_set_are_not_compared(tmp_path):
    """A data set that augments at random gives other items in each reading; reading them takes no random numbers."""
    path = tmp_path / "run.pt"
    go_on(
        {"train": loader(dataset=Computed(1.5, draws=True))}, {"train": loader(dataset=Computed(1.5, draws=True))}, path
    )
    assert "train.dataset.items" not in read(path)["training"]["settings"]
    runs = []
    for checkpoint in (None, tmp_path / "other.pt"):
        pyro.set_rng_seed(3)
        pair = make()
        train = loader(dataset=Computed(1.5, draws=True), shuffle=True)
        pv.fit(*pair, train, epochs=2, checkpoint=checkpoint, progress=False)
        runs.append((parameters(*pair), torch.rand(3), np.random.rand()))  # noqa: NPY002
    assert same(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert runs[0][2] == runs[1][2]


def test_a_data_set_with_workers_is_not_read_before_them(tmp_path):
    class Read(Computed):
        reads = 0

        def __getitem__(self, place):
            Read.reads += 1
            return super().__getitem__(place)

    from pyrovae.training.run_file import describe_data

    found = describe_data("train", loader(dataset=Read(1.5), num_workers=1))
    assert "train.dataset.items" not in found
    assert Read.reads == 0
    describe_data("train", loader(dataset=Read(1.5)))
    assert Read.reads == 6


def test_a_loss_that_has_found_out_its_plates(tmp_path):
    """Pyro's losses count the plates at their first step; the same object goes on."""
    loss = TraceEnum_ELBO(strict_enumeration_warning=False)
    go_on({"loss": loss}, {"loss": loss}, tmp_path / "run.pt")
    assert loss.max_plate_nesting != float("inf")
    again = {"loss": TraceEnum_ELBO(strict_enumeration_warning=False), "resume": True}
    go_on(again, again, tmp_path / "run.pt")


def test_runs_of_the_version_before_go_on(tmp_path):
    path, options = tmp_path / "run.pt", {"train": loader(), "transform": functools.partial(add, amount=1)}
    go_on(options, options, path)
    content = read(path)
    content["training"]["settings"] = {
        name: value for name, value in content["training"]["settings"].items() if "." not in name and "full" not in name
    }
    del content["description"]
    write(path, content)
    go_on({**options, "resume": True}, options, path)
    other = {"pair": lambda: (bernoulli(pv.nets.MLP(2, [8], 12, activation=nn.Tanh)), make()[1])}
    with pytest.raises(ValueError, match="is of a run of another model: .*SiLU in the file and Tanh here"):
        go_on({**options, **other, "resume": True}, {}, path)


def test_code_is_compared_if_one_python_compiled_it():
    first, second = (describe_callable(function) for function in (lambda x: x + 1, lambda x: x - 1))
    assert not same_text(first, second)
    other_python = second.replace("of cpython-3", "of cpython-4")
    assert same_text(first, other_python)
    assert not same_text(first, other_python.replace("lambda", "other"))


def test_what_is_no_other_function():
    def documented(x):
        """What it does."""
        return x + 1

    def made(x):
        return x + 1

    made.__name__ = "documented"
    assert same_text(describe_callable(documented), describe_callable(made))
    pairs = [
        (functools.partial(pv.data.binarize), functools.partial(pv.data.binarize)),
        (Add(1), Add(1.0)),
        (functools.partial(add, amount=np.float32(0.1)), functools.partial(add, amount=0.1)),
        (lambda x: x in {"a", "b", "c"}, lambda x: x in {"a", "b", "c"}),
    ]
    for first, second in pairs:
        assert same_text(describe_callable(first), describe_callable(second))


def test_where_a_function_runs_is_not_compared():
    def on(device, log_path, amount):
        return lambda batch: batch.to(device) + amount + len(log_path)

    first, second, other = (describe_callable(f) for f in (on("cpu", "a", 1), on("cuda", "b", 1), on("cpu", "a", 2)))
    assert same_text(first, second)
    assert not same_text(first, other)
    moved = [describe_callable(functools.partial(torch.Tensor.to, device=device)) for device in ("cpu", "cuda")]
    assert same_text(*moved)


@pytest.mark.parametrize(
    ("data", "other"),
    [
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 + 2j])),
        (torch.eye(3).to_sparse(), (2 * torch.eye(3)).to_sparse()),
        (torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)),
        (torch.tensor(True), torch.tensor(False)),
        (np.arange(6).reshape(2, 3).T, np.arange(6).reshape(3, 2)),
        (np.array(["a", "b"]), np.array(["a", "c"])),
        (np.array([None, "a"], dtype=object), np.array([None], dtype=object)),
    ],
)
def test_checksums_of_any_array(data, other):
    assert checksum(data) == checksum(data.clone() if isinstance(data, torch.Tensor) else data.copy())
    assert checksum(data) != checksum(other)


def test_functions_that_refer_to_each_other():
    def one(x):
        return table[1](x)

    def other(x):
        return one(x) if x else table[0]

    table = (one, other)
    text = describe_callable(other)
    assert "itself" in text
    assert len(text) < 1000


TABLE = {"k": 1.0}


@pytest.mark.parametrize("value", [2.0, [1.0], {"deeper": torch.ones(2)}])
def test_a_global_table_of_a_transform(value, monkeypatch, tmp_path):
    def transform(batch):
        return batch * (TABLE["k"] is not None)

    go_on({"transform": transform}, {"transform": transform}, tmp_path / "run.pt")
    monkeypatch.setitem(TABLE, "k", value)
    with pytest.raises(ValueError, match=r"TABLE=\{k=1\}.*, and this one has .*TABLE=\{k="):
        go_on({"transform": transform, "resume": True}, {}, tmp_path / "run.pt")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (programs(), programs()),
        (programs(scaled(1.0)), programs(scaled(1))),
        (programs(closure(2.0)), programs(closure(2.0))),
        # A script whose options tell that it resumes, and where.
        *(
            ({"transform": over(one)}, {"transform": over(other)})
            for one, other in [
                (Namespace(k=1, resume=False, out="a"), Namespace(k=1, resume=True, out="b")),
                ({"k": 1, "device": "cpu"}, {"k": 1, "device": "cuda"}),
            ]
        ),
        ({"train": loader(dataset=Listed(binary()))}, {"train": loader(dataset=Listed(binary()))}),
    ],
)
def test_the_same_run_goes_on(first, second, tmp_path):
    go_on(first, second, tmp_path / "run.pt")
    go_on({**second, "resume": True}, second, tmp_path / "run.pt")
    pyro.clear_param_store()
