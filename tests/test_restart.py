"""Killed, interrupted, out of disk or started twice: what is on disk is whole, and running again ends where an unbroken run does.

Runs are forks of this process, which need not import torch anew; the same by the real command line is slow.
"""

import contextlib
import errno
import importlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

import attack
import common
import gradcam
from conftest import ROOT, contents
from test_make_data import write_idx

COMMANDS = {  # script: a short run of it, and the files that it writes (figures aside)
    "make_data.py": (
        "make_data.py --device cpu --mnist idx --seed 1",
        [*(f"{name}.pt" for name in common.SPLITS), "meta.json"],
    ),
    "train.py": (
        "train.py --device cpu --method jitter --epochs 3",
        ["jitter_s42.pt", "jitter_s42.json"],
    ),
    "gradcam.py": ("gradcam.py --device cpu --models baseline_s42", ["gradcam.pt", "gradcam.json"]),
    "attack.py": (
        "attack.py --device cpu --models baseline_s42 --n 2 --steps 2 --sweep 0.1",
        ["attack_7to3.pt", "attack_7to3.json"],
    ),
}


@pytest.fixture
def world(tiny, tmp_path, monkeypatch):
    """results/ with a tiny world and a model in it, idx/ with the digits of another."""
    if torch.cuda.is_initialized():
        pytest.skip("CUDA does not survive a fork; run this file by itself")
    monkeypatch.setattr(gradcam, "SANITY_DRAWS", 1)  # less of the same
    monkeypatch.setattr(attack, "RESOLUTION", 0.1)
    monkeypatch.setattr(attack, "SEARCH_STEPS", 1)
    monkeypatch.setattr(attack.search_min_eps, "__defaults__", (2,))
    tiny(tmp_path / "results", n=100)
    write_idx(tmp_path / "idx", n=(120, 20))
    torch.manual_seed(0)
    common.save_pt(
        {
            "weights": {k: v.contiguous() for k, v in common.build_model().state_dict().items()},
            "classes": 10,
            "size": [28, 28],
            "args": {"method": "baseline", "seed": 42, "model": "simplecnn", "width": 4},
        },
        tmp_path / "results" / "baseline_s42.pt",
    )
    return tmp_path / "results"


class Run:
    """A script in a fork of this process; `before()` is called there first. Its complaints end up in a file beside results/."""

    def __init__(self, folder, command, before=lambda: None):
        self.folder, self.err = folder, folder / "err"
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.chdir(folder)
                sys.stdout, sys.stderr = open(os.devnull, "w"), open("err", "w")  # noqa: SIM115
                sys.argv = command.split()
                before()
                common.run(importlib.import_module(sys.argv[0].removesuffix(".py")).main)
                code = 0
            except SystemExit as stop:
                code = stop.code
            except BaseException:
                traceback.print_exc()
                raise
            finally:
                sys.stderr.flush()
                os._exit(code)

    def wait(self):
        """Exit code, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def send(self, number):
        os.kill(self.pid, number)
        return self.wait()


pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")


@pytest.fixture(autouse=True)
def ctrl_c_is_heard():
    """A job in the background, as in some CI, starts with SIGINT ignored, and so would all that it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def until(happens, seconds=60):
    end = time.time() + seconds
    while not happens():
        assert time.time() < end, "waited in vain"
        time.sleep(0.01)


def at_call(k, names, act):
    """Call act(name, function, *args) in place of the k-th call, from 0, of any of these functions, each (owner, name)."""
    calls = iter(range(10**9))
    for owner, name in names:
        function = getattr(owner, name)

        def wrapped(*args, name=name, function=function):
            return act(name, function, *args) if next(calls) == k else function(*args)

        setattr(owner, name, wrapped)


WRITES, RENAMES = [(Path, "write_bytes"), (Path, "write_text")], [(os, "replace")]


