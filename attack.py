"""Fool trained models with perturbations too small to matter to a person; say how hard it was.

Reads   DIR/test_hard.pt (from make_data.py), DIR/NAME.pt (from train.py)
Writes  DIR/attack_7to3.json, attack_pairs.json, attack_untargeted.json, attack_check.json, their
        names longer by every setting that differs from the defaults; DIR/figures/ with the same
        names; DIR/attack_7to3.pt (example pictures, so that --report can draw them again)

    python attack.py --src 7 --tgt 3 --eps 0.05      # is the cured model easier to fool?
    python attack.py --n 500 --models baseline_s42 baseline_s43 jitter_s42 jitter_s43
    python attack.py --pairs                         # all 90 pairs of digits
    python attack.py --untargeted --eps 0.3 --dir results/mnist --models at_s42
    python attack.py --check                         # can the attacks be trusted? else exit code 1
    python attack.py --report                        # draw the figures of all results again

Radii are L-inf, in pixel units of [0, 1]. What counts as fooled is decided by `judge`, which sees
only the attack's output. Models are grouped by NAME without _sSEED; the first group is the
reference, and each other one is compared with it, seed by seed and image by image.
"""

import argparse
import itertools
import math
import re
import sys
import textwrap
import time
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (
    SPLITS,
    WHERE,
    check_fit,
    chunks,
    common_args,
    die,
    figure,
    guard,
    ink,
    lines,
    load_json,
    load_model,
    load_pt,
    load_split,
    matrix,
    name_of,
    note_time,
    number,
    pictures,
    predict,
    progress,
    rate,
    row_of,
    run,
    save_figure,
    save_json,
    save_pt,
    setup,
    stream,
    t_interval,
)

CHUNK = 256  # images attacked at once: what fits in the cache of one core
CONFIDENT = 0.9  # target probability of the criterion "confidence"
LEAD = math.log(9)  # between logits, of the criterion "margin": 0.9 against a single rival
RESOLUTION = 1e-3  # of a min-eps
SEARCH_STEPS = 50  # at each radius of the min-eps search; half as many in a bisection round
SAMPLE = 1000  # images of the robust curve, which is too slow for the whole split
RESAMPLES = 2000  # of the bootstrap
POINT = 0.02  # --check: a change below two percentage points is little
CHECK_QUERIES = 5000  # --check: of the Square attack, per image
RADII = [0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5]  # of the min-eps search
CURVE = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.25, 1.5]  # radii of the robust curve, in eps


# ---- arguments


def get_args(argv=None):
    """(The arguments that mean something in this mode, their defaults there)."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    modes_of = {}  # {flag: {mode: the flag's default there}}

    def add(flag, of, help, **how):
        """A flag of some modes only, with its default in each of them."""
        modes_of[flag.removeprefix("--")] = of
        usual = ", ".join(mode if v is None else f"{mode} {v}" for mode, v in of.items())
        g.add_argument(flag, help=f"{help} ({usual})", **how)

    group = p.add_argument_group("what to do (default: the targeted attack)")
    g = group.add_mutually_exclusive_group()
    for mode, what in (
        ("pairs", "every digit to every other, as heat maps"),
        ("untargeted", "robust accuracy under several attacks"),
        ("check", "can the attacks be trusted? exit code 1 if not"),
    ):
        g.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, help=what)
    g = p.add_argument_group("attack")
    digit, eps, many = number(int, 0, 999), number(float, 0, 1), number(int, 1, 10**9)
    add("--src", {"targeted": 7}, "digit to start from", type=digit)
    add("--tgt", {"targeted": 3}, "digit to reach", type=digit)
    g.add_argument("--eps", type=eps, default=0.05, help="L-inf radius, pixels in [0, 1] (0.05)")
    kinds = "flat: one shift of colour for all pixels; fine: no mean shift in any channel"
    add("--change", {"targeted": "any"}, kinds, choices=MOVES)
    usual = {"targeted": 1000, "pairs": 100, "untargeted": 100, "check": 100}
    add("--steps", usual, "gradient steps", type=many)
    add("--restarts", {"untargeted": 1}, "random starts of APGD", type=many)
    add("--queries", {"untargeted": 5000}, "of Square, an image", type=many)
    radii = dict(type=number(float, 1e-6, 1), nargs="+", metavar="EPS")
    add("--sweep", {"untargeted": None}, "radii of the curve, else up to 1.5 eps", **radii)
    g = p.add_argument_group("on what")
    usual, shown = ["baseline_s42", "jitter_s42"], "DIR/NAME.pt or the path of a .pt"
    g.add_argument("--models", nargs="+", default=usual, metavar="NAME", help=shown)
    g.add_argument("--split", choices=SPLITS, default="test_hard", help="(test_hard)")
    usual = {"targeted": 40, "pairs": 50, "untargeted": None, "check": 500}
    add("--n", usual, "images at most: of digit src, of each digit, of the split", type=many)
    g.add_argument("--name", help="results go to DIR/attack_NAME.json (what differs from defaults)")
    common_args(p, seed_of="random starts, samples and the bootstrap")
    args = p.parse_args(argv)
    if args.report and args.mode:
        die(f"--report reads what is there, so --{args.mode} does nothing", "give one of the two")
    args.mode = args.mode or "targeted"
    usual = {key: p.get_default(key) for key in vars(args)}
    for flag, of in modes_of.items():
        given = getattr(args, flag)
        if args.mode not in of:
            if given is not None:
                die(f"--{flag} means nothing in the {args.mode} attack", "leave it out")
            delattr(args, flag)
            continue
        usual[flag] = of[args.mode]
        if given is None:
            setattr(args, flag, usual[flag])
    if getattr(args, "sweep", None):
        args.sweep = sorted(set(args.sweep))
    refuse_nonsense(args)
    return args, argparse.Namespace(**usual)


def refuse_nonsense(args):
    """What parses but cannot be meant gets one line."""
    if args.mode == "targeted" and args.src == args.tgt:
        die(f"--src and --tgt are both {args.src}", "choose two digits")
    if args.name and not re.fullmatch(r"\w{1,60}", args.name, re.A):
        die(f"--name {args.name!r} must be letters, digits and _", "choose another name")


def result_name(args, usual):
    """attack_7to3, _pairs, _untargeted or _check, and what differs from the mode's defaults."""
    if args.name:
        return f"attack_{args.name}"
    head = f"{args.src}to{args.tgt}" if args.mode == "targeted" else args.mode
    return name_of(f"attack_{head}", args, usual, skip=("mode", "src", "tgt", "models", "name"))


# ---- projected gradient descent


class Attacked(NamedTuple):
    x: torch.Tensor  # (B,3,H,W) in [0, 1] and in the ball
    steps: torch.Tensor  # int64 (B,): gradient steps each image took
    done: torch.Tensor  # bool (B,): did `stop` say so


def per_image(value, x):
    """A float or (B,) as (B,1,1,1), of the type and on the device of x (B,3,H,W)."""
    return torch.as_tensor(value, dtype=x.dtype, device=x.device).expand(len(x)).view(-1, 1, 1, 1)


