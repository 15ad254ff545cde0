"""A self-contained HTML page of texts whose tokens are coloured by how their prediction changed.

As in the report, no script runs and every text is escaped. A space is shown as a faint dot, a new
line as ↵ with the line broken after it, and other characters without a picture by their number.
"""

import html
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from llc_jax.report.text import STYLE

MINUS = "\N{MINUS SIGN}"
# Ends of the scale, red and blue, light enough for the page's dark text to be read on them.
WORSE, BETTER, WHITE = np.array([255, 150, 130]), np.array([130, 185, 245]), np.full(3, 255)
# A token that changes the direction of writing changes that of no other.
LOOK = """
span { unicode-bidi: isolate; padding: 0.1em 0; }
span.none { background: #eee; }
i { opacity: 0.45; font-style: normal; }
p.text { line-height: 1.9; }
"""


def heatmap_html(
    texts: Sequence[Sequence[str]],
    changes: ArrayLike,
    *,
    limit: float | None = None,
    title: str = "",
) -> str:
    """Colours each token by the change of its log-probability between two checkpoints.

    Source: the text heat-maps of Hoogland et al. 2024, arXiv 2402.02364.

    Args:
      texts: tokens of each sequence as text, [T][L], the first without a prediction.
      changes: log p at the later checkpoint minus at the earlier one, in nats, [T, L - 1], of all
        tokens but the first; differences of `text_log_probs` of `metrics.language.Behavior`. One
        that is not a number is grey, like the first token.
      limit: change in nats with the deepest colour, above 0; larger ones look the same. By default
        98 % of all are smaller, so that a few tokens do not set the scale.
      title: heading of the page.

    Returns:
      HTML, for `files.write_atomic`.
    """
    changes_TxM = np.asarray(changes, np.float64)
    shapes = [len(tokens) - 1 for tokens in texts]
    if changes_TxM.ndim != 2 or shapes != [changes_TxM.shape[1]] * len(changes_TxM):
        raise ValueError(
            f"changes of shape {changes_TxM.shape} for texts of {[n + 1 for n in shapes]} tokens:"
            " give one change for each token but the first of each text, [T, L - 1]."
        )
    if limit is None:
        sizes = np.abs(changes_TxM[np.isfinite(changes_TxM)])
        limit = float(np.quantile(sizes, 0.98)) if sizes.size else 0.0
        limit = limit or 1.0
    elif not (np.isfinite(limit) and limit > 0):
        raise ValueError(f"limit={limit!r}: give a finite change in nats above 0, or None.")
    heading = html.escape(title or "Change of log p of each token")
    heading = heading.encode(errors="backslashreplace").decode()  # UTF-8 holds no lone surrogates
    body = [
        f"<h1>{heading}</h1>",
        _legend(limit),
        *[
            f'<h2>Text {i}</h2>\n<p class="text">{_spans(tokens, changes_M, limit)}</p>'
            for i, (tokens, changes_M) in enumerate(zip(texts, changes_TxM, strict=True), 1)
        ],
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{heading}</title>\n<style>{STYLE}{LOOK}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def color_of(change: float, limit: float) -> str:
    """Returns #rrggbb: white at 0, bluer the more the token gained, redder the more it lost."""
    share = np.clip(change / limit, -1.0, 1.0)
    rgb = WHITE + abs(share) * ((BETTER if share > 0 else WORSE) - WHITE)
    return "#" + "".join(f"{round(float(x)):02x}" for x in rgb)


def shown(token: str) -> str:
    """Returns a token as HTML, with marks in the place of what cannot be seen."""
    return "".join(map(_character, token)) or "<i>∅</i>"


def _spans(tokens: Sequence[str], changes_M: np.ndarray, limit: float) -> str:
    first, *rest = tokens
    spans = [f'<span class="none" title="first token">{shown(first)}</span>']
    for token, change in zip(rest, changes_M, strict=True):
        if np.isnan(change):
            spans.append(f'<span class="none" title="not known">{shown(token)}</span>')
        else:
            spans.append(_colored(change, limit, _number(change), shown(token)))
    return "".join(spans)


def _legend(limit: float) -> str:
    cells = []
    for share in (-1.0, -0.5, 0.0, 0.5, 1.0):
        number = _number(share * limit)
        end = {-1.0: " or less", 1.0: " or more"}.get(share, "")
        cells.append(_colored(share * limit, limit, number, f"&nbsp;{number}{end}&nbsp;"))
    return (
        f"<p>Change of the log-probability of each token, in nats: {' '.join(cells)}. Blue tokens"
        " are predicted better than before, red ones worse; grey ones have no value. Point at a"
        " token for its number.</p>"
    )


def _colored(change: float, limit: float, number: str, content: str) -> str:
    style = f"background:{color_of(change, limit)}"
    return f'<span style="{style}" title="{number} nats">{content}</span>'


def _number(change: float) -> str:
    return f"{change:+.3g}".replace("-", MINUS) if change else "0"


def _character(x: str) -> str:
    if x == " ":
        return "<wbr><i>·</i>"  # the line may break before a word, not within it
    if x == "\n":
        return "<i>↵</i><br>"
    return html.escape(x) if x.isprintable() else f"<i>{ascii(x)[1:-1]}</i>"
