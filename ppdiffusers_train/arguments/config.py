"""The YAML file of `--config`: lines of the form `name: value`, whose values are texts as they would be typed.

The file is only parsed into nodes, never turned into objects, so nothing in it runs code, and a value is what is
written: `1e-5` stays a number that YAML 1.1 takes for a text, and `no` the name of a choice that it takes for false.
"""

from collections.abc import Callable
from dataclasses import dataclass

TAG = "tag:yaml.org,2002:"


@dataclass
class Entry:
    """A line of the file. `values` is None where no value is given, else a list of texts."""

    path: str
    line: int
    name: str
    values: list
    is_list: bool
    is_bool: bool
    error: Callable

    def refuse(self, what: str) -> None:
        """Exit with one line about this entry."""
        self.error(f"--config: {self.path!r}, line {self.line}: sets {what}")


def read_entries(path: str, error) -> list:
    """The entries of a file.

    Args:
        error: called with the one line that says why the file cannot be read; it does not return.
    """
    import yaml  # here: most commands have no such file, and `--help` should be fast

    text = ""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except OSError as problem:
        error(f"--config: cannot read {path!r}: {problem.strerror}")
    except UnicodeDecodeError as problem:
        line = problem.object[: problem.start].count(b"\n") + 1
        error(f"--config: {path!r}, line {line}: is not UTF-8: {problem.reason}; expected a text file saved as UTF-8")
    except yaml.reader.ReaderError as problem:
        line = text[: problem.position].count("\n") + 1
        error(f"--config: {path!r}, line {line}: is not valid YAML: it has the character {chr(problem.character)!r}")
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        error(f"--config: {path!r}, line {mark.line + 1}: is not valid YAML: {problem.problem}")
    except RecursionError:
        error(f"--config: {path!r}: holds lists within lists; expected lines of the form 'name: value'")
    if node is None:
        return []
    kind = {"sequence": "list", "scalar": "text"}.get(node.id)
    if kind:
        line = node.start_mark.line + 1
        error(f"--config: {path!r}, line {line}: holds a {kind}; expected lines of the form 'name: value'")
    return [entry(path, error, *pair) for pair in node.value]


def entry(path: str, error, key, value) -> Entry:
    """The entry of a pair of nodes."""
    line = key.start_mark.line + 1
    if key.id != "scalar":
        error(f"--config: {path!r}, line {line}: has a {key.id} as a name; expected the name of a flag")
    is_list = value.id == "sequence"
    parts = value.value if is_list else [value]
    texts = [part.value for part in parts if part.id == "scalar"]
    found = Entry(path, line, key.value, texts, is_list, value.tag == f"{TAG}bool", error)
    for part in (value, *parts):
        if not part.tag.startswith(TAG) or "/" in part.tag:
            found.refuse(f"{key.value!r} to a value with the tag {part.tag!r}; expected a plain value")
    if any(part.id != "scalar" for part in parts):
        found.refuse(f"{key.value!r} to a {'list of lists' if is_list else 'group of names'}; expected one value")
    if value.tag == f"{TAG}null":
        found.values = None
    return found
