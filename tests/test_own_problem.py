"""A problem of a file: forty lines get what the runs of this package get, from any checkpoints."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import llc_jax
from experiments import (
    calibrate_sgld,
    cli,
    estimate_llc,
    find_stages,
    make_figures,
    make_report,
    measure_behavior,
    measure_curvature,
    problems,
    train_language,
    vary_llc,
)
from experiments import run as run_loop
from experiments import workdir as workdirs
from llc_jax.problems import Problem
from llc_jax.problems.base import passes
from llc_jax.storage import files, foreign, results
from llc_jax.storage.pytrees import CheckpointError

ROOT = pathlib.Path(__file__).parents[1]
STEPS = (0, 5, 20, 60, 150)

MINE = """
import numpy as np
import jax.numpy as jnp
import llc_jax.problems
from llc_jax.storage import foreign

def loss_fn(params, batch):
    return (batch["x"] @ params["w"] - batch["y"]) ** 2

def make_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(96, 3)).astype(np.float32)
    return {"x": x, "y": x @ np.float32([1, 2, 3]) + rng.normal(size=96).astype(np.float32)}

def error(params):
    return jnp.abs(params["w"] - jnp.array([1.0, 2.0, 3.0]))

PROBLEM = llc_jax.problems.Problem(
    name="line", loss_fn=loss_fn, data=make_data,
    checkpoints=lambda: foreign.open_folder(CHECKPOINTS),
    metrics={"error": error, "norm": lambda params: jnp.linalg.norm(params["w"])},
    presets={"tiny": {
        "num_draws": 30, "num_burnin": 20, "step_size": 1e-2, "nbeta": 20.0,
        "localization": 10.0, "num_chains": 2, "batch_size": 16,
        "measure_curvature": {"num_data": 96, "num_eigenvalues": 1, "num_deflated": 2,
                              "num_iterations": 2, "num_probes": 2},
        "calibrate_sgld": {"num_checkpoints": 1, "step_fractions": "0.2", "nbeta_factors": "1",
                           "localization_factors": "1,3"},
        "vary_llc": {"num_checkpoints": 1, "data_sizes": "48,2048", "batch_sizes": "16",
                     "fixed_sizes": "32", "seeds": "1", "step_factors": "1",
                     "nbeta_factors": "1,3", "localization_factors": "1"},
    }},
)
"""


def weights(step):
    """On a straight way from 0 to the truth."""
    return {"w": np.float32([1, 2, 3]) * np.float32(1 - np.exp(-step / 40))}


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "saved").mkdir()
    for step in STEPS:
        np.savez(tmp_path / "saved" / f"step_{step}.npz", **weights(step))
    path = tmp_path / "mine.py"
    path.write_text(f"CHECKPOINTS = {str(tmp_path / 'saved')!r}\n" + MINE)
    return path


def config(module, mine, workdir, **changes):
    base = module.PRESETS.of(str(mine))["tiny"]
    return dataclasses.replace(base, workdir=str(workdir), **changes)


def test_everything_from_a_file(mine, tmp_path, capsys):
    workdir = tmp_path / "run"
    before = {p: files.digest([p]) for p in (tmp_path / "saved").iterdir()}
    for module in (estimate_llc, measure_curvature, find_stages, vary_llc, make_report):
        module.run(config(module, mine, workdir))
    sweep = results.load_sweep(workdir / "llc")
    assert sweep.checkpoint.values.tolist() == list(STEPS)
    # The library on the same problem: nothing is added or left out.
    problem = problems.alone(str(mine))
    estimate = llc_jax.estimate_llc(
        jax.random.key(0), problem.loss_fn, weights(150), problem.data(), step=150,
        sampler=llc_jax.SGLD(1e-2), nbeta=20.0, localization=10.0, num_chains=2, num_draws=30,
        num_burnin=20, batch_size=16,
    )  # fmt: skip
    assert float(sweep.llc[-1]) == pytest.approx(estimate.mean, rel=1e-5)
    trace = measure_curvature.load(workdir / "llc" / "curvature")[150].trace
    assert trace == pytest.approx(2 * np.sum(problem.data()["x"] ** 2) / 96, rel=0.2)
    measured = results.load(workdir / "behavior", "measure_behavior")
    np.testing.assert_allclose(measured.norm, [np.linalg.norm(weights(s)["w"]) for s in STEPS])
    assert measured.error.shape == (len(STEPS), 3)
    page = (workdir / "report.html").read_text()
    for text in ("of run: line", "<h2>Metrics</h2>", "<h2>Curvature</h2>", "mine.py"):
        assert text in page
    assert (workdir / "figures" / "metrics.png").stat().st_size > 0
    records = vary_llc.load(workdir / "variations")
    assert {r["value"] for r in records if r["what"] == "num_data"} == {48.0, 96.0}
    make_figures.run(config(make_figures, mine, workdir))
    assert (workdir / "figures" / "slopes.png").exists()
    # Again: nothing to do, nothing changed; and what is not ours was never touched.
    kept = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
    capsys.readouterr()
    for module in (estimate_llc, measure_curvature, find_stages, make_report):
        module.run(config(module, mine, workdir))
    said = capsys.readouterr().out
    assert said.count("are done") == 3
    assert said.count("up to date") == 2
    slopes = workdir / "figures" / "slopes.png"
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert slopes in kept
    assert {p: files.digest([p]) for p in (tmp_path / "saved").iterdir()} == before


@pytest.mark.slow
def test_calibration_of_a_file_proposes_a_command_that_runs(mine, tmp_path):
    calibrate_sgld.run(config(calibrate_sgld, mine, tmp_path / "run"))
    line = files.read_json(tmp_path / "run" / "calibration" / "calibration.json")["run"]
    assert f"--problem={mine}" in line
    done = subprocess.run(
        [sys.executable, *line.split()[1:], "--num_draws=5", "--num_burnin=2"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert results.finished_steps(tmp_path / "run" / "llc-calibrated") == list(STEPS)


def test_another_problem_or_other_data_are_refused(mine, tmp_path):
    workdir = tmp_path / "run"
    one = config(estimate_llc, mine, workdir, checkpoints="0")
    estimate_llc.run(one)
    text = mine.read_text()
    mine.write_text(text.replace('name="line"', 'name="curve"'))
    with pytest.raises(ValueError, match=r"problem: .line. before, 'curve' now.*--name"):
        estimate_llc.run(dataclasses.replace(one, checkpoints=""))
    mine.write_text(text.replace("size=(96, 3)", "size=(90, 3)").replace("size=96", "size=90"))
    with pytest.raises(ValueError, match="the data set has SHA-256"):
        estimate_llc.run(dataclasses.replace(one, checkpoints=""))


def test_files_without_a_problem_are_refused(tmp_path):
    path = tmp_path / "none.py"
    asked = estimate_llc.Config(workdir=str(tmp_path), problem=str(path))
    with pytest.raises(ValueError, match="does not exist"):
        estimate_llc.run(asked)
    path.write_text("PROBLEM = 3\n")
    with pytest.raises(ValueError, match=r"PROBLEM is 3 there; define.*Problem\(name="):
        estimate_llc.run(asked)
    with pytest.raises(ValueError, match=r"problem=.chess'.*regression, language, deep_linear"):
        estimate_llc.run(dataclasses.replace(asked, problem="chess"))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"name": "a/b"}, "give a plain name"),
        ({"data": {"x": 1}}, "give a function"),
        ({"metrics": {"a b": abs}}, "names of ASCII letters"),
        ({"presets": [1]}, "give a dict"),
    ],
)
def test_wrong_fields_are_refused(wrong, said):
    given = {"name": "a", "loss_fn": min, "data": dict, "checkpoints": dict} | wrong
    with pytest.raises(ValueError, match=said):
        Problem(**given)


def test_a_preset_with_an_unknown_flag_is_refused(mine):
    mine.write_text(mine.read_text().replace('"num_eigenvalues"', '"num_eigenvalue"'))
    with pytest.raises(ValueError, match="preset tiny gives measure_curvature the flag"):
        measure_curvature.PRESETS.of(str(mine))


# --- samplers ----------------------------------------------------------------------------------

SAMPLER = """
from typing import NamedTuple
import llc_jax

