"""Batch Kalman Normalization as layers: drop-in for `nn.BatchNorm1d/2d/3d`, plus a prior handed in from outside."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.fx import Proxy
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from bkn_core.errors import StatisticsError
from bkn_core.norm.arguments import check_form, check_gain, check_values
from bkn_core.norm.fused import FilterSettings, images_per_group, kalman_normalize
from bkn_core.norm.handing import Letter, Mailboxes, is_recomputation
from bkn_core.norm.kalman import (
    Gaussian,
    Moments,
    average_over_groups,
    diagonal,
    guard,
    in_form_of,
    log_innovation,
    moments,
    normalize,
    rectangular_identity,
    spread_over_images,
    unbiased,
    update,
)
from bkn_core.norm.synchronized import joint_moments, spans_processes

Statistics = Literal["batch", "population"]
INNOVATION_MOMENTUM = 0.06
INNOVATION_SHARE = 1 / 3  # of the log ratio; the whole of it is worse (docs/method.md)
INNOVATION_LIMIT = 2.0
GUARD_LIMIT = 100.0


class BatchKalmanNorm(_BatchNorm):
    """Normalize by a Kalman blend of the observed statistics and of those that the preceding layers predict.

        µ̂ = µ' + q (x̄ - µ'),   v̂ = (1-q) v' + q S + q(1-q)(x̄ - µ')²,   y = γ (x - µ̂) / sqrt(v̂ + ε) + β

    In training every group of `statistics_batch_size` consecutive images has its own x̄ and S. The moving statistics
    average the posterior and normalize in evaluation. Without a prior the layer is batch normalization.

    Args:
        num_features: C.
        eps: ε.
        momentum: weight α of the newest posterior in the moving statistics; None is the cumulative average.
        affine: whether γ and β are learned.
        track_running_stats: whether moving statistics are kept.
        device, dtype: of the parameters.
        bias: whether an affine layer has β.
        statistics_batch_size: images per group; None is the whole batch, over all processes in place of SyncBatchNorm.
        gain: initial q, in (0, 1) where it is learned, in [0, 1] where it is fixed.
        learn_gain: train q (through a sigmoid).
        correction: learn a per-channel offset and log-scale of the prior: µ' + δ sqrt(v'), v' exp(ρ).
        innovation: multiply v' by a moving average of observed over predicted variance, to the power of 1/3.
        previous_features: channels C' of the preceding layers; gives the layer a learned transition A (C, C').
        covariance: "diagonal", or "full" to carry the full matrix from layer to layer.
        guarded: drop a prior whose variance is 100 times the observed one.

    Shape:
        x (N, C, *spatial) -> the same.

    Raises:
        ConversionError: for a gain or covariance outside what is allowed.
        StatisticsError: in the forward, where a group has one value per channel and the layer no prior.

    Reference:
        arXiv 1802.03133, eq. 7.
    """

    dimensions: tuple[int, ...] = ()
    fixed_gain: Tensor
    gain_factor: Tensor
    letter: Letter | None
    synchronized = False  # whether the group that is the whole batch spans `process_group`, as nn.SyncBatchNorm's does
    process_group: ProcessGroup | None = None
    innovation: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        statistics_batch_size: int | None = None,
        gain: float = 0.1,
        learn_gain: bool = True,
        correction: bool = False,
        innovation: bool = False,
        previous_features: int | None = None,
        covariance: Literal["diagonal", "full"] = "diagonal",
        guarded: bool = False,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)
        check_gain(gain, learn_gain)
        check_form(covariance, statistics_batch_size)
        self.statistics_batch_size = statistics_batch_size
        self.covariance, self.guarded = covariance, guarded
        self.statistics: tuple[Statistics, int | None] | None = None  # set for a while by `population.statistics`
        self.expects_prior, self.innovation_momentum = False, INNOVATION_MOMENTUM
        self.predecessor: tuple[_BatchNorm] | None = None  # an emptied layer of a kind of its own
        self.mailboxes, self.letter = Mailboxes(), None  # what the converted model hands to the layer
        self.on_posterior: Callable[[Gaussian, Tensor | None, int], None] | None = None  # see `population`
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        start = torch.tensor(gain, device=device, dtype=wide)
        zeros = start.new_zeros(num_features)
        self.gain_logit = nn.Parameter(torch.logit(start)) if learn_gain else None
        self.register_buffer("fixed_gain", None if learn_gain else start)
        self.register_buffer("gain_factor", torch.ones_like(start))
        self.prior_offset = nn.Parameter(zeros.clone()) if correction else None
        self.prior_log_scale = nn.Parameter(zeros.clone()) if correction else None
        self.register_buffer("innovation", zeros if innovation else None)
        identity = None if previous_features is None else rectangular_identity(num_features, previous_features, start)
        self.transition = None if identity is None else nn.Parameter(identity)

    @property
    def gain(self) -> Tensor:
        """The Kalman gain q of this moment, between 0 and 1, schedule included."""
        gain = self.fixed_gain if self.gain_logit is None else self.gain_logit.sigmoid()
        return gain * self.gain_factor

    @property
    def uses_batch_statistics(self) -> bool:
        """Whether the next forward observes its batch (and so wants its prior)."""
        if self.statistics is not None:
            return self.statistics[0] == "batch"
        return self.training or self.running_mean is None

    def refine(self, prior: Gaussian) -> Gaussian:
        """Apply the learned correction and the innovation: µ' + δ sqrt(v'), v' exp(ρ + innovation)."""
        mean, variance = prior
        innovation = self._innovation_then(variance) if is_recomputation() else self.innovation
        if self.prior_offset is not None and self.prior_log_scale is not None:
            mean = mean + self.prior_offset * (variance + self.eps).sqrt()
            scale = self.prior_log_scale if innovation is None else self.prior_log_scale + innovation
            return Gaussian(mean, variance * scale.exp())
        return Gaussian(mean, variance if innovation is None else variance * innovation.exp())

    @torch.no_grad()
    def _innovation_then(self, variance: Tensor) -> Tensor | None:
        """Return the innovation of the forward that is computed again: it has moved since, but the letter kept v'."""
        letter = self.mailboxes.own.letter or self.letter
        if self.innovation is None or letter is None or letter.prior is None:
            return self.innovation
        then = torch.log(letter.prior.variance / variance)
        then = then if self.prior_log_scale is None else then - self.prior_log_scale
        return torch.where(then.isfinite(), then, self.innovation)

    def forward(self, x: Tensor, prior: Gaussian | None = None) -> Tensor:
        """Normalize; `prior` overrides the one that a converted model hands to its layers."""
        if isinstance(x, Proxy):  # symbolic tracing takes the layer as one step, as it takes those of PyTorch
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
        return self.filter(x, prior)[0]

    def filter(self, x: Tensor, prior: Gaussian | None = None) -> tuple[Tensor, Gaussian | None]:
        """Normalize and return the posterior beside the result (None where population statistics were used)."""
        self._check_input_dim(x)
        if not self.uses_batch_statistics:
            return self._by_population(x), None
        prior = self._handed_prior() if prior is None else self.refine(prior)
        size = self.statistics_batch_size if self.statistics is None else self.statistics[1]
        if not self._spans_processes(size):
            check_values(x, size, has_prior=prior is not None)
        y, posterior, observed = self._by_batch(x, prior, size)
        is_tracked = self.training and self.statistics is None and not is_recomputation()
        if is_tracked or self.on_posterior is not None:
            self._track(x, prior, posterior, observed, size)
        self.mailboxes.own.publish(posterior)
        return y, posterior

    def _by_population(self, x: Tensor) -> Tensor:
        if self.running_mean is None:
            raise StatisticsError("this layer keeps no population statistics", "Use track_running_stats=True.")
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def _by_batch(self, x: Tensor, prior: Gaussian | None, size: int | None) -> tuple[Tensor, Gaussian, Moments]:
        weight = None if self.weight is None else self.weight.to(self.gain_factor.dtype)
        bias = None if self.bias is None else self.bias.to(self.gain_factor.dtype)
        is_joint, full = self._spans_processes(size), self.covariance == "full"
        if not (is_joint or full):
            limit = GUARD_LIMIT if self.guarded else math.inf
            return kalman_normalize(x, prior, self.gain, weight, bias, FilterSettings(self.eps, size, limit))
        if is_joint:
            observed = joint_moments(x, self.process_group, covariance=full)
        else:
            observed = moments(x, size, covariance=True)
        posterior = Gaussian(observed.mean, observed.variance)
        if prior is not None:
            gain = self._weight_of_observation(prior, observed)
            posterior = update(in_form_of(prior, observed), observed, gain)
        rows = Gaussian(*(spread_over_images(values, len(x), size) for values in diagonal(posterior)))
        return normalize(x, rows, weight, bias, self.eps), posterior, observed

    def _spans_processes(self, size: int | None) -> bool:
        is_asked = self.synchronized and size is None and self.training and self.statistics is None
        return is_asked and spans_processes(self.process_group)

    def hand(self, letter: Letter) -> None:
        """Take what the forward that begins on this thread hands to the layer."""
        self.letter = self.mailboxes.own.letter = letter
        self.mailboxes.own.is_open = True

    def _handed_prior(self) -> Gaussian | None:
        prior = self.mailboxes.own.prior(self.letter)
        if prior is not None or not self.expects_prior:
            return prior
        warnings.warn(
            f"a {type(self).__name__} was called outside the forward of its converted model and has no prior: "
            "it normalizes by its batch alone",
            stacklevel=4,
        )
        return None

    @torch.no_grad()
    def _track(
        self, x: Tensor, prior: Gaussian | None, posterior: Gaussian, observed: Moments, size: int | None
    ) -> None:
        is_even = size is None or len(x) % min(size, len(x)) == 0
        share = None if is_even else images_per_group(len(x), size, observed.mean) / len(x)
        mean, variance = unbiased(posterior, observed, self._weight_of_observation(prior, observed))
        if self.on_posterior is not None:
            return self.on_posterior(Gaussian(mean, variance), share, len(x))
        if self.innovation is not None and prior is not None:
            seen = diagonal(Gaussian(observed.mean, observed.variance))
            ratio = self.innovation + log_innovation(diagonal(prior), seen, share, self.eps)
            target = (INNOVATION_SHARE * ratio).clamp_(-INNOVATION_LIMIT, INNOVATION_LIMIT)
            self.innovation.lerp_(target.to(self.innovation.dtype), self.innovation_momentum)
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        kept = self.running_mean.dtype
        factor = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.to(kept)
        self.running_mean.lerp_(average_over_groups(mean, share).to(kept), factor)
        self.running_var.lerp_(average_over_groups(variance, share).to(kept), factor)

    def _weight_of_observation(self, prior: Gaussian | None, observed: Moments) -> Tensor:
        if prior is None:
            return torch.ones_like(self.gain_factor)
        if not self.guarded:
            return self.gain
        seen = diagonal(Gaussian(observed.mean, observed.variance)).variance
        return guard(diagonal(prior).variance, seen, self.gain, GUARD_LIMIT)

    def _check_input_dim(self, input: Tensor) -> None:
        if self.dimensions and input.dim() not in self.dimensions:
            wanted = " or ".join(f"{n}-D" for n in self.dimensions)
            raise ValueError(f"expected {wanted} input (got {input.dim()}-D input)")
        if input.shape[1] != self.num_features:
            raise ValueError(f"expected {self.num_features} channels (got input of shape {tuple(input.shape)})")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the letter of the last forward: it belongs to that forward's graph, not to the layer."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "letter": None, "on_posterior": None}

    def extra_repr(self) -> str:
        """Describe the layer as `nn.BatchNorm2d` does, with what is ours."""
        with torch.no_grad():
            gain = f"{float(self.gain):.3g}" if self.gain.device.type != "meta" else "?"
        prior = "prior" if self.expects_prior else "no prior"
        plain = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{plain}, statistics_batch_size={self.statistics_batch_size}, gain={gain}, {prior}"


class BatchKalmanNorm1d(BatchKalmanNorm, nn.BatchNorm1d):
    """`BatchKalmanNorm` over (N, C) or (N, C, L)."""

    dimensions = (2, 3)


class BatchKalmanNorm2d(BatchKalmanNorm, nn.BatchNorm2d):
    """`BatchKalmanNorm` over (N, C, H, W)."""

    dimensions = (4,)


class BatchKalmanNorm3d(BatchKalmanNorm, nn.BatchNorm3d):
    """`BatchKalmanNorm` over (N, C, D, H, W)."""

    dimensions = (5,)
