"""Names for the axes of what is measured at a checkpoint, and flat tables of it."""

from collections.abc import Mapping, Sequence

import numpy as np
import xarray

from llc_jax.problems.regression.behavior import icl_pairs

_BEHAVIOR = {
    "mean_loss": (),
    "icl": ("pair",),
    "far_inputs_loss": ("gain", "token"),
    "far_tasks_loss": ("gain", "token"),
    **dict.fromkeys(
        ("loss", "prediction_square", "ridge_loss", "to_ridge", "to_one_sample", "to_dmmse"),
        ("token",),
    ),
}
_STRUCTURE = {
    "token_singular_values": ("token_value",),
    "position_singular_values": ("position_value",),
    "embedding_overlap": ("column",),
    "norm_scale": ("norm", "channel"),
    "norm_bias": ("norm", "channel"),
    "norm_small": ("norm",),
    "unembed_weight": ("channel",),
    "unembed_bias": (),
    "weight_norm": (),
}


def dataset(
    measured: Mapping[str, np.ndarray], gains: Sequence[float], norms: Sequence[str]
) -> xarray.Dataset:
    """Returns what `metrics.regression.Behavior` and `metrics.structure.Structure` measured.

    Dimensions token (1 to K), pair (such as 8_1), gain, layer, head, position (token attended
    from), norm, channel.

    Args:
      measured: the dictionaries of both, merged.
      gains: of `Behavior`.
      norms: of `structure.layer_norm_names`.
    """
    variables = {}
    for name, value in measured.items():
        attention = name.startswith("attention_")
        base = name.removesuffix("_stderr")
        dims = ("layer", "head", "position") if attention else (_BEHAVIOR | _STRUCTURE)[base]
        variables[name] = (dims, np.asarray(value, np.float32))
    found = xarray.Dataset(variables, coords={"gain": list(gains), "norm": list(norms)})
    pairs = [f"{late + 1}_{early + 1}" for late, early in icl_pairs(found.sizes["token"])]
    return found.assign_coords(token=np.arange(1, found.sizes["token"] + 1), pair=pairs)


def behavior_table(found: xarray.Dataset):
    """One line per checkpoint: behaviour and structure but for heads and channels.

    Args:
      found: with a leading dimension checkpoint.

    Returns:
      pandas DataFrame, indexed by step; columns such as `loss_3` (third example) and
      `far_inputs_loss_g10_3`.
    """
    import pandas

    columns = {}
    for name, variable in found.data_vars.items():
        if {"layer", "channel"} & set(variable.dims):
            continue
        rest = variable.dims[1:]
        for index in np.ndindex(variable.shape[1:]):
            base, error = str(name).removesuffix("_stderr"), str(name).endswith("_stderr")
            column = "_".join([base, *map(_label(found), rest, index)]) + "_stderr" * error
            columns[column] = variable.values[(slice(None), *index)]
    frame = pandas.DataFrame(columns, index=found.checkpoint.values)
    return frame.rename_axis("step")


def attention_table(found: xarray.Dataset):
    """One line per checkpoint, block, head and kind of token attended from, mean over these.

    Args:
      found: with a leading dimension checkpoint.

    Returns:
      pandas DataFrame with columns step, layer, head, token ("x" or "y") and seven statistics.
    """
    import pandas

    names = [name for name in found.data_vars if str(name).startswith("attention_")]
    parts = []
    for kind, start in (("x", 0), ("y", 1)):
        part = found[names].isel(position=slice(start, None, 2)).mean("position")
        parts.append(part.to_dataframe().reset_index().assign(token=kind))
    table = pandas.concat(parts).rename(columns={"checkpoint": "step"})
    return table.sort_values(["step", "layer", "head", "token"])[
        ["step", "layer", "head", "token", *names]
    ]


def _label(found: xarray.Dataset):
    def label(dim, index):
        if dim == "pair":
            return str(found.pair.values[index])
        if dim == "gain":
            return f"g{found.gain.values[index]:g}"
        if dim == "norm":
            return str(found.norm.values[index]).replace("/", "_")
        return str(index + 1)

    return label
