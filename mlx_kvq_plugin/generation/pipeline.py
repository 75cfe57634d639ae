"""`pipeline("text-generation", ...)`: text and chats in, what transformers' pipeline returns out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import KVQConfig
from ..errors import GenerationError
from .auto import AutoModelForCausalLM
from .fields import FIELDS
from .model import CausalLM, GenerateOutput

TASK = "text-generation"
DEFAULTS = {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}  # transformers' own for this task

Chat = Sequence[Mapping[str, Any]]


class TextGenerationPipeline:
    """Continues texts and chats; made by `kvq.pipeline`.

    Attributes:
        model: a `CausalLM` with a tokenizer.
        arguments: of `generate`, for every call.
    """

    def __init__(self, model: CausalLM, **arguments: Any):
        if model.tokenizer is None:
            raise GenerationError("a pipeline must have a model with a tokenizer, got one without; give it one")
        self.model, self.arguments = model, arguments

    def __call__(
        self,
        text_inputs: str | Sequence[Any],
        *,
        return_full_text: bool = True,
        return_tensors: bool = False,
        continue_final_message: bool | None = None,
        add_special_tokens: bool | None = None,
        tools: Sequence[Any] | None = None,
        skip_special_tokens: bool = True,
        **arguments: Any,
    ) -> list[Any]:
        """Continue one or several prompts, one after another.

        Args:
            text_inputs: a string, a chat (a list of messages with `role` and `content`), or a list of either.
            return_full_text: with the prompt; a chat's result is then the chat with the answer as a new message.
            return_tensors: `generated_token_ids`, prompt included, in place of `generated_text`.
            continue_final_message: whether the last message of a chat is to be continued; by default, whether it is
                the assistant's.
            add_special_tokens: of plain text; by default as the tokenizer does.
            tools: for the chat template.
            skip_special_tokens: in the new text.
            **arguments: of `generate`. Where neither they nor the model's generation config say so, 256 new tokens are
                sampled at temperature 0.7, as in transformers.

        Returns:
            For a string or one chat a list of dicts, one per returned sequence; for a list of them one such list each.

        Raises:
            GenerationError: as `generate`, and for other inputs.
        """
        options = {"full": return_full_text, "tensors": return_tensors, "skip": skip_special_tokens}
        ids = {"continue_final": continue_final_message, "special": add_special_tokens, "tools": tools}
        if isinstance(text_inputs, str) or _is_chat(text_inputs):
            return self._records(text_inputs, ids, options, arguments)
        if not isinstance(text_inputs, list | tuple) or not all(isinstance(x, str) or _is_chat(x) for x in text_inputs):
            raise GenerationError(
                "text_inputs must be a string, a chat of messages with role and content, or a list of either, got "
                f"{type(text_inputs).__name__}; see docs/generation.md"
            )
        return [self._records(prompt, ids, options, arguments) for prompt in text_inputs]

    def _records(
        self, prompt: str | Chat, how: Mapping[str, Any], options: Mapping[str, Any], arguments: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        ids = self._ids(prompt, **how)
        output = self.model.generate(ids, **self._arguments(arguments))
        rows = output.sequences if isinstance(output, GenerateOutput) else output
        records = []
        for row in np.array(rows).tolist():
            if options["tensors"]:
                records.append({"generated_token_ids": row})
                continue
            text = self.model.tokenizer.decode(row[len(ids) :], skip_special_tokens=options["skip"])
            records.append({"generated_text": _full(prompt, text, how["continue_final"]) if options["full"] else text})
        return records

    def _ids(self, prompt: str | Chat, continue_final: bool | None, special: bool | None, tools: Any) -> list[int]:
        tokenizer = self.model.tokenizer
        if isinstance(prompt, str):
            return list(
                tokenizer.encode(prompt) if special is None else tokenizer.encode(prompt, add_special_tokens=special)
            )
        if not tokenizer.has_chat_template:
            raise GenerationError("a chat must be given to a model with a chat template, got one without; pass text")
        going_on = _goes_on(prompt, continue_final)
        return list(
            tokenizer.apply_chat_template(
                list(prompt), tools=tools, add_generation_prompt=not going_on, continue_final_message=going_on
            )
        )

    def _arguments(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the call on those of the pipeline, with the pipeline's defaults where nobody set a field."""
        given = {**self.arguments, **arguments}
        config = given.get("generation_config")
        known = {} if config is None else {n: v for n, v in config.to_dict().items() if v is not None}
        own = {n: v for n, v in self.model.generation_config.to_dict().items() if v is not None}
        fields = {**own, **known, **{n: v for n, v in given.items() if n in FIELDS}}
        made = dict(given)
        if "max_length" not in fields:
            made.setdefault("max_new_tokens", fields.get("max_new_tokens", DEFAULTS["max_new_tokens"]))
        made["do_sample"] = fields.get("do_sample", DEFAULTS["do_sample"])
        if made["do_sample"] and "temperature" not in fields:
            made["temperature"] = DEFAULTS["temperature"]
        return made


def pipeline(
    task: str = TASK,
    model: str | Path | CausalLM | None = None,
    *,
    kv_scheme: str | KVQConfig = "tq4",
    revision: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> TextGenerationPipeline:
    """A text-generation pipeline on a model with compressed caches.

    Args:
        task: `text-generation`.
        model: as for `AutoModelForCausalLM.from_pretrained`, or a `CausalLM`, which keeps its own scheme.
        kv_scheme, revision: for a model that is loaded.
        model_kwargs: more arguments of `from_pretrained`.
        **arguments: of `generate`, for every call.

    Raises:
        GenerationError: for another task, or without a model.
    """
    if task != TASK:
        raise GenerationError(
            f"the task of a pipeline must be {TASK!r}, got {task!r}; this package generates text only"
        )
    if model is None:
        raise GenerationError("a pipeline must be given a model, got None; name a folder or a repository")
    if not isinstance(model, CausalLM):
        model = AutoModelForCausalLM.from_pretrained(
            model, kv_scheme=kv_scheme, revision=revision, **dict(model_kwargs or {})
        )
    return TextGenerationPipeline(model, **arguments)


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list | tuple)
        and bool(value)
        and all(isinstance(message, Mapping) and "role" in message for message in value)
    )


def _goes_on(chat: Chat, continue_final: bool | None) -> bool:
    return chat[-1]["role"] == "assistant" if continue_final is None else continue_final


def _full(prompt: str | Chat, text: str, continue_final: bool | None) -> Any:
    if isinstance(prompt, str):
        return prompt + text
    messages = [dict(message) for message in prompt]
    if _goes_on(prompt, continue_final):
        return [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + text}]
    return [*messages, {"role": "assistant", "content": text}]
