"""The device in software itself: what it rounds, in which type it computes, what its ranks tell each other. Nothing of
the project is looked at here; the other tests of this folder rest on these."""

import ppdiffusers_train  # noqa: F401

import numpy as np
import pytest

from tests.device.conftest import LOW

DIGITS = {"float16": 11, "bfloat16": 8}  # of the mantissa, in bits
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133}
LARGEST = {"float16": 65504.0, "bfloat16": 255 * 2.0**120}
MANY = 300_000  # numbers: more than ranks tell each other at once


def nearest(exact, dtype):
    """Numbers rounded to the type: to nearest, ties to even, infinite where the largest is exceeded by half a step."""
    exact = np.asarray(exact, dtype="float64")
    step = np.maximum(2.0 ** (np.frexp(exact)[1] - DIGITS[dtype]), SMALLEST[dtype])
    rounded = np.round(exact / step) * step
    return np.where(np.abs(rounded) > LARGEST[dtype], np.copysign(np.inf, exact), rounded)


def factors(dtype):
    """Two lists of numbers whose products have all sizes, and some lie halfway between two numbers of the type."""
    rng = np.random.default_rng(0)
    sizes = {"float16": 14, "bfloat16": 80}[dtype]
    ones, others = (2 ** rng.uniform(-sizes, sizes, 2000) * rng.choice([-1, 1], 2000) for _ in range(2))
    ulp = 2.0 ** (1 - DIGITS[dtype])
    # Halfway: to the even one above, to the even one below; and around the last number that is not infinite.
    ones = [*ones, 1 + ulp, 1 + 3 * ulp, LARGEST[dtype], LARGEST[dtype], -LARGEST[dtype]]
    others = [*others, 1.5, 1.5, 1.0, 1 + ulp, 2.0]
    return nearest(ones, dtype).tolist(), nearest(others, dtype).tolist()


# Numbers of float32 of all sizes, and what lies halfway between two of a low type.
CAST = 2 ** np.random.default_rng(0).uniform(-30, 20, 2000)
CAST = [CAST, -CAST, *(nearest(CAST, low) * (1 + 2.0 ** -DIGITS[low]) for low in LOW)]
CAST = np.concatenate(CAST).astype("float32")


PROBES = {
    "place": ("place", {}),
    "failure": ("failure", {}),
    "scaler_steps": ("scaler_steps", {"dtype": "float16", "factors": [0.5, 4.0, 0.5]}),
    "adamw float32": ("adamw", {"dtype": "float32", "gradient_dtype": "float32"}),
    "adamw float32 found": ("adamw", {"dtype": "float32", "gradient_dtype": "float32", "found": [False, True, False]}),
}
for low in LOW:
    ones, others = factors(low)
    PROBES |= {
        f"multiplied {low}": ("multiplied", {"ones": ones, "others": others, "dtype": low}),
        f"cast {low}": ("cast", {"values": CAST.tolist(), "dtype": low}),
        f"matrix_product {low}": ("matrix_product", {"dtype": low}),
        f"layer_norm_types {low}": ("layer_norm_types", {"dtype": low}),
        f"in_place_in_a_part {low}": ("in_place_in_a_part", {"dtype": low}),
        f"adamw {low} {low}": ("adamw", {"dtype": low, "gradient_dtype": low}),
        f"adamw {low} float32": ("adamw", {"dtype": low, "gradient_dtype": "float32"}),
        f"adamw {low} found": ("adamw", {"dtype": low, "gradient_dtype": "float32", "found": [False, True, False]}),
    }


@pytest.fixture(scope="module")
def probed(on_device):
    """{key of a probe: its report}, of all of them in one process."""
    jobs = [{"call": f"tests.device.probes:{name}", "arguments": arguments} for name, arguments in PROBES.values()]
    reports = dict(zip(PROBES, on_device(jobs)))
    errors = [report["error"] for report in reports.values() if report["error"]]
    assert not errors, errors[0]
    return reports


def test_paddle_computes_on_it_without_being_asked_to(probed):
    assert probed["place"]["result"] == "Place(soft_device:0)"


@pytest.mark.parametrize("dtype", LOW)
def test_a_kernel_rounds_its_result_to_nearest_even_and_overflows(probed, dtype):
    one, other, product = np.asarray(probed[f"multiplied {dtype}"]["result"], dtype="float64").T
    assert probed[f"multiplied {dtype}"]["calls"][f"multiply {dtype} rounded"] == 1
    expected = nearest(one * other, dtype)
    assert (product == expected).all()
    assert np.isinf(product).sum() > 2 and (np.abs(expected) < SMALLEST[dtype] * 1000).any()


@pytest.mark.parametrize("dtype", LOW)
def test_a_cast_rounds_to_nearest_even(probed, dtype):
    """The host's own of Paddle 2.6 does not."""
    result = np.asarray(probed[f"cast {dtype}"]["result"], dtype="float64")
    assert (result == nearest(CAST, dtype)).all()


