"""Presets of every experiment, from the table of each problem."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llc_jax.problems.deep_linear.presets import PRESETS as DEEP_LINEAR
from llc_jax.problems.language.presets import PRESETS as LANGUAGE
from llc_jax.problems.regression.presets import PRESETS as REGRESSION

# An experiment of one problem alone calls its presets by their own names.
OWN = {
    "train_language": LANGUAGE,
    "measure_language": LANGUAGE,
    "train_regression": REGRESSION,
    "quickstart": REGRESSION,
    "compare_reference": REGRESSION,
    "benchmark_dln": DEEP_LINEAR,
    "locality": DEEP_LINEAR,
}
SHARED = REGRESSION | {f"language_{name}": values for name, values in LANGUAGE.items()}


SAMPLING = ("estimate_llc", "calibrate_sgld", "vary_llc")


class Presets(dict):
    """The presets of an experiment: name -> Config."""

    def __init__(self, experiment: str, config_type: type):
        """Reads the tables.

        Args:
          experiment: name of its module.
          config_type: its dataclass.
        """
        self.experiment, self.config_type = experiment, config_type
        self._table = OWN.get(experiment, SHARED)
        super().__init__({name: self._made(name, values) for name, values in self._table.items()})

    def of(self, path: str) -> dict[str, Any]:
        """These for a problem that stands alone: all of its data, a folder of its name, its own.

        Args:
          path: the flag `--problem`.
        """
        from experiments import problems

        problem = problems.alone(path)
        everything = {name: {"num_data": 0} for name in SAMPLING}
        general = {"workdir": f"runs/{problem.name}", "problem": path, **everything}
        return {
            name: self._made(
                name, self._table.get(name, {}), general, problem.presets.get(name, {})
            )
            for name in self._table | dict(problem.presets)
        }

    def base(self, config: Any) -> Any:
        """The preset that a Config departs from."""
        from experiments import cli

        table = (
            self.of(config.problem) if cli.stands_alone(getattr(config, "problem", "")) else self
        )
        return table[config.preset]

    def _made(self, name: str, *tables: Mapping[str, Any]) -> Any:
        """A Config; later tables go before earlier ones, and in each those for this experiment.

        Raises:
          ValueError: if this experiment has no flag of a name that is for it alone.
        """
        known = {field.name for field in dataclasses.fields(self.config_type)}
        found: dict[str, Any] = {}
        for table in tables:
            own = table.get(self.experiment, {})
            if odd := sorted(set(own) - known):
                raise ValueError(
                    f"preset {name} gives {self.experiment} the flag {odd[0]}, which it does not"
                    f" have; it has {', '.join(sorted(known))}."
                )
            general = {k: v for k, v in table.items() if not isinstance(v, Mapping)}
            found |= {k: v for k, v in general.items() if k in known} | dict(own)
        return self.config_type(**found | {"preset": name})
