"""Killed, interrupted, out of disk: files are whole or absent, and running again ends the same.

Runs are forks of this process, which need not import torch anew.
"""

import errno
import importlib
import json
import os
import random
import runpy
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, contents
from test_make_data import write_idx

import common
import make_data

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
WORLD_FILES = [*(f"{name}.pt" for name in common.SPLITS), "meta.json"]


@pytest.fixture
def world(tiny, tmp_path, unprobed):
    """results/ with a tiny world in it."""
    if torch.cuda.is_initialized():
        pytest.skip("CUDA does not survive a fork; run this file by itself")
    tiny(tmp_path / "results", n=100)
    return tmp_path / "results"


class Run:
    """A script in a fork of this process, after before(); its complaints end up in `err`."""

    def __init__(self, folder, command, before=lambda: None):
        self.err = folder / "err"
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.chdir(folder)
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115
                sys.stderr = open("err", "w")  # noqa: SIM115
                sys.argv = command.split()
                before()
                common.run(importlib.import_module(sys.argv[0].removesuffix(".py")).main)
                code = 0
            except SystemExit as stop:
                code = stop.code
            finally:
                sys.stderr.flush()
                os._exit(code)

    def wait(self):
        """Exit code, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def until(happens, seconds=60):
    end = time.time() + seconds
    while not happens():
        assert time.time() < end, "waited in vain"
        time.sleep(0.01)


def at_call(k, owner, name, act):
    """Call act(function, *args) in place of the k-th call, from 0, of owner.name."""
    function, calls = getattr(owner, name), iter(range(10**9))

    def wrapped(*args, **kwargs):
        return act(function, *args) if next(calls) == k else function(*args, **kwargs)

    setattr(owner, name, wrapped)


def measured(folder, files):
    """{file: its bytes, of a JSON all but `run`}; a missing file is left out."""
    found = {}
    for name in files:
        path = folder / name
        if path.exists() and name.endswith(".json"):
            record = json.loads(path.read_text())
            found[name] = {key: value for key, value in record.items() if key != "run"}
        elif path.exists():
            found[name] = path.read_bytes()
    return found


def killed_while_writing(write, path, data):
    write(path, bytes(data)[: len(data) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def killed_before(move, *paths):
    os.kill(os.getpid(), signal.SIGKILL)


def full(write, path, data):
    write(path, bytes(data)[: len(data) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


# ---- make_data.py


@pytest.mark.parametrize(
    "act, owner, name, calls",
    [
        (killed_while_writing, Path, "write_bytes", (0, 1, 5)),
        (killed_before, os, "replace", (0, 2, 5)),
        (killed_before, Path, "unlink", (2, 4)),
        (full, Path, "write_bytes", (0, 3, 5)),
    ],
)
def test_a_world_broken_off_at_any_file_is_whole_or_refused_and_painted_again(
    tmp_path, monkeypatch, act, owner, name, calls
):
    """Killed, or the disk is full, while a second world is painted over a first one."""
    monkeypatch.setattr(make_data, "draw_samples", lambda folder: None)
    write_idx(tmp_path / "idx", n=(120, 20))
    folder, command = tmp_path / "results", "make_data.py --mnist idx --seed 1"
    assert Run(tmp_path, command).wait() == 0
    wanted = measured(folder, WORLD_FILES)
    assert Run(tmp_path, "make_data.py --mnist idx --seed 2 --overwrite").wait() == 0
    first = contents(folder)
    before = measured(folder, WORLD_FILES)
    for k in calls:
        for path, data in first.items():
            path.write_bytes(data)
        run = Run(tmp_path, f"{command} --overwrite", lambda k=k: at_call(k, owner, name, act))
        if act is full:
            assert run.wait() == 2 and not list(folder.glob(".*.part"))
            said = (tmp_path / "err").read_text()
            assert said.count("\n") == 1 and "No space left" in said
        else:
            assert run.wait() == -signal.SIGKILL
        now = measured(folder, WORLD_FILES)
        halfway = now["meta.json"].keys() == {"script", "args"}
        assert now == before or halfway
        kinds = set()
        for file in now.keys() - {"meta.json"}:
            assert now[file] in (before[file], wanted[file])
            kinds.add(now[file] == wanted[file])
        assert len(kinds) < 2, "no splits of two worlds"
        again = "" if halfway else " --overwrite"
        assert Run(tmp_path, command + again).wait() == 0, (tmp_path / "err").read_text()
        assert measured(folder, WORLD_FILES) == wanted


# ---- train.py


@pytest.mark.parametrize(
    "flags", ["--method jitter --schedule onecycle", "--method at --clean-epochs 2 --steps 1"]
)
def test_training_killed_at_any_moment_then_resumed(world, call, flags):
    command = f"train.py {flags} --epochs 4 --name a_s42"
    began = time.time()
    call(command)
    seconds = time.time() - began
    files = [path.name for path in world.glob("a_*") if path.suffix in (".pt", ".json")]
    wanted, moment = measured(world, files), random.Random(7)
    for name in files:
        (world / name).unlink()
    for _ in range(3):
        run = Run(world.parent, f"{command} --resume")
        time.sleep(moment.uniform(0, 0.7 * seconds))
        os.kill(run.pid, signal.SIGKILL)
        assert run.wait() in (0, -signal.SIGKILL)
        for name, data in measured(world, files).items():
            assert data == wanted[name], "a file is whole or absent"
    call(f"{command} --resume")
    assert measured(world, files) == wanted
    assert not (world / "a_s42.part.pt").exists()


def test_two_runs_of_the_same_command_leave_the_same_files(world):
    files = ["a_s42.pt", "a_s42.json", "b_s42.pt"]
    runs = [Run(world.parent, f"train.py --epochs 3 --name {name}") for name in ("a", "a", "b")]
    assert [run.wait() for run in runs] == [0, 0, 0]
    found = measured(world, files)
    assert found["a_s42.json"]["epochs"][2]["epoch"] == 3
    assert found["a_s42.pt"] == found["b_s42.pt"]


def test_ctrl_c_gets_one_line_that_says_how_to_go_on(world, tmp_path):
    def as_a_script():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has none
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")

    run = Run(tmp_path, "train.py --epochs 10000 --name a", as_a_script)
    until((world / "a_s42.part.pt").exists)
    os.kill(run.pid, signal.SIGINT)
    assert run.wait() == 130
    err = (tmp_path / "err").read_text().strip()
    assert err.count("\n") == 0 and "train.py: interrupted" in err and "--resume" in err


# ---- run_all.sh

STEPS = 7  # of QUICK=1 bash run_all.sh cures


@pytest.fixture
def stages(tmp_path):
    """run_all.sh beside scripts that note when they begin and end, and wait for `hold`."""
    (tmp_path / "run_all.sh").write_bytes((ROOT / "run_all.sh").read_bytes())
    script = textwrap.dedent("""
        import os, sys, time
        def note(file):
            open(file, "a").write(" ".join(sys.argv) + chr(10))
        if "--report" not in sys.argv:
            note("began")
            time.sleep(0.2)
            for _ in range(1200):  # a minute: no test that fails leaves it behind for ever
                if os.path.exists("hold"):
                    time.sleep(0.05)
            note("ended")
    """)
    for name in ("common.py", "make_data.py", "train.py", "gradcam.py", "attack.py"):
        (tmp_path / name).write_text(script)

    def start(*words):
        return subprocess.Popen(
            ["bash", "run_all.sh", *(words or ["cures"])],
            cwd=tmp_path,
            text=True,
            env={**os.environ, "PYTHON": sys.executable, "QUICK": "1", "JOBS": "2"},
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def lines(file):
        return (tmp_path / file).read_text().splitlines() if (tmp_path / file).exists() else []

    start.lines = lines
    start.marks = lambda: len([*(tmp_path / "results/quick/.done").glob("[0-9]*")])
    return start


def test_run_all_killed_with_its_steps_repeats_no_finished_one(stages):
    run = stages()
    until(lambda: stages.marks() >= 3)
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    done = stages.marks()
    again = stages()
    out, err = again.communicate()
    assert again.returncode == 0 and f"{done} done before" in out, out + err
    assert len(stages.lines("ended")) - STEPS <= 2, "at most the steps that were under way"


def test_run_all_killed_alone_leaves_steps_that_are_waited_for(stages, tmp_path):
    (tmp_path / "hold").touch()
    run = stages()
    until(lambda: stages.lines("began"))
    run.kill()
    run.wait()
    second = stages()
    err = second.communicate()[1]
    assert second.returncode == 2 and err.count("\n") == 1, err
    assert f"run_all.sh (process {run.pid})" in err
    (tmp_path / "hold").unlink()

    def finishes():
        third = stages()
        err = third.communicate()[1]
        assert third.returncode == 0 or "at work" in err, err
        return third.returncode == 0

    until(finishes)
    assert len(set(stages.lines("ended"))) == STEPS


def test_run_all_twice_at_once_is_refused_in_one_line(stages, tmp_path):
    (tmp_path / "hold").touch()
    first = stages()
    until(lambda: stages.lines("began"))
    for words in ("lazy", "report"):
        second = stages(words)
        assert second.communicate(timeout=60)[1].count("\n") == 1 and second.returncode == 2
    (tmp_path / "hold").unlink()
    err = first.communicate()[1]
    assert first.returncode == 0 and err == "" and len(stages.lines("began")) == STEPS


def test_ctrl_c_ends_run_all_and_its_steps_with_one_line(stages, tmp_path):
    (tmp_path / "hold").touch()
    run = stages()
    until(lambda: stages.lines("began"))
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    err = run.communicate(timeout=60)[1]
    assert run.returncode == 130
    assert err == "run_all.sh: interrupted; run the same command again to continue\n"
    before = contents(tmp_path)
    time.sleep(0.5)
    assert contents(tmp_path) == before and len(stages.lines("ended")) < STEPS
    assert not list(tmp_path.glob("results/quick/.done/log.*"))
