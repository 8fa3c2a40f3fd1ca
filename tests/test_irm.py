"""Invariant risk: the penalties against autograd and by hand, environments told and inferred."""

import json

import pytest
import torch
import torch.nn.functional as F
from test_methods import Logits, batch_of, method_of, split_of

LOGITS = [[2.0, 0.5], [0.3, 1.0], [-1.0, 0.4], [0.2, 0.1]]
Y = [0, 0, 1, 1]


def irm(name, env, flags="--l2 0"):
    data = split_of(Y, Y)._replace(env=torch.tensor(env))
    model = Logits(LOGITS)
    return model, method_of(name, model, {"train": data}, flags)


def test_the_penalty_is_the_slope_of_each_risk_by_a_scale_of_its_logits():
    model, method = irm("irm", [0, 1, 0, 1])
    slopes = []
    for part in ([0, 2], [1, 3]):
        scale = torch.ones((), requires_grad=True)
        risk = F.cross_entropy(scale * model.rows[part], torch.tensor(Y)[part])
        slopes.append(torch.autograd.grad(risk, scale)[0])
    loss = F.cross_entropy(model.rows, torch.tensor(Y))
    late = method.loss(model, batch_of(torch.zeros(4, 1), Y, progress=0.5), None)
    expected = (loss + 91257 * torch.stack(slopes).square().mean()) / 91257
    assert torch.isclose(late, expected, rtol=1e-5)
    early = method.loss(model, batch_of(torch.zeros(4, 1), Y, progress=0.2), None)
    assert torch.isclose(early, loss + torch.stack(slopes).square().mean(), rtol=1e-5)
    model, method = irm("irm", [0, 1, 0, 1], "--l2 0.5")
    heavy = method.loss(model, batch_of(torch.zeros(4, 1), Y, progress=0.2), None)
    squares = torch.cat([p.flatten() for p in model.parameters()]).square().sum()
    assert torch.isclose(heavy, early + 0.5 * squares, rtol=1e-5)


def test_vrex_asks_for_equal_risks():
    """Two environments with the same logits have no variance; the plain risk is left."""
    data = split_of([0, 1, 0, 1], [0, 1, 0, 1])._replace(env=torch.tensor([0, 0, 1, 1]))
    model = Logits([[2.0, 0.5], [0.3, 1.0], [2.0, 0.5], [0.3, 1.0]])
    method = method_of("vrex", model, {"train": data}, "--l2 0 --penalty 5")
    loss = method.loss(model, batch_of(torch.zeros(4, 1), [0, 1, 0, 1]), None)
    risk = F.cross_entropy(model.rows, torch.tensor([0, 1, 0, 1]))
    assert torch.isclose(loss, risk / 5)
    model, method = irm("vrex", [0, 1, 0, 1], "--l2 0 --penalty 5")
    risks = [F.cross_entropy(model.rows[part], torch.tensor(Y)[part]) for part in ([0, 2], [1, 3])]
    spread = ((risks[0] - risks[1]) / 2) ** 2
    loss = method.loss(model, batch_of(torch.zeros(4, 1), Y), None)
    assert torch.isclose(loss, (sum(risks) / 2 + 5 * spread) / 5)


@pytest.mark.parametrize("name", ["irm", "vrex"])
def test_both_train_with_environments(call, tmp_path, name, tiny):
    """Painted by hand: make_data.py needs MNIST."""
    (tmp_path / "w").mkdir()
    tiny(tmp_path / "w")
    record = torch.load(tmp_path / "w" / "train.pt")
    torch.save({**record, "env": torch.arange(200) % 2}, tmp_path / "w" / "train.pt")
    call(f"train.py --dir w --method {name} --model mlp390 --epochs 2")
    record = json.loads((tmp_path / "w" / f"{name}_epochs2_mlp390_s42.json").read_text())
    assert record["knows"] == "the environments" and record["params"] > 200_000


def test_without_environments_one_line_says_how_to_have_them(mistake, tmp_path, tiny):
    (tmp_path / "w").mkdir()
    tiny(tmp_path / "w")
    mistake("train.py --dir w --method irm", "or let --infer-groups name them")
