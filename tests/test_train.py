"""Training: every method learns and repeats, the jitters are what they say, and each score equals a count by hand."""

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as tv

import common
import train

from conftest import ROOT

KEYS = {
    "schema",
    "script",
    "name",
    "args",
    "world",
    "params",
    "selected_on",
    "selected_epoch",
    "final",
    "probe",
    "pca",
    "epochs",
    "run",
}
SCORE_KEYS = {
    "acc",
    "n",
    "per_digit",
    "worst_digit",
    "confusion",
    "worst_group",
    "follows_colour",
    "aligned",
    "conflicting",
    "n_conflicting",
}


@pytest.fixture
def splits(tiny, tmp_path):
    tiny(tmp_path)
    return common.load_splits(tmp_path)


def args_of(**flags):
    return train.get_args([f"--{k.replace('_', '-')}={v}" for k, v in flags.items()])


# ---- nets


def test_simplecnn_is_as_small_as_promised():
    assert sum(p.numel() for p in common.build_model().parameters()) == 4486


def test_pooling_before_relu_changes_nothing():
    torch.manual_seed(0)
    model, x = common.build_model(), torch.rand(8, 3, 28, 28)
    z = F.max_pool2d(F.relu(model.conv1(x)), 2)
    z = F.relu(model.conv3(F.max_pool2d(F.relu(model.conv2(z)), 2)))
    assert torch.allclose(model.features(x), z, atol=1e-6)


# ---- methods


@pytest.mark.parametrize("method", train.METHODS)
def test_every_method_moves_every_weight_and_stays_finite(method, splits, tmp_path):
    put_judge(tmp_path)
    torch.manual_seed(0)
    model = common.build_model()
    before = [p.detach().clone() for p in model.parameters()]
    epochs, _ = train.train(
        model, splits, args_of(method=method, epochs=1, batch=50, dir=tmp_path), "cpu"
    )
    assert math.isfinite(epochs[0]["loss"])
    for p, old in zip(model.parameters(), before):
        assert torch.isfinite(p).all() and not torch.equal(p, old)


def test_a_new_method_is_one_function_and_one_row(splits, monkeypatch):
    def brier(model, batch, args, gen):
        return (model(batch.x).softmax(1) - F.one_hot(batch.y, 10)).square().sum(1).mean()

    monkeypatch.setitem(train.METHODS, "brier", train.Method(brier, "nothing"))
    epochs, _ = train.train(common.build_model(), splits, args_of(method="brier", epochs=2), "cpu")
    assert epochs[1]["loss"] < epochs[0]["loss"]


def test_a_method_may_bring_weights_and_its_own_step(splits, monkeypatch):
    class Alternating(torch.nn.Module):
        def __init__(self, model, splits, args):
            super().__init__()
            self.scale, self.calls = torch.nn.Parameter(torch.ones(())), []
            instances.append(self)

        def step(self, objective, model, batch, optimiser, args, gen):
            self.calls.append(len(batch.y))
            return train.one_step(
                lambda *_: F.cross_entropy(self.scale * model(batch.x), batch.y),
                model,
                batch,
                optimiser,
                args,
                gen,
            )

    instances = []
    monkeypatch.setitem(train.METHODS, "alternating", train.Method(Alternating, "nothing"))
    train.train(
        common.build_model(), splits, args_of(method="alternating", epochs=1, batch=64), "cpu"
    )
    assert instances[0].calls == [64, 64, 64, 8] and instances[0].scale.item() != 1


def test_reversal_is_the_identity_forward_and_minus_gamma_backward():
    z = torch.tensor([1.0, -2.0], requires_grad=True)
    out = train.Reverse.apply(z, 0.3)
    (out * torch.tensor([5.0, 7.0])).sum().backward()
    assert out.tolist() == [1, -2]
    assert z.grad.tolist() == pytest.approx([-1.5, -2.1])


def test_kl_of_two_coins_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    assert train.kl(p.log(), q.log()).item() == pytest.approx(
        0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1), abs=1e-6
    )


def test_divergences_compare_the_image_with_its_recolouring():
    image, recoloured = torch.randn(6, 10), torch.randn(6, 10)
    p, q = image.softmax(1), recoloured.softmax(1)
    forward, reverse = ((a * (a / b).log()).sum(1).mean().item() for a, b in ((p, q), (q, p)))
    assert train.DIVERGENCES["forward"](image, recoloured).item() == pytest.approx(
        forward, abs=1e-5
    )
    assert train.DIVERGENCES["reverse"](image, recoloured).item() == pytest.approx(
        reverse, abs=1e-5
    )
    assert train.DIVERGENCES["symmetric"](image, recoloured).item() == pytest.approx(
        (forward + reverse) / 2, abs=1e-5
    )


@pytest.mark.parametrize(
    "flags, progress, by_hand",
    [
        ({}, 0.25, lambda ce, kl, alpha: ce("recoloured") + 0.75 * alpha * kl),
        ({"classify": "image"}, 0.25, lambda ce, kl, alpha: ce("image") + 0.75 * alpha * kl),
        ({"fade": None}, 0.25, lambda ce, kl, alpha: ce("recoloured") + alpha * kl),
        ({}, 1.0, lambda ce, kl, alpha: ce("recoloured")),
    ],
)
def test_the_loss_of_jitter_by_hand(flags, progress, by_hand):
    args = train.get_args(
        [
            f"--{'no-' * (v is None)}{k}" + ("" if v is None else f"={v}")
            for k, v in {**flags, "alpha": 3}.items()
        ]
    )
    logits = {"image": torch.randn(4, 10), "recoloured": torch.randn(4, 10)}
    batch = train.Batch(None, torch.tensor([1, 2, 3, 4]), None, None, progress)
    t = args.temperature
    kl = t**2 * train.kl(logits["image"] / t, logits["recoloured"] / t)
    loss = train.jitter_loss(logits["image"], logits["recoloured"], batch, args)
    assert loss.item() == pytest.approx(
        by_hand(lambda which: F.cross_entropy(logits[which], batch.y), kl, 3).item(), rel=1e-5
    )


def test_a_hot_temperature_compares_logits():
    """As T grows, T^2 KL tends to the squared difference of centred logits over twice the number of classes (Hinton et al., 2015)."""
    image, recoloured = (
        torch.randn(5, 10, dtype=torch.double),
        torch.randn(5, 10, dtype=torch.double),
    )
    batch = train.Batch(None, torch.zeros(5, dtype=torch.long), None, None, 0.0)
    loss = lambda alpha: train.jitter_loss(
        image, recoloured, batch, args_of(alpha=alpha, temperature=99)
    ).item()
    difference = (image - image.mean(1, keepdim=True)) - (
        recoloured - recoloured.mean(1, keepdim=True)
    )
    assert loss(1) - loss(0) == pytest.approx(
        difference.square().sum(1).mean().item() / 20, rel=0.03
    )


