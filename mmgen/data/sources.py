"""Sources: anything that yields Documents by index, named on the command line as `kind:where`.

    world:SPLIT       rendered scenes and their captions (mmgen/world); world:SPLIT/TASK has talks about them: edits,
                      questions, dialogues, pages with words ... (mmgen/world/tasks.py)
    tars:GLOB         img2dataset/webdataset shards: key.jpg|jpeg|png|webp, key.txt, key.json
    folder:DIR        images with metadata.jsonl, metadata.csv, or name.txt beside them
    jsonl:GLOB        documents in the native format, one a line; jsonl:sample is a small one of ours
    records:GLOB      ArrayRecord of native documents that carry their images
    tfds:NAME/SPLIT   images with captions or labels, prepared as array_record
    text:GLOB         plain text

docs/sources.md has the layout of each. A source is random-access and never changes:

    len(source); source[i]       Document i, its images at source.size: (width, height) or images.Buckets
    source.alternatives(i, n)    1 to n Documents with the same images and other words; the first is source[i]
    source.pixels(i, which=0)    uint8 [H, W, 3]: image `which`, modulo their number, at the size that it has
    source.count_images(i)       how many images document i has; 0 for a bad one
    source.several_images        whether a document may have more than one
    source.texts(i)              all texts of document i, in every phrasing that is written; reads no image
    source.captions(i, n)        the text of each of alternatives(i, n); reads no image
    source.fields(i)             what the filters see, and what labels are taken from
    source.spec, source.name     what it was opened as, and what to call it
    source.parts                 [(name, start, stop), ...]: the sources it is made of, itself if it is one
    source.skipped               Counter by reason of what was left out
    source.fingerprint           16 hex digits; others where index i may mean something else

It can be pickled, and used by several threads. All that reads a document raises BadImage for a bad one;
`documents_of` skips those and counts them.
"""

import bisect
import collections
import contextlib
import difflib
import functools
import hashlib
import json
import pathlib
import re

import numpy as np

from mmgen import __version__
from mmgen.data import images, readers, tars, tfds_data
from mmgen.data.filters import Filter
from mmgen.data.images import BadImage
from mmgen.data.native import check_turns
from mmgen.document import Document, Image, Refusal, Text, Turn, caption_to_image

KINDS = {
    "world": "world:SPLIT[/TASK]",
    "tars": "tars:GLOB",
    "folder": "folder:DIR",
    "jsonl": "jsonl:GLOB",
    "records": "records:GLOB",
    "tfds": "tfds:NAME/SPLIT",
    "text": "text:GLOB",
}
SAMPLE = pathlib.Path(__file__).parent / "sample" / "documents.jsonl"


class TooManyBad(RuntimeError):
    """More of a source is bad than the run accepts. The message counts the reasons."""


