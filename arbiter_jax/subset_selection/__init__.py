"""Dynamic Batch Adaptation: which examples of a batch the step of each layer is made of.

The gradients of the single examples are analysed, and for each layer the update is the mean over
the subset that scores best on a metric such as the variance of that mean. Among n examples in an
order, only the n subsets of the first k are scored, all at once, from inner products of gradients.

Reference: Simionescu, Stoica and Herscovici, "Dynamic Batch Adaptation", 2022, arXiv:2208.00815.
Its code is not public: order, metrics and edge cases are this project's reading of it.
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
