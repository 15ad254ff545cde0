"""The estimates behind `experiments.vary_llc`: one base, and what departs from it.

`config` is that of `vary_llc` throughout.
"""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from experiments import problems
from experiments.workdir import numbers

TRACE_POINTS = 100  # of a running mean that is kept


@dataclasses.dataclass(frozen=True, eq=False)
class FixedLoss:
    """Mean loss of a draw on sequences of its own: what `collect` records.

    Attributes:
      loss_fn: losses per example.
      data: the sequences.
    """

    loss_fn: Any
    data: Any

    def __call__(self, params, batch=None):
        """Returns the mean loss; what the chain's own minibatch was does not matter."""
        return self.loss_fn(params, self.data).mean()


class Subject(NamedTuple):
    """What is sampled.

    Attributes:
      draw: `draw(num_data, seed)`: examples, as host arrays.
      losses: name -> loss function.
      fixed: number of sequences -> `FixedLoss` of the mean loss on them.
    """

    draw: Any
    losses: dict[str, Any]
    fixed: dict[int, FixedLoss]


def subject_of(config, problem) -> Subject:
    """What `config` samples of a problem, with every loss function that it has."""
    from llc_jax.inputs import checks

    sizes = [int(n) for n in numbers(config.fixed_sizes)]
    for size in sizes:
        checks.at_least("fixed_sizes", size, 1)
    others = config.data_seed + 1
    fixed = {n: FixedLoss(problem.loss_fn, problem.examples(n, others)) for n in sizes}
    return Subject(problem.examples, dict(problem.losses), fixed)


def within(config, size: int | None):
    """The config with no more data than there is: n of the problem, or None if it is drawn."""
    if size is None:
        return config
    sizes = sorted({int(min(n, size)) for n in numbers(config.data_sizes)})
    return dataclasses.replace(
        config, num_data=min(config.num_data or size, size), data_sizes=",".join(map(str, sizes))
    )


def around(config, subject: Subject) -> list[tuple[str, float | str, dict]]:
    """Every variation of the base: (what, value, settings that differ from the base)."""
    sizes = [*numbers(config.data_sizes), config.num_data]
    batches = [*numbers(config.batch_sizes), config.batch_size]
    if min(sizes) < config.batch_size or config.num_data < max(batches):
        raise ValueError(
            f"data_sizes={config.data_sizes}, num_data={config.num_data} and batch_sizes="
            f"{config.batch_sizes}, batch_size={config.batch_size}: no minibatch may be larger than"
            " the data set it is drawn from."
        )
    found = [("num_data", n, {"num_data": int(n)}) for n in numbers(config.data_sizes)]
    found += [("batch_size", m, {"batch_size": int(m)}) for m in numbers(config.batch_sizes)]
    found += [("evaluation", 0, {}), *(("evaluation", n, {"fixed": n}) for n in subject.fixed)]
    if len(subject.losses) > 1:
        found += [("loss", name, {"loss": name}) for name in subject.losses]
    found += [("seed", s, {"seed": int(s)}) for s in numbers(config.seeds)]
    return found


def failures(config, first: int, last: int) -> dict[str, tuple[int, dict]]:
    """What goes wrong, and where to see it: name -> (training step, settings that differ)."""
    return {
        "nothing holds the chains (γ = 0) at an untrained model": (first, {"localization": 0.0}),
        "they do not move (ε / 10,000)": (last, {"step_size": config.step_size / 1e4}),
        "they diverge (ε × 1,000)": (last, {"step_size": config.step_size * 1e3}),
        "averaged from the start (no burn-in)": (
            last, {"num_burnin": 0, "num_draws": config.num_burnin + config.num_draws},
        ),
        "the base, for comparison": (last, {}),
    }  # fmt: skip


def resolved(config, change: dict) -> dict:
    """The settings of an estimate; `change` is what departs from the base."""
    base = {
        name: getattr(config, name)
        for name in ("num_data", "batch_size", "seed", "step_size", "localization", "num_draws",
                     "num_burnin")
    }  # fmt: skip
    return {**base, "loss": "mean", "fixed": 0, **change}


