"""What both worker processes of `compare_devinterp` share; needs numpy and nothing else.

One of them has torch and no JAX, the other JAX and no torch, so neither may be imported here.
"""

import json
import pathlib
import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

AGREEMENT = 1e-4
"""Largest difference of the losses of the two models, relative to 1 + |loss|."""


class Stored(NamedTuple):
    """A problem as it lies on disk.

    Attributes:
      kind: which model, see `compare_problems.KINDS`.
      options: its sizes.
      settings: step_size, nbeta, localization, batch_size, num_chains, num_draws, num_burnin.
      params: path such as "block_0/mlp/up/kernel" -> array.
      data: name -> array with leading axis n.
      check: [examples] losses of the first examples at params + `SHIFT`.
    """

    kind: str
    options: Mapping[str, Any]
    settings: Mapping[str, float | int]
    params: Mapping[str, np.ndarray]
    data: Mapping[str, np.ndarray]
    check: np.ndarray


SHIFT = 0.01
"""Added to every weight for the check: at w* itself many losses are 0 and would always agree."""


def save(folder: pathlib.Path, stored: Stored) -> None:
    """Writes `problem.json` and `problem.npz`."""
    header = {name: dict(getattr(stored, name)) for name in ("options", "settings")}
    (folder / "problem.json").write_text(json.dumps({"kind": stored.kind, **header}))
    arrays = {"check": stored.check}
    arrays |= {f"params/{name}": x for name, x in stored.params.items()}
    arrays |= {f"data/{name}": x for name, x in stored.data.items()}
    np.savez(folder / "problem.npz", **arrays)


def load(folder: pathlib.Path) -> Stored:
    """Reads what `save` wrote, without pickle."""
    header = json.loads((folder / "problem.json").read_text())
    with np.load(folder / "problem.npz", allow_pickle=False) as arrays:
        parts = {
            part: {k.removeprefix(part): arrays[k] for k in arrays.files if k.startswith(part)}
            for part in ("params/", "data/")
        }
        return Stored(params=parts["params/"], data=parts["data/"], check=arrays["check"], **header)


def check_agreement(stored: Stored, losses: np.ndarray) -> float:
    """Raises unless `losses` at the shifted weights are those of the other model.

    Returns:
      The largest difference, relative to 1 + |loss|.
    """
    difference = np.abs(losses - stored.check) / (1 + np.abs(stored.check))
    if not difference.max() <= AGREEMENT:
        raise RuntimeError(
            f"the two {stored.kind} models differ by {difference.max():.2g} of 1 + |loss|, more"
            f" than {AGREEMENT:g}: a comparison of their speed would mean nothing."
        )
    return float(difference.max())


def forget_peak() -> None:
    """Starts the peak of the memory afresh, where the system allows it (Linux)."""
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int:
    """Peak resident memory of this process.

    Not `ru_maxrss` where it can be avoided: that starts at the size of the parent process.
    """
    try:
        status = pathlib.Path("/proc/self/status").read_text()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def measured(call: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Calls; returns the result and its seconds by the clock and of the processor."""
    forget_peak()
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    seconds = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return result, {**seconds, "peak_bytes": peak_bytes()}


def serve(ready: Mapping[str, Any], run: Callable[..., Mapping[str, np.ndarray]]) -> None:
    """Says what it is, then answers every line of stdin until there are no more.

    Args:
      ready: first line of the answer, before any request.
      run: called with the fields of a request but "save"; its arrays go to that file.
    """
    print(json.dumps(ready), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        path = request.pop("save")
        arrays, cost = measured(lambda request=request: run(**request))
        if path:
            np.savez(path, **arrays)
        print(json.dumps(cost), flush=True)
