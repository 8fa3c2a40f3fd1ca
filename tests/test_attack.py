"""The attacks against models whose answer is known in closed form, and the command line."""

import json
import math
import re
import shutil
import types

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import made_up_digits

import attack
from common import INK, build_model, load_split, save_json, save_pt, stream

TWO = "baseline_s42 jitter_s42"


class Linear(nn.Module):
    """Logits (-m, m) with m = <w, x> + b: a step of the signs is the best there is, eps * |w|."""

    def __init__(self, gen, size=8, sharpness=1.0):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, size, size, generator=gen) * sharpness)

    def margin(self, x):
        return (x - 0.5).flatten(1) @ self.w.flatten()

    def forward(self, x):
        return torch.stack([-self.margin(x), self.margin(x)], 1)


@pytest.fixture
def linear():
    """A linear model and 40 mid-grey images of class 0; the box [0, 1] never binds."""
    gen = torch.Generator().manual_seed(0)
    model = Linear(gen)
    x = 0.5 + 0.1 * (torch.rand(200, 3, 8, 8, generator=gen) - 0.5)
    return model, x[model.margin(x) < 0][:40].contiguous(memory_format=torch.channels_last)


def ones(x):
    return torch.ones(len(x), dtype=torch.long)


# ---- the attack


def test_pgd_finds_the_worst_case_of_a_linear_model(linear):
    model, x = linear
    x_adv = attack.pgd(model, x, 0 * ones(x), 0.05, 40, stream(0, "t")).x
    worst = model.margin(x) + 0.05 * model.w.abs().sum()
    assert torch.allclose(model.margin(x_adv), worst, atol=1e-4)


def test_pgd_stays_in_the_ball_and_the_box_and_leaves_the_model_alone():
    gen = torch.Generator().manual_seed(1)
    model, x = Linear(gen).train(), torch.rand(20, 3, 8, 8, generator=gen).round()
    x_adv = attack.pgd(model, x, 0 * ones(x), 0.3, 10, gen).x
    assert (x_adv - x).abs().max() <= 0.3 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert model.training and model.w.grad is None
    attack.pgd(model.eval(), x, 0 * ones(x), 0.3, 1, gen)
    assert not model.training


@pytest.mark.parametrize("decay, wanted", [(False, [4, 8, 12, 16]), (True, [4, 7.1, 9.3, 10.6])])
def test_pgd_steps_by_hand(linear, decay, wanted):
    """Steps of 0.004; with decay 4, 3.1, 2.2, 1.3 thousandths, always up the gradient's sign."""
    model, x = linear
    seen, sign = [], model.w.detach().sign()
    model.register_forward_pre_hook(lambda _, z: seen.append(((z[0] - x) * sign).detach()))
    how = {"step_size": 0.004, "decay": decay, "start": x}
    a = attack.pgd(model, x, 0 * ones(x), 1.0, 4, None, **how)
    walked = [*seen[1:], (a.x - x) * sign]
    for moved, far in zip(walked, wanted, strict=True):
        assert torch.allclose(moved, torch.full_like(moved, far / 1000), atol=1e-6)


def test_the_usual_step_is_a_tenth_of_eps_and_a_target_turns_it(linear):
    model, x = linear
    away = attack.pgd(model, x, 0 * ones(x), 0.2, 1, None, start=x).x - x
    towards = attack.pgd(model, x, 0 * ones(x), 0.2, 1, None, start=x, targeted=True).x - x
    assert torch.allclose(away, 0.02 * model.w.detach().sign().expand_as(x), atol=1e-6)
    assert torch.allclose(towards, -away, atol=1e-6)


def test_a_random_start_fills_the_ball():
    moved = attack.random_start(torch.zeros(50, 3, 8, 8), 0.1, stream(0, "t"))
    assert -0.1 <= moved.min() < -0.099 and 0.099 < moved.max() <= 0.1
    assert moved.mean().abs() < 0.002


@pytest.mark.parametrize("stop, looks", [(None, 5), (attack.is_wrong, 6)])
def test_five_steps_are_five_looks_at_the_model_and_one_more_for_who_asks(linear, stop, looks):
    model, x = linear
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    result = attack.pgd(model, x, 0 * ones(x), 1e-4, 5, stream(0, "t"), stop=stop)
    assert len(seen) == looks and (result.steps == 5).all() and not result.done.any()


def test_early_stop_changes_who_pays_not_who_succeeds(linear):
    model, x = linear
    eps = float((-model.margin(x) / model.w.abs().sum()).detach().median())  # splits the images
    both = []
    for stop in (attack.says, None):
        gen = stream(0, "t")
        both.append(attack.pgd(model, x, ones(x), eps, 30, gen, targeted=True, stop=stop))
    stopped, full = both
    reached = attack.says(model(full.x), ones(x))
    assert 0 < reached.sum() < len(x) and torch.equal(stopped.done, reached)
    assert (stopped.steps[reached] < 30).all() and (stopped.steps[~reached] == 30).all()


# ---- what counts as fooled


def test_margin_and_criteria():
    logits, y = torch.tensor([[2.0, 0.0, 1.0], [0.0, 5.0, 0.0]]), torch.tensor([0, 0])
    assert attack.lead(logits, y).tolist() == [-1, 5] and attack.margin(logits, y) == 2
    assert attack.says(logits, y).tolist() == [True, False]
    assert attack.is_wrong(logits, y).tolist() == [False, True]
    near = torch.tensor([[math.log(9.1), 0.0], [math.log(8.9), 0.0]])  # 0.901 and 0.899
    assert attack.is_sure(near, y).tolist() == [True, False]