def measure(config, params, subject: Subject, step: int, s: dict):
    """One estimate at the settings `resolved` returns."""
    import jax

    import llc_jax

    fixed = subject.fixed.get(s["fixed"])
    estimate = llc_jax.estimate_llc(
        jax.random.key(s["seed"]), subject.losses[s["loss"]], params,
        subject.draw(s["num_data"], config.data_seed), step=step,
        sampler=problems.sampler_of(config, s["step_size"]), nbeta=config.nbeta,
        localization=s["localization"], num_chains=config.num_chains, num_draws=s["num_draws"],
        num_burnin=s["num_burnin"], batch_size=s["batch_size"], grad_accum=config.grad_accum,
        num_probes=0, collect=fixed,
    )  # fmt: skip
    return estimate if fixed is None else evaluated(estimate, float(jax.jit(fixed)(params)))


def evaluated(estimate, anchor_loss: float):
    """The estimate of the same chains with the collected losses of the draws in place of their own.

    Args:
      estimate: whose `collected` is a loss, [chain, burn-in + draw].
      anchor_loss: the same of the anchor.
    """
    from llc_jax.diagnostics import diagnose

    losses = np.asarray(estimate.collected, float)[:, estimate.burnin_losses.shape[1] :]
    finite = estimate.diverged_at < 0
    gaps = estimate.settings["nbeta"] * (losses - anchor_loss)[finite]
    found = diagnose(gaps, estimate.distance[finite])
    return dataclasses.replace(
        estimate, losses=losses, anchor_losses=np.full_like(losses, anchor_loss),
        mean=float(gaps.mean()) if gaps.size else float("nan"),
        below_anchor=float((gaps < 0).mean()) if gaps.size else float("nan"), **found._asdict(),
    )  # fmt: skip


def record(estimate) -> dict:
    """What is kept of an estimate: the value, its error, and what λ̂ was after fewer draws."""
    finite = estimate.diverged_at < 0
    gaps = estimate.losses[finite].astype(float) - estimate.anchor_losses[finite]
    kept = np.unique(np.linspace(1, gaps.shape[1], TRACE_POINTS).astype(int))
    mean = gaps.mean(axis=0) if finite.any() else np.full(gaps.shape[1], np.nan)
    running = np.cumsum(mean)[kept - 1] / kept * estimate.settings["nbeta"]
    return {
        "llc": estimate.mean, "stderr": estimate.stderr, "rhat": estimate.rhat,
        "verdict": estimate.verdict, "num_burnin": estimate.burnin_losses.shape[1],
        "draws": kept + estimate.burnin_losses.shape[1], "running": running,
        "distance": estimate.distance.mean(),
    }  # fmt: skip


def grid(config, params, subject: Subject, step: int) -> list[dict]:
    """The grid of step size, nβ and γ as one program."""
    import jax

    import llc_jax

    data = subject.draw(config.num_data, config.data_seed)
    factors = [np.array(numbers(getattr(config, name))) for name in
               ("step_factors", "nbeta_factors", "localization_factors")]  # fmt: skip
    steps, nbetas, gammas = (
        base * f.reshape([-1 if i == axis else 1 for i in range(3)])
        for axis, (base, f) in enumerate(
            zip((config.step_size, config.nbeta, config.localization), factors, strict=True)
        )
    )
    found = llc_jax.estimate_llc_over_settings(
        jax.random.key(config.seed), subject.losses["mean"], params, data, step=step,
        sampler=problems.sampler_of(config, steps), nbeta=nbetas, localization=gammas,
        num_chains=config.num_chains, num_draws=config.num_draws, num_burnin=config.num_burnin,
        batch_size=config.batch_size, grad_accum=config.grad_accum,
        setting_batch=config.setting_batch or None, num_probes=0,
    )  # fmt: skip
    names = ("step_size", "nbeta", "localization")
    return [{name: e.settings[name] for name in names} | record(e) for e in found.ravel()]
