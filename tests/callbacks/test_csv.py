"""A row per window: its values, and what is left of them when a run is killed and goes on."""

import csv
import os
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import arbiter_jax as aj
from tests.callbacks.runs import SPLIT, KilledError, fit, kill_after, loss, predict


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def seen(path):
    return [int(row["num_examples"]) for row in read(path)]


def without_times(path):
    times = ("seconds", "examples_per_second", "num_compilations")
    return [{k: v for k, v in row.items() if k not in times} for row in read(path)]


def test_the_numbers_of_every_window(tmp_path):
    history = fit(aj.callbacks.csv(tmp_path / "new" / "run.csv")).history
    rows = read(tmp_path / "new" / "run.csv")
    assert len(rows) == len(history) == 7
    for row, record in zip(rows, history, strict=True):
        for name in ("window_index", "num_examples", "num_steps", "batch_size", "bucket_size"):
            assert int(row[name]) == getattr(record, name)
        assert float(row["loss"]) == record.loss
        assert float(row["seconds"]) == record.seconds
        speed = record.num_steps * record.batch_size / record.seconds
        assert float(row["examples_per_second"]) == pytest.approx(speed)
        assert float(row["shadow/nine"]) == np.mean(record.info.metrics["shadow/nine"]) == 9


def test_a_row_is_in_the_file_when_its_window_ends(tmp_path):
    path = tmp_path / "run.csv"
    found = []
    look = lambda record, state: found.append(len(read(path)))
    fit([aj.callbacks.csv(path), look])
    assert found == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_run_has_the_rows_of_a_whole_one(tmp_path, every):
    pytest.importorskip("orbax.checkpoint")

    def run(name, *others, **options):
        evaluate = aj.callbacks.evaluate(predict, loss, SPLIT, every=2)
        return fit([evaluate, aj.callbacks.csv(tmp_path / name), *others], **options)

    saved = {"checkpoints": aj.checkpoints(tmp_path / "c", every=every), "resume": True}
    with pytest.raises(KilledError):
        run("killed.csv", kill_after(5), **saved)
    assert seen(tmp_path / "killed.csv") == [24, 48, 72, 96, 120]  # two more than were saved
    with open(tmp_path / "killed.csv", "a") as file:
        file.write("5,14")  # the process died while it wrote
    result = run("killed.csv", **saved)
    whole = run("whole.csv")
    assert without_times(tmp_path / "killed.csv") == without_times(tmp_path / "whole.csv")
    assert [r.evaluation for r in result.history] == [r.evaluation for r in whole.history]
    # A run that had ended is read again.
    run("killed.csv", **saved)
    assert without_times(tmp_path / "killed.csv") == without_times(tmp_path / "whole.csv")


def test_a_run_from_a_state_appends_a_new_one_does_not(tmp_path):
    rows = aj.callbacks.csv(tmp_path / "run.csv")
    first = fit(rows, stop_at=72)
    assert seen(tmp_path / "run.csv") == [24, 48, 72]
    fit(rows, state=jax.tree.map(jnp.copy, first.state))
    assert seen(tmp_path / "run.csv") == [24, 48, 72, 96, 120, 144, 150]
    fit(rows, state=first.state, stop_at=96)
    assert seen(tmp_path / "run.csv") == [24, 48, 72, 96]
    fit(rows, stop_at=48)
    assert seen(tmp_path / "run.csv") == [24, 48]


@pytest.mark.parametrize("cell", ["", "abc", "4.5"])
def test_a_damaged_row_is_named_where_it_matters(tmp_path, cell):
    path = tmp_path / "run.csv"
    first = fit(aj.callbacks.csv(path), stop_at=72)
    path.write_text(path.read_text().replace("\n1,48,", f"\n1,{cell},"))
    damaged = path.read_text()
    message = f"the row of window_index 1 has no whole number as num_examples, '{cell}': remove"
    with pytest.raises(ValueError, match=message):
        fit(aj.callbacks.csv(path), state=first.state)
    assert path.read_text() == damaged
    fit(aj.callbacks.csv(path), stop_at=48)  # a new run replaces the file
    assert seen(path) == [24, 48]


def test_new_columns_leave_empty_cells(tmp_path):
    def note(record, state):
        if record.window_index in (2, 4):
            record.evaluation[f"odd, {record.window_index}"] = jnp.float32(0.5)

    history = fit([note, aj.callbacks.csv(tmp_path / "run.csv")]).history
    rows = read(tmp_path / "run.csv")
    assert [row["odd, 2"] for row in rows] == ["", "", "0.5", "", "", "", ""]
    assert [row["odd, 4"] for row in rows] == ["", "", "", "", "0.5", "", ""]
    assert [float(row["loss"]) for row in rows] == [record.loss for record in history]
    assert history[2].evaluation == {"odd, 2": 0.5}
    assert os.listdir(tmp_path) == ["run.csv"]


def test_it_is_closed_after_an_exception(tmp_path):
    rows = aj.callbacks.csv(tmp_path / "run.csv")
    with pytest.raises(KilledError):
        fit([rows, kill_after(2)])
    assert rows._file is None
    assert seen(tmp_path / "run.csv") == [24, 48]


def test_what_it_cannot_write_is_named_at_once(tmp_path):
    (tmp_path / "text").write_text("a,b\n1,2\n")
    for path, message in {
        3: "path must be the path of a file, got 3",
        "": "path must be the path of a file",
        tmp_path: "path must be a regular file, got .*, which is a directory or a device",
        os.devnull: "path must be a regular file, got .*, which is a directory",  # and is not replaced
        tmp_path / "text" / "run.csv": "path must be a file that can be written",
        tmp_path / "text": "path must be a new file or one that callbacks.csv has written",
    }.items():
        with pytest.raises(ValueError, match=f"^{message}"):
            aj.callbacks.csv(path)
    assert (tmp_path / "text").read_text() == "a,b\n1,2\n"


def test_a_link_stays_one(tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "run.csv")
    fit(aj.callbacks.csv(tmp_path / "link.csv"))
    assert (tmp_path / "link.csv").is_symlink()
    assert seen(tmp_path / "run.csv") == [24, 48, 72, 96, 120, 144, 150]


def test_two_into_one_file_are_refused(tmp_path):
    two = [aj.callbacks.csv(tmp_path / "run.csv") for _ in range(2)]
    with pytest.raises(ValueError, match=r"^path must be another one for each .* 2 times"):
        fit(two)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=r"^path must be .*: Permission denied"):
        aj.callbacks.csv(tmp_path / "run.csv")


def test_several_seeds_are_refused(tmp_path):
    keys = jax.random.split(jax.random.key(0), 2)
    for callback in (
        aj.callbacks.csv(tmp_path / "run.csv"),
        aj.callbacks.log(print),
        aj.callbacks.evaluate(predict, loss, SPLIT),
    ):
        with pytest.raises(ValueError, match=r"one run, got .* 2 seeds: run the seeds one after"):
            fit_seeds(keys, callback)


def fit_seeds(keys, callbacks):
    from tests.callbacks.runs import TX, loss_fn

    params = jnp.zeros(len(keys))
    options = {"num_examples": 150, "window": 4, "key": keys, "callbacks": callbacks}
    return aj.fit(loss_fn, params, TX, aj.Data(SPLIT), **options)


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    rows = aj.callbacks.csv(tmp_path / "run.csv")
    start = aj.training.RunStart([], 0, 150, None, (rows,))
    rows.begin(start)
    rows(types.SimpleNamespace(window_index=0), None)
    rows.close()
    assert os.listdir(tmp_path) == []
