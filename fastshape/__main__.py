"""``python -m fastshape`` prints what is built, loaded and chosen, and why."""

from pathlib import Path

import torch

from . import __version__, backend_info

_PLACES = {"cpu": "on the CPU", "cuda": "on CUDA", "xpu": "on XPU", "other_devices": "elsewhere"}
_FACTS = {"native": "kernels", "native_cuda": "CUDA kernels", "triton": "Triton"}


def _choice(device: str, backend: str, reason: str) -> str:
    choice = f"{backend} ({reason})"
    if device in ("cuda", "xpu") and not torch.get_device_module(device).is_available():
        return f"no GPU is visible; with one: {choice}"
    return choice


def main() -> None:
    info = backend_info()
    rows = {
        "fastshape": f"{__version__} in {Path(__file__).parent}",
        "torch": info["torch"],
        "FASTSHAPE_BACKEND": info["requested"],
        **{
            _PLACES[device]: _choice(device, info[device], reason)
            for device, reason in info["reasons"].items()
        },
        "threads": info["threads"],
        **{
            f"{label}: {name}": value
            for key, label in _FACTS.items()
            for name, value in info[key].items()
        },
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
