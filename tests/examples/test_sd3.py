"""The two jobs of SD3, through their scripts."""

import ppdiffusers_train  # noqa: F401

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import paddle
import pytest
from PIL import Image
from ppdiffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.draws import Draws, RowDraws
from ppdiffusers_train.errors import UserError
from ppdiffusers_train.models.lora import load_lora, lora_parameters
from ppdiffusers_train.models.lora_files import read_lora, write_lora
from tests.conftest import (
    ROOT,
    check_recompute,
    copy_photos,
    encode,
    encoded_samples,
    first_losses,
    optimizer_state,
    same,
    scalars,
    tensors,
    weights,
)

JOBS = ["sd3", "lora_sd3"]
LORA_FILE, FULL_FILE = "paddle_lora_weights.safetensors", "trainable_modules.safetensors"


def trained_weights(name, folder):
    return tensors(folder / LORA_FILE) if name == "lora_sd3" else weights(folder, "transformer")


def load_pipeline(folder, **options):
    pipe = StableDiffusion3Pipeline.from_pretrained(str(folder), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe):
    paddle.seed(1)
    return np.asarray(pipe("a cat", height=64, width=64, num_inference_steps=2, output_type="np").images[0])


def answer(transformer):
    """A transformer's output for fixed inputs."""
    transformer.eval()
    width, pooled = transformer.config.joint_attention_dim, transformer.config.pooled_projection_dim
    latents, channels = paddle.linspace(-1, 1, 1024), transformer.config.in_channels
    with paddle.no_grad():
        return transformer(
            latents.reshape([1, channels, 8, 8]), paddle.ones([1, 10, width]), paddle.ones([1, pooled]),
            paddle.to_tensor([500.0]),
        ).sample.numpy()  # fmt: skip


# Results.


def test_the_result_is_a_pipeline_in_which_the_transformer_alone_has_changed(train_sd3, sd3):
    out = train_sd3("sd3", "--shift=2")
    assert paint(load_pipeline(out)).shape == (64, 64, 3)
    assert not same(weights(out, "transformer"), weights(sd3, "transformer"))
    unchanged = ("vae/diffusion_paddle_model.safetensors", "text_encoder/model.safetensors")
    for part in (*unchanged, "text_encoder_3/model.safetensors", "tokenizer_3/spiece.model"):
        assert (out / part).samefile(sd3 / part)
    config = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert config["shift"] == 2, "inference has the schedule of training"


def test_without_t5_the_result_is_a_pipeline_without_it(train_sd3, sd3, tmp_path):
    base = shutil.copytree(sd3, tmp_path / "base")
    for part in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(base / part)
    out = train_sd3("sd3", "--no_t5", f"--pretrained_model_name_or_path={base}", "--validation_prompt=a cat")
    assert paint(load_pipeline(out, text_encoder_3=None, tokenizer_3=None)).shape == (64, 64, 3)
    embeds = next(iter(encoded_samples(out / "encoded").values()))["prompt_embeds"]
    assert not embeds[77:].any() and embeds[:77].any(), "zeros stand where T5's states would"


@pytest.mark.once
def test_every_flag_of_the_guide_is_one_of_ours(sd3_jobs):
    words = ["--pretrained_model_name_or_path=x", "--weighting_scheme=logit_normal", "--max_timestep_boundary=0.5"]
    args = sd3_jobs["lora_sd3"].build_parser().parse_args(words)
    assert args.lora_target_modules == "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj"
    assert (args.weighting_scheme, args.min_timestep_boundary, args.t5) == ("logit-normal", 0.0, True)
    assert (args.resolution, args.encoded_cache, args.output_dir) == (1024, True, "sd3-model-finetuned-lora")


# Training and inference agree.


