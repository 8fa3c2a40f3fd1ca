"""Each directional claim of results/report.md and README.md, asserted on the committed JSON.

One test a claim, named after it. A claim without its evidence fails: then the sentence goes.
"""

from statistics import fmean, median

import pytest
from conftest import ROOT

from common import load_json, t_interval
from train import dig, records, runs_of

RESULTS = ROOT / "results"
CURES = ("jtt", "lff", "jitter", "grl", "combined", "biasbal", "groupdro")
CMNIST = ("995", "99", "98", "95")
CAMS = {"gradcam": "gradcam_all", "hirescam": "gradcam_all_hirescam"}
PAIRS = [(images, kind) for images in ("all", "both_right") for kind in ("argmax", "confidence")]
TARGETED, UNTARGETED = "attack_7to3_n500", "attack_untargeted_n2000"


# ---- the evidence, selected as the tables select it


def load(file):
    return load_json(RESULTS / f"{file}.json", "it belongs to the repository")


def rows(world="."):
    """{row: {seed: record}} of every training run of one world."""
    return runs_of(RESULTS / world)


def runs(row):
    """{seed: record} of a row of the main world; the oracle's runs lie in the unbiased one."""
    return records(RESULTS, f"unbiased/{row}" if row.startswith("oracle") else row)


def entries(file, row):
    """{seed: entry} of the models of a row in a record of gradcam.py or attack.py."""
    found = records(RESULTS, row, f"{file}:models")
    assert found, f"{file} has no row {row}"
    return found


def hard(record):
    return record["final"]["test_hard"]["acc"]


def val(record):
    return record["final"]["val"]["acc"]


def follows(record):
    return record["final"]["test_hard"]["follows_colour"]


def colour_probe(record):
    return record["probe"]["colour"]


def unbiased(record):
    return record["final"]["test_unbiased"]["acc"]


def of(row, number):
    """One number of every seed of a row."""
    return [number(record) for record in runs(row).values()]


def in_world(world, row, number=unbiased):
    """The mean over seeds, in another world."""
    return fmean(number(record) for record in rows(world)[row].values())


def gains(row, other, number=hard):
    """Row minus other, over the seeds that both have."""
    seeds = runs(row).keys() & runs(other).keys()
    assert seeds, f"{row} and {other} share no seed"
    return [number(runs(row)[seed]) - number(runs(other)[seed]) for seed in seeds]


def looks(cam, row, number):
    """One number of every model of a row that has maps."""
    row = f"unbiased/{row}" if row.startswith("oracle") else row
    return [number(model) for model in entries(CAMS[cam], row).values()]


def lift(model):
    return model["maps"]["test_hard"]["lift"]


def zero_maps(model):
    return model["maps"]["test_hard"]["zero_maps"] / model["maps"]["test_hard"]["n"]


def flip(part):
    return lambda model: model["flips"][part]["changed"]["rate"]


def survive(row, file):
    """{seed: share right under every attack} of a row in a record of attack.py."""
    return {seed: model["robust"]["rate"] for seed, model in entries(file, row).items()}


def clean(file, row):
    """{seed: how many pictures are right without an attack}."""
    return {seed: model["attacks"]["clean"]["k"] for seed, model in entries(file, row).items()}


def published(table, start=""):
    """[{setting: accuracy}] of the published rows whose name begins so."""
    return [row["cells"] for row in load("published")[table] if row["row"].startswith(start)]


def published_best(table, setting, **about):
    """The best published figure of the rows of which this is true, say knows="nothing"."""
    rows = [row for row in load("published")[table] if setting in row["cells"]]
    fitting = [row for row in rows if all(row[key] == value for key, value in about.items())]
    return max(row["cells"][setting] for row in fitting)


# ---- does it cheat?


def test_the_plain_network_is_nearly_perfect_on_val_and_right_less_than_half_on_test_hard():
    assert fmean(of("baseline", val)) > 0.95 and max(of("baseline", hard)) < 0.5


def test_after_one_epoch_it_answers_by_colour_alone():
    assert max(run["epochs"][0]["test_hard"] for run in runs("baseline").values()) < 0.02


def test_it_follows_the_colour_many_times_as_often_as_the_oracle():
    assert min(of("baseline", follows)) > 10 * max(of("oracle", follows))


@pytest.mark.parametrize(
    "row", ["baseline_width16", "baseline_epochs30", "baseline_lr0.01_onecycle"]
)
def test_width_epochs_and_a_faster_rate_each_lift_test_hard(row):
    assert min(gains(row, "baseline")) > 0.1


@pytest.mark.parametrize("setting", ["width16", "lr0.01_onecycle"])
def test_wider_or_faster_it_still_falls_well_short_of_its_oracle(setting):
    assert max(gains(f"baseline_{setting}", f"oracle_{setting}")) < -0.1


def test_val_ranks_the_plain_network_among_the_best_and_test_hard_the_worst():
    shown = ("jitter", "oracle")  # in learning_curves.png
    assert all(fmean(of("baseline", val)) > fmean(of(row, val)) for row in shown)
    assert all(max(of("baseline", hard)) < min(of(row, hard)) for row in shown)


# ---- where does it look?


def test_a_new_background_changes_the_lazy_networks_answer_far_more_often_in_every_seed():
    lazy = looks("gradcam", "baseline", flip("background"))
    for row, times in (("jitter", 3), ("grl", 2), ("combined", 3)):
        assert min(lazy) > times * max(looks("gradcam", row, flip("background")))


def test_a_new_digit_changes_a_cured_networks_answer_more_often_in_every_seed():
    lazy = looks("gradcam", "baseline", flip("digit"))
    for row in ("jitter", "grl", "combined"):
        assert max(lazy) < min(looks("gradcam", row, flip("digit")))


