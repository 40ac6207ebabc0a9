"""iCaRL: exemplars chosen by herding, nets distilled from their predecessor, answers by the nearest class mean.

Paper      Rebuffi, Kolesnikov, Sperl & Lampert 2017, "iCaRL: incremental classifier and representation learning",
           CVPR, arXiv:1611.07725, algorithms 1 to 5.
Checked    against the code of van de Ven & Tolias 2019 (arXiv:1904.07734), with whose number for split MNIST ours is
           compared: GMvandeVen/continual-learning, branch preprints (MIT licence), encoder.py, exemplars.py, train.py.
Method     phi(x) are a net's features, divided by their length; means of them are, too. A task with new classes:
           train    on its samples and all exemplars, shuffled together, one sigmoid a class, on the sum over classes of
                    binary cross-entropies with targets
                        1 or 0 for the task's classes,        sigmoid(f_y(x) / temperature) for those seen before,
                    f the logits of the net as it was before the task;
           reduce   every old class to its first m = buffer / (classes so far) exemplars;
           choose   m exemplars of each new class, the k-th of them
                        p_k = argmin over its samples x, not chosen yet, of | mu - (phi(x) + sum_{j<k} phi(p_j)) / k |
                    with mu the mean of phi over all its samples;
           answer   argmin over classes y of | phi(x) - mean of phi over the exemplars of y |.
Departs    from the paper, with van de Ven's code: the mean of the exemplars so far is not divided by its length while
           others are chosen; no mirrored images; the temperature (1 in the paper, 2 there) divides the targets' logits
           alone. Targets are computed per batch, so that under augmentation they belong to the very images.
           A class that comes again is trained by its labels, and its exemplars are chosen anew.
Stores     up to `buffer` exemplars, uint8 as the learner sees them; to answer, a mean of F values per class. While a
           task trains, a copy of the net.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from clbench.footprint import Holdings
from clbench.loading import Batch, ResidentLoader, TensorTask, tasks_in
from clbench.nets import ABSENT_LOGIT, HeadedNet
from clbench.specs import Scenario
from clbench.strategies.base import Setup, Strategy
from clbench.views import View


class ICaRL(Strategy):
    """iCaRL."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of iCaRL."""

        buffer: Annotated[int, Field(gt=0)]
        """Exemplars kept in all, K."""
        temperature: Annotated[float, Field(gt=0)] = 1.0
        """Divides the old net's logits before they become targets."""

    scenarios: ClassVar[frozenset[Scenario]] = frozenset({"class"})
    stores: ClassVar[tuple[str, ...]] = ("exemplars", "pixels", "means")
    sized_by: ClassVar[tuple[str, ...]] = ("buffer", "width")
    answers_with: ClassVar[frozenset[str]] = frozenset({"means"})

    def __init__(self, *, setup: Setup, config: Config) -> None:
        super().__init__(setup=setup, config=config)
        self.exemplars: dict[int, Tensor] = {}
        """Class to its exemplars (m, C, H, W) uint8, in the order in which they were chosen."""
        self.pixels: list[Tensor | None] = [None, None]
        """Mean and standard deviation of every task's pixels."""
        self.means: dict[int, Tensor] = {}
        """Class to the mean of its exemplars' features, (F,)."""
        self.before: HeadedNet | None = None
        """The net as it was before the task in training."""

    def before_task(self, experience: DatasetExperience) -> None:
        """Keep the old net, if there were classes before, to be distilled from."""
        if self.exemplars:
            self.before = deepcopy(self.model).eval()

    def training_data(self, experience: DatasetExperience) -> list[TensorTask]:
        """Return the task and the exemplars of all other classes."""
        tasks = tasks_in(experience.dataset)
        old = {label: held for label, held in self.exemplars.items() if label not in self.task_classes}
        if not old:
            return tasks
        labels = torch.cat([torch.full((len(held),), label, device=held.device) for label, held in old.items()])
        rows = torch.arange(len(labels), device=labels.device)
        view = View(None, *self.pixels)
        return [*tasks, TensorTask(torch.cat(list(old.values())), rows, labels, tasks[0].task, view, tasks[0].augment)]

    def loss_of(self, batch: Batch) -> Tensor:
        """Return the binary cross-entropies, summed over the classes seen and averaged over the batch."""
        seen = 1 + max([*self.exemplars, *self.task_classes])
        logits = self.model(batch.x, batch.t)[:, :seen]
        targets = F.one_hot(batch.y, seen).to(logits)
        if self.before is not None:
            distilled = [label for label in self.exemplars if label not in self.task_classes]
            with torch.no_grad():
                old = self.before(batch.x, batch.t)[:, distilled]
            targets[:, distilled] = torch.sigmoid(old / self.config.temperature)
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1).mean()

    @torch.no_grad()
    def after_task(self, experience: DatasetExperience) -> None:
        """Cut the old classes' exemplars back, choose the new ones', and take the means of all."""
        self.before = None
        self.model.eval()
        tasks = tasks_in(experience.dataset.eval())
        view = View(None, *self.pixels) if self.exemplars else View(None, tasks[0].view.mean, tasks[0].view.std)
        if not all(task.view.normalises_like(view) for task in tasks):
            raise NotImplementedError("iCaRL takes tasks whose pixels are all normalised alike")
        self.pixels = [view.mean, view.std]
        share = self.config.buffer // len({*self.exemplars, *self.task_classes})
        if share == 0:
            raise ValueError(f"a buffer of {self.config.buffer} holds no exemplar for each of the classes so far")
        self.exemplars = {label: held[:share].clone() for label, held in self.exemplars.items()}
        for label in self.task_classes:
            own = [cut(task, task.labels == label) for task in tasks]
            chosen = herded(torch.cat([self.features_of(task) for task in own]), share)
            self.exemplars[label] = torch.cat([task.view.seen(task.images[task.rows]) for task in own])[chosen]
        for label, held in self.exemplars.items():
            rows = torch.arange(len(held), device=held.device)
            features = self.features_of(TensorTask(held, rows, torch.full_like(rows, label), tasks[0].task, view))
            self.means[label] = F.normalize(features.mean(0), dim=0)

    def features_of(self, task: TensorTask) -> Tensor:
        """Return the features of a task's samples, each divided by its length, (N, F)."""
        loader = ResidentLoader([task], self.setup.train.eval_batch_size)
        return torch.cat([F.normalize(self.model.features(batch.x), dim=1) for batch in loader])

    def answer(self, x: Tensor, t: int | Tensor) -> Tensor:
        """Return minus the squared distance to each class's mean, (B, C); before the first task, the net's logits."""
        if not self.means:
            return super().answer(x, t)
        features = F.normalize(self.model.features(x), dim=1)
        logits = features.new_full((len(x), 1 + max(self.means)), ABSENT_LOGIT)
        known = sorted(self.means)
        logits[:, known] = -torch.cdist(features, torch.stack([self.means[label] for label in known])).square()
        return logits

    def holdings(self) -> Holdings:
        """Exemplars are replay; their means are what answers need besides the net."""
        return replace(
            super().holdings(),
            auxiliary={"means": self.means},
            replay=[self.exemplars, self.pixels],
            replay_samples=sum(len(held) for held in self.exemplars.values()),
        )


def cut(task: TensorTask, mask: Tensor) -> TensorTask:
    """Return a task of the samples where `mask` (N,) is true, without augmentation."""
    return TensorTask(task.images, task.rows[mask], task.labels[mask], task.task, task.view)


def herded(features: Tensor, count: int) -> Tensor:
    """Return which samples become exemplars, in order, (m,) int64: m = min(count, N).

    Args:
        features: (N, F) of one class, each of length 1.
        count: how many.
    """
    phi = features.double()
    mean = F.normalize(phi.mean(0), dim=0)
    lengths = phi.square().sum(1)
    total = torch.zeros_like(mean)
    chosen: list[int] = []
    for k in range(1, min(count, len(phi)) + 1):
        # |mean - (total + phi) / k|^2 without the part that is the same for every sample.
        distance = lengths / k**2 - 2 / k * (phi @ (mean - total / k))
        distance[chosen] = float("inf")
        chosen.append(int(distance.argmin()))
        total += phi[chosen[-1]]
    return torch.tensor(chosen, device=features.device)
