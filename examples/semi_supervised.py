"""Classify with few labels: the model M2 of Kingma et al. (2014), whose class is summed out of unlabelled data.

    python examples/semi_supervised.py

    model   p(y) p(z) p(x | y, z)       y a class, z ~ N(0, I), x binary pixels
    guide   q(y | x) q(z | x, y)

Labelled and unlabelled images are trained together, in one call of `pv.fit`. The class is marked for enumeration in both
programs, so TraceEnum_ELBO sums over it exactly:

    unlabelled   sum_y q(y|x) [ L(x, y) - log q(y|x) ],   L(x, y) = E_q(z|x,y) [ log p(x, y, z) - log q(z|x,y) ]
    labelled     L(x, y) + alpha log q(y|x)

For a labelled image, q(y|x) in the first line is replaced by 1 at its label, which gives L(x, y). The second term trains
the classifier q(y|x) on the labels. It is no part of a bound, so it stands in `WithClassification`, which is used in
training alone: log p(x) and p(y|x) are those of the model.

References:
    Kingma, Rezende, Mohamed & Welling, Semi-supervised Learning with Deep Generative Models (2014): error of 11.97 %
    (± 1.71) on the test images of MNIST with 100 labels.
"""

import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO
from support.script import command, parser_of, positive, processor, versions, write_json
from torch import nn
from torch.nn.functional import one_hot, softplus

import pyrovae as pv

NUM_CLASSES, BATCH_SIZE, LEARNING_RATE = 10, 200, 3e-3
CERTAIN = 1e4  # logit of a known label: all other classes get probability 0 in floating point, and finite logits
PUBLISHED = "11.97 % (± 1.71)"


def joined(z, y):
    """z (..., N, D) beside y one-hot, which may have more dimensions on the left, or fewer rows."""
    y = one_hot(y, NUM_CLASSES).to(z.dtype)
    shape = torch.broadcast_shapes(z.shape[:-1], y.shape[:-1])
    return torch.cat([z.expand(*shape, -1), y.expand(*shape, -1)], -1)


class ClassModel(nn.Module):
    """The program p(x, y, z). Labels are left to the guide."""

    def __init__(self, likelihood, latent_dim):
        super().__init__()
        self.likelihood, self.latent_dim = likelihood, latent_dim

    def forward(self, x, label=None, labelled=None):
        pyro.module("class_model", self)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(x.new_ones(NUM_CLASSES)), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.latent_dim), 1.0).to_event(1))
            pyro.sample("x", self.likelihood(joined(z, y)), obs=x)

    @torch.no_grad()
    def generate_classes(self, num_styles):
        """Mean images of every class (columns), each row with the same z."""
        z = torch.randn(num_styles, 1, self.latent_dim, device=next(self.parameters()).device)
        return self.likelihood(joined(z, torch.arange(NUM_CLASSES, device=z.device))).mean


class ClassGuide(nn.Module):
    """The program q(y, z | x); of labelled data, y is certain."""

    def __init__(self, data_dim, latent_dim, hidden):
        super().__init__()
        self.classifier = pv.nets.MLP(data_dim, [hidden], NUM_CLASSES, activation=nn.Softplus)
        # The first layer of q(z|x,y) sees x once for all classes.
        self.of_data, self.of_class = nn.Linear(data_dim, hidden), nn.Embedding(NUM_CLASSES, hidden)
        self.loc_and_scale = nn.Linear(hidden, 2 * latent_dim)

    def forward(self, x, label=None, labelled=None):
        pyro.module("class_guide", self)
        logits = self.classifier(x)
        if label is not None:
            logits = torch.where(labelled.unsqueeze(-1), CERTAIN * one_hot(label, NUM_CLASSES), logits)
        with pyro.plate("data", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(*self.normal_of(x, y)).to_event(1))

    def normal_of(self, x, y):
        """Location and scale of q(z|x,y), (..., N, latent_dim)."""
        features = softplus(self.of_data(x.flatten(1)) + self.of_class(y))
        loc, log_scale = self.loc_and_scale(features).chunk(2, -1)
        return loc, log_scale.exp()


class WithClassification(nn.Module):
    """The model, and alpha log q(label|x) of labelled data as a factor, for training alone."""

    def __init__(self, model, guide, alpha):
        super().__init__()
        self.model, self.guide, self.alpha = model, guide, alpha

    def forward(self, x, label, labelled):
        self.model(x)
        log_prob = dist.Categorical(logits=self.guide.classifier(x)).log_prob(label)
        with pyro.plate("labels", len(x)):
            pyro.factor("classification", self.alpha * labelled * log_prob)


