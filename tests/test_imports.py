"""The shape of the package: imports point downward, the import is light, the public names are the promised ones."""

import ast
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import distprop

PACKAGE = Path(distprop.__file__).parent

# From the bottom up, as DESIGN.md draws it. A module may import its own floor and those above it in this list.
FLOORS = [
    {"allocator", "random", "sums", "tape", "pieces", "rows", "tensor", "functional"}
    | {"testing", "comm", "cost", "chart", "slurm"},
    {"nn", "buffer", "weights", "pace"},
    {"optim", "data"},
    {"parallel", "fixed_tree", "lane", "message_sum", "replicas", "running"},
    {"checkpoint", "shared_folder"},
    {"environment", "evaluation", "fingerprint", "frame", "live", "logs", "metrics", "panel", "progress"}
    | {"diagnosis", "health", "look", "repeat", "run_checkpoints", "rundir", "stopping", "tensorboard", "timeline"}
    | {"train", "update", "verdicts"},
    {"config", "job", "hosts", "launch", "launcher", "processes", "restart", "rank", "bench", "witness"},
    {"capture", "doctor", "evidence", "forecast", "numbers", "predict", "replay", "report", "rerun", "run_charts"}
    | {"stylesheet", "svg", "trace"},
    {"cli", "__main__"},
]


def modules() -> dict[str, Path]:
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def imported_names(path: Path) -> set[str]:
    """All modules of this package that `path` imports, also inside functions, but not those only for type checkers."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "distprop":
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            submodules = {name for name in submodules if is_module(name)}
            names |= submodules
            if len(submodules) < len(node.names):
                names.add(node.module)
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.split(".")[0] == "distprop"}
    return names


def is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or path.joinpath("__init__.py").is_file()


def top(module: str) -> str:
    return module.split(".")[0]


def floor(module: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if top(module) in names)


@pytest.mark.parametrize("module", [name for name in modules() if name != "__init__"])
def test_imports_point_downward_and_never_at_the_package_root(module: str) -> None:
    for name in imported_names(modules()[module]):
        assert name != "distprop", f"{module} imports the package root"
        target = name.removeprefix("distprop.")
        assert floor(target) <= floor(module), f"{module} imports {target}, which stands above it"


def test_there_is_no_cycle_between_modules() -> None:
    files = modules()
    edges = {
        name: {
            target
            for imported in imported_names(path)
            for target in (imported.removeprefix("distprop."), imported.removeprefix("distprop.") + ".__init__")
            if target in files and target != name
        }
        for name, path in files.items()
        if name != "__init__"
    }
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' -> '.join((*path, name))}"
        if name not in finished:
            for target in edges.get(name, ()):
                visit(target, (*path, name))
            finished.add(name)

    for name in edges:
        visit(name, ())


def test_mpi4py_is_imported_in_one_file_only() -> None:
    users = [
        name
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text()))
        if (isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "mpi4py" for alias in node.names))
        or (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mpi4py")
    ]
    assert set(users) == {"comm.mpi"}


def test_importing_the_package_loads_neither_mpi_nor_the_tools_of_the_command_line() -> None:
    code = (
        "import sys, distprop; print([m for m in ('mpi4py', 'rich', 'click', 'msgspec', 'torch') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert answer.stdout.strip() == "[]"


def test_importing_the_package_takes_at_most_half_as_long_again_as_importing_numpy() -> None:
    # Where this is set Python compiles our files at every import, but never NumPy's, which pip has compiled.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    code = """if True:
        import time
        began = time.perf_counter()
        import numpy
        numpy_alone = time.perf_counter() - began
        import distprop
        print((time.perf_counter() - began) / numpy_alone)
    """

    def ratio() -> float:
        """Both in one process, one right after the other, so that a machine that is busy for a while slows both."""
        command = [sys.executable, "-c", code]
        answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
        return float(answer.stdout)

    ratio()  # compiled files are written
    assert statistics.median(ratio() for _ in range(15)) <= 1.5


def test_every_name_of_the_public_surface_exists() -> None:
    for name in distprop.__all__:
        assert hasattr(distprop, name)
    assert {"DataParallel", "Trainer", "Tensor", "tensor", "world", "no_grad", "data", "nn", "optim"} <= set(
        distprop.__all__
    )
    for package in (distprop.nn, distprop.functional, distprop.optim, distprop.data, distprop.comm):
        for name in package.__all__:
            assert hasattr(package, name)


def test_the_version_is_the_one_in_pyproject() -> None:
    assert f'version = "{distprop.__version__}"' in (PACKAGE.parent / "pyproject.toml").read_text()


def test_files_of_tests_have_names_of_their_own() -> None:
    """Modules of one name cannot be collected together, as `pytest` without arguments does."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert len(names) == len(set(names))
