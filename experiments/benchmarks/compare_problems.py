"""The problems of `compare_devinterp`: losses in JAX, weights near a minimum, data, settings.

Step sizes are about 0.4/Λ_max (Λ = nbeta h + γ at the anchor). γ is large enough that the slowest
direction, with 2/(ε γ) steps to forget its start, is in equilibrium within the burn-in: with the
published γ = 1 of deep linear networks no run is stationary, and a standard error means nothing.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from experiments.benchmarks.compare_worker import SHIFT, Stored
from llc_jax.losses import mean_loss
from llc_jax.problems.deep_linear import model as deep_linear
from llc_jax.problems.regression import data as regression
from llc_jax.problems.regression.model import RegressionTransformer, init_params
from llc_jax.training.optimizers import one_cycle
from llc_jax.types import Batch, LossFn, Params

CHECKED = 8  # examples whose losses the other side must reproduce


class Problem(NamedTuple):
    """One line of the comparison.

    Attributes:
      stored: what both workers read.
      exact: the exact λ̂ of SGLD at these settings, None where it is not known.
      about: model, data and anchor in a few words.
    """

    stored: Stored
    exact: float | None
    about: str


# --- losses -------------------------------------------------------------------------------------


def quadratic_loss(params: Params, batch: Batch) -> jax.Array:
    """Σ h w²/2 for each row h of the batch [B, d]."""
    return 0.5 * jnp.sum(batch["h"] * params["w"][None] ** 2, axis=-1)


def deep_linear_loss(params: Params, batch: Batch) -> jax.Array:
    """`MinibatchLoss` of layers that are named in order."""
    return deep_linear.MinibatchLoss()(tuple(params[name] for name in sorted(params)), batch)


def layer_norm(params: Params, x: jax.Array) -> jax.Array:
    """Layer norm over the last axis of [tokens, C]."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(centred**2, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + 1e-5) * params["scale"][None] + params["bias"][None]


def language_loss(num_heads: int, params: Params, batch: Batch) -> jax.Array:
    """Mean next-token cross entropy of an attention-only transformer.

    Args:
      num_heads: H.
      params: "token_embed" [V, C], "position_embed" [T, C], blocks, "final_norm", "unembed".
      batch: {"tokens": [B, T + 1]}.

    Returns:
      Losses in nats, float32 [B].
    """
    tokens = batch["tokens"]
    x = params["token_embed"][tokens[:, :-1]] + params["position_embed"][None]
    batch_size, length, width = x.shape
    # One axis for all tokens: with two, XLA's gradient of a weight transposes both of its factors.
    x = x.reshape(-1, width)
    causal = jnp.tril(jnp.ones((length, length), bool))
    for name in sorted(name for name in params if name.startswith("block_")):
        block = params[name]
        qkv = layer_norm(block["attention_norm"], x) @ block["attention"]["qkv"]["kernel"]
        qkv = qkv.reshape(batch_size, length, num_heads, 3, width // num_heads)
        q, k, v = (qkv[:, :, :, i] for i in range(3))
        logits = jnp.einsum("bthn,bshn->bhts", q, k) / math.sqrt(width // num_heads)
        weights = jax.nn.softmax(jnp.where(causal[None, None], logits, -jnp.inf), axis=-1)
        mixed = jnp.einsum("bhts,bshn->bthn", weights, v).reshape(x.shape)
        x = x + mixed @ block["attention"]["out"]["kernel"]
    logits = layer_norm(params["final_norm"], x) @ params["unembed"]["kernel"]
    targets = tokens[:, 1:].reshape(-1)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.mean(nats.reshape(batch_size, length), axis=-1)


@functools.cache  # one identity for each set of sizes: the loss is a static argument
def _language(num_heads: int) -> LossFn:
    return functools.partial(language_loss, num_heads)


KINDS: dict[str, Callable[..., LossFn]] = {
    "quadratic": lambda: quadratic_loss,
    "deep_linear": lambda: deep_linear_loss,
    "regression": lambda **sizes: _on_tokens(RegressionTransformer(**sizes)),
    "language": lambda num_layers, num_heads: _language(num_heads),
}
"""kind -> function of `Stored.options` that returns the loss."""


@functools.cache
def _on_tokens(model: RegressionTransformer) -> LossFn:
    def loss(params, batch):
        """`RegressionLoss` on tokens made beforehand, so that neither side makes them again."""
        outputs = model.apply({"params": params}, batch["tokens"])
        return jnp.mean((outputs[:, ::2, 0] - batch["y"]) ** 2, axis=-1)

    return loss


def of_stored(stored: Stored) -> tuple[LossFn, Params, Batch]:
    """The loss, the weights as nested dicts, and the data."""
    params = unflatten_dict({tuple(k.split("/")): x for k, x in stored.params.items()})
    return KINDS[stored.kind](**stored.options), params, dict(stored.data)


def settle(kind: str, options: dict, settings: dict, params: Params, data: Batch) -> Stored:
    """Puts a problem in the form both sides read, with the losses that are checked."""
    flat = {"/".join(k): np.asarray(x, np.float32) for k, x in flatten_dict(params).items()}
    data = {name: np.asarray(x) for name, x in data.items()}
    shifted = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) + SHIFT, params)
    first = {name: x[:CHECKED] for name, x in data.items()}
    check = np.asarray(jax.jit(KINDS[kind](**options))(shifted, first))
    return Stored(kind, options, settings, flat, data, check)


