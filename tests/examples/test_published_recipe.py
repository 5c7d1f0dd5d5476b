"""The VampPrior paper's recipe: its optimizer, networks, densities and initial values, and its rows of the density table."""

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import within
from torch import nn

import pyrovae as pv

FOLDER = Path(__file__).parents[2] / "examples/reproductions"


@pytest.fixture
def recipe(monkeypatch):
    for folder in (FOLDER, FOLDER.parent):
        monkeypatch.syspath_prepend(folder)
    import published_recipe

    return published_recipe


@pytest.fixture
def data():
    return pv.data.digits()


def test_steps_of_the_optimizer(recipe, double):
    """Against the update written out: m and v of g / (|g| + 1e-7), both with bias corrections."""
    parameters = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(2))]
    optimizer = recipe.NormalisedAdam(parameters, lr=0.1, fused=True)
    expected = [p.detach().clone() for p in parameters]
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in expected]
    scales = (1.0, 1e6, 1e-7)  # the last is as small as what is added to the norm
    for step in range(1, 6):
        for place, (parameter, scale) in enumerate(zip(parameters, scales, strict=True)):
            gradient = scale * torch.randn_like(parameter)
            parameter.grad = gradient.clone()
            gradient = gradient / (gradient.square().sum().sqrt() + 1e-7)
            m, v = moments[place]
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            moments[place] = m, v
            change = (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
            expected[place] = expected[place] - 0.1 * change
        optimizer.step()
    for found, wanted in zip(parameters, expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-10, atol=1e-12)


def test_a_gradient_that_two_parameters_share_is_divided_once(recipe):
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(1))]
    gradient = torch.tensor([3.0, 0.0, 4.0])
    for parameter in parameters[:2]:
        parameter.grad = gradient
    recipe.NormalisedAdam(parameters, lr=0.1).step()
    for parameter in parameters[:2]:
        assert parameter.grad.tolist() == pytest.approx([0.6, 0.0, 0.8])
    assert parameters[2].grad is None
    assert parameters[2].item() == 0


def test_a_step_that_is_not_finite_can_be_skipped(recipe):
    """As mixed precision skips it, with `found_inf` beside the fused step."""
    parameter = nn.Parameter(torch.ones(3))
    optimizer = recipe.NormalisedAdam([parameter], lr=0.1, fused=True)
    parameter.grad = torch.tensor([1.0, math.nan, 1.0])
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert parameter.tolist() == [1, 1, 1]
    optimizer.found_inf = torch.zeros(())
    parameter.grad = torch.ones(3)
    optimizer.step()
    assert parameter.tolist() == pytest.approx([0.9] * 3, rel=1e-5)


def test_a_closure_is_run_with_gradients(recipe):
    parameter = nn.Parameter(torch.tensor([2.0]))
    loss = recipe.NormalisedAdam([parameter], lr=0.1).step(
        lambda: [square := parameter.square().sum(), square.backward()][0]
    )
    assert loss.item() == 4
    assert parameter.item() == pytest.approx(1.9)


ONE_LEVEL = [*2 * [(64, 300), (300, 300), (40, 300), (300, 300)], (300, 40), (300, 40), (300, 64)]
TWO_LEVELS = [
    *2 * [(64, 300), (300, 300), (64, 300), (40, 300), (600, 300)],  # q(z2|x) and q(z1|x, z2)
    *2 * [(40, 300), (300, 300), (40, 300), (40, 300), (600, 300)],  # p(z1|z2) and p(x|z1, z2)
    *6 * [(300, 40)],
    (300, 64),
]


@pytest.mark.parametrize(
    ("pair", "prior", "expected"),
    [
        ("published", "standard-normal", ONE_LEVEL),
        ("published", "published-vamp", ONE_LEVEL),
        ("published_hierarchy", "standard-normal", TWO_LEVELS),
    ],
)
def test_initial_weights_and_split_into_tensors(recipe, data, pair, prior, expected):
    model, guide = getattr(recipe, pair)(data, prior)
    layers = [part for part in itertools.chain(model.modules(), guide.modules()) if isinstance(part, nn.Linear)]
    layers = list(dict.fromkeys(layers))
    widths = sorted((layer.in_features, layer.out_features) for layer in layers)
    assert widths == sorted(expected)
    for layer in layers:
        squares = layer.weight.detach().square() * layer.in_features / 2
        within(squares.mean().item(), 1.0, (2 / squares.numel()) ** 0.5)
        assert layer.bias.abs().max() <= layer.in_features**-0.5
    tensors = {*model.parameters(), *guide.parameters()}
    assert len(tensors) == 2 * len(layers) + (prior == "published-vamp")  # pseudo-inputs, and nothing else


