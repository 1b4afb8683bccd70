"""What `fit` and the window loop refuse: one sentence that says what to pass instead."""

import functools
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training import train_state

import arbiter_jax as aj
from arbiter_jax import datasets
from arbiter_jax.batching import Block
from arbiter_jax.gradients import Gradient, masked_value_and_grad
from arbiter_jax.training import resume_state

RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(50, 3)).astype(np.float32)
LABELS = INPUTS @ np.arange(3, dtype=np.float32)
START = jnp.zeros(3)
TX = optax.chain(optax.sgd(0.05), aj.schedulers.constant(10))


def loss_fn(params, batch):
    inputs, labels = batch
    return (inputs @ params - labels) ** 2


def fit(**options):
    defaults = {
        "loss_fn": loss_fn,
        "params": START,
        "tx": TX,
        "data": aj.Data((INPUTS, LABELS)),
        "num_examples": 40,
        "window": 4,
    }
    return aj.fit(**(defaults | options))


def run_window(**options):
    defaults = {
        "state": aj.init_state(START, TX, 0),
        "data": aj.Data((jnp.asarray(INPUTS), jnp.asarray(LABELS))),
        "loss_fn": loss_fn,
        "tx": TX,
        "bucket_size": 16,
        "window": 4,
    }
    return aj.run_window(**(defaults | options))


class Loader:
    """As torch.utils.data.DataLoader and the datasets of TensorFlow."""

    def __iter__(self):
        return iter([(INPUTS, LABELS)])

    def __len__(self):
        return 1


def blocks():
    return datasets.host_blocks(iter([(INPUTS, LABELS)]), window=4)


# Data

DATA = r"^data must be aj\.Data\(train, validation\), got "
ON_HOST = r"arbiter_jax\.datasets\.host_blocks\(source, window=window\), as aj\.Data\(blocks, "


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((INPUTS, LABELS), DATA + r"a tuple of 2: .* aj\.Data\(\(inputs, labels\)\), and with val"),
        ([INPUTS, LABELS], DATA + "a list of 2: wrap"),
        ({"x": INPUTS}, DATA + r"a dict of 1: .* aj\.Data\({'x': x, 'y': y}\)"),
        (INPUTS, DATA + r"an array float32\[50, 3\]: wrap"),
        (None, DATA + "None: "),
        (Loader(), DATA + "a Loader: .*" + ON_HOST),
        ((batch for batch in [INPUTS]), DATA + "a generator: .*" + ON_HOST),
        (aj.Data([Loader()]), r"^data\.train\[0\] must .* got a Loader: .*" + ON_HOST),
        (aj.Data(iter([INPUTS[0, 0]])), r"^each chunk of the source must .* pass batched=False"),
        (aj.Data(Loader(), iter([])), r"^data\.validation must hold at least 1 example, got 0"),
        (aj.Data((INPUTS, iter([1]))), r"^data\.train\[1\] must .* a list_iterator: .*" + ON_HOST),
        (aj.Data(None), r"^data\.train must be a pytree of arrays .* got shapes no array"),
        (aj.Data({}), r"^data\.train must be a pytree of arrays .* got shapes no array"),
        (
            aj.Data({"x": INPUTS, "y": LABELS[:7]}),
            r"\['x'\]: \(50, 3\), data\.train\['y'\]: \(7,\)",
        ),
        (aj.Data((INPUTS[:0], LABELS[:0])), r"^data\.train must hold at least 1 example, got shap"),
        (aj.Data((INPUTS, 3.0)), r"one leading axis .* data\.train\[1\]: \(\)"),
        (aj.Data([1.0, 2.0]), r"one leading axis .* data\.train\[0\]: \(\), data\.train\[1\]: \("),
        (
            aj.Data((INPUTS, LABELS.astype(str))),
            r"^data\.train\[1\] must be an array of numbers, got dtype <U\d+: encode it as integers",
        ),
        (aj.Data((INPUTS, LABELS.astype(object))), r"^data\.train\[1\] must .* got dtype object: "),
        (
            aj.Data((INPUTS, "labels")),
            r"^data\.train\[1\] must be an array of numbers, got 'labels'",
        ),
        (aj.Data((INPUTS, LABELS), LABELS.astype("S")), r"^data\.validation must .* got dtype \|S"),
        (
            aj.Data((INPUTS, LABELS.astype("M8[s]"))),
            r"^data\.train\[1\] must .* got dtype datetime",
        ),
        (
            aj.Data((INPUTS, np.full(50, 2**40))),
            r"^data\.train\[1\] must fit into int32, got numbers from 1099511627776 to 109951162777",
        ),
        (
            aj.Data(Block(INPUTS[None], np.int32(10), np.int32(1))),
            r"^data\.train must be arrays or a source of blocks, got one Block",
        ),
    ],
)
def test_data_is_named(data, message):
    with pytest.raises(ValueError, match=message):
        fit(data=data)


