"""Every flag of every script and every file they read, fed nonsense: exit code 2, one line that names the culprit, and no file touched.

The flags come from the parsers, so that one without a case here fails the last test of its table.
"""

import argparse
import importlib
import inspect
import json
import math
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch

import common
from conftest import ROOT, contents, write_world
from test_make_data import write_idx

SCRIPTS = ("make_data.py", "train.py", "gradcam.py", "attack.py")

pytestmark = pytest.mark.filterwarnings("error")  # a warning would be a second line

# ---------------------------------------------------------------- the command line


def flags_of(script):
    """{flag: argparse's action} of a script, asked of its own parser."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            common.Parser,
            "parse_args",
            lambda parser, argv: (
                seen.append(parser) or argparse.ArgumentParser.parse_args(parser, argv)
            ),
        )
        importlib.import_module(script.removesuffix(".py")).get_args([])
    return {
        action.option_strings[0]: action for action in seen[0]._actions if action.dest != "help"
    }


FLAGS = {script: flags_of(script) for script in SCRIPTS}
LONG = "a" * 300
NO_NAMES = ("", "a/../../b", "/etc/passwd", "a b", "-x", "é", ".hidden", LONG)
BY_HAND = {  # what no type and no list of choices says
    ("train.py", "--name"): (
        *NO_NAMES,
        "train",
        "val",
        "test_hard",
        "Test_Unbiased",
        "meta",
        "gradcam",
        "gradcam_hirescam",
        "attack_7to3",
        "baseline_s42.part",
    ),
    ("train.py", "--judge"): ("", " ", "a\nb", "nobody_s1", "results/", "train", "fewer", LONG),
    ("train.py", "--init"): (*NO_NAMES, "nobody_s1"),
    ("train.py", "--eval"): (*NO_NAMES, "nobody_s1"),
    ("make_data.py", "--mnist"): ("", "nowhere", "results/train.pt", LONG),
    ("gradcam.py", "--models"): ("", " ", "a\nb", "nobody_s1", "results/", LONG),
    ("gradcam.py", "--layer"): ("", "nonsense", "fc", "relu.weight"),
    ("attack.py", "--models"): ("", " ", "a\nb", "nobody_s1", "results/", LONG),
    ("attack.py", "--name"): ("", "a/b", "..", "7to3", "pairs", "Check", "é", "a-b", LONG),
} | {(script, "--dir"): ("", " ", "nowhere", "results/train.pt", LONG) for script in SCRIPTS}
BESIDE = {  # what else the command needs to get there
    ("attack.py", "--name"): ["--untargeted"],
    ("make_data.py", "--dir"): ["--report"],
    ("train.py", "--judge"): ["--method", "robgan"],
}
NAMES_THE_FILE = {"nowhere": "nowhere", "nobody_s1": "nobody_s1.pt", "train": "train"}


def nonsense(script, flag, action):
    """Values that a flag must refuse."""
    if (script, flag) in BY_HAND:
        return BY_HAND[script, flag]
    if action.choices is not None:
        return "", "nonsense", "None", next(iter(action.choices)).upper() + "!"
    limits = (
        inspect.getclosurevars(action.type).nonlocals if inspect.isfunction(action.type) else {}
    )
    if "least" not in limits:
        return ()
    if limits["kind"] is int:
        edges = limits["least"] - 1, limits["most"] + 1, "1.5", "1e3", "9" * 5000
    else:
        edges = math.nextafter(limits["least"], -math.inf), math.nextafter(limits["most"], math.inf)
    return "", "x", "nan", "inf", "-inf", "-1", "1e999", "1,5", "0x1", "1 2", "True", *edges


VALUES = [
    (script, flag, str(value))
    for script in SCRIPTS
    for flag, action in FLAGS[script].items()
    if action.nargs != 0
    for value in nonsense(script, flag, action)
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny world with a model of each kind and its results."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder / "results", n=100)
    write_idx(folder / "idx", n=(120, 20))
    for name in ("baseline_s42", "jitter_s42"):
        common.save_pt(checkpoint(name), folder / "results" / f"{name}.pt")
        common.save_json(
            {"schema": 1, "name": name, "args": {}, "epochs": []},
            folder / "results" / f"{name}.json",
        )
    common.save_pt(checkpoint("baseline_s42", classes=5), folder / "results" / "fewer.pt")
    return folder


def checkpoint(name, classes=10):
    torch.manual_seed(0)
    return {
        "weights": {
            k: v.contiguous() for k, v in common.build_model(classes=classes).state_dict().items()
        },
        "classes": classes,
        "size": [28, 28],
        "args": {"method": name[:-4], "seed": 42, "model": "simplecnn", "width": 4},
    }


@pytest.mark.parametrize(
    "script, flag, value", VALUES, ids=[f"{s} {f}={v[:20]!r}" for s, f, v in VALUES]
)
def test_a_value_that_means_nothing(world, mistake, script, flag, value):
    mistake(
        [script, *BESIDE.get((script, flag), ()), f"{flag}={value}"],
        NAMES_THE_FILE.get(value, flag),
        world,
    )


SWITCHES = [
    (script, flag)
    for script in SCRIPTS
    for flag, action in FLAGS[script].items()
    if action.nargs == 0
]


@pytest.mark.parametrize("script, flag", SWITCHES)
def test_a_switch_takes_no_value(world, mistake, script, flag):
    mistake([script, f"{flag}=yes"], flag, world)


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_that_takes_a_value_has_its_nonsense_and_needs_one(world, mistake, script):
    for flag, action in FLAGS[script].items():
        if action.nargs != 0:
            assert nonsense(script, flag, action), f"{script} {flag} has no case in BY_HAND"
            mistake([script, flag], flag, world)
    mistake([script, "--nonsense"], "--nonsense", world)
    mistake([script, "results"], "results", world)


@pytest.mark.parametrize(
    "command, says",
    [
        ("make_data.py --recipe gray --corr 0.5", "--corr has no meaning"),
        ("make_data.py --recipe flat --sigma2 0.1", "--sigma2 has no meaning"),
        ("train.py --method at --epochs 3 --clean-epochs 3", "--clean-epochs"),
        ("train.py --model resnet18 --batch 1", "--batch"),
        ("train.py --method at --crop 28", "--crop"),
        ("train.py --method at --cutout 29", "--cutout"),
        ("train.py --init jitter_s42 --width 5", "--init"),
        ("train.py --report --dir idx", "idx holds no results"),
        ("train.py --method jitter --alpha 1e39 --epochs 1", "the loss is"),
        ("train.py --method lntl --entropy 1e300 --epochs 1", "the loss is"),
        ("gradcam.py --digit 10", "--digit"),
        ("gradcam.py --models baseline_s42 unbiased/baseline_s42", "--models"),
        ("gradcam.py --report", "gradcam.json"),
        ("attack.py --report", "no results"),
        ("attack.py --report --check", "--report"),
        ("attack.py --src 3", "--src and --tgt"),
        ("attack.py --src 10", "--src"),
        ("attack.py --tgt 2147483647", "--tgt"),
        ("attack.py --eps 0.6", "--eps"),
        ("attack.py --pairs --sweep 0.1", "--sweep has no meaning"),
        ("attack.py --sweep", "--sweep"),
        ("attack.py --untargeted --check", "--check"),
        ("attack.py --models jitter_s42 jitter_s42", "--models"),
    ],
)
def test_flags_that_do_not_go_together_or_do_not_fit_the_world(world, mistake, command, says):
    mistake(command, says, world)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(world, mistake, device):
    if getattr(torch, device).is_available():
        pytest.skip("it is here")
    for script in SCRIPTS:
        mistake([script, "--device", device], f"--device {device}", world)


def test_a_folder_that_must_not_be_written(world, mistake, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)  # as root everything may be written
    for script in SCRIPTS:
        mistake([script], "--dir results cannot be written", world)


# ---------------------------------------------------------------- files


class Evil:
    def __reduce__(self):
        return print, ("code inside a pickle was run",)


def replace(data):
    """Other bytes in a file's place."""
    return lambda path: path.write_bytes(data if isinstance(data, bytes) else data.encode())


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def folder_instead(path):
    path.unlink()
    path.mkdir()


