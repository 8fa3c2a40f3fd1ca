"""gradcam.py: maps, scores and flip rates computed by hand, the command line on a tiny world."""

import copy
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import write_world
from PIL import Image, ImageDraw, ImageOps

import common
import gradcam as g
import train

NAMES, MEANS = list(common.PALETTE), common.rgb(common.PALETTE)
PAINTING = g.Painting("background", None, NAMES, MEANS)


def a_split(n=40, size=28):
    """A Split of random pictures on random colours."""
    gen = torch.Generator().manual_seed(0)
    gray = torch.randint(0, 256, (n, size, size), generator=gen, dtype=torch.uint8)
    colours = torch.randint(0, 10, (n,), generator=gen)
    images = common.paint(gray, MEANS[colours], gen)
    return common.Split(images, torch.arange(n) % 10, colours, gray)


def a_subject(name="simplecnn", size=28, layer="relu"):
    torch.manual_seed(0)
    model = common.build_model(name, size=(size, size)).eval()
    checkpoint = {"args": {"model": name, "width": 4}, "classes": 10, "size": [size, size]}
    return g.Subject(model, checkpoint, layer, (size // 4, size // 4))


# ---- heat maps

A = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [0.0, 1.0]]]])  # (1,2,2,2)
G = torch.tensor([[[[1.0, -1.0], [2.0, 2.0]], [[0.0, -4.0], [0.0, 0.0]]]])


def test_both_kinds_of_map_by_hand():
    assert torch.equal(g.gradcam(A, G), A[:, 0] * 1 + A[:, 1] * -1)  # mean gradients 1 and -1
    assert torch.equal(g.hirescam(A, G), torch.tensor([[[1.0, -6.0], [6.0, 8.0]]]))
    pooled = G[:, :, :1, :1].expand_as(G)  # before a pooled head: alike at every place
    assert torch.equal(g.gradcam(A, pooled), g.hirescam(A, pooled))


