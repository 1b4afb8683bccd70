"""One training run: a task, a method, and the row of results that the run yields."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

import arbiter_jax as aj
from arbiter_jax import metrics
from arbiter_jax.training import no_unfinished_window
from experiments._runner import UsageError


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set, a model and a loss: everything that a method trains on."""

    dataset: Any
    data: aj.Data
    model: Any
    losses: Any
    per_example_loss: Callable[..., jax.Array]

    @property
    def num_train(self) -> int:
        return len(self.dataset.train[1])


def make_task(dataset: str, model: str, hidden_sizes: Sequence[int] = (128,)) -> Task:
    """A classification task, from the name of a data set and the name of a model.

    Args:
      dataset: A name that :func:`arbiter_jax.datasets.load` knows, with class labels.
      model: "mlp", "lenet", "vgg11" or "wrn_16_4".
      hidden_sizes: Of the perceptron.

    Raises:
      UsageError: If the model is unknown, or the data set has no class labels.
    """
    from arbiter_jax import datasets, models

    loaded = datasets.load(dataset)
    if not loaded.num_classes:
        raise UsageError(f"--dataset must have class labels, got {dataset!r}.")
    shape, num_classes = loaded.input_shape, loaded.num_classes
    known: dict[str, Callable[[], Any]] = {
        "mlp": lambda: models.mlp(shape, hidden_sizes, num_classes),
        "lenet": lambda: models.lenet(shape, num_classes),
        "vgg11": lambda: models.vgg11(shape, num_classes),
        "wrn_16_4": lambda: models.wide_resnet(shape, num_classes, depth=16, widen_factor=4),
    }
    if model not in known:
        raise UsageError(f"--model must be one of {', '.join(map(repr, known))}, got {model!r}.")
    net = known[model]()
    loss = optax.softmax_cross_entropy_with_integer_labels
    data = jax.tree.map(jax.numpy.asarray, aj.Data(loaded.train, loaded.validation))
    return Task(loaded, data, net, models.make_losses(net, loss), loss)


def train(
    task: Task,
    name: str,
    method: Any,
    *,
    seed: int,
    num_examples: int,
    window: int,
    learning_rate: float,
    callbacks: Sequence[Any] = (),
    transform_batch: Callable[[jax.Array, Any], Any] | None = None,
    milestones: Sequence[tuple[int, int]] = (),
    **columns: Any,
) -> tuple[dict[str, Any], list[dict[str, Any]], aj.FitResult]:
    """Trains with one method and one seed, and evaluates once, at the end.

    Args:
      task: What to train on.
      name: Name of the method, for the row.
      method: A Method of :mod:`experiments._methods`.
      seed: Seed of the parameters, of the order of the examples, and of the method.
      num_examples: The budget in training examples.
      window: Steps between two decisions.
      learning_rate: Of the optimizer; in the row as well.
      callbacks: Passed to `fit`.
      transform_batch: Passed to `fit`: augmentation.
      milestones: (number of examples, batch size) pairs, in order: when to re-anchor an Arbiter,
        and at which size.
      **columns: Further columns of the row.

    Returns:
      (row, windows, result): a row of summary.json, rows of metrics.csv, and the `FitResult`.
    """
    model_key, run_key = jax.random.split(jax.random.PRNGKey(seed))
    params, model_state = task.model.init(model_key)
    start = method.start(seed=seed, learning_rate=learning_rate)
    state = aj.init_state(params, start, run_key, model_state)
    results = []
    for end, size in [*milestones, (num_examples, None)]:
        result = aj.fit(
            task.losses.loss_fn,
            params,
            method.tx,
            task.data,
            num_examples=num_examples,
            stop_at=end,
            window=window,
            state=state,
            callbacks=callbacks,
            transform_batch=transform_batch,
        )
        state = result.state
        if size is not None:
            # The new anchor holds from here on, also in the middle of a window.
            opt_state = aj.re_anchor(state.opt_state, size)
            state = state._replace(opt_state=opt_state, unfinished=no_unfinished_window())
        results.append(result)
    result = aj.FitResult(
        state=state,
        history=[record for part in results for record in part.history],
        num_compilations=sum(part.num_compilations for part in results),
        num_cache_hits=sum(part.num_cache_hits for part in results),
        seconds=sum(part.seconds for part in results),
    )
    evaluate = lambda split: metrics.evaluate(
        task.losses.predict, task.per_example_loss, state.params, split, state.model_state
    )
    test, validation = evaluate(task.dataset.test), evaluate(task.dataset.validation)
    shared = {"method": name, "seed": seed, "learning_rate": learning_rate, **columns}
    row = {
        **shared,
        "test_loss": test.loss,
        "test_accuracy": test.accuracy,
        "validation_loss": validation.loss,
        "num_steps": int(state.num_steps),
        "num_examples": int(state.num_examples),
        "seconds": result.seconds,
        "num_compilations": result.num_compilations,
        "num_cache_hits": result.num_cache_hits,
        "num_nonfinite": int(state.num_nonfinite),
        "batch_sizes": [record.batch_size for record in result.history],
    }
    windows = [
        {**shared, **{k: v for k, v in record._asdict().items() if k != "info"}}
        for record in result.history
    ]
    return row, windows, result
