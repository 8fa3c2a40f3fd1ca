"""gradcam.py: maps computed by hand, scores and flip rates with known answers, the command line on the tiny world."""

import json
import sys

import pytest
import torch
import torch.nn as nn

import common
import gradcam as g


def a_split(n=40, size=28):
    """A Split of random pictures on random colours."""
    gen = torch.Generator().manual_seed(0)
    gray = torch.randint(0, 256, (n, size, size), generator=gen, dtype=torch.uint8)
    colours = torch.randint(0, 10, (n,), generator=gen)
    return common.Split(common.paint(gray, colours, gen), torch.arange(n) % 10, colours, gray)


def a_model(name="simplecnn", size=28):
    torch.manual_seed(0)
    return common.build_model(name, size=(size, size)).eval()


# ---------------------------------------------------------------- heat maps

A = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [0.0, 1.0]]]])  # (1,2,2,2)
G = torch.tensor([[[[1.0, -1.0], [2.0, 2.0]], [[0.0, -4.0], [0.0, 0.0]]]])


def test_gradcam_by_hand():
    assert torch.equal(g.gradcam(A, G), A[:, 0] * 1 + A[:, 1] * -1)  # mean gradients 1 and -1


def test_hirescam_by_hand():
    assert torch.equal(g.hirescam(A, G), torch.tensor([[[1.0, -6.0], [6.0, 8.0]]]))


def test_gradcam_pp_by_hand():
    # channel 0: activations sum to 10, so alpha = 1 / (2 + 10 g): 1/12 for g = 1, 1/22 for g = 2; g = -1 is cut by the ReLU
    # channel 1: no positive gradient, and alpha is 0/0 where the gradient is 0: weight 0
    weight = 1 * 1 / 12 + 2 * 2 * (1 / 22)
    assert torch.allclose(g.gradcam_pp(A, G), A[:, 0] * weight)


class Linear(nn.Module):
    """A net whose map is its input, so that the gradient is a row of the head."""

    def __init__(self):
        super().__init__()
        self.look, self.fc = nn.Identity(), nn.Linear(12, 3)

    def forward(self, x):
        if x.shape[-1] != 2:
            raise ValueError("two pixels only")
        return self.fc(self.look(x).flatten(1))


def test_explain_finds_the_gradient_of_the_chosen_logit():
    model, x = Linear(), torch.rand(4, 3, 2, 2)
    target = torch.tensor([0, 1, 2, 1])
    e = g.explain(model, model.look, x, target)
    assert torch.equal(e.activation, x) and torch.equal(
        e.gradient, model.fc.weight[target].view(4, 3, 2, 2)
    )
    assert torch.equal(g.explain(model, model.look, x).target, model(x).argmax(1))


def test_explain_leaves_no_trace():
    model = a_model().train()
    g.explain(model, model.relu, torch.rand(2, 3, 28, 28))
    assert (
        model.training
        and not model.relu._forward_hooks
        and all(p.grad is None for p in model.parameters())
    )
    model = Linear().train()
    with pytest.raises(ValueError, match="two pixels"):
        g.explain(model, model.look, torch.rand(1, 3, 3, 3))
    assert model.training and not model.look._forward_hooks


def test_an_in_place_relu_after_the_layer_does_not_alter_the_map():
    layer = nn.Conv2d(3, 2, 3)
    model = nn.Sequential(layer, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 2))
    x = torch.randn(3, 3, 4, 4)
    assert torch.equal(g.explain(model, layer, x).activation, layer(x))


@pytest.mark.parametrize("cam", g.CAMS)
def test_a_batch_equals_one_at_a_time(cam, monkeypatch):
    model, split = a_model(), a_split(7)
    whole = g.heat_of(model, model.relu, split, cam)
    monkeypatch.setattr(g, "BATCH", 1)
    single = g.heat_of(model, model.relu, split, cam)
    assert torch.allclose(whole.maps, single.maps, rtol=1e-4, atol=1e-6) and torch.equal(
        whole.predicted, single.predicted
    )
    assert whole.maps.shape == (7, 7, 7) and whole.maps.min() >= 0


