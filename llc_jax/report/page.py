"""One self-contained HTML page, and a CSV table, about the LLC of one training run.

The page needs no network and runs no script; every text on it is escaped, so a run directory from
a stranger is safe to open. Figures are built once, by `render_figures`, for the page and for PNG
files alike.
"""

import base64
import html
import math
import pathlib
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from llc_jax.figures import base as draw
from llc_jax.figures import chains, llc
from llc_jax.report import text as words
from llc_jax.storage.results import parts_of


def render_figures(sweep, **training) -> dict[str, Figure]:
    """Builds the figures of the page.

    Args:
      sweep: see `render`.
      **training: as in `figures.overview_figure`: losses, baselines, curve, stages.

    Returns:
      name -> Figure, names good as file names.
    """
    return {
        "overview": llc.overview_figure(sweep, **training),
        "traces": chains.chain_traces_figure(sweep),
    }


def render(
    *,
    title: str,
    sweep,
    stages: Sequence,
    figures: Mapping[str, Figure],
    configs: Mapping[str, Mapping[str, Any]],
    versions: Mapping[str, str],
    hashes: Mapping[str, str],
    command: str,
    extra_sections: Iterable[tuple] = (),
) -> str:
    """Renders the page.

    Args:
      title: of the page.
      sweep: `xarray.Dataset`: `LLCEstimate.to_xarray` of every checkpoint, concatenated along a
        leading dimension `checkpoint` whose coordinate is the training step.
      stages: of `llc_jax.find_stages`; may be empty.
      figures: of `render_figures`.
      configs: part of the run -> {name: value}, every setting.
      versions: package -> version.
      hashes: file or data set -> hash.
      command: shell line or lines that reproduce the run.
      extra_sections: (heading, content, ...) where each content is a Figure, a text, or a relative
        path, which becomes a link.

    Returns:
      HTML, for `files.write_atomic`.
    """
    first, *rest = figures
    settings = [("sampling", sweep.attrs), *configs.items()]
    settings += [("versions", versions), ("hashes", hashes)]
    relative_to = {"nbeta": "?", "localization": "?"} | sweep.attrs
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="answer">{_text(answer(sweep, stages))}</p>',
        _figure(first, figures[first]),
        "<h2>Stages</h2>",
        _stages_table(stages, sweep),
        *[
            f"<h2>{_text(words.HEADINGS.get(name, name))}</h2>{_figure(name, figures[name])}"
            for name in rest
        ],
        "<h2>Checkpoints</h2>",
        _checkpoints_table(sweep),
        "<h2>Warnings</h2>",
        _warnings(sweep),
        *[_section(heading, contents) for heading, *contents in extra_sections],
        "<h2>How to read this page</h2>",
        _list(line.format(**relative_to) for line in words.HOW_TO_READ),
        "<h2>How to reproduce it</h2>",
        f"<pre>{_text(command)}</pre>",
        "<h2>Settings</h2>",
        *[f"<h3>{_text(name)}</h3>{_pairs(values)}" for name, values in settings],
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{words.STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def results_csv(sweep) -> str:
    """Returns one line per checkpoint: what has one value there. Floats keep all digits.

    Args:
      sweep: see `render`.

    Returns:
      CSV with the columns of `LLCEstimate.to_xarray` that have one value per checkpoint and, over
      the finite chains, empty without one: distance, the mean over draws of the Euclidean distance
      from the checkpoint; stability, the largest; acceptance, the mean. λ̂ of part k of the loss,
      counted from 0 if `sweep` names no `part`, is llc_part_k, its error llc_part_k_stderr.
    """
    frame = _frame(sweep)
    one_line = frame.assign(warnings=frame.warnings.str.replace("\n", " "))
    return one_line.to_csv(lineterminator="\n")


def answer(sweep, stages: Sequence) -> str:
    """Says in plain words how many stages there are, where, and how far to trust them."""
    steps = sweep.checkpoint.values
    where = f"step {steps[0]:,}" if steps.size == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
    count = _count(steps.size, "checkpoint")
    parts = [f"λ̂ was estimated at {count} ({where})."]
    moves = [
        f"from step {stage.start:,} to {stage.end:,} it "
        + ("stays level within its error" if stage.kind == "flat" else f"{stage.kind}s")
        + f" ({_change(stage)})"
        for stage in stages
    ]
    cut = f"Its curve has {_count(len(moves), 'stage')}: {'; '.join(moves)}."
    parts.append(cut if moves else words.NO_STAGES)
    lost = np.count_nonzero(sweep.num_finite.values == 0)
    if lost:
        parts.append(f"At {_count(lost, 'checkpoint')} every chain diverged.")
    warned = sum(bool(text) for text in sweep.warnings.values)
    have = "has a warning" if warned == 1 else "have warnings"
    advice = f"{warned} of {count} {have} (see below): read before relying on the curve there."
    parts.append(advice if warned else "No checkpoint has a warning.")
    return " ".join(parts)


def _stages_table(stages: Sequence, sweep) -> str:
    if not stages:
        return f"<p>{words.NO_STAGES}</p>"
    header = ["stage", "from step", "to step", "Δloss", "Δλ̂ ± s.e.", "boundary at its end", "kind"]
    rows = []
    for i, s in enumerate(stages):
        low, high = s.end_interval
        sure = "> 99.9 %" if s.confidence >= 0.9995 else f"{100 * s.confidence:.1f} %"
        known = math.isfinite(s.confidence)
        boundary = f"{sure}, within {low:,} to {high:,}" if known else "end of training"
        loss = f"{_loss_change(sweep, s):+.4f}".replace("-", draw.MINUS)
        loss = loss.replace("+nan", "–")
        span = [f"{s.start:,}", f"{s.end:,}"]
        rows.append([f"{i + 1}", *span, loss, _change(s), boundary, s.kind])
    return _table(header, rows, [False] * len(rows)) + f"<p>{words.STAGES}</p>"


def _loss_change(sweep, stage) -> float:
    """Change of the init loss over a stage, linear in log(step + 1) between checkpoints.

    nan where an end of the stage lies beyond the checkpoints of known loss.
    """
    steps, losses = np.log1p(sweep.checkpoint.values), sweep.init_loss.values
    known = np.isfinite(losses)
    ends = np.log1p([stage.start, stage.end])
    start, end = np.interp(ends, steps[known], losses[known], left=np.nan, right=np.nan)
    return end - start


def _checkpoints_table(sweep) -> str:
    header = ["step", "loss", "λ̂", "s.e.", "R-hat", "ESS", "acceptance", "chains", "verdict"]
    frame = _frame(sweep)
    rows = [
        [
            f"{row.Index:,}", f"{row.init_loss:.4f}", *draw.rounded(row.llc, row.stderr),
            f"{row.rhat:.3f}", f"{row.ess:,.0f}", f"{row.acceptance:.2f}",
            f"{row.num_finite} of {sweep.sizes['chain']}", row.verdict,
        ]
        for row in frame.itertuples()
    ]  # fmt: skip
    rows = [["–" if cell == "nan" else cell for cell in row] for row in rows]
    return _table(header, rows, frame.verdict != "ok")


def _warnings(sweep) -> str:
    """Returns the warnings grouped by kind: the steps, one example, and all of them folded."""
    groups: dict[str, list[tuple[int, str]]] = {}
    frame = _frame(sweep)
    for step, verdict, warnings in zip(frame.index, frame.verdict, frame.warnings, strict=True):
        sentences = [sentence for sentence in warnings.split("\n") if sentence]
        labels = verdict.split("; ")
        if len(labels) != len(sentences):
            labels = [verdict] * len(sentences)
        for label, sentence in zip(labels, sentences, strict=True):
            # "1 of 4 chains diverged" and "2 of 4 chains diverged" are one kind.
            kind = re.sub(r"^\d+ of \d+ ", "", label)
            groups.setdefault(kind, []).append((step, sentence))
    if not groups:
        return "<p>None: every checkpoint passed all checks.</p>"
    blocks = []
    for kind, found in groups.items():
        full = [f"Step {step:,}: {sentence}" for step, sentence in found]
        steps = dict.fromkeys(f"{step:,}" for step, _ in found)
        where = ("step " if len(steps) == 1 else "steps ") + ", ".join(list(steps)[:12])
        where += f" and {len(steps) - 12} more" if len(steps) > 12 else ""
        blocks.append(f"<h3>{_text(kind[:1].upper() + kind[1:])}: {where}</h3>")
        blocks.append(f"<p>{_text(full[0])}</p>")
        if len(full) > 1:
            blocks.append(f"<details><summary>all {len(full)}</summary>{_list(full)}</details>")
    return "\n".join(blocks)


def _section(heading: str, contents: Sequence[Figure | str | pathlib.PurePath]) -> str:
    blocks = [f"<h2>{_text(heading)}</h2>"]
    for content in contents:
        if isinstance(content, Figure):
            blocks.append(_figure(heading, content))
        elif isinstance(content, pathlib.PurePath):
            place = urllib.parse.quote(content.as_posix())
            blocks.append(f'<p><a href="{place}">{_text(content.as_posix())}</a></p>')
        else:
            blocks.append(f"<p>{_text(content)}</p>")
    return "\n".join(blocks)


def _figure(name: str, figure: Figure) -> str:
    data = base64.b64encode(draw.png(figure)).decode("ascii")
    caption = (
        f"<figcaption>{_text(words.CAPTIONS[name])}</figcaption>" if name in words.CAPTIONS else ""
    )
    image = f'<img alt="{_text(name)}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}{caption}</figure>"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], bad: Iterable[bool]) -> str:
    """Returns a table that scrolls by itself; rows that are `bad` stand out."""
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    lines = []
    for row, mark in zip(rows, bad, strict=True):
        cells = "".join(f"<td>{_text(cell)}</td>" for cell in row)
        lines.append(f'<tr class="{"bad" if mark else "good"}">{cells}</tr>\n')
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n{"".join(lines)}</table></div>'
    )


