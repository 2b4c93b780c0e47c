"""Quantizers: features <-> codes."""

import math

import jax
import jax.numpy as jnp
import numpy as np


class FSQ:
    """Finite scalar quantization (arXiv:2309.15505): each channel is rounded to one of L levels.

    No parameters, no state, no auxiliary loss. All arithmetic is float32 and int32: in bfloat16
    packing digits into an index silently merges most codes.
    """

    def __init__(self, levels):
        if not levels or min(levels) < 2:
            raise ValueError(f"FSQ levels must all be at least 2, found {tuple(levels)}")
        self.levels = np.asarray(levels, np.int32)
        self.channels = len(levels)
        self.codes = math.prod(int(level) for level in levels)
        if self.codes >= 2**31:
            raise ValueError(f"FSQ levels {tuple(levels)} make {self.codes} codes; int32 holds < 2**31")
        self._basis = np.cumprod([1, *levels[:-1]]).astype(np.int32)

    def bound(self, z):
        """Squashes features [..., C] so that rounding gives exactly L values in each channel."""
        z = z.astype(jnp.float32)
        half = (self.levels - 1) * (1 + 1e-3) / 2
        offset = np.where(self.levels % 2 == 0, 0.5, 0.0)
        # A level of 2 would need atanh of almost 1, where the gradient vanishes: shift nothing
        # there and round around -1/2 instead, which splits at z = 0.
        shift = np.where(self.levels == 2, 0.0, np.arctanh(np.where(self.levels == 2, 0, offset / half)))
        return jnp.tanh(z + shift) * half - offset

    def quantize(self, z):
        """Features [..., C] -> digits' values [..., C] in about [-1, 1], straight-through gradient."""
        bounded = self.bound(z)
        rounded = bounded + jax.lax.stop_gradient(jnp.round(bounded) - bounded)
        return rounded / (self.levels // 2)

    def pack(self, values):
        """Quantized values [..., C] -> code int32 [...]."""
        digits = jnp.round(values * (self.levels // 2)).astype(jnp.int32) + self.levels // 2
        return jnp.sum(digits * self._basis, axis=-1, dtype=jnp.int32)

    def unpack(self, codes):
        """Code int32 [...] -> quantized values float32 [..., C]; the exact inverse of `pack`."""
        digits = (codes[..., None].astype(jnp.int32) // self._basis) % self.levels
        return (digits - self.levels // 2).astype(jnp.float32) / (self.levels // 2)
