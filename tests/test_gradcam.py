"""gradcam.py: maps, scores and flip rates computed by hand, the command line on a tiny world."""

import json

import numpy as np
import pytest
import torch
import torch.nn as nn
from matplotlib.image import imsave

import common
import gradcam as g


def a_split(n=40, size=28):
    """A Split of random pictures on random colours."""
    gen = torch.Generator().manual_seed(0)
    gray = torch.randint(0, 256, (n, size, size), generator=gen, dtype=torch.uint8)
    colours = torch.randint(0, 10, (n,), generator=gen)
    return common.Split(common.paint(gray, colours, gen), torch.arange(n) % 10, colours, gray)


def a_subject(name="simplecnn", size=28, layer="relu"):
    torch.manual_seed(0)
    model = common.build_model(name, size=(size, size)).eval()
    checkpoint = {"args": {"model": name, "width": 4}, "classes": 10, "size": [size, size]}
    return g.Subject(model, checkpoint, layer, (size // 4, size // 4))


# ---- heat maps

A = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [0.0, 1.0]]]])  # (1,2,2,2)
G = torch.tensor([[[[1.0, -1.0], [2.0, 2.0]], [[0.0, -4.0], [0.0, 0.0]]]])


def test_gradcam_by_hand():
    assert torch.equal(g.gradcam(A, G), A[:, 0] * 1 + A[:, 1] * -1)  # mean gradients 1 and -1


def test_hirescam_by_hand():
    assert torch.equal(g.hirescam(A, G), torch.tensor([[[1.0, -6.0], [6.0, 8.0]]]))


def test_gradcam_pp_by_hand():
    # channel 0: activations sum to 10, so alpha is 1 / (2 + 10 g): 1/12 for 1, 1/22 for 2;
    # g = -1 is cut by the ReLU. Channel 1 has no positive gradient, and alpha 0/0 counts as 0
    weight = 1 * 1 / 12 + 2 * 2 * (1 / 22)
    assert torch.allclose(g.gradcam_pp(A, G), A[:, 0] * weight)


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
    assert torch.equal(g.explain(model, model.look, x).target, model(x).argmax(1))
    assert not model.look._forward_hooks and model.fc.weight.grad is None


def test_an_in_place_relu_after_the_layer_does_not_alter_the_map():
    layer = nn.Conv2d(3, 2, 3)
    model = nn.Sequential(layer, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 2))
    x = torch.randn(3, 3, 4, 4)
    assert torch.equal(g.explain(model, layer, x).activation, layer(x))


def test_heat_is_rectified_and_a_batch_equals_one_at_a_time(monkeypatch):
    subject, split = a_subject(), a_split(7)
    whole = g.heat_of(subject, split, "hirescam")
    e = g.explain(subject.model, subject.model.relu, split.x(slice(7)))
    assert torch.equal(whole.maps, g.hirescam(e.activation, e.gradient).clamp(min=0))
    assert torch.allclose(whole.confidence, e.logits.softmax(1).amax(1))
    monkeypatch.setattr(g, "BATCH", 3)
    parts = g.heat_of(subject, split, "hirescam", targets=whole.predicted)
    assert torch.allclose(whole.maps, parts.maps, rtol=1e-4, atol=1e-6)


def test_completeness_by_hand():
    model, split = Linear(), a_split(5, size=2)
    x = split.x(slice(5))
    logit, target = model(x).max(1)
    weights = model.fc.weight[target].view(5, 3, 4)
    by_hand = (weights.mean(2) * x.flatten(2).sum(2)).sum(1)  # mean gradient times activation
    gap = (logit - model.fc.bias[target] - by_hand).abs()
    left = g.completeness(g.Subject(model, {}, "look", (2, 2)), split)
    assert left["hirescam"]["max"] < 1e-6
    assert left["gradcam"]["max"] == pytest.approx(gap.max().item(), rel=1e-4)
    assert left["gradcam"]["mean"] == pytest.approx(gap.mean().item(), rel=1e-4)