@pytest.mark.parametrize("cam", CAMS)
def test_the_lifts_of_lazy_and_cured_networks_overlap(cam):
    assert max(looks(cam, "baseline", lift)) > min(looks(cam, "jitter", lift))


def test_at_width_4_hirescams_lift_is_higher_in_cured_networks_on_average_and_in_every_oracle():
    lazy = looks("hirescam", "baseline", lift)
    for row in ("jitter", "grl", "combined", "oracle"):
        gains = [cured - own for cured, own in zip(looks("hirescam", row, lift), lazy, strict=True)]
        assert len(gains) == 5 and t_interval(gains)["low"] > 0, row
    assert min(looks("hirescam", "oracle", lift)) > max(lazy)


@pytest.mark.parametrize("cam", ["gradcam_same", "gradcam_same_hirescam"])
def test_at_width_16_flips_tell_lazy_from_cured_and_lifts_do_not_yet_a_map_tells_its_answer(cam):
    def of_row(row, number):
        return [number(model) for model in entries(cam, row).values()]

    def auc(model):
        return model["maps"]["test_hard"]["auc"]

    for cured in ("told_nothing", "told_kind", "unbiased/oracle_same"):
        lazy_flips, flips = (of_row(row, flip("background")) for row in ("plain", cured))
        assert len(flips) == 3 and min(lazy_flips) > 3 * max(flips)
        assert max(of_row("plain", lift)) > min(of_row(cured, lift))
    assert max(of_row("plain", lift)) < load(cam)["null"]["ceiling"]["maps"]["test_hard"]["lift"]
    low, high = (0.77, 0.82) if "hirescam" in cam else (0.6, 0.75)
    assert all(low < found < high for found in of_row("plain", auc))
    random = of_row("plain", lambda model: model["maps"]["test_hard"]["auc_random"])
    assert all(abs(found - 0.5) < 0.01 for found in random)


def by_seed(cam, row, number):
    """{seed: one number} of every model of a row that has maps."""
    return {seed: number(m) for seed, m in entries(CAMS[cam], row).items()}


def test_at_width_4_hirescam_tells_what_was_followed_in_one_lazy_network_of_five():
    found = looks("hirescam", "baseline", lambda model: model["maps"]["test_hard"]["auc"])
    assert len(found) == 5 and sorted(found)[-1] > 0.8 and sorted(found)[-2] < 0.65


def test_by_hirescam_even_lazy_networks_score_above_one_but_so_do_random_layers():
    assert fmean(looks("hirescam", "baseline", lift)) > 1
    assert min(looks("hirescam", "baseline", flip("background"))) > 0.5
    for step in load(CAMS["hirescam"])["null"]["cascade"].values():
        assert fmean(step["lift"]) > 1


def test_a_net_of_shuffled_labels_has_learned_nothing_and_seldom_flips():
    row = "baseline_shufflelabels"
    assert max(of(row, hard)) < 0.15
    assert max(looks("gradcam", row, flip("background"))) < 0.2
    assert max(looks("gradcam", row, flip("digit"))) < 0.2


def test_hirescam_maps_are_not_empty():
    assert max(looks("hirescam", row, zero_maps)[0] for row in ("baseline", "jitter")) == 0


@pytest.mark.parametrize("cam", CAMS)
def test_random_weights_in_the_last_layer_leave_nothing_of_the_map(cam):
    assert abs(fmean(dig(load(CAMS[cam]), "null.cascade.fc.rank_correlation"))) < 0.15


# ---- what does each answer want to see?

WANTS = "gradcam_maximise_all"


def wanted(row, key):
    """The mean over seeds, of the pictures that maximise the answers of a row's models."""
    return fmean(model[key] for model in entries(WANTS, row).values())


def test_where_nothing_was_learned_no_picture_convinces():
    assert wanted("baseline_shufflelabels", "confidence") < 0.2
    assert load(WANTS)["null"]["confidence"] < 0.2
    assert min(wanted(row, "confidence") for row in ("baseline", "jitter")) > 0.9


def test_another_oracle_reads_more_than_half_of_the_lazy_ones_and_fewer_of_the_robust_ones():
    assert load(WANTS)["reader"] not in load(WANTS)["models"]
    read = "read by an oracle"
    assert wanted("baseline", read) > 0.5 and wanted("at_balanced", read) < wanted("baseline", read)


# ---- what cures it, and at what cost?


@pytest.mark.parametrize("row", CURES)
def test_every_cure_but_lntl_lifts_test_hard_and_leaves_it_below_the_oracle(row):
    assert min(gains(row, "baseline")) > 0.1
    assert fmean(of(row, hard)) < fmean(of("oracle", hard))


def test_of_the_methods_combined_and_equal_groups_come_closest_to_the_oracle_then_jitter():
    first = ("combined", "balance", "jitter")
    rest = [row for row in (*CURES, "lntl") if row not in first]
    mean = {row: fmean(of(row, hard)) for row in (*first, *rest, "oracle")}
    assert mean["oracle"] > min(mean["combined"], mean["balance"]) > mean["jitter"]
    assert mean["jitter"] > max(mean[row] for row in rest)
    assert max(number for row in first for number in of(row, follows)) < 0.05


def test_at_a_higher_rate_with_a_schedule_biasbal_passes_jitter_on_average():
    biasbal, jitter = (f"{row}_lr0.01_onecycle" for row in ("biasbal", "jitter"))
    assert fmean(gains("biasbal", "jitter")) < 0 < fmean(gains(biasbal, jitter))


def test_lntl_with_the_weights_of_its_paper_hardly_helps():
    assert max(gains("lntl", "baseline")) < 0.1


@pytest.mark.parametrize("row", ["jitter", "grl", "combined", "biasbal"])
def test_a_cure_costs_accuracy_on_val_in_every_seed(row):
    assert max(gains(row, "baseline", val)) < 0


