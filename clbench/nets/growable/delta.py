"""A frozen base and a live delta: what was learned stays, bit for bit, and only what is new is trained.

While a delta is open, the base has no gradient and no optimiser state; both exist for the new units and new inputs
alone. `fold` merges the delta into the base, in place where the weights lie in a reservation.

Masking gradients instead costs the gradient and the state of the whole weight, and freezes nothing under momentum or
weight decay: a masked gradient of zero still lets Adam's moments and the decay move the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from clbench.nets.growable.errors import GrowthError
from clbench.nets.growable.optim import Change, apply
from clbench.nets.growable.storage import reserved_empty


def described(layer: nn.Module) -> str:
    """Return a layer as errors name it: its class, its fan-in and its fan-out, or its channels."""
    kind = type(layer).__name__
    match layer:
        case nn.Linear():
            return f"{kind}({layer.in_features} -> {layer.out_features})"
        case nn.Conv2d():
            groups = f", groups={layer.groups}" if layer.groups > 1 else ""
            return f"{kind}({layer.in_channels} -> {layer.out_channels}{groups})"
        case nn.Module(num_features=int(width)):
            return f"{kind}({width})"
    return kind


class DeltaLayer(nn.Module):
    """What a growing layer has beside its weight and bias: a delta, and a state dict of any size.

    With i inputs and o outputs in the base, m new inputs and n new outputs, and `kernel` () for a linear map:

    - `delta_columns` (o, m, *kernel): what the new inputs mean to the old outputs,
    - `delta_rows` (n, i + m, *kernel): the new outputs, over all inputs,
    - `delta_bias` (n,): their bias, where the layer has one.

    Each is None where it would be empty, and where no delta is open.
    """

    headroom: float
    delta_rows: nn.Parameter | None
    delta_columns: nn.Parameter | None
    delta_bias: nn.Parameter | None
    _trained_before: tuple[bool, bool] | None
    """Whether weight and bias asked for gradients when the delta was opened; None while none is open."""

    def _begin(self, headroom: float) -> None:
        self.headroom = headroom
        self._trained_before = None
        for name in ("delta_rows", "delta_columns", "delta_bias"):
            self.register_parameter(name, None)

    def _count(self, fan_out: int, fan_in: int) -> None:
        """Write fan-out and fan-in, delta included, where the layer's class keeps them."""
        raise NotImplementedError

    def _refuse_delta(self) -> None:
        """Raise where this layer can have no delta."""

    @property
    def _base(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        return cast(nn.Parameter, self._parameters["weight"]), self._parameters["bias"]

    @property
    def has_delta(self) -> bool:
        """Whether the base is frozen and a delta, though maybe an empty one, is open."""
        return self._trained_before is not None

    @property
    def delta_sizes(self) -> tuple[int, int]:
        """New outputs and new inputs of the open delta; (0, 0) without one."""
        rows, columns = self.delta_rows, self.delta_columns
        new_out = 0 if rows is None else rows.shape[0]
        if columns is not None:
            return new_out, columns.shape[1]
        return new_out, 0 if rows is None else rows.shape[1] - self._base[0].shape[1]

    def delta_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the open delta: rows, columns, bias, those that there are."""
        found = (self.delta_rows, self.delta_columns, self.delta_bias)
        return [parameter for parameter in found if parameter is not None]

    def open_delta(
        self,
        new_out: int,
        new_in: int,
        *,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        bias: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> list[nn.Parameter]:
        """Freeze weight and bias, and add trainable units and inputs beside them.

        The layer's fan-in and fan-out count the delta from now on. What the layer answered before is what its first
        outputs answer now, as long as the columns, or the new inputs, are zero.

        Args:
            new_out: n, outputs to add.
            new_in: m, inputs to add; they come after the old ones.
            rows: (n, i + m, *kernel), start of the new outputs; by default drawn as PyTorch draws such a layer's,
                uniform within 1 / sqrt(fan_in).
            columns: (o, m, *kernel), start of the new inputs' weights into the old outputs; by default zeros.
            bias: (n,), start of the new outputs' bias; by default drawn like the rows.
            generator: of the draws; by default torch's own.

        Returns:
            The new parameters, to be given to an optimiser.

        Raises:
            GrowthError: a delta is open, a size is negative, a tensor has another shape, or the convolution is grouped.
        """
        name = described(self)
        if self.has_delta:
            raise GrowthError(f"{name}: a delta is open; fold it before opening the next")
        if min(new_out, new_in) < 0:
            raise GrowthError(f"{name}: cannot grow by a negative number, new_out={new_out}, new_in={new_in}")
        self._refuse_delta()
        weight, base_bias = self._base
        shapes = _delta_shapes(weight, base_bias is not None, new_out, new_in)
        given = {"rows": rows, "columns": columns, "bias": bias}
        for part, value in given.items():
            expected = shapes["delta_" + part]
            if value is not None and tuple(value.shape) != (expected or ()):
                wants = f"must be {expected}" if expected else "has no place here"
                raise GrowthError(f"{name}: {part} of shape {tuple(value.shape)} {wants}")
        fan_in = math.prod(weight.shape[1:]) + new_in * math.prod(weight.shape[2:])
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        for part, value in given.items():
            shape = shapes["delta_" + part]
            if shape is None:
                continue
            start = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
            if value is not None:
                start.copy_(value.detach())
            elif part != "columns":
                draw(start, bound, generator)
            self.register_parameter("delta_" + part, nn.Parameter(start))
        self._freeze(new_out, new_in)
        return self.delta_parameters()

    def _freeze(self, new_out: int, new_in: int) -> None:
        weight, bias = self._base
        self._trained_before = (weight.requires_grad, bias is not None and bias.requires_grad)
        for parameter in (weight, bias):
            if parameter is not None:
                parameter.requires_grad_(False)
                parameter.grad = None
        self._count(weight.shape[0] + new_out, weight.shape[1] + new_in)

    def _close(self) -> None:
        """Drop what is left of the delta and let the base train again, if it did before."""
        if self._trained_before is not None:
            for parameter, trained in zip(self._base, self._trained_before, strict=True):
                if parameter is not None:
                    parameter.requires_grad_(trained)
        self._trained_before = None
        for name in ("delta_rows", "delta_columns", "delta_bias"):
            self.register_parameter(name, None)
        self._count(*self._base[0].shape[:2])

    def prune_delta(
        self,
        keep_out: Tensor | None,
        keep_in: Tensor | None,
        *,
        optimizers: Optimizer | Iterable[Optimizer] = (),
    ) -> None:
        """Remove new outputs and new inputs that earned no place.

        Args:
            keep_out: which of the n new outputs stay: their numbers from 0, or a mask (n,); None keeps all.
            keep_in: which of the m new inputs stay, alike.
            optimizers: those that train the delta: what they remember of the kept weights stays theirs. Parameters of
                which nothing is left are forgotten.

        Raises:
            GrowthError: no delta is open, or a number is out of range.
        """
        self._require_delta()
        optimizers = listed(optimizers)
        name, (new_out, new_in) = described(self), self.delta_sizes
        out = chosen(keep_out, new_out, f"{name}: keep_out")
        new = chosen(keep_in, new_in, f"{name}: keep_in")
        rows, columns, bias = self.delta_rows, self.delta_columns, self.delta_bias
        base = self._base[0].shape[1]
        within = torch.cat((torch.arange(base), base + new))
        changes: list[Change] = []
        gone: list[nn.Parameter] = []
        cuts = ((rows, 0, out), (rows, 1, within), (bias, 0, out), (columns, 1, new))
        for parameter, dim, index in cuts:
            if parameter is None or any(parameter is other for other in gone):
                continue
            if not len(index):
                gone.append(parameter)
            elif len(index) < parameter.shape[dim]:
                changes.append(Change(parameter, dim, index=index, name=f"{name}: delta"))
        apply(changes, optimizers)
        dismiss(gone, optimizers)
        for part in ("delta_rows", "delta_columns", "delta_bias"):
            if any(self._parameters[part] is parameter for parameter in gone):
                self.register_parameter(part, None)
        weight = self._base[0]
        self._count(weight.shape[0] + len(out), base + len(new))

    def fold(self, *, optimizers: Optimizer | Iterable[Optimizer] = ()) -> None:
        """Merge the delta into weight and bias: the same function, up to rounding, and no delta left.

        Weight and bias stay the parameters they were and ask for gradients as they did before `open_delta`.

        Args:
            optimizers: those that train the delta or the base. What they remember of the delta is dropped with its
                parameters; what they remember of the base is kept, and is as for a new unit where the delta was.

        Raises:
            GrowthError: no delta is open, or an optimiser's state cannot grow; nothing has changed then.
        """
        self._require_delta()
        weight, bias = self._base
        optimizers = listed(optimizers)
        changes = [
            Change(parameter, dim, new=new.detach(), name=f"{described(self)}.{name}")
            for parameter, name, dim, new in (
                (weight, "weight", 1, self.delta_columns),
                (weight, "weight", 0, self.delta_rows),
                (bias, "bias", 0, self.delta_bias),
            )
            if parameter is not None and new is not None
        ]
        apply(changes, optimizers)
        dismiss(self.delta_parameters(), optimizers)
        self._close()

    def _require_delta(self) -> None:
        if not self.has_delta:
            raise GrowthError(f"{described(self)}: no delta is open")

    def _with_delta(self, x: Tensor, dim: int, product: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Tensor:
        """Return the outputs of base and delta; `dim` is that of the inputs in x, `product` the layer's linear map."""
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        assert weight is not None
        columns, rows = self.delta_columns, self.delta_rows
        if columns is None:
            # Where all outputs are old, new inputs have columns; where there are no columns, there are no new inputs.
            old = product(x, weight, bias)
        else:
            i = weight.shape[1]
            known, new = x.narrow(dim, 0, i), x.narrow(dim, i, x.shape[dim] - i)
            old = product(known, weight, bias) + product(new, columns, None)
        return old if rows is None else torch.cat((old, product(x, rows, self.delta_bias)), dim)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, *lists: list[str]
    ) -> None:
        self._take_sizes(state_dict, prefix, lists[-1])
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)

    def _take_sizes(self, state_dict: dict[str, Any], prefix: str, errors: list[str]) -> None:
        """Give base and delta the sizes of a state dict that is about to be loaded, where they can have them."""
        weight, bias = self._base
        stored = {name: state_dict.get(prefix + name) for name in ("weight", "delta_rows", "delta_columns")}
        new, rows, columns = (value if isinstance(value, Tensor) else None for value in stored.values())
        if new is None or new.dim() != weight.dim() or not self._can_have(new):
            return  # torch says what is missing or does not fit
        fan_out, fan_in = new.shape[:2]
        new_out = 0 if rows is None else rows.shape[0]
        new_in = columns.shape[1] if columns is not None else 0 if rows is None else rows.shape[1] - fan_in
        shapes = _delta_shapes(new, bias is not None, new_out, new_in)
        if any(
            value is not None and tuple(value.shape) != shapes[name]
            for name, value in (("delta_rows", rows), ("delta_columns", columns))
        ):
            errors.append(f"{prefix}delta_rows and {prefix}delta_columns do not fit {prefix}weight {tuple(new.shape)}")
            return
        if new.shape == weight.shape and (new_out, new_in) == self.delta_sizes:
            return
        self._close()
        for parameter, shape in ((weight, new.shape), (bias, new.shape[:1])):
            if parameter is not None and parameter.shape != shape:
                parameter.grad = None
                parameter.data = reserved_empty(
                    shape, parameter.dtype, device=parameter.device, headroom=self.headroom
                ).zero_()
        self._count(fan_out, fan_in)
        if new_out or new_in:
            for name, delta in shapes.items():
                if delta is not None:
                    empty = torch.zeros(delta, dtype=weight.dtype, device=weight.device)
                    self.register_parameter(name, nn.Parameter(empty))
            self._freeze(new_out, new_in)

    def _can_have(self, weight: Tensor) -> bool:
        """Whether the layer could have this weight, were it grown or cut."""
        return weight.shape[2:] == self._base[0].shape[2:]


