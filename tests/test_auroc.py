"""The area under the ROC curve: the number itself, how strategies rank samples for it, and its place in a record."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor

from clbench import records
from clbench.errors import UserError
from clbench.loading import ResidentLoader
from clbench.metrics import auroc
from clbench.preflight import preflight
from clbench.recipes import load_baseline, load_task, resolve
from clbench.runner import run
from clbench.specs import BaselineSpec, Scenario, TaskSpec
from clbench.strategies.base import Strategy
from record_factory import make_record
from strategy_factory import AVALANCHES, made, recipe, synthetic

RNG = np.random.default_rng


def asked(task: TaskSpec) -> TaskSpec:
    return task.model_copy(update={"auroc": True})


# ----------------------------------------------------------------------------------------------------------- the number


def test_by_hand() -> None:
    """Class 1's scores .8, .4 against .4, .1 of class 0: of four pairs three in order and one equal, 3.5 / 4.

    Class 0's scores .9, .3 against .5, .2: .9 wins twice, .3 once: 3 / 4. Mean .8125.
    """
    scores = np.array([[0.9, 0.4], [0.3, 0.1], [0.5, 0.8], [0.2, 0.4]])
    assert auroc(scores, np.array([0, 0, 1, 1])) == (0.875 + 0.75) / 2


def counted(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Every pair looked at, one by one."""
    areas = []
    for label in sorted(set(labels.tolist())):
        own, rest = scores[labels == label, label], scores[labels != label, label]
        pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in own for b in rest]
        areas.append(sum(pairs) / len(pairs))
    return sum(areas) / len(areas)


