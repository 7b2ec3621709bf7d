"""The house rules that can be read off the source: floors, purity, explicitness, and what may stand where."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "check": 0,
    "region": 0,
    "tree": 0,
    "functional": 1,
    "recompute": 1,
    "architecture": 2,
    "carve": 2,
    "config": 2,
    "optim": 2,
    "partition": 2,
    "qwen3": 2,
    "rounding": 2,
    "settings": 2,
    "storage": 2,
    "tiling": 2,
    "weights": 2,
    "checkpoint": 3,
    "board": 3,
    "calibration": 3,
    "corpus": 3,
    "data": 3,
    "descent": 3,
    "documents": 3,
    "grain": 3,
    "hub": 3,
    "lessons": 3,
    "objective": 3,
    "observe": 3,
    "train": 3,
}
"""Modules of `onn`; `experiments` stands above them all, and the tests above that."""
MAX_LINES = 400
EDGE = ("onn/calibration.py", "onn/corpus.py", "onn/observe.py", "onn/weights.py")
"""Where clocks and random numbers may live; everything else in `onn` takes them as arguments."""
ADAPTERS = (
    "onn/config.py",
    "onn/documents.py",
    "onn/hub/convert.py",
    "onn/hub/model.py",
    "onn/qwen3.py",
    "onn/storage.py",
    "onn/tree.py",
    "onn/weights.py",
)
"""Where a library that returns `Any`, or a file, is given its type by a cast."""
IGNORES = {
    "onn/tree.py": (4, "optree's own types refuse NamedTuples"),
    "onn/config.py": (2, "dataclasses.fields refuses a class that is only known to be a dataclass"),
    "experiments/study/tasks.py": (1, "scipy defines its names at run time"),
    "tests/resuming.py": (1, "replace() takes no mapping of mixed types"),
    "tests/study_nets.py": (1, "replace() takes no mapping of mixed types"),
    "tests/test_study_runs.py": (2, "replace() takes no mapping of mixed types, and a stand-in passes on what it gets"),
    "tests/support.py": (1, "the constructor of TorchDispatchMode has no types"),
    "tests/test_hub_model.py": (1, "transformers does not annotate it"),
    "tests/test_qwen3.py": (4, "replace() takes no mapping of mixed types, and a layer may be dense"),
    "tests/test_storage.py": (1, "passes a wrong type on purpose"),
    "tests/test_train.py": (1, "replace() takes no mapping of mixed types"),
}
"""How many `type: ignore` a file may hold, and why."""

Rule = Callable[[ast.Module], Iterator[ast.AST]]


class Source(NamedTuple):
    path: str
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def sources(*folders: str) -> list[Source]:
    found = []
    for path in sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found.append(Source(path.relative_to(ROOT).as_posix(), text, ast.parse(text)))
    return found


EVERYTHING = sources("onn", "experiments", "tests")
ONN = [source for source in EVERYTHING if source.path.startswith("onn/")]
FUNCTIONAL = [source for source in ONN if source.path.startswith("onn/functional/")]
MODULES = {source.module for source in EVERYTHING}


def imports(tree: ast.Module) -> set[str]:
    """The modules of this repository that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= (below & MODULES) or {str(node.module)}
    return {name for name in names if name.split(".")[0] in ("onn", "experiments", "tests")}


def floor(module: str) -> int:
    package, _, rest = module.partition(".")
    above = {"experiments": 4, "tests": 5}
    return above[package] if package in above else FLOORS[rest.split(".")[0]] if rest else -1


