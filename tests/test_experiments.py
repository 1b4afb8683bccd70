"""Every experiment: its configs, its command line, its files, its documents, what it imports."""

import ast
import copy
import csv
import dataclasses
import errno
import importlib
import json
import math
import os
import pathlib
import re
import resource
import runpy
import signal
import sys
import tempfile

import jax
import numpy as np
import platformdirs
import pytest

from arbiter_jax import models
from experiments import _flags, _runner
from experiments._program_cache import use_program_cache
from experiments._run_cache import RunCache
from experiments.benchmark import floor, networks
from experiments.noise_rules import controls, tables
from tests.script_runs import run_main

FOLDER = pathlib.Path(__file__).parents[1] / "experiments"
NAMES = sorted(
    path.stem
    for path in FOLDER.iterdir()
    if not path.stem.startswith("_")
    and path.stem != "report"  # it compares experiments
    and (path.suffix == ".py" or (path / "__main__.py").exists())
)


def load(name):
    return importlib.import_module(f"experiments.{name}")


def document(name):
    """Where an experiment keeps its measurements."""
    folder = FOLDER / name
    return folder / "README.md" if folder.is_dir() else FOLDER / f"{name}.md"


def check_files(name, folder, printed):
    """What every run writes; returns its summary."""
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["experiment"] == name
    assert summary["rows"]
    assert {"config", "versions"} <= set(summary)
    with (folder / "metrics.csv").open() as file:
        assert list(csv.DictReader(file))
    figures = list(folder.glob("*.png"))
    assert figures
    assert all(figure.stat().st_size > 5_000 for figure in figures)
    assert str(summary["rows"][0]["method"])[:12] in printed
    return summary


@pytest.mark.parametrize("name", NAMES)
def test_has_a_header_and_three_frozen_configs(name):
    module = load(name)
    assert f"python -m experiments.{name}" in module.__doc__
    for heading in ("Claim", "Command:", "Time:", "Expected:", "Measured:"):
        assert heading in module.__doc__, heading
    assert "README.md" not in module.__doc__.split("Time:")[1].split("Expected:")[0]
    assert set(module.CONFIGS) - {"device"} == {"smoke", "default", "paper"}
    for config in module.CONFIGS.values():
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.seeds = ()


@pytest.mark.parametrize("name", NAMES)
def test_help_explains_every_flag(name, capsys, monkeypatch):
    """Runs the module as `python -m` does."""
    main = FOLDER / name / "__main__.py"
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(main if main.exists() else FOLDER / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    usage, options = printed.split(" options: ")
    assert f"python -m experiments.{name}" in usage
    for field in dataclasses.fields(load(name).Config):
        assert f"[--{field.name.replace('_', '-')}" in usage
        text = field.metadata.get("help") or _flags.COMMON_HELP[field.name]
        choices = field.metadata.get("choices") or _flags.COMMON_CHOICES.get(field.name)
        chosen = f" Choices: {', '.join(choices)}." if choices else ""
        assert len(text.split()) >= 2, field.name
        given = _flags._as_given(field.default)
        sentence = f"{text[0].upper()}{text[1:]}.{chosen} Default: {given}."
        assert sentence in options


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_among_the_choices(name):
    for config in load(name).CONFIGS.values():
        for field in dataclasses.fields(config):
            choices = field.metadata.get("choices") or _flags.COMMON_CHOICES.get(field.name)
            value = getattr(config, field.name)
            values = value if isinstance(value, tuple) else (value,)
            assert not choices or set(values) <= set(choices)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_device_benchmark_names_the_device(tmp_path, capsys):
    flags = ["--config", "device", "--only", "MLP", "--pairs", "1", "--output", str(tmp_path)]
    run_main("benchmark", flags)
    printed = capsys.readouterr().out
    summary = check_files("benchmark", tmp_path, printed)
    assert "no accelerator at hand" in printed
    notes = {row["method"].removeprefix("MLP, "): row.get("note", "") for row in summary["rows"]}
    assert all(name in notes["first step"] for name in ("trace", "lower", "compile"))
    assert notes["window of fit / its program"].startswith("host: ")
    assert {f"B = {size}" for size in (64, 128, 256, 512)} <= set(notes)
    for window in ("plain", "noise scale", "noise floor", "Arbiter"):
        assert any(name.startswith(f"{window} / hand-written step") for name in notes)


@pytest.mark.slow
def test_floor_of_the_benchmark_counts_the_work():
    network = networks.Network("MLP", models.mlp(networks.SHAPE, (256,), 10), None)
    work = floor.network_work(network, 64)
    flops, size = floor.cost(work)
    # Weights: forward and their gradient; the second layer's inputs as well.
    by_hand = 2 * 64 * (2 * 784 * 256 + 3 * 256 * 10)
    assert by_hand <= flops <= 1.02 * by_hand
    num_bytes = 4 * (64 * 784 + 2 * (784 * 256 + 256 * 10))  # inputs, parameters and gradient
    assert num_bytes <= size <= 3 * num_bytes
    assert floor.timed_work(work, 2)() > 0


def test_benchmark_without_torch_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit) as stop:
        run_main("benchmark", ["--compare", "torch", "--output", str(tmp_path)])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert "needs PyTorch" in printed
    assert printed.count("\n") == 1


