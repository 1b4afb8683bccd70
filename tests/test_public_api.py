"""What `import arbiter_jax` promises: its names, their documentation, and nothing to install."""

import ast
import functools
import importlib
import inspect
import subprocess
import sys
import textwrap
import typing

import pytest

import arbiter_jax as aj

MODULES = [
    "arbiter_jax",
    "arbiter_jax.callbacks",
    "arbiter_jax.datasets",
    "arbiter_jax.hyper_learning",
    "arbiter_jax.learning_rate",
    "arbiter_jax.models",
    "arbiter_jax.noisy_quadratic",
    "arbiter_jax.objectives",
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
    "chex",
    "matplotlib",
    "optuna",
    "orbax",
    "pandas",
    "platformdirs",
    "rich",
    "scipy",
    "sklearn",
    "tensorboardX",
    "tensorflow",
    "tensorflow_datasets",
    "tqdm",
    "tyro",
)


@functools.cache
def public_names():
    """(module, name) of everything public that is no module, each object once."""
    seen, names = set(), []
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            value = getattr(module, name)
            alias = typing.get_origin(value) is not None or value is typing.Any
            if inspect.ismodule(value) or alias or name == "__version__" or id(value) in seen:
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
    assert list(module.__all__) == sorted(module.__all__)
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
        Agent ArbiterState GradStats all_buckets adam_hd adamp adascale arbiter autowu conv_agent
        dynamic_batch_adaptation fit get_batch_size gradient_stats mlp_agent next_bucket
        noisy_quadratic run_window scale_by_batch_size schedulers select_subset sgd_hd
        stochastic_meta_descent to_batch_size to_logit warm_up
    """
    assert set(names.split()) <= set(aj.__all__)
    rules = """
        adabatch adadamp cabs constant dive_batch from_schedule goodput gradient_noise_scale
        hysteresis inner_product_test norm_test shadow simigrad smith
    """
    assert set(rules.split()) <= set(aj.schedulers.__all__)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (aj.mlp_agent, "input_shape, num_proposals=4, hidden_sizes=(64,)"),
        (aj.to_logit, "batch_size, min_batch_size, max_batch_size"),
        (aj.to_batch_size, "logit, min_batch_size, max_batch_size"),
        (aj.next_bucket, "n"),
        (aj.all_buckets, "minimum, maximum"),
        (aj.get_batch_size, "opt_state"),
        (
            aj.warm_up,
            "agent, agent_params, mixture_logits, agent_inputs, *, batch_size, min_batch_size, "
            "max_batch_size, learning_rate=0.0001, max_steps=10000",
        ),
    ],
)
def test_signatures_of_the_public_contract(function, arguments):
    signature = inspect.signature(function)
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=signature.empty)) == (
        f"({arguments})"
    )


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
    assert ">>> " in inspect.getdoc(lookup(*pair))


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
