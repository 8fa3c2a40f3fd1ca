"""What two scripts must agree on: the palette and the painting, the nets, the seeds, the files, and one PGD.

Everything else lives in the script that needs it. Images are uint8 (N,3,H,W) in files and float in [0, 1] in front of a model.
"""

import argparse
import contextlib
import errno
import glob
import io
import json
import math
import os
import pickle
import platform
import re
import struct
import sys
import warnings
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

RANK = (
    int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0
)  # which of torchrun's processes this is; train.py knows what to do with more than one
SPLITS = ("train", "val", "test_hard", "test_unbiased")
DIGIT_PIXEL = 0.1  # a pixel belongs to the digit where gray > 0.1
INK = {  # one colour per method in every figure, told apart by colour-blind readers (Okabe & Ito, 2008)
    "baseline": "#D55E00",
    "jitter": "#0072B2",
    "grl": "#E69F00",
    "combined": "#009E73",
    "biasbal": "#CC79A7",
    "groupdro": "#56B4E9",
    "lff": "#7A4F00",
    "jtt": "#8C8C00",
    "lntl": "#6A3D9A",
    "at": "#A6192E",
    "robgan": "#1B7F79",
    "oracle": "#000000",
}

# ---------------------------------------------------------------- painting

PALETTES = {  # recipe: {colour: its mean}; digit d owns row d
    "background": {
        "red": (255, 0, 0),
        "green": (0, 200, 0),
        "blue": (0, 80, 255),
        "yellow": (255, 220, 0),
        "purple": (200, 0, 200),
        "teal": (0, 200, 200),
        "pink": (255, 130, 180),
        "brown": (140, 100, 50),
        "white": (255, 255, 255),
        "black": (0, 0, 0),
    },
    "flat": {  # Biased-MNIST (Bahng et al., 2020)
        "red": (255, 0, 0),
        "green": (0, 255, 0),
        "blue": (0, 0, 255),
        "yellow": (225, 225, 0),
        "magenta": (225, 0, 225),
        "cyan": (0, 255, 255),
        "orange": (255, 128, 0),
        "rose": (255, 0, 128),
        "violet": (128, 0, 255),
        "grey": (128, 128, 128),
    },
    "digit": {  # Learning Not to Learn (Kim et al., 2019)
        "crimson": (220, 20, 60),
        "teal": (0, 128, 128),
        "yellow": (253, 233, 16),
        "cerulean": (0, 149, 182),
        "orange": (237, 145, 33),
        "purple": (145, 30, 188),
        "cyan": (70, 240, 240),
        "pink": (250, 197, 187),
        "lime": (210, 245, 60),
        "maroon": (128, 0, 0),
    },
}


def rgb_of(colours, recipe):
    """Mean colours float (N,3,1,1) in [0, 1] of colour indices (N,)."""
    return (
        torch.tensor(list(PALETTES[recipe].values()), dtype=torch.float32)[colours, :, None, None]
        / 255
    )


def paint_background(gray, colours, gen, sigma2):
    """A light-grey digit (0.6 of white) on its background colour plus one brightness noise per pixel, the same for R, G and B."""
    noise = torch.randn(gray.shape, generator=gen).mul_(0.15)  # (N,H,W)
    background = (rgb_of(colours, "background") + noise[:, None]).clamp_(0, 1)
    return background.lerp_(torch.tensor(0.6), gray[:, None])


def paint_flat(gray, colours, gen, sigma2):
    """A white digit, every pixel that is not black, on one flat colour (Biased-MNIST; Bahng et al., 2020)."""
    return torch.where(gray[:, None] > 0, 1.0, rgb_of(colours, "flat"))


def paint_digit(gray, colours, gen, sigma2):
    """A stroke on black whose colour is drawn once per image around the mean, variance sigma2 per channel (Kim et al., 2019)."""
    stroke = rgb_of(colours, "digit") + math.sqrt(sigma2) * torch.randn(
        len(gray), 3, 1, 1, generator=gen
    )
    return gray[:, None] * stroke.clamp_(0, 1)


def paint_gray(gray, colours, gen, sigma2):
    """Plain MNIST in three equal channels; the colours are ignored."""
    return gray[:, None].expand(-1, 3, -1, -1)


