"""What two scripts must agree on: pictures, nets, seeds, names, files and figures.

No script by itself: make_data.py, train.py, gradcam.py and attack.py import it.
Images are uint8 (N,3,H,W) in files and float in [0, 1] in front of a model.
"""

import argparse
import io
import json
import math
import os
import re
import sys
import textwrap
import time
import zlib
from collections import OrderedDict
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

os.environ["MPLBACKEND"] = "Agg"  # figures are drawn into files, whatever a notebook has set
ROOT = Path(__file__).resolve().parent
SCRIPTS = ("make_data.py", "train.py", "gradcam.py", "attack.py")
SPLITS = ("train", "val", "test_hard", "test_unbiased")
WHERE = ("dir", "device", "threads", "overwrite", "report")  # flags that decide no number


def named(names, colours):
    return dict(zip(names.split(), colours.split(), strict=True))


INK = named(  # by how a row's name begins; distinct for colour-blind readers too
    "baseline jitter grl combined biasbal groupdro lff jtt lntl gce"
    " at at_balanced trades fgsm robgan oracle balance plain told_nothing told_kind",
    "#D55E00 #0072B2 #E69F00 #009E73 #CC79A7 #56B4E9 #7A4F00 #8C8C00 #6A3D9A #546E7A"
    " #A6192E #332288 #999999 #882255 #1B7F79 #000000 #117733 #D55E00 #C2185B #0072B2",
)
PALETTE = named(  # The Lazy Artist's, of the main world; digit d owns entry d
    "red green blue yellow purple teal pink brown white black",
    "#FF0000 #00C800 #0050FF #FFDC00 #C800C8 #00C8C8 #FF82B4 #8C6432 #FFFFFF #000000",
)


def paint_background(gray, mean, gen, sigma2):  # (B,1,H,W), (B,3,1,1) to (B,3,H,W), in [0, 1]
    """A light-grey digit on its colour, with one brightness noise for R, G and B."""
    noise = torch.randn(gray[:, 0].shape, generator=gen).mul_(0.15)[:, None]
    return (mean + noise).clamp_(0, 1).lerp_(torch.tensor(0.6), gray)


def paint_flat(gray, mean, gen, sigma2):
    """A white digit, every pixel that is not black, on one flat colour."""
    return torch.where(gray > 0, 1.0, mean)


def paint_digit(gray, mean, gen, sigma2):
    """A stroke on black, its colour drawn once per image, variance sigma2 a channel."""
    draw = math.sqrt(sigma2) * torch.randn(mean.shape, generator=gen)
    return gray * (mean + draw).clamp_(0, 1)


PAINTERS = {
    "background": paint_background,
    "flat": paint_flat,
    "digit": paint_digit,
    "cmnist": paint_digit,
}


def paint(gray, mean, gen, recipe="background", sigma2=None):
    """gray uint8 (N,H,W), mean colours (N,3) or (N,3,H,W) in [0, 1] to uint8 (N,3,H,W).

    One state of `gen` is one texture, whatever the colours.
    """
    images = torch.empty(len(gray), 3, *gray.shape[1:], dtype=torch.uint8)
    for i in chunks(len(gray), 160):  # fits the cache; torch draws its normals by sixteens
        colour = mean[i] if mean.ndim == 4 else mean[i, :, None, None]
        picture = PAINTERS[recipe](gray[i, None].float() / 255, colour, gen, sigma2)
        images[i] = picture.mul(255).round_().to(torch.int16)  # int16 halves the time
    return images


def rgb(palette):
    """Mean colours float (colours,3) in [0, 1] of {name: "#RRGGBB"}."""
    return torch.tensor([list(bytes.fromhex(mean[1:])) for mean in palette.values()]) / 255


# ---- nets