@pytest.mark.parametrize("row", [*CURES, "oracle"])
def test_a_probe_still_reads_the_colour_from_the_features(row):
    assert fmean(of(row, colour_probe)) > 0.9


@pytest.mark.parametrize("row", ["jitter", "grl", "combined", "told_nothing_width4"])
def test_the_answers_of_the_cured_seldom_use_the_colour(row):
    assert max(of(row, follows)) < 0.05


def worst_pair(record):
    return record["final"]["test_hard"]["worst_group"]["acc"]


def test_a_network_that_learned_nothing_has_features_that_show_the_colour():
    assert min(of("baseline_shufflelabels", colour_probe)) > 0.9


GAMMAS = ("_gamma0.03", "", "_gamma0.3", "_gamma0.6", "_gamma1")


def names_colour(record):
    """How often the head that the reversal fights names the colour after the last epoch."""
    return record["epochs"][-1]["head_colour"]


@pytest.mark.parametrize("gamma", GAMMAS[:3])
def test_at_the_lower_weights_the_head_sees_and_grl_is_its_loss(gamma):
    found = gains(f"grl{gamma}", "biasbal")
    assert len(found) == 3 and t_interval(found)["low"] < 0 < t_interval(found)["high"]
    assert fmean(names_colour(runs(f"grl{gamma}")[seed]) for seed in (42, 43, 44)) > 0.5


@pytest.mark.parametrize("gamma", GAMMAS[3:])
def test_at_the_higher_weights_the_head_begins_to_go_blind_and_most_networks_lose_digits(gamma):
    assert fmean(of(f"grl{gamma}", names_colour)) < 0.5
    found = gains(f"grl{gamma}", "biasbal")
    assert len(found) == 3 and sum(gain < -0.2 for gain in found) == 2


@pytest.mark.parametrize("gamma", GAMMAS)
def test_where_nothing_is_corrected_the_head_sees_and_no_weight_cures(gamma):
    row = f"grl{gamma}_noconditional"
    assert fmean(of(row, names_colour)) > 0.8 and max(gains(row, "baseline")) < 0.1


@pytest.mark.parametrize("gamma", GAMMAS)
def test_a_probe_reads_the_colour_at_every_weight(gamma):
    assert (
        min(of(f"grl{gamma}", colour_probe) + of(f"grl{gamma}_noconditional", colour_probe)) > 0.8
    )


def test_combined_is_as_good_without_the_reversal():
    assert max(map(abs, gains("combined_gamma0", "combined"))) < 0.015


def test_the_row_at_answers_by_colour_and_does_not_train_where_colour_says_nothing_either():
    assert min(of("at", follows)) > 0.98 and max(of("oracle_at", hard)) < 0.2


# ---- told nothing: the lazy network names its own shortcut


def settings(record):
    skip = ("dir", "seed", "method", "resample", "infer_groups", "name", "crop")
    return {key: value for key, value in record["args"].items() if key not in skip}


def test_told_nothing_had_the_budget_of_the_rows_beside_it_and_one_recipe_in_every_world():
    budget = settings(runs("plain")[42])
    for world in (".", *CURVE, *(f"cmnist_{corr}" for corr in CMNIST), "stripes", "both"):
        for record in rows(world)["told_nothing"].values():
            assert record["args"]["resample"] == 0.2 and record["args"]["infer_groups"]
            assert record["args"]["crop"] == 2 and record["knows"] == "nothing"
            assert settings(record).items() >= budget.items(), world


def test_told_nothing_ends_within_two_points_of_the_oracle_in_every_seed():
    told, oracle = runs("told_nothing"), records(RESULTS, "unbiased/oracle_same")
    assert len(told) == len(oracle) == 3
    assert all(0 < hard(oracle[seed]) - hard(told[seed]) < 0.02 for seed in told)
    assert min(gains("told_nothing", "plain")) > 0.05


def test_at_its_budget_only_told_nothing_stands_beside_those_that_know_more():
    same = [
        settings(runs(row)[42]) for row in ("plain", "lff_same", "plain_grayscale", "told_groups")
    ]
    assert all(set(other) - set(same[0]) <= {"balance", "rounds"} for other in same)
    told, kind = (fmean(map(hard, runs(row).values())) for row in ("told_nothing", "told_kind"))
    assert told > kind and abs(told - hard(runs("told_groups")[42])) < 0.005
    jtt, lff, grey = (hard(runs(row)[42]) for row in ("jtt_same", "lff_same", "plain_grayscale"))
    assert told > jtt + 0.03 and jtt > fmean(map(hard, runs("plain").values())) > lff > grey


def test_a_last_layer_told_nothing_gains_at_width_16_and_where_the_shortcut_is_no_colour():
    assert len(gains("told_nothing_dfr", "plain")) == 3
    assert min(gains("told_nothing_dfr", "plain")) > 0.04
    assert max(gains("told_nothing_dfr", "told_nothing")) < -0.02
    plain, last, told = (
        in_world("stripes", row) for row in ("plain", "told_nothing_dfr", "told_nothing")
    )
    assert plain < last < told


def test_a_weaker_shortcut_is_cured_too_and_where_there_is_hardly_one_the_recipe_loses():
    gain = {
        corr: in_world(f"corr_{corr}", "told_nothing") - in_world(f"corr_{corr}", "plain")
        for corr in "863"
    }
    assert min(gain["8"], gain["6"]) > 0 and gain["3"] < -0.03


def by_group(record):
    return record["final"]["test_unbiased"]["by_group"]


def test_the_lazy_network_is_right_on_the_diagonal_and_told_nothing_everywhere():
    def sides(table):
        pairs = [(d, c) for d in range(10) for c in range(10)]
        own = [table[d][c] for d, c in pairs if d == c]
        return own, [table[d][c] for d, c in pairs if d != c]

    own, foreign = sides(by_group(runs("plain")[42]))
    assert min(own) > 0.95 and fmean(foreign) < 0.85
    for record in (runs("told_nothing")[42], records(RESULTS, "unbiased/oracle_same")[42]):
        own, foreign = sides(by_group(record))
        assert min(own + foreign) > 0.85 and abs(fmean(own) - fmean(foreign)) < 0.02


