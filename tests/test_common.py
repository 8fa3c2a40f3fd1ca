"""What the scripts share: pictures, nets, seeds, names, whole files, numbers of the tables."""

import argparse
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
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

PALETTE = [  # as it was agreed on
    *((255, 0, 0), (0, 200, 0), (0, 80, 255), (255, 220, 0), (200, 0, 200)),
    *((0, 200, 200), (255, 130, 180), (140, 100, 50), (255, 255, 255), (0, 0, 0)),
]
GRAY = torch.tensor([0, 1, 100, 255], dtype=torch.uint8).repeat(16).view(1, 8, 8)


def test_background_is_painted_as_described():
    """The same draws in numpy: one brightness noise on the colour, then light-grey ink."""
    gray, mean = GRAY.repeat(3, 1, 1), torch.tensor([PALETTE[c] for c in (9, 3, 7)]) / 255
    noise = torch.randn(3, 8, 8, generator=common.stream(3, "p")).numpy()
    images = common.paint(gray, mean, common.stream(3, "p")).numpy()
    for image, ink, colour, grain in zip(images, gray.numpy() / 255, mean, noise, strict=True):
        background = np.clip(colour.numpy()[:, None, None] + 0.15 * grain, 0, 1)
        assert np.abs(image - 255 * (background * (1 - ink) + 0.6 * ink)).max() <= 0.51


def test_flat_turns_every_pixel_that_is_not_black_white():
    mean = torch.tensor([[1, 128 / 255, 0]])
    image = common.paint(GRAY, mean, common.stream(0, "p"), "flat")[0]
    assert (image[:, GRAY[0] > 0] == 255).all()
    assert image[:, GRAY[0] == 0].unique(dim=1)[:, 0].tolist() == [255, 128, 0]


def test_digit_draws_one_colour_an_image_around_its_mean():
    gray = torch.full((160, 8, 8), 255, dtype=torch.uint8)
    gray[:, 0] = 51
    mean = torch.tensor([[0.8, 0.1, 0.3]])
    noise = torch.randn(160, 3, 1, 1, generator=common.stream(1, "p"))
    images = common.paint(gray, mean.expand(160, 3), common.stream(1, "p"), "digit", 0.04)
    colour = (mean.view(3, 1, 1) + 0.2 * noise).clamp(0, 1)
    assert (images[:, :, 1:] - 255 * colour).abs().max() <= 0.51
    assert (images[:, :, :1] - 51 * colour).abs().max() <= 0.51  # a stroke on black


# ---- the nets


def test_simplecnn_is_as_small_as_promised_and_pools_before_relu():
    torch.manual_seed(0)
    model, x = common.build_model(), torch.rand(8, 3, 28, 28)
    assert sum(p.numel() for p in model.parameters()) == 4486
    z = F.max_pool2d(F.relu(model.conv1(x)), 2)
    z = F.relu(model.conv3(F.max_pool2d(F.relu(model.conv2(z)), 2)))
    assert torch.allclose(model.features(x), z, atol=1e-6)
    assert torch.allclose(model(x), model.fc(z.flatten(1)), atol=1e-5)


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


def test_answers_that_are_no_numbers_get_one_line(tmp_path, refused):
    net, x = common.build_model("simplecnn", 3, 5, (8, 9)), torch.rand(2, 3, 8, 9)
    net.conv3.weight.data.mul_(1e30)
    net.fc.weight.data.mul_(1e30)
    with refused("a model gives answers that are no numbers"):
        common.predict(net, x)
    save_model(tmp_path / "lost_s1.pt", net)
    model, _ = common.load_model(tmp_path, "lost_s1")
    with refused("lost_s1 gives answers that are no numbers"):
        model(x)  # whoever asks it


