"""What `import arbiter_jax` promises: its names, their documentation, and nothing to install."""

import ast
import doctest
import functools
import importlib
import inspect
import math
import subprocess
import sys
import textwrap
import typing

import pytest

import arbiter_jax as aj

MODULES = [
    "arbiter_jax",
    "arbiter_jax.base",
    "arbiter_jax.batching",
    "arbiter_jax.callbacks",
    "arbiter_jax.critical_batch_size",
    "arbiter_jax.datasets",
    "arbiter_jax.gradients",
    "arbiter_jax.hyper_learning",
    "arbiter_jax.learning_rate",
    "arbiter_jax.metrics",
    "arbiter_jax.models",
    "arbiter_jax.noisy_quadratic",
    "arbiter_jax.objectives",
    "arbiter_jax.plotting",
    "arbiter_jax.schedulers",
    "arbiter_jax.stochastic_meta_descent",
    "arbiter_jax.subset_selection",
    "arbiter_jax.training",
]

# Imported when they are first used: what a run need not have.
LAZY = (
    "callbacks",
    "critical_batch_size",
    "datasets",
    "models",
    "noisy_quadratic",
    "plotting",
    "stochastic_meta_descent",
    "subset_selection",
)

# Everything that is no dependency of the core.
EXTRAS = (
    "PIL",
    "chex",
    "grain",
    "importlib_resources",
    "matplotlib",
    "optuna",
    "orbax",
    "pandas",
    "platformdirs",
    "plotly",
    "rich",
    "scipy",
    "sklearn",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "torch",
    "tqdm",
    "tyro",
)


# No line of their examples runs: they read files that have to be downloaded or installed first.
DOWNLOADED = {
    ("arbiter_jax.datasets", "fashion_mnist"),
    ("arbiter_jax.datasets", "mnist10k"),
}


@functools.cache
def public_names():
    """(module, name) of everything public that is no module, each object once."""
    seen, names = set(), []
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            value = getattr(module, name)
            alias = typing.get_origin(value) is not None or value is typing.Any
            if alias or not callable(value) or id(value) in seen:
                continue
            seen.add(id(value))
            names.append((module_name, name))
    return names


def lookup(module_name, name):
    return getattr(importlib.import_module(module_name), name)


FUNCTIONS = [pair for pair in public_names() if inspect.isroutine(lookup(*pair))]
CLASSES = [pair for pair in public_names() if inspect.isclass(lookup(*pair))]
STATES = [p for p in CLASSES if p[1].endswith("State") and hasattr(lookup(*p), "_fields")]


def ids(pairs):
    return [f"{module.removeprefix('arbiter_jax').lstrip('.')}.{name}" for module, name in pairs]


# Names


@pytest.mark.parametrize("module_name", MODULES)
def test_all_is_sorted_complete_and_true(module_name):
    module = importlib.import_module(module_name)
    constants_first = sorted(module.__all__, key=lambda name: (not name.isupper(), name))
    assert list(module.__all__) == constants_first
    assert len(set(module.__all__)) == len(module.__all__)
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert missing == []
    assert module.__doc__


@pytest.mark.parametrize("module_name", ["arbiter_jax.schedulers", "arbiter_jax.datasets"])
def test_nothing_public_is_left_out_of_all(module_name):
    module = importlib.import_module(module_name)
    public = {name for name in vars(module) if not name.startswith("_")}
    public = {name for name in public if not inspect.ismodule(getattr(module, name))}
    assert public == set(module.__all__)


def test_the_names_of_the_public_contract_are_there():
    names = """
        Agent ArbiterState Data GradStats adam_hd adamp adamw_in_examples adascale all_buckets
        arbiter autowu callbacks checkpoints conv_agent dynamic_batch_adaptation fit get_batch_size
        gradient_stats impulse_response init_state measure_critical_batch_size mlp_agent models
        next_bucket noise_response noisy_quadratic run_window scale_by_batch_size schedulers seesaw
        select_subset sgd_hd stochastic_meta_descent to_batch_size to_logit value_grad_and_signals
        warm_up
    """
    assert set(names.split()) <= set(aj.__all__)
    rules = """
        adabatch adadamp cabs constant dive_batch expected_gain from_schedule goodput
        gradient_noise_scale hysteresis inner_product_test noise_floor norm_test optimal_schedule
        parse_schedule seesaw seesaw_schedule shadow simigrad smith
    """
    assert set(rules.split()) <= set(aj.schedulers.__all__)
    callbacks = {"progress", "tensorboard", "csv", "log", "evaluate", "checkpoints"}
    assert callbacks <= set(aj.callbacks.__all__)
    fields = """
        agent_params mixture_logits response_weights proposals mixture batch_size meta_batch_size
        meta_loss window_step
    """
    assert set(fields.split()) <= set(aj.ArbiterState._fields)


def parameters_of(signature):
    """The positional parameters in order and those by keyword, each with its default."""
    by_keyword = {p.name: p.default for p in signature if p.kind is p.KEYWORD_ONLY}
    return [(p.name, p.default) for p in signature if p.name not in by_keyword], by_keyword


