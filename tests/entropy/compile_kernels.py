"""Compiles Triton's kernels, for test_triton_kernels.py in a process of its own. Prints a line a kernel."""

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from normfree.entropy import triton_softmax as kernels

H100 = GPUTarget("cuda", 90, 32)
POINTERS = {
    "mask": "*u8",
    "entropy": "*fp32",
    "lse": "*fp32",
    "gradient": "*fp32",
    "lse_gradient": "*fp32",
    "scale": "fp32",
}
CONSTANTS = {
    "HEAD_DIM": 40,
    "VALUE_DIM": 24,
    "BLOCK_M": 32,
    "BLOCK_N": 32,
    "BLOCK_D": 64,
    "BLOCK_V": 32,
    "IS_CAUSAL": True,
    "HAS_WINDOW": True,
    "HAS_MASK": True,
    "WITH_OUTPUT": True,
    "WIDEN": False,
    "PRECISION": "tf32x3",
}


def main() -> None:
    for kernel in (kernels.forward_kernel, kernels.query_gradient_kernel, kernels.key_gradient_kernel):
        constants = {name: value for name, value in CONSTANTS.items() if name in kernel.arg_names}
        tensors = dict.fromkeys(("Q", "K", "V", "out"), "*bf16")
        types = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
        types |= {name: ("i64",) * 4 for name in kernel.arg_names if name.endswith("_strides")}
        types |= {name: kind for name, kind in (tensors | POINTERS).items() if name in kernel.arg_names}
        compiled = compile_kernel(ASTSource(kernel, types, constants), target=H100)
        print(kernel.__name__, len(compiled.asm["cubin"]), flush=True)