def test_where_the_shortcut_is_strongest_it_stands_above_all_that_know_nothing_then_level():
    for corr, low, high in (
        ("999", 0.03, 0.1),
        ("997", -0.003, 0.003),
        ("995", -0.003, 0.003),
        ("99", -0.01, -0.005),
    ):
        best = published_best("biased_mnist", f"0.{corr}", knows="nothing")
        assert low < in_world(f"flat_{corr}", "told_nothing") - best < high, corr
        assert len(rows(f"flat_{corr}")["told_nothing"]) == 3


def test_with_the_published_network_it_stands_above_all_that_we_read():
    for corr in CMNIST:
        ours = in_world(f"cmnist_{corr}", "told_nothing_mlp")
        assert ours > published_best("cmnist", f"0.{corr}", knows="nothing", how="read") + 0.008
        (second_hand,) = published("cmnist", "FG-CCDB")
        assert second_hand[f"0.{corr}"] > ours
        (vanilla,) = published("cmnist", "vanilla")
        assert abs(in_world(f"cmnist_{corr}", "plain_mlp") - vanilla[f"0.{corr}"]) < 0.075
        if corr != "95":
            assert in_world(f"cmnist_{corr}", "told_nothing") > second_hand[f"0.{corr}"]


def by_seed_of(world, row, number=hard):
    return {seed: number(record) for seed, record in rows(world)[row].items()}


def test_stripes_are_cured_and_jitter_that_undoes_colour_makes_them_worse_in_every_seed():
    plain, told, kind = (by_seed_of("stripes", f) for f in ("plain", "told_nothing", "told_kind"))
    assert set(plain) == set(told) == set(kind)
    assert all(kind[seed] < plain[seed] - 0.1 and told[seed] > plain[seed] + 0.05 for seed in plain)


def test_one_round_leaves_the_stripes_and_a_second_cures_both():
    def where_only_stripes_conflict(record):
        return record["final"]["test_unbiased"]["only_second_conflicts"]

    once, twice = (by_seed_of("both", f"told_nothing{f}") for f in ("", "_twice"))
    plain = by_seed_of("both", "plain")
    assert min(once.values()) > max(plain.values()) + 0.1
    assert min(twice.values()) > max(once.values()) + 0.2
    stripes = [
        by_seed_of("both", f, where_only_stripes_conflict) for f in ("plain", "told_nothing")
    ]
    assert max(stripes[1].values()) < min(stripes[0].values()) - 0.05
    kind = by_seed_of("both", "told_kind").values()
    assert max(once.values()) < min(kind) and max(kind) < min(twice.values())
    assert {record["knows"] for record in rows("both")["told_nothing_twice"].values()} == {
        "how many shortcuts"
    }
    assert max(gains("told_nothing_twice", "told_nothing")) < -0.05  # where there is one only


def test_irm_and_vrex_reach_their_published_figures_and_inferred_environments_serve_as_well():
    found = {row: [hard(r) for r in seeds.values()] for row, seeds in rows("irm").items()}
    for row, test in (("irm", "IRM ("), ("vrex", "V-REx")):
        (theirs,) = published("irm", test)
        assert abs(fmean(found[row]) - theirs["test"]) < 0.02 and len(found[row]) >= 3
    assert abs(fmean(found["irm_infergroups"]) - fmean(found["irm"])) < 0.03
    assert max(found["baseline"] + found["grayscale"]) < 0.3
    assert 0.4 < fmean(found["told_nothing"]) < 0.6 < min(found["irm"])
    for record in rows("irm")["irm_infergroups"].values():
        assert record["knows"] == "nothing" and record["groups"]["equal_colour"] == 1
    (oracle,) = rows("irm_unbiased")["baseline"].values()
    assert oracle["knows"] == "no bias in training"


def test_the_first_network_names_backgrounds_nearly_always_strokes_and_gratings_less_often():
    def names(world):
        found = rows(world)["told_nothing"].values()
        return [record["groups"]["equal_colour_conflicting"] for record in found]

    assert min(sum(map(names, (".", *CURVE)), [])) > 0.95
    fewer = sum(map(names, ("stripes", *(f"cmnist_{corr}" for corr in CMNIST))), [])
    assert max(fewer) < 0.92 and max(names("stripes")) < 0.6
    assert min(names("corr_8") + names("corr_6")) > 0.95 and names("corr_3")[0] < 0.2


def test_told_nothing_holds_where_the_plain_network_falls():
    worlds = (".", *CURVE)
    assert all(in_world(world, "told_nothing") > in_world(world, "plain") for world in worlds)
    assert in_world("flat_999", "plain") < 0.2 and in_world("flat_997", "told_nothing") > 0.9


CURVE = ("flat_99", "flat_995", "flat_997", "flat_999")


# ---- which part of the cure does the work?


def test_hue_shifts_or_the_original_picture_undo_most_of_the_cure():
    gain = fmean(gains("jitter", "baseline"))
    for row in ("jitter_hsv", "jitter_image"):
        assert fmean(gains(row, "jitter")) < -0.5 * gain
    rest = ("jitter_alpha0", "jitter_nofade", "jitter_grain0")
    for row in rest:
        assert fmean(gains(row, "jitter")) > -0.5 * gain


def test_plain_augmentation_brings_most_of_the_gain():
    assert min(gains("jitter_alpha0", "baseline")) > 0.8 * fmean(gains("jitter", "baseline"))


