"""The attacks against models whose answer is known in closed form, and the command line."""

import io
import json
import math
import re
import shutil
from types import SimpleNamespace

import conftest
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.text import Text

import attack
from common import Split, build_model, load_split, save_json, save_pt, stream

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


class Nearest(nn.Module):
    """The class whose centre is nearest to an image's mean pixel; the answer to 0.3 is 0 or 1."""

    def __init__(self, centres=(0.2, 0.4, 0.9)):
        super().__init__()
        self.centres = torch.tensor(centres)

    def forward(self, x):
        return -100 * (x.mean((1, 2, 3))[:, None] - self.centres) ** 2


def plain(*pixels):
    """Images (N,3,2,2), each of one grey."""
    return torch.tensor(pixels).view(-1, 1, 1, 1).repeat(1, 3, 2, 2)


def ones(x):
    return torch.ones(len(x), dtype=torch.long)


def half_fall(model, x):
    """The radius that half of the images of class 0 can be fooled in."""
    return float((-model.margin(x) / model.w.abs().sum()).detach().median())


# ---- the attack


def test_pgd_finds_the_worst_case_of_a_linear_model(linear):
    model, x = linear
    x_adv = attack.pgd(model, x, 0 * ones(x), 0.05, 40, stream(0, "t")).x
    worst = model.margin(x) + 0.05 * model.w.abs().sum()
    assert torch.allclose(model.margin(x_adv), worst, atol=1e-4)


def best_gain(change, pixels, w):
    """By how much a channel of black and white pixels can raise <w, x> per eps, on paper."""
    rise, fall = w[pixels == 0].sort(descending=True).values, -w[pixels == 1].sort().values
    if change == "flat":
        return max(0, rise.sum(), fall.sum())
    if change == "fine":  # for each that rises another falls
        k = min(len(rise), len(fall))
        return (rise[:k] + fall[:k]).clamp(min=0).sum()
    return rise.clamp(min=0).sum() + fall.clamp(min=0).sum()


@pytest.mark.parametrize("change", attack.MOVES)
def test_pgd_finds_the_best_change_of_each_kind_and_the_judge_tells_them_apart(change):
    gen = torch.Generator().manual_seed(1)
    model, x = Linear(gen), torch.rand(20, 3, 8, 8, generator=gen).round()
    w = model.w.detach().flatten(1)
    best = [sum(map(best_gain, [change] * 3, image, w)) for image in x.flatten(2)]
    x_adv = attack.pgd(model, x, 0 * ones(x), 0.3, 60, gen, decay=True, change=change).x
    gain = (model.margin(x_adv) - model.margin(x)).detach()
    assert torch.allclose(gain, 0.3 * torch.stack(best), rtol=0.01)
    for kind in attack.MOVES:
        allowed = attack.judge(model, x, ones(x), 0.3, x_adv, lambda z, y: y == y, kind)
        assert allowed.all() if kind in ("any", change) else not allowed.any(), kind


def test_pgd_stays_in_the_ball_and_the_box_and_leaves_the_model_alone():
    gen = torch.Generator().manual_seed(1)
    model, x = Linear(gen).train(), torch.rand(20, 3, 8, 8, generator=gen).round()
    x_adv = attack.pgd(model, x, 0 * ones(x), 0.3, 10, gen).x
    assert (x_adv - x).abs().max() <= 0.3 + 1e-6 and x_adv.min() >= 0 and x_adv.max() <= 1
    assert model.training and model.w.grad is None
    attack.pgd(model.eval(), x, 0 * ones(x), 0.3, 1, gen)
    assert not model.training


def test_pgd_leaves_every_submodule_in_its_mode_also_after_an_error():
    """As someone calls it who trains with frozen batch norms, inside no_grad."""
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2), nn.Dropout())
    net[0].eval()
    x, before = plain(0.2, 0.7), [module.training for module in net.modules()]
    mean = net[0].running_mean.clone()
    with torch.no_grad():
        a = attack.pgd(net, x, 0 * ones(x), 0.1, 3, stream(0, "t"))
        assert not torch.equal(a.x, x) and not torch.is_grad_enabled()
        with pytest.raises(ZeroDivisionError):
            attack.pgd(net, x, 0 * ones(x), 0.1, 3, None, loss=lambda z, y: 1 / 0, start=x)
    assert [module.training for module in net.modules()] == before
    assert torch.equal(net[0].running_mean, mean)


@pytest.mark.parametrize(
    "strange",
    [lambda x: x * 255, lambda x: (x * 255).byte(), lambda x: x - 0.5, lambda x: x / 0 * 0],
)
def test_pgd_refuses_pixels_outside_the_box_and_says_how_to_mend_them(linear, strange):
    model, x = linear
    with pytest.raises(
        ValueError, match="floats in .0, 1., but x is .*; divide uint8 images by 255"
    ):
        attack.pgd(model, strange(x), ones(x), 8, 1, stream(0, "t"))


@pytest.mark.parametrize("decay, wanted", [(False, [4, 8, 12, 16]), (True, [4, 7.1, 9.3, 10.6])])
def test_pgd_steps_by_hand(linear, decay, wanted):
    """Steps of 0.004; with decay 4, 3.1, 2.2, 1.3 thousandths, always up the gradient's sign."""
    model, x = linear
    seen, sign = [], model.w.detach().sign()
    model.register_forward_pre_hook(lambda _, z: seen.append(((z[0] - x) * sign).detach()))
    how = {"step_size": 0.004, "decay": decay, "start": x}
    a = attack.pgd(model, x, 0 * ones(x), 1.0, 4, None, **how)
    walked = [*seen[1:], (a.x - x) * sign]
    for change, far in zip(walked, wanted, strict=True):
        assert torch.allclose(change, torch.full_like(change, far / 1000), atol=1e-6)


