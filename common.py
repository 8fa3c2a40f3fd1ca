"""What two scripts must agree on: palettes, the net, seeds, names, files and tables.

Images are uint8 (N,3,H,W) in files and float in [0, 1] in front of a model.
"""

import argparse
import difflib
import io
import json
import math
import os
import re
import sys
import zlib
from collections import OrderedDict
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

os.environ.setdefault("MPLBACKEND", "Agg")  # figures are drawn into files
ROOT = Path(__file__).resolve().parent
SPLITS = ("train", "val", "test_hard", "test_unbiased")


def named(names, colours):
    return dict(zip(names.split(), colours.split(), strict=True))


INK = named(  # one colour per method in every figure, distinct for colour-blind readers too
    "baseline jitter grl combined biasbal groupdro lff jtt lntl at robgan oracle balance gce",
    "#D55E00 #0072B2 #E69F00 #009E73 #CC79A7 #56B4E9"
    " #7A4F00 #8C8C00 #6A3D9A #A6192E #1B7F79 #000000 #117733 #882255",
)
PALETTES = {  # recipe: {colour: its mean}; digit d owns entry d
    "background": named(  # The Lazy Artist
        "red green blue yellow purple teal pink brown white black",
        "#FF0000 #00C800 #0050FF #FFDC00 #C800C8 #00C8C8 #FF82B4 #8C6432 #FFFFFF #000000",
    ),
    "flat": named(  # Biased-MNIST (Bahng et al., 2020)
        "red green blue yellow magenta cyan orange rose violet grey",
        "#FF0000 #00FF00 #0000FF #E1E100 #E100E1 #00FFFF #FF8000 #FF0080 #8000FF #808080",
    ),
    "digit": named(  # Learning Not to Learn (Kim et al., 2019)
        "crimson teal yellow cerulean orange purple cyan pink lime maroon",
        "#DC143C #008080 #FDE910 #0095B6 #ED9121 #911EBC #46F0F0 #FAC5BB #D2F53C #800000",
    ),
    "cmnist": named(  # Coloured MNIST (Nam et al., 2020)
        "tomato yellow mauve sage sky green blue purple olive crimson",
        "#FB502B #FDE95A #AC7694 #C8D499 #16C6FA #52F572 #063CC1 #8E1AC2 #356405 #D53444",
    ),
}


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


def paint(gray, colours, gen, recipe="background", sigma2=None):
    """gray uint8 (N,H,W), colours (N,) to uint8 (N,3,H,W); one state of `gen`, one texture."""
    rgb = [list(bytes.fromhex(mean[1:])) for mean in PALETTES[recipe].values()]
    means = torch.tensor(rgb, dtype=torch.float32)[:, :, None, None] / 255
    images = torch.empty(len(gray), 3, *gray.shape[1:], dtype=torch.uint8)
    for i in chunks(len(gray), 160):  # fits the cache; torch draws its normals by sixteens
        picture = PAINTERS[recipe](gray[i, None].float() / 255, means[colours[i]], gen, sigma2)
        images[i] = picture.mul(255).round_().to(torch.int16)  # int16 halves the time
    return images


