"""Parameters that change size: same object, state carried, and nothing wrong in silence."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clbench.nets.growable import (
    GrowthError,
    append_to_parameter_,
    keep_in_parameter_,
    register_state_rule,
)
from clbench.nets.growable import optim as optim_module

Parameters = dict[str, nn.Parameter]
Make = Callable[[list[nn.Parameter]], Optimizer]

OPTIMIZERS: dict[str, Make] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05, t0=10.0),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
}
BEFORE, AFTER = 20, 40
IN, OLD, NEW, OUT = 5, 6, 3, 2
X = torch.randn(16, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(16, OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

def large_values() -> dict[str, Tensor]:
    """The net with all its units: hidden weight (units, in), hidden bias (units), outgoing weight (out, units)."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"w1": (OLD + NEW, IN), "b1": (OLD + NEW,), "w2": (OUT, OLD + NEW)}
    return {name: torch.randn(s, dtype=torch.float64, generator=generator) * 0.5 for name, s in shapes.items()}


DIMS = {"w1": 0, "b1": 0, "w2": 1}
"""Along which dimension of each parameter its units lie."""


def parameters_of(values: dict[str, Tensor]) -> Parameters:
    return {name: nn.Parameter(value.clone()) for name, value in values.items()}


def small() -> Parameters:
    return parameters_of({name: value.narrow(DIMS[name], 0, OLD) for name, value in large_values().items()})


def backward(loss: Tensor) -> None:
    """`loss.backward()`, which torch leaves untyped."""
    torch.autograd.backward(loss)


def train(net: Parameters, optimizer: Optimizer, steps: int, mask: Tensor | None = None) -> Iterator[None]:
    """Yield after each of `steps` full-batch steps on the squared error; a mask multiplies the hidden units."""
    for _ in range(steps):
        optimizer.zero_grad()
        hidden = torch.tanh(X @ net["w1"].T + net["b1"])
        backward(((hidden if mask is None else hidden * mask) @ net["w2"].T - Y).square().mean())
        optimizer.step()
        yield


def run(net: Parameters, optimizer: Optimizer, steps: int, mask: Tensor | None = None) -> None:
    for _ in train(net, optimizer, steps, mask):
        pass


def grow(net: Parameters, optimizer: Optimizer) -> None:
    for name, value in large_values().items():
        append_to_parameter_(net[name], DIMS[name], value.narrow(DIMS[name], OLD, NEW).clone(), [optimizer])


def farthest(a: Parameters, b: Parameters, units: int = OLD + NEW) -> float:
    """Return the largest difference of the first `units` units, relative to the largest entry."""

    def first(net: Parameters, name: str) -> Tensor:
        return net[name].detach().narrow(DIMS[name], 0, units)

    return max(float((first(a, n) - first(b, n)).abs().max() / first(b, n).abs().max()) for n in DIMS)


def trained_small(make: Make) -> tuple[Parameters, Optimizer]:
    net = small()
    optimizer = make(list(net.values()))
    run(net, optimizer, BEFORE)
    return net, optimizer


# ------------------------------------------------------------------------------------------------------ state carried


def masked_larger(make: Make) -> tuple[Parameters, Optimizer]:
    """Return the larger net whose new units were masked, and held at their first values, until now.

    Masked units get zero gradients, and an optimiser's state of them stays what it begins with, with two exceptions:
    weight decay flows into SGD's momentum, and ASGD's average has followed values that decayed. A unit that did not
    exist has neither, so these two are put to what a first step would find.
    """
    values = large_values()
    net = parameters_of(values)
    optimizer = make(list(net.values()))
    mask = torch.cat([torch.ones(OLD), torch.zeros(NEW)]).double()
    for _ in train(net, optimizer, BEFORE, mask):
        for name, dim in DIMS.items():
            born = values[name].narrow(dim, OLD, NEW)
            net[name].data.narrow(dim, OLD, NEW).copy_(born)
            for key, begin in (("momentum_buffer", torch.zeros_like(born)), ("ax", born)):
                if isinstance(optimizer, torch.optim.SGD | torch.optim.ASGD) and key in optimizer.state[net[name]]:
                    optimizer.state[net[name]][key].narrow(dim, OLD, NEW).copy_(begin)
    return net, optimizer


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_after_growth_equals_that_of_a_masked_larger_net(kind: str) -> None:
    """40 steps, float64: at most 1e-12 apart, what rounding in sums of 9 instead of 6 terms may leave."""
    net, optimizer = trained_small(OPTIMIZERS[kind])
    grow(net, optimizer)
    reference, its_optimizer = masked_larger(OPTIMIZERS[kind])
    assert farthest(net, reference) <= 1e-12
    run(net, optimizer, AFTER)
    run(reference, its_optimizer, AFTER)
    assert farthest(net, reference) <= 1e-12
    for name, dim in DIMS.items():
        for key, value in its_optimizer.state[reference[name]].items():
            ours = optimizer.state[net[name]][key]
            assert not isinstance(value, Tensor) or torch.allclose(ours, value, rtol=1e-10, atol=1e-14), (key, dim)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_old_units_train_as_if_never_resized_while_the_new_ones_are_dormant(kind: str) -> None:
    net, optimizer = trained_small(OPTIMIZERS[kind])
    grow(net, optimizer)
    run(net, optimizer, AFTER, torch.cat([torch.ones(OLD), torch.zeros(NEW)]).double())
    untouched, its_optimizer = trained_small(OPTIMIZERS[kind])
    run(untouched, its_optimizer, AFTER)
    assert farthest(net, untouched, OLD) <= 1e-12


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimiser_made_anew_trains_differently(kind: str) -> None:
    """The negative control: were state unimportant here, the tests above would show nothing."""
    net, optimizer = trained_small(OPTIMIZERS[kind])
    grow(net, optimizer)
    anew = OPTIMIZERS[kind](list(net.values()))
    run(net, anew, AFTER)
    reference, its_optimizer = masked_larger(OPTIMIZERS[kind])
    run(reference, its_optimizer, AFTER)
    assert farthest(net, reference) > 1e-8


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_resuming_from_a_checkpoint_after_growth_is_identical(kind: str) -> None:
    """With float64 as torch's default: else NAdam keeps a scalar in float32, which loading turns into float64."""
    torch.set_default_dtype(torch.float64)
    try:
        resume(kind)
    finally:
        torch.set_default_dtype(torch.float32)