def test_without_the_grain_every_seed_is_a_little_lower():
    losses = gains("jitter_grain0", "jitter")
    assert len(losses) > 1 and -0.1 < min(losses) <= max(losses) < 0


def test_with_its_own_recipe_we_find_about_what_the_lazy_artist_found_but_for_the_reversal():
    (jitter,), (plain,) = (published("lazy_artist", start) for start in ("jitter", "plain"))
    assert abs(fmean(of("jitter_hsv_image_nofade", hard)) - jitter["test_hard"]) < 0.05
    assert abs(fmean(gains("grl_noconditional", "baseline"))) < 0.05
    assert min(of("baseline", hard)) > plain["test_hard"] + 0.1


# ---- two other worlds


def test_jitter_is_hardly_affected_by_how_perfect_the_shortcut_is():
    accuracies = [in_world(f"flat_{corr}", "jitter") for corr in (999, 997, 995, 99)]
    assert max(accuracies) - min(accuracies) < 0.01


def test_jitter_stands_above_every_published_row_at_999_of_1000():
    best = max(row.get("0.999", 0) for row in published("biased_mnist"))
    assert in_world("flat_999", "jitter") > best


def test_lntl_gains_little_with_its_papers_weights_and_much_with_both_changes():
    plain = in_world("lntl_020", "baseline")
    both = in_world("lntl_020", "lntl") - plain
    assert both > 0.4
    for alone in ("lntl_paper", "lntl_simplecnn"):
        assert in_world("lntl_020", alone) - plain < 0.5 * both


def test_lntl_stands_above_its_published_figures_where_the_shortcut_is_strong_then_level():
    gain = {}
    (theirs,) = published("lntl", "LNTL")
    for variance, accuracy in theirs.items():
        world = f"lntl_{round(1000 * float(variance)):03d}"
        gain[float(variance)] = in_world(world, "lntl") - accuracy
    assert len(gain) == 7
    assert min(gain[0.02], gain[0.025], gain[0.03]) > 0.04 and abs(gain[0.05]) < 0.01


def test_a_probe_reads_less_colour_from_lntl_than_from_any_other_network_of_its_world():
    def probe(record):
        return record["probe"]["colour"]

    least = in_world("lntl_020", "lntl", probe)
    rest = [row for row in rows("lntl_020") if row != "lntl"]
    assert least < 0.25 and all(in_world("lntl_020", row, probe) > least for row in rest)


@pytest.mark.parametrize("world", ["lntl_020", "lntl_050"])
def test_recolouring_beats_lntl_and_both_beat_brightness_alone(world):
    jitter, lntl, gray = (in_world(world, row) for row in ("jitter", "lntl", "grayscale"))
    assert jitter > lntl > gray


def test_the_plain_network_falls_as_the_shortcut_grows_while_the_cured_ones_hold():
    assert in_world("lntl_050", "baseline") - in_world("lntl_020", "baseline") > 0.2
    for row in ("jitter", "lntl"):
        assert abs(in_world("lntl_050", row) - in_world("lntl_020", row)) < 0.03


# ---- what does the lazy network know and not say?

APART = "gradcam_decompose_all"
LAST = ("dfr", "dfr_infergroups")


def digit_probe(record):
    return record["probe"]["digit"]


def apart(row):
    """Every model of a row in the record of gradcam.py --decompose."""
    return list(entries(APART, row).values())


def silenced(model, kind, k=20):
    return model["silenced"][kind][str(k)]


def test_a_probe_reads_most_digits_from_the_lazy_network_that_names_fewer_than_half():
    assert min(of("baseline", digit_probe)) > 0.7 and max(of("baseline", hard)) < 0.5


@pytest.mark.parametrize("row", LAST)
def test_a_new_last_layer_reads_nearly_what_the_probe_reads_and_pays_on_val(row):
    assert len(runs(row)) == 3 and min(gains(row, "baseline")) > 0.25
    assert max(gains(row, "baseline", val)) < 0
    for record in runs(row).values():
        assert abs(hard(record) - digit_probe(record)) < 0.05


def test_a_last_layer_told_nothing_is_as_good_as_one_told_the_colours():
    assert max(abs(gain) for gain in gains("dfr_infergroups", "dfr")) < 0.01
    assert {run["knows"] for run in runs("dfr_infergroups").values()} == {"nothing"}


def test_every_lazy_network_gains_by_losing_colour_and_loses_by_losing_the_digit():
    models = apart("baseline")
    assert len(models) == 3
    for model in models:
        erased = model["erased"]
        assert erased["colour"]["gain"]["test_hard"]["low"] > 0.1
        assert erased["colour"]["follows_colour"] < 0.5 * model["plain"]["follows_colour"]
        assert erased["digit"]["gain"]["test_hard"]["high"] < -0.2
        assert abs(erased["random"]["gain"]["test_hard"]["value"]) < 0.02


def test_the_cured_network_does_not_care_about_colour_being_erased():
    for model in apart("jitter"):
        assert abs(model["erased"]["colour"]["gain"]["test_hard"]["value"]) < 0.02


def test_in_the_lazy_networks_dozens_of_latents_say_colour_and_hardly_any_says_digit():
    for model in apart("baseline"):
        found = model["dictionary"]
        assert found["say_colour"] > 24 and found["say_digit"] < 1  # means of three
        assert found["stability"] < 0.6  # another autoencoder finds other latents


def test_colour_latents_carry_the_shortcut_and_others_that_vary_as_much_do_not():
    for model in apart("baseline"):
        plain = model["plain"]["follows_colour"]
        for k in (5, 10, 20):
            point = silenced(model, "colour", k)
            assert point["beside_others"]["follows_colour"]["high"] < 0
            assert point["follows_colour"] < plain < silenced(model, "others", k)["follows_colour"]


