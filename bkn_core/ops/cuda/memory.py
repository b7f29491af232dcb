"""What layers remember of a forward, all of them by one launch. The formulas stand in `ops/track.py`,
`filter/uncertainty.py` and `filter/inflation_gradient.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

FIELDS = 17  # of a layer in the table: see `track`

_LARGEST_RATIO = tl.constexpr(2980.958)  # as in `uncertainty.py`
_MEMORY = tl.constexpr(0.05)
_FIRST_NOISE = tl.constexpr(0.1)
_LARGEST_INFLATION = tl.constexpr(60.0)  # as in `ops/track.py`
_SENSITIVITY_WEIGHT = tl.constexpr(0.1)  # as in `inflation_gradient.py`


_FIELDS, _ROW = [f"f{i}" for i in range(FIELDS)], tl.constexpr(FIELDS)


@triton.jit(do_not_specialize=["layer", *_FIELDS])
def write_row(
    table, numbers, layer, slowest, momentum, eps,
    f0, f1, f2, f3, f4, f5, f6, f7, f8,
    f9, f10, f11, f12, f13, f14, f15, f16,
):  # fmt: skip
    """Write what the table says of one layer."""
    tl.store(numbers + 3 * layer, slowest)
    tl.store(numbers + 3 * layer + 1, momentum)
    tl.store(numbers + 3 * layer + 2, eps)
    row = table + _ROW * layer
    tl.store(row + 0, f0)
    tl.store(row + 1, f1)
    tl.store(row + 2, f2)
    tl.store(row + 3, f3)
    tl.store(row + 4, f4)
    tl.store(row + 5, f5)
    tl.store(row + 6, f6)
    tl.store(row + 7, f7)
    tl.store(row + 8, f8)
    tl.store(row + 9, f9)
    tl.store(row + 10, f10)
    tl.store(row + 11, f11)
    tl.store(row + 12, f12)
    tl.store(row + 13, f13)
    tl.store(row + 14, f14)
    tl.store(row + 15, f15)
    tl.store(row + 16, f16)


@triton.jit
def is_finite(value):
    """Whether a number, as a float32, is neither infinite nor NaN."""
    narrow = value.to(tl.float32)
    return narrow - narrow == 0


@triton.jit
def values_at(pointer, mask):
    """Return numbers in float64."""
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float64)


@triton.jit
def gain_of(error, noise):
    """Return the Kalman gain P / (P + R), neither below 0."""
    error, noise = tl.maximum(error, 0.0), tl.maximum(noise, 0.0)
    return error / tl.maximum(error + noise, 1e-30)


@triton.jit
def speed_of(forwards, error, noise, slowest):
    """Return how fast an inflation moves."""
    off = tl.minimum(tl.maximum(error, 0.0), 1.0)
    lost = tl.where(forwards > 0, gain_of(error, noise) * off * off, 1.0)
    return tl.maximum(lost, tl.maximum(1 / tl.maximum(forwards, 1.0), slowest))


@triton.jit
def residuals(
    means, variances, prior_mean, prior_variance, stride, groups, channels, channel, known, speed, eps
):  # fmt: skip
    """Return m, e of mean and variance, mean_G v', and R of both."""
    spread = tl.zeros(channel.shape, tl.float64)
    predicted, shift, around, by_mean, by_variance = spread, spread, spread, spread, spread
    for group in range(0, groups):
        at, prior = group * channels + channel, group * stride + channel
        d = values_at(means + at, known) - values_at(prior_mean + prior, known)
        spread += (values_at(variances + at, known) + d * d) / groups
        shift += d / groups
        predicted += values_at(prior_variance + prior, known) / groups
    rest = shift * (1 - speed)
    mended = tl.maximum(spread - shift * shift + rest * rest, 0.0) + eps
    ratio = mended / (predicted + eps)
    ratio = tl.where(
        ratio > _LARGEST_RATIO, _LARGEST_RATIO, tl.where(ratio < 1 / _LARGEST_RATIO, 1 / _LARGEST_RATIO, ratio)
    )
    if groups > 1:
        for group in range(0, groups):
            at, prior = group * channels + channel, group * stride + channel
            d = values_at(means + at, known) - values_at(prior_mean + prior, known) - shift
            around += (values_at(variances + at, known) + d * d) / groups
            by_mean += d * d / (groups - 1)
        for group in range(0, groups):
            at, prior = group * channels + channel, group * stride + channel
            d = values_at(means + at, known) - values_at(prior_mean + prior, known) - shift
            apart = values_at(variances + at, known) + d * d - around
            by_variance += apart * apart / (groups - 1)
    nothing = float("nan")
    by_mean = by_mean / mended
    by_variance = tl.where(is_finite(mended * mended), by_variance / (mended * mended), nothing)
    value = tl.where(is_finite(spread), shift / tl.sqrt(spread + eps), nothing)
    return shift, value, tl.where(is_finite(spread), ratio - 1, nothing), predicted, by_mean, by_variance


@triton.jit
def clipped(value):
    """Return a residual between -1 and 1; NaN as it is."""
    return tl.where(value > 1, 1.0, tl.where(value < -1, -1.0, value))


