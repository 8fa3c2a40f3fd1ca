"""Every method's loss, weights and schedule, every jitter and augmentation, by hand or another way.

A model here is often a table of logits, so that its loss can be counted on paper.
"""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv
from conftest import split_of

import attack
import common
import train


def args_of(flags=""):
    return train.get_args(flags.split())


def method_of(name, model, splits, flags=""):
    return train.METHODS[name](model, splits, args_of(f"--method {name} {flags}"))


def batch_of(x, y, colour=None, index=None, progress=0.5, **more):
    y = torch.as_tensor(y)
    colour = None if colour is None else torch.as_tensor(colour)
    index = torch.arange(len(y)) if index is None else torch.as_tensor(index)
    return train.Batch(x, y, colour, index, progress, **more)


class Logits(torch.nn.Module):
    """Answers with its weights (B,classes), whatever the picture; `fc` tells the classes."""

    def __init__(self, rows):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.tensor(rows))
        self.fc = torch.nn.Linear(4, self.rows.shape[1])

    def forward(self, x):
        return self.rows[: len(x)]


def log_p(logits, k):
    """log softmax of one row, on paper."""
    return logits[k] - math.log(sum(math.exp(z) for z in logits))


def sgd(*parts, lr=0.0):
    return torch.optim.SGD([p for part in parts for p in part.parameters()], lr=lr)


@pytest.fixture
def gen():
    return common.stream(0, "test")


@pytest.fixture
def net():
    """A small net with opinions, ten classes, 8x8 pixels."""
    torch.manual_seed(0)
    net = common.build_model(size=(8, 8))
    with torch.no_grad():
        net.fc.weight *= 20
    return net


@pytest.fixture
def data():
    """Training data of three digits and colours: groups of 5, 1, 2, 3 and 1 images."""
    return split_of([0] * 6 + [1] * 5 + [2], [0] * 5 + [1] + [0] * 2 + [1] * 3 + [2])


TABLE = [[2.0, 0.5, -1.0], [0.3, 0.1, 0.9], [-0.2, 1.5, 0.4], [1.1, 1.0, 0.2]]


# ---- what all methods share


@pytest.fixture
def in_world(tmp_path):
    """Arguments of a run in a world whose digits have their own colour in this share."""

    def args(flags, own=0.95):
        meta = {"script": "make_data.py", "counts": {"train": 54_000}}
        meta["own_colour_share"] = {"train": [own, own + 0.001, None, *[own] * 7]}
        common.save_json(meta, tmp_path / "meta.json")
        return args_of(f"{flags} --dir {tmp_path}")

    return args


TOLD = {
    "nothing": "baseline gce lff jtt at robgan, at --balance --infer-groups, grl --infer-groups,"
    " dfr --infer-groups,"
    " baseline --name oracle_s42",  # a name decides nothing
    "the kind of bias": "jitter lntl, jitter --balance --infer-groups, combined --infer-groups,"
    " baseline --grayscale, balance --infer-groups --grayscale",
    "colour labels": "grl combined biasbal balance groupdro dfr, at --balance, jitter --balance,"
    " grl --grayscale",
}


def test_what_a_run_is_told(in_world):
    for knows, runs in TOLD.items():
        for run in runs.split(", "):
            names = [run] if "--" in run else run.split()
            for flags in (f"--method {name}" for name in names):
                assert train.knows(in_world(flags)) == knows, flags
    assert train.knows(in_world("--method grl", own=0.1)) == "no bias in training"
    args = in_world("--method grl", own=0.11)  # seven standard errors from chance
    assert train.knows(args) == "colour labels"
    meta = common.load_json(args.dir / "meta.json", "")
    meta |= {"palette": ["red", "green"], "own_colour_share": {"train": [0.5, 0.5, None]}}
    common.save_json(meta, args.dir / "meta.json")
    assert train.knows(args) == "no bias in training"  # two colours, two classes
    (args.dir / "meta.json").unlink()
    assert train.knows(args) == "colour labels"


def test_a_clipped_update_has_the_norm_asked_for_and_old_gradients_are_gone():
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    weight.grad = torch.full((2,), 100.0)
    shown = train.update(torch.optim.SGD([weight], lr=1.0), (weight**2).sum(), clip=0.5)
    assert torch.allclose(weight, torch.tensor([3.0, 4.0]) * (1 - 0.1))
    assert shown.item() == 25 and not shown.requires_grad
    train.update(torch.optim.SGD([weight], lr=0.5), (weight**2).sum())
    assert torch.allclose(weight, torch.zeros(2))


@pytest.mark.parametrize(
    "method, of", [("baseline", lambda p: -math.log(p)), ("gce", lambda p: (1 - p**0.7) / 0.7)]
)
def test_the_plain_losses_are_means_of_what_the_label_s_probability_costs(gen, method, of):
    model, y = Logits(TABLE), [0, 2, 1, 1]
    loss = method_of(method, model, None).loss(model, batch_of(torch.zeros(4), y), gen)
    by_hand = sum(of(math.exp(log_p(row, k))) for row, k in zip(TABLE, y, strict=True)) / 4
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)


# ---- jitter