PAINTERS = {
    "background": paint_background,
    "flat": paint_flat,
    "digit": paint_digit,
    "gray": paint_gray,
}


def paint(gray, colours, gen, recipe="background", sigma2=None):
    """gray uint8 (N,H,W) and colours int64 (N,) to images uint8 (N,3,H,W); the same `gen` state repeats the texture or the colours."""
    images = torch.empty(len(gray), 3, *gray.shape[1:], dtype=torch.uint8)
    for lo in range(
        0, len(gray), 160
    ):  # chunks that stay in the cache; in sixteens, since torch draws normals by sixteen and cuts change nothing there
        part = slice(lo, lo + 160)
        painted = (
            PAINTERS[recipe](gray[part].float() / 255, colours[part], gen, sigma2).mul(255).round_()
        )
        images[part] = painted.to(torch.int16)  # to bytes by way of int16 takes half the time
    return images


# ---------------------------------------------------------------- nets


class SimpleCNN(nn.Module):
    """Three 3x3 convolutions and a linear head; 4,486 parameters at width 4, 28x28 and 10 classes.

    Pooling comes before ReLU: the values are the same and ReLU sees a quarter of the pixels.
    """

    early = "conv2"  # what this layer is fed, (B,w,H/2,W/2), are the early features of `lntl`
    first = staticmethod(F.relu)  # the activation behind conv1

    def __init__(self, width=4, classes=10, size=(28, 28)):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.relu = nn.ReLU()  # the output of its last call is what Grad-CAM looks at
        self.fc = nn.Linear(2 * width * (size[0] // 4) * (size[1] // 4), classes)

    def features(self, x):
        """x (B,3,H,W) in [0, 1] to the last feature map (B,2w,H/4,W/4)."""
        x = self.first(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2(x), 2))
        return self.relu(self.conv3(x))

    def forward(self, x):
        return self.fc(self.features(x).flatten(1))


class SaturatedCNN(SimpleCNN):
    """SimpleCNN whose first activation is tanh(ReLU): strokes of any colour can look the same to the layers behind."""

    @staticmethod
    def first(z):
        return F.relu(z).tanh()


def luma(x):
    """Brightness (B,1,H,W) of colour (B,3,H,W), by the weights of ITU-R BT.601."""
    return (x * x.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)


CNNS = {"simplecnn": SimpleCNN, "saturatedcnn": SaturatedCNN}
MODELS = (*CNNS, "resnet18", "resnet50")


def build_model(name="simplecnn", width=4, classes=10, size=(28, 28), grayscale=False):
    """A fresh net in channels-last layout; every net ends in `fc`, whose input is the penultimate feature vector. With `grayscale` it sees brightness only."""
    if name in CNNS:
        model = CNNS[name](width, classes, size)
    else:
        import torchvision  # a second of start-up that only the ResNets pay

        model = getattr(torchvision.models, name)(weights=None, num_classes=classes)
    if grayscale:
        model.register_forward_pre_hook(lambda _, inputs: (luma(inputs[0]).expand_as(inputs[0]),))
    return model.to(memory_format=torch.channels_last)


# ---------------------------------------------------------------- seeds and devices


def stream(seed, purpose, device="cpu"):
    """One generator per purpose, so that an extra draw in one place cannot move the draws of another."""
    return torch.Generator(device).manual_seed(
        zlib.crc32(f"{seed}/{purpose}".encode())
    )  # 32 bits: the CPU drops the rest


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are one line; the script's docstring is its help."""

    def __init__(self, doc):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        die(message, f"see python {self.prog} --help")


def common_args(parser, seed_of):
    """The flags that mean the same thing in all four scripts."""
    group = parser.add_argument_group("the same in every script")
    group.add_argument(
        "--dir",
        type=folder_name,
        default=Path("results"),
        help="the world: folder of splits and results (default: results)",
    )
    group.add_argument("--seed", type=whole(0), default=42, help=f"seed of {seed_of} (default: 42)")
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda", "mps"),
        default="auto",
        help="auto takes CUDA or MPS where there is one",
    )
    group.add_argument(
        "--threads",
        type=whole(1, 1024),
        default=1,
        help="CPU threads; results repeat exactly for the same number (default: 1)",
    )
    group.add_argument(
        "--report",
        action="store_true",
        help="compute nothing: redraw the figures and print the tables from the JSON in --dir",
    )
    return group


def whole(least, most=2**31 - 1):
    """An argparse type: an integer in [least, most]."""
    return _number(
        int,
        least,
        most,
        f"a whole number from {least}" + ("" if most == 2**31 - 1 else f" to {most}"),
    )


def real(least, most=math.inf, open_low=False):
    """An argparse type: a finite number in [least, most], or above `least` where `open_low`."""
    span = f"{'above' if open_low else 'at least'} {least:g}" + (
        "" if most == math.inf else f" and at most {most:g}"
    )
    return _number(
        float, math.nextafter(least, math.inf) if open_low else least, most, f"a number {span}"
    )


def folder_name(text):
    """An argparse type: a folder, whether it is there or not."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the folder has no name")
    try:
        taken = Path(text).exists() and not Path(text).is_dir()
    except OSError as e:  # a name that is too long, say
        raise argparse.ArgumentTypeError(f"{text[:40]!r} cannot be a folder: {e.strerror}") from e
    if taken:
        raise argparse.ArgumentTypeError(f"{text} is a file, not a folder")
    return Path(text)


def model_name(text):
    """An argparse type: NAME of DIR/NAME.pt, or FOLDER/NAME."""
    if not re.fullmatch(r".{0,199}[^/\s]", text):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not the name of a checkpoint")
    return text


def _number(kind, least, most, wanted):
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
        return value

    return parse


def setup(args):
    """Threads, deterministic algorithms and the device; returns a torch.device. A read-only --dir stops here, not after the work."""
    if args.dir.is_dir() and not os.access(args.dir, os.W_OK):
        die(f"--dir {args.dir} cannot be written", "make it writable or choose another one")
    name = args.device
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    elif name != "cpu" and not getattr(torch, name).is_available():
        die(f"--device {name} is not available here", "use --device auto")
    os.environ.setdefault(
        "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
    )  # what CUDA asks for before it is deterministic
    torch.set_deterministic_debug_mode(
        "warn" if name == "mps" else "error"
    )  # starts 0.8 s faster than use_deterministic_algorithms
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # nothing here reads what it has not written
    )
    torch.set_num_threads(args.threads)
    return torch.device(name)


# ---------------------------------------------------------------- files and errors


def die(what, mend):
    """The user's mistake: one line that says what is wrong and how to mend it, exit code 2."""
    if RANK == 0:  # the others make the same mistake
        print(f"{Path(sys.argv[0]).name}: {what}; {mend}".replace("\n", " "), file=sys.stderr)
    sys.exit(2)


def run(main):
    """Call a script's `main`; Ctrl-C and a folder that cannot be written get one line, everything unforeseen its traceback."""
    try:
        main()
    except KeyboardInterrupt:
        print(
            f"\n{Path(sys.argv[0]).name}: interrupted; finished files are whole, run the same command again",
            file=sys.stderr,
        )
        sys.exit(130)
    except BrokenPipeError:  # whoever read our output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        if e.errno not in (
            errno.ENOSPC,
            errno.EDQUOT,
            errno.EROFS,
            errno.EACCES,
            errno.EPERM,
            errno.ENOTDIR,
            errno.EISDIR,
            errno.EEXIST,
            errno.EFBIG,
            errno.ENAMETOOLONG,
        ):
            raise
        die(
            f"cannot write {e.filename or 'a file'}: {e.strerror}",
            "earlier files are intact; free some space or choose another --dir",
        )


