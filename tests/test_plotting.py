"""Figures: what they show, and that notebooks display them."""

import io
import itertools
import math
import sys
import types

import numpy as np
import pytest

from arbiter_jax import plotting
from arbiter_jax.hyper_learning import to_logit

REASON = 'needs matplotlib: pip install "arbiter-jax[plotting]"'
matplotlib = pytest.importorskip("matplotlib", reason=REASON)

LIMITS = (8, 64)


class Fit:
    """The parts of a FitResult that figures read: two windows of three steps each."""

    def __init__(self, size, **metrics):
        sizes = (size, 2 * size)
        ends = np.cumsum([3 * size for size in sizes])
        info = types.SimpleNamespace(metrics=metrics)
        self.history = [
            types.SimpleNamespace(batch_size=size, num_examples=int(end), info=info)
            for size, end in zip(sizes, ends, strict=True)
        ]
        self.recorded = {"batch_size": np.repeat(sizes, 3), "loss": np.geomspace(1, 0.1, 6)}
        self.recorded |= metrics

    def per_step(self, name):
        return self.recorded[name]


def fits_of(num_methods):
    names = [f"rule_{i}" for i in range(num_methods)] + ["constant_8"]
    return {(name, seed): Fit(8 + i) for i, name in enumerate(names) for seed in (0, 1)}


def legend_of(owner):
    """The texts of the legends of a figure or of axes."""
    legends = getattr(owner, "legends", None) or [owner.get_legend()]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


@pytest.mark.parametrize("num_methods", [2, 12])
def test_every_method_is_named(num_methods):
    fits = fits_of(num_methods)
    rules = {f"rule {i}" for i in range(num_methods)}
    many = num_methods > len(plotting.COLORS)
    sizes, losses = plotting.batch_sizes(fits, LIMITS), plotting.losses(fits, num_points=4)
    for fig in (sizes, losses):
        named = {ax.get_title() for ax in fig.axes} if many else set(labels_at_ends(fig))
        assert rules <= named <= rules | {"constant 8"}
        # The lowest panel of each column has numbers at its axis.
        assert all(ax.xaxis.get_tick_params()["labelbottom"] for ax in fig.axes[-4:])
    # A constant size needs no panel of its own, but its loss does.
    assert len(sizes.axes) == (num_methods if many else 1)
    assert len(losses.axes) == (num_methods + 1 if many else 1)


def test_batch_sizes_are_steps_over_examples():
    """Seeds are thin, and their geometric mean is thick, over the examples that all have seen."""
    fits = {("rule", 0): Fit(8), ("rule", 1): Fit(32), ("constant_8", 0): Fit(8)}
    (ax,) = plotting.batch_sizes(fits, LIMITS, title="digits").axes
    drawn = [patch.get_data() for patch in ax.patches]
    assert [data.values.tolist() for data in drawn] == [[8, 16], [32, 64]]
    assert [data.edges.tolist() for data in drawn] == [[0, 24, 72], [0, 96, 288]]
    mean, constant = ax.lines
    assert mean.get_linewidth() > 2 * max(patch.get_linewidth() for patch in ax.patches)
    assert mean.get_xdata()[-1] == 72
    np.testing.assert_allclose(np.unique(mean.get_ydata()), [16, 16 * 2**0.5])
    np.testing.assert_allclose(np.unique(constant.get_ydata()), [8, 16])
    assert ax.get_title() == "digits"
    assert ax.get_ylabel() == "batch size [examples]"
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["8", "16", "32", "64"]


def test_methods_differ_without_color():
    """No two lines have one marker and one dash, and each is named at its end."""
    fits = fits_of(7)
    for fig in (plotting.batch_sizes(fits, LIMITS), plotting.losses(fits, num_points=60)):
        (ax,) = fig.axes
        assert len({line.get_markevery() for line in ax.lines}) == 8
        styles = {(line.get_marker(), line.get_linestyle()) for line in ax.lines}
        assert len(styles) == len(labels_at_ends(fig)) == 8
        fig.savefig(io.BytesIO(), format="png")
        extent = matplotlib.text.Text.get_window_extent  # without the line to it
        boxes = sorted(map(extent, ax.texts), key=lambda box: box.y0)
        assert all(a.y1 <= b.y0 + 1 for a, b in itertools.pairwise(boxes))


def test_losses_begin_at_zero_unless_they_fall_far():
    fit = Fit(8)
    fit.recorded["loss"] = np.geomspace(5, 0.1, 6)
    assert plotting.losses({"far": fit}, num_points=6).axes[0].get_yscale() == "log"
    fit.recorded["loss"] = np.array([5, 4, 3, 2, 1.5, 1])
    (ax,) = plotting.losses({"near": fit}).axes
    assert (ax.get_yscale(), ax.get_ylim()[0]) == ("linear", 0)
    fit.recorded["loss"] = np.array([5, 4, 3, 2, -2, -2])  # the density of a continuous variable
    (ax,) = plotting.losses({"negative": fit}).axes
    assert (ax.get_yscale(), ax.get_ylim()[0] < -1) == ("linear", True)


