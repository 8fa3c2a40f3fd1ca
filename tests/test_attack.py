"""The attacks against models whose worst case is known in closed form, and the command line on a made-up world."""

import json
import math
import shutil
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import attack
from common import pgd, save_json, save_pt, stream, wilson

TWO = "baseline_s42 jitter_s42"


class Linear(nn.Module):
    """Logits (-m, m) with m = <w, x> + b, so class 1 leads by 2 m; no sign step can do better than eps * |w| (summed) on m."""

    def __init__(self, gen, size=8, sharpness=1.0):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, size, size, generator=gen) * sharpness)

    def margin(self, x):
        return (x - 0.5).flatten(1) @ self.w.flatten()

    def forward(self, x):
        return torch.stack([-self.margin(x), self.margin(x)], 1)


@pytest.fixture
def linear():
    """A linear model and 40 mid-grey images that it gives to class 0, so far from black and white that the box never binds."""
    gen = torch.Generator().manual_seed(0)
    model = Linear(gen)
    x = 0.5 + 0.1 * (torch.rand(200, 3, 8, 8, generator=gen) - 0.5)
    x = x[model.margin(x) < 0][:40].contiguous(memory_format=torch.channels_last)
    return model, x


def ones(x):
    return torch.ones(len(x), dtype=torch.long)


def test_pgd_finds_the_worst_case_of_a_linear_model(linear):
    model, x = linear
    eps = 0.05
    x_adv = pgd(model, x, 0 * ones(x), eps, 40, stream(0, "t")).x
    assert torch.allclose(
        model.margin(x_adv), model.margin(x) + eps * model.w.abs().sum(), atol=1e-4
    )
    assert (x_adv - x).abs().max() <= eps + 1e-6


def test_pgd_stays_in_the_ball_and_the_box_and_leaves_the_model_alone():
    gen = torch.Generator().manual_seed(1)
    model, x = (
        Linear(gen).train(),
        torch.rand(20, 3, 8, 8, generator=gen).round(),
    )  # black and white: the box binds everywhere
    x_adv = pgd(model, x, 0 * ones(x), 0.3, 10, gen).x
    assert (x_adv - x).abs().max() <= 0.3 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert model.training and model.w.grad is None
    pgd(model.eval(), x, 0 * ones(x), 0.3, 1, gen)
    assert not model.training


@pytest.mark.parametrize("stop, looks", [(None, 5), (attack.is_wrong, 6)])
def test_five_steps_are_five_looks_at_the_model_and_one_more_for_who_asks(linear, stop, looks):
    model, x = linear
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    result = pgd(model, x, 0 * ones(x), 1e-4, 5, stream(0, "t"), stop=stop)
    assert (
        len(seen) == looks
        and (result.steps == 5).all()
        and torch.equal(result.done, torch.zeros(len(x), dtype=torch.bool))
    )


def test_early_stop_changes_who_pays_not_who_succeeds(linear):
    model, x = linear
    eps = float((-model.margin(x) / model.w.abs().sum()).detach().median())  # splits the images
    run = lambda stop: pgd(model, x, ones(x), eps, 30, stream(0, "t"), targeted=True, stop=stop)
    stopped, full = run(attack.says), run(None)
    reached = attack.says(model(full.x), ones(x))
    assert 0 < reached.sum() < len(x)
    assert torch.equal(stopped.done, reached)
    assert (stopped.steps[reached] < 30).all() and (stopped.steps[~reached] == 30).all()


def test_fgsm_is_the_closed_form(linear):
    model, x = linear
    x_adv = attack.fgsm(model, x, 0 * ones(x), torch.full((len(x),), 0.03), 1, None).x
    assert torch.allclose(x_adv, x + 0.03 * model.w.detach().sign(), atol=1e-6)


def test_min_eps_of_a_linear_model(linear):
    model, x = linear
    found = attack.search_min_eps(model, x, ones(x), [0.01, 0.03, 0.1], stream(0, "t"))
    size = model.w.abs().sum()
    needed = {
        "argmax": -model.margin(x) / size,
        "confidence": (math.log(9) / 2 - model.margin(x)) / size,
    }  # sigmoid(2 m) = 0.9
    for criterion, radius in needed.items():
        error = found[criterion] - radius.detach()
        assert error.min() >= -1e-6, "no attack can beat the closed form"
        assert error.max() <= attack.RESOLUTION, criterion


