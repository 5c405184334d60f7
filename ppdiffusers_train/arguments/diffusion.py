"""Flags of the noise, the loss, the timesteps and the captions that diffusion and flow matching train with."""

from ppdiffusers_train.arguments.parser import (
    Flag,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    unit_float,
)

TIMESTEP_BIAS_STRATEGIES = ("none", "earlier", "later", "range")


def add_diffusion_arguments(parser, noise_offset=False, captions=True):
    """How the denoising loss is computed, read by the jobs; `noise_offset` where there are latents to offset,
    `captions` where the model reads them."""
    group = parser.add_argument_group("diffusion")
    add = group.add_argument
    add(
        "--snr_gamma", "--min_snr_gamma", type=positive_float,
        help="Weight losses by min-SNR with this gamma, 5.0 in the paper; without it, losses are not weighted.",
    )  # fmt: skip
    add(
        "--debiased_loss", "--debiased_estimation_loss", action=Flag,
        help="Weight losses by the debiased estimation: 1 / sqrt(SNR) for a model that predicts the noise.",
    )  # fmt: skip
    add(
        "--scale_v_pred_loss_like_noise_pred", action=Flag,
        help="Weight the losses of a model that predicts velocity as if it predicted the noise.",
    )  # fmt: skip
    add(
        "--loss_type",
        choices=("l2", "huber", "smooth_l1"),
        default="l2",
        help="Compare prediction and target by this loss.",
    )
    add(
        "--huber_c", type=positive_float,
        help="Turn the Huber losses from quadratic to linear at this difference; without it, at 0.1.",
    )  # fmt: skip
    add(
        "--huber_schedule", choices=("constant", "exponential", "snr"),
        help="Change this difference over the timesteps, from 1 without noise to --huber_c; without it, by snr.",
    )  # fmt: skip
    add_perturbation_argument(group)
    add_dropout_arguments(group, captions)
    if noise_offset:
        add(
            "--noise_offset", type=non_negative_float, default=0.0,
            help="Add a random offset of this scale to the noise of each channel; 0 adds none.",
        )  # fmt: skip
        add(
            "--multires_noise_discount", type=unit_float, default=0.0,
            help="Add coarser noise, each level weaker than the last by this factor; 0 adds none.",
        )  # fmt: skip
        add(
            "--multires_noise_iterations", type=positive_int,
            help="Add at most this many levels of coarser noise; without it, 6.",
        )  # fmt: skip
    return group


def add_perturbation_argument(group):
    """How the noise of the input differs from that of the target, read by the jobs that have noise."""
    group.add_argument(
        "--input_perturbation", "--ip_noise_gamma", type=non_negative_float, default=0.0,
        help="Add further noise of this scale to the input, but not to the target; 0 adds none, 0.1 is the paper's "
        "value.",
    )  # fmt: skip


def add_prediction_arguments(group):
    """What the UNet predicts, of which process, and from which layer of CLIP, where the pipeline can follow: read by
    the jobs of SD and SDXL."""
    add = group.add_argument
    add(
        "--prediction_type", choices=("epsilon", "v_prediction", "sample"),
        help="Train the UNet to predict this; without it, what its scheduler says.",
    )  # fmt: skip
    add(
        "--rescale_betas_zero_snr", "--zero_terminal_snr", action=Flag,
        help="Rescale the noise schedule so that the last timestep is pure noise (zero terminal SNR).",
    )  # fmt: skip
    add(
        "--clip_skip", type=non_negative_int, default=0, metavar="N",
        help="Skip the last N layers of CLIP's text encoders, counted as the pipeline's argument clip_skip.",
    )  # fmt: skip
    add(
        "--max_token_length", type=int, choices=(75, 150, 225), default=75,
        help="Read captions of up to this many tokens, in chunks of 75 that CLIP encodes one by one.",
    )  # fmt: skip