def random_start(x, eps, gen):
    """Anywhere in the ball; `inside` brings it back into [0, 1]. eps a float or (B,1,1,1)."""
    return x + eps * (2 * torch.rand(x.shape, generator=gen, device=gen.device).to(x) - 1)


def inside(z, low, high):
    """z (B,3,H,W) brought into the box, channels last."""
    return z.clamp(low, high).contiguous(memory_format=torch.channels_last)


@contextmanager
def only_inputs_learn(model):
    """In eval mode and with gradients, whatever is set outside.

    Afterwards, also after an error, every submodule has its own mode again.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def move_any(z, grad, rate, x, low, high):
    """Each pixel a step of its own, along the sign of the gradient."""
    return inside(z + grad.sign_().mul_(rate), low, high)


def shift_of(change):
    """The shift (B,3,1,1) of which a flat change (B,3,H,W) is what [0, 1] has left: the largest."""
    least, most = change.amin((2, 3), True), change.amax((2, 3), True)
    return torch.where(most > -least, most, least)


def move_flat(z, grad, rate, x, low, high):
    """All pixels the same step; those at an end of [0, 1] have no say in it."""
    slope = (grad * ((z > 0) & (z < 1))).mean((2, 3), True)
    return inside(x + shift_of(z - x) + rate * slope.sign(), low, high)


def best_shift(model, x, y, eps, start, targeted):
    """The best flat start for pgd: `start`, or -eps, 0 or eps in each channel.

    Three numbers are soon looked through, and a flat change seldom finds its way from a bad one.
    """
    sign, best = 1 if targeted else -1, start
    with only_inputs_learn(model), torch.no_grad():
        least = sign * lead(model((x + shift_of(start - x)).clamp(0, 1)), y)
        for shift in itertools.product((-1.0, 0.0, 1.0), repeat=3):
            z = x + eps * x.new_tensor(shift).view(3, 1, 1)
            behind = sign * lead(model(z.clamp(0, 1)), y)
            best, least = where(behind < least, z, best), torch.minimum(behind, least)
    return best


def move_fine(z, grad, rate, x, low, high):
    """The mean of each channel stays that of x: pixels rise where the gradient is above a level.

    The others fall. The level (B,3,1,1) that keeps the mean is found by bisection.
    """
    low, high = torch.maximum(low, z - rate.abs()), torch.minimum(high, z + rate.abs())
    steep = 10 / grad.abs().mean((2, 3), True).clamp(min=1e-30)  # so that most go the whole step
    z, mean = z + rate * steep * grad, x.mean((2, 3), True)
    least, most = (z - high).amin((2, 3), True), (z - low).amax((2, 3), True)
    for _ in range(24):
        level = (least + most) / 2
        above = (z - level).clamp(low, high).mean((2, 3), True) > mean
        least, most = torch.where(above, level, least), torch.where(above, most, level)
    return inside(z - level, low, high)


MOVES = {"any": move_any, "flat": move_flat, "fine": move_fine}  # a step of pgd, by --change


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
    change="any",
):
    """Projected gradient descent in the L-inf ball (Madry et al., 2018) from a random start.

    x (B,3,H,W) in [0, 1]; y (B,) labels to leave, or targets to reach where `targeted`; eps and
    step_size are floats or (B,), in pixel units; a step is eps / 10 by default, and with `decay` it
    falls linearly towards a tenth of itself. loss(logits, y) is a scalar in which images have the
    same weight. stop(logits, y) -> bool (B,) takes finished images out of the batch, so they cost
    nothing more. `start` (B,3,H,W) replaces the random start; `change` is one of MOVES. Nothing
    gathers in .grad; train/eval modes stay as they were found; works inside torch.no_grad().
    """
    refuse_strange_pixels(x)
    eps = per_image(eps, x)
    rate = eps / 10 if step_size is None else per_image(step_size, x)
    rate = -rate if targeted else rate
    if start is None:
        start = random_start(x, eps, gen)
    if change == "flat":
        start = best_shift(model, x, y, eps, start, targeted)
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    move = MOVES[change]
    z = move(start, torch.zeros_like(start), 2 * eps, x, low, high)  # only brought into the set
    x_adv, taken = torch.empty_like(z), torch.zeros(len(x), dtype=torch.long, device=x.device)
    done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    alive = torch.arange(len(x), device=x.device)  # the images that x, y, z, low, high, rate hold
    with only_inputs_learn(model):
        for step in range(steps + (stop is not None)):  # after the last step only `stop` looks
            logits = model(z.requires_grad_())
            if stop is not None:
                done[alive], x_adv[alive] = stop(logits.detach(), y), z.detach()
            keep = (~done[alive]).nonzero()[:, 0]
            if step == steps or len(keep) == 0:
                break
            taken[alive[keep]] += 1
            if len(keep) < len(alive):
                (grad,) = torch.autograd.grad(loss(logits[keep], y[keep]), z)
                batch = (alive, x, y, z.detach(), grad, low, high, rate)
                alive, x, y, z, grad, low, high, rate = (t[keep] for t in batch)
            else:
                (grad,) = torch.autograd.grad(loss(logits, y), z)
            rate_now = rate * (1 - 0.9 * step / steps) if decay else rate
            z = move(z.detach(), grad, rate_now, x, low, high)
    x_adv[alive] = z.detach()
    return Attacked(x_adv, taken, done)


def refuse_strange_pixels(x):
    """ValueError unless x holds floats in [0, 1]: eps means nothing for other pixels."""
    if not x.is_floating_point() or (len(x) > 0 and not (x.min() >= 0 and x.max() <= 1)):
        hint = "divide uint8 images by 255, put a model's normalisation in front of it"
        raise ValueError(f"pixels must be floats in [0, 1], but x is {x.dtype}; {hint}")


# ---- what counts as fooled


def says(logits, y):
    """argmax: the answer is y (targeted)."""
    return logits.argmax(1) == y


def is_sure(logits, y):
    """confidence: y has at least CONFIDENT probability, so the answer is y as well (targeted)."""
    return logits.softmax(1).gather(1, y[:, None])[:, 0] >= CONFIDENT


def is_ahead(logits, y):
    """margin: y leads every other logit by LEAD, however many rivals there are (targeted)."""
    return lead(logits, y) <= -LEAD


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


CRITERIA = {  # (is it reached, what `strongest` minimises in turn); each implies those before it
    "argmax": (says, (margin, F.cross_entropy)),
    "margin": (is_ahead, (margin, F.cross_entropy)),
    "confidence": (is_sure, (F.cross_entropy,)),
}
USUAL = ("argmax", "confidence")  # the criteria of --pairs, of the figures and of the terminal


def distance(a, b):
    """L-inf distance per image, float (B,)."""
    return (a - b).abs().amax((1, 2, 3))


def allowed(x, eps, x_adv, change="any"):
    """bool (B,): is x_adv in the ball around x and in [0, 1], and flat or fine if it should be?"""
    held = distance(x_adv, x) <= eps + 1e-6
    held &= (x_adv.amin((1, 2, 3)) >= 0) & (x_adv.amax((1, 2, 3)) <= 1)
    if change == "flat":
        held &= distance(x_adv, (x + shift_of(x_adv - x)).clamp(0, 1)) <= 1e-6
    elif change == "fine":
        held &= (x_adv - x).mean((2, 3)).abs().amax(1) <= 1e-5
    return held


@torch.no_grad()
def judge(model, x, y, eps, x_adv, reached, change="any"):
    """bool (B,): is x_adv allowed, and does the model fall for it?

    It knows nothing of how x_adv was made.
    """
    return allowed(x, eps, x_adv, change) & reached(model(x_adv), y)


def carry_out(attack, model, reached, x, y, eps, change="any", **more):
    """Run attack(model, x, y, eps, **more) chunk by chunk; `judge` says what is done.

    x (N,3,H,W) in [0, 1]; y (N,); eps a float or (N,); `more` are tensors with a row per image.
    """
    eps = torch.as_tensor(eps, dtype=x.dtype, device=x.device).expand(len(x))
    parts = []
    for i in chunks(max(len(x), 1), CHUNK):  # no images: one empty part
        a = attack(model, x[i], y[i], eps[i], **{key: value[i] for key, value in more.items()})
        parts.append(a._replace(done=judge(model, x[i], y[i], eps[i], a.x, reached, change)))
    return Attacked(*map(torch.cat, zip(*parts, strict=True)))


# ---- targeted attacks: from src to tgt


def headline(model, x, y, eps, limit, gen, change="any"):
    """{criterion: steps float (N,), inf where it failed} and the last adversarial images.

    PGD (Madry et al., 2018) on the targeted cross-entropy: random start, step eps / 10, at most
    `limit` steps. The criteria are three marks on one path: where one was reached, the attack
    continues to the next. x (N,3,H,W) in [0, 1]; y (N,).
    """
    steps, x_adv = {}, x.clone()
    todo, start = torch.arange(len(x), device=x.device), random_start(x, eps, gen)
    taken = torch.zeros(len(x), device=x.device)
    for name, (reached, _) in CRITERIA.items():
        attack = partial(pgd, steps=limit, gen=gen, stop=reached, targeted=True, change=change)
        a = carry_out(attack, model, reached, x[todo], y[todo], eps, change, start=start)
        x_adv[todo], taken = a.x, taken + a.steps
        done = a.done & (taken <= limit)
        todo, start, taken = todo[done], a.x[done], taken[done]
        steps[name] = torch.full((len(x),), math.inf, device=x.device)
        steps[name][todo] = taken
    return steps, x_adv


def strongest(model, criterion, x, y, eps, start, steps, change="any"):
    """Attacked: targeted PGD, steps falling from eps / 4 towards eps / 40, with each loss in turn.

    The second loss sees the images that resisted the first. The argmax needs both: the margin
    alone would flatter models that are sure of themselves, cross-entropy alone those that never
    are. Confidence is cross-entropy's own goal. eps (N,); start (N,3,H,W).
    """
    x_adv, taken, done = start.clone(), torch.zeros_like(y), torch.zeros_like(y, dtype=torch.bool)
    reached, losses = criterion
    how = {"targeted": True, "stop": reached, "decay": True, "change": change}
    for loss in losses:
        i = (~done).nonzero()[:, 0]
        attack = partial(pgd, steps=steps, gen=None, loss=loss, **how)
        more = {"step_size": eps[i] / 4, "start": start[i]}
        a = carry_out(attack, model, reached, x[i], y[i], eps[i], change, **more)
        x_adv[i], taken[i], done[i] = a.x, taken[i] + a.steps, a.done
    return Attacked(x_adv, taken, done)


def try_out(attack, x, y, known, i, eps, start, steps):
    """Attack images i (K,) with radii eps (K,) from start (K,3,H,W); changes what is known.

    A success brings the upper end down to the radius it really used.
    """
    a = attack(x[i], y[i], eps, start, steps)
    known.low[i[~a.done]] = eps[~a.done]
    known.high[i[a.done]] = distance(a.x, x[i])[a.done]
    known.best[i[a.done]] = a.x[a.done]


def search_min_eps(model, x, y, radii, gen, steps, change="any"):
    """{criterion: smallest radius that works, float (N,)}; inf where none of `radii` does.

    It is 0 where nothing is needed. First each radius in ascending order, for the images that
    still resist; then bisection between the last failure and the first success until they are
    RESOLUTION apart, all images in one batch, each with a radius of its own. Each round starts
    from the last success, scaled down. A criterion is not tried where the one before it failed.
    """
    found, known = {}, SimpleNamespace()
    known.low = torch.zeros(len(x), device=x.device)  # the largest radius that failed
    for name, criterion in CRITERIA.items():
        attack = partial(strongest, model, criterion, change=change)
        known.high = torch.full_like(known.low, math.inf)  # the smallest radius that worked
        known.best = x.clone()  # the adversarial image at `high`
        known.high[judge(model, x, y, 0.0, x, criterion[0])] = 0
        for radius in radii:
            i = (known.high.isinf() & (known.low < radius)).nonzero()[:, 0]
            eps, start = known.low.new_full((len(i),), radius), random_start(x[i], radius, gen)
            try_out(attack, x, y, known, i, eps, start, steps)
        while True:
            i = (known.high.isfinite() & (known.high - known.low > RESOLUTION)).nonzero()[:, 0]
            if len(i) == 0:
                break
            middle = (known.low[i] + known.high[i]) / 2
            shrunk = x[i] + (known.best[i] - x[i]) * (middle / known.high[i]).view(-1, 1, 1, 1)
            try_out(attack, x, y, known, i, middle, shrunk, max(steps // 2, 1))
        found[name] = known.high
    return found


# ---- untargeted attacks: anything but the truth, from easy to hard; each takes a model,
# ---- x (B,3,H,W), y (B,), eps (B,), steps and gen, and returns Attacked


def to_corner(x, eps, signs):
    """x (B,C,H,W) moved by eps (B,) in the direction of signs, within [0, 1]."""
    return (x + eps.view(-1, 1, 1, 1) * signs).clamp(0, 1)


def noise(model, x, y, eps, steps, gen):
    """A random corner of the ball: no attack, and no gradient step."""
    signs = torch.randn(x.shape, generator=gen).sign().to(x)
    return Attacked(to_corner(x, eps, signs), torch.zeros_like(y), None)


def fgsm(model, x, y, eps, steps, gen):
    """One full step from the clean image (Goodfellow et al., 2015)."""
    return pgd(model, x, y, eps, 1, gen, step_size=eps, start=x)


def pgd_untargeted(model, x, y, eps, steps, gen):
    """PGD (Madry et al., 2018) until fooled: random start, steps from eps / 4 towards eps / 40."""
    return pgd(model, x, y, eps, steps, gen, eps / 4, stop=is_wrong, decay=True)


def towards(k, model, x, y, eps, steps, gen):
    """PGD on the margin towards class k, whatever the truth is (Gowal et al., 2019)."""
    how = {"targeted": True, "loss": margin, "stop": says, "decay": True}
    return pgd(model, x, torch.full_like(y, k), eps, steps, gen, eps / 4, **how)


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


def apgd(model, x, y, eps, steps, gen, loss=each_cross_entropy, target=None):
    """APGD (Croce & Hein, 2020): gradient ascent with momentum that sets its own step size.

    The step begins with 2 eps. At checkpoints that come ever more often, it is halved for the
    images whose loss rose in too few steps since the last one, or whose best loss has not moved;
    these continue from the best point found. Fooled images leave the batch. What is raised is
    loss(logits, y, target) -> float (B,).
    """
    eps = per_image(eps, x)
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    z = inside(random_start(x, eps, gen), low, high)
    lowest, zeros = torch.full(y.shape, -math.inf).to(x), torch.zeros_like(y)
    found, taken, done = z.clone(), zeros.clone(), zeros.bool()
    s = SimpleNamespace(  # a row for each image that still stands
        index=torch.arange(len(x), device=x.device),
        y=y,
        target=y if target is None else target,
        low=low,
        high=high,
        rate=2 * eps,
        z=z,  # the present point, the one before it, the loss there
        before=z,
        loss=lowest,
        rose=zeros,  # in how many steps the loss rose since the last checkpoint
        best=z,  # the point with the highest loss, its gradient and its loss
        best_grad=z,
        best_loss=lowest,
        mark=lowest,  # the highest loss at the last checkpoint
        halved=zeros.bool(),  # was the rate halved there
    )
    checkpoint = span = max(int(0.22 * steps), 1)
    for step in range(steps + 1):
        before, s.z = s.loss, s.z.detach().requires_grad_()
        logits = model(s.z)
        loss_now = loss(logits, s.y, s.target)
        (s.grad,) = torch.autograd.grad(loss_now.sum(), s.z)
        s.z, s.loss = s.z.detach(), loss_now.detach()
        s.rose = s.rose + (s.loss > before) * (step > 0)
        fooled = is_wrong(logits.detach(), s.y)
        if fooled.any():
            found[s.index[fooled]], done[s.index[fooled]] = s.z[fooled], True
            s = SimpleNamespace(**{key: t[~fooled] for key, t in vars(s).items()})
        higher = s.loss > s.best_loss
        s.best, s.best_grad = where(higher, s.z, s.best), where(higher, s.grad, s.best_grad)
        s.best_loss = where(higher, s.loss, s.best_loss)
        if step == steps or len(s.y) == 0:
            break
        s.mark = s.loss if step == 0 else s.mark
        if step == checkpoint:
            halve_where_stuck(s, span)
            span = max(span - max(int(0.03 * steps), 1), int(0.06 * steps), 1)
            checkpoint += span
        taken[s.index] += 1
        ahead = inside(s.z + s.rate * s.grad.sign(), s.low, s.high)
        if step > 0:
            ahead = s.z + 0.75 * (ahead - s.z) + 0.25 * (s.z - s.before)
            ahead = inside(ahead, s.low, s.high)
        s.z, s.before = ahead, s.z
    found[s.index] = s.best
    return Attacked(found, taken, done)


def halve_where_stuck(s, span):
    """A checkpoint of APGD after `span` steps: changes the rows of s that have not got on."""
    s.halved = (s.rose <= 0.75 * span) | ~s.halved & (s.best_loss <= s.mark)
    s.rate = where(s.halved, s.rate / 2, s.rate)
    s.z, s.grad = where(s.halved, s.best, s.z), where(s.halved, s.best_grad, s.grad)
    s.mark, s.rose = s.best_loss, torch.zeros_like(s.rose)


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
    best = to_corner(x, eps, random_signs(x, (b, c, 1, w), gen))
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
        rows, columns = neighbours(x, h, side, gen), neighbours(x, w, side, gen)
        image = torch.arange(len(x), device=x.device).view(-1, 1, 1)
        place = image, rows[:, :, None], columns[:, None, :]
        tried = best.clone()
        pixels = x.permute(0, 2, 3, 1)[place]  # (B,side,side,C)
        signs = random_signs(x, (len(x), 1, 1, c), gen)
        tried.permute(0, 2, 3, 1)[place] = to_corner(pixels, eps, signs)
        new = lead(model(tried), y)
        better = new > score
        best[better], score[better] = tried[better], new[better]
        used[alive] += 1
    found[alive], done[alive] = best, score > 0
    return Attacked(found, used, done)


def random_signs(x, shape, gen):
    """-1 or 1 at random, of the type and on the device of x."""
    return 2 * (torch.rand(shape, generator=gen).to(x) < 0.5).to(x) - 1


def neighbours(x, length, side, gen):
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


# ---- numbers: of images, of seeds, of rows


def rounded(numbers, digits=4):
    """A dict with its floats rounded."""
    return {key: round(v, digits) if isinstance(v, float) else v for key, v in numbers.items()}


def by_row(models):
    """{row of a table: {seed: name}} of a record's "models", in the order of --models."""
    groups = {}
    for name, m in models.items():
        groups.setdefault(m["method"], {})[m["seed"]] = name
    return groups


