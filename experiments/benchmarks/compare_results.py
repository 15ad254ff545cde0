"""What `compare_devinterp` makes of the traces and seconds: estimates, errors, costs, tables.

Cost of a relative standard error τ, for a program whose C chains of D draws after B steps of
burn-in gave the standard error s, at f seconds of start-up and t seconds per chain-step:

    D' = D (s / (τ λ̂))²,   gradients = C (B + D'),   seconds = f + t C (B + D').

λ̂ is the same for all programs of a problem: the mean of the two that run the same chain. s is
sqrt(pooled variance / ESS) for all; for devinterp the error of the initial loss joins in, as if
it shrank along with the rest at no cost, though a run of any length has 32 batches of it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.benchmarks import timing
from llc_jax import diagnostics

OURS, THEIRS, OTHER = "llc_jax SGLD", "devinterp SGLD", "llc_jax BAOAB"
INIT_BATCHES = 32  # devinterp's default


class Shape(NamedTuple):
    """Lengths of a run.

    Attributes:
      num_chains: C.
      num_draws: D, after burn-in.
      num_burnin: B.
    """

    num_chains: int
    num_draws: int
    num_burnin: int

    @property
    def gradients(self) -> int:
        """Of a whole run."""
        return self.num_chains * (self.num_burnin + self.num_draws)


class Measured(NamedTuple):
    """What the rounds of one program gave.

    Attributes:
      gaps: [round, chain, draw] nbeta (loss - initial loss) after burn-in.
      init_stderr: of the initial loss times nbeta, in one round; 0 where draws are paired.
      long: [round, 2] seconds of a run, by the clock and of the processor.
      short: [round, 2] seconds of a run of the shape `short_shape`.
      first: seconds of the first run, compilation included; nan if nothing is compiled.
      memory: bytes of peak resident memory above that after the imports, all runs.
      memory_warm: the same without the first runs.
    """

    gaps: np.ndarray
    init_stderr: float
    long: np.ndarray
    short: np.ndarray
    first: float
    memory: float
    memory_warm: float


def init_stderr(nbeta: float, deviation: float, batch_size: int, n: int, chains: int) -> float:
    """Standard error of nbeta times devinterp's initial loss, with independent batches per chain.

    Args:
      nbeta: n times inverse temperature.
      deviation: standard deviation of the examples' losses at the anchor.
      batch_size: examples per batch, drawn without replacement.
      n: examples in all.
      chains: each takes `INIT_BATCHES` batches of its own.
    """
    share = min(1.0, INIT_BATCHES * batch_size / n)
    return nbeta * deviation * math.sqrt((1 - share) / (INIT_BATCHES * batch_size * chains))


def cost(
    target: float, llc: float, stderr: float, shape: Shape, fixed: float, per_step: float
) -> tuple[float, float]:
    """(gradients, seconds) to a relative standard error `target`; see the module."""
    draws = shape.num_draws * (stderr / (target * llc)) ** 2
    gradients = shape.num_chains * (shape.num_burnin + draws)
    return gradients, fixed + per_step * gradients


def summary(
    measured: Mapping[str, Measured],
    shape: Shape,
    short_shape: Shape,
    exact: float | None,
    targets: Sequence[float],
) -> list[dict[str, Any]]:
    """One row per program: estimate, error, costs."""
    rows = {}
    for name, m in measured.items():
        gaps = m.gaps.reshape(-1, m.gaps.shape[-1])
        per_step = (m.long - m.short) / (shape.gradients - short_shape.gradients)
        fixed = np.maximum(m.short - short_shape.gradients * per_step, 0)
        rounds = len(m.gaps)
        rows[name] = {
            "program": name,
            "llc": float(gaps.mean()),
            "stderr": math.hypot(diagnostics.mean_stderr(gaps), m.init_stderr / math.sqrt(rounds)),
            "stderr_of_spread": float(gaps.mean(axis=1).std(ddof=1)) / math.sqrt(len(gaps)),
            "init_stderr": m.init_stderr / math.sqrt(rounds),
            "rhat": diagnostics.split_rhat(gaps),
            "ess_per_draw": diagnostics.effective_sample_size(gaps) / gaps.size,
            "ms_per_chain_step": 1e3 * float(np.median(per_step[:, 0])),
            "cpu_ms_per_chain_step": 1e3 * float(np.median(per_step[:, 1])),
            "fixed_seconds": float(np.median(fixed[:, 0])),
            "compile_seconds": m.first - float(np.median(m.long[:, 0])),
            "peak_mib": m.memory / 2**20,
            "peak_mib_warm": m.memory_warm / 2**20,
        }
    llc = float(np.mean([rows[name]["llc"] for name in (OURS, THEIRS)]))
    rounds = len(measured[OURS].gaps)
    for name, row in rows.items():
        row["z"] = math.nan
        if name != OTHER:
            row["z"] = (rows[OURS]["llc"] - rows[THEIRS]["llc"]) / math.hypot(
                rows[OURS]["stderr"], rows[THEIRS]["stderr"]
            )
        row["z_exact"] = math.nan
        if exact is not None and name != OTHER:
            row["z_exact"] = (row["llc"] - exact) / row["stderr"]
        for target in targets:
            gradients, seconds = cost(
                target, llc, row["stderr"] * math.sqrt(rounds), shape,
                row["fixed_seconds"], row["ms_per_chain_step"] / 1e3,
            )  # fmt: skip
            row[f"gradients_to_{target:g}"] = gradients
            row[f"seconds_to_{target:g}"] = seconds
    return list(rows.values())


def step_ratio(measured: Mapping[str, Measured], column: int = 0) -> str:
    """Time of devinterp's chain-step over that of ours, by round; column 1: processor time."""
    return timing.ratio(
        *[(measured[name].long - measured[name].short)[:, column] for name in (THEIRS, OURS)]
    )[1]


COLUMNS = {
    "problem": "problem",
    "program": "program",
    "λ̂ ± s.e.": lambda r: f"{r['llc']:.4g} ± {r['stderr']:.2g}",
    "s.e. from spread": lambda r: f"{r['stderr_of_spread']:.2g}",
    "z": lambda r: number(r["z"], ".1f"),
    "z to exact": lambda r: number(r["z_exact"], ".1f"),
    "ESS per draw": lambda r: f"{r['ess_per_draw']:.3f}",
    "ms per chain-step": lambda r: f"{r['ms_per_chain_step']:.3g}",
    "of processor": lambda r: f"{r['cpu_ms_per_chain_step']:.3g}",
    "start-up s": lambda r: f"{r['fixed_seconds']:.2g}",
    "compile s": lambda r: number(r["compile_seconds"], ".1f"),
    "peak MiB": lambda r: f"{r['peak_mib']:.0f}",
    "peak MiB, warm": lambda r: f"{r['peak_mib_warm']:.0f}",
}


def number(value: float, spec: str) -> str:
    """A number, or a dash for nan."""
    return "–" if math.isnan(value) else format(value, spec)


def table(rows: Sequence[Mapping[str, Any]], targets: Sequence[float]) -> str:
    """Rows of `summary`, with a field "problem", as a Markdown table."""
    columns = dict(COLUMNS)
    for target in targets:
        for what, spec in (("seconds", ".3g"), ("gradients", ".0f")):
            key = f"{what}_to_{target:g}"
            columns[f"{what} to {target:.0%}"] = lambda r, k=key, f=spec: format(r[k], f)
    cells = [list(columns)]
    for row in rows:
        cells.append([row[c] if isinstance(c, str) else c(row) for c in columns.values()])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
