"""Batch sizes that adapt while a network trains, as optax transformations."""

import importlib
from typing import TYPE_CHECKING, Any

from arbiter_jax import (
    base,
    batching,
    gradients,
    hyper_learning,
    learning_rate,
    metrics,
    objectives,
    schedulers,
    training,
)
from arbiter_jax._version import __version__
from arbiter_jax.base import GradStats, StepInfo, WeightedLoss, get_batch_size
from arbiter_jax.batching import all_buckets, init_sampler, next_bucket, sample_batch
from arbiter_jax.gradients import gradient_stats
from arbiter_jax.hyper_learning import (
    Agent,
    ArbiterState,
    arbiter,
    conv_agent,
    mlp_agent,
    re_anchor,
    to_batch_size,
    to_logit,
    warm_up,
)
from arbiter_jax.learning_rate import (
    adam_hd,
    adamp,
    adamw_in_examples,
    adascale,
    autowu,
    scale_by_batch_size,
    sgd_hd,
)
from arbiter_jax.objectives import impulse_response, noise_response
from arbiter_jax.schedulers._seesaw_chain import seesaw
from arbiter_jax.training import (
    Data,
    FitResult,
    TrainState,
    WindowRecord,
    accumulate,
    fit,
    init_state,
    next_window,
    run_window,
    value_grad_and_signals,
)

# What a run need not have is imported when it is first used, which halves the time of the import.
_LAZY = {
    "attach": "models",
    "callbacks": "",
    "checkpoints": "callbacks",
    "critical_batch_size": "",
    "datasets": "",
    "dynamic_batch_adaptation": "subset_selection",
    "measure_critical_batch_size": "critical_batch_size",
    "models": "",
    "noisy_quadratic": "",
    "plotting": "",
    "select_subset": "subset_selection",
    "stochastic_meta_descent": "",
    "subset_gradients": "subset_selection",
    "subset_selection": "",
}
if TYPE_CHECKING:
    from arbiter_jax import (
        callbacks,
        critical_batch_size,
        datasets,
        models,
        noisy_quadratic,
        plotting,
        stochastic_meta_descent,
        subset_selection,
    )
    from arbiter_jax.callbacks import checkpoints
    from arbiter_jax.critical_batch_size import measure_critical_batch_size
    from arbiter_jax.models import attach
    from arbiter_jax.subset_selection import (
        dynamic_batch_adaptation,
        select_subset,
        subset_gradients,
    )

# fmt: off
__all__ = [
    "Agent", "ArbiterState", "Data", "FitResult", "GradStats", "StepInfo", "TrainState",
    "WeightedLoss", "WindowRecord", "__version__", "accumulate", "adam_hd", "adamp",
    "adamw_in_examples", "adascale", "all_buckets", "arbiter", "attach", "autowu", "base",
    "batching", "callbacks", "checkpoints", "conv_agent", "critical_batch_size", "datasets",
    "dynamic_batch_adaptation", "fit", "get_batch_size", "gradient_stats", "gradients",
    "hyper_learning", "impulse_response", "init_sampler", "init_state", "learning_rate",
    "measure_critical_batch_size", "metrics", "mlp_agent", "models", "next_bucket", "next_window",
    "noise_response", "noisy_quadratic", "objectives", "plotting", "re_anchor", "run_window",
    "sample_batch", "scale_by_batch_size", "schedulers", "seesaw", "select_subset", "sgd_hd",
    "stochastic_meta_descent", "subset_gradients", "subset_selection", "to_batch_size", "to_logit",
    "training", "value_grad_and_signals", "warm_up",
]
# fmt: on


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package = _LAZY[name]
    module = importlib.import_module(f"{__name__}.{package or name}")
    value = getattr(module, name) if package else module
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
