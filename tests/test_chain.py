"""The four scripts in a row, what all of them refuse, and what run_all.sh does with their steps."""

import importlib
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, contents, write_world
from test_make_data import write_idx

import common

SCRIPTS = ("make_data.py", "train.py", "gradcam.py", "attack.py")


@pytest.mark.slow
def test_the_four_commands_of_the_card(cli, call, tmp_path):
    """Warnings are errors in `cli`."""
    write_idx(tmp_path / "idx", n=(100, 20))
    cli("make_data.py --mnist idx")
    call("train.py")
    cli("train.py --method jitter --alpha 2")
    cli("gradcam.py")
    cli("attack.py --src 7 --tgt 3 --eps 0.05")
    found = {path.name for path in (tmp_path / "results").iterdir()}
    assert {"baseline_s42.json", "jitter_s42.json", "gradcam.json", "attack_7to3.json"} <= found
    for script in SCRIPTS:
        call(f"{script} --report")


class Evil:
    def __reduce__(self):
        return print, ("code inside a pickle was run",)


@pytest.mark.filterwarnings("error")  # a warning would be a second line
@pytest.mark.parametrize("script", SCRIPTS)
def test_what_every_script_refuses_in_one_line(tmp_path, mistake, script):
    folder = tmp_path / "results"
    write_world(folder, n=100)
    net = {"weights": common.build_model().state_dict(), "classes": 10, "size": [28, 28]}
    args = {"method": "baseline", "seed": 42, "model": "simplecnn", "width": 4}
    common.save_pt({**net, "args": args}, folder / "baseline_s42.pt")
    for flag in ("--nonsense", "--seed -1", "--seed", "--threads 1.5", "--report --dir nowhere"):
        mistake(f"{script} {flag}", flag.split()[-1])
    mistake(f"{script} --dir results/val.pt", "val.pt")  # a file where the folder should be
    if not torch.cuda.is_available():
        mistake(f"{script} --device cuda{' --dir new' * (script == SCRIPTS[0])}", "--device cuda")
    if script == "make_data.py":
        return
    own = {"train.py": "--name mine", "gradcam.py": "", "attack.py": "--untargeted"}[script]
    split, model = folder / "test_hard.pt", folder / "baseline_s42.pt"
    whole = {path: path.read_bytes() for path in (split, model)}
    own += " --models baseline_s42" if script != "train.py" else ""
    for path, data in (
        (split, pickle.dumps(Evil())),
        (split, whole[split][: len(whole[split]) // 2]),
        (model, b"[1, 2]"),
    ):
        path.write_bytes(data)
        if path == split or script != "train.py":
            mistake(f"{script} {own}", path.name)
        path.write_bytes(whole[path])


@pytest.mark.parametrize(
    "words, env, says",
    [
        (["lunch"], {}, "there is no stage 'lunch'"),
        (["lazy evidence"], {}, "there is no stage 'lazy evidence'"),  # one word with a blank
        (["--list", "test"], {}, "'test' goes alone"),
        (["lazy", "report"], {}, "there is no stage 'report'"),
        (["compare"], {}, "compare what?"),
        (["lazy"], {"JOBS": "0"}, "JOBS is '0'"),
        (["lazy"], {"QUICK": "yes"}, "QUICK is 'yes'"),
        (["lazy"], {"PYTHON": "/nowhere/python"}, "PYTHON is '/nowhere/python'"),
        (["lazy"], {"PYTHON": "false"}, "no Python 3.11 or newer"),  # an old one fails, too
    ],
)
def test_what_run_all_refuses_in_one_line(tmp_path, words, env, says):
    (tmp_path / "run_all.sh").write_bytes((ROOT / "run_all.sh").read_bytes())
    env = {**os.environ, **env}
    command = ["bash", "run_all.sh", *words]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, env=env)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("run_all.sh: ") and says in done.stderr
    assert [*contents(tmp_path)] == [tmp_path / "run_all.sh"]


# ---- the commands that run_all.sh lists


def listed(*words, **env):
    """The lines of --list; no Python is asked."""
    env = {**os.environ, "PYTHON": "/nowhere", **env}
    command = ["bash", ROOT / "run_all.sh", "--list", *words]
    return subprocess.check_output(command, env=env, text=True).splitlines()


@pytest.fixture(scope="module")
def steps():
    """{QUICK: [(script, its parsed arguments, DIR/NAME of its result or None)]} of every stage."""
    train, gradcam, attack, make_data = map(
        importlib.import_module, ("train", "gradcam", "attack", "make_data")
    )
    found = {"0": [], "1": []}
    for quick, steps in found.items():
        for line in listed(QUICK=quick):
            python, script, *words = line.split() if line != "----" else ("", "", "")
            if script == "make_data.py":
                steps.append((script, make_data.get_args(words), None))
            elif script == "train.py":
                args = train.get_args(words)
                steps.append((script, args, args.dir / args.name))
            elif script == "gradcam.py":
                args = gradcam.get_args(words)
                no_record = args.mode in ("--page", "--image")
                path = None if no_record else args.dir / gradcam.result_name(args)
                steps.append((script, args, path))
            elif script == "attack.py":
                args, usual = attack.get_args(words)
                steps.append((script, args, args.dir / attack.result_name(args, usual)))
    return found


def test_no_step_overwrites_another_and_quick_gives_the_same_names(steps):
    """Two stages may ask for one result, by the same command."""
    names = {}
    for quick, found in steps.items():
        settings = {}
        for _, args, path in found:
            if path:
                assert settings.setdefault(str(path), args) == args, path
        names[quick] = list(settings)
        assert len(settings) > 80
    for found in names.values():
        assert all(len(Path(name).name) < 48 for name in found), "a name that nobody would type"
    assert {name.replace("results/quick", "results") for name in names["1"]} <= {*names["0"]}
    for name in ("jitter_hsv_image_nofade_s42", "attack_7to3_n500", "attack_untargeted_n2000"):
        assert f"results/{name}" in names["0"] and f"results/quick/{name}" in names["1"]


def test_the_committed_worlds_are_painted_as_the_steps_paint_them(steps):
    make_data = importlib.import_module("make_data")
    for script, args, _ in steps["0"]:
        if script == "make_data.py":
            meta = json.loads((ROOT / args.dir / "meta.json").read_text())
            assert meta["args"] == make_data.settings(args), args.dir


@pytest.mark.parametrize("quick", ["0", "1"])
def test_every_model_that_a_step_reads_was_trained_by_a_step_before(steps, quick):
    there = set()
    for script, args, _ in steps[quick]:
        if script == "train.py":
            there |= {args.dir / args.name, args.dir / re.sub(r"(_s\d+)$", r"_clean\1", args.name)}
        read = [*getattr(args, "models", []), getattr(args, "generator", None)]
        read += [getattr(args, "reader", None)]
        if getattr(args, "method", None) == "robgan":
            read += [args.judge]
        for name in filter(None, read):
            path = Path(os.path.normpath(args.dir / name))  # ../mnist_2000/NAME is another world's
            assert path in there, (script, name)


def test_levels_are_separated_by_dashes():
    lines = listed("lazy", "cures")
    levels = "\n".join(lines).split("\n----\n")
    assert [{line.split()[1] for line in level.splitlines()} for level in levels] == [
        {"make_data.py"},
        {"train.py"},
        {"attack.py", "gradcam.py"},
        {"train.py"},
    ]
    assert "python train.py --dir results --method jitter --seed 46" in lines


# ---- what run_all.sh does with them, beside an interpreter that only notes the steps


@pytest.fixture
def sandbox(tmp_path):
    """Scripts of a line and a python that runs none of them; train.py fails if `broken` is there.

    Where there is a README.md, train.py --report is run.
    """
    (tmp_path / "run_all.sh").write_bytes((ROOT / "run_all.sh").read_bytes())
    for name in ("common.py", *SCRIPTS):
        (tmp_path / name).write_text("x = 1\n")
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
        case "$*" in
          train.py*--report) [ ! -e README.md ] || exec {sys.executable} "$@" ;;
          train.py*) [ ! -e broken ] || {{ echo no luck; exit 1; }} ;;
          [a-z]*.py*) ;;
          *) exec {sys.executable} "$@" ;;
        esac
        echo "$*" >> ran
        """
    )
    python.chmod(0o755)

    def call(*words, **env):
        env = {**os.environ, "PYTHON": "./python", "QUICK": "1", "JOBS": "2", **env}
        command = ["bash", "run_all.sh", *words]
        return subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, env=env)

    def runs(*words, **env):
        """The steps that a successful call runs."""
        (tmp_path / "ran").unlink(missing_ok=True)
        done = call(*words, **env)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        lines = (tmp_path / "ran").read_text().splitlines()
        call.reported = [line.split()[0] for line in lines if "--report" in line]
        return [line for line in lines if "--report" not in line]

    call.runs, call.folder = runs, tmp_path
    return call


def test_a_second_call_repeats_nothing_and_fresh_replaces_everything(sandbox):
    once = sandbox.runs("lazy")
    assert sorted(once) == sorted(line[7:] for line in listed("lazy", QUICK="1") if line != "----")
    assert sandbox.reported == list(SCRIPTS)
    assert sandbox.runs("lazy") == []
    again = sandbox.runs("lazy", FRESH="1")
    assert sorted(again) == sorted(f"{line} --overwrite" for line in once)


def test_it_stops_at_a_failure_names_it_and_continues_there(sandbox):
    (sandbox.folder / "broken").touch()
    done = sandbox("lazy")
    assert done.returncode == 1
    for text in ("FAILED", "python train.py", "no luck", "run the same command again"):
        assert text in done.stderr
    before = (sandbox.folder / "ran").read_text()
    assert before.count("make_data.py") == before.count("\n") == 2
    (sandbox.folder / "broken").unlink()
    assert not [line for line in sandbox.runs("lazy") if line.startswith("make_data.py")]


def test_it_says_how_far_it_is_and_changed_code_alone_makes_steps_run_again(sandbox):
    said = sandbox("cures").stdout.splitlines()
    assert said[0] == "cures: 7 steps to do, 0 done before"
    assert re.fullmatch(r"  7 of 7, 1 min left at this pace +\d+s  python train.py .*", said[-2])
    assert said[-1].endswith("open results/quick/tables.md")
    (sandbox.folder / "mine.py").write_text("class Mine(Baseline): pass\n")
    (sandbox.folder / "attack.py").write_text("x = 2\n")
    (sandbox.folder / "train.py").write_text("# a comment\nx = 1\n")
    assert sandbox.runs("cures") == []
    for script in ("train.py", "common.py"):
        (sandbox.folder / script).write_text("x = 2\n")
        assert len(sandbox.runs("cures")) == 7


def test_what_looks_at_models_runs_again_once_training_has_changed(sandbox):
    once = sandbox.runs("lazy")
    (sandbox.folder / "train.py").write_text("x = 2\n")
    again = [line for line in once if not line.startswith("make_data.py")]
    assert sorted(sandbox.runs("lazy")) == sorted(again)
    assert {line.split()[0] for line in again} == {"train.py", "gradcam.py", "attack.py"}


MINE = """class Mine(Baseline):
    def loss(self, model, batch, gen):
        return super().loss(model, batch, gen)
