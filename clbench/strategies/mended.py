"""Avalanche strategies with a fault that makes their numbers wrong, mended here.

SynapticIntelligence
    Paper    Zenke, Poole & Ganguli 2017, "Continual learning through synaptic intelligence", ICML, arXiv:1703.04200.
    Faults   of avalanche 0.6.0, plugins/synaptic_intelligence.py: line 215 keeps weights as
             `param.detach().cpu().flatten()`, which on the CPU is the live parameter itself, so the weights before and
             after a step, and the anchor, are all the same tensor: the penalty is always 0 and its strength has no
             effect. Line 227 stops with an AttributeError on the head of another task, which has no gradient.
    Mended   weights and gradients are copied; no gradient counts as zero.
    Left     the path integral uses the gradient of the loss with its penalty (the paper: without), and importances are
             cut off at 0.001.
    Stores   7 P values in its own layout: anchor, importance, weights before and after a step, gradient, trajectory
             and its sum over tasks.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from avalanche.training import SynapticIntelligence as _AvalancheSI
from avalanche.training.plugins import SynapticIntelligencePlugin as _Plugin
from torch import nn


class SynapticIntelligence(_AvalancheSI):
    """Avalanche's SI on copies of the weights instead of aliases."""

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Avalanche does, with its two faulty helpers replaced meanwhile."""
        with _copying():
            return super().train(*args, **kwargs)


@contextlib.contextmanager
def _copying() -> Iterator[None]:
    """Replace the plugin's static helpers; it calls them by the class's name, so no subclass can.

    It also takes NumPy's square of a tensor, which NumPy deprecates at every call: nothing a user could mend.
    """
    kept = _Plugin.__dict__["extract_weights"], _Plugin.__dict__["extract_grad"]
    _Plugin.extract_weights, _Plugin.extract_grad = staticmethod(_extract_weights), staticmethod(_extract_grad)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "__array_wrap__", DeprecationWarning)
            yield
    finally:
        _Plugin.extract_weights, _Plugin.extract_grad = kept


@torch.no_grad()
def _extract_weights(model: nn.Module, target: dict[str, Any], excluded_parameters: set[str]) -> None:
    for name, parameter in _Plugin.allowed_parameters(model, excluded_parameters):
        target[name].data = parameter.detach().cpu().flatten().clone()


@torch.no_grad()
def _extract_grad(model: nn.Module, target: dict[str, Any], excluded_parameters: set[str]) -> None:
    for name, parameter in _Plugin.allowed_parameters(model, excluded_parameters):
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        target[name].data = gradient.detach().cpu().flatten().clone()