@triton.jit
def newest_and_old(statistics, running, row, groups, channels, channel, known):
    """Return a moving average's newest value: the mean over groups of a row of the statistics, and what it was."""
    total = tl.zeros(channel.shape, tl.float64)
    for group in range(0, groups):
        total += values_at(statistics + (row * groups + group) * channels + channel, known) / groups
    return total, values_at(running + channel, known)


@triton.jit
def remember(sensitivity, gathered, channels, channel, known):
    """Take what the passes since the last forward have gathered into the running sensitivity."""
    passes = values_at(gathered + 2 * channels + channel, known)
    some = tl.where(passes > 0, passes, 1.0)
    for row in tl.static_range(2):
        used = values_at(sensitivity + row * channels + channel, known)
        newest = values_at(gathered + row * channels + channel, known) / some
        used += _SENSITIVITY_WEIGHT * (newest - used)
        tl.store(sensitivity + row * channels + channel, used.to(tl.float32), mask=known & (passes > 0))
    for row in tl.static_range(3):
        tl.store(gathered + row * channels + channel, tl.zeros(channel.shape, tl.float32), mask=known)


@triton.jit
def seen_of(forwards, groups, channels, speed, square, product, noise):
    """Return P and R that one forward shows."""
    square, noise = square / channels, noise / channels
    by_groups = square - noise / groups
    by_time = product / channels + speed * square
    error = tl.where(groups > 1, by_groups, tl.where(forwards > 0, by_time, _FIRST_NOISE))
    noise = tl.where(groups > 1, noise, tl.where(forwards > 0, square - by_time, _FIRST_NOISE))
    return error, noise


@triton.jit
def move_uncertainty(
    state, forwards, groups, channels, speed, square, product, noises, error, noise, speed_2, square_2, product_2,
    noises_2, error_2, noise_2, gain,
):  # fmt: skip
    """Move P and R towards what was seen, unless it is not finite, and the gain that follows from them."""
    new, new_noise = seen_of(forwards, groups, channels, speed, square, product, noises)
    new_2, new_noise_2 = seen_of(forwards, groups, channels, speed_2, square_2, product_2, noises_2)
    weight = tl.maximum(1 / (forwards + 1), _MEMORY)
    new, new_2 = error + weight * (new - error), error_2 + weight * (new_2 - error_2)
    new_noise, new_noise_2 = noise + weight * (new_noise - noise), noise_2 + weight * (new_noise_2 - noise_2)
    is_sound = is_finite(new) & is_finite(new_2) & is_finite(new_noise) & is_finite(new_noise_2)
    if is_sound:
        tl.store(state, (forwards + 1).to(tl.float32))
        tl.store(state + 1, new.to(tl.float32))
        tl.store(state + 2, new_2.to(tl.float32))
        tl.store(state + 3, new_noise.to(tl.float32))
        tl.store(state + 4, new_noise_2.to(tl.float32))
    if gain != 0:
        target = gain.to(tl.pointer_type(tl.float32))
        if is_sound:
            tl.store(target, tl.maximum(gain_of(new, new_noise), gain_of(new_2, new_noise_2)).to(tl.float32))
        elif forwards > 0:
            tl.store(target, tl.maximum(gain_of(error, noise), gain_of(error_2, noise_2)).to(tl.float32))


@triton.jit
def move_inflations(
    statistics, prior_mean, prior_variance, stride, inflation, mean_inflation, residual, kept, groups, channels,
    channel, known, speed, speed_2, eps,
):  # fmt: skip
    """Move the inflations of some channels, and return e, e e_before and R of mean and variance, 0 where unknown."""
    plane = groups * channels
    shift, value, value_2, predicted, by_mean, by_variance = residuals(
        statistics + 2 * plane, statistics + 3 * plane, prior_mean, prior_variance, stride, groups, channels,
        channel, known, speed, eps,
    )  # fmt: skip
    old, old_mean = values_at(inflation + channel, known), values_at(mean_inflation + channel, known)
    tl.store(kept + channel, old.to(tl.float32), mask=known)
    tl.store(kept + channels + channel, old_mean.to(tl.float32), mask=known)
    after_mean = old_mean + speed * shift / tl.sqrt(predicted / tl.exp(old) + eps)
    after = old + tl.log(1 + speed_2 * value_2)
    after = tl.where(after > _LARGEST_INFLATION, _LARGEST_INFLATION, after)
    after = tl.where(after < -_LARGEST_INFLATION, -_LARGEST_INFLATION, after)
    is_seen = is_finite(value) & is_finite(value_2) & known
    is_sound = is_seen & is_finite(after) & is_finite(after_mean)
    value, value_2 = clipped(value), clipped(value_2)
    last, last_2 = values_at(residual + channel, known), values_at(residual + channels + channel, known)
    tl.store(residual + channel, value.to(tl.float32), mask=is_seen)
    tl.store(residual + channels + channel, value_2.to(tl.float32), mask=is_seen)
    tl.store(inflation + channel, after.to(tl.float32), mask=is_sound)
    tl.store(mean_inflation + channel, after_mean.to(tl.float32), mask=is_sound)
    value, value_2 = tl.where(known, value, 0.0), tl.where(known, value_2, 0.0)
    by_mean, by_variance = tl.where(known, by_mean, 0.0), tl.where(known, by_variance, 0.0)
    return value, value * last, by_mean, value_2, value_2 * last_2, by_variance