def test_min_eps_is_zero_where_nothing_is_needed_and_infinite_out_of_reach(linear):
    model, x = linear
    there = x + (0.6 - x) * (model.w > 0) + (0.4 - x) * (model.w < 0)  # class 1 beyond doubt
    assert all(
        (v == 0).all()
        for v in attack.search_min_eps(
            model, there.detach(), ones(x), [0.1], stream(0, "t")
        ).values()
    )
    dull = Linear(
        torch.Generator().manual_seed(0), sharpness=1e-3
    )  # its confidence never reaches 0.9
    found = attack.search_min_eps(dull, x, ones(x), [0.01, 0.1], stream(0, "t"), steps=5)
    assert found["argmax"].isfinite().all() and found["confidence"].isinf().all()


def test_square_stays_in_the_ball_and_fools_without_gradients(linear):
    model, x = linear
    eps = torch.full((len(x),), 0.05)
    a = attack.square(model, x, 0 * ones(x), eps, 100, stream(0, "t"))
    assert (a.x - x).abs().max() <= 0.05 + 1e-6 and a.x.min() >= 0 and a.x.max() <= 1
    assert a.done.float().mean() > 0.5 and torch.equal(a.done, model(a.x).argmax(1) == 1)
    assert a.steps.max() <= 100


def test_the_judge_believes_nobody(linear):
    model, x = linear
    liar = lambda x, y, eps: attack.Attacked(
        torch.ones_like(x) * 2, ones(x), torch.ones(len(x), dtype=torch.bool)
    )
    assert not attack.carry_out(liar, model, lambda logits, y: y == y, x, ones(x), 0.1).done.any()
    assert len(attack.carry_out(liar, model, attack.says, x[:0], ones(x[:0]), 0.1).x) == 0


def test_margin_and_criteria():
    logits, y = torch.tensor([[2.0, 0.0, 1.0], [0.0, 5.0, 0.0]]), torch.tensor([0, 0])
    assert torch.equal(attack.lead(logits, y), torch.tensor([-1.0, 5.0]))
    assert attack.says(logits, y).tolist() == [True, False] and attack.is_wrong(
        logits, y
    ).tolist() == [False, True]
    assert attack.is_sure(
        torch.tensor([[math.log(9.1), 0.0], [math.log(8.9), 0.0]]), y
    ).tolist() == [True, False]


# ---------------------------------------------------------------- numbers


def test_wilson_against_the_textbook():
    assert [round(v, 3) for v in wilson(8, 10)] == [0.490, 0.943]


def test_bootstrap_on_known_cases():
    constant = attack.bootstrap(torch.full((3, 50), -0.01), torch.nanmedian, stream(0, "b"))
    assert constant == {"value": -0.01, "low": -0.01, "high": -0.01}
    symmetric = attack.bootstrap(torch.linspace(-1, 1, 201)[None], torch.nanmedian, stream(0, "b"))
    assert symmetric["low"] < 0 < symmetric["high"]
    assert attack.bootstrap(torch.full((1, 5), math.nan), torch.nanmedian, stream(0, "b"), 20) == {
        "value": None,
        "low": None,
        "high": None,
    }


def test_bootstrap_of_a_mean_has_the_width_of_theory():
    values = torch.randn(1, 400, generator=stream(0, "v"), dtype=torch.double)
    b = attack.bootstrap(values, torch.nanmean, stream(0, "b"))
    assert (b["high"] - b["low"]) / (2 * 1.96 * values.std() / 20) == pytest.approx(1, abs=0.1)


def made_up(argmax, confidence, all_=None):
    case = lambda low, high: {
        "n": 100,
        "min_eps": {"value": (low + high) / 2, "low": low, "high": high},
        "needs_less": {"value": 0.5},
    }
    both = {"argmax": case(*argmax), "confidence": case(*confidence)}
    return {"reference": "lazy", "other": "cured", "both_right": both, "all": all_ or both}


@pytest.mark.parametrize(
    "argmax, confidence, wanted",
    [
        ((-0.02, -0.01), (-0.03, -0.01), "cured is easier to fool than lazy by either criterion"),
        ((0.01, 0.02), (0.01, 0.03), "cured is harder to fool than lazy by either criterion"),
        (
            (-0.01, 0.01),
            (-0.01, 0.02),
            "cured is neither clearly easier nor clearly harder to fool than lazy by either criterion",
        ),
        (
            (-0.02, -0.01),
            (0.01, 0.02),
            "easier to fool than lazy by argmax but harder to fool than lazy by confidence (so it depends on the criterion)",
        ),
    ],
)
def test_verdict(argmax, confidence, wanted):
    sentence = attack.verdict(made_up(argmax, confidence), 7, 3)
    assert (
        wanted in sentence
        and "on 100 images" in sentence
        and sentence.endswith("the same holds on all images.")
    )


