"""The published setting: what the authors' runs recorded, reproduced (arXiv 2402.02364).

The constants of the setting that need no sampling are checked where they live: the parameter
count in test_regression_model, the learning rate in test_train, the losses of predicting zero and
of ridge regression in test_regression_data.
"""

import math

import jax
import pytest

import llc_jax
from experiments import estimate_llc, train_regression
from experiments.training import schedule
from llc_jax.problems.regression.data import RegressionBatches
from llc_jax.problems.regression.losses import RegressionLoss
from llc_jax.problems.regression.model import init_params
from llc_jax.problems.regression.problem import setting

RECORDED_LOSS = 4.43  # mean SGLD loss at every recorded checkpoint up to step 50,000 ...
RECORDED_SPREAD = 0.02  # ... and how much it varies between them


def test_paper_presets_are_the_published_settings():
    training = train_regression.PRESETS["paper"]
    sweep = estimate_llc.PRESETS["paper"]
    assert (training.num_steps, training.batch_size, training.learning_rate) == (500_000, 256, 3e-3)
    assert training.double_residual
    assert len(schedule(training)) == 191
    assert (sweep.step_size, sweep.nbeta, sweep.localization) == (3e-4, 66.67, 6.67)
    assert (sweep.num_data, sweep.batch_size, sweep.num_chains) == (2**20, 1024, 10)
    assert sweep.num_burnin + sweep.num_draws == 5000


@pytest.mark.slow
def test_hot_sampling_from_a_fresh_initialisation():
    """SGLD at the published settings ends at the recorded loss and spread out to sqrt(d / γ)."""
    model, task = setting(train_regression.PRESETS["paper"])
    published = estimate_llc.PRESETS["paper"]
    params = init_params(jax.random.key(1), model)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    num_burnin, num_draws = 2500, 1000
    estimate = llc_jax.estimate_llc(
        jax.random.key(2),
        RegressionLoss(model),
        params,
        llc_jax.Stream(RegressionBatches(task, 128)),
        sampler=llc_jax.SGLD(published.step_size),
        nbeta=published.nbeta,
        localization=published.localization,
        num_chains=4,
        num_draws=num_draws,
        num_burnin=num_burnin,
        num_probes=0,
    )
    assert estimate.num_finite == 4
    stderr = estimate.stderr / published.nbeta
    assert abs(estimate.losses.mean() - RECORDED_LOSS) < RECORDED_SPREAD + 4 * stderr
    # Almost every direction is flat: a free random walk on a leash, seen between draws B and B + D.
    rate = published.step_size * published.localization
    unspent = (1 - math.exp(-rate * num_draws)) / (rate * num_draws) * math.exp(-rate * num_burnin)
    squared = size / published.localization * (1 - unspent)
    assert math.sqrt(squared) == pytest.approx(88, abs=0.5)
    assert (estimate.distance**2).mean() == pytest.approx(squared, rel=0.02)