def test_embeddings_and_latents_are_the_pipelines(build_sd3_module, sd3):
    module, pipe = build_sd3_module("sd3"), load_pipeline(sd3)
    rows = build_dataset(module.args)
    encoded = encode(module, rows, [0, 1])
    for index in (0, 1):
        embeds, _, pooled, _ = pipe.encode_prompt(rows[index]["caption"], None, None)
        assert np.array_equal(encoded["prompt_embeds"][index].numpy(), embeds[0].numpy())
        assert np.array_equal(encoded["pooled_prompt_embeds"][index].numpy(), pooled[0].numpy())
    config = pipe.vae.config
    decoded = encoded["latents"] / config.scaling_factor + config.shift_factor
    assert config.shift_factor and abs(float(decoded.mean() - encoded["latents"].mean())) > 0.01
    row = module.preprocess(rows[0], RowDraws(0, 0))
    with paddle.no_grad():
        mode = pipe.vae.encode(paddle.to_tensor(row["pixel_values"]).unsqueeze(0)).latent_dist.mode()
    assert np.allclose(decoded[0].numpy(), mode[0].numpy(), atol=1e-5)


def test_the_transformer_is_asked_as_the_pipeline_asks_it(build_sd3_module, sd3, monkeypatch):
    seen = []
    original = SD3Transformer2DModel.forward

    def forward(self, *args, **options):
        seen.append({name: value for name, value in options.items() if isinstance(value, paddle.Tensor)})
        return original(self, *args, **options)

    module, pipe = build_sd3_module("sd3", "--weighting_scheme=uniform"), load_pipeline(sd3)
    encoded = encode(module, build_dataset(module.args), [0, 1])
    monkeypatch.setattr(SD3Transformer2DModel, "forward", forward)
    latents = module.transformer.config.in_channels, 16, 16
    monkeypatch.setattr(
        module.transformer, "forward", lambda x, **options: forward(module.transformer, hidden_states=x, **options)
    )
    module(encoded, Draws(0, [0, 1]))
    pipe(["a cat"] * 2, height=64, width=64, num_inference_steps=3, guidance_scale=1.0)
    trained, generated = seen[0], seen[1]
    assert trained.keys() == generated.keys()
    assert tuple(trained["hidden_states"].shape) == (2, *latents)
    for name in trained:
        assert trained[name].shape == generated[name].shape and trained[name].dtype == generated[name].dtype, name
    assert generated["timestep"].tolist() == [1000, 1000], "σ · 1000, which begins at 1"
    assert set(trained["timestep"].tolist()) <= set((1000 * module.sigmas).numpy().tolist())


# What is trained.


def test_the_loss_is_the_weighted_error_of_the_velocity(build_sd3_module):
    module = build_sd3_module("sd3", "--weighting_scheme=bell")
    encoded = encode(module, build_dataset(module.args), [0, 1])
    draws = Draws(3, [0, 1])
    loss = float(module(encoded, draws))
    steps = draws.categorical("timesteps", module.density)
    noise, sigma = draws.normal("noise", encoded["latents"].shape[1:]), module.sigmas[steps].reshape([2, 1, 1, 1])
    noisy = (1 - sigma) * encoded["latents"] + sigma * noise
    prediction = module.transformer(
        noisy, encoded["prompt_embeds"], encoded["pooled_prompt_embeds"], 1000 * sigma.flatten()
    ).sample
    errors = ((prediction - (noise - encoded["latents"])) ** 2).mean([1, 2, 3])
    expected = float((errors * module.weights[steps]).mean())
    assert loss == pytest.approx(expected, rel=1e-5) and loss != pytest.approx(float(errors.mean()), rel=1e-2)


@pytest.mark.once
def test_the_perturbation_of_the_input_changes_the_loss(build_sd3_module):
    losses = first_losses(lambda *flags: build_sd3_module("sd3", *flags), [], ["--ip_noise_gamma=0.3"])
    assert losses[0] != losses[1]


@pytest.mark.once
@pytest.mark.parametrize("scheme", ["uniform", "mode", "bell"])
def test_each_scheme_and_the_boundaries_change_what_is_trained(train_sd3, scheme):
    one = scalars(train_sd3("sd3", "--max_train_steps=1", out="one"))
    other = scalars(train_sd3("sd3", f"--weighting_scheme={scheme}", "--max_train_steps=1", out=scheme))
    assert one != other


def test_boundaries_keep_to_their_part_of_the_way(build_sd3_module):
    module = build_sd3_module("sd3", "--min_timestep_boundary=0.5", "--max_timestep_boundary=0.6", "--shift=1")
    sigmas = module.sigmas[Draws(0, range(200)).categorical("timesteps", module.density)]
    assert 0.4 < float(sigmas.min()) and float(sigmas.max()) <= 0.5


