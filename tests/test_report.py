"""The page that compares runs: what is in it, what it refuses, and that a browser draws it."""

import csv
import dataclasses
import html.parser
import json
import math
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import arbiter_jax as aj
from experiments import _runner, report
from experiments.report import curves, runs

pytest.importorskip("plotly", reason='needs plotly: pip install "arbiter-jax[report]"')


@dataclasses.dataclass(frozen=True)
class Config:
    dataset: str = "digits"
    rate: float = 0.1


def training(method, seed, size, losses=(2.0, 1.0, 0.5), **settings):
    """A row and the windows of a run, as `experiments._training` makes them."""
    shared = {"method": method, "seed": seed, **settings}
    windows = [
        {
            **shared,
            "window_index": i,
            "num_examples": 10 * size * (i + 1),
            "num_steps": 10,
            "batch_size": size,
            "loss": loss,
        }
        for i, loss in enumerate(losses)
    ]
    row = {**shared, "test_loss": losses[-1], "num_steps": 10 * len(losses), "seconds": 1.5}
    row |= {"num_examples": windows[-1]["num_examples"], "batch_sizes": [size] * len(losses)}
    return row, windows


def write(folder, *trainings, experiment="standalone_scheduler", config=Config()):
    """A folder of results."""
    folder.mkdir(exist_ok=True)
    rows, windows = [row for row, _ in trainings], [w for _, each in trainings for w in each]
    _runner.write(experiment, config, _runner.Results(rows, windows), folder)
    return folder


def make(output, *paths):
    """The text of the page that the command writes."""
    report.main([*map(str, paths), "--output", str(output)])
    return output.read_text()


class Page(html.parser.HTMLParser):
    """The parts of a page."""

    def __init__(self, text):
        super().__init__()
        self.attributes, self.cells, self.headings, self.scripts, self.tags = [], [], [], [], []
        self._inside = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self._inside.append(tag)
        if tag == "tr":
            self.cells.append([])
        elif tag in ("td", "th"):
            self.cells[-1].append("")

    def handle_endtag(self, tag):
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data):
        inside = self._inside[-1] if self._inside else ""
        if inside in ("td", "th"):
            self.cells[-1][-1] += data
        elif inside in ("h1", "h2", "h3"):
            self.headings.append(data)
        elif inside == "script":
            self.scripts.append(data)


def traces_of(page):
    """The traces of all figures, from the calls of Plotly."""
    calls = [text for text in page.scripts if "Plotly.newPlot(" in text and len(text) < 1e6]
    decoder = json.JSONDecoder()
    return [
        trace
        for text in calls
        for trace in decoder.raw_decode(text[text.index("[", text.index("newPlot(")) :])[0]
    ]


@pytest.fixture
def two_folders(tmp_path):
    first = [training("noise_floor", seed, 8 + seed) for seed in (0, 1)]
    first.append(training("constant_64", 0, 64))
    second = [training("noise_floor", 0, 16, losses=(2.0, math.nan, math.nan))]
    return (
        write(tmp_path / "a", *first),
        write(tmp_path / "b", *second, config=Config(rate=0.2)),
    )


def test_one_row_per_method_and_all_runs(tmp_path, two_folders):
    page = Page(make(tmp_path / "page.html", *two_folders))
    assert page.headings[0] == "Runs of standalone_scheduler"
    results = {row[0]: row[1:] for row in page.cells[:4]}
    assert results["method"][:4] == ["runs", "test loss", "steps", "examples"]
    assert results["noise_floor, a"][:4] == ["2", "0.5000 ± 0.0000", "30", "255"]
    assert results["constant_64"][:4] == ["1", "0.5000", "30", "1,920"]
    assert results["noise_floor, b"][1] == "-"  # its loss is not finite
    assert ["rate", "0.1", "0.2"] in page.cells  # what differs
    assert [row[:2] for row in page.cells[-4:]] == [
        ["a", "noise_floor"],
        ["a", "noise_floor"],
        ["a", "constant_64"],
        ["b", "noise_floor"],
    ]


