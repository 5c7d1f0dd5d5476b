"""Train a deep Markov model of sequences of different lengths, and estimate log p of each sequence.

    python examples/deep_markov.py

The model and the structured guide (Krishnan 2017) are two Pyro programs over padded sequences x (N, T, D) with lengths:

    p(x, z) = prod_t p(z_t | z_{t-1}) p(x_t | z_t),      q(z | x) = prod_t q(z_t | z_{t-1}, x_t ... x_T)

Both mask the steps after the end of a sequence, so padding has no influence. The data are scikit-learn's digits, read
row by row and cut at random lengths; or spoken vowels, --dataset japanese-vowels (pip install pyrovae[series]).

References:
    Krishnan, Shalit & Sontag, Structured Inference Networks for Nonlinear State Space Models (2017).
"""

import argparse

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn
from torch.nn.functional import softplus

import pyrovae as pv


def steps_of(x, lengths):
    """Which steps are part of a sequence, (N, T)."""
    return torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(-1)


def reverse(x, lengths):
    """Reverse each sequence (N, T, D) within its length; the padding stays at the end."""
    step = torch.arange(x.shape[1], device=x.device)
    index = torch.where(steps_of(x, lengths), lengths.unsqueeze(-1) - 1 - step, step)
    return x.gather(1, index.unsqueeze(-1).expand_as(x))


class GatedTransition(nn.Module):
    """p(z_t | z_{t-1}): each dimension moves linearly as far as its gate is closed, by a network as far as it is open."""

    def __init__(self, latent_dim, hidden):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(latent_dim, hidden), nn.ReLU(), nn.Linear(hidden, latent_dim), nn.Sigmoid())
        self.proposal = nn.Sequential(nn.Linear(latent_dim, hidden), nn.ReLU(), nn.Linear(hidden, latent_dim))
        self.linear = nn.Linear(latent_dim, latent_dim)
        self.raw_scale = nn.Linear(latent_dim, latent_dim)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z):
        gate, proposal = self.gate(z), self.proposal(z)
        loc = (1 - gate) * self.linear(z) + gate * proposal
        return dist.Normal(loc, 1e-3 + softplus(self.raw_scale(proposal.relu()))).to_event(1)


class DeepMarkovModel(nn.Module):
    """The program p(x, z).

    All operations keep leading dimensions, so that z may be (num_particles, N, latent_dim).

    Args:
        transition: Module from z_{t-1} (..., latent_dim) to the distribution of z_t.
        likelihood: Module from z_t (..., latent_dim) to the distribution of x_t: any of `pyrovae.likelihoods`.
        latent_dim: Dimensions of z_t.
    """

    def __init__(self, transition, likelihood, latent_dim):
        super().__init__()
        self.transition, self.likelihood = transition, likelihood
        self.start = nn.Parameter(torch.zeros(latent_dim))  # z_0

    def forward(self, x, lengths):
        pyro.module("deep_markov_model", self)
        is_step = steps_of(x, lengths)
        with pyro.plate("data", len(x)):
            z, path = self.start, []
            for t in range(x.shape[1]):
                with poutine.mask(mask=is_step[:, t]):
                    z = pyro.sample(f"z_{t + 1}", self.transition(z))
                path.append(z)
            # The likelihood needs no loop: it decodes (..., N, T, latent_dim) at once.
            emitted = self.likelihood(torch.stack(path, -2))
            pyro.sample("x", emitted.mask(is_step).to_event(1), obs=x)


class StructuredGuide(nn.Module):
    """The program q(z | x): a recurrent network reads each sequence from its end, and z_t follows from it and z_{t-1}."""

    def __init__(self, data_dim, latent_dim, hidden):
        super().__init__()
        self.rnn = nn.GRU(data_dim, hidden, batch_first=True)
        self.from_latent = nn.Linear(latent_dim, hidden)
        self.loc, self.raw_scale = nn.Linear(hidden, latent_dim), nn.Linear(hidden, latent_dim)
        self.start = nn.Parameter(torch.zeros(latent_dim))

    def forward(self, x, lengths):
        pyro.module("structured_guide", self)
        is_step = steps_of(x, lengths)
        future = reverse(self.rnn(reverse(x, lengths))[0], lengths)  # step t has read x_t ... x_T
        with pyro.plate("data", len(x)):
            z = self.start
            for t in range(x.shape[1]):
                h = (self.from_latent(z).tanh() + future[:, t]) / 2
                with poutine.mask(mask=is_step[:, t]):
                    q = dist.Normal(self.loc(h), 1e-3 + softplus(self.raw_scale(h))).to_event(1)
                    z = pyro.sample(f"z_{t + 1}", q)


