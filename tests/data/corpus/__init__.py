"""Small data sets as people bring them, each with what training must see of it, or the line that it must print.

A case is a function that writes a data set into an empty folder and returns an `Expected`. Cases stand in the modules
of this package, by subject; `test_corpus.py` opens each one as a run does, reads all samples, and runs `check` on it.
"""

from dataclasses import dataclass, field

CASES = {}  # {name: function}


@dataclass
class Expected:
    """What must come of a data set.

    Args:
        flags: of a training command, such as `["--train_data_dir", folder]`.
        samples: (pixels as a uint8 array [H, W, 3] or None for any, caption or list of captions) in the order of rows;
            None if the data is refused. In place of a sample that is bad, the part of the message that must name it.
        refused: parts of the one line with which the data is refused.
        printed: parts of lines that a start must print.
        check: the exit status of `ppdiffusers-train check`; by default 1 if the data is refused or has a bad sample.
    """

    flags: list
    samples: list = None
    refused: tuple = ()
    printed: tuple = ()
    check: int = None
    tolerance: int = 0  # by which a value of a pixel may differ
    check_flags: list = field(default_factory=list)  # of `check`, besides the folder or shards

    @property
    def status(self) -> int:
        """The exit status of `check`."""
        has_bad = self.samples is None or any(isinstance(sample, str) for sample in self.samples)
        return int(has_bad) if self.check is None else self.check


def case(function):
    """Register a case under its function's name."""
    assert function.__name__ not in CASES, function.__name__
    CASES[function.__name__] = function
    return function
