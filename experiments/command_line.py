"""The command line of every experiment: `run(main)` reads the flags and the config, then calls `main(config)`.

    python -m experiments.train --config=configs/smoke.py --config.grpo.group_size=4 --workdir=runs/smoke

The config file's `get_config()` returns a plain dataclass, which may nest others; `ml_collections.config_flags` makes
its fields typed flags. An experiment defines its own flags (`--workdir`) with absl and reads them in `main`.

A mistake of the user, wherever it shows (flags, config file, a ValueError out of `main`), prints one sentence and ends
with exit code 2; `--verbosity=1` adds the traceback. Anything else is a bug: a traceback, exit code 1. Ctrl-C ends with
130 and tells how to go on; saving is up to `main`. `--help` reads no config, and absl's logging starts at warnings
because libraries fill a page per checkpoint below that.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import importlib.util
import pathlib
import re
import shlex
import sys
import traceback
import typing
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from experiments.allocation import keep_freed_memory

USER_MISTAKE = 2
INTERRUPTED = 130
OVERRIDABLE_TYPES = (int, float, bool, str, tuple)
HELP_FLAGS = frozenset({"help", "helpshort", "helpfull", "helpxml", "?"})


class CommandLineError(Exception):
    """A mistake in the flags or the config file. No ValueError: absl would wrap that in a sentence of its own."""


@dataclasses.dataclass
class _NoConfig:
    """The default of --config, which has to be of some dataclass."""


def run(main: Callable[[typing.Any], None]) -> None:
    """Parses the command line, calls `main(config)` and ends the process; see the top of the file for exit codes."""
    keep_freed_memory()
    try:
        app.run(lambda _: main(flags.FLAGS.config), flags_parser=_parse_flags)
    except (CommandLineError, ValueError) as error:
        logging.debug("traceback", exc_info=True)
        print(f"error: {_one_line(error)}{_place(error)}", file=sys.stderr)
        sys.exit(USER_MISTAKE)
    except KeyboardInterrupt:
        command = shlex.join(sys.orig_argv)
        print(f"\ninterrupted; the same command goes on from the last save: {command}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def load_config(path: str) -> typing.Any:
    """What `get_config()` of the Python file `path` returns: a dataclass instance.

    Raises:
      CommandLineError: the file is missing, raises, has no `get_config()` that returns a dataclass, or sets a field
        that there is not.
    """
    file = pathlib.Path(path).absolute()  # as tracebacks name it
    if not file.is_file() or file.suffix != ".py":
        raise CommandLineError(f"--config={path} is no Python file: name one such as configs/smoke.py")
    spec = importlib.util.spec_from_file_location("config_file", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their own module up
    try:
        spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise CommandLineError(f"--config={path} has no function get_config(): add one that returns a dataclass")
        config = module.get_config()
        _resolve_annotations(config)
    except CommandLineError:
        raise
    except (Exception, SystemExit) as error:  # whatever the user's own file raises is told as the file's mistake
        told = f"{type(error).__name__}: {getattr(error, 'msg', error)}"
        raise CommandLineError(f"--config={path} failed at line {_line_in(file, error)}: {told}") from error
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise CommandLineError(f"get_config() of --config={path} returned {config!r}: return a dataclass instance")
    if unknown := _unknown_fields(config):
        raise CommandLineError(f"--config={path} sets {unknown[0]}, which is no field of the config: see its dataclass")
    return config


def _unknown_fields(config, path: str = "config") -> list[str]:
    """Attributes that a config file has set and no dataclass declares: a misspelt field would change nothing."""
    declared = {field.name for field in dataclasses.fields(config)}
    unknown = [f"{path}.{name}" for name in vars(config) if name not in declared]
    for name in declared:
        value = getattr(config, name)
        if dataclasses.is_dataclass(value) and hasattr(value, "__dict__"):
            unknown += _unknown_fields(value, f"{path}.{name}")
    return unknown


def _parse_flags(argv):
    """absl's `flags_parser`: defines --config, parses everything, and turns what goes wrong into a CommandLineError."""
    help_argv = [argument for argument in argv[1:] if argument.lstrip("-") in HELP_FLAGS and argument.startswith("-")]
    argv = argv[:1] + (help_argv or argv[1:])
    if not help_argv and not any(re.match("--?config(=|$)", argument) for argument in argv):
        raise CommandLineError("--config is missing: name a config file, such as --config=configs/smoke.py")
    override_types = {}
    config_flags.DEFINE_config_dataclass(
        "config",
        _NoConfig(),
        "The config file; --config.FIELD=VALUE overrides a field of it.",
        sys_argv=argv,
        parse_fn=lambda path: _load_and_check(path, argv, override_types),
    )
    flags.FLAGS["config"].default_as_str = None  # there is no default to show
    flags.FLAGS.register_key_flag_for_module(argv[0], flags.FLAGS["config"])  # so that --help lists it
    try:
        positional = flags.FLAGS(argv)[1:]
        _check_tuples(override_types)
    except flags.UnrecognizedFlagError as error:
        raise CommandLineError(f"{_one_line(error)} (--help lists the flags)") from error
    except flags.Error as error:
        raise CommandLineError(_told(error, override_types)) from error
    except SystemExit:  # absl ends its help with 1
        sys.exit(0)
    if positional:
        raise CommandLineError(f"unexpected argument {positional[0]!r}: flags are written --name=value")
    if flags.FLAGS["verbosity"].using_default_value:
        flags.FLAGS.verbosity = logging.WARNING
    return argv[:1]


