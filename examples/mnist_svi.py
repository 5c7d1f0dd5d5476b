"""Train a variational autoencoder, two Pyro programs, by SVI and measure how tight its bound on log p(x) is.

    python examples/mnist_svi.py

This trains on MNIST, estimates log p(x) of the test images by importance sampling, and writes numbers and figures to a
folder under runs/. If MNIST is unavailable and cannot be downloaded, it uses the 8x8 digits of scikit-learn.

    torchrun --nproc-per-node=2 examples/mnist_svi.py

This splits each batch and the evaluation among several processes, for example one per GPU.
"""

import argparse
import csv
import logging
import time
from contextlib import ExitStack
from functools import partial

import matplotlib

matplotlib.use("Agg")  # write figures to files, without a display

import matplotlib.pyplot as plt
import pyro
import torch
from support import parts, run_folder
from support.report import described, metrics_of, parts_of, report
from support.script import not_negative, parser_of, positive, write_json

import pyrovae as pv

# Settings that depend on the data set, for options that are not given.
DEFAULTS = {
    "image28": {"epochs": 40, "batch_size": 200, "learning_rate": 3e-3, "hidden": [400, 400], "latent_dim": 40},
    "digits": {"epochs": 300, "batch_size": 100, "learning_rate": 2e-3, "hidden": [200, 200], "latent_dim": 16},
    "freyfaces": {"epochs": 150, "batch_size": 50, "learning_rate": 2e-3, "hidden": [200, 200], "latent_dim": 20},
}


