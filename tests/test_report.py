"""The report: tables, figures and summary.csv from records made by hand, with known answers."""

import argparse
import csv
import json

import matplotlib.pyplot as plt
import pytest

import train

WORLD = {"recipe": "background", "corr": 0.95, "limit": None, "is_mnist": True, "seed": 42}
PUBLISHED = json.loads((train.ROOT / "results" / "published.json").read_text())
USUAL = {k: v for k, v in vars(train.get_args([])).items() if k not in train.NOT_SETTINGS}
USUAL["epochs"] = 2


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def score(acc, answers=(50, 50), colours=True):
    """What a split's score looks like; two classes, the answers given to 100 images."""
    confusion = [[answers[0], 0], [0, answers[1]]]
    group = {"acc": acc / 2, "n": 7, "digit": 1, "colour": 0}
    return {
        "acc": acc,
        "n": 100,
        "worst_digit": acc - 0.1,
        "confusion": confusion,
        "worst_group": group if colours else None,
        "follows_colour": (1 - acc) / 2 if colours else None,
    }


def record(name, method, seed, hard=0.5, val=0.9, seconds=10.0, world=WORLD, **more):
    colours, answers = more.pop("colours", True), more.pop("answers", (50, 50))
    epochs = more.pop("epochs_record", None) or [
        {"epoch": i, "loss": 1.0, "val": val, "test_hard": hard} for i in (1, 2)
    ]
    args = {**USUAL, "method": method, "seed": seed, **more.pop("args", {})}
    return {
        "schema": 1,
        "script": "train.py",
        "name": name,
        "args": args,
        "world": world,
        "params": 4486,
        "knows": train.knows(argparse.Namespace(**{**args, "name": name})),
        "selected_epoch": len(epochs),
        "final": {
            "val": score(val, answers, colours),
            "test_hard": score(hard, colours=colours),
            "test_unbiased": score(hard + 0.02, colours=colours),
        },
        "probe": {"colour": 0.8 if colours else None, "digit": 0.7, "n": 50},
        "epochs": epochs,
        "run": {"seconds": seconds},
        **more,
    }


def put(folder, *records, world=WORLD):
    folder.mkdir(parents=True, exist_ok=True)
    if world:
        (folder / "meta.json").write_text(json.dumps(world))
    for r in records:
        (folder / f"{r['name']}.json").write_text(json.dumps(r))


def rows_of(folder):
    return train.with_oracle(train.read_worlds(folder))


def cells(markdown):
    """{first cell: the others} of a table."""
    lines = [line.strip("| \n").split(" | ") for line in markdown.splitlines()]
    return {line[0]: line[1:] for line in lines}


def report(folder):
    train.report(train.get_args(["--dir", str(folder)]))


def test_a_world_inside_is_enough_for_a_report(tmp_path, capsys):
    put(tmp_path / "mnist", record("judge_s42", "baseline", 42, colours=False))
    report(tmp_path)
    assert "1 runs in" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        report(tmp_path / "mnist" / "nothing")


def test_rows_are_names_without_their_seed(tmp_path):
    put(
        tmp_path,
        record("jitter_s100", "jitter", 100),
        record("jitter_s42", "jitter", 42),
        record("jitter_hsv_s42", "jitter", 42),
        record("baseline_s100", "baseline", 100),
    )
    rows = train.read_runs(tmp_path)
    found = {row: [r["args"]["seed"] for r in runs] for row, runs in rows.items()}
    assert found == {"baseline": [100], "jitter": [42, 100], "jitter_hsv": [42]}
    assert list(rows) == ["baseline", "jitter", "jitter_hsv"]  # in the order of METHODS


