"""How fast the scripts are: ours against the way most people write it, taken in turns.

    python tests/bench.py            # about four minutes; needs the data: python make_data.py
    python tests/bench.py --quick    # under a minute, on fewer images
    python tests/bench.py --json bench.json

The other way is a DataLoader over single images with torchvision's transforms, an attack of 100
steps on one image after the other, and one heat map at a time through hooks; it is timed on fewer
images and scaled. Where it is cheap the results are compared too. Seconds are of CPU time on one
thread, and a ratio is the median of its rounds.
"""

import argparse
import contextlib
import io
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
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

# ---- the way most people write it


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
    rng = np.random.default_rng(0)
    means = [bytes.fromhex(mean[1:]) for mean in common.PALETTES["background"].values()]
    palette, images = np.array([list(mean) for mean in means]) / 255, []
    for digit, colour in zip(gray.numpy(), colours.numpy(), strict=True):
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
    """Targeted PGD on one image x (1,3,H,W); with `stop` no further than the first success."""
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
    """Bisection per image and criterion, each probe a PGD of its own; float (2,N)."""

    def is_target(p):
        return p.argmax().item() == TARGET

    def is_sure(p):
        return p[TARGET].item() >= attack.CONFIDENT

    found = []
    for reached in (is_target, is_sure):
        radii = []
        for x in images.split(1):
            low, high = 0.0, FAR
            while high - low > attack.RESOLUTION:
                eps = (low + high) / 2
                x_adv = plain_pgd(model, x, TARGET, eps, attack.SEARCH_STEPS, eps / 10)
                if reached(model(x_adv).softmax(1)[0]):
                    high = eps
                else:
                    low = eps
            radii.append(high)
        found.append(radii)
    return torch.tensor(found)


def plain_maps(model, images):
    """Grad-CAM of the predicted class, by hooks on the last ReLU; float (N,7,7)."""
    seen, maps = {}, []

    def forward(module, inputs, output):
        seen["activation"] = output.detach()

    def backward(module, inputs, outputs):
        seen["gradient"] = outputs[0]

    hooks = [model.relu.register_forward_hook(forward)]
    hooks.append(model.relu.register_full_backward_hook(backward))
    for x in images.split(1):
        logits = model(x)
        model.zero_grad()
        logits[0, logits.argmax()].backward()
        weights = seen["gradient"].mean((2, 3), keepdim=True)
        maps.append(F.relu((weights * seen["activation"]).sum(1)))
    for hook in hooks:
        hook.remove()
    return torch.cat(maps)


# ---- taking turns


def seconds(work, *given):
    """(CPU seconds, result) of work(*given); what it prints is dropped."""
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        result = work(*given)
    return time.process_time() - began, result


def agree(naive, ours):
    return True


class Row(NamedTuple):
    what: str
    goal: float | None  # how many times faster ours should be
    naive: object  # the first n images to a result
    ours: object
    few: int  # images that the naive way is timed on
    n: int  # images that ours is timed on, and that both are scaled to
    same: object = agree  # do the two results agree


def race(row, rounds):
    """Medians of seconds, and of their ratios, over rounds in which one follows the other."""
    times = []
    for _ in range(rounds):
        (naive, theirs), (ours, result) = seconds(row.naive, row.few), seconds(row.ours, row.n)
        assert row.same(theirs, result), f"{row.what}: the naive way and ours disagree"
        times.append((naive * row.n / row.few, ours))
    naive, ours = (median(t) for t in zip(*times, strict=True))
    ratio = median(a / b for a, b in times)
    return {"what": row.what, "naive": naive, "ours": ours, "ratio": ratio, "goal": row.goal}


def take(split, n):
    return common.Split(*(part[:n] for part in split))


def epoch(splits, n, flags=""):
    """A model after one epoch on the first n training images."""
    args = train.get_args(["--epochs", "1", *flags.split()])
    torch.manual_seed(args.seed)
    model = common.build_model()
    few = {name: take(split, n if name == "train" else 10) for name, split in splits.items()}
    train.train(model, few, args, torch.device("cpu"))
    return model


def training_rows(splits):
    trained, test = splits["train"], take(splits["test_unbiased"], 500)
    gray = torch.cat([split.gray for split in splits.values()])[:70_000]
    colours = torch.cat([split.colors for split in splits.values()])[:70_000]
    recolour = transforms.ColorJitter(0.5, 0.5, 0.5, 0.5)

    def ours_painted(n):
        return common.paint(gray[:n], colours[:n], common.stream(0, "paint"))

    def by_colour(x):
        groups = [x[colours[: len(x)] == c] for c in range(10)]
        return torch.stack([torch.stack([g.mean((0, 2, 3)), g.std((0, 2, 3))]) for g in groups])

    def painted_alike(naive, ours):
        naive = torch.from_numpy(naive).permute(0, 3, 1, 2).float()
        return (by_colour(naive) - by_colour(ours[: len(naive)].float())).abs().max() < 1

    def predicts_alike(_, model):
        naive = plain_predict(plain(model), test)
        return (naive == common.predict(model, test)).float().mean() > 0.99

    def naive_jitter(n):
        return plain_epoch(take(trained, n), recolour)

    sizes = 9000, 54_000
    yield Row(
        "paint the four splits",
        10,
        lambda n: plain_paint(gray[:n], colours[:n]),
        ours_painted,
        2000,
        70_000,
        painted_alike,
    )
    yield Row(
        "baseline epoch",
        3,
        lambda n: plain_epoch(take(trained, n)),
        lambda n: epoch(splits, n),
        *sizes,
        predicts_alike,
    )
    for what, flags in (("mix", ""), ("torchvision's", "--jitter hsv --classify image --no-fade")):
        yield Row(
            f"jitter epoch, {what} recolouring",
            6,
            naive_jitter,
            lambda n, flags=flags: epoch(splits, n, f"--method jitter {flags}"),
            *sizes,
        )