def test_without_the_kl_term_jitter_is_plain_augmentation(splits):
    model, batch = (
        common.build_model(),
        train.Batch(splits["train"].x(slice(0, 32)), splits["train"].labels[:32], None, None, 0.0),
    )
    loss = train.jitter(model, batch, args_of(alpha=0), common.stream(0, "j"))
    assert loss.item() == pytest.approx(
        F.cross_entropy(
            model(train.mix(batch.x, args_of(), common.stream(0, "j"))), batch.y
        ).item(),
        rel=1e-6,
    )


def test_lntl_cuts_colours_into_eight_bins_where_a_feature_sees_any(splits):
    model = common.build_model(width=16)
    lntl = train.LNTL(model, splits, args_of())
    x = torch.zeros(2, 3, 28, 28)
    x[1, :, 6:8, 9] = torch.tensor([0.0, 0.5, 1.0]).view(3, 1)
    with train.InputOf(model.conv2) as early:
        model(x)
    changed = (early.value[1] != early.value[0]).any(0).flatten().nonzero()[:, 0] + 14 * 14
    colour, seen = lntl.colour(x, None)
    assert set(changed.tolist()) <= set(seen.tolist()) and len(seen) <= 6, (
        "no feature that depends on the pixels goes unguarded"
    )
    assert colour.tolist() == [0, 4, 7] * len(seen)
    assert torch.equal(
        lntl.pixels(early.value, seen)[0], early.value.flatten(2)[1, :, seen[0] - 14 * 14]
    )


@pytest.mark.parametrize(
    "model, size", [("simplecnn", (28, 28)), ("saturatedcnn", (29, 33)), ("resnet18", (30, 32))]
)
def test_lntl_has_a_colour_for_every_feature_of_every_net(splits, model, size):
    x = torch.rand(2, 3, *size)
    net = common.build_model(model, size=size)
    lntl = train.LNTL(net, {"train": splits["train"]._replace(images=(x * 255).byte())}, args_of())
    with train.InputOf(train.early_layer(net)) as early:
        net(x)
    assert len(lntl.colour(x, None)[1]) == early.value[:, 0].numel()


def test_a_black_batch_teaches_lntl_no_colour(splits):
    model = common.build_model()
    lntl = train.LNTL(model, splits, args_of())
    batch = train.Batch(torch.zeros(4, 3, 28, 28), splits["train"].labels[:4], None, None, 0.5)
    assert math.isfinite(
        lntl.step(lntl, model, batch, torch.optim.SGD(model.parameters(), lr=0.1), args_of(), None)
    )


def test_lntl_teaches_the_heads_and_pushes_the_features_the_other_way(splits):
    """Against the gradients of the two losses, each computed on its own."""
    torch.manual_seed(0)
    model, x, y = (
        common.build_model().double(),
        splits["train"].x(slice(0, 8)).double(),
        splits["train"].labels[:8],
    )
    args = args_of(gamma=0.7, entropy=0.3)
    lntl = train.LNTL(common.build_model(), splits, args).double()
    batch = train.Batch(x, y, None, None, 0.5)

    def losses():
        colour, seen = lntl.colour(x, None)
        rows = F.relu(F.max_pool2d(model.conv1(x), 2)).permute(0, 2, 3, 1).reshape(-1, 4)[seen]
        guesses = lntl.spread(lntl.head(rows))
        p = guesses.softmax(1)
        return F.cross_entropy(model(x), y) + 0.3 * (p * p.log()).sum(1).mean(), F.cross_entropy(
            guesses, colour
        )

    weights = [model.conv1.weight, lntl.head[1].weight]
    hiding, naming = (torch.autograd.grad(loss, weights, retain_graph=True) for loss in losses())
    optimiser = torch.optim.SGD([*model.parameters(), *lntl.parameters()], lr=0)
    lntl.step(lntl, model, batch, optimiser, args, None)
    assert torch.allclose(model.conv1.weight.grad, hiding[0] - 0.7 * 0.5 * naming[0], atol=1e-10)
    assert torch.allclose(lntl.head[1].weight.grad, naming[1], atol=1e-10), (
        "the heads learn nothing from the entropy"
    )


def test_behind_a_saturated_activation_strong_colours_look_alike():
    x = torch.zeros(2, 3, 28, 28)
    x[0, 0], x[1, 1] = 1, 0.6
    spread = []
    for name in ("simplecnn", "saturatedcnn"):
        net = common.build_model(name)
        with torch.no_grad():
            net.conv1.weight.fill_(1.0)
        with train.InputOf(net.conv2) as early:
            net(x)
        spread.append(
            (early.value[0] - early.value[1]).abs().max().item() / early.value.max().item()
        )
    assert spread[0] > 0.3 and spread[1] < 0.01


# ---- adversarial training


@pytest.fixture
def picture():
    return torch.rand(40, 3, 12, 10, generator=torch.Generator().manual_seed(3))


def at_args(flags=""):
    return train.get_args(["--method", "at", *flags.split()])


def test_a_random_crop_is_a_shift_by_whole_pixels(picture):
    moved = train.moved(picture, at_args("--crop 2"), common.stream(0, "t"))
    padded = F.pad(picture, (2, 2, 2, 2), mode="replicate")
    crops = {(i, j): padded[:, :, i : i + 12, j : j + 10] for i in range(5) for j in range(5)}
    found = [
        [place for place, crop in crops.items() if torch.allclose(crop[k], moved[k], atol=1e-5)]
        for k in range(40)
    ]
    assert (
        all(len(places) == 1 for places in found) and len({places[0] for places in found}) > 10
    ), "every image has its own"


def test_half_are_mirrored_and_a_quarter_turn_is_a_quarter_turn(picture, monkeypatch):
    moved = train.moved(picture, at_args("--flip"), common.stream(0, "t"))
    same, mirrored = (
        (moved - other).abs().amax((1, 2, 3)) < 1e-5 for other in (picture, picture.flip(3))
    )
    assert (same ^ mirrored).all() and 8 < mirrored.sum() < 32
    monkeypatch.setattr(
        torch, "rand", lambda *shape, **_: torch.full(shape, 1 - 1e-7)
    )  # the largest draw turns by all of it
    turned = train.moved(picture[..., :10, :], at_args("--rotation 90"), None)
    assert min((turned - picture[..., :10, :].rot90(k, (2, 3))).abs().max() for k in (1, 3)) < 1e-4


