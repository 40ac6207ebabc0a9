"""What a strategy keeps, counted by hand: unique bytes, the walk, and the roles."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import TensorDataset

from clbench.footprint import Holdings, footprint, tensors_in, unique_bytes, unique_elements

# ------------------------------------------------------------------------------------------------------- unique bytes


def test_tied_weights_count_once() -> None:
    """Linear(10, 10): 100 weights + 10 biases; tied twin: its own 10 biases. 120 elements x 4 B = 480 B."""
    first, twin = nn.Linear(10, 10), nn.Linear(10, 10)
    twin.weight = first.weight
    parameters = [*first.parameters(), *twin.parameters()]
    assert unique_elements(parameters) == 120
    assert unique_bytes(parameters) == 480


def test_a_view_and_its_base_count_once() -> None:
    base = torch.zeros(6, 4)
    assert unique_bytes([base, base.view(-1), base.t(), base[2:4]]) == 6 * 4 * 4


def test_overlapping_views_count_their_union() -> None:
    """Elements 0..5 and 4..9 of ten: all ten, 40 B, and not 48; 0..2 and 8..9 apart: five, 20 B."""
    base = torch.zeros(10)
    assert unique_bytes([base[:6], base[4:]]) == 40
    assert unique_bytes([base[:3], base[8:]]) == 20


def test_interleaved_strided_views_share_nothing() -> None:
    """Even and odd columns of 10 x 10 floats: 200 B each, spans that overlap, bytes that do not; with a row: 400 B."""
    base = torch.zeros(10, 10)
    even, odd = base[:, ::2], base[:, 1::2]
    assert unique_bytes([even]) == unique_bytes([odd]) == 200
    assert unique_bytes([even, odd]) == 400
    # row 0 adds its five odd columns to the even ones: 200 + 20
    assert unique_bytes([even, base[0]]) == 220


def test_a_strided_view_of_a_large_buffer_counts_what_it_addresses() -> None:
    """Every hundredth of 5,000 floats: 50 elements, 200 B addressed of 20,000 resident."""
    assert unique_bytes([torch.zeros(5000)[::100]]) == 200


def test_an_expanded_tensor_has_the_size_of_what_it_repeats() -> None:
    assert unique_bytes([torch.zeros(1).expand(1000)]) == 4
    assert unique_elements([torch.zeros(3, 1).expand(3, 1000)]) == 3


def test_windows_over_a_tensor_count_the_tensor() -> None:
    """Windows of 4 at every step over 10 elements touch all ten: 40 B, not 7 x 4 x 4 = 112."""
    assert unique_bytes([torch.zeros(10).unfold(0, 4, 1)]) == 40
    # Windows of 2 at every 4th of 10: elements 0, 1, 4, 5, 8, 9.
    assert unique_bytes([torch.zeros(10).unfold(0, 2, 4)]) == 24
    # Rows 3 apart, columns 2 apart, 3 x 2: 0, 2, 3, 5, 6, 8: no step nests in another, none coincide.
    assert unique_elements([torch.zeros(9).as_strided((3, 2), (3, 2))]) == 6
    # Rows 2 apart, columns 2 apart, 3 x 2: 0, 2, 2, 4, 4, 6: four places.
    assert unique_elements([torch.zeros(9).as_strided((3, 2), (2, 2))]) == 4


def test_memory_seen_under_two_types_counts_once() -> None:
    base = torch.zeros(4, dtype=torch.complex64)
    assert unique_bytes([base, torch.view_as_real(base)]) == 32
    assert unique_elements([base, torch.view_as_real(base)]) == 4


def test_what_holds_no_values_has_no_bytes() -> None:
    freed = torch.zeros(8)
    freed.untyped_storage().resize_(0)
    lazy = nn.LazyLinear(3).weight
    assert unique_bytes([torch.empty(0), torch.empty(5, device="meta"), freed, lazy]) == 0


def test_a_sparse_tensor_counts_its_indices_and_values() -> None:
    """Two entries in two dimensions: 2 x 2 int64 indices = 32 B, two floats = 8 B."""
    places, values = torch.tensor([[0, 1], [2, 0]]), torch.tensor([3.0, 4.0])
    assert unique_bytes([torch.sparse_coo_tensor(places, values, (2, 3), check_invariants=True)]) == 40


def test_many_rows_of_one_matrix_are_counted_fast_enough_to_do_it_every_task() -> None:
    """20,000 rows of 8 floats are dense intervals: merged by sorting, 640,000 B."""
    assert unique_bytes(list(torch.zeros(20_000, 8))) == 640_000


def test_a_generator_of_temporaries_counts_each() -> None:
    """Each tensor would die before the next is made and leave it its address: all are held while counting."""
    assert unique_bytes(torch.zeros(256) for _ in range(10)) == 10 * 1024


# ---------------------------------------------------------------------------------------------------------- the walk


@dataclass
class Record:
    """A dataclass with a tensor."""

    value: Tensor


class Slotted:
    """An object without a dict."""

    __slots__ = ("empty", "value")

    def __init__(self, value: Tensor) -> None:
        self.value = value


def test_the_walk_finds_tensors_wherever_they_are() -> None:
    tensors = [torch.full((1,), float(i)) for i in range(8)]
    holder = nn.Linear(1, 1)
    holder.__dict__["plain"] = [tensors[0], {"a": (tensors[1], {tensors[2]})}]
    found = tensors_in(
        [holder, Record(tensors[3]), Slotted(tensors[4]), {tensors[5]: 1}, partial(print, tensors[6]), tensors[7]]
    )
    assert {id(tensor) for tensor in found} == {id(tensor) for tensor in [*tensors, *holder.parameters()]}


def test_the_walk_survives_cycles_and_any_depth() -> None:
    """A list 50,000 deep that ends in itself: far beyond Python's own recursion limit."""
    start: list[object] = [torch.zeros(1)]
    deep = start
    for _ in range(50_000):
        deep = [deep]
    start.append(deep)
    assert len(tensors_in(deep)) == 1
    # Taken apart level by level: freeing it is a recursion of the interpreter's.
    start.clear()
    while deep:
        deep = deep.pop()  # type: ignore[assignment]  # the list holds one list, or nothing
    gc.collect()


