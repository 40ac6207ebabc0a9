"""Synthesised convolutions: all weights of a task's net are made from a learned embedding of the task.

Paper      none of exactly this: ours. Weights made by a second net: Ha, Dai & Le 2017, "HyperNetworks", ICLR,
           arXiv:1609.09106; task embeddings and the output regulariser: von Oswald, Henning, Grewe & Sacramento 2020,
           "Continual learning with hypernetworks", ICLR, arXiv:1906.00695; how weights begin: Chang, Flokas & Lipson
           2020, "Principled weight initialization for hypernetworks", ICLR.
Checked    against derivations by hand and brute force (tests/test_synthesised.py, tests/test_hypernet_regulariser.py).
Method     layer l of task t's net has  W_tl = g_l(e_t),  g_l a small fully connected net shared by all tasks, e_t the
           task's embedding of E numbers (clbench/nets/hypernet/synthesised.py). Every convolution is made so, and every
           fully connected layer: a 1x1 convolution of a map of one pixel. With `hidden = []` g_l is affine: W_tl is
           a mixture, by e_t, of E tensors, on top of one more. A task trains e_t, its biases, normalisation and head,
           and all g_l, by the gradient of its loss through W_tl.
Forgets    because all tasks train g_l: nothing holds an earlier task's weights. With `beta` above 0 the loss has
               beta / n  sum over the n other tasks s of  || g(e_s; now + step) - g(e_s; before this task) ||^2
           over all layers; the step is the optimiser's on the loss alone, a constant, or none (`look_ahead`). What
           else a task answers with is its own, so that under a large beta it keeps its answers.
Departs    from von Oswald et al.: a maker for each layer, not one for all weights; biases are a task's own, not made;
           earlier embeddings are fixed. The penalty enters as its gradient, before clipping; the step ahead knows of no
           clipping, and the loss that is checked for NaN is the cross-entropy alone.
A task     seen again trains its own embedding, biases and head further; the penalty holds all other tasks.
again
Stores     nothing but the net: E + 1 numbers for each weight of the plain net (`hidden = []`), whatever the number of
           tasks; a task adds E numbers, its biases and normalisation, and a head. While a task trains with a penalty:
           the other tasks' weights, or a copy of the makers, whichever is less.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, cast

from avalanche.benchmarks.scenarios import DatasetExperience
from pydantic import Field

from clbench.errors import UserError
from clbench.nets.hypernet.regulariser import OutputRegulariser, candidate_step
from clbench.nets.hypernet.synthesised import SynthesisedNet
from clbench.records import Generation
from clbench.seeds import derive
from clbench.sharing import Use
from clbench.specs import Scenario
from clbench.strategies.base import Setup, Strategy


class SynthesisedConv(Strategy):
    """Weights made from task embeddings, on any net; `model` is a `SynthesisedNet`."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of synthesised convolutions."""

        embedding: Annotated[int, Field(gt=0)] = 8
        """E, numbers in a task's embedding."""
        hidden: list[Annotated[int, Field(gt=0)]] = field(default_factory=list)
        """Widths of each maker's hidden layers. None: the makers are affine."""
        beta: Annotated[float, Field(ge=0)] = 0.0
        """Strength of the output regulariser. 0: nothing holds what earlier tasks need."""
        look_ahead: bool = True
        """Whether the regulariser looks at the makers as the optimiser would leave them, or as they are."""
        asked: Annotated[int, Field(ge=0)] = 0
        """How many other tasks, drawn at random, the regulariser asks in a step. 0: all."""

    scenarios: ClassVar[frozenset[Scenario]] = frozenset({"task"})

    def __init__(self, *, setup: Setup, config: Config) -> None:
        seed, new_net = derive(setup.seed, "parts"), setup.new_net

        def synthesised_net() -> SynthesisedNet:
            try:
                return SynthesisedNet(new_net(), seed, config.embedding, config.hidden)
            except ValueError as error:
                raise UserError(f"strategy SynthesisedConv: {error}") from None

        super().__init__(setup=replace(setup, new_net=synthesised_net), config=config)
        self.regulariser: OutputRegulariser | None = None
        """Of the task in training."""

    @property
    def net(self) -> SynthesisedNet:
        """The net in training."""
        return cast(SynthesisedNet, self.model)

    def before_task(self, experience: DatasetExperience) -> None:
        """Note what the other tasks' weights are."""
        others = {task: e for task, e in self.net.embeddings().items() if task != self.task_label}
        if not self.config.beta or not others:
            return
        makers = self.net.makers
        copy = sum(parameter.numel() for parameter in makers.parameters())
        self.regulariser = OutputRegulariser(
            makers,
            others,
            "stored" if len(others) * makers.outputs <= copy else "snapshot",
            self.config.asked or None,
            generator_of_chance=self.chance,
        )

    def after_backward(self) -> None:
        """Add the penalty's gradient; until then there is the loss's alone, by which one looks ahead."""
        if self.regulariser is not None:
            delta = candidate_step(self.optimizer, self.net.makers) if self.config.look_ahead else None
            self.regulariser.backward(self.config.beta, delta)

    def after_task(self, experience: DatasetExperience) -> None:
        """Let go of what was noted."""
        self.regulariser = None

    def generation(self) -> Generation:
        """Return how many weights are made, and what makes them."""
        net = self.net
        made_by = sum(value.numel() for value in (*net.makers.parameters(), *net.embeddings().values()))
        return Generation(
            target_parameters=net.makers.outputs,
            generator_parameters=made_by,
            compression=made_by / net.makers.outputs,
            sizes={"embedding": self.config.embedding, "hidden": self.config.hidden},
        )

    def uses(self) -> dict[int, list[Use]]:
        """Return what each task answers with: all makers, and what is its own; statistics, too."""
        net, own = self.net, self.net.task_parameters()
        makers = list(net.makers.parameters())
        return {task: [Use(tensor) for tensor in (*makers, *own[task], *net.statistics(task))] for task in net.tasks()}
