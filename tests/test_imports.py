"""The arrows: who may import whom, what an import may load, and what the contract with plugins is."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import autoround_core

ROOT = Path(__file__).parents[1]
CORE = ROOT / "packages" / "autoround-core" / "src" / "autoround_core"

# a package may import these siblings and no other
ARROWS = {
    "autoround_core": set(),
    "autoround_export": {"autoround_core"},
    "autoround_backends": {"autoround_core"},
    "autoround_cli": {"autoround_core"},
    "autoround_mllm": {"autoround_core", "autoround_cli"},
}

# rooms of core, the lowest first: a module imports from its own room and those below
ROOMS = [
    ["errors", "scheme", "settings", "progress", "corpus", "documents", "fusing", "target"],
    ["recipe", "records", "bitpack", "affine", "shards", "superblock", "support", "calibration_set"],
    ["family", "layout", "format", "backend", "algorithm", "adapter"],
    [
        "activations", "float_grid", "float_family", "int_family", "rtn", "signround", "attention",
        "serving_attention", "flow", "capture", "compute", "model_block", "calibration",
        "checkpoint_names", "structure", "transformers_adapter", "causal_lm",
    ],
    ["hookspecs", "registry", "builtin"],
    ["model_outline", "plan", "source", "output", "quantize", "loading", "verify", "report", "evaluation",
     "conversion", "checkpoints", "autoround", "speed"],
    ["testing"],
]

PUBLIC = """
ActivationScheme AffineWeight Algorithm AutoRound AutoRoundError Backend Block BlockResult BlockView CalibrationError
CalibrationSet CheckpointContext CheckpointError CheckpointFormat CheckpointReader CheckpointWriter Estimate
Evaluation FloatWeight LayerPlan LinearSite LinearSpec ModelAdapter ModelError ModelOutline ModelView NonFiniteError
NumberFamily OutputError Plan PluginError PluginRecord Progress QuantRecipe QuantScheme QuantizedLayer QuantizedWeight
RECIPES Registry Run SchemeChoice ShardWriter SuperBlockWeight Support Target TensorFiles TensorLayout
TransformersAdapter TunableWeight TuningSettings UnknownNameError UnsupportedError UsageError Verdict
VerificationError convert evaluate fused_layers get_registry hookimpl load load_calibration pack_bits packed_bytes
parse_layer_config product_dtype read_json select_backend tuning_settings unknown_name unpack_bits write_json
"""

HOOKS = """
@hookspec
def autoround_number_families() -> Iterable[NumberFamily]
@hookspec
def autoround_algorithms() -> Iterable[Algorithm]
@hookspec
def autoround_formats() -> Iterable[CheckpointFormat]
@hookspec
def autoround_backends() -> Iterable[Backend]
@hookspec(firstresult=True)
def autoround_model_adapter(config: dict[str, Any]) -> ModelAdapter | None
@hookspec
def autoround_commands(cli: click.Group) -> None
"""


def imported(path: Path) -> set[str]:
    """Full names of the modules that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def core_graph() -> dict[str, set[str]]:
    """{module: modules of core that it imports}, a subpackage counting as one module."""
    graph: dict[str, set[str]] = {}
    for path in CORE.rglob("*.py"):
        module = path.relative_to(CORE).parts[0].removesuffix(".py")
        names = {name.split(".")[1] for name in imported(path) if name.startswith("autoround_core.")}
        graph.setdefault(module, set()).update(names - {module})
    modules = graph.keys() - {"__init__"}
    return {module: names & modules for module, names in graph.items() if module != "__init__"}


# --- (a) between packages, (b) inside core -----------------------------------------------------------------


def test_every_package_is_known():
    assert {path.name for path in ROOT.glob("packages/*/src/*") if path.is_dir()} >= ARROWS.keys()


@pytest.mark.parametrize("package", ARROWS)
def test_a_package_imports_only_what_is_below_it(package):
    files = list(ROOT.glob(f"packages/*/src/{package}/**/*.py"))
    assert files
    for path in files:
        siblings = {name.split(".")[0] for name in imported(path) if name.startswith("autoround")} - {package}
        wrong = siblings - ARROWS[package]
        assert not wrong, f"{path.relative_to(ROOT)} imports {sorted(wrong)}"


def test_every_module_of_core_has_its_room():
    assert sorted(module for room in ROOMS for module in room) == sorted(core_graph())


def test_inside_core_imports_go_down_only():
    level = {module: number for number, room in enumerate(ROOMS) for module in room}
    wrong = [f"{module} imports {name}" for module, names in core_graph().items() for name in names
             if level[name] > level[module]]
    assert wrong == []


def test_inside_core_there_is_no_cycle():
    TopologicalSorter(core_graph()).prepare()  # raises CycleError


# --- (c) what an import loads ------------------------------------------------------------------------------


def loaded(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter holds after running `code`."""
    code += "\nimport sys\nprint('loaded:', *({'torch', 'transformers', 'datasets', 'numpy'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


COMMAND = """
import sys
from autoround_cli.main import main
try:
    main({arguments})
except SystemExit as stop:
    assert not stop.code, stop.code
"""


def test_importing_core_loads_nothing_heavy():
    assert loaded("import autoround_core, autoround_core.registry, autoround_core.hookspecs") == set()


@pytest.mark.parametrize("arguments", [["--help"], ["plugins"], ["quantize", "--help"], ["--version"]])
def test_commands_that_compute_nothing_load_nothing_heavy(arguments):
    assert loaded(COMMAND.format(arguments=arguments)) == set()


def test_a_record_loads_torch_and_no_transformers():
    found = loaded("import autoround_core\nautoround_core.AffineWeight")
    assert "torch" in found
    assert not {"transformers", "datasets"} & found


def test_formats_and_backends_load_no_transformers():
    found = loaded("import autoround_core as core\nr = core.get_registry()\nassert r.formats() and r.backends()")
    assert "torch" in found
    assert not {"transformers", "datasets"} & found


# --- (d) the contract --------------------------------------------------------------------------------------


def test_public_names_are_the_agreed_ones():
    """Names may be added here with a minor release; taking one away breaks plugins."""
    assert autoround_core.__all__ == sorted(PUBLIC.split())


def test_every_public_name_is_there():
    for name in autoround_core.__all__:
        assert getattr(autoround_core, name) is not None


def test_hooks_are_the_agreed_ones():
    """Hooks and trailing arguments may be added with a minor release; nothing else may change."""
    tree = ast.parse((CORE / "hookspecs.py").read_text())
    lines = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.body = [ast.Pass()]
            text = ast.unparse(node)
            lines.append(text[: text.rindex(":\n    pass")])
    assert "\n".join(lines) == HOOKS.strip()
