"""A 2-D latent on real MNIST digits, where log p(x) is an integral over a plane that can be done on a grid.

`python -m pytest tests/evaluation/test_mnist_grid.py -s` prints how far importance sampling with the trained encoder is off.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.nn import functional

import pyrovae as pv

HALF_WIDTH, NUM_IMAGES, NUM_CODES = 6.0, 60, 500


class Cells(dist.TorchDistribution):
    """Draw a cell of the grid, then a point uniformly within it: the posterior itself, up to the cells' size."""

    support = dist.constraints.real_vector
    arg_constraints = {}
    has_rsample = False

    def __init__(self, log_mass, batch_shape=None):
        self.log_mass = log_mass  # (N, G), normalised
        self.side = math.isqrt(log_mass.shape[1])
        self.step = 2 * HALF_WIDTH / self.side
        super().__init__(log_mass.shape[:1] if batch_shape is None else batch_shape, (2,), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Cells(self.log_mass, torch.Size(batch_shape))

    def sample(self, sample_shape=torch.Size()):
        num_draws = self.batch_shape[0] if len(self.batch_shape) > 1 else 1
        cell = torch.multinomial(self.log_mass.exp(), num_draws, replacement=True).T  # (S, N)
        corner = torch.stack([cell // self.side, cell % self.side], -1) * self.step - HALF_WIDTH
        return (corner + self.step * torch.rand_like(corner)).reshape(*self.batch_shape, 2)

    def log_prob(self, value):
        index = ((value + HALF_WIDTH) / self.step).floor().long()
        inside = ((index >= 0) & (index < self.side)).all(-1)
        flat = (index[..., 0] * self.side + index[..., 1]).clamp(0, self.side**2 - 1)
        log_mass = self.log_mass.expand(*value.shape[:-1], -1).gather(-1, flat.unsqueeze(-1)).squeeze(-1)
        return torch.where(inside, log_mass - 2 * math.log(self.step), -torch.inf)


@torch.no_grad()
def log_joint_on_grid(model, x, side, shift):
    """(N, side^2) log p(x, z) at the midpoints of the cells, shifted by a part of a step; and the step."""
    step = 2 * HALF_WIDTH / side
    axis = -HALF_WIDTH + step * (torch.arange(side) + 0.5 + shift)
    log_joint = []
    for rows in torch.cartesian_prod(axis, axis).split(20_000):
        logits = model.likelihood(rows).base_dist.logits.flatten(1)
        log_likelihood = x.flatten(1) @ logits.T - functional.softplus(logits).sum(1)
        log_joint.append(log_likelihood + model.prior().log_prob(rows))
    return torch.cat(log_joint, 1).double(), step


@pytest.fixture(scope="module")
def trained():
    import os

    root = os.environ.get("PYROVAE_DATA", "")
    try:
        data = pv.data.mnist(root) if root else None
    except RuntimeError:
        data = None
    if data is None:
        pytest.skip(f"needs MNIST: $PYROVAE_DATA={root!r} holds none")
    pyro.set_rng_seed(1)
    model = pv.GenerativeModel(
        pv.priors.StandardNormal(2),
        pv.likelihoods.Bernoulli(pv.nets.MLP(2, [100, 100], 784), data.data_shape, data_mean=data.train.mean(0)),
    )
    guide = pv.guides.MeanFieldNormal(pv.nets.MLP(784, [100, 100]), 2)
    options = {"epochs": 6, "batch_size": 100, "learning_rate": 3e-3, "progress": False}
    pv.fit(model, guide, data.train[:20_000], transform=data.transform, **options)
    return model, guide, data.test[:NUM_IMAGES], data.transform(data.train[:NUM_CODES])


@pytest.mark.slow
def test_importance_sampling_agrees_with_quadrature(trained, capsys):
    model, guide, x, others = trained
    log_joint, step = log_joint_on_grid(model, x, 500, 0.0)
    truth = log_joint.logsumexp(1) + 2 * math.log(step)
    shifted = log_joint_on_grid(model, x, 500, 0.5)[0].logsumexp(1) + 2 * math.log(step)
    quadrature_error = (truth - shifted).abs().max().item()
    assert quadrature_error < 0.02

    # A guide built from the grid. A hundredth of its mass is the prior's, so that no cell is left out.
    log_prior = model.prior().log_prob(torch.cartesian_prod(*[torch.arange(500) * step - HALF_WIDTH + step / 2] * 2))
    posterior = 0.99 * log_joint.softmax(1) + 0.01 * log_prior.double().softmax(0)

    def grid_guide(x, log_mass):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", Cells(log_mass))

    lml = pv.log_marginal_likelihood(
        lambda x, log_mass: model(x), grid_guide, x, posterior.log().float(), num_particles=2000
    )
    error = (lml.log_prob - truth).abs()
    assert (error <= 5 * lml.stderr + quadrature_error).all(), (error / lml.stderr).max()
    assert (lml.ess > 500).all()

    # The trained encoder: a lower bound on average, and what it misses is reported, not hidden.
    ours = pv.log_marginal_likelihood(model, guide, x, num_particles=5000)
    low = truth - ours.log_prob
    off = low.abs() > 5 * ours.stderr + quadrature_error
    trusted = off & (ours.pareto_k <= ours.pareto_k_limit)
    with capsys.disabled():
        print(
            f"\n2-D latent, {NUM_IMAGES} MNIST test digits, quadrature error {quadrature_error:.4f} nats: with the "
            f"trained encoder (5,000 particles) {int(off.sum())} digits are off by more than 5 standard errors "
            f"({int(trusted.sum())} of them with k below its limit), the worst too low by {low.max():.2f} nats; "
            f"mean error {low.mean():.3f} nats, bias estimate {ours.bias_estimate:.3f} nats, "
            f"{int((ours.pareto_k > ours.pareto_k_limit).sum())} digits with k above the limit"
        )
    assert (ours.log_prob <= truth + 5 * ours.stderr + quadrature_error).all()
    assert (ours.elbo < truth).all()

    # Second opinions, at as many evaluations of the model: 500 codes are scored, and 4,500 particles drawn.
    codes = guide.encode(others)
    mixture = pv.guides.DefensiveMixture(guide, model.prior, 0.3, widen=2, codes=codes, model=model)
    found = pv.second_opinion(model, mixture, x, num_particles=5000 - NUM_CODES)
    asked = found.lml
    still_low = truth - asked.log_prob
    still_off = still_low.abs() > 5 * asked.stderr + quadrature_error
    with capsys.disabled():
        print(
            f"with second opinions (4,500 particles, {NUM_CODES} codes) {int(still_off.sum())} digits are off, the worst "
            f"too low by {still_low.max():.2f} nats; mean error {still_low.mean():.3f} nats, "
            f"{int((asked.pareto_k > asked.pareto_k_limit).sum())} digits with k above the limit; "
            f"the guide misses mass at {int(found.misses.sum())} digits ({int((found.misses & off).sum())} of those off)"
        )
    assert still_off.sum() <= min(1, off.sum())
    assert still_low.max() < 1
