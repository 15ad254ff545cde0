"""Names for the axes of what is measured of a language model, and flat tables of it."""

from collections.abc import Mapping, Sequence

import numpy as np
import xarray

_HEADS = ("layer", "head")
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
    **dict.fromkeys(
        ("k_composition", "q_composition", "v_composition"), ("early_head", "late_head")
    ),
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
    """One line per checkpoint: all that has one value there, or one for each n.

    Args:
      found: with a leading dimension checkpoint.

    Returns:
      pandas DataFrame, indexed by step; columns such as `bigram_kl` and `ngram_score_3_stderr`.
    """
    import pandas

    columns = {}
    for name, variable in found.data_vars.items():
        base, error = str(name).removesuffix("_stderr"), "_stderr" * str(name).endswith("_stderr")
        if variable.dims == ("checkpoint",):
            columns[str(name)] = variable.values
        elif variable.dims == ("checkpoint", "n"):
            for index, n in enumerate(found.n.values):
                columns[f"{base}_{n}{error}"] = variable.values[:, index]
    return pandas.DataFrame(columns, index=found.checkpoint.values).rename_axis("step")


def heads_table(found: xarray.Dataset):
    """One line per checkpoint and head: its scores and their standard errors.

    Args:
      found: with a leading dimension checkpoint.

    Returns:
      pandas DataFrame with columns step, layer, head and the scores.
    """
    names = [name for name, variable in found.data_vars.items() if variable.dims[1:] == _HEADS]
    table = found[names].to_dataframe().reset_index().rename(columns={"checkpoint": "step"})
    return table[["step", "layer", "head", *names]]
