"""Statistics groups that span processes: what a layer that takes the place of `nn.SyncBatchNorm` observes.

Each process sends the mean m_i, the variance S_i and the count n_i of its values; all compute

    n = Σ n_i ;  x̄ = Σ n_i m_i / n ;  S = Σ n_i / n ( S_i + (m_i - x̄)² )

and the filter goes on from there in each process alike. Backward, the gradients of x̄ and S, which hold the sums G₁ and
G₂ of `normalize`, are added up:  dx = ( Σ g_x̄ + 2 (x - x̄) Σ g_S ) / n  beside what reaches x directly.
One exchange of 2C + 1 numbers forward, one of 2C backward, one more of C where an inflation is followed.

Only the group that is the whole batch spans processes. Groups of a given `statistics_batch_size` stay inside one.
Checked with gloo on the CPU; not run on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bkn_core.filter.autograd import once_differentiable
from bkn_core.filter.inflation_gradient import Processes, Sensitivity
from bkn_core.filter.kalman import Gaussian, Moments, root_above
from bkn_core.filter.state import FilterSettings
from bkn_core.ops.covariance import normalize_by
from bkn_core.ops.normalize import Filtered


def spans_processes(group: dist.ProcessGroup | None) -> bool:
    """Whether there is another process in a group; None is all processes."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def joint_normalize(
    x: Tensor,
    prior: Gaussian | None,
    parameters: tuple[Tensor, Tensor | None, Tensor | None],
    settings: FilterSettings,
    form: tuple[dist.ProcessGroup | None, bool],
    sensitivity: Sensitivity | None = None,
) -> Filtered:
    """Normalize this process's part of one group by the posterior of the whole; see `covariance.normalize_by`.

    Args:
        x: may be empty; the other processes must call this too.
        prior: the same in all processes.
        parameters: gain, γ and β.
        settings: see `FilterSettings`.
        form: the processes, None for all of them, and whether to observe the full matrix S.
        sensitivity: h̄, as in `normalize.kalman_normalize`.
    """
    group, is_matrix = form
    observed = joint_moments(x, group, covariance=is_matrix)
    images = observed.count[0] / x.shape[2:].numel()
    processes = Processes(dist.get_world_size(group), images, functools.partial(_total, group))
    return normalize_by(x, prior, observed, parameters, settings, sensitivity, processes)


def _total(group: dist.ProcessGroup | None, values: Tensor) -> Tensor:
    values = values.clone()
    dist.all_reduce(values, group=group)
    return values


def joint_moments(x: Tensor, group: dist.ProcessGroup | None, *, covariance: bool = False) -> Moments:
    """Observe the moments of one statistics group that holds the batches of all processes.

    Args:
        x: this process's part, which may be empty; the others must call this too.
        group: the processes; None is all of them.
        covariance: the full matrix S instead of its diagonal.

    Shape:
        x (N, C, *spatial) -> mean (1, C), variance (1, C) or (1, C, C), count (1,).
    """
    flat = x.movedim(1, -1).flatten(0, -2)
    mean, variance, count = _JointMoments.apply(flat.to(torch.promote_types(x.dtype, torch.float32)), group, covariance)
    return Moments(mean[None], variance[None], count)


class _JointMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None, covariance: bool) -> tuple[Tensor, ...]:
        """Observe (n, C) here and everywhere."""
        channels, number, root = x.shape[1], max(len(x), 1), root_above(len(x))
        mean = x.sum(0) / number
        centred = (x - mean) / root
        variance = (centred.T @ centred if covariance else centred.square().sum(0)) / (number / root**2)
        own = torch.cat([x.new_tensor([len(x)]), mean, variance.flatten()])
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, own, group)
        counts, means, variances = torch.split(torch.stack(parts), [1, channels, variance.numel()], dim=1)
        count = counts.sum(0)
        shares = counts / count
        joint = (shares * means).sum(0)
        apart = means - joint
        between = (shares * apart).T @ apart if covariance else (shares * apart.square()).sum(0)
        ctx.group = group
        ctx.save_for_backward(x, joint, count)
        ctx.mark_non_differentiable(count)
        return joint, (shares * variances).sum(0).view_as(between) + between, count

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, saved: tuple[Tensor, ...], to_mean: Tensor, to_variance: Tensor, _: None
    ) -> tuple[Tensor | None, ...]:
        """Add up what every process's loss says of the joint moments."""
        x, mean, count = saved
        joint = torch.cat([to_mean, to_variance.flatten()])
        dist.all_reduce(joint, group=ctx.group)
        to_mean, to_variance = joint[: len(mean)], joint[len(mean) :].view_as(to_variance)
        spread = (x - mean) @ (to_variance + to_variance.T) if to_variance.dim() == 2 else 2 * to_variance * (x - mean)
        return (to_mean + spread) / count, None, None
