"""Show where a model looks, measure it, and ask by repainting what the model really uses.

Reads   DIR/test_hard.pt, meta.json (from make_data.py), DIR/NAME.pt (from train.py)
Writes  DIR/gradcam.json, DIR/gradcam.pt (maps that the figures show), DIR/figures/gradcam_*.png;
        names say which settings differ from the defaults: gradcam_val_hirescam.json

    python gradcam.py                                       # the lazy model and the cured one
    python gradcam.py --cam hirescam --digit 7
    python gradcam.py --models jitter_s42 jitter_s43 --split val --name two
    python gradcam.py --maximise                            # what each answer wants to see
    python gradcam.py --image my_digit.png                  # one picture of your own
    python gradcam.py --report                              # figures and tables, from the files

A heat map is a suggestion: it can miss a shortcut or show one that is not there (Adebayo et al.,
2022). So each map is held against the area it could hit by chance, against nets with random
weights, and against flip rates: how often the prediction changes when nothing but the background
changes, and how often when nothing but the digit does.
"""

import argparse
import contextlib
import copy
import itertools
import math
import re
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from common import (
    INK,
    PALETTES,
    SPLITS,
    SimpleCNN,
    Split,
    build_model,
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
    paint,
    predict,
    progress,
    row_of,
    run,
    save_figure,
    save_json,
    save_pt,
    setup,
    stream,
    wilson,
)

DIGIT_PIXEL = 0.1  # brighter than this before painting, a pixel is digit
BATCH = 500  # images; small enough for a ResNet-50, large enough for the tiny net
SANITY_IMAGES, SANITY_DRAWS = 1000, 5  # the cascade: images of the split, sets of random weights
ROWS = 2  # models in the figures of heat maps
STARTS = 3  # pictures that --maximise finds for each class


def get_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = p.add_argument_group("on what").add_argument
    usual = ["baseline_s42", "jitter_s42"]
    add("--models", nargs="+", default=usual, metavar="NAME", help=f"or a .pt ({' '.join(usual)})")
    add("--split", choices=SPLITS[1:], default="test_hard", help="that is shown (test_hard)")
    add("--digit", type=number(int, 0, 999), default=1, help="shown on ten colours (1)")
    add("--maximise", action="store_true", help="find the pictures that each class wants to see")
    add("--image", type=Path, metavar="FILE", help="show one picture of your own instead")
    add("--name", help="the files are gradcam_NAME (default: what differs from the defaults)")
    add = p.add_argument_group("heat map").add_argument
    add("--cam", choices=CAMS, default="gradcam", help="its kind (gradcam)")
    add("--layer", metavar="NAME", help="dotted (default: the deepest at least 4 pixels wide)")
    explained = "class whose logit is explained (predicted)"
    add("--target", choices=("predicted", "label"), default="predicted", help=explained)
    common_args(p, seed_of="textures, digit partners and the null rows")
    return p.parse_args(argv)


def main(argv=None):
    args = get_args(argv)
    if args.report:
        return report(args)
    device = setup(args)
    stems = [Path(name).name.removesuffix(".pt") for name in args.models]
    if len(set(stems)) < len(stems):
        what = f"--models {' '.join(args.models)}: two would share one row"
        die(what, "save one under another --name")
    if args.name and not re.fullmatch(r"(?!hirescam|gradcampp|maximise)\w{1,60}", args.name, re.A):
        what = f"--name {args.name!r} must be letters, digits and _, and no kind of map"
        die(what, "choose another name")
    if args.image and (args.maximise or args.name):
        die("--image draws one figure, so --maximise and --name mean nothing", "leave them out")
    if args.maximise or args.image:
        usual = get_args([])
        for flag in ("split", "digit", "target", "cam", "layer"):
            if getattr(args, flag) != getattr(usual, flag):
                die(f"--{flag} means nothing for --maximise and --image", "leave it out")
    if args.maximise:
        look_for(args, device)
    elif args.image:
        look_at_image(args, device)
    else:
        look(args, device)


# ---- heat maps


@contextlib.contextmanager
def captured(module):
    """Inside `with`, seen["map"] is the module's output, a leaf where gradients end.

    What follows gets a copy, so an in-place ReLU cannot alter it. The hook is gone afterwards.
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
    """Activation of `layer` and the gradient of one logit per image with respect to it.

    x float (B,3,H,W) in [0, 1]; `target` (B,), None explains the predicted class. In eval mode
    images do not mix, so the gradient of the sum holds every image's own.
    """
    with captured(layer) as seen, torch.enable_grad():
        logits = model(x)
    target = logits.argmax(1) if target is None else target
    (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), seen["map"])
    return Explained(seen["map"].detach(), gradient, logits.detach(), target)


def gradcam(activation, gradient):
    """Channels weighted by their mean gradient (Selvaraju et al., 2017).

    (B,C,h,w) twice to (B,h,w), before the ReLU; so do the others.
    """
    return (gradient.mean((2, 3), keepdim=True) * activation).sum(1)


def hirescam(activation, gradient):
    """Every position weighted by its own gradient (Draelos & Carin, 2020).

    Before a linear head the map sums to logit minus bias.
    """
    return (gradient * activation).sum(1)


def gradcam_pp(activation, gradient):
    """Channels weighted by their positive gradients (Chattopadhay et al., 2018).

    A coefficient per position, the paper's for the score exp(logit) without that factor, which is
    the same for a whole map.
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
    confidence: torch.Tensor  # float (N,): its probability


