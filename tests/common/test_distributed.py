"""Several processes: what two ranks train is what one trains at the same global batch; none waits long for a dead one."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from shared.processes import Program

import pyrovae as pv

# Noise comes with the data, so that a datum has the same in whichever process it is.
PROGRAM = """
import os, sys, pyro, pyro.distributions as dist, torch
import pyrovae as pv

torch.set_default_dtype(torch.float64)

class Injected(dist.Normal):
    def __init__(self, loc, scale, noise):
        super().__init__(loc, scale)
        self.noise = noise

    def expand(self, batch_shape, _instance=None):
        return self

    def rsample(self, sample_shape=torch.Size()):
        return self.loc + self.scale * self.noise

class Guide(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(6, 4)

    def forward(self, x, noise=None):
        pyro.module("guide", self)
        noise = x[:, 6:] if noise is None else noise
        loc, log_scale = self.layer(x[:, :6]).chunk(2, -1)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", Injected(loc, log_scale.exp(), noise).to_event(1))

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 6)

    def forward(self, x, noise=None):
        pyro.module("model", self)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Normal(self.layer(z), 0.5).to_event(1), obs=x[:, :6])
"""
TRAIN = """
from pyrovae.compiled.record import Recording
Recording.compiler = staticmethod(lambda graph: graph)
with pv.distributed.joined() as rank:
    torch.manual_seed(0)
    train = torch.randn(24, 8)
    torch.manual_seed(rank)  # fit takes the parameters of rank 0
    model, guide = Model(), Guide()
    torch.manual_seed(5 + rank)  # and its order of the data
    pair = train[:, :6], train[:, 6:]
    history = pv.fit(model, guide, {data}, epochs=3, learning_rate=1e-2, clip_norm=5.0, compile={compile},
                     progress=False).history
    noise = torch.randn(())
    numbers = {{name: history[-1][name] for name in ("objective", "elbo", "reconstruction", "kl", "validation_elbo")}}
    state = [*model.state_dict().values(), *guide.state_dict().values()]
    torch.save((numbers, state, noise), sys.argv[1] + str(rank))
"""
STOPS = """
import time
with pv.distributed.joined(timeout=5) as rank:
    calls = []
    def transform(x):
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            {how}
        return x
    pv.fit(Model(), Guide(), torch.randn(24, 8), epochs=50, batch_size=10, transform=transform, progress=False)
"""
# A loss that is not finite, in one process alone: at once, where the gradients are, too, and where they are not.
NOT_FINITE = """
class Lost(pyro.infer.Trace_ELBO):
    calls = 0
    def loss_and_grads(self, model, guide, x):
        Lost.calls += 1
        return super().loss_and_grads(model, guide, x) * (float("inf") if rank == 1 and Lost.calls == 3 else 1.0)

with pv.distributed.joined(timeout=20) as rank:
    torch.manual_seed(0)
    model, guide = Model(), Guide()
    result = pv.fit(model, guide, torch.randn(24, 8), epochs=2, batch_size=10, loss=Lost(), max_skipped_steps={limit},
                    progress=False)
    torch.save((result.history, [*model.state_dict().values(), *guide.state_dict().values()]), sys.argv[1] + str(rank))
