"""An optimizer, its learning rate and its batch size, in one transformation."""

from __future__ import annotations

import optax

from arbiter_jax import _validate
from arbiter_jax.schedulers import _seesaw
from arbiter_jax.schedulers._first_update import first_update
from arbiter_jax.schedulers._gradient_noise_scale import gradient_noise_scale
from arbiter_jax.schedulers._rate import scale_by_rate


def seesaw(
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    num_examples: int,
    batch_size: int,
    max_batch_size: int,
    exponent: float | str = 1.0,
    trade: float = 0.8,
    doubling: bool = False,
    limit: str | optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The same loss in fewer steps: grows the batch where a schedule would lower the rate.

    .. math::
      B(n) = round(clip(\min(B_0 \alpha(n)^{-g}, limit), B_0, B_{max})), \qquad
      \mathrm{rate}(n) = s(n) \left( \frac{B}{B_0} \right)^p

    with s the schedule, alpha(n) its rate over its peak so far, and B the size that the step really
    had: whatever keeps it back (the largest size, a limit, a window that is not over) leaves the
    rest of the decay to the rate. It holds while noise dominates the gradient, that is for B_0 below
    the critical batch size. ``limit="noise_scale"`` measures where that ends; a batch that is
    large already should not grow without it.

    Args:
      optimizer: Any optax optimizer with a learning rate of 1; its updates are scaled. Its decoupled
        weight decay is scaled with them: :func:`arbiter_jax.adamw_in_examples` keeps it per example.
      schedule: s, a learning rate by the number of examples seen: the one that you use today, in
        examples in place of steps.
      num_examples: D, the budget in examples, an integer >= 1.
      batch_size: B_0, the size that the schedule was tuned at, an integer >= 1.
      max_batch_size: B_max, an integer >= batch_size.
      exponent: p, in (0, 2]. 1 is the linear rule of SGD and momentum, and what ended lowest for AdamW
        in ``experiments/fewer_steps``; 0.5 is what Adam's theory asks for where noise dominates. Or
        "measured", which follows the noise scale N of the run from 0.5, where noise dominates, to 1:
        :math:`\mathrm{rate} = s \frac{B}{B_0}\sqrt{(1 + N/B)/(1 + N/B_0)}`.
      trade: g, how much of the decay becomes batch size, in [0, 1]; 0 is the schedule as it was.
      doubling: Whether B is rounded down to B_0, 2 B_0, 4 B_0, ...: no size is padded if B_0 is a power
        of two, for more steps (.68 instead of .56 of a half cosine's). The rate makes up for it.
      limit: None; "noise_scale", beyond which a larger batch brings little (in the l2 norm for
        exponent 1, in the l1 norm for any other); "noise_scale_l1", in the l1 norm, which is Adam's;
        or a batch-size rule whose size is the limit.

    Returns:
      A whole chain with one batch-size rule, for `aj.fit`, `aj.run_window` or a loop of one's own,
      which passes `batch_size` and `num_examples`. How many steps it will take:
      :func:`arbiter_jax.schedulers.seesaw_schedule`.

    Raises:
      ValueError: If an argument is out of its range.
      TypeError: If `update` is called without a signal.
      UserWarning: If the first update of the optimizer shows a learning rate other than 1 or a wrong
        sign, if the schedule seems to count steps, or if the limit is not that of the optimizer.

    Reference:
      Meterez et al., "Seesaw", arXiv:2510.14717 (Adam); Smith et al., arXiv:1711.00489 (SGD).

    *Guarantees*:
      * No trade, no change: with `trade=0` a run is that of the optimizer at its schedule.

    >>> import arbiter_jax as aj, jax.numpy as jnp
    >>> cosine = optax.cosine_decay_schedule(0.1, 6_400)
    >>> tx = aj.seesaw(optax.sgd(1.0), cosine, num_examples=6_400, batch_size=8, max_batch_size=64)
    >>> loss_fn = lambda w, batch: (w - batch) ** 2 / 2
    >>> result = aj.fit(loss_fn, jnp.zeros(()), tx, aj.Data(jnp.ones(64)), num_examples=6_400)
    >>> sizes = [record.batch_size for record in result.history]
    >>> sizes[0], sizes[-1], int(result.state.num_steps)  # of 800 at a constant size
    (8, 64, 448)
    """
    if isinstance(optimizer, optax.MultiSteps):
        raise ValueError(
            "optimizer must be the one that optax.MultiSteps wraps: wrap seesaw instead, with "
            "batch_size divided by the number of calls, or use arbiter_jax.accumulate."
        )
    if not isinstance(optimizer, optax.GradientTransformation):
        raise ValueError(
            "optimizer must be an optax optimizer with a learning rate of 1, for example "
            f"optax.sgd(1.0, momentum=0.9), got {optimizer!r}."
        )
    noise = None
    if isinstance(exponent, str):
        _validate.one_of(("measured",), exponent=exponent)
        noise = gradient_noise_scale(norm="l1", decay=0.9, measure_every=10)
    else:
        exponent = _validate.in_range(0, 2, closed="right", exponent=exponent)
    if isinstance(limit, str) and limit == "noise_scale" and exponent != 1:
        limit = "noise_scale_l1"
    rule = _seesaw.seesaw(
        schedule,
        num_examples=num_examples,
        batch_size=batch_size,
        max_batch_size=max_batch_size,
        trade=trade,
        doubling=doubling,
        limit=limit,
    )
    _warn_of_the_optimizer(optimizer, schedule, num_examples, batch_size, limit)
    power = None if isinstance(exponent, str) else exponent
    return optax.chain(optimizer, scale_by_rate(schedule, int(batch_size), power, noise), rule)


def _warn_of_the_optimizer(
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    num_examples: int,
    batch_size: int,
    limit: object,
) -> None:
    """Warns of an optimizer that the schedule, or the limit, does not fit."""
    found = first_update(optimizer, batch_size)
    if found is None:
        return
    _, rates = _seesaw.rates_of(schedule, num_examples)
    rate, peak = found.learning_rate, rates.max()
    if rate < 0:
        _validate.warn(
            "optimizer adds the gradient to the parameters instead of subtracting it: end it with "
            "optax.scale(-1.0), or pass a whole optimizer such as optax.adamw(1.0)."
        )
    elif rate < 0.5 and peak < 0.5:
        _validate.warn(
            f"optimizer begins with a learning rate of its own, about {rate:.2g}, and seesaw "
            f"multiplies it by that of schedule, at most {peak:.2g}: pass an optimizer with a "
            "learning rate of 1, for example optax.sgd(1.0)."
        )
    if isinstance(limit, str) and limit == "noise_scale" and found.is_normalized:
        _validate.warn(
            'optimizer normalizes its updates, as Adam does, and limit="noise_scale" measures noise '
            'in the l2 norm, which is that of SGD: pass limit="noise_scale_l1".'
        )
