"""Names for the axes of what is measured of a language model, and flat tables of it."""

from collections.abc import Mapping, Sequence

import numpy as np
import xarray

from llc_jax.problems.language.losses import octaves

_HEADS = ("layer", "head")
_PAIRS = ("early_head", "late_head")
_DIMS = {
    **dict.fromkeys(("loss", "ablated_loss"), ("prediction",)),
    **dict.fromkeys(
        ("mean_loss", "ablated_mean_loss", "icl", "bigram_score", "bigram_floor", "bigram_kl",
         "weight_norm", "previous_token_uniform", "prefix_matching_uniform", "induction_uniform"),
        (),
    ),
    **dict.fromkeys(("ngram_loss", "ngram_score", "ngram_score_published"), ("n",)),
    "text_log_probs": ("text", "word"),
    **dict.fromkeys(("previous_token", "prefix_matching", "induction"), _HEADS),
    **dict.fromkeys(("k_composition", "q_composition", "v_composition"), _PAIRS),
    "weight_norms": ("weight",),
    "position_explained": ("component",),
    "position_coordinates": ("position", "component"),
    "position_norm": ("position",),
}  # fmt: skip


def dataset(
    measured: Mapping[str, np.ndarray], n: Sequence[int], weights: Sequence[str]
) -> xarray.Dataset:
    """Returns what `metrics.language.Behavior` and `metrics.language_structure` measured.

    Dimensions prediction (1 to L - 1: of the token of that number, the start token being 0), n,
    text, word, layer and head (from 1), early_head, late_head, weight, component, position.

    Args:
      measured: the dictionaries, merged.
      n: lengths of the n-grams.
      weights: of `language_structure.weight_names`.
    """
    variables = {
        name: (_DIMS[name.removesuffix("_stderr")], np.asarray(value, np.float32))
        for name, value in measured.items()
    }
    found = xarray.Dataset(variables, coords={"weight": list(weights)})
    if "n" in found.dims:
        found = found.assign_coords(n=list(n))
    counted = ("prediction", "layer", "head", "early_head", "late_head", "component")
    return found.assign_coords(
        {name: np.arange(1, found.sizes[name] + 1) for name in counted if name in found.dims}
    )


def behavior_table(found: xarray.Dataset):
    """One line per checkpoint: all that has one value there, or few.

    Losses by position are means over octaves of predictions, without standard errors, since
    predictions of one sequence are no independent draws.

    Args:
      found: with a leading dimension checkpoint.

    Returns:
      pandas DataFrame, indexed by step; columns such as `bigram_kl`, `ngram_score_3_stderr`,
      `position_explained_1` (of component 1) and `loss_4_to_7` (of predictions 4 to 7).
    """
    import pandas

    columns = {}
    for name, variable in found.data_vars.items():
        base, error = str(name).removesuffix("_stderr"), "_stderr" * str(name).endswith("_stderr")
        of = variable.dims[1:]
        if not of:
            columns[str(name)] = variable.values
        elif of in (("n",), ("component",)):
            for index, number in enumerate(found[of[0]].values):
                columns[f"{base}_{number}{error}"] = variable.values[:, index]
        elif of == ("prediction",) and not error:
            for first, last in octave_ranges(found.sizes["prediction"]):
                mean = variable.sel(prediction=slice(first, last)).mean("prediction").values
                columns[f"{base}_{first}" + f"_to_{last}" * (last > first)] = mean
    return pandas.DataFrame(columns, index=found.checkpoint.values).rename_axis("step")


def octave_ranges(num_predictions: int) -> list[tuple[int, int]]:
    """First and last prediction of each octave of `language.losses`, counted from 1."""
    ends = octaves(num_predictions + 1)
    return list(zip([1, *(end + 1 for end in ends)], ends, strict=False))


def heads_table(found: xarray.Dataset):
    """One line per checkpoint and head: its scores and their standard errors.

    Args:
      found: with a leading dimension checkpoint.

    Returns:
      pandas DataFrame with columns step, layer, head and the scores.
    """
    return _long_table(found, _HEADS)


def composition_table(found: xarray.Dataset):
    """One line per checkpoint and pair of heads of the first two layers: its composition.

    Args:
      found: with a leading dimension checkpoint, of a model of two layers or more.

    Returns:
      pandas DataFrame with columns step, early_head, late_head, and k_, q_ and v_composition.
    """
    return _long_table(found, _PAIRS)


def _long_table(found: xarray.Dataset, dims: tuple[str, str]):
    names = [name for name, variable in found.data_vars.items() if variable.dims[1:] == dims]
    table = found[names].to_dataframe().reset_index().rename(columns={"checkpoint": "step"})
    return table[["step", *dims, *names]]
