"""MixtureVAE: its component summed out, against sums over conditioned models and evidence in closed form."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from shared.hierarchies import LinearNormal, affine
from torch import nn

import pyrovae as pv

K, D = 3, 2


@pytest.fixture(autouse=True)
def _double(double):
    pass


def pair(context=False):
    more = {"context_net": nn.Linear(2, 4), "num_features": 4} if context else {}
    prior = pv.priors.MixtureOfNormals(D, K, **more)
    with torch.no_grad():
        prior.logits.copy_(torch.tensor([0.4, -0.7, 0.1]))
        prior.log_scales += 0.3 * torch.randn(K, D)
    likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(D, [6], 5), (5,))
    encoder = pv.nets.Concatenate(pv.nets.MLP(5 + 2, [6])) if context else pv.nets.MLP(5, [6])
    return pv.models.MixtureVAE(prior, likelihood), pv.guides.MeanFieldNormal(encoder, D)


def draws_of(guide):
    """The guide, and a list of what it draws."""
    draws = []

    def noted(*args):
        with poutine.trace() as tracer:
            guide(*args)
        draws.append(tracer.trace.nodes["z"])

    return noted, draws


@pytest.mark.parametrize("context", [False, True])
def test_log_weights_are_sums_over_conditioned_models(context):
    """Particle by particle: logsumexp over y of log p(x, z, y), with y observed, minus log q(z|x)."""
    model, guide = pair(context)
    args = (torch.rand(4, 5).round(), torch.randn(4, 2)) if context else (torch.rand(4, 5).round(),)
    noted, draws = draws_of(guide)
    found = pv.log_weights(model, noted, *args, num_particles=6, data_batch_size=None)
    site = draws[-1]
    z = site["value"]
    assert z.shape == (6, 4, D)
    for s in range(6):
        terms = []
        for k in range(K):
            known = {"y": torch.full((4,), k), "z": z[s]}
            trace = poutine.trace(pyro.condition(model, known)).get_trace(*args)
            trace.compute_log_prob()
            terms.append(sum(trace.nodes[name]["log_prob"] for name in ("y", "z", "x")))
        expected = torch.stack(terms).logsumexp(0) - guide.posterior(*args).log_prob(z[s])
        assert torch.allclose(found[s], expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("context", [False, True])
def test_it_is_the_model_of_the_mixture_prior(context):
    """Its ELBO, by TraceEnum_ELBO, is that of a GenerativeModel at the same draws, and so are the gradients."""
    model, guide = pair(context)
    args = (torch.rand(4, 5).round(), torch.randn(4, 2)) if context else (torch.rand(4, 5).round(),)
    same = pv.GenerativeModel(model.prior, model.likelihood)
    found = []
    for program, loss in ((model, TraceEnum_ELBO(max_plate_nesting=1)), (same, Trace_ELBO())):
        pyro.set_rng_seed(3)
        parameters = [*program.parameters(), *guide.parameters()]
        value = loss.differentiable_loss(program, guide, *args)
        found.append([value.detach(), *torch.autograd.grad(value, parameters)])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, atol=1e-10, rtol=0)


class Linear:
    """x | z ~ N(W z + b, s^2 I) under a mixture of normals: the evidence is a mixture of normals."""

    def __init__(self):
        self.prior = pv.priors.MixtureOfNormals(D, K)
        with torch.no_grad():
            self.prior.logits.copy_(torch.tensor([0.4, -0.7, 0.1]))
            self.prior.locs.copy_(torch.tensor([[-2.0, 0.5], [1.0, 1.5], [0.3, -2.0]]))
            self.prior.log_scales.copy_(torch.tensor([[-0.5, 0.1], [-1.0, -0.3], [0.0, -0.8]]))
        self.weight, self.bias, self.scale = torch.randn(4, D), torch.randn(4), 0.8
        self.model = pv.models.MixtureVAE(
            self.prior, LinearNormal(affine(self.weight, self.bias), (4,), self.scale)
        ).requires_grad_(False)

    def components(self):
        loc, scale = self.prior.locs.detach(), self.prior.log_scales.detach().exp()
        covariance = self.weight * scale.square().unsqueeze(1) @ self.weight.T + self.scale**2 * torch.eye(4)
        return dist.MultivariateNormal(loc @ self.weight.T + self.bias, covariance)

    def joint(self, x):
        """log p(x, y), (N, K)."""
        return self.prior.logits.detach().log_softmax(-1) + self.components().log_prob(x.unsqueeze(1))

    def guide(self, x):
        """Wide enough for all components."""
        precision = self.weight.T @ self.weight / self.scale**2 + 0.3 * torch.eye(D)
        covariance = torch.linalg.inv(precision)
        loc = (x - self.bias) @ self.weight / self.scale**2 @ covariance
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, 1.5 * covariance))


@pytest.fixture
def linear():
    return Linear()


def test_known_evidence(linear):
    x = linear.model.generate(6)
    truth = linear.joint(x).logsumexp(1)
    lml = pv.log_marginal_likelihood(linear.model, linear.guide, x, num_particles=4000)
    within(lml.mean, truth.mean().item(), lml.mean_mc_stderr + abs(lml.bias_estimate))
    annealed = pv.annealed_importance_sampling(
        linear.model, x[:3], guide=linear.guide, num_chains=16, num_temperatures=60
    )
    assert annealed.stderr.max() < 0.5
    # The estimate is log of a mean: its bias is about half of its variance.
    for n in range(3):
        within(annealed.log_prob[n].item(), truth[n].item(), annealed.stderr[n].item() + annealed.stderr[n].item() ** 2)


def test_classes_given_the_data(linear):
    x = linear.model.generate(8)
    found = pv.classify(linear.model, linear.guide, x, num_particles=4000)
    assert found.site == "y"
    # 4.5 standard errors; the bias of the ratio is of order 1 / S
    assert ((found.probs - linear.joint(x).softmax(1)).abs() <= 4.5 * found.stderr + 2 / 4000).all()


def test_generate(linear):
    """Means and components of draws are those of p(x|y) and p(x)."""
    number = 20_000
    means = linear.components().mean
    overall = linear.prior.logits.softmax(-1) @ means
    for component, expected in [*enumerate(means), (None, overall)]:
        x = linear.model.generate(number, component=component)
        for column in range(4):
            within(x[:, column].mean().item(), expected[column].item(), x[:, column].std().item() / number**0.5)
    several = torch.tensor([2, 0, 0, 1, 2]).repeat(number // 5)
    x = linear.model.generate(number, component=several, mean=True)
    for k in range(K):
        of_component = x[several == k]
        stderr = of_component.std(0) / len(of_component) ** 0.5
        assert ((of_component.mean(0) - linear.components().mean[k]).abs() <= 4.5 * stderr).all()


def test_wrong_components_and_priors():
    model, _ = pair()
    with pytest.raises(ValueError, match="components are 0 to 2, found 3 to 3"):
        model.generate(4, component=3)
    with pytest.raises(ValueError, match=r"of shape \(4,\); found torch.int64 of shape \(3,\)"):
        model.generate(4, component=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match=r"whole number.*found torch.float"):
        model.generate(4, component=0.5)
    with pytest.raises(TypeError, match=r"must be a pyrovae.priors.MixtureOfNormals.*found StandardNormal"):
        pv.models.MixtureVAE(pv.priors.StandardNormal(D), model.likelihood)


@pytest.mark.parametrize("context", [False, True])
def test_generate_with_a_context(context):
    model, _ = pair(context)
    args = {"context": torch.randn(1, 2)} if context else {}
    assert model.generate(7, component=1, **args).shape == (7, 5)
    assert model.generate(7, **args).shape == (7, 5)
    if not context:
        with pytest.raises(ValueError, match="given a context"):
            model.generate(7, component=1, context=torch.randn(1, 2))


def test_fit_finds_the_clusters():
    """The obvious call: three clusters of unequal size become three components, with their weights and means."""
    centres, sizes = torch.tensor([[-3.0, 0.0], [3.0, -2.0], [0.0, 3.0]]), torch.tensor([150, 90, 60])
    labels = torch.arange(3).repeat_interleave(sizes)
    x = centres[labels] + 0.5 * torch.randn(300, 2)
    model = pv.models.MixtureVAE(
        pv.priors.MixtureOfNormals(D, K), LinearNormal(affine(torch.eye(2), torch.zeros(2)), (2,), 0.3)
    )
    model.likelihood.requires_grad_(False)
    with torch.no_grad():
        model.prior.locs.copy_(0.4 * centres)
    guide = pv.guides.MeanFieldNormal(pv.nets.MLP(2, [16]), D)
    fitted = pv.fit(model, guide, x, epochs=60, batch_size=50, learning_rate=3e-2, validation=x, progress=False)
    assert fitted.history[-1]["validation_elbo"] > fitted.history[0]["validation_elbo"] + 1
    found = pv.classify(model, guide, x, num_particles=50)
    assert (found.predicted == labels).double().mean() > 0.98
    assert (model.prior.locs - centres).abs().max() < 0.4
    assert (model.prior.logits.softmax(0) - sizes / 300).abs().max() < 0.05
    generated = torch.stack([model.generate(500, component=k).mean(0) for k in range(K)])
    assert (generated - centres).abs().max() < 0.5


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")
def test_another_loss_is_refused_by_name():
    model, guide = pair()
    with pytest.raises(ValueError, match=r"site 'y' of the model is marked.*Trace_ELBO would draw it.*TraceEnum_ELBO"):
        pv.fit(model, guide, torch.rand(6, 5).round(), loss=Trace_ELBO(), epochs=1, progress=False)


def test_save_and_load(tmp_path):
    model, guide = pair()
    pv.save(tmp_path / "pair.pt", model, guide)
    other = pv.load(tmp_path / "pair.pt")
    assert isinstance(other["model"], pv.models.MixtureVAE)
    assert other["model"].num_components == K
    for name, tensor in model.state_dict().items():
        assert torch.equal(other["model"].state_dict()[name], tensor)
    again = pv.load(tmp_path / "pair.pt", *pair())
    assert again == {}


def test_uses():
    """What works with other models works with it: gaps, the aggregate posterior, reconstructions, missing values."""
    model, guide = pair()
    x = torch.rand(6, 5).round()
    assert pv.uses.reconstruct(model, guide, x).shape == x.shape
    aggregate = pv.aggregate_posterior(model, guide, x, num_draws=4)
    same = pv.GenerativeModel(model.prior, model.likelihood)
    pyro.set_rng_seed(0)
    one = pv.aggregate_posterior(model, guide, x, num_draws=4).summary()
    pyro.set_rng_seed(0)
    assert one == pv.aggregate_posterior(same, guide, x, num_draws=4).summary()
    assert aggregate is not None
    observed = torch.ones(6, 5, dtype=torch.bool)
    observed[:, 2] = False
    imputed = pv.impute(model, guide, x, observed=observed, num_particles=50)
    assert imputed.mean.shape == x.shape