def open_source(
    spec,
    size=(64, 64),
    seed=0,
    *,
    name=None,
    documents=None,
    languages=("en",),
    category=None,
    split=None,
    split_by="key",
    holdout=0.1,
    only=None,
    exclude=None,
    limits=images.Limits(),
    background=(255, 255, 255),
    max_chars=2000,
    data_dir=None,
):
    """Opens the source named `spec`, written `kind:where` or `name=kind:where`; a source without a name is
    called by its kind. Images come at `size`: (width, height) or images.Buckets.

    `documents` keeps the first so many. `split` "train" or "test" takes one side of a stable split, in
    which documents of equal field `split_by` stay together and a share `holdout` of its values is test;
    "key" is the tar's or folder's own key, and elsewhere the field of that name or, without it, the
    contents. `only` and `exclude` map fields to a value or a list of values.
    world: `documents` is its length; `languages` is a list, or a dict of weights, from which each document
    draws one by (seed, i); `category` gives only its kind of scene ("" as None: all). text: at most `max_chars` characters
    a document. tfds: `data_dir` is the folder of its data sets.
    """
    if seed < 0:
        raise ValueError(f"a seed is at least 0, not {seed}")
    given, spec = _name_and_spec(spec)
    kind, _, where = spec.partition(":")
    if kind not in KINDS or not where:
        near = difflib.get_close_matches(kind, KINDS, 1, 0.4)
        hint = f"; did you mean {near[0]}:{where or '...'}?" if near and near[0] != kind else ""
        raise ValueError(f"unknown source {spec!r}: expected one of {', '.join(KINDS.values())}{hint}")
    name = name or given or kind
    size = size if isinstance(size, images.Buckets) else tuple(size)
    keep = Filter(split, split_by, holdout, _lists(only), _lists(exclude))
    if documents is not None and documents < 1:
        raise ValueError(f"{spec}: documents is at least 1, not {documents}")
    if kind == "world":
        if keep.active:
            raise ValueError(f"{spec} has no fields: split, only and exclude do not apply to a world")
        where, slash, task = where.partition("/")
        if slash:
            if category:
                raise ValueError(f"{spec}: a task has scenes of many categories; leave category out")
            return Talks(spec, name, where, size, seed, documents, languages, task)
        return World(spec, name, where, size, seed, documents, languages, category or None)
    if category:
        raise ValueError(f"{spec} has no categories: only a world has")

    skipped = collections.Counter()
    match kind:
        case "tars":
            reader = tars.Tars(where, keep, skipped, limits)
        case "folder":
            reader = readers.Folder(where, keep, skipped, limits)
        case "jsonl":
            reader = readers.Jsonl(str(SAMPLE) if where == "sample" else where, keep, skipped, limits)
        case "records":
            reader = readers.Records(where, keep, skipped, limits)
        case "tfds":
            reader = tfds_data.Tfds(where, keep, skipped, limits, data_dir)
        case "text":
            reader = readers.Text(where, keep, skipped, max_chars)
    if keep.found or len(reader):
        keep.check(spec)
    if not len(reader):
        raise ValueError(
            f"{spec}: no document is left after the filters ({dict(skipped) or 'nothing was skipped'})"
        )
    return Source(spec, name, reader, size, documents, skipped, limits, background, [max_chars, keep.rules()])


def open_with_larger(larger=None, **settings):
    """`open_source` of the settings and, with those of a `larger` one, `Several` of both, at the size of the first."""
    source = open_source(**settings)
    return Several([source, open_source(name="larger", **larger)], alike=False) if larger else source


def _name_and_spec(spec):
    """'photos=tars:x' -> ('photos', 'tars:x'). A name stands before the kind, so a path may have a "="."""
    found = re.fullmatch(r"([\w.-]+)=(\w+:.*)", spec, re.DOTALL)
    return found.groups() if found else (None, spec)


def _lists(rules):
    """{field: value or values} -> {field: values}"""
    rules = rules or {}
    return {
        field: list(value) if isinstance(value, (list, tuple)) else [value] for field, value in rules.items()
    }


def documents_of(source, indices=None, max_bad=0.1):
    """Yields (i, source[i]) for `indices` (default all), skipping bad ones and counting them in
    source.skipped. Raises TooManyBad when of 100 or more a share above `max_bad` is bad, or if all are."""
    bad = Bad(source, max_bad)
    for i in range(len(source)) if indices is None else indices:
        try:
            document = source[i]
        except BadImage as error:
            bad.saw(error)
        else:
            bad.saw()
            yield i, document
    if bad.seen and bad.count == bad.seen:
        raise TooManyBad(bad.report())


class Bad:
    """Counts the bad documents of a source, and gives up when they are too many."""

    def __init__(self, source, max_bad=0.1, patience=100):
        self.source, self.max_bad, self.patience = source, max_bad, patience
        self.seen = self.count = 0
        self.first = None

    def saw(self, error=None):
        """Counts one document, bad if there is an error. Raises TooManyBad."""
        self.seen += 1
        if error:
            self.count += 1
            self.first = self.first or error
            self.source.skipped[error.reason] += 1
        if self.seen >= self.patience and self.count > self.max_bad * self.seen:
            raise TooManyBad(self.report())

    def report(self):
        reasons = ", ".join(f"{reason} {n}" for reason, n in self.source.skipped.most_common())
        return (
            f"gave up on {self.source.spec}: {self.count} of {self.seen} documents are bad, more than the "
            f"accepted {self.max_bad:.0%} ({reasons}); the first: {self.first}. "
            "Repair the source or raise max_bad"
        )


def texts(source, limit=None, max_bad=0.1):
    """Yields the texts of the first `limit` documents of a source, without reading images. Bad documents are
    counted as `documents_of` counts them."""
    bad = Bad(source, max_bad)
    for i in range(min(len(source), limit or len(source))):
        try:
            found = source.texts(i)
        except BadImage as error:
            bad.saw(error)
        else:
            bad.saw()
            yield from found