def test_silencing_frees_less_than_erasure_and_costs_more_on_val_where_it_follows_as_little():
    for model in apart("baseline"):
        erased = model["erased"]["colour"]
        points = [silenced(model, "colour", k) for k in (5, 10, 20, 40, 80)]
        assert max(point["test_hard"] for point in points) < erased["test_hard"]
        assert silenced(model, "colour", 40)["val"] < erased["val"]


def test_silencing_no_latent_changes_nothing():
    for model in apart("baseline") + apart("jitter"):
        for kind in model["silenced"]:
            none = silenced(model, kind, 0)
            assert all(none[key] == value for key, value in model["plain"].items())


def test_the_lazy_network_has_channels_about_colour_only():
    assert all(min(model["channels"]["each_colour"]) > 0.9 for model in apart("baseline"))
    assert all(max(model["channels"]["each_digit"]) > 0.3 for model in apart("jitter"))


# ---- is the cured network safer?


def compared(other):
    entry = load(TARGETED)["compared"][other]
    assert entry["reference"] == "baseline"
    return entry


SUBSETS, CRITERIA = ("all", "both_right", "easiest"), ("argmax", "margin", "confidence")


def below_zero(entry, subsets=SUBSETS):
    """The measures by which a row needs less than the plain network, all of its interval."""
    assert entry["seeds"] == 3
    ends = {(s, c): entry[s][c]["min_eps"] for s in subsets for c in CRITERIA}
    assert not any(interval["low"] > 0 for interval in ends.values())
    return {key for key, interval in ends.items() if interval["high"] < 0}


@pytest.mark.parametrize("row", ["jitter", "combined"])
def test_what_contains_jitter_is_easier_to_fool_than_the_lazy_network_by_every_measure(row):
    assert len(below_zero(compared(row))) == 9
    for images, criterion in PAIRS:
        assert compared(row)[images][criterion]["needs_less"]["low"] > 0.5


@pytest.mark.parametrize("row", ["told_nothing_width4", "grl", "oracle"])
def test_at_width_4_the_others_are_easier_to_fool_on_the_easiest_pictures(row):
    assert len(below_zero(compared(row), ["easiest"])) == 3
    assert len(below_zero(compared(row), ["all", "both_right"])) <= 3


def test_at_width_4_told_nothing_needs_less_in_every_seed():
    models = load(TARGETED)["models"]
    for seed in (42, 43, 44):
        for criterion in CRITERIA:
            cured, lazy = (
                models[f"{row}_s{seed}"][criterion]["min_eps"]
                for row in ("told_nothing_width4", "baseline")
            )
            assert median(a - b for a, b in zip(cured, lazy, strict=True)) < 0
    below = below_zero(compared("told_nothing_width4"), ["both_right"])
    assert below == {("both_right", "margin")}  # by no criterion that the report names


def test_at_width_16_jitter_needs_less_by_every_measure_told_nothing_and_the_oracle_by_hardly_any():
    found = load("attack_7to3_same")["compared"]
    assert {entry["reference"] for entry in found.values()} == {"plain"}
    assert len(below_zero(found["told_kind"])) == 9 and not below_zero(found["oracle_same"])
    few = {("easiest", "confidence"), ("easiest", "margin")}
    assert below_zero(found["told_nothing"]) == few


def test_a_change_without_a_shift_of_colour_is_as_cheap_as_any_and_one_shift_seldom_works():
    for row in ("baseline", "jitter", "plain", "told_nothing"):
        half = {
            change: load(f"attack_7to3_{change}")["summary"][f"{row}_s42"]["all"]["argmax"]
            for change in ("any", "fine", "flat")
        }
        cost = {change: found["min_eps"]["median"] for change, found in half.items()}
        assert cost["any"] <= cost["fine"] < 1.05 * cost["any"] and cost["flat"] > 0.2
        assert half["flat"]["success"]["rate"] <= 0.1 and half["any"]["success"]["n"] == 50


def test_7_to_3_is_no_special_case():
    models = load("attack_pairs")["models"]
    lazy, cured = (models[f"{row}_s42"]["argmax"] for row in ("baseline", "jitter"))
    pairs = [(i, j) for i in range(10) for j in range(10) if i != j]
    assert fmean(cured[i][j] >= lazy[i][j] for i, j in pairs) > 0.9


def test_more_attacks_reach_their_digit_in_the_cured_network_by_both_criteria():
    lazy, cured = (load("attack_pairs")["models"][f"{row}_s42"] for row in ("baseline", "jitter"))
    for criterion in ("argmax_mean", "confidence_mean"):
        assert cured[criterion]["low"] > lazy[criterion]["high"]


def test_at_eps_005_hardly_a_picture_survives_in_any_network_of_the_usual_training():
    record = load(UNTARGETED)
    assert record["args"]["eps"] == 0.05
    assert max(model["robust"]["rate"] for model in record["models"].values()) < 0.01


def kept_within(eps, row):
    """Accuracy under APGD of each seed of a row, from the robust curve of the main world."""
    at = load(UNTARGETED)["radii"].index(eps)
    return [m["curve"][at]["rate"] for m in entries(UNTARGETED, row).values()]


def test_under_tiny_changes_jitter_keeps_more_than_the_lazy_and_fewer_under_somewhat_larger_ones():
    assert len(kept_within(0.01, "jitter")) == len(kept_within(0.01, "baseline")) == 3
    assert min(kept_within(0.01, "jitter")) > max(kept_within(0.01, "baseline"))
    assert fmean(kept_within(0.025, "jitter")) < fmean(kept_within(0.025, "baseline"))
    for eps in load(UNTARGETED)["radii"]:
        cured, lazy = (fmean(kept_within(eps, row)) for row in ("jitter", "baseline"))
        assert cured >= lazy or max(cured, lazy) < 0.06  # hardly an answer is left in either
    assert max(kept_within(0.05, row)[0] for row in ("jitter", "grl", "combined")) < 0.01


