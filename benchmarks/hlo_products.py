"""FLOPs of products, convolutions and attention in an HLO program, and of the libraries' calls that compute them.

XLA for GPUs leaves products to cuBLAS, convolutions and fused attention to cuDNN, and kernels of Pallas to Triton. For
XLA's counter such a custom call is a black box; its shapes and attributes say what it computes.
"""

from __future__ import annotations

import math
import re

# Custom calls of XLA for TPUs that move and compute nothing. All others cost their operands and results.
FREE_CALLS = {
    "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveDone", "AsyncCollectiveStart", "ConcatBitcast",
    "GatherScatterIndicesBitpacked",
}  # fmt: skip

Sides = tuple[int, ...]


def call_target(attributes: str) -> str:
    """The target of a custom call.

    >>> call_target(', custom_call_target="__cublas$gemm", api_version=2')
    '__cublas$gemm'
    """
    found = re.search(r'custom_call_target="([^"]*)"', attributes)
    return found.group(1) if found else ""


def has_workspace(target: str) -> bool:
    """Whether the last result of a custom call is a workspace, whose use is not known, and no result."""
    return target.startswith(("__cublas$", "__cudnn$"))


def kernel_numbers(attributes: str) -> dict[str, float]:
    r"""What a kernel of Pallas says of itself: `flops` and `bytes_accessed`, those of them that it gives.

    On TPUs they are its `cost_estimate`. On GPUs JAX drops the estimate; there a kernel may give them as `metadata`,
    `pl.pallas_call(..., metadata={"flops": "8192"})`.

    >>> kernel_numbers('backend_config={"cost_estimate":{"flops":"12","bytes_accessed":"34"}}')
    {'flops': 12.0, 'bytes_accessed': 34.0}
    >>> kernel_numbers('serialized_metadata = "{\\22flops\\22: \\228192\\22}"')
    {'flops': 8192.0}
    """
    found = re.search(r'"cost_estimate":(\{[^}]*\})', attributes) or re.search(
        r'serialized_metadata = "(\{[^}]*\})"', attributes
    )
    text = found.group(1).replace("\\22", '"') if found else ""
    return {name: float(n) for name, n in re.findall(r'"(flops|bytes_accessed)": ?"?(\d+)', text)}


def product_flops(lhs: Sides, out: Sides, contracted: str) -> float:
    """FLOPs of a matrix product; `contracted` lists the axes of `lhs` that are summed over.

    >>> product_flops((5, 3), (5, 7), "1")  # 2 * 5 * 3 * 7
    210.0
    """
    return 2.0 * math.prod(out) * math.prod(lhs[int(d)] for d in re.findall(r"\d+", contracted))


def call_flops(target: str, operands: list[Sides], results: list[Sides], attributes: str) -> float | None:
    """FLOPs of a library's call, or None where the target does not tell what it computes.

    Attention costs its products: two forward, five backward, each with all N x N weights, also where a mask or the
    lengths of sequences leave some of them out. A convolution costs what :func:`convolution_flops` says, and its
    two gradients as much as itself.

    Args:
      target: the custom call's target.
      operands: the sides of the operands.
      results: the sides of the results.
      attributes: the instruction's attributes.
    """
    if target.startswith("__cublas$"):
        contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', attributes)
        return product_flops(operands[0], results[0], contracted.group(1)) if contracted else None
    if target.startswith("__cudnn$conv"):
        if target.startswith("__cudnn$convBackwardInput"):  # of y's gradient and the kernel
            x, kernel, y = results[0], operands[1], operands[0]
        elif target.startswith("__cudnn$convBackwardFilter"):  # of x and y's gradient
            x, kernel, y = operands[0], results[0], operands[1]
        else:
            x, kernel, y = operands[0], operands[1], results[0]
        return convolution_flops(x, kernel, y, attributes)
    if target.startswith("__cudnn$fmha"):
        weights = re.search(r'"intermediate_tensor_shape":.*?"dimensions": ?\[([^\]]*)\]', attributes)
        if weights is None:
            return None
        number = math.prod(int(d) for d in re.findall(r"\d+", weights.group(1)))
        keys, values = operands[0][-1], operands[2][-1]
        widths = 3 * keys + 2 * values if "Backward" in target else keys + values
        return 2.0 * number * widths
    return None


def convolution_flops(lhs: Sides, rhs: Sides, out: Sides, attributes: str) -> float:
    """FLOPs of a convolution without products with padding. On a TPU, matrix products become convolutions.

    Args:
      lhs: the sides of the input.
      rhs: the sides of the kernel.
      out: the sides of the result.
      attributes: the attributes, with dim_labels and window.

    Raises:
      ValueError: there are no dim_labels.

    >>> convolution_flops((5, 3), (3, 7), (5, 7), "dim_labels=bf_io->bf")  # 2 * 5 * 3 * 7
    210.0
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {attributes[:80]}")
    lhs_labels, rhs_labels, out_labels = labels.groups()
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", attributes) or [""])[0]))
    spatial = [c for c in out_labels if c.isdigit()]

    def option(key: str, default: str) -> list[str]:
        return window[key].split("x") if key in window else [default] * len(spatial)

    options = zip(
        option("stride", "1"), option("pad", "0_0"), option("lhs_dilate", "1"), option("rhs_dilate", "1"), strict=True
    )
    total = 2.0 * out[out_labels.index("b")] * out[out_labels.index("f")] * rhs[rhs_labels.index("i")]
    for c, (stride, pad, lhs_dilate, rhs_dilate) in zip(spatial, options, strict=True):
        inputs, kernel, outputs = lhs[lhs_labels.index(c)], rhs[rhs_labels.index(c)], out[out_labels.index(c)]
        low, dilate = int(pad.split("_")[0]), int(lhs_dilate)
        end = (inputs - 1) * dilate + 1
        at = (o * int(stride) - low + k * int(rhs_dilate) for o in range(outputs) for k in range(kernel))
        total *= sum(0 <= position < end and position % dilate == 0 for position in at)
    return total
