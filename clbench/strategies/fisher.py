"""Squared gradients of the log-likelihood, sample by sample: what every estimator of the Fisher diagonal is made of.

Two ways to the same numbers (tests/test_ewc.py):

    any net     per-sample gradients by vmap: B x P numbers at once, and slow for convolutions
    our layers  from inputs and output gradients of the layers, one batched backward pass for a label

The net must be in evaluation mode, where a sample's gradient does not depend on the rest of the batch.

Letters: B samples, K labels asked for each of them, P parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from clbench.nets import TRUNKS, HeadedNet

_CHUNK_VALUES = 16_000_000
"""Per-sample gradients held at once, as numbers: 64 MB."""


def squared_gradients(net: HeadedNet, task: int, x: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Return sum_kn weights[k, n] * (d log p(labels[k, n] | x_n) / d theta)^2 for every parameter, in its shape.

    Args:
        net: in evaluation mode.
        task: whose head answers.
        x: inputs (B, ...).
        labels: (K, B) int64.
        weights: (K, B).
    """
    way = _of_layers if _is_ours(net) else _of_any_net
    return way(net, task, x, labels, weights)


def chunk_size(net: HeadedNet) -> int:
    """Return how many samples `squared_gradients` should be given at once, to stay within some 100 MB."""
    if _is_ours(net) and not any(isinstance(module, nn.Conv2d) for module in net.modules()):
        return 512
    n_parameters = sum(parameter.numel() for parameter in net.parameters())
    return max(1, min(32 if _is_ours(net) else 256, _CHUNK_VALUES // n_parameters))


def _is_ours(net: HeadedNet) -> bool:
    """Whether the parameters all belong to layers of the three known kinds, each of them asked at most once."""
    return type(net.trunk) in TRUNKS.values()


def _of_any_net(net: HeadedNet, task: int, x: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
    parameters = {name: parameter.detach() for name, parameter in net.named_parameters()}
    buffers = dict(net.named_buffers())

    def log_likelihood(values: dict[str, Tensor], sample: Tensor, chosen: Tensor) -> Tensor:
        logits = functional_call(net, {**values, **buffers}, (sample[None], task))
        return (chosen * torch.log_softmax(logits[0], dim=0)).sum()

    gradients = vmap(grad(log_likelihood), in_dims=(None, 0, 0))
    with torch.no_grad():
        n_classes = net(x[:1], task).shape[1]
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for label, weight in zip(labels, weights, strict=True):
        for name, value in gradients(parameters, x, F.one_hot(label, n_classes).to(x.dtype)).items():
            total[name] += torch.tensordot(weight, value.square(), dims=1)
    return total


def _of_layers(net: HeadedNet, task: int, x: Tensor, labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
    asked: dict[str, tuple[nn.Module, Tensor, Tensor]] = {}

    def remember(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            asked[name] = module, inputs[0].detach(), output

        return module.register_forward_hook(hook)

    kinds = (nn.Linear, nn.Conv2d, nn.BatchNorm2d)
    hooks = [remember(name, module) for name, module in net.named_modules() if isinstance(module, kinds)]
    log_p = torch.log_softmax(net(x, task), dim=1)
    for hook in hooks:
        hook.remove()
    total = {name: torch.zeros_like(parameter) for name, parameter in net.named_parameters()}
    outputs = [output for _, _, output in asked.values()]
    for label, weight in zip(labels, weights, strict=True):
        # Samples do not mix, so the gradient of the sum holds each sample's own in its row.
        deltas = torch.autograd.grad(log_p.gather(1, label[:, None]).sum(), outputs, retain_graph=True)
        for (name, (module, a, _)), delta in zip(asked.items(), deltas, strict=True):
            for key, value in _layer(module, a, delta, weight).items():
                if f"{name}.{key}" in total:
                    total[f"{name}.{key}"] += value
    return total


@torch.no_grad()
def _layer(module: nn.Module, a: Tensor, delta: Tensor, weight: Tensor) -> dict[str, Tensor]:
    """Return the weighted sum of squared per-sample gradients of one layer's weight and bias.

    Args:
        module: the layer.
        a: its input (B, ...).
        delta: gradient (B, ...) at its output.
        weight: (B,).
    """
    if isinstance(module, nn.Linear):
        # A sample's gradient is the outer product of delta and a, so its square is that of their squares.
        squared = weight[:, None] * delta.square()
        return {"weight": squared.T @ a.square(), "bias": squared.sum(dim=0)}
    if isinstance(module, nn.Conv2d):
        # The same at every position, summed over the positions before it is squared.
        assert not isinstance(module.padding, str)
        patches = F.unfold(a, module.kernel_size, module.dilation, module.padding, module.stride)
        each = torch.bmm(delta.flatten(2), patches.transpose(1, 2)).square()
        value = torch.tensordot(weight, each, dims=1).view_as(module.weight)
        return {"weight": value, "bias": weight @ delta.sum(dim=(2, 3)).square()}
    assert isinstance(module, nn.BatchNorm2d)
    assert module.running_mean is not None
    assert module.running_var is not None
    mean, variance = module.running_mean[:, None, None], module.running_var[:, None, None]
    normed = (a - mean) / (variance + module.eps).sqrt()
    scale = weight @ (delta * normed).sum(dim=(2, 3)).square()
    return {"weight": scale, "bias": weight @ delta.sum(dim=(2, 3)).square()}
