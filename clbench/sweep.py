"""Many runs: tasks x baselines x seeds, in local worker processes.

Every run gets a process of its own, forked from a server that has torch loaded, so that a run that is killed (out of
memory, a crash in native code) takes nothing with it: it becomes a failed record and the sweep goes on. What is
recorded already is skipped, what was interrupted continues from its checkpoint, what failed is tried again. Two sweeps
may share a results folder; records are written atomically.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import select
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from clbench import data, records, runner, tracking
from clbench.books import failed_record
from clbench.environment import choose_device
from clbench.errors import UserError
from clbench.preflight import preflight
from clbench.progress import Progress, Reporter, Watch, spoken
from clbench.recipes import Experiment, load_baseline, load_task, names, resolve
from clbench.recipes import shipped as shipped_folder
from clbench.specs import datasets_of
from clbench.strategies.build import check
from clbench.tuning import Study, placed

Status = Literal["done", "failed", "skipped", "interrupted"]

SILENCE = 60.0
"""Seconds after which a sweep without a terminal says where it is."""


@dataclass(frozen=True)
class Job:
    """One run to do."""

    experiment: Experiment
    seed: int

    def __str__(self) -> str:
        return f"{self.experiment.task.name}/{self.experiment.label} seed {self.seed}"


@dataclass(frozen=True)
class Outcome:
    """What became of a job."""

    job: Job
    status: Status
    record: Path
    error: str | None = None
    log: Path | None = None


def plan(
    tasks: Iterable[str],
    baselines: Iterable[str],
    seeds: Iterable[int],
    overrides: Mapping[str, Any] | None = None,
    data_root: Path | None = None,
) -> list[Job]:
    """Return the runs of a sweep, seed by seed, after checking everything that can be checked before the first.

    Raises:
        UserError: every mistake in every recipe, setting, pairing and data set, one line each.
    """
    problems: list[str] = []
    specs: dict[str, list[Any]] = {"task": [], "baseline": []}
    for kind, given, loader in (("task", tasks, load_task), ("baseline", baselines, load_baseline)):
        for name in dict.fromkeys(given):
            with _collected(problems):
                specs[kind].append(loader(name))
    missing: set[str] = set()
    experiments = []
    for task in specs["task"]:
        for name in datasets_of(task.stream):
            if name not in missing:
                with _collected(problems) as failed:
                    data.load(name, data_root)
                missing |= {name} if failed else set()
        for baseline in specs["baseline"]:
            with _collected(problems):
                experiment = resolve(task, baseline, overrides)
                check(experiment)
                experiments.append(experiment)
    problems += _clashes(experiments)
    if not missing:
        problems += preflight(experiments, data_root)
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return [Job(experiment, seed) for seed in dict.fromkeys(seeds) for experiment in experiments]


def plan_studies(studies: Iterable[Study], data_root: Path | None = None) -> list[Job]:
    """Return the runs of studies, seed by seed, after checking everything that can be checked before the first.

    Raises:
        UserError: every point that the strategy or the net does not take, every data set that is missing.
    """
    known = list(studies)
    problems: list[str] = []
    for study in known:
        whatever: list[str] = []
        refused: list[str] = []
        with _collected(whatever):
            check(study.base)
        for experiment in study.experiments:
            with _collected(refused):
                check(experiment)
        # What is wrong without the grid as well is none of the grid's mistakes.
        problems += [line if line in whatever else placed(line, study.origin) for line in dict.fromkeys(refused)]
    experiments = [experiment for study in known for experiment in study.experiments]
    problems += _clashes(experiments)
    if not problems:
        for name in {name for experiment in experiments for name in datasets_of(experiment.task.stream)}:
            with _collected(problems):
                data.load(name, data_root, test=False)
    if not problems:
        problems += preflight(experiments, data_root)
    if problems:
        raise UserError(*dict.fromkeys(problems))
    return [Job(experiment, seed) for study in known for seed in study.seeds for experiment in study.experiments]


def _clashes(experiments: Sequence[Experiment]) -> list[str]:
    """Return a line for every two recipes whose records would have the same name."""
    lines = []
    seen: dict[tuple[str, str], tuple[str, str]] = {}
    for experiment in experiments:
        place, content = (experiment.task.name, experiment.label), (experiment.task.hash, experiment.hash)
        if seen.setdefault(place, content) != content:
            lines.append(f"two recipes are called '{place[0]}' or '{place[1]}': their records would mix; rename one")
        own = Path(experiment.baseline.folder) != shipped_folder("baseline").resolve()
        if own and experiment.baseline.name in names("baseline"):
            lines.append(f"'{experiment.baseline.name}' is a shipped baseline: give your recipe's file another name")
    return lines


@contextlib.contextmanager
def _collected(problems: list[str]) -> Any:
    failed: list[bool] = []
    try:
        yield failed
    except UserError as error:
        problems.extend(error.lines)
        failed.append(True)


def sweep(
    jobs: Sequence[Job],
    out: Path,
    *,
    device: str = "auto",
    workers: int | None = None,
    threads: int = 1,
    data_root: Path | None = None,
    show_progress: bool = True,
    track: Sequence[str] = (),
    evaluate_every: int | None = None,
) -> list[Outcome]:
    """Run every job that is not recorded yet.

    Args:
        jobs: from `plan`.
        out: results folder; records go to `out/<task>/<label>/`, with a log beside each that had something to say.
        device: for every run.
        workers: processes at a time; None takes as many as the cores allow on the CPU, and one on a GPU.
        threads: CPU threads of each run.
        data_root: the data cache; None for the user's.
        show_progress: a progress bar on stderr.
        track: "tensorboard", "wandb": charts of every run under the folder `tracking` beside `out`.
        evaluate_every: see `runner.run`; a run that is recorded without these evaluations is run again.

    Returns:
        One outcome a job, in the order of `jobs`.

    Raises:
        UserError: `out` cannot be written, or `device` is not there.
        KeyboardInterrupt: after every worker has saved what it had.
    """
    where = choose_device(device)
    tracking.check(track)
    _writable(out)
    if workers is None:
        workers = 1 if where.type == "cuda" else max(1, _cores() // threads)
    outcomes: dict[int, Outcome] = {}
    waiting: list[int] = []
    for number, job in enumerate(jobs):
        path = records.record_path(out, job.experiment.task.name, job.experiment.label, job.seed, where.type)
        if _recorded(path, job, threads, data_root, evaluate_every):
            outcomes[number] = Outcome(job, "skipped", path)
        else:
            waiting.append(number)
    options = {"device": str(where), "threads": threads, "data_root": data_root, "evaluate_every": evaluate_every}
    options["track"] = tuple(track)
    # Whoever waits wants to see something move: count tasks, not runs.
    total = sum(jobs[number].experiment.task.stream.n_tasks for number in waiting)
    # A bar where somebody watches it, a line per finished run where a log does.
    watched = sys.stderr.isatty()
    hidden = not (show_progress and waiting and watched)
    progress = Progress(
        {number: (_short(jobs[number]), _kinds(jobs[number])) for number in waiting}, workers, time.monotonic
    )
    said = time.monotonic()
    with tqdm(total=total, unit="task", disable=hidden, file=sys.stderr) as bar:
        running: dict[Connection, _Worker] = {}
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    number = waiting.pop(0)
                    worker = _start(number, jobs[number], out, options, where.type)
                    progress.started(number)
                    running[worker.pipe] = worker
                for pipe in wait(list(running), timeout=1.0):
                    assert isinstance(pipe, Connection)
                    worker = running[pipe]
                    if not worker.listen(bar, progress):
                        del running[pipe]
                        outcomes[worker.number] = outcome = worker.finish(out, where.type, threads)
                        seconds = progress.ended(worker.number, outcome.status == "done")
                        _say(outcome, bar, len(outcomes), len(jobs), show_progress and not watched, seconds, progress)
                        said = time.monotonic()
                if not hidden:
                    # What the bar itself takes of the line, or nearly.
                    bar.set_postfix_str(progress.line(max(40, (bar.ncols or 120) - 60)))
                elif show_progress and running and time.monotonic() - said > SILENCE:
                    bar.write(progress.line(), file=sys.stderr)
                    said = time.monotonic()
        except KeyboardInterrupt:
            for worker in running.values():
                worker.process.terminate()
            for worker in running.values():
                worker.process.join()
            raise
    return [outcomes[number] for number in range(len(jobs))]


# -------------------------------------------------------------------------------------------------------------- workers


@dataclass
class _Worker:
    number: int
    job: Job
    process: BaseProcess
    pipe: Connection
    log: Path
    record: Path
    n_tasks: int
    tasks_done: int = 0
    status: Status | None = None
    error: str | None = None

    def listen(self, bar: Any, progress: Progress) -> bool:
        """Take one message; return False when the worker has nothing more to say."""
        try:
            kind, *content = self.pipe.recv()
        except (EOFError, OSError):
            bar.update(self.n_tasks - self.tasks_done)
            return False
        if kind == "progress":
            bar.update(content[0] - self.tasks_done)
            self.tasks_done = content[0]
        elif kind == "beat":
            progress.beat(self.number, content[0])
        else:
            self.status, self.error = content
        return True

    def finish(self, out: Path, device: str, threads: int) -> Outcome:
        """Return what became of the run; write a failed record for a worker that died without a word."""
        self.process.join()
        self.pipe.close()
        if self.status is None:
            code = self.process.exitcode
            cause = f"killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
            hint = " (out of memory?)" if code == -9 else ""
            self.status, self.error = "failed", f"worker process {cause}{hint}"
            failed_record(self.job.experiment, self.job.seed, device, threads, self.error).save(out)
        said = self.log.read_text(errors="replace").strip() if self.log.exists() else ""
        if not said:
            self.log.unlink(missing_ok=True)
        return Outcome(self.job, self.status, self.record, self.error, self.log if said else None)


def _start(number: int, job: Job, out: Path, options: Mapping[str, Any], device: str) -> _Worker:
    context = multiprocessing.get_context("forkserver")
    # Importing torch and avalanche takes seconds; the server does it once. CUDA must stay untouched there.
    context.set_forkserver_preload(["clbench.runner"])
    record = records.record_path(out, job.experiment.task.name, job.experiment.label, job.seed, device)
    log = record.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, out, dict(options), log, theirs), daemon=True)
    process.start()
    theirs.close()
    return _Worker(number, job, process, mine, log, record, job.experiment.task.stream.n_tasks)


def _work(job: Job, out: Path, options: dict[str, Any], log: Path, pipe: Connection) -> None:
    """One run, in a process of its own: everything it prints goes to its log."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # A terminal's Ctrl-C reaches every process: only the parent's own word stops a worker, once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watch, lock = Watch(), threading.Lock()

    def tell(*message: Any, patient: bool = True) -> None:
        # A pipe takes one writer at a time; a parent that is gone hears nothing.
        with lock, contextlib.suppress(OSError):
            if patient or has_room(pipe):
                pipe.send(message)

    try:
        # A parent that is held up (a terminal that was stopped) must not hold up runs: what it cannot take is dropped.
        with Reporter(watch, lambda beat: tell("beat", beat, patient=False)):
            record = _run(job, out, options, watch, tell)
        tell("end", record.status, record.error)
    except KeyboardInterrupt:
        tell("end", "interrupted", None)
    except UserError as error:
        said = "; ".join(error.lines)
        device = choose_device(options["device"]).type
        failed_record(job.experiment, job.seed, device, options["threads"], said).save(out)
        tell("end", "failed", said)