class Source:
    """Documents made of what a reader reads: see mmgen/data/readers.py."""

    def __init__(self, spec, name, reader, size, documents, skipped, limits, background, options):
        self.spec, self.name, self.reader, self.size, self.skipped = spec, name, reader, size, skipped
        self.limits, self.background = limits, background
        self.documents = min(len(reader), documents or len(reader))
        self.parts = [(name, 0, len(self))]
        kind = spec.partition(":")[0]
        self.several_images = kind in ("jsonl", "records")
        self.fingerprint = _fingerprint(kind, reader.identity, len(self), size, limits, background, options)

    def __len__(self):
        return self.documents

    def __getitem__(self, i):
        return self.alternatives(i, 1)[0]

    def alternatives(self, i, n):
        with self._document(i):
            turns, read = self.reader.document(i)
            turns = check_turns(turns)
            references = dict.fromkeys(
                value for _, parts in turns for kind, value in parts if kind == "image"
            )  # each is decoded once
            pictures = {ref: Image(self._pixels(ref, read, self.size)) for ref in references}

        def part(kind, value, k):
            return pictures[value] if kind == "image" else Text(value[k % len(value)])

        return [
            Document([Turn(role, [part(*known, k) for known in parts]) for role, parts in turns])
            for k in range(min(n, _phrasings(turns)))
        ]

    def captions(self, i, n):
        with self._document(i):
            turns = check_turns(self.reader.document(i)[0])
        written = [words for _, parts in turns for kind, words in parts if kind == "text"]
        return [
            "\n".join(words[k % len(words)] for words in written) for k in range(min(n, _phrasings(turns)))
        ]

    def pixels(self, i, which=0):
        with self._document(i):
            references, read = self.reader.images(i)
            if not references:
                raise BadImage("no_image", "the document has none")
            return self._pixels(references[which % len(references)], read)

    def count_images(self, i):
        try:
            return len(self.reader.images(i)[0])
        except BadImage:
            return 0

    def texts(self, i):
        with self._document(i):
            turns = check_turns(self.reader.document(i)[0])
        return [text for _, parts in turns for kind, words in parts if kind == "text" for text in words]

    def fields(self, i):
        with self._document(i):
            return self.reader.fields(i)

    def _pixels(self, reference, read, size=None):
        return images.read(read(reference), self.limits, self.background, size)

    @contextlib.contextmanager
    def _document(self, i):
        """Says in a BadImage which document it is about."""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)} in {self.spec}")
        try:
            yield
        except BadImage as error:
            reason = error.reason
            detail = str(error).removeprefix(reason).removeprefix(": ")
            raise BadImage(reason, f"{self.reader.where(i)}: {detail}") from error


