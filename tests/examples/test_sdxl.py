"""The two jobs of SDXL, through their scripts."""

import ppdiffusers_train  # noqa: F401

import json
import shutil

import numpy as np
import paddle
import pytest
from PIL import Image
from ppdiffusers import StableDiffusionXLPipeline
from safetensors.numpy import load_file

from ppdiffusers_train.data.dataset import build_dataset
from ppdiffusers_train.draws import Draws, RowDraws
from ppdiffusers_train.models.lora import allow_text_encoder_lora, lora_parameters
from ppdiffusers_train.models.sdxl import encode_prompts
from ppdiffusers_train.models.stable_diffusion import encode_images
from ppdiffusers_train.reporting.trackers import clean_tag
from ppdiffusers_train.tensor_files import read_tensors
from tests.conftest import (
    check_recompute,
    copy_photos,
    distance,
    encode,
    encoded_samples,
    guide_on_toys,
    optimizer_state,
    same,
    scalars,
    tensors,
    weights,
)

JOBS = ["sdxl", "lora_sdxl"]
LORA_FILE = "paddle_lora_weights.safetensors"


def trained_weights(name, folder):
    return tensors(folder / LORA_FILE) if name == "lora_sdxl" else weights(folder)


def load_pipeline(folder):
    pipe = StableDiffusionXLPipeline.from_pretrained(str(folder), add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe):
    paddle.seed(1)
    picture = pipe("a cat", height=64, width=64, num_inference_steps=2, output_type="np").images[0]
    return np.asarray(picture)


# Results.


def test_the_result_is_a_pipeline_in_which_the_unet_alone_has_changed(train_sdxl, sdxl):
    out = train_sdxl("sdxl")
    assert paint(load_pipeline(out)).shape == (64, 64, 3)
    assert not same(weights(out), weights(sdxl))
    for part in ("vae/diffusion_paddle_model.safetensors", "text_encoder/model.safetensors"):
        assert (out / part).samefile(sdxl / part)
    settings = [json.loads((folder / "model_index.json").read_text()) for folder in (out, sdxl)]
    assert settings[0]["force_zeros_for_empty_prompt"] is settings[1]["force_zeros_for_empty_prompt"] is True


@pytest.mark.once
def test_a_new_prediction_type_is_trained_and_written_for_inference(train_sdxl):
    losses = {}
    for kind in ("epsilon", "v_prediction", "sample"):
        out = train_sdxl("sdxl", f"--prediction_type={kind}", "--max_train_steps=1", out=kind)
        losses[kind] = scalars(out)[0]
        assert json.loads((out / "scheduler" / "scheduler_config.json").read_text())["prediction_type"] == kind
    assert len(set(losses.values())) == 3


@pytest.mark.once
def test_the_guides_command_runs(sdxl_jobs, train_sdxl):
    words = """--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0
        --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix --dataset_name=lambdalabs/naruto-blip-captions
        --enable_xformers_memory_efficient_attention --resolution=512 --center_crop --random_flip
        --proportion_empty_prompts=0.2 --train_batch_size=1 --gradient_accumulation_steps=4 --gradient_checkpointing
        --max_train_steps=10000 --use_8bit_adam --learning_rate=1e-06 --lr_scheduler=constant --lr_warmup_steps=0
        --mixed_precision=fp16 --report_to=wandb --validation_epochs 5 --checkpointing_steps=5000 --push_to_hub
        --output_dir=sdxl-naruto-model""".split()
    for name in JOBS:
        words = [*words, "--validation_prompt=a cute Sundar Pichai creature"]
        args = sdxl_jobs[name].build_parser().parse_args(words)
        assert (args.proportion_empty_prompts, args.num_validation_images, args.resolution) == (0.2, 4, 512)
        assert len(scalars(train_sdxl(name, *guide_on_toys(sdxl_jobs[name], words), out=name))) == 1
    defaults = sdxl_jobs["sdxl"].build_parser().parse_args(["--pretrained_model_name_or_path=x"])
    assert (defaults.resolution, defaults.train_batch_size, defaults.output_dir) == (1024, 16, "sdxl-model-finetuned")


