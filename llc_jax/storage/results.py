"""Estimates on disk: one self-describing netCDF file per checkpoint, gathered into one Dataset."""

import os
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import xarray

from llc_jax.inputs import checks
from llc_jax.llc.estimate import LLCEstimate
from llc_jax.storage import netcdf
from llc_jax.storage.files import LAST_STEP, local_path, write_atomic

# What the numbers of one curve must share: they are λ̂ of one posterior.
_SHARED = ("num_chains", "num_draws", "num_burnin", "nbeta", "localization")


def result_path(folder: str | os.PathLike, step: int) -> pathlib.Path:
    """Returns where the estimate at a training step is kept."""
    step = checks.step(step, limit=LAST_STEP)
    return local_path(folder, "folder") / f"{step:09d}.nc"


def finished_steps(folder: str | os.PathLike) -> list[int]:
    """Returns the training steps whose estimates are on disk, in increasing order."""
    names = [p.name for p in local_path(folder, "folder").glob("*.nc")]
    return sorted(int(n[:-3]) for n in names if re.fullmatch(r"(\d{9}|[1-9]\d{9,})\.nc", n))


def save_estimate(
    folder: str | os.PathLike, step: int, estimate: LLCEstimate, provenance: Mapping[str, Any]
) -> None:
    """Writes one estimate atomically, see `estimate_dataset` and `save`.

    Args:
      folder: where; created if missing.
      step: training step of the checkpoint.
      estimate: what to write.
      provenance: names to text or numbers (versions, hashes).

    Raises:
      ValueError: if something would not come back, or a name is taken; nothing is written.
      OSError: if it cannot be written.
    """
    save(folder, step, estimate_dataset(estimate, provenance))


def estimate_dataset(estimate: LLCEstimate, provenance: Mapping[str, Any]) -> xarray.Dataset:
    """Returns an estimate with all traces and what `collect` returned.

    Args:
      estimate: which.
      provenance: names to text or numbers, which become attributes beside the settings.

    Raises:
      ValueError: if something is none of these, or a name is taken.
    """
    if not isinstance(provenance, Mapping):
        raise ValueError(
            f"provenance is a {type(provenance).__name__}: give a dict of names to text or numbers,"
            " {} for none."
        )
    if not isinstance(estimate, LLCEstimate):
        raise ValueError(f"estimate is a {type(estimate).__name__}: give an LLCEstimate.")
    dataset = estimate.to_xarray()
    taken = {*dataset.attrs, *dataset.variables, *dataset.dims, "checkpoint"}
    for name, value in provenance.items():
        netcdf.attribute(name, value, "provenance")
        if name in taken:
            kind = "setting" if name in dataset.attrs else "variable"
            raise ValueError(
                f"provenance {name!r:.80} is the name of a {kind} of the estimate, which it would"
                f" hide: call it source_{name:.80}, for example."
            )
    return dataset.assign_attrs(provenance)


def save(folder: str | os.PathLike, step: int, dataset: xarray.Dataset) -> None:
    """Writes what was measured at one checkpoint atomically.

    Raises:
      ValueError: if something would not come back as it is; nothing is written.
      OSError: if it cannot be written.
    """
    path = result_path(folder, step)
    if not isinstance(dataset, xarray.Dataset):
        raise ValueError(f"dataset is a {type(dataset).__name__}: give an xarray.Dataset.")
    if "checkpoint" in dataset.variables or "checkpoint" in dataset.dims:
        raise ValueError("the dataset has a 'checkpoint' already: save one checkpoint at a time.")
    step = int(path.stem)
    whole = np.int32(step) if step < 2**31 else np.int64(step)
    write_atomic(path, netcdf.encode(dataset.expand_dims(checkpoint=[whole])))


def load_sweep(folder: str | os.PathLike) -> xarray.Dataset:
    """Gathers a folder of estimates into one Dataset with dimensions checkpoint, chain, draw.

    Attributes that differ between checkpoints are dropped; `checkpoint` is the training step.

    Raises:
      ValueError: if there is none, a file cannot be read, or two do not belong to one curve.
    """
    sweep = load(folder, "estimate_llc")
    if "per_chain" not in sweep:
        raise ValueError(
            f"{folder} holds other results than estimates (no per_chain): give the folder of"
            " experiments.estimate_llc or results.save_estimate."
        )
    if "burnin_losses" not in sweep:
        empty = np.zeros((sweep.sizes["checkpoint"], sweep.sizes["chain"], 0), np.float32)
        sweep["burnin_losses"] = (("checkpoint", "chain", "burnin"), empty)
    return sweep


