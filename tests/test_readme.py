"""README.md and results/report.md: commands parse, links lead on, recipes work, no stale number."""

import importlib
import json
import re
import textwrap

import pytest
import torch
from conftest import ROOT

import common
import train

README = (ROOT / "README.md").read_text(encoding="utf-8")
REPORT = (ROOT / "results" / "report.md").read_text(encoding="utf-8")
PAGES = {"README.md": README, "results/report.md": REPORT}
COMMANDS = sorted(set(re.findall(r"^    python (\w+\.py.*)$", README, re.M)))
SETTINGS = {"3.11", "0.001", "0.05", "0.9"}  # decimals of the prose that nobody measured
QUERY = re.compile(r"<!-- .*?-->", re.S)


def recipe(start):
    """The indented block of README.md that begins with this line."""
    found = re.search(rf"\n(    {re.escape(start)}.*\n(?:(?:    .*)?\n)+)", README)
    return textwrap.dedent(found[1])


def prose(page):
    """A page without queries, tables, code and the addresses of its links."""
    page = re.sub(r"(?m)^(    .*|\|.*)$", "", QUERY.sub("", page))
    return re.sub(r"`[^`]*`|\]\([^)]*\)", " ", page)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command, tmp_path, monkeypatch):
    (tmp_path / "fashion").mkdir()
    (tmp_path / "mixed.py").write_text("class Mixed(Baseline): pass")
    monkeypatch.chdir(tmp_path)
    script, *flags = command.split()
    importlib.import_module(script.removesuffix(".py")).get_args(flags)


def test_no_command_writes_over_committed_results():
    for command in COMMANDS:
        assert "--dir demo" in command or "--image" in command, command


def test_the_quick_start_looks_at_the_models_it_trained():
    quick = [c for c in COMMANDS if c.startswith("train.py") and "mixed" not in c and "lr" in c]
    trained = [train.get_args(c.split()[1:]).name for c in quick]
    (looked,) = (c for c in COMMANDS if c.startswith("gradcam.py") and "hirescam" in c)
    assert len(trained) == 2 and all(name in looked.split() for name in trained)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files(name):
    folder = (ROOT / name).parent
    for target in set(re.findall(r"\]\(([^)#]+)\)", PAGES[name])):
        assert target.startswith("http") or (folder / target).exists(), target


@pytest.mark.parametrize("name", PAGES)
def test_every_table_of_results_stands_below_its_query(name):
    parts = re.split(r"<!-- table\n.*?-->\n.*?<!-- end -->", PAGES[name], flags=re.S)
    assert not [part for part in parts if re.search(r"\| \d\.\d{3}", part)]


@pytest.mark.parametrize("name", PAGES)
def test_no_measured_number_stands_outside_the_tables(name):
    text = prose(PAGES[name])
    stale = set(re.findall(r"(?<![\w.])\d*\.\d+", text)) - SETTINGS
    stale |= set(re.findall(r"[\d.]+ ?%", text)) - {"95 %"}
    assert not stale


def test_every_figure_has_a_caption():
    lines = [line for line in REPORT.splitlines() if line]
    for line, below in zip(lines, lines[1:], strict=False):
        if line.startswith("!["):
            assert re.fullmatch(r"\*.+\*", below), line


def test_the_stages_are_those_of_run_all():
    runner = (ROOT / "run_all.sh").read_text(encoding="utf-8")
    stages = re.search(r'STAGES="(.*)"', runner)[1].split()
    assert re.findall(r"(?m)^\| `(\w+)` \| \d+ \|", README) == stages


def test_every_method_that_readme_lists_is_there():
    table = README.partition("| method | in one line |")[2].partition("## ")[0]
    assert set(re.findall(r"(?m)^\| \[?`(\w+)`", table)) <= set(train.METHODS)


def test_readme_and_ci_use_the_same_test_command():
    command = "bash run_all.sh test"
    assert command in README and command in (ROOT / ".ci" / "run").read_text()


def test_the_recipe_for_a_method_is_complete(tiny, tmp_path, call):
    (tmp_path / "mixed.py").write_text(recipe("class Mixed"), encoding="utf-8")
    tiny(tmp_path / "demo")
    call("train.py --dir demo --method mixed.py --epochs 1")
    record = json.loads((tmp_path / "demo" / "mixed_epochs1_s42.json").read_text())
    assert record["args"]["method"] == "mixed" and record["knows"] == "nothing"
    call("train.py --dir demo --report")
    assert "`mixed_epochs1`" in (tmp_path / "demo" / "tables.md").read_text(encoding="utf-8")


def test_a_method_file_that_cannot_be_meant_gets_one_line(tmp_path, mistake):
    (tmp_path / "jitter.py").write_text("class Jitter2(Jitter): pass")
    (tmp_path / "empty.py").write_text("x = 1")
    mistake("train.py --method jitter.py", "is named like a method of ours")
    mistake("train.py --method empty.py", "has no class of a Method")
    mistake("train.py --method nowhere.py", "there is no 'nowhere.py'")


def test_the_recipe_for_an_own_checkpoint_works(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    exec(recipe("import torch, common").replace("resnet18", "simplecnn"), {})  # faster
    model, record = common.load_model(tmp_path, str(tmp_path / "demo" / "mine_s42.pt"))
    assert model(torch.rand(2, 3, 28, 28)).shape == (2, 10)
    assert record["args"]["method"] == "mine"


def test_the_recipe_for_an_attack_from_python_works(tiny, tmp_path, monkeypatch, capsys):
    tiny(tmp_path / "demo")
    args = {"model": "simplecnn", "width": 4}
    record = {"weights": common.build_model().state_dict(), "args": args}
    record |= {"classes": 10, "size": [28, 28]}
    common.save_pt(record, tmp_path / "results" / "baseline_s42.pt")
    monkeypatch.chdir(tmp_path)
    exec(recipe("from pathlib import Path"), {})
    said = capsys.readouterr().out
    assert re.fullmatch(r"\d+ of 100 are right before\n\d+ of 100 are right after\n", said)
