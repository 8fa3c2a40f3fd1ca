"""Train one classifier on a biased world with one method, and score it on every split.

Reads   DIR/train.pt, val.pt, test_hard.pt, test_unbiased.pt                (from make_data.py)
Writes  DIR/NAME.pt, DIR/NAME.json; with --report DIR/figures/*.png (robgan: DIR/figures/NAME_epoch_NN.png as it trains)

    python train.py                                    # the lazy model: results/baseline_s42.json
    python train.py --method jitter --alpha 2          # the cured one
    python train.py --method grl --gamma 0.1 --seed 43
    python train.py --eval jitter_s42                  # score a saved model again, without training
    python train.py --report                           # figures and tables of every run in --dir
    torchrun --standalone --nproc_per_node=2 train.py  # one model in two processes, each with its share of every batch
"""

import argparse
import contextlib
import copy
import datetime
import functools
import itertools
import math
import os
import re
import sys
import textwrap
import time
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from common import (
    CNNS,
    INK,
    MODELS,
    RANK,
    SPLITS,
    Parser,
    Split,
    alone,
    build_model,
    common_args,
    die,
    family_of,
    fmt,
    load_json,
    load_model,
    load_pt,
    load_splits,
    luma,
    markdown,
    mean_sd,
    meta_of,
    model_name,
    pgd,
    predict,
    real,
    run,
    save_figure,
    save_json,
    save_pt,
    setup,
    split_off,
    start_drawing,
    stream,
    whole,
    wilson,
    with_keys,
)

EVAL_SPLITS = SPLITS[1:]
WORLD = (
    int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1
)  # processes that train this model together, of which this is number RANK


class Batch(NamedTuple):
    x: torch.Tensor  # float (B,3,H,W) in [0, 1]
    y: torch.Tensor  # int64 (B,)
    colour: torch.Tensor | None  # int64 (B,): the class that owns the background colour
    index: torch.Tensor  # int64 (B,): which training images these are
    progress: float  # share of the training that is over, 0 to 1
    weight: float = 1.0  # of these images among those of all processes, 0 to 1


# ---------------------------------------------------------------- colour jitter, batched


def per_image(x, gen, low, high):
    """One uniform draw per image, shaped (B,1,1,1)."""
    return torch.rand(len(x), 1, 1, 1, generator=gen, device=x.device) * (high - low) + low


def mix(x, args, gen):
    """A random linear mixture of the colour channels per image, with grain, each channel stretched to a random range.

    The rows of the 3x3 matrix have unit norm and any sign, so every colour can become every other and light can become dark, but an
    edge stays an edge. Differences of channels can cancel the brightness noise of a texture, so grain puts some back: one normal draw
    per pixel, sd up to --grain by image. x (B,3,H,W) in [0, 1], and so is the result.
    """
    b, _, h, w = x.shape
    draw = lambda *shape: torch.rand(shape, generator=gen, device=x.device)
    matrix = F.normalize(torch.randn(b, 3, 3, generator=gen, device=x.device), dim=2)
    grain = args.grain * draw(b, 1, 1) * torch.randn(b, 1, h * w, generator=gen, device=x.device)
    mixed = torch.bmm(matrix, x.reshape(b, 3, h * w)) + grain  # (B,3,HW)
    darkest, lightest = mixed.aminmax(dim=2, keepdim=True)
    span = 0.1 + 0.9 * draw(b, 3, 1)
    low = (1 - span) * draw(b, 3, 1)
    scale = span / (lightest - darkest + 1e-6)
    mixed = mixed.mul_(scale).add_(low - darkest * scale).clamp_(0, 1)
    return mixed.view(b, 3, h, w).contiguous(memory_format=torch.channels_last)


def hsv(x, args, gen):
    """Random brightness, contrast, saturation (factors 0.5 to 1.5) and hue (any rotation), drawn per image.

    The operations and ranges are those of torchvision's ColorJitter(0.5, 0.5, 0.5, 0.5), which draws once for a whole batch and in
    random order; here every image has its own draw and the order is fixed. x (B,3,H,W) in [0, 1], and so is the result.
    """
    x = (x * per_image(x, gen, 0.5, 1.5)).clamp(0, 1)
    middle = luma(x).mean((2, 3), keepdim=True)
    x = torch.lerp(middle, x, per_image(x, gen, 0.5, 1.5)).clamp(0, 1)
    x = torch.lerp(luma(x), x, per_image(x, gen, 0.5, 1.5)).clamp(0, 1)
    value, chroma = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    sixth = torch.where(
        value == r,
        (g - b) / (chroma + 1e-8),
        torch.where(value == g, 2 + (b - r) / (chroma + 1e-8), 4 + (r - g) / (chroma + 1e-8)),
    )
    k = (
        x.new_tensor([5, 3, 1]).view(1, 3, 1, 1) + sixth + per_image(x, gen, -3, 3)
    ) % 6  # hue counts in sixths of the circle
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


JITTERS = {"mix": mix, "hsv": hsv}


# ---------------------------------------------------------------- methods: what each is told, and its loss


def baseline(model, batch, args, gen):
    """Empirical risk minimisation: the row that every other row is compared with."""
    return F.cross_entropy(model(batch.x), batch.y)


def jitter(model, batch, args, gen):
    """Cross-entropy on a random recolouring, and alpha times the KL divergence between the predictions for it and for the image itself.

    Ours: the recoloured copy is classified and drawn towards the prediction for the image, with a weight that falls linearly from alpha
    to 0, since late in training agreement costs more than it teaches. The Lazy Artist classifies the image and keeps the weight:
    --jitter hsv --classify image --no-fade. With --alpha 0 this is plain augmentation.
    """
    if args.alpha == 0 and args.classify == "recoloured":
        return F.cross_entropy(model(JITTERS[args.jitter](batch.x, args, gen)), batch.y)
    return jitter_loss(*two_colourings(model, batch, args, gen), batch, args)


def two_colourings(model, batch, args, gen):
    """Logits of the images themselves and of recoloured copies, (B,classes) each."""
    return model(torch.cat([batch.x, JITTERS[args.jitter](batch.x, args, gen)])).chunk(2)


def jitter_loss(image, recoloured, batch, args):
    classified = {"image": image, "recoloured": recoloured}[args.classify]
    weight = args.alpha * ((1 - batch.progress) if args.fade else 1)
    divergence = DIVERGENCES[args.divergence](
        image / args.temperature, recoloured / args.temperature
    )
    return F.cross_entropy(classified, batch.y) + weight * args.temperature**2 * divergence


def kl(p, q):
    """KL(p || q) of the softmax distributions of two sets of logits (B,classes), mean over the batch."""
    return F.kl_div(
        F.log_softmax(q, 1), F.log_softmax(p, 1), log_target=True, reduction="batchmean"
    )


DIVERGENCES = {  # of the image's logits and the recoloured copy's; temperature as in distillation (Hinton et al., 2015), whose square keeps the gradients' size
    "forward": kl,
    "reverse": lambda image, recoloured: kl(recoloured, image),
    "symmetric": lambda image, recoloured: (kl(image, recoloured) + kl(recoloured, image)) / 2,
}


def count_groups(split, classes):
    """Images per (digit, colour): float (classes, classes)."""
    return (
        torch.bincount(split.labels * classes + split.colors, minlength=classes**2)
        .view(classes, classes)
        .float()
    )


class BiasBal(nn.Module):
    """Bias balance (Hong & Yang, 2021): cross-entropy on logits + log p(digit given colour), which is known from the training labels.

    The net then has no reason to learn what the colour says about the digit; scoring uses the plain logits. A pair that training
    never shows counts as one image.
    """

    def __init__(self, model, splits, args):
        super().__init__()
        count = self.count(
            splits["train"], model.fc.out_features, args
        )  # (digit, colour); gradient reversal needs both directions
        self.register_buffer("digit_given_colour", (count / count.sum(0)).log().T.contiguous())
        self.register_buffer("colour_given_digit", (count / count.sum(1, keepdim=True)).log())

    def count(self, split, classes, args):
        return count_groups(split, classes).clamp(min=1)

    def forward(self, model, batch, args, gen):
        return self.digit_loss(model(batch.x), batch)

    def digit_loss(self, logits, batch):
        return F.cross_entropy(logits + self.digit_given_colour[batch.colour], batch.y)


class Reverse(torch.autograd.Function):
    """The identity on the way forward; the gradient times -scale on the way back (Ganin & Lempitsky, 2015)."""

    @staticmethod
    def forward(ctx, z, scale):
        ctx.scale = scale
        return z.view_as(z)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.scale * grad, None


class GRL(BiasBal):
    """Gradient reversal (Ganin & Lempitsky, 2015): a colour head learns to name the colour, the features learn to stop it.

    The head takes three updates, at three times the learning rate, for one of the net; the reversal starts after a fifth of the
    training and grows linearly to gamma, since features that know no digit yet are easily silenced for good. The larger departure:
    in training the digit nearly gives the colour away, so features that hide the colour would have to hide the digit. Hence both
    heads are asked for what the other label does not tell already: log p(digit given colour) and log p(colour given digit), counted
    on the training labels, are added to their logits. For the digit that is `biasbal`; --no-conditional leaves both out.
    """

    updates = lr_scale = 3

    def __init__(self, model, splits, args):
        super().__init__(model, splits, args)
        self.head = nn.Sequential(
            nn.Linear(model.fc.in_features, 64), nn.ReLU(), nn.Linear(64, model.fc.out_features)
        )

    def count(self, split, classes, args):
        count = super().count(split, classes, args)
        return (
            count if args.conditional else torch.ones_like(count)
        )  # equal counts change no cross-entropy

    def step(self, objective, model, batch, optimiser, args, gen):
        with InputOf(model.fc) as features:
            loss = self(model, batch, args, gen)
        seen = features.value[
            : len(batch.y)
        ]  # jitter also shows recoloured copies, behind the images themselves
        for _ in range(self.updates - 1):
            update(
                optimiser, self.colour_loss(seen.detach(), batch), weight=batch.weight
            )  # the net has no gradient here, so it stays as it is
        update(
            optimiser,
            loss
            + self.colour_loss(
                Reverse.apply(seen, args.gamma * max(0, (batch.progress - 0.2) / 0.8)), batch
            ),
            weight=batch.weight,
        )
        return loss.detach()

    def colour_loss(self, features, batch):
        return F.cross_entropy(self.head(features) + self.colour_given_digit[batch.y], batch.colour)


