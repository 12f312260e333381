"""A classifier's program with its input gradient: each operator is transposed by one rule.

For y = f(x) and a gradient g at y, the transpose of the operator f gives J^T g at x, J being f's Jacobian at x. The
operators run forwards, then their transposes the last first (reverse accumulation; Griewank & Walther, Evaluating
Derivatives, 2008, section 3.2). A map that several operators read gets the sum of what each gives: a transpose adds
what the others gave already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from engine.backends.native.program import NONE, Builder, Code, Form, Mode, Operator, Program, Resampling
from engine.errors import BackendError

_GROUP, _IDENTITY_SILU_RELU = 0, (0, 1, 2)

Rule = Callable[[Builder, Operator, int, int], int]
"""(builder, operator, gradient at its result, map to add or NONE) -> gradient at its only source, plus that map."""


def transpose(program: Program) -> Program:
    """x_t -> d (factor * log p(label)) / d x_t, and log p(label); columns of the rows as in `program`.

    program: a classifier's, as engine.backends.native.lowering.build_program makes it. Raises BackendError for an
    operator without a rule.
    """
    *body, last, _output = program.operators
    if last.code is not Code.CLASSIFY:
        raise _no_gradient("a classifier without pooling at its end")
    net = Builder.beside(program)
    forward = [part for operator in body for part in _split(net, operator)]
    for operator in (*forward, last):
        net.emit(operator)
    # CLASSIFY writes the gradient at its source itself.
    gradients = {last.src[0]: last.dst}
    for operator in reversed(forward):
        if operator.code is not Code.INPUT and operator.dst in gradients:
            _transpose_one(net, operator, gradients)
    image = next(operator.dst for operator in forward if operator.code is Code.INPUT)
    return net.build(program.in_channels, program.row_width, gradients[image])


def _split(net: Builder, operator: Operator) -> tuple[Operator, ...]:
    """A convolution's shortcut as a convolution of its own, whose result it adds: each has one weight to transpose."""
    if not operator.extra:
        return (operator,)
    shortcut = Operator(
        Code.CONV,
        net.like(operator.dst),
        operator.extra,
        add=operator.add,
        weight=operator.extra_weight,
        bias=operator.extra_bias,
        kernel=1,
        stride=1,
    )
    alone = replace(operator, add=shortcut.dst, extra=(), extra_weight=NONE, extra_bias=NONE)
    return shortcut, alone


def _transpose_one(net: Builder, operator: Operator, gradients: dict[int, int]) -> None:
    """Give an operator's sources their gradients. gradients: by map, what its readers behind this one gave so far."""
    rule = _RULES.get(operator.code)
    if rule is None:
        raise _no_gradient(f"its operator {operator.code.name.lower()}")
    if len(operator.src) != 1:
        raise _no_gradient(f"{_name(net, operator)}, which reads two maps at once")
    if operator.code is not Code.ATTENTION and operator.scale != 1:
        raise _no_gradient(f"{_name(net, operator)}, whose result is multiplied by {operator.scale:g}")
    gradient = gradients[operator.dst]
    if operator.add != NONE:
        gradients[operator.add] = _add(net, gradient, gradients.get(operator.add, NONE))
    source = operator.src[0]
    gradients[source] = rule(net, operator, gradient, gradients.get(source, NONE))


def _transpose_conv(net: Builder, operator: Operator, gradient: int, add: int) -> int:
    """Of stride 1: one with the kernel turned and its channels exchanged. Of 3x3 and stride 2: a transposed one."""
    source, result, k = net.shape(operator.src), net.shape((operator.dst,)), operator.kernel
    ends = (source.height, source.width), (result.height, result.width)
    tensor = net.name_at(operator.weight)
    dst = net.like(operator.src[0])
    if operator.mode is Mode.PLAIN and (operator.stride, operator.pad) == (1, k // 2) and ends[0] == ends[1]:
        turned = net.weight(tensor, source.channels, result.channels, k, k, form=Form.TURNED)
        net.emit(replace(operator, dst=dst, src=(gradient,), add=add, weight=turned, bias=NONE, row=NONE))
        return dst
    halves = ends[0] == (2 * result.height, 2 * result.width)
    if operator.mode is Mode.PLAIN and (k, operator.stride, operator.pad) == (3, 2, 1) and halves:
        # What a transposed convolution of 4x4 makes has twice the size; one of 3x3 would lack a row and a column.
        widened = net.weight(tensor, result.channels, source.channels, 4, 4, form=Form.WIDENED)
        net.emit(
            Operator(
                Code.CONV, dst, (gradient,), add=add, weight=widened, kernel=4, stride=2, pad=1, mode=Mode.TRANSPOSED
            )
        )
        return dst
    raise _no_gradient(
        f"{_name(net, operator)}, a convolution of {k}x{k} pixels, mode {operator.mode.name.lower()}, stride "
        f"{operator.stride} and padding {operator.pad} of a map of {source.height}x{source.width}"
    )


def _transpose_norm(net: Builder, operator: Operator, gradient: int, add: int) -> int:
    if operator.kind != _GROUP or operator.activation not in _IDENTITY_SILU_RELU:
        raise _no_gradient(f"{_name(net, operator)}: only of group norm with SiLU, ReLU or no activation")
    source = operator.src[0]
    dst = net.like(source)
    net.emit(replace(operator, code=Code.NORM_GRADIENT, dst=dst, src=(source, gradient), add=add))
    return dst


def _transpose_attention(net: Builder, operator: Operator, gradient: int, add: int) -> int:
    if operator.memory or operator.scale:
        raise _no_gradient("attention with learned tokens or cosine scores")
    source = operator.src[0]
    dst = net.like(source)
    net.emit(replace(operator, code=Code.ATTENTION_GRADIENT, dst=dst, src=(source, gradient)))
    return _add(net, dst, add)


def _transpose_resampling(net: Builder, operator: Operator, gradient: int, add: int) -> int:
    """Of an average of 2 x 2 pixels: a quarter, repeated."""
    source, kind = net.shape(operator.src), Resampling(operator.kind)
    if kind is not Resampling.AVERAGE_DOWN:
        raise _no_gradient(f"its resampling {kind.name.lower()}")
    if source.height % 2 or source.width % 2:
        raise _no_gradient(f"an average of {source.height}x{source.width} pixels")
    dst = net.like(operator.src[0])
    net.emit(Operator(Code.RESAMPLE, dst, (gradient,), kind=Resampling.NEAREST_UP, scale=0.25))
    return _add(net, dst, add)


def _transpose_tokens(net: Builder, operator: Operator, gradient: int, add: int) -> int:
    dst = net.like(operator.src[0])
    net.emit(Operator(Code.PIXELS, dst, (gradient,)))
    return _add(net, dst, add)


_RULES: dict[Code, Rule] = {
    Code.CONV: _transpose_conv,
    Code.NORM: _transpose_norm,
    Code.ATTENTION: _transpose_attention,
    Code.RESAMPLE: _transpose_resampling,
    Code.TOKENS: _transpose_tokens,
}


def _add(net: Builder, gradient: int, add: int) -> int:
    if add == NONE:
        return gradient
    dst = net.like(gradient)
    net.emit(Operator(Code.ADD, dst, (gradient, add)))
    return dst


def _name(net: Builder, operator: Operator) -> str:
    """Of the layer whose weight an operator has, such as blocks.3.conv1."""
    if operator.weight == NONE:
        return f"its operator {operator.code.name.lower()}"
    return net.name_at(operator.weight).removesuffix(".weight")


def _no_gradient(what: str) -> BackendError:
    return BackendError(f"the native engine has no gradient of {what}")
