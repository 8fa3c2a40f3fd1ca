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
        told = train.METHODS[method].told if method in train.METHODS else "no bias in training"
        rows.append([f"`{label}`", told, *(train.over_seeds(group, "final", split, "acc") for split in ("val", "test_hard")),
                     f"{train.PUBLISHED[method][1]:.3f}" if method in train.PUBLISHED else "-", train.over_seeds(group, "final", "test_hard", "follows_colour")])
    return markdown(["method", "told", "val", "test_hard", "published", "follows colour"], rows)


def test_the_headline_table_is_the_measured_one():
    shown = re.search(r"<!-- headline.*?-->\n(.*?)<!-- end -->", README, re.S)[1]
    assert shown.strip() == headline().strip(), f"paste this between the marks in README.md:\n\n{headline()}"


def biased():
    """The table of Biased-MNIST: our rows, and the best published figure of each column."""
    worlds, published = train.sweep_runs(ROOT / "results", "flat"), train.SWEEPS["flat"].published.values()
    rows = [[f"`{label}`", train.METHODS[label.split()[0]].told, *(train.over_seeds(runs.get(label, []), "final", "test_unbiased", "acc") for runs in worlds.values())]
            for label in next(iter(worlds.values()))]
    best = [max((row[value] for row in published if value in row), default=None) for value in worlds]
    return markdown(["method", "told", *(f"{value:g}" for value in worlds)], [*rows, ["best published", "", *(f"{v:.3f}" if v else "-" for v in best)]])


def test_the_table_of_biased_mnist_is_the_measured_one():
    shown = re.search(r"<!-- biased.*?-->\n(.*?)<!-- end -->", README, re.S)[1]
    assert shown.strip() == biased().strip(), f"paste this between the marks in README.md:\n\n{biased()}"


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
