"""What a pair is used for, on linear models whose codes and pictures are known in closed form, and on hierarchies."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from conftest import within
from shared.hierarchies import LinearHierarchy, LinearNormal, affine
from torch import nn

import pyrovae as pv
from pyrovae import guides, plots, priors, uses


class Linear:
    """x ~ N(W z + b, s^2), with the guide N(M x + m, diag(scale^2)): codes M x + m, pictures W z + b."""

    def __init__(self):
        self.W, self.b, self.s = torch.linspace(-1, 1.3, 15).reshape(5, 3) ** 2, torch.arange(5.0) - 1, 0.5
        self.M, self.m, self.scale = (
            torch.linspace(2, -1, 15).reshape(3, 5),
            torch.ones(3),
            torch.tensor([0.1, 0.2, 0.3]),
        )
        likelihood = LinearNormal(nn.Sequential(affine(self.W, self.b), nn.Dropout(0.5)), (5,), self.s)
        self.model = pv.GenerativeModel(priors.StandardNormal(3), likelihood)
        self.guide = guides.MeanFieldNormal(nn.Dropout(0.5), 3, num_features=5)
        self.guide.head = affine(torch.cat([self.M, torch.zeros_like(self.M)]), torch.cat([self.m, self.scale.log()]))
        self.x = torch.randn(4, 5)

    def code(self, x):
        return x @ self.M.T + self.m

    def picture(self, z):
        return z @ self.W.T + self.b


@pytest.fixture
def linear(double):
    """In train mode, with dropout, which would show if anything ran in it; puts its modules back."""
    linear = Linear()
    modules = [*linear.model.modules(), *linear.guide.modules()]
    linear.model.prior.eval()
    modes = [module.training for module in modules]
    yield linear
    assert [module.training for module in modules] == modes


def test_embedding_is_the_posterior_mean(linear):
    z = uses.embed(linear.guide, linear.x)
    assert torch.allclose(z, linear.code(linear.x))
    assert not z.requires_grad


def test_posterior_samples_are_drawn_from_q(linear):
    z = uses.sample_posterior(linear.guide, linear.x, 20_000)
    assert z.shape == (20_000, 4, 3)
    for dimension, scale in enumerate(linear.scale.tolist()):
        within(z[:, 1, dimension].mean().item(), linear.code(linear.x)[1, dimension].item(), scale / 20_000**0.5)
        within(z[:, 1, dimension].var().item(), scale**2, scale**2 * (2 / 20_000) ** 0.5)


def test_reconstruction(linear):
    assert torch.allclose(uses.reconstruct(linear.model, linear.guide, linear.x), linear.picture(linear.code(linear.x)))
    draws = uses.reconstruct(linear.model, linear.guide, linear.x[:1].expand(20_000, 5), mean=False)
    covariance = linear.W @ linear.scale.square().diag() @ linear.W.T + linear.s**2 * torch.eye(5)
    for pixel in (0, 4):
        variance = covariance[pixel, pixel].item()
        mean = linear.picture(linear.code(linear.x))[0, pixel].item()
        within(draws[:, pixel].mean().item(), mean, (variance / 20_000) ** 0.5)
        within(draws[:, pixel].var().item(), variance, variance * (2 / 20_000) ** 0.5)


@pytest.mark.parametrize("spherical", [False, True])
def test_interpolation_goes_from_one_reconstruction_to_the_other(linear, spherical):
    a, b = linear.x, torch.randn(4, 5)
    pictures = uses.interpolate(linear.model, linear.guide, a, b, 7, spherical=spherical)
    assert pictures.shape == (4, 7, 5)
    assert torch.allclose(pictures[:, 0], uses.reconstruct(linear.model, linear.guide, a))
    assert torch.allclose(pictures[:, -1], uses.reconstruct(linear.model, linear.guide, b))


def test_straight_line_between_codes(linear):
    a, b = linear.x, torch.randn(4, 5)
    third = linear.picture(2 / 3 * linear.code(a) + 1 / 3 * linear.code(b))
    assert torch.allclose(uses.interpolate(linear.model, linear.guide, a, b, 4)[:, 1], third)


class Plane:
    """Codes and pictures are the data themselves, (N, 2)."""

    def __init__(self):
        identity = affine(torch.eye(2), torch.zeros(2))
        self.model = pv.GenerativeModel(priors.StandardNormal(2), LinearNormal(identity, (2,), 1.0))
        self.guide = guides.MeanFieldNormal(nn.Identity(), 2, num_features=2)
        self.guide.head = affine(torch.eye(4, 2), torch.zeros(4))


def test_arc_between_codes(double):
    plane = Plane()
    angle, radius = torch.tensor([0.3, 2.9]), torch.tensor([2.0, 0.5])
    a = torch.tensor([[2.0, 0.0], [0.5, 0.0]])
    b = radius[:, None] * torch.stack([angle.cos(), angle.sin()], -1)
    arc = uses.interpolate(plane.model, plane.guide, a, b, 5, spherical=True)
    # Of equal lengths: on the circle, at even steps of the angle, the short way round.
    assert torch.allclose(arc.norm(dim=-1), radius[:, None].expand(2, 5))
    assert torch.allclose(torch.atan2(arc[..., 1], arc[..., 0]), angle[:, None] * torch.linspace(0, 1, 5))


def test_arc_of_codes_in_line_is_the_line(double):
    plane = Plane()
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]])
    b = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [3.0, 1.0]])  # the same way, opposite, from the origin
    line = uses.interpolate(plane.model, plane.guide, a, b, 3)
    arc = uses.interpolate(plane.model, plane.guide, a, b, 3, spherical=True)
    assert torch.allclose(arc[:2], line[:2])
    assert arc.isfinite().all()


def test_traversal_changes_the_chosen_latent_alone(linear):
    z, values = torch.randn(4, 3), [-2.0, 0.5, 3.0]
    before = z.clone()
    pictures = uses.traverse(linear.model, z, 1, values)
    assert pictures.shape == (4, 3, 5)
    assert torch.equal(z, before)
    for step, value in enumerate(values):
        moved = torch.stack([z[:, 0], torch.full((4,), value), z[:, 2]], -1)
        assert torch.allclose(pictures[:, step], linear.picture(moved))
    assert torch.equal(uses.traverse(linear.model, z, -2, torch.tensor(values)), pictures)


def test_direction_of_an_attribute_in_closed_form(linear):
    x = torch.randn(11, 5)
    mask = torch.arange(11) < 4
    expected = linear.M @ (x[:4].mean(0) - x[4:].mean(0))
    assert torch.allclose(uses.attribute_direction(linear.guide, x, mask), expected)


def test_direction_within_groups_leaves_out_what_differs_between_them(linear):
    """x = that of its group + attribute * shift, with unlike shares of the attribute in the groups."""
    shift, of_group = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0]), torch.randn(3, 5)
    groups = torch.tensor([0] * 8 + [1] * 5 + [2] * 3)
    mask = torch.tensor([True] * 6 + [False] * 2 + [True] + [False] * 4 + [True] * 3)
    x = of_group[groups] + mask.unsqueeze(1) * shift
    direction = uses.attribute_direction(linear.guide, x, mask, groups=groups)
    assert torch.allclose(direction, linear.M @ shift)
    assert not torch.allclose(uses.attribute_direction(linear.guide, x, mask), linear.M @ shift, atol=0.1)
    # Groups whose attribute shifts them differently count as often as they have data.
    x = x + ((groups == 1) & mask).unsqueeze(1) * torch.ones(5)
    direction = uses.attribute_direction(linear.guide, x, mask, groups=groups)
    assert torch.allclose(direction, linear.M @ (shift + 5 / 13))


def test_edit(linear):
    direction, amounts = torch.tensor([1.0, -2.0, 0.5]), [0.0, 1.0, -0.7]
    pictures = uses.edit(linear.model, linear.guide, linear.x, direction, amounts)
    assert pictures.shape == (4, 3, 5)
    assert torch.allclose(pictures[:, 0], uses.reconstruct(linear.model, linear.guide, linear.x))
    for step, amount in enumerate(amounts):
        assert torch.allclose(pictures[:, step], linear.picture(linear.code(linear.x) + amount * direction))


def test_direction_of_amount_one_makes_the_mean_without_the_mean_with(linear):
    x = torch.randn(9, 5)
    mask = torch.arange(9) % 3 == 0
    direction = uses.attribute_direction(linear.guide, x, mask)
    moved = uses.edit(linear.model, linear.guide, x[~mask].mean(0, keepdim=True), direction, [1.0])
    assert torch.allclose(moved[0, 0], uses.reconstruct(linear.model, linear.guide, x[mask].mean(0, keepdim=True))[0])


def test_only_draws_take_random_numbers(linear):
    before = torch.get_rng_state()
    uses.embed(linear.guide, linear.x)
    uses.reconstruct(linear.model, linear.guide, linear.x)
    uses.interpolate(linear.model, linear.guide, linear.x, linear.x.flip(0), spherical=True)
    uses.traverse(linear.model, torch.zeros(1, 3), 0, [1.0])
    direction = uses.attribute_direction(linear.guide, linear.x, torch.arange(4) > 1)
    uses.edit(linear.model, linear.guide, linear.x, direction, [1.0])
    assert torch.equal(torch.get_rng_state(), before)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(uses.reconstruct(linear.model, linear.guide, linear.x, mean=False))
        draws.append(uses.sample_posterior(linear.guide, linear.x, 2))
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(draws[1], draws[3])


def test_batches_change_nothing(linear, monkeypatch):
    mask = torch.arange(4) > 1

    def results():
        torch.manual_seed(0)
        return [
            uses.embed(linear.guide, linear.x),
            uses.reconstruct(linear.model, linear.guide, linear.x),
            uses.interpolate(linear.model, linear.guide, linear.x, linear.x.flip(0)),
            uses.attribute_direction(linear.guide, linear.x, mask),
        ]

    whole = results()
    monkeypatch.setattr(uses, "_ROWS", 3)
    for first, second in zip(whole, results(), strict=True):
        assert torch.allclose(first, second, rtol=1e-12)
    assert uses.sample_posterior(linear.guide, linear.x, 6).shape == (6, 4, 3)


# --- hierarchies ------------------------------------------------------------------------------------------------------


def test_uses_of_a_hierarchy(double):
    hierarchy = LinearHierarchy()
    model, guide, x = hierarchy.model(), hierarchy.top_down(), hierarchy.data(4)
    z = uses.embed(guide, x)
    assert z.shape == (4, 5)
    picture = z[:, :3] @ hierarchy.W.T + hierarchy.w
    assert torch.allclose(uses.reconstruct(model, guide, x), picture)
    assert uses.sample_posterior(guide, x, 6).shape == (6, 4, 5)
    assert uses.interpolate(model, guide, x, x.flip(0), 3).shape == (4, 3, 5)
    moved = z.clone()
    moved[:, 1] = 2.0
    assert torch.allclose(uses.traverse(model, z, 1, [2.0])[:, 0], model.decode(moved))

    # The top layer alone: codes E[z2|x], pictures by way of E[z1|z2].
    z2 = uses.embed(guide.top, x)
    assert torch.allclose(z2, z[:, 3:])

    def from_z2(z2):
        return (z2 @ hierarchy.A.T + hierarchy.a) @ hierarchy.W.T + hierarchy.w

    assert torch.allclose(uses.reconstruct(model, guide.top, x), from_z2(z2))
    assert torch.allclose(uses.interpolate(model, guide.top, x, x.flip(0), 3)[:, 1], from_z2((z2 + z2.flip(0)) / 2))
    moved = torch.stack([z2[:, 0], torch.full((4,), -1.5)], -1)
    assert torch.allclose(uses.traverse(model, z2, 1, [-1.5])[:, 0], from_z2(moved))
    direction = torch.tensor([0.5, -1.0])
    assert torch.allclose(uses.edit(model, guide.top, x, direction, [2.0])[:, 0], from_z2(z2 + 2 * direction))


def test_draws_from_a_hierarchy_go_through_every_layer(double):
    """x' given x by way of q(z2|x), p(z1|z2), p(x|z1): its variance has all three parts."""
    hierarchy = LinearHierarchy()
    model, top = hierarchy.model(), hierarchy.top_down().top
    x = hierarchy.data(1)
    draws = uses.reconstruct(model, top, x.expand(40_000, 5), mean=False)
    covariance2 = top.posterior(x).covariance_matrix[0]
    covariance1 = hierarchy.A @ covariance2 @ hierarchy.A.T + hierarchy.s1**2 * torch.eye(3)
    variance = (hierarchy.W @ covariance1 @ hierarchy.W.T + hierarchy.s**2 * torch.eye(5))[2, 2].item()
    within(draws[:, 2].var().item(), variance, variance * (2 / 40_000) ** 0.5)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("use", "match"),
    [
        (lambda m, g, x: uses.interpolate(m, g, x, x[:2]), r"same shape, found \(4, 5\) and \(2, 5\)"),
        (lambda m, g, x: uses.interpolate(m, g, x, x, 1), "must be 2 or more, found 1"),
        (lambda m, g, x: uses.interpolate(m, g, x, x, 0), "num_steps must be 1 or more"),
        (lambda m, g, x: uses.sample_posterior(g, x, 0), "num_samples must be 1 or more"),
        (lambda m, g, x: uses.traverse(m, torch.zeros(3), 0, [1.0]), r"codes z \(N, D\).*found \(3,\)"),
        (lambda m, g, x: uses.traverse(m, torch.zeros(1, 3), 3, [1.0]), "found .* and 3"),
        (lambda m, g, x: uses.traverse(m, torch.zeros(1, 3), 0, []), "values must be a list of at least one number"),
        (lambda m, g, x: uses.traverse(m, torch.zeros(1, 3), 0, 1.0), "values must be a list"),
        (lambda m, g, x: uses.edit(m, g, x, torch.zeros(2), [1.0]), r"must be \(3,\), like the codes, found \(2,\)"),
        (lambda m, g, x: uses.edit(m, g, x, torch.zeros(3), [[1.0]]), "amounts must be a list"),
        (
            lambda m, g, x: uses.attribute_direction(g, x, torch.arange(4)),
            r"bool \(4,\), for instance labels == 7; found torch.int64",
        ),
        (lambda m, g, x: uses.attribute_direction(g, x, torch.ones(3) > 0), r"bool \(4,\)"),
        (lambda m, g, x: uses.attribute_direction(g, x, torch.ones(4) > 0), "4 of 4 with it"),
        (lambda m, g, x: uses.attribute_direction(g, x, torch.zeros(4) > 0), "0 of 4 with it"),
        (
            lambda m, g, x: uses.attribute_direction(g, x, torch.arange(4) > 1, groups=(torch.arange(4) > 1).long()),
            "in the same group; found 2 of 4",
        ),
        (
            lambda m, g, x: uses.attribute_direction(g, x, torch.arange(4) > 1, groups=torch.ones(4)),
            r"whole numbers \(4,\), for instance labels; found torch.float64",
        ),
    ],
)
def test_errors(linear, use, match):
    with pytest.raises(ValueError, match=match):
        use(linear.model, linear.guide, linear.x)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_table_of_images_puts_each_in_its_place():
    images = np.random.default_rng(0).random((2, 3, 1, 4, 5))
    ax = plots.image_table(torch.as_tensor(images), row_labels=["a", "b"], column_labels=[-1, 0, 1], title="one latent")
    shown = ax.images[0].get_array().squeeze()
    height, width = shown.shape[0] // 2, shown.shape[1] // 3
    for row in range(2):
        for column in range(3):
            tile = shown[row * height : (row + 1) * height, column * width : (column + 1) * width]
            assert np.allclose(tile[-4:, -5:], images[row, column, 0])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["-1", "0", "1"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b"]
    # Each label stands at its images, not at another's.
    assert [int(x // width) for x in ax.get_xticks()] == [0, 1, 2]
    assert [int(y // height) for y in ax.get_yticks()] == [0, 1]
    _, given = plt.subplots()
    assert plots.image_table(np.ones((1, 2, 3, 4, 4)), ax=given) is given


@pytest.mark.parametrize(
    ("images", "options", "match"),
    [
        (np.ones((6, 1, 4, 4)), {}, r"\(rows, columns, 1 or 3, height, width\), found shape \(6, 1, 4, 4\)"),
        (np.ones((2, 3, 2, 4, 4)), {}, "1 or 3"),
        (np.ones((2, 3, 1, 4, 4)), {"row_labels": ["a"]}, "row_labels must have 2 entries, found 1"),
        (np.ones((2, 3, 1, 4, 4)), {"column_labels": "ab"}, "column_labels must have 3 entries, found 2"),
    ],
)
def test_errors_of_tables(images, options, match):
    with pytest.raises(ValueError, match=match):
        plots.image_table(images, **options)


def test_arrays_in_place_of_tensors(linear):
    x, mask, z = linear.x, torch.tensor([True, False, True, False]), torch.randn(4, 3)
    for use in (
        lambda x, z, mask: uses.embed(linear.guide, x),
        lambda x, z, mask: uses.reconstruct(linear.model, linear.guide, x),
        lambda x, z, mask: uses.interpolate(linear.model, linear.guide, x, x),
        lambda x, z, mask: uses.attribute_direction(linear.guide, x, mask),
        lambda x, z, mask: uses.edit(linear.model, linear.guide, x, z[0], [0.5]),
        lambda x, z, mask: uses.traverse(linear.model, z, 0, [1.0, 2.0]),
        lambda x, z, mask: linear.model.decode(z),
    ):
        torch.testing.assert_close(use(x.numpy(), z.numpy(), mask.numpy()), use(x, z, mask))
    with pytest.raises(TypeError, match="x must be a tensor or an array, found list: torch.as_tensor"):
        uses.embed(linear.guide, [1.0])


def test_latents_of_a_hierarchy_as_an_array():
    model, _ = pv.two_layer_vae((4,), latent_dims=(3, 2), hidden_features=(5, 5))
    z = torch.randn(6, 2)
    torch.testing.assert_close(model.decode(z.double().numpy()), model.decode(z))


def test_one_datum_in_place_of_a_batch(linear):
    x = linear.x[0]
    with pytest.raises(
        ValueError, match=r"shape \(N, 5\), found \(5,\) for x, one datum: add a leading axis, x\[None\]"
    ):
        uses.reconstruct(linear.model, linear.guide, x)
    with pytest.raises(ValueError, match=r"found \(5,\) for a, one datum"):
        uses.interpolate(linear.model, linear.guide, x, x)
    guide = guides.MeanFieldNormal(pv.nets.ConvEncoder((1, 8, 8), [4], 6), 2)
    with pytest.raises(ValueError, match=r"shape \(N, 1, 8, 8\), found \(1, 8, 8\) for x, one datum"):
        uses.embed(guide, torch.rand(1, 8, 8))
    assert uses.embed(guide, torch.rand(1, 1, 8, 8)).shape == (1, 2)
