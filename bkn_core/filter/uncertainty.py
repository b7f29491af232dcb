"""How uncertain a prior is and how noisy an observation: the Kalman gain, computed instead of set.

A layer's prior is off by an error that the drift of the weights keeps alive, and what a group shows is off by the
chance of its few images. A forward of G groups shows each channel two residuals, of the mean and of the variance,

    e_µ = m / sqrt(N + ε),  m = mean_G(x̄ - µ') ;    e_v = (N' + ε) / (v' + ε) - 1 ;    N = mean_G( S + (x̄ - µ')² )

with N' = N - m² + ((1-K_µ) m)² what is left of N when the mean has been mended. Their mean squares over the channels,
V, hold the variance P of the prior's error and the part R / G of the noise R of one group:

    G > 1:  R is the variance between the groups of the forward,  P = V - R / G
    G = 1:  residuals of one forward and the next share the error and not the noise:  P = mean_C(e e_before) + K V

The first forward is believed, K = 1. It shows how far the prior was off before there was an inflation, so the gain
begins high and falls with the forwards that follow.

P and R are running means over some forwards, and

    q = P⁺ / (P⁺ + R⁺)

is the Kalman gain of a group, 0 where the prior is exact and 1 where an observation is. The layer blends by the larger
of its two gains. Its memory of the prior's error, the *mean inflation* in standard deviations and the *inflation* of
the variance, moves by

    K = max( q P², 1 - 0.9^(n / 128), 1/100 )

for n images: fast while the prior is off by about what it predicts, else as a running mean over 10 gradient batches of
128 images or 100 forwards, whichever is less. Following faster is possible and worse: what a group shows is then in its
own prior, with the noise that breaks batch normalization.

Reference:
    R. K. Mehra, "On the identification of variances and adaptive Kalman filtering", IEEE TAC 15(2), 1970, for P and R
    from the correlation of innovations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bkn_core.filter.kalman import Gaussian, average_over_groups

FIELDS = 5  # forwards, P of mean and variance, R of mean and variance
MEMORY = 0.05  # the weight of the newest forward in P and R
SLOWEST_STEP, SLOWEST_IMAGES = 0.01, 0.1  # the least K of a forward, and of 128 images
LARGEST_RATIO = 2980.958  # e⁸, of an observed to a predicted variance in one forward
LARGEST_RESIDUAL = 1.0  # an outlier beyond it would be remembered too long
FIRST_NOISE = 0.1  # of a forward of one group, before there is another to compare it with
FIRST_GAIN = 0.1  # before the first forward
IMAGES = 128


class Uncertainty(NamedTuple):
    """What a layer knows of its prior's error P and of an observation's noise R, for mean and variance.

    Shape:
        forwards (...), error (..., 2), noise (..., 2).
    """

    forwards: Tensor
    error: Tensor
    noise: Tensor

    @classmethod
    def of(cls, state: Tensor) -> Uncertainty:
        """Take a layer's buffer (..., 5) apart."""
        return cls(state[..., 0], state[..., 1:3], state[..., 3:5])

    @property
    def state(self) -> Tensor:
        """The buffer (..., 5)."""
        return torch.cat((self.forwards.unsqueeze(-1), self.error, self.noise), -1)

    @property
    def gains(self) -> Tensor:
        """Return q of mean and variance (..., 2)."""
        error, noise = self.error.clamp_min(0), self.noise.clamp_min(0)
        gain = error / (error + noise).clamp_min(1e-30)
        return torch.where(self.forwards.unsqueeze(-1) > 0, gain, torch.full_like(gain, FIRST_GAIN))

    def speeds(self, images: int | Tensor) -> Tensor:
        """Return K of mean and variance (..., 2), for a forward of so many images."""
        by_images = 1 - (1 - SLOWEST_IMAGES) ** (images / IMAGES)
        by_age = 1 / self.forwards.clamp_min(1).unsqueeze(-1)
        slowest = by_age.clamp_min(SLOWEST_STEP)
        slowest = torch.maximum(slowest, by_images) if isinstance(by_images, Tensor) else slowest.clamp_min(by_images)
        lost = torch.where(self.forwards.unsqueeze(-1) > 0, self.gains * self.error.clamp(0, 1).square(), 1)
        return torch.maximum(lost, slowest)

    def after(self, error: Tensor, noise: Tensor) -> Uncertainty:
        """Return what is known after one more forward that showed P and R; what is not finite is not remembered."""
        weight = (1 / (self.forwards + 1)).clamp_min(MEMORY).unsqueeze(-1)
        is_sound = (error.isfinite() & noise.isfinite()).all(-1)
        moved = Uncertainty(self.forwards + 1, self.error.lerp(error, weight), self.noise.lerp(noise, weight))
        wide = is_sound.unsqueeze(-1)
        return Uncertainty(
            torch.where(is_sound, moved.forwards, self.forwards),
            torch.where(wide, moved.error, self.error),
            torch.where(wide, moved.noise, self.noise),
        )


