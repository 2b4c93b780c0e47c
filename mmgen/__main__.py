"""`mmgen COMMAND ...`, the same as `python -m mmgen COMMAND ...`."""

import importlib
import sys
from pathlib import Path

COMMANDS = {
    "quickstart": "everything from nothing to judged pictures, in minutes",
    "train": "train a stage from a config",
    "tokenize": "turn a source into tokenised shards",
    "sample": "draw pictures for prompts",
    "evaluate": "judge a checkpoint on the world's suites",
    "text": "train a SentencePiece text model",
    "doctor": "say what works on this machine",
}


def main(argv=None):
    """Runs one command; bad input ends with one clear line, not a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(
            "usage: mmgen COMMAND [--help]\n\n"
            + "\n".join(f"  {name:<12}{what}" for name, what in COMMANDS.items())
        )
        return 0 if argv else 2
    name, *rest = argv
    if name == "--version":
        from mmgen import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        from mmgen.runtime.config import nearest

        print(f"mmgen: no command {name!r}; {nearest(name, COMMANDS)}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"mmgen.commands.{name}").main(rest) or 0
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        if not (isinstance(error, OSError) or _is_ours(error)):
            raise
        print(f"mmgen {name}: {error}", file=sys.stderr)
        return 1


def _is_ours(error):
    """Whether our own code raised the error: its text is written for people, a trace adds nothing."""
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    return Path(frame.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent)


if __name__ == "__main__":
    sys.exit(main())