def test_hirescam_is_complete_before_a_linear_head_and_gradcam_is_not():
    model = a_model()
    left = g.completeness(model, model.relu, a_split())
    assert left["hirescam"]["max"] < 1e-5 < 1e-2 < left["gradcam"]["max"]


def test_resnet18():
    model, split = a_model("resnet18", 32), a_split(3, 32)
    name, size = g.find_layer(model, None, split, "resnet")
    assert (name, size) == ("layer2", (4, 4))
    for cam in g.CAMS:
        assert g.heat_of(model, model.layer2, split, cam).maps.isfinite().all()
    inside = model.layer3[0].bn1  # an in-place ReLU follows
    assert g.heat_of(model, inside, split, "gradcam").maps.shape == (3, 2, 2)
    assert not any(m._forward_hooks for m in model.modules())


# ---------------------------------------------------------------- scores


def test_a_uniform_map_has_lift_one():
    s = g.heat_scores(torch.full((40, 7, 7), 3.0), a_split().gray)
    assert torch.allclose(s.lift, torch.ones(40).double()) and torch.allclose(s.pointing, s.area)


def test_share_area_and_pointing_by_hand():
    gray = torch.zeros(3, 4, 4, dtype=torch.uint8)
    gray[:2, :, 0] = 26  # the left column; 26 / 255 is just above 0.1
    gray[:2, :, 1] = 25  # just below
    maps = torch.zeros(3, 4, 4)
    maps[0, 0, 0], maps[0, 3, 3] = 3, 1
    maps[2] = 1  # image 1 has no heat, image 2 no digit
    s = g.heat_scores(maps, gray)
    assert s.share[0] == 0.75 and s.area[0] == 0.25 and s.lift[0] == 3 and s.pointing[0] == 1
    summary = g.summary(s)
    assert s.share[1:].isnan().all() and (summary["n"], summary["zero_maps"], summary["lift"]) == (
        3,
        2,
        3,
    )
    assert (
        g.summary(s, torch.tensor([False, True, False]))["lift"] is None
    )  # nothing left to average


def test_spearman_with_ties_by_hand():
    # ranks 1 2.5 2.5 4 and 1 3 2 4 around their mean 2.5: products 4.5, squares 4.5 and 5
    a, b = torch.tensor([[0.0, 5.0, 5.0, 9.0]]), torch.tensor([[1.0, 30.0, 2.0, 40.0]])
    assert g.spearman(a, b).item() == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert g.spearman(a, -a).item() == pytest.approx(-1) and g.spearman(a, torch.ones(1, 4)).isnan()


# ---------------------------------------------------------------- flip rates


class SeesColour(nn.Module):
    """Names the palette colour of the top row, which no digit of the tiny world touches."""

    def forward(self, x):
        return -torch.cdist(
            x[:, :, 0].mean(2), torch.tensor(list(common.PALETTES["background"].values())) / 255
        )


class SeesShape(nn.Module):
    """Counts the lit 4x4 cells of the digit, whose pixels are 0.6 on every background; a few stray pixels do not matter."""

    def forward(self, x):
        cells = ((x * 255).round() == 153).all(1).sum((1, 2)).add(8).div(16, rounding_mode="floor")
        return nn.functional.one_hot(cells, 30).float()


def test_a_digit_world_is_repainted_with_its_own_variance(tiny, tmp_path):
    tiny(tmp_path, n=200)
    common.save_json({"recipe": "digit", "sigma2": 0.0}, tmp_path / "meta.json")
    split = common.load_splits(tmp_path, ("test_hard",))["test_hard"]
    recipe, _ = g.recipe_of(tmp_path, split)
    painted = g.repaint(split, torch.full_like(split.labels, 1), recipe, seed=0).images
    teal = torch.tensor(list(common.PALETTES["digit"].values())[1]).view(1, 3, 1, 1)
    assert (painted - split.gray[:, None] / 255 * teal).abs().max() <= 0.51


def test_flip_rates_of_a_model_that_sees_only_colour_and_of_one_that_sees_only_shape(
    tiny, tmp_path
):
    tiny(tmp_path, n=200)
    split = common.load_splits(tmp_path, ("test_hard",))["test_hard"]
    recipe, obstacle = g.recipe_of(tmp_path, split)
    assert recipe["recipe"] == "background" and obstacle is None
    predictions, partner = g.counterfactuals(
        {"colour": SeesColour(), "shape": SeesShape()}, split, recipe, seed=0
    )
    rates, changed = g.flip_rates(*predictions["colour"], partner, split.labels, split.colors)
    assert (
        rates["background"]["changed"]["rate"]
        == rates["background"]["any"]["rate"]
        == rates["background"]["follows"]["rate"]
        == 1
    )
    assert (
        rates["digit"]["changed"]["rate"] == 0
        and rates["background"]["pairs"] == 9 * len(split.labels)
        and (changed == 1).all()
    )
    rates, changed = g.flip_rates(*predictions["shape"], partner, split.labels, split.colors)
    cells = (split.gray > 0).sum((1, 2)) // 16
    differs = split.labels[partner] != split.labels
    assert (
        rates["background"]["changed"]["rate"] == rates["background"]["any"]["rate"] == 0
        and (changed == 0).all()
    )
    assert rates["digit"]["changed"]["n"] == differs.sum() and 0 < differs.sum() < len(differs)
    assert rates["digit"]["changed"]["rate"] == pytest.approx(
        (cells[partner] != cells)[differs].double().mean().item()
    )


def test_repainting_changes_the_colour_and_keeps_the_texture():
    split = a_split()._replace(gray=torch.zeros(40, 28, 28, dtype=torch.uint8))  # background only
    black, brown = (
        g.repaint(split, torch.full((40,), c), {"recipe": "background"}, seed=1)
        .images[:, 0]
        .float()
        for c in (9, 7)
    )
    unclipped = (black > 0) & (brown < 255)
    assert ((brown - black - 140).abs()[unclipped] <= 1).all() and unclipped.float().mean() > 0.3


def test_what_cannot_be_repainted_says_why(tmp_path):
    split = a_split()
    assert "no colors" in g.recipe_of(tmp_path, split._replace(colors=None))[1]
    assert "meta.json" in g.recipe_of(tmp_path, split)[1]
    common.save_json({"recipe": "plaid"}, tmp_path / "meta.json")
    assert "'plaid'" in g.recipe_of(tmp_path, split)[1]


# ---------------------------------------------------------------- the command line


def checkpoint(path, name="simplecnn", size=28, classes=10, method="baseline"):
    """A checkpoint in the format of train.py, with random weights."""
    torch.manual_seed(1)
    model = common.build_model(name, classes=classes, size=(size, size))
    args = {"model": name, "width": 4, "method": method, "seed": 42}
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    common.save_pt(
        {"weights": weights, "args": args, "classes": classes, "size": [size, size]}, path
    )


def measured(folder, name="gradcam"):
    record = json.loads((folder / f"{name}.json").read_text())
    return {k: v for k, v in record.items() if k != "run"}


FIGURES = ("examples", "lift_flip", "models", "sanity", "ten_colours")


def test_command_line_and_the_same_numbers_again(tiny, cli, tmp_path, monkeypatch, capsys):
    world = tmp_path / "results"
    tiny(world)
    cli("train.py --epochs 1")
    checkpoint(world / "jitter_s42.pt", method="jitter")
    cli("gradcam.py")
    once = measured(world)
    assert set(once) == {"schema", "script", "args", "split", "repainting", "models", "null"}
    assert list(once["models"]) == ["baseline_s42", "jitter_s42"]
    model = once["models"]["jitter_s42"]
    assert set(model) == {
        "method",
        "seed",
        "layer",
        "map_size",
        "acc",
        "maps",
        "flips",
        "lift_flip_correlation",
        "residual",
    }
    assert set(model["maps"]) == {"test_hard", "aligned", "conflicting"} and set(
        model["flips"]
    ) == {"background", "digit"}
    assert (
        model["maps"]["aligned"]["n"] + model["maps"]["conflicting"]["n"]
        == model["maps"]["test_hard"]["n"]
        == 100
    )
    assert (
        once["null"]["uniform_map"]["lift"] == pytest.approx(1)
        and len(once["null"]["cascade"]) == 4
    )
    assert {p.name for p in (world / "figures").glob("gradcam*")} == {
        f"gradcam_{f}.png" for f in FIGURES
    }
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, capsys, "") == (0, "") and measured(world) == once
    g.main(["--report"])
    told = capsys.readouterr().out
    assert (
        all(f"(figures/gradcam_{f}.png)" in told for f in FIGURES)
        and "| baseline | test_hard | 100 |" in told
    )


