"""Two calls train as one does: what a state and a checkpoint carry from one to the next."""

import chex
import numpy as np
import pytest

import arbiter_jax as aj
from tests.training.resume_runs import (
    KINDS,
    NAMES,
    arrays,
    assert_same_run,
    fit,
)

# A few of the matrix by default: each reads other things that have to survive.
DEFAULT = {
    ("goodput", "streamed"),
    ("noise_floor", "batch_norm"),
    ("arbiter", "resident"),
}
MATRIX = [
    pytest.param(name, kind, marks=() if (name, kind) in DEFAULT else pytest.mark.slow)
    for kind in KINDS
    for name in NAMES
]


class Crash(Exception):
    pass


def crash_after(num_windows):
    def callback(record, state):
        if record.window_index + 1 == num_windows:
            raise Crash

    return callback


@pytest.mark.parametrize(("name", "kind"), MATRIX)
def test_a_crashed_run_ends_as_one_that_did_not(name, kind, tmp_path):
    whole = fit(name, kind)
    last = len(whole.history)
    assert last >= 4
    saved = aj.checkpoints(tmp_path, every=2)
    run = lambda after: fit(
        name, kind, checkpoints=saved, resume=True, callbacks=crash_after(after)
    )
    for after in (2, last - 1):  # before the first checkpoint, and in the middle
        with pytest.raises(Crash):
            run(after)
    assert_same_run(arrays(run(None)), arrays(whole))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_legs_cut_in_a_window_are_one_run(name):
    whole = fit(name, "resident", clock=lambda: 0.0)
    legs, state = [], None
    for stop_at in (35, 97, 211, 333, None):
        legs.append(fit(name, "resident", clock=lambda: 0.0, stop_at=stop_at, state=state))
        state = legs[-1].state
    assert any(leg.history[-1].num_steps < 4 for leg in legs[:-1] if leg.history)
    chex.assert_trees_all_equal(state, whole.state)
    for quantity in ("loss", "batch_size"):
        steps = np.concatenate([leg.per_step(quantity) for leg in legs])
        np.testing.assert_array_equal(steps, whole.per_step(quantity))