class Linear(nn.Module):
    """A net whose map is its input, so that the gradient is a row of the head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.look, self.fc = nn.Identity(), nn.Linear(12, 3)

    def forward(self, x):
        return self.fc(self.look(x).flatten(1))


def test_explain_finds_the_gradient_of_the_chosen_logit():
    model, x = Linear(), torch.rand(4, 3, 2, 2)
    target = torch.tensor([0, 1, 2, 1])
    e = g.explain(model, model.look, x, target)
    assert torch.equal(e.activation, x)
    assert torch.equal(e.gradient, model.fc.weight[target].view(4, 3, 2, 2))
    unasked = g.explain(model, model.look, x).gradient  # of the predicted class
    assert torch.equal(unasked, model.fc.weight[model(x).argmax(1)].view(4, 3, 2, 2))
    assert not model.look._forward_hooks and model.fc.weight.grad is None


def test_heat_is_rectified_and_a_batch_equals_one_at_a_time():
    subject, split = a_subject()._replace(cam="hirescam"), a_split(g.BATCH + 1)
    heat = g.heat_of(subject, split)
    e = g.explain(subject.model, subject.model.relu, split.x(slice(7)))
    assert torch.allclose(heat.maps[:7], g.hirescam(e.activation, e.gradient).clamp(min=0))
    assert torch.allclose(heat.confidence[:7], e.logits.softmax(1).amax(1))
    last = g.heat_of(subject, split.take([-1]))
    assert torch.allclose(heat.maps[-1:], last.maps, rtol=1e-4, atol=1e-6)


def test_hirescam_adds_up_to_the_logit_without_bias_and_gradcam_does_not():
    subject, split = a_subject(), a_split(20)
    e = g.explain(subject.model, subject.model.relu, split.x(slice(20)))
    logit = e.logits.amax(1) - subject.model.fc.bias.detach()[e.logits.argmax(1)]
    sums = {cam: make(e.activation, e.gradient).sum((1, 2)) for cam, make in g.CAMS.items()}
    assert torch.allclose(sums["hirescam"], logit, atol=1e-5)
    assert (sums["gradcam"] - logit).abs().min() > 1e-3


def test_the_deepest_map_of_a_resnet_that_is_four_pixels_wide():
    subject, split = a_subject("resnet18", 32), a_split(2, 32)
    assert g.find_layer(subject.model, split, "resnet") == ("layer2", (4, 4))


# ---- scores


def test_share_area_lift_and_pointing_by_hand():
    gray = torch.zeros(5, 4, 4, dtype=torch.uint8)
    gray[:4, :, 0] = 26  # the left column; 26 / 255 is just above 0.1
    gray[:4, :, 1] = 25  # just below
    maps = torch.zeros(5, 4, 4)
    maps[0, 0, 0], maps[0, 3, 3] = 3, 1
    maps[2, 0, 0], maps[2, 0, 3], maps[2, 1, 1] = 2, 2, 1  # a tie, half of it on the digit
    maps[3, 0, 0], maps[3, 0, 3] = 0.95, 1  # nearly as hot does not count
    maps[4] = 1  # picture 1 has no heat, picture 4 no digit
    s = g.heat_scores(maps, gray)
    assert s.lift[[0, 2]].tolist() == [3, 1.6]  # shares .75 and .4 of the heat, on a quarter
    assert s.pointing[[0, 2, 3]].tolist() == [1, 0.5, 0]
    assert s.lift[[1, 4]].isnan().all() and s.pointing[[1, 4]].isnan().all()


def test_summary_leaves_out_maps_without_a_score():
    lift = torch.tensor([1, 2, 3, torch.nan, 2, 2.5]).double()
    pointing = torch.tensor([1, 0, 0.5, torch.nan, 0, 1]).double()
    s = g.summary(g.Scores(lift, pointing))
    assert (s["n"], s["zero_maps"], s["lift"]) == (6, 1, pytest.approx(2.1))
    assert s["lift_with_empty"] == pytest.approx(10.5 / 6)
    assert s["pointing"]["rate"] == 0.5 and s["pointing"]["n"] == 5 and "k" not in s["pointing"]
    assert g.summary(g.Scores(lift[3:4], pointing[3:4]))["lift"] is None


def test_spearman_with_ties_by_hand():
    # ranks 1 2.5 2.5 4 and 1 3 2 4 around their mean 2.5: products 4.5, squares 4.5 and 5
    a, b = torch.tensor([[0.0, 5.0, 5.0, 9.0]]), torch.tensor([[1.0, 30.0, 2.0, 40.0]])
    assert g.spearman(a, b).item() == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert g.spearman(a, -a).item() == pytest.approx(-1)
    assert g.spearman(a, torch.ones(1, 4)).isnan()


def test_the_auc_is_the_share_of_pairs_in_order_and_a_tie_is_half():
    low, high = torch.arange(10.0), torch.arange(10.0, 22)
    assert (g.auc(high, low), g.auc(low, high)) == (1, 0)
    assert g.auc(torch.zeros(12), torch.zeros(10)) == 0.5
    mixed = torch.tensor([0.0] * 5 + [9.0] * 15)  # below all but a tie of ten, above all but one
    assert g.auc(mixed, low) == pytest.approx((5 * 0.5 + 15 * 9.5) / 200)
    assert g.auc(high[:9], low) is None and g.auc(high, low[:9]) is None


def test_what_an_answer_follows_is_asked_where_digit_and_colour_disagree():
    labels, colours = torch.zeros(50, dtype=torch.int64), torch.ones(50, dtype=torch.int64)
    predicted = torch.tensor([0] * 20 + [1] * 20 + [2] * 10)
    colours[:5] = 0  # a 0 on its own colour says nothing; a 2 follows neither
    lift = torch.where(predicted == 0, 1.0, torch.nan)  # an empty map is a low one
    found = g.told_apart(lift, torch.ones(50), predicted, labels, colours)
    counts = {"followed_digit": 15, "followed_colour": 20}
    assert found == {**counts, "auc": 1, "auc_random": 0.5}


# ---- flip rates


def test_flip_rates_by_hand():
    # four colours; picture 0 is a 0 on colour 1, picture 1 a 1 on its own, picture 2 a 0 on 3
    on_colour = torch.tensor([[0, 2, 2, 2], [1, 1, 1, 1], [1, 1, 2, 1]])
    labels, colours = torch.tensor([0, 1, 0]), torch.tensor([1, 1, 3])
    swapped, partner = torch.tensor([2, 0, 0]), torch.tensor([2, 0, 1])
    rates = g.flip_rates(on_colour, swapped, partner, labels, colours)
    background, digit = rates["background"], rates["digit"]
    assert background["by_digit"] == pytest.approx({"0": 1 / 3, "1": 0})
    assert background["changed"]["rate"] == pytest.approx(2 / 9)
    # picture 0 gets another 0 and does not count; the others change their answer
    assert [digit["changed"][key] for key in "kn"] == [2, 2]


class SeesColour(nn.Module):
    """Names the palette colour of the top row, which no digit of the tiny world touches."""

    def __init__(self):
        super().__init__()
        self.means = nn.Parameter(MEANS)

    def forward(self, x):
        return -torch.cdist(x[:, :, 0].mean(2), self.means)


class SeesShape(nn.Module):
    """Counts the lit 4x4 cells of the digit, whose pixels are 0.6 on every background."""

    def forward(self, x):
        cells = ((x * 255).round() == 153).all(1).sum((1, 2)).add(8).div(16, rounding_mode="floor")
        return nn.functional.one_hot(cells, 30).float()


def test_counterfactuals_of_a_net_that_sees_colour_and_of_one_that_sees_shape(tiny, tmp_path):
    tiny(tmp_path, n=200)
    split = common.load_split(tmp_path, "test_hard")
    painting = g.painting_of(tmp_path)
    nets = {"colour": SeesColour(), "shape": SeesShape()}
    answers, partner = g.counterfactuals(nets, split, painting, seed=0)
    on_colour, swapped = answers["colour"]
    assert torch.equal(on_colour, torch.arange(10).expand(100, 10))
    assert torch.equal(swapped, split.colors)
    cells = (split.gray > 0).sum((1, 2)) // 16
    on_colour, swapped = answers["shape"]
    assert torch.equal(on_colour, cells[:, None].expand(100, 10))
    assert torch.equal(swapped, cells[partner]) and not torch.equal(partner, torch.arange(100))


def test_repainting_changes_the_colour_and_keeps_the_texture():
    split = a_split()._replace(gray=torch.zeros(40, 28, 28, dtype=torch.uint8))  # no digit
    black, brown = (
        g.repaint(split, torch.full((40,), c), PAINTING, seed=1).images[:, 0].float()
        for c in (9, 7)
    )
    unclipped = (black > 0) & (brown < 255)
    assert ((brown - black - 140).abs()[unclipped] <= 1).all() and unclipped.float().mean() > 0.3


def test_a_world_is_repainted_in_its_own_palette_with_its_own_variance(tmp_path):
    palette = [[f"c{k}", [0, 128, 25 * k]] for k in range(10)]
    meta = {"recipe": "digit", "sigma2": 0.0, "palette": palette}
    common.save_json(meta, tmp_path / "meta.json")
    split = a_split()
    painting = g.painting_of(tmp_path)
    assert painting.names[1] == "c1"
    painted = g.repaint(split, torch.full_like(split.labels, 5), painting, seed=0).images
    own = torch.tensor([0, 128, 125]).view(1, 3, 1, 1)
    assert (painted - split.gray[:, None] / 255 * own).abs().max() <= 0.51


def test_what_cannot_be_repainted_says_what_is_missing(tmp_path):
    def why(split, **meta):
        common.save_json(meta, tmp_path / "meta.json")
        return g.obstacle_to(g.painting_of(tmp_path), split, tmp_path)

    split, grey = a_split(), ["grey", [9, 9, 9]]
    needed = 'meta.json must hold "recipe": one of "background", "flat", "digit", "cmnist", and'
    assert needed in g.obstacle_to(g.painting_of(tmp_path), split, tmp_path)
    assert "no colors" in why(split._replace(colors=None), recipe="background")
    assert needed in why(split, recipe="background")
    assert why(split, recipe="digit", palette=[grey] * 10) is None
    assert needed in why(split, recipe="plaid")
    assert "the colours of classes 0 to 9" in why(split, recipe="flat", palette=[grey] * 9)
    short, bright = [["red", [9, 9]]] * 10, [["red", [9, 9, 999]]] * 10
    for broken in ("red", ["red"], [["red", 9]], short, bright):
        assert needed in why(split, recipe="flat", palette=broken)


# ---- null rows and the pictures of the figures


def test_the_cascade_randomises_from_the_output_down_and_keeps_the_explained_class():
    subject, split = a_subject()._replace(cam="hirescam"), a_split(6)
    steps = g.cascade(subject, split, seed=0)
    order = ["fc", "conv3", "conv2", "conv1"]
    assert list(steps) == ["fc", "fc+conv3", "fc+conv3+conv2", "fc+conv3+conv2+conv1"]
    real = g.heat_of(subject, split)
    fresh = g.random_net(subject.checkpoint, common.stream(0, "random weights 0"))
    assert not fresh.training, "batch norm would look at other pictures"
    hybrid = copy.deepcopy(subject.model)
    for layer, step in zip(order, steps.values(), strict=True):
        getattr(hybrid, layer).load_state_dict(getattr(fresh, layer).state_dict())
        maps = g.heat_of(subject._replace(model=hybrid), split, real.predicted).maps
        by_hand = g.spearman(real.maps.flatten(1), maps.flatten(1))
        assert step["rank_correlation"][0] == pytest.approx(by_hand.nanmean().item())
        assert step["lift"][0] == g.summary(g.heat_scores(maps, split.gray))["lift"]
        assert len(step["lift"]) == g.SANITY_DRAWS


def test_the_cascade_counts_maps_without_a_rank_in_every_draw():
    subject = a_subject()
    nn.init.zeros_(subject.model.fc.weight)  # its maps are empty, whatever the other one's are
    steps = g.cascade(subject, a_split(6), seed=0)
    assert {step["without"] for step in steps.values()} == {6 * g.SANITY_DRAWS}


def test_the_null_rows_score_noise_and_a_constant():
    random = g.null_rows(a_subject(), a_split(200), seed=1)["random_map"]["maps"]["test_hard"]
    uniform = g.summary(g.heat_scores(torch.ones(200, 7, 7), a_split(200).gray))
    assert uniform["lift"] == pytest.approx(1)
    assert random["lift"] == pytest.approx(1, abs=0.02) and random["lift"] != 1


def test_the_ceiling_is_the_digit_as_coarse_as_a_map():
    gray = torch.zeros(1, 28, 28, dtype=torch.uint8)
    gray[0, 12:16, 8:12] = 255  # one cell of a 7x7 map, which blurs over its neighbours
    ceiling = g.null_rows(a_subject(), a_split(1)._replace(gray=gray), seed=1)["ceiling"]
    scores = ceiling["maps"]["test_hard"]
    inside = 0.625 + 0.875 + 0.875 + 0.625  # of 4, along either axis
    assert scores["lift"] == pytest.approx((inside / 4) ** 2 * 49)
    assert scores["pointing"]["rate"] == 1


def test_the_typical_digit_is_the_median_by_flip_rate():
    assert g.typical({"0": 0.3, "1": 0.1, "5": 0.2}) == 5
    assert g.typical({"0": 0.3, "1": 0.1, "5": 0.2, "7": 0.9}) == 5


def test_the_figure_shows_a_typical_digit_on_ten_colours_and_the_maps_of_two_rows():
    split, subject = a_split(), a_subject()
    subjects = dict.fromkeys(("a_s1", "a_s2", "b_s1", "c_s1"), subject)
    classes = [f"class {k}" for k in range(10)]
    flips = {"background": {"by_digit": {"1": 0.9, "3": 0.5, "8": 0.1}}}
    (title, shown), *rows = g.scene_of(subjects, split, PAINTING, classes, 42, flips).items()
    assert title.startswith("Grad-CAM: the first class 3 of test_hard")
    assert [below for _, below, _ in shown] == [f"class 3 on {name}" for name in NAMES]
    images = torch.stack([image for image, _, _ in shown])
    images = images.to(memory_format=torch.channels_last)
    for c in range(10):
        alone = g.repaint(split.take([3]), torch.tensor([c]), PAINTING, 42).images
        assert torch.equal(images[c : c + 1], alone)
    heat = g.heat_of(subject, common.Split(images, torch.full((10,), 3), None, None))
    fooled = int(((heat.predicted != 3) & (torch.arange(10) != 3)).sum())
    assert [title for title, _ in rows] == [
        f"{n}: fooled on {fooled} of 9" for n in ("a_s1", "b_s1")
    ]
    maps = torch.stack([enlarged for enlarged, _, _ in rows[0][1]])
    assert torch.equal(maps, g.upsample(heat.maps, (28, 28)))
    for k, (_, below, look) in enumerate(rows[1][1]):
        mark = "✓" if heat.predicted[k] == 3 else "✗"
        assert below == f"{mark} class {heat.predicted[k]} ({heat.confidence[k]:.2f})"
        assert torch.equal(look["outline"], split.gray[3])
        assert look["weight"] == ("normal" if mark == "✓" else "bold")


# ---- what each answer wants to see


def ascend(model, label, size=(2, 2), seed=0, **settings):
    settings = {"steps": 100, "shift": 0, "tv": 0, **settings}
    return g.maximise(model, torch.tensor(label), size, common.stream(seed, "x"), **settings)


def test_on_a_linear_net_the_maximum_is_the_sign_pattern_of_the_weights():
    model = Linear()
    x = ascend(model, [0, 1, 2])
    assert torch.equal(x.flatten(1), (model.fc.weight > 0).float())
    assert model.fc.weight.grad is None


def test_total_variation_makes_the_picture_flat_along_both_axes():
    model = Linear()
    rough, flat = ascend(model, [0]), ascend(model, [0], tv=5.0, step_size=0.01)
    assert rough.diff(dim=2).abs().max() == 1 and rough.diff(dim=3).abs().max() == 1
    assert flat.diff(dim=2).abs().max() < 0.1 and flat.diff(dim=3).abs().max() < 0.1


def test_the_search_begins_at_mid_grey_with_a_little_noise():
    x = ascend(Linear(), [0] * 50, (20, 20), steps=0)
    assert x.mean() == pytest.approx(0.5, abs=0.002) and x.std() == pytest.approx(0.05, abs=0.002)


def test_the_penalty_means_the_same_for_an_answer_of_any_scale():
    class Loud(nn.Module):  # both answers want a bright left half, the second one far more
        def __init__(self, scale):
            super().__init__()
            self.scale = torch.tensor([1e-3, scale])

        def forward(self, x):
            return x[..., :4].sum((1, 2, 3))[:, None] * self.scale

    quiet, loud = (
        ascend(Loud(scale), [0, 1], (8, 8), tv=0.5, step_size=0.01) for scale in (1e-3, 1e3)
    )
    assert (quiet - loud).abs().max() < 0.01
    assert quiet[..., :4].mean() > 0.9 and quiet[..., 5:].mean() < 0.7


def test_shifts_make_the_picture_look_alike_from_every_place():
    class Corner(nn.Module):  # wants the pixel in one corner bright
        def forward(self, x):
            return x[:, :, 0, 0].sum(1, keepdim=True)

    still = ascend(Corner(), [0], (8, 8))
    shifted = ascend(Corner(), [0], (8, 8), shift=1, steps=300)
    assert still[0, :, 0, 0].min() == 1 and still[0, :, 1, 1].max() < 0.9
    near = [0, 1, 7]  # a pixel away in both directions
    assert shifted[0][:, near][:, :, near].min() == 1 and shifted[0, :, 4, 4].max() < 0.9


class Reads(nn.Module):
    """Two classes, red and green: the colour of the picture, or with -1 the other one."""

    def __init__(self, sign=1):
        super().__init__()
        self.sign = sign

    def forward(self, x):
        return 10 * self.sign * x[:, :2].mean((2, 3))


def test_what_a_net_wants_to_see_is_read_by_another():
    about = {"classes": 2, "size": (4, 4)}

    def wants(reader):
        return g.wants_of(Reads(), about, reader, seed=0, device="cpu")

    measures, images, confidence = wants((Reads(), about))
    assert measures["read by an oracle"] == 1
    red, green = images.float().mean((2, 3))[:, :2]
    assert red[0] == 255 > red[1] and green[1] == 255 > green[0]
    sure = torch.stack([10 * (red[0] - red[1]), 10 * (green[1] - green[0])]).div(255).sigmoid()
    assert torch.allclose(confidence, sure, atol=1e-3)
    assert measures["confidence"] == pytest.approx(sure.mean().item(), abs=0.01)
    assert wants((Reads(-1), about))[0]["read by an oracle"] == 0
    assert wants(None)[0]["read by an oracle"] is None
    assert wants((Reads(), {**about, "size": [5, 5]}))[0]["read by an oracle"] is None


# ---- what the features hold


def factorial():
    """Features (300,6) of 3 colours x 4 digits, each fully crossed: colour, digit, noise."""
    colour, digit, copy = (
        part.flatten()
        for part in torch.meshgrid(*(torch.arange(n) for n in (3, 4, 25)), indexing="ij")
    )
    noise = torch.randn(25, 2, generator=common.stream(0, "noise"))[copy]
    shown = torch.tensor([[0.0, 1], [2, 0], [5, 3]])[colour]
    read = torch.tensor([[1.0, 0], [0, 1], [0, 0], [2, 2]])[digit]
    return torch.cat([shown, read, noise], 1), colour, digit


def test_erasure_takes_all_of_a_concept_and_moves_nothing_else():
    z, colour, digit = factorial()
    left = g.eraser(z, colour)(z)
    assert torch.allclose(left[:, :2], z[:, :2].mean(0).expand(len(z), 2), atol=1e-4)
    assert torch.allclose(left[:, 2:], z[:, 2:], atol=1e-4)
    left = g.eraser(z, digit)(z)
    assert torch.allclose(left[:, [0, 1, 4, 5]], z[:, [0, 1, 4, 5]], atol=1e-4)


def test_no_linear_trace_is_left_where_concept_and_features_are_mixed():
    z, colour, _ = factorial()
    gen = common.stream(0, "mixture")
    z = (z + torch.randn(z.shape, generator=gen)) @ torch.randn(6, 9, generator=gen)  # rank 6
    left = g.eraser(z, colour)(z)

    def named(z):
        weight, bias = train.fit_layer(z, colour, 3)
        return ((z @ weight.T + bias).argmax(1) == colour).double().mean()

    assert named(z) > 0.75 and named(left) == pytest.approx(1 / 3, abs=0.02)
    middles = torch.stack([z[colour == k].mean(0) for k in range(3)]) - z.mean(0)
    span = torch.linalg.svd(middles, full_matrices=False).Vh[:2]
    moved = left - z
    assert torch.allclose(moved @ span.T @ span, moved, atol=1e-4)


def test_the_autoencoder_recovers_a_planted_dictionary():
    gen = common.stream(0, "planted")
    planted = nn.functional.normalize(torch.randn(12, 16, generator=gen), dim=1)
    active = torch.rand(3000, 12, generator=gen) + 0.5
    few = torch.rand(3000, 12, generator=gen).argsort(1) < 2
    x = (active * few) @ planted
    x -= x.mean(0)
    code, decoder = g.fit_dictionary(x, gen, 48, 3, epochs=40, batch=100, lr=1e-2)
    assert (planted @ decoder.T).amax(1).min() > 0.9
    assert torch.allclose(decoder.norm(dim=1), torch.ones(48), atol=1e-5)
    assert (code(x) > 0).sum(1).max() <= 3


def test_silencing_no_latent_changes_no_bit_and_k_take_away_k_directions(monkeypatch):
    monkeypatch.setattr(g.fit_dictionary, "__defaults__", (32, 6, 1, 10, 0.003))
    gen = common.stream(0, "features")
    names = ("train", "fit", "odd", "test_hard", "val")
    z = {name: torch.rand(60, 16, generator=gen) for name in names}
    fit = common.Split(None, torch.arange(60) % 10, torch.arange(60) // 6, None)

    def ask(change):
        return {name: (change(name) - z[name]).double() for name in ("fit", "val")}

    _, moved, _, _ = g.taken_apart(ask, z, fit, gen)
    assert all(not moved[kind, 0]["val"].any() for kind in g.CURVES)
    for kind in ("colour", "digit"):
        assert torch.linalg.matrix_rank(moved[kind, 5]["val"], atol=1e-5) == 5
        assert moved[kind, 5]["fit"].mean(0).abs().max() < 1e-6  # they keep their mean
    up, silenced = moved["turned_up", 5]["val"], moved["colour", 5]["val"]
    assert torch.allclose(up, -silenced, atol=1e-6) and up.abs().max() > 0.01


def test_eta_squared_by_hand():
    group = torch.tensor([0, 0, 1, 1])
    values = torch.tensor([[1.0, 0, 3], [1, 2, 3], [5, 1, 3], [5, 1, 3]])
    assert g.eta_squared(values, group).tolist() == [1, 0, 0]  # the last one never varies
    assert g.eta_squared(torch.tensor([[0.0], [2], [2], [4]]), group).item() == pytest.approx(0.5)


def test_others_are_drawn_until_they_vary_as_much():
    strength, gen = torch.tensor([4.0, 1, 1, 1, 1, 1]), common.stream(0, "others")
    pool = torch.arange(1, 6)
    found = g.as_strong(torch.tensor([0]), pool, strength, gen).tolist()
    assert len(set(found)) == 4 and set(found) <= {1, 2, 3, 4, 5}
    assert len(g.as_strong(torch.tensor([0, 0]), pool, strength, gen)) == 5  # all that there are
    assert len(g.as_strong(torch.tensor([], dtype=torch.int64), pool, strength, gen)) == 0


def test_others_live_and_do_not_say_colour(monkeypatch):
    """Four latents: one says the colour, one the digit, one nothing, and one is dead."""
    one_each = lambda x, gen: (lambda z: z.clamp(min=0), torch.eye(4))  # noqa: E731
    monkeypatch.setattr(g, "fit_dictionary", one_each)
    pools = []
    monkeypatch.setattr(g, "as_strong", lambda k, pool, *rest: pools.append(pool.tolist()) or k)
    digit, colour, gen = torch.arange(100) % 10, torch.arange(100) // 10, common.stream(0, "n")
    columns = colour, digit, torch.rand(100, generator=gen), torch.zeros(100)
    z = dict.fromkeys(("train", "fit", "odd", "test_hard", "val"), torch.stack(columns, 1).float())
    fit = common.Split(None, digit, colour, None)
    g.taken_apart(lambda change: {}, z, fit, gen)
    assert len(pools) == len(g.TAKEN) * g.DRAWS and all(pool == [1, 2] for pool in pools)


def test_a_gain_has_the_interval_of_a_mean_of_pictures():
    hits = {"val": torch.tensor([1.0, 1, 1, 0]).double()}
    found = g.scores(hits, gain={"val": torch.tensor([0.0, 0, 0, 0]).double()})
    assert found["val"] == 0.75  # sd 0.5 of four
    by_hand = {"value": 0.75, "low": 0.75 - 1.96 * 0.25, "high": 0.75 + 1.96 * 0.25}
    assert found["gain"]["val"] == pytest.approx(by_hand)


def test_what_a_channel_is_about():
    digit, colour = torch.arange(100) // 10, torch.arange(100) % 10
    maps = [colour, digit, digit + 2 * colour, torch.zeros(100)]
    z = torch.stack(maps, 1).float()[:, :, None].expand(-1, -1, 5).flatten(1)  # five places each
    net = SimpleNamespace(
        conv3=SimpleNamespace(out_channels=4), fc=SimpleNamespace(out_features=10)
    )
    about = g.channels_of(net, z, common.Split(None, digit, colour, None))
    assert about["each_colour"] == pytest.approx([1, 0, 0.8, 0])
    assert about["each_digit"] == pytest.approx([0, 1, 0.2, 0])
    assert about["activity"][2][3] == pytest.approx([3 + 2 * c for c in range(10)])


# ---- files, figures and the command line


def test_files_are_named_by_what_differs():
    def named(line):
        return g.result_name(g.get_args(line.split()))

    assert named("--models a_s1 --threads 2") == "gradcam"
    assert named("--cam hirescam") == "gradcam_hirescam"
    assert named("--cam hirescam --seed 3") == "gradcam_hirescam_s3"
    assert named("--name mine") == "gradcam_mine"
    assert named("--name mine --cam hirescam") == "gradcam_mine_hirescam"
    assert named("--maximise --seed 3 --reader x") == "gradcam_maximise_s3"
    assert named("--decompose") == "gradcam_decompose"
    assert named("--decompose --name all") == "gradcam_decompose_all"


def checkpoint(path, name="simplecnn", size=28, classes=10, method="baseline"):
    """A checkpoint in the format of train.py, with random weights."""
    torch.manual_seed(1)
    model = common.build_model(name, classes=classes, size=(size, size))
    args = {"model": name, "width": 4, "method": method, "seed": 42}
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    record = {"weights": weights, "args": args, "classes": classes, "size": [size, size]}
    common.save_pt(record, path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The tiny world and two random models."""
    folder = tmp_path_factory.mktemp("made") / "results"
    write_world(folder)
    checkpoint(folder / "baseline_s42.pt")
    checkpoint(folder / "jitter_s42.pt", method="jitter")
    return folder


