"""The task inferred by the lowest entropy: by hand, for every kind of strategy, and its place in a record."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from scipy.stats import entropy as scipy_entropy
from torch import Tensor

from clbench import records
from clbench.errors import UserError
from clbench.loading import ResidentLoader
from clbench.nets.heads import ABSENT_LOGIT
from clbench.preflight import preflight
from clbench.recipes import load_baseline, load_task, resolve
from clbench.records import Generation
from clbench.report.measures import MEASURES, chosen
from clbench.runner import run
from clbench.specs import Scenario, TaskSpec
from clbench.strategies.evaluation import accuracy_by_entropy, entropy, least_entropy
from clbench.strategies.independent import Independent
from record_factory import make_record
from strategy_factory import made, synthetic


def asked(task: TaskSpec) -> TaskSpec:
    return task.model_copy(update={"entropy": True})


# ---------------------------------------------------------------------------------------------------------- the number


def test_entropies_by_hand() -> None:
    """Odds of 3 to 1 are 3/4 and 1/4: 3/4 ln 4/3 + 1/4 ln 4 = ln 4 - 3/4 ln 3. Even odds of k classes: ln k."""
    found = entropy(torch.tensor([[math.log(3), 0.0], [0.0, 0.0], [7.0, 7.0]]))
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([math.log(4) - 0.75 * math.log(3), math.log(2), math.log(2)], rel=1e-7)
    assert float(entropy(torch.zeros(1, 5))) == pytest.approx(math.log(5))


def test_an_absent_class_adds_nothing() -> None:
    """Its logit of -10,000 is a probability of 0, and 0 ln 0 is 0."""
    with_it = entropy(torch.tensor([[1.0, 2.0, -1e4]]))
    assert with_it.equal(entropy(torch.tensor([[1.0, 2.0]])))


def test_the_least_is_taken_and_of_equal_ones_the_first() -> None:
    """Sample 0: odds 2 and 3 to 1, the second is surer; sample 1: the first; sample 2: equally sure, of two classes."""
    one = torch.tensor([[math.log(2), 0.0], [0.0, 9.0], [5.0, 0.0]])
    other = torch.tensor([[0.0, math.log(3)], [0.0, 0.0], [0.0, 5.0]])
    assert least_entropy([one, other]).tolist() == [1, 0, 0]
    assert least_entropy([other, one]).tolist() == [0, 1, 0]


def test_confident_answers_do_not_tie() -> None:
    """In float32 the softmax of logits 40 and 50 against 0 is 1 in both, and the entropy 0."""
    assert least_entropy([torch.tensor([[40.0, 0.0]]), torch.tensor([[50.0, 0.0]])]).tolist() == [1]


def test_unequal_numbers_of_classes_compare_by_the_share_of_the_most_entropy() -> None:
    """Halves of two classes have log 2 = .693, which is all there is.

    Three quarters of one class and a quarter over three others have .75 log 4/3 + .25 log 12 = .837 of log 4 = 1.386,
    six tenths. An answer of one class has 0 of 0, and says nothing. A class that is absent is none.
    """
    halves = torch.tensor([[0.0, 0.0]])
    surer = torch.tensor([[0.75, 0.25 / 3, 0.25 / 3, 0.25 / 3]]).log()
    assert least_entropy([halves, surer]).tolist() == [1]
    assert least_entropy([torch.zeros(1, 1), surer, halves]).tolist() == [1]
    assert least_entropy([torch.zeros(1, 1), torch.zeros(1, 1)]).tolist() == [0]
    padded = torch.tensor([[0.0, 0.0, ABSENT_LOGIT, ABSENT_LOGIT]])
    assert least_entropy([padded, surer]).tolist() == [1]


def test_a_wrong_task_is_a_wrong_answer() -> None:
    """Task 7 answers four samples with odds of e^2 to 1; task 3 with odds of e^1, e^3, e^1, e^3: it takes two of them.

    Of the two left, the label is right of one: 1 / 4, though task 3's label is right of one that it takes.
    """
    labels = torch.tensor([0, 0, 1, 1])
    own = torch.tensor([[2.0, 0.0]] * 4)
    other = torch.tensor([[1.0, 0.0], [3.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    tables = {7: own, 3: other}
    batches = [(torch.tensor([0, 1]), labels[:2]), (torch.tensor([2, 3]), labels[2:])]

    def answer(x: Tensor, task: int) -> Tensor:
        return tables[task][x]

    assert accuracy_by_entropy(batches, answer, [3, 7], 7) == 0.25
    assert accuracy_by_entropy(batches, answer, [7], 7) == 0.5
    assert accuracy_by_entropy(batches, answer, [3], 7) == 0.0


# ----------------------------------------------------------------------------------------------------------- strategies


def answered(strategy: Any, x: Tensor, task: int) -> Tensor:
    """Return the logits of a task's own net or head, without what is under test."""
    if isinstance(strategy, Independent):
        return strategy.nets[task].eval()(x, task)  # type: ignore[no-any-return]  # a module's call has no type
    strategy.model.eval()
    logits: Tensor = strategy.model(x, task)
    return logits


