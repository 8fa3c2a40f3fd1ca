"""The README tells the truth: its headline table equals results/*.json, its commands parse, its files exist."""

import argparse
import importlib
import re
import textwrap

import pytest
import torch

import attack
import common
import train
from common import markdown

from conftest import ROOT

README = (ROOT / "README.md").read_text()


def headline():
    """The table as the committed results have it."""
    runs = train.read_runs(ROOT / "results")
    runs = {
        label: group
        for label, group in runs.items()
        if label in (*train.METHODS, *train.AS_PUBLISHED)
    }
    runs["oracle"] = train.read_runs(ROOT / "results" / "unbiased")["baseline"]
    rows = []
    for label, group in runs.items():
        method = label.split()[0]
        rows.append(
            [
                f"`{label}`",
                train.told_of(label),
                *(train.over_seeds(group, "final", split, "acc") for split in ("val", "test_hard")),
                f"{train.PUBLISHED[method][1]:.3f}" if method in train.PUBLISHED else "-",
                train.over_seeds(group, "final", "test_hard", "follows_colour"),
            ]
        )
    return markdown(["method", "told", "val", "test_hard", "published", "follows colour"], rows)


def test_the_headline_table_is_the_measured_one():
    shown = re.search(r"<!-- headline.*?-->\n(.*?)<!-- end -->", README, re.S)[1]
    assert shown.strip() == headline().strip(), (
        f"paste this between the marks in README.md:\n\n{headline()}"
    )


def beside():
    """Our rows beside the best published ones, question by question."""
    results, rows = ROOT / "results", []
    for recipe, value, label in (
        ("flat", 0.999, "jitter --grain 0.0"),
        ("flat", 0.99, "jitter --grain 0.0"),
        ("digit", 0.02, "jitter --grain 0.0"),
        ("digit", 0.02, "lntl --entropy 20.0 --model saturatedcnn"),
    ):
        kin = {
            name: row
            for name, row in train.SWEEPS[recipe].published.items()
            if label.split()[0] != "lntl" or name.startswith("LNTL")
        }
        rows.append(
            [
                f"{train.SWEEPS[recipe].title}, {train.SWEEPS[recipe].key} {value:g}: accuracy on `test_unbiased`",
                f"`{label}`",
                train.over_seeds(
                    train.sweep_runs(results, recipe)[value][label], "final", "test_unbiased", "acc"
                ),
                "{1}: {0:.3f}".format(
                    *max((row[value], name) for name, row in kin.items() if value in row)
                ),
            ]
        )
    for question, where, name in (
        (
            "Plain MNIST, L-inf 0.3: clean, under PGD, worst of all attacks",
            "mnist/attack_untargeted.json",
            "at_s42",
        ),
        ("The same at 0.1, a ResNet-50", "mnist/attack_resnet.json", "resnet50_s42"),
        (
            "Unbiased and robust at once, `test_hard`, L-inf 0.05",
            "attack_at.json",
            "at_balanced_s42",
        ),
    ):
        record = common.load_json(results / where, "")
        m, theirs = (
            record["models"][name],
            attack.PUBLISHED.get(record["args"]["eps"], {}) if "mnist" in where else {},
        )
        told = lambda row: ", ".join(
            f"{row[key]:.3f}" if key in row else "-" for key in ("clean", "PGD", "robust")
        )
        ours = {
            "clean": m["attacks"]["clean"]["rate"],
            "PGD": m["attacks"]["PGD"]["own"]["rate"],
            "robust": m["robust"]["rate"],
        }
        rows.append(
            [
                question,
                f"`{name}`, n = {record['n']:,}",
                told(ours),
                "; ".join(f"{row}: {told(theirs[row])}" for row in theirs) or "-",
            ]
        )
    runs = {
        common.family_of(runs[0]["name"])[0]: runs
        for runs in train.read_runs(results / "mnist").values()
    }["robgan"]
    told = lambda source: ", ".join(
        train.over_seeds(runs, "generator", "measured", source, key)
        for key in ("agreement", "diversity", "trained_on")
    )
    rows.append(
        [
            "Rob-GAN's samples: label agreement, diversity within a class (real: 1), accuracy on real images of a classifier trained on them alone",
            "`robgan`",
            told("generated"),
            f"real images: {told('real')}; a collapsed generator: {told('collapsed')}",
        ]
    )
    return markdown(["question", "our row", "ours", "beside"], rows)


def test_the_figures_beside_published_ones_are_the_measured_ones():
    shown = re.search(r"<!-- beside.*?-->\n(.*?)<!-- end -->", README, re.S)[1]
    assert shown.strip() == beside().strip(), (
        f"paste this between the marks in README.md:\n\n{beside()}"
    )


@pytest.mark.parametrize(
    "command", sorted(set(re.findall(r"python (\w+\.py(?: [^`&#\n|]*)?)", README)))
)
def test_commands_of_the_readme_parse(command, tmp_path, monkeypatch):
    (tmp_path / "fashion").mkdir()
    monkeypatch.chdir(tmp_path)
    script, *flags = command.split()
    if "brier" not in command and "DIR" not in command:
        importlib.import_module(script.removesuffix(".py")).get_args(flags)


def test_files_that_the_readme_shows_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_readme_and_ci_use_the_same_test_command():
    assert (
        "bash run_all.sh test" in README
        and "bash run_all.sh test" in (ROOT / ".ci" / "run").read_text()
    )


def test_the_recipe_for_an_own_checkpoint_works(tiny, call, tmp_path):
    tiny(tmp_path / "results")
    call("train.py --epochs 1")
    recipe = re.search(r"\n(    import torch, common\n(?:    .*\n)+)", README)[1]
    exec(textwrap.dedent(recipe).replace("resnet18", "simplecnn"), {})  # the smaller net, for speed
    for command in re.findall(r"`python (\w+\.py --models baseline_s42 mine_s42)`", README):
        call(command)
    assert {"gradcam.json", "attack_7to3.json"} <= {
        path.name for path in (tmp_path / "results").iterdir()
    }


def test_the_recipe_for_a_method_is_complete():
    recipe = textwrap.dedent(re.search(r"\n(    def brier\(.*\n(?:    .*\n)+)", README)[1])
    found = {}
    exec(recipe, vars(train).copy(), found)
    model, x, y = common.build_model(), torch.rand(4, 3, 28, 28), torch.tensor([0, 1, 2, 3])
    loss = found["brier"](model, argparse.Namespace(x=x, y=y), None, None)
    p = model(x).softmax(1).double()
    by_hand = (
        sum((p[i, k].item() - (k == y[i].item())) ** 2 for i in range(4) for k in range(10)) / 4
    )
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
