"""Metrics of a problem over training, under the stages of the LLC."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from llc_jax.figures import base


def metrics_figure(found, *, stages: Sequence = ()) -> Figure:
    """Draws a panel for each metric, a line for each of its parts, dark for late ones.

    Args:
      found: `xarray.Dataset` of variables [checkpoint] or [checkpoint, part].
      stages: of `llc_jax.find_stages`; may be empty.
    """
    names = list(found.data_vars)
    figure = base.InlineFigure(figsize=(9.6, 0.8 + 2.4 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), sharex=True, squeeze=False)[:, 0]
    steps = found.checkpoint.values
    for ax, name in zip(axes, names, strict=True):
        title = str(name).replace("_", " ")
        parts = found[name].values.reshape(steps.size, -1)
        count = parts.shape[1]
        colors = [base.INK] if count == 1 else base.shades(count)
        for k, (values, color) in enumerate(zip(parts.T, colors, strict=True), 1):
            shown = count == 1 or k in (1, count // 2 + 1, count)
            label = (title if count == 1 else f"part {k}") if shown else "_"
            ax.plot(steps, values, "o-", ms=2.5, lw=1.2, color=color, label=label)
        base.dress(ax, title)
    base.finish(figure, axes, steps, stages)
    return figure
