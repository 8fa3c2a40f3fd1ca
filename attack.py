"""Fool trained models with perturbations too small to matter to a person, and say how hard that was.

Reads   DIR/SPLIT.pt (from make_data.py), DIR/NAME.pt (from train.py)
Writes  DIR/attack_7to3.json, attack_pairs.json, attack_untargeted.json, attack_check.json; DIR/figures/attack_*.png;
        DIR/attack_7to3.pt (the example pictures, so that --report can draw them again)

    python attack.py --src 7 --tgt 3 --eps 0.05          # is the cured model easier to fool? every 7 of the split
    python attack.py --models baseline_s42 baseline_s43 jitter_s42 jitter_s43
    python attack.py --pairs                             # all 90 pairs of digits
    python attack.py --untargeted --eps 0.3 --restarts 10 --dir results/mnist --models at_s42
    python attack.py --check                             # can the attacks be trusted? exit code 1 if not
    python attack.py --report                            # figures and tables of every attack in --dir

Radii are L-inf, in pixel units of [0, 1]. What counts as fooled is decided by `judge`, which sees only the attack's output. Models are
grouped by method (NAME without _sSEED); the first method is the reference and each other one is compared with it, seed by seed and
image by image.
"""

import argparse
import math
import re
import sys
import time
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import (
    INK,
    SPLITS,
    Attacked,
    Parser,
    alone,
    common_args,
    die,
    family_of,
    fmt,
    load_json,
    load_model,
    load_pt,
    load_splits,
    markdown,
    mean_sd,
    meta_of,
    model_name,
    pgd,
    random_start,
    real,
    run,
    save_figure,
    save_json,
    save_pt,
    setup,
    start_drawing,
    stream,
    whole,
    wilson,
    with_keys,
)

CHUNK = 256  # images attacked at once: what fits in the cache of one core
CONFIDENT = 0.9  # target probability of the stricter criterion
RESOLUTION = 1e-3  # of a min-eps
SEARCH_STEPS = 50  # at each new radius of the min-eps search; half as many in a bisection round, which starts from a success
SAMPLE = 1000  # images for what is too dear for the whole split: Square, robust curve, transfer
QUERIES = 300  # of the Square attack, per image
POINT = 0.02  # --check: a change below two percentage points is little
PUBLISHED = {  # of plain MNIST, by eps: accuracies as reported, "robust" under AutoAttack
    0.3: {
        "Gowal et al. (2020)": {"clean": 0.9926, "PGD": 0.9638, "robust": 0.9634},
        "TRADES (Zhang et al., 2019)": {"clean": 0.9948, "PGD": 0.9560, "robust": 0.9281},
        "Madry et al. (2018)": {"clean": 0.9853, "PGD": 0.8962, "robust": 0.8850},
        "FGSM-RS (Wong et al., 2020)": {"clean": 0.9850, "PGD": 0.8877, "robust": 0.8293},
    },
    0.1: {"ResNet-50 of a student project": {"clean": 0.6856, "FGSM": 0.1336, "PGD": 0.005}},
}
MODES = {  # the flags that mean something in each mode, and their defaults there
    "targeted": {
        "src": 7,
        "tgt": 3,
        "eps": 0.05,
        "steps": 1000,
        "restarts": 1,
        "decay": False,
        "n": None,
        "sweep": [0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5],
    },
    "pairs": {"eps": 0.05, "steps": 100, "n": 50},
    "untargeted": {
        "eps": 0.05,
        "steps": 50,
        "restarts": 3,
        "n": None,
        "sweep": None,
        "name": "untargeted",
        "queries": QUERIES,
    },
    "check": {"eps": 0.05, "steps": 50, "n": 500},
}

# ---------------------------------------------------------------- what counts as fooled


def says(logits, y):
    """argmax: the answer is y (targeted)."""
    return logits.argmax(1) == y


def is_sure(logits, y):
    """confidence: the probability of y is at least CONFIDENT, so the answer is y as well (targeted)."""
    return logits.softmax(1).gather(1, y[:, None])[:, 0] >= CONFIDENT


def is_wrong(logits, y):
    """The answer is not y (untargeted)."""
    return logits.argmax(1) != y


def lead(logits, y):
    """Best other logit minus that of y, float (B,): below zero where the answer is y."""
    own = F.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(own, -math.inf).amax(1) - logits[own]


def margin(logits, y):
    """A loss that asks only which logit is largest (after Carlini & Wagner, 2017), and cannot saturate as cross-entropy does."""
    return lead(logits, y).mean()


class Criterion(NamedTuple):
    reached: object  # (logits, y) -> bool (B,)
    losses: tuple  # what `strongest` minimises to get there, one after the other


CRITERIA = {
    "argmax": Criterion(says, (margin, F.cross_entropy)),
    "confidence": Criterion(is_sure, (F.cross_entropy,)),
}  # the second implies the first


@torch.no_grad()
def judge(model, x, y, eps, x_adv, reached):
    """bool (B,): is x_adv in the ball around x and in [0, 1], and does the model fall for it? Knows nothing of how x_adv was made."""
    inside = (x_adv - x).abs().amax((1, 2, 3)) <= eps + 1e-6
    return (
        inside
        & (x_adv.amin((1, 2, 3)) >= 0)
        & (x_adv.amax((1, 2, 3)) <= 1)
        & reached(model(x_adv), y)
    )


def carry_out(attack, model, reached, x, y, eps, *more):
    """Run attack(x, y, eps, *more) -> Attacked chunk by chunk, and let `judge` say what is done.

    x (N,3,H,W) in [0, 1]; y (N,); eps a float or (N,); `more` are tensors with a row per image.
    """
    eps = torch.as_tensor(eps, dtype=x.dtype, device=x.device).expand(len(x))
    parts = []
    for lo in range(0, max(len(x), 1), CHUNK):
        x_, y_, eps_, *more_ = (t[lo : lo + CHUNK] for t in (x, y, eps, *more))
        a = attack(x_, y_, eps_, *more_)
        parts.append(a._replace(done=judge(model, x_, y_, eps_, a.x, reached)))
    return Attacked(*map(torch.cat, zip(*parts)))


@torch.no_grad()
def answer(model, x):
    """Predicted classes int64 (N,)."""
    return torch.cat([model(x[lo : lo + 1000]).argmax(1) for lo in range(0, len(x), 1000)])


# ---------------------------------------------------------------- targeted: from src to tgt


def headline(model, x, y, args, gen):
    """{criterion: steps float (N,), inf where it failed} and the last adversarial images (N,3,H,W).

    PGD (Madry et al., 2018) on the targeted cross-entropy: random start, step eps / 10, at most args.steps. The criteria are two marks on
    one path: where argmax was reached, the attack carries on to confidence. Steps of failed restarts count.
    """
    steps = {name: torch.full((len(x),), math.inf, device=x.device) for name in CRITERIA}
    x_adv = x.clone()
    for restart in range(args.restarts):
        todo = steps["confidence"].isinf().nonzero()[:, 0]
        start = random_start(x[todo], args.eps, gen)
        taken = torch.zeros(len(todo), device=x.device)
        for name, (reached, _) in CRITERIA.items():
            a = carry_out(
                lambda x, y, eps, start: pgd(
                    model,
                    x,
                    y,
                    eps,
                    args.steps,
                    gen,
                    targeted=True,
                    stop=reached,
                    decay=args.decay,
                    start=start,
                ),
                model,
                reached,
                x[todo],
                y[todo],
                args.eps,
                start,
            )
            taken, x_adv[todo] = taken + a.steps, a.x
            done = a.done & (taken <= args.steps)
            steps[name][todo[done]] = torch.minimum(
                steps[name][todo[done]], restart * args.steps + taken[done]
            )
            todo, start, taken = todo[done], a.x[done], taken[done]
    return steps, x_adv


