"""Evaluation in bfloat16 or medium products: what is rounded, and that the error reported is the error made."""

import pickle
from dataclasses import asdict

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from shared.runs import binary, make
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import pyrovae as pv
from pyrovae.compiled import record
from pyrovae.evaluation import log_weights, rounding
from pyrovae.evaluation.marginal_likelihood import LogMarginalLikelihood


def estimate(model, guide, *args, seed=3, **options):
    pyro.set_rng_seed(seed)
    return pv.log_marginal_likelihood(model, guide, *args, **{"compile": False, "num_particles": 60} | options)


def measured(result):
    return result.precision_error[~result.precision_error.isnan()]


@pytest.mark.parametrize("compile", [False, True])
def test_float32_is_the_default_and_no_precision_moves_the_generator(uncompiled, compile):
    model, guide = make()
    plain = estimate(model, guide, binary(), num_particles=200, particle_batch_size=50, compile=compile)
    state = torch.get_rng_state()
    assert plain.precision == "float32"
    assert plain.precision_error is None
    assert "precision" not in plain.summary()
    for precision in ("float32", "medium", "bf16"):
        result = estimate(
            model, guide, binary(), num_particles=200, particle_batch_size=50, compile=compile, precision=precision
        )
        assert torch.equal(torch.get_rng_state(), state)
        if precision == "float32":
            assert all(torch.equal(values, plain.per_datum()[name]) for name, values in result.per_datum().items())
    assert not torch.equal(result.log_prob, plain.log_prob)


def test_exact_evidence():
    """x = W z + b + noise; the exact posterior as the guide, so that rounding is the only error but Monte Carlo's.

    Without rounding every weight is p(x), and the estimate is exact.
    """
    generator = torch.Generator().manual_seed(1)
    net = nn.Linear(3, 5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    weight, bias, scale = net.weight.detach(), net.bias.detach(), 0.5
    covariance = torch.linalg.inv(torch.eye(3) + weight.T @ weight / scale**2)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1))
            pyro.sample("x", dist.Normal(net(z), scale).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            mean = (x - bias) @ weight / scale**2 @ covariance
            pyro.sample("z", dist.MultivariateNormal(mean, covariance))

    x = torch.randn(30, 3) @ weight.T + bias + scale * torch.randn(30, 5)
    double = weight.double()
    evidence = dist.MultivariateNormal(bias.double(), double @ double.T + scale**2 * torch.eye(5).double())
    truth = evidence.log_prob(x.double())
    exact = estimate(model, guide, x, num_particles=2000)
    assert (exact.log_prob - truth).abs().max() < 1e-4
    result = estimate(model, guide, x, num_particles=2000, precision="bf16")
    errors = measured(result)
    assert errors.abs().max() > 1e-3
    used = 2048 // 30  # particles of the measurement: one chunk
    spread = result.stderr.square().sum().sqrt().item() / 30
    noise = spread * (1 + 2000 / used) ** 0.5 + 1e-4
    within((result.log_prob - truth).mean().item(), errors.mean().item(), noise)
    # Per datum, too.
    own = result.stderr * (1 + 2000 / used) ** 0.5 + 1e-4
    assert ((result.log_prob - truth - result.precision_error).abs() <= 5 * own).all()


class Watched:
    """A Bernoulli decoder as a plain function that keeps the latents of every run."""

    def __init__(self):
        self.first, self.last = nn.Linear(2, 16), nn.Linear(16, 6)
        self.seen = []

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            self.seen.append(z)
            logits = self.last(self.first(z).tanh())
            pyro.sample("x", dist.Bernoulli(logits=logits, validate_args=False).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x))

    def posterior(self, x):
        return dist.Normal(x[:, :2] - 0.5, 0.9).to_event(1)

    def log_joint(self, x, z, is_rounded):
        kind = torch.bfloat16 if is_rounded else torch.float32
        hidden = F.linear(z.to(kind), self.first.weight.to(kind), self.first.bias.to(kind)).float().tanh()
        logits = F.linear(hidden.to(kind), self.last.weight.to(kind), self.last.bias.to(kind)).float()
        likelihood = -F.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
        return likelihood + dist.Normal(0.0, 1.0).log_prob(z).sum(-1)


