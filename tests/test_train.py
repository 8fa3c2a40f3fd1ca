"""The training loop, its schedules and samplers, the scores, and the command with its files."""

import json
import math
import runpy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, split_of

import common
import train

KEYS = (
    "schema script name args knows world params selected_on selected_epoch final probe trained"
    " epochs run"
)
SCORE_KEYS = (
    "acc n per_digit worst_digit confusion worst_group follows_colour aligned conflicting"
    " n_conflicting"
)


def args_of(flags=""):
    return train.get_args(flags.split())


def fit(net, splits, flags=""):
    """(method, epochs, kept) of a training by these flags."""
    args = args_of(flags)
    method = train.METHODS[args.method](net, splits, args)
    return method, *train.train(net, method, splits, args)


@pytest.fixture
def splits():
    """Thirteen images to train on, and a few to score."""
    train_split = split_of([0, 1, 2] * 4 + [1], [0, 1, 1] * 4 + [2])
    return {"train": train_split, **dict.fromkeys(common.SPLITS[1:], split_of([0, 1], [1, 1]))}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return common.build_model(classes=3, size=(8, 8))


@pytest.fixture
def spy(monkeypatch):
    """A method that remembers what the loop gives it; the table has it under `baseline`."""

    class Spy(train.Baseline):
        def __init__(self, model, splits, args):
            super().__init__(model, splits, args)
            self.batches, self.drawn = [], []
            self.scale = torch.nn.Parameter(torch.ones(()))

        def step(self, model, batch, optimiser, gen):
            self.batches.append(batch)
            self.drawn.append(torch.rand((), generator=gen).item())
            return super().step(model, batch, optimiser, gen)

        def loss(self, model, batch, gen):
            return F.cross_entropy(self.scale * model(batch.x), batch.y)

    monkeypatch.setitem(train.METHODS, "baseline", Spy)
    return Spy


# ---- the loop


@pytest.mark.parametrize("schedule", ["constant", "cosine", "onecycle"])
def test_training_equals_a_loop_written_out(splits, net, schedule):
    """AdamW on batches of a fresh order every epoch; the rate by the formula of its schedule."""
    other, data, losses = common.build_model(classes=3, size=(8, 8)), splits["train"], []
    other.load_state_dict(net.state_dict())
    flags = f"--epochs 3 --batch 5 --lr 0.02 --schedule {schedule} --seed 7"
    _, epochs, kept = fit(net, splits, flags)
    optimiser = torch.optim.AdamW(other.parameters(), lr=0.02, weight_decay=1e-4)
    for step in range(9):
        up, down = min(1, step / 1.7), max(0, (step - 1.7) / 6.3)
        (group,) = optimiser.param_groups
        if schedule == "cosine":
            group["lr"] = 0.01 * (1 + math.cos(math.pi * step / 9))
        elif schedule == "onecycle":  # from lr / 25 up to lr at 0.3 of it, down to lr / 250,000
            ends = (1 / 25, 1, up) if step <= 1.7 else (1, 4e-6, down)
            turn = (1 - math.cos(math.pi * ends[2])) / 2
            group["lr"] = 0.02 * (ends[0] + (ends[1] - ends[0]) * turn)
            high_low = (0.95, 0.85) if step <= 1.7 else (0.85, 0.95)
            beta = high_low[0] + (high_low[1] - high_low[0]) * turn
            group["betas"] = (beta, 0.999)
        if step % 3 == 0:
            order = torch.randperm(13, generator=common.stream(7, f"order {step // 3 + 1}"))
        index = order[5 * (step % 3) : 5 * (step % 3) + 5]
        optimiser.zero_grad()
        loss = F.cross_entropy(other(data.images[index] / 255), data.labels[index])
        loss.backward()
        optimiser.step()
        losses.append(loss.item() * len(index))
    assert [e["loss"] for e in epochs] == pytest.approx(
        [sum(losses[i : i + 3]) / 13 for i in (0, 3, 6)], rel=1e-4
    )
    for name, value in other.state_dict().items():
        assert torch.allclose(value, kept[""].weights[name], atol=1e-5), name
    assert (kept[""].epoch, kept[""].on) == (3, "last epoch")


def test_what_a_method_is_given(splits, net, spy):
    method = fit(net, splits, "--epochs 2 --batch 5 --seed 7")[0]
    batches, data = method.batches, splits["train"]
    assert [len(b.y) for b in batches] == [5, 5, 3] * 2
    assert [b.epoch for b in batches] == [1] * 3 + [2] * 3
    assert [b.progress for b in batches] == pytest.approx([k / 6 for k in range(6)])
    assert sorted(torch.cat([b.index for b in batches[:3]]).tolist()) == [*range(13)]
    for b in batches:
        assert torch.equal(b.x, data.images[b.index] / 255) and b.weight == 1
        assert torch.equal(b.y, data.labels[b.index])
        assert torch.equal(b.colour, data.colors[b.index])
    for epoch in (1, 2):
        gen = common.stream(7, f"epoch {epoch}")
        by_hand = [torch.rand((), generator=gen).item() for _ in range(3)]
        assert method.drawn[3 * epoch - 3 : 3 * epoch] == by_hand
    assert method.scale.item() != 1  # its own weights join the optimiser


