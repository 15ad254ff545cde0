"""What is asked of `calibrate`, checked before anything compiles."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from llc_jax.inputs import checks
from llc_jax.llc.estimators import estimate_llc_over_checkpoints
from llc_jax.samplers import BAOAB, SGLD, base
from llc_jax.types import Batch, Params, Sampler, Stream

MOST_RECORDED = 10**8  # draws of all settings: 3 GB of traces


def check_numbers(nbeta: Any, localization: Any, relative_stderr: Any) -> None:
    """Checks that they are above 0; localization may be None."""
    for name, value in (("nbeta", nbeta), ("relative_stderr", relative_stderr)):
        checks.nonnegative(name, value)
        if not value > 0:
            raise ValueError(f"{name}={value!r}: calibration needs a number above 0.")
    if localization is not None:
        checks.nonnegative("localization", localization)
        if not localization > 0:
            raise ValueError(
                f"localization={localization!r}: without a pull towards the anchor flat directions"
                " never relax; give a number above 0, or None."
            )


def check_sizes(num_chains: Any, num_draws: Any, num_burnin: Any, **factors: Any) -> None:
    """Checks the axes of the grid and the lengths of its chains."""
    sizes = {"num_draws": num_draws, "num_burnin": num_burnin, "num_chains": num_chains}
    for name, value in sizes.items():
        checks.at_least(name, value, 1)
    settings = 1
    for name, values in factors.items():
        settings *= _num_factors(name, values)
    recorded = settings * num_chains * (num_draws + num_burnin)
    if recorded > MOST_RECORDED:
        raise ValueError(
            f"{settings:,} settings x {num_chains:,} chains x {num_draws + num_burnin:,} draws:"
            f" calibrate would record {recorded:.2g} draws, and holds at most {MOST_RECORDED:.0e};"
            " give fewer factors, chains, num_draws or num_burnin."
        )


def _num_factors(name: str, values: Sequence[float]) -> int:
    [array] = checks.grid({name: values})
    above = array.ndim == 1 and array.size and (array > 0).all() and np.isfinite(array).all()
    if not above or (np.diff(array) <= 0).any():
        raise ValueError(
            f"{name}={checks.shown(values)}: give finite numbers above 0 in increasing order."
        )
    return array.size


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses what is chosen here."""
    for name in {"thinning", "num_probes"} & options.keys():
        raise ValueError(f"{name}={options[name]!r}: calibrate chooses it; leave it out.")
    if options.get("masks") is not None:
        raise ValueError(
            f"masks={checks.shown(options['masks'])}: settings are chosen for one posterior; give"
            " one of them as mask."
        )


def check_estimate(rng_key: jax.Array, pilot: Any, nbeta: float) -> None:
    """Checks an estimate of the problem of a `Pilot` without running it."""
    base.check_instance(pilot.sampler)
    estimate_llc_over_checkpoints(
        rng_key, pilot.loss_fn, [(pilot.options.get("step", 0), pilot.params)], pilot.data,
        sampler=base.with_step_size(pilot.sampler, 1.0, 1.0), nbeta=nbeta, localization=0.0,
        **without(pilot.options, "setting_batch", "step"),
    )  # fmt: skip


def anchors(checkpoints: Any, template: Params) -> Iterator[tuple[int, Params]]:
    """The pairs (step, params), each checked against the shapes of the anchor, the first now."""

    def check(pair):
        checks.params(pair[1], pair[0], template)
        return pair

    pairs = map(check, checks.pairs(checkpoints))
    first = next(pairs, None)
    if first is None:
        raise ValueError("checkpoints is empty: give at least one (step, params), or None.")
    return itertools.chain([first], pairs)


def default_sampler(data: Batch | Stream, batch_size: int | None) -> Sampler:
    """`BAOAB` on the full batch; `SGLD`, which minibatch noise heats less, otherwise."""
    if isinstance(data, Stream):
        return SGLD(1.0)
    full = batch_size is None or checks.number(batch_size) == checks.data_length(data)
    return BAOAB(1.0, 1.0) if full else SGLD(1.0)


def without(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """`options` less those."""
    return {name: value for name, value in options.items() if name not in names}