"""


def start(code, num_ranks, *arguments):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": num_ranks, "GLOO_SOCKET_IFNAME": "lo"}
    return [
        Program(
            f"import torch; torch.set_num_threads(1)\n{PROGRAM}{code}", *arguments, RANK=rank, LOCAL_RANK=rank, **common
        )
        for rank in range(num_ranks)
    ]


def finish(ranks):
    for process in ranks:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors


IN_MEMORY = "train, batch_size=10, validation=train"
TUPLE = "pair, batch_size=10, validation=pair"
DATASET = "torch.utils.data.Subset(torch.utils.data.TensorDataset(*pair), range(24)), batch_size=10, validation=pair"
LOADED = "torch.utils.data.DataLoader(train, 10 // pv.distributed.num_ranks(), sampler={sampler}), validation=train"


@pytest.mark.parametrize(
    ("one_reads", "two_read", "compile"),
    [
        (IN_MEMORY, IN_MEMORY, False),
        (IN_MEMORY, IN_MEMORY, True),
        # Every second datum for each of two: together the batches of one.
        (
            LOADED.format(sampler=None),
            LOADED.format(sampler="torch.utils.data.DistributedSampler(train, shuffle=False)"),
            True,
        ),
        (TUPLE, TUPLE, True),
        (IN_MEMORY, DATASET, False),
    ],
    ids=["eager", "recorded", "loaded", "tuple", "data set"],
)
def test_two_ranks_train_as_one_process(tmp_path, one_reads, two_read, compile):
    """Shares of 5 and of 2 in the ragged last batch; clipping sees the gradient of the whole batch."""
    finish(start(TRAIN.format(compile=compile, data=one_reads), 1, tmp_path / "one"))
    finish(start(TRAIN.format(compile=compile, data=two_read), 2, tmp_path / "two"))
    one = torch.load(tmp_path / "one0")
    noise = []
    for rank in range(2):
        numbers, state, drawn = torch.load(tmp_path / f"two{rank}")
        assert numbers == pytest.approx(one[0], rel=1e-10)
        for expected, found in zip(one[1], state, strict=True):
            assert torch.allclose(expected, found, rtol=1e-10, atol=1e-12)
        noise.append(drawn)
    assert noise[0] != noise[1]


@pytest.mark.parametrize(("how", "at_once"), [("os._exit(1)", True), ("time.sleep(100)", False)])
def test_a_rank_that_dies_or_hangs_ends_the_others(how, at_once):
    """With 5 seconds in place of 50."""
    ranks = start(STOPS.format(how=how), 2)
    try:
        began = time.perf_counter()
        _, errors = ranks[0].communicate(timeout=120)
        assert ranks[0].returncode != 0
        assert "process 0 of 2 waited for another process, which hangs or has died" in errors
        assert time.perf_counter() - began < 60
        assert at_once or ranks[1].poll() is None
    finally:
        ranks[1].kill()
        ranks[1].communicate()


def test_ranks_agree_on_what_is_not_finite(tmp_path):
    """A loss that is infinite in one of them, with finite gradients: both skip the step, or both stop."""
    finish(start(NOT_FINITE.format(limit=1), 2, tmp_path / "skipped"))
    histories, states = zip(*(torch.load(tmp_path / f"skipped{rank}") for rank in range(2)), strict=True)
    for history in histories:
        assert [row["skipped_steps"] for row in history] == [1, 0]
        assert history[-1]["elbo"] == histories[0][-1]["elbo"]
    for first, second in zip(*states, strict=True):
        assert torch.equal(first, second)
    for process in start(NOT_FINITE.format(limit=0), 2, tmp_path / "stopped"):
        _, errors = process.communicate(timeout=300)
        assert "NotFiniteError: the loss or its gradient is not finite at epoch 1, step 3" in errors


def test_alone_nothing_happens():
    distributed = pv.distributed
    weight = torch.ones(3, requires_grad=True)
    weight.grad = torch.tensor([1.0, 2.0, 3.0])
    state = torch.get_rng_state()
    with distributed.joined() as rank:
        assert (rank, distributed.num_ranks()) == (0, 1)
        distributed.sum_gradients([weight])
        distributed.same_everywhere([weight])
        distributed.random_numbers_apart()
        assert torch.equal(distributed.share(torch.arange(5)), torch.arange(5))
        assert distributed.sums(1, torch.tensor(2.5)) == [1.0, 2.5]
        assert distributed.gather("value") == ["value"]
    assert torch.equal(weight.grad, torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_batch_too_small_for_all_is_refused(monkeypatch):
    monkeypatch.setattr(pv.distributed, "num_ranks", lambda: 3)
    pv.distributed.check_shares(23, 10)
    with pytest.raises(ValueError, match="22 data in batches of 10 have a batch of 2, fewer than the 3 processes"):
        pv.distributed.check_shares(22, 10)


@pytest.mark.slow
def test_torchrun_of_the_example(tmp_path):
    """Two processes, one folder; every test image is evaluated once."""
    script = Path(__file__).parents[2] / "examples/mnist_svi.py"
    options = [
        "--dataset",
        "digits",
        "--epochs",
        "2",
        "--num-particles",
        "20",
        "--quiet",
        "--out",
        str(tmp_path / "run"),
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
        *options,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    test = json.loads((tmp_path / "run/metrics.json").read_text())["test"]
    assert test["num_data"] == len(pv.data.digits().test)
    for line in ("300 validation and", "Numbers and figures"):  # one of them writes
        assert done.stdout.count(line) == 1


TOGETHER = """
with pv.distributed.joined() as rank:
    torch.manual_seed(0)
    train = torch.randn(24, 8)
    model, guide = Model(), Guide()
    torch.manual_seed(5)
    own = pv.distributed.rank()
    history = pv.fit(model, guide, train, epochs=9, batch_size=10, accumulate=2, average=0.7, validation=train, progress=False,
                     optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9), clip_norm=5.0,
                     callback=lambda progress: own == pv.distributed.num_ranks() - 1 and progress.epoch == 3).history
    torch.save((history, [*model.state_dict().values(), *guide.state_dict().values()]), sys.argv[1] + str(rank))