class SimpleCNN(nn.Module):
    """Three 3x3 convolutions and a linear head; 4,486 parameters at width 4, 28x28, 10 classes.

    With `saturated`, conv1's activation ends at 1: strokes of any colour can look the same then.
    """

    def __init__(self, width, classes, size, saturated):
        super().__init__()
        self.saturated = saturated
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.relu = nn.ReLU()  # Grad-CAM looks at its output
        self.fc = nn.Linear(2 * width * (size[0] // 4) * (size[1] // 4), classes)

    def features(self, x):
        """x (B,3,H,W) in [0, 1] to the last feature map (B,2w,H/4,W/4)."""
        x = F.relu(F.max_pool2d(self.conv1(x), 2))  # as ReLU before pooling, for less work
        if self.saturated:
            x = x.tanh()
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return self.relu(self.conv3(x))

    def forward(self, x):
        return self.fc(self.features(x).flatten(1))


HIDDEN = {  # the nets of published figures on Coloured MNIST
    "mlp": (100, 100, 100),  # Nam et al., 2020
    "mlp390": (390, 390),  # Arjovsky et al., 2019
}


def build_mlp(name, classes, size):
    """Linear layers with ReLU between them."""
    sides = 3 * size[0] * size[1], *HIDDEN[name]
    layers = {"flatten": nn.Flatten()}
    for i in range(len(sides) - 1):
        layers |= {f"hidden{i}": nn.Linear(*sides[i : i + 2]), f"relu{i}": nn.ReLU()}
    return nn.Sequential(OrderedDict(layers, fc=nn.Linear(sides[-1], classes)))


def luma(x):
    """Brightness (B,1,H,W) of colour (B,3,H,W), by the weights of ITU-R BT.601."""
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


MODELS = ("simplecnn", "saturatedcnn", *HIDDEN, "resnet18", "resnet50")


def build_model(name="simplecnn", width=4, classes=10, size=(28, 28), grayscale=False):
    """A fresh net, channels last; its `fc` is fed the penultimate features."""
    if name not in MODELS:
        raise ValueError(f"model {name} is none of {', '.join(MODELS)}")
    if name.startswith("resnet"):
        try:
            import torchvision  # a second of start-up, for ResNets only
        except Exception as e:  # one built for another torch can raise anything
            die(f"torchvision does not import ({e})", "install the one that fits your torch")
        model = getattr(torchvision.models, name)(weights=None, num_classes=classes)
    elif name in HIDDEN:
        model = build_mlp(name, classes, size)
    else:
        model = SimpleCNN(width, classes, size, saturated=name == "saturatedcnn")
    if grayscale:  # it sees brightness only, in training and ever after
        model.register_forward_pre_hook(lambda _, x: (luma(x[0]).expand_as(x[0]),))
    return model.to(memory_format=torch.channels_last)


def as_seen(images):
    """Images (B,3,H,W), uint8 or float, as the models see them: float in [0, 1]."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


@torch.inference_mode()
def predict(model, images):
    """Logits float (N,classes) of images (N,3,H,W), uint8 or float; the model goes to eval mode."""
    model.eval()
    logits = torch.cat([model(as_seen(images[part])) for part in chunks(len(images))])
    refuse_nan("a model", model, images, logits)
    return logits


def refuse_nan(name, model, inputs, logits):
    """A forward hook: weights may be finite, and answers are not."""
    if not logits.isfinite().all():
        die(f"{name} gives answers that are no numbers", "train it again with a smaller --lr")


class InputOf:
    """Inside `with`, .seen is what this layer of a model was fed, a tensor for each call."""

    def __init__(self, layer):
        self.layer, self.seen = layer, []

    def __enter__(self):
        self.hook = self.layer.register_forward_pre_hook(self.keep)
        return self

    def keep(self, _, inputs):
        self.seen.append(inputs[0])

    def __exit__(self, *_):
        self.hook.remove()


def answers_and_features(model, split):
    """A net's answers int64 (N,) and its penultimate features float (N,F), both on the CPU."""
    with InputOf(model.fc) as features:
        answers = predict(model, split.images).argmax(1)
    return answers.cpu(), torch.cat(features.seen).cpu()


def chunks(n, size=250):
    """Slices of n images; 250 are what a core's cache holds in front of a tiny net."""
    return [slice(low, low + size) for low in range(0, n, size)]


def stream(seed, purpose, device="cpu"):
    """One generator per purpose: an extra draw in one place cannot move the draws of another."""
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed}/{purpose}".encode()))


# ---- the command line


def common_args(parser, seed_of):
    """The flags that mean the same thing in all four scripts; complaints become one line."""
    parser.error = lambda message: die(message, f"see python {parser.prog} --help")
    g = parser.add_argument_group("the same in every script")
    g.add_argument("--dir", type=Path, default=Path("results"), help="the world (results)")
    g.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    g.add_argument("--threads", type=number(int, 1, 1024), default=1, help="of the CPU (1)")
    g.add_argument("--overwrite", action="store_true", help="replace results of other settings")
    g.add_argument("--report", action="store_true", help="only redraw figures, refill tables")
    g.add_argument("--seed", type=number(int, 0, 2**31), default=42, help=f"of {seed_of} (42)")


def number(kind, least, most):
    """An argparse type: an int or float in [least, most]."""

    def parse(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"{text} is not from {least:g} to {most:g}")
        return kind(text)

    parse.__name__ = kind.__name__  # argparse: invalid int value
    return parse


def setup(args):
    """Threads, deterministic algorithms and the device; returns a torch.device."""
    if args.dir.exists() and not (args.dir.is_dir() and os.access(args.dir, os.W_OK)):
        die(f"--dir {args.dir} is no folder that can be written", "choose another")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.mps.is_available(), "cpu": True}
    name = next(kind for kind in there if there[kind]) if args.device == "auto" else args.device
    if not there[name]:
        die(f"--device {name} is not available here", "use --device auto")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or CUDA does not repeat
    torch.set_deterministic_debug_mode("warn" if name == "mps" else "error")
    torch.utils.deterministic.fill_uninitialized_memory = False  # a cost for nothing
    torch.set_num_threads(args.threads)
    return torch.device(name)


