"""Rob-GAN: who learns what in which step, both losses on paper, and how samples are measured."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import common
import train


def put_judge(folder, size=(8, 8), classes=3):
    torch.manual_seed(1)
    net = common.build_model(classes=classes, size=size)
    args = train.settings(train.get_args([]))
    about = {"classes": classes, "size": [*size]}
    common.save_pt({"weights": net.state_dict(), "args": args, **about}, folder / "baseline_s42.pt")


def split_of(labels):
    gen = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (len(labels), 3, 8, 8), generator=gen).byte()
    return common.Split(images, torch.tensor(labels), None, None)


@pytest.fixture
def splits():
    return dict.fromkeys(common.SPLITS, split_of([0, 1, 2] * 8))


@pytest.fixture
def gan_of(splits, tmp_path):
    """(model, Rob-GAN) with some flags, on three classes of 8x8 pixels."""

    def make(flags=""):
        put_judge(tmp_path)
        torch.manual_seed(0)
        flags = f"--method robgan --dir {tmp_path} --steps 1 {flags}"
        model = common.build_model(classes=3, size=(8, 8))
        return model, train.RobGAN(model, splits, train.get_args(flags.split()))

    return make


@pytest.fixture
def gen():
    return common.stream(0, "test")


def batch_of(split, n=6, epoch=2, progress=0.5):
    index = torch.arange(n)
    return train.Batch(split.x(index), split.labels[:n], None, index, progress, epoch)


# ---- the generator


def test_a_generator_fits_every_size_and_reads_class_and_latent(gen):
    g = train.Generator(5, (30, 29), 1).eval()
    z, y = torch.randn(4, 64, generator=gen), torch.tensor([0, 1, 2, 3])
    x = g(z, y)
    assert x.shape == (4, 3, 30, 29) and x.min() >= 0 and x.max() <= 1
    assert torch.equal(x[:, 0], x[:, 2])
    assert not torch.equal(x, g(z, y + 1)) and not torch.equal(x, g(-z, y))
    by_hand = g.start(torch.cat([z, F.one_hot(y, 5).float()], 1))
    assert torch.equal(g.grow(by_hand)[:, :, :30, :29].expand(-1, 3, -1, -1), x)
    drawn = g.draw(y, common.stream(1, "z"))
    assert torch.equal(drawn, g(torch.randn(4, 64, generator=common.stream(1, "z")), y))
    assert train.Generator(5, (8, 8), 3)(z, y).unique(dim=1).shape[1] == 3


def test_the_averaged_generator_follows_slowly(gan_of):
    _, gan = gan_of()
    now, average = gan.generator.grow[0], gan.average.grow[0]
    for step in (1, 2, 10_000):
        gan.steps.fill_(step - 1)
        torch.nn.init.zeros_(average.bias)
        torch.nn.init.ones_(now.bias)
        gan.generator.grow[1].running_mean.fill_(step)
        gan.follow()
        share = max(0.002, 1 - step / (step + 10))  # 10/11, 10/12, then 1 - 0.998
        assert average.bias.tolist() == pytest.approx([share] * len(average.bias), rel=1e-4)
        assert gan.average.grow[1].running_mean[0] == step and gan.steps == step


def test_samples_come_from_the_averaged_generator_as_bytes(gan_of):
    _, gan = gan_of()
    average = gan.draws()
    assert average is gan.average is not gan.generator
    torch.nn.init.normal_(average.start[0].weight)
    y = torch.tensor([0, 1, 2]).repeat(400)
    sample, gen = train.sample(average, y, common.stream(0, "s")), common.stream(0, "s")
    drawn = torch.cat([average.draw(part, gen) for part in (y[:1000], y[1000:])])
    assert torch.equal(sample.images, (255 * drawn).round().byte())
    assert torch.equal(sample.labels, y) and sample.images.unique().numel() > 50


# ---- the losses


def test_the_head_scores_the_features_for_a_class(gan_of, splits):
    model, gan = gan_of()
    x, y = splits["train"].x(slice(4)), torch.tensor([0, 2, 1, 1])
    h = gan.head(model.features(x).flatten(1))
    by_hand = [
        (gan.real.weight[0] @ h[i] + gan.real.bias[0] + gan.belongs.weight[y[i]] @ h[i]).item()
        for i in range(4)
    ]
    assert gan.score(model, x, y).tolist() == pytest.approx(by_hand, abs=1e-4)


def test_the_discriminator_compares_pairs_and_is_penalised_for_its_slope(gan_of, monkeypatch, gen):
    """A linear score: 0.1 times both squared slopes, half of each, and softplus(fake - real)."""
    model, gan = gan_of()
    slope, classes = torch.randn(3, 8, 8, generator=gen) / 5, []

    def score(model, x, y):
        classes.append(y.tolist())
        return (x * slope).sum((1, 2, 3)) * (1 + y)

    monkeypatch.setattr(gan, "score", score)
    real, fake = torch.rand(2, 2, 3, 8, 8, generator=gen)
    y = torch.tensor([0, 2])
    loss = gan.discriminator_loss(model, real, fake, y)
    by_hand = 0.0
    for a, b, k in zip(real, fake, (1, 3), strict=True):
        lead = k * ((b - a) * slope).sum().item()
        by_hand += (math.log1p(math.exp(lead)) + 0.1 * k**2 * slope.square().sum().item()) / 2
    assert loss.item() == pytest.approx(by_hand, rel=1e-4) and classes == [[0, 2, 0, 2]]


def test_the_generator_wants_to_look_more_real_than_real(gan_of, monkeypatch):
    model, gan = gan_of()
    monkeypatch.setattr(gan, "score", lambda model, x, y: x.sum((1, 2, 3)) * (1 + y))
    real, fake = torch.zeros(2, 2, 3, 8, 8)
    real[:, 0, 0, 0], fake[:, 0, 0, 0] = torch.tensor([1.0, 0.5]), torch.tensor([0.3, 0.9])
    fake.requires_grad_()
    loss = gan.generator_loss(model, real, fake, torch.tensor([0, 1]))
    by_hand = (math.log1p(math.exp(1 - 0.3)) + math.log1p(math.exp(2 * (0.5 - 0.9)))) / 2
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    (grad,) = torch.autograd.grad(loss, fake)
    assert (grad < 0).all()  # down the loss, its pictures look more real


# ---- a step


def now(part):
    return torch.cat([p.detach().flatten().clone() for p in part.parameters()])


@pytest.mark.parametrize(
    "epoch, learn",
    [(1, (1, 0, 0, 0, 0)), (2, (1, 1, 1, 1, 1))],
)
def test_who_learns_in_which_phase(gan_of, splits, gen, epoch, learn):
    model, gan = gan_of("--epochs 4 --clean-epochs 1")
    optimiser = torch.optim.AdamW([*model.parameters(), *gan.parameters()], lr=0.01)
    parts = (model, gan.generator, gan.average, gan.head, gan.belongs)
    before = [now(part) for part in parts]
    gan.step(model, batch_of(splits["train"], epoch=epoch), optimiser, gen)
    moved = tuple(int(not torch.equal(a, now(part))) for a, part in zip(before, parts, strict=True))
    assert moved == learn
    parts = (model, gan.generator, gan.head, gan.real, gan.belongs)
    assert all(p.requires_grad for part in parts for p in part.parameters())


def remembering(name, function, seen):
    def remember(*args):
        seen[name] = args, function(*args)
        return seen[name][1]

    return remember


def test_a_joint_step_is_two_updates(gan_of, splits, gen, monkeypatch):
    """The net by its own loss and the discriminator's, the generator by its own, clipped once."""
    model, gan = gan_of("--augment student")
    updates, seen, inner = [], {}, train.update

    def update(optimiser, loss, *rest, **more):
        inner(optimiser, loss, *rest, **more)
        learns = [
            any(p.grad is not None and p.grad.abs().max() > 0 for p in part.parameters())
            for part in (model, gan.generator, gan.head)
        ]
        updates.append((loss.item(), rest, more, learns))

    monkeypatch.setattr(train, "update", update)
    for name in ("loss", "discriminator_loss", "generator_loss"):
        monkeypatch.setattr(gan, name, remembering(name, getattr(gan, name), seen))
    optimiser = torch.optim.SGD([*model.parameters(), *gan.parameters()], lr=0.0)
    batch = batch_of(splits["train"])
    shown = gan.step(model, batch, optimiser, gen)
    learned, against, towards = (seen[name][1].item() for name in seen)
    assert shown.item() == learned
    assert updates[0] == (pytest.approx(learned + against), (), {"clip": 1.0}, [True, False, True])
    assert updates[1] == (
        pytest.approx(towards),
        (),
        {"only": [*gan.generator.parameters()]},
        [False, True, False],
    )
    assert gan.tally.tolist() == pytest.approx([against, towards, 1])
    for name in ("discriminator_loss", "generator_loss"):
        _, real, fake, y = seen[name][0]
        assert real is batch.x and y is batch.y and fake.shape == real.shape
    assert not torch.equal(seen["discriminator_loss"][0][2], fake)  # drawn anew


