"""The schedule of the learning rate."""

from ppdiffusers.optimization import get_polynomial_decay_schedule_with_warmup, get_scheduler

from ppdiffusers_train.errors import UserError


def scaled_rate(args, samples_per_step: int) -> float:
    """The learning rate after warm-up: `--learning_rate`, with `--scale_lr` times the samples of a full step."""
    return args.learning_rate * (samples_per_step if args.scale_lr else 1)


def check_schedule(args, total_steps: int, samples_per_step: int) -> None:
    """Raise a `UserError` for a schedule that is impossible with this number of steps and this learning rate."""
    if args.lr_scheduler != "polynomial":
        return
    if args.lr_warmup_steps >= total_steps:
        raise UserError(
            f"--lr_warmup_steps {args.lr_warmup_steps}: the run has {total_steps} steps; expected fewer with polynomial"
        )
    rate = scaled_rate(args, samples_per_step)
    if args.lr_end >= rate:
        raise UserError(f"--lr_end {args.lr_end}: expected less than the learning rate, which is {rate}")


def build_schedule(args, total_steps: int, samples_per_step: int):
    """The schedule that the flags describe, as ppdiffusers computes it."""
    rate = scaled_rate(args, samples_per_step)
    if args.lr_scheduler == "polynomial":  # `get_scheduler` does not pass the end on
        return get_polynomial_decay_schedule_with_warmup(
            rate, args.lr_warmup_steps, total_steps, lr_end=args.lr_end, power=args.lr_power
        )
    return get_scheduler(
        args.lr_scheduler,
        learning_rate=rate,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=total_steps,
        num_cycles=args.lr_num_cycles,
    )


def notices(args, total_steps: int):
    """One line for each flag of the schedule that has no effect, or an unexpected one."""
    if args.lr_scheduler != "constant" and args.lr_warmup_steps >= total_steps:
        yield f"--lr_warmup_steps {args.lr_warmup_steps}: all of the run's {total_steps} steps are warm-up"
    flags = {
        "lr_num_cycles": (1, "cosine_with_restarts"),
        "lr_power": (1.0, "polynomial"),
        "lr_end": (1e-7, "polynomial"),
    }
    for name, (default, scheduler) in flags.items():
        if getattr(args, name) != default and args.lr_scheduler != scheduler:
            yield f"--{name} {getattr(args, name)}: no effect with --lr_scheduler {args.lr_scheduler}"
