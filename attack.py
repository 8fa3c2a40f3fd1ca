"""Fool trained models with perturbations too small to matter to a person; say how hard it was.

Reads   DIR/test_hard.pt (from make_data.py), DIR/NAME.pt (from train.py)
Writes  DIR/attack_7to3.json, attack_pairs.json, attack_untargeted.json, attack_check.json, their
        names longer by every setting that differs from the defaults; DIR/figures/attack_*.png;
        DIR/attack_7to3.pt (example pictures, so that --report can draw them again)

    python attack.py --src 7 --tgt 3 --eps 0.05      # is the cured model easier to fool?
    python attack.py --n 500 --models baseline_s42 baseline_s43 jitter_s42 jitter_s43
    python attack.py --pairs                         # all 90 pairs of digits
    python attack.py --untargeted --eps 0.3 --dir results/mnist --models at_s42
    python attack.py --check                         # can the attacks be trusted? else exit code 1
    python attack.py --report                        # tables and figures of what is there

Radii are L-inf, in pixel units of [0, 1]. What counts as fooled is decided by `judge`, which sees
only the attack's output. Models are grouped by NAME without _sSEED; the first group is the
reference, and each other one is compared with it, seed by seed and image by image.
"""

import argparse
import math
import re
import sys
import time
from functools import partial
from statistics import fmean
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (
    INK,
    ROOT,
    SPLITS,
    chunks,
    common_args,
    die,
    fill,
    guard,
    load_json,
    load_model,
    load_pt,
    load_split,
    markdown,
    mean_sd,
    name_of,
    number,
    progress,
    row_of,
    run,
    save_figure,
    save_json,
    save_pt,
    setup,
    stream,
    wilson,
    world_of,
)

CHUNK = 256  # images attacked at once: what fits in the cache of one core
CONFIDENT = 0.9  # target probability of the stricter criterion
RESOLUTION = 1e-3  # of a min-eps
SEARCH_STEPS = 50  # at each radius of the min-eps search; half as many in a bisection round
QUERIES = 5000  # of the Square attack, per image
SAMPLE = 1000  # images of the robust curve, which is too slow for the whole split
RESAMPLES = 2000  # of the bootstrap
POINT = 0.02  # --check: a change below two percentage points is little
RADII = [0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5]  # of the min-eps search
CURVE = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.25, 1.5]  # radii of the robust curve, in eps
MODES = {  # the flags that mean something in each mode, and their defaults there
    "targeted": dict(src=7, tgt=3, eps=0.05, steps=1000, n=40),
    "pairs": dict(eps=0.05, steps=100, n=50),
    "untargeted": dict(eps=0.05, steps=100, restarts=1, n=None, sweep=None, queries=QUERIES),
    "check": dict(eps=0.05, steps=100, n=500),
}


# ---- the attack


class Attacked(NamedTuple):
    x: torch.Tensor  # (B,3,H,W) in [0, 1] and in the ball
    steps: torch.Tensor  # int64 (B,): gradient steps each image took
    done: torch.Tensor  # bool (B,): did `stop` say so


def random_start(x, eps, gen):
    """Anywhere in the ball; pgd brings it back into [0, 1]. eps a float or (B,1,1,1)."""
    return x + eps * (2 * torch.rand(x.shape, generator=gen, device=gen.device).to(x) - 1)


def per_image(value, x):
    """A float or (B,) as (B,1,1,1), of the type and on the device of x (B,3,H,W)."""
    return torch.as_tensor(value, dtype=x.dtype, device=x.device).expand(len(x)).view(-1, 1, 1, 1)


def inside(z, low, high):
    """z (B,3,H,W) brought into the box, channels last."""
    return z.clamp(low, high).contiguous(memory_format=torch.channels_last)


def pgd(
    model,
    x,
    y,
    eps,
    steps,
    gen,
    step_size=None,
    targeted=False,
    loss=F.cross_entropy,
    stop=None,
    decay=False,
    start=None,
):
    """Projected gradient descent in the L-inf ball (Madry et al., 2018) from a random start.

    x (B,3,H,W) in [0, 1]; y (B,) labels to leave, or targets to reach where `targeted`; eps and
    step_size are floats or (B,), in pixel units; a step is eps / 10 by default, and with `decay` it
    falls linearly towards a tenth of itself. loss(logits, y) is a scalar in which images have the
    same weight. stop(logits, y) -> bool (B,) takes finished images out of the batch, so they cost
    nothing more. `start` (B,3,H,W) replaces the random start. Nothing gathers in .grad; train/eval
    mode stays as it was found.
    """
    eps = per_image(eps, x)
    rate = eps / 10 if step_size is None else per_image(step_size, x)
    rate = -rate if targeted else rate
    if start is None:
        start = random_start(x, eps, gen)
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    z = inside(start, low, high)
    x_adv, taken = torch.empty_like(z), torch.zeros(len(x), dtype=torch.long, device=x.device)
    done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    alive = torch.arange(len(x), device=x.device)  # the images that z, y, low, high, rate hold
    training = model.training
    model.eval()
    for step in range(steps + (stop is not None)):  # after the last step only `stop` looks again
        logits = model(z.requires_grad_())
        if stop is not None:
            hit = stop(logits.detach(), y)
            done[alive], x_adv[alive] = hit, z.detach()
            keep = (~hit).nonzero()[:, 0]
        if step == steps or (stop is not None and len(keep) == 0):
            break
        taken[alive] = step + 1 if stop is None else torch.where(hit, step, step + 1)
        if stop is not None and len(keep) < len(alive):
            (grad,) = torch.autograd.grad(loss(logits[keep], y[keep]), z)
            batch = (alive, y, z.detach(), grad, low, high, rate)
            alive, y, z, grad, low, high, rate = (t[keep] for t in batch)
        else:
            (grad,) = torch.autograd.grad(loss(logits, y), z)
        move = grad.sign_().mul_(rate * (1 - 0.9 * step / steps) if decay else rate)
        z = inside(z.detach() + move, low, high)
    x_adv[alive] = z.detach()
    model.train(training)
    return Attacked(x_adv, taken, done)


# ---- what counts as fooled


def says(logits, y):
    """argmax: the answer is y (targeted)."""
    return logits.argmax(1) == y


def is_sure(logits, y):
    """confidence: y has at least CONFIDENT probability, so the answer is y as well (targeted)."""
    return logits.softmax(1).gather(1, y[:, None])[:, 0] >= CONFIDENT


def is_wrong(logits, y):
    """The answer is not y (untargeted)."""
    return logits.argmax(1) != y


def lead(logits, y):
    """Best other logit minus that of y, float (B,): below zero where the answer is y."""
    own = F.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(own, -math.inf).amax(1) - logits[own]


def margin(logits, y):
    """A loss that asks only which logit is largest (after Carlini & Wagner, 2017).

    It does not saturate where a model is sure of itself, as cross-entropy does.
    """
    return lead(logits, y).mean()


class Criterion(NamedTuple):
    reached: object  # (logits, y) -> bool (B,)
    losses: tuple  # what `strongest` minimises to get there, one after the other


CRITERIA = {  # the second implies the first
    "argmax": Criterion(says, (margin, F.cross_entropy)),
    "confidence": Criterion(is_sure, (F.cross_entropy,)),
}


def distance(a, b):
    """L-inf distance per image, float (B,)."""
    return (a - b).abs().amax((1, 2, 3))


@torch.no_grad()
def judge(model, x, y, eps, x_adv, reached):
    """bool (B,): is x_adv in the ball around x and in [0, 1], and does the model fall for it?

    It knows nothing of how x_adv was made.
    """
    in_ball = distance(x_adv, x) <= eps + 1e-6
    in_ball &= (x_adv.amin((1, 2, 3)) >= 0) & (x_adv.amax((1, 2, 3)) <= 1)
    return in_ball & reached(model(x_adv), y)


def carry_out(attack, model, reached, x, y, eps, **more):
    """Run attack(x, y, eps, **more) -> Attacked chunk by chunk; `judge` says what is done.

    x (N,3,H,W) in [0, 1]; y (N,); eps a float or (N,); `more` are tensors with a row per image.
    """
    eps = torch.as_tensor(eps, dtype=x.dtype, device=x.device).expand(len(x))
    parts = []
    for i in chunks(max(len(x), 1), CHUNK):  # no images: one empty part
        a = attack(x[i], y[i], eps[i], **{key: value[i] for key, value in more.items()})
        parts.append(a._replace(done=judge(model, x[i], y[i], eps[i], a.x, reached)))
    return Attacked(*map(torch.cat, zip(*parts, strict=True)))


