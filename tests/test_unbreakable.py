"""Nonsense that differs in kind, one case each: exit code 2, one line, and no file touched."""

import os
import pickle
import shutil
import subprocess

import pytest
import torch
from conftest import ROOT, contents, write_world

import common

pytestmark = pytest.mark.filterwarnings("error")  # a warning would be a second line
SCRIPTS = ("make_data.py", "train.py", "gradcam.py", "attack.py")


@pytest.fixture
def world(tmp_path):
    """A tiny world with two models."""
    folder = tmp_path / "results"
    write_world(folder, n=100)
    weights = common.build_model().state_dict()
    plain = {key: value.contiguous() for key, value in weights.items()}
    for method in ("baseline", "jitter"):
        args = {"method": method, "seed": 42, "model": "simplecnn", "width": 4}
        record = {"weights": plain, "classes": 10, "size": [28, 28], "args": args}
        common.save_pt(record, folder / f"{method}_s42.pt")
    return folder


@pytest.mark.parametrize(
    "command, says",
    [
        ("make_data.py --corr nan", "--corr"),  # no number
        ("train.py --epochs 1.5", "--epochs"),  # no whole number
        ("gradcam.py --seed -1", "--seed"),  # out of range
        ("attack.py --eps", "--eps"),  # nothing
        ("make_data.py --recipe sepia", "--recipe"),  # none of the choices
        ("train.py --nonsense", "--nonsense"),  # no such flag
        ("gradcam.py results", "results"),  # no flag at all
        ("attack.py --src 3 --tgt 3", "--src and --tgt"),  # two that do not go together
        ("train.py --gamma 1", "--gamma means nothing"),  # of another method
        ("train.py --name ../x", "../x"),  # a file elsewhere
        ("train.py --name test_hard", "test_hard"),  # a file of another script
        ("gradcam.py --models jitter_42", "jitter_s42"),  # a misspelt name: those that are there
        ("attack.py --dir nowhere", "nowhere"),  # no such world
    ],
)
def test_flags(world, mistake, command, says):
    mistake(command, says)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_every_script_refuses(world, mistake, script):
    if not torch.cuda.is_available():
        where = " --dir new" if script == "make_data.py" else ""
        mistake(f"{script} --device cuda{where}", "--device cuda")
    mistake(f"{script} --dir results/val.pt", "val.pt")  # a file where the folder should be


# ---- files


class Evil:
    def __reduce__(self):
        return print, ("code inside a pickle was run",)


def change(**values):
    """The same dictionary with other values."""
    return lambda path: torch.save({**torch.load(path), **values}, path)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def holds(data):
    return lambda path: path.write_bytes(data)


LAST = torch.zeros(50, 28, 28, 3, dtype=torch.uint8)  # channels last


@pytest.mark.parametrize(
    "command, file, spoil, says",
    [
        ("train.py --name mine", "val.pt", lambda path: path.unlink(), "val.pt is missing"),
        ("gradcam.py", "test_hard.pt", cut, "test_hard.pt"),
        ("attack.py", "test_hard.pt", holds(pickle.dumps(Evil())), "test_hard.pt"),
        ("train.py --name mine", "train.pt", change(images=Evil()), "train.pt"),
        ("train.py --name mine", "val.pt", change(images=LAST), "permute"),
        (
            "train.py --name mine",
            "val.pt",
            change(images=torch.zeros(50, 3, 28, 28)),
            "val.pt: images",
        ),
        ("train.py --name mine", "val.pt", change(labels=torch.zeros(49).long()), "val.pt: labels"),
        ("gradcam.py", "test_hard.pt", change(colors=torch.zeros(50)), "test_hard.pt: colors"),
        ("gradcam.py", "jitter_s42.pt", change(weights={}), "jitter_s42.pt"),
        ("attack.py", "jitter_s42.pt", change(args={"model": "vgg16"}), "jitter_s42.pt"),
        ("train.py --name mine", "meta.json", holds(b'{"corr": '), "meta.json"),
    ],
)
def test_files(world, mistake, command, file, spoil, says):
    spoil(world / file)
    mistake(command, says)


# ---- run_all.sh


@pytest.mark.parametrize(
    "words, env, says",
    [
        (["lunch"], {}, "there is no stage 'lunch'"),
        (["lazy evidence"], {}, "there is no stage 'lazy evidence'"),  # one word with a blank
        (["--list", "test"], {}, "'test' goes alone"),
        (["lazy", "report"], {}, "'report' goes alone"),
        (["compare"], {}, "compare what?"),
        (["lazy"], {"JOBS": "0"}, "JOBS is '0'"),
        (["lazy"], {"QUICK": "yes"}, "QUICK is 'yes'"),
        (["lazy"], {"PYTHON": "/nowhere/python"}, "PYTHON is '/nowhere/python'"),
        (["lazy"], {"PYTHON": "false"}, "no Python 3.11 or newer"),  # an old one fails, too
    ],
)
def test_run_all(tmp_path, words, env, says):
    shutil.copy(ROOT / "run_all.sh", tmp_path)
    env = {**os.environ, **env}
    command = ["bash", "run_all.sh", *words]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("run_all.sh: ") and says in done.stderr
    assert [*contents(tmp_path)] == [tmp_path / "run_all.sh"]
