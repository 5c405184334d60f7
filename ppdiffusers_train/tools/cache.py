"""`ppdiffusers-train cache`: lists the samples of a cache, and removes those that no data needs any more."""

import contextlib
import json
import sys
from pathlib import Path

from ppdiffusers_train.arguments.parser import Flag
from ppdiffusers_train.errors import UserError
from ppdiffusers_train.tools.source_flags import add_source_flags


def add_cache_command(commands) -> None:
    """Add the command `cache` to `ppdiffusers-train`."""
    command = commands.add_parser(
        "cache", help="list the encoded samples of a cache, and remove those that no data needs",
        description="List what a folder of --encoded_cache_dir holds: the models and settings that encoded samples, "
        "their number and size. With --train_data_dir, report how many samples that data does not need, too.",
    )  # fmt: skip
    add = command.add_argument
    add("folder", metavar="DIR", help="List the cache in this folder: an --encoded_cache_dir, or OUTPUT_DIR/encoded.")
    add(
        "--train_data_dir", nargs="+", metavar="DATA",
        help="Compare the cache with all data that needs it: folders of images, tar shards, datasets of the hub.",
    )  # fmt: skip
    add(
        "--prune", action=Flag,
        help="Remove samples that this data does not need, samples of older versions, and damaged packs.",
    )  # fmt: skip
    add_source_flags(command)
    command.set_defaults(run=inspect_cache)


def inspect_cache(args) -> None:
    """Print what a cache holds; with `--prune`, also remove the samples that are not needed.

    Raises:
        UserError: there is no cache, it cannot be read or changed, or data is missing.
    """
    from ppdiffusers_train.tools.cached_samples import as_text, held_keys, list_encoded, needed_keys

    if args.prune and not args.train_data_dir:
        raise UserError("--prune: needs --train_data_dir with all data whose samples are to be kept")
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        everything = list_encoded(Path(args.folder))
        needed = needed_keys(args, held_keys(everything)) if args.train_data_dir else None
        found = [encoded.as_json(needed) for encoded in everything]
        try:
            for encoded in everything if args.prune else ():
                encoded.prune(needed)
        except OSError as error:
            raise UserError(f"--prune: {error}") from error
    result = {"encoders": found, "pruned": args.prune}
    print(json.dumps(result, ensure_ascii=False) if args.json else as_text(args.folder, found, args.prune))