def resume(kind: str) -> None:
    net, optimizer = trained_small(OPTIMIZERS[kind])
    grow(net, optimizer)
    run(net, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    resumed = parameters_of({name: p.detach() for name, p in net.items()})
    again = OPTIMIZERS[kind](list(resumed.values()))
    again.load_state_dict(saved)
    run(net, optimizer, AFTER)
    run(resumed, again, AFTER)
    assert farthest(net, resumed) == 0.0


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_removing_units_leaves_the_state_of_those_kept(kind: str) -> None:
    """Units 1 and 4 are removed; every state tensor is then what selecting the others gives."""
    net, optimizer = trained_small(OPTIMIZERS[kind])
    index = torch.tensor([0, 2, 3, 5])
    expected = {
        name: {
            key: value.index_select(dim, index) if isinstance(value, Tensor) and value.dim() else copy.copy(value)
            for key, value in (("", net[name].detach()), *optimizer.state[net[name]].items())
        }
        for name, dim in DIMS.items()
    }
    for name, dim in DIMS.items():
        keep_in_parameter_(net[name], dim, index, optimizer)
    for name in DIMS:
        for key, value in expected[name].items():
            ours = net[name] if key == "" else optimizer.state[net[name]][key]
            assert torch.equal(ours, value) if isinstance(value, Tensor) else ours == value
    run(net, optimizer, 3)


def test_the_parameter_stays_itself_in_groups_ties_and_hooks() -> None:
    p = nn.Parameter(torch.randn(4, 3))
    module = nn.Module()
    module.register_parameter("a", p)
    module.register_parameter("b", p)
    optimizer = torch.optim.Adam([{"params": [p], "lr": 0.5}])
    fired: list[str] = []
    hooks: Any = p  # torch leaves these two untyped
    hooks.register_hook(lambda grad: fired.append("gradient"))
    hooks.register_post_accumulate_grad_hook(lambda q: fired.append("accumulated"))
    backward(p.square().sum())
    optimizer.step()
    append_to_parameter_(p, 1, 2, optimizer)
    assert module.a is module.b is p
    assert optimizer.param_groups[0]["params"][0] is p
    assert list(optimizer.state) == [p]
    fired.clear()
    backward(p.square().sum())
    assert fired == ["gradient", "accumulated"]
    assert p.grad is not None
    assert p.grad.shape == (4, 5)


def test_fills_begin_as_the_optimiser_itself_would() -> None:
    """Adagrad's sum at its initial value, Rprop's step at lr, ASGD's average at the new values, all else at 0."""
    new = torch.full((2, 3), 7.0)
    cases: list[tuple[Callable[..., Optimizer], str, float]] = [
        (lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.25), "sum", 0.25),
        (lambda p: torch.optim.Rprop(p, lr=0.125), "step_size", 0.125),
        (lambda p: torch.optim.Rprop(p, lr=0.125), "prev", 0.0),
        (lambda p: torch.optim.ASGD(p), "ax", 7.0),
        (lambda p: torch.optim.Adam(p), "exp_avg_sq", 0.0),
    ]
    for make, key, value in cases:
        p = nn.Parameter(torch.randn(4, 3))
        optimizer = make([p])
        backward(p.square().sum())
        optimizer.step()
        old = optimizer.state[p][key].clone()
        append_to_parameter_(p, 0, new, optimizer)
        assert torch.equal(optimizer.state[p][key], torch.cat([old, torch.full((2, 3), value)]))


class Lion(Optimizer):
    """An optimiser of somebody's own: state of the parameter's shape beginning at 1, and a note."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: object = None) -> None:  # type: ignore[override]  # only ever called without a closure
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("memory", torch.ones_like(p))
            self.state[p]["betas"] = (0.9, 0.99)


@pytest.fixture
def own_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optim_module, "_rules", dict(optim_module._rules))


@pytest.mark.usefixtures("own_rules")
def test_a_registered_rule_says_how_state_begins() -> None:
    class LionChild(Lion):
        pass

    for fill, value in ((1.0, 1.0), (lambda group, new: group["lr"], 0.1), (lambda group, new: new * 2, 6.0)):
        register_state_rule(Lion, {"memory": fill})
        for cls in (Lion, LionChild):
            p = nn.Parameter(torch.zeros(2, 3))
            optimizer = cls([p])
            optimizer.step()
            append_to_parameter_(p, 0, 1, optimizer, fill=3.0)
            assert torch.equal(optimizer.state[p]["memory"], torch.tensor([[1.0] * 3] * 2 + [[value] * 3]))
            assert optimizer.state[p]["betas"] == (0.9, 0.99)
    with pytest.raises(GrowthError, match="class of optimisers"):
        register_state_rule(cast(type[Optimizer], nn.Linear), {})