def heat_of(subject, split, cam, targets=None):
    """Heat maps of a split, gathered on the CPU; `targets` (N,), None explains the prediction."""
    parts = []
    for index in chunks(len(split.labels), BATCH):
        target = None if targets is None else targets[index].to(split.images.device)
        e = explain(subject.model, subject.target_layer, split.x(index), target)
        confidence, predicted = e.logits.softmax(1).max(1)
        maps = CAMS[cam](e.activation, e.gradient).relu()
        parts.append(Heat(maps, predicted, confidence))
    return Heat(*(torch.cat(column).cpu() for column in zip(*parts, strict=True)))


def upsample(maps, size):
    """(N,h,w) to (N,H,W), bilinear."""
    return F.interpolate(maps[:, None], tuple(size), mode="bilinear", align_corners=False)[:, 0]


# ---- models and layers


class Subject(NamedTuple):
    model: torch.nn.Module
    checkpoint: dict  # as train.py saved it
    layer: str  # dotted name of the target layer
    size: tuple  # (h, w) of its map

    @property
    def target_layer(self):
        return self.model.get_submodule(self.layer)


def load_subject(args, name, split, device):
    """A model with its target layer, checked against the split that it is shown."""
    model, checkpoint = load_model(args.dir, name, device)
    size, classes = list(split.images.shape[2:]), int(split.labels.max()) + 1
    if list(checkpoint["size"]) != size or checkpoint["classes"] < classes:
        built = f"{checkpoint['classes']} classes of {checkpoint['size']} pixels"
        what = f"{name} is built for {built}, but {args.split} has {classes} of {size}"
        die(what, "train it on this world or point --dir to its own")
    return Subject(model, checkpoint, *find_layer(model, args.layer, split, name))


def find_layer(model, name, split, owner):
    """(dotted name, (h, w)) of the target layer; None takes the deepest at least 4 pixels wide.

    That is SimpleCNN's last ReLU; in a ResNet 28x28 pixels end as a single one.
    """
    modules, least = dict(model.named_modules()), 2 if name else 4
    deepest = ["relu"] if isinstance(model, SimpleCNN) else ["layer4", "layer3", "layer2", "layer1"]
    for layer in [name] if name else deepest:
        if layer in modules:
            with captured(modules[layer]) as seen:
                model(split.x(slice(1)))
            size = tuple(seen["map"].shape[2:]) if "map" in seen else ()
            if len(size) == 2 and max(size) >= least:
                return layer, size
    layers = ", ".join(layer for layer, _ in model.named_children())
    where = f" at --layer {name}" if name else ""
    die(f"{owner} has no map {least} pixels wide{where}", f"its layers are {layers}")


# ---- how much of the heat is on the digit


class Scores(NamedTuple):
    """One number per image, double (N,); NaN where the map is all zero or there is no digit."""

    share: torch.Tensor  # of the heat that lies on digit pixels
    area: torch.Tensor  # of the picture that digit pixels cover: the share of a uniform map
    pointing: torch.Tensor  # is the hottest pixel on the digit; equally hot ones count in parts

    @property
    def lift(self):
        return self.share / self.area


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
        share = (heat * digit).sum((1, 2)) / total
        pointing = (hottest * digit).sum((1, 2)) / hottest.sum((1, 2))
        per_image = torch.stack([share, area, pointing])
        per_image[:, (total == 0) | (area == 0)] = torch.nan
        parts.append(per_image)
    return Scores(*torch.cat(parts, dim=1))


def summary(scores):
    """Means and quartiles over the images; those without a score are counted, not averaged."""
    scored = ~scores.share.isnan()
    share, lift = scores.share[scored], scores.lift[scored]
    return {
        "n": len(scored),
        "zero_maps": int((~scored).sum()),
        "area": mean(scores.area[scored]),
        "share": mean(share),
        "share_quartiles": quartiles(share),
        "lift": mean(lift),
        "lift_quartiles": quartiles(lift),
        "pointing": rate(scores.pointing[scored]),
    }


def mean(values):
    """The mean as a float; None of nothing."""
    return values.cpu().double().mean().item() if len(values) else None


def quartiles(values):
    """[lower quartile, median, upper quartile] of doubles; None of nothing."""
    points = torch.tensor([0.25, 0.5, 0.75]).double()
    return torch.quantile(values, points).tolist() if len(values) else None


def rate(values):
    """Mean of one value in [0, 1] per image with a 95 % Wilson interval; k of yes or no.

    The interval counts images: for a share of an image's nine colours it is rather too wide.
    """
    k = values.double().sum().item()
    low, high = wilson(k, len(values))
    count = {"k": int(k)} if values.dtype == torch.bool else {}
    return {**count, "n": len(values), "rate": mean(values), "low": low, "high": high}