"""


def test_compare_shows_ones_own_method_beside_ours(sandbox):
    """The steps leave no results here, so the records of five seeds lie there before."""
    for name in ("common.py", "train.py"):
        (sandbox.folder / name).write_bytes((ROOT / name).read_bytes())
    results = sandbox.folder / "results"
    results.mkdir()
    (sandbox.folder / "README.md").touch()
    (sandbox.folder / "mine.py").write_text(MINE)
    times = (results / "times.csv").open("w")
    gains = {"baseline": 0, "jitter": 0.5, "told_nothing_width4": 0.4, "mine": 0.3}
    for row, gain in gains.items():
        for seed in range(42, 47):
            score = {"acc": 0.4 + gain + seed % 2 / 100}
            record = {"script": "train.py", "name": f"{row}_s{seed}", "trained": True, "world": {}}
            record |= {"args": {"method": row, "seed": seed}, "knows": "nothing"}
            record["final"] = {"val": score, "test_hard": score}
            (results / f"{record['name']}.json").write_text(json.dumps(record))
            times.write(f"{record['name']},9.0,{seed}.0\n")
    times.close()
    done = sandbox("compare", "mine.py", "jitter", QUICK="0")
    assert (done.returncode, done.stderr) == (0, "")
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip(" `") for line in table[2:]] == [*gains]
    gains = [f"{gain:+.3f} ({gain:+.3f} to {gain:+.3f})" for gain in (0.3, -0.2, -0.1)]
    assert f"| {' | '.join(gains)} |" in table[-1]  # to baseline, jitter, told nothing
    assert table[-1].endswith("| 44.000 ± 1.581 (5) |")
    ran = (sandbox.folder / "ran").read_text().splitlines()
    steps = [line for line in ran if "--report" not in line]
    assert len(steps) == len(set(steps)) == 1 + 4 * 5
    (sandbox.folder / "README.md").unlink()
    (sandbox.folder / "mine.py").write_text(MINE.replace("super().loss", "2 * super().loss"))
    sandbox("compare", "mine.py", QUICK="0")
    again = (sandbox.folder / "ran").read_text().splitlines()[len(ran) :]
    again = [line for line in again if "--report" not in line]
    assert len(again) == 5 and all("--method mine.py" in line for line in again)


@pytest.mark.slow
def test_quick_shows_the_cheat_and_the_cure_on_real_mnist():
    command = ["bash", "run_all.sh", "lazy"]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "QUICK": "1"}, check=True)
    hard = {}
    for name in ("baseline_s42", "jitter_s42"):
        record = json.loads((ROOT / "results" / "quick" / f"{name}.json").read_text())
        hard[name] = record["final"]["test_hard"]["acc"]
    assert hard["baseline_s42"] < 0.05 and hard["jitter_s42"] > 0.4
    assert "| `jitter` |" in (ROOT / "results" / "quick" / "tables.md").read_text()
