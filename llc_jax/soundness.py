"""Whether loss, gradient, data and weights are what an estimate takes them for.

The diagnostics of chains say whether they have sampled *something* well. These say whether it was
the posterior of this loss: losses that are finite, belong to single examples, are computed to more
digits than their differences need, and have the gradient that the sampler follows.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llc_jax import arrays
from llc_jax.types import Params, Sampler

MAX_HEATING = 1 / 3  # of the variance of steps by rounding of the weights; above it, an error
WORTH_SAYING = 0.01
MAX_SHARE = 0.05  # of the estimate, that rounding may move it by
MAX_SLOPE_ERROR = 0.2
MIN_PROBES = 8
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
    """

    num_examples: int
    init_loss: float
    num_bad: int
    first_bad: int
    rounding: float
    unit: float
    company: float

    @classmethod
    def unknown(cls) -> "Anchor":
        """Of a stream."""
        return cls(0, math.nan, 0, -1, 0.0, 0.0, 0.0)


class Agreement(NamedTuple):
    """How the loss changed along short moves against what its gradients predict.

    Attributes:
      num_moves: moves looked at.
      slope: of change against prediction, 1 for a gradient of this loss.
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
      again: [k, B] those of the examples `rows` in random minibatches.
      rows: [k, B].
      dtype: that in which the losses were returned.
    """
    bad = np.flatnonzero(~np.isfinite(losses))
    wide = losses.astype(np.float64)
    eps = float(jnp.finfo(dtype).eps)
    company, unit, rounding = 0.0, math.nan, math.nan
    if not bad.size:
        unit = eps * math.sqrt(np.mean(np.square(wide)))
        rounding = unit / math.sqrt(6 * np.unique(losses).size)
        change = again.astype(np.float64) - wide[rows]
        if rows.size and np.abs(change).max() > ROUNDING * eps * np.abs(wide).max():
            company = math.sqrt(np.mean(np.square(change.mean(axis=1))))
    with np.errstate(invalid="ignore"):
        init_loss = float(wide.mean())
    first = int(bad[0]) if bad.size else -1
    return Anchor(len(losses), init_loss, bad.size, first, rounding, unit, company)


def agreement(change: np.ndarray, predicted: np.ndarray) -> Agreement:
    """Compares changes of the loss along moves with their prediction, arrays of any one shape."""
    kept = np.isfinite(change) & np.isfinite(predicted)
    m, p = change[kept].astype(np.float64), predicted[kept].astype(np.float64)
    power = float(p @ p)
    if m.size < 2 or not power > 0:
        return Agreement(m.size, math.nan, math.nan, _rms(m - p), 0.0)
    slope = float(m @ p) / power
    stderr = math.sqrt(float(np.sum((m - slope * p) ** 2)) / (m.size - 1) / power)
    return Agreement(m.size, slope, stderr, _rms(m - p), _rms(p))


def _rms(x: np.ndarray) -> float:
    return math.sqrt(float(np.mean(np.square(x)))) if x.size else math.nan


def weight_heating(
    params: Params, sampler: Sampler, localization: float, mask: Params | None
) -> float:
    """The share of a step's variance that rounding of the weights adds, in the worst leaf.

    Numbers `s` apart are rounded by s²/12 in the mean square in every step, whose noise has the
    variance step_size. Under a preconditioner the step is not known beforehand, and the width of
    the posterior, at most 1/sqrt(localization), stands in its place.

    Raises:
      ValueError: where that is more than `MAX_HEATING`.
    """
    variances = []
    if hasattr(sampler, "step_size") and not hasattr(sampler, "preconditioner"):
        variances.append((float(sampler.step_size), "steps of sqrt(step_size)"))
    if localization > 0:
        variances.append((1 / float(localization), "a posterior of width 1/sqrt(localization)"))
    worst = 0.0
    kept = [True] * len(jax.tree.leaves(params)) if mask is None else jax.tree.leaves(mask)
    for (path, leaf), sampled in zip(
        jax.tree_util.tree_leaves_with_path(params), kept, strict=True
    ):
        dtype = jnp.result_type(leaf)
        eps = float(jnp.finfo(dtype).eps)
        values = np.abs(np.asarray(leaf).astype(np.float32 if eps > 1e-10 else np.float64))
        values = values[np.broadcast_to(sampled, values.shape)]
        largest = values.max(initial=0.0)
        for variance, what in variances:
            if not variance > 0 or (eps * largest) ** 2 / 12 < 1e-4 * variance:
                continue
            spacing = np.ldexp(eps, np.frexp(values)[1].astype(int) - 1)
            squared = float(np.mean(np.square(spacing)))
            worst = max(worst, squared / 12 / variance)
            if squared / 12 > MAX_HEATING * variance:
                raise ValueError(
                    f"params{arrays.short(jax.tree_util.keystr(path))} has dtype {dtype} and values"
                    f" near {float(np.sqrt(np.mean(np.square(values, dtype=np.float64)))):.2g},"
                    f" which are {math.sqrt(squared):.2g} apart: {what} = {variance**0.5:.2g} would"
                    f" be rounded away; {_wider(dtype)}."
                )
    return worst


