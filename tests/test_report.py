"""The report: queries in the Markdown, answered from records made by hand, with known answers."""

import json
import statistics

import pytest
from conftest import ROOT

import train

WORLD = {"recipe": "background", "corr": 0.95, "limit": None, "is_mnist": True, "seed": 42}


def record(name, hard=0.5, val=0.9, world=WORLD, **more):
    """A run of train.py as far as a report looks at it; the seed is in its name."""
    epochs = [{"epoch": i, "val": val, "test_hard": hard * i / 2} for i in (1, 2)]
    return {
        "script": "train.py",
        "name": name,
        "args": {"method": name.split("_")[0], "seed": int(name.rsplit("_s", 1)[1])},
        "world": world,
        "params": 4486,
        "knows": "nothing",
        "trained": True,
        "final": {
            "val": {"acc": val},
            "test_hard": {
                "acc": hard,
                "worst_digit": hard / 2,
                "follows_colour": None,
                "confusion": [[8, 2], [1, 9]],
                "worst_group": {"acc": hard / 4},
            },
            "test_unbiased": {"acc": hard + 0.02},
        },
        "probe": {"colour": 0.8, "digit": 0.7},
        "epochs": epochs,
        **more,
    }


def put(folder, *records, world=WORLD):
    folder.mkdir(parents=True, exist_ok=True)
    meta = {"script": "make_data.py", **world}
    (folder / "meta.json").write_text(json.dumps(meta))
    for r in records:
        (folder / f"{r['name']}.json").write_text(json.dumps(r))


@pytest.fixture
def ask(tmp_path, capsys):
    """Fill one query in DIR/x.md; returns the table's lines as lists of cells."""

    def ask(query):
        text = f"# About\n\n<!-- table\n{query}\n-->\nold\n<!-- end -->\nbelow\n"
        (tmp_path / "x.md").write_text(text, encoding="utf-8")
        train.runs_of.cache_clear()
        train.read.cache_clear()
        train.report(train.get_args(["--dir", str(tmp_path)]))
        text = (tmp_path / "x.md").read_text(encoding="utf-8")
        assert text.startswith("# About\n") and text.endswith("<!-- end -->\nbelow\n")
        assert "old" not in text and query in text
        lines = [line for line in text.splitlines() if line.startswith("|")]
        return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]

    return ask


@pytest.fixture
def refused(ask, capsys):
    """Assert that a query stops with one line that names the table and says why."""

    def refused(query, says):
        with pytest.raises(SystemExit) as stop:
            ask(query)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and said.count("\n") == 1
        assert "x.md, line 3" in said and says in said, said

    return refused


HARD = "test_hard = final.test_hard.acc"


def test_a_row_is_its_seeds_mean_and_spread(tmp_path, ask):
    put(tmp_path, *(record(f"jitter_s{s}", hard) for s, hard in ((42, 0.5), (43, 0.6), (100, 0.9))))
    put(tmp_path, record("jitter_hsv_s42", 0.25))
    sd = statistics.stdev([0.5, 0.6, 0.9])
    assert ask(f"rows jitter jitter_hsv\nknows = knows\n{HARD}\nn = params") == [
        ["", "knows", "test_hard", "n"],
        ["---"] * 4,
        ["`jitter`", "nothing", f"0.667 ± {sd:.3f} (3)", "4,486"],
        ["`jitter_hsv`", "nothing", "0.250", "4,486"],
    ]


def test_a_row_of_another_world_and_a_label_for_people(tmp_path, ask):
    put(tmp_path, record("baseline_s1"))
    put(tmp_path / "unbiased", record("oracle_s1", 0.93))
    found = ask(f"rows baseline unbiased/oracle\nrow baseline: lazy (plain)\n{HARD}")
    assert [line[0] for line in found[2:]] == ["`baseline`", "`unbiased/oracle`", "lazy (plain)"]
    assert found[3][1] == "0.930" and found[4][1] == found[2][1]


def test_a_column_of_another_world_with_a_published_row_beneath(tmp_path, ask):
    put(tmp_path, record("baseline_s1"))
    put(tmp_path / "flat_999", record("lff_s1", 0.28, trained=False))
    query = "rows lff\npublished biased_mnist\n0.999 = flat_999: final.test_unbiased.acc"
    found = ask(query)
    assert found[2] == ["`lff`", "0.300 (did not train)"]
    every = json.loads((ROOT / "results" / "published.json").read_text(encoding="utf-8"))
    theirs = every["biased_mnist"]
    assert len(found) == 3 + len(theirs)
    assert [line[1] for line in found[3:]] == [f"{r['cells']['0.999']:.3f}" for r in theirs]


