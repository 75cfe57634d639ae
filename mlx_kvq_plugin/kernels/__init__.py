"""GPU kernels: one text each, compiled for CUDA or Metal by MLX, and for the CPU by the tests.

A kernel body (`*.h`) is written against a prelude (`cuda.h`, `metal.h`, `cpu.h`), which defines lanes, shared memory,
packed half precision and 16 x 8 x 16 products for one backend. `build.py` puts texts together.
"""
