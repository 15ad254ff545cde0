"""The problem of a command: what its workdir was trained on, one of ours by name, or a file's."""

import functools
import importlib
import importlib.util
import pathlib
import sys
from typing import Any

import jax
import numpy as np

import llc_jax
from experiments import cli, train_language, train_regression, training, workdir
from llc_jax.problems.base import Problem
from llc_jax.storage.files import digest

TRAINED = {"train_regression": train_regression, "train_language": train_language}


def load(config: Any) -> Problem:
    """The problem of a command.

    Args:
      config: with `workdir` and `problem`.

    Raises:
      ValueError: if there is none of that name, or the workdir holds another, or none.
    """
    name = config.problem
    return alone(name) if cli.stands_alone(name) else of_run(config.workdir, name)


def of_run(folder: str, name: str = "") -> Problem:
    """The problem that a workdir was trained on, of this name if one is given.

    Raises:
      ValueError: if it holds no training run, or another.
    """
    experiment = f"train_{name}"
    if name and experiment not in TRAINED:
        raise ValueError(
            f"problem={name!r}: give the path of a file, path/to/mine.py, or one of"
            f" {', '.join([*(x.removeprefix('train_') for x in TRAINED), *cli.ALONE])}."
        )
    if not name:
        experiment = training.record(folder).get("experiment", "train_regression")
    if experiment not in TRAINED:
        raise ValueError(f"{folder} was trained by {experiment!r:.80}, which is not known here.")
    return TRAINED[experiment].problem(TRAINED[experiment].load_config(folder))


def alone(path: str) -> Problem:
    """A problem that needs no training run: `PROBLEM` of a file, which is run, or one of ours.

    Raises:
      ValueError: if the file is not there, or has none.
    """
    if path in cli.ALONE:
        return importlib.import_module(cli.ALONE[path]).problem()
    found = getattr(module_of(path), "PROBLEM", None)
    if not isinstance(found, Problem):
        raise ValueError(
            f"problem={path}: PROBLEM is {found!r:.80} there; define"
            " PROBLEM = llc_jax.problems.Problem(name=..., loss_fn=..., data=..., checkpoints=...)."
        )
    return found


def module_of(path: str) -> Any:
    """A Python file as a module, with what lies beside it importable; run once a process."""
    place = pathlib.Path(path).absolute()
    if not place.is_file():
        raise ValueError(f"{path} does not exist: give the path of a Python file.")
    return _module_of(place, place.stat().st_mtime_ns)


@functools.cache
def _module_of(place: pathlib.Path, _: int) -> Any:
    if str(place.parent) not in sys.path:
        sys.path.append(str(place.parent))
    spec = importlib.util.spec_from_file_location(f"llc_jax_file_{place.stem}", place)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickles of its classes look
    spec.loader.exec_module(module)
    return module


def identity(config: Any, problem: Problem) -> dict[str, str]:
    """What a record says beside the flags: the name of a problem of a file, a sampler's hash."""
    found = {"problem": problem.name} if cli.stands_alone(config.problem) else {}
    if path := getattr(config, "sampler", "").rpartition(":")[0]:
        found["sampler_sha256"] = digest([path])
    return found


def data_set(problem: Problem, num_data: int, seed: int) -> tuple[Any, str]:
    """The data set of the estimates as host arrays or a `Stream`, and its SHA-256.

    That of a stream is of the first minibatch that the seed gives.
    """
    data = problem.sample(num_data, seed)
    leaves = data
    if isinstance(data, llc_jax.Stream):
        leaves = jax.device_get(data.batch_fn(jax.random.key(seed)))
    arrays = jax.tree.leaves(leaves)
    return data, digest(np.ascontiguousarray(leaf).tobytes() for leaf in arrays)


def estimation_options(problem: Problem) -> dict[str, Any]:
    """What the estimate functions take of a problem."""
    return {"observables": dict(problem.observables)}


def sampler_of(config: Any, step_size: Any) -> Any:
    """The sampler that `--sampler` and `--sampler_options` name.

    Args:
      config: with these flags.
      step_size: its step size, a number or an array.

    Raises:
      ValueError: if there is no such sampler, or it has no such hyperparameter.
    """
    from llc_jax import samplers

    path, _, name = config.sampler.rpartition(":")
    names = [n for n in dir(samplers) if hasattr(getattr(samplers, n), "_fields")]
    found = getattr(module_of(path) if path else samplers, name, None)
    if not hasattr(found, "_fields") or not hasattr(found, "step"):
        raise ValueError(
            f"sampler={config.sampler!r}: choose from {', '.join(names)}, or give"
            " path/to/mine.py:ClassName of a NamedTuple with step_size, init and step."
        )
    options = workdir.settings_of("sampler_options", config.sampler_options)
    required = set(found._fields) - set(found._field_defaults) - {"step_size"}
    odd = sorted(set(options) - set(found._fields) | {"step_size"} & set(options))
    if odd or required - set(options):
        raise ValueError(
            f"sampler_options={config.sampler_options!r}: {name} takes"
            f" {', '.join(f for f in found._fields if f != 'step_size') or 'none'} besides"
            f" step_size, which is a flag of its own; needed: {', '.join(sorted(required)) or '-'}."
        )
    return found(step_size=step_size, **options)
