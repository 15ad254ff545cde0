"""What `import llc_jax` costs and touches, and who may import whom."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "llc_jax"
# From the bottom up: a room uses those before it. Numbers first, by jax, optax and numpyro alone.
LIBRARY = (
    "types", "ambient", "inputs", "trees", "losses", "parallel", "checkpoint_map", "diagnostics",
    "observables", "recorder", "samplers", "curvature", "sampling", "llc", "calibration", "stages",
)  # fmt: skip
REPRODUCTION = ("storage", "training", "metrics", "figures", "report", "problems")
ROOMS = {room: floor for floor, room in enumerate((*LIBRARY, *REPRODUCTION))}
# Third parties of the reproduction half, none of which `import llc_jax` may load or need.
HEAVY = {"flax", "orbax", "matplotlib", "xarray", "pandas", "arviz", "tqdm", "ml_collections"}


def in_a_fresh_process(code):
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


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
    # Cheap: nothing of third parties but what these two load. numpyro, scipy.optimize and
    # scipy.stats wait until something is computed with them.
    theirs = in_a_fresh_process(
        "import json, sys, optax, scipy.linalg; print(json.dumps(sorted(sys.modules)))"
    )
    free = {"llc_jax", "jax", *sys.stdlib_module_names}
    more = set(ours["modules"]) - set(theirs)
    assert {name for name in more if name.split(".")[0] not in free} == set()


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


def plotting(tree):
    """All nodes within methods `plot`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == "plot":
            yield from ast.walk(node)


def room(module):
    """The folder or file under `llc_jax` that a module belongs to."""
    return module.split(".")[1]


LOADED = {name: imports(name, at_module_level(tree)) for name, tree in MODULES.items()}
PLOTS = {name: imports(name, plotting(tree)) for name, tree in MODULES.items()}
MENTIONED = {name: imports(name, ast.walk(tree)) for name, tree in MODULES.items()}


def ours(names):
    """Modules among names that lie in a room."""
    return {name for name in names if name.startswith("llc_jax.")}


def test_every_module_lies_in_a_room():
    assert {room(module) for module in ours(MODULES)} == set(ROOMS)


@pytest.mark.parametrize("module", sorted(ours(MODULES)))
def test_import_direction(module):
    floor = ROOMS[room(module)]
    assert not {name for name in ours(LOADED[module]) if ROOMS[room(name)] > floor}
    # The one exception: what can be drawn has a method `plot`.
    above = {name for name in ours(MENTIONED[module]) if ROOMS[room(name)] > floor}
    assert above <= {name for name in PLOTS[module] if room(name) == "figures"}
    packages = {name.split(".")[0] for name in MENTIONED[module]}
    assert not packages & {"experiments", "absl", "ml_collections"}
    if room(module) in LIBRARY:
        assert not packages & {"flax", "orbax"}
        loaded = {name.split(".")[0] for name in LOADED[module]}
        assert not loaded & (HEAVY | {"numpyro"})
    if room(module) == "problems":
        kinds = {name.split(".")[2] for name in ours(MENTIONED[module]) if room(name) == "problems"}
        own = set(module.split(".")[2:3])
        assert kinds - own <= {"base"}, "problems do not know each other"


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