def dotted(node: ast.AST) -> str:
    """`torch.nn.Linear` for the expression of that name, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        value = dotted(node.value)
        return f"{value}.{node.attr}" if value else ""
    return ""


def named(*banned: str) -> Rule:
    """A rule against the use or the import of these dotted names, or of anything below them."""

    def uses(name: str) -> bool:
        return any(name == ban or name.startswith(f"{ban}.") for ban in banned)

    def rule(tree: ast.Module) -> Iterator[ast.AST]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                names = [dotted(node)] if isinstance(node, ast.Attribute) else []
            if any(uses(name) for name in names):
                yield node

    return rule


def calls(*functions: str, methods: tuple[str, ...] = ()) -> Rule:
    """A rule against calls of functions by name and of methods of anything."""

    def rule(tree: ast.Module) -> Iterator[ast.AST]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (
                dotted(node.func) in functions or (isinstance(node.func, ast.Attribute) and node.func.attr in methods)
            ):
                yield node

    return rule


def rebinds_outer_names(tree: ast.Module) -> Iterator[ast.AST]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Global | ast.Nonlocal))


def holds_mutable_state(tree: ast.Module) -> Iterator[ast.AST]:
    """Lists, dicts and sets bound in a module or in the body of a class."""
    makers = ("list", "dict", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict")
    literals = ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp
    bodies = [tree.body, *(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]
    for node in (node for body in bodies for node in body):
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) else None
        made = isinstance(value, ast.Call) and dotted(value.func).split(".")[-1] in makers
        if isinstance(node, ast.AugAssign) or isinstance(value, literals) or made:
            yield node


def public(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    return (
        node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    )


def has_defaults(tree: ast.Module) -> Iterator[ast.AST]:
    for node in public(tree):
        if isinstance(node, ast.FunctionDef) and (node.args.defaults or any(node.args.kw_defaults)):
            yield node


def lacks_docstring(tree: ast.Module) -> Iterator[ast.AST]:
    return (node for node in public(tree) if not ast.get_docstring(node))


def takes_hyperparameters_by_position(tree: ast.Module) -> Iterator[ast.AST]:
    """Numbers, names and choices; positional are tensors, trees of them, and the functions of a transform."""
    choices = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign) and "Literal" in ast.dump(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    scalars = choices | {"int", "float", "bool", "str"}
    for node in public(tree):
        if isinstance(node, ast.FunctionDef):
            positional = [*node.args.posonlyargs, *node.args.args]
            annotations = {dotted(arg.annotation) for arg in positional if arg.annotation is not None}
            if annotations & scalars or node.args.vararg or node.args.kwarg:
                yield node


def is_not_frozen(tree: ast.Module) -> Iterator[ast.AST]:
    """A dataclass is a configuration: frozen, and every value is named."""
    for node in ast.walk(tree):
        for decorator in node.decorator_list if isinstance(node, ast.ClassDef) else []:
            call = decorator.func if isinstance(decorator, ast.Call) else decorator
            set_ = {word.arg for word in decorator.keywords} if isinstance(decorator, ast.Call) else set()
            if dotted(call).split(".")[-1] == "dataclass" and not {"frozen", "kw_only"} <= set_:
                yield node


def lacks_future_annotations(tree: ast.Module) -> Iterator[ast.AST]:
    first = next((node for node in tree.body if not isinstance(node, ast.Expr)), None)
    future = isinstance(first, ast.ImportFrom) and first.module == "__future__"
    if not future and any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(tree)):
        yield tree.body[0]


def does_more_than_re_export(tree: ast.Module) -> Iterator[ast.AST]:
    for node in tree.body[1:]:
        if not isinstance(node, ast.ImportFrom) or any(alias.name != alias.asname for alias in node.names):
            yield node


RANDOM = ("torch.rand", "torch.randn", "torch.randint", "torch.randperm", "torch.manual_seed", "torch.seed")
MODULES_OF_CHANCE = ("random", "secrets", "uuid", "time", "datetime", "torch.Generator", "torch.random", "numpy.random")
SYNC = ("item", "tolist", "cpu", "numpy", "nonzero", "unique")


class House(NamedTuple):
    """One rule, where it holds, and what it must refuse."""

    rule: Rule
    where: Callable[[str], bool]
    refused: tuple[str, ...]


def in_onn(path: str) -> bool:
    return path.startswith("onn/")


def in_functional(path: str) -> bool:
    return path.startswith("onn/functional/")


def not_in_tests(path: str) -> bool:
    return not path.startswith("tests/")


def anywhere(path: str) -> bool:
    return True


RULES: dict[str, House] = {
    "no global or nonlocal": House(
        rebinds_outer_names,
        anywhere,
        ("def f():\n global x", "def f():\n x = 1\n def g():\n  nonlocal x"),
    ),
    "no mutable state in a module or class": House(
        holds_mutable_state,
        in_onn,
        (
            "a = []",
            "a: dict[str, int] = {}",
            "a = {1}",
            "a = [x for x in y]",
            "a = dict()",
            "class A:\n seen = []",
            "a = collections.defaultdict(list)",
            "a = ()\na += (1,)",
        ),
    ),
    "no default value in a public function": House(
        has_defaults, in_functional, ("def f(a=1): ...", "def f(*, a=None): ...")
    ),
    "a docstring for everything public": House(lacks_docstring, in_functional, ("def f(): ...", "class A:\n x: int")),
    "hyperparameters by keyword": House(
        takes_hyperparameters_by_position,
        in_functional,
        (
            "def f(x: Tensor, k: int): ...",
            "Form = Literal['a']\ndef f(form: Form): ...",
            "def f(*x: Tensor): ...",
            "def f(**k: int): ...",
        ),
    ),
    "no host sync": House(
        calls("float", "int", "bool", methods=SYNC),
        lambda path: in_functional(path) and not path.startswith("onn/functional/kernels/"),
        ("x.sum().item()", "float(x)", "x[0].tolist()", "bool(x.any())"),
    ),
    "only re-exports": House(
        does_more_than_re_export,
        lambda path: path == "onn/functional/__init__.py",
        ("'doc'\nx = 1", "'doc'\nfrom onn.functional.types import Experts"),
    ),
    "no clock or chance away from the edge": House(
        named(*MODULES_OF_CHANCE, *RANDOM),
        lambda path: in_onn(path) and path not in EDGE,
        ("import random", "from time import monotonic", "torch.Generator()", "torch.randn(3)", "import numpy.random"),
    ),
    "configurations are frozen and named": House(
        is_not_frozen, in_onn, ("@dataclass\nclass A: ...", "@dataclasses.dataclass(frozen=True)\nclass A: ...")
    ),
    "casts in adapters alone": House(
        calls("cast", "typing.cast"),
        lambda path: not_in_tests(path) and path not in ADAPTERS,
        ("cast('int', x)", "typing.cast(int, x)"),
    ),
    "no Any": House(named("typing.Any"), anywhere, ("from typing import Any", "def f(x: typing.Any): ...")),
    "nothing is unpickled": House(
        named("pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "torch.load", "torch.save"),
        not_in_tests,  # which must make what is to be refused
        ("import pickle", "from torch import load", "torch.load(path)", "import dill as d"),
    ),
    "no trap that torch sets": House(
        named("torch.utils.checkpoint", "torch.library.custom_op", "torch.library.register_autograd"),
        in_onn,
        ("from torch.utils.checkpoint import checkpoint", "torch.library.custom_op('a')"),
    ),
    "annotations are strings": House(
        lacks_future_annotations,
        anywhere,
        ("def f(): ...", "'doc'\nimport a\nfrom __future__ import annotations\ndef f(): ..."),
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_the_source_keeps_the_rule(name: str) -> None:
    rule, where, _ = RULES[name]
    held = [source for source in EVERYTHING if where(source.path)]
    assert held
    broken = [f"{s.path}:{getattr(node, 'lineno', 1)}" for s in held for node in rule(s.tree)]
    assert not broken, f"{name}: {', '.join(broken)}"


@pytest.mark.parametrize(("name", "code"), [(name, code) for name, house in RULES.items() for code in house.refused])
def test_a_rule_refuses_what_breaks_it(name: str, code: str) -> None:
    assert list(RULES[name].rule(ast.parse(code)))


def test_every_module_has_a_floor_and_imports_none_from_above() -> None:
    below = {source.module.removeprefix("onn.").split(".")[0] for source in ONN if source.module != "onn"}
    assert below <= set(FLOORS), f"without a floor: {below - set(FLOORS)}"
    for source in EVERYTHING:
        for imported in imports(source.tree):
            assert floor(imported) <= floor(source.module), f"{source.path} imports {imported} from a floor above"


def test_imports_form_no_cycle() -> None:
    graph = {source.module: imports(source.tree) - {source.module} for source in EVERYTHING}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_imports_are_read_in_every_form() -> None:
    code = """
import torch
import onn.functional as F
from onn import check
from onn.tree import map1

def late():
    import experiments.run
"""
    names = {"onn.functional": 1, "onn.check": 0, "onn.tree": 0, "experiments.run": 4}
    assert imports(ast.parse(code)) == set(names)
    assert {name: floor(name) for name in names} == names


def test_no_file_is_longer_than_a_reader_can_hold() -> None:
    long = {s.path: lines for s in EVERYTHING if (lines := len(s.text.splitlines())) > MAX_LINES}
    assert not long


def test_types_are_ignored_only_where_a_reason_is_known() -> None:
    mark = re.compile(r"# type: ignore(\[[a-z-]+\])?")
    for source in EVERYTHING:
        if source.path == "tests/test_architecture.py":
            continue
        found = mark.findall(source.text)
        assert all(found), f"{source.path}: a type: ignore without its code"
        allowed, reason = IGNORES.get(source.path, (0, "none is known"))
        assert len(found) <= allowed, f"{source.path}: {len(found)} ignores, {allowed} allowed ({reason})"
