"""Estimates on disk: one self-describing netCDF file per checkpoint, gathered into one Dataset."""

import os
import pathlib
import re
from collections.abc import Mapping

import numpy as np
import xarray

from llc_jax.estimate import LLCEstimate
from llc_jax.files import write_atomic

# netCDF 3 through scipy: no pickle, no code, no clock inside, so equal results are equal bytes.
_ENGINE = "scipy"


def result_path(folder: str | os.PathLike, step: int) -> pathlib.Path:
    """Returns where the estimate at a training step is kept."""
    return pathlib.Path(folder) / f"{step:09d}.nc"


def finished_steps(folder: str | os.PathLike) -> list[int]:
    """Returns the training steps whose estimates are on disk, in increasing order."""
    names = [p.name for p in pathlib.Path(folder).glob("*.nc")]
    return sorted(int(n[:-3]) for n in names if re.fullmatch(r"\d{9,}\.nc", n))


def save_estimate(
    folder: str | os.PathLike, step: int, estimate: LLCEstimate, provenance: Mapping[str, str]
) -> None:
    """Writes one estimate atomically.

    Args:
      folder: where; created if missing.
      step: training step of the checkpoint.
      estimate: what to write, with all traces.
      provenance: names to strings (versions, hashes), stored as attributes.
    """
    dataset = estimate.to_xarray().assign_attrs(provenance)
    if not dataset.sizes.get("burnin"):
        dataset = dataset.drop_vars("burnin_losses")  # netCDF 3 reads length 0 as "unlimited"
    save(folder, step, dataset)


def save(folder: str | os.PathLike, step: int, dataset: xarray.Dataset) -> None:
    """Writes what was measured at one checkpoint atomically."""
    dataset = dataset.expand_dims(checkpoint=[np.int32(step)])
    write_atomic(result_path(folder, step), bytes(dataset.to_netcdf(engine=_ENGINE)))


def load_sweep(folder: str | os.PathLike) -> xarray.Dataset:
    """Gathers a folder of estimates into one Dataset with dimensions checkpoint, chain, draw.

    Attributes that differ between checkpoints are dropped; `checkpoint` is the training step.

    Raises:
      ValueError: if there is none, or a file cannot be read.
    """
    sweep = load(folder, "estimate_llc")
    if "burnin_losses" not in sweep:
        empty = np.zeros((sweep.sizes["checkpoint"], sweep.sizes["chain"], 0), np.float32)
        sweep["burnin_losses"] = (("checkpoint", "chain", "burnin"), empty)
    return sweep


def load(folder: str | os.PathLike, experiment: str) -> xarray.Dataset:
    """Gathers what `experiments.<experiment>` left in a folder, along a dimension checkpoint.

    Raises:
      ValueError: if there is nothing, or a file cannot be read.
    """
    steps = finished_steps(folder)
    if not steps:
        raise ValueError(
            f"no results in {folder}: run experiments.{experiment} on this workdir first."
        )
    parts = []
    for step in steps:
        path = result_path(folder, step)
        try:
            with xarray.open_dataset(path, engine=_ENGINE) as part:
                parts.append(part.load())
        except Exception as error:
            raise ValueError(
                f"{path} cannot be read ({error}): delete it and run experiments.{experiment}"
                " again, which recomputes only what is missing."
            ) from error
    return xarray.concat(
        parts, dim="checkpoint", data_vars="all", coords="minimal", compat="equals",
        join="exact", combine_attrs="drop_conflicts",
    )  # fmt: skip


def llc_between(sweep: xarray.Dataset, first: int, last: int) -> xarray.DataArray:
    """λ̂ of every chain, had only the recorded draws `first` to `last - 1` been averaged.

    Draws are counted from the anchor on, burn-in included: 0 to `num_burnin + num_draws` is what an
    estimate without burn-in averages. How much of a published value is the start of its chains?

    Args:
      sweep: of `load_sweep`; its init loss must be known (not of a `Stream`).
      first: first draw.
      last: one after the last draw.

    Returns:
      nβ (mean loss of these draws - loss of w*), float64 [checkpoint, chain]; nan if diverged.
    """
    losses = np.concatenate([sweep.burnin_losses, sweep.losses], axis=-1, dtype=np.float64)
    if not 0 <= first < last <= losses.shape[-1]:
        raise ValueError(
            f"draws {first} to {last}: give 0 <= first < last <= {losses.shape[-1]}, the draws"
            " of a chain with its burn-in."
        )
    mean = xarray.DataArray(losses[..., first:last].mean(-1), dims=("checkpoint", "chain"))
    return (sweep.attrs["nbeta"] * (mean - sweep.init_loss)).where(sweep.diverged_at < 0)


def llc_with_published_init(sweep: xarray.Dataset) -> xarray.DataArray:
    """λ̂ of every chain by the estimator behind the published curve of the language model.

    It ran chains one after another and took as loss of w* the mean over all of them, in which those
    that had not run yet counted as 0: chain c of C, from 0, was compared with (c + 1) / C of that
    loss ℓ. This adds nβ ℓ (C - 1) / (2 C) to λ̂, 0.475 nβ ℓ for the published 20 chains, so that
    the curve moves with the loss; and nearly all of the spread over chains.

    Args:
      sweep: of `load_sweep`; its init loss must be known (not of a `Stream`).

    Returns:
      float64 [checkpoint, chain]; nan if diverged.
    """
    number = np.arange(1, sweep.sizes["chain"] + 1)
    missing = xarray.DataArray(1.0 - number / number.size, dims="chain")
    return sweep.per_chain + sweep.attrs["nbeta"] * sweep.init_loss * missing
