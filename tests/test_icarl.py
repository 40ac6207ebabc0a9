"""iCaRL: herding on points in the plane, targets and answers by hand, and who is kept."""

from __future__ import annotations

from collections import Counter
from math import exp, log
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from clbench.errors import UserError
from clbench.footprint import footprint
from clbench.loading import Batch, ResidentLoader
from clbench.recipes import load_baseline, resolve
from clbench.strategies.base import Setup
from clbench.strategies.build import check
from clbench.strategies.icarl import ICaRL, herded
from strategy_factory import CPU, budget, linear_net, made, synthetic, weights


def plain(weight: Tensor, bias: Tensor, **settings: Any) -> ICaRL:
    """Return iCaRL on a linear net of two pixels and three classes: the features are the pixels."""
    setup = Setup(new_net=linear_net(2, 3, weight, bias), train=budget(), device=CPU, seed=0)
    return ICaRL(setup=setup, config=ICaRL.Config(**{"buffer": 12, **settings}))


def on_circle(*degrees: float) -> Tensor:
    """Return points of length 1 at these angles, (N, 2) float64."""
    angle = torch.tensor(degrees).double().deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def herded_by_norms(features: Tensor, count: int) -> list[int]:
    """The paper's algorithm 4, word by word: every mean and norm written out."""
    mean = F.normalize(features.mean(0), dim=0)
    chosen: list[int] = []
    for k in range(1, count + 1):
        best, which = float("inf"), -1
        for x in range(len(features)):
            if x not in chosen:
                together = features[[*chosen, x]].sum(0) / k
                distance = float((mean - together).norm())
                if distance < best:
                    best, which = distance, x
        chosen.append(which)
    return chosen


# -------------------------------------------------------------------------------------------------------------- herding


def test_herding_on_a_circle_by_hand() -> None:
    """Angles 0, 50, 60, 70, 120: the mean points to 60. First 60 itself. Then the one whose mean with 60 is nearest.

    The mean of two at 60 and a points to (60 + a) / 2 and has length cos((60 - a) / 2): with 50 or 70 it is off by
    about sin 5 = 0.087 crosswise, with 0 or 120 by sin 30 cos 30 = 0.43 and more. After one of the two that tie the
    other balances it: the three point to 60 again.
    """
    features = on_circle(0, 50, 60, 70, 120)
    chosen = herded(features, 5).tolist()
    assert chosen[0] == 2
    assert sorted(chosen[1:3]) == [1, 3]
    assert sorted(chosen[3:]) == [0, 4]


def test_the_second_exemplar_balances_the_first_and_need_not_be_the_second_nearest() -> None:
    """Angles 8, 10, -20 and 50 around a mean at 11.8: 10 is nearest, 8 next; but with 10 it is 8 that errs to one side.

    By the definition: mean angles of the pairs 9, -5 and 30, so 8 comes second here; after 10 and 8 the sum needs 50,
    not -20: (10 + 8 + 50) / 3 = 22.7 is 11 off, (10 + 8 - 20) / 3 = -0.7 is 12.5 off.
    """
    features = on_circle(8, 10, -20, 50)
    assert herded(features, 3).tolist() == herded_by_norms(features, 3) == [1, 0, 3]


@pytest.mark.parametrize("size", [2, 6])
def test_herding_is_the_papers_algorithm(size: int) -> None:
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        features = F.normalize(torch.randn(30, size, generator=generator).double() + 0.5, dim=1)
        assert herded(features, 12).tolist() == herded_by_norms(features, 12)


def test_herding_takes_all_when_there_are_few_and_nobody_twice() -> None:
    assert sorted(herded(on_circle(1, 2, 3), 9).tolist()) == [0, 1, 2]
    assert sorted(herded(on_circle(5, 5, 5), 3).tolist()) == [0, 1, 2]


# ------------------------------------------------------------------------------------------------------------- training


def test_without_old_classes_the_loss_is_one_cross_entropy_a_class_by_hand() -> None:
    """Logits (0, 0, log 3) of a sample of class 2: log 2 for each of the others, -log(3 / 4) for its own."""
    strategy = plain(torch.zeros(3, 2), torch.tensor([0.0, 0.0, log(3)]))
    strategy.task_classes = [0, 1, 2]
    loss = strategy.loss_of(Batch(torch.zeros(1, 1, 1, 2), torch.tensor([2]), 0))
    assert float(loss.detach()) == pytest.approx(2 * log(2) + log(4 / 3))


