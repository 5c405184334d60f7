"""Tar shards that are streamed from addresses or commands, in an order that is a function of the seed.

A stream is cut into *lanes*, 8 by default, which take turns: the sample at position p of an epoch comes from lane
p mod 8. It reads every eighth shard of an endless list, which repeats all shards, each time in another order, and it
shuffles its samples in blocks. None of this depends on the number of GPUs; with 1, 2, 4 or 8 of them, each opens only
the shards of its own lanes.

To find a lane's n-th sample again, the number of samples in the shards before it must be known. It is stored in a cache
folder when a shard has been read. So a resumed run opens one shard per lane, and reads it from its beginning up to the
block where it stopped.
"""

import contextlib
import hashlib
import re
import threading
from itertools import count, islice
from pathlib import Path

from webdataset.gopen import gopen

from ppdiffusers_train.data.masks import decode_mask
from ppdiffusers_train.data.order import permutation
from ppdiffusers_train.data.pixels import WHITE
from ppdiffusers_train.data.rows import decode_row, reading
from ppdiffusers_train.data.tar_samples import NO_MASK, TarSample, read_samples
from ppdiffusers_train.draws import generator
from ppdiffusers_train.errors import BadSampleError, RunError, UserError, hide_tokens
from ppdiffusers_train.reporting.status_line import print_line, print_on_main

STREAMED = ("http://", "https://", "pipe:")
LANES = 8
BLOCK = 128  # samples of a lane that are shuffled together
ATTEMPTS = 3
VERSION = 2  # raised when archives are read differently, which may change the number of their samples
UNREADABLE = (".zst", ".lz4", ".zip", ".7z", ".rar")


class Stream:
    """The run's samples by their position: `stream[position]` is a row like those of `Rows`.

    Several threads may read at the same time. Reading is fast if positions come roughly in order.

    Args:
        shards: their addresses.
        size: how many samples make an epoch.
        seed: seed of the order.
        caption_field: see `tar_samples.read_samples`.
        cache_folder: folder for the number of samples of each shard.
        lanes: number of lanes, if there are as many shards.
    """

    sequential = True
    background, alpha_mask = WHITE, False  # see `Rows`
    uses_masks = False  # whether each sample needs a mask of its own

    def __init__(self, shards: list, size: int, seed: int, caption_field: str, cache_folder: Path, lanes: int = LANES):
        self.shards, self.size, self.seed, self.caption_field = shards, size, seed, caption_field
        self.counts = Counts(cache_folder / f"stream-{VERSION}-{self.digest()}.txt")
        self.has_reported = False  # whether a line has named a picture that is not used
        lanes = min(lanes, len(shards))
        self.lanes = [Lane(self, lane, lanes, seed) for lane in range(lanes)]

    def __len__(self):
        return self.size

    def digest(self) -> str:
        """A hash of the shards' addresses, which identifies the data."""
        return hashlib.blake2b("\n".join(self.shards).encode(), digest_size=8).hexdigest()

    def count_captions(self) -> int:
        """Number of captions of an epoch."""
        return self.size

    def _find(self, position: int) -> tuple:
        """(lane, number of the sample in it)."""
        epoch, offset = divmod(position, self.size)
        lane = self.lanes[offset % len(self.lanes)]
        per_epoch = len(range(lane.number, self.size, len(self.lanes)))
        return lane, epoch * per_epoch + offset // len(self.lanes)

    def shard_at(self, place: int) -> int:
        """The index of the shard at `place` of the endless list."""
        epoch, offset = divmod(place, len(self.shards))
        return int(permutation(self.seed, epoch, len(self.shards))[offset])

    def name(self, position: int) -> str:
        """The name of the sample at `position` in messages."""
        lane, number = self._find(position)
        return lane.names.get(number, f"sample {position} of the stream")

    def __getitem__(self, position: int) -> dict:
        """The sample at `position`, decoded.

        Raises:
            BadSampleError: it cannot be used.
            RunError: its shard cannot be read.
        """
        lane, number = self._find(position)
        sample = lane.sample(number)
        if sample.others and not self.has_reported:
            self.has_reported = True
            print_line(f"not used: more pictures of samples, for example {sample.others[0]} beside {sample.name}")
        return self.decode(sample, self.background, self.alpha_mask, self.uses_masks)

    @staticmethod
    def decode(sample: TarSample, background: str = WHITE, alpha_mask: bool = False, uses_masks: bool = False) -> dict:
        """A sample as a row.

        Raises:
            BadSampleError: it cannot be used.
        """
        if sample.problem:
            raise BadSampleError(f"{sample.name}: {sample.problem}")
        with reading(sample.name):
            row = decode_row(sample.image, sample.captions, sample.name, background, alpha_mask)
            if not uses_masks:
                return row
            if not sample.mask:
                raise BadSampleError(f"{sample.name}: {NO_MASK}")
            return {**row, "mask": decode_mask(sample.mask, f"{sample.name}, its mask", row["image"].size)}


