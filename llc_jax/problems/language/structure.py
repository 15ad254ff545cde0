"""How a language model is built: what heads look at, how they compose, positions, norms.

Source: Hoogland et al. 2024, arXiv 2402.02364, sections on structure; composition is that of
Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits". Letters: B sequences, H and
G heads of an earlier and of a later layer, N their width, C model width, L positions.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llc_jax.inputs import checks
from llc_jax.metrics.averages import mean_over_sequences
from llc_jax.metrics.trajectory import functional_pca
from llc_jax.problems.language.behavior import TOKENS_AT_ONCE
from llc_jax.problems.language.model import AttentionOnlyTransformer, attention
from llc_jax.problems.language.probes import Probes
from llc_jax.types import Batch, Params

_EXACT = jax.lax.Precision.HIGHEST  # accelerators may round float32 products


@dataclasses.dataclass(frozen=True)
class Structure:
    """`function(step, params, probes)` for `llc_jax.checkpoint_map.map_checkpoints`.

    Attributes:
      model: the transformer.
      tokens_at_once: bounds memory: so many tokens, but at least one sequence, per checkpoint.
    """

    model: AttentionOnlyTransformer
    tokens_at_once: int = TOKENS_AT_ONCE

    def __post_init__(self) -> None:
        checks.at_least("tokens_at_once", self.tokens_at_once, 1)

    def __call__(self, step: jax.Array, params: Params, probes: Probes) -> dict[str, jax.Array]:
        """Measures one checkpoint.

        Args:
          step: not used.
          params: of the checkpoint.
          probes: of `metrics.probes.probes`.

        Returns:
          float32:
          previous_token, prefix_matching, induction [layer, H], from 0 to 1, and `<name>_stderr`:
            mean attention of each head, see the functions of `metrics.probes`; `<name>_uniform`:
            of a head that attends to all it can see alike.
          k_composition, q_composition, v_composition [H, G] of heads of the first two layers, see
            `composition`; absent if there is one layer.
          weight_norm: Euclidean norm of all weights; weight_norms [weight]: of each, in the order
            of `weight_names`.
          Not what `position_components` finds, which is for the host: LAPACK within a program for
          several CPU devices can deadlock.
        """
        found = {}
        for name, probe in probes._asdict().items():
            rows = max(1, self.tokens_at_once // probe.tokens.shape[1])
            scores = mean_over_sequences(self._attended(params), probe._asdict(), rows)
            found[name], found[f"{name}_stderr"] = scores["score"], scores["score_stderr"]
            found[f"{name}_uniform"] = jnp.mean(1.0 / (probe.query.astype(jnp.float32) + 1.0))
        if self.model.num_layers > 1:
            found |= composition(params)
        norms = [jnp.linalg.norm(jnp.ravel(weight)) for weight in jax.tree.leaves(params)]
        return found | {
            "weight_norm": optax.tree.norm(params),
            "weight_norms": jnp.stack(norms),
        }

    def _attended(self, params: Params):
        def attended(batch: Batch) -> dict[str, jax.Array]:
            patterns = attention(self.model, params, batch["tokens"])
            return {"score": attended_scores(patterns, batch["query"], batch["key"])}

        return attended


def attended_scores(patterns: jax.Array, query: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the mean attention between pairs of positions, float32 [B, layer, H].

    Args:
      patterns: attention of `models.attention_only.attention`, [B, layer, H, L, L].
      query: positions attended from, integers [B, Q].
      key: positions attended to, integers [B, Q].
    """
    return jax.vmap(lambda x, q, k: x[..., q, k].mean(axis=-1))(patterns, query, key)