@pytest.fixture
def world(made, tmp_path, monkeypatch):
    """A copy in results/ that a test may fill; searches are cut short."""
    monkeypatch.setattr(g, "SANITY_DRAWS", 1)
    monkeypatch.setattr(g.maximise, "__defaults__", (2, 0.05, 2, 0.05))
    monkeypatch.setattr(g.fit_dictionary, "__defaults__", (32, 4, 1, 50, 0.003))
    return shutil.copytree(made, tmp_path / "results")


@pytest.fixture
def undrawn(monkeypatch):
    """Figures take seconds; tests of numbers do without."""
    monkeypatch.setattr(g, "draw", lambda path: [path])


def measured(world, name="gradcam"):
    return json.loads((world / f"{name}.json").read_text())


def saved(world):
    return {p.name: p.read_bytes() for p in world.glob("gradcam*")}


def test_the_answer_and_the_keys_of_the_record(world, undrawn, call):
    said = call("gradcam.py").splitlines()
    assert said[0] == "Grad-CAM of 2 models on 100 pictures of test_hard"
    record = measured(world)
    keys = "args models null repainting run schema script"
    assert sorted(record) == keys.split() and record["schema"] == 3
    assert sorted(record["run"]) == ["device", "threads", "torch"]
    model = record["models"]["jitter_s42"]
    assert set(model) == {"trained", "acc", "maps", "flips"} and set(model["maps"]) == {"test_hard"}
    assert set(record["null"]) == {"random_map", "ceiling", "cascade"}
    keys = "n zero_maps lift lift_with_empty pointing followed_digit followed_colour auc auc_random"
    assert set(model["maps"]["test_hard"]) == set(keys.split())
    background, digit = (model["flips"][k]["changed"]["rate"] for k in ("background", "digit"))
    lift = model["maps"]["test_hard"]["lift"]
    (line,) = (line for line in said if line.startswith("jitter_s42"))
    assert line.split()[1:] == [f"{number:.3f}" for number in (background, digit, lift)]
    split = common.load_split(world, "test_hard")
    answers = common.predict(common.load_model(world, "jitter_s42")[0], split.images).argmax(1)
    assert model["acc"]["k"] == int((answers == split.labels).sum())
    first = saved(world)
    call("gradcam.py")
    assert len(first) == 2 and saved(world) == first, "the same command, the same bytes"


