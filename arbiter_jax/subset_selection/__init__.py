"""Dynamic Batch Adaptation: chooses, for each layer, the examples of a batch to step on.

The update of a layer is the mean of the per-example gradients over the subset that scores best on a
metric, such as the variance of that mean. The n examples are put in order, and only the n subsets
"the first k" are scored, all at once, from the inner products of the gradients.

Reference: Simionescu, Stoica and Herscovici, "Dynamic Batch Adaptation", 2022, arXiv:2208.00815.
Its code is not public: order, metrics and edge cases are this project's interpretation.
"""

from arbiter_jax.subset_selection._aggregator import (
    DynamicBatchAdaptationState,
    dynamic_batch_adaptation,
)
from arbiter_jax.subset_selection._prefixes import group_names, prefix_scores
from arbiter_jax.subset_selection._select_subset import select_subset
from arbiter_jax.subset_selection._subset_gradients import SubsetGradient, subset_gradients

__all__ = [
    "DynamicBatchAdaptationState",
    "SubsetGradient",
    "dynamic_batch_adaptation",
    "group_names",
    "prefix_scores",
    "select_subset",
    "subset_gradients",
]
