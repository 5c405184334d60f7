"""From the flags to the optimizer of a run: which one, with which options, and what it cannot do together."""

import paddle.distributed as dist

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.module import is_lora
from ppdiffusers_train.runtime.bf16_weights import Rounding, narrow_models
from ppdiffusers_train.runtime.groups import check_sharding_degree
from ppdiffusers_train.runtime.optimizers import registry
from ppdiffusers_train.runtime.precision import Precision

ADAMW = ("adamw", "adamw8bit")  # whose states can be converted
DEFAULT_RATE, PRODIGY_RATE = 1e-4, 1.0
CONSTANT = ("constant", "constant_with_warmup")


def optimizer_name(flags: dict) -> str:
    """The optimizer of flags, also of those of an older version."""
    return "adamw8bit" if flags.get("use_8bit_adam") else flags.get("optimizer", "adamw")


def options_of(args) -> dict:
    """The options of the optimizer: AdamW's own flags, and `--optimizer_args`."""
    name = optimizer_name(vars(args))
    options = registry.read_options(name, args.optimizer_args)
    if name not in ADAMW:
        return options
    own = {"beta1": args.adam_beta1, "beta2": args.adam_beta2, "epsilon": args.adam_epsilon}
    return {**own, "weight_decay": args.adam_weight_decay, **options}


def learning_rate_of(args) -> float:
    """`--learning_rate`; with prodigy, which would hardly move by the default, 1 instead of the default."""
    return PRODIGY_RATE if args.optimizer == "prodigy" and args.learning_rate == DEFAULT_RATE else args.learning_rate


def check_optimizer(args) -> None:
    """Raise a `UserError` for flags of the optimizer that contradict each other."""
    check_sharding_degree(args.sharding_degree)
    if args.sharding_stage > 1 and args.sharding_degree == 1:
        raise UserError(f"--sharding_stage {args.sharding_stage}: expected it with a --sharding_degree above 1")
    name = optimizer_name(vars(args))
    if args.use_8bit_adam and args.optimizer not in ADAMW:
        raise UserError(f"--use_8bit_adam: there is --optimizer {args.optimizer} as well; expected one of them")
    flag = "--use_8bit_adam" if args.use_8bit_adam else f"--optimizer {name}"
    kind = registry.OPTIMIZERS[name]
    if name == "adamw8bit" and (args.sharding_degree > 1 or args.amp_level == "O2"):
        raise UserError(
            f"{flag}: its state can be neither sharded nor kept for low-precision weights; "
            "expected it without --sharding_degree and --amp_level O2"
        )
    if (kind.needs_all_gradients or kind.averages) and args.sharding_degree > 1:
        raise UserError(f"{flag}: its state cannot be sharded; expected it without --sharding_degree")
    options_of(args)
    if getattr(args, "text_encoder_lr", None) is not None and not (args.train_text_encoder and args.learning_rate != 0):
        raise UserError("--text_encoder_lr: expected it with --train_text_encoder, and with a --learning_rate above 0")
    if kind.averages:
        check_averages(args, flag)
    if args.max_grad_norm_per_parameter and args.max_grad_norm:
        raise UserError("--max_grad_norm_per_parameter: gradients are clipped by their global norm, too; expected it "
                        "with --max_grad_norm 0")  # fmt: skip
    check_memory_flags(args, flag, kind)


def check_averages(args, flag: str) -> None:
    """Raise a `UserError` for flags that do not go with an optimizer that averages the weights itself."""
    if args.lr_scheduler not in CONSTANT:
        raise UserError(f"{flag}: it needs no schedule; expected --lr_scheduler {' or '.join(CONSTANT)}")
    if args.use_ema:
        raise UserError(f"{flag}: its result is an average of the weights already; expected it without --use_ema")
    if args.amp_level == "O2" or args.param_dtype == "bf16":
        raise UserError(f"{flag}: expected weights in float32, without --amp_level O2 and --param_dtype bf16")


