"""Noise scales: the one that a schedule anneals (Smith et al.) and the one that gradients show (McCandlish et al.)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, TypeVar

from elastic_batch.errors import InvalidSetting

NoiseForm = Literal["linear", "exact"]

# Schedules of a few phases are computed in fractions, so that 0.1 / 5 is 0.02 and not 0.020000000000000004.
Number = TypeVar("Number", float, Fraction)

# Below this the sizes of an update's parts and of its whole are too close to tell noise from signal.
_SMALLEST_CONTRAST = 1e-9


def scheduled_noise_scale(
    *, learning_rate: float, momentum: float, num_samples: int, global_batch_size: int, form: NoiseForm = "linear"
) -> float:
    """Compute g, the random fluctuation of SGD that a schedule anneals.

    Args:
        learning_rate: lr of the optimizer, >= 0.
        momentum: m in [0, 1); 0 for an optimizer without one, and for Adam.
        num_samples: N, samples of the training set.
        global_batch_size: B, samples of one update, 1 to N.
        form: "linear" is g = lr N / (B (1 - m)), with which the paper schedules; "exact" is lr (N / B - 1) / (1 - m).

    Source: Smith, Kindermans, Ying, Le, "Don't Decay the Learning Rate, Increase the Batch Size", ICLR 2018, section 4.

    >>> scheduled_noise_scale(learning_rate=0.1, momentum=0.9, num_samples=50000, global_batch_size=128)
    390.6250000000001
    >>> scheduled_noise_scale(learning_rate=0.1, momentum=0.0, num_samples=1000, global_batch_size=500, form="exact")
    0.1
    >>> scheduled_noise_scale(learning_rate=0.1, momentum=0.0, num_samples=1000, global_batch_size=1000, form="exact")
    0.0
    """
    return learning_rate / (1 - momentum) * _samples_per_noise(num_samples, form, global_batch_size) / global_batch_size


def learning_rate_for_noise_scale(
    *, noise_scale: float, momentum: float, num_samples: int, global_batch_size: int, form: NoiseForm = "linear"
) -> float:
    """Solve `scheduled_noise_scale` for the learning rate.

    >>> learning_rate_for_noise_scale(noise_scale=400.0, momentum=0.5, num_samples=50000, global_batch_size=125)
    0.5
    """
    return noise_scale * (1 - momentum) * global_batch_size / _samples_per_noise(num_samples, form, global_batch_size)


def batch_size_for_noise_scale(
    *, noise_scale: float, learning_rate: float, momentum: float, num_samples: int, form: NoiseForm = "linear"
) -> float:
    """Solve `scheduled_noise_scale` for the global batch, in samples and not rounded.

    The exact form gives B = N / (1 + g (1 - m) / lr), which stays below N however small g is.

    >>> batch_size_for_noise_scale(noise_scale=400.0, learning_rate=0.5, momentum=0.5, num_samples=50000)
    125.0
    >>> batch_size_for_noise_scale(noise_scale=1.0, learning_rate=1.0, momentum=0.0, num_samples=1000, form="exact")
    500.0
    """
    wanted = noise_scale * (1 - momentum) / learning_rate
    return num_samples / (wanted + 1 if form == "exact" else wanted)


def batch_size_after_drop(global_batch_size: int, drop: float, *, num_samples: int, form: NoiseForm) -> float:
    """Compute the batch that divides the noise scale by `drop` at an unchanged learning rate, in samples, not rounded.

    Linear: B drop. Exact: N / (1 + (N / B - 1) / drop).

    >>> batch_size_after_drop(128, 5.0, num_samples=50000, form="linear")
    640.0
    >>> round(batch_size_after_drop(5120, 2.0, num_samples=50000, form="exact"))
    9289
    """
    grown = global_batch_size * drop
    return grown if form == "linear" else num_samples * grown / (grown + num_samples - global_batch_size)


def at_equal_noise(
    learning_rate: Number, old_batch_size: int, new_batch_size: int, *, num_samples: int, form: NoiseForm
) -> Number:
    """Move a learning rate from one batch to another without changing the noise scale.

    >>> at_equal_noise(Fraction(8, 10000), 128, 5120, num_samples=50000, form="linear")
    Fraction(4, 125)
    """
    old = old_batch_size * _samples_per_noise(num_samples, form, new_batch_size)
    new = new_batch_size * _samples_per_noise(num_samples, form, old_batch_size)
    return learning_rate * new / old


def _samples_per_noise(num_samples: int, form: NoiseForm, global_batch_size: int) -> int:
    return num_samples - global_batch_size if form == "exact" else num_samples


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseSums:
    """What one update tells about the noise of its gradients; everything is summed over the workers already."""

    num_workers: int
    """r: workers whose first pass had a weight above 0."""
    square_sum: float
    """Sum over those of |s_i|^2 / w_i^2; s_i is the first pass's gradient of the summed loss, w_i its weight."""
    inverse_weight_sum: float
    """Sum over those of 1 / w_i."""
    gradient_square: float
    """|G|^2 of the update's gradient, divided by the weight, before clipping."""
    weight: float
    """W of the whole update, in samples, or in tokens that count."""
    dataset_weight: float
    """N of the training set in the same unit; infinity where samples do not come back."""


