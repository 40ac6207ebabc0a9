"""One run: a baseline on a task stream with one seed, from first task to record.

    from clbench.runner import run
    record = run("digits_split", "ewc", seed=0)
    record.matrix                                   # (T, T) accuracies

The loop over tasks is `_learn`, in plain sight: train, evaluate on every task, count what is kept, save.

Letters: T tasks.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from clbench import checkpoint
from clbench.books import WITHIN, Books
from clbench.continual_evaluation import ContinualEvaluation
from clbench.environment import choose_device
from clbench.errors import UserError
from clbench.flops import StepCounter, of_answer
from clbench.footprint import footprint
from clbench.imports import load_object
from clbench.loading import tasks_in
from clbench.memory import Meter
from clbench.nets import HeadedNet, build_head, build_trunk
from clbench.nets.shared.linked import check_links
from clbench.process import memory_kept, reproducible, stoppable
from clbench.progress import Watch
from clbench.recipes import Experiment, load_baseline, load_task, resolve
from clbench.records import RunRecord, record_path
from clbench.seeds import Pinned, derive
from clbench.sharing import sharing
from clbench.specs import BaselineSpec, ModelSpec, OwnModel, Scenario, TaskSpec, tasks_in_all
from clbench.strategies.base import Setup, Strategy
from clbench.strategies.build import build, resolved_settings
from clbench.strategies.foreign import Foreign
from clbench.streams import Stream, make_stream

Device = Literal["cpu", "cuda"]


def run(
    task: str | TaskSpec,
    baseline: str | BaselineSpec,
    seed: int = 0,
    *,
    device: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    out: Path | None = None,
    threads: int = 1,
    data_root: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    count_flops: bool = True,
    evaluate_every: int | None = None,
    watch: Watch | None = None,
) -> RunRecord:
    """Run one baseline on one task stream with one seed.

    Args:
        task: shipped name, path of a recipe, or a spec.
        baseline: likewise.
        seed: of the whole run; initialisation, order of data and order of classes are derived from it, apart.
        device: "cpu", "cuda" or "auto" (CUDA where there is one).
        overrides: settings of the strategy, and `train.<key>`, `model.<key>`.
        out: folder for the record and, while the run lasts, its checkpoint; None writes nothing.
        threads: CPU threads of torch's kernels; part of the record, because numbers depend on it.
        data_root: the data cache; None for the user's.
        progress: called as `progress(tasks done, T)`.
        count_flops: count the operations of training steps and answers; changes no other number.
        evaluate_every: training iterations between two evaluations of the tasks seen within a task; None evaluates
            after tasks alone. Changes no other number.
        watch: told where the run is, for whoever looks.

    Returns:
        The record; of status "failed" when the strategy raised, diverged or ran out of memory.

    Raises:
        UserError: the recipe, a setting or the data are not right; nothing was run or written.
    """
    if evaluate_every is not None and evaluate_every < 1:
        raise UserError(f"evaluate_every: must be a whole number above 0, not {evaluate_every}")
    task_spec = load_task(task) if isinstance(task, str) else task
    baseline_spec = load_baseline(baseline) if isinstance(baseline, str) else baseline
    experiment = resolve(task_spec, baseline_spec, overrides)
    where = choose_device(device)
    resolved_settings(experiment)
    seed = Pinned(seed, experiment.pins)
    stream = make_stream(task_spec.stream, seed, where, data_root)
    check_classes(task_spec, stream)
    with reproducible(seed, threads), stoppable(), memory_kept():
        books = Books(experiment, seed, where, threads, stream.fingerprints, count_flops, evaluate_every)
        path = checkpoint_path(out, experiment, seed, where) if out is not None else None
        try:
            _learn(books, stream, path, progress, watch or Watch())
            books.status = "done"
        except KeyboardInterrupt:
            books.status = "interrupted"
            if out is not None:
                books.record().save(out)
            raise
        except UserError:
            raise
        # Whatever a strategy raises becomes a record, so that a sweep goes on.
        except Exception as error:
            books.fail(error)
    record = books.record()
    if out is not None:
        record.save(out)
        # After a failure (out of memory, say) the next try may go on from the last task.
        if path is not None and books.status == "done":
            path.unlink(missing_ok=True)
    return record


def _learn(
    books: Books, stream: Stream, path: Path | None, progress: Callable[[int, int], None] | None, watch: Watch
) -> None:
    """The loop over tasks."""
    experiment, device = books.experiment, books.device
    new_net = net_factory(experiment, stream, books.seed)
    tasks = tasks_in_all(experiment.task.stream)
    setup = Setup(new_net=new_net, train=experiment.train, device=device, seed=books.seed, tasks=tasks)
    books.single_task_parameters = _single_task_parameters(new_net, stream)
    strategy = build(experiment, setup)
    meter = Meter(device)
    strategy.phase = meter.phase
    counter = StepCounter(lambda: strategy.samples_trained) if books.counts_flops else None
    if counter is not None:
        strategy.around = counter
        watch.steps = lambda: counter.steps
    tests = list(stream.benchmark.test_stream)
    continual = None
    if books.evaluates_every is not None:
        continual = ContinualEvaluation(strategy, tests, books.evaluates_every, lambda: meter.phase(WITHIN), counter)
        strategy.around = continual
    watch.tasks, watch.epochs = stream.n_tasks, experiment.train.epochs or 0
    wanted, infers = experiment.task.auroc, experiment.task.entropy
    learned: dict[int, None] = {}
    """Labels of the tasks learned so far."""

    first = _restore(path, books, strategy, stream)
    if first == 0:
        books.start([strategy.evaluate(test, wanted) for test in tests])
    for index, experience in enumerate(stream.benchmark.train_stream):
        learned[int(experience.task_label)] = None
        if index < first:
            continue
        with contextlib.ExitStack() as held:
            for task in tasks_in(experience.dataset):
                held.enter_context(task.mapped())
            meter.take()
            watch.task, watch.phase = index, "train"
            watch.steps_an_epoch = -(-len(experience.dataset) // experiment.train.batch_size)
            if continual is not None:
                continual.begin(index)
            with meter.phase("train"):
                strategy.train_task(experience)
        watch.phase = "evaluate"
        with meter.phase("evaluate"):
            row = [strategy.evaluate(test, wanted) for test in tests]
            inferred = [_inferred(strategy, test, learned) for test in tests] if infers else None
        books.learned(row, inferred)
        if continual is not None:
            books.within.append(continual.take())
        if isinstance(strategy, Strategy):
            books.grown(strategy)
        holdings = strategy.holdings()
        books.footprints.append(footprint(holdings))
        if counter is not None:
            answer = strategy.evaluate if isinstance(strategy, Strategy) else strategy.evaluate_one
            books.flops.append(counter.take(*of_answer(answer, tests[index])))
        peaks, seconds = meter.take()
        books.peaks.append(peaks)
        books.seconds.append(seconds)
        books.samples = strategy.samples_trained
        if index + 1 == stream.n_tasks:
            books.sharing = sharing(strategy.uses(), dict(holdings.model.named_parameters()))
            books.generation = strategy.generation() if isinstance(strategy, Strategy) else None
        if path is not None and index + 1 < stream.n_tasks:
            _save(path, books, strategy)
        if watch.after_task is not None:
            watch.after_task(books.record())
        if progress is not None:
            progress(index + 1, stream.n_tasks)


def _inferred(strategy: Strategy | Foreign, test: Any, learned: Iterable[int]) -> float:
    """Return the accuracy on a task that is not named; on one that was not learned, none is right."""
    tasks = list(learned)
    return strategy.inferred(test, tasks) if int(test.task_label) in tasks else 0.0


def check_classes(task: TaskSpec, stream: Stream) -> None:
    """Refuse an area under the ROC curve, or the entropy of an answer, where a task has no two classes."""
    single = [str(i + 1) for i, test in enumerate(stream.test) if bool((test.labels == test.labels[0]).all())]
    for name, asked in (("auroc", task.auroc), ("entropy", task.entropy)):
        if asked and single:
            found = ", ".join(single)
            raise UserError(f"task '{task.name}': {name} needs two classes a task; of one class: task {found}")


# ---------------------------------------------------------------------------------------------------------- checkpoints


def checkpoint_path(out: Path, experiment: Experiment, seed: int, device: torch.device) -> Path:
    """Return where a run keeps its checkpoint: beside its record."""
    record = record_path(out, experiment.task.name, experiment.label, seed, device.type)
    return record.with_suffix(".checkpoint")


def _identity(books: Books) -> dict[str, Any]:
    """What must agree for a checkpoint to be of this very run."""
    return {
        "task": books.experiment.task.hash,
        "auroc": books.experiment.task.auroc,
        "entropy": books.experiment.task.entropy,
        "flops": books.counts_flops,
        "within": books.evaluates_every,
        "baseline": books.experiment.hash,
        "seed": int(books.seed),
        "data": books.fingerprints,
        "torch": str(torch.__version__),  # a plain string, as a checkpoint holds nothing else
        "code": _code_digest(),
        "threads": books.threads,
    }


@functools.cache
def _code_digest() -> str:
    """Return a digest of the package: half a run by one code and half by another is no run."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).resolve().parent.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _save(path: Path, books: Books, strategy: Strategy | Foreign) -> None:
    # State that a method keeps without declaring it would be missing after a resume: rather start such a run again.
    if not isinstance(strategy, Strategy) or strategy.undeclared():
        return
    checkpoint.save(
        path,
        {
            "identity": _identity(books),
            "strategy": strategy.state_dict(),
            "generators": checkpoint.generator_states({"order": strategy.order, "chance": strategy.chance}),
            "record": books.record().dumps(),
            "samples": books.samples,
        },
    )


