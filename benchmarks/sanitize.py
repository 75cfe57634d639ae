"""A few launches of every kernel of this package, for compute-sanitizer (benchmarks/sanitize.sh).

Outputs are compared with plain operations, so that a run that checks nothing does not pass.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from attend_cases import Config, Contents, case_of, compare, exactly, fused
from token_cases import Kind, Shape, cache_of

from mlx_kvq_plugin.kernels.build import backend
from mlx_kvq_plugin.kernels.decode import decode_heads
from mlx_kvq_plugin.kernels.encode import encode_block

CONFIGS = (
    Config(Kind("tq4", (128, 128), dtype=mx.bfloat16), heads=2, repeat=4, warps=4),
    Config(Kind("k=tq3,v=rvq1", (64, 128), pairs=13, layout="interleaved"), 1, 6, 3, "causal", sinks=True, warps=3),
    Config(Kind("k=rvq2,v=tq5", (256, 64), framed=False, dtype=mx.float16), 1, 3, 4, "bool-bq", softcap=5.0),
    Config(Kind("k=tcq3,v=tcq4", (128, 64), dtype=mx.bfloat16), heads=2, repeat=4, warps=3),
)
ENCODED = (0, 1, 3)  # of them, with tokens packed and decoded too
# A partial tile after one of other rows, whole tiles, several chunks of dense tokens.
SHAPES = (
    (Shape(2, 0, 70, 12, 1, 5, 0, 77, 1.0, 0), 3),
    (Shape(1, 0, 256, 4, 0, 0, 0, 0, 1.0, 1), 2),
    (Shape(2, 0, 129, 300, 0, 0, 0, 63, 1.0, 2), 8),
)


def main() -> None:
    if not backend():
        sys.exit("kernels must have a GPU to be checked on, MLX's default device is the CPU; run this on a GPU machine")
    mx.set_cache_limit(0)  # a buffer that is given back is freed, so that later accesses to it are seen
    for config in CONFIGS:
        for shape, groups in SHAPES:
            args = case_of(config, Contents(shape, 0, groups))
            compare(config, fused(config, args, backend(), groups), exactly(args, backend()))
    for i in ENCODED:
        cache = cache_of(CONFIGS[i].kind, Shape(2, 2, 70, 40, 1, 5, 3, 77, 1.0, 3))
        keys, values, new_keys, new_values = encode_block(cache, 4, 16, 28)
        mx.eval(keys, values, new_keys, new_values, decode_heads(cache, 0, 2))
    print("kernels ran")


if __name__ == "__main__":
    main()
