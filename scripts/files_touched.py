"""Counts the files of leanmoe that a function leads a reader to, followed into every branch.

    python scripts/files_touched.py [leanmoe.tune.run:tune ...]

Calls are followed as text, nothing is run: names through imports, methods through annotations of
parameters, fields and return values, and functions that are handed on as values. A file counts when
a function or class of it is entered; re-exports do not, nor does `core`, which everything uses.
`models`, `routing`, `kernels`, `runtime` and `bench` are seams: a file called there counts, what
stands behind it does not. `--behind` follows and counts all of it.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
SEAMS = tuple(f"leanmoe.{each}." for each in ("models", "routing", "kernels", "runtime", "bench"))
CORE = SOURCE / "leanmoe" / "core"
ENTRIES = ("leanmoe.tune.run:tune", "leanmoe.serve.vllm.plugin:activate")
Definition = ast.FunctionDef | ast.ClassDef
Scope = dict[str, str]
"""The class, by its full name, of each local variable that has a known one."""


@dataclass
class Module:
    """One source file: what it defines, and what its names were imported from."""

    path: Path
    definitions: dict[str, Definition] = field(default_factory=dict)
    imports: dict[str, str] = field(default_factory=dict)
    values: dict[str, ast.expr] = field(default_factory=dict)
    """Module-level constants: tables of functions lead on, too."""


class Project:
    """All source files, and what a name in one of them stands for."""

    def __init__(self, source: Path) -> None:
        self.modules: dict[str, Module] = {}
        for path in sorted((source / "leanmoe").rglob("*.py")):
            name = ".".join(path.relative_to(source).with_suffix("").parts)
            self.modules[name.removesuffix(".__init__")] = _read(path)

    def find(self, full: str) -> tuple[str, str] | None:
        """Module and name of a definition or constant, through re-exports; None if not ours."""
        for _ in range(8):
            head, _, leaf = full.rpartition(".")
            module = self.modules.get(head)
            if module is None:
                return None
            if leaf in module.definitions or leaf in module.values:
                return head, leaf
            if leaf not in module.imports:
                return None
            full = module.imports[leaf]
        return None

    def method(self, owner: str, name: str) -> str | None:
        """The full name of a class's method or property, its own or inherited."""
        found = self.find(owner)
        if found is None:
            return None
        node = self.modules[found[0]].definitions.get(found[1])
        if not isinstance(node, ast.ClassDef):
            return None
        if any(isinstance(each, ast.FunctionDef) and each.name == name for each in node.body):
            return f"{found[0]}.{found[1]}:{name}"
        bases = (self.resolve(found[0], base) for base in node.bases)
        return next((m for base in bases if base and (m := self.method(base, name))), None)

    def resolve(self, module: str, node: ast.expr) -> str | None:
        """The full name that an expression like `a` or `a.b` stands for in a module."""
        if isinstance(node, ast.Name):
            here = self.modules[module]
            if node.id in here.definitions or node.id in here.values:
                return f"{module}.{node.id}"
            return here.imports.get(node.id)
        if isinstance(node, ast.Attribute) and (base := self.resolve(module, node.value)):
            return f"{base}.{node.attr}"
        return None

    def annotated(self, module: str, note: ast.expr | None) -> str | None:
        """The first class of ours in an annotation: `tuple[Point, ...] | None` is `Point`."""
        for node in ast.walk(note) if note is not None else ():
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                continue
            if isinstance(node, ast.Name | ast.Attribute):
                full = self.resolve(module, node)
                found = self.find(full) if full else None
                if found and found[1] in self.modules[found[0]].definitions:
                    return ".".join(found)
                if found and (alias := self.modules[found[0]].values.get(found[1])):
                    return self.annotated(found[0], alias)
        return None


