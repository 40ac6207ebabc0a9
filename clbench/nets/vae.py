"""A variational autoencoder: a net that learns to draw samples like those it was shown.

Source     Kingma & Welling 2014, "Auto-encoding variational Bayes", ICLR, arXiv:1312.6114: sections 2 and 3, and
           appendix B for the divergence.
Model      p(z) = N(0, I),   p(x | z) = product over pixels of Bernoulli(sigmoid(decoder(z))),
           q(z | x) = N(mean(x), diag exp(log_variance(x)));   trained to minimise, per sample and in nats,
           -ELBO(x) = -log p(x | z) + KL(q(z | x) || p(z)),   z = mean + exp(log_variance / 2) * noise.
           A pixel is a grey value in [0, 1], taken for the probability that it is on, as is usual on MNIST; then -ELBO
           bounds no likelihood, but its minimum is where it was.

Letters: B batch, C channels, H x W pixels, Z latent units.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class VAE(nn.Module):
    """Fully connected encoder and decoder, the one the other's mirror image. Initialised as PyTorch does.

    Args:
        input_shape: channels, height and width of one image.
        hidden: width of each hidden layer of the encoder, ReLU after each; the decoder has them in reverse.
        latent: Z.

    Raises:
        ValueError: `hidden` is empty.
    """

    def __init__(self, input_shape: Sequence[int], hidden: Sequence[int], latent: int) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("a VAE needs at least one hidden layer")
        self.input_shape = tuple(int(size) for size in input_shape)
        self.latent = latent
        pixels = prod(self.input_shape)
        self.encoder = _layers([pixels, *hidden])
        self.mean = nn.Linear(hidden[-1], latent)
        self.log_variance = nn.Linear(hidden[-1], latent)
        self.decoder = nn.Sequential(*_layers([latent, *reversed(hidden)]), nn.Linear(hidden[0], pixels))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of q(z | x), (B, Z) each, for images (B, C, H, W)."""
        features = self.encoder(x.flatten(1))
        return self.mean(features), self.log_variance(features)

    def decode(self, z: Tensor) -> Tensor:
        """Return logits of the pixels, (B, C * H * W), for latent values (B, Z)."""
        logits: Tensor = self.decoder(z)
        return logits

    def loss(self, x: Tensor, noise: Tensor) -> Tensor:
        """Return -ELBO of each image, (B,), in nats.

        Args:
            x: (B, C, H, W) in [0, 1].
            noise: (B, Z), drawn from N(0, I).
        """
        mean, log_variance = self.encode(x)
        logits = self.decode(mean + (log_variance / 2).exp() * noise)
        return reconstruction(logits, x.flatten(1)) + divergence(mean, log_variance)

    @torch.no_grad()
    def sample(self, noise: Tensor) -> Tensor:
        """Return images (B, C, H, W), the expected pixels in [0, 1], for `noise` (B, Z) drawn from N(0, I)."""
        return torch.sigmoid(self.decode(noise)).view(len(noise), *self.input_shape)


def reconstruction(logits: Tensor, x: Tensor) -> Tensor:
    """Return -log p(x | z) = -sum over pixels of x log p + (1 - x) log(1 - p), p = sigmoid(logits): (B, P) to (B,)."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(N(mean, exp(log_variance)) || N(0, I)), (B, Z) to (B,): appendix B of the paper.

    1/2 sum of mean^2 + variance - 1 - log variance: 0 where q is the prior, positive elsewhere.
    """
    return (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2


def _layers(widths: Sequence[int]) -> nn.Sequential:
    return nn.Sequential(*(layer for pair in pairwise(widths) for layer in (nn.Linear(*pair), nn.ReLU())))
