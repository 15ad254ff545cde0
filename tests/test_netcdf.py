"""Datasets come back from a file as they were, or are refused by name."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import xarray
from hypothesis import given, settings
from hypothesis import strategies as st

from llc_jax.storage import netcdf


def one(values, **attrs):
    values = np.asarray(values)
    dims = [f"d{axis}" for axis in range(values.ndim)]
    return xarray.Dataset({"v": (dims, values)}, attrs=attrs)


def back(dataset):
    return netcdf.decode(netcdf.encode(dataset))


@pytest.mark.parametrize(
    "dtype",
    ["bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "uint64", "float16",
     "bfloat16", "float8_e4m3fn", "int4", "float32", "float64"],
)  # fmt: skip
def test_dtypes_and_values_come_back(dtype):
    """pydata/xarray issue 4014, "Add NetCDF3 dtype coercion for unsigned integer types"."""
    dtype = jnp.dtype(dtype)
    values = np.asarray([0, 1, 0]).astype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        values = np.asarray([-1.5, 0.0, np.nan]).astype(dtype)
    elif jnp.issubdtype(dtype, jnp.integer):
        top = min(int(jnp.iinfo(dtype).max), 2**53)
        values = np.asarray([0, 1, top]).astype(dtype)
    found = back(one(values)).v
    assert found.dtype == dtype
    assert found.values.tobytes() == values.tobytes()
    assert found.attrs == {}


def test_wide_integers_come_back():
    """Unidata/netcdf4-python issue 878: an attribute of -9223372036854775806 came back as 2."""
    values = np.array([-(2**53), 5, 2**31, 2**53])
    found = back(one(values, big=2**40, small=7, minus=-(2**33)))
    assert found.v.dtype == np.int64
    np.testing.assert_array_equal(found.v, values)
    assert (found.attrs["big"], found.attrs["small"]) == (2**40, 7)
    assert found.attrs["minus"] == -(2**33)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([2**53 + 1]), "int64 values up to 9,007,199,254,740,993, beyond"),
        (np.array([2**64 - 1], np.uint64), "beyond 2\\*\\*53"),
        (np.ones(2) * 1j, "dtype complex128"),
        (np.zeros(2, "M8[ns]"), "dtype datetime64"),
        (np.zeros(2, np.longdouble), "dtype float128"),
        (np.zeros((2, 0)), r"shape \(2, 0\), no elements"),
        (np.array(["a", 1], object), "cannot hold this"),
        (np.array(["a\0", "b"], object), "would not come back"),
    ],
)
def test_what_would_not_come_back_is_refused(values, message):
    """A length of 0 is an open end: Unidata/netcdf4-python issue 19, "dimensions of size 0 gives
    no error"; scipy/scipy issue 8153 is what reading it looks like."""
    with pytest.raises(ValueError, match=message) as caught:
        netcdf.encode(one(values))
    assert len(str(caught.value)) <= 600


def test_variables_too_large_for_the_format_are_refused():
    """scipy/scipy issue 10958, '"Invalid argument" error message for netCDF3 file size error'."""
    values = np.broadcast_to(np.float32(0), (2**15, 2**15))
    with pytest.raises(ValueError, match="4,294,967,296 bytes: netCDF 3 has room for"):
        netcdf.encode(one(values))


@pytest.mark.parametrize("value", [None, True, {}, {"zone": 59}, [1, 2], ["a"], (), b"x", 1j])
def test_attributes_that_are_neither_text_nor_numbers_are_refused(value):
    """uafgeotools/rtm issue 18 and google/Xee issue 49: a dict; pydata/xarray issue 4981: a bool,
    which would come back as 1."""
    with pytest.raises(ValueError, match=r"attribute 'a' is .* text and numbers only"):
        netcdf.encode(one([1.0], a=value))


@pytest.mark.parametrize(
    "name", ["a/b", " a", "", "λ", "e\u0301", 3, None, "dimensions", "variables", "close", "mode",
             "version_byte", "coordinates", "float"],
)  # fmt: skip
def test_names_of_attributes_that_the_format_or_its_writer_takes(name):
    """SciTools/iris issue 1167, "Unwise use of setattr prevents saving a cube to file", and
    Unidata/netcdf4-python issue 26: an attribute called `dimensions` replaces the writer's own;
    here `close` and `version_byte` would write a file that cannot be read, and `coordinates` be
    lost."""
    with pytest.raises(ValueError, match=r"ASCII|would not come back") as caught:
        netcdf.encode(one([1.0, 2.0]).assign_attrs({name: "x"}))
    assert len(str(caught.value)) <= 600


@pytest.mark.parametrize("name", ["λ", "", "e\u0301"])
def test_names_of_variables_must_be_ascii(name):
    with pytest.raises(ValueError, match="must be ASCII"):
        netcdf.encode(xarray.Dataset({name: 1.0}))


@settings(max_examples=60, deadline=None)
@given(
    value=st.one_of(
        st.text(max_size=8), st.integers(), st.floats(), st.floats(width=32).map(np.float32)
    )
)
def test_any_text_or_number_comes_back_or_is_refused(value):
    try:
        found = back(one([1.0], a=value)).attrs["a"]
    except ValueError as error:
        surrogate = isinstance(value, str) and not value.isprintable()
        assert surrogate or abs(value) > 2**53, error  # noqa: PT017
    else:
        assert found == value or (found != found and value != value)


def test_strings_and_what_json_makes_of_the_rest_come_back():
    text = json.dumps({"λ": [1, None, True]}, ensure_ascii=False)
    found = back(one(["ok", "", "λ\n"], note=text, empty=""))
    assert found.v.values.tolist() == ["ok", "", "λ\n"]
    assert found.attrs == {"note": text, "empty": ""}