def _read(path: Path) -> Module:
    module = Module(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                module.imports[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                module.imports[alias.asname or alias.name] = alias.name
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            module.definitions[node.name] = node
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            module.values[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            module.values[node.target.id] = node.value
    return module


class Walk:
    """Everything that one function leads to."""

    def __init__(self, project: Project, stops: tuple[str, ...] = SEAMS) -> None:
        self.project = project
        self.stops = stops
        self.entered: dict[str, None] = {}
        """`module.function` or `module.Class:method`, in the order in which they were met."""

    def files(self) -> list[Path]:
        """The files of everything that was entered, in the order in which they were met."""
        found = (self.project.find(each.partition(":")[0]) for each in self.entered)
        return list(dict.fromkeys(self.project.modules[f[0]].path for f in found if f))

    def enter(self, full: str) -> None:
        """Follows a function, a class's constructor, or a constant that holds functions."""
        stack = [full]
        while stack:
            each = stack.pop()
            if each not in self.entered:
                stack += reversed(list(dict.fromkeys(self._enter(each))))

    def _enter(self, full: str) -> Iterator[str]:
        owner, _, method = full.partition(":")
        place = self.project.find(owner)
        if place is None:
            return
        module, name = place
        canonical = ".".join(place) + (f":{method}" if method else "")
        if canonical in self.entered:
            return
        node: ast.AST | None = self.project.modules[module].definitions.get(name)
        if node is None and not canonical.startswith(self.stops):
            yield from self._uses(module, self.project.modules[module].values[name], {})
        if node is None:
            return
        self.entered[canonical] = None
        if canonical.startswith(self.stops):
            return
        if isinstance(node, ast.ClassDef):
            made = ["__init__", "__post_init__", "__enter__", "__call__", "forward"]
            wanted = [method] if method else made
            bodies = [b for b in node.body if isinstance(b, ast.FunctionDef) and b.name in wanted]
            for body in bodies:
                yield from self._function(module, body, f"{module}.{name}")
        elif isinstance(node, ast.FunctionDef):
            yield from self._function(module, node, None)

    def _function(self, module: str, node: ast.FunctionDef, owner: str | None) -> Iterator[str]:
        scope: Scope = {}
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for number, argument in enumerate(arguments):
            if owner and number == 0 and argument.arg in ("self", "cls"):
                scope[argument.arg] = owner
            elif kind := self.project.annotated(module, argument.annotation):
                scope[argument.arg] = kind
        for _ in range(2):  # a second time for what is used above where it is assigned
            for inner in ast.walk(node):
                self._learn(module, inner, scope)
        for statement in [*node.body, *node.decorator_list, *node.args.defaults]:
            yield from self._uses(module, statement, scope)

    def _learn(self, module: str, node: ast.AST, scope: Scope) -> None:
        pairs: list[tuple[ast.expr, ast.expr]] = []
        if isinstance(node, ast.Assign):
            pairs = [(target, node.value) for target in node.targets]
        elif isinstance(node, ast.NamedExpr):
            pairs = [(node.target, node.value)]
        elif isinstance(node, ast.For | ast.comprehension):
            pairs = [(node.target, node.iter)]
        elif isinstance(node, ast.With):
            pairs = [(i.optional_vars, i.context_expr) for i in node.items if i.optional_vars]
        elif isinstance(node, ast.AnnAssign | ast.arg):
            named = node.target if isinstance(node, ast.AnnAssign) else ast.Name(node.arg)
            if isinstance(named, ast.Name) and (
                kind := self.project.annotated(module, node.annotation)
            ):
                scope.setdefault(named.id, kind)
        for target, value in pairs:
            kind = self._kind(module, value, scope)
            for name in ast.walk(target):
                if isinstance(name, ast.Name) and kind:
                    scope.setdefault(name.id, kind)

    def _kind(self, module: str, node: ast.expr, scope: Scope) -> str | None:
        """The class of ours that an expression is, or holds."""
        if isinstance(node, ast.Name):
            return scope.get(node.id)
        if isinstance(node, ast.Subscript | ast.Starred | ast.Await):
            return self._kind(module, node.value, scope)
        if isinstance(node, ast.IfExp):
            return self._kind(module, node.body, scope) or self._kind(module, node.orelse, scope)
        if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.SetComp):
            return self._kind(module, node.elt, scope)
        if isinstance(node, ast.Attribute):
            return self._member(module, node, scope)
        if not isinstance(node, ast.Call):
            return None
        if isinstance(node.func, ast.Attribute) and (
            owner := self._kind(module, node.func.value, scope)
        ):
            method = self.project.method(owner, node.func.attr)
            return self._returned(method) if method else None
        full = self.project.resolve(module, node.func)
        if full is None or (found := self.project.find(full)) is None:
            head = full.rpartition(".") if full else None
            method = self.project.method(head[0], head[2]) if head else None
            if method:
                return self._returned(method)
            kinds = (self._kind(module, each, scope) for each in node.args)
            return next((kind for kind in kinds if kind), None)  # zip(points, ...), sorted(points)
        definition = self.project.modules[found[0]].definitions.get(found[1])
        if isinstance(definition, ast.ClassDef):
            return ".".join(found)
        if isinstance(definition, ast.FunctionDef):
            return self.project.annotated(found[0], definition.returns)
        return None

    def _member(self, module: str, node: ast.Attribute, scope: Scope) -> str | None:
        owner = self._kind(module, node.value, scope)
        if owner is None or (found := self.project.find(owner)) is None:
            return None
        if method := self.project.method(owner, node.attr):
            return self._returned(method)
        definition = self.project.modules[found[0]].definitions[found[1]]
        for each in ast.walk(definition):
            if not isinstance(each, ast.AnnAssign):
                continue
            named = each.target.id if isinstance(each.target, ast.Name) else None
            if isinstance(each.target, ast.Attribute):
                named = each.target.attr
            if named == node.attr:
                return self.project.annotated(found[0], each.annotation)
        return None

    def _returned(self, method: str) -> str | None:
        owner, _, name = method.partition(":")
        module = owner.rpartition(".")[0]
        node = self.project.modules[module].definitions[owner.rpartition(".")[2]]
        for each in node.body:
            if isinstance(each, ast.FunctionDef) and each.name == name:
                returned = self.project.annotated(module, each.returns)
                is_self = "Self" in ast.dump(each.returns) if each.returns else False
                return owner if is_self else returned
        return None

    def _uses(self, module: str, node: ast.AST, scope: Scope) -> Iterator[str]:
        """Everything of ours that a piece of code names, in the order of the text."""
        if isinstance(node, ast.Attribute):
            owner = self._kind(module, node.value, scope)
            method = self.project.method(owner, node.attr) if owner else None
            full = self.project.resolve(module, node)
            if method is None and full and self.project.find(full) is None:
                head, _, leaf = full.rpartition(".")
                method = self.project.method(head, leaf)
            if method or (full and self.project.find(full)):
                yield method or str(full)
        if isinstance(node, ast.Name) and node.id not in scope:
            full = self.project.resolve(module, node)
            if full and self.project.find(full):
                yield full
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self._uses(module, child, scope)


def files_touched(entry: str, stops: tuple[str, ...] = SEAMS) -> list[Path]:
    """The source files that `module:function` leads to, its own first."""
    walk = Walk(Project(SOURCE), stops)
    walk.enter(entry.replace(":", "."))
    return [path for path in walk.files() if not stops or path.parent != CORE]


def main() -> None:
    """Prints the count and the files for each entry named, or for tune and vLLM's plugin."""
    entries = [word for word in sys.argv[1:] if word != "--behind"]
    for entry in entries or ENTRIES:
        files = files_touched(entry, () if "--behind" in sys.argv else SEAMS)
        print(f"{entry}: {len(files)} files")
        for path in files:
            print(f"    {path.relative_to(SOURCE / 'leanmoe')}")


if __name__ == "__main__":
    main()
