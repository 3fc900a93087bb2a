"""The optax transformation beside the PyTorch optimizer, and on 8 devices that XLA makes of one CPU."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from patched import output_of, patched

from coupled_adam import CoupledAdam
from coupled_adam.optax import coupled_adam, scale_by_coupled_adam

ROOT = Path(__file__).parents[1]
SHAPES = {"embedding": (50, 8), "head": {"kernel": (8, 30), "bias": (30,)}, "dense": (8, 8)}
COUPLED = {"embedding": True, "head": {"kernel": True, "bias": False}, "dense": False}
AXES = {"embedding": 0, "head": 1, "dense": 0}


def numbers(seed: int, scale: float = 1.0) -> Any:
    draw = np.random.default_rng(seed)
    make = lambda shape: (scale * draw.normal(size=shape)).astype(np.float32)  # noqa: E731
    return jax.tree.map(make, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def named(tree: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(tree)}


#: A head's kernel is (H, V) here and (V, H) there.
def as_torch(name: str, x: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(x)).T.contiguous() if "kernel" in name else torch.tensor(np.asarray(x))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"coupling_scale": 0.25, "coupling_factor": 0.3, "weight_decay": 0.1},
        {"betas": (0.0, 0.95), "eps": 1e-4},
        {"betas": (0.9, 0.5)},
    ],
)
def test_a_hundred_steps_are_those_of_the_torch_optimizer(options: dict[str, Any]) -> None:
    params = numbers(0)
    theirs = {name: torch.nn.Parameter(as_torch(name, x)) for name, x in named(params).items()}
    coupled = {name for name, is_coupled in named(COUPLED).items() if is_coupled}
    groups = [
        {"params": [p for name, p in theirs.items() if name in coupled], "second_moment": "vocabulary"},
        {"params": [p for name, p in theirs.items() if name not in coupled]},
    ]
    reference = CoupledAdam(groups, lr=1e-3, fused=False, **options)

    ours = dict(options)
    b1, b2 = ours.pop("betas", (0.9, 0.999))
    optimizer = coupled_adam(1e-3, b1, b2, coupled=COUPLED, vocabulary_axis=AXES, **ours)
    params = jax.tree.map(jnp.asarray, params)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for step in range(100):
        grads = numbers(step + 1, scale=10.0 ** (step % 5 - 3))
        for name, g in named(grads).items():
            theirs[name].grad = as_torch(name, g)
        reference.step()
        updates, state = update(jax.tree.map(jnp.asarray, grads), state, params)
        params = optax.apply_updates(params, updates)
    for name, x in named(params).items():
        torch.testing.assert_close(as_torch(name, x), theirs[name].detach(), rtol=1e-6, atol=1e-6)
    second = named(optax.tree.get(state, "nu"))
    for name, p in theirs.items():
        found = as_torch(name, second[name])
        torch.testing.assert_close(found, reference.state[p]["exp_avg_sq"], rtol=1e-5, atol=0.0)


def test_what_is_not_coupled_is_optax_adam() -> None:
    ours, theirs = scale_by_coupled_adam(coupled=COUPLED, vocabulary_axis=AXES), optax.scale_by_adam()
    params = jax.tree.map(jnp.asarray, numbers(0))
    first, second = ours.init(params), theirs.init(params)
    for step in range(5):
        grads = jax.tree.map(jnp.asarray, numbers(step + 1))
        a, first = ours.update(grads, first)
        b, second = theirs.update(grads, second)
    for name in ("['dense']", "['head']['bias']"):
        np.testing.assert_allclose(named(a)[name], named(b)[name], rtol=2e-5)


def test_gradients_that_sum_to_zero_leave_the_mean_where_it_is() -> None:
    optimizer = coupled_adam(1e-2, coupled=True)
    params = jnp.asarray(numbers(0)["embedding"])
    state, mean = optimizer.init(params), params.mean(0)
    for step in range(50):
        g = numbers(step + 1)["embedding"]
        updates, state = optimizer.update(jnp.asarray(g - g.mean(0)), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params.mean(0), mean, atol=1e-6)


def test_a_mask_may_be_a_prefix_or_a_function() -> None:
    params = {"head": jnp.ones((4, 3)), "body": {"a": jnp.ones(3), "b": jnp.ones((3, 3))}}
    whole = {"head": True, "body": {"a": False, "b": False}}

    def by_shape(tree: Any) -> Any:
        return jax.tree.map(lambda x: x.shape == (4, 3), tree)

    for mask in (whole, {"head": True, "body": False}, by_shape):
        transformation = scale_by_coupled_adam(coupled=mask)
        state = transformation.init(params)
        shapes = {name: x.shape for name, x in named(state.nu).items()}
        assert shapes == {"['head']": (1, 3), "['body']['a']": (3,), "['body']['b']": (3, 3)}
        assert jax.tree.structure(transformation.update(params, state)[1]) == jax.tree.structure(state)


def test_low_precision_has_moments_in_float32() -> None:
    transformation = scale_by_coupled_adam(coupled=True)
    params = jnp.ones((4, 3), jnp.bfloat16)
    state = transformation.init(params)
    updates, state = transformation.update(params, state)
    assert updates.dtype == jnp.bfloat16 and state.mu.dtype == state.nu.dtype == jnp.float32


def test_the_state_may_be_donated() -> None:
    optimizer, params = coupled_adam(1e-3, coupled=COUPLED, vocabulary_axis=AXES), jax.tree.map(jnp.asarray, numbers(0))
    step = jax.jit(optimizer.update, donate_argnums=1)
    assert jnp.isfinite(step(params, optimizer.init(params), params)[0]["embedding"]).all()


BAD = {
    "b1": ({"b1": 1.0}, "b1 must be in [0, 1), but is 1.0"),
    "b2": ({"b2": -0.1}, "b2 must be in [0, 1), but is -0.1"),
    "eps": ({"eps": -1.0}, "eps must be 0 or more, but is -1.0"),
    "not a number": ({"eps": float("nan")}, "eps must be 0 or more, but is nan"),
    "scale": ({"coupling_scale": 0.0}, "coupling_scale must be a positive number, but is 0.0"),
    "factor": ({"coupling_factor": 2.0}, "coupling_factor must be in [0, 1], but is 2.0"),
    "a vector": ({"coupled": {"a": False, "b": True}}, "['b'] is coupled but has shape (3,)"),
    "no bool": ({"coupled": {"a": 2, "b": False}}, "coupled has 2 for ['a'], but takes True or False"),
    "nothing": ({"coupled": False}, "name the output embedding, or use optax.adamw"),
    "another tree": ({"coupled": {"a": True, "c": False}}, "coupled does not fit the parameters"),
    "axis": ({"vocabulary_axis": 2}, "vocabulary_axis is 2 for ['a'], but must be 0 or 1"),
    "axes": ({"vocabulary_axis": {"c": 1}}, "vocabulary_axis does not fit the parameters"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_inputs_are_named(case: str) -> None:
    given, message = BAD[case]
    with pytest.raises(ValueError, match=re.escape(message)):
        scale_by_coupled_adam(**{"coupled": {"a": True, "b": False}} | given).init(
            {"a": jnp.ones((4, 3)), "b": jnp.ones(3)}
        )


#: Steps on 8 devices, beside those on one; and the collectives that the compiler put in.
SHARDED = """
import re, sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from coupled_adam.optax import scale_by_coupled_adam

