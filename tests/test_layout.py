"""The memory layout in which convolutions run: faster on the CPU, and nothing else about a net changes."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from clbench.nets import build_trunk

NETS: dict[str, dict[str, Any]] = {
    "zenke": {"channels": (4, 8), "hidden": 16},
    "lenet": {"channels": (4, 8), "hidden": (16, 12)},
    "resnet18": {"width": 4},
    "resnet32": {},
}


def net_of(kind: str) -> nn.Sequential:
    """Return a net without chance in its forward pass."""
    torch.manual_seed(0)
    trunk = build_trunk(kind, (3, 16, 16), **NETS[kind])
    return nn.Sequential(trunk, nn.Linear(trunk.out_features, 5)).eval()


def gradients(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.autograd.backward(nn.functional.cross_entropy(net(x), torch.arange(len(x)) % 5))
    found = {name: parameter.grad for name, parameter in net.named_parameters()}
    net.zero_grad()
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize("kind", NETS)
def test_the_layout_changes_nothing_but_rounding(kind: str) -> None:
    x = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    net = net_of(kind)
    answers, slopes = [], []
    for on in (True, False):
        cast(Any, net[0]).channels_last = on
        answers.append(net(x).detach())
        slopes.append(gradients(net, x))
    torch.testing.assert_close(*answers, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", NETS)
def test_weights_and_gradients_keep_their_own_layout(kind: str) -> None:
    """Methods flatten them with `view(-1)`, which channels-last weights would refuse."""
    net = net_of(kind)
    for value in (*gradients(net, torch.rand(4, 3, 16, 16)).values(), *net.parameters()):
        assert value.is_contiguous()


@pytest.mark.parametrize("kind", NETS)
def test_per_sample_gradients_go_through_the_layout(kind: str) -> None:
    """The exact Fisher differentiates one sample at a time under vmap; their mean is the batch's gradient."""
    net, x = net_of(kind), torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    values = {name: value.detach() for name, value in (*net.named_parameters(), *net.named_buffers())}
    trained = {name for name, _ in net.named_parameters()}

    def loss(parameters: dict[str, Tensor], sample: Tensor, label: Tensor) -> Tensor:
        return nn.functional.cross_entropy(functional_call(net, {**values, **parameters}, (sample[None],)), label[None])

    alone = vmap(grad(loss), in_dims=(None, 0, 0))({name: values[name] for name in trained}, x, torch.arange(3))
    for name, value in gradients(net, x).items():
        torch.testing.assert_close(alone[name].mean(0), value, rtol=1e-3, atol=1e-5)
