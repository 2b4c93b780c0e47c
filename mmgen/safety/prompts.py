"""A small classifier of prompts: hashed pieces of words -> which category of the policy, if any.

Learned from templates (intents.LANGUAGE.yaml) that say what is blocked and, with the same words, what is not. It is a bag of
pieces (as fastText's, arXiv:1607.01759) through one hidden layer: what is near a word can then take back what the word says.
Trained in JAX (`train`), used in NumPy: a prompt takes well under a millisecond, most of it its pieces.
"""

import functools
import json
import re
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import yaml

from mmgen.models import classifier
from mmgen.safety.normalise import CJK, Repair, plain

ALLOW = "allow"
LISTED = (
    "artist",
    "minor_figure",
)  # who is who stands in lists: a classifier would learn some names, and refuse their like
MOST = 512  # pieces of a prompt that are looked at; of a longer one they are evenly spread
_WORDS = re.compile(rf"[a-z0-9']+|[{CJK}]")


def pieces(text):
    """The pieces of a normalised text: words, pairs of words, 3 to 5 letters of words; one to three Chinese characters."""
    words, found = _WORDS.findall(text), []
    for i, word in enumerate(words):
        found.append(word)
        if i:
            found.append(f"{words[i - 1]} {word}")
        if ord(word[0]) > 0x3000:
            if i > 1:
                found.append(f"{words[i - 2]} {words[i - 1]} {word}")
        else:
            whole = f"<{word}>"
            found += [whole[k : k + n] for n in (3, 4, 5) for k in range(len(whole) - n + 1)]
            if i > 1:
                found.append(f"{words[i - 2]} _ {word}")
    return found


def ids(text, buckets):
    """The buckets int32 [<= MOST] of a normalised text's pieces, each once."""
    found = np.unique([zlib.crc32(piece.encode()) % buckets for piece in pieces(text)]).astype(np.int32)
    return found if len(found) <= MOST else found[np.linspace(0, len(found) - 1, MOST).astype(int)]


class Prompts:
    """A trained classifier. `classes`: "allow" first, then categories; `words`: those that `Repair` must know; `hash`: of all."""

    def __init__(self, path=None):
        path = Path(path or Path(__file__).parent / "prompts.npz")
        with np.load(path) as file:
            about = json.loads(bytes(file["about"]).decode())
            self.table = file["table"].astype(np.float32) * file["scale"].astype(np.float32)[:, None]
            self.rest = [file[name].astype(np.float32) for name in ("bias", "out", "out_bias")]
        self.classes, self.words, self.temperature = (
            tuple(about["classes"]),
            about["words"].split(),
            about["temperature"],
        )
        self.hash = f"{zlib.crc32(path.read_bytes()):08x}"

    def probabilities(self, text):
        """{class: calibrated probability} of a normalised text."""
        logits = _logits(self.table[ids(text, len(self.table))], *self.rest)
        p = classifier.probabilities(logits[None] / self.temperature, False)[0]
        return dict(zip(self.classes, p.tolist()))


def _logits(rows, bias, out, out_bias):
    hidden = np.maximum(rows.sum(0) / max(len(rows), 1) ** 0.5 + bias, 0)
    return hidden @ out + out_bias


# ---- templates -----------------------------------------------------------------------------------------------


def read_intents(paths):
    """[(template, label, category, {slot: phrases})] of intents files: the label is the category or "allow". A .jsonl has prompts that
    are written out, a line an object with "text", "label" and perhaps "near", the category that it is near to. ValueError for a
    slot that is not there."""
    found = []
    for path in map(Path, paths):
        if path.suffix == ".jsonl":
            for line in map(json.loads, path.read_text("utf-8").splitlines()):
                if (label := line["label"]) in LISTED:
                    continue
                found.append(
                    (line["text"], label, (line.get("near") or ALLOW) if label == ALLOW else label, {})
                )
            continue
        content = yaml.safe_load(path.read_text("utf-8"))
        ordinary = content["ordinary"]
        shared = {f"o.{name}": phrases for name, phrases in ordinary["slots"].items()}
        parts = {
            **content["categories"],
            ALLOW: {"allowed": ordinary["allowed"], "slots": shared | ordinary["slots"]},
        }
        for category, part in parts.items():
            slots = shared | part.get("slots", {})
            for kind, label in (("blocked", category), ("allowed", ALLOW)):
                for template in part.get(kind, ()) if label not in LISTED else ():
                    if lacking := [name for name in _slots(template) if not slots.get(name)]:
                        raise ValueError(f"{path}, {category}: no slots {lacking} for {template!r}")
                    found.append((template, label, category, slots))
    return found


def _slots(template):
    return re.findall(r"\{([\w.]+)\}", template)


def fill(template, slots, rng):
    """The template with a phrase in each slot."""
    if not slots:
        return template
    return re.sub(
        r"\{([\w.]+)\}", lambda found: str(slots[found[1]][rng.integers(len(slots[found[1]]))]), template
    )


def examples(intents, n, rng, more=(), context=0.3):
    """n (text, label): half of them blocked, each category and each of its templates as often as any other; of the others one half
    near to a category, one half ordinary, with `more` texts among those. A share `context` goes on with words of an ordinary
    template, which says nothing of the intent."""
    groups = {}
    for template, label, category, slots in intents:
        kind = "ordinary" if category == ALLOW else "near" if label == ALLOW else "blocked"
        groups.setdefault(kind, {}).setdefault(category, []).append((template, label, slots))
    out = []
    for _ in range(n):
        kind = ("blocked", "blocked", "near", "ordinary")[rng.integers(4)]
        if kind == "ordinary" and more and rng.random() < 0.3:
            out.append((more[rng.integers(len(more))], ALLOW))
            continue
        categories = [*groups[kind].values()]
        templates = categories[rng.integers(len(categories))]
        template, label, slots = templates[rng.integers(len(templates))]
        text = fill(template, slots, rng)
        if rng.random() < context:
            other, _, its = groups["ordinary"][ALLOW][rng.integers(len(groups["ordinary"][ALLOW]))]
            text = "{}, {}".format(
                *((text, fill(other, its, rng)) if rng.random() < 0.5 else (fill(other, its, rng), text))
            )
        out.append((text, label))
    return out


