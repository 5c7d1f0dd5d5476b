"""What is written: checkpoints, ArviZ files, figures."""

import io
import math
import pickle

import matplotlib.pyplot as plt
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import within
from shared.runs import binary

import pyrovae as pv


def make(hidden=8):
    model = pv.GenerativeModel(
        pv.priors.StandardNormal(2), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [hidden], 12), (1, 4, 3))
    )
    return model, pv.guides.MeanFieldNormal(pv.nets.MLP(12, [hidden]), 2)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_checkpoint_holds_what_was_given(tmp_path):
    model, guide = make()
    pv.save(
        tmp_path / "new" / "a.pt", model, guide, epoch=3, rate=np.float64(0.1), names=("x", None), tensor=torch.ones(2)
    )
    content = pv.load(tmp_path / "new" / "a.pt")
    assert content["epoch"] == 3
    assert content["rate"] == 0.1
    assert content["names"] == ["x", None]
    assert content["model"].state_dict().keys() == model.state_dict().keys()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.pt"], "no temporary file is left"
    with pytest.raises(TypeError, match=r"extra\['thing'\] is a object"):
        pv.save(tmp_path / "b.pt", model, guide, thing=object())
    assert not (tmp_path / "b.pt").exists()


def test_checkpoint_that_does_not_fit_changes_nothing(tmp_path):
    pv.save(tmp_path / "a.pt", *make())
    model, guide = make(hidden=9)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"does not fit the model: 'likelihood.decoder_net.layers.1.bias'"):
        pv.load(tmp_path / "a.pt", model, guide)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_checkpoint_from_elsewhere(tmp_path):
    ran = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return (open, (str(ran), "w"))

    path = tmp_path / "bomb.pt"
    with path.open("wb") as file:
        pickle.dump({"format": 1, "model": Bomb()}, file)
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        pv.load(path)
    torch.save({"format": 1, "model": Bomb()}, path)
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        pv.load(path)
    assert not ran.exists()
    path.write_text("# Not a checkpoint")
    match = (
        "damaged or no checkpoint of pyrovae: name the file checkpoint.pt of a run, or a file written by pyrovae.save$"
    )
    with pytest.raises(ValueError, match=match):
        pv.load(path)
    torch.save({"weights": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=r"no checkpoint of pyrovae"):
        pv.load(path)
    torch.save({"format": 99}, path)
    with pytest.raises(ValueError, match="format 99"):
        pv.load(path)
    pv.save(path, *make())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        pv.load(path)
    with pytest.raises(FileNotFoundError):
        pv.load(tmp_path / "nothing.pt")


# --- ArviZ ------------------------------------------------------------------------------------------------------------


def groups_of(data):
    return {name.strip("/") for name in (data.groups() if callable(data.groups) else data.groups)} - {""}


@pytest.mark.filterwarnings("ignore::matplotlib.MatplotlibDeprecationWarning")  # ArviZ 0.23's own figures
def test_inference_data_round_trip(tmp_path):
    from pyrovae.common.reporting import import_arviz

    arviz = import_arviz()
    model, guide = make()
    x = model.generate(30)
    lml = pv.log_marginal_likelihood(model, guide, x, num_particles=200)
    data = lml.to_inference_data(model=model, guide=guide, args=(x[:7],), num_draws=50)
    drawn = {"posterior", "posterior_resampled", "posterior_predictive", "log_likelihood", "prior", "prior_predictive"}
    assert groups_of(data) == drawn | {"observed_data", "sample_stats"}
    small = lml.to_inference_data(model=model, guide=guide, args=(x[:7],), num_draws=5, predictive=False)
    assert groups_of(small) == {"posterior", "posterior_resampled", "observed_data", "sample_stats"}
    assert data.posterior_predictive["x"].shape == (1, 50, 7, 1, 4, 3)
    assert data.log_likelihood["x"].dims == ("chain", "draw", "drawn_datum")
    assert data.prior["z"].dims == data.posterior["z"].dims == data.posterior_resampled["z"].dims
    assert data.posterior["z"].shape == (1, 50, 7, 2)
    assert data.posterior["z"].dims == ("chain", "draw", "drawn_datum", "z_dim_0")
    assert data.observed_data["x"].shape == (7, 1, 4, 3)
    assert data.sample_stats["log_weight"].dims == ("chain", "draw", "drawn_datum")
    assert data.sample_stats["bound"].dims == ("num_particles", "datum")
    data.to_netcdf(str(tmp_path / "e.nc"))
    if "InferenceData" in vars(arviz):
        again = arviz.from_netcdf(str(tmp_path / "e.nc"))
    else:
        import xarray

        again = xarray.open_datatree(tmp_path / "e.nc").load()
    assert np.allclose(again.sample_stats["log_prob"].values, lml.log_prob.numpy())
    assert np.allclose(again.sample_stats["pareto_k"].values, lml.pareto_k.numpy())
    assert again.sample_stats.attrs["num_particles"] == 200
    # The draws are of the same pair: their mean log weight is the ELBO (untrained weights are too wild for more).
    drawn = again.sample_stats["log_weight"].values[0]
    stderr = drawn.std(0) / 50**0.5 + lml.elbo_stderr[:7].numpy()
    assert (np.abs(drawn.mean(0) - lml.elbo[:7].numpy()) < 5 * stderr).all()
    assert len(arviz.summary(again, var_names=["z"], kind="stats")) == 14
    arviz.plot_khat(pv.to_elpd_data(lml))
    if "InferenceData" in vars(arviz):  # 1.x names its figures otherwise
        arviz.plot_posterior(again, var_names=["z"], coords={"drawn_datum": [0]})
    else:
        arviz.plot_dist(again, var_names=["z"], coords={"drawn_datum": [0]})
    plt.close("all")


def test_draws_in_the_export_are_of_the_densities_they_are_named_for(double):
    """z ~ N(0, 1), x | z ~ N(z, 1/2), q = N(0.3, 1.2): the posterior is N(4/5 x, 1/5)."""

    def model(x):
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(0.3, 1.2).expand([len(x)]))

    x, size = torch.tensor([1.0, -0.5]), 1000
    lml = pv.log_marginal_likelihood(model, guide, x, num_particles=200)
    data = lml.to_inference_data(model=model, guide=guide, args=(x,), num_draws=size)
    draws = {
        (group, name): torch.as_tensor(getattr(data, group)[name].values[0])
        for group, name in (
            *(("posterior", "z"), ("posterior_resampled", "z"), ("posterior_predictive", "x")),
            *(("log_likelihood", "x"), ("prior", "z"), ("prior_predictive", "x")),
        )
    }
    z = draws["posterior", "z"]
    assert torch.allclose(draws["log_likelihood", "x"], dist.Normal(z, 0.5).log_prob(x))
    resampled = draws["posterior_resampled", "z"]
    assert torch.isin(resampled[:, 0], z[:, 0]).all()
    assert torch.isin(resampled[:, 1], z[:, 1]).all()
    weights = torch.as_tensor(data.sample_stats["log_weight"].values[0]).softmax(0)
    # Resampling adds noise of its own to that of the weighted draws.
    stderr = (0.2 * (1 / size + weights.square().sum(0) * 2)).sqrt()
    for column in (0, 1):
        within(resampled[:, column].mean().item(), 0.8 * x[column].item(), stderr[column].item())
    for (group, name), mean, variance in (
        (("posterior_predictive", "x"), 0.3, 1.2**2 + 0.25),
        (("prior", "z"), 0.0, 1.0),
        (("prior_predictive", "x"), 0.0, 1.25),
    ):
        found = draws[group, name].flatten()
        within(found.mean().item(), mean, (variance / found.numel()) ** 0.5)
        within(found.var().item(), variance, variance * (2 / found.numel()) ** 0.5)


