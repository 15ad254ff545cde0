"""Datasets as netCDF 3 that come back as they were, or are refused by name."""

import io
import re
from typing import Any

import jax.numpy as jnp
import numpy as np
import xarray

# netCDF 3 through scipy: no pickle, no code, no clock inside, so equal results are equal bytes.
_ENGINE = "scipy"
_DTYPE = "stored_dtype"  # attribute of a variable that was widened
_LIMIT = 2**31  # bytes of a variable


def encode(dataset: xarray.Dataset) -> bytes:
    """Returns a file.

    netCDF 3 knows integers to 32 bits, float32 and float64; others are widened without loss.

    Raises:
      ValueError: naming the variable or attribute that would not come back, and why.
    """
    for name, value in dataset.attrs.items():
        attribute(name, value)
    stored = dataset.copy()
    for name, variable in dataset.variables.items():
        if (wide := _wider(name, variable)) is not None:
            stored[name] = (variable.dims, wide, {**variable.attrs, _DTYPE: variable.dtype.name})
    stored.attrs = {name: _number(value) for name, value in dataset.attrs.items()}
    try:
        content = bytes(stored.to_netcdf(engine=_ENGINE))
        back = decode(content)
    except Exception as error:
        raise ValueError(
            f"netCDF 3 cannot hold this ({type(error).__name__}: {_line(error)}): the names of"
            " variables, dimensions and attributes must be ASCII and none of its own."
        ) from error
    for kind, old, new in (
        ("attribute", dataset.attrs, back.attrs),
        ("variable", dataset.variables, back.variables),
    ):
        for name, value in old.items():
            if name not in new or not _same(value, new[name]):
                raise ValueError(
                    f"{kind} {name!r:.80} would not come back from netCDF 3 as it is"
                    f" ({value!r:.80}): give it another name, or text without a NUL."
                )
    return content


def decode(content: bytes) -> xarray.Dataset:
    """Returns what is in a file, with its dtypes restored."""
    # Not by path: xarray takes some for others, such as ~name for the home of somebody.
    with xarray.open_dataset(io.BytesIO(content), engine=_ENGINE) as found:
        dataset = found.load()
    for name, variable in dataset.variables.items():
        if _DTYPE in variable.attrs:
            attrs = dict(variable.attrs)
            dtype = jnp.dtype(attrs.pop(_DTYPE))
            dataset[name] = (variable.dims, variable.values.astype(dtype), attrs)
    return dataset


def attribute(name: Any, value: Any, what: str = "attribute") -> None:
    """Checks the name and the value of an attribute.

    Raises:
      ValueError: unless they are text and text, or a number.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][\w.@+:-]*", name, re.ASCII):
        raise ValueError(
            f"{what} {name!r:.80}: a name must be text of ASCII letters, digits and _ . @ + : -"
        )
    number = isinstance(value, int | float | np.integer | np.floating)
    if isinstance(value, bool) or not (number or isinstance(value, str)):
        raise ValueError(
            f"{what} {name!r:.80} is {value!r:.80} ({type(value).__name__}): netCDF 3 has text and"
            " numbers only; give str(value), json.dumps(value), or leave it out."
        )
    if isinstance(value, int | np.integer) and not np.abs(int(value)) <= 2**53:
        raise ValueError(
            f"{what} {name!r:.80} is {int(value)}: netCDF 3 has no integers beyond 2**53; give"
            " str(value)."
        )


def _number(value: Any) -> Any:
    """A number that netCDF 3 has, equal to this one."""
    whole = isinstance(value, int | np.integer)
    return float(value) if whole and not -(2**31) <= value < 2**31 else value


def _wider(name: str, variable: xarray.Variable) -> np.ndarray | None:
    """The values in a dtype that netCDF 3 has; None if it has theirs."""
    values, dtype = variable.values, variable.dtype.newbyteorder("=")
    if not values.size:
        raise ValueError(
            f"variable {name!r:.80} has shape {values.shape}, no elements: netCDF 3 reads a length"
            " of 0 as an open end; leave it out."
        )
    if values.nbytes >= _LIMIT:
        raise ValueError(
            f"variable {name!r:.80} has {values.nbytes:,} bytes: netCDF 3 has room for"
            f" {_LIMIT:,}; record fewer numbers, or save it by numpy.save."
        )
    if dtype.kind in "OUSb" or dtype in (np.float32, np.float64, np.int8, np.int16, np.int32):
        return None
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        return values.astype(np.float32)
    if jnp.issubdtype(dtype, jnp.integer):
        low, high = int(values.min()), int(values.max())
        if low >= -(2**31) and high < 2**31:
            return None if dtype == np.int64 else values.astype(np.int32)
        if low >= -(2**53) and high <= 2**53:
            return values.astype(np.float64)
        text = f"has {dtype} values up to {max(abs(low), abs(high)):,}, beyond 2**53"
    else:
        text = f"has dtype {dtype}"
    raise ValueError(
        f"variable {name!r:.80} {text}: netCDF 3 has neither; store real numbers (for complex ones"
        " the real and the imaginary part), or smaller ones."
    )


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, xarray.Variable):
        if old.dims != new.dims or dict(old.attrs) != dict(new.attrs):
            return False
        old, new = old.values, new.values
    if isinstance(old, str):
        return old == new
    old, new = np.asarray(old), np.asarray(new)
    return old.shape == new.shape and bool(np.all((old == new) | ((old != old) & (new != new))))


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