def call(monkeypatch, capsys, arguments):
    """gradcam.main in this process: (exit code, what it said on stderr)."""
    monkeypatch.setattr(sys, "argv", ["gradcam.py", *arguments.split()])
    code = 0
    try:
        g.main(arguments.split())
    except SystemExit as e:
        code = e.code
    return code, capsys.readouterr().err


@pytest.fixture
def world(tiny, tmp_path, monkeypatch):
    """The current folder holds the tiny world in results/, with one random model of each kind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(g, "SANITY_DRAWS", 1)
    tiny(tmp_path / "results")
    checkpoint(tmp_path / "results/baseline_s42.pt")
    return tmp_path / "results"


def test_every_flag_at_once_writes_beside_the_default_files(world, monkeypatch, capsys):
    flags = "--models baseline_s42 --cam gradcam++ --target label --split test_unbiased --digit 3 --layer conv2 --seed 7"
    assert call(monkeypatch, capsys, flags) == (0, "")
    assert measured(world, "gradcam_gradcampp")["models"]["baseline_s42"]["map_size"] == [14, 14]
    assert not (world / "gradcam.json").exists()
    (
        world / "gradcam_gradcampp.pt"
    ).unlink()  # what the figures show is not committed: the report leaves the pictures as they are
    before = (world / "figures/gradcam_gradcampp_examples.png").read_bytes()
    assert call(monkeypatch, capsys, "--cam gradcam++ --report")[0] == 0
    assert (world / "figures/gradcam_gradcampp_examples.png").read_bytes() == before


def test_a_world_without_colours_has_heat_but_no_flips(world, monkeypatch, capsys):
    for name in common.SPLITS:
        split = torch.load(world / f"{name}.pt", weights_only=True)
        common.save_pt({k: v for k, v in split.items() if k != "colors"}, world / f"{name}.pt")
    assert call(monkeypatch, capsys, "--models baseline_s42")[0] == 0
    model = measured(world)["models"]["baseline_s42"]
    assert (
        model["flips"] is None
        and list(model["maps"]) == ["test_hard"]
        and measured(world)["repainting"] == "the split has no colors"
    )
    assert call(monkeypatch, capsys, "--report")[0] == 0


@pytest.mark.parametrize(
    "arguments, says",
    [
        ("--models nobody_s1", "nobody_s1.pt is missing"),
        ("--models test_hard", "not a checkpoint"),
        ("--models larger", "28"),
        ("--models fewer", "5 classes"),
        ("--models baseline_s42 --layer conv9", "choose one of conv1, conv2, conv3, relu"),
        ("--models baseline_s42 --layer fc", "has no map"),
        ("--models baseline_s42 --digit 11", "--digit 11"),
        ("--models baseline_s42 --split train", "invalid choice"),
        ("--models", "expected at least one argument"),
        ("--cam scorecam", "invalid choice"),
        ("--target none", "invalid choice"),
        ("--digit -1", "whole number"),
        ("--dir nowhere", "nowhere/test_hard.pt is missing"),
        ("--report --cam hirescam", "--cam hirescam"),
        ("--models baseline_s42 --split val", "val.pt has no gray"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_2(world, monkeypatch, capsys, arguments, says):
    checkpoint(world / "larger.pt", size=32)
    checkpoint(world / "fewer.pt", classes=5)
    split = torch.load(world / "val.pt", weights_only=True)
    common.save_pt({k: v for k, v in split.items() if k != "gray"}, world / "val.pt")
    code, said = call(monkeypatch, capsys, arguments)
    assert code == 2 and says in said and "Traceback" not in said
    assert (
        said.strip().splitlines()[-1].startswith("gradcam.py: ")
        and not (world / "gradcam.json").exists()
    )
