"""Networks in bfloat16: what is rounded, that recordings round alike, and that gradients and training hardly notice."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from shared.recorded import assert_same_step, eager_step, recorded_step
from shared.runs import binary, make
from torch import nn

import pyrovae as pv
from pyrovae.compiled import record
from pyrovae.programs.precision import in_precision


def rounded(tensor):
    return tensor.bfloat16().float()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(6, 3), (4, 6)),
        (nn.Conv1d(2, 3, 3), (4, 2, 8)),
        (nn.Conv2d(2, 3, 3), (4, 2, 8, 8)),
        (nn.ConvTranspose2d(2, 3, 3), (4, 2, 8, 8)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_layers_are_rounded(layer, shape):
    x = torch.randn(shape)
    (program,) = in_precision("bf16", layer)
    found = program(x)
    assert found.dtype == torch.float32
    assert not torch.equal(found, layer(x))
    assert torch.equal(found, rounded(found))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(rounded(parameter))
        assert torch.allclose(found, layer(rounded(x)), rtol=1e-2, atol=1e-2)
    found.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in layer.parameters())


def test_all_else_is_not():
    """Densities, other products of matrices, and layers in float64."""
    x = torch.randn(5, 3)
    covariance = torch.randn(3, 3)
    covariance = covariance @ covariance.T + torch.eye(3)
    layer = nn.Linear(3, 2).double()
    functions = (
        dist.Normal(0.1, 1.3).log_prob,
        dist.MultivariateNormal(torch.zeros(3), covariance).log_prob,
        lambda x: x @ covariance,
        lambda x: layer(x.double()),
        nn.functional.silu,
    )
    for function in functions:
        (program,) = in_precision("bf16", function)
        assert torch.equal(program(x), function(x))


def test_float32_changes_nothing_and_other_names_are_refused():
    assert in_precision("float32", binary) == [binary]
    with pytest.raises(ValueError, match="precision must be one of"):
        pv.fit(*make(), binary(), precision="half", progress=False)


def step_in(precision, recorded):
    torch.manual_seed(1)
    guide = pv.guides.MeanFieldNormal(pv.nets.MLP(12, [64]), 2)
    model = pv.GenerativeModel(
        pv.priors.RealNVP(2, hidden_features=[8]), pv.likelihoods.Bernoulli(pv.nets.MLP(2, [64], 12), 12)
    )

    class Both:
        """The programs, with the parameters to ask gradients of."""

        def __init__(self, program, module):
            self.program, self.parameters, self.modules = program, module.parameters, module

        def __call__(self, x):
            return self.program(x)

    model, guide = (
        Both(program, module)
        for program, module in zip(in_precision(precision, model, guide), (model, guide), strict=True)
    )
    batch = binary().flatten(1)
    if not recorded:
        return eager_step(model, guide, batch)
    return recorded_step(model, guide, batch, modules=[model.modules, guide.modules])


def test_gradients_are_close_and_recorded_alike(uncompiled):
    exact = step_in("float32", recorded=False)
    eager, again = (step_in("bf16", recorded=recorded) for recorded in (False, True))
    assert_same_step(eager, again, 1e-5)
    assert eager[0] != exact[0]
    assert eager[0] == pytest.approx(exact[0], rel=5e-3)
    for expected, found in zip(exact[1], eager[1], strict=True):
        assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("compile", [False, True])
def test_it_trains(uncompiled, compile):
    """As far as in float32; parameters stay float32, and the validation ELBO is that of evaluation in float32."""
    ends = {}
    for precision in ("float32", "bf16"):
        torch.manual_seed(0)
        model, guide = make()
        x = binary()
        pyro.set_rng_seed(1)
        result = pv.fit(
            model, guide, x, validation=x, epochs=60, batch_size=20, learning_rate=1e-2, compile=compile,
            precision=precision, progress=False,
        )  # fmt: skip
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        assert result.history[-1]["elbo"] > result.history[0]["elbo"] + 0.3
        ends[precision] = result.history[-1]["validation_elbo"]
    assert ends["bf16"] != ends["float32"]
    assert ends["bf16"] == pytest.approx(ends["float32"], abs=0.2)


def test_medium_products_in_training_and_not_in_validation():
    """torch's switch is on in every training step, off in validation, and put back at the end."""
    seen = []

    class Looking(nn.Linear):
        def forward(self, x):
            seen.append((self.training, torch.backends.mkldnn.matmul.fp32_precision))
            return super().forward(x.flatten(1))

    guide = pv.guides.MeanFieldNormal(Looking(12, 5), 2, num_features=5)
    before = torch.backends.mkldnn.matmul.fp32_precision
    options = {"epochs": 3, "batch_size": 20, "precision": "medium", "progress": False}
    pv.fit(make()[0], guide, binary(), validation=binary(), compile=False, **options)
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert {switch for is_training, switch in seen if is_training} == {"bf16"}
    assert (False, before) in seen


def test_medium_products_in_recorded_steps(uncompiled, monkeypatch):
    asked, original = [], record.float32_products
    monkeypatch.setattr(record, "float32_products", lambda medium: asked.append(medium) or original(medium))
    for precision in ("medium", "float32"):
        pv.fit(*make(), binary(), epochs=3, batch_size=20, compile=True, precision=precision, progress=False)
    assert asked == [True] * 4 + [False] * 4
