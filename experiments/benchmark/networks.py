"""The networks that :mod:`experiments.benchmark` times, and the windows of training that it runs."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import arbiter_jax as aj
from arbiter_jax import models

SHAPE = (28, 28, 1)
NUM_TRAIN, NUM_VALIDATION = 8192, 2048

HELD: dict[str, Any] = {
    "min_batch_size": 1,
    "max_batch_size": 2**20,
}  # limits that no rule here reaches

Timed = Callable[[], float]  # runs one window and returns the milliseconds per step


def timed_steps(step: Callable, carry: Any, window: int, scan: bool) -> Timed:
    """A window of ``step(carry, None) -> (carry, value)``: one `lax.scan`, or a loop in Python."""

    @functools.partial(jax.jit, donate_argnums=0)
    def program(carry):
        return jax.lax.scan(step, carry, length=window) if scan else step(carry, None)

    def run() -> float:
        nonlocal carry
        start = time.perf_counter()
        for _ in range(1 if scan else window):
            carry, value = program(carry)
        jax.block_until_ready((carry, value))
        return 1e3 * (time.perf_counter() - start) / window

    return run


def timed_windows(
    params,
    data: aj.Data,
    tx,
    batch_size: int,
    window: int,
    *,
    start: aj.TrainState | None = None,
    **options,
) -> Timed:
    """Milliseconds of a step in windows of `run_window`, from a state; `options` are its own."""
    state = [aj.init_state(params, tx, jax.random.PRNGKey(1)) if start is None else start]
    options = {"bucket_size": aj.next_bucket(batch_size)} | options

    def run() -> float:
        start = time.perf_counter()
        state[0], info = aj.run_window(
            state[0],
            data,
            window,  # num_steps is traced, as in `fit`, where a window may be shorter
            tx=tx,
            window=window,
            **options,
        )
        jax.block_until_ready((state[0], info))
        return 1e3 * (time.perf_counter() - start) / window

    return run


class Network:
    """A model with random data: the time of a step does not depend on the values."""

    def __init__(self, name: str, model: models.Model, agent: aj.Agent):
        self.name, self.model, self.agent = name, model, agent
        key = jax.random.PRNGKey(0)
        inputs = jax.random.normal(key, (NUM_TRAIN, *SHAPE))
        labels = jax.random.randint(key, (NUM_TRAIN,), 0, 10)
        self.data = aj.Data((inputs, labels), (inputs[:NUM_VALIDATION], labels[:NUM_VALIDATION]))
        self.losses = models.make_losses(model, optax.softmax_cross_entropy_with_integer_labels)
        self.params, _ = model.init(key)
        self.optimizer = optax.sgd(0.01, momentum=0.9)

    def arbiter(self, batch_size: int, agent: aj.Agent | None = None, **options):
        """Arbiter in one endless window: the batch size never changes, every other cost is paid."""
        rule = aj.arbiter(
            agent or self.agent,
            self.losses.response_loss,
            num_features=self.model.num_features,
            initial_batch_size=batch_size,
            window=10**9,
            **options,
        )
        return optax.chain(self.optimizer, rule)

    def timed(self, tx, batch_size: int, window: int, **options) -> Timed:
        """Windows of `run_window` with a transformation."""
        if "gradient_fn" not in options:
            options["loss_fn"] = self.losses.loss_fn
        return timed_windows(self.params, self.data, tx, batch_size, window, **options)

    def plain(self, batch_size: int, window: int) -> Timed:
        """Windows of `run_window` at a constant batch size."""
        tx = optax.chain(self.optimizer, aj.schedulers.constant(batch_size))
        return self.timed(tx, batch_size, window)

    def by_hand(self, batch_size: int, window: int, scan: bool) -> Timed:
        """The same training with optax alone: a scan, or a Python loop over a jitted step."""
        inputs, labels = self.data.train

        def step(carry, _):
            params, opt_state, key = carry
            key, batch_key = jax.random.split(key)
            rows = jax.random.randint(batch_key, (batch_size,), 0, NUM_TRAIN)
            loss = lambda p: jnp.mean(self.losses.loss_fn(p, (inputs[rows], labels[rows])))
            value, grads = jax.value_and_grad(loss)(params)
            updates, opt_state = self.optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state, key), value

        start = (self.params, self.optimizer.init(self.params), jax.random.PRNGKey(2))
        carry = jax.tree.map(lambda x: jnp.array(x, copy=True), start)
        return timed_steps(step, carry, window, scan)


class Task:
    """A network, random data of its kind, and the chains that train it."""

    def __init__(self, name: str, model: models.Model, data: Any, loss: Callable, window: int):
        self.name, self.model, self.window = name, model, window
        self.data = aj.Data(data, data)
        self.losses = models.make_losses(model, loss)
        self.params, self.model_state = jax.jit(model.init)(jax.random.key(0))
        self.optimizer = optax.sgd(0.01, momentum=0.9)
        # An agent that flattens and reads what is small: its cost should not be that of its inputs.
        self.agent = aj.mlp_agent(data[0].shape[1:], hidden_sizes=(32,))
        self.options = {
            "loss_fn": self.losses.loss_fn,
            "inputs_of": lambda batch: batch[0].astype(jnp.float32),
        }
        self.plain = optax.chain(self.optimizer, aj.schedulers.constant(1, **HELD))

    def chains(self, batch_size: int) -> dict[str, Any]:
        """The windows that are compared with the hand-written step, each at one size throughout."""
        held: dict[str, Any] = {"min_batch_size": batch_size, "max_batch_size": batch_size}
        arbiter = aj.arbiter(
            self.agent,
            self.losses.response_loss,
            num_features=self.model.num_features,
            initial_batch_size=batch_size,
            window=10**9,
        )
        rules = {
            "noise scale": aj.schedulers.gradient_noise_scale(**held),
            "noise floor": aj.schedulers.noise_floor(**held),
            "Arbiter": arbiter,
        }
        chains = {name: optax.chain(self.optimizer, rule) for name, rule in rules.items()}
        return {"plain": self.plain, **chains}

    def timed(self, tx: Any, batch_size: int, **options: Any) -> Timed:
        """Milliseconds of a step in windows of `run_window`, all of them at this size."""
        state = aj.init_state(self.params, tx, 1, self.model_state)
        # One chain, and so at most one program, for all sizes of a rule that holds its size.
        size = jnp.asarray(batch_size, jnp.int32)
        start = state._replace(opt_state=optax.tree.set(state.opt_state, batch_size=size))
        options = {"start": start} | self.options | options
        return timed_windows(self.params, self.data, tx, batch_size, self.window, **options)

    def step_by_hand(self, batch_size: int) -> tuple[Callable, Any]:
        """A step with optax and `jax.grad` alone, and the carry to start from."""
        inputs, labels = self.data.train
        mask = jnp.ones(batch_size, bool)

        def step(carry, _):
            params, model_state, opt_state, key = carry
            key, batch_key = jax.random.split(key)
            rows = jax.random.randint(batch_key, (batch_size,), 0, len(inputs))
            batch = (inputs[rows], labels[rows])

            def mean_loss(params):
                if model_state is None:
                    losses, new_state = self.losses.loss_fn(params, batch), None
                else:
                    losses, new_state = self.losses.loss_fn(params, batch, model_state, mask, key)
                return jnp.mean(getattr(losses, "losses", losses)), new_state

            (value, new_state), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
            updates, opt_state = self.optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), new_state, opt_state, key), value

        start = (self.params, self.model_state, self.optimizer.init(self.params), jax.random.key(2))
        carry = jax.tree.map(lambda x: jnp.array(x, copy=True), start)
        return step, carry

    def by_hand(self, batch_size: int) -> Timed:
        """Milliseconds of a jitted step in a Python loop, with optax and `jax.grad` alone."""
        step, carry = self.step_by_hand(batch_size)
        return timed_steps(step, carry, self.window, scan=False)


class LeNet(nnx.Module):
    """LeNet-5 for 28 x 28 pixels, as `models.lenet`, with a convolution of the caller's choice."""

    shape = (28, 28, 1)

    def __init__(self, convolution: Callable[..., jax.Array], rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, conv_general_dilated=convolution, rngs=rngs)
        self.conv1 = conv(1, 6, (5, 5), padding="SAME")
        self.conv2 = conv(6, 16, (5, 5), padding="VALID")
        self.dense1 = nnx.Linear(400, 120, rngs=rngs)
        self.dense2 = nnx.Linear(120, 84, rngs=rngs)
        self.head = nnx.Linear(84, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits, float[M, 10]."""
        x = models.max_pool(nnx.relu(self.conv1(x)))
        x = models.max_pool(nnx.relu(self.conv2(x)))
        x = nnx.relu(self.dense1(x.reshape(x.shape[0], -1)))
        return self.head(nnx.relu(self.dense2(x)))


class _Block(nnx.Module):
    """BatchNorm, ReLU and 3 x 3 convolution, twice, plus a shortcut."""

    def __init__(self, num_inputs: int, num_outputs: int, stride: int, conv: Any, rngs: nnx.Rngs):
        self.norm1 = nnx.BatchNorm(num_inputs, rngs=rngs)
        self.conv1 = conv(num_inputs, num_outputs, (3, 3), strides=stride, padding=1)
        self.norm2 = nnx.BatchNorm(num_outputs, rngs=rngs)
        self.conv2 = conv(num_outputs, num_outputs, (3, 3), padding=1)
        self.shortcut = nnx.data(
            conv(num_inputs, num_outputs, (1, 1), strides=stride, padding=0)
            if num_inputs != num_outputs
            else None
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns float[M, height / stride, width / stride, num_outputs]."""
        y = nnx.relu(self.norm1(x))
        x = x if self.shortcut is None else self.shortcut(y)
        return x + self.conv2(nnx.relu(self.norm2(self.conv1(y))))


class WideResNet(nnx.Module):
    """WRN-16-4 for 32 x 32 pixels, as `models.wide_resnet`, with a convolution of one's choice."""

    shape = (32, 32, 3)

    def __init__(self, convolution: Callable[..., jax.Array], rngs: nnx.Rngs):
        conv = functools.partial(
            nnx.Conv, conv_general_dilated=convolution, use_bias=False, rngs=rngs
        )
        self.conv = conv(3, 16, (3, 3), padding=1)
        widths = (16, 64, 64, 128, 128, 256, 256)
        strides = (1, 1, 2, 1, 2, 1)
        self.blocks = nnx.List(
            _Block(*pair, stride, conv, rngs)
            for pair, stride in zip(itertools.pairwise(widths), strides, strict=True)
        )
        self.norm = nnx.BatchNorm(256, rngs=rngs)
        self.head = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the logits, float[M, 10]."""
        x = self.conv(x)
        for block in self.blocks:
            x = block(x)
        return self.head(nnx.relu(self.norm(x)).mean(axis=(1, 2)))