@pytest.mark.parametrize("flags", ["", "--method at", "--method at --augment student"])
def test_images_are_shifted_before_a_method_sees_them(splits, net, monkeypatch, flags):
    """Those of the student's recipe once, by the recipe; the first draws of an epoch's stream."""
    batches = []

    def loss(self, model, batch, gen):
        batches.append(batch)
        return F.cross_entropy(model(batch.x), batch.y)

    for method in (train.Baseline, train.AT):
        monkeypatch.setattr(method, "loss", loss)
    fit(net, splits, f"{flags} --epochs 1 --batch 13 --crop 1 --seed 7")
    (batch,) = batches
    x = splits["train"].images[batch.index] / 255
    moved = train.moved(x, 1, common.stream(7, "epoch 1"))
    assert torch.equal(batch.x, x if "student" in flags else moved) and not torch.equal(x, moved)


def test_a_line_that_is_rewritten_goes_to_a_terminal_only(splits, net, monkeypatch, capfd):
    """Sixty steps an epoch; after fifty of them the time left is shown."""
    splits["train"] = split_of([0, 1, 2] * 20, [0, 1, 1] * 20)
    fit(net, splits, "--epochs 2 --batch 1")
    said = capfd.readouterr().out
    assert [line[:10] for line in said.splitlines()] == ["epoch  1/2", "epoch  2/2"]
    assert "\r" not in said and "left" not in said
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    fit(net, splits, "--epochs 1 --batch 1")
    shown = capfd.readouterr().out.split("\r\x1b[K")
    assert shown[1].startswith("epoch  1/1") and shown[1].endswith("s left")
    assert shown[-1].startswith("epoch  1/1  loss ") and shown[-1].endswith("s\n")


def test_a_loss_that_is_not_finite_ends_the_run(splits, net, spy, monkeypatch, dies):
    for broken in (math.nan, math.inf):
        monkeypatch.setattr(spy, "loss", lambda self, model, *_, b=broken: b * self.scale)
        with dies(f"the loss is {broken} in epoch 1", "smaller --lr than 0.5"):
            fit(net, splits, "--epochs 2 --lr 0.5")


def test_a_single_image_joins_the_batch_before_and_a_resnet_needs_two(monkeypatch, dies):
    for n, sizes in ((13, [5, 5, 3]), (10, [5, 5]), (11, [5, 6]), (3, [3])):
        assert train.batch_sizes(n, 5, "simplecnn") == sizes
    assert train.batch_sizes(10, 4, "resnet18") == [4, 4, 2]
    monkeypatch.setattr(train, "PROCESSES", 2)  # for each process
    with dies("makes a batch of 2"):
        train.batch_sizes(10, 4, "resnet18")


@pytest.mark.parametrize(
    "flags, shares",
    [
        ("--method balance", [1, 1, 1, 1]),
        ("--method groupdro", [1, 1, 1, 1]),
        ("--method jitter --balance", [1, 1, 1, 1]),
        ("--method balance --resample 0.25", [18**0.75, 2**0.75, 1, 3**0.75]),
    ],
)
def test_groups_come_as_often_as_resampling_leaves_them(net, flags, shares):
    """Groups of 18, 2, 1 and 3 images."""
    data = split_of([0] * 20 + [1] * 4, [0] * 18 + [1] * 3 + [0] * 3)
    args = args_of(flags)
    r = train.METHODS[args.method](net, {"train": data}, args).resample
    draws = [train.draw_order(data, r, common.stream(k, "o")) for k in range(400)]
    share = torch.cat(draws).bincount(minlength=24) / (400 * 24)
    groups = [share[:18].sum(), share[18:20].sum(), share[20:21].sum(), share[21:].sum()]
    by_hand = [pytest.approx(s / sum(shares), abs=0.02) for s in shares]
    assert len(draws[0]) == 24 and groups == by_hand


def test_both_ends_of_resampling_draw_to_the_last_bit(net):
    data = split_of([0] * 20 + [1] * 4, [0] * 18 + [1] * 3 + [0] * 3)
    likely = torch.tensor([1 / 18] * 18 + [1 / 2] * 2 + [1.0] + [1 / 3] * 3, dtype=torch.double)
    drawn = torch.multinomial(likely, 24, replacement=True, generator=common.stream(1, "o"))
    assert torch.equal(train.draw_order(data, 1.0, common.stream(1, "o")), drawn)
    once = torch.randperm(24, generator=common.stream(1, "o"))
    assert torch.equal(train.draw_order(data, 0.0, common.stream(1, "o")), once)
    for flags in ("--method biasbal", "--method balance --resample 0", "--method grl", ""):
        args = args_of(flags)
        assert train.METHODS[args.method](net, {"train": data, "val": data}, args).resample == 0


def test_a_method_s_own_weights_have_a_rate_and_momentum_of_their_own(net):
    own = torch.nn.Linear(2, 2)
    own.lr_scale, own.betas = 3, (0.0, 0.99)
    optimiser = train.make_optimiser(net, own, 0.1)
    schedule, rates = train.make_schedule(optimiser, "onecycle", 10), []
    for _ in range(9):
        first, second = optimiser.param_groups
        assert second["lr"] == pytest.approx(3 * first["lr"])
        assert second["betas"] == (0.0, 0.99) and 0.85 <= first["betas"][0] <= 0.95
        assert first["weight_decay"] == second["weight_decay"] == 1e-4
        rates.append(first["lr"])
        optimiser.step()
        schedule.step()
    assert max(rates) == rates[2] == pytest.approx(0.1)
    assert [*map(id, second["params"])] == [*map(id, own.parameters())]


