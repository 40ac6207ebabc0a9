"""Deep generative replay (DGR): a generator of past samples learns beside the net, and teaches both their past.

Paper      Shin, Lee, Kim & Kim 2017, "Continual learning with deep generative replay", NeurIPS, arXiv:1705.08690, where
           the generator is a GAN; here its form in van de Ven & Tolias 2018, "Generative replay with feedback
           connections as a general strategy for continual learning", arXiv:1809.10635: a variational autoencoder, and
           as a choice the past net's probabilities in place of its labels (DGR + distillation).
Checked    against the authors' code, GMvandeVen/continual-learning (MIT licence), branch preprints: train.py,
           encoder.py, vae_models.py, utils.py; and as of 2018-09-27 (9c0ca78), of which the 2018 paper's tables are.
Method     A task begins with copies of net and generator as the last one left them. Every step draws x~ = G_past(z),
           z ~ N(0, I), and lets the past net answer for it: with its most likely label (hard), or with the
           probabilities p~ at temperature T (soft). With N the tasks so far, this one included, and a batch (x, y),
               solver     L = 1/N CE(x, y) + (1 - 1/N) R(x~),      each a mean over its batch, R one of
                          hard   CE(x~, argmax p~)
                          soft   -T^2 sum_c p~_c log p_c,          p at temperature T as well; p~ of a new class is 0
               generator  L = [1/N (-ELBO)(x) + (1 - 1/N) (-ELBO)(x~)] / pixels
           Several heads: nobody knows of which task an x~ is. Every earlier task's head answers for all of them, the
           past net's and the net's, and R is the mean over those heads.
Departs    The 2018 code draws new x~ for every head, batch / (N - 1) of them, and trains the generator after the net;
           here as in the code since 86802a8 (2019-04-17) one batch of x~ serves all heads and both nets. Until 26f00db
           (2019-05-17) that code took the mean over the classes for the sum in R: `over = "mean"`, which the recipes
           use where they print a number of before. The code drops an epoch's last, smaller batch, we do not.
           The generator paints pixels in [0, 1]; where a stream normalises its pixels, the net sees x~ normalised too.
           It is fully connected whatever the net: made for MNIST, not for photographs.
Stores     the generator and its optimiser, copies of generator and net as they were: no sample.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from avalanche.benchmarks.scenarios import DatasetExperience
from pydantic import Field
from torch import Tensor, nn

from clbench.errors import UserError
from clbench.footprint import Holdings
from clbench.loading import Batch, tasks_in
from clbench.nets import HeadedNet
from clbench.nets.vae import VAE
from clbench.seeds import derive
from clbench.strategies.base import Setup, Strategy
from clbench.views import View

Net = TypeVar("Net", bound=nn.Module)


class DGR(Strategy):
    """Deep generative replay with a variational autoencoder, with or without distillation."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Settings of generative replay."""

        hidden: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)]
        """Widths of the generator's encoder; its decoder has them in reverse."""
        latent: Annotated[int, Field(gt=0)]
        """Latent units of the generator."""
        generator_lr: Annotated[float, Field(gt=0)]
        """Learning rate of the generator's Adam, whatever optimiser the net has."""
        replay_batch_size: Annotated[int, Field(gt=0)]
        """Samples drawn from the generator at every step."""
        targets: Literal["hard", "soft"]
        """hard: the past net's most likely label. soft: its probabilities, distillation."""
        temperature: Annotated[float, Field(gt=0)] = 2.0
        """Soft targets: T."""
        over: Literal["sum", "mean"] = "sum"
        """Soft targets: the sum over the classes, or the mean over the outputs, which weakens it by their number."""

    stores: ClassVar[tuple[str, ...]] = ("generator", "past_net", "known")

    def __init__(self, *, setup: Setup, config: Config) -> None:
        super().__init__(setup=setup, config=config)
        self.generator = Generator(config.hidden, config.latent, config.generator_lr, setup)
        self.past_net: HeadedNet | None = None
        """The net as the last task left it, frozen."""
        self.known: dict[int, list[int]] = {}
        """Label of a task learned to the labels seen under it, sorted; one entry where no task is named."""
        self.replayed: Replay | None = None
        """What the step in progress replays."""

    def before_task(self, experience: DatasetExperience) -> None:
        """Give the generator the task's view of its images."""
        self.generator.open([task.view for task in tasks_in(experience.dataset)], _shape(experience))

    def train_step(self, batch: Batch) -> None:
        """One step of the net and one of the generator, on the batch and on what is replayed."""
        self.replayed = None if self.past_net is None else self.replay(self.past_net)
        super().train_step(batch)
        past = None if self.replayed is None else self.replayed.x
        self.generator.train_step(batch.x, past, 1 / (self.tasks_seen + 1), self.chance)
        self.samples_trained += 0 if past is None else len(past)

    @torch.no_grad()
    def replay(self, past: HeadedNet) -> Replay:
        """Draw samples from the past generator and let the past net answer for them, under every label it knows."""
        x = self.generator.dream(self.config.replay_batch_size, self.chance)
        features = past.features(x)
        return Replay(x, {label: past.head(features, label)[:, classes] for label, classes in self.known.items()})

    def extra_loss(self) -> Tensor | None:
        """Return what turns the batch's loss L into L / N + (1 - 1 / N) R: it is (1 - 1 / N) (R - L)."""
        if self.replayed is None:
            return None
        features = self.model.features(self.replayed.x)
        terms = [
            self.mismatch(self.model.head(features, label), answer, self.known[label])
            for label, answer in self.replayed.answers.items()
        ]
        return (1 - 1 / (self.tasks_seen + 1)) * (torch.stack(terms).mean() - self.loss)

    def mismatch(self, logits: Tensor, answer: Tensor, classes: Sequence[int]) -> Tensor:
        """Return R of one head, a 0-dim tensor: how far the net's logits are from the past net's answer.

        Args:
            logits: (B, C), the net's, of all its outputs.
            answer: (B, K), the past net's logits of the classes it knew.
            classes: these K classes, as outputs of the net.
        """
        known = torch.tensor(classes, device=logits.device)
        if self.config.targets == "hard":
            return nn.functional.cross_entropy(logits, known[answer.argmax(1)])
        t = self.config.temperature
        wanted, found = torch.softmax(answer / t, 1), torch.log_softmax(logits / t, 1)[:, known]
        distance: Tensor = -(t**2) * (wanted * found).sum(1).mean()
        return distance / (logits.shape[1] if self.config.over == "mean" else 1)

    def after_task(self, experience: DatasetExperience) -> None:
        """Keep net and generator as they are now for the next task to replay."""
        self.replayed = None
        seen = self.known.get(self.task_label, [])
        self.known[self.task_label] = sorted({*seen, *self.task_classes})
        self.past_net = frozen(self.model)
        self.generator.settle()

    def check_finite(self) -> None:
        """Raise FloatingPointError when the net or the generator has diverged."""
        super().check_finite()
        self.generator.check_finite()

    def holdings(self) -> Holdings:
        """The generator, its optimiser, and the two copies that the next task replays."""
        held = {"generator": self.generator.net, "past_generator": self.generator.past, "past_net": self.past_net}
        optimizers = [self.optimizer, *([self.generator.optimizer] if self.generator.optimizer else [])]
        return replace(super().holdings(), optimizers=optimizers, auxiliary=held)