def _pairs(values: Mapping[str, Any]) -> str:
    rows = [f"<tr><td>{_text(k)}</td><td>{_text(v)}</td></tr>" for k, v in values.items()]
    return f'<table class="pairs">{"".join(rows)}</table>' if rows else "<p>none</p>"


def _list(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{_text(item)}</li>" for item in items) + "</ul>"


def _text(value: Any) -> str:
    """Returns any value as text that HTML cannot mistake for markup and UTF-8 can hold."""
    return html.escape(str(value).encode(errors="backslashreplace").decode())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _change(stage) -> str:
    value, stderr = draw.rounded(stage.delta, stage.delta_stderr)
    sign = "" if value.startswith(draw.MINUS) else "+"
    return f"{sign}{value}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{stderr}"


def _frame(sweep):
    """Returns a pandas table, indexed by step, of all that has one value per checkpoint."""
    names = [name for name, v in sweep.data_vars.items() if v.dims == ("checkpoint",)]
    finite = sweep[["distance", "stability", "acceptance"]].where(sweep.diverged_at < 0)
    scalars = sweep[names].assign(
        distance=finite.distance.mean(("chain", "draw"), dtype=np.float64),
        stability=finite.stability.max("chain"),
        acceptance=finite.acceptance.mean("chain"),
    )
    if parts := parts_of(sweep):
        for k, name in enumerate(sweep["part"].values):
            value, stderr = (x.isel(part=k, drop=True) for x in parts)
            scalars[f"llc_part_{name}"] = value
            scalars[f"llc_part_{name}_stderr"] = stderr
    frame = scalars.reset_coords(drop=True).to_dataframe().rename_axis("step")
    texts = ["verdict", "warnings"]
    return frame[[*frame.columns.drop(texts), *texts]]
