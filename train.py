"""Train one classifier on a biased world with one method, and score it on every split.

Reads   DIR/train.pt, val.pt, test_hard.pt, test_unbiased.pt                (from make_data.py)
Writes  DIR/NAME.pt, DIR/NAME.json       NAME: the method, what differs from the defaults, the seed

    python train.py                                    # the lazy model: results/baseline_s42.json
    python train.py --method jitter --alpha 2          # the cured one: results/jitter_s42.json
    python train.py --method grl --gamma 1 --seed 43   # results/grl_gamma1_s43.json
    python train.py --method balance --infer-groups    # told nothing: a first net names the colours
    python train.py --report                           # figures and tables of every run in --dir
    torchrun --standalone --nproc_per_node=2 train.py  # two processes share every batch
"""

import argparse
import copy
import functools
import math
import os
import re
import sys
import time
from pathlib import Path
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from common import (
    MODELS,
    ROOT,
    SPLITS,
    WHERE,
    InputOf,
    Split,
    answers_and_features,
    build_model,
    check_fit,
    chunks,
    common_args,
    die,
    figure,
    guard,
    ink,
    lines,
    load_json,
    load_model,
    load_pt,
    load_split,
    luma,
    matrix,
    name_of,
    note_time,
    number,
    pictures,
    predict,
    progress,
    row_of,
    run,
    save_figure,
    save_json,
    save_pt,
    setup,
    stream,
    t_interval,
    write,
)

EVAL_SPLITS = SPLITS[1:]
NOT_SETTINGS = (*WHERE, "name", "resume")


# ---- the command line


def get_args(argv=None):
    raw = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    told = " ".join(m for m in METHODS if METHODS[m].wants_colours)
    groups, owners, usual = {}, {}, {}

    def add(flag, of="", default=None, help="", **how):
        """A flag of these methods, of all if none; argparse leaves None where it is not given."""
        if of not in groups:
            title = f"only {of.replace(' ', ', ')}" if of else "every method"
            groups[of] = p.add_argument_group(title)
        if default is not None and default is not False:
            help += f" ({default})"
        key = groups[of].add_argument(flag, help=help, **{**how, "default": None}).dest
        owners[key], usual[key] = of.split(), default

    switch = {"action": "store_true", "default": False}
    yes = {"action": argparse.BooleanOptionalAction, "default": True}
    rate, share, weight = number(float, 1e-8, 10), number(float, 0, 1), number(float, 0, 1e6)
    count, some = number(int, 0, 10_000), number(int, 1, 100_000)
    text = f"{', '.join(METHODS)}, or FILE.py with a class of your own (baseline)"
    p.add_argument("--method", type=method_of, default="baseline", metavar="METHOD", help=text)

    of = "jitter combined"
    add("--alpha", of=of, type=weight, default=2.0, help="weight of the KL term")
    add("--jitter", of=of, choices=JITTERS, default="mix", help="kind of recolouring")
    which = {"choices": ("recoloured", "image"), "default": "recoloured"}
    add("--classify", of=of, **which, help="what cross-entropy sees")
    add("--grain", of=of, type=share, default=0.1, help="mix: largest sd of pixel noise")
    add("--fade", of=of, **yes, help="let alpha fall to 0")
    add("--gamma", of="grl combined lntl", type=weight, default=0.1, help="weight of the reversal")
    add("--conditional", of="grl combined", **yes, help="correct for how colour and digit go along")
    add("--entropy", of="lntl", type=weight, default=0.01, help="weight of the entropy")

    of = "irm vrex"
    add("--penalty", of=of, type=weight, default=91257.0, help="weight of what must not vary")
    add("--anneal", of=of, type=share, default=0.38, help="share of the training without it")
    add("--l2", of=of, type=share, default=0.0011, help="weight of all squared weights")

    of = "jitter at robgan"
    add("--resample", of="balance", type=share, default=1.0, help="draw by n**-R; see `Resample`")
    add("--balance", of=of, **switch, help="the draws of --method balance")
    add(
        "--infer-groups",
        of=f"{told} irm vrex {of}",
        **switch,
        help="a first net's answers are the colours",
    )
    add("--rounds", of="balance", type=number(int, 1, 3), default=1, help="shortcuts to be named")
    add("--first-epochs", of="jtt", type=some, default=1, help="of the first net")

    of = "at robgan"
    add("--attack", of=of, choices=("pgd", "fgsm"), default="pgd", help="on batches")
    add("--eps", of=of, type=rate, default=0.05, help="L-inf, pixels in [0, 1]")
    add("--steps", of=of, type=some, default=5, help="of pgd")
    add("--step-size", of=of, type=rate, help="at full eps (0.35 eps; 1.25 eps for fgsm)")
    add("--clean-epochs", of=of, type=count, default=0, help="plain epochs at first")
    add("--eps-ramp", of=of, type=share, default=0.0, help="share of epochs with growing eps")
    add("--beta", of=of, type=weight, default=0.0, help="weight of TRADES' KL term")
    add("--generator", of="at", metavar="NAME", help="learn pictures of this robgan run, too")
    add("--generated", of="at", type=share, default=0.5, help="their share of a batch")
    add("--judge", of="robgan", default="baseline_s42", help="independent classifier")
    of = "baseline lff jtt biasbal balance dfr at robgan"
    add("--crop", of=of, type=count, default=0, metavar="PIXELS", help="largest shift of images")
    add("--augment", of="at robgan", choices=("student",), help="a recipe: see `augment`")

    add("--epochs", type=some, default=10, help="passes over the training split")
    add("--lr", type=rate, default=1e-3, help="of AdamW, onecycle's peak")
    add("--schedule", choices=("constant", "onecycle", "cosine"), default="constant")
    add("--batch", type=some, default=128, help="images per step")
    add("--shuffle-labels", **switch, help="a null model: permuted labels")
    add("--model", choices=MODELS, default="simplecnn")
    add("--width", type=number(int, 1, 1024), default=4, help="of SimpleCNN")
    add("--grayscale", **switch, help="the net sees brightness only")
    add("--name", metavar="ROW", help="of the files, _sSEED is added (METHOD_WHATDIFFERS)")
    add("--resume", **switch, help="continue after the last whole epoch")
    common_args(p, seed_of="weights, batches and jitter")

    args = p.parse_args(argv)
    given = {key for key in owners if getattr(args, key) is not None}
    kin = {args.method}
    if args.method not in OURS:  # a class of one's own has the flags of the one that it extends
        kin |= {name for name in OURS if METHODS[name] is METHODS[args.method].__base__}
    for key, methods in owners.items():
        foreign = methods and not kin & set(methods)
        if foreign and key in given:
            flag = f"--{key.replace('_', '-')}"
            p.error(f"{flag} means nothing for --method {args.method}; leave it out")
        if foreign:
            delattr(args, key)
        elif key not in given:
            setattr(args, key, usual[key])
    check_args(p, args, given)
    skip = ("method", *NOT_SETTINGS)
    if args.name is None:
        args.name = name_of(args.method, args, argparse.Namespace(**usual, seed=None), skip)
    elif not args.name.endswith(f"_s{args.seed}"):
        args.name += f"_s{args.seed}"
    return args


def method_of(text):
    """An argparse type: the name of a method; FILE.py adds the last class in it, as FILE.

    The file sees every name of this script, so it may begin with `class Mine(Baseline):`.
    """
    path = Path(text)
    if path.suffix == ".py" and path.is_file():
        names = {**globals()}
        exec(compile(path.read_text(encoding="utf-8"), path, "exec"), names)
        new = [thing for name, thing in names.items() if name not in globals()]
        classes = [thing for thing in new if isinstance(thing, type) and issubclass(thing, Method)]
        if not classes or path.stem in OURS:
            what = "is named like a method of ours" if classes else "has no class of a Method"
            raise argparse.ArgumentTypeError(f"{path} {what}")
        text = path.stem
        METHODS[text] = classes[-1]
    if text not in METHODS:
        raise argparse.ArgumentTypeError(f"there is no {text!r}; choose from {', '.join(METHODS)}")
    return text


def check_args(p, args, given):
    """Refuse what can never work before any work is done; `given` names the flags of argv."""
    own = vars(args)  # without the flags of other methods
    for wrong, what in (
        (infers_groups(args) and not own.get("balance", True), "--infer-groups without --balance"),
        (own.get("rounds", 1) > 1 and not infers_groups(args), "--rounds without --infer-groups"),
        ("width" in given and "cnn" not in args.model, f"--width with --model {args.model}"),
        ("steps" in given and own.get("attack") == "fgsm", "--steps with --attack fgsm"),
        ("grain" in given and own.get("jitter") != "mix", "--grain without --jitter mix"),
        ("generated" in given and own.get("generator") is None, "--generated without --generator"),
    ):
        if wrong:
            p.error(f"{what} means nothing for --method {args.method}; leave it out")
    if own.get("clean_epochs", 0) >= args.epochs:
        p.error(f"--epochs {args.epochs} counts all phases and leaves none for the attack")
    name = "" if args.name is None else args.name
    if args.name is not None and not re.fullmatch(r"\w[\w.+-]{0,99}", name, re.ASCII):
        p.error(f"--name {name!r} may hold letters, digits and _ . + - only")
    if re.match("(gradcam|attack)(_|$)", name):
        p.error(f"--name {name} belongs to another script")
    seed = re.search(r"_s(\d+)$", name)
    if seed and int(seed[1]) != args.seed:
        p.error(f"--name {name} is not of --seed {args.seed}; leave {seed[0]} out, it is added")


def settings(args):
    """What decides the result: no argument that says where or how to run."""
    skip = set(NOT_SETTINGS)
    if vars(args).get("generator") is None:
        skip.add("generated")
    if vars(args).get("rounds") == 1:
        skip.add("rounds")
    return {key: value for key, value in vars(args).items() if key not in skip}


def infers_groups(args):
    return getattr(args, "infer_groups", False)


def uses_colours(args):
    """Does the training need the colour of every image, true or inferred?"""
    return getattr(args, "balance", False) or METHODS[args.method].wants_colours


# ---- one model in several processes, started by torchrun

TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ
PROCESSES = int(os.environ["WORLD_SIZE"]) if TORCHRUN else 1  # processes that train this model
RANK = int(os.environ["RANK"]) if TORCHRUN else 0  # which of them this is; the first one speaks


def meet(name, device):
    """Join the other processes: gloo on CPUs, nccl on GPUs, one each."""
    if not METHODS[name].can_shard:
        able = ", ".join(other for other, method in METHODS.items() if method.can_shard)
        die(f"--method {name} needs whole batches in one process", f"torchrun can do {able}")
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    if device.type != "cpu" and gpus < int(os.environ["LOCAL_WORLD_SIZE"]):
        die(f"there are fewer GPUs for --device {device} than processes", "use --device cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def shard(index):
    """This process's part of a batch, int64 (b,), and its weight; an idle one gets weight 0."""
    mine = index.tensor_split(PROCESSES)[RANK]
    return (mine, len(mine) / len(index)) if len(mine) else (index[:1], 0.0)


def all_reduce(tensors):
    """Replace each tensor by its sum over all processes, in one message."""
    if PROCESSES == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, summed in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        t.copy_(summed.view(t.shape))


# ---- the run


def main(argv=None):
    args = get_args(argv)
    if RANK > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for the whole run)
    if args.report:
        report(args)
        return
    device, began = setup(args), time.time()
    for phase in ("", "clean") if getattr(args, "clean_epochs", 0) else ("",):
        path = args.dir / f"{phase_name(args.name, phase)}.json"
        guard(path, {**settings(args), "script": "train.py"}, args.overwrite)
    if PROCESSES > 1:
        meet(args.method, device)
    splits = load_splits(args, device)
    torch.manual_seed(args.seed)
    model = fresh_net(args, splits["train"]).to(device)
    print_start(args, model, device)
    facts = {"knows": knows(args)}
    if infers_groups(args):
        rounds = getattr(args, "rounds", 1)
        splits["train"], facts["groups"] = infer_groups(splits["train"], args.seed, rounds)
    method = METHODS[args.method](model, splits, args).to(device)
    epochs, kept = train(model, method, splits, args, args.dir / f"{args.name}.part.pt")
    if PROCESSES > 1:
        dist.destroy_process_group()
    if RANK == 0:
        save_results(model, method, splits, args, epochs, kept, facts)
        seconds = note_time(args.dir, args.name, began)
        print(f"wrote {args.dir / args.name}.pt and .json after {seconds:.0f}s")
        if not args.model.startswith("mlp"):
            print(f"see where it looks: python gradcam.py --dir {args.dir} --models {args.name}")


