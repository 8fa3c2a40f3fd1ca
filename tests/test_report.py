"""The write-up: queries answered from records made by hand; what README.md promises and shows."""

import importlib
import json
import re
import statistics
import subprocess
import textwrap

import pytest
import torch
from conftest import ROOT

import common
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
def ask(tmp_path):
    """Fill one query in DIR/x.md; returns the table's lines as lists of cells."""

    def ask(query, folder=tmp_path):
        text = f"# About\n\n<!-- table\n{query}\n-->\nold\n<!-- end -->\nbelow\n"
        path = folder / "x.md"
        text = train.TABLE.sub(lambda found: train.fill(found, path, folder), text)
        assert text.startswith("# About\n") and text.endswith("<!-- end -->\nbelow\n")
        assert "old" not in text and query in text
        lines = [line for line in text.splitlines() if line.startswith(("|", "*"))]
        return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]

    return ask


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
    """What needs colours is a dash without; rows that have results elsewhere are no mistake."""
    put(tmp_path, record("baseline_s1"))
    put(tmp_path / "unbiased", record("oracle_s1", 0.93))
    follows = "follows = final.test_hard.follows_colour"
    found = ask(f"rows baseline unbiased/oracle\nrow baseline: lazy (plain)\n{HARD}\n{follows}")
    assert [line[2] for line in found[2:]] == ["-"] * 3
    assert ask(f"rows jtt\n{HARD}") == [["*no results yet*"]]
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
    later = tmp_path / "later"  # a run that did not train takes part in no comparison
    put(later, *(record(f"jitter_s{s}", hard, trained=s != 43) for s, hard in mine.items()))
    put(later, *(record(f"baseline_s{s}", hard) for s, hard in theirs.items()))
    found = ask(f"rows jitter\n{gain}", later)
    assert found[2][0] == "`jitter` (1 of 4 did not train)"
    assert found[2][1].startswith("+0.150 (")
    other = tmp_path / "other"  # nor does one on the other side
    put(other, *(record(f"jitter_s{s}", hard) for s, hard in mine.items()))
    put(other, *(record(f"baseline_s{s}", hard, trained=s != 43) for s, hard in theirs.items()))
    assert ask(f"rows jitter\n{gain}", other)[2][1].startswith("+0.150 (")


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


def test_a_misspelt_row_key_file_or_line_names_the_table(tmp_path, ask, dies):
    put(tmp_path, record("baseline_s1"))
    for query, says in (
        (f"rows basline\n{HARD}", "basline"),
        ("rows baseline\ntest_hard = final.test_hrad.acc", "final.test_hrad.acc"),
        (f"from attack_9:models\nrows baseline\n{HARD}", "attack_9:models"),
        (f"rows baseline\nsort by test_hard\n{HARD}", "sort by test_hard"),
        (f"rows baseline\npublished flat\n{HARD}", "flat"),
        ("rows baseline\n0.99 = flat_98: final.val.acc", "flat_98: final.val.acc"),
        ("rows baseline\ngain = final.val.acc - basline", "final.val.acc - basline"),
        ("rows baseline\nval = final.val", "final.val is no number"),
        ("rows baseline\nepochs = epochs", "epochs is no number"),
    ):
        with dies("x.md, line 3", says):
            ask(query)


