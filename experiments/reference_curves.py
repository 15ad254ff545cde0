"""Which recorded quantity is which of ours, and where both are read.

The recorded ones are those that the authors of arXiv 2402.02364 published as result files of their
code, one `regression_*.csv` each with columns `step`, `seed` and the values. Losses, learning in
context and the distance to ridge were recorded on sequences with the noise of the training task,
variance 0.125; squared predictions, losses out of distribution and curvature on sequences with
noise of standard deviation 0.125, called quiet below. Left out, because the definitions differ:
the overlap of the embeddings (recorded: a rotation by a whole basis, where ours projects on the
span of the positions) and the distance to ridge on one sample (recorded: the squared prediction
again). Not recorded: attention, and the share of small scales of a layer norm, for which the length
of all its scales stands in.
"""

import dataclasses
import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments import estimate_llc, measure_behavior, measure_curvature
from llc_jax.storage.files import read_json

TOKENS = 8
QUIET = 0.125**2  # variance of the noise of the quiet sequences
RECORDED_CHAINS = 10  # behind each recorded λ̂, whose file gives the spread over them


class Quantity(NamedTuple):
    """One quantity on both sides.

    Attributes:
      source: which of our tables: behavior, quiet, hessian or llc.
      column: ours.
      file: theirs, without `regression_` and `.csv`.
      theirs: their column, or two whose difference it is.
      layer: the rows of their file that count, if it has several layers.
    """

    source: str
    column: str
    file: str
    theirs: str | tuple[str, str]
    layer: str = ""


def _loss(example: int) -> str:
    return f"pretrain/mse/token/{example - 1}"


def _icl(late: int, early: int) -> Quantity:
    return Quantity("behavior", f"icl_{late}_{early}", "behavior", (_loss(late), _loss(early)))


_NORMS = {
    "block 1, attention": ("block_0_attention_norm", "blocks.0.layer_norms.0"),
    "block 1, MLP": ("block_0_mlp_norm", "blocks.0.layer_norms.1"),
    "block 2, attention": ("block_1_attention_norm", "blocks.1.layer_norms.0"),
    "block 2, MLP": ("block_1_mlp_norm", "blocks.1.layer_norms.1"),
    "last": ("final_norm", "unembedding.0"),
}
# What stands before a colon shares a panel of the figure.
QUANTITIES = {
    "loss": Quantity("behavior", "mean_loss", "behavior", "pretrain/mse"),
    "loss at example 1": Quantity("behavior", "loss_1", "behavior", _loss(1)),
    "loss at example 8": Quantity("behavior", "loss_8", "behavior", _loss(8)),
    "ICL: 8 - 1": _icl(8, 1),
    "ICL: 4 - 1": _icl(4, 1),
    "ICL: 8 - 4": _icl(8, 4),
    "distance to ridge": Quantity("behavior", "to_ridge", "behavior", "pretrain/delta_ridge"),
    "loss, quiet sequences": Quantity("quiet", "quiet_loss", "behavior", "loss/mean"),
    "mean squared prediction": Quantity("quiet", "prediction_square", "behavior", "loss_0/mean"),
    **{
        f"loss, {kind} x {gain}": Quantity(
            "quiet", f"far_{kind}_loss_g{gain}", "behavior", f"ood_{letter}_{kind}_loss/mean"
        )
        for kind in ("inputs", "tasks")
        for letter, gain in zip("abcd", (3, 5, 10, 100), strict=True)
    },
    "weight norm": Quantity("behavior", "weight_norm", "behavior", "weight/norm"),
    **{
        f"length of layer norm scales: {label}": Quantity(
            "behavior", f"norm_length_{ours}", "layernorm", "weight/norm", layer
        )
        for label, (ours, layer) in _NORMS.items()
    },
    **{
        f"token embedding, singular value: {i}": Quantity(
            "behavior", f"token_singular_values_{i}", "embedding_svd", f"embed_S{i}"
        )
        for i in range(1, 6)
    },
    **{  # a choice of 16; the last is that of a position that is not trained
        f"position embedding, singular value: {i}": Quantity(
            "behavior", f"position_singular_values_{i}", "embedding_svd", f"postn_S{i}"
        )
        for i in (1, 2, 4, 8, 15)
    },
    "Hessian trace": Quantity("hessian", "trace", "hessian", "trace_mean"),
    "largest eigenvalue": Quantity("hessian", "largest_1", "hessian", "eig1"),
    "LLC": Quantity("llc", "llc", "llc", "llc_mean"),
    **{
        f"LLC by example: {k}": Quantity("llc", f"llc_{k}", "llc", f"llc_token{k}")
        for k in range(1, TOKENS + 1)
    },
}


