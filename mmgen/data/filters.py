"""Filters: which documents of a source to take, by what is said of them."""

import dataclasses
import hashlib

from mmgen.data.images import BadImage


@dataclasses.dataclass(frozen=True)
class Filter:
    """Which documents of a source to take, by their key and their fields: see `sources.open_source`."""

    split: str | None = None
    split_by: str = "key"
    holdout: float = 0.1
    only: dict = dataclasses.field(default_factory=dict)
    exclude: dict = dataclasses.field(default_factory=dict)
    found: set = dataclasses.field(default_factory=set, compare=False)  # the fields that any document had

    def __post_init__(self):
        if self.split not in (None, "train", "test"):
            raise ValueError(f'split is "train", "test" or None (everything), not {self.split!r}')
        if not 0 <= self.holdout <= 1:
            raise ValueError(f"holdout is the share of the test side, from 0 to 1, not {self.holdout}")

    @property
    def active(self):
        return self.needs_fields or self.split is not None

    @property
    def needs_fields(self):
        return bool(self.only or self.exclude or (self.split and self.split_by != "key"))

    def rules(self):
        return [self.split, self.split_by, self.holdout, self.only, self.exclude] if self.active else []

    def keeps(self, key, fields):
        self.found.update(fields)
        if any(fields.get(field) not in allowed for field, allowed in self.only.items()):
            return False
        if any(fields.get(field) in refused for field, refused in self.exclude.items()):
            return False
        if self.split is None:
            return True
        if self.split_by != "key" and self.split_by not in fields:
            raise BadImage(f"no_{self.split_by}", f"{key} has no {self.split_by!r} to split by")
        value = key if self.split_by == "key" else fields[self.split_by]
        return held_out(value, self.holdout) == (self.split == "test")

    def check(self, spec):
        """Raises ValueError if a field was asked for that no document has: a filter must not do nothing."""
        for field in (*self.only, *self.exclude):
            if field not in self.found:
                known = ", ".join(sorted(map(str, self.found))) or "none at all"
                raise ValueError(f"{spec}: no document has a field {field!r}; the fields are: {known}")


def held_out(value, share):
    """Whether a value belongs to the test side: a hash, so it never changes as a data set grows."""
    data = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
    digest = hashlib.sha256(data).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