def die(what, hint):
    """The user's mistake: one line that says what is wrong and what to do, exit code 2."""
    print(f"{Path(sys.argv[0]).name}: {what}; {hint}".replace("\n", " "), file=sys.stderr)
    sys.exit(2)


def progress(text):
    """A line that the next one replaces on a terminal, a plain line in a file; "" clears it."""
    if sys.stdout.isatty():
        print(f"\r\x1b[K{text}", end="", flush=True)
    elif text:
        print(text, flush=True)


def run(main, hint="finished files are whole; run the same command again"):
    """Call a script's `main`; Ctrl-C and a file that cannot be used get one line."""
    for said in (sys.stdout, sys.stderr):
        said.reconfigure(errors="replace")  # an ASCII terminal shows ? for ±
    try:
        main()
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: interrupted; {hint}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has left, as `| head` does
        os._exit(1)
    except OSError as e:
        die(f"cannot use {e.filename or 'the disk'}: {e.strerror}", "finished files are whole")


# ---- names and files


def name_of(head, args, usual, skip=()):
    """NAME of a result: `head` and what differs from `usual`, as in jitter_alpha1_hsv_s42."""
    name = head
    for key, value in vars(args).items():
        if key in WHERE or key in skip or value == getattr(usual, key):
            continue
        flag = key.replace("_", "")
        if key == "seed":
            name += f"_s{value}"
        elif isinstance(value, bool):
            name += f"_{flag}" if value else f"_no{flag}"
        elif isinstance(value, str):
            name += f"_{value.replace('_', '')}"
        else:
            values = value if isinstance(value, list) else [value]
            name += f"_{flag}" + "-".join(f"{v:g}" for v in values)
    return name


def row_of(name):
    """'jitter_hsv' of 'jitter_hsv_s42' or 'unbiased/jitter_hsv_s42': what its seeds share."""
    return re.sub(r"(_s\d+)?(\.pt)?$", "", Path(name).name)