def test_every_record_has_its_own_figures_and_report_redraws_the_same(world, call):
    said = call("gradcam.py --cam hirescam --models baseline_s42").splitlines()
    assert said[-1] == "open  results/figures/gradcam_hirescam_ten_colours.png"
    said = call("gradcam.py --maximise --name two --models jitter_s42").splitlines()
    assert said[-1] == "open  results/figures/gradcam_maximise_two.png"
    said = call("gradcam.py --decompose --models baseline_s42").splitlines()
    assert said[-1] == "open  results/figures/gradcam_decompose_curves.png"
    common.save_json({"script": "mine.py"}, world / "gradcam_of_somebody.json")
    drawn = {p.name: p.read_bytes() for p in (world / "figures").glob("gradcam*")}
    names = {f"gradcam_hirescam_{n}.png" for n in ("lift_flip", "ten_colours")}
    names |= {f"gradcam_decompose_{n}.png" for n in ("curves", "channels", "latents")}
    assert set(drawn) == names | {"gradcam_maximise_two.png"}
    for name in drawn:
        (world / "figures" / name).unlink()
    said = call("gradcam.py --report").splitlines()
    assert sorted(said) == sorted(f"wrote results/figures/{name}" for name in drawn)
    assert drawn == {p.name: p.read_bytes() for p in (world / "figures").glob("gradcam*")}


