"""Part C of :mod:`experiments.fewer_steps`: the steps that published schedules save."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

import arbiter_jax as aj
from arbiter_jax import schedulers
from experiments import _runner
from experiments.fewer_steps import decays

# The share of the steps that is left: of the quarter cosine and of WSD by arXiv:2510.14717, of the
# others by the same integral.
LEFT = {
    "quarter cosine": 2 / np.pi,
    "WSD-20": 0.9,
    "half cosine": 0.5,
    "linear": 0.5,
}


def run(names: tuple[str, ...] = tuple(LEFT), num_examples: int = 32_000) -> list[dict[str, Any]]:
    """Predicted and counted steps, with trade 1, no warm-up and no cap."""
    rows = []
    for name in names:
        schedule = decays.DECAYS[name](num_examples)
        plan = {
            "num_examples": num_examples,
            "batch_size": 8,
            "max_batch_size": num_examples,
            "trade": 1.0,
        }
        result = aj.fit(
            _loss,
            jnp.zeros(()),
            aj.seesaw(optax.sgd(1.0), schedule, exponent=1.0, **plan),
            aj.Data(jnp.ones(64)),
            num_examples=num_examples,
            window=20,
        )
        baseline = num_examples // plan["batch_size"]
        predicted = schedulers.seesaw_schedule(schedule, **plan).num_steps(num_examples, window=20)
        rows.append(
            {
                "part": "C",
                "method": "seesaw",
                "decay": name,
                "published": LEFT[name],
                "predicted": predicted,
                "num_steps": int(result.state.num_steps),
                "share": predicted / baseline,
            }
        )
    return rows


def _loss(w, batch):
    return (w - batch) ** 2 / 2


def table(rows: list[dict[str, Any]]) -> Any:
    """The table of part C."""
    return _runner.make_table(
        "C. the steps that are left: trade 1, no warm-up, no cap",
        ["decay", "by the integral", "predicted, share", "predicted", "counted by fit"],
        [
            [
                row["decay"],
                f"{row['published']:.3f}",
                f"{row['share']:.3f}",
                f"{row['predicted']:,}",
                f"{row['num_steps']:,}",
            ]
            for row in rows
        ],
        "Published: 36% saved on the quarter cosine, 10% on WSD-20 (arXiv:2510.14717).",
    )
