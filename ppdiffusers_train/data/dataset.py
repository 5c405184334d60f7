"""Opens the data that a run's flags name: a folder of images, a dataset of the hub, or tar shards."""

import argparse
import os
from pathlib import Path

import numpy as np
from huggingface_hub.constants import HF_HOME

from ppdiffusers_train.data.folder_kinds import SHARDS, TABLES, look_into
from ppdiffusers_train.data.hub_datasets import image_repository
from ppdiffusers_train.data.image_folder import THREE_WAYS, build_folder
from ppdiffusers_train.data.masks import MaskRows
from ppdiffusers_train.data.order import permutation
from ppdiffusers_train.data.rows import Rows
from ppdiffusers_train.draws import generator
from ppdiffusers_train.errors import UserError


def build_dataset(args):
    """The samples that `--train_shards_path_or_url`, `--dataset_name` or `--train_data_dir` names.

    Returns:
        `Rows`, which can be read in any order, or a `Stream`, which cannot.
    Raises:
        UserError: no data is named, or it cannot be used.
    """
    if args.train_shards_path_or_url:
        dataset = build_shards(args)
    elif args.train_data_dir or args.dataset_name:
        dataset = build_images(args)
    else:
        raise UserError(
            "no data: expected --train_data_dir DIR, --dataset_name NAME or --train_shards_path_or_url SHARDS"
        )
    dataset.background = args.background_color
    dataset.alpha_mask = mask_source(args)[0] == "alpha"
    dataset, held_out = hold_out(args, dataset)
    if isinstance(dataset, Rows) and args.max_train_samples is not None and args.max_train_samples < len(dataset):
        dataset = dataset.select(permutation(args.seed or 0, 0, len(dataset))[: args.max_train_samples])
    dataset.held_out = held_out
    if mask_source(args)[0] in ("file", "column"):
        dataset.uses_masks = True  # of a stream
        for part, rows in {"trained": dataset, "held out": held_out}.items():
            if isinstance(rows, Rows):
                rows.masks = MaskRows(rows, part)
    return dataset


def mask_source(args) -> tuple:
    """Where masks are: ("file", None), ("column", its name), ("alpha", None), or (None, None) if there are none.

    Raises:
        UserError: flags contradict each other.
    """
    if "masked_loss" not in vars(args):  # in a job whose loss has no area
        return None, None
    if args.mask_column and args.alpha_mask:
        raise UserError("--alpha_mask: there is --mask_column as well; expected one of them")
    kinds = {"alpha": args.alpha_mask, "column": args.mask_column, "file": args.masked_loss}
    kind = next((kind for kind, given in kinds.items() if given), None)
    if args.masked_area_weight and not kind:
        raise UserError(
            "--masked_area_weight: there are no masks; expected --masked_loss, --mask_column NAME or --alpha_mask"
        )
    return kind, args.mask_column


def hold_out(args, dataset) -> tuple:
    """(the samples to train on, those of which `--validation_loss_steps` reports the loss, or None).

    The latter are those of `--validation_data_dir`, or a share of the training samples, `--validation_split`, or else
    the split `validation` of the data.

    Raises:
        UserError: the flags contradict each other, or there are no such samples.
    """
    if "validation_loss_steps" not in vars(args):  # a job of a user's own may have fewer flags
        return dataset, None
    flags = {"--validation_data_dir": args.validation_data_dir, "--validation_split": args.validation_split}
    given = [flag for flag, value in flags.items() if value is not None]
    if args.validation_loss_steps is None:
        if given:
            raise UserError(f"{given[0]}: expected --validation_loss_steps N as well, which uses it")
        return dataset, None
    if len(given) > 1:
        raise UserError("--validation_split: there is --validation_data_dir as well; expected one of them")
    if args.validation_split is not None:
        return divide(dataset, args.validation_split, args.seed or 0)
    own = {"repeats": None, "train_shards_path_or_url": None, "dataset_split": "validation"}
    if args.validation_data_dir:
        own |= {"train_data_dir": args.validation_data_dir, "dataset_name": None, "dataset_split": "train"}
        own["dataset_config_name"] = None
    elif args.train_shards_path_or_url:
        raise UserError("--validation_loss_steps: expected --validation_data_dir or --validation_split with shards")
    try:
        held_out = build_images(argparse.Namespace(**{**vars(args), **own}), is_held_out=True)
    except UserError as error:
        reason = str(error).removeprefix("--train_data_dir: ")  # which `own` has replaced
        if given:
            raise UserError(f"{given[0]}: {reason}") from error
        raise UserError(
            f"--validation_loss_steps: the data have no split named validation ({reason}); expected "
            "--validation_data_dir DIR or --validation_split X"
        ) from error
    held_out.background, held_out.alpha_mask = args.background_color, dataset.alpha_mask
    return dataset, held_out


