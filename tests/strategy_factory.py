"""Small worlds for the tests of strategies: streams, budgets, and strategies on nets that can be followed by hand."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, get_args

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn

from clbench.loading import Batch, TensorTask
from clbench.nets import HeadedNet, MultiHead, SingleHead, Trunk, build_trunk
from clbench.recipes import load_baseline, load_task, names, resolve
from clbench.runner import net_factory
from clbench.specs import BaselineSpec, Scenario, SplitStream, StreamSpec, TaskSpec, TrainSpec
from clbench.strategies.base import Setup, Strategy
from clbench.strategies.build import build, find_class
from clbench.strategies.foreign import Foreign
from clbench.streams import Stream, make_stream
from clbench.views import View

CPU = torch.device("cpu")


def synthetic(
    scenario: Scenario = "task", classes: int | list[int] = 2, n_tasks: int = 4, name: str = "", **train: Any
) -> TaskSpec:
    """The shipped test stream in another scenario, of other tasks, or with other keys of its training budget."""
    task = load_task("synthetic_split")
    assert isinstance(task.stream, SplitStream)
    part = task.stream.parts[0].model_copy(update={"n_tasks": n_tasks, "classes_per_task": classes})
    stream = task.stream.model_copy(update={"scenario": scenario, "parts": [part]})
    budget = task.train.model_dump() | train
    if train.get("epochs"):
        budget["iterations"] = None
    spec = TrainSpec.model_validate(budget)
    return task.model_copy(update={"stream": stream, "train": spec, "name": name or task.name})


@functools.cache
def _stream(stream: str, seed: int) -> Stream:
    spec: TypeAdapter[Any] = TypeAdapter(StreamSpec)
    return make_stream(spec.validate_json(stream), seed, CPU)


def made(task: TaskSpec, baseline: str | BaselineSpec, seed: int = 0, **overrides: Any) -> tuple[Any, Stream]:
    """Return a baseline's strategy, own or foreign, as a run makes it, on one thread, and its stream.

    Streams are shared between tests: who changes one puts it back.
    """
    torch.set_num_threads(1)
    spec = load_baseline(baseline) if isinstance(baseline, str) else baseline
    experiment = resolve(task, spec, overrides)
    stream = _stream(task.stream.model_dump_json(), seed)
    setup = Setup(new_net=net_factory(experiment, stream, seed), train=experiment.train, device=CPU, seed=seed)
    torch.manual_seed(seed)
    strategy: Strategy | Foreign = build(experiment, setup)
    return strategy, stream


def recipe(strategy: str, name: str = "own", folder: str = "", **settings: Any) -> BaselineSpec:
    """Return a baseline that was never a file."""
    words = {"schema": 1, "title": "x", "strategy": strategy, "family": "own", "paper": "none", "settings": settings}
    return BaselineSpec.model_validate({**words, "name": name, "folder": folder})


AVALANCHES = recipe("avalanche.training:LwF", name="avalanches_lwf", alpha=1.0, temperature=2.0)
"""A strategy of Avalanche's own, named by its import path: it works in every scenario."""


def budget(**changes: Any) -> TrainSpec:
    """One step of plain SGD on a batch of 4, changed as asked."""
    keys = {"iterations": 1, "batch_size": 4, "optimizer": "sgd", "lr": 0.1} | changes
    return TrainSpec.model_validate(keys)


class Pixels(Trunk):
    """No trunk at all: the features are the pixels, so that net and head are one linear-softmax model."""

    def __init__(self, input_shape: tuple[int, int, int]) -> None:
        super().__init__(input_shape)
        self.out_features = input_shape[0] * input_shape[1] * input_shape[2]

    def forward(self, x: Tensor) -> Tensor:
        """Return the pixels, (B, C, H, W) -> (B, C * H * W) float64."""
        return x.flatten(1).double()


def linear_net(pixels: int, classes: int, weight: Tensor, bias: Tensor) -> Callable[[], HeadedNet]:
    """Return a maker of linear-softmax nets on images (1, 1, pixels) with these weights (C, pixels), (C,), float64."""

    def new_net() -> HeadedNet:
        net = HeadedNet(Pixels((1, 1, pixels)), SingleHead(pixels, classes)).double()
        head = net.get_submodule("head.linear")
        assert isinstance(head, nn.Linear)
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
        return net

    return new_net


def tensor_task(images: Tensor, labels: Iterable[int], task: int = 0, view: View | None = None) -> TensorTask:
    """Return a task of all `images` (N, C, H, W) uint8."""
    wanted = torch.tensor(list(labels))
    return TensorTask(images, torch.arange(len(images)), wanted, task, view or View(None, None, None))


def weights(strategy: Any) -> Tensor:
    """Return every weight of a strategy's net as one vector, (P,), a copy."""
    return torch.cat([parameter.detach().flatten().clone() for parameter in strategy.model.parameters()])


_SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": [9, 7]},
    "normed_mlp": {"hidden": [9, 7]},
    "zenke": {"channels": (3, 4), "hidden": 8},
    "lenet": {"channels": (3, 4), "hidden": (6, 5)},
    "resnet18": {"width": 4},
}


def headed(kind: str) -> HeadedNet:
    """Return a net in evaluation mode, float64, with heads of 3 and 2 outputs, normalisation statistics set."""
    torch.manual_seed(0)
    trunk = build_trunk(kind, (3, 16, 16), **_SMALL.get(kind, {}))
    net = HeadedNet(trunk, MultiHead(trunk.out_features, 0)).double()
    net.observe(0, [0, 1, 2])
    net.observe(1, [0, 1])
    net.train()
    net(torch.randn(8, 3, 16, 16, dtype=torch.float64), 0)
    return net.eval()


def gradient(strategy: Any, batch: Batch) -> Tensor:
    """Return the gradient of the mean cross-entropy on a batch, (P,); zeros for parameters that have no part in it."""
    parameters = list(strategy.model.parameters())
    loss = nn.functional.cross_entropy(strategy.model(batch.x, batch.t), batch.y)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    pairs = zip(parameters, found, strict=True)
    return torch.cat([(torch.zeros_like(own) if slope is None else slope).flatten() for own, slope in pairs])


# ------------------------------------------------------------------------------------------------ the shipped baselines


def defined(baseline: str, scenario: Scenario) -> bool:
    """Whether a baseline's method exists in a scenario."""
    spec = load_baseline(baseline)
    cls = find_class(spec)
    return scenario in spec.scenarios and (not issubclass(cls, Strategy) or scenario in cls.scenarios)


def is_own(baseline: str) -> bool:
    return issubclass(find_class(load_baseline(baseline)), Strategy)


def needs(baseline: str, scenario: Scenario) -> dict[str, Any]:
    """Return what a baseline needs on the small streams: DER logits of all classes, others a weaker hold.

    The strengths of EWC's recipes are for real streams; under a high learning rate they diverge on these. MAS and GPM
    would let nothing move after a task that a few directions tell apart.
    """
    if baseline.startswith("ewc"):
        return {"lam": 100.0 if baseline == "ewc_batched" else 10.0}
    if baseline in ("mas", "gpm"):
        return {"lam": 0.01} if baseline == "mas" else {"threshold": 0.5}
    return {"model.class_head": "fixed"} if baseline.startswith("der") and scenario == "class" else {}


EVERY = [(name, scenario) for name in names("baseline") for scenario in get_args(Scenario) if defined(name, scenario)]
OWN = [(name, scenario) for name, scenario in EVERY if is_own(name)]
HOME = [(name, next(scenario for other, scenario in EVERY if other == name)) for name in names("baseline")]
"""Every baseline once, in the first scenario that it is defined in."""