def has_room(pipe: Connection) -> bool:
    """Whether a message of up to 4 KiB can be sent without waiting for a reader. Raises OSError of a closed pipe."""
    poll = select.poll()
    poll.register(pipe.fileno(), select.POLLOUT)
    return bool(poll.poll(0))


def _run(job: Job, out: Path, options: dict[str, Any], watch: Watch, tell: Callable[..., None]) -> records.RunRecord:
    experiment = job.experiment
    others = {name: value for name, value in options.items() if name != "track"}
    device = choose_device(options["device"]).type
    folder = records.record_path(out.parent / "tracking", experiment.task.name, experiment.label, job.seed, device)
    settings = {"task": experiment.task.name, "baseline": experiment.label, "seed": job.seed, **experiment.settings}
    with tracking.tracked(options["track"], folder.with_suffix(""), str(job), settings) as after_task:
        watch.after_task = after_task
        return runner.run(
            experiment.task,
            experiment.baseline,
            job.seed,
            overrides=experiment.overrides,
            out=out,
            progress=lambda done, total: tell("progress", done),
            watch=watch,
            **others,
        )


def _short(job: Job) -> str:
    return f"{job.experiment.label} s{job.seed}"


def _kinds(job: Job) -> tuple[object, ...]:
    """Return what a run is like, the most alike first."""
    task = job.experiment.task.hash
    return (task, job.experiment.hash), task


