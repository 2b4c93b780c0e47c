"""TFDS data sets as a reader (see readers.py), from their files and without TensorFlow."""

import os

import numpy as np

from mmgen.data.images import BadImage
from mmgen.data.native import captioned, captions


class Tfds:
    """A TFDS data set of images with captions or labels, prepared in ArrayRecord; no TensorFlow is loaded.

    The image is the feature `image`, or the only one of its kind. The words are the text features caption,
    captions or text, or the only text; or the name of the class `label`, or of the only class. Features
    of one number or text are fields, classes by their names.
    """

    def __init__(self, where, keep, skipped, limits, data_dir):
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core.read_only_builder import builder_from_files

        self.limits, self.spec = limits, f"tfds:{where}"
        name, _, split = where.rpartition("/")
        if not name:
            raise ValueError(f"{self.spec}: expected tfds:NAME/SPLIT, as in tfds:mnist/train")
        try:
            # From its files alone: the code of many a data set asks for TensorFlow.
            builder = builder_from_files(
                name, **({"data_dir": os.path.expanduser(data_dir)} if data_dir else {})
            )
            features = builder.info.features
            of = lambda kind: [key for key, value in features.items() if isinstance(value, kind)]
            self.image = _one(of(tfds.features.Image), ("image",), f"{self.spec}: image")
            # Bytes, not pixels: our own safe reader decodes them.
            decoders = {self.image: tfds.decode.SkipDecoding()}
            self.data = builder.as_data_source(split, decoders=decoders)
        except (tfds.core.DatasetNotFoundError, NotImplementedError, ImportError) as error:
            raise FileNotFoundError(
                f"{self.spec} is not prepared as array_record in {data_dir or 'the default folder of TFDS'} "
                f"({str(error).splitlines()[0]}). Where TensorFlow is installed, run `tfds build {name} "
                "--file_format=array_record`, then name the folder that it wrote with --data-dir (data_dir=)"
            ) from error
        self.classes = {key: features[key].int2str for key in of(tfds.features.ClassLabel)}
        texts = of(tfds.features.Text)
        lists = [key for key in ("captions",) if key in features and key not in texts]
        if texts or lists:
            self.words = _one([*texts, *lists], ("caption", "captions", "text"), f"{self.spec}: text")
        else:
            self.words = _one(list(self.classes), ("label",), f"{self.spec}: text or class")
        shards = builder.info.splits[split].file_instructions
        self.identity = [(os.path.basename(part.filename), part.skip, part.take) for part in shards]
        self.identity += [builder.info.full_name, split]
        self.kept = None
        if keep.active:
            kept = [i for i in range(len(self.data)) if self._kept(i, keep, skipped)]
            self.kept = np.array(kept, np.int64)

    def _kept(self, i, keep, skipped):
        try:
            return keep.keeps(str(i), self._fields(self._read(i)))
        except BadImage as error:
            skipped[error.reason] += 1
            return False

    def _read(self, number):
        try:
            return self.data[number]
        except Exception as error:  # by what is damaged: the file, the protocol buffer, a feature
            raise BadImage("bad_record", str(error)) from error

    def _number(self, i):
        return int(i if self.kept is None else self.kept[i])

    def __len__(self):
        return len(self.data) if self.kept is None else len(self.kept)

    def document(self, i):
        example = self._read(self._number(i))
        if self.words in self.classes:
            name = self._fields(example)[self.words]
            texts = [name.replace("_", " ")] if name else []
        else:
            texts = example[self.words]
            texts = texts.get("text", ()) if isinstance(texts, dict) else texts
            try:
                texts = [text.decode() for text in ([texts] if isinstance(texts, bytes) else texts)]
            except (UnicodeDecodeError, AttributeError) as error:
                raise BadImage("bad_caption", str(error)) from error
        return captioned(captions(None, {"captions": texts}), 0), lambda _: self._bytes(example)

    def images(self, i):
        example = self._read(self._number(i))
        return [0], lambda _: self._bytes(example)

    def _bytes(self, example):
        data = example[self.image]
        if not isinstance(data, bytes):
            raise BadImage("bad_record", f"expected bytes of an image, found {type(data).__name__}")
        return data

    def fields(self, i):
        return self._fields(self._read(self._number(i)))

    def _fields(self, example):
        fields = {}
        for key, value in example.items():
            if key in self.classes:
                fields[key] = self.classes[key](int(value)) if value >= 0 else None  # -1: it has no label
            elif isinstance(value, bytes) and key != self.image:
                fields[key] = value.decode(errors="replace")
            elif isinstance(value, (np.generic, int, float)):
                fields[key] = value.item() if isinstance(value, np.generic) else value
        return fields

    def where(self, i):
        return f"{self.spec} {self._number(i)}"


def _one(found, preferred, what):
    """The first of `preferred` that was found, or the only one that was."""
    for key in preferred:
        if key in found:
            return key
    if len(found) != 1:
        raise ValueError(
            f"{what}: expected a feature named {' or '.join(preferred)}, or one only; found {found}"
        )
    return found[0]
