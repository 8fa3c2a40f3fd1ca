"""What the scripts share: pictures, nets, seeds, names, whole files, numbers of the tables."""

import argparse
import math
import os
import subprocess
import sys
import zlib
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import common


@pytest.fixture
def refused(capfd):
    """Assert that a call ends with exit code 2 and one line that holds every one of `says`."""

    def fails(*says):
        class Check:
            def __enter__(self):
                capfd.readouterr()

            def __exit__(self, kind, error, _):
                line = capfd.readouterr().err
                assert kind is SystemExit and error.code == 2 and line.count("\n") == 1, line
                assert all(word in line for word in says), line
                return True

        return Check()

    return fails


# ---- pictures

LISTED = [  # the palette of `background` as it was agreed on
    *((255, 0, 0), (0, 200, 0), (0, 80, 255), (255, 220, 0), (200, 0, 200)),
    *((0, 200, 200), (255, 130, 180), (140, 100, 50), (255, 255, 255), (0, 0, 0)),
]
GRAY = torch.tensor([0, 1, 100, 255], dtype=torch.uint8).repeat(16).view(1, 8, 8)


def test_the_palettes_are_those_of_the_papers():
    palettes = {
        name: [tuple(bytes.fromhex(c[1:])) for c in palette.values()]
        for name, palette in common.PALETTES.items()
    }
    assert palettes["background"] == LISTED
    assert palettes["flat"][6] == (255, 128, 0) and palettes["digit"][0] == (220, 20, 60)
    assert all(len(set(colours)) == 10 for colours in palettes.values())


def test_background_is_painted_as_described():
    """The same draws in numpy: one brightness noise on the colour, then light-grey ink."""
    gray, colours = GRAY.repeat(3, 1, 1), torch.tensor([9, 3, 7])
    noise = torch.randn(3, 8, 8, generator=common.stream(3, "p")).numpy()
    images = common.paint(gray, colours, common.stream(3, "p")).numpy()
    for image, ink, colour, grain in zip(images, gray.numpy() / 255, colours, noise, strict=True):
        background = np.clip(np.array(LISTED[colour])[:, None, None] / 255 + 0.15 * grain, 0, 1)
        assert np.abs(image - 255 * (background * (1 - ink) + 0.6 * ink)).max() <= 0.51


def test_flat_turns_every_pixel_that_is_not_black_white():
    image = common.paint(GRAY, torch.tensor([6]), common.stream(0, "p"), "flat")[0]
    ink = GRAY[0] > 0
    assert (image[:, ink] == 255).all()
    assert image[:, ~ink].unique(dim=1)[:, 0].tolist() == [255, 128, 0]


def test_digit_draws_one_colour_an_image_around_its_mean():
    gray = torch.full((160, 8, 8), 255, dtype=torch.uint8)
    gray[:, 0] = 51
    noise = torch.randn(160, 3, 1, 1, generator=common.stream(1, "p"))
    images = common.paint(gray, torch.zeros(160).long(), common.stream(1, "p"), "digit", 0.04)
    colour = (torch.tensor([220, 20, 60]).view(3, 1, 1) / 255 + 0.2 * noise).clamp(0, 1)
    assert (images[:, :, 1:] - 255 * colour).abs().max() <= 0.51
    assert (images[:, :, :1] - 51 * colour).abs().max() <= 0.51  # a stroke on black


def test_every_image_of_many_has_its_own_colour_and_texture():
    gray, colours = torch.zeros(330, 8, 8, dtype=torch.uint8), torch.arange(330) // 33
    flat = common.paint(gray, colours, common.stream(0, "p"), "flat")
    ten = common.paint(gray[:10], torch.arange(10), common.stream(0, "p"), "flat")
    assert torch.equal(flat, ten[colours]) and len(ten.unique(dim=0)) == 10
    noisy = common.paint(gray, torch.full((330,), 7), common.stream(0, "p"))
    assert len({tuple(image.flatten().tolist()) for image in noisy}) == 330


# ---- the nets


def test_simplecnn_is_as_small_as_promised_and_pools_before_relu():
    torch.manual_seed(0)
    model, x = common.build_model(), torch.rand(8, 3, 28, 28)
    assert sum(p.numel() for p in model.parameters()) == 4486
    z = F.max_pool2d(F.relu(model.conv1(x)), 2)
    z = F.relu(model.conv3(F.max_pool2d(F.relu(model.conv2(z)), 2)))
    assert torch.allclose(model.features(x), z, atol=1e-6)
    assert torch.allclose(model(x), model.fc(z.flatten(1)), atol=1e-5)