class LNTL(nn.Module):
    """Learning Not to Learn (Kim et al., 2019): heads guess each pixel's red, green and blue from early features, which learn to hide them.

    (i) Digit cross-entropy and --entropy times the negative entropy of the guesses, with the heads frozen; (ii) the heads' cross-entropy,
    whose gradient enters the features times -gamma. A colour is cut into 8 bins a channel; where a feature sees black only, it is ignored.
    Departures: (i) and (ii) are one update unless --two-updates; AdamW at the rate of every row, three times that for the heads, instead
    of SGD; the reversal grows linearly from 0 to gamma; the heads see one feature at a time, 4,096 of a batch at most, normalised so that these
    cannot hide by shrinking; and the colour is the lightest in a feature's view, where the paper takes one pixel of it.

    The defaults are the paper's weights. In our nets it is the entropy that unlearns colour, at --entropy 20, and it takes --model
    saturatedcnn: what one convolution and ReLU say grows with the colour, so they can only hide it together with the stroke.
    """

    bins, lr_scale = 8, 3
    most = 4_096  # features of a batch that the heads see, drawn anew every step

    def __init__(self, model, splits, args):
        super().__init__()
        with InputOf(early_layer(model)) as early, torch.no_grad():
            model.eval()(splits["train"].x(slice(1)))
        self.size = early.value.shape[2:]
        self.register_buffer("tally", torch.zeros(2), persistent=False)
        channels = early.value.shape[1]
        self.head = nn.Sequential(
            nn.BatchNorm1d(channels, affine=False, track_running_stats=False),
            nn.Linear(channels, 64),
            nn.ReLU(),
            nn.Linear(64, 3 * self.bins),
        )

    def step(self, objective, model, batch, optimiser, args, gen):
        with InputOf(early_layer(model)) as early:
            loss = F.cross_entropy(model(batch.x), batch.y)
        colour, seen = self.colour(batch.x, gen)
        if len(seen) < 2:
            return update(optimiser, loss)  # nothing but black
        features = self.pixels(early.value, seen)
        frozen = {name: p.detach() for name, p in self.head.named_parameters()}
        guesses = self.spread(torch.func.functional_call(self.head, frozen, features))
        hiding = (
            loss + args.entropy * (guesses.softmax(1) * guesses.log_softmax(1)).sum(1).mean()
        )  # minus the entropy
        if args.two_updates:
            update(optimiser, hiding)
            with InputOf(early_layer(model)) as early:
                model(batch.x)
            hiding, features = 0, self.pixels(early.value, seen)
        guesses = self.spread(self.head(Reverse.apply(features, args.gamma * batch.progress)))
        update(optimiser, hiding + F.cross_entropy(guesses, colour))
        self.tally += torch.stack(
            [(guesses.argmax(1) == colour).sum(), colour.new_tensor(colour.numel())]
        )
        return loss.detach()

    def facts(self, model, args):
        """How often the heads named a pixel's red, green or blue bin in this epoch."""
        right, seen = self.tally.tolist()
        self.tally.zero_()
        return {"head_colour": right / max(seen, 1)}

    def spread(self, guesses):
        """Logits (3P,bins) from what the head says of P places."""
        return guesses.reshape(-1, self.bins)

    def pixels(self, maps, seen):
        """Rows (P,C) of maps (B,C,h,w) for the places that are `seen`, int64 (P,)."""
        return maps.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, seen)

    def colour(self, x, gen):
        """Bins int64 (3P,), red, green, blue, of the lightest value that a feature sees, where that is not black; and which features these are, int64 (P,).

        A feature of SimpleCNN sees windows twice as wide as their distance. With less, the rim of a stroke would go unguarded.
        """
        stride = [large // small for large, small in zip(x.shape[2:], self.size)]
        small = F.adaptive_max_pool2d(
            F.max_pool2d(x, [2 * s for s in stride], stride, [s // 2 for s in stride]), self.size
        )
        seen = (small.amax(1) > 0).flatten().nonzero()[:, 0]
        if len(seen) > self.most:
            seen = seen[torch.randperm(len(seen), generator=gen, device=seen.device)[: self.most]]
        return (self.pixels(small, seen) * self.bins).long().clamp(
            max=self.bins - 1
        ).flatten(), seen


class Combined(GRL):
    """Both cures at once: the loss of jitter, and the two of gradient reversal on the images themselves."""

    def forward(self, model, batch, args, gen):
        clean, recoloured = two_colourings(model, batch, args, gen)
        return jitter_loss(clean, recoloured, batch, args) + self.digit_loss(clean, batch)


class GroupDRO(nn.Module):
    """Group distributionally robust optimisation (Sagawa et al., 2020): the groups (digit, colour) with the highest loss weigh most.

    As in the paper, batches are drawn with every group equally likely, and the weights of the groups follow their losses by
    exponentiated gradient ascent with step --group-step. Departure: images are drawn with replacement.
    """

    def __init__(self, model, splits, args):
        super().__init__()
        self.data, classes = splits["train"], model.fc.out_features
        self.group = self.data.labels * classes + self.data.colors  # (N,)
        count = torch.bincount(self.group, minlength=classes**2)
        self.order, self.first, self.count = (
            self.group.argsort(stable=True),
            count.cumsum(0) - count,
            count,
        )
        self.present = count.nonzero()[:, 0]
        self.register_buffer("weight", torch.ones(classes**2) / len(self.present))

    def step(self, objective, model, batch, optimiser, args, gen):
        group = self.present[
            torch.randint(len(self.present), batch.y.shape, generator=gen, device=batch.y.device)
        ]
        within = (
            torch.rand(batch.y.shape, generator=gen, device=batch.y.device) * self.count[group]
        ).long()
        index = self.order[self.first[group] + within]
        balanced = batch._replace(
            x=self.data.x(index),
            y=self.data.labels[index],
            colour=self.data.colors[index],
            index=index,
        )
        return one_step(objective, model, balanced, optimiser, args, gen)

    def forward(self, model, batch, args, gen):
        group = self.group[batch.index]
        loss = F.cross_entropy(model(batch.x), batch.y, reduction="none")
        size = torch.zeros_like(self.weight).index_add_(0, group, torch.ones_like(loss))
        mean = torch.zeros_like(self.weight).index_add(0, group, loss) / size.clamp(min=1)
        with torch.no_grad():
            self.weight *= (args.group_step * mean).exp()
            self.weight /= self.weight.sum()
        return (self.weight * mean).sum()


class LfF(nn.Module):
    """Learning from Failure (Nam et al., 2020): a second net is taught to be biased, and what it finds hard counts more for the first.

    The biased net minimises generalised cross-entropy, (1 - p**q) / q with q = 0.7, which amplifies what is easy; each image then
    weighs loss_biased / (loss_biased + loss), with losses as running means per image, scaled by the largest of the class.
    """

    def __init__(self, model, splits, args):
        super().__init__()
        data = splits["train"]
        self.biased = fresh_net(args, model.fc.out_features, data.images.shape[2:])
        self.register_buffer(
            "running", torch.zeros(2, len(data.labels))
        )  # losses of the biased and of the cured net
        self.labels, self.classes = data.labels, model.fc.out_features

    def forward(self, model, batch, args, gen):
        biased, logits = self.biased(batch.x), model(batch.x)
        losses = torch.stack(
            [
                F.cross_entropy(biased, batch.y, reduction="none"),
                F.cross_entropy(logits, batch.y, reduction="none"),
            ]
        )
        with torch.no_grad():
            old = self.running[:, batch.index]
            now = torch.where(old == 0, losses, 0.7 * old + 0.3 * losses)
            self.running[:, batch.index] = now
            largest = torch.zeros(2, self.classes, device=now.device).scatter_reduce_(
                1, self.labels.expand(2, -1), self.running, "amax"
            )
            scaled = now / largest[:, batch.y].clamp(min=1e-8)
            weight = scaled[0] / (scaled[0] + scaled[1] + 1e-8)
        p = biased.softmax(1).gather(1, batch.y[:, None])[:, 0]
        generalised = (1 - p.clamp(min=1e-8) ** 0.7) / 0.7
        return (weight * losses[1]).mean() + generalised.mean()


class JTT(nn.Module):
    """Just Train Twice (Liu et al., 2021): a first net trains briefly, and the images it gets wrong count --upweight times for the second.

    The first net takes --first-epochs of plain training before the budget of the second begins. Departure: the images are weighted
    in the loss, normalised within each batch, where the paper repeats them in the data set.
    """

    def __init__(self, model, splits, args):
        super().__init__()
        first = fresh_net(args, model.fc.out_features, splits["train"].images.shape[2:]).to(
            splits["train"].images.device
        )
        plain = argparse.Namespace(
            **{
                **vars(args),
                "method": "baseline",
                "epochs": args.first_epochs,
                "seed": args.seed + 1,
            }
        )
        print(f"the first net, {args.first_epochs} epochs of plain training:")
        train(first, splits, plain, splits["train"].images.device)
        wrong = predict(first, splits["train"]) != splits["train"].labels
        self.register_buffer("weight", torch.where(wrong, args.upweight, 1.0))

    def forward(self, model, batch, args, gen):
        weight = self.weight[batch.index]
        return (
            weight * F.cross_entropy(model(batch.x), batch.y, reduction="none")
        ).sum() / weight.sum()


# ---------------------------------------------------------------- adversarial training


def moved(x, args, gen):
    """Each image shifted by whole pixels up to --crop, mirrored with --flip, turned by up to --rotation degrees; edges are repeated outwards.

    A crop of the image after padding is a shift, so all three are one resampling. x (B,3,H,W).
    """
    b, _, h, w = x.shape
    draw = lambda: torch.rand(b, generator=gen, device=x.device)
    angle = math.radians(args.rotation) * (2 * draw() - 1)
    mirror = torch.where(draw() < 0.5, -1.0, 1.0) if args.flip else torch.ones_like(angle)
    shift = [
        2 / side * (draw() * (2 * args.crop + 1) - args.crop).floor() for side in (w, h)
    ]  # the picture is 2 wide in these units
    to = torch.stack(
        [
            torch.stack([mirror * angle.cos(), -angle.sin() * h / w, shift[0]], 1),
            torch.stack([mirror * angle.sin() * w / h, angle.cos(), shift[1]], 1),
        ],
        1,
    )  # (B,2,3)
    return F.grid_sample(
        x,
        F.affine_grid(to, list(x.shape), align_corners=False),
        padding_mode="border",
        align_corners=False,
    )


def cutout(x, side, gen):
    """A black square of this side at a random place of each image, cut off where it leaves the image (DeVries & Taylor, 2017)."""
    inside = []
    for length in x.shape[2:]:
        first = (torch.rand(len(x), 1, generator=gen, device=x.device) * length).floor() - side // 2
        place = torch.arange(length, device=x.device)
        inside.append((place >= first) & (place < first + side))
    return x.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)


def mixup(x, soft, alpha, gen):
    """Convex combinations of pairs of images and of their labels, weights ~ Beta(alpha, alpha) per image (Zhang et al., 2018)."""
    seed = int(torch.randint(2**31, (), generator=gen, device=x.device))
    weight = torch.from_numpy(
        np.random.default_rng(seed).beta(alpha, alpha, len(x)).astype(np.float32)
    ).to(x)[:, None]
    other = torch.randperm(len(x), generator=gen, device=x.device)
    return weight[..., None, None] * x + (1 - weight[..., None, None]) * x[other], weight * soft + (
        1 - weight
    ) * soft[other]


def augment(batch, classes, args, gen):
    """(x, labels as probabilities (B,classes)) after every option that is switched on, in the order of the flags."""
    x, soft = batch.x, F.one_hot(batch.y, classes).to(batch.x.dtype)
    if args.crop or args.flip or args.rotation:
        x = moved(x, args, gen)
    if args.recolour:
        x = JITTERS[args.recolour](x, args, gen)
    if args.cutout:
        x = cutout(x, args.cutout, gen)
    if args.mixup:
        x, soft = mixup(x, soft, args.mixup, gen)
    return x, soft


class AT(nn.Module):
    """Adversarial training: --clean-epochs of plain training, then every batch is attacked before it is learned.

    --attack pgd is Madry et al. (2018); fgsm is one step from a random start, by 1.25 eps unless told otherwise (Wong et al., 2020); --beta
    is TRADES (Zhang et al., 2019): cross-entropy on the image, and beta times the KL divergence from its prediction to that for the image
    that is attacked to enlarge this divergence. A mixed batch is attacked with the mixed loss. The radius grows linearly from 0 over the
    first --eps-ramp of the adversarial epochs. PGD accuracy on val chooses the epoch, since one-step training can lose all robustness
    from one epoch to the next. The net is in eval mode while it is attacked.
    """

    watch = {"steps": 10, "n": 2000}  # of the attack on val after every epoch

    def __init__(self, model, splits, args):
        super().__init__()
        self.classes, self.val = model.fc.out_features, splits["val"]

    def step(self, objective, model, batch, optimiser, args, gen):
        return update(optimiser, self(model, batch, args, gen), args.clip_grad, batch.weight)

    def forward(self, model, batch, args, gen):
        x, soft = augment(batch, self.classes, args, gen)
        loss = functools.partial(F.cross_entropy, label_smoothing=args.label_smoothing)
        eps = self.radius(batch.progress, args)
        if eps is None:
            return loss(model(x), soft)
        steps, size = {"pgd": (args.steps, 0.35), "fgsm": (1, 1.25)}[args.attack]
        size = size * eps if args.step_size is None else args.step_size * eps / args.eps
        if args.beta == 0:
            return loss(model(pgd(model, x, soft, eps, steps, gen, size, loss=loss).x), soft)
        with torch.no_grad():
            image = model(x)
        near = x + 0.001 * torch.randn(x.shape, generator=gen, device=gen.device)
        x_adv = pgd(
            model,
            x,
            image,
            eps,
            steps,
            gen,
            size,
            loss=lambda logits, image: kl(image, logits),
            start=near,
        ).x
        image, attacked = model(torch.cat([x, x_adv])).chunk(2)
        return loss(image, soft) + args.beta * kl(image, attacked)

    def radius(self, progress, args):
        """L-inf radius at this share of the training; None while it is clean."""
        over = (progress * args.epochs - args.clean_epochs + 1e-9) / max(
            args.epochs - args.clean_epochs, 1
        )
        return None if over < 0 else args.eps * min(1, max(over, 1e-3) / max(args.eps_ramp, 1e-3))

    def facts(self, model, args):
        """Accuracy on val under PGD at the full radius, n images, fresh starts that are the same every epoch."""
        x, y = self.val.x(slice(self.watch["n"])), self.val.labels[: self.watch["n"]]
        gen, right = stream(args.seed, "attack on val", x.device), 0
        for i in range(0, len(y), 500):
            part = slice(i, i + 500)
            with in_bf16(model, args):
                x_adv = pgd(
                    model,
                    x[part],
                    y[part],
                    args.eps,
                    self.watch["steps"],
                    gen,
                    step_size=args.eps / 4,
                ).x
            with torch.inference_mode():
                right += int((model(x_adv).argmax(1) == y[part]).sum())
        return {"val_pgd": right / len(y)}

    def phase(self, epoch, args):
        return ("clean", None) if epoch <= args.clean_epochs else ("", "val_pgd")


# ---------------------------------------------------------------- Rob-GAN: a generator beside adversarial training


class Generator(nn.Module):
    """Pictures (B,3,H,W) in [0, 1] from latents (B,latent) and classes int64 (B,); one `channel` for a grey world, else three."""

    def __init__(self, classes, size, channels, latent=64, width=64):
        super().__init__()
        self.classes, self.size, self.latent = classes, size, latent
        h, w = (math.ceil(side / 4) for side in size)
        self.start = nn.Sequential(
            nn.Linear(latent + classes, width * h * w),
            nn.Unflatten(1, (width, h, w)),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.grow = nn.Sequential(
            nn.ConvTranspose2d(width, width // 2, 4, 2, 1),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.ConvTranspose2d(width // 2, width // 4, 4, 2, 1),
            nn.BatchNorm2d(width // 4),
            nn.ReLU(),
            nn.Conv2d(width // 4, channels, 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, z, y):
        x = self.grow(self.start(torch.cat([z, F.one_hot(y, self.classes).to(z.dtype)], 1)))
        return x[:, :, : self.size[0], : self.size[1]].expand(-1, 3, -1, -1)

    def draw(self, y, gen):
        """One picture for each class of y (B,)."""
        return self(torch.randn(len(y), self.latent, generator=gen, device=y.device), y)


class RobGAN(AT):
    """Rob-GAN (Liu & Hsieh, 2019): the net that is trained adversarially is also the body of a discriminator, and a generator learns against it.

    After --clean-epochs, every step attacks a batch and learns its classes as `at` does, compares as many generated images with the real ones, and updates the
    generator once. In the last --finetune-epochs the net learns the classes of attacked real and attacked generated images only.

    Departures, together the mend for the collapse to grey or to one image per class: the discriminator's own head compares real with generated of the same class
    (relativistic loss with gradient penalties on both, R1 + R2; Huang et al., 2024), reads the last feature map and not a mean of it,
    and sees neither side attacked; the generator is asked to look real for its class (projection; Miyato & Koyama, 2018), not to be
    classified well; there is no batch norm in the discriminator. Samples come from averaged weights of the generator.
    """

    lr_scale, betas = 1, (0.0, 0.99)  # of the generator and the discriminator's own head
    decay = 0.998  # of the averaged weights
    alarm = {
        "diversity": 0.7,
        "diversity_worst": 0.4,
    }  # below these, within-class diversity counts as collapsing

    def __init__(self, model, splits, args):
        super().__init__(model, splits, args)
        if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules()):
            die(
                f"--method robgan cannot use --model {args.model}: batch norm shows a discriminator which batch is generated",
                "choose simplecnn or saturatedcnn",
            )
        data = splits["train"]
        self.some = Split(*(None if part is None else part[: self.watch["n"]] for part in data))
        n = len(splits["test_unbiased"].labels)  # as many training images are compared with these
        for name, labels in (
            ("train", self.some.labels),
            ("test_unbiased", splits["test_unbiased"].labels),
            ("train", data.labels[:n]),
        ):
            if (labels.bincount(minlength=self.classes) < 4).any():
                die(
                    f"--method robgan compares images within a class, but a class has fewer than four of the first {len(labels)} in {args.dir}/{name}.pt",
                    "shuffle the images or add some",
                )
        judge, about = load_model(args.dir, args.judge, data.images.device)
        if (about["classes"], list(about["size"])) != (self.classes, list(data.images.shape[2:])):
            die(
                f"--judge {args.judge} is built for {about['classes']} classes and {tuple(about['size'])} pixels, unlike {args.dir}/train.pt",
                "choose one trained here",
            )
        self.judge = functools.partial(judged, judge)
        self.channels = 1 if (self.some.images == self.some.images[:, :1]).all() else 3
        self.generator = Generator(self.classes, data.images.shape[2:], self.channels)
        self.average = copy.deepcopy(self.generator).requires_grad_(False).eval()
        self.head = nn.Sequential(nn.Linear(model.fc.in_features, 128), nn.LeakyReLU(0.2))
        self.real, self.belongs = nn.Linear(128, 1), nn.Embedding(self.classes, 128)
        self.register_buffer(
            "tally", torch.zeros(3), persistent=False
        )  # losses of discriminator and generator, steps of this epoch
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("epoch", torch.zeros((), dtype=torch.long))
        self.spread = within_class(
            self.judge(self.some.x(slice(None)))[1], self.some.labels.cpu(), self.classes
        )
        if not (self.spread > 0).all():
            die(
                f"--judge {args.judge} sees no difference between images of a class",
                "choose one that was trained",
            )

    def step(self, objective, model, batch, optimiser, args, gen):
        if self.radius(batch.progress, args) is None:
            return super().step(objective, model, batch, optimiser, args, gen)
        if self.finetunes(batch.progress, args):
            both = batch._replace(
                x=torch.cat([batch.x, self.average.draw(batch.y, gen)]), y=batch.y.repeat(2)
            )
            return super().step(objective, model, both, optimiser, args, gen)
        learned = self(model, batch, args, gen)
        with torch.no_grad():
            fake = self.generator.draw(batch.y, gen)
        x = torch.cat([batch.x, fake]).requires_grad_()
        score = self.score(model, x, batch.y.repeat(2))
        (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
        real, fake = score.chunk(2)
        against = (
            F.softplus(fake - real).mean() + args.penalty * slope.square().sum((1, 2, 3)).mean()
        )  # mean over 2B, halved twice: gamma / 2 (R1 + R2)
        update(optimiser, learned + args.gan * against, args.clip_grad)
        with frozen(model, self.head, self.real, self.belongs):
            fake = self.score(model, self.generator.draw(batch.y, gen), batch.y)
            with torch.no_grad():
                real = self.score(model, batch.x, batch.y)
            towards = update(optimiser, F.softplus(real - fake).mean())
        self.follow()
        self.tally += torch.stack([against.detach(), towards, torch.ones_like(towards)])
        return learned.detach()

    def score(self, model, x, y):
        """How real x (B,3,H,W) looks for class y (B,): float (B,)."""
        with InputOf(model.fc) as features:
            model(x)
        h = self.head(features.value)
        return self.real(h)[:, 0] + (self.belongs(y) * h).sum(1)

    @torch.no_grad()
    def follow(self):
        """The averaged generator moves a little towards the present one."""
        self.steps += 1
        share = 1 - min(self.decay, self.steps.item() / (self.steps.item() + 10))
        for slow, fast in zip(self.average.parameters(), self.generator.parameters()):
            slow.lerp_(fast, share)
        for slow, fast in zip(self.average.buffers(), self.generator.buffers()):
            slow.copy_(fast)

    def finetunes(self, progress, args):
        return progress * args.epochs >= args.epochs - args.finetune_epochs - 1e-9

    @torch.no_grad()
    def sample(self, y, gen):
        """Averaged generator's pictures uint8 (N,3,H,W), as files hold them."""
        pictures = [
            self.average.draw(part, gen).mul(255).round_().to(torch.uint8) for part in y.split(1000)
        ]
        return torch.cat(pictures).contiguous(memory_format=torch.channels_last)

    def facts(self, model, args):
        """AT's, the losses, what the judge says of samples, and a grid of them; an alarm in plain words when diversity is going."""
        y = self.some.labels
        pictures = Split(
            self.sample(y, stream(args.seed, "samples to watch", y.device)), y, None, None
        )
        said, z = self.judge(pictures.x(slice(None)))
        diversity = within_class(z, y.cpu(), self.classes) / self.spread
        self.epoch += 1
        draw_samples(
            pictures,
            self.classes,
            f"after epoch {self.epoch} of {args.epochs}",
            args.dir / "figures" / f"{args.name}_epoch_{self.epoch:02d}.png",
        )
        against, towards, steps = self.tally.tolist()
        self.tally.zero_()
        losses = {"loss_d": against / steps, "loss_g": towards / steps} if steps else {}
        facts = (
            super().facts(model, args)
            | losses
            | {
                "agreement": (said == y.cpu()).double().mean().item(),
                "diversity": diversity.mean().item(),
                "diversity_worst": diversity.min().item(),
            }
        )
        if any(facts[key] < least for key, least in self.alarm.items()):
            print(
                f"ALARM: the generator is collapsing: its pictures of class {int(diversity.argmin())} differ from each other {diversity.min():.0%} as much as real ones do "
                f"(all classes: {diversity.mean():.0%}); try a larger --penalty or a smaller --lr"
            )
        return facts

    def finish(self, model, splits, args):
        """What the samples are worth; the generator, in half precision, and pictures. `model` is the trained net."""
        test, device = splits["test_unbiased"], splits["test_unbiased"].labels.device
        n = min(10_000, len(test.labels), len(splits["train"].labels))
        gen = stream(args.seed, "samples", device)
        first = torch.stack(
            [(splits["train"].labels == k).nonzero()[0, 0] for k in range(self.classes)]
        )
        real = splits["train"].labels[:n]
        sources = {  # the same classes as in the n first training images, but for the test images
            "generated": Split(self.sample(real, gen), real, None, None),
            "real": Split(test.images[:n], test.labels[:n], None, None),
            "collapsed": Split(splits["train"].images[first[real]], real, None, None),
        }  # one sharp image per class
        more = {
            "generated": lambda y: self.sample(y, gen),
            "real": None,
            "collapsed": lambda y: splits["train"].images[first[y]],
        }
        reference = Split(splits["train"].images[:n], real, None, None)
        features = self.judge(reference.x(slice(None)))[1]
        measured = {
            name: compare(source, reference, features, self.judge, self.classes)
            for name, source in sources.items()
        }
        for name, make in more.items():
            measured[name]["trained_on"] = self.train_on(make, splits, args, name)
        measured["generated"]["nearest"], pairs = nearest(sources["generated"], splits["train"])
        measured["real"]["nearest"], _ = nearest(sources["real"], splits["train"])
        several = torch.cat([(real == k).nonzero()[:4, 0] for k in range(self.classes)])
        x, y = sources["generated"].x(several), real[several]
        attacked = pgd(model, x, y, args.eps, 50, gen, step_size=args.eps / 4, decay=True).x
        with torch.no_grad():
            said = [
                model(pictures).argmax(1).tolist()
                for pictures in (reference.x(several), x, attacked)
            ]
        shown = {
            "real": reference.images[several],
            "generated": sources["generated"].images[several],
            "attacked": attacked.mul(255).round_().to(torch.uint8),
            **pairs,
        }
        return {
            "record": {
                "generator": {
                    "params": sum(p.numel() for p in self.generator.parameters()),
                    "n": n,
                    "judge": args.judge,
                    "measured": measured,
                }
            },
            "checkpoint": {
                "generator": {
                    name: value.half() if value.is_floating_point() else value
                    for name, value in self.average.state_dict().items()
                },
                "shown": {
                    name: pictures[:, : self.channels].cpu().contiguous()
                    for name, pictures in shown.items()
                },
                "said": said,
            },
        }

    def train_on(self, make, splits, args, name):
        """Accuracy on real test images of a fresh classifier that was trained on these pictures instead of the training images (Ravuri & Vinyals, 2019)."""
        print(f"a classifier trained on {name} images only:")
        plain = get_args("--width 16 --epochs 2 --schedule onecycle --lr 1e-2".split())
        plain.dir, plain.seed = args.dir, args.seed + 1
        data = (
            splits["train"]
            if make is None
            else splits["train"]._replace(images=make(splits["train"].labels))
        )
        torch.manual_seed(plain.seed)
        net = fresh_net(plain, self.classes, data.images.shape[2:]).to(data.images.device)
        train(net, {**splits, "train": data}, plain, data.images.device)
        return (
            (predict(net, splits["test_unbiased"]) == splits["test_unbiased"].labels)
            .cpu()
            .double()
            .mean()
            .item()
        )

    def phase(self, epoch, args):
        if epoch <= args.clean_epochs:
            return "clean", None
        return (
            "joint" if epoch <= args.epochs - args.finetune_epochs and args.finetune_epochs else "",
            "val_pgd",
        )


class Method(NamedTuple):
    objective: object  # loss(model, batch, args, gen), or an nn.Module with that forward, built from (model, splits, args)
    told: str  # what the training is told about the bias
    flags: tuple = ()  # flags of its own; other methods' flags change nothing for it
    spreads: bool = False  # can several processes share a batch: the loss is a mean over images and nothing is remembered of them


JITTER_FLAGS = ("alpha", "jitter", "grain", "classify", "fade", "divergence", "temperature")
AT_FLAGS = (
    "attack",
    "eps",
    "steps",
    "step_size",
    "clean_epochs",
    "eps_ramp",
    "beta",
    "crop",
    "flip",
    "rotation",
    "recolour",
    "grain",
    "cutout",
    "mixup",
    "label_smoothing",
    "clip_grad",
)
METHODS = {  # in three tiers: told nothing, told the kind of bias, told every image's colour
    "baseline": Method(baseline, "nothing", spreads=True),
    "lff": Method(LfF, "nothing"),
    "jtt": Method(JTT, "nothing", ("first_epochs", "upweight")),
    "at": Method(AT, "nothing", AT_FLAGS, spreads=True),
    "robgan": Method(RobGAN, "nothing", (*AT_FLAGS, "finetune_epochs", "gan", "penalty", "judge")),
    "jitter": Method(jitter, "the kind of bias", JITTER_FLAGS, spreads=True),
    "lntl": Method(LNTL, "the kind of bias", ("entropy", "gamma", "two_updates")),
    "grl": Method(GRL, "colour labels", ("gamma", "conditional"), spreads=True),
    "combined": Method(
        Combined, "colour labels", (*JITTER_FLAGS, "gamma", "conditional"), spreads=True
    ),
    "biasbal": Method(BiasBal, "colour labels", spreads=True),
    "groupdro": Method(GroupDRO, "colour labels", ("group_step",)),
}


@contextlib.contextmanager
def frozen(*parts):
    """Inside `with`, these modules learn nothing."""
    for part in parts:
        part.requires_grad_(False)
    yield
    for part in parts:
        part.requires_grad_(True)


class InputOf:
    """Inside `with`, .value is what this layer of a model was fed in its last call."""

    def __init__(self, layer):
        self.layer = layer

    def __enter__(self):
        self.hook = self.layer.register_forward_pre_hook(
            lambda _, inputs: setattr(self, "value", inputs[0])
        )
        return self

    def __exit__(self, *_):
        self.hook.remove()


def fresh_net(args, classes, size):
    return build_model(args.model, args.width, classes, size, args.grayscale)


def early_layer(model):
    return model.get_submodule(
        getattr(model, "early", "layer1")
    )  # layer1: the ResNets' first block


# ---------------------------------------------------------------- training


def one_step(objective, model, batch, optimiser, args, gen):
    """The step of every method that does not bring its own."""
    return update(optimiser, objective(model, batch, args, gen), weight=batch.weight)


def update(optimiser, loss, clip=0, weight=1.0):
    """One step down; with `clip` the gradient's norm over all weights is at most that. `weight` is this process's share of the loss."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()
    if WORLD > 1:
        add_up(
            [
                p.grad.mul_(weight)
                for group in optimiser.param_groups
                for p in group["params"]
                if p.grad is not None
            ]
        )
    if clip:
        nn.utils.clip_grad_norm_(
            [p for group in optimiser.param_groups for p in group["params"]], clip
        )
    optimiser.step()
    return loss.detach()


@contextlib.contextmanager
def in_bf16(model, args):
    """With --amp, convolutions and matrix products in bfloat16; weights, logits and losses stay float32. What is scored is never inside."""
    if not args.amp:
        yield
        return
    hook = model.register_forward_hook(lambda _, inputs, logits: logits.float())
    with torch.autocast(
        next(model.parameters()).device.type, torch.bfloat16, cache_enabled=False
    ):  # a step may update twice: no stale copies
        yield
    hook.remove()


def join(args, device):
    """Meet the other processes that torchrun started: gloo on CPUs, nccl on GPUs, one each. One that fails does not keep the others waiting."""
    if not METHODS[args.method].spreads:
        die(
            f"--method {args.method} needs whole batches in one process",
            "run it without torchrun, or choose from "
            + ", ".join(m for m in METHODS if METHODS[m].spreads),
        )
    if device.type == "mps" or (
        device.type == "cuda" and torch.cuda.device_count() < int(os.environ["LOCAL_WORLD_SIZE"])
    ):
        die(
            f"there are fewer GPUs for --device {device.type} than processes",
            "start fewer, or use --device cpu",
        )
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=5)
    )


def batch_sizes(n, batch):
    """Images in each batch of an epoch; a last one of a single image joins the one before it, since batch norm cannot learn from that."""
    sizes = [batch] * (n // batch) + [n % batch] * (n % batch > 0)
    return [*sizes[:-2], batch + 1] if len(sizes) > 1 and sizes[-1] == 1 else sizes


def share(index):
    """The images of a batch that are this process's, int64 (b,), and their weight; where there are too few, one image with weight 0."""
    mine = index.tensor_split(WORLD)[RANK]
    return (mine, len(mine) / len(index)) if len(mine) else (index[:1], 0.0)


def add_up(tensors):
    """Replace each tensor by its sum over all processes, in one message."""
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, part in zip(tensors, flat.split([t.numel() for t in tensors])):
        t.copy_(part.view(t.shape))


def make_schedule(optimiser, args, steps):
    """The learning rate, step by step."""
    if args.schedule == "onecycle":
        groups = optimiser.param_groups
        low, high = (
            [momentum if group["betas"][0] else 0.0 for group in groups]
            for momentum in (0.85, 0.95)
        )  # a group without momentum stays so
        return torch.optim.lr_scheduler.OneCycleLR(
            optimiser,
            max_lr=[group["lr"] for group in groups],
            total_steps=steps,
            base_momentum=low,
            max_momentum=high,
        )
    if args.schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    return torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1)


def train(model, splits, args, device, part=None):
    """Fits the model in place; returns one record per epoch, and what to keep as {name of the phase: {"epoch", "on", "weights"}}.

    Most methods have one phase, called "", of which the last epoch is kept; one with a `phase` of its own may name others, and a key of
    the record (never of a test split) whose highest value decides. The file `part` holds, after every epoch, what --resume needs.
    """
    data, n = splits["train"], len(splits["train"].labels)
    objective = METHODS[args.method].objective
    if isinstance(objective, type):
        objective = objective(model, splits, args).to(device)
    step = getattr(objective, "step", None) or one_step
    groups = [{"params": list(model.parameters()), "lr": args.lr}]
    if isinstance(objective, nn.Module) and any(True for _ in objective.parameters()):
        groups.append(
            {
                "params": list(objective.parameters()),
                "lr": args.lr * getattr(objective, "lr_scale", 1),
                "betas": getattr(objective, "betas", (0.9, 0.999)),
            }
        )
    optimiser = torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)
    sizes = batch_sizes(n, args.batch)
    if WORLD > 1 and args.model.startswith("resnet"):
        if min(sizes) < 2 * WORLD:
            die(
                f"--batch {args.batch} makes a batch of {min(sizes)} for {WORLD} processes, too few for batch norm",
                "choose another --batch",
            )
        print(
            f"batch norm sees the images of one of the {WORLD} processes at a time, and --resume only those of the first"
        )
    steps = args.epochs * len(sizes)
    schedule = make_schedule(optimiser, args, steps)
    parts = {"model": model, "optimiser": optimiser, "schedule": schedule} | (
        {"objective": objective} if isinstance(objective, nn.Module) else {}
    )
    this_run = {"args": settings(args), "world": world_of(args.dir), "processes": WORLD}
    epochs, kept = restore(part, parts, this_run) if part is not None and args.resume else ([], {})
    for epoch in range(len(epochs) + 1, args.epochs + 1):
        began, total = time.time(), torch.zeros((), device=device)
        gen = stream(args.seed, f"epoch {epoch}" + f" of process {RANK}" * (RANK > 0), device)
        order = draw_order(data, args, stream(args.seed, f"order {epoch}")).to(device)
        model.train()
        for i, index in enumerate(order.split(sizes)):
            mine, weight = share(index)
            batch = Batch(
                data.x(mine),
                data.labels[mine],
                None if data.colors is None else data.colors[mine],
                mine,
                schedule.last_epoch / steps,
                weight,
            )
            with in_bf16(model, args):
                total += step(objective, model, batch, optimiser, args, gen) * (len(index) * weight)
            schedule.step()
            if sys.stdout.isatty() and i % 50 == 49:
                rate = (i + 1) * args.batch / (time.time() - began)
                print(
                    f"\repoch {epoch:2d}/{args.epochs}  {rate:,.0f} images/s  {(n - (i + 1) * args.batch) / rate:4.0f}s left in this epoch ",
                    end="",
                    flush=True,
                )
        if WORLD > 1:
            add_up([total])
        loss = total.item() / n
        if not (math.isfinite(loss) and all(p.isfinite().all() for p in model.parameters())):
            die(
                f"the loss is {loss} in epoch {epoch}, or its gradient not finite",
                f"try a smaller --lr than {args.lr:g}",
            )
        scores = {
            name: score(predict(model, splits[name]), splits[name]) for name in ("val", "test_hard")
        }
        facts = objective.facts(model, args) if hasattr(objective, "facts") else {}
        epochs.append(
            {
                "epoch": epoch,
                "loss": loss,
                "val": scores["val"]["acc"],
                "val_aligned": scores["val"]["aligned"],
                "val_conflicting": scores["val"]["conflicting"],
                "test_hard": scores["test_hard"]["acc"],
                **facts,
            }
        )
        phase, key = objective.phase(epoch, args) if hasattr(objective, "phase") else ("", None)
        if (
            phase not in kept
            or key is None
            or epochs[-1][key] > epochs[kept[phase]["epoch"] - 1][key]
        ):
            weights = {
                name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, value in model.state_dict().items()
            }
            kept[phase] = {"epoch": epoch, "on": key or "last epoch", "weights": weights}
        print(
            f"{chr(13) * sys.stdout.isatty()}epoch {epoch:2d}/{args.epochs}  loss {loss:.4f}  val {scores['val']['acc']:.3f}  aligned {fmt(scores['val']['aligned'])}"
            f"  conflicting {fmt(scores['val']['conflicting'])}  test_hard {scores['test_hard']['acc']:.3f}"
            + "".join(f"  {name} {value:.3f}" for name, value in facts.items())
            + f"  {time.time() - began:5.1f}s",
            flush=True,
        )
        if part is not None and RANK == 0:
            save_pt(
                {
                    **this_run,
                    "epochs": epochs,
                    "kept": kept,
                    **{name: thing.state_dict() for name, thing in parts.items()},
                },
                part,
            )
    if hasattr(objective, "finish"):
        model.load_state_dict(kept[""]["weights"])
        kept[""] |= objective.finish(model, splits, args)
    return epochs, kept


def draw_order(data, args, gen):
    """Which image comes when in an epoch, int64 (N,): each once; or drawn with every (digit, colour) group equally likely (Idrissi et al., 2022)."""
    if not args.balance_groups:
        return torch.randperm(len(data.labels), generator=gen)
    group = (data.labels * (int(data.colors.max()) + 1) + data.colors).cpu()
    return torch.multinomial(
        1 / group.bincount()[group].double(), len(group), replacement=True, generator=gen
    )


def restore(part, parts, this_run):
    """Bring model, optimiser, schedule and method to where a killed run left them; returns its epochs and what it kept, if there is any.

    No generator is kept: every epoch draws from streams of its own.
    """
    if not part.exists():
        print(f"--resume: {part} is not there, so the run starts with its first epoch", flush=True)
        return [], {}
    saved = load_pt(part, "delete it to start over")
    before = saved.get("args")
    if not isinstance(before, dict):
        die(f"{part} was not left by train.py", "delete it to start over")
    changed = [
        f"--{k.replace('_', '-')} was {before.get(k)}"
        for k, v in this_run["args"].items()
        if before.get(k) != v
    ]
    if changed:
        die(
            f"{part} was left by a run with other settings ({', '.join(changed)})",
            "give the same flags to continue it, or leave --resume out to start over",
        )
    if saved.get("processes") != this_run["processes"]:
        die(
            f"{part} was left by a run of {saved.get('processes')} processes",
            "continue it with as many, or leave --resume out to start over",
        )
    if saved.get("world") != this_run["world"]:
        die(
            f"{part} was left by a run on another painting of {part.parent}",
            "leave --resume out to start over",
        )
    try:
        for name, thing in parts.items():
            thing.load_state_dict(saved[name])
        epochs, kept = [*saved["epochs"]], {**saved["kept"]}
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        die(
            f"{part} does not fit this run ({(str(e) or type(e).__name__).splitlines()[0]})",
            "leave --resume out to start over",
        )
    print(f"--resume: continuing after epoch {len(epochs)}", flush=True)
    return epochs, kept


# ---------------------------------------------------------------- scoring


def score(predicted, split):
    """Every accuracy of one split as a fraction beside its n; what needs colours is None without them."""
    y, colour = split.labels.cpu(), None if split.colors is None else split.colors.cpu()
    predicted = predicted.cpu()
    classes = int(max(y.max(), predicted.max())) + 1
    right = (predicted == y).double()
    confusion = torch.bincount(y * classes + predicted, minlength=classes**2).view(classes, classes)
    per_digit = [right[y == d].mean().item() if (y == d).any() else None for d in range(classes)]
    record = {
        "acc": right.mean().item(),
        "n": len(y),
        "per_digit": per_digit,
        "worst_digit": min(a for a in per_digit if a is not None),
        "confusion": confusion.tolist(),
        "worst_group": None,
        "follows_colour": None,
        "aligned": None,
        "conflicting": None,
        "n_conflicting": None,
    }
    if colour is None:
        return record
    group = y * 1000 + colour
    ids, inverse = group.unique(return_inverse=True)
    size = torch.zeros(len(ids), dtype=torch.double).index_add_(0, inverse, torch.ones_like(right))
    acc = torch.zeros(len(ids), dtype=torch.double).index_add_(0, inverse, right) / size
    worst = int(acc.argmin())
    record["worst_group"] = {
        "acc": acc[worst].item(),
        "n": int(size[worst]),
        "digit": int(ids[worst]) // 1000,
        "colour": int(ids[worst]) % 1000,
    }
    against = colour != y
    record["n_conflicting"] = int(against.sum())
    if against.any():
        record["follows_colour"] = (predicted == colour)[against].double().mean().item()
        record["conflicting"] = right[against].mean().item()
    if (~against).any():
        record["aligned"] = right[~against].mean().item()
    return record


def evaluate(model, splits):
    """What a training run's JSON says of the model: scores of every split, linear probes, a picture of its features."""
    final = {name: score(predict(model, splits[name]), splits[name]) for name in EVAL_SPLITS}
    shown = splits["test_unbiased"]
    z = penultimate(model, shown).cpu()
    return {"final": final, "probe": probe(z, shown), "pca": pca(z, shown)}


@torch.inference_mode()
def penultimate(model, split):
    """What the last layer sees, float (N,F)."""
    model.eval()
    values = []
    with InputOf(model.fc) as features:
        for i in range(0, len(split.labels), 1000):
            model(split.x(slice(i, i + 1000)))
            values.append(features.value)
    return torch.cat(values)


def probe(z, split):
    """Accuracy of linear classifiers for colour and for digit on the frozen penultimate features (Alain & Bengio, 2017).

    Logistic regression on standardised features with a fixed, small L2 penalty, fitted by L-BFGS on the even images of the split
    and scored on the odd ones. Chance is 0.1 where every colour is equally likely. z float (N,F) of the images of `split`.
    """
    z = (z - z[::2].mean(0)) / (z[::2].std(0) + 1e-6)
    result = {"n_fit": len(z[::2]), "n": len(z[1::2])}
    for name, target in (("colour", split.colors), ("digit", split.labels)):
        result[name] = (
            None
            if target is None
            else fit_linear(z[::2], target.cpu()[::2], z[1::2], target.cpu()[1::2])
        )
    return result


def pca(z, split, n=300):
    """The first two principal components of the features of n images, beside their labels and colours. z float (N,F)."""
    z = z[:n].double() - z[:n].double().mean(0)
    u, s, _ = torch.linalg.svd(z, full_matrices=False)
    xy = u[:, :2] * s[:2]
    xy = (
        xy * xy.gather(0, xy.abs().argmax(0, keepdim=True)).sign()
    )  # the sign is free: the farthest point counts as positive
    return {
        "x": [round(v, 3) for v in xy[:, 0].tolist()],
        "y": [round(v, 3) for v in xy[:, 1].tolist()],
        "labels": split.labels[:n].tolist(),
        "colors": None if split.colors is None else split.colors[:n].tolist(),
        "explained": (s[:2].square() / s.square().sum().clamp(min=1e-12)).tolist(),
    }  # 0 where every feature is dead


def fit_linear(z, y, z_test, y_test, l2=1e-3):
    """Test accuracy of a softmax regression. z float (N,F), y int64 (N,)."""
    weight = torch.zeros(z.shape[1] + 1, int(max(y.max(), y_test.max())) + 1, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = F.cross_entropy(z @ weight[1:] + weight[0], y) + l2 * weight[1:].square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    with torch.no_grad():
        return ((z_test @ weight[1:] + weight[0]).argmax(1) == y_test).double().mean().item()


@torch.inference_mode()
def judged(judge, x):
    """What a trained classifier says of x (N,3,H,W): (classes int64 (N,), penultimate features float (N,F)), on the CPU, where every measure is computed."""
    said, values = [], []
    with InputOf(judge.fc) as features:
        for part in x.split(1000):
            said.append(judge(part).argmax(1))
            values.append(features.value)
    return torch.cat(said).cpu(), torch.cat(values).cpu()


def within_class(z, y, classes):
    """Mean distance between two features of the same class, float (classes,); z (N,F), y int64 (N,)."""
    pairs = [torch.pdist(z[y == k]) for k in range(classes)]
    return torch.stack([d.mean() if len(d) else d.new_zeros(()) for d in pairs])


def compare(made, real, z_real, judge, classes):
    """How pictures compare with real ones of the same classes in a judge's features: {measure: value}. `made` and `real` are Splits, z_real float (N,F) on the CPU."""
    (said, z), labels = judge(made.x(slice(None))), made.labels.cpu()
    share = torch.bincount(said, minlength=classes).double() / len(said)
    diversity = (
        within_class(z, labels, classes) / within_class(z_real, real.labels.cpu(), classes)
    ).double()
    precision, recall = precision_recall(z[:5000], z_real[:5000])
    return {
        "agreement": (said == labels).double().mean().item(),
        "class_entropy": -(share * share.clamp(min=1e-12).log()).sum().item(),
        "diversity": diversity.mean().item(),
        "diversity_worst": diversity.min().item(),
        "diversity_per_class": diversity.tolist(),
        "frechet": frechet(z, z_real),
        "precision": precision,
        "recall": recall,
    }


def frechet(a, b):
    """Frechet distance between Gaussians fitted to two sets of features (Dowson & Landau, 1982; Heusel et al., 2017): |m - n|^2 + tr(A + B - 2 (AB)^1/2)."""
    a, b = a.double(), b.double()
    root = lambda s: (lambda value, vector: (vector * value.clamp(min=0).sqrt()) @ vector.T)(
        *torch.linalg.eigh(s)
    )
    s, t = a.T.cov(), b.T.cov()
    half = root(s)
    overlap = torch.linalg.eigvalsh(half @ t @ half).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + s.trace() + t.trace() - 2 * overlap).item()


def precision_recall(made, real, k=3):
    """Improved precision and recall (Kynkaanniemi et al., 2019): how often one set lies within the other's k-nearest-neighbour balls."""
    reach = lambda z: torch.cdist(z, z).kthvalue(k + 1, 1).values  # the nearest is the point itself
    between = torch.cdist(made, real)
    covered = lambda hits: hits.any(1).double().mean().item()
    return covered(between <= reach(real)), covered((between <= reach(made)[:, None]).T)


def nearest(made, train_split, n=5000, closest=10):
    """({quantiles of the distance to the nearest training image, L2, pixels in [0, 1]}, the `closest` pairs as pictures)."""
    flat = lambda split, index: (
        split.x(index).mean(1).flatten(1)
    )  # (N,HW), the mean of the channels
    a, found = flat(made, slice(n)), []
    for i in range(0, len(train_split.labels), 6000):
        found.append(torch.cdist(a, flat(train_split, slice(i, i + 6000))).min(1))
    distance, chunk = torch.stack([f.values for f in found]).min(0)
    index = chunk * 6000 + torch.stack([f.indices for f in found]).gather(0, chunk[None])[0]
    few = distance.argsort()[:closest]
    low, median = distance.quantile(distance.new_tensor([0.01, 0.5])).tolist()
    return (
        {"n": len(a), "one_percent": low, "median": median, "closest": distance[few].tolist()},
        {"close": made.images[few], "training": train_split.images[index[few]]},
    )


# ---------------------------------------------------------------- the write-up

PUBLISHED = {
    "baseline": (0.955, 0.224),
    "jitter": (0.960, 0.613),
    "grl": (0.941, 0.386),
    "combined": (0.952, 0.613),
}  # The Lazy Artist: val, test_hard; one seed
PUBLISHED_WORLD = {"recipe": "background", "corr": 0.95, "limit": None, "is_mnist": True}
AS_PUBLISHED = (
    "jitter --alpha 2.0 --classify image --no-fade --jitter hsv",
    "grl --no-conditional",
)  # our rows that follow the published recipes


class Sweep(NamedTuple):
    """Worlds that differ in one number, one folder each inside --dir, and what others published about them."""

    title: str
    key: str  # of meta.json: what the worlds differ in
    axis: str
    theirs: str  # the net and budget of the published figures
    chosen: str  # how our settings were chosen
    hardest: object  # max or min of `key`
    published: dict  # row: {value of key: accuracy on test_unbiased}; "as reported" where we recall a paper's own table


SWEEPS = {  # by recipe
    "flat": Sweep(
        "Biased-MNIST (Bahng et al., 2020)",
        "corr",
        "share of training digits on their own colour",
        "a net of 7x7 convolutions with 531,000 parameters, 80 epochs of 60,000 images",
        "Rates, grain and epochs were chosen by val of two worlds of other seeds (0.999 and 0.99): its conflicting images, and its digits in random colours",
        max,
        {
            "vanilla (Bahng et al., 2020)": {0.999: 0.104, 0.997: 0.334, 0.995: 0.721, 0.99: 0.891},
            "LearnedMixin (Clark et al., 2019)": {
                0.999: 0.121,
                0.997: 0.502,
                0.995: 0.782,
                0.99: 0.883,
            },
            "RUBi (Cadene et al., 2019)": {0.999: 0.137, 0.997: 0.430, 0.995: 0.904, 0.99: 0.936},
            "ReBias (Bahng et al., 2020)": {0.999: 0.227, 0.997: 0.642, 0.995: 0.760, 0.99: 0.881},
            "LfF (Nam et al., 2020), as reported": {
                0.999: 0.153,
                0.997: 0.637,
                0.995: 0.903,
                0.99: 0.951,
            },
            "EnD (Tartaglione et al., 2021)": {
                0.999: 0.523,
                0.997: 0.837,
                0.995: 0.939,
                0.99: 0.960,
            },
            "BiasBal (Hong & Yang, 2021), as reported": {
                0.999: 0.768,
                0.997: 0.912,
                0.995: 0.939,
                0.99: 0.963,
            },
            "BiasCon + BiasBal (Hong & Yang, 2021), as reported": {
                0.999: 0.940,
                0.997: 0.973,
                0.995: 0.977,
                0.99: 0.981,
            },
            "the same, rerun by another group, as reported": {
                0.999: 0.303,
                0.997: 0.828,
                0.995: 0.882,
                0.99: 0.950,
            },
            "FairKL (Barbano et al., 2023), as reported": {
                0.999: 0.905,
                0.997: 0.962,
                0.995: 0.970,
                0.99: 0.979,
            },
        },
    ),
    "digit": Sweep(
        "Learning Not to Learn (Kim et al., 2019)",
        "sigma2",
        "variance of the stroke's colour around its mean",
        "a net of four convolutions with batch norm and 67,760 parameters, 100 epochs of 60,000 images",
        "The net and the weight of the entropy were chosen by val digits in random colours, in two worlds of other seeds (0.02 and 0.05), the epochs by the time they take",
        min,
        {
            name: dict(zip((0.02, 0.025, 0.03, 0.035, 0.04, 0.045, 0.05), accuracies))
            for name, accuracies in (
                (
                    "baseline (Kim et al., 2019)",
                    (0.4055, 0.4813, 0.5996, 0.6626, 0.7333, 0.7973, 0.8450),
                ),
                (
                    "BlindEye (Alvi et al., 2018)",
                    (0.6741, 0.7123, 0.7883, 0.8203, 0.8638, 0.8927, 0.9159),
                ),
                (
                    "gray input (Kim et al., 2019)",
                    (0.8374, 0.8751, 0.8996, 0.9166, 0.9325, 0.9472, 0.9596),
                ),
                (
                    "LNTL (Kim et al., 2019)",
                    (0.8185, 0.8854, 0.9137, 0.9306, 0.9406, 0.9555, 0.9618),
                ),
            )
        },
    ),
}
WORLD_KEYS = ("recipe", "corr", "sigma2", "seed", "limit", "is_mnist")
BUDGET = ("epochs", "lr", "schedule", "weight_decay", "batch", "model", "width")
NOT_SETTINGS = (
    "dir",
    "device",
    "threads",
    "report",
    "eval",
    "name",
    "resume",
)  # they do not change what is learned


def settings(args):
    return {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}


def read_runs(folder):
    """{settings that differ from the usual, as flags: [records of its seeds]} of every training run of this world."""
    records = read_records(folder)
    return by_setting(records, usual_of(records))


def read_records(folder):
    """The JSON of every training run of this world; a run on another painting of it is left out."""
    world, records = world_of(folder), []
    for path in sorted(folder.glob("*.json")):
        record = load_json(path, f"delete it, or run again: python train.py --dir {folder}")
        if record.get("script") != "train.py":
            continue
        with_keys(
            record,
            ("args", "world", "final", "probe", "epochs", "params"),
            path,
            "delete it, or run it again",
        )
        with_keys(
            record["args"],
            ("method", "seed", *BUDGET),
            f"args of {path}",
            "delete it, or run it again",
        )
        if record["args"]["method"] not in METHODS:
            continue
        if record["world"] != world:
            print(
                f"train.py: {path} was trained on another painting of {folder}, so it is left out",
                file=sys.stderr,
            )
            continue
        records.append(record)
    return records


def usual_of(records):
    """The defaults, but the budget and net that most of the runs have."""
    usual = settings(get_args([]))
    for key in BUDGET:
        values = [record["args"][key] for record in records]
        usual[key] = max(values, key=values.count, default=None)
    return usual


def by_setting(records, usual):
    """{settings that differ from the usual, as flags: [records of its seeds]}; one that repeats a seed is left out."""
    own_flags, groups = {flag for method in METHODS.values() for flag in method.flags}, {}
    for record in records:
        idle = own_flags - {*METHODS[record["args"]["method"]].flags} | {"method", "seed"}
        changed = {k: v for k, v in record["args"].items() if k not in idle and v != usual.get(k)}
        group = groups.setdefault(
            " ".join(
                [record["args"]["method"], *(as_flag(k, v) for k, v in sorted(changed.items()))]
            ),
            [],
        )
        if record["args"]["seed"] not in {other["args"]["seed"] for other in group}:
            group.append(record)
    return dict(
        sorted(groups.items(), key=lambda item: (list(METHODS).index(item[0].split()[0]), item[0]))
    )


def told_of(label):
    """What a row's training is told about the bias."""
    method, *flags = label.split()
    return (
        "no bias in training"
        if method == "oracle"
        else "colour labels"
        if "--balance-groups" in flags
        else METHODS[method].told
    )


def as_flag(key, value):
    flag = key.replace("_", "-")
    return (
        f"--{flag}" if value is True else f"--no-{flag}" if value is False else f"--{flag} {value}"
    )


def world_of(folder):
    """What meta.json says of the painting; in a user's own folder, which splits come out of train.pt."""
    world = meta_of(folder)
    if not world:
        return {"split_off": names} if (names := split_off(folder)) else {}
    return {
        k: v for k, v in world.items() if k in WORLD_KEYS and (k, v) != ("sigma2", None)
    }  # only `digit` has a variance


def over_seeds(runs, *keys):
    """mean ± sd (n seeds) of one number of the records."""
    values = []
    for record in runs:
        for key in keys:
            record = None if record is None else record[key]
        values.append(record)
    return mean_sd(values)


def accuracy_row(label, runs):
    hard = "test_hard"
    worst = min(
        (r["final"][hard]["worst_group"] for r in runs if r["final"][hard]["worst_group"]),
        key=lambda g: g["acc"],
        default=None,
    )
    return [
        label,
        told_of(label),
        over_seeds(runs, "final", "val", "acc"),
        over_seeds(runs, "final", hard, "acc"),
        over_seeds(runs, "final", "test_unbiased", "acc"),
        over_seeds(runs, "final", hard, "worst_digit"),
        f"{worst['acc']:.3f} of {worst['n']}" if worst else "-",
        over_seeds(runs, "final", hard, "follows_colour"),
        over_seeds(runs, "probe", "colour"),
        over_seeds(runs, "probe", "digit"),
    ]


def budget(record):
    """What a training run was allowed, in words."""
    a = record["args"]
    rate = f"learning rate {a['lr']:g}" + (
        f" ({a['schedule']})" if a["schedule"] == "constant" else f" at the peak ({a['schedule']})"
    )
    net = f"{CNNS[a['model']].__name__} of width {a['width']}" if a["model"] in CNNS else a["model"]
    return f"{net}, {record['params']:,} parameters, {a['epochs']} epochs, AdamW, {rate}, batch {a['batch']}"


def sweep_runs(folder, recipe):
    """{value of the sweep's key: {label: runs}} of the worlds of one recipe inside `folder`, the hardest first; what is usual is usual in all of them."""
    worlds = {}
    for path in sorted(folder.glob("*/meta.json")):
        world = load_json(path, "run make_data.py again")
        if world.get("recipe") == recipe and (records := read_records(path.parent)):
            worlds[world[SWEEPS[recipe].key]] = records
    usual = usual_of([record for records in worlds.values() for record in records])
    return {
        value: by_setting(worlds[value], usual)
        for value in sorted(worlds, reverse=SWEEPS[recipe].hardest is max)
    }


def sweep_rows(worlds, values, *keys):
    """A row per setting: what it is told, and the number at `keys` of its records in every world."""
    labels = dict.fromkeys(label for groups in worlds.values() for label in groups)
    return [
        [
            f"`{label}`",
            told_of(label),
            *(over_seeds(worlds.get(value, {}).get(label, []), *keys) for value in values),
        ]
        for label in labels
    ]


def report_sweep(folder, recipe, chapter=None):
    """Table and figure of our rows beside the published ones; nothing where there are no such worlds."""
    sweep, worlds = SWEEPS[recipe], sweep_runs(folder, recipe)
    if not worlds:
        return
    ours = {}  # {label: {value: runs}}
    for value, groups in worlds.items():
        for label, runs in groups.items():
            ours.setdefault(label, {})[value] = runs
    throughout = {
        label: runs for label, runs in ours.items() if runs.keys() == worlds.keys()
    } or ours  # the pictures show no side rows
    first = next(iter(next(iter(throughout.values())).values()))[0]
    print((f"## {chapter}\n\n" if chapter else "") + f"### {sweep.title}\n")
    print(
        f"Accuracy on test_unbiased (n = {first['final']['test_unbiased']['n']:,}), mean ± sd over (n) seeds, by {sweep.axis}. Ours: {budget(first)}, the last "
        f"epoch scored; flags name what differs. {sweep.chosen}; the test splits were out of sight. Published: {sweep.theirs}.\n"
    )
    values = sorted(
        {*worlds, *(value for row in sweep.published.values() for value in row)},
        reverse=sweep.hardest is max,
    )
    print(
        markdown(
            ["method", "told", *(f"{value:g}" for value in values)],
            [
                *sweep_rows(worlds, values, "final", "test_unbiased", "acc"),
                *(
                    [
                        row,
                        "",
                        *(f"{figures[value]:.3f}" if value in figures else "-" for value in values),
                    ]
                    for row, figures in sweep.published.items()
                ),
            ],
        )
    )
    print(
        "Colour that is still there to read: accuracy of a linear probe on the penultimate features (chance 0.1).\n"
    )
    print(
        markdown(
            ["method", "told", *(f"{value:g}" for value in worlds)],
            sweep_rows(worlds, worlds, "probe", "colour"),
        )
    )
    path = folder / "figures" / f"{recipe}.png"
    draw_sweep(sweep, throughout, values, path)
    print(f"![{sweep.title}: accuracy by {sweep.axis}](figures/{recipe}.png)\n")
    print(
        "*Solid: ours, the band spans the seeds; dashed grey: published. What to see: how far each line holds as the shortcut becomes perfect, towards the left.*\n"
    )
    hardest = next(iter(worlds))
    groups = {label: runs[hardest] for label, runs in throughout.items() if hardest in runs}
    has_head = any("head_colour" in runs[0]["epochs"][0] for runs in groups.values())
    for name, draw, caption in (
        (
            "curves",
            draw_learning_curves,
            "Learning curves; mean over seeds, the band spans the seeds."
            + " A colour head that has learned nothing names the commonest colour." * has_head,
        ),
        (
            "confusion",
            draw_confusion,
            "Confusion on test_hard, first seed: each row is a digit and sums to 1.",
        ),
        (
            "features",
            draw_features,
            "Principal components of the penultimate features on test_unbiased, first seed: above by digit, below by colour.",
        ),
    ):
        if name == "features" and not any(runs[0].get("pca") for runs in groups.values()):
            continue  # runs of an older train.py; --eval adds them
        draw(groups, folder / "figures" / f"{recipe}_{name}.png")
        print(
            f"![{sweep.title}: {name}](figures/{recipe}_{name}.png)\n\n*{caption} World with {sweep.key} {hardest:g}.*\n"
        )


def found_by(folder, file, value):
    """{family: [value(record of one model)]} from a JSON of gradcam.py or attack.py; empty where it has not been run."""
    path, found = folder / file, {}
    if path.exists():
        for name, model in (record := load_json(path, "delete it and run its script again"))[
            "models"
        ].items():
            found.setdefault(family_of(name)[0], []).append(value(record, name, model))
    return found


LOOKED = {  # what gradcam.py and attack.py found of a model: its file, and where the number is
    "heat lift": ("gradcam.json", lambda record, name, m: m["maps"][record["split"]]["lift"]),
    "background flip": (
        "gradcam.json",
        lambda record, name, m: m["flips"] and m["flips"]["background"]["changed"]["rate"],
    ),
    "digit flip": (
        "gradcam.json",
        lambda record, name, m: m["flips"] and m["flips"]["digit"]["changed"]["rate"],
    ),
    "median min-ε, 7 to 3": (
        "attack_7to3.json",
        lambda record, name, m: record["summary"][name]["all"]["argmax"]["min_eps"]["median"],
    ),
    "accuracy under PGD": (
        "attack_untargeted.json",
        lambda record, name, m: m["attacks"]["PGD"]["own"]["rate"],
    ),
}


def looked(folder, title):
    """{family: that number of each of its models}."""
    return found_by(folder, *LOOKED[title])


def worst_cases(folder, file):
    """{family: accuracy of each of its models under the worst of all attacks} from a JSON of attack.py --untargeted."""
    return found_by(folder, file, lambda record, name, m: m["robust"]["rate"])


def everything(folder, methods):
    """One row per method with the figures of all scripts: what it scores, where it looks, what it uses, how easily it is fooled."""
    columns = {title: values for title in LOOKED if (values := looked(folder, title))}
    rows = [
        [
            label,
            *(over_seeds(runs, "final", split, "acc") for split in EVAL_SPLITS),
            over_seeds(runs, "final", "test_hard", "worst_digit"),
            over_seeds(runs, "final", "test_hard", "follows_colour"),
            over_seeds(runs, "probe", "colour"),
            *(mean_sd(values.get(label, [])) for values in columns.values()),
        ]
        for label, runs in methods.items()
    ]
    return markdown(
        ["method", *EVAL_SPLITS, "worst digit", "follows colour", "colour probe", *columns], rows
    )


HEADER = [
    "method",
    "told",
    "val",
    "test_hard",
    "test_unbiased",
    "worst digit",
    "worst group",
    "follows colour",
    "colour probe",
    "digit probe",
]


def mean(runs, split="test_hard", key="acc"):
    return fmean(run["final"][split][key] for run in runs)


def report(args):
    """The chapters of the write-up that training fills, each under its title; `run_all.sh report` puts those of all scripts in order."""
    folder, groups, oracles = args.dir, read_runs(args.dir), read_runs(args.dir / "unbiased")
    if not groups:
        die(f"{folder} holds no results of train.py", f"run: python train.py --dir {folder}")
    oracle = oracles.pop("baseline", [])
    methods = {label: runs for label, runs in groups.items() if label in METHODS} | (
        {"oracle": oracle} if oracle else {}
    )
    varied = {label: runs for label, runs in groups.items() if label not in METHODS}
    varied |= {
        label.replace("baseline", "oracle", 1)
        if label.startswith("baseline")
        else f"oracle --method {label}": runs
        for label, runs in oracles.items()
    }
    report_question(folder, methods)
    report_cheating(folder, methods, varied)
    report_cures(folder, methods, varied)
    report_sweep(folder, "flat")
    report_costs(methods)
    report_sweep(folder, "digit", "Learning not to learn")
    report_robust(folder)
    report_robgan(folder)
    report_surprises(folder, methods, varied)
    report_limits(folder, methods)


def report_question(folder, methods):
    """What is asked, how to read the numbers, and every answer in a sentence."""
    corr = world_of(folder).get("corr")
    print("## The question\n")
    print(
        f"A net learns to read digits{f' that sit on their own colour in {corr:.0%} of the pictures' if corr else ''}. It can learn the digit or the colour, and its accuracy on "
        "more such pictures does not tell which: a shortcut (Geirhos et al., 2020). Here the shortcut is planted, so that each question has an answer that can be checked: "
        "does the net cheat, does a heat map show it, what cures it, what does the cure cost, and is the cured net harder to fool?\n"
    )
    n = (
        next(iter(methods.values()), [{"final": {}}])[0]["final"]
        .get("test_hard", {})
        .get("n", 10_000)
    )
    print(
        "Accuracies are shares of images. 0.903 ± 0.010 (5) is the mean and standard deviation over 5 seeds; a figure without ± is one seed. With "
        f"n = {n:,} images the 95 % interval of one accuracy is at most ±{(wilson(n // 2, n)[1] - wilson(n // 2, n)[0]) / 2:.3f}. "
        "Published figures are quoted from their papers, not rerun; nets and budgets differ.\n"
    )
    short = [*answers(folder, methods)]
    if short:
        print("In short:\n\n" + "\n".join(f"- {sentence}" for sentence in short) + "\n")


def answers(folder, methods):
    """A sentence for every question that the results at hand answer."""
    lazy, cured, oracle = (methods.get(label) for label in ("baseline", "jitter", "oracle"))
    if lazy and mean(lazy, key="follows_colour") is not None:
        yield (
            f"**Does it cheat?** It is right on {mean(lazy, 'val'):.1%} of pictures like those it learned from, and on {mean(lazy):.1%} of those whose colour belongs to another "
            f"digit; there it names that other digit {mean(lazy, key='follows_colour'):.1%} of the time."
        )
    lift, flip = looked(folder, "heat lift"), looked(folder, "background flip")
    if (
        lazy
        and cured
        and {"baseline", "jitter"} <= flip.keys() & lift.keys()
        and None not in flip["baseline"] + flip["jitter"]
    ):
        yield (
            f"**Where does it look?** A new background alone changes {mean_sd(flip['baseline'])} of the lazy net's answers and {mean_sd(flip['jitter'])} of the cured one's. The mean lift "
            f"of the heat maps on the digit (1 is chance) is {mean_sd(lift['baseline'])} and {mean_sd(lift['jitter'])}."
        )
    if lazy and oracle and (best := best_by_tier(methods)):
        yield (
            f"**What cures it?** Without a cure test_hard is {mean(lazy):.3f}, after a training without bias {mean(oracle):.3f}. The best by what they are told: "
            + ", ".join(
                f"{told} `{label}` {mean(methods[label]):.3f}" for told, label in best.items()
            )
            + "."
        )
    if lazy and cured:
        yield f"**What does the cure cost?** On val, where the shortcut works, `jitter` changes accuracy by {mean(cured, 'val') - mean(lazy, 'val'):+.3f} against no cure."
    needed = looked(folder, "median min-ε, 7 to 3")
    if {"baseline", "jitter"} <= needed.keys() and None not in needed["baseline"] + needed[
        "jitter"
    ]:
        yield (
            f"**Is it safer?** The median perturbation that turns a 7 into a 3 is {mean_sd(needed['jitter'])} for the cured net and {mean_sd(needed['baseline'])} for the lazy one"
            + ": the cured one is easier to push."
            if fmean(needed["jitter"]) < fmean(needed["baseline"])
            else "."
        )
    for value, groups in itertools.islice(sweep_runs(folder, "digit").items(), 1):
        rows = {
            label: runs
            for label, runs in groups.items()
            if label.startswith("lntl") and "--init" not in label
        }
        if rows and (plain := groups.get("baseline")):
            label = max(rows, key=lambda row: (len(rows[row]), mean(rows[row], "test_unbiased")))
            yield (
                f"**Can colour be unlearned?** At variance {value:g}, `{label}` reaches {over_seeds(rows[label], 'final', 'test_unbiased', 'acc')} on digits in random colours, "
                f"no cure {over_seeds(plain, 'final', 'test_unbiased', 'acc')}."
            )
    for name, worst in worst_cases(folder, "mnist/attack_untargeted.json").items():
        if name == "at":
            yield f"**Can it be made robust?** Adversarial training on plain MNIST keeps {mean_sd(worst)} right under the worst of all attacks."
    worst = worst_cases(folder, "mnist/attack_robgan.json")
    if {"robgan", "robgan_without"} <= worst.keys():
        yield f"**Does a generator help?** With one beside it (Rob-GAN) the worst case is {mean_sd(worst['robgan'])}, without {mean_sd(worst['robgan_without'])}."


def best_by_tier(rows):
    """{what the training is told: the row with the highest test_hard}; no cure and no bias are no tiers."""
    best = {}
    for label, runs in rows.items():
        told = told_of(label)
        if not label.startswith(("oracle", "baseline")) and (
            told not in best or mean(runs) > mean(rows[best[told]])
        ):
            best[told] = label
    return best


def report_cheating(folder, methods, varied):
    """The lazy net beside the ceiling, and whether a larger net or a longer training would do instead of a cure."""
    shown = {label: methods[label] for label in ("baseline", "oracle") if label in methods}
    print("## Does it cheat?\n")
    if shown:
        print(
            "The lazy net beside the oracle, which is the same net trained where colour says nothing. Worst digit, worst group (the worst of all seeds, with its n) and follows "
            "colour (the share predicted as the digit that owns the colour) are of test_hard; the probes are linear classifiers on frozen features, chance 0.1.\n"
        )
        print(markdown(HEADER, [accuracy_row(label, runs) for label, runs in shown.items()]))
    rows = {**methods, **varied}
    stronger = {
        what: mean(rows[label])
        for what, label in (
            ("a net four times as wide", "baseline --width 16"),
            ("three times the epochs", "baseline --epochs 30"),
            ("a one-cycle rate up to 0.01", "baseline --lr 0.01 --schedule onecycle"),
        )
        if label in rows
    }
    if "baseline" in methods and stronger:
        print(
            "How much of the laziness is a small net or a short training? Without any cure, "
            + ", ".join(
                f"{what} lifts test_hard from {mean(methods['baseline']):.3f} to {acc:.3f}"
                for what, acc in stronger.items()
            )
            + ".\n"
        )
    figures = folder / "figures"
    draw_learning_curves(methods or varied, figures / "learning_curves.png")
    print("![Learning curves](figures/learning_curves.png)\n")
    print(
        "*Learning curves; mean over seeds, the band spans the seeds. What to see: whether the net that leads on val, which anyone would choose, also leads on test_hard.*\n"
    )
    if any(re.fullmatch(r"\w+ --(width|epochs) \d+", label) for label in varied):
        draw_budget(rows, figures / "budget.png")
        print("![test_hard by width and by epochs](figures/budget.png)\n")
        print(
            "*A dash is a seed, the line their mean. What to see: how much of the gap to the oracle more weights or more epochs close without a cure.*\n"
        )


def report_cures(folder, methods, varied):
    """Every method under one budget, what the published figures are, and the parts of the cures one at a time."""
    rows, here = {**methods, **varied}, PUBLISHED_WORLD.items() <= world_of(folder).items()
    print("## What cures it?\n")
    if methods:
        first = next(iter(methods.values()))[0]
        print(
            f"Every method has the same net, {first['args']['epochs']} epochs, rate and batch (what it computes beside that is in its docstring); the last epoch is scored, of `at` the "
            "one that PGD on val prefers: no test split chose an epoch or a seed. The oracle's val is the unbiased world's. "
            + ", ".join(f"{name} n = {first['final'][name]['n']:,}" for name in EVAL_SPLITS)
            + ". Columns as above.\n"
        )
        print(markdown(HEADER, [accuracy_row(label, runs) for label, runs in methods.items()]))
    if here:
        print(
            "Settings were chosen by the conflicting images of val. The weight, direction, temperature and fading of jitter's KL term: in four worlds painted with other "
            "seeds (1,150 such images), the test splits out of sight. The rest: in this world (about 300), and for the colour mixture also by val digits repainted on all "
            "ten colours; some trials of the mixture, grl and combined printed test_hard beside val, so near ties there may have been swayed.\n"
        )
    if here and "baseline" in methods:
        print(
            "Beside the published figures (The Lazy Artist: same world, net, rate and batch, one seed, 15 epochs for combined; its jitter is the row with "
            "--jitter hsv, its grl comes closest to the row with --no-conditional):\n"
        )
        k = methods["baseline"][0]["final"]["test_hard"]["n"]
        print(
            markdown(
                [
                    "method",
                    "val",
                    "published val",
                    "test_hard",
                    "published test_hard",
                    f"95 % interval of seed {methods['baseline'][0]['args']['seed']}",
                ],
                [
                    [
                        label,
                        over_seeds(runs, "final", "val", "acc"),
                        PUBLISHED[method][0],
                        over_seeds(runs, "final", "test_hard", "acc"),
                        PUBLISHED[method][1],
                        "{:.3f} to {:.3f}".format(
                            *wilson(round(runs[0]["final"]["test_hard"]["acc"] * k), k)
                        ),
                    ]
                    for label, runs in rows.items()
                    if (method := label.split()[0]) in PUBLISHED
                    and label in (method, *AS_PUBLISHED)
                ],
            )
        )
    lazy, top = (mean(methods[m]) if m in methods else None for m in ("baseline", "oracle"))
    if None not in (lazy, top) and lazy < top:
        print(
            "Share of the gap between no cure and the oracle that each closes: "
            + ", ".join(
                f"{m} {(mean(runs) - lazy) / (top - lazy):.0%}"
                for m, runs in methods.items()
                if m not in ("baseline", "oracle")
            )
            + ".\n"
        )
    for flags in sorted(
        {label.partition(" ")[2] for label in varied if label.startswith("oracle ")} | {""}
    ):
        same = {label: runs for label, runs in rows.items() if label.partition(" ")[2] == flags}
        best = best_by_tier(same)
        if len(best) > 1 and (ceiling := same.get(f"oracle {flags}".strip())):
            print(
                f"The best of each tier at the same budget ({flags or 'the usual one'}): "
                + ", ".join(
                    f"told {told}, {label.split()[0]} {mean(same[label]):.3f}"
                    for told, label in best.items()
                )
                + f"; the oracle {mean(ceiling):.3f}.\n"
            )
    parts = {
        label: runs
        for label, runs in varied.items()
        if re.fullmatch(
            r"jitter( --(alpha|classify|divergence|grain|jitter|no-fade|temperature)( [^-]\S*)?)",
            label,
        )
    }
    if parts and "jitter" in methods:
        gains = {}  # test_hard beside what jitter as it is gets from the same seeds
        for label, runs in parts.items():
            seeds = {run["args"]["seed"] for run in runs}
            same = [run for run in methods["jitter"] if run["args"]["seed"] in seeds]
            if len(same) == len(runs):
                gains[label.partition(" ")[2]] = mean(runs), mean(runs) - mean(same), len(runs)
        print(
            "One part of jitter changed at a time (test_hard; in brackets the change from jitter as it is, over the same n seeds; seeds differ by about 0.01): "
            + ", ".join(
                f"`{flag}` {acc:.3f} ({gain:+.3f}, n = {n})"
                for flag, (acc, gain, n) in sorted(gains.items(), key=lambda item: -item[1][1])
            )
            + ".\n"
        )
    draw_confusion(
        {label: runs for label, runs in methods.items() if label != "oracle"} or varied,
        folder / "figures" / "confusion.png",
    )
    print("![Confusion matrices](figures/confusion.png)\n")
    print(
        "*Confusion on test_hard, first seed of each method: each row is a digit and sums to 1. What to see: a cured net has one diagonal and little else.*\n"
    )
    if (folder / "gradcam.json").exists():
        print(
            "Everything at once: what a method scores (worst digit and follows colour on test_hard), where it looks, what changes its answer, and how "
            "easily it is fooled (other chapters explain these columns):\n"
        )
        print(everything(folder, methods))
    if varied:
        print("Other settings (the flags name what differs; everything else as above):\n")
        print(markdown(HEADER, [accuracy_row(label, runs) for label, runs in varied.items()]))


def report_costs(methods):
    """What each method gives up where the shortcut works, what is missing to the ceiling, and its time."""
    lazy, oracle = methods.get("baseline"), methods.get("oracle")
    if not lazy or len(methods) < 2:
        return
    lazy_of, time_of = (
        {run["args"]["seed"]: run for run in lazy},
        lambda run: run["run"]["seconds"] / run["args"]["epochs"],
    )
    usual = fmean(map(time_of, lazy))
    print("## What does the cure cost?\n")
    print(
        "Change of val against no cure, over the same seeds: where the shortcut works, giving it up costs accuracy. Missing to the oracle: of test_unbiased. Time: an epoch's, "
        "over that of no cure, as the runs took it side by side with others.\n"
    )
    print(
        markdown(
            ["method", "told", "change of val", "missing to the oracle", "time"],
            [
                [
                    label,
                    told_of(label),
                    mean_sd(
                        [
                            run["final"]["val"]["acc"]
                            - lazy_of[run["args"]["seed"]]["final"]["val"]["acc"]
                            for run in runs
                            if run["args"]["seed"] in lazy_of
                        ]
                    ),
                    f"{mean(oracle, 'test_unbiased') - mean(runs, 'test_unbiased'):+.3f}"
                    if oracle
                    else "-",
                    f"{fmean(map(time_of, runs)) / usual:.1f}",
                ]
                for label, runs in methods.items()
                if label not in ("baseline", "oracle")
            ],
        )
    )


def report_surprises(folder, methods, varied):
    """What we did not expect, and what did not work; each line only where its results are at hand and say so."""
    rows, lazy, found = {**methods, **varied}, methods.get("baseline"), []
    if lazy and "at" in methods and mean(methods["at"]) < mean(lazy):
        at = methods["at"]
        found.append(
            f"Adversarial training alone deepens the shortcut: `at` is right on {mean(at):.3f} of test_hard ({mean(lazy):.3f} without any cure) and names the colour's digit "
            f"{mean(at, key='follows_colour'):.1%} of the time ({len(at)} seed{'s' * (len(at) > 1)}). A likely reason: a small perturbation "
            "cannot change the colour of a background, so colour is what stays when the strokes can no longer be trusted."
        )
    if "oracle --method at" in rows and mean(rows["oracle --method at"]) < 0.2:
        found.append(
            "Where there is no shortcut, adversarial training of the same net in the same budget does not start: on the unbiased world it ends at "
            f"{mean(rows['oracle --method at']):.3f}, about chance."
        )
    worse = [
        f"`{label}` {mean(runs):.3f}"
        for label, runs in rows.items()
        if lazy and not label.startswith(("baseline", "oracle")) and mean(runs) < mean(lazy)
    ]
    if worse:
        found.append(
            f"Worse than no cure on test_hard ({mean(lazy):.3f}; 0.10 would be guessing): {', '.join(worse)}."
        )
    needed = {
        family: fmean(values)
        for family, values in looked(folder, "median min-ε, 7 to 3").items()
        if None not in values
    }
    easier = [
        f"`{family}` {eps:.3f}" for family, eps in needed.items() if eps < needed.get("baseline", 0)
    ]
    if easier:
        found.append(
            f"A cured net can be easier to fool: the median perturbation that turns a 7 into a 3 is {needed['baseline']:.3f} for the lazy net, but {', '.join(easier)}."
        )
    if {"jitter", "baseline"} <= methods.keys() and "probe" in methods["jitter"][0]:
        found.append(
            f"A cured net is not blind to colour: a linear probe reads it from the features of `jitter` with {over_seeds(methods['jitter'], 'probe', 'colour')} "
            f"(no cure {over_seeds(lazy, 'probe', 'colour')}), yet its answers follow it {mean(methods['jitter'], key='follows_colour'):.1%} of the time."
        )
    if {"grl", "biasbal"} <= methods.keys() and mean(methods["grl"]) <= mean(methods["biasbal"]):
        found.append(
            f"Gradient reversal reaches {mean(methods['grl']):.3f}, but its digit loss alone, which is `biasbal`, reaches {mean(methods['biasbal']):.3f}: the reversal "
            "itself does not carry the cure."
        )
    for value, groups in itertools.islice(sweep_runs(folder, "digit").items(), 1):
        theirs = [
            label for label in groups if label.startswith("lntl") and "--entropy" not in label
        ]
        for label in theirs if "baseline" in groups else []:
            found.append(
                f"Learning Not to Learn with its paper's weights (`{label}`) reaches {mean(groups[label], 'test_unbiased'):.3f} at variance {value:g}; no cure reaches "
                f"{mean(groups['baseline'], 'test_unbiased'):.3f}."
            )
    worst = worst_cases(folder, "mnist/attack_robgan.json")
    if {"robgan", "robgan_without"} <= worst.keys() and fmean(worst["robgan"]) < fmean(
        worst["robgan_without"]
    ):
        found.append(
            f"A generator beside adversarial training does not help it: worst case {mean_sd(worst['robgan_without'])} without, {mean_sd(worst['robgan'])} with"
            + (
                f", {mean_sd(worst['robgan_finetuned'])} with fine-tuning"
                if "robgan_finetuned" in worst
                else ""
            )
            + ", the same net and number of updates."
        )
    if found:
        print(
            "## Surprises and negative results\n\n"
            + "\n".join(f"- {sentence}" for sentence in found)
            + "\n"
        )


def report_limits(folder, methods):
    """What is missing, with the figures that show it."""
    missing = [
        "MNIST on ten colours is a model of shortcut learning, not a photograph of it: a cure that is told that the bias is colour has an advantage that nobody has in the wild.",
        "The published methods were not rerun in their own code; where we quote them, net, epochs and seeds differ from ours.",
        "All of it has to fit into an hour and a half on two cores: where a row has no ±, one seed was all that fitted.",
    ]
    if "oracle" in methods and (best := best_by_tier(methods)):
        missing.append(
            f"The best cures beside the oracle, which is right on {mean(methods['oracle']):.3f} of test_hard: "
            + ", ".join(
                f"{mean(methods[label]) - mean(methods['oracle']):+.3f} (told {told}, `{label}`)"
                for told, label in best.items()
            )
            + "."
        )
    flat = sweep_runs(folder, "flat")
    for method, row in (
        ("lff", "LfF (Nam et al., 2020), as reported"),
        ("biasbal", "BiasBal (Hong & Yang, 2021), as reported"),
    ):
        theirs = SWEEPS["flat"].published[row]
        ours = {
            value: max(
                (
                    mean(runs, "test_unbiased")
                    for label, runs in groups.items()
                    if label.startswith(method)
                ),
                default=1,
            )
            for value, groups in flat.items()
        }
        below = [
            f"{acc:.3f} ({value:g}; published {theirs[value]:.3f})"
            for value, acc in ours.items()
            if acc < theirs.get(value, 0)
        ]
        if below:
            missing.append(
                f"Our `{method}` stays below its published figures on Biased-MNIST: {', '.join(below)}; theirs had 80 epochs and a larger net."
            )
    for path, what in (
        ("mnist/attack_untargeted.json", "at"),
        ("mnist/attack_resnet.json", "resnet"),
    ):
        for name, rates in found_by(
            folder, path, lambda record, name, m: (m["robust"]["rate"], record["n"])
        ).items():
            if name.startswith(what) and not name.endswith("_clean"):
                missing.append(
                    f"`{name}` on plain MNIST was attacked on {rates[0][1]:,} test images, not 10,000, and not by AutoAttack; worst case {mean_sd([rate for rate, _ in rates])}."
                )
    print("## What we could not do\n\n" + "\n".join(f"- {sentence}" for sentence in missing) + "\n")


def with_plain_worlds(folder):
    """This world, and those of plain MNIST inside it."""
    return [
        folder,
        *(
            path.parent
            for path in sorted(folder.glob("*/meta.json"))
            if world_of(path.parent).get("recipe") == "gray"
        ),
    ]


def report_robust(folder):
    """Adversarial training in this world and in plain MNIST inside it: which epoch was kept and why; nothing where there was none."""
    found, flags = {}, {}  # by name, without the seed
    for where in with_plain_worlds(folder):
        for label, runs in read_runs(where).items():
            if "val_pgd" in runs[0]["epochs"][0] and "phase" not in runs[0]["args"]:
                name = ("" if where == folder else f"{where.name}/") + family_of(runs[0]["name"])[0]
                found[name], flags[name] = runs, label
    if not found:
        return
    watch = AT.watch
    print(
        f"## Robust training\n\n### Adversarial training\n\nThe epoch with the best accuracy under PGD on val ({watch['steps']} steps of eps / 4, first {watch['n']:,} images) is kept; "
        "test splits choose nothing. How robust the models are is measured by stronger attacks below.\n"
    )
    print(
        markdown(
            [
                "row",
                "flags",
                "parameters",
                "epoch kept (first seed)",
                "val",
                "val under PGD",
                "test_hard",
                "follows colour",
            ],
            [
                [
                    name,
                    f"`{flags[name]}`",
                    f"{runs[0]['params']:,}",
                    f"{runs[0]['selected_epoch']} of {len(runs[0]['epochs'])}",
                    over_seeds(runs, "final", "val", "acc"),
                    mean_sd([run["epochs"][run["selected_epoch"] - 1]["val_pgd"] for run in runs]),
                    *(
                        over_seeds(runs, "final", "test_hard", key)
                        for key in ("acc", "follows_colour")
                    ),
                ]
                for name, runs in found.items()
            ],
        )
    )
    draw_robust_training(found, folder / "figures" / "robust_training.png")
    print("![Clean and attacked accuracy of val by epoch](figures/robust_training.png)\n")
    print(
        "*Accuracy of val by epoch, clean and under PGD, one line a seed. Dotted: the epoch kept. A dashed line that drops while the solid one stays is catastrophic overfitting.*\n"
    )


MEASURES = {  # of RobGAN.finish, in words
    "agreement": "label agreement: the judge reads the class that was asked for",
    "class_entropy": "class entropy of the judge's answers, nats",
    "diversity": "within-class diversity: mean feature distance of two pictures of a class, over that of real ones",
    "diversity_worst": "the same, worst class",
    "frechet": "Frechet distance to real training images, judge's features",
    "precision": "precision (k-NN, k = 3)",
    "recall": "recall",
    "trained_on": "accuracy on real test images of a classifier trained on these only",
}


def report_robgan(folder):
    """Did the generator collapse? Every measure beside real images and a collapsed control; nothing where there is no generator."""
    for where in with_plain_worlds(folder):
        rows = {
            family_of(runs[0]["name"])[0]: runs
            for runs in read_runs(where).values()
            if "generator" in runs[0]
        }
        if not rows:
            continue
        name, runs = min(
            rows.items(), key=lambda row: len(row[0])
        )  # the one that is shown: what others add to is named after it
        g, stem = (
            runs[0]["generator"],
            f"{'' if where == folder else where.name + '/'}figures/{runs[0]['name']}",
        )
        print(f"## Rob-GAN\n\n### Rob-GAN{'' if where == folder else ' in ' + where.name}\n")
        print(
            f"{g['n']:,} pictures from a generator with {g['params']:,} parameters (precision, recall and distances: the first 5,000; the classifier: as many as there are training "
            f"images), judged by `{g['judge']}`; mean ± sd over (n) seeds. Real: test images measured in the same way, and a classifier trained on the training images. Collapsed: one sharp "
            "training image per class, what a generator that ignores its latent would show; its precision is 1 by construction.\n"
        )
        print(
            markdown(
                ["measure", *(f"`{row}`" for row in rows), "real", "collapsed"],
                [
                    [
                        what,
                        *(
                            over_seeds(r, "generator", "measured", "generated", key)
                            for r in rows.values()
                        ),
                        *(
                            over_seeds(runs, "generator", "measured", source, key)
                            for source in ("real", "collapsed")
                        ),
                    ]
                    for key, what in MEASURES.items()
                ]
                + [
                    [
                        "distance to the nearest training image, L2, median (1 % quantile), first seed",
                        *(
                            f"{m['nearest']['median']:.2f} ({m['nearest']['one_percent']:.2f})"
                            for m in (
                                *(
                                    r[0]["generator"]["measured"]["generated"]
                                    for r in rows.values()
                                ),
                                g["measured"]["real"],
                            )
                        ),
                        "0",
                    ]
                ],
            )
        )
        draw_generator_training(rows, where / "figures" / f"{runs[0]['name']}_variety.png")
        print(
            f"![Diversity and losses by epoch]({stem}_variety.png)\n\n*Diversity within a class and label agreement of samples, and both losses, by epoch, one line a seed. The dotted lines are the alarms.*\n"
        )
        samples, closest = (
            where / "figures" / f"{runs[0]['name']}_{what}.png" for what in ("samples", "closest")
        )
        if (path := where / f"{runs[0]['name']}.pt").exists() and "shown" in (
            checkpoint := load_pt(path, "train it again")
        ):  # without it the figures stay as they are
            draw_generated(checkpoint, name, samples)
            draw_closest(
                checkpoint["shown"], g["measured"]["generated"]["nearest"]["closest"], closest
            )
        if samples.exists():
            print(
                f"![Real, generated and attacked]({stem}_samples.png)\n\n*Four pictures a class: real, generated, and generated ones attacked at eps {runs[0]['args']['eps']:g}; in the corner "
                f"of each the answer of the trained net, bold red where it is wrong.*\n\n![The ten closest pairs]({stem}_closest.png)\n\n*Has it memorised? The ten samples closest to any "
                "training image, above, and that image, below, with their L2 distance.*\n"
            )


def tiles(pictures, columns):
    """Pictures (N,C,H,W) in rows of `columns` as one array (rows*H, columns*W, C) for imshow, C 1 or 3."""
    n, c, h, w = pictures.shape
    return (
        pictures.reshape(n // columns, columns, c, h, w)
        .permute(0, 3, 1, 4, 2)
        .reshape(n // columns * h, columns * w, c)
        .numpy()
    )


def draw_samples(samples, classes, when, path):
    """A Split of samples to a grid: a row per class, ten pictures each."""
    plt = start_drawing()
    index = [(samples.labels == k).nonzero()[:, 0][:10] for k in range(classes)]
    index = torch.cat([i[torch.arange(10) % len(i)] for i in index])
    h, w = samples.images.shape[2:]
    fig, ax = plt.subplots(figsize=(4, 0.37 * classes * h / w + 0.4), layout="constrained")
    ax.imshow(tiles(samples.images[index].cpu(), 10))
    ax.set(
        xticks=[],
        yticks=[h * (k + 0.5) for k in range(classes)],
        yticklabels=range(classes),
        ylabel="class",
    )
    ax.set_title(f"What the generator draws {when}", fontsize=10)
    save_figure(fig, path)


def draw_generated(shown, label, path):
    """Four pictures a class, three times: real, generated, generated and attacked; red where the net is wrong."""
    plt = start_drawing()
    kinds = ("real", "generated", "attacked")
    k = len(shown["said"][0])
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 0.72 * k / 4 + 0.7), layout="constrained")
    for ax, kind, said in zip(axes, kinds, shown["said"]):
        pictures = shown["shown"][kind]
        h, w = pictures.shape[2:]
        ax.imshow(tiles(pictures, 4), cmap="gray", vmin=0, vmax=255)
        for i, answer in enumerate(said):
            ax.text(
                w * (i % 4 + 0.97),
                h * (i // 4 + 0.97),
                answer,
                ha="right",
                va="bottom",
                fontsize=8,
                color="#56B4E9" if answer == i // 4 else "#FF5544",
                weight="normal" if answer == i // 4 else "bold",
            )
        ax.set(
            xticks=[], yticks=[h * (row + 0.5) for row in range(k // 4)], yticklabels=range(k // 4)
        )
        ax.set_title({"attacked": "generated, then attacked"}.get(kind, kind), fontsize=10)
    axes[0].set_ylabel("class asked for")
    fig.suptitle(
        f"{label}\nIn the corner: the answer of the trained net, bold red where it is not the class",
        fontsize=9,
    )
    save_figure(fig, path)


def draw_closest(shown, distances, path):
    """The samples nearest to a training image, above, and that image, below."""
    plt = start_drawing()
    fig, axes = plt.subplots(
        2,
        len(distances),
        figsize=(0.95 * len(distances) + 0.6, 2.7),
        layout="constrained",
        squeeze=False,
    )
    for line, kind in zip(axes, ("close", "training")):
        for ax, picture, distance in zip(line, shown[kind], distances):
            ax.imshow(picture.permute(1, 2, 0).numpy(), cmap="gray", vmin=0, vmax=255)
            ax.set(xticks=[], yticks=[])
            if kind == "close":
                ax.set_title(f"{distance:.2f}", fontsize=8)
        line[0].set_ylabel({"close": "generated", "training": "training"}[kind], fontsize=8)
    fig.suptitle(
        "The ten samples closest to a training image (above: L2 distance, pixels in [0, 1])",
        fontsize=9,
    )
    save_figure(fig, path)


def draw_generator_training(rows, path):
    """{name: runs} to two panels each, by epoch, one line a seed: what the samples are like, and the losses."""
    plt = start_drawing()
    fig, axes = plt.subplots(
        len(rows), 2, figsize=(9, 3 * len(rows) + 0.4), layout="constrained", squeeze=False
    )
    lines = (
        (
            ("agreement", "label agreement", INK["jitter"], "-"),
            ("diversity", "diversity within a class", INK["combined"], "-"),
            ("diversity_worst", "the same, worst class", INK["grl"], "--"),
        ),
        (
            ("loss_d", "discriminator, with its penalty", INK["baseline"], "-"),
            ("loss_g", "generator", INK["jitter"], "--"),
        ),
    )
    for line, (name, runs) in zip(axes, rows.items()):
        for ax, kinds in zip(line, lines):
            for key, what, ink, style in kinds:
                for k, run in enumerate(runs):
                    points = [
                        (epoch["epoch"], epoch[key]) for epoch in run["epochs"] if key in epoch
                    ]
                    ax.plot(
                        *zip(*points), color=ink, ls=style, marker=".", label=None if k else what
                    )
                if key in RobGAN.alarm:
                    ax.axhline(RobGAN.alarm[key], color=ink, ls=":", lw=0.8)
            ax.set(xlabel="epoch", title=name)
            ax.xaxis.get_major_locator().set_params(integer=True)
            ax.grid(alpha=0.3)
            ax.legend(fontsize=8)
        line[0].set(ylim=(0, 1.1), ylabel="share; diversity of real = 1")
        line[1].set(ylabel="loss, nats (0.69: no difference)", ylim=(0, None))
    fig.suptitle("Does the generator keep its variety?")
    save_figure(fig, path)


def panels(groups, most, width, height, **how):
    """A figure with a panel of so many inches for each group, at most so many a row: (figure, axes (rows, columns)); spare ones are switched off."""
    columns = min(len(groups), most)
    rows = math.ceil(len(groups) / columns)
    fig, axes = start_drawing().subplots(
        rows,
        columns,
        figsize=(width * columns + 0.7, height * rows + 0.5),
        layout="constrained",
        squeeze=False,
        **how,
    )
    for ax in axes.flat[len(groups) :]:
        ax.axis("off")
    return fig, axes


def draw_robust_training(groups, path):
    """{label: runs} to a panel each: val, clean and under PGD, by epoch."""
    fig, axes = panels(groups, 4, 2.9, 2.7, sharey=True)
    for ax, (label, runs) in zip(axes.flat, groups.items()):
        for k, run in enumerate(runs):
            x = [epoch["epoch"] for epoch in run["epochs"]]
            ax.plot(
                x,
                [epoch["val"] for epoch in run["epochs"]],
                color=INK["baseline"],
                marker=".",
                label=None if k else "clean",
            )
            ax.plot(
                x,
                [epoch["val_pgd"] for epoch in run["epochs"]],
                color=INK["jitter"],
                ls="--",
                marker=".",
                label=None if k else f"PGD at {run['args']['eps']:g}",
            )
            ax.axvline(run["selected_epoch"], color="grey", lw=0.8, ls=":")
        ax.set(xlabel="epoch", ylim=(0, 1))
        ax.set_title(label, fontsize=9)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=7, loc="lower right")
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy on val")
    fig.suptitle("Adversarial training: does the robust accuracy hold from epoch to epoch?")
    save_figure(fig, path)


def draw_learning_curves(groups, path):
    """{label: runs} to panels of accuracy by epoch: val, test_hard, and where some method has one its colour head."""
    plt = start_drawing()
    panels = {
        "val": "val: biased like the training data",
        "test_hard": "test_hard: colour never fits the digit",
        "head_colour": "the colour head, on training images",
    }
    known = lambda key: {
        label: runs for label, runs in groups.items() if key in runs[0]["epochs"][0]
    }
    panels = {key: title for key, title in panels.items() if known(key)}
    fig, axes = plt.subplots(
        1, len(panels), figsize=(4.3 * len(panels), 4.2), layout="constrained", sharey=True
    )
    for ax, (key, title) in zip(axes, panels.items()):
        inks = []
        for label, runs in known(key).items():
            longest = max(len(r["epochs"]) for r in runs)
            curves = torch.tensor(
                [[e[key] for e in r["epochs"]] for r in runs if len(r["epochs"]) == longest]
            )
            x, ink = range(1, longest + 1), INK.get(label.split()[0], "grey")
            style = (
                "--" if label == "oracle" or ink in inks else "-"
            )  # dashed: the oracle, and a second setting of a method
            inks.append(ink)
            ax.plot(x, curves.mean(0).tolist(), color=ink, marker="o", ms=3, ls=style, label=label)
            ax.fill_between(
                x, curves.amin(0).tolist(), curves.amax(0).tolist(), color=ink, alpha=0.15, lw=0
            )
        ax.set(xlabel="epoch", title=title, ylim=(0, 1))
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy")
    fig.legend(
        *axes[0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=3
    )
    fig.suptitle(
        "The same training looks fine on biased data, and only the hard split shows who learned shapes"
    )
    save_figure(fig, path)


def draw_features(groups, path):
    """{label: runs} to two rows of clouds: the first two principal components, coloured by digit and by the owner of the colour."""
    plt = start_drawing()
    shown = {label: runs[0]["pca"] for label, runs in groups.items() if runs[0].get("pca")}
    fig, axes = plt.subplots(
        2, len(shown), figsize=(2.6 * len(shown) + 1, 5.4), layout="constrained", squeeze=False
    )
    for column, (label, points) in zip(axes.T, shown.items()):
        for ax, key, title in zip(
            column, ("labels", "colors"), (f"{textwrap.fill(label, 26)}\nby digit", "by colour")
        ):
            cloud = ax.scatter(
                points["x"],
                points["y"],
                c=points[key],
                cmap="tab10",
                vmin=-0.5,
                vmax=9.5,
                s=9,
                lw=0,
            )
            ax.set_title(title, fontsize=9)
            ax.set(xticks=[], yticks=[])
        column[1].set_xlabel(f"{sum(points['explained']):.0%} of the variance")
    fig.colorbar(
        cloud,
        ax=axes.ravel().tolist(),
        ticks=range(10),
        shrink=0.7,
        label="digit, or the digit that owns the colour",
    )
    fig.suptitle("Does the net sort images by digit or by colour?")
    save_figure(fig, path)


def draw_sweep(sweep, ours, values, path):
    """{label: {value: runs}} and the published rows to one panel: accuracy by the number the worlds differ in."""
    plt = start_drawing()
    fig, ax = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for marker, (row, figures) in zip(itertools.cycle("sDv^<>Xx+*"), sweep.published.items()):
        known = [value for value in values if value in figures]
        ax.plot(
            [values.index(value) for value in known],
            [figures[value] for value in known],
            color="0.6",
            ls="--",
            lw=0.8,
            marker=marker,
            ms=5,
            label=row,
        )
    inks = []
    for label, runs in ours.items():
        known = [value for value in values if value in runs]
        scores = [
            torch.tensor([run["final"]["test_unbiased"]["acc"] for run in runs[value]])
            for value in known
        ]
        x, colour = [values.index(value) for value in known], INK.get(label.split()[0], "grey")
        ax.plot(
            x,
            [acc.mean().item() for acc in scores],
            color=colour,
            marker="o",
            ms=6,
            mfc="white" if colour in inks else colour,
            label=label,
        )
        inks.append(colour)  # a second setting of a method has open dots
        ax.fill_between(
            x,
            [acc.min().item() for acc in scores],
            [acc.max().item() for acc in scores],
            color=colour,
            alpha=0.15,
            lw=0,
        )
    ax.set(
        xticks=range(len(values)),
        xticklabels=[f"{value:g}" for value in values],
        xlabel=sweep.axis,
        ylabel="accuracy on test_unbiased",
        ylim=(0, 1),
    )
    ax.grid(alpha=0.3)
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))
    fig.suptitle(f"{sweep.title}: ours (colour) beside the published (grey)", fontsize=10)
    save_figure(fig, path)


def draw_budget(groups, path):
    """{label: runs} to two panels: test_hard by width of the net and by epochs, everything else as usual."""
    plt = start_drawing()
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    for ax, key in zip(axes, ("width", "epochs")):
        for method in ("baseline", "jitter", "oracle"):
            points = {
                runs[0]["args"][key]: [run["final"]["test_hard"]["acc"] for run in runs]
                for label, runs in groups.items()
                if re.fullmatch(rf"{method}( --{key} \d+)?", label)
            }
            x = sorted(points)
            ax.plot(
                x,
                [sum(points[k]) / len(points[k]) for k in x],
                color=INK[method],
                marker="o",
                ms=4,
                ls="--" if method == "oracle" else "-",
                label=method,
            )
            for k in x:
                ax.plot([k] * len(points[k]), points[k], color=INK[method], marker="_", ls="")
        ax.set_xscale("log", base=2 if key == "width" else 10)
        ticks = sorted({k for line in ax.get_lines() for k in line.get_xdata()})
        ax.set(
            xticks=ticks,
            xticklabels=[f"{k:g}" for k in ticks],
            ylim=(0, 1),
            xlabel={"width": "width of SimpleCNN, channels", "epochs": "epochs"}[key],
        )
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on test_hard")
    axes[1].legend(loc="lower right")
    fig.suptitle("Does laziness go away with a larger net or a longer training?")
    save_figure(fig, path)


def draw_confusion(groups, path):
    """{method: runs} to one confusion matrix each (first seed, test_hard)."""
    fig, axes = panels(groups, 5, 3.1, 3.4)
    for ax, (method, runs) in zip(axes.flat, groups.items()):
        counts = torch.tensor(runs[0]["final"]["test_hard"]["confusion"], dtype=torch.double)
        share = counts / counts.sum(1, keepdim=True).clamp(min=1)
        picture = ax.imshow(share.tolist(), vmin=0, vmax=1, cmap="Blues")
        for i in range(len(share)):
            for j in range(len(share)):
                if share[i, j] >= 0.05:
                    ax.text(
                        j,
                        i,
                        f"{share[i, j]:.2f}".lstrip("0") if share[i, j] < 0.995 else "1",
                        ha="center",
                        va="center",
                        fontsize=5.5,
                        color="white" if share[i, j] > 0.5 else "black",
                    )
        ax.set_title(
            textwrap.fill(f"{method}: {runs[0]['final']['test_hard']['acc']:.3f}", 30), fontsize=10
        )
        ax.set(
            xlabel="predicted", aspect="equal", xticks=range(len(share)), yticks=range(len(share))
        )
    for ax in axes[:, 0]:
        ax.set_ylabel("digit")
    fig.colorbar(picture, ax=axes.ravel().tolist(), shrink=0.6, label="share of the digit's images")
    fig.suptitle("Confusion on test_hard (never the digit's own colour)")
    save_figure(fig, path)


# ---------------------------------------------------------------- the command


def get_args(argv=None):
    p = Parser(__doc__)
    g = p.add_argument_group("method")
    g.add_argument(
        "--method",
        choices=METHODS,
        default="baseline",
        help="training objective (default: baseline)",
    )
    g = p.add_argument_group("cures: jitter, combined")
    g.add_argument(
        "--alpha",
        type=real(0),
        default=1.0,
        help="jitter, combined: weight of the KL term (default: 1)",
    )
    g.add_argument(
        "--jitter",
        choices=JITTERS,
        default="mix",
        help="random colour mixture, or hue-saturation-brightness-contrast (default: mix)",
    )
    g.add_argument(
        "--classify",
        choices=("recoloured", "image"),
        default="recoloured",
        help="jitter, combined: what cross-entropy sees (default: recoloured)",
    )
    g.add_argument(
        "--grain",
        type=real(0, 1),
        default=0.1,
        help="--jitter mix: largest sd of the noise per pixel, pixels in [0, 1] (default: 0.1)",
    )
    g.add_argument(
        "--fade",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="jitter, combined: let alpha fall to 0 (default: yes)",
    )
    g.add_argument(
        "--divergence",
        choices=DIVERGENCES,
        default="forward",
        help="jitter, combined: KL(image || recoloured), the reverse, or their mean (default: forward)",
    )
    g.add_argument(
        "--temperature",
        type=real(0, 100, open_low=True),
        default=1.0,
        help="jitter, combined: of the softmax in the KL term (default: 1)",
    )
    g = p.add_argument_group("cures: grl, combined, lntl, groupdro, jtt")
    g.add_argument(
        "--gamma",
        type=real(0),
        default=0.1,
        help="grl, combined, lntl: final weight of the reversed colour gradient (default: 0.1)",
    )
    g.add_argument(
        "--conditional",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="grl, combined: ask each head for what the other label does not tell (default: yes)",
    )
    g.add_argument(
        "--entropy",
        type=real(0),
        default=0.01,
        help="lntl: weight of the negative entropy of the guessed colours (default: 0.01)",
    )
    g.add_argument(
        "--two-updates",
        action="store_true",
        help="lntl: one update against the heads and one for them, as in the paper, instead of one for both",
    )
    g.add_argument(
        "--group-step",
        type=real(0, 10),
        default=0.01,
        help="groupdro: step of the group weights (default: 0.01)",
    )
    g.add_argument(
        "--first-epochs",
        type=whole(1, 1000),
        default=1,
        help="jtt: epochs of the first net (default: 1)",
    )
    g.add_argument(
        "--upweight",
        type=real(1, 10_000),
        default=20.0,
        help="jtt: how often an image counts that the first net got wrong (default: 20)",
    )
    g = p.add_argument_group("adversarial training: at, robgan")
    g.add_argument(
        "--attack",
        choices=("pgd", "fgsm"),
        default="pgd",
        help="at, robgan: what attacks the batches, from a random start (default: pgd)",
    )
    g.add_argument(
        "--eps",
        type=real(0, 1, open_low=True),
        default=0.05,
        help="at, robgan: L-inf radius, pixels in [0, 1] (default: 0.05)",
    )
    g.add_argument(
        "--steps", type=whole(1, 1000), default=5, help="at, robgan: steps of pgd (default: 5)"
    )
    g.add_argument(
        "--step-size",
        type=real(0, 1, open_low=True),
        help="at, robgan: of a step at the full radius (default: 0.35 eps; 1.25 eps with fgsm)",
    )
    g.add_argument(
        "--clean-epochs",
        type=whole(0, 10_000),
        default=0,
        help="at, robgan: plain training first; its model is saved as well, with _clean in its name (default: 0)",
    )
    g.add_argument(
        "--eps-ramp",
        type=real(0, 1),
        default=0.0,
        help="at, robgan: share of the adversarial epochs in which the radius grows from 0 (default: 0)",
    )
    g.add_argument(
        "--beta",
        type=real(0),
        default=0.0,
        help="at, robgan: weight of TRADES' KL term; 0 is plain adversarial training (default: 0)",
    )
    g = p.add_argument_group("generator: robgan")
    g.add_argument(
        "--finetune-epochs",
        type=whole(0, 10_000),
        default=0,
        help="robgan: last epochs, in which the net learns from attacked real and generated images only (default: 0)",
    )
    g.add_argument(
        "--gan",
        type=real(0),
        default=1.0,
        help="robgan: weight of telling real from generated (default: 1)",
    )
    g.add_argument(
        "--penalty",
        type=real(0),
        default=0.1,
        help="robgan: weight of the discriminator's gradient penalties, gamma of R1 + R2 (default: 0.1)",
    )
    g.add_argument(
        "--judge",
        type=model_name,
        default="baseline_s42",
        metavar="NAME",
        help="robgan: an independently trained classifier in --dir, which judges the samples (default: baseline_s42)",
    )
    g = p.add_argument_group(
        "augmentation for at and robgan (each image has its own draw; default: none)"
    )
    g.add_argument(
        "--crop",
        type=whole(0, 1000),
        default=0,
        metavar="PIXELS",
        help="random crop after padding by this much on every side",
    )
    g.add_argument("--flip", action="store_true", help="mirror half of the images")
    g.add_argument(
        "--rotation",
        type=real(0, 180),
        default=0.0,
        metavar="DEGREES",
        help="random rotation by up to this much, either way",
    )
    g.add_argument(
        "--recolour",
        choices=JITTERS,
        help="colour jitter, of the kinds of --jitter (and with its --grain)",
    )
    g.add_argument(
        "--cutout",
        type=whole(0, 1000),
        default=0,
        metavar="SIDE",
        help="a black square of this many pixels",
    )
    g.add_argument(
        "--mixup",
        type=real(0, 100),
        default=0.0,
        metavar="ALPHA",
        help="mix pairs of images and labels with weights ~ Beta(ALPHA, ALPHA)",
    )
    g.add_argument(
        "--label-smoothing",
        type=real(0, 1),
        default=0.0,
        help="share of the label that is spread over all classes",
    )
    g.add_argument(
        "--clip-grad",
        type=real(0),
        default=0.0,
        metavar="NORM",
        help="largest norm of the gradient; 0 is no limit",
    )
    g = p.add_argument_group("budget and data")
    g.add_argument(
        "--epochs",
        type=whole(1, 10_000),
        default=10,
        help="passes over the training split (default: 10)",
    )
    g.add_argument(
        "--lr",
        type=real(0, 10, open_low=True),
        default=1e-3,
        help="learning rate of AdamW, the peak for onecycle (default: 0.001)",
    )
    g.add_argument(
        "--schedule",
        choices=("constant", "onecycle", "cosine"),
        default="constant",
        help="of the learning rate (default: constant)",
    )
    g.add_argument(
        "--weight-decay", type=real(0, 10), default=1e-4, help="of AdamW (default: 0.0001)"
    )
    g.add_argument(
        "--balance-groups",
        action="store_true",
        help="draw images with every (digit, colour) group equally likely; this tells any method the colours",
    )
    g.add_argument(
        "--amp",
        action="store_true",
        help="bfloat16 autocast in training, and in the attack on val that chooses the epoch of at, never in scoring; a ResNet gains where the processor has bfloat16",
    )
    g.add_argument(
        "--batch", type=whole(1, 100_000), default=128, help="images per step (default: 128)"
    )
    g.add_argument(
        "--shuffle-labels",
        action="store_true",
        help="train on permuted labels: a null model, which can know nothing of digits",
    )
    g = p.add_argument_group("net")
    g.add_argument(
        "--model",
        choices=MODELS,
        default="simplecnn",
        help="saturatedcnn: simplecnn whose first activation ends at 1, so that colour can be hidden behind it (default: simplecnn)",
    )
    g.add_argument(
        "--width",
        type=whole(1, 1024),
        default=4,
        help="channels of SimpleCNN's first layer (default: 4, which makes 4,486 parameters)",
    )
    g.add_argument(
        "--grayscale",
        action="store_true",
        help="the net sees brightness only, in training and ever after",
    )
    g = p.add_argument_group("files")
    g.add_argument("--name", help="of the files in --dir (default: METHOD_sSEED)")
    g.add_argument(
        "--init", metavar="NAME", help="start from the weights of DIR/NAME.pt instead of fresh ones"
    )
    g.add_argument(
        "--resume",
        action="store_true",
        help="continue a killed run after its last whole epoch; it ends with the numbers of an unbroken one",
    )
    g.add_argument(
        "--eval",
        metavar="NAME",
        help="score DIR/NAME.pt again and update the scores in DIR/NAME.json; no training",
    )
    common_args(p, seed_of="weights, batches and jitter")
    args = p.parse_args(argv)
    if args.batch == 1 and args.model.startswith("resnet"):
        p.error("--batch 1 is too small for batch norm; give a ResNet 2 or more")
    if args.method in ("at", "robgan") and args.clean_epochs >= args.epochs:
        p.error(
            f"--clean-epochs {args.clean_epochs} leaves nothing of --epochs {args.epochs}, which counts both phases; give it more"
        )
    if args.method == "robgan" and args.clean_epochs + args.finetune_epochs >= args.epochs:
        p.error(
            f"--finetune-epochs {args.finetune_epochs} leaves the generator nothing of --epochs {args.epochs}; give it more"
        )
    args.name = f"{args.method}_s{args.seed}" if args.name is None else args.name
    for flag, name in (("--name", args.name), ("--init", args.init), ("--eval", args.eval)):
        if name is not None and not re.fullmatch(r"\w[\w.+-]{0,99}", name, re.ASCII):
            p.error(
                f"{flag} {name!r} must be letters, digits and _ . + - only, since files in --dir are named after it"
            )
    if (
        args.name.lower() in ("meta", "gradcam", *SPLITS)
        or args.name.lower().startswith(("attack_", "gradcam_"))
        or args.name.lower().endswith(".part")
    ):
        p.error(f"--name {args.name} would overwrite another file of --dir; choose another name")
    return args


def print_scores(record):
    name, probes = record["name"], record["probe"]
    for split, s in record["final"].items():
        print(
            f"{name}  {split:13s} {s['acc']:.4f} of {s['n']:,}  worst digit {s['worst_digit']:.3f}  follows colour {fmt(s['follows_colour'])}"
        )
    print(
        f"{name}  linear probe  colour {fmt(probes['colour'])}  digit {fmt(probes['digit'])}  (half of test_unbiased, n = {probes['n']:,})"
    )


def main(argv=None):
    args = get_args(argv)
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
        if args.report or args.eval:
            return None
    if args.report:
        return report(args)
    device = setup(args)
    with alone(args.dir / f"{args.eval or args.name}.json"):
        train_or_score(args, device)


def train_or_score(args, device):
    if WORLD > 1:
        join(args, device)
    splits = load_splits(args.dir, device=device)
    if args.eval:
        model, checkpoint = load_model(args.dir, args.eval, device)
        path = args.dir / f"{args.eval}.json"
        record = load_json(
            path,
            "the model itself is there; restore its JSON, or train it again under another --name",
            "args",
            "epochs",
            "name",
        )
        check_fit(splits, checkpoint["classes"], checkpoint["size"], args)
        record |= evaluate(model, splits)
        save_json(record, path)
        print_scores(record)
        return
    classes, size = int(splits["train"].labels.max()) + 1, list(splits["train"].images.shape[2:])
    check_fit(splits, classes, size, args)
    if args.balance_groups and splits["train"].colors is None:
        die(
            f"--balance-groups needs colour labels, but {args.dir}/train.pt has no colors",
            "leave it out",
        )
    if METHODS[args.method].told == "colour labels" and splits["train"].colors is None:
        die(
            f"--method {args.method} needs colour labels, but {args.dir}/train.pt has no colors",
            "choose a method that does without, such as jitter",
        )
    if (
        METHODS[args.method].told == "colour labels"
        and int(splits["train"].colors.max()) >= classes
    ):
        die(
            f"{args.dir}/train.pt has colours beyond its {classes} classes",
            "choose a method that does without colour labels, such as jitter",
        )
    if args.shuffle_labels:
        order = torch.randperm(
            len(splits["train"].labels), generator=stream(args.seed, "shuffled labels")
        )
        splits["train"] = splits["train"]._replace(labels=splits["train"].labels[order.to(device)])
    print(
        " ".join(
            f"{k}={v}" for k, v in {"dir": args.dir, **settings(args), "device": device}.items()
        ),
        flush=True,
    )
    start, world = time.time(), world_of(args.dir)
    torch.manual_seed(args.seed)
    model = fresh_net(args, classes, size).to(device)
    if args.init:
        start_from(args.init, model, args)
    part = args.dir / f"{args.name}.part.pt"
    epochs, kept = train(model, splits, args, device, part)
    if WORLD > 1:
        dist.destroy_process_group()
    if RANK > 0:
        return
    for phase, best in kept.items():
        model.load_state_dict(best["weights"])
        name, flags = (
            name_of(args.name, phase),
            settings(args) | ({"phase": phase} if phase else {}),
        )
        scores = evaluate(model, splits) | best.get("record", {})
        facts = {
            "seconds": round(time.time() - start, 1),
            "torch": torch.__version__,
            "threads": args.threads,
            "processes": WORLD,
            "device": str(device),
        }
        save_pt(
            {
                "weights": best["weights"],
                "args": flags,
                "classes": classes,
                "size": size,
                **best.get("checkpoint", {}),
            },
            args.dir / f"{name}.pt",
        )
        record = {
            "schema": 1,
            "script": "train.py",
            "name": name,
            "args": flags,
            "world": world,
            "params": sum(p.numel() for p in model.parameters()),
            "selected_on": best["on"],
            "selected_epoch": best["epoch"],
            **scores,
            "epochs": epochs,
            "run": facts,
        }
        save_json(record, args.dir / f"{name}.json")
        print_scores(record)
        print(f"wrote {args.dir / name}.pt and .json after {facts['seconds']:.1f}s")
    part.unlink(missing_ok=True)


def name_of(name, phase):
    """at_s42 and its phase `clean` to at_clean_s42, so that the seeds of a phase belong together."""
    return re.sub(r"(_s\d+)?$", rf"_{phase}\1", name, count=1) if phase else name


def start_from(name, model, args):
    """Copy the weights of an earlier run into the fresh model."""
    other, _ = load_model(args.dir, name)
    try:
        model.load_state_dict(other.state_dict())
    except RuntimeError:
        die(f"--init {name} is another net than this run's", "give it the same --model and --width")


def check_fit(splits, classes, size, args):
    """Every split must have the training split's picture size, no class beyond its own, and enough images for what is done with it."""
    for flag in ("crop", "cutout"):
        if flag in METHODS[args.method].flags and getattr(args, flag) >= min(size):
            die(
                f"--{flag} {getattr(args, flag)} leaves nothing of {size[0]}x{size[1]} pixels",
                "try 2",
            )
    for name, split in splits.items():
        if len(split.labels) < (
            least := {"train": 2, "test_unbiased": 4}.get(name, 1)
        ):  # for batch norm, and for the probes
            die(
                f"{args.dir}/{name}.pt has too few images, {len(split.labels)}",
                f"give it {least} or more",
            )
        if list(split.images.shape[2:]) != list(size):
            die(
                f"{args.dir}/{name}.pt has images of {tuple(split.images.shape[2:])} pixels but the net is built for {tuple(size)}",
                "make the splits from one source",
            )
        if int(split.labels.max()) >= classes:
            die(
                f"{args.dir}/{name}.pt has label {int(split.labels.max())} but training ends at class {classes - 1}",
                "add such images to train.pt or remove them",
            )


if __name__ == "__main__":
    run(main)