# ---- several processes


def test_the_gradients_of_all_shards_are_that_of_the_batch(splits, net, monkeypatch):
    data, index, sums = splits["train"], torch.tensor([3, 1, 4, 12, 5]), []
    optimiser = torch.optim.SGD(net.parameters(), lr=0.0)
    train.update(optimiser, F.cross_entropy(net(data.x(index)), data.labels[index]))
    whole = [p.grad.clone() for p in net.parameters()]
    monkeypatch.setattr(train, "PROCESSES", 3)
    monkeypatch.setattr(train, "all_reduce", lambda grads: sums.append([g.clone() for g in grads]))
    for rank in range(3):
        monkeypatch.setattr(train, "RANK", rank)
        mine, weight = train.shard(index)
        assert (len(mine), weight) == ((2, 0.4), (2, 0.4), (1, 0.2))[rank]
        train.update(optimiser, F.cross_entropy(net(data.x(mine)), data.labels[mine]), weight)
    for parts, grad in zip(zip(*sums, strict=True), whole, strict=True):
        assert torch.allclose(sum(parts), grad, atol=1e-6)
    mine, weight = train.shard(index[:2])
    assert (mine.tolist(), weight) == ([3], 0.0)  # an idle one, the third of two


def test_each_process_draws_alone_and_the_loss_is_of_all(splits, net, spy, monkeypatch):
    """As process 1 of 2: the second half of every batch, draws of its own, its share of the sum."""
    monkeypatch.setattr(train, "PROCESSES", 2)
    monkeypatch.setattr(train, "RANK", 1)
    monkeypatch.setattr(train, "all_reduce", lambda tensors: None)
    losses = []
    inner = spy.loss
    monkeypatch.setattr(
        spy, "loss", lambda self, *rest: losses.append(inner(self, *rest)) or losses[-1]
    )
    method, epochs, _ = fit(net, splits, "--epochs 1 --batch 5 --seed 7")
    assert [len(b.y) for b in method.batches] == [2, 2, 1]
    gen = common.stream(7, "epoch 1 of process 1")
    assert method.drawn == [torch.rand((), generator=gen).item() for _ in range(3)]
    order = torch.randperm(13, generator=common.stream(7, "order 1"))
    assert method.batches[0].index.tolist() == order[3:5].tolist()
    by_hand = sum(n * loss.item() for n, loss in zip((2, 2, 1), losses, strict=True)) / 13
    assert epochs[0]["loss"] == pytest.approx(by_hand, rel=1e-5)


def test_torchrun_is_for_methods_that_can_share_a_batch(mistake, monkeypatch):
    able = {name for name, method in train.METHODS.items() if method.can_shard}
    assert able >= {"baseline", "gce", "at", "jitter", "grl", "combined", "biasbal", "balance"}
    monkeypatch.setattr(train, "PROCESSES", 2)
    for name in ("lff", "jtt", "lntl", "groupdro", "robgan"):
        mistake(f"train.py --method {name}", f"--method {name} needs whole batches in one process")


@pytest.mark.slow  # two more starts of torch beside torchrun's own
def test_two_processes_learn_what_one_learns(tiny, call, tmp_path):
    tiny(tmp_path / "results", n=201)  # in batches of 50 the last one has 51, a share 26 or 25
    flags = "--epochs 3 --batch 50 --schedule onecycle --name"
    call(f"train.py {flags} one")
    before = {p.name for p in (tmp_path / "results").iterdir()}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *torchrun, str(ROOT / "train.py"), *flags.split(), "two"]
    how = {"cwd": tmp_path, "text": True, "capture_output": True, "timeout": 120}
    done = subprocess.run(command, **how)
    assert done.returncode == 0, done.stderr
    read = {name: (tmp_path / f"results/{name}_s42.json").read_text() for name in ("one", "two")}
    one, two = json.loads(read["one"]), json.loads(read["two"])
    losses = [e["loss"] for e in one["epochs"]]
    assert [e["loss"] for e in two["epochs"]] == pytest.approx(losses, abs=1e-5)
    assert two["final"]["val"]["acc"] == pytest.approx(one["final"]["val"]["acc"], abs=0.02)
    assert (one["run"]["processes"], two["run"]["processes"]) == (1, 2)
    assert one["args"] == two["args"]
    assert {p.name for p in (tmp_path / "results").iterdir()} - before == {
        "two_s42.pt",
        "two_s42.json",
    }
    for line in ("epoch  2/3", "wrote "):
        assert done.stdout.count(line) == 1, "the first process speaks for all"