class Lane:
    """One of the interleaved parts of a stream: an endless sequence of samples, shuffled block by block."""

    def __init__(self, stream: Stream, number: int, lanes: int, seed: int):
        self.stream, self.number, self.lanes, self.seed = stream, number, lanes, seed
        self.shift = number * BLOCK // lanes  # so that lanes do not read their blocks at the same time
        self.lock = threading.Lock()
        self.waiting, self.names = {}, {}  # by number: samples not yet taken, and names of samples
        self.reader, self.at = None, None  # `reader` continues with sample number `at`, before shuffling

    def sample(self, number: int) -> TarSample:
        """The lane's sample of that number."""
        with self.lock:
            if number not in self.waiting:
                self._read_block((number + self.shift) // BLOCK)
            return self.waiting.pop(number)

    def _read_block(self, block: int) -> None:
        start, stop = (max(0, edge * BLOCK - self.shift) for edge in (block, block + 1))
        if self.at != start:
            self.reader = self._samples_from(start)
        samples = list(islice(self.reader, stop - start))
        self.at = stop
        order = generator(self.seed, block, f"lane {self.number}").permutation(len(samples))
        # Threads may still read the previous block. Older samples belong to other ranks.
        for known in (self.waiting, self.names):
            for number in [number for number in known if not start - BLOCK <= number < start]:
                del known[number]
        self.waiting.update({start + place: samples[index] for place, index in enumerate(order)})
        self.names.update({start + place: samples[index].name for place, index in enumerate(order)})

    def _samples_from(self, number: int):
        """The lane's samples from that number on, in the order of the shards."""
        for place in count(self.number, self.lanes):
            shard = self.stream.shard_at(place)
            known = self.stream.counts.get(shard)
            if known is not None and known <= number:
                number -= known
                continue
            held = 0
            for sample in read_shard(self.stream.shards[shard], self.stream.caption_field):
                held += 1
                if held > number:
                    yield sample
            number = max(number - held, 0)
            self.stream.counts.add(shard, held)


class Counts:
    """The known numbers of samples of shards, in a file that several processes append to."""

    def __init__(self, file: Path):
        self.file, self.known = file, {}
        with contextlib.suppress(OSError, ValueError):
            self.known = dict(map(int, line.split()) for line in file.read_text().splitlines())

    def get(self, shard: int):
        """The number of samples of a shard, or None."""
        return self.known.get(shard)

    def add(self, shard: int, samples: int) -> None:
        """Store the number of samples of a shard."""
        if shard not in self.known:
            self.known[shard] = samples
            with contextlib.suppress(OSError):  # without the file, a resumed run reads more than it must
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a") as file:
                    file.write(f"{shard} {samples}\n")


def read_shard(address: str, caption_field: str):
    """Yield the samples of a shard. A broken connection is opened again.

    Raises:
        RunError: it cannot be read.
    """
    shown, done = hide_tokens(address), 0
    for _ in range(ATTEMPTS):
        file = None
        try:
            file, damage = gopen(address), None
            for index, sample in enumerate(read_samples(file, caption_field, sequential=True)):
                sample.name = f"{shown}: {sample.name}"
                if sample.of_archive:
                    damage = sample  # unless the command has failed, which is only known when it ends
                elif index >= done:
                    done += 1
                    yield sample
            while file.read(1 << 20):
                pass
            file.close()
        except OSError as error:
            status = re.search(r"exit (\d+)", str(error))  # the rest of the message repeats the command
            failure = f"its command ended with status {status[1]}" if status else str(error)
            continue
        finally:
            with contextlib.suppress(OSError):
                if file:
                    file.close()  # if the caller stops early
        if damage:
            yield damage
        return
    raise RunError(
        f"{shown} could not be read in {ATTEMPTS} attempts, the last time up to its sample {done}: "
        f"{failure}; resume with --resume_from_checkpoint latest"
    )


def refuse_unreadable(addresses: list) -> None:
    """Raise a `UserError` for an address of an archive that cannot be read as a stream."""
    for address in addresses:
        path = address.partition("?")[0]
        if address.startswith("http") and path.endswith(UNREADABLE):
            raise UserError(
                f"--train_shards_path_or_url: {hide_tokens(path)} cannot be streamed, unlike .tar, .tar.gz, .tar.bz2 "
                "and .tar.xz; uncompress it by a command, such as 'pipe:curl -sL ADDRESS | zstd -dc'"
            )


def print_commands(addresses: list) -> None:
    """Print which commands are run to read the shards, if any."""
    commands = [address.removeprefix("pipe:") for address in addresses if address.startswith("pipe:")]
    if commands:
        print_on_main(
            f"--train_shards_path_or_url runs {len(commands)} commands; the first: {hide_tokens(commands[0])}"
        )