# --- problems -----------------------------------------------------------------------------------


def quadratic(dim: int = 50, num_draws: int = 500, num_burnin: int = 300) -> Problem:
    """A quadratic with eigenvalues from 0.1 to 10, whose λ̂ is known at every step size."""
    h = np.geomspace(0.1, 10.0, dim)
    nbeta, localization = 100.0, 20.0
    step_size = 0.4 / (nbeta * h.max() + localization)
    settings = {
        "step_size": step_size, "nbeta": nbeta, "localization": localization, "batch_size": 1,
        "num_chains": 4, "num_draws": num_draws, "num_burnin": num_burnin,
    }  # fmt: skip
    stored = settle(
        "quadratic", {}, settings, {"w": np.zeros(dim)}, {"h": h[None].astype(np.float32)}
    )
    return Problem(
        stored,
        exact_quadratic(h, step_size, nbeta, localization),
        f"quadratic loss, d = {dim}, no data, w* the minimum",
    )


def exact_quadratic(h: np.ndarray, step_size: float, nbeta: float, localization: float) -> float:
    """λ̂ of full-batch SGLD in equilibrium, ½ Σ nbeta h / (Λ (1 - ε Λ/4)), Λ = nbeta h + γ."""
    rate = nbeta * h + localization
    return float(0.5 * np.sum(nbeta * h / (rate * (1 - step_size * rate / 4))))