class Batch(NamedTuple):
    x: torch.Tensor  # float (B,3,H,W) in [0, 1]
    y: torch.Tensor  # int64 (B,)
    colour: torch.Tensor | None  # int64 (B,): the class that owns the image's colour
    index: torch.Tensor  # int64 (B,): which training images these are
    progress: float  # share of the training that is over, 0 to 1
    epoch: int = 1  # counted from 1
    weight: float = 1.0  # of these images among those of all processes, 0 to 1


class Kept(NamedTuple):
    """What is kept of a phase of the training: one epoch's weights."""

    epoch: int
    on: str  # what chose this epoch
    value: float  # of what chose it; the highest wins
    weights: dict  # a state_dict on the CPU


def train(model, method, splits, args, part=None):
    """Fits the model in place; returns one record per epoch, and {phase: Kept}.

    Most methods have one phase, "", whose last epoch is kept; a method may name others, and a key
    of the epoch's record (never of a test split) whose highest value decides, the later of two
    equal ones. After every epoch the file `part` holds what --resume needs.
    """
    sizes = batch_sizes(len(splits["train"].labels), args.batch, args.model)
    optimiser = make_optimiser(model, method, args.lr)
    schedule = make_schedule(optimiser, args.schedule, args.epochs * len(sizes))
    state = {"model": model, "method": method, "optimiser": optimiser, "schedule": schedule}
    epochs, kept = [], {}
    if part is not None and args.resume:
        epochs, kept = restore(part, state, this_run(args))
    for epoch in range(len(epochs) + 1, args.epochs + 1):
        start = time.time()
        loss = train_epoch(epoch, sizes, splits["train"], state, args)
        record = {"epoch": epoch, "loss": loss, **epoch_scores(model, splits)}
        record |= method.facts(model)
        epochs.append(record)
        phase, key = method.phase(epoch)
        value = record[key] if key else epoch
        if phase not in kept or value >= kept[phase].value:
            kept[phase] = Kept(epoch, key or "last epoch", value, copy_of(model.state_dict()))
        print_epoch(record, args.epochs, time.time() - start)
        if part is not None and RANK == 0:
            saved = {name: thing.state_dict() for name, thing in state.items()}
            saved["kept"] = {phase: tuple(best) for phase, best in kept.items()}
            save_pt({"run": this_run(args), "epochs": epochs, **saved}, part)
    return epochs, kept


def train_epoch(epoch, sizes, data, state, args):
    """One pass over the training split; returns the mean loss."""
    model, method = state["model"], state["method"]
    start, device = time.time(), data.labels.device
    own = f" of process {RANK}" if RANK > 0 else ""
    gen = stream(args.seed, f"epoch {epoch}{own}", device)
    order = draw_order(data, method.resample, stream(args.seed, f"order {epoch}")).to(device)
    total = torch.zeros((), device=device)
    model.train()
    for i, index in enumerate(order.split(sizes)):
        mine, weight = shard(index)
        colour = None if data.colors is None else data.colors[mine]
        past = ((epoch - 1) * len(sizes) + i) / (args.epochs * len(sizes))
        x = moved(data.x(mine), method.crop, gen)
        batch = Batch(x, data.labels[mine], colour, mine, past, epoch, weight)
        loss = method.step(model, batch, state["optimiser"], gen)
        total += loss * (len(index) * weight)
        state["schedule"].step()
        if i % 50 == 49 and sys.stdout.isatty():
            left = (time.time() - start) * (len(sizes) / (i + 1) - 1)
            progress(f"epoch {epoch:2d}/{args.epochs}  {left:4.0f}s left")
    all_reduce([total])
    loss = total.item() / len(order)
    if not math.isfinite(loss) or not all(p.isfinite().all() for p in model.parameters()):
        die(f"the loss is {loss} in epoch {epoch}", f"try a smaller --lr than {args.lr:g}")
    return loss


def update(optimiser, loss, weight=1.0, clip=0.0, only=None):
    """One step down; `weight`: this process's share of the loss; `clip`: largest norm, or 0.

    `only`: the weights that learn; None for all.
    """
    optimiser.zero_grad(set_to_none=True)
    loss.backward(inputs=only)
    parameters = [p for group in optimiser.param_groups for p in group["params"]]
    if PROCESSES > 1:
        all_reduce([p.grad.mul_(weight) for p in parameters if p.grad is not None])
    if clip:
        nn.utils.clip_grad_norm_(parameters, clip)
    optimiser.step()
    return loss.detach()


# ---- what the run needs: data, batches, rates, words


def load_splits(args, device):
    """{name: Split} of --dir; they fit each other and what the flags ask for."""
    splits = {name: load_split(args.dir, name, device) for name in SPLITS}
    data = splits["train"]
    fits, crop = shape_of(data), getattr(args, "crop", 0)
    for name, split in splits.items():
        path, n = args.dir / f"{name}.pt", len(split.labels)
        if n < (4 if name == "test_unbiased" else 2):  # for batch norm and for the probes
            die(f"{path} has too few images, {n}", "give it four or more")
        check_fit("the net for train.pt", fits, split, path)
    if crop >= min(fits["size"]):
        die(f"--crop {crop} leaves nothing of {min(fits['size'])} pixels", "try 2")
    told = data.colors is not None and int(data.colors.max()) < fits["classes"]
    if uses_colours(args) and not infers_groups(args) and not told:
        what = f"needs a colour label below {fits['classes']} for every image of train.pt"
        die(f"--method {args.method} with these flags {what}", "try --infer-groups")
    if args.shuffle_labels:
        order = torch.randperm(len(data.labels), generator=stream(args.seed, "shuffled labels"))
        splits["train"] = data._replace(labels=data.labels[order.to(device)])
    return splits


def shape_of(data):
    """What a net for these images must fit."""
    return {"classes": int(data.labels.max()) + 1, "size": list(data.images.shape[2:])}


def fresh_net(args, data):
    return build_model(args.model, args.width, **shape_of(data), grayscale=args.grayscale)


def draw_order(data, r, gen):
    """Which image comes when in an epoch, int64 (N,): at r = 0 each once.

    Else with replacement, weights n**-r of an image whose (digit, colour) group has n; at r = 1 all
    groups come equally often.
    """
    if r == 0:
        return torch.randperm(len(data.labels), generator=gen)
    group = (data.labels * (int(data.colors.max()) + 1) + data.colors).cpu()
    likely = 1 / group.bincount()[group].double() ** r
    return torch.multinomial(likely, len(group), replacement=True, generator=gen)


