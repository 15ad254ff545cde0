"""The paper's transformer for in-context linear regression, in Flax Linen.

Architecture: Hoogland et al. 2024, arXiv 2402.02364. 51,717 parameters at the default sizes.
Letters: B sequences, T = 2K tokens, K examples, E = D+1 token width, C model width, F MLP width,
H heads, N = C/H head width; S is T on the attended side.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from llc_jax.inputs import checks
from llc_jax.problems.regression.data import to_tokens
from llc_jax.types import Batch, Params

_LAYER_NORM_EPSILON = 1e-5


def _uniform(fan_in: int):
    """Initializer U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the default of torch's `Linear`."""
    bound = 1 / math.sqrt(fan_in)

    def init(rng_key, shape, dtype=jnp.float32):
        return jax.random.uniform(rng_key, shape, dtype, minval=-bound, maxval=bound)

    return init


def _linear(fan_in: int, features: int, *, use_bias: bool, name: str) -> nn.Dense:
    # The bias shares the bound of its kernel, which Linen's bias_init cannot see: pass fan_in.
    return nn.Dense(
        features,
        use_bias=use_bias,
        kernel_init=_uniform(fan_in),
        bias_init=_uniform(fan_in),
        name=name,
    )


def _layer_norm(name: str) -> nn.LayerNorm:
    # E[x^2] - E[x]^2 cancels when the mean is large, which a doubled residual stream invites.
    return nn.LayerNorm(epsilon=_LAYER_NORM_EPSILON, use_fast_variance=False, name=name)


class CausalAttention(nn.Module):
    """Multi-head causal self-attention without biases; q, k, v are adjacent within a head.

    Attributes:
      num_heads: H; must divide the width of the input.
    """

    num_heads: int

    @nn.compact
    def __call__(self, x_BxTxC: jax.Array) -> jax.Array:
        """Returns the mixed values after the output projection, [B, T, C]."""
        batch, length, width = x_BxTxC.shape
        head_width = width // self.num_heads
        qkv_BxTx3C = _linear(width, 3 * width, use_bias=False, name="qkv")(x_BxTxC)
        qkv_BxTxHx3xN = qkv_BxTx3C.reshape(batch, length, self.num_heads, 3, head_width)
        q_BxTxHxN, k_BxSxHxN, v_BxSxHxN = (qkv_BxTxHx3xN[..., i, :] for i in range(3))
        logits_BxHxTxS = jnp.einsum("bthn,bshn->bhts", q_BxTxHxN, k_BxSxHxN)
        logits_BxHxTxS = logits_BxHxTxS.astype(jnp.float32) / math.sqrt(head_width)
        causal_TxS = jnp.tril(jnp.ones((length, length), bool))
        logits_BxHxTxS = jnp.where(causal_TxS[None, None], logits_BxHxTxS, -jnp.inf)
        attention_BxHxTxS = nn.softmax(logits_BxHxTxS, axis=-1).astype(v_BxSxHxN.dtype)
        self.sow("intermediates", "attention", attention_BxHxTxS)
        mixed_BxTxHxN = jnp.einsum("bhts,bshn->bthn", attention_BxHxTxS, v_BxSxHxN)
        mixed_BxTxC = mixed_BxTxHxN.reshape(batch, length, width)
        return _linear(width, width, use_bias=False, name="out")(mixed_BxTxC)


class MLP(nn.Module):
    """Linear, ReLU, Linear.

    Attributes:
      d_mlp: F, width of the hidden layer.
    """

    d_mlp: int

    @nn.compact
    def __call__(self, x_BxTxC: jax.Array) -> jax.Array:
        """Returns an array of the input's shape, [B, T, C]."""
        width = x_BxTxC.shape[-1]
        h_BxTxF = nn.relu(_linear(width, self.d_mlp, use_bias=True, name="up")(x_BxTxC))
        return _linear(self.d_mlp, width, use_bias=True, name="down")(h_BxTxF)