def composition(params: Params, early: int = 0, late: int = 1) -> dict[str, jax.Array]:
    """How much of what a head writes is read by the heads of a later layer.

    For K-composition ||W_V W_O W_K W_Q^T|| / (||W_V W_O|| ||W_K W_Q^T||), in Frobenius norms, W_V
    and W_O of the earlier head, W_K and W_Q of the later. Q-composition has W_Q W_K^T in the place
    of W_K W_Q^T, V-composition W_V W_O of the later head. Biases and layer norms do not enter.
    With M = W_O W_K, [N, N], the first norm squared is the trace of M^T (W_V^T W_V) M (W_Q^T W_Q),
    so that no product is [C, C].

    The baseline is `random_composition`.

    Args:
      params: of a model of two layers or more.
      early: layer of the heads that write.
      late: layer of the heads that read.

    Returns:
      {"k_composition", "q_composition", "v_composition"}, float32 [H, G] from 0 to 1; nan where a
      head writes or reads nothing.
    """
    writer, reader = (params[f"block_{layer}"]["attention"] for layer in (early, late))
    out_HxCxN = writer["W_O"].swapaxes(1, 2)
    value_HxNxN = _inner(writer["W_V"], writer["W_V"])
    written_H = _trace(value_HxNxN, _inner(out_HxCxN, out_HxCxN))

    def score(facing_GxCxN: jax.Array, away_GxCxN: jax.Array) -> jax.Array:
        away_GxNxN = _inner(away_GxCxN, away_GxCxN)
        read_G = _trace(_inner(facing_GxCxN, facing_GxCxN), away_GxNxN)
        met_HxGxNxN = jnp.einsum("hcn,gcm->hgnm", out_HxCxN, facing_GxCxN, precision=_EXACT)
        left = jnp.einsum("hkn,hgnm->hgkm", value_HxNxN, met_HxGxNxN, precision=_EXACT)
        right = jnp.einsum("hgkn,gnm->hgkm", met_HxGxNxN, away_GxNxN, precision=_EXACT)
        squared_HxG = jnp.maximum(_trace(left, right), 0.0)
        return jnp.sqrt(squared_HxG / (written_H[:, None] * read_G[None]))

    key, query = reader["W_K"], reader["W_Q"]
    return {
        "k_composition": score(key, query),
        "q_composition": score(query, key),
        "v_composition": score(reader["W_V"], reader["W_O"].swapaxes(1, 2)),
    }


def random_composition(model: AttentionOnlyTransformer) -> float:
    """Returns 1/sqrt(C), the composition of unrelated heads, for each of the three kinds.

    Exact in mean square if the space between two heads is rotated at random, whatever their
    weights: the mean over rotations R of ||A R B||² is ||A||² ||B||² / C. At initialisation in the
    published size the standard deviation between pairs of heads is 2.5 % of it.
    """
    return model.d_model**-0.5


def position_components(params: Params) -> dict[str, np.ndarray]:
    """Principal components of the rows of W_pos, of positions as points; on the host.

    Returns:
      position_explained [3]: share of the variance; position_coordinates [L, 3] about the mean
      position; position_norm [L]: of each row, not centred; all float32.
    """
    position_LxC = np.asarray(params["W_pos"], np.float64)
    found = functional_pca([position_LxC], num_components=3)
    return {
        "position_explained": found.explained.astype(np.float32),
        "position_coordinates": found.scores.astype(np.float32),
        "position_norm": np.linalg.norm(position_LxC, axis=1).astype(np.float32),
    }


def weight_names(params: Params) -> list[str]:
    """Names of the weights in the order of `weight_norms`, e.g. `block_0/attention/W_Q`."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    return ["/".join(str(entry.key) for entry in path) for path, _ in paths]


def _inner(left_HxCxN: jax.Array, right_HxCxN: jax.Array) -> jax.Array:
    return jnp.einsum("hcn,hcm->hnm", left_HxCxN, right_HxCxN, precision=_EXACT)


def _trace(left: jax.Array, right: jax.Array) -> jax.Array:
    """Trace of left^T right over the last two axes."""
    return jnp.sum(left * right, axis=(-2, -1))