def test_inference_data_of_the_result_alone_and_of_one_datum(double):
    def model(x):
        theta = pyro.sample("theta", dist.Beta(2.0, 2.0))
        with pyro.plate("flips", len(x)):
            pyro.sample("x", dist.Bernoulli(theta), obs=x)

    def guide(x):
        pyro.sample("theta", dist.Beta(3.0, 3.0))

    x = torch.tensor([1.0, 0.0, 1.0])
    lml = pv.log_marginal_likelihood(model, guide, x, num_particles=50)
    assert groups_of(pv.to_inference_data(lml)) == {"sample_stats"}
    data = pv.to_inference_data(lml, model=model, guide=guide, args=(x,), num_draws=20)
    assert data.posterior["theta"].dims == ("chain", "draw")
    with pytest.raises(ValueError, match="both the model and the guide"):
        pv.to_inference_data(lml, model=model)


# --- results and figures ----------------------------------------------------------------------------------------------


def test_result_over_data():
    model, guide = make()
    lml = pv.log_marginal_likelihood(model, guide, model.generate(64), num_particles=40)
    assert lml.mean == pytest.approx(lml.log_prob.mean().item())
    assert lml.mean_stderr == pytest.approx(lml.log_prob.std().item() / 8)
    assert lml.mean_mc_stderr == pytest.approx(math.sqrt((lml.stderr**2).sum()) / 64)
    assert lml.bias_estimate == pytest.approx((lml.jackknife - lml.log_prob).mean().item())
    assert torch.equal(lml[:5].log_prob, lml.log_prob[:5])
    assert lml[lml.pareto_k > 0].curve.shape[0] == len(lml.curve_particles)
    for word in ("64 data", "40 particles", "ELBO", "gap", "ESS", "Pareto k"):
        assert word in lml.summary()
    assert "64 data" in repr(lml)
    assert pv.active_units(guide, model.generate(64)).shape == (2,)
    with pytest.raises(ValueError, match="2 data or more"):
        pv.active_units(guide, model.generate(1))