def divide(rows, share: float, seed: int) -> tuple:
    """(the other rows, a random share of them, at least one), both in their order."""
    if not isinstance(rows, Rows):
        raise UserError("--validation_split: a stream cannot be divided; expected --validation_data_dir")
    count = max(1, round(share * len(rows)))
    if count >= len(rows):
        raise UserError(f"--validation_split: {share:g} of {len(rows)} samples leaves none to train on")
    chosen = generator(seed, 0, "held out").permutation(len(rows))
    return rows.select(np.sort(chosen[count:])), rows.select(np.sort(chosen[:count]))


def build_images(args, is_held_out=False) -> Rows:
    """The samples of `--train_data_dir` or `--dataset_name`; those of the split of a folder only if they are held out,
    because a run trains on all of a folder."""
    if not args.dataset_name and not os.path.isdir(args.train_data_dir):
        table = "; --dataset_name takes files of tables" if os.path.isfile(args.train_data_dir) else ""
        raise UserError(f"--train_data_dir: {args.train_data_dir!r} is not a folder; {THREE_WAYS}{table}")
    kind, args, listing = look_at(args)
    if kind == SHARDS and not len(listing.names):
        raise UserError(f"{args.train_data_dir!r} holds tar shards; give it as --train_shards_path_or_url")
    if kind != TABLES:
        if not is_held_out:
            refuse_split(args, "a folder of images has none; --train_data_dir takes the folder of one split")
        return build_folder(args, listing, index_folder(args), mask_source(args))
    refuse_folder_flags(args)
    if mask_source(args)[0] == "file":
        raise UserError("--masked_loss: a table has no files beside its images; expected --mask_column NAME")
    from ppdiffusers_train.data.table_sources import build_table  # only here: `datasets` takes a while to import

    return build_table(args, index_folder(args))


def look_at(args) -> tuple:
    """(kind of the data that `--dataset_name` or `--train_data_dir` names, flags to read it, `Listing` of a folder).

    The flags name another folder where the data have been downloaded or unpacked. A folder of images is always named by
    `--train_data_dir`.
    """
    source = args.dataset_name or args.train_data_dir
    if args.dataset_config_name or (args.dataset_name and args.train_data_dir) or os.path.isfile(source):
        return TABLES, args, None
    if not os.path.isdir(source):
        source = image_repository(source, args.cache_dir)
        if source is None:
            return TABLES, args, None
    kind, folder, listing = look_into(source, index_folder(args))
    flags = {"dataset_name": None, "train_data_dir": folder}
    if kind == TABLES and args.dataset_name:
        flags = {"dataset_name": folder}
    return kind, argparse.Namespace(**{**vars(args), **flags}), listing


def refuse_split(args, reason: str) -> None:
    """Raise a `UserError` if `--dataset_split` names a split other than the default."""
    if args.dataset_split != "train":
        raise UserError(f"--dataset_split: {reason}")


def refuse_folder_flags(args) -> None:
    """Raise a `UserError` for a flag that only has an effect on a folder of images, for other data."""
    for name in ("caption", "caption_separator", "repeats"):
        if getattr(args, name) is not None:
            raise UserError(f"--{name}: has an effect only on a folder of images, as of --train_data_dir")


def index_folder(args) -> Path:
    """Where indices of data sets are kept: never beside the data. A job with data of its own may lack these flags."""
    index_dir = args.index_dir if "index_dir" in vars(args) else None
    cache_dir = args.cache_dir if "cache_dir" in vars(args) else None
    return Path(index_dir or Path(cache_dir or HF_HOME) / "ppdiffusers_train")


def build_shards(args):
    """The samples of `--train_shards_path_or_url`, local or streamed."""
    from webdataset.shardlists import expand_urls  # only here, too

    from ppdiffusers_train.data.shards import local_shards, open_shards
    from ppdiffusers_train.data.streams import STREAMED, Stream, print_commands, refuse_unreadable

    flag, source = "--train_shards_path_or_url", args.train_shards_path_or_url
    if args.train_data_dir or args.dataset_name:
        raise UserError(f"{flag}: there is --train_data_dir or --dataset_name as well; expected one of them")
    refuse_split(args, f"shards have no splits; expected the shards of one split for {flag}")
    refuse_folder_flags(args)
    masks, _ = mask_source(args)
    if masks == "column":
        raise UserError("--mask_column: shards have no columns; expected --masked_loss, with files such as 0.mask.png")
    cache_folder = index_folder(args)
    addresses = expand_urls(source)
    streamed = [address for address in addresses if address.startswith(STREAMED)]
    if not streamed:
        return open_shards(local_shards(addresses), args.caption_column, cache_folder, masks == "file")
    if len(streamed) < len(addresses):
        raise UserError(f"{flag}: {source!r} is streamed in part; expected either files, or http(s):// and pipe:")
    for name in ("encoded_cache_dir", "aspect_ratio_buckets"):
        if getattr(args, name, None):
            raise UserError(f"--{name}: needs shards in a local folder, because a stream cannot be read beforehand")
    if args.max_train_samples is None:
        raise UserError("--max_train_samples: missing; expected how many samples of the stream make an epoch")
    refuse_unreadable(streamed)
    print_commands(streamed)
    return Stream(
        streamed, args.max_train_samples, args.seed or 0, args.caption_column, cache_folder, args.stream_lanes
    )