@triton.jit
def move_averages(statistics, running_mean, running_var, batches, groups, channels, momentum, CHANNELS: tl.constexpr):
    """Move the moving statistics of a layer, but where the newest are not finite, and count the batch where all are."""
    wrong = tl.zeros([CHANNELS], tl.int32)
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        known = channel < channels
        mean, old_mean = newest_and_old(statistics, running_mean, 0, groups, channels, channel, known)
        variance, old = newest_and_old(statistics, running_var, 4, groups, channels, channel, known)
        is_sound = is_finite(mean) & is_finite(variance)
        mean, variance = old_mean + momentum * (mean - old_mean), old + momentum * (variance - old)
        tl.store(running_mean + channel, mean.to(tl.float32), mask=known & is_sound)
        tl.store(running_var + channel, variance.to(tl.float32), mask=known & is_sound)
        wrong += (known & (is_sound == 0)).to(tl.int32)
    if batches != 0:
        count = batches.to(tl.pointer_type(tl.int64))
        tl.store(count, tl.load(count) + (tl.sum(wrong, 0) == 0).to(tl.int64))


@triton.jit
def move_filter(row, statistics, before, slowest, eps, groups, channels, CHANNELS: tl.constexpr):
    """Move the inflations, the sensitivity and the uncertainty of a layer."""
    floats: tl.constexpr = tl.pointer_type(tl.float32)
    prior_mean, prior_variance = tl.load(row + 3).to(floats), tl.load(row + 4).to(floats)
    stride, kept = tl.load(row + 5).to(tl.int32), before + tl.load(row + 16)
    inflation, mean_inflation = tl.load(row + 6).to(floats), tl.load(row + 7).to(floats)
    sensitivity, residual = tl.load(row + 8).to(floats), tl.load(row + 9).to(floats)
    gathered, state = tl.load(row + 10).to(floats), tl.load(row + 11).to(floats)
    forwards = tl.load(state).to(tl.float64)
    error, error_2 = tl.load(state + 1).to(tl.float64), tl.load(state + 2).to(tl.float64)
    noise, noise_2 = tl.load(state + 3).to(tl.float64), tl.load(state + 4).to(tl.float64)
    speed, speed_2 = speed_of(forwards, error, noise, slowest), speed_of(forwards, error_2, noise_2, slowest)
    square = tl.zeros([CHANNELS], tl.float64)
    square_2, product, product_2, noises, noises_2 = square, square, square, square, square
    for start in range(0, channels, CHANNELS):
        channel = start + tl.arange(0, CHANNELS)
        known = channel < channels
        value, by_time, by_mean, value_2, by_time_2, by_variance = move_inflations(
            statistics, prior_mean, prior_variance, stride, inflation, mean_inflation, residual, kept, groups,
            channels, channel, known, speed, speed_2, eps,
        )  # fmt: skip
        square, square_2 = square + value * value, square_2 + value_2 * value_2
        product, product_2 = product + by_time, product_2 + by_time_2
        noises, noises_2 = noises + by_mean, noises_2 + by_variance
        remember(sensitivity, gathered, channels, channel, known)
    move_uncertainty(
        state, forwards, groups, channels, speed, tl.sum(square, 0), tl.sum(product, 0), tl.sum(noises, 0), error,
        noise, speed_2, tl.sum(square_2, 0), tl.sum(product_2, 0), tl.sum(noises_2, 0), error_2, noise_2,
        tl.load(row + 12),
    )  # fmt: skip


@triton.jit
def track(table, numbers, before, FIELDS: tl.constexpr, CHANNELS: tl.constexpr):
    """Move what one layer remembers: a row of addresses and sizes, 0 where there is none, and three numbers.

    groups, channels, statistics, µ', v', stride of groups in these, ι, λ, sensitivity, residual, gathered, uncertainty,
    gain, running mean, running variance, batches, where in `before` the inflations go; least speed, momentum, ε.
    """
    row = table + tl.program_id(0) * FIELDS
    groups, channels = tl.load(row).to(tl.int32), tl.load(row + 1).to(tl.int32)
    floats: tl.constexpr = tl.pointer_type(tl.float32)
    statistics = tl.load(row + 2).to(floats)
    number = numbers + tl.program_id(0) * 3
    slowest, momentum = tl.load(number).to(tl.float64), tl.load(number + 1).to(tl.float64)
    eps = tl.load(number + 2).to(tl.float64)
    if tl.load(row + 6) != 0:
        move_filter(row, statistics, before, slowest, eps, groups, channels, CHANNELS)
    if tl.load(row + 13) != 0:
        running_mean, running_var = tl.load(row + 13).to(floats), tl.load(row + 14).to(floats)
        batches = tl.load(row + 15)
        move_averages(statistics, running_mean, running_var, batches, groups, channels, momentum, CHANNELS)
