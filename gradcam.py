"""Show where a model looks, measure it, and ask by repainting what the model really uses.

Reads   DIR/test_hard.pt, test_unbiased.pt, meta.json (from make_data.py), DIR/NAME.pt (from train.py)
Writes  DIR/gradcam.json, DIR/gradcam.pt (the few maps that the figures show), DIR/figures/gradcam_*.png;
        with another --cam the files are called gradcam_CAM.*

    python gradcam.py                                              # the lazy model and the cured one
    python gradcam.py --cam hirescam --models jitter_s42 --digit 7
    python gradcam.py --models baseline_s42 baseline_s43 jitter_s42 jitter_s43 --split val
    python gradcam.py --report                                     # figures and tables again, from the files

A heat map is a suggestion: it can miss a shortcut or show one that is not there (Adebayo et al., 2022). So each map is held against the
area it could hit by chance, against nets with random weights, and against flip rates: how often the prediction changes when
nothing but the background changes, and how often when nothing but the digit does. Repainting needs the splits' `colors` and the
recipe in meta.json; where they are missing the flips are null and one line says so.
"""

import contextlib
import copy
import itertools
import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F

from common import (
    DIGIT_PIXEL,
    INK,
    PALETTES,
    SPLITS,
    Parser,
    SimpleCNN,
    Split,
    alone,
    build_model,
    common_args,
    die,
    family_of,
    fmt,
    load_json,
    meta_of,
    load_model,
    load_pt,
    load_splits,
    markdown,
    mean_sd,
    model_name,
    paint,
    predict,
    run,
    save_figure,
    save_json,
    save_pt,
    setup,
    start_drawing,
    stream,
    whole,
    wilson,
)

BATCH = 500  # images; small enough for a ResNet-50, large enough for the tiny net
SANITY_IMAGES, SANITY_DRAWS = 1000, 5  # the null rows: images of the split, sets of random weights

# ---------------------------------------------------------------- heat maps


@contextlib.contextmanager
def captured(module):
    """Inside `with`, seen["map"] is the output of the module's last call, as a leaf: gradients go back to it and no further.

    What follows gets a copy, so an in-place ReLU cannot alter it. The hook is gone afterwards, also after an error.
    """
    seen = {}

    def keep(_, inputs, output):
        seen["map"] = output.detach().requires_grad_()
        return seen["map"].clone()

    hook = module.register_forward_hook(keep)
    try:
        yield seen
    finally:
        hook.remove()


class Explained(NamedTuple):
    activation: torch.Tensor  # float (B,C,h,w)
    gradient: torch.Tensor  # float (B,C,h,w): of each image's explained logit
    logits: torch.Tensor  # float (B,classes)
    target: torch.Tensor  # int64 (B,): the explained class


def explain(model, layer, x, target=None):
    """Activation of `layer` and the gradient of one logit per image with respect to it; `target` None explains the predicted class.

    x float (B,3,H,W) in [0, 1]. In eval mode images do not mix, so the gradient of the sum holds every image's own. Nothing gathers
    in .grad; train/eval mode stays as it was found.
    """
    training = model.training
    model.eval()
    try:
        with captured(layer) as seen, torch.enable_grad():
            logits = model(x)
    finally:
        model.train(training)
    target = logits.argmax(1) if target is None else target
    (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), seen["map"])
    return Explained(seen["map"].detach(), gradient, logits.detach(), target)


def gradcam(activation, gradient):
    """Channels weighted by their mean gradient (Selvaraju et al., 2017). (B,C,h,w) twice to (B,h,w), before the ReLU."""
    return (gradient.mean((2, 3), keepdim=True) * activation).sum(1)


def hirescam(activation, gradient):
    """Every position weighted by its own gradient (Draelos & Carin, 2020); before a linear head it sums to logit minus bias."""
    return (gradient * activation).sum(1)


def gradcam_pp(activation, gradient):
    """Channels weighted by their positive gradients, each position with a coefficient of its own (Chattopadhay et al., 2018).

    The coefficients are the paper's for the score exp(logit); its factor exp(logit) is the same for a whole map and is left out.
    """
    squared = gradient.square()
    below = 2 * squared + activation.sum((2, 3), keepdim=True) * squared * gradient
    coefficient = torch.where(below != 0, squared / below, 0)
    return ((coefficient * gradient.relu()).sum((2, 3), keepdim=True) * activation).sum(1)


CAMS = {"gradcam": gradcam, "hirescam": hirescam, "gradcam++": gradcam_pp}
TITLES = {"gradcam": "Grad-CAM", "hirescam": "HiResCAM", "gradcam++": "Grad-CAM++"}


class Heat(NamedTuple):
    maps: torch.Tensor  # float (N,h,w), rectified
    predicted: torch.Tensor  # int64 (N,)
    confidence: torch.Tensor  # float (N,): probability of the predicted class
    target: torch.Tensor  # int64 (N,): the explained class


def heat_of(model, layer, split, cam, targets=None):
    """Heat maps of a whole split, gathered on the CPU; `targets` (N,) None explains the predicted class."""
    parts = []
    for index in slices(split):
        e = explain(
            model,
            layer,
            split.x(index),
            None if targets is None else targets[index].to(split.images.device),
        )
        confidence, predicted = e.logits.softmax(1).max(1)
        parts.append(
            Heat(CAMS[cam](e.activation, e.gradient).relu(), predicted, confidence, e.target)
        )
    return Heat(*(torch.cat(column).cpu() for column in zip(*parts)))