def test_the_usual_step_is_a_tenth_of_eps_and_a_target_turns_it(linear):
    model, x = linear
    away = attack.pgd(model, x, 0 * ones(x), 0.2, 1, None, start=x).x - x
    towards = attack.pgd(model, x, 0 * ones(x), 0.2, 1, None, start=x, targeted=True).x - x
    assert torch.allclose(away, 0.02 * model.w.detach().sign().expand_as(x), atol=1e-6)
    assert torch.allclose(towards, -away, atol=1e-6)


def test_a_random_start_fills_the_ball():
    start = attack.random_start(torch.zeros(50, 3, 8, 8), 0.1, stream(0, "t"))
    assert -0.1 <= start.min() < -0.099 and 0.099 < start.max() <= 0.1
    assert start.mean().abs() < 0.002


@pytest.mark.parametrize("stop, looks", [(None, 5), (attack.is_wrong, 6)])
def test_five_steps_are_five_looks_at_the_model_and_one_more_for_who_asks(linear, stop, looks):
    model, x = linear
    seen = []
    model.register_forward_pre_hook(lambda *_: seen.append(1))
    result = attack.pgd(model, x, 0 * ones(x), 1e-4, 5, stream(0, "t"), stop=stop)
    assert len(seen) == looks and (result.steps == 5).all() and not result.done.any()


def test_early_stop_changes_who_pays_not_who_succeeds(linear):
    model, x = linear
    eps = half_fall(model, x)
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
    assert attack.is_sure(near, y).tolist() == attack.is_ahead(near, y).tolist() == [True, False]
    rivals = torch.tensor([[math.log(9.1), 0.0, 0.0]])  # ahead of each, less sure for two of them
    assert attack.is_ahead(rivals, y[:1]).all() and not attack.is_sure(rivals, y[:1]).any()


def test_the_judge_sees_the_ball_the_box_and_the_answer():
    x = torch.full((6, 3, 2, 2), 0.5)
    x[3:5] = torch.tensor([0.99, 0.01]).view(2, 1, 1, 1)
    x_adv = x.clone()
    # one pixel of each image
    x_adv[:, 1, 0, 1] += torch.tensor([0.1, 0.101, -0.101, 0.02, -0.02, 0.1])
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

    def add(model, x, y, eps, step):
        sizes.append(len(x))
        return in_no_steps(x + eps.view(-1, 1, 1, 1) * step.view(-1, 1, 1, 1))

    step = torch.tensor([1.0, 1, 2, 1, 0])  # the third leaves its ball
    y = torch.arange(5)
    a = attack.carry_out(add, nn.Flatten(), lambda z, y: y < 4, x, y, eps, step=step)
    assert sizes == [2, 2, 1] and a.done.tolist() == [True, True, False, True, False]
    assert torch.allclose(a.x.flatten(), torch.tensor([0.11, 0.22, 0.36, 0.44, 0.5]))


# ---- targeted


@pytest.mark.parametrize("steps", [30, 5])
def test_headline_counts_the_steps_to_each_mark(linear, steps):
    """Walked again by a plain loop, one image at a time."""
    model, x = linear
    found, _ = attack.headline(model, x, ones(x), 0.03, steps, stream(0, "t"))
    start, sign = attack.random_start(x, 0.03, stream(0, "t")), model.w.detach().sign()
    marks = {"argmax": 0.0, "confidence": math.log(9) / 2}  # sigmoid(2 m) = 0.9
    marks["margin"] = marks["confidence"]  # one rival
    assert found["argmax"].isfinite().any() and (found["confidence"] > found["argmax"]).any()
    sure = found["confidence"][found["confidence"].isfinite()]
    assert (sure > 5).any() == (steps == 30), "the limit holds for all marks together"
    for i in range(len(x)):
        z, wanted = start[i : i + 1], dict.fromkeys(marks, math.inf)
        for step in range(steps + 1):
            for name, mark in marks.items():
                if model.margin(z) >= mark:
                    wanted[name] = min(wanted[name], step)
            z = torch.maximum(torch.minimum(z + 0.003 * sign, x[i] + 0.03), x[i] - 0.03)
        for name in marks:
            assert float(found[name][i]) == wanted[name]


@pytest.mark.parametrize("change", attack.MOVES)
def test_min_eps_of_a_linear_model(linear, change):
    model, x = linear
    radii = [0.01, 0.03, 0.1, 0.3]
    found = attack.search_min_eps(model, x, ones(x), radii, stream(0, "t"), 50, change)
    w = model.w.detach().flatten(1)
    size = {
        "any": w.abs().sum(),
        "flat": w.sum(1).abs().sum(),
        "fine": (w - w.median(1, keepdim=True).values).abs().sum(),
    }[change]
    needed = {"argmax": -model.margin(x) / size}
    needed["confidence"] = (math.log(9) / 2 - model.margin(x)) / size  # sigmoid(2 m) = 0.9
    needed["margin"] = needed["confidence"]
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


