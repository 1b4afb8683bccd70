"""Settings of the whole test run: strict shapes, 8 CPU devices, fixed seeds, shared programs."""

import os
from importlib import metadata

# Nearly all of the time of the tests is XLA's compilation: a third less without LLVM's costly
# passes, and half of that without the new emitters of fused loops. The programs are the same, only
# their machine code is less tuned; tests measure no time.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if metadata.version("jaxlib").startswith("0.10."):  # a flag that XLA does not know is fatal
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])

import pathlib

import jax
import pytest
from hypothesis import settings
from jax.experimental.compilation_cache import compilation_cache

# Before any array exists: the number of devices cannot change afterwards.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Programs compiled by an earlier run, or by another worker of this one, are read from here.
CACHE = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "jax"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
# Not those that compile fast: in a fresh clone writing them all costs a minute, and rarely the
# writing crashes jaxlib.
LEAST = 0.1  # seconds
jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.load_profile("ci")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One more than there are cores: tests wait for processes and for compilers."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" not in os.environ:
        return (os.cpu_count() or 1) + 1


@pytest.fixture
def no_cached_programs(tmp_path):
    """For tests that count compilations: no window was compiled before, on disk or in memory.

    In memory another test of the module may have compiled the same program, if this process was
    given that one first.
    """
    from arbiter_jax import run_window

    run_window.clear_cache()
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST)
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(CACHE))


@pytest.fixture
def key():
    return jax.random.PRNGKey(0)
