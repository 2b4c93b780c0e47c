"""The heap of a CPU run."""

import sys

import pytest

from tests.conftest import run_python

PROGRAM = """
import resource, sys
from mmgen.runtime import memory
print(memory.keep_pages() if sys.argv[1] == "kept" else "as it comes")
import jax, jax.numpy as jnp
x = jnp.ones((1024, 1024))
f = jax.jit(lambda x: jnp.stack([jnp.sin(i * x) for i in range(40)])[:, ::-1].cumsum(0)[-1])
for _ in range(3):
    f(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    f(x).block_until_ready()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_kept_pages_are_not_faulted_in_again():
    faults = {}
    for how in ("plain", "kept"):
        said, count = run_python(PROGRAM, how).stdout.split("\n")[-3:-1]
        faults[how] = int(count)
    assert said == "True"
    assert faults["kept"] < 1_000 < 10_000 < faults["plain"]
