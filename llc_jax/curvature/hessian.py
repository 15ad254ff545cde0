"""Products of the Hessian of a mean loss with vectors, micro-batched over a finite data set."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from llc_jax.ambient import together, undisturbed
from llc_jax.inputs import arrays, checks
from llc_jax.inputs.masks import check_mask
from llc_jax.losses import num_examples, take
from llc_jax.trees import Layout, apply_mask, at_least_float32
from llc_jax.types import Batch, LossFn, Params, Stream


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("params", "data", "mask"),
    meta_fields=("loss_fn", "num_chunks"),
)
@dataclasses.dataclass(frozen=True)
class HessianProduct:
    """`v -> M H M v` with H the Hessian of the mean loss at `params`, M the mask. Made by `hvp`.

    A pytree: as an argument of a compiled function its arrays are traced and its loss function is
    static, so another checkpoint compiles nothing.

    Attributes:
      loss_fn: per-example losses, static.
      params: where H is taken, at least float32.
      data: the data set, leading axis n.
      mask: None, or 0/1 like params.
      num_chunks: micro-batches, static.
    """

    loss_fn: LossFn
    params: Params
    data: Batch
    mask: Params | None
    num_chunks: int

    def __call__(self, vector: Params) -> Params:
        """Returns the product, a pytree like params, at least float32."""
        with undisturbed():
            return _apply(*together((self, vector)))

    def project(self, vector: Params) -> Params:
        """Returns M v: zero where the mask is."""
        return apply_mask(self.mask, vector)

    def linearize(self) -> Callable[[Params], Params]:
        """Returns the product for repeated use within one traced function.

        With one micro-batch the forward and backward pass run once, here, and not in every
        product. With several, keeping what they leave behind would cost the memory that
        micro-batches are to save, so each product runs them again.
        """
        n = num_examples(self.data)
        chunk = -(-n // self.num_chunks)

        def gradient(params, batch, keep):
            def total(p):
                losses = at_least_float32(self.loss_fn(p, batch))
                return jnp.sum(jnp.where(keep, losses, jnp.zeros_like(losses))) / n

            return jax.grad(total)(params)

        if self.num_chunks == 1:
            everything = jnp.ones(n, bool)
            _, product = jax.linearize(lambda p: gradient(p, self.data, everything), self.params)
        else:

            def product(vector):
                def add(total, number):
                    rows = number * chunk + jnp.arange(chunk)
                    batch = take(self.data, rows % n)  # past the end: examples that do not count
                    _, part = jax.jvp(
                        lambda p: gradient(p, batch, rows < n), (self.params,), (vector,)
                    )
                    return jax.tree.map(jnp.add, total, part), None

                zero = jax.tree.map(jnp.zeros_like, vector)
                return jax.lax.scan(add, zero, jnp.arange(self.num_chunks))[0]

        def masked(vector):
            vector = jax.tree.map(lambda v, p: v.astype(p.dtype), vector, self.params)
            return self.project(product(self.project(vector)))

        return masked


@jax.jit
def _apply(operator: HessianProduct, vector: Params) -> Params:
    return operator.linearize()(vector)


@undisturbed()
def hvp(
    loss_fn: LossFn,
    params: Params,
    data: Batch,
    *,
    micro_batch: int | None = None,
    mask: Params | None = None,
) -> HessianProduct:
    """Returns `matvec`: v -> H v, with H the Hessian of the mean loss over `data` at `params`.

    `matvec` can be called anywhere, under `jit` and `vmap` too. Half-precision weights are
    widened to float32 first: second derivatives of rounded arithmetic say nothing.

    Args:
      loss_fn: `loss_fn(params, batch) -> losses` [batch]; static, so keep its identity.
      params: any pytree of floating-point arrays.
      data: pytree of arrays with leading axis n.
      micro_batch: most examples in memory at once, which need not divide n: the mean is exact.
        Default all, which also saves most of the work of repeated products.
      mask: pytree of 0/1 like params; the product is then M H M v, that of the block with 1.

    Raises:
      ValueError: on bad input, before anything compiles.

    Source: Pearlmutter 1994, Fast exact multiplication by the Hessian, Neural Computation 6, as
    the forward derivative of the gradient.
    """
    if isinstance(data, Stream):
        raise ValueError(
            "data is a Stream: a Hessian belongs to one fixed data set; draw one, for example"
            " data = stream.batch_fn(jax.random.key(0)) with a large batch, and give that."
        )
    if micro_batch is not None:
        checks.at_least("micro_batch", micro_batch, 1)
    leaves = [*arrays.flat("params", params), *arrays.flat("data", data)]
    if not any(isinstance(leaf, jax.core.Tracer) for _, leaf in leaves):
        data = arrays.data_arrays(data)
        mask = check_mask(mask, params)
        checks.params(params, 0, None, mask)
        params, data = together((arrays.param_arrays(params, 0, mask), data))
    layout = Layout.of(params)
    template = jax.tree.unflatten(
        layout.structure, list(map(jax.ShapeDtypeStruct, layout.shapes, layout.dtypes))
    )
    mask = check_mask(mask, template)
    n = num_examples(data)
    num_chunks = -(-n // min(micro_batch or n, n))
    chunk = -(-n // num_chunks)
    checks.losses(loss_fn, template, checks.rows(data, chunk), chunk)
    params = jax.tree.map(lambda x: at_least_float32(jnp.asarray(x)), params)
    data = jax.tree.map(jnp.asarray, data)
    return HessianProduct(loss_fn, params, data, mask, num_chunks)
