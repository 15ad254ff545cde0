"""Training: one pure step, and a loop that runs blocks of steps as one compiled program."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llc_jax import parallel
from llc_jax.inputs import checks
from llc_jax.types import Batch, LossFn, Params


class TrainState(NamedTuple):
    """What the next training step needs.

    Attributes:
      step: number of completed updates, int32 scalar; 0 is the initialisation.
      params: parameters, a pytree.
      opt_state: state of the optax optimizer.
    """

    step: jax.Array
    params: Params
    opt_state: Any


class StepMetrics(NamedTuple):
    """What to look at after one training step; float32 scalars.

    Attributes:
      loss: mean loss of the batch at the parameters before the update.
      grad_norm: Euclidean norm of the gradient of that mean.
      param_norm: Euclidean norm of the parameters after the update.
    """

    loss: jax.Array
    grad_norm: jax.Array
    param_norm: jax.Array


class HostBatches(Protocol):
    """Batches that are read on the host, such as `data.batches.TokenBatches`: text on a disk."""

    def block(self, first: int, stop: int) -> Batch:
        """Returns the batches of updates `first` to `stop - 1`, arrays [stop - first, B, ...].

        A pure function of the two numbers, so that a run that resumes repeats its batches. With a
        mesh over several processes: this process's part of each batch, [stop - first, B / P, ...].
        """
        ...


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first update, step 0."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def train_step(
    state: TrainState, batch: Batch, loss_fn: LossFn, optimizer: optax.GradientTransformation
) -> tuple[TrainState, StepMetrics]:
    """One update on the mean loss of one batch; pure and traceable."""

    def mean_loss(params):
        return jnp.mean(loss_fn(params, batch))

    loss, grads = jax.value_and_grad(mean_loss)(state.params)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to an integer count
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = StepMetrics(loss, optax.tree.norm(grads), optax.tree.norm(params))
    return TrainState(state.step + 1, params, opt_state), metrics


def fit(
    rng_key: jax.Array,
    state: TrainState,
    *,
    loss_fn: LossFn,
    batch_fn: Callable[[jax.Array], Batch] | HostBatches,
    optimizer: optax.GradientTransformation,
    stops: Sequence[int],
    block: int = 1000,
    mesh: Mesh | None = None,
) -> Iterator[tuple[int, TrainState, dict[str, jax.Array]]]:
    """Trains from `state.step` to the last of `stops`, a block of steps at a time.

    A block ends at every step in `stops` and at every multiple of `block`. All of a block's
    steps - drawing the batch, gradient, update - run in one compiled program whose number of
    steps is traced: however the run is cut, nothing new is compiled and the parameters are
    bitwise the same. A run that resumes at the end of an earlier block repeats the remaining
    blocks, metrics included.

    Args:
      rng_key: typed key; update number s draws its batch from `fold_in(rng_key, s)`, so the same
        key continues a run.
      state: where to start; copied, so the caller's arrays stay valid. NumPy leaves are fine.
      loss_fn: `loss_fn(params, batch) -> losses` [B]. Static.
      batch_fn: pure, traceable `batch_fn(rng_key) -> batch`, with leading axis B. Static. Or
        batches that are read on the host, see `HostBatches`: the next block is read while the
        device works on this one.
      optimizer: an optax optimizer. Static: pass the same object to avoid recompilation.
      stops: strictly increasing step counts; those not beyond `state.step` are passed over.
      block: largest number of steps between two yields.
      mesh: shard the batch over all axes of this mesh and replicate the rest. The mesh needs
        `Auto` axes and a size that divides B. Results differ from one device in the last bits.
        It may span the processes of a pod, see `parallel.pod_mesh`; all must call this, alike.

    Returns:
      An iterator of (step, state, metrics) at the end of each block, where `step` is
      `int(state.step)`. `state` is given up (donated) when the next block is asked for: fetch
      what should stay with `jax.device_get` before. `metrics` are float32 scalars on the
      device: `loss`, mean over the block; `last_loss`, `grad_norm`, `param_norm` of its last step.

    Raises:
      ValueError: for arguments outside these rules, at the call.
      FloatingPointError: from the iterator, naming the first step whose loss, gradient or updated
        parameters are not finite. The state of such a block is never yielded.
    """
    stops = [int(stop) for stop in stops]
    _check_fit_arguments(rng_key, state, loss_fn, batch_fn, stops, block, mesh)
    step = int(state.step)
    # A copy for the first block to consume, without the weak types that would compile it twice.
    state = jax.tree.map(lambda x: jnp.array(x, jnp.result_type(x)), state)
    if mesh is not None:
        key_data = np.asarray(jax.random.key_data(rng_key))
        key_data, state = parallel.place((key_data, _host_copy(state)), mesh)
        rng_key = jax.random.wrap_key_data(key_data, impl=jax.random.key_impl(rng_key))
    read = functools.partial(_read, batch_fn, block, mesh) if _on_host(batch_fn) else None
    run = functools.partial(
        _run_block, rng_key, loss_fn=loss_fn, batch_fn=None if read else batch_fn,
        optimizer=optimizer, mesh=mesh,
    )  # fmt: skip
    return _blocks(run, state, _spans(step, stops, block), read or (lambda first, stop: None))


def _host_copy(tree):
    return jax.tree.map(np.array, jax.device_get(tree))


def _spans(step: int, stops: Sequence[int], block: int) -> list[tuple[int, int]]:
    """The (first, stop) of every block."""
    spans = []
    for stop in stops:
        while step < stop:
            first, step = step, min(stop, (step // block + 1) * block)
            spans.append((first, step))
    return spans


def _on_host(batch_fn) -> bool:
    return hasattr(batch_fn, "block")


def _read(batches: HostBatches, block: int, mesh: Mesh | None, first: int, stop: int) -> Batch:
    """The batches of a block, [block, B, ...]: filled up to equal shapes, on the device."""

    def fill(x):
        return np.pad(x, [(0, block - len(x)), *[(0, 0)] * (x.ndim - 1)])

    data = jax.tree.map(fill, batches.block(first, stop))
    if mesh is None:
        return jax.device_put(data)
    sharding = NamedSharding(mesh, PartitionSpec(None, mesh.axis_names))
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), data)


def _blocks(run, state, spans, read):
    data = read(*spans[0]) if spans else None
    for (_, step), following in zip(spans, [*spans[1:], None], strict=True):
        state, metrics, bad_step = run(state, step, data)
        data = None if following is None else read(*following)
        # Waits for the block: a state must be known to be finite before anybody saves it.
        if (bad := int(bad_step)) >= 0:
            raise FloatingPointError(
                f"non-finite loss, gradient or parameters at step {bad} "
                f"(loss {float(metrics['last_loss'])}, gradient norm "
                f"{float(metrics['grad_norm'])}); training stopped and the last finite state "
                "is that of the previous block. Lower the learning rate or check the data."
            )
        yield step, state, metrics


@functools.partial(
    jax.jit,
    static_argnames=("loss_fn", "batch_fn", "optimizer", "mesh"),
    donate_argnames=("state",),
)
def _run_block(rng_key, state, stop, data, *, loss_fn, batch_fn, optimizer, mesh):
    """Steps until `state.step == stop` or something is not finite (`bad_step`, else -1).

    Batch number s since the start is `data[s]`, or without data that of `batch_fn`.
    """
    first_step = state.step

    def keep_going(carry):
        state, _, _, bad_step = carry
        return (state.step < stop) & (bad_step < 0)

    def body(carry):
        state, loss_sum, _, _ = carry
        if data is None:
            batch = batch_fn(jax.random.fold_in(rng_key, state.step))
        else:
            batch = jax.tree.map(lambda x: x[state.step - first_step], data)
        if mesh is not None:
            sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
            batch = jax.lax.with_sharding_constraint(batch, sharding)
        new_state, metrics = train_step(state, batch, loss_fn, optimizer)
        if mesh is not None:  # every process must be able to read what it has, to save it
            whole = NamedSharding(mesh, PartitionSpec())
            new_state, metrics = jax.lax.with_sharding_constraint((new_state, metrics), whole)
        finite = jnp.all(jnp.isfinite(jnp.stack(metrics)))
        bad_step = jnp.where(finite, -1, state.step)
        return new_state, loss_sum + metrics.loss, metrics, bad_step

    zero = jnp.zeros((), jnp.float32)
    carry = (state, zero, StepMetrics(zero, zero, zero), jnp.full((), -1, jnp.int32))
    state, loss_sum, last, bad_step = jax.lax.while_loop(keep_going, body, carry)
    num_steps = (state.step - first_step).astype(jnp.float32)
    metrics = {
        "loss": loss_sum / num_steps,
        "last_loss": last.loss,
        "grad_norm": last.grad_norm,
        "param_norm": last.param_norm,
    }
    return state, metrics, bad_step


def _check_fit_arguments(rng_key, state, loss_fn, batch_fn, stops, block, mesh):
    checks.typed_key(rng_key)
    checks.at_least("block", block, 1)
    checks.at_least("state.step", int(state.step), 0)
    if not stops:
        raise ValueError("stops is empty: give at least the last step of the run.")
    for earlier, later in itertools.pairwise([-1, *stops]):
        if later <= earlier:
            raise ValueError(
                f"stops has {later} after {earlier}: give steps from 0 in strictly "
                "increasing order, without repeats."
            )
    if _on_host(batch_fn):
        first = int(state.step)
        batch = jax.tree.map(lambda x: x[0], batch_fn.block(first, first + 1))
        batch = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch))
    else:
        batch = jax.eval_shape(batch_fn, rng_key)
    size = checks.data_length(batch)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params)
    checks.losses(loss_fn, shapes, batch, size)
    processes = 1 if mesh is None else len({d.process_index for d in mesh.devices.flat})
    if _on_host(batch_fn) and (parts := getattr(batch_fn, "process_count", 1)) != processes:
        raise ValueError(
            f"batch_fn has parts of batches for process_count={parts} processes and the mesh is"
            f" over {processes}: give each process its own part, and a mesh over all."
        )
    if mesh is not None:
        # Batches from the host are a process's part, those of `batch_fn` are whole.
        devices = mesh.size // processes if _on_host(batch_fn) else mesh.size
        if size % devices:
            raise ValueError(
                f"batch size {size} is not a multiple of the {devices} devices of the "
                "mesh: change one of them."
            )