def test_the_judge_sees_the_ball_the_box_and_the_answer():
    x = torch.full((6, 3, 2, 2), 0.5)
    x[3:5] = torch.tensor([0.99, 0.01]).view(2, 1, 1, 1)
    x_adv = x.clone()
    moved = torch.tensor([0.1, 0.101, -0.101, 0.02, -0.02, 0.1])  # of one pixel of each image
    x_adv[:, 1, 0, 1] += moved
    assert attack.judge(nn.Flatten(), x, ones(x), 0.1, x_adv, lambda z, y: y == y).tolist() == [
        True,  # just inside
        False,
        False,
        False,  # above 1
        False,  # below 0
        True,
    ]
    assert not attack.judge(nn.Flatten(), x, ones(x), 0.1, x_adv, lambda z, y: y == 0).any()


def in_no_steps(x_adv):
    return attack.Attacked(x_adv, torch.zeros(len(x_adv), dtype=torch.long), None)


def test_chunks_keep_images_radii_and_more_together(monkeypatch):
    monkeypatch.setattr(attack, "CHUNK", 2)
    x, eps = torch.linspace(0.1, 0.5, 5).view(5, 1, 1, 1), torch.linspace(0.01, 0.05, 5)
    sizes = []

    def add(x, y, eps, step):
        sizes.append(len(x))
        return in_no_steps(x + eps.view(-1, 1, 1, 1) * step.view(-1, 1, 1, 1))

    step = torch.tensor([1.0, 1, 2, 1, 0])  # the third leaves its ball
    y = torch.arange(5)
    a = attack.carry_out(add, nn.Flatten(), lambda z, y: y < 4, x, y, eps, step=step)
    assert sizes == [2, 2, 1] and a.done.tolist() == [True, True, False, True, False]
    assert torch.allclose(a.x.flatten(), torch.tensor([0.11, 0.22, 0.36, 0.44, 0.5]))


# ---- targeted


@pytest.mark.parametrize("steps", [30, 5])
def test_headline_counts_the_steps_to_both_marks(linear, steps):
    """Walked again by a plain loop, one image at a time."""
    model, x = linear
    args = types.SimpleNamespace(eps=0.03, steps=steps)
    found, _ = attack.headline(model, x, ones(x), args, stream(0, "t"))
    start, sign = attack.random_start(x, 0.03, stream(0, "t")), model.w.detach().sign()
    marks = {"argmax": 0.0, "confidence": math.log(9) / 2}  # sigmoid(2 m) = 0.9
    assert found["argmax"].isfinite().any() and (found["confidence"] > found["argmax"]).any()
    sure = found["confidence"][found["confidence"].isfinite()]
    assert (sure > 5).any() == (steps == 30), "the limit holds for both marks together"
    for i in range(len(x)):
        z, wanted = start[i : i + 1], dict.fromkeys(marks, math.inf)
        for step in range(steps + 1):
            for name, mark in marks.items():
                if model.margin(z) >= mark:
                    wanted[name] = min(wanted[name], step)
            z = torch.maximum(torch.minimum(z + 0.003 * sign, x[i] + 0.03), x[i] - 0.03)
        for name in marks:
            assert float(found[name][i]) == wanted[name]


def test_min_eps_of_a_linear_model(linear):
    model, x = linear
    found = attack.search_min_eps(model, x, ones(x), [0.01, 0.03, 0.1], stream(0, "t"), 50)
    size = model.w.abs().sum()
    needed = {"argmax": -model.margin(x) / size}
    needed["confidence"] = (math.log(9) / 2 - model.margin(x)) / size  # sigmoid(2 m) = 0.9
    for criterion, radius in needed.items():
        error = found[criterion] - radius.detach()
        assert error.min() >= -1e-6, "no attack can beat the closed form"
        assert error.max() <= attack.RESOLUTION, criterion


def test_min_eps_is_zero_where_nothing_is_needed_and_infinite_out_of_reach(linear):
    model, x = linear
    there = x + (0.6 - x) * (model.w > 0) + (0.4 - x) * (model.w < 0)  # class 1 beyond doubt
    found = attack.search_min_eps(model, there.detach(), ones(x), [0.1], stream(0, "t"), 5)
    assert all((radii == 0).all() for radii in found.values())
    dull = Linear(torch.Generator().manual_seed(0), sharpness=1e-3)  # never as sure as 0.9
    found = attack.search_min_eps(dull, x, ones(x), [0.01, 0.1], stream(0, "t"), 5)
    assert found["argmax"].isfinite().all() and found["confidence"].isinf().all()


def test_the_second_loss_gets_who_resisted_the_first(monkeypatch):
    calls = []

    def pgd(model, x, y, eps, loss, **how):
        calls.append((loss, x.flatten().tolist(), (how["step_size"] / eps).tolist()))
        fell = x.flatten() < 0.3 if loss is attack.margin else x.flatten() < 0.6
        return attack.Attacked(torch.where(fell, 1.0, 0.0).view(-1, 1, 1, 1), ones(x), None)

    monkeypatch.setattr(attack, "pgd", pgd)
    x = torch.tensor([0.1, 0.5, 0.9]).view(-1, 1, 1, 1)
    criterion = attack.CRITERIA["argmax"]._replace(reached=lambda z, y: z[:, 0] == 1)
    a = attack.strongest(nn.Flatten(), criterion, x, 0 * ones(x), torch.ones(3), x, 5)
    assert a.done.tolist() == [True, True, False] and a.steps.tolist() == [1, 2, 2]
    assert [loss for loss, *_ in calls] == [attack.margin, F.cross_entropy]
    assert [len(images) for _, images, _ in calls] == [3, 2] and set(calls[0][2]) == {0.25}
    assert [c.losses[-1] for c in attack.CRITERIA.values()] == [F.cross_entropy] * 2


# ---- pairs


def test_pairs_are_rows_of_the_digit_shown_and_columns_of_the_one_wanted(monkeypatch):
    labels = torch.tensor([0, 0, 1, 2, 2, 0])
    wrong = torch.tensor([1, 0, 1, 2, 2, 0])  # the second model misreads the first image
    answers = iter([labels, wrong])
    monkeypatch.setattr(attack, "answer", lambda net, x: next(answers))

    def strongest(net, criterion, x, y, eps, start, steps):
        shown = (x[:, 0, 0, 0] * 255).round().long()
        done = (y > labels[shown]) if criterion.losses[0] is attack.margin else shown == 5
        return attack.Attacked(x, y, done)

    monkeypatch.setattr(attack, "strongest", strongest)
    x = torch.arange(6).view(6, 1, 1, 1).expand(6, 3, 1, 1) / 255
    split = types.SimpleNamespace(labels=labels, x=lambda i: x[i])
    models = {n: attack.Loaded(None, {"method": n, "seed": 1}, 3) for n in "ab"}
    record = attack.pairs(models, split, types.SimpleNamespace(seed=1, n=2, eps=0.1, steps=1))
    m = record["models"]["a"]
    assert record["n_per_digit"] == [2, 1, 2]
    assert m["argmax"] == [[None, 1, 1], [0, None, 1], [0, 0, None]]
    assert m["confidence"] == [[None, 0.5, 0.5], [0, None, 0], [0, 0, None]]
    assert (m["argmax_mean"]["k"], m["argmax_mean"]["n"], m["confidence_mean"]["k"]) == (5, 10, 2)


# ---- untargeted


def test_fgsm_is_the_closed_form(linear):
    model, x = linear
    x_adv = attack.fgsm(model, x, 0 * ones(x), torch.full((len(x),), 0.03), 1, None).x
    assert torch.allclose(x_adv, x + 0.03 * model.w.detach().sign(), atol=1e-6)


def test_pgd_falls_from_a_quarter_of_eps_until_wrong(monkeypatch):
    monkeypatch.setattr(attack, "pgd", lambda *a, **how: (a, how))
    (*_, step_size), how = attack.ATTACKS["PGD"]("net", "x", "y", torch.ones(1), steps=7, gen=None)
    assert step_size == 0.25 and how == {"decay": True, "stop": attack.is_wrong}


def test_apgd_finds_the_worst_case_of_a_linear_model(linear):
    model, x = linear
    reach = model.w.abs().sum()
    eps = (-model.margin(x) / reach).detach() * torch.tensor([0.5, 1.5]).repeat(len(x))[: len(x)]
    a = attack.apgd(model, x, 0 * ones(x), eps, 30, stream(0, "t"))
    assert a.done.tolist() == [i % 2 == 1 for i in range(len(x))]  # whoever can be fooled
    standing = ~a.done
    worst = (model.margin(x) + eps * reach)[standing]
    assert torch.allclose(model.margin(a.x)[standing], worst, atol=1e-4)
    assert (model(a.x).argmax(1) == 1)[a.done].all()
    assert (a.steps[standing] == 30).all() and a.steps[a.done].max() <= 2


def test_apgd_stays_in_the_ball_and_the_box():
    gen = torch.Generator().manual_seed(1)
    model, x = Linear(gen), torch.rand(20, 3, 8, 8, generator=gen).round()
    eps = torch.linspace(0.01, 0.4, 20)
    for y in (0, 1):
        a = attack.apgd(model, x, torch.full((20,), y), eps, 12, stream(0, "t"))
        assert (attack.distance(a.x, x) <= eps + 1e-6).all()
        assert a.x.min() >= 0 and a.x.max() <= 1


