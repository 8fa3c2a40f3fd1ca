"""One model in two processes: the same losses as in one, one voice, one set of files."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

import train


@pytest.fixture
def together(tmp_path):
    """Run train.py in two processes, as a user does; returns the finished torchrun."""

    def call(flags):
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        return subprocess.run(
            [sys.executable, *torchrun, str(ROOT / "train.py"), *flags.split()],
            cwd=tmp_path,
            text=True,
            capture_output=True,
            timeout=120,
        )

    return call


@pytest.mark.slow  # two more starts of torch beside torchrun's own
def test_two_processes_learn_what_one_learns(tiny, call, together, tmp_path):
    tiny(tmp_path / "results", n=201)  # in batches of 50 the last one has 51, a share 26 or 25
    flags = "--epochs 3 --batch 50 --schedule onecycle --name"
    call(f"train.py {flags} one")
    before = {p.name for p in (tmp_path / "results").iterdir()}
    done = together(f"{flags} two")
    assert done.returncode == 0, done.stderr
    read = {name: (tmp_path / f"results/{name}_s42.json").read_text() for name in ("one", "two")}
    one, two = json.loads(read["one"]), json.loads(read["two"])
    losses = [e["loss"] for e in one["epochs"]]
    assert [e["loss"] for e in two["epochs"]] == pytest.approx(losses, abs=1e-5)
    assert two["final"]["val"]["acc"] == pytest.approx(one["final"]["val"]["acc"], abs=0.02)
    assert (one["run"]["processes"], two["run"]["processes"]) == (1, 2)
    assert one["args"] == two["args"]
    assert {p.name for p in (tmp_path / "results").iterdir()} - before == {
        "two_s42.pt",
        "two_s42.json",
    }
    for line in ("epoch  2/3", "wrote "):
        assert done.stdout.count(line) == 1, "the first process speaks for all"


def test_a_method_that_needs_whole_batches_is_refused_in_one_line(tiny, mistake, monkeypatch):
    monkeypatch.setattr(train, "PROCESSES", 2)
    for method in ("lff", "jtt", "lntl", "groupdro"):
        mistake(f"train.py --method {method}", f"--method {method} needs whole batches")


def test_variables_that_are_not_torchruns_change_nothing(cli):
    env = {k: v for k, v in os.environ.items() if k != "TORCHELASTIC_RUN_ID"}
    done = cli("train.py --dir nowhere", check=False, env=env | {"RANK": "x", "WORLD_SIZE": "2"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "nowhere/train.pt is missing" in done.stderr
