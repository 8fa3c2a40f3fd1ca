"""The four scripts in a row by the real command line, and run_all.sh beside scripts of straw."""

import importlib
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from test_make_data import write_idx


def test_the_four_commands_of_the_card(cli, call, tmp_path):
    """Warnings are errors in `cli`."""
    write_idx(tmp_path / "idx", n=(200, 120))
    cli("make_data.py --mnist idx")
    call("train.py")
    cli("train.py --method jitter --alpha 2")
    cli("gradcam.py")
    cli("attack.py --src 7 --tgt 3 --eps 0.05")
    found = {path.name for path in (tmp_path / "results").iterdir()}
    assert {"baseline_s42.json", "jitter_s42.json", "gradcam.json", "attack_7to3.json"} <= found
    for script in ("make_data.py", "train.py", "gradcam.py", "attack.py"):
        assert "tables.md" in call(f"{script} --report"), script


# ---- the commands of run_all.sh


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """{QUICK: [(script, its words)]} of every step that run_all.sh runs in a fresh clone."""
    folder, found = tmp_path_factory.mktemp("bare"), {}
    for name in ("run_all.sh", "common.py", "make_data.py", "train.py", "gradcam.py", "attack.py"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    for quick in (False, True):
        env = {**os.environ, "PYTHON": os.sys.executable, "QUICK": str(int(quick))}
        command = ["bash", "run_all.sh", "--list"]
        out = subprocess.run(
            command, cwd=folder, env=env, check=True, stdout=subprocess.PIPE
        ).stdout
        lines = [line.partition(" --step ")[2].split() for line in out.decode().splitlines()]
        found[quick] = [(script.removesuffix(".py"), words) for script, *words in lines]
    return found


def trained(steps):
    """{(world below DIR, NAME)} of the training steps, and how many there are."""
    names = []
    for script, words in steps:
        if script == "train":
            args = importlib.import_module("train").get_args(words)
            world = re.sub(r"^results(/quick)?/?", "", str(args.dir))
            names.append((world, args.name.replace("resnet18", "resnet50")))
    return set(names), len(names)


@pytest.mark.parametrize("quick", [False, True])
def test_every_step_is_a_command_that_its_script_takes(steps, quick):
    for script, words in steps[quick]:
        importlib.import_module(script).get_args(words)


def test_no_training_step_overwrites_another_and_quick_gives_the_same_names(steps):
    names, n = trained(steps[False])
    assert len(names) == n > 90
    few, n = trained(steps[True])
    assert len(few) == n and few <= names
    short = {(world, name) for world, name in names if len(name) > 46}
    assert not short, "a name that nobody would type"


@pytest.mark.parametrize("quick", [False, True])
def test_no_picture_or_attack_overwrites_another(steps, quick):
    written = []
    for script, words in steps[quick]:
        module = importlib.import_module(script)
        args = module.get_args(words)
        if script == "gradcam":
            written.append((args.dir, module.file_of(module.stem_of(args), args.cam)))
        elif script == "attack":
            written.append((args.dir, module.result_name(args)))
    assert len(set(written)) == len(written) > 10
    assert not [name for _, name in written if len(name) > 40], "a name that nobody would type"


@pytest.mark.parametrize("quick", [False, True])
def test_every_model_that_a_step_reads_was_trained_by_a_step_before(steps, quick):
    there = set()
    for script, words in steps[quick]:
        args = importlib.import_module(script).get_args(words)
        if script == "train":
            there |= {args.dir / args.name, args.dir / re.sub(r"(_s\d+)$", r"_clean\1", args.name)}
            names = [args.judge] if args.method == "robgan" else [args.generator]
            names = [name for name in names if name]
        else:
            names = getattr(args, "models", [])
        for name in names:
            path = Path(os.path.normpath(args.dir / name))  # ../mnist_2000/NAME is another world's
            assert path in there, (words, name)


# ---- run_all.sh itself


@pytest.fixture
def sandbox(tmp_path):
    """run_all.sh beside scripts that only note that they ran; train.py may be `broken`."""
    (tmp_path / "run_all.sh").write_bytes((ROOT / "run_all.sh").read_bytes())
    for name in ("common.py", "make_data.py", "train.py", "gradcam.py", "attack.py"):
        (tmp_path / name).write_text(
            "import sys, pathlib\n"
            "if 'train.py' in sys.argv[0] and pathlib.Path('broken').exists():\n"
            "    sys.exit('no luck')\n"
            "open('ran', 'a').write(' '.join(sys.argv) + chr(10))\n"
        )

    def call(*words, **env):
        env = {**os.environ, "PYTHON": os.sys.executable, "QUICK": "1", "JOBS": "2", **env}
        command = ["bash", "run_all.sh", *words]
        return subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, env=env)

    def ran(report=False):
        lines = (tmp_path / "ran").read_text().splitlines() if (tmp_path / "ran").exists() else []
        return [line for line in lines if ("--report" in line) == report]

    call.ran, call.folder = ran, tmp_path
    return call