def test_layers_of_a_resnet():
    subject, split = a_subject("resnet18", 32), a_split(2, 32)
    assert g.find_layer(subject.model, None, split, "resnet") == ("layer2", (4, 4))
    assert g.find_layer(subject.model, "layer3.0.bn1", split, "resnet")[1] == (2, 2)
    inside = subject._replace(layer="layer3.0.bn1")  # an in-place ReLU follows
    assert g.heat_of(inside, split, "gradcam").maps.shape == (2, 2, 2)


# ---- scores


def test_share_area_lift_and_pointing_by_hand():
    gray = torch.zeros(4, 4, 4, dtype=torch.uint8)
    gray[:3, :, 0] = 26  # the left column; 26 / 255 is just above 0.1
    gray[:3, :, 1] = 25  # just below
    maps = torch.zeros(4, 4, 4)
    maps[0, 0, 0], maps[0, 3, 3] = 3, 1
    maps[2, 0, 0], maps[2, 0, 3], maps[2, 1, 1] = 2, 2, 1  # a tie, half of it on the digit
    maps[3] = 1  # picture 1 has no heat, picture 3 no digit
    s = g.heat_scores(maps, gray)
    assert s.share[[0, 2]].tolist() == [0.75, 0.4] and s.area[0] == 0.25
    assert s.lift[[0, 2]].tolist() == [3, 1.6] and s.pointing[[0, 2]].tolist() == [1, 0.5]
    assert s.share[[1, 3]].isnan().all() and s.pointing[[1, 3]].isnan().all()


def test_a_uniform_map_has_lift_one_at_every_size():
    s = g.heat_scores(torch.full((40, 7, 7), 3.0), a_split().gray)
    assert torch.allclose(s.lift, torch.ones(40).double()) and torch.allclose(s.pointing, s.area)


def test_summary_leaves_out_maps_without_a_score():
    share = torch.tensor([0.1, 0.2, 0.3, torch.nan, 0.4, 0.5]).double()
    area = torch.tensor([0.1, 0.1, 0.1, torch.nan, 0.2, 0.2]).double()
    pointing = torch.tensor([1, 0, 0.5, torch.nan, 0, 1]).double()
    s = g.summary(g.Scores(share, area, pointing))
    assert (s["n"], s["zero_maps"]) == (6, 1)
    assert s["share"] == pytest.approx(0.3) and s["area"] == pytest.approx(0.14)
    assert s["share_quartiles"] == pytest.approx([0.2, 0.3, 0.4])
    assert s["lift"] == pytest.approx(2.1) and s["lift_quartiles"] == pytest.approx([2, 2, 2.5])
    assert s["pointing"]["rate"] == 0.5 and s["pointing"]["n"] == 5 and "k" not in s["pointing"]
    nothing = g.summary(g.Scores(share[3:4], area[3:4], pointing[3:4]))
    assert nothing["lift"] is None and nothing["share_quartiles"] is None


def test_a_rate_carries_its_wilson_interval_and_a_count_its_k():
    r = g.rate(torch.tensor([True, True, False, False]))
    assert (r["k"], r["n"], r["rate"]) == (2, 4, 0.5)
    assert (r["low"], r["high"]) == pytest.approx((0.15, 0.85), abs=1e-3)  # Wilson, 1927
    assert "k" not in g.rate(torch.tensor([0.5, 0.25]))


def test_spearman_with_ties_by_hand():
    # ranks 1 2.5 2.5 4 and 1 3 2 4 around their mean 2.5: products 4.5, squares 4.5 and 5
    a, b = torch.tensor([[0.0, 5.0, 5.0, 9.0]]), torch.tensor([[1.0, 30.0, 2.0, 40.0]])
    assert g.spearman(a, b).item() == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert g.spearman(a, -a).item() == pytest.approx(-1)
    assert g.spearman(a, torch.ones(1, 4)).isnan()


# ---- flip rates