def test_the_error_is_that_computed_by_hand_for_the_same_draws():
    watched = Watched()
    x = (torch.rand(70, 6) < 0.5).float()
    result = estimate(watched.model, watched.guide, x, num_particles=40, precision="bf16")
    positions = [index * 69 // 31 for index in range(32)]
    assert (~result.precision_error.isnan()).nonzero().flatten().tolist() == positions
    exact, rounded = (z for z in watched.seen if z.shape == (40, 32, 2))  # chunks of the evaluation are of other sizes
    assert torch.equal(exact, rounded)
    some = x[positions]
    log_q = watched.posterior(some).log_prob(exact)
    log_prob = {
        is_rounded: (watched.log_joint(some, exact, is_rounded) - log_q).double().logsumexp(0)
        for is_rounded in (False, True)
    }
    expected = log_prob[True] - log_prob[False]
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(measured(result), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("most", "particles"), [(2**19, 6400 * 64 // 100 // 32), (3200, 100)])
def test_it_takes_a_few_percent_of_the_draws_and_little_memory(monkeypatch, most, particles):
    monkeypatch.setattr(rounding, "_MOST_MEASURED", most)
    rows = {}
    for precision in ("float32", "bf16"):
        watched = Watched()
        estimate(watched.model, watched.guide, torch.ones(64, 6), num_particles=6400, precision=precision)
        rows[precision] = sum(z[..., 0].numel() for z in watched.seen)
    assert rows["bf16"] - rows["float32"] == 2 * 32 * particles <= 0.02 * 64 * 6400


def test_a_large_error_is_reported():
    model, guide = make()
    with torch.no_grad():
        for parameter in model.likelihood.parameters():
            parameter.mul_(1e3)
    exact, result = (estimate(model, guide, binary(), precision=precision) for precision in ("float32", "bf16"))
    made = (result.log_prob - exact.log_prob).abs()
    assert made.max() > 10
    largest = measured(result).abs().max().item()
    assert largest > made.max() / 10
    assert f"{largest:.2g} at most" in result.summary()


def vamp():
    guide = pv.guides.MeanFieldNormal(pv.nets.MLP(12, [16]), 2)
    prior = pv.priors.VampPrior(guide, torch.rand(5, 1, 4, 3))
    return pv.GenerativeModel(prior, make()[0].likelihood), guide, {}


def enumerated(with_latent):
    """A mixture whose component is summed out: p(x) = sum_y p(y) p(x|y, z), z ~ N(0, 1) or none."""
    net = nn.Linear(1, 12)

    def model(x):
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7])), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(0.0, 1.0)) if with_latent else torch.tensor(0.3)
            logits = net((y + z).unsqueeze(-1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x.flatten(1))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.flatten(1).mean(1) - 0.5, 0.9))

    return model, guide if with_latent else lambda x: None, {}


def one_datum():
    """Without a plate the whole program is one datum."""
    net = nn.Linear(1, 3)

    def model(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Bernoulli(logits=net(theta.reshape(-1, 1, 1))[..., 0]), obs=x.flatten(1)[:, 0])

    return model, lambda x: pyro.sample("theta", dist.Normal(0.1, 0.9)), {}


def two_layers():
    return *pv.two_layer_vae((1, 4, 3), latent_dims=(4, 2), hidden_features=(8, 8)), {}


def defended():
    model, guide = make()
    return model, pv.guides.DefensiveMixture(guide, model.prior, 0.3), {}


def refined():
    model, guide = make()
    return model, pv.guides.Refined(guide, model, num_steps=10), {}