def test_variables_that_are_not_torchruns_change_nothing(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    names = runpy.run_path(str(ROOT / "train.py"))
    assert (names["TORCHRUN"], names["PROCESSES"], names["RANK"]) == (False, 1, 0)


# ---- scores


def test_scores_equal_a_count_by_hand():
    predicted = torch.tensor([0, 1, 1, 2, 2, 0, 4, 4])
    split = split_of([0, 0, 1, 1, 2, 2, 4, 4], [0, 1, 1, 2, 0, 0, 2, 2])
    assert train.score(predicted, split) == {
        "acc": 5 / 8,
        "n": 8,
        "per_digit": [0.5, 0.5, 0.5, None, 1.0],
        "worst_digit": 0.5,
        "confusion": [
            [1, 1, 0, 0, 0],
            [0, 1, 1, 0, 0],
            [1, 0, 1, 0, 0],
            [0, 0, 0, 0, 0],
            [0, 0, 0, 0, 2],
        ],
        "worst_group": {"acc": 0.0, "n": 1, "digit": 0, "colour": 1},
        "follows_colour": 3 / 6,  # of six conflicting images three are called after their colour
        "aligned": 1.0,
        "conflicting": 3 / 6,
        "n_conflicting": 6,
    }


def test_with_two_shortcuts_it_counts_where_only_one_of_them_conflicts():
    """Six pictures of 0 and 1: colour and stripes own both, the colour only, the stripes only."""
    split = split_of([0, 1, 0, 1, 0, 1], [0, 1, 1, 0, 0, 1])
    split = split._replace(second=torch.tensor([0, 1, 0, 1, 1, 0]))
    s = train.score(torch.tensor([0, 1, 1, 1, 1, 1]), split)
    assert (s["only_first_conflicts"], s["only_second_conflicts"]) == (1 / 2, 1 / 2)
    assert (s["follows_colour"], s["follows_second"]) == (1 / 2, 1 / 2)
    table = train.accuracy_by_group(torch.tensor([0, 1, 1, 1, 1, 1]), split)
    assert table == [[0.5, 0.0], [1.0, 1.0]]
    assert train.accuracy_by_group(torch.tensor([1]), split_of([1], [0])) == [
        [None] * 2,
        [1.0, None],
    ]


def test_where_both_shortcuts_conflict_neither_is_counted_as_the_only_one():
    """Digit 0 in all four pictures: both own it, colour conflicts, stripes conflict, both do."""
    split = split_of([0] * 4, [0, 1, 0, 1])._replace(second=torch.tensor([0, 0, 1, 1]))
    for predicted, first, second in (([0, 0, 1, 1], 1, 0), ([0, 1, 0, 0], 0, 1)):
        s = train.score(torch.tensor(predicted), split)
        assert (s["only_first_conflicts"], s["only_second_conflicts"]) == (first, second)


def test_the_worst_group_is_the_one_with_the_lowest_accuracy():
    split = split_of([3, 3, 3, 1, 1], [7, 7, 7, 1, 1])
    s = train.score(torch.tensor([3, 0, 0, 1, 0]), split)
    assert s["worst_group"] == {"acc": pytest.approx(1 / 3), "n": 3, "digit": 3, "colour": 7}
    assert s["worst_digit"] == pytest.approx(1 / 3) and s["aligned"] == 0.5
    one_kind = train.score(torch.tensor([0, 1]), split_of([0, 1], [1, 0]))
    assert (one_kind["aligned"], one_kind["n_conflicting"]) == (None, 2)
    other_kind = train.score(torch.tensor([1, 1]), split_of([0, 1], [0, 1]))
    s = train.score(torch.tensor([0, 2, 0]), split_of([0, 1, 1]))  # without colours
    assert s["acc"] == pytest.approx(1 / 3) and s["per_digit"] == [1, 0, None]
    assert s["follows_colour"] is s["worst_group"] is s["aligned"] is s["n_conflicting"] is None
    assert (other_kind["conflicting"], other_kind["follows_colour"]) == (None, None)


@pytest.mark.parametrize(
    "confusion, learned",  # rows are labels, columns answers
    [
        ([[6, 4], [4, 6]], True),  # guessing and a tenth
        ([[6, 4], [5, 5]], False),
        ([[18, 0], [2, 0]], False),  # right on nine in ten, by one answer
        ([[17, 1], [2, 0]], False),
        ([[17, 0], [1, 2]], True),  # nine answers in ten are one
        ([[13, 6], [0, 1]], True),  # of labels 19 in 20
    ],
)
def test_a_net_has_learned_if_it_beats_guessing_by_more_than_one_answer(confusion, learned):
    right, n = sum(row[k] for k, row in enumerate(confusion)), sum(map(sum, confusion))
    assert train.trained({"acc": right / n, "confusion": confusion}) == learned


def test_a_net_gives_answers_and_penultimate_features(net):
    split = split_of([0] * 2100)
    with torch.no_grad():
        net.fc.bias -= net(split.x(slice(None))).mean(0)  # it has more than one answer
    said, z = train.answers_and_features(net.train(), split)
    with torch.no_grad():
        features = net.features(split.x(slice(None))).flatten(1)
        assert torch.allclose(z, features, atol=1e-5) and not net.training
        assert torch.equal(said, net.fc(features).argmax(1)) and len({*said.tolist()}) > 1


def test_the_penalty_of_the_fit_is_small_and_spares_the_bias():
    y = torch.tensor([1] * 18 + [0] * 2)
    z = (y[:, None] - 0.9) * 3
    for more, right in ({}, 20), ({"l2": 1e4}, 18):  # then only the bias is left
        weight, bias = train.fit_layer(z, y, 2, **more)
        assert (F.linear(z, weight, bias).argmax(1) == y).sum() == right


def test_the_probe_is_fitted_on_one_half_and_scored_on_the_other():
    """Features far from 0 and small; colours that mean something else in the odd images."""
    gen = torch.Generator().manual_seed(0)
    y, colour = torch.randint(0, 4, (2, 400), generator=gen)
    shown = torch.where(torch.arange(400) % 2 == 0, colour, (colour + 1) % 4)
    z = torch.cat([F.one_hot(y, 4), F.one_hot(shown, 4)], 1) * 0.001 + 100
    z += 0.0001 * torch.randn(z.shape, generator=gen)
    split = split_of(y.tolist(), colour.tolist())
    assert train.probe(z, split) == {"n_fit": 200, "n": 200, "colour": 0.0, "digit": 1.0}
    assert train.probe(z[:399], split_of(y[:399].tolist())) == {
        **{"n_fit": 200, "n": 199},
        **{"colour": None, "digit": 1.0},
    }


# ---- the command


@pytest.fixture
def world(tiny, tmp_path, unprobed):
    tiny(tmp_path / "results", n=60)
    return tmp_path / "results"


def outside_run(path):
    record = json.loads(path.read_text())
    record.pop("run")
    return record


@pytest.mark.parametrize(
    "flags, name",
    [
        ("--method jitter", "jitter_s42"),
        ("--epochs 30", "baseline_epochs30_s42"),
        ("--method jitter --jitter hsv", "jitter_hsv_s42"),
        ("--method jitter --no-fade --seed 7", "jitter_nofade_s7"),
        ("--lr 0.01 --schedule onecycle", "baseline_lr0.01_onecycle_s42"),
        ("--method grl --gamma 1 --dir x --device cpu --threads 2", "grl_gamma1_s42"),
        ("--grayscale", "baseline_grayscale_s42"),
        ("--method at --augment student", "at_student_s42"),
        ("--method at --augment student --crop 2", "at_crop2_student_s42"),
        ("--name mine", "mine_s42"),
        ("--name mine_s7 --seed 7", "mine_s7"),
    ],
)
def test_a_run_is_named_after_what_differs(flags, name):
    assert args_of(flags).name == name


def test_the_defaults_are_the_budget_of_every_table():
    usual = train.settings(args_of())
    budget = {"epochs": 10, "lr": 1e-3, "schedule": "constant", "batch": 128, "width": 4}
    assert budget.items() <= usual.items()
    assert usual["model"] == "simplecnn" and usual["method"] == "baseline" and usual["seed"] == 42
    assert not {"name", "dir", "device", "threads", "resume", "overwrite"} & usual.keys()


def test_a_user_s_own_method_needs_a_class_in_a_file_only(world, call, mistake, monkeypatch):
    """It has the flags of the method that it extends, and no others."""
    monkeypatch.setattr(train, "METHODS", dict(train.METHODS))
    (world.parent / "mine.py").write_text(
        "class Mine(Resample):\n"
        "    def digit_loss(self, logits, batch):\n"
        "        return super().digit_loss(logits, batch) / 2\n"
    )
    call("train.py --method mine.py --resample 0.5 --epochs 1")
    record = outside_run(world / "mine_resample0.5_epochs1_s42.json")
    assert record["knows"] == "colour labels" and record["args"]["resample"] == 0.5
    mistake("train.py --method mine --alpha 1", "--alpha means nothing for --method mine")


@pytest.fixture
def coloured(tiny, tmp_path, unprobed):
    """A world with so many small pictures that a first net can learn their colours."""
    tiny(tmp_path / "results", n=2000, size=12)
    path = tmp_path / "results" / "train.pt"
    record = common.load_pt(path, "")
    own = torch.arange(2000) % 50 > 0  # one in fifty conflicts
    common.save_pt({**record, "labels": torch.where(own, record["colors"], 0)}, path)
    return tmp_path / "results"


def test_the_first_net_is_the_same_whatever_the_second(coloured, call):
    groups = []
    for flags in (
        "--method balance --resample 0.2 --crop 2 --width 6",
        "--method grl --model mlp --batch 500 --lr 0.01 --schedule onecycle --grayscale",
    ):
        said = call(f"train.py {flags} --infer-groups --epochs 1 --name a --overwrite")
        record = outside_run(coloured / "a_s42.json")
        groups.append(record["groups"])
        assert said.count("first net, epoch") == groups[-1]["epochs"]
    assert groups[0] == groups[1]
    assert {*groups[0]} == {"epochs", "equal_label", "equal_colour", "equal_colour_conflicting"}
    assert groups[0]["equal_label"] > 0.9 and groups[0]["equal_colour"] > 0.9


def test_a_seed_repeats_a_run_and_another_does_not(world, call):
    names = "a_s42", "b_s42", "c_s43"
    for name in names:
        call(f"train.py --method combined --epochs 1 --name {name[0]} --seed {name[3:]}")
    a, b, c = (outside_run(world / f"{name}.json") for name in names)
    assert {**a, "name": ""} == {**b, "name": ""} and a["epochs"] != c["epochs"]
    weights = [common.load_pt(world / f"{name}.pt", "")["weights"] for name in names]
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())
    call("train.py --epochs 1 --lr 1e-8 --name first --seed 8")  # the seed's first weights
    torch.manual_seed(8)
    first = common.load_pt(world / "first_s8.pt", "")["weights"]
    for name, value in common.build_model().state_dict().items():
        assert torch.allclose(first[name], value, atol=1e-6)


