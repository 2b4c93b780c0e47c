"""The policy as data: what `policy.yaml` and `artists.yaml` say, checked, hashed, and matched against prompts.

Rules are matched in two views of a text (see normalise.py): as it is written but for Unicode's disguises, and with
disguised words repaired. `Policy.judge` says which rule holds and by which words.
"""

import dataclasses
import datetime
import functools
import hashlib
import re
from pathlib import Path

import yaml

from mmgen.safety.normalise import CJK, plain

LAYERS, ACTIONS = ("prompt", "image", "model"), ("block", "refuse", "allow")
AILUMINATE = (
    "violent_crimes", "non_violent_crimes", "sex_related_crimes", "child_sexual_exploitation", "indiscriminate_weapons",
    "suicide_and_self_harm", "intellectual_property", "defamation", "hate", "privacy", "specialized_advice", "sexual_content",
)  # fmt: skip
OPENAI = (
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit", "illicit/violent", "self-harm",
    "self-harm/intent", "self-harm/instructions", "sexual", "sexual/minors", "violence", "violence/graphic",
)  # fmt: skip
_WORDS = re.compile(rf"[^\W{CJK}_]+|[{CJK}]")
_DOTS = re.compile(rf"(?<=[{CJK}])[·•・.\s]+(?=[{CJK}])|'")  # of 奥蕾莉亚·范通格伦, and of O'Neill
_FIELDS = {"token", "ailuminate", "openai", "definition", "layers"}
_RULE = {"id", "category", "any", "reason"}