def test_verdict_says_when_misread_images_change_it():
    changed = attack.verdict(
        made_up((-0.02, -0.01), (-0.02, -0.01), made_up((0.01, 0.02), (0.01, 0.02))["both_right"]),
        7,
        3,
    )
    assert changed.endswith(
        "on all images, misread ones too, it is harder to fool than lazy by either criterion."
    )


def test_compare_pairs_by_seed_and_image():
    entry = lambda method, seed, shift: {
        "method": method,
        "seed": seed,
        "clean": [7, 7, 7, 1],
        **{
            c: {"steps": [1, 2, None, 4], "min_eps": [0.1 + shift, 0.2 + shift, None, 0.3]}
            for c in attack.CRITERIA
        },
    }
    models = {
        "a_s1": entry("a", 1, 0),
        "b_s1": entry("b", 1, -0.05),
        "b_s2": entry("b", 2, 9),
    }  # a has no seed 2: that one is left out
    (found,) = attack.compare(models, types.SimpleNamespace(src=7, sweep=[0.5], seed=0))
    assert (
        found["seeds"] == 1
        and found["all"]["argmax"]["n"] == 4
        and found["both_right"]["argmax"]["n"] == 3
    )
    assert found["both_right"]["argmax"]["min_eps"]["value"] == pytest.approx(-0.05)
    assert found["both_right"]["argmax"]["needs_less"]["value"] == pytest.approx(2 / 3, abs=1e-4)
    assert found["all"]["argmax"]["success"]["value"] == 0


