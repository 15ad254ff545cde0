"""One chain as a scan: minibatches, steps, and what is recorded at its draws."""

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llc_jax.losses import losses_of, num_examples, take
from llc_jax.observables import Draw
from llc_jax.recorder import trait
from llc_jax.samplers.base import sgld_step_size
from llc_jax.sampling.posterior import LocalPosterior, evaluate
from llc_jax.sampling.probe import Probe, look_at
from llc_jax.sampling.stability import Tridiagonal, stability_matrix
from llc_jax.types import Batch, LossFn, Params, Sampler, Stream


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
    def micro_batch(self) -> int:
        """Examples of which gradients are taken at once."""
        return self.batch_size // self.grad_accum

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
      observed: {name: what the observable recorded, [draw or block, ...]}.
      probe: `Probe` of [draw], burn-in included.
      stability: of the end of the chain, `stability.stability_matrix`; None if not probed, or if
        the loss has no second derivatives.
    """

    observed: dict[str, Any]
    probe: Probe
    stability: Tridiagonal | None


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


class _Seen(NamedTuple):
    """A step: where it began, what was computed there, and what the step says."""

    params: Params
    loss: jax.Array
    anchor_loss: jax.Array
    gap: jax.Array
    probe: Probe


def sample_chain(
    rng_key: jax.Array,
    loss_fn: LossFn,
    here: LocalPosterior,
    data: Batch | Stream,
    reference: jax.Array | None,
    prepared: Mapping[str, Any],
    sampler: Sampler,
    plan: Plan,
    observables: Mapping[str, Any],
) -> Trace:
    """Runs one chain from the anchor.

    Args:
      rng_key: identity of the chain; step t uses `step_keys(rng_key, t)` and nothing else.
      loss_fn: per-example losses.
      here: the posterior; its anchor is the start of the chain.
      data: a data set with leading axis n, or a `Stream`.
      reference: [n] losses at the anchor; None for a `Stream`.
      prepared: {name: what the observable prepared at the anchor}.
      sampler: the sampler.
      plan: the static sizes.
      observables: {name: `observables.Observable`}.

    Returns:
      A `Trace`. The first recorded draw of a chain with `thinning=1` is the anchor itself.
    """
    mask = here.mask

    def minibatch_of(key_data):
        """(batch, its rows, losses of the anchor on it) of one step."""
        key = jax.random.wrap_key_data(key_data[0], impl=jax.random.key_impl(rng_key))
        batch, rows = minibatch(key, data, plan.batch_size)
        losses = losses_of(loss_fn, here.anchor, batch) if rows is None else reference[rows]
        return batch, rows, losses

    def posterior_on(batch, losses):
        return lambda params: evaluate(
            loss_fn, here, params, batch, grad_accum=plan.grad_accum, anchor_losses=losses
        )

    def step(state, key_data, probing):
        batch, rows, losses = minibatch_of(key_data)
        posterior = posterior_on(batch, losses)
        noise_key = jax.random.wrap_key_data(key_data[1], impl=jax.random.key_impl(rng_key))
        new_state, now = sampler.step(noise_key, state, posterior, mask)
        probe = look_at(
            sampler, state, new_state, now, posterior, here.anchor, mask,
            probing if probes else None,
        )  # fmt: skip
        seen = _Seen(state.params, now.loss, jnp.mean(losses), now.gap, probe)
        return new_state, seen, batch, rows

    def advance(state, key_data, probing):
        """The steps of one draw: (state, the last step, its batch, its rows)."""
        if plan.thinning == 1:
            return step(state, key_data[0], probing)
        blank = jax.eval_shape(lambda: step(state, key_data[0], probing)[1])
        state, seen = jax.lax.fori_loop(
            0,
            plan.thinning,
            lambda i, carry: step(carry[0], key_data[i], probing & (i == plan.thinning - 1))[:2],
            (state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), blank)),
        )
        return state, seen, *minibatch_of(key_data[-1])[:2]

    def observe(seen, batch, rows) -> dict[str, Any]:
        at = Draw(
            loss_fn, here, seen.params, batch, rows, data, seen.loss, seen.anchor_loss, seen.gap,
            plan.micro_batch,
        )  # fmt: skip
        return {name: x.record(prepared[name], at) for name, x in observables.items()}

    def draw(carry, inputs):
        state, sums = carry
        t, key_data, probing = inputs
        state, seen, batch, rows = advance(state, key_data, probing)
        found = observe(seen, batch, rows)
        sums = {name: added(total, found.pop(name), t) for name, total in sums.items()}
        return (state, sums), (found, seen.probe)

    def added(total, found, t):
        """Adds a draw to the sum of its block; draws of the burn-in are dropped."""

        def one(x, y):
            block = (t - plan.num_burnin) // (plan.num_draws // len(x))
            block = jnp.where(t < plan.num_burnin, len(x), block)
            return x.at[block].add(y.astype(x.dtype), mode="drop")

        return jax.tree.map(one, total, found)

    # Of all steps at once: in the loop they would be programs of their own, every step. As data,
    # since checks for keys that are used twice do not see through a scan over keys in a vmap.
    count = plan.total_draws * plan.thinning
    key_data = jax.vmap(lambda t: jax.random.key_data(step_keys(rng_key, t)))(jnp.arange(count))
    key_data = key_data.reshape(plan.total_draws, plan.thinning, *key_data.shape[1:])
    probes = plan.probe_draws()
    draws = jnp.arange(plan.total_draws)
    # The first draw, too: of a chain that dies at once, it is all there is to see.
    probing = jnp.isin(draws, jnp.asarray([0, *probes], draws.dtype))
    state, sums = sampler.init(here.anchor), {}
    blocks = {name: n for name, x in observables.items() if (n := trait(x, "num_blocks"))}
    if blocks:
        shapes = jax.eval_shape(lambda s: observe(*advance(s, key_data[0], probing[0])[1:]), state)
        sums = {
            name: jax.tree.map(
                lambda x, n=n: jnp.zeros((n, *x.shape), jnp.promote_types(x.dtype, jnp.float32)),
                shapes[name],
            )
            for name, n in blocks.items()
        }
    carry, (found, probe) = jax.lax.scan(draw, (state, sums), (draws, key_data, probing))
    state, sums = carry
    for name, stacked in found.items():
        first = 0 if trait(observables[name], "burnin") else plan.num_burnin
        found[name] = jax.tree.map(lambda x, first=first: x[first:], stacked)
    for name, total in sums.items():
        found[name] = jax.tree.map(lambda x: x / (plan.num_draws // len(x)), total)
    stability = None
    if plan.num_probes and sgld_step_size(sampler) is not None:
        last = jax.random.key_data(step_keys(rng_key, count))  # of the step after the last
        # A custom rule, a callback or a kernel may have no second derivative: sampling needs none.
        with contextlib.suppress(TypeError, ValueError, NotImplementedError, AssertionError):
            batch, _, losses = minibatch_of(last)
            posterior = posterior_on(batch, losses)

            def matrix(key):
                return stability_matrix(key, sampler, state, posterior, mask)

            start_key = jax.random.wrap_key_data(last[1], impl=jax.random.key_impl(rng_key))
            # Where one chain runs alone, nothing but a trial under `vmap` finds it while tracing.
            jax.eval_shape(jax.vmap(matrix), start_key[None])
            stability = matrix(start_key)
    return Trace(found, probe, stability)