def test_cutout_blackens_a_square_that_may_leave_the_image():
    x = torch.ones(300, 3, 12, 12)
    black = (train.cutout(x, 4, common.stream(0, "t")) == 0).all(1).sum((1, 2))
    assert (
        black.max() == 16
        and 4 <= black.min() < 16
        and (
            train.cutout(x, 4, common.stream(0, "t"))[:, 0]
            == train.cutout(x, 4, common.stream(0, "t"))[:, 1]
        ).all()
    )


def test_mixup_mixes_images_and_labels_with_one_weight(picture):
    soft = F.one_hot(
        torch.arange(40), 40
    ).float()  # as many classes as images, so that the labels say who was mixed
    x, labels = train.mixup(picture, soft, 0.5, common.stream(0, "t"))
    assert torch.allclose(labels.sum(1), torch.ones(40))
    assert torch.allclose(x, torch.einsum("ij,jchw->ichw", labels, picture), atol=1e-6)
    assert (labels.amax(1) < 1).any()


def test_the_radius_is_none_then_grows_then_stays():
    radius = lambda progress: train.AT.radius(
        None, progress, at_args("--eps 0.3 --epochs 10 --clean-epochs 2 --eps-ramp 0.5")
    )
    assert (
        radius(0.1999) is None
        and radius(0.4) == pytest.approx(0.15)
        and radius(0.6) == radius(1) == 0.3
    )
    assert train.AT.radius(None, 0, at_args("--eps 0.3")) == 0.3


@pytest.mark.parametrize(
    "flags",
    [
        "--attack fgsm",
        "--attack pgd --steps 3",
        "--beta 6 --steps 3",
        "--mixup 1 --label-smoothing 0.1 --steps 2",
    ],
)
def test_batches_are_attacked_in_the_ball_and_with_the_loss_that_is_learned(
    splits, monkeypatch, flags
):
    torch.manual_seed(0)
    model, seen = common.build_model(), []
    at, args = train.AT(model, splits, at_args()), at_args(f"--eps 0.1 {flags}")
    monkeypatch.setattr(
        train, "pgd", lambda *a, **k: seen.append((a, k, common.pgd(*a, **k))) or seen[-1][2]
    )
    x, y = splits["train"].x(slice(32)), splits["train"].labels[:32]
    loss = at(model, train.Batch(x, y, None, torch.arange(32), 0.5), args, common.stream(0, "t"))
    (_, start, target, eps, steps, _, size), named, attacked = seen[0]
    assert (
        (attacked.x - start).abs().max() <= 0.1 + 1e-6
        and eps == 0.1
        and 0 <= attacked.x.min() <= attacked.x.max() <= 1
    )
    assert (steps, size) == ((1, 0.125) if "fgsm" in flags else (args.steps, pytest.approx(0.035)))
    before, after = (named["loss"](model(z), target).item() for z in (start, attacked.x))
    assert after > before
    if args.beta:
        p, q = model(start).log_softmax(1), model(attacked.x).log_softmax(1)
        assert loss.item() == pytest.approx(
            F.nll_loss(p, y).item() + 6 * (p.exp() * (p - q)).sum(1).mean().item(), rel=1e-4
        )
    else:
        assert loss.item() == pytest.approx(after, rel=1e-4), (
            "a mixed batch is attacked with the mixed loss"
        )


def test_the_report_shows_which_epoch_was_kept(tiny, call, tmp_path):
    tiny(tmp_path / "results")
    tiny(tmp_path / "results" / "mnist")
    common.save_json(
        {"schema": 1, "recipe": "gray", "corr": 0.1, "seed": 42, "is_mnist": True},
        tmp_path / "results" / "mnist" / "meta.json",
    )
    for flags in (
        "",
        "--method at --epochs 2 --clean-epochs 1 --steps 1",
        "--method at --attack fgsm --dir results/mnist",
    ):
        call(f"train.py --epochs 1 {flags}")
    said = call("train.py --report").split("### Adversarial training")[1]
    assert "| mnist/at | `at --attack fgsm" in said and "phase" not in said and "| 2 of 2 |" in said
    assert (tmp_path / "results" / "figures" / "robust_training.png").exists()


def test_a_folder_with_only_train_pt_is_split_and_says_so(tiny, call, mistake, tmp_path):
    folder = tmp_path / "mine"
    tiny(folder, n=200, size=32)
    before = common.load_splits(folder)["train"]
    for name in ("meta.json", "val.pt", "test_hard.pt", "test_unbiased.pt"):
        (folder / name).unlink()
    said = call("train.py --dir mine --method at --epochs 1 --steps 1")
    assert "no val, test_hard, test_unbiased: 20 of the 200" in said
    record = json.loads((folder / "at_s42.json").read_text())
    assert (
        record["world"] == {"split_off": ["val", "test_hard", "test_unbiased"]}
        and record["final"]["test_hard"]["n"] == 20
    )
    parts = common.load_splits(folder)
    images = torch.cat([parts[name].images for name in ("train", "val", "test_hard")])
    assert len(images) == 200 and torch.equal(
        images.flatten(1).sum(1).sort()[0], before.images.flatten(1).sum(1).sort()[0]
    ), "every image is in one split"
    call("attack.py --dir mine --untargeted --models at_s42 --steps 2 --sweep 0.1")
    common.save_pt(
        {"images": before.images[:9].contiguous(), "labels": before.labels[:9]}, folder / "train.pt"
    )
    mistake("train.py --dir mine", "too few to split")


def test_balanced_groups_come_equally_often(splits):
    data, balanced = splits["train"], train.get_args(["--balance-groups"])
    group = data.labels * 10 + data.colors
    drawn = torch.cat(
        [group[train.draw_order(data, balanced, common.stream(k, "o"))] for k in range(50)]
    )
    present = group.unique()
    share = drawn.bincount(minlength=100)[present] / len(drawn) * len(present)
    assert (
        len(drawn) == 50 * len(group)
        and (share - 1).abs().max() < 0.25
        and (group.bincount()[present].float() / len(group) * len(present)).max() > 2
    )
    plain = train.draw_order(data, train.get_args([]), common.stream(1, "o"))
    assert torch.equal(plain.sort()[0], torch.arange(len(group)))
    assert (
        train.told_of("at --balance-groups --crop 2") == "colour labels"
        and train.told_of("at --crop 2") == "nothing"
    )