def test_summary_warns_of_heavy_tails():
    log_weights = -1.5 * torch.rand(1000, 3, dtype=torch.float64).log()
    lml = pv.LogMarginalLikelihood.from_log_weights(log_weights)
    assert "3 of 3 data have k > 0.67" in lml.summary()
    assert "annealed importance sampling" in lml.summary()
    assert lml.share_of_bad_k() == 1.0


def test_results_of_one_kind_make_one_result():
    weights = torch.randn(50, 6)
    whole = pv.LogMarginalLikelihood.from_log_weights(weights)
    parts = [pv.LogMarginalLikelihood.from_log_weights(part) for part in weights.split([2, 4], 1)]
    joined = pv.LogMarginalLikelihood.concatenate(parts)
    for name in (*whole.per_datum(), "curve"):
        assert torch.equal(getattr(joined, name).nan_to_num(), getattr(whole, name).nan_to_num()), name
    with pytest.raises(ValueError, match="one method and one number of particles"):
        pv.LogMarginalLikelihood.concatenate([whole, pv.LogMarginalLikelihood.from_log_weights(weights[:20])])


def test_summary_with_one_particle_says_what_is_unknown():
    lml = pv.LogMarginalLikelihood.from_log_weights(torch.randn(1, 20))
    for text in (lml.summary(), repr(lml)):
        assert "unknown" in text
        assert "nan" not in text
        assert "0.000" not in text
    assert "1 particle;" in lml.summary()
    annealed = pv.LogMarginalLikelihood.from_annealed(torch.randn(1, 20), torch.full((20,), 0.6))
    assert "unknown with one chain" in annealed.summary()
    assert "nan" not in annealed.summary()


def test_summary_gives_the_corrected_estimates_and_the_limit_of_k():
    lml = pv.LogMarginalLikelihood.from_log_weights(2 * torch.randn(300, 20))
    text = lml.summary()
    for number in (lml.jackknife.mean(), lml.jackknife_2.mean(), lml.smoothed.mean()):
        assert f"{number:.3f}" in text
    assert "not bounds" in text
    assert f"the limit is {1 - 1 / math.log10(300):.2f}" in text


