"""Pyro's own examples, rewritten from their idea in a few lines: `fit` trains them and evaluation takes them as they are.

A variational autoencoder, a conditional one, a semi-supervised one and a deep Markov model, each written as Pyro's
example writes it: programs that are methods of one module, networks declared by `pyro.module`, keyword arguments that
may be missing, a loader with labelled and unlabelled batches, masks inside events.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import nn
from torch.nn.functional import binary_cross_entropy, one_hot, softplus
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader

import pyrovae as pv

LATENT_DIM = 2
FIT = {"batch_size": 50, "learning_rate": 5e-3, "device": "cpu", "progress": False}


@pytest.fixture(scope="module")
def digits():
    """Binary 8x8 images of three classes, flat, and their labels."""
    data = pv.data.digits(binarization="static")
    known = data.train_labels < 3
    return data.train[known].flatten(1), data.train_labels[known]


class Normals(nn.Module):
    """Numbers -> the mean and the standard deviation of normals."""

    def __init__(self, num_inputs, num_outputs):
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(num_inputs, 32), nn.Softplus())
        self.loc, self.raw_scale = nn.Linear(32, num_outputs), nn.Linear(32, num_outputs)

    def forward(self, *inputs):
        hidden = self.hidden(joined(*inputs))
        return self.loc(hidden), 1e-3 + softplus(self.raw_scale(hidden))


def pixels_of(num_inputs):
    return nn.Sequential(nn.Linear(num_inputs, 32), nn.Softplus(), nn.Linear(32, 64), nn.Sigmoid())


def joined(*inputs):
    """Concatenate, broadcasting leading dimensions: those of particles and of enumeration."""
    leading = torch.broadcast_shapes(*(each.shape[:-1] for each in inputs))
    return torch.cat([each.expand(*leading, each.shape[-1]) for each in inputs], -1)


def check_training(model, guide, data, *args, rise, **options):
    """Train, and require that the ELBO rose: from epoch to epoch, and of the data `args` from before to after.

    Returns:
        The evaluation of these data after training.
    """
    before = pv.log_marginal_likelihood(model, guide, *args, num_particles=30)
    fitted = pv.fit(model, options.pop("trained_guide", guide), data, **(FIT | options))
    after = pv.log_marginal_likelihood(model, guide, *args, num_particles=200)
    elbo = [row["elbo"] for row in fitted.history]
    assert elbo[-1] > elbo[0] + rise
    assert after.elbo.mean() > before.elbo.mean() + rise
    assert len(after) == len(args[0])
    assert after.log_prob.isfinite().all()
    assert (after.log_prob >= after.elbo).all()
    return after


# --- the variational autoencoder ------------------------------------------------------------------------------------


class VAE(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = Normals(64, LATENT_DIM), pixels_of(LATENT_DIM)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z_loc = torch.zeros(x.shape[0], LATENT_DIM)
            z = pyro.sample("latent", dist.Normal(z_loc, torch.ones_like(z_loc)).to_event(1))
            loc_img = self.decoder(z)
            pyro.sample("obs", dist.Bernoulli(loc_img, validate_args=False).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            z_loc, z_scale = self.encoder(x)
            pyro.sample("latent", dist.Normal(z_loc, z_scale).to_event(1))


def test_the_variational_autoencoder(digits):
    vae = VAE()
    x, _ = digits
    check_training(vae.model, vae.guide, x, x[:50], epochs=10, rise=5)


# --- the conditional one: the hidden half of an image from the half that is seen ----------------------------------------


class CVAE(nn.Module):
    """Pixels of xs that are -1 are to be predicted; ys is the whole image."""

    def __init__(self, baseline):
        super().__init__()
        self.baseline = baseline  # trained before
        self.prior, self.recognition = Normals(128, LATENT_DIM), Normals(128, LATENT_DIM)
        self.generation = pixels_of(LATENT_DIM + 64)

    def model(self, xs, ys=None):
        pyro.module("generation_net", self)
        with pyro.plate("data", len(xs)):
            with torch.no_grad():
                y_hat = self.baseline(xs)
            zs = pyro.sample("z", dist.Normal(*self.prior(xs, y_hat)).to_event(1))
            loc = self.generation(joined(zs, y_hat))
            if ys is not None:
                pyro.sample("y", dist.Bernoulli(loc).mask(xs == -1).to_event(1), obs=ys)
            return loc

    def guide(self, xs, ys=None):
        with pyro.plate("data", len(xs)):
            q = self.prior(xs, self.baseline(xs)) if ys is None else self.recognition(xs, ys)
            pyro.sample("z", dist.Normal(*q).to_event(1))


def test_the_conditional_variational_autoencoder(digits):
    ys, _ = digits
    xs = ys.clone()
    xs[:, 32:] = -1  # the lower half
    baseline = nn.Sequential(nn.Linear(64, 32), nn.Softplus(), nn.Linear(32, 64), nn.Sigmoid())
    optimizer = torch.optim.Adam(baseline.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        binary_cross_entropy(baseline(xs)[:, 32:], ys[:, 32:]).backward()
        optimizer.step()
    cvae = CVAE(baseline)
    after = check_training(cvae.model, cvae.guide, (xs, ys), xs[:50], ys[:50], epochs=10, rise=3)

    assert after.mean > 32 * math.log(0.5)  # of the 32 pixels that are hidden
    assert cvae.model(xs[:5]).shape == (5, 64)  # a prediction needs no ys

    def guide(xs, ys):
        """Propose from the prior, whatever ys is."""
        cvae.guide(xs)

    # The half that is seen is no part of log p(y|x).
    weights = []
    for images in (ys[:5], torch.where(xs[:5] == -1, ys[:5], 1 - ys[:5])):
        pyro.set_rng_seed(1)
        weights.append(pv.log_weights(cvae.model, guide, xs[:5], images, num_particles=10))
    assert torch.equal(*weights)


# --- the semi-supervised one: labels of some data ------------------------------------------------------------------------


class SSVAE(nn.Module):
    """p(y) p(z) p(x | y, z), and q(y|x) q(z | x, y); a label that is known is observed.

    Labelled data also train q(y|x), by a term of the model (Kingma 2014, equation 9); Pyro's example does this in a
    second loss.
    """

    def __init__(self, num_labelled_weight=20.0):
        super().__init__()
        self.encoder_y = nn.Sequential(nn.Linear(64, 32), nn.Softplus(), nn.Linear(32, 3), nn.Softmax(-1))
        self.encoder_z, self.decoder = Normals(67, LATENT_DIM), pixels_of(LATENT_DIM + 3)
        self.weight = num_labelled_weight

    def model(self, xs, ys=None):
        pyro.module("ss_vae", self)
        with pyro.plate("data", len(xs)):
            zs = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1))
            ys_given = None if ys is None else one_hot(ys, 3).to(xs.dtype)
            labels = pyro.sample("y", dist.OneHotCategorical(torch.ones(3) / 3), obs=ys_given)
            pyro.sample("x", dist.Bernoulli(self.decoder(joined(zs, labels))).to_event(1), obs=xs)
            if ys is not None:
                pyro.factor("classify", self.weight * self.log_prob_of_label(xs, labels))

    def guide(self, xs, ys=None):
        with pyro.plate("data", len(xs)):
            if ys is None:
                labels = pyro.sample("y", dist.OneHotCategorical(self.encoder_y(xs)))
            else:
                labels = one_hot(ys, 3).to(xs.dtype)
            pyro.sample("z", dist.Normal(*self.encoder_z(xs, labels)).to_event(1))

    def log_prob_of_label(self, xs, labels):
        return dist.OneHotCategorical(self.encoder_y(xs)).log_prob(labels)

    @torch.no_grad()
    def log_prob_by_quadrature(self, xs):
        """log p(x, y) for each label, (N, 3): a sum over a grid of z."""
        edge = torch.arange(-6, 6, 0.05)
        zs = torch.cartesian_prod(edge, edge)
        log_area = dist.Normal(0.0, 1.0).log_prob(zs).sum(-1) + 2 * math.log(0.05)
        columns = []
        for label in torch.eye(3):
            logits = self.decoder(joined(zs, label)).logit()
            log_x = xs @ logits.T - softplus(logits).sum(-1)
            columns.append((log_x + log_area).logsumexp(-1) - math.log(3))
        return torch.stack(columns, -1)


class Turns:
    """Batches of labelled and of unlabelled positions in turn; every datum once an epoch."""

    def __init__(self, num_labelled, num_data, batch_size=50):
        self.num_labelled, self.num_data, self.batch_size = num_labelled, num_data, batch_size

    def __iter__(self):
        labelled = torch.randperm(self.num_labelled)
        unlabelled = self.num_labelled + torch.randperm(self.num_data - self.num_labelled)
        without = [part.tolist() for part in unlabelled.split(self.batch_size)]
        for batch, labels in zip(without, labelled.tensor_split(len(without)), strict=True):
            yield labels.tolist()
            yield batch

    def __len__(self):
        return 2 * -(-(self.num_data - self.num_labelled) // self.batch_size)


@pytest.mark.parametrize("how", ["enumerated", "sampled"])
def test_the_semi_supervised_variational_autoencoder(digits, how):
    """A batch is [xs, ys] or [xs], and the programs are called with these."""
    x, y = digits
    num_labelled = 70
    data = [*zip(x[:num_labelled], y[:num_labelled], strict=True), *((one,) for one in x[num_labelled:])]
    loader = DataLoader(data, batch_sampler=Turns(num_labelled, len(data)))
    ss_vae = SSVAE()
    options = {"loss": Trace_ELBO(num_particles=5, vectorize_particles=True)}  # averages out the noise of drawn labels
    if how == "enumerated":
        options = {"loss": TraceEnum_ELBO(max_plate_nesting=1, strict_enumeration_warning=False)}
        options |= {"trained_guide": config_enumerate(ss_vae.guide, "parallel", expand=True)}
    test = x[-50:]
    check_training(ss_vae.model, ss_vae.guide, loader, test, batch_size=None, epochs=15, rise=5, **options)
    right = ss_vae.encoder_y(test).argmax(-1) == y[-50:]
    assert right.float().mean() > 0.8

    check_evidence(ss_vae, (test,), torch.zeros(50, dtype=torch.bool))
    check_evidence(ss_vae, (test, y[-50:]), torch.ones(50, dtype=torch.bool))


def check_evidence(ss_vae, args, is_labelled):
    """log p(x), or log p(x, y) with the term that trains q(y|x), against quadrature over z and a sum over labels."""
    truth = ss_vae.log_prob_by_quadrature(args[0])
    if is_labelled.any():
        term = ss_vae.weight * ss_vae.log_prob_of_label(args[0], one_hot(args[1], 3).float()).detach()
        known = truth[torch.arange(len(truth)), args[1]] + term
        truth = torch.where(is_labelled, known, truth.logsumexp(-1))
    else:
        truth = truth.logsumexp(-1)
    lml = pv.log_marginal_likelihood(ss_vae.model, ss_vae.guide, *args, num_particles=4000)
    can_be_trusted = (lml.pareto_k < 0.7).nonzero().flatten().tolist()
    assert len(can_be_trusted) > 25
    for n in can_be_trusted:
        within(lml.log_prob[n].item(), truth[n].item(), lml.stderr[n].item() + 1e-4)  # of float32


class PartlyLabelled(SSVAE):
    """Labelled and unlabelled data in one batch, by Pyro's `obs_mask`."""

    def model(self, xs, ys, is_labelled):
        pyro.module("ss_vae", self)
        given = one_hot(ys, 3).to(xs.dtype)
        with pyro.plate("data", len(xs)):
            zs = pyro.sample("z", dist.Normal(torch.zeros(LATENT_DIM), 1.0).to_event(1))
            labels = pyro.sample("y", dist.OneHotCategorical(torch.ones(3) / 3), obs=given, obs_mask=is_labelled)
            pyro.sample("x", dist.Bernoulli(self.decoder(joined(zs, labels))).to_event(1), obs=xs)
            pyro.factor("classify", self.weight * is_labelled * self.log_prob_of_label(xs, given))

    def guide(self, xs, ys, is_labelled):
        with pyro.plate("data", len(xs)):
            drawn = dist.OneHotCategorical(self.encoder_y(xs)).mask(~is_labelled)
            labels = pyro.sample("y_unobserved", drawn)
            labels = torch.where(is_labelled.unsqueeze(-1), one_hot(ys, 3).to(xs.dtype), labels)
            pyro.sample("z", dist.Normal(*self.encoder_z(xs, labels)).to_event(1))


