"""A parser that reports every mistake in one line with exit status 2, and reads flags from YAML files."""

import argparse
import difflib
import math
import os
import re
import sys

from ppdiffusers_train.arguments.config import read_entries
from ppdiffusers_train.arguments.elsewhere import ADVICE
from ppdiffusers_train.errors import one_line
from ppdiffusers_train.launcher.final_message import print_after_launcher

# Types of flags. argparse puts the message into one line that names the flag.


def _number(convert, accepts, expected):
    def parse(text):
        try:
            number = convert(text)
        except ValueError:
            number = None
        if number is None or not accepts(number):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return number

    parse.number = convert
    return parse


positive_int = _number(int, lambda number: number > 0, "a whole number above 0")
non_negative_int = _number(int, lambda number: number >= 0, "a whole number from 0 on")
seed = _number(int, lambda number: 0 <= number < 2**63, "a whole number from 0 to 2**63 - 1")
positive_float = _number(float, lambda number: 0 < number < math.inf, "a number above 0")
non_negative_float = _number(float, lambda number: 0 <= number < math.inf, "a number from 0 on")
share = _number(float, lambda number: 0 < number < 1, "a number between 0 and 1")
unit_float = _number(float, lambda number: 0 <= number < 1, "a number from 0 to below 1")


def repeats(text: str) -> str:
    """A value of `--repeats`, which is a number or FOLDER=NUMBER."""
    positive_int(text.rpartition("=")[2])
    return text


def text(value: str) -> str:
    """A value that can be written as UTF-8: bytes of other encodings come as surrogates."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{value!r} is not valid text; expected UTF-8") from None
    return value


def separator(value: str) -> str:
    """A text that is not empty."""
    if not value:
        raise argparse.ArgumentTypeError("'' is empty; expected a text")
    return text(value)


def colour(text: str) -> str:
    """A colour as #rrggbb, from its name in CSS or from #rgb or #rrggbb."""
    from PIL import ImageColor  # here: `--help` should be fast

    if re.fullmatch("[A-Za-z]+|#[0-9A-Fa-f]{3}|#[0-9A-Fa-f]{6}", text):
        try:
            return "#{:02x}{:02x}{:02x}".format(*ImageColor.getrgb(text))
        except ValueError:
            pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a colour; expected a name such as white, or #rrggbb")


UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def byte_size(text: str) -> int:
    """Bytes from a text such as 500MB, 1.5 GiB or 4096."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?", text.strip().lower())
    if match is None or match[2] not in UNITS or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500MB or 2GiB")
    return int(float(match[1]) * UNITS[match[2]])


class Flag(argparse.Action):
    """`--name` turns it on, `--no_name` turns it off (if a config file turned it on, for example)."""

    def __init__(self, option_strings, dest, default=False, help=None):
        negated = [option.replace("--", "--no_", 1) for option in option_strings]
        super().__init__([*option_strings, *negated], dest, nargs=0, default=default, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


class HelpFormatter(argparse.HelpFormatter):
    """Ends a flag's help with its default, if it has one; that of a `Flag` is on or off. Calls a flag's value N if it
    is a whole number, X if it is another number."""

    def _get_default_metavar_for_optional(self, action):
        value_type = getattr(action.type, "number", action.type)
        return {int: "N", float: "X"}.get(value_type, "NAME")

    def _get_help_string(self, action):
        default = action.default
        if isinstance(action, Flag):
            text = "on" if default else "off"
        elif default is None or default is argparse.SUPPRESS or not action.option_strings:
            return action.help
        else:
            text = "%(default)s"
        return f"{action.help.removesuffix('.')} (default: {text})."


EMPTY_IS_A_VALUE = ("TEXT", "TOKEN")  # captions and prompts; a token that the environment may not have


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser with `--config`, nearest names for typos, and errors of one line.

    Args:
        config: whether it has `--config`; of a program with commands, only the commands' parsers have it.
    """

    def __init__(self, config=True, **options):
        options.setdefault("formatter_class", HelpFormatter)
        super().__init__(allow_abbrev=False, **options)
        self.reads_config = config
        if self.add_help:
            self._option_string_actions["--help"].help = "Print this help and exit."
        if config:
            self.add_argument(
                "--config", metavar="FILE",
                help="Read flags from this YAML file; flags on the command line take precedence.",
            )  # fmt: skip

    def parse_known_args(self, args=None, namespace=None):
        args = list(sys.argv[1:] if args is None else args)
        if not self.reads_config:
            return super().parse_known_args(args, namespace)
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config")
        finder.error = self.error
        config = finder.parse_known_args(args)[0].config
        # Values of the file are put before the arguments, as if typed first: the last one wins, and types are checked.
        return super().parse_known_args((self._config_arguments(config) if config else []) + args, namespace)

    def parse_args(self, args=None, namespace=None):
        values, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.refuse(unknown[0])
        return values

    def _get_value(self, action, arg_string):
        # As of a variable that is not set in a shell. It would count as no flag, or as the current folder.
        is_command = action.nargs in (argparse.REMAINDER, argparse.PARSER)
        if arg_string == "" and action.type is None and action.metavar not in EMPTY_IS_A_VALUE and not is_command:
            raise argparse.ArgumentError(action, "'' is empty; expected a value, or no such flag")
        return super()._get_value(action, arg_string)

    def refuse(self, argument: str) -> None:
        """Exit with one line about an unknown argument."""
        name = argument.split("=")[0]
        if name.startswith("-"):
            self.error(f"{name} is not a flag of this script{self._nearest(name)}")
        self.error(f"unexpected argument {argument!r}; flags begin with --")

    def error(self, message):
        message = one_line(f"{os.path.basename(self.prog)}: error: {' '.join(message.split())}")
        print_after_launcher(message)
        self.exit(2, f"{message}\n")

    def _nearest(self, name):
        if name in ADVICE:
            return f"; {ADVICE[name]}"
        matches = difflib.get_close_matches(name, self._option_string_actions, n=1)
        return f"; did you mean {matches[0]}?" if matches else "; --help lists them"

    def _config_arguments(self, path):
        arguments, lines = [], {}
        for entry in read_entries(path, self.error):
            action = self._option_string_actions.get(f"--{entry.name}")
            if action is None or entry.name in ("config", "help"):
                entry.refuse(f"{entry.name!r}, which is not a flag{self._nearest(f'--{entry.name}')}")
            if action.dest in lines:  # also by another spelling
                entry.refuse(f"{entry.name!r}, which line {lines[action.dest]} has set already; expected it once")
            lines[action.dest] = entry.line
            if entry.values is None and isinstance(action.default, str):
                entry.refuse(f"{entry.name!r} to nothing; a text that begins with # needs quotes")
            if entry.values is not None:
                arguments += self._as_typed(entry, action)
        return arguments

    def _as_typed(self, entry, action) -> list:
        """What a user would type for an entry of the config; a value is refused with its line."""
        flag, shown = f"--{entry.name}", entry.values if entry.is_list else entry.values[0]
        if any(value.startswith("pipe:") for value in entry.values):  # a file from elsewhere must not run commands
            entry.refuse(f"{entry.name!r} to a command; pipe: is taken from the command line only")
        if isinstance(action, Flag):
            if not entry.is_bool:
                entry.refuse(f"{entry.name!r} to {shown}; expected true or false")
            half = len(action.option_strings) // 2
            positive, negated = action.option_strings[:half], action.option_strings[half:]
            is_on = (entry.values[0].lower() in ("true", "yes", "on")) == (flag in positive)
            return [positive[0] if is_on else negated[0]]
        if entry.is_list and (action.nargs is None or not entry.values):
            expected = "one value" if action.nargs is None else "at least one value"
            entry.refuse(f"{entry.name!r} to a list of {len(entry.values)}; expected {expected}")
        dashed = [value for value in entry.values if action.nargs is not None and value.startswith("-")]
        if dashed:
            entry.refuse(f"{entry.name!r} to {dashed[0]!r}; expected values that do not begin with -")
        try:
            for value in entry.values:
                self._check_value(action, self._get_value(action, value))
        except argparse.ArgumentError as error:
            entry.refuse(f"{entry.name!r}: argument {flag}: {error.message}")
        return [flag, *entry.values] if action.nargs is not None else [f"{flag}={entry.values[0]}"]


class CommandParser(ArgumentParser):
    """The parser of one command of a program, which reports unknown flags itself."""

    def parse_known_args(self, args=None, namespace=None):
        values, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.refuse(unknown[0])
        return values, unknown