class Residuals(NamedTuple):
    """What one forward shows of a prior.

    Shape:
        shift (C,) is m; values (2, C) are e_µ and e_v; noise (2, C) is R of each channel, 0 where G = 1.
    """

    shift: Tensor
    values: Tensor
    noise: Tensor


def residuals(prior: Gaussian, observed: Gaussian, share: Tensor | None, speed: Tensor, eps: float) -> Residuals:
    """Return the residuals of a forward.

    Args:
        prior: µ', v', for all groups or for each.
        observed: x̄, S.
        share: the part of the images that each group holds; None where all are equal.
        speed: K_µ of each channel.
        eps: ε.

    Shape:
        prior (C,) or (G, C), observed (G, C), share (G, 1), speed (C,).
    """
    difference = observed.mean - prior.mean
    shift = average_over_groups(difference, share)
    spreads = torch.addcmul(observed.variance, difference, difference)
    spread = average_over_groups(spreads, share)
    rest = shift * (1 - speed)
    mended = (spread - shift * shift + rest * rest).clamp_min(0)
    predicted = prior.variance if prior.variance.dim() == 1 else average_over_groups(prior.variance, share)
    ratio = ((mended + eps) / (predicted + eps)).clamp(1 / LARGEST_RATIO, LARGEST_RATIO)
    values = torch.stack((shift / (spread + eps).sqrt(), ratio - 1))
    values = torch.where(spread.isfinite(), values, torch.full_like(values, torch.nan))
    groups = difference.shape[0]
    if groups == 1:
        return Residuals(shift, values, torch.zeros_like(values))
    apart = difference - difference.mean(0)
    around = torch.addcmul(observed.variance, apart, apart)
    between = torch.stack((apart, around - around.mean(0))).square().sum(1) / (groups - 1)
    scale = mended + eps
    return Residuals(shift, values, between / torch.stack((scale, scale * scale)))


def bounded(values: Tensor) -> Tensor:
    """Return residuals as P is measured by them, and as the next forward remembers them."""
    return values.clamp(-LARGEST_RESIDUAL, LARGEST_RESIDUAL)


def error_and_noise(means: Tensor, groups: int, speed: Tensor, *, is_first: Tensor) -> tuple[Tensor, Tensor]:
    """Return P and R of one forward.

    Args:
        means: over the channels of a layer: of e², of e e_before, of R.
        groups: G.
        speed: K of mean and variance.
        is_first: whether there was no forward before.

    Shape:
        means (3, ..., 2), speed (..., 2), is_first (...) -> (..., 2) each.
    """
    square, product, noise = means
    if groups > 1:
        return square - noise / groups, noise
    error = product + speed * square
    first = torch.full_like(error, FIRST_NOISE)
    is_known = ~is_first.unsqueeze(-1)
    return torch.where(is_known, error, first), torch.where(is_known, square - error, first)