def test_a_second_call_repeats_nothing_and_fresh_replaces_everything(sandbox):
    assert sandbox("lazy").returncode == 0
    once = sandbox.ran()
    assert len(once) > 10 and not any("--overwrite" in line for line in once)
    done = sandbox("lazy")
    assert done.returncode == 0 and sandbox.ran() == once, done.stdout
    assert sandbox("lazy", FRESH="1").returncode == 0
    again = sandbox.ran()[len(once) :]
    assert sorted(again) == sorted(f"{line} --overwrite" for line in once)


def test_the_report_runs_one_script_after_the_other(sandbox):
    assert sandbox("report").returncode == 0
    scripts = ("make_data.py", "train.py", "gradcam.py", "attack.py")
    assert sandbox.ran(report=True) == [f"{s} --dir results/quick --report" for s in scripts]


def test_it_stops_at_a_failure_names_it_and_continues_there(sandbox):
    (sandbox.folder / "broken").touch()
    done = sandbox("lazy")
    assert done.returncode == 1
    for text in ("FAILED", "python train.py", "no luck"):
        assert text in done.stderr
    before = sandbox.ran()
    assert before and all("make_data.py" in line for line in before)
    (sandbox.folder / "broken").unlink()
    assert sandbox("lazy").returncode == 0
    after = sandbox.ran()
    assert after[: len(before)] == before
    assert not any("make_data.py" in line for line in after[len(before) :])


def test_a_changed_script_runs_again_with_all_that_reads_its_results(sandbox):
    sandbox("lazy")
    for script, again in (
        ("gradcam.py", {"gradcam.py"}),
        ("train.py", {"train.py", "gradcam.py", "attack.py"}),
    ):
        before = len(sandbox.ran())
        with (sandbox.folder / script).open("a") as file:
            file.write("# changed\n")
        sandbox("lazy")
        assert {line.split()[0] for line in sandbox.ran()[before:]} == again


def test_a_listed_step_is_a_command_of_its_own_and_leaves_its_mark(sandbox):
    lines = sandbox("--list", "lazy").stdout.splitlines()
    levels = [int(line.split()[0]) for line in lines]
    assert sandbox.ran() == [] and levels == sorted(levels) and set(levels) == {1, 2, 3}
    for line in lines[:3]:  # in any order within a level, on any machine that shares the folder
        env = {**os.environ, "PYTHON": os.sys.executable}
        subprocess.run(["bash", "-c", line[2:]], cwd=sandbox.folder, env=env, check=True)
    assert [line.partition("--step ")[2] for line in lines[:3]] == sandbox.ran()
    left = sandbox("--list", "lazy").stdout.splitlines()
    assert left == lines[3:]  # a level keeps its number while others finish


@pytest.mark.slow
def test_quick_shows_the_cheat_and_the_cure_on_real_mnist():
    done = subprocess.run(
        ["bash", "run_all.sh", "lazy"], cwd=ROOT, env={**os.environ, "QUICK": "1"}
    )
    assert done.returncode == 0
    hard = {}
    for name in ("baseline_s42", "jitter_s42"):
        record = json.loads((ROOT / "results" / "quick" / f"{name}.json").read_text())
        hard[name] = record["final"]["test_hard"]["acc"]
    assert hard["baseline_s42"] < 0.05 and hard["jitter_s42"] > 0.6
    assert "| jitter |" in (ROOT / "results" / "quick" / "tables.md").read_text()
