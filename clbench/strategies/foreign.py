"""Avalanche's own strategies, and any written for Avalanche, as strategies of the suite.

A recipe names the class by its import path; it gets the same net, budget, stream and seed as the suite's own, reads its
data through `loading.fast_loading`, and is asked for the same numbers.

What cannot be had from a class that knows nothing of it: its state cannot be saved between tasks (Avalanche's own
checkpoints fail or restart half-trained), so an interrupted run starts again from its beginning.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from avalanche.core import SupervisedPlugin
from avalanche.models import DynamicModule, MultiTaskModule
from torch import Tensor, nn

from clbench.footprint import Holdings, foreign_holdings, is_scaffolding, tensors_in
from clbench.loading import ResidentLoader, TensorTask, fast_loading, tasks_in
from clbench.nets import HeadedNet
from clbench.sharing import Use, uses_by_owner
from clbench.specs import Scenario
from clbench.strategies.base import CrossEntropy, Setup, check_weights, mean_loss, new_optimizer, no_metrics
from clbench.strategies.evaluation import Evaluation, Tally, accuracy_by_entropy, log_probabilities
from clbench.strategies.schedule import Schedule


class MultiTaskNet(MultiTaskModule):
    """A multi-head net as Avalanche expects one: told each sample's task."""

    def __init__(self, net: HeadedNet) -> None:
        super().__init__()
        self.net = net

    def adaptation(self, experience: DatasetExperience) -> None:
        """Give a task its head, when it is about to be trained."""
        super().adaptation(experience)
        if self.training:
            self.net.observe(int(experience.task_label), list(experience.classes_in_this_experience))

    def forward(self, x: Tensor, task_labels: Tensor | int | None) -> Any:
        """Return logits (B, C); for every task seen, keyed by task, when `task_labels` is None."""
        if task_labels is None:
            return self.forward_all_tasks(x)
        if isinstance(task_labels, Tensor) and bool((task_labels == task_labels[0]).all()):
            task_labels = int(task_labels[0])
        return self.net(x, task_labels)

    def forward_single_task(self, x: Tensor, task_label: int) -> Any:
        """Return logits (B, C) of one task's head."""
        return self.net(x, task_label)

    def forward_all_tasks(self, x: Tensor) -> Any:
        """Return the logits of every task seen, keyed by task; the trunk runs once, not once a head."""
        features = self.net.features(x)
        return {task: self.net.head(features, task) for task in self.known_train_tasks_labels}


class OneHeadNet(DynamicModule):
    """A net with one head, fixed or growing, as Avalanche expects one."""

    def __init__(self, net: HeadedNet) -> None:
        super().__init__()
        self.net = net

    def adaptation(self, experience: DatasetExperience) -> None:
        """Give new classes their logits, when they are about to be trained."""
        super().adaptation(experience)
        if self.training:
            self.net.observe(0, list(experience.classes_in_this_experience))

    def forward(self, x: Tensor) -> Any:
        """Return logits (B, C)."""
        return self.net(x)


class _Budget(SupervisedPlugin):
    """Holds a foreign strategy to the recipe's budget: fresh optimiser, iterations, clipping, schedule."""

    def __init__(self, setup: Setup) -> None:
        super().__init__()
        self.setup = setup
        self.steps = 0
        self.samples = 0
        self.schedule: Schedule | None = None
        self.held_out: list[TensorTask] = []
        self.around: Any = None
        """Opened around a training step, where the runner asks for it."""

    def before_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.steps = 0
        if self.setup.train.reset_optimizer:
            strategy.optimizer.state.clear()
        for group in strategy.optimizer.param_groups:
            group["lr"] = self.setup.train.lr
        self.schedule = Schedule(self.setup.train, strategy.optimizer)
        held_out = getattr(strategy.experience, "validation", None)
        self.held_out = tasks_in(strategy.experience.dataset.eval()) if held_out is None else [held_out]

    def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        if self.around is not None:
            self.around(strategy.experience, strategy.mb_x).__enter__()

    def before_update(self, strategy: Any, **kwargs: Any) -> None:
        if self.setup.train.grad_clip is not None:
            nn.utils.clip_grad_norm_(strategy.model.parameters(), self.setup.train.grad_clip)

    def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
        self.steps += 1
        self.samples += len(strategy.mb_y)
        if self.around is not None:
            self.around.__exit__()
        if self.steps == self.setup.train.iterations:
            strategy.stop_training()

    def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
        if not bool(torch.isfinite(strategy.loss)):
            raise FloatingPointError(f"the training loss is {strategy.loss.item()} (lr {self.setup.train.lr})")
        assert self.schedule is not None
        batch_size = self.setup.train.eval_batch_size
        if not self.schedule.step(lambda: mean_loss(strategy.model.net, self.held_out, batch_size)):
            strategy.stop_training()

    def after_training_exp(self, strategy: Any, **kwargs: Any) -> None:
        self.held_out = []
        check_weights(strategy.model, self.setup.train)
        if self.setup.train.reset_optimizer:
            strategy.optimizer.state.clear()


