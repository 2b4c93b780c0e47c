"""The one gate: what is asked and what is drawn passes through a `Safety`, or nothing is shown.

Every decision is logged as a line of JSON, by the hash of what was asked and not its words, unless that is asked for. A layer that cannot be
loaded, or that throws, blocks: nobody gets a picture because something broke.
"""

import hashlib
import json
import re
import time
import types
from pathlib import Path

from mmgen.document import Image, Refusal, Text
from mmgen.safety.normalise import CJK, Repair, plain
from mmgen.safety.policy import Decision, Policy
from mmgen.safety.prompts import ALLOW, Prompts

FAILED = "layer-failed"


class PromptLayer:
    """Layer 1: rules and lists of the policy, then the trained classifier, on texts."""

    def __init__(self, policy=None, prompts=None):
        self.policy, self.prompts = policy or Policy(), prompts or Prompts()
        if strange := set(self.prompts.classes) - {ALLOW, *self.policy.categories}:
            raise ValueError(
                f"the prompt classifier tells categories that the policy has not: {sorted(strange)}"
            )
        self.repair = Repair(self.policy.words | set(self.prompts.words))

    def views(self, text):
        """The texts in which rules are looked for."""
        first = plain(text)
        return list(dict.fromkeys((first, self.repair(first))))

    def decide(self, text, level="auto"):
        """The `Decision` on one text."""
        language = "zh" if re.search(f"[{CJK}]", text) else "en"
        views = self.views(text)
        found = self.policy.judge(views, level)
        if found:
            return self.policy.decided(
                found.categories[0], found.rule, "prompt", language, span=found.span, reason=found.reason
            )
        p = self.prompts.probabilities(self.policy.unexcepted(views[-1]))
        harm = 1 - p.pop(ALLOW)
        if harm < self.policy.levels[level]["probability"]:
            return Decision(harm=harm)
        category = max(p, key=p.get)
        return self.policy.decided(
            category, "classifier", "prompt", language, harm=harm, span=views[-1],
            reason=f"It reads like {category.replace('_', ' ')}: {self.policy.categories[category]['definition']}",
        )  # fmt: skip


