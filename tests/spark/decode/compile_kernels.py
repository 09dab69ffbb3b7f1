"""Compiles Triton's kernels, for test_triton_kernels.py in a process of its own. Prints a line a kernel."""

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from normfree.spark.decode import triton_decode_kernels as kernels

H100 = GPUTarget("cuda", 90, 32)
KERNELS = (
    kernels.predict_kernel,
    kernels.key_scores_kernel,
    kernels.select_kernel,
    kernels.multiplier_kernel,
    kernels.weighted_rows_kernel,
    kernels.attend_kernel,
)
WEIGHTS = ("Q", "K", "V", "K1", "K2", "bias")
FLOATS = ("scores", "quantiles", "chosen", "maxima", "multipliers", "weights", "partial", "totals")
CONSTANTS = {
    "HAS_BIAS": True,
    "HAS_MASK": True,
    "KEEPS_LARGEST": True,
    "BLOCK": 1024,
    "BLOCK_R": 32,
    "BLOCK_F": 64,
    "BLOCK_T": 64,
    "BLOCK_N": 16,
    "BLOCK_D": 128,
    "BLOCK_V": 256,
    "R": 20,
    "GROUP": 2,
    "REST": 100,
    "VALUE_DIM": 256,
}


def main() -> None:
    for kernel in KERNELS:
        constants = {name: value for name, value in CONSTANTS.items() if name in kernel.arg_names}
        types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
        pointers = dict.fromkeys(WEIGHTS, "*bf16") | dict.fromkeys(FLOATS, "*fp32")
        pointers |= {"indices": "*i32", "counts": "*i32", "visible": "*u8", "scale": "fp32"}
        types |= {name: kind for name, kind in pointers.items() if name in kernel.arg_names}
        compiled = compile_kernel(ASTSource(kernel, types, constants), target=H100)
        print(kernel.__name__, len(compiled.asm["cubin"]), flush=True)