def save_generator(folder, classes=3, size=(8, 8), channels=1):
    """A generator whose class k is a picture of brightness near k / classes."""
    generator = train.Generator(classes, size, channels)
    put_judge(folder, size, classes)
    checkpoint = common.load_pt(folder / "baseline_s42.pt", "")
    common.save_pt({**checkpoint, "generator": generator.half().state_dict()}, folder / "gan_s1.pt")
    return generator.float().eval()


def test_generated_pictures_take_their_share_of_attacked_batches(splits, tmp_path, monkeypatch):
    made = save_generator(tmp_path)
    flags = "--method at --generator gan_s1 --generated 0.7 --epochs 3 --clean-epochs 1"
    args = train.get_args([*flags.split(), "--dir", str(tmp_path)])
    model = common.build_model(classes=3, size=(8, 8))
    at, given = train.AT(model, splits, args), []
    monkeypatch.setattr(train, "pgd", lambda model, x, *_: given.append(x) or x)
    clean, attacked = (batch_of(splits["train"], epoch=e) for e in (1, 2))
    loss = at.loss(model, clean, common.stream(0, "g"))
    assert torch.equal(loss, F.cross_entropy(model(clean.x), clean.y)) and given == []
    at.loss(model, attacked, common.stream(0, "g"))
    assert torch.equal(given[0][4:], attacked.x[4:])  # 4 of 6 are generated, of the same classes
    assert torch.equal(given[0][:4], made.draw(attacked.y[:4], common.stream(0, "g")))
    assert not any(p.requires_grad for p in at.source.parameters()) and not at.source.training