def attack_rows(test, name, model):
    sevens = (test.labels == 7).nonzero()[:, 0]
    sevens = test.x(sevens[torch.arange(1000) % len(sevens)])
    target = torch.full((1000,), TARGET)
    simple, args = plain(model), attack.get_args(["--steps", str(STEPS)])

    def fool(n):
        gen = common.stream(0, "attack")
        return attack.headline(model, sevens[:n], target[:n], args, gen)[0]["confidence"].isfinite()

    def radii(n):
        gen = common.stream(0, "min-eps")
        steps = attack.SEARCH_STEPS
        found = attack.search_min_eps(
            model, sevens[:n], target[:n], attack.RADII, gen, steps
        ).values()
        return torch.stack(list(found))

    def as_often(naive, ours):
        return (naive == ours[: len(naive)]).float().mean() >= 0.9

    def as_near(naive, ours):
        apart = naive - ours[:, : naive.shape[1]].clamp(max=FAR)
        return apart.abs().median() < 3 * attack.RESOLUTION

    def maps(n):
        subject = SimpleNamespace(model=model, target_layer=model.relu)
        return gradcam.heat_of(subject, take(test, n), "gradcam").maps

    def maps_alike(naive, ours):
        return torch.allclose(naive, ours[: len(naive)], atol=1e-4 * float(ours.max()))

    what = f"{name}, 7 to {TARGET}"
    yield Row(
        f"attack {what}", 10, lambda n: plain_attack(simple, sevens[:n]), fool, 20, 1000, as_often
    )
    yield Row(
        f"attack {what}, naive stops early too",
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
        maps,
        500,
        10_000,
        maps_alike,
    )


# ---- numbers without a rival


def share_of_peak(splits, rounds):
    """GFLOP/s of a baseline step (batch of 128), and of a large float32 matrix product."""
    model, square = common.build_model(), torch.rand(1024, 1024)
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    x, y = splits["train"].x(slice(128)), splits["train"].labels[:128]

    def steps(times):
        for _ in range(times):
            train.update(optimiser, F.cross_entropy(model(x), y))

    def products(times):
        for _ in range(times):
            square @ square

    with FlopCounterMode(display=False) as counter:
        steps(1)
    work = counter.get_total_flops() / 1e9, 2 * 1024**3 / 1e9
    ours = [50 * work[0] / seconds(steps, 50)[0] for _ in range(rounds)]
    peak = [20 * work[1] / seconds(products, 20)[0] for _ in range(rounds)]
    return {"step_gflops": median(ours), "peak_gflops": median(peak)}


def start_up(rounds):
    """Seconds by the clock of --help, beside a bare `import torch`."""
    commands = {"import torch": ["-c", "import torch"]}
    for script in ("make_data.py", "train.py", "gradcam.py", "attack.py"):
        commands[f"{script} --help"] = [str(ROOT / script), "--help"]
    found = {}
    for what, command in commands.items():
        times = []
        for _ in range(rounds):
            began = time.time()
            subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
            times.append(time.time() - began)
        found[what] = median(times)
    return found


def main():
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    p.add_argument("--dir", type=Path, default=ROOT / "results", help="the world and its models")
    p.add_argument("--quick", action="store_true", help="a tenth of the images, one round")
    p.add_argument("--json", type=Path, help="write the numbers here as well")
    args = p.parse_args()
    common.setup(SimpleNamespace(dir=args.dir, device="cpu", threads=1))
    splits = {name: common.load_split(args.dir, name) for name in common.SPLITS}
    races = list(training_rows(splits))
    for name in ("baseline", "jitter"):
        model = common.load_model(args.dir, f"{name}_s42")[0]
        races += attack_rows(splits["test_unbiased"], name, model)
    rounds, found = 1 if args.quick else 3, []
    for row in races:
        if args.quick:
            row = row._replace(few=max(row.few // 5, 5), n=row.n // 10)
        found.append(race(row, rounds))
        print(f"{row.what}: {found[-1]['ratio']:.1f} times faster", file=sys.stderr, flush=True)
    record = {"races": found, "start_up": start_up(rounds), "peak": share_of_peak(splits, rounds)}
    table = [[r["what"], *(f"{r[k]:.2f}" for k in ("naive", "ours", "ratio"))] for r in found]
    print(common.markdown(["what", "naive (s)", "ours (s)", "ratio"], table))
    for key in ("start_up", "peak"):
        table = [[what, f"{number:.2f}"] for what, number in record[key].items()]
        print(common.markdown([key, "seconds" if key == "start_up" else "GFLOP/s"], table))
    if args.json:
        common.save_json(record, args.json)


if __name__ == "__main__":
    main()