def test_the_page_needs_no_other_file(tmp_path, two_folders):
    text = make(tmp_path / "page.html", *two_folders)
    page = Page(text)
    assert not {"link", "img", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not {"src", "href", "data", "action", "srcset"} & {name for name, _ in page.attributes}
    assert "@import" not in text[: text.index("<script>")]
    (policy,) = [value for _, value in page.attributes if value and "default-src" in value]
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_each_method_has_a_line_per_panel(tmp_path, two_folders):
    traces = traces_of(Page(make(tmp_path / "page.html", *two_folders)))
    named = [trace for trace in traces if trace["showlegend"]]
    assert [trace["name"] for trace in named] == ["noise_floor, a", "constant_64", "noise_floor, b"]
    # Two seeds and their mean, one run, one run; each in two panels.
    assert len(traces) == 2 * (3 + 1 + 1)
    for first in named:
        group = [trace for trace in traces if trace["legendgroup"] == first["legendgroup"]]
        assert {trace["yaxis"] for trace in group} == {"y", "y2"}
    looks = [(t["line"]["color"], t["line"]["dash"], t["marker"]["symbol"]) for t in named]
    assert all(len(set(values)) == len(named) for values in zip(*looks, strict=True))


def test_a_loss_never_finite_leaves_the_panel_empty(tmp_path):
    folder = write(tmp_path / "a", training("cabs", 0, 8, losses=(math.nan, math.nan)))
    traces = traces_of(Page(make(tmp_path / "page.html", folder)))
    assert {trace["yaxis"] for trace in traces} == {"y", "y2"}


def test_problems_have_figures_of_their_own(tmp_path):
    trainings = [training("constant_8", 0, 8, task=task) for task in ("text", "images")]
    page = Page(make(tmp_path / "page.html", write(tmp_path / "a", *trainings)))
    assert page.headings[3:5] == ["text", "images"]
    assert page.cells[0][:2] == ["method", "task"]


def test_settings_name_a_line_if_they_differ(tmp_path):
    trainings = [training("cabs", 0, 8, learning_rate=rate, decay="cosine") for rate in (0.1, 0.2)]
    page = Page(make(tmp_path / "page.html", write(tmp_path / "a", *trainings)))
    names = ["cabs, learning rate 0.1", "cabs, learning rate 0.2"]
    assert [trace["name"] for trace in traces_of(page) if trace["showlegend"]] == names
    assert [row[0] for row in page.cells[1:3]] == names


def test_results_without_curves_have_tables(tmp_path):
    folder = write(tmp_path / "a", training("cabs", 0, 8))
    (folder / "metrics.csv").unlink()
    text = make(tmp_path / "page.html", folder)
    assert "have no curves" in text
    assert "Plotly" not in text


def test_names_are_escaped(tmp_path):
    name = "</script><script>document.title = 'owned'</script><b>bold</b> & more"
    folder = write(tmp_path / "<i>a", training(name, 0, 8), config=Config(dataset=name))
    page = Page(make(tmp_path / "page.html", folder))
    assert page.tags.count("script") == 2  # Plotly and a figure
    assert not {"b", "i"} & set(page.tags)
    assert page.cells[1][0] == name
    # Plotly reads a few tags in names, so they are escaped there as well.
    (shown,) = {trace["name"] for trace in traces_of(page)}
    assert shown == html.escape(name, quote=False)


# Files of callbacks.csv


def train(path, size, num_examples=400):
    tx = optax.chain(optax.sgd(0.01), aj.schedulers.constant(size))
    loss_fn = lambda w, batch: (w - batch) ** 2
    data = aj.Data(jnp.arange(64.0))
    options = {"num_examples": num_examples, "window": 5, "callbacks": aj.callbacks.csv(path)}
    return aj.fit(loss_fn, jnp.zeros(()), tx, data, **options)


def test_a_count_that_is_no_number_is_left_out(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("window_index,num_examples,num_steps,batch_size,loss\n0,80,ten,8,1.0\n")
    columns, cells = Page(make(tmp_path / "page.html", path)).cells[:2]
    assert "steps" not in columns
    assert cells[columns.index("examples")] == "80"


@pytest.mark.slow
def test_files_of_the_callback_are_runs(tmp_path):
    paths = tmp_path / "small.csv", tmp_path / "large.csv"
    fits = [train(path, size) for path, size in zip(paths, (8, 16), strict=True)]
    page = Page(make(tmp_path / "page.html", *paths, write(tmp_path / "a", training("x", 0, 8))))
    rows = {row[0]: row[1:] for row in page.cells[:4]}
    column = {name: i for i, name in enumerate(rows["method"])}
    for name, fit in zip(("small", "large"), fits, strict=True):
        shown = rows[name]
        assert shown[column["examples"]] == str(int(fit.state.num_examples))
        assert shown[column["steps"]] == str(int(fit.state.num_steps))
        last = f"{fit.history[-1].loss:.4f}"
        assert shown[column["training loss of the last window"]] == last
    assert rows["x"][column["training loss of the last window"]] == "-"


# Curves


def test_a_point_lies_in_its_window():
    ends, losses, sizes = np.array([10.0, 30.0]), np.array([2.0, 1.0]), np.array([1.0, 2.0])
    curve = runs.Curve({}, "num_examples", ends, losses, sizes)
    np.testing.assert_allclose(curves.thinned(curve, "loss"), [[5, 20], [2, 1]])
    np.testing.assert_allclose(curves.thinned(curve, "batch_size"), [[0, 10, 30], [1, 2, 2]])


def test_long_curves_are_averaged_by_examples():
    ends = np.cumsum(np.tile([1.0, 3.0], curves.MAX_POINTS))
    losses = np.tile([5.0, 1.0], curves.MAX_POINTS)
    curve = runs.Curve({}, "num_examples", ends, losses, losses)
    x, y = curves.thinned(curve, "loss")
    np.testing.assert_allclose(x, np.arange(curves.MAX_POINTS) * 4 + 2)
    np.testing.assert_allclose(y, 2.0)
    x, y = curves.thinned(curve, "batch_size")
    assert x[-1] == ends[-1]
    np.testing.assert_allclose(y, 2.0)


def test_a_mean_is_taken_where_all_runs_are():
    lines = [(np.array([0.0, 10.0]), np.array([4.0, 2.0])), (np.array([5.0, 20.0]), np.ones(2))]
    x, y = curves.mean(lines, steps=False)
    np.testing.assert_allclose([x, y], [[5, 10], [2, 1.5]])
    x, y = curves.mean(lines, steps=True)
    np.testing.assert_allclose([x, y], [[5, 10], [2.5, 1.5]])
    lines[0][1][1] = np.nan
    assert np.isnan(curves.mean(lines, steps=False)[1]).all()


# Wrong usage


def refused(capsys, *argv):
    """The one line on standard error."""
    with pytest.raises(SystemExit) as stop:
        report.main([str(argument) for argument in argv])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("report: ")
    return error


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
    good = write(tmp_path / "good", training("a", 0, 8))
    assert "required: DIR" in refused(capsys)
    assert "does not exist" in refused(capsys, tmp_path / "missing")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no summary.json" in refused(capsys, empty)
    for text in ("", "[]", "{}", '{"experiment": 1, "config": {}, "versions": {}, "rows": []}'):
        (empty / "summary.json").write_text(text)
        assert "is not the summary of an experiment" in refused(capsys, empty)
    assert "has no runs" in refused(capsys, write(empty))
    other = write(tmp_path / "other", training("a", 0, 8), experiment="tasks")
    assert "got standalone_scheduler and tasks" in refused(capsys, good, other)
    assert "more than once" in refused(capsys, good, tmp_path / "other" / ".." / "good")
    (good / "metrics.csv").write_text("")
    assert "metrics.csv' has no rows" in refused(capsys, good)


def test_other_files_are_refused(tmp_path, capsys):
    path = tmp_path / "run.csv"
    for text, words in {
        "": "has no rows",
        "window_index,num_examples,num_steps,batch_size,loss\n": "has no rows",
        "a,b\n1,2\n": "was not written by aj.callbacks.csv",
    }.items():
        path.write_text(text)
        assert words in refused(capsys, path)
    path.write_bytes(b"\xff\x00\xfe\n\x00")
    assert "is not a CSV file" in refused(capsys, path)
    path.unlink()
    train(path, 8)
    with path.open("r+", newline="") as file:
        rows = list(csv.reader(file))
        csv.writer(file).writerows(rows[1:])
    assert "holds 2 runs instead of one" in refused(capsys, path)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            "1,160,10,8,abc",
            "has a damaged row in line 3, whose loss is no number, 'abc': remove it",
        ),
        ("1,l60,10,8,1.0", "in line 3, whose num_examples is no number, 'l60'"),
        ("1,160,10", "has a damaged row in line 3, with more or fewer cells than the first line"),
        ("1,160,10,8,1.0,5", "has a damaged row in line 3, with more or fewer cells"),
    ],
)
def test_a_damaged_row_is_named(row, words, tmp_path, capsys):
    path, header = tmp_path / "run.csv", "window_index,num_examples,num_steps,batch_size,loss"
    path.write_text(f"{header}\n0,80,10,8,nan\n{row}\n2,240,10,8,1.0\n")
    error = refused(capsys, path)
    assert "run.csv' " in error
    assert words in error


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, capsys):
    good = write(tmp_path / "good", training("a", 0, 8))
    before = sorted(good.iterdir())
    for output in (good / "summary.json", good, "/proc/page.html", good / "metrics.csv" / "p.html"):
        assert "--output must be a file that" in refused(capsys, good, "--output", output)
    assert sorted(good.iterdir()) == before