def test_the_second_loss_gets_who_resisted_the_first(linear):
    model, x = linear
    seen = []

    def dull(logits, y):
        seen.append(("dull", len(y)))
        return 0 * logits.sum()

    def keen(logits, y):
        seen.append(("keen", len(y)))
        return F.cross_entropy(logits, y)

    x = torch.cat([1 - x[:3], x[:5]])  # three are of class 1 as they are
    how = (x, ones(x), torch.full((8,), 0.3), x)
    a = attack.strongest(model, (attack.says, (dull, keen)), *how, 9)
    assert a.done.all() and a.steps[:3].tolist() == [0] * 3 and a.steps[3:].min() > 9
    assert seen[:9] == [("dull", 5)] * 9 and seen[9] == ("keen", 5)
    a = attack.strongest(model, (lambda z, y: y < 0, (dull, keen)), *how, 2)
    assert a.steps.tolist() == [4] * 8 and not a.done.any()
    walked = (a.x - x) * model.w.detach().sign()  # eps / 4, then 0.55 of it, towards the target
    assert torch.allclose(walked, torch.full_like(walked, 0.3 / 4 * 1.55), atol=1e-6)
    assert {losses[-1] for _, losses in attack.CRITERIA.values()} == {F.cross_entropy}


# ---- pairs


def test_pairs_are_rows_of_the_digit_shown_and_columns_of_the_one_wanted():
    """0.2 is needed for a mean of 0.3 or 0.65, where the answer changes; surely 0.02 later."""
    pixels, labels = plain(0.05, 0.2, 0.4, 0.8, 0.9, 0.12, 0.2), torch.tensor([0, 0, 1, 2, 2, 0, 0])
    images = (pixels * 255).round().to(torch.uint8)
    models = {
        "a": attack.Loaded(Nearest(), {"method": "a", "seed": 1}, 3),
        "b": attack.Loaded(Nearest((0.2, 0.4, 0.85)), {"method": "b", "seed": 1}, 3),
        "c": attack.Loaded(Nearest((0.2, 0.08, 0.9)), {"method": "c", "seed": 1}, 3),
    }
    split = Split(images, labels, None, None)
    two = {name: models[name] for name in "ab"}
    record = attack.pairs(two, split, seed=1, eps=0.2, steps=10, n=3)
    m = record["models"]["a"]
    assert record["n_per_digit"] == [3, 1, 2]  # at most three: 0.05, 0.2 and 0.12
    assert m["argmax"] == [[None, 0.6667, 0], [1, None, 0], [0, 0.5, None]]
    assert m["confidence"] == [[None, 0.3333, 0], [1, None, 0], [0, 0.5, None]]
    assert (m["argmax_mean"]["k"], m["argmax_mean"]["n"], m["confidence_mean"]["k"]) == (4, 12, 3)
    assert m["argmax_mean"]["of"] == "pictures" and m["argmax_mean"]["rate"] == 0.3333
    fewer = attack.pairs(models, split, seed=1, eps=0.2, steps=10, n=3)["n_per_digit"]
    assert fewer == [2, 0, 2], "only what every model reads correctly"


# ---- untargeted


def test_fgsm_is_the_closed_form(linear):
    model, x = linear
    x_adv = attack.fgsm(model, x, 0 * ones(x), torch.full((len(x),), 0.03), 1, None).x
    assert torch.allclose(x_adv, x + 0.03 * model.w.detach().sign(), atol=1e-6)


def test_pgd_falls_from_a_quarter_of_eps_until_wrong(linear):
    model, x = linear
    y, eps = 0 * ones(x), torch.full((len(x),), half_fall(model, x))
    a = attack.ATTACKS["PGD"](model, x, y, eps, steps=7, gen=stream(0, "t"))
    how = {"step_size": eps / 4, "decay": True, "stop": attack.is_wrong}
    same = attack.pgd(model, x, y, eps, 7, stream(0, "t"), **how)
    assert torch.equal(a.x, same.x) and 0 < a.done.sum() < len(x)


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

    calls, turns = 0, False

    def forward(self, x):
        self.calls += 1
        pull = x.flatten(1).sum(1, keepdim=True) * (-1 if self.turns and self.calls == 2 else 1)
        return torch.tensor([[2.0, 1.0, 0.0]]) + (pull - pull.detach()) * torch.tensor([-1, 1, 0])


def test_apgd_halves_its_step_at_the_authors_checkpoints_where_the_loss_does_not_rise(monkeypatch):
    model, found = Flat(), []

    def spy(s, span, real=attack.halve_where_stuck):
        real(s, span)
        found.append((model.calls - 1, s.halved.tolist(), float(s.rate[0])))

    monkeypatch.setattr(attack, "halve_where_stuck", spy)
    x = torch.full((2, 3, 4, 4), 0.5)
    attack.apgd(model, x, torch.zeros(2).long(), torch.tensor([0.1, 0.1]), 100, stream(0, "t"))
    assert [step for step, *_ in found] == [22, 41, 57, 70, 80, 87, 93, 99]  # of 100
    assert all(halved == [True, True] for _, halved, _ in found)
    assert [rate for *_, rate in found] == pytest.approx([0.2 / 2**k for k in range(1, 9)])


def test_apgd_keeps_a_quarter_of_its_last_move():
    model, seen = Flat(), []
    model.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach()))
    model.turns = True  # up, then down
    x = torch.full((2, 3, 4, 4), 0.5)
    attack.apgd(model, x, torch.zeros(2).long(), torch.tensor([0.1, 0.1]), 10, stream(0, "t"))
    assert torch.allclose(seen[1], torch.full_like(x, 0.6))
    assert torch.allclose(seen[2], 0.6 + 0.75 * (0.4 - 0.6) + 0.25 * (0.6 - seen[0]))