@contextlib.contextmanager
def whole_file(path):
    """Yields a name beside `path`; the file takes its place only when it is complete. What a killed run left of it goes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    ours = f".{path.name}.{re.sub(r'[^a-zA-Z0-9]', '-', platform.node())}"  # other machines may write into the same folder
    for part in path.parent.glob(f"{glob.escape(ours)}.*.part"):
        if not is_alive(part.name.split(".")[-2]):
            part.unlink(missing_ok=True)
    part = path.with_name(f"{ours}.{os.getpid()}.part")
    try:
        yield part
        os.replace(part, path)
    except OSError as e:
        if e.filename in (None, str(part)):  # a full disk does not say of which file
            e.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


def is_alive(pid):
    if os.name != "posix":  # where os.kill would end it
        return True
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


@contextlib.contextmanager
def alone(path):
    """Inside `with`, no other process writes `path` and what belongs to it; a second one gets a line. A killed process holds no lock."""
    path = Path(path)
    try:
        import fcntl
    except ImportError:  # Windows
        fcntl = None
    if (
        fcntl is None or RANK > 0 or not path.parent.is_dir()
    ):  # without the folder, what the script reads is missing as well
        yield
        return
    lock = path.with_name(f".{path.name}.lock")
    while True:
        with open(lock, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                die(
                    f"another run is writing {path}",
                    "wait for it, or choose another --dir or --name",
                )
            except OSError:
                pass  # a file system without locks
            if os.fstat(file.fileno()).st_nlink == 0:
                continue  # the holder before us has just removed it
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def save_json(record, path):
    text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False)
    text = re.sub(
        r'\[[^][{}"]*\]', lambda numbers: " ".join(numbers[0].split()), text
    )  # a list of numbers takes one line
    with whole_file(path) as part:
        part.write_text(text + "\n")


def save_pt(record, path):
    with whole_file(path) as part:
        write_pt(record, part)


def write_pt(record, part):
    memory = (
        io.BytesIO()
    )  # torch.save reports a full disk as a RuntimeError; a plain write reports it as what it is
    torch.save(record, memory)
    part.write_bytes(memory.getbuffer())


def start_drawing():
    """matplotlib.pyplot, drawing into files; half a second of start-up that only a script with a figure pays."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(fig, path):
    import matplotlib.pyplot as plt

    memory = io.BytesIO()  # a full disk, as in save_pt
    fig.savefig(memory, format="png", dpi=150, metadata={"Software": None})
    plt.close(fig)
    with whole_file(path) as part:
        part.write_bytes(memory.getbuffer())


def load_json(path, mend, *keys):
    """A dictionary that has at least these keys; NaN is no JSON of ours."""
    try:
        record = json.loads(
            Path(path).read_text(), parse_constant=int
        )  # int("NaN") is a ValueError
    except FileNotFoundError:
        die(f"{path} is missing", mend)
    except OSError as e:
        die(f"cannot read {path}: {e.strerror}", mend)
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        die(f"{path} is not a whole JSON file of ours", mend)
    return with_keys(record, keys, path, mend)


def with_keys(record, keys, path, mend):
    if not isinstance(record, dict):
        die(f"{path}: not a dictionary", mend)
    for key in keys:
        if key not in record:
            die(f"{path} has no {key}", mend)
    return record


def meta_of(folder, *keys):
    """What make_data.py says of its world; {} in a folder of one's own. A world that is half painted stops the script."""
    path, again = Path(folder) / "meta.json", f"run: python make_data.py --dir {folder}"
    meta = load_json(path, again) if path.exists() else {}
    if meta.get("unfinished"):
        die(
            f"{path} says that make_data.py was stopped, so the splits may be of two worlds",
            "run it again",
        )
    return with_keys(meta, keys, path, again)


def load_pt(path, mend):
    """A dictionary of tensors and plain values; code inside the file is never run."""
    if not Path(path).is_file():
        die(f"{path} is {'a folder' if Path(path).is_dir() else 'missing'}", mend)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on a file that is refused below
            record = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        die(
            f"{path} holds something other than tensors and plain values, so it was not loaded",
            mend,
        )
    except PermissionError as e:
        die(f"cannot read {path}: {e.strerror}", mend)
    except (
        RuntimeError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        OSError,
        AssertionError,
        ArithmeticError,
        MemoryError,
        struct.error,
    ):
        die(f"{path} is truncated or not a .pt file", mend)
    if not isinstance(record, dict):
        die(f"{path} holds a {type(record).__name__}, not a dictionary", mend)
    return record


class Split(NamedTuple):
    images: torch.Tensor  # uint8 (N,3,H,W), channels-last
    labels: torch.Tensor  # int64 (N,)
    colors: torch.Tensor | None  # int64 (N,): the class that owns the image's colour
    gray: torch.Tensor | None  # uint8 (N,H,W): the digit before painting

    def x(self, index):
        """A batch as the models see it: float (B,3,H,W) in [0, 1]."""
        return self.images[index].float().div_(255)