def test_maximise_keeps_the_first_picture_of_every_class(world, undrawn, call):
    checkpoint(world / "oracle.pt")
    call("gradcam.py --maximise --reader oracle")
    record = measured(world, "gradcam_maximise")
    keys = {"confidence", "read by an oracle"}
    assert set(record["null"]) == keys and record["reader"] == "oracle" and record["schema"] == 2
    assert list(record["models"]) == ["baseline_s42", "jitter_s42"]
    assert set(record["models"]["jitter_s42"]) == keys | {"trained"}
    model = common.load_model(world, "jitter_s42")[0]
    label = torch.arange(10).repeat(g.STARTS)
    x = g.maximise(model, label, (28, 28), common.stream(42, "maximise"))
    shown = common.load_pt(world / "gradcam_maximise.pt", "")["jitter_s42"]
    images, captions, _ = zip(*shown, strict=True)
    assert torch.equal(torch.stack(images), (x[:10] * 255).round().byte())
    sure = model(x[:10]).softmax(1).diagonal().tolist()
    assert list(captions) == [f"{k} ({sure[k]:.2f})" for k in range(10)]
    first = saved(world)
    call("gradcam.py --maximise --reader oracle")
    assert len(first) == 2 and saved(world) == first, "the same command, the same bytes"


def test_what_is_taken_apart_is_scored_on_pictures_that_fitted_nothing(
    world, undrawn, call, monkeypatch
):
    """Even ones fit the erasers, odd ones score: test_hard holds the same digits in their order."""
    seen = {}

    def keep(model, splits, seed, real=g.decomposed):
        seen.update(splits)
        return real(model, splits, seed)

    monkeypatch.setattr(g, "decomposed", keep)
    call("gradcam.py --decompose --models baseline_s42")
    every, hard = (common.load_split(world, name) for name in ("test_unbiased", "test_hard"))
    wanted = {"fit": (every, 0), "odd": (every, 1), "test_hard": (hard, 1)}
    for name, (split, first) in wanted.items():
        assert torch.equal(seen[name].images, split.images[first::2])
        assert torch.equal(seen[name].colors, split.colors[first::2])