def test_a_checkpoint_halves_where_the_loss_seldom_rose_or_its_best_did_not_move():
    s = SimpleNamespace(
        rose=torch.tensor([7, 8, 8, 8]),  # in ten steps
        best_loss=torch.tensor([2.0, 2.0, 1.0, 1.0]),
        mark=torch.ones(4),
        halved=torch.tensor([False, False, False, True]),  # never twice for its best alone
        rate=torch.ones(4, 1, 1, 1),
        z=plain(0.1, 0.1, 0.1, 0.1),
        best=plain(0.2, 0.2, 0.2, 0.2),
        grad=plain(0.3, 0.3, 0.3, 0.3),
        best_grad=plain(0.4, 0.4, 0.4, 0.4),
    )
    attack.halve_where_stuck(s, span=10)
    assert s.halved.tolist() == [True, False, True, False] and s.rose.tolist() == [0] * 4
    assert s.rate.flatten().tolist() == [0.5, 1, 0.5, 1] and torch.equal(s.mark, s.best_loss)
    assert torch.equal(s.z, plain(0.2, 0.1, 0.2, 0.1))
    assert torch.equal(s.grad, plain(0.4, 0.3, 0.4, 0.3))


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
    gray, y = conftest.made_up_digits(200, seed=seed)
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
    first = attack.to_corner(x, torch.full((len(x),), 0.05), signs)
    assert (model.margin(a.x) >= model.margin(first)).all(), "a query never makes it worse"


def test_squares_shrink_on_the_authors_schedule(linear, monkeypatch):
    model, x = linear
    sides, neighbours = [], attack.neighbours
    spy = lambda x, n, s, g: sides.append(s) or neighbours(x, n, s, g)  # noqa: E731
    monkeypatch.setattr(attack, "neighbours", spy)
    a = attack.square(model, x, 0 * ones(x), torch.full((len(x),), 1e-4), 100, stream(0, "t"))
    assert (a.steps[~a.done] == 100).all() and len(sides) == 2 * 99
    by_query = dict(enumerate(sides[::2], 1))  # query k of 100 stands for 100 k of 10,000
    assert [by_query[k] for k in (1, 3, 6, 11, 99)] == [4, 3, 2, 1, 1]  # sqrt(51.2 / 2 ** halvings)


def test_corners_and_runs():
    x, eps = torch.tensor([0.5, 0.95]).view(2, 1, 1, 1).repeat(1, 3, 4, 4), torch.tensor([0.1, 0.2])
    found = attack.to_corner(x, eps, attack.random_signs(x, (2, 3, 1, 4), stream(0, "t")))
    assert found[0].unique().tolist() == pytest.approx([0.4, 0.6])
    assert found[1].unique().tolist() == pytest.approx([0.75, 1.0])
    assert (found == found[:, :, :1]).all(), "stripes"
    runs = attack.neighbours(torch.zeros(200, 1), 5, 3, stream(0, "t"))
    assert set(map(tuple, runs.tolist())) == {(0, 1, 2), (1, 2, 3), (2, 3, 4)}


def stand_in(hits):
    """An attack that pushes up image k of 0.4 + k / 100 where k is in hits, or in hits(eps)."""

    def attack_(model, x, y, eps, steps, gen):
        chosen = hits(float(eps[0]), steps) if callable(hits) else hits
        image = ((x[:, 0, 0, 0] - 0.4) * 100).round().int().tolist()
        push = torch.tensor([k in chosen for k in image]).view(-1, 1, 1, 1) * 0.1
        return attack.Attacked(x + push, torch.zeros_like(y), None)

    return attack_


@pytest.fixture
def six():
    """A net, six images that 0.1 more makes wrong, labels, and who is right: all but the first."""
    x = plain(0.4, 0.41, 0.42, 0.43, 0.44, 0.45)
    return Nearest((0.4, 0.6)), x, torch.zeros(6).long(), torch.arange(6) > 0


def test_the_worst_case_by_hand(monkeypatch, six):
    """Image 0 is misread anyway; FGSM gets 1, APGD 2 in its second run only, Square 3."""
    runs = []

    def later(eps, steps):
        runs.append(steps)
        return {2} if len(runs) > 1 else {1}

    hits = {"FGSM": {1}, "PGD": (), "APGD": later, "APGD-T": (), "Square": {3}}
    monkeypatch.setattr(attack, "ATTACKS", {name: stand_in(h) for name, h in hits.items()})
    effort = dict.fromkeys(hits, 9)
    found, standing = attack.worst_case(*six, 0.1, effort, restarts=2, seed=1)
    assert standing.int().tolist() == [0, 0, 0, 0, 1, 1] and found["clean"]["k"] == 5
    own = {name: a["own"]["k"] for name, a in found.items() if "own" in a}
    assert own == {"FGSM": 4, "PGD": 5, "APGD": 4} and found["Square"]["so_far"]["n"] == 6
    so_far = [found[name]["so_far"]["k"] for name in attack.ATTACKS]
    assert so_far == [4, 4, 3, 3, 2] and runs == [9, 9]


def test_a_restart_is_another_start(monkeypatch, six):
    """Neither a second run of an attack nor another attack draws what has been drawn before."""
    seeds = []

    def attack_(model, x, y, eps, steps, gen):
        seeds.append(gen.initial_seed())
        return attack.Attacked(x, torch.zeros_like(y), None)

    monkeypatch.setattr(attack, "ATTACKS", dict.fromkeys(attack.ATTACKS, attack_))
    effort = dict.fromkeys(attack.ATTACKS, 9)
    attack.worst_case(*six, 0.1, effort, restarts=3, seed=1)
    assert len(seeds) == 9 == len(set(seeds))  # of five attacks two three times


def test_who_falls_in_a_small_ball_falls_in_a_large_one(monkeypatch, six):
    by_eps = {0.1: {1}, 0.2: {2}}
    hits = lambda eps, steps: by_eps.get(round(eps, 3), ())  # noqa: E731
    monkeypatch.setitem(attack.ATTACKS, "APGD", stand_in(hits))
    curve = attack.robust_curve(*six, [0.0, 0.1, 0.2, 0.3], steps=1, seed=1)
    assert [point["k"] for point in curve] == [5, 4, 3, 3]


