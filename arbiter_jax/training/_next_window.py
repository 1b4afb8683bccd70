"""The host's one read of a rule's decision before each window."""

from __future__ import annotations

import jax

from arbiter_jax import _validate
from arbiter_jax.base import PyTree, as_pure, requests, the_rule
from arbiter_jax.batching import next_bucket


def next_window(
    opt_state: PyTree, window: int = 100, micro_batch_size: int | None = None
) -> tuple[int, int, int]:
    """Reads batch size, bucket and number of steps of the next window from an optimizer state.

    One bucket serves the training batch and the validation batch of a window: that of the larger
    one. A rule may ask for a shorter window (``noise_floor`` does at the start, when it knows
    little), which runs in the same program: pass `num_steps` on to :func:`run_window`.

    Args:
      opt_state: State of a chain with exactly one batch-size rule; also the `opt_state` of an
        ``nnx.Optimizer``.
      window: T, steps of a whole window, an integer >= 1.
      micro_batch_size: The most rows of a bucket, a power of two, for :func:`run_window` with the
        same `micro_batch_size`; None for any number.

    Returns:
      (batch_size, bucket_size, num_steps): examples per step, rows per step or per group of it (a
      power of two), and steps of the next window, in [1, window]. Of a state that was vmapped over
      seeds, the largest sizes and the fewest steps.

    Raises:
      ValueError: If `window` or `micro_batch_size` is out of its range, the state holds no rule or
        more than one, a size that no batch can have, or arrays that cannot be read.

    >>> import arbiter_jax as aj
    >>> next_window(aj.schedulers.constant(48).init(None), window=20)
    (48, 64, 20)
    >>> next_window(aj.schedulers.constant(4096).init(None), micro_batch_size=64)
    (4096, 64, 100)
    """
    window = _validate.integer(window=window, minimum=1)
    if micro_batch_size is not None:
        micro_batch_size = _validate.power_of_two(micro_batch_size=micro_batch_size)
    requested = requests(opt_state)
    rule = the_rule(requested)
    try:
        read = as_pure((requested.bucket_sizes, requested.window_steps))
        sizes, steps = jax.device_get(read)
        sizes = [int(size.max()) for size in sizes]
    except jax.errors.ConcretizationTypeError:
        raise ValueError(
            "opt_state must hold numbers, got traced ones: next_window picks the program to run, so "
            "call it outside jit, vmap and scan."
        ) from None
    except RuntimeError as error:
        if "deleted" not in str(error):
            raise
        raise ValueError(
            "opt_state must hold arrays that can be read, got deleted ones: run_window donates the "
            "state that it is given; read the one that it returned."
        ) from error
    if min(sizes) < 1:
        raise ValueError(
            f"the batch size must be an integer >= 1, got {min(sizes)} from {type(rule).__name__}."
        )
    num_steps = min([window, *(max(1, int(n.min())) for n in steps)])
    bucket_size = next_bucket(max(sizes))
    if micro_batch_size is not None:
        bucket_size = min(bucket_size, micro_batch_size)
    return sizes[0], bucket_size, num_steps
