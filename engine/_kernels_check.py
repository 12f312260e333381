"""Whether the package that imports as `kernels` is this project's: PyPI has an unrelated one of that name."""

DISTRIBUTION = "unet-rt"


def require_own_kernels() -> None:
    """Raise ImportError, naming both packages, where another package stands in front of ours."""
    import kernels

    if getattr(kernels, "__distribution__", None) == DISTRIBUTION:
        return
    where = getattr(kernels, "__file__", None) or ", ".join(getattr(kernels, "__path__", []))
    raise ImportError(
        f"`import kernels` finds {where}, expected the `kernels` package of {DISTRIBUTION}. "
        f"PyPI's package `kernels` (Hugging Face) and {DISTRIBUTION} share that import name and cannot be "
        f"installed in one environment. Give {DISTRIBUTION} an environment of its own, or "
        f"`pip uninstall kernels` and install {DISTRIBUTION} again."
    )
