"""Operations counted: exact where they can be derived by hand, and a run that is the same with and without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from clbench import flops
from clbench.flops import MOST, Counting, StepCounter
from clbench.record_parts import Flops
from clbench.records import RunRecord, load
from clbench.report import tables
from clbench.report.measures import DEFAULT, MEASURES, chosen
from clbench.report.select import arrange
from clbench.runner import run
from clbench.specs import Scenario
from record_factory import make_record
from strategy_factory import AVALANCHES, HOME, made, needs, recipe, synthetic


def counted(net: nn.Module, x: Tensor) -> tuple[int | None, int | None]:
    """Return the operations of a forward pass, and of one with its backward pass."""
    with torch.no_grad(), Counting() as forward:
        net(x)
    with Counting() as both:
        torch.autograd.backward(net(x).sum())
    return forward.total, both.total


def facts(found: RunRecord) -> dict[str, Any]:
    return found.model_dump(exclude={"timing", "peaks", "flops"})


# ------------------------------------------------------------------------------------------------------------- by hand


def test_an_mlp_counts_two_a_multiply_add() -> None:
    """5 samples through 7 -> 4 -> 3: forward 2 * 5 * (7*4 + 4*3) = 400.

    Backward: each layer's weights take as much as its forward pass, and so does the gradient of its input, but for the
    first layer's, whose input is data: 3 * 400 - 2 * 5 * 28 = 920. Biases and ReLU count nothing.
    """
    net = nn.Sequential(nn.Linear(7, 4), nn.ReLU(), nn.Linear(4, 3))
    assert counted(net, torch.rand(5, 7)) == (400, 920)


def test_a_conv_net_counts_every_place_of_its_filters() -> None:
    """3 samples of 2 x 6 x 6: 3x3 to 4 channels, padded (36 places), then 3x3 to 5 channels, stride 2, bare (4 places).

    Forward: 2 * 3 * 36 * 4 * 2 * 9 = 15,552, then 2 * 3 * 4 * 5 * 4 * 9 = 4,320, then 2 * 3 * (5 * 4) * 7 = 840 of the
    linear layer: 20,712. With backward: 3 * 20,712 - 15,552 = 46,584.
    """
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2), nn.Flatten(), nn.Linear(20, 7)
    )
    assert counted(net, torch.rand(3, 2, 6, 6)) == (20_712, 46_584)


def test_counts_are_those_of_torchs_own_counter_in_every_mode() -> None:
    """Under inference mode a linear layer reaches a mode whole: it is taken apart and counted all the same."""
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(48, 5))
    x = torch.rand(2, 2, 6, 6)
    for gradients in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with gradients(), FlopCounterMode(display=False) as theirs:
            net(x)
        with gradients(), Counting() as ours:
            net(x)
        assert ours.total == theirs.get_total_flops() == 2 * 2 * (16 * 3 * 2 * 9 + 48 * 5)


def test_a_run_records_what_its_net_takes() -> None:
    """The test stream's net is 64 -> 32 -> 2, its batch 32.

    An answer: 2 * (64*32 + 32*2) = 4,224. A step: 32 * (3 * 4,224 - 2 * 64*32) = 274,432; six of them.
    """
    found = run(synthetic("task", n_tasks=2, iterations=6), "finetune", 0).flops
    assert found == 2 * [Flops(step=274_432, step_samples=32, steps=6, train=6 * 274_432, answer=4_224)]


def test_the_last_batch_of_an_epoch_is_a_kind_of_its_own() -> None:
    """40 samples in batches of 32, twice: two steps of 32 samples and two of 8, which take a quarter."""
    task = synthetic("task", n_tasks=1, epochs=2)
    strategy, stream = made(task, "finetune")
    counter = StepCounter(lambda: strategy.samples_trained)
    strategy.around = counter
    experience = stream.benchmark.train_stream[0]
    strategy.begin_task(experience)
    (data,) = strategy.training_data(experience)
    short = type(data)(data.images, data.rows[:40], data.labels[:40], data.task, data.view)
    strategy.fit([short])
    found = counter.take(None)
    assert (found.steps, found.step_samples) == (4, 32)
    assert found.train == 2 * 274_432 + 2 * 274_432 // 4


def test_a_penalty_over_weights_is_free() -> None:
    task = synthetic("task", n_tasks=2, iterations=4)
    assert run(task, "ewc", 0).flops == run(task, "finetune", 0).flops


def test_a_teacher_costs_its_forward_pass() -> None:
    """LwF's second task: the batch also goes forward through the old net, trunk and one head: 32 * 4,224 more.

    And forward and back through the old head of the new net: 3 * 32 * 2 * 32*2 more.
    """
    found = run(synthetic("task", n_tasks=2, iterations=4), "lwf", 0).flops
    assert found[1].step is not None
    assert found[0].step is not None
    assert found[1].step - found[0].step == 32 * 4_224 + 3 * 32 * 2 * 64


# ------------------------------------------------------------------------------------------------ against counting all


@pytest.mark.parametrize("baseline", ["er", "der", "den", "den_reference_code", "packnet", "hypernet", "agem", "wsn"])
def test_kinds_times_their_steps_is_what_counting_every_step_gives(
    baseline: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replay whose memory fills, phases, regularisers over past tasks: the sum over all steps, each counted."""
    task = synthetic("task", n_tasks=3, iterations=7, lr=0.01)
    found = run(task, baseline, 0, overrides=needs(baseline, "task")).flops
    sums: list[int] = []

    class EveryStep(StepCounter):
        def __enter__(self) -> None:
            self._is_new, self._left = True, 1
            self._known.discard((self._passes, self._size))
            super().__enter__()

        def __exit__(self, *words: Any) -> None:
            mode = self._mode
            super().__exit__(*words)
            assert mode is not None
            assert mode.total is not None
            sums[-1] += mode.total

        def take(self, answer: int | None, why: str = "") -> Flops:
            sums.append(0)
            return super().take(answer, why)

    monkeypatch.setattr("clbench.runner.StepCounter", EveryStep)
    sums.append(0)
    run(task, baseline, 0, overrides=needs(baseline, "task"))
    assert [one.train for one in found] == sums[:-1]