def by_hand(strategy: Any, test: Any, tasks: list[int]) -> float:
    """Return the accuracy sample by sample, with another library's entropy in float64."""
    (batch,) = ResidentLoader([test], len(test))
    right = 0
    for x, y in zip(batch.x, batch.y, strict=True):
        with torch.no_grad():
            logits = [answered(strategy, x[None], task)[0].double() for task in tasks]
        found = [float(scipy_entropy(torch.softmax(each, 0).numpy())) for each in logits]
        best = found.index(min(found))
        right += int(tasks[best] == test.task and int(logits[best].argmax()) == int(y))
    return right / len(batch.y)


METHODS = ["finetune", "ewc", "independent", "lwf", "progressive", "wsn", "packnet", "hat", "cloned", "hypernet"]


@pytest.mark.parametrize("baseline", METHODS)
def test_every_strategy_infers_the_task_as_by_hand(baseline: str) -> None:
    """After each of three tasks, among those learned; with one alone it is the accuracy, and nothing is forgotten."""
    strategy, stream = made(synthetic("task", n_tasks=3, iterations=12), baseline)
    for number, experience in enumerate(stream.benchmark.train_stream):
        strategy.train_task(experience)
        tasks = list(range(number + 1))
        accuracies = [strategy.accuracy(test) for test in stream.benchmark.test_stream]
        for test, sample in zip(stream.test, stream.benchmark.test_stream, strict=True):
            if test.task in tasks:
                assert strategy.inferred(sample, tasks) == pytest.approx(by_hand(strategy, test, tasks), abs=1e-9)
        if number == 0:
            assert strategy.inferred(stream.benchmark.test_stream[0], [0]) == accuracies[0]
        assert [strategy.accuracy(test) for test in stream.benchmark.test_stream] == accuracies


def test_the_order_of_tasks_does_not_matter() -> None:
    strategy, stream = made(synthetic("task", n_tasks=3, iterations=12), "finetune")
    strategy.train(list(stream.benchmark.train_stream))
    test = stream.benchmark.test_stream[1]
    assert strategy.inferred(test, [0, 1, 2]) == strategy.inferred(test, [2, 1, 0])


# -------------------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize("baseline", ["finetune", "lwf", "independent"])
def test_a_run_records_what_is_inferred_where_the_task_asks(baseline: str) -> None:
    """Asking changes no other number. A task not learned yet has 0; the first row's first is the accuracy itself."""
    task = synthetic("task", n_tasks=3, iterations=20)
    plain, found = run(task, baseline, 1), run(asked(task), baseline, 1)
    assert found.status == "done", found.traceback
    assert plain.inferred is None
    own = {"inferred", "timing", "peaks"}
    assert found.model_dump(exclude=own) == plain.model_dump(exclude=own)
    assert found.inferred is not None
    assert [len(row) for row in found.inferred] == [3, 3, 3]
    assert all(found.inferred[i][j] == 0 for i in range(3) for j in range(i + 1, 3))
    assert found.inferred[0][0] == found.acc[0][0]
    assert all(found.inferred[i][j] <= found.acc[i][j] for i in range(3) for j in range(i + 1))
    assert MEASURES["average_accuracy_entropy"].of(found) == pytest.approx(sum(found.inferred[2]) / 3)


