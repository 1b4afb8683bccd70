"""Checks of the arguments of :func:`run_window`."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from arbiter_jax import _validate
from arbiter_jax.training._call_errors import check_static_integers
from arbiter_jax.training._check_data import check_data, check_on_device
from arbiter_jax.training._check_functions import check_functions, check_transformation
from arbiter_jax.training._check_state import check_same_chain, check_state
from arbiter_jax.training._extra_args import check_extra_args
from arbiter_jax.training._micro_batches import check_micro_batch_size, check_sampling
from arbiter_jax.training._state import TrainState, abstract_state


def explain(state: Any, data: Any, **options: Any) -> None:
    """Raises a ValueError if a call of :func:`run_window` failed because of an argument."""
    check_arguments(state, data, **options)
    check_on_device(data)


def check_whole_numbers(**arguments: Any) -> None:
    """Raises a ValueError for a number that is traced and not an integer; its value is not known."""
    for name, value in arguments.items():
        dtype = jnp.result_type(0 if value is None else value)
        if not jnp.issubdtype(dtype, jnp.integer):
            raise ValueError(f"{name} must be an integer, got a number of type {dtype}.")


def check_arguments(
    state: TrainState,
    data: Any,
    *,
    tx: Any,
    bucket_size: Any,
    window: Any = 100,
    num_agent_inputs: Any = 32,
    loss_fn: Any = None,
    gradient_fn: Any = None,
    transform_batch: Any = None,
    inputs_of: Any = None,
    extra_args: Any = None,
    micro_batch_size: Any = None,
    sampling: Any = "exact",
    **others: Any,
) -> None:
    """Raises a ValueError if an argument of :func:`run_window` is not what it should be."""
    del others  # traced, or checked where they are used
    check_static_integers(bucket_size=bucket_size, window=window, num_agent_inputs=num_agent_inputs)
    for name, value in (("bucket_size", bucket_size), ("window", window)):
        if value > _validate.LARGEST_INT32:  # counted in int32
            _validate.integer(maximum=_validate.LARGEST_INT32, **{name: value})
    check_micro_batch_size(micro_batch_size, bucket_size)
    check_sampling(sampling, micro_batch_size)
    check_transformation(tx)
    check_data(data)
    check_state(state, TrainState)
    check_same_chain(state, abstract_state(state, tx))
    check_functions(loss_fn, gradient_fn, transform_batch, state.model_state, inputs_of)
    check_extra_args(extra_args, micro_batch_size)
