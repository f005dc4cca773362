"""Mutations of Python source: small changes of meaning at exact positions.

Operators are replaced by their neighbors, numbers and booleans change, `not` disappears, functions
return None, and statements that call or raise are removed. Annotations, docstrings, decorators and
the code for type checkers are not mutated.
"""

import ast
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

Operators = dict[type[ast.AST], tuple[str, str]]

COMPARISONS: Operators = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
}  # fmt: skip
ARITHMETIC: Operators = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "/"), ast.Mod: ("%", "//"), ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
}  # fmt: skip
BOOLEAN: Operators = {ast.And: ("and", "or"), ast.Or: ("or", "and")}


@dataclass(frozen=True, order=True)
class Mutation:
    """One replacement in a file.

    Attributes
    ----------
    line
        Line of the replaced text, from 1.
    start, end
        Its position in the file's UTF-8 bytes.
    kind
        Such as ``comparison``; `KINDS` lists all.
    old, new
        The text before and after.
    """

    line: int
    start: int
    end: int
    kind: str
    old: str
    new: str

    def apply(self, source: bytes) -> bytes:
        """Return the source with this mutation."""
        assert source[self.start : self.end].decode() == self.old
        return source[: self.start] + self.new.encode() + source[self.end :]


KINDS = ("comparison", "arithmetic", "boolean", "not", "constant", "return", "removal")


def find_mutations(source: bytes) -> list[Mutation]:
    """Return every mutation of a module, in the order of its text.

    Parameters
    ----------
    source : bytes
        A module in UTF-8.

    Returns
    -------
    list of Mutation
        Each replaces an expression, an operator or a statement.

    Examples
    --------
    >>> [found] = find_mutations(b"larger = a > b")
    >>> found.apply(b"larger = a > b")
    b'larger = a >= b'
    """
    return sorted(_Finder(source).mutations(ast.parse(source)))


class _Finder:
    def __init__(self, source: bytes) -> None:
        self.source = source
        lengths = [len(line) for line in source.split(b"\n")]
        self.line_starts = [0, *itertools.accumulate(length + 1 for length in lengths)]

    def mutations(self, node: ast.AST) -> Iterator[Mutation]:
        yield from self._of(node)
        for child in _mutable_children(node):
            yield from self.mutations(child)

    def _of(self, node: ast.AST) -> Iterator[Mutation]:
        match node:
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                for before, op, after in zip([left, *comparators], ops, comparators, strict=False):
                    yield from self._operator("comparison", COMPARISONS, op, before, after)
            case ast.BinOp(left=left, op=op, right=right) if not (
                _is_text(left) or _is_text(right)
            ):
                yield from self._operator("arithmetic", ARITHMETIC, op, left, right)
            case ast.BoolOp(op=op, values=values):
                for before, after in itertools.pairwise(values):
                    yield from self._operator("boolean", BOOLEAN, op, before, after)
            case ast.UnaryOp(op=ast.Not()):
                start = self._span(node)[0]
                yield self._replace("not", start, start + len("not"), "")
            case ast.Constant(value=bool() | int() | float() as value):
                yield self._replace("constant", *self._span(node), _other_constant(value))
            case ast.Return(value=ast.expr() as value) if not _is_none(value):
                yield self._replace("return", *self._span(value), "None")
            case ast.Expr(value=ast.Call()) | ast.Raise() | ast.AugAssign():
                yield self._replace("removal", *self._span(node), "pass")

    def _operator(
        self, kind: str, table: Operators, op: ast.AST, before: ast.expr, after: ast.expr
    ) -> Iterator[Mutation]:
        if type(op) not in table:
            return
        old, new = table[type(op)]
        start, end = self._span(before)[1], self._span(after)[0]
        gap = self.source[start:end].decode()
        pattern = re.escape(old).replace(r"\ ", r"\s+")
        if "#" not in gap and (found := re.search(pattern, gap)):
            # Only operators, parentheses and white space stand between two operands: ASCII.
            yield self._replace(kind, start + found.start(), start + found.end(), new)

    def _span(self, node: ast.AST) -> tuple[int, int]:
        assert isinstance(node, ast.expr | ast.stmt)
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return (
            self.line_starts[node.lineno - 1] + node.col_offset,
            self.line_starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def _replace(self, kind: str, start: int, end: int, new: str) -> Mutation:
        line = self.source.count(b"\n", 0, start) + 1
        return Mutation(line, start, end, kind, self.source[start:end].decode(), new)


def _mutable_children(node: ast.AST) -> Iterator[ast.AST]:
    skipped: set[str] = set()
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            skipped = {"decorator_list", "returns"}
        case ast.ClassDef():
            skipped = {"decorator_list"}
        case ast.AnnAssign() | ast.arg():
            skipped = {"annotation"}
        case ast.TypeAlias():
            return
        case ast.If(test=ast.Name("TYPE_CHECKING") | ast.Attribute(attr="TYPE_CHECKING")):
            skipped = {"test", "body"}
        case ast.JoinedStr():  # messages
            return
    for name, value in ast.iter_fields(node):
        if name not in skipped:
            values = value if isinstance(value, list) else [value]
            yield from (child for child in values if isinstance(child, ast.AST))


def _other_constant(value: float) -> str:
    if isinstance(value, bool):
        return str(not value)
    if isinstance(value, int):
        return str(value + 1)
    return repr(value * 2 if value else 1.0)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    )


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
