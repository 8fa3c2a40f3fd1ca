"""run_all.sh and the four scripts, one after the other, by the real command line."""

import json
import os
import subprocess

import pytest

from conftest import ROOT


def test_the_four_scripts_in_a_row(tiny, cli, call, tmp_path):
    tiny(tmp_path / "results")
    cli("train.py --epochs 1")
    call("train.py --epochs 1 --method jitter")
    cli("gradcam.py")
    cli("attack.py --src 7 --tgt 3 --eps 0.05 --steps 5")
    for script in ("train.py", "gradcam.py", "attack.py"):
        pictures = [
            line for line in call(f"{script} --report").splitlines() if line.startswith("![")
        ]
        assert pictures
        for line in pictures:
            assert (tmp_path / "results" / line.split("](")[1].rstrip(")")).exists(), line


def shell(*words, **env):
    return subprocess.run(
        ["bash", str(ROOT / "run_all.sh"), *words],
        text=True,
        capture_output=True,
        env={**os.environ, **env},
    )


def test_an_unknown_stage_is_named(tmp_path):
    done = shell("lunch")
    assert done.returncode == 2 and "there is no stage 'lunch'" in done.stderr


@pytest.fixture
def sandbox(tmp_path):
    """run_all.sh beside scripts that only note that they ran; train.py fails while there is a file called `broken`."""
    (tmp_path / "run_all.sh").write_bytes((ROOT / "run_all.sh").read_bytes())
    for name in ("common.py", "make_data.py", "train.py", "gradcam.py", "attack.py"):
        (tmp_path / name).write_text(
            "import sys, pathlib\nif 'train.py' in sys.argv[0] and pathlib.Path('broken').exists(): sys.exit('no luck')\n"
            "if '--report' not in sys.argv: open('ran', 'a').write(' '.join(sys.argv) + chr(10))\n"
        )

    def call(*words):
        env = {**os.environ, "PYTHON": os.sys.executable, "QUICK": "1", "JOBS": "2"}
        return subprocess.run(
            ["bash", "run_all.sh", *words], cwd=tmp_path, text=True, capture_output=True, env=env
        )

    call.ran = lambda: (
        (tmp_path / "ran").read_text().splitlines() if (tmp_path / "ran").exists() else []
    )
    call.folder = tmp_path
    return call


def test_a_second_call_repeats_nothing(sandbox):
    assert sandbox("lazy").returncode == 0
    once = len(sandbox.ran())
    done = sandbox("lazy")
    assert done.returncode == 0 and once > 10 and len(sandbox.ran()) == once, done.stdout


def test_it_stops_at_a_failure_names_it_and_continues_there(sandbox):
    (sandbox.folder / "broken").touch()
    done = sandbox("lazy")
    assert (
        done.returncode == 1
        and "FAILED" in done.stderr
        and "python train.py" in done.stderr
        and "no luck" in done.stderr
    )
    before = sandbox.ran()
    assert before and all("make_data.py" in line for line in before)
    (sandbox.folder / "broken").unlink()
    assert sandbox("lazy").returncode == 0
    assert sandbox.ran()[: len(before)] == before and not any(
        "make_data.py" in line for line in sandbox.ran()[len(before) :]
    )


def test_a_changed_script_runs_again_with_all_that_reads_its_results(sandbox):
    sandbox("lazy")
    before = len(sandbox.ran())
    (sandbox.folder / "gradcam.py").write_text(
        (sandbox.folder / "gradcam.py").read_text() + "# changed\n"
    )
    sandbox("lazy")
    assert {line.split()[0] for line in sandbox.ran()[before:]} == {"gradcam.py"}
    (sandbox.folder / "train.py").write_text(
        (sandbox.folder / "train.py").read_text() + "# changed\n"
    )
    before = len(sandbox.ran())
    sandbox("lazy")
    assert {line.split()[0] for line in sandbox.ran()[before:]} == {
        "train.py",
        "gradcam.py",
        "attack.py",
    }


def test_a_listed_step_is_a_command_of_its_own_and_leaves_its_mark(sandbox):
    listed = sandbox("--list", "lazy").stdout.splitlines()
    assert (
        sandbox.ran() == []
        and [line[0] for line in listed] == sorted(line[0] for line in listed)
        and {line[0] for line in listed} == {"1", "2", "3"}
    )
    for line in listed[:3]:  # in any order within a level, on any machine that shares the folder
        done = subprocess.run(
            ["bash", "-c", line[2:]],
            cwd=sandbox.folder,
            env={**os.environ, "PYTHON": os.sys.executable},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    assert [line.partition("--step ")[2] for line in listed[:3]] == sandbox.ran()
    remaining = sandbox("--list", "lazy").stdout.splitlines()
    assert [line.partition(" ")[2] for line in remaining] == [
        line.partition(" ")[2] for line in listed[3:]
    ] and remaining[0][0] == "1"


@pytest.mark.slow
def test_quick_makes_a_report_from_real_mnist():
    assert shell(QUICK="1").returncode == 0
    report = (ROOT / "results" / "quick" / "report.md").read_text()
    assert "![Learning curves]" in report
    assert (
        json.loads((ROOT / "results" / "quick" / "baseline_s42.json").read_text())["args"]["epochs"]
        == 2
    )