def test_the_first_coloured_pictures_are_harder_than_the_rest_and_the_first_grey_ones_easier():
    for row in ("baseline", "jitter", "grl", "combined", "unbiased/oracle"):
        for seed, model in entries(UNTARGETED, row).items():
            assert model["attacks"]["clean"]["rate"] < hard(records(RESULTS, row)[seed]), row
    for row in ("resnet50", "resnet50_clean", "resnet50_student"):
        (model,) = entries("mnist/attack_resnet", f"../mnist_27000/{row}").values()
        whole = hard(rows("mnist_27000")[row][42])
        assert model["robust"]["n"] == 200 and model["attacks"]["clean"]["rate"] > whole, row


def test_square_fools_a_few_that_gradients_had_left_on_plain_mnist():
    for row in ("at", "trades"):
        (model,) = entries("mnist/attack_at", row).values()
        left = [model["attacks"][attack]["so_far"]["k"] for attack in ("APGD-T", "Square")]
        assert 0 < left[0] - left[1] < 20


def test_our_attacks_pass_every_check():
    for file in ("attack_check_n200", "attack_at_check", "mnist/attack_check_eps0.3_n100"):
        for model in load(file)["models"].values():
            assert len(model["checks"]) == 9
            assert all(check["pass"] for check in model["checks"].values())


# ---- can it be made robust?


def test_four_wide_rows_had_one_budget_and_three_seeds():
    four = ("baseline_wide", "at_wide", "oracle_wide", "oracle_at_wide")
    seen = [runs(row) for row in four]
    assert all(found.keys() == {42, 43, 44} for found in seen)
    budget = {
        (r["params"], len(r["epochs"]), r["args"]["lr"], r["args"]["schedule"], r["args"]["batch"])
        for found in seen
        for r in found.values()
    }
    assert len(budget) == 1


def test_both_kinds_were_still_unlearning_the_colour_when_the_training_ended():
    for row in ("baseline_wide", "at_wide"):
        for run in runs(row).values():
            assert run["epochs"][-1]["test_hard"] == max(e["test_hard"] for e in run["epochs"])


def test_adversarial_training_leaves_more_of_the_shortcut_in_every_seed():
    assert max(gains("at_wide", "baseline_wide")) < -0.1
    plain = runs("baseline_wide")
    assert all(follows(run) > 1.5 * follows(plain[seed]) for seed, run in runs("at_wide").items())


def test_where_colour_says_nothing_the_same_training_costs_hardly_anything():
    assert max(map(abs, gains("oracle_at_wide", "oracle_wide"))) < 0.02


def test_the_shortcut_takes_robustness_away_too():
    robust, free = (survive(row, "attack_wide") for row in ("at_wide", "unbiased/oracle_at_wide"))
    assert len(robust) == 3 and all(robust[seed] < 0.5 * free[seed] for seed in robust)


@pytest.mark.parametrize("row", ["oracle_width16", "oracle_wide"])
def test_at_balanced_reads_conflicting_pictures_about_as_well_as_the_oracles_of_its_width(row):
    assert abs(fmean(of(row, hard)) - fmean(of("at_balanced", hard))) < 0.015


def test_at_balanced_alone_keeps_most_of_its_answers_under_attack():
    for row in ("baseline", "jitter", "balance", "at_balanced", "unbiased/oracle"):
        (model,) = entries("attack_at", row).values()
        kept = model["robust"]["rate"] > 0.5 * model["attacks"]["clean"]["rate"]
        assert kept == (row == "at_balanced"), row


def test_told_nothing_it_is_as_unbiased_and_nearly_as_robust_as_told_every_colour():
    told, nothing = (
        survive(row, "attack_safe") for row in ("at_balanced", "at_balanced_infergroups")
    )
    assert told.keys() == nothing.keys() == {42, 43, 44} and min(nothing.values()) > 0.5
    assert max(abs(told[seed] - nothing[seed]) for seed in told) < 0.06
    assert max(map(abs, gains("at_balanced_infergroups", "at_balanced"))) < 0.01
    shares = [run["groups"]["equal_colour"] for run in runs("at_balanced_infergroups").values()]
    assert sorted(shares)[1:] == [1, 1] and min(shares) > 0.9999


def test_equal_pairs_are_what_cures_and_shifts_add_robustness():
    (shortcut,) = entries("attack_safe", "at_balanced_nobalance").values()
    assert shortcut["follows_colour"] > 0.4 and shortcut["robust"]["rate"] < 0.3
    usual = survive("at_balanced", "attack_safe")[42]
    assert usual - survive("at_balanced_nocrop", "attack_safe")[42] > 0.1
    assert abs(usual - survive("at_balanced_noclean", "attack_safe")[42]) < 0.05


def test_unbiased_data_alone_are_not_enough():
    kept = [*survive("balance", "attack_at").values()]
    assert max(kept + [*survive("unbiased/oracle_wide", "attack_wide").values()]) < 0.02


def test_before_its_adversarial_epochs_the_network_keeps_nothing():
    (clean,), (robust,) = (survive(row, "mnist/attack_at").values() for row in ("at_clean", "at"))
    assert clean < 0.01 and robust > 0.8


def test_trades_comes_close_and_fgsm_promises_too_much():
    robust = {row: survive(row, "mnist/attack_at")[42] for row in ("at", "trades", "fgsm")}
    assert 0 < robust["at"] - robust["trades"] < 0.02
    (fgsm,) = entries("mnist/attack_at", "fgsm").values()
    assert fgsm["attacks"]["FGSM"]["own"]["rate"] > 0.9 and robust["fgsm"] < 0.7


def watched(row, world="mnist"):
    """Accuracy on val under PGD after every epoch, seed 42."""
    return [epoch["val_pgd"] for epoch in rows(world)[row][42]["epochs"]]


