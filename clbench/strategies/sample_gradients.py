"""Gradients sample by sample, squared or without their sign, and summed: what importances of parameters are made of.

Two ways to the same numbers (tests/test_ewc.py, tests/test_mas.py):

    any net     per-sample gradients by vmap: B x P numbers at once, and slow for convolutions
    our layers  from inputs and output gradients of the layers, one batched backward pass for a scalar

The net must be in evaluation mode, where a sample's gradient does not depend on the rest of the batch.

Letters: B samples, K scalars asked of each of them, C classes, P parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from clbench.nets import TRUNKS, HeadedNet

_CHUNK_VALUES = 16_000_000
"""Per-sample gradients held at once, as numbers: 64 MB."""

Scalars = Callable[[Tensor], Tensor]
"""From a batch's logits (B, C) to K scalars of each sample, (K, B), which depend on its own logits alone."""
Size = Callable[[Tensor], Tensor]
"""`torch.square` or `torch.abs`: of a product, it is the product of the factors' own."""


def squared_gradients(net: HeadedNet, task: int, x: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Return sum_kn weights[k, n] * (d log p(labels[k, n] | x_n) / d theta)^2 for every parameter, in its shape.

    Args:
        net: in evaluation mode.
        task: whose head answers.
        x: inputs (B, ...).
        labels: (K, B) int64.
        weights: (K, B).
    """

    def log_likelihoods(logits: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits, dim=1)
        return torch.stack([log_p.gather(1, label[:, None])[:, 0] for label in labels])

    return summed_gradients(net, task, x, log_likelihoods, weights, torch.square)


def summed_gradients(
    net: HeadedNet, task: int, x: Tensor, scalars: Scalars, weights: Tensor, size: Size
) -> dict[str, Tensor]:
    """Return sum_kn weights[k, n] * size(d s_k(x_n) / d theta) for every parameter, in its shape.

    Args:
        net: in evaluation mode.
        task: whose head answers.
        x: inputs (B, ...).
        scalars: s_1 to s_K.
        weights: (K, B).
        size: what is summed of a gradient.
    """
    way = _of_layers if _is_ours(net) else _of_any_net
    return way(net, task, x, scalars, weights, size)


def chunk_size(net: HeadedNet) -> int:
    """Return how many samples the functions above should be given at once, to stay within some 100 MB."""
    if _is_ours(net) and not any(isinstance(module, nn.Conv2d) for module in net.modules()):
        return 512
    n_parameters = sum(parameter.numel() for parameter in net.parameters())
    return max(1, min(32 if _is_ours(net) else 256, _CHUNK_VALUES // n_parameters))


def _is_ours(net: HeadedNet) -> bool:
    """Whether the parameters all belong to layers of the known kinds, each of them asked at most once."""
    return type(net.trunk) in TRUNKS.values()


def _of_any_net(
    net: HeadedNet, task: int, x: Tensor, scalars: Scalars, weights: Tensor, size: Size
) -> dict[str, Tensor]:
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}
    buffers = dict(net.named_buffers())

    def pulled_back(values: dict[str, Tensor], sample: Tensor, at_logits: Tensor) -> Tensor:
        logits: Tensor = functional_call(net, {**values, **buffers}, (sample[None], task))[0]
        return (logits * at_logits).sum()

    gradients = vmap(grad(pulled_back), in_dims=(None, 0, 0))
    logits = net(x, task).detach().requires_grad_()
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for scalar, weight in zip(scalars(logits), weights, strict=True):
        (at_logits,) = torch.autograd.grad(scalar.sum(), logits, retain_graph=True)
        for name, value in gradients(parameters, x, at_logits).items():
            total[name] += torch.tensordot(weight, size(value), dims=1)
    return total


def _of_layers(
    net: HeadedNet, task: int, x: Tensor, scalars: Scalars, weights: Tensor, size: Size
) -> dict[str, Tensor]:
    asked: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}

    def remember(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            asked[name] = module, inputs[0].detach(), output

        return module.register_forward_hook(hook)

    kinds = (nn.Linear, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d)
    hooks = [remember(name, module) for name, module in net.named_modules() if isinstance(module, kinds)]
    asked_for = scalars(net(x, task))
    for hook in hooks:
        hook.remove()
    total = {name: torch.zeros_like(parameter) for name, parameter in net.named_parameters()}
    outputs = [output for _, _, output in asked.values()]
    for scalar, weight in zip(asked_for, weights, strict=True):
        # Samples do not mix, so the gradient of the sum holds each sample's own in its row.
        deltas = torch.autograd.grad(scalar.sum(), outputs, retain_graph=True)
        for (name, (module, a, _)), delta in zip(asked.items(), deltas, strict=True):
            for key, value in _layer(module, a, delta, weight, size).items():
                if f"{name}.{key}" in total:
                    total[f"{name}.{key}"] += value
    return total


@torch.no_grad()
def _layer(module: nn.Module, a: Tensor, delta: Tensor, weight: Tensor, size: Size) -> dict[str, Tensor]:
    """Return the weighted sum over samples of the size of their gradients of one layer's weight and bias.

    Args:
        module: the layer.
        a: its input (B, ...).
        delta: gradient (B, ...) at its output.
        weight: (B,).
        size: what is summed of a gradient.
    """
    if isinstance(module, nn.Linear):
        # A sample's gradient is the outer product of delta and a, so its size is that of their sizes.
        sized = weight[:, None] * size(delta)
        return {"weight": sized.T @ size(a), "bias": sized.sum(dim=0)}
    if isinstance(module, nn.Conv2d):
        # The same at every position, summed over the positions before it is sized.
        assert not isinstance(module.padding, str)
        patches = F.unfold(a, module.kernel_size, module.dilation, module.padding, module.stride)
        each = size(torch.bmm(delta.flatten(2), patches.transpose(1, 2)))
        value = torch.tensordot(weight, each, dims=1).view_as(module.weight)
        return {"weight": value, "bias": weight @ size(delta.sum(dim=(2, 3)))}
    assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
    assert module.running_mean is not None
    assert module.running_var is not None
    shape = (-1, *(1,) * (a.ndim - 2))
    normed = (a - module.running_mean.view(shape)) / (module.running_var + module.eps).sqrt().view(shape)
    at = tuple(range(2, a.ndim))
    summed = [value.sum(dim=at) if at else value for value in (delta * normed, delta)]
    return {"weight": weight @ size(summed[0]), "bias": weight @ size(summed[1])}