def load_splits(folder, names=SPLITS, device="cpu"):
    """{name: Split} on the device; a file that is not such a split stops the script.

    In a folder of one's own that has train.pt but not all the others, a tenth of it each becomes val and test.
    """
    folder, absent = Path(folder), split_off(folder)
    meta_of(folder)
    if not absent:
        return {name: _load_split(folder / f"{name}.pt", device) for name in names}
    whole = _load_split(folder / "train.pt", device)
    n, tenth = len(whole.labels), len(whole.labels) // 10
    if tenth < 4:
        die(
            f"{folder}/train.pt has {n} images, too few to split val and test off",
            "add val.pt, test_hard.pt and test_unbiased.pt",
        )
    print(
        f"{folder} has no {', '.join(absent)}: {tenth:,} of the {n:,} images of train.pt each become val and test",
        flush=True,
    )
    order = torch.randperm(n, generator=stream(0, "split off")).to(device)
    places = {
        "val": order[:tenth],
        "test_hard": order[tenth : 2 * tenth],
        "test_unbiased": order[tenth : 2 * tenth],
    }
    taken = torch.cat([places[name] for name in absent])
    places = {"train": order[~torch.isin(order, taken)]} | {name: places[name] for name in absent}
    pick = lambda index: Split(*(None if part is None else part[index] for part in whole))
    return {
        name: pick(places[name]) if name in places else _load_split(folder / f"{name}.pt", device)
        for name in names
    }


def split_off(folder):
    """Which splits a folder lacks that nobody painted, and that hence come out of its train.pt."""
    if (folder / "meta.json").exists() or not (folder / "train.pt").exists():
        return []
    return [name for name in SPLITS if not (folder / f"{name}.pt").exists()]


def _load_split(path, device):
    mend = f"run: python make_data.py --dir {path.parent}"
    record = load_pt(path, mend)
    images = record.get("images")
    n = len(images) if torch.is_tensor(images) and images.ndim == 4 else 0
    wanted = {  # key: (shape, dtypes, must it be there)
        "images": ((n, 3, *images.shape[2:]) if n else "(N,3,H,W)", (torch.uint8,), True),
        "labels": ((n,), (torch.int64, torch.int32, torch.uint8), True),
        "colors": ((n,), (torch.int64, torch.int32, torch.uint8), False),
        "gray": ((n, *images.shape[2:]) if n else "(N,H,W)", (torch.uint8,), False),
    }
    for key, (shape, dtypes, needed) in wanted.items():
        t = record.get(key)
        if t is None and not needed:
            continue
        if (
            not torch.is_tensor(t)
            or t.dtype not in dtypes
            or t.shape != shape
            or t.layout != torch.strided
            or t.is_meta
        ):
            found = (
                f"{str(t.dtype)[6:]} {tuple(t.shape)}" if torch.is_tensor(t) else type(t).__name__
            )
            die(f"{path}: {key} is {found} but should be {str(dtypes[0])[6:]} {shape}", mend)
        if key in ("labels", "colors") and not 0 <= int(t.min()) <= int(t.max()) <= 999:
            die(
                f"{path}: {key} run from {int(t.min())} to {int(t.max())}, but classes count from 0",
                mend,
            )
    if min(images.shape[2:]) < 8:
        die(
            f"{path}: images are {tuple(images.shape[2:])} pixels, but the nets need 8x8 or more",
            mend,
        )
    move = lambda key, kind: None if record.get(key) is None else record[key].to(device, kind)
    return Split(
        images.to(device, memory_format=torch.channels_last),
        move("labels", torch.int64),
        move("colors", torch.int64),
        move("gray", torch.uint8),
    )


def load_model(folder, name, device="cpu"):
    """(model in eval mode, its record: weights, args, classes, size) as train.py saved it."""
    path = Path(folder) / f"{name}.pt"
    mend = f"run: python train.py --dir {folder} (its --name is METHOD_sSEED unless you choose one)"
    record = load_pt(path, mend)
    try:
        args = record["args"]
        if lacking := {"method", "seed"} - args.keys():
            raise ValueError(f"its args have no {' and no '.join(sorted(lacking))}")
        if args["model"] not in MODELS:
            raise ValueError(f"there is no model {args['model']!r}")
        if not all(value.isfinite().all() for value in record["weights"].values()):
            raise ValueError("its weights are not finite")
        model = build_model(
            args["model"],
            args["width"],
            record["classes"],
            record["size"],
            args.get("grayscale", False),
        )
        model.load_state_dict(record["weights"])
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        die(
            f"{path} is not a checkpoint of train.py ({(str(e) or type(e).__name__).splitlines()[0]})",
            mend,
        )
    return model.to(device).eval(), record


