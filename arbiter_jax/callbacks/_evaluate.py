"""Loss and accuracy on other data while a run goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from arbiter_jax import _validate
from arbiter_jax.base import PyTree, WeightedLoss
from arbiter_jax.metrics import Metrics, check_split
from arbiter_jax.metrics import evaluate as evaluate_split
from arbiter_jax.training import RunStart, TrainState, WindowRecord


def evaluate(
    predict: Callable[..., PyTree],
    loss: Callable[[PyTree, PyTree], Any | WeightedLoss],
    data: PyTree,
    every: int = 1,
    *,
    every_examples: int | None = None,
    name: str = "evaluation",
    stop: Callable[[list[Metrics]], Any] | None = None,
    chunk_size: int = 1024,
) -> Evaluate:
    """Computes mean loss and accuracy on a split while a run goes on, and can end it.

    Every few windows, and after the last one, ``record.evaluation`` gets "evaluation/loss" and, where
    :func:`arbiter_jax.metrics.evaluate` finds one, "evaluation/accuracy". They stay in the history of
    the result and in checkpoints. The callbacks after this one see them: put it before those that
    write, and stop with `stop` or with a function of your own after it.

    Args:
      predict: ``predict(params, inputs) -> outputs``, with a third argument `model_state` if the run
        has one.
      loss: ``(outputs, labels) -> float[M]``, one loss per example; see
        :func:`arbiter_jax.metrics.evaluate`.
      data: ``(inputs, labels)``, two arrays or pytrees of arrays with leading axes of equal length.
        Arrays of NumPy are moved to the device each time. Of several processes, all evaluate the same
        data.
      every: Windows between two evaluations, an integer >= 1. The last window is always evaluated.
      every_examples: Training examples between two evaluations, an integer >= 1, instead of `every`:
        after the window that passes a multiple of it, so that runs whose batch sizes differ are
        evaluated at about the same examples. A window is `window` steps of `fit`, or as few as the
        rule asks for.
      name: What the results are called, text. Two of one run have different names.
      stop: ``stop(results) -> bool`` with the list of all :class:`arbiter_jax.metrics.Metrics` of the
        run so far, the newest last; a true result ends the run. A resumed run has the earlier ones.
      chunk_size: Number of examples per call of `predict`, an integer >= 1.

    Returns:
      A callback for :func:`arbiter_jax.fit`. It refuses several seeds.

    Raises:
      ValueError: If an argument is not what it should be, or is out of its range.

    *Guarantees*:
      * Training is bit for bit the same with it.
      * A resumed run evaluates as a whole one does.

    End a run when three evaluations in a row were not better than the best before them:

    >>> import arbiter_jax as aj, jax.numpy as jnp, optax
    >>> def stop(results):
    ...     losses = [metrics.loss for metrics in results]
    ...     return len(losses) > 3 and min(losses[-3:]) >= min(losses[:-3])
    >>> predict, loss = lambda w, x: w * x, lambda outputs, labels: (outputs - labels) ** 2
    >>> loss_fn = lambda w, batch: loss(predict(w, batch[0]), batch[1])
    >>> x = jnp.ones(50)
    >>> test = aj.callbacks.evaluate(predict, loss, (x, x), every=2, name="test", stop=stop)
    >>> tx = optax.chain(optax.sgd(0.25), aj.schedulers.constant(6))
    >>> result = aj.fit(loss_fn, jnp.zeros(()), tx, aj.Data((x, x)), num_examples=30, window=1,
    ...     callbacks=test)
    >>> [record.evaluation for record in result.history]
    [{}, {'test/loss': 0.0625}, {}, {'test/loss': 0.00390625}, {'test/loss': 0.0009765625}]
    """
    every = _validate.integer(every=every, minimum=1)
    if every_examples is not None:
        every_examples = _validate.integer(every_examples=every_examples, minimum=1)
        if every != 1:
            raise ValueError(
                f"every and every_examples exclude each other, got {every} and {every_examples}: pass "
                "one of them."
            )
    chunk_size = _validate.integer(chunk_size=chunk_size, minimum=1)
    _validate.function("predict(params, inputs) -> outputs", predict=predict)
    _validate.function("loss(outputs, labels) -> float[M]", loss=loss)
    if stop is not None:
        _validate.function("stop(results) -> bool", stop=stop)
    if not isinstance(name, str) or not name:
        raise ValueError(f"name must be text, got {_validate.shown(name)}.")
    check_split(data)
    return Evaluate(predict, loss, data, every, every_examples, name, stop, chunk_size)


class Evaluate:
    """The callback of :func:`evaluate`."""

    def __init__(self, predict, loss, data, every, every_examples, name, stop, chunk_size):
        self._predict, self._loss, self._data, self._chunk_size = predict, loss, data, chunk_size
        self._every, self._every_examples, self.name, self._stop = every, every_examples, name, stop
        self._results: list[Metrics] = []

    def begin(self, start: RunStart) -> None:
        """Takes over what a resumed run has found before."""
        if start.num_seeds is not None:
            raise ValueError(
                "callbacks.evaluate must be given one run, got one of "
                f"{start.num_seeds} seeds: run the seeds one after the other, or call "
                "jax.vmap or metrics.evaluate on the parameters of each."
            )
        names = [one.name for one in start.callbacks if isinstance(one, Evaluate)]
        if names.count(self.name) > 1:
            raise ValueError(
                f"name must be different for each callbacks.evaluate of a run, got {self.name!r} "
                f"{names.count(self.name)} times: pass name='test', say."
            )
        self._results = [self._noted(record) for record in start.history if self._is_noted(record)]

    def __call__(self, record: WindowRecord, state: TrainState) -> bool:
        """Evaluates if it is time; whether the run ends."""
        if self._is_noted(record):  # a resumed run that had ended here
            return self._stops()
        if not self._is_due(record):
            return False
        self._note(record, state)
        return self._stops()

    def end(self, record: WindowRecord, state: TrainState) -> None:
        """Evaluates the last window if it was not its turn."""
        if not self._is_noted(record):
            self._note(record, state)

    def _is_due(self, record: WindowRecord) -> bool:
        if self._every_examples is None:
            return (record.window_index + 1) % self._every == 0
        before = record.num_examples - int(record.info.batch_size.sum())
        return record.num_examples // self._every_examples > before // self._every_examples

    def _note(self, record: WindowRecord, state: TrainState) -> None:
        found = evaluate_split(
            self._predict, self._loss, state.params, self._data, state.model_state, self._chunk_size
        )
        self._results.append(found)
        record.evaluation[f"{self.name}/loss"] = found.loss
        if not math.isnan(found.accuracy):
            record.evaluation[f"{self.name}/accuracy"] = found.accuracy

    def _is_noted(self, record: WindowRecord) -> bool:
        return f"{self.name}/loss" in record.evaluation

    def _noted(self, record: WindowRecord) -> Metrics:
        accuracy = record.evaluation.get(f"{self.name}/accuracy", math.nan)
        return Metrics(record.evaluation[f"{self.name}/loss"], accuracy)

    def _stops(self) -> bool:
        return self._stop is not None and bool(self._stop(list(self._results)))
