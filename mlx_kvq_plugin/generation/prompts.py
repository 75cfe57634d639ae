"""PromptCache: the caches of one sequence and its tokens, to be continued, copied, saved and loaded."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_cache

from ..errors import GenerationError, PromptCacheFormatError
from ..prompt_cache import PromptCacheInfo, load_prompt_cache, save_prompt_cache
from ..prompt_hub import FILE_NAME, pull_prompt_cache, push_prompt_cache
from ..report import CacheReport, cache_report

if TYPE_CHECKING:
    from .model import CausalLM

_PENDING = "pending_token_ids"  # metadata of a file: tokens after those in the layers


class PromptCache:
    """Tokens that a model has read, so that `generate` need not read them again.

    `generate(input_ids, past_key_values=cache)` takes all ids, those of the cache first, as in transformers, and reads
    what the layers do not hold yet. The cache is updated in place and then stands for the whole result.

    Attributes:
        model: the `CausalLM` it belongs to.
        caches: mlx-lm's caches, one per layer.
        token_ids: ids of the sequence, those that the layers do not hold yet included.
        held: how many of them the layers hold, usually all but the last, which the next call reads first.
        scheme: the scheme of the layers.
    """

    def __init__(self, model: CausalLM, caches: list[Any], token_ids: Sequence[int], *, held: int, scheme: str):
        self.model, self.caches, self.scheme = model, caches, scheme
        self.token_ids = [int(token) for token in token_ids]
        self.held = held

    def fork(self) -> PromptCache:
        """A deep copy: what continues one leaves the other as it is. Costs the bytes of the cache."""
        caches = copy.deepcopy(self.caches)
        mx.eval([cache.state for cache in caches])
        return PromptCache(self.model, caches, self.token_ids, held=self.held, scheme=self.scheme)

    def report(self) -> CacheReport:
        """Bytes and schemes, layer by layer."""
        return cache_report(self.caches)

    def save(self, path: str | Path, metadata: Mapping[str, str] | None = None) -> PromptCacheInfo:
        """Write a checked safetensors file that mlx-lm can read too (`kvq.save_prompt_cache`).

        Args:
            path: must end in `.safetensors`.
            metadata: names without dots to strings.

        Raises:
            PromptCacheFormatError: for another suffix, bad metadata, or layers that hold no token yet.
        """
        stored = {**(metadata or {}), _PENDING: json.dumps(self.token_ids[self.held :])}
        return save_prompt_cache(
            path, self.caches, model=self.model.model, token_ids=self.token_ids[: self.held], metadata=stored
        )

    @classmethod
    def load(cls, path: str | Path, model: CausalLM) -> PromptCache:
        """Read a file of `save`, or of `kvq.save_prompt_cache` with `token_ids`, for the model that made it.

        Raises:
            PromptCacheError: as `kvq.load_prompt_cache`, and for a file without token ids.
        """
        caches, info = load_prompt_cache(path, model.model)
        if not info.token_ids:
            raise PromptCacheFormatError(
                f"{Path(path).name} must hold its token ids to be continued, got none; save it with "
                "kvq.PromptCache.save, or with token_ids="
            )
        pending = json.loads(info.metadata.get(_PENDING, "[]"))
        held = len(info.token_ids)
        return cls(model, caches, [*info.token_ids, *pending], held=held, scheme=info.scheme)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        filename: str = FILE_NAME,
        metadata: Mapping[str, str] | None = None,
        revision: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Save the cache and upload it to a Hugging Face repository (`kvq.push_prompt_cache`).

        Args:
            repo_id: `owner/name`; made if it does not exist.
            metadata: as for `save`.

        Returns:
            The address of the commit, or of the pull request.

        Raises:
            PromptCacheError: as `save`; `PromptCacheHubError` when the hub refuses it.
        """
        with tempfile.TemporaryDirectory(prefix="kvq-push-") as folder:
            path = Path(folder) / FILE_NAME
            self.save(path, metadata)
            return push_prompt_cache(
                path,
                repo_id,
                filename=filename,
                revision=revision,
                private=private,
                token=token,
                commit_message=commit_message,
                create_pr=create_pr,
            )

    @classmethod
    def from_hub(
        cls,
        repo_id: str,
        model: CausalLM,
        *,
        filename: str = FILE_NAME,
        revision: str | None = None,
        token: str | None = None,
    ) -> PromptCache:
        """Load a cache from a Hugging Face repository (`kvq.pull_prompt_cache`), for the model that made it.

        Raises:
            PromptCacheError: as `load`; `PromptCacheHubError` when there is no such file, or the hub cannot be reached.
        """
        return cls.load(pull_prompt_cache(repo_id, filename=filename, revision=revision, token=token), model)

    def unread(self, tokens: Sequence[int]) -> list[int]:
        """Those of `tokens` that the layers do not hold; at least one, so that there is something to go on from.

        If the layers hold all of them, the last one is taken out of the layers again.

        Raises:
            GenerationError: where the held tokens are not those that `tokens` begin with, or the last one of exactly
                these cannot be taken out.
        """
        held = self.token_ids[: self.held]
        same = next(
            (i for i, (a, b) in enumerate(zip(held, tokens, strict=False)) if a != b), min(len(held), len(tokens))
        )
        if same < len(held):
            raise GenerationError(
                f"input_ids must begin with the {len(held)} tokens that past_key_values holds, got others from token "
                f"{same} on; pass the ids of the whole sequence, or fork the cache before it goes another way"
            )
        if len(tokens) == len(held):
            if not mlx_cache.can_trim_prompt_cache(self.caches):
                raise GenerationError(
                    "input_ids must go on after the tokens that past_key_values holds, got exactly these and layers "
                    "whose last token cannot be taken out; add a token"
                )
            mlx_cache.trim_prompt_cache(self.caches, 1)
            self.held -= 1
        return list(tokens[self.held :])
