"""Layers whose weight and bias are functions of another layer's: they have no parameters but the functions' own.

A link asks its source for its weight in every forward pass. Hence gradients reach the source, and whatever is done to
it is seen: training, `.to()`, loading, `torch.func.functional_call`. The source is held without being registered, so
that a parameter has one name, one place in the state dict and one optimiser state: the source's.

A copy or a pickle of a net with links has links to its own sources, because both go by one memo. A copy of a link
*alone* takes a copy of the source along, which no optimiser sees and no `.to()` moves: `check_links` finds such.

Not supported: `nn.DataParallel`, whose replicas hold links to the original's layers; DistributedDataParallel has none.

Why not `torch.nn.utils.parametrize`: it keeps the tensor that the layer was born with as its original, which a function
that only looks at another layer never uses. It trains nothing, but is counted, decayed and saved.

Letters: B batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clbench.nets.heads import HeadedNet
from clbench.nets.shared.maps import Compose, Function, LowRank, Scale, as_module
from clbench.nets.shared.tasknet import TaskNet, Tensors, matrices, small


class Borrower(nn.Module):
    """A module that looks at the weight of another one, its source, which has its place elsewhere in the same net.

    Args:
        source: a module with a tensor `weight`.

    Raises:
        TypeError: it has none.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        if not isinstance(getattr(source, "weight", None), Tensor):
            raise TypeError(f"the source of a {type(self).__name__} has a weight; a {type(source).__name__} has none")
        object.__setattr__(self, "_source", source)  # not registered: it is registered elsewhere

    @property
    def source(self) -> nn.Module:
        """The layer whose weight is looked at."""
        return cast(nn.Module, self.__dict__["_source"])

    def borrowed(self) -> list[nn.Parameter]:
        """Return the parameters that are looked at here: the source's weight, or what a linked source looks at."""
        return self._looked_at("weight")

    def _looked_at(self, what: str) -> list[nn.Parameter]:
        if isinstance(self.source, Borrower):
            return self.source.borrowed()
        found = getattr(self.source, what, None)
        return [found] if isinstance(found, nn.Parameter) else []

    def extra_repr(self) -> str:
        """Return what is looked at, for `print(net)`."""
        return f"source={type(self.source).__name__} of weight {tuple(cast(Tensor, self.source.weight).shape)}"


class Link(Borrower):
    """Base of the linked layers.

    Args:
        source: a module with a tensor `weight` and perhaps a `bias`: a layer, or a link.
        fn: from the source's weight to this layer's. A module is taken as it is, not copied, so that two links can
            learn one function; it is moved, in place, to the source's device and dtype. Its parameters are learned.
        bias_fn: from the source's bias to this layer's, likewise. With None this layer has no bias, even where the
            source has one; `Same` takes that over. Not called where the source has none: then there is none here.
        shape: of the weight that `fn` is to yield.

    Raises:
        ValueError: the functions do not map the source's shapes to this layer's.
        TypeError: the source has no weight.
    """

    fn: nn.Module
    bias_fn: nn.Module | None

    def __init__(self, source: nn.Module, fn: Function, bias_fn: Function | None, shape: tuple[int, ...]) -> None:
        super().__init__(source)
        self.fn = as_module(fn)
        self.bias_fn = None if bias_fn is None else as_module(bias_fn)
        self._check("weight", source.weight, self.fn, shape)
        if self.bias_fn is not None and isinstance(bias := getattr(source, "bias", None), Tensor):
            self._check("bias", bias, self.bias_fn, shape[:1])

    def borrowed(self) -> list[nn.Parameter]:
        """Return the parameters that are looked at here, a bias among them where this layer's is a function of it."""
        found = [*super().borrowed(), *(self._looked_at("bias") if self.bias_fn is not None else ())]
        return list(dict.fromkeys(found))

    @property
    def weight(self) -> Tensor:
        """This layer's weight, computed now."""
        return cast(Tensor, self.fn(self.source.weight))

    @property
    def bias(self) -> Tensor | None:
        """This layer's bias, computed now; None where there is none."""
        if (fn := self.bias_fn) is None or (bias := getattr(self.source, "bias", None)) is None:
            return None
        return cast(Tensor, fn(bias))

    def _check(self, what: str, have: Any, fn: nn.Module, want: tuple[int, ...]) -> None:
        """Refuse a function that does not map the source's tensor to this layer's shape."""
        if nn.parameter.is_lazy(have):
            raise ValueError(f"{type(self).__name__}: the source's {what} is not there yet: run the source once before")
        said = f"{type(self).__name__}: the source's {what} is {tuple(have.shape)}, this layer's {want}"
        given = have.detach().clone()
        untouched = given._version
        try:
            with torch.no_grad():
                found = fn.to(device=have.device, dtype=have.dtype)(given)
        except (ValueError, RuntimeError, IndexError, TypeError) as error:
            raise ValueError(f"{said}, and {_called(fn)} does not map one to the other: {error}") from None
        if given._version != untouched:
            raise ValueError(f"{type(self).__name__}: {_called(fn)} changes the source's {what} in place")
        if not isinstance(found, Tensor) or found.dtype != have.dtype:
            kind = found.dtype if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"{said}, of {have.dtype}, and {_called(fn)} yields {kind}")
        if tuple(found.shape) != want:
            raise ValueError(f"{said}, and {_called(fn)} yields {tuple(found.shape)}")


