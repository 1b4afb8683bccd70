"""What tests of programs share: rules and runs of the scripts, changed lines, an experiment's main."""

import difflib
import importlib
import io
import pathlib
import tokenize

import numpy as np
import optax

import arbiter_jax as aj

FOLDER = pathlib.Path(__file__).parent / "scripts"
SCRIPTS = sorted(p.stem.removesuffix("_adaptive") for p in FOLDER.glob("*_adaptive.py"))
BUDGET = 4096  # examples
RANGE = {"min_batch_size": 8, "max_batch_size": 16, "initial_batch_size": 8}  # two buckets
NUM_VALIDATION = 32  # all that an agent of `fit` sees at a step, in whatever order


def _arbiter(input_shape):
    agent = aj.mlp_agent(input_shape, num_proposals=4, hidden_sizes=(8,))
    objective = aj.noise_response("noise_floor", num_examples=BUDGET)
    options = RANGE | {"initial_batch_size": 12, "agent_optimizer": optax.adam(0.1)}
    return aj.arbiter(agent, objective=objective, window=2, **options)


# Each takes the shape of one input.
RULES = {
    "gradient_noise_scale": lambda shape: aj.schedulers.gradient_noise_scale(decay=0.5, **RANGE),
    "noise_floor": lambda shape: aj.schedulers.noise_floor(num_examples=BUDGET, **RANGE),
    "arbiter": _arbiter,
}


def load(name):
    """The module of a script in the folder of scripts."""
    return importlib.import_module(f"tests.scripts.{name}")


def run_fit(loss_fn, params, tx, source, validation, num_steps, **options):
    """The losses and batch sizes of `fit` over the examples of a source, decided at every step."""
    with aj.datasets.host_blocks(source, window=1) as blocks:
        result = aj.fit(
            loss_fn,
            params,
            tx,
            aj.Data(blocks, validation),
            num_examples=BUDGET,
            window=1,
            callbacks=lambda record, state: record.window_index + 1 == num_steps,
            **options,
        )
    losses, sizes = zip(*((r.loss, r.batch_size) for r in result.history), strict=True)
    return result, np.array(losses), sizes


def code_lines(path):
    """The lines of a file with code: no blank ones, comments, docstrings or closing brackets."""
    text = path.read_text()
    kept = {}
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    layout = {tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT}
    for before, token in zip([tokens[0], *tokens], tokens, strict=False):
        is_text = token.type == tokenize.STRING and before.type in layout
        if token.type not in layout | {tokenize.ENDMARKER} and not is_text:
            kept.setdefault(token.start[0], []).append(token.string)
    lines = text.splitlines()
    return [lines[n - 1] for n, found in sorted(kept.items()) if set(found) - set(")]},:")]


def changed_lines(name):
    """The lines that a script with the library adds to, or changes in, the plain one."""
    plain, adaptive = (code_lines(FOLDER / f"{n}.py") for n in (name, f"{name}_adaptive"))
    diff = difflib.ndiff(plain, adaptive)
    return [line[2:] for line in diff if line.startswith("+ ")]


def run_main(name, argv):
    """Runs an experiment with the flags of a command line."""
    from experiments import _runner

    module = importlib.import_module(f"experiments.{name}")
    description = module.__doc__.splitlines()[0]
    _runner.main(name, module.CONFIGS, module.run, module.plot, module.table, description, argv)
