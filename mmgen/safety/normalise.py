"""What a text says beneath the ways in which it may be written: a ladder of normalisations, for matching alone.

`plain` undoes what Unicode offers (compatibility forms, letters of other scripts that look alike, marks, invisible and turning
characters, traditional Chinese); `Repair` what typists do (digits for letters, separated and repeated letters), word by word and only where
a known word comes out of an unknown one, so that no word is found across two others.
"""

import functools
import itertools
import json
import re
import unicodedata
from importlib.resources import files

import opencc

LATIN, CJK = "a-z", "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_LEET = {
    "0": "o", "1": "il", "3": "e", "4": "a", "5": "s", "6": "g", "7": "t", "8": "b", "9": "g", "@": "a", "$": "s", "!": "i",
    "|": "il", "+": "t", "€": "e", "£": "l",
}  # fmt: skip
_SIGNS = re.escape("".join(_LEET))
_BETWEEN = r"\s.\-_*+|~/\\·•'`^=#,"  # what is put between the letters of a word
# Three or more letters that stand alone, with one kind of sign between them.
_SPELLED = re.compile(rf"(?<![a-z0-9])[a-z0-9@$!](?:[{_BETWEEN}]{{1,3}}[a-z0-9@$!](?![a-z0-9])){{2,}}")
_PIECES = re.compile(rf"[a-z0-9{_SIGNS}]+(?:[.\-_*~/\\·•'`^=#][a-z0-9{_SIGNS}]+)*")
_APART = re.compile(rf"(?<=[{CJK}])[{_BETWEEN}]+(?=[{CJK}])")
_TURNED = re.compile("\u202e([^\u202c\u202d\u202a\u202b\u2066-\u2069\n]*)[\u202c\u2069]?")


@functools.cache
def _alike():
    """{ordinal: Latin letters} of the letters that look like Latin ones, of Unicode's own table of confusables."""
    table = json.loads(files("confusable_homoglyphs").joinpath("confusables.json").read_text("utf-8"))
    found = {}
    for letter, others in table.items():
        to = [each["c"].casefold() for each in others if re.fullmatch("[A-Za-z]{1,2}", each["c"])]
        if len(letter) == 1 and ord(letter) > 127 and to and unicodedata.category(letter)[0] == "L":
            found[ord(letter)] = to[0]
    return found


@functools.cache
def _simplified():
    return opencc.OpenCC("t2s")


def plain(text):
    """Lower case, compatibility forms unfolded, without marks and what is not seen, Latin letters where they look so,
    simplified characters, single spaces."""
    text = _TURNED.sub(lambda found: found[1][::-1], text)  # in the order in which it is read
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
        text = "".join(
            c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) not in ("Mn", "Me", "Cf")
        )
        text = unicodedata.normalize("NFC", text).translate(_alike()).casefold()
        text = text.translate(
            _alike()
        )  # again: a large letter may look like another one than its small one does
        if re.search(f"[{CJK}]", text):
            text = _simplified().convert(text)
        # Pictures and other signs stand between words.
        text = "".join("·" if unicodedata.category(c) in ("So", "Sk", "Co", "Cn") else c for c in text)
    return re.sub(r"[^\S\n]{2,}", "  ", text.casefold()).strip()


class Repair:
    """`repair(plain text)` -> the text with words of `words` where they were disguised."""

    def __init__(self, words):
        self.words = frozenset(words)
        self.longest = max(map(len, self.words), default=0)

    def __call__(self, text):
        text = _APART.sub("", text)
        text = _SPELLED.sub(self._spelled, text)
        return (
            re.sub(r"\s+", " ", _PIECES.sub(lambda found: self._token(found[0]), text))
            .replace("·", " ")
            .strip()
        )

    def _spelled(self, found):
        """A word, or several where wider gaps part them, that was written letter by letter."""
        text = found[0]
        if re.search(r"\S(?:\s|[^\w\s]){1}\S", text) and "  " in text:
            groups = re.split(r"\s{2,}", text)
        else:
            groups = [text]
        joined = (re.sub(rf"[{_BETWEEN.replace('+', '').replace('|', '')}]", "", group) for group in groups)
        words = [self._known(group) for group in joined]
        # Initials, sizes and lists of letters stay as they are.
        return " ".join(words) if all(words) else text

    def _token(self, token):
        if token in self.words or token.isdigit():
            return token
        parts = re.split(r"[.\-_*~/\\·•'`^=#]", token)
        if len(parts) > 1:
            if all(part in self.words or part.isdigit() or not part for part in parts):
                return token
            joined = self._word("".join(parts))
            return (
                joined
                if joined
                else re.sub(rf"[a-z0-9{_SIGNS}]+", lambda found: self._word(found[0]) or found[0], token)
            )
        return self._word(token) or token

    def _known(self, joined):
        """Known words that letters without gaps are, or None."""
        return self._word(joined) or self._split(joined)

    def _word(self, token):
        """The known word that a token is in disguise, or None."""
        if token in self.words:
            return token
        runs = [(c, len(list(run))) for c, run in itertools.groupby(token)]
        repeated = max((n for _, n in runs), default=0) > 2 or sum(n > 1 for _, n in runs) > 1
        forms = [token]
        if repeated:
            forms += ["".join(c for c, _ in runs), "".join(c * min(n, 2) for c, n in runs)]
        for form in forms:
            letters = [_LEET.get(c, c) for c in form]
            if any(c.isalpha() for c in form):
                spare = sum(len(options) > 1 for options in letters)
                for each in itertools.product(*letters) if spare <= 4 else ():
                    if (word := "".join(each)) in self.words:
                        return word
            # With runs taken for one letter after the digits are letters.
            if repeated and any(c.isalpha() for c in form):
                word = "".join(c for c, _ in itertools.groupby("".join(options[0] for options in letters)))
                if word in self.words:
                    return word
        return None

    def _split(self, text, most=160):
        """`text` as the fewest known words, with spaces, or None."""
        text = "".join(_LEET.get(c, c)[0] if not c.isalpha() else c for c in text)
        if len(text) > most:
            return None
        best = [(0, "")] + [None] * len(text)
        for end in range(1, len(text) + 1):
            for start in range(max(0, end - self.longest), end):
                word = text[start:end]
                if best[start] and word in self.words and (len(word) > 1 or word in ("a", "i")):
                    found = best[start][0] + 1, f"{best[start][1]} {word}".strip()
                    best[end] = min(best[end], found, key=lambda each: each[0]) if best[end] else found
        return best[len(text)] and best[len(text)][1]
