"""Flows of Pyro and zuko as guides and as priors."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import torch
import zuko
from pyro.contrib.zuko import ZukoToPyro
from pyro.distributions import transforms as T
from pyro.nn import AutoRegressiveNN

from ways import Pair, normal_evidence, way

FLOWS = "flows"
# Those that can score only what they have just drawn are run one particle at a time.
FEW = {"num_particles": 1500}


def plane_pair(make_guide, model=None, exact=None, **options):
    """z ~ N(0, I) in two dimensions, x_d ~ N(z_d, 1)."""
    x = torch.tensor([[0.5, -0.2], [-0.8, 0.4], [0.3, 0.6]])

    def standard(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    exact = normal_evidence(x).sum(-1) if exact is None else exact(x)
    return Pair(model or standard, make_guide(), (x,), exact, options=options)


def base(x):
    return dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)


def small(*modules):
    """Their parameters made small, so that a flow of random weights is near the identity and the posterior is covered."""
    with torch.no_grad():
        for module in modules:
            for parameter in module.parameters() if isinstance(module, torch.nn.Module) else ():
                parameter.mul_(0.1)
    return modules


def flow_guide(*transforms, context=None):
    def guide(x):
        for number, transform in enumerate(transforms):
            if isinstance(transform, torch.nn.Module):
                pyro.module(f"flow_{number}", transform)
        given = [t.condition(context(x)) if context else t for t in transforms]
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(base(x), given))

    return guide


UNCONDITIONAL = {
    "affine autoregressive": lambda: [T.affine_autoregressive(2, hidden_dims=[8])],
    "inverse of affine autoregressive": lambda: [T.affine_autoregressive(2, hidden_dims=[8]).inv],
    "affine coupling": lambda: [T.affine_coupling(2, hidden_dims=[8])],
    "two couplings and a permutation": lambda: [
        T.affine_coupling(2, hidden_dims=[8]),
        T.permute(2, torch.tensor([1, 0])),
        T.affine_coupling(2, hidden_dims=[8]),
    ],
    "planar": lambda: [T.planar(2)],
    "radial": lambda: [T.radial(2)],
    "Householder": lambda: [T.householder(2)],
    "matrix exponential": lambda: [T.matrix_exponential(2)],
    "spline": lambda: [T.spline(2)],
    "spline coupling": lambda: [T.spline_coupling(2, hidden_dims=[8])],
    "spline autoregressive": lambda: [T.spline_autoregressive(2, hidden_dims=[8])],
    "Sylvester": lambda: [T.sylvester(2)],
    "block autoregressive": lambda: [T.block_autoregressive(2, residual="gated")],
    "neural autoregressive": lambda: [T.neural_autoregressive(2, hidden_dims=[8])],
    "lower Cholesky affine": lambda: [T.LowerCholeskyAffine(torch.zeros(2), torch.tensor([[1.0, 0.0], [0.3, 1.0]]))],
}


def polynomial():
    """dy/dx = (1 + a x)^2 with a small a; with parameters at random it would leave out half of the plane."""
    network = AutoRegressiveNN(2, [8], param_dims=[2])
    small(network)
    with torch.no_grad():
        network.layers[-1].bias.view(2, 2)[0] = 1.0
    return T.Polynomial(network, 2, count_degree=1, count_sum=1)


# Those whose parameters, made small, would not be near the identity.
UNTOUCHED = {"batch normalisation": lambda: [T.batchnorm(2)], "polynomial": lambda: [polynomial()]}
for _name, _make in UNTOUCHED.items():
    way(FLOWS, name=_name)(lambda make=_make: plane_pair(lambda: flow_guide(*make()), **FEW))
for _name, _make in UNCONDITIONAL.items():
    way(FLOWS, name=_name)(lambda make=_make: plane_pair(lambda: flow_guide(*small(*make())), **FEW))

CONDITIONAL = {
    "conditional planar": lambda: T.conditional_planar(2, 2, hidden_dims=[8]),
    "conditional radial": lambda: T.conditional_radial(2, 2, hidden_dims=[8]),
    "conditional affine autoregressive": lambda: T.conditional_affine_autoregressive(2, 2, hidden_dims=[8]),
    "conditional affine coupling": lambda: T.conditional_affine_coupling(2, 2, hidden_dims=[8]),
    "conditional spline": lambda: T.conditional_spline(2, 2, hidden_dims=[8]),
    "conditional spline autoregressive": lambda: T.conditional_spline_autoregressive(2, 2, hidden_dims=[8]),
    "conditional Householder": lambda: T.conditional_householder(2, 2, hidden_dims=[8]),
    "conditional neural autoregressive": lambda: T.conditional_neural_autoregressive(2, 2, hidden_dims=[8]),
    "conditional matrix exponential": lambda: T.conditional_matrix_exponential(2, 2, hidden_dims=[8]),
}
for _name, _make in CONDITIONAL.items():
    way(FLOWS, name=_name)(
        lambda make=_make: plane_pair(lambda: flow_guide(*small(make()), context=lambda x: x), **FEW)
    )


def zuko_guide(flow, context=True):
    small(flow)

    def guide(x):
        pyro.module("flow", flow)
        with pyro.plate("data", len(x)):
            pyro.sample("z", ZukoToPyro(flow(x) if context else flow()))

    return guide


ZUKO = {
    "zuko MAF": lambda c: zuko.flows.MAF(2, c, transforms=1, hidden_features=[8]),
    "zuko NSF": lambda c: zuko.flows.NSF(2, c, transforms=1, hidden_features=[8]),
    "zuko NICE": lambda c: zuko.flows.NICE(2, c, transforms=2, hidden_features=[8]),
}
for _name, _make in ZUKO.items():
    way(FLOWS, name=f"{_name}, conditional guide")(lambda make=_make: plane_pair(lambda: zuko_guide(make(2))))
    way(FLOWS, name=f"{_name}, guide without context")(
        lambda make=_make: plane_pair(lambda: zuko_guide(make(0), context=False))
    )


def flow_prior(make_prior, wrap):
    """A prior of which only the density is known: log p on a grid of the plane."""
    prior = make_prior()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.mul_(0.5)

    def model(x):
        pyro.module("prior", prior)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", wrap(prior))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 1.1).to_event(1))

    @torch.no_grad()
    def exact(x):
        line = torch.linspace(-7, 7, 401)
        z = torch.cartesian_prod(line, line)
        log_joint = wrap(prior).log_prob(z)[:, None] + dist.Normal(z[:, None], 1.0).to_event(1).log_prob(x)
        return log_joint.logsumexp(0) + 2 * math.log(14 / 400)

    return plane_pair(lambda: guide, model, exact)


for _name, _make in ZUKO.items():
    way(FLOWS, name=f"{_name}, prior")(lambda make=_make: flow_prior(partial(make, 0), lambda flow: ZukoToPyro(flow())))


class _Coupling(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.flow = T.affine_coupling(2, hidden_dims=[8])


@way(FLOWS)
def affine_coupling_prior():
    standard = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    return flow_prior(_Coupling, lambda module: dist.TransformedDistribution(standard, [module.flow]))