class Flat(nn.Module):
    """Constant logits, class 0 ahead, whose gradient is not zero; counts its calls."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        pull = x.flatten(1).sum(1, keepdim=True)
        return torch.tensor([[2.0, 1.0, 0.0]]) + (pull - pull.detach()) * torch.tensor([-1, 1, 0])


def test_apgd_halves_its_step_at_the_authors_checkpoints_where_the_loss_does_not_rise(monkeypatch):
    model, halvings = Flat(), []

    def where(mask, a, b, real=attack.where):
        if a.shape[1:] == (1, 1, 1):  # step sizes
            halvings.append((model.calls - 1, mask.tolist(), float(a[0])))
        return real(mask, a, b)

    monkeypatch.setattr(attack, "where", where)
    x = torch.full((2, 3, 4, 4), 0.5)
    attack.apgd(model, x, torch.zeros(2).long(), torch.tensor([0.1, 0.1]), 100, stream(0, "t"))
    assert [step for step, *_ in halvings] == [22, 41, 57, 70, 80, 87, 93, 99]  # of 100
    assert all(mask == [True, True] for _, mask, _ in halvings)
    assert [rate for *_, rate in halvings] == pytest.approx([0.2 / 2**k for k in range(1, 9)])


def test_the_difference_of_logits_ratio_by_hand():
    logits, y = torch.tensor([[5.0, 1.0, 3.0, 0.0], [0.0, 2.0, 4.0, 8.0]]), torch.tensor([0, 1])
    target = torch.tensor([2, 3])
    by_hand = [(3 - 5) / (5 - 0.5 * (1 + 0)), (8 - 2) / (8 - 0.5 * (2 + 0))]
    assert attack.targeted_dlr(logits, y, target).tolist() == pytest.approx(by_hand)
    scaled = attack.targeted_dlr(7 * logits + 3, y, target).tolist()
    assert scaled == pytest.approx(by_hand), "no matter how sure the model is"
    two = attack.targeted_dlr(logits[:, :2], y, 1 - y).tolist()
    assert two == pytest.approx([-4, -2])


def test_apgd_t_aims_at_nine_other_classes_the_strongest_first(monkeypatch):
    seen = []

    def apgd(model, x, y, eps, steps, gen, loss, target):
        seen.append((x.flatten().tolist(), target.tolist()))
        return attack.Attacked(x, torch.ones_like(y), (x.flatten() == 2) & (target == 5))

    monkeypatch.setattr(attack, "apgd", apgd)
    logits = torch.arange(12.0).repeat(2, 1)
    x, y, eps = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1), torch.tensor([11, 3]), torch.ones(2)
    a = attack.apgd_targeted(lambda x: logits, x, y, eps, 4, None)
    assert seen[0] == ([1, 2], [10, 11]) and seen[6] == ([1, 2], [4, 5])
    assert seen[7:] == [([1], [3]), ([1], [2])]
    assert a.done.tolist() == [False, True] and a.steps.tolist() == [9, 7]


@pytest.mark.slow
def test_apgd_is_as_strong_as_that_of_torchattacks(seed=0):
    """On a small net trained on made-up digits, at a radius that fools about half."""
    torchattacks = pytest.importorskip("torchattacks")
    gray, y = made_up_digits(200, seed=seed)
    x = (gray[:, None].float() / 255).expand(-1, 3, -1, -1).contiguous()
    torch.manual_seed(seed)
    net = build_model(width=8)
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(40):
        optimiser.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimiser.step()
    net.eval()
    for eps in (0.1, 0.15):
        how = {"norm": "Linf", "eps": eps, "steps": 50, "n_restarts": 1}
        theirs = torchattacks.APGD(net, **how, loss="ce"), torchattacks.APGDT(net, **how)
        for ours, other in zip((attack.apgd, attack.apgd_targeted), theirs, strict=True):
            a = ours(net, x, y, torch.full((200,), eps), 50, stream(seed, "t"))
            left = (net(other(x, y)).argmax(1) == y).double().mean().item()
            assert 0.02 < left < 0.98, left
            assert (~a.done).double().mean().item() == pytest.approx(left, abs=0.015)


def test_square_stays_in_the_ball_and_fools_without_gradients(linear):
    model, x = linear
    a = attack.square(model, x, 0 * ones(x), torch.full((len(x),), 0.05), 100, stream(0, "t"))
    assert (a.x - x).abs().max() <= 0.05 + 1e-6 and a.x.min() >= 0 and a.x.max() <= 1
    assert a.done.float().mean() > 0.5 and torch.equal(a.done, model(a.x).argmax(1) == 1)
    assert a.steps.max() <= 100
    signs = attack.random_signs(x, (len(x), 3, 1, 8), stream(0, "t"))
    first = attack.moved(x, torch.full((len(x),), 0.05), signs)
    assert (model.margin(a.x) >= model.margin(first)).all(), "a query never makes it worse"


def test_squares_shrink_on_the_authors_schedule(linear, monkeypatch):
    model, x = linear
    sides, covered = [], attack.covered
    monkeypatch.setattr(
        attack, "covered", lambda x, n, s, g: sides.append(s) or covered(x, n, s, g)
    )
    a = attack.square(model, x, 0 * ones(x), torch.full((len(x),), 1e-4), 100, stream(0, "t"))
    assert (a.steps[~a.done] == 100).all() and len(sides) == 2 * 99
    by_query = dict(enumerate(sides[::2], 1))  # query k of 100 stands for 100 k of 10,000
    assert [by_query[k] for k in (1, 3, 6, 11, 99)] == [4, 3, 2, 1, 1]  # sqrt(51.2 / 2 ** halvings)


def test_corners_and_runs():
    x, eps = torch.tensor([0.5, 0.95]).view(2, 1, 1, 1).repeat(1, 3, 4, 4), torch.tensor([0.1, 0.2])
    found = attack.moved(x, eps, attack.random_signs(x, (2, 3, 1, 4), stream(0, "t")))
    assert found[0].unique().tolist() == pytest.approx([0.4, 0.6])
    assert found[1].unique().tolist() == pytest.approx([0.75, 1.0])
    assert (found == found[:, :, :1]).all(), "stripes"
    runs = attack.covered(torch.zeros(200, 1), 5, 3, stream(0, "t"))
    assert set(map(tuple, runs.tolist())) == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}


def fooled_by(table):
    """A stand-in for `fool`: attack NAME fools the images (known by their pixel) of table[NAME]."""

    def fool(name, net, x, y, eps, args, gen):
        hits = table.get(name, ()) if not callable(table.get(name)) else table[name](eps)
        return torch.tensor([round(float(v)) in hits for v in x.flatten()], dtype=torch.bool)

    return fool


def test_the_worst_case_by_hand(monkeypatch):
    """Image 0 is misread anyway; FGSM gets 1, APGD 2 in its second run only, Square 3."""
    monkeypatch.setattr(attack, "answer", lambda net, x: torch.tensor([1, 0, 0, 0, 0, 0]))
    runs = []
    later = lambda eps: runs.append(eps) or ({2} if len(runs) > 1 else {1})  # noqa: E731
    monkeypatch.setattr(attack, "fool", fooled_by({"FGSM": {1}, "APGD": later, "Square": {3}}))
    x, y = torch.arange(6.0).view(6, 1, 1, 1), torch.zeros(6, dtype=torch.long)
    args = types.SimpleNamespace(restarts=2, seed=1, eps=0.1, steps=1)
    found, standing = attack.worst_case(attack.Loaded(None, {}, 10), x, y, args)
    assert standing.int().tolist() == [0, 0, 0, 0, 1, 1] and found["clean"]["k"] == 5
    own = {name: a["own"]["k"] for name, a in found.items() if "own" in a}
    assert own == {"FGSM": 4, "PGD": 5, "APGD": 4} and found["Square"]["so_far"]["n"] == 6
    so_far = [found[name]["so_far"]["k"] for name in attack.ATTACKS]
    assert so_far == [4, 4, 3, 3, 2] and runs == [0.1, 0.1]


def test_who_falls_in_a_small_ball_falls_in_a_large_one(monkeypatch):
    monkeypatch.setattr(attack, "answer", lambda net, x: torch.tensor([1, 0, 0, 0]))
    by_eps = {0.1: {1}, 0.2: {2}}
    monkeypatch.setattr(attack, "fool", fooled_by({"APGD": lambda eps: by_eps.get(eps, ())}))
    x, y = torch.arange(4.0).view(4, 1, 1, 1), torch.zeros(4, dtype=torch.long)
    m, args = attack.Loaded(None, {}, 10), types.SimpleNamespace(seed=1)
    curve = attack.robust_curve(m, x, y, [0.0, 0.1, 0.2, 0.3], args)
    assert [point["k"] for point in curve] == [3, 2, 1, 1]


def test_square_gets_queries_and_the_others_steps(monkeypatch):
    seen = {}
    for name in ("PGD", "Square"):
        monkeypatch.setitem(
            attack.ATTACKS,
            name,
            lambda net, x, y, eps, steps, gen, name=name: (
                seen.update({name: steps}) or in_no_steps(x)
            ),
        )
        x, args = torch.zeros(2, 3, 2, 2), types.SimpleNamespace(steps=5, queries=70)
        fooled = attack.fool(name, nn.Flatten(), x, torch.tensor([0, 1]), 0.1, args, None)
        assert fooled.tolist() == [False, True]
    assert seen == {"PGD": 5, "Square": 70}


def test_follows_colour_counts_foreign_colours_only(monkeypatch):
    monkeypatch.setattr(attack, "answer", lambda net, x: torch.tensor([0, 2, 2, 1]))
    x, y = torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 2, 3])
    split = types.SimpleNamespace(colors=torch.tensor([0, 2, 5, 1, 9]))
    m = attack.Loaded(None, {}, 10)
    assert attack.follows(m, x, y, split) == pytest.approx(2 / 3)
    assert attack.follows(m, x, y, types.SimpleNamespace(colors=y)) is None
    assert attack.follows(m, x, y, types.SimpleNamespace(colors=None)) is None


# ---- check

HEALTHY = {
    "clean": 0.8,
    "curve": {0.1: 0.4, 0.5: 0.1},
    "eps": 0.1,
    "eps 0": 0.8,
    "noise": 0.7,
    "FGSM": 0.5,
    "PGD": 0.42,
    "APGD": 0.4,
    "APGD on cross-entropy": 0.41,
    "twice": 0.39,
    "five restarts": 0.39,
    "each class": 0.39,
    "Square": 0.395,
    "eps 0.5": 0.1,
    "chance": 0.1,
    "images": 100,
    "outside": 0,
}


@pytest.mark.parametrize(
    "claim, change",
    [
        (None, {}),
        (0, {"eps 0": 0.79}),
        (1, {"noise": 0.45}),
        (1, {"FGSM": 0.405}),
        (1, {"PGD": 0.385}),
        (2, {"curve": {0.1: 0.4, 0.5: 0.41}}),
        (3, {"eps 0.5": 0.11}),
        (4, {"twice": 0.37}),
        (5, {"five restarts": 0.37}),
        (6, {"each class": 0.37}),
        (7, {"Square": 0.385}),
        (8, {"outside": 1}),
    ],
)
def test_each_claim_fails_by_its_own_number_alone(claim, change):
    rows = attack.claims({**HEALTHY, **change})
    failed = [i for i, row in enumerate(rows) if not row["pass"]]
    assert failed == ([] if claim is None else [claim])
    by_eps, square = dict(rows[2]["numbers"]), dict(rows[7]["numbers"])
    assert by_eps.keys() >= {"eps 0.1"} and square.keys() == {"eps", "APGD", "Square"}


def mirrored(model, x):
    """20 images of each class of the linear model, the radii that fool it, and settings."""
    x = torch.cat([x[:20], 1 - x[:20]])
    needed = (model.margin(x).abs() / model.w.abs().sum()).detach()
    args = types.SimpleNamespace(eps=float(2 * needed.median()), steps=20, seed=1)
    return x, (model.margin(x) > 0).long(), needed, args


def test_measure_on_a_linear_model(linear):
    x, y, needed, args = mirrored(*linear)
    v = attack.measure(attack.Loaded(linear[0], {}, 2), x, y, args)
    for eps, accuracy in v["curve"].items():
        if eps < 0.4:  # there the box binds
            assert accuracy == pytest.approx(float((needed > eps).double().mean()), abs=0.06)
    assert v["clean"] == v["eps 0"] == 1 and v["noise"] > v["PGD"] and v["outside"] == 0
    assert v["FGSM"] == pytest.approx(v["PGD"], abs=0.06), "one step is the best on a plane"
    assert max(v["twice"], v["five restarts"]) <= v["APGD"] == v["curve"][v["eps"]]
    assert v["each class"] == pytest.approx(v["APGD"], abs=0.06) and v["PGD"] >= v["APGD"]
    assert v["eps"] == args.eps / 2, "where about half are left"


@pytest.mark.parametrize("step, pixel", [(0.6, 0.5), (1e-4, 1.0), (-1e-4, 0.0)])
def test_strays_are_counted_beyond_the_ball_and_the_box(linear, monkeypatch, step, pixel):
    x, y, _, args = mirrored(*linear)
    x[:, 0, 0, 0] = pixel

    def stray(net, x, y, eps, steps, gen):
        return in_no_steps(x + step)

    monkeypatch.setitem(attack.ATTACKS, "FGSM", stray)
    found = attack.measure(attack.Loaded(linear[0], {}, 2), x, y, args)
    assert found["outside"] == 40


def test_noise_is_a_corner_and_towards_aims_at_its_class(monkeypatch):
    x = torch.full((4, 3, 2, 2), 0.5)
    found = attack.noise(None, x, ones(x), torch.full((4,), 0.1), 1, stream(0, "t")).x
    assert found.unique().tolist() == pytest.approx([0.4, 0.6])
    monkeypatch.setattr(attack, "pgd", lambda *a, **how: (a, how))
    args, how = attack.towards(3, None, x, ones(x), torch.ones(4), 5, None)
    assert args[2].tolist() == [3] * 4 and args[-1].tolist() == [0.25] * 4
    assert how == {"targeted": True, "loss": attack.margin, "stop": attack.says, "decay": True}


# ---- numbers


def test_rate_and_quartiles():
    r = attack.rate(torch.tensor([True] * 8 + [False] * 2))
    assert r == {"k": 8, "n": 10, "rate": 0.8, "low": 0.4902, "high": 0.9433}  # Wilson (1927)
    found = attack.quartiles(torch.tensor([5.0, 1, 4, 2, 3]))
    assert found == {"median": 3, "q1": 2, "q3": 4}
    assert set(attack.quartiles(torch.tensor([])).values()) == {None}


def test_bootstrap_on_known_cases():
    constant = attack.bootstrap(torch.full((3, 50), -0.01), torch.nanmedian, stream(0, "b"))
    assert constant == {"value": -0.01, "low": -0.01, "high": -0.01}
    nothing = attack.bootstrap(torch.full((1, 5), math.nan), torch.nanmedian, stream(0, "b"))
    assert nothing == {"value": None, "low": None, "high": None}
    values = torch.randn(1, 400, generator=stream(0, "v"), dtype=torch.double)
    b = attack.bootstrap(values, torch.nanmean, stream(0, "b"))
    assert (b["high"] - b["low"]) / (2 * 1.96 * values.std() / 20) == pytest.approx(1, abs=0.1)
    seeds = torch.tensor([[0.0] * 50, [1.0] * 50])  # images agree, seeds do not: it must show
    b = attack.bootstrap(seeds, torch.nanmean, stream(0, "b"))
    assert (b["low"], b["value"], b["high"]) == (0, 0.5, 1)
    assert float(attack.share_below_zero(torch.tensor([-1, 1, 0, math.nan]))) == pytest.approx(
        1 / 3
    )


def entry(method, seed, shift=0.0, clean=(7, 7, 7, 1)):
    lists = {"steps": [1, 2, None, 4], "min_eps": [0.1 + shift, 0.2 + shift, None, 0.3]}
    return {
        "method": method,
        "seed": seed,
        "clean": list(clean),
        "argmax": lists,
        "confidence": lists,
    }


def test_both_right_asks_this_model_and_its_counterpart_of_the_same_seed():
    models = {
        "a_s1": entry("a", 1, clean=(7, 7, 1, 1)),
        "a_s2": entry("a", 2, clean=(1, 1, 1, 7)),
        "b_s1": entry("b", 1, clean=(7, 1, 7, 1)),
        "c_s1": entry("c", 1, clean=(1, 7, 7, 1)),
    }
    both = attack.subsets(models, 7)["both_right"]
    assert {name: m.int().tolist() for name, m in both.items()} == {
        "a_s1": [1, 0, 0, 0],  # the reference: with the second row, b
        "a_s2": [0, 0, 0, 1],  # nobody shares its seed
        "b_s1": [1, 0, 0, 0],
        "c_s1": [0, 1, 0, 0],
    }


def test_summary_by_hand():
    models = {"a_s1": entry("a", 1), "b_s1": entry("b", 1, clean=(7, 7, 1, 1))}
    s = attack.summarise(models, types.SimpleNamespace(src=7))["a_s1"]
    assert s["clean"]["k"] == 3 and s["all"]["argmax"]["success"]["k"] == 3
    assert s["all"]["argmax"]["steps"] == {"median": 2, "q1": 1, "q3": 2}
    radii = s["all"]["argmax"]["min_eps"]
    assert radii == {"median": 0.2, "q1": 0.1, "q3": 0.3, "censored": 1, "n": 4}
    assert s["both_right"]["argmax"]["success"]["n"] == 2


def test_compare_pairs_by_seed_and_image(monkeypatch):
    monkeypatch.setattr(attack, "RESAMPLES", 20)
    models = {"a_s1": entry("a", 1), "b_s1": entry("b", 1, -0.05), "b_s2": entry("b", 2, 9)}
    models["b_s1"]["argmax"] = {**models["b_s1"]["argmax"], "steps": [1, None, None, 4]}
    (found,) = attack.compare(models, types.SimpleNamespace(src=7, seed=0))
    case, everything = found["both_right"]["argmax"], found["all"]["argmax"]
    assert (found["reference"], found["other"], found["seeds"]) == ("a", "b", 1)
    assert everything["n"] == 4 and case["n"] == 3
    assert case["min_eps"]["value"] == pytest.approx(-0.05)
    assert case["needs_less"]["value"] == pytest.approx(2 / 3, abs=1e-4)
    assert everything["success"]["value"] == -0.25
    assert attack.compare({"a_s1": entry("a", 1), "b_s2": entry("b", 2)}, None) == []


# ---- the command line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny world and two models that learned it, as train.py would save them."""
    import conftest

    folder = tmp_path_factory.mktemp("world") / "results"
    conftest.write_world(folder)
    split = load_split(folder, "train")
    for seed, name in enumerate(TWO.split()):
        torch.manual_seed(seed)
        model = build_model()
        optimiser = torch.optim.Adam(model.parameters(), 3e-2)
        for _ in range(30):
            optimiser.zero_grad()
            F.cross_entropy(model(split.x(slice(None))), split.labels).backward()
            optimiser.step()
        save_model(folder / f"{name}.pt", model, 10)
    save_model(folder / "odd_s1.pt", build_model(classes=5), 5)
    return folder


