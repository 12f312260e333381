"""Operators on tensors; they know nothing of diffusion. `kernels.reference` says what each one means."""

# `engine` reads this mark: PyPI has another package that imports as `kernels`.
__distribution__ = "unet-rt"
