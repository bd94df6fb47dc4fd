"""The scheduled noise scale and its inverses; the measured one against gradients whose distribution is known."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_batch.errors import InvalidSetting
from elastic_batch.noise import (
    NoiseForm,
    NoiseScaleEstimator,
    NoiseSums,
    at_equal_noise,
    batch_size_after_drop,
    batch_size_for_noise_scale,
    learning_rate_for_noise_scale,
    scheduled_noise_scale,
)

FORMS: list[NoiseForm] = ["linear", "exact"]
Gradients = npt.NDArray[np.float64]


@pytest.mark.parametrize("form", FORMS)
@given(
    learning_rate=st.floats(1e-6, 10),
    momentum=st.floats(0, 0.99),
    num_samples=st.integers(100, 10**9),
    share=st.floats(1e-3, 0.9),
)
def test_the_inverses_give_back_what_the_noise_scale_was_computed_from(
    form: NoiseForm, learning_rate: float, momentum: float, num_samples: int, share: float
) -> None:
    batch = max(1, int(num_samples * share))
    g = scheduled_noise_scale(
        learning_rate=learning_rate, momentum=momentum, num_samples=num_samples, global_batch_size=batch, form=form
    )
    assert batch_size_for_noise_scale(
        noise_scale=g, learning_rate=learning_rate, momentum=momentum, num_samples=num_samples, form=form
    ) == pytest.approx(batch, rel=1e-12)
    assert learning_rate_for_noise_scale(
        noise_scale=g, momentum=momentum, num_samples=num_samples, global_batch_size=batch, form=form
    ) == pytest.approx(learning_rate, rel=1e-12)


@pytest.mark.parametrize("form", FORMS)
@given(drop=st.floats(1, 1000), old=st.integers(1, 5000), new=st.integers(1, 5000))
def test_growing_the_batch_and_dividing_the_rate_lower_the_noise_alike(
    form: NoiseForm, drop: float, old: int, new: int
) -> None:
    n, lr, m = 50_000, 0.1, 0.9
    before = scheduled_noise_scale(learning_rate=lr, momentum=m, num_samples=n, global_batch_size=old, form=form)
    wanted = batch_size_after_drop(old, drop, num_samples=n, form=form)
    again = batch_size_for_noise_scale(
        noise_scale=before / drop, learning_rate=lr, momentum=m, num_samples=n, form=form
    )
    assert wanted == pytest.approx(again, rel=1e-9)
    moved = at_equal_noise(lr, old, new, num_samples=n, form=form)
    after = scheduled_noise_scale(learning_rate=moved, momentum=m, num_samples=n, global_batch_size=new, form=form)
    assert after == pytest.approx(before, rel=1e-12)


def test_the_exact_form_has_a_tenth_less_noise_than_the_linear_one_at_a_tenth_of_the_data() -> None:
    linear, exact = (
        scheduled_noise_scale(learning_rate=1, momentum=0, num_samples=50_000, global_batch_size=5_000, form=form)
        for form in FORMS
    )
    assert exact == pytest.approx(0.9 * linear)


def test_fractions_stay_fractions() -> None:
    assert at_equal_noise(Fraction("0.1"), 128, 640, num_samples=50_000, form="linear") == Fraction(1, 2)


def _population(num_samples: int, seed: int, *, noise: float, signal: float, width: int = 40) -> Gradients:
    """Per-sample gradients with exactly the given covariance trace and squared mean."""
    gradients = np.random.default_rng(seed).standard_normal((num_samples, width))
    gradients -= gradients.mean(axis=0)
    gradients *= math.sqrt(noise * (num_samples - 1) / (gradients**2).sum())
    return np.asarray(gradients + math.sqrt(signal / width))


def _sums(gradient_sums: list[Gradients], weights: list[float], first: int, dataset_weight: float) -> NoiseSums:
    """What the header of an update would hold if each of the `first` first micro-batches were a worker's first pass."""
    total = sum(weights)
    whole = np.sum(gradient_sums, axis=0) / total
    return NoiseSums(
        num_workers=first,
        square_sum=sum(float(s @ s) / w**2 for s, w in zip(gradient_sums[:first], weights[:first], strict=True)),
        inverse_weight_sum=sum(1 / w for w in weights[:first]),
        gradient_square=float(whole @ whole),
        weight=total,
        dataset_weight=dataset_weight,
    )


@pytest.mark.parametrize("num_workers", [1, 3])
def test_sampling_without_replacement_does_not_bias_the_noise_scale(num_workers: int) -> None:
    num_samples, micro, batch, truth = 1437, 32, 128, 513.0
    gradients = _population(num_samples, 1, noise=truth, signal=1.0)
    rng = np.random.default_rng(2)
    corrected, uncorrected = NoiseScaleEstimator(1e6), NoiseScaleEstimator(1e6)
    for _ in range(400):
        order = rng.permutation(num_samples)
        for start in range(0, num_samples - batch + 1, batch):
            parts = [gradients[order[i : i + micro]].sum(axis=0) for i in range(start, start + batch, micro)]
            weights = [float(micro)] * len(parts)
            corrected.add(_sums(parts, weights, num_workers, num_samples), batch)
            uncorrected.add(_sums(parts, weights, num_workers, math.inf), batch)
    assert corrected.noise_scale == pytest.approx(truth, rel=0.05)
    assert uncorrected.noise_scale == pytest.approx(794, rel=0.1)


