"""What the estimates of `benchmark_dln` say: errors against the exact values, a table, a figure."""

from typing import Any

import numpy as np


def order_preserved(true: np.ndarray, found: np.ndarray) -> float:
    """Share of the pairs with different true values whose estimates are in the same order."""
    upper = np.triu_indices(len(true), 1)
    true_sign = np.sign(true[:, None] - true[None])[upper]
    found_sign = np.sign(found[:, None] - found[None])[upper]
    different = true_sign != 0
    right = true_sign[different] == found_sign[different]
    return float(right.mean()) if right.size else np.nan


def summary(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per sampler: errors against the reference, and the work.

    The reference is the local coefficient where it is known, else Aoyagi's, a lower bound of it;
    the columns `..._to_aoyagi` take the latter for all.
    """
    rows = []
    for name in dict.fromkeys(r["sampler"] for r in records):
        mine = [r for r in records if r["sampler"] == name]
        # Rank 0 and λ = 0 do not occur: widths are at least 5.
        true = np.array([r["aoyagi"] if r["exact"] is None else r["exact"] for r in mine])
        found, error = (np.array([r[k] for r in mine], float) for k in ("llc", "stderr"))
        finite = np.isfinite(found)
        relative = (found - true)[finite] / true[finite]
        aoyagi = np.array([r["aoyagi"] for r in mine], float)[finite]
        to_aoyagi = np.abs(found[finite] / aoyagi - 1)
        settings = np.array([r["finite"] for r in mine], float)[finite] / true[finite] - 1
        rows.append({
            "sampler": name,
            "networks": len(mine),
            "failed": int((~finite).sum()),
            "median_relative_error": float(np.median(np.abs(relative))),
            "p95_relative_error": float(np.quantile(np.abs(relative), 0.95)),
            "mean_relative_bias": float(relative.mean()),
            "median_error_to_aoyagi": float(np.median(to_aoyagi)),
            "p95_error_to_aoyagi": float(np.quantile(to_aoyagi, 0.95)),
            "median_error_of_settings": float(np.median(np.abs(settings))),
            "median_error_of_sampler": float(np.median(np.abs(relative - settings))),
            "p95_error_of_sampler": float(np.quantile(np.abs(relative - settings), 0.95)),
            "order_preserved": order_preserved(true[finite], found[finite]),
            "median_relative_stderr": float(np.median(error[finite] / found[finite])),
            "share_without_warning": float(np.mean([r["verdict"] == "ok" for r in mine])),
            "median_gradients": float(np.median([r["gradients"] for r in mine])),
            "median_gradients_of_calibration": float(
                np.median([r["gradients_of_calibration"] for r in mine])),
            "median_seconds": float(np.median([r["seconds"] for r in mine])),
            "median_seconds_of_calibration": float(
                np.median([r["seconds_of_calibration"] for r in mine])),
        })  # fmt: skip
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """The summary as a Markdown table."""
    head = ["sampler", "networks", "median error", "95th percentile", "mean bias",
            "against Aoyagi's: median, 95th percentile", "by finite nβ, γ: median",
            "by the sampler: median, 95th percentile", "order kept",
            "gradients (calibration + estimate)", "seconds, compiling included"]  # fmt: skip

    def share(*values: float) -> str:  # not known for the published networks
        return "–" if np.isnan(values).any() else ", ".join(f"{v:.1%}" for v in values)

    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = [
            r["sampler"], str(r["networks"]) + (f" ({r['failed']} failed)" if r["failed"] else ""),
            f"{r['median_relative_error']:.1%}", f"{r['p95_relative_error']:.1%}",
            f"{r['mean_relative_bias']:+.1%}",
            f"{r['median_error_to_aoyagi']:.1%}, {r['p95_error_to_aoyagi']:.1%}",
            share(r["median_error_of_settings"]),
            share(r["median_error_of_sampler"], r["p95_error_of_sampler"]),
            f"{r['order_preserved']:.3f}",
            f"{r['median_gradients_of_calibration']:.2g} + {r['median_gradients']:.2g}",
            f"{r['median_seconds_of_calibration']:.0f} + {r['median_seconds']:.0f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def figure(records: list[dict[str, Any]], title: str):
    """Estimated against true coefficient, and the relative error, a colour per sampler."""
    from llc_jax.figures.base import (
        CHAIN_COLORS,
        INK,
        LLC,
        VERMILLION,
        InlineFigure,
        log_number_axis,
    )

    fig = InlineFigure(figsize=(10, 4.2), layout="constrained")
    left, right = fig.subplots(1, 2)
    colors = [*CHAIN_COLORS, VERMILLION, INK]
    for i, name in enumerate(dict.fromkeys(r["sampler"] for r in records)):
        mine = [r for r in records if r["sampler"] == name]
        true = np.array([r["aoyagi"] if r["exact"] is None else r["exact"] for r in mine])
        found, error = (np.array([r[k] for r in mine], float) for k in ("llc", "stderr"))
        style = {
            "fmt": "o",
            "ms": 4,
            "color": colors[i % len(colors)],
            "elinewidth": 1,
            "alpha": 0.8,
        }
        left.errorbar(true, found, error, label=name, **style)
        right.errorbar(true, 100 * (found / true - 1), 100 * error / true, **style)
        aoyagi = np.array([r["aoyagi"] for r in mine], float)
        if (other := aoyagi != true).any():
            hollow = {"fmt": "o", "ms": 7, "mfc": "none", "color": style["color"]}
            at, value = aoyagi[other], found[other]
            left.errorbar(at, value, label=f"{name}, against Aoyagi's λ", **hollow)
            right.errorbar(at, 100 * (value / at - 1), **hollow)
    known = [r[k] for r in records for k in ("aoyagi", "exact") if r[k] is not None]
    span = [min(known), max(known)]
    left.plot(span, span, color=INK, lw=1, label="exact")
    left.set(xscale="log", yscale="log", xlabel="local λ", ylabel=f"estimated {LLC} ± 1 s.e.")
    left.legend(fontsize=8)
    right.axhline(0, color=INK, lw=1)
    right.axhspan(-5, 5, color=INK, alpha=0.1, lw=0, label="± 5 %")
    right.set(xscale="log", xlabel="local λ", ylabel="relative error, %")
    right.legend(fontsize=8)
    for axis in (left.xaxis, left.yaxis, right.xaxis):
        log_number_axis(axis, 1, 2, 5)
    fig.suptitle(title)
    return fig
