"""Rows of tables, and sums of gradients that belong to one row, on one device and on many."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from mmgen.runtime import mesh as meshes


def rows_of(table, ids):
    """Rows of table [V, D] for int ids [...] -> [..., D]; zeros where an id is not in the table.

    Its gradient adds up what belongs to the same row. Most codes of an image are the same few, and on GPUs adds to one
    place wait for one another: there the sum is a matrix product.
    """
    gpu = jax.default_backend() == "gpu" and len(table) <= _MOST_ROWS
    return _rows_by_product(table, ids) if gpu else _rows(table, ids)


def rows_of_each(tables, ids):
    """Rows of tables [P, V, D] for int ids [..., P], of each place its own: [..., P, D]; zeros where an id is negative."""
    if jax.default_backend() == "gpu":  # of P small tables the gradient is a P-th of the work that it is of one
        return jax.vmap(rows_of, (0, -1), -2)(tables, ids)
    places, size, width = tables.shape
    return rows_of(tables.reshape(-1, width), jnp.where(ids < 0, -1, np.arange(places) * size + ids))


_MOST_ROWS = 8192  # of a table whose gradient is a product with rows of one 1 and zeros
_PART = 2**16  # ids at a time, of these


def _rows(table, ids):
    here = (ids >= 0) & (ids < len(table))
    return jnp.where(here[..., None], table[jnp.where(here, ids, 0)], 0)


@jax.custom_vjp
def _rows_by_product(table, ids):
    return _rows(table, ids)


def _sum_by_product(kept, gradient):
    table, ids = kept
    size, width = table.shape
    gradient, ids = gradient.reshape(-1, width), ids.reshape(-1)
    parts = -(-len(ids) // _PART)
    short = parts * _PART - len(ids) if parts > 1 else 0
    gradient = jnp.pad(gradient, ((0, short), (0, 0))).reshape(parts, -1, width)
    ids = jnp.pad(ids, (0, short), constant_values=-1).reshape(parts, -1)

    def add(total, part):
        ids, gradient = part
        ones = jax.nn.one_hot(ids, size, dtype=gradient.dtype)
        exact = jax.lax.Precision.HIGHEST if gradient.dtype == jnp.float32 else None
        more = jnp.einsum("nv,nd->vd", ones, gradient, precision=exact, preferred_element_type=jnp.float32)
        return total + more, None

    total, _ = jax.lax.scan(add, jnp.zeros((size, width), jnp.float32), (ids, gradient))
    return total.astype(table.dtype), None


_rows_by_product.defvjp(lambda table, ids: (_rows(table, ids), (table, ids)), _sum_by_product)


def lookup(table, ids, axis="vocab"):
    """Rows of table [V, D], the first axis named as `axis` says, for int ids [B, T, ...] -> [B, T, ..., D]; zeros where an id is negative.

    Under a mesh each device looks up what lies in its own part of the vocabulary, and the parts are summed: the
    compiler by itself would gather the whole table, or what was looked up, on every device.
    """

    def local(table, ids, over=()):
        ids = ids - (jax.lax.axis_index(over) * table.shape[0] if over else 0)
        rows = rows_of(table, ids)
        return jax.lax.psum(rows, over) if over else rows

    if meshes.current() is None:
        return local(table, ids)
    mesh, rules = meshes.current()
    rows, tokens = meshes.spec((axis, None), rules), meshes.spec(("batch", "length"), rules)
    return jax.shard_map(
        functools.partial(local, over=meshes.mesh_axes(rows[0])),
        mesh=mesh, in_specs=(rows, tokens), out_specs=tokens, check_vma=False,
    )(table, ids)  # fmt: skip