def deep_linear_net(
    width: int, num_layers: int, num_draws: int, num_burnin: int, num_data: int = 20_000,
    batch_size: int = 500,
) -> Problem:  # fmt: skip
    """A network at a true parameter of half rank; inputs uniform on [-10, 10], no noise."""
    net = deep_linear.aligned(jax.random.key(0), (width,) * (num_layers + 1), width // 2)
    data = deep_linear.sample_data(jax.random.key(1), jnp.asarray(net.target), num_data)
    nbeta = num_data / math.log(num_data)
    # Curvature at w* is 2 c times at most the number of layers.
    largest = nbeta * 2 * num_layers * deep_linear.UNIFORM_SECOND_MOMENT
    settings = {
        "step_size": 0.4 / largest, "nbeta": nbeta, "localization": largest / 50,
        "batch_size": batch_size, "num_chains": 4, "num_draws": num_draws,
        "num_burnin": num_burnin,
    }  # fmt: skip
    params = {f"layer_{k:02d}": x for k, x in enumerate(net.params)}
    size = sum(x.size for x in net.params)
    return Problem(
        settle("deep_linear", {}, settings, params, data),
        None,
        f"deep linear network, {num_layers} layers of width {width}, rank {width // 2}, {size:,}"
        f" parameters, n = {num_data:,} noiseless pairs, w* a true parameter",
    )


def regression_transformer(
    num_draws: int = 300, num_burnin: int = 200, num_data: int = 16_384, training: int = 1000,
    **sizes: int,
) -> Problem:  # fmt: skip
    """The regression transformer after a short training."""
    model = RegressionTransformer(**sizes)
    task = regression.RegressionTask(dim=model.dim, num_examples=model.num_examples)
    batch = jax.jit(regression.sample_batch, static_argnums=(1, 2))(
        jax.random.key(0), task, num_data
    )
    data = {"tokens": regression.to_tokens(batch), "y": batch["y"]}
    options = {"num_layers": model.num_layers, "num_heads": model.num_heads} | sizes
    params = train(
        KINDS["regression"](**options), init_params(jax.random.key(1), model), data, training, 64
    )
    settings = {
        "step_size": 3e-4, "nbeta": 66.67, "localization": 66.67, "batch_size": 64,
        "num_chains": 4, "num_draws": num_draws, "num_burnin": num_burnin,
    }  # fmt: skip
    size = sum(x.size for x in jax.tree.leaves(params))
    return Problem(
        settle("regression", options, settings, params, data),
        None,
        f"regression transformer, {size:,} parameters, n = {num_data:,} sequences of 16 tokens,"
        f" w* after {training} Adam steps",
    )


def language_model(
    num_draws: int = 150, num_burnin: int = 100, vocabulary: int = 1024, width: int = 128,
    length: int = 64, num_data: int = 4096, training: int = 300,
) -> Problem:  # fmt: skip
    """A two-layer attention-only transformer after a short training on synthetic text."""
    options = {"num_layers": 2, "num_heads": 4}
    data = {"tokens": synthetic_text(vocabulary, length + 1, num_data)}
    start = init_language(jax.random.key(0), vocabulary, width, length, options["num_layers"])
    params = train(KINDS["language"](**options), start, data, training, 32)
    settings = {
        "step_size": 3e-4, "nbeta": 300.0, "localization": 100.0, "batch_size": 16,
        "num_chains": 4, "num_draws": num_draws, "num_burnin": num_burnin,
    }  # fmt: skip
    size = sum(x.size for x in jax.tree.leaves(params))
    return Problem(
        settle("language", options, settings, params, data),
        None,
        f"attention-only transformer, 2 layers, {size:,} parameters, vocabulary {vocabulary:,},"
        f" n = {num_data:,} sequences of {length + 1} tokens, w* after {training} Adam steps",
    )


def synthetic_text(vocabulary: int, length: int, num_data: int) -> np.ndarray:
    """Sequences of a Markov chain in which each token has eight likely successors, int32."""
    rng = np.random.default_rng(0)
    successors = rng.integers(0, vocabulary, (vocabulary, 8))
    odds = 1 / np.arange(1, 9)
    text = np.empty((num_data, length), np.int32)
    text[:, 0] = rng.integers(0, vocabulary, num_data)
    for t in range(1, length):
        choice = rng.choice(8, num_data, p=odds / odds.sum())
        text[:, t] = successors[text[:, t - 1], choice]
    return text


def init_language(rng_key, vocabulary: int, width: int, length: int, num_layers: int) -> Params:
    """Fresh weights of `language_loss`."""
    shapes = {"token_embed": (vocabulary, width), "position_embed": (length, width)}
    shapes["unembed/kernel"] = (width, vocabulary)
    for i in range(num_layers):
        shapes[f"block_{i}/attention/qkv/kernel"] = (width, 3 * width)
        shapes[f"block_{i}/attention/out/kernel"] = (width, width)
    keys = jax.random.split(rng_key, len(shapes))
    flat = {
        name: jax.random.normal(key, shape) / math.sqrt(width)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    for name in ["final_norm"] + [f"block_{i}/attention_norm" for i in range(num_layers)]:
        flat |= {f"{name}/scale": jnp.ones(width), f"{name}/bias": jnp.zeros(width)}
    return unflatten_dict({tuple(name.split("/")): x for name, x in flat.items()})


def train(loss_fn: LossFn, params: Params, data: Batch, num_steps: int, batch_size: int) -> Params:
    """Adam on minibatches, its learning rate rising and falling, as one program."""
    optimizer = optax.adam(one_cycle(3e-3, num_steps))
    n = len(jax.tree.leaves(data)[0])

    @jax.jit
    def run(params, data):
        def step(carry, key):
            params, state = carry
            rows = jax.random.randint(key, (batch_size,), 0, n)
            batch = jax.tree.map(lambda x: x[rows], data)
            grads = jax.grad(lambda p: mean_loss(loss_fn, p, batch))(params)
            updates, state = optimizer.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(2), num_steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to an integer count
        return run(params, jax.tree.map(jnp.asarray, data))


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "quadratic-50": functools.partial(quadratic, 50),
    "quadratic-1000": functools.partial(quadratic, 1000),
    "dln-1e3": functools.partial(deep_linear_net, 18, 3, 500, 300),
    "dln-1e4": functools.partial(deep_linear_net, 50, 4, 500, 300),
    "dln-1e5": functools.partial(deep_linear_net, 158, 4, 250, 150),
    "dln-1e6": functools.partial(deep_linear_net, 500, 4, 60, 40),
    "regression": regression_transformer,
    "language": language_model,
}
