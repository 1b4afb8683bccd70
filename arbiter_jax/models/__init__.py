"""Networks as pure functions, and :func:`attach`, which turns any Flax module into one."""

from arbiter_jax.models._attach import attach
from arbiter_jax.models._convolution import conv_general_dilated, max_pool
from arbiter_jax.models._lenet import lenet
from arbiter_jax.models._mlp import mlp
from arbiter_jax.models._model import Losses, Model, count_params, make_losses
from arbiter_jax.models._train_state import TrainState
from arbiter_jax.models._transformer import token_cross_entropy, transformer
from arbiter_jax.models._vgg import vgg11
from arbiter_jax.models._wide_resnet import wide_resnet

__all__ = [
    "Losses",
    "Model",
    "TrainState",
    "attach",
    "conv_general_dilated",
    "count_params",
    "lenet",
    "make_losses",
    "max_pool",
    "mlp",
    "token_cross_entropy",
    "transformer",
    "vgg11",
    "wide_resnet",
]
