"""Averaged gradient episodic memory (A-GEM): a step may not raise the average loss over the samples of past tasks.

Paper      Chaudhry, Ranzato, Rohrbach & Elhoseiny 2019, "Efficient lifelong learning with A-GEM", ICLR,
           arXiv:1812.00420, equations 10 and 11.
Checked    against the authors' code, facebookresearch/agem (MIT licence), fc_permute_mnist.py, conv_split_cifar.py; and
           aimagelab/mammoth (MIT licence), models/agem.py, with whose numbers for rotated MNIST ours are compared.
Method     g is the gradient on the current batch, r that on `sample` samples of past tasks, drawn anew every step:
               g . r >= 0:  take g                otherwise:  take  g - (g . r / r . r) r
           which is the vector nearest to g of those that do not raise the loss on the draw, to first order.
           When a task ends, `per_task` of its samples are offered to the memory.
Memory     the authors keep m samples for each class of each task, the latest of a shuffled pass: `balanced`, at random
           here, and a `buffer` that holds those of all tasks. mammoth offers one batch of every task to one reservoir,
           so that early tasks have more of it until late ones come: policy "reservoir".
Departs    The gradient has every parameter of the net, so that a step may move another task's head by r's share in it;
           the authors' code has all heads in one matrix and does the same.
Stores     up to `buffer` samples, uint8 as the learner sees them, with label and task. While a task trains: two
           gradients of P values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from pydantic import Field
from torch import Tensor

from clbench.loading import Batch
from clbench.strategies.base import Setup
from clbench.strategies.buffer import Buffer, Policy
from clbench.strategies.constrained import Constrained


class AGEM(Constrained):
    """A-GEM."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of A-GEM."""

        buffer: Annotated[int, Field(gt=0)]
        """Samples kept in all."""
        per_task: Annotated[int, Field(ge=0)]
        """Samples offered to the memory when a task ends; 0 offers all of them."""
        sample: Annotated[int, Field(gt=0)]
        """Samples drawn from the memory at every step."""
        policy: Policy = "class_balanced"
        """Who is kept where more were offered than there is room for."""
        balanced: bool = False
        """Offer as many samples of each class."""

    def __init__(self, *, setup: Setup, config: Config) -> None:
        super().__init__(setup=setup, config=config)
        self.memory = Buffer(config.buffer, config.policy, self.chance)
        self.reference: Tensor | None = None
        """r, (P,), from the forward pass of a step to its end."""

    def rehearse(self, batch: Batch) -> Batch:
        """Take the gradient on a draw of past samples, where there are any."""
        if len(self.memory):
            self.reference = self.gradient_on(self.memory.draw(self.config.sample))
        return batch

    @torch.no_grad()
    def after_backward(self) -> None:
        """Project the gradient where it would raise the loss on the draw."""
        if self.reference is not None:
            gradient = self.gradient()
            along = torch.dot(gradient, self.reference)
            if along < 0:
                self.set_gradient(gradient - along / torch.dot(self.reference, self.reference) * self.reference)
        self.reference = None

    def after_task(self, experience: DatasetExperience) -> None:
        """Keep some of the task's samples."""
        self.keep(experience, self.config.per_task, self.config.balanced)