def load(folder: str | os.PathLike, experiment: str) -> xarray.Dataset:
    """Gathers what `experiments.<experiment>` left in a folder, along a dimension checkpoint.

    Raises:
      ValueError: if there is nothing, a file cannot be read, or two do not fit together.
    """
    steps = finished_steps(folder)
    if not steps:
        raise ValueError(
            f"no results in {folder}: run experiments.{experiment} on this workdir first."
        )
    parts: list[xarray.Dataset] = []
    for step in steps:
        path = result_path(folder, step)
        try:
            part = netcdf.decode(path.read_bytes())
            found = part.checkpoint.values.tolist()
            if found != [step]:
                raise ValueError(f"it is of checkpoint {found!r:.40}")
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(
                f"{path} cannot be read ({reason}): delete it and run experiments.{experiment}"
                " again, which recomputes only what is missing."
            ) from error
        if parts and (differences := list(_differences(parts[0], part))):
            raise ValueError(
                f"{result_path(folder, steps[0])} and {path.name} do not belong to one curve:"
                f" {'; '.join(differences[:4])[:240]}. Keep each kind in a folder of its own, or"
                " delete one kind and compute it again."
            )
        parts.append(part)
    return xarray.concat(
        parts, dim="checkpoint", data_vars="all", coords="minimal", compat="equals",
        join="exact", combine_attrs="drop_conflicts",
    )  # fmt: skip


def _differences(first: xarray.Dataset, other: xarray.Dataset) -> Iterator[str]:
    """Why two files cannot be gathered, in words."""
    for name in _SHARED:
        a, b = first.attrs.get(name), other.attrs.get(name)
        if a != b:
            yield f"{name} {a} and {b}"
    for name in sorted(set(first.variables) ^ set(other.variables)):
        yield f"only one has {name:.60}"
    for name in sorted(set(first.variables) & set(other.variables) - {"checkpoint"}):
        a, b = first[name], other[name]
        if a.sizes != b.sizes:
            shapes = (dict(list(x.sizes.items())[1:] or x.sizes) for x in (a, b))
            yield f"{name:.60} has {' and '.join(map(str, shapes))}"
        elif name in first.dims and not np.array_equal(a.values, b.values):
            yield f"values along {name:.60}"


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
    nbeta = _nbeta(sweep)
    both = [sweep[name] for name in ("burnin_losses", "losses") if name in sweep]
    losses = np.concatenate(both, axis=-1, dtype=np.float64)
    first, last = checks.step(first, "first"), checks.step(last, "last")
    if not 0 <= first < last <= losses.shape[-1]:
        raise ValueError(
            f"draws {first} to {last}: give 0 <= first < last <= {losses.shape[-1]}, the draws"
            " of a chain with its burn-in."
        )
    mean = xarray.DataArray(losses[..., first:last].mean(-1), dims=("checkpoint", "chain"))
    return (nbeta * (mean - sweep.init_loss)).where(sweep.diverged_at < 0)


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
    nbeta = _nbeta(sweep)
    number = np.arange(1, sweep.sizes["chain"] + 1)
    missing = xarray.DataArray(1.0 - number / number.size, dims="chain")
    return sweep.per_chain + nbeta * sweep.init_loss * missing


def parts_of(sweep: xarray.Dataset) -> tuple[xarray.DataArray, xarray.DataArray] | None:
    """λ̂ of the terms of the loss and their standard errors, [checkpoint, part]; None without.

    Args:
      sweep: of `load_sweep`, of estimates with an observable `LossTerms` called "parts".
    """
    if "parts" not in sweep:
        return None
    # Where the draws were kept they have the name, see `llc.dataset`.
    return sweep["parts_mean" if "parts_mean" in sweep else "parts"], sweep["parts_stderr"]


def _nbeta(sweep: xarray.Dataset) -> float:
    """The nβ that all checkpoints of a sweep share."""
    if "nbeta" not in sweep.attrs:
        raise ValueError(
            "the sweep has no attribute nbeta: its checkpoints were measured at different ones, or"
            " it is not of load_sweep; treat those of each nbeta by themselves."
        )
    return float(sweep.attrs["nbeta"])