def test_a_torchvision_that_does_not_import_is_named(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with refused("torchvision does not import", "fits your torch"):
        common.build_model("resnet18")


def test_predict_answers_every_image_in_eval_mode_with_its_logits():
    class Echo(torch.nn.Module):
        def forward(self, x):
            assert not self.training and len(x) <= 1000
            return x[:, :, 0, 0] * 255

    pixels = torch.arange(2300).remainder(256).view(-1, 1).expand(-1, 3)
    images = pixels.to(torch.uint8)[:, :, None, None].expand(-1, -1, 8, 8)
    for seen in (images, images / 255):
        assert torch.allclose(common.predict(Echo().train(), seen), pixels.float(), atol=1e-4)


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
        ({}, "at"),
        ({"seed": 3, "dir": "x", "device": "cpu", "threads": 8, "overwrite": True}, "at_s3"),
        ({"lr": 0.01, "kind": "one_cycle"}, "at_lr0.01_onecycle"),
        ({"clean_epochs": 4, "lr": 1e-05}, "at_cleanepochs4_lr1e-05"),
        ({"fade": False, "on": True}, "at_nofade_on"),
        ({"sweep": [0.1, 0.25]}, "at_sweep0.1-0.25"),
        ({"skipped": "yes"}, "at"),
    ],
)
def test_a_name_says_what_differs(changed, name):
    usual = {"clean_epochs": 0, "lr": 0.001, "kind": "constant", "fade": True, "on": False}
    usual |= {"sweep": [0.1], "skipped": None, "dir": "results", "device": "auto", "threads": 1}
    usual |= {"overwrite": False, "seed": 42}
    args = SimpleNamespace(**{**usual, **changed})
    assert common.name_of("at", args, SimpleNamespace(**usual), ["skipped"]) == name


def test_a_row_is_a_name_without_seed_and_folder():
    names = ("jitter_hsv_s42", "unbiased/jitter_hsv_s7", "jitter_hsv", "a_s1_b", "s9_s10")
    assert [common.row_of(n) for n in names] == ["jitter_hsv"] * 3 + ["a_s1_b", "s9"]


def test_a_result_of_other_settings_is_not_replaced(tmp_path, refused):
    path = tmp_path / "a_s1.json"
    common.guard(path, {"lr": 1}, overwrite=False)
    common.save_json({"script": "train.py", "args": {"lr": 0.1, "width": 4}}, path)
    common.guard(path, {"lr": 0.1, "width": 4, "new": 5}, overwrite=False)
    common.guard(path, {"lr": 1}, overwrite=True)
    with refused("a_s1.json", "lr 0.1", "--overwrite"):
        common.guard(path, {"lr": 1, "width": 4}, overwrite=False)
    common.save_json({"script": "attack.py", "mode": "pairs", "args": {}}, path)
    with refused("mode pairs"):
        common.guard(path, {"mode": "check"}, overwrite=False)


def test_what_is_not_ours_is_not_replaced(tmp_path, refused):
    path = tmp_path / "a_s1.json"
    for record in ({"author": "me"}, {"script": "mine.py", "args": {"lr": 1}}):
        common.save_json(record, path)
        with refused("a_s1.json was not written by", "another --name"):
            common.guard(path, {"lr": 1}, overwrite=False)
        common.guard(path, {"lr": 1}, overwrite=True)
    path.unlink()
    save_model(tmp_path / "a_s1.pt", common.build_model())
    with refused("a_s1.pt has no a_s1.json beside it"):
        common.guard(path, {"lr": 1}, overwrite=False)
    save_model(tmp_path / "a_s1.pt", common.build_model(), script="train.py")  # killed between
    common.guard(path, {"lr": 1}, overwrite=False)


# ---- files