def check_memory_flags(args, flag: str, kind) -> None:
    """Raise a `UserError` for what `--fused_backward` and `--param_dtype bf16` cannot be combined with."""
    if args.param_dtype == "bf16":
        require(args, "--param_dtype bf16", sharding_degree=1, amp_level="O1", to_static=False)
        if args.mixed_precision == "fp16":
            raise UserError("--param_dtype bf16: expected --mixed_precision no or bf16")
    if not args.fused_backward:
        return
    if kind.needs_all_gradients:
        raise UserError(f"{flag}: it needs all gradients at once; expected it without --fused_backward")
    if (ranks := dist.get_world_size()) > 1:
        raise UserError(f"--fused_backward: there are {ranks} processes; expected one")
    require(args, "--fused_backward", max_grad_norm=0, gradient_accumulation_steps=1, skip_nonfinite=0,
            max_bad_samples=0, amp_level="O1", sharding_degree=1, class_data_dir=None, to_static=False)  # fmt: skip
    if args.mixed_precision == "fp16":
        raise UserError("--fused_backward: fp16 has to skip steps; expected --mixed_precision no or bf16")


def require(args, flag: str, **expected) -> None:
    """Raise a `UserError` unless each flag has the value that is expected with `flag`."""
    for name, value in expected.items():
        found = getattr(args, name, value)
        if found != value:
            shown = "no such flag" if value in (None, False) else f"--{name} {value}"
            raise UserError(f"{flag}: --{name} is {found}; expected {shown}, because a weight is kept or updated once")


def check_same_optimizer(checkpoint, saved: dict, flags: dict) -> None:
    """Raise a `UserError` if a checkpoint has the state of an optimizer that cannot be converted.

    Args:
        saved, flags: the flags of the checkpoint and of now.
    """
    before, now = optimizer_name(saved), optimizer_name(flags)
    if before != now and (not {before, now} <= set(ADAMW) or flags["param_dtype"] == "bf16"):
        raise UserError(
            f"--optimizer: {checkpoint} has the state of {before}, which cannot become that of {now}; expected "
            f"--optimizer {before}, or a new run in another folder"
        )


def build_optimizer(module, args, parameters: dict, rate):
    """The optimizer of `{structured name: parameter}`, each with its own factor of the learning rate.

    Args:
        rate: the schedule of the learning rate.
    """
    for name, parameter in parameters.items():
        parameter.optimize_attr["learning_rate"] = module.rate_factor(name)
    kind, rounding = optimizer_name(vars(args)), None
    if registry.OPTIMIZERS[kind].needs_all_gradients and {module.rate_factor(name) for name in parameters} != {1.0}:
        raise UserError(f"--optimizer {kind}: it finds one rate for all weights; expected it without --text_encoder_lr "
                        "and --lora_plus_ratio")  # fmt: skip
    if args.param_dtype == "bf16":
        if any(map(is_lora, parameters)):
            raise UserError("--param_dtype bf16: LoRA layers stay in float32; expected it without LoRA")
        names = {parameter.name: name for name, parameter in parameters.items()}
        rounding = Rounding(args.param_rounding, args.seed, names)
    return registry.build_optimizer(kind, rate, list(parameters.values()), options_of(args), rounding)


def change_before_loading(args, job):
    """What is done to the model that a job trains before its weights are read, so that they need not be in memory in
    float32; None if nothing is.

    Not where the same part is loaded twice, or some of its weights stay as they are.

    Args:
        job: the class of the training module.
    """
    if args.param_dtype != "bf16" or args.trainable_modules or getattr(job, "averages", ()):
        return None
    widens = not Precision(args.mixed_precision).enabled
    return lambda model: narrow_models([model], widens)


def notices(args):
    """One line for each flag that has no effect, or an unexpected one, with this optimizer."""
    name = optimizer_name(vars(args))
    if name == "prodigy" and args.learning_rate != PRODIGY_RATE:
        yield f"--learning_rate {args.learning_rate}: prodigy multiplies the rate that it finds by it; usually it is 1"
    if name not in ADAMW:
        for flag, default in {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}.items():
            if getattr(args, flag) != default:
                yield f"--{flag} {getattr(args, flag)}: no effect with --optimizer {name}, which has --optimizer_args"
        if args.adam_weight_decay not in (0, 0.01):  # the defaults of scripts
            yield (
                f"--adam_weight_decay {args.adam_weight_decay}: no effect with --optimizer {name}, which has "
                "--optimizer_args weight_decay=…"
            )
    if args.param_rounding != "stochastic" and args.param_dtype == "float32":
        yield f"--param_rounding {args.param_rounding}: no effect without --param_dtype bf16"
