"""pipeline -> stages -> store, never the other way; and each heavy library has its home."""

import ast
import subprocess
import sys
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["store", "stages", "pipeline"]
FILES = {path: path.relative_to(ROOT) for layer in LAYERS for path in (ROOT / layer).rglob("*.py")}

HOMES = {
    "datasets": {"stages/inputs.py"},
    "tokenizers": set(),
    "transformers": {f"stages/{name}.py" for name in ("anatomy", "backbone", "texts", "images", "words", "untrained")},
    "PIL": {"stages/inputs.py", "stages/images.py"},
    "dask": {"pipeline/cluster.py"},
    "typer": {"pipeline/__main__.py"},
    "rich": {"pipeline/show.py"},
    "pydantic": {"pipeline/config.py", "pipeline/upkeep.py", "pipeline/said.py", "pipeline/__main__.py", "stages/tasks.py"},
    "sklearn": {"stages/metrics.py", "stages/baselines.py"},
    "scipy": {"stages/metrics.py"},
    "zarr": {"store/layout.py"},
    "fsspec": {"store/objects.py"},
    "numcodecs": {"store/layout.py"},
    "tensorstore": {"pipeline/benches/peers.py"},
    "h5py": {"pipeline/benches/peers.py"},
    "optuna": {"pipeline/propose.py"},
    "trackio": {"pipeline/track.py"},
    "tensorboard": set(),
    "filelock": {"pipeline/propose.py"},
    "obstore": {"store/bucket.py"},
    "huggingface_hub": {"stages/sources.py", "stages/inputs.py"},
    "safetensors": {"pipeline/runs.py", "pipeline/resume.py"},
}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            inner = {name for name in names if (ROOT / name.replace(".", "/")).with_suffix(".py").exists()}
            found |= inner if inner == names else inner | {node.module or ""}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_layer_imports_only_the_layers_below(path):
    mine = LAYERS.index(FILES[path].parts[0])
    above = {name for name in imported(path) if name.split(".")[0] in LAYERS[mine + 1 :]}
    assert not above


def test_modules_import_each_other_without_circles():
    names = {".".join(relative.with_suffix("").parts).removesuffix(".__init__"): path for path, relative in FILES.items()}
    graph = {name: {other for other in imported(path) if other in names and other != name} for name, path in names.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(names)


def test_every_heavy_library_stays_in_its_home():
    found = defaultdict(set)
    for path, relative in FILES.items():
        for name in imported(path):
            if name.split(".")[0] in HOMES:
                found[name.split(".")[0]].add(str(relative))
    assert {library: homes - HOMES[library] for library, homes in found.items() if homes - HOMES[library]} == {}


def test_the_two_stages_never_import_each_other():
    one, two = {"stages.extract", "stages.inputs", "stages.backbone"}, {"stages.loader", "stages.train", "stages.shape"}
    for path in FILES:
        if path.parent.name == "stages":
            name = f"stages.{path.stem}"
            assert not (name in one and imported(path) & two), path
            assert not (name in two and imported(path) & one), path


def test_no_file_is_long_and_no_drawer_is_a_home():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 350, path
        assert path.stem not in {"utils", "util", "helpers", "common", "misc", "base", "manager"}, path


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("store", {"torch", "transformers", "datasets", "dask", "pydantic"}),
        ("stages", {"torch", "transformers", "datasets"}),
        ("pipeline.commands.train", {"transformers", "tokenizers", "datasets", "dask"}),
        ("pipeline.commands.sweep", {"transformers", "tokenizers", "datasets", "dask", "optuna", "trackio", "tensorboard"}),
        ("pipeline.commands.report", {"transformers", "tokenizers", "datasets", "dask"}),
        ("pipeline.commands.ablate", {"transformers", "tokenizers", "datasets", "dask"}),
        ("pipeline.commands.evaluate", {"transformers", "tokenizers", "datasets", "dask"}),
        ("pipeline.commands.predict", {"transformers", "tokenizers", "datasets", "dask"}),
    ],
)
def test_importing_loads_no_more_than_it_needs(module, absent):
    code = f"import sys, {module}; print(*sorted({absent!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []
