"""The decoder's script, run as a user runs it, on a tiny Kandinsky 2.2."""

import ppdiffusers_train  # noqa: F401

import json
import shutil
import subprocess
import sys

import numpy as np
import paddle
import pytest
from PIL import Image
from ppdiffusers import KandinskyV22CombinedPipeline, UNet2DConditionModel

from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.draws import Draws, RowDraws
from ppdiffusers_train.job import job_main
from ppdiffusers_train.models.recompute import recomputes_without_reentrance
from tests.conftest import (
    DECODER_SCRIPT,
    LEVERS,
    OF_LATENTS,
    copy_photos,
    distance,
    encode,
    first_losses,
    optimizer_state,
    same,
    scalars,
    weights,
)

# The result.


def test_the_guides_three_lines_draw_from_the_output_folder(train_decoder):
    output_dir = train_decoder()
    pipe = KandinskyV22CombinedPipeline.from_pretrained(str(output_dir))
    image = pipe(prompt="a cat", num_inference_steps=2, prior_num_inference_steps=2, height=64, width=64).images[0]
    assert image.size == (64, 64)
    assert same({n: t.numpy() for n, t in pipe.unet.state_dict().items()}, weights(output_dir))


def test_a_checkpoints_unet_can_be_put_into_the_pipeline(train_decoder):
    output_dir = train_decoder("--checkpointing_steps=1")
    unet = UNet2DConditionModel.from_pretrained(f"{output_dir}/checkpoint-1/unet")
    pipe = KandinskyV22CombinedPipeline.from_pretrained(str(output_dir), unet=unet)
    assert pipe.unet is unet
    assert same({n: t.numpy() for n, t in unet.state_dict().items()}, weights(output_dir / "checkpoint-1"))
    assert not same(weights(output_dir / "checkpoint-1"), weights(output_dir))


@pytest.mark.once
def test_unchanged_parts_are_hard_links_to_the_base_model(train_decoder, kandinsky):
    output_dir = train_decoder()
    prior, decoder = kandinsky
    for part, source in (
        ("movq", decoder / "movq"),
        ("prior_prior", prior / "prior"),
        ("prior_image_encoder", prior / "image_encoder"),
    ):
        for file in source.iterdir():
            assert (output_dir / part / file.name).samefile(file)
    assert not list(output_dir.glob(".*")), "nothing temporary is left"


@pytest.mark.once
def test_an_output_folder_is_a_base_model_again(train_decoder):
    first = train_decoder(out="first")
    again = train_decoder(
        f"--pretrained_decoder_model_name_or_path={first}",
        f"--pretrained_prior_model_name_or_path={first}",
        out="second",
    )
    assert same(weights(again, "movq"), weights(first, "movq")) and not same(weights(again), weights(first))
    assert KandinskyV22CombinedPipeline.from_pretrained(str(again)).prior_prior.config.embedding_dim == 64


def test_only_the_unet_learns_and_the_base_model_stays_untouched(train_decoder, kandinsky, decoder_job, decoder_flags):
    before = weights(kandinsky[1])
    trained = weights(train_decoder())
    assert same(before, weights(kandinsky[1])) and distance(before, trained) > 1e-4
    module = decoder_job.KandinskyDecoderTrainingModule(decoder_job.build_parser().parse_args(decoder_flags))
    assert {id(p) for p in module.trainable_parameters()} == {id(p) for p in module.unet.parameters()}
    assert not module.movq.training and not module.image_encoder.training


def test_the_variance_channels_get_no_gradient(decoder_job, decoder_flags):
    args = decoder_job.build_parser().parse_args(decoder_flags)
    module = decoder_job.KandinskyDecoderTrainingModule(args)
    encoded = encode(module, build_dataset(args), [0, 1])
    module(encoded, Draws(0, [0, 1])).backward()
    gradient = module.unet.conv_out.weight.grad.numpy()
    assert np.abs(gradient[:4]).max() > 0 and np.abs(gradient[4:]).max() == 0