def _wider(dtype: Any) -> str:
    if jnp.finfo(dtype).bits < 32:
        return "cast the weights to float32"
    return "rescale the weights, or use float64 ones with jax_enable_x64"


def shared_arrays(params: Params) -> tuple[str, ...]:
    """Pairs of leaves that are one array in two places, as tied weights are; constants may be."""
    first: dict[int, str] = {}
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = arrays.short(jax.tree_util.keystr(path), 60)
        if id(leaf) in first:
            values = np.asarray(leaf)
            if values.size > 1 and np.any(values != values.flat[0]):
                found.append(f"params{first[id(leaf)]} and params{name}")
        elif isinstance(leaf, jax.Array | np.ndarray):
            first[id(leaf)] = name
    return tuple(found)


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
    if sound.gradient.size and np.all(sound.gradient == 0):
        found.append((
            "gradient is zero",
            f"The gradient of the loss is 0 in all sampled weights at all {sound.gradient.size}"
            " points looked at: the loss does not depend on them there, or only in jumps, as an"
            " error rate does. The chains are a random walk. Give a differentiable loss of the"
            " sampled weights.",
        ))  # fmt: skip
    elif _disagrees(seen, anchor.unit, mean, nbeta):
        found.append((
            "gradient is not that of the loss",
            f"Along {seen.num_moves} short moves the loss changed by {seen.slope:.2f} ±"
            f" {seen.slope_stderr:.1g} times what its gradient says, and by"
            f" {seen.residual / seen.predicted:.0%} of that beside it: the estimate is that of no"
            " posterior. Look for stop_gradient, rounding or quantised weights, clipped gradients,"
            " custom rules, low precision within the loss.",
        ))  # fmt: skip
    rounding = nbeta * anchor.rounding
    if (
        rounding > stderr
        or rounding > MAX_SHARE * abs(mean)
        or (math.isnan(stderr) and mean == 0 and rounding > 0)
    ):
        found.append((
            "rounding of the loss",
            f"Losses near {anchor.init_loss:.3g} are {anchor.unit:.2g} apart in their precision,"
            f" which moves the estimate by about {rounding:.2g}: not small beside {mean:.3g} ±"
            f" {stderr:.2g}. Leave constants out of the loss, or compute and return it in a wider"
            " dtype.",
        ))  # fmt: skip
    if nbeta * anchor.company > stderr:
        found.append((
            "losses depend on the batch",
            f"At the anchor the mean loss of the examples in a minibatch is {anchor.company:.2g}"
            f" off what it is in the company of other examples, {nbeta * anchor.company:.2g} of the"
            " estimate: loss_fn must return the loss of each example by itself (batch norm by its"
            " running averages, no dropout, no ranking or weights by the batch), or take the full"
            " batch.",
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


def _disagrees(seen: Agreement, unit: float, mean: float, nbeta: float) -> bool:
    """Whether loss and gradient differ by more than rounding and the curvature of a move."""
    if seen.num_moves < MIN_PROBES or not seen.residual > unit or not seen.predicted > 0:
        return False
    off = abs(seen.slope - 1)
    tilted = off > MAX_SLOPE_ERROR and off > 4 * seen.slope_stderr
    rough = seen.residual > seen.predicted / 2 and nbeta * seen.residual > MAX_SHARE * abs(mean)
    return tilted or rough


def _of_the_weights(sound: Soundness, mean: float, stderr: float) -> list[tuple[str, str]]:
    found = []
    if sound.heating > WORTH_SAYING and not sound.heating * abs(mean) < stderr:
        found.append((
            "rounding of the weights",
            f"Rounding of the weights adds {sound.heating:.0%} to the variance of each step, and so"
            " up to as much to the estimate: take larger steps, rescale the weights or use a wider"
            " dtype.",
        ))  # fmt: skip
    if sound.shared:
        found.append((
            "one array in two places",
            f"{'; '.join(sound.shared[:3])}{' and more' * (len(sound.shared) > 3)} are one array,"
            " but are sampled as independent weights: if the model ties them, call"
            " loss_fn, params = llc_jax.tie(loss_fn, params) first; if not, copy one of them.",
        ))  # fmt: skip
    return found