def save(record):
    return lambda path: torch.save(record, path)


def change(*keys, to):
    """The same dictionary with another value at keys."""

    def alter(path):
        record = inner = torch.load(path)
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to
        torch.save(record, path)

    return alter


def old_format(path):
    torch.save({"images": torch.zeros(9)}, path, _use_new_zipfile_serialization=False)
    cut(path)


NO_PT = {
    "missing": lambda path: path.unlink(),
    "a folder": folder_instead,
    "cut": cut,
    "empty": replace(b""),
    "text": replace("hello"),
    "a picture": replace(b"\x89PNG\r\n\x1a\n" + bytes(100)),
    "a zip": replace(b"PK\x03\x04" + bytes(100)),
    "an old format, cut": old_format,
    "a bare pickle": replace(pickle.dumps({"images": 1})),
    "code": save({"images": Evil()}),
    "code in a pickle": replace(pickle.dumps(Evil())),
    "a list": save([1, 2]),
    "a tensor": save(torch.zeros(3)),
    "nothing": save({}),
}
BYTES = {"dtype": torch.uint8}
SPLIT = {  # values in place of a split's own, for n images
    "images: float": lambda n: {"images": torch.zeros(n, 3, 28, 28)},
    "images: one channel": lambda n: {"images": torch.zeros(n, 1, 28, 28, **BYTES)},
    "images: none": lambda n: {"images": torch.zeros(0, 3, 28, 28, **BYTES)},
    "images: a number": lambda n: {"images": 7},
    "images: sparse": lambda n: {"images": torch.zeros(n, 3, 28, 28, **BYTES).to_sparse()},
    "images: on no device": lambda n: {"images": torch.zeros(n, 3, 28, 28, **BYTES, device="meta")},
    "images: too small": lambda n: {"images": torch.zeros(n, 3, 4, 28, **BYTES), "gray": None},
    "labels: too few": lambda n: {"labels": torch.zeros(n - 1).long()},
    "labels: float": lambda n: {"labels": torch.zeros(n)},
    "labels: bool": lambda n: {"labels": torch.zeros(n).bool()},
    "labels: negative": lambda n: {"labels": torch.full((n,), -1)},
    "labels: huge": lambda n: {"labels": torch.full((n,), 2**62)},
    "labels: a list": lambda n: {"labels": [0] * n},
    "labels: none": lambda n: {"labels": None},
    "labels: sparse": lambda n: {"labels": torch.ones(n).long().to_sparse()},
    "labels: beyond the classes": lambda n: {"labels": torch.arange(n)},
    "colors: float": lambda n: {"colors": torch.zeros(n)},
    "colors: negative": lambda n: {"colors": torch.full((n,), -5)},
    "colors: too many": lambda n: {"colors": torch.zeros(n + 1).long()},
    "gray: float": lambda n: {"gray": torch.zeros(n, 28, 28)},
    "gray: too small": lambda n: {"gray": torch.zeros(n, 14, 14, **BYTES)},
}
READS_SPLIT = {
    "train": "train.py",
    "val": "train.py",
    "test_unbiased": "gradcam.py",
    "test_hard": "attack.py",
}


