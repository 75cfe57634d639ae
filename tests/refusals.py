"""What refusals of `generate` and its relatives say."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_kvq_plugin.errors import GenerationError


def message_of(call: Any) -> str:
    """The one sentence of the `GenerationError` that a call raises."""
    with pytest.raises(GenerationError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text and "must" in text and "got" in text, text
    return text
