"""A conformance suite for plugins: subclass `CodecSuite` or `AdapterSuite` in a test file, and pytest runs every check.

    from mlx_kvq_plugin.testing import AdapterSuite, CodecSuite

    class TestMine4(CodecSuite):
        name = "mine4"

    class TestMyModel(AdapterSuite):
        def model(self):
            return tiny_model()

What the checks are is said in docs/plugins.md. Needs pytest, which this package itself does not.
"""

from ..errors import PluginError

try:
    import pytest
except ImportError as _error:
    raise PluginError("mlx_kvq_plugin.testing must have pytest, got none; pip install pytest") from _error

pytest.register_assert_rewrite(f"{__name__}.codecs", f"{__name__}.models")

from .codecs import CodecSuite  # noqa: E402
from .models import AdapterSuite, tiny_llama  # noqa: E402

__all__ = ["AdapterSuite", "CodecSuite", "tiny_llama"]
