"""What refusals of `generate` and its relatives say."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_kvq_plugin.errors import GenerationError, KVQError


def message_of(call: Any, kind: type[KVQError] = GenerationError) -> str:
    """The one sentence of the error that a call raises."""
    with pytest.raises(kind) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and "must" in text and "got" in text, text
    return text