@pytest.mark.once
def test_training_overfits_four_photographs(decoder_job, decoder_flags, train_decoder, tmp_path):
    """At fixed draws, over all noise levels, the loss falls to less than half: more than a constant answer can do."""
    data = f"--train_data_dir={copy_photos(tmp_path / 'four', 4)}"
    flags = ["--max_train_steps=150", "--train_batch_size=4", "--learning_rate=3e-3"]
    output_dir = train_decoder(data, *flags, f"--encoded_cache_dir={tmp_path / 'cache'}")
    args = decoder_job.build_parser().parse_args([*decoder_flags, data])
    module = decoder_job.KandinskyDecoderTrainingModule(args)
    module.eval()
    encoded = {
        name: value.tile([16] + [1] * (value.ndim - 1))
        for name, value in encode(module, build_dataset(args), range(4)).items()
    }
    draws = Draws(99, range(64))
    with paddle.no_grad():
        before = float(module(encoded, draws))
        module.load_weights(str(output_dir))
        after = float(module(encoded, draws))
        wrong_embeds = {**encoded, "image_embeds": encoded["image_embeds"].flip(0)}
        confused = float(module(wrong_embeds, draws))
    assert after < 0.5 * before, (before, after)
    assert confused > 1.02 * after, "the image embedding must matter"


# The batch, the order, the seed.


def test_accumulating_four_batches_of_one_equals_one_batch_of_four(train_decoder):
    """Seven samples: the second step's window is short, and so is its last batch."""
    common = ["--max_train_steps=4", "--checkpointing_steps=4"]
    one = train_decoder("--train_batch_size=4", *common, out="a")
    moments = optimizer_state(one / "checkpoint-4")
    for batch_size, accumulation in ((1, 4), (2, 2)):
        flags = [f"--train_batch_size={batch_size}", f"--gradient_accumulation_steps={accumulation}"]
        other = train_decoder(*flags, *common, out=str(batch_size))
        assert np.allclose(scalars(one), scalars(other), rtol=1e-5)
        others_moments = optimizer_state(other / "checkpoint-4")
        assert all(np.allclose(moments[n], others_moments[n], atol=2e-5) for n in moments if "moment1" in n)


def test_seed_zero_is_a_seed_and_repeats_a_run_bit_for_bit(train_decoder):
    runs = [train_decoder(f"--seed={seed}", out=name) for seed, name in ((0, "a"), (0, "b"), (1, "c"))]
    assert same(weights(runs[0]), weights(runs[1])) and not same(weights(runs[0]), weights(runs[2]))


@pytest.mark.once
def test_without_a_seed_one_is_drawn_and_kept(train_decoder, decoder_flags):
    decoder_flags.remove("--seed=0")
    seeds = [json.loads((train_decoder(out=name) / "training_args.json").read_text())["seed"] for name in "ab"]
    assert seeds[0] != seeds[1]
    assert same(
        weights(train_decoder(f"--seed={seeds[0]}", out="c")), weights(train_decoder(f"--seed={seeds[0]}", out="a2"))
    )


@pytest.mark.once
def test_loader_workers_change_nothing(train_decoder):
    runs = [train_decoder(f"--dataloader_num_workers={count}", out=str(count)) for count in (0, 2)]
    assert same(weights(runs[0]), weights(runs[1]))


@pytest.mark.once
def test_epochs_count_steps_when_steps_are_not_given(train_decoder, decoder_flags):
    decoder_flags.remove("--max_train_steps=2")
    assert len(scalars(train_decoder("--num_train_epochs=2", "--train_batch_size=4"))) == 2 * 2


@pytest.mark.once
def test_max_train_samples_shortens_the_epoch(train_decoder, decoder_flags):
    decoder_flags.remove("--max_train_steps=2")
    assert len(scalars(train_decoder("--num_train_epochs=1", "--max_train_samples=3"))) == 2