def other_values(values):
    def alter(path):
        record = torch.load(path)
        torch.save(record | values(len(record["labels"])), path)

    return alter


MODEL = {
    "weights: none": change("weights", to={}),
    "weights: a list": change("weights", to=[1]),
    "weights: a number": change("weights", "fc.bias", to=3),
    "weights: another shape": change("weights", "fc.bias", to=torch.zeros(9)),
    "weights: one too many": change("weights", "more", to=torch.zeros(1)),
    "weights: not finite": change("weights", "fc.bias", to=torch.full((10,), math.nan)),
    "args: none": change("args", to=None),
    "args: no method": change("args", to={"model": "simplecnn", "width": 4}),
    "args: no such model": change("args", "model", to="vgg16"),
    "args: model is a list": change("args", "model", to=[]),
    "args: width below zero": change("args", "width", to=-4),
    "args: width in words": change("args", "width", to="four"),
    "classes: below zero": change("classes", to=-1),
    "classes: in words": change("classes", to="ten"),
    "classes: astronomical": change("classes", to=10**15),
    "size: one number": change("size", to=[28]),
    "size: text": change("size", to="28x28"),
    "size: another": change("size", to=[32, 32]),
}
READS_MODEL = (
    "train.py --eval jitter_s42",
    "train.py --init jitter_s42",
    "gradcam.py --models jitter_s42",
    "attack.py --models jitter_s42",
)
NO_JSON = {
    "a folder": folder_instead,
    "cut": cut,
    "empty": replace(""),
    "text": replace("hello"),
    "a list": replace("[1, 2]"),
    "null": replace("null"),
    "NaN": replace('{"corr": NaN}'),
    "infinite": replace('{"corr": -Infinity}'),
    "not text": replace(bytes(range(256))),
    "deep": replace("[" * 100_000),
}
READS_JSON = {
    "results/meta.json": (
        "make_data.py --report",
        "train.py --epochs 1",
        "gradcam.py",
        "attack.py",
        "train.py --report",
    ),
    "results/baseline_s42.json": ("train.py --eval baseline_s42", "train.py --report"),
    "results/gradcam.json": ("gradcam.py --report",),
    "results/gradcam_hirescam.json": ("gradcam.py --report --cam hirescam",),
    "results/attack_7to3.json": ("attack.py --report",),
}