def test_square_gets_queries_and_the_others_steps(monkeypatch, six):
    seen = {}
    for name in attack.ATTACKS:
        note = lambda eps, steps, name=name: seen.setdefault(name, steps) and ()  # noqa: E731
        monkeypatch.setitem(attack.ATTACKS, name, stand_in(note))
    net, x, y, _ = six
    split = Split((x * 255).round().to(torch.uint8), y, None, None)
    models = {"a": attack.Loaded(net, {}, 2)}
    how = {"eps": 0.1, "steps": 5, "restarts": 1, "sweep": [0.1], "queries": 70, "n": 6}
    record = attack.untargeted(models, split, 1, **how)
    assert seen == {**dict.fromkeys(attack.ATTACKS, 5), "Square": 70}
    assert record["models"]["a"]["follows_colour"] is None and record["radii"] == [0, 0.1]


def test_follows_colour_counts_foreign_colours_only():
    answers, y, colors = torch.tensor([[0, 2, 2, 1], [0, 1, 2, 3], [0, 2, 5, 1]])
    assert attack.follows(answers, y, colors) == pytest.approx(2 / 3)
    assert attack.follows(answers, y, y) is attack.follows(answers, y, None) is None


# ---- check

HEALTHY = {
    "clean": 0.8,
    "curve": {"eps 0.1": 0.4, "eps 0.5": 0.1},
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
        ("zero_eps", {"eps 0": 0.79}),
        ("order", {"noise": 0.45}),
        ("order", {"FGSM": 0.405}),
        ("order", {"PGD": 0.385}),
        ("larger_eps", {"curve": {"eps 0.1": 0.4, "eps 0.5": 0.41}}),
        ("chance", {"eps 0.5": 0.11}),
        ("twice_the_steps", {"twice": 0.37}),
        ("five_restarts", {"five restarts": 0.37}),
        ("each_class", {"each class": 0.37}),
        ("square", {"Square": 0.385}),
        ("inside", {"outside": 1}),
    ],
)
def test_each_claim_fails_by_its_own_number_alone(claim, change):
    found = attack.claims({**HEALTHY, **change})
    assert [key for key, c in found.items() if not c["pass"]] == ([claim] if claim else [])
    assert len(found) == 9 and found["larger_eps"]["numbers"].keys() == HEALTHY["curve"].keys()
    assert found["square"]["numbers"].keys() == {"eps", "APGD", "Square"}


def mirrored(model, x):
    """20 images of each class of the linear model, and the radii that fool it."""
    x = torch.cat([x[:20], 1 - x[:20]])
    needed = (model.margin(x).abs() / model.w.abs().sum()).detach()
    return x, (model.margin(x) > 0).long(), needed


def test_accuracies_on_a_linear_model(linear, monkeypatch):
    monkeypatch.setattr(attack, "CHECK_QUERIES", 50)
    model = linear[0]
    x, y, needed = mirrored(*linear)
    eps = float(2 * needed.median())
    v = attack.accuracies(model, x, y, 2, eps, steps=20, seed=1)
    for radius, accuracy in zip((eps / 8, eps / 4, eps / 2), v["curve"].values(), strict=False):
        assert accuracy == pytest.approx(float((needed > radius).double().mean()), abs=0.06)
    assert v["clean"] == v["eps 0"] == 1 and v["noise"] > v["PGD"] and v["outside"] == 0
    assert v["FGSM"] == pytest.approx(v["PGD"], abs=0.06), "one step is the best on a plane"
    assert max(v["twice"], v["five restarts"]) <= v["APGD"] == v["curve"][f"eps {v['eps']:g}"]
    assert v["each class"] == pytest.approx(v["APGD"], abs=0.06) and v["PGD"] >= v["APGD"]
    assert v["eps"] == eps / 2, "where about half are left"
    assert v["images"] == 40 * (2 * len(v["curve"]) + 2 * (1 + 1 + 4) + 5 + 2), "two goals"


@pytest.mark.parametrize("step, pixel", [(0.6, 0.5), (1e-4, 1.0), (-1e-4, 0.0)])
def test_strays_are_counted_beyond_the_ball_and_the_box(linear, step, pixel):
    x, y, _ = mirrored(*linear)
    x[:, 0, 0, 0] = pixel

    def stray(net, x, y, eps, steps, gen):
        return in_no_steps(x + step)

    found = attack.attempt({"stray": stray}, linear[0], x, y, y == y, 1, ["stray"], 0.5, 5)
    assert (found.images, found.outside) == (40, 40)


def test_noise_is_a_corner_and_towards_aims_at_its_class():
    x = torch.full((4, 3, 2, 2), 0.5)
    found = attack.noise(None, x, ones(x), torch.full((4,), 0.1), 1, stream(0, "t")).x
    assert found.unique().tolist() == pytest.approx([0.4, 0.6])
    net, x, eps = Nearest(), plain(0.4), torch.tensor([0.3])
    for k in (0, 2):
        a = attack.towards(k, net, x, ones(x), eps, 10, stream(0, "t"))
        assert a.done.all() and net(a.x).argmax(1).tolist() == [k]
    one_step = attack.towards(2, net, x, ones(x), eps / 10, 1, stream(0, "t")).x
    start = attack.random_start(x, 0.03, stream(0, "t"))
    assert torch.allclose(one_step, (start + 0.03 / 4).clamp(0.37, 0.43), atol=1e-6)


# ---- numbers