def slices(split):
    return [slice(i, i + BATCH) for i in range(0, len(split.labels), BATCH)]


def upsample(maps, size):
    """(N,h,w) to (N,H,W), bilinear."""
    return F.interpolate(maps[:, None], size=tuple(size), mode="bilinear", align_corners=False)[
        :, 0
    ]


# ---------------------------------------------------------------- which layer


def map_sizes(model, split):
    """{dotted module name: (h, w)} of every layer whose output is a (B,C,h,w) map of more than one pixel, by one forward pass."""
    with contextlib.ExitStack() as stack:
        seen = {
            name: stack.enter_context(captured(module))
            for name, module in model.named_modules()
            if name
        }
        model(split.x(slice(1)))
    shapes = {name: tuple(s["map"].shape) for name, s in seen.items() if "map" in s}
    return {
        name: shape[2:] for name, shape in shapes.items() if len(shape) == 4 and shape[2:] != (1, 1)
    }


class Subject(NamedTuple):
    model: torch.nn.Module
    checkpoint: dict  # as train.py saved it
    layer: str  # dotted name of the target layer
    size: tuple  # (h, w) of its map

    @property
    def target_layer(self):
        return self.model.get_submodule(self.layer)


def load_subject(folder, name, layer, splits, device):
    model, checkpoint = load_model(folder, name, device)
    for which, split in splits.items():
        size, classes = list(split.images.shape[2:]), int(split.labels.max()) + 1
        if list(checkpoint["size"]) != size or checkpoint["classes"] < classes:
            die(
                f"{folder}/{name}.pt is built for {checkpoint['classes']} classes and {tuple(checkpoint['size'])} pixels, "
                f"but {which}.pt has {classes} and {tuple(size)}",
                "train it on this world or point --dir to its own",
            )
    return Subject(model, checkpoint, *find_layer(model, layer, split, name))


def find_layer(model, name, split, owner):
    """(dotted name, (h, w)) of the target layer; `name` None takes the deepest that still has a map worth looking at.

    That is SimpleCNN's last ReLU, and in a ResNet the deepest stage at least 4 pixels wide (28x28 pixels end as a single one).
    """
    sizes = map_sizes(model, split)
    if name is None:
        deep_first = ("layer4", "layer3", "layer2")
        name = (
            "relu"
            if isinstance(model, SimpleCNN)
            else next((s for s in deep_first if sizes.get(s, (0, 0))[1] >= 4), "layer1")
        )
    if name not in sizes:
        what = (
            "has no map of more than one pixel"
            if name in dict(model.named_modules())
            else "does not exist"
        )
        inside = " or a layer inside them" if any("." in n for n in sizes) else ""
        die(
            f"--layer {name} {what} in {owner}",
            f"choose one of {', '.join(n for n in sizes if '.' not in n)}{inside}",
        )
    return name, sizes[name]


# ---------------------------------------------------------------- how much of the heat is on the digit


class Scores(NamedTuple):
    """One number per image, double (N,); NaN where the map is all zero or the picture has no digit pixel."""

    share: torch.Tensor  # of the heat that lies on digit pixels
    area: torch.Tensor  # of the picture that digit pixels cover: the share that a uniform map gets
    pointing: (
        torch.Tensor
    )  # is the hottest pixel on the digit; several equally hot ones count in parts

    @property
    def lift(self):
        return self.share / self.area


def heat_scores(maps, gray):
    """Energy-based pointing game (Wang et al., 2020), its chance level, and the pointing game (Zhang et al., 2018) without tolerance.

    maps float (N,h,w), rectified; gray uint8 (N,H,W). Both are compared at the size of the picture.
    """
    parts = []
    for i in range(0, len(maps), BATCH):
        heat, digit = (
            upsample(maps[i : i + BATCH], gray.shape[1:]).double(),
            gray[i : i + BATCH] > 255 * DIGIT_PIXEL,
        )
        total, area = heat.sum((1, 2)), digit.double().mean((1, 2))
        hottest = (heat == heat.amax((1, 2), keepdim=True)).double()
        per_image = torch.stack(
            [
                (heat * digit).sum((1, 2)) / total,
                area,
                (hottest * digit).sum((1, 2)) / hottest.sum((1, 2)),
            ]
        )
        per_image[:, (total == 0) | (area == 0)] = torch.nan
        parts.append(per_image)
    return Scores(*torch.cat(parts, dim=1))