@pytest.mark.parametrize(
    "flags, progress, classified, weight",
    [
        ("--alpha 3", 0.25, "copy", 3 * 0.75),
        ("--alpha 3 --classify image", 0.25, "image", 3 * 0.75),
        ("--alpha 3 --no-fade", 0.25, "copy", 3),
        ("--alpha 3", 1.0, "copy", 0),
        ("--alpha 0", 0.25, "copy", 0),
        ("--alpha 0 --classify image", 0.25, "image", 0),
        ("--alpha 3 --jitter hsv", 0.25, "copy", 3 * 0.75),
    ],
)
def test_jitter_classifies_the_copy_and_ties_it_to_the_image(
    net, flags, progress, classified, weight
):
    """KL(image || copy), a weight that fades."""
    x, y = torch.rand(4, 3, 8, 8, generator=common.stream(0, "x")), torch.tensor([1, 2, 3, 4])
    flags, gen = flags if "hsv" in flags else f"{flags} --grain 0.3", common.stream(0, "j")
    jitter = method_of("jitter", net, None, flags)
    loss = jitter.loss(net, batch_of(x, y, progress=progress), common.stream(0, "j")).item()
    copy = train.hsv(x, None, gen) if "hsv" in flags else train.mix(x, 0.3, gen)
    logs = {"image": net(x).log_softmax(1), "copy": net(copy).log_softmax(1)}
    distance = (logs["image"].exp() * (logs["image"] - logs["copy"])).sum(1).mean().item()
    nll = -logs[classified][range(4), y].mean().item()
    assert distance > 1e-4 and loss == pytest.approx(nll + weight * distance, rel=1e-5)


def test_jitter_asks_the_copy_for_what_the_image_says_and_not_the_reverse(net):
    """KL is lopsided, which a fresh net hides: here the image is sure and its copy undecided."""
    args = method_of("jitter", net, None, "--alpha 3 --no-fade").args
    p, batch = 1 / (1 + math.exp(-3)), batch_of(torch.zeros(1, 3, 8, 8), [0])
    loss = train.jitter_loss(torch.tensor([[3.0, 0.0]]), torch.zeros(1, 2), batch, args).item()
    distance = p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p))
    assert loss == pytest.approx(math.log(2) + 3 * distance)


def test_mix_equals_the_same_mixture_one_channel_at_a_time():
    x, gen = torch.rand(5, 3, 6, 7), common.stream(3, "j")
    out = train.mix(x, 0.2, common.stream(3, "j"))
    matrix = torch.randn(5, 3, 3, generator=gen).double().numpy()
    deviation = torch.rand(5, generator=gen).numpy()
    noise = torch.randn(5, 6 * 7, generator=gen).numpy()
    span, low = torch.rand(5, 3, generator=gen).numpy(), torch.rand(5, 3, generator=gen).numpy()
    for i, picture in enumerate(x.double().numpy()):
        for c in range(3):
            row = matrix[i, c] / np.linalg.norm(matrix[i, c])
            plane = np.tensordot(row, picture, 1) + (0.2 * deviation[i] * noise[i]).reshape(6, 7)
            plane = (plane - plane.min()) / (plane.max() - plane.min())
            width = 0.1 + 0.9 * span[i, c]
            by_hand = (1 - width) * low[i, c] + width * plane
            assert np.abs(out[i, c].numpy() - by_hand).max() < 1e-4
    flat = torch.full((2, 3, 8, 8), 0.5)  # a channel without any contrast
    assert train.mix(flat, 0.0, common.stream(0, "j")).isfinite().all()


def test_hsv_equals_torchvision_with_the_same_factors():
    x, gen = torch.rand(12, 3, 16, 16), common.stream(0, "j")
    out = train.hsv(x, 0, common.stream(0, "j"))
    for k, ends in enumerate(((0.5, 1.5), (0.5, 1.5), (0.5, 1.5), (-3, 3))):
        draw = torch.rand(12, 1, 1, 1, generator=gen) * (ends[1] - ends[0]) + ends[0]
        if k < 3:
            adjust = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation)[k]
        else:
            adjust = lambda image, turn: tv.adjust_hue(image, turn / 6)  # noqa: E731
        x = torch.stack([adjust(image, f.item()) for image, f in zip(x, draw, strict=True)])
    assert (out - x).abs().max() < 2e-3


# ---- methods that are told the colours


@pytest.mark.parametrize(
    "flags, left",
    [
        ("biasbal", [[5, 2, 1], [1, 3, 1], [1, 1, 1]]),
        ("balance --resample 0", [[5, 2, 1], [1, 3, 1], [1, 1, 1]]),
        ("balance --resample 0.25", [[5**0.75, 2**0.75, 1], [1, 3**0.75, 1], [1, 1, 1]]),
        ("balance", [[1, 1, 1]] * 3),
    ],
)
def test_the_loss_is_corrected_for_what_resampling_leaves(data, gen, flags, left):
    """Of 7 images of colour 0, 5 are a zero and 2 a one; `left` by colour, a pair never seen 1."""
    model = Logits(TABLE)
    assert train.count_groups(data, 3).tolist() == [[5, 1, 0], [2, 3, 0], [0, 0, 1]]
    name, _, more = flags.partition(" ")
    method = method_of(name, model, {"train": data}, more)
    y, colours, by_hand = [0, 1, 2, 0], [0, 0, 2, 1], 0
    for row, k, colour in zip(TABLE, y, colours, strict=True):
        given = [n / sum(left[colour]) for n in left[colour]]
        by_hand -= log_p([z + math.log(p) for z, p in zip(row, given, strict=True)], k) / 4
    batch = batch_of(torch.zeros(4), y, colours)
    assert method.loss(model, batch, gen).item() == pytest.approx(by_hand, rel=1e-5)
    if flags == "balance":  # to the last bit
        assert torch.equal(method.loss(model, batch, gen), F.cross_entropy(model.rows, batch.y))


class TwoFeatures(torch.nn.Module):
    """Sees red and green of a picture of one pixel."""

    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.fc(x[:, :2, 0, 0])


