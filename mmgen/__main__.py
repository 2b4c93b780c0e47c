"""`mmgen COMMAND ...`, the same as `python -m mmgen COMMAND ...`."""

import importlib
import sys
from pathlib import Path

COMMANDS = {
    "quickstart": "everything from nothing to judged pictures, in minutes",
    "train": "train a stage from a config",
    "tokenize": "turn a source into tokenised shards",
    "sample": "draw pictures for prompts, or answer them in words",
    "chat": "a dialogue in the terminal, text and images in and out",
    "serve": "an HTTP API that clients of OpenAI's speak, and a page",
    "evaluate": "judge a checkpoint on the world's suites",
    "text": "train a SentencePiece text model",
    "doctor": "say what works on this machine",
}
TOOLS = {
    "inspect": "what lies in tokenised shards: statistics, and documents as a page to look at",
    "score": "the log-likelihood of given images and texts under a model",
    "embed": "vectors of a source's images and texts, by the towers of a contrastive run",
    "plan": "memory, FLOPs and step time of a config on a pod, before there is one",
    "export": "a run's weights as one safetensors file",
    "pack": "a run as a small folder to give away",
    "replay": "the batch at which a run gave up, computed again",
    "verify": "where a picture comes from: its signature and its watermark",
    "policy": "what the safety policy says of prompts, and how good it is",
    "goodput": "where the wall time of a run went",
}


def main(argv=None):
    """Runs one command; bad input ends with one clear line, not a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    for stream in (sys.stdin, sys.stdout):  # a character that a terminal has not is no reason to end
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    if argv[:1] == ["--version"]:
        from mmgen import __version__

        print(__version__)
        return 0
    if argv[:1] == ["tools"]:
        return _run("mmgen tools", "tool", TOOLS, "mmgen.commands.tools", argv[1:])
    commands = COMMANDS | {"tools": "more, each for one purpose; `mmgen tools` lists them"}
    return _run("mmgen", "command", commands, "mmgen.commands", argv)


def _run(program, kind, commands, package, argv):
    """Runs the one of `commands` that argv names, a module of `package`."""
    if not argv or argv[0] in ("-h", "--help"):
        print(
            f"usage: {program} {kind.upper()} [--help]\n\n"
            + "\n".join(f"  {name:<12}{what}" for name, what in commands.items())
        )
        return 0 if argv else 2
    name, *rest = argv
    if name not in commands:
        from mmgen.runtime.config import nearest

        print(f"{program}: no {kind} {name!r}; {nearest(name, commands)}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"{package}.{name}").main(rest) or 0
    except KeyboardInterrupt:
        print(f"{program} {name}: interrupted", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError, FloatingPointError) as error:
        if not (isinstance(error, OSError) or _is_ours(error)):
            raise
        print(f"{program} {name}: {error}", file=sys.stderr)
        return 1


def _is_ours(error):
    """Whether our own code raised the error: its text is written for people, a trace adds nothing."""
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    return Path(frame.tb_frame.f_code.co_filename).is_relative_to(Path(__file__).parent)


if __name__ == "__main__":
    sys.exit(main())
