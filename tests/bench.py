"""How long a training step, an attack and a heat map take, beside the way most people write them.

    python tests/bench.py    # a minute; needs python make_data.py and python train.py
    python tests/bench.py --dir results/mnist --model at_s42

The other way is a DataLoader over single images, and one image after the other for attacks and
heat maps. Both compute the same, and a test image that they disagree on stops the bench. Seconds
are of processor time on one thread; each row shows the median of its rounds.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import attack  # noqa: E402  (the scripts live at the top, not in a package)
import common  # noqa: E402
import gradcam  # noqa: E402
import train  # noqa: E402

EPS, STEPS = 0.05, 50  # of the attack


def fresh():
    """A net and its optimiser, the same every time."""
    torch.manual_seed(0)
    model = common.build_model()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def our_steps(split):
    """The losses of one pass: a batch is an index into one tensor."""
    model, optimiser = fresh()
    losses = []
    for part in common.chunks(len(split.labels), 128):
        loss = F.cross_entropy(model(split.x(part)), split.labels[part])
        losses.append(train.update(optimiser, loss))
    return torch.stack(losses)


def plain_steps(split):
    model, optimiser = fresh()
    losses = []
    images = [(image.float() / 255, y) for image, y in zip(split.images, split.labels, strict=True)]
    for x, y in DataLoader(images, 128):
        loss = F.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return torch.tensor(losses)


def our_attack(model, split):
    """Is the answer still right after PGD: 1 or 0, float (N,)."""
    x, y = split.x(slice(None)), split.labels
    found = attack.pgd(model, x, y, EPS, STEPS, common.stream(0, "bench"), start=x)
    return (model(found.x).argmax(1) == y).float()


def plain_attack(model, split):
    right = []
    for i, y in enumerate(split.labels.split(1)):
        x = split.x(slice(i, i + 1))
        x_adv = x
        for _ in range(STEPS):
            x_adv = x_adv.detach().requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(model(x_adv), y), x_adv)
            x_adv = x_adv + EPS / 10 * grad.sign()
            x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
        right.append(model(x_adv).argmax(1) == y)
    return torch.cat(right).float()


def our_maps(model, split):
    """Grad-CAM of the predicted class, float (N,h,w)."""
    maps = []
    for part in common.chunks(len(split.labels)):
        e = gradcam.explain(model, model.relu, split.x(part))
        maps.append(gradcam.gradcam(e.activation, e.gradient).relu())
    return torch.cat(maps)


def plain_maps(model, split):
    images = [split.take(slice(i, i + 1)) for i in range(len(split.labels))]
    return torch.cat([our_maps(model, image) for image in images])


def seconds(work, *given):
    began = time.process_time()
    return work(*given), time.process_time() - began


def race(what, unit, ours, plain, few, many):
    """Print milliseconds per unit of both ways; the plain one is timed on the split `few`."""
    times = []
    for _ in range(3):
        result, mine = seconds(ours, many)
        naive, theirs = seconds(plain, few)
        same = (naive - result[: len(naive)]).abs() < 1e-3
        assert same.float().mean() > 0.98, f"{what}: the two ways disagree"
        times.append((1000 * mine / len(result), 1000 * theirs / len(naive)))
    mine, theirs = (median(column) for column in zip(*times, strict=True))
    print(f"{what:14s} {mine:9.3f} {theirs:9.3f} {theirs / mine:7.1f}  ms per {unit}", flush=True)


def main():
    form = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    p.add_argument("--dir", type=Path, default=ROOT / "results", help="the world")
    p.add_argument("--model", default="baseline_s42", help="attacked and looked at")
    args = p.parse_args()
    common.setup(SimpleNamespace(dir=args.dir, device="cpu", threads=1))
    splits = [common.load_split(args.dir, name) for name in ("train", "test_unbiased")]
    model = common.load_model(args.dir, args.model)[0]
    data, test = splits[0].take(slice(12_800)), splits[1].take(slice(1000))
    few = test.take(slice(50))
    print(f"{'':14s} {'ours':>9s} {'plain':>9s} {'times':>7s}")
    race("training step", "step of 128", our_steps, plain_steps, data, data)
    for what, *ways in (("attack", our_attack, plain_attack), ("heat map", our_maps, plain_maps)):
        race(what, "image", *(partial(way, model) for way in ways), few, test)


if __name__ == "__main__":
    main()
