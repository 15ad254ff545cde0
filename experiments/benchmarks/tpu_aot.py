"""Plans a pod run without a pod: the published LLC sweep, compiled for TPU topologies.

    make tpu-aot

libtpu holds the whole TPU compiler, so nothing but the run itself is missing. It lives in a
virtual environment of its own (`.venv-tpu`), because JAX looks for a TPU wherever it is installed.
Per topology it shows: the mesh that `checkpoint_batch` fills, collectives (required: none, the
devices never talk to each other), the memory of a device, and a roofline estimate of the sweep.
"""

import collections
import dataclasses
import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from experiments import estimate_llc, train_regression
from experiments.benchmarks import programs, timing
from experiments.cli import option
from experiments.training import schedule
from llc_jax import parallel
from llc_jax.sampling import anchors

COLLECTIVES = re.compile(
    r"\b(all-reduce|all-gather|reduce-scatter|collective-permute|collective-broadcast|all-to-all"
    r"|ragged-all-to-all)"
)
# TPU v5e: 197 TFLOP/s in bfloat16 (one pass of the matrix unit, XLA's default precision for
# float32 operands), 819 GB/s and 16 GB of HBM. Source: the system architecture page of Google.
PEAK_FLOPS, PEAK_BYTES, HBM_BYTES = 197e12, 819e9, 16e9
PAPER = estimate_llc.PRESETS["paper"]


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compiled; the defaults are the published settings."""

    topologies: str = option("v5e:4x4,v5e:16x16", "TPU topologies; the estimate is for v5e.")
    num_draws: int = option(PAPER.num_draws, "Draws per chain after burn-in.")
    num_burnin: int = option(PAPER.num_burnin, "Draws per chain thrown away first.")
    batch_size: int = option(PAPER.batch_size, "Sequences per minibatch.")
    num_data: int = option(PAPER.num_data, "Sequences in the data set, n.")
    d_model: int = option(train_regression.PRESETS["paper"].d_model, "Width of the model.")


def topology(name: str) -> list[Any]:
    """Descriptions of the devices of a topology such as `v5e:4x4`; needs libtpu, and no TPU."""
    # What libtpu would ask the metadata server of a TPU machine, and complain about if it is not
    # there; the topology is the one given below all the same.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def lanes(mesh: Mesh, num_checkpoints: int, num_chains: int) -> tuple[int, int]:
    """(checkpoints, chains of each) that the busiest device samples at once."""
    rows, columns = mesh.shape[parallel.CHECKPOINT], mesh.shape[parallel.CHAIN]
    return -(-num_checkpoints // rows), -(-num_chains // columns)


def fill(total: int, num_chains: int, devices: list[Any]) -> int:
    """The smallest `checkpoint_batch` with which a sweep of `total` checkpoints is shortest."""

    def length(size: int) -> int:
        checkpoints, chains = lanes(parallel.make_mesh(size, num_chains, devices), size, num_chains)
        return -(-total // size) * checkpoints * chains

    return min(range(1, total + 1), key=lambda size: (length(size), size))


def lower_anchor(args: tuple, loss_fn, batch_size: int, mesh: Mesh):
    """Lowers the program of the losses of the anchors, for a single pass over a minibatch."""
    rows = jax.ShapeDtypeStruct((0, batch_size), jnp.int32, sharding=jax.NamedSharding(mesh, P()))
    return anchors.losses_at.lower(args[1].anchor, args[4], rows, loss_fn=loss_fn, mesh=mesh)


def cost(program: Any) -> collections.Counter:
    """Operations and bytes of a compiled program, per device."""
    analysis = program.cost_analysis()
    return collections.Counter({key: int(analysis[key]) for key in ("flops", "bytes accessed")})


def counts_loop_bodies_once(mesh: Mesh) -> bool:
    """Whether the cost of a scan of 16 matrix products is that of a scan of 8."""
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=jax.NamedSharding(mesh, P()))
    short, long = (
        cost(jax.jit(lambda x, n=n: jax.lax.scan(lambda y, _: (y @ x, None), x, length=n)[0])
             .lower(x).compile())["flops"]
        for n in (8, 16)
    )  # fmt: skip
    return long < 1.5 * short


def compile_sweep(config: Config, name: str) -> dict[str, Any]:
    """Compiles a chunk of the sweep for a topology and describes it, per device."""
    training = train_regression.PRESETS["paper"]
    problem = programs.regression(config.d_model, training.num_layers)
    total = len(schedule(training))
    devices = topology(name)
    size = fill(total, PAPER.num_chains, devices)
    mesh = parallel.make_mesh(size, PAPER.num_chains, devices)
    checkpoints, chains = lanes(mesh, size, PAPER.num_chains)
    args = programs.shapes(
        problem, mesh, config.num_data, checkpoints * mesh.shape[parallel.CHECKPOINT]
    )

    def lower(num_probes: int):
        plan = programs.make_plan(
            config.num_draws, config.batch_size, num_burnin=config.num_burnin,
            chain_batch=chains, num_probes=num_probes,
        )  # fmt: skip
        columns = mesh.shape[parallel.CHAIN]
        return programs.lower_sample(args, problem.loss_fn, plan, chains * columns, mesh)

    program, seconds = timing.compiled(lower(num_probes=8))
    # A branch of the body: without it a body is a step, and its few probes are left out below.
    unprobed = cost(lower(num_probes=0).compile())
    anchor = cost(lower_anchor(args, problem.loss_fn, config.batch_size, mesh).compile())
    once = counts_loop_bodies_once(mesh)
    steps, passes = config.num_burnin + config.num_draws, -(-config.num_data // config.batch_size)

    def per_sweep(key: str) -> int:
        trips, more = (steps, passes) if once else (1, 1)
        chunk = trips * unprobed[key] + more * anchor[key]
        return -(-total // size) * chunk

    return {
        "mesh": dict(mesh.shape),
        "lanes": (checkpoints, chains),
        "checkpoint_batch": size,
        "num_checkpoints": total,
        "compile_seconds": seconds,
        "collectives": sorted(set(COLLECTIVES.findall(program.as_text()))),
        "memory": program.memory_analysis(),
        "once": once,
        "flops": per_sweep("flops"),
        "bytes": per_sweep("bytes accessed"),
    }


def run(config: Config) -> dict[str, dict[str, Any]]:
    """Prints a paragraph per topology; returns name -> what `compile_sweep` found."""
    found = {}
    for name in config.topologies.split(","):
        found[name] = it = compile_sweep(config, name)
        memory = it["memory"]
        parts = {
            "arguments": memory.argument_size_in_bytes,
            "outputs": memory.output_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "code": memory.generated_code_size_in_bytes,
        }
        counted = (
            "once (checked), so bodies are multiplied by their trips"
            if it["once"]
            else "as often as it runs (checked)"
        )
        print(
            f"{name}: mesh {it['mesh']}, checkpoint_batch {it['checkpoint_batch']}, at once on a"
            f" device {it['lanes'][0]} checkpoint(s) x {it['lanes'][1]} chains;"
            f" compiled in {it['compile_seconds']:.0f} s [{timing.machine()}]\n"
            f"  collectives: {', '.join(it['collectives']) or 'none'}\n"
            "  memory per device: "
            + ", ".join(f"{part} {size / 2**20:.1f} MiB" for part, size in parts.items())
            + f"; {sum(parts.values()) / HBM_BYTES:.1%} of 16 GB\n"
            f"  sweep of {it['num_checkpoints']} checkpoints, per device: {it['flops']:.3g}"
            f" operations, so at least {it['flops'] / PEAK_FLOPS:.3g} s at 197 TFLOP/s;"
            f" {it['bytes']:.3g} bytes into and out of fusions, {it['bytes'] / PEAK_BYTES:.3g} s at"
            " 819 GB/s if all of them went through HBM\n"
            f"  assumed: cost analysis counts a loop body {counted}; probes, host work, transfers"
            " and partly filled tiles of the matrix unit cost nothing",
            flush=True,
        )
    return found


def start(config: Config) -> None:
    """Keeps JAX from looking for a TPU, and runs."""
    jax.config.update("jax_platforms", "cpu")
    run(config)


if __name__ == "__main__":
    timing.main(Config, start)