assert len(jax.devices()) == 8
mesh = jax.make_mesh((8,), ("vocabulary",), axis_types=(AxisType[sys.argv[1]],))
numbers = lambda seed: jnp.asarray(np.random.default_rng(seed).normal(size=(64, 16)), jnp.float32)
whole = scale_by_coupled_adam(coupled=True)
state = whole.init(numbers(0))
wanted = []
for seed in range(1, 4):
    update, state = whole.update(numbers(seed), state)
    wanted.append(update)

jax.set_mesh(mesh)
rows = NamedSharding(mesh, P("vocabulary", None))
spread = jax.jit(whole.init)(jax.device_put(numbers(0), rows))
update = jax.jit(whole.update)
for seed in range(1, 4):
    g = jax.device_put(numbers(seed), rows)
    found, spread = update(g, spread)
    assert found.sharding.is_equivalent_to(rows, 2), found.sharding
    np.testing.assert_allclose(found, wanted[seed - 1], rtol=1e-5, atol=1e-6)

inside = scale_by_coupled_adam(coupled=True, axis_name="vocabulary")
moments = type(spread)(P(), P("vocabulary", None), P())
mapped = jax.jit(jax.shard_map(inside.update, in_specs=(P("vocabulary", None), moments),
                               out_specs=(P("vocabulary", None), moments)))
apart = whole.init(jax.device_put(numbers(0), rows))
for seed in range(1, 4):
    found, apart = mapped(jax.device_put(numbers(seed), rows), apart)
    np.testing.assert_allclose(found, wanted[seed - 1], rtol=1e-5, atol=1e-6)

text = update.lower(g, spread).compile().as_text()
kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
print(re.findall(rf"= (\\S+) ({kinds})(?:-start)?\\(", text))
"""


@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_sharded_rows_take_one_all_reduce(axes: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, axes],
        env={
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "PYTHONPATH": ":".join(sys.path),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[('f32[16]{0}', 'all-reduce')]"]


#: The patched optax beside ours, in one process.
PATCHED = """
import jax, numpy as np, optax
from coupled_adam import optax as ours
params = {"embed": np.ones((5, 3), np.float32), "kernel": np.ones((3, 3), np.float32)}
options = {"coupled": {"embed": True, "kernel": False}, "coupling_scale": 0.5, "weight_decay": 0.1}
found = []
for made in (optax.contrib.coupled_adam(1e-3, **options), ours.coupled_adam(1e-3, **options)):
    state = made.init(params)
    for seed in range(3):
        draw = np.random.default_rng(seed)
        grads = {name: draw.normal(size=x.shape).astype(np.float32) for name, x in params.items()}
        updates, state = made.update(grads, state, params)
    found.append(jax.tree.leaves((updates, state)))
assert all((a == b).all() for a, b in zip(*found, strict=True))
print(optax.__file__)
"""


def test_the_patch_for_optax_does_the_same(tmp_path: Path) -> None:
    assert output_of(PATCHED, patched("optax", tmp_path)).strip() == str(tmp_path / "optax" / "__init__.py")


@pytest.mark.long
def test_the_example_trains() -> None:
    program = ROOT / "examples" / "optax_training.py"
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^(.+?) +loss (\S+)  mean shift ratio (\S+)$", done.stdout, re.MULTILINE)
    assert [name for name, *_ in found] == ["Coupled Adam", "AdamW"]
    (loss, shift), (_, other_shift) = ((float(a), float(b)) for _, a, b in found)
    assert loss < 5.5 and shift < 0.5 * other_shift


def test_an_example_with_too_little_text_says_so(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words")
    program = ROOT / "examples" / "optax_training.py"
    done = subprocess.run(
        [sys.executable, program, tmp_path / "short.txt"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1 and "only 3 words" in done.stderr and "Traceback" not in done.stderr