def test_bfloat16_changes_the_rounding_and_nothing_else(splits):
    """--amp: close to float32 in every epoch, float32 weights, and no trace of it in the model that is scored."""
    losses = []
    for flags in ([], ["--amp"]):
        torch.manual_seed(0)
        model = common.build_model()
        epochs, _ = train.train(
            model,
            splits,
            train.get_args(["--epochs", "2", "--batch", "50", "--lr", "0.01", *flags]),
            torch.device("cpu"),
        )
        losses.append([epoch["loss"] for epoch in epochs])
    assert losses[1] != losses[0] and losses[1] == pytest.approx(losses[0], rel=0.02)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model._forward_hooks
    with train.in_bf16(model, train.get_args(["--amp"])):
        assert (
            model(splits["val"].x(slice(4))).dtype == torch.float32
            and model.features(splits["val"].x(slice(4))).dtype == torch.bfloat16
        )


def test_bfloat16_sees_the_weights_of_the_last_update(splits):
    """One step of `grl` updates its head three times, and every time the head should have moved."""
    torch.manual_seed(0)
    args = train.get_args("--method grl --amp --lr 0.1".split())
    model = common.build_model()
    grl, losses = train.GRL(model, splits, args), []
    grl.colour_loss = lambda features, batch, inner=grl.colour_loss: (
        losses.append(inner(features, batch)) or losses[-1]
    )
    optimiser = torch.optim.AdamW([*model.parameters(), *grl.parameters()], lr=0.1)
    data = splits["train"]
    with train.in_bf16(model, args):
        grl.step(
            grl,
            model,
            train.Batch(data.x(slice(32)), data.labels[:32], data.colors[:32], None, 0.5),
            optimiser,
            args,
            common.stream(0, "t"),
        )
    assert len({round(loss.item(), 4) for loss in losses}) == 3


def test_a_clipped_update_has_the_norm_asked_for():
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    train.update(torch.optim.SGD([weight], lr=1.0), (weight**2).sum(), clip=0.5)
    assert torch.allclose(weight, torch.tensor([3.0, 4.0]) * (1 - 0.1))


def test_the_epoch_with_the_best_pgd_accuracy_on_val_is_kept_and_the_clean_phase_as_well(
    tiny, call, tmp_path, monkeypatch
):
    tiny(tmp_path / "results", n=100)
    told = iter((0.9, 0.1, 0.8, 0.3))
    monkeypatch.setattr(train.AT, "facts", lambda self, model, args: {"val_pgd": next(told)})
    call("train.py --method at --epochs 4 --clean-epochs 1 --steps 1 --seed 7")
    final, clean = (
        json.loads((tmp_path / "results" / f"{name}.json").read_text())
        for name in ("at_s7", "at_clean_s7")
    )
    assert (final["selected_on"], final["selected_epoch"]) == ("val_pgd", 3) and (
        clean["selected_on"],
        clean["selected_epoch"],
    ) == ("last epoch", 1)
    for record in (final, clean):
        assert (
            record["final"]["val"]["acc"] == record["epochs"][record["selected_epoch"] - 1]["val"]
        )
    _, kept = (
        common.load_model(tmp_path / "results", "at_s7"),
        common.load_model(tmp_path / "results", "at_clean_s7"),
    )
    assert kept[1]["args"]["phase"] == "clean"


def test_adversarial_training_holds_where_plain_training_breaks(tiny, tmp_path):
    """Val accuracy under attack rises when the batches are attacked; the same net and number of steps."""
    tiny(tmp_path, n=600)
    splits = common.load_splits(tmp_path)
    held = []
    for clean in (8, 2):
        torch.manual_seed(0)
        args = at_args("--eps 0.05 --epochs 8 --lr 0.01 --batch 50")
        args.clean_epochs = clean
        epochs, _ = train.train(common.build_model(width=8), splits, args, "cpu")
        held.append(epochs[-1]["val_pgd"])
    assert held[1] > held[0] + 0.2


# ---- Rob-GAN


@pytest.fixture
def judged_world(tiny, tmp_path):
    """Splits of a tiny world that has a judge, `results/baseline_s42.pt`."""
    tiny(tmp_path / "results", n=100)
    put_judge(tmp_path / "results")
    return common.load_splits(tmp_path / "results")


def put_judge(folder):
    torch.manual_seed(1)
    net = common.build_model()
    common.save_pt(
        {
            "weights": net.state_dict(),
            "args": train.settings(train.get_args([])),
            "classes": 10,
            "size": [28, 28],
        },
        folder / "baseline_s42.pt",
    )


def robgan(splits, folder, flags=""):
    torch.manual_seed(0)
    args = train.get_args(f"--method robgan --dir {folder / 'results'} --steps 1 {flags}".split())
    model = common.build_model()
    return model, train.RobGAN(model, splits, args), args


def test_onecycle_leaves_a_generator_without_momentum():
    weights = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimiser = torch.optim.AdamW(
        [{"params": weights[:1]}, {"params": weights[1:], "betas": train.RobGAN.betas}]
    )
    schedule = train.make_schedule(optimiser, train.get_args(["--schedule", "onecycle"]), 10)
    for _ in range(8):
        optimiser.step()
        schedule.step()
        assert 0.85 <= optimiser.param_groups[0]["betas"][0] <= 0.95 and optimiser.param_groups[1][
            "betas"
        ] == (0.0, 0.99)


def test_frechet_of_a_stretched_and_shifted_set_is_known():
    z = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)).double()
    shift = torch.tensor([1.0, 0, 0, 2.0, 0, 0]).double()
    move = (0.5 * z.mean(0) + shift).square().sum() + 0.25 * z.var(
        0
    ).sum()  # z to 1.5 z + shift: |0.5 mean + shift|^2 + 0.5^2 trace
    assert train.frechet(z, 1.5 * z + shift) == pytest.approx(
        move.item(), rel=1e-9
    ) and train.frechet(z, z) == pytest.approx(0, abs=1e-9)


def test_precision_and_recall_know_the_same_a_collapsed_and_a_foreign_set():
    real = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    assert train.precision_recall(real, real) == (1.0, 1.0) and train.precision_recall(
        real + 100, real
    ) == (0.0, 0.0)
    precision, recall = train.precision_recall(real[:5].repeat(40, 1), real)
    assert precision == 1.0 and recall < 0.1


