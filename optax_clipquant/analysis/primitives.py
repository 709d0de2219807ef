"""The effect of JAX's primitives on the axes of their operands."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.extend import core

from optax_clipquant.analysis import views
from optax_clipquant.analysis.views import Role, View

# Primitives that leave each weight in place, unchanged except for rounding.
SAME = {
    *("convert_element_type", "reduce_precision", "copy", "copy_p", "optimization_barrier", "rev"),
    *("sharding_constraint", "mesh_cast", "reshard", "layout_constraint", "name", "device_put"),
    *("stop_gradient", "pvary", "pcast", "ppermute"),
}
COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "is_finite"}
ELEMENTWISE = COMPARISONS | {
    *("add", "add_any", "sub", "mul", "div", "rem", "max", "min", "pow", "integer_pow", "atan2"),
    *("neg", "sign", "abs", "square", "sqrt", "rsqrt", "cbrt", "exp", "exp2", "log", "log1p"),
    *("expm1", "sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "asinh"),
    *("acosh", "atanh", "logistic", "erf", "erfc", "erf_inv", "lgamma", "digamma", "floor", "ceil"),
    *("round", "clamp", "nextafter", "select_n", "and", "or", "xor", "not", "real", "imag", "conj"),
    *("complex", "shift_left", "shift_right_logical", "shift_right_arithmetic"),
}
# Primitives whose results are no longer weights, such as the norm of a weight, or printing it.
REDUCTIONS = {
    *("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax"),
    *("argmin", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "top_k", "psum"),
    *("psum_invariant", "pmax", "pmin", "reduce_window_max", "reduce_window_sum"),
    *("debug_callback", "debug_print"),
}

Equation = Any  # core.JaxprEqn, whose type stubs lack shapes
Shaping = Callable[[View, Mapping[str, Any], Sequence[int]], View]


def resize(view: View, params: Mapping[str, Any], shape: Sequence[int]) -> View:
    return views.resized(view, shape)


def _slice(view: View, params: Mapping[str, Any], shape: Sequence[int]) -> View:
    strides = params["strides"]
    known = strides is None or all(stride == 1 for stride in strides)
    return views.resized(view, shape, params["start_indices"] if known else None)


# Functions from the view of the first operand, the equation's parameters and the result's shape to a view.
SHAPING: Mapping[str, Shaping] = {
    "transpose": lambda view, params, shape: views.transposed(view, params["permutation"]),
    "reshape": lambda view, params, shape: views.reshaped(view, shape),
    "squeeze": lambda view, params, shape: views.indexed(view, params["dimensions"]),
    "broadcast_in_dim": lambda view, params, shape: views.repeated(
        view, shape, params["broadcast_dimensions"]
    ),
    "slice": _slice,
    "pad": resize,
    "tile": lambda view, params, shape: views.tiled(view, params["reps"]),
}


def piece(axis: int, start: int) -> Shaping:
    """The shaping of the output of ``split`` that begins at ``start``."""
    return lambda view, params, shape: views.resized(
        view, shape, [start * (i == axis) for i in range(len(shape))]
    )


def stack(view: View, params: Mapping[str, Any], shape: Sequence[int]) -> View:
    return views.repeated(view, shape, [i for i in range(len(shape)) if i != params["axis"]])


def unstack(start: int) -> Shaping:
    """The shaping of output number ``start`` of ``unstack``."""

    def shaping(view: View, params: Mapping[str, Any], shape: Sequence[int]) -> View:
        axis = params["axis"]
        kept = [*shape[:axis], 1, *shape[axis:]]
        return views.indexed(piece(axis, start)(view, params, kept), [axis])

    return shaping


def dot_roles(eqn: Equation) -> list[list[Role]]:
    """The roles of the axes of both operands of ``dot_general`` and of ``ragged_dot_general``."""
    ragged = eqn.params.get("ragged_dot_dimension_numbers")
    numbers = ragged.dot_dimension_numbers if ragged else eqn.params["dimension_numbers"]
    found: list[list[Role]] = []
    for var, contracted, batch in zip(eqn.invars, *numbers, strict=False):
        roles: list[Role] = ["output"] * var.aval.ndim
        for axis in contracted:
            roles[axis] = "contracted"
        for axis in batch:
            roles[axis] = "batch"
        found.append(roles)
    for axis in ragged.rhs_group_dimensions if ragged else ():
        found[1][axis] = "batch"
    return found


def conv_roles(eqn: Equation) -> list[list[Role]]:
    """The roles of the axes of both operands of ``conv_general_dilated``."""
    numbers = eqn.params["dimension_numbers"]
    channels, inputs = numbers.rhs_spec[:2]
    kernel: list[Role] = ["contracted"] * len(numbers.rhs_spec)
    depthwise = eqn.params["feature_group_count"] > 1 and eqn.invars[1].aval.shape[inputs] == 1
    kernel[channels] = "batch" if depthwise else "output"
    return [["output"] * len(numbers.lhs_spec), kernel]


def inner_jaxpr(eqn: Equation) -> core.Jaxpr | core.ClosedJaxpr | None:
    """The jaxpr that an equation such as ``jit`` or ``remat`` stands for."""
    for param in eqn.params.values():
        jaxpr = param.jaxpr if isinstance(param, core.ClosedJaxpr) else param
        if isinstance(jaxpr, core.Jaxpr) and (
            _shapes(jaxpr.invars) == _shapes(eqn.invars)
            and _shapes(jaxpr.outvars) == _shapes(eqn.outvars)
        ):
            return param
    return None


def _shapes(atoms: Sequence[Any]) -> list[Any]:
    return [getattr(atom.aval, "shape", None) for atom in atoms]