# The optimizer.


def test_warm_up_starts_at_zero_and_ends_at_the_learning_rate(train_decoder):
    output_dir = train_decoder("--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=2", "--max_train_steps=4")
    assert scalars(output_dir, "train/learning_rate") == pytest.approx([0, 5e-4, 1e-3, 1e-3])


@pytest.mark.once
@pytest.mark.parametrize(
    "name, expected",
    [
        ("linear", [1e-3, 7.5e-4, 5e-4, 2.5e-4]),
        ("cosine", [1e-3, 8.536e-4, 5e-4, 1.464e-4]),
        ("cosine_with_restarts --lr_num_cycles=2", [1e-3, 5e-4, 1e-3, 5e-4]),
        ("polynomial", [1e-3, 7.5e-4, 5e-4, 2.5e-4]),
        ("polynomial --lr_power=2 --lr_end=2e-4", [1e-3, 6.5e-4, 4e-4, 2.5e-4]),
        ("constant", [1e-3] * 4),
    ],
)
def test_the_learning_rate_decays_over_optimizer_steps(train_decoder, name, expected):
    flags = [*f"--lr_scheduler={name}".split(), "--lr_warmup_steps=0", "--max_train_steps=4"]
    flags += ["--gradient_accumulation_steps=2"]
    rates = scalars(train_decoder(*flags, "--train_batch_size=1"), "train/learning_rate")
    assert rates == pytest.approx(expected, rel=2e-3)


def test_gradients_are_clipped_to_the_norm(train_decoder):
    """AdamW's first moment after one step is a tenth of the gradient."""
    for norm in (1e-2, 1e-3):
        out = train_decoder(f"--max_grad_norm={norm}", "--max_train_steps=1", "--checkpointing_steps=1", out=str(norm))
        moments = [m for name, m in optimizer_state(out / "checkpoint-1").items() if "moment1" in name]
        assert np.sqrt(sum((moment**2).sum() for moment in moments)) == pytest.approx(0.1 * norm, rel=1e-3)


def test_each_flag_of_the_optimizer_changes_the_weights(train_decoder):
    plain = weights(train_decoder(out="plain"))
    for number, flag in enumerate(
        ["--adam_beta1=0.5", "--adam_beta2=0.5", "--adam_weight_decay=0.5", "--adam_epsilon=0.1",
         "--learning_rate=1e-4"]
    ):  # fmt: skip
        assert not same(plain, weights(train_decoder(flag, out=str(number)))), flag


@pytest.mark.once
def test_weight_decay_is_off_unless_asked_for_as_in_the_guide(decoder_job):
    args = decoder_job.build_parser().parse_args([])
    assert (args.adam_weight_decay, args.train_batch_size, args.learning_rate) == (0.0, 1, 1e-4)


def test_ema_moves_is_saved_and_is_the_result(train_decoder, kandinsky):
    output_dir = train_decoder("--use_ema", "--max_train_steps=3", "--checkpointing_steps=3")
    checkpoint = output_dir / "checkpoint-3"
    raw, averaged = weights(checkpoint), weights(checkpoint / "ema")
    assert not same(raw, averaged) and not same(averaged, weights(kandinsky[1]))
    assert same(averaged, weights(output_dir))
    assert not (train_decoder("--checkpointing_steps=2", out="plain") / "checkpoint-2" / "ema").exists()


# The loss.


@pytest.mark.once
def test_each_flag_of_the_loss_changes_it(decoder_job, decoder_flags):
    def build(*flags):
        args = decoder_job.build_parser().parse_args([*decoder_flags, *flags])
        return decoder_job.KandinskyDecoderTrainingModule(args)

    losses = first_losses(build, [], *LEVERS, *OF_LATENTS)
    assert len({*losses}) == len(losses), losses