def test_the_keys_of_what_is_taken_apart(world, undrawn, call):
    call("gradcam.py --decompose")
    record = measured(world, "gradcam_decompose")
    assert sorted(record) == ["args", "models", "run", "schema", "script"]
    model = record["models"]["jitter_s42"]
    assert sorted(model) == ["channels", "dictionary", "erased", "plain", "silenced", "trained"]
    scores = {"test_hard", "follows_colour", "val"}
    assert set(model["erased"]) == {"colour", "digit", "random"}
    for erased in model["erased"].values():
        assert set(erased) == scores | {"gain"} and set(erased["gain"]) == scores
    numbers = "active live say_colour say_digit stability variance_kept"
    assert sorted(model["dictionary"]) == numbers.split()
    assert set(model["silenced"]) == set(g.CURVES)
    for kind, curve in model["silenced"].items():
        assert set(curve) == {str(k) for k in g.TAKEN}
        own = {"beside_others"} if kind == "colour" else set()
        assert all(set(point) == scores | own for point in curve.values())
        assert {key: curve["0"][key] for key in scores} == model["plain"]
    beside = model["silenced"]["colour"]["5"]["beside_others"]
    assert set(beside) == scores and set(beside["val"]) == {"value", "low", "high"}
    assert set(model["channels"]) == {"activity", "each_colour", "each_digit"}
    split = common.load_split(world, "test_hard").take(slice(1, None, 2))  # the odd digits
    answers = common.predict(common.load_model(world, "jitter_s42")[0], split.images).argmax(1)
    assert model["plain"]["test_hard"] == pytest.approx((answers == split.labels).double().mean())