def add_dream_arguments(group):
    """DREAM, read by the jobs that have it."""
    add = group.add_argument
    add(
        "--dream_training", action=Flag,
        help="Add the model's own error to its input and target (DREAM), which takes one more forward pass per step.",
    )  # fmt: skip
    power = "Weigh that error by this power of the share of noise; higher values keep more detail."
    add("--dream_detail_preservation", type=non_negative_float, default=1.0, help=power)


def add_dropout_arguments(group, captions=True):
    """How often a sample is trained without its conditioning, for classifier-free guidance, or with other `captions`:
    read by the jobs."""
    add = group.add_argument
    add(
        "--proportion_empty_prompts", "--caption_dropout", "--caption_dropout_rate", type=unit_float, default=0.0,
        help="Drop captions with this probability, for classifier-free guidance.",
    )  # fmt: skip
    if not captions:
        return
    add(
        "--shuffle_tags", "--shuffle_caption", action=Flag,
        help="Shuffle the tags of a caption, which are between commas, each time it is used.",
    )  # fmt: skip
    add(
        "--tag_dropout", "--caption_tag_dropout_rate", type=unit_float, default=0.0,
        help="Leave out each tag of a caption with this probability, each time it is used.",
    )  # fmt: skip
    add(
        "--keep_tags", "--keep_tokens", type=non_negative_int, default=0,
        help="Keep the first tags, this many, out of shuffling and dropout.",
    )  # fmt: skip
    choice = "Take one of the texts in {a|b|c} of a caption, drawn anew each time it is used."
    add("--wildcards", "--enable_wildcard", action=Flag, help=choice)


def add_flow_matching_arguments(parser):
    """How often timesteps of a flow are sampled, and how their losses are weighted, read by the jobs of SD3."""
    group = parser.add_argument_group("flow matching")
    add = group.add_argument
    add(
        "--weighting_scheme", choices=("uniform", "logit-normal", "mode", "bell"), default="logit-normal",
        type=lambda name: name.replace("_", "-"),
        help="Sample timesteps with this density; bell samples uniformly and weights losses most in the middle.",
    )  # fmt: skip
    add(
        "--logit_mean", type=float, default=0.0,
        help="Use this mean of the logit-normal density; a mean above 0 favours noise.",
    )  # fmt: skip
    add("--logit_std", type=float, default=1.0, help="Use this standard deviation of the logit-normal density.")
    add(
        "--mode_scale", type=float, default=1.29,
        help="Use this scale of the mode density; above 0, it favours the middle.",
    )  # fmt: skip
    add(
        "--shift", type=positive_float,
        help="Shift timesteps towards noise by this factor; without it, by that of the pipeline's scheduler.",
    )  # fmt: skip
    add(
        "--min_timestep_boundary", type=float, default=0.0,
        help="Train timesteps from this fraction of the way from noise (0) to image (1) on.",
    )  # fmt: skip
    add(
        "--max_timestep_boundary", type=float, default=1.0,
        help="Train timesteps up to this fraction of the way from noise (0) to image (1).",
    )  # fmt: skip
    add_perturbation_argument(group)
    add_dropout_arguments(group)
    return group


def add_timestep_arguments(parser):
    """Which timesteps are sampled more often, read by the jobs."""
    group = parser.add_argument_group("timesteps")
    group.add_argument(
        "--timestep_bias_strategy", choices=TIMESTEP_BIAS_STRATEGIES, default="none",
        help="Sample these timesteps more often than others.",
    )  # fmt: skip
    group.add_argument(
        "--timestep_bias_multiplier", type=float, default=1.0,
        help="Multiply their probability by this factor.",
    )  # fmt: skip
    group.add_argument(
        "--timestep_bias_begin", type=int, default=0,
        help="Begin the strategy `range` at this timestep.",
    )  # fmt: skip
    group.add_argument(
        "--timestep_bias_end", type=int, default=1000,
        help="End the strategy `range` before this timestep.",
    )  # fmt: skip
    group.add_argument(
        "--timestep_bias_portion", type=float, default=0.25,
        help="Apply the strategies `earlier` and `later` to this fraction of all timesteps.",
    )  # fmt: skip
    return group
