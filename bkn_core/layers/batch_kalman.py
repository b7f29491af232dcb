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
from bkn_core.filter import kalman
from bkn_core.filter.inflation_gradient import Sensitivity
from bkn_core.filter.kalman import Gaussian, Groups, rectangular_identity
from bkn_core.filter.state import FilterSettings, FilterStatistics, LayerState, Observation
from bkn_core.filter.uncertainty import FIELDS, FIRST_GAIN
from bkn_core.layers.arguments import check_form, check_gain, check_shape, check_values
from bkn_core.layers.forward import OUTSIDE, ContextSlots, Forward, LayerContext, is_recomputation
from bkn_core.layers.loading import complete_
from bkn_core.ops.forms import normalize_batch
from bkn_core.ops.normalize import Filtered
from bkn_core.ops.synchronized import spans_processes
from bkn_core.ops.track import track

Statistics = Literal["batch", "population"]
GUARD_LIMIT = 100.0
_INFLATED = ("innovation", "mean_innovation", "sensitivity", "residual", "gathered_sensitivity", "uncertainty")


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
        gain: initial q, in (0, 1) where it is learned, in [0, 1] where it is fixed; "auto" is the Kalman gain, computed
            as training goes from the prior's error and the observation's noise (`uncertainty.py`), with an innovation.
        learn_gain: train q (through a sigmoid); an "auto" gain is not trained.
        correction: learn a per-channel offset and log-scale of the prior: µ' + δ sqrt(v'), v' exp(ρ).
        innovation: inflate the prior: move µ' and multiply v' by its running error, and let the gradient follow both
            (`track.py`, `inflation_gradient.py`).
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
    innovation: Tensor | None  # of the variance, as a logarithm
    mean_innovation: Tensor | None  # in standard deviations of the prior
    residual: Tensor | None  # of the last forward, see `uncertainty.py`
    uncertainty: Tensor | None
    sensitivity: Tensor | None  # see `inflation_gradient.py`
    gathered_sensitivity: Tensor | None
    synchronized = False  # whether the group that is the whole batch spans `process_group`, as nn.SyncBatchNorm's does
    process_group: ProcessGroup | None = None

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
        gain: float | Literal["auto"] = 0.1,
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
        self.computes_gain = gain == "auto" and innovation
        learn_gain, initial = learn_gain and not self.computes_gain, FIRST_GAIN if gain == "auto" else gain
        check_gain(initial, learn_gain)
        check_form(covariance, statistics_batch_size)
        self.statistics_batch_size = statistics_batch_size
        self.covariance, self.guarded = covariance, guarded
        self.statistics: tuple[Statistics, int | None] | None = None  # set for a while by `population.statistics`
        self.expects_prior = False
        self.predecessor: tuple[_BatchNorm] | None = None  # an emptied layer of a kind of its own
        self.slots, self.past = ContextSlots(), list[tuple[Tensor, Tensor]]()
        self.context: LayerContext | None = None  # the newest of all threads
        self.on_posterior: Callable[[FilterStatistics, Tensor | None, int], None] | None = None  # see `population`
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        start = torch.tensor(initial, device=device, dtype=wide)
        zeros = start.new_zeros(num_features)
        self.gain_logit = nn.Parameter(torch.logit(start)) if learn_gain else None
        self.register_buffer("fixed_gain", None if learn_gain else start)
        self.register_buffer("gain_factor", torch.ones_like(start))
        self.prior_offset = nn.Parameter(zeros.clone()) if correction else None
        self.prior_log_scale = nn.Parameter(zeros.clone()) if correction else None
        self._register_records(zeros, is_inflated=innovation)
        identity = None if previous_features is None else rectangular_identity(num_features, previous_features, start)
        self.transition = None if identity is None else nn.Parameter(identity)

    def _register_records(self, zeros: Tensor, *, is_inflated: bool) -> None:
        """Make the buffers of `LayerState` that an inflation needs, None without one."""
        c = len(zeros)
        shapes = {"innovation": (c,), "mean_innovation": (c,), "sensitivity": (2, c), "gathered_sensitivity": (3, c)}
        for name, shape in (shapes | {"residual": (2, c), "uncertainty": (FIELDS,)}).items():
            self.register_buffer(name, zeros.new_zeros(shape) if is_inflated else None)

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

    @property
    def present_inflation(self) -> Tensor | None:
        """The inflation of the forward that runs, or that is computed again and has moved it since."""
        return self.past[0][0] if self.past and is_recomputation() else self.innovation

    @property
    def present_mean_inflation(self) -> Tensor | None:
        """The inflation of the mean, likewise."""
        return self.past[0][1] if self.past and is_recomputation() else self.mean_innovation

    @property
    def state(self) -> LayerState:
        """What the layer remembers of the forwards of a training."""
        own = self._buffers  # past `nn.Module.__getattr__`, which is slow
        gain = own["fixed_gain"] if self.computes_gain else None
        running = own["running_mean"], own["running_var"], own["num_batches_tracked"]
        return LayerState(*map(own.get, _INFLATED), gain, *running, self.past)  # type: ignore[arg-type, call-arg]

    @property
    def settings(self) -> FilterSettings:
        """What the filter needs to know beside tensors."""
        size = self.statistics_batch_size if self.statistics is None else self.statistics[1]
        limit = GUARD_LIMIT if self.guarded else math.inf
        return FilterSettings(self.eps, size, limit, self.momentum, self.covariance == "full")

    def refine(self, prior: Gaussian) -> Gaussian:
        """Apply correction and inflations: µ' + (δ + mean inflation) sqrt(v' + ε), v' exp(ρ + inflation)."""
        inflations = self.present_mean_inflation, self.present_inflation
        return kalman.refine(prior, (self.prior_offset, self.prior_log_scale), inflations, self.eps)

    def forward(self, x: Tensor, prior: Gaussian | None = None) -> Tensor:
        """Normalize; `prior` overrides the one that a converted model hands to its layers."""
        if isinstance(x, Proxy):  # symbolic tracing takes the layer as one step, as it takes those of PyTorch
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), (x,), {})
        self._check_input_dim(x)
        return self._filtered(x, prior).y if self.uses_batch_statistics else self._by_population(x)

    def filter(self, x: Tensor, prior: Gaussian | None = None) -> tuple[Tensor, Gaussian | None]:
        """Normalize and return the posterior beside the result (None where population statistics were used)."""
        self._check_input_dim(x)
        if not self.uses_batch_statistics:
            return self._by_population(x), None
        filtered = self._filtered(x, prior)
        return filtered.y, filtered.posterior

    def _filtered(self, x: Tensor, prior: Gaussian | None) -> Filtered:
        forward, name = self.slots.own.current(self.context)
        if forward is None and self.expects_prior and prior is None:
            warnings.warn(OUTSIDE.format(type(self).__name__), stacklevel=4)
        gain = None if forward is None else forward.gain(name)
        if prior is not None:
            prior = self.refine(prior)
        elif forward is not None and self.expects_prior:
            prior = forward.prior(name)
        settings = self.settings
        size = settings.statistics_batch_size
        is_joint = self.synchronized and size is None and self._trains and spans_processes(self.process_group)
        if not is_joint:
            check_values(x, size, has_prior=prior is not None)
        parameters, memory = (self.gain if gain is None else gain, self.weight, self.bias), self._sensitivity(prior)
        processes = (self.process_group,) if is_joint else None
        filtered = normalize_batch(x, prior, parameters, settings, memory, processes)
        if forward is not None and forward.reads_posteriors:
            forward.publish(name, filtered.posterior)
        if self.on_posterior is not None:
            self.on_posterior(filtered.statistics, Groups.of(len(x), size).share(x), len(x))
        elif self._trains and not is_recomputation():
            images = x.shape[0] if filtered.images is None else filtered.images
            self._observe(Observation(self.state, prior, filtered.statistics, images, settings), forward)
        return filtered

    def _observe(self, seen: Observation, forward: Forward | None) -> None:
        if not torch.compiler.is_compiling():  # which lets no list grow inside a checkpoint
            self.__dict__["was_tracked"] = True  # for whoever wants to know which layers ran
            if forward is not None:
                forward.observations.append(seen)
                return
        track([seen])

    def _by_population(self, x: Tensor) -> Tensor:
        if self.running_mean is None:
            raise StatisticsError("this layer keeps no population statistics", "Use track_running_stats=True.")
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def _sensitivity(self, prior: Gaussian | None) -> Sensitivity | None:
        used, gathered = self._buffers["sensitivity"], self._buffers["gathered_sensitivity"]
        if prior is None or used is None or gathered is None:
            return None
        return Sensitivity(used, gathered if self._trains else gathered.clone())

    @property
    def _trains(self) -> bool:
        return self.training and self.statistics is None

    def enter(self, forward: Forward, name: str) -> None:
        """Take the forward that begins on this thread, in which the layer has this name."""
        if self.past and not is_recomputation():
            self.past.clear()
        context = self.slots.own
        context.forward, context.name, context.is_without_gradient = forward, name, False
        self.__dict__["context"] = context  # as `nn.Module.__setattr__` does, after looking for tensors and modules

    def _check_input_dim(self, input: Tensor) -> None:
        check_shape(input, self.dimensions, self.num_features)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the context of the last forward: it belongs to that forward's graph, not to the layer."""
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        return {**state, "context": None, "on_posterior": None, "past": [], "was_tracked": False}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Take what an earlier version saved as well."""
        complete_(state_dict, prefix, self._buffers)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        """Describe the layer as `nn.BatchNorm2d` does, with what is ours."""
        gain = "?" if self.gain.is_meta else f"{float(self.gain.detach()):.3g}"
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
