"""Imports point down: a package uses those below it in LAYERS, never one above or itself in a circle. Torch, NeMo and
data_prep are met in some packages only."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1] / "molmo2_nemo"
LAYERS = (  # docs/code.md says what each is
    *("cli", "launch", "nemo", "training", "evaluation", "inference", "plan", "preview", "convert"),
    "adapters",
    *(
        "cost",
        "rundir",
        "settings",
        "model",
        "features",
        "attention",
        "fused",
        "parallel",
        "data",
        "transfer",
        "cpu",
        "differences",
        "compat",
        "files",
        "processes",
        "errors",
    ),
)

ENTRIES = ("nemo.registration",)  # what NeMo's own commands import stands above all layers, as the molmo2 command does

WITHOUT_TORCH = ("settings", "rundir", "cost", "plan")
ONLY_IN = {  # what is imported -> the packages that may
    "nemo": ("nemo",),
    "lightning": ("nemo",),
    "nemo_run": ("nemo", "launch.slurm"),  # the latter for its Slurm executor, which needs no NeMo
    "data_prep": ("cli",),
}


@cache
def imports() -> dict[str, set[str]]:
    """Module -> what it imports, at its top or later: modules, and names in them."""
    files = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted(ROOT.rglob("*.py"))}
    found: dict[str, set[str]] = {}
    for module, path in files.items():
        names = found[module.removesuffix("__init__").removesuffix(".")] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
                names.add(str(node.module))
    return found


def own_imports() -> dict[str, set[str]]:
    """Module -> the modules of this package among them."""
    found = imports()
    ours = {
        m: {n.removeprefix("molmo2_nemo.") for n in names if n.startswith("molmo2_nemo.")} for m, names in found.items()
    }
    return {module: (names & set(found)) - {module} for module, names in ours.items()}


def test_imports_point_down():
    depth = {name: number for number, name in enumerate(LAYERS)}
    packages = {module: module.split(".")[0] for module in own_imports() if module}
    used = {name for names in own_imports().values() for name in names}
    assert not used & set(ENTRIES)  # nothing below imports them
    assert set(packages.values()) == set(LAYERS)
    upward = [
        f"{module} imports {used}"
        for module, names in own_imports().items()
        for used in names
        if module
        and module not in ENTRIES
        and packages[module] != packages[used]
        and depth[packages[module]] > depth[packages[used]]
    ]
    assert not upward


def test_no_file_imports_itself_in_a_circle():
    TopologicalSorter(own_imports()).prepare()  # raises CycleError and names the circle


def test_torch_nemo_and_data_prep_are_imported_where_they_belong():
    modules = [module for module in imports() if module.split(".")[0] in WITHOUT_TORCH]
    used = {(name.split(".")[0], module) for module, names in imports().items() for name in names}
    assert not used & {("torch", module) for module in modules}
    allowed = {(w, m) for w, m in used if any(f"{m}.".startswith(f"{p}.") for p in ONLY_IN.get(w, ()))}
    assert {what for what, _ in allowed} == set(ONLY_IN)  # the search finds what is there
    assert not {(what, module) for what, module in used - allowed if what in ONLY_IN}
    code = f"import sys, {', '.join(f'molmo2_nemo.{m}' for m in modules)}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)  # nor does anything that these import


def test_all_but_the_host_needs_no_nemo():
    """What another host would use is imported, in one process, where NeMo and Lightning are not to be found."""
    hosts = ("nemo", "nemo_run", "lightning", "pytorch_lightning")
    modules = [m for m in own_imports() if m and m.split(".")[0] not in ("nemo", "launch", "cli")]
    modules = [m for m in modules if m not in ("adapters.lmms_eval", "adapters.vlmevalkit")]  # they need theirs
    code = f"""
import importlib, sys
for name in {hosts}:
    sys.modules[name] = None  # an import of it is an ImportError
from molmo2_nemo import cpu
cpu.enable()
for name in {modules}:
    importlib.import_module(f"molmo2_nemo.{{name}}")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"training.optimizer", "training.checkpoints", "inference.generate", "model.molmo2"} <= set(modules)