def test_the_json_keys_are_the_promised_ones_and_the_terminal_says_the_answer(tiny, call, tmp_path):
    world = tmp_path / "results"
    tiny(world, n=60)
    few = {k: v[:20] for k, v in common.load_pt(world / "test_unbiased.pt", "").items()}
    common.save_pt(few, world / "test_unbiased.pt")
    said = call("train.py --epochs 2 --lr 0.002")
    record = json.loads((world / "baseline_epochs2_lr0.002_s42.json").read_text())
    assert {*record} == {*KEYS.split()} and record["schema"] == 1 and record["params"] == 4486
    assert record["script"] == "train.py" and record["name"] == "baseline_epochs2_lr0.002_s42"
    assert (record["selected_on"], record["selected_epoch"]) == ("last epoch", 2)
    assert record["world"] == train.world_of(world) != {}
    assert record["args"] == train.settings(args_of("--epochs 2 --lr 0.002"))
    assert {*record["final"]} == {"val", "test_hard", "test_unbiased"}
    by_group = record["final"]["test_unbiased"].pop("by_group")
    worst = record["final"]["test_unbiased"]["worst_group"]
    assert by_group[worst["digit"]][worst["colour"]] == round(worst["acc"], 4)
    assert all({*s} == {*SCORE_KEYS.split()} for s in record["final"].values())
    assert {*record["probe"]} == {"colour", "digit", "n", "n_fit"} and record["probe"]["n"] == 10
    keys = {"epoch", "loss", "val", "val_aligned", "val_conflicting", "test_hard", "follows"}
    assert [{*e} for e in record["epochs"]] == [keys] * 2
    val, hard = record["final"]["val"], record["final"]["test_hard"]
    last = {key: record["epochs"][1][key] for key in keys - {"epoch", "loss"}}
    assert last == {
        **{"val": val["acc"], "val_aligned": val["aligned"]},
        **{"val_conflicting": val["conflicting"], "test_hard": hard["acc"]},
        "follows": hard["follows_colour"],
    }
    model = common.load_model(world, record["name"])[0]
    for name, scores in record["final"].items():
        split = common.load_split(world, name)
        right = common.predict(model, split.images).argmax(1) == split.labels
        assert (scores["acc"], scores["n"]) == (right.double().mean().item(), len(right))
    assert record["run"] == {
        **{"torch": torch.__version__, "device": "cpu"},
        **{"threads": 1, "processes": 1},
    }
    assert (world / "times.csv").read_text().startswith("baseline_epochs2_lr0.002_s42,")
    lines = said.splitlines()
    assert "2 epochs" in lines[0] and "4,486 parameters" in lines[0]
    assert lines[0].endswith("cpu; epochs 2, lr 0.002")
    assert lines[1].startswith("epoch  1/2  loss ") and len(lines) < 15
    assert f"test_hard     {hard['acc']:.3f} of 30, worst digit {hard['worst_digit']:.3f}" in said
    assert f"colour's digit {hard['follows_colour']:.1%} of the time" in said
    assert f"the colour with {record['probe']['colour']:.3f}, the digit" in said
    assert "|" not in said and "gradcam.py" in lines[-1]
    kept = common.load_pt(world / "baseline_epochs2_lr0.002_s42.pt", "")
    assert {*kept} == {"script", "weights", "args", "classes", "size", "trained"}
    assert (kept["classes"], kept["size"]) == (10, [28, 28]) and kept["args"] == record["args"]