def test_within_class_is_the_mean_distance_of_pairs():
    z, y = torch.tensor([[0.0, 0], [3, 4], [0, 0], [7, 0], [0, 1]]), torch.tensor([0, 0, 1, 0, 1])
    assert train.within_class(z, y, 2).tolist() == pytest.approx(
        [(5 + 7 + math.sqrt(16 + 16)) / 3, 1.0]
    )


def test_the_nearest_training_image_of_a_copy_is_itself(judged_world):
    data = judged_world["train"]
    copies = data._replace(images=data.images[40:60], labels=data.labels[40:60])
    told, pairs = train.nearest(copies, data, closest=3)
    assert (
        told["median"] < 0.05
        and told["closest"] == sorted(told["closest"])
        and torch.equal(pairs["close"], pairs["training"])
    )
    inverted = copies._replace(images=255 - copies.images)
    by_hand = (
        (inverted.x(slice(None)).mean(1)[:, None] - data.x(slice(None)).mean(1))
        .square()
        .sum((2, 3))
        .sqrt()
        .min(1)
        .values
    )
    assert train.nearest(inverted, data)[0]["median"] == pytest.approx(
        by_hand.quantile(0.5).item(), abs=1e-3
    )


def test_the_penalties_on_both_sides_are_those_of_a_linear_discriminator(
    judged_world, tmp_path, monkeypatch
):
    model, gan, args = robgan(judged_world, tmp_path, "--penalty 3 --gan 1")
    slope = torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(gan, "score", lambda model, x, y: (x * slope).sum((1, 2, 3)))
    monkeypatch.setattr(gan, "forward", lambda *_: torch.zeros((), requires_grad=True))
    monkeypatch.setattr(
        gan.generator,
        "draw",
        lambda y, gen: (
            judged_world["train"].x(slice(len(y))) + 0 * gan.generator.start[0].bias.sum()
        ),
    )
    optimiser = torch.optim.SGD([*model.parameters(), *gan.parameters()], lr=0.0)
    gan.step(
        gan,
        model,
        train.Batch(
            judged_world["train"].x(slice(8)), judged_world["train"].labels[:8], None, None, 0.0
        ),
        optimiser,
        args,
        common.stream(0, "t"),
    )
    assert gan.tally[0].item() == pytest.approx(
        math.log(2) + 3 / 2 * 2 * slope.square().sum().item(), rel=1e-4
    ), "real and generated are the same: log 2, and gamma / 2 (R1 + R2)"


def test_who_learns_in_which_step(judged_world, tmp_path):
    model, gan, args = robgan(judged_world, tmp_path, "--epochs 4 --finetune-epochs 1")
    optimiser = torch.optim.AdamW([*model.parameters(), *gan.parameters()], lr=0.01)
    batch = train.Batch(
        judged_world["train"].x(slice(16)), judged_world["train"].labels[:16], None, None, 0.0
    )
    now = lambda part: torch.cat([p.detach().flatten().clone() for p in part.parameters()])
    for progress, learn in ((0.5, (True, True, True, True)), (0.75, (True, False, False, False))):
        parts = (model, gan.generator, gan.average, gan.head)
        before = [now(part) for part in parts]
        gan.step(
            gan, model, batch._replace(progress=progress), optimiser, args, common.stream(0, "t")
        )
        assert tuple(not torch.equal(a, now(part)) for a, part in zip(before, parts)) == learn
    assert all(
        p.requires_grad for part in (model, gan.generator, gan.head) for p in part.parameters()
    )


def test_a_generator_that_ignores_its_latent_raises_the_alarm(
    judged_world, tmp_path, monkeypatch, capfd
):
    model, gan, args = robgan(judged_world, tmp_path)
    data = judged_world["train"]
    monkeypatch.setattr(gan, "sample", lambda y, gen: data.images[y])  # one picture per class
    facts = gan.facts(model, args)
    assert (
        facts["diversity"] == facts["diversity_worst"] == 0
        and "ALARM: the generator is collapsing" in capfd.readouterr().out
    )
    monkeypatch.setattr(gan, "sample", lambda y, gen: data.images)  # reality itself
    assert (
        gan.facts(model, args)["diversity"] == pytest.approx(1)
        and "ALARM" not in capfd.readouterr().out
    )
    assert (tmp_path / "results" / "figures" / "robgan_s42_epoch_02.png").exists()


def test_robgan_reports_beside_real_and_collapsed_images(tiny, call, mistake, tmp_path):
    tiny(tmp_path / "results", n=100)
    mistake("train.py --method robgan", "baseline_s42.pt is missing")
    call("train.py --epochs 1")
    mistake("train.py --method robgan --model resnet18", "batch norm")
    mistake("train.py --method robgan --finetune-epochs 10", "--finetune-epochs")
    call("train.py --method robgan --epochs 2 --finetune-epochs 1 --steps 1 --batch 50")
    measured = json.loads((tmp_path / "results" / "robgan_s42.json").read_text())["generator"][
        "measured"
    ]
    assert (
        measured.keys() == {"generated", "real", "collapsed"}
        and measured["collapsed"]["diversity"] == 0
    )
    assert (
        measured["real"]["agreement"]
        == json.loads((tmp_path / "results" / "baseline_s42.json").read_text())["final"][
            "test_unbiased"
        ]["acc"]
    )
    said = call("train.py --report").split("### Rob-GAN")[1]
    for name in re.findall(r"\((figures/.*?\.png)\)", said):
        assert (tmp_path / "results" / name).exists()
    assert said.count("figures/") == 3 and "| Frechet distance" in said


def test_a_grayscale_net_cannot_tell_colours_of_one_brightness(splits):
    model = common.build_model(grayscale=True)
    red, green = torch.zeros(2, 1, 3, 28, 28)
    red[:, 0, 5:9], green[:, 1, 5:9] = 0.587, 0.299
    assert torch.allclose(model(red), model(green), atol=1e-6)
    assert not torch.allclose(common.build_model()(red), common.build_model()(green), atol=1e-6)


# ---- jitter


@pytest.mark.parametrize("name", train.JITTERS)
def test_jitter_stays_in_range_differs_by_image_and_repeats_by_seed(name, splits):
    x = splits["train"].x(torch.zeros(16, dtype=torch.long))  # sixteen times the same picture
    out = train.JITTERS[name](x, args_of(), common.stream(0, "j"))
    assert out.shape == x.shape and 0 <= out.min() and out.max() <= 1
    assert torch.equal(out, train.JITTERS[name](x, args_of(), common.stream(0, "j")))
    assert (out[0] - out[1]).abs().max() > 0.02


