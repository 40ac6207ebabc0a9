"""Parameters that change size: same object, state carried, and nothing wrong in silence."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from clbench.nets.growable import (
    Change,
    GrowthError,
    append_to_parameter_,
    apply,
    capacity,
    check,
    in_place_growth_available,
    keep_in_parameter_,
    register_state_rule,
    reserved_empty,
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

needs_reservations = pytest.mark.skipif(not in_place_growth_available(), reason="no reservations on this platform")


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


def train(net: Parameters, optimizer: Optimizer, steps: int, mask: Tensor | None = None) -> Iterator[None]:
    """Yield after each of `steps` full-batch steps on the squared error; a mask multiplies the hidden units."""
    for _ in range(steps):
        optimizer.zero_grad()
        hidden = torch.tanh(X @ net["w1"].T + net["b1"])
        ((hidden if mask is None else hidden * mask) @ net["w2"].T - Y).square().mean().backward()
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
    pairs = [(a[name].narrow(dim, 0, units), b[name].narrow(dim, 0, units)) for name, dim in DIMS.items()]
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)


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
    p.register_hook(lambda grad: fired.append("gradient"))
    p.register_post_accumulate_grad_hook(lambda q: fired.append("accumulated"))
    p.square().sum().backward()
    optimizer.step()
    append_to_parameter_(p, 1, 2, optimizer)
    assert module.a is module.b is p
    assert optimizer.param_groups[0]["params"][0] is p
    assert list(optimizer.state) == [p]
    fired.clear()
    p.square().sum().backward()
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
        p.square().sum().backward()
        optimizer.step()
        old = optimizer.state[p][key].clone()
        append_to_parameter_(p, 0, new, optimizer)
        assert torch.equal(optimizer.state[p][key], torch.cat([old, torch.full((2, 3), value)]))


class Lion(Optimizer):
    """An optimiser of somebody's own: state of the parameter's shape beginning at 1, and a note."""

    def __init__(self, params: list[nn.Parameter], extra: object = None) -> None:
        super().__init__(params, {"lr": 0.1})
        self.extra = extra

    def step(self, closure: object = None) -> None:  # type: ignore[override]  # only ever called without a closure
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("memory", torch.ones_like(p))
            self.state[p]["betas"] = (0.9, 0.99)
            if self.extra is not None:
                self.state[p]["extra"] = self.extra


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


# ------------------------------------------------------------------------------------------------------------ refusals


def everything(p: nn.Parameter, *optimizers: Optimizer) -> list[Any]:
    """Return values, gradient and state of p as they are, in copies, and which objects they are."""
    found: list[Any] = [p.detach().clone(), p.shape, p.data_ptr(), None if p.grad is None else p.grad.clone(), id(p.grad)]
    for optimizer in optimizers:
        found.append(copy.deepcopy(dict(optimizer.state.get(p, {}))))
        found.append({key: id(value) for key, value in optimizer.state.get(p, {}).items()})
    return found


def same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


def stepped(make: Make, shape: tuple[int, ...] = (4, 3)) -> tuple[nn.Parameter, Optimizer]:
    """Return a parameter in a reservation with a gradient, and an optimiser that has state of it."""
    p = nn.Parameter(reserved_empty(shape).copy_(torch.randn(shape)))
    optimizer = make([p])
    p.square().sum().backward()
    optimizer.step(lambda: p.square().sum().item())
    return p, optimizer


REFUSED: dict[str, tuple[Make, str]] = {
    "adafactor": (lambda p: torch.optim.Adafactor(p), "Adafactor cannot go on .* row and column sums"),
    "lbfgs": (lambda p: torch.optim.LBFGS(p), "LBFGS cannot go on .* one flat vector"),
    "own_with_a_sum_per_row": (lambda p: Lion(p, torch.ones(4)), r"Lion keeps 'extra', of shape \(4,\)"),
    "own_with_a_list_of_tensors": (lambda p: Lion(p, [{"x": torch.ones(4, 3)}]), "Lion keeps 'extra', a list"),
}
if hasattr(torch.optim, "Muon"):
    REFUSED["muon"] = (lambda p: torch.optim.Muon(p), "Muon cannot go on .* orthogonalises")


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("removal", [False, True], ids=["growth", "removal"])
def test_an_optimiser_that_cannot_carry_its_state_is_refused_and_nothing_changes(kind: str, removal: bool) -> None:
    """With Adam beside it, whose state could be carried: all or nothing."""
    make, says = REFUSED[kind]
    p, optimizer = stepped(make)
    adam = torch.optim.Adam([p])
    adam.step()
    before = everything(p, adam, optimizer)
    with pytest.raises(GrowthError, match=says):
        if removal:
            keep_in_parameter_(p, 1, torch.tensor([0, 2]), [adam, optimizer])
        else:
            append_to_parameter_(p, 1, 2, [adam, optimizer])
    assert same(everything(p, adam, optimizer), before)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dim": 2, "new": 1}, "dim 2 is out of range"),
        ({"dim": 0, "new": -1}, "at least 0; got -1"),
        ({"dim": 0, "new": torch.zeros(1, 2)}, "do not continue"),
        ({"dim": 0, "new": torch.zeros(1, 3).double()}, "got torch.float64"),
        ({"dim": 0, "index": torch.tensor([0, 4])}, "lie in 0"),
        ({"dim": 0, "index": torch.tensor([2, 1])}, "ascending"),
        ({"dim": 0, "index": torch.tensor([1, 1])}, "at most once"),
        ({"dim": 0}, "either new slices or an index"),
        ({"dim": 0, "new": 1, "index": torch.tensor([0])}, "either new slices or an index"),
    ],
)
def test_an_impossible_change_names_the_parameter_and_undoes_nothing_since_nothing_was_done(
    change: dict[str, Any], says: str
) -> None:
    """As the second of two, so that the first would have been done already."""
    p, optimizer = stepped(OPTIMIZERS["adam"])
    other, _ = stepped(OPTIMIZERS["adam"])
    first = {"new": 1} if "index" not in change or "new" in change else {"index": torch.tensor([0])}
    before = everything(p, optimizer), everything(other)
    for act in (apply, check):
        with pytest.raises(GrowthError, match=f"fc1.weight: .*{says}") as caught:
            act([Change(other, 0, **first), Change(p, name="fc1.weight", **change)], optimizer)
        assert "\n" not in str(caught.value)
    assert same((everything(p, optimizer), everything(other)), before)


def test_tensors_that_cannot_keep_a_new_size_are_refused() -> None:
    base = nn.Parameter(torch.randn(4, 3))
    images = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    with torch.inference_mode():
        inference = torch.randn(4, 3)
    cases: list[tuple[Tensor, str]] = [
        (base * 2, "not a leaf"),
        (nn.Parameter(torch.randn(3, 4).t()), "not contiguous"),
        (images, r"channels_last .*p\.data\.contiguous"),
        (nn.parameter.UninitializedParameter(), "lazy parameter"),
        (inference, "inference mode"),
        (torch.randn(4, 3).to_sparse(), "only dense"),
        (cast(Tensor, [1.0]), "got list"),
    ]
    for tensor, says in cases:
        with pytest.raises(GrowthError, match=says):
            append_to_parameter_(tensor, 0, 1)
    part = nn.Parameter(base.data[:2])
    with pytest.raises(GrowthError, match="same memory"):
        apply([Change(base, 0, new=1), Change(part, 0, new=1)])
    with pytest.raises(GrowthError, match="not both"):
        apply([Change(base, 0, new=1), Change(base, 1, index=torch.tensor([0]))])
    with pytest.raises(GrowthError, match="Optimizer objects; got str"):
        append_to_parameter_(base, 0, 1, cast(list[Optimizer], ["adam"]))


def test_convolutions_grow_along_outputs_and_inputs_and_stay_contiguous() -> None:
    p, optimizer = stepped(OPTIMIZERS["adam"], (4, 3, 2, 2))
    values = p.detach().clone()
    apply([Change(p, 0, new=2), Change(p, 1, new=torch.ones(6, 1, 2, 2))], optimizer)
    expected = torch.cat([torch.cat([values, torch.zeros(2, 3, 2, 2)]), torch.ones(6, 1, 2, 2)], 1)
    assert torch.equal(p, expected)
    assert p.is_contiguous()
    assert optimizer.state[p]["exp_avg"].shape == (6, 4, 2, 2)


def test_a_change_of_nothing_changes_nothing() -> None:
    p, optimizer = stepped(OPTIMIZERS["adam"])
    before, version = everything(p, optimizer), p._version
    append_to_parameter_(p, 0, 0, optimizer)
    keep_in_parameter_(p, 1, torch.arange(3), optimizer)
    assert same(everything(p, optimizer), before)
    assert p._version == version


@pytest.mark.parametrize("born", ["reserved", "ordinary"])
@pytest.mark.parametrize("fails_at", range(6))
@pytest.mark.parametrize("snapshot", [False, True], ids=["", "with_a_snapshot"])
def test_a_growth_that_runs_out_of_memory_half_way_is_taken_back(
    born: str, fails_at: int, snapshot: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two parameters, each with two state tensors of Adam's: six growths, of which each fails once."""
    p, optimizer = stepped(OPTIMIZERS["adam"], (40, 30))
    q = nn.Parameter(torch.randn(7, 5))
    if born == "ordinary":
        p.data = p.data.clone()
    optimizer.add_param_group({"params": [q]})
    (p.sum() + q.square().sum()).backward()
    optimizer.step()
    alias = p.detach() if snapshot else None
    before = [everything(x, optimizer) for x in (p, q)]
    done = 0

    def failing(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal done
        if done == fails_at:
            raise MemoryError("no more")
        done += 1
        return grow_tensor(*args, **kwargs)

    grow_tensor = optim_module.append
    monkeypatch.setattr(optim_module, "append", failing)
    changes = [Change(p, 1, new=3), Change(q, 0, new=2)]
    with pytest.raises(MemoryError):
        apply(changes, optimizer)
    after = [everything(x, optimizer) for x in (p, q)]
    # Values, shape, gradient, state; not which memory they lie in.
    for ours, theirs in zip(after, before, strict=True):
        assert same([ours[0], ours[1], ours[3], ours[4], ours[5]], [theirs[0], theirs[1], theirs[3], theirs[4], theirs[5]])
    if alias is not None:
        assert torch.equal(alias, before[0][0])
    monkeypatch.undo()
    apply(changes, optimizer)
    assert torch.equal(p, torch.cat([before[0][0], torch.zeros(40, 3)], 1))
    assert optimizer.state[q]["exp_avg"].shape == (9, 5)
    optimizer.step()


# -------------------------------------------------------------------------------------------------- graphs and aliases


def test_a_graph_that_saved_the_weight_raises_when_run_backwards() -> None:
    layer = nn.Linear(3, 4)
    loss = layer(torch.randn(2, 3, requires_grad=True)).square().sum()
    append_to_parameter_(layer.weight, 1, 2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("size", [1, 4])
def test_a_graph_that_only_adds_the_bias_raises_too(size: int) -> None:
    """It saved nothing of the bias; a gradient of size 1 would broadcast into the grown one."""
    bias = nn.Parameter(torch.randn(size))
    loss = (torch.ones(5, size) + bias).sum()
    append_to_parameter_(bias, 0, 2)
    with pytest.raises(GrowthError, match=r"parameter of shape \(\d,\): has changed its size since this graph"):
        loss.backward()
    assert bias.grad is None
    (torch.ones(5, size + 2) + bias).sum().backward()
    assert torch.equal(cast(Tensor, bias.grad), torch.full((size + 2,), 5.0))


def test_a_graph_of_a_parameter_frozen_since_raises_too() -> None:
    bias = nn.Parameter(torch.randn(4))
    loss = (torch.ones(5, 4) + bias).sum()
    bias.requires_grad_(False)
    append_to_parameter_(bias, 0, 2)
    assert not bias.requires_grad
    with pytest.raises(GrowthError, match="has changed its size"):
        loss.backward()


def test_a_loss_still_at_hand_after_its_backward_is_no_obstacle() -> None:
    """As in every training loop: the graph's nodes live on, and the next graph must not end in them."""
    layer = nn.Linear(3, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    for width in (3, 5, 7):
        optimizer.zero_grad()
        loss = (torch.randn(2, width) @ layer.weight.t() + layer.bias).square().sum()
        loss.backward()
        optimizer.step()
        append_to_parameter_(layer.weight, 1, 2, optimizer)
        assert layer.weight.grad is None
    assert loss.isfinite()
    assert optimizer.state[layer.weight]["momentum_buffer"].shape == (4, 9)


@pytest.mark.parametrize("removal", [False, True], ids=["growth", "removal"])
def test_snapshots_that_share_the_bytes_stay_as_they_are(removal: bool) -> None:
    """Uncloned state dicts of net and optimiser, a detached alias, an array of numpy's: all as before."""
    layer = nn.Linear(6, 40)
    layer.weight.data = reserved_empty((40, 6)).copy_(layer.weight.data)
    optimizer = torch.optim.Adam(layer.parameters())

    def change() -> None:
        if removal:
            keep_in_parameter_(layer.weight, 1, torch.arange(1, layer.weight.shape[1]), optimizer)
        else:
            append_to_parameter_(layer.weight, 1, 3, optimizer)

    for _ in range(2):  # the second time everything is in reservations
        layer(torch.randn(2, layer.weight.shape[1])).square().sum().backward()
        optimizer.step()
        shared: list[Any] = [
            layer.state_dict(), optimizer.state_dict(), layer.weight.detach(), layer.weight.detach().numpy()
        ]  # fmt: skip
        copies = copy.deepcopy(shared)
        change()
        for ours, theirs in zip(shared[:3], copies[:3], strict=True):
            assert same(ours, theirs)
        assert (shared[3] == copies[3]).all()
        del shared


@needs_reservations
def test_without_a_snapshot_parameter_and_state_grow_where_they_are() -> None:
    """Two growths: the first may move Adam's state into reservations, the second must not move anything."""
    p, optimizer = stepped(OPTIMIZERS["adam"], (40, 30))

    def addresses() -> list[int]:
        return [t.data_ptr() for t in (p, optimizer.state[p]["exp_avg"], optimizer.state[p]["exp_avg_sq"])]

    born = p.data_ptr()
    append_to_parameter_(p, 1, 3, optimizer)
    assert p.data_ptr() == born
    before = addresses()
    for dim in (0, 1):
        p.square().sum().backward()
        optimizer.step()
        append_to_parameter_(p, dim, 3, optimizer)
        assert addresses() == before
        keep_in_parameter_(p, dim, torch.arange(1, p.shape[dim]), optimizer)
        assert addresses() == before
    assert capacity(p) > p.numel()


def test_buffers_change_size_and_stay_the_same_object() -> None:
    norm = nn.BatchNorm1d(4)
    mean = norm.running_mean
    assert mean is not None
    append_to_parameter_(mean, 0, 2, fill=0.5)
    assert norm.running_mean is mean
    assert mean.tolist() == [0, 0, 0, 0, 0.5, 0.5]


# -------------------------------------------------------------------------------------------------------- distribution


def test_a_parameter_in_a_kept_distributed_wrapper_is_refused_and_without_the_wrapper_grows(tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = nn.Linear(3, 4)
        outside = nn.Linear(3, 4)
        wrapper = DistributedDataParallel(net)
        wrapper(torch.randn(2, 3)).sum().backward()
        before = everything(net.weight)
        with pytest.raises(GrowthError, match="fc: is held by a DistributedDataParallel"):
            apply([Change(outside.weight, 0, new=1), Change(net.weight, 0, new=1, name="fc")])
        assert same(everything(net.weight), before)
        append_to_parameter_(outside.weight, 0, 1)
        del wrapper
        gc.collect()
        append_to_parameter_(net.weight, 1, 2)
        rebuilt = DistributedDataParallel(net)
        rebuilt(torch.randn(2, 5)).sum().backward()
        assert net.weight.grad is not None
        del rebuilt
    finally:
        torch.distributed.destroy_process_group()