@pytest.mark.parametrize("size", [(28, 28), (29, 33), (2, 3)])
def test_pooling_says_the_same_with_and_without_a_gradient(size):
    x = torch.randn(2, 4, *size, requires_grad=True)
    kept = common.max_pool(x)
    with torch.inference_mode():
        assert torch.equal(common.max_pool(x), kept) and torch.equal(kept, F.max_pool2d(x, 2))
    (slope,) = torch.autograd.grad(kept.sum(), x)
    assert slope.sum() == kept.numel(), "the gradient goes to the largest of four"


def test_the_mlp_has_the_sizes_of_the_published_one():
    model = common.build_model("mlp")
    assert sum(p.numel() for p in model.parameters()) == 256_510
    assert [p.shape for p in model.parameters() if p.ndim == 2] == [
        (100, 2352),
        (100, 100),
        (100, 100),
        (10, 100),
    ]
    x = torch.rand(2, 3, 28, 28).to(memory_format=torch.channels_last)
    z = x.permute(0, 2, 3, 1).reshape(2, 784, 3).permute(0, 2, 1).reshape(2, 2352)
    for layer in (model.hidden0, model.hidden1, model.hidden2):
        z = (z @ layer.weight.T + layer.bias).clamp(min=0)
    assert torch.allclose(model(x), z @ model.fc.weight.T + model.fc.bias, atol=1e-5)


def test_the_saturated_net_ends_its_first_activation_at_one():
    torch.manual_seed(0)
    model, x = common.build_model("saturatedcnn", 5, 7, (29, 33)), 9 * torch.rand(2, 3, 29, 33)
    z = F.max_pool2d(F.relu(model.conv1(x)).tanh(), 2)
    z = F.relu(model.conv3(F.max_pool2d(F.relu(model.conv2(z)), 2)))
    assert torch.allclose(model.features(x), z, atol=1e-6)
    assert model(x).shape == (2, 7) and model.conv3.out_channels == 10


def test_a_grayscale_net_sees_brightness_only():
    red, green, blue = torch.zeros(3, 1, 3, 28, 28)
    red[:, 0, 5:9], green[:, 1, 5:9], blue[:, 2, 5:9] = 1.0, 0.299 / 0.587, 0.299 / 0.114
    assert common.luma(red).max().item() == pytest.approx(0.299)
    model = common.build_model(grayscale=True)
    assert torch.allclose(model(red), model(green), atol=1e-6)
    assert torch.allclose(model(red), model(blue), atol=1e-6)
    assert not torch.allclose(common.build_model()(red), common.build_model()(green), atol=1e-6)


def test_predict_answers_every_image_in_eval_mode():
    class Echo(torch.nn.Module):
        def forward(self, x):
            assert not self.training and len(x) <= 1000
            return F.one_hot((x[:, 0, 0, 0] * 255).round().long(), 256)

    pixels = torch.arange(2300).remainder(256).to(torch.uint8)
    split = common.Split(pixels.view(-1, 1, 1, 1).expand(-1, 3, 8, 8), pixels.long(), None, None)
    assert common.predict(Echo().train(), split).tolist() == pixels.tolist()


# ---- seeds, arguments, errors


def test_a_stream_belongs_to_a_seed_and_a_purpose():
    assert common.stream(42, "order 1").initial_seed() == zlib.crc32(b"42/order 1")
    draws = [
        torch.rand(3, generator=common.stream(*which)).tolist()
        for which in ((1, "a"), (1, "a"), (2, "a"), (1, "b"))
    ]
    assert draws[0] == draws[1] and draws[0] != draws[2] and draws[0] != draws[3]