def _load_and_check(path, argv, override_types):
    """The config, once every override on the command line is known to be possible; fills in their types by name."""
    config = load_config(path)
    for argument in argv:
        # The form that config_flags itself looks for; --noconfig.x sets a bool to false.
        if match := re.match(r"--?(?:no)?(config\.[^=]+)", argument):
            override_types[match[1]] = _override_type(config, match[1])
    return config


def _override_type(config, flag_name):
    """The declared type of the field `config.a.b`; a CommandLineError says why it cannot be overridden, if so."""
    holder, field_type = config, type(config)
    shown = "config"
    for name in flag_name.split(".")[1:]:
        if not dataclasses.is_dataclass(holder):
            raise CommandLineError(f"--{flag_name}: {shown} is a {_name(field_type)} and has no fields")
        types = {field.name: field.type for field in dataclasses.fields(holder)}
        if name not in types:
            close = difflib.get_close_matches(name, types, n=1)
            mend = f"did you mean {close[0]}?" if close else f"its fields are {', '.join(types)}"
            raise CommandLineError(f"--{flag_name}: {shown} has no field {name!r}; {mend}")
        if type(holder).__dataclass_params__.frozen:
            raise CommandLineError(f"--{flag_name}: {shown} is frozen; choose another in the config file")
        holder, field_type, shown = getattr(holder, name), types[name], f"{shown}.{name}"
    if dataclasses.is_dataclass(holder):
        raise CommandLineError(f"--{flag_name} is a group of fields: override one of them, --{flag_name}.FIELD=VALUE")
    if not _is_overridable(field_type):
        raise CommandLineError(f"--{flag_name}: a field of type {_name(field_type)} is set in the config file only")
    return field_type


def _check_tuples(override_types):
    """config_flags does not look into tuples: checks the items of tuple[X, ...] and tuple[X, Y] fields."""
    for flag_name, field_type in override_types.items():
        if typing.get_origin(field_type) is not tuple:
            continue
        value, item_types = flags.FLAGS[flag_name].value, typing.get_args(field_type)
        if item_types[-1] is Ellipsis:
            item_types = item_types[:1] * len(value)
        is_right = len(value) == len(item_types) and all(
            type(item) is wanted or (wanted is float and type(item) is int)
            for item, wanted in zip(value, item_types, strict=True)
        )
        if not is_right:
            raise CommandLineError(f"--{flag_name} is {tuple(value)!r}: give a {_name(field_type)}")


def _is_overridable(field_type):
    origin = typing.get_origin(field_type)
    if type(None) in (arguments := typing.get_args(field_type)):  # X | None
        others = [argument for argument in arguments if argument is not type(None)]
        return len(others) == 1 and _is_overridable(others[0])
    if origin is not None:
        return origin in OVERRIDABLE_TYPES
    return field_type in OVERRIDABLE_TYPES or _is_enum(field_type)


def _resolve_annotations(config):
    """Puts types where `from __future__ import annotations` left strings: config_flags reads `Field.type` as it is."""
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        return
    types = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        field.type = types[field.name]
        _resolve_annotations(getattr(config, field.name))


def _told(error, override_types):
    """absl's message in one line, with the mend for its two common cases."""
    message = _one_line(error)
    if required := re.search(r"Flag --(\S+) must have a value other than None", message):
        return f"--{required[1]} is missing: give it as --{required[1]}=VALUE"
    if (wrong := re.match(r"flag --(config\.[\w.]+)=(.*?): ", message)) and wrong[1] in override_types:
        field_type = override_types[wrong[1]]
        choices = f", one of {', '.join(item.name for item in field_type)}" if _is_enum(field_type) else ""
        return f"--{wrong[1]} is {wrong[2]!r}: give a value of type {_name(field_type)}{choices}"
    return f"{message} (--help lists the flags)"


def _is_enum(field_type):
    return isinstance(field_type, type) and issubclass(field_type, enum.Enum)


def _name(field_type):
    return field_type.__name__ if type(field_type) is type or _is_enum(field_type) else str(field_type)


def _one_line(error):
    return " ".join(str(error).split()) or type(error).__name__


def _place(error):
    """Where a ValueError comes from: a library may raise one for a bug, and the sentence must lead to it."""
    if isinstance(error, CommandLineError):
        return ""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f" [{pathlib.Path(frame.filename).name}:{frame.lineno}]"


def _line_in(file, error):
    """The line of `file` where it went wrong: of the syntax error, or the last one before other code took over."""
    if isinstance(error, SyntaxError) and error.filename == str(file):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return lines[-1] if lines else 1
