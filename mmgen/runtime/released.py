"""Where the model that comes with mmgen lies, which is called `reference`."""

from pathlib import Path

import mmgen


def model_folder(name):
    """The folder of a model: a workdir, or that of the model that comes with mmgen, by its name `reference`."""
    own = Path(mmgen.__file__).parent / "reference"
    return str(own) if name == "reference" and not Path(name).exists() and own.exists() else name


def part_of(part):
    """name -> where a part of a model lies: as the name says, or the part of the model that comes with mmgen, by its
    name `reference`."""

    def place(name):
        folder = model_folder(name)
        return f"{folder}/{part}" if folder != name else name

    return place


towers_folder = part_of("towers")