def batch_sizes(n, batch, model):
    """Images in each batch; a last one of a single image joins the one before (batch norm)."""
    sizes = [batch] * (n // batch)
    left = n % batch
    if left == 1 and sizes:
        sizes[-1] += 1
    elif left:
        sizes.append(left)
    if model.startswith("resnet") and min(sizes) < 2 * PROCESSES:
        die(f"--batch {batch} makes a batch of {min(sizes)}", "choose another --batch")
    return sizes


def make_optimiser(model, method, lr):
    """AdamW on the net and, at a rate of their own, on the method's weights if it has any."""
    groups = [{"params": list(model.parameters()), "lr": lr}]
    own = list(method.parameters())
    if own:
        groups.append({"params": own, "lr": lr * method.lr_scale, "betas": method.betas})
    return torch.optim.AdamW(groups, weight_decay=1e-4, fused=True)


def make_schedule(optimiser, kind, steps):
    """The learning rate, step by step."""
    scheduler = torch.optim.lr_scheduler
    if kind == "cosine":
        return scheduler.CosineAnnealingLR(optimiser, steps)
    if kind == "constant":
        return scheduler.ConstantLR(optimiser, factor=1)
    rates = [group["lr"] for group in optimiser.param_groups]
    momentum = [group["betas"][0] > 0 for group in optimiser.param_groups]
    low, high = ([end if has else 0.0 for has in momentum] for end in (0.85, 0.95))
    ends = {"base_momentum": low, "max_momentum": high}  # weights without momentum stay without
    return scheduler.OneCycleLR(optimiser, max_lr=rates, total_steps=steps, **ends)


def copy_of(weights):
    """A state_dict on the CPU that no later step changes."""
    layout = torch.contiguous_format
    return {k: v.detach().cpu().clone(memory_format=layout) for k, v in weights.items()}


def print_start(args, model, device):
    """What runs, with the settings that differ from the defaults or are the method's own."""
    usual, everyone = settings(get_args(["--method", args.method])), settings(get_args([]))
    differs = [
        f"{flag} {value}"
        for flag, value in settings(args).items()
        if value != usual.get(flag) or (value and flag not in everyone)
    ]
    params = sum(p.numel() for p in model.parameters())
    net = f"{args.model} with {params:,} parameters, {device}"
    print(f"{args.name}: {args.epochs} epochs on {args.dir}, {net};", end=" ")
    print(", ".join(differs) or "all settings as usual", flush=True)


def print_epoch(record, epochs, seconds):
    line = f"epoch {record['epoch']:2d}/{epochs}  loss {record['loss']:.4f}"
    for key, value in record.items():
        if key not in ("epoch", "loss"):
            line += f"  {key} {'-' if value is None else f'{value:.3f}'}"
    progress("")
    print(f"{line}  {seconds:5.1f}s", flush=True)


def world_of(folder):
    """What meta.json says of the painting; {} for one's own data."""
    path, keys = folder / "meta.json", ("recipe", "corr", "sigma2", "seed", "limit", "is_mnist")
    meta = load_json(path, "mend or rename it") if path.exists() else {}
    return {k: meta[k] for k in keys if k in meta and (k, meta[k]) != ("sigma2", None)}


def this_run(args):
    """What must be the same for --resume to continue a run."""
    return {**settings(args), "world": world_of(args.dir), "processes": PROCESSES}


def restore(part, state, now):
    """Bring everything to where a killed run left it; returns its epochs and what it kept.

    No generator is kept: every epoch draws from streams of its own.
    """
    if not part.exists():
        print(f"--resume: {part} is not there, so the run starts with its first epoch", flush=True)
        return [], {}
    hint = "give the flags of that run to continue it, or leave --resume out to start over"
    saved = load_pt(part, hint)
    before = saved.get("run", {})
    changed = [f"{key} was {before.get(key)}" for key in now if before.get(key) != now[key]]
    if changed:
        die(f"{part} was left by another run ({', '.join(changed)})", hint)
    try:
        for name, thing in state.items():
            thing.load_state_dict(saved[name])
        kept = {phase: Kept(*best) for phase, best in saved["kept"].items()}
        epochs = list(saved["epochs"])
    except Exception as e:  # whatever a foreign file makes of it
        die(f"{part} does not fit this run ({type(e).__name__})", hint)
    print(f"--resume: continuing after epoch {len(epochs)}", flush=True)
    return epochs, kept


# ---- methods, from easy to hard: a `loss`, and a `step` that most inherit


class Method(nn.Module):
    """What every method has. A new one overrides `loss` and adds its row to METHODS."""

    knows = "nothing"  # what the training is told about the bias, beside labels and colours
    wants_colours = False  # of the training images, true or inferred
    resample = 0.0  # r of `draw_order`
    crop = 0  # by how many pixels the loop shifts images
    can_shard = False  # may torchrun share a batch: a mean over images, and nothing kept of them
    lr_scale, betas = 1, (0.9, 0.999)  # for the method's own weights, if it has any
    clip = 0.0  # largest norm of a gradient; 0: any

    def __init__(self, model, splits, args):
        super().__init__()
        self.args = args
        self.crop = getattr(args, "crop", 0)
        if getattr(args, "balance", False):
            self.resample = 1.0

    def loss(self, model, batch, gen):
        """The scalar to minimise; extra random numbers come from `gen` only."""
        raise NotImplementedError

    def step(self, model, batch, optimiser, gen):
        """One update of all weights; returns the loss to be shown."""
        return update(optimiser, self.loss(model, batch, gen), batch.weight, self.clip)

    def facts(self, model):
        """More numbers for the epoch's record."""
        return {}

    def phase(self, epoch):
        """(name of the phase, key of the record that chooses its epoch; None keeps the last)."""
        return "", None

    def finish(self, model, data):
        """The last thing done to the weights that are kept; `data` is the training split."""

    def draws(self):
        """A generator of pictures, to be scored once training is over, or None."""
        return None


class Baseline(Method):
    """Empirical risk minimisation: the row that every other row is compared with."""

    can_shard = True

    def loss(self, model, batch, gen):
        return F.cross_entropy(model(batch.x), batch.y)


def moved(x, crop, gen, degrees=0, flip=False):
    """Shifted by up to `crop` whole pixels, mirrored half of the times, turned by up to `degrees`.

    A crop of the image after padding is a shift, so all three are one resampling; edges are
    repeated outwards. x (B,3,H,W).
    """
    if not (crop or degrees or flip):
        return x
    b, _, h, w = x.shape

    def draw():
        return torch.rand(b, generator=gen, device=x.device)

    angle = math.radians(degrees) * (2 * draw() - 1)
    mirror = torch.where(draw() < 0.5, -1.0, 1.0) if flip else torch.ones_like(angle)
    pixels = 2 * crop + 1
    right, down = (2 / side * (draw() * pixels - crop).floor() for side in (w, h))
    rows = (
        torch.stack([mirror * angle.cos(), -angle.sin() * h / w, right], 1),
        torch.stack([mirror * angle.sin() * w / h, angle.cos(), down], 1),
    )
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


class GCE(Baseline):
    """Generalised cross-entropy (Zhang & Sabuncu, 2018): it learns what is easy, and only that."""

    def loss(self, model, batch, gen):
        return generalised_cross_entropy(model(batch.x), batch.y)


def generalised_cross_entropy(logits, y, q=0.7):
    """(1 - p**q) / q of the probability p of the label (Zhang & Sabuncu, 2018), mean."""
    p = logits.softmax(1).gather(1, y[:, None])[:, 0]
    return ((1 - p.clamp(min=1e-8) ** q) / q).mean()


class Jitter(Method):
    """Cross-entropy on a random recolouring, and a KL term that ties it to the image's prediction.

    Ours: the recoloured copy is classified, and the weight of KL(image || copy) falls linearly from
    --alpha to 0, since late in training agreement costs more than it teaches. The Lazy Artist
    classifies the image and keeps the weight: --jitter hsv --classify image --no-fade. With
    --alpha 0 this is plain augmentation.
    """

    knows = "the kind of bias"
    can_shard = True

    def loss(self, model, batch, gen):
        recoloured = JITTERS[self.args.jitter](batch.x, self.args.grain, gen)
        if self.args.alpha == 0 and self.args.classify == "recoloured":
            return F.cross_entropy(model(recoloured), batch.y)
        image, copy = model(torch.cat([batch.x, recoloured])).chunk(2)
        return jitter_loss(image, copy, batch, self.args)


def jitter_loss(image, recoloured, batch, args):
    """From the logits (B,classes) of the images and of their recoloured copies."""
    classified = recoloured if args.classify == "recoloured" else image
    alpha = args.alpha * (1 - batch.progress) if args.fade else args.alpha
    return F.cross_entropy(classified, batch.y) + alpha * kl(image, recoloured)


def kl(p, q):
    """KL(p || q) of the softmax of two sets of logits (B,classes), mean over the batch."""
    logs = F.log_softmax(q, 1), F.log_softmax(p, 1)
    return F.kl_div(*logs, log_target=True, reduction="batchmean")


def mix(x, grain, gen):
    """A random linear mixture of the colour channels per image, each stretched to a random range.

    The rows of the 3x3 matrix have unit norm and any sign, so every colour can become every other
    and light can become dark, but an edge stays an edge. Differences of channels can cancel a
    texture's brightness noise, so some is put back: one normal draw per pixel, sd up to `grain` by
    image. x (B,3,H,W) in [0, 1], and so is the result.
    """
    b, _, h, w = x.shape
    where = {"generator": gen, "device": x.device}
    mixing = F.normalize(torch.randn(b, 3, 3, **where), dim=2)
    noise = grain * torch.rand(b, 1, 1, **where) * torch.randn(b, 1, h * w, **where)
    mixed = torch.bmm(mixing, x.reshape(b, 3, h * w)) + noise  # (B,3,HW)
    darkest, lightest = mixed.amin(2, keepdim=True), mixed.amax(2, keepdim=True)
    span = 0.1 + 0.9 * torch.rand(b, 3, 1, **where)
    low = (1 - span) * torch.rand(b, 3, 1, **where)
    scale = span / (lightest - darkest + 1e-6)
    mixed = mixed.mul_(scale).add_(low - darkest * scale).clamp_(0, 1)
    return mixed.view(b, 3, h, w).contiguous(memory_format=torch.channels_last)


def hsv(x, grain, gen):
    """Random brightness, contrast, saturation (factors 0.5 to 1.5) and hue (any), drawn per image.

    The operations and ranges of torchvision's ColorJitter(0.5, 0.5, 0.5, 0.5), which draws once for
    a whole batch and in random order; here each image has its own draw and the order is fixed.
    x (B,3,H,W) in [0, 1], and so is the result; `grain` is not used.
    """

    def draw(low, high):
        return torch.rand(len(x), 1, 1, 1, generator=gen, device=x.device) * (high - low) + low

    x = (x * draw(0.5, 1.5)).clamp(0, 1)
    x = torch.lerp(luma(x).mean((2, 3), keepdim=True), x, draw(0.5, 1.5)).clamp(0, 1)
    x = torch.lerp(luma(x), x, draw(0.5, 1.5)).clamp(0, 1)
    value, chroma = x.amax(1, keepdim=True), x.amax(1, keepdim=True) - x.amin(1, keepdim=True)
    r, g, b = x.split(1, dim=1)
    some = chroma + 1e-8
    sixth = torch.where(value == g, 2 + (b - r) / some, 4 + (r - g) / some)  # hue, 0 to 6
    sixth = torch.where(value == r, (g - b) / some, sixth)
    k = (x.new_tensor([5, 3, 1]).view(1, 3, 1, 1) + sixth + draw(-3, 3)) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


JITTERS = {"mix": mix, "hsv": hsv}


def count_groups(split, classes):
    """Images per (digit, colour): float (classes, classes), or (classes, groups) of --rounds."""
    groups = max(classes, int(split.colors.max()) + 1)
    cell = split.labels * groups + split.colors
    return cell.bincount(minlength=classes * groups).view(classes, groups).float()


def log_given(count, dim):
    """log p(one label given the other) of counts (digit,colour): each sum over `dim` is one."""
    return (count / count.sum(dim, keepdim=True)).log()


class Resample(Method):
    """Images drawn with weights n**-r of their group, and a loss corrected for what is left.

    A group is a (digit, colour) pair with n training images, r is --resample. Drawn so, it makes up
    n**(1-r) of the batches; log p(digit given colour) of that is added to the logits, so the net
    has no reason to learn what the colour says of the digit (logit adjustment, Menon et al., 2021).
    Scoring uses the plain logits. A pair never seen counts as one image.

    Its ends are `biasbal`, r = 0: each image once (bias balance, Hong & Yang, 2021), and `balance`,
    r = 1: all groups equally often (Idrissi et al., 2022), which leaves nothing to correct. Between
    them, rare images are seen more often than at r = 0 and repeated less often than at r = 1.
    """

    wants_colours = can_shard = True

    def __init__(self, model, splits, args):
        super().__init__(model, splits, args)
        self.resample = getattr(args, "resample", 0.0)  # only `balance` has the flag
        self.count = count_groups(splits["train"], model.fc.out_features).clamp(min=1)
        left = self.count ** (1 - self.resample)
        self.register_buffer("digit_given_colour", log_given(left, 0).T.contiguous())

    def loss(self, model, batch, gen):
        return self.digit_loss(model(batch.x), batch)

    def digit_loss(self, logits, batch):
        if self.resample < 1:
            logits = logits + self.digit_given_colour[batch.colour]
        return F.cross_entropy(logits, batch.y)


class DFR(Baseline):
    """Deep feature reweighting (Kirichenko et al., 2023): plain training, then the last layer anew.

    The layer is fitted from nothing on the features of the training images, where every (digit,
    colour) pair that is there counts the same. Departures: the paper draws as many images of each
    pair from data held out, here all training images are weighted; its L1 penalty, chosen on val,
    is the L2 penalty of `fit_layer`, for which no split was asked. The epochs' scores are those of
    plain training; the net that is kept comes after them.
    """

    wants_colours = True

    def finish(self, model, data):
        z = answers_and_features(model, data)[1]
        mean, scale = z.mean(0), z.std(0) + 1e-6
        y, colour = data.labels.cpu(), data.colors.cpu()
        classes = model.fc.out_features
        count = count_groups(data, classes).cpu()
        weight = len(y) / (count.count_nonzero() * count[y, colour])  # mean 1
        target = F.one_hot(y, classes) * weight[:, None]
        weight, bias = fit_layer((z - mean) / scale, target, classes)
        weight = weight / scale
        with torch.no_grad():
            model.fc.weight.copy_(weight)
            model.fc.bias.copy_(bias - weight @ mean)


class Reverse(torch.autograd.Function):
    """The identity forward; the gradient times -scale backward (Ganin & Lempitsky, 2015)."""

    @staticmethod
    def forward(ctx, z, scale):
        ctx.scale = scale
        return z.view_as(z)

    @staticmethod
    def backward(ctx, grad):
        return -ctx.scale * grad, None


class GRL(Resample):
    """Gradient reversal (Ganin & Lempitsky, 2015): a head names the colour, the features hide it.

    Departures: the head takes three updates, at three times the learning rate, for one of the net;
    the reversal starts after a fifth of the training and grows linearly to --gamma, since features
    that know no digit yet are easily silenced for good. In training the digit nearly gives the
    colour away, so features that hide the colour would have to hide the digit. Hence both heads are
    asked for what the other label does not tell: log p(digit given colour) and log p(colour given
    digit) are added to their logits. For the digit that is `biasbal`; --no-conditional drops both.
    """

    updates = lr_scale = 3

    def __init__(self, model, splits, args):
        super().__init__(model, splits, args)
        count = self.count if args.conditional else torch.ones_like(self.count)
        self.register_buffer("digit_given_colour", log_given(count, 0).T.contiguous())
        self.register_buffer("colour_given_digit", log_given(count, 1))
        self.head = nn.Sequential(
            nn.Linear(model.fc.in_features, 64), nn.ReLU(), nn.Linear(64, model.fc.out_features)
        )
        self.val = splits["val"]

    def facts(self, model):
        """How often the head, blind or not, names the colour of an image of val that conflicts."""
        y, colour = self.val.labels, self.val.colors
        if colour is None:
            return {}
        features = answers_and_features(model, self.val)[1].to(y.device)
        named = self.head(features).argmax(1)
        return {"head_colour": mean_of((named == colour)[colour != y])}

    def step(self, model, batch, optimiser, gen):
        with InputOf(model.fc) as features:
            loss = self.loss(model, batch, gen)
        seen = features.seen[0][: len(batch.y)]  # `combined` shows recoloured copies behind these
        for _ in range(self.updates - 1):  # the net has no gradient here, so it stays as it is
            update(optimiser, self.colour_loss(seen.detach(), batch), batch.weight)
        gamma = self.args.gamma * max(0, (batch.progress - 0.2) / 0.8)
        reversed_loss = self.colour_loss(Reverse.apply(seen, gamma), batch)
        update(optimiser, loss + reversed_loss, batch.weight)
        return loss.detach()

    def colour_loss(self, features, batch):
        logits = self.head(features) + self.colour_given_digit[batch.y]
        return F.cross_entropy(logits, batch.colour)


class Combined(GRL):
    """Both cures: the loss of jitter, and both losses of gradient reversal on the images."""

    knows = "the kind of bias"

    def loss(self, model, batch, gen):
        recoloured = JITTERS[self.args.jitter](batch.x, self.args.grain, gen)
        image, copy = model(torch.cat([batch.x, recoloured])).chunk(2)
        return jitter_loss(image, copy, batch, self.args) + self.digit_loss(image, batch)


class LNTL(Method):
    """Learning Not to Learn (Kim et al., 2019): heads guess pixel colours, the features hide them.

    (i) Digit cross-entropy and --entropy times the negative entropy of the guesses, with the heads
    frozen; (ii) the heads' cross-entropy, whose gradient enters the features times -gamma. A colour
    is cut into 8 bins a channel; where a feature sees black only, it is ignored. Departures: one
    update for both; AdamW at the rate of every row, three times that for the heads, instead of SGD;
    the reversal grows linearly from 0 to --gamma; the heads see one feature at a time, 4,096 of a
    batch at most, normalised so that these cannot hide by shrinking; their loss is a mean over the
    channels, not a sum; the colour is the lightest in a feature's view, where the paper takes one
    pixel of it.

    The defaults are the paper's weights. In our nets it is the entropy that unlearns colour, at
    --entropy 20, and it takes --model saturatedcnn: what one convolution and ReLU say grows with
    the colour, so they can only hide it together with the stroke.
    """

    knows = "the kind of bias"
    lr_scale = 3
    bins = 8
    most = 4_096  # features of a batch that the heads see, drawn anew every step

    def __init__(self, model, splits, args):
        super().__init__(model, splits, args)
        if not hasattr(model, "conv2"):
            die("--method lntl needs a net with feature maps", "choose --model simplecnn")
        channels = model.conv2.in_channels
        self.register_buffer("tally", torch.zeros(2), persistent=False)  # right, seen
        self.head = nn.Sequential(
            nn.BatchNorm1d(channels, affine=False, track_running_stats=False),
            nn.Linear(channels, 64),
            nn.ReLU(),
            nn.Linear(64, 3 * self.bins),
        )

    def step(self, model, batch, optimiser, gen):
        with InputOf(model.conv2) as early:
            loss = F.cross_entropy(model(batch.x), batch.y)
        colour, seen = self.colour(batch.x, gen)
        if len(seen) < 2:
            return update(optimiser, loss)  # nothing but black
        features = self.pixels(early.seen[0], seen)
        frozen = {name: p.detach() for name, p in self.head.named_parameters()}
        guesses = torch.func.functional_call(self.head, frozen, features).reshape(-1, self.bins)
        minus_entropy = (guesses.softmax(1) * guesses.log_softmax(1)).sum(1).mean()
        hiding = loss + self.args.entropy * minus_entropy
        reversed_features = Reverse.apply(features, self.args.gamma * batch.progress)
        guesses = self.head(reversed_features).reshape(-1, self.bins)  # (3P,bins)
        update(optimiser, hiding + F.cross_entropy(guesses, colour))
        right = (guesses.argmax(1) == colour).sum()
        self.tally += torch.stack([right, colour.new_tensor(colour.numel())])
        return loss.detach()

    def facts(self, model):
        """How often the heads named a pixel's red, green or blue bin in this epoch."""
        right, seen = self.tally.tolist()
        self.tally.zero_()
        return {"head_colour": right / max(seen, 1)}

    def pixels(self, maps, seen):
        """Rows (P,C) of maps (B,C,h,w) for the places that are `seen`, int64 (P,)."""
        return maps.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, seen)

    def colour(self, x, gen):
        """Bins int64 (3P,), red, green, blue, of what each seen feature sees; which these are (P,).

        The lightest value of the window, where that is not black. A feature sees 4x4 pixels, the
        next one two further on; with less, the rim of a stroke would go unguarded.
        """
        small = F.max_pool2d(x, 4, stride=2, padding=1)
        seen = (small.amax(1) > 0).flatten().nonzero()[:, 0]
        if len(seen) > self.most:
            some = torch.randperm(len(seen), generator=gen, device=seen.device)[: self.most]
            seen = seen[some]
        bins = (self.pixels(small, seen) * self.bins).long().clamp(max=self.bins - 1)
        return bins.flatten(), seen


