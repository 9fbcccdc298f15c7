"""How fast GPUs are at best, by the name that their maker and torch give them."""

from typing import TYPE_CHECKING, Literal

PEAK_TFLOPS: dict[str, float] = {
    "T4": 65,
    "A10G": 70,
    "A10": 125,
    "L4": 121,
    "L40S": 362,
    "A100": 312,
    "H100": 989,
    "H100-PCIe": 756,
    "H100-NVL": 835,
    "H200": 989,
    "H200-NVL": 835,
    "B200": 2250,
}
"""Dense bf16 peaks in 10¹² operations per second, from their data sheets (T4, which has no bf16: fp16)."""

if TYPE_CHECKING:
    GPU = str
else:
    GPU = Literal[tuple(PEAK_TFLOPS)]
"""Short name of a GPU whose peak is known."""


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations per second at best of the GPU that torch calls ``device_name``; None for one not known.

    Names such as "NVIDIA H100 80GB HBM3" hold a short name's words among others; the longest short name counts. A MIG
    device is a part of a GPU, of unknown size.
    """
    words = set(device_name.replace("-", " ").split())
    known = [name for name in PEAK_TFLOPS if words.issuperset(name.split("-"))]
    return PEAK_TFLOPS[max(known, key=len)] * 1e12 if known and "MIG" not in words else None