def completeness(subject, split):
    """How far the sum of the unrectified map is from logit minus bias, in logits, per kind.

    HiResCAM leaves nothing over where a linear head follows the layer, as in SimpleCNN.
    """
    left, bias = {"gradcam": [], "hirescam": []}, subject.model.fc.bias.detach()
    for index in chunks(len(split.labels), BATCH):
        e = explain(subject.model, subject.target_layer, split.x(index))
        wanted = e.logits.gather(1, e.target[:, None])[:, 0] - bias[e.target]
        for cam, parts in left.items():
            parts.append((wanted - CAMS[cam](e.activation, e.gradient).sum((1, 2))).abs().cpu())
    gaps = {cam: torch.cat(parts) for cam, parts in left.items()}
    return {cam: {"max": gap.max().item(), "mean": mean(gap)} for cam, gap in gaps.items()}


def ranks(values):
    """Ranks along the last dimension, from 0.5; equal values share their average rank."""
    ordered = values.sort(dim=-1).values
    below = torch.searchsorted(ordered, values)
    return (below + torch.searchsorted(ordered, values, right=True)).double() / 2


def spearman(a, b):
    """Rank correlation along the last dimension (Spearman, 1904); NaN where a side is constant."""
    a, b = (r - r.mean(-1, keepdim=True) for r in (ranks(a), ranks(b)))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


# ---- what the model really uses: repaint and ask again


def recipe_of(folder, labels, colours):
    """(recipe and sigma2 as keywords of `paint`, None), or (None, why nothing is repainted).

    labels and colours (N,) of what is to be repainted; colours may be None.
    """
    path = folder / "meta.json"
    if colours is None or not path.exists():
        return None, f"they need colors in the split and {path}"
    meta = load_json(path, "delete it")
    recipe = {"recipe": meta.get("recipe"), "sigma2": meta.get("sigma2")}
    palette = PALETTES.get(str(recipe["recipe"]), {})
    if not palette:
        return None, f"{path} names the recipe {recipe['recipe']!r}, not {' or '.join(PALETTES)}"
    today = [[name, list(bytes.fromhex(colour[1:]))] for name, colour in palette.items()]
    if meta.get("palette", today) != today:
        return None, f"{folder} was painted with another palette than today's, paint it again"
    last = max(int(colours.max()), int(labels.max()))
    if last >= len(palette):
        return None, f"classes run to {last}, but the palette ends at {len(palette) - 1}"
    return recipe, None


def repaint(split, colours, recipe, seed):
    """The same digits on other colours; one texture per place in the split, on every colour."""
    images = paint(split.gray.cpu(), colours.cpu(), stream(seed, "texture"), **recipe)
    images = images.to(split.images.device, memory_format=torch.channels_last)
    return split._replace(images=images, colors=colours)


def counterfactuals(models, split, recipe, seed):
    """({name: (on_colour (N,10), swapped (N,))}, partner (N,)): predictions after repainting.

    Every digit on every colour, and its partner's digit on its own background. Each painting is
    made once and shown to all models.
    """
    on_colour = {name: [] for name in models}
    names = list(PALETTES[recipe["recipe"]])
    for c, colour in enumerate(names):
        progress(f"every digit on {colour}, colour {c + 1} of {len(names)}")
        painted = repaint(split, torch.full_like(split.labels, c), recipe, seed)
        for name, model in models.items():
            on_colour[name].append(predict(model, painted).cpu())
    progress("another digit on every background")
    partner = torch.randperm(len(split.labels), generator=stream(seed, "partner"))
    swapped = repaint(split._replace(gray=split.gray[partner]), split.colors, recipe, seed)
    answers = {
        name: (torch.stack(columns, dim=1), predict(models[name], swapped).cpu())
        for name, columns in on_colour.items()
    }
    return answers, partner


def flip_rates(on_colour, swapped, partner, labels, colours):
    """(rates, background flip rate of each image (N,)), against the prediction on its own colour.

    Background: the other nine colours under the same digit; `follows` is the share predicted as
    the class that owns the new colour, where that is not the label. Digit: the partner's digit on
    the same background, where its label differs.
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


# ---- null rows: what a map scores that knows nothing


def null_rows(name, subject, split, args):
    """Scores of noise, of a constant, and of the maps of nets with random weights."""
    gray = split.gray.cpu()
    noise = torch.rand(len(gray), *subject.size, generator=stream(args.seed, "random maps"))
    part = split.take(slice(SANITY_IMAGES))
    progress(f"null rows: {name} with random weights")
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
    """Cascading randomisation (Adebayo et al., 2018): fresh weights from the output down.

    The explained class stays the real model's prediction. Rank correlation of the rectified maps,
    mean over images; `without` counts those where a map is constant. One number per draw.
    """
    real = heat_of(subject, split, cam)
    children = [n for n, child in subject.model.named_children() if list(child.parameters())][::-1]
    steps = [
        {"randomised": children[: k + 1], "rank_correlation": [], "lift": [], "without": 0}
        for k in range(len(children))
    ]
    for draw in range(SANITY_DRAWS):
        fresh = random_net(subject.checkpoint, stream(seed, f"random weights {draw}"))
        fresh.to(split.images.device).eval()
        hybrid = subject._replace(model=copy.deepcopy(subject.model))
        for step in steps:
            layer = step["randomised"][-1]
            setattr(hybrid.model, layer, getattr(fresh, layer))
            maps = heat_of(hybrid, split, cam, real.predicted).maps
            correlation = spearman(real.maps.flatten(1), maps.flatten(1))
            step["rank_correlation"].append(mean(correlation[~correlation.isnan()]))
            step["lift"].append(summary(heat_scores(maps, split.gray.cpu()))["lift"])
            step["without"] += int(correlation.isnan().sum())
    return steps


def random_net(checkpoint, gen):
    """A net like the checkpoint's whose weights know nothing."""
    kind = checkpoint["args"]
    torch.manual_seed(gen.initial_seed())
    shape = checkpoint["classes"], checkpoint["size"]
    return build_model(kind["model"], kind["width"], *shape, kind.get("grayscale", False))