@pytest.mark.parametrize("num_workers", [1, 3, 8])
def test_uneven_weights_do_not_bias_the_noise_scale(num_workers: int) -> None:
    rng = np.random.default_rng(3)
    width, noise, signal = 20, 20.0, 0.5
    mean = np.full(width, math.sqrt(signal / width))
    estimator = NoiseScaleEstimator(1e7)
    for _ in range(6_000):
        weights = [float(w) for w in rng.integers(8, 200, size=8)]
        sums = [w * mean + math.sqrt(w * noise / width) * rng.standard_normal(width) for w in weights]
        estimator.add(_sums(sums, weights, num_workers, math.inf), int(sum(weights)))
    assert estimator.gradient_variance == pytest.approx(noise, rel=0.03)
    assert estimator.gradient_square == pytest.approx(signal, rel=0.03)
    assert estimator.noise_scale == pytest.approx(noise / signal, rel=0.05)


def _plain(square: float, *, weight: float = 128.0, part_square: float = 30.0) -> NoiseSums:
    return NoiseSums(
        num_workers=1,
        square_sum=part_square,
        inverse_weight_sum=1 / 32,
        gradient_square=square,
        weight=weight,
        dataset_weight=1437.0,
    )


def test_one_micro_batch_per_update_is_not_enough_data() -> None:
    estimator = NoiseScaleEstimator(1000)
    for _ in range(100):
        estimator.add(_plain(10.0, weight=32.0), 32)
    assert estimator.noise_scale is None
    assert estimator.gradient_variance is None
    assert estimator.gradient_square is None


def test_a_short_history_is_not_enough_data() -> None:
    estimator = NoiseScaleEstimator(10_000)
    readings = []
    for _ in range(9):
        estimator.add(_plain(25.0), 128)
        readings.append(estimator.noise_scale)
    assert readings[:7] == [None] * 7
    assert readings[7] is not None, "8 * 128 samples are a tenth of the horizon"


def test_an_estimate_older_than_the_horizon_is_not_told_any_more() -> None:
    known, whole = _plain(10.0), _plain(10.0, weight=32.0)
    estimator = NoiseScaleEstimator(1280)
    for _ in range(20):
        estimator.add(known, 128)
    told = estimator.noise_scale
    assert told is not None
    for _ in range(10):
        estimator.add(whole, 128)
    assert estimator.noise_scale == told
    estimator.add(whole, 128)
    assert estimator.noise_scale is estimator.gradient_square is estimator.gradient_variance is None
    estimator.add(known, 128)
    assert estimator.noise_scale is not None


def test_an_estimate_below_zero_is_kept_in_the_average_and_reads_as_not_enough_data() -> None:
    estimator = NoiseScaleEstimator(1000)
    for _ in range(10):
        estimator.add(_plain(1.0), 128)
    assert estimator.gradient_square is not None
    assert estimator.gradient_square < 0
    assert estimator.noise_scale is None
    for _ in range(20):
        estimator.add(_plain(25.0), 128)
    assert estimator.noise_scale is not None


def test_the_average_is_right_from_the_first_update_on() -> None:
    estimator = NoiseScaleEstimator(1e6)
    estimator.add(_plain(25.0), 128)
    first = estimator.gradient_variance
    estimator.add(_plain(25.0), 5120)
    assert first == pytest.approx((30 - 25) / (1 / 32 - 1 / 128))
    assert estimator.gradient_variance == pytest.approx(first)


def test_the_horizon_is_in_samples_whatever_the_batch() -> None:
    many, few = NoiseScaleEstimator(1000), NoiseScaleEstimator(1000)
    for estimator in (many, few):
        estimator.add(_plain(10.0), 500)
    for _ in range(10):
        many.add(_plain(25.0), 64)
    few.add(_plain(25.0), 640)
    assert many.gradient_variance == pytest.approx(few.gradient_variance)


def test_sums_that_are_not_finite_or_empty_are_passed_over() -> None:
    estimator = NoiseScaleEstimator(1000)
    estimator.add(_plain(math.inf), 128)
    estimator.add(_plain(math.nan), 128)
    estimator.add(
        NoiseSums(num_workers=0, square_sum=0, inverse_weight_sum=0, gradient_square=0, weight=0, dataset_weight=1437),
        128,
    )
    assert estimator.gradient_square is None


def test_a_restored_estimator_continues_equally() -> None:
    original, restored = NoiseScaleEstimator(1000), NoiseScaleEstimator(1000)
    for _ in range(5):
        original.add(_plain(25.0), 128)
    restored.load_state_dict(original.state_dict())
    for estimator in (original, restored):
        estimator.add(_plain(20.0), 128)
    assert restored.noise_scale == original.noise_scale
    assert all(type(value) is float for value in original.state_dict().values())


@pytest.mark.parametrize("horizon", [0, -1, math.nan])
def test_a_horizon_must_be_positive(horizon: float) -> None:
    with pytest.raises(InvalidSetting, match="horizon_samples"):
        NoiseScaleEstimator(horizon)
