"""From the name of a net, as recipes use it, to the net."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from clbench.nets.convnet import LeNet, ZenkeNet
from clbench.nets.heads import GrowingHead, Head, MultiHead, SingleHead
from clbench.nets.mlp import MLP, NormedMLP, draw_xavier
from clbench.nets.resnet import ResNet18, ResNet32
from clbench.nets.trunk import Trunk

TRUNKS: dict[str, Callable[..., Trunk]] = {
    "mlp": MLP,
    "normed_mlp": NormedMLP,
    "zenke": ZenkeNet,
    "lenet": LeNet,
    "resnet18": ResNet18,
    "resnet32": ResNet32,
}
"""The built-in trunks by name; `f(input_shape, **settings)`."""

CHAINS = frozenset({"mlp", "zenke", "lenet"})
"""Those that are a `ChainTrunk`."""


def build_trunk(kind: str, input_shape: Sequence[int], **settings: Any) -> Trunk:
    """Return a freshly initialised trunk, drawn from PyTorch's global generator.

    Args:
        kind: a key of `TRUNKS`.
        input_shape: channels, height and width of one image.
        **settings: the trunk's own, such as `hidden` of an MLP.

    Raises:
        ValueError: no such kind, or images too small for it.
        TypeError: a setting that the kind does not have.
    """
    if kind not in TRUNKS:
        raise ValueError(f"unknown net '{kind}'. Known: {', '.join(sorted(TRUNKS))}")
    return TRUNKS[kind](input_shape, **settings)


def build_head(
    scenario: str,
    class_head: str,
    in_features: int,
    outputs: Sequence[Sequence[int]],
    init_seed: int,
    bias: bool,
    init: str = "torch",
) -> Head:
    """Return the head a scenario asks for.

    Args:
        scenario: "task" (a head per task), "domain" (one for all) or "class".
        class_head: for "class": "growing" (logits of the classes seen) or "fixed" (all from the start).
        in_features: F of the trunk.
        outputs: per task, the labels it uses.
        init_seed: of outputs that are born later.
        bias: whether outputs have a bias.
        init: "torch", or "xavier" as an MLP has it.

    Raises:
        ValueError: "xavier" for a head whose outputs are born later: it depends on how many there are.
    """
    n_outputs = 1 + max(max(labels) for labels in outputs)
    later = scenario == "task" or (scenario == "class" and class_head == "growing")
    if later and init != "torch":
        raise ValueError(f"init '{init}' needs one head with all outputs: domain-incremental, or class_head = 'fixed'")
    if scenario == "task":
        return MultiHead(in_features, init_seed, bias, {task: 1 + max(labels) for task, labels in enumerate(outputs)})
    if later:
        return GrowingHead(in_features, init_seed, bias, n_outputs)
    head = SingleHead(in_features, n_outputs, bias)
    if init == "xavier":
        draw_xavier(head)
    return head
