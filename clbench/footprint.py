"""What a strategy keeps between tasks, by role, each byte once.

What is in two roles belongs to the first of: parameters, buffers, optimiser, auxiliary, replay, unregistered.
Gradients are no state: they are zeroed at every step.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.utils.data import ConcatDataset, Subset

from clbench.randomness import kept_randomness
from clbench.records import Footprint
from clbench.tensors import (
    Region,
    is_a,
    is_data,
    nonzero,
    regions,
    tensors_in,
    union,
    unique_bytes,
    unique_elements,
    walk,
)

__all__ = [
    "UNREGISTERED",
    "Holdings",
    "footprint",
    "foreign_holdings",
    "is_data",
    "is_scaffolding",
    "tensors_in",
    "unique_bytes",
    "unique_elements",
]

UNREGISTERED = "unregistered"
"""Auxiliary state: tensors in plain attributes and lists of the model that no other role has claimed."""


@dataclass(frozen=True, kw_only=True)
class Holdings:
    """What a strategy holds, sorted by what it is for. Anything that holds tensors may stand for tensors."""

    model: nn.Module
    optimizers: Sequence[Optimizer] = ()
    auxiliary: Mapping[str, object] = field(default_factory=dict)
    """State of the method by name: Fisher, anchors, masks, an old network."""
    replay: object = None
    """Tensors of stored samples."""
    replay_samples: int = 0
    replay_extra_bytes: int = 0
    """Stored samples that are no tensors of the strategy, such as indices into the stream: samples x bytes each."""
    answers_with: frozenset[str] = frozenset()
    """Names of the auxiliary state that is needed to answer ("unregistered" for plain attributes of the model)."""
    task_parameters: Mapping[int, Sequence[Parameter]] = field(default_factory=dict)
    """Parameters of the model that one task alone uses; the others are shared by all."""


def footprint(holdings: Holdings) -> Footprint:
    """Count what a strategy keeps.

    `keep_learning_bytes` covers every role, `answer_bytes` parameters, buffers and the auxiliary state in
    `answers_with`.
    """
    parameters = list(holdings.model.parameters())
    private = {id(parameter) for own in holdings.task_parameters.values() for parameter in own}
    elements = unique_elements(parameters)
    shared = unique_elements(parameter for parameter in parameters if id(parameter) not in private)

    claimed: dict[Region, None] = {}
    covered = 0

    def newly(*held: object) -> int:
        """Return the bytes that no role before this one has claimed."""
        nonlocal covered
        before = covered
        claimed.update(dict.fromkeys(regions(tensors_in(held))))
        covered = union(claimed)
        return covered - before

    parameter_bytes = newly(*parameters)
    buffer_bytes = newly(*holdings.model.buffers())
    optimizer_bytes = newly(*holdings.optimizers)
    auxiliary = {name: newly(held) for name, held in holdings.auxiliary.items()}
    replay_bytes = newly(holdings.replay) + holdings.replay_extra_bytes
    if rest := newly(holdings.model):
        auxiliary[UNREGISTERED] = auxiliary.get(UNREGISTERED, 0) + rest
    answer = parameter_bytes + buffer_bytes + sum(auxiliary.get(name, 0) for name in holdings.answers_with)
    return Footprint(
        parameters=elements,
        parameters_trainable=unique_elements(parameter for parameter in parameters if parameter.requires_grad),
        parameters_shared=shared,
        parameters_per_task=elements - shared,
        parameters_nonzero=nonzero(parameters),
        parameter_bytes=parameter_bytes,
        buffer_bytes=buffer_bytes,
        optimizer_bytes=optimizer_bytes,
        auxiliary_bytes=auxiliary,
        replay_samples=holdings.replay_samples,
        replay_bytes=replay_bytes,
        answer_bytes=answer,
        keep_learning_bytes=covered + holdings.replay_extra_bytes,
    )


# ------------------------------------------------------------------------------------------------- foreign strategies

_REPLAY_NAME = re.compile(r"(^|_)(memory|memories|buffers?|exemplars?|replay|ext_mem)(_|$)")
_PASSING = re.compile(
    r"model|optimizer|plugins|evaluator|experience|_?adapted_dataset|dataloader|replay_loader|loss|_?eval_streams"
    r"|current_eval_stream|_experiences|(mb|mbatch|batch)(_.*)?"
)
"""Attributes of a strategy that are counted elsewhere or hold one phase or mini-batch, by avalanche's names."""


def is_scaffolding(obj: object) -> bool:
    """Whether `obj` belongs to the benchmark or watches the strategy: experiences, streams, evaluators, loggers."""
    benchmark = is_a(obj, "CLExperience", "CLStream", "CLScenario")
    return benchmark or is_a(obj, "BaseTemplate", "EvaluationPlugin", "BaseLogger", "Metric")


