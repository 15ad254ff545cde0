"""What tracing a user's function says of it: shapes, whether it is pure, what it depends on."""

import contextlib
import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal
from jax.interpreters import partial_eval
from jax.sharding import AxisType

from llc_jax.inputs import arrays

LARGE = 10_000_000  # bytes of arrays closed over that are worth a word
_seen: dict[Any, int] = {}  # hash of the last function of each code that closed over as much


class Traced(NamedTuple):
    """A function at the shapes of its arguments.

    Attributes:
      out: shapes of what it returns.
      uses: for each argument, a pytree of booleans: whether the result depends on the leaf.
      constants: the arrays that it closes over, as JAX has cast them.
    """

    out: Any
    uses: tuple[Any, ...]
    constants: list[Any]


def trace(name: str, function: Callable[..., Any], *shapes: Any) -> Traced:
    """Traces a function twice, without running it.

    Args:
      name: of the argument that it was given as, for messages.
      function: the user's.
      *shapes: pytrees of `jax.ShapeDtypeStruct`.

    Raises:
      ValueError: if it cannot be called or hashed, fails, or returns something else the second
        time, as one does that draws from a generator or an iterator of its own.
    """
    if not callable(function):
        raise ValueError(f"{name} is a {type(function).__name__}: give a function.")
    try:
        hash(function)
    except TypeError:
        raise ValueError(
            f"{name} is a {type(function).__name__} that cannot be hashed, which compiled programs"
            " are kept by: give a module-level function; in a dataclass put arrays into data, or"
            " make them tuples, and use frozen=True, or eq=False."
        ) from None
    closed, out = _jaxpr(name, function, shapes)
    if any(isinstance(x, jax.core.Tracer) for x in closed.consts):
        raise ValueError(
            f"{name} closes over an array that is being traced, or was once: compiled programs keep"
            " the function, not what it sees. Pass the array in params or data, and call from"
            " outside of jax.jit, vmap, grad or a scan."
        )
    if any(_explicit(x) for x in _constants(closed)):
        raise ValueError(
            f"{name} closes over an array on a mesh with Explicit axes, which programs on other"
            " meshes cannot take: give them jax.device_get(x) of it, or pass it in params or data."
        )
    with _afresh():
        again, _ = _jaxpr(name, function, shapes)
    if not _same(_constants(closed), _constants(again)):
        raise ValueError(
            f"{name} is not pure: traced twice, it holds other constants the second time, as if it"
            " read an iterator, a data loader or numpy's random numbers. It is traced once and"
            " would see the same numbers ever after; draw from its arguments only (jax.random with"
            " the key, rows of data)."
        )
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    uses = jax.tree.unflatten(jax.tree.structure(shapes), used)
    constants = _arrays(closed)
    _say_if_new_each_time(name, function, sum(getattr(x, "nbytes", 0) for x in constants))
    return Traced(out, uses, constants)


def differentiable(name: str, function: Callable[..., Any], params: Any, batch: Any) -> None:
    """Checks that a function of losses has a gradient, by tracing it.

    Raises:
      ValueError: with what JAX says.
    """
    try:
        jax.eval_shape(jax.grad(lambda p, b: jnp.sum(function(p, b))), params, batch)
    except jax.errors.KeyReuseError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} has no gradient ({type(error).__name__}: {reason}): it must be differentiable"
            " in params by jax.grad; a callback or a kernel needs jax.custom_vjp."
        ) from error


def _jaxpr(name: str, function: Callable[..., Any], shapes: Any) -> tuple[ClosedJaxpr, Any]:
    """The jaxpr and the shapes of the result; a fresh wrapper, so that nothing is remembered."""
    inner = _unjitted(function)

    def fresh(*args):
        return inner(*args)

    try:
        return jax.make_jaxpr(fresh, return_shape=True)(*shapes)
    except jax.errors.KeyReuseError:  # asked for by the user, and says where
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        found = ", ".join(
            f"{arrays.short(jax.tree_util.keystr(path), 40)}: {x.dtype}{list(x.shape)}"
            for path, x in jax.tree_util.tree_leaves_with_path(shapes)[-4:]
        )
        raise ValueError(
            f"{name} failed when traced ({type(error).__name__}: {reason}); its last arguments were"
            f" {arrays.short(found, 160)}. It must accept traced arrays of these shapes, whatever"
            " their values."
        ) from error


def _explicit(x: Any) -> bool:
    mesh = getattr(getattr(x, "sharding", None), "mesh", None)
    return mesh is not None and AxisType.Explicit in mesh.axis_types


def _unjitted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function under `jax.jit`, which would be traced once only."""
    return function.__wrapped__ if isinstance(function, jax.stages.Wrapped) else function


def _arrays(closed: ClosedJaxpr) -> list[Any]:
    """The arrays that are constants of a jaxpr, each once."""
    found = {id(x): x for x in _constants(closed) if np.ndim(x) > 0}
    return list(found.values())


def _constants(closed: ClosedJaxpr) -> Iterator[Any]:
    """All constants of a jaxpr, those of inner ones too, in order."""
    yield from closed.consts
    stack = [closed.jaxpr]
    while stack:
        jaxpr = stack.pop()
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name
            yield from (x.val for x in eqn.invars if isinstance(x, Literal))
            for inner in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
            ):
                if isinstance(inner, ClosedJaxpr):
                    yield from inner.consts
                    inner = inner.jaxpr
                if hasattr(inner, "eqns"):
                    stack.append(inner)
                elif isinstance(inner, int | float):  # a power, an axis, where a slice begins
                    yield inner


@contextlib.contextmanager
def _afresh() -> Iterator[None]:
    """A context that changes nothing but what the traces of inner functions are remembered by."""
    other = "allow" if jax.config.jax_numpy_rank_promotion == "warn" else "warn"
    with warnings.catch_warnings(), jax.numpy_rank_promotion(other):
        warnings.simplefilter("ignore")
        yield


def _same(left: Iterator[Any], right: Iterator[Any]) -> bool:
    end = object()
    while True:
        a, b = next(left, end), next(right, end)
        if a is end or b is end:
            return a is b
        if a is b or (isinstance(a, str) and a == b):
            continue
        if isinstance(a, str) or isinstance(b, str) or not _equal(a, b):
            return False


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return False
    if jnp.issubdtype(getattr(a, "dtype", None) or np.dtype(bool), jax.dtypes.prng_key):
        a, b = jax.random.key_data(a), jax.random.key_data(b)
    a, b = np.asarray(a), np.asarray(b)
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def _say_if_new_each_time(name: str, function: Callable[..., Any], num_bytes: int) -> None:
    """Warns, once, of a function that is made anew for every call and closes over large arrays."""
    code = _code(function)
    if num_bytes < LARGE or code is None:
        return
    # The hash, by which compiled programs are found: two bound methods of one object share it.
    before = _seen.setdefault(code, hash(function))
    if before not in (0, hash(function)):
        _seen[code] = 0
        warnings.warn(
            f"{name} closes over {num_bytes / 1e6:.0f} MB of arrays and is a new function at every"
            " call: each is compiled afresh, and its program keeps a copy of them. Pass the arrays"
            " in data or params and define the function once; jax.clear_caches() frees the copies.",
            stacklevel=2,
        )


def _code(function: Callable[..., Any]) -> Any:
    """What a function, a partial application of it or a callable object runs; None if unknown."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    method = type(function).__dict__.get("__call__")  # of an object such as a dataclass
    return getattr(function, "__code__", getattr(method, "__code__", None))