def test_flip_rates_by_hand():
    # four colours; picture 0 is a 0 on colour 1, picture 1 a 1 on its own, picture 2 a 0 on 3
    on_colour = torch.tensor([[0, 2, 2, 2], [1, 1, 1, 1], [1, 1, 2, 1]])
    labels, colours = torch.tensor([0, 1, 0]), torch.tensor([1, 1, 3])
    swapped, partner = torch.tensor([2, 0, 0]), torch.tensor([2, 0, 1])
    rates, changed = g.flip_rates(on_colour, swapped, partner, labels, colours)
    assert changed.tolist() == pytest.approx([1 / 3, 0, 1 / 3])
    background, digit = rates["background"], rates["digit"]
    assert background["changed"]["rate"] == pytest.approx(2 / 9) and background["pairs"] == 9
    assert (background["any"]["k"], background["any"]["n"]) == (2, 3)
    # foreign colours that are neither the old one nor the label's: {2,3}, {0,2,3}, {1,2}
    assert background["follows"]["rate"] == pytest.approx((1 / 2 + 0 / 3 + 2 / 2) / 3)
    # picture 0 gets another 0 and does not count; 1 gets a 0 and says 0; 2 gets a 1 and says 0
    assert [digit["changed"][key] for key in "kn"] == [2, 2]
    assert [digit["follows"][key] for key in "kn"] == [1, 2]


class SeesColour(nn.Module):
    """Names the palette colour of the top row, which no digit of the tiny world touches."""

    def forward(self, x):
        palette = [list(bytes.fromhex(c[1:])) for c in common.PALETTES["background"].values()]
        return -torch.cdist(x[:, :, 0].mean(2), torch.tensor(palette) / 255)


class SeesShape(nn.Module):
    """Counts the lit 4x4 cells of the digit, whose pixels are 0.6 on every background."""

    def forward(self, x):
        cells = ((x * 255).round() == 153).all(1).sum((1, 2)).add(8).div(16, rounding_mode="floor")
        return nn.functional.one_hot(cells, 30).float()


def test_counterfactuals_of_a_net_that_sees_colour_and_of_one_that_sees_shape(tiny, tmp_path):
    tiny(tmp_path, n=200)
    split = common.load_split(tmp_path, "test_hard")
    recipe, obstacle = g.recipe_of(tmp_path, split.labels, split.colors)
    assert recipe["recipe"] == "background" and obstacle is None
    nets = {"colour": SeesColour(), "shape": SeesShape()}
    predictions, partner = g.counterfactuals(nets, split, recipe, seed=0)
    on_colour, swapped = predictions["colour"]
    assert torch.equal(on_colour, torch.arange(10).expand(100, 10))
    assert torch.equal(swapped, split.colors)
    cells = (split.gray > 0).sum((1, 2)) // 16
    on_colour, swapped = predictions["shape"]
    assert torch.equal(on_colour, cells[:, None].expand(100, 10))
    assert torch.equal(swapped, cells[partner]) and not torch.equal(partner, torch.arange(100))


def test_repainting_changes_the_colour_and_keeps_the_texture():
    split = a_split()._replace(gray=torch.zeros(40, 28, 28, dtype=torch.uint8))  # no digit
    recipe = {"recipe": "background", "sigma2": None}
    black, brown = (
        g.repaint(split, torch.full((40,), c), recipe, seed=1).images[:, 0].float() for c in (9, 7)
    )
    unclipped = (black > 0) & (brown < 255)
    assert ((brown - black - 140).abs()[unclipped] <= 1).all() and unclipped.float().mean() > 0.3


def test_a_digit_world_is_repainted_with_its_own_variance(tmp_path):
    common.save_json({"recipe": "digit", "sigma2": 0.0}, tmp_path / "meta.json")
    split = a_split()
    recipe, _ = g.recipe_of(tmp_path, split.labels, split.colors)
    painted = g.repaint(split, torch.full_like(split.labels, 1), recipe, seed=0).images
    teal = torch.tensor([0, 128, 128]).view(1, 3, 1, 1)
    assert (painted - split.gray[:, None] / 255 * teal).abs().max() <= 0.51