def test_gradient_checkpointing_gives_the_same_gradients(train_decoder):
    """To the bit where Paddle recomputes without reentrance, else up to the rounding of another order of sums."""
    flags = ["--max_train_steps=1", "--checkpointing_steps=1"]
    plain = optimizer_state(train_decoder(*flags, out="a") / "checkpoint-1")
    recomputed = optimizer_state(train_decoder(*flags, "--gradient_checkpointing", out="b") / "checkpoint-1")
    if recomputes_without_reentrance():
        assert same(plain, recomputed)
    assert all(np.allclose(plain[name], recomputed[name], rtol=1e-4, atol=1e-7) for name in plain)


def test_the_recompute_shim_can_go_when_paddle_2_6_is_dropped():
    assert recomputes_without_reentrance() == (not paddle.__version__.startswith("2.6")), (
        "drop `reentrant` of models/recompute.py"
    )


@pytest.mark.once
def test_resolution_is_the_size_of_the_pixels(decoder_job, decoder_flags, photos):
    args = decoder_job.build_parser().parse_args([*decoder_flags, "--resolution=128"])
    module, rows = decoder_job.KandinskyDecoderTrainingModule(args), build_dataset(args)
    assert module.preprocess(rows[0], RowDraws(0, 0))["pixel_values"].shape == (3, 128, 128)
    assert module.preprocess(rows[0], RowDraws(0, 0))["clip_pixel_values"].shape == (3, 32, 32)


# Flags that have another effect than their name suggests.


@pytest.mark.once
def test_a_flag_without_effect_says_so_once(train_decoder, capsys):
    train_decoder("--max_train_steps=1", out="plain")
    assert "no effect" not in capsys.readouterr().out
    notices = {
        "--allow_tf32": "--allow_tf32: no effect, this device has no TF32",
        "--deterministic": "--deterministic: no effect, this device computes the same way every time",
        "--amp_level=O2": "--amp_level O2: no effect without --mixed_precision fp16 or bf16",
        "--local_rank=0": "--local_rank 0: no effect, paddle.distributed.launch sets the rank",
        "--enable_xformers_memory_efficient_attention": "--enable_xformers_memory_efficient_attention: no effect",
    }
    train_decoder(*notices, "--max_train_steps=1", out="all")
    said = capsys.readouterr().out
    assert [said.count(notice) for notice in notices.values()] == [1] * 5 and said.count(": no effect") == 5, said
    train_decoder("--mixed_precision=bf16", "--max_train_steps=1", out="bf16")
    said = "--mixed_precision bf16: no effect on a CPU, training in float32"
    assert capsys.readouterr().out.count(said) == 1


# Checkpoints and resuming.

LONG = ["--use_ema", "--gradient_accumulation_steps=2", "--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=7"]


def assert_same_checkpoint(one, other):
    assert same(weights(one), weights(other)) and same(weights(one / "ema"), weights(other / "ema"))
    assert same(optimizer_state(one), optimizer_state(other))
    assert (one / "ema.safetensors").read_bytes() == (other / "ema.safetensors").read_bytes()
    states = [json.loads((folder / "state.json").read_text()) for folder in (one, other)]
    for name in ("step", "position", "lr_scheduler", "ema_updates", "seed"):
        assert states[0][name] == states[1][name]


def test_twelve_steps_equal_five_and_seven_more_bit_for_bit(train_decoder):
    whole = train_decoder(*LONG, "--max_train_steps=12", "--checkpointing_steps=12", out="whole")
    train_decoder(*LONG, "--max_train_steps=5", "--checkpointing_steps=5", out="parts")
    parts = train_decoder(
        *LONG, "--max_train_steps=12", "--checkpointing_steps=12", "--resume_from_checkpoint=latest", out="parts"
    )
    assert scalars(whole) == scalars(parts)
    assert_same_checkpoint(whole / "checkpoint-12", parts / "checkpoint-12")
    assert same(weights(whole), weights(parts))


