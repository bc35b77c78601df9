"""Two CPU devices, quick compilation, rank promotion raises; pyproject.toml: warnings raise."""

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_force_host_platform_device_count=2"
    # The suite's time is compilation: tiny programs gain nothing from being optimised.
    + " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
)
# Processes that tests start compile for themselves, and leave the user's own folder alone.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
# Many tests compile the same small programs.
programs = tempfile.mkdtemp(prefix="vit_jax_programs_")
atexit.register(shutil.rmtree, programs, ignore_errors=True)
jax.config.update("jax_enable_compilation_cache", True)
jax.config.update("jax_compilation_cache_dir", programs)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