# ---- training ------------------------------------------------------------------------------------------------


def train(
    intents, out, words, *, more=(), buckets=2**16, width=24, steps=3000, batch=256, seed=0, drop=0.3, decay=2e-5, rate=3e-3,
    held_out=0.1,
):  # fmt: skip
    """Learns from `read_intents`' templates and writes OUT.npz -> {metric: value} on templates that were held out: a share of
    those of each category, by the seed, whose phrases in slots are those of the others.

    words: those of the policy, which are repaired where they are disguised, as those of the templates are. more: ordinary texts.
    drop: share of a text's pieces that is not seen, each time another.
    """
    rng = np.random.default_rng(seed)
    classes = (ALLOW, *sorted({label for _, label, *_ in intents} - {ALLOW}))
    aside = set()
    for kind in sorted({(category, label) for _, label, category, _ in intents}):
        rows = [i for i, (_, label, category, _) in enumerate(intents) if (category, label) == kind]
        aside |= set(rng.permutation(rows)[: max(1, round(held_out * len(rows)))].tolist())
    parts = [row for i, row in enumerate(intents) if i not in aside], [intents[i] for i in sorted(aside)]
    known = sorted(set(words) | _vocabulary(intents))
    repair = Repair(known)
    read = functools.partial(_encoded, repair=repair, classes=classes, buckets=buckets)
    learned, measured = read(examples(parts[0], 60_000, rng, more)), read(examples(parts[1], 6000, rng, more))

    key = jax.random.key(seed)
    params = {
        "table": 0.1 * jax.random.normal(key, (buckets, width)),
        "bias": jnp.zeros(width),
        "out": 0.3 * jax.random.normal(jax.random.fold_in(key, 1), (width, len(classes))),
        "out_bias": jnp.zeros(len(classes)),
    }
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))
    state = optimizer.init(params)

    def loss(params, rows, labels, key):
        logits = forward(params, jnp.where(jax.random.uniform(key, rows.shape) < drop, -1, rows))
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return nats + decay * sum(jnp.square(params[name]).sum() for name in ("table", "out"))

    @jax.jit
    def step(params, state, rows, labels, key):
        value, grads = jax.value_and_grad(loss)(params, rows, labels, key)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    for i in range(steps):
        chosen = rng.integers(len(learned[0]), size=batch)
        params, state, value = step(
            params, state, learned[0][chosen], learned[1][chosen], jax.random.fold_in(key, i + 2)
        )
    table = np.asarray(params["table"])
    scale = np.maximum(np.abs(table).max(1) / 127, 1e-6).astype(np.float16)
    small = np.clip(np.round(table / scale.astype(np.float32)[:, None]), -127, 127).astype(np.int8)
    params = {name: np.asarray(value) for name, value in params.items()}
    params["table"] = small * scale.astype(np.float32)[:, None]
    logits = np.concatenate(
        [np.asarray(jax.jit(forward)(params, rows)) for rows in np.array_split(measured[0], 20)]
    )
    labels = np.eye(len(classes))[measured[1]]
    # By one half of the held-out texts, measured on the other.
    heat = classifier.temperature(logits[::2], labels[::2], False)
    p, labels = classifier.probabilities(logits[1::2] / heat, False), labels[1::2]
    harm, bad = 1 - p[:, 0], labels[:, 0] == 0
    about = {"classes": classes, "words": " ".join(known), "temperature": heat}
    np.savez_compressed(
        out, table=small, scale=scale, **{name: params[name].astype(np.float16) for name in ("bias", "out", "out_bias")},
        about=np.frombuffer(json.dumps(about).encode(), np.uint8),
    )  # fmt: skip
    return {
        "loss": float(value), "temperature": heat, "not_unsafe": float((harm[bad] >= 0.5).mean()),
        "not_overrefuse": float((harm[~bad] < 0.5).mean()), "accuracy": float((p.argmax(1) == labels.argmax(1)).mean()),
        "calibration_error": classifier.calibration_error(p, labels, False), "bytes": Path(out).stat().st_size,
    }  # fmt: skip


def forward(params, rows):
    """Buckets int32 [B, N], -1 where there is none -> logits [B, classes]."""
    there = (rows >= 0)[..., None]
    total = jnp.where(there, params["table"][jnp.maximum(rows, 0)], 0).sum(1)
    hidden = jax.nn.relu(total / jnp.sqrt(jnp.maximum(there.sum(1), 1)) + params["bias"])
    return hidden @ params["out"] + params["out_bias"]


def _vocabulary(intents):
    texts = [template for template, *_ in intents] + [
        p for *_, slots in intents for phrases in slots.values() for p in phrases
    ]
    return {
        word
        for text in texts
        for word in re.findall("[a-z]{2,}", re.sub(r"\{[\w.]+\}", " ", str(text)).casefold())
    }


def _encoded(rows, repair, classes, buckets):
    """(text, label) of each row -> buckets int32 [N, longest], -1 where there is none, and labels int32 [N]."""
    found = [ids(repair(plain(text)), buckets) for text, _ in rows]
    longest = max(map(len, found))
    out = np.full((len(rows), longest), -1, np.int32)
    for row, each in zip(out, found):
        row[: len(each)] = each
    return out, np.array([classes.index(label) for _, label in rows], np.int32)