def max_pool(x):
    """2x2 max pooling; where no gradient is kept as two maxima, which say the same in less time."""
    if torch.is_grad_enabled():
        return F.max_pool2d(x, 2)
    h, w = (side // 2 * 2 for side in x.shape[2:])
    x = torch.maximum(x[:, :, 0:h:2], x[:, :, 1:h:2])
    return torch.maximum(x[..., 0:w:2], x[..., 1:w:2])


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
        x = F.relu(max_pool(self.conv1(x)))  # as ReLU before pooling, for less work
        if self.saturated:
            x = x.tanh()
        x = F.relu(max_pool(self.conv2(x)))
        return self.relu(self.conv3(x))

    def forward(self, x):
        return self.fc(self.features(x).flatten(1))


def build_mlp(classes, size, hidden=100):
    """Three hidden layers, the net of the published figures on Coloured MNIST."""
    sides = 3 * size[0] * size[1], hidden, hidden, hidden
    layers = {"flatten": nn.Flatten()}
    for i in range(3):
        layers |= {f"hidden{i}": nn.Linear(*sides[i : i + 2]), f"relu{i}": nn.ReLU()}
    return nn.Sequential(OrderedDict(layers, fc=nn.Linear(hidden, classes)))


def luma(x):
    """Brightness (B,1,H,W) of colour (B,3,H,W), by the weights of ITU-R BT.601."""
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


MODELS = ("simplecnn", "saturatedcnn", "mlp", "resnet18", "resnet50")


def build_model(name="simplecnn", width=4, classes=10, size=(28, 28), grayscale=False):
    """A fresh net, channels last; its `fc` is fed the penultimate features."""
    if name.startswith("resnet"):
        import torchvision  # a second of start-up, for ResNets only

        model = getattr(torchvision.models, name)(weights=None, num_classes=classes)
    elif name == "mlp":
        model = build_mlp(classes, size)
    else:
        model = SimpleCNN(width, classes, size, saturated=name == "saturatedcnn")
    if grayscale:  # it sees brightness only, in training and ever after
        model.register_forward_pre_hook(lambda _, x: (luma(x[0]).expand_as(x[0]),))
    return model.to(memory_format=torch.channels_last)


@torch.inference_mode()
def predict(model, split):
    """Predicted classes int64 (N,) of a Split; the model goes to eval mode."""
    model.eval()
    return torch.cat([model(split.x(part)).argmax(1) for part in chunks(len(split.labels))])


def chunks(n, size=250):
    """Slices of n images; 250 are what a core's cache holds in front of a tiny net."""
    return [slice(low, low + size) for low in range(0, n, size)]


def stream(seed, purpose, device="cpu"):
    """One generator per purpose: an extra draw in one place cannot move the draws of another."""
    return torch.Generator(device).manual_seed(zlib.crc32(f"{seed}/{purpose}".encode()))


def common_args(parser, seed_of):
    """The flags that mean the same thing in all four scripts; complaints become one line."""
    parser.error = lambda message: die(message, f"see python {parser.prog} --help")
    g = parser.add_argument_group("the same in every script")
    g.add_argument("--dir", type=Path, default=Path("results"), help="the world (results)")
    g.add_argument("--seed", type=number(int, 0, 2**31), default=42, help=f"of {seed_of} (42)")
    g.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    g.add_argument("--threads", type=number(int, 1, 1024), default=1, help="of the CPU (1)")
    g.add_argument("--overwrite", action="store_true", help="replace results of other settings")
    g.add_argument("--report", action="store_true", help="only refill tables, redraw figures")


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
    try:
        main()
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: interrupted; {hint}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has left, as `| head` does
        os._exit(1)
    except OSError as e:
        die(f"cannot use {e.filename or 'the disk'}: {e.strerror}", "finished files are whole")


def name_of(head, args, usual, skip=()):
    """NAME of a result: `head`, what differs from `usual`, the seed: jitter_alpha1_hsv_s42."""
    name, skip = head, {"dir", "seed", "device", "threads", "overwrite", "report", *skip}
    for key, value in vars(args).items():
        if key not in skip and value != getattr(usual, key):
            flag = key.replace("_", "")
            if isinstance(value, bool):
                name += f"_{flag}" if value else f"_no{flag}"
            elif isinstance(value, str):
                name += f"_{value.replace('_', '')}"
            else:
                values = value if isinstance(value, list) else [value]
                name += f"_{flag}" + "-".join(f"{v:g}" for v in values)
    return f"{name}_s{args.seed}"


def row_of(name):
    """'jitter_hsv' of 'jitter_hsv_s42' or 'unbiased/jitter_hsv_s42': what its seeds share."""
    return re.sub(r"(_s\d+)?(\.pt)?$", "", Path(name).name)


def guard(path, settings, overwrite):
    """Stop before a result of other settings is replaced; the same command may run again."""
    if path.exists() and not overwrite:
        record = load_json(path, "delete it")
        old = record | record.get("args", {})
        if was := [f"{k} {old[k]}" for k in settings if k in old and old[k] != settings[k]]:
            hint = "choose another --name or --dir, or give --overwrite"
            die(f"{path} holds a result of other settings, {', '.join(was)[:150]}", hint)


def world_of(folder):
    """What meta.json says of the painting; {} for one's own data."""
    path, keys = folder / "meta.json", ("recipe", "corr", "sigma2", "seed", "limit", "is_mnist")
    meta = load_json(path, "run make_data.py") if path.exists() else {}
    return {k: meta[k] for k in keys if k in meta and (k, meta[k]) != ("sigma2", None)}


def write(path, save):
    """save(file) fills memory; the file appears at `path` whole or not at all."""
    memory = io.BytesIO()  # a full disk is then an OSError, whatever `save` makes of one
    save(memory)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # two runs may write the same file
    part.write_bytes(memory.getbuffer())
    os.replace(part, path)


def save_json(record, path):
    """Sorted keys, a list of numbers on one line; NaN is refused."""
    text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False)
    text = re.sub(r'\[[^][{}"]*\]', lambda found: " ".join(found[0].split()), text)
    write(path, lambda file: file.write(f"{text}\n".encode()))


def save_pt(record, path):
    write(path, lambda file: torch.save(record, file))


def save_figure(fig, path):
    write(path, lambda file: fig.savefig(file, dpi=150, metadata={"Software": None}))
    if "matplotlib.pyplot" in sys.modules:  # which would keep it
        sys.modules["matplotlib.pyplot"].close(fig)


def load_json(path, hint):
    if not path.is_file():
        die(f"{path} is missing", hint)
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError):
        die(f"{path} is not a whole JSON file of ours", hint)


def load_pt(path, hint):
    """A dictionary of tensors and plain values; code inside the file is never run."""
    if not path.is_file():
        die(f"{path} is missing", hint)
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as e:  # a foreign file can make torch raise anything
        die(f"{path} is no dictionary of tensors and plain values ({type(e).__name__})", hint)


