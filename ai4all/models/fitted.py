"""Models as their owner wants them computed: a fitted file in place of the one as it came."""

from __future__ import annotations

import dataclasses

import structlog

from ai4all.models.store import ModelStore
from ai4all.types.model import ModelFile

__all__ = ["FittedModels"]

_log = structlog.get_logger(__name__)


class FittedModels:
    """A model source that answers with fitted files, and only where the owner asked for it.

    The file keeps the id that it stands in for, and has its own digest: the fingerprint of a
    result names what really ran.

    Args:
        store: The models.
        use_all: Take the newest fitted file of every model that has one, also of those for which
            ``models fit --use`` was never said.
    """

    def __init__(self, store: ModelStore, *, use_all: bool = False) -> None:
        self._store = store
        self._use_all = use_all

    def get(self, model_id: str) -> ModelFile:
        """The file to compute ``model_id`` with. May read whole files.

        Raises:
            ModelNotFound: There is none of that id.
            ModelChecksumMismatch: A file has changed.
            DataDirectoryError: The index cannot be read.
        """
        model = self._store.get(model_id)
        fitted_id = self._fitted_id(model)
        if fitted_id is None:
            return model
        fitted = self._store.get(fitted_id)
        _log.info(
            "fitted_model_used",
            model_id=model_id,
            sha256=fitted.sha256,
            in_place_of=model.sha256,
        )
        return dataclasses.replace(fitted, model_id=model_id)

    def list(self) -> list[ModelFile]:
        """All models that are here, each as ``get`` would give it. Reads no file but the index."""
        models = {model.model_id: model for model in self._store.list()}
        found = []
        for model_id, model in models.items():
            fitted_id = self._fitted_id(model)
            fitted = models.get(fitted_id) if fitted_id is not None else None
            chosen = fitted if fitted is not None else model
            found.append(dataclasses.replace(chosen, model_id=model_id))
        return found

    def _fitted_id(self, model: ModelFile) -> str | None:
        made_of_it = {
            model_id: row
            for model_id, row in self._store.stored().items()
            if row.fitted_from == model.sha256
        }
        preferred = self._store.preferred().get(model.sha256)
        for model_id, row in made_of_it.items():
            if row.sha256 == preferred:
                return model_id
        if self._use_all and made_of_it:
            return max(made_of_it, key=lambda model_id: made_of_it[model_id].added)
        return None
