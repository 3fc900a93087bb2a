"""Coupled Adam for JAX, as a gradient transformation of optax. Needs the extra ``jax``.

The equations are those of ``CoupledAdam``. Nothing here imports torch.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from coupled_adam.errors import require

require("jax", "jax", "optax")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from jax import Array  # noqa: E402

__all__ = ["CoupledAdamState", "Mask", "coupled_adam", "scale_by_coupled_adam"]

Mask = Any | Callable[[optax.Params], Any]
"""A pytree like the parameters or a prefix of it, or a function that makes one from them; of bool, or of axes."""


class CoupledAdamState(NamedTuple):
    """The state of ``scale_by_coupled_adam``."""

    count: Array
    """Steps taken, int32, shape ()."""
    mu: optax.Updates
    """First moments, of the parameters' shapes; float32, or float64 for float64 parameters."""
    nu: optax.Updates
    """Second moments, of the same dtypes. That of a coupled matrix is (1, H), or (H, 1)."""


def coupled_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    mask: Mask | None = None,
    *,
    coupled: Mask,
    vocabulary_axis: Mask = 0,
    coupling_scale: float = 1.0,
    coupling_factor: float = 0.0,
    axis_name: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Coupled Adam with decoupled weight decay: ``optax.adamw`` whose coupled matrices share a second moment.

    Args:
        learning_rate: η, a number or a schedule.
        b1: decay rate β1 of the first moment, in [0, 1).
        b2: decay rate β2 of the second moment, in [0, 1).
        eps: ε ≥ 0, added to the root of the second moment.
        weight_decay: decoupled weight decay λ ≥ 0.
        mask: which parameters decay, as in ``optax.adamw``; None for all.
        coupled: which parameters are embedding matrices; this and the rest as for ``scale_by_coupled_adam``.
        vocabulary_axis: the axis of the vocabulary in a coupled matrix, 0 or 1.
        coupling_scale: s > 0, multiplies a coupled second moment.
        coupling_factor: κ in [0, 1], the share of the squared first moment in the second one.
        axis_name: of the mesh axis over which the vocabulary is spread, inside ``jax.shard_map``.

    Returns:
        A chain of ``scale_by_coupled_adam``, weight decay and the learning rate.

    Raises:
        ValueError: as ``scale_by_coupled_adam``.

    Examples:
        >>> import jax, jax.numpy as jnp, optax
        >>> from coupled_adam.optax import coupled_adam
        >>> params = {"embedding": jnp.ones((100, 8)), "dense": {"kernel": jnp.ones((8, 8))}}
        >>> optimizer = optax.chain(
        ...     optax.clip_by_global_norm(1.0),
        ...     coupled_adam(6e-4, 0.9, 0.95, coupled={"embedding": True, "dense": False}),
        ... )
        >>> state = optimizer.init(params)
        >>> grads = jax.tree.map(jnp.ones_like, params)
        >>> updates, state = optimizer.update(grads, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> optax.tree.get(state, "nu")["embedding"].shape
        (1, 8)
    """
    return optax.chain(
        scale_by_coupled_adam(
            b1,
            b2,
            eps,
            coupled=coupled,
            vocabulary_axis=vocabulary_axis,
            coupling_scale=coupling_scale,
            coupling_factor=coupling_factor,
            axis_name=axis_name,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_coupled_adam(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    coupled: Mask,
    vocabulary_axis: Mask = 0,
    coupling_scale: float = 1.0,
    coupling_factor: float = 0.0,
    axis_name: str | None = None,
) -> optax.GradientTransformation:
    r"""Rescale updates by Adam, with one second moment for all rows of each coupled embedding matrix.

    For a coupled matrix, whose rows i stand for the V tokens of a vocabulary,

    $$m \leftarrow \beta_1 m + (1-\beta_1)\, g, \qquad
    \bar v \leftarrow \beta_2 \bar v + (1-\beta_2)\, \frac1V \sum_i (g_i^2 + \kappa\, m_i^2)$$

    and the update is m/(1 − β1^t) over √(s·v̄/(1 − β2^t)) + ε. All other parameters get ``optax.scale_by_adam``.

    Arrays that ``jax.jit`` shards need nothing: the mean over a sharded vocabulary is one all-reduce of H numbers for
    each matrix. Inside ``jax.shard_map``, where a matrix is the rows of one device, name the axis.

    Args:
        b1: decay rate β1 of the first moment, in [0, 1).
        b2: decay rate β2 of the second moment, in [0, 1).
        eps: ε ≥ 0, added to the root of the second moment.
        coupled: which parameters are embedding matrices: a pytree of bool like the parameters or a prefix of it, or a
            function that makes one of them, as masks of optax are. For a language model: the output embedding, which
            may be the input embedding too.
        vocabulary_axis: the axis of the vocabulary in a coupled matrix: 0 for (V, H), as in an embedding; 1 for (H, V),
            as in the kernel of a dense layer. A number for all, or a pytree like ``coupled``.
        coupling_scale: s > 0, multiplies a coupled second moment.
        coupling_factor: κ in [0, 1], the share of the squared first moment in the second one, of all parameters.
        axis_name: of the mesh axis over which the vocabulary is spread, inside ``jax.shard_map``; every device must
            have equally many rows. None elsewhere.

    Returns:
        A transformation with the state ``CoupledAdamState``.

    Raises:
        ValueError: a hyperparameter is out of range. On ``init`` and ``update``: a coupled parameter is not a matrix, a
            mask does not fit the parameters, or nothing is coupled.

    Source: Stollenwerk & Stollenwerk, "Better Embeddings with Coupled Adam", ACL 2025, arXiv 2502.08441, algorithm 1.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from coupled_adam.optax import scale_by_coupled_adam
        >>> params = {"embed": jnp.ones((100, 8)), "lm_head": {"kernel": jnp.ones((8, 100)), "bias": jnp.ones(100)}}
        >>> def is_head(params):
        ...     return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), params)
        >>> transformation = scale_by_coupled_adam(coupled=is_head, vocabulary_axis=1)
        >>> transformation.init(params).nu["lm_head"]["kernel"].shape
        (8, 1)
    """
    for name, value, fits, wanted in (
        ("b1", b1, 0 <= b1 < 1, "in [0, 1)"),
        ("b2", b2, 0 <= b2 < 1, "in [0, 1)"),
        ("eps", eps, eps >= 0, "0 or more"),
        ("coupling_scale", coupling_scale, 0 < coupling_scale < math.inf, "a positive number"),
        ("coupling_factor", coupling_factor, 0 <= coupling_factor <= 1, "in [0, 1]"),
    ):
        if not fits:
            raise ValueError(f"{name} must be {wanted}, but is {value}")

    def step(g: Array, m: Array, v: Array, axis: int | None, count: Array) -> tuple[Array, Array, Array]:
        """Return the update of one parameter and its moments: the whole of Coupled Adam."""
        grad, scale = g.astype(m.dtype), 1.0
        m = b1 * m + (1 - b1) * grad  # first moment
        square = grad**2 + coupling_factor * m**2
        if axis is not None:  # Coupled Adam: one for all tokens
            square, scale = square.mean(axis, keepdims=True), coupling_scale
            square = square if axis_name is None else jax.lax.pmean(square, axis_name)
        v = b2 * v + (1 - b2) * square  # second moment
        root = jnp.sqrt(scale * v / _one_minus_power(b2, count, m.dtype))
        update = m / _one_minus_power(b1, count, m.dtype) / (root + eps)
        return update.astype(g.dtype), m, v

    def init(params: optax.Params) -> CoupledAdamState:
        leaves, tree = jax.tree.flatten(params)
        first, second = [], []
        for x, axis in zip(leaves, _axes(params, coupled, vocabulary_axis), strict=True):
            dtype = jnp.promote_types(x.dtype, jnp.float32)
            first.append(jnp.zeros_like(x, dtype))
            second.append(jnp.zeros_like(x, dtype) if axis is None else jnp.zeros(_one_along(x.shape, axis), dtype))
        return CoupledAdamState(jnp.zeros([], jnp.int32), tree.unflatten(first), tree.unflatten(second))

    def update(
        updates: optax.Updates, state: CoupledAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, CoupledAdamState]:
        leaves, tree = jax.tree.flatten(updates)
        axes, count = _axes(updates, coupled, vocabulary_axis), optax.safe_increment(state.count)
        moments = tree.flatten_up_to(state.mu), tree.flatten_up_to(state.nu)
        done = [step(*each, count) for each in zip(leaves, *moments, axes, strict=True)]
        new, first, second = (tree.unflatten([each[i] for each in done]) for i in range(3))
        return new, CoupledAdamState(count, first, second)

    return optax.GradientTransformation(init, update)


def _one_minus_power(decay: float, count: Array, dtype: Any) -> Array:
    """1 − decay^count. In float32 the power of 0.999 would leave four digits of the difference at the first step."""
    return -jnp.expm1(count.astype(dtype) * math.log(decay)) if decay > 0 else jnp.ones([], dtype)


def _one_along(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return tuple(1 if i == axis else size for i, size in enumerate(shape))


def _axes(tree: Any, coupled: Mask, vocabulary_axis: Mask) -> list[int | None]:
    """Return the axis of the vocabulary by leaf; None where nothing is coupled. Raises ValueError if one cannot be."""
    named = jax.tree_util.tree_leaves_with_path(tree)
    wanted, along = _spread("coupled", coupled, tree), _spread("vocabulary_axis", vocabulary_axis, tree)
    found: list[int | None] = []
    for (path, x), is_coupled, axis in zip(named, wanted, along, strict=True):
        name = jax.tree_util.keystr(path)
        if is_coupled not in (True, False):
            raise ValueError(f"coupled has {is_coupled!r} for {name}, but takes True or False; see vocabulary_axis")
        if is_coupled and jnp.ndim(x) != 2:
            raise ValueError(f"{name} is coupled but has shape {jnp.shape(x)}: only matrices have rows to couple")
        if is_coupled and axis not in (0, 1):
            raise ValueError(f"vocabulary_axis is {axis!r} for {name}, but must be 0 or 1")
        found.append(int(axis) if is_coupled else None)
    if named and not any(wanted):
        raise ValueError("coupled is False for all parameters: name the output embedding, or use optax.adamw")
    return found


def _spread(name: str, mask: Mask, tree: Any) -> list[Any]:
    """Return what a mask, a prefix of the tree, says of each leaf."""
    mask = mask(tree) if callable(mask) else mask
    try:
        spread = jax.tree.map(lambda value, part: jax.tree.map(lambda _: value, part), mask, tree)
    except ValueError as error:
        raise ValueError(f"{name} does not fit the parameters: {error}") from None
    leaves: list[Any] = jax.tree.leaves(spread)
    return leaves
