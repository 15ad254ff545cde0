"""The localized tempered posterior p(w) ∝ exp(-nbeta L(w) - localization/2 |w - w*|²).

Symbols: `L` the mean loss, `w*` the anchor (the checkpoint under study), `nbeta` the inverse
temperature times the number of samples, `localization` the γ of Lau et al. 2023
(arXiv 2308.12108, eq. 14) and of Hoogland et al. 2024 (arXiv 2402.02364, section 3).
"""

import math
from typing import Any, NamedTuple

import jax

from llc_jax.inputs.scalars import number, shown
from llc_jax.losses import loss_and_grad
from llc_jax.trees import apply_mask, displacement, vdot
from llc_jax.types import Batch, Evaluation, LossFn, Params


def default_nbeta(n: int) -> float:
    """Returns `n / log(n)`: the sample size times the inverse temperature of WBIC.

    Args:
      n: number of samples in the data set.

    Raises:
      ValueError: for n < 2, where the formula has no meaning.

    Source: Watanabe 2013 (JMLR 14), theorem 4: β = 1 / log n.
    """
    count = number(n)
    if count is None or not 2 <= count < math.inf:
        raise ValueError(f"default_nbeta needs n >= 2, got {shown(n)}: give nbeta yourself.")
    return count / math.log(count)


class LocalPosterior(NamedTuple):
    """The posterior around one anchor: what varies along the first axis of the program.

    Attributes:
      anchor: w*, start of the chains and centre of the localization.
      nbeta: scalar.
      localization: γ, scalar.
      mask: None, or 0/1 like params (or a scalar for a whole weight); zeros take no part.
      step: training step of the anchor, part of the identity of the random numbers.
    """

    anchor: Params
    nbeta: Any
    localization: Any
    mask: Params | None = None
    step: Any = 0


def evaluate(
    loss_fn: LossFn,
    posterior: LocalPosterior,
    params: Params,
    batch: Batch,
    *,
    grad_accum: int = 1,
    anchor_losses: jax.Array | None = None,
) -> Evaluation:
    """Loss, gradient and drift of the posterior at `params` on one minibatch.

    Args:
      loss_fn: per-example losses.
      posterior: of which the numbers are arrays.
      params: the point w.
      batch: the minibatch B.
      grad_accum: number of micro-batches.
      anchor_losses: [batch] losses of w* on the same minibatch; None for 0.
    """
    anchor, nbeta, localization, mask, _ = posterior
    loss, grad, gap = loss_and_grad(loss_fn, params, batch, grad_accum, anchor_losses)
    grad = apply_mask(mask, grad)
    pull = apply_mask(mask, displacement(params, anchor))
    drift = jax.tree.map(
        lambda g, d: nbeta.astype(g.dtype) * g + localization.astype(g.dtype) * d, grad, pull
    )
    energy = nbeta.astype(gap.dtype) * gap
    energy += localization.astype(energy.dtype) * vdot(pull, pull).astype(energy.dtype) / 2
    return Evaluation(loss, energy, grad, drift, nbeta, gap)