def recorded(folder: pathlib.Path, quantity: Quantity) -> tuple[np.ndarray, np.ndarray]:
    """Reads a recorded curve.

    Returns:
      (steps [T], values [seed, T]).

    Raises:
      ValueError: if the file, the column or a second seed is missing.
    """
    import pandas

    path = folder / f"regression_{quantity.file}.csv"
    if not path.exists():
        raise ValueError(f"reference={folder}: {path.name} is not there; give the folder with it.")
    frame = pandas.read_csv(path)
    names = (quantity.theirs,) if isinstance(quantity.theirs, str) else quantity.theirs
    needed = {"step", "seed", *names} | ({"layer"} if quantity.layer else set())
    if missing := needed - set(frame.columns):
        raise ValueError(f"{path} has no column {', '.join(sorted(missing))}.")
    if quantity.layer:
        frame = frame[frame.layer == quantity.layer]
    curves = [frame.pivot(index="seed", columns="step", values=name) for name in names]
    values = curves[0] if len(curves) == 1 else curves[0] - curves[1]
    if len(values) < 2:
        raise ValueError(f"{path} has {len(values)} seed: a band takes two at least.")
    return values.columns.to_numpy(), values.to_numpy()


class Table(NamedTuple):
    """What we have of one source.

    Attributes:
      frame: pandas DataFrame by step; a column may have one `<name>_stderr` beside it.
      measured: settings of the measurement, for the number of its sequences; may be empty.
    """

    frame: Any
    measured: dict[str, Any]

    def error_scale(self, column: str, recorded_sequences: int) -> float:
        """What our standard error is multiplied by to be that of the difference to theirs."""
        if not self.measured:
            return 1.0
        size = self.measured["num_far" if column.startswith("far_") else "num_sequences"]
        return math.sqrt(1 + size / recorded_sequences)


def ours(config) -> dict[str, Table]:
    """Reads our tables by source; those without results are left out.

    Args:
      config: of `experiments.compare_reference`.

    Raises:
      ValueError: if there is none, one that a flag names is missing, or one is of another setting.
    """
    from llc_jax.storage.results import finished_steps

    found = {}
    folder = measure_behavior.folder_of(config)
    if finished_steps(folder):
        found["behavior"] = found["quiet"] = behavior(folder)
    if config.quiet_name:
        folder = estimate_llc.results_folder(dataclasses.replace(config, name=config.quiet_name))
        quiet = behavior(folder)
        if not math.isclose(noise := quiet.measured.get("noise_variance", 0.0), QUIET):
            raise ValueError(
                f"quiet_name={config.quiet_name}: measured with noise_variance={noise}, the"
                f" recorded sequences have {QUIET}; run experiments.measure_behavior"
                f" --noise_variance={QUIET} --name={config.quiet_name}-2, say."
            )
        loss = {f"quiet_loss{end}": quiet.frame[f"mean_loss{end}"] for end in ("", "_stderr")}
        found["quiet"] = quiet._replace(frame=quiet.frame.assign(**loss))
    name = config.curvature_name or config.name
    path = measure_curvature.folder_of(dataclasses.replace(config, name=name)) / "curvature.csv"
    if path.exists():
        import pandas

        found["hessian"] = Table(pandas.read_csv(path, index_col="step"), {})
    elif config.curvature_name:
        raise ValueError(
            f"curvature_name={name}: {path} is not there; run experiments.measure_curvature first,"
            " or leave the flag out."
        )
    folder = estimate_llc.results_folder(config)
    if finished_steps(folder):
        found["llc"] = estimates(folder)
    if not found:
        raise ValueError(
            f"{config.workdir} has no results: run experiments.measure_behavior first."
        )
    return found


def behavior(folder: pathlib.Path) -> Table:
    """Reads what `experiments.measure_behavior` left in a folder.

    Returns:
      Per step the columns of `behavior.csv` that have no example, `loss_1`, ..., means over the
      examples of all others, and `norm_length_<norm>`, the Euclidean norm of its scales.
    """
    import pandas

    from llc_jax.problems.regression.datasets import behavior_table
    from llc_jax.storage import results

    found = results.load(folder, "measure_behavior")
    if found.sizes["token"] != TOKENS:
        raise ValueError(f"{folder} is not of {TOKENS} examples, as the recorded curves are.")
    length = np.sqrt((found.norm_scale.astype(float) ** 2).sum("channel"))
    # Errors at the examples of a sequence go together: their mean is the safe side.
    means = found.mean("token", skipna=False).assign(norm_length=length)
    by_example = behavior_table(found[["loss", "loss_stderr"]])
    frame = pandas.concat([by_example, behavior_table(means).drop(columns="loss")], axis=1)
    return Table(frame, read_json(folder / "config.json")["config"])


def estimates(folder: pathlib.Path) -> Table:
    """Reads λ̂ of a sweep, that of each example too if it has them: llc, llc_1, ..."""
    import pandas

    from llc_jax.storage.results import load_sweep, parts_of

    sweep = load_sweep(folder)
    columns = {"llc": sweep.llc.values, "llc_stderr": sweep.stderr.values}
    if parts := parts_of(sweep):
        for k, (values, errors) in enumerate(zip(*(x.values.T for x in parts), strict=True), 1):
            columns[f"llc_{k}"], columns[f"llc_{k}_stderr"] = values, errors
    return Table(pandas.DataFrame(columns, index=sweep.checkpoint.values), {})
