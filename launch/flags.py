"""What the launchers share: their own flags end at `--`, and those of `mmgen train` begin."""

import argparse
import hashlib
import os
import re


def parser(doc):
    """An ArgumentParser whose help is the docstring of the script."""
    made = argparse.ArgumentParser(
        usage="%(prog)s [flags] -- --config NAME:VARIANT --workdir DIR [--config.a.b=VALUE ...]",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--dry_run", action="store_true", help="print what would be run, and do nothing else")
    return made


def parse(parser, argv):
    """argv -> (the launcher's flags, what comes after `--`), which must name a config and a workdir unless
    another --command is what runs."""
    cut = argv.index("--") if "--" in argv else len(argv)
    args, training = parser.parse_args(argv[:cut]), argv[cut + 1 :]
    if cut == len(argv):
        parser.error("the flags of training come after `--`; found no `--`. See the usage above")
    for flag in ("--config", "--workdir") if getattr(args, "command", None) is None else ():
        if not value(training, flag):
            parser.error(f"after `--` a {flag} is expected; found {' '.join(training) or 'nothing'}")
    return args, training


def value(training, flag):
    """What `flag` is given among the flags of training, as `--flag X` or `--flag=X`; None without it."""
    for here, after in zip(training, [*training[1:], None]):
        if here == flag:
            return after
        if here.startswith(flag + "="):
            return here.partition("=")[2]
    return None


def shared_workdir(parser, training):
    """The workdir, which must be an absolute path: hosts elsewhere know nothing of this one's folders."""
    workdir = value(training, "--workdir")
    if not workdir.startswith("/"):
        parser.error(f"--workdir must be an absolute path on a file system that all hosts see, not {workdir}")
    return workdir


def name_of(workdir):
    """A name for the run in this absolute path: its own, always the same, fit for every scheduler."""
    workdir = os.path.normpath(workdir)
    last = re.sub(r"[^a-z0-9]+", "-", os.path.basename(workdir).lower()).strip("-")[:24]
    return f"mmgen-{last}-{hashlib.sha256(workdir.encode()).hexdigest()[:4]}"


def word(text):
    """A flag's value that is written into a script where nothing can be quoted."""
    if not re.fullmatch(r"[A-Za-z0-9_][\w.,:/=@+-]*", text):
        raise argparse.ArgumentTypeError(
            f"expected one word of letters, digits and . , : / = @ + -; found {text!r}"
        )
    return text


def count(least):
    """The type of a flag that is a whole number of at least `least`."""

    def whole(text):
        if not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}; found {text!r}")
        return int(text)

    return whole
