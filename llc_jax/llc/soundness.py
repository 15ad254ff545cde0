"""Whether loss, gradient, data and weights are what an estimate takes them for.

The diagnostics of chains say whether they have sampled *something* well. These say whether it was
the posterior of this loss: losses that are finite, belong to single examples, are computed to more
digits than their differences need, and have the gradient that the sampler follows.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

WORTH_SAYING = 0.01  # of the variance of steps, where there is no standard error to compare with
# Standard errors by which rounding and gradients may move an estimate, so that chance on top of it
# does not reach 4. The former is known to its size, the latter is measured.
MAX_ROUNDING = 0.5
MAX_OFF = 2.0
# Of what gradients predict. Right ones, in float32, were within 0.006 ± 0.005 of slope 1 and left
# 0.03 unexplained (linear, deep linear and ReLU networks, transformers, L1 losses, hinges, normal
# crossings, steps up to half of the limit); bfloat16 within left 0.18, of the size of its rounding.
MAX_TILT = 0.05
MAX_UNEXPLAINED = 0.5  # whatever the estimate
MIN_MOVES = 8
ROUNDING = 16  # units in the last place that examples may differ by in other company


class Anchor(NamedTuple):
    """What the losses of all examples at the anchor say; losses in units of the loss.

    Attributes:
      num_examples: n; 0 for a stream, of which nothing is known here.
      init_loss: their mean, float64.
      num_bad: examples without a finite loss.
      first_bad: row of the first of them, -1 if there is none.
      rounding: standard error of the mean by rounding in the dtype of the losses. Examples of
        equal loss share their error.
      unit: distance between neighbouring numbers of that dtype at the size of the losses.
      company: root mean square, over random minibatches, of how far the mean loss of the examples
        in it is from that of the same examples in the order of the data; 0 within rounding.
      company_share: the same at a point beside the anchor, after they have changed company,
        relative to how far the losses are above those of the anchor.
    """

    num_examples: int
    init_loss: float
    num_bad: int
    first_bad: int
    rounding: float
    unit: float
    company: float
    company_share: float = 0.0

    @classmethod
    def unknown(cls) -> "Anchor":
        """Of a stream."""
        return cls(0, math.nan, 0, -1, 0.0, 0.0, 0.0)


class Agreement(NamedTuple):
    """How the loss changed along moves towards the anchor against what its gradients predict.

    Attributes:
      num_moves: moves looked at that were any.
      slope: of change against prediction, 1 for a gradient of this loss. For a homogeneous loss
        its distance from 1 is the relative error of the estimate.
      slope_stderr: its standard error.
      residual: root mean square of change minus prediction, in units of the loss.
      predicted: root mean square of the prediction.
    """

    num_moves: int
    slope: float
    slope_stderr: float
    residual: float
    predicted: float


class Soundness(NamedTuple):
    """Everything that `findings` judges beside the chains themselves.

    Attributes:
      nbeta: n times inverse temperature.
      anchor: see `Anchor`.
      agreement: see `Agreement`.
      gradient: [C, P] norm of the gradient at the moves; P = 0 if none were looked at.
      heating: variance that rounding of the weights adds to that of a step, relative.
      second_derivatives: whether the stability number could be measured, if it was wanted.
      shared: pairs of leaves that are one array.
      bad_minibatch: whether a chain died where the anchor itself has no finite loss or gradient
        on the same minibatch.
      bad_rows: rows of the data set without a finite gradient at the anchor, in that minibatch.
    """

    nbeta: float
    anchor: Anchor
    agreement: Agreement
    gradient: np.ndarray
    heating: float
    second_derivatives: bool
    shared: tuple[str, ...]
    bad_minibatch: bool = False
    bad_rows: tuple[int, ...] = ()

    @property
    def explains_death(self) -> bool:
        """Whether chains that died did so for another reason than the size of their steps."""
        return self.anchor.num_bad > 0 or self.bad_minibatch


def anchor_of(losses: np.ndarray, again: np.ndarray, rows: np.ndarray, dtype: Any) -> Anchor:
    """Judges the losses at one anchor.

    Args:
      losses: [n] of all examples.
      again: [3, k, B] those of the examples `rows` in minibatches, see `anchors.losses_at`.
      rows: [k, B].
      dtype: that in which the losses were returned.
    """
    bad = np.flatnonzero(~np.isfinite(losses))
    wide = losses.astype(np.float64)
    eps = float(jnp.finfo(dtype).eps)
    company, share, unit, rounding = 0.0, 0.0, math.nan, math.nan
    if not bad.size:
        unit = eps * math.sqrt(np.mean(np.square(wide)))
        rounding = unit / math.sqrt(6 * np.unique(losses).size)
        here, beside, moved = again.astype(np.float64)
        company = _change(wide[rows], here, eps)
        if np.isfinite([beside, moved]).all() and (other := _change(beside, moved, eps)):
            share = other / _rms((beside - here).mean(axis=1))
    with np.errstate(invalid="ignore"):
        init_loss = float(wide.mean())
    first = int(bad[0]) if bad.size else -1
    return Anchor(len(losses), init_loss, bad.size, first, rounding, unit, company, share)


def _change(before: np.ndarray, after: np.ndarray, eps: float) -> float:
    """Root mean square change [k, B] of the mean losses of minibatches; 0 within rounding."""
    change = after - before
    if not np.abs(change).max() > ROUNDING * eps * np.abs(before).max():
        return 0.0
    return _rms(change.mean(axis=1))


def agreement(change: np.ndarray, predicted: np.ndarray) -> Agreement:
    """Compares changes of the loss along moves with their prediction, arrays of any one shape."""
    kept = np.isfinite(change) & np.isfinite(predicted) & ((change != 0) | (predicted != 0))
    m, p = change[kept].astype(np.float64), predicted[kept].astype(np.float64)
    power = float(p @ p)
    if m.size < 2 or not power > 0:
        return Agreement(m.size, math.nan, math.nan, _rms(m - p), 0.0)
    slope = float(m @ p) / power
    stderr = math.sqrt(float(np.sum((m - slope * p) ** 2)) / (m.size - 1) / power)
    return Agreement(m.size, slope, stderr, _rms(m - p), _rms(p))


def _rms(x: np.ndarray) -> float:
    return math.sqrt(float(np.mean(np.square(x)))) if x.size else math.nan


def findings(sound: Soundness, mean: float, stderr: float) -> list[tuple[str, str]]:
    """Says what is wrong with loss, gradient, data or weights, and what to do about it.

    Args:
      sound: what was found.
      mean: the estimate.
      stderr: its Monte-Carlo standard error.

    Returns:
      Pairs (label of a few words, sentence with numbers and remedy); empty if all is well.
    """
    return [*_of_the_anchor(sound), *_of_the_loss(sound, mean, stderr),
            *_of_the_weights(sound, mean, stderr)]  # fmt: skip


def _of_the_anchor(sound: Soundness) -> list[tuple[str, str]]:
    anchor = sound.anchor
    if anchor.num_bad:
        every = anchor.num_bad == anchor.num_examples
        which = f"{anchor.num_bad} of {anchor.num_examples} examples"
        remedy = (
            "the model or this checkpoint is at fault" if every else "correct or leave out such"
            " rows (missing values, labels out of range)"
        )  # fmt: skip
        return [(
            "loss not finite at the anchor",
            f"The loss at the anchor itself is not finite for {which}, the first is row"
            f" {anchor.first_bad}: {remedy}.",
        )]  # fmt: skip
    if sound.bad_minibatch:
        rows = f", such as row {', '.join(map(str, sound.bad_rows))}" if sound.bad_rows else ""
        return [(
            "gradient not finite at the anchor",
            f"Chains died on minibatches on which the anchor itself has no finite loss or gradient"
            f"{rows}: correct or leave out such rows, or make the loss differentiable there (a root"
            " or a norm of 0, a division behind jnp.where).",
        )]  # fmt: skip
    return []


def _of_the_loss(sound: Soundness, mean: float, stderr: float) -> list[tuple[str, str]]:
    nbeta, anchor, seen, found = sound.nbeta, sound.anchor, sound.agreement, []
    rounding = nbeta * anchor.rounding
    if sound.gradient.size and np.all(sound.gradient == 0):
        found.append((
            "gradient is zero",
            f"The gradient of the loss is 0 in all sampled weights at all {sound.gradient.size}"
            " points looked at: the loss does not depend on them there, or only in jumps, as an"
            " error rate does. The chains are a random walk. Give a differentiable loss of the"
            " sampled weights.",
        ))  # fmt: skip
    elif rounding > MAX_ROUNDING * stderr or (math.isnan(stderr) and mean == 0 and rounding > 0):
        found.append((
            "rounding of the loss",
            f"Losses near {anchor.init_loss:.3g} are {anchor.unit:.2g} apart in their precision,"
            f" which moves the estimate by about {rounding:.2g}: not small beside {mean:.3g} ±"
            f" {stderr:.2g}. Leave constants out of the loss, or compute and return it in a wider"
            " dtype.",
        ))  # fmt: skip
    elif _disagrees(seen, anchor.unit, mean, stderr, nbeta):
        found.append((
            "gradient is not that of the loss",
            f"Along {seen.num_moves} moves towards the anchor the loss changed by {seen.slope:.2f}"
            f" ± {seen.slope_stderr:.1g} times what its gradient says, and by"
            f" {seen.residual / seen.predicted:.0%} of that beside it: the estimate is that of no"
            " posterior. Look for stop_gradient, rounding or quantised weights, clipped gradients,"
            " custom rules, low precision within the loss.",
        ))  # fmt: skip
    off = max(nbeta * anchor.company, anchor.company_share * abs(mean))
    if off > stderr:
        found.append((
            "losses depend on the batch",
            f"The mean loss of the examples in a minibatch changes with their company, at the"
            f" anchor by {anchor.company:.2g}, up to {off:.2g} of the estimate: loss_fn must"
            " return the loss of each example by itself, the same at every call (batch norm by its"
            " running averages, no dropout or noise, no ranking, weights or counts of the batch),"
            " or take the full batch.",
        ))  # fmt: skip
    if not sound.second_derivatives:
        found.append((
            "stability not measured",
            "The loss has no second derivatives (a custom rule, a callback or a kernel without"
            " them), so that the stability number is nan: nothing else tells that steps are too"
            " large for a preconditioned sampler. Compare two step sizes, or leave the number out"
            " by num_probes=0.",
        ))  # fmt: skip
    return found


def _disagrees(seen: Agreement, unit: float, mean: float, stderr: float, nbeta: float) -> bool:
    """Whether the gradients leave more of the loss unexplained than the estimate bears."""
    if seen.num_moves < MIN_MOVES or not seen.predicted > 0:
        return False
    off, share = abs(seen.slope - 1), seen.residual / seen.predicted
    tilted = off > MAX_TILT or off * abs(mean) > MAX_OFF * stderr
    rough = share > MAX_TILT and nbeta * seen.residual > MAX_OFF * stderr
    # Where steps are so short that moves change the loss by less than its last digit, that is all.
    blind = share > MAX_UNEXPLAINED and seen.residual > unit
    return (tilted and off > 3 * seen.slope_stderr) or rough or blind


def _of_the_weights(sound: Soundness, mean: float, stderr: float) -> list[tuple[str, str]]:
    found = []
    unknown = math.isnan(stderr) and sound.heating > WORTH_SAYING
    if sound.heating * abs(mean) > stderr or unknown:
        found.append((
            "rounding of the weights",
            f"Rounding of the weights {_added(sound.heating)}: take larger steps, rescale the"
            " weights or use a wider dtype.",
        ))  # fmt: skip
    if sound.shared:
        found.append((
            "one array in two places",
            f"{'; '.join(sound.shared[:3])}{' and more' * (len(sound.shared) > 3)} are one array,"
            " but are sampled as independent weights: if the model ties them, call"
            " loss_fn, params = llc_jax.tie(loss_fn, params) first; if not, copy one of them.",
        ))  # fmt: skip
    return found


def _added(heating: float) -> str:
    if math.isinf(heating):
        return "undoes whole steps of some of them"
    return f"adds {heating:.2g} of the variance of a step to each, and as much to the estimate"
