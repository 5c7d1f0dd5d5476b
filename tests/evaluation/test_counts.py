"""Whole numbers of NumPy are taken wherever a count is, and what is none is refused."""

import numpy as np
import pytest
import torch
from shared.runs import binary

import pyrovae as pv
from pyrovae.common.arguments import check_count

KINDS = [np.int64, np.int32, np.uint8]
NOT_WHOLE = [True, np.bool_(True), 2.0, np.float64(2), "2", None, torch.tensor(2), [2]]


def pair(whole=int):
    likelihood = pv.likelihoods.Bernoulli(pv.nets.MLP(whole(2), [whole(8)], whole(12)), (whole(1), whole(4), whole(3)))
    guide = pv.guides.MeanFieldNormal(pv.nets.MLP(whole(12), [whole(8)]), whole(2))
    return pv.GenerativeModel(pv.priors.StandardNormal(whole(2)), likelihood), guide


@pytest.mark.parametrize("whole", KINDS)
def test_the_number_itself_decides(whole):
    count = check_count("num_particles", whole(7))
    assert (count, type(count)) == (7, int)
    with pytest.raises(ValueError, match="num_particles must be 8 or more, found 7"):
        check_count("num_particles", whole(7), least=8)


@pytest.mark.parametrize("value", NOT_WHOLE, ids=repr)
def test_others_are_refused(value):
    with pytest.raises(TypeError, match="^num_particles must be a whole number, found "):
        check_count("num_particles", value)
    if value is not None:
        with pytest.raises(TypeError, match="^num_particles must be a whole number, found "):
            pv.log_weights(*pair(), binary(3), num_particles=value)


@pytest.mark.parametrize("whole", KINDS)
def test_every_run_takes_them(whole):
    model, guide = pair(whole)
    x = binary(40)
    options = {"epochs": whole(2), "batch_size": whole(20), "max_skipped_steps": whole(1), "progress": False}
    assert len(pv.fit(model, guide, x, **options, loss=pv.objectives.ImportanceWeighted(whole(3))).history) == 2
    found = pv.log_marginal_likelihood(
        model, guide, x, num_particles=whole(200), data_batch_size=whole(16), particle_batch_size=whole(50)
    )
    assert (found.num_particles, len(found)) == (200, 40)
    annealed = pv.annealed_importance_sampling(
        model, x[:4], num_chains=whole(3), num_temperatures=whole(5), data_batch_size=whole(2)
    )
    assert (annealed.num_particles, len(annealed)) == (3, 4)
    assert model.generate(whole(3)).shape == (3, 1, 4, 3)
    assert len(pv.simulation_based_calibration(model, guide, x, num_draws=whole(9)).ranks) == 40
    gaps = pv.inference_gaps(
        model, guide, x[:4], num_particles=whole(20), max_num_steps=whole(5), data_batch_size=whole(2)
    )
    assert len(gaps) == 4


@pytest.mark.parametrize("whole", KINDS)
def test_parts_are_made_again_from_their_files(whole, tmp_path):
    likelihood = pv.likelihoods.Normal(
        pv.nets.ConvDecoder(whole(2), (8, whole(8)), [whole(4)]), (8, 8), scale=np.float32(0.5)
    )
    encoder = pv.nets.ResidualEncoder((whole(8), whole(8)), [whole(4)], whole(6), num_blocks=whole(1))
    guide = pv.guides.LowRankNormal(encoder, whole(2), rank=whole(1))
    model = pv.GenerativeModel(pv.priors.MixtureOfNormals(whole(2), whole(3)), likelihood)
    pv.save(tmp_path / "pair.pt", model, guide)
    made = pv.load(tmp_path / "pair.pt")
    assert (repr(made["model"]), repr(made["guide"])) == (repr(model), repr(guide))
    assert "np." not in repr(model) + repr(guide)
