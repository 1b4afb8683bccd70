"""Loss and accuracy on other data: when, where they are kept, and how they end a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import arbiter_jax as aj
from tests.callbacks.runs import SPLIT, KilledError, fit, kill_after, loss, predict
from tests.training.resume_runs import arrays, assert_same_run


def evaluate(**options):
    return aj.callbacks.evaluate(predict, loss, SPLIT, **options)


def test_every_few_windows_and_after_the_last():
    found = []

    def look(record, state):
        found.append((dict(record.evaluation), float(state.params)))

    history = fit([evaluate(every=3, name="test"), look]).history
    assert [bool(record.evaluation) for record in history] == [0, 0, 1, 0, 0, 1, 1]
    for (evaluation, w), record in zip(found[:6], history, strict=False):
        assert evaluation == record.evaluation
        if evaluation:
            expected = np.mean((w * SPLIT[0] - SPLIT[1]) ** 2)
            assert evaluation == {"test/loss": pytest.approx(float(expected), rel=1e-5)}
    assert found[6][0] == {}  # the last one is evaluated after all have been called
    expected = aj.metrics.evaluate(predict, loss, found[6][1], SPLIT).loss
    assert history[6].evaluation == {"test/loss": pytest.approx(expected, rel=1e-5)}


def test_every_so_many_examples():
    history = fit(evaluate(every_examples=70)).history
    seen = [record.num_examples for record in history]
    due = [n // 70 > before // 70 for before, n in zip([0, *seen], seen, strict=False)]
    assert sum(due) >= 2
    assert [bool(record.evaluation) for record in history] == [*due[:-1], True]
    with pytest.raises(
        ValueError, match="every and every_examples exclude each other, got 2 and 70"
    ):
        evaluate(every=2, every_examples=70)
    with pytest.raises(ValueError, match="every_examples must be an integer >= 1, got 0"):
        evaluate(every_examples=0)


def test_an_accuracy_where_there_are_classes():
    inputs, labels = jnp.eye(3), jnp.array([0, 1, 1])
    score = lambda w, x: x + 0 * w
    squares = lambda outputs, labels: jnp.sum(outputs**2, axis=-1)
    record = fit(aj.callbacks.evaluate(score, squares, (inputs, labels))).history[0]
    assert record.evaluation == pytest.approx(
        {"evaluation/loss": 1.0, "evaluation/accuracy": 2 / 3}
    )


def test_training_is_bit_for_bit_the_same_with_it():
    assert_same_run(arrays(fit(evaluate(every=2))), arrays(fit()))


def test_it_can_end_a_run():
    seen = []

    def stop(results):
        seen.append([metrics.loss for metrics in results])
        return len(results) == 2

    result = fit(evaluate(every=2, stop=stop))
    assert len(result.history) == 4
    losses = [result.history[i].evaluation["evaluation/loss"] for i in (1, 3)]
    assert seen == [losses[:1], losses]
    # So can a function after it.
    below = lambda record, state: record.evaluation.get("evaluation/loss", 9) <= losses[1]
    assert len(fit([evaluate(every=2), below]).history) == 4


def test_a_resumed_run_evaluates_as_a_whole_one_does(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    seen = []
    stop = lambda results: seen.append(len(results)) or len(results) == 3
    saved = {"checkpoints": aj.checkpoints(tmp_path), "resume": True}
    with pytest.raises(KilledError):
        fit([evaluate(every=2, stop=stop), kill_after(5)], **saved)
    result = fit(evaluate(every=2, stop=stop), **saved)
    assert seen == [1, 2, 3]
    whole = fit(evaluate(every=2, stop=stop))
    assert [r.evaluation for r in result.history] == [r.evaluation for r in whole.history]
    # What it has ended stays ended, and is not evaluated again.
    again = fit(evaluate(every=2, stop=stop), **saved)
    assert [r.evaluation for r in again.history] == [r.evaluation for r in whole.history]


def test_two_need_different_names():
    both = fit([evaluate(name="a"), evaluate(name="b")], stop_at=24).history[0].evaluation
    assert both["a/loss"] == both["b/loss"]
    with pytest.raises(ValueError, match=r"^name must be different .* got 'evaluation' 2 times"):
        fit([evaluate(), evaluate()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"predict": 3}, "predict must be a function predict"),
        ({"loss": None}, "loss must be a function loss"),
        ({"data": jnp.ones(3)}, r"data must be a pair \(inputs, labels\)"),
        ({"data": (jnp.ones(3), jnp.ones(2))}, "must"),
        ({"every": 0}, "every must be an integer >= 1, got 0"),
        ({"chunk_size": 0.5}, "chunk_size must be an integer >= 1, got 0.5"),
        ({"stop": 3}, "stop must be a function stop"),
        ({"name": ""}, "name must be text, got ''"),
    ],
)
def test_wrong_arguments_are_named_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        aj.callbacks.evaluate(**{"predict": predict, "loss": loss, "data": SPLIT} | changes)


# Any callback


def test_a_note_must_be_a_number():
    for value, shown in (("high", "'high'"), (jnp.ones(3), r"an array float32\[3\]")):
        note = lambda record, state, value=value: record.evaluation.update(gap=value)
        with pytest.raises(ValueError, match=rf"^record.evaluation must .* 'gap': {shown}"):
            fit(note, stop_at=24)


class Recorder:
    def __init__(self):
        self.calls = []

    def begin(self, start):
        self.calls.append(("begin", len(start.history), start.num_examples, start.end))

    def __call__(self, record, state):
        self.calls.append(record.window_index)

    def end(self, record, state):
        self.calls.append(("end", record.window_index))

    def close(self):
        self.calls.append("close")


def test_begin_end_and_close_are_called():
    whole, killed, refused = Recorder(), Recorder(), Recorder()
    state = fit(whole, stop_at=48).state
    assert whole.calls == [("begin", 0, 0, 48), 0, 1, ("end", 1), "close"]
    fit(whole, stop_at=72, state=state)
    assert whole.calls[5:] == [("begin", 0, 48, 72), 0, ("end", 0), "close"]
    with pytest.raises(KilledError):
        fit([killed, kill_after(1)])
    assert killed.calls == [("begin", 0, 0, 150), 0, "close"]
    with pytest.raises(ValueError, match="name must be different"):
        fit([refused, evaluate(), evaluate()])
    assert refused.calls == [("begin", 0, 0, 150), "close"]


def test_they_are_called_for_several_seeds():
    from tests.callbacks.runs import TX, loss_fn

    keys, recorder = jax.random.split(jax.random.key(0), 2), Recorder()
    recorder.__class__ = type(
        "Several",
        (Recorder,),
        {
            "__call__": lambda self, records, state: self.calls.append(len(records)),
            "end": lambda self, records, state: self.calls.append("end"),
        },
    )
    options = {"num_examples": 48, "window": 4, "key": keys, "callbacks": recorder}
    aj.fit(loss_fn, jnp.zeros(2), TX, aj.Data(SPLIT), **options)
    assert recorder.calls == [("begin", 0, 0, 96), 2, 2, "end", "close"]
