"""The classifier's gradient as an ordinary forward graph: classifier.onnx.

Classifier guidance needs d log p(y | x_t, t) / d x_t at every step (Dhariwal & Nichol, Diffusion Models Beat GANs,
2021, section 4.1). The forward pass and torch.autograd.grad are traced together, every backward operator is replaced
by forward ones (export.onnx.gradient_rules), what depends on weights only is computed, and the result is exported like
any network. Runtimes that cannot differentiate then guide as well as torch does.

    inputs   x_t [B, C, H, W] fp32, timestep [B] fp32, label [B] int64, scale [B] fp32
    outputs  grad [B, C, H, W] = scale * d log p(y | x_t, t) / d x_t, and log_p [B], both fp32

No input is called t: folding a transpose leaves a constant of that name, and ONNX Runtime refuses the file.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.errors import ExportError
from engine.networks.classifier import Classifier
from export.onnx.gradient_rules import input_gradient_rules
from export.onnx.onnx_file import OPSET, quiet_exporter, save_program

INPUTS = ("x_t", "timestep", "label", "scale")
OUTPUTS = ("grad", "log_p")


class GradientGraph(nn.Module):
    """(x_t, timestep, label, scale) -> (grad, log_p), forward operators only, for one gain.

    The cotangent onehot(y) - softmax(logits), which is d log p / d logits, is multiplied by the gain before it runs
    backwards and the result divided by it: without effect in float32, and in float16 what lifts the small gradients
    of a confident classifier out of the subnormal range. scale multiplies the float32 result, so that a gain fits all
    scales and a scale of 0 gives exactly 0.
    """

    def __init__(self, graph: fx.GraphModule, gain: float) -> None:
        super().__init__()
        self.traced = graph
        self.gain: Tensor
        self.register_buffer("gain", torch.tensor(gain, dtype=torch.float32))

    def forward(self, x_t: Tensor, timestep: Tensor, label: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        grad, log_p = self.traced(x_t, timestep, label, self.gain)
        return grad * (scale / self.gain)[:, None, None, None], log_p


def half_classifier(classifier: Classifier) -> Classifier:
    """A copy in float16, frequencies excepted; raises ExportError for a weight beyond float16's range."""
    half = copy.deepcopy(classifier).half()
    if classifier.config.time.has_frequencies:
        half.time.frequencies = copy.deepcopy(classifier.time.frequencies)
    for name, value in half.named_parameters():
        if not bool(torch.isfinite(value).all()):
            largest = float(classifier.get_parameter(name).abs().max())
            raise ExportError(
                f"the classifier's {name} reaches {largest:.3g}, beyond fp16's 65504; export it in fp32 with: "
                "python -m export.to_onnx CHECKPOINT --classifier FILE"
            )
    return half


