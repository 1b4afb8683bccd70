"""Proximal policy optimization with everything in one program, environments and seeds included.

The cart-pole of Barto, Sutton and Anderson (1983) is a few lines of ``jax.numpy``; rollouts, epochs
and minibatches are scans, and ``jax.jit(jax.vmap(make_train(tx)))(keys)`` trains several seeds.
Advantages are normalized over the rollout: so a loss belongs to one example.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

NUM_ENVS, NUM_STEPS, NUM_EPOCHS, MINIBATCH_SIZE = 8, 16, 2, 64
DISCOUNT, TRACE_DECAY, CLIP, VALUE_WEIGHT, ENTROPY_WEIGHT = 0.99, 0.95, 0.2, 0.5, 0.01


def reset(key):
    return jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05)


def step(key, state, action):
    """Pushes the cart for a fiftieth of a second; a pole that falls over starts a new episode."""
    _, speed, angle, spin = state
    force, sin, cos = jnp.where(action == 1, 10.0, -10.0), jnp.sin(angle), jnp.cos(angle)
    push = (force + 0.05 * spin**2 * sin) / 1.1
    spin_rate = (9.8 * sin - cos * push) / (0.5 * (4 / 3 - 0.1 * cos**2 / 1.1))
    rate = jnp.array([speed, push - 0.05 * spin_rate * cos / 1.1, spin, spin_rate])
    state = state + 0.02 * rate
    done = (jnp.abs(state[0]) > 2.4) | (jnp.abs(state[2]) > 0.2095)
    return jnp.where(done, reset(key), state), done


class ActorCritic(nn.Module):
    """The logits of the two actions, and the value of the state."""

    @nn.compact
    def __call__(self, observation):
        x = nn.tanh(nn.Dense(32)(observation))
        return nn.Dense(2)(x), nn.Dense(1)(x)[..., 0]


class Transition(NamedTuple):
    """One step of one environment, or arrays of them."""

    observation: jax.Array
    action: jax.Array
    log_prob: jax.Array
    value: jax.Array
    done: jax.Array
    advantage: jax.Array  # zero until the rollout has ended
    target: jax.Array


model = ActorCritic()


def log_prob_of(logits, action):
    return jnp.take_along_axis(nn.log_softmax(logits), action[..., None], axis=-1)[..., 0]


def loss_fn(params, minibatch):
    logits, value = model.apply(params, minibatch.observation)
    ratio = jnp.exp(log_prob_of(logits, minibatch.action) - minibatch.log_prob)
    clipped = jnp.clip(ratio, 1 - CLIP, 1 + CLIP)
    actor = -jnp.minimum(ratio * minibatch.advantage, clipped * minibatch.advantage)
    entropy = -jnp.sum(nn.softmax(logits) * nn.log_softmax(logits), axis=-1)
    critic = jnp.square(value - minibatch.target)
    return jnp.mean(actor + VALUE_WEIGHT * critic - ENTROPY_WEIGHT * entropy)


def rollout(params, states, key):
    """Plays NUM_STEPS steps in each environment and estimates the advantages."""

    def env_step(states, key):
        act_key, *env_keys = jax.random.split(key, 1 + NUM_ENVS)
        logits, value = model.apply(params, states)
        action = jax.random.categorical(act_key, logits)
        new_states, done = jax.vmap(step)(jnp.stack(env_keys), states, action)
        zeros = jnp.zeros_like(value)
        log_prob = log_prob_of(logits, action)
        return new_states, Transition(states, action, log_prob, value, done, zeros, zeros)

    states, steps = jax.lax.scan(env_step, states, jax.random.split(key, NUM_STEPS))

    def backward(carry, transition):
        advantage, next_value = carry
        goes_on = DISCOUNT * (1 - transition.done)
        error = 1 + goes_on * next_value - transition.value
        advantage = error + goes_on * TRACE_DECAY * advantage
        return (advantage, transition.value), advantage

    last_value = model.apply(params, states)[1]
    start = jnp.zeros_like(last_value), last_value
    advantage = jax.lax.scan(backward, start, steps, reverse=True)[1]
    normalized = (advantage - jnp.mean(advantage)) / (jnp.std(advantage) + 1e-8)
    steps = steps._replace(advantage=normalized, target=advantage + steps.value)
    return states, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), steps)


def make_train(tx, num_updates=4):
    def update_minibatch(carry, minibatch):
        params, opt_state = carry
        value, grads = jax.value_and_grad(loss_fn)(params, minibatch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    def update(carry, key):
        params, opt_state, states = carry
        key, epochs_key = jax.random.split(key)
        states, transitions = rollout(params, states, key)

        def epoch(carry, key):
            order = jax.random.permutation(key, NUM_ENVS * NUM_STEPS).reshape(-1, MINIBATCH_SIZE)
            return jax.lax.scan(
                update_minibatch, carry, jax.tree.map(lambda x: x[order], transitions)
            )

        keys = jax.random.split(epochs_key, NUM_EPOCHS)
        (params, opt_state), values = jax.lax.scan(epoch, (params, opt_state), keys)
        return (params, opt_state, states), values

    def train(key):
        init_key, env_key, key = jax.random.split(key, 3)
        states = jax.vmap(reset)(jax.random.split(env_key, NUM_ENVS))
        params = model.init(init_key, states)
        keys = jax.random.split(key, num_updates)
        carry, losses = jax.lax.scan(update, (params, tx.init(params), states), keys)
        return carry, losses.reshape(-1)

    return train