@pytest.mark.parametrize(
    ("name", "contract"),
    {
        "all_buckets": lambda minimum, maximum: ...,
        "arbiter": lambda agent, response_loss=None, *, num_features=None, min_batch_size=8,
            max_batch_size=512, initial_batch_size=64, window=100, agent_optimizer=None,
            mixture_optimizer=None, learn_response=True, anchor="offset", hyper_every=1,
            seed=0, objective=None: ...,
        "autowu": lambda steps_per_epoch, num_epochs, *, min_learning_rate=1e-5,
            max_learning_rate=1.0, max_warmup_fraction=0.5, immediate_cooldown=True,
            cooldown_fraction=0.2, patience=3, num_tests=5, confidence=0.95, seed=0: ...,
        "checkpoints": lambda directory, *, every=1, keep=3: ...,
        "fit": lambda loss_fn, params, tx, data, *, num_examples, mesh=None, sampling="exact",
            micro_batch_size=None, checkpoints=None, resume=False, clock=None: ...,
        "get_batch_size": lambda opt_state: ...,
        "mlp_agent": lambda input_shape, num_proposals=4, hidden_sizes=(64,): ...,
        "next_bucket": lambda n: ...,
        "noisy_quadratic.greedy_schedule": lambda problem, num_steps, momentum=False: ...,
        "noisy_quadratic.optimal_schedule": lambda problem, num_steps, momentum=False,
            max_learning_rate=None: ...,
        "schedulers.optimal_schedule": lambda learning_rates, num_examples: ...,
        "schedulers.seesaw_schedule": lambda schedule, *, num_examples, batch_size,
            max_batch_size, trade=0.8: ...,
        "seesaw": lambda optimizer, schedule, *, num_examples, batch_size, max_batch_size,
            exponent=1.0, trade=0.8, limit=None: ...,
        "sgd_hd": lambda learning_rate, hypergradient_learning_rate, momentum=0.0,
            nesterov=False, min_learning_rate=0.0, max_learning_rate=math.inf: ...,
        "to_batch_size": lambda logit, min_batch_size, max_batch_size: ...,
        "to_logit": lambda batch_size, min_batch_size, max_batch_size: ...,
        "value_grad_and_signals": lambda loss_fn, tx, *, micro_batch_size=None, has_aux=False: ...,
        "warm_up": lambda agent, agent_params, mixture_logits, agent_inputs, *, batch_size,
            min_batch_size, max_batch_size, learning_rate=1e-4, max_steps=10_000: ...,
    }.items(),
)  # fmt: skip
def test_signatures_of_the_public_contract(name, contract):
    """Other code may rely on these; a further argument goes by keyword and has a default."""
    function = functools.reduce(getattr, name.split("."), aj)
    positional, by_keyword = parameters_of(inspect.signature(function).parameters.values())
    expected, named = parameters_of(inspect.signature(contract).parameters.values())
    assert positional == expected
    assert by_keyword | named == by_keyword
    assert all(
        by_keyword[more] is not inspect.Parameter.empty for more in set(by_keyword) - set(named)
    )


def test_the_gradient_function_of_the_contract():
    tx = aj.schedulers.constant(8)
    grad_fn = aj.value_grad_and_signals(lambda params, batch: batch - params, tx)
    names = ["mask", "validation", "model_state", "key", "num_examples", "step_seconds"]
    found = parameters_of(inspect.signature(grad_fn).parameters.values())
    empty = inspect.Parameter.empty
    positional = [("params", empty), ("opt_state", empty), ("batch", empty)]
    assert found == (positional, dict.fromkeys(names))


def test_the_version_is_that_of_the_package():
    from importlib import metadata

    assert aj.__version__ == metadata.version("arbiter-jax")


# Documentation


def sections(doc):
    """The sections of a Google docstring, by title; "" is what stands before the first."""
    result, title = {"": ""}, ""
    for line in doc.splitlines():
        if line.rstrip().endswith(":") and line[:1].isupper() and " " not in line.strip():
            title = line.strip().rstrip(":")
            result[title] = ""
        elif line and not line.startswith(" ") and title:
            title = ""
            result[""] += line + "\n"
        else:
            result[title] += line + "\n"
    return result


@pytest.mark.parametrize("pair", public_names(), ids=ids(public_names()))
def test_everything_public_has_a_summary(pair):
    doc = lookup(*pair).__doc__
    assert doc
    summary = inspect.cleandoc(doc).split("\n\n")[0]
    assert summary[0].isupper() or summary[0] in "`:"
    assert summary.endswith((".", ":"))