class GroupDRO(Method):
    """Group DRO (Sagawa et al., 2020): the groups with the highest loss weigh most.

    As in the paper, every group (digit, colour) is equally likely in a batch, and the groups'
    weights follow their losses by exponentiated gradient ascent. Departure: images are drawn with
    replacement.
    """

    wants_colours, resample = True, 1.0
    ascent = 0.01  # step of the weights

    def __init__(self, model, splits, args):
        super().__init__(model, splits, args)
        self.classes = model.fc.out_features
        present = count_groups(splits["train"], self.classes).count_nonzero()
        self.register_buffer("weight", torch.ones(self.classes**2) / present)

    def loss(self, model, batch, gen):
        group = batch.y * self.classes + batch.colour
        loss = F.cross_entropy(model(batch.x), batch.y, reduction="none")
        size = torch.zeros_like(self.weight).index_add_(0, group, torch.ones_like(loss))
        mean = torch.zeros_like(self.weight).index_add(0, group, loss) / size.clamp(min=1)
        with torch.no_grad():
            self.weight *= (self.ascent * mean).exp()
            self.weight /= self.weight.sum()
        return (self.weight * mean).sum()


class IRM(Method):
    """Invariant risk minimisation, IRMv1 (Arjovsky et al., 2019).

    The mean risk of the environments, and --penalty times the mean square of each risk's slope by a
    scale of its logits, which is zero where no scale would do better. For the first --anneal of the
    training the weight is 1; later the sum is divided by it, and --l2 adds all squared weights, as
    in the authors' code. Departure: one logit a class, where theirs has one in all.

    An environment is the key `env` of the training split, or, with --infer-groups, whether a first
    net's answer is the label (Creager et al., 2021, in its simplest form).
    """

    knows = "the environments"

    def __init__(self, model, splits, args):
        super().__init__(model, splits, args)
        data = splits["train"]
        env = (data.colors == data.labels).long() if infers_groups(args) else data.env
        if env is None:
            hint = "make_data.py --recipe irm has them; or let --infer-groups name them"
            die(f"{args.dir}/train.pt has no environments (env)", hint)
        self.register_buffer("env", env)

    def loss(self, model, batch, gen):
        logits, env = model(batch.x), self.env[batch.index]
        parts = [env == e for e in env.unique()]
        risks = torch.stack([F.cross_entropy(logits[part], batch.y[part]) for part in parts])
        weight = self.args.penalty if batch.progress >= self.args.anneal else 1.0
        squares = sum(w.square().sum() for w in model.parameters())
        varies = self.varies(risks, [(logits[part], batch.y[part]) for part in parts])
        return (risks.mean() + self.args.l2 * squares + weight * varies) / max(weight, 1.0)

    def varies(self, risks, parts):
        """The penalty; the slope of cross-entropy by the scale of its logits has a closed form."""
        slopes = [((z.softmax(1) - F.one_hot(y, z.shape[1])) * z).sum(1).mean() for z, y in parts]
        return torch.stack(slopes).square().mean()


class VREx(IRM):
    """Risk extrapolation (Krueger et al., 2021): the penalty is the variance of the risks."""

    def varies(self, risks, parts):
        return risks.var(unbiased=False)


class LfF(Method):
    """Learning from Failure (Nam et al., 2020): what a biased net finds hard counts more.

    The biased net minimises generalised cross-entropy, which amplifies what is easy; each image
    then weighs loss_biased / (loss_biased + loss), both running means per image, scaled by the
    largest of its class.
    """

    def __init__(self, model, splits, args):
        super().__init__(model, splits, args)
        data = splits["train"]
        self.classes, self.labels = model.fc.out_features, data.labels
        self.biased = fresh_net(args, data)
        self.register_buffer("running", torch.zeros(2, len(data.labels)))  # of both nets' losses

    def loss(self, model, batch, gen):
        biased = self.biased(batch.x)
        losses = [F.cross_entropy(z, batch.y, reduction="none") for z in (biased, model(batch.x))]
        weight = self.difficulty(torch.stack(losses), batch)
        return (weight * losses[1]).mean() + generalised_cross_entropy(biased, batch.y)

    @torch.no_grad()
    def difficulty(self, losses, batch):
        """Weights (B,) in [0, 1] from the losses (2,B) of the biased net and the cured one."""
        old = self.running[:, batch.index]
        now = torch.where(old == 0, losses, 0.7 * old + 0.3 * losses)
        self.running[:, batch.index] = now
        largest = torch.zeros(2, self.classes, device=now.device)
        largest.scatter_reduce_(1, self.labels.expand(2, -1), self.running, "amax")
        biased, cured = now / largest[:, batch.y].clamp(min=1e-8)
        return biased / (biased + cured + 1e-8)


class JTT(Method):
    """Just Train Twice (Liu et al., 2021): what a first net gets wrong counts 20 times.

    The first net takes --first-epochs of plain training before the budget of the second begins.
    Departure: images are weighted in the loss, normalised within each batch, where the paper
    repeats them in the data set.
    """

    upweight = 20.0

    def __init__(self, model, splits, args):
        super().__init__(model, splits, args)
        first = train_plain(splits, args, epochs=args.first_epochs, seed=args.seed + 1)
        data = splits["train"]
        wrong = predict(first, data.images).argmax(1) != data.labels
        self.register_buffer("weight", torch.where(wrong, self.upweight, 1.0))

    def loss(self, model, batch, gen):
        weight = self.weight[batch.index]
        losses = F.cross_entropy(model(batch.x), batch.y, reduction="none")
        return (weight * losses).sum() / weight.sum()


def train_plain(splits, args, **changes):
    """Another net, trained by plain ERM with the settings of this run but for `changes`."""
    own = argparse.Namespace(**{**vars(args), "crop": 0, "balance": False, **changes})
    net = fresh_net(own, splits["train"]).to(splits["train"].labels.device)
    train(net, Baseline(net, splits, own), splits, own)
    return net


# ---- told nothing: a first net, read early, names the shortcut


def first_answers(data, seed, resample=0.0):
    """(what a first net answers to every training image, int64 (N,); the epochs that it took).

    Early in training it answers by the shortcut, if that is easier than the label (Yang et al.,
    2024); generalised cross-entropy amplifies this (Nam et al., 2020). It is the same net whatever
    the second one is. One epoch is enough where every class is read at least nine tenths as well as
    the best one, which takes no colour label to see: a net stuck on some classes is what fails. It
    gets another epoch, five at most.
    """
    args = argparse.Namespace(seed=seed, lr=1e-3, epochs=5, batch=128)
    with torch.random.fork_rng(devices=[]):  # the second net's weights do not depend on it
        torch.manual_seed(seed)
        net = build_model("simplecnn", 16, **shape_of(data)).to(data.labels.device)
    method = GCE(net, {"train": data}, args)
    method.resample = resample
    optimiser = make_optimiser(net, method, args.lr)
    state = {"model": net, "method": method, "optimiser": optimiser}
    state["schedule"] = make_schedule(optimiser, "constant", 1)
    sizes = batch_sizes(len(data.labels), args.batch, "simplecnn")
    for epoch in range(1, args.epochs + 1):
        train_epoch(epoch, sizes, data, state, args)
        answers = predict(net, data.images).argmax(1)
        right = {int(k): mean_of((answers == k)[data.labels == k]) for k in data.labels.unique()}
        worst, best = min(right, key=right.get), max(right, key=right.get)
        words = f"right on {right[worst]:.3f} of class {worst} and on {right[best]:.3f} of {best}"
        progress("")
        print(f"first net, epoch {epoch}: {words}", flush=True)
        if right[worst] >= 0.9 * right[best]:
            return answers, epoch
    hint = "give it more images, or leave --infer-groups out where colours are known"
    die(f"after {args.epochs} epochs the first net is {words}", hint)


def infer_groups(data, seed, rounds=1):
    """(training split whose colours are a first net's answers, how good these are).

    A biased net's answer stands for the spurious label (Zhang et al., 2022). True colours, where
    there are any, measure it and nothing else.
    """
    answers, epochs = first_answers(data, seed + 1)
    facts = {"epochs": epochs, "equal_label": mean_of(answers == data.labels)}
    if data.colors is not None:
        named, against = answers == data.colors, data.colors != data.labels
        facts["equal_colour"] = mean_of(named)
        facts["equal_colour_conflicting"] = mean_of(named[against])
    words = [f"{key} {value:.4g}" for key, value in facts.items() if value is not None]
    print("its answers stand for colours:", *words, flush=True)
    for k in range(1, rounds):  # to a net balanced by the shortcuts found, the next is the easiest
        known = data._replace(colors=answers)
        more, epochs = first_answers(known, seed + 1 + k, resample=1.0)
        answers = answers * shape_of(data)["classes"] + more
        facts[f"round_{k + 1}"] = {"epochs": epochs, "equal_label": mean_of(more == data.labels)}
        if data.second is not None:
            named = (more == data.second)[data.second != data.labels]
            facts[f"round_{k + 1}"]["equal_second_conflicting"] = mean_of(named)
    return data._replace(colors=answers), facts


# ---- adversarial training


def augment(x, soft, crop, gen):
    """The recipe of a student project, one draw per image; `soft` are labels (B,classes).

    Shifted by up to `crop` pixels, mirrored, turned by up to 10 degrees, recoloured, cut out and
    mixed. Beside these, labels are smoothed by 0.1, and gradients clipped to a norm of 1.
    """
    x = moved(x, crop, gen, degrees=10, flip=True)
    x = cutout(hsv(x, None, gen), 8, gen)
    return mixup(x, soft, 0.2, gen)


def cutout(x, side, gen):
    """A black square at a random place, cut off by the image's edge (DeVries & Taylor, 2017)."""
    inside = []
    for length in x.shape[2:]:
        middle = torch.rand(len(x), 1, generator=gen, device=x.device) * length
        first = middle.floor() - side // 2
        place = torch.arange(length, device=x.device)
        inside.append((place >= first) & (place < first + side))
    return x.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)


def mixup(x, soft, alpha, gen):
    """Mixtures of pairs, images and labels alike, weights ~ Beta(alpha) (Zhang et al., 2018)."""
    seed = int(torch.randint(2**31, (), generator=gen, device=x.device))
    beta = np.random.default_rng(seed).beta(alpha, alpha, len(x)).astype(np.float32)
    weight = torch.from_numpy(beta).to(x)[:, None]  # (B,1)
    other = torch.randperm(len(x), generator=gen, device=x.device)
    mixed = weight[..., None, None] * x + (1 - weight[..., None, None]) * x[other]
    return mixed, weight * soft + (1 - weight) * soft[other]


def pgd(model, x, y, eps, steps, step_size, gen, loss=F.cross_entropy, start=None):
    """Projected gradient ascent in the L-inf ball (Madry et al., 2018), steps of a fixed size.

    x (B,3,H,W) in [0, 1]; y whatever loss(logits, y) takes; eps and step_size in pixel units; from
    `start` or anywhere in the ball. No gradient builds up; train/eval mode stays as it was found.
    """
    training = model.training
    model.eval()
    if start is None:
        start = x + eps * (2 * torch.rand(x.shape, generator=gen, device=gen.device).to(x) - 1)
    low, high = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
    z = start.clamp(low, high).contiguous(memory_format=torch.channels_last)
    for _ in range(steps):
        (grad,) = torch.autograd.grad(loss(model(z.requires_grad_()), y), z)
        z = (z.detach() + step_size * grad.sign_()).clamp(low, high)
    model.train(training)
    return z.detach()


class AT(Method):
    """Adversarial training: --clean-epochs of plain training, then every batch is attacked first.

    --attack pgd is Madry et al. (2018); fgsm is one step from a random start, of 1.25 eps or
    --step-size (Wong et al., 2020); --beta is TRADES (Zhang et al., 2019): cross-entropy on the
    image, and beta times the KL divergence from its prediction to that for the image attacked to
    enlarge it. A mixed batch is attacked with the mixed loss. The radius grows linearly over the
    first --eps-ramp of the adversarial epochs. PGD accuracy on val chooses the epoch, since
    one-step training can lose all robustness from one epoch to the next. With --generator, a share
    of every attacked batch is generated for the labels at hand (after Gowal et al., 2021).
    """

    can_shard = True
    watched = 500  # images of val that are attacked after every epoch
    smoothing = 0.0  # of the labels

    def __init__(self, model, splits, args):
        super().__init__(model, splits, args)
        self.classes, self.val = model.fc.out_features, splits["val"]
        self.student = args.augment == "student"
        if self.student:  # its recipe shifts and turns at once
            self.smoothing, self.clip, self.crop = 0.1, 1.0, 0
        self.source = None
        if getattr(args, "generator", None):  # robgan has one of its own
            self.source = load_generator(args.dir, args.generator, splits["train"])

    def loss(self, model, batch, gen):
        args, eps = self.args, self.radius(batch)
        if self.source is not None and eps > 0:
            n = round(args.generated * len(batch.y))
            made = self.source.draw(batch.y[:n], gen)
            batch = batch._replace(x=torch.cat([made, batch.x[n:]]))
        x, soft = batch.x, F.one_hot(batch.y, self.classes).to(batch.x.dtype)
        if self.student:
            x, soft = augment(x, soft, args.crop, gen)
        if eps == 0:
            return self.cross_entropy(model(x), soft)
        steps, size = (1, 1.25) if args.attack == "fgsm" else (args.steps, 0.35)
        size = size * eps if args.step_size is None else args.step_size * eps / args.eps
        if args.beta == 0:
            x = pgd(model, x, soft, eps, steps, size, gen, self.cross_entropy)
            return self.cross_entropy(model(x), soft)
        model.eval()  # as the attack sees it
        with torch.no_grad():
            image = model(x)
        model.train()
        near = x + 0.001 * torch.randn(x.shape, generator=gen, device=gen.device)
        x_adv = pgd(model, x, image, eps, steps, size, gen, away_from, near)
        image, attacked = model(torch.cat([x, x_adv])).chunk(2)
        return self.cross_entropy(image, soft) + args.beta * kl(image, attacked)

    def cross_entropy(self, logits, soft):
        return F.cross_entropy(logits, soft, label_smoothing=self.smoothing)

    def radius(self, batch):
        """L-inf radius for this batch, 0 while the training is clean."""
        args = self.args
        if batch.epoch <= args.clean_epochs:
            return 0
        past = batch.progress * args.epochs - args.clean_epochs  # adversarial epochs so far
        share = past / (args.epochs - args.clean_epochs)
        return args.eps * min(1, max(share, 1e-3) / max(args.eps_ramp, 1e-3))

    def facts(self, model):
        """Accuracy on val under PGD at the full radius, the same random starts every epoch."""
        x, y = self.val.x(slice(self.watched)), self.val.labels[: self.watched]
        gen, eps = stream(self.args.seed, "attack on val", x.device), self.args.eps
        x_adv = pgd(model, x, y, eps, 10, eps / 4, gen)
        return {"val_pgd": mean_of(predict(model, x_adv).argmax(1) == y)}

    def phase(self, epoch):
        return ("clean", None) if epoch <= self.args.clean_epochs else ("", "val_pgd")


def away_from(logits, image):
    """TRADES' attack: how far the prediction has moved from that for the image itself."""
    return kl(image, logits)


# ---- Rob-GAN: a generator beside adversarial training


class Generator(nn.Module):
    """Pictures (B,3,H,W) in [0, 1] from latents (B,latent) and classes (B,); grey has 1 channel."""

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


def load_generator(folder, name, data):
    """The averaged generator that a robgan run of this world has saved; it learns nothing more."""
    about = load_model(folder, name)[1]
    kept = about.get("generator")
    if kept is None:
        hint = f"train one: python train.py --dir {folder} --method robgan"
        die(f"{name} holds no generator", hint)
    check_fit(f"--generator {name}", about, data, folder)
    generator = Generator(about["classes"], about["size"], len(kept["grow.6.weight"]))
    generator.load_state_dict({key: value.float() for key, value in kept.items()})
    return generator.to(data.images.device).eval().requires_grad_(False)


class RobGAN(AT):
    """Rob-GAN (Liu & Hsieh, 2019): the net trained adversarially is also a discriminator's body.

    After --clean-epochs, every step attacks a batch and learns its classes as `at` does, compares
    as many generated images with the real ones, and updates the generator once. The paper's last
    phase, in which the net learns attacked generated images as well, is `at` with --generator.

    Departures, which prevent the collapse to grey or to one image per class: a head of the
    discriminator's own compares real with generated of the same class (relativistic loss, gradient
    penalties R1 + R2; Huang et al., 2024), reads the last feature map and not a mean of it, and
    sees neither side attacked; the generator is asked to look real for its class (projection;
    Miyato & Koyama, 2018), not to be classified well; no batch norm in the discriminator. Samples
    come from averaged weights of the generator.
    """

    can_shard = False
    betas = (0.0, 0.99)  # of the generator and the discriminator's own head
    decay = 0.998  # of the averaged weights
    penalty = 0.1  # weight of R1 + R2; with 1 the discriminator lost track of the classes

    def __init__(self, model, splits, args):
        super().__init__(model, splits, args)
        load_judge(args, splits)  # it complains before the training, not after it
        if args.model.startswith("resnet"):
            hint = "choose simplecnn or saturatedcnn"
            die("--method robgan: batch norm shows a discriminator which batch is generated", hint)
        images = splits["train"].images
        grey = (images[:2000] == images[:2000, :1]).all()
        self.generator = Generator(**shape_of(splits["train"]), channels=1 if grey else 3)
        self.average = copy.deepcopy(self.generator).requires_grad_(False).eval()
        self.head = nn.Sequential(nn.Linear(model.fc.in_features, 128), nn.LeakyReLU(0.2))
        self.real, self.belongs = nn.Linear(128, 1), nn.Embedding(self.classes, 128)
        self.register_buffer("tally", torch.zeros(3), persistent=False)  # losses D, G; steps
        self.register_buffer("steps", torch.zeros(()))

    def step(self, model, batch, optimiser, gen):
        if self.radius(batch) == 0:
            return super().step(model, batch, optimiser, gen)
        learned = self.loss(model, batch, gen)
        with torch.no_grad():
            fake = self.generator.draw(batch.y, gen)
        against = self.discriminator_loss(model, batch.x, fake, batch.y)
        update(optimiser, learned + against, clip=self.clip)
        fake = self.generator.draw(batch.y, gen)
        towards = self.generator_loss(model, batch.x, fake, batch.y)
        update(optimiser, towards, only=list(self.generator.parameters()))
        self.follow()
        losses = [against.detach(), towards.detach(), torch.ones_like(against)]
        self.tally += torch.stack(losses)
        return learned.detach()

    def discriminator_loss(self, model, real, fake, y):
        """Real should look more real than generated; R1 + R2, half of each, are one mean of 2B."""
        x = torch.cat([real, fake]).requires_grad_()
        scores = self.score(model, x, y.repeat(2))
        (slope,) = torch.autograd.grad(scores.sum(), x, create_graph=True)
        real, fake = scores.chunk(2)
        smooth = slope.square().sum((1, 2, 3)).mean()
        return F.softplus(fake - real).mean() + self.penalty * smooth

    def generator_loss(self, model, real, fake, y):
        """Generated should look more real than real."""
        fake = self.score(model, fake, y)
        with torch.no_grad():
            real = self.score(model, real, y)
        return F.softplus(real - fake).mean()

    def score(self, model, x, y):
        """How real x (B,3,H,W) looks for class y (B,): float (B,)."""
        with InputOf(model.fc) as features:
            model(x)
        h = self.head(features.seen[0])
        return self.real(h)[:, 0] + (self.belongs(y) * h).sum(1)

    @torch.no_grad()
    def follow(self):
        """The averaged generator moves a little towards the present one."""
        self.steps += 1
        share = 1 - min(self.decay, self.steps.item() / (self.steps.item() + 10))
        now, average = self.generator, self.average
        for slow, fast in zip(average.parameters(), now.parameters(), strict=True):
            slow.lerp_(fast, share)
        for slow, fast in zip(average.buffers(), now.buffers(), strict=True):
            slow.copy_(fast)

    def facts(self, model):
        """AT's, and both losses."""
        against, towards, steps = self.tally.tolist()
        self.tally.zero_()
        losses = {"loss_d": against / steps, "loss_g": towards / steps} if steps else {}
        return {**super().facts(model), **losses}

    def draws(self):
        return self.average


# ---- the table of methods, those that are told least first

METHODS = {
    "baseline": Baseline,
    "gce": GCE,
    "lff": LfF,
    "jtt": JTT,
    "at": AT,
    "robgan": RobGAN,
    "jitter": Jitter,
    "lntl": LNTL,
    "grl": GRL,
    "combined": Combined,
    "biasbal": Resample,
    "balance": Resample,
    "dfr": DFR,
    "groupdro": GroupDRO,
    "irm": IRM,
    "vrex": VREx,
}
OURS = tuple(METHODS)  # a FILE.py of one's own adds another


# ---- scoring


def save_results(model, method, splits, args, epochs, kept, facts):
    """NAME.pt and NAME.json of each phase of which weights were kept; then the answer in words."""
    facts["run"] = {
        "torch": torch.__version__,
        "threads": args.threads,
        "processes": PROCESSES,
        "device": str(splits["train"].labels.device),
    }
    for phase, best in kept.items():
        model.load_state_dict(best.weights)
        method.finish(model, splits["train"])
        name = phase_name(args.name, phase)
        flags = {**settings(args), "phase": phase} if phase else settings(args)
        record = {
            "schema": 1,
            "script": "train.py",
            "name": name,
            "args": flags,
            "world": world_of(args.dir),
            "params": sum(p.numel() for p in model.parameters()),
            "selected_on": best.on,
            "selected_epoch": best.epoch,
            **evaluate(model, splits),
            "epochs": epochs,
            **facts,
        }
        if "val_pgd" in epochs[best.epoch - 1]:
            record["val_pgd"] = epochs[best.epoch - 1]["val_pgd"]
        weights = copy_of(model.state_dict())
        checkpoint = {"script": "train.py", "weights": weights, "args": flags}
        checkpoint |= {"trained": record["trained"], **shape_of(splits["train"])}
        if method.draws() is not None and not phase:
            record["generator"], more = score_generator(method.draws(), model, splits, args)
            checkpoint |= more
        save_pt(checkpoint, args.dir / f"{name}.pt")
        save_json(record, args.dir / f"{name}.json")
        print_scores(record)
    (args.dir / f"{args.name}.part.pt").unlink(missing_ok=True)


def phase_name(name, phase):
    """The name of what a phase of the training leaves: at_clean_s42 of at_s42."""
    return re.sub(r"_s\d+$", rf"_{phase}\g<0>", name) if phase else name


def print_scores(record):
    """The answer in plain words."""
    print(f"{record['name']}, share of images that it reads correctly:")
    for split, s in record["final"].items():
        print(f"  {split:13s} {s['acc']:.3f} of {s['n']:,}, worst digit {s['worst_digit']:.3f}")
    follows, probes = record["final"]["test_hard"]["follows_colour"], record["probe"]
    if None not in (follows, probes["colour"]):
        print(f"  on test_hard it names the colour's digit {follows:.1%} of the time; from its")
        print(f"  features a linear probe reads the colour with {probes['colour']:.3f}", end="")
        print(f", the digit with {probes['digit']:.3f}")


def knows(args):
    """What a training is told about the bias, in the words of the tables."""
    path = args.dir / "meta.json"
    meta = load_json(path, "run make_data.py") if path.exists() else {}
    shares = meta.get("own_colour_share", {}).get("train", [])
    if shares and meta.get("script") == "make_data.py":
        chance, n = 1 / len(meta.get("palette") or shares), meta["counts"]["train"]
        share = fmean(s for s in shares if s is not None)
        if abs(share - chance) < 4 * math.sqrt(chance * (1 - chance) / n):
            return "no bias in training"
    if uses_colours(args) and not infers_groups(args):
        return "colour labels"
    if getattr(args, "rounds", 1) > 1:
        return "how many shortcuts"
    told = METHODS[args.method].knows
    if infers_groups(args) and told == "the environments":
        return "nothing"
    return "the kind of bias" if args.grayscale and told == "nothing" else told


def evaluate(model, splits):
    """What a run's JSON says of the model: scores of every split, linear probes."""
    final = {}
    for name in EVAL_SPLITS:  # test_unbiased is the last
        said, z = answers_and_features(model, splits[name])
        final[name] = score(said, splits[name])
    last = splits["test_unbiased"]
    if last.colors is not None:
        final["test_unbiased"]["by_group"] = accuracy_by_group(said, last)
    probes = probe(z, last)
    return {"final": final, "probe": probes, "trained": trained(final["val"])}


def trained(val):
    """Has a net learned something?

    Not if it is right on less of val than guessing and a tenth, or if nine answers in ten are one.
    """
    answers = [sum(column) for column in zip(*val["confusion"], strict=True)]
    learned = val["acc"] >= 1 / len(answers) + 0.1
    return learned and max(answers) <= 0.9 * sum(answers)


def epoch_scores(model, splits):
    """What an epoch's record says of val, whole and by group, and of test_hard."""
    val, hard = (
        score(predict(model, splits[name].images).argmax(1), splits[name])
        for name in ("val", "test_hard")
    )
    return {
        "val": val["acc"],
        "val_aligned": val["aligned"],
        "val_conflicting": val["conflicting"],
        "test_hard": hard["acc"],
        "follows": hard["follows_colour"],
    }


def mean_of(hits):
    """Their share, None of nothing."""
    return hits.double().mean().item() if len(hits) else None


def score(predicted, split):
    """Every accuracy of one split, a fraction beside its n; what needs colours is None without."""
    y, predicted = split.labels.cpu(), predicted.cpu()
    classes = int(max(y.max(), predicted.max())) + 1
    right = predicted == y
    confusion = torch.bincount(y * classes + predicted, minlength=classes**2).view(classes, classes)
    per_digit = [mean_of(right[y == d]) for d in range(classes)]
    record = {
        "acc": mean_of(right),
        "n": len(y),
        "per_digit": per_digit,
        "worst_digit": min(a for a in per_digit if a is not None),
        "confusion": confusion.tolist(),
    }
    if split.second is not None:
        record |= score_second(predicted, right, y, split.colors.cpu(), split.second.cpu())
    return record | score_by_colour(predicted, right, y, split.colors)


def score_second(predicted, right, y, first, second):
    """The scores of a world with two shortcuts: what happens where only one of them conflicts."""
    return {
        "only_first_conflicts": mean_of(right[(first != y) & (second == y)]),
        "only_second_conflicts": mean_of(right[(first == y) & (second != y)]),
        "follows_second": mean_of((predicted == second)[second != y]),
    }


def accuracy_by_group(predicted, split):
    """Share of right answers by [digit][colour], four decimals; None where there is no image."""
    right, classes = predicted.cpu() == split.labels.cpu(), 1 + int(split.labels.max())
    table = []
    for d in range(classes):
        cells = [right[((split.labels == d) & (split.colors == c)).cpu()] for c in range(classes)]
        table.append([round(mean_of(cell), 4) if len(cell) else None for cell in cells])
    return table


def score_by_colour(predicted, right, y, colour):
    """The scores that need the colours (N,) of the images."""
    keys = ("worst_group", "follows_colour", "aligned", "conflicting", "n_conflicting")
    if colour is None:
        return dict.fromkeys(keys)
    colour = colour.cpu()
    against = colour != y
    groups, member = (y * 1000 + colour).unique(return_inverse=True)
    size, hits = member.bincount(), member.bincount(right.double())
    worst = int((hits / size).argmin())
    group = {
        "acc": (hits / size)[worst].item(),
        "n": int(size[worst]),
        "digit": int(groups[worst]) // 1000,
        "colour": int(groups[worst]) % 1000,
    }
    follows = mean_of((predicted == colour)[against])
    both = mean_of(right[~against]), mean_of(right[against])
    return dict(zip(keys, (group, follows, *both, int(against.sum())), strict=True))


def probe(z, split):
    """Accuracy of linear classifiers for colour and digit on features (Alain & Bengio, 2017).

    Logistic regression on standardised features, fitted on the even images of the split, scored on
    the odd ones. Chance is 0.1 where every colour is equally likely. z float (N,F).
    """
    z = (z - z[::2].mean(0)) / (z[::2].std(0) + 1e-6)
    fit, test = z[::2].contiguous(), z[1::2].contiguous()
    result = {"n_fit": len(fit), "n": len(test), "colour": None, "digit": None}
    for name, target in (("colour", split.colors), ("digit", split.labels)):
        if target is not None:
            y = target.cpu()
            weight, bias = fit_layer(fit, y[::2], int(y.max()) + 1)
            result[name] = mean_of(F.linear(test, weight, bias).argmax(1) == y[1::2])
    return result


