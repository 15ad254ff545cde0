"""The paper's attention-only language model, in Flax Linen.

Architecture: Hoogland et al. 2024, arXiv 2402.02364. 3,355,016 parameters at the default sizes.
Letters: B sequences, L tokens, V vocabulary, C model width, H heads, N = C/H head width; M is L on
the attended side. Weights have the paper's names (W_E, W_pos, W_Q, W_K, W_V, W_O, W_U, b_...), and
those of a head lie together: `params["block_0"]["attention"]["W_Q"][h]` is [C, N].
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from llc_jax.inputs import checks
from llc_jax.types import Params

POSITIONS = ("shortformer", "learned")
_LAYER_NORM_EPSILON = 1e-5


def _layer_norm(name: str | None = None) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=_LAYER_NORM_EPSILON, use_fast_variance=False, name=name)


def _in_float32(norm: nn.LayerNorm, x: jax.Array) -> jax.Array:
    return norm(x.astype(jnp.float32)).astype(x.dtype)


def _affine(x: jax.Array, weight: jax.Array, bias: jax.Array, dtype: Any) -> jax.Array:
    """Returns x @ weight + bias in `dtype`, [B, L, out]; the product is in the dtype of x."""
    # One axis for all tokens: with two, XLA on CPU transposes both factors of a weight's gradient,
    # which at V = 5000 doubles the time of the whole unembedding (measured, jax 0.10.2).
    product = x.reshape(-1, x.shape[-1]) @ weight.astype(x.dtype)
    return (product.astype(dtype) + bias.astype(dtype)[None]).reshape(*x.shape[:-1], -1)


class CausalAttention(nn.Module):
    """Multi-head causal self-attention with biases.

    Attributes:
      num_heads: H; must divide the width of the input.
      init_std: standard deviation of fresh matrices.
    """

    num_heads: int
    init_std: float

    @nn.compact
    def __call__(self, x_BxLxC: jax.Array, position_LxC: jax.Array | None) -> jax.Array:
        """Returns the sum of the heads' outputs, [B, L, C].

        Args:
          x_BxLxC: normalised residual stream; its dtype is that of the computation.
          position_LxC: added to the inputs of queries and keys, not of values; None adds nothing.
        """
        batch, length, width = x_BxLxC.shape
        head_width = width // self.num_heads
        dtype = x_BxLxC.dtype
        qk_input_BxLxC = x_BxLxC if position_LxC is None else x_BxLxC + position_LxC[None]

        def project(name: str, input_BxLxC: jax.Array) -> jax.Array:
            weight_HxCxN = self._matrix(f"W_{name}", (self.num_heads, width, head_width))
            bias_HxN = self._bias(f"b_{name}", (self.num_heads, head_width))
            weight_CxC = weight_HxCxN.swapaxes(0, 1).reshape(width, width)
            out_BxLxC = _affine(input_BxLxC, weight_CxC, bias_HxN.reshape(-1), dtype)
            return out_BxLxC.reshape(batch, length, self.num_heads, head_width)

        q_BxLxHxN = project("Q", qk_input_BxLxC) / math.sqrt(head_width)
        k_BxMxHxN = project("K", qk_input_BxLxC)
        v_BxMxHxN = project("V", x_BxLxC)
        logits_BxHxLxM = jnp.einsum("blhn,bmhn->bhlm", q_BxLxHxN, k_BxMxHxN).astype(jnp.float32)
        causal_LxM = jnp.tril(jnp.ones((length, length), bool))
        logits_BxHxLxM = jnp.where(causal_LxM[None, None], logits_BxHxLxM, -jnp.inf)
        attention_BxHxLxM = nn.softmax(logits_BxHxLxM, axis=-1)
        self.sow("intermediates", "attention", attention_BxHxLxM)
        mixed_BxLxHxN = jnp.einsum("bhlm,bmhn->blhn", attention_BxHxLxM.astype(dtype), v_BxMxHxN)
        weight_CxC = self._matrix("W_O", (self.num_heads, head_width, width)).reshape(width, width)
        bias_C = self._bias("b_O", (width,))
        return _affine(mixed_BxLxHxN.reshape(x_BxLxC.shape), weight_CxC, bias_C, dtype)

    def _matrix(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        return self.param(name, nn.initializers.normal(self.init_std), shape)

    def _bias(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        return self.param(name, nn.initializers.zeros, shape)


class Block(nn.Module):
    """Pre-norm block without an MLP: x + attention(LN x).

    Attributes:
      num_heads: H.
      init_std: standard deviation of fresh matrices.
    """

    num_heads: int
    init_std: float

    @nn.compact
    def __call__(self, x_BxLxC: jax.Array, position_LxC: jax.Array | None) -> jax.Array:
        """Returns the residual stream after the block, [B, L, C]; see `CausalAttention`."""
        normed_BxLxC = _in_float32(_layer_norm("attention_norm"), x_BxLxC)
        attention = CausalAttention(self.num_heads, self.init_std, name="attention")
        return x_BxLxC + attention(normed_BxLxC, position_LxC)


class AttentionOnlyTransformer(nn.Module):
    """Decoder-only attention-only transformer. Equal fields make equal, hashable models.

    Attributes:
      num_layers: blocks.
      num_heads: H.
      d_model: C, width of the residual stream, a multiple of `num_heads`.
      vocab_size: V.
      context: the longest sequence, in tokens.
      positions: where the learned positions W_pos [context, C] enter. "shortformer", the published
        model: the inputs of queries and keys in every layer, after the layer norm, and nothing
        else. "learned": the residual stream, once, beside the embedding.
      init_scale: fresh matrices are N(0, init_scale²/C); biases are 0, scales 1.
      dtype: of the computation, float32 or bfloat16; params, layer norms, softmax and the returned
        logits are float32.
      remat: keep only the residual stream between blocks for the backward pass and recompute the
        rest, about a third more time. For accelerators: on CPU, XLA recomputes and saves nothing.
    """

    num_layers: int = 2
    num_heads: int = 8
    d_model: int = 256
    vocab_size: int = 5000
    context: int = 1024
    positions: str = "shortformer"
    init_scale: float = 0.8
    dtype: Any = jnp.float32
    remat: bool = False

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "d_model", "vocab_size", "context"):
            checks.at_least(name, getattr(self, name), 1)
        checks.nonnegative("init_scale", self.init_scale)
        if self.d_model % self.num_heads:
            raise ValueError(
                f"d_model={self.d_model} must be a multiple of "
                f"num_heads={self.num_heads}, since heads share the width equally."
            )
        if self.positions not in POSITIONS:
            raise ValueError(f"positions={self.positions!r}: choose one of {POSITIONS}.")
        if jnp.dtype(self.dtype) not in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
            raise ValueError(f"dtype={self.dtype!r}: give jnp.float32 or jnp.bfloat16.")
        super().__post_init__()

    def setup(self) -> None:
        """Declares the parameters, which two methods share."""
        std = self.init_scale / math.sqrt(self.d_model)
        normal, width = nn.initializers.normal(std), self.d_model
        self.W_E = self.param("W_E", normal, (self.vocab_size, width))
        self.W_pos = self.param("W_pos", normal, (self.context, width))
        block = nn.remat(Block) if self.remat else Block
        self.block = [block(self.num_heads, std) for _ in range(self.num_layers)]
        self.final_norm = _layer_norm()
        self.W_U = self.param("W_U", normal, (width, self.vocab_size))
        self.b_U = self.param("b_U", nn.initializers.zeros, (self.vocab_size,))

    def __call__(self, tokens_BxL: jax.Array) -> jax.Array:
        """Maps token ids, integers [B, L], to logits of the next token, float32 [B, L, V].

        Ids outside the vocabulary are refused where their values are known; under `jit` they turn
        the whole sequence to NaN.
        """
        return self.unembed(self.residual(tokens_BxL))

    def residual(self, tokens_BxL: jax.Array) -> jax.Array:
        """Returns the residual stream after the final norm, [B, L, C] in the model's dtype."""
        check_tokens(self, tokens_BxL)
        # A gather, although its gradient is a scatter: on CPU a one-hot product took 9 to 28 times
        # as long, forward and backward, alone and vmapped over 4 models (V = 1000 and 5000, 2,048
        # tokens); at the published size it would cost two thirds of what the unembedding does.
        ids_BxL = jnp.asarray(tokens_BxL).astype(jnp.uint32)  # -1 is outside, not the last id
        x_BxLxC = jnp.take(self.W_E, ids_BxL, axis=0, mode="fill").astype(self.dtype)
        position_LxC = self.W_pos[: ids_BxL.shape[1]].astype(self.dtype)
        if self.positions == "learned":
            x_BxLxC, position_LxC = x_BxLxC + position_LxC[None], None
        for block in self.block:
            x_BxLxC = block(x_BxLxC, position_LxC)
        return _in_float32(self.final_norm, x_BxLxC)

    def unembed(self, x_BxLxC: jax.Array) -> jax.Array:
        """Maps the residual stream after the final norm to logits, float32 [B, L, V]."""
        return _affine(x_BxLxC, self.W_U, self.b_U, jnp.float32)