@dataclass(frozen=True)
class Replay:
    """Samples of the past, and what the past net says of them."""

    x: Tensor
    """(B, C, H, W), as the net sees them."""
    answers: dict[int, Tensor]
    """Label of a task to the logits (B, K) of the classes known under it."""


class Generator:
    """A variational autoencoder in training, and as the last task left it; it is made when the first task comes."""

    def __init__(self, hidden: Sequence[int], latent: int, lr: float, setup: Setup) -> None:
        self.hidden, self.latent, self.lr, self.setup = hidden, latent, lr, setup
        self.shape: list[int] = []
        """C, H, W of an image."""
        self.moments: list[list[float]] = []
        """Mean and deviation of every channel, where the stream normalises by them."""
        self.net: VAE | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.past: VAE | None = None
        """As the last task left it, frozen."""
        self.loss: Tensor | None = None
        """Of the latest step, in nats a pixel."""

    def open(self, views: Sequence[View], shape: Sequence[int]) -> None:
        """Get ready for a task.

        Raises:
            UserError: the task's pixels are normalised otherwise than those before: drawn ones could be of either.
        """
        for view in views:
            found = [] if view.mean is None or view.std is None else [_numbers(view.mean), _numbers(view.std)]
            if self.net is not None and found != self.moments:
                raise UserError(
                    "generative replay needs one normalisation of pixels for all tasks, this stream has several: "
                    'a recipe of the stream with normalise = "unit" has one'
                )
            self.moments = found
            if self.net is None:
                self._make(shape)

    def _make(self, shape: Sequence[int]) -> None:
        """Make the net, of weights that depend on the run's seed alone."""
        self.shape = list(shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.setup.seed, "generator"))
            self.net = VAE(self.shape, self.hidden, self.latent)
        self.net.to(self.setup.device)
        self.optimizer = self._new_optimizer(self.net)

    def _new_optimizer(self, net: VAE) -> torch.optim.Optimizer:
        return torch.optim.Adam(net.parameters(), lr=self.lr, fused=True)

    def dream(self, count: int, chance: torch.Generator) -> Tensor:
        """Return samples of the past, (count, C, H, W), as the net sees them."""
        assert self.past is not None
        pixels = self.past.sample(self._noise(count, chance))
        if self.moments:
            mean, std = self._moments(pixels)
            pixels = (pixels - mean) / std
        return pixels

    def train_step(self, x: Tensor, past: Tensor | None, share: float, chance: torch.Generator) -> None:
        """One step on new images, of weight `share`, and past ones, of the rest; both as the net sees them."""
        assert self.net is not None
        assert self.optimizer is not None
        images = x if past is None else torch.cat([x, past])
        if self.moments:
            mean, std = self._moments(images)
            images = torch.clamp(images * std + mean, 0, 1)
        losses = self.net.loss(images, self._noise(len(images), chance)) / images[0].numel()
        loss = losses[: len(x)].mean()
        if past is not None:
            loss = share * loss + (1 - share) * losses[len(x) :].mean()
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.loss = loss.detach()

    def settle(self) -> None:
        """Keep the net as it is now, for the next task; its optimiser starts afresh where the budget's does."""
        assert self.net is not None
        assert self.optimizer is not None
        self.check_finite()
        self.loss = None
        self.optimizer.zero_grad(set_to_none=True)
        self.past = frozen(self.net)
        if self.setup.train.reset_optimizer:
            self.optimizer = self._new_optimizer(self.net)

    def check_finite(self) -> None:
        """Raise FloatingPointError when training has diverged."""
        if self.loss is not None and not bool(torch.isfinite(self.loss)):
            raise FloatingPointError(f"the generator's loss is {self.loss.item()} (generator_lr {self.lr})")

    def state_dict(self) -> dict[str, Any]:
        """Return net, optimiser and the net of the past."""
        if self.net is None or self.optimizer is None:
            return {}
        return {
            "shape": self.shape,
            "moments": self.moments,
            "net": dict(self.net.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "past": None if self.past is None else dict(self.past.state_dict()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned."""
        if not state:
            return
        self.moments = state["moments"]
        self._make(state["shape"])
        assert self.net is not None
        assert self.optimizer is not None
        if state["past"] is not None:
            self.net.load_state_dict(state["past"])
            self.past = frozen(self.net)
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _noise(self, count: int, chance: torch.Generator) -> Tensor:
        return torch.randn(count, self.latent, generator=chance).to(self.setup.device)

    def _moments(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values, dtype=like.dtype, device=like.device) for values in self.moments)
        return mean.view(1, -1, 1, 1), std.view(1, -1, 1, 1)


def frozen(net: Net) -> Net:
    """Return a copy of a net, in evaluation mode and without gradients."""
    net.zero_grad(set_to_none=True)
    return copy.deepcopy(net).eval().requires_grad_(False)


def _shape(experience: DatasetExperience) -> list[int]:
    """Return C, H, W of a task's images as the net sees them."""
    task = tasks_in(experience.dataset)[0]
    return list(task.inputs(torch.zeros(1, dtype=torch.int64, device=task.rows.device)).shape[1:])


def _numbers(values: Tensor) -> list[float]:
    return [float(value) for value in values.flatten().tolist()]
