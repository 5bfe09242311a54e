"""What GPUs multiply at most, from NVIDIA's data sheets: dense TFLOP/s in FP32, and in FP16 with tensor cores."""

# By a part of the name that the driver tells: where several are in it, the first holds.
DENSE_TFLOPS = {
    "H200 NVL": (60.0, 836.0),
    "H200": (67.0, 989.0),
    "H100 NVL": (60.0, 836.0),
    "H100 PCIe": (51.0, 756.0),
    "H100": (67.0, 989.0),
    "A100": (19.5, 312.0),
    "L40S": (91.6, 362.0),
    "L4": (30.3, 121.0),
    "A10G": (31.2, 70.0),
    "A10": (31.2, 125.0),
    "T4": (8.1, 65.0),
    "RTX 4090": (82.6, 165.0),
}


def dense_tflops(gpu: str) -> tuple[float, float] | None:
    """Return those of the GPU of this name, such as "NVIDIA H100 80GB HBM3"; None of one that is not in the table."""
    words = gpu.replace("-", " ").split()
    for name, rates in DENSE_TFLOPS.items():
        if set(name.split()) <= set(words):
            return rates
    return None