def strongest(model, criterion, x, y, eps, start, steps):
    """Attacked: targeted PGD, steps falling from eps / 4 to eps / 40, with each loss of the criterion on the images that resisted so far.

    The argmax needs both: the margin alone would flatter models that are sure of themselves, cross-entropy alone those that never are.
    Confidence is cross-entropy's own goal; the margin needs a tenth more for it. eps (N,); start (N,3,H,W).
    """
    x_adv, taken, done = start.clone(), torch.zeros_like(y), torch.zeros_like(y, dtype=torch.bool)
    for loss in criterion.losses:
        i = (~done).nonzero()[:, 0]
        attack = lambda x, y, eps, start: pgd(
            model,
            x,
            y,
            eps,
            steps,
            None,
            eps / 4,
            True,
            loss,
            criterion.reached,
            decay=True,
            start=start,
        )
        a = carry_out(attack, model, criterion.reached, x[i], y[i], eps[i], start[i])
        x_adv[i], taken[i], done[i] = a.x, taken[i] + a.steps, a.done
    return Attacked(x_adv, taken, done)


def search_min_eps(model, x, y, radii, gen, steps=SEARCH_STEPS):
    """{criterion: smallest radius that works, float (N,); inf where not even the last of `radii` does; 0 where nothing is needed}.

    First each radius in ascending order, for the images that still resist; then bisection between the last failure and the first success
    until they are RESOLUTION apart, all images in one batch, each with a radius of its own. A success brings the upper end down to the
    radius it really used, and the next round starts from it, scaled down. An image that cannot be brought to the argmax is not tried for
    confidence, which implies it.
    """

    def try_out(i, eps, start, steps):
        """Attack images i, note the radii of the successes, and return those that resist."""
        a = strongest(model, CRITERIA[name], x[i], y[i], eps, start, steps)
        high[i[a.done]], best[i[a.done]] = distance(a.x, x[i])[a.done], a.x[a.done]
        return i[~a.done]

    found, floor = {}, torch.zeros(len(x), device=x.device)
    for name, (reached, _) in CRITERIA.items():
        low, high, best = floor.clone(), torch.full_like(floor, math.inf), x.clone()
        high[carry_out(lambda x, y, eps: in_no_steps(x), model, reached, x, y, 0.0).done] = 0
        for radius in radii:
            i = (high.isinf() & (low < radius)).nonzero()[:, 0]
            low[
                try_out(i, low.new_full((len(i),), radius), random_start(x[i], radius, gen), steps)
            ] = radius
        while len(i := (high.isfinite() & (high - low > RESOLUTION)).nonzero()[:, 0]):
            middle = (low[i] + high[i]) / 2
            shrunk = x[i] + (best[i] - x[i]) * (middle / high[i]).view(-1, 1, 1, 1)
            i = try_out(i, middle, shrunk, max(steps // 2, 1))
            low[i] = (low[i] + high[i]) / 2
        found[name], floor = high, high
    return found


def in_no_steps(x_adv):
    """What an attack without gradient steps hands to `carry_out`."""
    return Attacked(x_adv, torch.zeros(len(x_adv), dtype=torch.long, device=x_adv.device), None)


def distance(a, b):
    """L-inf distance per image, float (B,)."""
    return (a - b).abs().amax((1, 2, 3))


# ---------------------------------------------------------------- numbers about images, seeds and methods


def rate(hits):
    """Share of a bool tensor with its n and 95 % Wilson interval."""
    k, n = int(hits.sum()), hits.numel()
    low, high = wilson(k, n)
    return {
        "k": k,
        "n": n,
        "rate": round(k / max(n, 1), 4),
        "low": round(low, 4),
        "high": round(high, 4),
    }


def quartiles(values):
    """Median and quartiles of a float tensor, each one of its values; None where there is none."""
    if len(values) == 0:
        return {"median": None, "q1": None, "q3": None}
    q1, median, q3 = (
        round(v, 4)
        for v in values.quantile(
            values.new_tensor([0.25, 0.5, 0.75]), interpolation="lower"
        ).tolist()
    )
    return {"median": median, "q1": q1, "q3": q3}


def bootstrap(values, statistic, gen, resamples=2000):
    """{value, low, high}: a statistic and its 95 % percentile interval (Efron, 1979).

    values float (seeds, images), nan where a pair does not count. Both seeds and images are drawn anew, so few seeds make it wide.
    """
    seeds, images = values.shape
    again = lambda n: torch.randint(n, (n,), generator=gen)
    draws = torch.stack(
        [statistic(values[again(seeds)][:, again(images)]) for _ in range(resamples)]
    )
    value, (low, high) = statistic(values), draws.nanquantile(draws.new_tensor([0.025, 0.975]))
    return {
        key: None if v.isnan() else round(float(v), 5)
        for key, v in (("value", value), ("low", low), ("high", high))
    }


def share_below_zero(values):
    return (values < 0).sum() / (~values.isnan()).sum()


def by_method(models):
    """{method: {seed: name}} of a record's "models", in the order of --models."""
    groups = {}
    for name, m in models.items():
        groups.setdefault(m["method"], {})[m["seed"]] = name
    return groups


def column(entry, criterion, key, missing):
    """One list of a targeted record as a tensor (N,), with `missing` where the attack never succeeded."""
    return torch.tensor(
        [missing if v is None else v for v in entry[criterion][key]], dtype=torch.double
    )


def subsets(models, src):
    """{"all" or "both_right": {name: bool (N,)}}: every image, or those that this model and its counterpart read correctly.

    The counterpart is the reference method's model of the same seed, for the reference itself the second method's. The second subset
    makes models comparable: one that misreads a 7 anyway is not fooled by being attacked.
    """
    right = {name: torch.tensor(m["clean"]) == src for name, m in models.items()}
    reference, second = [*by_method(models).values(), {}][:2]
    both = {}
    for name, m in models.items():
        counterpart = (second if reference.get(m["seed"]) == name else reference).get(
            m["seed"], name
        )
        both[name] = right[name] & right[counterpart]
    return {"all": {name: torch.ones_like(r) for name, r in right.items()}, "both_right": both}


def summarise(models, args):
    """{name: {subset: {criterion: success, steps, min-eps, sweep}}} from the lists of a targeted record."""
    summary = {}
    for name, m in models.items():
        clean = torch.tensor(m["clean"])
        summary[name] = {
            "clean": rate(clean == args.src),
            "already_target": rate(clean == args.tgt),
        }
        for subset, counts in subsets(models, args.src).items():
            summary[name][subset] = {}
            for criterion in CRITERIA:
                steps, radii = (
                    column(m, criterion, key, math.inf)[counts[name]]
                    for key in ("steps", "min_eps")
                )
                summary[name][subset][criterion] = {
                    "success": rate(steps.isfinite()),
                    "success_of_search": rate(radii <= args.eps),
                    "steps": quartiles(steps[steps.isfinite()]),
                    "min_eps": {
                        **quartiles(radii.clamp(max=args.sweep[-1])),
                        "censored": int(radii.isinf().sum()),
                        "n": len(radii),
                    },
                    "sweep": [rate(radii <= eps) for eps in args.sweep],
                }
    return summary


def compare(models, args):
    """One dict for each method after the first: differences, other - reference, of the same seed and image, with bootstrap intervals.

    A min-eps that was not found counts as the largest radius tried. Methods that share no seed are left out.
    """
    (reference, first), *others = by_method(models).items()
    compared = []
    for other, second in others:
        names = [(first[seed], second[seed]) for seed in first if seed in second]
        if not names:
            continue
        compared.append({"reference": reference, "other": other, "seeds": len(names)})
        for subset, counts in subsets(models, args.src).items():
            excluded = torch.stack([~counts[b] for _, b in names])  # (seeds, images)
            compared[-1][subset] = {}
            for criterion in CRITERIA:
                gap = lambda of: torch.stack(
                    [of(models[b]) - of(models[a]) for a, b in names]
                ).masked_fill(excluded, math.nan)
                radii = gap(lambda m: column(m, criterion, "min_eps", args.sweep[-1]))
                successes = gap(
                    lambda m: column(m, criterion, "steps", math.inf).isfinite().double()
                )
                gen = stream(args.seed, f"bootstrap {reference} {other} {subset} {criterion}")
                compared[-1][subset][criterion] = {
                    "n": int((~excluded).sum()),
                    "min_eps": bootstrap(radii, torch.nanmedian, gen),
                    "needs_less": bootstrap(radii, share_below_zero, gen),
                    "success": bootstrap(successes, torch.nanmean, gen),
                }
    return compared


EASE = {
    -1: "easier to fool than {}",
    1: "harder to fool than {}",
    0: "neither clearly easier nor clearly harder to fool than {}",
}


def direction(interval):
    """-1 or 1 where the whole interval lies on one side of zero, else 0: cannot tell."""
    low, high = interval["low"], interval["high"]
    return 0 if low is None else -1 if high < 0 else 1 if low > 0 else 0


def verdict(compared, src, tgt):
    """One sentence from one entry of `compare`: does the cure cost robustness, and does the answer depend on the criterion?"""
    other, reference = compared["other"], compared["reference"]
    told, everything = (
        {name: direction(c["min_eps"]) for name, c in compared[subset].items()}
        for subset in ("both_right", "all")
    )
    claim = lambda directions: (
        f"{EASE[directions['argmax']].format(reference)} by either criterion"
        if len(set(directions.values())) == 1
        else " but ".join(
            f"{EASE[d].format(reference)} by {name}" for name, d in directions.items()
        )
        + " (so it depends on the criterion)"
    )
    evidence = "; ".join(
        f"{name}: median change of min-ε {c['min_eps']['value']:+.4f}, 95 % {c['min_eps']['low']:+.4f} to {c['min_eps']['high']:+.4f}, "
        f"less needed on {c['needs_less']['value']:.0%}"
        for name, c in compared["both_right"].items()
        if c["n"]
    )
    also = (
        "the same holds on all images"
        if everything == told
        else f"on all images, misread ones too, it is {claim(everything)}"
    )
    return (
        f"From {src} to {tgt}, on {compared['both_right']['argmax']['n']:,} images that both read correctly, {other} is {claim(told)}"
        + f" ({evidence})" * bool(evidence)
        + f"; {also}."
    )


def targeted(models, split, args):
    """The record of one pair of digits; the pictures of a few examples go into a file of their own."""
    index = digits(split, args.src)[: args.n]
    if len(index) == 0:
        die(
            f"{args.dir}/{args.split}.pt has no image of digit {args.src}",
            "choose another --src or --split",
        )
    x, y = split.x(index), torch.full((len(index),), args.tgt, device=index.device)
    entries, adversarial, seconds = {}, {}, {}
    for name, m in models.items():
        start = time.time()
        steps, adversarial[name] = headline(m.net, x, y, args, stream(args.seed, "targeted"))
        attacked = time.time()
        min_eps = search_min_eps(m.net, x, y, args.sweep, stream(args.seed, "min-eps"))
        longer = search_min_eps(
            m.net, x[:50], y[:50], args.sweep, stream(args.seed, "min-eps"), 4 * SEARCH_STEPS
        )
        entries[name] = {**m.about, "clean": answer(m.net, x).tolist()}
        for c in CRITERIA:
            entries[name][c] = {
                "steps": [None if math.isinf(v) else int(v) for v in steps[c].tolist()],
                "min_eps": [None if math.isinf(v) else round(v, 4) for v in min_eps[c].tolist()],
                "four_times_the_steps": round(
                    float((longer[c] / min_eps[c][:50]).nan_to_num(1, posinf=1).median()), 4
                ),
            }
        seconds[name] = {
            "attack": round(attacked - start, 1),
            "min_eps": round(time.time() - attacked, 1),
        }
        print(
            f"{name:16s} "
            + "  ".join(
                f"{c}: fooled {steps[c].isfinite().float().mean():.3f} of {len(x):,}, median min-eps {min_eps[c].median():.4f}"
                for c in CRITERIA
            )
            + f"  {time.time() - start:5.1f}s",
            flush=True,
        )
    compared = compare(entries, args)
    record = {
        "index": index.tolist(),
        "models": entries,
        "summary": summarise(entries, args),
        "compared": compared,
        "verdict": " ".join(verdict(c, args.src, args.tgt) for c in compared)
        or "One method, or no seed in common: nothing to compare.",
    }
    save_pt(
        examples(models, entries, adversarial, x, args),
        args.dir / f"attack_{args.src}to{args.tgt}.pt",
    )  # so that --report can draw them
    return record, seconds


@torch.no_grad()
def examples(models, entries, adversarial, x, args, count=6):
    """Pictures for the figure: the first seed of the first two methods, on images that most of them read correctly and then got wrong."""
    names = [next(iter(seeds.values())) for seeds in list(by_method(entries).values())[:2]]
    telling = sum(
        2 * (torch.tensor(entries[name]["clean"]) == args.src)
        + column(entries[name], "confidence", "steps", math.inf).isfinite()
        for name in names
    )
    chosen = telling.argsort(descending=True, stable=True)[:count].to(x.device)
    said = lambda name, x: [
        [int(d), round(float(p), 3)] for p, d in zip(*models[name].net(x).softmax(1).max(1))
    ]
    return {
        "x": x[chosen].cpu(),
        "models": {
            name: {
                "x_adv": adversarial[name][chosen].cpu(),
                "clean": said(name, x[chosen]),
                "fooled": said(name, adversarial[name][chosen]),
            }
            for name in names
        },
    }


def digits(split, d):
    """Which images show digit d, int64 (K,)."""
    return (split.labels == d).nonzero()[:, 0]


# ---------------------------------------------------------------- pairs: every digit to every other


def pairs(models, split, args):
    """Success rate at args.eps by source (row) and target (column), on images that every model reads correctly."""
    classes = next(iter(models.values())).classes
    right = torch.stack(
        [answer(m.net, split.x(slice(None))) == split.labels for m in models.values()]
    ).all(0)
    chosen = [i[right[i]][: args.n] for i in (digits(split, d) for d in range(classes))]
    index = torch.cat([i.repeat_interleave(classes) for i in chosen])
    y = torch.cat([torch.arange(classes, device=i.device).repeat(len(i)) for i in chosen])
    index, y = index[split.labels[index] != y], y[split.labels[index] != y]
    cell = split.labels[index] * classes + y
    n = cell.bincount(minlength=classes**2)
    entries, seconds = {}, {}
    for name, m in models.items():
        start = time.time()
        gen, todo, table = (
            stream(args.seed, "pairs"),
            torch.arange(len(index), device=index.device),
            {},
        )
        for criterion in CRITERIA:
            x = split.x(index[todo])
            a = strongest(
                m.net,
                CRITERIA[criterion],
                x,
                y[todo],
                x.new_full((len(x),), args.eps),
                random_start(x, args.eps, gen),
                args.steps,
            )
            todo = todo[a.done]  # who cannot be brought to the argmax is not tried for confidence
            share = cell[todo].bincount(minlength=classes**2) / n
            table[criterion] = [
                [None if math.isnan(v) else round(v, 4) for v in row]
                for row in share.view(classes, classes).tolist()
            ]
            table[f"{criterion}_mean"] = rate(torch.arange(len(index)) < len(todo))
        entries[name], seconds[name] = {**m.about, **table}, round(time.time() - start, 1)
        told = "  ".join(
            f"{c} {table[f'{c}_mean']['rate']:.3f} of {len(index):,}" for c in CRITERIA
        )
        print(f"{name:16s} {told}  {time.time() - start:5.1f}s", flush=True)
    return {"models": entries, "n_per_digit": [len(i) for i in chosen]}, seconds


# ---------------------------------------------------------------- untargeted: anything but the truth


def fgsm(model, x, y, eps, steps, gen):
    """One full step from the clean image (Goodfellow et al., 2015)."""
    return pgd(model, x, y, eps, 1, gen, step_size=eps, start=x)


def pgd_ce(model, x, y, eps, steps, gen):
    """PGD (Madry et al., 2018): random start, steps falling from eps / 4 to eps / 40, each image until it is fooled."""
    return pgd(model, x, y, eps, steps, gen, step_size=eps / 4, stop=is_wrong, decay=True)


def pgd_margin(model, x, y, eps, steps, gen):
    """The same on the margin, which is the stronger loss where a model is never sure of itself."""
    return pgd(
        model, x, y, eps, steps, gen, step_size=eps / 4, stop=is_wrong, decay=True, loss=margin
    )


@torch.no_grad()
def square(model, x, y, eps, queries, gen):
    """Square attack (Andriushchenko et al., 2020): random search that never sees a gradient, so it cannot be misled by one.

    From vertical stripes of +-eps; each query sets a random square to +-eps per channel, kept where the margin falls. The squares shrink
    on the authors' schedule, compressed to `queries`. One departure: all images of a batch share the size of the square.
    """
    b, c, h, w = x.shape
    draw = lambda *shape: torch.rand(shape, generator=gen).to(x)
    corner = lambda x, eps, *shape: (
        x + eps.view(-1, 1, 1, 1) * (2 * (draw(*shape) < 0.5).to(x) - 1)
    ).clamp(0, 1)
    best = corner(x, eps, b, c, 1, w)
    score, used = lead(model(best), y), torch.ones_like(y)
    for query in range(1, queries):
        i = (score <= 0).nonzero()[:, 0]
        if len(i) == 0:
            break
        halvings = sum(
            query / queries * 10_000 > at for at in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
        )
        side = min(max(round(math.sqrt(0.8 * 0.5**halvings * h * w)), 1), min(h, w) - 1)
        covers = lambda length: (
            (
                (
                    torch.arange(length, device=x.device)
                    - (draw(len(i), 1) * (length - side + 1)).long()
                )
                // side
            )
            == 0
        )  # (B,length)
        inside = covers(h)[:, None, :, None] & covers(w)[:, None, None, :]
        tried = torch.where(inside, corner(x[i], eps[i], len(i), c, 1, 1), best[i])
        new = lead(model(tried), y[i])
        better = new > score[i]
        best[i[better]], score[i[better]] = tried[better], new[better]
        used[i] += 1
    return Attacked(best, used, score > 0)


ATTACKS = {"FGSM": fgsm, "PGD": pgd_ce, "PGD, margin loss": pgd_margin, "Square": square}
RANDOM = ("PGD", "PGD, margin loss")  # restarts change these


def fool(name, net, x, y, eps, steps, gen, queries=QUERIES):
    """Which images one attack fools, bool (N,)."""
    return carry_out(
        lambda x, y, eps: ATTACKS[name](
            net, x, y, eps, queries if name == "Square" else steps, gen
        ),
        net,
        is_wrong,
        x,
        y,
        eps,
    ).done


def worst_case(m, x, y, sample, args):
    """({attack: accuracy}, standing bool (N,): right under every attack).

    An attack's own accuracy comes from one run on every image that is right when clean, so it does not depend on the other attacks; the
    further restarts of PGD see only the images still standing. Square runs on the images of `sample`. "so far" is the worst case up to and
    including that attack, over all images.
    """
    right = answer(m.net, x) == y
    standing, told = right.clone(), {}
    for name in ATTACKS:
        seen = sample if name == "Square" else torch.arange(len(y), device=y.device)
        for restart in range(args.restarts if name in RANDOM else 1):
            i = seen[(right if restart == 0 else standing)[seen]]
            fooled = i[
                fool(
                    name,
                    m.net,
                    x[i],
                    y[i],
                    args.eps,
                    args.steps,
                    stream(args.seed, f"{name} {restart}"),
                    args.queries,
                )
            ]
            standing[fooled] = False
            if restart == 0:
                own = right.clone()
                own[fooled] = False
                told[name] = {"own": rate(own[seen])}
        told[name]["so_far"] = rate(standing)
    return {"clean": rate(right), **told}, standing


def robust_curve(m, x, y, radii, args):
    """Accuracy at each radius under PGD and PGD on the margin; who is fooled in a smaller ball is fooled in every larger one."""
    standing, curve = answer(m.net, x) == y, []
    for eps in radii:
        for name in RANDOM:
            i = standing.nonzero()[:, 0]
            standing[
                i[
                    fool(
                        name,
                        m.net,
                        x[i],
                        y[i],
                        eps,
                        args.steps,
                        stream(args.seed, f"curve {name} {eps}"),
                    )
                ]
            ] = False
        curve.append(rate(standing))
    return curve


def transfer(models, x, y, args):
    """Accuracy of each model (column) on images made on each model (row): PGD, all args.steps steps, so that they are as strong as they get."""
    table = []
    for a in models.values():
        gen = stream(args.seed, "transfer")
        x_adv = carry_out(
            lambda x, y, eps: pgd(a.net, x, y, eps, args.steps, gen, step_size=eps / 4, decay=True),
            a.net,
            is_wrong,
            x,
            y,
            args.eps,
        ).x
        table.append([rate(answer(b.net, x_adv) == y)["rate"] for b in models.values()])
    return table


def untargeted(models, split, args):
    x, y = split.x(slice(args.n)), split.labels[: args.n]
    sample = sampled(len(y), SAMPLE, args).to(y.device)
    radii = [
        0.0,
        *(
            args.sweep
            or [
                round(args.eps * f, 6)
                for f in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.25, 1.5)
                if args.eps * f <= 1
            ]
        ),
    ]
    entries, seconds = {}, {}
    for name, m in models.items():
        start = time.time()
        told, standing = worst_case(m, x, y, sample, args)
        attacked = time.time()
        entries[name] = {
            **m.about,
            "follows_colour": follows(m, x, y, split),
            "attacks": told,
            "robust": rate(standing),
            "curve": robust_curve(m, x[sample], y[sample], radii, args),
            "standing": "".join(map(str, standing.int().tolist())),
        }  # one character per image of the split
        seconds[name] = {
            "worst_case": round(attacked - start, 1),
            "curve": round(time.time() - attacked, 1),
        }
        print(
            f"{name:16s} clean {told['clean']['rate']:.4f}  "
            + "  ".join(f"{a} {told[a]['own']['rate']:.4f}" for a in ATTACKS)
            + f"  robust {entries[name]['robust']['rate']:.4f} of {len(y):,}  {time.time() - start:5.1f}s",
            flush=True,
        )
    start = time.time()
    table = transfer(models, x[sample], y[sample], args)
    seconds["transfer"] = round(time.time() - start, 1)
    return {
        "models": entries,
        "n": len(y),
        "sample": len(sample),
        "queries": args.queries,
        "radii": radii,
        "transfer": {"names": list(models), "accuracy": table},
    }, seconds


def follows(m, x, y, split):
    """Share of the images on a colour not their own that are taken for the digit that owns it; None without such images."""
    if split.colors is None or not (against := split.colors[: len(y)] != y).any():
        return None
    return (answer(m.net, x) == split.colors[: len(y)])[against].double().mean().item()


def sampled(n, most, args):
    """A fixed random choice of at most `most` of n images, int64, ascending."""
    return torch.randperm(n, generator=stream(args.seed, "sample"))[:most].sort().values


# ---------------------------------------------------------------- check: can the attacks be trusted


def check_model(m, x, y, args):
    """[(claim, did it hold, the numbers)] after the list of Carlini et al. (2019); accuracies on the same images throughout.

    PGD is the worst of both losses here, as in --untargeted. How strong it is cannot be seen where nobody or everybody is fooled, so the
    attacks are compared at a telling radius: the one that leaves about half of the clean accuracy.
    """
    right, outside = answer(m.net, x) == y, []

    def survivors(name, attack, eps, seed=0):
        """bool (N,): right when clean and under one run of attack(x, y, eps, gen); what is outside the ball is counted by code of its own."""
        gen = stream(args.seed, f"check {name} {seed}")
        a = carry_out(lambda x, y, eps: attack(x, y, eps, gen), m.net, is_wrong, x, y, eps)
        beyond = ((a.x.double() - x.double()).abs() > eps + 1e-6) | (a.x < 0) | (a.x > 1)
        outside.append(int(beyond.flatten(1).any(1).sum()))
        return right & ~a.done

    def under(name, eps, steps=args.steps, seed=0):
        return survivors(
            name, lambda x, y, eps, gen: ATTACKS[name](m.net, x, y, eps, steps, gen), eps, seed
        )

    def towards(k, eps):
        """Every image pushed to class k, until it is wrong in any way; the truth is still what `is_wrong` compares with."""
        goal = lambda x, y, eps, gen: pgd(
            m.net,
            x,
            torch.full_like(y, k),
            eps,
            args.steps,
            gen,
            eps / 4,
            targeted=True,
            loss=margin,
            stop=says,
            decay=True,
        )
        return survivors(f"to {k}", goal, eps) | (right & (y == k))

    share = lambda hits: int(hits.sum()) / len(y)
    both = lambda eps, **how: under("PGD", eps, **how) & under("PGD, margin loss", eps, **how)
    clean, chance = share(right), 1 / m.classes
    radii = sorted({*(min(args.eps * f, 0.5) for f in (0.125, 0.25, 0.5, 1, 2, 4)), 0.5})
    curve = {eps: share(both(eps)) for eps in radii}
    eps = min(radii, key=lambda r: abs(curve[r] - clean / 2))
    zero, random, one_step, pgd_ = (
        share(both(0.0)),
        share(survivors("noise", noise, eps)),
        share(under("FGSM", eps)),
        curve[eps],
    )
    twice, square_ = (
        share(both(eps, steps=2 * args.steps)),
        share(under("Square", eps, steps=QUERIES)),
    )
    restarts = share(torch.stack([both(eps, seed=k) for k in range(5)]).all(0))
    classes = share(torch.stack([both(eps), *(towards(k, eps) for k in range(m.classes))]).all(0))
    told = {"eps": eps, "PGD": pgd_}
    return [
        (
            "eps 0 leaves the clean accuracy as it is",
            zero == clean,
            {"clean": clean, "eps 0": zero},
        ),
        (
            "random noise fools no more than FGSM, and FGSM no more than PGD",
            random >= one_step >= pgd_,
            {"eps": eps, "noise": random, "FGSM": one_step, "PGD": pgd_},
        ),
        (
            "a larger eps never helps the model",
            list(curve.values()) == sorted(curve.values(), reverse=True),
            {f"eps {e:g}": a for e, a in curve.items()},
        ),
        (
            "at eps 0.5 no more is right than by chance",
            curve[0.5] <= chance,
            {"eps 0.5": curve[0.5], "chance": chance},
        ),
        ("twice the steps change little", pgd_ - twice < POINT, {**told, "twice": twice}),
        (
            "five restarts change little",
            pgd_ - restarts < POINT,
            {**told, "five restarts": restarts},
        ),
        (
            "another loss, towards each class in turn (Gowal et al., 2019), changes little",
            pgd_ - classes < POINT,
            {
                **told,
                "each class": classes,
                "cross-entropy alone": share(under("PGD", eps)),
                "margin alone": share(under("PGD, margin loss", eps)),
            },
        ),
        (
            "Square, which sees no gradient, does not beat PGD",
            square_ > pgd_ - POINT / 2,
            {**told, "Square": square_},
        ),
        (
            "every adversarial image is in the ball and in [0, 1]",
            sum(outside) == 0,
            {"images": len(y) * len(outside), "outside": sum(outside)},
        ),
    ]


def noise(x, y, eps, gen):
    """A random corner of the ball."""
    return in_no_steps(
        (x + eps.view(-1, 1, 1, 1) * torch.randn(x.shape, generator=gen).sign().to(x)).clamp(0, 1)
    )


def check(models, split, args):
    index = sampled(len(split.labels), args.n, args).to(split.labels.device)
    x, y = split.x(index), split.labels[index]
    entries, seconds = {}, {}
    for name, m in models.items():
        start = time.time()
        checks = [
            {
                "claim": claim,
                "pass": bool(held),
                "numbers": [[k, round(v, 4)] for k, v in numbers.items()],
            }
            for claim, held, numbers in check_model(m, x, y, args)
        ]
        entries[name], seconds[name] = {**m.about, "checks": checks}, round(time.time() - start, 1)
        for c in checks:
            print(
                f"{name:16s} {'PASS' if c['pass'] else 'FAIL'}  {c['claim']}  ({listed(c['numbers'])})",
                flush=True,
            )
    return {
        "models": entries,
        "n": len(y),
        "passed": all(c["pass"] for e in entries.values() for c in e["checks"]),
    }, seconds


def listed(numbers):
    return ", ".join(f"{k} {v:g}" for k, v in numbers)


# ---------------------------------------------------------------- figures

LINES = {"argmax": "-", "confidence": "--"}
SPARE_INK = (
    "#CC79A7",
    "#56B4E9",
    "#8C510A",
    "#999999",
)  # for methods without a colour of their own in common.INK


def inks(groups):
    """{method: colour}."""
    spare = iter(SPARE_INK * len(groups))
    return {method: INK.get(method) or next(spare) for method in groups}


def draw_examples(record, pictures, path):
    """One column per image; the original, then perturbation and adversarial image of each model."""
    plt = start_drawing()
    x, models, ink, a = (
        pictures["x"],
        pictures["models"],
        inks(by_method(record["models"])),
        record["args"],
    )
    rows = [
        (
            "original",
            x,
            [
                " | ".join("{} ({:.2f})".format(*m["clean"][i]) for m in models.values())
                for i in range(len(x))
            ],
            "black",
        )
    ]
    for name, m in models.items():
        colour = ink[record["models"][name]["method"]]
        rows += [
            (
                f"{name}\nperturbation x10",
                ((m["x_adv"] - x) * 10 + 0.5).clamp(0, 1),
                [""] * len(x),
                colour,
            ),
            (
                f"{name}\nadversarial",
                m["x_adv"],
                ["{} ({:.2f})".format(*said) for said in m["fooled"]],
                colour,
            ),
        ]
    fig, axes = plt.subplots(
        len(rows),
        len(x),
        figsize=(1.4 * len(x) + 0.6, 1.5 * len(rows) + 0.6),
        layout="constrained",
        squeeze=False,
    )
    for line, (label, images, said, colour) in zip(axes, rows):
        for i, ax in enumerate(line):
            ax.imshow(images[i].permute(1, 2, 0).numpy(), vmin=0, vmax=1)
            ax.set(xticks=[], yticks=[])
            ax.set_title(said[i], fontsize=8, color=colour, pad=2)
        line[0].set_ylabel(label, fontsize=8, color=colour)
    fig.suptitle(
        f"Each {a['src']} attacked towards {a['tgt']} within eps {a['eps']:g}. Above each picture: the model's answer (its probability);\n"
        f"above the originals: {' | '.join(models)}. Mid-grey: pixel left alone.",
        fontsize=9,
    )
    save_figure(fig, path)


def draw_curve(ax, eps, curves, colour, label, style="-"):
    """The mean of several seeds' rates against eps, with the Wilson band of their pooled images."""
    pooled = [(sum(r["k"] for r in point), sum(r["n"] for r in point)) for point in zip(*curves)]
    ax.plot(
        eps, [k / max(n, 1) for k, n in pooled], style, color=colour, marker="o", ms=3, label=label
    )
    ax.fill_between(eps, *zip(*(wilson(k, n) for k, n in pooled)), color=colour, alpha=0.15, lw=0)
    ax.set_xlabel("eps (L-inf, pixels in [0, 1])")
    ax.grid(alpha=0.3)


def draw_sweep(record, path):
    """Success against eps, first two methods and both criteria: all images, and those that both methods read correctly."""
    plt = start_drawing()
    groups, a = dict(list(by_method(record["models"]).items())[:2]), record["args"]
    ink = inks(groups)
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained", sharey=True)
    for ax, subset, title in zip(
        axes, ("all", "both_right"), (f"every {a['src']}", f"{a['src']}s that both read correctly")
    ):
        n = 0
        for method, seeds in groups.items():
            for criterion, style in LINES.items():
                curves = [
                    record["summary"][name][subset][criterion]["sweep"] for name in seeds.values()
                ]
                draw_curve(ax, a["sweep"], curves, ink[method], f"{method}, {criterion}", style)
            n = max(n, sum(c[0]["n"] for c in curves))
        ax.axvline(a["eps"], color="grey", lw=0.8, ls=":")
        ax.set(xscale="log", ylim=(0, 1.02), title=f"{title} (n = {n:,})")
        ax.set_xticks(a["sweep"], [f"{e:g}" for e in a["sweep"]], fontsize=8, rotation=45)
        ax.minorticks_off()
    axes[0].set_ylabel(f"share turned into a {a['tgt']}")
    axes[1].legend(fontsize=8, loc="lower right")
    fig.suptitle(
        f"How many {a['src']}s become {a['tgt']}s within eps (confidence: with probability {CONFIDENT:g} or more)",
        fontsize=11,
    )
    save_figure(fig, path)


def draw_min_eps(record, path):
    """Histograms of the smallest radius per criterion, and of its paired differences, on images that both read correctly: first two methods."""
    plt = start_drawing()
    models, a = record["models"], record["args"]
    groups, both = (
        dict(list(by_method(models).items())[:2]),
        subsets(models, a["src"])["both_right"],
    )
    ink, cap = inks(groups), a["sweep"][-1]
    radii = {
        c: {
            name: column(m, c, "min_eps", cap).masked_fill(~both[name], math.nan)
            for name, m in models.items()
        }
        for c in CRITERIA
    }
    known = lambda values: values[~values.isnan()]
    everything = torch.cat([v for named in radii.values() for v in named.values()])
    far = cap if everything.isnan().all() else max(float(everything.nanquantile(0.99)), RESOLUTION)
    fig, axes = plt.subplots(1, 3, figsize=(12.5, 3.7), layout="constrained")
    for ax, (criterion, named) in zip(axes, radii.items()):
        for method, seeds in groups.items():
            values = known(torch.cat([named[name] for name in seeds.values()]))
            middle, bins = float(values.nanmedian()), torch.linspace(0, far, 26).numpy()
            ax.hist(
                values.clamp(max=far).numpy(),
                bins,
                color=ink[method],
                alpha=0.45,
                label=f"{method}: median {middle:.4f}",
            )
            ax.axvline(middle, color=ink[method], lw=1.5)
        ax.set(
            xlabel="min-eps (L-inf, pixels in [0, 1])",
            ylabel="images",
            title=criterion
            + {
                "argmax": ": the answer is the target",
                "confidence": f": with probability {CONFIDENT:g} or more",
            }[criterion],
        )
    (reference, first), *others = groups.items()
    for (other, second), colour in zip(others, ("black", *SPARE_INK)):
        for criterion, style in LINES.items():
            gaps = [
                radii[criterion][second[seed]] - radii[criterion][first[seed]]
                for seed in first
                if seed in second
            ]
            if gaps:
                values = known(torch.cat(gaps))
                axes[2].hist(
                    values.clamp(-far, far).numpy(),
                    torch.linspace(-far, far, 32).numpy(),
                    histtype="step",
                    color=colour,
                    ls=style,
                    label=f"{criterion}: {other} needs less on {share_below_zero(values):.0%}",
                )
    axes[2].axvline(0, color="grey", lw=0.8)
    axes[2].set(
        xlabel=f"min-eps, {' or '.join(m for m, _ in others) or 'other'} minus {reference}",
        ylabel="images",
        title="difference on the same image",
    )
    for ax in axes:
        ax.set_ylim(top=ax.get_ylim()[1] * 1.25)
        ax.locator_params(axis="x", nbins=6)
        if ax.get_legend_handles_labels()[0]:  # one method alone has no difference
            ax.legend(fontsize=8, loc="upper right")
    fig.suptitle(
        f"Smallest perturbation that turns a {a['src']} into a {a['tgt']}, images that both read correctly (outermost bins: and beyond)",
        fontsize=11,
    )
    save_figure(fig, path)


def draw_grid(ax, table, title, size=6.5):
    """A square table of rates with its numbers written in; None stays blank."""
    picture = ax.imshow(
        [[math.nan if v is None else v for v in row] for row in table], vmin=0, vmax=1, cmap="Blues"
    )
    for i, row in enumerate(table):
        for j, v in enumerate(row):
            if v is not None:
                ax.text(
                    j,
                    i,
                    f"{v:.2f}".lstrip("0") if v < 0.995 else "1",
                    ha="center",
                    va="center",
                    fontsize=size,
                    color="white" if v > 0.55 else "black",
                )
    ax.set_title(title, fontsize=10)
    ax.set(xticks=range(len(table)), yticks=range(len(table)))
    return picture


def draw_pairs(record, path):
    """Success rate by source and target digit: the first seed of each method, both criteria."""
    plt = start_drawing()
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
    for line, criterion in zip(axes, CRITERIA):
        for ax, name in zip(line, names):
            m = record["models"][name]
            picture = draw_grid(
                ax, m[criterion], f"{name}, {criterion}: mean {m[criterion + '_mean']['rate']:.2f}"
            )
        line[0].set_ylabel("digit shown")
    for ax in axes[-1]:
        ax.set_xlabel("digit the attack wants")
    fig.colorbar(picture, ax=axes, shrink=0.6, label="success rate")
    fig.suptitle(f"Which digits turn into which within eps {record['args']['eps']:g}", fontsize=11)
    save_figure(fig, path)


def draw_robust_curve(record, path):
    plt = start_drawing()
    groups = by_method(record["models"])
    ink = inks(groups)
    fig, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for method, seeds in groups.items():
        draw_curve(
            ax,
            record["radii"],
            [record["models"][name]["curve"] for name in seeds.values()],
            ink[method],
            method,
        )
    ax.axvline(record["args"]["eps"], color="grey", lw=0.8, ls=":")
    ax.set(
        ylabel="robust accuracy",
        ylim=(0, 1),
        title=f"Accuracy left under attack ({record['args']['split']}, n = {record['sample']:,})",
    )
    ax.legend(fontsize=8)
    save_figure(fig, path)


def draw_transfer(record, path):
    """Accuracy of each model on the images made on each model."""
    plt = start_drawing()
    names, k = record["transfer"]["names"], len(record["transfer"]["names"])
    fig, ax = plt.subplots(figsize=(0.9 * k + 3.6, 0.8 * k + 2.0), layout="constrained")
    picture = draw_grid(
        ax,
        record["transfer"]["accuracy"],
        f"Do adversarial images travel?\n(eps {record['args']['eps']:g}, n = {record['sample']:,})",
        9,
    )
    clean = [record["models"][name]["attacks"]["clean"]["rate"] for name in names]
    ax.set_xticks(
        range(k),
        [f"{name}\nclean: {acc:.2f}" for name, acc in zip(names, clean)],
        fontsize=8,
        rotation=90 if k > 3 else 0,
    )
    ax.set_yticks(range(k), names, fontsize=8)
    ax.set(xlabel="scored on", ylabel="made on")
    fig.colorbar(picture, ax=ax, label="accuracy")
    save_figure(fig, path)


# ---------------------------------------------------------------- the write-up


def between(r):
    """A rate with its interval."""
    return f"{r['rate']:.3f} ({r['low']:.3f} to {r['high']:.3f})"


def median(q):
    """A median with its quartiles."""
    return "-" if q["median"] is None else f"{q['median']:g} ({q['q1']:g} to {q['q3']:g})"


def change(b):
    """A bootstrapped difference with its interval."""
    return "-" if b["low"] is None else f"{b['value']:+.4f} ({b['low']:+.4f} to {b['high']:+.4f})"


def show(path, caption, args):
    print(
        f"![{caption.partition('. What')[0]}]({path.relative_to(args.root).as_posix()})\n\n*{caption}.*\n"
    )


def print_over_seeds(record, rows):
    """rows: {what: name of a model -> number}; a table of mean ± sd (seeds), where a method has several."""
    groups = by_method(record["models"])
    if max(map(len, groups.values())) > 1:
        print("Mean ± sd (seeds):\n")
        print(
            markdown(
                ["", *groups],
                [
                    [
                        what,
                        *(
                            mean_sd([of(name) for name in seeds.values()])
                            for seeds in groups.values()
                        ),
                    ]
                    for what, of in rows.items()
                ],
            )
        )


def report_targeted(record, args):
    a, summary = record["args"], record["summary"]
    path = lambda what: args.dir / "figures" / f"attack_{a['src']}to{a['tgt']}_{what}.png"
    cases = [(subset, c) for subset in ("all", "both_right") for c in CRITERIA]
    print(f"### From {a['src']} to {a['tgt']}\n\n{record['verdict']}\n")
    print(
        f"Every attack starts from a {a['src']} of {a['split']}: eps {a['eps']:g}, step eps / 10{', decaying' if a['decay'] else ''}, at most {a['steps']} steps, "
        f"{a['restarts']} random start{'s' * (a['restarts'] > 1)}. Rates with 95 % Wilson intervals, medians with quartiles. min-ε: the smallest radius found, to "
        f"{RESOLUTION:g}; censored: nothing up to {a['sweep'][-1]:g} worked. By the search (decaying steps, margin loss too): min-ε is at most eps. Both right: images that this model and the reference of its seed "
        "(for the reference: the second method) read correctly; the others are fooled without an attack.\n"
    )
    print(
        markdown(
            [
                "images",
                "criterion",
                "model",
                "n",
                "reads correctly",
                "fooled at eps",
                "by the search",
                "steps to success",
                "min-ε",
                "censored",
            ],
            [
                [
                    subset.replace("_", " "),
                    c,
                    name,
                    s[subset][c]["success"]["n"],
                    f"{s['clean']['rate']:.3f}",
                    between(s[subset][c]["success"]),
                    f"{s[subset][c]['success_of_search']['rate']:.3f}",
                    median(s[subset][c]["steps"]),
                    median(s[subset][c]["min_eps"]),
                    s[subset][c]["min_eps"]["censored"],
                ]
                for subset, c in cases
                for name, s in summary.items()
            ],
        )
    )
    print_over_seeds(
        record,
        {
            f"{subset.replace('_', ' ')}, {c}: {what}": lambda name, s=subset, c=c, k=keys: summary[
                name
            ][s][c][k[0]][k[1]]
            for subset, c in cases
            for what, keys in (
                ("fooled at eps", ("success", "rate")),
                ("median min-ε", ("min_eps", "median")),
            )
        },
    )
    if record["compared"]:
        print(
            "Differences of the same seed and image, with bootstrap 95 % intervals over seeds and images:\n"
        )
        print(
            markdown(
                [
                    "images",
                    "criterion",
                    "compared",
                    "n",
                    "median change of min-ε",
                    "share needing less",
                    "change of success at eps",
                ],
                [
                    [
                        subset.replace("_", " "),
                        c,
                        f"{p['other']} minus {p['reference']}",
                        p[subset][c]["n"],
                        change(p[subset][c]["min_eps"]),
                        change(p[subset][c]["needs_less"]).replace("+", ""),
                        change(p[subset][c]["success"]),
                    ]
                    for p in record["compared"]
                    for subset, c in cases
                ],
            )
        )
    print(
        "Median ratio of min-ε when the search takes four times the steps (50 images): "
        + "; ".join(
            f"{name} " + ", ".join(f"{c} {m[c]['four_times_the_steps']:.3f}" for c in CRITERIA)
            for name, m in record["models"].items()
        )
        + ".\n"
    )
    pictures = args.dir / f"attack_{a['src']}to{a['tgt']}.pt"
    if pictures.exists():
        draw_examples(record, load_pt(pictures, "delete it"), path("examples"))
    draw_sweep(record, path("sweep"))
    draw_min_eps(record, path("min_eps"))
    if path("examples").exists():
        show(
            path("examples"),
            f"Some {a['src']}s (first those that both models read correctly and fell for), what was added (ten times enlarged), and what they then say",
            args,
        )
    show(
        path("sweep"),
        "Success by eps, first two methods; band: 95 % Wilson interval of the pooled images. What to see: the curve further to the left belongs to the net that is easier to fool",
        args,
    )
    show(
        path("min_eps"),
        "Smallest radius per image, and its difference on the same image, first two methods. What to see: on which side of zero most images lie",
        args,
    )


def report_pairs(record, args):
    a, path = record["args"], args.dir / "figures" / "attack_pairs.png"
    print(
        f"### All pairs of digits\n\nImages that every model reads correctly, {min(record['n_per_digit'])} to {max(record['n_per_digit'])} per digit; "
        f"eps {a['eps']:g}, {a['steps']} decaying steps. Success rate over all pairs:\n"
    )
    print(
        markdown(
            ["model", *CRITERIA],
            [
                [name, *(between(m[f"{c}_mean"]) for c in CRITERIA)]
                for name, m in record["models"].items()
            ],
        )
    )
    print_over_seeds(
        record, {c: lambda name, c=c: record["models"][name][f"{c}_mean"]["rate"] for c in CRITERIA}
    )
    draw_pairs(record, path)
    show(
        path,
        f"Success rate at eps {a['eps']:g} by digit shown and digit wanted. What to see: whether 7 to 3 stands for all pairs",
        args,
    )


def report_untargeted(record, args):
    a, name = record["args"], record["args"].get("name", "untargeted")
    path = lambda what: (
        args.dir / "figures" / f"attack_{'' if name == 'untargeted' else name + '_'}{what}.png"
    )
    said = (f"in {args.dir.relative_to(args.root)}, " if args.dir != args.root else "") + (
        f"{name}, " if name != "untargeted" else ""
    )
    published = PUBLISHED.get(a["eps"], {}) if is_plain_mnist(args.dir) else {}
    print(
        f"### Any wrong answer, {said}eps {a['eps']:g}\n\nAccuracy on {a['split']}, n = {record['n']:,}: eps {a['eps']:g}, {a['steps']} steps falling from eps / 4 to "
        f"eps / 40. Each attack's accuracy is that of one run on every image; Square ({record['queries']:,} queries) ran on a fixed {record['sample']:,}. Robust: right "
        f"under every attack, with {a['restarts']} random start{'s' * (a['restarts'] > 1)} of both PGDs."
        + (
            " Published: as reported; the last column is AutoAttack (Croce & Hein, 2020), 10,000 images."
            if published
            else ""
        )
        + "\n"
    )
    coloured = any(m.get("follows_colour") is not None for m in record["models"].values())
    print(
        markdown(
            [
                "model",
                "clean",
                *(["follows colour"] if coloured else []),
                *ATTACKS,
                "robust (95 %)",
            ],
            [
                *(
                    [
                        name,
                        f"{m['attacks']['clean']['rate']:.4f}",
                        *([fmt(m.get("follows_colour"))] if coloured else []),
                        *(f"{m['attacks'][k]['own']['rate']:.4f}" for k in ATTACKS),
                        between(m["robust"]),
                    ]
                    for name, m in record["models"].items()
                ),
                *(
                    [
                        name,
                        *(
                            f"{row[k]:.4f}" if k in row else "-"
                            for k in ("clean", *ATTACKS, "robust")
                        ),
                    ]
                    for name, row in published.items()
                ),
            ],
        )
    )
    print_over_seeds(
        record,
        {
            "clean": lambda name: record["models"][name]["attacks"]["clean"]["rate"],
            "robust": lambda name: record["models"][name]["robust"]["rate"],
        },
    )
    draw_robust_curve(record, path("robust_curve"))
    show(
        path("robust_curve"),
        "Accuracy under PGD on cross-entropy and on the margin, by eps. What to see: at the largest radius nothing should be left; an attack that stays high fails silently",
        args,
    )
    draw_transfer(record, path("transfer"))
    show(
        path("transfer"),
        "Accuracy of the model below on images made on the model at the left. What to see: the diagonal should be lowest; where it is not, a net's own gradients mislead",
        args,
    )


def is_plain_mnist(folder):
    world = meta_of(folder)
    return world.get("recipe") == "gray" and bool(world.get("is_mnist"))


def report_check(record, args):
    print(
        f"### Can the attacks be trusted?\n\nAccuracies on {record['n']:,} images of {record['args']['split']}, after the list of Carlini et al. (2019):\n"
    )
    print(
        markdown(
            ["claim", "model", "", "numbers"],
            [
                [c["claim"], name, "PASS" if c["pass"] else "FAIL", listed(c["numbers"])]
                for name, m in record["models"].items()
                for c in m["checks"]
            ],
        )
    )


RUNS = {"targeted": targeted, "pairs": pairs, "untargeted": untargeted, "check": check}
REPORTS = {
    "targeted": report_targeted,
    "pairs": report_pairs,
    "untargeted": report_untargeted,
    "check": report_check,
}


def chapter_of(record, args):
    """The chapter of the write-up that an attack belongs to: --name says it, else the world."""
    name = record["args"].get("name")
    return (
        "Rob-GAN"
        if name == "robgan"
        else "Robust training"
        if name == "at" or is_plain_mnist(args.dir)
        else "Is the cured model safer?"
    )


def report(args):
    inside = [
        path.parent for path in sorted(args.dir.glob("*/meta.json")) if is_plain_mnist(path.parent)
    ]
    chapter = None
    for folder in (args.dir, *inside):
        records = [
            load_json(path, "delete it and run attack.py again", "mode", "args", "models")
            for path in sorted(folder.glob("attack_*.json"))
        ]
        if unknown := [record["mode"] for record in records if record["mode"] not in REPORTS]:
            die(
                f"an attack_*.json in {folder} has the mode {unknown[0]!r}",
                "delete it and run attack.py again",
            )
        for record in sorted(records, key=lambda r: list(MODES).index(r["mode"])):
            with_keys(
                record["args"],
                ("models", "split", "seed"),
                f"args of an attack_*.json in {folder}",
                "delete it and run attack.py again",
            )
            for key in {"models", "summary"} & record.keys():
                record[key] = {
                    name: record[key][name] for name in record["args"]["models"]
                }  # the file has them by alphabet
            where = argparse.Namespace(**{**vars(args), "dir": folder})
            if (new := chapter_of(record, where)) != chapter:
                print(f"## {(chapter := new)}\n")
            REPORTS[record["mode"]](record, where)
    if chapter is None:
        die(f"{args.dir} holds no results of attack.py", f"run: python attack.py --dir {args.dir}")


# ---------------------------------------------------------------- the command


def get_args(argv=None):
    p = Parser(__doc__)
    g = p.add_argument_group(
        "what to do (default: the targeted attack)"
    ).add_mutually_exclusive_group()
    g.add_argument(
        "--pairs",
        dest="mode",
        action="store_const",
        const="pairs",
        help="every digit to every other, as heat maps",
    )
    g.add_argument(
        "--untargeted",
        dest="mode",
        action="store_const",
        const="untargeted",
        help="robust accuracy under several attacks, and transfer",
    )
    g.add_argument(
        "--check",
        dest="mode",
        action="store_const",
        const="check",
        help="can the attacks be trusted? exit code 1 if not",
    )
    g = p.add_argument_group("attack (where two defaults are given: targeted, then the rest)")
    g.add_argument("--src", type=whole(0), help="targeted: digit to start from (default: 7)")
    g.add_argument("--tgt", type=whole(0), help="targeted: digit to reach (default: 3)")
    g.add_argument("--eps", type=real(0, 1), help="L-inf radius, pixels in [0, 1] (default: 0.05)")
    g.add_argument(
        "--steps",
        type=whole(1, 100_000),
        help="gradient steps at most (default: 1000; --pairs 100, others 50)",
    )
    g.add_argument(
        "--restarts",
        type=whole(1, 1000),
        help="targeted, --untargeted: random starts (default: 1; --untargeted 3)",
    )
    g.add_argument(
        "--queries",
        type=whole(1, 100_000),
        help=f"--untargeted: of the Square attack, an image; few flatter a model whose gradients mislead (default: {QUERIES})",
    )
    g.add_argument(
        "--decay",
        action="store_const",
        const=True,
        help="targeted: let the step size fall to a tenth (the other modes always do)",
    )
    g.add_argument(
        "--sweep",
        type=real(0, 1, open_low=True),
        nargs="+",
        metavar="EPS",
        help="targeted, --untargeted: radii of the curve; the last one also bounds min-eps",
    )
    g = p.add_argument_group("on what")
    g.add_argument(
        "--models",
        type=model_name,
        nargs="+",
        default=["baseline_s42", "jitter_s42"],
        metavar="NAME",
        help="DIR/NAME.pt (default: baseline_s42 jitter_s42)",
    )
    g.add_argument("--split", choices=SPLITS, default="test_hard", help="default: test_hard")
    g.add_argument(
        "--name", help="--untargeted: results go to DIR/attack_NAME.json (default: untargeted)"
    )
    g.add_argument(
        "--n",
        type=whole(1),
        help="images at most: of digit src, per digit (--pairs, default 50), of the split (--check, default 500)",
    )
    common_args(p, seed_of="random starts, samples and the bootstrap")
    args = p.parse_args(argv)
    if args.report and args.mode:
        die(f"--report reads what is there, so --{args.mode} does nothing", "give one of the two")
    args.mode = args.mode or "targeted"
    for flag in (
        "src",
        "tgt",
        "eps",
        "steps",
        "restarts",
        "decay",
        "sweep",
        "n",
        "name",
        "queries",
    ):
        if flag not in MODES[args.mode] and getattr(args, flag) is not None:
            die(f"--{flag} has no meaning with --{args.mode}", "leave it out")
        if getattr(args, flag) is None:
            setattr(args, flag, MODES[args.mode].get(flag))
    if args.mode == "targeted" and args.src == args.tgt:
        die(f"--src and --tgt are both {args.src}", "choose two digits")
    if len({family_of(name) for name in args.models}) < len(args.models):
        die(
            "--models names two that would share one row",
            "name each once, or save one of them under another --name",
        )
    if args.name is not None and (
        not re.fullmatch(r"[A-Za-z]\w{0,60}", args.name, re.ASCII)
        or args.name.lower() in ("pairs", "check")
    ):
        die(
            f"--name {args.name!r} must be letters, digits and _, and none of pairs and check",
            "choose another name",
        )
    args.root = args.dir  # where the paths of the write-up begin
    args.sweep = args.sweep and sorted(set(args.sweep))
    if args.mode == "targeted" and args.eps > args.sweep[-1]:
        die(
            f"--eps {args.eps:g} is beyond the last radius of --sweep, {args.sweep[-1]:g}",
            f"add {args.eps:g} to --sweep",
        )
    return args


class Loaded(NamedTuple):
    net: nn.Module
    about: dict  # method: what the seeds of one method share, NAME without _sSEED; seed
    classes: int


def load(args, device):
    """({name: Loaded}, the split); every model fits the split."""
    split = load_splits(args.dir, [args.split], device)[args.split]
    size, top, models = tuple(split.images.shape[2:]), int(split.labels.max()), {}
    for name in args.models:
        net, record = load_model(args.dir, name, device)
        classes = record["classes"]
        if size != tuple(record["size"]) or top >= classes:
            die(
                f"{args.dir}/{name}.pt is built for {classes} classes and {tuple(record['size'])} pixels, but {args.split}.pt has labels up to {top} and "
                f"{size} pixels",
                "choose a model that was trained on this world",
            )
        for flag, digit in (("--src", args.src), ("--tgt", args.tgt)):
            if digit is not None and digit >= classes:
                die(
                    f"{flag} is {digit}, but the classes of {name} end at {classes - 1}",
                    "choose one of them",
                )
        method, seed = family_of(name)
        models[name] = Loaded(
            net,
            {"method": method, "seed": record["args"]["seed"] if seed is None else seed},
            classes,
        )
    return models, split


def main(argv=None):
    args = get_args(argv)
    if args.report:
        return report(args)
    device = setup(args)
    path = (
        args.dir
        / f"attack_{f'{args.src}to{args.tgt}' if args.mode == 'targeted' else args.name or args.mode}.json"
    )
    with alone(path):
        passed = run_mode(args, device, path)
    if not passed:
        sys.exit(1)


def run_mode(args, device, path):
    """Carry out one mode and write it down; False where --check finds that an attack cannot be trusted."""
    models, split = load(args, device)
    settings = {
        "models": args.models,
        "split": args.split,
        "seed": args.seed,
        **{flag: getattr(args, flag) for flag in MODES[args.mode]},
    }
    print(
        " ".join(
            f"{k}={v}"
            for k, v in {"mode": args.mode, "dir": args.dir, **settings, "device": device}.items()
        ),
        flush=True,
    )
    start = time.time()
    record, seconds = RUNS[args.mode](models, split, args)
    facts = {
        "seconds": round(time.time() - start, 1),
        "by_step": seconds,
        "torch": torch.__version__,
        "threads": args.threads,
        "device": str(device),
    }
    record = {
        "schema": 1,
        "script": "attack.py",
        "mode": args.mode,
        "args": settings,
        **record,
        "run": facts,
    }
    save_json(record, path)
    REPORTS[args.mode](record, args)
    print(f"wrote {path} and its figures in {time.time() - start:.1f}s")
    return record.get("passed", True)


if __name__ == "__main__":
    run(main)