def test_without_plotly_the_extra_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    good = write(tmp_path / "good", training("a", 0, 8))
    assert 'pip install "arbiter-jax[report]"' in refused(capsys, good)


# In a browser

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)

# Moves over a point, which shows its number, and hides the first method by a click on its name.
USE = """
<script>
const lines = () => document.querySelectorAll(".scatterlayer path.js-line").length;
const hover = () => document.querySelectorAll(".hoverlayer text").length;
const at = (target, type, x, y) => target.dispatchEvent(
  new MouseEvent(type, {bubbles: true, clientX: x, clientY: y, view: window}));
const wait = ms => new Promise(resolve => setTimeout(resolve, ms));
window.addEventListener("load", async () => {
  await wait(500);
  const body = document.body, found = {lines: lines()};
  const point = document.querySelector(".scatterlayer path.point").getBoundingClientRect();
  const drag = document.querySelector(".nsewdrag");
  at(drag, "mousemove", point.x + point.width / 2, point.y + point.height / 2);
  await wait(500);
  found.hover = hover();
  const toggle = document.querySelector(".legendtoggle");
  at(toggle, "mousedown", 0, 0);
  at(toggle, "mouseup", 0, 0);
  await wait(1500);
  found.after = lines();
  found.wide = document.documentElement.scrollWidth;
  body.insertAdjacentHTML("beforeend", `<p id="found">${JSON.stringify(found)}</p>`);
});
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="needs a browser: apt-get install chromium")
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_draws_hovers_and_hides(width, tmp_path, two_folders):
    page = tmp_path / "page.html"
    text = make(page, *two_folders)
    page.write_text(text.replace("</body>", USE + "</body>"))
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",  # root, as in a container, cannot have one
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--host-resolver-rules=MAP * ~NOTFOUND",  # no network
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--window-size={width},1600",
            "--enable-logging=stderr",
            "--virtual-time-budget=20000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    messages = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert messages == []
    found = json.loads(re.search(r'<p id="found">({".*?)</p>', done.stdout)[1])
    # Two seeds and their mean, a run, and a run whose loss is one point alone; in two panels.
    assert found["lines"] == 10
    assert found["hover"] >= 1
    assert found["after"] == found["lines"] - 6
    assert found["wide"] <= width
    assert "Runs of standalone_scheduler" in done.stdout