def test_the_robustness_of_fgsm_did_not_collapse():
    assert watched("fgsm") == sorted(watched("fgsm"))


def test_a_high_val_under_pgd_is_not_yet_robustness():
    assert max(of("at", hard)) < 0.01 and max(watched("at", ".")) > 0.9
    for seed, kept in survive("at_wide", "attack_wide").items():
        assert kept < 0.5 * max(e["val_pgd"] for e in runs("at_wide")[seed]["epochs"])


def test_no_network_lost_its_robustness_in_training():
    shown = [(".", row) for row in ("at", "at_wide", "at_balanced")]
    shown += [("mnist", row) for row in ("at", "trades", "fgsm")]
    shown += [("mnist_27000", row) for row in ("resnet50", "resnet50_student")]
    for world, row in shown:
        for run in rows(world)[row].values():
            under_pgd = [epoch["val_pgd"] for epoch in run["epochs"]]
            assert under_pgd[-1] > max(under_pgd) - 0.05, (world, row)


def test_both_resnets_keep_most_answers_nothing_before_and_were_still_rising():
    ours, plain, theirs = (
        entries("mnist/attack_resnet", f"../mnist_27000/resnet50{name}")[42]
        for name in ("", "_clean", "_student")
    )
    assert ours["robust"]["n"] == 200 and plain["robust"]["k"] == 0
    assert theirs["attacks"]["clean"]["k"] < ours["attacks"]["clean"]["k"]
    assert theirs["robust"]["k"] > ours["robust"]["k"] > 0.5 * ours["attacks"]["clean"]["k"]
    (project,) = published("robust_resnet")
    assert project["PGD, 20 steps"] < 0.01
    for row in ("resnet50", "resnet50_student"):
        risen = watched(row, "mnist_27000")
        assert risen == sorted(risen) and len(risen) == 4


def test_both_resnets_had_the_same_net_pictures_epochs_and_attack():
    ours, theirs = (rows("mnist_27000")[row][42] for row in ("resnet50", "resnet50_student"))
    assert ours["params"] == theirs["params"] and ours["world"] == theirs["world"]
    same = ("epochs", "batch", "lr", "eps", "steps", "step_size", "clean_epochs")
    assert all(ours["args"][key] == theirs["args"][key] for key in same)
    assert ours["args"]["eps_ramp"] > theirs["args"]["eps_ramp"] == 0


# ---- does a generator help?

ROBGAN, ROBGAN_2000 = "mnist/attack_robgan", "mnist/attack_robgan_2000"


def measured(kind, key, world="mnist"):
    return [run["generator"]["measured"][kind][key] for run in rows(world)["robgan"].values()]


def test_the_generator_draws_what_was_asked_and_varies_almost_as_much_as_real_digits():
    assert min(measured("generated", "agreement")) > 0.95
    assert min(measured("generated", "diversity")) > 0.9
    assert max(measured("collapsed", "diversity")) < 0.1


def test_the_median_picture_lies_further_from_the_training_pictures_than_real_test_digits():
    assert min(measured("generated", "nearest")) > max(measured("real", "nearest"))


def test_a_classifier_trained_on_them_alone_makes_more_mistakes_though_still_few():
    assert max(measured("generated", "trained_on")) < min(measured("real", "trained_on"))
    assert min(measured("generated", "trained_on")) > 0.95


def test_with_2000_pictures_its_digits_vary_less_and_teach_clearly_worse():
    def made_and_real(key):
        return [measured(kind, key, "mnist_2000")[0] for kind in ("generated", "real")]

    for key, least in (("diversity", 0.05), ("trained_on", 0.1)):
        made, real = made_and_real(key)
        assert made < real - least, key
    made, real = made_and_real("nearest")
    assert abs(made / real - 1) < 0.03
    assert len(rows("mnist_2000")["robgan"]) == 1


def test_the_network_beside_the_generator_is_less_robust_in_each_seed():
    with_it, without = (survive(row, ROBGAN) for row in ("robgan", "robgan_without"))
    assert with_it.keys() == without.keys() == {42, 43, 44}
    assert all(with_it[seed] < without[seed] for seed in with_it)


SHARES = ("generated_0.3", "generated_0.5", "generated_0.7")  # of generated pictures in a batch


def test_generated_pictures_as_additional_data_are_no_gain():
    none = survive("robgan_without", ROBGAN)
    for row, seeds in zip(SHARES, ({42}, {42, 43, 44}, {42}), strict=True):
        found = survive(row, ROBGAN)
        assert found.keys() == seeds <= none.keys()
        assert fmean(found.values()) < fmean(none[seed] for seed in found)
    half = survive("generated_0.5", ROBGAN)
    assert max(half[seed] - none[seed] for seed in half) > 0, "though not in every seed"
    spread = max(half.values()) - min(half.values())
    assert fmean(none.values()) - fmean(half.values()) < spread


def test_with_few_pictures_they_help_a_little_at_the_smaller_shares_in_each_seed():
    without = "../mnist_2000/robgan_without"
    none, right = survive(without, ROBGAN_2000), clean(ROBGAN_2000, without)
    for row, times in zip(SHARES, (3, 3, 2), strict=True):
        row = f"../mnist_2000/{row}"
        found = survive(row, ROBGAN_2000)
        assert found.keys() == none.keys() == {42, 43, 44}
        assert sum(found[seed] > none[seed] for seed in none) == times
        if times == 3:
            assert 0.015 < fmean(found.values()) - fmean(none.values()) < 0.035
        costs = [right[seed] - k for seed, k in clean(ROBGAN_2000, row).items()]
        assert min(costs) > 0, row


def test_both_got_the_same_network_and_number_of_epochs():
    about = [
        (run["params"], len(run["epochs"]))
        for row in ("robgan", "robgan_without", *SHARES)
        for run in rows("mnist")[row].values()
    ]
    assert len(set(about)) == 1
