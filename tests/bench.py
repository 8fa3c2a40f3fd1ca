"""How fast the scripts are: ours against the way most people write it, in one process, on one thread, taken in turns.

    python tests/bench.py            # about four minutes; needs the data: python make_data.py
    python tests/bench.py --quick    # under a minute, on fewer images
    python tests/bench.py --json bench.json

The other way is a DataLoader over a Dataset of single images with torchvision's transforms, an attack of a fixed number of steps
(100) on one image after the other, and one heat map at a time through hooks; on fewer images, scaled. Where it is cheap the results are compared too:
colours, predictions, maps, which images were fooled and by how much. Seconds are of CPU time, which other processes blur less than the
clock, and a ratio is the median of its rounds. The naive way gains from what the process shares: one thread and a warm allocator.
"""

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import attack  # noqa: E402  (the scripts live at the top, not in a package)
import common  # noqa: E402
import gradcam  # noqa: E402
import train  # noqa: E402

EPS, STEPS, FAR, TARGET = 0.05, 100, 0.5, 3  # of the attacks; FAR is the largest radius

# ---------------------------------------------------------------- the way most people write it


class PlainCNN(nn.Module):
    """The same net: convolution, ReLU, pool."""

    def __init__(self, width=4, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.pool, self.relu = nn.MaxPool2d(2), nn.ReLU()
        self.fc = nn.Linear(2 * width * 49, classes)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        return self.fc(self.relu(self.conv3(x)).flatten(1))


def plain(model):
    copy = PlainCNN()
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def plain_paint(gray, colours):
    rng, palette = (
        np.random.default_rng(0),
        np.array(list(common.PALETTES["background"].values())) / 255,
    )
    images = []
    for digit, colour in zip(gray.numpy(), colours.numpy()):
        g = digit[:, :, None] / 255
        background = np.clip(palette[colour] + rng.normal(0, 0.15, (28, 28, 1)), 0, 1)
        images.append(np.round((background * (1 - g) + 0.6 * g) * 255).astype(np.uint8))
    return np.stack(images)


class Painted(Dataset):
    """One image at a time, and with `jitter` a second view of it."""

    def __init__(self, split, jitter=None):
        self.images, self.labels = split.images.permute(0, 2, 3, 1).numpy(), split.labels.tolist()
        self.jitter, self.to_tensor = jitter, transforms.ToTensor()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        image = Image.fromarray(self.images[i])
        views = [self.to_tensor(image)] + (
            [self.to_tensor(self.jitter(image))] if self.jitter else []
        )
        return *views, self.labels[i]


def plain_epoch(split, jitter=None):
    torch.manual_seed(0)
    model = PlainCNN()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    total = 0.0
    for x, *other, y in DataLoader(Painted(split, jitter), batch_size=128, shuffle=True):
        optimiser.zero_grad()
        logits = model(x)
        loss = F.cross_entropy(logits, y)
        if jitter:
            loss = loss + F.kl_div(
                F.log_softmax(model(other[0]), 1),
                F.log_softmax(logits, 1),
                log_target=True,
                reduction="batchmean",
            )
        loss.backward()
        optimiser.step()
        total += loss.item() * len(y)
    return total / len(split.labels)


@torch.no_grad()
def plain_predict(model, split):
    return torch.cat([model(x).argmax(1) for x, _ in DataLoader(Painted(split), batch_size=128)])


def plain_pgd(model, x, target, eps, steps, step_size, stop=False):
    """Targeted PGD on one image x (1,3,H,W), all steps; with `stop` no further than the first success."""
    x_adv = (x + (2 * torch.rand_like(x) - 1) * eps).clamp(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_()
        logits = model(x_adv)
        if stop and logits.softmax(1)[0, target] >= attack.CONFIDENT:
            break
        (grad,) = torch.autograd.grad(F.cross_entropy(logits, torch.tensor([target])), x_adv)
        x_adv = x_adv.detach() - step_size * grad.sign()
        x_adv = torch.min(torch.max(x_adv, x - eps), x + eps).clamp(0, 1)
    return x_adv.detach()


def plain_attack(model, images, stop=False):
    """Is the target's probability 0.9 in the end, per image."""
    done = []
    for x in images.split(1):
        p = model(plain_pgd(model, x, TARGET, EPS, STEPS, EPS / 10, stop)).softmax(1)
        done.append(p[0, TARGET].item() >= attack.CONFIDENT)
    return torch.tensor(done)


def plain_min_eps(model, images):
    """Bisection per image and criterion, every probe a PGD of as many steps as ours takes at a new radius; float (2,N)."""
    found = []
    for reached in (
        lambda p: p.argmax().item() == TARGET,
        lambda p: p[TARGET].item() >= attack.CONFIDENT,
    ):
        radii = []
        for x in images.split(1):
            low, high = 0.0, FAR
            while high - low > attack.RESOLUTION:
                middle = (low + high) / 2
                p = model(
                    plain_pgd(model, x, TARGET, middle, attack.SEARCH_STEPS, middle / 10)
                ).softmax(1)[0]
                low, high = (low, middle) if reached(p) else (middle, high)
            radii.append(high)
        found.append(radii)
    return torch.tensor(found)


def plain_maps(model, images):
    """Grad-CAM of the predicted class, by hooks on the last ReLU; float (N,7,7)."""
    seen, maps = {}, []
    hooks = [
        model.relu.register_forward_hook(
            lambda module, inputs, output: seen.update(activation=output.detach())
        ),
        model.relu.register_full_backward_hook(
            lambda module, inputs, outputs: seen.update(gradient=outputs[0])
        ),
    ]
    for x in images.split(1):
        logits = model(x)
        model.zero_grad()
        logits[0, logits.argmax()].backward()
        maps.append(
            F.relu((seen["gradient"].mean((2, 3), keepdim=True) * seen["activation"]).sum(1))
        )
    for hook in hooks:
        hook.remove()
    return torch.cat(maps)


# ---------------------------------------------------------------- taking turns


def seconds(work, *given):
    """(CPU seconds, result) of work(*given); what it prints is dropped."""
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        result = work(*given)
    return time.process_time() - began, result


class Row(NamedTuple):
    what: str
    goal: float | None  # how many times faster ours should be
    naive: object  # the first n images -> a result
    ours: object
    few: int  # images that the naive way is timed on
    n: int  # images that ours is timed on, and that both are scaled to
    same: object = lambda naive, ours: True  # do the two results agree


def race(row, rounds):
    """The row as a dictionary: medians of seconds, and of their ratios, over rounds in which one follows the other."""
    times = []
    for _ in range(rounds):
        (naive, theirs), (ours, result) = seconds(row.naive, row.few), seconds(row.ours, row.n)
        assert row.same(theirs, result), f"{row.what}: the naive way and ours disagree"
        times.append((naive * row.n / row.few, ours))
    naive, ours = (median(t) for t in zip(*times))
    return {
        "what": row.what,
        "naive": naive,
        "ours": ours,
        "ratio": median(a / b for a, b in times),
        "goal": row.goal,
        "n_naive": row.few,
        "n": row.n,
    }


def take(split, n):
    return common.Split(*(part[:n] for part in split))


def rows(splits, nets):
    """Every row at full size."""
    trained, test = splits["train"], splits["test_unbiased"]
    gray, colours = (
        torch.cat([getattr(split, key) for split in splits.values()])[:70_000]
        for key in ("gray", "colors")
    )
    sevens = (test.labels == 7).nonzero()[:, 0]
    sevens = test.x(sevens[torch.arange(1000) % len(sevens)])
    target = torch.full((1000,), TARGET)

    def epoch(n, flags=""):
        args = train.get_args(["--epochs", "1", *flags.split()])
        torch.manual_seed(args.seed)
        model = common.build_model()
        train.train(
            model,
            {name: take(split, n if name == "train" else 10) for name, split in splits.items()},
            args,
            torch.device("cpu"),
        )
        return model

    def predicts_alike(_, model):
        return (
            plain_predict(plain(model), take(test, 500)) == common.predict(model, take(test, 500))
        ).float().mean() > 0.99

    def painted_alike(naive, ours):
        mean_and_sd = lambda x: torch.stack(
            [
                torch.stack(
                    [
                        x[colours[: len(x)] == c].mean((0, 2, 3)),
                        x[colours[: len(x)] == c].std((0, 2, 3)),
                    ]
                )
                for c in range(10)
            ]
        )
        naive = torch.from_numpy(naive).permute(0, 3, 1, 2).float()
        return (mean_and_sd(naive) - mean_and_sd(ours[: len(naive)].float())).abs().max() < 1

    recolour = transforms.ColorJitter(0.5, 0.5, 0.5, 0.5)
    published = "--method jitter --jitter hsv --classify image --no-fade"
    yield Row(
        "paint the four splits",
        10,
        lambda n: plain_paint(gray[:n], colours[:n]),
        lambda n: common.paint(gray[:n], colours[:n], common.stream(0, "paint")),
        2000,
        70_000,
        painted_alike,
    )
    yield Row(
        "baseline epoch",
        3,
        lambda n: plain_epoch(take(trained, n)),
        epoch,
        9000,
        54_000,
        predicts_alike,
    )
    yield Row(
        "jitter epoch",
        6,
        lambda n: plain_epoch(take(trained, n), recolour),
        lambda n: epoch(n, "--method jitter"),
        9000,
        54_000,
    )
    yield Row(
        "jitter epoch, torchvision's own jitter",
        6,
        lambda n: plain_epoch(take(trained, n), recolour),
        lambda n: epoch(n, published),
        9000,
        54_000,
    )
    for name, model in nets.items():
        simple, args = plain(model), attack.get_args(["--steps", str(STEPS)])
        fool = lambda n: attack.headline(
            model, sevens[:n], target[:n], args, common.stream(0, "attack")
        )[0]["confidence"].isfinite()
        radii = lambda n: torch.stack(
            [
                *attack.search_min_eps(
                    model, sevens[:n], target[:n], args.sweep, common.stream(0, "min-eps")
                ).values()
            ]
        )
        as_often = lambda naive, ours: (naive == ours[: len(naive)]).float().mean() >= 0.9
        as_near = lambda naive, ours: (
            (naive - ours[:, : naive.shape[1]].clamp(max=FAR)).abs().median()
            < 3 * attack.RESOLUTION
        )
        yield Row(
            f"attack {name}, 7 to {TARGET}",
            10,
            lambda n: plain_attack(simple, sevens[:n]),
            fool,
            20,
            1000,
            as_often,
        )
        yield Row(
            f"attack {name}, naive stops early too",
            None,
            lambda n: plain_attack(simple, sevens[:n], stop=True),
            fool,
            50,
            1000,
            as_often,
        )
        yield Row(
            f"min-eps of {name}, two criteria",
            20,
            lambda n: plain_min_eps(simple, sevens[:n]),
            radii,
            10,
            200,
            as_near,
        )
    yield Row(
        f"heat maps of {name}",
        30,
        lambda n: plain_maps(simple, take(test, n).x(slice(None))),
        lambda n: gradcam.heat_of(model, model.relu, take(test, n), "gradcam").maps,
        500,
        10_000,
        lambda naive, ours: torch.allclose(
            naive, ours[: len(naive)], atol=1e-4 * float(ours.max())
        ),
    )


# ---------------------------------------------------------------- numbers without a rival


def share_of_peak(splits, rounds):
    """GFLOP/s of a baseline step (batch of 128), those of a large float32 matrix product, and the share."""
    model, batch, square = common.build_model(), 128, torch.rand(1024, 1024)
    optimiser, x, y = (
        torch.optim.AdamW(model.parameters(), fused=True),
        splits["train"].x(slice(batch)),
        splits["train"].labels[:batch],
    )
    step = lambda: train.update(optimiser, F.cross_entropy(model(x), y))
    with FlopCounterMode(display=False) as counter:
        step()
    repeat = lambda work, times: [work() for _ in range(times)]
    speeds = [
        (
            50 * counter.get_total_flops() / seconds(repeat, step, 50)[0] / 1e9,
            20 * 2 * 1024**3 / seconds(repeat, lambda: square @ square, 20)[0] / 1e9,
        )
        for _ in range(rounds)
    ]
    step, peak = (median(s) for s in zip(*speeds))
    return {"step_gflops": step, "peak_gflops": peak, "share": median(a / b for a, b in speeds)}


def growth(row, rounds):
    """Microseconds per image on a sixteenth of the images, a quarter, and all of them."""
    sizes = [row.n // 16, row.n // 4, row.n]
    times = [[seconds(row.ours, n)[0] / n * 1e6 for n in sizes] for _ in range(rounds)]
    return {
        "what": row.what,
        "n": sizes,
        "microseconds_per_image": [median(t) for t in zip(*times)],
    }


def start_up(folder, rounds):
    """Seconds by the clock until a script has read its arguments, and until train.py is in its first epoch; beside a bare `import torch`."""
    scripts = ("make_data.py", "train.py", "gradcam.py", "attack.py")
    commands = {
        "import torch": ["-c", "import torch"],
        **{f"{script} --help": [str(ROOT / script), "--help"] for script in scripts},
        "train.py, in its first epoch": [str(ROOT / "train.py"), "--dir", str(folder)],
    }
    times = []
    for _ in range(rounds):
        times.append([])
        for what, command in commands.items():
            began = time.time()
            with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE) as child:
                if "epoch" in what:
                    child.stdout.readline()  # the arguments, printed when everything is loaded
                    child.kill()
                else:
                    child.communicate()
            times[-1].append(time.time() - began)
    return {what: median(t) for what, t in zip(commands, zip(*times))}


def peak_memory(folder):
    """GB that one epoch on all training images takes at its peak."""
    ask = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )  # a child starts with its parent's peak, so this small one comes between
    command = [
        sys.executable,
        "-c",
        ask,
        sys.executable,
        str(ROOT / "train.py"),
        "--dir",
        str(folder),
        "--epochs",
        "1",
    ]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return peak / (1e9 if sys.platform == "darwin" else 1e6)  # bytes there, kilobytes elsewhere


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--quick", action="store_true", help="a tenth of the images, one round")
    p.add_argument("--json", type=Path, help="write the numbers here as well")
    args = p.parse_args()
    common.setup(argparse.Namespace(dir=Path(tempfile.gettempdir()), device="cpu", threads=1))
    splits = common.load_splits(ROOT / "results")
    nets = {
        name: common.load_model(ROOT / "results", f"{name}_s42")[0]
        for name in ("baseline", "jitter")
    }
    rounds, found = 1 if args.quick else 3, {"rows": [], "growth": []}
    table = []
    for row in rows(splits, nets):
        small = row._replace(few=max(row.few // 5, 5), n=row.n // 10) if args.quick else row
        r = race(small, rounds)
        found["rows"].append(r)
        print(f"{row.what}: {r['ratio']:.1f}x", file=sys.stderr, flush=True)
        table.append(
            [
                f"{small.n:,} images: {row.what}",
                f"{r['naive']:.2f} s",
                f"{r['ours']:.2f} s",
                f"{r['ratio']:.1f}x",
                f"{row.goal}x" if row.goal else "-",
                f"naive {small.few:,}, ours {small.n:,}",
            ]
        )
        if row.what in ("paint the four splits", "baseline epoch") or "heat" in row.what:
            found["growth"].append(growth(small, rounds))
    with tempfile.TemporaryDirectory() as folder:
        for name in (*(f"{split}.pt" for split in common.SPLITS), "meta.json"):
            (Path(folder) / name).symlink_to(ROOT / "results" / name)
        found |= {
            "peak": share_of_peak(splits, rounds),
            "start_up": start_up(folder, rounds),
            "memory_gb": peak_memory(folder),
        }
    print(common.markdown(["what", "naive", "ours", "ratio", "goal", "images timed"], table))
    print(
        common.markdown(
            ["microseconds per image", "1x", "4x", "16x"],
            [
                [
                    f"{g['what']}, {g['n'][0]:,} images and more",
                    *(f"{t:.1f}" for t in g["microseconds_per_image"]),
                ]
                for g in found["growth"]
            ],
        )
    )
    print(
        common.markdown(
            ["seconds to start", ""], [[what, f"{t:.2f}"] for what, t in found["start_up"].items()]
        )
    )
    peak = found["peak"]
    print(
        f"A baseline step does {peak['step_gflops']:.1f} GFLOP/s, {peak['share']:.0%} of the {peak['peak_gflops']:.0f} of a 1024x1024 float32 product."
    )
    print(f"An epoch of 54,000 images takes {found['memory_gb']:.2f} GB at its peak.")
    if args.json:
        common.save_json(found, args.json)


if __name__ == "__main__":
    main()