def test_a_net_of_fewer_classes_or_another_size_finds_its_pictures(world, undrawn, call):
    checkpoint(world / "fewer.pt", classes=5)
    checkpoint(world / "larger.pt", size=32)
    fewer = common.load_pt(world / "fewer.pt", "")
    common.save_pt({**fewer, "size": (28, 28)}, world / "fewer.pt")  # as in README.md
    call("gradcam.py --maximise --models jitter_s42 fewer larger --reader baseline_s42")
    models = measured(world, "gradcam_maximise")["models"]
    assert models["fewer"]["read by an oracle"] is not None
    assert models["larger"]["read by an oracle"] is None


def test_a_world_without_colours_has_heat_but_no_flips(world, call):
    split = torch.load(world / "test_hard.pt", weights_only=True)
    del split["colors"]
    common.save_pt(split, world / "test_hard.pt")
    said = call("gradcam.py --models baseline_s42")
    assert "no flip rates: the split has no colors" in said
    assert measured(world)["models"]["baseline_s42"]["flips"] is None
    assert (world / "figures/gradcam_examples.png").exists()


def test_classes_have_the_names_that_meta_json_gives(world, call, monkeypatch):
    meta = common.load_json(world / "meta.json", "")
    names = ["shirt", "trouser", "pullover", "dress", "coat"]
    names += ["sandal", "blouse", "sneaker", "bag", "ankle boot"]
    common.save_json({**meta, "classes": names}, world / "meta.json")
    shown = []
    monkeypatch.setattr(g, "pictures", lambda rows: shown.extend(rows) or common.blank(1, 1))
    call("gradcam.py --models baseline_s42")
    ((name, cells),) = (
        (title.split(" of test_hard")[0].removeprefix("Grad-CAM: the first "), cells)
        for title, cells in shown
        if "ten colours" in title
    )
    assert name in names and cells[0][1] == f"{name} on red"
    answers = {caption[2:-7] for _, cells in shown[1::2] for _, caption, _ in cells}
    assert answers <= set(names)  # as in "✗ ankle boot (0.90)"


def test_a_net_whose_answers_are_no_numbers_leaves_no_file(world, mistake):
    broken = common.load_pt(world / "jitter_s42.pt", "")
    broken["weights"]["fc.weight"] *= 1e38
    broken["weights"]["conv3.weight"] *= 1e30
    common.save_pt(broken, world / "broken.pt")
    for mode in ("", "--maximise"):
        mistake(f"gradcam.py --models broken {mode}", "broken gives answers that are no numbers")


# ---- pictures of one's own


def draw_seven(path, paper=255, ink=0, size=(280, 280), **how):
    """A 7 as somebody draws it, 140x200 pixels."""
    image = Image.new("L", size, paper)
    ImageDraw.Draw(image).line([(60, 50), (190, 50), (110, 240)], fill=ink, width=20)
    image.save(path, **how)
    return image


def test_the_paper_is_the_colour_of_most_of_the_border():
    picture = torch.full((3, 20, 20), 0.9)
    picture[:, 4:16, 4:16] = picture[:, :, 0] = 0.1  # a digit, and the dark edge of the sheet
    assert torch.equal(g.paper_of(picture), torch.full((3, 1, 1), 0.9))


def test_a_drawn_digit_is_framed_as_mnist_does(tmp_path):
    def framed(*args, **how):
        draw_seven(tmp_path / "seven.png", *args, **how)
        return g.find_digit(g.read_picture(tmp_path / "seven.png"), (28, 28))

    digit = framed()
    y, x = digit.nonzero().T
    assert (y.max() - y.min() + 1, digit.max()) == (20, 255)
    weight = digit / digit.sum()
    place = torch.arange(28) + 0.5
    assert (weight.sum(1) * place).sum().item() == pytest.approx(14, abs=0.5)
    assert (weight.sum(0) * place).sum().item() == pytest.approx(14, abs=0.5)
    width = (x.max() - x.min() + 1).item()
    assert width == pytest.approx(20 * 144 / 200, abs=2)  # not squeezed
    for other in (framed(0, 255), framed(230, 60), framed(size=(900, 280))):  # wherever it stands
        assert (digit.float() - other.float()).abs().max() < 26
    assert g.find_digit(torch.rand(3, 50, 50) * 0.05, (28, 28)) is None
    assert g.find_digit(g.read_picture(tmp_path / "seven.png"), (32, 64)).shape == (32, 64)


def test_a_digit_of_mnist_is_found_where_it_is():
    gray = torch.zeros(28, 28)
    gray[4:24, 12:16], gray[4:24, 11], gray[4:24, 16] = 1, 0.5, 0.5  # a 1, centred
    found = g.find_digit(gray.expand(3, 28, 28), (28, 28))
    assert (found - gray * 255).abs().max() <= 1


def test_a_picture_is_read_as_viewers_show_it(tmp_path):
    upright = draw_seven(tmp_path / "plain.jpg", quality=100)
    plain = g.read_picture(tmp_path / "plain.jpg")
    assert plain.shape == (3, 280, 280) and plain.min() >= 0 and plain.max() == 1
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "exif.jpg", exif=exif, quality=100)
    upright.save(tmp_path / "really.png", "JPEG", quality=100)
    clear = Image.new("LA", upright.size)  # black ink, every other pixel transparent
    clear.putalpha(ImageOps.invert(upright))
    clear.save(tmp_path / "alpha.png")
    deep = np.asarray(upright).astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "sixteen_bits.png")
    for name in ("exif.jpg", "really.png", "alpha.png", "sixteen_bits.png"):
        assert (g.read_picture(tmp_path / name) - plain).abs().mean() < 0.01, name
    upright.resize((3000, 1000)).save(tmp_path / "wide.png")
    assert g.read_picture(tmp_path / "wide.png").shape == (3, 341, 1024)


def own_pictures(world):
    """{name: bytes} of the figures."""
    return {p.name: p.read_bytes() for p in (world / "figures").glob("*.png")}


