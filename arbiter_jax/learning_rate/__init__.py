"""Learning rates: optimizers that adapt their own, and transformations that scale the updates.

* Complete optimizers: :func:`sgd_hd`, :func:`adam_hd`, :func:`adamp`.
* For a batch size that changes, with a memory in examples: :func:`adamw_in_examples`,
  :func:`lamb_in_examples`, :func:`scale_by_adam_in_examples`, :func:`trace_in_examples`,
  :func:`add_decayed_weights_in_examples`, :func:`ema_in_examples`.
* To chain after an optimizer, multiplying its updates: :func:`autowu`,
  :func:`scale_by_batch_size`, :func:`adascale`, :func:`scale_by_schedule`.

The state of each that sets a rate has `learning_rate`, float32[]. With ``update(..., probe=True)``,
by which the impulse response of a chain is measured, the last group needs no signals and returns the
updates and its state unchanged.

Inside `optax.inject_hyperparams` a number that is changed takes effect at the next update, but for
one that only sets where a run starts, as the rate of :func:`sgd_hd`; the lengths in :func:`autowu`
have to be listed in its `static_args`, and so has a schedule of anything but steps.
"""

from arbiter_jax.learning_rate._adam_in_examples import (
    AdamInExamplesState,
    adamw_in_examples,
    lamb_in_examples,
    scale_by_adam_in_examples,
)
from arbiter_jax.learning_rate._adamp import AdamPState, adamp
from arbiter_jax.learning_rate._adascale import AdaScaleState, adascale
from arbiter_jax.learning_rate._autowu import AutoWUState, autowu
from arbiter_jax.learning_rate._ema_in_examples import EMAInExamplesState, ema_in_examples
from arbiter_jax.learning_rate._hypergradient import HypergradientState, adam_hd, sgd_hd
from arbiter_jax.learning_rate._scale_by_batch_size import (
    ScaleByBatchSizeState,
    scale_by_batch_size,
)
from arbiter_jax.learning_rate._scale_by_schedule import ScaleByScheduleState, scale_by_schedule
from arbiter_jax.learning_rate._trace_in_examples import TraceInExamplesState, trace_in_examples
from arbiter_jax.learning_rate._weight_decay_in_examples import add_decayed_weights_in_examples

__all__ = [
    "AdaScaleState",
    "AdamInExamplesState",
    "AdamPState",
    "AutoWUState",
    "EMAInExamplesState",
    "HypergradientState",
    "ScaleByBatchSizeState",
    "ScaleByScheduleState",
    "TraceInExamplesState",
    "adam_hd",
    "adamp",
    "adamw_in_examples",
    "adascale",
    "add_decayed_weights_in_examples",
    "autowu",
    "ema_in_examples",
    "lamb_in_examples",
    "scale_by_adam_in_examples",
    "scale_by_batch_size",
    "scale_by_schedule",
    "sgd_hd",
    "trace_in_examples",
]
