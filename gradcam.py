"""Show where a model looks, measure it, and ask by repainting what the model really uses.

Reads   DIR/test_hard.pt, meta.json (from make_data.py), DIR/NAME.pt (from train.py)
Writes  DIR/gradcam.json, DIR/gradcam.pt (maps that the figures show), DIR/figures/gradcam_*.png;
        names say which settings differ from the defaults: gradcam_hirescam.json

    python gradcam.py                                       # the lazy model and the cured one
    python gradcam.py --cam hirescam
    python gradcam.py --models jitter_s42 jitter_s43 --name two
    python gradcam.py --maximise                            # what each answer wants to see
    python gradcam.py --decompose                           # what the features know beside that
    python gradcam.py --page                                # demo.js, which demo.html reads
    python gradcam.py --image my_digit.png                  # your own digit on ten colours
    python gradcam.py --report                              # figures again, from the files

A heat map is a suggestion: it can miss a shortcut or show one that is not there (Adebayo et al.,
2022). So each map is held against the area it could hit by chance, against nets with random
weights, and against flip rates: how often the prediction changes when nothing but the background
changes, and how often when nothing but the digit does.
"""

import argparse
import base64
import copy
import hashlib
import itertools
import json
import math
import re
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from common import (
    PAINTERS,
    PALETTE,
    SPLITS,
    SimpleCNN,
    Split,
    answers_and_features,
    build_model,
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
    name_of,
    note_time,
    paint,
    pictures,
    predict,
    progress,
    rate,
    rgb,
    row_of,
    run,
    save_figure,
    save_json,
    save_pt,
    setup,
    stream,
    write,
)

DIGIT_PIXEL = 0.1  # brighter than this before painting, a pixel is digit
BATCH = 500  # images; small enough for a ResNet-50, large enough for the tiny net
FEW = 10  # pictures: fewer that follow the digit, or the colour, are not told apart
SANITY_IMAGES, SANITY_DRAWS = 1000, 5  # the cascade: images of the split, sets of random weights
ROWS = 2  # models in the figures of heat maps
STARTS = 3  # pictures that --maximise finds for each class
LATENTS, ACTIVE = 512, 16  # of a sparse autoencoder: in all, and of one picture
DICTIONARIES, DRAWS = 3, 5  # autoencoders a model; draws of whatever is random beside it
SAYS = 0.3  # η² from which a latent says colour, or digit
TAKEN = (0, 5, 10, 20, 40, 80)  # latents that are silenced at once
CURVES = {
    "colour": ("colour latents silenced", "#D55E00"),
    "digit": ("digit latents silenced", "#0072B2"),
    "others": ("others silenced that vary as much, or all", "#777777"),
    "turned_up": ("colour latents turned up twofold", "#E69F00"),
}
TITLES = {"gradcam": "Grad-CAM", "hirescam": "HiResCAM"}  # kinds of heat map


def get_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    meant = {}  # flag: what it means something for

    def add(group, flag, *of, **how):
        meant[group.add_argument(flag, **how).dest] = of

    g = p.add_argument_group("on what")
    usual = ["baseline_s42", "jitter_s42"]
    helps = f"or a .pt ({' '.join(usual)})"
    g.add_argument("--models", nargs="+", default=usual, metavar="NAME", help=helps)
    helps = "of the result: gradcam_NAME (default: what differs from the defaults)"
    add(g, "--name", "heat maps", "--maximise", "--decompose", help=helps)
    add(g, "--cam", "heat maps", choices=TITLES, default="gradcam", help="kind of map (gradcam)")
    g = p.add_argument_group("instead of heat maps").add_mutually_exclusive_group()
    mode = {"dest": "mode", "action": "store_const"}
    helps = "find the pictures that each class wants to see"
    g.add_argument("--maximise", const="--maximise", **mode, help=helps)
    helps = "erase colour from the features, and silence what says it in a sparse autoencoder"
    g.add_argument("--decompose", const="--decompose", **mode, help=helps)
    helps = "find the digit in pictures of your own, show it on ten colours"
    g.add_argument("--image", nargs="+", type=Path, metavar="FILE", help=helps)
    helps = "write DIR/demo.js: the networks that DIR/demo.html names, for the page"
    g.add_argument("--page", const="--page", **mode, help=helps)
    helps = "show the picture as it is, with heat maps, not on ten colours"
    add(p, "--raw", "--image", action="store_true", help=helps)
    helps = "a model that reads the pictures found, say one trained where there is no bias"
    add(p, "--reader", "--maximise", metavar="NAME", help=helps)
    common_args(p, seed_of="textures, digit partners and the null rows")
    p.set_defaults(mode="heat maps")
    args = p.parse_args(argv)
    if args.image:
        args.mode = "--image"
    for flag, of in meant.items():
        if args.mode not in of and getattr(args, flag) != p.get_default(flag):
            die(f"--{flag} means nothing for {args.mode}", "leave it out")
    if len({Path(name).name.removesuffix(".pt") for name in args.models}) < len(args.models):
        what = f"--models {' '.join(args.models)}: two would share one row"
        die(what, "save one under another --name")
    if args.reader in args.models:
        die(f"{args.reader} would read its own pictures", "choose another --reader")
    if args.name and not re.fullmatch(r"(?!hirescam|maximise|decompose)\w{1,60}", args.name, re.A):
        what = f"--name {args.name!r} must be letters, digits and _, and no kind of map"
        die(what, "choose another name")
    return args


def result_name(args):
    """gradcam, gradcam_hirescam_s3, gradcam_NAME_hirescam, gradcam_maximise, ..."""
    head = "gradcam" if args.mode == "heat maps" else f"gradcam_{args.mode[2:]}"
    skip = {"models", "name", "mode", "image", "raw", "reader"}
    if args.name:
        head = f"{head}_{args.name}"
        skip = vars(args).keys() - {"cam"}
    return name_of(head, args, get_args([]), skip)


# ---- heat maps


class Explained(NamedTuple):
    activation: torch.Tensor  # float (B,C,h,w)
    gradient: torch.Tensor  # float (B,C,h,w): of each image's explained logit
    logits: torch.Tensor  # float (B,classes)


def explain(model, layer, x, target=None):
    """Activation of `layer` and the gradient of one logit per image with respect to it.

    x float (B,3,H,W) in [0, 1]; `target` (B,), None explains the predicted class. In eval mode
    images do not mix, so the gradient of the sum holds every image's own.
    """
    seen = {}

    def keep(_, inputs, output):
        seen["map"] = output.detach().requires_grad_()  # a leaf, where gradients end
        return seen["map"]

    with layer.register_forward_hook(keep), torch.enable_grad():
        logits = model(x)
    target = logits.argmax(1) if target is None else target
    (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), seen["map"])
    return Explained(seen["map"].detach(), gradient, logits.detach())


def gradcam(activation, gradient):
    """Channels weighted by their mean gradient (Selvaraju et al., 2017).

    (B,C,h,w) twice to (B,h,w), before the ReLU; so does the other. They differ where the head
    is flattened, as SimpleCNN's: before a pooled one the gradient is the same at every place.
    """
    return (gradient.mean((2, 3), keepdim=True) * activation).sum(1)