@pytest.mark.once
def test_the_limit_keeps_the_newest_checkpoints(train_decoder):
    output_dir = train_decoder("--max_train_steps=7", "--checkpointing_steps=2", "--checkpoints_total_limit=2")
    assert sorted(path.name for path in output_dir.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-7"]


@pytest.mark.once
def test_latest_skips_a_broken_checkpoint(train_decoder, capsys):
    output_dir = train_decoder("--checkpointing_steps=1", "--max_train_steps=3")
    (output_dir / "checkpoint-3" / "unet" / "diffusion_paddle_model.safetensors").write_bytes(b"cut short")
    train_decoder("--checkpointing_steps=1", "--max_train_steps=3", "--resume_from_checkpoint=latest")
    said = capsys.readouterr().out
    assert "skipped" in said and "checkpoint-2 at step 2" in said


def test_sigterm_writes_a_checkpoint_from_which_the_run_goes_on(train_decoder, decoder_flags, tmp_path):
    """The signal comes while a step is under way, in a process of its own."""
    out = tmp_path / "stopped"
    code = (
        "import ppdiffusers_train, os, runpy, signal, sys\n"
        "job = runpy.run_path(sys.argv[1])\n"
        "module = job['KandinskyDecoderTrainingModule']\n"
        "forward, calls = module.forward, []\n"
        "def interrupted(self, encoded, draws):\n"
        "    calls.append(0)\n"
        "    if len(calls) == 2: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return forward(self, encoded, draws)\n"
        "module.forward = interrupted\n"
        "job['main'](sys.argv[2:])"
    )
    flags = [*decoder_flags, "--use_ema", "--max_train_steps=4"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(DECODER_SCRIPT), *flags, f"--output_dir={out}"], capture_output=True, text=True
    )
    assert done.returncode == 128 + 15, done.stderr
    assert "SIGTERM: wrote" in done.stdout and "--resume_from_checkpoint latest" in done.stdout
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    resumed = train_decoder("--use_ema", "--max_train_steps=4", "--resume_from_checkpoint=latest", out="stopped")
    whole = train_decoder("--use_ema", "--max_train_steps=4", out="whole")
    assert same(weights(resumed), weights(whole))


@pytest.mark.once
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_samples(train_decoder, kandinsky, tmp_path, capsys):
    broken = shutil.copytree(kandinsky[1], tmp_path / "broken")
    unet = UNet2DConditionModel.from_pretrained(str(broken / "unet"))
    with paddle.no_grad():
        unet.conv_out.bias[0] = 1e30
    unet.save_pretrained(str(broken / "unet"))
    with pytest.raises(SystemExit) as stopped:
        train_decoder(f"--pretrained_decoder_model_name_or_path={broken}")
    message = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 1
    assert "step 1, rank 0: the loss is inf on" in message and ".jpg (row" in message and "timesteps [" in message


# Validation.


def test_validation_draws_a_grid_and_changes_no_number(train_decoder):
    plain = train_decoder("--max_train_steps=4", "--use_ema", out="plain")
    validated = train_decoder(
        "--max_train_steps=4", "--use_ema", "--validation_prompts", "a cat", "月亮", "--num_validation_images=2",
        "--validation_steps=2", "--validation_inference_steps=2", out="validated",
    )  # fmt: skip
    assert same(weights(plain), weights(validated))
    assert sorted(path.name for path in (validated / "validation").iterdir()) == ["step-2.png", "step-4.png"]
    width, height = Image.open(validated / "validation" / "step-4.png").size
    assert width > 2 * 64 and height > 2 * 64
    assert not (plain / "validation").exists()


def test_validation_pictures_are_on_fixed_seeds_and_differ_by_prompt_and_seed(decoder_job, decoder_flags):
    args = decoder_job.build_parser().parse_args([*decoder_flags, "--validation_inference_steps=2"])
    module = decoder_job.KandinskyDecoderTrainingModule(args)
    pictures = [np.array(image) for image in module.generate(["a", "a", "b", "a"], [0, 1, 0, 0])]
    assert np.array_equal(pictures[0], pictures[3])
    assert not np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])