LEFT_OUT_OF_CI = ("complement_fixed_schedule", "standalone_scheduler", "tasks", "three_ways")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    # That of the main job is a step of `.ci/run`. The others take the longest.
    [
        pytest.param(name, marks=pytest.mark.exhaustive if name in LEFT_OUT_OF_CI else ())
        for name in NAMES
    ],
)
def test_smoke_run_leaves_the_config_alone(name, tmp_path, capsys):
    configs = load(name).CONFIGS
    before = copy.deepcopy(configs)
    run_main(name, ["--config", "smoke", "--output", str(tmp_path)])
    assert configs == before
    check_files(name, tmp_path, capsys.readouterr().out)


@pytest.mark.slow
def test_main_job_writes_what_the_contract_names(tmp_path, capsys):
    """The smallest run of the main job; its smoke run is slow, and a step of `.ci/run`."""
    name, configs = "standalone_scheduler", load("standalone_scheduler").CONFIGS
    before = copy.deepcopy(configs)
    flags = ["--config=smoke", "--methods=constant_64", "--epochs=1", f"--output={tmp_path}"]
    run_main(name, flags)
    assert configs == before
    (row,) = check_files(name, tmp_path, capsys.readouterr().out)["rows"]
    assert {
        "method",
        "seed",
        "test_loss",
        "test_accuracy",
        "validation_loss",
        "num_steps",
        "num_examples",
        "seconds",
        "num_compilations",
        "batch_sizes",
    } <= set(row)
    assert row["num_examples"] == 64 * row["num_steps"]
    assert set(row["batch_sizes"]) == {64}


# Compiled programs


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(platformdirs, "user_cache_dir", lambda *args, **options: tmp_path / "user")
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "user" / "programs"
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_the_users_cache(cache_folder):
    use_program_cache()
    assert jax.config.jax_compilation_cache_dir == str(cache_folder)
    assert cache_folder.is_dir()


def test_the_settings_of_jax_win(cache_folder):
    jax.config.update("jax_compilation_cache_dir", "elsewhere")
    use_program_cache()
    assert jax.config.jax_compilation_cache_dir == "elsewhere"
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        use_program_cache()
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert jax.config.jax_compilation_cache_dir is None


def test_a_cache_that_cannot_be_written_is_no_error(cache_folder, monkeypatch):
    cache_folder.parent.write_text("a file where the folder should be")
    use_program_cache()
    assert jax.config.jax_compilation_cache_dir is None
    cache_folder.parent.unlink()
    monkeypatch.setattr(os, "access", lambda *args: False)  # root may write everywhere
    use_program_cache()
    assert jax.config.jax_compilation_cache_dir is None


# The documents


