"""The rows of `density_table.py`: model, training settings, and the published number to compare with.

Published numbers: Burda 2016 (arXiv 1509.00519, table 1), Tomczak & Welling 2018 (1705.07120, table 1; dynamic
binarisation: 1810.10866, as listed by Norouzi 2020), Bauer & Mnih 2019 (1810.11428), Kingma 2016 (1606.04934),
Durkan 2019 (1906.04032).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from density_models import hierarchy, images, mlp, two_layers
from published_recipe import SETTINGS, NormalisedAdam, published, published_hierarchy
from torch import nn

import pyrovae as pv


@dataclass(frozen=True)
class Row:
    """One row of the table. NLLs are in nats per image.

    Attributes:
        name: name of the row on the command line.
        title: name of the row in the table.
        pair: function data -> (model, guide).
        epochs, batch_size, learning_rate, clip_norm: arguments of `pv.fit`. The learning rate has a cosine decay,
            so the number of epochs is fixed in advance (but see `optimizer`). No row uses weight decay.
        objective: training objective, a name in `parts.OBJECTIVES`.
        particles: particles of the training objective.
        kl_warmup: epochs over which the weight of the KL grows from 0 to 1.
        binarization: "dynamic" or "static" training images. Validation and test images are always drawn once.
        train_on_all: if True, train on 60,000 images and keep the last state. Otherwise train on 50,000 and keep the
            state with the best bound on the 10,000 validation images (the ELBO, or the importance-weighted bound if
            that is the objective).
        device: "cuda" for rows that are too slow on two cores.
        published, source: NLL in the literature, and where it comes from.
        target: NLL that this row should reach.
        variant_of: row that this one is a variant of; the title names the difference.
        after: row whose trained pair this row trains further, with its own objective and learning rate.
        optimizer: class to use instead of Adam, at a constant learning rate, so that epochs may be added later.
        patience: epochs without a better validation bound after which training stops.
        draw: published draw of the validation and test images, instead of `--data-seed`.
        average: decay of the moving average of the weights that is evaluated.
        precision: argument of `pv.fit`. Estimates are always in float32.
    """

    name: str
    title: str
    pair: Callable[[pv.data.Splits], tuple]
    epochs: int
    objective: str = "elbo"
    particles: int = 1
    batch_size: int = 100
    learning_rate: float = 2e-3
    clip_norm: float | None = None
    kl_warmup: int = 0
    binarization: str = "dynamic"
    train_on_all: bool = False
    device: str = "cpu"
    published: float | None = None
    source: str = ""
    target: float | None = None
    variant_of: str | None = None
    after: str | None = None
    optimizer: type[torch.optim.Optimizer] | None = None
    patience: int | None = None
    draw: str | None = None
    average: float | None = None
    precision: str = "float32"


# Burda's networks, as published: 784 - 200 - 200 - 50, tanh. We train for far fewer than the paper's 3280 epochs, so with
# a higher rate, cosine decay and batches of 100. The IWAE starts from the trained VAE, as in the paper's table 2.
burda = partial(mlp, hidden=[200, 200], latent_dim=50, activation=nn.Tanh, layer_norm=False)
BurdaRow = partial(Row, train_on_all=True, learning_rate=3e-3, source="Burda 2016")

# Two hidden layers of 300 and 40 latents, as in Tomczak & Welling and Bauer & Mnih. Gated units are as in the former,
# LayerNorm is our addition. The flow rows use SiLU because they were trained before we found that gated units help.
mlp300 = partial(mlp, hidden=[300, 300], latent_dim=40, gated=True)
silu300 = partial(mlp300, gated=False)

# Further training on the importance-weighted bound, which penalises the guide less for draws of low weight.
OnwardRow = partial(Row, objective="iwae", particles=10, epochs=25, learning_rate=1e-3)
GatedOnward = partial(OnwardRow, draw="seed-777", clip_norm=5000.0)

# Residual and convolutional networks, which need a GPU. These settings are a first guess: they were never run.
GpuRow = partial(Row, device="cuda", epochs=400, batch_size=200, learning_rate=1e-3, clip_norm=100.0, kl_warmup=20)

Variant = partial(Row, variant_of="short-mlp300", epochs=60)

TOMCZAK, BAUER = "Tomczak & Welling 2018", "Bauer & Mnih 2019"

# The VampPrior paper's networks and test images, but Adam with a rate that decays as a cosine from 2e-3.
Gated = partial(Row, draw="seed-777", source=TOMCZAK)
vamp300 = partial(published, prior="vamp")
# Without LayerNorm and a largest norm, this training diverged at epoch 205: the density of a few codes overflowed.
maf300 = partial(published, prior="maf", layer_norm=True)

# From the VampPrior paper's recipe to ours, one change at a time, on the paper's test images.
Paper60 = partial(Row, epochs=60, learning_rate=5e-4, optimizer=NormalisedAdam, draw="seed-777", variant_of="paper60")

PublishedRow = partial(Row, source=TOMCZAK, **SETTINGS)
CONV = f"{TOMCZAK}, convHVAE"
OTHER_FILE = "(another binary file)"

ROWS = {
    row.name: row
    for row in (
        # Dynamic binarisation, Burda's networks.
        BurdaRow("burda1-vae", "1 layer (Burda), VAE, k=1", burda, 600, published=86.76, target=86.5),
        BurdaRow(
            "burda1-iwae5",
            "1 layer (Burda), VAE, then IWAE, k=5",
            burda,
            150,
            "iwae",
            5,
            learning_rate=1e-3,
            published=85.54,
            target=85.3,
            after="burda1-vae",
        ),
        BurdaRow(
            "burda1-iwae50",
            "1 layer (Burda), IWAE, k=50",
            burda,
            600,
            "iwae",
            50,
            device="cuda",
            published=84.78,
            target=84.6,
        ),
        BurdaRow("burda1-dreg50", "1 layer (Burda), DReG, k=50", burda, 600, "dreg", 50, device="cuda", target=84.4),
        BurdaRow(
            "burda2-vae",
            "2 layers (Burda), VAE, k=1",
            two_layers,
            200,
            learning_rate=1e-3,
            published=85.33,
            target=85.0,
        ),
        BurdaRow(
            "burda2-iwae50",
            "2 layers (Burda), IWAE, k=50",
            two_layers,
            600,
            "iwae",
            50,
            device="cuda",
            published=82.90,
            target=82.8,
        ),
        # MLPs with two hidden layers of 300, by prior.
        Row(
            "mlp300-standard",
            "MLP 300-300, standard normal prior",
            mlp300,
            250,
            published=84.45,
            source=TOMCZAK,
            target=84.4,
        ),
        Row(
            "mlp300-vamp",
            "MLP 300-300, VampPrior",
            partial(mlp300, prior="vamp"),
            150,
            batch_size=200,
            published=82.43,
            source=TOMCZAK,
            target=82.4,
        ),
        Row(
            "mlp300-maf",
            "MLP 300-300, SiLU, MAF prior",
            partial(silu300, prior="maf"),
            240,
            published=81.58,
            source=BAUER,
            target=81.8,
        ),
        Row(
            "mlp300-maf-iaf",
            "MLP 300-300, SiLU, MAF prior, IAF guide",
            partial(silu300, prior="maf", guide="iaf"),
            120,
            target=81.3,
        ),
        Row(
            "hvae2-vamp",
            "HVAE of 2 levels, SiLU, VampPrior",
            hierarchy,
            100,
            published=81.24,
            source=TOMCZAK,
            target=81.2,
        ),
        # The VampPrior paper's networks and test images; then its training, too.
        Gated(
            "gated300-standard",
            "paper's networks, normal prior, Adam, cosine from 2e-3",
            published,
            600,
            published=84.45,
            target=84.5,
        ),
        Gated(
            "gated300-vamp",
            "paper's networks, VampPrior, Adam, cosine from 2e-3",
            vamp300,
            300,
            batch_size=200,
            published=82.43,
            target=82.6,
        ),
        Gated(
            "gated300-maf",
            "paper's networks with LayerNorm, MAF prior, Adam, cosine from 2e-3",
            maf300,
            400,
            clip_norm=5000.0,
            published=81.58,
            source=BAUER,
            target=81.8,
        ),
        Gated(
            "gated300-realnvp",
            "paper's networks with LayerNorm, RealNVP prior, Adam, cosine from 2e-3",
            partial(published, prior="realnvp", layer_norm=True),
            200,
            clip_norm=5000.0,
            published=81.86,
            source=BAUER,
            target=81.8,
        ),
        Gated(
            "gated300-hierarchy-vamp",
            "paper's networks, 2 levels, VampPrior, Adam, cosine from 2e-3",
            partial(published_hierarchy, prior="vamp"),
            200,
            batch_size=200,
            clip_norm=5000.0,  # with a rate of 3e-3 and no largest norm, it diverged at epoch 62
            precision="medium",
            published=81.24,
            target=82.0,
        ),
        Gated(
            "gated300-hierarchy-maf",
            "paper's networks with LayerNorm, 2 levels, MAF prior, Adam, cosine from 2e-3",
            partial(published_hierarchy, prior="maf", layer_norm=True),
            200,
            batch_size=200,
            clip_norm=5000.0,
            target=81.3,
        ),
        PublishedRow("published-standard", "paper's recipe, normal prior", published, published=84.45, target=84.5),
        PublishedRow(
            "published-vamp",
            "paper's recipe, VampPrior",
            partial(published, prior="published-vamp"),
            published=82.43,
            target=82.6,
        ),
        PublishedRow(
            "published-hierarchy",
            "paper's recipe, 2 levels, normal prior",
            published_hierarchy,
            published=82.40,
            target=82.4,
        ),
        PublishedRow(
            "published-hierarchy-vamp",
            "paper's recipe, 2 levels, VampPrior",
            partial(published_hierarchy, prior="published-vamp"),
            published=81.24,
            target=82.0,
        ),
        # Rows that need a GPU.
        GpuRow(
            "conv-maf",
            "convolutional, MAF prior",
            partial(images, network="conv", latent_dim=40, prior="maf"),
            published=80.40,
            source=f"{CONV}, normal prior",
            target=79.5,
        ),
        GpuRow(
            "resnet-nsf-nsf",
            "residual, NSF prior and guide",
            partial(images, network="resnet", latent_dim=32, prior="nsf", guide="nsf"),
            published=79.63,
            source="Durkan 2019",
            target=79.0,
        ),
        # Static binarisation, with our own draw of the training images.
        Row(
            "static-mlp300-standard",
            "MLP 300-300, standard normal prior",
            mlp300,
            150,
            binarization="static",
            published=88.56,
            source=f"{TOMCZAK} {OTHER_FILE}",
            target=88.5,
        ),
        Row(
            "static-mlp300-vamp",
            "MLP 300-300, VampPrior",
            partial(mlp300, prior="vamp"),
            80,
            batch_size=200,
            binarization="static",
            published=85.57,
            source=f"{TOMCZAK} {OTHER_FILE}",
            target=85.5,
        ),
        GpuRow(
            "static-conv-vamp",
            "convolutional, VampPrior",
            partial(images, network="conv", latent_dim=40, prior="vamp"),
            binarization="static",
            published=81.09,
            source=f"{CONV} {OTHER_FILE}",
            target=81.0,
        ),
        # Ablations: one change at a time, at 60 epochs with the standard normal prior; then variants of full rows.
        Variant("short-mlp300", "SiLU, LayerNorm, rate 2e-3", silu300),
        Variant("short-mlp300-warmup", "the KL's weight grows over 20 epochs", silu300, kl_warmup=20),
        Variant("short-mlp300-gated", "gated units", mlp300),
        Variant("short-mlp300-dropout", "dropout of 0.1 in the decoder", partial(silu300, dropout=0.1)),
        Variant(
            "short-mlp300-tanh",
            "tanh, no LayerNorm, rate 1e-3",
            partial(silu300, activation=nn.Tanh, layer_norm=False),
            learning_rate=1e-3,
        ),
        Variant("short-mlp300-rate", "rate 1e-3", silu300, learning_rate=1e-3),
        Paper60("paper60", "paper's recipe, without its KL warm-up", published),
        Paper60("paper60-warmup", "the KL's weight grows over 20 epochs", published, kl_warmup=20),
        Paper60("paper60-adam", "Adam on gradients as they are", published, optimizer=torch.optim.Adam),
        Paper60("paper60-decay", "Adam, the rate decays as a cosine", published, optimizer=None),
        Paper60("paper60-rate", "Adam, cosine from 2e-3", published, optimizer=None, learning_rate=2e-3),
        Paper60(
            "paper60-hierarchy",
            "Adam, cosine from 2e-3, 2 levels",
            published_hierarchy,
            optimizer=None,
            learning_rate=2e-3,
        ),
        Paper60(
            "paper60-hierarchy-warmup",
            "Adam, cosine from 2e-3, 2 levels, the KL's weight grows over 20 epochs",
            published_hierarchy,
            optimizer=None,
            learning_rate=2e-3,
            kl_warmup=20,
        ),
        Paper60("paper60-batch", "batches of 200", published, batch_size=200),
        Paper60("paper60-init", "torch's initial weights", partial(published, he=False)),
        Paper60("paper60-norm", "LayerNorm", partial(published, layer_norm=True)),
        Paper60("paper60-silu", "SiLU instead of gates", partial(published, gated=False)),
        Paper60("paper60-average", "moving average of the weights, decay 0.999", published, average=0.999),
        Paper60(
            "paper60-ours",
            "ours: LayerNorm, torch's initial weights, Adam, cosine from 2e-3",
            mlp300,
            optimizer=None,
            learning_rate=2e-3,
        ),
        Paper60(
            "paper60-ours-average",
            "ours, and a moving average of the weights, decay 0.999",
            mlp300,
            optimizer=None,
            learning_rate=2e-3,
            average=0.999,
        ),
        BurdaRow(
            "burda1-vae-rate",
            "1 layer (Burda), rate 1e-3, half the epochs",
            burda,
            300,
            learning_rate=1e-3,
            variant_of="burda1-vae",
        ),
        OnwardRow(
            "mlp300-standard-iwae",
            "MLP 300-300, standard normal prior, then IWAE, k=10",
            mlp300,
            epochs=50,
            variant_of="mlp300-standard",
            after="mlp300-standard",
        ),
        OnwardRow(
            "mlp300-standard-onward",
            "MLP 300-300, standard normal prior, then more of the ELBO",
            mlp300,
            objective="elbo",
            particles=1,
            epochs=50,
            variant_of="mlp300-standard",
            after="mlp300-standard",
        ),
        OnwardRow(
            "mlp300-vamp-iwae",
            "MLP 300-300, VampPrior, then IWAE, k=10",
            partial(mlp300, prior="vamp"),
            variant_of="mlp300-vamp",
            after="mlp300-vamp",
        ),
        GatedOnward(
            "gated300-vamp-iwae",
            "paper's networks, VampPrior, then IWAE, k=10",
            vamp300,
            target=82.6,
            after="gated300-vamp",
        ),
        GatedOnward(
            "gated300-vamp-all",
            "paper's networks, VampPrior, then more of the ELBO on all images",
            vamp300,
            objective="elbo",
            particles=1,
            epochs=50,
            train_on_all=True,
            target=82.6,
            after="gated300-vamp",
        ),
        GatedOnward(
            "gated300-maf-iwae",
            "paper's networks with LayerNorm, MAF prior, then IWAE, k=10",
            maf300,
            target=81.3,
            after="gated300-maf",
        ),
        GatedOnward(
            "gated300-maf-iwae-all",
            "paper's networks with LayerNorm, MAF prior, then IWAE, k=10, on all images",
            maf300,
            epochs=50,
            train_on_all=True,
            target=81.3,
            after="gated300-maf",
        ),
        GatedOnward(
            "gated300-maf-iwae25-all",
            "paper's networks with LayerNorm, MAF prior, then IWAE, k=10 and k=25, on all images",
            maf300,
            epochs=25,
            particles=25,
            train_on_all=True,
            target=81.3,
            after="gated300-maf-iwae-all",
        ),
        OnwardRow(
            "mlp300-maf-iwae",
            "MLP 300-300, SiLU, MAF prior, then IWAE, k=10",
            partial(silu300, prior="maf"),
            variant_of="mlp300-maf",
            after="mlp300-maf",
        ),
    )
}