def column(entry, criterion, key):
    """One list of a targeted record as a tensor (N,), inf where the attack failed."""
    values = [math.inf if v is None else v for v in entry[criterion][key]]
    return torch.tensor(values, dtype=torch.double)


def read_correctly(models, src):
    """{name: bool (N,)}: which images a model reads correctly when clean."""
    return {name: torch.tensor(m["clean"]) == src for name, m in models.items()}


def summarise(models, src):
    """{name: {clean, all: {criterion: success, steps, min-eps}}} of a targeted record."""
    summary, right = {}, read_correctly(models, src)
    for name, m in models.items():
        summary[name] = {"clean": rounded(rate(right[name])), "all": {}}
        for criterion in CRITERIA:
            steps, radii = (column(m, criterion, key) for key in ("steps", "min_eps"))
            reached, near = steps.isfinite(), radii.clamp(max=RADII[-1])
            summary[name]["all"][criterion] = {
                "success": rounded(rate(reached)),
                "steps": {"median": median(steps[reached])},
                "min_eps": {"median": median(near), "censored": int(radii.isinf().sum())},
            }
    return summary


def median(values):
    """The lower one of an even number; None of nothing."""
    return round(values.median().item(), 4) if len(values) else None


def compare(models, src, seed):
    """{other row: its difference from the reference, of the same seeds and images}.

    On all images; on those that both models read correctly (one that misreads a 7 anyway is not
    fooled by being attacked); and on the easiest, as many of each model as the poorer one reads:
    of those it reads itself the ones that need least, for a poor model reads its firmest images.
    A min-eps that was not found counts as the largest radius tried. Rows that share no seed with
    the reference are left out, and so are models that did not train: the reference is the first
    row that did.
    """
    right = read_correctly(models, src)
    models = {name: m for name, m in models.items() if m.get("trained", True)} or models
    (reference, first), *others = by_row(models).items()
    compared, paired = {}, {"min_eps": median_change, "needs_less": share_needing_less}
    for other, second in others:
        names = [(first[s], second[s]) for s in first if s in second]
        if not names:
            continue
        compared[other] = {"reference": reference, "seeds": len(names)}
        reads = stacked(names, right.get)  # (seeds, images, 2)
        subsets = {
            "all": (torch.ones_like(reads), paired),
            "both_right": (reads.all(2, True).expand_as(reads), paired),
            "easiest": (reads, {"min_eps": change_of_median}),
        }
        for subset, (counted, measures) in subsets.items():
            compared[other][subset] = {}
            for c in CRITERIA:
                radii = stacked(names, lambda n, c=c: column(models[n], c, "min_eps"))
                radii = radii.clamp(max=RADII[-1]).masked_fill(~counted, math.nan)
                gen = stream(seed, f"bootstrap {reference} {other} {subset} {c}")
                compared[other][subset][c] = {
                    "n": int(counted.sum(1).amin(1).sum()),
                    **{key: interval(radii, measure, gen) for key, measure in measures.items()},
                }
    return compared


def stacked(names, values):
    """values(name) (images,) of each two models of one seed, as (seeds, images, 2)."""
    return torch.stack([torch.stack([values(name) for name in two], 1) for two in names])


def median_change(radii):
    """Of radii (images, 2), nan where an image does not count."""
    return (radii[:, 1] - radii[:, 0]).nanmedian()


def share_needing_less(radii):
    return (radii[:, 1] < radii[:, 0]).sum() / (~radii.isnan().any(1)).sum()


def change_of_median(radii):
    """Between the medians of each column's k smallest, k being how many the shorter one has."""
    k = int((~radii.isnan()).sum(0).min())
    middle = radii.sort(0).values[(k - 1) // 2]  # nan comes last; the last where k is 0
    return middle[1] - middle[0]


def interval(radii, measure, gen):
    """{value, low, high, of}: a measure of radii (seeds, images, 2) with its 95 % interval.

    Of two seeds or more: their mean, and Student's t over them. Of one: a bootstrap over its
    images, which cannot say what another seed would bring. Seeds without an image do not count.
    """
    radii = [of_seed for of_seed in radii if not measure(of_seed).isnan()]
    values = [measure(of_seed).item() for of_seed in radii]
    if len(values) > 1:
        numbers = {**t_interval(values), "of": "seeds"}
    elif values:
        numbers = {"value": values[0], **bootstrap(radii[0], measure, gen)}
    else:
        numbers = {"value": None, "low": None, "high": None, "of": "pictures"}
    return rounded(numbers, 5)


def bootstrap(values, measure, gen):
    """{low, high, of}: 95 % percentile interval of a measure, images drawn anew (Efron, 1979)."""
    n = len(values)
    draws = [measure(values[torch.randint(n, (n,), generator=gen)]) for _ in range(RESAMPLES)]
    low, high = torch.stack(draws).nanquantile(draws[0].new_tensor([0.025, 0.975])).tolist()
    return {"low": low, "high": high, "of": "pictures"}


# ---- the four modes: each attacks all models on a split and returns a record of its own


class Loaded(NamedTuple):
    net: nn.Module
    about: dict  # method: what the seeds of one row share, NAME without _sSEED; seed; trained
    classes: int


def load(folder, names, split_name, device):
    """({name: Loaded}, the split); every model fits the split."""
    split, models = load_split(folder, split_name, device), {}
    for name in names:
        net, record = load_model(folder, name, device)
        check_fit(name, record, split, f"{split_name}.pt")
        about = {"method": row_of(name), "seed": record["args"].get("seed")}
        about["trained"] = record.get("trained", True)
        if about in [m.about for m in models.values()]:
            what = f"--models names two of row {about['method']} and seed {about['seed']}"
            die(what, "save one under another --name")
        models[name] = Loaded(net, about, record["classes"])
    return models, split


def working_on(name, models, phase):
    """One line that a terminal rewrites and a file keeps."""
    progress(f"{name} ({list(models).index(name) + 1} of {len(models)}): {phase}")


def sampled(n, most, seed):
    """A fixed random choice of at most `most` of n images, int64, ascending."""
    return torch.randperm(n, generator=stream(seed, "sample"))[:most].sort().values


def targeted(models, split, seed, src, tgt, eps, steps, n, change="any"):
    """The record of one pair of digits, with the pictures of a few examples."""
    last = min(m.classes for m in models.values()) - 1
    if tgt > last:
        die(f"--tgt is {tgt}, but the classes end at {last}", "choose another")
    index = (split.labels == src).nonzero()[:n, 0]
    if len(index) == 0:
        die(f"the split has no image of digit {src}", "choose another --src or --split")
    x, y = split.x(index), torch.full((len(index),), tgt, device=index.device)
    entries, adversarial = {}, {}
    for name, m in models.items():
        working_on(name, models, f"attack within eps {eps:g} on {len(x):,} images")
        gen = stream(seed, "targeted")
        taken, adversarial[name] = headline(m.net, x, y, eps, steps, gen, change)
        working_on(name, models, "search for the smallest eps of each image")
        gen = stream(seed, "min-eps")
        min_eps = search_min_eps(m.net, x, y, RADII, gen, SEARCH_STEPS, change)
        entries[name] = {**m.about, "clean": predict(m.net, x).argmax(1).tolist()}
        for c in CRITERIA:
            entries[name][c] = {
                "steps": [None if math.isinf(v) else int(v) for v in taken[c].tolist()],
                "min_eps": [None if math.isinf(v) else round(v, 4) for v in min_eps[c].tolist()],
            }
    return {
        "index": index.tolist(),
        "models": entries,
        "summary": summarise(entries, src),
        "compared": compare(entries, src, seed),
        "examples": examples(models, entries, adversarial, x, src),
    }


def examples(models, entries, adversarial, x, src):
    """Pictures for the figure: the first seed of the first two rows of the table.

    Chosen are images that most of the two read correctly when clean, which counts double, and
    that were then brought to `confidence`.
    """
    names = [next(iter(seeds.values())) for seeds in list(by_row(entries).values())[:2]]
    score = torch.zeros(len(x))
    for name in names:
        score += 2 * (torch.tensor(entries[name]["clean"]) == src)
        score += column(entries[name], "confidence", "steps").isfinite()
    chosen = score.argsort(descending=True, stable=True)[:6].to(x.device)
    shown = {}
    for name in names:
        x_adv = adversarial[name][chosen]
        shown[name] = {
            "x_adv": x_adv.cpu(),
            "clean": predict(models[name].net, x[chosen]).softmax(1).cpu(),
            "fooled": predict(models[name].net, x_adv).softmax(1).cpu(),
        }
    return {"script": "attack.py", "x": x[chosen].cpu(), "models": shown}


def pairs(models, split, seed, eps, steps, n):
    """Success rate at `eps` by source (row) and target (column), at most n images a source.

    On images that every model reads correctly. The intervals of the means draw images anew, each
    with all its targets.
    """
    classes = min(m.classes for m in models.values())
    answers = [predict(m.net, split.images).argmax(1) for m in models.values()]
    right = torch.stack([a == split.labels for a in answers]).all(0)
    chosen = [(right & (split.labels == d)).nonzero()[:n, 0] for d in range(classes)]
    if not any(map(len, chosen)):
        die("no image is read correctly by every model", "leave out the worst, or train it longer")
    index = torch.cat([i.repeat_interleave(classes) for i in chosen])
    y = torch.cat([torch.arange(classes, device=i.device).repeat(len(i)) for i in chosen])
    index, y = index[split.labels[index] != y], y[split.labels[index] != y]
    cell = split.labels[index] * classes + y
    attacks = cell.bincount(minlength=classes**2)
    entries = {}
    for name, m in models.items():
        entries[name], gen = dict(m.about), stream(seed, "pairs")
        fooled = torch.ones(len(index), dtype=torch.bool, device=index.device)
        for criterion in USUAL:
            i = fooled.nonzero()[:, 0]  # who resists the first criterion is not tried for the next
            working_on(name, models, f"{criterion}: {len(i):,} attacks")
            x = split.x(index[i])
            radii, start = x.new_full((len(x),), eps), random_start(x, eps, gen)
            a = strongest(m.net, CRITERIA[criterion], x, y[i], radii, start, steps)
            fooled[i] = a.done
            share = (cell[fooled].bincount(minlength=classes**2) / attacks).view(classes, classes)
            entries[name][criterion] = [
                [None if math.isnan(v) else round(v, 4) for v in row] for row in share.tolist()
            ]
            by_image = fooled.view(-1, classes - 1).double().mean(1).cpu()
            ends = bootstrap(by_image, torch.mean, stream(seed, f"bootstrap {criterion}"))
            mean = {"k": int(fooled.sum()), "n": len(fooled), "rate": by_image.mean().item()}
            entries[name][f"{criterion}_mean"] = rounded({**mean, **ends})
    return {"models": entries, "n_per_digit": [len(i) for i in chosen]}


def untargeted(models, split, seed, eps, steps, restarts, queries, sweep, n):
    """The record of the first n images: accuracy under every attack, and by eps."""
    x, y = split.x(slice(n)), split.labels[:n]
    colors = None if split.colors is None else split.colors[:n]
    sample = sampled(len(y), SAMPLE, seed).to(y.device)
    radii = [0.0, *(sweep or [round(eps * f, 6) for f in CURVE if eps * f <= 1])]
    effort = {**dict.fromkeys(ATTACKS, steps), "Square": queries}
    entries = {}
    for name, m in models.items():
        working_on(name, models, f"{len(ATTACKS)} attacks within eps {eps:g} on {len(x):,}")
        answers = predict(m.net, x).argmax(1)
        right = answers == y
        found, standing = worst_case(m.net, x, y, right, eps, effort, restarts, seed)
        working_on(name, models, f"{len(radii)} radii on {len(sample):,} images")
        curve = robust_curve(m.net, x[sample], y[sample], right[sample], radii, steps, seed)
        entries[name] = {
            **m.about,
            "follows_colour": follows(answers, y, colors),
            "attacks": found,
            "robust": rounded(rate(standing)),
            "curve": curve,
        }
    return {"models": entries, "n": len(y), "sample": len(sample), "radii": radii}


def fools(name, net, x, y, eps, steps, gen):
    """Which images one attack fools, bool (N,)."""
    attack = partial(ATTACKS[name], steps=steps, gen=gen)
    return carry_out(attack, net, is_wrong, x, y, eps).done


def worst_case(net, x, y, right, eps, effort, restarts, seed):
    """({attack: accuracy}, standing bool (N,): right under every attack).

    `right` (N,) are the images read correctly when clean; effort {attack: steps}. The first
    attacks run on all of these, so their "own" accuracy does not depend on the others; the rest,
    and further restarts, see only the images still standing, as in AutoAttack (Croce & Hein, 2020).
    "so_far" is the worst case up to and including that attack.
    """
    standing, found = right.clone(), {"clean": rounded(rate(right))}
    for name in ATTACKS:
        found[name] = {}
        for restart in range(restarts if name in STRONG else 1):
            alone = name in ALONE and restart == 0
            i = (right if alone else standing).nonzero()[:, 0]
            gen = stream(seed, f"{name} {restart}")
            fooled = i[fools(name, net, x[i], y[i], eps, effort[name], gen)]
            standing[fooled] = False
            if alone:
                own = right.clone()
                own[fooled] = False
                found[name]["own"] = rounded(rate(own))
        found[name]["so_far"] = rounded(rate(standing))
    return found, standing


def robust_curve(net, x, y, right, radii, steps, seed):
    """Accuracy at each radius under APGD; who is fooled in a ball is fooled in a larger one."""
    standing, curve = right.clone(), []
    for eps in radii:
        i = standing.nonzero()[:, 0]
        gen = stream(seed, f"curve {eps}")
        standing[i[fools("APGD", net, x[i], y[i], eps, steps, gen)]] = False
        curve.append(rounded(rate(standing)))
    return curve


def follows(answers, y, colors):
    """Share of the images on a foreign colour that are taken for the digit that owns the colour.

    None without such images.
    """
    if colors is None or not (colors != y).any():
        return None
    return (answers == colors)[colors != y].cpu().double().mean().item()


def check(models, split, seed, eps, steps, n):
    """The record of what `claims` says of each model: can the attacks be trusted?"""
    index = sampled(len(split.labels), n, seed).to(split.labels.device)
    x, y = split.x(index), split.labels[index]
    entries = {}
    for name, m in models.items():
        working_on(name, models, f"nine checks on {len(y):,} images")
        found = accuracies(m.net, x, y, m.classes, eps, steps, seed)
        entries[name] = {**m.about, "checks": claims(found)}
    passed = all(c["pass"] for m in entries.values() for c in m["checks"].values())
    return {"models": entries, "n": len(y), "passed": passed}


class Trial(NamedTuple):
    """What is left of the images after one run of each of a few attacks."""

    standing: torch.Tensor  # bool (N,): right when clean and under each of them
    images: int  # that the attacks returned
    outside: int  # of these, how many left the ball or [0, 1]


def attempt(attacks, net, x, y, right, seed, names, eps, steps, restart=0):
    """The Trial of the attacks called `names`, all on the same images."""
    standing, outside = right.clone(), 0
    for name in names:
        gen = stream(seed, f"check {name} {restart}")
        a = carry_out(partial(attacks[name], steps=steps, gen=gen), net, is_wrong, x, y, eps)
        outside += int((~allowed(x, eps, a.x)).sum())
        standing &= ~a.done
    return Trial(standing, len(y) * len(names), outside)


def accuracies(net, x, y, classes, eps, steps, seed):
    """Accuracies under attack, all on the same images, that `claims` compares.

    APGD is the worst of both its losses, as in --untargeted. How strong it is cannot be seen where
    nobody or everybody is fooled, so the attacks are compared at the radius that leaves about half
    of the clean accuracy.
    """
    right = predict(net, x).argmax(1) == y
    goals = {f"to {k}": partial(towards, k) for k in range(classes)}
    under = partial(attempt, {**ATTACKS, **goals, "noise": noise}, net, x, y, right, seed)

    def share(hits):
        return int(hits.sum()) / len(y)

    radii = sorted({*(min(eps * f, 0.5) for f in (0.125, 0.25, 0.5, 1, 2, 4)), 0.5})
    by_eps = {r: under(STRONG, r, steps) for r in radii}
    curve = {r: share(trial.standing) for r, trial in by_eps.items()}
    half = min(radii, key=lambda r: abs(curve[r] - share(right) / 2))
    alone = {
        "eps 0": under(STRONG, 0.0, steps),
        "noise": under(["noise"], half, steps),
        "FGSM": under(["FGSM"], half, steps),
        "PGD": under(["PGD"], half, steps),
        "APGD on cross-entropy": under(["APGD"], half, steps),
        "twice": under(STRONG, half, 2 * steps),
        "Square": under(["Square"], half, CHECK_QUERIES),
    }
    restarts = [under(STRONG, half, steps, restart) for restart in range(1, 5)]
    aimed = [under([goal], half, steps) for goal in goals]
    trials = [*by_eps.values(), *alone.values(), *restarts, *aimed]
    five = [by_eps[half].standing, *(trial.standing for trial in restarts)]
    # an image is not led to its own class
    each = [by_eps[half].standing]
    each += [trial.standing | right & (y == k) for k, trial in enumerate(aimed)]
    return {
        **{name: share(trial.standing) for name, trial in alone.items()},
        "clean": share(right),
        "curve": {f"eps {r:g}": accuracy for r, accuracy in curve.items()},
        "eps": half,
        "APGD": curve[half],
        "five restarts": share(torch.stack(five).all(0)),
        "each class": share(torch.stack(each).all(0)),
        "eps 0.5": curve[0.5],
        "chance": 1 / classes,
        "images": sum(trial.images for trial in trials),
        "outside": sum(trial.outside for trial in trials),
    }


def claims(v):
    """{key: {claim, pass, numbers}} of the `accuracies` v, after Carlini et al. (2019)."""
    found = {}

    def claim(key, text, held, *names):
        numbers = {name: v[name] for name in names} or v["curve"]
        found[key] = {"claim": text, "pass": held, "numbers": rounded(numbers)}

    curve, order = list(v["curve"].values()), ("noise", "FGSM", "PGD", "APGD")
    falls = all(v[a] > v[b] - POINT / 2 for a, b in itertools.pairwise(order))
    claim("zero_eps", "eps 0 changes nothing", v["eps 0"] == v["clean"], "clean", "eps 0")
    claim("order", "noise fools least, then FGSM, PGD, APGD", falls, "eps", *order)
    claim("larger_eps", "a larger eps never helps the model", curve == sorted(curve)[::-1])
    enough, last = v["eps 0.5"] <= v["chance"], ("eps 0.5", "chance")
    claim("chance", "eps 0.5 leaves no more than chance", enough, *last)
    aimed = "nor does aiming at each class (Gowal et al., 2019)"
    for key, text, effort, *more in (
        ("twice_the_steps", "twice the steps change little", "twice"),
        ("five_restarts", "five restarts change little", "five restarts"),
        ("each_class", aimed, "each class", "APGD on cross-entropy"),
    ):
        claim(key, text, v["APGD"] - v[effort] < POINT, "eps", "APGD", effort, *more)
    weaker = v["Square"] > v["APGD"] - POINT / 2
    claim("square", "Square, without gradients, does not win", weaker, "eps", "APGD", "Square")
    none, text = v["outside"] == 0, "all images are in the ball and in [0, 1]"
    claim("inside", text, none, "images", "outside")
    return found


MODES = {"targeted": targeted, "pairs": pairs, "untargeted": untargeted, "check": check}


# ---- figures, each of one record and named after it


def legend_below(ax):
    """A legend that hides no data, however long its names are."""
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.15))


