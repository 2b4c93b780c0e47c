"""The order of the rooms (docs/design.md): each imports only from those above it."""

import ast
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_python

ROOMS = (
    "root",
    "runtime",
    "world",
    "data",
    "models",
    "sampling",
    "stages",
    "safety",
    "evals",
    "serving",
    "commands",
)
LEAVES = {"mmgen.document", "mmgen.grammar", "mmgen.text", "mmgen"}  # the first room: single files
ENTRY = Path("__main__.py")  # the door: it may enter every room
FILES = sorted(path.relative_to(ROOT / "mmgen") for path in (ROOT / "mmgen").rglob("*.py"))


def imported(path):
    """The dotted names that a file imports, `from a import b` as a.b, wherever in it they stand."""
    for node in ast.walk(ast.parse((ROOT / "mmgen" / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} imports relatively; write mmgen.room.module"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room_of(name):
    """The room of a dotted name of ours: "runtime" of mmgen.runtime.mesh.spec."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in ROOMS else "root"


def test_every_folder_is_a_room():
    folders = {path.parts[0] for path in FILES if len(path.parts) > 1}
    assert folders <= set(ROOMS), "a new room needs its place in docs/design.md and here"
    assert folders >= {"runtime", "world", "data", "models", "sampling", "stages", "evals", "commands"}


@pytest.mark.parametrize("path", [path for path in FILES if path != ENTRY], ids=str)
def test_rooms_import_only_from_above(path):
    mine = ROOMS.index(path.parts[0] if len(path.parts) > 1 else "root")
    for name in imported(path):
        if name.split(".")[0] == "mmgen":
            room = room_of(name)
            assert room != "root" or any(name == leaf or name.startswith(f"{leaf}.") for leaf in LEAVES), name
            assert ROOMS.index(room) <= mine, f"{path} imports {name}, from a room below it"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_other_framework_and_no_global_flags(path):
    for name in imported(path):
        assert name.split(".")[0] not in ("tensorflow", "torch", "clu"), name
        if path != Path("data/loader.py"):  # which tells grain that there are none
            assert not name.startswith("absl.flags"), "flags are defined by a command's argparse"


def test_commands_do_not_call_commands():
    for path in FILES:
        for name in imported(path):
            if path != ENTRY and name.startswith("mmgen.commands."):
                assert name.split(".")[2] == "common", f"{path} imports {name}"


@pytest.mark.smoke
def test_the_road_loads_no_other_framework():
    code = """
import sys
import mmgen.commands.train, mmgen.commands.sample, mmgen.stages.loop, mmgen.stages.transformer
import mmgen.stages.tokenizer, mmgen.sampling.sampler, mmgen.data.sources
print(sorted({name.split(".")[0] for name in sys.modules} & {"tensorflow", "torch", "clu"}))
"""
    assert run_python(code).stdout.strip() == "[]"


def test_help_needs_no_jax():
    code = "import sys; from mmgen.__main__ import main; main(['--help']); sys.exit('jax' in sys.modules)"
    assert "quickstart" in run_python(code).stdout