def fit_layer(z, y, classes, l2=1e-3):
    """(weight (classes,F), bias (classes,)) of a softmax regression by L-BFGS; z float (N,F).

    y is int64 (N,), or float (N,classes): how much each image counts, in the column of its label.
    """
    weight = torch.zeros(classes, z.shape[1], requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = F.cross_entropy(F.linear(z, weight, bias), y) + l2 * weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return weight.detach(), bias.detach()


# ---- scoring a generator


def load_judge(args, splits):
    """The classifier that judges pictures; it fits the world and tells images of a class apart."""
    data, test = splits["train"], splits["test_unbiased"].labels
    classes = shape_of(data)["classes"]
    for labels in (data.labels[:2000], data.labels[: len(test)], test):
        if (labels.bincount(minlength=classes) < 4).any():
            die(f"--method robgan needs four images of each class among {len(labels)}", "add some")
    judge, about = load_model(args.dir, args.judge, data.labels.device)
    check_fit(f"--judge {args.judge}", about, data, args.dir)
    few = data.take(slice(2000))
    if not (within_class(answers_and_features(judge, few)[1], few.labels, classes) > 0).all():
        die(f"--judge {args.judge} cannot tell images of a class apart", "train it first")
    return judge


def score_generator(generator, model, splits, args):
    """(what the JSON says of its pictures beside real and collapsed ones, what the .pt keeps)."""
    data, test = splits["train"], splits["test_unbiased"]
    judge, classes = load_judge(args, splits), shape_of(data)["classes"]
    n = min(10_000, len(test.labels), len(data.labels))
    gen, few = stream(args.seed, "samples", data.labels.device), data.take(slice(n))
    sources = {  # n pictures to look at, and as many as there are to train on
        "generated": [sample(generator, split.labels, gen) for split in (few, data)],
        "real": [test.take(slice(n)), data],
        "collapsed": [collapsed(data, classes, split.labels) for split in (few, data)],
    }
    spread = within_class(answers_and_features(judge, few)[1], few.labels, classes)
    measured = {
        name: {
            **compare(some, spread, judge),
            "trained_on": accuracy_when_trained_on(many, name, splits, args),
            "nearest": nearest(some, data),
        }
        for name, (some, many) in sources.items()
    }
    params = sum(p.numel() for p in generator.parameters())
    seen = examples(model, few, sources["generated"][0], classes, args.eps, gen)
    half = copy_of(copy.deepcopy(generator).half().state_dict())
    facts = {"params": params, "n": n, "judge": args.judge, "measured": measured}
    return facts, {"generator": half, **seen}


@torch.no_grad()
def sample(generator, y, gen):
    """A Split of generated pictures, one for each class of y (N,)."""
    parts = [generator.draw(part, gen).mul(255).round_().byte() for part in y.split(1000)]
    images = torch.cat(parts).contiguous(memory_format=torch.channels_last)
    return Split(images, y, None, None)


def examples(model, real, generated, classes, eps, gen):
    """Four pictures a class, real, generated and attacked, and the net's answers to each."""
    few = torch.cat([(real.labels == k).nonzero()[:4, 0] for k in range(classes)])
    x, y = generated.x(few), real.labels[few]
    attacked = pgd(model, x, y, eps, 50, eps / 10, gen)
    said = [predict(model, z).argmax(1).tolist() for z in (real.x(few), x, attacked)]
    attacked = attacked.mul(255).round_().byte()
    kinds = {"real": real.images[few], "generated": generated.images[few], "attacked": attacked}
    channels = 1 if (real.images == real.images[:, :1]).all() else 3
    kinds = {name: images[:, :channels].cpu().contiguous() for name, images in kinds.items()}
    return {"shown": kinds, "said": said}


def collapsed(split, classes, labels):
    """A control: one sharp training image per class, whatever the latent."""
    first = torch.stack([(split.labels == k).nonzero()[0, 0] for k in range(classes)])
    return Split(split.images[first[labels]], labels, None, None)


def accuracy_when_trained_on(data, name, splits, args):
    """Accuracy on real images of a classifier trained on `data` (Ravuri & Vinyals, 2019)."""
    print(f"a classifier trained on {name} images only:")
    torch.manual_seed(args.seed + 1)
    budget = {"epochs": 2, "lr": 1e-2, "schedule": "onecycle", "batch": 128, "seed": args.seed + 1}
    net = {"model": "simplecnn", "width": 16}
    net = train_plain({**splits, "train": data}, args, **budget, **net)
    test = splits["test_unbiased"]
    return mean_of(predict(net, test.images).argmax(1) == test.labels)


def within_class(z, labels, classes):
    """Mean distance between two features of a class, float (classes,); z (N,F) on the CPU."""
    pairs = [torch.pdist(z[labels.cpu() == k]) for k in range(classes)]
    return torch.stack([d.mean() if len(d) else d.new_zeros(()) for d in pairs])


def compare(made, spread, judge):
    """What a judge says of pictures; `spread` (classes,): `within_class` of real ones."""
    said, z = answers_and_features(judge, made)
    diversity = (within_class(z, made.labels, len(spread)) / spread).double()
    return {
        "agreement": mean_of(said == made.labels.cpu()),
        "diversity": diversity.mean().item(),
        "diversity_worst": diversity.min().item(),
    }


def nearest(made, train_split, n=2000):
    """Median L2 distance to the nearest training image: are the pictures copies of those?"""
    a, found = made.x(slice(n)).mean(1).flatten(1), []  # (n,HW), pixels in [0, 1]
    for part in chunks(len(train_split.labels), 6000):
        b = train_split.x(part).mean(1).flatten(1)
        found.append(torch.cdist(a, b).amin(1))
    return torch.stack(found).amin(0).median().item()


# ---- the report: above each table and figure of the Markdown stands a query, answered from JSON
#
# <!-- table                                    a figure: <!-- figure KIND, and below it its picture
# rows baseline jitter unbiased/oracle          NAMEs without _sSEED, of this world or WORLD/NAME;
# row balance: told the colours                 one NAME, a label for people; rows * is all of DIR
# from attack_untargeted:models                 FILE:KEY; the rows below are entries of that record
# test_hard = final.test_hard.acc               HEADER = path in the JSON of each seed
# gain = final.test_hard.acc - baseline         difference to another row, over the seeds of both
# 0.999 = flat_999: final.test_unbiased.acc     the row of the same NAME in another world
# cpu seconds = cpu                             of times.csv
# published cmnist                              rows of results/published.json: a cell stands under
# certified = -                                 the header that it has there; - is theirs alone
# title, axis, ylabel                           words of a figure
# -->
# Kinds of figure: epochs (paths in the record of an epoch), matrices (the first column's, of the
# first seed), sweep (a place a column), samples (of a generator).

HOME = ROOT / "results"  # of the write-up
MISSING = object()


class Column(NamedTuple):
    header: str
    world: str  # "" for the row's own
    path: str  # keys of the JSON, joined by dots
    minus: str  # the row that is subtracted, "" for none


class Row(NamedTuple):
    source: str  # FILE:KEY, "" for the runs of train.py
    name: str  # without _sSEED
    label: str


class Query(NamedTuple):
    where: str  # file and line
    rows: list
    columns: list
    words: dict  # published, title, axis: what stands behind the word


def report(args):
    """Answer every query of README.md and DIR/*.md, draw their figures; computes nothing else."""
    folder = args.dir
    worlds = [folder, *(path.parent for path in folder.glob("*/meta.json"))]
    if not any(runs_of(world) for world in worlds):
        die(f"{folder} holds no results of train.py", f"run: python train.py --dir {folder}")
    files = [path for path in sorted(folder.glob("*.md")) if path.name != "tables.md"]
    drawn = []
    if folder.resolve() == HOME:
        files.append(ROOT / "README.md")
    for path in files:
        text = path.read_text(encoding="utf-8")
        filled = TABLE.sub(lambda found, path=path: fill(found, path, folder), text)
        write(path, lambda file, filled=filled: file.write(filled.encode()))
        drawn += draw_figures(path, folder)
    if folder.resolve() != HOME:
        files.append(folder / "tables.md")
        tables, more = tables_of(folder, [ROOT / "README.md", *sorted(HOME.glob("*.md"))])
        write(files[-1], lambda file: file.write(tables.encode()))
        drawn += more
    for path in [*files, *drawn]:
        print(f"wrote {path}")


TABLE = re.compile(r"<!-- table\n(.*?)-->\n.*?<!-- end -->", re.S)
FIGURE = re.compile(r"<!-- figure (\w+)\n(.*?)-->\s*!\[[^\]]*\]\((?:results/)?([^)]+)\)", re.S)


def fill(found, path, folder):
    """A table's place in the text of `path`, with the answer to its query."""
    table = answer(parse(found[1], position(found, path)), folder) or "*no results yet*\n"
    return f"<!-- table\n{found[1]}-->\n\n{table}\n<!-- end -->"


def position(found, path):
    return f"{path.name}, line {found.string.count(chr(10), 0, found.start()) + 1}"


def tables_of(folder, write_up):
    """(the write-up's tables as far as `folder` has their rows, figures drawn)."""
    parts, drawn = [], []
    for path in write_up:
        for found in TABLE.finditer(path.read_text(encoding="utf-8")):
            table = answer(parse(found[1], position(found, path)), folder)
            if table:
                headings = re.findall(r"^#+ (.*)", found.string[: found.start()], re.M)
                parts += [f"## {headings[-1] if headings else path.stem}\n", table]
        drawn += draw_figures(path, folder)
    return "\n".join(parts), drawn


def parse(text, where):
    """The Query of the lines between the marks; `where` names them in complaints."""
    rows, columns, words, source = [], [], {}, ""
    for k, line in enumerate(text.splitlines(), 1):
        word, _, rest = line.partition(" ")
        if word == "from" and re.fullmatch(r"[\w./+-]+:[\w. -]+", rest):
            source = rest
        elif word == "rows":
            rows += [Row(source, name, f"`{name}`") for name in rest.split()]
        elif word == "row" and ": " in rest:
            rows.append(Row(source, *rest.split(": ", 1)))
        elif " = " in line:
            header, path = line.split(" = ", 1)
            world, _, path = path.rpartition(": ")
            path, _, minus = path.partition(" - ")
            columns.append(Column(header, world, path, minus))
        elif word in ("published", "title", "axis", "ylabel") and rest:
            words[word] = rest
        else:
            die(f"{where} + {k}: {line!r} is no line of a query", "train.py says what lines may be")
    return Query(where, rows, columns, words)


# ---- finding records


@functools.cache
def runs_of(folder):
    """{row: {seed: record}} of the runs of train.py on the present painting of a world."""
    world, spent, found = world_of(folder), processor_seconds(folder), {}
    for path in sorted(folder.glob("*.json")):
        record = read(path)
        if record.get("script") != "train.py":
            continue
        if not {"name", "args", "world", "final", "trained"} <= record.keys():
            die(f"{path} is no whole result of train.py", "delete it, or run it again")
        if record["world"] != world:
            what = f"{path} was trained on another painting of {folder}"
            print(f"train.py: {what}, so it is left out", file=sys.stderr)
            continue
        record = record | spent.get(record["name"], {})
        found.setdefault(row_of(record["name"]), {})[record["args"]["seed"]] = record
    return found


def processor_seconds(folder):
    """{NAME: {"cpu": seconds}} of what ran on this machine, each the last time."""
    path = folder / "times.csv"
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {name: {"cpu": float(cpu)} for name, _, cpu in (row.split(",") for row in rows)}


def records(folder, row, source=""):
    """{seed: record} of a row: runs of train.py, or entries of FILE:KEY; {} where there is none."""
    if not source:
        return dict(sorted(runs_of((folder / row).parent).get(Path(row).name, {}).items()))
    file, key = source.split(":")
    path = folder / f"{file}.json"
    entries = dig(read(path), key) if path.exists() else {}
    if not isinstance(entries, dict):
        return {}
    names = {name: re.fullmatch(rf"{re.escape(row)}(?:_s(\d+))?", name) for name in entries}
    return {m[1] and int(m[1]): entries[name] for name, m in names.items() if m}


@functools.cache
def read(path):
    return load_json(path, "delete it, or run it again")


def dig(record, path):
    """record[key][key]... of 'key.key...', of a list by position; MISSING where it is not."""
    for key in path.split("."):
        if record is None:  # what needs colours, without them
            return None
        if isinstance(record, list):
            record = {str(i): value for i, value in enumerate(record)}
        if not isinstance(record, dict) or key not in record:
            return MISSING
        record = record[key]
    return record


def found_rows(query, folder):
    """[(Row, {seed: record})] of the rows that are there; one that is nowhere is a mistake."""
    found = []
    for row in query.rows:
        if row.name == "*":
            found += [(Row("", name, f"`{name}`"), records(folder, name)) for name in every(folder)]
            continue
        mine = records(folder, row.name, row.source)
        cells = [runs_at(at, row, column) for at in (folder, HOME) for column in query.columns]
        if not any([mine, records(HOME, row.name, row.source), *cells]):
            of = f" of {row.source}" if row.source else ""
            hint = "correct its name (without _sSEED), or run it"
            die(f"{query.where}: no result is a row {row.name}{of}", hint)
        found.append((row, mine))
    return found


def every(folder):
    """The rows of a world, by method as METHODS has them, then by name."""
    methods = {
        row: next(iter(seeds.values()))["args"]["method"] for row, seeds in runs_of(folder).items()
    }
    place = {method: i for i, method in enumerate(METHODS)}
    return sorted(methods, key=lambda row: (place.get(methods[row], len(place)), row))


def runs_at(folder, row, column):
    """{seed: record} that a cell reads: of its row, or of that NAME in the column's world."""
    if column.world:
        return records(folder, f"{column.world}/{Path(row.name).name}")
    return records(folder, row.name, row.source)


def values_of(column, row, folder):
    """(the runs, {seed: value}) of one cell, MISSING where a record has no such key."""
    mine = runs_at(folder, row, column)
    values = {seed: dig(record, column.path) for seed, record in mine.items()}
    if not column.minus:
        return mine, values
    others = runs_at(folder, row._replace(name=column.minus), column)
    gains = {
        seed: MISSING if value is MISSING else plain(value) - plain(dig(others[seed], column.path))
        for seed, value in values.items()
        if seed in others and mine[seed].get("trained", True) and others[seed].get("trained", True)
    }
    return mine, gains


# ---- cells and tables


def answer(query, folder):
    """The Markdown table of a query, None where no row has results."""
    body, seen = [], set()
    rows = found_rows(query, folder)
    for row, mine in rows:
        cells = []
        for column in query.columns:
            runs, values = values_of(column, row, folder)
            values = [value for value in values.values() if value is not MISSING]
            if any(not is_cell(value) for value in values):
                die(f"{query.where}: {column.path} is no number", "add the key that holds one")
            seen |= {column} if values else set()
            cell = signed(values) if column.minus else shown(values)
            cells.append(cell + (did_not_train(runs) if column.world else ""))
        if set(cells) - {"-"}:
            body.append([row.label + did_not_train(mine), *cells])
    for column in query.columns:
        if column not in seen and column.path not in ("-", "cpu"):
            refuse_misspelt(column, query)
    if not body:
        return None
    header = ["", *(column.header for column in query.columns)]
    table = [header, ["---"] * len(header), *body]
    for theirs in published(query):
        cells = theirs | theirs["cells"]  # each stands under the header that it has there
        table.append([cite(theirs), *(shown([cells.get(c.header)]) for c in query.columns)])
    return "".join("| " + " | ".join(line) + " |\n" for line in table)


def refuse_misspelt(column, query):
    """A column without a value here must have one in the write-up's own folder."""
    for row in query.rows:
        if column.minus and not runs_at(HOME, row._replace(name=column.minus), column):
            continue
        found = runs_at(HOME, row, column)
        if any(dig(record, column.path) is not MISSING for record in found.values()):
            return
    what = f"{column.world}: {column.path}" if column.world else column.path
    what += f" - {column.minus}" if column.minus else ""
    die(f"{query.where}: no row has {what}", "correct the key, the world or the row")


def is_cell(value):
    """Can it stand in a cell: a number, a word, a rate, draws of one record."""
    if isinstance(value, dict):
        return "rate" in value or "value" in value
    return not isinstance(value, list) or all(
        v is None or isinstance(v, int | float) for v in value
    )


def plain(value):
    """A number of a rate or of anything with an interval."""
    return value.get("rate", value.get("value")) if isinstance(value, dict) else value


def shown(values):
    """A cell: mean ± sd (seeds); of one seed its value, with its interval where it has one."""
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]  # draws of one record
    values = [value for value in values if plain(value) is not None]
    numbers = [plain(value) for value in values]
    if not numbers:
        return "-"
    if isinstance(numbers[0], int | str) and len(set(numbers)) == 1:
        return f"{numbers[0]:,}" if isinstance(numbers[0], int) else numbers[0]
    digits = 0 if abs(fmean(numbers)) >= 100 else 3
    if len(numbers) > 1:
        spread = f"{fmean(numbers):,.{digits}f} ± {stdev(numbers):,.{digits}f}"
        return f"{spread} ({len(numbers)})"
    interval = values[0] if isinstance(values[0], dict) else {}
    if "value" in interval and abs(numbers[0]) < 0.1:
        digits = 4
    ends = f" ({interval['low']:.{digits}f} to {interval['high']:.{digits}f})" if interval else ""
    return f"{numbers[0]:.{digits}f}{ends}"


