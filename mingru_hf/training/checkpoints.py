"""Write the files of a run such that a crash at any moment damages no existing file, and read its checkpoints."""

import atexit
import errno
import functools
import json
import os
import re
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from .arguments import SetupError

try:
    import fcntl
except ImportError:  # Windows: no locks
    fcntl = None

METRICS_FILE = "metrics.json"
STAGING = ".incomplete"
LOCK_FILE = ".mingru-hf.lock"  # exists while a run writes, and remains if the run is killed

# Files that show that a directory holds a run or a model.
RUN_FILES = (METRICS_FILE, "config.json", "model*.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
# Other files that a run writes: model card and loss curve, tokenizer or processor, and the code saved with the model.
OTHER_FILES = (
    *("README.md", "loss.png", "generation_config.json"),
    *("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "chat_template*"),
    *("additional_chat_templates", "*processor_config.json"),
    *sorted(path.name for path in Path(__file__).parents[1].glob("[!_]*.py")),
)

# Leftovers of other models that would be loaded with a run's own model or tokenizer, because the run does not replace
# them: no run writes the former, and only runs with certain tokenizers write the latter.
OF_OTHER_MODELS = ("adapter_config.json", "model.safetensors.index.json")
OF_OTHER_TOKENIZERS = (
    *("added_tokens.json", "special_tokens_map.json"),
    *("chat_template.jinja", "additional_chat_templates"),
)

# A checkpoint is a directory `checkpoint-STEP` that holds a model for `from_pretrained`, and in addition:
STATE_FILE = "trainer_state.json"  # the run's progress, and the size and checksum of every file
TENSORS_FILE = "training_state.pt"  # the optimizer's state, and each process's random state
BEST_DIRECTORY = "best"  # the best weights so far, unless they are the checkpoint's own
WEIGHTS = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


def check_output_dir(
    output_dir: str | Path,
    overwrite: bool = False,
    resume: str | Path | None = None,
    arguments: dict | None = None,
) -> None:
    """Refuse a directory in which a run would overwrite files of another run, of another program or of the user.

    A resumed run continues in the directory of its checkpoint. With `latest` it may also restart in a directory where
    it was interrupted before its first checkpoint: metrics.json there has the same arguments and no final result.

    Args:
        output_dir: need not exist.
        overwrite: allow files of the same name to be replaced; no file is deleted.
        resume: `resume_from_checkpoint`.
        arguments: the arguments of the run, as in metrics.json.

    Raises:
        ValueError: if `output_dir` is a file; if it holds another run or model, or files with names that a run writes,
            and `overwrite` is False; or if it holds files of another model that would be loaded with the new one,
            checkpoints of another program, or checkpoints that would be mistaken for the new run's.
    """
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"output_dir {path} is a file, expected a directory")
    existing = checkpoints_in(path)
    for other in reversed(existing):
        if not _is_ours(other):
            raise ValueError(
                f"output_dir {path} holds {other.name}, which this script did not write ({damage(other)}) and cannot "
                "resume from: choose another --output_dir, or move the checkpoint away"
            )
    checkpoint = find_checkpoint(resume, path, warn=False)
    if checkpoint is not None:
        later = [other for other in existing if _step(other) > _step(checkpoint) and damage(other) is None]
        if later or (existing and checkpoint.resolve().parent != path.resolve()):
            raise ValueError(
                f"output_dir {path} holds {(later or existing)[-1].name}, which would be mistaken for one of the run "
                f"that resumes from {checkpoint}: move it away, or choose another output_dir"
            )
        if checkpoint.resolve().parent == path.resolve():
            return
    elif existing and resume is None:
        raise ValueError(
            f"output_dir {path} holds {existing[-1].name} of another run: add --resume_from_checkpoint latest to "
            "resume from it, choose another output_dir, or move the checkpoints away"
        )
    elif resume is not None and _is_unfinished(path, arguments or {}):
        return
    _refuse_leftovers(path, OF_OTHER_MODELS)
    if overwrite:
        return
    for what, patterns in (("another run", RUN_FILES), ("files that a run would overwrite", OTHER_FILES)):
        names = [file.name for pattern in patterns for file in sorted(path.glob(pattern))]
        if names:
            raise ValueError(
                f"output_dir {path} holds {what} ({', '.join(names)}): choose another directory, or add "
                "--overwrite_output_dir to replace these files"
            )


def check_tokenizer_files(output_dir: str | Path, part: object) -> None:
    """Refuse a directory with files of another tokenizer that the new one does not replace and would be loaded with.

    Args:
        output_dir: need not exist.
        part: the tokenizer or processor that will be saved there; None for none.

    Raises:
        SetupError: if there is such a file.
    """
    with tempfile.TemporaryDirectory() as directory:
        _save_parts(Path(directory), [part])
        written = os.listdir(directory)
    _refuse_leftovers(Path(output_dir), [name for name in OF_OTHER_TOKENIZERS if name not in written])


def _refuse_leftovers(output_dir: Path, names: Sequence[str]) -> None:
    """Raise a SetupError that lists the existing files among `names`, if there are any."""
    existing = [name for name in names if (output_dir / name).exists()]
    if existing:
        raise SetupError(
            f"output_dir {output_dir} holds files of another model ({', '.join(existing)}), which would be loaded "
            "together with the new one: choose another directory, or move them away"
        )


def check_new_files(output_dir: str | Path, names: Sequence[str], overwrite: bool = False) -> None:
    """Refuse to replace existing files unless `overwrite` is set, and refuse a directory that cannot be written to.

    Raises:
        ValueError: if `output_dir` holds one of the files and `overwrite` is False, or cannot be written to.
    """
    existing = [name for name in names if (Path(output_dir) / name).exists()]
    if existing and not overwrite:
        raise ValueError(
            f"output_dir {output_dir} already holds {', '.join(existing)}: choose another directory, or add "
            "--overwrite_output_dir to replace them"
        )
    check_writable(output_dir)


def check_writable(output_dir: str | Path) -> None:
    """Check that a directory can be created and written to; nothing is left behind.

    Raises:
        ValueError: if it cannot be created or written to, or its name is not valid UTF-8.
    """
    path = Path(output_dir)
    try:
        str(path).encode()
    except UnicodeEncodeError:  # libraries that write files would not find it
        raise ValueError(f"output_dir {str(path)!a} is not valid UTF-8: choose another name") from None
    missing = [place for place in (path, *path.parents) if not place.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"output_dir {path} cannot be written to ({error}): choose another one") from None
    finally:
        for place in missing:
            _remove_empty(place)  # does nothing if it could not be made, or another process has written there


_LOCKS: dict[Path, ExitStack] = {}  # the directories that this process has locked; closing a stack unlocks one
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_LOCKS.clear)  # the locks stay with the parent


