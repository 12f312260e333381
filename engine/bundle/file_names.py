"""The names of a bundle's files, made of a network's name and what the file is.

    manifest.json            see engine.bundle.manifest
    unet.safetensors         weights in fp32 under our names
    unet.onnx                the network in fp32; unet.fp16.onnx (or bf16, int8): in another precision
    unet.onnx.data           weights of an ONNX file that would be too large with them
    unet.int8.json           ranges of the CPU engine's 8-bit convolutions (engine.backends.native.byte_ranges)
    unet.rtx.plan            a TensorRT plan; unet.b8.rtx.plan: one for a batch of 8 alone

classifier.* are the same of a classifier; its ONNX files hold its input gradient.
"""

from __future__ import annotations

MANIFEST = "manifest.json"
UNET = "unet"
CLASSIFIER = "classifier"


def weights_name(network: str) -> str:
    """ "unet.safetensors"."""
    return f"{network}.safetensors"


def onnx_name(network: str, precision: str = "fp32") -> str:
    """ "unet.onnx", and "unet.fp16.onnx" for a precision other than fp32."""
    return f"{network}.onnx" if precision == "fp32" else f"{network}.{precision}.onnx"


def onnx_data_name(onnx: str) -> str:
    """The file beside an ONNX file that holds its weights, if it does not itself: "unet.onnx.data"."""
    return f"{onnx}.data"


def ranges_name(network: str) -> str:
    """ "unet.int8.json"."""
    return f"{network}.int8.json"


def plan_name(network: str, built_by: str, batch: int | None) -> str:
    """ "unet.rtx.plan" for built_by "rtx"; batch: the only one that the plan takes, as in "unet.b8.rtx.plan"."""
    return f"{network}.{built_by}.plan" if batch is None else f"{network}.b{batch}.{built_by}.plan"


def network_of(file: str) -> str:
    """The network's name of any of these names."""
    return file.split(".")[0]