class Block(nn.Module):
    """Pre-norm block: a = x + attn(LN x), then b = a + mlp(LN a).

    Attributes:
      num_heads: H.
      d_mlp: F.
      double_residual: add x once more to b, see `RegressionTransformer`.
    """

    num_heads: int
    d_mlp: int
    double_residual: bool

    @nn.compact
    def __call__(self, x_BxTxC: jax.Array) -> jax.Array:
        """Returns the residual stream after the block, [B, T, C]."""
        a_BxTxC = x_BxTxC + CausalAttention(self.num_heads, name="attention")(
            _layer_norm("attention_norm")(x_BxTxC)
        )
        b_BxTxC = a_BxTxC + MLP(self.d_mlp, name="mlp")(_layer_norm("mlp_norm")(a_BxTxC))
        return x_BxTxC + b_BxTxC if self.double_residual else b_BxTxC


class RegressionTransformer(nn.Module):
    """Decoder-only transformer on real-valued tokens. Equal fields make equal, hashable models.

    Attributes:
      num_layers: blocks.
      num_heads: H.
      d_model: C, width of the residual stream, a multiple of `num_heads`.
      d_mlp: F.
      num_examples: K; the context is 2K tokens.
      dim: D, input dimension of the task.
      double_residual: True reproduces the published runs, whose blocks add their input twice:
        x <- 2x + attn + mlp; False is the textbook block that the paper describes.
    """

    num_layers: int = 2
    num_heads: int = 4
    d_model: int = 64
    d_mlp: int = 64
    num_examples: int = 8
    dim: int = 4
    double_residual: bool = False

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "d_model", "d_mlp", "num_examples", "dim"):
            checks.at_least(name, getattr(self, name), 1)
        if self.d_model % self.num_heads:
            raise ValueError(
                f"d_model={self.d_model} must be a multiple of "
                f"num_heads={self.num_heads}, since heads share the width equally."
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, tokens_BxTxE: jax.Array) -> jax.Array:
        """Maps tokens [B, T, D+1] with T <= 2K to outputs of the same shape."""
        length, width = tokens_BxTxE.shape[1:]
        context = 2 * self.num_examples
        if length > context or width != self.dim + 1:
            raise ValueError(
                f"tokens of shape {tokens_BxTxE.shape} must be [B, T <= {context}, "
                f"{self.dim + 1}] for num_examples={self.num_examples}, dim={self.dim}; "
                "build the model with the num_examples and dim of the task."
            )
        x_BxTxC = _linear(width, self.d_model, use_bias=False, name="token_embed")(tokens_BxTxE)
        # The published code applies a Linear to one-hot positions: fan_in is the context length.
        position_TxC = self.param("position_embed", _uniform(context), (context, self.d_model))
        x_BxTxC = x_BxTxC + position_TxC[None, :length]
        for i in range(self.num_layers):
            block = Block(self.num_heads, self.d_mlp, self.double_residual, name=f"block_{i}")
            x_BxTxC = block(x_BxTxC)
        x_BxTxC = _layer_norm("final_norm")(x_BxTxC)
        return _linear(self.d_model, width, use_bias=True, name="unembed")(x_BxTxC)


@functools.partial(jax.jit, static_argnames="model")  # op by op it would run the whole network
def init_params(rng_key: jax.Array, model: RegressionTransformer) -> Params:
    """Returns fresh float32 parameters as a plain nested dict; consumes `rng_key`."""
    tokens = jnp.zeros((1, 2 * model.num_examples, model.dim + 1))
    return model.init(rng_key, tokens)["params"]


def predictions(model: RegressionTransformer, params: Params, batch: Batch) -> jax.Array:
    """Predicts y_k from x_1, y_1, ..., x_k: component 0 of the output at each x-token.

    Args:
      model: the network.
      params: plain nested dict of `init_params`.
      batch: {"x": [B, K, D], "y": [B, K]}; y_k and later entries do not affect prediction k.

    Returns:
      Predictions, float32 [B, K].
    """
    outputs_BxTxE = model.apply({"params": params}, to_tokens(batch))
    return outputs_BxTxE[:, ::2, 0]