@pytest.mark.parametrize("levels", [2, 5, 1_000_000])
@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_share_of_pairs_in_order_whatever_the_ties(levels: int, seed: int) -> None:
    """Scores of 2 and 5 levels tie almost always, those of a million almost never."""
    rng = RNG(seed)
    labels = rng.integers(0, 4, 60)
    scores: NDArray[np.float64] = rng.integers(0, levels, (60, 4)).astype(np.float64) / levels
    assert auroc(scores, labels) == pytest.approx(counted(scores, labels), abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_it_agrees_with_scikit_learn(dtype: type) -> None:
    """Its macro one-against-rest wants rows that sum to one; class by class it takes any score."""
    rng = RNG(7)
    labels = rng.integers(0, 10, 3000)
    scores: NDArray[np.floating] = np.round(rng.normal(0, 1, (3000, 10)) + 2 * np.eye(10)[labels], 1).astype(dtype)
    alone = [roc_auc_score(labels == label, scores[:, label]) for label in range(10)]
    assert auroc(scores, labels) == pytest.approx(float(np.mean(alone)), abs=1e-12)
    shares = np.exp(scores.astype(np.float64))
    shares /= shares.sum(axis=1, keepdims=True)
    theirs = roc_auc_score(labels, shares, multi_class="ovr", average="macro")
    assert auroc(shares, labels) == pytest.approx(float(theirs), abs=1e-12)


def test_only_the_order_of_scores_matters_infinite_ones_included() -> None:
    """-inf is a score like any other: the lowest."""
    labels = np.array([0, 0, 1, 1])
    low = np.array([[3.0, -np.inf], [1.0, -np.inf], [2.0, -np.inf], [-np.inf, 0.0]])
    assert auroc(low, labels) == (0.75 + 0.75) / 2
    assert auroc(np.where(np.isinf(low), -9.0, low) ** 3, labels) == 0.75


def test_perfect_reversed_and_indifferent_scores() -> None:
    labels = np.array([0, 1, 2, 0, 1, 2])
    perfect = np.eye(3)[labels]
    assert [auroc(perfect, labels), auroc(-perfect, labels), auroc(0 * perfect, labels)] == [1.0, 0.0, 0.5]


def test_a_class_without_a_score_counts_a_half() -> None:
    """Class 0 is told apart perfectly, classes 2 and 3 have no output: (1 + .5 + .5) / 3."""
    scores = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert auroc(scores, np.array([0, 2, 3])) == pytest.approx(2 / 3)


def test_outputs_of_classes_that_no_sample_has_are_left_out() -> None:
    labels = np.array([0, 1, 0, 1])
    assert auroc(np.eye(9)[labels], labels) == 1.0


def test_what_has_no_area_is_not_a_number() -> None:
    assert math.isnan(auroc(np.ones((3, 2)), np.array([1, 1, 1])))
    assert math.isnan(auroc(np.ones((0, 2)), np.zeros(0, dtype=int)))
    assert math.isnan(auroc(np.array([[0.1, np.nan], [0.2, 0.3]]), np.array([0, 1])))


def test_malformed_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not \(3, 2\) and \(2,\)"):
        auroc(np.ones((3, 2)), np.array([0, 1]))
    with pytest.raises(ValueError, match="a label is -1"):
        auroc(np.ones((2, 2)), np.array([-1, 1]))


# ----------------------------------------------------------------------------------------------------------- strategies


class Sigmoids(Strategy):
    """Ranks its logits as they are."""

    def scores(self, logits: Tensor) -> Tensor:
        return logits


def by_hand(strategy: Any, test: Any, softmax: bool) -> float:
    """Return scikit-learn's mean area on the net's own answers to all samples of a task."""
    with torch.no_grad():
        (batch,) = ResidentLoader([test], len(test))
        own = isinstance(strategy, Strategy)
        logits = strategy.answer(batch.x, batch.t) if own else strategy.model(batch.x, test.task)
    ranked = torch.log_softmax(logits.double(), dim=1) if softmax else logits
    areas = [roc_auc_score(batch.y == label, ranked[:, label]) for label in range(int(batch.y.max()) + 1)]
    return float(np.mean(areas))


@pytest.mark.parametrize("baseline", ["finetune", AVALANCHES, "independent"])
def test_one_pass_gives_accuracy_and_area(baseline: str | BaselineSpec) -> None:
    """Own and foreign strategies rank the log-softmax, in float64; both numbers are those of the net's answers."""
    strategy, stream = made(synthetic("task", n_tasks=2, classes=3, iterations=10), baseline)
    strategy.train_task(stream.benchmark.train_stream[0])
    for test, experience in zip(stream.test, stream.benchmark.test_stream, strict=True):
        found = strategy.evaluate(experience, True)
        assert found.accuracy == strategy.accuracy(experience)
        strategy.model.eval()
        assert found.auroc == pytest.approx(by_hand(strategy, test, softmax=True), abs=1e-12)
        assert strategy.evaluate(experience).auroc is None


def test_a_method_with_sigmoids_ranks_its_logits() -> None:
    """A softmax weighs each output against the others, so that it orders samples otherwise: two different areas."""
    strategy, stream = made(synthetic("task", n_tasks=1, classes=4, iterations=3), recipe(f"{__name__}:Sigmoids"))
    strategy.train_task(stream.benchmark.train_stream[0])
    found = strategy.evaluate(stream.benchmark.test_stream[0], True).auroc
    strategy.model.eval()
    assert found == pytest.approx(by_hand(strategy, stream.test[0], softmax=False), abs=1e-12)
    assert found != pytest.approx(by_hand(strategy, stream.test[0], softmax=True), abs=1e-6)


def test_confident_answers_do_not_tie() -> None:
    """In float32 the log-probabilities of logits 40 and 50 against 0 are both exactly 0; in float64 they differ."""
    strategy, _ = made(synthetic("task", n_tasks=1), "finetune")
    scores = strategy.scores(torch.tensor([[40.0, 0.0], [30.0, 0.0]]))
    assert scores.dtype == torch.float64
    assert scores[0, 0] > scores[1, 0]


def test_a_growing_head_that_lacks_a_tasks_classes_is_indifferent_to_them() -> None:
    """After task 1 of a class-incremental stream the classes 2 and 3 have no logit: both count a half."""
    strategy, stream = made(synthetic("class", n_tasks=2), "finetune")
    strategy.train_task(stream.benchmark.train_stream[0])
    assert strategy.evaluate(stream.benchmark.test_stream[1], True).auroc == 0.5


# -------------------------------------------------------------------------------------------------------------- records


@pytest.mark.parametrize(("baseline", "scenario"), [("finetune", "task"), (AVALANCHES, "domain"), ("er", "class")])
def test_a_run_records_both_matrices_where_the_task_asks(baseline: str | BaselineSpec, scenario: Scenario) -> None:
    """Asking changes no other number; what was learned is ranked well."""
    task = synthetic(scenario, n_tasks=3)
    plain, found = run(task, baseline, 1), run(asked(task), baseline, 1)
    assert found.status == "done", found.traceback
    assert (plain.auroc, plain.auroc_init) == (None, None)
    own = {"auroc", "auroc_init", "timing", "peaks"}
    assert found.model_dump(exclude=own) == plain.model_dump(exclude=own)
    assert found.auroc is not None
    assert found.auroc_init is not None
    assert [len(row) for row in found.auroc] == [3, 3, 3]
    assert len(found.auroc_init) == 3
    assert found.auroc[0][0] > 0.95


def test_an_interrupted_run_keeps_its_areas(tmp_path: Path) -> None:
    task = asked(synthetic("task", n_tasks=3, iterations=5))

    def interrupt(done: int, _: int) -> None:
        raise KeyboardInterrupt

    for rows in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            run(task, "finetune", 0, out=tmp_path, progress=interrupt)
        partial = records.load(next(tmp_path.rglob("*.json")))
        assert partial.auroc is not None
        assert len(partial.auroc) == len(partial.acc) == rows
    resumed = run(task, "finetune", 0, out=tmp_path)
    whole = run(task, "finetune", 0)
    assert (resumed.auroc, resumed.auroc_init) == (whole.auroc, whole.auroc_init)


def test_a_checkpoint_without_areas_is_not_continued_by_a_run_that_wants_them(tmp_path: Path) -> None:
    task = synthetic("task", n_tasks=2, iterations=5)

    def interrupt(done: int, _: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(task, "finetune", 0, out=tmp_path, progress=interrupt)
    found = run(asked(task), "finetune", 0, out=tmp_path)
    assert found.auroc is not None
    assert [len(row) for row in found.auroc] == [2, 2]


def test_asking_is_no_part_of_the_recipes_hash() -> None:
    task = load_task("permuted_mnist_den")
    assert task.auroc
    assert task.hash == task.model_copy(update={"auroc": False}).hash


def test_tasks_of_one_class_have_no_area_and_are_refused_before_anything_runs(tmp_path: Path) -> None:
    task = asked(synthetic("task", n_tasks=3, classes=[2, 1, 2]))
    with pytest.raises(UserError, match=r"auroc needs two classes a task; of one class: task 2$"):
        run(task, "finetune", 0, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_preflight_finds_tasks_of_one_class() -> None:
    task = asked(synthetic("task", n_tasks=3, classes=[2, 1, 2]))
    assert preflight([resolve(task, load_baseline("finetune"))]) == [
        "task 'synthetic_split': auroc needs two classes a task; of one class: task 2"
    ]


def test_a_record_without_areas_is_written_as_it_always_was(tmp_path: Path) -> None:
    """No new key in the file, so that files from before them are what is written now; and such files are read."""
    path = make_record().save(tmp_path)
    assert {"auroc", "auroc_init", "widths", "units"}.isdisjoint(json.loads(path.read_text()))
    assert records.load(path).auroc is None
    assert records.load(path).dumps() == path.read_text()


def test_a_record_with_areas_survives_the_disk(tmp_path: Path) -> None:
    record = make_record(auroc=[[0.5, 0.5], [0.9, 0.8]])
    assert records.load(record.save(tmp_path)) == record


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("auroc", [[0.5, 0.5]], "auroc: its shape"),
        ("auroc", [[0.5, 0.5], [0.5]], "auroc: its shape"),
        ("auroc", [[0.5, 0.5], [0.5, 1.5]], "auroc: a value"),
        ("auroc_init", [0.5], "auroc_init: its shape"),
        ("auroc_init", None, "auroc_init: its shape"),
    ],
)
def test_damaged_areas_are_named(tmp_path: Path, key: str, value: Any, says: str) -> None:
    path = make_record(auroc=[[0.5, 0.5], [0.9, 0.8]]).save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=says):
        records.load(path)