def test_a_difference_is_over_the_seeds_of_both_with_a_t_interval(tmp_path, ask):
    mine = {42: 0.6, 43: 0.9, 44: 0.8, 45: 0.7}
    theirs = {42: 0.5, 43: 0.2, 44: 0.6, 46: 0.1}
    put(tmp_path, *(record(f"jitter_s{s}", hard) for s, hard in mine.items()))
    put(tmp_path, *(record(f"baseline_s{s}", hard) for s, hard in theirs.items()))
    gain = "gain = final.test_hard.acc - baseline"
    gains = [0.1, 0.7, 0.2]
    half = 4.303 * statistics.stdev(gains) / 3**0.5  # Student's t, 2 degrees of freedom
    middle = statistics.fmean(gains)
    interval = f"{middle:+.3f} ({middle - half:+.3f} to {middle + half:+.3f})"
    assert ask(f"rows jitter\n{gain}")[2] == ["`jitter`", interval]
    put(tmp_path, record("jitter_s43", 0.9, trained=False))  # takes part in no comparison
    found = ask(f"rows jitter\n{gain}")
    assert found[2][0] == "`jitter` (1 of 4 did not train)"
    assert found[2][1].startswith("+0.150 (")


def test_a_difference_in_another_world_is_to_that_worlds_row(tmp_path, ask):
    put(tmp_path, record("baseline_s1", 0.1), record("jitter_s1", 0.2))
    put(tmp_path / "flat_99", record("baseline_s1", 0.4), record("jitter_s1", 0.9))
    assert ask("rows jitter\ngain = flat_99: final.test_hard.acc - baseline")[2][1] == "+0.500"


def test_entries_of_another_file(tmp_path, ask):
    put(tmp_path, record("baseline_s1"))
    rate = {"rate": 0.596, "low": 0.552, "high": 0.638, "n": 500}
    models = {
        "at_s42": {"robust": rate, "trained": True},
        "at_s43": {"robust": {**rate, "rate": 0.604}},
        "unbiased/oracle_s42": {"robust": rate, "change": {"value": 0.01, "low": -0.02, "high": 0}},
    }
    draws = {"cascade": {"fc+conv3": {"rank": [0.1, 0.3]}}}
    (tmp_path / "attack_7.json").write_text(json.dumps({"models": models, "null": draws}))
    query = "from attack_7:models\nrows at unbiased/oracle\nworst case = robust\nchange = change"
    assert ask(f"{query}\nshare = robust.rate")[2:] == [
        ["`at`", "0.600 ± 0.006 (2)", "-", "0.600 ± 0.006 (2)"],
        ["`unbiased/oracle`", "0.596 (0.552 to 0.638)", "0.0100 (-0.0200 to 0.0000)", "0.596"],
    ]
    cascade = ask("from attack_7:null.cascade\nrow fc+conv3: two layers\nrank = rank")
    assert cascade[2] == ["two layers", "0.200 ± 0.141 (2)"]


def test_a_number_that_needs_colours_is_a_dash_without_them(tmp_path, ask):
    put(tmp_path, record("baseline_s1"))
    found = ask(f"rows baseline\nfollows = final.test_hard.follows_colour\n{HARD}")
    assert found[2] == ["`baseline`", "-", "0.500"]


def test_a_table_without_results_says_so(tmp_path, ask):
    put(tmp_path, record("mine_s1"))
    assert ask(f"rows baseline\n{HARD}") == []  # it has results elsewhere, so it is no mistake
    assert "*no results yet*" in (tmp_path / "x.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("query", "says"),
    [
        (f"rows basline\n{HARD}", "basline"),
        ("rows baseline\ntest_hard = final.test_hrad.acc", "final.test_hrad.acc"),
        (f"from attack_9:models\nrows baseline\n{HARD}", "attack_9:models"),
        (f"rows baseline\nsort by test_hard\n{HARD}", "sort by test_hard"),
        (f"rows baseline\npublished flat\n{HARD}", "flat"),
        (
            "rows baseline\n0.99 = flat_98: final.test_unbiased.acc",
            "flat_98: final.test_unbiased.acc",
        ),
        ("rows baseline\ngain = final.test_hard.acc - basline", "final.test_hard.acc - basline"),
        ("rows baseline\nval = final.val", "final.val is no number"),
        ("rows baseline\nepochs = epochs", "epochs is no number"),
    ],
)
def test_a_misspelt_row_key_file_or_line_names_the_table(tmp_path, refused, query, says):
    put(tmp_path, record("baseline_s1"))
    refused(query, says)