def test_old_classes_are_held_to_the_old_net_by_hand() -> None:
    """Class 2 is new; the old net gives classes 0 and 1 logits 4 and -4, halved by the temperature: q = sigmoid(+-2).

    The net's logits are (1, 0, 0). Class 0: -q log s(1) - (1 - q) log(1 - s(1)) = log(1 + e^-1) + (1 - q), as
    log(1 - s(1)) = log s(1) - 1. Class 1: log 2, whatever q. Class 2: log 2.
    """
    strategy = plain(torch.zeros(3, 2), torch.tensor([1.0, 0.0, 0.0]), temperature=2.0)
    old = plain(torch.zeros(3, 2), torch.tensor([4.0, -4.0, 0.0]))
    strategy.before, strategy.task_classes = old.model, [2]
    strategy.exemplars = {label: torch.zeros(1, 1, 1, 2, dtype=torch.uint8) for label in (0, 1)}
    loss = strategy.loss_of(Batch(torch.zeros(1, 1, 1, 2), torch.tensor([0]), 0))
    q = 1 / (1 + exp(-2))
    assert float(loss.detach()) == pytest.approx(log(1 + exp(-1)) + (1 - q) + log(2) + log(2))


def test_the_old_net_is_the_one_before_the_task_and_none_is_kept() -> None:
    strategy, stream = made(synthetic("class", n_tasks=2), "icarl", buffer=40)
    first, second = stream.benchmark.train_stream
    strategy.train_task(first)
    before = weights(strategy)
    strategy.begin_task(second)
    strategy.before_task(second)
    held = torch.cat([parameter.detach().flatten() for parameter in strategy.before.parameters()])
    assert torch.equal(held[: len(before)], before)
    batch = next(iter(ResidentLoader([stream.train[1]], 8)))
    strategy.train_step(batch)
    assert torch.equal(torch.cat([parameter.detach().flatten() for parameter in strategy.before.parameters()]), held)
    strategy.after_task(second)
    assert strategy.before is None


def test_the_first_task_moves_the_net_as_binary_cross_entropy_does() -> None:
    """No old net and no exemplar yet: 40 steps of finetuning with a sigmoid a class, to the bit."""
    strategy, stream = made(synthetic("class", n_tasks=1), "icarl")
    twin, _ = made(synthetic("class", n_tasks=1), "finetune")

    def loss_of(batch: Batch) -> Tensor:
        logits = twin.model(batch.x, batch.t)
        targets = F.one_hot(batch.y, logits.shape[1]).to(logits)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()

    twin.loss_of = loss_of
    for one in (strategy, twin):
        one.train_task(stream.benchmark.train_stream[0])
    assert torch.equal(weights(strategy), weights(twin))


def test_distillation_and_exemplars_keep_what_finetuning_forgets() -> None:
    first = {}
    for baseline in ("finetune", "icarl"):
        strategy, stream = made(synthetic("class", n_tasks=3), baseline)
        strategy.train(list(stream.benchmark.train_stream))
        first[baseline] = strategy.accuracy(stream.benchmark.test_stream[0])
    assert first["finetune"] < 0.2
    assert first["icarl"] > 0.7


def test_the_temperature_matters() -> None:
    found = []
    for temperature in (1.0, 3.0):
        strategy, stream = made(synthetic("class", n_tasks=2), "icarl", temperature=temperature)
        strategy.train(list(stream.benchmark.train_stream))
        found.append(weights(strategy))
    assert not torch.equal(*found)


def test_a_task_is_trained_on_together_with_every_exemplar() -> None:
    """400 new samples and 2 * 20 exemplars; the old classes' samples are among those they were chosen from."""
    strategy, stream = made(synthetic("class", n_tasks=2), "icarl", buffer=40)
    first, second = stream.benchmark.train_stream
    strategy.train_task(first)
    strategy.begin_task(second)
    tasks = strategy.training_data(second)
    assert [len(task) for task in tasks] == [400, 40]
    assert Counter(tasks[1].labels.tolist()) == {0: 20, 1: 20}
    source = stream.train[0]
    rows = torch.arange(400)
    known = {(x.numpy().tobytes(), int(y)) for x, y in zip(source.inputs(rows), source.labels, strict=True)}
    old = tasks[1].inputs(torch.arange(40))
    assert {(x.numpy().tobytes(), int(y)) for x, y in zip(old, tasks[1].labels, strict=True)} <= known


