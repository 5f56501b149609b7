"""``python -m fastshape``: what is built, loaded and chosen, and why."""

from . import __version__, backend_info


def main() -> None:
    info = backend_info()
    rows = {
        "fastshape": __version__,
        "torch": info["torch"],
        "FASTSHAPE_BACKEND": info["requested"],
        "on the CPU": f"{info['cpu']} ({info['reason']})",
        "elsewhere": info["other_devices"],
        "threads": info["threads"],
        **{f"kernels: {name}": value for name, value in info["native"].items()},
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
