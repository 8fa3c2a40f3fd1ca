"""A made-up world of 10 classes that needs no download: each class is a blob pattern of its own, painted like the real thing."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import common  # noqa: E402  (the scripts live at the top, not in a package)

torch.set_num_threads(1)


def made_up_digits(n, size=28, seed=0):
    """Gray uint8 (n,size,size) and labels (n,): ten fixed blob patterns, each image shifted by up to two pixels."""
    gen = torch.Generator().manual_seed(1)
    patterns = torch.nn.functional.interpolate(
        (torch.rand(10, 1, 5, 5, generator=gen) > 0.6).float(), size=size - 8
    )[:, 0]
    gen = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 10
    gray = torch.zeros(n, size, size, dtype=torch.uint8)
    for i, d in enumerate(labels.tolist()):
        dy, dx = (torch.randint(2, 7, (2,), generator=gen)).tolist()
        gray[i, dy : dy + size - 8, dx : dx + size - 8] = (patterns[d] * 255).to(torch.uint8)
    return gray, labels


def write_world(folder, n=200, size=28):
    """Split files of a biased world, as make_data.py writes them."""
    for k, name in enumerate(common.SPLITS):
        gray, labels = made_up_digits(n if name == "train" else n // 2, size, seed=k)
        gen = torch.Generator().manual_seed(100 + k)
        other = (labels + torch.randint(1, 10, labels.shape, generator=gen)) % 10
        own = (
            torch.rand(len(labels), generator=gen)
            < {"train": 0.9, "val": 0.9, "test_hard": 0.0, "test_unbiased": 0.1}[name]
        )
        colors = torch.where(own, labels, other)
        common.save_pt(
            {
                "images": common.paint(gray, colors, gen),
                "labels": labels,
                "colors": colors,
                "gray": gray,
            },
            Path(folder) / f"{name}.pt",
        )
    common.save_json(
        {
            "schema": 1,
            "script": "make_data.py",
            "recipe": "background",
            "corr": 0.9,
            "seed": 42,
            "limit": None,
        },
        Path(folder) / "meta.json",
    )


def contents(folder):
    """{path: bytes, None for a folder} of everything inside but the locks of killed runs."""
    return {
        p: p.read_bytes() if p.is_file() else None
        for p in Path(folder).rglob("*")
        if p.suffix != ".lock"
    }


@pytest.fixture
def tiny():
    return write_world


@pytest.fixture
def cli(tmp_path):
    """Run a script by its real command line in an empty folder; returns the finished process."""

    def call(command, check=True, **kwargs):
        script, *rest = command.split()
        done = subprocess.run(
            [sys.executable, str(ROOT / script), *rest],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            **kwargs,
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    return call


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """The same within this process, which need not import torch anew; returns what the script printed."""

    def call(command):
        script, *rest = command.split()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *rest])
        capfd.readouterr()
        common.run(importlib.import_module(script.removesuffix(".py")).main)
        return capfd.readouterr().out

    return call


@pytest.fixture
def mistake(tmp_path, monkeypatch, capfd):
    """Assert that a command ends with exit code 2 and one line that says `says`, and that nothing in its folder has changed."""

    def fails(command, says, folder=tmp_path):
        script, *rest = command.split() if isinstance(command, str) else command
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", [script, *rest])
        before = contents(folder)
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            common.run(importlib.import_module(script.removesuffix(".py")).main)
        said = capfd.readouterr()
        assert (
            stop.value.code == 2
            and said.err.count("\n") == 1
            and said.err.startswith(script)
            and says in said.err
        ), said.err
        assert "code inside" not in said.out
        assert contents(folder) == before

    return fails