def test_numbers_of_the_command_line_have_ends():
    share, count = common.number(float, 0, 1), common.number(int, 1, 9)
    assert (share("0"), share("1"), count("7")) == (0.0, 1.0, 7)
    for parse, text in (
        (share, "1.01"),
        (share, "-1"),
        (share, "nan"),
        (count, "0"),
        (count, "10"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            parse(text)
    assert count.__name__ == "int"


@pytest.fixture
def common_flags():
    parser = argparse.ArgumentParser(prog="train.py")
    common.common_args(parser, seed_of="weights")
    return lambda *flags: parser.parse_args([*flags])


def test_the_flags_of_every_script(common_flags, refused):
    assert {k: str(v) for k, v in vars(common_flags()).items()} == {
        "dir": "results",
        "seed": "42",
        "device": "auto",
        "threads": "1",
        "overwrite": "False",
        "report": "False",
    }
    with refused("invalid choice", "python train.py --help"):
        common_flags("--device", "tpu")
    with refused("--threads"):
        common_flags("--threads", "0")


def test_setup_sets_threads_and_determinism_and_refuses_what_is_not_there(
    tmp_path, common_flags, refused, monkeypatch
):
    flags = ("--dir", str(tmp_path), "--device")
    assert common.setup(common_flags(*flags, "cpu")) == torch.device("cpu")
    assert torch.are_deterministic_algorithms_enabled() and torch.get_num_threads() == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "is_available", lambda: False)
    assert common.setup(common_flags(*flags, "auto")) == torch.device("cpu")
    with refused("--device cuda is not available", "auto"):
        common.setup(common_flags(*flags, "cuda"))
    (tmp_path / "file").write_text("")
    with refused("file is no folder"):
        common.setup(common_flags("--dir", str(tmp_path / "file")))


def test_run_gives_one_line_for_what_users_and_machines_do(refused, capfd, monkeypatch):
    def raise_this(error):
        raise error

    monkeypatch.setattr(sys, "argv", ["somewhere/train.py"])
    with refused("train.py: no good; mend it so"):
        common.run(lambda: common.die("no\ngood", "mend\nit so"))
    with refused("cannot use x.pt: No space left"):
        common.run(lambda: raise_this(OSError(28, "No space left on device", "x.pt")))
    with pytest.raises(SystemExit) as stop:
        common.run(lambda: raise_this(KeyboardInterrupt()), "use --resume")
    assert stop.value.code == 130
    assert capfd.readouterr().err == "\ntrain.py: interrupted; use --resume\n"
    with pytest.raises(ZeroDivisionError):
        common.run(lambda: 1 / 0)


# ---- names


@pytest.mark.parametrize(
    "changed, name",
    [
        ({}, "at_s42"),
        ({"seed": 3, "dir": "x", "device": "cpu", "threads": 8, "overwrite": True}, "at_s3"),
        ({"lr": 0.01, "kind": "one_cycle"}, "at_lr0.01_onecycle_s42"),
        ({"clean_epochs": 4, "lr": 1e-05}, "at_cleanepochs4_lr1e-05_s42"),
        ({"fade": False, "on": True}, "at_nofade_on_s42"),
        ({"sweep": [0.1, 0.25]}, "at_sweep0.1-0.25_s42"),
        ({"skipped": "yes"}, "at_s42"),
    ],
)
def test_a_name_says_what_differs(changed, name):
    usual = {"clean_epochs": 0, "lr": 0.001, "kind": "constant", "fade": True, "on": False}
    usual |= {"seed": 42, "dir": "results", "device": "auto", "threads": 1, "overwrite": False}
    usual |= {"sweep": [0.1], "skipped": None}
    args = SimpleNamespace(**{**usual, **changed})
    assert common.name_of("at", args, SimpleNamespace(**usual), ["skipped"]) == name


def test_a_row_is_a_name_without_seed_and_folder():
    names = ("jitter_hsv_s42", "unbiased/jitter_hsv_s7", "jitter_hsv", "a_s1_b", "s9_s10")
    assert [common.row_of(n) for n in names] == ["jitter_hsv"] * 3 + ["a_s1_b", "s9"]


def test_a_result_of_other_settings_is_not_replaced(tmp_path, refused):
    path = tmp_path / "a_s1.json"
    common.guard(path, {"lr": 1}, overwrite=False)
    common.save_json({"args": {"lr": 0.1, "width": 4}}, path)
    common.guard(path, {"lr": 0.1, "width": 4, "new": 5}, overwrite=False)
    common.guard(path, {"lr": 1}, overwrite=True)
    with refused("a_s1.json", "lr 0.1", "--overwrite"):
        common.guard(path, {"lr": 1, "width": 4}, overwrite=False)
    common.save_json({"mode": "pairs", "args": {}}, path)
    with refused("mode pairs"):
        common.guard(path, {"mode": "check"}, overwrite=False)


def test_a_world_is_known_by_its_painting(tmp_path):
    assert common.world_of(tmp_path) == {}
    about = {"recipe": "flat", "corr": 0.99, "seed": 1, "limit": None, "is_mnist": True}
    common.save_json({**about, "sigma2": None, "counts": [1], "run": {}}, tmp_path / "meta.json")
    assert common.world_of(tmp_path) == about
    common.save_json({**about, "sigma2": 0.02}, tmp_path / "meta.json")
    assert common.world_of(tmp_path) == {**about, "sigma2": 0.02}


# ---- files


def test_two_processes_may_write_one_file_at_a_time(tmp_path):
    writes = f"""
from pathlib import Path
from common import save_json
for _ in range(500):
    save_json({{"a": 1}}, Path({str(tmp_path / "a.json")!r}))
"""
    both = [subprocess.Popen([sys.executable, "-c", writes], cwd=ROOT) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.json"
    common.save_json({"b": [1, 2.5], "a": {"x": []}}, path)
    assert path.read_text() == '{\n "a": {\n  "x": []\n },\n "b": [ 1, 2.5 ]\n}\n'
    old = path.read_bytes()

    def broken(file):
        file.write(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError):
        common.write(path, broken)
    with pytest.raises(ValueError):
        common.save_json({"a": math.nan}, path)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(os, "replace", lambda part, whole: (_ for _ in ()).throw(OSError))
        common.save_json({"a": 1}, path)
    assert path.read_bytes() == old
    common.save_json({"a": 2}, path)
    assert common.load_json(path, "") == {"a": 2} and len([*path.parent.iterdir()]) == 1


def test_figures_have_150_pixels_an_inch_and_repeat(tmp_path):
    sizes = []
    for name in ("a.png", "b.png"):
        fig = plt.figure(figsize=(2, 1))
        common.save_figure(fig, tmp_path / name)
        sizes.append(plt.imread(tmp_path / name).shape[:2])
        plt.close(fig)
    assert sizes == [(150, 300)] * 2
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert b"matplotlib" not in (tmp_path / "a.png").read_bytes()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_foreign_files_get_one_line_and_run_no_code(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pt"
    for load in (common.load_pt, common.load_json):
        with refused("a.pt is missing", "make it"):
            load(path, "make it")
    torch.save({"x": Evil()}, path)
    with refused("a.pt", "UnpicklingError"):
        common.load_pt(path, "")
    assert not (tmp_path / "evil").exists()
    for text in ("hello", "[1, 2]"):
        path.write_text(text)
        with refused("a.pt is not a whole JSON file"):
            common.load_json(path, "")
        with refused("a.pt is no dictionary"):
            common.load_pt(path, "")


def save_split(folder, **changes):
    parts = {
        "images": torch.arange(5 * 3 * 8 * 9).remainder(256).view(5, 3, 8, 9).byte(),
        "labels": torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32),
        "colors": torch.tensor([4, 3, 2, 1, 0]),
        "gray": torch.zeros(5, 8, 9, dtype=torch.uint8),
    }
    parts = {k: v for k, v in {**parts, **changes}.items() if v is not None}
    common.save_pt(parts, folder / "val.pt")
    return parts


def test_a_split_is_pixels_classes_and_perhaps_colours(tmp_path):
    saved = save_split(tmp_path)
    split = common.load_split(tmp_path, "val")
    for name, value in split._asdict().items():
        assert torch.equal(value, saved[name].to(value.dtype)), name
    assert split.labels.dtype == split.colors.dtype == torch.int64
    assert split.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(split.x(torch.tensor([3])), saved["images"][3:4] / 255)
    save_split(tmp_path, colors=None, gray=None)
    assert common.load_split(tmp_path, "val")[2:] == (None, None)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"labels": None}, "labels"),
        ({"images": torch.zeros(5, 3, 8, 9)}, "images must be uint8"),
        ({"images": torch.zeros(5, 8, 9).byte()}, "images must be uint8 (N,3,H,W)"),
        ({"images": torch.zeros(5, 8, 9, 3).byte()}, "images.permute(0, 3, 1, 2)"),
        ({"images": torch.zeros(5, 1, 8, 9).byte()}, "images must be uint8 (N,3,H,W)"),
        ({"gray": torch.zeros(5, 9, 8).byte()}, "gray"),
        ({"colors": torch.zeros(4).long()}, "colors"),
        ({"colors": torch.zeros(5)}, "colors must be whole numbers"),
        ({"labels": torch.tensor([0, 1, 2, 3, -1])}, "labels must be whole numbers from 0"),
        ({"labels": torch.tensor([0, 1, 2, 3, 1000])}, "labels must be whole numbers"),
        ({"labels": torch.tensor([0, 1, 2, 3, 1000], dtype=torch.uint16)}, "labels must be"),
        ({"gray": torch.full((5, 8, 9), 256)}, "gray must be whole numbers"),
        ({"images": torch.zeros(0, 3, 8, 9).byte(), "labels": torch.zeros(0).long()}, "labels"),
    ],
)
def test_a_split_that_does_not_fit_gets_one_line(tmp_path, refused, changes, says):
    save_split(tmp_path, **changes)
    with refused("val.pt", says):
        common.load_split(tmp_path, "val")