def test_dfr_weighs_groups_alike_and_so_has_no_use_for_colour():
    # red says the digit four times in five, whatever the colour; green is the colour, 19 in 20
    groups = [(digit, colour, right) for digit in (0, 1) for colour in (0, 1) for right in range(5)]
    often = [image for image in groups for _ in range(19 if image[0] == image[1] else 1)]
    digit, colour, right = torch.tensor(often).T
    red = torch.where(right > 0, digit, 1 - digit)
    images = torch.stack([red, colour, colour], 1)[:, :, None, None].mul(255).byte()
    data, net = common.Split(images, digit, colour, None), TwoFeatures()
    z = images[:, :2, 0, 0] / 255
    plain, _ = train.fit_layer(z, digit, 2)
    assert plain[1, 1] > 2 * plain[1, 0] > 0
    method_of("dfr", net, {"train": data}).finish(net, data)
    assert net.fc.weight[1, 0] > 1 and net.fc.weight[:, 1].abs().max() < 0.01
    assert torch.equal(common.predict(net, images).argmax(1), red)
    odds = torch.tensor([[1.0, 0, 0], [0, 0, 0]])[:, :, None, None]
    with torch.no_grad():  # log 4 either way, but for the penalty
        gap = net(odds) @ torch.tensor([-1.0, 1.0])
    assert gap.tolist() == pytest.approx([math.log(4), -math.log(4)], abs=0.1)


def test_dfr_gives_a_pair_that_is_missing_no_share(monkeypatch):
    """Pairs of 6, 2 and 1 images: the weight of three images each, whatever the fourth pair is."""
    data, net, seen = split_of([0] * 6 + [1] * 3, [0] * 6 + [0] * 2 + [1]), TwoFeatures(), []

    def fit_layer(z, target, classes):
        seen.append(target)
        return torch.zeros(classes, z.shape[1]), torch.zeros(classes)

    monkeypatch.setattr(train, "fit_layer", fit_layer)
    method_of("dfr", net, {"train": data}).finish(net, data)
    weights = [[0.5, 0]] * 6 + [[0, 1.5]] * 2 + [[0, 3.0]]
    assert torch.allclose(seen[0].float(), torch.tensor(weights))


def grl_losses(grl, net, batch, given_colour, given_digit):
    """The digit's and the colour's cross-entropy, written out."""
    with train.InputOf(net.fc) as features:
        logits = net(batch.x)
    digit = (logits + given_colour[batch.colour]).log_softmax(1)
    hidden = F.relu(F.linear(features.seen[0], grl.head[0].weight, grl.head[0].bias))
    colour = F.linear(hidden, grl.head[2].weight, grl.head[2].bias) + given_digit[batch.y]
    n = range(len(batch.y))
    return -digit[n, batch.y].mean(), -colour.log_softmax(1)[n, batch.colour].mean()


@pytest.mark.parametrize("progress, gamma", [(0.1, 0), (0.2, 0), (0.6, 0.35), (1.0, 0.7)])
@pytest.mark.parametrize("flags", ["", "--no-conditional"])
def test_grl_names_the_colour_and_turns_its_gradient_round(data, net, gen, progress, gamma, flags):
    """Both gradients against those of the two losses, each on its own."""
    net, data = net.double(), data._replace(images=data.images)
    count = torch.ones(10, 10).double()
    count[:3, :3] = torch.tensor([[5, 1, 1], [2, 3, 1], [1, 1, 1]])
    count = torch.ones_like(count) if flags else count
    given_colour = (count / count.sum(0)).log().T
    given_digit = (count / count.sum(1, keepdim=True)).log()
    grl = method_of("grl", net, {"train": data, "val": data}, f"--gamma 0.7 {flags}").double()
    x = data.x(slice(None)).double()
    batch = batch_of(x, data.labels, data.colors, progress=progress)
    weights = [net.conv1.weight, grl.head[0].weight]
    digit, colour = grl_losses(grl, net, batch, given_colour, given_digit)
    naming = torch.autograd.grad(colour, weights, retain_graph=True)
    learning = torch.autograd.grad(digit, weights[:1])
    shown = grl.step(net, batch, sgd(net, grl), gen)
    assert shown.item() == pytest.approx(digit.item(), rel=1e-6)
    assert torch.allclose(weights[0].grad, learning[0] - gamma * naming[0], atol=1e-8)
    assert torch.allclose(weights[1].grad, naming[1], atol=1e-8)
    assert naming[0].abs().max() > 1e-4


def test_a_blind_head_names_one_colour_of_the_pictures_that_conflict(data, net):
    grl = method_of("grl", net, {"train": data, "val": data})
    torch.nn.init.zeros_(grl.head[2].weight)
    colours = data.colors[data.colors != data.labels]
    grl.head[2].bias.data = F.one_hot(colours[0], 10).float()
    share = (colours == colours[0]).double().mean().item()
    assert grl.facts(net) == {"head_colour": share} and 0 < share < 1
    assert (
        method_of("grl", net, {"train": data, "val": data._replace(colors=None)}).facts(net) == {}
    )


def test_the_colour_head_takes_three_updates_for_one_of_the_net(data, net, gen):
    grl = method_of("grl", net, {"train": data, "val": data})
    assert (grl.lr_scale, grl.betas) == (3, (0.9, 0.999))
    optimiser = torch.optim.AdamW([*net.parameters(), *grl.parameters()], lr=0.01)
    grl.step(net, batch_of(data.x(slice(None)), data.labels, data.colors), optimiser, gen)
    taken = [optimiser.state[p]["step"] for p in (net.conv1.weight, grl.head[0].weight)]
    assert taken == [1, 3]