def save_model(path, model, classes):
    args = {"seed": 42, "model": "simplecnn", "width": 4}
    weights = {"weights": model.state_dict(), "args": args, "classes": classes, "size": [28, 28]}
    save_pt(weights, path)


@pytest.fixture
def world(trained, tmp_path, monkeypatch):
    """A copy that a test may fill, where nothing takes long."""
    for name, few in (("RESAMPLES", 20), ("SEARCH_STEPS", 2), ("QUERIES", 10), ("RADII", [0.1])):
        monkeypatch.setattr(attack, name, few)
    return shutil.copytree(trained, tmp_path / "results")


@pytest.fixture
def call(monkeypatch, capsys):
    """The command line within this process: (exit code, stdout, stderr)."""

    def run(command):
        monkeypatch.setattr("sys.argv", command.split())
        try:
            attack.main(command.split()[1:])
            code = 0
        except SystemExit as e:
            code = e.code
        plt.close("all")
        return code, *capsys.readouterr()

    return run


def outside_run(path):
    record = json.loads(path.read_text())
    assert record["run"]["seconds"] >= 0
    return {k: v for k, v in record.items() if k != "run"}


@pytest.mark.parametrize(
    "command, name, keys",
    [
        ("--src 7 --tgt 3 --eps 0.05 --steps 5", "7to3_steps5", "index summary compared"),
        ("--pairs --n 2 --steps 3", "pairs_steps3_n2", "n_per_digit"),
        ("--untargeted --steps 3 --n 30 --sweep 0.1 --queries 9", "mine", "n sample radii"),
        ("--check --steps 3 --n 20", "check_steps3_n20", "n passed"),
    ],
)
def test_each_mode_runs_repeats_and_tells(world, call, command, name, keys):
    command = f"attack.py --dir {world} {command}" + (" --name mine" if name == "mine" else "")
    code, said, _ = call(command)
    path = world / f"attack_{name}.json"
    record = outside_run(path)
    assert set(record) == {"schema", "script", "name", "mode", "args", "models", *keys.split()}
    assert set(record["models"]) == set(TWO.split())
    assert code == (0 if record.get("passed", True) else 1)
    told = said[said.index("\nbaseline_s42:") :]
    assert told.count("\n") <= 12 + 18 * (code == 1) and f"wrote {path}" in told
    assert "|" not in said and "(2 of 2)" in said
    assert ("look at" in said) == (record["mode"] != "check")
    assert all((world / "figures" / png).is_file() for png in re.findall(r"attack_\w+\.png", said))
    assert call(command)[0] == code and outside_run(path) == record


