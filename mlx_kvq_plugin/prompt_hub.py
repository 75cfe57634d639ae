"""Prompt caches in Hugging Face repositories: checked before they leave, and again when they have come."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from .calibration_files import HUB_ERRORS, short_error
from .errors import PromptCacheHubError
from .prompt_cache import PromptCacheInfo, verify_prompt_cache

FILE_NAME = "kvq_prompt_cache.safetensors"
CARD_NAME = "README.md"
LIBRARY = "mlx-kvq-plugin"

_CARD = """---
{facts}
---

# A prompt cache of {model}

Made by mlx-kvq-plugin: what the model has read, packed, to go on from.

| | |
|---|---|
| scheme | `{info.scheme}` |
| tokens | {info.tokens:,} |
| bytes held | {info.nbytes:,} ({info.fp16_nbytes:,} in 16 bits) |
| fingerprint of the model | `{info.fingerprint}` |

```sh
kvq cache pull {repository} --filename {filename} --out cache.safetensors
kvq generate --prompt-cache cache.safetensors --prompt "..."
```

The file holds the ids of the prompt's tokens. Only the model with this fingerprint can use it.
"""


def push_prompt_cache(
    path: str | Path,
    repository: str,
    *,
    filename: str = FILE_NAME,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    endpoint: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a prompt-cache file to a Hugging Face model repository; returns the address of the commit.

    The file is read and checked whole first. A repository that does not exist is made, with a card that says what the
    cache is of.

    Args:
        path: a file of `kvq.save_prompt_cache` or `kvq.PromptCache.save`.
        repository: `owner/name`.
        filename: in the repository, ends in `.safetensors`.
        revision: a branch that exists; the main one by default.
        private: of a new repository; by default as your account is set.
        token, endpoint: as for `huggingface_hub.HfApi`, which knows the ones set up for its own commands.
        create_pr: propose the file in a pull request.

    Raises:
        PromptCacheError: when the file must not be used.
        PromptCacheHubError: when the hub refuses it, or the name does not end in `.safetensors`.
    """
    path = Path(path).expanduser()
    if not filename.endswith(".safetensors"):
        raise PromptCacheHubError(f"a prompt cache's name must end in .safetensors, got {filename!r}; choose another")
    info = verify_prompt_cache(path)
    api = huggingface_hub.HfApi(endpoint=endpoint, token=token)
    try:
        operations = [huggingface_hub.CommitOperationAdd(filename, str(path))]
        if not api.repo_exists(repository):
            api.create_repo(repository, private=private)
            card = _card(info, repository, filename).encode()
            operations.append(huggingface_hub.CommitOperationAdd(CARD_NAME, card))
        commit = api.create_commit(
            repository,
            operations,
            commit_message=commit_message or f"Prompt cache of {info.tokens} tokens, scheme {info.scheme}",
            revision=revision,
            create_pr=create_pr,
        )
    except (*HUB_ERRORS, RuntimeError) as error:  # its upload protocol raises the last
        raise PromptCacheHubError(
            f"the hub must accept the file, got {short_error(error)} for {repository!r}; check the name and your token"
        ) from error
    return str(commit.pr_url if create_pr else commit.commit_url)


def pull_prompt_cache(
    repository: str,
    *,
    filename: str = FILE_NAME,
    revision: str | None = None,
    token: str | None = None,
    endpoint: str | None = None,
) -> Path:
    """The path of a prompt-cache file from a Hugging Face repository, downloaded where necessary and checked whole.

    It lies in the hub's own cache and must not be changed. `HF_HUB_OFFLINE` is honoured: then only that cache is asked.

    Args:
        repository, filename, endpoint: as for `push_prompt_cache`.
        revision: a branch, a tag or a commit.
        token: of the hub, for private repositories.

    Raises:
        PromptCacheHubError: when there is no such file, or the hub cannot be reached.
        PromptCacheError: when the file must not be used.
    """
    try:
        path = Path(
            huggingface_hub.hf_hub_download(
                repository, filename, revision=revision, token=token, endpoint=endpoint, library_name=LIBRARY
            )
        )
    except LocalEntryNotFoundError as error:
        raise PromptCacheHubError(
            f"the hub must be reached for {filename!r} of {repository!r}, which is not in its cache here, got "
            f"{short_error(error)}; go online (HF_HUB_OFFLINE=0) once"
        ) from error
    except EntryNotFoundError as error:
        raise PromptCacheHubError(
            f"repository {repository!r} must have a file {filename!r}, got none; name another with filename"
        ) from error
    except HUB_ERRORS as error:
        where = f"{repository!r} at {revision!r}" if revision else repr(repository)
        raise PromptCacheHubError(
            f"a repository must give out the prompt cache, got {short_error(error)} for {where}; check the name, the "
            "revision and your token"
        ) from error
    verify_prompt_cache(path)
    return path


def _card(info: PromptCacheInfo, repository: str, filename: str) -> str:
    """The card of a new repository."""
    named = info.model if info.model and not Path(info.model).is_absolute() else ""
    facts = huggingface_hub.ModelCardData(
        library_name=LIBRARY, tags=["mlx", "kv-cache", "prompt-cache"], base_model=named if "/" in named else None
    )
    model = named or "a model"
    return _CARD.format(facts=facts.to_yaml(), model=model, info=info, repository=repository, filename=filename)
