"""What a run reports: a record of each window, the result, and what a user should know of it."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import numpy as np

from arbiter_jax import _validate
from arbiter_jax._numerics import all_finite
from arbiter_jax.base import StepInfo
from arbiter_jax.training._state import TrainState


class WindowRecord(NamedTuple):
    """What happened in one window, on the host."""

    window_index: int
    batch_size: int
    bucket_size: int
    num_steps: int  # steps in this window
    num_examples: int  # training examples seen, up to the end of this window
    loss: float  # mean over the steps of this window
    seconds: float  # including compilation, if there was one
    num_compilations: int
    info: StepInfo  # NumPy arrays with a leading axis [num_steps]
    evaluation: dict[str, float]  # what callbacks have noted, e.g. aj.callbacks.evaluate


class FitResult(NamedTuple):
    """What :func:`fit` returns.

    Of several seeds, the arrays in `state` have a leading axis, one entry per key, and `history` is
    a list of histories, one per key; :meth:`FitResult.of_seed` is the result of one of them.
    """

    state: TrainState
    history: list[WindowRecord]
    num_compilations: int  # window programs that were compiled
    num_cache_hits: int  # window programs that the persistent compilation cache had
    seconds: float

    def per_step(self, name: str) -> np.ndarray:
        """One quantity at every step of the run: "loss", "batch_size", or any metric."""
        if self._is_of_seeds():
            raise ValueError(
                f"per_step must be asked of one seed, got the result of {len(self.history)}: call "
                f"result.of_seed(0).per_step({name!r})."
            )
        infos = [record.info for record in self.history]
        if not infos:  # a budget of less than one batch
            return np.zeros(0)
        return np.concatenate(
            [getattr(i, name) if name in StepInfo._fields else i.metrics[name] for i in infos]
        )

    def of_seed(self, index: int) -> FitResult:
        """The result of one seed, as its own run would return it.

        Args:
          index: Which of the keys, an integer in [0, number of keys).

        Returns:
          A :class:`FitResult` whose state is that of this seed. Seconds and compilations, which the
          seeds have in common, are those of all of them together.

        Raises:
          ValueError: If this is the result of one run, or `index` is out of its range.
        """
        if not self._is_of_seeds():
            raise ValueError(
                "of_seed must be called on the result of several keys, got that of one run: it is "
                "the result itself."
            )
        index = _validate.integer(index=index, minimum=0, maximum=len(self.history) - 1)
        state = jax.tree.map(lambda x: x[index], self.state)
        return self._replace(state=state, history=cast(Any, self.history)[index])

    def _is_of_seeds(self) -> bool:
        return bool(self.history) and isinstance(self.history[0], list)


_FINITE = jax.jit(all_finite)
_FINITE_OF_SEEDS = jax.jit(jax.vmap(all_finite))


def what_went_wrong(
    history: list[WindowRecord],
    state: TrainState,
    source_ended: bool,
    seen: int,
    end: int,
    num_examples: int,
    seed: int | None = None,
) -> list[str]:
    """What a user should know of a run that has ended, besides its result.

    Args:
      history: Of the run.
      state: At the end; of several seeds, that of all of them.
      source_ended: Whether the data have ended before the run.
      seen: Examples so far.
      end: Where the run was to end, in examples.
      num_examples: The budget.
      seed: Which of several seeds this is.
    """
    found = []
    if source_ended:
        found.append(
            f"data.train ended after {seen} of {end} examples: pass a source that goes on, such as "
            "arbiter_jax.datasets.epochs(...), or a smaller num_examples."
        )
    elif not history and (seen == 0 or 10 * (end - seen) >= num_examples) and seen < end:
        limit = "num_examples" if end == num_examples else "stop_at"
        found.append(
            f"fit has trained nothing: the next batch is larger than the {end - seen} examples that "
            f"are left of {end}; raise {limit} or let the rule take smaller batches."
        )
    elif seen > num_examples:  # a resumed run has the history of the one before
        found.append(
            f"fit has trained nothing: state has seen {seen} examples, more than the num_examples of "
            f"{num_examples}, which include them; raise it."
        )
    losses = [record.info.loss for record in history]
    (bad,) = np.nonzero(~np.isfinite(np.concatenate([*losses, np.zeros(0)])))
    if bad.size:
        num_steps = sum(record.num_steps for record in history)
        found.append(
            f"{bad.size} of {num_steps} steps had a loss that was not finite, the first was step "
            f"{bad[0]} of this call: look for such numbers in data.train, lower the learning rate or "
            "clip the gradient; optax.apply_if_finite(tx, 5) skips such steps."
        )
    elif history:
        found += _what_no_loss_shows(state, seed)
    return found


def _what_no_loss_shows(state: TrainState, seed: int | None) -> list[str]:
    """Numbers that are not finite in a run all of whose losses are."""
    of_seed = lambda x: np.asarray(x) if seed is None else np.asarray(x)[seed]
    found = []
    finite = (_FINITE if seed is None else _FINITE_OF_SEEDS)(state.params)
    if not of_seed(finite):
        found.append(
            "params are not finite at the end, although every loss was: the gradient of loss_fn is "
            "not finite somewhere, as that of jnp.sqrt at 0; jax_debug_nans finds where."
        )
    num_steps = int(of_seed(state.num_steps))
    counts = lambda x: any(hasattr(x, name) for name in ("num_skipped", "total_notfinite"))
    for inner in jax.tree.leaves(state.opt_state, is_leaf=counts):
        name, least = "num_skipped", max(4, num_steps // 2)  # some rules skip a step now and then
        if hasattr(inner, "total_notfinite"):
            name, least = "total_notfinite", int(of_seed(state.num_nonfinite)) + 1
        if not hasattr(inner, name) or (count := int(of_seed(getattr(inner, name)))) < least:
            continue
        found.append(
            f"{type(inner).__name__}.{name} is {count} after {num_steps} steps whose losses were "
            "finite: what it reads was not finite or carried no information; look at the gradient "
            "of loss_fn."
        )
    return found