def test_a_result_of_other_settings_is_not_replaced(world, call, mistake):
    call("train.py --epochs 1 --name mine")
    before = outside_run(world / "mine_s42.json")
    mistake("train.py --epochs 2 --name mine", "epochs 1")
    call("train.py --epochs 1 --name mine --threads 1")  # the same command may run again
    assert outside_run(world / "mine_s42.json") == before
    call("train.py --epochs 2 --name mine --overwrite")
    assert len(outside_run(world / "mine_s42.json")["epochs"]) == 2
    call("train.py --epochs 1 --name at_clean_s42")
    mistake("train.py --method at --epochs 2 --clean-epochs 1 --name at_s42", "at_clean_s42.json")


def test_both_phases_of_adversarial_training_are_results(world, call, monkeypatch):
    """Of the clean phase its last epoch; of the other the best, the later of two equal ones."""
    values = (0.9, 0.8, 0.6, 0.6, 0.3)
    pgd = iter(values)
    monkeypatch.setattr(train.AT, "facts", lambda self, model: {"val_pgd": next(pgd)})
    flags = "--epochs 5 --clean-epochs 2 --steps 1 --lr 0.02 --name robust_s7 --seed 7"
    call(f"train.py --method at {flags}")
    found = {}
    for name in ("robust_s7", "robust_clean_s7"):
        record = outside_run(world / f"{name}.json")
        found[record["name"]] = record["selected_on"], record["selected_epoch"]
        kept = record["epochs"][record["selected_epoch"] - 1]
        assert record["val_pgd"] == values[record["selected_epoch"] - 1]
        for other in record["epochs"]:  # the weights are those of the kept epoch and of no other
            scores = other["val"], other["test_hard"], other["follows"]
            final = record["final"]["val"], record["final"]["test_hard"]
            same = scores == (final[0]["acc"], final[1]["acc"], final[1]["follows_colour"])
            assert same == (other == kept), (name, other["epoch"])
        args = common.load_model(world, name)[1]["args"]
        assert args.get("phase") == ("clean" if "clean" in name else None)
    assert found == {"robust_s7": ("val_pgd", 4), "robust_clean_s7": ("last epoch", 2)}