def test_mistakes_with_generators_get_one_line(splits, tmp_path, dies):
    put_judge(tmp_path)
    save_generator(tmp_path, size=(12, 8))
    model = common.build_model(classes=3, size=(8, 8))
    for name, says in (
        ("nobody_s1", "nobody_s1.pt is missing"),
        ("baseline_s42", "holds no generator"),
        ("gan_s1", "is built for"),
    ):
        args = train.get_args(["--method", "at", "--generator", name, "--dir", str(tmp_path)])
        with dies(says):
            train.AT(model, splits, args)


def test_facts_are_means_of_the_epoch(gan_of):
    model, gan = gan_of()
    assert {*gan.facts(model)} == {"val_pgd"}
    gan.tally += torch.tensor([6.0, 9.0, 3.0])
    facts = gan.facts(model)
    assert (facts["loss_d"], facts["loss_g"]) == (2, 3)
    assert {*gan.facts(model)} == {"val_pgd"}


# ---- measuring samples


def test_within_class_is_the_mean_distance_of_pairs():
    z = torch.tensor([[0.0, 0], [3, 4], [0, 0], [7, 0], [0, 1]])
    labels = torch.tensor([0, 0, 1, 0, 1])
    by_hand = [(5 + 7 + math.sqrt(16 + 16)) / 3, 1.0, 0.0]
    assert train.within_class(z, labels, 3).tolist() == pytest.approx(by_hand)


def test_samples_are_compared_with_real_ones_class_by_class(monkeypatch):
    said, z = torch.tensor([0, 0, 1, 0]), torch.tensor([[0.0], [3.0], [1.0], [2.0]])
    monkeypatch.setattr(train, "answers_and_features", lambda judge, split: (said, z))
    told = train.compare(split_of([0, 0, 1, 1]), torch.tensor([2.0, 4.0]), None)
    assert told == {
        "agreement": 0.75,
        "diversity": pytest.approx((3 / 2 + 1 / 4) / 2),
        "diversity_worst": pytest.approx(1 / 4),
    }


def test_a_collapsed_control_has_one_training_image_a_class():
    data = split_of([2, 0, 1, 0, 2])
    control = train.collapsed(data, 3, torch.tensor([0, 2, 1, 0]))
    assert torch.equal(control.images, data.images[[1, 0, 2, 1]])
    assert control.labels.tolist() == [0, 2, 1, 0]