def changes(*seeds):
    """Radii (seeds, images, 2) whose second column is that much larger than the first."""
    change = torch.tensor(seeds, dtype=torch.double)
    return torch.stack([torch.zeros_like(change), change], 2)


def test_intervals_are_of_seeds_where_there_are_several_and_else_of_pictures():
    measure, nan = attack.median_change, [math.nan] * 3
    found = attack.interval(changes([1, 2, 9], [3, 4, 9], [6, 6, 9]), measure, None)  # 2, 4, 6
    half = 4.303 * 2 / math.sqrt(3)
    ends = {"value": 4, "low": 4 - half, "high": 4 + half}
    assert found == {**{k: round(v, 5) for k, v in ends.items()}, "of": "seeds"}
    found = attack.interval(changes([-0.5] * 3, nan), measure, stream(0, "b"))
    assert found == {"value": -0.5, "low": -0.5, "high": -0.5, "of": "pictures"}
    assert attack.interval(changes(nan), measure, None)["value"] is None
    values = torch.randn(400, generator=stream(0, "v"), dtype=torch.double)
    ends = attack.bootstrap(values, torch.mean, stream(0, "b"))
    width = (ends["high"] - ends["low"]) / (2 * 1.96 * values.std() / 20)
    assert width == pytest.approx(1, abs=0.1)


def entry(method, seed, shift=0.0, clean=(7, 7, 7, 1)):
    lists = {"steps": [1, 2, None, 4], "min_eps": [0.1 + shift, 0.2 + shift, None, 0.3]}
    return {
        "method": method,
        "seed": seed,
        "clean": list(clean),
        **dict.fromkeys(attack.CRITERIA, lists),
    }


def test_summary_by_hand():
    models = {"a_s1": entry("a", 1), "b_s1": entry("b", 1, clean=(7, 7, 1, 1))}
    s = attack.summarise(models, 7)["a_s1"]
    assert s["clean"]["k"] == 3 and s["all"]["argmax"]["success"]["k"] == 3
    assert s["all"]["argmax"]["steps"] == {"median": 2}
    assert s["all"]["argmax"]["min_eps"] == {"median": 0.2, "censored": 1}
    assert attack.median(torch.tensor([])) is None


def test_compare_pairs_by_seed_and_image(monkeypatch):
    monkeypatch.setattr(attack, "RESAMPLES", 20)
    models = {"a_s1": entry("a", 1), "b_s1": entry("b", 1, -0.05), "b_s2": entry("b", 2, 9)}
    found = attack.compare(models, src=7, seed=0)["b"]
    case, everything = found["both_right"]["argmax"], found["all"]["argmax"]
    assert (found["reference"], found["seeds"]) == ("a", 1)
    assert everything["n"] == 4 and case["n"] == 3
    assert case["min_eps"]["value"] == pytest.approx(-0.05)
    assert case["needs_less"]["value"] == pytest.approx(2 / 3, abs=1e-4)
    assert everything.keys() == {"n", "min_eps", "needs_less"}
    assert case["min_eps"].keys() == {"value", "low", "high", "of"}
    assert attack.compare({"a_s1": entry("a", 1), "b_s2": entry("b", 2)}, 7, 0) == {}


def test_both_right_leaves_out_what_one_of_the_two_misreads(monkeypatch):
    """Of four pictures a misreads the last and b the second; b needs less on the first two."""
    monkeypatch.setattr(attack, "RESAMPLES", 20)
    models = {"a_s1": entry("a", 1), "b_s1": entry("b", 1, -0.05, clean=(7, 1, 7, 7))}
    models["b_s2"], models["a_s2"] = entry("b", 2, clean=(7, 7, 7, 7)), entry("a", 2)
    found = attack.compare(models, src=7, seed=0)["b"]
    assert found["both_right"]["argmax"]["n"] == 2 + 3 and found["all"]["argmax"]["n"] == 8
    assert found["both_right"]["argmax"]["needs_less"]["value"] == 0.25  # of 1 in 2, 0 in 3


def test_the_easiest_of_each_are_as_many_and_need_not_be_the_same(monkeypatch):
    """Of a's 0.1, 0.2, 0.5 and b's 0.25, 0.3, which reads two pictures: 0.25 against 0.1."""
    monkeypatch.setattr(attack, "RESAMPLES", 20)
    models = {"a_s1": entry("a", 1), "b_s1": entry("b", 1, 0.05, clean=(1, 7, 1, 7))}
    found = attack.compare(models, src=7, seed=0)["b"]["easiest"]["margin"]
    assert found.keys() == {"n", "min_eps"} and found["n"] == 2
    assert found["min_eps"]["value"] == pytest.approx(0.15)
    models["b_s1"]["clean"] = [1] * 4
    none = attack.compare(models, src=7, seed=0)["b"]["easiest"]["margin"]
    assert none["n"] == 0 and none["min_eps"]["value"] is None


def test_what_did_not_train_is_compared_with_nothing(monkeypatch):
    monkeypatch.setattr(attack, "RESAMPLES", 20)
    models = {f"{row}_s1": {**entry(row, 1), "trained": row != "a"} for row in "abc"}
    found = attack.compare(models, src=7, seed=0)
    assert found["c"]["reference"] == "b" and list(found) == ["c"]


# ---- the command line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tiny world and two models that learned it, as train.py would save them."""
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
    with torch.no_grad():
        model.fc.weight.fill_(3e38)  # finite, but not what it answers
    save_model(folder / "lost_s1.pt", model, 10)
    return folder


def save_model(path, model, classes):
    args = {"seed": 42, "model": "simplecnn", "width": 4}
    weights = {"weights": model.state_dict(), "args": args, "classes": classes, "size": [28, 28]}
    save_pt(weights, path)