def check_tokens(model: AttentionOnlyTransformer, tokens: jax.Array) -> None:
    """Checks tokens [B, L] against the model: shape, dtype, and values unless they are traced."""
    shape, dtype = np.shape(tokens), jnp.result_type(tokens)
    if len(shape) != 2 or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"tokens of shape {shape} and dtype {dtype}: give integers [B, L].")
    if not 1 <= shape[1] <= model.context:
        raise ValueError(
            f"tokens of shape {shape} must be [B, L] with L from 1 to context={model.context};"
            " cut the sequences, or build the model with a longer context."
        )
    if isinstance(tokens, jax.core.Tracer) or 0 in shape:
        return
    low, high = int(np.min(tokens)), int(np.max(tokens))
    if low < 0 or high >= model.vocab_size:
        raise ValueError(
            f"tokens run from {low} to {high}, outside 0 to {model.vocab_size - 1}: build the model"
            " with the vocab_size of the tokenizer."
        )


@functools.partial(jax.jit, static_argnames="model")  # op by op it would run the whole network
def init_params(rng_key: jax.Array, model: AttentionOnlyTransformer) -> Params:
    """Returns fresh float32 parameters as a plain nested dict; consumes `rng_key`."""
    return model.init(rng_key, jnp.zeros((1, 1), jnp.int32))["params"]


def attention(model: AttentionOnlyTransformer, params: Params, tokens: jax.Array) -> jax.Array:
    """Returns the attention patterns, float32 [B, layer, H, L, L]; the last axis sums to 1.

    Args:
      model: the network.
      params: plain nested dict of `init_params`.
      tokens: integers [B, L]; entry [b, i, h, l, m] is the weight of token m for position l.
    """
    _, state = model.apply({"params": params}, tokens, method="residual", mutable=["intermediates"])
    sown = state["intermediates"]
    layers = [sown[f"block_{i}"]["attention"]["attention"][0] for i in range(model.num_layers)]
    return jnp.stack(layers, axis=1)


def ablate_positions(params: Params) -> Params:
    """Returns the parameters with W_pos = 0, which removes positions from every layer."""
    return {**params, "W_pos": jnp.zeros_like(params["W_pos"])}
