"""--trainable_modules, for jobs of every kind."""

import ppdiffusers_train  # noqa: F401

import numpy as np
import pytest

from ppdiffusers_train.errors import UserError
from ppdiffusers_train.module import choose_trainable
from tests.conftest import tensors, weights


def trainable_names(module):
    """Names of the trainable parameters."""
    return {name for name, parameter in module.named_parameters() if not parameter.stop_gradient}


def test_without_the_flag_nothing_changes(build_sdxl_module):
    module = build_sdxl_module("sdxl")
    before = trainable_names(module)
    assert choose_trainable(module, None) == {} and trainable_names(module) == before


def test_a_pattern_names_layers_or_parameters_with_the_models_name_or_without(build):
    for pattern in ("conv_in", "unet.conv_in", "conv_in.*", "unet.conv_in.weight,*conv_in.bias"):
        module = build("decoder")
        sizes = choose_trainable(module, pattern)
        assert trainable_names(module) == {"unet.conv_in.weight", "unet.conv_in.bias"}
        assert sum(sizes.values()) == sum(parameter.size for parameter in module.trainable_parameters())


def test_beside_lora_the_layers_of_all_trained_models_stay_trainable(build_sdxl_module):
    module = build_sdxl_module("lora_sdxl", "--train_text_encoder")
    lora = trainable_names(module)
    choose_trainable(module, "conv_out,text_encoder_2.text_projection*")
    full = trainable_names(module) - lora
    assert lora < trainable_names(module) and {name.split(".")[1] for name in full} == {"conv_out", "text_projection"}


@pytest.mark.parametrize("pattern", ["*", "prior", "prior.*", "clip_*,proj_in"])
@pytest.mark.parametrize("name", ["prior", "prior_lora"])
def test_what_a_job_froze_stays_frozen(build, name, pattern):
    module = build(name)
    frozen = {name for name, parameter in module.named_parameters() if ".clip_" in name and parameter.stop_gradient}
    assert frozen == {"prior.clip_mean", "prior.clip_std"}
    if pattern.startswith("clip"):
        with pytest.raises(UserError, match="'clip_\\*' matches nothing"):
            choose_trainable(module, pattern)
    else:
        choose_trainable(module, pattern)
        assert "prior.proj_in.weight" in trainable_names(module)
    assert not trainable_names(module) & frozen


def test_what_a_full_job_of_ones_own_froze_stays_frozen(build):
    module = build("decoder")
    module.unet.conv_in.weight.stop_gradient = True
    choose_trainable(module, "unet")
    assert "unet.conv_in.weight" not in trainable_names(module) and "unet.conv_in.bias" in trainable_names(module)


@pytest.mark.once
def test_a_pattern_that_fits_nothing_is_refused_with_what_there_is(build):
    for pattern in ("conv_inn", "conv_in,", "movq.encoder"):
        with pytest.raises(UserError, match="matches nothing that can be trained; there are unet.conv_in, unet.time"):
            choose_trainable(build("decoder"), pattern)


def test_a_part_of_the_prior_is_trained_alone(train, kandinsky):
    out = train("prior", "--trainable_modules=proj_in")
    before, after = weights(kandinsky[0], "prior"), weights(out, "prior")
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"proj_in.weight", "proj_in.bias"}


def test_a_part_of_the_prior_is_trained_beside_lora_and_has_a_file(train):
    out = train("prior_lora", "--trainable_modules=proj_in")
    assert set(tensors(out / "trainable_modules.safetensors")) == {"unet.proj_in.weight", "unet.proj_in.bias"}
    assert not (train("prior_lora", out="plain") / "trainable_modules.safetensors").exists()


def test_the_teacher_of_a_distillation_with_lora_stays_as_it_is(lcm_jobs, sd, photos, tmp_path, capsys):
    flags = [f"--pretrained_teacher_model={sd}", f"--train_data_dir={photos}", "--resolution=64", "--seed=0"]
    with pytest.raises(SystemExit) as stopped:
        lcm_jobs["lora_sd"].main([*flags, f"--output_dir={tmp_path}", "--trainable_modules=conv_in"])
    assert stopped.value.code == 2
    assert "without LoRA, the model is the teacher" in capsys.readouterr().err.splitlines()[-1]
