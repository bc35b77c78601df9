import os
import subprocess
import sys

import pytest

from vit_jax import heap

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux' memory only")

# Prints whether it was done, how many pages the system had to give for four results of 64 MB each,
# and whether the heap may have large ones.
RESULTS = """
import re, resource
from vit_jax import heap
kept = heap.keep()
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
    yield monkeypatch
    heap.keep.cache_clear()


def pages():
    out = subprocess.run([sys.executable, "-c", RESULTS], capture_output=True, text=True)
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
