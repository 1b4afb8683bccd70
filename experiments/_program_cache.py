"""Compiled programs in the user's cache folder, so that a second run of an experiment compiles nothing.

JAX's own settings win: ``JAX_COMPILATION_CACHE_DIR`` is another folder, and
``JAX_ENABLE_COMPILATION_CACHE=false`` switches the cache off.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import jax


def use_program_cache() -> None:
    """Switches JAX's persistent compilation cache on, where there is a folder to write to."""
    if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
        return
    with contextlib.suppress(ImportError, OSError):
        import platformdirs

        folder = Path(platformdirs.user_cache_dir("arbiter_jax", appauthor=False)) / "programs"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):  # else JAX would warn at every program
            jax.config.update("jax_compilation_cache_dir", str(folder))