def _say(outcome: Outcome, bar: Any, number: int, total: int, every: bool, seconds: float, progress: Progress) -> None:
    """Tell of a failure at once, of every run where there is no bar."""
    if outcome.status == "failed":
        bar.write(f"failed: {outcome.job}: {outcome.error}", file=sys.stderr)
    elif every:
        left = progress.seconds_left() if number < total else None
        rest = "" if left is None else f", about {spoken(left)} left"
        line = f"[{number}/{total}] {outcome.status}: {outcome.job} in {spoken(seconds)}{rest}"
        bar.write(line, file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------- the results


def _recorded(path: Path, job: Job, threads: int, data_root: Path | None, evaluate_every: int | None) -> bool:
    """Whether this very run (same recipe, settings, data, threads and asked-for evaluations) is done already."""
    if not path.is_file():
        return False
    try:
        record = records.load(path)
    except UserError:
        return False
    same_recipe = record.task.hash == job.experiment.task.hash and record.baseline.hash == job.experiment.hash
    same_data = all(data.load(name, data_root, test=False).fingerprint == known for name, known in record.data.items())
    evaluated = evaluate_every is None or any(found.every == evaluate_every for found in record.within)
    same_run = same_recipe and same_data and record.environment.threads == threads and evaluated
    return record.status == "done" and same_run


def _cores() -> int:
    """Return the cores this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _writable(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error})") from None


def seconds_since(start: float) -> str:
    """Return "1 min 5 s" since a `time.monotonic()`."""
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
