"""What `import llc_jax` costs and touches, and who may import whom."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "llc_jax"
LIBRARY = {
    "types", "posterior", "samplers", "sampling", "stability", "sweep", "llc", "diagnostics",
    "estimate", "calibration", "curvature", "curvature_sweep", "hessian", "krylov", "lanczos",
    "mapping", "pilot", "proposal", "spectrum", "vectors", "checks", "parallel", "stages",
    "smoothing", "lanes", "vectorize", "anchors", "arrays", "program", "scalars", "soundness",
    "ambient", "closures", "tie", "traced", "probe", "weights", "gaussian_process", "points",
    "grid", "incurable", "walls",
}  # fmt: skip
# Third parties of the reproduction half, none of which `import llc_jax` may load or need.
HEAVY = {"flax", "orbax", "matplotlib", "xarray", "pandas", "arviz", "tqdm", "ml_collections"}


def in_a_fresh_process(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_is_cheap():
    # Processor time, the least of three, so that a busy machine does not fail it.
    def seconds(statement):
        code = f"import time\n{statement}\nprint(time.process_time())"
        return min(in_a_fresh_process(code) for _ in range(3))

    assert seconds("import llc_jax") - seconds("pass") < 2.0


PROBE = """
import json, os, sys
import jax
before = {k: repr(v) for k, v in jax.config.values.items()}
environment = dict(os.environ)
import llc_jax
after = {k: repr(v) for k, v in jax.config.values.items()}
from jax._src import xla_bridge
print(json.dumps(dict(
    modules=sorted(sys.modules),
    backends=sorted(xla_bridge._backends),
    changed=sorted(k for k in after if after[k] != before.get(k)),
    environment=dict(os.environ) == environment,
)))
"""


def test_import_loads_starts_and_changes_nothing_that_it_need_not():
    ours = in_a_fresh_process(PROBE)
    assert not {name.split(".")[0] for name in ours["modules"]} & HEAVY
    assert ours["backends"] == []
    assert ours["changed"] == []
    assert ours["environment"]
    assert "numpyro" not in ours["modules"]  # only where diagnostics are computed
    # optax brings a part of absl along; nothing of ours adds to it.
    assert "absl.app" not in ours["modules"]
    theirs = in_a_fresh_process("import json, sys, optax; print(json.dumps(sorted(sys.modules)))")
    assert {name for name in ours["modules"] if name.split(".")[0] == "absl"} <= set(theirs)


# --- import direction -------------------------------------------------------------------------


def modules():
    """{dotted name: syntax tree} of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(), filename=str(path))
    return found


MODULES = modules()


def at_module_level(node):
    """All nodes that run on import: not the bodies of functions, nor `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from at_module_level(child)


def imports(module, nodes):
    """Dotted names that `nodes` import; `from a import b` gives a.b if that is a module."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import in line {node.lineno}"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in MODULES else node.module)
    return found


def half(module):
    parts = module.split(".")
    return "library" if len(parts) == 1 or parts[1] in LIBRARY else "reproduction"


LOADED = {name: imports(name, at_module_level(tree)) for name, tree in MODULES.items()}
MENTIONED = {name: imports(name, ast.walk(tree)) for name, tree in MODULES.items()}


@pytest.mark.parametrize("module", MODULES)
def test_import_direction(module):
    assert not {name for name in MENTIONED[module] if name.split(".")[0] == "experiments"}
    if half(module) == "library":
        outside = {name.split(".")[0] for name in LOADED[module]}
        assert not outside & (HEAVY | {"absl", "numpyro"})
        anywhere = {name.split(".")[0] for name in MENTIONED[module]}
        assert not anywhere & {"flax", "orbax", "absl", "ml_collections"}
        upward = {n for n in LOADED[module] if n.startswith("llc_jax") and half(n) != "library"}
        assert not upward, f"{module} is of the library half, {upward} are not"
    assert "absl" not in {name.split(".")[0] for name in MENTIONED[module]}


def test_no_module_imports_itself_in_a_circle():
    def visit(module, path):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in LOADED[module] & MODULES.keys():
                visit(name, [*path, module])
            done.add(module)

    done = set()
    for module in MODULES:
        visit(module, [])


def test_the_public_names_are_the_table_of_contents():
    [table] = [
        node.value
        for node in ast.walk(MODULES["llc_jax"])
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    import llc_jax

    assert all(hasattr(llc_jax, name) for name in ast.literal_eval(table))