def trace_gradient(classifier: Classifier) -> fx.GraphModule:
    """(x_t, timestep, y, gain []) -> (gain * d log p / d x_t, log p) as one graph of forward operators.

    In the precision of the classifier's weights; logits, softmax, cotangent and norm statistics are float32. The
    batch is dynamic. The classifier is put into eval mode and frozen. Raises ExportError for an operator without rule.
    """
    frozen = classifier.eval().requires_grad_(False)
    dtype = next(frozen.parameters()).dtype

    def gradient(x_t: Tensor, timestep: Tensor, y: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        x = x_t.detach().requires_grad_(True)
        out = frozen(x.to(dtype), timestep)
        log_p = F.log_softmax(out.detach().float(), dim=1)
        onehot = (torch.arange(log_p.shape[1]) == y[:, None]).float()
        cotangent = ((onehot - log_p.exp()) * gain).to(dtype)
        (grad,) = torch.autograd.grad(out, x, cotangent)
        return grad.float(), (log_p * onehot).sum(dim=1)

    # Attention that is a fused operator has no rule; as matrix products it needs none.
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        fake, inputs = _fake_inputs(frozen)
        with fake:
            graph = make_fx(gradient, input_gradient_rules(), tracing_mode="symbolic", _allow_non_fake_inputs=True)(
                *inputs
            )
    _fold_constants(graph)
    _refuse_backward(graph)
    return graph


def export_gradient(classifier: Classifier, path: Path, gain: float = 1.0, graph: fx.GraphModule | None = None) -> None:
    """Write classifier.onnx, in the precision of the classifier's weights; see the module for inputs and outputs.

    gain: as in GradientGraph. graph: what trace_gradient returned for this classifier, to spare a second tracing.
    Weights beyond export.onnx.onnx_file.EXTERNAL_DATA_BYTES go to `path`.data. Raises ExportError, or OSError where the
    file cannot be written.
    """
    module = GradientGraph(trace_gradient(classifier) if graph is None else graph, gain)
    batch = torch.export.Dim("batch")
    example = _example_inputs(classifier)
    with quiet_exporter(), torch.no_grad():
        try:
            program = torch.export.export(module, example, dynamic_shapes=dict.fromkeys(INPUTS, {0: batch}))
            refuse_activations(program, example[0].shape[0])
            onnx = torch.onnx.export(
                program,
                input_names=list(INPUTS),
                output_names=list(OUTPUTS),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except (torch.onnx.OnnxExporterError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ExportError(
                f"torch {torch.__version__} cannot export this classifier's gradient: {reason}"
            ) from error
        assert onnx is not None
        save_program(onnx, path, sum(value.numel() * value.element_size() for value in module.state_dict().values()))


def refuse_activations(program: torch.export.ExportedProgram, batch: int) -> None:
    """Raise ExportError if a constant of the program is fake or as large as an activation.

    batch: of the example, which divides no dimension of a weight; a constant that has it holds one input's values.
    """
    held = {**program.state_dict, **program.constants}
    for name, value in held.items():
        if not isinstance(value, Tensor):
            continue
        if isinstance(value, FakeTensor) or any(size and size % batch == 0 for size in value.shape):
            raise ExportError(
                f"the traced gradient holds {name} {list(value.shape)} as a constant, which depends on the input; the "
                "graph would be right for one input only, so nothing is written. Trace it with export.onnx.gradient"
            )


def example_batch(classifier: Classifier) -> int:
    """The smallest prime from 3 on that divides no dimension of a weight or image, so that no two can be confused."""
    sizes = {int(size) for value in classifier.state_dict().values() for size in value.shape}
    sizes |= set(classifier.config.image_size) | {classifier.config.in_channels, classifier.config.time.embed_channels}
    return next(p for p in _primes() if all(size % p for size in sizes))


def _primes() -> Iterator[int]:
    """Odd primes, ascending."""
    found: list[int] = []
    number = 3
    while True:
        if all(number % p for p in found):
            found.append(number)
            yield number
        number += 2


def _example_inputs(classifier: Classifier) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    config, batch = classifier.config, example_batch(classifier)
    x_t = torch.zeros(batch, config.in_channels, *config.image_size)
    return x_t, torch.zeros(batch), torch.zeros(batch, dtype=torch.int64), torch.ones(batch)


def _fake_inputs(classifier: Classifier) -> tuple[FakeTensorMode, list[Tensor]]:
    """Inputs of trace_gradient without values, of which only the batch is a symbol."""
    fake = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    x_t, timestep, y, _ = _example_inputs(classifier)
    batch: Any = None
    inputs = []
    for value in (x_t, timestep, y):
        dynamic = [DimDynamic.DYNAMIC] + [DimDynamic.STATIC] * (value.ndim - 1)
        inputs.append(fake.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic)))
        batch = inputs[0].shape[0] if batch is None else batch
        # One symbol for the three: torch learns from this comparison that they are equal.
        assert inputs[-1].shape[0] == batch
    return fake, [*inputs, fake.from_tensor(torch.ones(()))]


def _fold_constants(graph: fx.GraphModule) -> None:
    """Compute every node that depends on weights only, in place."""
    known: dict[fx.Node, Any] = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            known[node] = _attribute(graph, str(node.target))
        elif node.op == "call_function" and all(used in known for used in node.all_input_nodes):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    leaving = [node for node in known if any(user not in known for user in node.users)]
    for number, node in enumerate(leaving):
        name = f"constant_{number}"
        graph.register_buffer(name, known[node].detach().clone(memory_format=torch.contiguous_format))
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.get_attr(name))
    graph.graph.eliminate_dead_code()
    for name in [name for name in vars(graph) | graph._parameters | graph._buffers if _is_traced_constant(name)]:
        delattr(graph, name)
    graph.recompile()


def _is_traced_constant(name: str) -> bool:
    """Whether make_fx gave an attribute this name; the original weights, of which folded copies took the place."""
    return name.startswith(("_param_constant", "_tensor_constant"))


def _attribute(module: nn.Module, path: str) -> Any:
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part)
    return value


def _refuse_backward(graph: fx.GraphModule) -> None:
    """Raise ExportError if a backward operator is left."""
    left = sorted({str(n.target) for n in graph.graph.nodes if n.op == "call_function" and "backward" in str(n.target)})
    if left:
        raise ExportError(
            f"the classifier's gradient needs {', '.join(left)}, for which there is no rule; add one to "
            "export/onnx/gradient_rules.py"
        )
