"""What the runner computes on the device to show what it is like; the results are compared by `test_device.py`."""

import ppdiffusers_train  # noqa: F401

from pathlib import Path

import numpy as np
import paddle
import paddle.distributed as dist


def low(values, dtype):
    """A tensor on the device."""
    return paddle.to_tensor(np.asarray(values, dtype="float32")).astype(dtype)


def numbers(tensor) -> list:
    """A tensor's numbers, exact in float32; infinite ones as text, which JSON has no way to say."""
    return [str(x) if not np.isfinite(x) else float(x) for x in tensor.astype("float32").numpy().ravel()]


def place():
    return str(paddle.ones([1]).place)


def multiplied(ones, others, dtype):
    """[(a, b, a * b)] in the type, of two lists."""
    ones, others = low(ones, dtype), low(others, dtype)
    return list(zip(numbers(ones), numbers(others), numbers(ones * others)))


def cast(values, dtype):
    """Numbers of float32 in the type."""
    return numbers(low(values, dtype))


def matrix_product(dtype):
    """A product under `auto_cast`: its type, its gradient's, and how far it lies from float32's."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((64, 64)).astype("float32") for _ in range(2)]
    one, other = (paddle.to_tensor(array, stop_gradient=False) for array in arrays)
    with paddle.amp.auto_cast(dtype=dtype):
        result = paddle.matmul(one, other)
    result.astype("float32").sum().backward()
    expected = arrays[0] @ arrays[1]
    return {
        "dtype": str(result.dtype),
        "gradient": str(one.grad.dtype),
        "error": float(np.abs(result.astype("float32").numpy() - expected).max()),
        "largest": float(np.abs(expected).max()),
    }


def layer_norm_types(dtype):
    """Types of layer norm's result, mean and variance for an input of a low type, as on a GPU."""
    x, weight, bias = low(np.ones((2, 8)), dtype), paddle.ones([8]), paddle.zeros([8])
    results = paddle._legacy_C_ops.layer_norm(x, weight, bias, "epsilon", 1e-5, "begin_norm_axis", 1)
    return [str(result.dtype) for result in results]


def in_place_in_a_part(dtype):
    """Ones added to the middle of zeros, through a view."""
    whole = paddle.zeros([6], dtype=dtype)
    whole[2:4].add_(paddle.ones([2], dtype=dtype))
    return numbers(whole)


def failure():
    """The error of a kernel that runs into one: it has to come through the device's own code."""
    try:
        paddle.gather(paddle.ones([3]), paddle.to_tensor([7])).numpy()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def adamw(dtype, gradient_dtype, found=(False, False, False)):
    """Three steps of AdamW with masters, of gradients of any type; steps that have `found` inf are to do nothing."""
    rng = np.random.default_rng(0)
    layer = paddle.nn.Linear(8, 8, bias_attr=False)
    layer.weight.set_value(np.round(rng.standard_normal((8, 8)) * 64).astype("float32") / 64)  # exact in low types
    optimizer = paddle.optimizer.AdamW(1e-3, parameters=layer.parameters(), weight_decay=0.01)
    if dtype != "float32":
        layer, optimizer = paddle.amp.decorate(layer, optimizer, level="O2", dtype=dtype, master_weight=True)
    for step in found:
        gradient = np.round(rng.standard_normal((8, 8)) * 64).astype("float32") / 64
        layer.weight.grad = paddle.to_tensor(gradient).astype(gradient_dtype)
        optimizer._set_auxiliary_var("found_inf", paddle.to_tensor([step]))
        optimizer.step()
    state = {
        "weights": layer.weight,
        "masters": optimizer._master_weights[layer.weight.name] if dtype != "float32" else layer.weight,
        **{name.split("fp32_master_0_")[-1].split("w_0_")[-1]: value for name, value in optimizer.state_dict().items()
           if isinstance(value, paddle.Tensor)},
    }  # fmt: skip
    return {name: (str(value.dtype), numbers(value)) for name, value in state.items()}


def scaler_steps(dtype, factors):
    """`GradScaler` with a layer of one weight, whose gradients are `factors`: [(weight, scale)] after each."""
    layer = paddle.nn.Linear(1, 1, bias_attr=False)
    layer.weight.set_value(np.ones((1, 1), dtype="float32"))
    optimizer = paddle.optimizer.SGD(1e-3, parameters=layer.parameters())
    scaler, seen = paddle.amp.GradScaler(), []
    for factor in factors:
        with paddle.amp.auto_cast(dtype=dtype):
            loss = layer(paddle.ones([1, 1])).sum() * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.clear_grad(set_to_zero=False)
        seen.append((numbers(layer.weight)[0], float(scaler.state_dict()["scale"][0])))
    return seen


def collectives(dtype, size, folder):
    """Writes into `<folder>/<rank>.npz` what each collective leaves on a rank; those of rank r have r + 1, r + 2, ...
    Returns by what they came, and from how many."""
    if not dist.is_initialized():
        dist.init_parallel_env()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    left = {}

    def mine(count=size):
        return low(np.arange(count) % 8 + rank + 1, dtype)

    for name, op in (("sum", dist.ReduceOp.SUM), ("max", dist.ReduceOp.MAX)):  # Paddle hands plugins no AVG
        left[name] = mine()
        dist.all_reduce(left[name], op)
    left["later"] = mine()
    dist.all_reduce(left["later"], sync_op=False).wait()
    left["broadcast"] = mine()
    dist.broadcast(left["broadcast"], src=ranks - 1)
    left["reduce"] = mine()
    dist.reduce(left["reduce"], dst=0)
    parts = []
    dist.all_gather(parts, mine())
    left["all_gather"] = paddle.concat(parts)
    left["reduce_scatter"] = paddle.zeros([size], dtype=dtype)
    dist.reduce_scatter(left["reduce_scatter"], list(paddle.split(mine(size * ranks), ranks)))
    if rank == 0:
        dist.send(mine(), dst=ranks - 1)
    elif rank == ranks - 1:
        left["received"] = paddle.zeros([size], dtype=dtype)
        dist.recv(left["received"], src=0)
    Path(folder).mkdir(exist_ok=True)
    np.savez(Path(folder) / f"{rank}.npz", **{name: t.astype("float32").numpy() for name, t in left.items()})
    dist.barrier()
    return [dist.get_backend(), ranks]