def test_runs_are_loss_above_batch_size():
    several = types.SimpleNamespace(history=[[], []], of_seed=lambda i: Fit(8 << i))
    several.history[0] = Fit(8).history
    fits = {"constant_8": Fit(8), "seeds": several}
    top, bottom = plotting.runs(fits, title="digits").axes
    assert [ax.get_ylabel() for ax in (top, bottom)] == ["training loss", "batch size [examples]"]
    assert (top.get_title(), bottom.get_xlabel()) == ("digits", "training examples seen")
    for ax in (top, bottom):
        assert {text.get_text() for text in ax.texts} == {"constant 8", "seeds"}
    assert len(bottom.patches) == 2  # the seeds
    assert [tick.get_text() for tick in bottom.get_yticklabels()] == ["8", "16", "32"]


@pytest.mark.slow
def test_losses_are_means_over_steps_and_seeds():
    fits = {("rule", 0): Fit(8), ("rule", 1): Fit(8)}
    fits["rule", 1].recorded["loss"] = np.full(6, 3.0)
    (ax,) = plotting.losses(fits, num_points=3).axes
    (line,) = ax.lines
    np.testing.assert_allclose(line.get_xdata(), [12, 36, 60])
    # Three points of 24 examples each: steps end at 8, 16, 24 | 40 | 56, 72.
    loss = np.geomspace(1, 0.1, 6)
    first = [loss[:3].mean(), loss[3], loss[4:].mean()]
    np.testing.assert_allclose(line.get_ydata(), (np.array(first) + 3) / 2)
    assert not plotting.losses({("rule", 0): Fit(8)}, num_points=3).axes[0].collections
    (band,) = ax.collections
    np.testing.assert_allclose(band.get_paths()[0].get_extents().ymax, 3.0)


@pytest.mark.slow
def test_proposals_are_shown_as_batch_sizes():
    sizes = np.tile([16.0, 32.0], (6, 1))
    fit = Fit(
        8,
        proposals=np.asarray(to_logit(sizes, *LIMITS)),
        mixture=np.asarray(to_logit(sizes.mean(1), *LIMITS)),
        mixture_weights=np.tile([0.25, 0.75], (6, 1)),
    )
    top, bottom = plotting.proposals(fit, LIMITS, title="digits").axes
    named = ["proposal 1", "proposal 2", "mixture (meta batch)", "applied batch size"]
    assert legend_of(top) == named
    drawn = [line.get_ydata() for line in top.lines]
    np.testing.assert_allclose(drawn, np.repeat([[16.0], [32.0], [24.0]], 6, axis=1), rtol=1e-5)
    np.testing.assert_allclose([line.get_ydata()[0] for line in bottom.lines], [-250, 250])
    assert bottom.get_ylabel() == "mixture weight\n- 1/2 [1e-3]"


def labels_at_ends(fig):
    return [text.get_text() for text in fig.axes[0].texts]


def test_shadows_are_sorted_by_their_last_size():
    fit = Fit(8, **{"shadow/low": np.full(6, 9.0), "shadow/high": np.arange(6.0) + 20})
    fig = plotting.shadow(fit)
    (ax,) = fig.axes
    assert labels_at_ends(fig) == ["high 25", "applied 16", "low 9"]
    assert [line.get_color() for line in ax.lines].index("black") == 0
    applied, high, low = (line.get_ydata() for line in ax.lines)
    np.testing.assert_allclose(high, np.arange(6.0) + 20)
    np.testing.assert_allclose(low, 9.0)
    np.testing.assert_allclose(applied, fit.per_step("batch_size"))
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["8", "16", "32"]


def test_shadows_of_a_loop_of_ones_own():
    """A long one: each point is the median over neighboring steps."""
    records = [{"a": 16 if step % 10 else 900, "b": 32} for step in range(100)]
    (ax,) = plotting.shadow(records, batch_sizes=8, num_points=10).axes
    np.testing.assert_allclose(ax.lines[2].get_ydata(), 16)
    np.testing.assert_allclose(ax.lines[0].get_xdata(), 8 * np.arange(5.5, 100, 10))
    (ax,) = plotting.shadow(records, num_points=10).axes
    assert ax.get_xlabel() == "steps"
    assert len(ax.lines) == 2