# ---- the pictures that the figures show


def paintings(split, choice, recipe, args):
    """A Split of the pictures at [(index, colour), ...], all with one texture."""
    each = []
    for i, c in choice:
        one = split.take([i])
        each.append(repaint(one, torch.full_like(one.labels, c), recipe, args.seed))
    return Split(*(torch.cat(column) for column in zip(*each, strict=True)))


def scene(title, pictures, subjects, args, palette=None):
    """Pictures and what models make of them: tensors and strings fit for save_pt."""
    labels = pictures.labels.cpu()
    targets = labels if args.target == "label" else None
    foreign, below = torch.ones_like(labels).bool(), [str(label) for label in labels.tolist()]
    if palette:
        colours = pictures.colors.cpu()
        foreign = colours != labels
        below = [f"{label} on {palette[c]}" for label, c in zip(below, colours, strict=True)]
    heat = {name: heat_of(s, pictures, args.cam, targets) for name, s in subjects.items()}
    return {
        "title": f"{TITLES[args.cam]}: {title}",
        "images": pictures.images.cpu().contiguous(),
        "gray": pictures.gray.cpu(),
        "labels": labels,
        "foreign": foreign,
        "below": below,
        "models": {name: seen._asdict() for name, seen in heat.items()},
    }


def firsts_of(names):
    """The first name of each row."""
    firsts = {row_of(name): name for name in reversed(names)}
    return [name for name in names if name in firsts.values()]


def scenes_of(subjects, split, recipe, args):
    """{figure: scene} of the first model of each of the first two rows.

    Five digits, each on its own and on its foreign colour, and one digit on every colour.
    """
    few = {name: subjects[name] for name in firsts_of(subjects)[:ROWS]}
    if recipe is None:
        title = f"the first pictures of {args.split}"
        return {"examples": scene(title, split.take(slice(10)), few, args)}
    labels, colours = split.labels.tolist(), split.colors.tolist()
    palette = list(PALETTES[recipe["recipe"]])
    foreign = [i for i in range(len(labels)) if colours[i] != labels[i]] or [0]
    five = sorted({labels[i]: i for i in reversed(foreign)}.values())[:5]
    pairs = paintings(split, [(i, c) for i in five for c in (labels[i], colours[i])], recipe, args)
    one = labels.index(args.digit)
    ten = paintings(split, [(one, c) for c in range(len(palette))], recipe, args)
    titles = "digits on their own and on a foreign colour", f"one {args.digit} on ten colours"
    return {
        "examples": scene(titles[0], pairs, few, args, palette),
        "ten_colours": scene(titles[1], ten, few, args, palette),
    }


# ---- figures


def draw_rows(rows, path):
    """A titled row of pictures each: rows [(title, [(pixels, gray or None, what stands below)])].

    Pixels (3,H,W) are a picture, (H,W) a heat map up to its own maximum, with the outline of the
    digit in `gray`; what begins with ✗ is bold.
    """
    columns = max(len(cells) for _, cells in rows)
    size = max(1.12 * columns + 0.2, 5), 1.62 * len(rows) + 0.1
    fig = Figure(figsize=size, layout="constrained")
    parts = fig.subfigures(len(rows), squeeze=False)[:, 0]
    for part, (title, cells) in zip(parts, rows, strict=True):
        part.suptitle(title, fontsize=10.5, weight="bold")
        axes = part.subplots(1, columns, squeeze=False)[0]
        for ax in axes[len(cells) :]:
            ax.axis("off")
        for ax, (pixels, gray, below) in zip(axes, cells, strict=False):
            if pixels.ndim == 3:
                ax.imshow(pixels.permute(1, 2, 0).numpy())
            else:
                ax.imshow(pixels.numpy(), cmap="inferno", vmin=0, vmax=pixels.max().item() or 1)
                if pixels.max() == 0:
                    ax.set_title("no heat", color="white", fontsize=8, y=0.8)
            if gray is not None and gray.min() < 255 * DIGIT_PIXEL < gray.max():
                edge = [255 * DIGIT_PIXEL]
                ax.contour(gray.numpy(), levels=edge, colors="#56B4E9", linewidths=0.8)
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(below, weight="bold" if below.startswith("✗") else "normal")
    save_figure(fig, path)


def draw_scene(scene, path):
    """Pictures, then the maps of a model a row; its title counts the colours that fooled it.

    Under a map: ✓ or a bold ✗, the predicted class and its probability.
    """
    gray, foreign, nothing = scene["gray"], scene["foreign"], [None] * len(scene["below"])
    rows = [(scene["title"], list(zip(scene["images"], nothing, scene["below"], strict=True)))]
    for name, seen in scene["models"].items():
        wrong = seen["predicted"] != scene["labels"]
        says = zip(wrong, seen["predicted"], seen["confidence"], strict=True)
        below = [f"{'✗' if w else '✓'} {answer} ({sure:.2f})" for w, answer, sure in says]
        title = f"{name}: fooled on {(wrong & foreign).sum()} of {foreign.sum()}"
        maps = upsample(seen["maps"], gray.shape[1:])
        rows.append((title, list(zip(maps, gray, below, strict=True))))
    draw_rows(rows, path)


