"""What gets installed: the commands, the configs beside them, one version; and the READMEs."""

import importlib
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path

import pytest

import mmgen
from mmgen import __main__ as command_line
from mmgen.runtime import config as configs

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.mark.smoke
@pytest.mark.parametrize("name", command_line.COMMANDS)
def test_every_command_imports_and_has_a_main(name):
    module = importlib.import_module(f"mmgen.commands.{name}")
    assert callable(module.main)


def test_every_command_is_listed():
    files = {path.stem for path in (ROOT / "mmgen/commands").glob("*.py")} - {"__init__", "common"}
    assert files == set(command_line.COMMANDS)


@pytest.mark.smoke
def test_version_is_said_once(capsys):
    assert command_line.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == mmgen.__version__ == PROJECT["version"]


@pytest.mark.smoke
def test_runs_as_a_module_from_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mmgen", "--version"], cwd=tmp_path, capture_output=True, text=True,
        env={"PYTHONPATH": str(Path(mmgen.__file__).parents[1])},
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, mmgen.__version__), done.stderr


def test_unknown_command_names_the_nearest(capsys):
    assert command_line.main(["trian"]) == 2
    assert "'train'" in capsys.readouterr().err


def test_doctor_and_version_start_without_any_dependency():
    """The doctor must be able to say what is missing."""
    code = (
        "import sys\n"
        "for name in ('jax', 'flax', 'ml_collections', 'numpy', 'orbax', 'grain'): sys.modules[name] = None\n"
        "from mmgen.__main__ import main\n"
        "import mmgen.commands.doctor\n"
        "sys.exit(main(['--version']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.smoke
def test_bundled_configs_resolve():
    folder = configs.config_folder()
    assert {"quickstart", "tokenizer", "transformer"} <= {path.stem for path in folder.glob("*.py")}
    assert configs.load("transformer:tiny").name == "transformer:tiny"


def test_a_wheel_carries_every_room_and_the_configs():
    """What setup.py would install, without building: every folder of modules is a package of the wheel."""
    code = (
        "import setuptools, json\n"
        "said = {}\n"
        "setuptools.setup = lambda **options: said.update(options)\n"
        "exec(compile(open('setup.py').read(), 'setup.py', 'exec'))\n"
        "print(json.dumps(said))"
    )
    pytest.importorskip("setuptools")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    said = json.loads(done.stdout)
    rooms = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "mmgen").rglob("*.py")}
    assert set(said["packages"]) == rooms | {"mmgen.configs"}
    assert (ROOT / said["package_dir"]["mmgen.configs"]).samefile(ROOT / "configs")


def test_no_file_is_left_out_of_the_wheel():
    """Files that are not modules (fonts, pages) need a line under [tool.setuptools.package-data]."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text()).get("tool", {}).get("setuptools", {})
    patterns = data.get("package-data", {}).get("mmgen", [])
    carried = {path for pattern in patterns for path in (ROOT / "mmgen").glob(pattern)}
    files = {
        path for path in (ROOT / "mmgen").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert [path for path in files - carried if path.suffix != ".py"] == []


def test_configs_folder_holds_only_modules():
    """package-data does not reach configs/, so what lies there must be Python."""
    assert all(p.suffix == ".py" for p in (ROOT / "configs").iterdir() if p.name != "__pycache__")


def sections(page):
    """What a translation keeps of each section of a page."""
    for section in re.split(r"(?m)^(?=#+ )", page):
        indented, prose = re.findall(r"(?m)^    .*", section), re.sub(r"(?m)^    .*", "", section)
        # Up to a "#" outside of quotes; in a listing of files up to what is said of one.
        lines = [re.match(r"""(?:"[^"]*"|'[^']*'|[^#])*""", line)[0] for line in indented]
        lines = [re.sub(r"(/|\.py)  .*", r"\1", line).rstrip() for line in lines]
        yield {
            "level": re.match("#*", section)[0],
            "commands": [line for line in lines if line],
            "links": Counter(re.findall(r"\]\(([^)]*)\)", prose)),
            "code": Counter(re.findall(r"`[^`]*`", prose)),
            "rows": [(row.count("|"), numbers(row)) for row in re.findall(r"(?m)^\|.*", prose)],
            "numbers": Counter(numbers(section)),
        }


def numbers(words):
    """The numbers in digits, where .5 is 0.5: those in words are the translator's."""
    return [n.lstrip("0") for n in re.findall(r"\d*(?:[.,]\d+)+|\d+", words)]


def test_the_readmes_are_kept_in_step():
    """Each links to the other; but for that, README.zh-CN.md has what README.md has, section by section."""
    english, chinese = ((ROOT / name).read_text("utf-8") for name in ("README.md", "README.zh-CN.md"))
    chinese = chinese.replace("[English](README.md)", "[简体中文](README.zh-CN.md)")
    for here, there in zip(sections(english), sections(chinese), strict=True):
        assert here == there
