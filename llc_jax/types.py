"""The contracts between a user's model and the library: loss functions, data and samplers."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

Params = Any
"""A pytree of floating-point arrays: a Linen dict, an `nnx.State`, any nested container."""

Batch = Any
"""A pytree of arrays whose leading axis is the batch."""


class LossFn(Protocol):
    """`loss_fn(params, batch) -> losses`: one mean loss per example, shape [batch].

    Losses per example, not their mean, so that the loss at the anchor can be computed once and
    looked up for every minibatch. `loss_fn` is a static argument of compiled programs: give it
    an identity that survives (a module-level function, a frozen dataclass with `__call__`), since
    a fresh lambda compiles afresh.
    """

    def __call__(self, params: Params, batch: Batch, /) -> jax.Array:
        """Returns the losses of the examples in `batch`, shape [batch]."""
        ...


class PartsFn(Protocol):
    """`parts_fn(params, batch) -> parts`: losses of each example in parts, shape [batch, part].

    For example the loss at each token. Its identity must survive, like that of a `LossFn`.
    """

    def __call__(self, params: Params, batch: Batch, /) -> jax.Array:
        """Returns the parts of the losses of the examples in `batch`, shape [batch, part]."""
        ...


@dataclasses.dataclass(frozen=True)
class Stream:
    """Data without end: every draw sees a fresh minibatch `batch_fn(rng_key)`.

    Attributes:
      batch_fn: pure, traceable function of a typed key; returns a `Batch`. Like `LossFn` it is
        static, so its identity must survive between calls.
    """

    batch_fn: Callable[[jax.Array], Batch]


class Evaluation(NamedTuple):
    """The posterior at one point, on one minibatch: all that a sampler sees of the model.

    Attributes:
      loss: minibatch mean loss `L_B(w)`, scalar, at least float32.
      energy: `nbeta (L_B(w) - L_B(w*)) + localization/2 |w - w*|²`, likewise: the negative log
        posterior up to a constant of the minibatch, which keeps its digits.
      grad: gradient of `L_B`, like params, zero where masked.
      drift: `nbeta * grad + localization * (w - w*)`, like params, zero where masked: the
        gradient of the negative log posterior.
      nbeta: weight of `grad` in `drift`, scalar.
      gap: mean of L_B(w) - L_B(w*), subtracted example by example, scalar.
    """

    loss: jax.Array
    energy: jax.Array
    grad: Params
    drift: Params
    nbeta: jax.Array
    gap: jax.Array | None = None


class Sampler(Protocol):
    """A NamedTuple of traced hyperparameters with two pure methods.

    `init(params) -> State`, where `State` has a field `params`;
    `step(rng_key, state, evaluate, mask) -> (State, Evaluation)`, where `evaluate(params)` is an
    `Evaluation` on the minibatch of this step, the returned one is that at the point *before* the
    step, and `mask` is None or a pytree of 0/1 like params whose zeros must not move.

    What else it may say of itself, and what holds if it does not: `llc_jax.samplers.base`.
    """

    def init(self, params: Params) -> Any:
        """Returns the state that starts a chain at `params`."""
        ...

    def step(self, rng_key: jax.Array, state: Any, evaluate: Callable, mask: Params | None) -> Any:
        """Returns the next state and the evaluation before the step; consumes `rng_key`."""
        ...

    def _asdict(self) -> dict[str, Any]: ...

    def _replace(self, **hyperparameters: Any) -> Any: ...
