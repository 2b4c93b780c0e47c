"""Quantizers: features <-> codes, all behind the interface of `Quantizer`.

Shapes: features and values [..., C], codes int32 [...]; N features in a batch, K codes, D digits of a code.
Arithmetic is float32 and int32 whatever comes in: in bfloat16, packing digits into a code silently merges
most codes. Sums over the batch are plain sums over all leading axes, hence of the whole batch on any mesh.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mmgen.models import layers

_COUNTED = 2**18  # codes up to which their usage is counted; of more, a batch could only ever use a few


class Quantizer(nnx.Module):
    """What all quantizers have in common.

    `channels` is C. `levels` int32 [D] says which digits a code is made of, in mixed radix with the first
    digit least significant; `codes` is their product. ValueError where int32 cannot hold all codes.

    Called, a quantizer gives (values float32 [..., C], loss, watched): the values' gradient is passed
    straight to `squash(z)`; the loss, a float32 scalar, holds all auxiliary terms, already weighted, and is
    to be added to others with weight 1; `watched` is {name: float32 scalar}: "usage" (share of the codes that
    occur in the batch, where there are at most 2**18 codes) and "digit_entropy" (entropy of a digit in the
    batch over the most that it could have, mean over digits) and "digit_entropy_least" (of the worst digit).

    `index(z)` gives codes, `lookup(codes)` their values, those that a call gives.
    """

    def __init__(self, levels, channels):
        # A tuple: an array would count as a part of the model's state.
        self._levels = tuple(int(level) for level in levels)
        self.channels, self.codes = int(channels), math.prod(self._levels)
        if self.codes >= 2**31:
            raise ValueError(
                f"{type(self).__name__} levels {self._levels} make {self.codes} codes; int32 holds < 2**31"
            )

    @property
    def levels(self):
        return np.asarray(self._levels, np.int32)

    @property
    def _basis(self):
        return np.cumprod([1, *self._levels[:-1]]).astype(np.int32)

    def join(self, digits):
        """Digits int32 [..., D] -> codes [...]."""
        return jnp.sum(digits * self._basis, axis=-1, dtype=jnp.int32)

    def digits(self, codes):
        """Codes [...] -> digits int32 [..., D]."""
        codes = codes.astype(jnp.int32)
        # Each divided by one number: a division by a vector takes four times as long on CPU.
        return jnp.stack([codes // int(b) % level for b, level in zip(self._basis, self._levels)], -1)

    def squash(self, z):
        """Features [..., C] -> what the values approximate, float32 [..., C]."""
        return z.astype(jnp.float32)

    def watch(self, codes):
        """`watched` of the codes [...] of a batch."""
        counts = _count(self.digits(codes) + np.cumsum([0, *self._levels[:-1]]), sum(self._levels))
        whose = np.repeat(np.arange(len(self._levels)), self._levels)
        each = jax.ops.segment_sum(_entropy(counts / codes.size), whose, len(self._levels))
        each /= np.log(np.clip(self.levels, 2, max(codes.size, 2))).astype(np.float32)
        found = {"digit_entropy": jnp.mean(each), "digit_entropy_least": jnp.min(each)}
        if self.codes <= _COUNTED:
            found["usage"] = jnp.mean(_count(codes, self.codes) > 0, dtype=jnp.float32)
        return found


def _count(ids, size):
    """How often each of 0 ... size - 1 occurs among ids [...]: float32 [size]."""
    return jnp.zeros(size, jnp.int32).at[ids.ravel()].add(1).astype(jnp.float32)


def _entropy(p):
    """-p log p, with a finite slope where p is 0."""
    return -p * jnp.log(jnp.maximum(p, 1e-30))


def _straight(values, squashed):
    """Exactly `values`, with the gradient passed straight to what they approximate."""
    return jax.lax.stop_gradient(values) + (squashed - jax.lax.stop_gradient(squashed))


def _unit(x):
    """Vectors [..., C] of length 1; 0 stays 0."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-12))


