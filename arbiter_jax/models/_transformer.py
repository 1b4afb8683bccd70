"""A small decoder-only transformer, and the loss of each token.

Pre-normalized blocks of causal self-attention and a two-layer perceptron, with learned positions.
Reference: Radford, Wu, Child, Luan, Amodei and Sutskever, "Language Models are Unsupervised
Multitask Learners", 2019, after Vaswani et al., "Attention Is All You Need", NeurIPS 2017.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from arbiter_jax import _validate, base
from arbiter_jax.models import _layers
from arbiter_jax.models._build import build_model
from arbiter_jax.models._model import Model


class Block(nnx.Module):
    """Causal self-attention and a perceptron, each added to a shortcut."""

    def __init__(
        self, width: int, num_heads: int, dropout_rate: float, dtype, *, rngs: nnx.Rngs, kernel_init
    ):
        linear = functools.partial(nnx.Linear, dtype=dtype, rngs=rngs, kernel_init=kernel_init)
        self.num_heads = num_heads
        self.norm1 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.query_key_value = linear(width, 3 * width)
        self.attention_out = linear(width, width)
        self.norm2 = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.hidden = linear(width, 4 * width)
        self.hidden_out = linear(4 * width, width)
        self.dropout = nnx.data(nnx.Dropout(dropout_rate, rngs=rngs) if dropout_rate else None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns the block's output, float[M, length, width]."""
        drop = self.dropout or (lambda y: y)
        y = self.query_key_value(self.norm1(x))
        query, key, value = jnp.split(y.reshape(*y.shape[:2], self.num_heads, -1), 3, axis=-1)
        y = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + drop(self.attention_out(y.reshape(x.shape)))
        return x + drop(self.hidden_out(nnx.gelu(self.hidden(self.norm2(x)))))


class Transformer(nnx.Module):
    """Embeddings of tokens and positions, blocks, and a linear head."""

    def __init__(
        self,
        vocab_size: int,
        max_length: int,
        num_layers: int,
        num_heads: int,
        width: int,
        dropout_rate: float,
        dtype,
        *,
        rngs: nnx.Rngs,
        kernel_init,
    ):
        def embedding_init(key, shape, dtype):
            return kernel_init(key, shape[::-1], dtype).T  # variance 1 / width

        embed = functools.partial(
            nnx.Embed, features=width, dtype=dtype, embedding_init=embedding_init, rngs=rngs
        )
        self.max_length = max_length
        self.tokens = embed(vocab_size)
        self.positions = embed(max_length)
        self.blocks = nnx.List(
            [
                Block(width, num_heads, dropout_rate, dtype, rngs=rngs, kernel_init=kernel_init)
                for _ in range(num_layers)
            ]
        )
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        # The head computes in the dtype of its parameters.
        self.head = nnx.Linear(width, vocab_size, rngs=rngs, kernel_init=kernel_init)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Returns the logits of the next tokens, float[M, length, vocab_size]."""
        length = tokens.shape[1]
        if length > self.max_length:
            raise ValueError(f"inputs must have a length <= {self.max_length}, got {length}.")
        x = self.tokens(tokens) + self.positions(jnp.arange(length))[None]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def transformer(
    vocab_size: int,
    max_length: int,
    *,
    num_layers: int = 2,
    num_heads: int = 4,
    width: int = 128,
    dropout_rate: float = 0.0,
    dtype: jax.typing.DTypeLike | None = None,
) -> Model:
    r"""A decoder-only transformer that predicts each token from those before it.

    Args:
      vocab_size: Number of different tokens, an integer >= 1.
      max_length: Maximum length of a sequence, in tokens, an integer >= 1.
      num_layers: Number of blocks, an integer >= 1.
      num_heads: Number of attention heads, an integer >= 1.
      width: Number of features of a token, a multiple of ``num_heads``.
      dropout_rate: Rate of the dropout after attention and perceptron, in [0, 1).
      dtype: Dtype of the computation below the head, such as ``jnp.bfloat16``; float32 if None.
        Parameters and outputs are always float32.

    Returns:
      A model that maps tokens int32[M, length] to logits float32[M, length, vocab_size]. Its
      features are float[M, length, width], the normalized output of the last block. It has state
      only with dropout. Its loss is :func:`token_cross_entropy`.

    Raises:
      ValueError: If an argument is out of its range, or ``width`` is not a multiple of
        ``num_heads``.

    Reference:
      Radford et al., 2019; Vaswani et al., 2017, https://arxiv.org/abs/1706.03762

    >>> import jax, jax.numpy as jnp
    >>> from arbiter_jax import models
    >>> model = models.transformer(vocab_size=96, max_length=32, width=64)
    >>> losses = models.make_losses(model, models.token_cross_entropy)
    >>> params, _ = jax.eval_shape(model.init, jax.random.PRNGKey(0))
    >>> tokens = jnp.zeros((4, 33), jnp.int32)
    >>> value = jax.eval_shape(losses.loss_fn, params, (tokens[:, :-1], tokens[:, 1:]))
    >>> value.losses.shape, value.weights.shape
    ((4, 32), (4, 32))

    *Guarantees*
      - the logits at a position do not depend on later tokens.
    """
    vocab_size = _validate.integer(vocab_size=vocab_size, minimum=1)
    _layers.check_dtype(dtype)
    max_length = _validate.integer(max_length=max_length, minimum=1)
    num_layers = _validate.integer(num_layers=num_layers, minimum=1)
    num_heads = _validate.integer(num_heads=num_heads, minimum=1)
    width = _validate.integer(width=width, minimum=1)
    if width % num_heads:
        raise ValueError(f"width must be a multiple of num_heads={num_heads}, got {width}.")
    rate = _validate.in_range(0, 1, closed="left", dropout_rate=dropout_rate)
    return build_model(
        functools.partial(
            Transformer, vocab_size, max_length, num_layers, num_heads, width, rate, dtype
        ),
        jax.ShapeDtypeStruct((1, max_length), jnp.int32),
    )


def token_cross_entropy(
    logits: jax.Array, labels: jax.Array, *, padding_label: int = -1
) -> base.WeightedLoss:
    r"""The cross entropy of each token, with weight 0 for padding.

    Training takes the mean over the tokens, :math:`\sum w \ell / \sum w`: a token counts the same in
    a short and in a long sequence.

    Args:
      logits: float[M, length, vocab_size].
      labels: int[M, length], the tokens to predict, or ``padding_label``.
      padding_label: Label of the positions that do not count.

    Returns:
      Losses and weights, float[M, length] each.

    Raises:
      ValueError: If the shapes do not match, or the labels are not integers.

    >>> import jax.numpy as jnp
    >>> from arbiter_jax import models
    >>> value = models.token_cross_entropy(jnp.zeros((1, 3, 2)), jnp.array([[0, 1, -1]]))
    >>> value.losses.round(3).tolist(), value.weights.tolist()
    ([[0.693..., 0.693..., 0.0]], [[1.0, 1.0, 0.0]])
    """
    if logits.shape[:-1] != labels.shape or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            "logits and labels must be float[M, length, vocab_size] and int[M, length], got shapes "
            f"{logits.shape} and {labels.shape}, and labels of dtype {labels.dtype}."
        )
    real = labels != padding_label
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(real, labels, 0))
    return base.WeightedLoss(jnp.where(real, losses, 0), real.astype(losses.dtype))
