"""Checkpoints of any program, read when asked for and never changed.

Every opener returns a mapping {step: params}: `open_folder` for whatever a folder holds, or one of
the others by name. Nothing that is read here can run code: no pickle.
"""

import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np

from llc_jax.storage import files, manifests
from llc_jax.storage.checkpoints import CheckpointDir
from llc_jax.storage.pytrees import CheckpointError
from llc_jax.types import Params

_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U64": np.uint64,
    "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
_LONGEST_HEADER = 100 * 2**20  # bytes, as in the format's own library


class Checkpoints(Mapping[int, Params]):
    """Steps that are known, with weights that are read when asked for."""

    def __init__(
        self,
        steps: Iterable[int],
        read: Callable[[int], Params],
        problems: Callable[[int], list[str]] = lambda step: [],
    ):
        """Keeps the functions.

        Args:
          steps: training steps.
          read: weights of a step.
          problems: what is wrong with the files of a step; [] if nothing is.
        """
        self._steps, self._read, self._problems = sorted(steps), read, problems

    def __getitem__(self, step: int) -> Params:
        """Reads the weights of a step."""
        if step not in self._steps:
            raise KeyError(step)
        return self._read(step)

    def __iter__(self) -> Iterator[int]:
        """The steps, in order."""
        return iter(self._steps)

    def __len__(self) -> int:
        """How many steps there are."""
        return len(self._steps)

    def undamaged(self, without: Iterable[int] = ()) -> list[int]:
        """The steps in order, but for those whose files are damaged; some are not looked at."""
        known = set(without)
        return [step for step in self._steps if step in known or not self._problems(step)]


def open_folder(folder: str | os.PathLike, separator: str | None = None) -> Checkpoints:
    """Opens a folder of checkpoints of this package, of Orbax, of safetensors or of .npz files.

    Args:
      folder: with one file or folder for each step, named by it: the last number of the name.
      separator: as in `npz_folder`.

    Raises:
      ValueError: if there is none of these in it.
    """
    root = files.local_path(folder, "folder")
    for suffix, opener in ((".safetensors", safetensors_folder), (".npz", npz_folder)):
        if _files(root, suffix):
            return opener(root, separator)
    return orbax_folder(root)


def orbax_folder(folder: str | os.PathLike) -> Checkpoints:
    """Opens a folder of Orbax checkpoints, of this package or of another program.

    Those of this package are verified by their hashes; of another, the item `params` is read, or
    the only one there is.

    Raises:
      ValueError: if there is none in it.
    """
    kept = CheckpointDir(folder)
    steps = kept.steps()
    if not steps:
        raise ValueError(
            f"folder={str(folder)!r} has no checkpoints: give one with a file or folder for each"
            " step, as Orbax, safetensors or numpy.savez write them, the step in its name."
        )
    ours = any((kept.folder / str(step) / manifests.NAME).exists() for step in steps)
    problems = (lambda step: kept.verify(step, ["params"])) if ours else (lambda step: [])
    return Checkpoints(steps, kept.restore_params, problems)


def npz_folder(folder: str | os.PathLike, separator: str | None = None) -> Checkpoints:
    """Opens a folder of .npz files, such as `step_100.npz`.

    Args:
      folder: with one file, or one folder of files, for each step.
      separator: where names are split to make nested dicts, such as "/" or "."; None leaves a flat
        dict of arrays.

    Raises:
      ValueError: if there is none, or two are of one step.
    """
    return _of_files(folder, ".npz", _read_npz, separator)


def safetensors_folder(folder: str | os.PathLike, separator: str | None = None) -> Checkpoints:
    """Opens a folder of safetensors files, such as `step_100.safetensors`; see `npz_folder`.

    `checkpoint-100/model.safetensors`, as transformers writes it, is step 100 too.
    """
    return _of_files(folder, ".safetensors", read_safetensors, separator)


def read_safetensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Reads one safetensors file as {name: array}; bfloat16 included.

    Raises:
      CheckpointError: if it is not whole.
    """
    content = pathlib.Path(path).read_bytes()
    try:
        size = int.from_bytes(content[:8], "little")
        if not 2 <= size <= min(_LONGEST_HEADER, len(content) - 8):
            raise ValueError(f"its header has {size} bytes, the file {len(content)}")
        header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            if not 0 <= begin <= end <= len(data):
                raise ValueError(f"{name!r:.80} reaches beyond the end of the file")
            flat = np.frombuffer(data[begin:end], dtype.newbyteorder("<"))
            found[name] = flat.astype(dtype).reshape(entry["shape"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors ({type(error).__name__}: {error!s:.160}): half"
            " copied?"
        ) from error
    return found


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as found:
            arrays = {name: found[name] for name in found.files}
    except Exception as error:
        raise CheckpointError(
            f"{path} cannot be read by numpy without running code ({type(error).__name__}:"
            f" {error!s:.160}): half copied, or are there objects in it?"
        ) from error
    if odd := [name for name, x in arrays.items() if x.dtype.kind not in "biufc"]:
        raise CheckpointError(
            f"{path} has {odd[0]!r:.80} of dtype {arrays[odd[0]].dtype}, no numbers: save float32"
            " (.npz files have no bfloat16), or use safetensors."
        )
    return arrays


def _files(folder: pathlib.Path, suffix: str) -> list[tuple[str, list[pathlib.Path]]]:
    """Names without their suffix, each with its files: itself, or those of a folder."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.is_dir():
            found.append((path.name, sorted(path.glob(f"*{suffix}"))))
        elif path.suffix == suffix:
            found.append((path.stem, [path]))
    return [(name, paths) for name, paths in found if paths and re.search(r"\d", name)]


def _of_files(folder, suffix: str, read: Callable, separator: str | None) -> Checkpoints:
    found: dict[int, list[pathlib.Path]] = {}
    for name, paths in _files(files.local_path(folder, "folder"), suffix):
        step = int(re.findall(r"\d+", name)[-1])
        if step in found:
            raise ValueError(
                f"folder={str(folder)!r} has step {step} twice, {found[step][0].name} and"
                f" {paths[0].name}: put each kind into a folder of its own."
            )
        found[step] = paths
    if not found:
        raise ValueError(
            f"folder={str(folder)!r} has no {suffix} files with a number in their name: give the"
            f" folder with one for each step, such as step_100{suffix}."
        )

    def whole(step: int) -> Params:
        arrays = {name: x for path in found[step] for name, x in read(path).items()}
        return arrays if separator is None else nested(arrays, separator)

    return Checkpoints(found, whole)


def nested(arrays: Mapping[str, np.ndarray], separator: str) -> Params:
    """Nested dicts of arrays whose names are split at the separator.

    Raises:
      ValueError: if one name is the beginning of another.
    """
    tree: dict = {}
    for name, x in arrays.items():
        *parents, last = name.split(separator)
        node = tree
        for part in parents:
            node = node.setdefault(part, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node:
            raise ValueError(f"{name!r:.80} is both an array and a dict: use separator=None.")
        node[last] = x
    return tree