def half(data):
    return data[: len(data) // 2]


def killed_while_writing(name, write, path, data):
    write(path, half(data))
    os.kill(os.getpid(), signal.SIGKILL)


def killed_before_the_rename(name, replace, *paths):
    os.kill(os.getpid(), signal.SIGKILL)


def killed_behind_the_rename(name, replace, *paths):
    replace(*paths)
    os.kill(os.getpid(), signal.SIGKILL)


def full(name, write, path, data):
    write(path, half(data))
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def stuck(name, replace, *paths):
    Path("stuck").touch()
    time.sleep(600)


def measured(folder, files):
    """{file: its bytes, of a JSON without `run`}."""
    found = {}
    for name in files:
        found[name] = (folder / name).read_bytes()
        if name.endswith(".json"):
            found[name] = {
                key: value for key, value in json.loads(found[name]).items() if key != "run"
            }
    return found


def all_whole(folder):
    for path in folder.rglob("[!.]*.*"):
        if path.suffix == ".png":
            assert path.read_bytes()[-8:-4] == b"IEND", path
        else:
            {".pt": common.load_pt, ".json": common.load_json}[path.suffix](path, "")


def left_over(folder):
    return [
        path.name for path in folder.rglob("*") if path.name.startswith(".") or ".part" in path.name
    ]


# ---------------------------------------------------------------- killed


@pytest.mark.parametrize("script", ["make_data.py", "gradcam.py", "attack.py"])
def test_killed_at_any_file_then_run_again(world, call, script):
    command, files = COMMANDS[script]
    call(command)
    wanted = measured(world, files)
    if script == "make_data.py":
        call(command.replace("--seed 1", "--seed 2"))
    before = measured(world, files)
    for k in range(7 if script == "make_data.py" else 2):
        for act, calls in (
            (killed_while_writing, WRITES),
            (killed_before_the_rename, RENAMES),
            (killed_behind_the_rename, RENAMES),
        ):
            assert (
                Run(
                    world.parent, command, lambda k=k, act=act, calls=calls: at_call(k, calls, act)
                ).wait()
                == -signal.SIGKILL
            )
            all_whole(world)
            with contextlib.suppress(SystemExit):  # refused, or all of one world
                common.load_splits(world)
                now = measured(world, files)
                assert now in (before, wanted)
    call(command)
    assert measured(world, files) == wanted and left_over(world) == []


@pytest.mark.parametrize(
    "flags", ["--method jitter --schedule onecycle", "--method at --clean-epochs 2 --steps 1"]
)
def test_training_killed_at_any_moment_then_resumed(world, call, flags):
    began = time.time()
    call(f"train.py {flags} --epochs 4 --name a_s42")
    seconds = time.time() - began
    files = [path.name for path in world.glob("a_*") if path.suffix in (".pt", ".json")]
    wanted, moment = measured(world, files), random.Random(7)
    for name in files:
        (world / name).unlink()
    for _ in range(4):
        run = Run(world.parent, f"train.py {flags} --epochs 4 --name a_s42 --resume")
        time.sleep(moment.uniform(0, 0.7 * seconds))
        assert run.send(signal.SIGKILL) in (0, -signal.SIGKILL)
        all_whole(world)
    call(f"train.py {flags} --epochs 4 --name a_s42 --resume")
    assert measured(world, files) == wanted and left_over(world) == []


@pytest.mark.slow
@pytest.mark.parametrize("script", COMMANDS)
def test_killed_at_random_by_the_real_command_line(world, cli, tmp_path, script):
    command, files = COMMANDS[script]
    began = time.time()
    cli(command)
    seconds, wanted, moment = time.time() - began, measured(world, files), random.Random(7)
    for _ in range(8):
        run = subprocess.Popen(
            [
                sys.executable,
                str(ROOT / script),
                *command.split()[1:],
                *["--resume"] * (script == "train.py"),
            ],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(moment.uniform(0.3, 1) * seconds)
        run.kill()
        run.wait()
        all_whole(world)
    cli(command + " --resume" * (script == "train.py"))
    assert measured(world, files) == wanted and left_over(world) == []


def test_a_part_of_a_run_that_is_alive_or_elsewhere_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(common.platform, "node", lambda: "here.org")
    alive, dead, elsewhere = (
        f".x.json.{part}.part"
        for part in (f"here-org.{os.getppid()}", f"here-org.{2**22 + 1}", f"there.{2**22 + 1}")
    )  # no process id is that large
    for name in (alive, dead, elsewhere):
        (tmp_path / name).touch()
    common.save_json({}, tmp_path / "x.json")
    assert {path.name for path in tmp_path.iterdir()} == {"x.json", alive, elsewhere}


# ---------------------------------------------------------------- interrupted, out of disk


@pytest.mark.parametrize("script", COMMANDS)
def test_ctrl_c_gets_one_line(world, script):
    run = Run(world.parent, COMMANDS[script][0], lambda: at_call(1, RENAMES, stuck))
    until((world.parent / "stuck").exists)
    assert run.send(signal.SIGINT) == 130
    assert (
        run.err.read_text().strip()
        == f"{script}: interrupted; finished files are whole, run the same command again"
    )
    all_whole(world)
    assert [
        name for name in left_over(world) if name != "jitter_s42.part.pt"
    ] == []  # that one is for --resume


def test_ctrl_c_by_the_real_command_line(world, tmp_path):
    run = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), "--epochs", "10000"],
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    for line in run.stdout:
        if line.startswith("epoch"):
            break
    run.send_signal(signal.SIGINT)
    err = run.communicate(timeout=60)[1]
    assert run.returncode == 130 and err.strip().count("\n") == 0 and "train.py: interrupted" in err