@pytest.mark.parametrize("dtype", LOW)
def test_amp_multiplies_matrices_in_the_low_type_there_and_back(probed, dtype):
    report = probed[f"matrix_product {dtype}"]
    assert report["calls"][f"matmul {dtype} rounded"] == report["calls"][f"matmul_grad {dtype} rounded"] == 1
    assert "matmul float32 native" not in report["calls"]
    result = report["result"]
    assert result["dtype"] == f"paddle.{dtype}" and result["gradient"] == "paddle.float32"
    half = 2.0 ** -DIGITS[dtype]  # half a step, relative: of the result, and less of the factors', which average out
    assert half / 8 < result["error"] / result["largest"] < 3 * half


@pytest.mark.parametrize("dtype", LOW)
def test_statistics_of_norms_stay_in_float32(probed, dtype):
    assert probed[f"layer_norm_types {dtype}"]["result"] == [f"paddle.{dtype}", "paddle.float32", "paddle.float32"]


@pytest.mark.once  # Paddle 2.6 knows no views on plugins
@pytest.mark.parametrize("dtype", LOW)
def test_a_part_of_a_tensor_is_written_in_its_place(probed, dtype):
    assert probed[f"in_place_in_a_part {dtype}"]["result"] == [0, 0, 1, 1, 0, 0]


def test_a_kernels_error_arrives_in_python(probed):
    assert probed["failure"]["result"].startswith("IndexError: (OutOfRange)")


@pytest.mark.parametrize("gradients", ["low", "float32"])
@pytest.mark.parametrize("dtype", LOW)
def test_adamw_moves_masters_as_it_moves_float32_weights(probed, dtype, gradients):
    """The gradients are numbers of both types, so all but the weights' type is the same: to the bit."""
    expected = probed["adamw float32"]["result"]
    result = probed[f"adamw {dtype} {dtype if gradients == 'low' else 'float32'}"]["result"]
    assert result["weights"][0] == f"paddle.{dtype}"
    assert result["weights"][1] == nearest(result["masters"][1], dtype).tolist()
    assert result.keys() == expected.keys()
    assert {name: result[name] for name in result if name != "weights"} == {
        name: expected[name] for name in result if name != "weights"
    }


@pytest.mark.parametrize("dtype", LOW)
def test_a_step_that_found_inf_leaves_weights_masters_and_moments(probed, dtype):
    expected, result = probed["adamw float32 found"]["result"], probed[f"adamw {dtype} found"]["result"]
    for name in result.keys() - {"weights"}:
        assert result[name] == expected[name] != probed["adamw float32"]["result"][name], name


def test_grad_scaler_meets_a_gradient_too_large_for_float16(probed):
    """65536 times a factor of 0.5 fits, times 4 does not: that step is skipped, and the scale halved."""
    assert [scale for _, scale in probed["scaler_steps"]["result"]] == [65536.0, 32768.0, 32768.0]
    weights = [weight for weight, _ in probed["scaler_steps"]["result"]]
    assert weights == pytest.approx([1 - 5e-4, 1 - 5e-4, 1 - 1e-3], abs=1e-7) and weights[0] == weights[1]


def test_ranks_tell_each_other_what_they_have(on_device, tmp_path):
    ranks = 3
    cases = [*((dtype, 1000) for dtype in LOW), ("float32", 1), ("float32", MANY)]
    jobs = [
        {
            "call": "tests.device.probes:collectives",
            "arguments": {"dtype": dtype, "size": size, "folder": tmp_path / f"{dtype}-{size}"},
        }
        for dtype, size in cases
    ]
    for job, report in zip(jobs, on_device(jobs, ranks=ranks)):
        assert not report["error"] and report["result"] == ["XCCL", ranks], report
        check_collectives(job["arguments"]["folder"], job["arguments"]["size"], ranks)


def check_collectives(folder, size, ranks):
    """That every rank's numbers are what they should be; all of them are small and whole."""
    had = [np.arange(size * ranks) % 8 + rank + 1 for rank in range(ranks)]
    whole, had = np.sum(had, axis=0), [numbers[:size] for numbers in had]
    for rank in range(ranks):
        left = np.load(folder / f"{rank}.npz")
        expected = {
            "sum": np.sum(had, axis=0),
            "later": np.sum(had, axis=0),
            "max": had[-1],
            "broadcast": had[-1],
            "all_gather": np.concatenate(had),
            "reduce_scatter": whole[rank * size : (rank + 1) * size],
        }
        if rank == 0:
            expected["reduce"] = expected["sum"]
        if rank == ranks - 1:
            expected["received"] = had[0]
        for name, numbers in expected.items():
            assert np.array_equal(left[name], numbers), (rank, name)