class Split(NamedTuple):
    images: torch.Tensor  # uint8 (N,3,H,W), channels last
    labels: torch.Tensor  # int64 (N,)
    colors: torch.Tensor | None  # int64 (N,): the class that owns the image's colour
    gray: torch.Tensor | None  # uint8 (N,H,W): the digit before painting

    def x(self, index):
        """A batch as the models see it: float (B,3,H,W) in [0, 1]."""
        return self.images[index].float().div_(255)

    def take(self, index):
        """The Split of these images only."""
        return Split(*(None if part is None else part[index] for part in self))


def load_split(folder, name, device="cpu"):
    """One Split of a world, on the device."""
    path = folder / f"{name}.pt"
    record = load_pt(path, f"run: python make_data.py --dir {folder}")
    images = record.get("images")
    pixels = torch.is_tensor(images) and images.dtype == torch.uint8 and images.ndim == 4
    if not pixels or images.shape[1] != 3:
        hint = "make it of (N,H,W,3) by images.permute(0, 3, 1, 2); see README.md"
        die(f"{path}: images must be uint8 (N,3,H,W)", hint)
    n, _, h, w = images.shape
    parts = {"images": images.to(device, memory_format=torch.channels_last)}
    for key, shape in {"labels": (n,), "colors": (n,), "gray": (n, h, w)}.items():
        t = record.get(key)
        if t is not None or key == "labels":
            ours = torch.is_tensor(t) and t.shape == shape and not t.is_floating_point()
            if ours and t.dtype != torch.uint8:
                t = t.long()  # not every type has a minimum
            most = 255 if key == "gray" else 999
            if not ours or not n or int(t.min()) < 0 or int(t.max()) > most:
                die(f"{path}: {key} must be whole numbers from 0, {shape}", "see README.md")
            t = t.to(device, torch.uint8 if key == "gray" else torch.int64)
        parts[key] = t
    return Split(**parts)


def load_model(folder, name, device="cpu"):
    """(model in eval mode, its record: weights, args, classes, size) as train.py saved it."""
    path = Path(name) if name.endswith(".pt") else folder / f"{name}.pt"
    there = [p.stem for p in sorted(folder.glob("*_s*.pt")) if ".part" not in p.name]
    near = difflib.get_close_matches(path.stem, there, 1) or ["python train.py"]
    record = load_pt(path, f"try {near[0]}; models in {folder}: {', '.join(there) or 'none'}")
    about, world = path.with_suffix(".json"), world_of(path.parent)
    if about.exists() and load_json(about, "delete it").get("world", world) != world:
        die(f"{path} was trained on another painting of {path.parent}", "train it again")
    try:
        args = record["args"]
        kind = args["model"], args["width"], record["classes"], record["size"]
        model = build_model(*kind, args.get("grayscale", False))
        model.load_state_dict(record["weights"])
        if not all(t.isfinite().all() for t in record["weights"].values()):
            raise ValueError("weights are not finite")
    except Exception as e:  # whatever a foreign file makes of it
        why = f"{type(e).__name__}: {e}".splitlines()[0]
        die(f"{path} is no checkpoint of train.py ({why})", "see README.md, 'Change one thing'")
    return model.to(device).eval(), record


def wilson(k, n, z=1.96):
    """95 % interval of a rate k/n (Wilson, 1927): (low, high)."""
    if n == 0:
        return 0.0, 1.0
    centre = k + z * z / 2
    half = z * math.sqrt(k * (n - k) / n + z * z / 4)
    return max(0.0, (centre - half) / (n + z * z)), min(1.0, (centre + half) / (n + z * z))


def mean_sd(values):
    """'0.943 ± 0.004 (5)': mean, sample sd, number of seeds; one value alone, a dash for none."""
    values = [v for v in values if v is not None]
    if len(values) < 2:
        return f"{values[0]:.3f}" if values else "-"
    return f"{fmean(values):.3f} ± {stdev(values):.3f} ({len(values)})"


def markdown(header, rows):
    """A Markdown table as one string, None without rows."""
    if not rows:
        return None
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def fill(folder, tables):
    """Refill {name: Markdown or None} in report.md and README.md, else DIR/tables.md; the files."""
    if not folder.is_dir():
        die(f"{folder} is missing", "choose another --dir")
    ours = folder.resolve() == ROOT / "results"
    files = [folder / "report.md", ROOT / "README.md"] if ours else [folder / "tables.md"]
    for path in files:
        text = path.read_text() if path.exists() else ""
        for name, table in tables.items():
            start, end = f"<!-- table: {name} -->", "<!-- end -->"
            filled = f"{start}\n\n{table or '*no results yet*'}\n{end}"
            if not ours and start not in text:
                text += f"## {name}\n\n{filled}\n\n"
            old = re.search(f"{start}.*?{end}", text, re.S)
            text = text.replace(old[0], filled) if old else text
        write(path, lambda file, text=text: file.write(text.encode()))
    return files