def guard(path, settings, overwrite):
    """Stop before a result of other settings, or a file that is not ours, is replaced."""
    if overwrite:
        return
    hint = "choose another --name or --dir, or give --overwrite"
    model = path.with_suffix(".pt")
    if path.exists():
        record = load_json(path, hint)
        if record.get("script") not in SCRIPTS:
            die(f"{path} was not written by one of our scripts", hint)
        old = record | record.get("args", {})
        was = [f"{k} {old[k]}" for k in settings if k in old and old[k] != settings[k]]
        if was:
            die(f"{path} holds a result of other settings, {', '.join(was)[:150]}", hint)
    elif is_model(model) and "script" not in load_pt(model, hint):
        die(f"{model} has no {path.name} beside it, it may be a model of your own", hint)


def note_time(folder, name, began):
    """Add a line to times.csv; returns the seconds since time.time() was `began`."""
    seconds = time.time() - began
    with (folder / "times.csv").open("a", encoding="utf-8") as file:
        file.write(f"{name},{seconds:.1f},{time.process_time():.1f}\n")  # wall, processor
    return seconds


def write(path, save):
    """save(file) fills memory; the file appears at `path` whole or not at all."""
    memory = io.BytesIO()  # a full disk is then an OSError, whatever `save` makes of one
    save(memory)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # two runs may write the same file
    try:
        part.write_bytes(memory.getbuffer())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_json(record, path):
    """Sorted keys, a list of numbers on one line; NaN is refused."""
    text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False)
    text = re.sub(r'\[[^][{}"]*\]', lambda found: " ".join(found[0].split()), text)
    write(path, lambda file: file.write(f"{text}\n".encode()))


def save_pt(record, path):
    write(path, lambda file: torch.save(record, file))


def load_json(path, hint):
    return read(path, json.load, "is not a whole JSON file of ours", hint)


def load_pt(path, hint):
    """A dictionary of tensors and plain values; code inside the file is never run."""
    plain = partial(torch.load, map_location="cpu", weights_only=True)
    return read(path, plain, "is no dictionary of tensors and plain values", hint)


def read(path, parse, otherwise, hint):
    """The dictionary in a file; one line where it is missing, unreadable or something else."""
    try:
        with path.open("rb") as file:
            return dict(parse(file))
    except FileNotFoundError:
        die(f"{path} is missing", hint)
    except OSError as e:
        die(f"{path} cannot be read: {e.strerror}", "mend its permissions or the disk")
    except Exception as e:  # a foreign file can make torch raise anything
        die(f"{path} {otherwise} ({type(e).__name__})", hint)


class Split(NamedTuple):
    images: torch.Tensor  # uint8 (N,3,H,W), channels last
    labels: torch.Tensor  # int64 (N,)
    colors: torch.Tensor | None  # int64 (N,): the class that owns the image's colour
    gray: torch.Tensor | None  # uint8 (N,H,W): the digit before painting
    env: torch.Tensor | None = None  # int64 (N,): the environment, in the world of Arjovsky et al.
    second: torch.Tensor | None = None  # int64 (N,): the class that owns a second shortcut
    value: torch.Tensor | None = None  # int64 (N,): which colour, where a class owns several

    def x(self, index):
        """A batch as the models see it: float (B,3,H,W) in [0, 1]."""
        return as_seen(self.images[index])

    def take(self, index):
        """The Split of these images only."""
        return Split(*(None if part is None else part[index] for part in self))


