"""The heap of a CPU run."""

import sys

import pytest

from tests.conftest import run_python

# The page faults of a program of about 100 MB, in the best of its calls.
PROGRAM = """
import resource, sys
from mmgen.runtime import memory
print(memory.keep_pages() if sys.argv[1] == "kept" else "as it comes")
import jax, jax.numpy as jnp
x, f = jnp.ones((1024, 1024)), jax.jit(lambda x: jnp.stack([jnp.sin(i * x) for i in range(24)])[:, ::-1].cumsum(0)[-1])
faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for _ in range(8):
    f(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(min(b - a for a, b in zip(faults, faults[1:])))
"""


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_kept_pages_are_not_faulted_in_again():
    faults = {}
    for how in ("plain", "kept"):
        said, count = run_python(PROGRAM, how).stdout.split("\n")[-3:-1]
        faults[how] = int(count)
    assert said == "True"
    assert faults["kept"] < 100 < 10_000 < faults["plain"]