def draw_examples(record, shown):
    """One column per image: originals, then perturbation and adversarial image of each model."""
    x, a = shown["x"], record["args"]
    plain = {"fontsize": 8}
    answers = zip(*(map(in_brackets, m["clean"]) for m in shown["models"].values()), strict=True)
    title = f"original, and the answers of {' and '.join(shown['models'])}"
    cells = [(image, " ".join(said), plain) for image, said in zip(x, answers, strict=True)]
    rows = [(title, cells)]
    for name, m in shown["models"].items():
        colour = {**plain, "color": ink(record["models"][name]["method"])}
        change = ((m["x_adv"] - x) * 10 + 0.5).clamp(0, 1)
        title = f"{name}: perturbation x10, mid-grey for none"
        rows.append((title, [(image, "", colour) for image in change]))
        title = f"{name}: attacked towards {a['tgt']}{by_what(a)}, eps {a['eps']:g}"
        said = map(in_brackets, m["fooled"])
        rows.append((title, [(*both, colour) for both in zip(m["x_adv"], said, strict=True)]))
    return pictures(rows)


def by_what(args):
    """Which changes a targeted attack was held to; nothing where to none."""
    return f" by {args['change']} changes" if "change" in args else ""


def in_brackets(probabilities):
    """The answer and its probability, as in 7 (0.98); no line breaks between them."""
    return f"{int(probabilities.argmax())}\N{NO-BREAK SPACE}({float(probabilities.max()):.2f})"