def test_a_run_on_another_painting_is_left_out_with_one_line(tmp_path, ask, capsys):
    put(tmp_path, record("jtt_s1"), record("jtt_s2", world={**WORLD, "seed": 7}))
    assert ask(f"rows jtt\n{HARD}")[2] == ["`jtt`", "0.500"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "jtt_s2.json" in said and "another painting" in said


@pytest.mark.parametrize("text", ["{", "[1]", '{"script": "train.py", "name": "x_s1"}'])
def test_a_broken_result_stops_with_one_line(tmp_path, mistake, text):
    put(tmp_path, record("jtt_s1"))
    (tmp_path / "x_s1.json").write_text(text)
    train.read.cache_clear()
    mistake("train.py --report --dir .", "x_s1.json")


def test_a_folder_without_results_stops_with_one_line(tmp_path, mistake):
    put(tmp_path)
    mistake("train.py --report --dir .", "no results")


def test_elsewhere_all_runs_and_the_write_ups_tables_and_figures_are_made(tmp_path, capsys):
    """The report after a quick start or QUICK: no write-up of its own, so tables.md."""
    put(tmp_path, record("baseline_s42"), record("mine_s42", 0.75))
    put(tmp_path / "unbiased", record("oracle_s42", 0.93))
    train.report(train.get_args(["--dir", str(tmp_path)]))
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "| `mine` | nothing | 0.900 | 0.750 |" in text  # no row of the write-up
    assert "## " in text and "| 0.930 |" in text
    wrote = [line.removeprefix("wrote ") for line in capsys.readouterr().out.splitlines()]
    assert str(tmp_path / "tables.md") in wrote
    assert str(tmp_path / "figures" / "learning_curves.png") in wrote
    assert all((tmp_path / path).stat().st_size > 100 for path in wrote)


def figure_of(tmp_path, text):
    query = train.parse(text, "here")
    train.runs_of.cache_clear()
    return query, train.found_rows(query, tmp_path)


def test_curves_show_mean_and_range_of_the_seeds_that_trained(tmp_path):
    runs = [record(f"jitter_s{s}", hard) for s, hard in ((1, 0.2), (2, 0.6))]
    put(tmp_path, *runs, record("jitter_s3", 0.9, trained=False))
    query, rows = figure_of(tmp_path, "rows jitter\nhard = test_hard")
    (ax,) = train.draw_epochs(query, rows, tmp_path).axes
    (line,) = ax.get_lines()
    assert [*line.get_xdata()] == [1, 2] and [*line.get_ydata()] == pytest.approx([0.2, 0.4])
    assert line.get_color() == train.ink("jitter")


def test_a_sweep_has_a_place_a_world_and_a_cross_for_what_did_not_train(tmp_path):
    put(tmp_path, record("baseline_s1"))
    put(tmp_path / "flat_999", record("lff_s1", 0.08, trained=False))
    put(tmp_path / "flat_99", record("lff_s1", 0.48), record("lff_s2", 0.68))
    columns = [f"0.{c} = flat_{c}: final.test_unbiased.acc" for c in (999, 99)]
    text = "\n".join(["rows lff", "axis share", *columns])
    query, rows = figure_of(tmp_path, text)
    (ax,) = train.draw_sweep(query, rows, tmp_path).axes
    line, cross = ax.get_lines()
    assert line.get_xydata().tolist() == [pytest.approx([1, 0.6])]
    assert cross.get_xydata().tolist() == [pytest.approx([0, 0.1])] and cross.get_marker() == "x"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.999", "0.99"]


def test_a_confusion_matrix_shows_shares_of_a_line(tmp_path):
    put(tmp_path, record("jtt_s1"))
    query, rows = figure_of(tmp_path, "rows jtt\ndigit = final.test_hard.confusion")
    ax = train.draw_matrices(query, rows, tmp_path).axes[0]
    assert ax.images[0].get_array().tolist() == [[0.8, 0.2], [0.1, 0.9]]


def test_published_figures_are_complete():
    every = json.loads((ROOT / "results" / "published.json").read_text(encoding="utf-8"))
    for key, rows in every.items():
        for row in rows:
            assert row["row"] and row["source"] and row["how"] in ("read", "as reported"), row
            assert all(0 < value < 1 for value in row["cells"].values()), (key, row)


def test_every_query_of_the_write_up_is_answered(capsys):
    """On the committed JSON; a table that says 'no results yet' has lost its evidence."""
    for path in (ROOT / "README.md", *sorted((ROOT / "results").glob("*.md"))):
        text = path.read_text(encoding="utf-8")
        assert "no results yet" not in text, path
        for found in train.TABLE.finditer(text):
            assert train.fill(found, path, ROOT / "results") == found[0], path
