"""One chain as a scan: minibatches, steps, and what is recorded at its draws."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llc_jax.losses import losses_of, num_examples, take
from llc_jax.sampling.posterior import evaluate
from llc_jax.sampling.probe import Probe, look_at
from llc_jax.sampling.stability import Tridiagonal, stability_matrix
from llc_jax.trees import apply_mask, displacement, norm
from llc_jax.types import Batch, LossFn, Params, PartsFn, Sampler, Stream


class Plan(NamedTuple):
    """The integers that fix the shapes of a run: static, hashable, compared by value.

    Attributes:
      num_draws: recorded draws after burn-in.
      num_burnin: recorded draws that are thrown away first.
      thinning: sampler steps per recorded draw.
      batch_size: examples per minibatch; ignored for a `Stream`, whose batches have their own.
      grad_accum: micro-batches per minibatch.
      chain_batch: chains that one device runs at once; the rest wait their turn.
      num_probes: most draws after burn-in at which a step is looked at (`Probe`); with 0 the
        stability number is not measured either.
    """

    num_draws: int
    num_burnin: int
    thinning: int
    batch_size: int
    grad_accum: int
    chain_batch: int
    num_probes: int

    @property
    def total_draws(self) -> int:
        """Recorded draws, burn-in included."""
        return self.num_burnin + self.num_draws

    def probe_draws(self) -> range:
        """The draws at which a step is looked at, evenly spaced after burn-in."""
        every = -(-self.num_draws // max(1, self.num_probes))
        last = self.total_draws if self.num_probes else self.num_burnin
        return range(self.num_burnin, last, every)


class Trace(NamedTuple):
    """What a chain leaves behind; leading axes [checkpoint, chain] outside `sample_chain`.

    Attributes:
      losses: [draw] minibatch loss L_B at the draw.
      anchor_losses: [draw] loss of w* on the same minibatch.
      gaps: [draw] the first minus the second, subtracted example by example (`posterior.Gaps`).
      distance: [draw] Euclidean distance |w - w*|.
      probe: `Probe` of [draw].
      stability: of the end of the chain, `stability.stability_matrix`; None if not probed, or if
        the loss has no second derivatives.
      part_gaps: [draw, part] like `gaps`, of the parts of the loss; None without `parts_fn`.
      collected: what `collect` returned, stacked over draws; None without it.
    """

    losses: jax.Array
    anchor_losses: jax.Array
    gaps: jax.Array
    distance: jax.Array
    probe: Probe
    stability: Tridiagonal | None
    part_gaps: jax.Array | None
    collected: Any


def step_keys(rng_key: jax.Array, t: jax.Array) -> jax.Array:
    """The keys of step t of a chain: of the minibatch, of the noise."""
    return jax.random.split(jax.random.fold_in(rng_key, t))


def minibatch(rng_key: jax.Array, data: Batch | Stream, batch_size: int) -> tuple[Batch, Any]:
    """Draws a minibatch; consumes `rng_key`.

    Returns:
      (examples, their rows in the data set: all of it, an int array, or None for a stream).
    """
    if isinstance(data, Stream):
        return data.batch_fn(rng_key), None
    n = num_examples(data)
    if batch_size == n:
        return data, slice(None)
    rows = jax.random.randint(rng_key, (batch_size,), 0, n, dtype=jnp.int32)
    return take(data, rows), rows


def sample_chain(
    rng_key: jax.Array,
    loss_fn: LossFn,
    anchor: Params,
    data: Batch | Stream,
    reference: jax.Array | None,
    part_reference: jax.Array | None,
    sampler: Sampler,
    nbeta: jax.Array,
    localization: jax.Array,
    mask: Params | None,
    plan: Plan,
    parts_fn: PartsFn | None = None,
    collect: Callable[[Params, Batch], Any] | None = None,
) -> Trace:
    """Runs one chain from the anchor.

    Args:
      rng_key: identity of the chain; step t uses `step_keys(rng_key, t)` and nothing else.
      loss_fn: per-example losses.
      anchor: w*, start of the chain and centre of the localization.
      data: a data set with leading axis n, or a `Stream`.
      reference: [n] losses at the anchor; None for a `Stream`.
      part_reference: [n, part] parts of them; None for a `Stream` or without `parts_fn`.
      sampler: the sampler.
      nbeta: scalar.
      localization: scalar.
      mask: None, or 0/1 like params.
      plan: the static sizes.
      parts_fn: optional `parts_fn(params, batch)` [batch, part], averaged at every draw.
      collect: optional `collect(params, batch)` recorded at every draw.

    Returns:
      A `Trace` over burn-in and draws. The first recorded draw of a chain with `thinning=1` is
      the anchor itself.
    """

    def posterior_on(key):
        """(minibatch, loss of the anchor on it, w -> `Evaluation` on it)."""
        batch, rows = minibatch(key, data, plan.batch_size)
        if rows is None:
            losses = losses_of(loss_fn, anchor, batch)
            parts = None if parts_fn is None else losses_of(parts_fn, anchor, batch)
        else:
            losses = reference[rows]
            parts = None if parts_fn is None else part_reference[rows]

        def posterior(params):
            return evaluate(
                loss_fn, params, batch, anchor, nbeta, localization, mask, plan.grad_accum,
                losses, parts_fn, parts,
            )  # fmt: skip

        return batch, jnp.mean(losses), posterior

    def step(state, key_data, probing):
        batch_key, noise_key = jax.random.wrap_key_data(key_data, impl=jax.random.key_impl(rng_key))
        batch, anchor_loss, posterior = posterior_on(batch_key)
        new_state, here = sampler.step(noise_key, state, posterior, mask)
        distance = norm(apply_mask(mask, displacement(state.params, anchor)))
        probe = look_at(
            sampler, state, new_state, here, posterior, anchor, mask, probing if probes else None
        )
        extra = None if collect is None else collect(state.params, batch)
        seen = here.loss, anchor_loss, here.gaps.loss, distance, probe, here.gaps.parts, extra
        return new_state, seen

    def draw(state, inputs):
        key_data, probing = inputs
        if plan.thinning == 1:
            return step(state, key_data[0], probing)
        blank = jax.eval_shape(lambda: step(state, key_data[0], probing)[1])
        return jax.lax.fori_loop(
            0,
            plan.thinning,
            lambda i, carry: step(carry[0], key_data[i], probing & (i == plan.thinning - 1)),
            (state, jax.tree.map(jnp.zeros_like, blank)),
        )

    # Of all steps at once: in the loop they would be programs of their own, every step. As data,
    # since checks for keys that are used twice do not see through a scan over keys in a vmap.
    count = plan.total_draws * plan.thinning
    key_data = jax.vmap(lambda t: jax.random.key_data(step_keys(rng_key, t)))(jnp.arange(count))
    key_data = key_data.reshape(plan.total_draws, plan.thinning, *key_data.shape[1:])
    probes = plan.probe_draws()
    draws = jnp.arange(plan.total_draws)
    # The first draw, too: of a chain that dies at once, it is all there is to see.
    probing = jnp.isin(draws, jnp.asarray([0, *probes], draws.dtype))
    state, seen = jax.lax.scan(draw, sampler.init(anchor), (key_data, probing))
    losses, references, gaps, distance, probe, parts, extra = seen
    stability = None
    if plan.num_probes and hasattr(sampler, "step_size"):
        batch_key, start_key = step_keys(rng_key, count)  # of the step after the last
        # A custom rule, a callback or a kernel may have no second derivative: sampling needs none.
        with contextlib.suppress(TypeError, ValueError, NotImplementedError, AssertionError):
            _, _, posterior = posterior_on(batch_key)

            def matrix(key):
                return stability_matrix(key, sampler, state, posterior, mask)

            # Where one chain runs alone, nothing but a trial under `vmap` finds it while tracing.
            jax.eval_shape(jax.vmap(matrix), start_key[None])
            stability = matrix(start_key)
    return Trace(losses, references, gaps, distance, probe, stability, parts, extra)


