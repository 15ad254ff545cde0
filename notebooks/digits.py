"""A digit classifier of another program as a problem: what the experiments need to know of it.

    python -m experiments.estimate_llc --problem=notebooks/digits.py --workdir=runs/digits

`own_model.ipynb` trains it, in Flax NNX with Optax, and says what each line is for.
"""

import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import llc_jax.problems
from llc_jax.storage import foreign

HERE = pathlib.Path(__file__).parent
CHECKPOINTS = os.environ.get("DIGITS", HERE.parent / "runs" / "digits" / "mine")


class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 24, rngs=rngs)
        self.out = nnx.Linear(24, 10, rngs=rngs)

    def __call__(self, x):
        return self.out(nnx.relu(self.hidden(x)))


def data():
    found = load_digits()
    return {"x": np.float32(found.data / 16), "y": np.int32(found.target)}


GRAPH, WEIGHTS = nnx.split(nnx.eval_shape(lambda: Classifier(nnx.Rngs(0))))


def logits(params, x):
    state = jax.tree.map(lambda x: x, WEIGHTS)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(GRAPH, state)(x)


def loss_fn(params, batch):  # one number for each example
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch["x"]), batch["y"])


@jax.jit
def accuracy_by_digit(params):
    batch = data()
    right = jnp.argmax(logits(params, batch["x"]), axis=-1) == batch["y"]
    return jnp.stack([jnp.mean(right, where=batch["y"] == digit) for digit in range(10)])


PROBLEM = llc_jax.problems.Problem(
    name="digits",
    loss_fn=loss_fn,
    data=data,
    checkpoints=lambda: foreign.open_folder(CHECKPOINTS),
    metrics={
        "accuracy": lambda params: accuracy_by_digit(params).mean(),
        "by_digit": accuracy_by_digit,
    },
    presets={
        "quickstart": {
            "step_size": 1e-4, "nbeta": 0.0, "localization": 100.0, "num_draws": 150,
            "num_burnin": 100, "batch_size": 64,
        },
    },
)  # fmt: skip
