"""Losses at the anchor: those of single examples, whatever else is in their minibatch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laws import assert_within_4_stderr, sgld

from llc_jax import SGLD, estimate_llc, parallel
from llc_jax.llc import soundness
from llc_jax.sampling import anchors

N, DIM, NBETA, STEP = 96, 3, 50.0, 4e-3
RNG = np.random.default_rng(0)
X = RNG.normal(size=(N, DIM)).astype(np.float32)
ANCHOR = {"w": np.array([1.0, -2.0, 0.5], np.float32)}
EXACT = X @ ANCHOR["w"]
NOISY = (EXACT + 0.3 * RNG.normal(size=N)).astype(np.float32)
BEST = {"w": np.linalg.lstsq(X, NOISY, rcond=None)[0]}
WEIGHT = np.sort(RNG.integers(1, 12, N)).astype(np.float32)  # data in order, as they often come
SENTENCE = "losses depend on the batch"


def squares(params, batch):
    return 0.5 * (batch["x"] @ params["w"] - batch["y"]) ** 2


def counted(params, batch):
    """Sums over tokens divided by the tokens of the batch: each example counts by its length.

    OpenNMT-py, issue 2209, "Incorrect normalization".
    """
    return squares(params, batch) * batch["n"] / jnp.mean(batch["n"])


def contrasted(params, batch):
    """The other targets of the batch are the wrong answers.

    jiawei-ren/BalancedMSE, issue 19, "Is BMC loss OK when batchsize = 1?": the loss is 0 there.
    """
    logits = -0.5 * (batch["x"] @ params["w"][:, None] - batch["y"][None]) ** 2
    return jax.nn.logsumexp(logits, axis=1) - jnp.diagonal(logits)


def standardised(params, batch):
    """Normalised by the batch, as batch norm is in training.

    awslabs/aws-cv-task2vec, issue 23: "Are you sure .train() puts batch norm in eval mode?"
    """
    x = batch["x"]
    x = (x - x.mean(axis=0, keepdims=True)) / x.std(axis=0, keepdims=True)
    return squares(params, {**batch, "x": x})


def dropped(params, batch):
    """The same mask for every batch: an example loses what its place in the batch says."""
    kept = jax.random.bernoulli(jax.random.key(3), 0.8, batch["x"].shape)
    return squares(params, {**batch, "x": jnp.where(kept, batch["x"] / 0.8, 0)})


def ranked(params, batch):
    """The hardest half counts."""
    losses = squares(params, batch)
    return jnp.where(losses >= jnp.median(losses), 2 * losses, 0)


def estimate(loss_fn, y, batch_size=8, params=None, step_size=STEP):
    return estimate_llc(
        jax.random.key(0), loss_fn, params or ANCHOR, {"x": X, "y": y, "n": WEIGHT},
        sampler=SGLD(step_size), nbeta=NBETA, localization=1.0, batch_size=batch_size,
        num_chains=4, num_draws=500, num_burnin=100,
    )  # fmt: skip


def labels(estimate):
    return [label for label, _ in estimate.findings]


@pytest.mark.parametrize("loss_fn", [counted, contrasted, standardised, dropped])
def test_losses_of_a_batch_are_told_from_losses_of_examples(loss_fn):
    assert SENTENCE in labels(estimate(loss_fn, NOISY))


@pytest.mark.parametrize("loss_fn", [counted, ranked])
def test_an_anchor_without_a_loss_says_nothing_of_company_so_a_point_beside_it_does(loss_fn):
    found = estimate(loss_fn, EXACT)
    assert found.sound.anchor.init_loss < 1e-12
    assert found.sound.anchor.company_share > 0.05
    assert SENTENCE in labels(found)


def test_losses_of_examples_are_not_accused():
    h = np.linalg.eigvalsh(X.T.astype(float) @ X / N)
    for y, params, batch_size in ((NOISY, BEST, None), (EXACT, ANCHOR, 24)):
        found = estimate(squares, y, batch_size, params)
        assert SENTENCE not in labels(found)
        assert found.sound.anchor.company_share == 0.0
        if batch_size is None:
            moments = [sgld(STEP, NBETA * each + 1.0).variance() for each in h]
            assert_within_4_stderr(found.mean, NBETA / 2 * h @ moments, found.stderr)


def test_the_full_batch_is_its_own_company():
    """With all of the data in every batch the mean loss is a function of the weights alone."""
    assert SENTENCE not in labels(estimate(dropped, NOISY, batch_size=None))


def test_noise_from_outside_of_jax_is_found_in_a_full_batch_too():
    def noisy(params, batch):
        shape = jax.ShapeDtypeStruct(batch["y"].shape, jnp.float32)
        noise = jax.pure_callback(
            lambda v: RNG.normal(size=v.shape).astype(np.float32), shape, batch["y"],
            vmap_method="sequential",
        )  # fmt: skip
        return squares(params, batch) + noise

    # How large the company of an example looks beside the error is left to the noise.
    found = estimate(noisy, NOISY, batch_size=None)
    assert {SENTENCE, "gradient is not that of the loss"} & set(labels(found))


def test_each_loss_is_that_of_its_example_and_again_in_other_company():
    data = {"x": X, "y": NOISY}
    again = anchors.rows_again(N, 32, 8)
    losses, more = anchors.losses_at(
        {"w": np.stack([ANCHOR["w"], BEST["w"]])}, data, again,
        loss_fn=squares, mesh=parallel.make_mesh(2, 1),
    )  # fmt: skip
    np.testing.assert_allclose(losses[1], squares(BEST, data), rtol=1e-5)
    assert more.shape == (2, 3, anchors.NUM_AGAIN, 8)
    np.testing.assert_allclose(more[:, 0], np.asarray(losses)[:, again], rtol=1e-5)
    np.testing.assert_allclose(more[:, 1], more[:, 2], rtol=1e-5)
    assert np.all(np.abs(more[0, 1] - more[0, 0]) > 0)


def test_other_company_moves_every_minibatch_and_the_full_batch_never():
    order = anchors.other_company(4, 8)
    assert sorted(order) == list(range(32))
    assert all(len({i // 8 for i in part}) > 1 for part in order.reshape(4, 8))
    assert anchors.rows_again(N, N, N // 2).tolist() == [list(range(N // 2))]
    assert anchors.other_company(1, 5).tolist() == list(range(5))


def test_company_is_the_change_of_the_mean_in_units_of_the_loss():
    losses = np.arange(1.0, 7.0, dtype=np.float32)
    rows = np.array([[0, 1], [2, 3]])
    here = losses[rows]
    beside = here + 2
    moved = beside + np.array([[0.5, -0.5], [0.3, 0.1]], np.float32)  # means by 0 and 0.2
    again = np.stack([here + 0.4, beside, moved]).astype(np.float32)
    found = soundness.anchor_of(losses, again, rows, np.float32)
    assert found.company == pytest.approx(0.4, rel=1e-5)
    assert found.company_share == pytest.approx(np.sqrt(0.02) / 1.6, rel=1e-5)
    same = np.stack([here, beside, beside])
    found = soundness.anchor_of(losses, same, rows, np.float32)
    assert (found.company, found.company_share) == (0.0, 0.0)
