"""The host's one read of a rule's decision before each window."""

from __future__ import annotations

import jax

from arbiter_jax import _validate
from arbiter_jax.base import PyTree, requests, the_rule
from arbiter_jax.batching import next_bucket


def next_window(opt_state: PyTree, window: int = 100) -> tuple[int, int, int]:
    """What the rule in an optimizer state has decided for the next window. Host side.

    One bucket serves the training batch and the validation batch of a window: that of the larger
    one. A rule may ask for a shorter window (``noise_floor`` does at the start, when it knows
    little), which runs in the same program: pass `num_steps` on to :func:`run_window`.

    Args:
      opt_state: State of a chain with exactly one batch-size rule.
      window: T, steps of a whole window, an integer >= 1.

    Returns:
      (batch_size, bucket_size, num_steps): examples per step, rows per step (a power of two), and
      steps of the next window, in [1, window]. Of a state that was vmapped over seeds, the largest
      sizes and the fewest steps.

    Raises:
      ValueError: If `window` is out of its range, the state holds no rule or more than one, a size
        that no batch can have, or arrays that cannot be read.

    >>> import arbiter_jax as aj
    >>> next_window(aj.schedulers.constant(48).init(None), window=20)
    (48, 64, 20)
    """
    window = _validate.integer(window=window, minimum=1)
    requested = requests(opt_state)
    rule = the_rule(requested)
    try:
        sizes, steps = jax.device_get((requested.bucket_sizes, requested.window_steps))
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
    return sizes[0], next_bucket(max(sizes)), num_steps