@pytest.mark.once
def test_validation_comes_after_every_nth_epoch_and_at_the_end(train_decoder):
    """Seven samples in batches of 4: two steps an epoch."""
    output_dir = train_decoder(
        "--train_batch_size=4", "--max_train_steps=5", "--validation_epochs=1", "--validation_prompt=x",
        "--validation_inference_steps=1",
    )  # fmt: skip
    assert {path.stem for path in (output_dir / "validation").iterdir()} == {"step-2", "step-4", "step-5"}


# Reports.


@pytest.mark.once
def test_reports_go_where_they_are_sent(train_decoder):
    assert not (train_decoder("--report_to=none") / "logs").exists()
    flags = ["--logging_dir=elsewhere", "--validation_prompt=x", "--validation_inference_steps=1"]
    output_dir = train_decoder(*flags, out="other")
    assert len(scalars(output_dir, logging_dir="elsewhere")) == 2
    assert not (output_dir / "logs" / "visualdl").exists()


@pytest.mark.once
def test_arguments_and_versions_are_written_but_no_token(train_decoder):
    output_dir = train_decoder("--hub_token=hf_secret", "--checkpointing_steps=1")
    written = json.loads((output_dir / "training_args.json").read_text())
    assert written["arguments"]["learning_rate"] == 1e-3 and written["versions"]["paddle"] == paddle.__version__
    assert not [f for f in output_dir.rglob("*") if f.is_file() and b"hf_secret" in f.read_bytes()]


# A user's mistakes.


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.once
def test_mistakes_get_one_line_and_status_two(decoder_job, decoder_flags, kandinsky, tmp_path, photos, capsys):
    prior, decoder = kandinsky
    no_movq = shutil.copytree(decoder, tmp_path / "no_movq", ignore=shutil.ignore_patterns("movq"))
    no_weights = shutil.copytree(decoder, tmp_path / "no_weights")
    (no_weights / "unet" / "diffusion_paddle_model.safetensors").unlink()
    (tmp_path / "file").write_text("")
    bad_photo = copy_photos(tmp_path / "bad", 2)
    sorted(bad_photo.glob("*.jpg"))[0].write_bytes(b"no picture")
    cases = {
        "--train_data_dir=/nowhere": "--train_data_dir: '/nowhere' is not a folder",
        f"--train_data_dir={bad_photo}": "astronaut.jpg (row 0): the image cannot be read",
        "--image_column=img": "--image_column: ",
        "--resolution=100": "--resolution: 100 does not fit this decoder; expected a multiple of 8",
        f"--pretrained_decoder_model_name_or_path={photos}": "is not a pipeline: it has no model_index.json",
        f"--pretrained_decoder_model_name_or_path={prior}": "has no part 'unet'; it has image_encoder, image_processor",
        f"--pretrained_prior_model_name_or_path={decoder}": "has no part 'prior'; it has movq, scheduler, unet",
        f"--pretrained_decoder_model_name_or_path={no_movq}": "has no part 'movq'",
        f"--pretrained_decoder_model_name_or_path={no_weights}": "has no weights in unet/",
        "--pretrained_decoder_model_name_or_path=/nowhere": "is not a folder; expected a pipeline's folder or a hub",
        f"--output_dir={tmp_path / 'file' / 'out'}": "--output_dir: files cannot be written to",
        f"--output_dir={photos / 'out'}": "/out' lies in --train_data_dir, so the run's own images would become",
        "--resume_from_checkpoint=checkpoint-9": "--resume_from_checkpoint: 'checkpoint-9' is neither a folder nor a",
        "--report_to=wandb": "--report_to wandb: not installed",
        "--push_to_hub": "--push_to_hub: no token; expected the environment variable HF_TOKEN",
        "--sharding_stage=2": "--sharding_stage 2: expected it with a --sharding_degree above 1",
        "--lr_scheduler=polynomial": "--lr_warmup_steps 500: the run has 2 steps; expected fewer with polynomial",
        "--learning_rat=1": "--learning_rat is not a flag of this script; did you mean --learning_rate?",
    }
    for flag, expected in cases.items():
        with pytest.raises(SystemExit) as stopped:
            decoder_job.main([*decoder_flags, flag])
        last = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and "error: " in last and expected in last, (flag, last)