def load_split(folder, name, device="cpu"):
    """One Split of a world, on the device."""
    path, readme = folder / f"{name}.pt", "see 'The data' in README.md"
    record = load_pt(
        path, f"run: python make_data.py --dir {folder}; for data of your own {readme}"
    )
    images = record.get("images")
    pixels = torch.is_tensor(images) and images.dtype == torch.uint8 and images.ndim == 4
    if not pixels or images.shape[1] != 3:
        ways = "images.permute(0, 3, 1, 2), .mul(255).round().byte() or .expand(-1, 3, -1, -1)"
        die(f"{path}: images must be uint8 (N,3,H,W)", f"{ways} may help, {readme}")
    n, _, h, w = images.shape
    if n == 0 or images.max() <= 1:
        die(f"{path}: images are blank or end at 1", "white is 255: multiply them by it")
    parts = {"images": images.to(device, memory_format=torch.channels_last)}
    for key in Split._fields[1:]:
        shape, most, kind = (n,), 999, torch.int64
        if key == "gray":
            shape, most, kind = (n, h, w), 255, torch.uint8
        t = record.get(key)
        if t is not None or key == "labels":
            whole = torch.is_tensor(t) and t.shape == shape and not t.is_floating_point()
            if not whole or t.min() < 0 or t.max() > most:
                die(f"{path}: {key} must be whole numbers from 0 to {most}, {shape}", readme)
            t = t.to(device, kind)
        parts[key] = t
    return Split(**parts)


def is_model(path):
    """Whether a file is a finished model; a file of pictures is none."""
    try:
        return {"weights", "args"} <= torch.load(path, weights_only=True, mmap=True).keys()
    except Exception:  # there is none, or a foreign one
        return False


def load_model(folder, name, device="cpu"):
    """(model in eval mode, its record: weights, args, classes, size) as train.py saved it."""
    path = Path(name) if name.endswith(".pt") else folder / f"{name}.pt"
    hint = "see 'The network' in README.md"
    if not path.exists():
        there = sorted(p.stem for p in folder.glob("*.pt") if is_model(p))
        hint = f"models in {folder}: {', '.join(there) or 'none, run train.py'}"
    record = load_pt(path, hint)
    try:
        args, weights, size = record["args"], record["weights"], list(record["size"])
        kind = args["model"], args["width"], record["classes"], size
        model = build_model(*kind, args.get("grayscale", False))
        shapes = [{(key, t.shape) for key, t in w.items()} for w in (model.state_dict(), weights)]
        odd = sorted(shapes[0] ^ shapes[1])
        if odd:
            raise ValueError(f"weights do not fit {args['model']}: {odd[0][0]}, {odd[-1][0]}")
        model.load_state_dict(weights)
    except Exception as e:  # whatever a foreign file makes of it
        die(f"{path} is no checkpoint of train.py ({type(e).__name__}: {e})", hint)
    model.register_forward_hook(partial(refuse_nan, name))
    return model.to(device).eval(), {**record, "size": size}


def check_fit(name, record, split, where):
    """Stop unless a checkpoint's record fits a split: its pixels and its classes."""
    built = f"{record['classes']} classes of {tuple(record['size'])} pixels"
    size, classes = tuple(split.images.shape[2:]), int(split.labels.max()) + 1
    if size != tuple(record["size"]) or classes > record["classes"]:
        what = f"{name} is built for {built}, but {where} has {classes} of {size}"
        die(what, "choose a model trained on this world, or point --dir to its own")


# ---- numbers and figures


def rate(values):
    """Mean of one value in [0, 1] per image with its 95 % interval (Wilson, 1927); k of bools."""
    n, z = len(values), 1.96
    if n == 0:
        return {"n": 0, "rate": None, "low": 0.0, "high": 1.0}
    k = values.double().sum().item()
    centre, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    low, high = max(0.0, (centre - half) / (n + z * z)), min(1.0, (centre + half) / (n + z * z))
    count = {"k": int(k)} if values.dtype == torch.bool else {}
    return {**count, "n": n, "rate": k / n, "low": low, "high": high}


STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # 0.975, df 1 to 9


def t_interval(values):
    """Mean of one number a seed, two at least, with its 95 % t-interval over the seeds."""
    n, middle = len(values), fmean(values)
    half = STUDENT_T[min(n - 2, 8)] * stdev(values) / math.sqrt(n)
    return {"value": middle, "low": middle - half, "high": middle + half}