def hirescam(activation, gradient):
    """Every position weighted by its own gradient (Draelos & Carin, 2020).

    Before a linear head the map sums to logit minus bias.
    """
    return (gradient * activation).sum(1)


CAMS = {"gradcam": gradcam, "hirescam": hirescam}


class Subject(NamedTuple):
    """A model and how its maps are made."""

    model: torch.nn.Module
    checkpoint: dict  # as train.py saved it
    layer: str  # name of the target layer
    size: tuple  # (h, w) of its map
    cam: str = "gradcam"


def find_layer(model, split, owner):
    """(name, (h, w)) of the deepest layer whose map is at least 4 pixels wide.

    That is SimpleCNN's last ReLU; in a ResNet 28x28 pixels end as a single one.
    """
    deepest = ["relu"] if isinstance(model, SimpleCNN) else ["layer4", "layer3", "layer2", "layer1"]
    for name in deepest:
        if hasattr(model, name):
            one = explain(model, getattr(model, name), split.x(slice(1)))
            size = tuple(one.activation.shape[2:])
            if max(size) >= 4:
                return name, size
    die(f"{owner} has no map 4 pixels wide", "choose a convolutional net")


class Heat(NamedTuple):
    maps: torch.Tensor  # float (N,h,w), rectified
    predicted: torch.Tensor  # int64 (N,)
    confidence: torch.Tensor  # float (N,): its probability