def test_combined_hides_the_colour_of_the_images_and_adds_both_losses(data, net, monkeypatch):
    combined = method_of("combined", net, {"train": data, "val": data}, "--alpha 2 --gamma 0.5")
    batch, seen = batch_of(data.x(slice(None)), data.labels, data.colors, progress=0.6), []
    monkeypatch.setattr(
        combined, "colour_loss", lambda z, b: seen.append(z) or combined.head(z).square().mean()
    )
    loss = combined.step(net, batch, sgd(net, combined), common.stream(0, "j"))
    image, copy = net(batch.x), net(train.mix(batch.x, 0.1, common.stream(0, "j")))
    biasbal = method_of("biasbal", net, {"train": data}).digit_loss(image, batch)
    by_hand = F.cross_entropy(copy, batch.y) + 2 * 0.4 * train.kl(image, copy) + biasbal
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)
    features = net.features(batch.x).flatten(1)
    assert len(seen) == 3 and all(torch.allclose(z, features, atol=1e-6) for z in seen)


def test_groupdro_weighs_the_hardest_group_most(data, gen):
    """Four images of three groups: the weights follow the groups' mean losses, then multiply."""
    model = Logits(TABLE)
    dro = method_of("groupdro", model, {"train": data})
    assert dro.weight.view(3, 3).tolist() == [[pytest.approx(0.2)] * 3] * 3  # five groups of nine
    index = [0, 1, 5, 11]  # (0,0), (0,0), (0,1), (2,2)
    y = data.labels[index]
    batch = batch_of(torch.zeros(4), y, data.colors[index], index)
    for _ in range(2):  # the second time with the weights of the first
        old = dro.weight.view(3, 3).tolist()
        loss = dro.loss(model, batch, gen)
        losses = [-log_p(row, int(k)) for row, k in zip(TABLE, y, strict=True)]
        mean = [[0.0] * 3 for _ in range(3)]
        mean[0][0], mean[0][1], mean[2][2] = (losses[0] + losses[1]) / 2, losses[2], losses[3]
        raised = [
            [q * math.exp(0.01 * m) for q, m in zip(*rows, strict=True)]
            for rows in zip(old, mean, strict=True)
        ]
        total = sum(map(sum, raised))
        by_hand = sum(
            q / total * m
            for rows in zip(raised, mean, strict=True)
            for q, m in zip(*rows, strict=True)
        )
        assert loss.item() == pytest.approx(by_hand, rel=1e-5)
        assert dro.weight.sum().item() == pytest.approx(1)
    assert dro.weight.view(3, 3)[0, 1] == dro.weight.max()  # the highest loss, 1.8


# ---- methods that are told nothing


def test_what_the_biased_net_finds_hard_counts_more(net, data):
    """Running means per image, scaled by the largest of the class; two batches on paper."""
    lff = method_of("lff", Logits(TABLE), {"train": data})
    first = batch_of(None, data.labels[[0, 1, 6]], index=[0, 1, 6])
    losses = torch.tensor([[0.5, 2.0, 1.0], [1.0, 4.0, 3.0]])  # of the biased net, of the cured
    weight = lff.difficulty(losses, first).tolist()
    assert weight == pytest.approx([0.25 / (0.25 + 0.25), 1 / 2, 1 / 2])
    again = batch_of(None, data.labels[[0, 7]], index=[0, 7])
    weight = lff.difficulty(torch.tensor([[3.0, 0.2], [0.1, 0.6]]), again).tolist()
    biased, cured = 0.7 * 0.5 + 0.3 * 3.0, 0.7 * 1.0 + 0.3 * 0.1
    biased, cured = biased / 2.0, cured / 4.0  # image 1 has the largest of class 0
    assert weight == pytest.approx([biased / (biased + cured), 0.2 / (0.2 + 0.6 / 3.0)], rel=1e-5)


def test_lff_trains_a_biased_net_beside_the_cured_one(data, net, gen, monkeypatch):
    lff = method_of("lff", net, {"train": data})
    x, y = data.x(slice(6)), data.labels[:6]
    weight, given = torch.linspace(0.1, 0.9, 6), []
    monkeypatch.setattr(lff, "difficulty", lambda losses, batch: given.append(losses) or weight)
    loss = lff.loss(net, batch_of(x, y), gen)
    biased, cured = (-z.log_softmax(1)[range(6), y] for z in (lff.biased(x), net(x)))
    assert torch.allclose(given[0], torch.stack([biased, cured]))
    amplified = ((1 - (-biased).exp() ** 0.7) / 0.7).mean()
    assert loss.item() == pytest.approx(((weight * cured).mean() + amplified).item(), rel=1e-5)
    assert [*lff.biased.parameters()] and lff.biased is not net


def test_what_a_first_net_gets_wrong_counts_twenty_times(data, gen, monkeypatch):
    model, asked = Logits(TABLE), []

    def plain(splits, args, **changes):
        asked.append(changes)
        return model

    monkeypatch.setattr(train, "train_plain", plain)
    answers = data.labels.clone()
    answers[[1, 7]] = 2
    monkeypatch.setattr(train, "predict", lambda *_: F.one_hot(answers))
    jtt = method_of("jtt", model, {"train": data}, "--first-epochs 3 --seed 5")
    assert asked == [{"epochs": 3, "seed": 6}]
    index = [0, 1, 6, 7]
    loss = jtt.loss(model, batch_of(torch.zeros(4), data.labels[index], index=index), gen)
    losses = [-log_p(row, int(k)) for row, k in zip(TABLE, data.labels[index], strict=True)]
    by_hand = (losses[0] + 20 * losses[1] + losses[2] + 20 * losses[3]) / 42
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)