def test_the_walk_does_not_follow_functions_classes_and_data_sets() -> None:
    secret = torch.zeros(3)

    def closure() -> Tensor:
        return secret

    class Holder:
        shared = torch.zeros(2)

    data = TensorDataset(secret)
    assert tensors_in([closure, Holder, np, data]) == []
    # What one asks for by name is looked into.
    assert len(tensors_in(data)) == 1
    assert len(tensors_in([data], stop=lambda obj: False)) == 1


def test_gradients_are_not_state() -> None:
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    assert unique_bytes(tensors_in(layer)) == 24


@pytest.mark.parametrize(
    ("array", "size"),
    [
        (np.zeros((3, 4), np.float64), 96),
        (np.zeros(10, np.int16)[::-2], 10),  # 5 elements, walked backwards
        (np.zeros(4, np.dtype("datetime64[s]")), 32),
        (np.zeros(3, np.dtype([("x", "f4"), ("y", "i2")])), 18),
        (np.zeros(2, ">f4"), 8),  # the other byte order
        (np.broadcast_to(np.float32(1), (100,)), 4),  # read-only, stride 0
        (np.array([np.zeros(2, np.uint8), "text", torch.zeros(1)], dtype=object), 6),
    ],
)
def test_numpy_arrays_count_their_memory(array: np.ndarray[Any, Any], size: int) -> None:
    assert unique_bytes(tensors_in({"array": array})) == size


def test_an_array_and_a_tensor_over_it_count_once() -> None:
    array = np.zeros(10, np.float32)
    assert unique_bytes(tensors_in([array, torch.from_numpy(array), array[4:], torch.from_numpy(array[2:])])) == 40


# ---------------------------------------------------------------------------------------------------------- the roles


def two_layers() -> nn.Sequential:
    """Linear(4, 5), Linear(5, 4): 25 + 24 = 49 elements, 196 B."""
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 4))


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()


def test_adam_keeps_twice_the_model_and_a_step_for_each_tensor() -> None:
    """49 elements in 4 tensors: two moments of 196 B and four 4-byte steps = 408 B; SGD keeps nothing."""
    model = two_layers()
    adam, sgd = torch.optim.Adam(model.parameters()), torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, adam)
    counted = footprint(Holdings(model=model, optimizers=[adam, sgd]))
    assert (counted.parameters, counted.parameter_bytes, counted.optimizer_bytes) == (49, 196, 2 * 196 + 4 * 4)
    assert counted.answer_bytes == 196
    assert counted.keep_learning_bytes == 196 + 408


