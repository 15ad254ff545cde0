"""Pytrees of weights: widened, masked, filled with noise, summed, and as one vector."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax.types import Params


def widest(tree: Params) -> np.dtype:
    """The widest dtype of the leaves, at least float32: that of what is summed over all of them."""
    bits = max(jnp.finfo(leaf.dtype).bits for leaf in jax.tree.leaves(tree))
    return np.dtype(np.float64 if bits > 32 else np.float32)


def vdot(a: Params, b: Params) -> jax.Array:
    """Inner product of two trees alike, a scalar of their widest dtype.

    Each leaf is summed in its own dtype: leaves of several are never promoted to each other, which
    strict promotion refuses.
    """
    dtype = widest(a)
    products = jax.tree.map(lambda x, y: jnp.vdot(x, y, precision="highest").astype(dtype), a, b)
    return sum(jax.tree.leaves(products))


def norm(tree: Params) -> jax.Array:
    """Euclidean norm of a tree, a scalar of its widest dtype."""
    dtype = widest(tree)
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)).astype(dtype) for x in jax.tree.leaves(tree)))


def displacement(params: Params, anchor: Params) -> Params:
    """Returns w - w*, at least float32."""
    return jax.tree.map(lambda w, a: at_least_float32(w) - at_least_float32(a), params, anchor)


def apply_mask(mask: Params | None, tree: Params) -> Params:
    """Zeroes what the mask excludes; a select, so that an excluded NaN does not leak."""
    if mask is None:
        return tree
    return jax.tree.map(
        lambda m, x: jnp.where(jnp.asarray(m, bool), x, jnp.zeros_like(x)), mask, tree
    )


def at_least_float32(x: jax.Array) -> jax.Array:
    """Widens half precision; sums and small steps need the digits."""
    return x.astype(x.dtype if jnp.finfo(x.dtype).bits >= 32 else jnp.float32)


def standard_normal_like(rng_key: jax.Array, tree: Params) -> Params:
    """Independent N(0, 1) for every entry of `tree`, in the dtype of each leaf; consumes the key.

    One long draw cut into pieces: a generator per leaf would be compiled as often as there are
    leaves (12 s instead of 1 s for a small transformer on a CPU).
    """
    leaves, structure = jax.tree.flatten(tree)
    flat = jax.random.normal(rng_key, (sum(leaf.size for leaf in leaves),), widest(tree))
    ends = [int(end) for end in np.cumsum([leaf.size for leaf in leaves])]
    pieces = jnp.split(flat, ends[:-1])
    noise = [
        piece.reshape(leaf.shape).astype(leaf.dtype)
        for piece, leaf in zip(pieces, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, noise)


class Layout(NamedTuple):
    """How a pytree of weights is one vector: static, hashable, compared by value."""

    structure: Any
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    @classmethod
    def of(cls, params: Params) -> "Layout":
        """Describes `params`, arrays or their shapes."""
        leaves, structure = jax.tree.flatten(params)
        dtypes = [jnp.result_type(leaf) for leaf in leaves]
        if not leaves or not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
            raise ValueError(
                f"params has leaves of dtypes {[str(d) for d in dtypes]}: give a pytree of"
                " floating-point arrays, like those that matvec takes."
            )
        wide = [d.name if jnp.finfo(d).bits >= 32 else "float32" for d in dtypes]
        return cls(structure, tuple(np.shape(leaf) for leaf in leaves), tuple(wide))

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(int(np.prod(shape)) for shape in self.shapes)

    @property
    def dtype(self) -> np.dtype:
        """The widest of the leaves, at least float32."""
        return np.dtype(max(self.dtypes))  # "float64" > "float32"

    def num_kept(self, mask: Params | None) -> Any:
        """How many weights a mask leaves, of a scalar or an array per leaf; all without one."""
        if mask is None:
            return self.size
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        parts = zip(jax.tree.leaves(mask), sizes, strict=True)
        return sum(m.sum() * (size // max(np.size(m), 1)) for m, size in parts)

    def widen(self, params: Params) -> Params:
        """Returns params, leaves at least float32."""
        leaves = zip(jax.tree.leaves(params), self.dtypes, strict=True)
        return jax.tree.unflatten(self.structure, [x.astype(dtype) for x, dtype in leaves])

    def flatten(self, tree: Params) -> jax.Array:
        """Returns the vector [size] of a tree."""
        found = [np.shape(leaf) for leaf in jax.tree.leaves(tree)]
        if jax.tree.structure(tree) != self.structure or tuple(found) != self.shapes:
            raise ValueError(
                f"matvec returned {jax.tree.structure(tree)} with shapes {found}, params are"
                f" {self.structure} with shapes {list(self.shapes)}: it must map pytrees like"
                " params to pytrees like params."
            )
        return jnp.concatenate([x.reshape(-1).astype(self.dtype) for x in jax.tree.leaves(tree)])

    def unflatten(self, vector: jax.Array) -> Params:
        """Returns the tree of a vector, leaves at least float32."""
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes])
        pieces = jnp.split(vector, [int(end) for end in ends[:-1]])
        leaves = [
            piece.reshape(shape).astype(dtype)
            for piece, shape, dtype in zip(pieces, self.shapes, self.dtypes, strict=True)
        ]
        return jax.tree.unflatten(self.structure, leaves)