def test_an_interrupted_run_keeps_what_was_inferred(tmp_path: Path) -> None:
    task = asked(synthetic("task", n_tasks=3, iterations=5))

    def interrupt(done: int, _: int) -> None:
        raise KeyboardInterrupt

    for rows in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            run(task, "finetune", 0, out=tmp_path, progress=interrupt)
        partial = records.load(next(tmp_path.rglob("*.json")))
        assert partial.inferred is not None
        assert len(partial.inferred) == len(partial.acc) == rows
    resumed = run(task, "finetune", 0, out=tmp_path)
    assert resumed.inferred == run(task, "finetune", 0).inferred


def test_a_checkpoint_without_it_is_not_continued_by_a_run_that_wants_it(tmp_path: Path) -> None:
    task = synthetic("task", n_tasks=2, iterations=5)

    def interrupt(done: int, _: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(task, "finetune", 0, out=tmp_path, progress=interrupt)
    found = run(asked(task), "finetune", 0, out=tmp_path)
    assert found.inferred is not None
    assert [len(row) for row in found.inferred] == [2, 2]


def test_asking_is_no_part_of_the_recipes_hash() -> None:
    task = load_task("permuted_mnist_henning")
    assert task.entropy
    assert task.hash == task.model_copy(update={"entropy": False}).hash


@pytest.mark.parametrize("scenario", ["domain", "class"])
def test_where_tasks_have_no_names_there_is_none_to_infer(scenario: Scenario) -> None:
    words = synthetic(scenario).model_dump(by_alias=True) | {"entropy": True}
    with pytest.raises(ValidationError, match=r"only where stream\.scenario is 'task'"):
        TaskSpec.model_validate(words)


def test_tasks_of_one_class_have_no_entropy_and_are_refused_before_anything_runs() -> None:
    """The softmax of one output is 1 whatever it is asked: such a task would take every sample."""
    task = asked(synthetic("task", n_tasks=3, classes=[2, 1, 2]))
    line = r"entropy needs two classes a task; of one class: task 2$"
    with pytest.raises(UserError, match=line):
        run(task, "finetune", 0)
    (problem,) = preflight([resolve(task, load_baseline("finetune"))])
    assert problem.endswith("entropy needs two classes a task; of one class: task 2")


def test_a_record_without_it_is_written_as_it_always_was(tmp_path: Path) -> None:
    path = make_record().save(tmp_path)
    assert {"inferred", "generation"}.isdisjoint(json.loads(path.read_text()))
    assert records.load(path).dumps() == path.read_text()
    assert MEASURES["average_accuracy_entropy"].of(records.load(path)) is None


def test_a_record_with_it_survives_the_disk_and_has_a_column(tmp_path: Path) -> None:
    record = make_record(acc=[[0.9, 0.5], [0.9, 0.8]], inferred=[[0.9, 0.0], [0.25, 0.5]])
    assert records.load(record.save(tmp_path)) == record
    assert MEASURES["average_accuracy_entropy"].of(record) == 0.375
    names = {measure.name for measure in chosen(None, [record])}
    assert "average_accuracy_entropy" in names
    assert "average_accuracy_entropy" not in {measure.name for measure in chosen(None, [make_record()])}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([[0.5, 0.0]], "inferred: its shape"),
        ([[0.5, 0.0], [0.5]], "inferred: its shape"),
        ([[0.5, 0.0], [0.5, 1.5]], "inferred: a value"),
    ],
)
def test_damaged_rows_are_named(tmp_path: Path, value: Any, says: str) -> None:
    path = make_record(acc=[[0.9, 0.5], [0.9, 0.8]], inferred=[[0.5, 0.0], [0.5, 0.5]]).save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"inferred": value}))
    with pytest.raises(UserError, match=says):
        records.load(path)


def test_compression_is_a_column_where_a_run_has_one(tmp_path: Path) -> None:
    """Of two runs, one with a generator: 4,000 numbers for 8,000 weights. The other has a dash."""
    found = Generation(target_parameters=8000, generator_parameters=4000, compression=0.5, sizes={"hidden": [4]})
    record = make_record(generation=found)
    assert records.load(record.save(tmp_path)) == record
    names = [measure.name for measure in chosen(None, [make_record(), record])]
    assert {"compression", "generated_parameters"} <= set(names)
    assert {"compression", "generated_parameters"}.isdisjoint(measure.name for measure in chosen(None, [make_record()]))
    assert [MEASURES["compression"].of(one) for one in (record, make_record())] == [0.5, None]
    assert MEASURES["generated_parameters"].of(record) == 8000