class NoiseScaleEstimator:
    """The measured noise scale S / |G|^2: the global batch (in the unit of the weights) whose noise equals its signal.

    S, the trace of the covariance of per-sample gradients, and |G|^2, the squared norm of the true gradient, are each
    estimated without bias from an update's sums and smoothed apart; only their ratio is read out, never clamped before.
    A batch drawn without replacement knows more about the training set than one drawn with it: hence the term 1/N.

    Args:
        horizon_samples: Over how many samples an update's influence falls to 1/e. A horizon in samples keeps its
            meaning when the batch grows.

    Source: McCandlish, Kaplan, Amodei, "An Empirical Model of Large-Batch Training", 2018, appendix A.1, with harmonic
    mean weights and the correction for a finite training set.
    """

    def __init__(self, horizon_samples: float) -> None:
        if not horizon_samples > 0:
            raise InvalidSetting("horizon_samples", horizon_samples, "must be above 0")
        self._horizon = float(horizon_samples)
        self._variance = self._square = 0.0
        self._filled = 0.0  # sum of the averages' weights: what the bias correction divides by
        self._num_measured = 0
        self._unmeasured_samples = 0

    def add(self, sums: NoiseSums, samples: int) -> None:
        """Take in one committed update of `samples` samples; one that cannot tell noise from signal is passed over."""
        measured = _estimate(sums)
        if measured is None:
            self._unmeasured_samples += samples
            return
        self._unmeasured_samples = 0
        variance, square = measured
        share = -math.expm1(-samples / self._horizon)
        self._variance += share * (variance - self._variance)
        self._square += share * (square - self._square)
        self._filled += share * (1 - self._filled)
        self._num_measured += 1

    @property
    def gradient_variance(self) -> float | None:
        """S, smoothed; None before anything was measured, and when that is further back than the horizon."""
        return self._variance / self._filled if self._filled and not self._is_stale else None

    @property
    def gradient_square(self) -> float | None:
        """|G|^2, smoothed; it may be negative by chance. None as for the variance."""
        return self._square / self._filled if self._filled and not self._is_stale else None

    @property
    def noise_scale(self) -> float | None:
        """S / |G|^2; None without enough data: less than a tenth of the horizon, or an estimate not yet positive."""
        enough = self._num_measured >= 2 and self._filled >= -math.expm1(-0.1)
        if not enough or self._is_stale or self._square <= 0 or self._variance <= 0:
            return None
        return self._variance / self._square

    @property
    def _is_stale(self) -> bool:
        return self._unmeasured_samples > self._horizon

    def state_dict(self) -> dict[str, float]:
        """The estimator as plain floats; the horizon is a setting and not part of it."""
        return {
            "gradient_variance": self._variance,
            "gradient_square": self._square,
            "filled": self._filled,
            "num_measured": float(self._num_measured),
            "unmeasured_samples": float(self._unmeasured_samples),
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from what `state_dict` gave."""
        self._variance = float(state["gradient_variance"])
        self._square = float(state["gradient_square"])
        self._filled = float(state["filled"])
        self._num_measured = int(state["num_measured"])
        self._unmeasured_samples = int(state["unmeasured_samples"])


def _estimate(sums: NoiseSums) -> tuple[float, float] | None:
    """Unbiased (S, |G|^2) of one update, or None where its parts are not smaller than the whole."""
    if sums.num_workers < 1 or sums.weight <= 0:
        return None
    part_square = sums.square_sum / sums.num_workers
    inverse_part = sums.inverse_weight_sum / sums.num_workers
    inverse_whole = 1 / sums.weight
    contrast = inverse_part - inverse_whole
    if not contrast > _SMALLEST_CONTRAST * inverse_whole:
        return None
    variance = (part_square - sums.gradient_square) / contrast
    square = sums.gradient_square - variance * (inverse_whole - 1 / sums.dataset_weight)
    return (variance, square) if math.isfinite(variance) and math.isfinite(square) else None
