"""Train a variational autoencoder, two Pyro programs, by SVI and measure how tight its bound on log p(x) is.

    python examples/mnist_svi.py

This trains on MNIST, estimates log p(x) of the test images by importance sampling, and writes numbers and figures to a
folder under runs/. If MNIST is unavailable and cannot be downloaded, it uses the 8x8 digits of scikit-learn.

    torchrun --nproc-per-node=2 examples/mnist_svi.py

This splits each batch and the evaluation among several processes, for example one per GPU.
"""

import csv
import logging
import sys
import time
from contextlib import ExitStack

import matplotlib

matplotlib.use("Agg")  # write figures to files, without a display

import matplotlib.pyplot as plt
import pyro
import torch
from support import registry
from support.command_line import parse_options
from support.metrics import metrics_of, parts_of, report
from support.provenance import write_json
from support.run_folder import METRICS, TRAINING, begin, how_to_go_on

import pyrovae as pv


def main(held: ExitStack) -> None:
    started = time.perf_counter()
    options = parse_options(__doc__)
    rank, num_ranks = pv.distributed.rank(), pv.distributed.num_ranks()  # 0 and 1 unless torchrun started this process
    show = not options.quiet and rank == 0
    pyro.set_rng_seed(options.seed)

    # Load the data in the form that the likelihood needs. `out` is the folder of this run alone.
    device, data, out = begin(options, held)
    latent_dim, hidden = options.latent_dim, options.hidden

    # The model p(z) p(x|z) and the guide q(z|x): two Pyro programs made of interchangeable parts, here chosen by name.
    network = registry.NETWORKS[options.network]
    guide = registry.GUIDES[options.guide](network.encoder(data.data_shape, hidden), latent_dim)
    prior = registry.PRIORS[options.prior](latent_dim, guide, data.train)
    make_likelihood = registry.LIKELIHOODS[options.likelihood]
    likelihood = make_likelihood(
        lambda out_shape: network.decoder(latent_dim, out_shape, hidden), data, options.scale or 1.0
    )
    model = pv.GenerativeModel(prior, likelihood)

    # The objective: the ELBO unless --objective names another. Evaluation always reports the true ELBO.
    objective = registry.make_objective(
        options.objective,
        options.objective_particles,
        beta=options.beta,
        kl_warmup_steps=options.kl_warmup * -(-len(data.train) // options.batch_size),
        free_bits=options.free_bits,
    )

    # Training: pyro.infer.SVI(model, guide, Adam, objective), one step per batch. The state is saved at intervals.
    try:
        result = pv.fit(
            model,
            guide,
            data.train,
            transform=data.transform,
            validation=data.validation,
            epochs=options.epochs,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            loss=objective,
            device=device,
            checkpoint=out / TRAINING,
            resume=options.resume,
            progress=show,
        )
    except KeyboardInterrupt:
        print(f"\n{how_to_go_on(options, out)}", file=sys.stderr)
        sys.exit(130)

    # Evaluation: log p(x) of every test image, and so the gap between the ELBO and log p(x).
    evaluation_started = time.perf_counter()
    share = data.test.tensor_split(num_ranks)[rank]
    lml = pv.log_marginal_likelihood(model, guide, share, num_particles=options.num_particles, progress=show)
    lml = pv.LogMarginalLikelihood.concatenate(pv.distributed.gather(lml))
    if rank > 0:
        return  # only the first process writes
    active = pv.active_units(guide, data.test)
    seconds = {"training": result.seconds, "evaluation": time.perf_counter() - evaluation_started}

    # Save and print the numbers before drawing, so that they survive an error in a figure.
    pv.save(out / "checkpoint.pt", model, guide, parts=parts_of(options))  # pv.load(...) restores the pair
    with (out / "history.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, result.history[0])
        writer.writeheader()
        writer.writerows(result.history)
    metrics = metrics_of(options, data, device, result, lml, active, seconds)
    write_json(out / METRICS, metrics)
    print(report(metrics))

    # Figures, and the ArviZ file.
    figures_started = time.perf_counter()
    figures = write_figures(out, model, guide, data, result, lml, device)
    drawn = data.test[: min(20, len(lml))]
    lml.to_inference_data(model=model, guide=guide, args=(drawn,)).to_netcdf(str(out / "evaluation.nc"))
    seconds["figures and files"] = time.perf_counter() - figures_started
    seconds["total"] = time.perf_counter() - started
    metrics["files"] = ["checkpoint.pt", "history.csv", *figures, "evaluation.nc"]
    write_json(out / METRICS, metrics)
    print(
        f"Numbers and figures: {out} ({seconds['figures and files']:.0f} s to write them, {seconds['total']:.0f} s in total)"
    )


@torch.no_grad()
def write_figures(out, model, guide, data, result, lml, device) -> list[str]:
    """Draw the figures of a run and return their file names."""
    written = []

    def write(name):
        plt.savefig(out / name, dpi=150)
        plt.close()
        written.append(name)

    cmap = "gray" if data.name == "freyfaces" else "gray_r"
    samples = model.generate(128, mean=True).cpu()
    shown = data.test[:64]
    means = pv.uses.reconstruct(model, guide, shown)
    pv.plots.report(lml, history=result.history, samples=samples, originals=shown, means=means, cmap=cmap)
    write("report.png")  # everything on one page; the single figures follow
    pv.plots.image_grid(samples, title="means of p(x|z) for z drawn from the prior", cmap=cmap)
    write("samples.png")
    pv.plots.reconstructions(shown, means, cmap=cmap)
    write("reconstructions.png")
    pv.plots.training(result.history)
    write("training.png")
    pv.plots.tightness(lml.elbo, lml.log_prob, lml.curve_particles, lml.curve)
    write("tightness.png")
    if model.prior.latent_dim == 2 and isinstance(model.prior, pv.priors.StandardNormal):
        # Equal steps in the prior's probability, so that each picture represents the same share of p(z).
        steps = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.02, 0.98, 20))
        grid = torch.stack(torch.meshgrid(steps, steps.flip(0), indexing="xy"), -1)
        edges = (steps[0].item(), steps[-1].item())
        pv.plots.manifold(model.decode(grid.to(device)).cpu(), extent=(*edges, *edges), cmap=cmap)
        write("manifold.png")
    return written


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    with ExitStack() as held:
        held.enter_context(pv.distributed.joined())
        main(held)
