"""The budget of one task: how many steps, at which learning rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from clbench.specs import BaselineSpec, PlateauSchedule, RestartSchedule, StepSchedule, TrainSpec
from clbench.strategies.base import new_optimizer
from clbench.strategies.schedule import Schedule
from strategy_factory import AVALANCHES, made, synthetic, weights


def scheduled(schedule: StepSchedule | PlateauSchedule | RestartSchedule) -> tuple[Schedule, torch.optim.Optimizer]:
    train = TrainSpec(epochs=9, batch_size=1, optimizer="sgd", lr=0.8, schedule=schedule)
    optimizer = new_optimizer(train, nn.Linear(1, 1).parameters())
    return Schedule(train, optimizer), optimizer


def rate(optimizer: torch.optim.Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


def test_a_step_schedule_scales_at_its_milestones() -> None:
    """0.8 until epoch 2 is over, then 0.8 * 0.5, after epoch 4 times 0.5 again."""
    schedule, optimizer = scheduled(StepSchedule(kind="step", milestones=[2, 4], gamma=0.5))
    rates = []
    for _ in range(5):
        rates.append(rate(optimizer))
        assert schedule.step(lambda: pytest.fail("a step schedule asks for no loss"))
    assert rates == [0.8, 0.8, 0.4, 0.4, 0.2]


def test_a_plateau_schedule_scales_after_its_patience_and_ends_below_its_least_rate() -> None:
    """Patience 2: losses 5, 4 improve; 4, 4 do not: 0.4. 3 improves; 9, 9: 0.2 < 0.3, so training ends."""
    schedule, optimizer = scheduled(PlateauSchedule(kind="plateau", factor=0.5, patience=2, min_lr=0.3))
    seen = []
    for loss in (5.0, 4.0, 4.0, 4.0, 3.0, 9.0, 9.0):
        seen.append((schedule.step(lambda loss=loss: loss), rate(optimizer)))  # type: ignore[misc]  # a default binds it
    assert seen == [(True, 0.8)] * 3 + [(True, 0.4)] * 3 + [(False, 0.2)]


def test_restarts_anneal_by_cosines_over_cycles_that_double() -> None:
    """0.8 / 10, then cycles of 1, 2, 4 epochs from 0.8 down to 0.2: 0.8; 0.8, 0.5; and 0.5 + 0.3 cos(pi k / 4)."""
    schedule, optimizer = scheduled(RestartSchedule(kind="restarts", min_lr=0.2, warmup=1))
    rates = []
    for _ in range(9):
        rates.append(rate(optimizer))
        assert schedule.step(lambda: pytest.fail("cycles ask for no loss"))
    half = 0.3 * 0.5**0.5
    assert rates == pytest.approx([0.08, 0.8, 0.8, 0.5, 0.8, 0.5 + half, 0.5, 0.5 - half, 0.8])


def test_restarts_are_torchs_own() -> None:
    """SGDR as torch has it, T_0 = 1 and T_mult = 2, without the warm-up."""
    schedule, optimizer = scheduled(RestartSchedule(kind="restarts", min_lr=0.01))
    other = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.8)
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(other, T_0=1, T_mult=2, eta_min=0.01)
    for _ in range(40):
        assert rate(optimizer) == pytest.approx(rate(other))
        schedule.step(lambda: 0.0)
        other.step()
        theirs.step()


@pytest.mark.parametrize("baseline", ["finetune", AVALANCHES])
@pytest.mark.parametrize(("keys", "steps"), [({"iterations": 17}, 17), ({"epochs": 3}, 39), ({"iterations": 13}, 13)])
def test_a_task_takes_exactly_the_steps_of_its_budget(
    baseline: str | BaselineSpec, keys: dict[str, Any], steps: int
) -> None:
    """400 samples in batches of 32 are 13 steps an epoch; 17 steps are an epoch and a part, 13 exactly one."""
    strategy, stream = made(synthetic(n_tasks=2, **keys), baseline)
    for experience in stream.benchmark.train_stream:
        counter = _Counter()
        with counter:
            strategy.train_task(experience)
        assert counter.steps == steps


class _Counter:
    """Counts the steps of every optimiser while it is open."""

    def __enter__(self) -> None:
        self.steps = 0
        self.handle = register_optimizer_step_post_hook(self._count)

    def _count(self, *args: Any) -> None:
        self.steps += 1

    def __exit__(self, *args: object) -> None:
        self.handle.remove()


@pytest.mark.parametrize("baseline", ["finetune", AVALANCHES])
@pytest.mark.parametrize("reset", [True, False])
def test_every_task_starts_at_the_full_rate(baseline: str | BaselineSpec, reset: bool) -> None:
    """Both tasks end at lr * 0.1, although the optimiser lives on when it is not reset."""
    schedule = {"kind": "step", "milestones": [1], "gamma": 0.1}
    keys: dict[str, Any] = {"epochs": 2, "schedule": schedule, "optimizer": "sgd", "lr": 0.1, "momentum": 0.9}
    strategy, stream = made(synthetic(n_tasks=2, **keys, reset_optimizer=reset), baseline)
    for experience in stream.benchmark.train_stream:
        rates = _Rates()
        with rates:
            strategy.train_task(experience)
        assert rates.seen == pytest.approx([0.1] * 13 + [0.01] * 13)


class _Rates(_Counter):
    def __enter__(self) -> None:
        super().__enter__()
        self.seen: list[float] = []

    def _count(self, *args: Any) -> None:
        self.seen.append(rate(args[0]))


@pytest.mark.parametrize("baseline", ["finetune", "joint", AVALANCHES])
def test_a_plateau_is_judged_on_the_samples_set_aside(
    baseline: str | BaselineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A validation loss that never falls ends a task after 1 + 2 epochs, at half the rate, below the least one."""
    schedule = {"kind": "plateau", "factor": 0.5, "patience": 2, "min_lr": 0.009}
    task = synthetic(n_tasks=2, epochs=50, optimizer="sgd", lr=0.01, schedule=schedule)
    task = task.model_copy(update={"stream": task.stream.model_copy(update={"validation": 0.25})})
    strategy, stream = made(task, baseline)
    for done, experience in enumerate(stream.benchmark.train_stream, 1):
        # Labels that are the wrong way round: what is learned on the one set can only hurt on the other.
        monkeypatch.setattr(experience.validation, "labels", 1 - experience.validation.labels)
        counter = _Counter()
        with counter:
            strategy.train_task(experience)
        tasks = done if baseline == "joint" else 1
        assert counter.steps == 3 * -(-300 * tasks // 32)


def test_the_gradient_is_clipped_to_the_norm_asked_for() -> None:
    """One step of plain SGD at rate 1 moves the weights by the clipped gradient: a norm of 0.01, no more."""
    for baseline in ("finetune", AVALANCHES):
        task = synthetic("domain", n_tasks=1, iterations=1, optimizer="sgd", lr=1.0, grad_clip=0.01)
        strategy, stream = made(task, baseline)
        strategy.model.observe(0, [0, 1])
        before = weights(strategy)
        strategy.train_task(stream.benchmark.train_stream[0])
        assert float((weights(strategy) - before).norm()) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("baseline", ["finetune", "er", AVALANCHES])
def test_training_that_diverges_is_an_error_also_in_its_last_step(baseline: str | BaselineSpec) -> None:
    """Weight decay at a rate of 1e38 makes infinite weights out of a step whose own loss was fine."""
    strategy, stream = made(synthetic(n_tasks=1, iterations=1, optimizer="sgd", lr=1e38, weight_decay=1e3), baseline)
    with pytest.raises(FloatingPointError, match="1e\\+38"):
        strategy.train_task(stream.benchmark.train_stream[0])


@pytest.mark.parametrize("baseline", ["er", "joint", "lwf", AVALANCHES])
def test_momentum_works_where_heads_get_their_first_gradient_at_different_times(baseline: str | BaselineSpec) -> None:
    """Torch's fused SGD would stop: some parameters have a momentum already, others do not."""
    task = synthetic(n_tasks=3, iterations=15, batch_size=3, optimizer="sgd", lr=0.05, momentum=0.9)
    for reset in (True, False):
        train = task.train.model_copy(update={"reset_optimizer": reset})
        strategy, stream = made(task.model_copy(update={"train": train}), baseline)
        for experience in stream.benchmark.train_stream:
            strategy.train_task(experience)
