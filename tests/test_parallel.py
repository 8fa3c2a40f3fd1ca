"""One model in several processes: the same losses as in one, one voice, one set of files, and a clear no where a method cannot."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

import common
import train

from conftest import ROOT


@pytest.fixture
def together(tmp_path):
    """Run train.py in several processes, as a user does; returns the finished torchrun."""

    def call(flags, processes=2, script="train.py", **kwargs):
        torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
        ]
        return subprocess.run(
            [*torchrun, str(ROOT / script), *flags.split()],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            timeout=120,
            **kwargs,
        )

    return call


def test_two_processes_learn_what_one_learns(tiny, call, together, tmp_path):
    tiny(
        tmp_path / "results", n=201
    )  # in batches of 50 the last has one image, which joins the one before; shares differ
    call("train.py --epochs 3 --batch 50 --schedule onecycle --name one")
    before = {p.name for p in (tmp_path / "results").iterdir()}
    done = together("--epochs 3 --batch 50 --schedule onecycle --name two")
    assert done.returncode == 0, done.stderr
    one, two = (
        json.loads((tmp_path / "results" / f"{name}.json").read_text()) for name in ("one", "two")
    )
    assert [e["loss"] for e in two["epochs"]] == pytest.approx(
        [e["loss"] for e in one["epochs"]], abs=1e-5
    )
    assert two["final"]["val"]["acc"] == pytest.approx(one["final"]["val"]["acc"], abs=0.02)
    assert (one["run"]["processes"], two["run"]["processes"]) == (1, 2) and one["args"] == two[
        "args"
    ]
    assert {p.name for p in (tmp_path / "results").iterdir()} - before == {"two.pt", "two.json"}
    assert [done.stdout.count(line) for line in ("epoch  2/3", "wrote ", "method=baseline")] == [
        1,
        1,
        1,
    ], "the first process speaks for all"


def test_a_batch_is_shared_out_whole_and_its_weights_add_up(monkeypatch):
    for n, processes in ((128, 1), (128, 3), (5, 2), (2, 4)):
        monkeypatch.setattr(train, "WORLD", processes)
        parts = []
        for rank in range(processes):
            monkeypatch.setattr(train, "RANK", rank)
            parts.append(train.share(torch.arange(10, 10 + n)))
        assert torch.cat([index for index, weight in parts if weight > 0]).tolist() == list(
            range(10, 10 + n)
        )
        assert sum(weight for _, weight in parts) == pytest.approx(1) and all(
            len(index) > 0 for index, _ in parts
        )


def test_what_cannot_be_shared_is_refused_in_one_line(tiny, mistake, tmp_path, monkeypatch):
    tiny(tmp_path / "results")
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(train.dist, "init_process_group", lambda *_, **__: None)
    for method in ("lff", "jtt", "lntl", "groupdro", "robgan"):
        mistake(
            f"train.py --method {method}", f"--method {method} needs whole batches in one process"
        )
    mistake(
        "train.py --model resnet18 --batch 66", "too few for batch norm"
    )  # 200 images leave 2, one for each process


def test_variables_that_are_not_torchruns_change_nothing(cli):
    env = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"} | {
        "RANK": "x",
        "WORLD_SIZE": "2",
    }
    done = cli("train.py --dir nowhere", check=False, env=env)
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "nowhere/train.pt is missing" in done.stderr
    )


def test_a_run_of_two_processes_is_continued_by_two(tiny, call, mistake, tmp_path, monkeypatch):
    tiny(tmp_path / "results", n=100)
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(train, "evaluate", lambda *_: {}["stop"])
        call("train.py --epochs 1")
    part = tmp_path / "results" / "baseline_s42.part.pt"
    common.save_pt({**common.load_pt(part, ""), "processes": 2}, part)
    mistake("train.py --epochs 1 --resume", "a run of 2 processes")


@pytest.mark.slow
def test_a_mistake_is_named_once_and_nobody_waits(tiny, together, tmp_path):
    tiny(tmp_path / "results")
    done = together("--method groupdro")
    assert (
        done.returncode != 0
        and done.stderr.count("needs whole batches in one process") == 1
        and not list((tmp_path / "results").glob("groupdro*"))
    )


@pytest.mark.slow
def test_every_method_that_can_be_shared_learns_about_the_same(tiny, call, together, tmp_path):
    """Their draws differ by process, so that losses agree on average only; where nothing is drawn they are equal."""
    tiny(tmp_path / "results", n=600)
    for method in (name for name, method in train.METHODS.items() if method.spreads):
        call(f"train.py --method {method} --epochs 2 --steps 1 --clip-grad 0.5 --name one")
        assert (
            together(
                f"--method {method} --epochs 2 --steps 1 --clip-grad 0.5 --name two", processes=3
            ).returncode
            == 0
        )
        one, two = (
            json.loads((tmp_path / "results" / f"{name}.json").read_text())["epochs"]
            for name in ("one", "two")
        )
        tolerance = 1e-5 if method in ("baseline", "biasbal", "grl") else 0.2
        assert [e["loss"] for e in two] == pytest.approx([e["loss"] for e in one], abs=tolerance), (
            method
        )


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_the_run_resumes(tiny, together, tmp_path):
    tiny(tmp_path / "results")
    code = (
        "import os, train; save = train.save_pt; "
        "train.save_pt = lambda record, path: (save(record, path), len(record.get('epochs', ())) == 2 and os.kill(os.getpid(), 9)); "
        "train.main(['--epochs', '4', '--name', 'two'])"
    )
    (tmp_path / "broken.py").write_text(code)
    began = time.time()
    done = together("", script=tmp_path / "broken.py", env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert (
        done.returncode != 0
        and time.time() - began < 60
        and (tmp_path / "results" / "two.part.pt").exists()
    )
    assert "continuing after epoch 2" in together("--epochs 4 --name two --resume").stdout
    together("--epochs 4 --name whole")
    two, whole = (
        common.load_pt(tmp_path / "results" / f"{name}.pt", "")["weights"]
        for name in ("two", "whole")
    )
    assert all(torch.equal(two[key], whole[key]) for key in whole)