def save_model(path, net, **changes):
    args = {"model": "simplecnn", "width": 3, "grayscale": True}
    about = {"weights": net.state_dict(), "args": args, "classes": 5, "size": [8, 9]}
    common.save_pt({**about, **changes}, path)


def test_a_model_comes_back_by_name_or_by_path(tmp_path, refused):
    net, x = common.build_model("simplecnn", 3, 5, (8, 9), True), torch.rand(2, 3, 8, 9)
    save_model(tmp_path / "jitter_s42.pt", net)
    save_model(tmp_path / "grl_s42.pt", net)
    for name in ("jitter_s42", str(tmp_path / "jitter_s42.pt")):
        model, record = common.load_model(tmp_path, name)
        assert torch.equal(model(x), net.eval()(x)) and not model.training
        assert record["classes"] == 5
    with refused("jitter_42.pt is missing", "try jitter_s42;"):
        common.load_model(tmp_path, "jitter_42")
    common.save_json({"world": {"recipe": "flat"}}, tmp_path / "jitter_s42.json")
    with refused("trained on another painting"):
        common.load_model(tmp_path, "jitter_s42")
    common.save_json({"recipe": "flat"}, tmp_path / "meta.json")
    common.load_model(tmp_path, "jitter_s42")


def test_a_foreign_checkpoint_gets_one_line(tmp_path, refused):
    net = common.build_model("simplecnn", 3, 5, (8, 9))
    broken = {k: torch.full_like(v, math.nan) for k, v in net.state_dict().items()}
    for changes in ({"weights": broken}, {"classes": 6}, {"args": {}}, {"weights": None}):
        save_model(tmp_path / "a.pt", net, **changes)
        with refused("a.pt is no checkpoint of train.py", "README.md"):
            common.load_model(tmp_path, "a")