def signed(differences):
    """A cell of paired differences: their mean with its 95 % t-interval over the seeds."""
    if len(differences) < 2:
        return f"{differences[0]:+.3f}" if differences else "-"
    return "{value:+.3f} ({low:+.3f} to {high:+.3f})".format(**t_interval(differences))


def did_not_train(runs):
    """The mark of runs that learned next to nothing."""
    failed = sum(not record.get("trained", True) for record in runs.values())
    if failed == 0:
        return ""
    return (
        " (did not train)" if failed == len(runs) else f" ({failed} of {len(runs)} did not train)"
    )


def published(query):
    """The rows of published.json that a query asks for."""
    key = query.words.get("published")
    if key is None:
        return []
    hint = "git checkout results/published.json restores it"
    tables = load_json(HOME / "published.json", hint)
    if key not in tables:
        die(f"{query.where}: published.json has no {key}", f"it has {', '.join(tables)}")
    return tables[key]


def cite(theirs):
    """The name of a published row, and the source in which its figures were read, if another."""
    source = re.sub(r", arXiv [\d.]+", "", theirs["source"])
    row, read_in = (re.sub(r"\W+", " ", text).strip() for text in (theirs["row"], source))
    return theirs["row"] if read_in in row else f"{theirs['row']}, {theirs['how']} in {source}"


# ---- figures


def draw_figures(path, folder):
    """The figures whose queries stand in the Markdown at `path`; returns their files."""
    drawn = []
    for found in FIGURE.finditer(path.read_text(encoding="utf-8")):
        kind, text, file = found.groups()
        where = position(found, path)
        if kind not in FIGURES:
            die(f"{where}: no figure is of the kind {kind}", f"there are {', '.join(FIGURES)}")
        query = parse(text, where)
        fig = FIGURES[kind](query, found_rows(query, folder), folder)
        if fig is not None:
            save_figure(fig, folder / file)
            drawn.append(folder / file)
    return drawn


def draw_epochs(query, rows, folder):
    """A panel a column, a line a row: a number of every epoch, mean and range of the seeds."""
    rows = [(row, [r for r in mine.values() if r["trained"]]) for row, mine in rows]
    rows = [(row, runs) for row, runs in rows if runs]
    if not rows:
        return None
    fig, axes = figure(4.1 * len(query.columns) + 0.5, 3.9, 1, len(query.columns), sharey=True)
    for ax, column in zip(axes[0], query.columns, strict=True):
        seen = []
        for row, runs in rows:
            epochs = zip(*(record["epochs"] for record in runs), strict=False)  # to the shortest
            values = [[record.get(column.path) for record in epoch] for epoch in epochs]
            points = {i: v for i, v in enumerate(values, start=1) if None not in v}
            if points:
                colour, label = ink(row.name), row.label.strip("`")
                style = ("-", "--", ":")[seen.count(colour) % 3]  # of the rows of a colour
                lines(ax, points, colour, marker="o", ms=3, ls=style, label=label)
                seen.append(colour)
        ax.set(xlabel="epoch", ylim=(0, 1))
        ax.set_title(column.header, fontsize=10)
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel(query.words.get("ylabel", "accuracy, mean and range of seeds"))
    named = axes[0, -1].get_legend_handles_labels()
    fig.legend(*named, fontsize=8, loc="outside lower center", ncols=3)  # a corner is rarely free
    return fig


def draw_matrices(query, rows, folder):
    """A panel a row: the table of shares at the first column's path, of the first seed."""
    rows = [(row, next(iter(mine.values()))) for row, mine in rows if mine]
    if not rows:
        return None
    fig, axes = figure(3.1 * len(rows) + 0.5, 3.4, 1, len(rows), sharey=True)
    for ax, (row, record) in zip(axes[0], rows, strict=True):
        table = dig(record, query.columns[0].path)
        picture = matrix(ax, table, xlabel=query.words.get("axis", ""))
        ax.set_title(f"{row.label.strip('`')}, seed {record['args']['seed']}", fontsize=10)
    axes[0, 0].set_ylabel(query.columns[0].header)
    label = query.words.get("ylabel", "")
    fig.colorbar(picture, ax=axes[0].tolist(), shrink=0.8, label=label)
    return fig


def draw_sweep(query, rows, folder):
    """A line a row, a place a column: ours in colour, published in grey; a cross did not train."""
    fig, ((ax,),) = figure(7, 5.6)
    headers = [column.header for column in query.columns]
    empty, seen = True, set()
    for row, _ in rows:
        points, failed = {}, {}
        for x, column in enumerate(query.columns):
            runs, values = values_of(column, row, folder)
            for seed, value in values.items():
                to = points if runs[seed].get("trained", True) else failed
                if plain(value) is not None and value is not MISSING:
                    to.setdefault(x, []).append(plain(value))
        label, colour = row.label.strip("`"), ink(row.name)
        empty &= not (points or failed)
        if points:
            face = "white" if colour in seen else colour  # the second row of a colour
            lines(ax, points, colour, marker="o", mfc=face, label=label)
            seen.add(colour)
        for x, values in failed.items():
            ax.plot([x] * len(values), values, color=colour, marker="x", ms=8, mew=2, ls="")
    if empty:
        return None
    theirs = sorted(published(query), key=lambda row: -row["cells"].get(headers[0], 0))
    for i, row in enumerate(theirs):  # the two best at the hardest setting get a name
        heights = [row["cells"].get(header, math.nan) for header in headers]
        look = {"marker": "sD"[i], "label": row["row"]} if i < 2 else {"marker": "."}
        ax.plot(heights, color="0.6", ls="--", lw=0.8, ms=5, **look)
    ax.set(xticks=range(len(headers)), xticklabels=headers, xlabel=query.words.get("axis", ""))
    ylabel = query.words.get("ylabel", "accuracy on test_unbiased")
    ax.set(ylabel=ylabel, ylim=(0, 1.02))
    ax.set_title(query.words.get("title", ""), fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    return fig


def draw_samples(query, rows, folder):
    """Pictures a class, real, generated and attacked, each with the trained net's answer."""
    for row, mine in rows:
        for record in mine.values():
            path = (folder / row.name).with_name(f"{record['name']}.pt")
            if path.exists() and "shown" in (checkpoint := load_pt(path, "train it again")):
                return pictures(sample_rows(checkpoint))
    return None


def sample_rows(checkpoint):
    """Two pictures of every class a line: [(title, [(pixels, caption, look)])]."""
    titles = ("real", "generated", "generated, then attacked")
    found = []
    kinds = checkpoint["shown"].values()
    for title, said, kind in zip(titles, checkpoint["said"], kinds, strict=True):
        for first in (0, 1):
            cells = []
            for i in range(first, len(said), 4):
                wrong = said[i] != i // 4  # four of a class stand side by side
                look = {"weight": "bold" if wrong else "normal"}
                cells.append(
                    (kind[i].expand(3, -1, -1), f"{'✗' if wrong else '✓'} {said[i]}", look)
                )
            found.append((title if first == 0 else "", cells))
    return found


FIGURES = {
    "epochs": draw_epochs,
    "matrices": draw_matrices,
    "sweep": draw_sweep,
    "samples": draw_samples,
}


if __name__ == "__main__":
    run(main, "run the same command with --resume to continue after the last whole epoch")
