"""What a caller hands to a step of your own loop: checked, and turned into signals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from arbiter_jax import _validate
from arbiter_jax._count import Count, as_count
from arbiter_jax.base import VALIDATION_SIGNALS, PyTree, Requests, requests
from arbiter_jax.batching._masking import num_rows
from arbiter_jax.training._signals import first_entry

_NUM_AGENT_INPUTS = 32  # as in `run_window`: what an agent costs grows with them


def check_batch(batch: PyTree, mask: Any) -> None:
    """Raises a ValueError if a user's batch has no rows, or its mask does not fit."""
    rows = num_rows(batch, "batch")
    for leaf in jax.tree.leaves(batch):
        if not isinstance(leaf, jax.Array | np.ndarray):
            raise ValueError(
                f"batch must be a pytree of arrays of JAX or NumPy, got a {type(leaf).__name__}: "
                "arbiter_jax.datasets.batches(loader, batch_size) converts what a loader yields."
            )
    dtype = getattr(mask, "dtype", None)
    if mask is None or (
        jnp.shape(mask) == (rows,) and dtype is not None and jnp.issubdtype(dtype, jnp.bool)
    ):
        return
    raise ValueError(
        f"mask must be bool[{rows}], one entry per row of batch, got {_validate.shown(mask)}: "
        "weights of the examples go in an aj.WeightedLoss."
    )


def check_opt_state(tx: Any, params: PyTree, requested: Requests) -> None:
    """Raises a ValueError if `tx` holds rules and the state, that of another optimizer, none."""
    if requested.rules or requested.signals:
        return
    expected = requests(jax.eval_shape(tx.init, params))
    if expected.rules or expected.signals:
        raise ValueError(
            "opt_state must be that of tx, whose rules read signals, got one without a rule: make it "
            "with the whole chain, tx.init(params) or nnx.Optimizer(model, tx, wrt=...).opt_state."
        )


def given_signals(
    requested: Requests,
    validation: PyTree,
    num_examples: Any,
    step_seconds: Any,
    inputs_of: Callable[[PyTree], PyTree] | None,
) -> dict[str, Any]:
    """The signals that a step gets from its caller, not from its gradient; only those asked for."""
    signals: dict[str, Any] = {}
    wanted = requested.signals & VALIDATION_SIGNALS
    if wanted and validation is None:
        raise ValueError(
            "validation must be given, got None: a rule in the chain measures on validation "
            "examples. Pass a batch of them: validation=batch."
        )
    if wanted:
        num_rows(validation, "validation")
        validation = jax.tree.map(jnp.asarray, validation)
    if "meta_batch" in wanted:
        signals["meta_batch"] = validation
    if "agent_inputs" in wanted:
        inputs = (inputs_of or first_entry)(validation)
        signals["agent_inputs"] = jax.tree.map(lambda x: x[:_NUM_AGENT_INPUTS], inputs)
    if "step_seconds" in requested.signals:
        seconds = float("nan") if step_seconds is None else step_seconds
        signals["step_seconds"] = jnp.asarray(seconds, jnp.float32)
    if num_examples is not None:
        is_count = isinstance(num_examples, Count)
        signals["num_examples"] = num_examples if is_count else as_count(num_examples)
    if requested.progress is not None:
        signals["progress"] = requested.progress
    return signals
