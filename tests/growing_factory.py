"""Nets whose couplings are known, and everything that a growth could have changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from clbench.nets.growable import Coupling
from clbench.nets.growable.layers import GrowBatchNorm2d, GrowConv2d, GrowLinear


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Wired(nn.Module):
    """Base of the nets below: a float64 net that names its couplings."""

    shape: tuple[int, ...]

    def couplings(self) -> list[Coupling]:
        raise NotImplementedError

    def inputs(self, seed: int = 0) -> Tensor:
        return seeded(6, *self.shape, seed=seed)


class Dense(Wired):
    """Linear, BatchNorm, ReLU, Linear, ReLU, two heads."""

    shape = (5,)

    def __init__(
        self, linear: type[nn.Linear] = nn.Linear, widths: tuple[int, int] = (4, 3), norm: bool = True
    ) -> None:
        super().__init__()
        self.first, self.second = linear(5, widths[0]), linear(widths[0], widths[1])
        self.norm = nn.BatchNorm1d(widths[0]) if norm else nn.Identity()
        self.heads = nn.ModuleList(linear(widths[1], 2) for _ in range(2))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.second(F.relu(self.norm(self.first(x)))))
        return torch.cat([head(y) for head in self.heads], 1)

    def couplings(self) -> list[Coupling]:
        norms = [self.norm] if isinstance(self.norm, nn.BatchNorm1d) else []
        return [Coupling(self.first, self.second, norms=norms), Coupling(self.second, list(self.heads))]


class Maps(Wired):
    """Conv, BatchNorm, depthwise conv, conv, Flatten, BatchNorm1d over the features, two Linears: all of it coupled."""

    shape = (2, 7, 7)

    def __init__(self, conv: type[nn.Conv2d] = nn.Conv2d, linear: type[nn.Linear] = nn.Linear) -> None:
        super().__init__()
        self.first = conv(2, 3, 3, stride=2, padding=1, dilation=1)
        self.norm = (GrowBatchNorm2d if conv is GrowConv2d else nn.BatchNorm2d)(3)
        self.depthwise = conv(3, 3, 3, padding=1, groups=3)
        self.second = conv(3, 4, 2, bias=False)
        self.flat_norm = nn.BatchNorm1d(4 * 9)
        self.heads = nn.ModuleList([linear(4 * 9, 3), linear(4 * 9, 2)])
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.second(F.relu(self.depthwise(F.relu(self.norm(self.first(x)))))))
        y = self.flat_norm(y.flatten(1))
        return torch.cat([head(y) for head in self.heads], 1)

    def couplings(self) -> list[Coupling]:
        return [
            Coupling(self.first, self.second, norms=[self.norm], followers=[self.depthwise]),
            Coupling(self.second, list(self.heads), followers=[self.flat_norm]),
        ]


class Residual(Wired):
    """A stem, a block with an inner layer, and a block of one layer whose units are its own inputs; all added."""

    shape = (2, 5, 5)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(2, 3, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(2), nn.BatchNorm2d(3)])
        self.own = nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.stem(x)))
        y = F.relu(y + self.norms[2](self.outer(F.relu(self.norms[1](self.inner(y))))))
        y = F.relu(y + self.own(y))
        answer: Tensor = self.head(y.mean((2, 3)))
        return answer

    def couplings(self) -> list[Coupling]:
        stream = [self.stem, self.outer, self.own]
        return [
            Coupling(stream, [self.inner, self.own, self.head], norms=[self.norms[0], self.norms[2]]),
            Coupling(self.inner, self.outer, norms=self.norms[1]),
        ]


NETS: dict[str, Callable[[], Wired]] = {
    "dense": Dense,
    "dense-growing": lambda: Dense(GrowLinear),
    "maps": Maps,
    "maps-growing": lambda: Maps(GrowConv2d, GrowLinear),
    "residual": Residual,
}


def net_of(kind: str) -> Wired:
    """Return a net whose norms have seen data."""
    torch.manual_seed(0)
    net = NETS[kind]()
    for seed in range(3):
        net(net.inputs(seed))
    return net


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    answer = net(x)
    return F.cross_entropy(answer, torch.arange(len(x)) % answer.shape[1])


def train(net: nn.Module, optimizer: Optimizer, x: Tensor, steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        torch.autograd.backward(loss_of(net, x))
        optimizer.step()


def everything(net: nn.Module, *optimizers: Optimizer) -> list[Any]:
    """Return all that could have changed, copied: values, gradients, sizes, state, the random generator's as well."""
    values = {name: value.clone() for name, value in net.state_dict().items()}
    gradients = {name: p.grad if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]
    return [values, gradients, repr(net), torch.get_rng_state(), states, [id(p) for p in net.parameters()]]


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b


def assert_sizes_are_true(net: nn.Module) -> None:
    """What layers say of their sizes is what a layer of that size would have."""
    for module in net.modules():
        if isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)
        if isinstance(module, nn.Conv2d):
            assert tuple(module.weight.shape[:2]) == (module.out_channels, module.in_channels // module.groups)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert {len(v) for v in module.state_dict().values() if v.dim()} == {module.num_features}