def _delta_shapes(weight: Tensor, biased: bool, new_out: int, new_in: int) -> dict[str, tuple[int, ...] | None]:
    fan_out, fan_in, *kernel = weight.shape
    return {
        "delta_rows": (new_out, fan_in + new_in, *kernel) if new_out else None,
        "delta_columns": (fan_out, new_in, *kernel) if new_in else None,
        "delta_bias": (new_out,) if new_out and biased else None,
    }


def draw(target: Tensor, bound: float, generator: torch.Generator | None) -> None:
    """Fill a tensor with draws, uniform within `bound`; on the generator's device, if it has one of its own."""
    if generator is None or generator.device == target.device:
        target.uniform_(-bound, bound, generator=generator)
        return
    values = torch.empty(target.shape, dtype=target.dtype, device=generator.device)
    target.copy_(values.uniform_(-bound, bound, generator=generator))


def chosen(index: Tensor | Sequence[int] | None, size: int, what: str) -> Tensor:
    """Return the numbers that an index or mask names among `size` things, ascending and each once, (K,) on the CPU.

    Raises:
        GrowthError: a number is not within 0 .. size - 1, or a mask has another length.
    """
    if index is None:
        return torch.arange(size)
    index = torch.as_tensor(index).detach().cpu()
    if index.dtype == torch.bool:
        if index.shape != (size,):
            raise GrowthError(f"{what}: a mask of shape {tuple(index.shape)} for {size}")
        return index.nonzero().flatten()
    if index.is_floating_point() or index.is_complex():
        if index.numel():
            raise GrowthError(f"{what}: numbers of units are integers, not {index.dtype}")
        index = index.long()
    if index.dim() != 1:
        raise GrowthError(f"{what}: a one-dimensional index is needed, not one of shape {tuple(index.shape)}")
    outside = index[(index < 0) | (index >= size)]
    if len(outside):
        raise GrowthError(f"{what}: {int(outside[0])} is not within 0 .. {size - 1}")
    return torch.tensor(sorted(set(index.tolist())), dtype=torch.int64)


def listed(optimizers: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """Return one optimiser, or several, as a list."""
    return [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers)


def dismiss(parameters: Sequence[nn.Parameter], optimizers: Sequence[Optimizer]) -> None:
    """Take parameters that are no more out of optimisers: out of their groups, and what is remembered of them."""
    gone = {id(parameter) for parameter in parameters}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
        for parameter in parameters:
            optimizer.state.pop(parameter, None)
