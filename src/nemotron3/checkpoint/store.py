"""The checkpoints of a run: each complete or absent, each verified before it is used.

A save writes tensors, state, and last a manifest with the size and SHA-256 of both, into
`step-00000100.tmp-PID`. All files are synced, then the directory is renamed to `step-00000100`. If
the process is killed at any moment, either the new checkpoint exists or only the old ones do; the
next start removes temporary directories. `load` compares the hashes, so a flipped bit on the disk
costs one checkpoint instead of silently changing the run.

One process writes to a store at a time. For sharded saves of many ranks use
`torch.distributed.checkpoint`, which this does not replace.

    store = CheckpointStore(run_dir / "checkpoints")
    store.save(100, tensors={"weight": weight}, state={"tokens_seen": 819200})
    checkpoint = store.load()                    # the newest intact one
"""

import errno
import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from nemotron3.checkpoint.files import (
    digest_file,
    full_disk_named,
    require_space,
    sync_directory,
    tensor_file,
    write_file,
)
from nemotron3.checkpoint.retention import RetentionConfig, steps_to_delete
from nemotron3.errors import CheckpointError

_LOGGER = logging.getLogger(__name__)

TENSOR_FILE = "tensors.safetensors"
STATE_FILE = "state.json"
MANIFEST_FILE = "manifest.json"
FORMAT = 1
_STEP = re.compile(r"step-(\d{8,})")
_LEFTOVER = re.compile(r"step-\d{8,}\.(tmp|trash)-(\d+)")
_HEADER_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The saved tensors and state of one step."""

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def saved_steps(directory: Path) -> list[int]:
    """The steps of the checkpoints in a directory, oldest first; it may be missing."""
    if not directory.is_dir():
        return []
    matches = (_STEP.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)


class CheckpointStore:
    """A directory of checkpoints by step."""

    def __init__(self, directory: Path | str, *, retention: RetentionConfig | None = None) -> None:
        """Open the store, and remove remains of interrupted saves and deletions."""
        self.directory = Path(directory)
        self.retention = retention or RetentionConfig()
        self._damaged: set[int] = set()
        with full_disk_named(self.directory, 0):
            self.directory.mkdir(parents=True, exist_ok=True)
        for path in self.directory.iterdir():
            match = _LEFTOVER.fullmatch(path.name)
            if match and not (match[1] == "tmp" and _belongs_to_another(int(match[2]))):
                _LOGGER.info("removing the leftover of an interrupted save: %s", path)
                shutil.rmtree(path, ignore_errors=True)

    def steps(self) -> list[int]:
        """The steps that were saved, oldest first; their contents are not checked."""
        return saved_steps(self.directory)

    def latest(self) -> int | None:
        """The newest saved step, or None; its contents are not checked."""
        return max(self.steps(), default=None)

    def save(self, step: int, *, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Write a checkpoint, and then delete those that the retention does not keep.

        `state` must be JSON: tuples are loaded as lists. An intact checkpoint of the same step is
        never replaced (CheckpointError); a damaged one is renamed to `step-….damaged`. Raises
        StorageError if the disk is full.
        """
        final = self._path(step)
        self._make_way(step)
        # A state that is not JSON fails here, before anything is written.
        state_text = json.dumps(state, indent=1).encode()
        needed = sum(tensor.nbytes for tensor in tensors.values()) + len(state_text) + _HEADER_BYTES
        require_space(self.directory, needed)
        temporary = final.with_name(f"{final.name}.tmp-{os.getpid()}")
        with full_disk_named(self.directory, needed):
            try:
                temporary.mkdir()
            except FileExistsError as error:
                raise _same_step(final) from error
        try:
            with full_disk_named(self.directory, needed):
                digests = {
                    TENSOR_FILE: write_file(temporary / TENSOR_FILE, tensor_file(tensors)),
                    STATE_FILE: write_file(temporary / STATE_FILE, [state_text]),
                }
                files = {name: asdict(digest) for name, digest in digests.items()}
                manifest = {"format": FORMAT, "step": step, "files": files}
                text = json.dumps(manifest, indent=1).encode()
                write_file(temporary / MANIFEST_FILE, [text])
                sync_directory(temporary)
                self._publish(temporary, final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        # A damaged checkpoint does not count, or an intact one could be deleted for it.
        sound = [saved for saved in self.steps() if saved not in self._damaged]
        for old in steps_to_delete(sound, self.retention):
            self._delete(old)
        return final

    def load(self, step: int | None = None) -> Checkpoint:
        """Load the checkpoint of a step, or the newest intact one.

        Without `step`, a damaged checkpoint is logged and the one before it is used. Raises
        CheckpointError if there is none, or if the one of `step` is damaged.
        """
        if step is not None:
            return self._read(step)
        damage: list[str] = []
        for candidate in reversed(self.steps()):
            try:
                return self._read(candidate)
            except CheckpointError as error:
                _LOGGER.warning("%s; trying the checkpoint before it", error)
                damage.append(str(error))
                self._damaged.add(candidate)
        if damage:
            raise CheckpointError(
                f"every checkpoint in {self.directory} is damaged; start again in an empty "
                f"directory or restore a copy: {'; '.join(damage)}"
            )
        raise CheckpointError(f"{self.directory} holds no checkpoint; save one first")

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _make_way(self, step: int) -> None:
        """Rename a damaged checkpoint of this step; raises if there is an intact one."""
        final = self._path(step)
        if not final.exists():
            return
        try:
            self._verify(step)
        except CheckpointError as error:
            aside = final.with_name(f"{final.name}.damaged")
            _LOGGER.warning("%s; it is set aside as %s", error, aside.name)
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(final, aside)
            self._damaged.discard(step)
        else:
            raise _same_step(final)

    def _publish(self, temporary: Path, final: Path) -> None:
        """Rename the complete temporary directory, which makes the checkpoint visible."""
        try:
            os.rename(temporary, final)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                raise _same_step(final) from error
            raise
        sync_directory(self.directory)

    def _delete(self, step: int) -> None:
        """Rename, then delete, so that a partly deleted checkpoint never looks complete."""
        path = self._path(step)
        trash = path.with_name(f"{path.name}.trash-{os.getpid()}")
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)

    def _verify(self, step: int) -> None:
        """Compare the files with the manifest; raises CheckpointError for a difference."""
        path = self._path(step)
        try:
            manifest = json.loads((path / MANIFEST_FILE).read_text(encoding="utf-8"))
            expected = {name: manifest["files"][name] for name in (TENSOR_FILE, STATE_FILE)}
            if manifest["format"] != FORMAT or manifest["step"] != step:
                raise CheckpointError(
                    f"{path / MANIFEST_FILE} is of format {manifest['format']} and step "
                    f"{manifest['step']}, expected {FORMAT} and {step}"
                )
            for name, wanted in expected.items():
                size = (path / name).stat().st_size
                if size != wanted["num_bytes"]:
                    raise CheckpointError(
                        f"{path / name} is truncated or was changed: {size} bytes of "
                        f"{wanted['num_bytes']}"
                    )
                if asdict(digest_file(path / name)) != wanted:
                    raise CheckpointError(
                        f"{path / name} is corrupted: its SHA-256 is not the one that was saved"
                    )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r}") from error

    def _read(self, step: int) -> Checkpoint:
        path = self._path(step)
        if not path.exists():
            raise CheckpointError(
                f"{self.directory} holds no checkpoint of step {step}; it has {self.steps()}"
            )
        self._verify(step)
        try:
            with safe_open(path / TENSOR_FILE, framework="pt") as file:
                # Cloned: the file may be deleted while the run still holds these tensors.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r}") from error
        return Checkpoint(step=step, tensors=tensors, state=state)


def _same_step(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} is already saved or being saved by another process; "
        "use another directory, or delete it to save this step again"
    )


def _belongs_to_another(pid: int) -> bool:
    """Whether `pid` is a running process other than this one."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
