"""Class images for prior preservation: what the flags ask for, and those that the base model has to generate."""

import json
from pathlib import Path

from ppdiffusers_train.data.arrow_files import atomic_file, remove_leftovers
from ppdiffusers_train.data.class_images import ClassImages, WithClassImages, class_images, generated_name
from ppdiffusers_train.data.rows import Rows
from ppdiffusers_train.draws import generator
from ppdiffusers_train.errors import UserError, writing
from ppdiffusers_train.module import evaluation
from ppdiffusers_train.reporting.status_line import StatusLine, counted
from ppdiffusers_train.runtime.agreement import ranks_elsewhere
from ppdiffusers_train.runtime.checkpoint import require_writable
from ppdiffusers_train.runtime.precision import Precision

ABOUT = "generated.json"  # what has generated the images of a folder
AT_ONCE = 4  # images that a rank generates before it writes them and takes the next


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
        run.log(f"{folder}: {counted(len(missing), 'class image')} would be generated")
        return dataset
    if any(run.ranks.gather_objects(len(missing))):
        generate_class_images(module, folder, run)
    return WithClassImages(dataset, ClassImages(str(folder), names, args.class_prompt))


def generate_class_images(module, folder: Path, run) -> None:
    """Generate the images that are missing in `folder`, by all ranks together.

    The seed of an image depends on that of the run and on its number alone. Models that are loaded for it are freed
    again.
    """
    args, ranks, unloaded = run.args, run.ranks, set(module.not_loaded())
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
            describe(folder, args)
    missing = ranks.broadcast_object(class_images(folder, args.num_class_images)[1])
    run.log(f"{folder}: {counted(len(missing), 'class image')} of {args.num_class_images} are still to be generated")
    precision, done = Precision(args.mixed_precision, args.amp_level), ranks.counter()
    with (
        evaluation(module),
        precision.autocast(),
        StatusLine("generating", "images", len(missing), visible=ranks.is_main) as status,
    ):
        for piece in ranks.pieces(len(missing), AT_ONCE):
            numbers = missing[piece.start : piece.stop]
            seeds = [int(generator(args.seed, number, "class image").integers(2**31)) for number in numbers]
            for number, image in zip(numbers, module.generate([args.class_prompt] * len(seeds), seeds)):
                with (
                    writing("--class_data_dir: class images", folder),
                    atomic_file(folder / generated_name(number)) as new,
                ):
                    image.save(new, format="PNG")
            status.advance(done(len(numbers)) - status.done)  # by all ranks
    ranks.wait_for_all("the others to generate their class images")
    module.unload(unloaded - set(module.not_loaded()))


def describe(folder: Path, args) -> None:
    """Write into a folder what generates its images; raise a `UserError` if something else has generated some."""
    about = {name: value for name, value in sorted(vars(args).items()) if name.startswith("pretrained_")}
    about = {"class_prompt": args.class_prompt, **about}
    file = folder / ABOUT
    if file.exists():
        before = json.loads(file.read_text("utf-8"))
        for name in sorted(about.keys() | before.keys()):
            if before.get(name) != about.get(name):
                raise UserError(
                    f"--class_data_dir: images in {str(folder)!r} were generated with --{name} {before.get(name)}, now "
                    f"it is {about.get(name)}; expected another folder"
                )
    with writing("--class_data_dir: class images", folder):
        file.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