def header(*parts):
    """Other bytes at the beginning of an IDX file, of the same length."""
    first = b"".join(parts)
    return lambda path: path.write_bytes(first + path.read_bytes()[len(first) :])


IDX = {
    "missing": lambda path: path.unlink(),
    "a folder": folder_instead,
    "empty": replace(b""),
    "text": replace("hello, this is not an IDX file"),
    "half a gzip file": replace(b"\x1f\x8b\x08\x00 half"),
    "cut": cut,
    "too long": lambda path: path.write_bytes(path.read_bytes() + b"!"),
    "of floats": header(b"\0\0\x0d"),
    "of other dimensions": header(b"\0\0\x08\2"),
    "promises much": header(b"\0\0\x08", b"\3", b"\xff" * 12),
    "promises nothing": header(b"\0\0\x08", b"\1", bytes(4)),
    "only a header": lambda path: path.write_bytes(path.read_bytes()[:8]),
}
IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

SPOILED = [  # (command, file, how it is spoiled, what the line names)
    *(
        (script, f"results/{split}.pt", spoil, f"{split}.pt")
        for split, script in READS_SPLIT.items()
        for spoil in (
            *NO_PT.items(),
            *((how, other_values(values)) for how, values in SPLIT.items()),
        )
        if (split, spoil[0]) != ("train", "labels: beyond the classes")
    ),  # these are the classes
    *(
        (command, "results/jitter_s42.pt", spoil, "jitter_s42")
        for command in READS_MODEL
        for spoil in (*NO_PT.items(), *MODEL.items())
    ),
    *(
        (command, file, spoil, file.split("/")[1])
        for file, commands in READS_JSON.items()
        for command in commands
        for spoil in NO_JSON.items()
    ),
    *(
        ("make_data.py --mnist idx --dir new", f"idx/{file}", spoil, file.split("-idx")[0])
        for file in IDX_FILES
        for spoil in IDX.items()
    ),
    *(
        ("train.py --resume", "results/baseline_s42.part.pt", spoil, "baseline_s42.part.pt")
        for spoil in NO_PT.items()
        if spoil[0] != "missing"
    ),
]


@pytest.mark.parametrize(
    "command, file, spoil, says", SPOILED, ids=[f"{c} {f} {s[0]}" for c, f, s, _ in SPOILED]
)
def test_a_file_that_is_not_what_it_should_be(world, mistake, tmp_path, command, file, spoil, says):
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    path = tmp_path / file
    if not path.exists():
        path.write_text('{"schema": 1}')
    spoil[1](path)
    mistake(command, says)