def draw_lift_flip(record, path):
    """A point per model: how often a new background changes its answer, and its maps' lift."""
    fig = Figure(figsize=(5.6, 4.0), layout="constrained")
    ax = fig.subplots()
    for (row, cells), marker in zip(looks(record).items(), itertools.cycle("osD^vPX*<>hp")):
        if cells["background flip"]:
            lifts = [math.nan if lift is None else lift for lift in cells["lift"]]
            look = {"s": 50, "marker": marker, "edgecolor": "white", "zorder": 3, "label": row}
            ax.scatter(cells["background flip"], lifts, color=INK.get(row, "#777777"), **look)
    ax.axhline(1, color="black", lw=1, ls="--")
    ax.annotate("uniform map", (1, 1), (-4, 4), textcoords="offset points", fontsize=9, ha="right")
    ax.set_xlabel("background flip rate: new backgrounds that change the prediction", fontsize=9)
    ax.set_ylabel(f"lift ({TITLES[record['args']['cam']]}): heat on the digit / its area")
    ax.set_title(f"What the maps show, what the model does ({record['split']})")
    ax.set(xlim=(0, 1), ylim=(0, 1.1 * max(1.5, ax.get_ylim()[1])))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9)
    save_figure(fig, path)


def draw_sanity(records, path):
    """Rank correlation with the real maps against random layers: a dot a draw, a line a kind."""
    fig = Figure(figsize=(5.6, 3.6), layout="constrained")
    ax = fig.subplots()
    for k, (cam, record) in enumerate(records.items()):
        steps = record["null"]["cascade"]
        draws = [[rho for rho in step["rank_correlation"] if rho is not None] for step in steps]
        means = [sum(rhos) / len(rhos) if rhos else math.nan for rhos in draws]
        ink = ("#0072B2", "#D55E00", "#009E73")[k]
        ax.plot(range(len(steps) + 1), [1, *means], color=ink, label=TITLES[cam])
        for x, rhos in enumerate(draws, 1):
            ax.plot([x + 0.05 * k] * len(rhos), rhos, "osD"[k], color=ink, ms=4, alpha=0.5)
    layers = [step["randomised"][-1] for step in steps]
    ax.set_xticks(range(len(steps) + 1), ["none", layers[0], *(f"+ {n}" for n in layers[1:])])
    ax.axhline(0, color="black", lw=1, ls="--")
    ax.set_xlabel("layers with random weights, from the output down")
    ax.set_ylabel("rank correlation with the real map")
    ax.set_title(f"What random layers leave of the maps of {record['null']['model']}")
    ax.set(ylim=(-0.5, 1.05), xlim=(-0.2, len(steps) + 0.3))
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9)
    save_figure(fig, path)


def draw_all(folder, stem, records, kinds=("hirescam", "gradcam", "gradcam++")):
    """The figures of one stem from the files of all its kinds of map; returns their paths.

    Heat maps are of the first of `kinds` that is there. A figure without data stays as it is.
    """
    drawn = []

    def figure(name):
        drawn.append(folder / "figures" / f"{stem}_{name}.png")
        return drawn[-1]

    paths = [folder / f"{file_of(stem, cam)}.pt" for cam in kinds]
    for path in [path for path in paths if path.exists()][:1]:
        for name, shown in load_pt(path, "delete it").items():
            draw_scene(shown, figure(name))
    if records:
        record = next(iter(records.values()))
        draw_sanity(records, figure("sanity"))
        if record["repainting"] is None:
            draw_lift_flip(record, figure("lift_flip"))
    return drawn


# ---- files and tables


def stem_of(args):
    """What the kinds of map of the same settings share: gradcam, gradcam_val_digit7, ..."""
    head = "gradcam_maximise" if args.maximise else "gradcam"
    if args.name:
        return f"{head}_{args.name}"
    skip = ("models", "cam", "image", "name", "maximise")
    return name_of(head, args, get_args([]), skip).removesuffix("_s42")


def file_of(stem, cam):
    """gradcam, gradcam_hirescam, gradcam_val_gradcampp: the name of one kind's files."""
    return stem if cam == "gradcam" else f"{stem}_{cam.replace('+', 'p')}"


def load_records(folder, stem):
    """{cam: record} of the kinds of map that have been measured."""
    paths = {cam: folder / f"{file_of(stem, cam)}.json" for cam in CAMS}
    return {cam: load_json(path, "delete it") for cam, path in paths.items() if path.exists()}


def widest(folder):
    """{cam: the record with the most models}, as the tables of the write-up show."""
    found = {}
    for path in sorted(folder.glob("gradcam*.json")):
        record = load_json(path, "delete it")
        usual = record.get("split") == "test_hard" and record["args"].get("target") == "predicted"
        cam = record["args"].get("cam")
        if usual and len(record["models"]) > len(found.get(cam, {"models": ()})["models"]):
            found[cam] = record
    return {cam: found[cam] for cam in CAMS if cam in found}


