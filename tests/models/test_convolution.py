import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export, lax

from arbiter_jax import _jaxpr
from arbiter_jax.models import conv_general_dilated, max_pool

NHWC = ("NHWC", "HWIO", "NHWC")


def operands(lhs_shape, rhs_shape, dtype=np.float32):
    draw = np.random.default_rng(0).standard_normal
    return draw(lhs_shape).astype(dtype), draw(rhs_shape).astype(dtype)


def assert_equal_to_lax(lhs, rhs, *args, **kwargs):
    """In value and in both gradients."""

    def run(conv, lhs, rhs):
        def loss(lhs, rhs):
            y = conv(lhs, rhs, *args, **kwargs)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(loss, (0, 1), has_aux=True)(lhs, rhs)

    assert_both_close(run, lhs, rhs)


def assert_both_close(run, *args):
    """That `run` gives the same for both convolutions; one program, to save time."""
    ours, theirs = jax.jit(
        lambda *args: tuple(
            run(conv, *args) for conv in (conv_general_dilated, lax.conv_general_dilated)
        )
    )(*args)
    for mine, reference in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert mine.dtype == reference.dtype
        assert mine.shape == reference.shape
        mine, reference = np.asarray(mine), np.asarray(reference)
        scale = max(1.0, np.max(np.abs(reference), initial=0.0))
        np.testing.assert_allclose(mine / scale, reference / scale, atol=1e-5, rtol=0)


def test_derivatives_equal_those_of_lax():
    """In the modes that the library needs: jvp, jvp of a gradient, and gradient of a gradient."""
    lhs, rhs = operands((2, 7, 8, 3), (3, 3, 3, 4))

    def run(conv, lhs, rhs):
        primals, tangents = (lhs, rhs), (jnp.cos(lhs), jnp.cos(rhs))

        def value(lhs, rhs):
            return conv(lhs, rhs, (2, 1), "SAME", dimension_numbers=NHWC)

        def loss(lhs, rhs):
            return jnp.sum(jnp.sin(value(lhs, rhs)))

        return (
            jax.jvp(value, primals, tangents)[1],
            jax.jvp(lambda rhs: value(lhs, rhs), (rhs,), (tangents[1],))[1],
            jax.jvp(jax.grad(loss, (0, 1)), primals, tangents)[1],
            jax.grad(lambda lhs: jnp.sum(jnp.sin(jax.grad(loss, 1)(lhs, rhs))))(lhs),
        )

    assert_both_close(run, lhs, rhs)


@pytest.mark.parametrize(
    ("padding", "strides"),
    [
        ("SAME", (1, 1)),
        ("SAME_LOWER", (2, 3)),
        ("VALID", (2, 3)),
        (((2, 1), (0, 3)), (1, 1)),
        (((-1, 0), (1, -1)), (2, 3)),
    ],
)
def test_equals_lax_for_padding_and_strides(padding, strides):
    lhs, rhs = operands((2, 9, 8, 3), (3, 4, 3, 5))
    assert_equal_to_lax(lhs, rhs, strides, padding, dimension_numbers=NHWC)


@pytest.mark.parametrize(
    ("padding", "lhs_dilation", "rhs_dilation"),
    [
        ("SAME", (1, 1), (2, 3)),
        (((0, 2), (-1, 1)), (2, 3), (2, 1)),
    ],
)
def test_equals_lax_for_dilations(padding, lhs_dilation, rhs_dilation):
    lhs, rhs = operands((2, 9, 10, 3), (3, 3, 3, 4))
    assert_equal_to_lax(
        lhs,
        rhs,
        (2, 1),
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=NHWC,
    )


