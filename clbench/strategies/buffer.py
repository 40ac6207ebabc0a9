"""A memory of past samples, and the four ways to fill it that papers use.

reservoir        every sample seen so far is kept with the same probability (Vitter 1985, Algorithm R)
ring             first in, first out, an equal share of the room for every class of every task seen (Chaudhry et al.
                 2019)
class_balanced   the same shares, drawn at random within a class and cut back at random as classes arrive
greedy           the same shares, the first samples of a class, cut back at random as classes arrive (Prabhu et al.
                 2020)

Shares belong to a class of a task, as in the authors' code of ring (facebookresearch/agem): the digit 3 under a new
permutation is another class, or the latest task would push all others out of a ring. A task that comes again counts as
a new one. With fewer places than classes, each holds one sample as long as it can: a ring gives up its oldest class,
the others a random one. Whoever wants shares of a class whatever the task offers all with the same visit.

Samples are kept as the learner sees them (a permuted image stays permuted), in uint8; beside each one, where the
learner hands them in, the logits it gave when the sample was kept.

Letters: M samples kept, B batch, C classes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from clbench.loading import Batch, TensorTask
from clbench.views import CropFlip, View

Policy = Literal["reservoir", "ring", "class_balanced", "greedy"]


class Buffer:
    """At most `room` samples, filled by one policy; all chance comes from `generator` (CPU)."""

    def __init__(self, room: int, policy: Policy, generator: torch.Generator) -> None:
        self.room = room
        self.policy = policy
        self.generator = generator
        self.seen = 0
        """Samples offered so far."""
        self.images: Tensor | None = None
        """(room, C, H, W) uint8; rows beyond `len(self)` are free."""
        self.labels = torch.empty(0, dtype=torch.int64)
        self.tasks = torch.empty(0, dtype=torch.int64)
        self.views = torch.empty(0, dtype=torch.uint8)
        self.logits: Tensor | None = None
        """(room, C) float32, NaN where a sample's task has no such class; None while no logits were handed in."""
        self.filled = 0
        self.augment: CropFlip | None = None
        self._normalisations: list[View] = []
        """Views that differ in normalisation: one, but for streams that string several data sets together."""
        self._opened: tuple[TensorTask | None, int] = None, 0
        """The task last opened and the number of its normalisation."""
        self._task_labels: set[int] = set()
        """Task labels that `tasks` may hold."""
        self._members: dict[tuple[int, int], list[int]] = {}
        """(visit, label) to its slots, oldest first; quota policies only."""
        self._offered: dict[tuple[int, int], int] = {}
        """The same to the samples offered."""

    def __len__(self) -> int:
        return self.filled

    def offer(self, source: TensorTask, index: Tensor, visit: int = 0, logits: Tensor | None = None) -> None:
        """Show the samples `index` (B,) of a task to the buffer, in this order.

        Args:
            source: the task.
            index: its samples.
            visit: number of the task in the stream; classes of different visits have shares of their own.
            logits: (B, C), kept beside those samples that are kept; in every offer or in none.
        """
        view = self.open(source)
        draws = torch.rand(len(index), generator=self.generator, dtype=torch.float64).tolist()
        if self.policy == "reservoir":
            slots = self._reservoir(draws)
        else:
            labels = source.labels.index_select(0, index).tolist()
            slots = [self._into_class((visit, label), draw) for label, draw in zip(labels, draws, strict=True)]
        # Within one offer a slot may be written twice: the later sample wins, as if they came one by one.
        chosen = {slot: position for position, slot in enumerate(slots) if slot >= 0}
        if not chosen:
            return
        assert self.images is not None
        where = torch.tensor(list(chosen), device=self.images.device)
        rows = index[torch.tensor(list(chosen.values()), device=index.device)]
        self.images.index_copy_(0, where, source.view.seen(source.stored(rows)))
        self.labels.index_copy_(0, where, source.labels.index_select(0, rows))
        self.tasks.index_fill_(0, where, source.task)
        self.views.index_fill_(0, where, view)
        if logits is not None:
            kept = logits.detach().index_select(0, torch.tensor(list(chosen.values()), device=logits.device))
            self._keep_logits(where, kept)
        self._task_labels.add(source.task)

    def draw(self, count: int) -> Batch:
        """Return `count` different samples (all of them when fewer are kept), ready for the net."""
        return self.take(self.places(count))

    def places(self, count: int) -> Tensor:
        """Return where `count` different samples lie, (B,) int64, at random: all of them when fewer are kept."""
        chosen = torch.randperm(self.filled, generator=self.generator)[:count]
        return chosen if self.images is None else chosen.to(self.images.device)

    def visits(self) -> dict[int, Tensor]:
        """Return where the samples of every visit lie, (m,) int64 each, in the order of visits; not for a reservoir."""
        found: dict[int, list[int]] = {}
        for (visit, _), slots in sorted(self._members.items()):
            found.setdefault(visit, []).extend(slots)
        device = self.labels.device
        return {visit: torch.tensor(slots, device=device) for visit, slots in found.items() if slots}

    def beside(self, samples: int) -> list[TensorTask]:
        """Return the memory as tasks to train on beside `samples` new ones, one for each task label and normalisation.

        Every sample is in it as often as the whole memory fits into the new samples, and at least once.
        """
        times = max(1, samples // self.room)
        tasks = []
        for task in sorted(self._task_labels):
            for number, view in enumerate(self._normalisations):
                mine = (self.tasks[: self.filled] == task) & (self.views[: self.filled] == number)
                slots = mine.nonzero().flatten().repeat(times)
                if len(slots):
                    assert self.images is not None
                    tasks.append(TensorTask(self.images, slots, self.labels[slots], task, view, self.augment))
        return tasks

    def take(self, chosen: Tensor) -> Batch:
        """Return the samples at the places `chosen` (B,), ready for the net."""
        assert self.images is not None
        x = self.images.index_select(0, chosen).to(torch.float32)
        if len(self._normalisations) == 1:
            x = self._normalisations[0].normalise(x)
        else:
            views = self.views.index_select(0, chosen)
            for number, view in enumerate(self._normalisations):
                x[views == number] = view.normalise(x[views == number])
        if self.augment is not None:
            x = self.augment.batch(x, self.generator)
        labels = self.labels.index_select(0, chosen)
        if len(self._task_labels) == 1:
            return Batch(x, labels, next(iter(self._task_labels)))
        return Batch(x, labels, self.tasks.index_select(0, chosen))

    def open(self, source: TensorTask) -> int:
        """Get ready for a task's samples: room on the first call, its normalisation and augmentation on each.

        Returns:
            The number of the task's normalisation.
        """
        if self._opened[0] is source:
            return self._opened[1]
        if self.images is None:
            one = source.view.seen(source.stored(torch.zeros(1, dtype=torch.int64, device=source.rows.device)))
            self.images = torch.zeros((self.room, *one.shape[1:]), dtype=torch.uint8, device=one.device)
            self.labels = torch.zeros(self.room, dtype=torch.int64, device=one.device)
            self.tasks = torch.zeros(self.room, dtype=torch.int64, device=one.device)
            self.views = torch.zeros(self.room, dtype=torch.uint8, device=one.device)
        self.augment = source.augment
        known = self._normalisations
        same = [view.normalises_like(source.view) for view in known]
        number = same.index(True) if True in same else len(known)
        if number == len(known):
            known.append(View(None, source.view.mean, source.view.std))
        self._opened = source, number
        return number

    def _keep_logits(self, where: Tensor, logits: Tensor) -> None:
        """Keep logits (B, C) at the places `where`; NaN stands for classes that only other samples have."""
        if self.logits is None:
            self.logits = logits.new_full((self.room, logits.shape[1]), float("nan"))
        missing = logits.shape[1] - self.logits.shape[1]
        if missing > 0:
            self.logits = torch.nn.functional.pad(self.logits, (0, missing), value=float("nan"))
        self.logits.index_copy_(0, where, torch.nn.functional.pad(logits, (0, max(0, -missing)), value=float("nan")))

    def state_dict(self) -> dict[str, Any]:
        """Return the samples and the books of the policy."""
        return {
            "images": self.images,
            "labels": self.labels,
            "tasks": self.tasks,
            "views": self.views,
            "logits": self.logits,
            "normalisations": [[view.mean, view.std] for view in self._normalisations],
            "filled": self.filled,
            "seen": self.seen,
            "members": [[*key, slots, self._offered[key]] for key, slots in self._members.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the samples and books of another buffer of the same room and policy."""
        self.images, self.labels, self.tasks = state["images"], state["labels"], state["tasks"]
        self.views, self.logits = state["views"], state["logits"]
        self._normalisations = [View(None, mean, std) for mean, std in state["normalisations"]]
        self.filled, self.seen = state["filled"], state["seen"]
        self._opened = None, 0
        self._task_labels = set(self.tasks[: self.filled].tolist())
        self._members = {(visit, label): list(slots) for visit, label, slots, _ in state["members"]}
        self._offered = {(visit, label): offered for visit, label, _, offered in state["members"]}

    # --------------------------------------------------------------------------------------------------------- policies

    def _reservoir(self, draws: list[float]) -> list[int]:
        """Return a slot for each of the next samples, -1 for none; `draws` are uniform in [0, 1)."""
        free = min(len(draws), self.room - self.filled)
        slots = list(range(self.filled, self.filled + free))
        # Sample number n goes to a uniform place below n, if there is one.
        places = [int(draw * number) for number, draw in enumerate(draws[free:], self.seen + free + 1)]
        self.filled += free
        self.seen += len(draws)
        return slots + [place if place < self.room else -1 for place in places]

    def _into_class(self, key: tuple[int, int], draw: float) -> int:
        """Return the slot for one more sample of a class: a free one, of a class over its share, of its own, or -1."""
        slots = self._members.setdefault(key, [])
        self._offered[key] = self._offered.get(key, 0) + 1
        self.seen += 1
        ring, greedy = self.policy == "ring", self.policy == "greedy"
        classes = len(self._members)
        # Its paper's share is no whole number: of 10 places for 3 classes, a class of 3 samples may have a fourth.
        below_share = len(slots) * classes < self.room if greedy else len(slots) < max(1, self.room // classes)
        if greedy and not below_share:
            return -1
        if self.filled < self.room:
            slots.append(self.filled)
            self.filled += 1
            return slots[-1]
        if below_share:
            most = max(len(members) for members in self._members.values())
            crowded = [members for members in self._members.values() if len(members) == most]
            members = crowded[0 if ring else int(draw * len(crowded))]
            slots.append(members.pop(0 if ring else self._below(most)))
            return slots[-1]
        if ring:
            slots.append(slots.pop(0))
            return slots[-1]
        place = int(draw * self._offered[key])
        return slots[place] if place < len(slots) else -1

    def _below(self, bound: int) -> int:
        return int(torch.randint(bound, (1,), generator=self.generator))