def test_log_variance_is_clamped(recipe, data):
    _, guide = recipe.published(data)
    with torch.no_grad():
        guide.heads.log_variance.bias[:2] = torch.tensor([100.0, -100.0])
    scale = guide.posterior(data.test[:3]).base_dist.scale
    assert scale[:, 0].tolist() == pytest.approx([math.exp(1)] * 3)
    assert scale[:, 1].tolist() == pytest.approx([math.exp(-3)] * 3)


def test_two_levels_see_what_the_paper_says(recipe, data):
    """z2 from x; z1 from x and z2 by layers of their own, joined; all log-variances clamped; the top may be a VampPrior."""
    model, guide = recipe.published_hierarchy(data, prior="published-vamp")
    below, x, z2 = guide.layers[0], data.test[:3], torch.randn(3, 40)
    joined = torch.cat([below.net.first(z2), guide.encoder_net(x)], -1)
    features = below.net.joint(joined)
    with torch.no_grad():
        below.heads.log_variance.bias[:2] = torch.tensor([100.0, -100.0])
    found = below(z2, guide.encoder_net(x))
    torch.testing.assert_close(found.mean, below.heads.mean(features))
    assert found.base_dist.scale[0, :2].tolist() == pytest.approx([math.exp(1), math.exp(-3)])
    joint = guide.posterior(x)
    z = torch.cat([torch.randn(3, 40), z2], -1)  # z1 first
    expected = guide.top.posterior(x).log_prob(z2) + found.log_prob(z[:, :40])
    torch.testing.assert_close(joint.log_prob(z), expected)
    decoder = model.likelihood.decoder_net[0]
    both = torch.cat([decoder.first(z[:, :40]), decoder.second(z2)], -1)
    torch.testing.assert_close(decoder(z), decoder.joint(both))
    assert model.prior.pseudo_inputs.shape == (500, 1, 8, 8)


def test_layer_is_gated(recipe):
    layer, x = recipe.GatedLayer(3, 2), torch.randn(5, 3)
    value, gate = (x @ part.weight.T + part.bias for part in (layer.value, layer.gate))
    torch.testing.assert_close(layer(x), value / (1 + (-gate).exp()))


def test_mass_of_the_likelihood(recipe):
    """It sums to one over all images, and no pixel's probability is nearer to 0 or 1 than 1e-5."""
    net = nn.Linear(2, 3).requires_grad_(False)
    net.weight.zero_()
    net.bias.copy_(torch.tensor([50.0, -50.0, 0.3]))
    likelihood = recipe.ClampedBernoulli(net, (3,))
    images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))
    mass = likelihood(torch.zeros(2)).log_prob(images).double().exp()
    assert mass.sum().item() == pytest.approx(1, abs=1e-6)
    ones = (images.double() * mass[:, None]).sum(0)
    assert (1 - ones[0]).item() == pytest.approx(1e-5, rel=1e-2)
    assert ones[1].item() == pytest.approx(1e-5, rel=1e-3)
    assert ones[2].item() == pytest.approx(1 / (1 + math.exp(-0.3)), rel=1e-5)
    with pytest.raises(ValueError, match="Bernoulli pixels are 0 or 1"):
        likelihood.check(torch.full((1, 3), 0.5))


def test_pseudo_inputs_start_near_black_and_are_clamped(recipe, data):
    model, guide = recipe.published(data, "published-vamp")
    start = model.prior.pseudo_inputs.detach()
    assert start.shape == (500, 1, 8, 8)
    within(start.mean().item(), 0.05, 0.01 / start.numel() ** 0.5)
    within(start.std().item(), 0.01, 0.01 / (2 * start.numel()) ** 0.5)
    with torch.no_grad():
        model.prior.unconstrained[0] = 2
        model.prior.unconstrained[1] = -2
    assert model.prior.pseudo_inputs[:2].unique().tolist() == [0, 1]
    z = torch.randn(4, 40)
    components = guide.posterior(model.prior.pseudo_inputs).expand((4, 500)).log_prob(z[:, None])
    torch.testing.assert_close(model.prior().log_prob(z), components.logsumexp(1) - math.log(500))


@pytest.fixture
def table(recipe, monkeypatch):
    import density_estimates
    import density_table

    monkeypatch.setattr(density_estimates, "NUM_CHAINS", 2)
    monkeypatch.setattr(density_estimates, "NUM_TEMPERATURES", 5)
    return density_table


