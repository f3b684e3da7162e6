"""Command line and errors: flags from a frozen dataclass; one line and an exit status for whoever made a
mistake."""
import argparse
import dataclasses
import inspect
import os
import re
import signal
import sys
import typing
from contextlib import suppress
from typing import Literal

import torch
import torch.distributed as dist

STOPS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP        # a training run saves before it ends


class UsageError(Exception):
    """A bad argument: one line on stderr, exit status 2."""


class DataError(Exception):
    """Bad data or a bad file: one line on stderr, exit status 1."""


class Stopped(Exception):
    """A signal has stopped the run, which is saved: exit status 128 + the signal's number."""


def run_main(main):
    """Call main(). A user's mistake becomes one line on stderr and an exit status, never a traceback."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # like Ctrl-C: what is half-written is removed
    if sys.stdout is None:                                          # closed: like a pipe that nobody reads
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = open(writer, "w")
    for stream in filter(None, (sys.stdout, sys.stderr)):
        stream.reconfigure(errors="backslashreplace")               # for names that the terminal cannot show
    status, message = 0, ""
    try:
        main()
        sys.stdout.flush()
    except (UsageError, DataError) as error:
        status, message = 2 if isinstance(error, UsageError) else 1, f"error: {' '.join(str(error).split())}"
    except Stopped as stop:
        status = 128 + stop.args[0]
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    except torch.OutOfMemoryError as error:
        status, message = 1, f"error: {str(error).splitlines()[0]} Smaller sizes or batches need less."
    except OSError as error:
        status, message = 1, f"error: {error.filename or 'a file or stdout'}: {error.strerror or error}"
    with suppress(OSError, ValueError, AttributeError):
        if message:
            print(message, file=sys.stderr, flush=True)
        if status:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())      # no flush to a broken pipe
    if status and dist.is_initialized():
        os._exit(status)                                      # to destroy the group would wait for the others
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(status)


# ------------------------------------------------------------------------------------------------------------
# Flags

def check_fields(config, positive=""):
    """UsageError unless each field of a dataclass has a value of its type, one of its choices, finite, and >=
    1 if in `positive`."""
    for f, hint in zip(dataclasses.fields(config), typing.get_type_hints(type(config)).values(), strict=True):
        value, kinds = getattr(config, f.name), typing.get_args(hint) or (hint,)
        if typing.get_origin(hint) is Literal:
            if value not in kinds:
                raise UsageError(f"--{f.name} is {' or '.join(kinds)}, not {value!r}")
        elif type(value) not in kinds + (int,) * (float in kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise UsageError(f"--{f.name} must be {names}, not {value!r}")
        if type(value) in (int, float) and not abs(value) < 2**63:
            raise UsageError(f"--{f.name} must be finite, not {value}")
        if f.name in positive.split() and value < 1:
            raise UsageError(f"--{f.name} must be at least 1, not {value}")


def field_comments(cls):
    """The trailing `# comment` of every field of a dataclass and its bases: name -> comment."""
    comments = {}
    for base in reversed(cls.__mro__):
        if dataclasses.is_dataclass(base):
            comments |= dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.+)$", inspect.getsource(base), re.M))
    return comments


def parse_bool(text):
    """true/false, yes/no, on/off, 1/0 in any case -> bool; ArgumentTypeError otherwise."""
    if text.lower() not in ("true", "yes", "1", "on", "false", "no", "0", "off"):
        raise argparse.ArgumentTypeError(f"true or false, not {text!r}")
    return text.lower() in ("true", "yes", "1", "on")


class OneLineParser(argparse.ArgumentParser):
    """argparse that says what is wrong in one line."""

    def error(self, message):
        print(f"error: {message} (--help lists all flags)", file=sys.stderr)
        sys.exit(2)


PATHS = "data_dir out_dir init_from ckpt source figures json out".split()   # ~ is the home folder


def parse(Config, argv=None, presets=None, generated=()):
    """The command line as a Config (a frozen dataclass): defaults, then the preset's values, then the flags
    given.

    A field's trailing comment is its --help. An unknown flag, a wrong type or a value that Config refuses
    ends the program with status 2 and one line. presets: {name: {field: value}}; "<name>/<dataset>" adds to
    it. generated: data sets whose preset is tiny on every device.
    """
    hints, comments = typing.get_type_hints(Config), field_comments(Config)
    parser = OneLineParser(description=inspect.getdoc(sys.modules[Config.__module__]), allow_abbrev=False,
                           formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Config):
        kinds = typing.get_args(hints[f.name]) or (hints[f.name],)
        options = dict(choices=kinds)
        if isinstance(kinds[0], type):
            options = dict(type=kinds[0], metavar=kinds[0].__name__)
        if kinds[0] is bool:
            options = dict(nargs="?", const=True, type=parse_bool, metavar="true|false")
        elif f.name == "resume":
            options |= dict(nargs="?", const="yes")
        tiny = f"; tiny, fables: {presets['tiny'][f.name]}" if presets and f.name in presets["tiny"] else ""
        text = f"{comments.get(f.name)} (default {'unset' if f.default in (None, '') else f.default}{tiny})"
        parser.add_argument(f"--{f.name}", help=text.replace("%", "%%"), **options)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    given |= {name: os.path.expanduser(given[name]) for name in PATHS if name in given}
    if presets is not None:
        dataset, device = given.get("dataset", Config.dataset), given.get("device", Config.device)
        on_cuda = device.startswith("cuda") or device == "auto" and torch.cuda.is_available()
        name = given.get("preset") or ("paper" if on_cuda and dataset not in generated else "tiny")
        if name not in presets or "/" in name:
            parser.error(f"--preset is one of {', '.join(p for p in presets if '/' not in p)}, not {name!r}")
        given = presets[name] | presets.get(f"{name}/{dataset}", {}) | given | {"preset": name}
    try:
        return Config(**given)
    except UsageError as error:
        parser.error(str(error))