def main(held: ExitStack) -> None:
    started = time.perf_counter()
    options = parse_options()
    rank, num_ranks = pv.distributed.rank(), pv.distributed.num_ranks()  # 0 and 1 unless torchrun started this process
    show = not options.quiet and rank == 0

    # The data, in the form that the likelihood needs: binary, continuous or grey images. `out` is the folder of this run
    # alone; if it holds the same run, finished, its numbers are printed and this program ends.
    make_likelihood = parts.LIKELIHOODS[options.likelihood]
    try:
        device = pv.pick_device(options.device)
        run_folder.refuse_other_run(options)
        run_folder.show_finished_run(options)
        grey = pv.data.load(options.dataset, options.data_dir, binarization=None, train_on_all=options.train_on_all)
        data = make_likelihood.prepare(grey, options.binarization, options.data_seed)
        if too_long := warmup_too_long(options, data.name):  # with --dataset auto, known only now
            raise ValueError(too_long)
        out = run_folder.claim(options, data.name, held)
    except (ValueError, RuntimeError, OSError) as error:  # a missing, damaged or locked file
        raise SystemExit(f"error: {error}") from error
    # Last, because a resumed run is compared by the options as typed.
    for name, value in DEFAULTS.get(data.name, DEFAULTS["image28"]).items():
        setattr(options, name, getattr(options, name, None) or value)
    test = data.test
    if options.num_test and options.num_test < len(test):  # the same images for every --seed
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(options.data_seed))
        test = test[order[: options.num_test]]
    if rank == 0:
        print(described(data, device))

    # The model p(z) p(x|z) and the guide q(z|x): two Pyro programs made of interchangeable parts, here chosen by name.
    pyro.set_rng_seed(options.seed)
    latent_dim, hidden = options.latent_dim, options.hidden
    network = parts.NETWORKS[options.network]
    guide = parts.GUIDES[options.guide](network.encoder(data.data_shape, hidden), latent_dim)
    prior = parts.PRIORS[options.prior](latent_dim, guide, data.train)
    decoder = partial(network.decoder, latent_dim, hidden=hidden)  # of the output's shape, which the likelihood decides
    likelihood = make_likelihood(decoder, data, options.scale or 1.0)
    model = pv.GenerativeModel(prior, likelihood)

    # The objective: the ELBO unless --objective names another. Evaluation always reports the true ELBO.
    objective = parts.make_objective(
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
            checkpoint=out / run_folder.TRAINING,
            resume=options.resume,
            progress=show,
        )
    except KeyboardInterrupt:
        run_folder.stop(options, out)

    # Evaluation: log p(x) of each test image, and so the gap between the ELBO and log p(x).
    evaluation_started = time.perf_counter()
    share = test.tensor_split(num_ranks)[rank]
    lml = pv.log_marginal_likelihood(model, guide, share, num_particles=options.num_particles, progress=show)
    lml = pv.LogMarginalLikelihood.concatenate(pv.distributed.gather(lml))
    if rank > 0:
        return  # only the first process writes
    if len(lml) < len(test):
        run_folder.stop(options, out)
    annealed = None
    if lml.share_of_bad_k() > 0.05:  # many weights cannot be trusted: anneal as many images as cost a third more
        annealed = pv.anneal_a_slice(model, lml, test, guide=guide, progress=show)
    active, use = pv.active_units(guide, data.test), pv.latent_use(model, guide, test)
    seconds = {"training": result.seconds, "evaluation": time.perf_counter() - evaluation_started}

    # Save and print the numbers before drawing, so that they survive an error in a figure.
    pv.save(out / "checkpoint.pt", model, guide, parts=parts_of(options))  # pv.load(...) restores the pair
    with (out / "history.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, result.history[0])
        writer.writeheader()
        writer.writerows(result.history)
    metrics = metrics_of(options, data, device, result, lml, annealed, active, use, seconds)
    write_json(out / run_folder.METRICS, metrics)
    print(report(metrics))

    # Figures, and the ArviZ file.
    figures_started = time.perf_counter()
    cmap = "gray" if data.name == "freyfaces" else "gray_r"
    figures = write_figures(out, model, guide, test, result, lml, cmap)
    lml.to_inference_data(model=model, guide=guide, args=(test[:20],)).to_netcdf(str(out / "evaluation.nc"))
    seconds["figures and files"] = writing = time.perf_counter() - figures_started
    seconds["total"] = total = time.perf_counter() - started
    metrics["files"] = ["checkpoint.pt", "history.csv", *figures, "evaluation.nc"]
    write_json(out / run_folder.METRICS, metrics)
    print(f"Numbers and figures: {out} ({writing:.0f} s to write them, {total:.0f} s in total)")


@torch.no_grad()
def write_figures(out, model, guide, test, result, lml, cmap) -> list[str]:
    """Draw the figures of a run and return their file names."""
    written = []

    def write(name):
        plt.savefig(out / name, dpi=150)
        plt.close()
        written.append(name)

    samples = model.generate(128, mean=True).cpu()
    shown = test[:64]
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
        pv.plots.manifold(model.decode(grid.to(result.device)).cpu(), extent=(*edges, *edges), cmap=cmap)
        write("manifold.png")
    return written


def parse_options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--prior", default="standard-normal", choices=parts.PRIORS, help="p(z) (default: standard-normal)")
    add("--guide", default="mean-field", choices=parts.GUIDES, help="q(z|x) (default: mean-field)")
    add("--likelihood", default="bernoulli", choices=parts.LIKELIHOODS, help="p(x|z) (default: bernoulli)")
    add("--scale", type=positive(float), help="standard deviation of --likelihood normal (default: 1)")
    add("--network", default="mlp", choices=parts.NETWORKS, help="networks of encoder and decoder (default: mlp)")
    add("--latent-dim", type=positive(int), help="dimensions of z (default: 40; digits: 16; freyfaces: 20)")
    add("--objective", default="elbo", choices=parts.OBJECTIVES, help="what training maximises (default: elbo)")
    add("--objective-particles", type=positive(int), default=1, help="particles per image in training (default: 1)")
    add("--beta", type=not_negative(float), default=1.0, help="weight of the KL in training (default: 1)")
    add("--kl-warmup", type=not_negative(int), default=0, help="epochs in which this weight grows from 0 (default: 0)")
    add("--free-bits", type=not_negative(float), default=0.0, help="nats per dimension that cost nothing (default: 0)")
    add("--dataset", default="auto", choices=pv.data.NAMES, help="auto (the default): MNIST, or digits without MNIST")
    add("--data-dir", help="data folder as torchvision has it (default: $PYROVAE_DATA if set, else a cache folder)")
    binarization = "binary training pixels: redrawn at every use (dynamic, the default), or drawn once (static)"
    add("--binarization", choices=["dynamic", "static"], help=binarization)
    add("--train-on-all", action="store_true", help="train on the validation images too, and keep the last state")
    add("--epochs", type=positive(int), help="passes over the data (default: 40; digits: 300; freyfaces: 150)")
    add("--batch-size", type=positive(int), help="images per SVI step (default: 200; digits: 100; freyfaces: 50)")
    add("--learning-rate", type=positive(float), help="peak rate of Adam (default: 0.003; digits, freyfaces: 0.002)")
    add("--num-particles", type=positive(int), default=1000, help="particles per test image (default: 1000)")
    add("--num-test", type=positive(int), help="evaluate a random subset of this many test images (default: all)")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto (the default): CUDA if there is a GPU")
    add("--seed", type=int, default=0, help="seed of initialisation, training and evaluation (default: 0)")
    add("--data-seed", type=int, default=0, help="seed of drawn validation and test images, and of their subset")
    add("--out", help="output folder for numbers and figures (default: a new folder under runs/)")
    add("--resume", action="store_true", help="resume the run in --out, or start it if there is none")
    add("--quiet", action="store_true", help="show no progress bars")
    options = parser.parse_args()
    if contradiction := contradiction_in(options):
        parser.error(contradiction)
    return options


def contradiction_in(options) -> str | None:
    """What is wrong with a combination of valid options; None if nothing is."""
    other = f"and --likelihood is {options.likelihood}"
    if options.scale is not None and options.likelihood != "normal":
        return f"--scale {options.scale:g} is for --likelihood normal, {other}"
    if options.binarization is not None and options.likelihood != "bernoulli":
        return f"--binarization {options.binarization} is for --likelihood bernoulli, {other}, of images not binary"
    if options.objective in ("iwae", "dreg"):
        unused = {"beta": 1, "kl_warmup": 0, "free_bits": 0}
        typed = {name: getattr(options, name) for name, value in unused.items() if getattr(options, name) != value}
        if weights := [f"--{name.replace('_', '-')} {value:g}" for name, value in typed.items()]:
            return f"--objective {options.objective} has no KL to weigh: leave out {', '.join(weights)}"
        if options.objective_particles < 2:
            return f"--objective {options.objective} needs --objective-particles of 2 or more: with one it is the ELBO"
    if options.num_test is not None and options.num_test < (least := max(2, pv.distributed.num_ranks())):
        return f"--num-test {options.num_test} is too few for a standard error over images: give at least {least}"
    known = options.epochs or options.dataset != "auto"  # else the number of epochs is known only after loading
    if known and (too_long := warmup_too_long(options, options.dataset)):
        return too_long
    if options.resume and not options.out:
        return "--resume needs --out, the folder of the run to resume"
    return None


def warmup_too_long(options, dataset: str) -> str | None:
    epochs = options.epochs or DEFAULTS.get(dataset, DEFAULTS["image28"])["epochs"]
    too_long = options.kl_warmup > epochs
    return f"--kl-warmup {options.kl_warmup} is longer than the run: {epochs} epochs" if too_long else None


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    with ExitStack() as held:
        held.enter_context(pv.distributed.joined())
        main(held)
