"""What no setting of a sampler cures: `calibrate` ends with it, instead of sampling its grid."""

import math
from typing import Any

import numpy as np


def refuse_incurable(estimates: Any, where: str = "") -> None:
    """Refuses estimates that no setting makes better.

    Args:
      estimates: `LLCEstimate`s.
      where: of which checkpoint, for the message.

    Raises:
      ValueError: if chains died of the data, or if the loss has no second derivatives.
    """
    for estimate in estimates:
        if estimate.sound.explains_death:
            raise ValueError(f"nothing to calibrate{where}: {estimate.warnings[0]}")
        if not estimate.sound.second_derivatives:
            raise ValueError(
                "calibrate needs second derivatives of loss_fn, which a custom rule, a callback or"
                " a kernel in it does not have: make that rule differentiable, or choose step_size"
                " by hand and compare estimates at two of them."
            )


def refuse_flat(estimates: Any, localizations: np.ndarray) -> None:
    """Refuses a loss whose gradient is 0 along all chains.

    Args:
      estimates: [K] of pilot chains.
      localizations: [K] γ.

    Raises:
      ValueError: if it is.
    """
    looked_at = [e.sound.gradient for e in estimates]
    if all(norms.shape[1] > 1 and np.all(norms == 0) for norms in looked_at):
        reach = 1 / math.sqrt(localizations.min())
        raise ValueError(
            "the gradient of the loss is zero in all sampled weights, at the anchor and along all"
            f" pilot chains (localization {localizations.min():.3g}, which lets each weight go"
            f" about {reach:.2g} away): the loss does not depend on them there, or only in jumps,"
            " as an error rate does. Give a differentiable loss of the sampled weights, or a"
            " smaller localization if it depends on them further away."
        )