def test_a_null_model_learns_permuted_labels_of_the_training_split_only(world):
    plain, shuffled = (
        train.load_splits(args_of(f"--dir {world} {flag}"), torch.device("cpu"))
        for flag in ("", "--shuffle-labels")
    )
    assert (plain["train"].labels != shuffled["train"].labels).double().mean() > 0.7
    assert torch.equal(plain["train"].labels.bincount(), shuffled["train"].labels.bincount())
    assert torch.equal(plain["train"].images, shuffled["train"].images)
    assert torch.equal(plain["val"].labels, shuffled["val"].labels)


class Stop(Exception):
    pass


def stop_after(epochs, monkeypatch):
    """Break off a training run right after it has saved that many epochs."""

    def save_and_stop(record, path, save=train.save_pt):
        save(record, path)
        if str(path).endswith(".part.pt") and len(record["epochs"]) == epochs:
            raise Stop

    monkeypatch.setattr(train, "save_pt", save_and_stop)


@pytest.mark.parametrize(
    "flags",
    [
        "--method lntl --schedule onecycle",
        "--method lff --schedule cosine",
        "--method groupdro",
        "--method jtt",
    ],
)
def test_a_broken_run_resumes_to_the_bytes_of_an_unbroken_one(world, call, monkeypatch, flags):
    call(f"train.py {flags} --epochs 2 --name whole")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(1, patch)
        call(f"train.py {flags} --epochs 2 --name broken")
    part = world / "broken_s42.part.pt"
    assert part.exists() and not (world / "broken_s42.json").exists()
    said = call(f"train.py {flags} --epochs 2 --name broken --resume").split("after epoch 1")[1]
    assert "epoch  2/2" in said and "epoch  1/2" not in said and not part.exists()
    one, other = ({**outside_run(world / f"{n}_s42.json"), "name": ""} for n in ("whole", "broken"))
    assert one == other
    weights = [common.load_pt(world / f"{n}_s42.pt", "")["weights"] for n in ("whole", "broken")]
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


def test_what_resume_refuses(world, call, mistake, monkeypatch):
    assert "starts with its first epoch" in call("train.py --epochs 1 --resume --name new")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(1, patch)
        call("train.py --epochs 2 --name mine")
    mistake("train.py --epochs 3 --name mine --resume", "epochs was 2")
    meta = (world / "meta.json").read_text()
    (world / "meta.json").write_text(meta.replace("0.9", "0.8"))
    mistake("train.py --epochs 2 --name mine --resume", "world was")
    (world / "meta.json").write_text(meta)
    part = world / "mine_s42.part.pt"
    left = common.load_pt(part, "")
    common.save_pt({**left, "run": {**left["run"], "processes": 2}}, part)
    mistake("train.py --epochs 2 --name mine --resume", "processes was 2")
    common.save_pt({**left, "model": {}}, part)
    mistake("train.py --epochs 2 --name mine --resume", "mine_s42.part.pt does not fit this run")
    part.write_bytes(part.read_bytes()[:1000])
    mistake("train.py --epochs 2 --name mine --resume", "mine_s42.part.pt is no dictionary")


def change_all(folder, change):
    for name in common.SPLITS:
        path = folder / f"{name}.pt"
        common.save_pt(change(common.load_pt(path, "")), path)


def test_a_world_of_one_s_own_trains_and_says_who_cannot(world, call, mistake):
    (world / "meta.json").unlink()
    change_all(world, lambda record: {key: record[key] for key in ("images", "labels")})
    call("train.py --epochs 1")
    record = outside_run(world / "baseline_epochs1_s42.json")
    assert record["world"] == {} and record["probe"]["colour"] is None
    for flags in ("--method grl", "--method groupdro", "--method balance", "--method at --balance"):
        mistake(f"train.py --epochs 1 {flags}", "needs a colour label")
    stuck = "after 5 epochs the first net is right on 0.000 of class"
    mistake("train.py --epochs 1 --method groupdro --infer-groups", stuck)
    call("train.py --epochs 1 --method lntl")
    change_all(world, lambda r: {**r, "images": r["images"].permute(0, 2, 3, 1)})
    mistake("train.py --epochs 1", "images.permute(0, 3, 1, 2)")


