import functools
import os
import subprocess
import sys

import pytest

from vit_jax import heap

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux' memory only")

# Prints whether it was done, how many pages the system had to give for four results of 64 MB each,
# and whether the heap may have large ones.
RESULTS = """
import re, resource, sys
from vit_jax import heap
kept = heap.keep()
heap.bound(int(sys.argv[1]))
import jax, jax.numpy as jnp
run = jax.jit(lambda x: x * 2)
x = jnp.ones((16, 1 << 20))
for _ in range(3):
    run(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    run(x).block_until_ready()
pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
heap = re.search(r"\\[heap\\]\\n(.*\\n)*?VmFlags:(.*)", open("/proc/self/smaps").read())[2]
print(kept, pages, "hg" in heap.split())
"""


@pytest.fixture
def plain(monkeypatch):
    """Nothing is set, and nothing was done yet."""
    for name in list(os.environ):
        if name.startswith("MALLOC_") or name in ("GLIBC_TUNABLES", "LD_PRELOAD"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    heap.keep.cache_clear()
    heap._end.cache_clear()
    yield monkeypatch
    heap.keep.cache_clear()
    heap._end.cache_clear()


def pages(needed=0):
    command = [sys.executable, "-c", RESULTS, str(needed)]
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    kept, pages, large = out.stdout.split()
    return kept == "True", int(pages), large == "True"


def test_what_a_program_allocates_is_not_asked_for_at_each_step(plain):
    kept, few, _ = pages()
    assert kept
    plain.setenv("MALLOC_ARENA_MAX", "8")  # the user's own choice is left alone
    untouched, many, large = pages()
    assert not untouched
    assert not large
    assert many > 4 * 10_000  # 64 MB in pages of 4 KB, each time
    assert few < many / 100


def test_a_step_too_large_for_the_machine_ends_it(plain):
    kept, pages_given, _ = pages(needed=0)
    assert kept
    assert pages_given < 1000
    kept, pages_given, _ = pages(needed=2**60)
    assert kept
    assert pages_given > 4 * 10_000  # as without


def test_what_the_process_has_grown_to_ends_it_too(plain):
    class Library:
        told = ()

        def mallopt(self, name, value):
            self.told += ((name, value),)
            return 1

        def malloc_trim(self, pad):
            self.told += ("trimmed",)

    library = Library()
    assert not heap.bound(2**60)  # nothing was begun
    plain.setattr(heap, "keep", functools.cache(lambda: True))
    assert heap.keep()
    plain.setattr(heap.ctypes, "CDLL", lambda name: library)
    plain.setattr(heap, "_machine", lambda: 2**60)
    assert not heap.bound()
    plain.setattr(heap, "_machine", lambda: 2**20)
    assert heap.bound()
    assert (heap.M_MMAP_MAX, 65_536) in library.told
    assert library.told[-1] == "trimmed"
    assert heap.bound()
    assert library.told.count("trimmed") == 1


def test_a_containers_share_is_all_there_is(plain, tmp_path):
    whole = heap._machine()
    limit = tmp_path / "memory.max"
    plain.setattr(heap, "CONTAINER", (str(limit), str(tmp_path / "none")))
    limit.write_text("max\n")
    assert heap._machine() >= whole
    limit.write_text("1073741824\n")
    assert heap._machine() == 2**30


def test_only_programs_of_a_cpu_keep_memory(plain):
    plain.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert not heap.keep()
    plain.delenv("JAX_PLATFORMS")
    heap.keep.cache_clear()
    plain.setattr(heap.importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    assert not heap.keep()


def test_nothing_is_reserved_where_addresses_are_limited(plain):
    limit = (8 * 2**30, heap.resource.RLIM_INFINITY)
    plain.setattr(heap.resource, "getrlimit", lambda kind: limit)
    assert not heap.keep()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "100000"),
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
        ("LD_PRELOAD", "libjemalloc.so.2"),
    ],
)
def test_who_has_set_how_memory_is_allocated_keeps_that(plain, name, value):
    plain.setenv(name, value)
    assert not heap.keep()