@pytest.fixture
def world(trained, tmp_path, monkeypatch):
    """A copy that a test may fill, where nothing takes long."""
    few = {"RESAMPLES": 20, "SEARCH_STEPS": 2, "CHECK_QUERIES": 10, "RADII": [0.1]}
    for name, value in few.items():
        monkeypatch.setattr(attack, name, value)
    return shutil.copytree(trained, tmp_path / "results")


@pytest.fixture
def undrawn(monkeypatch):
    """For tests that look at no figure: a set takes three seconds."""
    monkeypatch.setattr(attack, "draw", lambda record, path: [])


@pytest.fixture
def attacked(world, monkeypatch, capsys):
    """The command line within this process: (exit code, stdout, stderr)."""

    def call(command):
        monkeypatch.setattr("sys.argv", ["attack.py", "--dir", str(world), *command.split()])
        try:
            attack.main()
            code = 0
        except SystemExit as e:
            code = e.code
        return code, *capsys.readouterr()

    return call


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "command, name, keys, answer",
    [
        (
            "targeted: --src 7 --tgt 3 --steps 5",
            "7to3_steps5",
            "index summary compared",
            r"of 10 images (none|\d+ \(median \d+ steps\)) become a 3, (none|\d+ .*) with "
            r"probability 0.9 or more; median eps needed: [^;]+, with that probability [^;]+",
        ),
        (
            "pairs: --pairs --eps 0.1 --steps 3 --n 2",
            "pairs_eps0.1_steps3_n2",
            "n_per_digit",
            r"\d+ of \d+ reach the digit they want, \d+ with probability 0.9",
        ),
        (
            "untargeted: --untargeted --eps 0.05 --steps 3 --queries 9 --n 30 --seed 1 --name mine",
            "mine",
            "n sample radii",
            r"of 30 images \d+ are right when clean, \d+ under every attack \(FGSM, PGD, .*\)",
        ),
        (
            "check: --check --eps 0.05 --steps 1 --n 5",
            "check_steps1_n5",
            "n passed",
            r"\d of 9 checks fail",
        ),
    ],
)
def test_each_mode_runs_repeats_and_tells(world, attacked, undrawn, command, name, keys, answer):
    mode, command = command.split(": ")
    code, said, _ = attacked(command)
    path = world / f"attack_{name}.json"
    record, written = read(path), path.read_bytes()
    always = {"schema", "script", "name", "mode", "args", "models", "run"}
    assert set(record) == always | set(keys.split()) and record["schema"] == 2
    assert set(record["run"]) == {"torch", "threads", "device"}
    assert set(record["models"]) == set(TWO.split())
    assert code == (0 if record.get("passed", True) else 1)
    first, *_ = said.splitlines()
    assert first.startswith(f"{mode} attack on {TWO} in {world}: ")
    given = re.sub(r"--(pairs|check|untargeted|name mine) ?", "", command).split("--")[1:]
    assert {*map(str.strip, given)} <= {*first.split(": ")[1].split(", ")}
    told = said[said.index("\nbaseline_s42: ") :]
    assert re.match(rf"\nbaseline_s42: {answer}\n", told), told
    assert told.count("\n") <= 12 + 18 * (code == 1) and f"wrote {path}" in told
    assert "|" not in said and "(2 of 2)" in said
    assert attacked(command)[0] == code and path.read_bytes() == written
    assert (world / "times.csv").read_text().count(f"{path.stem},") == 2


def test_rows_are_compared_on_the_images_that_both_read(world, attacked, undrawn):
    said = attacked("--steps 3 --name lists")[1]
    told = r"of \d+ images that both read correctly, jitter needs a smaller eps than baseline "
    assert re.search(told + r"on \d+%; for probability 0.9, on \d+%\n", said)
    assert torch.load(world / "attack_lists.pt")["script"] == "attack.py", "so it is no model"
    record = read(world / "attack_lists.json")
    for m in record["models"].values():
        lists = [m["clean"], *(m[c][k] for c in attack.CRITERIA for k in ("steps", "min_eps"))]
        assert {len(values) for values in lists} == {len(record["index"])}


def test_a_kind_of_change_stands_in_the_name_the_settings_and_the_words(world, attacked, undrawn):
    said = attacked("--steps 3 --change flat")[1]
    assert "median eps needed by flat changes: " in said
    assert read(world / "attack_7to3_flat_steps3.json")["args"]["change"] == "flat"
    said = attacked("--steps 3 --change any")[1]
    assert (
        "change any" not in said and "change" not in read(world / "attack_7to3_steps3.json")["args"]
    )


def test_a_failed_check_is_told_by_the_exit_code(attacked, monkeypatch):
    monkeypatch.setattr(attack, "POINT", -2)  # no change is little enough
    code, said, _ = attacked("--check --steps 2 --n 10 --models jitter_s42")
    assert code == 1 and "jitter_s42: 5 of 9 checks fail" in said
    assert re.search(r"twice the steps change little: eps 0\.\d+, APGD [\d.]+, twice", said)


@pytest.mark.parametrize(
    "command, name",
    [
        ("--src 7 --tgt 3 --eps 0.05", "attack_7to3"),
        ("--src 3 --tgt 8 --eps 0.1 --n 500", "attack_3to8_eps0.1_n500"),
        ("--pairs --seed 43 --steps 100", "attack_pairs_s43"),
        ("--untargeted --restarts 10 --sweep 0.2 0.1", "attack_untargeted_restarts10_sweep0.1-0.2"),
        ("--check --split val --models at_s42 --threads 2", "attack_check_val"),
        ("--check --n 20 --name mine", "attack_mine"),
    ],
)
def test_a_result_is_named_by_what_differs(command, name):
    assert attack.result_name(*attack.get_args(command.split())) == name