@pytest.fixture
def trained(tmp_path):
    """Nothing but the committed networks, as in a fresh clone."""
    (tmp_path / "results").mkdir()
    for name in ("baseline_s42", "jitter_s42"):
        record = common.load_pt(common.ROOT / f"results/{name}.pt", "")
        common.save_pt(record, tmp_path / f"results/{name}.pt")
    return tmp_path / "results"


def test_a_digit_of_ones_own_on_ten_colours(trained, call, tmp_path):
    draw_seven(tmp_path / "seven.png")
    said = call("gradcam.py --image seven.png").splitlines()
    assert said[0].startswith("baseline_s42: ") and "; " in said[0]  # answers differ
    assert said[1:] == [
        "jitter_s42: 7 on every colour",
        "open  results/figures/gradcam_image_seven.png",
    ]
    assert list(own_pictures(trained)) == ["gradcam_image_seven.png"]


def test_every_answer_is_a_tile_in_the_colour_of_its_class(tmp_path):
    about = {"size": [28, 28]}
    models = {"lazy": (SeesColour(), about), "steady": (SaysSeven(), about)}
    draw_seven(tmp_path / "mine.png")
    classes = [str(k) for k in range(10)]
    rows, said = g.on_ten_colours(tmp_path / "mine.png", models, PAINTING, classes, seed=1)
    (title, shown), (lazy, coloured), (steady, sevens) = rows
    assert title == "mine.png on 10 colours" and [caption for _, caption, _ in shown] == NAMES
    assert lazy == "lazy: 10 different answers" and steady == "steady: 7 on every colour"
    assert said[0].startswith("lazy: 0 on red; 1 on green; 2 on blue") and said[1] == steady
    for k in range(10):
        tile, _, look = coloured[k]
        assert look["written"] == str(k) and torch.equal(tile.flatten() / 255, MEANS[k])
        tile, _, look = sevens[k]
        assert look["written"] == "7" and torch.equal(tile.flatten() / 255, MEANS[7])


class SaysSeven(SeesColour):
    def forward(self, x):
        return nn.functional.one_hot(torch.full((len(x),), 7), 10).float()


def test_no_picture_replaces_that_of_another(trained, call, tmp_path):
    for k, folder in enumerate(("a", "b", "b")):
        (tmp_path / folder).mkdir(exist_ok=True)
        draw_seven(tmp_path / folder / "own.png", ink=10 * k)
        if k < 2:
            call(f"gradcam.py --models jitter_s42 --image {folder}/own.png")
    before = own_pictures(trained)
    assert len(before) == 2 and "gradcam_image_own.png" in before
    call("gradcam.py --models jitter_s42 --image a/own.png b/own.png")
    after = own_pictures(trained)
    assert len(after) == 3 and before.items() <= after.items()


def test_the_raw_picture_has_answers_and_maps(trained, call, tmp_path):
    draw_seven(tmp_path / "wide.png", size=(840, 280))
    x = g.read_picture(tmp_path / "wide.png")
    small = torch.nn.functional.interpolate(x[None], (9, 28), mode="bilinear", antialias=True)
    framed = torch.ones(1, 3, 28, 28)  # on white, not squeezed
    framed[:, :, 9:18] = small
    logits = common.predict(common.load_model(trained, "jitter_s42")[0], framed)
    confidence, answer = logits.softmax(1).max(1)
    said = call("gradcam.py --image wide.png --raw --models jitter_s42").splitlines()
    assert said == [
        f"jitter_s42: {int(answer)} ({float(confidence):.2f})",
        "open  results/figures/gradcam_raw_wide.png",
    ]


def test_what_is_no_picture_gets_one_line(trained, mistake, tmp_path):
    (tmp_path / "notes.png").write_text("no picture")
    draw_seven(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
    Image.new("RGBA", (50, 50)).save(tmp_path / "blank.png")
    (tmp_path / "bomb.ppm").write_bytes(b"P5 20000 20000 255\n")  # only a head
    for name, says in (
        ("nothing.png", "nothing.png is missing"),
        ("results", "results is no picture"),
        ("notes.png", "notes.png is no picture"),
        ("cut.png", "cut.png is no picture"),
        ("bomb.ppm", "bomb.ppm is no picture"),
        ("good.png blank.png", "blank.png is empty"),
    ):
        mistake(f"gradcam.py --image {name}", says)


def test_mistakes_get_one_line_and_exit_code_2(world, mistake):
    checkpoint(world / "larger.pt", size=32)
    checkpoint(world / "fewer.pt", classes=5)
    checkpoint(world / "mlp.pt", "mlp")
    record = {"script": "gradcam.py", "args": {"models": ["baseline_s42"]}}
    common.save_json(record, world / "gradcam.json")
    for arguments, says in (
        ("--models nobody_s1", "nobody_s1.pt is missing"),
        ("--models larger", "28"),
        ("--models fewer", "5 classes"),
        ("--models mlp", "mlp has no map 4 pixels wide"),
        ("--models baseline_s42 ./baseline_s42", "would share one row"),
        ("--cam plaid", "invalid choice"),
        ("--dir nowhere", "nowhere/test_hard.pt is missing"),
        ("--name hirescam", "no kind of map"),
        ("--models jitter_s42", "models ['baseline_s42']"),
        ("--reader jitter_s42", "--reader means nothing for heat maps"),
        ("--maximise --models nobody_s1", "nobody_s1.pt is missing"),
        ("--maximise --reader nobody_s1", "nobody_s1.pt is missing"),
        ("--maximise --reader jitter_s42", "would read its own pictures"),
        ("--maximise --image own.png", "not allowed with"),
        ("--decompose --cam hirescam", "--cam means nothing for --decompose"),
        ("--decompose --models mlp", "no conv3"),
        ("--decompose --models nobody_s1", "nobody_s1.pt is missing"),
        ("--name decompose", "no kind of map"),
        ("--image own.png --name mine", "--name means nothing for --image"),
        ("--image results/meta.json", "no picture"),
        ("--raw", "--raw means nothing for heat maps"),
    ):
        mistake(f"gradcam.py {arguments}", says)
    split = torch.load(world / "test_hard.pt", weights_only=True)
    del split["gray"]
    common.save_pt(split, world / "test_hard.pt")
    mistake("gradcam.py --models baseline_s42", "test_hard.pt has no gray")