def draw_min_eps(record):
    """Histograms of the smallest radius by each criterion; the last bin holds the rest too.

    Of the first two rows, all seeds, on images that both read correctly.
    """
    a, models, radii = record["args"], record["models"], {criterion: {} for criterion in USUAL}
    clean, two = read_correctly(models, a["src"]), list(by_row(models).items())[:2]
    for (row, seeds), (_, rivals) in zip(two, two[::-1], strict=True):
        both = {name: clean[name] & clean[rivals.get(s, name)] for s, name in seeds.items()}
        for c in USUAL:
            found = [column(models[n], c, "min_eps")[both[n]] for n in both]
            radii[c][row] = torch.cat(found).clamp(max=RADII[-1])
    everything = torch.cat([values for found in radii.values() for values in found.values()])
    far = float(everything.quantile(0.99)) if everything.any() else RADII[-1]
    bins = torch.linspace(0, far, 26).numpy()
    fig, ((left, right),) = figure(9, 4.2, columns=2, sharey=True)
    panels = {left: ("argmax", f"the answer is {a['tgt']}{by_what(a)}")}
    panels[right] = "confidence", f"{a['tgt']} with probability {CONFIDENT:g} or more{by_what(a)}"
    for ax, (criterion, title) in panels.items():
        for (row, values), bars in zip(radii[criterion].items(), ("bar", "step"), strict=False):
            middle = float(values.nanmedian())
            look = {"color": ink(row), "alpha": 0.5 if bars == "bar" else 1, "histtype": bars}
            name = textwrap.fill(f"{row}: median {middle:.4f}", 60)
            ax.hist(values.clamp(max=far).numpy(), bins, label=name, lw=1.5, **look)
            ax.axvline(middle, color=ink(row), ls="-" if bars == "bar" else "--", lw=1.5)
        ax.set(title=title, xlabel="min-eps (L-inf; the last bin holds what is beyond)")
        legend_below(ax)
    left.set_ylabel(f"{a['src']}s that both nets read correctly")
    return fig