@pytest.mark.parametrize("script", COMMANDS)
def test_a_full_disk_gets_one_line_and_earlier_files_stay(world, call, script):
    command = COMMANDS[script][0]
    call(command.replace("--seed 1", "--seed 2"))
    before = contents(world)
    for limit in (1000, 20_000):  # bytes a file
        run = Run(
            world.parent,
            command,
            lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        )
        code, said = run.wait(), run.err.read_text()
        if limit == 20_000 and code == 0:
            continue  # small enough
        assert (
            code == 2
            and said.count("\n") == 1
            and "cannot write results/" in said
            and "File too large" in said
        )
        if script != "gradcam.py" and limit == 1000:
            assert contents(world) == before
        all_whole(world)
    for k in range(6 if script == "make_data.py" else 2):
        run = Run(world.parent, command, lambda k=k: at_call(k, WRITES, full))
        assert run.wait() == 2
        assert (
            run.err.read_text().count("\n") == 1
            and "cannot write results/" in run.err.read_text()
            and "No space left" in run.err.read_text()
        )
        if k < 4 and script == "make_data.py":
            assert contents(world) == before, (
                "a new world replaces the old one when all of it is there"
            )
        all_whole(world)
        assert [name for name in left_over(world) if name != "jitter_s42.part.pt"] == []


# ---------------------------------------------------------------- two at once


@pytest.mark.parametrize("script", COMMANDS)
def test_a_second_run_into_the_same_files_is_refused_and_a_dead_one_is_not_waited_for(
    world, call, mistake, script
):
    command, files = COMMANDS[script]
    call(command)
    wanted = measured(world, files)
    run = Run(world.parent, command, lambda: at_call(0, RENAMES, stuck))
    until((world.parent / "stuck").exists)
    mistake(command, "another run is writing results/")
    run.send(signal.SIGKILL)
    call(command)
    assert measured(world, files) == wanted and left_over(world) == []


def test_runs_of_different_names_go_side_by_side(world, call):
    call("train.py --epochs 3 --name a")
    wanted = measured(world, ["a.pt", "a.json"])
    runs = [Run(world.parent, f"train.py --epochs 3 --name {name}") for name in ("a", "b", "c")]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert (
        measured(world, ["a.pt", "a.json"]) == wanted
        and (world / "b.pt").read_bytes() == (world / "c.pt").read_bytes() == wanted["a.pt"]
    )


def test_whoever_gets_the_lock_has_it_alone(tmp_path):
    """Many at once: as many succeed as write, the others are refused, and no two hold it at the same time."""

    def hold():
        with common.alone(tmp_path / "x.json"):
            (tmp_path / "held").mkdir()  # fails where somebody else holds it
            time.sleep(0.002)
            (tmp_path / "held").rmdir()

    def compete():
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        won = 0
        while won < 20:
            with contextlib.suppress(SystemExit):
                hold()
                won += 1
        sys.exit(0)

    runs = [Run(tmp_path, "train.py", compete) for _ in range(4)]
    assert [run.wait() for run in runs] == [0] * 4 and left_over(tmp_path) == []


