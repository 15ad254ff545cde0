"""What is looked at before a chain starts: the losses of all examples at the anchor."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llc_jax import parallel
from llc_jax.losses import at_rows, losses_of, num_examples, rows_in_order, take
from llc_jax.parallel import CHECKPOINT
from llc_jax.sampling.chain import minibatch, step_keys
from llc_jax.trees import at_least_float32
from llc_jax.types import Batch, LossFn, Params, Stream

NUM_AGAIN = 4  # minibatches in which examples are evaluated a second time
BESIDE = 0.1  # relative size of a move from the anchor to where losses are compared, too
MAX_ROWS = 10_000  # of a minibatch that are looked at one by one


def rows_again(n: int, batch_size: int, chunk: int) -> np.ndarray:
    """Rows [k, chunk] of random minibatches; the first rows where every minibatch is all data."""
    if batch_size == n:
        return np.arange(chunk, dtype=np.int32)[None]
    return np.random.default_rng(0).integers(0, n, (NUM_AGAIN, chunk), dtype=np.int32)


def other_company(count: int, chunk: int) -> np.ndarray:
    """An order [count * chunk] of the examples of `count` minibatches; nothing to mix in one."""
    order = np.arange(count * chunk)
    return order if count == 1 else np.random.default_rng(1).permutation(order)


@functools.partial(jax.jit, static_argnames=("loss_fn", "mesh"))
def losses_at(
    checkpoints: Params,
    data: Batch,
    again: jax.Array,
    *,
    loss_fn: LossFn,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
    """Losses of all n examples at each of a stack of anchors, a minibatch at a time.

    Args:
      checkpoints: params with a leading axis [checkpoint].
      data: data set with leading axis n, replicated.
      again: [k, chunk] rows of further minibatches; fixes the size of all of them.
      loss_fn: static.
      mesh: see `program.sample`.

    Returns:
      (losses [checkpoint, n]; losses of the examples `again` [checkpoint, 3, k, chunk]: in the
      company of each other at the anchor, at a point beside it, and there after they have changed
      company).
    """
    n, (count, chunk) = num_examples(data), again.shape
    order = other_company(count, chunk)

    def local(checkpoints, data, again):
        rows = jnp.concatenate([rows_in_order(n, chunk), again])
        mixed = again.reshape(-1)[order].reshape(count, chunk)

        def one(params):
            losses = at_rows(loss_fn, params, data, rows)
            beside = at_rows(loss_fn, _beside(params), data, jnp.concatenate([again, mixed]))
            here, there, moved = losses[-count * chunk :], *jnp.split(beside, 2)
            moved = moved[np.argsort(order)]
            return losses[:n], jnp.stack([here, there, moved]).reshape(3, count, chunk)

        return parallel.vmap(one)(checkpoints)

    lane = P(CHECKPOINT)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(lane, P(), P()), out_specs=lane, check_vma=False
    )(checkpoints, data, again)


def _beside(params: Params) -> Params:
    """A point off the anchor in all directions: losses of 0 say nothing of their company."""

    def moved(w):
        wide = at_least_float32(w)
        wave = jnp.cos(jnp.arange(w.size, dtype=wide.dtype)).reshape(w.shape)
        return (wide + BESIDE * (jnp.abs(wide) + BESIDE) * wave).astype(w.dtype)

    return jax.tree.map(moved, params)


@functools.partial(jax.jit, static_argnames=("loss_fn", "stream", "batch_size", "count"))
def _finite_at(rng_key, params, data, first, *, loss_fn, stream, batch_size, count):
    """Whether loss and gradient at the anchor are finite on the minibatches of `count` steps."""

    def at(t):
        batch, _ = minibatch(step_keys(rng_key, t)[0], stream or data, batch_size)
        return _finite(loss_fn, params, batch)

    return jax.lax.map(at, first + jnp.arange(count))


@functools.partial(jax.jit, static_argnames=("loss_fn", "batch_size"))
def _finite_rows(rng_key, params, data, t, *, loss_fn, batch_size):
    """(rows [B] of the minibatch of step t, whether each alone has a finite gradient [B])."""
    _, rows = minibatch(step_keys(rng_key, t)[0], data, batch_size)
    rows = jnp.arange(num_examples(data))[rows]
    one = jax.lax.map(lambda r: _finite(loss_fn, params, take(data, r[None])), rows)
    return rows, one


def _finite(loss_fn, params, batch):
    loss, grad = jax.value_and_grad(lambda p: jnp.mean(losses_of(loss_fn, p, batch)))(params)
    leaves = [jnp.isfinite(x).all() for x in jax.tree.leaves((loss, grad))]
    return jnp.stack(leaves).all()


def culprits(
    rng_key: jax.Array,
    params: Params,
    data: Batch | Stream,
    *,
    loss_fn: LossFn,
    batch_size: int,
    steps: range,
) -> tuple[bool, tuple[int, ...]]:
    """Whether a chain died of its data: the same minibatches again, with the weights of the anchor.

    Compiles programs of its own, so it is for chains that died.

    Args:
      rng_key: identity of the chain, as in `sampling.sample_chain`.
      params: the anchor.
      data: see `sampling.sample_chain`.
      loss_fn: see `sampling.sample_chain`.
      batch_size: see `sampling.sample_chain`.
      steps: in which it may have died.

    Returns:
      (whether loss or gradient is not finite there either; at most three rows at fault, none for
      a stream or a minibatch beyond `MAX_ROWS`).
    """
    stream = data if isinstance(data, Stream) else None
    data = None if stream else data
    finite = _finite_at(
        rng_key, params, data, steps.start,
        loss_fn=loss_fn, stream=stream, batch_size=batch_size, count=len(steps),
    )  # fmt: skip
    bad = np.flatnonzero(~np.asarray(finite))
    if not bad.size or stream or batch_size > MAX_ROWS:
        return bool(bad.size), ()
    rows, alone = _finite_rows(
        rng_key, params, data, steps[bad[0]], loss_fn=loss_fn, batch_size=batch_size
    )
    guilty = np.unique(np.asarray(rows)[~np.asarray(alone)])
    return True, tuple(int(row) for row in guilty[:3])