def test_two_processes_may_write_one_file_at_a_time(tmp_path):
    def write_often():
        for _ in range(100):
            common.save_json({"a": 1}, tmp_path / "a.json")

    fork = multiprocessing.get_context("fork")
    both = [fork.Process(target=write_often) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
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
        patch.setattr(Path, "write_bytes", half_written)
        common.save_json({"a": 1}, path)
    assert path.read_bytes() == old and [*path.parent.iterdir()] == [path], "no part is left"
    common.save_json({"a": 2}, path)
    assert common.load_json(path, "") == {"a": 2}


def half_written(path, data):
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
    raise OSError(28, "No space left on device", str(path))


def test_an_ascii_terminal_is_no_error():
    """Under a locale that has no ±."""
    env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = "import common; common.run(lambda: print(f'0.9 {chr(177)} 0.1'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 0 and b"0.9 ? 0.1" in done.stdout, done.stderr


def test_figures_have_150_pixels_an_inch_and_repeat(tmp_path):
    for name in ("a.png", "b.png"):
        common.save_figure(common.figure(2, 1)[0], tmp_path / name)
    assert matplotlib.image.imread(tmp_path / "a.png").shape[:2] == (150, 300)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert b"matplotlib" not in (tmp_path / "a.png").read_bytes()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_foreign_files_get_one_line_and_run_no_code(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pt"
    for load, kind in (
        (common.load_pt, "is no dictionary of tensors"),
        (common.load_json, "is not a whole JSON file"),
    ):
        with refused("a.pt is missing", "make it"):
            load(path, "make it")
        for data, says in (
            (pickle.dumps(Evil()), kind),
            (b"hello", kind),
            (b"[1, 2]", kind),
            (b"", kind),
        ):
            path.write_bytes(data)
            with refused("a.pt", says):
                load(path, "make it")
        path.unlink()
        with refused("cannot be read: Input/output error", "permissions"):
            load(Path("/proc/self/mem"), "make it")
    torch.save({"x": Evil()}, path)
    with refused("a.pt", "UnpicklingError"):
        common.load_pt(path, "")
    assert not (tmp_path / "evil").exists()


def test_a_missing_split_is_painted_or_described(tmp_path, refused):
    paint = f"run: python make_data.py --dir {tmp_path}"  # which replaces no data of one's own
    with refused("val.pt is missing", paint, "see 'The data' in README.md"):
        common.load_split(tmp_path, "val")


def save_split(folder, **changes):
    parts = {
        "images": torch.arange(5 * 3 * 8 * 9).remainder(256).view(5, 3, 8, 9).byte(),
        "labels": torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32),
        "colors": torch.tensor([4, 3, 2, 1, 0]),
        "gray": torch.zeros(5, 8, 9, dtype=torch.uint8),
        "env": torch.tensor([0, 1, 0, 1, 0]),
        "second": torch.tensor([4, 4, 4, 4, 4]),
        "value": torch.tensor([14, 3, 2, 1, 10]),
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
    assert split.take([0, 3]).value.tolist() == [14, 1]
    save_split(tmp_path, colors=None, gray=None, env=None, second=None, value=None)
    assert common.load_split(tmp_path, "val")[2:] == (None,) * 5


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"labels": None}, "labels"),
        ({"images": None}, "images must be uint8"),
        ({"images": torch.zeros(5, 3, 8, 9)}, ".mul(255).round().byte()"),
        ({"images": torch.zeros(5, 8, 9, 3).byte()}, "images.permute(0, 3, 1, 2)"),
        ({"images": torch.zeros(5, 1, 8, 9).byte()}, ".expand(-1, 3, -1, -1)"),
        ({"images": torch.ones(5, 3, 8, 9).byte()}, "blank or end at 1"),
        ({"gray": torch.zeros(5, 9, 8).byte()}, "gray"),
        ({"colors": torch.zeros(4).long()}, "colors"),
        ({"colors": torch.zeros(5)}, "colors must be whole numbers"),
        ({"labels": torch.tensor([0, 1, 2, 3, -1])}, "labels must be whole numbers from 0"),
        ({"labels": torch.tensor([0, 1, 2, 3, 1000])}, "labels must be whole numbers"),
        ({"gray": torch.full((5, 8, 9), 256)}, "gray must be whole numbers"),
        ({"images": torch.zeros(0, 3, 8, 9).byte(), "labels": torch.zeros(0).long()}, "blank"),
    ],
)
def test_a_split_that_does_not_fit_gets_one_line(tmp_path, refused, changes, says):
    save_split(tmp_path, **changes)
    with refused("val.pt", says):
        common.load_split(tmp_path, "val")


GONE = object()


def save_model(path, net, **changes):
    args = {"model": "simplecnn", "width": 3, "grayscale": True}
    about = {"weights": net.state_dict(), "args": args, "classes": 5, "size": [8, 9], **changes}
    common.save_pt({key: value for key, value in about.items() if value is not GONE}, path)


def test_a_model_comes_back_by_name_or_by_path(tmp_path, refused):
    net, x = common.build_model("simplecnn", 3, 5, (8, 9), True), torch.rand(2, 3, 8, 9)
    save_model(tmp_path / "jitter_s42.pt", net)
    save_model(tmp_path / "grl_s42.pt", net)
    for name in ("jitter_s42", str(tmp_path / "jitter_s42.pt")):
        model, record = common.load_model(tmp_path, name)
        assert torch.equal(model(x), net.eval()(x)) and not model.training
        assert record["classes"] == 5
    save_model(tmp_path / "attack_s42.pt", net, weights=GONE, script="attack.py")
    with refused("jitter_42.pt is missing", f"models in {tmp_path}: grl_s42, jitter_s42\n"):
        common.load_model(tmp_path, "jitter_42")
    with refused("attack_s42.pt is no checkpoint of train.py", "KeyError: 'weights'"):
        common.load_model(tmp_path, "attack_s42")


def test_a_model_must_fit_the_pixels_and_the_classes_of_a_split(tmp_path, refused):
    save_split(tmp_path)
    split = common.load_split(tmp_path, "val")
    common.check_fit("a", {"classes": 5, "size": [8, 9]}, split, "val.pt")
    for record in ({"classes": 4, "size": [8, 9]}, {"classes": 5, "size": [9, 9]}):
        with refused("a is built for", "val.pt has 5 of (8, 9)"):
            common.check_fit("a", record, split, "val.pt")


