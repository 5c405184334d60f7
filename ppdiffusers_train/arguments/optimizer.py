"""Flags of the optimizer, its learning rate, and what of it is kept in memory. The loop reads them."""

import argparse

from ppdiffusers_train.arguments.parser import (
    Flag,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    unit_float,
)

LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
OPTIMIZERS = ("adamw", "adamw8bit", "adafactor", "lion", "prodigy", "schedulefree")


def option(text: str) -> str:
    """A text KEY=VALUE."""
    if not all(text.partition("=")):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return text


def add_optimizer_arguments(parser, weight_decay: float = 0.01):
    """The optimizer and its learning rate; returns the group."""
    group = parser.add_argument_group("optimizer")
    add = group.add_argument
    add(
        "--learning_rate", type=non_negative_float, default=1e-4,
        help="Train with this learning rate after warm-up; with --optimizer prodigy, the default counts as 1.",
    )  # fmt: skip
    add("--scale_lr", action=Flag, help="Multiply the learning rate by the number of samples of a step, on all GPUs.")
    add(
        "--lr_scheduler", choices=LR_SCHEDULERS, default="constant",
        help="Change the learning rate by this schedule; `constant` has no warm-up.",
    )  # fmt: skip
    add(
        "--lr_warmup_steps", type=non_negative_int, default=500,
        help="Warm the learning rate up over this many optimizer steps.",
    )  # fmt: skip
    add("--lr_power", type=positive_float, default=1.0, help="Use this exponent with `polynomial`.")
    add("--lr_end", type=non_negative_float, default=1e-7, help="End at this learning rate with `polynomial`.")
    add(
        "--lr_num_cycles", type=positive_int, default=1,
        help="Go through this many cosine cycles with `cosine_with_restarts`.",
    )  # fmt: skip
    add(
        "--optimizer", type=str.lower, choices=OPTIMIZERS, default="adamw",
        help="Update the weights by this optimizer.",
    )  # fmt: skip
    add(
        "--optimizer_args", nargs="+", type=option, metavar="KEY=VALUE",
        help="Give the optimizer these options, such as weight_decay=0.01; an unknown one is refused with the list of "
        "those that it has.",
    )  # fmt: skip
    add("--use_8bit_adam", action=Flag, help="Keep AdamW's moments in 8 bits, as --optimizer adamw8bit does.")
    add("--adam_beta1", type=unit_float, default=0.9, help="Use this decay rate for AdamW's first moment.")
    add("--adam_beta2", type=unit_float, default=0.999, help="Use this decay rate for AdamW's second moment.")
    add(
        "--adam_weight_decay", type=non_negative_float, default=weight_decay,
        help="Use this decoupled weight decay in AdamW.",
    )  # fmt: skip
    add("--adam_epsilon", type=positive_float, default=1e-8, help="Add this epsilon to the denominator of AdamW.")
    add(
        "--max_grad_norm", type=non_negative_float, default=1.0,
        help="Clip gradients to this global norm; 0 does not clip them.",
    )  # fmt: skip
    add(
        "--max_grad_norm_per_parameter", type=positive_float,
        help="Clip the gradient of each parameter to this norm; it needs --max_grad_norm 0.",
    )  # fmt: skip
    add(
        "--fused_backward", action=Flag,
        help="Update each parameter in the backward pass and free its gradient; it needs --max_grad_norm 0, one GPU, "
        "and no accumulation.",
    )  # fmt: skip
    add(
        "--param_dtype", choices=("float32", "bf16"), default="float32",
        help="Keep trained weights of linear layers and convolutions in this type, without float32 copies.",
    )  # fmt: skip
    add(
        "--param_rounding", choices=("stochastic", "kahan"), default="stochastic",
        help="Round updated bf16 weights at random, or to the nearest and keep what was lost in 2 more bytes (kahan).",
    )  # fmt: skip
    add(
        "--use_ema", action=Flag,
        help="Keep an exponential moving average (EMA) of the trained weights, and write it as the result.",
    )  # fmt: skip
    return group
