"""Device meshes over (checkpoint, chain), mapping, distributed start-up and stop signals.

`vmap` and `map_in_batches` leave out axes of length one. XLA takes such an axis out of matrix
products and then lays out their results in another order: with it, a chain of the attention-only
language model transposed and copied the attention patterns of every layer, forward and backward, in
every step (CPU, jax 0.10.2). An axis of two does no harm.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

CHECKPOINT = "checkpoint"
CHAIN = "chain"


def make_mesh(num_checkpoints: int, num_chains: int, devices: Sequence[Any] | None = None) -> Mesh:
    """Arranges devices over (checkpoint, chain) so that the busiest device has the least to do.

    Args:
      num_checkpoints: checkpoints sampled at once.
      num_chains: chains for each.
      devices: default all devices of all processes.

    Returns:
      A mesh with axes ("checkpoint", "chain"). Among equals the longer chain axis wins: chains of
      one checkpoint share their anchor.
    """
    devices = np.asarray(jax.devices() if devices is None else devices)
    splits = [(devices.size // c, c) for c in range(1, devices.size + 1) if devices.size % c == 0]
    rows, columns = min(
        splits,
        key=lambda s: (-(-num_checkpoints // s[0]) * -(-num_chains // s[1]), -s[1]),
    )
    return Mesh(
        devices.reshape(rows, columns),
        (CHECKPOINT, CHAIN),
        axis_types=(AxisType.Auto, AxisType.Auto),
    )


def data_mesh(batch_size: int) -> Mesh:
    """A one-axis mesh ("batch") over as many of this process's devices as divide the batch."""
    return _batch_mesh(batch_size, [jax.process_index()])


def pod_mesh(batch_size: int) -> Mesh:
    """The same over the devices of all processes, equally many of each, processes in their order.

    Every process then holds its part of a batch in one piece.

    Raises:
      ValueError: if the batch cannot be shared equally by the processes.
    """
    count = jax.process_count()
    if batch_size % count:
        raise ValueError(
            f"batch_size={batch_size} is not a multiple of the {count} processes: give one that is."
        )
    return _batch_mesh(batch_size // count, range(count))


def _batch_mesh(share: int, processes: Sequence[int]) -> Mesh:
    each = max(d for d in range(1, jax.local_device_count() + 1) if share % d == 0)
    devices = [jax.local_devices(process_index=p)[:each] for p in processes]
    return Mesh(np.concatenate(devices), ("batch",), axis_types=(AxisType.Auto,))


def place(tree: Any, mesh: Mesh, *axes: str | None) -> Any:
    """Puts host arrays on the mesh, leading axes split over `axes`, the rest replicated.

    Every process must hold the whole array; each puts its own part on its own devices.
    """
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(x):
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                put(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree)


def fetch(tree: Any) -> Any:
    """Copies a sharded tree to the host, whole on every process, as numpy arrays."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return jax.tree.map(
        lambda x: np.asarray(multihost_utils.process_allgather(x, tiled=True)), tree
    )


def from_process_zero(array: np.ndarray) -> np.ndarray:
    """Returns process 0's int32 vector on every process, whatever lengths the others hold."""
    if jax.process_count() == 1:
        return array
    from jax.experimental import multihost_utils

    length = int(multihost_utils.broadcast_one_to_all(np.int32(array.size)))
    padded = np.resize(np.append(array, 0).astype(np.int32), length)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded))


def wait_for_all(place: str) -> None:
    """Returns when every process has come to the place of this name."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(place)


def start_distributed(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the processes of a pod; call it before anything touches a device.

    On TPU pods and under SLURM all three arguments are detected; elsewhere give all of them.

    Args:
      coordinator: "host:port" of process 0.
      num_processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      ValueError: if only some of the three are given.
    """
    given = [coordinator is not None, num_processes is not None, process_id is not None]
    if any(given) and not all(given):
        raise ValueError(
            f"coordinator={coordinator!r}, num_processes={num_processes}, process_id={process_id}:"
            " give all three, or none where they are detected (TPU, SLURM)."
        )
    # Its service would take SIGTERM away from whoever has not asked for it yet, see `stop_signals`.
    jax.config.update("jax_enable_preemption_service", False)
    options: dict[str, Any] = {}
    if coordinator is not None and coordinator.startswith(("127.0.0.1:", "localhost:")):
        # Processes of one machine: do not listen to the outside.
        options["coordinator_bind_address"] = coordinator
    jax.distributed.initialize(coordinator, num_processes, process_id, **options)


def leave_pod() -> None:
    """Ends the company; every process calls it at the same place, then works or exits alone.

    One that exits otherwise waits for the others, five minutes at most, and then takes them along.
    """
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


class StopRequested(SystemExit):
    """Raised at a safe point after SIGTERM or SIGINT; exits with 128 + signal number."""

    def __init__(self, signum: int):
        super().__init__(128 + signum)


class StopFlag:
    """Remembers the first SIGTERM or SIGINT; `signum` is None until then."""

    signum: int | None = None

    def agreed(self) -> int | None:
        """The signal that any process of the pod has received, the same answer on all.

        Every process must ask, at the same place: one that stops alone would leave the others
        waiting for it.
        """
        if jax.process_count() == 1:
            return self.signum
        from jax.experimental import multihost_utils

        seen = multihost_utils.process_allgather(np.int32(self.signum or 0))
        return int(np.max(seen)) or None

    def _set(self, signum: int, _frame: Any) -> None:
        if self.signum is not None:  # the second one means now
            os._exit(128 + signum)
        self.signum = signum


@contextlib.contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Turns SIGTERM and SIGINT into a flag to look at between blocks of work."""
    flag = StopFlag()
    old = {s: signal.signal(s, flag._set) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)


def vmap(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.vmap(function)` over the leading axis of every argument, whatever its length."""

    def mapped(*args: Any) -> Any:
        if len(jax.tree.leaves(args)[0]) > 1:
            return jax.vmap(function)(*args)
        one = function(*jax.tree.map(lambda x: x[0], args))
        return jax.tree.map(lambda x: x[None], one)

    return mapped


def mean_of_pairs(x: jax.Array) -> jax.Array:
    """Mean over the leading axis, halves added to each other until one entry is left.

    The order of additions is part of the program, so that the last bit is the same however many
    of these are mapped: XLA sums a vector in another order than the rows of a matrix.
    """
    total = x
    while len(total) > 1:
        half = len(total) // 2
        total = jnp.concatenate([total[:half] + total[half : 2 * half], total[2 * half :]])
    return total[0] / len(x)


def map_in_batches(function: Callable[[Any], Any], xs: Any, batch_size: int) -> Any:
    """`jax.lax.map` over the leading axis of `xs`, `batch_size` entries at once."""
    return jax.lax.map(function, xs, batch_size=batch_size if batch_size > 1 else None)