@pytest.mark.parametrize("name", JOBS)
def test_only_what_should_learn_learns(build_sd3_module, name):
    module = build_sd3_module(name)
    trainable = {id(parameter) for parameter in module.trainable_parameters()}
    named = dict(module.transformer.named_parameters())
    if name == "lora_sd3":
        assert trainable == {id(p) for p in lora_parameters(module.transformer).values()}
        assert len({layer.split(".")[-1] for layer in read_names(module)}) == 6
    else:
        idle = {key for key, parameter in named.items() if id(parameter) not in trainable}
        assert idle == {"transformer_blocks.1.norm1_context.norm.bias", "norm_out.norm.bias"}
        assert not any(named[key].numpy().any() for key in idle)
    module.train()
    module(encode(module, build_dataset(module.args), [0, 1]), Draws(0, [0, 1])).backward()
    assert all(parameter.grad is not None for parameter in module.trainable_parameters())


def read_names(module):
    """Names of the layers that have LoRA."""
    return {name.rsplit(".lora.", 1)[0] for name in lora_parameters(module.transformer)}


@pytest.mark.once
def test_modules_learn_in_full_alone(train_sd3, sd3, capsys):
    out = train_sd3("sd3", "--trainable_modules=proj_out,transformer_blocks.*.norm1")
    said = capsys.readouterr().out
    assert "--trainable_modules: proj_out, 2,112 parameters, trained in full" in said
    assert "--trainable_modules: transformer_blocks.*.norm1, 12,672 parameters, trained in full" in said
    assert "Stable Diffusion 3: 14,784 trainable parameters" in said
    before, after = weights(sd3, "transformer"), weights(out, "transformer")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    blocks = [f"transformer_blocks.{block}.norm1.linear" for block in (0, 1)]
    assert changed == {f"{layer}.{part}" for layer in ("proj_out", *blocks) for part in ("weight", "bias")}


def test_modules_learn_in_full_beside_lora_and_are_loaded_and_resumed(train_sd3, sd3, build_sd3_module, tmp_path):
    flags = ["--trainable_modules=transformer.proj_out", "--use_ema", "--lora_alpha=6"]
    out = train_sd3("lora_sd3", *flags, "--max_train_steps=4", "--checkpointing_steps=2", out="whole")
    assert set(tensors(out / FULL_FILE)) == {"transformer.proj_out.weight", "transformer.proj_out.bias"}
    resume = [f"--resume_from_checkpoint={out / 'checkpoint-2'}", "--max_train_steps=4"]
    again = train_sd3("lora_sd3", *flags, *resume, out="resumed")
    for file in (LORA_FILE, FULL_FILE):
        assert same(tensors(out / file), tensors(again / file))
    module = build_sd3_module("lora_sd3", *flags[2:])
    base = answer(module.transformer)
    pipe = load_pipeline(sd3)
    load_lora(pipe.transformer, out)
    loaded = answer(pipe.transformer)
    assert np.abs(loaded - base).max() > 1e-3
    assert np.array_equal(
        pipe.transformer.proj_out.weight.numpy(), tensors(out / FULL_FILE)["transformer.proj_out.weight"]
    )


@pytest.mark.once
def test_parts_that_no_model_has_and_those_that_only_encode_are_refused(train_sd3, capsys):
    for pattern in ("to_x", "vae.decoder"):
        message = refused(capsys, lambda pattern=pattern: train_sd3("sd3", f"--trainable_modules={pattern}"))
        assert (
            f"--trainable_modules: {pattern!r} matches nothing that can be trained; "
            "there are transformer.pos_embed" in message
        )


# The loop.


def test_without_anything_random_cached_and_online_runs_are_the_same_to_the_bit(train_sd3):
    flags = ["--center_crop", "--max_train_steps=4"]
    for name in JOBS:
        cached = train_sd3(name, *flags, out=f"{name}-cached")
        online = train_sd3(name, *flags, "--no_encoded_cache", out=f"{name}-online")
        assert len(encoded_samples(cached / "encoded")) == 7 and not (online / "encoded").exists()
        assert scalars(cached) == scalars(online) and same(trained_weights(name, cached), trained_weights(name, online))