def test_robgan_by_the_command_line(tiny, call, mistake, tmp_path, unprobed):
    world = tmp_path / "results"
    tiny(world, n=80)
    mistake("train.py --method robgan", "baseline_s42.pt is missing")
    put_judge(world)
    mistake("train.py --method robgan", "built for 3 classes of (8, 8)")
    put_judge(world, (28, 28), 10)
    mistake("train.py --method robgan --model resnet18", "batch norm")
    mistake("train.py --method robgan --clean-epochs 10", "counts all phases")
    flags = "--epochs 2 --clean-epochs 1 --steps 1 --batch 40 --name gan_s42"
    call(f"train.py --method robgan {flags}")
    record = json.loads((world / "gan_s42.json").read_text())
    assert "gan_clean_s42.pt" in {p.name for p in world.iterdir()}
    call("train.py --method at --generator gan_s42 --epochs 1 --steps 1 --name more_s42")
    assert json.loads((world / "more_s42.json").read_text())["args"]["generated"] == 0.5
    generator = record["generator"]
    measured, judge = generator["measured"], common.load_model(world, "baseline_s42")[0]
    assert {*measured} == {"generated", "real", "collapsed"}
    keys = {"agreement", "diversity", "diversity_worst", "trained_on", "nearest"}
    assert all({*told} == keys for told in measured.values())
    test = common.load_split(world, "test_unbiased")
    said = common.predict(judge, test.images).argmax(1)
    right = (said == test.labels).double().mean().item()
    assert measured["real"]["agreement"] == right and measured["collapsed"]["diversity"] == 0
    assert measured["collapsed"]["nearest"] < 0.1 < measured["real"]["nearest"]  # of test_unbiased
    saved = common.load_pt(world / "gan_s42.pt", "")
    kept = train.Generator(10, (28, 28), 3)
    kept.load_state_dict({name: value.float() for name, value in saved["generator"].items()})
    assert generator["params"] == sum(p.numel() for p in kept.parameters())
    assert (generator["n"], generator["judge"]) == (40, "baseline_s42")
    shown = saved["shown"]
    assert {*shown} == {"real", "generated", "attacked"}
    assert all(x.shape == (40, 3, 28, 28) and x.dtype == torch.uint8 for x in shown.values())
    difference = (shown["attacked"].int() - shown["generated"].int()).abs().max()
    assert 0 < difference <= round(0.05 * 255)
    model = common.load_model(world, "gan_s42")[0]
    with torch.no_grad():
        said = model(shown["real"].float() / 255).argmax(1).tolist()
    assert saved["said"][0] == said and [len(s) for s in saved["said"]] == [40] * 3
    data = common.load_split(world, "train")
    first = [(data.labels == k).nonzero()[:4, 0] for k in range(10)]
    assert torch.equal(shown["real"], data.images[torch.cat(first)])


def test_a_judge_needs_four_images_a_class_and_must_tell_them_apart(splits, tmp_path, dies):
    args = train.get_args(["--method", "robgan", "--dir", str(tmp_path)])
    put_judge(tmp_path)
    few = {**splits, "test_unbiased": split_of([0, 1, 2] * 3)}
    same = torch.zeros(24, 3, 8, 8).byte()
    alike = {**splits, "train": splits["train"]._replace(images=same)}
    model = common.build_model(classes=3, size=(8, 8))
    for given, says in ((few, "needs four images of each class"), (alike, "cannot tell images")):
        with dies(says):
            train.RobGAN(model, given, args)


def test_a_grey_world_gets_a_grey_generator(splits, tmp_path):
    args = train.get_args(["--method", "robgan", "--dir", str(tmp_path)])
    put_judge(tmp_path)
    grey = splits["train"]._replace(images=splits["train"].images[:, :1].repeat(1, 3, 1, 1))
    model = common.build_model(classes=3, size=(8, 8))
    assert train.RobGAN(model, {**splits, "train": grey}, args).generator.grow[6].out_channels == 1
    assert train.RobGAN(model, splits, args).generator.grow[6].out_channels == 3


def test_the_nearest_training_image_is_found_in_every_chunk_and_the_median_taken():
    def split(images):
        return common.Split(images, torch.zeros(len(images), dtype=torch.long), None, None)

    pixels = torch.tensor([30, 51, 120, 255], dtype=torch.uint8).view(4, 1, 1, 1)
    many = torch.full((6001, 3, 8, 8), 204, dtype=torch.uint8)
    many[6000] = 51  # alone in the second chunk
    near = train.nearest(split(pixels.expand(4, 3, 8, 8)), split(many))
    assert near == pytest.approx(8 * 21 / 255, abs=1e-3)  # of 21, 0, 69 and 51 steps over 64 pixels
