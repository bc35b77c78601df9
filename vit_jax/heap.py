"""Memory that a process on a CPU keeps for its next step, instead of asking the system anew."""

import ctypes
import functools
import importlib.util
import os
import resource
import sys
from pathlib import Path

# Of glibc's malloc.h and Linux' mman.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -3, -4, -8
MADV_HUGEPAGE = 14
HUGE = 2**21  # bytes of such a page
SHARE = 4  # of the machine's memory, one part of so many lies in pages of that size
CONTAINER = (  # limits of Linux' control groups, of version 2 and 1
    "/sys/fs/cgroup/memory.max",
    "/sys/fs/cgroup/memory/memory.limit_in_bytes",
)
ROOM = 8  # what a step takes must fit so many times into the machine's memory, to be kept


@functools.cache
def keep() -> bool:
    """Has the C library keep what is freed, and lie in pages of 2 MB where the system has them.

    XLA asks for a program's temporary memory at each call and frees it after; the C library would
    hand pieces of more than 32 MB back to the system, which fills each page with zeros the next
    time: a tenth of a training step's processor time. Memory is reserved here by address only. The
    process then stays as large as it was at its largest, and grows for some time, since evaluations
    and batches leave gaps that a step's temporaries do not fit in: up to twice what it is without.
    `bound` ends it where that could be too much. What it is worth: experiments/benchmarks.

    To be called before the first program runs: a thread that has allocated in a heap of its own
    goes on there.

    Returns:
      Whether it was done. Not for programs of an accelerator, whose memory is its own; not where
      the C library is not glibc; not where addresses are limited or counted as memory; and not
      where the user has set how it allocates (`MALLOC_ARENA_MAX` and its like, `GLIBC_TUNABLES`,
      or another library by `LD_PRELOAD`).
    """
    if not (sys.platform.startswith("linux") and _for_cpu() and _addresses_are_free()) or _told():
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    done = [
        library.mallopt(name, value)
        for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_ARENA_MAX, 1))
    ]
    size = _machine() // SHARE
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.restype, library.free.argtypes = None, [ctypes.c_void_p]
    library.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    place = library.malloc(size)
    if place is not None:  # else it has to do with small pages
        aligned = place + -place % HUGE
        library.madvise(aligned, place + size - aligned, MADV_HUGEPAGE)
        library.free(place)  # it stays with the heap, and nothing of it was touched
    return all(done)


def bound(needed: int = 0) -> bool:
    """Ends what `keep` began where a step needs, or the process has, much of the machine's memory.

    What is free goes back to the system then, and what is freed from then on as the C library has
    it. To be called when a program is compiled, and from time to time.

    Args:
      needed: bytes of the program's temporaries, arguments and results; 0 if that was told before.

    Returns:
      Whether it is ended.
    """
    if not (keep.cache_info().currsize and keep()):
        return False
    largest = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if ROOM * needed <= _machine() and 2 * largest <= _machine():
        return False
    _end()
    return True


@functools.cache
def _end() -> None:
    library = ctypes.CDLL(None)
    # Where its own rules for them end up.
    for name, value in (
        (M_MMAP_MAX, 65_536),
        (M_MMAP_THRESHOLD, 32 * 2**20),
        (M_TRIM_THRESHOLD, 64 * 2**20),
    ):
        library.mallopt(name, value)
    library.malloc_trim(0)


def _machine() -> int:
    """Bytes of the machine's memory, or of a container's share of it."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for file in CONTAINER:
        try:
            limits.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
    return min(limits)


def _for_cpu() -> bool:
    """Whether JAX will compute on a CPU, told without a start of JAX."""
    named = os.environ.get("JAX_PLATFORMS")
    if named:
        return named == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("jax_plugins", "libtpu"))


def _addresses_are_free() -> bool:
    """Whether a process may reserve what it does not use: no `ulimit -v`, no strict accounting."""
    rule = Path("/proc/sys/vm/overcommit_memory")
    strict = rule.is_file() and rule.read_text().strip() == "2"
    return not strict and resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def _told() -> bool:
    """Whether the user has said how memory is to be allocated."""
    variables = (os.environ.get(name, "") for name in ("GLIBC_TUNABLES", "LD_PRELOAD"))
    named = any(name.startswith("MALLOC_") for name in os.environ)
    return named or any("malloc" in value for value in variables)