# ---- numbers and tables


def test_wilson_ends_where_the_rate_is_just_not_refused():
    """Its ends p solve |k/n - p| = z sqrt(p (1 - p) / n)."""
    for k, n in ((8, 10), (1, 3), (999, 1000), (37, 200)):
        for p in common.wilson(k, n):
            assert abs(k / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), rel=1e-9)
        assert common.wilson(k, n)[0] < k / n < common.wilson(k, n)[1]
    assert common.wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert common.wilson(10, 10)[1] == 1 and common.wilson(0, 0) == (0, 1)


def test_mean_and_sample_sd():
    assert common.mean_sd([0.1, None, 0.3, 0.5]) == "0.300 ± 0.200 (3)"
    assert (common.mean_sd([0.25]), common.mean_sd([None])) == ("0.250", "-")


def test_tables_are_filled_between_their_marks(tmp_path, monkeypatch):
    table = common.markdown(["a", "b"], [[1, "x"], [2, "y"]])
    assert table == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |\n"
    monkeypatch.setattr(common, "ROOT", tmp_path)
    folder = tmp_path / "results"
    folder.mkdir()
    prose = (
        "One.\n<!-- table: one -->\nold\n<!-- end -->\nTwo.\n<!-- table: two -->\n<!-- end -->\n"
    )
    (folder / "report.md").write_text(prose)
    (tmp_path / "README.md").write_text("No marks: é\n")
    files = common.fill(folder, {"one": table, "two": None, "three": table})
    assert files == [folder / "report.md", tmp_path / "README.md"]
    filled = (
        f"One.\n<!-- table: one -->\n\n{table}\n<!-- end -->\nTwo.\n"
        "<!-- table: two -->\n\n*no results yet*\n<!-- end -->\n"
    )
    assert (folder / "report.md").read_text() == filled
    assert (tmp_path / "README.md").read_text() == "No marks: é\n"
    common.fill(folder, {"one": table, "two": None})
    assert (folder / "report.md").read_text() == filled
    common.fill(folder, {"one": None})
    assert "| a |" not in (folder / "report.md").read_text()  # never an old table


def test_another_world_gets_its_tables_in_a_file_of_their_own(tmp_path):
    assert common.fill(tmp_path, {"one": "old\n"}) == [tmp_path / "tables.md"]
    common.fill(tmp_path, {"one": None, "two": "new\n"})
    assert (tmp_path / "tables.md").read_text() == (
        "## one\n\n<!-- table: one -->\n\n*no results yet*\n<!-- end -->\n\n"
        "## two\n\n<!-- table: two -->\n\nnew\n\n<!-- end -->\n\n"
    )


def test_ink_is_one_colour_a_method():
    assert len(set(common.INK.values())) == len(common.INK)
