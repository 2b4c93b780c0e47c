"""Configs: `name:variant` or `path.py:variant`, plus `--config.a.b=value` overrides."""

import ast
import difflib
import importlib.util
from pathlib import Path

import ml_collections


class ConfigError(ValueError):
    """A config, a variant or an override that does not exist or does not fit."""


def nearest(word, known):
    """', did you mean ...' for the names in `known` nearest to `word`, or what is known."""
    close = difflib.get_close_matches(str(word), list(map(str, known)), n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"known: {', '.join(sorted(map(str, known)))}"


def config_folder():
    """The folder of bundled configs: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "configs", package.parent / "configs"):
        if folder.is_dir():
            return folder
    raise ConfigError(f"no configs folder in {package} or beside it; reinstall mmgen")


def load(spec, overrides=()):
    """Resolves `transformer:quickstart` (or a path) to a ConfigDict and applies 'a.b=value' texts."""
    name, _, variant = spec.partition(":")
    path = Path(name) if name.endswith(".py") else config_folder() / f"{name}.py"
    if not path.is_file():
        known = [p.stem for p in config_folder().glob("*.py")]
        raise ConfigError(f"no config {name!r} ({path} does not exist); {nearest(name, known)}")
    module_spec = importlib.util.spec_from_file_location(f"mmgen_config_{path.stem}", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    variant = variant or module.VARIANTS[0]
    if variant not in module.VARIANTS:
        raise ConfigError(f"config {name!r} has no variant {variant!r}; {nearest(variant, module.VARIANTS)}")
    config = module.get_config(variant)
    config.name = f"{path.stem}:{variant}"
    for text in overrides:
        override(config, *text.split("=", 1))
    return config.lock()


def overrides(parser, arguments):
    """The 'a.b=value' texts of `--config.a.b=value` (or `--config.a.b value`) arguments."""
    texts, rest = [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--config."):
            parser.error(f"unrecognized argument {argument!r}; settings are written --config.a.b=value")
        if "=" not in argument:
            if not rest:
                parser.error(f"{argument} needs a value")
            argument += "=" + rest.pop(0)
        texts.append(argument.removeprefix("--config."))
    return texts


def override(config, path, text):
    """Sets the value at a dotted path from its text, keeping the type that the config declares."""
    node, keys = config, path.split(".")
    for depth, key in enumerate(keys):
        if not isinstance(node, ml_collections.ConfigDict) or key not in node:
            known = list(node) if isinstance(node, ml_collections.ConfigDict) else []
            where = ".".join(keys[:depth]) or "config"
            raise ConfigError(f"no setting {path!r}: {where} has no {key!r}; {nearest(key, known)}")
        parent, node = node, node[key]
    parent[keys[-1]] = _parse(path, text, node)


def _parse(path, text, old):
    if isinstance(old, ml_collections.ConfigDict):
        raise ConfigError(f"{path!r} is a group of settings: {', '.join(old)}; set one of them")
    if isinstance(old, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    if old is None or type(value) is type(old):
        return value
    if isinstance(old, float) and type(value) is int:
        return float(value)
    if isinstance(old, tuple) and isinstance(value, (list, int, float, str)):
        return tuple(value) if isinstance(value, list) else (value,)
    raise ConfigError(
        f"{path}={text!r}: expected {type(old).__name__} (now {old!r}), found {type(value).__name__}"
    )