def test_after_many_kinds_of_steps_the_rest_goes_by_samples() -> None:
    """Steps of 1, 2, 3, ... samples at 10 operations a sample: only MOST are counted, and the total is exact here."""
    samples = 0
    counter = StepCounter(lambda: samples)
    weight = torch.ones(5, 1)
    data = object()
    for size in range(1, 21):
        with counter(data, torch.ones(7, 5)):
            torch.mm(torch.ones(size, 5), weight)
            samples += size
    found = counter.take(None)
    assert found.train == 10 * sum(range(1, 21))
    assert found.steps == 20
    assert MOST < 20


# -------------------------------------------------------------------------------------------------- the run is the same


@pytest.mark.parametrize(("baseline", "scenario"), HOME)
def test_a_run_is_the_same_to_the_bit_with_and_without(baseline: str, scenario: Scenario) -> None:
    task = synthetic(scenario, n_tasks=2, iterations=3, lr=0.01)
    found = [run(task, baseline, 0, overrides=needs(baseline, scenario), count_flops=count) for count in (True, False)]
    assert facts(found[0]) == facts(found[1])
    assert found[1].flops == []
    for one in found[0].flops:
        assert one.why == ""
        assert one.step is not None
        assert one.answer is not None
        assert one.step > one.answer > 0


@pytest.mark.parametrize(
    "foreign", [AVALANCHES, recipe("avalanche.training:Replay", name="avalanches_er", mem_size=20)]
)
def test_avalanches_own_strategies_are_the_same_with_and_without(foreign: Any) -> None:
    task = synthetic("task", n_tasks=2, iterations=3)
    found = [run(task, foreign, 0, count_flops=count) for count in (True, False)]
    assert found[0].status == "done"
    assert facts(found[0]) == facts(found[1])
    assert [one.steps for one in found[0].flops] == [3, 3]


def test_avalanches_finetuning_takes_what_ours_takes() -> None:
    task = synthetic("task", n_tasks=1, iterations=3)
    assert run(task, recipe("avalanche.training:Naive", name="naive"), 0).flops == run(task, "finetune", 0).flops


def test_a_failed_step_leaves_no_counter_behind() -> None:
    counter = StepCounter(lambda: 0)
    with pytest.raises(RuntimeError, match="stop"), counter(object(), torch.ones(1)):
        raise RuntimeError("stop")
    assert counter._mode is None
    with Counting() as other:
        torch.mm(torch.ones(2, 3), torch.ones(3, 4))
    assert other.total == 48


# ------------------------------------------------------------------------------------------------------ unknown is null


def test_what_cannot_be_counted_is_null_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """A formula that does not fit a kernel costs a number and no run."""

    def breaks(*_: Any, **__: Any) -> int:
        raise ValueError("odd shape\nmore")

    task = synthetic("task", n_tasks=2, iterations=2)
    usual = run(task, "finetune", 0)
    monkeypatch.setitem(flop_registry, torch.ops.aten.mm, breaks)
    found = run(task, "finetune", 0)
    assert facts(found) == facts(usual)
    assert (found.flops[0].step, found.flops[0].train) == (None, None)
    assert found.flops[0].why.startswith("aten.mm: ValueError: odd shape")
    assert MEASURES["train_flops"].of(found) is None


def test_an_answer_that_cannot_be_counted_is_null() -> None:
    def no_answer(_: Any) -> None:
        raise KeyError("x")

    _, stream = made(synthetic("task"), "finetune")
    assert flops.of_answer(no_answer, stream.benchmark.test_stream[0]) == (None, "answer: KeyError: 'x'")


# ---------------------------------------------------------------------------------------------------- records, reports


def test_records_without_counts_are_written_as_they_always_were(tmp_path: Path) -> None:
    old = make_record()
    assert "flops" not in old.dumps()
    new = old.model_copy(update={"flops": [Flops(step=1, step_samples=2, steps=3, train=4, answer=None, why="x")] * 3})
    assert load(new.save(tmp_path)) == new


def test_costs_have_columns_of_operations_where_records_have_them() -> None:
    one = Flops(step=2_000, step_samples=32, steps=10, train=20_000, answer=40)
    without = make_record(seed=0)
    records = [without, make_record(seed=1).model_copy(update={"flops": [one] * 3})]
    names = [measure.name for measure in chosen(None, records)]
    assert {"train_flops", "step_flops", "answer_flops"} <= set(names)
    assert not {"train_flops", "step_flops", "answer_flops"} & {measure.name for measure in chosen(None, [without])}
    assert "train_flops" in DEFAULT
    _, costs = tables.tables(arrange(records)[0], chosen(None, records))
    text = " ".join(costs.caption)
    assert "counts 0, so that a penalty over weights such as EWC's is free in it" in text
    assert "60.0 k (n=1)" in costs.sections[0].rows[0]