def lock_output_dir(output_dir: str | Path) -> None:
    """Keep other processes from writing a run into a directory, until `unlock_output_dir` or the end of this process.

    A killed process leaves the lock file behind, but not the lock. Workers do not inherit the lock, since it belongs
    to the process and not to the open file. On Windows, and on a file system without locks, nothing is locked.

    Args:
        output_dir: created if missing. If this process has already locked it, for a run that failed, it is unlocked
            and locked again.

    Raises:
        ValueError: if a run in another process is writing there.
    """
    if fcntl is None:
        return
    unlock_output_dir(output_dir)
    place = Path(output_dir).resolve()
    path, missing = place / LOCK_FILE, [folder for folder in (place, *place.parents) if not folder.exists()]
    with ExitStack() as stack:
        for folder in reversed(missing):
            stack.callback(_remove_empty, folder)
        place.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    os.close(descriptor)
                    raise ValueError(
                        f"another run is writing to output_dir {output_dir}: wait until it ends, or choose another"
                    ) from None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), path.stat()):
                    break
            os.close(descriptor)  # a run that ended in the meantime has removed the file
        stack.callback(os.close, descriptor)
        stack.callback(path.unlink, missing_ok=True)  # called before os.close unlocks: the file is still this run's
        _LOCKS[place] = stack.pop_all()
    atexit.unregister(unlock_all)
    atexit.register(unlock_all)  # not at import: multiprocessing clears the handlers that a forked process inherits


