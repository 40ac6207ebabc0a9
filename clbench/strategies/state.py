"""A strategy's stored state as what a checkpoint can hold: tensors and plain values; nets by their own state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

NET = "__net__"


def packed_net(net: nn.Module) -> dict[str, Any]:
    """Return a net's state, which of its parameters are frozen, and its mode."""
    frozen = [name for name, parameter in net.named_parameters() if not parameter.requires_grad]
    return {NET: dict(net.state_dict()), "frozen": frozen, "training": net.training}


def load_net(net: nn.Module, packed: Mapping[str, Any]) -> None:
    """Take up what `packed_net` returned."""
    net.load_state_dict(packed[NET])
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in packed["frozen"])
    net.train(packed["training"])


def pack(value: Any) -> Any:
    """Turn stored state into what `torch.load(weights_only=True)` reads back."""
    if isinstance(value, nn.Module):
        return packed_net(value)
    if hasattr(value, "state_dict"):
        return value.state_dict()
    if isinstance(value, Mapping):
        return {key: pack(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [pack(item) for item in value]
    return value


def unpack(value: Any, new_net: Callable[[], nn.Module], device: torch.device) -> Any:
    """Return what `pack` was given, on `device`; tuples come back as lists, nets start as `new_net` makes them."""
    if isinstance(value, Mapping):
        if NET in value:
            net = new_net().to(device)
            load_net(net, value)
            return net
        return {key: unpack(item, new_net, device) for key, item in value.items()}
    if isinstance(value, list):
        return [unpack(item, new_net, device) for item in value]
    return value.to(device) if isinstance(value, Tensor) else value
