"""A stack of lanes through the compiled programs, and what comes back."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llc_jax import parallel
from llc_jax.ambient import undisturbed
from llc_jax.checkpoint_map import stack
from llc_jax.llc import soundness
from llc_jax.llc.estimate import LLCEstimate, summarize
from llc_jax.recorder import Recorder
from llc_jax.sampling import anchors
from llc_jax.sampling.chain import Plan
from llc_jax.sampling.posterior import LocalPosterior
from llc_jax.sampling.program import sample
from llc_jax.types import Batch, LossFn, Sampler, Stream


class Lane(NamedTuple):
    """One anchor at one setting: what varies along the first axis of the program.

    Attributes:
      here: the posterior, with numbers of Python.
      sampler: with scalar hyperparameters.
      name: of the mask.
    """

    here: LocalPosterior
    sampler: Sampler
    name: str = ""


class Weighed(NamedTuple):
    """A lane that has passed all checks, and what they found, see `soundness.Soundness`."""

    lane: Lane
    heating: float
    shared: tuple[str, ...]


class Run(NamedTuple):
    """What all lanes share.

    Attributes:
      rng_key: typed key.
      loss_fn: per-example losses.
      stream: the stream, or None.
      data: the data set, or None.
      plan: the static sizes.
      num_chains: chains that were asked for.
      lane_batch: most lanes at once that were asked for.
      padded: lanes and chains of the program, which fill the mesh.
      mesh: axes (checkpoint, chain).
      dtype: of what `loss_fn` returns.
      recorder: the observables, without their arrays.
      held: their arrays.
      again: rows that are evaluated a second time, see `anchors.losses_at`.
    """

    rng_key: jax.Array
    loss_fn: LossFn
    stream: Stream | None
    data: Batch | None
    plan: Plan
    num_chains: int
    lane_batch: int
    padded: tuple[int, int]
    mesh: Mesh
    dtype: Any
    recorder: Recorder
    held: list[Any]
    again: Any = None

    @undisturbed()
    def place(self) -> "Run":
        """Puts on the devices what all lanes share."""
        if self.stream is None:
            n = anchors.num_examples(self.data)
            micro = self.plan.batch_size // self.plan.grad_accum
            self = self._replace(again=anchors.rows_again(n, self.plan.batch_size, micro))
        names = ("rng_key", "data", "held", "again")
        placed = parallel.place([getattr(self, name) for name in names], self.mesh)
        return self._replace(**dict(zip(names, placed, strict=True)))

    @undisturbed()
    def dispatch(self, chunk: list[Weighed]) -> tuple[list[soundness.Anchor], Any]:
        """Starts the chains of a few lanes; no more of them than the program has room for."""
        lanes = [weighed.lane for weighed in chunk]
        stacked = stack([_on_host(lane) for lane in lanes], self.padded[0])
        here, sampler = parallel.place(stacked, self.mesh, parallel.CHECKPOINT)
        references, found = None, [soundness.Anchor.unknown()] * len(lanes)
        if self.stream is None:
            references, again = anchors.losses_at(
                here.anchor, self.data, self.again, loss_fn=self.loss_fn, mesh=self.mesh
            )
            looked_at = zip(*parallel.fetch((references, again)), strict=True)
            rows = parallel.fetch(self.again)
            found = [
                soundness.anchor_of(losses, more, rows, self.dtype)
                for (losses, more), _ in zip(looked_at, lanes, strict=False)
            ]
        args = self.rng_key, here, sampler, references, self.data, self.held
        sampled = functools.partial(
            sample, loss_fn=self.loss_fn, stream=self.stream, plan=self.plan, mesh=self.mesh,
            num_chains=self.padded[1], recorder=self.recorder,
        )  # fmt: skip
        if all(anchor.num_bad for anchor in found):  # nothing that a chain could add
            return found, jax.tree.map(_nothing, jax.eval_shape(sampled, *args))
        return found, sampled(*args)

    @undisturbed()
    def finish(
        self, chunk: list[Weighed], output: tuple[list[soundness.Anchor], Any]
    ) -> list[tuple[Lane, LLCEstimate]]:
        """Waits for the chains of a few lanes and sums them up."""
        estimates = []
        found, trace = output[0], parallel.fetch(output[1])
        shared = {"num_chains": self.num_chains, **self.plan._asdict()}
        observables = self.recorder.join(parallel.fetch(self.held))
        for row, (lane, heating, twice) in enumerate(chunk):
            one = jax.tree.map(lambda x, row=row: x[row, : self.num_chains], trace)
            settings = {
                "sampler": type(lane.sampler).__name__,
                **{name: float(value) for name, value in lane.sampler._asdict().items()},
                "nbeta": float(lane.here.nbeta),
                "localization": float(lane.here.localization),
                **({"mask": lane.name} if lane.name else {}),
                **{name: shared[name] for name in _SETTINGS},
            }
            estimate = summarize(one, found[row], observables, self.plan, settings, heating, twice)
            estimates.append((lane, self._with_culprits(lane, estimate)))
        return estimates

    def _with_culprits(self, lane: Lane, estimate: LLCEstimate) -> LLCEstimate:
        """Looks for examples that are to blame if a chain died."""
        dead = np.flatnonzero(estimate.diverged_at >= 0)
        start = estimate.sound.gradient[:, :1]
        same = self.stream is None and self.plan.batch_size == anchors.num_examples(self.data)
        innocent = same and self.plan.thinning == 1 and start.size and np.isfinite(start).all()
        if not dead.size or estimate.sound.explains_death or innocent:
            return estimate
        key, params = parallel.place((self.rng_key, lane.here.anchor), self.mesh)
        key = jax.random.fold_in(jax.random.fold_in(key, lane.here.step), dead[0])
        at = max(0, int(estimate.diverged_at[dead[0]]) - 1) * self.plan.thinning
        bad, rows = anchors.culprits(
            key, params, self.stream or self.data,
            loss_fn=self.loss_fn, batch_size=self.plan.batch_size,
            steps=range(at, at + 2 * self.plan.thinning),
        )  # fmt: skip
        sound = estimate.sound._replace(bad_minibatch=bad, bad_rows=rows)
        return dataclasses.replace(estimate, sound=sound)


_SETTINGS = ("num_chains", "num_draws", "num_burnin", "thinning", "batch_size", "grad_accum")


def _on_host(lane: Lane) -> tuple[LocalPosterior, Sampler]:
    """The posterior and the sampler of a lane, with arrays for numbers."""
    here, sampler = jax.tree.map(
        lambda x: np.asarray(x, jnp.result_type(float)),
        (lane.here._replace(anchor=None, mask=None, step=None), lane.sampler),
    )
    step = np.uint32(lane.here.step)
    return here._replace(anchor=lane.here.anchor, mask=lane.here.mask, step=step), sampler


def _nothing(shape: jax.ShapeDtypeStruct) -> np.ndarray:
    """What a chain that was not run leaves behind."""
    return np.full(shape.shape, np.nan if jnp.issubdtype(shape.dtype, jnp.inexact) else 0)
