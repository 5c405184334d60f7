"""Samples that cannot be used: named once, counted, and skipped as far as the user allows."""

from ppdiffusers_train.errors import BadSampleError


class BadSamples:
    """The rows of a dataset that could not be used so far, the same on every rank.

    Args:
        limit: how many may be skipped.
        rows: those known already, from a checkpoint.
    """

    def __init__(self, limit: int, rows=()):
        self.limit, self.rows = limit, set(rows)

    def add(self, found: dict, say) -> None:
        """Count `{row: message}`, and say of the new ones that they are skipped.

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
            say(f"skipped, {len(self.rows)} of at most {self.limit} bad samples: {message}")
