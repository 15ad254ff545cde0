"""What a language model does and how it is built, over training, under the stages of the LLC.

Every `found` is the `xarray.Dataset` of `metrics.language_datasets.dataset` with a leading
dimension checkpoint. Heads are named layer:head, both counted from 1. Letters: N checkpoints, K
lines.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from llc_jax.figures import base
from llc_jax.figures.base import finish

HEADS = {
    "previous_token": "attention to the\nprevious token",
    "prefix_matching": "attention to what\nfollowed the same word",
    "induction": "the same in a\nrepeated block",
}
COMPOSITIONS = ("k_composition", "q_composition", "v_composition")
FAMILIES = ("Blues", "Oranges", "Greens", "Purples")  # of the heads of layers 1, 2, ...
SELECTED = 8  # tokens or positions, about evenly spaced on a logarithmic scale
PLANES = 6  # checkpoints whose positions are drawn, likewise
NAMED_HEADS, NAMED_PAIRS = 3, 4  # in each panel


def behavior_figure(found, *, stages: Sequence = ()) -> Figure:
    """Draws losses, cross-entropy with the bigrams, n-gram scores and learning in context.

    Args:
      found: see above; a panel of n-grams is drawn if there are any.
      stages: of `llc_jax.find_stages`; may be empty.
    """
    ngrams = "ngram_score" in found
    figure = base.InlineFigure(figsize=(9.6, 8.4 + 2.6 * ngrams), layout="constrained")
    axes = figure.subplots(3 + ngrams, sharex=True)
    losses, bigrams, icl = axes[0], axes[1], axes[-1]
    _with_error(losses, found, "mean_loss", base.INK, "test loss ± 1 s.e.")
    _with_error(losses, found, "ablated_mean_loss", base.ORANGE, "without positions")
    base.dress(losses, "loss (nats)")
    _with_error(bigrams, found, "bigram_score", base.BLUE, "model")
    look = {"color": base.INK, "ls": ":", "label": "least possible"}
    _plot(bigrams, found.checkpoint, found.bigram_floor, **look)
    base.dress(bigrams, "cross-entropy with\nthe bigrams (nats)")
    if ngrams:
        for n, color in zip(found.n.values, base.shades(found.sizes["n"]), strict=True):
            _with_error(axes[2], found.sel(n=n), "ngram_score", color, f"n = {n}")
        axes[2].axhline(1.0, color=base.INK, ls=":", label="like any token")
        base.dress(axes[2], "n-gram score: loss of\nany token / of n-gram")
    _with_error(icl, found, "icl", base.INK, "difference ± 1 s.e.")
    icl.axhline(0.0, color="0.5", lw=0.8)
    base.dress(icl, "loss at late minus\nearly token (nats)")
    finish(figure, axes, found.checkpoint.values, stages)
    return figure


def positions_figure(found, *, stages: Sequence = ()) -> Figure:
    """Draws the loss of some tokens, dark for late ones: as it is, and with positions set to 0.

    Args:
      found: see above.
      stages: of `llc_jax.find_stages`; may be empty.
    """
    figure = base.InlineFigure(figsize=(9.6, 6.6), layout="constrained")
    axes = figure.subplots(2, sharex=True, sharey=True)
    numbers = _selected(found.sizes["prediction"])
    for number, color in zip(numbers, base.shades(numbers.size), strict=True):
        one = found.sel(prediction=number)
        for ax, name in zip(axes, ("loss", "ablated_loss"), strict=True):
            _with_error(ax, one, name, color, f"token {number}")
    base.dress(axes[0], "loss (nats)")
    base.dress(axes[1], "loss without\npositions (nats)")
    finish(figure, axes, found.checkpoint.values, stages)
    return figure


def heads_figure(found, *, stages: Sequence = ()) -> Figure:
    """Draws the scores of every head, a family of colours for each layer; the best are named.

    Args:
      found: see above.
      stages: of `llc_jax.find_stages`; may be empty.
    """
    layers, heads = found.sizes["layer"], found.sizes["head"]
    names = [f"{layer + 1}:{head + 1}" for layer in range(layers) for head in range(heads)]
    colors, labels = [], ["_"] * len(names)
    for layer in range(layers):
        colors += [*colormaps[FAMILIES[layer % len(FAMILIES)]](np.linspace(0.55, 1.0, heads))]
        labels[layer * heads + heads // 2] = f"heads of layer {layer + 1}"
    figure = base.InlineFigure(figsize=(9.6, 8.2), layout="constrained")
    axes = figure.subplots(len(HEADS), sharex=True)
    ends = []
    for ax, (score, ylabel) in zip(axes, HEADS.items(), strict=True):
        values_NxK = found[score].values.reshape(-1, len(names))
        best = _highest_last(values_NxK, NAMED_HEADS)
        ends.append(_lines(ax, found.checkpoint, values_NxK, names, colors, labels, best))
        if (name := f"{score}_uniform") in found:
            uniform = found[name].values[0]
            ax.axhline(uniform, color=base.INK, ls=":", label="uniform attention")
        base.dress(ax, ylabel)
    _finish_named(figure, axes, found.checkpoint.values, stages, ends)
    return figure


def composition_figure(found, baseline: float, *, stages: Sequence = ()) -> Figure:
    """Draws how the heads of the first layer compose with those of the second; the best are named.

    Args:
      found: see above, of a model of two layers or more.
      baseline: of `metrics.language_structure.random_composition`, a dashed line.
      stages: of `llc_jax.find_stages`; may be empty.
    """
    missing = [name for name in COMPOSITIONS if name not in found]
    if missing:
        raise ValueError(
            f"found has no {', '.join(missing)}, which needs two layers of heads: leave this figure"
            " out for a model of one layer."
        )
    names = [f"1:{early} → 2:{late}" for early in found.early_head.values
             for late in found.late_head.values]  # fmt: skip
    labels = ["a pair of heads", *["_"] * (len(names) - 1)]
    figure = base.InlineFigure(figsize=(9.6, 8.2), layout="constrained")
    axes = figure.subplots(len(COMPOSITIONS), sharex=True, sharey=True)
    ends = []
    for ax, kind in zip(axes, COMPOSITIONS, strict=True):
        values_NxK = found[kind].values.reshape(-1, len(names))
        best = _highest_last(values_NxK, NAMED_PAIRS)
        colors = ["0.7"] * len(names)
        for i, color in zip(best, base.CHAIN_COLORS, strict=False):
            colors[i] = color
        ends.append(_lines(ax, found.checkpoint, values_NxK, names, colors, labels, best))
        ax.axhline(baseline, color=base.INK, ls="--", label="unrelated heads", zorder=4)
        base.dress(ax, f"{kind[0].upper()}-composition\n(ratio of norms)")
    _finish_named(figure, axes, found.checkpoint.values, stages, ends)
    return figure


def embedding_figure(found, *, stages: Sequence = ()) -> Figure:
    """Draws principal components and norms of the position embedding, and the norm of all weights.

    Args:
      found: see above.
      stages: of `llc_jax.find_stages`; may be empty.
    """
    steps = found.checkpoint.values
    figure = base.InlineFigure(figsize=(9.6, 12.4), layout="constrained")
    top, bottom = figure.subfigures(2, height_ratios=(1.2, 1))
    axes = top.subplots(3, sharex=True)
    for i, color in enumerate(base.shades(found.sizes["component"])[::-1]):
        share = found.position_explained.values[:, i]
        _plot(axes[0], steps, share, color=color, label=f"component {i + 1}")
    base.dress(axes[0], "position embedding:\nshare of variance").set_ylim(0, 1.03)
    tokens = _selected(found.sizes["position"])
    for token, color in zip(tokens, base.shades(tokens.size)[::-1], strict=True):
        norm = found.position_norm.values[:, token - 1]
        _plot(axes[1], steps, norm, color=color, label=f"position {token - 1}")
    base.dress(axes[1], "position embedding:\nEuclidean norm").set_ylim(bottom=0)
    _plot(axes[2], steps, found.weight_norm, color=base.INK, label="all weights")
    base.dress(axes[2], "Euclidean norm")
    finish(top, axes, steps, stages)
    shown = spread(steps, PLANES)
    rows = -(-len(shown) // 3)
    planes = bottom.subplots(rows, min(3, len(shown)), squeeze=False).ravel()
    for ax in planes[len(shown) :]:
        ax.remove()
    for ax, row in zip(planes, shown, strict=False):
        one = found.isel(checkpoint=row)
        points = ax.scatter(
            *one.position_coordinates.values[:, :2].T, c=np.arange(one.sizes["position"]), s=9
        )
        ax.set_title(f"positions at step {steps[row]:,}", size=10)
        ax.set_aspect("equal", adjustable="datalim")
        shares = [f"component {i + 1} ({x:.0%})" for i, x in enumerate(one.position_explained[:2])]
        base.dress(ax, shares[1]).set_xlabel(shares[0])
    bottom.colorbar(points, ax=list(planes[: len(shown)]), label="position", aspect=30)
    return figure


def spread(steps: np.ndarray, count: int) -> list[int]:
    """Returns rows of at most `count` steps [N] that log(step + 1) spreads as evenly as it can.

    The first and the last are among them.
    """
    times = np.log1p(steps)
    goals = np.linspace(times[0], times[-1], count)
    return sorted({int(np.abs(times - goal).argmin()) for goal in goals})


def _selected(size: int) -> np.ndarray:
    """Returns some numbers from 1 to `size`, about evenly spaced on a logarithmic scale."""
    return np.unique(np.rint(np.geomspace(1, size, SELECTED)).astype(int))


def _plot(ax: Axes, steps, values, *, lw: float = 1.3, **look) -> None:
    """Draws a line over N steps, or a dot for one step, where a line has no length."""
    ax.plot(steps, values, marker="o" if np.size(steps) == 1 else "", ms=4, lw=lw, **look)


def _with_error(ax: Axes, found, name: str, color, label: str) -> None:
    """Draws a variable [N] as a line, and one standard error to each side of it."""
    values, errors = found[name].values, found[f"{name}_stderr"].values
    _plot(ax, found.checkpoint, values, color=color, label=label)
    ax.fill_between(
        found.checkpoint, values - errors, values + errors, color=color, alpha=0.2, lw=0
    )


def _lines(ax: Axes, steps, values_NxK, names, colors, labels, best) -> dict[str, tuple]:
    """Draws K lines, the `best` of them thick; returns name -> (last value, color) of these."""
    for i, (values, color, label) in enumerate(zip(values_NxK.T, colors, labels, strict=True)):
        look = {"lw": 2.0, "zorder": 3} if i in best else {"lw": 0.9, "zorder": 2}
        _plot(ax, steps, values, color=color, label=label, **look)
    return {names[i]: (_last(values_NxK[:, i]), colors[i]) for i in best}


def _last(values: np.ndarray) -> float:
    """Returns the last finite value, or nan."""
    return [np.nan, *values[np.isfinite(values)]][-1]


def _highest_last(values_NxK: np.ndarray, count: int) -> list[int]:
    """Returns which of K lines end highest, the highest first; none that is never finite."""
    ends = np.array([_last(values) for values in values_NxK.T])
    return [i for i in np.argsort(-ends, kind="stable")[:count] if np.isfinite(ends[i])]


def _finish_named(figure: Figure, axes, steps, stages: Sequence, ends: Iterable[dict]) -> None:
    """As `finish`, from 0 on, with names beside the ends of lines and the legend below."""
    base.log_step_axis(axes[-1], np.min(steps), np.max(steps))
    handles = {}
    for ax, named in zip(axes, ends, strict=True):
        ax.set_ylim(bottom=0)  # not before, since it ends the scaling to what is drawn
        base.stage_bands(ax, stages, labels=ax is axes[0])
        _name_ends(ax, named)
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.align_ylabels(axes)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False
    )


def _name_ends(ax: Axes, named: Mapping[str, tuple]) -> None:
    """Writes each name beside the end of its line, moved apart where they would overlap."""
    low, high = ax.get_ylim()
    rising = sorted(named.items(), key=lambda item: item[1][0])
    heights = [(value - low) / (high - low) for _, (value, _) in rising]
    # Up from the one below, but never so far that those above leave the panel.
    steps = 0.1 * np.arange(len(rising))
    places = np.maximum.accumulate(heights - steps) + steps
    places = np.minimum(places, 1.0 - steps[::-1])
    for place, (name, (_, color)) in zip(places, rising, strict=True):
        ax.text(1.01, place, name, transform=ax.transAxes, color=color, size=9, va="center")
