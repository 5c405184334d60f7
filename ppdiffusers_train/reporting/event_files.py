"""The files that the trackers' libraries write, with write errors that the run can check.

VisualDL and tensorboardX write in threads of their own. After an error such as a full disk, VisualDL's thread continues
with a damaged file, and tensorboardX's ends, so that the run waits forever once its queue is full. Both libraries
support other file systems, chosen by the prefix of a path. `EventFiles` is such a file system on the local disk. It
keeps the first error for the run, and writes nothing more after it.
"""

import contextlib
import os

PREFIX = "event-files"


class EventFiles:
    """The files of one tracker. `error` is the first error that occurred, or None.

    The methods up to `append` are those of VisualDL's interface for file systems; `directory_check` and `open` are
    those of tensorboardX's.
    """

    join = staticmethod(os.path.join)

    def __init__(self):
        self.error = None

    @staticmethod
    def path_of(folder) -> str:
        """The path of a local folder with the prefix that makes a library use these files."""
        return f"{PREFIX}://{os.path.abspath(folder)}"

    def exists(self, path) -> bool:
        return os.path.exists(local(path))

    def makedirs(self, path) -> None:
        os.makedirs(local(path), exist_ok=True)

    def write(self, path, content, binary_mode=False) -> None:
        if self.error is not None:
            return
        path = local(path)
        size = os.path.getsize(path) if os.path.exists(path) else 0
        try:
            with open(path, "ab") as file:
                file.write(content)
        except OSError as error:
            self.error = error
            with contextlib.suppress(OSError):  # half a record would make VisualDL's whole file unreadable
                os.truncate(path, size)

    append = write
    directory_check = makedirs

    def open(self, path):
        return EventFile(self, path)

    def check(self) -> None:
        """Raise the error, if there was one."""
        if self.error is not None:
            raise self.error


class EventFile:
    """One of tensorboardX's files."""

    def __init__(self, files: EventFiles, path):
        self.files, self.path, self.parts = files, path, []

    def write(self, content) -> None:
        self.parts.append(content)

    def flush(self) -> None:
        content, self.parts = b"".join(self.parts), []
        self.files.write(self.path, content)

    close = flush


def local(path) -> str:
    """A path without the prefix."""
    return path.removeprefix(f"{PREFIX}://")