def test_labels_of_some_data_of_a_batch(digits):
    """A label that is unknown may hold any number."""
    x, y = digits
    is_labelled = torch.arange(len(x)) % 5 == 0
    ss_vae = PartlyLabelled()
    data = (x, torch.where(is_labelled, y, 0), is_labelled)
    few = [tensor[-50:] for tensor in data]
    loss = Trace_ELBO(num_particles=5, vectorize_particles=True)
    check_training(ss_vae.model, ss_vae.guide, data, *few, epochs=15, rise=5, loss=loss)
    check_evidence(ss_vae, few, few[2])


# --- the deep Markov model: an image is a sequence of its rows, of which the last may be missing ---------------------------


class DMM(nn.Module):
    """As in Pyro: each step has its plate, its mask and its observed site, and the guide's network reads packed rows."""

    def __init__(self):
        super().__init__()
        self.transition, self.emitter = Normals(LATENT_DIM, LATENT_DIM), nn.Linear(LATENT_DIM, 8)
        self.rnn = nn.RNN(8, 16, nonlinearity="relu", batch_first=True)
        self.combiner = Normals(LATENT_DIM + 16, LATENT_DIM)
        self.z_0, self.z_q_0 = nn.Parameter(torch.zeros(LATENT_DIM)), nn.Parameter(torch.zeros(LATENT_DIM))

    def model(self, rows, mask):
        pyro.module("dmm", self)
        z = self.z_0
        with pyro.plate("z_minibatch", len(rows)):
            for t in pyro.markov(range(rows.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Normal(*self.transition(z)).mask(mask[:, t : t + 1]).to_event(1))
                emitted = dist.Bernoulli(logits=self.emitter(z)).mask(mask[:, t : t + 1])
                pyro.sample(f"obs_x_{t}", emitted.to_event(1), obs=rows[:, t])

    def guide(self, rows, mask):
        pyro.module("dmm", self)
        hidden = self.read_backwards(rows, mask.sum(1))
        z = self.z_q_0
        with pyro.plate("z_minibatch", len(rows)):
            for t in pyro.markov(range(rows.shape[1])):
                q = dist.Normal(*self.combiner(z, hidden[:, t]))
                z = pyro.sample(f"z_{t}", q.mask(mask[:, t : t + 1]).to_event(1))

    def read_backwards(self, rows, lengths):
        def reverse(sequences):
            turned = torch.zeros_like(sequences)
            for n, length in enumerate(lengths.tolist()):
                turned[n, :length] = sequences[n, :length].flip(0)
            return turned

        packed = pack_padded_sequence(reverse(rows), lengths.cpu(), batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=rows.shape[1])
        return reverse(hidden)


def test_the_deep_markov_model(digits):
    """The data are a mapping, whose names are those of the programs' arguments."""
    rows = digits[0].reshape(-1, 8, 8)
    mask = torch.arange(8) < torch.randint(4, 9, (len(rows), 1))
    dmm = DMM()
    few = (rows[:50], mask[:50])
    check_training(dmm.model, dmm.guide, {"rows": rows, "mask": mask}, *few, epochs=10, rise=2)

    # The rows that are missing have no influence.
    other = torch.where(mask[:50].unsqueeze(-1), rows[:50], 1 - rows[:50])
    weights = []
    for values in (rows[:50], other):
        pyro.set_rng_seed(1)
        weights.append(pv.log_weights(dmm.model, dmm.guide, values, mask[:50], num_particles=10))
    assert torch.equal(*weights)