def test_a_run_on_another_painting_is_left_out_with_one_line(tmp_path, ask, capsys):
    put(tmp_path, record("jtt_s1"), record("jtt_s2", world={**WORLD, "seed": 7}))
    assert ask(f"rows jtt\n{HARD}")[2] == ["`jtt`", "0.500"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "jtt_s2.json" in said and "another painting" in said


def test_a_folder_with_a_broken_result_or_none_stops_with_one_line(tmp_path, mistake):
    put(tmp_path)
    mistake(f"train.py --report --dir {tmp_path}", "no results")
    for k, text in enumerate(("{", "[1]", '{"script": "train.py", "name": "x_s1"}')):
        put(tmp_path / f"w{k}", record("jtt_s1"))
        (tmp_path / f"w{k}" / "x_s1.json").write_text(text)
        mistake(f"train.py --report --dir w{k}", "x_s1.json")


def test_elsewhere_all_runs_and_the_write_ups_tables_and_figures_are_made(tmp_path, capsys):
    """The report after a quick start or QUICK: no write-up of its own, so tables.md."""
    put(tmp_path, record("baseline_s42"), record("mine_s42", 0.75))
    put(tmp_path / "unbiased", record("oracle_s42", 0.93))
    mine = tmp_path / "mine.md"
    mine.write_text(f"<!-- table\nrows mine\n{HARD}\n-->\nold\n<!-- end -->\n")
    train.report(train.get_args(["--dir", str(tmp_path)]))
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "| `mine` | nothing | 0.900 | 0.750 |" in text  # no row of the write-up
    assert "## " in text and "| 0.930 |" in text
    assert "| `mine` | 0.750 |" in mine.read_text() and "old" not in mine.read_text()
    wrote = [line.removeprefix("wrote ") for line in capsys.readouterr().out.splitlines()]
    assert str(tmp_path / "tables.md") in wrote
    assert str(tmp_path / "figures" / "learning_curves.png") in wrote
    assert all((tmp_path / path).stat().st_size > 100 for path in wrote)


def figure_of(tmp_path, text):
    query = train.parse(text, "here")
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


def test_matrices_show_the_shares_of_the_first_seed(tmp_path):
    for seed, table in (1, [[0.8, 0.2], [0.1, 0.9]]), (2, [[1.0, 0.0], [0.0, 1.0]]):
        put(tmp_path, {**record(f"jtt_s{seed}"), "shares": table})
    query, rows = figure_of(tmp_path, "rows jtt\ndigit = shares")
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


# ---- README.md and results/report.md

README = (ROOT / "README.md").read_text(encoding="utf-8")
REPORT = (ROOT / "results" / "report.md").read_text(encoding="utf-8")
PAGES = {"README.md": README, "results/report.md": REPORT}
PAGES["results/appendix.md"] = (ROOT / "results" / "appendix.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"^    python (\w+\.py.*)$", README, re.M)))
NOBODY_MEASURED = "3.11 0.001 0.005 0.05 0.9 0.99 0.1 0.3 .15 0.2 .2 .25 .3 .5"
QUERY = re.compile(r"<!-- .*?-->", re.S)


def recipe(start):
    """The indented block of README.md that begins with this line."""
    found = re.search(rf"\n(    {re.escape(start)}.*\n(?:(?:    .*)?\n)+)", README)
    return textwrap.dedent(found[1])


def prose(page):
    """A page without queries, tables, code and the addresses of its links."""
    page = re.sub(r"(?m)^(    .*|\|.*)$", "", QUERY.sub("", page))
    return re.sub(r"`[^`]*`|\]\([^)]*\)", " ", page)


def test_commands_parse_and_write_over_no_committed_results(tmp_path, monkeypatch):
    (tmp_path / "fashion").mkdir()
    (tmp_path / "mixed.py").write_text("class Mixed(Baseline): pass")
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        script, *flags = command.split()
        importlib.import_module(script.removesuffix(".py")).get_args(flags)
        assert "--dir demo" in command or "--image" in command, command


def test_the_quick_start_looks_at_the_models_it_trained():
    quick = [c for c in COMMANDS if c.startswith("train.py") and "mixed" not in c and "lr" in c]
    trained = [train.get_args(c.split()[1:]).name for c in quick]
    (looked,) = (c for c in COMMANDS if c.startswith("gradcam.py") and "hirescam" in c)
    assert len(trained) == 2 and all(name in looked.split() for name in trained)


def test_pages_have_links_that_lead_on_and_numbers_in_tables_below_their_query_only():
    for name, page in PAGES.items():
        for target in set(re.findall(r"\]\(([^)#]+)\)", page)):
            found = target.startswith("http") or ((ROOT / name).parent / target).exists()
            assert found, (name, target)
        parts = re.split(r"<!-- table\n.*?-->\n.*?<!-- end -->", page, flags=re.S)
        assert not [part for part in parts if re.search(r"\| \d\.\d{3}", part)], name
        text = prose(page)
        stale = set(re.findall(r"(?<![\w.])\d*\.\d+", text)) - set(NOBODY_MEASURED.split())
        stale |= set(re.findall(r"[\d.]+ ?%", text)) - {"95 %"}
        assert not stale, name


def test_every_figure_has_a_caption():
    lines = [line for line in REPORT.splitlines() if line]
    for line, below in zip(lines, lines[1:], strict=False):
        if line.startswith("!["):
            assert re.fullmatch(r"\*.+\*", below), line


def test_stages_methods_and_the_test_command_are_where_readme_says():
    runner = (ROOT / "run_all.sh").read_text(encoding="utf-8")
    stages = re.search(r'STAGES="(.*)"', runner)[1].split()
    told = subprocess.check_output(["bash", ROOT / "run_all.sh", "--help"], text=True)
    assert all(re.search(rf"\b{stage}\b", told) for stage in stages)
    table = README.partition("| method | knows | in one line |")[2].partition("\n\n")[0]
    named = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table.splitlines()[2:]]
    assert sorted(sum(named, [])) == sorted(train.OURS)
    command = "bash run_all.sh test"
    assert command in README and command in (ROOT / ".ci" / "run").read_text()


def test_the_recipe_for_a_method_is_complete(tiny, tmp_path, call, unprobed):
    (tmp_path / "mixed.py").write_text(recipe("class Mixed"), encoding="utf-8")
    tiny(tmp_path / "demo")
    call("train.py --dir demo --method mixed.py --epochs 1")
    record = json.loads((tmp_path / "demo" / "mixed_epochs1_s42.json").read_text())
    assert record["args"]["method"] == "mixed" and record["knows"] == "nothing"


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