def heat_of(subject, split, explained=None):
    """Heat maps of a split on the CPU; `explained` (N,) are classes, else those predicted."""
    layer = subject.model.get_submodule(subject.layer)
    parts = []
    for index in chunks(len(split.labels), BATCH):
        target = None if explained is None else explained[index].to(split.images.device)
        e = explain(subject.model, layer, split.x(index), target)
        confidence, predicted = e.logits.softmax(1).max(1)
        maps = CAMS[subject.cam](e.activation, e.gradient).relu()
        parts.append(Heat(maps, predicted, confidence))
    return Heat(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def upsample(maps, size):
    """(N,h,w) to (N,H,W), bilinear."""
    return F.interpolate(maps[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]


# ---- how much of the heat is on the digit


class Scores(NamedTuple):
    """One number per image, double (N,); NaN where the map is all zero or there is no digit."""

    lift: torch.Tensor  # share of the heat on digit pixels over their share of the picture
    pointing: torch.Tensor  # is the hottest pixel on the digit; equally hot ones count in parts


def heat_scores(maps, gray):
    """The energy-based pointing game (Wang et al., 2020) and the first one (Zhang et al., 2018).

    maps float (N,h,w), rectified; gray uint8 (N,H,W). No tolerance around the hottest pixel.
    """
    parts = []
    for index in chunks(len(maps), BATCH):
        heat = upsample(maps[index], gray.shape[1:]).double()
        digit = gray[index] > 255 * DIGIT_PIXEL
        total, area = heat.sum((1, 2)), digit.double().mean((1, 2))
        hottest = (heat == heat.amax((1, 2), keepdim=True)).double()
        lift = (heat * digit).sum((1, 2)) / total / area
        pointing = (hottest * digit).sum((1, 2)) / hottest.sum((1, 2))
        per_image = torch.stack([lift, pointing])
        per_image[:, (total == 0) | (area == 0)] = torch.nan
        parts.append(per_image)
    return Scores(*torch.cat(parts, dim=1))


def summary(scores):
    """Means over the images; those without a score are counted, not averaged.

    `lift_with_empty` averages them, too, as lift 0: no heat lies on the digit.
    """
    scored = ~scores.lift.isnan()
    return {
        "n": len(scored),
        "zero_maps": int((~scored).sum()),
        "lift": mean(scores.lift[scored]),
        "lift_with_empty": mean(scores.lift.nan_to_num()),
        "pointing": rate(scores.pointing[scored]),
    }


def mean(values):
    """The mean as a float; None of nothing."""
    return values.cpu().double().mean().item() if len(values) else None


def ranks(values):
    """Ranks along the last dimension, from 0.5; equal values share their average rank."""
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values)
    return (below + torch.searchsorted(ordered, values, right=True)).double() / 2


def spearman(a, b):
    """Rank correlation along the last dimension (Spearman, 1904); NaN where a side is constant."""
    a, b = (r - r.mean(-1, keepdim=True) for r in (ranks(a), ranks(b)))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


def auc(high, low):
    """How often one of `high` (N,) exceeds one of `low` (M,), ties half (Mann & Whitney, 1947).

    None where a side has fewer than FEW.
    """
    n, m = len(high), len(low)
    if min(n, m) < FEW:
        return None
    return (mean(ranks(torch.cat([high, low]))[:n]) - n / 2) / m


def told_apart(lift, random, predicted, labels, colours):
    """Does a picture's map tell whether its answer follows the digit, or the background's colour?

    Judged by lift, all (N,), of the map and of a random one. Not by share: thick digits withstand
    a colour more often, and every map has more heat on them. An empty map has lift 0.
    """
    foreign = labels != colours
    digit, colour = (foreign & (predicted == follows) for follows in (labels, colours))
    lift, random = lift.nan_to_num(), random.nan_to_num()
    return {
        "followed_digit": int(digit.sum()),
        "followed_colour": int(colour.sum()),
        "auc": auc(lift[digit], lift[colour]),
        "auc_random": auc(random[digit], random[colour]),
    }


# ---- what the model really uses: repaint and ask again


class Painting(NamedTuple):
    """How a world is painted."""

    recipe: str
    sigma2: float
    names: list  # of the palette's colours
    means: torch.Tensor  # float (colours,3) in [0, 1]


USUAL = Painting("background", 0.0, list(PALETTE), rgb(PALETTE))


def meta_of(folder):
    """What meta.json says of a world; {} without one."""
    path = folder / "meta.json"
    return load_json(path, "mend it or take it away") if path.exists() else {}


def painting_of(folder):
    """The Painting that meta.json describes; None where it does not, or not well."""
    meta = meta_of(folder)
    if meta.get("recipe") not in PAINTERS:
        return None
    try:
        names, means = zip(*meta["palette"], strict=True)
        means = torch.tensor(means).reshape(len(names), 3) / 255
        sigma2 = float(meta.get("sigma2") or 0)
    except (KeyError, TypeError, ValueError, RuntimeError):
        return None
    if sigma2 < 0 or means.min() < 0 or means.max() > 1:
        return None
    return Painting(meta["recipe"], sigma2, [str(name) for name in names], means)


def obstacle_to(painting, split, folder):
    """Why nothing can be repainted, in one line; None where it can."""
    if split.colors is None:
        return "the split has no colors, (N,): the class that owns each picture's colour"
    last = max(int(split.colors.max()), int(split.labels.max()))
    if painting is None or last >= len(painting.names):
        recipes = ", ".join(f'"{recipe}"' for recipe in PAINTERS)
        colours = f'[["red", [255, 0, 0]], ...], the colours of classes 0 to {last}'
        return f'{folder}/meta.json must hold "recipe": one of {recipes}, and "palette": {colours}'


def class_names(folder):
    """What meta.json calls the classes, else their numbers."""
    names = meta_of(folder).get("classes", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        hint = 'as in "classes": ["shirt", "trouser"]'
        die(f"{folder}/meta.json: classes must be a list of names", hint)
    return [*names, *(str(k) for k in range(len(names), 1000))]


def repaint(split, colours, painting, seed):
    """The same digits on other colours; one texture per place in the split, on every colour."""
    mean = painting.means[colours.cpu()]
    gen = stream(seed, "texture")
    images = paint(split.gray.cpu(), mean, gen, painting.recipe, painting.sigma2)
    images = images.to(split.images.device, memory_format=torch.channels_last)
    return split._replace(images=images, colors=colours)


def counterfactuals(models, split, painting, seed):
    """({name: (on_colour (N,10), swapped (N,))}, partner (N,)): predictions after repainting.

    Every digit on every colour, and its partner's digit on its own background. Each painting is
    made once and shown to all models.
    """
    on_colour = {name: [] for name in models}
    for c, colour in enumerate(painting.names):
        progress(f"every digit on {colour}, colour {c + 1} of {len(painting.names)}")
        every = repaint(split, torch.full_like(split.labels, c), painting, seed)
        for name, model in models.items():
            on_colour[name].append(predict(model, every.images).argmax(1).cpu())
    progress("another digit on every background")
    partner = torch.randperm(len(split.labels), generator=stream(seed, "partner"))
    swapped = repaint(split._replace(gray=split.gray[partner]), split.colors, painting, seed)
    answers = {}
    for name, model in models.items():
        on_partner = predict(model, swapped.images).argmax(1).cpu()
        answers[name] = torch.stack(on_colour[name], dim=1), on_partner
    return answers, partner


def flip_rates(on_colour, swapped, partner, labels, colours):
    """How often another background changes the prediction, and how often another digit does.

    Background: the other nine colours under the same digit. Digit: the partner's digit on the same
    background, where its label differs.
    """
    now = on_colour.gather(1, colours[:, None])  # (N,1)
    others = on_colour.shape[1] - 1  # on its own colour a prediction is `now`
    changed = (on_colour != now).sum(1) / others
    differs = labels[partner] != labels
    by_digit = {str(d): mean(changed[labels == d]) for d in labels.unique().tolist()}
    digit = {"changed": rate((swapped != now[:, 0])[differs])}
    return {"background": {"changed": rate(changed), "by_digit": by_digit}, "digit": digit}


def measure(subjects, split, painting, seed):
    """{name: JSON record}: heat maps, and flip rates where `painting` says how to repaint."""
    models, labels, gray = {}, split.labels.cpu(), split.gray.cpu()
    if painting:
        colours = split.colors.cpu()
        nets = {name: subject.model for name, subject in subjects.items()}
        answers, partner = counterfactuals(nets, split, painting, seed)
    for k, (name, subject) in enumerate(subjects.items(), 1):
        progress(f"heat maps of {name}, model {k} of {len(subjects)}")
        heat = heat_of(subject, split)
        scores, flips = heat_scores(heat.maps, gray), None
        maps = summary(scores)
        if painting:
            flips = flip_rates(*answers[name], partner, labels, colours)
            random = heat_scores(random_maps(subject, len(gray), seed), gray)
            maps |= told_apart(scores.lift, random.lift, heat.predicted, labels, colours)
        models[name] = {
            "trained": subject.checkpoint.get("trained", True),
            "acc": rate(heat.predicted == labels),
            "maps": {"test_hard": maps},
            "flips": flips,
        }
    return models


# ---- null rows: what a map scores that knows nothing


def random_maps(subject, n, seed):
    """Noise (n,h,w) in place of a subject's maps."""
    return torch.rand(n, *subject.size, generator=stream(seed, "random maps"))


def null_rows(subject, split, seed):
    """Scores of noise, of the digit itself, and of nets with random weights.

    The ceiling is the digit's mask as coarse as the subject's maps. A smaller spot within the digit
    scores more, but no longer shows the digit.
    """
    gray = split.gray.cpu()
    mask = (gray > 255 * DIGIT_PIXEL).float()
    maps = {
        "random_map": random_maps(subject, len(gray), seed),
        "ceiling": F.adaptive_avg_pool2d(mask, subject.size),
    }
    null = {}
    for row, heat in maps.items():
        null[row] = {"maps": {"test_hard": summary(heat_scores(heat, gray))}}  # as of a model
    progress("null rows: random weights")
    part = split.take(slice(SANITY_IMAGES))
    return {**null, "cascade": cascade(subject, part, seed)}


def cascade(subject, split, seed):
    """Cascading randomisation (Adebayo et al., 2018): fresh weights from the output down.

    {"fc": {...}, "fc+conv3": {...}, ...}. The explained class stays the real model's prediction.
    Rank correlation of the rectified maps, mean over images; `without` counts those where a map is
    constant. One number per draw.
    """
    real = heat_of(subject, split)
    layers = [n for n, child in subject.model.named_children() if list(child.parameters())][::-1]
    steps = {
        "+".join(layers[: k + 1]): {"rank_correlation": [], "lift": [], "without": 0}
        for k in range(len(layers))
    }
    for draw in range(SANITY_DRAWS):
        fresh = random_net(subject.checkpoint, stream(seed, f"random weights {draw}"))
        fresh.to(split.images.device)
        hybrid = subject._replace(model=copy.deepcopy(subject.model))
        for layer, step in zip(layers, steps.values(), strict=True):
            setattr(hybrid.model, layer, getattr(fresh, layer))
            maps = heat_of(hybrid, split, real.predicted).maps
            correlation = spearman(real.maps.flatten(1), maps.flatten(1))
            step["rank_correlation"].append(mean(correlation[~correlation.isnan()]))
            step["lift"].append(summary(heat_scores(maps, split.gray.cpu()))["lift"])
            step["without"] += int(correlation.isnan().sum())
    return steps


def random_net(checkpoint, gen):
    """A net like the checkpoint's, in eval mode, whose weights know nothing."""
    kind = checkpoint["args"]
    torch.manual_seed(gen.initial_seed())
    shape = checkpoint["classes"], checkpoint["size"]
    return build_model(kind["model"], kind["width"], *shape, kind.get("grayscale", False)).eval()


# ---- the pictures that the figures show


def on_every_colour(one, painting, seed):
    """A Split of one picture on every colour, all with one texture."""
    colours = torch.arange(len(painting.names), device=one.labels.device)
    images = torch.cat([repaint(one, c[None], painting, seed).images for c in colours])
    return one.take([0] * len(colours))._replace(images=images, colors=colours)


def rows_of(names):
    """{row: its names}, in their order."""
    rows = {}
    for name in names:
        rows.setdefault(row_of(name), []).append(name)
    return rows


def firsts_of(names):
    """The first name of each row."""
    return [row[0] for row in rows_of(names).values()]


def typical(by_digit):
    """The digit with the median of the background flip rates, of two the lower: none is picked."""
    return int(sorted(by_digit, key=by_digit.get)[(len(by_digit) - 1) // 2])


def scene_of(subjects, split, painting, classes, seed, flips):
    """{title: cells} of `pictures`: ten pictures, and below them the maps of a model a row.

    The first picture of the digit that is typical by `flips` on every colour, or the first ten
    where nothing can be repainted. Models are the first of each of the first two rows, a title
    counts the colours that fooled it. Under a map: ✓ or a bold ✗, the predicted class and its
    probability. `classes`: their names.
    """
    few = {name: subjects[name] for name in firsts_of(list(subjects))[:ROWS]}
    kind = TITLES[next(iter(few.values())).cam]
    if painting is None:
        title, shown = f"{kind}: the first pictures", split.take(slice(10))
        below = [classes[label] for label in shown.labels]
        foreign = torch.ones(len(below), dtype=torch.bool)
    else:
        digit = typical(flips["background"]["by_digit"])
        called = classes[digit]
        one = split.take([split.labels.tolist().index(digit)])
        title = f"{kind}: the first {called} of test_hard (of median flip rate) on ten colours"
        shown = on_every_colour(one, painting, seed)
        below = [f"{called} on {colour}" for colour in painting.names]
        foreign = shown.colors.cpu() != digit
    images, gray, labels = shown.images.cpu(), shown.gray.cpu(), shown.labels.cpu()
    scene = {title: [(image, text, {}) for image, text in zip(images, below, strict=True)]}
    for name, subject in few.items():
        heat = heat_of(subject, shown)
        wrong, cells = heat.predicted != labels, []
        for i, enlarged in enumerate(upsample(heat.maps, gray.shape[1:])):
            mark, weight = ("✗", "bold") if wrong[i] else ("✓", "normal")
            said = f"{mark} {classes[heat.predicted[i]]} ({heat.confidence[i]:.2f})"
            cells.append((enlarged, said, {"outline": gray[i], "weight": weight}))
        fooled = int((wrong & foreign).sum())
        scene[f"{name}: fooled on {fooled} of {int(foreign.sum())}"] = cells
    return scene


# ---- figures


def draw_lift_flip(record):
    """A point per model: how often a new background changes its answer, and its maps' lift."""
    rows = rows_of(record["args"]["models"])
    fig, axes = figure(7.2, max(4.4, 0.22 * len(rows) + 0.4))  # the legend has a line a row
    ax = axes[0, 0]
    for (row, names), marker in zip(rows.items(), itertools.cycle("osD^vPX*<>hp")):
        models = [record["models"][name] for name in names]
        flips = [m["flips"]["background"]["changed"]["rate"] for m in models]
        lifts = [m["maps"]["test_hard"]["lift"] for m in models]
        lifts = [math.nan if lift is None else lift for lift in lifts]
        look = {"s": 50, "marker": marker, "edgecolor": "white", "zorder": 3}
        ax.scatter(flips, lifts, color=ink(row), label=textwrap.fill(row, 24), **look)
    ax.axhline(1, color="black", lw=1, ls="--")
    ax.annotate("uniform map", (1, 1), (-4, 4), textcoords="offset points", fontsize=9, ha="right")
    ax.set_xlabel("background flip rate:\nnew backgrounds that change the prediction")
    ax.set_ylabel(f"lift ({TITLES[record['args']['cam']]}): heat on the digit / its area")
    ax.set_title("What the maps show,\nwhat the model does (test_hard)")
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.05, 1.1 * max(1.5, ax.get_ylim()[1])))
    ax.grid(alpha=0.3)
    fig.legend(fontsize=9, loc="outside right upper")
    return fig


def draw(path):
    """The figures of one record, named after its file; returns their paths."""
    record, beside = load_json(path, "delete it"), path.with_suffix(".pt")
    shown = load_pt(beside, "delete it") if beside.exists() else {}
    figures = {}
    decomposed = "latents" in record["args"]
    kind = "_latents" if decomposed else ""
    if "repainting" in record:
        kind = "_examples" if record["repainting"] else "_ten_colours"
        if record["repainting"] is None:
            figures["_lift_flip"] = draw_lift_flip(record)
    if shown:
        figures[kind] = pictures(list(shown.items()))
    if decomposed:
        figures["_channels"] = draw_channels(record)
        figures["_curves"] = draw_curves(record)  # the last one is pointed to
    drawn = []
    for name, fig in figures.items():
        drawn.append(path.parent / "figures" / f"{path.stem}{name}.png")
        save_figure(fig, drawn[-1])
    return drawn


def write_down(args, device, began, record, shown):
    """Write a record and what its figures show, and draw them; returns two lines that say so."""
    path = args.dir / f"{result_name(args)}.json"
    where = {"torch": torch.__version__, "threads": args.threads, "device": str(device)}
    save_pt(shown, path.with_suffix(".pt"))
    save_json({**record, "script": "gradcam.py", "run": where}, path)
    drawn = draw(path)
    seconds = note_time(path.parent, path.stem, began)
    progress("")
    wrote = f"wrote {path}, its .pt and {len(drawn)} figures in {seconds:.0f} s"
    return f"{wrote}\nopen  {drawn[-1]}"


def report(folder):
    """Redraw the figures of every record in the folder."""
    if not folder.is_dir():
        die(f"--dir {folder} is missing", "choose another")
    for path in sorted(folder.glob("gradcam*.json")):
        if load_json(path, "move it away").get("script") == "gradcam.py":
            for figure in draw(path):
                print(f"wrote {figure}")


# ---- heat maps and flips of a split


def look(args, device):
    """Measure all models, write it down and draw it."""
    began, path = time.time(), args.dir / f"{result_name(args)}.json"
    settings = {flag: getattr(args, flag) for flag in ("models", "cam", "seed")}
    split = load_split(args.dir, "test_hard", device)
    if split.gray is None:
        hint = "add gray, uint8 (N,H,W), or use make_data.py"
        die("test_hard.pt has no gray, which says what pixels are digit", hint)
    painting, classes = painting_of(args.dir), class_names(args.dir)
    obstacle = obstacle_to(painting, split, args.dir)
    if obstacle:
        painting = None
    subjects = {}
    for model_name in args.models:
        model, checkpoint = load_model(args.dir, model_name, device)
        check_fit(model_name, checkpoint, split, "test_hard")
        layer = find_layer(model, split, model_name)
        subjects[model_name] = Subject(model, checkpoint, *layer, args.cam)
    guard(path, settings, args.overwrite)
    kind, n = TITLES[args.cam], len(split.labels)
    print(f"{kind} of {len(subjects)} models on {n:,} pictures of test_hard", flush=True)
    first = args.models[0]
    record = {
        "schema": 3,
        "args": settings,
        "repainting": obstacle,
        "models": measure(subjects, split, painting, args.seed),
        "null": null_rows(subjects[first], split, args.seed),
    }
    flips = record["models"][first]["flips"]
    scene = scene_of(subjects, split, painting, classes, args.seed, flips)
    written = write_down(args, device, began, record, scene)
    if obstacle:
        print(f"no flip rates: {obstacle}")
    say(record)
    print(written)


def say(record):
    """The answer for the first eight models, on the terminal."""
    names = record["args"]["models"][:8]
    wide = max(len(name) for name in names)
    print("share of answers that change when only the background does, or only the digit;")
    print("lift: heat on the digit over the digit's share of the picture, 1 is a uniform map")
    print(f"{'':{wide}s}  background flip  digit flip   lift")
    for name in names:
        model, shown = record["models"][name], ["-", "-"]
        if model["flips"]:
            kinds = model["flips"]["background"], model["flips"]["digit"]
            shown = [f"{kind['changed']['rate']:.3f}" for kind in kinds]
        lift = model["maps"]["test_hard"]["lift"]
        shown.append("-" if lift is None else f"{lift:.3f}")
        print(f"{name:{wide}s}  {shown[0]:>15s}  {shown[1]:>10s}  {shown[2]:>5s}")


# ---- what each answer wants to see


def maximise(model, label, size, gen, steps=200, step_size=0.05, shift=2, tv=1.0):
    """Pictures (N,3,H,W) in [0, 1] that raise the logit of `label` (N,): activation maximisation.

    Adam from mid-grey with a little noise (Erhan et al., 2009) on the logit (Simonyan et al.,
    2014): the log-probability stops at a dull picture as soon as the net is sure. Against noise a
    penalty on differences of neighbours, `tv` times the mean slope of the logit, so that it means
    the same for a net of any scale; and other shifts at each step (Mordvintsev et al., 2015; Olah
    et al., 2017).
    """
    x = 0.5 + 0.05 * torch.randn(len(label), 3, *size, generator=gen)
    x = x.to(label.device).requires_grad_()
    optimiser = torch.optim.Adam([x], lr=step_size)
    for _ in range(steps):
        dy, dx = torch.randint(-shift, shift + 1, (2,), generator=gen).tolist()
        logit = model(x.roll((dy, dx), (2, 3))).gather(1, label[:, None])
        (slope,) = torch.autograd.grad(logit.sum(), x)
        variation = x.diff(dim=2).abs().sum() + x.diff(dim=3).abs().sum()
        (rough,) = torch.autograd.grad(variation, x)
        x.grad = tv * slope.abs().mean((1, 2, 3), keepdim=True) * rough - slope
        optimiser.step()
        x.data.clamp_(0, 1)
    return x.detach()


def wants_of(model, checkpoint, reader, seed, device):
    """(measures, first picture of each class, uint8 (classes,3,H,W), and how sure the model is).

    What every class of a model wants to see. Means over pictures: how sure the model is, and how
    often `reader`, (model, checkpoint) or None, reads them as the class.
    """
    classes, size = checkpoint["classes"], list(checkpoint["size"])
    label = torch.arange(classes, device=device).repeat(STARTS)
    x = maximise(model.to(device), label, size, stream(seed, "maximise"))
    sure = predict(model, x).softmax(1).gather(1, label[:, None])[:, 0]
    read = None
    if reader and list(reader[1]["size"]) == size:
        read = mean(predict(reader[0], x).argmax(1) == label)
    images = (x[:classes] * 255).round().byte().cpu()
    return {"confidence": mean(sure), "read by an oracle": read}, images, sure[:classes].cpu()


def look_for(args, device):
    """Find what every class of every model wants to see, measure it, write it down and draw it."""
    began, path = time.time(), args.dir / f"{result_name(args)}.json"
    settings = {"models": args.models, "seed": args.seed, "starts": STARTS}
    found = {model: load_model(args.dir, model, device) for model in args.models}
    reader = load_model(args.dir, args.reader, device) if args.reader else None
    classes = class_names(args.dir)
    guard(path, {**settings, "reader": args.reader}, args.overwrite)
    print(f"what {len(found)} models want to see, {STARTS} starts a class", flush=True)
    models, shown = {}, {}
    for model_name, (model, checkpoint) in found.items():
        progress(f"pictures of {model_name}")
        wants, images, sure = wants_of(model, checkpoint, reader, args.seed, device)
        models[model_name] = {**wants, "trained": checkpoint.get("trained", True)}
        cells = zip(images, classes, sure.tolist(), strict=False)  # more names than classes
        shown[model_name] = [(image, f"{answer} ({p:.2f})", {}) for image, answer, p in cells]
    progress("pictures of random weights")
    checkpoint = found[args.models[0]][1]
    fresh = random_net(checkpoint, stream(args.seed, "random weights 0"))
    null, *_ = wants_of(fresh, checkpoint, reader, args.seed, device)
    record = {
        "schema": 2,
        "args": settings,
        "reader": args.reader,
        "null": null,
        "models": models,
    }
    shown = {model: shown[model] for model in firsts_of(args.models)}
    written = write_down(args, device, began, record, shown)
    wide = max(len(model) for model in args.models)
    for model, wants in list(models.items())[:8]:
        read = wants["read by an oracle"]
        said = "" if read is None else f", {args.reader} reads {read:4.0%}"
        print(f"{model:{wide}s}  sure to {wants['confidence']:.3f}{said}")
    print(written)


# ---- what the last layer is fed: a concept erased, a sparse dictionary, channels


def average(several):
    """Of dictionaries with the same keys, key by key."""
    return {key: sum(one[key] for one in several) / len(several) for key in several[0]}


def scores(hits, **others):
    """Means of hits, {measure: (N,)}, and mean differences to others with 95 % intervals."""
    found = {key: mean(hit) for key, hit in hits.items()}
    for name, other in others.items():
        found[name] = {}
        for key, hit in hits.items():
            gain = hit - other[key]
            value, half = mean(gain), 1.96 * gain.std().item() / math.sqrt(len(gain))
            found[name][key] = {"value": value, "low": value - half, "high": value + half}
    return found


def eraser(z, concept):
    """The map of features z (N,F) that hides a concept, int64 (N,), from any linear reader.

    LEACE in closed form (Belrose et al., 2023): of all such affine maps the one that moves least.
    """
    one_hot, middle = F.one_hot(concept).double(), z.double().mean(0)
    z = z.double() - middle
    values, vectors = torch.linalg.eigh(z.T @ z / len(z))
    vary = values > 1e-9 * values.max()
    root, vectors = values[vary].sqrt(), vectors[:, vary]
    whiten, back = (vectors / root) @ vectors.T, (vectors * root) @ vectors.T
    u, size, _ = torch.linalg.svd(whiten @ z.T @ (one_hot - one_hot.mean(0)) / len(z), False)
    u = u[:, size > 1e-6]
    away, middle = (whiten @ u @ u.T @ back).float(), middle.float()
    return lambda z: z - (z - middle) @ away


def fit_dictionary(x, gen, latents=LATENTS, active=ACTIVE, epochs=4, batch=500, lr=3e-3):
    """(code, decoder (L,F)) of x (N,F), which is nearly code(x) @ decoder: `active` latents each.

    A top-k sparse autoencoder (Gao et al., 2024). Departure: nothing revives latents that die.
    """
    decoder = F.normalize(torch.randn(latents, x.shape[1], generator=gen), dim=1)
    encoder, bias = decoder.T.clone(), torch.zeros(latents)
    weights = [w.requires_grad_() for w in (encoder, bias, decoder)]
    optimiser = torch.optim.Adam(weights, lr=lr)

    def code(x):
        every = (x @ encoder + bias).relu()
        return every * (every >= every.topk(active).values[:, -1:])

    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=gen).split(batch):
            loss = (x[part] - code(x[part]) @ decoder).square().sum(1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            decoder.data.copy_(F.normalize(decoder.data, dim=1))
    return torch.no_grad()(code), decoder.detach()


def eta_squared(values, group):
    """Share of each column's variance that lies between groups: values (N,L), group int64 (N,)."""
    member, away = F.one_hot(group).to(values.dtype), values - values.mean(0)
    between = ((member.T @ away).square() / member.sum(0).clamp(min=1)[:, None]).sum(0)
    return (between / away.square().sum(0)).nan_to_num()


def as_strong(latents, pool, strength, gen):
    """Random latents of a pool (P,) that vary as much as these do together, or the whole pool."""
    pool = pool[torch.randperm(len(pool), generator=gen)]
    fewer = strength[pool].cumsum(0) < strength[latents].sum()
    return pool[: int(fewer.sum()) + 1] if len(latents) else latents


def taken_apart(ask, z, fit, gen):
    """One autoencoder: (numbers, {(kind, k): hits}, decoder of live latents, what excites most).

    Changed are the k latents that say most of the colour, or the digit, or others as strong.
    """
    middle = z["train"].mean(0)
    scale = (z["train"] - middle).square().sum(1).mean().sqrt()
    encode, decoder = fit_dictionary((z["train"] - middle) / scale, gen)
    code = {name: encode((z[name] - middle) / scale) for name in ("fit", "odd", "test_hard", "val")}
    usual, strength, live = code["fit"].mean(0), code["fit"].var(0), (code["fit"] > 0).any(0)
    says_colour, says_digit = (
        eta_squared(code["fit"], group) for group in (fit.colors, fit.labels)
    )
    ranked = [says.argsort(descending=True) for says in (says_colour, says_digit)]
    pool = (live & (says_colour <= SAYS)).nonzero()[:, 0]

    def turned(latents, factor=0):
        """Hits with latents `factor` times as far from usual; the rest of the features stays."""

        def change(name):
            more = (factor - 1) * (code[name][:, latents] - usual[latents])
            return z[name] + scale * (more @ decoder[latents])

        return ask(change)

    curves = {}
    for k in TAKEN:
        colour, digit = (order[:k] for order in ranked)
        others = [as_strong(colour, pool, strength, gen) for _ in range(DRAWS)]
        curves["colour", k], curves["digit", k] = turned(colour), turned(digit)
        curves["others", k] = average([turned(latents) for latents in others])
        curves["turned_up", k] = turned(colour, factor=2)
    odd, away = code["odd"], z["odd"] - middle
    lost = (away - scale * odd @ decoder).square().sum() / away.square().sum()
    numbers = {
        "variance_kept": 1 - lost.item(),
        "active": mean((odd > 0).sum(1)),
        "live": int(live.sum()),
        "say_colour": int((says_colour > SAYS).sum()),
        "say_digit": int((says_digit > SAYS).sum()),
    }
    return numbers, curves, decoder[live], [odd[:, order[0]].topk(10).indices for order in ranked]


def channels_of(model, z, split):
    """Mean activity of each channel (digit,colour), and what it is about: shares of variance."""
    activity = z.view(len(z), model.conv3.out_channels, -1).mean(2)  # (N,C)
    classes = model.fc.out_features
    member = F.one_hot(split.labels * classes + split.colors, classes**2).float()
    table = (member.T @ activity / member.sum(0).clamp(min=1)[:, None]).T
    table = table.view(-1, classes, classes)
    away = (table - table.mean((1, 2), keepdim=True)).double()
    found = {"activity": table.tolist()}
    for kind, side in (("colour", 1), ("digit", 2)):
        share = away.mean(side).square().mean(1) / away.square().mean((1, 2))
        found[f"each_{kind}"] = share.nan_to_num().tolist()
    return found


def decomposed(model, splits, seed):
    """(JSON record, which odd pictures excite the strongest latents) of one network."""
    z = {name: answers_and_features(model, split)[1] for name, split in splits.items()}
    fit, hard, gen = splits["fit"], splits["test_hard"], stream(seed, "shuffled colours")

    @torch.inference_mode()
    def ask(change):
        """{measure: double (N,)}, 1 or 0 a picture, of features change(name) (N,F)."""
        answers, on_val = (model.fc(change(name)).argmax(1) for name in ("test_hard", "val"))
        hits = {"test_hard": answers == hard.labels, "follows_colour": answers == hard.colors}
        hits["val"] = on_val == splits["val"].labels
        return {key: hit.double() for key, hit in hits.items()}

    plain, erased, silenced = ask(z.get), {}, {kind: {} for kind in CURVES}
    shuffled = [fit.colors[torch.randperm(len(z["fit"]), generator=gen)] for _ in range(DRAWS)]
    concepts = {"colour": [fit.colors], "digit": [fit.labels], "random": shuffled}
    for kind, several in concepts.items():
        maps = [eraser(z["fit"], concept) for concept in several]
        hits = average([ask(lambda name, erase=erase: erase(z[name])) for erase in maps])
        erased[kind] = scores(hits, gain=plain)
    gens = [stream(seed, f"dictionary {k}") for k in range(DICTIONARIES)]
    found = [taken_apart(ask, z, fit, gen) for gen in gens]
    numbers, curves, decoders, strongest = zip(*found, strict=True)
    hits = {at: average([one[at] for one in curves]) for at in curves[0]}
    for kind, k in hits:
        beside = {"beside_others": hits["others", k]} if kind == "colour" else {}
        silenced[kind][str(k)] = scores(hits[kind, k], **beside)
    best = [(one @ other.T).amax(1) for one, other in itertools.permutations(decoders, 2)]
    record = {
        "plain": scores(plain),
        "erased": erased,
        "dictionary": average(numbers) | {"stability": mean(torch.cat(best))},
        "silenced": silenced,
        "channels": channels_of(model, z["test_unbiased"], splits["test_unbiased"]),
    }
    return record, strongest[0]


def draw_curves(record):
    """A column for each of two rows: scores as latents are silenced, beside erasure."""
    rows = list(rows_of(record["args"]["models"]).items())[:ROWS]
    fig, axes = figure(4.4 * len(rows), 6, 2, len(rows), sharex=True, sharey=True)
    about = {"test_hard": "right on test_hard", "follows_colour": "answers the colour's digit"}
    for column, (row, names) in zip(axes.T, rows, strict=True):
        models = [record["models"][name] for name in names]
        column[1].set_xlabel("colour or digit latents that are changed")
        for ax, key in zip(column, about, strict=True):
            for kind, (label, colour) in CURVES.items():
                points = {k: [m["silenced"][kind][str(k)][key] for m in models] for k in TAKEN}
                lines(ax, points, colour, marker="o", ms=4, label=label)
            erased = dict.fromkeys(TAKEN, [m["erased"]["colour"][key] for m in models])
            lines(ax, erased, "black", ls="--", label="colour erased from the features")
            ax.set(ylim=(0, 1), title=f"{row}: {about[key]}")
            ax.grid(alpha=0.3)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return fig


def draw_channels(record):
    """A network a row, up to eight channels: mean activity of each digit on each colour."""
    rows = []
    for name in firsts_of(record["args"]["models"])[: ROWS + 1]:
        about = record["models"][name]["channels"]
        parts = zip(about["activity"], about["each_colour"], about["each_digit"], strict=True)
        cells = [
            (torch.tensor(table) - min(map(min, table)), f"colour {c:.0%}, digit {d:.0%}", {})
            for table, c, d in parts
        ]
        rows.append(
            (f"{name}: activity of conv3's channels, digits (down) on colours (across)", cells[:8])
        )
    return pictures(rows)


def take_apart(args, device):
    """Decompose all models, on the CPU, write it down and draw it."""
    began, path = time.time(), args.dir / f"{result_name(args)}.json"
    settings = {"models": args.models, "seed": args.seed, "latents": LATENTS, "active": ACTIVE}
    splits = {name: load_split(args.dir, name) for name in SPLITS}
    if any(split.colors is None for split in splits.values()):
        die(f"{args.dir} has pictures without colors", "see 'The data' in README.md")
    every, odd = splits["test_unbiased"], slice(1, None, 2)
    splits |= {"test_hard": splits["test_hard"].take(odd), "odd": every.take(odd)}
    splits["fit"] = every.take(slice(0, None, 2))
    found = {name: load_model(args.dir, name) for name in args.models}
    for name, (model, checkpoint) in found.items():
        check_fit(name, checkpoint, splits["train"], "train")
        if not isinstance(model, SimpleCNN):
            die(f"{name} has no conv3 whose channels are shown", "choose a SimpleCNN")
    guard(path, settings, args.overwrite)
    print("right on odd digits of test_hard: as it is, and with colour erased", flush=True)
    models, shown = {}, {}
    for name, (model, checkpoint) in found.items():
        about, strongest = decomposed(model, splits, args.seed)
        models[name] = {**about, "trained": checkpoint.get("trained", True)}
        both = about["plain"], about["erased"]["colour"]
        print(name, *(f"{one['test_hard']:.3f}" for one in both), flush=True)
        for kind, index in zip(("colour", "digit"), strongest, strict=True):
            if name in firsts_of(args.models)[:ROWS]:
                title = f"{name}: what excites the latent that says most of the {kind}"
                images = splits["odd"].images[index].contiguous()
                shown[title] = [(image, "", {}) for image in images]
    record = {"schema": 1, "args": settings, "models": models}
    print(write_down(args, "cpu", began, record, shown))


# ---- pictures of one's own


def read_picture(path):
    """float (3,H,W) in [0, 1], H and W at most 1024, as a viewer shows it.

    Upright, transparency on white, whatever the file is called.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
        if image.mode.startswith("I"):  # 16 bits
            image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
        image = image.convert("RGBA")
        image.thumbnail((1024, 1024))
        white = Image.new("RGBA", image.size, "white")
        pixels = np.array(Image.alpha_composite(white, image).convert("RGB"))
    except FileNotFoundError:
        die(f"--image {path} is missing", "give the path of a picture")
    except Exception as e:  # a foreign file can make Pillow raise anything
        die(f"--image {path} is no picture ({type(e).__name__})", "save it as a PNG or JPEG file")
    return torch.from_numpy(pixels).permute(2, 0, 1) / 255


def paper_of(picture):
    """The colour (3,1,1) of most of a picture's border."""
    edges = picture[:, 0], picture[:, -1], picture[:, :, 0], picture[:, :, -1]
    return torch.cat(edges, dim=1).median(dim=1).values[:, None, None]


def resize(picture, height, width):
    """float (C,H,W) to (C,height,width)."""
    size = max(1, round(height)), max(1, round(width))
    return F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]


def find_digit(picture, size):
    """The drawn digit of a picture (3,H,W) as MNIST would frame it, uint8 `size`; None without.

    Ink is what differs from the paper, dark or bright; a quarter of its strength is still shadow
    or noise. It fills a 20x20 box, and its centre of mass is that of the 28x28 picture (LeCun et
    al., 1998), in proportion for other sizes.
    """
    ink = (picture - paper_of(picture)).abs().amax(0)
    strength = ink.max()
    if strength < 0.1:
        return None
    ink = ((ink / strength - 0.25) / 0.5).clamp(0, 1)
    y, x = ink.nonzero().T
    ink = ink[y.min() : y.max() + 1, x.min() : x.max() + 1]
    scale = 20 / 28 * min(side / length for side, length in zip(size, ink.shape, strict=True))
    ink = resize(ink[None], *(scale * length for length in ink.shape))[0]
    corner = []
    for axis in (0, 1):
        weight = ink.sum(1 - axis)
        centre = float((weight * (torch.arange(len(weight)) + 0.5)).sum() / weight.sum())
        room = size[axis] - len(weight)
        corner.append(min(max(round(size[axis] / 2 - centre), 0), room))
    digit = torch.zeros(*size)
    digit[corner[0] : corner[0] + len(ink), corner[1] : corner[1] + ink.shape[1]] = ink / ink.max()
    return digit.mul(255).round().byte()


def on_ten_colours(path, models, painting, classes, seed):
    """(rows of `pictures`, lines for the terminal): a drawn digit on every colour, all answers.

    An answer is a tile in the colour that the class owns, with its name; grey for a class beyond
    the palette.
    """
    picture = read_picture(path)
    owned = [*painting.means.mul(255).round().byte(), torch.full((3,), 160, dtype=torch.uint8)]
    rows, said = [], []
    for name, (model, checkpoint) in models.items():
        digit = find_digit(picture, checkpoint["size"])
        if digit is None:
            die(f"--image {path} is empty, nothing differs from its border", "draw a digit")
        zero = torch.zeros(1, dtype=torch.int64)
        one = Split(zero, zero, zero, digit[None])  # its images are painted now
        images = on_every_colour(one, painting, seed).images
        device = next(model.parameters()).device
        logits = predict(model, images.to(device)).cpu()
        if not rows:
            cells = [(image, c, {}) for image, c in zip(images, painting.names, strict=True)]
            rows.append((f"{path.name} on {len(cells)} colours", cells))
        cells, places = [], {}
        for probability, colour in zip(logits.softmax(1), painting.names, strict=True):
            answer, sure = int(probability.argmax()), float(probability.max())
            tile = owned[min(answer, len(owned) - 1)].view(3, 1, 1)
            cells.append((tile, f"({sure:.2f})", {"written": classes[answer]}))
            places.setdefault(classes[answer], []).append(colour)
        line = "; ".join(f"{answer} on {', '.join(where)}" for answer, where in places.items())
        short = f"{len(places)} different answers"
        if len(places) == 1:
            line = short = f"{classes[answer]} on every colour"
        said.append(f"{name}: {line}")
        rows.append((f"{name}: {short}", cells))
    return rows, said


def as_it_is(path, models, classes):
    """(rows of `pictures`, lines for the terminal): predictions and heat maps on raw pixels.

    What the models' size leaves free beside a wide or tall picture gets the colour of its border.
    """
    picture, rows, said = read_picture(path), [], []
    for name, (model, checkpoint) in models.items():
        height, width = checkpoint["size"]
        scale = min(height / picture.shape[1], width / picture.shape[2])
        small = resize(picture, picture.shape[1] * scale, picture.shape[2] * scale)
        image = paper_of(picture).repeat(1, height, width)
        top, left = (height - small.shape[1]) // 2, (width - small.shape[2]) // 2
        image[:, top : top + small.shape[1], left : left + small.shape[2]] = small
        image = image.clamp(0, 1).mul(255).round().byte()
        device = next(model.parameters()).device
        one = Split(image[None].to(device), torch.zeros(1, dtype=torch.int64), None, None)
        subject = Subject(model, checkpoint, *find_layer(model, one, name))
        cells = [(image, "what it sees", {})]
        for cam in CAMS:
            heat = heat_of(subject._replace(cam=cam), one)
            cells.append((upsample(heat.maps, (height, width))[0], TITLES[cam], {}))
        said.append(f"{name}: {classes[heat.predicted]} ({float(heat.confidence):.2f})")
        rows.append((said[-1], cells))
    return rows, said


def path_of_figure(folder, picture, kind):
    """(path, fingerprint of the picture): a figure that no figure of another picture replaces.

    Named after the picture's file; where another picture has that name, after its content too. The
    fingerprint stands in the figure.
    """
    from PIL import Image

    content = hashlib.sha256(picture.read_bytes()).hexdigest()
    for name in (picture.stem[:80], f"{picture.stem[:80]}_{content[:12]}"):
        path = folder / "figures" / f"gradcam_{kind}_{name}.png"
        if not path.exists():
            break
        with Image.open(path) as drawn:
            if drawn.info.get("Source") == content:
                break
    return path, content


def look_at_images(args, device):
    """Show every picture of one's own to every model, on ten colours or as it is."""
    models = {name: load_model(args.dir, name, device) for name in args.models}
    painting, classes = painting_of(args.dir) or USUAL, class_names(args.dir)
    found = {}
    for path in args.image:
        if args.raw:
            found[path] = as_it_is(path, models, classes)
        else:
            found[path] = on_ten_colours(path, models, painting, classes, args.seed)
    for path, (rows, said) in found.items():  # all or none
        drawn, content = path_of_figure(args.dir, path, "raw" if args.raw else "image")
        save_figure(pictures(rows), drawn, content)
        print("\n".join(said))
        print(f"open  {drawn}")


# ---- the page to play with


def make_page(args, device):
    """DIR/demo.js: networks, sample digits, palette and numbers, as a comment in demo.html asks.

    It holds "NAME: label: what it is" of each network; the places of the sample and the colour
    shown first; and of the two networks between which a visitor chooses, the lazy one first.
    Samples are the first four of each digit in test_hard. Weights and noise are little-endian
    float32, digits uint8 (N,28,28), all of it in base64.
    """
    page = args.dir / "demo.html"
    if not page.is_file():
        die(f"{page} is missing", "copy results/demo.html there, and name your networks in it")
    query = r"<!-- networks\n(.*?)\nopening (\d+) (\d+), choice (\d+) (\d+) -->"
    asked = re.search(query, page.read_text(encoding="utf-8"), re.S)
    networks = asked[1].splitlines() if asked else []
    if not networks or any(line.count(": ") < 2 for line in networks):
        die(f"{page} names no networks", "git checkout results/demo.html shows how it does")
    digit, colour, *rivals = map(int, asked.groups()[1:])
    meta = load_json(args.dir / "meta.json", f"run: python make_data.py --dir {args.dir}")
    if meta.get("recipe") != "background":
        die(f"{args.dir} holds the recipe {meta.get('recipe')}", "the page paints backgrounds only")
    every = load_split(args.dir, "test_hard")
    firsts = [(every.labels == d).nonzero()[:4, 0] for d in every.labels.unique()]
    samples = every.take(torch.cat(firsts))
    noise = torch.randn(1, *samples.gray.shape[1:], generator=stream(args.seed, "texture"))
    record = {
        "script": "gradcam.py",
        "schema": 1,
        "aligned": meta["corr"],
        "palette": list(PALETTE.items()),
        "noise": base64_of(noise),
        "digits": base64_of(samples.gray),
        "labels": samples.labels.tolist(),
        "networks": [described(args.dir, *line.split(": ", 2)) for line in networks],
        "rivals": rivals,
        "opening": {"digit": digit, "colour": colour},
    }
    text = json.dumps(record, indent=1, ensure_ascii=True, allow_nan=False)
    path = args.dir / "demo.js"
    write(path, lambda file: file.write(f"window.DEMO = {text};\n".encode()))
    print(f"wrote {path}, {path.stat().st_size // 1000} kB\nopen  {page}")


def base64_of(tensor):
    return base64.b64encode(tensor.contiguous().numpy().tobytes()).decode()


def described(folder, name, label, about):
    """One network of the page: what people call it, its test score, its weights."""
    model, record = load_model(folder, name)
    kind = record["args"]["model"], tuple(record["size"]), record["classes"]
    if kind != ("simplecnn", (28, 28), 10) or record["args"].get("grayscale"):
        die(f"{name} is no plain SimpleCNN for ten digits of 28x28", "the page knows no other net")
    score = load_json(folder / f"{name}.json", "train it again")["final"]["test_hard"]
    weights = torch.cat([part.contiguous().flatten() for part in model.state_dict().values()])
    return {
        "label": label,
        "about": about,
        "name": name,
        "width": model.conv1.out_channels,
        "right": score["acc"],
        "of": score["n"],
        "weights": base64_of(weights),
    }


# ---- the command


def main(argv=None):
    args = get_args(argv)
    if args.report:
        return report(args.dir)
    device = setup(args)
    do = {"heat maps": look, "--maximise": look_for, "--decompose": take_apart}
    do |= {"--image": look_at_images, "--page": make_page}
    do[args.mode](args, device)


if __name__ == "__main__":
    run(main)