def test_blocks_without_data_are_named():
    with (
        blocks() as source,
        pytest.raises(ValueError, match=r"^data must be aj\.Data\(blocks, val"),
    ):
        fit(data=source)


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16, np.int64, np.uint8])
def test_numbers_of_any_type_are_data(dtype):
    train = INPUTS.astype(dtype), LABELS.astype(dtype)
    result = fit(data=aj.Data(train))
    expected = fit(data=aj.Data(jax.tree.map(lambda x: x.astype(np.float32), train)))
    np.testing.assert_allclose(result.state.params, expected.state.params, rtol=0.05, atol=0.05)


class Foreign:
    """An array of another library, or a table of one, whose dtypes are several."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def __array__(self, dtype=None, copy=None):
        return self.array


class Tensor(Foreign):
    dtype = "torch.float32"


@pytest.mark.parametrize("kind", [Foreign, Tensor])
def test_arrays_of_other_libraries_are_data(kind):
    foreign = aj.Data((kind(INPUTS), kind(LABELS)))
    np.testing.assert_array_equal(fit(data=foreign).state.params, fit().state.params)
    with pytest.raises(
        ValueError, match=r"^data\.train\[0\] must be an array of JAX, got a .* jnp"
    ):
        run_window(data=foreign)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            (INPUTS, LABELS),
            r"^next_block must return an arbiter_jax\.batching\.Block\(.* a tuple\.$",
        ),
        (Block(None, np.int32(8), np.int32(4)), "^next_block must .* batch size 10, as asked .* 8"),
        (Block(None, np.int32(10), np.int32(0)), "^next_block must .* of 1 to 4 steps, got 0; "),
        (Block(None, np.int32(10), np.int32(5)), "^next_block must .* of 1 to 4 steps, got 5; "),
    ],
)
def test_what_a_source_makes_is_checked(block, message):
    source = types.SimpleNamespace(window=4, next_block=lambda *sizes: block)
    with pytest.raises(ValueError, match=message):
        fit(data=aj.Data(source))


# Functions

LOSS = r"^loss_fn must be a function loss_fn\(params, batch"


def five(params, batch, model_state, mask, key):
    return loss_fn(params, batch), model_state


@pytest.mark.parametrize("call", [fit, run_window])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss_fn": None},
            "^loss_fn must be given, or gradient_fn in its place, got None for both",
        ),
        (
            {"gradient_fn": masked_value_and_grad(loss_fn)},
            "^loss_fn must be None where gradient_fn",
        ),
        ({"loss_fn": 3}, LOSS + r"\) -> float\[M\], got 3"),
        ({"loss_fn": "mse"}, LOSS + r"\) -> float\[M\], got 'mse'"),
        ({"loss_fn": lambda params: params}, LOSS + r"\) .* got one that takes \(params\)"),
        ({"loss_fn": lambda p, x, y: p}, LOSS + r"\) .* got one that takes \(p, x, y\)\."),
        (
            {"loss_fn": five},
            LOSS + r"\) .* model_state, mask, key\): a loss of five arguments needs",
        ),
        ({"loss_fn": None, "gradient_fn": "sgd"}, r"^gradient_fn must be a function .* got 'sgd'"),
        (
            {"loss_fn": None, "gradient_fn": lambda p, b: None},
            r"^gradient_fn must be a function gradient_fn\(params, batch, mask, model_state, key\)",
        ),
        ({"transform_batch": 1}, r"^transform_batch must be a function .*\(key, batch\) .* got 1"),
        (
            {"transform_batch": lambda batch: batch},
            r"^transform_batch must .* that takes \(batch\)",
        ),
        (
            {"transform_batch": lambda key, batch: jax.tree.map(lambda x: x[:3], batch)},
            r"^transform_batch must return a batch of the 16 rows that it is given, got 3",
        ),
        (
            {"transform_batch": lambda key, batch: None},
            "^the batch that transform_batch returns must",
        ),
        ({"tx": optax.sgd}, "^tx must be an optax .* got the function sgd: call it first"),
        ({"tx": [TX]}, r"^tx must be an optax .* a list of 1: join them with optax\.chain\(\*tx\)"),
        (
            {"tx": None},
            "^tx must be an optax gradient transformation, got None: chain an optimizer",
        ),
        ({"tx": "adam"}, "^tx must be an optax gradient transformation, got 'adam'"),
    ],
)
def test_functions_are_named(call, options, message):
    with pytest.raises(ValueError, match=message):
        call(**options)


def test_a_loss_without_model_state_is_named():
    message = LOSS + r", model_state, mask, key\).* takes \(params, batch\): model_state is given"
    with pytest.raises(ValueError, match=message):
        fit(model_state={"mean": jnp.zeros(2)})
    with pytest.raises(ValueError, match=message):
        run_window(state=aj.init_state(START, TX, 0, model_state=jnp.zeros(2)))
    # What takes as many arguments is called, whatever they are called.
    result = fit(loss_fn=lambda *args: (loss_fn(*args[:2]), args[2]), model_state=jnp.zeros(2))
    assert int(result.state.num_steps) == 4


class Unhashable:
    __hash__ = None

    def __call__(self, params, batch):
        return loss_fn(params, batch)


@pytest.mark.parametrize("call", [fit, run_window])
def test_functions_that_cannot_be_kept_are_named(call):
    with pytest.raises(
        ValueError, match=r"^loss_fn must be hashable, .* got a Unhashable: wrap it"
    ):
        call(loss_fn=Unhashable())


@pytest.mark.parametrize("call", [fit, run_window])
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            (jnp.float32(1), START),
            r"^gradient_fn must return .*Gradient\(value, .* got a tuple of 2",
        ),
        (None, r"^gradient_fn must return .*Gradient\(value, grads, model_state\), got None"),
        (Gradient(jnp.zeros(16), START), r"must return as value the mean .* got float32\[16\]"),
        (Gradient(jnp.int32(1), START), r"must return as value the mean .* got int32\[\]"),
        (Gradient(jnp.float32(1), (START,)), "grads like params, but grads is a tuple, not an arr"),
        (Gradient(jnp.float32(1), START[:2]), r"grads like params, but grads is float32\[2\], not"),
    ],
)
def test_what_gradient_fn_returns_is_checked(call, made, message):
    with pytest.raises(ValueError, match=message):
        call(loss_fn=None, gradient_fn=lambda params, batch, mask, model_state, key: made)


@pytest.mark.parametrize("call", [fit, run_window])
def test_local_sampling_has_no_micro_batches(call):
    """From the first window on, not only when the batches are that large."""
    with pytest.raises(
        ValueError, match=r"^sampling must be 'exact' .* micro-batches, got 'local'"
    ):
        call(sampling="local", micro_batch_size=64)


@pytest.mark.parametrize("returned", [None, jnp.zeros(3), {"mean": jnp.zeros(2)}])
def test_another_model_state_is_named(returned):
    loss = lambda params, batch, *rest: (loss_fn(params, batch), returned)
    with pytest.raises(
        ValueError, match=r"must return a model_state like the one .* but model_stat"
    ):
        fit(loss_fn=loss, model_state=jnp.zeros(2))


# Numbers


@pytest.mark.parametrize(("name", "largest"), [("num_examples", 2**63 - 1), ("window", 2**31 - 1)])
def test_more_than_can_be_counted(name, largest):
    with pytest.raises(ValueError, match=f"{name} must be an integer <= {largest}, got {10**30}"):
        fit(**{name: 10**30})


@pytest.mark.parametrize("name", ["num_examples", "stop_at", "window", "num_agent_inputs"])
@pytest.mark.parametrize("value", [True, 1e3, np.float32(4), "40", 0, -1, (4,), jnp.ones(2, int)])
def test_numbers_are_integers(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be an integer >= 1.*, got "):
        fit(**{name: value})


def test_integers_of_numpy_and_jax_are_taken():
    expected = fit().state.params
    for integer in (np.int64, np.uint8, jnp.int32):
        result = fit(num_examples=integer(40), stop_at=integer(40), window=integer(4))
        np.testing.assert_array_equal(result.state.params, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bucket_size": 12}, "^bucket_size must be a power of two >= 1, got 12"),
        ({"bucket_size": 16.0}, r"^bucket_size must be a power of two >= 1, got 16\.0"),
        (
            {"bucket_size": jnp.int32(16)},
            r"^bucket_size must be a Python integer, .* int\(bucket_si",
        ),
        ({"window": jnp.int32(4)}, r"^window must be a Python integer, .* pass int\(window\)"),
        ({"window": "4"}, "^window must be an integer >= 1, got '4'"),
        ({"data": (INPUTS, LABELS)}, DATA + "a tuple of 2"),
        (
            {"data": aj.Data((INPUTS, LABELS.astype(str)))},
            r"^data\.train\[1\] must be an array of n",
        ),
        ({"data": aj.Data(Loader())}, r"^data\.train must be an array of numbers, got a Loader"),
        (
            {"data": aj.Data((INPUTS, LABELS[:7]))},
            r"^data\.train must be a pytree of arrays with on",
        ),
    ],
)
def test_what_a_window_cannot_take_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        run_window(**options)


def test_an_error_of_the_users_own_comes_out():
    def wrong(params, batch):
        raise TypeError("of my own")

    with pytest.raises(TypeError, match="of my own"):
        run_window(loss_fn=wrong)
    with pytest.raises(TypeError, match="bucket_size"):
        aj.run_window(aj.init_state(START, TX, 0), aj.Data(INPUTS), loss_fn=loss_fn, tx=TX)


# Keys


@pytest.mark.parametrize("call", [fit, lambda key: aj.init_state(START, TX, key)])
@pytest.mark.parametrize(
    ("key", "message"),
    [
        (-1, r"^key must be one PRNG key, .* or an integer in \[0, 2\*\*32\), got -1\."),
        (2**32, r"got 4294967296\."),  # which JAX takes for 0
        (0.5, r"got 0\.5\."),
        (True, r"got True\."),
        ("seed", r"got 'seed'\."),
        (None, r"got None\."),
        (np.float32(1), "got a float32"),
        (np.int64(-1), "got a int64"),
        (jnp.zeros(2), r"got an array float32\[2\]\."),
        (jnp.zeros(3, jnp.uint32), r"got an array uint32\[3\]\."),
        (
            jax.random.key(0, impl="rbg"),
            r"^key must be of the implementation 'threefry2x32', .* got one of 'rbg': pass a seed, ",
        ),
    ],
)
def test_keys_are_named(call, key, message):
    with pytest.raises(ValueError, match=message):
        call(key=key)


@pytest.mark.parametrize(
    ("keys", "found"),
    [
        (jnp.zeros((5, 2), jnp.uint32), r"uint32\[5, 2\]"),
        (jax.random.split(jax.random.key(0)), r"key<fry>\[2\]"),
    ],
)
def test_several_keys_are_of_several_runs(keys, found):
    with pytest.raises(ValueError, match=rf"^key must be one PRNG key, .* got an array {found}\."):
        aj.init_state(START, TX, keys)
    with pytest.raises(ValueError, match=r"^params must have a leading axis of \d, an entry for "):
        fit(key=keys)


def test_keys_of_every_form_are_the_same():
    expected = aj.init_state(START, TX, jax.random.PRNGKey(7))
    forms = [7, np.int64(7), jnp.int32(7), jax.random.key(7), np.array([0, 7], np.uint32)]
    for key in forms:
        state = aj.init_state(START, TX, key)
        np.testing.assert_array_equal(state.key, expected.key)
    assert aj.init_state(START, TX, 2**32 - 1).key.shape == (2,)


@pytest.mark.parametrize("key", [jnp.zeros((5, 2), jnp.uint32), jnp.zeros(2)])
def test_a_sampler_takes_one_key(key):
    with pytest.raises(
        ValueError, match=r"^key must be one PRNG key, e\.g\. jax\.random\.key\(0\)"
    ):
        aj.init_sampler(key)


# Parameters


@pytest.mark.parametrize("call", [fit, lambda params: aj.init_state(params, TX, 0)])
@pytest.mark.parametrize(
    ("params", "message"),
    [
        (None, r"^params must be a pytree of arrays, got None: pass what the model's init returns"),
        ({}, "^params must be a pytree of arrays, got a dict of 0"),
        ({"w": "zeros"}, r"^params\['w'\] must be an array of numbers, got 'zeros'"),
        (
            nn.Dense(3),
            "^params must be an array of numbers, got a Dense: pass what the model's init",
        ),
        (
            jax.eval_shape(lambda: START),
            "^params must be an array of numbers, got a ShapeDtypeStruct",
        ),
        (np.array(["a"]), "^params must be an array of numbers, got an array <U1"),
        (nnx.Linear(2, 3, rngs=nnx.Rngs(0)), "got the NNX module Linear: aj.attach"),
    ],
)
def test_parameters_are_named(call, params, message):
    with pytest.raises(ValueError, match=message):
        call(params=params)


def test_donated_parameters_are_named():
    params = jnp.zeros(3)
    params.delete()
    with pytest.raises(
        ValueError, match=r"^params must be arrays that can be read, got deleted ones"
    ):
        fit(params=params)


# States


def resume(state, tx=TX):
    return fit(state=state, tx=tx)


def state_of(tx):
    return aj.init_state(START, tx, 0)


def as_dicts(tree):
    """As Orbax restores a state without a target."""
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return {name: as_dicts(getattr(tree, name)) for name in tree._fields}
    if isinstance(tree, tuple):
        return [as_dicts(part) for part in tree]
    return tree


def flax_state():
    return train_state.TrainState.create(apply_fn=print, params=START, tx=optax.sgd(0.1))


STATE = r"^state must be an aj\.TrainState, got "
SAME = r"^state must be one of the given tx, but state\.opt_state"


@pytest.mark.parametrize("call", [resume, lambda state: run_window(state=state)])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: as_dicts(state_of(TX)), STATE + "a dict of 14: a checkpoint that Orbax restores"),
        (lambda: fit(), STATE + r"a FitResult: pass result\.state"),
        (flax_state, STATE + "a TrainState: pass its params and tx to fit"),
        (lambda: TX.init(START), STATE + r"a tuple of 2: .*key\)\._replace\(opt_state=\.\.\.\)"),
        (lambda: START, STATE + r"an array float32\[3\]: make one with aj\.init_state"),
        (
            lambda: state_of(TX)._replace(opt_state=as_dicts(TX.init(START))),
            SAME + " is a list, not a tuple: a checkpoint that Orbax restores without a target",
        ),
        (
            lambda: state_of(optax.chain(optax.adam(0.1), aj.schedulers.constant(10))),
            SAME + r"\[0\]\[0\] is a ScaleByAdamState, not a EmptyState: a state goes on under the",
        ),
        (
            lambda: state_of(optax.chain(optax.sgd(0.1), aj.schedulers.cabs(0.1))),
            SAME + r"\[1\] is a CABSState, not a ConstantState",
        ),
        (lambda: state_of(aj.schedulers.constant(10)), SAME + " is a ConstantState, not a tuple"),
        (
            lambda: state_of(optax.chain(optax.sgd(0.1), optax.sgd(0.1), TX)),
            SAME + r" has the parts \[0\], \[1\], \[2\], not \[0\], \[1\]: a state goes on",
        ),
        (
            lambda: state_of(TX)._replace(key=jnp.zeros(3, jnp.uint32)),
            r"^state must be one .* but state\.key is uint32\[3\], not uint32\[2\]",
        ),
        (
            lambda: state_of(TX)._replace(progress="0"),
            r"^state\.progress must be an array, got '0'",
        ),
    ],
)
def test_states_are_named(call, make, message):
    with pytest.raises(ValueError, match=message):
        call(make())


def test_a_state_of_other_parameters_is_named():
    momentum = optax.chain(optax.sgd(0.1, momentum=0.9), aj.schedulers.constant(10))
    state = state_of(momentum)._replace(params=jnp.zeros(4))
    with pytest.raises(ValueError, match=SAME + r".*\.trace is float32\[3\], not float32\[4\]"):
        resume(state, momentum)


@pytest.mark.parametrize("call", [resume, lambda state: run_window(state=state)])
def test_a_donated_state_is_named(call):
    state = state_of(TX)
    run_window(state=state)
    with pytest.raises(ValueError, match=r"^state must hold arrays that can be read, got deleted "):
        call(state)


def test_next_window_says_what_it_cannot_read():
    state = state_of(TX)
    run_window(state=state)
    with pytest.raises(ValueError, match=r"^opt_state must hold arrays that can be read, got del"):
        aj.next_window(state.opt_state)
    with pytest.raises(
        ValueError, match=r"^opt_state must hold numbers, got traced ones: .*outside"
    ):
        jax.jit(lambda state: aj.next_window(state))(TX.init(START))
    for empty in (None, optax.sgd(0.1).init(START), "state"):
        with pytest.raises(ValueError, match=r"^opt_state must hold exactly one .* found none"):
            aj.next_window(empty)
    none = TX.init(START)[1]._replace(batch_size=jnp.int32(0))
    with pytest.raises(ValueError, match=r"^the batch size must be .* >= 1, got 0 from ConstantSt"):
        aj.next_window(none)


def test_a_checkpoint_of_numpy_arrays_goes_on():
    whole = fit(num_examples=80)
    first = fit(num_examples=80, stop_at=40)
    saved = jax.tree.map(np.asarray, first.state)
    rest = fit(num_examples=80, state=saved)
    np.testing.assert_array_equal(rest.state.params, whole.state.params)
    assert isinstance(resume_state(saved, TX), aj.TrainState)


def test_the_wrapped_program_keeps_its_methods():
    options = {"loss_fn": loss_fn, "tx": TX, "bucket_size": 16, "window": 4}
    state, data = state_of(TX), aj.Data((jnp.asarray(INPUTS), jnp.asarray(LABELS)))
    assert aj.run_window.lower(state, data, **options).as_text()
    run = functools.partial(aj.run_window.__wrapped__, **options)
    assert jax.eval_shape(run, state, data)[1].loss.shape == (4,)