def unlock_output_dir(output_dir: str | Path) -> None:
    """Unlock a directory if this process has locked it; remove it if it was created for the lock and is empty."""
    _LOCKS.pop(Path(output_dir).resolve(), ExitStack()).close()


def unlock_all() -> None:
    """Unlock all directories, so that a script that ends between `start` and `train` leaves no lock file behind."""
    for place in list(_LOCKS):
        unlock_output_dir(place)


def _remove_empty(directory: Path) -> None:
    """Remove a directory if it exists and is empty."""
    with suppress(OSError):
        directory.rmdir()


def write_json(path: str | Path, content: object) -> None:
    """Write JSON, completely or not at all."""
    text = json.dumps(content, indent=2) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_whole(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write` to write a file under a temporary name, then rename it to `path`.

    Raises:
        OSError: if it cannot be written; an existing file is not changed.
    """
    temporary = Path(path).with_name(f"{STAGING}-{Path(path).name}")
    with writing(path, temporary):
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
        temporary.unlink(missing_ok=True)  # os.replace does nothing if both are hard links to one file (see `_link`)


def save_pretrained(output_dir: str | Path, *parts: object) -> None:
    """Save models, tokenizers or processors into one directory, each file under a temporary name first.

    A reader of `output_dir` finds every file complete, either the old or the new one; other files are not changed.

    Args:
        output_dir: created if missing.
        parts: any objects with `save_pretrained`; None is skipped.
    """
    output_dir = Path(output_dir)
    staging = output_dir / STAGING
    _delete(staging)  # left by a run that was killed; no user's file has this name
    staging.mkdir(parents=True)
    with writing(output_dir, staging):
        _save_parts(staging, parts)
        for path in _files(staging):
            _sync(path)
        for path in _files(staging):
            target = output_dir / path.relative_to(staging)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    shutil.rmtree(staging)


def write_checkpoint(
    output_dir: str | Path, step: int, parts: Sequence[object], tensors: dict, state: dict, limit: int | None = None
) -> Path:
    """Write `checkpoint-STEP`, and then remove the oldest checkpoints beyond `limit`.

    The directory gets its name in one rename, once all of its content is on the disk. A directory of that name is
    therefore complete, no matter when the process or the machine dies. Where a file system does not guarantee this,
    `damage` detects incomplete checkpoints.

    Args:
        output_dir: created if missing; if it holds the best weights so far, and they are from an earlier step, they
            are added to the checkpoint.
        step: number of updates so far.
        parts: model and tokenizer, or any objects with `save_pretrained`; None is skipped.
        tensors: content that `torch.load(weights_only=True)` can load.
        state: content that JSON can represent; `best` is the record of the best evaluation, with its `step`, or None.
        limit: number of checkpoints to keep; None keeps all.

    Raises:
        OSError: if the checkpoint cannot be written (a full disk); earlier checkpoints are not changed.
    """
    output_dir = Path(output_dir)
    target = output_dir / f"checkpoint-{step}"
    staging = output_dir / f"{STAGING}-{target.name}"
    _sweep(output_dir)
    staging.mkdir(parents=True)
    with writing(target, staging):
        _save_parts(staging, parts)
        torch.save(tensors, staging / TENSORS_FILE)
        if state["best"] is not None and state["best"]["step"] != step:
            (staging / BEST_DIRECTORY).mkdir()
            for pattern in WEIGHTS:
                for path in output_dir.glob(pattern):
                    _link(path, staging / BEST_DIRECTORY / path.name)
        files = {path.relative_to(staging).as_posix(): _fingerprint(path) for path in _files(staging)}
        (staging / STATE_FILE).write_text(json.dumps({**state, "files": files}, indent=2) + "\n", encoding="utf-8")
        for path in (*staging.rglob("*"), staging):
            _sync(path)
        if os.path.lexists(target):  # it is damaged, or the run would have resumed from it
            _remove(target)
        staging.rename(target)
        _sync(output_dir)
    if limit is not None:
        for path in checkpoints_in(output_dir)[:-limit]:
            if path != target and _is_ours(path):
                _remove(path)
    return target


def read_checkpoint(checkpoint: str | Path) -> tuple[dict, dict]:
    """Read the `state` and the `tensors` (on the CPU) of a checkpoint."""
    checkpoint = Path(checkpoint)
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    return state, torch.load(checkpoint / TENSORS_FILE, map_location="cpu", weights_only=True)


def restore_best(checkpoint: str | Path, output_dir: str | Path) -> None:
    """Put a checkpoint's best weights so far, and its tokenizer, back into `output_dir`.

    Files that the checkpoint does not list are not copied, since `damage` has not checked them.
    """
    checkpoint, output_dir = Path(checkpoint), Path(output_dir)
    state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    listed = [Path(name) for name in state["files"] if name != TENSORS_FILE]
    best = {name: name for name in listed if name.parts[0] != BEST_DIRECTORY}
    best |= {name.relative_to(BEST_DIRECTORY): name for name in listed if name.parts[0] == BEST_DIRECTORY}
    output_dir.mkdir(parents=True, exist_ok=True)
    _sweep(output_dir)
    for name, source in best.items():
        (output_dir / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(output_dir / name, functools.partial(_link, checkpoint / source))


def find_checkpoint(choice: str | Path | None, output_dir: str | Path, warn: bool = True) -> Path | None:
    """Find the checkpoint to resume from.

    Args:
        choice: a directory; `latest` for the newest complete checkpoint in `output_dir`; None for none.
        output_dir: the output directory of the run.
        warn: whether to warn about newer checkpoints that are damaged.

    Returns:
        The directory of the checkpoint; None if none was requested, or none exists yet.

    Raises:
        ValueError: if the directory is not a complete checkpoint, or `latest` finds only incomplete ones.
    """
    if choice is None:
        return None
    if choice == "latest":
        damaged = []
        for path in reversed(checkpoints_in(output_dir)):
            reason = damage(path)
            if reason is None:
                for words in damaged if warn else ():
                    warnings.warn(f"{words}: resuming from the one before", stacklevel=2)
                return path
            damaged.append(f"{path} is not a complete checkpoint ({reason})")
        if damaged:  # starting again would overwrite the best weights, which are in the same directory
            raise ValueError(
                f"{'; '.join(damaged)}: restore the files, choose another output_dir, or move these directories away "
                "to start again"
            )
        return None
    reason = damage(Path(choice))
    if reason is not None:
        raise ValueError(f"resume_from_checkpoint {choice} is not a complete checkpoint: {reason}")
    return Path(choice)


def checkpoints_in(output_dir: str | Path) -> list[Path]:
    """List the `checkpoint-STEP` directories in the order of their steps."""
    names = [path for path in Path(output_dir).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(names, key=_step)


def damage(checkpoint: str | Path) -> str | None:
    """Describe what is wrong with a checkpoint; None if every file has the size and checksum it was written with."""
    checkpoint = Path(checkpoint)
    if not checkpoint.is_dir():
        return "no such directory"
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{STATE_FILE} is missing"
    except ValueError:
        return f"{STATE_FILE} is damaged: it is not valid JSON"
    if not _lists_files(state):
        return f"{STATE_FILE} does not list files with their checksums, so another program wrote it"
    if TENSORS_FILE not in state["files"]:
        return f"{STATE_FILE} does not list {TENSORS_FILE}"
    for name, fingerprint in state["files"].items():
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
        if not _lies_in(checkpoint, name):  # an untrusted checkpoint must not copy other files into output_dir
            return (
                f"{name} lies outside it: put the file itself there instead of a link or a path that leads elsewhere"
            )
        if _fingerprint(checkpoint / name) != fingerprint:
            return f"{name} is damaged: it differs from what was written"
    return None


@contextmanager
def writing(target: str | Path, staging: Path | None = None) -> Iterator[None]:
    """Turn any error while writing `target` into an OSError that says what to do.

    safetensors and torch raise their own exceptions when the disk is full. `staging`, a directory or a file, is
    removed on an error, since it takes up the space that is missing.

    Raises:
        OSError: from the original error.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        free = shutil.disk_usage(Path(target).parent).free
        if staging is not None:
            with suppress(OSError):
                _delete(staging)
        raise OSError(
            f"{target} could not be written ({free:,} bytes free there): {error}. No existing file was damaged. "
            "Free some space, then resume with --resume_from_checkpoint latest if there is a checkpoint, or run again"
        ) from error


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide transformers' progress bars within the block."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _save_parts(directory: Path, parts: Sequence[object]) -> None:
    """Save every part that is not None into the directory, which must be new."""
    with no_progress_bars():
        for part in parts:
            if part is not None:
                part.save_pretrained(directory)
    mode = directory.stat().st_mode & 0o666
    for path in _files(directory):
        path.chmod(mode)  # as the umask sets it: safetensors creates files that only their owner can read


def _files(directory: Path) -> list[Path]:
    """List the files in a directory and its subdirectories, sorted."""
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _step(checkpoint: Path) -> int:
    """Read the step from a checkpoint's name; -1 if a user renamed it."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def _lists_files(state: object) -> bool:
    """Return whether a trainer_state.json has this module's format; transformers' Trainer writes a different one."""
    return isinstance(state, dict) and isinstance(state.get("files"), dict)


def _is_ours(checkpoint: Path) -> bool:
    """Return whether `write_checkpoint` wrote a checkpoint, complete or damaged; if in doubt, False."""
    try:
        return _lists_files(json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError):  # missing or truncated: no other program writes TENSORS_FILE next to it
        return (checkpoint / TENSORS_FILE).is_file()


def _is_unfinished(output_dir: Path, arguments: dict) -> bool:
    """Return whether metrics.json is from an interrupted run with these arguments."""
    try:
        metrics = json.loads((output_dir / METRICS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(metrics, dict) or not isinstance(metrics.get("arguments"), dict):  # another program's
        return False
    may_differ = {"resume_from_checkpoint", "overwrite_output_dir", "hub_model_id"}
    # Compare only these, not all recorded arguments: a script records more of them once it has read its data.
    compared = arguments.keys() - may_differ
    if "final" in metrics or not compared:
        return False
    return all(metrics["arguments"].get(name) == arguments[name] for name in compared)


def _lies_in(directory: Path, name: str) -> bool:
    """Return whether a name is a path inside the directory: not absolute, without `..`, and not through a link."""
    return (directory / name).resolve().parts == (*directory.resolve().parts, *Path(name).parts)


def _fingerprint(path: Path) -> list[int]:
    """Return a file's size in bytes and its CRC-32."""
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            checksum = zlib.crc32(piece, checksum)
    return [path.stat().st_size, checksum]


def _link(source: Path, target: Path) -> None:
    """Hard-link weights, which takes no space; copy other files: they are small, and a user may edit them in place."""
    try:
        if source.suffix == ".safetensors":
            return os.link(source, target)
    except OSError:
        pass  # a file system without hard links
    shutil.copyfile(source, target)


def _sweep(output_dir: Path) -> None:
    """Remove files that a killed run has left half-written; no user's file has such a name."""
    for pattern in ("", "-checkpoint-[0-9]*", *(f"-{name}" for name in (*RUN_FILES, *OTHER_FILES, *WEIGHTS))):
        for path in output_dir.glob(f"{STAGING}{pattern}"):
            _delete(path)


def _remove(checkpoint: Path) -> None:
    """Rename a checkpoint, then delete it: a partly deleted checkpoint must not look complete."""
    doomed = checkpoint.with_name(f"{STAGING}-{checkpoint.name}-old")
    checkpoint.rename(doomed)
    _delete(doomed)


def _delete(path: Path) -> None:
    """Delete a directory, a file or a link (but not its target), if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file or directory to the disk, so that the rename that follows cannot reach it before the content."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such call for directories
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and shared file systems cannot flush directories.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
