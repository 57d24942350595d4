"""What engines of exported artefacts have in common."""

from __future__ import annotations

from abc import abstractmethod
from copy import copy
from pathlib import Path
from typing import Self

from trimkv_edge.engine import Engine
from trimkv_edge.errors import ArtefactError, ConfigError
from trimkv_edge.manifest import Manifest, Target
from trimkv_edge.runtime.profile import OperatorTime


class ArtefactEngine(Engine):
    """An engine whose model and settings come from a manifest.

    Args:
        folder: the artefact.
        manifest, target: its manifest and the target to run.
        threads: threads of the engine; None: its own choice.
        profile: note the time of every operator, for :meth:`profile_rows`; slows each step down.

    Attributes:
        threads: as given, or what the engine chose; None if it does not say.
        shares_model: engines made by :meth:`another` have only the cache for themselves.
        emulates: another machine, so its speed tells nothing about that one's.

    Raises:
        ConfigError: threads below 1.
    """

    shares_model = False
    emulates = False

    def __init__(
        self, folder: Path, manifest: Manifest, target: Target, threads: int | None = None, *, profile: bool = False
    ) -> None:
        model = manifest.model
        super().__init__(
            manifest.cache,
            num_layers=model.num_layers,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
            vocab_size=model.vocab_size,
            position_limit=manifest.rope.position_limit,
        )
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}, but must be at least 1")
        self.threads = threads
        self._profiled = profile
        self._folder, self._manifest, self._target = folder, manifest, target
        self._wanted_threads = threads

    def another(self) -> Self:
        """An engine of the same model and settings with an empty cache of its own. Engines that cannot share a loaded
        model load it again."""
        if not self.shares_model:
            return type(self)(self._folder, self._manifest, self._target, self._wanted_threads)
        made = copy(self)
        made._open_cache()
        made.reset()
        return made

    def _open_cache(self) -> None:
        """Makes all that belongs to one stream; engines with ``shares_model`` have it."""
        raise NotImplementedError

    def settle(self) -> None:
        """Lets the gates read what waits for them, if anything does; events and saved states do that themselves."""

    def profile_rows(self) -> list[OperatorTime]:
        """Operators of all forward passes so far, the slowest first; ends the profile.

        Raises:
            ConfigError: the engine was opened without ``profile``.
        """
        if not self._profiled:
            raise ConfigError("nothing was profiled: open the engine with profile")
        self._profiled = False
        return self._read_profile()

    @abstractmethod
    def _read_profile(self) -> list[OperatorTime]: ...

    def _file(self, role: str) -> Path:
        """The target's file of a role; raises :class:`ArtefactError` if it names none or the file is missing."""
        if role not in self._target.files:
            raise ArtefactError(
                f"the {self.name} target of {self._folder} names no {role} file: export the artefact again"
            )
        path = self._folder / self._target.files[role]
        if not path.is_file():
            raise ArtefactError(f"{path} is missing: export the artefact again or copy the whole folder")
        return path