@pytest.mark.parametrize("pair", FUNCTIONS, ids=ids(FUNCTIONS))
def test_every_argument_is_documented(pair):
    function = lookup(*pair)
    parameters = [
        f"{'*' * (p.kind is p.VAR_POSITIONAL)}{'**' * (p.kind is p.VAR_KEYWORD)}{name}"
        for name, p in inspect.signature(function).parameters.items()
    ]
    arguments = sections(inspect.getdoc(function)).get("Args", "")
    documented = [
        line.strip().split(":")[0]
        for line in arguments.splitlines()
        if line.startswith("  ") and not line.startswith("   ") and ":" in line
    ]
    documented = [name.strip() for names in documented for name in names.split(",")]
    if len(parameters) > 1 or documented:
        assert documented == parameters


@pytest.mark.parametrize("pair", FUNCTIONS, ids=ids(FUNCTIONS))
def test_what_is_returned_and_raised_is_documented(pair):
    function = lookup(*pair)
    titles = sections(inspect.getdoc(function))
    returns = inspect.signature(function).return_annotation
    several = len(inspect.signature(function).parameters) > 1
    if several and returns not in (None, "None"):
        assert "Returns" in titles or "Yields" in titles
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    raises = [node for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc]
    if raises:
        assert "Raises" in titles


@pytest.mark.parametrize("pair", FUNCTIONS, ids=ids(FUNCTIONS))
def test_every_public_function_has_an_executed_example(pair):
    """At least one line that doctest runs, besides imports."""
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(lookup(*pair)))
    executed = [
        example
        for example in examples
        if not example.options.get(doctest.SKIP)
        and not example.source.startswith(("import ", "from "))
    ]
    assert bool(executed) == (pair not in DOWNLOADED)


@pytest.mark.parametrize("pair", STATES, ids=ids(STATES))
def test_every_field_of_a_state_says_what_it_is(pair):
    state = lookup(*pair)
    lines = inspect.getsource(state).splitlines()
    for field in state._fields:
        (line,) = [line for line in lines if line.strip().startswith(f"{field}:")]
        assert "  # " in line, f"{field} has no comment"
        if "jax.Array" in line:
            assert "shape=(" in line
            assert "dtype=" in line


# Installation


BARE = """
import builtins, sys

extras = {extras!r}
original = builtins.__import__

def without_extras(name, globals=None, locals=None, fromlist=(), level=0):
    importer = (globals or {{}}).get("__name__", "")
    ours = importer.startswith("arbiter_jax") or importer == "__main__"
    if ours and level == 0 and name.split(".")[0] in extras:
        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    return original(name, globals, locals, fromlist, level)

builtins.__import__ = without_extras
"""


def run_bare(script):
    source = BARE.format(extras=EXTRAS) + textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_package_works_without_any_extra():
    """Every public name is there, and a network trains on arrays with Arbiter."""
    out = run_bare(
        """
        import arbiter_jax as aj
        for name in aj.__all__:
            getattr(aj, name)
        for module in (aj.schedulers, aj.datasets, aj.models, aj.learning_rate):
            for name in module.__all__:
                getattr(module, name)

        import jax.numpy as jnp, optax
        def response_loss(params, response, meta_batch):
            inputs, labels = meta_batch
            return ((inputs * (1 + response[None])) @ params - labels) ** 2
        def loss_fn(params, batch):
            return response_loss(params, jnp.zeros(3), batch)
        rule = aj.arbiter(aj.mlp_agent((3,)), response_loss, num_features=3, window=2)
        tx = optax.chain(optax.sgd(0.1), rule)
        arrays = (jnp.ones((100, 3)), jnp.ones(100))
        result = aj.fit(loss_fn, jnp.zeros(3), tx, aj.Data(arrays, arrays), num_examples=256, window=2)
        print(int(result.state.num_steps) > 0)

        for extra, use in {
            "data": lambda: aj.datasets.load("digits"),
            "plotting": lambda: aj.plotting.figure(),
        }.items():
            try:
                use()
            except ImportError as error:
                message = str(error)
                print(f'pip install "arbiter-jax[{extra}]"' in message and "\\n" not in message)
        """
    )
    assert out.split() == ["True", "True", "True"]


@pytest.mark.slow
def test_importing_the_package_imports_no_extra():
    # What flax itself imports is no business of ours.
    out = run_bare(
        f"""
        import sys
        import flax.nnx, jax, optax
        before = set(sys.modules)
        import arbiter_jax
        loaded = set(sys.modules) - before
        print(sorted({{name.split(".")[0] for name in loaded}} & set({EXTRAS!r})))
        print(sorted(loaded & {{f"arbiter_jax.{{name}}" for name in {LAZY!r}}}))
        print("flax.training" in loaded, "urllib.request" in loaded)
        print(set(arbiter_jax.__all__) <= set(dir(arbiter_jax)))
        """
    )
    assert out.split("\n")[:-1] == ["[]", "[]", "False False", "True"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'arbiter_jax' has no attribute 'fitt'"):
        _ = aj.fitt  # pyright: ignore


@pytest.mark.parametrize("name", LAZY)
def test_packages_imported_on_first_use_are_modules(name):
    assert getattr(aj, name) is importlib.import_module(f"arbiter_jax.{name}")
