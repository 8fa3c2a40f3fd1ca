"""The README tells the truth: its headline table equals results/*.json, its commands parse, its files exist."""

import importlib
import re

import pytest

import train
from common import markdown

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def headline():
    """The table as the committed results have it."""
    runs = train.read_runs(ROOT / "results")
    runs = {label: group for label, group in runs.items() if label in (*train.METHODS, *train.AS_PUBLISHED)}
    runs["oracle"] = train.read_runs(ROOT / "results" / "unbiased")["baseline"]
    rows = []
    for label, group in runs.items():
        method = label.split()[0]
        rows.append([f"`{label}`", train.told_of(label), *(train.over_seeds(group, "final", split, "acc") for split in ("val", "test_hard")),
                     f"{train.PUBLISHED[method][1]:.3f}" if method in train.PUBLISHED else "-", train.over_seeds(group, "final", "test_hard", "follows_colour")])
    return markdown(["method", "told", "val", "test_hard", "published", "follows colour"], rows)


def test_the_headline_table_is_the_measured_one():
    shown = re.search(r"<!-- headline.*?-->\n(.*?)<!-- end -->", README, re.S)[1]
    assert shown.strip() == headline().strip(), f"paste this between the marks in README.md:\n\n{headline()}"


def sweep(recipe):
    """The table of a sweep of worlds: our rows, and the best published figure of each column."""
    worlds, published = train.sweep_runs(ROOT / "results", recipe), train.SWEEPS[recipe].published.values()
    best = [max((row[value] for row in published if value in row), default=None) for value in worlds]
    return markdown(["method", "told", *(f"{value:g}" for value in worlds)], [
        *train.sweep_rows(worlds, worlds, "final", "test_unbiased", "acc"), ["best published", "", *(f"{v:.3f}" if v else "-" for v in best)]])


@pytest.mark.parametrize("recipe", train.SWEEPS)
def test_the_table_of_a_sweep_is_the_measured_one(recipe):
    shown = re.search(rf"<!-- {recipe}.*?-->\n(.*?)<!-- end -->", README, re.S)[1]
    assert shown.strip() == sweep(recipe).strip(), f"paste this between the marks in README.md:\n\n{sweep(recipe)}"


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python (\w+\.py(?: [^`&#\n|]*)?)", README))))
def test_commands_of_the_readme_parse(command):
    script, *flags = command.split()
    if "brier" not in command and "DIR" not in command:
        importlib.import_module(script.removesuffix(".py")).get_args(flags)


def test_files_that_the_readme_shows_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_readme_and_ci_use_the_same_test_command():
    assert "bash run_all.sh test" in README and "bash run_all.sh test" in (ROOT / ".ci" / "run").read_text()