# ---------------------------------------------------------------- the command line


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A tiny world and two models that learned it, as train.py would save them."""
    import conftest
    from common import build_model, load_splits

    folder = tmp_path_factory.mktemp("world") / "results"
    conftest.write_world(folder)
    split = load_splits(folder, ["train"])["train"]
    for seed, name in enumerate(TWO.split()):
        torch.manual_seed(seed)
        model = build_model()
        optimiser = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(60):
            optimiser.zero_grad()
            F.cross_entropy(model(split.x(slice(None))), split.labels).backward()
            optimiser.step()
        args = {"method": name[:-4], "seed": 42, "model": "simplecnn", "width": 4}
        save_pt(
            {"weights": model.state_dict(), "args": args, "classes": 10, "size": [28, 28]},
            folder / f"{name}.pt",
        )
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """The same command line without the two seconds that a new process takes: (exit code, stdout, stderr)."""

    def run(command):
        monkeypatch.setattr("sys.argv", command.split())
        try:
            attack.main(command.split()[1:])
            code = 0
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return run


def outside_run(path):
    record = json.loads(path.read_text())
    assert record["run"]["seconds"] >= 0
    return json.dumps({k: v for k, v in record.items() if k != "run"})


@pytest.mark.parametrize(
    "command, name, keys",
    [
        (
            "--eps 0.05 --steps 5 --sweep 0.02 0.1",
            "7to3",
            {"index", "models", "summary", "compared", "verdict"},
        ),
        ("--pairs --n 2 --steps 3", "pairs", {"models", "n_per_digit"}),
        (
            "--untargeted --steps 3 --restarts 2",
            "untargeted",
            {"models", "n", "sample", "queries", "radii", "transfer"},
        ),
        ("--check --steps 3 --n 20", "check", {"models", "n", "passed"}),
    ],
)
def test_each_mode_runs_and_repeats(trained, cli, call, command, name, keys):
    path = trained / f"attack_{name}.json"
    first = cli(f"attack.py --dir {trained} {command}", check=False)
    before, record = outside_run(path), json.loads(path.read_text())
    assert set(record) == keys | {"schema", "script", "mode", "args", "run"} and set(
        record["models"]
    ) == set(TWO.split())
    assert (
        first.returncode == (0 if record.get("passed", True) else 1)
        and "Traceback" not in first.stderr
    ), first.stderr
    assert (
        call(f"attack.py --dir {trained} {command}")[0] == first.returncode
        and outside_run(path) == before
    )
    code, tables, _ = call(f"attack.py --dir {trained} --report")
    assert code == 0 and all(
        (trained / line.split("](")[1][:-1]).is_file()
        for line in tables.splitlines()
        if line.startswith("![")
    )
    assert outside_run(path) == before, "--report computes nothing"


def test_the_lists_are_parallel_and_the_worst_case_is_the_worst(trained, call):
    call(f"attack.py --dir {trained} --steps 3 --sweep 0.05")
    call(f"attack.py --dir {trained} --untargeted --steps 3")
    record = json.loads((trained / "attack_7to3.json").read_text())
    for m in record["models"].values():
        assert {
            len(m["clean"]),
            *(len(m[c][k]) for c in attack.CRITERIA for k in ("steps", "min_eps")),
        } == {len(record["index"])}
    for m in json.loads((trained / "attack_untargeted.json").read_text())["models"].values():
        assert (
            m["robust"]["k"]
            == m["standing"].count("1")
            <= min(m["attacks"][a]["own"]["k"] for a in ("FGSM", "PGD"))
        )


@pytest.mark.parametrize(
    "command, wrong",
    [
        ("--src 7 --tgt 7", "both 7"),
        ("--src 10", "end at 9"),
        ("--tgt 12", "end at 9"),
        ("--src -1", "--src"),
        ("--eps nan", "--eps"),
        ("--eps 2", "--eps"),
        ("--eps -0.1", "--eps"),
        ("--steps 0", "--steps"),
        ("--sweep 0", "--sweep"),
        ("--models nobody_s1", "nobody_s1.pt is missing"),
        ("--models odd_s1", "built for"),
        ("--split nowhere", "--split"),
        ("--pairs --check", "not allowed"),
        ("--pairs --src 3", "--src has no meaning"),
        ("--check --decay", "--decay has no meaning"),
        ("--report --pairs", "--report"),
        (f"--models {TWO} jitter_s42", "share one row"),
        ("--dir nowhere", "missing"),
        ("--dir nowhere --report", "no results"),
        ("--nonsense", "--nonsense"),
        ("--split val --src 9", "no image of digit 9"),
        ("--name x", "--name has no meaning"),
        ("--untargeted --name a/b", "--name"),
        ("--untargeted --name check", "--name"),
        ("--queries 5", "--queries has no meaning"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    trained, call, monkeypatch, tmp_path, command, wrong
):
    from common import build_model, load_pt

    if "odd_s1" in command:
        save_pt(
            {
                "weights": build_model(classes=5).state_dict(),
                "args": {"model": "simplecnn", "width": 4, "method": "odd", "seed": 1},
                "classes": 5,
                "size": [28, 28],
            },
            trained / "odd_s1.pt",
        )
    if "--split val --src 9" in command:
        val = load_pt(trained / "val.pt", "")
        save_pt({k: v[val["labels"] != 9] for k, v in val.items()}, trained / "val.pt")
    monkeypatch.chdir(tmp_path)
    code, _, said = call(f"attack.py {'' if '--dir' in command else f'--dir {trained}'} {command}")
    assert code == 2 and len(said.splitlines()) == 1, said
    assert said.startswith("attack.py: ") and "; " in said and wrong in said


def test_one_model_is_enough_but_there_is_nothing_to_compare(trained, call):
    call(f"attack.py --dir {trained} --models jitter_s42 --steps 2 --sweep 0.05 --tgt 1")
    assert "nothing to compare" in json.loads((trained / "attack_7to1.json").read_text())["verdict"]


def test_a_named_run_stands_beside_the_others_and_plain_mnist_beside_what_was_published(
    trained, call
):
    inside = trained / "mnist"
    inside.mkdir()
    for name in ("test_hard.pt", "jitter_s42.pt"):
        shutil.copy(trained / name, inside / name)
    save_json(
        {"schema": 1, "script": "make_data.py", "recipe": "gray", "is_mnist": True, "seed": 42},
        inside / "meta.json",
    )
    before = {path: path.read_bytes() for path in trained.glob("attack_*.json")}
    assert (
        call(
            f"attack.py --dir {inside} --untargeted --eps 0.3 --steps 2 --models jitter_s42 --name strong"
        )[0]
        == 0
    )
    assert {path: path.read_bytes() for path in trained.glob("attack_*.json")} == before
    _, tables, _ = call(f"attack.py --dir {trained} --report")
    assert (
        "Any wrong answer, in mnist, strong, eps 0.3" in tables
        and "| Madry et al. (2018) | 0.9853 |" in tables
    )
    assert "(mnist/figures/attack_strong_robust_curve.png)" in tables
    assert (
        json.loads((inside / "attack_strong.json").read_text())["models"]["jitter_s42"][
            "follows_colour"
        ]
        > 0
    )
