"""Observables: what is recorded at the draws of chains, and summed up with an error bar.

An observable is a subclass of `Observable`, or any class with its methods. If it holds arrays, make
it a pytree (a NamedTuple, or by `jax.tree_util.register_dataclass`): they are arguments of the
compiled program. What is no array is static, so it must be hashable and keep its identity.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax import diagnostics
from llc_jax.inputs import arrays, checks, traced
from llc_jax.losses import losses_of, map_examples
from llc_jax.trees import apply_mask, displacement, norm
from llc_jax.types import Batch, LossFn, Params, PartsFn, Stream


class Draw(NamedTuple):
    """What an observable sees at a draw.

    Attributes:
      loss_fn: per-example losses, as given to the estimate.
      posterior: `sampling.posterior.LocalPosterior`: anchor, nbeta, localization, mask.
      params: w.
      batch: the minibatch B of this draw.
      rows: its rows in the data set: int array, `slice(None)` for all, None for a stream.
      data: the data set, or the `Stream`.
      loss: L_B(w), scalar.
      anchor_loss: L_B(w*), scalar.
      gap: L_B(w) - L_B(w*), scalar, subtracted example by example.
      chunk: examples at once, where memory counts; divides the minibatch.
    """

    loss_fn: LossFn
    posterior: Any
    params: Params
    batch: Batch
    rows: Any
    data: Batch | Stream
    loss: jax.Array
    anchor_loss: jax.Array
    gap: jax.Array
    chunk: int


class Anchor(NamedTuple):
    """What an observable sees of the anchor, once, before the chains start.

    Attributes:
      loss_fn: per-example losses.
      params: w*.
      data: the data set, or the `Stream`.
      chunk: examples at once, where memory counts.
    """

    loss_fn: LossFn
    params: Params
    data: Batch | Stream
    chunk: int


class Estimated(NamedTuple):
    """A value and its Monte-Carlo standard error: float64 arrays of one shape."""

    value: np.ndarray
    stderr: np.ndarray


class Observable:
    """What is recorded at every draw of every chain.

    Attributes:
      num_blocks: None to keep every draw; a divisor of num_draws to keep the means of so many
        blocks of draws instead, which bounds memory: the stack of draws is never made.
      burnin: whether the draws of the burn-in are kept, too, in front.
      keep: whether the estimate keeps what was recorded, beside its summary.
      dims: names of the axes after [chain, draw], for xarray; numbered where there are more.
    """

    num_blocks: int | None = None
    burnin: bool = False
    keep: bool = True
    dims: tuple[str, ...] = ()

    def prepare(self, anchor: Anchor) -> Any:
        """Returns a pytree of arrays that `record` needs of the anchor, computed once; or None."""
        return None

    def record(self, prepared: Any, draw: Draw) -> Any:
        """Returns a pytree of arrays: what is recorded at one draw of one chain."""
        raise NotImplementedError

    def summarise(self, recorded: Any, nbeta: float) -> Any:
        """Sums up the finite chains, on the host.

        Args:
          recorded: what `record` returned, as numpy arrays [chain, draw or block, ...], without
            burn-in.
          nbeta: n times inverse temperature.

        Returns:
          A pytree of `Estimated` [...]; None for none. By default means over chains and draws.
        """
        return jax.tree.map(_mean, recorded)

    def check(self, name: str, loss_fn: LossFn, params: Params, batch: Batch, size: int) -> None:
        """Raises ValueError for what cannot be recorded, given shapes of weights and minibatch."""


@dataclasses.dataclass(frozen=True)
class LossGap(Observable):
    """Losses at w and w*, their difference, and how far w is from w*: of these λ̂ is made."""

    burnin = True

    class Recorded(NamedTuple):
        """Scalars: L_B(w), L_B(w*), their difference example by example, |w - w*|."""

        loss: Any
        anchor_loss: Any
        gap: Any
        distance: Any

    def record(self, prepared: Any, draw: Draw) -> Recorded:
        """Returns what the gradient step has computed already, and the distance."""
        here = draw.posterior
        away = apply_mask(here.mask, displacement(draw.params, here.anchor))
        return self.Recorded(draw.loss, draw.anchor_loss, draw.gap, norm(away))

    def summarise(self, recorded: Recorded, nbeta: float) -> Estimated:
        """Returns λ̂."""
        return _of_floats(nbeta * recorded.gap.astype(np.float64))


@dataclasses.dataclass(frozen=True)
class LossTerms(Observable):
    """Terms of the loss, e.g. that of each token: λ̂ of each from the same chains.

    Attributes:
      parts_fn: `parts_fn(params, batch)` [batch, part]; static.
      keep: see `Observable`.
    """

    parts_fn: PartsFn
    keep: bool = True
    dims = ("part",)

    def prepare(self, anchor: Anchor) -> jax.Array | None:
        """Returns the terms of all examples at the anchor, [n, part]; None for a stream."""
        if isinstance(anchor.data, Stream):
            return None
        return map_examples(self.parts_fn, anchor.params, anchor.data, anchor.chunk)

    def record(self, prepared: Any, draw: Draw) -> jax.Array:
        """Returns how far each term is above that of the anchor, [part]."""

        def terms(params: Params) -> jax.Array:
            return map_examples(self.parts_fn, params, draw.batch, draw.chunk)

        anchor = terms(draw.posterior.anchor) if prepared is None else prepared[draw.rows]
        return jnp.mean(terms(draw.params) - anchor, axis=0)

    def summarise(self, recorded: np.ndarray, nbeta: float) -> Estimated:
        """Returns λ̂ of each term, [part]."""
        return _of_floats(nbeta * recorded.astype(np.float64))

    def check(self, name: str, loss_fn: LossFn, params: Params, batch: Batch, size: int) -> None:
        """Raises ValueError unless there is a row of terms for each example."""
        checks.parts(name, self.parts_fn, params, batch, size)


@dataclasses.dataclass(frozen=True)
class Function(Observable):
    """A function of weights and minibatch.

    Attributes:
      fn: `fn(params, batch)` returns a pytree of arrays; static, keep it small.
      burnin: see `Observable`.
      num_blocks: see `Observable`.
      summary: whether means over the draws are taken.
    """

    fn: Callable[[Params, Batch], Any]
    burnin: bool = False
    num_blocks: int | None = None
    summary: bool = True

    def record(self, prepared: Any, draw: Draw) -> Any:
        """Returns what the function returns."""
        return self.fn(draw.params, draw.batch)

    def summarise(self, recorded: Any, nbeta: float) -> Any:
        """Returns the means, if they are wanted."""
        return super().summarise(recorded, nbeta) if self.summary else None

    def check(self, name: str, loss_fn: LossFn, params: Params, batch: Batch, size: int) -> None:
        """Raises ValueError unless the function can be traced and is pure."""
        traced.trace(name, self.fn, params, batch)


@dataclasses.dataclass(frozen=True)
class ProbeLosses(Observable):
    """Losses of a fixed set of examples at every draw: [chain, draw, example, ...].

    Attributes:
      data: the examples, a pytree of arrays with a leading axis.
      loss_fn: `loss_fn(params, data)` [example] or [example, position]; default that of the
        estimate. Static.
      num_blocks: see `Observable`.
    """

    data: Batch
    loss_fn: Callable[[Params, Batch], jax.Array] | None = None
    num_blocks: int | None = None
    dims = ("example", "position")

    def record(self, prepared: Any, draw: Draw) -> jax.Array:
        """Returns the losses, at least float32."""
        return losses_of(self.loss_fn or draw.loss_fn, draw.params, self.data)

    def check(self, name: str, loss_fn: LossFn, params: Params, batch: Batch, size: int) -> None:
        """Raises ValueError unless there is a loss for each example."""
        data = arrays.data_arrays(self.data)
        size = checks.data_length(data)
        probe = checks.rows(data, size)
        out = traced.trace(f"loss_fn of {name}", self.loss_fn or loss_fn, params, probe).out
        if jnp.shape(out)[:1] != (size,) or len(jnp.shape(out)) > 2:
            raise ValueError(
                f"loss_fn of {name} returned shape {jnp.shape(out)} for {size} examples: it must"
                " return the losses of the examples, shape [example] or [example, position]."
            )


jax.tree_util.register_dataclass(ProbeLosses, ["data"], ["loss_fn", "num_blocks"])


def _mean(recorded: Any) -> Estimated | None:
    """Mean and its error of one array [chain, draw, ...]; None for what is no number."""
    recorded = np.asarray(recorded)
    if not jnp.issubdtype(recorded.dtype, jnp.floating):
        return None
    return _of_floats(recorded.astype(np.float64))


def _of_floats(recorded: np.ndarray) -> Estimated:
    with np.errstate(invalid="ignore", divide="ignore"):
        value = recorded.mean(axis=(0, 1)) if len(recorded) else recorded.sum((0, 1)) * np.nan
    return Estimated(value, diagnostics.mean_stderrs(recorded))