# ---------------------------------------------------------------- in silence, and with two threads


@pytest.mark.filterwarnings("error")
def test_no_warning(world, call):
    for command, _ in COMMANDS.values():
        call(command)
        call(f"{command.split()[0]} --report")


@pytest.mark.slow
def test_no_warning_by_the_real_command_line(world, tmp_path):
    for command, _ in COMMANDS.values():
        for words in (command.split(), [command.split()[0], "--report"]):
            words = [sys.executable, "-W", "error", str(ROOT / words[0]), *words[1:]]
            done = subprocess.run(words, cwd=tmp_path, text=True, capture_output=True, check=False)
            assert done.returncode == 0 and done.stderr == "", done.stderr


@pytest.mark.slow
def test_two_threads_repeat_themselves(world, cli):
    for script in ("train.py", "gradcam.py", "attack.py"):
        command, files = COMMANDS[script]
        cli(f"{command} --threads 2")
        once = measured(world, files)
        cli(f"{command} --threads 2")
        assert measured(world, files) == once, command


# ---------------------------------------------------------------- run_all.sh

STEPS = 5  # of QUICK=1 bash run_all.sh cures


@pytest.fixture
def stages(tmp_path):
    """run_all.sh beside scripts that do nothing for a moment, and note when they begin and when they end."""
    (tmp_path / "run_all.sh").write_bytes((ROOT / "run_all.sh").read_bytes())
    for name in ("common.py", "make_data.py", "train.py", "gradcam.py", "attack.py"):
        (tmp_path / name).write_text(
            "import sys, time\nnote = lambda file: open(file, 'a').write(' '.join(sys.argv) + chr(10))\n"
            "if '--report' not in sys.argv:\n    note('began')\n    time.sleep(0.3)\n    note('ended')\n"
        )

    def start(*words):
        env = {**os.environ, "PYTHON": sys.executable, "QUICK": "1", "JOBS": "2"}
        return subprocess.Popen(
            ["bash", "run_all.sh", *(words or ["cures"])],
            cwd=tmp_path,
            text=True,
            env=env,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def lines(file):
        return (tmp_path / file).read_text().splitlines() if (tmp_path / file).exists() else []

    start.lines, start.folder = lines, tmp_path
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


def test_run_all_killed_alone_leaves_steps_that_are_waited_for(stages):
    run = stages()
    until(lambda: stages.lines("began"))
    run.kill()
    run.wait()
    second = stages()
    err = second.communicate()[1]
    assert (
        second.returncode == 2 and err.count("\n") == 1 and f"run_all.sh (process {run.pid})" in err
    ), err
    until(lambda: len(stages.lines("ended")) == len(stages.lines("began")))

    def finishes():
        third = stages()
        err = third.communicate()[1]
        assert third.returncode == 0 or "at work" in err, err
        return third.returncode == 0

    until(finishes)
    assert (
        sorted(set(stages.lines("ended"))) == sorted(set(stages.lines("began")))
        and len(set(stages.lines("ended"))) == STEPS
    )


def test_run_all_twice_at_once_is_refused_but_its_report_is_not(stages):
    first = stages()
    until(lambda: stages.lines("began"))
    second, report = stages("lazy"), stages("report")
    assert second.communicate()[1].count("\n") == 1 and second.returncode == 2
    report.communicate()
    assert report.returncode == 0
    err = first.communicate()[1]
    assert first.returncode == 0 and err == "" and len(stages.lines("began")) == STEPS


def test_ctrl_c_ends_run_all_and_its_steps_with_one_line(stages):
    run = stages()
    until(lambda: stages.lines("began"))
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    err = run.communicate(timeout=60)[1]
    assert (
        run.returncode == 130
        and err == "run_all.sh: interrupted; run the same command again to continue\n"
    ), err
    began, ended = len(stages.lines("began")), len(stages.lines("ended"))
    time.sleep(0.5)
    assert (len(stages.lines("began")), len(stages.lines("ended"))) == (
        began,
        ended,
    ) and ended < began
    assert not list(stages.folder.glob("results/quick/.done/log.*"))