@pytest.mark.parametrize("name", JOBS)
def test_seven_steps_equal_three_and_four_more_bit_for_bit(train_sd3, name):
    flags = ["--random_flip", "--cache_variants=2", "--lr_scheduler=linear", "--lr_warmup_steps=2", "--use_ema"]
    flags += ["--max_train_steps=7"]
    whole = train_sd3(name, *flags, "--checkpointing_steps=7", out="whole")
    parts = train_sd3(name, *flags, "--checkpointing_steps=3", out="parts")
    shutil.rmtree(parts / "checkpoint-6")
    train_sd3(name, *flags, "--checkpointing_steps=7", "--resume_from_checkpoint=latest", out="parts")
    assert scalars(whole) == scalars(parts) and len(scalars(parts)) == 7
    assert same(*(optimizer_state(folder / "checkpoint-7") for folder in (whole, parts)))
    assert same(trained_weights(name, whole), trained_weights(name, parts))


@pytest.mark.once
@pytest.mark.parametrize("name", JOBS)
def test_validation_changes_no_number(train_sd3, name):
    plain = train_sd3(name, out="plain")
    flags = ["--validation_prompt=a cat", "--validation_steps=1", "--validation_inference_steps=1"]
    validated = train_sd3(name, *flags, "--num_validation_images=1", out="validated")
    assert scalars(plain) == scalars(validated) and same(trained_weights(name, plain), trained_weights(name, validated))
    assert len(list((validated / "validation").iterdir())) == 2


@pytest.mark.parametrize("name", JOBS)
def test_gradient_checkpointing_keeps_a_quarter_and_gives_the_same_gradients(build_sd3_module, name):
    check_recompute(build_sd3_module, name)


def test_the_shim_for_attention_can_go_when_ppdiffusers_defines_it_everywhere():
    code = """import zlib, paddle.nn.functional as functional, ppdiffusers, sys
    sys.exit(3 if hasattr(functional, "scaled_dot_product_attention_") else 0)"""
    code = "\n".join(line.strip() for line in code.splitlines())
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.once
def test_a_flag_that_changes_nothing_says_so(build_sd3_module, capsys):
    build_sd3_module("sd3", "--enable_xformers_memory_efficient_attention")
    assert "--enable_xformers_memory_efficient_attention: no effect, joint attention" in capsys.readouterr().out


@pytest.mark.once
def test_no_program_reads_a_transformers_lora_in_the_layout_of_kohya(train_sd3, tmp_path):
    updates = read_lora(train_sd3("lora_sd3", "--max_train_steps=1") / LORA_FILE)
    with pytest.raises(UserError, match="the kohya layout is for UNets and their text encoders"):
        write_lora(tmp_path / "lora.safetensors", updates, "kohya")


@pytest.mark.once
def test_a_dry_run_counts_all_six_models(train_sd3, capsys):
    train_sd3("lora_sd3", "--dry_run", "--trainable_modules=proj_out")
    said = capsys.readouterr().out
    assert "text_encoder_3" in said and "parameters of T5EncoderModel, frozen, encodes samples" in said
    assert "parameters of SD3Transformer2DModel, " in said
    train_sd3("sd3", "--dry_run")
    assert "--gradient_checkpointing" in capsys.readouterr().out


# LoRA.


def test_lora_loads_into_the_pipeline_exactly(train_sd3, sd3, build_sd3_module):
    flags = ["--lora_alpha=6", "--learning_rate=1e-2"]
    out = train_sd3("lora_sd3", *flags, "--max_train_steps=3", "--checkpointing_steps=3")
    keys = tensors(out / LORA_FILE)
    assert all(key.startswith("transformer.transformer_blocks.") and ".lora_" in key for key in keys)
    module, pipe = build_sd3_module("lora_sd3", *flags), load_pipeline(sd3)
    base = answer(pipe.transformer)
    module.load_weights(str(out / "checkpoint-3"))
    load_lora(pipe.transformer, out)
    assert np.allclose(answer(module.transformer), answer(pipe.transformer), atol=1e-5)
    assert np.abs(answer(pipe.transformer) - base).max() > 1e-3
    assert paint(pipe).shape == (64, 64, 3)