"""


def test_two_ranks_average_and_stop_as_one_process(tmp_path):
    """Batches of 10, 10 and 4, two to a step; one process alone asks to stop, after the third epoch."""
    finish(start(TOGETHER, 1, tmp_path / "alone"))
    finish(start(TOGETHER, 2, tmp_path / "rank"))
    history, alone = torch.load(tmp_path / "alone0")
    assert len(history) == 3
    for rank in range(2):
        rows, state = torch.load(tmp_path / f"rank{rank}")
        assert len(rows) == 3
        for row, expected in zip(rows, history, strict=True):
            for name in ("objective", "validation_bound", "learning_rate"):
                assert row[name] == pytest.approx(expected[name], rel=1e-9)
        for found, expected in zip(state, alone, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


RESUMED = """
class Stopped(Exception):
    pass

def stop(progress):
    if sys.argv[2] == "stops" and progress.epoch == 2:
        raise Stopped

with pv.distributed.joined() as rank:
    torch.manual_seed(0)
    train = torch.randn(24, 6)
    torch.manual_seed(5 + rank)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Dropout(0.3))
    guide = pv.guides.MeanFieldNormal(net, 2, num_features=8)
    likelihood = pv.likelihoods.Normal(pv.nets.MLP(2, [8], 6), (6,), scale=1.0)
    model = pv.GenerativeModel(pv.priors.StandardNormal(2), likelihood)
    noisy = lambda x: x + torch.randn_like(x)
    try:
        result = pv.fit(model, guide, {data}, epochs=4, transform=noisy, validation=train, progress=False, callback=stop,
                        checkpoint=sys.argv[3], checkpoint_every=0, resume=sys.argv[2] == "resumes")
        history = [{{k: v for k, v in row.items() if "second" not in k}} for row in result.history]
        torch.save((history, [*model.state_dict().values(), *guide.state_dict().values(), torch.rand(3)]),
                   sys.argv[1] + str(rank))
    except Stopped:
        pass
"""
SHUFFLED = "torch.utils.data.DataLoader(train, 5, sampler=torch.utils.data.DistributedSampler(train))"
OWN = (
    "torch.utils.data.DataLoader(torch.utils.data.Subset(train, range(rank, 24, 2)), 5, shuffle=True, "
    "generator=torch.Generator().manual_seed(rank))"
)


@pytest.mark.parametrize(
    "data",
    ["train, batch_size=10", SHUFFLED, OWN],
    ids=["in memory", "distributed sampler", "own generators"],
)
def test_two_ranks_resume_bit_for_bit(tmp_path, data):
    """Each rank draws noise of its own: for latents, dropout and the transform."""
    code = RESUMED.format(data=data)
    finish(start(code, 2, tmp_path / "whole", "runs", tmp_path / "whole.pt"))
    finish(start(code, 2, tmp_path / "none", "stops", tmp_path / "run.pt"))
    assert not (tmp_path / "none0").exists()
    finish(start(code, 2, tmp_path / "again", "resumes", tmp_path / "run.pt"))
    for rank in range(2):
        (history, state), (expected_history, expected) = (
            torch.load(tmp_path / f"{name}{rank}") for name in ("again", "whole")
        )
        assert history == expected_history
        for found, wanted in zip(state, expected, strict=True):
            assert torch.equal(found, wanted)
    assert not torch.equal(*(torch.load(tmp_path / f"again{rank}")[1][-1] for rank in range(2)))  # their own noise
    if data != SHUFFLED:  # which needs several processes
        for process in start(code, 1, tmp_path / "alone", "resumes", tmp_path / "run.pt"):
            _, errors = process.communicate(timeout=300)
            assert "it is the state of 2 process(es)" in errors or "of a run with" in errors


STREAMED = """
class Squares(torch.utils.data.Dataset):  # read item by item, as data that memory does not hold
    def __len__(self):
        return 23

    def __getitem__(self, place):
        return torch.tensor([place / 10, 1.0])

