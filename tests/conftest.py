"""A made-up world that needs no download: ten blob patterns, painted like the real digits."""

import contextlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (the scripts live at the top, not in a package)
import make_data  # noqa: E402

torch.set_num_threads(1)


def made_up_digits(n, size=28, seed=0):
    """Gray uint8 (n,size,size), labels (n,): ten fixed patterns, each shifted by up to 2 pixels."""
    gen = torch.Generator().manual_seed(1)
    patterns = (torch.rand(10, 1, 5, 5, generator=gen) > 0.6).float()
    patterns = torch.nn.functional.interpolate(patterns, size=size - 8)[:, 0]
    gen = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 10
    gray = torch.zeros(n, size, size, dtype=torch.uint8)
    for i, d in enumerate(labels.tolist()):
        dy, dx = torch.randint(2, 7, (2,), generator=gen).tolist()
        gray[i, dy : dy + size - 8, dx : dx + size - 8] = (patterns[d] * 255).to(torch.uint8)
    return gray, labels


def write_world(folder, n=200, size=28):
    """The files of a world as make_data.py writes them; nine of ten digits on their own colour."""
    splits = {}
    own_share = {"train": 0.9, "val": 0.9, "test_hard": 0.0, "test_unbiased": 0.1}
    for k, name in enumerate(common.SPLITS):
        gray, labels = made_up_digits(n if name == "train" else n // 2, size, seed=k)
        gen = torch.Generator().manual_seed(100 + k)
        other = (labels + torch.randint(1, 10, labels.shape, generator=gen)) % 10
        own = torch.rand(len(labels), generator=gen) < own_share[name]
        colors = torch.where(own, labels, other)
        images = common.paint(gray, common.rgb(common.PALETTE)[colors], gen)
        splits[name] = {"images": images, "labels": labels, "colors": colors, "gray": gray}
        common.save_pt(splits[name], Path(folder) / f"{name}.pt")
    args = make_data.get_args(["--corr", "0.9"])
    meta = {**make_data.describe(splits, args), "is_mnist": False}
    common.save_json(meta, Path(folder) / "meta.json")


def split_of(labels, colours=None, size=8):
    """A few images whose pixels take every value, for losses counted on paper."""
    n = len(labels)
    images = torch.arange(n * 3 * size * size).mul(37).remainder(256).view(n, 3, size, size)
    colours = None if colours is None else torch.tensor(colours)
    return common.Split(images.byte(), torch.tensor(labels), colours, None)


def contents(folder):
    """{path: bytes, None for a folder} of everything inside."""
    return {p: p.read_bytes() if p.is_file() else None for p in Path(folder).rglob("*")}


@pytest.fixture
def tiny():
    return write_world


@pytest.fixture
def splits(tmp_path):
    """{name: Split} of a made-up world in results/."""
    write_world(tmp_path / "results")
    return {name: common.load_split(tmp_path / "results", name) for name in common.SPLITS}


@pytest.fixture
def unprobed(monkeypatch):
    """No linear probes: they take ten times as long as a tiny training."""
    train = importlib.import_module("train")
    monkeypatch.setattr(train, "probe", lambda z, split: {"colour": None, "digit": None})


@pytest.fixture
def cli(tmp_path):
    """Run a script by its real command line in an empty folder; warnings are errors."""

    def call(command, check=True, **kwargs):
        script, *rest = command.split()
        command = [sys.executable, "-W", "error", str(ROOT / script), *rest]
        done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, **kwargs)
        assert not check or (done.returncode, done.stderr) == (0, ""), done.stderr
        return done

    return call


def run_main(script, rest, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [script, *rest])
    common.run(importlib.import_module(script.removesuffix(".py")).main)


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """The same within this process, which need not import torch anew; returns what it printed."""

    def call(command):
        script, *rest = command.split()
        capfd.readouterr()
        run_main(script, rest, tmp_path, monkeypatch)
        return capfd.readouterr().out

    return call


@pytest.fixture
def dies(capfd):
    """Assert that a function ends the run with exit code 2 and one line that says this."""

    @contextlib.contextmanager
    def fails(*says):
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            yield
        line = capfd.readouterr().err
        assert stop.value.code == 2 and line.count("\n") == 1, line
        assert all(word in line for word in says), line

    return fails


@pytest.fixture
def mistake(tmp_path, monkeypatch, capfd):
    """Assert that a command ends with exit code 2 and one line, and that no file has changed."""

    def fails(command, says, folder=tmp_path):
        script, *rest = command.split() if isinstance(command, str) else command
        before = contents(folder)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            run_main(script, rest, folder, monkeypatch)
        said = capfd.readouterr()
        assert stop.value.code == 2 and said.err.count("\n") == 1, said.err
        assert said.err.startswith(f"{script}: ") and says in said.err, said.err
        assert "code inside" not in said.out
        assert contents(folder) == before

    return fails
