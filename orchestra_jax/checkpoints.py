"""Checkpoints of a run: arrays and host state in one atomic save, through Orbax.

One step directory holds two items: `state`, a pytree of arrays (parameters, optimizer, step counter), and `host`, a
dict of what lives outside the device (PRNG seed and counters, the data iterator's state, the engine's policy version).
Orbax writes both into `<step>.orbax-checkpoint-tmp` and renames it when all is on disk, so a killed save leaves nothing
that could be restored. Saving runs in the background: `save` returns once the arrays are copied to host memory.

This is not the export of a model: `models.huggingface` writes safetensors.
"""

from __future__ import annotations

import base64
import pathlib
from collections.abc import Mapping

import orbax.checkpoint as ocp

STEP_METADATA_FILE = "_CHECKPOINT_METADATA"  # Orbax writes it into every finished step
BYTES_KEY = "__bytes__"


class Checkpointer:
    """Saves and restores the steps of one run. Close it, or use it as a context manager: closing waits for the save."""

    def __init__(self, directory: str | pathlib.Path, max_to_keep: int):
        """Opens `directory` and makes it if it is missing.

        Raises:
          ValueError: `max_to_keep` below 1, or the newest step directory is not a finished checkpoint.
        """
        if max_to_keep < 1:
            raise ValueError(f"max_to_keep is {max_to_keep}: keep at least 1 checkpoint")
        self._directory = pathlib.Path(directory).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        # An older unfinished step is one whose deletion was cut short. A newer one would count as the newest for
        # max_to_keep, which would then delete the finished ones.
        steps = self._manager.all_steps()
        if steps and not self._is_finished(max(steps)):
            raise ValueError(f"{self._directory / str(max(steps))} is not a finished checkpoint: delete that directory")

    def save(self, step: int, state: object, host_state: Mapping[str, object]) -> None:
        """Saves `state` (pytree of arrays) and `host_state` (JSON values and bytes) as step `step`.

        Raises:
          ValueError: `step` is not after the newest saved one, or a host value can be neither JSON nor bytes.
        """
        newest = self._manager.latest_step()
        if newest is not None and step <= newest:
            raise ValueError(f"cannot save step {step}: step {newest} is saved already; save later steps only")
        host = _encode(dict(host_state), "host_state")
        is_saved = self._manager.save(
            step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), host=ocp.args.JsonSave(host))
        )
        assert is_saved, f"Orbax declined to save step {step} in {self._directory}"

    def latest_step(self) -> int | None:
        """The newest finished step, a save in progress included; None if there is none."""
        self._manager.wait_until_finished()
        return max(filter(self._is_finished, self._manager.all_steps()), default=None)

    def restore(self, step: int, abstract_state: object) -> tuple[object, dict[str, object]]:
        """Reads step `step`.

        Args:
          step: a finished step, usually `latest_step()`.
          abstract_state: the pytree as saved, with a `jax.ShapeDtypeStruct` (shape, dtype, sharding) for each array.

        Returns:
          The state, placed as `abstract_state` says, and the host state (tuples come back as lists).

        Raises:
          ValueError: there is no such step, or its arrays do not fit `abstract_state`.
        """
        self._manager.wait_until_finished()
        if not self._is_finished(step):
            finished = sorted(filter(self._is_finished, self._manager.all_steps()))
            raise ValueError(f"no checkpoint of step {step} in {self._directory}: finished steps are {finished}")
        items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state), host=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except (ValueError, KeyError) as error:
            raise ValueError(
                f"{self._directory / str(step)} does not fit this model and optimizer ({error}): "
                "restore it under the config it was saved with"
            ) from error
        return restored.state, _decode(restored.host)

    def close(self) -> None:
        """Waits for a save in progress and lets go of the directory."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _is_finished(self, step: int) -> bool:
        return (self._directory / str(step) / STEP_METADATA_FILE).is_file()


def _encode(value: object, path: str) -> object:
    """A copy of `value` as JSON. The copy matters: the save runs in the background while the caller goes on."""
    if isinstance(value, bytes):
        return {BYTES_KEY: base64.b64encode(value).decode("ascii")}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key == BYTES_KEY:
                raise ValueError(f"{path} has the key {key!r}: use strings other than {BYTES_KEY!r} as keys")
        return {key: _encode(item, f"{path}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ValueError(f"{path} is a {type(value).__name__}: host state holds JSON values and bytes; put arrays in state")


def _decode(value: object) -> object:
    if isinstance(value, dict):
        if value.keys() == {BYTES_KEY}:
            return base64.b64decode(value[BYTES_KEY])
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value