def _product(a, b):
    """Matrix product in float32 indeed, where accelerators would by default do with fewer bits."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


class FSQ(Quantizer):
    """Finite scalar quantization (arXiv:2309.15505): each channel is rounded to one of L levels.

    No parameters, no state, no auxiliary loss.

    As in the paper the tanh ends at the outermost levels, which so get half of the interval that the others have.
    With `whole` it ends half a level further out. Stages that divide what this one leaves (`FinerFSQ`) need that: they
    divide whole intervals, and would have codes for halves that nothing reaches.
    """

    def __init__(self, levels, whole=False):
        if not levels or min(levels) < 2:
            raise ValueError(f"FSQ levels must all be at least 2, found {tuple(levels)}")
        super().__init__(levels, len(levels))
        self.whole = whole

    def bound(self, z):
        """Squashes features [..., C] so that rounding gives exactly L values in each channel."""
        z = z.astype(jnp.float32)
        half = self.levels * (1 - 1e-4) / 2 if self.whole else (self.levels - 1) * (1 + 1e-3) / 2
        offset = np.where(self.levels % 2 == 0, 0.5, 0.0)
        # A level of 2 would need atanh of almost 1, where the gradient vanishes: shift nothing
        # there and round around -1/2 instead, which splits at z = 0.
        shift = np.where(self.levels == 2, 0.0, np.arctanh(np.where(self.levels == 2, 0, offset / half)))
        return jnp.tanh(z + shift) * half - offset

    def squash(self, z):
        return self.bound(z) / (self.levels // 2)

    def quantize(self, z):
        """Features [..., C] -> digits' values [..., C] in about [-1, 1], straight-through gradient."""
        bounded = self.bound(z)
        rounded = bounded + jax.lax.stop_gradient(jnp.round(bounded) - bounded)
        return rounded / (self.levels // 2)

    def pack(self, values):
        """Quantized values [..., C] -> code int32 [...]."""
        return self.join(jnp.round(values * (self.levels // 2)).astype(jnp.int32) + self.levels // 2)

    def unpack(self, codes):
        """Code int32 [...] -> quantized values float32 [..., C]; the exact inverse of `pack`."""
        return (self.digits(codes) - self.levels // 2).astype(jnp.float32) / (self.levels // 2)

    def index(self, z):
        return self.pack(self.quantize(z))

    def lookup(self, codes):
        return self.unpack(codes)

    def __call__(self, z):
        values = self.quantize(z)
        return values, jnp.float32(0.0), self.watch(self.pack(values))


class FinerFSQ(FSQ):
    """A later stage of a `Residual` of FSQ. What rounding leaves is between -1/2 and 1/2 of a step: this
    divides it, for the stage number s = 1, 2, ..., by L**-s and cuts that interval into L equal parts. All
    stages together so divide each channel of `FSQ.squash` evenly into L**depth levels, with no second
    tanh."""

    def __init__(self, levels, stage):
        super().__init__(levels)
        self.stage = stage

    def squash(self, z):
        return z.astype(jnp.float32)

    def _parts(self):
        """Parts in a unit, and where the middle of digit L // 2 is off 0, in parts."""
        parts = self.levels.astype(np.float32) ** self.stage * (self.levels // 2)
        return parts, np.where(self.levels % 2 == 0, np.float32(0.5), np.float32(0.0))

    def index(self, z):
        parts, middle = self._parts()
        digits = jnp.round(z.astype(jnp.float32) * parts - middle).astype(jnp.int32) + self.levels // 2
        return self.join(jnp.clip(digits, 0, self.levels - 1))

    def lookup(self, codes):
        parts, middle = self._parts()
        return ((self.digits(codes) - self.levels // 2).astype(jnp.float32) + middle) / parts

    def __call__(self, z):
        codes = self.index(z)
        return _straight(self.lookup(codes), self.squash(z)), jnp.float32(0.0), self.watch(codes)


_NEW = 1e-3  # average count of a code that has seen nothing: the first features outweigh it
_SMOOTH = 1e-5  # Laplace smoothing of the average counts
_FAIR = 0.1  # of a fair share of the batch's features: a code with as many is never dead
_SOFT = 0.01  # temperature of the entropy's soft assignments


class VQ(Quantizer):
    """Vector quantization: each feature becomes the nearest of K learned codewords.

    With `normalize`, features and codewords are vectors of length 1, in what is compared and in the values
    (ViT-VQGAN, arXiv:2110.04627). The loss has these terms, means over all features and channels:
      `commitment` * square(features - stopped codewords), which moves the encoder alone;
      with `decay` 0, square(stopped features - codewords), which moves the codewords that were chosen;
      `entropy` * (mean entropy of soft assignments - entropy of their mean over the batch), in nats, of
      softmax(-squared distance / 0.01) (MaskGIT, arXiv:2202.04200); moving averages are none of its business.

    With a `decay`, codewords are moving averages (arXiv:1711.00937, appendix): of the number of features per
    code and batch, `counts` [K], and of these features' sum, `sums` [K, C]. They are parameters that say
    `average` = decay: the optimizer is to move these by -(1 - decay) * gradient and nothing else. Their
    gradient is exactly (parameter - target), which makes that decay * parameter + (1 - decay) * target, and
    what produces it adds 0 to the loss. Where a batch is computed in several parts, the targets are the
    parts' means: counts are then those per part.

    Restart: a code whose new average count would be under `restart` gets a feature of the batch for its
    codeword, and the average count max(restart, 1). Averages start near 0, so that the first batch already
    gives nearly all codes a codeword among the features. In a batch with few features for its codes merely
    rare codes would die all the time; one with a tenth of N / K features is never dead, whatever `restart`
    says. Under 1, a new code has log(threshold) / log(decay) steps to find features; at 1, which is the
    default and in force from ten features a code on, it has to find one in every batch from the next on. 0
    restarts none. Each feature restarts one code at most: where more are dead, the others wait for the next
    batch. Without a `decay` there are no counts, hence no restart.

    `watched` has "dead" besides, the share of codes that this batch leaves under the threshold (that of `restart` 1 where it is 0).
    """

    def __init__(
        self,
        codes,
        channels,
        rngs,
        *,
        decay=0.99,
        commitment=0.25,
        normalize=True,
        restart=1.0,
        entropy=0.0,
    ):
        super().__init__((codes,), channels)
        if not 0 <= decay < 1:
            raise ValueError(f"VQ decay must be in [0, 1), found {decay}")
        self.decay, self.commitment, self.normalize = decay, commitment, normalize
        self.restart, self.entropy = restart, entropy
        start = layers.normal(rngs, (codes, channels), 1.0)
        if decay:
            self.counts = nnx.Param(jnp.full(codes, _NEW, jnp.float32), axes=("vocab",), average=decay)
            self.sums = nnx.Param(_NEW * start, axes=("vocab", "code"), average=decay)
        else:
            self.table = nnx.Param(start, axes=("vocab", "code"))

    def squash(self, z):
        z = z.astype(jnp.float32)
        return _unit(z) if self.normalize else z

    def codewords(self):
        """float32 [K, C]. The averages have no gradient but their own."""
        if self.decay:
            counts, sums = (jax.lax.stop_gradient(average[...]) for average in (self.counts, self.sums))
            total = counts.sum()
            words = sums / ((counts + _SMOOTH) * (total / (total + self.codes * _SMOOTH)))[:, None]
        else:
            words = self.table[...]
        return self.squash(words)

    def index(self, z):
        return jnp.argmax(_closeness(self.squash(z), self.codewords()), -1).astype(jnp.int32)

    def lookup(self, codes):
        return self.codewords()[codes]

    def __call__(self, z):
        squashed, words = self.squash(z), self.codewords()
        features = squashed.reshape(-1, self.channels)
        closeness = _closeness(features, words)
        codes = jnp.argmax(closeness, -1).astype(jnp.int32)
        chosen = words[codes]
        loss = self.commitment * jnp.mean(jnp.square(features - jax.lax.stop_gradient(chosen)))
        if self.entropy:
            loss += self.entropy * _indecision(closeness / _SOFT)
        watched = self.watch(codes)
        if self.decay:
            pull, watched["dead"] = self._average(jax.lax.stop_gradient(features), codes)
            loss += pull
        else:
            loss += jnp.mean(jnp.square(jax.lax.stop_gradient(features) - chosen))
        return _straight(chosen.reshape(squashed.shape), squashed), loss, watched

    def _average(self, features, codes):
        """Features [N, C] and their codes [N] -> a term of value 0 whose gradient moves the averages, and the
        share of dead codes."""
        N, keep = len(features), self.decay
        counts, sums = (jax.lax.stop_gradient(average[...]) for average in (self.counts, self.sums))
        # Added up by index: on several devices each adds its own features, and then these [K] and [K, C] are
        # summed. A product with one-hot vectors would need another [N, K].
        n = _count(codes, self.codes)
        targets = n, jnp.zeros_like(sums).at[codes].add(features)
        dead = keep * counts + (1 - keep) * n < min(self.restart or 1.0, _FAIR * N / self.codes)
        # The dead take features at even distances through the batch. They begin at a place that differs from
        # batch to batch: the first feature alone would forever be a corner of an image.
        rank = jnp.cumsum(dead) - 1
        stride = jnp.maximum(N // jnp.maximum(dead.sum(), 1), 1)
        place = (rank * stride + jnp.sum(codes) % N) % N
        count = max(self.restart, 1.0)
        wanted = jnp.full_like(counts, count), count * features[place]
        again = dead & (rank < N) & (self.restart > 0)
        pull = 0.0
        for param, target, new in zip((self.counts, self.sums), targets, wanted):
            old = jax.lax.stop_gradient(param[...])
            rows = again.reshape(-1, *(1,) * (old.ndim - 1))
            target = jnp.where(rows, old + (new - old) / (1 - keep), target)
            pull += jnp.sum((param[...] - old) * jax.lax.stop_gradient(old - target))
        return pull, jnp.mean(dead, dtype=jnp.float32)


def _closeness(features, words):
    """[..., C], [K, C] -> [..., K]: minus the squared distance, but for the feature's own square."""
    return 2 * _product(features, words.T) - jnp.sum(jnp.square(words), -1)


def _indecision(logits):
    """Logits [N, K] -> mean entropy of their softmax - entropy of the mean softmax. Least, -log K, where
    assignments are certain and all codes equally frequent."""
    log_p = jax.nn.log_softmax(logits)
    p = jnp.exp(log_p)
    return -jnp.mean(jnp.sum(p * log_p, -1)) - jnp.sum(_entropy(jnp.mean(p, 0)))


class LFQ(Quantizer):
    """Lookup-free quantization (MAGVIT-v2, arXiv:2310.05737): a code is the signs of the channels, its values
    are -1 (also for a feature of 0) and 1, its digits 0 and 1.

    The loss is `entropy` * (mean entropy of a feature's soft code - `diversity` * entropy of the mean soft
    code) + `commitment` * mean square(features - stopped values). It is least where features are sure of
    their codes and all codes are equally frequent. Codes are soft by softmax(-squared distance /
    `temperature`); given the feature the bits are independent, so that its entropy is the sum over bits,
    exactly. The entropy of the mean is exact for each run of at most `group` bits, and the runs' entropies
    are added: an upper bound of that of the whole code, and equal to it where there is one run. Entropies are
    in nats.
    """

    def __init__(self, bits, *, entropy=0.1, diversity=1.0, commitment=0.25, temperature=0.01, group=9):
        super().__init__((2,) * bits, bits)
        if bits < 1 or group < 1:
            raise ValueError(
                f"{type(self).__name__} bits and group must be at least 1, found {bits}, {group}"
            )
        self.entropy, self.diversity, self.commitment = entropy, diversity, commitment
        self.temperature, self.group = temperature, group
        self.size = 1.0  # of a value

    def index(self, z):
        return self.join((z > 0).astype(jnp.int32))

    def lookup(self, codes):
        return self.size * (2 * self.digits(codes) - 1).astype(jnp.float32)

    def __call__(self, z):
        squashed, codes = self.squash(z), self.index(z)
        values = self.lookup(codes)
        loss = self.commitment * jnp.mean(jnp.square(squashed - values))
        if self.entropy:
            sure, spread = self.entropies(squashed.reshape(-1, self.channels))
            loss += self.entropy * (sure - self.diversity * spread)
        return _straight(values, squashed), loss, self.watch(codes)

    def entropies(self, squashed):
        """Squashed features [N, C] -> mean entropy of a feature's soft code, entropy of the mean soft
        code."""
        logits = 4 * self.size / self.temperature * squashed  # of a bit being set, from the two distances
        far = jnp.abs(logits)
        each = jax.nn.softplus(-far) + far * jax.nn.sigmoid(-far)
        spread = 0.0
        for start in range(0, self.channels, self.group):
            part = logits[:, start : start + self.group]
            # The mean over features of the outer product of two halves' probabilities is a matrix product:
            # what is held is 2**(group / 2) numbers per feature, and 2**group once.
            low, high = (_soft_codes(half) for half in jnp.split(part, [part.shape[1] // 2], 1))
            spread += jnp.sum(_entropy(_product(low.T, high) / len(part)))
        return jnp.mean(jnp.sum(each, -1)), spread


def _soft_codes(logits):
    """Logits of bits being set [N, d] -> probabilities of the codes of these bits [N, 2**d]."""
    bits = logits.shape[1]
    codes = (np.arange(2**bits) >> np.arange(bits)[:, None] & 1).astype(np.float32)
    log_p = _product(jax.nn.log_sigmoid(logits), codes) + _product(jax.nn.log_sigmoid(-logits), 1 - codes)
    return jnp.exp(log_p)


class BSQ(LFQ):
    """Binary spherical quantization (arXiv:2406.07548): LFQ of features of length 1, where values of -1 /
    sqrt(bits) and 1 / sqrt(bits) have length 1 too. No value is far from its feature, so that by default
    nothing commits."""

    def __init__(self, bits, *, commitment=0.0, **terms):
        super().__init__(bits, commitment=commitment, **terms)
        self.size = bits**-0.5

    def squash(self, z):
        return _unit(z.astype(jnp.float32))


class Residual(Quantizer):
    """Residual quantization (RQ-VAE, arXiv:2203.01941): each stage quantizes what those before it have left,
    and the values are the sum of all stages'. The stages' codes make one code, the first stage least
    significant.

    `make(stage, rngs)` builds stage 0, 1, ..., all with the same levels and channels. Only the first may
    squash (a direction has no remainder that is a direction): see `QUANTIZERS`. Losses are added, so that
    every stage commits the encoder to its own remainder; `watched` are means over stages. The gradient is
    passed straight through the sum, not through its parts.
    """

    def __init__(self, make, depth, rngs):
        if depth < 1:
            raise ValueError(f"Residual depth must be at least 1, found {depth}")
        stages = [make(stage, rngs) for stage in range(depth)]
        super().__init__(stages[0]._levels * depth, stages[0].channels)
        self.depth = depth
        for i, stage in enumerate(stages):  # by name: in checkpoints all keys are texts
            setattr(self, f"stage{i}", stage)

    @property
    def stages(self):
        return [getattr(self, f"stage{i}") for i in range(self.depth)]

    def squash(self, z):
        return self.stage0.squash(z)

    def index(self, z):
        code, basis = 0, 1
        for stage in self.stages:
            part = stage.index(z)
            z = stage.squash(z) - stage.lookup(part)
            code, basis = code + part * basis, basis * stage.codes
        return code

    def lookup(self, codes):
        values, codes = 0.0, codes.astype(jnp.int32)
        for stage in self.stages:
            values += stage.lookup(codes % stage.codes)
            codes //= stage.codes
        return values

    def __call__(self, z):
        values, loss, watched = 0.0, jnp.float32(0.0), []
        left = z
        for stage in self.stages:
            part, term, found = stage(left)
            part = jax.lax.stop_gradient(part)
            left = stage.squash(left) - part
            values, loss = values + part, loss + term
            watched.append(found)
        watched = {name: sum(found[name] for found in watched) / self.depth for name in watched[0]}
        return _straight(values, self.squash(z)), loss, watched


def _fsq(config, stage, rngs):
    return FinerFSQ(config.levels, stage) if stage else FSQ(config.levels, whole=config.depth > 1)


def _vq(config, stage, rngs):
    return VQ(
        config.codes,
        config.channels,
        rngs,
        decay=config.decay,
        normalize=config.normalize and stage == 0,
        restart=config.restart,
        **_given(config, "commitment", "entropy"),
    )


def _given(config, *names):
    return {name: config[name] for name in names if config[name] is not None}


def _signs(kind):
    def make(config, stage, rngs):
        if config.depth > 1:
            raise ValueError(f"a quantizer with depth > 1 is made of 'fsq' or 'vq', found {config.kind!r}")
        return kind(config.bits, **_given(config, "entropy", "diversity", "commitment"))

    return make


# kind: what makes a stage (0 where there is one alone) from the config.
QUANTIZERS = {"fsq": _fsq, "vq": _vq, "lfq": _signs(LFQ), "bsq": _signs(BSQ)}


def make_quantizer(config, rngs):
    """The quantizer of a config: `kind`, `depth` (over 1: a `Residual`), and what the kind's constructor
    takes: levels (fsq); codes, channels, decay, commitment, normalize, restart, entropy (vq); bits, entropy,
    diversity, commitment (lfq, bsq). Of entropy and commitment None is the constructor's own. ValueError for an unknown kind."""
    if config.kind not in QUANTIZERS:
        raise ValueError(f"unknown quantizer {config.kind!r}; known: {', '.join(QUANTIZERS)}")
    make = lambda stage, rngs: QUANTIZERS[config.kind](config, stage, rngs)
    return make(0, rngs) if config.depth == 1 else Residual(make, config.depth, rngs)