@pytest.mark.parametrize(("groups", "num_outputs"), [(2, 4), (6, 12)])
def test_equals_lax_for_feature_groups(groups, num_outputs):
    lhs, rhs = operands((2, 7, 6, 6), (3, 2, 6 // groups, num_outputs))
    assert_equal_to_lax(
        lhs, rhs, (1, 2), "SAME", dimension_numbers=NHWC, feature_group_count=groups
    )


@pytest.mark.parametrize(
    ("lhs_shape", "rhs_shape", "dimension_numbers"),
    [
        ((2, 3, 8, 9), (4, 3, 3, 2), None),
        ((3, 8, 9, 2), (3, 2, 4, 3), ("CHWN", "HWOI", "NCHW")),
        ((2, 8, 3), (3, 3, 4), ("NHC", "HIO", "NHC")),
        ((2, 5, 6, 4, 3), (2, 3, 2, 3, 4), ("NDHWC", "DHWIO", "NDHWC")),
        ((2, 8, 9, 3), (1, 1, 3, 4), NHWC),
        ((0, 8, 9, 3), (3, 3, 3, 4), NHWC),
    ],
)
def test_equals_lax_for_any_order_and_rank(lhs_shape, rhs_shape, dimension_numbers):
    lhs, rhs = operands(lhs_shape, rhs_shape)
    strides = (2,) * (lhs.ndim - 2)
    assert_equal_to_lax(lhs, rhs, strides, "SAME", dimension_numbers=dimension_numbers)


def loop_lengths(lhs, rhs):
    """Numbers of turns of the loops in the CPU branch of a convolution."""
    closed = jax.make_jaxpr(conv_nhwc)(lhs, rhs)
    program = _jaxpr.inline(closed, [None, None], lambda *_: None, lambda _: True)
    branches = [branch for op in program.ops for branch in _jaxpr.platform_branches(op)]
    return [op.params["length"] for b in branches for op in b.ops if op.name == "scan"]


@pytest.mark.parametrize(
    ("lhs_shape", "rhs_shape", "lengths"),
    [
        ((8, 32, 32, 32), (3, 3, 32, 2), [8]),
        ((32, 16, 16, 32), (3, 3, 32, 2), [8]),
        ((37, 16, 16, 28), (3, 3, 28, 2), [37]),
        ((1031, 8, 8, 4), (3, 3, 4, 2), []),  # a prime number of images, each too small for a turn
        ((8, 32, 32, 128), (1, 1, 128, 2), []),  # the patches are the input itself
    ],
)
def test_large_patches_are_made_in_chunks(lhs_shape, rhs_shape, lengths):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (lhs_shape, rhs_shape)]
    assert loop_lengths(*shapes) == lengths


def test_chunks_change_nothing():
    lhs, rhs = operands((64, 16, 16, 16), (3, 3, 16, 2))
    assert loop_lengths(lhs, rhs) == [8]
    assert_equal_to_lax(lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC)


def test_batch_groups_fall_back():
    lhs, rhs = operands((4, 8, 8, 3), (3, 3, 3, 4))
    assert_equal_to_lax(lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC, batch_group_count=2)


def test_a_window_larger_than_its_input():
    lhs, rhs = operands((2, 2, 8, 3), (3, 3, 3, 4))
    y = conv_general_dilated(lhs, rhs, (1, 1), "VALID", dimension_numbers=NHWC)
    assert y.shape == (2, 0, 6, 4)


def test_integer_operands_fall_back():
    lhs, rhs = jnp.ones((1, 4, 4, 1), jnp.int32), jnp.ones((3, 3, 1, 2), jnp.int32)
    y = conv_general_dilated(lhs, rhs, (1, 1), "VALID", dimension_numbers=NHWC)
    assert y.dtype == jnp.int32
    assert (y == 9).all()


@pytest.mark.parametrize("preferred", [None, jnp.float32])
def test_bfloat16(preferred):
    lhs, rhs = operands((2, 8, 8, 3), (3, 3, 3, 4), jnp.bfloat16)
    ours, theirs = (
        conv(lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC, preferred_element_type=preferred)
        for conv in (conv_general_dilated, lax.conv_general_dilated)
    )
    assert ours.dtype == theirs.dtype == (preferred or jnp.bfloat16)
    chex.assert_trees_all_close(
        ours.astype(jnp.float32), theirs.astype(jnp.float32), atol=0.05, rtol=0.02
    )


def test_float64():
    with jax.enable_x64(True):
        lhs, rhs = operands((2, 8, 8, 3), (3, 3, 3, 4), jnp.float64)
        ours, theirs = (
            conv(lhs, rhs, (2, 2), "SAME", dimension_numbers=NHWC)
            for conv in (conv_general_dilated, lax.conv_general_dilated)
        )
        assert ours.dtype == jnp.float64
        chex.assert_trees_all_close(ours, theirs, atol=1e-12)


def test_vmaps_over_both_operands():
    def batched(conv, lhs, rhs):
        return jax.vmap(lambda x, w: conv(x, w, (1, 1), "SAME", dimension_numbers=NHWC))(lhs, rhs)

    assert_both_close(batched, *operands((3, 2, 8, 8, 3), (3, 3, 3, 3, 4)))


def test_errors_are_those_of_lax():
    lhs, rhs = operands((2, 8, 8, 3), (3, 3, 4, 5))  # 3 features are not 4
    for conv in (conv_general_dilated, lax.conv_general_dilated):
        with pytest.raises(ValueError, match="feature dimension"):
            conv(lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC)
        with pytest.raises((TypeError, ValueError), match="strides"):
            conv(lhs, rhs[:, :, :3], (1,), "VALID", dimension_numbers=NHWC)


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_exports_as_a_convolution_elsewhere(platform):
    lhs, rhs = operands((2, 8, 8, 3), (3, 3, 3, 4))

    @jax.jit
    def step(lhs, rhs):
        def loss(rhs):
            y = conv_general_dilated(lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC)
            return jnp.sum(max_pool(y) ** 2)

        return jax.grad(loss)(rhs)

    text = export.export(step, platforms=[platform])(lhs, rhs).mlir_module()
    assert "stablehlo.convolution" in text
    assert "stablehlo.dot_general" not in text


def test_is_a_dot_on_cpu():
    lhs, rhs = operands((2, 8, 8, 3), (3, 3, 3, 4))
    step = jax.jit(jax.grad(lambda lhs, rhs: jnp.sum(conv_nhwc(lhs, rhs) ** 2), (0, 1)))
    text = step.lower(lhs, rhs).as_text()
    assert "stablehlo.dot_general" in text
    assert "stablehlo.convolution" not in text


def conv_nhwc(lhs, rhs):
    return conv_general_dilated(lhs, rhs, (1, 1), "SAME", dimension_numbers=NHWC)


def test_flax_layers_take_it():
    x = operands((2, 3, 8, 8, 4), ())[0]  # one batch axis more than the layers need

    def nnx_layer(conv, x):
        settings = {"strides": 2, "kernel_dilation": 2, "feature_group_count": 2}
        ones = nnx.initializers.ones
        layer = nnx.Conv(
            4, 6, (3, 3), **settings, kernel_init=ones, conv_general_dilated=conv, rngs=nnx.Rngs(0)
        )
        return layer(x)

    def linen_layer(conv, x):
        layer = nn.Conv(6, (3, 3), padding="CIRCULAR", conv_general_dilated=conv)
        kernel = jnp.sin(jnp.arange(9 * 4 * 6.0)).reshape(3, 3, 4, 6)
        return layer.apply({"params": {"kernel": kernel, "bias": jnp.ones(6)}}, x)

    assert_both_close(lambda conv, x: (nnx_layer(conv, x), linen_layer(conv, x)), x)


@pytest.mark.parametrize(
    ("shape", "window"), [((2, 8, 8, 3), (2, 2)), ((2, 9, 7, 3), (2, 3)), ((2, 9, 3), (4,))]
)
def test_max_pool_equals_flax(shape, window):
    def run(pool, x):
        return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(pool(x))))(x), pool(x)

    x = operands(shape, ())[0]
    ours, theirs = jax.jit(
        lambda x: (
            run(lambda x: max_pool(x, window), x),
            run(lambda x: nn.max_pool(x, window, strides=window), x),
        )
    )(x)
    chex.assert_trees_all_equal(ours[1], theirs[1])
    chex.assert_trees_all_close(ours[0], theirs[0], atol=1e-5)


@pytest.mark.parametrize("window", [(2,), (2, 0), (2, 2.0)])
def test_max_pool_rejects_a_bad_window(window):
    with pytest.raises(ValueError, match="window_shape must"):
        max_pool(jnp.zeros((1, 4, 4, 1)), window)


def test_reverse_mode_keeps_only_the_operands():
    """Neither the patches nor the residuals of another platform's branch."""
    lhs, rhs = operands((8, 16, 16, 4), (3, 3, 4, 4))

    def loss(rhs):
        def layer(x, _):
            return jnp.sin(conv_nhwc(x, rhs)), None

        return jnp.sum(lax.scan(layer, lhs, None, length=4)[0])

    closed = jax.make_jaxpr(jax.grad(loss))(rhs)
    program = _jaxpr.inline(closed, [None], lambda *_: None, lambda _: False)
    forward = next(op for op in program.ops if op.name == "scan")
    stacked = [x.shape for x in forward.result_types[forward.params["num_carry"] :]]
    assert stacked == [(4, *lhs.shape)] * 2  # the input of the convolution and the cosine