def summary(scores, keep=slice(None)):
    """Means and quartiles over the images that `keep` selects; those without a score are counted, not averaged."""
    scores = Scores(*(values[keep] for values in scores))
    scored = ~scores.share.isnan()
    share, lift, pointing = scores.share[scored], scores.lift[scored], scores.pointing[scored]
    quartiles = lambda values: (
        torch.quantile(values, torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
        if len(values)
        else None
    )
    return {
        "n": len(scored),
        "zero_maps": int((~scored).sum()),
        "area": mean(scores.area[scored]),
        "share": mean(share),
        "share_quartiles": quartiles(share),
        "lift": mean(lift),
        "lift_quartiles": quartiles(lift),
        "pointing": rate(pointing),
    }


def mean(values):
    """The mean as a float; None of nothing."""
    return values.double().mean().item() if len(values) else None


def rate(values):
    """Mean of one value in [0, 1] per image, with a 95 % Wilson interval.

    The interval counts images; where a value is itself a share of an image's nine other colours that makes it too wide, never too narrow.
    """
    values = values.double()
    return {
        "rate": mean(values),
        "interval": list(wilson(values.sum().item(), len(values))),
        "n": len(values),
    }


def completeness(model, layer, split):
    """How far the sum of the unrectified map is from logit minus bias, in logits: maximum and mean over the split, per kind of map.

    HiResCAM (Draelos & Carin, 2020) leaves nothing over where a linear head follows the layer, as in SimpleCNN.
    """
    left = {"gradcam": [], "hirescam": []}
    for index in slices(split):
        e = explain(model, layer, split.x(index))
        wanted = e.logits.gather(1, e.target[:, None])[:, 0] - model.fc.bias.detach()[e.target]
        for cam, parts in left.items():
            parts.append((wanted - CAMS[cam](e.activation, e.gradient).sum((1, 2))).abs().cpu())
    return {
        cam: {"max": torch.cat(parts).max().item(), "mean": mean(torch.cat(parts))}
        for cam, parts in left.items()
    }


def ranks(values):
    """Ranks along the last dimension, from 0.5; equal values share their average rank."""
    ordered = values.sort(dim=-1).values
    return (
        torch.searchsorted(ordered, values) + torch.searchsorted(ordered, values, right=True)
    ).double() / 2


def spearman(a, b):
    """Rank correlation along the last dimension (Spearman, 1904); NaN where one side is constant."""
    a, b = (r - r.mean(-1, keepdim=True) for r in (ranks(a), ranks(b)))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


# ---------------------------------------------------------------- what the model really uses: repaint and ask again


def recipe_of(folder, split):
    """(the recipe as keywords of `paint`, None), or (None, why this split cannot be repainted)."""
    if split.colors is None:
        return None, "the split has no colors"
    meta = meta_of(folder)
    if not meta:
        return None, f"{folder}/meta.json, which names the recipe, is missing"
    recipe = {key: meta.get(key) for key in ("recipe", "sigma2")}
    if not isinstance(recipe["recipe"], str) or recipe["recipe"] not in PALETTES:
        return (
            None,
            f"meta.json names the recipe {recipe['recipe']!r}, which is not one of {', '.join(PALETTES)}",
        )
    if recipe["recipe"] == "digit" and not (
        isinstance(recipe["sigma2"], (int, float)) and 0 <= recipe["sigma2"] <= 1
    ):
        return None, f"meta.json gives the recipe 'digit' the variance {recipe['sigma2']!r}"
    last = max(int(split.colors.max()), int(split.labels.max()))
    top = len(palette_of(recipe)) - 1
    return (
        (recipe, None)
        if last <= top
        else (None, f"classes or colours run to {last}, but the palette ends at {top}")
    )


def palette_of(recipe):
    """The names of the colours, in the order of the digits that own them."""
    return list(PALETTES[recipe["recipe"]])


def repaint(split, colours, recipe, seed):
    """The same digits on other colours; one texture per place in the split, whatever the colours."""
    images = paint(split.gray.cpu(), colours.cpu(), stream(seed, "texture"), **recipe)
    return split._replace(
        images=images.to(split.images.device, memory_format=torch.channels_last), colors=colours
    )


def take(split, index):
    return Split(*(None if t is None else t[index] for t in split))


def counterfactuals(models, split, recipe, seed):
    """{name: (predictions (N,10) of every digit on every colour, predictions (N,) with the partner's digit)}, and the partners (N,).

    Each painting is made once and shown to all models.
    """
    on_colour = {name: [] for name in models}
    for c in range(len(palette_of(recipe))):
        painted = repaint(split, torch.full_like(split.labels, c), recipe, seed)
        for name, model in models.items():
            on_colour[name].append(predict(model, painted).cpu())
    partner = torch.randperm(len(split.labels), generator=stream(seed, "partner"))
    swapped = repaint(split._replace(gray=split.gray[partner]), split.colors, recipe, seed)
    return {
        name: (torch.stack(columns, dim=1), predict(models[name], swapped).cpu())
        for name, columns in on_colour.items()
    }, partner


def flip_rates(on_colour, swapped, partner, labels, colours):
    """(rates, background flip rate of each image (N,)), all against the prediction on the image's own colour in the split.

    Background: the other nine colours under the same digit; `follows` is the share predicted as the class that owns the new colour,
    among colours that are not the label's. Digit: the partner's digit on the same background, where its label differs.
    """
    now = on_colour.gather(1, colours[:, None])  # (N,1)
    palette = torch.arange(on_colour.shape[1])
    other = palette != colours[:, None]  # (N,10)
    foreign = other & (palette != labels[:, None])
    changed = ((on_colour != now) & other).sum(1) / other.sum(1)
    follows = ((on_colour == palette) & foreign).sum(1) / foreign.sum(1)
    differs = labels[partner] != labels
    background = {
        "changed": rate(changed),
        "any": rate(changed > 0),
        "follows": rate(follows),
        "pairs": int(other.sum()),
    }
    digit = {
        "changed": rate((swapped != now[:, 0])[differs]),
        "follows": rate((swapped == labels[partner])[differs]),
    }
    return {"background": background, "digit": digit}, changed


# ---------------------------------------------------------------- null rows: what a map is worth that knows nothing


def null_rows(name, subject, split, args):
    """What maps score that cannot know anything: noise, a constant, and those of nets with random weights."""
    gray = split.gray.cpu()
    noise = torch.rand(len(gray), *subject.size, generator=stream(args.seed, "random maps"))
    part = take(split, slice(SANITY_IMAGES))
    return {
        "model": name,
        "layer": subject.layer,
        "n": len(part.labels),
        "draws": SANITY_DRAWS,
        "random_map": summary(heat_scores(noise, gray)),
        "uniform_map": summary(heat_scores(torch.ones_like(noise), gray)),
        "cascade": cascade(subject, part, args.cam, args.seed),
    }


def cascade(subject, split, cam, seed):
    """Cascading randomisation (Adebayo et al., 2018): fresh weights from the output down, and what is left of the real maps.

    The explained class stays the one that the real model predicts. Rank correlation per image of the rectified maps, mean over
    images; an image where either map is constant has none and is counted in `without`. One number per draw of the weights.
    """
    real = heat_of(subject.model, subject.target_layer, split, cam)
    children = [
        name
        for name, child in subject.model.named_children()
        if any(True for _ in child.parameters())
    ][::-1]
    steps = [
        {"randomised": children[: k + 1], "rank_correlation": [], "lift": [], "without": 0}
        for k in range(len(children))
    ]
    kind, checkpoint = subject.checkpoint["args"], subject.checkpoint
    for draw in range(SANITY_DRAWS):
        torch.manual_seed(stream(seed, f"random weights {draw}").initial_seed())
        fresh = build_model(
            kind["model"], kind["width"], checkpoint["classes"], checkpoint["size"]
        ).to(split.images.device)
        hybrid = copy.deepcopy(subject.model)
        for step in steps:
            setattr(hybrid, step["randomised"][-1], getattr(fresh, step["randomised"][-1]))
            maps = heat_of(
                hybrid, hybrid.get_submodule(subject.layer), split, cam, real.target
            ).maps
            correlation = spearman(real.maps.flatten(1), maps.flatten(1))
            step["rank_correlation"].append(mean(correlation[~correlation.isnan()]))
            step["lift"].append(summary(heat_scores(maps, split.gray.cpu()))["lift"])
            step["without"] += int(correlation.isnan().sum())
    return steps


# ---------------------------------------------------------------- the pictures that the figures show


def join(splits):
    return Split(*(None if column[0] is None else torch.cat(column) for column in zip(*splits)))


def example_pictures(split, recipe, seed):
    """Five digits, each on its own and on a foreign colour: the first of five classes that the split holds on a foreign one.

    A split that cannot be repainted shows its first ten pictures as they are.
    """
    if recipe is None:
        return take(split, slice(10))
    foreign = split.colors != split.labels
    firsts = [
        int(((split.labels == d) & foreign).nonzero()[0, 0])
        for d in split.labels[foreign].unique().tolist()
    ]
    pairs = [
        repaint(one, colours, recipe, seed)
        for one in (take(split, slice(i, i + 1)) for i in sorted(firsts)[:5])
        for colours in (one.labels, one.colors)
    ]
    return join(pairs) if pairs else take(split, slice(10))


def ten_colours(split, digit, recipe, seed):
    """The first picture of one digit on every colour of the palette, same texture."""
    i = int((split.labels == digit).nonzero()[0, 0])
    one = take(split, slice(i, i + 1))
    return join(
        [
            repaint(one, torch.full_like(one.labels, c), recipe, seed)
            for c in range(len(palette_of(recipe)))
        ]
    )


def scene(pictures, subjects, recipe, args):
    """Pictures and what every model makes of them, as a dictionary of tensors and names fit for save_pt."""
    targets, seen = pictures.labels if args.target == "label" else None, {}
    for name, subject in subjects.items():
        heat = heat_of(subject.model, subject.target_layer, pictures, args.cam, targets)
        seen[name] = {"maps": heat.maps, "predicted": heat.predicted, "confidence": heat.confidence}
    cpu = lambda t: None if t is None else t.cpu().clone(memory_format=torch.contiguous_format)
    return {
        "images": cpu(pictures.images),
        "gray": cpu(pictures.gray),
        "labels": cpu(pictures.labels),
        "colours": cpu(pictures.colors),
        "palette": palette_of(recipe) if recipe else None,
        "models": seen,
    }


# ---------------------------------------------------------------- figures


def families(models):
    """{family: {name: model}}: seeds of one setting share the name in front of _sSEED, a table row and a colour."""
    groups = {}
    for name, model in models.items():
        groups.setdefault(family_of(name)[0], {})[name] = model
    return groups


def draw_picture(ax, scene, k):
    ax.imshow(scene["images"][k].permute(1, 2, 0).numpy())
    on = f" on {scene['palette'][scene['colours'][k]]}" if scene["palette"] else ""
    ax.set(xticks=[], yticks=[], xlabel=f"{scene['labels'][k]}{on}")


def draw_heat(ax, scene, name, k):
    """One heat map with the outline of the digit; under it ✓ or a bold ✗, the predicted class and its probability."""
    seen, gray, edge = scene["models"][name], scene["gray"][k], 255 * DIGIT_PIXEL
    heat = upsample(seen["maps"][k : k + 1], gray.shape)[0]
    ax.imshow(heat.numpy(), cmap="inferno", vmin=0, vmax=heat.max().item() or 1)
    if gray.min() < edge < gray.max():
        ax.contour(gray.numpy(), levels=[edge], colors="#56B4E9", linewidths=0.8)
    if heat.max() == 0:
        ax.text(
            0.5,
            0.97,
            "no heat",
            color="white",
            fontsize=8,
            ha="center",
            va="top",
            transform=ax.transAxes,
        )
    right = seen["predicted"][k] == scene["labels"][k]
    ax.set(xticks=[], yticks=[])
    ax.set_xlabel(
        f"{'✓' if right else '✗'} {seen['predicted'][k]} ({seen['confidence'][k]:.2f})",
        weight="normal" if right else "bold",
    )


def fooled(scene, name):
    """bool (K,) twice: pictures on a foreign colour that the model gets wrong, and all pictures on a foreign colour.

    In a world without colours every picture counts.
    """
    labels, colours = scene["labels"], scene["colours"]
    foreign = torch.ones_like(labels).bool() if colours is None else colours != labels
    return (scene["models"][name]["predicted"] != labels) & foreign, foreign


def draw_rows(scene, title, path, most=4):
    """Pictures in the first row, then a row for the first model of each family, at most four; its title counts what fooled it."""
    plt = start_drawing()
    names = [next(iter(members)) for members in families(scene["models"]).values()][:most]
    columns = len(scene["labels"])
    fig = plt.figure(
        figsize=(1.12 * columns + 0.2, 1.62 * (len(names) + 1) + 0.1), layout="constrained"
    )
    top, *rows = fig.subfigures(len(names) + 1, squeeze=False)[:, 0]
    top.suptitle(title, fontsize=12)
    for k, ax in enumerate(top.subplots(1, columns, squeeze=False)[0]):
        draw_picture(ax, scene, k)
    for row, name in zip(rows, names):
        for k, ax in enumerate(row.subplots(1, columns, squeeze=False)[0]):
            draw_heat(ax, scene, name, k)
        wrong, foreign = fooled(scene, name)
        where = "pictures" if scene["colours"] is None else "foreign colours"
        row.suptitle(
            f"{name}: fooled on {int(wrong.sum())} of {int(foreign.sum())} {where}",
            fontsize=10.5,
            weight="bold",
        )
    save_figure(fig, path)


def draw_models(scene, title, path):
    """One picture through every model: the first on a foreign colour that fools the first model, else the first on a foreign colour."""
    plt = start_drawing()
    names = list(scene["models"])
    wrong, foreign = fooled(scene, names[0])
    k = int((wrong.int() + foreign.int()).argmax())
    columns = min(len(names) + 1, 7)
    rows = -(-(len(names) + 1) // columns)  # rounded up
    fig, axes = plt.subplots(
        rows,
        columns,
        figsize=(max(1.6 * columns, 4.8), 2.0 * rows + 0.3),
        layout="constrained",
        squeeze=False,
    )
    picture, *others = axes.flat
    draw_picture(picture, scene, k)
    for ax, name in zip(others, names):
        draw_heat(ax, scene, name, k)
        ax.set_title(name, fontsize=10)
    for ax in others[len(names) :]:
        ax.axis("off")
    fig.suptitle(title, fontsize=12)
    save_figure(fig, path)


def draw_lift_flip(record, path):
    """One point per model: how often a new background changes its prediction, and the lift that its heat maps show."""
    plt = start_drawing()
    fig, ax = plt.subplots(figsize=(5.6, 4.0), layout="constrained")
    for (family, models), marker in zip(
        families(record["models"]).items(), itertools.cycle("osD^vPX*<>hp")
    ):
        points = [
            (m["flips"]["background"]["changed"]["rate"], m["maps"][record["split"]]["lift"])
            for m in models.values()
        ]
        flips, lifts = zip(*((flip, math.nan if lift is None else lift) for flip, lift in points))
        ax.scatter(
            flips,
            lifts,
            s=50,
            marker=marker,
            color=INK.get(family, "#777777"),
            edgecolor="white",
            label=family,
            zorder=3,
        )
    ax.axhline(1, color="black", lw=1, ls="--")
    ax.annotate("chance", (1, 1), (-4, 4), textcoords="offset points", fontsize=9, ha="right")
    ax.set_xlabel(
        "background flip rate: share of new backgrounds that change the prediction", fontsize=9
    )
    ax.set(
        xlim=(0, 1),
        ylim=(0, 1.1 * max(1.5, ax.get_ylim()[1])),
        ylabel="lift: heat on the digit / its area",
        title=f"What the maps show, what the model does ({record['split']})",
    )
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9)
    save_figure(fig, path)


def draw_sanity(record, path):
    """Rank correlation with the real maps against the number of layers with random weights; one dot per draw."""
    plt = start_drawing()
    steps = record["null"]["cascade"]
    draws = [[rho for rho in step["rank_correlation"] if rho is not None] for step in steps]
    means = [sum(rhos) / len(rhos) if rhos else math.nan for rhos in draws]
    fig, ax = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
    ax.plot(range(len(steps) + 1), [1, *means], color="#0072B2")
    for x, rhos in enumerate(draws, 1):
        ax.plot([x] * len(rhos), rhos, "o", ms=4, color="#0072B2", alpha=0.5)
    ax.axhline(0, color="black", lw=1, ls="--")
    ax.set_xticks(
        range(len(steps) + 1),
        ["none", *(("+ " if k else "") + step["randomised"][-1] for k, step in enumerate(steps))],
    )
    ax.set(
        xlabel="layers with random weights, from the output down",
        ylabel="rank correlation with the real map",
        ylim=(-0.5, 1.05),
        xlim=(-0.2, len(steps) + 0.2),
        title=f"What random layers leave of the maps of {record['null']['model']}",
    )
    ax.grid(alpha=0.3)
    save_figure(fig, path)


def draw_all(record, scenes, folder):
    """Every figure that there is data for; one whose data is missing stays as an earlier run left it."""
    args, can_repaint = record["args"], record["repainting"] is None
    path = lambda figure: folder / f"{stem_of(args['cam'])}_{figure}.png"
    cam = TITLES[args["cam"]]
    if "examples" in scenes:
        what = (
            "the same digits on their own and on a foreign colour"
            if can_repaint
            else f"the first pictures of {record['split']}"
        )
        draw_rows(scenes["examples"], f"{cam}: {what}", path("examples"))
        draw_models(scenes["examples"], f"{cam}: one picture, every model", path("models"))
    if "ten_colours" in scenes:
        draw_rows(
            scenes["ten_colours"],
            f"{cam}: a {args['digit']} on ten colours, nothing else changes",
            path("ten_colours"),
        )
    if can_repaint:
        draw_lift_flip(record, path("lift_flip"))
    draw_sanity(record, path("sanity"))


# ---------------------------------------------------------------- the write-up

HEAT_KEY = (
    "Bright is hot, each map up to its own maximum; no heat: the map is nowhere positive; blue line: outline of the digit. "
    "Below: ✓ or bold ✗, the predicted class and its probability."
)
CAPTIONS = {  # figure: (alternative text, caption)
    "examples": (
        "Heat maps of digits on their own and on a foreign colour",
        f"The first digit of five classes on two colours each. What to see: whether the heat moves from digit to background when the answer follows the colour. {HEAT_KEY}",
    ),
    "ten_colours": (
        "Heat maps of one digit on ten colours",
        f"The first such digit of the split on every colour. What to see: one digit, several answers where a net is lazy, one where it is cured. {HEAT_KEY}",
    ),
    "models": (
        "One picture through every model",
        f"The first example on a foreign colour that fools the first model. {HEAT_KEY}",
    ),
    "lift_flip": (
        "Lift against background flip rate",
        "What the maps suggest against what the model does; one point per model. What to see: nets that lie far apart in what changes their answer (sideways) overlap in where the heat is (upwards).",
    ),
    "sanity": (
        "Rank correlation after randomising layers",
        "What random weights leave of the maps; one dot per draw, the line is the mean. What to see: a map worth having would fall to zero at the first step.",
    ),
}


def stem_of(cam):
    """File names begin with it: gradcam, gradcam_hirescam, gradcam_gradcampp."""
    return "gradcam" if cam == "gradcam" else f"gradcam_{cam.replace('+', 'p')}"


def rate_cell(rates):
    """'0.543 (0.533 to 0.553)' for one model with its interval, mean ± sd (n) for several seeds."""
    interval = (
        " ({:.3f} to {:.3f})".format(*rates[0]["interval"])
        if len(rates) == 1 and rates[0]["n"]
        else ""
    )
    return mean_sd([r["rate"] for r in rates]) + interval


def from_to(groups, value):
    """'0.140 (jitter) to 0.612 (baseline)': the families with the lowest and the highest mean of value(model record)."""
    known = {
        family: [value(m) for m in models if value(m) is not None]
        for family, models in groups.items()
    }
    means = {family: sum(values) / len(values) for family, values in known.items() if values}
    ends = dict.fromkeys((min(means, key=means.get), max(means, key=means.get))) if means else {}
    return " to ".join(f"{means[family]:.3f} ({family})" for family in ends) or "unknown"


def maps_table(groups, null):
    def row(model, pictures, maps):
        medians = [m["lift_quartiles"] and m["lift_quartiles"][1] for m in maps]
        return [
            model,
            pictures,
            f"{sum(m['n'] for m in maps):,}",
            f"{sum(m['zero_maps'] for m in maps):,}",
            *(mean_sd([m[key] for m in maps]) for key in ("area", "share", "lift")),
            mean_sd(medians),
            rate_cell([m["pointing"] for m in maps]),
        ]

    rows = [
        row(family, pictures, [m["maps"][pictures] for m in models])
        for family, models in groups.items()
        for pictures in models[0]["maps"]
    ]
    rows += [
        row(label, "", [null[key]])
        for label, key in (("*random map*", "random_map"), ("*uniform map*", "uniform_map"))
    ]
    return markdown(
        [
            "model",
            "pictures",
            "n",
            "all-zero maps",
            "digit area",
            "heat share",
            "lift",
            "median lift",
            "pointing game",
        ],
        rows,
    )


FLIPS = {
    "background flip": ("background", "changed"),
    "any of nine": ("background", "any"),
    "follows colour": ("background", "follows"),
    "digit flip": ("digit", "changed"),
    "follows digit": ("digit", "follows"),
}


def flips_table(groups):
    rows = [
        [
            family,
            *(rate_cell([m["flips"][kind][key] for m in models]) for kind, key in FLIPS.values()),
            mean_sd([m["lift_flip_correlation"] for m in models]),
        ]
        for family, models in groups.items()
    ]
    return markdown(["model", *FLIPS, "ρ"], rows)


def cascade_table(null):
    n = null["n"] * null["draws"]
    return markdown(
        ["random layers", "rank correlation", "lift", "pictures left out"],
        [
            [
                ", ".join(step["randomised"]),
                mean_sd(step["rank_correlation"]),
                mean_sd(step["lift"]),
                f"{step['without']:,} of {n:,}",
            ]
            for step in null["cascade"]
        ],
    )


def report(args):
    stem, again = stem_of(args.cam), f"run: python gradcam.py --dir {args.dir} --cam {args.cam}"
    record, data = (
        load_json(
            args.dir / f"{stem}.json", again, "args", "split", "repainting", "models", "null"
        ),
        args.dir / f"{stem}.pt",
    )
    record["models"] = {
        name: record["models"][name] for name in record["args"]["models"]
    }  # the file has them by alphabet
    draw_all(record, load_pt(data, again) if data.exists() else {}, args.dir / "figures")
    groups = {
        family: list(models.values()) for family, models in families(record["models"]).items()
    }
    split, null = record["split"], record["null"]
    print(
        "## Where does it look?\n"
        + (f"\n### The same by {TITLES[args.cam]}\n" if args.cam != "gradcam" else "")
    )
    print(
        f"Where the heat is: {TITLES[args.cam]} of the {record['args']['target']} class; mean ± sd over (n) seeds, or one model with its "
        "95 % interval. Lift is heat share / digit area of a picture, 1 is chance. Pictures with an all-zero map have none and enter no mean. "
        "Aligned and conflicting: own-colour and foreign-colour pictures of test_unbiased. The chance level of the pointing game is that of "
        "random maps, since upsampling pulls the hottest pixel to the border.\n"
    )
    print(maps_table(groups, null))
    lift = from_to(groups, lambda m: m["maps"][split]["lift"])
    print(
        f"On {split} the mean lift is {lift}, that of random maps {null['random_map']['lift']:.3f}.\n"
    )
    if record["repainting"] is None:
        flip = lambda kind: from_to(groups, lambda m: m["flips"][kind]["changed"]["rate"])
        print(
            f"What the prediction depends on: {split} with every digit on the other nine backgrounds (background flip: share of new "
            "backgrounds that change the prediction; any of nine: share of pictures with such a background; follows colour: share predicted "
            "as the class that owns the new colour, where that is not the digit's), and with another digit on every background (digit flip; "
            "follows digit: share predicted as the new digit). Intervals count pictures. ρ: Spearman correlation, over pictures, of lift "
            "and background flip; heat maps that know of the cheating would come near -1.\n"
        )
        print(flips_table(groups))
        print(
            f"A new background alone changes {flip('background')} of the predictions, a new digit alone {flip('digit')}; "
            f"ρ is {from_to(groups, lambda m: m['lift_flip_correlation'])}.\n"
        )
    else:
        print(f"No flip rates: {record['repainting']}.\n")
    print(
        f"What a map is worth: {null['model']} with random weights in some layers, first {null['n']:,} pictures, mean ± sd over (n) draws. "
        "Rank correlation with the real map; pictures where either map is constant are left out.\n"
    )
    print(cascade_table(null))
    last = null["cascade"][0]
    print(
        f"Random weights in {last['randomised'][0]} alone leave a rank correlation of {mean_sd(last['rank_correlation'])}.\n"
    )
    residuals = [m["residual"] for m in record["models"].values() if m["residual"]]
    if residuals:
        gap = {cam: max(r[cam]["max"] for r in residuals) for cam in residuals[0]}
        print(
            f"Does the unrectified map sum to logit minus bias? Largest gap over {split} and {len(residuals)} models, float32: "
            f"{gap['hirescam']:.1e} for HiResCAM, {gap['gradcam']:.1f} for Grad-CAM.\n"
        )
    for figure, (alternative, caption) in CAPTIONS.items():
        if (args.dir / "figures" / f"{stem}_{figure}.png").exists():
            print(f"![{alternative}](figures/{stem}_{figure}.png)\n\n*{caption}*\n")


# ---------------------------------------------------------------- the command


def get_args(argv=None):
    p = Parser(__doc__)
    g = p.add_argument_group("on what")
    g.add_argument(
        "--models",
        type=model_name,
        nargs="+",
        default=["baseline_s42", "jitter_s42"],
        metavar="NAME",
        help="DIR/NAME.pt (default: baseline_s42 jitter_s42)",
    )
    g.add_argument(
        "--split",
        choices=SPLITS[1:],
        default="test_hard",
        help="for flips, null rows and figures (default: test_hard)",
    )
    g.add_argument(
        "--digit", type=whole(0, 999), default=1, help="shown on ten colours (default: 1)"
    )
    g = p.add_argument_group("heat map")
    g.add_argument("--cam", choices=CAMS, default="gradcam", help="its kind (default: gradcam)")
    g.add_argument(
        "--layer",
        metavar="NAME",
        help="target layer, dotted (default: SimpleCNN's last ReLU; in ResNets the deepest stage at least 4 pixels wide)",
    )
    g.add_argument(
        "--target",
        choices=("predicted", "label"),
        default="predicted",
        help="class whose logit is explained (default: predicted)",
    )
    common_args(p, seed_of="textures, digit partners and the null rows")
    args = p.parse_args(argv)
    args.models = list(dict.fromkeys(args.models))
    return args


def load_world(args, device):
    """{name: Split} of --split and test_unbiased, which has both aligned and conflicting pictures."""
    splits = load_splits(args.dir, dict.fromkeys((args.split, "test_unbiased")), device)
    for name, split in splits.items():
        if split.gray is None:
            die(
                f"{args.dir}/{name}.pt has no gray, so nothing says which pixels are digit",
                "add gray, uint8 (N,H,W), or use make_data.py",
            )
    digits = splits[args.split].labels.unique().tolist()
    if args.digit not in digits:
        die(
            f"--digit {args.digit} is not in {args.split}",
            f"choose one of {', '.join(map(str, digits))}",
        )
    return splits


def look_at(subject, splits, args):
    """(what one model's heat maps say, as a JSON record; lift of each image of --split)."""
    model, layer, scores = subject.model, subject.target_layer, {}
    record = {
        "method": subject.checkpoint["args"]["method"],
        "seed": subject.checkpoint["args"]["seed"],
        "layer": subject.layer,
        "map_size": list(subject.size),
        "flips": None,
        "lift_flip_correlation": None,
        "residual": None,
    }
    for name, split in splits.items():
        heat = heat_of(
            model, layer, split, args.cam, split.labels if args.target == "label" else None
        )
        scores[name] = heat_scores(heat.maps, split.gray.cpu())
        if name == args.split:
            record["acc"] = rate(heat.predicted == split.labels.cpu())
    record["maps"] = {args.split: summary(scores[args.split])}
    both = splits["test_unbiased"]
    if both.colors is not None:
        own = (both.colors == both.labels).cpu()
        record["maps"]["aligned"] = summary(scores["test_unbiased"], own)
        record["maps"]["conflicting"] = summary(scores["test_unbiased"], ~own)
    if isinstance(model, SimpleCNN) and subject.layer == "relu":  # a linear head follows
        record["residual"] = completeness(model, layer, splits[args.split])
    return record, scores[args.split].lift


def measure(subjects, splits, recipe, args):
    """({name: JSON record}, {name: seconds}) of every model: its heat maps and, where `recipe` says how to repaint, its flip rates."""
    models, seconds, split, began = {}, {}, splits[args.split], time.time()
    if recipe:
        predictions, partner = counterfactuals(
            {name: s.model for name, s in subjects.items()}, split, recipe, args.seed
        )
        print(
            f"{args.split} repainted on {len(palette_of(recipe))} colours for {len(subjects)} models in {time.time() - began:.1f}s",
            flush=True,
        )
    for name, subject in subjects.items():
        began = time.time()
        models[name], lift = look_at(subject, splits, args)
        heat = models[name]["maps"][args.split]
        line = f"{name:16s}  {subject.layer} {subject.size[0]}x{subject.size[1]}  lift {fmt(heat['lift'])}  all-zero maps {heat['zero_maps']:5d}"
        if recipe:
            flips, changed = flip_rates(
                *predictions[name], partner, split.labels.cpu(), split.colors.cpu()
            )
            rho = spearman(lift[~lift.isnan()], changed[~lift.isnan()]).item()
            models[name] |= {
                "flips": flips,
                "lift_flip_correlation": rho if math.isfinite(rho) else None,
            }
            line += f"  background flip {fmt(flips['background']['changed']['rate'])}  digit flip {fmt(flips['digit']['changed']['rate'])}"
        seconds[name] = round(time.time() - began, 2)
        print(f"{line}  {seconds[name]:5.1f}s", flush=True)
    return models, seconds


def main(argv=None):
    args = get_args(argv)
    if args.report:
        return report(args)
    device = setup(args)
    same_row = [
        name
        for name in args.models
        if [family_of(n) for n in args.models].count(family_of(name)) > 1
    ]
    if same_row:
        die(
            f"--models {' and '.join(same_row)} would share one row",
            "save one of them under another --name",
        )
    with alone(args.dir / f"{stem_of(args.cam)}.json"):
        look(args, device)


def look(args, device):
    """Measure and draw all models, and write it down."""
    start, splits = time.time(), load_world(args, device)
    split, first = splits[args.split], args.models[0]
    subjects = {
        name: load_subject(args.dir, name, args.layer, splits, device) for name in args.models
    }
    recipe, obstacle = recipe_of(args.dir, split)
    if obstacle:
        print(f"no flip rates: {obstacle}", flush=True)
    models, seconds = measure(subjects, splits, recipe, args)
    null = null_rows(first, subjects[first], split, args)
    scenes = {"examples": scene(example_pictures(split, recipe, args.seed), subjects, recipe, args)}
    if recipe:
        scenes["ten_colours"] = scene(
            ten_colours(split, args.digit, recipe, args.seed), subjects, recipe, args
        )
    settings = {
        key: value
        for key, value in vars(args).items()
        if key not in ("dir", "device", "threads", "report")
    }
    facts = {
        "seconds": round(time.time() - start, 1),
        "seconds_per_model": seconds,
        "torch": torch.__version__,
        "threads": args.threads,
        "device": str(device),
    }
    record = {
        "schema": 1,
        "script": "gradcam.py",
        "args": settings,
        "split": args.split,
        "repainting": obstacle,
        "models": models,
        "null": null,
        "run": facts,
    }
    path = args.dir / f"{stem_of(args.cam)}.json"
    save_pt(scenes, path.with_suffix(".pt"))
    save_json(record, path)
    draw_all(record, scenes, args.dir / "figures")
    print(
        f"wrote {path}, {path.stem}.pt and figures/{path.stem}_*.png in {time.time() - start:.1f}s"
    )


if __name__ == "__main__":
    run(main)