def _restore(path: Path | None, books: Books, strategy: Strategy | Foreign, stream: Stream) -> int:
    """Continue from a checkpoint of this very run, if there is one; return how many tasks are done."""
    content = checkpoint.load(path, books.device) if path is not None else None
    if content is None or content["identity"] != _identity(books) or not isinstance(strategy, Strategy):
        return 0
    so_far = RunRecord.model_validate_json(content["record"])
    done = len(so_far.acc)
    strategy.load_state_dict(content["strategy"], list(stream.benchmark.train_stream)[:done])
    checkpoint.restore_generators(content["generators"], {"order": strategy.order, "chance": strategy.chance})
    books.acc, books.acc_init = so_far.acc, so_far.acc_init
    books.auroc, books.auroc_init = so_far.auroc, so_far.auroc_init
    books.inferred = so_far.inferred
    books.growth, books.units = so_far.growth, so_far.units
    books.widths = so_far.widths or [{} for _ in range(done)]
    books.footprints, books.peaks, books.seconds = so_far.footprints, so_far.peaks, so_far.timing.seconds
    books.flops, books.within = so_far.flops, so_far.within
    books.samples, books.started = content["samples"], so_far.timing.started
    return done


# -------------------------------------------------------------------------------------------------------------- the net


@dataclass(frozen=True)
class _NetMaker:
    """Makes freshly initialised nets: always the same one, whatever else was drawn before. Nets that keep it pickle."""

    spec: ModelSpec
    scenario: Scenario
    input_shape: tuple[int, ...]
    outputs: Sequence[Sequence[int]]
    birth: int

    def __call__(self) -> HeadedNet:
        settings = self.spec.model_dump(exclude={"kind", "class_head"})
        bias, init = bool(settings.get("bias", True)), str(settings.get("init", "torch"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.birth)
            if isinstance(self.spec, OwnModel):
                factory = load_object(self.spec.factory, ".", "model.factory")
                trunk = factory(self.input_shape, **self.spec.settings)
            else:
                trunk = build_trunk(self.spec.kind, self.input_shape, **settings)
            head = self.spec.class_head
            made = build_head(self.scenario, head, trunk.out_features, self.outputs, self.birth, bias, init)
        return HeadedNet(trunk, made)


def net_factory(experiment: Experiment, stream: Stream, seed: int) -> Callable[[], HeadedNet]:
    """Return a maker of freshly initialised nets for a stream; raise UserError where the net cannot be one."""
    scenario = experiment.task.stream.scenario
    new_net = _NetMaker(experiment.model, scenario, stream.input_shape, stream.outputs, derive(seed, "init"))
    try:
        check_links(new_net())
    except (ValueError, TypeError) as error:
        raise UserError(f"task '{experiment.task.name}': model: {error}") from None
    return new_net


def _single_task_parameters(new_net: Callable[[], HeadedNet], stream: Stream) -> int:
    net = new_net()
    net.observe(stream.train[0].task, stream.outputs[0])
    return sum(parameter.numel() for parameter in net.parameters())
