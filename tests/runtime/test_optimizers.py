"""The optimizers of `--optimizer`: in runs, their options, and their sizes."""

import ppdiffusers_train  # noqa: F401

import shutil
from argparse import Namespace

import numpy as np
import paddle
import pytest
from PIL import Image

from ppdiffusers_train.errors import RunError, UserError
from ppdiffusers_train.loop.dry_run import inventory_of, options_of
from ppdiffusers_train.loop.memory_estimate import Peaks
from ppdiffusers_train.loop.optimizers import check_memory_flags, learning_rate_of, notices
from ppdiffusers_train.runtime.bf16_weights import Rounding, narrow_layers, narrow_models
from ppdiffusers_train.runtime.checkpoint import read_state
from ppdiffusers_train.runtime.fused_backward import FusedBackward
from ppdiffusers_train.runtime.optimizers.registry import OPTIMIZERS, build_optimizer, read_options
from ppdiffusers_train.runtime.precision import share_storage
from tests.conftest import last_error, optimizer_state, same, scalars, weights

FUSED = ["--fused_backward", "--max_grad_norm=0"]
BF16 = ["--param_dtype=bf16"]
RUNS = {
    "adafactor": ["--optimizer=adafactor", *FUSED, "--gradient_checkpointing"],
    "lion": ["--optimizer=lion", "--learning_rate=1e-5", "--max_grad_norm_per_parameter=0.1", "--max_grad_norm=0"],
    "prodigy": ["--optimizer=prodigy", "--optimizer_args", "d_coef=2", "safeguard_warmup=true", "--use_ema"],
    "schedulefree": ["--optimizer=schedulefree", "--lr_scheduler=constant_with_warmup", "--lr_warmup_steps=3"],
    "stochastic": ["--optimizer=adafactor", *FUSED, *BF16],
    "kahan": [*BF16, "--param_rounding=kahan", "--optimizer=adamw8bit"],
    "bf16 adamw": [*BF16, *FUSED],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_has_the_same_bits(train, name):
    flags = [*RUNS[name], "--max_train_steps=4", "--checkpointing_steps=2"]
    whole = train("prior", *flags, out="whole")
    shutil.copytree(whole, whole.parent / "parts")
    shutil.rmtree(whole.parent / "parts" / "checkpoint-4")
    parts = train("prior", *flags, "--resume_from_checkpoint=latest", out="parts")
    assert same(weights(whole, "prior"), weights(parts, "prior"))
    ends = whole / "checkpoint-4", parts / "checkpoint-4"
    assert same(*map(optimizer_state, ends)) and same(*(weights(end, "prior") for end in ends))
    assert read_state(ends[0])["optimizer"] == read_state(ends[1])["optimizer"]
    assert len(set(scalars(whole))) == 4


@pytest.mark.parametrize("flags", [[], ["--optimizer=lion"], ["--gradient_checkpointing", "--use_ema"]], ids=str)
def test_an_update_in_the_backward_pass_is_that_after_it(train, flags):
    """To the bit, with the same clipping."""
    flags = [*flags, "--max_grad_norm=0", "--max_grad_norm_per_parameter=0.01", "--max_train_steps=3"]
    after, fused = train("prior", *flags, out="after"), train("prior", *flags, "--fused_backward", out="fused")
    assert same(weights(after, "prior"), weights(fused, "prior"))
    norms = [scalars(out, "train/gradient_norm") for out in (after, fused)]
    assert scalars(after) == scalars(fused) and norms[0] == pytest.approx(norms[1], rel=1e-5)
    unclipped = train("prior", *flags[:-3], "--max_grad_norm=0", "--max_train_steps=3", "--fused_backward", out="not")
    assert not same(weights(fused, "prior"), weights(unclipped, "prior"))


def broken_at(job, monkeypatch, call: int, how: str):
    """Make loss or gradient of a prior's run NaN at one of its calls."""
    forward, calls = job.KandinskyPriorTrainingModule.forward, []

    def broken(self, encoded, draws):
        calls.append(None)
        loss = forward(self, encoded, draws)
        if len(calls) != call:
            return loss
        return loss * float("nan") if how == "loss" else loss + (0 * self.prior.proj_in.bias).sqrt().sum()

    monkeypatch.setattr(job.KandinskyPriorTrainingModule, "forward", broken)


@pytest.mark.parametrize("how, last", [("loss", 3), ("gradient", 2)])
def test_what_is_no_number_is_not_used_and_half_a_step_is_not_saved(
    train, kandinsky_jobs, monkeypatch, capsys, tmp_path, how, last
):
    broken_at(kandinsky_jobs["prior"], monkeypatch, 4, how)
    with pytest.raises(SystemExit) as stopped:
        train("prior", *FUSED, "--max_train_steps=5", "--checkpointing_steps=2")
    message, out = last_error(capsys), tmp_path / "out"
    assert stopped.value.code == 1 and "step 4, rank 0: the " in message
    assert message.endswith("the last checkpoint is untouched") and ("wrote checkpoint-3" in message) == (last == 3)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"][: last - 1]
    assert all(np.isfinite(array).all() for array in weights(out / f"checkpoint-{last}", "prior").values())


def test_a_gradient_in_several_parts_is_refused(train, kandinsky_jobs, monkeypatch, capsys):
    """As of a weight that two recomputed parts use."""
    job = kandinsky_jobs["prior"].KandinskyPriorTrainingModule
    forward = job.forward

    def twice(self, encoded, draws):
        from paddle.distributed.fleet.utils import recompute

        part = paddle.ones([1, self.prior.proj_in.weight.shape[0]])
        part.stop_gradient = False
        more = recompute(self.prior.proj_in, recompute(lambda x: x + self.prior.proj_in(x).mean(), part))
        return forward(self, encoded, draws) + 1e-3 * more.mean()

    monkeypatch.setattr(job, "forward", twice)
    with pytest.raises(SystemExit) as stopped:
        train("prior", *FUSED, "--max_train_steps=2")
    assert stopped.value.code == 1
    assert "--fused_backward: the gradient of prior.proj_in." in last_error(capsys)


def test_a_step_of_several_batches_is_refused(monkeypatch):
    parameter = paddle.create_parameter([2], "float32")
    fused = FusedBackward({"w": parameter}, build_optimizer("lion", 1e-3, [parameter], {}))
    with pytest.raises(RunError, match="--fused_backward: a step has several batches"), fused.micro_batch(last=False):
        parameter.sum().backward()
    before = parameter.numpy()
    with fused.micro_batch(last=True):
        parameter.sum().backward()
    assert np.allclose(parameter.numpy(), before - 1e-3) and parameter.grad is None
    monkeypatch.setattr("paddle.distributed.get_world_size", lambda: 2)
    args = Namespace(param_dtype="float32", fused_backward=True)
    with pytest.raises(UserError, match="--fused_backward: there are 2 processes; expected one"):
        check_memory_flags(args, "--optimizer lion", OPTIMIZERS["lion"])


def test_weights_in_bf16_are_exact_in_checkpoints_and_float32_in_results(train):
    out = train("prior", "--optimizer=adafactor", *BF16, "--max_train_steps=2", "--checkpointing_steps=2")
    saved, result = weights(out / "checkpoint-2", "prior"), weights(out, "prior")
    narrow = {name for name, array in saved.items() if array.dtype.name == "bfloat16"}
    others = {"prd_embedding", "positional_embedding", "clip_mean", "clip_std"}
    assert {name for name, array in saved.items() if array.ndim > 1} - narrow == others
    assert not any(saved[name].ndim == 1 for name in narrow)
    assert all(array.dtype == np.float32 for array in result.values())
    assert all(np.array_equal(array.astype("float32"), result[name]) for name, array in saved.items())


def test_gradients_of_weights_in_bf16_are_those_of_float32_weights_of_the_same_values():
    wide, narrow = (paddle.nn.Sequential(paddle.nn.Linear(6, 8), paddle.nn.Conv2D(3, 5, 3, 2, 1)) for _ in range(2))
    assert narrow_layers(narrow) == [narrow[1]], "all but the first parameter"
    narrow_models([narrow], widens=True)
    for own, other in zip(wide.parameters(), narrow.parameters()):
        own.set_value(other.astype("float32"))
    x = paddle.randn([2, 3, 6, 6])
    for model in (wide, narrow):
        model[1](model[0](x)).square().mean().backward()
    for own, other in ((wide[1].bias, narrow[1].bias), (wide[0].weight, narrow[0].weight)):
        assert np.allclose(own.grad, other.grad)
    rounded = wide[1].weight.grad.astype("bfloat16").astype("float32").numpy()
    assert np.array_equal(rounded, narrow[1].weight.grad.astype("float32").numpy())


def in_bf16(values):
    parameter = paddle.create_parameter([len(values)], "float32")
    parameter.set_value(np.float32(values))
    share_storage(parameter, parameter.astype("bfloat16"))
    return parameter


def test_stochastic_rounding_keeps_the_mean_and_kahan_the_sum():
    """Steps of a hundredth of the distance between two numbers in bfloat16."""
    steps, size = 200, 1000
    for kind, off in (("stochastic", 0.05), ("kahan", 0.02)):
        parameter = in_bf16(np.ones(size))
        rounding = Rounding(kind, 0, {parameter.name: "w"})
        lost = {}
        for step in range(1, steps + 1):
            value = rounding.widen(parameter, rounding.take(lost)) + 2**-7 / 100
            lost = rounding.store(parameter, value, step)
        found = parameter.astype("float32").numpy().astype(np.float64)
        if kind == "kahan" and not paddle.framework.use_pir_api():
            continue  # Paddle 2.6 does not round on CPUs, but cuts off
        assert set(np.round((found - 1) * 2**7, 6)) <= (set(range(15)) if kind == "stochastic" else {2})
        assert abs((found.mean() - 1) * 2**7 / 2 - 1) < off
    draws = [round_trip(seed, step, name) for seed, step, name in ((0, 1, "a"), (0, 1, "a"), (0, 2, "a"), (0, 1, "b"))]
    assert np.array_equal(draws[0], draws[1]) and not any(np.array_equal(draws[0], other) for other in draws[2:])


def round_trip(seed, step, name):
    parameter = in_bf16(np.ones(100))
    Rounding("stochastic", seed, {parameter.name: name}).store(parameter, paddle.full([100], 1 + 2**-8), step)
    return parameter.astype("float32").numpy()


REFUSED = {
    "--optimizer_args: 'x' is not an option of lion; expected one of beta1, beta2, weight_decay": [
        "--optimizer=lion", "--optimizer_args", "x=1",
    ],
    "--optimizer_args: 'beta1=1'; expected a number from 0 to below 1": ["--optimizer_args", "beta1=1"],
    "--optimizer_args: 'scale_parameter=2'; expected true or false": [
        "--optimizer=adafactor", "--optimizer_args", "scale_parameter=2",
    ],
    "--optimizer_args: 'd0=0'; expected a number above 0": ["--optimizer=prodigy", "--optimizer_args", "d0=0"],
    "argument --optimizer_args: 'lr' is not KEY=VALUE": ["--optimizer_args", "lr"],
    "--use_8bit_adam: there is --optimizer lion as well": ["--use_8bit_adam", "--optimizer=lion"],
    "--optimizer schedulefree: it needs no schedule": ["--optimizer=schedulefree", "--lr_scheduler=cosine"],
    "--optimizer schedulefree: its result is an average": ["--optimizer=schedulefree", "--use_ema"],
    "--optimizer prodigy: it needs all gradients at once": ["--optimizer=prodigy", *FUSED],
    "--fused_backward: --max_grad_norm is 1.0": ["--fused_backward"],
    "--fused_backward: --gradient_accumulation_steps is 2": [*FUSED, "--gradient_accumulation_steps=2"],
    "--fused_backward: --skip_nonfinite is 1": [*FUSED, "--skip_nonfinite=1"],
    "--fused_backward: fp16 has to skip steps": [*FUSED, "--mixed_precision=fp16"],
    "--max_grad_norm_per_parameter: gradients are clipped": ["--max_grad_norm_per_parameter=1"],
    "--param_dtype bf16: --amp_level is O2": [*BF16, "--amp_level=O2"],
}  # fmt: skip


@pytest.mark.once
@pytest.mark.parametrize("message", REFUSED)
def test_what_does_not_go_together_is_refused(train, capsys, message):
    with pytest.raises(SystemExit) as stopped:
        train("prior", *REFUSED[message])
    assert stopped.value.code == 2 and f"error: {message}" in last_error(capsys)


def test_options_have_the_types_of_their_defaults():
    found = read_options("adafactor", ["scale_parameter=True", "clip_threshold=2", "epsilon1=1e-20"])
    assert found == {"scale_parameter": True, "clip_threshold": 2.0, "epsilon1": 1e-20}
    assert read_options("prodigy", ["growth_rate=inf"]) == {"growth_rate": float("inf")}


def test_another_optimizer_is_refused_at_a_resume_and_the_rate_of_prodigy_is_1(train, capsys):
    train("prior", "--optimizer=prodigy", "--max_train_steps=1", "--checkpointing_steps=1")
    assert "--learning_rate 0.001: prodigy multiplies the rate that it finds by it" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        train("prior", "--optimizer=lion", "--max_train_steps=2", "--resume_from_checkpoint=latest")
    assert stopped.value.code == 2
    assert "has the state of prodigy, which cannot become that of lion" in last_error(capsys)
    rates = {name: learning_rate_of(Namespace(learning_rate=1e-4, optimizer=name)) for name in ("adamw", "prodigy")}
    assert rates == {"adamw": 1e-4, "prodigy": 1.0}


@pytest.mark.once
@pytest.mark.parametrize(
    "name, pair", [("adamw", "weight_decay=inf"), ("adamw", "epsilon=0"), ("lion", "weight_decay=1e400"),
                   ("adafactor", "clip_threshold=0"), ("adafactor", "decay_rate=inf"), ("prodigy", "d_coef=0")],
)  # fmt: skip
def test_options_that_can_only_fail_are_refused(name, pair):
    with pytest.raises(UserError, match=f"--optimizer_args: '{pair}'; expected a number"):
        read_options(name, [pair])
    assert read_options("prodigy", ["growth_rate=inf"]) == {"growth_rate": float("inf")}


@pytest.mark.once
def test_a_weight_decay_of_adamw_is_named_where_it_has_no_effect():
    args = Namespace(optimizer="lion", use_8bit_adam=False, learning_rate=1e-4, adam_beta1=0.9, adam_beta2=0.999)
    vars(args).update(adam_epsilon=1e-8, adam_weight_decay=0.3, param_rounding="stochastic", param_dtype="float32")
    assert [line.split(":")[0] for line in notices(args)] == ["--adam_weight_decay 0.3"]


def test_the_result_of_schedule_free_is_its_average(train):
    flags = ["--optimizer=schedulefree", "--learning_rate=1e-3", "--max_train_steps=3", "--checkpointing_steps=3"]
    out = train("prior", *flags)
    trained, result = weights(out / "checkpoint-3", "prior"), weights(out, "prior")
    state = optimizer_state(out / "checkpoint-3")
    for name, array in trained.items():
        if f"prior.{name}//z" in state:
            expected = (array - 0.1 * state[f"prior.{name}//z"]) / 0.9
            assert np.allclose(result[name], expected, atol=1e-6) and not np.array_equal(result[name], array)


SIZES = {
    "adafactor": ["--optimizer=adafactor"],
    "with a moment": ["--optimizer=adafactor", "--optimizer_args", "beta1=0.9"],
    **{name: [f"--optimizer={name}"] for name in ("lion", "prodigy", "schedulefree")},
    "kahan": ["--optimizer=lion", *BF16, "--param_rounding=kahan"],
    "8 bits": ["--optimizer=adamw8bit", *BF16],
}


@pytest.mark.once
@pytest.mark.parametrize("name", SIZES)
def test_a_dry_run_counts_weights_and_states_to_the_byte(train, build, name):
    out = train("prior", *SIZES[name], "--max_train_steps=1", "--checkpointing_steps=1")
    module = build("prior", *SIZES[name])
    row = {"image": Image.new("RGB", (64, 64)), "caption": "a cat", "name": "grey"}
    memory = inventory_of(module, row, module.args).memory(options_of(module.args))
    state = optimizer_state(out / "checkpoint-1").items()
    assert memory["optimizer"] == sum(array.nbytes for key, array in state if not key.endswith("//step"))
    saved = sum(array.nbytes for array in weights(out / "checkpoint-1", "prior").values())
    assert memory["trainable weights"] + 8 * module.prior.clip_mean.size == saved


@pytest.mark.once
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_an_update_takes_is_known(name):
    size = 2**20
    for kind, more in ((None, 0), ("kahan", 8)):
        parameter = paddle.create_parameter([1024, 1024], "float32")
        if kind:
            share_storage(parameter, parameter.astype("bfloat16"))
        rounding = kind and Rounding(kind, 0, {parameter.name: "w"})
        optimizer = build_optimizer(name, 1e-3, [parameter], {}, rounding)
        for _ in range(3):
            parameter.grad = paddle.ones([1024, 1024], parameter.dtype)
            with Peaks() as peaks:
                optimizer.step()
                peaks.mark()
        expected = 0 if name == "adamw" and not kind else OPTIMIZERS[name].update_bytes(size) + more * size
        # With the patches of a run, a cast to the same type makes no copy.
        spared = 2 * size if kind else 0
        assert 0.99 * (expected - spared) <= peaks.peaks[0] <= 1.01 * expected


def test_rates_of_text_encoders_and_of_second_matrices_are_multiples(build_sd_module, train_sd, capsys):
    flags = ["--train_text_encoder", "--text_encoder_lr=1e-5", "--learning_rate=1e-4", "--lora_plus_ratio=16"]
    module = build_sd_module("lora_sd", *flags)
    names = [name for name, parameter in module.named_parameters() if not parameter.stop_gradient]
    rates = {name: module.rate_factor(name) for name in names}
    assert {rate for name, rate in rates.items() if name.startswith("unet.") and ".down." in name} == {1.0}
    assert {rate for name, rate in rates.items() if name.startswith("unet.") and ".up." in name} == {16.0}
    assert {rate for name, rate in rates.items() if name.startswith("text_encoder.") and ".up." in name} == {1.6}
    with pytest.raises(SystemExit) as stopped:
        train_sd("lora_sd", "--text_encoder_lr=1e-5")
    assert stopped.value.code == 2 and "--text_encoder_lr: expected it with --train_text_encoder" in last_error(capsys)


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_the_rate_of_a_parameter_is_the_runs_times_its_own_factor(name):
    """Both of Paddle's optimizer and of ours: a step is nearly as large as the rate in each element."""
    parameters = [paddle.create_parameter([50], "float32") for _ in range(2)]
    parameters[1].optimize_attr["learning_rate"] = 16.0
    optimizer = build_optimizer(name, 1e-3, parameters, {"weight_decay": 0.0})
    before = [parameter.numpy() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = paddle.full([50], 0.3)
    optimizer.step()
    moved = [np.abs(parameter.numpy() - start).mean() for parameter, start in zip(parameters, before)]
    assert moved == pytest.approx([1e-3, 16e-3], rel=1e-3)
