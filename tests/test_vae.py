"""The variational autoencoder: its loss by hand, by quadrature and against the likelihood that it bounds."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clbench.nets.vae import VAE, divergence, reconstruction


def small(pixels: int = 3, hidden: tuple[int, ...] = (4,), latent: int = 1, seed: int = 0) -> VAE:
    """Return a VAE of images (1, 1, pixels) in float64."""
    torch.manual_seed(seed)
    return VAE((1, 1, pixels), hidden, latent).double()


def normal(count: int = 64) -> tuple[Tensor, Tensor]:
    """Return points and weights of Gauss-Hermite quadrature: sum of weight * f(point) is E f(n), n ~ N(0, 1)."""
    points, weights = np.polynomial.hermite_e.hermegauss(count)
    return torch.from_numpy(points), torch.from_numpy(weights / math.sqrt(2 * math.pi))


# ------------------------------------------------------------------------------------------------------ the two terms


def test_the_divergence_of_the_prior_from_itself_is_zero() -> None:
    assert divergence(torch.zeros(2, 5), torch.zeros(2, 5)).tolist() == [0.0, 0.0]


def test_the_divergence_by_hand() -> None:
    """1/2 sum (m^2 + v - 1 - ln v): means 1, 2 of variance 1 give (1 + 4) / 2; variance 4 gives (4 - 1 - ln 4) / 2."""
    mean = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    log_variance = torch.tensor([[0.0, 0.0], [math.log(4), 0.0]], dtype=torch.float64)
    expected = torch.tensor([2.5, (3 - math.log(4)) / 2], dtype=torch.float64)
    torch.testing.assert_close(divergence(mean, log_variance), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(("mean", "variance"), [(0.3, 0.5), (-1.2, 2.0), (0.0, 0.1)])
def test_the_divergence_is_the_integral_that_it_stands_for(mean: float, variance: float) -> None:
    """E_q [log q(z) - log p(z)] with z = m + s n: log q - log p = (z^2 - n^2 - ln v) / 2, by quadrature over n."""
    points, weights = normal()
    z = mean + math.sqrt(variance) * points
    integral = (weights * (z.square() - points.square() - math.log(variance)) / 2).sum()
    found = divergence(torch.tensor([[mean]]).double(), torch.tensor([[math.log(variance)]]).double())
    torch.testing.assert_close(found[0], integral, rtol=1e-6, atol=1e-12)


def test_the_reconstruction_by_hand() -> None:
    """Summed over pixels, one number an image.

    Logit 0 is p = 1/2: ln 2 a pixel, whatever its value. Logit ln 3 is p = 3/4: -ln 3/4 for a pixel that is on,
    -(ln 3/4 + ln 1/4) / 2 for one half on.
    """
    logits = torch.tensor([[0.0, 0.0], [math.log(3), math.log(3)]], dtype=torch.float64)
    x = torch.tensor([[0.2, 1.0], [1.0, 0.5]], dtype=torch.float64)
    on = -math.log(0.75)
    expected = torch.tensor([2 * math.log(2), on - (math.log(0.75) + math.log(0.25)) / 2], dtype=torch.float64)
    torch.testing.assert_close(reconstruction(logits, x), expected, rtol=1e-14, atol=0)


# ------------------------------------------------------------------------------------------------------------ the loss


def test_the_loss_of_a_net_that_can_be_followed_by_hand() -> None:
    """One pixel x = 0.5, one unit a layer, noise 2.

    Encoder: relu(2 x + 1) = 2; mean 0.5 * 2 - 1 = 0; log-variance ln(4) / 2 * 2 = ln 4, so z = 0 + 2 * 2 = 4.
    Decoder: relu(z - 1) = 3, logit 0.7 * 3 - 2.1 = 0, p = 1/2.
    """
    net = small(pixels=1, hidden=(1,))

    def put(layer: nn.Module, weight: float, bias: float) -> None:
        linear = cast(nn.Linear, layer)
        nn.init.constant_(linear.weight, weight)
        nn.init.constant_(linear.bias, bias)

    put(net.encoder[0], 2, 1)
    put(net.mean, 0.5, -1)
    put(net.log_variance, math.log(4) / 2, 0)
    put(net.decoder[0], 1, -1)
    put(net.decoder[2], 0.7, -2.1)
    x, noise = torch.full((1, 1, 1, 1), 0.5).double(), torch.full((1, 1), 2.0).double()
    expected = math.log(2) + (4 - 1 - math.log(4)) / 2
    torch.testing.assert_close(net.loss(x, noise), torch.tensor([expected]).double(), rtol=1e-12, atol=0)


def test_the_loss_exceeds_the_surprise_by_the_distance_to_the_posterior() -> None:
    """E_noise loss(x) = -log p(x) + KL(q(z|x) || p(z|x)), Kingma & Welling eq. 1, everything by quadrature over z.

    For pixels that are on or off, p(x) = E_{z ~ N(0, 1)} p(x | z), and p(z | x) = p(z) p(x | z) / p(x).
    """
    net = small(seed=3)
    x = torch.tensor([[[[1.0, 0.0, 1.0]]]]).double()
    points, weights = normal()
    with torch.no_grad():
        mean, log_variance = (value[0, 0] for value in net.encode(x))
        given = -reconstruction(net.decode(points[:, None]), x.flatten(1).expand(len(points), -1))
        surprise = -torch.log((weights * given.exp()).sum())
        losses = net.loss(x.expand(len(points), -1, -1, -1), points[:, None])
        z = mean + (log_variance / 2).exp() * points
        at_z = -reconstruction(net.decode(z[:, None]), x.flatten(1).expand(len(points), -1))
        log_q, log_prior = -points.square() / 2 - log_variance / 2, -z.square() / 2
        gap = (weights * (log_q - (log_prior + at_z + surprise))).sum()
    torch.testing.assert_close((weights * losses).sum(), surprise + gap, rtol=1e-6, atol=0)
    assert gap > 0


def test_gradients_go_through_the_noise() -> None:
    """The derivative by every weight, the encoder's included, against central differences."""
    net = small(hidden=(4, 3), latent=2)
    x = torch.rand(5, 1, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    noise = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    torch.autograd.backward(net.loss(x, noise).mean())
    for parameter in net.parameters():
        assert parameter.grad is not None
        flat, slopes = parameter.data.view(-1), []
        for number in range(len(flat)):
            middle, sides = flat[number].item(), []
            for step in (1e-6, -1e-6):
                flat[number] = middle + step
                sides.append(net.loss(x, noise).mean().item())
            flat[number] = middle
            slopes.append((sides[0] - sides[1]) / 2e-6)
        torch.testing.assert_close(parameter.grad.view(-1), torch.tensor(slopes).double(), rtol=1e-5, atol=1e-8)


# ------------------------------------------------------------------------------------------------------------- the net


def test_the_decoder_is_the_encoder_in_a_mirror() -> None:
    """Images of 2 x 3 x 4 = 24 pixels, 7 and 5 units, 3 latent: 24-7-5, two maps 5-3, 3-5-7-24."""
    net = VAE((2, 3, 4), (7, 5), 3)
    shapes = [tuple(parameter.shape) for name, parameter in net.named_parameters() if name.endswith("weight")]
    assert shapes == [(7, 24), (5, 7), (3, 5), (3, 5), (5, 3), (7, 5), (24, 7)]
    assert net.sample(torch.zeros(6, 3)).shape == (6, 2, 3, 4)


def test_samples_are_the_expected_pixels() -> None:
    net = small(latent=2)
    noise = torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = net.sample(noise)
    torch.testing.assert_close(drawn.flatten(1), torch.sigmoid(net.decode(noise)).detach())
    assert not drawn.requires_grad


def test_a_net_without_hidden_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one hidden layer"):
        VAE((1, 2, 2), (), 2)


def test_it_learns_to_draw_what_it_was_shown() -> None:
    """Two images of 4 x 4, a cross and its negative, half of the time each.

    Four drawings in five are nearer than a tenth a pixel to one of them, and each has its share.
    """
    cross = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]]).float()
    images = torch.stack([cross, 1 - cross])[:, None]
    chance = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = VAE((1, 4, 4), (32,), 2)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(300):
        batch = images[torch.randint(2, (32,), generator=chance)]
        optimizer.zero_grad()
        torch.autograd.backward(net.loss(batch, torch.randn(32, 2, generator=chance)).mean())
        optimizer.step()
    drawn = net.sample(torch.randn(200, 2, generator=chance))
    distance = (drawn[:, None] - images[None]).abs().flatten(2).mean(2)
    assert float((distance.min(1).values < 0.1).float().mean()) > 0.8
    assert 60 < int((distance.argmin(1) == 0).sum()) < 140