@torch.no_grad()
def answer(model, x):
    """Predicted classes int64 (N,) of pictures (N,3,H,W)."""
    return torch.cat([model(x[i]).argmax(1) for i in chunks(len(x), 1000)])


# ---- targeted: from src to tgt


def headline(model, x, y, args, gen):
    """{criterion: steps float (N,), inf where it failed} and the last adversarial images.

    PGD (Madry et al., 2018) on the targeted cross-entropy: random start, step eps / 10, at most
    args.steps. The criteria are two marks on one path: where argmax was reached, the attack
    continues to confidence. x (N,3,H,W) in [0, 1]; y (N,).
    """
    steps, x_adv = {}, x.clone()
    todo, start = torch.arange(len(x), device=x.device), random_start(x, args.eps, gen)
    taken = torch.zeros(len(x), device=x.device)
    for name, (reached, _) in CRITERIA.items():
        attack = partial(pgd, model, steps=args.steps, gen=gen, targeted=True, stop=reached)
        a = carry_out(attack, model, reached, x[todo], y[todo], args.eps, start=start)
        x_adv[todo], taken = a.x, taken + a.steps
        done = a.done & (taken <= args.steps)
        todo, start, taken = todo[done], a.x[done], taken[done]
        steps[name] = torch.full((len(x),), math.inf, device=x.device)
        steps[name][todo] = taken
    return steps, x_adv


def strongest(model, criterion, x, y, eps, start, steps):
    """Attacked: targeted PGD, steps falling from eps / 4 towards eps / 40, with each loss in turn.

    The second loss sees the images that resisted the first. The argmax needs both: the margin
    alone would flatter models that are sure of themselves, cross-entropy alone those that never
    are. Confidence is cross-entropy's own goal. eps (N,); start (N,3,H,W).
    """
    x_adv, taken, done = start.clone(), torch.zeros_like(y), torch.zeros_like(y, dtype=torch.bool)
    reached = criterion.reached
    for loss in criterion.losses:
        i = (~done).nonzero()[:, 0]
        attack = partial(
            pgd, model, steps=steps, gen=None, targeted=True, loss=loss, stop=reached, decay=True
        )
        more = {"step_size": eps[i] / 4, "start": start[i]}
        a = carry_out(attack, model, reached, x[i], y[i], eps[i], **more)
        x_adv[i], taken[i], done[i] = a.x, taken[i] + a.steps, a.done
    return Attacked(x_adv, taken, done)


class Bracket(NamedTuple):
    """What the min-eps search knows of each image."""

    low: torch.Tensor  # float (N,): the largest radius that failed
    high: torch.Tensor  # float (N,): the smallest that worked, inf where none has
    best: torch.Tensor  # (N,3,H,W): the adversarial image at `high`


def try_out(model, criterion, x, y, bracket, i, eps, start, steps):
    """The bracket after an attack on images i (K,) with radii eps (K,) from start (K,3,H,W).

    A success brings the upper end down to the radius it really used.
    """
    a = strongest(model, criterion, x[i], y[i], eps, start, steps)
    low, high, best = (t.clone() for t in bracket)
    low[i[~a.done]] = eps[~a.done]
    high[i[a.done]] = distance(a.x, x[i])[a.done]
    best[i[a.done]] = a.x[a.done]
    return Bracket(low, high, best)


