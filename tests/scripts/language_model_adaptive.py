"""A character-level decoder in Flax Linen; the gradient is accumulated over micro-batches.

A row of a micro-batch is one line of text, padded with 0 to the common length. Padding counts
neither in the loss nor in the gradient, so a batch is divided by its number of tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import arbiter_jax as aj

MICRO_BATCH_SIZE = 4
VOCAB_SIZE = 128


class Block(nn.Module):
    """Causal self-attention and a perceptron, each added to a shortcut."""

    num_heads: int

    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(x[..., 0])
        x += nn.MultiHeadDotProductAttention(self.num_heads)(nn.LayerNorm()(x), mask=mask)
        y = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(y)


class Decoder(nn.Module):
    """Embeddings of tokens and positions, blocks, and the logits of the next tokens."""

    width: int = 32
    num_heads: int = 2
    num_layers: int = 1

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB_SIZE, self.width)
        positions = nn.Embed(tokens.shape[1], self.width)(jnp.arange(tokens.shape[1]))
        x = embed(tokens) + positions[None]
        for _ in range(self.num_layers):
            x = Block(self.num_heads)(x)
        return embed.attend(nn.LayerNorm()(x))


model = Decoder()


def token_losses(params, tokens):
    logits, labels = model.apply(params, tokens[:, :-1]), tokens[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses, (labels != 0).astype(losses.dtype)


def loss_fn(params, tokens):
    losses, weights = token_losses(params, tokens)
    return jnp.sum(losses * weights), jnp.sum(weights)


class TrainState(NamedTuple):
    """What training changes."""

    params: Any
    opt_state: Any


def train(tx, source, validation, num_steps, num_micro_batches=4):
    params = jax.jit(model.init)(jax.random.key(0), validation[:1, :-1])
    state = TrainState(params, tx.init(params))
    acc = aj.accumulate(lambda *args: aj.WeightedLoss(*token_losses(*args)), tx)

    @jax.jit
    def accumulate(total, state, tokens):
        return acc.add(total, *state, tokens)

    @jax.jit
    def update(total, state):
        loss, grads, signals = acc.finish(total, *state, validation=validation)
        updates, opt_state = tx.update(grads, state.opt_state, state.params, **signals)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), loss

    losses = []
    for _ in range(num_steps):
        total = acc.init(*state)
        for _ in range(-(-int(aj.get_batch_size(state.opt_state)) // MICRO_BATCH_SIZE)):
            total = accumulate(total, state, next(source))
        state, loss = update(total, state)
        losses.append(float(loss))
    total_loss, num_tokens = jax.jit(loss_fn)(state.params, validation)
    losses.append(float(total_loss / num_tokens))
    return state, losses