def model(x):
    with pyro.plate("data", len(x), dim=-1):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, 2]).to_event(1), obs=x)

def guide(x):  # the posterior
    with pyro.plate("data", len(x), dim=-1):
        pyro.sample("z", dist.Normal(x.sum(-1) / 3, 3**-0.5))

with pv.distributed.joined() as rank:
    data = Squares()
    mine = pv.distributed.share(torch.arange(len(data)))
    loader = torch.utils.data.DataLoader(torch.utils.data.Subset(data, mine.tolist()), batch_size=4)
    lml = pv.LogMarginalLikelihood.concatenate(
        pv.distributed.gather(pv.log_marginal_likelihood(model, guide, loader, num_particles=50, precision="bf16"))
    )
    order = torch.cat(pv.distributed.gather(mine)).argsort()
    torch.save((lml.log_prob[order], lml.precision, lml.precision_error), sys.argv[1] + str(rank))
"""


def test_ranks_evaluate_data_that_memory_does_not_hold(tmp_path):
    """Every datum once, in the order of the data, where log p(x) is known."""
    finish(start(STREAMED, 3, tmp_path / "rank"))
    x = torch.stack([torch.arange(23) / 10, torch.ones(23)], -1).double()
    exact = torch.distributions.MultivariateNormal(
        torch.zeros(2).double(), torch.eye(2).double() + torch.ones(2, 2).double()
    ).log_prob(x)
    for rank in range(3):
        log_prob, precision, error = torch.load(tmp_path / f"rank{rank}")
        torch.testing.assert_close(log_prob.double(), exact, rtol=1e-6, atol=1e-6)
        assert precision == "bf16"
        assert torch.equal(error, torch.zeros(23).double())  # measured on the data of all ranks; there are no layers


@pytest.mark.slow
def test_torchrun_of_two_agents(tmp_path):
    """`torchrun --nnodes=2`, as on two machines: two agents of one process each."""
    script = tmp_path / "train.py"
    script.write_text(PROGRAM + TRAIN.format(compile=False, data=IN_MEMORY))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *nodes, f"--node-rank={number}", script, tmp_path / "node"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    finish(agents)
    finish(start(TRAIN.format(compile=False, data=IN_MEMORY), 1, tmp_path / "one"))
    expected = torch.load(tmp_path / "one0")[1]
    for rank in range(2):
        for found, wanted in zip(torch.load(tmp_path / f"node{rank}")[1], expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


# One parameter has a gradient on rank 1 alone, another on none: AdamW must leave the latter alone.
GRADIENTS = """
with pv.distributed.joined(timeout=20) as rank:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    parameters[0].grad = torch.tensor([1.0, 2.0])
    if rank == 1:
        parameters[1].grad = torch.tensor([5.0, 7.0])
    from pyrovae.common.distributed import sum_gradients
    sum_gradients(parameters)
    torch.save([parameter.grad for parameter in parameters], sys.argv[1] + str(rank))
"""


def test_a_parameter_without_a_gradient_keeps_none(tmp_path):
    finish(start(GRADIENTS, 2, tmp_path / "of"))
    for rank in range(2):
        first, second, third = torch.load(tmp_path / f"of{rank}")
        assert first.tolist() == [2.0, 4.0]
        assert second.tolist() == [5.0, 7.0]
        assert third is None