def rows_of(record):
    """{row: its models' records, one per seed}, in the order of --models."""
    rows = {}
    for name in record["args"]["models"]:
        model = record["models"][name]
        failed = "" if model.get("trained", True) else " (did not train)"
        rows.setdefault(row_of(name) + failed, []).append(model)
    return rows


def looks(record):
    """{row: {measure: a number per seed}}, a row per method and two of maps that know nothing."""
    split, null = record["split"], record["null"]
    rows = rows_of(record)
    rows["random map"] = [{"maps": {split: null["random_map"]}}]
    rows["uniform map"] = [{"maps": {split: null["uniform_map"]}}]
    return {row: look_cells(models, split) for row, models in rows.items()}


def wants(record):
    """{row: {measure: a number per seed}} of the pictures that maximise a class."""
    rows = {**rows_of(record), "random weights": [record["null"]]}
    keys = sorted(record["null"])
    return {row: {key: [m[key] for m in models] for key in keys} for row, models in rows.items()}


def look_cells(models, split):
    """The numbers of one row; flips are missing where nothing was repainted."""
    maps = [m["maps"][split] for m in models]
    flips = [m["flips"] for m in models if m.get("flips")]
    return {
        "accuracy": [m["acc"]["rate"] for m in models if "acc" in m],
        "all-zero maps": [m["zero_maps"] / m["n"] for m in maps],
        "lift": [m["lift"] for m in maps],
        "pointing game": [m["pointing"]["rate"] for m in maps],
        "background flip": [f["background"]["changed"]["rate"] for f in flips],
        "follows colour": [f["background"]["follows"]["rate"] for f in flips],
        "digit flip": [f["digit"]["changed"]["rate"] for f in flips],
        "ρ of lift and flip": [m.get("lift_flip_correlation") for m in models],
    }


def table(cells):
    """A row per method, mean ± sd over seeds."""
    rows = [[row, *map(mean_sd, numbers.values())] for row, numbers in cells.items()]
    return markdown(["model", *next(iter(cells.values()))], rows)


def looks_table(records):
    """Rows of Grad-CAM, then those of HiResCAM, whose flips are the same."""
    cells = looks(records["gradcam"]) if "gradcam" in records else {}
    if "hirescam" in records:
        found = looks(records["hirescam"])
        cells |= {f"{row}, HiResCAM": n for row, n in found.items() if n["accuracy"]}
    return table(cells) if cells else None


def cascade_table(records):
    """What random layers leave of each kind of map, mean ± sd over draws of the weights."""
    rows = []
    for cam, record in records.items():
        null = record["null"]
        n = null["n"] * null["draws"]
        for step in null["cascade"]:
            numbers = mean_sd(step["rank_correlation"]), mean_sd(step["lift"])
            layers = ", ".join(step["randomised"])
            rows.append([TITLES[cam], layers, *numbers, f"{step['without']:,} of {n:,}"])
    return markdown(["map", "random layers", "rank correlation", "lift", "left out"], rows)


def report(args):
    """Redraw the figures and refill the tables, each from the record with the most models."""
    records = widest(args.dir)
    written = draw_all(args.dir, "gradcam", records)
    paths = sorted(args.dir.glob("gradcam_maximise*.json"))
    found = {path: load_json(path, "delete it") for path in paths}
    path = max(found, key=lambda path: len(found[path]["models"]), default=None)
    if path and path.with_suffix(".pt").exists():
        written.append(draw_wants(path.with_suffix(".pt")))
    tables = {
        "looks": looks_table(records),
        "cascade": cascade_table(records),
        "wants": table(wants(found[path])) if path else None,
    }
    written += fill(args.dir, tables)
    print("\n".join(f"wrote {path}" for path in written))


# ---- the command


def facts(args, device, start):
    """What may differ when the same command is run again."""
    seconds = round(time.time() - start, 1)
    versions = {"torch": torch.__version__, "threads": args.threads, "device": str(device)}
    return {"seconds": seconds, **versions}


def look(args, device):
    """Measure all models, write it down and draw it."""
    start, stem = time.time(), stem_of(args)
    skip = ("dir", "device", "threads", "report", "overwrite", "maximise", "image", "name")
    settings = {key: value for key, value in vars(args).items() if key not in skip}
    name = file_of(stem, args.cam)
    path = args.dir / f"{name}.json"
    split = load_world(args, device)
    subjects = {name: load_subject(args, name, split, device) for name in args.models}
    guard(path, settings, args.overwrite)
    recipe, obstacle = recipe_of(args.dir, split.labels, split.colors)
    kind, n = TITLES[args.cam], len(split.labels)
    print(f"{kind} of {len(subjects)} models on {n:,} pictures of {args.split}", flush=True)
    record = {
        "schema": 2,
        "script": "gradcam.py",
        "args": settings,
        "split": args.split,
        "repainting": obstacle,
        "models": measure(subjects, split, recipe, args),
        "null": null_rows(args.models[0], subjects[args.models[0]], split, args),
    }
    scenes = scenes_of(subjects, split, recipe, args)
    record["run"] = facts(args, device, start)
    save_pt(scenes, args.dir / f"{name}.pt")
    save_json(record, path)
    drawn = draw_all(args.dir, stem, load_records(args.dir, stem), [args.cam])
    progress("")
    if obstacle:
        print(f"no flip rates: {obstacle}")
    print("share of answers that change when only the background does, or only the digit;")
    print("lift: heat on the digit over the digit's share of the picture, 1 is a uniform map")
    say(looks(record), ("background flip", "digit flip", "lift"))
    print(f"wrote {path}, its .pt and {len(drawn)} figures in {record['run']['seconds']:.0f} s")
    print(f"open  {drawn[len(scenes) - 1]}")