@pytest.mark.once
def test_a_run_has_its_folder_before_it_loads_anything(train_decoder, decoder_job, decoder_flags, capsys):
    """Of two that a scheduler starts, the second one ends at once, and nothing changes between choice and resume."""
    out = train_decoder("--max_train_steps=3")
    flags = [*decoder_flags, "--resume_from_checkpoint=latest", "--max_train_steps=4"]

    def start_another(args):
        with pytest.raises(SystemExit) as stopped:
            decoder_job.main(flags)
        assert stopped.value.code == 2 and ": another run is at work there (process " in capsys.readouterr().err
        return build_dataset(args)

    job_main(decoder_job.build_parser, decoder_job.KandinskyDecoderTrainingModule, start_another)(flags)
    assert "checkpoint-3 at step 3" in capsys.readouterr().out and not list(out.glob(".*"))

    with pytest.raises(SystemExit) as stopped:
        train_decoder(f"--resume_from_checkpoint={out / 'checkpoint-3'}", "--max_train_steps=2", out="beyond")
    assert stopped.value.code == 2 and "is of step 3, but the run has 2 steps; expected" in capsys.readouterr().err


@pytest.mark.once
def test_a_checkpoint_of_another_run_is_refused_with_what_differs(train_decoder, tmp_path, photos, capsys):
    checkpoint = train_decoder("--checkpointing_steps=2") / "checkpoint-2"
    other_data = shutil.copytree(photos, tmp_path / "other_data")
    captions = (photos / "metadata.jsonl").read_text()
    (other_data / "metadata.jsonl").write_text(captions.replace("photo", "drawing"))
    other_image = shutil.copytree(photos, tmp_path / "other_image")
    (other_image / "coffee.jpg").write_bytes((photos / "coffee.jpg").read_bytes() + b" ")
    other_job = shutil.copytree(checkpoint, tmp_path / "other_job")
    edit_json(other_job / "state.json", job="KandinskyPriorTrainingModule")
    other_split = shutil.copytree(checkpoint, tmp_path / "other_split")
    edit_json(other_split / "state.json", split="validation")
    cases = {
        (checkpoint, "--seed=1"): "is of another run: its --seed is 0, here it is 1",
        (checkpoint, "--background_color=black"): "was trained with #ffffff, now it is #000000",
        (checkpoint, "--max_train_samples=3"): "its number of samples is 7, here it is 3; expected the same, or --acce",
        (checkpoint, f"--train_data_dir={other_data}"): "is of another run: its data (a hash of all captions",
        (checkpoint, f"--train_data_dir={other_image}"): "is of another run: its images (a hash of the contents of all",
        (other_job, "--seed=0"): "its job is KandinskyPriorTrainingModule, here it is KandinskyDecoderTrainingModule",
        (other_split, "--seed=0"): "its --dataset_split is validation, here it is train",
    }
    for (folder, flag), expected in cases.items():
        with pytest.raises(SystemExit) as stopped:
            train_decoder(f"--resume_from_checkpoint={folder}", flag, out="resumed")
        last = capsys.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and expected in last, last

    state = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({key: state[key] for key in state if key != "images"}))
    train_decoder(f"--resume_from_checkpoint={checkpoint}", f"--train_data_dir={other_image}", out="older")
    assert "resumed from" in capsys.readouterr().out, "a checkpoint of an older version says nothing of images"