def test_each_byte_belongs_to_the_first_role_that_claims_it() -> None:
    """Anchors that alias the weights and a Fisher stored twice: 0 and 196 B new; the replay holds 24 B of its own."""
    model = two_layers()
    fisher = [torch.zeros_like(parameter) for parameter in model.parameters()]
    images = torch.zeros(3, 8, dtype=torch.uint8)
    counted = footprint(
        Holdings(
            model=model,
            auxiliary={"anchors": [p.detach() for p in model.parameters()], "fisher": fisher, "again": (fisher,)},
            replay={"images": images, "fisher": fisher},
            replay_samples=3,
            replay_extra_bytes=5,
            answers_with=frozenset({"fisher"}),
        )
    )
    assert counted.auxiliary_bytes == {"anchors": 0, "fisher": 196, "again": 0}
    assert (counted.replay_samples, counted.replay_bytes) == (3, 24 + 5)
    assert counted.answer_bytes == 196 + 196
    assert counted.keep_learning_bytes == 196 + 196 + 24 + 5


def test_buffers_count_whether_saved_or_not() -> None:
    """BatchNorm1d(5): running mean and variance of 5 floats, one int64 counter = 48 B; a buffer out of saves: 12 B."""
    model = nn.BatchNorm1d(5)
    model.register_buffer("cache", torch.zeros(3), persistent=False)
    counted = footprint(Holdings(model=model))
    assert (counted.parameter_bytes, counted.buffer_bytes, counted.keep_learning_bytes) == (40, 60, 100)


def test_tensors_in_plain_lists_of_a_module_count_as_unregistered() -> None:
    """Two masks of 49 bytes in a list; one is also named by the strategy, and so no longer unregistered."""
    model = two_layers()
    masks = [torch.ones(49, dtype=torch.bool) for _ in range(2)]
    model.__dict__["masks"] = masks
    assert footprint(Holdings(model=model)).auxiliary_bytes == {"unregistered": 98}
    assert footprint(Holdings(model=model, auxiliary={"masks": masks[0]})).auxiliary_bytes == {
        "masks": 49,
        "unregistered": 49,
    }


def test_a_parametrised_weight_counts_its_original() -> None:
    """Linear(3, 3) whose weight is the symmetric part of an original: 9 + 3 stored elements, nothing computed."""

    class Symmetric(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + weight.t()

    model = nn.Linear(3, 3)
    parametrize.register_parametrization(model, "weight", Symmetric())
    counted = footprint(Holdings(model=model))
    assert (counted.parameters, counted.keep_learning_bytes) == (12, 48)


def test_parameters_split_into_shared_and_per_task_and_trainable_and_nonzero() -> None:
    """A trunk of 25 frozen elements; two heads of 24 and 10 elements; the trunk's 20 weights are zero."""
    trunk, heads = nn.Linear(4, 5), nn.ModuleList([nn.Linear(5, 4), nn.Linear(4, 2)])
    for tensor in trunk.parameters():
        tensor.requires_grad_(False)
    nn.init.zeros_(trunk.weight)
    for tensor in [trunk.bias, *heads.parameters()]:
        nn.init.ones_(tensor)
    own = {task: list(head.parameters()) for task, head in enumerate(heads)}
    counted = footprint(Holdings(model=nn.ModuleList([trunk, heads]), task_parameters=own))
    assert counted.parameters == 59
    assert counted.parameters_trainable == 34
    assert (counted.parameters_shared, counted.parameters_per_task) == (25, 34)
    assert counted.parameters_nonzero == 59 - 20


def test_nonzero_counts_each_stored_element_once() -> None:
    """Six ones seen as elements 0..3 and 2..5: six, not eight; one repeated parameter: one."""
    base = torch.ones(6)
    model = nn.ParameterList([nn.Parameter(base[:4]), nn.Parameter(base[2:]), nn.Parameter(torch.ones(1).expand(9))])
    counted = footprint(Holdings(model=model))
    assert (counted.parameters, counted.parameters_nonzero) == (7, 7)