def load_world(args, device):
    """The Split that is looked at, with its digits before painting."""
    split = load_split(args.dir, args.split, device)
    if split.gray is None:
        hint = "add gray, uint8 (N,H,W), or use make_data.py"
        die(f"{args.dir}/{args.split}.pt has no gray, which says what pixels are digit", hint)
    digits = split.labels.unique().tolist()
    if args.digit not in digits:
        die(f"--digit {args.digit} is not in {args.split}", f"choose one of {digits}")
    return split


def measure(subjects, split, recipe, args):
    """{name: JSON record}: heat maps, and flip rates where `recipe` says how to repaint."""
    models, labels = {}, split.labels.cpu()
    targets = labels if args.target == "label" else None
    if recipe:
        nets = {name: subject.model for name, subject in subjects.items()}
        predictions, partner = counterfactuals(nets, split, recipe, args.seed)
    for k, (name, subject) in enumerate(subjects.items(), 1):
        progress(f"heat maps of {name}, model {k} of {len(subjects)}")
        heat = heat_of(subject, split, args.cam, targets)
        scores, flips, rho = heat_scores(heat.maps, split.gray.cpu()), None, math.nan
        if recipe:
            flips, changed = flip_rates(*predictions[name], partner, labels, split.colors.cpu())
            scored = ~scores.lift.isnan()
            rho = spearman(scores.lift[scored], changed[scored]).item()
        linear_head = isinstance(subject.model, SimpleCNN) and subject.layer == "relu"
        models[name] = {
            "method": subject.checkpoint["args"].get("method"),
            "seed": subject.checkpoint["args"].get("seed"),
            "trained": subject.checkpoint.get("trained", True),
            "layer": subject.layer,
            "map_size": list(subject.size),
            "acc": rate(heat.predicted == labels),
            "maps": {args.split: summary(scores)},
            "residual": completeness(subject, split) if linear_head else None,
            "flips": flips,
            "lift_flip_correlation": rho if math.isfinite(rho) else None,
        }
    return models


def say(cells, keys):
    """The first eight rows of a table on the terminal."""
    lines = [("", *keys)]
    lines += [(row, *(mean_sd(numbers[key]) for key in keys)) for row, numbers in cells.items()]
    wide = max(len(row) for row, *_ in lines[:9])
    for row, *shown in lines[:9]:
        print(f"{row:{wide}s}" + "".join(f"  {text:>20s}" for text in shown))


# ---- what each answer wants to see