def test_lists_are_parallel_and_the_worst_case_is_the_worst(world, call):
    call(f"attack.py --dir {world} --steps 3 --name lists")
    record = json.loads((world / "attack_lists.json").read_text())
    for m in record["models"].values():
        lists = [m["clean"], *(m[c][k] for c in attack.CRITERIA for k in ("steps", "min_eps"))]
        assert {len(values) for values in lists} == {len(record["index"])}
    call(f"attack.py --dir {world} --untargeted --steps 3 --queries 9 --name worst")
    for m in json.loads((world / "attack_worst.json").read_text())["models"].values():
        least = min(m["attacks"][a]["own"]["k"] for a in ("FGSM", "PGD"))
        assert m["robust"]["k"] == m["standing"].count("1") <= least


def test_a_failed_check_is_told_by_the_exit_code(world, call, monkeypatch):
    monkeypatch.setattr(
        attack, "claims", lambda v: [{"claim": "never", "pass": False, "numbers": [["n", 1]]}]
    )
    code, said, _ = call(f"attack.py --dir {world} --check --steps 2 --n 10")
    assert code == 1 and "1 of 1 checks fail" in said and "never: n 1" in said


@pytest.mark.parametrize(
    "command, name",
    [
        ("--src 7 --tgt 3 --eps 0.05", "attack_7to3"),
        ("--src 3 --tgt 8 --eps 0.1 --n 500", "attack_3to8_eps0.1_n500"),
        ("--pairs --seed 43", "attack_pairs_s43"),
        ("--untargeted --restarts 10 --sweep 0.2 0.1", "attack_untargeted_restarts10_sweep0.1-0.2"),
        ("--check --split val --models at_s42", "attack_check_val"),
        ("--check --n 20 --name mine", "attack_mine"),
    ],
)
def test_a_result_is_named_by_what_differs(command, name):
    assert attack.result_name(attack.get_args(command.split())) == name


