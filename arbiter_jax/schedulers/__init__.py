"""Batch-size rules: each returns the updates unchanged and keeps `batch_size` in its state.

A rule is an optax transformation: put it behind the optimizer with `optax.chain`, pass what it reads
as extra arguments of `update`, and read its decision with :func:`arbiter_jax.get_batch_size`.
:func:`arbiter_jax.fit` and :func:`arbiter_jax.value_grad_and_signals` compute those arguments.

>>> import arbiter_jax as aj, optax
>>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.adadamp(decay=0.0, initial_batch_size=32))
>>> params = {"w": 1.0}
>>> opt_state = tx.init(params)
>>> for loss in (2.0, 1.0):  # half the loss, twice the batch
...     updates, opt_state = tx.update({"w": 0.5}, opt_state, params, value=loss)
...     print(int(aj.get_batch_size(opt_state)))
32
64

Another rule is a change of one line. What they read:

* known in advance: :func:`constant`, :func:`from_schedule`, :func:`adabatch`, :func:`smith`;
  from the learning rate's own schedule: :func:`seesaw`;
* from the loss: :func:`adadamp`; from loss and gradient noise: :func:`cabs`;
* from gradient noise: :func:`gradient_noise_scale`, :func:`norm_test`, :func:`inner_product_test`,
  :func:`simigrad`, :func:`dive_batch`; with the measured speed as well: :func:`goodput`;
* from what gradient noise costs: :func:`noise_floor`, :func:`expected_gain`; from your own
  objective: :func:`from_objective`;
* wrapped around any of them: :func:`hysteresis`, :func:`shadow`.

To begin with, add ``aj.schedulers.shadow()`` to your chain: it decides nothing, and reports at every
step what several rules would have chosen.

Rules may decide at every step; `fit` applies the latest decision once per window and passes the
batch size that was used as `batch_size`. Without it a rule assumes that its latest
decision was applied.

Inside other transformations:

* `optax.inject_hyperparams` takes every factory of this library, and a number that is changed in its
  state takes effect at the next update. It calls every function as a schedule and makes an array of
  every number: name functions, and the numbers that a message asks for, in `static_args`, as
  ``optax.inject_hyperparams(expected_gain, static_args=("loss_fn",))``. It keeps numbers in the type
  of the parameters: with half precision pass ``hyperparam_dtype=jnp.float32``.
* Inside `optax.masked` or a group of `optax.multi_transform`, a rule that reads only scalars makes
  the same decisions as anywhere else in a chain. Rules that read parameters or gradients
  (:func:`noise_floor`, :func:`expected_gain`, :func:`from_objective`, :func:`dive_batch` and
  :func:`arbiter_jax.arbiter`) raise an error in `init`: chain them after the mask or the groups.
"""

from arbiter_jax.objectives import FloorState, GainState
from arbiter_jax.schedulers._adabatch import adabatch, adabatch_learning_rate
from arbiter_jax.schedulers._adadamp import AdadampState, adadamp
from arbiter_jax.schedulers._adaptive_sampling import (
    InnerProductTestState,
    NormTestState,
    inner_product_test,
    norm_test,
)
from arbiter_jax.schedulers._batch_schedule import (
    BatchSchedule,
    parse_schedule,
    published_ramp,
)
from arbiter_jax.schedulers._cabs import CABSState, cabs
from arbiter_jax.schedulers._constant import ConstantState, constant
from arbiter_jax.schedulers._dive_batch import DiveBatchState, dive_batch
from arbiter_jax.schedulers._expected_gain import ExpectedGainState, expected_gain
from arbiter_jax.schedulers._from_objective import MeasuredCost, ObjectiveState, from_objective
from arbiter_jax.schedulers._from_schedule import ScheduleState, from_schedule
from arbiter_jax.schedulers._goodput import GoodputState, goodput
from arbiter_jax.schedulers._gradient_noise_scale import (
    GradientNoiseScaleState,
    gradient_noise_scale,
)
from arbiter_jax.schedulers._hysteresis import HysteresisState, hysteresis
from arbiter_jax.schedulers._noise_floor import NoiseFloorState, noise_floor
from arbiter_jax.schedulers._optimal_schedule import optimal_schedule
from arbiter_jax.schedulers._planned import PlannedState
from arbiter_jax.schedulers._rate import RateState
from arbiter_jax.schedulers._seesaw import seesaw, seesaw_schedule
from arbiter_jax.schedulers._shadow import ShadowState, shadow, shadow_batch_sizes
from arbiter_jax.schedulers._simigrad import SimigradState, simigrad
from arbiter_jax.schedulers._smith import smith, smith_learning_rate
from arbiter_jax.schedulers._step_times import StepTimes

__all__ = [
    "AdadampState",
    "BatchSchedule",
    "CABSState",
    "ConstantState",
    "DiveBatchState",
    "ExpectedGainState",
    "FloorState",
    "GainState",
    "GoodputState",
    "GradientNoiseScaleState",
    "HysteresisState",
    "InnerProductTestState",
    "MeasuredCost",
    "NoiseFloorState",
    "NormTestState",
    "ObjectiveState",
    "PlannedState",
    "RateState",
    "ScheduleState",
    "ShadowState",
    "SimigradState",
    "StepTimes",
    "adabatch",
    "adabatch_learning_rate",
    "adadamp",
    "cabs",
    "constant",
    "dive_batch",
    "expected_gain",
    "from_objective",
    "from_schedule",
    "goodput",
    "gradient_noise_scale",
    "hysteresis",
    "inner_product_test",
    "noise_floor",
    "norm_test",
    "optimal_schedule",
    "parse_schedule",
    "published_ramp",
    "seesaw",
    "seesaw_schedule",
    "shadow",
    "shadow_batch_sizes",
    "simigrad",
    "smith",
    "smith_learning_rate",
]