def test_a_foreign_checkpoint_gets_one_line(tmp_path, refused):
    net = common.build_model("simplecnn", 3, 5, (8, 9))
    good = net.state_dict()
    fewer = {key: t for key, t in good.items() if not key.startswith("conv2")}
    for changes, says in (
        ({"weights": fewer}, "do not fit simplecnn: conv2.bias, conv2.weight"),
        (
            {"weights": {f"module.{k}": v for k, v in good.items()}},
            ": conv1.bias, module.fc.weight",
        ),
        ({"classes": 6}, "do not fit simplecnn: fc.bias, fc.weight"),
        ({"size": 8}, "not iterable"),
        ({"args": {}}, "KeyError: 'model'"),
        ({"args": {"model": "vgg16", "width": 4}}, "model vgg16 is none of simplecnn"),
        ({"weights": None}, "NoneType"),
    ):
        save_model(tmp_path / "a.pt", net, **changes)
        with refused("a.pt is no checkpoint of train.py", says, "README.md"):
            common.load_model(tmp_path, "a")


# ---- numbers and figures


def test_wilson_ends_where_the_rate_is_just_not_refused():
    """Its ends p solve |k/n - p| = z sqrt(p (1 - p) / n)."""
    for k, n in ((8, 10), (1, 3), (999, 1000), (37, 200)):
        found = common.rate(torch.arange(n) < k)
        assert (found["k"], found["n"], found["rate"]) == (k, n, k / n)
        for p in (found["low"], found["high"]):
            assert abs(k / n - p) == pytest.approx(1.96 * math.sqrt(p * (1 - p) / n), rel=1e-9)
        assert found["low"] < k / n < found["high"]
    none, all_ = common.rate(torch.zeros(10).bool()), common.rate(torch.ones(10).bool())
    assert (none["low"], none["high"]) == (0, pytest.approx(0.2775, abs=1e-4))
    assert all_["high"] == 1
    assert common.rate(torch.zeros(0)) == {"n": 0, "rate": None, "low": 0.0, "high": 1.0}
    shares = common.rate(torch.tensor([0.25, 0.75]))
    assert shares["rate"] == 0.5 and "k" not in shares


def test_ink_is_one_colour_a_row():
    same = {"plain": "baseline", "told_kind": "jitter"}  # one method, two names
    assert all(common.INK[row] == common.INK[method] for row, method in same.items())
    assert len(set(common.INK.values())) == len(common.INK) - len(same)
    assert common.ink("unbiased/oracle_wide_s42") == common.INK["oracle"]
    assert common.ink("at_balanced_clean_s42") == common.INK["at_balanced"] != common.ink("at_s42")
    assert common.ink("mine") not in common.INK.values()


def test_lines_show_the_mean_and_the_range_of_the_seeds():
    _, axes = common.figure(2, 2)
    common.lines(axes[0, 0], {1: [0.2, 0.4], 2: [0.9]}, "red", label="a")
    (line,), (band,) = axes[0, 0].lines, axes[0, 0].collections
    assert [list(map(float, v)) for v in line.get_data()] == [[1, 2], [pytest.approx(0.3), 0.9]]
    assert band.get_paths()[0].vertices[:, 1].min() == 0.2
    assert line.get_label() == "a" and line.get_color() == "red"


def test_matrix_writes_every_number_and_leaves_none_blank():
    _, axes = common.figure(2, 2)
    common.matrix(axes[0, 0], [[0.5, None], [1.0, 0.123]], title="t")
    assert [text.get_text() for text in axes[0, 0].texts] == [".50", "1.00", ".12"]
    assert axes[0, 0].get_title() == "t"


def test_pictures_has_a_cell_a_picture_with_its_caption(tmp_path):
    red = torch.zeros(3, 8, 8, dtype=torch.uint8)
    red[0] = 255
    heat = torch.zeros(8, 8)
    rows = [("one", [(red, "red", {"color": "green"}), (heat, "cold", {"outline": red[0]})])]
    fig = common.pictures([*rows, ("two", [(red / 255, "again", {})])])
    shown = [ax for ax in fig.get_axes() if ax.axison]
    assert [ax.get_xlabel() for ax in shown] == ["red", "cold", "again"]
    assert shown[0].images[0].get_array()[0, 0].tolist() == [255, 0, 0]
    assert shown[0].xaxis.label.get_color() == "green"
    common.save_figure(fig, tmp_path / "a.png")
