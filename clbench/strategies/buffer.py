"""A memory of past samples, and the three ways to fill it that papers use.

reservoir        every sample seen so far is kept with the same probability (Vitter 1985, Algorithm R)
ring             first in, first out, an equal share of the room for every class seen (Chaudhry et al. 2019)
class_balanced   an equal share of the room for every class seen, drawn at random within a class and cut back at random
                 as classes arrive

Samples are kept as the learner sees them (a permuted image stays permuted), in uint8.

Letters: M samples kept, B batch.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from clbench.loading import Batch, TensorTask
from clbench.views import CropFlip, View

Policy = Literal["reservoir", "ring", "class_balanced"]


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
        self.filled = 0
        self.augment: CropFlip | None = None
        self._normalisations: list[View] = []
        """Views that differ in normalisation: one, but for streams that string several data sets together."""
        self._members: dict[tuple[int, int], list[int]] = {}
        """(task label, label) to its slots, oldest first; quota policies only."""
        self._offered: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return self.filled

    def offer(self, source: TensorTask, index: Tensor) -> None:
        """Show the samples `index` (B,) of a task to the buffer, in this order."""
        view = self.open(source)
        slots = {"reservoir": self._reservoir, "ring": self._ring, "class_balanced": self._balanced}[self.policy](
            source.labels.index_select(0, index).tolist(), source.task
        )
        # Within one offer a slot may be written twice: the later sample wins, as if they came one by one.
        chosen = {slot: position for position, slot in enumerate(slots) if slot is not None}
        if not chosen:
            return
        assert self.images is not None
        where = torch.tensor(list(chosen), device=self.images.device)
        rows = index[torch.tensor(list(chosen.values()), device=index.device)]
        self.images[where] = source.view.seen(source.stored(rows))
        self.labels[where] = source.labels.index_select(0, rows)
        self.tasks[where] = source.task
        self.views[where] = view

    def draw(self, count: int) -> Batch:
        """Return `count` different samples (all of them when fewer are kept), ready for the net."""
        assert self.images is not None
        chosen = torch.randperm(self.filled, generator=self.generator)[:count].to(self.images.device)
        x = self.images.index_select(0, chosen).to(torch.float32)
        if len(self._normalisations) == 1:
            x = self._normalisations[0].normalise(x)
        else:
            views = self.views.index_select(0, chosen)
            for number, view in enumerate(self._normalisations):
                x[views == number] = view.normalise(x[views == number])
        if self.augment is not None:
            x = self.augment.batch(x, self.generator)
        return Batch(x, self.labels.index_select(0, chosen), self.tasks.index_select(0, chosen))

    def open(self, source: TensorTask) -> int:
        """Get ready for a task's samples: room on the first call, its normalisation and augmentation on each.

        Returns:
            The number of the task's normalisation.
        """
        if self.images is None:
            one = source.view.seen(source.stored(torch.zeros(1, dtype=torch.int64, device=source.rows.device)))
            self.images = torch.zeros((self.room, *one.shape[1:]), dtype=torch.uint8, device=one.device)
            self.labels = torch.zeros(self.room, dtype=torch.int64, device=one.device)
            self.tasks = torch.zeros(self.room, dtype=torch.int64, device=one.device)
            self.views = torch.zeros(self.room, dtype=torch.uint8, device=one.device)
        self.augment = source.augment
        for number, view in enumerate(self._normalisations):
            if _same(view.mean, source.view.mean) and _same(view.std, source.view.std):
                return number
        self._normalisations.append(View(None, source.view.mean, source.view.std))
        return len(self._normalisations) - 1

    def state_dict(self) -> dict[str, Any]:
        """Return the samples and the books of the policy."""
        return {
            "images": self.images,
            "labels": self.labels,
            "tasks": self.tasks,
            "views": self.views,
            "normalisations": [[view.mean, view.std] for view in self._normalisations],
            "filled": self.filled,
            "seen": self.seen,
            "members": [[*key, slots, self._offered[key]] for key, slots in self._members.items()],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the samples and books of another buffer of the same room and policy."""
        self.images, self.labels, self.tasks = state["images"], state["labels"], state["tasks"]
        self.views = state["views"]
        self._normalisations = [View(None, mean, std) for mean, std in state["normalisations"]]
        self.filled, self.seen = state["filled"], state["seen"]
        self._members = {(task, label): list(slots) for task, label, slots, _ in state["members"]}
        self._offered = {(task, label): offered for task, label, _, offered in state["members"]}

    # --------------------------------------------------------------------------------------------------------- policies

    def _reservoir(self, labels: list[int], task: int) -> list[int | None]:
        slots: list[int | None] = []
        draws = torch.rand(len(labels), generator=self.generator, dtype=torch.float64).tolist()
        for draw in draws:
            self.seen += 1
            if self.filled < self.room:
                slots.append(self.filled)
                self.filled += 1
            else:
                slot = int(draw * self.seen)
                slots.append(slot if slot < self.room else None)
        return slots

    def _ring(self, labels: list[int], task: int) -> list[int | None]:
        return [self._into_class(label, task, oldest=True) for label in labels]

    def _balanced(self, labels: list[int], task: int) -> list[int | None]:
        return [self._into_class(label, task, oldest=False) for label in labels]

    def _into_class(self, label: int, task: int, *, oldest: bool) -> int | None:
        """Return the slot for one more sample of a class: free, of a class over its share, or of its own."""
        key = (task, label)
        slots = self._members.setdefault(key, [])
        self._offered[key] = self._offered.get(key, 0) + 1
        self.seen += 1
        share = max(1, self.room // len(self._members))
        if len(slots) < share:
            if self.filled < self.room:
                slot = self.filled
                self.filled += 1
            else:
                crowded = max(self._members.values(), key=len)
                slot = crowded.pop(0 if oldest else self._below(len(crowded)))
            slots.append(slot)
            return slot
        if oldest:
            slots.append(slots.pop(0))
            return slots[-1]
        place = self._below(self._offered[key])
        return slots[place] if place < len(slots) else None

    def _below(self, bound: int) -> int:
        return int(torch.randint(bound, (1,), generator=self.generator))


def _same(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return torch.equal(left, right)