def test_mix_makes_channels_affine_in_the_old_ones_but_for_one_common_grain():
    x = torch.rand(4, 3, 8, 8)
    out = train.mix(x, args_of(), common.stream(0, "j")).reshape(4, 3, 64)
    for i in range(4):
        design = torch.cat([x[i].reshape(3, 64), torch.ones(1, 64)]).T
        left = (
            out[i].T - design @ torch.linalg.lstsq(design, out[i].T).solution
        )  # (64,3): what no affine map explains
        first, second, _ = torch.linalg.svdvals(left)
        assert first > 1e-3 and second < 1e-4, (
            "the same grain in every channel, each scaled as the channel was"
        )


def test_hsv_equals_torchvision_with_the_same_factors(monkeypatch):
    x = torch.rand(5, 3, 16, 16)
    drawn = []

    def remember(x, gen, low, high):
        drawn.append(torch.rand(len(x), 1, 1, 1, generator=gen) * (high - low) + low)
        return drawn[-1]

    monkeypatch.setattr(train, "per_image", remember)
    out = train.hsv(x, args_of(), common.stream(0, "j"))
    brightness, contrast, saturation, turn = (d.flatten().tolist() for d in drawn)
    for i in range(5):
        by_hand = tv.adjust_saturation(
            tv.adjust_contrast(tv.adjust_brightness(x[i], brightness[i]), contrast[i]),
            saturation[i],
        )
        by_hand = tv.adjust_hue(by_hand, turn[i] / 6)
        assert torch.allclose(out[i], by_hand, atol=2e-3)


# ---- scores


def split_of(labels, colors):
    n = len(labels)
    return common.Split(
        torch.zeros(n, 3, 8, 8, dtype=torch.uint8),
        torch.tensor(labels),
        None if colors is None else torch.tensor(colors),
        None,
    )


def test_scores_equal_a_count_by_hand():
    s = train.score(
        torch.tensor([0, 1, 1, 2, 2, 0]), split_of([0, 0, 1, 1, 2, 2], [0, 1, 1, 2, 0, 0])
    )
    assert s["acc"] == pytest.approx(3 / 6) and s["n"] == 6
    assert s["per_digit"] == [0.5, 0.5, 0.5]
    assert s["follows_colour"] == pytest.approx(
        3 / 4
    )  # of four conflicting images three are called after their colour
    assert s["aligned"] == 1 and s["conflicting"] == pytest.approx(1 / 4)
    assert s["worst_group"] == {"acc": 0.0, "n": 1, "digit": 0, "colour": 1}
    assert s["confusion"] == [[1, 1, 0], [0, 1, 1], [1, 0, 1]]


def test_without_colours_the_rest_is_still_scored():
    s = train.score(torch.tensor([0, 1, 0]), split_of([0, 1, 1], None))
    assert (
        s["acc"] == pytest.approx(2 / 3)
        and s["worst_digit"] == 0.5
        and s["follows_colour"] is None
        and s["worst_group"] is None
    )


def test_probe_finds_what_is_linear_and_not_what_is_absent():
    gen = torch.Generator().manual_seed(0)
    y = torch.randint(0, 10, (2000,), generator=gen)
    noise = torch.randn(2000, 20, generator=gen)
    shown = noise + 8 * F.one_hot(y, 20)
    assert train.fit_linear(shown[:1000], y[:1000], shown[1000:], y[1000:]) > 0.99
    assert train.fit_linear(noise[:1000], y[:1000], noise[1000:], y[1000:]) < 0.17  # chance is 0.1


def test_pca_finds_the_direction_that_varies_most():
    gen = torch.Generator().manual_seed(0)
    along = torch.randn(300, generator=gen)
    z = torch.outer(along, torch.tensor([0.6, 0.8, 0.0])) + 0.01 * torch.randn(
        300, 3, generator=gen
    )
    points = train.pca(z, split_of([0] * 300, None))
    x = torch.tensor(points["x"])
    assert (
        abs(torch.corrcoef(torch.stack([x, along]))[0, 1]) > 0.999 and points["explained"][0] > 0.99
    )
    assert x[x.abs().argmax()] > 0 and points["colors"] is None
    assert train.pca(torch.zeros(300, 3), split_of([0] * 300, None))["explained"] == [0, 0], (
        "a dead net has no direction"
    )


# ---- the command


def outside_run(path):
    record = json.loads(path.read_text())
    record.pop("run")
    return record


def test_a_seed_repeats_a_run_and_another_does_not(tiny, call, tmp_path):
    tiny(tmp_path / "results")
    call("train.py --method combined --epochs 2 --name a")
    call("train.py --method combined --epochs 2 --name b")
    call("train.py --method combined --epochs 2 --name c --seed 43")
    a, b, c = (outside_run(tmp_path / "results" / f"{n}.json") for n in "abc")
    assert {**a, "name": ""} == {**b, "name": ""}
    assert a["epochs"] != c["epochs"]


def test_the_json_keys_are_the_promised_ones(tiny, call, tmp_path):
    tiny(tmp_path / "results")
    call("train.py --epochs 2")
    record = json.loads((tmp_path / "results" / "baseline_s42.json").read_text())
    assert (
        set(record) == KEYS
        and record["schema"] == 1
        and record["params"] == 4486
        and record["selected_on"] == "last epoch"
    )
    assert set(record["final"]) == {"val", "test_hard", "test_unbiased"}
    assert all(set(s) == SCORE_KEYS for s in record["final"].values())
    assert {"colour", "digit"} <= set(record["probe"])
    assert [e["epoch"] for e in record["epochs"]] == [1, 2] and {"loss", "val"} <= set(
        record["epochs"][0]
    )
    assert {"seconds", "torch", "threads", "device"} <= set(record["run"])


def test_eval_scores_a_saved_model_to_the_same_numbers(tiny, call, tmp_path):
    tiny(tmp_path / "results")
    call("train.py --epochs 1")
    path = tmp_path / "results" / "baseline_s42.json"
    before = path.read_bytes()
    path.write_text(json.dumps({**json.loads(before), "final": None, "probe": None}))
    call("train.py --eval baseline_s42")
    assert path.read_bytes() == before


class Stop(Exception):
    pass


def stop_after(epochs, how, monkeypatch):
    """Break off a training run by `how()` right after it has saved that many epochs."""

    def save_and_stop(record, path, save=train.save_pt):
        save(record, path)
        if str(path).endswith(".part.pt") and len(record["epochs"]) == epochs:
            how()

    monkeypatch.setattr(train, "save_pt", save_and_stop)