def test_figures_take_arrays_and_axes():
    images = torch.rand(10, 1, 8, 8)
    _, given = plt.subplots()
    assert pv.plots.image_grid(images, ax=given) is given
    assert pv.plots.image_grid(torch.rand(3, 3, 8, 8), title="rgb") is not None
    assert pv.plots.reconstructions(images, images, columns=5) is not None
    assert pv.plots.manifold(torch.rand(3, 4, 1, 8, 8), extent=(-2, 2, -2, 2)) is not None
    row = {"elbo": -3.0, "reconstruction": -2.0, "kl": 1.0}
    history = [{"epoch": epoch, **row, **{f"validation_{k}": v for k, v in row.items()}} for epoch in range(12)]
    assert len(pv.plots.training(history)) == 3
    lml = pv.LogMarginalLikelihood.from_log_weights(torch.randn(100, 20))
    assert len(pv.plots.tightness(lml.elbo, lml.log_prob, lml.curve_particles, lml.curve)) == 2
    one = lml[:1]
    assert len(pv.plots.tightness(one.elbo, one.log_prob, one.curve_particles, one.curve)) == 2
    with pytest.raises(ValueError, match="found shape"):
        pv.plots.image_grid(torch.rand(8, 8))
    with pytest.raises(ValueError, match="differ in shape"):
        pv.plots.reconstructions(images, images[:2])


@pytest.mark.parametrize("call", ["save", "load", "fit"])
@pytest.mark.parametrize(
    ("path", "error", "match"),
    [
        ("", ValueError, "must name a file, found an empty one"),
        (io.BytesIO(), TypeError, "must be a string or pathlib.Path, found BytesIO"),
        (3, TypeError, "must be a string or pathlib.Path, found int"),
    ],
)
def test_what_is_no_path(call, path, error, match):
    calls = {
        "save": lambda: pv.save(path, *make()),
        "load": lambda: pv.load(path),
        "fit": lambda: pv.fit(*make(), binary(), epochs=1, checkpoint=path, progress=False),
    }
    with pytest.raises(error, match=match):
        calls[call]()
    with pytest.raises(TypeError, match="found NoneType"):
        pv.save(None, *make())


def test_the_home_folder(tmp_path, monkeypatch):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    pv.save("~/a.pt", *make(), note=1)
    assert pv.load("~/a.pt")["note"] == pv.load(home / "a.pt")["note"] == 1
    options = {"epochs": 1, "checkpoint": "~/runs/b.pt", "progress": False}
    pv.fit(*make(), binary(), **options)
    pv.fit(*make(), binary(), **options, resume=True)
    assert (home / "runs/b.pt").exists()
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(2), 2),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        ({np.int32(1): [np.uint8(3)]}, {1: [3]}),
    ],
)
def test_numbers_of_numpy(value, expected, tmp_path):
    pv.save(tmp_path / "a.pt", *make(), value=value)
    found = pv.load(tmp_path / "a.pt")["value"]
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("lost", ["deleted", "moved", "link"])
def test_a_run_whose_file_is_lost(lost, tmp_path):
    """Only the file before it is left: to begin anew in silence would lose what it holds."""
    path, target = tmp_path / "run.pt", tmp_path / "elsewhere.pt"
    if lost == "link":
        path.symlink_to(target)
    options = {"checkpoint": path, "epochs": 3, "checkpoint_every": 0, "progress": False}
    pv.fit(*make(), binary(), **options)
    file = target if lost == "link" else path
    before = file.with_name(f"{file.name}.previous")
    file.rename(tmp_path / "aside.pt") if lost == "moved" else file.unlink()
    with pytest.raises(ValueError, match=rf"run\.pt is missing, but .*{before.name}, exists: move that to") as caught:
        pv.fit(*make(), binary(), **options, resume=True)
    assert str(before) in str(caught.value)
    before.rename(file)
    assert len(pv.fit(*make(), binary(), **options, resume=True).history) == 3
