"""A function of the parameters at every checkpoint of a run, in one compiled program."""

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
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
        # The last chunk repeats its last checkpoint: same shapes, no second compilation.
        full = chunk + chunk[-1:] * (checkpoint_batch - len(chunk))
        steps = np.asarray([step for step, _ in full], np.uint32)
        stacked = jax.tree.map(
            lambda *x: np.stack([np.asarray(a) for a in x]), *[p for _, p in full]
        )
        steps, stacked = jax.device_put((steps, stacked), NamedSharding(mesh, P("batch")))
        return jax.device_get(_apply(steps, stacked, args, function=function, mesh=mesh))

    def run() -> Iterator[tuple[int, Any]]:
        rest = itertools.chain([first], map(checked, pairs))
        while chunk := list(itertools.islice(rest, checkpoint_batch)):
            found = results(chunk)
            for row, (step, _) in enumerate(chunk):
                yield int(step), jax.tree.map(lambda x, row=row: x[row], found)

    return run()


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