def raise_stop():
    raise Stop


def same_run(folder, one, other):
    records = [{**outside_run(folder / f"{name}.json"), "name": ""} for name in (one, other)]
    weights = [common.load_pt(folder / f"{name}.pt", "")["weights"] for name in (one, other)]
    return records[0] == records[1] and all(
        torch.equal(weights[0][k], weights[1][k]) for k in weights[0]
    )


@pytest.mark.parametrize(
    "flags",
    [
        "--method lntl --schedule onecycle",
        "--method lff --schedule cosine",
        "--method groupdro",
        "--method jtt",
        "--method robgan --steps 1 --finetune-epochs 1",
    ],
)
def test_a_broken_run_resumes_to_the_bytes_of_an_unbroken_one(
    tiny, call, tmp_path, monkeypatch, flags
):
    tiny(tmp_path / "results", n=100)
    put_judge(tmp_path / "results")
    call(f"train.py {flags} --epochs 3 --name whole")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(2, raise_stop, patch)
        call(f"train.py {flags} --epochs 3 --name broken")
    part = tmp_path / "results" / "broken.part.pt"
    assert part.exists() and not (tmp_path / "results" / "broken.json").exists()
    said = call(f"train.py {flags} --epochs 3 --name broken --resume")
    assert (
        "continuing after epoch 2" in said
        and "epoch  2/3" not in said.split("continuing")[1]
        and not part.exists()
    )
    assert same_run(tmp_path / "results", "whole", "broken")


def test_resume_after_kill_9_and_what_it_refuses(tiny, call, mistake, tmp_path):
    tiny(tmp_path / "results", n=100)
    code = (
        "import os, sys, pytest, train; from test_train import stop_after; "
        "stop_after(2, lambda: os.kill(os.getpid(), 9), pytest.MonkeyPatch()); train.main(['--epochs', '4'])"
    )
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True
        ).returncode
        == -9
    )
    mistake("train.py --epochs 5 --resume", "--epochs was 4")
    meta = (tmp_path / "results" / "meta.json").read_text()
    (tmp_path / "results" / "meta.json").write_text(meta.replace("0.9", "0.8"))
    mistake("train.py --epochs 4 --resume", "another painting")
    (tmp_path / "results" / "meta.json").write_text(meta)
    part = tmp_path / "results" / "baseline_s42.part.pt"
    left = part.read_bytes()
    part.write_bytes(left[:1000])
    mistake("train.py --epochs 4 --resume", "truncated")
    part.write_bytes(left)
    call("train.py --epochs 4 --resume")
    call("train.py --epochs 4 --name whole")
    assert same_run(tmp_path / "results", "whole", "baseline_s42")
    assert "starts with its first epoch" in call("train.py --epochs 1 --resume --name new")


def test_init_starts_from_an_earlier_run(tiny, call, mistake, tmp_path):
    tiny(tmp_path / "results")
    call("train.py --epochs 2")
    call("train.py --epochs 1 --lr 1e-9 --init baseline_s42 --name again")
    first, again = (
        json.loads((tmp_path / "results" / f"{name}.json").read_text())["final"]
        for name in ("baseline_s42", "again")
    )
    assert first["val"]["confusion"] == again["val"]["confusion"]
    mistake(
        "train.py --init baseline_s42 --width 5 --name wide", "--init baseline_s42 is another net"
    )


def test_a_world_without_colours_trains_and_says_who_cannot(tiny, call, mistake, tmp_path):
    tiny(tmp_path / "results")
    for name in common.SPLITS:
        record = common.load_pt(tmp_path / "results" / f"{name}.pt", "")
        common.save_pt(
            {"images": record["images"], "labels": record["labels"]},
            tmp_path / "results" / f"{name}.pt",
        )
    call("train.py --epochs 1")
    mistake("train.py --epochs 1 --method grl", "needs colour labels")
    mistake("train.py --epochs 1 --balance-groups", "needs colour labels")


def test_other_sizes_and_a_resnet_work(tiny, call, mistake, tmp_path):
    tiny(tmp_path / "results", n=40, size=32)
    call(
        "train.py --epochs 1 --model resnet18 --batch 39"
    )  # batch norm could not take the one image that is left over
    mistake("train.py --epochs 1 --model resnet18 --batch 1", "--batch 1 is too small")
    call("train.py --epochs 1 --method jitter --jitter hsv --width 3 --schedule onecycle")
    call("train.py --report")
    assert (tmp_path / "results" / "figures" / "learning_curves.png").exists()


def test_the_report_sets_methods_beside_oracle_and_published_figures(tiny, call, tmp_path):
    for folder, corr in (("results", 0.95), ("results/unbiased", 0.1)):
        tiny(tmp_path / folder)
        common.save_json(
            {
                "schema": 1,
                "recipe": "background",
                "corr": corr,
                "seed": 42,
                "limit": None,
                "is_mnist": True,
            },
            tmp_path / folder / "meta.json",
        )
    for flags in (
        "",
        "--seed 43",
        "--method grl",
        "--method jitter --jitter hsv",
        "--name again_s42",
        "--dir results/unbiased",
    ):
        call(f"train.py --epochs 2 {flags}")
    said = call("train.py --report")
    rows = {line.split("|")[1].strip(): line for line in said.splitlines() if line.startswith("|")}
    assert "(2)" in rows["baseline"] and "0.224" in rows["baseline"], (
        "two seeds; the same run under another name is not a third"
    )
    assert {"grl", "jitter --jitter hsv", "oracle"} <= rows.keys()
    assert "2 epochs" in said and "no test split chose an epoch or a seed" in said
    record = json.loads((tmp_path / "results" / "grl_s42.json").read_text())
    common.save_json(
        {**record, "world": {**record["world"], "corr": 0.5}}, tmp_path / "results" / "grl_s42.json"
    )
    assert "| grl " not in call("train.py --report"), (
        "a run on another painting of the world is left out"
    )