# --------------------------------------------------------------------------------------------------- exemplars, answers


def test_old_classes_keep_the_first_of_their_exemplars() -> None:
    """Budget 24: 12 of each of two classes, 6 of four, 4 of six; the old ones' in the order they were chosen in."""
    strategy, stream = made(synthetic("class", n_tasks=3), "icarl", buffer=24)
    held: dict[int, Tensor] = {}
    for done, experience in enumerate(stream.benchmark.train_stream, 1):
        strategy.train_task(experience)
        share = 24 // (2 * done)
        sizes = {label: len(images) for label, images in strategy.exemplars.items()}
        assert sizes == dict.fromkeys(range(2 * done), share)
        for label, images in held.items():
            assert torch.equal(strategy.exemplars[label], images[:share])
        held = dict(strategy.exemplars)


def test_exemplars_are_herded_with_the_net_as_trained() -> None:
    strategy, stream = made(synthetic("class", n_tasks=1), "icarl", buffer=16)
    strategy.train_task(stream.benchmark.train_stream[0])
    source = stream.train[0]
    strategy.model.eval()
    for label in (0, 1):
        rows = (source.labels == label).nonzero().flatten()
        features = F.normalize(strategy.model.features(source.inputs(rows)).detach(), dim=1).double()
        expected = source.stored(rows)[herded_by_norms(features, 8)]
        assert torch.equal(strategy.exemplars[label], expected)


def test_the_nearest_mean_answers_by_hand() -> None:
    """Class 0 has a mean at 0 degrees, class 2 at 90; of points at 30, 44, 46 and 80 degrees two are nearer to each.

    At 30 degrees the squared distances are 2 - 2 cos 30 and 2 - 2 cos 60; lengths of the points do not matter.
    """
    strategy = plain(torch.zeros(3, 2), torch.zeros(3))
    strategy.means = {0: on_circle(0)[0], 2: on_circle(90)[0]}
    x = (on_circle(30, 44, 46, 80) * torch.tensor([[3.0], [0.1], [5.0], [1.0]]).double()).view(4, 1, 1, 2)
    logits = strategy.answer(x, 0)
    assert logits.argmax(1).tolist() == [0, 0, 2, 2]
    assert float(logits[0, 0]) == pytest.approx(2 * 3**0.5 / 2 - 2)
    assert float(logits[0, 2]) == pytest.approx(2 * 0.5 - 2)
    assert bool((logits[:, 1] < -100).all())


def test_means_are_of_exemplars_and_of_length_one() -> None:
    strategy, stream = made(synthetic("class", n_tasks=2), "icarl", buffer=24)
    strategy.train(list(stream.benchmark.train_stream))
    strategy.model.eval()
    for label, images in strategy.exemplars.items():
        features = F.normalize(strategy.model.features(images.float() / 255).detach(), dim=1)
        torch.testing.assert_close(strategy.means[label], F.normalize(features.mean(0), dim=0))


def test_what_is_kept_is_counted_to_the_byte_and_means_alone_are_needed_to_answer() -> None:
    """24 exemplars of 8 x 8 bytes; four means of F float32."""
    strategy, stream = made(synthetic("class", n_tasks=2), "icarl", buffer=24)
    strategy.train(list(stream.benchmark.train_stream))
    counted = footprint(strategy.holdings())
    means = 4 * strategy.model.trunk.out_features * 4
    assert (counted.replay_samples, counted.replay_bytes) == (24, 24 * 64)
    assert counted.auxiliary_bytes == {"means": means}
    assert counted.answer_bytes == counted.parameter_bytes + means
    assert counted.keep_learning_bytes == counted.answer_bytes + counted.replay_bytes


def test_a_budget_below_one_exemplar_a_class_is_told() -> None:
    strategy, stream = made(synthetic("class", n_tasks=2), "icarl", buffer=3)
    first, second = stream.benchmark.train_stream
    strategy.train_task(first)
    with pytest.raises(ValueError, match="a buffer of 3 holds no exemplar for each of the classes so far"):
        strategy.train_task(second)


def test_it_is_defined_where_classes_arrive() -> None:
    with pytest.raises(UserError, match="is not defined in the domain-incremental"):
        check(resolve(synthetic("domain"), load_baseline("icarl")))