def test_a_result_of_other_models_is_not_replaced(world, attacked, undrawn):
    one = "--pairs --n 1 --steps 1 --models"
    assert attacked(f"{one} jitter_s42")[0] == 0
    path = world / "attack_pairs_steps1_n1.json"
    before = path.read_bytes()
    code, _, said = attacked(f"{one} {world}/baseline_s42.pt")
    assert code == 2 and "models ['jitter_s42']" in said and path.read_bytes() == before
    assert attacked(f"{one} {world}/baseline_s42.pt --overwrite")[0] == 0
    (m,) = read(path)["models"].values()
    assert (m["method"], m["seed"]) == ("baseline", 42)


@pytest.mark.parametrize(
    "command, wrong",
    [
        ("--src 7 --tgt 7", "both 7"),
        ("--tgt 12", "end at 9"),
        ("--eps nan", "--eps"),
        ("--steps 0", "--steps"),
        ("--models jiter_s42", "jitter_s42"),
        ("--models odd_s1", "built for"),
        ("--pairs --check", "not allowed"),
        ("--pairs --src 3", "--src means nothing"),
        ("--pairs --change flat", "--change means nothing"),
        ("--check --restarts 3", "--restarts means nothing"),
        ("--report --pairs", "--report"),
        (f"--models {TWO} jitter_s42", "two of row jitter and seed 42"),
        ("--dir nowhere", "missing"),
        ("--dir nowhere --report", "missing"),
        ("--split few --src 9", "--split"),
        ("--untargeted --name a/b", "--name"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(trained, mistake, command, wrong):
    mistake(f"attack.py {'' if '--dir' in command else f'--dir {trained}'} {command}", wrong)


def test_a_model_that_answers_with_nan_is_not_called_robust(world, mistake):
    command = f"attack.py --dir {world} --models jitter_s42 lost_s1 --n 5 --steps 2 --untargeted"
    mistake(command, "lost_s1 gives answers that are no numbers")


def test_pairs_go_as_far_as_every_model_has_classes(world, attacked, undrawn):
    split = torch.load(world / "test_hard.pt")
    save_pt({k: v[split["labels"] < 5] for k, v in split.items()}, world / "test_hard.pt")
    assert attacked("--pairs --n 1 --steps 1 --models jitter_s42 odd_s1")[0] == 0
    assert len(read(world / "attack_pairs_steps1_n1.json")["models"]["odd_s1"]["argmax"]) == 5


def test_an_attack_needs_an_image_of_its_digit_that_every_model_reads(world, attacked):
    split = torch.load(world / "test_hard.pt")
    one = {k: v[:1] for k, v in split.items()}
    save_pt({**one, "labels": (one["labels"] + 5) % 10}, world / "test_hard.pt")
    code, _, said = attacked("--pairs --steps 1 --models jitter_s42")
    assert code == 2 and "no image is read correctly by every model" in said
    code, _, said = attacked("--src 9")
    assert code == 2 and "no image of digit 9" in said


# ---- figures


def legible(fig):
    """Assert that no title is cut and that no legend hides data."""
    fig.savefig(io.BytesIO(), dpi=fig.dpi)
    for text in fig.findobj(Text):
        if re.search("[a-z]", text.get_text()):
            box = text.get_window_extent()
            inside = box.x0 >= -1 and box.x1 <= fig.bbox.x1 + 1 and box.y1 <= fig.bbox.y1 + 1
            assert inside and box.y0 >= -1, text.get_text()
    for legend in filter(None, (ax.get_legend() for ax in fig.axes)):
        assert not legend.get_window_extent().overlaps(legend.axes.get_window_extent())


def test_report_draws_each_results_own_figures_and_nothing_else(world, attacked, monkeypatch):
    (world / "mnist").mkdir()
    assert "holds no results" in attacked("--report")[1]
    long = [f"{row}_{'infergroups_classifyimage_' * 3}s42" for row in ("jitter", "balance")]
    for name in long:  # in JSON they are sorted
        shutil.copy(world / "jitter_s42.pt", world / f"{name}.pt")
    keep = attack.save_figure
    monkeypatch.setattr(attack, "save_figure", lambda fig, path: keep(fig, path) or legible(fig))
    for options in ("--n 2", "--pairs --n 1", "--untargeted --n 20 --queries 5 --sweep 0.1"):
        assert "look at" in attacked(f"--models {' '.join(long)} --steps 1 {options}")[1]
    monkeypatch.setattr(attack, "save_figure", keep)
    figures = conftest.contents(world / "figures")
    monkeypatch.setattr(attack, "MODES", {})  # --report computes nothing
    old = read(world / "attack_7to3_steps1_n2.json")
    for entry in old["models"].values():
        del entry["margin"]
    save_json(old, world / "mnist" / "attack_7to3.json")
    shutil.rmtree(world / "figures")
    code, said, _ = attacked("--report")
    assert code == 0 and conftest.contents(world / "figures") == figures
    assert {path.name for path in figures} == {
        "attack_7to3_steps1_n2_examples.png",
        "attack_7to3_steps1_n2_min_eps.png",
        "attack_pairs_steps1_n1.png",
        "attack_untargeted_steps1_queries5_sweep0.1_n20_robust_curve.png",
    }
    said = attacked(f"--dir {world}/mnist --report")[1]  # its pictures are not kept
    assert "attack_7to3_min_eps.png" in said and "examples" not in said
    save_json({"mode": "of a ship"}, world / "attack_0.json")
    code, _, said = attacked("--report")
    assert code == 2 and "is no result of attack.py" in said