def test_the_report_sets_a_sweep_of_worlds_beside_the_published_table(tiny, call, tmp_path):
    tiny(tmp_path / "results")
    call("train.py --epochs 1")
    for corr in (0.999, 0.99):
        folder = f"results/flat_{str(corr)[2:]}"
        tiny(tmp_path / folder)
        common.save_json(
            {
                "schema": 1,
                "recipe": "flat",
                "corr": corr,
                "seed": 42,
                "limit": None,
                "is_mnist": True,
            },
            tmp_path / folder / "meta.json",
        )
        for seed in (42, 43):
            call(f"train.py --epochs 1 --dir {folder} --width 3 --seed {seed}")
    said = (
        call("train.py --report")
        .split("### Biased-MNIST")[1]
        .split("Colour that is still there")[0]
    )
    header, ours, *_, fair = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in said.splitlines()
        if line.startswith("|") and "---" not in line
    ]
    assert header[2:] == ["0.999", "0.997", "0.995", "0.99"]
    accs = [
        json.loads((tmp_path / f"results/flat_999/baseline_s{seed}.json").read_text())["final"][
            "test_unbiased"
        ]["acc"]
        for seed in (42, 43)
    ]
    assert ours[0] == "`baseline`" and ours[2] == common.mean_sd(accs) and ours[3] == "-", (
        "the usual budget of these worlds is their own"
    )
    assert fair[2:] == ["0.905", "0.962", "0.970", "0.979"]
    assert "width 3" in said and (tmp_path / "results" / "figures" / "flat.png").exists()


def test_the_report_shows_whether_the_colour_was_unlearned(tiny, call, tmp_path):
    tiny(tmp_path / "results")
    call("train.py --epochs 1")
    tiny(tmp_path / "results" / "lntl_020")
    common.save_json(
        {"schema": 1, "recipe": "digit", "corr": 1.0, "sigma2": 0.02, "seed": 42},
        tmp_path / "results" / "lntl_020" / "meta.json",
    )
    for flags in (
        "--method lntl",
        "--method lntl --two-updates --name twice",
        "--grayscale --name gray",
    ):
        call(f"train.py --epochs 1 --dir results/lntl_020 {flags}")
    record = json.loads((tmp_path / "results" / "lntl_020" / "lntl_s42.json").read_text())
    assert 0 <= record["epochs"][0]["head_colour"] <= 1 and len(record["pca"]["x"]) == 100
    said = call("train.py --report").split("### Learning Not to Learn")[1]
    assert "0.819" in said and {"`lntl`", "`baseline --grayscale`", "`lntl --two-updates`"} <= set(
        re.findall(r"`[^`]+`", said)
    )
    for picture in re.findall(r"\]\((figures/[^)]+)\)", said):
        assert (tmp_path / "results" / picture).exists(), picture


def test_a_flag_of_another_method_does_not_make_another_row(tiny, call, tmp_path):
    tiny(tmp_path / "results")
    for seed, flags in ((42, ""), (43, "--alpha 7 --group-step 0.5"), (44, "--width 5")):
        call(f"train.py --epochs 1 --seed {seed} {flags}")
    assert {label: len(runs) for label, runs in train.read_runs(tmp_path / "results").items()} == {
        "baseline": 2,
        "baseline --width 5": 1,
    }
    assert {flag for method in train.METHODS.values() for flag in method.flags} <= train.settings(
        train.get_args([])
    ).keys()


def test_the_report_draws_budgets_when_there_are_some(tiny, call, tmp_path):
    tiny(tmp_path / "results")
    for flags in ("--seed 42", "--seed 43", "--name wide --width 8", "--name long --epochs 2"):
        call(f"train.py --epochs 1 {flags}")
    said = call("train.py --report")
    assert "baseline --width 8" in said and "baseline --epochs 2" in said
    assert (tmp_path / "results" / "figures" / "budget.png").exists()


class Evil:
    def __reduce__(self):
        return print, ("code inside a pickle was run",)


def spoil_truncate(folder):
    path = folder / "train.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil(key, value):
    def change(folder):
        common.save_pt({**common.load_pt(folder / "train.pt", ""), key: value}, folder / "train.pt")

    return change


@pytest.mark.parametrize(
    "command, change, says",
    [
        ("train.py", lambda f: (f / "val.pt").unlink(), "val.pt is missing"),
        ("train.py", spoil_truncate, "truncated"),
        ("train.py", lambda f: (f / "train.pt").write_text("hello"), "not a .pt file"),
        ("train.py", lambda f: torch.save({"images": Evil()}, f / "train.pt"), "was not loaded"),
        ("train.py", lambda f: torch.save([1, 2], f / "train.pt"), "not a dictionary"),
        ("train.py", spoil("images", torch.zeros(200, 3, 28, 28)), "images is float32"),
        (
            "train.py",
            spoil("images", torch.zeros(200, 28, 28, dtype=torch.uint8)),
            "images is uint8 (200, 28, 28)",
        ),
        (
            "train.py",
            spoil("images", torch.zeros(200, 3, 4, 4, dtype=torch.uint8)),
            "should be uint8 (200, 4, 4)",
        ),
        ("train.py", spoil("labels", torch.full((200,), -1)), "classes count from 0"),
        ("train.py", spoil("labels", torch.zeros(3, dtype=torch.long)), "labels is int64 (3,)"),
        (
            "train.py",
            spoil("labels", torch.zeros(200, dtype=torch.long)),
            "has label 9 but training ends at class 0",
        ),
        ("train.py --eval nobody", None, "nobody.pt is missing"),
        ("train.py --method lazyness", None, "--method"),
        ("train.py --alpha nan", None, "--alpha"),
        ("train.py --epochs 0", None, "--epochs"),
        ("train.py --lr -1", None, "--lr"),
        ("train.py --temperature 0", None, "--temperature"),
        ("train.py --divergence sideways", None, "--divergence"),
        ("train.py --name ../../escape", None, "--name"),
        ("train.py --name val", None, "--name"),
        ("train.py --threads none", None, "--threads"),
        ("train.py --method jitter --alpha 1e39", None, "the loss is"),
        ("train.py --method at --eps 0", None, "--eps"),
        ("train.py --method at --clean-epochs 10", None, "leaves nothing of --epochs 10"),
        ("train.py --method at --attack cw", None, "--attack"),
        ("train.py --method at --step-size nan", None, "--step-size"),
        ("train.py --method at --crop -1", None, "--crop"),
        ("train.py --method at --mixup inf", None, "--mixup"),
        ("train.py --method at --recolour grey", None, "--recolour"),
        ("train.py --method at --label-smoothing 2", None, "--label-smoothing"),
        ("train.py --device cuda", None, "not available"),
        ("train.py --dir nowhere", None, "nowhere/train.pt is missing"),
        ("train.py --report --dir nowhere", None, "holds no results"),
    ],
)
def test_mistakes_get_one_line_and_lose_nothing(tiny, mistake, tmp_path, command, change, says):
    if "cuda" in command and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    tiny(tmp_path / "results", n=200)
    if change:
        change(tmp_path / "results")
    mistake(command, says)