def rows_of_digits(seed):
    """Binary 8x8 digits from top to bottom, cut after 4 to 8 rows: (x, lengths) for training, validation and test."""
    data = pv.data.digits(binarization="static", data_seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for images in (data.train, data.validation, data.test):
        x, lengths = images.squeeze(1), torch.randint(4, 9, (len(images),), generator=generator)
        yield x * steps_of(x, lengths).unsqueeze(-1), lengths


def spoken_vowels(seed):
    """Cepstral coefficients of spoken vowels, 7 to 29 steps: (x, lengths) for training, validation and test."""
    data = pv.data.japanese_vowels()
    for series in (data.train, data.validation, data.test):
        yield series.values, series.lengths


def log_prob_of_independent_steps(train, test, is_binary):
    """log p of the test sequences if all elements of a step are independent and all steps alike: the score to beat."""
    steps = train[0][steps_of(*train)]
    each = dist.Bernoulli(steps.mean(0)) if is_binary else dist.Normal(steps.mean(0), steps.std(0))
    return (each.log_prob(test[0]).sum(-1) * steps_of(*test)).sum(-1)


def main() -> None:
    options = parse_options()
    pyro.set_rng_seed(options.seed)
    is_binary = options.dataset == "digits"
    try:
        train, validation, test = rows_of_digits(options.seed) if is_binary else spoken_vowels(options.seed)
    except ImportError as error:
        raise SystemExit(f"error: {error}") from None
    data_dim, latent_dim, hidden = train[0].shape[-1], options.latent_dim, options.hidden

    # Any likelihood of the library describes one step.
    decoder = nn.Sequential(nn.Linear(latent_dim, hidden), nn.ReLU(), nn.Linear(hidden, data_dim))
    mean = train[0][steps_of(*train)].mean(0)
    family = pv.likelihoods.Bernoulli if is_binary else pv.likelihoods.LearnedScaleNormal
    likelihood = family(decoder, (data_dim,), data_mean=mean)
    model = DeepMarkovModel(GatedTransition(latent_dim, hidden), likelihood, latent_dim)
    guide = StructuredGuide(data_dim, latent_dim, hidden)

    # What a batch is, the programs are called with: model(x, lengths).
    show = not options.quiet
    fitted = pv.fit(
        model,
        guide,
        train,
        validation=validation,
        epochs=options.epochs,
        batch_size=100,
        learning_rate=5e-3,
        schedule=None,
        clip_norm=10.0,
        progress=show,
    )

    # log p of each sequence by importance sampling; of a few also by annealing, which does not use the guide.
    lml = pv.log_marginal_likelihood(model, guide, *test, num_particles=options.num_particles, progress=show)
    few = tuple(tensor[: options.num_annealed] for tensor in test)
    annealed = pv.annealed_importance_sampling(
        model, *few, num_chains=8, num_temperatures=options.num_temperatures, progress=show
    )
    independent = log_prob_of_independent_steps(train, test, is_binary)
    print(report(fitted, lml, annealed, independent, test[1]))


def report(fitted, lml, annealed, independent, lengths) -> str:
    lines = [repr(fitted), "", lml.summary(), "", "test sequences by length; nats per step"]
    lines.append(f"  {'length':>6} {'number':>6} {'log p(x)':>9} {'ELBO':>9} {'independent steps':>18}")
    for length in [*lengths.unique().tolist(), None]:
        of_length = torch.ones_like(lengths, dtype=torch.bool) if length is None else lengths == length
        num_steps = lengths[of_length].sum()
        scores = [values[of_length].sum() / num_steps for values in (lml.log_prob, lml.elbo, independent)]
        name = "all" if length is None else length
        lines.append(f"  {name:>6} {of_length.sum():>6} {scores[0]:9.3f} {scores[1]:9.3f} {scores[2]:18.3f}")
    lines += ["", "the first sequences again, by annealing from the prior; nats per sequence"]
    lines.append(f"  {'length':>6} {'sampling':>17} {'annealing':>17} {'Pareto k':>9} {'acceptance':>11}")
    for n in range(len(annealed)):
        sampled, again = (f"{each.log_prob[n]:9.2f} ± {each.stderr[n]:.2f}" for each in (lml, annealed))
        lines.append(
            f"  {lengths[n]:>6} {sampled:>17} {again:>17} {lml.pareto_k[n]:9.2f} {annealed.acceptance[n]:11.2f}"
        )
    better = lml.log_prob - independent
    lines += ["", f"better than independent steps: {(better > 0).double().mean():.0%} of the test sequences"]
    return "\n".join(lines)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--dataset", choices=("digits", "japanese-vowels"), default="digits", help="default: digits")
    add("--latent-dim", type=int, default=8, help="dimensions of each z_t (default: 8)")
    add("--hidden", type=int, default=64, help="width of the networks (default: 64)")
    add("--epochs", type=int, default=100, help="passes over the training data (default: 100)")
    add("--num-particles", type=int, default=1000, help="particles of importance sampling (default: 1000)")
    add("--num-annealed", type=int, default=10, help="test sequences to anneal (default: 10)")
    add("--num-temperatures", type=int, default=200, help="temperatures of annealing (default: 200)")
    add("--seed", type=int, default=0, help="seed of everything random (default: 0)")
    add("--quiet", action="store_true", help="show no progress bars")
    return parser.parse_args()


if __name__ == "__main__":
    main()
