"""Class images for prior preservation: what the flags ask for, and those that the base model has to generate."""

import json
from pathlib import Path

from ppdiffusers_train.data.arrow_files import atomic_file, remove_leftovers
from ppdiffusers_train.data.class_images import (
    ClassImages,
    WithClassImages,
    class_images,
    generated_name,
    is_generated,
)
from ppdiffusers_train.data.dataset import index_folder
from ppdiffusers_train.data.encoders_key import file_digest
from ppdiffusers_train.data.rows import Rows
from ppdiffusers_train.draws import generator
from ppdiffusers_train.errors import UserError, writing
from ppdiffusers_train.module import evaluation
from ppdiffusers_train.reporting.status_line import StatusLine, counted
from ppdiffusers_train.runtime.agreement import found_by_main, ranks_elsewhere
from ppdiffusers_train.runtime.checkpoint import require_writable, write_text
from ppdiffusers_train.runtime.precision import Precision

ABOUT = "generated.json"  # what has generated the images of a folder
AT_ONCE = 4  # images that a rank generates before it writes them and takes the next
# Flags that only class images need, with their defaults.
FLAGS = {
    "class_data_dir": None, "class_prompt": None, "num_class_images": 100, "prior_loss_weight": 1.0,
    "prior_generation_precision": None,
}  # fmt: skip


def wants_class_images(args) -> bool:
    """Whether a run trains on class images, too.

    Raises:
        UserError: flags are missing, or contradict each other.
    """
    if not hasattr(args, "class_prompt"):  # as in distillation
        return False
    given = {"--class_data_dir": args.class_data_dir, "--class_prompt": args.class_prompt}
    if args.with_prior_preservation is False or not (args.with_prior_preservation or any(given.values())):
        return False
    for flag, value in given.items():
        if not value:
            raise UserError(
                f"{flag}: missing; --with_prior_preservation needs --class_data_dir DIR and --class_prompt TEXT"
            )
    if args.max_bad_samples:
        raise UserError("--max_bad_samples: expected 0 with class images, because each sample has one of them")
    folder = Path(args.class_data_dir).resolve()
    for name in ("train_data_dir", "validation_data_dir"):
        other = getattr(args, name, None)
        if other and (folder.is_relative_to(Path(other).resolve()) or Path(other).resolve().is_relative_to(folder)):
            raise UserError(
                f"--class_data_dir: {args.class_data_dir!r} and --{name} are one folder, or one lies in the other; "
                "expected a folder of its own"
            )
    return True


def notices(args):
    """One line for each flag of class images that has no effect, because there are none, or at all."""
    if not wants_class_images(args):
        for name, default in FLAGS.items():
            if getattr(args, name, default) != default:
                yield f"--{name} {getattr(args, name)}: no effect without class images"
    if getattr(args, "sample_batch_size", None):
        yield f"--sample_batch_size {args.sample_batch_size}: no effect, class images are generated one at a time"
    if hasattr(args, "set_grads_to_none") and args.set_grads_to_none:
        yield "--set_grads_to_none: no effect, gradients are always freed after a step"


def add_class_images(module, dataset, run):
    """The data set of a run with its class images, if it has any; missing ones are generated before.

    Raises:
        UserError: the data are a stream, or images of the folder were generated for another run.
    """
    args = run.args
    if not wants_class_images(args):
        return dataset
    if not isinstance(dataset, Rows):
        raise UserError("--class_data_dir: needs data that can be read in any order; expected no stream")
    folder = Path(args.class_data_dir)
    names, missing = class_images(folder, args.num_class_images)
    if args.dry_run:
        refuse_changed_process(module, missing)
        run.log(f"{folder}: {counted(len(missing), 'class image')} would be generated")
    else:
        origin = found_by_main(run.ranks, lambda: origin_of_images(module, folder, run))
        if any(run.ranks.gather_objects(len(missing))):
            generate_class_images(module, folder, run, origin)
    return WithClassImages(dataset, ClassImages(str(folder), names, args.class_prompt))


def refuse_changed_process(module, missing: list) -> None:
    """Raise a `UserError` if images are missing, and flags train the base for another process than its own."""
    if missing and (flag := module.changed_process()):
        raise UserError(
            f"{flag}: the base's scheduler says otherwise, so {counted(len(missing), 'class image')} cannot be "
            "generated; expected all of them in --class_data_dir, for example from a run without this flag"
        )


