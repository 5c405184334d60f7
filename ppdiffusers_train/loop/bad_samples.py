"""Samples that cannot be used: logged once, counted, and skipped up to the limit that the user sets."""

from ppdiffusers_train.data.rows import Rows
from ppdiffusers_train.errors import BadSampleError

NAMED = 20  # at most so many of the samples that are known to be bad before the first step are named


def known_bad(dataset: Rows) -> list:
    """The rows that cannot be used, as far as it is known before the first step, in order."""
    masks = dataset.masks.bad(dataset.facts) if dataset.masks else ()
    return sorted({*map(int, dataset.without_captions()), *dataset.facts.problems, *masks})


def why_bad(dataset: Rows, row: int) -> str:
    """The message about one of these rows."""
    try:
        dataset.captions(row)
        dataset.location(row)
        size = dataset.image_size(row)
        if dataset.masks:
            dataset.masks.check(row, size)
    except BadSampleError as error:
        return str(error)
    raise AssertionError(f"row {row} can be used")


class BadSamples:
    """The rows of a dataset that could not be used so far, the same on every rank.

    Args:
        limit: number of rows that may be skipped.
        rows: those that are already known, from a checkpoint.
    """

    def __init__(self, limit: int, rows=()):
        self.limit, self.rows = limit, set(rows)

    def add(self, found: dict, log) -> None:
        """Count `{row: message}`, and log that the new ones are skipped.

        Raises:
            BadSampleError: there are more than the limit.
        """
        for row, message in sorted(found.items()):
            if row in self.rows:
                continue
            count = len(self.rows) + 1
            if count > self.limit:  # it is not added: a checkpoint has only those that were skipped
                allowed = f" ({count} bad samples, --max_bad_samples is {self.limit})" if self.limit else ""
                raise BadSampleError(message + allowed)
            self.rows.add(row)
            log(f"skipped, {len(self.rows)} of at most {self.limit} bad samples: {message}")

    def refuse_known(self, dataset: Rows, can_skip: bool = True) -> None:
        """Raise a `BadSampleError` if more rows than the limit, or all rows, are known to be unusable before the first
        step.

        Args:
            can_skip: whether `--max_bad_samples` may be raised.
        """
        known = known_bad(dataset)
        new = [row for row in known if row not in self.rows]
        count = len(self.rows) + len(new)
        if (new and count > self.limit) or len(known) == len(dataset):
            first = (new or known)[0]
            more = f" (and {len(known) - 1:,} more)" if len(known) > 1 else ""
            found, why = f"{len(known):,} of {len(dataset):,} samples cannot be used", why_bad(dataset, first)
            if not can_skip:
                raise BadSampleError(f"{found}: {why}{more}; with class images, no sample can be left out")
            raise BadSampleError(
                f"{found} ({count} bad samples, --max_bad_samples is {self.limit}): {why}{more}; "
                f"--max_bad_samples {count} leaves them out"
            )

    def add_known(self, dataset: Rows, log) -> None:
        """Count these rows, and log the first of them."""
        new = [row for row in known_bad(dataset) if row not in self.rows]
        self.add({row: why_bad(dataset, row) for row in new[:NAMED]}, log)
        self.rows.update(new)
        if len(new) > NAMED:
            log(f"skipped, {len(self.rows)} of at most {self.limit} bad samples: {len(new) - NAMED:,} more like these")
