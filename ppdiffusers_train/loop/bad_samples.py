"""Samples that cannot be used: logged once, counted, and skipped up to the limit that the user sets."""

from ppdiffusers_train.errors import BadSampleError


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
            self.rows.add(row)
            if len(self.rows) > self.limit:
                allowed = f" ({len(self.rows)} bad samples, --max_bad_samples is {self.limit})" if self.limit else ""
                raise BadSampleError(message + allowed)
            log(f"skipped, {len(self.rows)} of at most {self.limit} bad samples: {message}")