def test_readme_has_one_short_line_per_experiment():
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (FOLDER / "README.md").read_text().splitlines()
        if line.startswith("| [")
    ]
    assert sorted(line[0].split("`")[1] for line in lines) == NAMES
    for name, *cells in lines:
        path = name.split("(")[1].rstrip(")")
        assert FOLDER / path == document(name.split("`")[1])
        assert all(cells), name
        assert max(map(len, (name, *cells))) <= 120, name


@pytest.mark.parametrize("name", NAMES)
def test_document_has_claim_verdict_and_command(name):
    text = document(name).read_text()
    assert text.startswith(f"# {name}: ")
    assert "**Claim" in text
    assert "**Verdict" in text
    assert f"python -m experiments.{name}" in text


# What experiments import


def imported_names(path):
    """(module, name) of every import; name is "" for `import module`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def test_experiments_use_public_names_only():
    offenders = []
    for path in sorted(FOLDER.rglob("*.py")):
        text = path.read_text()
        offenders += [
            f"{path.relative_to(FOLDER)}: {module} {name}"
            for module, name in imported_names(path)
            if module.split(".")[0] == "arbiter_jax"
            and any(part.startswith("_") for part in (*module.split("."), name))
        ]
        offenders += re.findall(r"\baj(?:\.\w+)*\._[a-z]\w*|.*__kwdefaults__.*", text)
    assert offenders == []


# Wrong usage


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config", "nonsense"], "--config"),
        (["--seeds", "one"], "--seeds"),
        (["--no-such-flag"], "--no-such-flag"),
        (["--config", "smoke", "--dataset", "no_such_data_set"], "no_such_data_set"),
        (["--config", "smoke", "--dataset", "diabetes"], "--dataset"),
        (["--config", "smoke", "--model", "perceptron"], "--model"),
        (["--config", "smoke", "--methods", "oracle"], "--methods"),
        (["--config", "smoke", "--min-batch-size", "600"], "min_batch_size"),
        (["--config", "smoke", "--output", "/proc/nothing"], "--output"),
        (["--methods", "constant_64", "oracle"], "got 'oracle'"),
        (["--epochs", "nan"], "must be a finite number >= 0, got 'nan'"),
        (["--epochs", "-1"], "--epochs"),
        (["--window", "2.5"], "must be an integer >= 0, got '2.5'"),
        (["--decays", "linear"], "--decays"),
        (["--dataset", "digit"], "Did you mean 'digits'?"),
        (["stray"], "stray"),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_main("standalone_scheduler", ["--output", str(tmp_path), *flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


@dataclasses.dataclass(frozen=True)
class Config:
    seeds: tuple[int, ...] = (0, 1)


def run_small(output, run=None, plot=None, name="small"):
    """An experiment that trains nothing, from its command line."""
    finished = [{"method": "a", "seed": 0, "test_loss": 0.25}]

    def default(config):
        return _runner.Results(rows=finished, windows=finished)

    _runner.main(
        name,
        {"default": Config()},
        run or default,
        plot or (lambda results, output: (output / "figure.png").write_bytes(b"figure")),
        lambda results: _runner.make_table("t", ["method"], [[r["method"]] for r in results.rows]),
        "",
        ["--output", str(output)],
    )


def refused(capsys, status, output, **arguments):
    """What a run that ends with this status prints on standard error, one line."""
    with pytest.raises(SystemExit) as stop:
        run_small(output, **arguments)
    assert stop.value.code == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_files_are_written_and_replaced(tmp_path, capsys):
    for _ in range(2):
        run_small(tmp_path)
        assert names(tmp_path) == ["figure.png", "metrics.csv", "summary.json"]
        assert "Written to" in capsys.readouterr().out


@pytest.mark.parametrize("place", ["write", "plot"])
def test_a_full_disk_does_not_lose_the_results(place, tmp_path, capsys, monkeypatch):
    run_small(tmp_path)
    before = (tmp_path / "summary.json").read_text(), (tmp_path / "figure.png").read_bytes()

    def full(*arguments):
        (arguments[-1] / "figure.png").write_bytes(b"half a fi")
        raise OSError(errno.ENOSPC, "No space left on device")

    if place == "write":
        monkeypatch.setattr(_runner, "write", full)
    with pytest.raises(SystemExit) as stop:
        run_small(tmp_path, plot=full)
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1
    assert "No space left on device; see the table" in printed.err
    assert "method" in printed.out
    assert names(tmp_path) == ["figure.png", "metrics.csv", "summary.json"]
    assert (
        (tmp_path / "summary.json").read_text(),
        (tmp_path / "figure.png").read_bytes(),
    ) == before


def test_without_matplotlib_only_the_figures_are_lost(tmp_path, capsys):
    def plot(results, folder):
        raise ImportError("Figures need matplotlib.")

    with pytest.raises(SystemExit) as stop:
        run_small(tmp_path, plot=plot)
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert printed.err.endswith(": Figures need matplotlib.\n")
    assert "method" in printed.out
    assert names(tmp_path) == ["metrics.csv", "summary.json"]


def test_a_folder_that_cannot_be_used_is_found_at_once(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").touch()
    never = lambda config: pytest.fail("it trained")
    assert "--output" in refused(capsys, 2, tmp_path / "file", run=never)
    assert "--output" in refused(capsys, 2, tmp_path / "file" / "folder", run=never)

    def read_only(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    assert "Read-only file system" in refused(capsys, 2, tmp_path, run=never)


def test_two_experiments_need_two_folders(tmp_path, capsys):
    run_small(tmp_path, name="other")
    assert "holds the results of other" in refused(capsys, 2, tmp_path)
    (tmp_path / "summary.json").write_text("[]")
    assert "holds the results of something else" in refused(capsys, 2, tmp_path)


def test_two_runs_at_once_need_two_folders(tmp_path, capsys):
    def second(config):
        assert "another run is writing to" in refused(capsys, 2, tmp_path)
        return _runner.Results()

    run_small(tmp_path, run=second)
    run_small(tmp_path)  # it is free again


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt, 130), (ValueError("learning_rate must be"), 2), (RuntimeError, None)],
)
def test_what_had_been_finished_is_kept(error, status, tmp_path, capsys):
    run_small(tmp_path)
    before = (tmp_path / "summary.json").read_text()

    def run(config):
        results = _runner.Results()
        results.rows.append({"method": "a", "seed": 0, "test_loss": np.float32(0.5)})
        raise error

    with pytest.raises(SystemExit if status else error) as stop:
        run_small(tmp_path, run=run)
    assert status is None or stop.value.code == status
    assert "1 finished rows are in" in capsys.readouterr().err
    [row] = json.loads((tmp_path / "unfinished.json").read_text())["rows"]
    assert row["test_loss"] == 0.5
    assert (tmp_path / "summary.json").read_text() == before


def test_an_interrupt_ends_with_one_line(tmp_path, capsys, monkeypatch):
    def interrupted(config):
        raise KeyboardInterrupt

    module = load("standalone_scheduler")
    with pytest.raises(SystemExit) as stop:
        _runner.main(
            "x",
            module.CONFIGS,
            interrupted,
            module.plot,
            module.table,
            "",
            ["--output", str(tmp_path)],
        )
    assert stop.value.code == 130
    assert "interrupted" in capsys.readouterr().err


# Runs that are stored


def test_a_stored_run_is_made_once(tmp_path):
    path, made = str(tmp_path / "runs.jsonl"), []

    def make():
        made.append(1)
        return {"test_loss": np.float32(0.25), "diverged": math.nan}

    first = RunCache(path)
    run = first.get_or_make({"seed": 0, "rate": 0.1}, make)
    assert first.get_or_make({"seed": 0, "rate": 0.1}, make) is run
    again = RunCache(path).get_or_make({"seed": 0, "rate": 0.1}, make)
    assert len(made) == 1
    assert again["test_loss"] == 0.25
    assert math.isnan(again["diverged"])
    RunCache(path).get_or_make({"seed": 1, "rate": 0.1}, make)
    assert len(made) == 2
    assert len(pathlib.Path(path).read_text().splitlines()) == 2
    RunCache("").get_or_make({"seed": 0, "rate": 0.1}, make)
    assert len(made) == 3


def test_a_broken_line_of_the_run_cache_is_named(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('[{"seed": 0}, {"test_loss": 1.0}]\n[{"seed": 1}, {"te')  # killed while writing
    with pytest.raises(_runner.UsageError, match=r"line 2 of .* must be a stored run, got '\[\{"):
        RunCache(str(path))
    for line in (b"3", b"\xff\xfe", b"[" * 100_000, b"[1, 2, 3]"):
        path.write_bytes(line)
        with pytest.raises(_runner.UsageError, match=r"line 1 of .* must be a stored run"):
            RunCache(str(path))


def test_a_run_cache_that_is_no_file_is_found_at_once(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "runs.jsonl", tmp_path / "huge"):
        if path.name == "huge":
            with path.open("wb") as file:
                file.truncate(2**40)  # a sparse file, which takes no space
        with pytest.raises(_runner.UsageError, match="--runs must be a file"):
            RunCache(str(path))


def test_a_full_disk_leaves_the_run_cache_whole(tmp_path, capsys, monkeypatch):
    path = tmp_path / "runs.jsonl"
    cache = RunCache(str(path))
    cache.get_or_make({"seed": 0}, lambda: 1)
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 4, limit[1]))
        assert cache.get_or_make({"seed": 1}, lambda: 2) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == before
    assert "misses a run" in capsys.readouterr().err


# What a table counts


def test_noise_rules_are_counted_against_best_sizes():
    """Of two sizes, validation chooses the worse; one run of the rule diverged."""

    def row(method, start, test_loss, decay="constant", validation_loss=1.0, num_steps=100):
        case = {"task_name": "digits", "optimizer": "sgd", "case_rate": 0.1, "part": "table"}
        case |= {"method": method, "start": start, "decay": decay, "num_steps": num_steps}
        return case | {"test_loss": test_loss, "validation_loss": validation_loss}

    rows = [
        row("constant", 8, 1.00, validation_loss=1.2),
        row("constant", 16, 1.10, num_steps=50),
        row("constant", 8, 0.90, decay="cosine", validation_loss=0.9),
        row("noise_floor", 16, 0.91, num_steps=55),  # 9% below, 1.1% above the decay
        row("noise_floor", 64, 1.05),  # above the best size, below the chosen one
        row("noise_floor", 256, math.nan),
    ]
    [record] = tables.judge(rows)
    assert record["constant"] == (8, 1.0)
    assert record["chosen"] == (16, 1.1)
    assert record["decayed"][:2] == ("cosine", 8)
    [line] = tables.counted([record])
    below, near, mean, median, worst, diverged, chosen, of_decay, cheap = line[2:]
    assert line[:2] == ["all, noise_floor", "3"]
    assert (below, near, chosen, of_decay, cheap) == ("33", "33", "67", "33", "33")
    assert (mean, median, worst, diverged) == ("-2.0", "+5.0", "+inf", "1")


def test_time_order_is_paired_by_seed_within_a_case():
    """Two cases of two seeds: permuted 10% worse in one; a permuted run diverged in the other."""

    def runs(rate, *losses):
        labels = ("noise_floor", "noise_floor, replayed", "noise_floor, permuted")
        case = {"task_name": "digits", "optimizer": "sgd", "case_rate": rate}
        return [
            case | {"method": label, "test_loss": loss}
            for label, loss in zip(labels, losses, strict=True)
        ]

    rows = [*runs(0.1, 1.0, 1.1, 1.1), *runs(0.1, 2.0, 2.2, 2.2)]
    rows += [*runs(0.3, 1.0, 1.0, 0.9), *runs(0.3, 1.0, 1.0, math.nan)]
    effects = controls.order_effects(rows, "noise_floor", "noise_floor")
    np.testing.assert_allclose(effects, [math.log(1.1), math.nan])
    effects = controls.order_effects(rows, "noise_floor", "noise_floor, replayed")
    np.testing.assert_allclose(effects, [0, math.nan], atol=1e-12)
    table = controls.time_order_table(rows)
    over_own = [next(iter(column.cells)) for column in table.columns]
    assert over_own == ["digits, noise_floor, over own", "2", "9.53", "+9.53", "1", "1"]