def search_min_eps(model, x, y, radii, gen, steps):
    """{criterion: smallest radius that works, float (N,)}; inf where none of `radii` does.

    It is 0 where nothing is needed. First each radius in ascending order, for the images that
    still resist; then bisection between the last failure and the first success until they are
    RESOLUTION apart, all images in one batch, each with a radius of its own. Each round starts
    from the last success, scaled down. An image that cannot be brought to the argmax is not tried
    for confidence, which implies it.
    """
    found, floor = {}, torch.zeros(len(x), device=x.device)
    for name, criterion in CRITERIA.items():
        there = judge(model, x, y, 0.0, x, criterion.reached)
        high = torch.full_like(floor, math.inf).masked_fill(there, 0)
        bracket = Bracket(floor, high, x)
        for radius in radii:
            i = (bracket.high.isinf() & (bracket.low < radius)).nonzero()[:, 0]
            eps, start = floor.new_full((len(i),), radius), random_start(x[i], radius, gen)
            bracket = try_out(model, criterion, x, y, bracket, i, eps, start, steps)
        while True:
            low, high, best = bracket
            i = (high.isfinite() & (high - low > RESOLUTION)).nonzero()[:, 0]
            if len(i) == 0:
                break
            middle = (low[i] + high[i]) / 2
            shrunk = x[i] + (best[i] - x[i]) * (middle / high[i]).view(-1, 1, 1, 1)
            half = max(steps // 2, 1)
            bracket = try_out(model, criterion, x, y, bracket, i, middle, shrunk, half)
        found[name], floor = bracket.high, bracket.high
    return found


def targeted(models, split, args):
    """The record of one pair of digits, with the pictures of a few examples."""
    index = digits(split, args.src)[: args.n]
    if len(index) == 0:
        split_file = f"{args.dir}/{args.split}.pt"
        die(f"{split_file} has no image of digit {args.src}", "choose another --src or --split")
    x, y = split.x(index), torch.full((len(index),), args.tgt, device=index.device)
    entries, adversarial = {}, {}
    for name, m in models.items():
        working_on(name, models, f"attack within eps {args.eps:g} on {len(x):,} images")
        steps, adversarial[name] = headline(m.net, x, y, args, stream(args.seed, "targeted"))
        working_on(name, models, "search for the smallest eps of each image")
        gen = stream(args.seed, "min-eps")
        min_eps = search_min_eps(m.net, x, y, RADII, gen, SEARCH_STEPS)
        working_on(name, models, "the same with four times the steps on a few")
        gen, few = stream(args.seed, "min-eps"), slice(min(len(x) // 10 + 1, 50))
        longer = search_min_eps(m.net, x[few], y[few], RADII, gen, 4 * SEARCH_STEPS)
        entries[name] = {**m.about, "clean": answer(m.net, x).tolist()}
        for c in CRITERIA:
            ratio = (longer[c] / min_eps[c][few]).nan_to_num(1, posinf=1).median()
            entries[name][c] = {
                "steps": [None if math.isinf(v) else int(v) for v in steps[c].tolist()],
                "min_eps": [None if math.isinf(v) else round(v, 4) for v in min_eps[c].tolist()],
                "four_times_the_steps": round(float(ratio), 4),
            }
    return {
        "index": index.tolist(),
        "models": entries,
        "summary": summarise(entries, args),
        "compared": compare(entries, args),
        "pictures": examples(models, entries, adversarial, x, args),
    }


def examples(models, entries, adversarial, x, args):
    """Pictures for the figure: the first seed of the first two rows of the table.

    Chosen are images that most of the two read correctly when clean, which counts double, and
    that were then brought to `confidence`.
    """
    names = [next(iter(seeds.values())) for seeds in list(by_method(entries).values())[:2]]
    score = torch.zeros(len(x))
    for name in names:
        score += 2 * (torch.tensor(entries[name]["clean"]) == args.src)
        score += column(entries[name], "confidence", "steps", math.inf).isfinite()
    chosen = score.argsort(descending=True, stable=True)[:6].to(x.device)
    pictures = {}
    for name in names:
        x_adv = adversarial[name][chosen]
        pictures[name] = {
            "x_adv": x_adv.cpu(),
            "clean": top_answers(models[name].net, x[chosen]),
            "fooled": top_answers(models[name].net, x_adv),
        }
    return {"x": x[chosen].cpu(), "models": pictures}


@torch.no_grad()
def top_answers(net, x):
    """[[digit, its probability]] of pictures (B,3,H,W)."""
    best = net(x).softmax(1).max(1)
    both = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[digit, round(p, 3)] for digit, p in both]


def digits(split, d):
    """Which images show digit d, int64 (K,)."""
    return (split.labels == d).nonzero()[:, 0]


# ---- pairs: every digit to every other


def pairs(models, split, args):
    """Success rate at args.eps by source (row) and target (column).

    On images that every model reads correctly.
    """
    classes = min(m.classes for m in models.values())
    x = split.x(slice(None))
    right = torch.stack([answer(m.net, x) == split.labels for m in models.values()]).all(0)
    chosen = [i[right[i]][: args.n] for i in (digits(split, d) for d in range(classes))]
    index = torch.cat([i.repeat_interleave(classes) for i in chosen])
    y = torch.cat([torch.arange(classes, device=i.device).repeat(len(i)) for i in chosen])
    index, y = index[split.labels[index] != y], y[split.labels[index] != y]
    cell = split.labels[index] * classes + y
    n = cell.bincount(minlength=classes**2)
    entries = {}
    for name, m in models.items():
        gen, table = stream(args.seed, "pairs"), {}
        fooled = torch.ones(len(index), dtype=torch.bool, device=index.device)
        for criterion in CRITERIA:
            i = fooled.nonzero()[:, 0]  # who resists the first criterion is not tried for the next
            working_on(name, models, f"{criterion}: {len(i):,} attacks")
            x = split.x(index[i])
            eps, start = x.new_full((len(x),), args.eps), random_start(x, args.eps, gen)
            fooled[i] = strongest(m.net, CRITERIA[criterion], x, y[i], eps, start, args.steps).done
            share = (cell[fooled].bincount(minlength=classes**2) / n).view(classes, classes)
            table[criterion] = [
                [None if math.isnan(v) else round(v, 4) for v in row] for row in share.tolist()
            ]
            table[f"{criterion}_mean"] = rate(fooled)
        entries[name] = {**m.about, **table}
    return {"models": entries, "n_per_digit": [len(i) for i in chosen]}


# ---- untargeted: anything but the truth; model, x (B,3,H,W), y (B,) and eps (B,) to Attacked


def fgsm(model, x, y, eps, steps, gen):
    """One full step from the clean image (Goodfellow et al., 2015)."""
    return pgd(model, x, y, eps, 1, gen, step_size=eps, start=x)


def pgd_untargeted(model, x, y, eps, steps, gen):
    """PGD (Madry et al., 2018) until fooled: random start, steps from eps / 4 towards eps / 40."""
    return pgd(model, x, y, eps, steps, gen, eps / 4, stop=is_wrong, decay=True)


def each_cross_entropy(logits, y, target):
    return F.cross_entropy(logits, y, reduction="none")


def targeted_dlr(logits, y, target):
    """How close class `target` is to winning over y, float (B,), whatever the logits' scale.

    The difference of logits ratio of Croce & Hein (2020); with two classes, the difference itself.
    """
    top = logits.sort(1).values
    scale = top[:, -1] - top[:, -4:-2].mean(1) if logits.shape[1] > 2 else 1
    own, other = (logits.gather(1, k[:, None])[:, 0] for k in (y, target))
    return (other - own) / (scale + 1e-12)


class Climb(NamedTuple):
    """What APGD knows of each image that still stands."""

    index: torch.Tensor  # int64 (B,): which image this is
    y: torch.Tensor  # (B,)
    target: torch.Tensor  # (B,)
    low: torch.Tensor  # (B,3,H,W): the ball's ends, as `high`
    high: torch.Tensor
    rate: torch.Tensor  # (B,1,1,1): step size
    z: torch.Tensor  # (B,3,H,W): the present point, and the one before it
    before: torch.Tensor
    loss: torch.Tensor  # (B,): at the present point
    rose: torch.Tensor  # int64 (B,): in how many steps the loss rose since the last checkpoint
    best: torch.Tensor  # (B,3,H,W): the point with the highest loss, its gradient, its loss
    best_grad: torch.Tensor
    best_loss: torch.Tensor
    mark: torch.Tensor  # (B,): the highest loss at the last checkpoint
    halved: torch.Tensor  # bool (B,): was the rate halved there


def apgd(model, x, y, eps, steps, gen, loss=each_cross_entropy, target=None):
    """APGD (Croce & Hein, 2020): gradient ascent with momentum that sets its own step size.

    The step begins with 2 eps. At checkpoints that come ever more often, it is halved for the
    images whose loss rose in too few steps since the last one, or whose best loss has not moved;
    these continue from the best point found. Fooled images leave the batch. x (B,3,H,W) in [0, 1];
    y and target (B,); eps (B,); loss(logits, y, target) -> float (B,) is to be raised.
    """
    eps, zeros = per_image(eps, x), torch.zeros_like(y)
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    z, lowest = inside(random_start(x, eps, gen), low, high), torch.full(y.shape, -math.inf).to(x)
    found, taken, done = z.clone(), zeros.clone(), zeros.bool()
    s = Climb(
        index=torch.arange(len(x), device=x.device),
        y=y,
        target=y if target is None else target,
        low=low,
        high=high,
        rate=2 * eps,
        z=z,
        before=z,
        loss=lowest,
        rose=zeros,
        best=z,
        best_grad=z,
        best_loss=lowest,
        mark=lowest,
        halved=zeros.bool(),
    )
    checkpoint = span = max(int(0.22 * steps), 1)
    for step in range(steps + 1):
        z = s.z.detach().requires_grad_()
        logits = model(z)
        value = loss(logits, s.y, s.target)
        (grad,) = torch.autograd.grad(value.sum(), z)
        value, fooled = value.detach(), is_wrong(logits.detach(), s.y)
        if fooled.any():
            found[s.index[fooled]], done[s.index[fooled]] = s.z[fooled], True
            value, grad, s = value[~fooled], grad[~fooled], Climb(*(t[~fooled] for t in s))
        higher = value > s.best_loss
        s = s._replace(
            loss=value,
            rose=s.rose + (value > s.loss) * (step > 0),
            best=where(higher, s.z, s.best),
            best_grad=where(higher, grad, s.best_grad),
            best_loss=where(higher, value, s.best_loss),
        )
        if step == steps or len(s.y) == 0:
            break
        if step == 0:
            s = s._replace(mark=value)
        if step == checkpoint:
            halve = (s.rose <= 0.75 * span) | ~s.halved & (s.best_loss <= s.mark)
            grad, rate = where(halve, s.best_grad, grad), where(halve, s.rate / 2, s.rate)
            s = s._replace(z=where(halve, s.best, s.z), rate=rate, halved=halve)
            s = s._replace(mark=s.best_loss, rose=torch.zeros_like(s.rose))
            span = max(span - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
            checkpoint += span
        taken[s.index] += 1
        ahead = inside(s.z + s.rate * grad.sign(), s.low, s.high)
        if step > 0:
            ahead = s.z + 0.75 * (ahead - s.z) + 0.25 * (s.z - s.before)
            ahead = inside(ahead, s.low, s.high)
        s = s._replace(z=ahead, before=s.z)
    found[s.index] = s.best
    return Attacked(found, taken, done)


def where(mask, a, b):
    """torch.where with one decision (B,) an image."""
    return torch.where(mask.view(-1, *[1] * (a.ndim - 1)), a, b)


def apgd_targeted(model, x, y, eps, steps, gen):
    """APGD on the targeted DLR loss, towards the nine strongest other classes in turn."""
    with torch.no_grad():
        logits = model(x)
    own = F.one_hot(y, logits.shape[1]).bool()
    others = logits.masked_fill(own, -math.inf).argsort(1, descending=True)[:, :-1]
    x_adv, taken, done = x.clone(), torch.zeros_like(y), torch.zeros_like(own[:, 0])
    for target in others[:, :9].unbind(1):
        i = (~done).nonzero()[:, 0]
        a = apgd(model, x[i], y[i], eps[i], steps, gen, targeted_dlr, target[i])
        x_adv[i], taken[i], done[i] = a.x, taken[i] + a.steps, a.done
    return Attacked(x_adv, taken, done)


SQUARE_SCHEDULE = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)  # of 10,000 queries


@torch.no_grad()
def square(model, x, y, eps, steps, gen):
    """Square attack (Andriushchenko et al., 2020): a random search that never sees a gradient.

    From vertical stripes of +-eps; each query sets a random square to +-eps per channel, kept
    where the margin falls. The squares shrink on the authors' schedule, compressed to `steps`
    queries.
    Two departures: a square may keep the colours that it had (the authors draw again until it
    changes the picture), and may touch the last row and column.
    """
    b, c, h, w = x.shape
    best = moved(x, eps, random_signs(x, (b, c, 1, w), gen))
    score, used = lead(model(best), y), torch.ones_like(y)
    found, done = best.clone(), score > 0
    alive = torch.arange(b, device=x.device)  # the images that x, y, eps, best and score hold
    for query in range(1, steps):
        standing = score <= 0
        if not standing.all():  # fooled images leave the batch
            found[alive], done[alive] = best, ~standing
            batch = (alive, x, y, eps, best, score)
            alive, x, y, eps, best, score = (t[standing] for t in batch)
        if len(alive) == 0:
            break
        halvings = sum(query / steps * 10_000 > at for at in SQUARE_SCHEDULE)
        side = min(max(round(math.sqrt(0.8 * 0.5**halvings * h * w)), 1), min(h, w) - 1)
        rows, columns = covered(x, h, side, gen), covered(x, w, side, gen)
        image = torch.arange(len(x), device=x.device).view(-1, 1, 1)
        place = image, rows[:, :, None], columns[:, None, :]
        tried = best.clone()
        pixels = x.permute(0, 2, 3, 1)[place]  # (B,side,side,C)
        signs = random_signs(x, (len(x), 1, 1, c), gen)
        tried.permute(0, 2, 3, 1)[place] = moved(pixels, eps, signs)
        new = lead(model(tried), y)
        better = new > score
        best[better], score[better] = tried[better], new[better]
        used[alive] += 1
    found[alive], done[alive] = best, score > 0
    return Attacked(found, used, done)


def random_signs(x, shape, gen):
    """-1 or 1 at random, of the type and on the device of x."""
    return 2 * (torch.rand(shape, generator=gen).to(x) < 0.5).to(x) - 1


def moved(x, eps, signs):
    """x (B,C,H,W) moved by +-eps (B,), within [0, 1]."""
    return (x + eps.view(-1, 1, 1, 1) * signs).clamp(0, 1)


def covered(x, length, side, gen):
    """int64 (B,side): a run of `side` neighbours at a random place for each image of x."""
    first = (torch.rand(len(x), 1, generator=gen).to(x) * (length - side + 1)).long()
    return first + torch.arange(side, device=x.device)


ATTACKS = {
    "FGSM": fgsm,
    "PGD": pgd_untargeted,
    "APGD": apgd,
    "APGD-T": apgd_targeted,
    "Square": square,
}
ALONE = ("FGSM", "PGD", "APGD")  # seen by every image; the others by what these leave
STRONG = ("APGD", "APGD-T")  # restarts change these


def fool(name, net, x, y, eps, args, gen):
    """Which images one attack fools, bool (N,)."""
    steps = args.queries if name == "Square" else args.steps
    attack = partial(ATTACKS[name], net, steps=steps, gen=gen)
    return carry_out(attack, net, is_wrong, x, y, eps).done


def worst_case(m, x, y, args):
    """({attack: accuracy}, standing bool (N,): right under every attack).

    The first attacks run on every image that is right when clean, so their "own" accuracy does not
    depend on the others; the rest, and further restarts, see only the images still standing, as in
    AutoAttack (Croce & Hein, 2020). "so_far" is the worst case up to and including that attack.
    """
    right = answer(m.net, x) == y
    standing, found = right.clone(), {"clean": rate(right)}
    for name in ATTACKS:
        found[name] = {}
        for restart in range(args.restarts if name in STRONG else 1):
            alone = name in ALONE and restart == 0
            i = (right if alone else standing).nonzero()[:, 0]
            gen = stream(args.seed, f"{name} {restart}")
            fooled = i[fool(name, m.net, x[i], y[i], args.eps, args, gen)]
            standing[fooled] = False
            if alone:
                own = right.clone()
                own[fooled] = False
                found[name]["own"] = rate(own)
        found[name]["so_far"] = rate(standing)
    return found, standing


def robust_curve(m, x, y, radii, args):
    """Accuracy at each radius under APGD; who is fooled in a ball is fooled in a larger one."""
    standing, curve = answer(m.net, x) == y, []
    for eps in radii:
        i = standing.nonzero()[:, 0]
        gen = stream(args.seed, f"curve {eps}")
        standing[i[fool("APGD", m.net, x[i], y[i], eps, args, gen)]] = False
        curve.append(rate(standing))
    return curve


def untargeted(models, split, args):
    """The record of the first args.n images: accuracy under every attack, and by eps."""
    x, y = split.x(slice(args.n)), split.labels[: args.n]
    sample = sampled(len(y), SAMPLE, args).to(y.device)
    radii = args.sweep or [round(args.eps * f, 6) for f in CURVE if args.eps * f <= 1]
    radii, entries = [0.0, *radii], {}
    for name, m in models.items():
        working_on(name, models, f"{len(ATTACKS)} attacks within eps {args.eps:g} on {len(x):,}")
        found, standing = worst_case(m, x, y, args)
        working_on(name, models, f"{len(radii)} radii on {len(sample):,} images")
        entries[name] = {
            **m.about,
            "follows_colour": follows(m, x, y, split),
            "attacks": found,
            "robust": rate(standing),
            "curve": robust_curve(m, x[sample], y[sample], radii, args),
            "standing": "".join(map(str, standing.int().tolist())),  # a character per image
        }
    return {"models": entries, "n": len(y), "sample": len(sample), "radii": radii}


def follows(m, x, y, split):
    """Share of the images on a foreign colour that are taken for the digit that owns the colour.

    None without such images.
    """
    if split.colors is None:
        return None
    colors = split.colors[: len(y)]
    against = colors != y
    if not against.any():
        return None
    return (answer(m.net, x) == colors)[against].cpu().double().mean().item()


def sampled(n, most, args):
    """A fixed random choice of at most `most` of n images, int64, ascending."""
    return torch.randperm(n, generator=stream(args.seed, "sample"))[:most].sort().values


# ---- check: can the attacks be trusted


def noise(model, x, y, eps, steps, gen):
    """A random corner of the ball."""
    corner = moved(x, eps, torch.randn(x.shape, generator=gen).sign().to(x))
    return Attacked(corner, torch.zeros_like(y), None)  # no gradient step


def towards(k, model, x, y, eps, steps, gen):
    """PGD on the margin towards class k, whatever the truth is (Gowal et al., 2019)."""
    how = {"targeted": True, "loss": margin, "stop": says, "decay": True}
    return pgd(model, x, torch.full_like(y, k), eps, steps, gen, eps / 4, **how)


def measure(m, x, y, args):
    """Accuracies under attack, all on the same images, that `claims` compares.

    APGD is the worst of both its losses, as in --untargeted. How strong it is cannot be seen where
    nobody or everybody is fooled, so the attacks are compared at the radius that leaves about half
    of the clean accuracy.
    """
    right, outside = answer(m.net, x) == y, []
    goals = {f"to {k}": partial(towards, k) for k in range(m.classes)}
    attacks = {**ATTACKS, **goals, "noise": noise}

    def left(names, eps, steps=args.steps, seed=0):
        """bool (N,): right when clean and under one run of each; counts images outside the ball."""
        standing = right.clone()
        for name in names:
            gen = stream(args.seed, f"check {name} {seed}")
            attack = partial(attacks[name], m.net, steps=steps, gen=gen)
            a = carry_out(attack, m.net, is_wrong, x, y, eps)
            found = a.x.cpu().double()
            beyond = ((found - x.cpu().double()).abs() > eps + 1e-6) | (found < 0) | (found > 1)
            outside.append(int(beyond.flatten(1).any(1).sum()))
            standing &= ~a.done
        return standing

    def share(hits):
        return int(hits.sum()) / len(y)

    clean = share(right)
    radii = sorted({*(min(args.eps * f, 0.5) for f in (0.125, 0.25, 0.5, 1, 2, 4)), 0.5})
    standing = {eps: left(STRONG, eps) for eps in radii}
    curve = {eps: share(hits) for eps, hits in standing.items()}
    eps = min(radii, key=lambda r: abs(curve[r] - clean / 2))
    restarts = [standing[eps], *(left(STRONG, eps, seed=k) for k in range(1, 5))]
    # an image is not led to its own class
    each = [left([name], eps) | right & (y == k) for k, name in enumerate(goals)]
    return {
        "clean": clean,
        "curve": curve,
        "eps": eps,
        "eps 0": share(left(STRONG, 0.0)),
        "noise": share(left(["noise"], eps)),
        "FGSM": share(left(["FGSM"], eps)),
        "PGD": share(left(["PGD"], eps)),
        "APGD on cross-entropy": share(left(["APGD"], eps)),
        "APGD": curve[eps],
        "twice": share(left(STRONG, eps, 2 * args.steps)),
        "five restarts": share(torch.stack(restarts).all(0)),
        "each class": share(torch.stack([standing[eps], *each]).all(0)),
        "Square": share(left(["Square"], eps, QUERIES)),
        "eps 0.5": curve[0.5],
        "chance": 1 / m.classes,
        "images": len(y) * len(outside),
        "outside": sum(outside),
    }


def claims(v):
    """[{claim, pass, numbers}] of what `measure` found, after the list of Carlini et al. (2019)."""
    curve = list(v["curve"].values())
    small = {key: v["APGD"] - v[key] < POINT for key in ("twice", "five restarts", "each class")}
    weaker, stronger = ("noise", "FGSM", "PGD"), ("FGSM", "PGD", "APGD")
    ordered = all(v[a] > v[b] - POINT / 2 for a, b in zip(weaker, stronger, strict=True))
    rows = [
        ("eps 0 changes nothing", v["eps 0"] == v["clean"], "clean, eps 0"),
        ("noise fools least, then FGSM, PGD, APGD", ordered, "eps, noise, FGSM, PGD, APGD"),
        ("a larger eps never helps the model", curve == sorted(curve, reverse=True), "curve"),
        ("eps 0.5 leaves no more than chance", v["eps 0.5"] <= v["chance"], "eps 0.5, chance"),
        ("twice the steps change little", small["twice"], "eps, APGD, twice"),
        ("five restarts change little", small["five restarts"], "eps, APGD, five restarts"),
        (
            "nor does aiming at each class (Gowal et al., 2019)",
            small["each class"],
            "eps, APGD, each class, APGD on cross-entropy",
        ),
        (
            "Square, without gradients, does not win",
            v["Square"] > v["APGD"] - POINT / 2,
            "eps, APGD, Square",
        ),
        ("all images are in the ball and in [0, 1]", v["outside"] == 0, "images, outside"),
    ]
    by_eps = {f"eps {eps:g}": accuracy for eps, accuracy in v["curve"].items()}
    found = []
    for claim, held, keys in rows:
        numbers = by_eps if keys == "curve" else {key: v[key] for key in keys.split(", ")}
        rounded = [[key, round(value, 4)] for key, value in numbers.items()]
        found.append({"claim": claim, "pass": held, "numbers": rounded})
    return found


def check(models, split, args):
    """The record of what `claims` says of each model."""
    index = sampled(len(split.labels), args.n, args).to(split.labels.device)
    x, y = split.x(index), split.labels[index]
    entries = {}
    for name, m in models.items():
        working_on(name, models, f"nine checks on {len(y):,} images")
        entries[name] = {**m.about, "checks": claims(measure(m, x, y, args))}
    passed = all(c["pass"] for m in entries.values() for c in m["checks"])
    return {"models": entries, "n": len(y), "passed": passed}


# ---- numbers about images, seeds and rows of a table


def rate(hits):
    """Share of a bool tensor with its n and 95 % Wilson interval."""
    k, n = int(hits.sum()), hits.numel()
    low, high = (round(v, 4) for v in wilson(k, n))
    return {"k": k, "n": n, "rate": round(k / max(n, 1), 4), "low": low, "high": high}


def quartiles(values):
    """Median and quartiles of a float tensor, each one of its values; None where there is none."""
    if len(values) == 0:
        return {"median": None, "q1": None, "q3": None}
    at = values.new_tensor([0.25, 0.5, 0.75])
    q1, median, q3 = values.quantile(at, interpolation="lower").tolist()
    return {"median": round(median, 4), "q1": round(q1, 4), "q3": round(q3, 4)}


def bootstrap(values, statistic, gen):
    """{value, low, high}: a statistic and its 95 % percentile interval (Efron, 1979).

    values float (seeds, images), nan where a pair does not count. Both seeds and images are drawn
    anew, so few seeds make it wide.
    """
    seeds, images = values.shape
    draws = []
    for _ in range(RESAMPLES):
        some = values[torch.randint(seeds, (seeds,), generator=gen)]
        some = some[:, torch.randint(images, (images,), generator=gen)]
        draws.append(statistic(some))
    draws = torch.stack(draws)
    low, high = draws.nanquantile(draws.new_tensor([0.025, 0.975]))
    found = {"value": statistic(values), "low": low, "high": high}
    return {key: None if v.isnan() else round(float(v), 5) for key, v in found.items()}


def share_below_zero(values):
    return (values < 0).sum() / (~values.isnan()).sum()


def by_method(models):
    """{row of a table: {seed: name}} of a record's "models", in the order of --models."""
    groups = {}
    for name, m in models.items():
        groups.setdefault(m["method"], {})[m["seed"]] = name
    return groups


def column(entry, criterion, key, missing):
    """One list of a targeted record as a tensor (N,), `missing` where the attack failed."""
    values = [missing if v is None else v for v in entry[criterion][key]]
    return torch.tensor(values, dtype=torch.double)


def subsets(models, src):
    """{"all" or "both_right": {name: bool (N,)}}: every image, or what two models read correctly.

    The two are this model and its counterpart: the reference's model of the same seed, for the
    reference itself the second row's. The second subset makes models comparable: one that misreads
    a 7 anyway is not fooled by being attacked.
    """
    right = {name: torch.tensor(m["clean"]) == src for name, m in models.items()}
    reference, second = [*by_method(models).values(), {}][:2]
    both = {}
    for name, m in models.items():
        others = second if reference.get(m["seed"]) == name else reference
        both[name] = right[name] & right[others.get(m["seed"], name)]
    return {"all": {name: torch.ones_like(r) for name, r in right.items()}, "both_right": both}


def summarise(models, args):
    """{name: {subset: {criterion: success, steps, min-eps}}} of a targeted record."""
    summary = {
        name: {"clean": rate(torch.tensor(m["clean"]) == args.src)} for name, m in models.items()
    }
    for subset, counts in subsets(models, args.src).items():
        for name, m in models.items():
            summary[name][subset] = {}
            for criterion in CRITERIA:
                steps = column(m, criterion, "steps", math.inf)[counts[name]]
                radii = column(m, criterion, "min_eps", math.inf)[counts[name]]
                censored = {"censored": int(radii.isinf().sum()), "n": len(radii)}
                summary[name][subset][criterion] = {
                    "success": rate(steps.isfinite()),
                    "steps": quartiles(steps[steps.isfinite()]),
                    "min_eps": {**quartiles(radii.clamp(max=RADII[-1])), **censored},
                }
    return summary


def compare(models, args):
    """One dict for each row after the first: other - reference, of the same seed and image.

    With bootstrap intervals. A min-eps that was not found counts as the largest radius tried. Rows
    that share no seed with the reference are left out, and so are models that did not train: the
    reference is the first row that did.
    """
    models = {name: m for name, m in models.items() if m.get("trained", True)} or models
    (reference, first), *others = by_method(models).items()
    compared = []
    for other, second in others:
        shared = [seed for seed in first if seed in second]
        if not shared:
            continue
        pairs = [(models[first[seed]], models[second[seed]]) for seed in shared]
        entry = {"reference": reference, "other": other, "seeds": len(shared)}
        for subset, counts in subsets(models, args.src).items():
            excluded = ~torch.stack([counts[second[seed]] for seed in shared])  # (seeds, images)
            entry[subset] = {}
            for criterion in CRITERIA:
                radii, successes = gaps(pairs, criterion, RADII[-1])
                radii = radii.masked_fill(excluded, math.nan)
                successes = successes.masked_fill(excluded, math.nan)
                gen = stream(args.seed, f"bootstrap {reference} {other} {subset} {criterion}")
                entry[subset][criterion] = {
                    "n": int((~excluded).sum()),
                    "min_eps": bootstrap(radii, torch.nanmedian, gen),
                    "needs_less": bootstrap(radii, share_below_zero, gen),
                    "success": bootstrap(successes, torch.nanmean, gen),
                }
        compared.append(entry)
    return compared


def gaps(pairs, criterion, cap):
    """Second minus first of each pair of models: min-eps and success, double (seeds, images)."""
    radii, successes = [], []
    for a, b in pairs:
        radii.append(column(b, criterion, "min_eps", cap) - column(a, criterion, "min_eps", cap))
        a, b = (column(m, criterion, "steps", math.inf).isfinite().double() for m in (a, b))
        successes.append(b - a)
    return torch.stack(radii), torch.stack(successes)


# ---- tables: {name: Markdown, or None without results}


def evidence(folder, name, eps=None):
    """The record of attack_NAME.json with the most images, by name where equal; None without.

    `name` may hold a star, `eps` a condition. Models are in the order of --models.
    """
    found = []
    for path in sorted(folder.glob(f"attack_{name}.json")):
        hint = "delete it and run attack.py again"
        record = load_json(path, hint)
        if not {"mode", "args", "models"} <= record.keys():
            die(f"{path} is no result of attack.py", hint)
        if record["args"]["split"] == "test_hard" and eps in (None, record["args"]["eps"]):
            record["models"] = {name: record["models"][name] for name in record["args"]["models"]}
            found.append(record)
    return max(found, key=images_of, default=None)


def images_of(record):
    """How many images were attacked; each mode counts them in its own way."""
    return record.get("n") or len(record.get("index", ())) or sum(record["n_per_digit"])


def published(folder, eps):
    """Rows of results/published.json at that eps, where the folder's world is plain MNIST."""
    if not world_of(folder).get("is_mnist"):
        return []
    rows = load_json(ROOT / "results" / "published.json", "it belongs to the repository")
    return rows["robust_mnist"][eps]


def interval(b, form):
    """A rate or a bootstrapped number with its 95 % interval."""
    if b["low"] is None:
        return "-"
    value = b["rate"] if "rate" in b else b["value"]
    return f"{value:{form}} ({b['low']:{form}} to {b['high']:{form}})"


def rates(found):
    """Rates of several seeds in one cell: mean ± sd, of one seed with its interval."""
    if len(found) == 1:
        return interval(found[0], ".3f")
    return mean_sd([r["rate"] for r in found])


def label(row, found):
    """The name of a row, marked where train.py said that a model of it did not train."""
    return row if all(m.get("trained", True) for m in found) else f"{row} (did not train)"


def targeted_table(record):
    """A row for each row of models: how many are fooled, how fast, and how far one must go."""
    if record is None:
        return None
    a, summary = record["args"], record["summary"]
    header = ["model", "n", "reads correctly"]
    for name in CRITERIA:
        header += [f"{name}: fooled at eps {a['eps']:g}", "steps", "median min-ε", "censored"]
    lines = []
    for row, seeds in by_method(record["models"]).items():
        found = [summary[name] for name in seeds.values()]
        models = [record["models"][name] for name in seeds.values()]
        line = [
            label(row, models),
            len(record["index"]),
            mean_sd([s["clean"]["rate"] for s in found]),
        ]
        for criterion in CRITERIA:
            cases = [s["all"][criterion] for s in found]
            steps = [c["steps"]["median"] for c in cases if c["steps"]["median"] is not None]
            line.append(mean_sd([c["success"]["rate"] for c in cases]))
            line.append(f"{sum(steps) / len(steps):.1f}" if steps else "-")
            line.append(mean_sd([c["min_eps"]["median"] for c in cases]))
            line.append(sum(c["min_eps"]["censored"] for c in cases))
        lines.append(line)
    return markdown(header, lines)


def change_table(record):
    """Paired differences from the reference, on all images and on what both read correctly."""
    if record is None:
        return None
    header = ["compared", "seeds", "images", "n"]
    for name in CRITERIA:
        header += [f"{name}: change of min-ε", "share needing less"]
    lines = []
    for entry in record["compared"]:
        for subset in ("all", "both_right"):
            found = [entry[subset][criterion] for criterion in CRITERIA]
            name = f"{entry['other']} minus {entry['reference']}"
            line = [name, entry["seeds"], subset.replace("_", " "), f"{found[0]['n']:,}"]
            for case in found:
                line += [interval(case["min_eps"], "+.4f"), interval(case["needs_less"], ".2f")]
            lines.append(line)
    return markdown(header, lines)


def pairs_table(record):
    """Success over all pairs of digits, by both criteria."""
    if record is None:
        return None
    lines = []
    for row, seeds in by_method(record["models"]).items():
        found = [record["models"][name] for name in seeds.values()]
        line = [label(row, found), f"{found[0]['argmax_mean']['n']:,}"]
        lines.append(line + [rates([m[f"{c}_mean"] for m in found]) for c in CRITERIA])
    eps = record["args"]["eps"]
    return markdown(["model", "n", *(f"{c}: fooled at eps {eps:g}" for c in CRITERIA)], lines)


def untargeted_table(record, others=()):
    """Accuracy when clean, under each attack and under the worst of them, beside published rows."""
    if record is None:
        return None
    a, models = record["args"], record["models"]
    effort = dict.fromkeys(("PGD", "APGD", "APGD-T"), f", {a['steps']} steps")
    effort["Square"] = f", {a['queries']:,} queries"
    coloured = any(m["follows_colour"] is not None for m in models.values())
    header = ["model", "n", "clean", *(["follows colour"] if coloured else [])]
    for name in ATTACKS:
        then = "" if name in ALONE else "then "
        header.append(f"{then}{name}{effort.get(name, '')}")
    header.append(f"worst case, eps {a['eps']:g}")
    lines = []
    for row, seeds in by_method(models).items():
        found = [models[name] for name in seeds.values()]
        clean = mean_sd([m["attacks"]["clean"]["rate"] for m in found])
        line = [label(row, found), f"{record['n']:,}", clean]
        if coloured:
            line.append(mean_sd([m["follows_colour"] for m in found]))
        for name in ATTACKS:
            kind = "own" if name in ALONE else "so_far"
            line.append(mean_sd([m["attacks"][name][kind]["rate"] for m in found]))
        lines.append([*line, rates([m["robust"] for m in found])])
    for row in others:
        keys = ["clean", *(["follows colour"] if coloured else []), *ATTACKS, "robust"]
        values = [f"{row[key]:.3f}" if key in row else "-" for key in keys]
        lines.append([f"*{row['row']}, published*", "-", *values])
    return markdown(header, lines)


def check_table(*records):
    """A row for each claim, a column for each model: did it hold, and the numbers."""
    header, columns = ["claim"], []
    for record in filter(None, records):
        about = f"eps {record['args']['eps']:g}, n = {record['n']:,}"
        header += [f"{name}, {about}" for name in record["models"]]
        columns += [m["checks"] for m in record["models"].values()]
    lines = []
    for checks in zip(*columns, strict=True):
        held = ["holds" if c["pass"] else "**fails**" for c in checks]
        cells = [f"{word}: {listed(c['numbers'])}" for word, c in zip(held, checks, strict=True)]
        lines.append([checks[0]["claim"], *cells])
    return markdown(header, lines)


def listed(numbers):
    return ", ".join(f"{key} {value:g}" for key, value in numbers)


# ---- figures

SPARE_INK = ("#999999", "#332288", "#4D4D4D", "#7FBF3F")  # for rows that have no colour in INK


def inks(rows):
    """{row: its colour}."""
    spare = iter(SPARE_INK * len(rows))
    return {row: INK.get(row) or next(spare) for row in rows}


def draw_examples(record, pictures, path):
    """One column per image; the original, then perturbation and adversarial image of each model."""
    import matplotlib.pyplot as plt

    x, models, a = pictures["x"], pictures["models"], record["args"]
    ink = inks(by_method(record["models"]))
    said = [" | ".join(spoken(m["clean"][i]) for m in models.values()) for i in range(len(x))]
    rows = [("original", x, said, "black")]
    for name, m in models.items():
        colour = ink[record["models"][name]["method"]]
        moved = ((m["x_adv"] - x) * 10 + 0.5).clamp(0, 1)
        rows.append((f"{name}\nperturbation x10", moved, [""] * len(x), colour))
        rows.append((f"{name}\nadversarial", m["x_adv"], map(spoken, m["fooled"]), colour))
    size = (1.4 * len(x) + 0.6, 1.5 * len(rows) + 0.6)
    fig, axes = plt.subplots(len(rows), len(x), figsize=size, layout="constrained", squeeze=False)
    for line, (label, images, said, colour) in zip(axes, rows, strict=True):
        for ax, image, words in zip(line, images, said, strict=True):
            ax.imshow(image.permute(1, 2, 0).numpy(), vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            ax.set_title(words, fontsize=8, color=colour, pad=2)
        line[0].set_ylabel(label, fontsize=8, color=colour)
    fig.suptitle(
        f"Each {a['src']} attacked towards {a['tgt']} within eps {a['eps']:g}. Above each picture: "
        f"the answer and its probability;\nabove the originals: {' | '.join(models)}. "
        "Mid-grey: a pixel left alone.",
        fontsize=9,
    )
    save_figure(fig, path)
    return path


def spoken(digit_and_probability):
    return "{} ({:.2f})".format(*digit_and_probability)


def both_right_radii(record):
    """{criterion: {row: min-eps (N,)}} of the first two rows, all seeds, where both read right."""
    models = record["models"]
    both = subsets(models, record["args"]["src"])["both_right"]
    radii = {criterion: {} for criterion in CRITERIA}
    for row, seeds in list(by_method(models).items())[:2]:
        for c in CRITERIA:
            found = [column(models[n], c, "min_eps", RADII[-1])[both[n]] for n in seeds.values()]
            radii[c][row] = torch.cat(found)
    return radii


def draw_min_eps(record, path):
    """Histograms of the smallest radius, a panel a criterion; the last bin holds the rest too."""
    import matplotlib.pyplot as plt

    a, radii = record["args"], both_right_radii(record)
    ink = inks(radii["argmax"])
    everything = torch.cat([values for found in radii.values() for values in found.values()])
    far = float(everything.quantile(0.99)) if everything.any() else RADII[-1]
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.7), layout="constrained", sharey=True)
    titles = (f"the answer is {a['tgt']}", f"{a['tgt']} with probability {CONFIDENT:g} or more")
    for ax, found, title in zip(axes, radii.values(), titles, strict=True):
        for row, values in found.items():
            middle = float(values.nanmedian())
            bins = torch.linspace(0, far, 26).numpy()
            clamped, label = values.clamp(max=far).numpy(), f"{row}: median {middle:.4f}"
            ax.hist(clamped, bins, color=ink[row], alpha=0.45, label=label)
            ax.axvline(middle, color=ink[row], lw=1.5)
        ax.set(title=title, xlabel="min-eps (L-inf; the last bin holds what is beyond)")
        ax.legend(fontsize=8, loc="upper right")
    axes[0].set_ylabel(f"{a['src']}s that both nets read correctly")
    save_figure(fig, path)
    return path


def draw_grid(ax, table):
    """A square table of rates with its numbers written in; None stays blank."""
    values = [[math.nan if v is None else v for v in row] for row in table]
    picture = ax.imshow(values, vmin=0, vmax=1, cmap="Blues")
    for i, row in enumerate(table):
        for j, v in enumerate(row):
            if v is not None:
                text = f"{v:.2f}".lstrip("0") if v < 0.995 else "1"
                colour = "white" if v > 0.55 else "black"
                ax.text(j, i, text, ha="center", va="center", fontsize=6.5, color=colour)
    ax.set(xticks=range(len(table)), yticks=range(len(table)))
    return picture


def draw_pairs(record, path):
    """Success rate by source and target digit: the first seed of each row, both criteria."""
    import matplotlib.pyplot as plt

    names = [next(iter(seeds.values())) for seeds in by_method(record["models"]).values()]
    fig, axes = plt.subplots(
        len(CRITERIA),
        len(names),
        figsize=(3.9 * len(names) + 0.9, 7.6),
        layout="constrained",
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for line, criterion in zip(axes, CRITERIA, strict=True):
        for ax, name in zip(line, names, strict=True):
            m = record["models"][name]
            picture = draw_grid(ax, m[criterion])
            mean = m[f"{criterion}_mean"]["rate"]
            ax.set_title(f"{name}, {criterion}: mean {mean:.2f}", fontsize=10)
        line[0].set_ylabel("digit shown")
    for ax in axes[-1]:
        ax.set_xlabel("digit the attack wants")
    fig.colorbar(picture, ax=axes, shrink=0.6, label="success rate")
    fig.suptitle(f"Which digits turn into which within eps {record['args']['eps']:g}", fontsize=11)
    save_figure(fig, path)
    return path


def draw_robust_curve(record, path):
    """Accuracy by eps: the mean of a row's seeds, and their range as a band."""
    import matplotlib.pyplot as plt

    groups, a = by_method(record["models"]), record["args"]
    ink, eps = inks(groups), record["radii"]
    fig, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for row, seeds in groups.items():
        curves = [record["models"][name]["curve"] for name in seeds.values()]
        points = [[at["rate"] for at in point] for point in zip(*curves, strict=True)]
        ax.plot(eps, [fmean(p) for p in points], color=ink[row], marker="o", ms=3, label=row)
        low, high = ([end(p) for p in points] for end in (min, max))
        ax.fill_between(eps, low, high, color=ink[row], alpha=0.15, lw=0)
    ax.axvline(a["eps"], color="grey", lw=0.8, ls=":")
    ax.set(xlabel="eps (L-inf, pixels in [0, 1])", ylabel="robust accuracy", ylim=(0, 1))
    ax.set_title(f"Accuracy left under attack ({a['split']}, n = {record['sample']:,})")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
    save_figure(fig, path)
    return path


def draw(record, folder, stem):
    """The figures of one record of a folder, best one first; returns their paths."""
    figures, pictures = folder / "figures", folder / f"{record['name']}.pt"
    if record["mode"] == "pairs":
        return [draw_pairs(record, figures / f"{stem}.png")]
    if record["mode"] == "untargeted":
        return [draw_robust_curve(record, figures / f"{stem}_robust_curve.png")]
    if record["mode"] == "check":
        return []
    drawn = [draw_min_eps(record, figures / f"{stem}_min_eps.png")]
    if pictures.exists():
        shown = load_pt(pictures, "delete it")
        drawn.insert(0, draw_examples(record, shown, figures / f"{stem}_examples.png"))
    return drawn


def report(args):
    """Refill the tables and redraw the figures of the write-up; computes nothing."""
    here, mnist = args.dir, args.dir / "mnist"  # most names are those of run_all.sh
    seven = evidence(here, "7to3*", 0.05)
    every_pair = evidence(here, "pairs*", 0.05)
    any_digit = evidence(here, "untargeted*", 0.05)
    tables = {
        "targeted": targeted_table(seven),
        "targeted_change": change_table(seven),
        "pairs": pairs_table(every_pair),
        "untargeted": untargeted_table(any_digit),
        "untargeted_at": untargeted_table(evidence(here, "at")),
        "untargeted_wide": untargeted_table(evidence(here, "wide")),
        "mnist": untargeted_table(evidence(mnist, "at", 0.3), published(mnist, "0.3")),
        "resnet": untargeted_table(evidence(mnist, "resnet"), published(mnist, "0.1")),
        "robgan_attacks": untargeted_table(evidence(mnist, "robgan")),
        "robgan_2000_attacks": untargeted_table(evidence(mnist, "robgan_2000")),
        "check": check_table(evidence(here, "check*"), evidence(here, "at_check")),
        "check_mnist": check_table(evidence(mnist, "check*")),
    }
    print("refilled", *fill(args.dir, tables))
    shown = {"attack_7to3": seven, "attack_pairs": every_pair, "attack": any_digit}
    for stem, record in shown.items():
        if record:
            print("drew", *draw(record, args.dir, stem))


# ---- what the terminal says


def working_on(name, models, phase):
    """One line that a terminal rewrites and a file keeps."""
    progress(f"{name} ({list(models).index(name) + 1} of {len(models)}): {phase}")


def tell(record):
    """The answer: a line for each model, and for each comparison."""
    for name, m in record["models"].items():
        if record["mode"] == "targeted":
            argmax, sure = (record["summary"][name]["all"][criterion] for criterion in CRITERIA)
            n, tgt = argmax["success"]["n"], record["args"]["tgt"]
            text = f"of {n} become a {tgt}: {in_words(argmax)}; with probability {CONFIDENT:g}: "
            text += in_words(sure)
        elif record["mode"] == "pairs":
            argmax, sure = (m[f"{criterion}_mean"] for criterion in CRITERIA)
            text = f"{argmax['k']:,} of {argmax['n']:,} reach the digit they want, "
            text += f"{sure['k']:,} with probability {CONFIDENT:g}"
        elif record["mode"] == "untargeted":
            clean, worst = m["attacks"]["clean"], m["robust"]
            text = f"of {clean['n']:,} images {clean['k']:,} are right when clean, "
            text += f"{worst['k']:,} under every attack ({', '.join(ATTACKS)})"
        else:
            failed = [c for c in m["checks"] if not c["pass"]]
            text = f"{len(failed)} of {len(m['checks'])} checks fail"
            text += "".join(f"\n  {c['claim']}: {listed(c['numbers'])}" for c in failed)
        print(f"{name}: {text}")
    for entry in record.get("compared", ()):
        argmax, sure = (entry["both_right"][criterion] for criterion in CRITERIA)
        if argmax["n"]:
            shares = [f"{c['needs_less']['value']:.0%}" for c in (argmax, sure)]
            text = f"{entry['other']} needs a smaller eps than {entry['reference']} on {shares[0]}"
            print(f"{text} ({shares[1]}) of {argmax['n']} images that both read correctly")


def in_words(case):
    """How many were fooled, after how many steps, and the median of the smallest radii."""
    k, steps, eps = case["success"]["k"], case["steps"]["median"], case["min_eps"]["median"]
    return f"{k} (median {steps:g} steps, min-eps {eps:g})" if k else "none"


# ---- the command

RUNS = {"targeted": targeted, "pairs": pairs, "untargeted": untargeted, "check": check}


def get_args(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = p.add_argument_group("what to do (default: the targeted attack)")
    g = group.add_mutually_exclusive_group()
    for mode, what in (
        ("pairs", "every digit to every other, as heat maps"),
        ("untargeted", "robust accuracy under several attacks"),
        ("check", "can the attacks be trusted? exit code 1 if not"),
    ):
        g.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, help=what)
    g = p.add_argument_group("attack")
    g.add_argument("--src", type=number(int, 0, 999), help="targeted: digit to start from (7)")
    g.add_argument("--tgt", type=number(int, 0, 999), help="targeted: digit to reach (3)")
    g.add_argument("--eps", type=number(float, 0, 1), help="L-inf radius, pixels in [0, 1] (0.05)")
    steps, many = number(int, 1, 100_000), number(int, 1, 1000)
    g.add_argument("--steps", type=steps, help="gradient steps (1000; others 100)")
    g.add_argument("--restarts", type=many, help="--untargeted: random starts of APGD (1)")
    g.add_argument("--queries", type=steps, help="--untargeted: of Square, an image (5000)")
    radii = dict(type=number(float, 1e-6, 1), nargs="+", metavar="EPS")
    g.add_argument("--sweep", **radii, help="--untargeted: radii of the curve (up to 1.5 eps)")
    g = p.add_argument_group("on what")
    usual, shown = ["baseline_s42", "jitter_s42"], "DIR/NAME.pt or the path of a .pt"
    g.add_argument("--models", nargs="+", default=usual, metavar="NAME", help=shown)
    g.add_argument("--split", choices=SPLITS, default="test_hard", help="(test_hard)")
    counts = (
        "of digit src (40), per digit (--pairs, 50), of the split (--check 500, --untargeted all)"
    )
    g.add_argument("--n", type=number(int, 1, 10**9), help=f"images at most: {counts}")
    g.add_argument("--name", help="results go to DIR/attack_NAME.json (what differs from defaults)")
    common_args(p, seed_of="random starts, samples and the bootstrap")
    return complete(p.parse_args(argv))


def complete(args):
    """The arguments with the defaults of their mode; what makes no sense is refused."""
    if args.report and args.mode:
        die(f"--report reads what is there, so --{args.mode} does nothing", "give one of the two")
    args.mode = args.mode or "targeted"
    for flag in ("src", "tgt", "eps", "steps", "restarts", "queries", "sweep", "n"):
        if flag not in MODES[args.mode] and getattr(args, flag) is not None:
            die(f"--{flag} means nothing in the {args.mode} attack", "leave it out")
        if getattr(args, flag) is None:
            setattr(args, flag, MODES[args.mode].get(flag))
    if args.mode == "targeted" and args.src == args.tgt:
        die(f"--src and --tgt are both {args.src}", "choose two digits")
    if len({row_and_seed(name) for name in args.models}) < len(args.models):
        hint = "name each once, or save one of them under another --name"
        die("--models names two that would share one row", hint)
    if args.name and not re.fullmatch(r"(?!pairs|check|untargeted|\d)\w{1,60}", args.name, re.A):
        what = "must be letters, digits and _, and begin like no default name"
        die(f"--name {args.name!r} {what}", "choose another name")
    args.sweep = args.sweep and sorted(set(args.sweep))
    return args


def row_and_seed(name):
    """('jitter', 42) of 'jitter_s42', 'unbiased/jitter_s42' or 'results/jitter_s42.pt'."""
    seed = re.search(r"_s(\d+)(\.pt)?$", name)
    return row_of(name), int(seed[1]) if seed else None


def result_name(args):
    """attack_7to3, _pairs, _untargeted or _check, and what differs from the mode's defaults."""
    if args.name:
        return f"attack_{args.name}"
    head = f"{args.src}to{args.tgt}" if args.mode == "targeted" else args.mode
    usual = argparse.Namespace(**{**vars(args), **MODES[args.mode], "split": "test_hard"})
    skip = ("mode", "src", "tgt", "models", "name")
    return name_of(f"attack_{head}", args, usual, skip).removesuffix("_s42")


class Loaded(NamedTuple):
    net: nn.Module
    about: dict  # method: what the seeds of one row share, NAME without _sSEED; seed; trained
    classes: int


def load(args, device):
    """({name: Loaded}, the split); every model fits the split."""
    split = load_split(args.dir, args.split, device)
    size, top, models = tuple(split.images.shape[2:]), int(split.labels.max()), {}
    for name in args.models:
        net, record = load_model(args.dir, name, device)
        classes = record["classes"]
        if size != tuple(record["size"]) or top >= classes:
            built = f"built for {classes} classes and {tuple(record['size'])} pixels"
            what = f"{args.split}.pt has labels up to {top} and {size} pixels"
            die(f"{name} is {built}, but {what}", "choose a model trained on this world")
        for flag, digit in (("--src", args.src), ("--tgt", args.tgt)):
            if digit is not None and digit >= classes:
                last = f"the classes of {name} end at {classes - 1}"
                die(f"{flag} is {digit}, but {last}", "choose one of them")
        row, seed = row_and_seed(name)
        seed = record["args"].get("seed") if seed is None else seed
        about = {"method": row, "seed": seed, "trained": record.get("trained", True)}
        models[name] = Loaded(net, about, classes)
    return models, split


def main(argv=None):
    args = get_args(argv)
    if args.report:
        return report(args)
    device = setup(args)
    path = args.dir / f"{result_name(args)}.json"
    settings = {key: getattr(args, key) for key in ("models", "split", "seed", *MODES[args.mode])}
    guard(path, {**settings, "mode": args.mode}, args.overwrite)
    models, split = load(args, device)
    shown = [f"{key} {settings[key]}" for key in MODES[args.mode] if settings[key] is not None]
    print(
        f"{args.mode} attack on {' '.join(args.models)} in {args.dir}: {', '.join(shown)}",
        flush=True,
    )
    began = time.time()
    record = RUNS[args.mode](models, split, args)
    pictures = record.pop("pictures", None)
    if pictures:
        save_pt(pictures, path.with_suffix(".pt"))
    facts = {"torch": torch.__version__, "threads": args.threads, "device": str(device)}
    facts["seconds"] = round(time.time() - began, 1)
    head = {"schema": 1, "script": "attack.py", "name": path.stem, "mode": args.mode}
    record = {**head, "args": settings, **record, "run": facts}
    save_json(record, path)
    drawn = draw(record, args.dir, path.stem)
    progress("")
    tell(record)
    print(f"wrote {path}", *drawn, f"in {facts['seconds']:.0f} s")
    if drawn:
        print(f"look at {drawn[0]}")
    if not record.get("passed", True):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