@pytest.fixture
def run(table, monkeypatch, tmp_path):
    """The row at a small size: the result, from a folder."""

    def run(row, epochs, folder="runs", data_seed="0"):
        small = ("--dataset", "digits", "--epochs", str(epochs), "--particles", "30", "--images", "40", "--quiet")
        where = ("--ais-images", "0", "--runs", str(tmp_path / folder), "--results", str(tmp_path))
        monkeypatch.setattr(sys, "argv", ["density_table.py", row, *small, *where, "--data-seed", data_seed, "--table"])
        table.main()
        return json.loads((tmp_path / f"{row}.json").read_text())

    return run


@pytest.mark.parametrize("row", ["published-standard", "published-vamp"])
def test_a_row_states_its_draw_and_settings(run, table, monkeypatch, tmp_path, row):
    given = {}

    def spied(*programs, fit=pv.fit, **settings):
        given.update(settings)
        return fit(*programs, **settings)

    monkeypatch.setattr(pv, "fit", spied)
    result = run(row, 1)
    assert (result["draw"], result["data_seed"], result["test_images"], result["of_test_images"]) == (
        *("seed-777", None),
        *(40, 300),
    )
    assert (given["schedule"], given["batch_size"], given["patience"]) == (None, 100, 50)
    assert given["optimizer"].func.__name__ == "NormalisedAdam"
    assert given["optimizer"].keywords["lr"] == 5e-4
    assert (result["training"]["epochs"], result["training"]["best_epoch"]) == (1, 1)
    assert result["nll"] == pytest.approx(-result["elbo"] - result["gap"])
    drawn = pv.data.digits(binarization=None).binarized(draw="seed-777")
    assert torch.equal(given["validation"], drawn.validation)
    assert str(tmp_path) not in json.dumps(result)
    assert "(draw seed-777, digits, 40 images, 30 particles, 1 epochs)" in (tmp_path / "density.md").read_text()
    with pytest.raises(SystemExit, match="has its own seed"):
        run(row, 1, data_seed="1")
    full = table.ROWS[row]
    assert (full.epochs, full.kl_warmup, full.objective, full.particles) == (2000, 100, "elbo", 1)


def test_weight_of_the_kl_grows_over_100_epochs(run, monkeypatch):
    given = {}

    def spied(*programs, **settings):
        given.update(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(pv, "fit", spied)
    with pytest.raises(SystemExit, match="Stopped"):
        run("published-standard", 150)
    objective, weights = given["loss"], []
    for _ in range(1201):  # 12 batches of 100 of the 1,197 images
        weights.append(objective.kl_weight(torch.zeros(())).item())
        objective.advance()
    assert isinstance(objective, pv.objectives.MonteCarloKL)
    assert weights[0] == 0
    assert weights[600] == pytest.approx(0.5)
    assert weights[1199] < weights[1200] == 1


def test_a_stopped_row_goes_on(run, monkeypatch):
    """Stopped by Ctrl-C in training: the numbers of a run that was not."""
    from pyrovae.training.state import TrainingState

    whole = run("published-standard", 3)
    finish, calls = TrainingState.finish_epoch, iter(range(10))

    def stops(*args):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return finish(*args)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingState, "finish_epoch", stops)
        with pytest.raises(SystemExit, match="Stopped; the same command resumes published-standard"):
            run("published-standard", 3, "stopped")
    stopped = run("published-standard", 3, "stopped")
    for name in ("nll", "elbo", "training"):
        assert stopped[name] == whole[name], name


def test_a_finished_row_goes_on_with_more_epochs(run, table, recipe, monkeypatch):
    """As one long training: the rate is constant, and the warm-up does not depend on the number of epochs."""
    for row in ("published-standard", "short-mlp300"):
        monkeypatch.setitem(table.ROWS, row, replace(table.ROWS[row], kl_warmup=1))
    whole, first = run("published-standard", 4), run("published-standard", 2, "parts")
    assert first["training"]["best_epoch"] == 2
    further = run("published-standard", 4, "parts")
    assert further["training"]["best_epoch"] > 2
    for name in ("nll", "elbo", "training"):
        assert further[name] == whole[name] != first[name], name
    assert further["training"]["epochs"] == 4
    with pytest.raises(SystemExit, match="holds a run with"):
        run("published-standard", 3, "parts")
    run("short-mlp300", 2, "parts")
    with pytest.raises(SystemExit, match="holds a run with"):  # its cosine decay is over
        run("short-mlp300", 4, "parts")


def test_a_row_stops_without_a_better_bound(run, table, monkeypatch):
    monkeypatch.setitem(
        table.ROWS, "published-standard", replace(table.ROWS["published-standard"], patience=2, learning_rate=0.0)
    )
    training = run("published-standard", 9)["training"]
    assert (training["epochs"], training["most_epochs"], training["best_epoch"]) == (3, 9, 1)
