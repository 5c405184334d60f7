"""The unused files and the problems of a folder: counted by kind, with the first texts of each kind."""

from dataclasses import dataclass, field


@dataclass
class Problems:
    """{kind: [number, first texts]} of a folder.

    Args:
        kept: texts of each kind; None keeps all.
    """

    kept: object = 3
    found: dict = field(default_factory=dict)
    columns: dict = field(default_factory=dict)  # of the rows that were read, as keys

    def add(self, kind: str, text: str) -> None:
        """Add a problem with its text."""
        count = self.found.setdefault(kind, [0, []])
        count[0] += 1
        if self.kept is None or len(count[1]) < self.kept:
            count[1].append(text)

    def __contains__(self, kind: str) -> bool:
        return kind in self.found

    def describe(self, kind: str) -> str:
        """The first problem of a kind, and how many others there are."""
        count, texts = self.found[kind]
        return texts[0] + (f" (and {count - 1:,} more)" if count > 1 else "")