class _Answers(SupervisedPlugin):
    """Tallies the answers in Avalanche's evaluation loop, while a tally is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.tally: Tally | None = None

    def after_eval_forward(self, strategy: Any, **kwargs: Any) -> None:
        if self.tally is not None:
            self.tally.add(strategy.mb_output, strategy.mb_y)


class Foreign:
    """One Avalanche strategy, with the face the runner knows.

    Args:
        cls: the strategy's class.
        settings: its own arguments, checked already.
        setup: net, budget, device and seed.
        scenario: whether samples come with their task.
    """

    def __init__(self, cls: type, settings: Mapping[str, Any], setup: Setup, scenario: Scenario) -> None:
        self.setup = setup
        self.phase: Callable[[str], AbstractContextManager[None]] = lambda name: contextlib.nullcontext()
        headed = setup.new_net().to(setup.device)
        net = MultiTaskNet(headed) if scenario == "task" else OneHeadNet(headed)
        self._headed = headed
        self.tasks_seen = 0
        self._budget = _Budget(setup)
        self._answers = _Answers()
        self.strategy = cls(
            model=net,
            optimizer=new_optimizer(setup.train, net.parameters()),
            criterion=CrossEntropy(),
            train_mb_size=setup.train.batch_size,
            # An iteration budget ends training by itself, over as many passes as it takes.
            train_epochs=setup.train.epochs if setup.train.epochs is not None else setup.train.iterations,
            eval_mb_size=setup.train.eval_batch_size,
            device=setup.device,
            evaluator=no_metrics(),
            plugins=[self._budget, self._answers],
            **settings,
        )

    @property
    def model(self) -> nn.Module:
        """The net the strategy trains, without Avalanche's wrapper."""
        return self._headed

    @property
    def around(self) -> Any:
        """Opened around a training step; set by the runner, which counts and evaluates."""
        return self._budget.around

    @around.setter
    def around(self, context: Any) -> None:
        self._budget.around = context

    @property
    def samples_trained(self) -> int:
        """Samples that went through a training step, replayed ones included where they share its batch."""
        return self._budget.samples

    def train_task(self, experience: DatasetExperience) -> None:
        """Learn one task."""
        with fast_loading():
            try:
                self.strategy.train(experience, eval_streams=[])
            finally:
                if self._budget.around is not None:
                    self._budget.around.close()
        self.tasks_seen += 1

    def evaluate(self, experience: DatasetExperience, auroc: bool = False) -> Evaluation:
        """Answer an experience's samples once, by the strategy's own evaluation; the AUROC ranks log-softmax.

        Whatever evaluation draws is given back: torch's loaders take a number from the global generator for each pass,
        and with it training would depend on how often one looks.
        """
        tally = Tally(log_probabilities if auroc else None)
        self._answers.tally = tally
        try:
            with fast_loading(), torch.random.fork_rng(devices=[]):
                self.strategy.eval(experience)
        finally:
            # The tally's tensors are no state of the strategy: they must not be counted as such.
            self._answers.tally = None
        return tally.result()

    @torch.no_grad()
    def evaluate_one(self, experience: Any) -> None:
        """Answer an experience's samples by the net alone, whatever the class does around it."""
        was_training = self._headed.training
        self._headed.eval()
        try:
            for batch in ResidentLoader(tasks_in(experience.dataset), 1):
                self._headed(batch.x, batch.t)
        finally:
            self._headed.train(was_training)

    @torch.no_grad()
    def inferred(self, experience: DatasetExperience, tasks: Sequence[int]) -> float:
        """Return the share answered rightly if the task is not named but inferred among `tasks`, by the net alone."""
        was_training = self._headed.training
        self._headed.eval()
        batches = ResidentLoader(tasks_in(experience.dataset.eval()), self.setup.train.eval_batch_size)
        found = accuracy_by_entropy(batches, self._headed, list(tasks), int(experience.task_label))
        self._headed.train(was_training)
        return found

    def accuracy(self, experience: DatasetExperience) -> float:
        """Return the share of an experience's samples answered rightly."""
        return self.evaluate(experience).accuracy

    def holdings(self) -> Holdings:
        """Return what a walk over the strategy and its plugins finds."""
        found = foreign_holdings(
            self.strategy, skip=lambda item: is_scaffolding(item) or isinstance(item, (_Budget, _Answers))
        )
        return replace(found, task_parameters=self._headed.task_parameters())

    def uses(self) -> dict[int, list[Use]]:
        """Return what each task learned needs: the whole model, tensors in plain attributes too, but for others' heads.

        A class that knows nothing of the suite cannot say that a task needs less.
        """
        model = self.strategy.model
        return uses_by_owner(model, self._headed.task_parameters(), self.tasks_seen, tensors_in(model))
