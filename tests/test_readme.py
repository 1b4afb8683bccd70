"""The README's code runs, top to bottom, as a reader would paste it."""

import re
import tomllib

from tests.pages import ROOT, run_blocks

README = ROOT / "README.md"


def test_the_code_runs(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    printed, namespace = [], {}
    for after_block in run_blocks(README):
        printed.append(capsys.readouterr().out)
        namespace = after_block
    seesaw, own_loop, noise_scale, run_window = printed

    steps, evaluation = seesaw.splitlines()
    assert 150 < int(steps.split()[0]) < 200  # of 312
    assert "Metrics(loss=" in evaluation

    batch_sizes = [int(size) for size in re.findall(r"\d+", noise_scale)]
    assert batch_sizes[0] == 32
    assert batch_sizes[-1] == 64  # it has grown

    assert float(namespace["value"]) < 1.0  # the loss of a batch after 40 steps of one's own loop
    assert own_loop.split()[0] == str(int(namespace["aj"].get_batch_size(namespace["opt_state"])))

    losses = [float(line.split()[1]) for line in run_window.splitlines()]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_it_stays_short():
    assert len(README.read_text().splitlines()) <= 160


def test_the_commands_name_extras_that_exist():
    text = README.read_text()
    project = tomllib.loads((README.parent / "pyproject.toml").read_text())["project"]
    named = re.findall(r"-e '\.\[(.*?)\]'", text)
    assert len(named) == 2
    for extra in named:
        assert extra in project["optional-dependencies"]


def test_links_lead_to_files():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text())
    assert len(links) > 5
    for link in links:
        assert (README.parent / link).exists(), link
