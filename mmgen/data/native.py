"""The native format: documents as JSON objects, whatever holds them.

    {"turns": [{"role": "user", "parts": [{"image": "cat.png"}, {"text": "make it red"}]}, ...], ...}

A text may be a list of phrasings of the same. An image is a reference, which the reader of the file knows
how to follow. All keys but "turns" are fields, for the filters. docs/sources.md says it for writers.
"""

import json

from mmgen.data.images import BadImage
from mmgen.document import ROLES


def parse(data):
    """Bytes of a JSON object -> dict. Raises BadImage("bad_json")."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadImage("bad_json", str(error)) from error
    if not isinstance(found, dict):
        raise BadImage("bad_json", f"expected an object, found {type(found).__name__}")
    return found


def fields_of(record):
    """What the filters see of a native document: all but its turns."""
    return {name: value for name, value in record.items() if name != "turns"}


def check_turns(turns):
    """Native turns -> [(role, [(kind, value), ...]), ...]: kind "text" with a list of phrasings, or "image"
    with the reference. Raises BadImage: bad_turns, bad_role, bad_part, no_text, bad_text."""
    if not isinstance(turns, list) or not turns:
        raise BadImage("bad_turns", f'"turns" is a list of one or more, not {short(turns)}')
    turns = [_check_turn(turn) for turn in turns]
    if not any(parts for _, parts in turns):
        raise BadImage("bad_turns", "no turn has a part")
    return turns


def _check_turn(turn):
    if not isinstance(turn, dict) or turn.keys() != {"role", "parts"} or not isinstance(turn["parts"], list):
        raise BadImage("bad_turns", f'a turn is {{"role": ..., "parts": [...]}}, not {short(turn)}')
    if turn["role"] not in ROLES:
        raise BadImage("bad_role", f"expected one of {', '.join(ROLES)}, not {short(turn['role'])}")
    return turn["role"], [_check_part(part) for part in turn["parts"]]


def _check_part(part):
    if not isinstance(part, dict) or len(part) != 1 or not part.keys() <= {"text", "image"}:
        raise BadImage("bad_part", f'a part is {{"text": ...}} or {{"image": ...}}, not {short(part)}')
    ((kind, value),) = part.items()
    if kind == "image":
        if isinstance(value, bool) or not isinstance(value, (str, int)):
            raise BadImage("bad_part", f"an image is a path or a number, not {short(value)}")
        return kind, value
    texts = value if isinstance(value, list) else [value]
    if not texts or "" in texts:
        raise BadImage("no_text", "a text part is empty")
    for text in texts:
        if not isinstance(text, str):
            raise BadImage("bad_text", f"a text is a string or a list of strings, not {short(value)}")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can spell
            raise BadImage("bad_text", str(error)) from error
    return kind, texts


def references(turns):
    """The image references of native turns, in order."""
    return [value for _, parts in check_turns(turns) for kind, value in parts if kind == "image"]


def captioned(texts, image):
    """Native turns of an image and its caption, given in one or more phrasings: asked for, then drawn."""
    return [{"role": "user", "parts": [{"text": texts}]}, {"role": "assistant", "parts": [{"image": image}]}]


def captions(first, fields):
    """The phrasings of a caption: `first` (or the field caption, or text), then those of the field captions.

    Raises BadImage: no_caption, bad_caption.
    """
    texts = [first if first is not None else fields.get("caption") or fields.get("text")]
    others = fields.get("captions") or []
    if not isinstance(others, list) or not all(isinstance(text, str) for text in others):
        raise BadImage("bad_caption", f"captions is a list of strings, not {short(others)}")
    texts = [text.strip() for text in (*texts, *others) if isinstance(text, str)]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise BadImage("bad_caption", str(error)) from error
    texts = list(dict.fromkeys(filter(None, texts)))
    if not texts:
        raise BadImage("no_caption", "there is none, or an empty one")
    return texts


def short(value):
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