def labelled_first(labels, num_labels, seed):
    """Order of the images that begins with `num_labels` of them, as many of each class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rank = one_hot(labels[order], NUM_CLASSES).cumsum(0).gather(1, labels[order, None]).squeeze(1)
    is_chosen = rank <= num_labels // NUM_CLASSES
    return torch.cat([order[is_chosen], order[~is_chosen]])


def main() -> None:
    options = parse_options()
    data = pv.data.load(options.dataset, options.data_dir)
    pyro.set_rng_seed(options.seed)
    order = labelled_first(data.train_labels, options.num_labels, options.seed)
    # Labelled images come several times, so that most batches have some.
    rows = torch.cat([order[: options.num_labels].repeat(options.copies), order[options.num_labels :]])
    is_labelled = torch.arange(len(rows)) < options.copies * options.num_labels
    train = {
        "x": data.train[rows],
        "label": torch.where(is_labelled, data.train_labels[rows], 0),  # no other label is used
        "labelled": is_labelled,
    }
    held_out = data.validation[:2000]
    nothing = torch.zeros(len(held_out), dtype=torch.long)
    validation = {"x": held_out, "label": nothing, "labelled": nothing.bool()}

    decoder = pv.nets.MLP(
        options.latent_dim + NUM_CLASSES, [options.hidden], data.data_shape.numel(), activation=nn.Softplus
    )
    likelihood = pv.likelihoods.Bernoulli(decoder, data.data_shape, data_mean=data.train.mean(0))
    model = ClassModel(likelihood, options.latent_dim)
    guide = ClassGuide(data.data_shape.numel(), options.latent_dim, options.hidden)
    alpha = options.alpha * len(data.train) / int(is_labelled.sum())

    test, labels = data.test[: options.num_test], data.test_labels[: options.num_test]
    show = not options.quiet

    def error_by_classifier(images, classes):
        with torch.no_grad():
            predicted = guide.classifier(images.to(guide.of_data.weight.device)).argmax(-1).cpu()
        return (predicted != classes).double().mean().item()

    errors = []

    def note(progress):
        errors.append(error_by_classifier(data.test, data.test_labels))
        if show:
            print(f" epoch {progress.epoch}: test error of q(y|x) {errors[-1]:.2%}", flush=True)

    fitted = pv.fit(
        WithClassification(model, guide, alpha),
        guide,
        train,
        validation=validation,
        transform=lambda batch: batch | {"x": data.transform(batch["x"])},
        loss=TraceEnum_ELBO(max_plate_nesting=1),
        epochs=options.epochs,
        batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        callback=note,
        progress=show,
    )
    error = error_by_classifier(data.test, data.test_labels)

    started = time.perf_counter()
    pyro.set_rng_seed(options.seed)
    found = pv.classify(model, guide, test, num_particles=options.num_particles, progress=show)
    lml = pv.log_marginal_likelihood(model, guide, test, num_particles=options.num_particles, progress=show)
    seconds = {"training": fitted.seconds, "evaluation": time.perf_counter() - started}
    of_same = error_by_classifier(test, labels)
    by_weights = (found.predicted != labels).double().mean().item()

    print(f"{fitted!r}\n\n{lml.summary()}\n\n{found.summary()}\n")
    print(f"{data.name}, {options.num_labels} labels, seed {options.seed}: error on the test images")
    print(f"  q(y|x), all {len(data.test):,}                 {shown(error, len(data.test))}")
    print(f"  q(y|x), the first {len(test):,}           {shown(of_same, len(test))}")
    print(f"  p(y|x) by pv.classify, the same     {shown(by_weights, len(test))}")
    if data.name == "mnist" and options.num_labels == 100:
        print(f"  Kingma et al. (2014), M2            {PUBLISHED}")
    print(f"training {seconds['training']:.0f} s, evaluation {seconds['evaluation']:.0f} s")
    if options.figure:
        images = model.generate_classes(8).cpu()
        title = "mean images of each class; one z per row"
        ax = pv.plots.image_table(images, column_labels=range(NUM_CLASSES), title=title)
        ax.figure.savefig(options.figure, dpi=150, bbox_inches="tight")
    if options.out:
        numbers = {
            "dataset": data.name,
            "test_error_of_guide": error,
            "num_test_of_guide": len(data.test),
            "same_images": {"num_test": len(test), "guide": of_same, "classify": by_weights},
            "error_by_epoch": errors,
            "best_epoch": fitted.best_epoch,
            "log_prob": {"mean": lml.mean, "mc_stderr": lml.mean_mc_stderr, "elbo": lml.elbo.mean().item()},
            "options": vars(options),
            "seconds": seconds,
            "threads": torch.get_num_threads(),
            "processor": processor(),
            "versions": versions(),
            "command": command(),
        }
        write_json(Path(options.out), numbers)


def shown(error, number) -> str:
    """An error with its binomial standard error."""
    return f"{error:.2%} ± {(error * (1 - error) / number) ** 0.5:.2%}"


def parse_options():
    parser = parser_of(__doc__)
    add = parser.add_argument
    add(
        "--dataset",
        default="auto",
        choices=("auto", "mnist", "digits"),
        help="auto (the default): MNIST, or digits if unavailable",
    )
    add("--data-dir", help="data folder (default: $PYROVAE_DATA if set, else a cache folder)")
    add("--num-labels", type=positive(int), default=100, help="labelled images, as many of each class (default: 100)")
    add("--copies", type=positive(int), default=20, help="copies of each in the training data (default: 20)")
    add("--alpha", type=float, default=1.0, help="classifier's weight per training image (default: 1; the paper: 0.1)")
    add("--epochs", type=positive(int), default=10, help="of MNIST, 80 s of processor time each (default: 10)")
    add("--latent-dim", type=positive(int), default=50, help="dimensions of z (default: 50)")
    add("--hidden", type=positive(int), default=300, help="width of the hidden layers (default: 300)")
    add("--num-test", type=positive(int), default=500, help="test images for p(y|x) and log p(x) (default: 500)")
    add("--num-particles", type=positive(int), default=100, help="particles for these (default: 100)")
    add("--seed", type=int, default=0, help="seed of the labels, training and evaluation (default: 0)")
    add("--figure", help="file for images of each class")
    add("--out", help="JSON file for the numbers")
    add("--quiet", action="store_true", help="show no progress")
    options = parser.parse_args()
    if options.num_labels % NUM_CLASSES:
        parser.error(f"--num-labels must be a multiple of {NUM_CLASSES}, found {options.num_labels}")
    return options


if __name__ == "__main__":
    main()
