"""`--dry_run`: prints what a run would do and how much memory it would need.

The module has models of their real size without weights. Weights, gradients and the optimizer's state are counted.
Activations are measured: the job's own forward and backward pass of one sample, at resolutions small enough for any
machine, extrapolated to the resolution of the run.
"""

import argparse
from dataclasses import replace

import paddle.distributed as dist

from ppdiffusers_train.data.loader import stack
from ppdiffusers_train.data.rows import Rows, with_one_caption
from ppdiffusers_train.draws import Draws, RowDraws
from ppdiffusers_train.errors import BadSampleError, UserError
from ppdiffusers_train.loop import optimizers
from ppdiffusers_train.loop.memory_estimate import (
    Inventory,
    Options,
    Peaks,
    StepMeter,
    extrapolate,
    extrapolate_peak,
    take_inventory,
)
from ppdiffusers_train.loop.optimizers import optimizer_name
from ppdiffusers_train.loop.plan import Plan
from ppdiffusers_train.loop.step import set_training_mode
from ppdiffusers_train.module import choose_trainable, encode_batch
from ppdiffusers_train.reporting.status_line import counted
from ppdiffusers_train.runtime.quantized import quantize_models, quantized_size

MEASURED = (128, 192, 256)  # heights and widths in pixels; below, gradients of weights hide the activations
GPU_SIZES = (8, 12, 16, 24, 40, 80)  # GB


def describe_run(plan: Plan) -> None:
    """Print what the run would do and how much memory it would need."""
    module, dataset, args = plan.module, plan.dataset, plan.run.args
    print(f"{module.title}: a dry run, nothing is loaded, trained or written\n\nmodels")
    trainable = {id(parameter) for parameter in module.trainable_parameters()}
    for name, model in module.named_children():
        size = sum(parameter.size for parameter in model.parameters()) + quantized_size(model)
        trained = sum(parameter.size for parameter in model.parameters() if id(parameter) in trainable)
        role = (
            f"{trained:,} trainable" if trained else "frozen, encodes samples" if name in module.encoders else "frozen"
        )
        role += f", frozen weights in {module.quantized[name]}" if quantized_size(model) else ""
        print(f"  {name:<16} {size:>15,} parameters of {type(model).__name__}, {role}")

    inventory, options = inventory_of(module, first_row(dataset), args), options_of(args)
    captions = dataset.count_captions()
    entries = captions * args.cache_variants
    beside = counted(plan.order.class_rows, "class image") if plan.order.class_rows else ""
    samples = counted(len(dataset) - plan.order.class_rows, "sample")
    print(f"\ndata\n  {samples}{beside and f' and {beside}'} with {counted(captions, 'caption')}")
    per_step = counted(plan.run.samples_per_step, "sample")
    print(
        f"  {counted(plan.total_steps, 'step')} of {per_step}{beside and ' and as many class images'}: "
        f"{plan.total_steps / plan.steps_per_epoch:.1f} epochs of {counted(plan.steps_per_epoch, 'step')}"
    )
    print(
        f"  {captions} x {args.cache_variants} encoded samples of {human(inventory.encoded)}: "
        f"{human(entries * inventory.encoded)} on disk "
        + (f"in {args.encoded_cache_dir}" if options.cached else "with --encoded_cache")
    )

    if isinstance(dataset, Rows) and (summary := dataset.summary()):
        print(f"  {summary}")

    print("\nmemory per GPU")
    for name, size in inventory.memory(options).items():
        print(f"  {name:<32} {human(size):>10}")
    for name, size in inventory.phases(options).items():
        print(f"  {f'total, {name}':<32} {human(size):>10}")
    peak = inventory.peak(options)
    print(f"  {'peak':<32} {human(peak):>10}   {fitting(peak)}")
    print("  (activations: measured on one sample of at most 256 pixels, extrapolated to this run's)")
    print("\nwhat would reduce it")
    for saving, flag in sorted(savings(inventory, options), reverse=True):
        print(f"  {flag:<28} -{human(saving)}")


