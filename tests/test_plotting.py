"""Figures say what they show, however many methods there are."""

import types

import numpy as np
import pytest

from arbiter_jax import plotting

pytest.importorskip("matplotlib")


class Fit:
    """What the figures read of a FitResult: two windows of three steps each."""

    def __init__(self, size):
        sizes = (size, 2 * size)
        ends = np.cumsum([3 * size for size in sizes])
        self.history = [
            types.SimpleNamespace(batch_size=size, num_examples=int(end))
            for size, end in zip(sizes, ends, strict=True)
        ]
        self.recorded = {"batch_size": np.repeat(sizes, 3), "loss": np.geomspace(1, 0.1, 6)}

    def steps(self, name):
        return self.recorded[name]


def fits_of(num_methods):
    names = [f"rule_{i}" for i in range(num_methods)] + ["constant_8"]
    return {(name, seed): Fit(8 + i) for i, name in enumerate(names) for seed in (0, 1)}


def texts(fig):
    titles = [ax.get_title() for ax in fig.axes]
    return titles + [text.get_text() for legend in fig.legends for text in legend.get_texts()]


@pytest.mark.parametrize("num_methods", [2, 12])
def test_every_method_is_named(num_methods):
    fits = fits_of(num_methods)
    many = num_methods > len(plotting.COLORS)
    for fig in (plotting.batch_sizes(fits, (8, 64)), plotting.losses(fits, num_points=4)):
        named = {text.replace(" ", "_") for text in texts(fig)}
        assert {f"rule_{i}" for i in range(num_methods)} <= named
        assert len(fig.axes) == 1 or many
    # A constant size needs no panel of its own, but its loss does.
    assert len(plotting.batch_sizes(fits, (8, 64)).axes) == (num_methods if many else 1)
    assert len(plotting.losses(fits, num_points=4).axes) == (num_methods + 1 if many else 1)