def draw_pairs(record):
    """Success rate by source and target digit: the first seed of each row, both criteria."""
    names = [next(iter(seeds.values())) for seeds in by_row(record["models"]).values()]
    size = 3.9 * len(names) + 0.9, 7.6
    fig, axes = figure(*size, len(USUAL), len(names), sharex=True, sharey=True)
    for line, criterion in zip(axes, USUAL, strict=True):
        for ax, name in zip(line, names, strict=True):
            m = record["models"][name]
            picture = matrix(ax, m[criterion])
            mean = m[f"{criterion}_mean"]["rate"]
            ax.set_title(f"{textwrap.fill(name, 40)}\n{criterion}: mean {mean:.2f}", fontsize=10)
        line[0].set_ylabel("digit shown")
    for ax in axes[-1]:
        ax.set_xlabel("digit the attack wants")
    fig.colorbar(picture, ax=axes, shrink=0.6, label="success rate")
    fig.suptitle(f"Which digits turn into which within eps {record['args']['eps']:g}", fontsize=11)
    return fig


MARKERS = "osD^vPX*"  # rows whose names begin alike share a colour


def draw_robust_curve(record):
    """Accuracy by eps: the mean of a row's seeds, and their range as a band."""
    a, rows = record["args"], by_row(record["models"])
    fig, ((ax,),) = figure(6, 3.8 + 0.2 * len(rows))
    for k, row in enumerate(rows):
        curves = [record["models"][name]["curve"] for name in rows[row].values()]
        points = {
            eps: [point["rate"] for point in of_seeds]
            for eps, *of_seeds in zip(record["radii"], *curves, strict=True)
        }
        look = {"marker": MARKERS[k % len(MARKERS)], "ms": 4, "label": textwrap.fill(row, 80)}
        lines(ax, points, ink(row), **look)
    ax.axvline(a["eps"], color="grey", lw=0.8, ls=":")
    ax.set(xlabel="eps (L-inf, pixels in [0, 1])", ylabel="robust accuracy", ylim=(0, 1))
    ax.set_title(f"Accuracy left under attack ({a['split']}, n = {record['sample']:,})")
    ax.grid(alpha=0.3)
    legend_below(ax)
    return fig