@torch.inference_mode()
def predict(model, split):
    """Predicted classes int64 (N,), the model in eval mode."""
    model.eval()
    return torch.cat(
        [model(split.x(slice(i, i + 1000))).argmax(1) for i in range(0, len(split.labels), 1000)]
    )


def family_of(name):
    """('jitter_alpha5', 42) of 'jitter_alpha5_s42' or 'unbiased/jitter_alpha5_s42': what the seeds of one setting share, and the seed."""
    stem, seed = re.fullmatch(r"(?:.*/)?(.+?)(?:_s(\d+))?", name).groups()
    return stem, None if seed is None else int(seed)


# ---------------------------------------------------------------- numbers and tables


def wilson(k, n, z=1.96):
    """95 % interval of a rate k/n (Wilson, 1927): (low, high)."""
    if n == 0:
        return 0.0, 1.0
    centre, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    return max(0.0, (centre - half) / (n + z * z)), min(1.0, (centre + half) / (n + z * z))


def fmt(value):
    """'0.943', or a dash where there is no number."""
    return "  -  " if value is None else f"{value:.3f}"


def mean_sd(values):
    """'0.943 ± 0.004 (5)': mean, sample standard deviation, number of seeds; one value stands alone."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1)):.3f} ({len(values)})"


def markdown(header, rows):
    """A Markdown table as one string."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


# ---------------------------------------------------------------- the attack


class Attacked(NamedTuple):
    x: torch.Tensor  # (B,3,H,W) in [0, 1] and in the ball
    steps: torch.Tensor  # int64 (B,): gradient steps each image took
    done: torch.Tensor  # bool (B,): did `stop` say so


def random_start(x, eps, gen):
    """Anywhere in the ball; pgd brings it back into [0, 1]. eps a float or (B,1,1,1)."""
    return x + eps * (2 * torch.rand(x.shape, generator=gen, device=gen.device).to(x) - 1)


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

    x (B,3,H,W) in [0, 1]; y (B,) labels to leave, or targets to reach where `targeted`; eps and step_size are floats or (B,), in
    pixel units (step_size: eps / 10 by default, falling linearly to a tenth of itself with `decay`). loss(logits, y) is a scalar in
    which every image has the same weight. stop(logits, y) -> bool (B,) takes finished images out of the batch, so they cost
    nothing more. `start` (B,3,H,W) replaces the random start. Nothing gathers in .grad; train/eval mode stays as it was found.
    """
    like = lambda v: (
        torch.as_tensor(v, dtype=x.dtype, device=x.device).expand(len(x)).view(-1, 1, 1, 1)
    )
    eps = like(eps)
    rate = (-1 if targeted else 1) * (eps / 10 if step_size is None else like(step_size))
    if start is None:
        start = random_start(x, eps, gen)
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    z = torch.maximum(torch.minimum(start, high), low).contiguous(memory_format=torch.channels_last)
    x_adv, taken = torch.empty_like(z), torch.zeros(len(x), dtype=torch.long, device=x.device)
    done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    alive = torch.arange(
        len(x), device=x.device
    )  # which images z, y, low, high and rate still hold
    training = model.training
    model.eval()
    for step in range(
        steps + (stop is not None)
    ):  # behind the last step, only `stop` asks once more
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
            alive, y, z, grad, low, high, rate = (
                t[keep] for t in (alive, y, z.detach(), grad, low, high, rate)
            )
        else:
            (grad,) = torch.autograd.grad(loss(logits, y), z)
        move = grad.sign_().mul_(rate * (1 - 0.9 * step / steps) if decay else rate)
        z = torch.maximum(torch.minimum(z.detach() + move, high), low)
    x_adv[alive] = z.detach()
    model.train(training)
    return Attacked(x_adv, taken, done)