class Slow(NamedTuple):
    step_size: float
    factor: float = 1.0
    def init(self, params):
        return llc_jax.SGLD(self.step_size).init(params)
    def step(self, rng_key, state, evaluate, mask=None):
        slow = llc_jax.SGLD(self.step_size * self.factor)
        return slow.step(rng_key, state, evaluate, mask)
"""


def test_sampler_and_its_options_are_flags(mine, tmp_path):
    (tmp_path / "slow.py").write_text(SAMPLER)
    slow = f"{tmp_path / 'slow.py'}:Slow"
    for name, flags in {
        "llc": {},
        "same": {"sampler": slow},
        "slow": {"sampler": slow, "sampler_options": "factor=0.25"},
        "half": {"step_size": 0.25e-2},
        "baoab": {"sampler": "BAOAB", "sampler_options": "friction=10"},
    }.items():
        estimate_llc.run(config(estimate_llc, mine, tmp_path, name=name, checkpoints="60", **flags))
    found = {name: results.load_sweep(tmp_path / name) for name in ("llc", "same", "slow", "half")}
    np.testing.assert_array_equal(found["llc"].losses, found["same"].losses)
    np.testing.assert_array_equal(found["half"].losses, found["slow"].losses)
    assert results.load_sweep(tmp_path / "baoab").attrs["sampler"] == "BAOAB"
    record = files.read_json(tmp_path / "llc" / "config.json")
    assert "sampler" not in record["config"]  # as in records of before there was the flag
    with pytest.raises(ValueError, match="sampler: None before, 'BAOAB' now"):
        estimate_llc.run(
            config(estimate_llc, mine, tmp_path, sampler="BAOAB", sampler_options="friction=10")
        )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"sampler": "SGLB"}, "sampler='SGLB': choose from .*BAOAB.*SGLD"),
        ({"sampler": "BAOAB"}, "needed: friction"),
        ({"sampler": "SGLD", "sampler_options": "friction=1"}, "SGLD takes none"),
        ({"sampler": "BAOAB", "sampler_options": "friction=x"}, "name=number"),
        ({"sampler": "MALA", "sampler_options": "step_size=1"}, "a flag of its own"),
    ],
)
def test_wrong_samplers_are_refused(flags, said):
    with pytest.raises(ValueError, match=said):
        problems.sampler_of(estimate_llc.Config(**flags), 1.0)


def test_a_run_is_measured_by_the_experiment_for_it(tmp_path):
    training = dataclasses.replace(train_language.PRESETS["smoke"], workdir=str(tmp_path))
    record = {"config": cli.identity(training), "experiment": "train_language", "preset": "smoke"}
    files.write_json(tmp_path / "train.json", record)
    with pytest.raises(ValueError, match=r"run of language: use .*measure_language"):
        measure_behavior.run(measure_behavior.Config(workdir=str(tmp_path)))
    with pytest.raises(ValueError, match="was trained by train_language"):
        measure_behavior.run(measure_behavior.Config(workdir=str(tmp_path), problem="regression"))


def test_curvature_of_an_older_version_is_refused_and_then_converted(tmp_path):
    one = llc_jax.Curvature(1.5, 0.1, *[np.arange(2.0) + i for i in range(4)],
                            float("nan"), 1.0, 2.0, 3.0, 34)  # fmt: skip
    workdirs.append_jsonl(tmp_path / "records.jsonl", {"step": 7, **one._asdict()})
    with pytest.raises(ValueError, match="older version: measure_curvature will convert it"):
        measure_curvature.load(tmp_path)
    measure_curvature.adopt_older(tmp_path)
    found = measure_curvature.load(tmp_path)[7]
    assert str(found) == str(one)
    assert isinstance(found.num_products, int)
    text = measure_curvature.table(results.load(tmp_path, "measure_curvature"))
    assert text.splitlines()[1] == "7,1.5,0.1,0.0,1.0,1.0,2.0,2.0,3.0,3.0,4.0,,1.0,2.0,3.0,34"


# --- freshness ---------------------------------------------------------------------------------


def test_one_rule_says_what_is_fresh(tmp_path):
    record, known = tmp_path / "r.json", {"config": {"a": 1}, "inputs": "x"}
    assert not run_loop.is_fresh(record, known)
    run_loop.commit(record, known, {"out.txt": "text"}, note=1)
    assert run_loop.is_fresh(record, known)
    assert not run_loop.is_fresh(record, known | {"inputs": "y"})
    (tmp_path / "out.txt").write_text("other")
    assert not run_loop.is_fresh(record, known)
    (tmp_path / "out.txt").unlink()
    assert not run_loop.is_fresh(record, known)
    files.write_json(record, known)  # of an older version, without hashes
    assert not run_loop.is_fresh(record, known, "out.txt")
    assert run_loop.is_fresh(record, known)


# --- openers -----------------------------------------------------------------------------------


def save_safetensors(path, arrays, names=None):
    """The format: eight bytes of length, a JSON header, raw numbers."""
    kinds = {"float32": "F32", "bfloat16": "BF16", "int64": "I64", "float16": "F16"}
    header, data = {"__metadata__": {"format": "np"}}, b""
    for name, x in arrays.items():
        raw = np.ascontiguousarray(x).tobytes()
        header[name] = {"dtype": kinds[x.dtype.name], "shape": list(x.shape),
                        "data_offsets": [len(data), len(data) + len(raw)]}  # fmt: skip
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_safetensors_are_read_as_they_were(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "layer.weight": rng.normal(size=(3, 4)).astype(np.float32),
        "layer.bias": rng.normal(size=4).astype(ml_dtypes.bfloat16),
        "count": np.array(7),
        "half": rng.normal(size=(2, 1, 2)).astype(np.float16),
    }
    for step in (9, 100):
        save_safetensors(tmp_path / f"model_{step}.safetensors", arrays)
    (tmp_path / "checkpoint-250").mkdir()
    save_safetensors(tmp_path / "checkpoint-250" / "model.safetensors", arrays)
    found = foreign.open_folder(tmp_path)
    assert list(found) == [9, 100, 250]
    for step in found:
        assert found[step].keys() == arrays.keys()
        for name, x in found[step].items():
            assert x.dtype == arrays[name].dtype
            np.testing.assert_array_equal(x, arrays[name])
    nested = foreign.open_folder(tmp_path, separator=".")[9]
    np.testing.assert_array_equal(nested["layer"]["weight"], arrays["layer.weight"])


@pytest.mark.parametrize("cut", [4, 40, -3])
def test_cut_safetensors_are_refused(tmp_path, cut):
    save_safetensors(tmp_path / "s1.safetensors", {"a": np.zeros(5, np.float32)})
    whole = (tmp_path / "s1.safetensors").read_bytes()
    (tmp_path / "s1.safetensors").write_bytes(whole[:cut])
    with pytest.raises(CheckpointError, match="half copied"):
        foreign.open_folder(tmp_path)[1]


def test_npz_runs_no_code(tmp_path):
    np.savez(tmp_path / "s1.npz", a=np.array([{}], object))
    with pytest.raises(CheckpointError, match="without running code"):
        foreign.open_folder(tmp_path)[1]


def test_npz_of_a_dtype_it_cannot_hold_is_refused(tmp_path):
    np.savez(tmp_path / "s1.npz", a=np.ones(3, ml_dtypes.bfloat16))
    with pytest.raises(CheckpointError, match="no bfloat16"):
        foreign.open_folder(tmp_path)[1]


def test_folders_without_checkpoints_are_refused(tmp_path):
    with pytest.raises(ValueError, match="has no checkpoints"):
        foreign.open_folder(tmp_path)
    for name in ("a1.npz", "b1.npz"):
        np.savez(tmp_path / name, a=np.zeros(1))
    with pytest.raises(ValueError, match=r"step 1 twice, a1.npz and b1.npz"):
        foreign.open_folder(tmp_path)
    with pytest.raises(ValueError, match="both an array and a dict"):
        foreign.nested({"a": np.zeros(1), "a.b": np.zeros(1)}, ".")


def test_an_iterator_is_read_lazily_in_one_pass():
    read = []

    def opened():
        for step in STEPS:
            read.append(step)
            yield step, weights(step)

    found = passes(opened)
    assert list(found) == list(STEPS)
    read.clear()
    for step in STEPS[1:]:
        np.testing.assert_array_equal(found[step]["w"], weights(step)["w"])
    assert read == list(STEPS)
    np.testing.assert_array_equal(found[5]["w"], weights(5)["w"])  # back: a pass anew
    assert read == [*STEPS, 0, 5]
    with pytest.raises(KeyError):
        found[7]


def test_iterators_that_cannot_be_gone_through_again_are_refused():
    only_one = iter([(1, weights(1))])
    with pytest.raises(ValueError, match="return a new iterator"):
        passes(lambda: only_one)[1]
    with pytest.raises(ValueError, match="step 3 twice"):
        passes(lambda: [(3, {}), (3, {})])
    with pytest.raises(ValueError, match="gives nothing"):
        passes(list)


def test_a_stream_gives_examples_and_a_digest():
    stream = llc_jax.Stream(lambda key: {"x": jax.random.normal(key, (8, 2))})
    problem = Problem(name="s", loss_fn=min, data=lambda: stream, checkpoints=dict)
    assert problem.examples(20, 1)["x"].shape == (20, 2)
    _, one = problems.data_set(problem, 20, 1)
    assert one == problems.data_set(problem, 20, 1)[1] != problems.data_set(problem, 20, 2)[1]


def test_importing_the_problem_class_is_lazy():
    code = (
        "import sys, llc_jax.problems; assert 'xarray' not in sys.modules;"
        " llc_jax.problems.Problem; assert 'flax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_deep_linear_stands_alone(tmp_path):
    base = estimate_llc.PRESETS.of("deep_linear")["quickstart"]
    estimate_llc.run(dataclasses.replace(base, workdir=str(tmp_path), num_draws=20, num_burnin=10))
    problem = problems.alone("deep_linear")
    exact = problem.settings["local coefficient"]
    assert re.search(rf"coefficient {exact:g}$", problem.title)
    assert results.finished_steps(tmp_path / "llc") == [0]
    assert jnp.all(problem.loss_fn(problem.saved()[0], problem.data()) < 1e-9)


TERMS = """
import dataclasses
from llc_jax.observables import LossTerms

def terms(params, batch):
    whole = loss_fn(params, batch)
    return jnp.stack([0.25 * whole, 0.75 * whole], axis=1)

PROBLEM = dataclasses.replace(PROBLEM, observables={"parts": LossTerms(terms, keep=KEEP)})
"""


def test_terms_of_a_problem_are_in_its_report_whether_their_draws_are_kept_or_not(mine, tmp_path):
    found = []
    for keep in (True, False):
        path, workdir = tmp_path / f"terms_{keep}.py", tmp_path / f"run_{keep}"
        path.write_text(mine.read_text() + TERMS.replace("KEEP", str(keep)))
        for module in (estimate_llc, find_stages, make_report):
            module.run(config(module, path, workdir))
        sweep = results.load_sweep(workdir / "llc")
        assert ("parts_mean" in sweep) == keep
        parts, stderr = (x.values for x in results.parts_of(sweep))
        np.testing.assert_allclose(parts, sweep.llc.values[:, None] * [0.25, 0.75], rtol=1e-5)
        assert (workdir / "figures" / "parts.png").stat().st_size > 0
        assert "llc_part_1_stderr" in (workdir / "results.csv").read_text()
        found.append((parts, stderr))
    np.testing.assert_array_equal(*found)