def test_shadows_that_coincide_are_all_seen():
    """The ones below are wider, no two neighbors have one dash, and no labels overlap."""
    records = [dict.fromkeys("abcd", 16)] * 3
    fig = plotting.shadow(records, (8, 64), batch_sizes=16)
    (ax,) = fig.axes
    widths = [line.get_linewidth() for line in ax.lines]
    assert all(below > above for below, above in itertools.pairwise(widths))
    fig.savefig(io.BytesIO(), format="png")
    extent = matplotlib.text.Text.get_window_extent  # without the line to it
    boxes = sorted(map(extent, ax.texts), key=lambda box: box.y0)
    assert len(boxes) == 5
    assert all(a.y1 <= b.y0 + 1 for a, b in itertools.pairwise(boxes))


def test_many_shadows_have_a_legend():
    fig = plotting.shadow([{f"rule_{i}": 2**i for i in range(12)}])
    assert legend_of(fig)[:2] == ["rule_11 2048", "rule_10 1024"]
    assert labels_at_ends(fig) == []


EMPTY = types.SimpleNamespace(history=[])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plotting.batch_sizes(None, LIMITS), "fits must be a dict .*, got NoneType"),
        (lambda: plotting.batch_sizes(Fit(8), LIMITS), "fits must be a dict .*, got Fit"),
        (lambda: plotting.losses({8: Fit(8)}), r"fits must be a dict .* keys \[8\]"),
        (lambda: plotting.runs(fits_of(8)), "fits must hold at most 8 methods, got 9"),
        (lambda: plotting.losses({}), "fits must hold at least one run"),
        (lambda: plotting.losses({("a", 0): EMPTY}), "fits must hold at least one run"),
        (lambda: plotting.losses({("a", 0): Fit(8)}, num_points=0), "num_points must be"),
        (lambda: plotting.batch_sizes({("a", 0): Fit(8)}, (8,)), r"limits must be \(smallest"),
        (lambda: plotting.batch_sizes({("a", 0): Fit(8)}, (0, 8)), "min_batch_size must be"),
        (lambda: plotting.batch_sizes({("a", 0): Fit(8)}, (9, 8)), "max_batch_size must be >="),
        (lambda: plotting.proposals(Fit(8), LIMITS), r"run with arbiter_jax\.arbiter in its chain"),
        (lambda: plotting.proposals(EMPTY, LIMITS), "got one of 0 windows that reports nothing"),
        (lambda: plotting.shadow(Fit(8, gain=np.ones(6)), LIMITS), "shadow .* that reports gain"),
        (lambda: plotting.shadow([]), "run must be a FitResult or a sequence .* got 0 entries"),
        (lambda: plotting.shadow([{"a": 8}, {"b": 8}]), "each with the same names"),
        (lambda: plotting.shadow([{"a": 8}] * 3, batch_sizes=[8, 8]), "each of the 3 steps"),
        (lambda: plotting.shadow([{"a": math.nan}]), r"a must be finite sizes .* got \[nan\]"),
        (lambda: plotting.shadow([{"a": "x"}]), r"a must be finite sizes .* got \['x'\]"),
        (lambda: plotting.shadow([{"a": 8}], batch_sizes=[math.nan]), "batch_sizes must be finite"),
        (lambda: plotting.shadow({"a": 8}), "fit must be a FitResult, got dict"),
    ],
)
def test_nothing_to_draw_is_an_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_runs_without_a_window_are_left_out():
    fits = {("a", 0): Fit(8), ("b", 0): EMPTY}
    assert labels_at_ends(plotting.batch_sizes(fits, LIMITS)) == ["a"]
    assert labels_at_ends(plotting.losses(fits)) == ["a"]


def test_a_diverged_run_is_drawn_up_to_there():
    fit = Fit(8)
    fit.recorded["loss"] = np.array([1.0, 0.5, 0.2, np.nan, np.nan, np.nan])
    fig = plotting.losses({("a", 0): fit}, num_points=9)
    drawn = fig.axes[0].lines[0].get_ydata()
    assert np.isfinite(drawn[:3]).all()
    assert np.isnan(drawn[-1])
    fig.savefig(io.BytesIO(), format="png")


def test_notebooks_display_figures_as_images():
    """Also if pyplot, which registers its figures with IPython, is never imported."""
    formatters = pytest.importorskip("IPython.core.formatters", reason="needs ipykernel")
    fig, _ = plotting.figure(size=(2.0, 1.0))
    data, metadata = formatters.DisplayFormatter().format(fig)
    image = data["image/png"]
    assert image.startswith(b"\x89PNG")
    assert int.from_bytes(image[16:20], "big") == 2 * 150  # the width, in pixels
    assert metadata["image/png"] == {"width": 192, "height": 96}
    assert not hasattr(fig, "number")  # the number that pyplot gives its figures


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plotting._figures._figure_class.cache_clear()
    with pytest.raises(ImportError, match=r'pip install "arbiter-jax\[plotting\]"'):
        plotting.figure()
