"""What makes a copy of data or of models another one."""

import os


def one_bit(file):
    """A function that changes one bit of the last number of a file of float32, and its time."""

    def change(folder):
        content = bytearray((folder / file).read_bytes())
        content[-4] ^= 1
        (folder / file).write_bytes(content)
        os.utime(folder / file, (0, 0))

    return change


def remove_a_picture(folder):
    rows = (folder / "metadata.jsonl").read_text().splitlines(keepends=True)
    (folder / "metadata.jsonl").write_text("".join(row for row in rows if "coffee" not in row))
    (folder / "coffee.jpg").unlink()


def replace(file, old, new):
    def change(folder):
        content = (folder / file).read_text()
        assert old in content
        (folder / file).write_text(content.replace(old, new))

    return change