@pytest.mark.parametrize(
    "command, file, record, says",
    [
        ("make_data.py --report", "meta.json", {"schema": 1}, "meta.json has no recipe"),
        (
            "train.py --eval baseline_s42",
            "baseline_s42.json",
            {"schema": 1},
            "baseline_s42.json has no args",
        ),
        ("train.py --report", "x.json", {"script": "train.py"}, "x.json has no args"),
        (
            "gradcam.py --report",
            "gradcam.json",
            {"script": "gradcam.py"},
            "gradcam.json has no args",
        ),
        (
            "attack.py --report",
            "attack_7to3.json",
            {"script": "attack.py"},
            "attack_7to3.json has no mode",
        ),
        (
            "attack.py --report",
            "attack_7to3.json",
            {"mode": "nonsense", "args": {}, "models": {}},
            "attack_*.json in results has the mode 'nonsense'",
        ),
        *(
            (
                f"{script}",
                "meta.json",
                {"unfinished": True},
                "meta.json says that make_data.py was stopped",
            )
            for script in SCRIPTS[1:]
        ),
    ],
)
def test_json_without_what_is_read_from_it(world, mistake, tmp_path, command, file, record, says):
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    (tmp_path / "results" / file).write_text(json.dumps(record))
    mistake(command, says)


@pytest.mark.parametrize("recipe", [None, [], {}, 7, "plaid", "digit"])
def test_a_world_whose_recipe_is_nonsense_has_no_flip_rates_and_says_so(
    world, call, tmp_path, recipe
):
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    (tmp_path / "results" / "meta.json").write_text(
        json.dumps({"recipe": recipe, "sigma2": "much"})
    )
    assert "no flip rates: " in call("gradcam.py --models jitter_s42 --split val")


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("split", common.SPLITS)
def test_a_split_of_a_few_images_works_or_is_refused_before_the_work(
    world, mistake, call, tmp_path, split, n
):
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "results" / f"{split}.pt"
    torch.save({key: value[-n:] for key, value in torch.load(path).items()}, path)
    if (split, n) in {("train", 1), ("test_unbiased", 1), ("test_unbiased", 2)}:
        mistake("train.py --epochs 1 --method at", f"{split}.pt has too few images")
    else:
        call("train.py --epochs 1 --method at")
    if split in ("train", "test_unbiased"):
        mistake("train.py --epochs 1 --method robgan", f"{split}.pt")
    else:
        call("train.py --epochs 1 --method robgan")


# ---------------------------------------------------------------- by the real command line


@pytest.mark.parametrize("command", ["train.py --epochs x", "attack.py --models results/"])
def test_the_scripts_themselves(world, command):
    script, *rest = command.split()
    before = contents(world)
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *rest],
        cwd=world,
        text=True,
        capture_output=True,
        check=False,
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith(script)
        and done.stderr.count("\n") == 1
        and rest[0] in done.stderr
    ), done.stderr
    assert contents(world) == before


@pytest.mark.parametrize(
    "stage, env",
    [
        *(
            (stage, {})
            for stage in (
                "lunch",
                "",
                "lazy evidence",
                "../lazy",
                "*",
                "--list|test",
                "--list|lunch",
                "--step",
                "--step|nonsense.py",
                "--step|",
            )
        ),
        *(("lazy", {"JOBS": jobs}) for jobs in ("0", "x", "-1", "1.5", "9" * 30)),
        ("lazy", {"QUICK": "yes"}),
        ("lazy", {"FRESH": "2"}),
        ("lazy", {"PYTHON": "/nowhere/python"}),
    ],
)
def test_run_all(tmp_path, stage, env):
    says = next(iter(env), "--step" if stage.startswith("--step") else "stage")
    shutil.copy(ROOT / "run_all.sh", tmp_path)
    env = {**os.environ, **env}
    done = subprocess.run(
        ["bash", "run_all.sh", *(stage.split("|"))],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        check=False,
        env=env,
    )
    assert (
        done.returncode == 2
        and done.stderr.startswith("run_all.sh: ")
        and done.stderr.count("\n") == 1
        and says in done.stderr
    ), done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "run_all.sh"]
