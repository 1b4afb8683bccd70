"""Flax's train state for Linen models, with an optimizer that reads more than gradients.

Flax's own ``apply_gradients`` takes no extra arguments for ``tx.update``, and a batch-size rule
cannot work without them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import optax
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

from arbiter_jax.base import SIGNALS, with_extra_args


class TrainState(train_state.TrainState):
    """Flax's ``TrainState`` whose `apply_gradients` passes signals on to the optimizer.

    It takes the place of ``flax.training.train_state.TrainState``: the same fields, the same
    `create`, and it may be subclassed for further fields in the same way. It is not
    :class:`arbiter_jax.TrainState`, which holds everything that a run of :func:`arbiter_jax.fit`
    carries.

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> from arbiter_jax import models
    >>> tx = optax.chain(optax.sgd(0.1), aj.schedulers.adadamp(decay=0, initial_batch_size=32))
    >>> state = models.TrainState.create(apply_fn=None, params={"w": jnp.ones(2)}, tx=tx)
    >>> for loss in (2.0, 1.0):
    ...     state = state.apply_gradients(grads={"w": jnp.ones(2)}, value=loss)
    >>> state.step, int(aj.get_batch_size(state.opt_state))
    (2, 64)
    """

    def apply_gradients(self, *, grads: Any, **kwargs: Any) -> TrainState:
        """Updates the parameters, the optimizer state and the step.

        Args:
          grads: Gradients, a pytree like the parameters. As in Flax, those in the collection
            ``_overwrite_with_gradient`` replace their parameters.
          **kwargs: A keyword that is the name of a field, ``batch_stats`` of a subclass, say, is the
            field's new value. Every other keyword is an extra argument of ``tx.update``. A signal
            that a subclass has a field for, usually ``model_state``, is both.

        Returns:
          The new state.

        Raises:
          TypeError: If a keyword is one of ``step``, ``apply_fn``, ``params``, ``tx`` and
            ``opt_state``, which are not given but computed or kept, or if a rule misses a signal.
        """
        computed = sorted(_FIELDS & kwargs.keys())
        if computed:
            raise TypeError(
                f"apply_gradients takes no {computed[0]!r}, which it computes or keeps itself: use "
                f"state.replace({computed[0]}=...)."
            )
        fields = {field.name for field in dataclasses.fields(self)}
        replaced = {name: value for name, value in kwargs.items() if name in fields}
        signals = {k: v for k, v in kwargs.items() if k not in fields or k in _SIGNALS}
        overwrites = isinstance(grads, Mapping) and OVERWRITE_WITH_GRADIENT in grads
        trained: Any = self.params["params"] if overwrites else self.params
        trained_grads = grads["params"] if overwrites else grads
        tx = with_extra_args(self.tx)
        updates, opt_state = tx.update(trained_grads, self.opt_state, trained, **signals)
        params: Any = optax.apply_updates(trained, updates)
        if overwrites:
            params = {"params": params, OVERWRITE_WITH_GRADIENT: grads[OVERWRITE_WITH_GRADIENT]}
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **replaced)


_FIELDS = frozenset(field.name for field in dataclasses.fields(train_state.TrainState))
_SIGNALS = frozenset({*SIGNALS, "grad", "model_state"})
