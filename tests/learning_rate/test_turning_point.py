"""The test at the end of an epoch against recorded runs of the published implementation."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arbiter_jax.learning_rate import _gaussian_process as gp
from arbiter_jax.learning_rate._turning_point import find_turning_point

RECORDED = np.load(pathlib.Path(__file__).parent.parent / "fixtures" / "autowu.npz")
CASES = ("u_low", "monotone", "diverge", "sparse_nan")
STEPS_PER_EPOCH, MAX_WARMUP = 50, 1000


def recorded_indices(key, size):
    """The subsets of one test, padded with indices that are out of range."""
    rows = [np.flatnonzero(bits) for bits in np.unpackbits(RECORDED[key], axis=1)]
    return np.stack([np.pad(row, (0, size - len(row)), constant_values=10**6) for row in rows])


@pytest.mark.slow
@pytest.mark.parametrize("x64", [False, True])
def test_equals_the_published_tests(x64):
    """On the recorded subsets of the losses."""
    with jax.enable_x64(x64):
        test = jax.jit(
            lambda *arguments: find_turning_point(
                *arguments, steps_per_epoch=STEPS_PER_EPOCH, min_learning_rate=1e-5
            )
        )
        for case in CASES:
            process = gp.init()
            losses = RECORDED[f"{case}/loss"][:MAX_WARMUP].astype(float)
            rates = RECORDED[f"{case}/imm1/lr"]
            for epoch, expected in enumerate(RECORDED[f"{case}/imm1/probs"], start=1):
                num_losses = epoch * STEPS_PER_EPOCH
                seen = np.isfinite(losses) & (np.arange(len(losses)) < num_losses)
                trace = f"trace/{case}/test{epoch}"
                if f"{trace}/pred_bits" in RECORDED:
                    posteriors = recorded_indices(f"{trace}/pred_bits", 500)
                else:  # all losses, if there are at most 500
                    posteriors = np.tile(np.arange(500), (5, 1))
                found = test(
                    process,
                    jnp.asarray(np.where(seen, losses, np.nan), float),
                    jnp.asarray(num_losses, jnp.int32),
                    jnp.asarray(rates[num_losses - 2]),
                    jnp.asarray(recorded_indices(f"{trace}/fit_bits", 100)[0]),
                    jnp.asarray(posteriors),
                )
                process = found.process

                parameters = process.hyperparameters
                np.testing.assert_allclose(
                    [gp.noise(parameters), gp.output_scale(parameters), parameters.constant],
                    RECORDED[f"{case}/imm1/gp_noise_outputscale_const"][epoch - 1],
                    rtol=3e-3,
                )
                probabilities = np.asarray(found.probabilities)
                np.testing.assert_allclose(probabilities, expected, atol=5e-3)
                np.testing.assert_array_equal(probabilities > 0.95, expected > 0.95)
                candidate = RECORDED[f"{case}/imm1/lr_candidate"][epoch - 1]
                np.testing.assert_allclose(found.learning_rate, candidate, rtol=1e-2)
                assert not found.collapsed