class World:
    """Document i of a split of the world: a prompt by the user, its picture by the assistant."""

    KIND, several_images = "world", False

    def __init__(self, spec, name, split, size, seed, documents, languages, category):
        if not documents:
            raise ValueError(f"{spec} has no end: say how many documents to take from it, documents=N")
        weights = dict(languages) if hasattr(languages, "items") else dict.fromkeys(languages, 1.0)
        self.spec, self.name, self.size, self.documents = spec, name, size, documents
        self.split, self.seed, self.category = split, seed, category
        self.languages = tuple(weights.items())
        self.skipped = collections.Counter()
        self.parts = [(name, 0, documents)]
        options = [split, seed, self.languages, category, documents, size, __version__]
        self.fingerprint = _fingerprint(self.KIND, options)

    def __len__(self):
        return self.documents

    def __getitem__(self, i):
        return caption_to_image(self.item(i).prompt, Image(self.pixels(i)))

    def item(self, i):
        """The world's Item i: prompt, claim and scene, in the language drawn for (seed, i)."""
        if not 0 <= i < self.documents:
            raise IndexError(f"document {i} of {self.documents} in {self.spec}")
        return _world_item(self.seed, self.split, int(i), self.category, self.languages)

    def language(self, i):
        """The language of document i."""
        return _language(self.seed, int(i), self.languages)

    def alternatives(self, i, n):
        image = Image(self.pixels(i))
        return [caption_to_image(prompt, image) for prompt in self.captions(i, n)]

    def captions(self, i, n):
        from mmgen import world

        first = self.item(i)
        language = self.language(i)
        streams = [[self.seed, world.SPLITS.index(self.split), i, k] for k in range(1, n)]
        others = [world.say(first.claim, language, np.random.default_rng(stream)) for stream in streams]
        return list(dict.fromkeys([first.prompt, *others]))

    def altered(self, i, n, draw=0):
        """n captions of document i of which each has one attribute wrong, in its language; `draw` gives others."""
        from mmgen import world
        from mmgen.world.scene import alter

        item, rng = self.item(i), np.random.default_rng([self.seed, i, 3, draw])
        claims = [alter(rng, item.claim, item.scene) for _ in range(n)]
        return [world.say(claim, self.language(i), rng) for claim in claims]

    def pixels(self, i, which=0):
        return self._render(i, self.shown(i, which))

    def shown(self, i, which=0):
        """What `pixels` shows: a Scene or a page of the world."""
        return self.item(i).scene

    def count_images(self, i):
        return 1

    def texts(self, i):
        return [self.item(i).prompt]

    def fields(self, i):
        """Of what is seen: `shapes`, `colors` and `sizes` without repeats, in the order of the scene, `count`,
        `background`; and the item's `category`."""
        item = self.item(i)
        seen = lambda what: list(dict.fromkeys(getattr(thing, what) for thing in item.scene.objects))
        return {
            "shapes": seen("shape"), "colors": seen("color"), "sizes": seen("size"),
            "count": len(item.scene.objects), "background": item.scene.background, "category": item.category,
        }  # fmt: skip

    def recolored(self, i):
        """The picture of document i with other colours, drawn from (seed, i)."""
        from mmgen.world import recolor

        return self._render(i, recolor(np.random.default_rng([self.seed, i, 1]), self.item(i).scene))

    def _render(self, i, scene):
        """At self.size; of Buckets, at a shape drawn from (seed, i)."""
        from mmgen.world import tasks

        return tasks.picture(scene, *self._size(i))

    def _size(self, i):
        """(width, height) of document i's pictures."""
        if not isinstance(self.size, images.Buckets):
            return self.size
        shapes = self.size.shapes
        return shapes[np.random.default_rng([self.seed, i, 2]).integers(len(shapes))]


class Talks(World):
    """Document i of a split of the world: a talk about pictures, of one of the tasks of mmgen/world/tasks.py; of several,
    written a+b, they take turns."""

    KIND, several_images = "talks", True

    def __init__(self, spec, name, split, size, seed, documents, languages, category):
        from mmgen.world import tasks

        super().__init__(spec, name, split, size, seed, documents, languages, category)
        for shape in size.shapes if isinstance(size, images.Buckets) else [size]:
            for task in category.split("+"):
                tasks.check(task, shape)

    def __getitem__(self, i):
        shown = iter(self._render(i, scene) for scene in self._scenes(i))
        told = lambda part: Text(part) if isinstance(part, str) else part
        part = lambda part: told(part) if isinstance(part, (str, Refusal)) else Image(next(shown))
        turns = []
        talk = self.item(i)
        if talk.page:
            return Document([Turn("page", [part(p) for turn in talk.turns for p in turn.says])])
        for turn in talk.turns:
            turns.append(Turn("user", [part(p) for p in turn.asks]))
            turns.append(Turn("assistant", [part(p) for p in turn.says]))
        return Document(turns)

    def item(self, i):
        """The world's Talk i, in the language drawn for (seed, i)."""
        if not 0 <= i < self.documents:
            raise IndexError(f"document {i} of {self.documents} in {self.spec}")
        tasks = self.category.split("+")
        return _world_talk(
            self.seed, self.split, int(i), tasks[i % len(tasks)], self.language(i), self._size(i)
        )

    def _scenes(self, i):
        from mmgen.world import tasks

        return tasks.scenes(self.item(i))

    def alternatives(self, i, n):
        return [self[i]]

    def captions(self, i, n):
        return ["\n".join(self.texts(i))]

    def altered(self, i, n, draw=0):
        raise ValueError(
            f"{self.spec}: a talk has no captions that could be altered; open world:{self.split}"
        )

    def shown(self, i, which=0):
        scenes = self._scenes(i)
        return scenes[which % len(scenes)]

    def count_images(self, i):
        return len(self._scenes(i))

    def texts(self, i):
        return [part for t in self.item(i).turns for part in (*t.asks, *t.says) if isinstance(part, str)]

    def fields(self, i):
        """Of what is asked: `task`, `turns`, and the `kinds` of its edits and questions. Of what is seen in any picture:
        `person`, the youngest ("none", "adult" or "child"), and `symbol`, whether there is one ("no" or "yes")."""
        from mmgen.world.scene import SYMBOLS

        talk = self.item(i)
        kinds = [turn.task.kind for turn in talk.turns if hasattr(turn.task, "kind")]
        seen = {thing.shape for scene in self._scenes(i) for thing in getattr(scene, "objects", ())}
        return {
            "task": talk.category, "turns": len(talk.turns), "kinds": kinds,
            "person": "child" if "child" in seen else "adult" if "adult" in seen else "none",
            "symbol": "yes" if seen & set(SYMBOLS) else "no",
        }  # fmt: skip

    def recolored(self, i):
        from mmgen.world import recolor
        from mmgen.world.scene import Scene

        shown = self.shown(i)
        if isinstance(shown, Scene):  # a page's colours are part of what it says
            shown = recolor(np.random.default_rng([self.seed, i, 1]), shown)
        return self._render(i, shown)