def ink(row):
    """One colour per row in every figure: that of the longest entry of INK it begins with."""
    known = [begin for begin in INK if row_of(row).startswith(begin)]
    return INK[max(known, key=len)] if known else "#777777"


def blank(width, height):
    """An empty figure of so many inches, by matplotlib's own settings."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcdefaults()  # nothing of the user's matplotlibrc
    return Figure(figsize=(width, height), layout="constrained")


def figure(width, height, rows=1, columns=1, **how):
    """A figure of so many inches and its axes (rows,columns)."""
    fig = blank(width, height)
    return fig, fig.subplots(rows, columns, squeeze=False, **how)


def lines(ax, points, colour, **style):
    """{x: values, one a seed}: their means as a line, their ranges as a band."""
    ax.plot(points.keys(), [fmean(v) for v in points.values()], color=colour, **style)
    low, high = ([end(v) for v in points.values()] for end in (min, max))
    ax.fill_between(list(points), low, high, color=colour, alpha=0.15, lw=0)


def matrix(ax, table, **axes):
    """A table of numbers from 0 to 1 as tiles with the numbers in them; None stays blank."""
    values = [[math.nan if v is None else v for v in row] for row in table]
    picture = ax.imshow(values, vmin=0, vmax=1, cmap="Blues")
    for i, row in enumerate(table):
        for j, v in enumerate(row):
            if v is not None:
                look = {"fontsize": 6.5, "color": "white" if v > 0.55 else "black"}
                ax.text(j, i, f"{v:.2f}".lstrip("0"), ha="center", va="center", **look)
    ax.set(xticks=range(len(table[0])), yticks=range(len(table)), **axes)
    return picture


def pictures(rows):
    """A figure of titled rows of pictures: [(title, [(pixels, caption, look)])].

    Pixels are uint8 or float (3,H,W), or (H,W), a map up to its own maximum. `look` may hold
    outline, uint8 (H,W): its edge at a tenth of white is drawn; or written: what is written on a
    tile of one colour; the rest is for the caption's text.
    """
    columns = max(len(cells) for _, cells in rows)
    wide = max(1.12 * columns + 0.2, 5)
    fig = blank(wide, 1.62 * len(rows) + 0.1)
    parts = fig.subfigures(len(rows), squeeze=False)[:, 0]  # whose titles do not move the pictures
    for part, (title, cells) in zip(parts, rows, strict=True):
        part.suptitle(textwrap.fill(title, int(10 * wide)), fontsize=10.5, weight="bold")
        line = part.subplots(1, columns, squeeze=False)[0]
        for ax in line:
            ax.axis("off")
        for ax, (pixels, caption, look) in zip(line, cells, strict=False):
            look = dict(look)
            outline, written = look.pop("outline", None), look.pop("written", "")
            ax.axis("on")
            if pixels.ndim == 3:
                ax.imshow(pixels.permute(1, 2, 0).numpy())
            else:
                ax.imshow(pixels.numpy(), cmap="inferno", vmin=0, vmax=pixels.max().item() or 1)
            if outline is not None and outline.min() < 25.5 < outline.max():
                ax.contour(outline.numpy(), levels=[25.5], colors="#56B4E9", linewidths=0.8)
            if written:
                bright = luma((pixels[None] / 255).pow(2.2)).item() > 0.18  # black stands out more
                font = {"fontsize": min(30, 90 / len(written)), "weight": "bold"}
                place = {"ha": "center", "va": "center", "color": "black" if bright else "white"}
                ax.text(0, 0, written, **place, **font)
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(textwrap.fill(caption, 14), **look)
    return fig


def save_figure(fig, path, source=None):
    """`source` stands in the file: what the figure was drawn from."""
    metadata = {"Software": None, "Source": source}
    write(path, lambda file: fig.savefig(file, dpi=150, metadata=metadata))


if __name__ == "__main__":
    print(__doc__)
