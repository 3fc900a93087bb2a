"""Triton's form of the functions that tensors and numba take, written anew from their source, so that each is stated
once. Import this only where triton is installed.
"""

# mypy: disable-error-code="no-untyped-call,untyped-decorator"

import ast
import functools
import inspect
import linecache
import textwrap
from collections.abc import Callable
from numbers import Real
from typing import Any

import triton
import triton.language as tl

#: What Triton calls the functions that Python has built in.
BUILTIN = {"abs": tl.abs, "min": tl.minimum, "max": tl.maximum}


class NoForm(ValueError):
    """A function that is not made of operators, numbers, conditional expressions and ``abs``, ``min`` and ``max``."""


@functools.cache
def triton_form(function: Callable[..., Any]) -> Any:
    """Make a ``triton.jit`` function of a Python function of numbers.

    Annotations and docstrings go, which Triton's compiler stumbles over; global constants come in as literals; ``a if
    c else b`` becomes ``tl.where(c, a, b)``, which works for many elements at a time.

    Raises:
        NoForm: the function uses something else.
    """
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, SyntaxError, TypeError, ValueError) as error:
        raise NoForm(f"{function!r} has no source code") from error
    if not isinstance(definition, ast.FunctionDef):
        raise NoForm(f"{function.__name__} is not a plain function")
    names = {arg.arg for arg in definition.args.args}
    names |= {x.id for x in ast.walk(definition) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)}
    body = [
        line for line in definition.body if not (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
    ]
    writer = _Writer(names, inspect.getclosurevars(function))
    lines = [ast.unparse(ast.fix_missing_locations(writer.visit(line))) for line in body]
    head = f"def {definition.name}({', '.join(arg.arg for arg in definition.args.args)}):\n"
    source = head + "".join(f"    {line}\n" for line in lines)
    # Triton reads the source of what it compiles, and finds it where tracebacks do.
    file = f"<triton form of {function.__module__}.{function.__qualname__} {id(function)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    made: dict[str, Any] = {"tl": tl, "__name__": __name__}
    exec(compile(source, file, "exec"), made)
    return triton.jit(made[definition.name])


class _Writer(ast.NodeTransformer):
    """Rewrites statements one by one, and refuses what it does not know."""

    KNOWN = (
        *(ast.Assign, ast.AugAssign, ast.Return, ast.Name, ast.Constant, ast.Load, ast.Store),
        *(ast.BinOp, ast.UnaryOp, ast.Compare, ast.IfExp, ast.Call, ast.operator, ast.unaryop, ast.cmpop),
    )

    def __init__(self, names: set[str], seen: inspect.ClosureVars) -> None:
        self.names, self.constants = names, {**seen.globals, **seen.nonlocals}

    def generic_visit(self, node: ast.AST) -> ast.AST:
        if not isinstance(node, self.KNOWN) or isinstance(node, ast.Pow | ast.Not):
            raise NoForm(f"{type(node).__name__} cannot be translated to Triton")
        return super().generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        test, body, otherwise = (self.visit(part) for part in (node.test, node.body, node.orelse))
        return _call("where", test, body, otherwise)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if not isinstance(node.func, ast.Name) or node.func.id not in BUILTIN or node.keywords:
            raise NoForm(f"{ast.unparse(node.func)} cannot be translated to Triton")
        return _call(BUILTIN[node.func.id].__name__, *(self.visit(argument) for argument in node.args))

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id in self.names:
            return node
        value = self.constants.get(node.id)
        if not isinstance(value, Real):
            raise NoForm(f"{node.id} cannot be translated to Triton")
        return ast.Constant(float(value))


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    function = ast.Attribute(value=ast.Name(id="tl", ctx=ast.Load()), attr=name, ctx=ast.Load())
    return ast.Call(func=function, args=list(arguments), keywords=[])