def _language(seed, i, languages):
    """The language that (seed, i) draws from ((name, weight), ...)."""
    names, weights = zip(*languages)
    return names[
        np.random.default_rng([seed, i]).choice(len(names), p=np.array(weights, float) / sum(weights))
    ]


@functools.lru_cache(256)  # a picture, its caption and its colours want the same
def _world_item(seed, split, i, category, languages):
    """Item i: what a World keeps must not be in it, or it could not be pickled."""
    from mmgen import world

    return world.item(seed, split, i, category, language=_language(seed, i, languages))


@functools.lru_cache(64)
def _world_talk(seed, split, i, task, language, size):
    from mmgen.world import tasks

    return tasks.talk(seed, split, i, task, language, size=size)


class Several:
    """Sources one after the other. Each has its name, and `parts` says where it begins and ends."""

    def __init__(self, sources, alike=True):
        """`alike`: ValueError where their pictures differ in size; else `size` is that of the first, and `size_of` tells."""
        self.sources = list(sources)
        if not self.sources:
            raise ValueError("Several needs one source at least")
        names = [name for source in self.sources for name, _, _ in source.parts]
        twice = [name for name, count in collections.Counter(names).items() if count > 1]
        if twice:
            raise ValueError(
                f"two sources are called {twice[0]!r}: name them, as in photos={self.sources[-1].spec} "
                "(name= in open_source)"
            )
        if alike and any(source.size != self.sources[0].size for source in self.sources):
            raise ValueError(
                f"sources differ in size: {[source.size for source in self.sources]}; open them alike"
            )
        self.spec = " ".join(f"{source.name}={source.spec}" for source in self.sources)
        self.name, self.size = "+".join(names), self.sources[0].size
        self.several_images = any(source.several_images for source in self.sources)
        self.stops = np.cumsum([len(source) for source in self.sources]).tolist()
        self.starts = [0, *self.stops[:-1]]
        self.parts = [
            (name, start + base, stop + base)
            for base, source in zip(self.starts, self.sources)
            for name, start, stop in source.parts
        ]
        self.skipped = sum((source.skipped for source in self.sources), collections.Counter())
        self.fingerprint = _fingerprint([(source.name, source.fingerprint) for source in self.sources])

    def __len__(self):
        return self.stops[-1]

    def __getitem__(self, i):
        source, i = self._find(i)
        return source[i]

    def alternatives(self, i, n):
        source, i = self._find(i)
        return source.alternatives(i, n)

    def pixels(self, i, which=0):
        source, i = self._find(i)
        return source.pixels(i, which)

    def count_images(self, i):
        source, i = self._find(i)
        return source.count_images(i)

    def texts(self, i):
        source, i = self._find(i)
        return source.texts(i)

    def captions(self, i, n):
        source, i = self._find(i)
        return source.captions(i, n)

    def fields(self, i):
        source, i = self._find(i)
        return source.fields(i)

    def recolored(self, i):
        source, i = self._find(i)
        return source.recolored(i)

    def size_of(self, i):
        """The size of the source that has document i."""
        return self._find(i)[0].size

    def _find(self, i):
        """-> (source, index in it)"""
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)} in {self.spec}")
        number = bisect.bisect_right(self.stops, i)
        return self.sources[number], i - self.starts[number]


def _phrasings(turns):
    """In how many ways checked turns are written: as the text with the most."""
    return max([len(words) for _, parts in turns for kind, words in parts if kind == "text"], default=1)


def _fingerprint(*parts):
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()[:16]