def test_what_cannot_be_repainted_says_why(tmp_path, monkeypatch):
    def why(split, **meta):
        common.save_json(meta, tmp_path / "meta.json")
        return g.recipe_of(tmp_path, split.labels, split.colors)[1]

    split, today = a_split(), common.PALETTES["background"]
    assert "colors" in g.recipe_of(tmp_path, split.labels, split.colors)[1]  # no meta.json
    assert "colors" in why(split._replace(colors=None), recipe="background")
    assert "'plaid'" in why(split, recipe="plaid")
    rgb = [[name, list(bytes.fromhex(colour[1:]))] for name, colour in today.items()]
    assert why(split, recipe="background", palette=rgb) is None
    rgb[3][1][2] += 1
    assert "another palette" in why(split, recipe="background", palette=rgb)
    nine = dict(list(today.items())[:9])
    monkeypatch.setitem(common.PALETTES, "background", nine)
    assert "run to 9, but the palette ends at 8" in why(split, recipe="background")


# ---- null rows and the pictures of the figures


def test_the_cascade_randomises_from_the_output_down_and_keeps_the_explained_class(monkeypatch):
    subject, split, fresh = a_subject(), a_split(6), []
    real, heat_of = subject.model.state_dict(), g.heat_of
    monkeypatch.setattr(g, "SANITY_DRAWS", 1)
    classes = heat_of(subject, split, "hirescam").predicted

    def watched(hybrid, split, cam, targets=None):
        changed = [k for k, t in hybrid.model.state_dict().items() if not torch.equal(t, real[k])]
        fresh.append(list(dict.fromkeys(name.partition(".")[0] for name in changed)))
        assert torch.equal(targets, classes) if len(fresh) > 1 else targets is None
        return heat_of(hybrid, split, cam, targets)

    monkeypatch.setattr(g, "heat_of", watched)
    steps = g.cascade(subject, split, "hirescam", seed=0)
    order = ["fc", "conv3", "conv2", "conv1"]
    assert [step["randomised"] for step in steps] == [order[: k + 1] for k in range(4)]
    assert [set(names) for names in fresh] == [set(order[:k]) for k in range(5)]
    assert all(-1 < step["rank_correlation"][0] < 1 and step["lift"][0] > 0 for step in steps)


def test_random_weights_with_batch_norm_see_one_picture_at_a_time(monkeypatch):
    monkeypatch.setattr(g, "SANITY_DRAWS", 1)
    subject = a_subject("resnet18", layer="layer4")
    g.cascade(subject, a_split(1), "gradcam", 42)  # in training mode one picture is too few


def test_the_null_rows_score_noise_and_a_constant():
    subject, split = a_subject(), a_split(200)
    args = g.get_args(["--seed", "1"])
    null = g.null_rows("x", subject, split, args)
    assert null["uniform_map"]["lift"] == pytest.approx(1)
    assert null["random_map"]["lift"] == pytest.approx(1, abs=0.02)
    assert null["random_map"]["lift_quartiles"][0] < 1 and len(null["cascade"][0]["lift"]) == 5


def test_the_figures_show_five_digits_twice_and_one_on_ten_colours(tmp_path):
    split, recipe = a_split(), {"recipe": "background", "sigma2": None}
    subjects = {"a_s1": a_subject(), "a_s2": a_subject(), "b_s1": a_subject(), "c_s1": a_subject()}
    scenes = g.scenes_of(subjects, split, recipe, g.get_args(["--digit", "3"]))
    one, ten = scenes["examples"], scenes["ten_colours"]
    assert list(one["models"]) == ["a_s1", "b_s1"]
    assert one["foreign"].tolist() == [False, True] * 5 and len(one["labels"].unique()) == 5
    assert torch.equal(one["labels"][::2], one["labels"][1::2])
    names = list(common.PALETTES["background"])
    assert one["below"][::2] == [f"{d} on {names[d]}" for d in one["labels"][::2].tolist()]
    assert ten["below"] == [f"3 on {name}" for name in names]
    assert torch.equal(ten["gray"], split.gray[3].expand(10, 28, 28))


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

    still, shifted = (
        ascend(Corner(), [0], (8, 8)),
        ascend(Corner(), [0], (8, 8), shift=1, steps=300),
    )
    assert still[0, :, 0, 0].min() == 1 and still[0, :, 1, 1].max() < 0.9
    near = [0, 1, 7]  # a pixel away in both directions
    assert shifted[0][:, near][:, :, near].min() == 1 and shifted[0, :, 4, 4].max() < 0.9