class PolicyError(ValueError):
    """A policy file that says what it may not, or not what it must."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """What is to be done with a prompt or an image, and why.

    decision: "allow", "block" (nothing is shown) or "refuse" (it is said why, and what could be drawn instead: `offer`).
    rule: of the policy, "classifier", or what else decided; layer: "prompt", "image" or "model"; span: the normalised words that
    met the rule; harm: the probability that the classifier gave it, if it was asked."""

    decision: str = "allow"
    categories: tuple[str, ...] = ()
    rule: str | None = None
    layer: str | None = None
    span: str | None = None
    reason: str | None = None
    offer: str | None = None
    harm: float | None = None

    @property
    def allowed(self):
        return self.decision == "allow"

    def to_dict(self):
        return dataclasses.asdict(self) | {"categories": list(self.categories)}


@dataclasses.dataclass(frozen=True)
class _Rule:
    id: str
    category: str
    reason: str
    any: re.Pattern
    has: re.Pattern | None
    unless: re.Pattern | None
    exempt: re.Pattern | None
    levels: tuple[str, ...]

    def span(self, text):
        """The words by which the rule holds of a normalised text, or None."""
        if self.exempt:
            text = self.exempt.sub(" · ", text)
        found = self.any.search(text)
        if not found or (self.unless and self.unless.search(text)):
            return None
        if self.has is None:
            return found[0]
        # The two may not be one and the same words.
        for found in self.any.finditer(text):
            rest = f"{text[: found.start()]} · {text[found.end() :]}"
            if other := self.has.search(rest):
                return f"{found[0]} + {other[0]}"
        return None


class Policy:
    """A checked policy. `hash` is that of its content, of both files. `today` is the date by which entries of lists hold.

    Raises PolicyError, which names the place, for what is misspelt, missing or contradictory.
    """

    def __init__(self, path=None, artists=None, today=None):
        folder = Path(__file__).parent
        parts = [
            Path(path or folder / "policy.yaml").read_bytes(),
            Path(artists or folder / "artists.yaml").read_bytes(),
        ]
        self.hash = hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]
        try:
            found, listed = (yaml.load(part, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) for part in parts)
        except yaml.YAMLError as error:
            raise PolicyError(f"the policy is no YAML: {error}") from None
        self.today = today or datetime.date.today()
        self.version, self.categories, self.levels = _checked(found)
        self.terms, self.raw = found["terms"], found["rules"]
        self.rules = [self._rule(rule) for rule in found["rules"]]
        self._names = {}  # as `_keys` has them: what is decided
        people = (
            (listed["artists"], "artist", "living-artist", "A living artist's own style is not imitated."),
            (
                found["public_figures"]["minors"],
                "minor_figure",
                "named-minor",
                "A public person under 18 is not drawn.",
            ),
            (
                found["public_figures"]["opted_out"],
                "public_figure",
                "opted-out",
                "This person has asked not to be drawn.",
            ),
        )
        for entries, *about in people:
            for entry in filter(self._holds, entries):
                self._names |= {
                    key: about
                    for name in (entry["name"], *entry.get("also", ()))
                    for key in _keys(plain(name))
                }
        self._longest = max(len(key.split()) for key in self._names)

    @functools.cached_property
    def words(self):
        """The Latin words of all phrases and names: those that a `Repair` must know."""
        lists = [
            *self.terms.values(),
            *(rule.get(field, ()) for rule in self.raw for field in ("any", "with", "unless", "except")),
        ]
        phrases = [phrase for phrases in lists for phrase in phrases if phrase[0] not in "$/"] + list(
            self._names
        )
        return {word for phrase in phrases for word in re.findall("[a-z]{2,}", phrase.casefold())}

    def _holds(self, entry):
        """Whether a dated entry of a list holds today."""
        return not (entry.get("until") and entry["until"] < self.today) and not (
            entry.get("since") and entry["since"] > self.today
        )

    def _rule(self, rule):
        where = f"rule {rule.get('id')!r}"
        lists = {
            field: self._expanded(rule.get(field, ()), where) for field in ("any", "with", "unless", "except")
        }
        if rule["category"] not in self.categories:
            raise PolicyError(f"{where}: no category {rule['category']!r}")
        levels = tuple(rule.get("levels", self.levels))
        if strange := set(levels) - set(self.levels):
            raise PolicyError(f"{where}: no levels {sorted(strange)}")
        patterns = {field: _pattern(phrases) if phrases else None for field, phrases in lists.items()}
        return _Rule(
            rule["id"], rule["category"], rule["reason"], patterns["any"], patterns["with"], patterns["unless"],
            patterns["except"], levels,
        )  # fmt: skip

    def _expanded(self, phrases, where):
        out = []
        for phrase in phrases:
            if not str(phrase).startswith("$"):
                out.append(str(phrase))
            elif phrase[1:] in self.terms:
                out += map(str, self.terms[phrase[1:]])
            else:
                raise PolicyError(f"{where}: no terms {phrase!r}")
        return out

    def judge(self, views, level="auto"):
        """The first rule that holds of one of the views of a text, as a `Decision`; None where none does.

        Imitation needs a name alone: "a portrait of Frida and Hayao Miyazaki" is refused too, as what a person looks like and what
        a person draws like cannot be told apart by words so short, and either is theirs."""
        if level not in self.levels:
            raise PolicyError(f"strictness: expected one of {', '.join(self.levels)}; found {level!r}")
        for view in views:
            for rule in self.rules:
                if level in rule.levels and (span := rule.span(view)):
                    return self.decided(rule.category, rule.id, "prompt", span=span, reason=rule.reason)
            if name := self._name(view):
                category, rule, reason = self._names[name]
                return self.decided(category, rule, "prompt", span=name, reason=reason)
        return None

    def unexcepted(self, text):
        """A normalised text without what rules except ("nude lipstick"): it counts against nobody, by any rule or classifier."""
        for rule in self.rules:
            text = rule.exempt.sub(" · ", text) if rule.exempt else text
        return text

    def _name(self, text):
        """The longest name of a list that is in a normalised text, or None."""
        words = _WORDS.findall(_DOTS.sub("", text))
        for n in range(min(self._longest, len(words)), 0, -1):
            for i in range(len(words) - n + 1):
                if (name := " ".join(words[i : i + n])) in self._names:
                    return name
        return None

    def decided(self, category, rule, layer, language="en", **more):
        """The Decision that a layer takes on a category."""
        about = self.categories[category]
        return Decision(
            about["layers"][layer],
            (category,),
            rule,
            layer,
            offer=about.get("offer", {}).get(language),
            **more,
        )


def _checked(found):
    """version, categories and levels of a parsed policy.yaml, which has all that it must."""
    if not isinstance(found, dict) or found.keys() != {
        "version",
        "levels",
        "categories",
        "public_figures",
        "terms",
        "rules",
    }:
        raise PolicyError("expected version, levels, categories, public_figures, terms and rules of a policy")
    for name, each in found["categories"].items():
        where = f"category {name!r}"
        if not _FIELDS <= each.keys() <= _FIELDS | {"offer"}:
            raise PolicyError(f"{where}: expected {sorted(_FIELDS)}, found {sorted(each)}")
        if each["ailuminate"] not in AILUMINATE or set(each["openai"]) - set(OPENAI):
            raise PolicyError(
                f"{where}: no such hazard or moderation category: {each['ailuminate']}, {each['openai']}"
            )
        if each["layers"].keys() != set(LAYERS) or set(each["layers"].values()) - set(ACTIONS):
            raise PolicyError(f"{where}: layers are {LAYERS}, each one of {ACTIONS}; found {each['layers']}")
    tokens = [each["token"] for each in found["categories"].values()]
    if len(set(tokens)) != len(tokens) or not set(tokens) <= set(range(16)):
        raise PolicyError(f"tokens are different numbers from 0 to 15, found {tokens}")
    for rule in found["rules"]:
        if not _RULE <= rule.keys() <= _RULE | {"with", "unless", "except", "levels"}:
            raise PolicyError(
                f"rule {rule.get('id')!r}: expected {sorted(_RULE)} and perhaps more, found {sorted(rule)}"
            )
    ids = [rule["id"] for rule in found["rules"]]
    if len(set(ids)) != len(ids):
        raise PolicyError(f"rules have ids of their own, found {ids}")
    for name, level in found["levels"].items():
        if not 0 < level["probability"] < 1:
            raise PolicyError(
                f"level {name!r}: expected a probability between 0 and 1, found {level['probability']}"
            )
    return found["version"], found["categories"], found["levels"]


def _pattern(phrases):
    """One regular expression for all phrases: between word boundaries, where they begin and end with Latin letters."""
    found = []
    for phrase in phrases:
        if len(phrase) > 1 and phrase.startswith("/") and phrase.endswith("/"):
            found.append(f"(?:{phrase[1:-1]})")
            continue
        phrase = plain(phrase)
        open_end = phrase.endswith("*")
        body = r"[\s\-_]+".join(map(re.escape, re.split(r"[\s\-_]+", phrase.rstrip("*"))))
        latin = lambda c: not re.match(f"[{CJK}]", c)
        before = "(?<![a-z0-9])" if latin(phrase[0]) else ""
        after = ("[a-z]*" if open_end else "(?![a-z0-9])") if latin(phrase.rstrip("*")[-1]) else ""
        found.append(before + body + after)
    # Longer ones first, so that a span says all of a name.
    return re.compile("|".join(sorted(found, key=len, reverse=True)))


def _keys(name):
    """How a normalised name is looked up: its words, Chinese ones character by character."""
    words = _WORDS.findall(_DOTS.sub("", name))
    return {" ".join(words)} if words else set()