def generate_class_images(module, folder: Path, run, origin: dict) -> None:
    """Generate the images that are missing in `folder`, by all ranks together.

    The seed of an image depends on its number alone, so that any run can go on where another was stopped. Models that
    are loaded for it are freed again.

    Args:
        origin: the result of `origin_of_images`.
    """
    args, ranks, unloaded = run.args, run.ranks, set(module.not_loaded())
    refuse_changed_process(module, ranks.broadcast_object(class_images(folder, args.num_class_images)[1]))
    require_writable(folder, "--class_data_dir")
    elsewhere = ranks_elsewhere(folder, ranks) if ranks.world_size > 1 else ()
    if elsewhere:
        raise UserError(
            f"--class_data_dir: rank {elsewhere[0]} has another folder than rank 0; expected one that all ranks share, "
            "because they divide the work"
        )
    with ranks.only_main("the class images to be listed") as is_main:
        if is_main:
            remove_leftovers(folder)
            with writing("--class_data_dir: class images", folder):
                write_text(folder / ABOUT, json.dumps(origin, indent=1, ensure_ascii=False) + "\n")
    missing = ranks.broadcast_object(class_images(folder, args.num_class_images)[1])
    run.log(f"{folder}: {counted(len(missing), 'class image')} of {args.num_class_images} are still to be generated")
    kind = args.prior_generation_precision or args.mixed_precision
    precision, done = Precision("no" if kind == "fp32" else kind, args.amp_level), ranks.counter()
    with (
        evaluation(module),
        precision.autocast(),
        StatusLine("generating", "images", len(missing), visible=ranks.is_main) as status,
    ):
        for piece in ranks.pieces(len(missing), AT_ONCE):
            numbers = missing[piece.start : piece.stop]
            seeds = [int(generator(0, number, "class image").integers(2**31)) for number in numbers]
            for number, image in zip(numbers, module.generate([args.class_prompt] * len(seeds), seeds)):
                with (
                    writing("--class_data_dir: class images", folder),
                    atomic_file(folder / generated_name(number)) as new,
                ):
                    image.save(new, format="PNG")
            status.advance(done(len(numbers)) - status.done)  # by all ranks
    ranks.wait_for_all("the others to generate their class images")
    module.unload(unloaded - set(module.not_loaded()))


def origin_of_images(module, folder: Path, run):
    """What generates the class images of a run, as JSON; None if it uses no generated ones.

    Prompt, flags, and hashes of the files of the base: folders of the base may be called and lie as they like.

    Raises:
        UserError: images that the folder holds were generated by something else, or it is not known by what.
    """
    args = run.args
    names, missing = class_images(folder, args.num_class_images)
    if not any(map(is_generated, names)):
        return None
    flags = {"class_prompt": args.class_prompt, **module.generation_settings()}
    digests = {part: file_digest(files, index_folder(args)) for part, files in module.generation_files().items()}
    origin = json.loads(json.dumps({"flags": flags, "base": digests}))
    there = sorted(path.name for path in folder.glob("*") if is_generated(path.name))
    if there:
        refuse_other_origin(folder, there[0], missing, origin)
    return origin


def refuse_other_origin(folder: Path, image: str, missing: list, origin: dict) -> None:
    """Raise a `UserError` unless the images that were generated in a folder have this origin.

    Args:
        image: the name of one of them.
        missing: the numbers of those that are still to be generated.
    """
    start, way_out = f"--class_data_dir: {str(folder)!r}", "expected another folder, or this one without class-*.png"
    try:
        before = json.loads((folder / ABOUT).read_text("utf-8"))
        flags, base = dict(before["flags"]), dict(before["base"])
    except FileNotFoundError:
        if missing:
            raise UserError(f"{start} has {image}, and no {ABOUT} says what has generated it; {way_out}") from None
        return  # as images of one's own
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise UserError(
            f"{start} has {image}, and a {ABOUT} that cannot be read; {way_out}, or without {ABOUT} if the images are "
            "those of this prompt and base"
        ) from error
    for name, value in {**dict.fromkeys(flags), **origin["flags"]}.items():
        if flags.get(name) != value:
            raise UserError(
                f"{start} has images that were generated with --{name} {flags.get(name)}, now it is {value}; {way_out}"
            )
    for part, digest in {**dict.fromkeys(base), **origin["base"]}.items():
        if base.get(part) != digest:
            raise UserError(f"{start} has images that were generated by another base: its {part} differs; {way_out}")