def draw(record, path):
    """Save the figures of the record at `path`, the best one first; returns their paths."""
    figures = {}
    if record["mode"] == "targeted":
        if path.with_suffix(".pt").exists():
            shown = load_pt(path.with_suffix(".pt"), "delete it and run attack.py again")
            if shown.get("script") == "attack.py":  # else not ours, or of an older layout
                figures["_examples"] = draw_examples(record, shown)
        figures["_min_eps"] = draw_min_eps(record)
    elif record["mode"] == "pairs":
        figures[""] = draw_pairs(record)
    elif record["mode"] == "untargeted":
        figures["_robust_curve"] = draw_robust_curve(record)
    drawn = []
    for name, fig in figures.items():
        drawn.append(path.parent / "figures" / f"{path.stem}{name}.png")
        save_figure(fig, drawn[-1])
    return drawn


def report(folder):
    """Draw the figures of all results in the folder again; computes nothing."""
    if not folder.is_dir():
        die(f"--dir {folder} is missing", "choose another")
    hint, drawn = "delete it and run attack.py again", []
    for path in sorted(folder.glob("attack_*.json")):
        record = load_json(path, hint)
        if not {"mode", "args", "models"} <= record.keys():
            die(f"{path} is no result of attack.py", hint)
        models = {name: record["models"][name] for name in record["args"]["models"]}
        drawn += draw({**record, "models": models}, path)
    print("drew", *(drawn or [f"nothing: {folder} holds no results to draw"]))


# ---- what the terminal says


def tell(record):
    """The answer: a line for each model, and for each comparison."""
    for name, m in record["models"].items():
        if record["mode"] == "targeted":
            argmax, sure = (record["summary"][name]["all"][criterion] for criterion in USUAL)
            n, tgt = argmax["success"]["n"], record["args"]["tgt"]
            text = f"of {n} images {in_words(argmax)} become a {tgt}, "
            text += f"{in_words(sure)} with probability {CONFIDENT:g} or more; "
            text += f"median eps needed{by_what(record['args'])}: "
            text += f"{needed(argmax)}, with that probability {needed(sure)}"
        elif record["mode"] == "pairs":
            argmax, sure = (m[f"{criterion}_mean"] for criterion in USUAL)
            text = f"{argmax['k']:,} of {argmax['n']:,} reach the digit they want, "
            text += f"{sure['k']:,} with probability {CONFIDENT:g}"
        elif record["mode"] == "untargeted":
            clean, worst = m["attacks"]["clean"], m["robust"]
            text = f"of {clean['n']:,} images {clean['k']:,} are right when clean, "
            text += f"{worst['k']:,} under every attack ({', '.join(ATTACKS)})"
        else:
            failed = [c for c in m["checks"].values() if not c["pass"]]
            text = f"{len(failed)} of {len(m['checks'])} checks fail"
            for c in failed:
                numbers = ", ".join(f"{key} {value:g}" for key, value in c["numbers"].items())
                text += f"\n  {c['claim']}: {numbers}"
        print(f"{name}: {text}")
    for other, entry in record.get("compared", {}).items():
        argmax, sure = (entry["both_right"][criterion] for criterion in USUAL)
        if argmax["n"]:
            text = f"of {argmax['n']} images that both read correctly, {other} needs a smaller eps "
            text += f"than {entry['reference']} on {argmax['needs_less']['value']:.0%}; "
            text += f"for probability {CONFIDENT:g}, on {sure['needs_less']['value']:.0%}"
            if entry["seeds"] > 1:
                text += f" (means of {entry['seeds']} seeds)"
            print(text)


def in_words(case):
    """How many were fooled, after how many steps."""
    k, steps = case["success"]["k"], case["steps"]["median"]
    return f"{k} (median {steps:g} steps)" if k else "none"


def needed(case):
    """The median of the smallest radii; larger ones than the last of RADII were not tried."""
    eps = case["min_eps"]["median"]
    return f"{eps:g}" if eps < RADII[-1] else f"more than {RADII[-1]:g}"


# ---- the command


def main(argv=None):
    args, usual = get_args(argv)
    if args.report:
        return report(args.dir)
    device = setup(args)
    path = args.dir / f"{result_name(args, usual)}.json"
    settings = {k: v for k, v in vars(args).items() if k not in (*WHERE, "mode", "name")}
    guard(path, {**settings, "mode": args.mode, "script": "attack.py"}, args.overwrite)
    if settings.get("change") == "any":
        del settings["change"]  # it restricts nothing, and results that do not know it stay equal
    models, split = load(args.dir, args.models, args.split, device)
    said = ", ".join(f"{key} {value}" for key, value in settings.items() if key != "models")
    print(f"{args.mode} attack on {' '.join(models)} in {args.dir}: {said}")
    began = time.time()
    of_mode = {k: v for k, v in settings.items() if k not in ("models", "split", "seed")}
    record = MODES[args.mode](models, split, args.seed, **of_mode)
    shown = record.pop("examples", None)
    if shown:
        save_pt(shown, path.with_suffix(".pt"))
    head = {"schema": 2, "script": "attack.py", "name": path.stem, "mode": args.mode}
    where_run = {"torch": torch.__version__, "threads": args.threads, "device": str(device)}
    record = {**head, "args": settings, **record, "run": where_run}
    save_json(record, path)
    drawn = draw(record, path)
    progress("")
    tell(record)
    print(f"wrote {path}", *drawn, f"in {note_time(args.dir, path.stem, began):.0f} s")
    if drawn:
        print(f"look at {drawn[0]}")
    if not record.get("passed", True):
        sys.exit(1)


if __name__ == "__main__":
    run(main)