class Safety:
    """All layers, and the log of what they decide.

    level: the strictness, one of the policy's. log: a path to which lines are added, or None. words: whether the log has the prompts
    themselves. prompts, images: functions without arguments that make a `PromptLayer` and an `images.ImageLayer` (None: no layer of that kind).
    """

    def __init__(self, level="auto", log=None, words=False, prompts=PromptLayer, images=None):
        self.level, self.log, self.words = level, log and Path(log), words
        self._layers, self._broken = {}, {}
        for name, make in (("prompt", prompts), ("image", images)):
            try:
                self._layers[name] = make and make()
            except Exception as error:  # whatever it is, it must not let anything through
                self._broken[name] = f"{type(error).__name__}: {error}"
        layer = self._layers.get("prompt")
        if layer and level not in layer.policy.levels:
            raise ValueError(
                f"strictness: expected one of {', '.join(layer.policy.levels)} or off; found {level!r}"
            )

    @property
    def about(self):
        """What a note of a picture says of the gate that it passed."""
        if self._broken:
            return {"safety": "broken", "level": self.level}
        layer, images = self._layers["prompt"], self._layers["image"]
        return {
            "safety": "on", "level": self.level, "policy": layer.policy.hash, "policy_version": layer.policy.version,
            "prompts": layer.prompts.hash, "images": images and images.about,
        }  # fmt: skip

    @property
    def refusal_bias(self):
        """What the strictness adds to the logits of a model's refusals; None: the model must not refuse."""
        layer = self._layers.get("prompt")
        return layer.policy.levels[self.level]["refusal_bias"] if layer else 0.0

    def prompt(self, document):
        """The `Decision` on what the users of a document say: each turn, and all of them together, as what is harmful may be
        spread over turns. What a model has said of a picture that it was shown counts as said by who showed it: the words in it."""
        turns, before = [], None
        for turn in document.turns:
            if turn.role in ("system", "user") or _reads(before, turn):
                turns.append(_words(turn))
            before = turn
        texts = [text for text in turns if text.strip()]
        if len(texts) > 1:
            texts.append("\n".join(texts))
        decide = lambda layer: next(
            (d for d in (layer.decide(text, self.level) for text in texts) if not d.allowed), Decision()
        )
        return self._decided("prompt", decide, "\n".join(turns).encode())

    def shown(self, images, edited):
        """The `Decision` on a user's pictures, uint8 [H, W, 3 or 4] each; edited: whether a picture is to be made of them."""
        return self._decided("image", lambda layer: layer.decide(images, edited), *images)

    def drawn(self, images):
        """The `Decision` on what a model has drawn."""
        return self._decided("image", lambda layer: layer.decide(images), *images)

    def warm(self):
        """Makes the image layer ready, which compiles when it first looks; nothing is decided, and the log says nothing."""
        if self._layers.get("image"):
            self._layers["image"].warm()

    def answered(self, turn):
        """The `Decision` on a model's turn: its own refusal, if it is one, else what its pictures show and its words say: it may have read
        them in a picture."""
        if turn.parts and isinstance(turn.parts[0], Refusal):
            categories = self._layers["prompt"].policy.categories if self._layers.get("prompt") else {}
            names = tuple(
                name for name, each in categories.items() if each["token"] == turn.parts[0].category
            )
            words = " ".join(part.text for part in turn.parts[1:]) or "The model refused."
            found = Decision("refuse", names, "model", "model", reason=words)
            return self._decided("model", lambda _: found, words.encode())
        found = self.drawn([part.pixels for part in turn.parts if isinstance(part, Image)])
        words = _words(turn)
        if not found.allowed or not words.strip():
            return found
        return self._decided("prompt", lambda layer: layer.decide(words, self.level), words.encode())

    def _decided(self, name, decide, *asked):
        if name != "model" and name not in self._broken and self._layers[name] is None:
            return Decision()
        began = time.perf_counter()
        try:
            found = (
                _failed(name, self._broken[name]) if name in self._broken else decide(self._layers.get(name))
            )
        except Exception as error:
            found = _failed(name, f"{type(error).__name__}: {error}")
        if self.log is not None:
            digest = hashlib.sha256()
            for each in asked:
                digest.update(each if isinstance(each, bytes) else each.tobytes())
            line = {
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "layer": name, "asked": digest.hexdigest()[:16], **self.about,
                "decision": found.decision, "categories": list(found.categories), "rule": found.rule, "harm": found.harm,
                "ms": round(1000 * (time.perf_counter() - began), 2),
            }  # fmt: skip
            if self.words and name == "prompt":
                line |= {"prompt": asked[0].decode(), "span": found.span}
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return found


class Off(Safety):
    """No layers: everything passes, and the log and the notes say so."""

    def __init__(self, log=None):
        super().__init__("off", log, prompts=_Nothing)

    @property
    def about(self):
        return {"safety": "off"}

    @property
    def refusal_bias(self):
        return None


class _Nothing:
    policy = types.SimpleNamespace(levels=("off",))

    def decide(self, text, level):
        return Decision()


def _words(turn):
    return " ".join(part.text for part in turn.parts if isinstance(part, Text))


def _reads(asked, turn):
    """Whether a turn is a model's answer, no refusal, to one that shows a picture."""
    shown = asked is not None and any(isinstance(part, Image) for part in asked.parts)
    return shown and turn.role == "assistant" and not (turn.parts and isinstance(turn.parts[0], Refusal))


def _failed(layer, why):
    return Decision(
        "block", (), FAILED, layer, reason=f"the {layer} layer cannot work ({why}), and so nothing is drawn"
    )