class LinkedLinear(Link):
    """A linear layer whose weight and bias are functions of another layer's; `forward` (B, ..., in) -> (B, ..., out).

    Args:
        source: see `Link`; a convolution's weight will do for a function that maps it.
        fn: likewise.
        bias_fn: likewise.
        in_features: left out: the source's.
        out_features: likewise.

    Raises:
        ValueError: the functions do not map the source's shapes to this layer's.
        TypeError: the source has no weight.
    """

    def __init__(
        self,
        source: nn.Module,
        fn: Function,
        bias_fn: Function | None = None,
        *,
        in_features: int | None = None,
        out_features: int | None = None,
    ) -> None:
        self_in = _given(in_features, source, "in_features")
        self_out = _given(out_features, source, "out_features")
        super().__init__(source, fn, bias_fn, (self_out, self_in))
        self.in_features, self.out_features = self_in, self_out

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b."""
        return F.linear(x, self.weight, self.bias)


class LinkedConv2d(Link):
    """A convolution whose weight and bias are functions of another layer's; `forward` (B, in, H, W) -> (B, out, ..).

    Args:
        source: see `Link`.
        fn: likewise.
        bias_fn: likewise.
        in_channels: this and all that follow: what `torch.nn.Conv2d` calls so; left out: the source's.
        out_channels: see in_channels.
        kernel_size: see in_channels.
        stride: see in_channels.
        padding: see in_channels.
        dilation: see in_channels.
        groups: see in_channels.

    Raises:
        ValueError: the functions do not map the source's shapes to this layer's, or the source pads with something
            else than zeros.
        TypeError: the source has no weight.
    """

    def __init__(
        self,
        source: nn.Module,
        fn: Function,
        bias_fn: Function | None = None,
        *,
        in_channels: int | None = None,
        out_channels: int | None = None,
        kernel_size: int | tuple[int, int] | None = None,
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] | str | None = None,
        dilation: int | tuple[int, int] | None = None,
        groups: int | None = None,
    ) -> None:
        given_in = _given(in_channels, source, "in_channels")
        given_out = _given(out_channels, source, "out_channels")
        height, width = _pair(_given(kernel_size, source, "kernel_size"), "kernel_size")
        given_groups = _given(groups, source, "groups")
        if given_groups < 1 or given_in % given_groups or given_out % given_groups:
            raise ValueError(f"{given_groups} groups do not divide {given_in} and {given_out} channels")
        if (mode := getattr(source, "padding_mode", "zeros")) != "zeros":
            raise ValueError(f"a linked convolution pads with zeros; its source's padding_mode is {mode}")
        super().__init__(source, fn, bias_fn, (given_out, given_in // given_groups, height, width))
        self.in_channels, self.out_channels, self.kernel_size = given_in, given_out, (height, width)
        self.stride = _pair(_given(stride, source, "stride"), "stride")
        rim = _given(padding, source, "padding")
        self.padding: tuple[int, int] | str = rim if isinstance(rim, str) else _pair(rim, "padding")
        self.dilation = _pair(_given(dilation, source, "dilation"), "dilation")
        self.groups = given_groups

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of x with this layer's weight."""
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def links(root: nn.Module) -> dict[str, str]:
    """Return the name of every link in a net, with the name of its source.

    Raises:
        ValueError: a source is outside: the first such link is named, with its source.
    """
    names = {module: name for name, module in root.named_modules()}
    found = {}
    for name, module in root.named_modules():
        if not isinstance(module, Borrower):
            continue
        if module.source not in names:
            source = f"{type(module.source).__name__} of weight {tuple(cast(Tensor, module.source.weight).shape)}"
            place = f"link '{name}'" if name else "the link"
            raise ValueError(
                f"{place}: its source, a {source}, is outside the {type(root).__name__}; make both parts of one net, "
                "and copy or save the net, not the link alone"
            )
        found[name] = names[module.source]
    return found