def test_a_first_net_s_answers_stand_for_colours_and_are_measured(data, monkeypatch):
    answers = data.colors.clone()
    answers[[0, 5]] = 2  # one of nine aligned images, one of the three conflicting ones...
    answers[6] = 1  # ...and another of these, called by its label
    monkeypatch.setattr(train, "first_answers", lambda data, seed, resample=0: (answers, seed))
    seen, facts = train.infer_groups(data, 4)
    assert torch.equal(seen.colors, answers) and torch.equal(seen.labels, data.labels)
    assert torch.equal(seen.images, data.images)
    assert facts == {
        "epochs": 5,  # here the seed, one more than that of the run
        "equal_label": pytest.approx(9 / 12),
        "equal_colour": pytest.approx(9 / 12),
        "equal_colour_conflicting": pytest.approx(1 / 3),
    }
    blind, facts = train.infer_groups(data._replace(colors=None), 4)
    assert torch.equal(blind.colors, answers) and {*facts} == {"epochs", "equal_label"}


def test_a_second_round_names_the_shortcut_that_is_left_once_the_first_is_balanced(monkeypatch):
    labels, first, second = [0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 0], [0, 1, 0, 1, 0, 1]
    data = split_of(labels, first)._replace(second=torch.tensor(second))
    asked = []

    def named(data, seed, resample=0.0):
        asked.append((data.colors.tolist(), seed, resample))
        return torch.tensor(first if len(asked) == 1 else second), len(asked)

    monkeypatch.setattr(train, "first_answers", named)
    seen, facts = train.infer_groups(data, 4, rounds=2)
    assert asked == [(first, 5, 0.0), (first, 6, 1.0)]
    assert seen.colors.tolist() == [0, 1, 2, 3, 2, 1]  # one of two colours, one of two seconds
    share = pytest.approx(4 / 6)
    assert facts["round_2"] == {"epochs": 2, "equal_label": share, "equal_second_conflicting": 1.0}
    count = torch.tensor([[1, 1, 1, 0], [0, 1, 1, 1]])
    assert torch.equal(train.count_groups(seen, 2), count.float())
    model = Logits([[0.0, 0.0]] * 6)
    method = method_of("balance", model, {"train": seen}, "--resample 0")
    loss = method.loss(model, batch_of(torch.zeros(6, 1), labels, seen.colors), None)
    likely = [1 / 2] * 6  # a pair never seen counts as one image, so every group is one of each
    assert loss.item() == pytest.approx(-math.log(likely[0]))


def flat_colours(n, own=9):
    """Pictures (n,3,8,8) of one of three flat colours, which is their label for `own` in ten."""
    colours = torch.arange(n) % 3
    labels = torch.where(torch.arange(n) % 10 < own, colours, (colours + 1) % 3)
    images = torch.zeros(n, 3, 8, 8, dtype=torch.uint8)
    images[torch.arange(n), colours] = 255
    return common.Split(images, labels, colours, None)