def test_a_result_of_other_models_is_not_replaced(world, call):
    one = f"attack.py --dir {world} --pairs --n 1 --steps 1 --models"
    assert call(f"{one} jitter_s42")[0] == 0
    path = world / "attack_pairs_steps1_n1.json"
    before = path.read_bytes()
    code, _, said = call(f"{one} {world}/baseline_s42.pt")
    assert code == 2 and "models ['jitter_s42']" in said and path.read_bytes() == before
    assert call(f"{one} {world}/baseline_s42.pt --overwrite")[0] == 0
    (m,) = json.loads(path.read_text())["models"].values()
    assert (m["method"], m["seed"]) == ("baseline", 42)


@pytest.mark.parametrize(
    "command, wrong",
    [
        ("--src 7 --tgt 7", "both 7"),
        ("--tgt 12", "end at 9"),
        ("--eps nan", "--eps"),
        ("--steps 0", "--steps"),
        ("--models jiter_s42", "try jitter_s42"),
        ("--models odd_s1", "built for"),
        ("--pairs --check", "not allowed"),
        ("--pairs --src 3", "--src means nothing"),
        ("--report --pairs", "--report"),
        (f"--models {TWO} jitter_s42", "share one row"),
        ("--dir nowhere", "missing"),
        ("--dir nowhere --report", "missing"),
        ("--split few --src 9", "--split"),
        ("--untargeted --name a/b", "--name"),
        ("--untargeted --name check", "--name"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(
    trained, call, tmp_path, command, wrong, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    code, _, said = call(f"attack.py {'' if '--dir' in command else f'--dir {trained}'} {command}")
    assert code == 2 and len(said.splitlines()) == 1, said
    assert said.startswith("attack.py: ") and "; " in said and wrong in said


def test_pairs_go_as_far_as_every_model_has_classes(world, call):
    for name in ("train", "val", "test_hard", "test_unbiased"):
        split = torch.load(world / f"{name}.pt")
        save_pt({k: v[split["labels"] < 5] for k, v in split.items()}, world / f"{name}.pt")
    code, said, _ = call(
        f"attack.py --dir {world} --pairs --n 1 --steps 1 --models jitter_s42 odd_s1"
    )
    assert code == 0 and "odd_s1" in said


def test_a_digit_that_is_not_there(world, call):
    val = torch.load(world / "val.pt")
    save_pt({k: v[val["labels"] != 9] for k, v in val.items()}, world / "val.pt")
    code, _, said = call(f"attack.py --dir {world} --split val --src 9")
    assert code == 2 and "no image of digit 9" in said


# ---- tables and figures


def test_the_evidence_is_the_result_with_most_images_at_that_eps(tmp_path):
    for name, n, eps, split in (
        ("7to3", 9, 0.05, "test_hard"),
        ("7to3_n2", 12, 0.05, "test_hard"),
        ("7to3_eps1", 20, 0.1, "test_hard"),
        ("7to3_val_n30", 30, 0.05, "val"),
    ):
        record = {
            "mode": "targeted",
            "args": {"eps": eps, "models": [], "split": split},
            "models": {},
            "name": name,
        }
        save_json({**record, "index": [0] * n}, tmp_path / f"attack_{name}.json")
    assert attack.evidence(tmp_path, "7to3*", 0.05)["name"] == "7to3_n2"
    assert attack.evidence(tmp_path, "7to3*")["name"] == "7to3_eps1"
    assert attack.evidence(tmp_path, "pairs*", 0.05) is None


def measured(accuracy, own=True):
    found = {"rate": accuracy, "low": accuracy - 0.1, "high": accuracy + 0.1}
    return {"own": found, "so_far": found} if own else {"so_far": found}


def test_what_did_not_train_is_marked_and_what_follows_others_says_so():
    attacks = {"clean": measured(0.9)["own"], "FGSM": measured(0.8), "PGD": measured(0.7)}
    attacks |= {"APGD": measured(0.5), "APGD-T": measured(0.45, False)}
    attacks["Square"] = measured(0.4, False)
    m = {"method": "at", "seed": 1, "attacks": attacks, "robust": measured(0.4)["own"]}
    m["follows_colour"] = None
    models = {"at_s1": m, "b_s1": {**m, "method": "b", "trained": False}}
    args = {"steps": 100, "queries": 5000, "eps": 0.1}
    table = attack.untargeted_table({"args": args, "models": models, "n": 9}).splitlines()
    header = (
        "| model | n | clean | FGSM | PGD, 100 steps | APGD, 100 steps | then APGD-T, 100 steps"
    )
    assert table[0] == f"{header} | then Square, 5,000 queries | worst case, eps 0.1 |"
    rates = "0.900 | 0.800 | 0.700 | 0.500 | 0.450 | 0.400 | 0.400 (0.300 to 0.500)"
    assert table[2] == f"| at | 9 | {rates} |"
    assert table[3].startswith("| b (did not train) | 9 |")


def test_what_did_not_train_is_compared_with_nothing():
    found = {"steps": [3, None], "min_eps": [0.1, 0.2]}
    about = {"clean": [7, 7], "argmax": found, "confidence": found}  # the first row did not train
    models = {
        f"{row}_s1": {"method": row, "seed": 1, "trained": row != "a", **about} for row in "abc"
    }
    args = types.SimpleNamespace(src=7, seed=0)
    (entry,) = attack.compare(models, args)
    assert (entry["reference"], entry["other"]) == ("b", "c")
    assert entry["both_right"]["argmax"]["n"] == 2


def test_rows_without_an_ink_share_no_colour_with_a_method():
    rows = ["at", "at_balanced", "groupdro", "balanced", "robgan_finetuned", "oracle_at"]
    found = attack.inks(rows)
    assert len(set(found.values())) == len(rows) and found["at"] == INK["at"]
    assert not set(attack.SPARE_INK) & set(INK.values())


def test_report_refills_tables_beside_what_was_published(world, call, monkeypatch):
    inside = world / "mnist"
    inside.mkdir()
    for name in ("test_hard.pt", "jitter_s42.pt"):
        shutil.copy(world / name, inside / name)
    save_json({"recipe": "gray", "is_mnist": True, "seed": 42}, inside / "meta.json")
    rows = {"row": "Madry et al. (2018)", "clean": 0.9853, "PGD": 0.8962, "robust": 0.885}
    save_json({"robust_mnist": {"0.3": [rows], "0.1": []}}, world / "results" / "published.json")
    monkeypatch.setattr(attack, "ROOT", world)
    for options in ("", "--untargeted --n 20 --queries 5", "--pairs --n 1", "--check --n 10"):
        call(f"attack.py --dir {world} --steps 1 {options}")
    plain = f"attack.py --dir {inside} --untargeted --eps 0.3 --steps 1 --queries 5 --n 9"
    plain += " --models jitter_s42"
    assert call(f"{plain} --name at")[0] == call(f"{plain} --name resnet")[0] == 0
    code, said, _ = call(f"attack.py --dir {world} --report")
    assert code == 0 and "|" not in said and "figures/attack_robust_curve.png" in said
    assert "mnist/figures" not in said  # no figure that nothing shows
    tables = (world / "tables.md").read_text().split("## ")[1:]
    shown = {table.split("\n")[0]: table for table in tables}
    assert len(shown) == 12
    empty = {name for name, table in shown.items() if "no results yet" in table}
    of_models = {"untargeted_at", "untargeted_wide", "robgan_attacks", "robgan_2000_attacks"}
    assert empty == {*of_models, "check_mnist"}
    assert "| *Madry et al. (2018), published* | - | 0.985 |" in shown["mnist"]
    assert "Madry" not in shown["resnet"] and "| jitter | 9 |" in shown["resnet"]
    assert "| jitter minus baseline | 1 | both right |" in shown["targeted_change"]