# What a sample becomes.


def ruler(width, height):
    """An image whose pixels encode their positions."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.uint8(np.stack([x, y, 0 * x], axis=-1)))


@pytest.mark.once
@pytest.mark.parametrize("flags", [[], ["--random_flip"], ["--center_crop"], ["--center_crop", "--random_flip"]])
def test_time_ids_tell_the_files_size_and_the_crop_that_was_taken(build_sdxl_module, flags):
    module, seen = build_sdxl_module("sdxl", *flags), set()
    for width, height in ((100, 64), (64, 90)):
        for position in range(12):
            row = {"image": ruler(width, height), "caption": "x", "name": "ruler"}
            sample = module.preprocess(row, RowDraws(0, position))
            pixels = np.rint((sample["pixel_values"] + 1) * 127.5).astype(int)
            flipped = pixels[0, 0, 0] > pixels[0, 0, -1]
            left = width - 1 - pixels[0, 0, 0] if flipped else pixels[0, 0, 0]
            assert sample["time_ids"].tolist() == [height, width, pixels[1, 0, 0], left, 64, 64]
            assert sample["time_ids"].dtype == np.float32
            seen.add((flipped, int(pixels[1, 0, 0]), int(left)))
    assert {flipped for flipped, *_ in seen} == ({False, True} if "--random_flip" in flags else {False})
    assert len(seen) == (2 if "--random_flip" in flags else 1) * 2 if "--center_crop" in flags else len(seen) > 15


@pytest.mark.once
def test_the_cached_latents_are_those_of_the_crop_that_their_time_ids_name(
    train_sdxl, build_sdxl_module, photos, tmp_path
):
    cache = tmp_path / "cache"
    train_sdxl("sdxl", f"--encoded_cache_dir={cache}", "--cache_variants=2", "--image_interpolation_mode=bilinear")
    module, found = build_sdxl_module("sdxl"), set()
    entries = encoded_samples(cache)
    for key, entry in entries.items():
        height, width, top, left = map(int, entry["time_ids"][:4])
        scale = 64 / min(width, height)
        for photo in photos.glob("*.jpg"):
            image = Image.open(photo).convert("RGB")
            if image.size != (width, height):
                continue
            image = image.resize((int(scale * width), int(scale * height)), Image.Resampling.BILINEAR)
            pixels = np.asarray(image.crop((left, top, left + 64, top + 64)), np.float32) / 127.5 - 1
            latents = encode_images(module.vae, paddle.to_tensor(pixels.transpose(2, 0, 1)[None])).numpy()[0]
            if np.allclose(latents, entry["latents"], atol=1e-5):
                found.add(key)
    assert len(found) == len(entries) == 14


@pytest.mark.parametrize("clip_skip", [0, 1])
def test_prompts_are_encoded_as_the_pipeline_encodes_them(build_sdxl_module, sdxl, clip_skip):
    module, pipe = build_sdxl_module("sdxl", f"--clip_skip={clip_skip}"), load_pipeline(sdxl)
    rows = build_dataset(module.args)
    encoded = encode(module, rows, [0])
    expected = pipe.encode_prompt(rows[0]["caption"], do_classifier_free_guidance=False, clip_skip=clip_skip or None)
    assert np.array_equal(encoded["prompt_embeds"].numpy(), expected[0].numpy())
    assert np.array_equal(encoded["pooled_prompt_embeds"].numpy(), expected[2].numpy())
    ids = pipe._get_add_time_ids((3, 4), (5, 6), (64, 64), "float32", text_encoder_projection_dim=32)
    assert ids.tolist() == [[3, 4, 5, 6, 64, 64]], "the order is the pipeline's"


@pytest.mark.once
def test_captions_are_dropped_as_often_as_asked_and_become_the_empty_prompt(build_sdxl_module):
    module = build_sdxl_module("sdxl", "--proportion_empty_prompts=0.3", "--center_crop")
    row = {"image": ruler(64, 64), "caption": "a cat", "name": "x"}
    tokens = [module.preprocess(row, RowDraws(0, position))["input_ids"] for position in range(300)]
    empty = [np.array_equal(ids, module.tokenizer("", padding="max_length", max_length=77).input_ids) for ids in tokens]
    assert 60 < sum(empty) < 120
    other = build_sdxl_module("sdxl", "--center_crop").preprocess(row, RowDraws(0, empty.index(True)))
    assert not np.array_equal(other["input_ids"], tokens[empty.index(True)])


@pytest.mark.parametrize("flags", [["sdxl"], ["lora_sdxl", "--train_text_encoder"]])
def test_a_dropped_caption_is_zeros_where_guidance_knows_no_prompt_as_zeros(build_sdxl_module, flags):
    module = build_sdxl_module(*flags, "--proportion_empty_prompts=0.5", "--center_crop")
    rows = [{"image": ruler(64, 64), "caption": "", "name": "x"}] * 8
    encoded, fed = encode(module, rows, range(8)), []
    forward = module.unet.forward
    module.unet.forward = lambda *args, **options: fed.append(options) or forward(*args, **options)
    module(encoded, Draws(0, range(8)))
    dropped = [RowDraws(0, position).bernoulli("drop_caption", 0.5) for position in range(8)]
    texts = fed[0]["encoder_hidden_states"], fed[0]["added_cond_kwargs"]["text_embeds"]
    assert 0 < sum(dropped) < 8, "a caption that is empty in the data is not dropped"
    assert all([bool((text == 0).all()) for text in batch] == dropped for batch in texts)


def test_biased_timesteps_are_drawn_more_often(build_sdxl_module):
    flags = ["--timestep_bias_strategy=range", "--timestep_bias_begin=0", "--timestep_bias_end=100"]
    module = build_sdxl_module("sdxl", *flags, "--timestep_bias_multiplier=9")
    draws = Draws(0, range(200))
    module.unet.forward = lambda sample, timesteps, **_: recorded.append(timesteps) or type("", (), {"sample": sample})
    recorded = []
    latents = paddle.zeros([200, 4, 2, 2])
    module({"latents": latents, "prompt_embeds": None, "pooled_prompt_embeds": None, "time_ids": None}, draws)
    assert 70 < sum(step < 100 for step in recorded[0].tolist()) < 130, "half of all: 9 * 100 of 9 * 100 + 900"


# The loop.


@pytest.mark.once
def test_without_anything_random_cached_and_online_runs_are_the_same_to_the_bit(train_sdxl, tmp_path):
    """The jobs share a cache, since they encode alike."""
    flags, cache = ["--center_crop", "--max_train_steps=4"], tmp_path / "cache"
    for name in JOBS:
        cached = train_sdxl(name, *flags, f"--encoded_cache_dir={cache}", out=f"{name}-cached")
        online = train_sdxl(name, *flags, "--no_encoded_cache", out=f"{name}-online")
        assert len(encoded_samples(cache)) == 7 and not (online / "encoded").exists()
        assert scalars(cached) == scalars(online) and same(trained_weights(name, cached), trained_weights(name, online))


@pytest.mark.once
def test_variants_keep_crops_and_flips_apart(train_sdxl, capsys):
    flags = ["--random_flip", "--proportion_empty_prompts=0.5", "--max_train_steps=1"]
    out = train_sdxl("sdxl", *flags, "--cache_variants=3")
    assert len(encoded_samples(out / "encoded")) == 21
    assert "--cache_variants 1: each sample keeps one crop" not in capsys.readouterr().out
    train_sdxl("sdxl", *flags, out="one")
    assert "--cache_variants 1: each sample keeps one crop" in capsys.readouterr().out


@pytest.mark.once
def test_another_vae_never_meets_the_old_ones_latents(train_sdxl, sdxl, tmp_path):
    vae = shutil.copytree(sdxl / "vae", tmp_path / "vae")
    arrays = load_file(vae / "diffusion_paddle_model.safetensors")
    arrays["quant_conv.bias"] = arrays["quant_conv.bias"] + 1
    (vae / "diffusion_paddle_model.safetensors").unlink()
    from safetensors.numpy import save_file

    save_file(arrays, vae / "diffusion_paddle_model.safetensors", {"format": "pd"})
    cache = f"--encoded_cache_dir={tmp_path / 'cache'}"
    train_sdxl("sdxl", cache)
    out = train_sdxl("sdxl", cache, f"--pretrained_vae_model_name_or_path={vae}", out="other")
    assert len(encoded_samples(tmp_path / "cache")) == 14
    assert same(weights(out, "vae"), arrays), "the result has the VAE that it was trained with"


@pytest.mark.parametrize("flags", [["sdxl", "--use_ema"], ["lora_sdxl"], ["lora_sdxl", "--train_text_encoder"]])
def test_seven_steps_equal_three_and_four_more_bit_for_bit(train_sdxl, flags):
    name, *flags = flags
    flags += ["--random_flip", "--cache_variants=2", "--lr_scheduler=linear", "--lr_warmup_steps=2", "--snr_gamma=5"]
    whole = train_sdxl(name, *flags, "--max_train_steps=7", "--checkpointing_steps=7", out="whole")
    # The schedule is that of the whole run from the beginning.
    parts = train_sdxl(name, *flags, "--max_train_steps=7", "--checkpointing_steps=3", out="parts")
    shutil.rmtree(parts / "checkpoint-6")
    resume = ["--max_train_steps=7", "--checkpointing_steps=7", "--resume_from_checkpoint=latest"]
    train_sdxl(name, *flags, *resume, out="parts")
    assert scalars(whole) == scalars(parts) and len(scalars(parts)) == 7
    assert same(*(optimizer_state(folder / "checkpoint-7") for folder in (whole, parts)))
    assert same(trained_weights(name, whole), trained_weights(name, parts))


@pytest.mark.once
@pytest.mark.parametrize("name", JOBS)
def test_validation_changes_no_number(train_sdxl, name):
    plain = train_sdxl(name, out="plain")
    flags = ["--validation_prompt=a cat", "--validation_steps=1", "--validation_inference_steps=1"]
    validated = train_sdxl(name, *flags, "--num_validation_images=1", out="validated")
    assert scalars(plain) == scalars(validated) and same(trained_weights(name, plain), trained_weights(name, validated))
    assert len(list((validated / "validation").iterdir())) == 2


@pytest.mark.parametrize("name, flags", [("sdxl", []), ("lora_sdxl", []), ("lora_sdxl", ["--train_text_encoder"])])
def test_gradient_checkpointing_keeps_a_quarter_and_gives_the_same_gradients(build_sdxl_module, name, flags):
    check_recompute(build_sdxl_module, name, *flags)


@pytest.mark.once
def test_scale_lr_multiplies_by_the_samples_of_a_step(train_sdxl):
    flags = ["--scale_lr", "--gradient_accumulation_steps=3", "--learning_rate=1e-4", "--max_train_steps=1"]
    assert scalars(train_sdxl("lora_sdxl", *flags), "train/learning_rate") == pytest.approx([6e-4])


# LoRA.


def test_lora_layers_of_unet_and_text_encoders_load_into_the_pipeline_exactly(train_sdxl, sdxl, build_sdxl_module):
    allow_text_encoder_lora()
    flags = ["--train_text_encoder", "--lora_alpha=6", "--learning_rate=1e-2"]
    out = train_sdxl("lora_sdxl", *flags, "--max_train_steps=3", "--checkpointing_steps=3")
    keys = tensors(out / LORA_FILE)
    assert {key.split(".")[0] for key in keys} == {"unet", "text_encoder", "text_encoder_2"}
    assert all("lora" in key for key in keys)
    module = build_sdxl_module("lora_sdxl", *flags)
    module.load_weights(str(out / "checkpoint-3"))
    module.eval()
    pipe = load_pipeline(sdxl)
    ids = paddle.to_tensor(np.int64([module.tokenizer("a cat", padding="max_length", max_length=77).input_ids]))
    before = encode_prompts(pipe.text_encoder, pipe.text_encoder_2, ids, ids)
    pipe.load_lora_weights(str(out))
    theirs = encode_prompts(pipe.text_encoder, pipe.text_encoder_2, ids, ids)
    ours = encode_prompts(module.text_encoder, module.text_encoder_2, ids, ids)
    for one, other, base in zip(ours, theirs, before):
        assert np.allclose(one.numpy(), other.numpy(), atol=1e-5)
        assert not np.allclose(one.numpy(), base.numpy(), atol=1e-3)
    condition = {"text_embeds": theirs[1], "time_ids": paddle.ones([1, 6])}
    answers = [
        unet(paddle.ones([1, 4, 16, 16]), 5, theirs[0], added_cond_kwargs=condition).sample.numpy()
        for unet in (pipe.unet, module.unet)
    ]
    assert np.allclose(*answers, atol=1e-5)


def test_the_shim_for_text_encoders_can_go_when_ppdiffusers_loads_them(sdxl, train_sdxl, monkeypatch):
    import ppdiffusers.loaders.lora as loaders
    from ppdiffusers.utils import deprecate

    out = train_sdxl("lora_sdxl", "--train_text_encoder", "--max_train_steps=1")
    monkeypatch.setattr(loaders, "deprecate", deprecate)
    with pytest.raises(ValueError, match="deprecation"):
        load_pipeline(sdxl).load_lora_weights(str(out))


@pytest.mark.parametrize("flags", [[], ["--train_text_encoder"]])
def test_only_lora_layers_learn(build_sdxl_module, flags):
    module = build_sdxl_module("lora_sdxl", *flags)
    own = lora_parameters(module.unet, **module.adapted)
    assert {id(p) for p in own.values()} == {id(p) for p in module.trainable_parameters()}
    module.train()
    module(encode(module, build_dataset(module.args), [0, 1]), Draws(0, [0, 1])).backward()
    # The first encoder's penultimate layer is what the UNet gets: the last one has no effect.
    idle = {name for name, parameter in own.items() if parameter.grad is None}
    assert idle == {name for name in own if name.startswith("text_encoder.text_model.encoder.layers.2.")}


# Mistakes.


def refused(capsys, run, status=2):
    with pytest.raises(SystemExit) as stopped:
        run()
    assert stopped.value.code == status
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.once
@pytest.mark.parametrize(
    "flag, message",
    [
        ("--resolution=66", "--resolution: 66 does not fit this VAE; expected a multiple of 4"),
        ("--timestep_bias_strategy=later --timestep_bias_multiplier=0", "--timestep_bias_multiplier: 0 is not above 0"),
        ("--timestep_bias_strategy=range --timestep_bias_end=1001", "expected 0 <= begin < end <= 1000"),
        (
            "--proportion_empty_prompts=1.5",
            "/--caption_dropout_rate: '1.5' is not a number from 0 to below 1",
        ),
        ("--image_interpolation_mode=sinc", "--image_interpolation_mode: invalid choice: 'sinc'"),
        (
            "--pretrained_vae_model_name_or_path=/nowhere",
            "--pretrained_vae_model_name_or_path: '/nowhere' is not a folder",
        ),
    ],
)
def test_a_mistake_is_one_line(train_sdxl, capsys, flag, message):
    assert message in refused(capsys, lambda: train_sdxl("sdxl", *flag.split()))


@pytest.mark.once
def test_a_vae_folder_that_is_none_is_refused(train_sdxl, sdxl, capsys):
    flag = f"--pretrained_vae_model_name_or_path={sdxl / 'unet'}"
    assert "is a UNet2DConditionModel; expected AutoencoderKL" in refused(capsys, lambda: train_sdxl("sdxl", flag))
    flag = f"--pretrained_vae_model_name_or_path={sdxl / 'tokenizer'}"
    assert "has no configuration" in refused(capsys, lambda: train_sdxl("sdxl", flag))


@pytest.mark.once
def test_a_stable_diffusion_of_another_kind_is_refused(train_sdxl, sdxl, capsys, tmp_path):
    other = shutil.copytree(sdxl, tmp_path / "sd15")
    shutil.rmtree(other / "text_encoder_2")
    message = refused(capsys, lambda: train_sdxl("sdxl", f"--pretrained_model_name_or_path={other}"))
    assert "has no part 'text_encoder_2'; it has scheduler, text_encoder" in message


@pytest.mark.once
def test_small_images_are_enlarged_and_counted_or_refused(train_sdxl, capsys, tmp_path):
    data = copy_photos(tmp_path / "data", 5)
    Image.new("RGB", (50, 40)).save(sorted(data.glob("*.jpg"))[1])
    flag = f"--train_data_dir={data}"
    train_sdxl("sdxl", flag)
    said = capsys.readouterr().out
    assert "1 of 5 images are smaller than 64 pixels and are enlarged, for example " in said
    message = refused(capsys, lambda: train_sdxl("sdxl", flag, "--min_image_size=45", out="refused"))
    assert "50 x 40 pixels, --min_image_size is 45" in message
    out = train_sdxl("sdxl", flag, "--min_image_size=45", "--max_bad_samples=1", out="skipped")
    assert len(encoded_samples(out / "encoded")) == 4


# Aspect-ratio buckets.

BUCKETS = ["--aspect_ratio_buckets", "--resolution=128", "--max_train_steps=4"]


@pytest.fixture
def shapes(tmp_path):
    """A folder of seven images of three shapes."""
    data = copy_photos(tmp_path / "shapes", 7)
    for index, file in enumerate(sorted(data.glob("*.jpg"))):
        width, height = [(300, 100), (90, 100), (100, 290)][index % 3]
        Image.open(file).convert("RGB").resize((width, height)).save(file)
    return f"--train_data_dir={data}"


@pytest.mark.once
def test_buckets_keep_the_shape_tell_it_to_the_unet_and_never_mix_in_a_batch(train_sdxl, sdxl_jobs, shapes, capsys):
    module_class, seen = sdxl_jobs["sdxl"].SDXLTrainingModule, []
    original = module_class.forward

    def forward(self, encoded, draws):
        seen.append((encoded["latents"].shape, encoded["time_ids"][:, 4:].tolist()))
        return original(self, encoded, draws)

    module_class.forward = forward
    try:
        train_sdxl("sdxl", shapes, *BUCKETS)
    finally:
        module_class.forward = original
    said = capsys.readouterr().out
    assert "3 of 3 sizes are used (height x width: images): 64 x 256: 3, 128 x 128: 2, 256 x 64: 2" in said
    for shape, targets in seen:
        assert targets == [[4 * shape[2], 4 * shape[3]]] * shape[0], "the VAE divides by 4"
    sizes = sorted((shape[2] * 4, shape[3] * 4, shape[0]) for shape, _ in seen)
    assert sizes == [(64, 256, 1), (64, 256, 2), (128, 128, 2), (256, 64, 2)], "every image once, in batches of two"


@pytest.mark.once
def test_buckets_train_alike_cached_online_accumulated_and_resumed(train_sdxl, shapes, capsys):
    flags = [shapes, *BUCKETS, "--center_crop", "--adam_epsilon=1e-4"]
    whole = train_sdxl("sdxl", *flags, "--checkpointing_steps=3", out="whole")
    online = train_sdxl("sdxl", *flags, "--no_encoded_cache", out="online")
    assert same(trained_weights("sdxl", whole), trained_weights("sdxl", online))
    single = ["--train_batch_size=1", "--gradient_accumulation_steps=2"]
    ones = train_sdxl("sdxl", *flags, *single, out="ones")
    assert distance(trained_weights("sdxl", whole), trained_weights("sdxl", ones)) < 1e-5
    resumed = train_sdxl("sdxl", *flags, f"--resume_from_checkpoint={whole / 'checkpoint-3'}", out="resumed")
    assert same(trained_weights("sdxl", whole), trained_weights("sdxl", resumed))
    flags += ["--train_batch_size=3", f"--resume_from_checkpoint={whole / 'checkpoint-3'}"]
    message = refused(capsys, lambda: train_sdxl("sdxl", *flags, out="other"))
    assert "its number of samples per step is 2, here it is 3" in message
    message = refused(
        capsys, lambda: train_sdxl("sdxl", *flags, "--train_batch_size=2", "--resolution=192", out="other")
    )
    assert "its sizes of buckets, which depend on --resolution, is " in message


# What the result is written as.


def test_the_result_has_the_type_that_is_asked_for_and_no_base_file_is_touched(train_sdxl, sdxl, capsys):
    before = {file: file.read_bytes() for file in sdxl.rglob("*.safetensors")}
    out = train_sdxl("sdxl", "--save_dtype=float16")
    assert before == {file: file.read_bytes() for file in sdxl.rglob("*.safetensors")}
    files = [out / file.relative_to(sdxl) for file in before]
    assert len(files) == 4 and all(array.dtype == np.float16 for file in files for array in tensors(file).values())
    pipe = StableDiffusionXLPipeline.from_pretrained(str(out), add_watermarker=False, paddle_dtype="float32")
    assert paint(pipe).shape == (64, 64, 3)
    lora = train_sdxl("lora_sdxl", "--save_dtype=bfloat16", "--save_format=diffusers", out="lora")
    arrays, _ = read_tensors(lora / "pytorch_lora_weights.safetensors")
    assert {array.dtype.name for array in arrays.values()} == {"bfloat16"}
    message = refused(capsys, lambda: train_sdxl("sdxl", "--save_dtype=bfloat16"))
    assert "--save_dtype bfloat16: ppdiffusers cannot read such files; expected float32 or float16" in message


@pytest.mark.once
def test_the_loss_of_each_file_is_reported_under_its_name(train_sdxl, photos, tmp_path):
    photos = shutil.copytree(photos, tmp_path / "100 %\n猫")
    flags = ["--debug_loss", "--train_batch_size=1", "--gradient_accumulation_steps=7", f"--train_data_dir={photos}"]
    out = train_sdxl("lora_sdxl", *flags)
    tags = {file: clean_tag(f"loss_for/{file} (row {row})") for row, file in enumerate(photo_files(photos))}
    losses = {file.name: scalars(out, tag) for file, tag in tags.items()}
    assert all(len(values) == 2 for values in losses.values()) and len(losses) == 7
    means = np.mean(list(losses.values()), axis=0)
    assert means == pytest.approx(scalars(out), rel=1e-5), "the step's loss is their mean"


def photo_files(folder):
    return sorted(folder.glob("*.jpg"))


@pytest.mark.once
def test_flags_without_effect_say_so(train_sdxl, capsys):
    train_sdxl("sdxl", "--enable_npu_flash_attention", "--max_train_steps=1")
    assert "--enable_npu_flash_attention: no effect, plain attention is used (" in capsys.readouterr().out


@pytest.mark.once
def test_a_cache_of_other_models_is_named_and_left_alone(train_sdxl, tmp_path, capsys):
    cache = f"--encoded_cache_dir={tmp_path / 'cache'}"
    train_sdxl("sdxl", cache, "--max_train_steps=1")
    line = "holds samples of other models, settings, code or versions, which are kept but not used"
    assert line not in capsys.readouterr().out
    train_sdxl("sdxl", cache, "--max_train_steps=1", "--center_crop", out="other")
    assert capsys.readouterr().out.count(line) == 1
    train_sdxl("sdxl", cache, "--max_train_steps=1", out="again")
    assert line not in capsys.readouterr().out