def test_a_first_net_stops_where_no_class_is_missed_whatever_the_global_seed(capfd, dies):
    data = flat_colours(1200)
    state = torch.get_rng_state()
    answers, epochs = train.first_answers(data, 7)
    assert torch.equal(torch.get_rng_state(), state)  # the second net's weights stay the same
    lines = capfd.readouterr().out.splitlines()
    right = [[float(number) for number in re.findall(r"[01]\.\d{3}", line)] for line in lines]
    evenly = [worst >= 0.9 * best for worst, best in right]
    assert 1 < epochs <= 5 and evenly == [False] * (epochs - 1) + [True]
    assert (answers == data.colors).double().mean() > 0.95
    torch.manual_seed(5)
    assert torch.equal(answers, train.first_answers(data, 7)[0])
    with dies("after 5 epochs the first net is right on 0."):
        train.first_answers(data._replace(labels=torch.arange(1200) // 400), 7)


def test_a_first_net_names_a_weak_shortcut_too():
    data = flat_colours(1200, own=7)
    answers, _ = train.first_answers(data, 7)
    assert (answers == data.colors).double().mean() > 0.95


# ---- lntl


def test_lntl_cuts_colours_into_eight_bins_where_a_feature_sees_any():
    """Feature k sees pixels 2k - 1 to 2k + 2: a 3x3 convolution, then a 2x2 maximum."""
    model = common.build_model(width=16)
    lntl = method_of("lntl", model, {"train": split_of([0, 1], size=28)})
    x = torch.zeros(2, 3, 28, 28)
    x[1, :, 8, 9] = torch.tensor([0.0, 0.5, 1.0])
    with train.InputOf(model.conv2) as early:
        model(x)
    changed = (early.seen[0][1] != early.seen[0][0]).any(0).flatten().nonzero()[:, 0] + 14 * 14
    colour, seen = lntl.colour(x, None)
    assert seen.tolist() == [14 * 14 + k for k in (3 * 14 + 4, 3 * 14 + 5, 4 * 14 + 4, 4 * 14 + 5)]
    assert {*changed.tolist()} <= {*seen.tolist()}  # none goes unguarded
    assert colour.tolist() == [0, 4, 7] * 4
    row = early.seen[0].flatten(2)[1, :, seen[0] - 14 * 14]
    assert torch.equal(lntl.pixels(early.seen[0], seen)[0], row)


def test_lntl_has_a_colour_for_every_feature_of_every_net(dies):
    for model, size in (("saturatedcnn", (29, 33)), ("simplecnn", (30, 32))):
        x, net = torch.rand(2, 3, *size), common.build_model(model, size=size)
        split = split_of([0, 1])._replace(images=(x * 255).byte())
        lntl = method_of("lntl", net, {"train": split})
        with train.InputOf(net.conv2) as early:
            net(x)
        colour, seen = lntl.colour(x, None)
        assert len(seen) == early.seen[0][:, 0].numel() and len(colour) == 3 * len(seen)
    for model in ("mlp", "resnet18"):
        with dies("feature maps"):
            method_of("lntl", common.build_model(model, size=(8, 8)), {"train": split})


def test_lntl_shows_its_heads_4096_features_at_most_drawn_anew(net, data, gen):
    lntl = method_of("lntl", net, {"train": data})
    assert lntl.lr_scale == 3
    x = torch.rand(400, 3, 8, 8)  # 6,400 features
    draws = [lntl.colour(x, gen)[1] for _ in range(2)]
    assert [len(seen.unique()) for seen in draws] == [4096, 4096]
    assert draws[0].max() > 6_000 and not torch.equal(*draws)


def test_lntl_teaches_the_heads_and_pushes_the_features_the_other_way(data, net, gen):
    """Against the gradients of the two losses, each computed on its own."""
    lntl = method_of("lntl", net, {"train": data}, "--gamma 0.7 --entropy 0.3").double()
    net = net.double()
    x, y = data.x(slice(8)).double(), data.labels[:8]
    colour, seen = lntl.colour(x, None)
    maps = F.relu(F.max_pool2d(net.conv1(x), 2)).permute(0, 2, 3, 1).reshape(-1, 4)[seen]
    guesses = lntl.head[1:]((maps - maps.mean(0)) / (maps.var(0, False) + 1e-5).sqrt())
    guesses = guesses.view(-1, 3, 8).softmax(2)
    entropy = -(guesses * guesses.log()).sum(2).mean()
    target = colour.view(-1, 3, 1)
    hiding = F.cross_entropy(net(x), y) - 0.3 * entropy
    naming = -guesses.gather(2, target).log().mean()
    weights = [net.conv1.weight, lntl.head[1].weight]
    first = torch.autograd.grad(hiding, weights[0], retain_graph=True)[0]
    second = torch.autograd.grad(naming, weights)
    shown = lntl.step(net, batch_of(x, y, progress=0.5), sgd(net, lntl), gen)
    assert torch.allclose(weights[0].grad, first - 0.7 * 0.5 * second[0], atol=1e-7)
    assert torch.allclose(weights[1].grad, second[1], atol=1e-7)  # nothing from the entropy
    assert shown.item() == pytest.approx(F.cross_entropy(net(x), y).item(), rel=1e-6)
    right = (guesses.argmax(2) == colour.view(-1, 3)).double().mean().item()
    assert lntl.facts(net) == {"head_colour": pytest.approx(right, abs=1e-6)}
    assert lntl.facts(net) == {"head_colour": 0}


def test_a_black_batch_teaches_lntl_no_colour(data, net, gen):
    lntl = method_of("lntl", net, {"train": data})
    before = lntl.head[1].weight.clone()
    batch = batch_of(torch.zeros(4, 3, 8, 8), [0, 1, 2, 0])
    loss = lntl.step(net, batch, sgd(net, lntl, lr=0.1), gen)
    assert math.isfinite(loss) and torch.equal(before, lntl.head[1].weight)


# ---- augmentations


@pytest.fixture
def picture():
    return torch.rand(40, 3, 12, 10, generator=torch.Generator().manual_seed(3))


def test_a_random_crop_is_a_shift_by_whole_pixels(picture, gen):
    moved = train.moved(picture, 2, gen)
    padded = F.pad(picture, (2, 2, 2, 2), mode="replicate")
    crops = {(i, j): padded[:, :, i : i + 12, j : j + 10] for i in range(5) for j in range(5)}
    found = [
        [place for place, crop in crops.items() if torch.allclose(crop[k], moved[k], atol=1e-5)]
        for k in range(40)
    ]
    assert all(len(places) == 1 for places in found)
    places = {places[0] for places in found}
    assert len(places) > 10 and {i for i, _ in places} == {j for _, j in places} == {*range(5)}


def test_half_are_mirrored(picture, gen):
    moved = train.moved(picture, 0, gen, flip=True)
    same, mirrored = (
        (moved - other).abs().amax((1, 2, 3)) < 1e-5 for other in (picture, picture.flip(3))
    )
    assert (same ^ mirrored).all() and 8 < mirrored.sum() < 32


@pytest.mark.parametrize("draw, turn", [(1 - 1e-7, 1.0), (0.0, -1.0), (0.75, 0.5), (0.5, 0.0)])
def test_an_image_turns_about_its_middle_by_up_to_the_angle(picture, monkeypatch, draw, turn):
    """Against one rotation of a not square picture's coordinates, written out."""
    monkeypatch.setattr(torch, "rand", lambda *shape, **_: torch.full(shape, draw))
    out = train.moved(picture, 0, None, degrees=30)
    angle = math.radians(30) * turn
    for i, j in ((6, 5), (4, 6), (7, 3)):
        y, x = i - 5.5, j - 4.5
        row = math.sin(angle) * x + math.cos(angle) * y + 5.5
        column = math.cos(angle) * x - math.sin(angle) * y + 4.5
        top, left = math.floor(row), math.floor(column)
        down, right = row - top, column - left
        four = picture[:, :, top : top + 2, left : left + 2]
        weights = torch.tensor([[1 - down], [down]]) * torch.tensor([[1 - right, right]])
        assert torch.allclose(out[:, :, i, j], (four * weights).sum((2, 3)), atol=1e-4)


def test_cutout_blackens_a_square_that_may_leave_the_image(gen):
    out = train.cutout(torch.ones(600, 3, 12, 9), 4, gen)
    assert torch.equal(out[:, 0], out[:, 1]) and out.unique().tolist() == [0, 1]
    black, shapes = out[:, 0] == 0, set()
    for image in black:
        rows, columns = (image.any(k).nonzero()[:, 0].tolist() for k in (1, 0))
        assert image.sum() == len(rows) * len(columns)
        assert rows == [*range(rows[0], rows[-1] + 1)]
        shapes.add((len(rows), len(columns)))
    assert shapes == {(i, j) for i in (2, 3, 4) for j in (2, 3, 4)}
    middle = black.float().mean(0)
    assert middle[4:8, 3:6].sub(16 / 108).abs().max() < 0.06


def test_mixup_mixes_images_and_labels_with_one_weight(picture, gen):
    soft = torch.eye(40)  # as many classes as images: the labels say who was mixed
    x, labels = train.mixup(picture, soft, 0.5, gen)
    assert torch.allclose(labels.sum(1), torch.ones(40))
    assert torch.allclose(x, torch.einsum("ij,jchw->ichw", labels, picture), atol=1e-6)
    weights = [train.mixup(picture, soft, 0.5, gen)[1].diagonal() for _ in range(40)]
    mixed = torch.cat(weights)[torch.cat(weights) < 1]
    assert mixed.mean().item() == pytest.approx(0.5, abs=0.05)
    assert mixed.var().item() == pytest.approx(1 / (4 * 2), abs=0.02)  # of Beta(0.5, 0.5)


def test_the_student_s_recipe_is_each_part_in_this_order(picture):
    soft, gen = torch.eye(40), common.stream(5, "a")
    by_hand = train.moved(picture, 2, gen, degrees=10, flip=True)
    by_hand = train.cutout(train.hsv(by_hand, None, gen), 8, gen)
    by_hand = train.mixup(by_hand, soft, 0.2, gen)
    x, labels = train.augment(picture, soft, 2, common.stream(5, "a"))
    assert torch.equal(x, by_hand[0]) and torch.equal(labels, by_hand[1])


# ---- adversarial training


class Linear(torch.nn.Module):
    """Two classes: the logits are 0 and the sum of slope times pixel; any `dropout` shows mode."""

    def __init__(self, slope):
        super().__init__()
        self.slope, self.dropout = torch.nn.Parameter(slope), torch.nn.Dropout(0.5)

    def forward(self, x):
        score = (self.dropout(x) * self.slope).sum((1, 2, 3))
        return torch.stack([torch.zeros_like(score), score], 1)


@pytest.fixture
def linear():
    return Linear(torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(1)))


def test_pgd_finds_the_worst_case_of_a_linear_model(linear, gen):
    x = torch.rand(6, 3, 6, 5, generator=gen)
    y = torch.tensor([0, 1] * 3)
    linear.train()
    found = train.pgd(linear, x, y, 0.1, 10, 0.05, gen)
    away = torch.where(y == 0, 1.0, -1.0).view(-1, 1, 1, 1)  # from its own class
    worst = (x + 0.1 * away * linear.slope.sign()).clamp(0, 1)
    assert torch.allclose(found, worst, atol=1e-6)
    assert linear.training and linear.dropout.training and linear.slope.grad is None
    assert not found.requires_grad
    linear.eval()
    train.pgd(linear, x, y, 0.1, 1, 0.05, gen)
    assert not linear.training


def test_pgd_starts_anywhere_in_the_ball_and_takes_steps_of_its_size(linear, gen):
    x, y = torch.rand(50, 3, 6, 5, generator=gen), torch.zeros(50).long()
    start = train.pgd(linear, x, y, 0.1, 0, 0.05, common.stream(1, "a"))
    draw = torch.rand(x.shape, generator=common.stream(1, "a"))
    assert torch.allclose(start, (x - 0.1 + 0.2 * draw).clamp(0, 1), atol=1e-6)
    one = train.pgd(linear, x, y, 0.1, 1, 0.03, common.stream(1, "a"))
    step = (start + 0.03 * linear.slope.sign()).clamp(0, 1)
    by_hand = torch.minimum(torch.maximum(step, x - 0.1), x + 0.1)
    assert torch.allclose(one, by_hand, atol=1e-6)
    out = train.pgd(linear, x, y, 0.1, 3, 0.2, gen, start=x + 5)
    assert (out - x).abs().max() <= 0.1 + 1e-6 and out.min() >= 0 and out.max() <= 1


def test_the_two_pgd_agree(net, gen):
    x, y = torch.rand(20, 3, 8, 8, generator=gen), torch.arange(20) % 10
    ours = train.pgd(net, x, y, 0.1, 5, 0.03, common.stream(2, "a"))
    theirs = attack.pgd(net, x, y, 0.1, 5, common.stream(2, "a"), step_size=0.03)
    assert torch.allclose(ours, theirs.x, atol=1e-6) and not torch.allclose(ours, x, atol=0.05)


def test_the_radius_is_none_then_grows_then_stays(net, data):
    """2 of 10 epochs are clean, half of the 8 others are the ramp."""
    flags = "--eps 0.3 --epochs 10 --clean-epochs 2 --eps-ramp 0.5"
    at = method_of("at", net, {"val": data}, flags)

    def radius(epoch, progress):
        return at.radius(batch_of(None, [0], progress=progress, epoch=epoch))

    assert [radius(1, 0.0), radius(2, 0.1999)] == [0, 0]
    assert radius(3, 0.2) == pytest.approx(0.3 * 0.001 / 0.5)
    assert [radius(5, 0.4), radius(6, 0.5)] == pytest.approx([0.15, 0.225])
    assert radius(7, 0.6) == radius(10, 0.99) == 0.3
    at = method_of("at", net, {"val": data}, "--eps 0.3 --clean-epochs 1")
    assert [radius(1, 0.05), radius(2, 0.1)] == [0, 0.3]


@pytest.mark.parametrize(
    "flags, steps, size",
    [
        ("--attack fgsm", 1, 0.125),
        ("--attack fgsm --step-size 0.05", 1, 0.05),
        ("--steps 3", 3, 0.035),
        ("--steps 2 --step-size 0.2", 2, 0.2),
        ("--beta 6 --steps 3", 3, 0.035),
        ("--augment student --steps 2", 2, 0.035),
        ("--steps 2 --eps-ramp 0.8 --step-size 0.08", 2, 0.05),
    ],
)
def test_at_attacks_with_the_loss_that_it_learns(net, data, gen, monkeypatch, flags, steps, size):
    seen = []

    def pgd(*args, inner=train.pgd):
        seen.append((args, inner(*args)))
        return seen[-1][1]

    monkeypatch.setattr(train, "pgd", pgd)
    at = method_of("at", net, {"val": data}, f"--eps 0.1 {flags}")
    x, y = data.x(slice(8)), data.labels[:8]
    loss = at.loss(net, batch_of(x, y, epoch=6), gen).item()
    (_, start, target, eps, *taken), attacked = seen[0][0][:6], seen[0][1]
    assert eps == pytest.approx(0.0625 if "ramp" in flags else 0.1)
    assert taken == [steps, pytest.approx(size)]
    assert (attacked - start).abs().max() <= eps + 1e-6
    how = seen[0][0][7]
    assert how(net(attacked), target).item() > how(net(start), target).item()
    if "beta" in flags:
        p, q = net(start).log_softmax(1), net(attacked).log_softmax(1)
        moved = (p.exp() * (p - q)).sum(1).mean()
        assert how(net(attacked), net(start)).item() == pytest.approx(moved.item(), rel=1e-4)
        assert loss == pytest.approx((F.nll_loss(p, y) + 6 * moved).item(), rel=1e-4)
        noise = (seen[0][0][8] - start).flatten()
        assert noise.std().item() == pytest.approx(0.001, rel=0.05)
        return
    smooth = 0.9 * target + 0.1 / 10 if "student" in flags else target
    by_hand = -(smooth * net(attacked).log_softmax(1)).sum(1).mean()
    assert loss == pytest.approx(by_hand.item(), rel=1e-4)
    assert ("student" in flags) == bool((target.amax(1) < 1).any())
    assert ("student" in flags) == (not torch.equal(start, x))


def test_at_is_plain_in_clean_epochs_and_clips_the_student_s_gradient(net, data, gen, monkeypatch):
    x, y = data.x(slice(8)), data.labels[:8]
    at = method_of("at", net, {"val": data}, "--clean-epochs 1")
    loss = at.loss(net, batch_of(x, y, epoch=1), gen)
    assert loss.item() == pytest.approx(F.cross_entropy(net(x), y).item(), rel=1e-6)
    at, given = method_of("at", net, {"val": data}, "--clean-epochs 1 --augment student"), []
    monkeypatch.setattr(train, "update", lambda *rest: given.append(rest))
    at.step(net, batch_of(x, y, epoch=1, weight=0.5), "optimiser", gen)
    assert given[0][0] == "optimiser" and given[0][2:] == (0.5, 1)


def test_val_is_attacked_with_ten_steps_at_the_full_radius(data, linear, monkeypatch):
    val = common.Split(torch.full((600, 3, 6, 5), 128).byte(), torch.zeros(600).long(), None, None)
    linear.fc, calls = torch.nn.Linear(2, 2), []
    at = method_of("at", linear, {"val": val}, "--eps 0.2 --eps-ramp 1")

    def pgd(model, x, y, eps, steps, size, gen):
        calls.append((len(x), eps, steps, size))
        held = torch.arange(len(x)) < 100  # by these the attack is held off
        return torch.where(held[:, None, None, None], x, x + 5 * linear.slope.sign())

    monkeypatch.setattr(train, "pgd", pgd)
    linear.eval()
    with torch.no_grad():
        linear.slope -= linear.slope.mean() + 0.1  # the middle of the pixels is class 0
    assert at.facts(linear) == {"val_pgd": pytest.approx(100 / 500)}
    assert calls == [(500, 0.2, 10, 0.05)]


def test_adversarial_training_holds_where_plain_training_breaks(tiny, tmp_path):
    tiny(tmp_path, n=300)
    splits = {name: common.load_split(tmp_path, name) for name in common.SPLITS}
    args = args_of("--method at --epochs 6 --clean-epochs 3 --lr 0.02 --batch 50")
    args.eps, args.steps = 0.08, 3
    torch.manual_seed(0)
    net = common.build_model(width=8)
    epochs, _ = train.train(net, train.AT(net, splits, args), splits, args)
    assert epochs[5]["val_pgd"] > epochs[2]["val_pgd"] + 0.2