def human(size: int) -> str:
    """A number of bytes in GB or MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def fitting(size: int) -> str:
    """The smallest GPU with enough memory, or that there is none."""
    fits = next((gigabytes for gigabytes in GPU_SIZES if size <= gigabytes * 1e9), None)
    return f"fits a GPU with {fits} GB" if fits else f"does not fit a GPU with {GPU_SIZES[-1]} GB"


def options_of(args) -> Options:
    """The flags on which memory depends."""
    return Options(
        args.train_batch_size, args.mixed_precision, args.amp_level, args.use_ema, args.use_8bit_adam,
        args.sharding_degree, args.gradient_checkpointing, args.encoded_cache_dir is not None, dist.get_world_size(),
        optimizer_name(vars(args)), tuple(optimizers.options_of(args).items()), args.fused_backward,
        args.param_dtype, args.param_rounding,
    )  # fmt: skip


def savings(inventory: Inventory, options: Options):
    """(bytes, flag) of each change of the flags that would reduce the peak."""
    changes = {
        "--gradient_checkpointing": {"gradient_checkpointing": True},
        "--encoded_cache": {"cached": True},
        "--mixed_precision bf16": {"mixed_precision": "bf16"},
        "--use_8bit_adam": {"use_8bit_adam": True},
        "--no_use_ema": {"use_ema": False},
        "--train_batch_size 1": {"train_batch_size": 1},
    }
    now = inventory.peak(options)
    for flag, change in changes.items():
        saving = now - inventory.peak(replace(options, **change))
        if saving > 0:
            yield saving, flag


def first_row(dataset) -> dict:
    """The first sample that can be used, with one of its captions."""
    for index in range(len(dataset)):
        try:
            return with_one_caption(dataset[index])
        except BadSampleError as error:
            broken = error
    raise UserError(f"none of the {len(dataset)} samples can be used; the last: {broken}")


def stored_size(encoded: dict, batch: dict, mixed_precision: str) -> int:
    """Bytes that the values of an encoded sample take in the cache.

    Mixed precision halves all that models compute but latents, the values with height and width, which autoencoders
    compute in float32. What `encode` takes from its batch as it is keeps its type.
    """
    halves = {name for name, value in encoded.items() if name not in batch and value.ndim < 4}
    return sum(
        value.numpy().nbytes // (2 if name in halves and mixed_precision != "no" else 1)
        for name, value in encoded.items()
    )


def inventory_of(module, row: dict, args) -> Inventory:
    """What the job of `module` keeps in memory, at the resolution of `args`."""
    return inventories_of(module, row, args, [args.resolution])[args.resolution]


def inventories_of(module, row: dict, args, resolutions) -> dict:
    """The same at each of some resolutions, `{resolution: Inventory}`, measured once."""
    sizes = list(resolutions) if len(resolutions) == 1 and resolutions[0] <= MEASURED[-1] else list(MEASURED)
    samples, encoded, encoding, steps = [], [], [], {}
    for recompute in (False, True):
        # A bucket has as many pixels as the square.
        changed = {"gradient_checkpointing": recompute, "aspect_ratio_buckets": False}
        small = argparse.Namespace(**{**vars(args), **changed})
        job = type(module)(small)
        job.load_rest()
        choose_trainable(job, small.trainable_modules)
        quantize_models(job, has_values=False)
        set_training_mode(job)
        meter, steps[recompute] = StepMeter(job.trainable_parameters()), []
        for small.resolution in sizes:
            if not recompute:
                batch, _ = stack([job.preprocess(dict(row), RowDraws(0, 0))])
                with Peaks() as around:
                    samples.append(encode_batch(job, batch))
                    around.mark()
                encoding.append(around)
                encoded.append([stored_size(samples[-1], batch, args.mixed_precision)])
            sample = samples[sizes.index(small.resolution)]
            steps[recompute].append(meter.measure(lambda job=job, sample=sample: job(sample, Draws(0, [0]))))
    return {
        size: take_inventory(
            module,
            {recompute: extrapolate_peak(sizes, peaks, size) for recompute, peaks in steps.items()},
            extrapolate_peak(sizes, encoding, size),
            int(extrapolate(sizes, encoded, size)[0]),
        )
        for size in resolutions
    }
