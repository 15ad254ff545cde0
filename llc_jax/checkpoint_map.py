"""A function of the parameters at every checkpoint of a run, in one compiled program."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llc_jax import parallel
from llc_jax.ambient import undisturbed
from llc_jax.inputs import checks
from llc_jax.types import Params


def map_checkpoints(
    function: Callable[..., Any],
    checkpoints: Mapping[int, Params] | Iterable[tuple[int, Params]],
    *args: Any,
    checkpoint_batch: int = 1,
) -> Iterator[tuple[int, Any]]:
    """Applies `function(step, params, *args)` to every checkpoint; compiles once for all of them.

    Args:
      function: pure and traceable; returns a pytree of arrays. Static, so keep its identity: a
        module-level function or a frozen dataclass with `__call__`.
      checkpoints: {step: params} or an iterable of (step, params), read lazily.
      *args: pytrees of arrays, the same for all checkpoints.
      checkpoint_batch: checkpoints at once, spread over as many of this process's devices as
        divide it; bounds memory.

    Returns:
      An iterator of (step, result as numpy arrays), in the order given.

    Raises:
      ValueError: on bad input, before anything compiles.
    """
    checks.at_least("checkpoint_batch", checkpoint_batch, 1)
    pairs = checks.pairs(checkpoints)
    first = next(pairs, None)
    if first is None:
        raise ValueError("checkpoints is empty: give at least one (step, params).")
    mesh = parallel.data_mesh(checkpoint_batch)
    with undisturbed():
        template = checks.params(first[1], first[0])
        args = jax.device_put(args, NamedSharding(mesh, P()))

    # Not around the iterators, which are the caller's and may want what surrounds the call.
    @undisturbed()
    def checked(pair):
        checks.params(pair[1], pair[0], template)
        return pair

    @undisturbed()
    def results(chunk: list[tuple[int, Params]]) -> Any:
        stacked = stack([(np.uint32(step), params) for step, params in chunk], checkpoint_batch)
        steps, params = jax.device_put(stacked, NamedSharding(mesh, P("batch")))
        return jax.device_get(_apply(steps, params, args, function=function, mesh=mesh))

    def run() -> Iterator[tuple[int, Any]]:
        for chunk in chunks(itertools.chain([first], map(checked, pairs)), checkpoint_batch):
            found = results(chunk)
            for row, (step, _) in enumerate(chunk):
                yield int(step), jax.tree.map(lambda x, row=row: x[row], found)

    return run()


def chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yields `items` in lists of `size`, the last of them shorter; reads no further than that."""
    rest = iter(items)
    while chunk := list(itertools.islice(rest, size)):
        yield chunk


def stack(trees: Sequence[Any], size: int) -> Any:
    """Stacks up to `size` pytrees along a new first axis of that length, on the host.

    The last one is repeated until there are `size`: equal shapes, so no second compilation.
    """
    full = [*trees, *[trees[-1]] * (size - len(trees))]
    return jax.tree.map(lambda *x: np.stack([np.asarray(a) for a in x]), *full)


@functools.partial(jax.jit, static_argnames=("function", "mesh"))
def _apply(steps, checkpoints, args, *, function, mesh):
    """Each device has checkpoints of its own and never talks to another."""
    return jax.shard_map(
        lambda steps, checkpoints, args: parallel.vmap(
            lambda step, params: function(step, params, *args)
        )(steps, checkpoints),
        mesh=mesh,
        in_specs=(P("batch"), P("batch"), P()),
        out_specs=P("batch"),
        check_vma=False,  # loop carries may start as constants; nothing is ever reduced
    )(steps, checkpoints, args)