def test_one_or_two_classes_and_a_test_split_without_colours_are_enough(tiny, tmp_path, call):
    world = tmp_path / "results"
    tiny(world, n=60)
    change_all(world, lambda record: {**record, "labels": record["labels"] % 2})
    change_all(world, lambda record: {**record, "colors": record["colors"] % 2})
    record = common.load_pt(world / "test_unbiased.pt", "")
    common.save_pt({**record, "colors": None}, world / "test_unbiased.pt")
    said = call("train.py --method balance --epochs 1 --name two_s42")
    assert "test_unbiased" in said and "a linear probe" not in said
    change_all(world, lambda record: {**record, "labels": record["labels"] * 0})
    call("train.py --epochs 1")  # dull, but no mistake


def test_other_sizes_and_a_resnet_work(tiny, splits, call, mistake, tmp_path, unprobed):
    resnet = common.build_model("resnet18", classes=3, size=(8, 8))
    first = resnet.conv1.weight.detach().clone()
    _, (epoch,), _ = fit(resnet, splits, "--epochs 1 --model resnet18 --batch 6")
    assert math.isfinite(epoch["loss"]) and not torch.equal(first, resnet.conv1.weight)
    tiny(tmp_path / "results", n=40, size=32)
    mistake("train.py --epochs 1 --model resnet18 --batch 1", "--batch 1 makes a batch of 1")
    call("train.py --epochs 1 --method jitter --jitter hsv --width 3")
    record = common.load_pt(tmp_path / "results" / "jitter_hsv_epochs1_width3_s42.pt", "")
    assert record["size"] == [32, 32] and record["weights"]["conv1.weight"].shape[0] == 3


@pytest.mark.parametrize(
    "command, says",
    [
        ("--method lazyness", "--method"),
        ("--epochs 1.5", "--epochs"),
        ("--method jitter --alpha nan", "--alpha"),
        ("--alpha 2", "--alpha means nothing for --method baseline"),
        ("--method lff --first-epochs 2", "--first-epochs means nothing for --method lff"),
        ("--method biasbal --resample 1", "--resample means nothing for --method biasbal"),
        ("--method balance --resample 1.5", "1.5 is not from 0 to 1"),
        ("--method jitter --infer-groups", "--infer-groups without --balance means nothing"),
        ("--method grl --balance", "--balance means nothing for --method grl"),
        ("--method at --clean-epochs 10", "--epochs 10 counts all phases"),
        ("--method at --attack fgsm --steps 7", "--steps with --attack fgsm means nothing"),
        ("--method jitter --jitter hsv --grain 0.3", "--grain without --jitter mix means"),
        ("--method at --generated 0.3", "--generated without --generator means nothing"),
        ("--method robgan --generator gan_s1", "--generator means nothing"),
        ("--model mlp --width 4", "--width with --model mlp means nothing"),
        ("--name mine_s7", "is not of --seed 42"),
        ("--name ../escape", "may hold letters"),
        ("--name attack_x", "belongs to another script"),
        ("--dir nowhere", "nowhere/train.pt is missing"),
    ],
)
def test_mistaken_flags_get_one_line(mistake, command, says):
    mistake(f"train.py {command}", says)


def test_worlds_that_do_not_fit_get_one_line(world, call, mistake):
    mistake("train.py --method at --crop 28", "--crop 28 leaves nothing")
    files = {path: path.read_bytes() for path in world.iterdir()}
    for flags, change, says in (
        ("", lambda r: {key: value[:1] for key, value in r.items()}, "too few images, 1"),
        ("", lambda r: {k: v[:3] for k, v in r.items()}, "test_unbiased.pt has too few images, 3"),
        ("--method grl", lambda r: {**r, "colors": r["colors"] + 1}, "a colour label below 10"),
    ):
        change_all(world, change)
        mistake(f"train.py {flags}", says)
        for path, data in files.items():
            path.write_bytes(data)
    record = common.load_pt(world / "val.pt", "")
    common.save_pt({**record, "labels": record["labels"] + 1}, world / "val.pt")
    mistake("train.py", "val.pt has 11 of (28, 28)")
    small = {key: value[..., :20] for key, value in record.items() if key in ("images", "gray")}
    common.save_pt({**record, **small}, world / "val.pt")
    mistake("train.py", "val.pt has 10 of (28, 20)")
    common.save_pt(record, world / "val.pt")
    (world / "meta.json").write_text('{"corr": ')
    mistake("train.py", "meta.json")


def test_only_the_first_process_speaks_and_saves(world, monkeypatch, capfd):
    monkeypatch.chdir(world.parent)
    before = {*world.iterdir()}
    monkeypatch.setattr(train, "RANK", 1)
    monkeypatch.setattr(train, "PROCESSES", 2)
    met = []
    monkeypatch.setattr(train, "meet", lambda *_: met.append("met"))
    monkeypatch.setattr(train, "all_reduce", lambda tensors: None)
    monkeypatch.setattr(train.dist, "destroy_process_group", lambda: met.append("left"))
    for name in ("stdout", "stderr"):  # main changes them
        monkeypatch.setattr(sys, name, getattr(sys, name))
    train.main(["--epochs", "1"])
    sys.stdout.close()
    assert capfd.readouterr().out == "" and {*world.iterdir()} == before
    assert met == ["met", "left"]
