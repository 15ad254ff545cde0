"""The arrays that a function has from elsewhere than its arguments."""

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from llc_jax.inputs import arrays

MAX_VISITED = 10_000


def lossless(name: str, function: Callable[..., Any], constants: list[Any]) -> None:
    """Checks that the 64-bit arrays that a function closes over fit into 32 bits.

    Very negative numbers are let through: a mask of -1e300 does what one of -inf does.

    Args:
      name: of the function, for messages.
      function: the user's.
      constants: of its jaxpr. JAX has cast them already, so that each is compared with the arrays
        it may have been made of; tracing in 64 bits instead would leave them in JAX's caches.

    Raises:
      ValueError: as in `arrays.without_loss`.
    """
    narrow = [np.asarray(x) for x in constants if not jax.dtypes.issubdtype(x.dtype, _KEY)]
    for x in reachable(function):
        dtype = jax.dtypes.canonicalize_dtype(x.dtype) if x.dtype.kind in "iufc" else x.dtype
        if dtype == x.dtype:
            continue
        with np.errstate(over="ignore", invalid="ignore"):
            cast = x.astype(dtype)
        if not any(y.dtype == dtype and np.array_equal(y, cast, equal_nan=True) for y in narrow):
            continue
        if x.dtype == np.float64:
            x = np.maximum(x, np.finfo(np.float32).min)
        arrays.without_loss(f"an array of shape {x.shape} that {name} closes over", x)


_KEY = jax.dtypes.prng_key


def reachable(function: Callable[..., Any]) -> Iterator[np.ndarray]:
    """The numpy arrays in closures, defaults, globals and attributes that a function can see."""
    stack, seen = [function], {}
    while stack and len(seen) < MAX_VISITED:
        x = stack.pop()
        if id(x) in seen:
            continue
        seen[id(x)] = x
        if isinstance(x, np.ndarray):
            yield x
        elif isinstance(x, functools.partial):
            stack += [x.func, *x.args, *x.keywords.values()]
        elif isinstance(x, types.MethodType):
            stack += [x.__func__, *vars_of(x.__self__)]
        elif isinstance(x, types.FunctionType):
            stack += [inspect.unwrap(x), *_seen_by(x)]
        elif isinstance(x, dict):
            stack += list(x.values())
        elif isinstance(x, list | tuple):
            stack += list(x)
        elif callable(x) and not isinstance(x, type):
            method = getattr(type(x), "__call__", None)  # noqa: B004 - of an object, not a test
            stack += [getattr(x, "__wrapped__", None), method, *vars_of(x)]


def vars_of(x: Any) -> list[Any]:
    """The attributes of an object; none if it keeps them elsewhere."""
    return list(getattr(x, "__dict__", {}).values())


def _seen_by(function: types.FunctionType) -> Iterator[Any]:
    """What a function's code can refer to by name."""
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not filled yet
            continue
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [x for x in code.co_consts if isinstance(x, types.CodeType)]
        for found in map(function.__globals__.get, code.co_names):
            # Functions of libraries would lead anywhere.
            own = getattr(found, "__module__", None) == function.__module__
            if own or isinstance(found, np.ndarray | dict | list | tuple):
                yield found
