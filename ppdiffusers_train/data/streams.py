"""Tar shards that are read while they arrive, from addresses or commands, in an order that is a function of the seed.

A stream is cut into *lanes*, which take turns: the sample at position p of an epoch comes from lane p mod 8. It
reads every eighth shard of a list that goes over all of them again and again, each time in another order, and shuffles
its samples in blocks. None of this depends on the number of cards; with 1, 2, 4 or 8 of them each opens the shards of
its own lanes only.

To find a lane's n-th sample again, it must be known how many samples the shards before it hold. That is written down
when a shard has been read, in a cache folder. So a run that resumes opens one shard per lane, and reads it from its
beginning up to the block where it stopped.
"""

import contextlib
import hashlib
import re
import threading
from itertools import count, islice
from pathlib import Path

from webdataset.gopen import gopen

from ppdiffusers_train.data.order import permutation
from ppdiffusers_train.data.rows import decode_row, reading
from ppdiffusers_train.data.tar_samples import TarSample, read_samples
from ppdiffusers_train.draws import generator
from ppdiffusers_train.errors import BadSampleError, RunError, hide_tokens

STREAMED = ("http://", "https://", "pipe:")
LANES = 8
BLOCK = 128  # samples of a lane that are shuffled together
ATTEMPTS = 3


class Stream:
    """The run's samples by their position: `stream[position]` is a row like those of `Rows`.

    Positions may be asked for from several threads; it is fast where they come roughly in order.

    Args:
        shards: their addresses.
        size: how many samples make an epoch.
        seed: of the order.
        caption_field: see `tar_samples.read_samples`.
        cache_folder: where to write down how many samples each shard holds.
    """

    sequential = True

    def __init__(self, shards: list, size: int, seed: int, caption_field: str, cache_folder: Path):
        self.shards, self.size, self.seed, self.caption_field = shards, size, seed, caption_field
        self.counts = Counts(cache_folder / f"stream-{self.digest()}.txt")
        self.lanes = [Lane(self, lane, min(LANES, len(shards)), seed) for lane in range(min(LANES, len(shards)))]

    def __len__(self):
        return self.size

    def digest(self) -> str:
        """A hash of the shards' addresses: what tells this data from other data."""
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
        """The shard that comes so many shards after the first, over all epochs."""
        epoch, offset = divmod(place, len(self.shards))
        return int(permutation(self.seed, epoch, len(self.shards))[offset])

    def name(self, position: int) -> str:
        """How to call the sample at `position` in a message."""
        lane, number = self._find(position)
        return lane.names.get(number, f"sample {position} of the stream")

    def __getitem__(self, position: int) -> dict:
        """The sample at `position`, decoded.

        Raises:
            BadSampleError: it cannot be used.
            RunError: its shard cannot be read.
        """
        lane, number = self._find(position)
        return self.decode(lane.sample(number))

    @staticmethod
    def decode(sample: TarSample) -> dict:
        """A sample as a row.

        Raises:
            BadSampleError: it cannot be used.
        """
        if sample.problem:
            raise BadSampleError(f"{sample.name}: {sample.problem}")
        with reading(sample.name):
            return decode_row(sample.image, sample.captions, sample.name)


class Lane:
    """One of the interleaved parts of a stream: an endless sequence of samples, shuffled block by block."""

    def __init__(self, stream: Stream, number: int, lanes: int, seed: int):
        self.stream, self.number, self.lanes, self.seed = stream, number, lanes, seed
        self.shift = number * BLOCK // lanes  # so that lanes do not fill their blocks at the same time
        self.lock = threading.Lock()
        self.waiting, self.names = {}, {}  # by number: samples that are still to be asked for, and what they are called
        self.reader, self.at = None, None  # goes on with the sample of this number, before shuffling

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
        # Threads may still ask for the block before; what is older belongs to other ranks.
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
    """How many samples each shard holds, as far as it is known, kept in a file that several processes add lines to."""

    def __init__(self, file: Path):
        self.file, self.known = file, {}
        with contextlib.suppress(OSError, ValueError):
            self.known = dict(map(int, line.split()) for line in file.read_text().splitlines())

    def get(self, shard: int):
        """The number of samples of a shard, or None."""
        return self.known.get(shard)

    def add(self, shard: int, samples: int) -> None:
        """Write down that a shard holds so many samples."""
        if shard not in self.known:
            self.known[shard] = samples
            with contextlib.suppress(OSError):  # without the file, a resumed run reads more than it must
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a") as file:
                    file.write(f"{shard} {samples}\n")


def read_shard(address: str, caption_field: str):
    """Yield the samples of a shard; a connection that breaks is opened again.

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
                    damage = sample  # unless the command has failed, which is known when it ends
                elif index >= done:
                    done += 1
                    yield sample
            while file.read(1 << 20):
                pass
            file.close()
        except OSError as error:
            status = re.search(r"exit (\d+)", str(error))  # the rest of that message is the command once more
            failure = f"its command ended with status {status[1]}" if status else str(error)
            continue
        finally:
            with contextlib.suppress(OSError):
                if file:
                    file.close()  # where this is left early
        if damage:
            yield damage
        return
    raise RunError(
        f"{shown} could not be read in {ATTEMPTS} attempts, the last time up to its sample {done}: "
        f"{failure}; go on with --resume_from_checkpoint latest"
    )


def say_commands(addresses: list) -> None:
    """Print which commands are run for the shards, if any are."""
    commands = [address.removeprefix("pipe:") for address in addresses if address.startswith("pipe:")]
    if commands:
        print(f"--train_shards_path_or_url runs {len(commands)} commands; the first: {hide_tokens(commands[0])}")