def test_load_lora_can_go_when_the_pipelines_own_reader_works(train_sd3, sd3, tmp_path):
    """With PEFT and Paddle 2.6 it does, and gives the same; it does not without, nor with Paddle 3."""
    out = train_sd3("lora_sd3", "--learning_rate=1e-2")
    pipe = load_pipeline(sd3)
    with pytest.raises(ValueError, match="PEFT backend is required"):
        pipe.load_lora_weights(str(out))
    load_lora(pipe.transformer, out)
    np.save(tmp_path / "expected.npy", answer(pipe.transformer))
    code = f"""
import ppdiffusers_train
import numpy, paddle
from ppdiffusers_train.models.attention import provide_joint_attention
from tests.examples.test_sd3 import answer, load_pipeline
provide_joint_attention()
pipe = load_pipeline({str(sd3)!r})
try:
    pipe.load_lora_weights({str(out)!r})
except AttributeError as error:
    assert "'ParameterDict' object has no attribute 'keys'" in str(error) and paddle.__version__ > "3", error
else:
    assert paddle.__version__ < "3"
    assert numpy.abs(answer(pipe.transformer) - numpy.load({str(tmp_path / "expected.npy")!r})).max() < 1e-5
"""
    variables = {**os.environ, "USE_PEFT_BACKEND": "True", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.once
def test_a_file_of_lora_layers_is_read_back_from_both_libraries_layouts(train_sd3, tmp_path):
    out = train_sd3("lora_sd3", "--learning_rate=1e-2", "--lora_alpha=6")
    updates = read_lora(out / LORA_FILE)
    write_lora(tmp_path / "torch.safetensors", updates, "diffusers")
    again = read_lora(tmp_path / "torch.safetensors")
    assert again.keys() == updates.keys()
    for layer, update in updates.items():
        assert np.allclose(again[layer].up @ again[layer].down, update.up @ update.down, atol=1e-6)
        assert again[layer].alpha == update.alpha == 6


# Mistakes.


def refused(capsys, run):
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.once
@pytest.mark.parametrize(
    "flag, message",
    [
        ("--resolution=68", "--resolution: 68 does not fit this VAE; expected a multiple of 8"),
        (
            "--min_timestep_boundary=0.7 --max_timestep_boundary=0.7",
            "0.7 and 0.7 leave no timestep of 1000; expected 0 <=",
        ),
        ("--weighting_scheme=mode --mode_scale=2", "--mode_scale: 2 is not from -1 to 1.7519"),
        ("--logit_std=0", "--logit_std: 0 is not above 0"),
        ("--shift=0", "--shift: '0' is not"),
        ("--weighting_scheme=cosmap", "--weighting_scheme: invalid choice: 'cosmap'"),
    ],
)
def test_a_mistake_is_one_line(train_sd3, capsys, flag, message):
    assert message in refused(capsys, lambda: train_sd3("sd3", *flag.split()))


@pytest.mark.once
def test_a_prompt_at_which_the_pipeline_would_fail_is_refused(train_sd3, sd3, capsys):
    with pytest.raises(ValueError):
        load_pipeline(sd3)("a " * 77, height=64, width=64, num_inference_steps=1)
    message = refused(capsys, lambda: train_sd3("sd3", "--validation_prompt=" + "a " * 77))
    assert "…" in message and "tokens; expected below 77" in message


@pytest.mark.once
def test_a_pipeline_without_t5_is_told_apart(train_sd3, sd3, capsys, tmp_path):
    base = shutil.copytree(sd3, tmp_path / "base")
    shutil.rmtree(base / "text_encoder_3")
    message = refused(capsys, lambda: train_sd3("sd3", f"--pretrained_model_name_or_path={base}"))
    assert "has no part 'text_encoder_3'; it has scheduler, text_encoder" in message


@pytest.mark.once
def test_buckets_and_small_images(train_sd3, capsys, tmp_path):
    data = copy_photos(tmp_path / "data", 5)
    Image.new("RGB", (50, 40)).save(sorted(data.glob("*.jpg"))[1])
    out = train_sd3(
        "sd3", f"--train_data_dir={data}", "--aspect_ratio_buckets", "--resolution=128", "--min_image_size=45",
        "--max_bad_samples=1",
    )  # fmt: skip
    said = capsys.readouterr().out
    assert "sizes are used (height x width: images)" in said
    assert len(encoded_samples(out / "encoded")) == 4
