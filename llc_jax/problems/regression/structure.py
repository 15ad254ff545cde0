"""How the weights of the regression transformer are built: attention, embeddings, norms.

Source: Hoogland et al. 2024, arXiv 2402.02364, sections on structure. Letters: L blocks, H heads,
T tokens attended from, S attended to, B sequences, C width, N layer norms.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llc_jax.problems.regression.data import to_tokens
from llc_jax.problems.regression.model import RegressionTransformer
from llc_jax.types import Batch, Params

HARD = 1e-3  # attention at most this counts as none
SMALL = 0.1  # a scale of a layer norm below this counts as collapsed


@dataclasses.dataclass(frozen=True)
class Structure:
    """`function(step, params, batch)` for `llc_jax.checkpoint_map.map_checkpoints`.

    Attributes:
      model: the transformer.
    """

    model: RegressionTransformer

    def __call__(self, step: jax.Array, params: Params, batch: Batch) -> dict[str, jax.Array]:
        """Measures one checkpoint.

        Args:
          step: not used.
          params: of the checkpoint.
          batch: {"x": [B, K, D], "y": [B, K]}; the last token, which no output depends on, is
            left out of the attention.

        Returns:
          attention_entropy, ... [L, H, T]: see `attention_statistics`, T = 2K - 1.
          The fields of `layer_norms` and `unembedding`, and weight_norm, the Euclidean norm of all
          weights. Not those of `embeddings`, which is for the host: LAPACK within a program for
          several CPU devices can deadlock.
        """
        attention = attention_patterns(self.model, params, batch)[..., :-1, :-1]
        heads = jax.vmap(attention_statistics)(attention)
        return {
            **{f"attention_{name}": value for name, value in heads.items()},
            **layer_norms(params),
            **unembedding(params),
            "weight_norm": optax.tree.norm(params),
        }


def attention_patterns(model: RegressionTransformer, params: Params, batch: Batch) -> jax.Array:
    """Returns the attention of every head, float32 [L, B, H, T, S]; rows sum to 1."""
    _, state = model.apply({"params": params}, to_tokens(batch), mutable=["intermediates"])
    kept = state["intermediates"]
    found = [kept[f"block_{i}"]["attention"]["attention"][0] for i in range(model.num_layers)]
    return jnp.stack(found).astype(jnp.float32)


def attention_statistics(attention: jax.Array) -> dict[str, jax.Array]:
    """Says where the heads of a layer look, by the token they look from.

    Args:
      attention: [B, H, T, T] causal, rows sum to 1. Below, α_kj is that from token k to j <= k,
        both counted from 0.

    Returns:
      Means over sequences, [H, T]; nan where a token has nothing to choose from:
      entropy: of α_k, over log(k + 1): 0 for one token, 1 for all of them alike.
      variability: half the mean of Σ_j |α_kj - mean α_kj|, the total variation distance to the
        mean pattern: 0 if the pattern does not depend on the sequence.
      distance: Σ_j (k - j) α_kj / k: 0 for itself, 1 for the first token. The published code has
        Σ_j j α_kj / (k + 1) instead, which is (1 - distance) k / (k + 1).
      hardness: share of j <= k with α_kj <= 0.001.
      to_self: α_kk.
      to_previous: α_k,k-1.
      to_x_tokens: Σ α_kj over even j, the x-tokens.
    """
    length = attention.shape[-1]
    token = jnp.arange(length, dtype=jnp.float32)
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
    behind_TxS, first, count = token[:, None] - token[None], (token == 0)[None], (token + 1)[None]
    plogp = jax.scipy.special.xlogy(attention, attention)
    entropy = -plogp.sum(axis=-1).mean(axis=0) / jnp.where(first, 1.0, jnp.log(count))
    mean = attention.mean(axis=0)
    behind = jnp.sum(behind_TxS[None] * mean, axis=-1) / jnp.where(first, 1.0, count - 1)
    previous = jnp.diagonal(mean, offset=-1, axis1=-2, axis2=-1)
    nothing = jnp.full((*previous.shape[:-1], 1), jnp.nan)
    hard = jnp.sum((attention <= HARD) & causal, axis=-1, dtype=jnp.float32).mean(axis=0) / count
    return {
        "entropy": jnp.where(first, jnp.nan, entropy),
        "variability": jnp.abs(attention - mean[None]).sum(axis=-1).mean(axis=0) / 2,
        "distance": jnp.where(first, jnp.nan, behind),
        "hardness": hard,
        "to_self": jnp.diagonal(mean, axis1=-2, axis2=-1),
        "to_previous": jnp.concatenate([nothing, previous], axis=-1),
        "to_x_tokens": mean[..., ::2].sum(axis=-1),
    }


def embeddings(params: Params) -> dict[str, np.ndarray]:
    """Says how many dimensions the embeddings use, and whether they share them; on the host.

    Returns:
      token_singular_values [D + 1] and position_singular_values [2K], decreasing: a matrix that
        has collapsed has few that matter.
      embedding_overlap [D + 1]: share of the length of each column of the token embedding that
        lies in the space spanned by the position embeddings; about sqrt(2K / C) for unrelated
        ones.
    """
    token_ExC, position_TxC = (
        np.asarray(x, np.float64)
        for x in (params["token_embed"]["kernel"], params["position_embed"])
    )
    _, values_T, basis_TxC = np.linalg.svd(position_TxC, full_matrices=False)
    # What float32 weights cannot tell from 0.
    spanned = values_T > np.finfo(np.float32).eps * max(position_TxC.shape) * values_T[0]
    inside_ExT = token_ExC @ basis_TxC[spanned].T
    return {
        "token_singular_values": np.linalg.svd(token_ExC, compute_uv=False),
        "position_singular_values": values_T,
        "embedding_overlap": np.linalg.norm(inside_ExT, axis=-1)
        / np.linalg.norm(token_ExC, axis=-1),
    }


def layer_norms(params: Params) -> dict[str, jax.Array]:
    """Collects the layer norms in the order of `layer_norm_names`.

    Returns:
      norm_scale, norm_bias [N, C], and norm_small [N]: share of |scale| < 0.1, whose channels
      carry next to nothing.
    """
    norms = [_at(params, name) for name in layer_norm_names(params)]
    scale = jnp.stack([norm["scale"] for norm in norms])
    return {
        "norm_scale": scale,
        "norm_bias": jnp.stack([norm["bias"] for norm in norms]),
        "norm_small": jnp.mean(jnp.abs(scale) < SMALL, axis=-1),
    }


def layer_norm_names(params: Params) -> list[str]:
    """Names of the N layer norms, from input to output, e.g. `block_0/attention_norm`."""
    blocks = [name for name in params if name.startswith("block_")]
    inner = [
        f"block_{i}/{kind}" for i in range(len(blocks)) for kind in ("attention_norm", "mlp_norm")
    ]
    return [*inner, "final_norm"]


def unembedding(params: Params) -> dict[str, jax.Array]:
    """The map from the normalised stream to the prediction, of which one row is used.

    Returns:
      unembed_weight [C]: row 0 times the scale of the last norm; unembed_bias: row 0 times its
      bias, plus the bias of the output.
    """
    row_C, norm = params["unembed"]["kernel"][:, 0], params["final_norm"]
    return {
        "unembed_weight": row_C * norm["scale"],
        "unembed_bias": row_C @ norm["bias"] + params["unembed"]["bias"][0],
    }


def _at(params: Params, path: str) -> Params:
    for name in path.split("/"):
        params = params[name]
    return params
