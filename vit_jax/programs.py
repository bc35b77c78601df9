"""How programs are compiled, and kept from one command to the next in a folder of the user's."""

import functools
import hashlib
import os
import platform
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

FOLDER = "JAX_COMPILATION_CACHE_DIR"  # JAX's own variable: another folder
SWITCH = "JAX_ENABLE_COMPILATION_CACHE"  # false switches it off
LEAST = "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"
SECONDS = 0.3  # what compiles faster is not worth a file
# Of XLA, for what runs many times on a CPU: matrix products and convolutions by Eigen, which is
# faster on the shapes here than YNNPACK, but sums by that; and no copy of what is updated in place.
# How much each is worth: experiments/benchmarks.
CPU = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
    "xla_cpu_copy_insertion_use_region_analysis": True,
}
# The same for what runs once: XLA spends ten times longer on making random numbers fast on a CPU
# than on making them.
CPU_ONCE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
DAYS = 30  # after which a program that was compiled is compiled anew
DAMAGED = r"Error reading persistent compilation cache entry for '(?P<module>[^']*)'"


def keep() -> Path | None:
    """Has JAX keep what it compiles, and take it from there the next time.

    To be called before JAX is imported, which reads its variables then. A program is found again by
    its text, the compiler's version and options, and the kind of device, so that none is ever taken
    for another. Programs are kept for 30 days.

    Returns:
      The folder: that of `JAX_COMPILATION_CACHE_DIR`, else one for processors of this kind in
      `vit_jax/programs` of `XDG_CACHE_HOME` or `~/.cache`. None if it is switched off, cannot be
      written, or JAX runs already: then all is as JAX has it.
    """
    if "jax" in sys.modules or os.environ.get(SWITCH, "").lower() in ("0", "false", "off"):
        return None
    named = os.environ.get(FOLDER)
    if named is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "vit_jax" / "programs" / _processor()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            return None
        if not os.access(folder, os.W_OK):
            return None
        _forget(folder)
        os.environ[FOLDER] = str(folder)
    elif "://" in named:  # a bucket, which is not ours to tidy
        folder = None
    else:
        folder = Path(named)
    os.environ.setdefault(LEAST, str(SECONDS))
    if folder is not None:
        _mend(folder)
    return folder


@functools.cache
def options(platform: str) -> dict[str, Any]:
    """The compiler's options for a program that runs many times.

    They change the order of sums, so a number may differ in its last digits from that of a program
    compiled without them.

    Args:
      platform: of the devices that it is for, as JAX names it: "cpu", "gpu" or "tpu".

    Returns:
      {name: value} for `compiler_options`; without what this version's compiler does not know.
    """
    if platform != "cpu":
        return {}
    import jax

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        lowered = jax.jit(lambda: 0).lower()
    known = {}
    for name, value in CPU.items():
        try:
            lowered.compile({name: value})
        except jax.errors.JaxRuntimeError:  # each version has its own
            continue
        known[name] = value
    return known


def once(platform: str) -> dict[str, Any]:
    """`options` for a program that runs once, and should be compiled in little time."""
    return CPU_ONCE if platform == "cpu" else {}


def of_processor(*names: str) -> str:
    """The first line of Linux' /proc/cpuinfo that starts with one of the names; "" without one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(names)), "")


def _processor() -> str:
    """A few letters for what this processor can do.

    A home may be shared by machines, and a program of a newer one would crash on an older.
    """
    told = of_processor("flags", "Features") or platform.machine() + platform.processor()
    return hashlib.sha256(told.encode()).hexdigest()[:8]


def _forget(folder: Path) -> None:
    """Removes programs of long ago, of compilers that are gone."""
    oldest = time.time() - DAYS * 24 * 3600
    for file in folder.glob("*-cache"):
        try:
            if file.stat().st_mtime < oldest:
                file.unlink()
        except OSError:  # another process was faster
            pass


def _mend(folder: Path) -> None:
    """A file that a killed process left unfinished is removed when JAX complains of it.

    JAX compiles then, but would leave the file as it is, and complain each time.
    """
    shown = warnings.showwarning

    def show(message: Any, *place: Any, **where: Any) -> None:
        found = re.match(DAMAGED, str(message))
        if not found:
            shown(message, *place, **where)
            return
        for file in folder.glob(f"{found['module']}-*-cache"):
            file.unlink(missing_ok=True)

    warnings.showwarning = show
