"""A guide refined for each datum by gradient steps, which removes the amortisation gap from an evaluation."""

import copy
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyrovae.common.arguments import check_count, checks_values
from pyrovae.common.networks import Inputs
from pyrovae.common.random_numbers import seed_generators, seeded
from pyrovae.compiled.compiler import import_compiler
from pyrovae.compiled.record import Recording, record
from pyrovae.guides.base import Guide, check_guide
from pyrovae.programs.enumeration import SummedOut
from pyrovae.programs.layout import find_layout
from pyrovae.programs.log_densities import log_joint_of
from pyrovae.programs.parameters import apart_from_handlers
from pyrovae.programs.reach import evaluation_mode, modules_behind

__all__ = ["Refined"]

_SEED = 815_462_973  # of the noise of refinement; unlikely to be a user's own seed, which seeds the particles

Draw = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


class Refined(Guide):
    """A guide refined for each datum: gradient steps improve what `encode` gives; the guide's weights do not change.

        lambda_0 = guide.encode(x),   lambda_(t+1) = lambda_t + Adam( grad_lambda ELBO(x; lambda_t) ),
        ELBO(x; lambda) = E_q [ log p(x, z) - log q(z) ],   q = guide.distribution(lambda)

    In evaluation it removes most of the amortisation gap. `log_marginal_likelihood(model, Refined(guide, model), x)`
    refines each datum once and draws its particles afterwards, so the estimate remains a lower bound on average. The
    refinement uses its own random numbers, the same for every datum and every call: q(z|x) is a function of x, and
    depends on no other datum and no seed. The steps run with model and guide in eval mode, and change neither.

    In training the encoder gets the gradient of the ELBO at the refined parameters, as if refinement were a constant
    shift (lambda_T = lambda_0 + constant); derivatives of the steps are left out. Each call costs `num_steps`
    gradients.

    Shapes: x (N, *data_shape) -> batch shape (N,), event shape (latent_dim,).

    Args:
        guide: Any guide with reparameterised draws. For a flow, the context is refined and the flow stays the same.
        model: The model whose ELBO is maximised: any Pyro program of x with the latent sites of the guide. Context and
            mask are passed to it as to the guide.
        num_steps: Steps of Adam.
        learning_rate: The rate of the first step; it falls linearly towards 0 over the steps.
        num_particles: Draws per datum and step.

    Raises:
        ValueError: If num_steps, num_particles or learning_rate is out of range, the guide has no reparameterised
            draws, or the model has other latent sites than the guide.
        TypeError: If `guide` is not a `Guide`, or the model is not callable.
        RuntimeError: If the parameters become NaN or infinite.

    References:
        Kim, Wiseman, Miller, Sontag & Rush, Semi-Amortized Variational Autoencoders (2018). Cremer, Li & Duvenaud,
        Inference Suboptimality in Variational Autoencoders (2018). The gradient in training: Finn, Abbeel & Levine,
        Model-Agnostic Meta-Learning (2017), section 5.2, "first order".
    """

    def __init__(
        self,
        guide: Guide,
        model: Callable[..., Any],
        num_steps: int = 100,
        *,
        learning_rate: float = 0.05,
        num_particles: int = 8,
    ):
        check_guide(guide)
        num_steps = check_count("num_steps", num_steps)
        num_particles = check_count("num_particles", num_particles)
        if not learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, found {learning_rate}")
        if not callable(model):
            raise TypeError(f"model must be a Pyro program, for example a GenerativeModel; found {model!r}")
        super().__init__(guide.latent_dim)
        self.guide, self.model = guide, model
        self.num_steps, self.learning_rate, self.num_particles = num_steps, learning_rate, num_particles
        self._to_record: int | None = None  # batch size whose gradients are recorded
        self._recorded: Recording | None = None

    def encode(self, x: Tensor, context: Tensor | None = None, *, observed: Tensor | None = None) -> Tensor:
        if not checks_values():
            raise RuntimeError("refinement is a loop of gradient steps and cannot be recorded: encode before recording")
        data = Inputs(x, context, observed)
        start = self.guide.encode(*data.args, **data.kwargs)
        shift = self._refined(data, start) - start.detach()
        return start + shift

    def distribution(self, parameters: Tensor) -> dist.TorchDistribution:
        return self.guide.distribution(parameters)

    def latents(self, parameters: Tensor, visit: Callable[[str, dist.TorchDistribution], Tensor]) -> Tensor:
        return self.guide.latents(parameters, visit)

    def in_model(self, name: str, value: Tensor) -> Tensor:
        return self.guide.in_model(name, value)

    def outline(self) -> "Refined":
        # If data influence each other, the first steps show it.
        return self._twin(num_steps=min(2, self.num_steps), _to_record=None)

    def compiled(self, num_data: int) -> "Refined":
        return self._twin(_to_record=num_data)

    def _twin(self, **changed: int | None) -> "Refined":
        """Copy this guide with the same modules and without its recording."""
        guide = copy.copy(self)
        vars(guide).update(changed, _recorded=None)
        return guide

    def _refined(self, data: Inputs, start: Tensor) -> Tensor:
        """Parameters (N, P) after the steps from `start`."""
        x = data.x
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            seeded(_SEED, x.device),
            pyro.validation_enabled(False),
            evaluation_mode(self.guide, self.model),
            apart_from_handlers(),
        ):
            # clone, because tensors made in inference mode take no part in gradients
            parameters = start.detach().clone().requires_grad_()
            repeated = data.map(lambda part: part.clone().repeat(self.num_particles, *(1 for _ in part.shape[1:])))
            gradient = self._gradient_at(parameters, repeated)
            # A small second beta, so that the large gradients of a bad start do not make the later steps small.
            import_compiler()
            adam = torch.optim.Adam([parameters], lr=self.learning_rate, betas=(0.9, 0.95))
            for step in range(self.num_steps):
                adam.param_groups[0]["lr"] = self.learning_rate * (1 - step / self.num_steps)
                parameters.grad = gradient()
                adam.step()
        if not parameters.isfinite().all():
            raise RuntimeError(
                f"refinement ended at parameters that are not finite: lower learning_rate ({self.learning_rate:g}), "
                f"and check the data for NaN"
            )
        return parameters.detach()

    def _gradient_at(self, parameters: Tensor, repeated: Inputs) -> Callable[[], Tensor]:
        """Return a function: the gradient of -ELBO at the current `parameters`, with new noise at every call."""
        draw = self._draw(parameters)

        tensors = repeated.tensors()

        def gradient(parameters: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                parameters = parameters.detach().requires_grad_()
                latents, log_q = draw(parameters)
                elbo = (self._log_joint(repeated.of(tensors), latents) - log_q.sum()) / self.num_particles
                # The ELBO is a sum over data, so each row's gradient is that of its own datum.
                return torch.autograd.grad(-elbo, parameters)

        if len(parameters) == self._to_record:
            with torch.random.fork_rng([parameters.device] if parameters.is_cuda else []), torch.no_grad():
                self._log_joint(repeated, draw(parameters)[0])  # run the checks that a recording leaves out
            if self._recorded is None:
                self._recorded = record(gradient, modules_behind(self.guide, self.model), (parameters, *tensors))
            if self._recorded is not None:
                run = self._recorded.at(parameters, *tensors)
                return lambda: run()[0][0]
            self._to_record = None
        return lambda: gradient(parameters, *tensors)[0]

    def _draw(self, parameters: Tensor) -> Draw:
        """Return a function: parameters (N, P) -> latent sites (S, N, event size) by name, their joint log q (S, N).

        All data share the same noise. Otherwise q would depend on a datum's position in the batch, and data could not
        be processed in blocks.
        """

        def draw_one(row: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            latents, log_q = {}, []

            def visit(name: str, distribution: dist.TorchDistribution) -> Tensor:
                if not distribution.has_rsample:
                    raise ValueError(
                        f"refinement needs reparameterised draws, and {type(self.guide).__name__} has none at site "
                        f"'{name}': refine a guide that has them (DefensiveMixture(Refined(guide, model), prior), not "
                        f"the other way round)"
                    )
                several = distribution.expand((self.num_particles, 1))
                value = several.rsample()
                latents[name] = value.squeeze(1)
                log_q.append(several.log_prob(value).squeeze(1))
                return value

            self.guide.latents(row.unsqueeze(0), visit)
            return latents, sum(log_q)

        def draw_in_turn(parameters: Tensor) -> tuple[dict[str, Tensor], Tensor]:
            seed = int(torch.randint(2**62, ()))
            draws = []
            for row in parameters:
                seed_generators(seed, parameters.device)
                draws.append(draw_one(row))
            latents, log_q = zip(*draws, strict=True)
            return {name: torch.stack([values[name] for values in latents], 1) for name in latents[0]}, torch.stack(
                log_q, 1
            )

        together = torch.vmap(draw_one, out_dims=1, randomness="same")
        try:
            together(parameters)
        except RuntimeError:  # vmap cannot share this draw (Gamma): loop instead, with the same noise
            return draw_in_turn
        return together

    def _log_joint(self, data: Inputs, latents: dict[str, Tensor]) -> Tensor:
        """log p(x, z), summed over data."""
        values = {name: self.guide.in_model(name, value.flatten(0, 1)) for name, value in latents.items()}
        model = poutine.condition(self.model, data=values)
        trace = poutine.trace(model).get_trace(*data.args, **data.kwargs)
        sites = {n: s for n, s in trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s)}
        found = {name for name, site in sites.items() if name in values or not site["is_observed"]}
        marked = frozenset(name for name in found - set(values) if sites[name]["infer"].get("enumerate"))
        found -= marked
        if found != set(values):
            raise ValueError(
                f"refinement needs a model with the latent sites of its guide, {sorted(values)}; found {sorted(found)}"
            )
        if marked:
            whole = find_layout(trace, poutine.Trace(), None)._replace(plate=None, dim=None, num_data=1)
            tables = poutine.trace(SummedOut(model, marked, whole.max_plate_nesting)).get_trace(
                *data.args, **data.kwargs
            )
            return log_joint_of(whole, tables).sum()
        # Leave out the scale of a subsampled plate, because log q has none.
        terms = (
            scale_and_mask(site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"]), mask=site["mask"])
            for site in sites.values()
        )
        return sum(term.sum() for term in terms)

    def extra_repr(self) -> str:
        return f"num_steps={self.num_steps}, {super().extra_repr()}"
