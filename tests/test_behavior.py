"""Behaviour and structure: models and patterns whose values are known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llc_jax.checkpoint_map import map_checkpoints
from llc_jax.problems.regression import behavior as regression
from llc_jax.problems.regression import datasets, structure
from llc_jax.problems.regression.data import (
    RegressionTask,
    one_sample_predictions,
    ridge_predictions,
    sample_batch,
    tasks,
)
from llc_jax.problems.regression.losses import RegressionTokenLosses
from llc_jax.problems.regression.model import RegressionTransformer, init_params, predictions

TASK = RegressionTask(dim=3, num_examples=4)
MODEL = RegressionTransformer(
    num_layers=2, num_heads=2, d_model=16, d_mlp=8, num_examples=4, dim=3, double_residual=True
)
GAINS = (3.0, 10.0)


@pytest.fixture(scope="module")
def params():
    # Perturbed, so that no layer norm is at its initial 1 and 0.
    fresh = init_params(jax.random.key(0), MODEL)
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten(
        [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


@pytest.fixture(scope="module")
def sequences():
    return regression.evaluation_set(jax.random.key(2), TASK, 48)


def measured(params, sequences, gains=GAINS):
    return jax.jit(regression.Behavior(MODEL, gains))(0, params, sequences, sequences)


# --- behaviour --------------------------------------------------------------------------------


def test_a_model_that_predicts_zero_has_known_values(params, sequences):
    silent = params | {"unembed": jax.tree.map(jnp.zeros_like, params["unembed"])}
    found = measured(silent, sequences)
    x, y, t = (np.asarray(sequences[name], np.float64) for name in ("x", "y", "t"))
    np.testing.assert_allclose(found["loss"], (y**2).mean(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(found["prediction_square"], 0.0)
    for name in ("ridge", "one_sample"):
        known = np.asarray(sequences[name], np.float64)
        np.testing.assert_allclose(found[f"to_{name}"], (known**2).mean(axis=0), rtol=1e-5)
    clean = np.einsum("bkd,bd->bk", x, t)
    for row, gain in enumerate(GAINS):
        exact = ((gain * clean + y - clean) ** 2).mean(axis=0)
        np.testing.assert_allclose(found["far_inputs_loss"][row], exact, rtol=1e-4)
        np.testing.assert_allclose(found["far_tasks_loss"][row], exact, rtol=1e-4)


def test_losses_are_those_of_the_training_loss(params, sequences):
    found = measured(params, sequences)
    exact = RegressionTokenLosses(MODEL)(params, sequences).mean(axis=0)
    np.testing.assert_allclose(found["loss"], exact, rtol=1e-5)
    guess = np.asarray(predictions(MODEL, params, sequences), np.float64)
    gap = ((guess - np.asarray(sequences["ridge"])) ** 2).mean(axis=0)
    np.testing.assert_allclose(found["to_ridge"], gap, rtol=1e-5)
    np.testing.assert_allclose(found["prediction_square"], (guess**2).mean(axis=0), rtol=1e-5)
    ridge = ((np.asarray(sequences["ridge"]) - np.asarray(sequences["y"])) ** 2).mean(axis=0)
    np.testing.assert_allclose(found["ridge_loss"], ridge, rtol=1e-5)


def test_inputs_and_tasks_out_of_distribution_are_told_apart(params, sequences):
    found = measured(params, sequences)
    x, y, t = sequences["x"], sequences["y"], sequences["t"]
    far = 3.0 * jnp.einsum("bkd,bd->bk", x, t) + (y - jnp.einsum("bkd,bd->bk", x, t))
    for name, inputs in (("far_inputs_loss", 3.0 * x), ("far_tasks_loss", x)):
        guess = predictions(MODEL, params, {"x": inputs, "y": far})
        np.testing.assert_allclose(found[name][0], ((guess - far) ** 2).mean(axis=0), rtol=1e-3)
    # Gain 1 is no change at all.
    near = measured(params, sequences, gains=(1.0,))
    for name in ("far_inputs_loss", "far_tasks_loss"):
        np.testing.assert_allclose(near[name][0], near["loss"], rtol=1e-4)


@pytest.mark.slow
def test_means_do_not_depend_on_how_many_sequences_fit_in_memory(monkeypatch, params, sequences):
    whole = measured(params, sequences)
    monkeypatch.setattr(regression, "MAX_CHUNK", 10)  # 48 in 5 chunks of 10, the last not full
    chunked = regression.Behavior(MODEL, GAINS)(0, params, sequences, sequences)
    for name, value in whole.items():
        np.testing.assert_allclose(chunked[name], value, rtol=1e-5, err_msg=name)


def test_one_sample_is_ridge_on_one_pair():
    batch = sample_batch(jax.random.key(3), TASK, 50)
    one = one_sample_predictions(batch["x"], batch["y"], 0.125)
    ridge = ridge_predictions(batch["x"], batch["y"], 0.125)
    np.testing.assert_allclose(one[:, 1], ridge[:, 1], rtol=1e-4, atol=1e-5)
    # Further pairs change ridge only, and the first pair is what it is told.
    later = {"x": batch["x"].at[:, 1].add(1.0), "y": batch["y"].at[:, 1].add(1.0)}
    moved = one_sample_predictions(later["x"], later["y"], 0.125)
    np.testing.assert_allclose(moved[:, [0, 2, 3]], one[:, [0, 2, 3]], rtol=1e-5)


@pytest.mark.slow
def test_a_finite_prior_adds_its_optimal_predictor(params):
    task = RegressionTask(dim=3, num_examples=4, num_tasks=5)
    sequences = regression.evaluation_set(jax.random.key(0), task, 16)
    x, y, t = (np.asarray(a, np.float64) for a in (sequences["x"], sequences["y"], tasks(task)))
    outputs = np.einsum("bkd,md->bkm", x, t)
    optimal = np.empty((16, 4))
    for k in range(4):  # Bayes' rule over the 5 tasks, given the pairs before k
        squares = (y[:, :k, None] - outputs[:, :k]) ** 2
        likelihood = np.exp(-squares.sum(axis=1) / (2 * task.noise_variance))
        posterior = likelihood / likelihood.sum(axis=1, keepdims=True)
        optimal[:, k] = (posterior * outputs[:, k]).sum(axis=1)
    guess = np.asarray(predictions(MODEL, params, sequences), np.float64)
    distance = (guess - optimal) ** 2
    found = measured(params, sequences)
    np.testing.assert_allclose(found["to_dmmse"], distance.mean(axis=0), rtol=1e-3)
    spread = distance.std(axis=0) / math.sqrt(16)
    np.testing.assert_allclose(found["to_dmmse_stderr"], spread, rtol=1e-3)
    # With one task only, the optimal predictor knows it.
    alone = regression.evaluation_set(
        jax.random.key(0), RegressionTask(dim=3, num_examples=4, num_tasks=1), 16
    )
    clean = jnp.einsum("bkd,bd->bk", alone["x"], alone["t"])
    np.testing.assert_allclose(alone["dmmse"], clean, atol=1e-5)


def test_scores_of_learning_in_context_tell_early_from_late():
    task = RegressionTask(dim=3, num_examples=6)
    model = RegressionTransformer(
        num_layers=1, num_heads=2, d_model=16, d_mlp=8, num_examples=6, dim=3
    )
    batch = regression.evaluation_set(jax.random.key(0), task, 20)
    found = regression.Behavior(model)(0, init_params(jax.random.key(1), model), batch, batch)
    loss = np.asarray(found["loss"], np.float64)
    exact = [loss[5] - loss[0], loss[3] - loss[0], loss[5] - loss[3]]
    np.testing.assert_allclose(found["icl"], exact, atol=1e-4)
    assert len({round(x, 2) for x in exact}) == 3


def test_scores_of_learning_in_context(params, sequences):
    assert regression.icl_pairs(8) == [(7, 0), (3, 0), (7, 3)]
    assert regression.icl_pairs(2) == [(1, 0), (1, 0), (1, 1)]
    found = measured(params, sequences)
    loss = np.asarray(found["loss"], np.float64)
    np.testing.assert_allclose(found["icl"], [loss[3] - loss[0]] * 2 + [0.0], atol=1e-5)
    assert found["mean_loss"] == pytest.approx(loss.mean(), rel=1e-5)


def test_standard_errors_are_those_of_the_mean(params, sequences):
    found = measured(params, sequences)
    each = np.asarray(RegressionTokenLosses(MODEL)(params, sequences), np.float64)
    np.testing.assert_allclose(found["loss_stderr"], each.std(axis=0) / math.sqrt(48), rtol=1e-4)
    spread = (each[:, 3] - each[:, 0]).std() / math.sqrt(48)
    assert found["icl_stderr"][0] == pytest.approx(spread, rel=1e-4)
    clean = np.einsum("bkd,bd->bk", sequences["x"], sequences["t"])
    for row, gain in enumerate(GAINS):
        y = gain * clean + (sequences["y"] - clean)
        for name, x in (("inputs", gain * sequences["x"]), ("tasks", sequences["x"])):
            guess = predictions(MODEL, params, {"x": x, "y": y})
            far = np.asarray((guess - y) ** 2, np.float64)
            spread = far.std(axis=0) / math.sqrt(48)
            np.testing.assert_allclose(found[f"far_{name}_loss_stderr"][row], spread, rtol=1e-3)


# --- attention --------------------------------------------------------------------------------


def statistics(*patterns):
    """Statistics of one head that shows these patterns, one per sequence."""
    attention = jnp.asarray(np.stack(patterns), jnp.float32)[:, None]
    return {name: np.asarray(x)[0] for name, x in structure.attention_statistics(attention).items()}


LENGTH = 6
UNIFORM = np.tril(np.ones((LENGTH, LENGTH))) / np.arange(1, LENGTH + 1)[:, None]
SELF = np.eye(LENGTH)
FIRST = np.zeros((LENGTH, LENGTH))
FIRST[:, 0] = 1
PREVIOUS = np.eye(LENGTH, k=-1)
PREVIOUS[0, 0] = 1
TOKENS = np.arange(LENGTH)


def test_attention_to_all_alike():
    found = statistics(UNIFORM, UNIFORM)
    np.testing.assert_allclose(found["entropy"][1:], 1.0, rtol=1e-5)
    np.testing.assert_allclose(found["distance"][1:], 0.5, rtol=1e-5)
    np.testing.assert_allclose(found["variability"], 0.0, atol=1e-6)
    np.testing.assert_allclose(found["hardness"], 0.0)
    np.testing.assert_allclose(found["to_self"], 1 / (TOKENS + 1), rtol=1e-6)
    np.testing.assert_allclose(found["to_previous"][1:], 1 / (TOKENS[1:] + 1), rtol=1e-6)
    np.testing.assert_allclose(found["to_x_tokens"], (TOKENS // 2 + 1) / (TOKENS + 1), rtol=1e-6)


def test_attention_to_one_token():
    found = statistics(PREVIOUS, PREVIOUS)
    np.testing.assert_allclose(found["entropy"][1:], 0.0, atol=1e-6)
    np.testing.assert_allclose(found["distance"][1:], 1 / TOKENS[1:], rtol=1e-6)
    np.testing.assert_allclose(found["hardness"], TOKENS / (TOKENS + 1), rtol=1e-6)
    np.testing.assert_allclose(found["to_previous"][1:], 1.0)
    np.testing.assert_allclose(found["to_self"][1:], 0.0)
    np.testing.assert_allclose(found["to_x_tokens"][1:], (TOKENS[1:] - 1) % 2 == 0)
    np.testing.assert_allclose(statistics(SELF)["distance"][1:], 0.0)
    np.testing.assert_allclose(statistics(FIRST)["distance"][1:], 1.0)


def test_attention_that_depends_on_the_sequence():
    # A quarter look at themselves, the rest at the first token: total variation distances to the
    # mean pattern are 3/4 and 1/4.
    found = statistics(SELF, FIRST, FIRST, FIRST)
    np.testing.assert_allclose(found["variability"][1:], (0.75 + 3 * 0.25) / 4, rtol=1e-6)
    np.testing.assert_allclose(found["entropy"][1:], 0.0, atol=1e-6)  # of each, not of their mean


def test_where_there_is_no_choice_there_is_no_number():
    found = statistics(UNIFORM)
    for name in ("entropy", "distance", "to_previous"):
        assert np.isnan(found[name][0])
        assert np.isfinite(found[name][1:]).all()


def test_patterns_are_those_of_the_model(params, sequences):
    found = np.asarray(structure.attention_patterns(MODEL, params, sequences), np.float64)
    assert found.shape == (2, 48, 2, 8, 8)
    np.testing.assert_allclose(found.sum(axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(found, np.tril(found))
    # The first block by hand, in float64: layer norm, one matrix for q, k, v within each head.
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x, y = np.asarray(sequences["x"], np.float64), np.asarray(sequences["y"], np.float64)
    tokens = np.zeros((48, 8, 4))
    tokens[:, ::2, 1:], tokens[:, 1::2, 0] = x, y
    stream = tokens @ p["token_embed"]["kernel"] + p["position_embed"]
    centred = stream - stream.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    norm = p["block_0"]["attention_norm"]
    qkv = (normed * norm["scale"] + norm["bias"]) @ p["block_0"]["attention"]["qkv"]["kernel"]
    q, k, _ = np.moveaxis(qkv.reshape(48, 8, 2, 3, 8), 3, 0)
    logits = np.einsum("bthn,bshn->bhts", q, k) / math.sqrt(8)
    weights = np.tril(np.exp(logits - logits.max(axis=-1, keepdims=True)))
    np.testing.assert_allclose(
        found[0], weights / weights.sum(axis=-1, keepdims=True), rtol=1e-3, atol=1e-5
    )


# --- weights ----------------------------------------------------------------------------------


def test_overlap_is_a_true_projection():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(16, 16)))[0].astype(np.float32)
    spread = np.diag([5.0, 1.0, 0.1]).astype(np.float32)
    # Three positions, one of them repeated: the span has three dimensions, not four.
    positions = np.concatenate([spread, spread[:1]]) @ basis[:3]
    tokens = np.stack([2.0 * basis[1], basis[5], 3.0 * basis[2] + 4.0 * basis[7]])
    found = structure.embeddings({"token_embed": {"kernel": tokens}, "position_embed": positions})
    np.testing.assert_allclose(found["embedding_overlap"], [1.0, 0.0, 0.6], atol=1e-5)
    np.testing.assert_allclose(found["token_singular_values"], [5.0, 2.0, 1.0], rtol=1e-5)
    np.testing.assert_allclose(
        found["position_singular_values"], [5 * math.sqrt(2), 1.0, 0.1, 0.0], atol=1e-5
    )


def test_layer_norms_are_in_the_order_of_the_model(params):
    names = structure.layer_norm_names(params)
    assert names == [
        "block_0/attention_norm", "block_0/mlp_norm", "block_1/attention_norm",
        "block_1/mlp_norm", "final_norm",
    ]  # fmt: skip
    planted = jax.tree.map(lambda x: x, params)
    scale = np.array([0.09, -0.09, 0.11, -0.11] * 4, np.float32)
    planted["block_1"]["attention_norm"]["scale"] = scale
    found = structure.layer_norms(planted)
    np.testing.assert_array_equal(found["norm_scale"][2], scale)
    np.testing.assert_array_equal(found["norm_bias"][4], params["final_norm"]["bias"])
    assert found["norm_small"][2] == 0.5


def test_effective_unembedding_is_the_last_two_layers(params):
    found = structure.unembedding(params)
    z = np.random.default_rng(1).normal(size=(7, 16))
    norm, out = jax.tree.map(np.asarray, (params["final_norm"], params["unembed"]))
    direct = (z * norm["scale"] + norm["bias"]) @ out["kernel"] + out["bias"]
    np.testing.assert_allclose(
        z @ np.asarray(found["unembed_weight"]) + float(found["unembed_bias"]),
        direct[:, 0],
        rtol=1e-4,
        atol=1e-5,
    )


def test_structure_of_a_checkpoint(params, sequences):
    batch = {name: sequences[name] for name in ("x", "y")}
    found = structure.Structure(MODEL)(0, params, batch)
    assert found["attention_entropy"].shape == (2, 2, 7)
    squares = sum(float(np.sum(np.square(x, dtype=np.float64))) for x in jax.tree.leaves(params))
    assert found["weight_norm"] == pytest.approx(math.sqrt(squares), rel=1e-6)
    # The last token: no prediction depends on it, and the attention measured neither.
    assert "lapack" not in jax.jit(structure.Structure(MODEL)).lower(0, params, batch).as_text()
    other = structure.Structure(MODEL)(0, params, batch | {"y": batch["y"].at[:, -1].add(9.0)})
    np.testing.assert_allclose(other["attention_distance"], found["attention_distance"], rtol=1e-5)


# --- over checkpoints, tables -----------------------------------------------------------------


def scaled_sum(step, params, factor):
    return {"sum": factor * sum(jnp.sum(x) for x in jax.tree.leaves(params)), "step": step}


@pytest.mark.parametrize("checkpoint_batch", [1, 2, 4])
def test_a_function_of_every_checkpoint(checkpoint_batch):
    checkpoints = {s: {"w": np.full(3, s, np.float32)} for s in (0, 5, 7, 11, 12)}
    found = dict(
        map_checkpoints(scaled_sum, checkpoints, np.float32(2.0), checkpoint_batch=checkpoint_batch)
    )
    assert list(found) == [0, 5, 7, 11, 12]
    for step, value in found.items():
        assert value["sum"] == 6.0 * step
        assert value["step"] == step
        assert isinstance(value["sum"], np.ndarray | np.generic)


def test_bad_checkpoints_are_refused():
    good = {"w": np.ones(3, np.float32)}
    with pytest.raises(ValueError, match="checkpoints is empty"):
        map_checkpoints(scaled_sum, {}, np.float32(1))
    with pytest.raises(ValueError, match="checkpoint_batch=0"):
        map_checkpoints(scaled_sum, {0: good}, np.float32(1), checkpoint_batch=0)
    with pytest.raises(ValueError, match="do not match"):
        list(map_checkpoints(scaled_sum, {0: good, 1: {"w": np.ones(4, np.float32)}}, 1.0))


def test_tables_name_every_number(params, sequences):
    batch = {name: sequences[name] for name in ("x", "y")}
    found = measured(params, sequences) | structure.Structure(MODEL)(0, params, batch)
    found |= structure.embeddings(params)
    one = datasets.dataset(found, GAINS, structure.layer_norm_names(params))
    both = one.expand_dims(checkpoint=[0]).combine_first(one.expand_dims(checkpoint=[10]))
    table = datasets.behavior_table(both)
    assert list(table.index) == [0, 10]
    assert table.loc[10, "loss_3"] == pytest.approx(float(found["loss"][2]), rel=1e-6)
    assert table.loc[0, "mean_loss"] == pytest.approx(float(found["mean_loss"]), rel=1e-6)
    assert table.loc[0, "loss_2_stderr"] == pytest.approx(float(found["loss_stderr"][1]), rel=1e-6)
    assert table.loc[0, "far_inputs_loss_g10_2"] == pytest.approx(
        float(found["far_inputs_loss"][1, 1]), rel=1e-6
    )
    assert table.loc[0, "norm_small_block_1_mlp_norm"] == float(found["norm_small"][3])
    assert table.loc[0, "icl_4_1"] == pytest.approx(
        float(found["loss"][3] - found["loss"][0]), rel=1e-4
    )
    heads = datasets.attention_table(both)
    assert len(heads) == 2 * 2 * 2 * 2
    row = heads.query("step == 10 and layer == 1 and head == 0 and token == 'y'").iloc[0]
    exact = np.asarray(found["attention_to_self"])[1, 0, 1::2].mean()
    assert row.attention_to_self == pytest.approx(exact, rel=1e-5)