def test_a_run_on_another_painting_is_left_out_with_one_line(tmp_path, capsys):
    other = record("lff_s1", "lff", 1, world={**WORLD, "seed": 7})
    put(tmp_path, record("jtt_s1", "jtt", 1), other)
    assert list(train.read_runs(tmp_path)) == ["jtt"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "lff_s1.json" in said and "another painting" in said


@pytest.mark.parametrize("text", ["{", "[1]", '{"script": "train.py", "name": "x_s1"}'])
def test_a_broken_result_dies_with_one_line(tmp_path, capsys, text):
    put(tmp_path, record("jtt_s1", "jtt", 1))
    (tmp_path / "x_s1.json").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        report(tmp_path)
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and "x_s1.json" in said


def test_an_empty_folder_dies_with_one_line(tmp_path, capsys):
    put(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        report(tmp_path)
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_the_oracle_comes_from_the_unbiased_world(tmp_path):
    put(tmp_path, record("baseline_s1", "baseline", 1))
    put(
        tmp_path / "unbiased",
        record("oracle_s1", "baseline", 1, hard=0.93),
        record("jitter_s1", "jitter", 1),
    )
    rows = rows_of(tmp_path)
    assert list(rows) == ["baseline", "oracle"]
    summary = cells(train.table(rows, train.SUMMARY, ("val", "test_hard")))
    assert summary["`oracle`"] == ["no bias in training", "0.900", "0.930"]


@pytest.mark.parametrize(
    ("val", "answers", "trained"),
    [
        (0.59, (50, 50), False),  # of two classes, so chance is a half
        (0.6, (50, 50), True),
        (0.9, (91, 9), False),
        (0.9, (9, 91), False),
        (0.9, (90, 10), True),
    ],
)
def test_who_did_not_train(val, answers, trained):
    assert train.trained(record("jtt_s1", "jtt", 1, val=val, answers=answers)) is trained


def test_one_answer_is_counted_over_predictions_not_digits():
    r = record("jtt_s1", "jtt", 1)
    r["final"]["val"]["confusion"] = [[48, 47], [0, 5]]  # 95 images of digit 0, 52 answers 1
    assert train.trained(r)
    r["final"]["val"]["confusion"] = [[48, 0], [47, 5]]  # 95 answers 0
    assert not train.trained(r)


def test_what_did_not_train_is_marked():
    good, bad = record("jtt_s1", "jtt", 1), record("jtt_s2", "jtt", 2, val=0.1)
    assert train.note([good]) == ""
    assert train.note([bad]) == " (did not train)"
    assert train.note([good, bad]) == " (1 of 2 did not train)"
    assert "`jtt` (1 of 2 did not train)" in train.table({"jtt": [good, bad]}, ["jtt"], ())


def test_differences_are_over_the_seeds_that_both_have():
    runs = [record(f"jitter_hsv_s{s}", "jitter", s, hard=h) for s, h in ((42, 0.6), (44, 0.8))]
    others = [
        record(f"jitter_s{s}", "jitter", s, hard=h) for s, h in ((42, 0.5), (43, 0.1), (44, 0.6))
    ]
    assert train.differences(runs, others, "test_hard") == pytest.approx([0.1, 0.2])
    others[2]["final"]["val"]["acc"] = 0.1  # did not train: no comparison
    assert train.differences(runs, others, "test_hard") == pytest.approx([0.1])
    runs[0]["final"]["val"]["acc"] = 0.1
    assert train.differences(runs, others, "test_hard") == []


def test_parts_change_one_flag_of_the_cure():
    def one(name, hard, **args):
        return [record(f"{name}_s42", "jitter", 42, hard=hard, args=args)]

    rows = {
        "jitter": [record(f"jitter_s{s}", "jitter", s, hard=h) for s, h in ((42, 0.9), (43, 0.1))],
        "jitter_hsv": one("jitter_hsv", 0.6, jitter="hsv"),
        "jitter_alpha1": one("jitter_alpha1", 0.91, alpha=1.0),
        "jitter_alpha1_hsv": one("jitter_alpha1_hsv", 0.5, alpha=1.0, jitter="hsv"),
        "jitter_width16": one("jitter_width16", 0.95, width=16),
        "combined_alpha1": [record("combined_alpha1_s42", "combined", 42, args={"alpha": 1.0})],
    }
    table = cells(train.parts_table(rows))
    assert list(table)[2:] == ["`jitter_alpha1`", "`jitter_hsv`"]  # the best first
    assert table["`jitter_alpha1`"] == ["0.910", "+0.010", "1"]
    assert table["`jitter_hsv`"] == ["0.600", "-0.300", "1"]


def test_the_table_of_cures(tmp_path):
    runs = [record(f"baseline_s{s}", "baseline", s, val=0.9 + s / 100) for s in (1, 2, 3)]
    jitter = [
        record("jitter_s1", "jitter", 1, hard=0.8, val=0.92),
        record("jitter_s2", "jitter", 2, hard=0.9, val=0.94),
    ]
    put(tmp_path, *runs, *jitter, record("jitter_hsv_s1", "jitter", 1))
    table = cells(train.cures_table(rows_of(tmp_path)))
    assert list(table)[2:] == ["`baseline`", "`jitter`"]  # other settings are no methods
    assert table["`jitter`"] == [
        "the kind of bias",
        "0.930 ± 0.014 (2)",
        "0.850 ± 0.071 (2)",
        "0.750 ± 0.071 (2)",
        "0.075 ± 0.035 (2)",
        "0.800 ± 0.000 (2)",
        "+0.015",  # .01 of seed 1 and .02 of seed 2; baseline's third seed does not count
    ]


def test_published_recipes_stand_beside_the_published_figures():
    published = PUBLISHED["lazy_artist"]
    rows = {
        "jitter": [record("jitter_s1", "jitter", 1)],
        "jitter_hsv_image_nofade": [record("jitter_hsv_image_nofade_s1", "jitter", 1, hard=0.61)],
    }
    table = cells(train.lazy_artist_table(rows, published))
    assert list(table)[2:] == ["`jitter_hsv_image_nofade`"]  # never beside our changed recipe
    assert table["`jitter_hsv_image_nofade`"] == ["0.900", "0.960", "0.610", "0.613"]
    small = {
        row: [{**run, "world": {**WORLD, "limit": 6000}} for run in runs]
        for row, runs in rows.items()
    }
    assert train.lazy_artist_table(small, published) is None


def test_a_sweep_puts_each_world_in_its_column(tmp_path):
    flat = {**WORLD, "recipe": "flat"}  # the headline world is no part of the sweep
    put(tmp_path, record("baseline_s1", "baseline", 1, world=flat), world=flat)
    for corr, hard, val in ((0.99, 0.7, 0.9), (0.999, 0.1, 0.1)):
        world = {**WORLD, "recipe": "flat", "corr": corr}
        runs = [record("biasbal_s1", "biasbal", 1, hard=hard, val=val, world=world)]
        runs += [record("lff_s1", "lff", 1, hard=0.4, world=world)] if corr == 0.99 else []
        put(tmp_path / f"flat_{corr}", *runs, world=world)
    world = {**world, "seed": 7}  # another painting with the same number: more runs of its rows
    more = [record(f"biasbal_s{s}", "biasbal", s, hard=0.1, val=0.1, world=world) for s in (1, 2)]
    put(tmp_path / "flat_again", *more, world=world)
    put(tmp_path / "quick", record("jtt_s1", "jtt", 1))  # another chain's
    published = [
        {"row": "A", "knows": "nothing", "how": "read", "accuracy": {"0.99": 0.5, "0.995": 0.25}},
        {"row": "B", "knows": "colour labels", "how": "as reported", "accuracy": {"0.999": 0.75}},
    ]
    worlds = train.read_worlds(tmp_path)
    assert "quick" not in worlds
    sweep, ours = train.SWEEPS["flat"], train.sweep_rows(worlds, "flat")
    table = cells(train.sweep_table(sweep, ours, published))
    assert table == {
        "method": ["knows", "0.999", "0.995", "0.99"],  # the hardest first
        "---": ["---"] * 4,
        "`lff`": ["nothing", "-", "-", "0.420"],
        "`biasbal`": ["colour labels", "0.120 ± 0.000 (3) (did not train)", "-", "0.720"],
        "A": ["nothing", "-", "0.250", "0.500"],
        "B, as reported": ["colour labels", "0.750", "-", "-"],
    }
    assert train.sweep_values(train.SWEEPS["digit"], {}, published) == [0.99, 0.995, 0.999]
    assert train.sweep_table(sweep, {}, published) is None
    _, values, lines, theirs = train.sweep_lines(sweep, ours, published)
    assert values == [0.999, 0.995, 0.99] and theirs["A"] == {0.99: 0.5, 0.995: 0.25}
    colour = train.INK["biasbal"]  # lff stands in one world of two, so it is in the table only
    low = pytest.approx((0.72, 0.72, 0.72))
    assert lines == {"biasbal": (colour, {0.99: low}, {0.999: pytest.approx(0.12)})}


def test_published_figures_are_complete():
    rows = [row for sweep in train.SWEEPS.values() for row in PUBLISHED[sweep.published]]
    assert len(rows) == 25 and len(PUBLISHED["robust_mnist"]["0.3"]) == 4
    rows += PUBLISHED["lazy_artist"]["rows"]
    for eps in PUBLISHED["robust_mnist"].values():
        rows += eps
    for row in rows:
        numbers = [*row.values(), *row.get("accuracy", {}).values()]
        assert all(0 < v < 1 for v in numbers if isinstance(v, float)), row
        assert row["how"] in ("read", "as reported") and row["source"], row


def robust_record(name, seed, val_pgd, kept):
    epochs = [
        {"epoch": i + 1, "val": 0.9, "test_hard": 0.5, "val_pgd": v, "loss": 1.0}
        for i, v in enumerate(val_pgd)
    ]
    return record(name, "at", seed, epochs_record=epochs) | {"selected_epoch": kept}


def test_adversarial_training_shows_the_epoch_that_was_kept(tmp_path):
    clean = robust_record("at_clean_s1", 1, (0.1, 0.2), 1)
    clean["args"]["phase"] = "clean"
    put(tmp_path, robust_record("at_s1", 1, (0.1, 0.7, 0.3), 2), clean)
    plain = {**WORLD, "recipe": "gray"}
    put(
        tmp_path / "mnist",
        *(
            {**robust_record(f"at_s{s}", s, (v, 0.0), 1), "world": plain}
            for s, v in ((1, 0.8), (2, 0.6))
        ),
        world=plain,
    )
    rows = train.robust_rows(train.read_worlds(tmp_path))
    table = cells(train.robust_table(rows))
    assert list(table)[2:] == ["`at`", "`mnist/at`"]  # not the clean phase
    assert table["`at`"][:5] == ["0.05", "4,486", "2 of 3", "0.900", "0.700"]
    assert table["`mnist/at`"][4] == "0.700 ± 0.141 (2)"


def test_a_generator_stands_beside_real_and_collapsed_pictures():
    def measured(x):
        keys = ("agreement", "diversity", "diversity_worst", "trained_on", "nearest")
        return dict.fromkeys(keys, x)

    kinds = {"generated": measured(0.5), "real": measured(0.75), "collapsed": measured(0.25)}
    del kinds["collapsed"]["nearest"]
    run = record("robgan_s1", "robgan", 1, generator={"measured": kinds})
    worlds = {"": {"jtt": [record("jtt_s1", "jtt", 1)]}}
    assert train.robgan_table(train.generators(worlds)) is None
    few = {**kinds, "real": measured(0.9)}
    few = record("robgan_s1", "robgan", 1, generator={"measured": few})
    worlds |= {"mnist": {"robgan": [run]}, "mnist_2000": {"robgan": [few]}}
    lines = train.robgan_table(train.generators(worlds)).splitlines()
    table = [line.strip("| ").split(" | ") for line in lines]
    assert table[0] == ["method", "pictures", *train.MEASURES]
    assert [line[1:3] for line in table[2:5]] == [
        ["generated", "0.500"],
        ["real", "0.750"],
        ["collapsed", "0.250"],
    ]
    assert table[4][-1] == "-" and table[6][2] == "0.900"  # each world's own real pictures


def first_net_record(corr, seed=1, loss="gce", colour=0.8, hard=0.5):
    facts = {"equal_label": corr, "equal_colour": 0.9, "equal_colour_conflicting": colour}
    args = {"infer_groups": True, "first_loss": loss}
    name = f"balance_infergroups_s{seed}"
    world = {**WORLD, "corr": corr}
    return record(name, "balance", seed, hard, world=world, args=args, groups=facts)


def test_first_nets_stand_by_world_and_row():
    plain, told = record("baseline_s1", "baseline", 1, 0.3), record("balance_s1", "balance", 1)
    runs = [first_net_record(0.6, seed, colour=c) for seed, c in ((1, 0.2), (2, 0.4))]
    weak = {
        "baseline": [plain],
        "balance": [told],
        "balance_infergroups": runs,
        "balance_infergroups_ce": [first_net_record(0.6, loss="ce", colour=0.7)],
        "grl_infergroups": [{**runs[0], "args": {**runs[0]["args"], "method": "grl"}}],
    }
    own = {"balance_infergroups": [{**first_net_record(0.9), "world": {}}]}  # without meta.json
    worlds = {
        "": {"balance_infergroups": [first_net_record(0.95)]},
        "weak": weak,
        "plain": {"baseline": [plain]},
    }
    table = train.first_net_table(train.first_nets(worlds))
    rows = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert rows == [
        [
            "results",
            "`balance_infergroups`",
            "0.05",
            "gce",
            "0.950",
            "0.900",
            "0.800",
            "-",
            "0.520",
        ],
        ["weak", "`balance_infergroups`", "0.4", "gce", "0.600 ± 0.000 (2)", "0.900 ± 0.000 (2)"]
        + ["0.300 ± 0.141 (2)", "0.320", "0.520 ± 0.000 (2)"],
        ["weak", "`balance_infergroups_ce`", "0.4", "ce", "0.600", "0.900", "0.700"]
        + ["0.320", "0.520"],
    ]
    ax = train.draw_first_nets(train.first_nets(worlds)).axes[0]
    lines = {line.get_label(): line.get_xydata().round(3).tolist() for line in ax.lines}
    assert lines == {
        "background, ce": [[0.4, 0.7]],
        "background, gce": [[0.05, 0.8], [0.4, 0.3]],
    }
    assert "| nan |" in train.first_net_table(train.first_nets({"": own}))


def test_all_runs_shows_the_worst_group_of_all_seeds():
    runs = [record(f"jtt_s{s}", "jtt", s, hard=h) for s, h in ((1, 0.8), (2, 0.6))]
    table = cells(train.make_tables({"": {}}, {"jtt": runs}, PUBLISHED)["all_runs"])
    assert table["method"][-1] == "worst group" and table["`jtt`"][-1] == "0.300 of 7"
    assert table["`jtt`"][3] == "0.720 ± 0.141 (2)"  # test_unbiased


def test_curves_show_mean_and_range_of_the_seeds():
    runs = [record(f"jitter_s{s}", "jitter", s, hard=h) for s, h in ((1, 0.2), (2, 0.6))]
    runs += [record("jitter_s3", "jitter", 3, hard=0.9, val=0.1)]  # did not train
    found = train.curves({"jitter": runs, "lff": runs})
    assert found == {"jitter": runs[:2]}
    line = train.draw_learning_curves(found).axes[1].get_lines()[0]
    assert line.get_color() == train.INK["jitter"] and [*line.get_ydata()] == [0.4, 0.4]
    assert train.ink(record("oracle_s1", "baseline", 1)) == train.INK["oracle"]


def test_summary_csv_has_every_seed_of_every_world(tmp_path):
    put(tmp_path, record("jtt_s2", "jtt", 2, hard=0.25), record("jtt_s1", "jtt", 1, val=0.1))
    put(tmp_path / "unbiased", record("oracle_s1", "baseline", 1))
    path = train.write_csv(train.read_worlds(tmp_path), tmp_path / "summary.csv")
    lines = list(csv.DictReader(path.read_text().splitlines()))
    assert [(x["world"], x["name"], x["seed"]) for x in lines] == [
        (".", "jtt_s1", "1"),
        (".", "jtt_s2", "2"),
        ("unbiased", "oracle_s1", "1"),
    ]
    assert [x["trained"] for x in lines] == ["False", "True", "True"]
    assert lines[1] == {
        "world": ".",
        "name": "jtt_s2",
        "method": "jtt",
        "seed": "2",
        "knows": "nothing",
        "trained": "True",
        "params": "4486",
        "val": "0.9",
        "test_hard": "0.25",
        "test_unbiased": str(0.25 + 0.02),
        "worst_digit": str(0.25 - 0.1),
        "follows_colour": "0.375",
        "colour_probe": "0.8",
        "digit_probe": "0.7",
    }


def test_report_fills_draws_and_says_what_it_wrote(tmp_path, capsys):
    put(
        tmp_path,
        record("baseline_s1", "baseline", 1),
        record("jitter_s1", "jitter", 1, hard=0.8),
        record("jitter_hsv_s1", "jitter", 1, hard=0.7, args={"jitter": "hsv"}),
        record("baseline_width16_s1", "baseline", 1, args={"width": 16}),
        robust_record("at_s1", 1, (0.1, 0.7), 2),
    )
    for sigma2 in (0.02, 0.05):
        world = {"recipe": "digit", "sigma2": sigma2}
        put(tmp_path / f"lntl_{sigma2}", record("lntl_s1", "lntl", 1, world=world), world=world)
    for corr in (0.95, 0.6):
        put(tmp_path / f"c{corr}", first_net_record(corr), world={**WORLD, "corr": corr})
    report(tmp_path)
    figures = ["learning_curves", "confusion", "parts", "first_net", "robust_training", "digit"]
    wrote = capsys.readouterr().out.splitlines()[1:]
    names = ["tables.md", "summary.csv", *(f"figures/{name}.png" for name in figures)]
    assert wrote == [f"  {tmp_path / name}" for name in names]
    assert all((tmp_path / name).stat().st_size > 100 for name in names)
    text = (tmp_path / "tables.md").read_text()
    assert "| `jitter` | the kind of bias | 0.900 | 0.800 |" in text
    assert "| `lntl` | the kind of bias | 0.520 |" in text
    assert text.count("no results yet") == 3  # flat, cmnist, robgan


def test_report_on_own_data_without_colours(tmp_path):
    runs = [record(f"{m}_s1", m, 1, world={}, colours=False) for m in ("baseline", "jitter", "jtt")]
    put(tmp_path, *runs, world=None)
    report(tmp_path)
    text = (tmp_path / "tables.md").read_text()
    assert "| `jitter` | the kind of bias | 0.900 | 0.500 | 0.400 | - | - | +0.000 |" in text
    line = next(csv.DictReader((tmp_path / "summary.csv").read_text().splitlines()))
    assert line["follows_colour"] == line["colour_probe"] == ""