def test_a_seed_repeats_a_picture_and_another_does_not():
    model = a_subject().model
    one, same, other = (ascend(model, [3], (28, 28), seed, shift=2, steps=3) for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert one.min() >= 0 and one.max() <= 1


def test_variance_between_channels_and_between_places_by_hand():
    x = torch.zeros(5, 3, 2, 2)
    x[0, 0] = 1  # one flat red
    x[1, :, 0] = 1  # grey, a bright upper half
    x[2, 0, 0, 0] = 1  # one red pixel: total 11/144, channels 2/144, places 3/144
    x[3, 0, 0], x[3, 1, 1] = 1, 1  # red above green: of 2/9 a quarter, no brightness differs
    x[4] = 1  # white
    channels, places = g.variance_shares(x)
    assert channels.tolist() == pytest.approx([1, 0, 2 / 11, 1 / 4, 0])
    assert places.tolist() == pytest.approx([0, 1, 3 / 11, 0, 0], abs=1e-6)


def test_measures_of_found_pictures_by_hand():
    class Reads(nn.Module):  # the colour of the first pixel, red or green
        def forward(self, x):
            return 10 * x[:, :2, 0, 0]

    x = torch.zeros(3, 3, 2, 2)
    x[0, 0] = 1  # red
    x[1, 1] = 1  # green
    x[2, 1], x[2, 0, 0, 0] = 0.9, 1  # green with a red corner
    label = torch.tensor([0, 1, 0])
    palette = torch.eye(3)[:2]
    oracle = Reads()
    oracle.forward = lambda x: -10 * x[:, :2, 0, 0]
    found, sure = g.wants_of(Reads(), x, label, palette, oracle)
    assert found["nearest colour is its own"] == found["named as flat colour"]
    assert found["named as flat colour"] == pytest.approx(2 / 3) and found["read by an oracle"] == 0
    expected = [1 / (1 + 2.718281828**-10)] * 2 + [1 / (1 + 2.718281828**-1)]
    assert sure.tolist() == pytest.approx(expected) and found["confidence"] == pytest.approx(
        sum(expected) / 3
    )
    none = g.wants_of(Reads(), x, label, None, None)[0]
    assert none["nearest colour is its own"] is None and none["read by an oracle"] is None


@pytest.mark.parametrize("models, reader", [("a_s1", "42"), ("unbiased/oracle_s42 a_s1", "45")])
def test_no_oracle_reads_its_own_pictures(tmp_path, models, reader):
    (tmp_path / "unbiased").mkdir()
    for name in ("oracle_s45.pt", "oracle_s42.pt", "oracle_s41.json", "oracle_wide_s40.pt"):
        (tmp_path / "unbiased" / name).touch()
    args = g.get_args(f"--maximise --dir {tmp_path} --models {models}".split())
    assert g.reader_among(args) == f"unbiased/oracle_s{reader}"
    args = g.get_args(f"--maximise --dir {tmp_path / 'unbiased'}".split())
    assert g.reader_among(args) is None


def test_the_first_picture_of_every_class_is_kept_in_order(world, call, monkeypatch):
    def found(model, label, size, gen):
        start = torch.arange(len(label)) // 10 + 1  # the first, second, third of its class
        return (label / 10 / start).view(-1, 1, 1, 1).expand(-1, 3, *size)

    monkeypatch.setattr(g, "maximise", found)
    call("gradcam.py --maximise --models jitter_s42")
    images = common.load_pt(world / "gradcam_maximise.pt", "")["jitter_s42"]["images"]
    assert images[:, 0, 0, 0].tolist() == [round(255 * k / 10) for k in range(10)]


def test_maximise_on_the_command_line(world, call, monkeypatch):
    monkeypatch.setattr(g.maximise, "__defaults__", (2, 0.05, 2, 0.05))
    checkpoint(world / "unbiased/oracle_s42.pt")
    said = call("gradcam.py --maximise").splitlines()
    assert said[-1].endswith("results/figures/gradcam_maximise.png")
    once = measured(world, "gradcam_maximise")
    assert list(once["models"]) == ["baseline_s42", "jitter_s42"] and len(once["null"]) == 6
    assert once["models"]["jitter_s42"]["nearest colour is its own"] is not None
    assert once["models"]["jitter_s42"]["read by an oracle"] is not None
    assert once["reader"] == "unbiased/oracle_s42"
    before = (world / "gradcam_maximise.pt").read_bytes()
    call("gradcam.py --maximise")
    assert measured(world, "gradcam_maximise") == once
    assert (world / "gradcam_maximise.pt").read_bytes() == before
    call("gradcam.py --maximise --name all --models baseline_s42 jitter_s42 unbiased/oracle_s42")
    said = call("gradcam.py --report")  # of several, that with the most models
    assert "gradcam_maximise_all.png" in said and "gradcam_maximise.png" not in said
    assert "| random weights | 0." in (world / "tables.md").read_text()


# ---- files, tables and the command line


def test_files_are_named_by_what_differs(tmp_path):
    def named(line):
        args = g.get_args(line.split())
        return g.file_of(g.stem_of(args), args.cam)

    assert named("--models a_s1 --threads 2") == "gradcam"
    assert named("--cam hirescam") == "gradcam_hirescam"
    assert named("--cam gradcam++ --split val --digit 7") == "gradcam_val_digit7_gradcampp"
    assert named("--target label --seed 3") == "gradcam_label_s3"
    assert named("--name mine --split val") == "gradcam_mine"
    assert named("--maximise --seed 3") == "gradcam_maximise_s3"


def test_tables_group_seeds_by_name_and_show_what_was_measured():
    def model(lift, flip):
        r = {"rate": flip, "n": 10}
        maps = {"test_hard": {"n": 10, "zero_maps": 4, "lift": lift, "pointing": {"rate": 0.3}}}
        flips = {"background": {"changed": r, "follows": {"rate": 0.2}}}
        flips["digit"] = {"changed": {"rate": 0.9}}
        return {"acc": r, "maps": maps, "flips": flips, "lift_flip_correlation": -0.5}

    null = {"n": 10, "zero_maps": 0, "lift": 1.0, "pointing": {"rate": 0.1}}
    step = {"randomised": ["fc"], "rank_correlation": [0.0, 0.2], "lift": [1.0, 3.0], "without": 5}
    cascade = {"model": "b_s1", "n": 10, "draws": 2, "cascade": [step]}
    record = {
        "split": "test_hard",
        "args": {"models": ["b_s1", "x/a_s2", "b_s2"]},
        "models": {"x/a_s2": model(2.0, 0.25), "b_s1": model(1.0, 0.5), "b_s2": model(3.0, 0.7)},
        "null": {"random_map": null, "uniform_map": null, **cascade},
    }
    table = g.table(g.looks(record)).splitlines()
    assert table[2].startswith("| b | 0.600 ± 0.141 (2) | 0.400 ± 0.000 (2) | 2.000 ± 1.414 (2) |")
    assert table[3] == "| a | 0.250 | 0.400 | 2.000 | 0.300 | 0.250 | 0.200 | 0.900 | -0.500 |"
    assert table[4] == "| random map | - | 0.000 | 1.000 | 0.100 | - | - | - | - |"
    table = g.cascade_table({"gradcam": record, "hirescam": record}).splitlines()
    row = "fc | 0.100 ± 0.141 (2) | 2.000 ± 1.414 (2) | 5 of 20 |"
    assert table[2:] == [f"| Grad-CAM | {row}", f"| HiResCAM | {row}"]


def checkpoint(path, name="simplecnn", size=28, classes=10, method="baseline"):
    """A checkpoint in the format of train.py, with random weights."""
    torch.manual_seed(1)
    model = common.build_model(name, classes=classes, size=(size, size))
    args = {"model": name, "width": 4, "method": method, "seed": 42}
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    record = {"weights": weights, "args": args, "classes": classes, "size": [size, size]}
    common.save_pt(record, path)


@pytest.fixture
def world(tiny, tmp_path, monkeypatch):
    """The tiny world in results/, with two random models."""
    monkeypatch.setattr(g, "SANITY_DRAWS", 1)
    tiny(tmp_path / "results")
    checkpoint(tmp_path / "results/baseline_s42.pt")
    checkpoint(tmp_path / "results/jitter_s42.pt", method="jitter")
    return tmp_path / "results"


def measured(world, name="gradcam"):
    record = json.loads((world / f"{name}.json").read_text())
    return {k: v for k, v in record.items() if k != "run"}


def test_command_line_and_the_same_numbers_again(world, call, monkeypatch):
    said = call("gradcam.py").splitlines()
    once = measured(world)
    assert said[0] == "Grad-CAM of 2 models on 100 pictures of test_hard"
    assert "results/figures/gradcam_ten_colours.png" in said[-1]
    assert sorted(once) == ["args", "models", "null", "repainting", "schema", "script", "split"]
    model = once["models"]["jitter_s42"]
    keys = "method seed trained layer map_size acc maps flips lift_flip_correlation residual"
    assert set(model) == set(keys.split()) and set(model["maps"]) == {"test_hard"}
    assert model["flips"]["background"]["any"].keys() == {"k", "n", "rate", "low", "high"}
    with monkeypatch.context() as quick:
        quick.setattr(g, "draw_all", lambda *_: [world] * 4)
        assert call("gradcam.py") and measured(world) == once
        call("gradcam.py --cam hirescam")
    said = call("gradcam.py --report")
    figures = {p.name for p in (world / "figures").glob("gradcam*")}
    names = ("examples", "lift_flip", "sanity", "ten_colours")
    assert figures == {f"gradcam_{name}.png" for name in names}
    assert all(f"wrote results/figures/{name}" in said for name in figures)
    tables = (world / "tables.md").read_text()
    assert "| HiResCAM | fc, conv3 |" in tables and "| jitter | 0." in tables


def test_the_correlation_of_lift_and_flip_leaves_out_empty_maps(world, monkeypatch):
    lift = torch.tensor([1.0, torch.nan, 3.0, 2.0]).double()
    changed = torch.tensor([0.1, 9.0, 0.3, 0.4])
    scores = g.Scores(lift, torch.ones(4), torch.ones(4))
    monkeypatch.setattr(g, "heat_scores", lambda maps, gray: scores)
    monkeypatch.setattr(g, "flip_rates", lambda *_: ({}, changed))
    monkeypatch.setattr(g, "counterfactuals", lambda *_: ({"x": (0, 0)}, 0))
    subject, split = a_trained(), a_split(4)
    split.labels[:3] = common.predict(subject.model, split)[:3]
    split.labels[3] = (common.predict(subject.model, split)[3] + 1) % 10
    record = g.measure({"x": subject}, split, {"recipe": "flat"}, g.get_args([]))
    assert record["x"]["acc"]["k"] == 3
    assert record["x"]["lift_flip_correlation"] == pytest.approx(0.5)  # ranks 1 3 2 and 1 2 3


def a_trained():
    subject = a_subject()
    subject.checkpoint["args"] |= {"method": "baseline", "seed": 1}
    return subject


def test_a_world_without_colours_has_heat_but_no_flips(world, call):
    split = torch.load(world / "test_hard.pt", weights_only=True)
    del split["colors"]
    common.save_pt(split, world / "test_hard.pt")
    said = call("gradcam.py --models baseline_s42 --target label --layer conv2")
    assert "no flip rates: they need colors" in said
    record = measured(world, "gradcam_conv2_label")
    model = record["models"]["baseline_s42"]
    assert model["flips"] is None and model["residual"] is None and model["map_size"] == [14, 14]
    assert (world / "figures/gradcam_conv2_label_examples.png").exists()


def test_a_palette_of_nine_colours_has_no_flips(world, call, monkeypatch):
    nine = dict(list(common.PALETTES["background"].items())[:9])
    monkeypatch.setitem(common.PALETTES, "background", nine)
    meta = common.load_json(world / "meta.json", "")
    del meta["palette"]
    common.save_json(meta, world / "meta.json")  # of data that somebody else painted
    assert "the palette ends at 8" in call("gradcam.py --models baseline_s42")


def test_a_net_of_fewer_classes_or_another_size_finds_its_pictures(world, call, monkeypatch):
    monkeypatch.setattr(g.maximise, "__defaults__", (1, 0.05, 2, 0.05))
    checkpoint(world / "fewer.pt", classes=5)
    checkpoint(world / "larger.pt", size=32)
    checkpoint(world / "unbiased/oracle_s42.pt")
    fewer = common.load_pt(world / "fewer.pt", "")
    common.save_pt({**fewer, "size": (28, 28)}, world / "fewer.pt")  # as in README.md
    call("gradcam.py --maximise --models jitter_s42 fewer larger")
    models = measured(world, "gradcam_maximise")["models"]
    assert models["fewer"]["read by an oracle"] is not None
    assert models["larger"]["read by an oracle"] is None


def test_sixteen_bits_a_pixel_are_read_like_eight(tmp_path):
    from PIL import Image

    Image.fromarray(np.full((8, 8), 32768, np.uint16)).save(tmp_path / "own.tiff")
    assert g.read_picture(tmp_path / "own.tiff").mean().item() == pytest.approx(0.5, abs=1e-3)


def test_one_picture_of_ones_own(world, call, tmp_path, monkeypatch):
    monkeypatch.setattr(g, "load_split", None)  # needs no world
    picture = torch.full((56, 56, 3), 0.5)
    picture[:28, :, 0] = 1
    imsave(tmp_path / "own.png", picture.numpy())
    x = g.read_picture(tmp_path / "own.png")  # saved with transparency
    assert x.shape == (1, 3, 56, 56) and x[0, :, 0, 0].tolist() == pytest.approx(
        [1, 0.5, 0.5], abs=0.01
    )
    said = call("gradcam.py --image own.png").splitlines()
    small = torch.nn.functional.interpolate(x, (28, 28), mode="bilinear", antialias=True)
    logits = common.load_model(world, "jitter_s42")[0]((small * 255).round() / 255).detach()
    confidence, answer = logits.softmax(1).max(1)
    assert said[1] == f"jitter_s42: {int(answer)} ({float(confidence):.2f})"
    assert (world / "figures/gradcam_image.png").exists()


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--models nobody_s1", "nobody_s1.pt is missing"),
        ("--models larger", "28"),
        ("--models fewer", "5 classes"),
        ("--models baseline_s42 ./baseline_s42", "would share one row"),
        ("--layer conv9", "its layers are conv1, conv2, conv3, relu, fc"),
        ("--layer fc", "no map"),
        ("--digit 11", "choose one of [0, 1"),
        ("--split train", "invalid choice"),
        ("--dir nowhere", "nowhere/test_hard.pt is missing"),
        ("--split val", "val.pt has no gray"),
        ("--image results/meta.json", "no picture"),
        ("--models jitter_s42", "models ['baseline_s42']"),
        ("--maximise --models nobody_s1", "nobody_s1.pt is missing"),
        ("--maximise --layer conv1", "--layer means nothing"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(world, mistake, arguments, says):
    checkpoint(world / "larger.pt", size=32)
    checkpoint(world / "fewer.pt", classes=5)
    split = torch.load(world / "val.pt", weights_only=True)
    del split["gray"]
    common.save_pt(split, world / "val.pt")
    common.save_json({"args": {"models": ["baseline_s42"]}}, world / "gradcam.json")
    mistake(f"gradcam.py {arguments}", says)


def test_a_row_that_did_not_train_is_marked():
    models = {"a_s1": {"trained": False}, "b_s1": {"trained": True}, "c_s1": {}}
    rows = g.rows_of({"args": {"models": list(models)}, "models": models})
    assert list(rows) == ["a (did not train)", "b", "c"]
