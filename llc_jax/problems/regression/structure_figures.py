"""How the regression transformer is built, over training, under the stages of the LLC."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from llc_jax.figures import base
from llc_jax.figures.base import finish

ATTENTION = {
    "entropy": "entropy / log(k + 1)",
    "variability": "variability",
    "distance": "distance looked back / k",
    "hardness": "share of tokens not looked at",
    "to_self": "attention to itself",
    "to_previous": "attention to previous token",
    "to_x_tokens": "attention to x-tokens",
}


def structure_figure(found, *, stages: Sequence = ()) -> Figure:
    """Draws weight norm, collapse of layer norms and embeddings, and the unembedding.

    Args:
      found: `xarray.Dataset` of `metrics.datasets.dataset` with a leading dimension checkpoint.
      stages: of `llc_jax.find_stages`; may be empty.
    """
    figure = base.InlineFigure(figsize=(9.6, 13), layout="constrained")
    axes = figure.subplots(6, sharex=True)
    steps = found.checkpoint.values
    axes[0].plot(steps, found.weight_norm, color=base.INK, lw=1.5, label="all weights")
    axes[0].set_ylabel("weight norm")
    for i, color in enumerate(base.shades(found.sizes["norm"])):
        label = _plain(found.norm.values[i])
        axes[1].plot(steps, found.norm_small[:, i], color=color, lw=1.3, label=label)
    axes[1].set(ylabel="layer norms: share\nof |scale| < 0.1", ylim=(-0.03, 1.03))
    for ax, name, title in (
        (axes[2], "token", "token embedding:\nshare of variance"),
        (axes[3], "position", "position embedding:\nshare of variance"),
    ):
        squares = found[f"{name}_singular_values"].values ** 2
        share = squares / squares.sum(axis=1, keepdims=True)
        for i, color in enumerate(base.shades(share.shape[1])):
            label = f"singular value {i + 1}" if i in (0, share.shape[1] - 1) else "_"
            ax.plot(steps, share[:, i], color=color, lw=1.1, label=label)
        ax.set_ylabel(title)
    for i, color in enumerate(base.shades(found.sizes["column"])):
        label = "y" if i == 0 else f"x, component {i}"
        axes[4].plot(steps, found.embedding_overlap[:, i], color=color, lw=1.1, label=label)
    axes[4].set(ylabel="token embedding:\nshare of length in span\nof positions", ylim=(0, 1.03))
    weights = np.abs(found.unembed_weight.values)
    for quantile, color in ((0.5, base.SKY), (0.9, base.BLUE), (1.0, base.INK)):
        label = "largest" if quantile == 1 else f"{quantile:.0%} quantile"
        axes[5].plot(
            steps, np.quantile(weights, quantile, axis=1), color=color, lw=1.3, label=label
        )
    axes[5].plot(steps, np.abs(found.unembed_bias), color=base.ORANGE, lw=1.3, label="|bias|")
    axes[5].set(ylabel="unembedding:\n|effective weight|", yscale="log")
    for ax in axes:
        base.dress(ax)
    finish(figure, axes, steps, stages)
    return figure


def attention_figure(found, statistic: str, *, stages: Sequence = ()) -> Figure:
    """Draws one statistic of every head, from x-tokens and from y-tokens, dark for late ones.

    Args:
      found: as in `structure_figure`.
      statistic: a key of `ATTENTION`.
      stages: of `llc_jax.find_stages`; may be empty.
    """
    values = found[f"attention_{statistic}"].values
    layers, heads, length = values.shape[1:]
    shades = base.shades(length)
    figure = base.InlineFigure(figsize=(9.6, 1.5 * layers * heads + 1), layout="constrained")
    axes = figure.subplots(layers * heads, 2, sharex=True, sharey=True, squeeze=False)
    steps = found.checkpoint.values
    for row in range(layers * heads):
        layer, head = divmod(row, heads)
        axes[row, 0].set_ylabel(f"block {layer + 1}\nhead {head + 1}")
        for start, ax in enumerate(axes[row]):
            for i in range(start, length, 2):
                ax.plot(steps, values[:, layer, head, i], color=shades[i], lw=0.9)
            base.dress(ax)
    for ax, kind in zip(axes[0], ("x", "y"), strict=True):
        ax.set_title(f"from {kind}-tokens, light to dark: first to last", size=10)
    base.log_step_axis(axes[-1, 0], np.min(steps), np.max(steps))
    base.log_step_axis(axes[-1, 1], np.min(steps), np.max(steps))
    for ax in axes.flat:
        base.stage_bands(ax, stages, labels=False)
    figure.suptitle(f"Attention: {ATTENTION[statistic]}")
    return figure


def norms_figure(found, *, stages: Sequence = ()) -> Figure:
    """Draws every scale and bias of every layer norm, and the effective unembedding.

    Args:
      found: as in `structure_figure`.
      stages: of `llc_jax.find_stages`; may be empty.
    """
    columns = [
        (_plain(name), found.norm_scale.values[:, i], found.norm_bias.values[:, i])
        for i, name in enumerate(found.norm.values)
    ]
    figure = base.InlineFigure(figsize=(2.6 * (len(columns) + 1), 5.2), layout="constrained")
    axes = figure.subplots(2, len(columns) + 1, sharex=True)
    steps = found.checkpoint.values
    columns.append(("unembedding", found.unembed_weight.values, found.unembed_bias.values[:, None]))
    for (top, bottom), (name, above, below) in zip(axes.T, columns, strict=True):
        top.set_title(name, size=10)
        for ax, values in ((top, above), (bottom, below)):
            ax.plot(steps, values, color=base.BLUE, lw=0.5, alpha=0.5)
            ax.axhline(0.0, color="0.5", lw=0.8)
            base.dress(ax)
            base.log_step_axis(ax, np.min(steps), np.max(steps))
            base.stage_bands(ax, stages, labels=False)
            ax.set_xlabel("")
    axes[0, 0].set_ylabel("scale (last column: weight)")
    axes[1, 0].set_ylabel("bias")
    figure.supxlabel("training step (log(step + 1) scale)", size=10)
    return figure


def _plain(name: str) -> str:
    """`block_0/mlp_norm` as a reader would say it."""
    block, _, kind = str(name).rpartition("/")
    if not block:
        return "last norm"
    return f"block {int(block.split('_')[1]) + 1}, {kind.removesuffix('_norm')}"