def maximise(model, label, size, gen, steps=200, step_size=0.05, shift=2, tv=1.0):
    """Pictures (N,3,H,W) in [0, 1] that raise the logit of `label` (N,): activation maximisation.

    Adam from mid-grey with a little noise (Erhan et al., 2009) on the logit (Simonyan et al.,
    2014): the log-probability stops at a dull picture as soon as the net is sure. Against noise a
    penalty on differences of neighbours, `tv` times the mean slope of the logit, so that it means
    the same for a net of any scale (with 0.5 pictures are noisier, with 2 some turn grey); and
    other shifts at each step (Mordvintsev et al., 2015; Olah et al., 2017). Robust nets are known
    to want what looks like the class (Santurkar et al., 2019; Engstrom et al., 2019).
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


def variance_shares(x):
    """Shares (N,) twice of a picture's variance: between channels (colour), between places (shape).

    What is left over is colour that differs from place to place; a flat grey has no variance, and
    both are 0. x (N,3,H,W).
    """
    total = x.flatten(1).var(1, correction=0).clamp(min=1e-12)
    channels = x.mean((2, 3)).var(1, correction=0)
    places = x.mean(1).flatten(1).var(1, correction=0)
    return channels / total, places / total


@torch.no_grad()
def wants_of(model, x, label, palette, oracle):
    """(measures of the pictures x (N,3,H,W) that a model found for `label`, confidence (N,)).

    Means over pictures; without `palette` (colours,3) or `oracle` None. The reverse of the search:
    every picture as one flat colour, its mean, shown to the same model.
    """
    sure = model(x).softmax(1).gather(1, label[:, None])[:, 0]
    colour = x.mean((2, 3))  # (N,3)
    flat = colour[:, :, None, None].expand_as(x)
    channels, places = variance_shares(x)
    own = None if palette is None else mean(torch.cdist(colour, palette).argmin(1) == label)
    measures = {
        "confidence": mean(sure),
        "nearest colour is its own": own,
        "variance between channels": mean(channels),
        "variance between places": mean(places),
        "read by an oracle": mean(oracle(x).argmax(1) == label) if oracle else None,
        "named as flat colour": mean(model(flat).argmax(1) == label),
    }
    return measures, sure


def look_for(args, device):
    """Find what every class of every model wants to see, measure it, write it down and draw it."""
    start, path = time.time(), args.dir / f"{stem_of(args)}.json"
    settings = {"models": args.models, "seed": args.seed, "starts": STARTS}
    found = {name: load_model(args.dir, name, device) for name in args.models}
    guard(path, settings, args.overwrite)
    print(f"what {len(found)} models want to see, {STARTS} starts a class", flush=True)
    checkpoint = found[args.models[0]][1]
    found["null"] = random_net(checkpoint, stream(args.seed, "random weights 0")), checkpoint
    reader = reader_among(args)
    oracle, about = load_model(args.dir, reader, device) if reader else (None, None)
    palette = palette_of(args.dir, checkpoint["classes"], device)
    measured, pictures = {}, {}
    for name, (model, checkpoint) in found.items():
        progress(f"pictures of {name}")
        label = torch.arange(checkpoint["classes"], device=device).repeat(STARTS)
        gen = stream(args.seed, "maximise")
        x = maximise(model.to(device).eval(), label, checkpoint["size"], gen)
        fits = oracle and list(about["size"]) == list(checkpoint["size"])
        measured[name], sure = wants_of(model, x, label, palette, oracle if fits else None)
        few = slice(checkpoint["classes"])  # the first start
        images = (x[few] * 255).round().byte()
        pictures[name] = {"images": images.cpu(), "confidence": sure[few].cpu()}
    null = measured.pop("null")
    record = {
        "schema": 1,
        "script": "gradcam.py",
        "args": settings,
        "reader": reader,
        "null": null,
        "models": {
            name: {**m, "trained": found[name][1].get("trained", True)}
            for name, m in measured.items()
        },
        "run": facts(args, device, start),
    }
    save_pt({name: pictures[name] for name in firsts_of(measured)}, path.with_suffix(".pt"))
    save_json(record, path)
    figure = draw_wants(path.with_suffix(".pt"))
    progress("")
    say(wants(record), ("confidence", "read by an oracle", "named as flat colour"))
    print(f"wrote {path}, its .pt and a figure in {record['run']['seconds']:.0f} s")
    print(f"open  {figure}")


def reader_among(args):
    """The first oracle that is none of --models, to read what they want to see; None without."""
    found = sorted(args.dir.glob("unbiased/oracle_s*.pt"))
    return next((n for n in (f"unbiased/{f.stem}" for f in found) if n not in args.models), None)


def palette_of(folder, classes, device):
    """Mean colours (colours,3) in [0, 1] of the world, None where they do not match the classes."""
    every = torch.arange(classes)
    recipe, _ = recipe_of(folder, every, every)
    if recipe is None:
        return None
    rgb = [list(bytes.fromhex(colour[1:])) for colour in PALETTES[recipe["recipe"]].values()]
    return torch.tensor(rgb, device=device) / 255


def draw_wants(path):
    """A model a row, a class a column: the picture that it is surest of, and how sure it is."""
    figure = path.parent / "figures" / f"{path.stem}.png"
    rows = []
    for name, found in load_pt(path, "delete it").items():
        below = [f"{k} ({sure:.2f})" for k, sure in enumerate(found["confidence"])]
        nothing = [None] * len(below)
        rows.append((name, list(zip(found["images"], nothing, below, strict=True))))
    draw_rows(rows, figure)
    return figure


# ---- one picture of one's own


def read_picture(path):
    """float (1,3,H,W) in [0, 1] of a picture file: gray gets three channels, transparency goes."""
    import matplotlib.pyplot as plt  # a second of start-up

    try:
        pixels = torch.tensor(plt.imread(path))
    except (OSError, SyntaxError, ValueError) as e:
        die(f"--image {path} is no picture ({type(e).__name__})", "give the path of a PNG file")
    if not pixels.is_floating_point():
        pixels = pixels / torch.iinfo(pixels.dtype).max
    pixels = pixels.float().reshape(*pixels.shape[:2], -1)  # (H,W,channels)
    pixels = pixels[..., :3] if pixels.shape[2] > 2 else pixels[..., :1].expand(-1, -1, 3)
    return pixels.permute(2, 0, 1)[None]


def look_at_image(args, device):
    """Prediction and heat maps of every model on one picture of one's own."""
    picture, rows = read_picture(args.image), []
    for name in args.models:
        model, checkpoint = load_model(args.dir, name, device)
        x = F.interpolate(picture, tuple(checkpoint["size"]), mode="bilinear", antialias=True)
        images = (x.clamp(0, 1) * 255).round().to(device, torch.uint8)
        one = Split(images, torch.zeros(1, dtype=torch.int64, device=device), None, None)
        subject = Subject(model, checkpoint, *find_layer(model, args.layer, one, name))
        cells = [(images[0].cpu(), None, "what it sees")]
        for cam in CAMS:
            heat = heat_of(subject, one, cam)
            cells.append((upsample(heat.maps, images.shape[2:])[0], None, TITLES[cam]))
        rows.append((f"{name}: {int(heat.predicted)} ({float(heat.confidence):.2f})", cells))
        print(rows[-1][0])
    path = args.dir / "figures" / "gradcam_image.png"
    draw_rows(rows, path)
    print(f"open  {path}")


if __name__ == "__main__":
    run(main)