def foreign_holdings(strategy: Any, *, skip: Callable[[object], bool] = is_scaffolding) -> Holdings:
    """Return what a strategy that cannot tell by itself holds: a stock one of avalanche's, or its like.

    Looks at `model`, `optimizer`, every attribute of the strategy and of its plugins. Auxiliary state is named by class
    and attribute ("EWCPlugin.importances"). Replay is what data sets are found (buffers keep indices into the stream:
    each sample counts once, with the bytes of the sample it stands for, and the data attributes stored beside it, such
    as DER's logits), and the tensors of attributes called memory, buffer, exemplars or replay.

    What stays alive is counted, needed or not: a generic walk cannot tell a method's state from its scratch.

    Args:
        strategy: has `model` and `optimizer`, and may have `plugins`.
        skip: objects not to be looked into.
    """
    plugins = list(getattr(strategy, "plugins", ()))
    peers = {id(peer) for peer in (strategy, *plugins)}

    def stop(obj: object) -> bool:
        return id(obj) in peers or skip(obj) or is_data(obj)

    auxiliary: dict[str, object] = {}
    replay: list[Tensor] = []
    buffers: list[object] = []
    rows = labels = 0
    optimizers = [strategy.optimizer]
    known = [*strategy.model.parameters(), *strategy.model.buffers()]
    for owner, name, value in _attributes(strategy, [plugin for plugin in plugins if not skip(plugin)]):
        if isinstance(value, Optimizer):
            optimizers.append(value)
            continue
        if stop(value) and not is_data(value):
            continue
        found, stopped = walk([value], stop)
        buffers.extend(obj for obj in stopped if is_data(obj))
        if _REPLAY_NAME.search(name) and isinstance(value, dict | list | tuple | Tensor):
            replay.extend(found)
            labels += _count_integers(value)
            # Inputs, targets and task labels stand side by side in attributes of their own.
            rows = max(rows, sum(len(tensor) for tensor in found if tensor.ndim))
        elif unique_bytes([*known, *found]) > unique_bytes(known):  # not only another way to what is named already
            auxiliary[_free_name(f"{owner}.{name}", auxiliary)] = found
            known.extend(found)
    samples, sample_bytes, beside = _stored(buffers)
    return Holdings(
        model=strategy.model,
        optimizers=optimizers,
        auxiliary=auxiliary,
        replay=[*replay, *beside],
        replay_samples=samples + rows,
        replay_extra_bytes=sample_bytes + 8 * labels,
        # Class means and the like, that a model keeps in plain attributes, are there for its forward pass.
        answers_with=frozenset({UNREGISTERED}),
        task_parameters=_heads(strategy.model),
    )


def _attributes(strategy: Any, plugins: Iterable[Any]) -> Iterator[tuple[str, str, object]]:
    """Yield the class of the owner, name and value of each attribute that may hold state."""
    for name, value in vars(strategy).items():
        if not _PASSING.fullmatch(name):
            yield type(strategy).__name__, name, value
    for plugin in plugins:
        for name, value in vars(plugin).items():
            yield type(plugin).__name__, name, value


def _free_name(name: str, taken: Mapping[str, object]) -> str:
    """Return `name`, numbered when a second plugin of one class brings it again."""
    numbered = (f"{name}#{k}" for k in range(2, len(taken) + 3))
    return next(free for free in (name, *numbered) if free not in taken)


def _count_integers(value: object) -> int:
    """Return how many plain integers nested containers hold: labels, 8 bytes each once stored."""
    if isinstance(value, dict):
        return sum(_count_integers(item) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_count_integers(item) for item in value)
    return int(isinstance(value, int))


def _heads(model: nn.Module) -> dict[int, list[Parameter]]:
    """Return the parameters of avalanche's multi-task modules that serve one task, found in dicts keyed by task."""
    own: dict[int, list[Parameter]] = {}
    for module in model.modules():
        if is_a(module, "MultiTaskModule"):
            for child in module.children():
                if isinstance(child, nn.ModuleDict):
                    for key, head in child.items():
                        if key.isdigit():
                            own.setdefault(int(key), []).extend(head.parameters())
    return own


def _stored(buffers: Iterable[object]) -> tuple[int, int, list[Tensor]]:
    """Return the number of distinct samples in the buffers, their bytes, and the tensors stored beside them."""
    chosen: dict[int, tuple[Any, list[NDArray[np.int64]]]] = {}
    beside: list[Tensor] = []
    for buffer in buffers:
        for leaf, indices in _leaves(buffer):
            chosen.setdefault(id(leaf), (leaf, []))[1].append(indices)
        for attribute in getattr(buffer, "_data_attributes", {}).values():
            for leaf, indices in _leaves(attribute):
                if isinstance(leaf, list | tuple | Tensor) and len(indices) and isinstance(leaf[indices[0]], Tensor):
                    beside.extend(leaf[i] for i in indices)
    samples = total = 0
    for leaf, parts in chosen.values():
        indices = np.unique(np.concatenate(parts))
        samples += len(indices)
        total += len(indices) * (_bytes_per_sample(leaf, int(indices[0])) if len(indices) else 0)
    return samples, total, beside


def _leaves(data: Any, chosen: NDArray[np.int64] | None = None) -> Iterator[tuple[Any, NDArray[np.int64]]]:
    """Yield the data sets at the bottom of subsets, concatenations and wrappers, with the indices in use of each."""
    if is_a(data, "AvalancheDataset"):
        data = data._flat_data
    elif is_a(data, "DataAttribute"):
        data = data.data
    if is_a(data, "FlatData"):
        parts, indices = data._datasets, data._indices
    elif isinstance(data, Subset):
        parts, indices = [data.dataset], data.indices
    elif isinstance(data, ConcatDataset):
        parts, indices = data.datasets, None
    else:
        yield data, np.arange(len(data)) if chosen is None else chosen
        return
    own = None if indices is None else np.fromiter(indices, np.int64, len(indices))
    if chosen is not None:
        own = chosen if own is None else own[chosen]
    first = 0
    for part in parts:
        size = len(part)
        yield from _leaves(part, None if own is None else own[(own >= first) & (own < first + size)] - first)
        first += size


def _bytes_per_sample(leaf: Any, index: int) -> int:
    """Return what one stored sample takes: the data set's own word for it, else the size of the sample at `index`."""
    told = getattr(leaf, "bytes_per_sample", None)
    if isinstance(told, int):
        return told
    with kept_randomness():
        item = leaf[index]
    parts = list(item) if isinstance(item, tuple | list) else [item]
    images = sum(len(part.tobytes()) for part in parts if hasattr(part, "getbands"))
    return unique_bytes(tensors_in(parts)) + images + 8 * _count_integers(parts)