def check_links(root: nn.Module) -> None:
    """Check that the source of every link is in the same net; to be called where such a net is taken in use.

    Raises:
        ValueError: a source is outside: the first such link is named, with its source.
    """
    links(root)


# -------------------------------------------------------------------------------------------------- a net for each task

FunctionName = Literal["scale", "low_rank"]


class LinkPart(nn.Module):
    """What a task has for itself: a function for each matrix of the trunk, and biases and normalisation of its own.

    Args:
        functions: name of the trunk's matrix -> function.
        own: everything else of the trunk.
    """

    def __init__(self, functions: Mapping[str, nn.Module], own: Tensors) -> None:
        super().__init__()
        self.functions = nn.ModuleDict({name.replace(".", "/"): function for name, function in functions.items()})
        self.own = own

    def named(self) -> dict[str, nn.Module]:
        """Return the functions by the trunk's names."""
        return {key.replace("/", "."): function for key, function in self.functions.items()}


class LinkedNet(TaskNet):
    """A trunk for each task, whose matrices are learned functions of one trunk's, the base.

    The trunk's own biases and normalisation are not trained: they are what those of a new task begin as (`settle`).
    A new task's functions are the identity.

    Args:
        net: gives trunk, the base, and head; any trunk.
        seed: of the functions' birth.
        functions: of each matrix, the first applied first: "scale" by a factor for each output unit, "low_rank".
        rank: of "low_rank".

    Raises:
        ValueError: a rank that a matrix of the trunk cannot have, or links in it whose source is outside.
    """

    def __init__(self, net: HeadedNet, seed: int, functions: Sequence[FunctionName], rank: int = 1) -> None:
        super().__init__(net, seed)
        check_links(self.trunk)
        self.function_names = tuple(functions)
        self.rank = rank
        for parameter in self.trunk.parameters():
            parameter.requires_grad_(parameter.ndim > 1)
        self.new_part(torch.Generator())  # a rank that does not fit is told now

    def new_part(self, generator: torch.Generator) -> LinkPart:
        """Return functions that are the identity, and copies of the trunk's biases and normalisation."""
        functions = {name: self._function(name, value, generator) for name, value in matrices(self.trunk).items()}
        return LinkPart(functions, small(self.trunk))

    def weights(self, part: nn.Module) -> dict[str, Tensor]:
        """Return the functions' values of the base, and what the task has of its own."""
        assert isinstance(part, LinkPart)
        linked = {name: function(self.trunk.get_parameter(name)) for name, function in part.named().items()}
        return linked | part.own.named()

    @torch.no_grad()
    def settle(self, task: int) -> None:
        """Make a task's biases and normalisation the trunk's own: what new tasks begin with."""
        part = self.part(task)
        assert isinstance(part, LinkPart)
        held = {**dict(self.trunk.named_parameters()), **dict(self.trunk.named_buffers())}
        for name, value in part.own.named().items():
            held[name].copy_(value)

    def _function(self, name: str, weight: Tensor, generator: torch.Generator) -> nn.Module:
        steps: list[nn.Module] = []
        for function in self.function_names:
            if function == "scale":
                steps.append(Scale(len(weight)))
                continue
            try:
                steps.append(LowRank(weight.shape, self.rank, generator))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return Compose(*steps).to(weight.dtype)


# -------------------------------------------------------------------------------------------------------------- helpers


def _given(value: Any, source: nn.Module, name: str) -> Any:
    """Return a setting of the layer, or the source's."""
    if value is not None:
        return value
    if not hasattr(source, name):
        raise ValueError(f"give {name}: the source, a {type(source).__name__}, has none")
    return getattr(source, name)


def _pair(value: int | tuple[int, int], name: str) -> tuple[int, int]:
    if not isinstance(value, int) and len(value) != 2:
        raise ValueError(f"a linked convolution has two dimensions; its {name} is {value}")
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _called(fn: nn.Module) -> str:
    """Return what a function is called in an error."""
    inner = getattr(fn, "function", fn)
    return getattr(inner, "__name__", type(inner).__name__)
