"""What surrounds a call in JAX, and must not change its result: modes, meshes, devices, keys."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

_THREEFRY = "threefry2x32"


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Runs programs of the library alike whatever surrounds the call; a decorator as well.

    * No mesh in context: programs bring their own, and `jax.shard_map` refuses any other.
    * Transfers are allowed: those of the library are meant.
    * `jax_disable_jit` is off: operation by operation, a chain would take hours.
    * `jax_debug_nans` and `jax_debug_infs` are off: a chain that diverges is a result, reported as
      such, and beside it are others.

    Nothing changes within a traced function, where none of these can be told apart.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ValueError):  # refused within a traced function
            stack.enter_context(jax.set_mesh(None))
            stack.enter_context(jax.transfer_guard("allow"))
            stack.enter_context(jax.disable_jit(False))
            stack.enter_context(jax.debug_nans(False))
            stack.enter_context(jax.debug_infs(False))
        yield


def together(tree: Any) -> Any:
    """Returns a tree whose arrays one program can take.

    Arrays that are bound to no device, or all to the same single one, stay as they are. Others
    (spread over a mesh, on several devices) are copied to the host and from there to the default
    device: a program that mixed meshes would be refused, and one of sharded arrays would sum in
    another order.

    Args:
      tree: pytree of arrays; with a traced one in it, nothing is done.
    """
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array)]
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        return tree
    bound = [x for x in arrays if x.committed]
    single = all(isinstance(x.sharding, SingleDeviceSharding) for x in arrays)
    if single and len({d for x in bound for d in x.devices()}) <= 1:
        return tree
    return jax.tree.map(_unbound, tree)


def _unbound(x: Any) -> Any:
    if not isinstance(x, jax.Array):
        return x
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            _unbound(jax.random.key_data(x)), impl=jax.random.key_impl(x)
        )
    return jnp.asarray(np.asarray(x))


def own_key(rng_key: jax.Array) -> jax.Array:
    """Returns a key whose numbers do not depend on what is drawn beside them; consumes `rng_key`.

    Under `vmap` numbers of "rbg" and "unsafe_rbg" keys are those of the first key of the batch, so
    that results would change with the chunk size and the number of devices. Such a key, and any
    other that is not threefry, becomes the seed of a threefry key.

    Args:
      rng_key: one typed key.
    """
    if jax.random.key_impl(rng_key) == _THREEFRY:
        return rng_key
    return jax.random.wrap_key_data(jax.random.bits(rng_key, (2,), jnp.uint32), impl=_THREEFRY)
