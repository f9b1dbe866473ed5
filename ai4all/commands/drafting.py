"""The draft model that the settings name, and the models that it drafts for."""

from __future__ import annotations

import asyncio
import dataclasses
from functools import cache

import structlog
from rich.console import Console

from ai4all.backend.base import EngineOptions
from ai4all.config import Settings
from ai4all.errors import ConfigError, InvalidModelFile, ModelNotFound
from ai4all.first_run import open_store
from ai4all.models.draft import draft_misfit
from ai4all.models.fitted import FittedModels
from ai4all.models.gguf import read_header
from ai4all.models.progress import show_download
from ai4all.types.model import ModelFile

__all__ = ["Drafting"]

_KEY = "engine.draft_model"

_log = structlog.get_logger(__name__)


class Drafting:
    """Gives models their draft model.

    Args:
        draft: The draft model, or None: there is none.
        origin: Where the settings name it.
    """

    def __init__(self, draft: ModelFile | None = None, origin: str = "") -> None:
        self._draft = draft
        self._origin = origin
        self._misfit = cache(_misfit)

    @classmethod
    async def find(cls, settings: Settings, console: Console) -> Drafting:
        """With the draft model that the settings name, if they name one.

        Raises:
            ConfigError: There is no such model.
            ModelError: Its file has changed, or is not sound.
        """
        name, origin = settings.engine.draft_model, settings.origin(_KEY)
        if not name:
            return cls()
        # A store of its own: the file of a path is nothing that blocks could ask for.
        store = open_store(settings)
        try:
            with show_download(console, name) as progress:
                found = await store.resolve(name, progress)
        except ModelNotFound as error:
            problem = f"there is no model or file {name!r}; `ai4all-native models list` has those"
            raise ConfigError(_KEY, problem, origin) from error
        models = FittedModels(store, use_all=settings.models.use_fitted)
        return cls(await asyncio.to_thread(models.get, found.model_id), origin)

    def require(self, model: ModelFile) -> None:
        """Make sure that ``model``, which the owner named, can be drafted for. May read files.

        Raises:
            ConfigError: It cannot.
        """
        problem = self._misfit(model, self._draft)
        if self._draft is not None and problem is not None:
            draft = self._draft.model_id
            text = f"{draft} cannot draft for {model.model_id}: {problem}; name another, or none"
            raise ConfigError(_KEY, text, self._origin)

    def options_for(self, options: EngineOptions, model: ModelFile) -> EngineOptions:
        """``options`` with the draft model where it serves ``model``. May read files.

        Where it does not, the model computes without: a block may bring any model.
        """
        problem = self._misfit(model, self._draft)
        if problem is not None:
            _log.info("draft_model_not_used", model_id=model.model_id, problem=problem)
            return options
        return dataclasses.replace(options, draft=self._draft)


def _misfit(model: ModelFile, draft: ModelFile | None) -> str | None:
    if draft is None:
        return None
    if draft.sha256 == model.sha256:
        return "it is that model"
    try:
        headers = [read_header(file.path, arrays=True) for file in (model, draft)]
    except InvalidModelFile as error:
        return str(error)
    return draft_misfit(*headers)