CASES = {
    "a VampPrior, whose density calls layers": vamp,
    "sum and latent": lambda: enumerated(True),
    "everything summed out": lambda: enumerated(False),
    "one datum": one_datum,
    "two layers of latents": two_layers,
    "a guide that contains the prior": defended,
    "a refined guide": refined,
    "particles one by one": lambda: (*make(), {"vectorize_particles": False, "num_particles": 100}),
    "data together": lambda: (*make(), {"data_batch_size": None}),
    "small blocks and chunks": lambda: (*make(), {"data_batch_size": 7, "particle_batch_size": 9}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_kind_of_pair(case):
    """The same draws in float32 differ from the evaluation by errors of the size reported."""
    model, guide, options = CASES[case]()
    exact, result = (
        estimate(model, guide, binary(), **options, precision=precision) for precision in ("float32", "bf16")
    )
    made, reported = (result.log_prob - exact.log_prob), measured(result)
    is_whole = options.get("data_batch_size", "auto") is None
    assert len(reported) == (len(result) if is_whole else min(len(result), 32))
    assert made.abs().max() > 0
    if len(made) > 1:
        sizes = made.square().mean().sqrt(), reported.square().mean().sqrt()
        assert sizes[0] / 4 < sizes[1] < 4 * sizes[0]
    else:
        assert reported.abs().item() > 0


def test_layers_in_float64_are_not_rounded(double):
    model, guide = (program.double() for program in make())
    x = binary().double()
    exact, result = (estimate(model, guide, x, precision=precision) for precision in ("float32", "bf16"))
    assert torch.equal(result.log_prob, exact.log_prob)
    assert not measured(result).any()
    assert "changed nothing in log p(x) of 32 data" in result.summary()


@pytest.mark.parametrize("call", [pv.log_marginal_likelihood, pv.log_weights])
def test_other_words_are_refused(call):
    with pytest.raises(ValueError, match=r"precision must be one of \['float32', 'medium', 'bf16'\], found 'half'"):
        call(*make(), binary(), precision="half")


def weights(compile, precision="bf16"):
    torch.manual_seed(2)
    model, guide = make()
    pyro.set_rng_seed(1)
    return pv.log_weights(
        model, guide, binary()[:20], num_particles=90, particle_batch_size=30, compile=compile, precision=precision
    )


def test_recorded_is_eager(uncompiled, chunks):
    assert torch.equal(weights(True), weights(False))
    assert len(chunks) == 2  # all but the first, which is checked


def test_compiled_is_eager_up_to_its_rounding(chunks):
    compiled, eager, exact = weights(True), weights(False), weights(False, "float32")
    assert len(chunks) == 2
    rounding = (eager - exact).square().mean().sqrt()
    assert rounding > 1e-3
    assert (compiled - eager).square().mean().sqrt() < 0.3 * rounding


def test_medium_products_around_the_draws(uncompiled, monkeypatch):
    """Eager and recorded; never in the float32 half of the measurement."""
    asked, original = {}, record.float32_products
    for module in (log_weights, record, rounding):
        told = asked.setdefault(module.__name__.rpartition(".")[2], [])
        monkeypatch.setattr(
            module, "float32_products", lambda medium=False, told=told: told.append(medium) or original(medium)
        )
    options = {"num_particles": 90, "particle_batch_size": 30, "compile": True}
    estimate(*make(), binary()[:20], **options, precision="medium")
    assert asked == {"rounding": [False, True], "log_weights": [True], "record": [True, True]}
    for told in asked.values():
        told.clear()
    estimate(*make(), binary()[:20], **options)
    assert asked == {"rounding": [], "log_weights": [False], "record": [False, False]}


def test_batches_of_a_loader():
    model, guide = make()
    x = binary(90)
    result = estimate(model, guide, DataLoader(TensorDataset(x), batch_size=40), precision="bf16")
    known = ~result.precision_error.isnan()
    assert [int(part.sum()) for part in known.split(40)] == [32, 32, 10]


def test_fields_go_wherever_the_result_goes(tmp_path):
    model, guide = make()
    x = binary()[:40]
    result = estimate(model, guide, x, precision="bf16")
    torch.save(asdict(result), tmp_path / "result.pt")
    again = LogMarginalLikelihood(**torch.load(tmp_path / "result.pt", weights_only=True))
    joined = LogMarginalLikelihood.concatenate([pickle.loads(pickle.dumps(part)) for part in (again[:15], again[15:])])
    assert joined.precision == "bf16"
    torch.testing.assert_close(joined.precision_error, result.precision_error, equal_nan=True, rtol=0, atol=0)
    assert joined.summary() == result.summary()
    errors = measured(result)
    assert (
        f"bf16   layers of the model in bfloat16: log p(x) of 32 data is off by {errors.mean():.2g} on average, "
        f"{errors.abs().max():.2g} at most" in result.summary()
    )
    assert "error not measured on these data" in result[result.precision_error.isnan()].summary()
    data = result.to_inference_data()
    assert data.sample_stats.attrs["precision"] == "bf16"
    assert data.sample_stats["precision_error"].dims == ("datum",)
    with pytest.raises(ValueError, match="in one precision"):
        LogMarginalLikelihood.concatenate([result, estimate(model, guide, x)])
