"""docs/metrics.md names every metric that the code logs, and none that it does not."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / "training_scripts", *(ROOT / "diffusers_align" / room for room in ("algorithms", "rl", "training"))]
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
# Where numbers on their way to a log are kept, and what makes them: the code's own habits of naming.
COLLECTED, LOGGING = {"logged", "metrics", "learned", "report"}, {"log", "epoch_metrics"}
MAKERS = re.compile(r"(metrics|statistics|diagnostics|summary)$|^trust_region_|^learned_advantages$|^_preferred$|^_worth$")
# Keys of what makers compute on the way, and a picture.
OTHERS = {"uncontrolled", "samples"}


def name_of(node):
    """The text of a key; an f-string's with `*` for what is filled in. None of anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "*" for part in node.values)
    return None


def keys(node):
    """Of the dicts below a node, those inside of calls' arguments left out."""
    if isinstance(node, ast.Dict):
        yield from (name_of(key) for key in node.keys)
    if isinstance(node, ast.DictComp):
        yield name_of(node.key)
    for child in ast.iter_child_nodes(node):
        if not isinstance(node, ast.Call):
            yield from keys(child)


def logged_by(tree):
    """The names that a module puts into logs."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and getattr(node.value, "attr", getattr(node.value, "id", None)) in COLLECTED:
            yield name_of(node.slice)
        elif isinstance(node, ast.Dict) and any(ast.unparse(value).endswith(".item()") for value in node.values):
            yield from keys(node)
        elif isinstance(node, ast.ClassDef) and node.name.endswith("Log"):
            yield from (name_of(own.slice) for own in ast.walk(node) if isinstance(own, ast.Subscript) and getattr(own.value, "id", None) == "self")
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", None)) in LOGGING:
            yield from (name for argument in node.args for name in keys(argument))
            yield from (keyword.arg for keyword in node.keywords)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Anchor":  # a distance, logged by its name
            yield name_of(node.args[0])
        elif isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id in COLLECTED for target in targets):
                yield from keys(node.value)
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.BinOp) and getattr(node.value.left, "id", None) in COLLECTED:
            yield from keys(node.value.right)
        elif isinstance(node, ast.FunctionDef) and MAKERS.search(node.name):
            yield from (name for statement in node.body for name in keys(statement))
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple) and "logged[" in ast.unparse(node):
            yield from (name_of(row.elts[0]) for row in node.iter.elts if isinstance(row, ast.Tuple))


def logged():
    """Name: the files that log it."""
    found = {}
    for path in sorted(path for source in SOURCES for path in source.rglob("*.py")):
        for name in logged_by(ast.parse(path.read_text(encoding="utf-8"))):
            if name is not None and re.fullmatch(r"[a-z][a-z0-9_/*]*", name) and name not in OTHERS:
                found.setdefault(name, set()).add(path.relative_to(ROOT).as_posix())
    return found


def documented():
    """The names in the tables' columns of metrics."""
    names = set()
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for cell in cells[:2]:  # the script may come before
            if re.fullmatch(r"(`[^`]+`(, )?)+", cell):
                names |= set(re.findall(r"`([^`]+)`", cell))
    return {name for name in names if not name.endswith(".py")}


def pattern(name):
    """A name of the page as it may be logged: NAME and i stand for anything, and what is logged at validations is named where it is made."""
    place, made = re.fullmatch(r"(validation/)?(.*)", name).groups()
    filled = re.escape(made).replace("NAME", "[^ ]+").replace("/i", "/[^ ]+")
    return f"({place})?{filled}" if place and made != "NAME" else f"{place or ''}{filled}"


def test_every_logged_metric_is_on_the_page():
    known = [pattern(name) for name in documented()] + [r"clip_low|clip_high"]  # of Python users, in the page's text
    missing = {name: files for name, files in logged().items() if not any(re.fullmatch(one, name.replace("*", "x")) for one in known)}
    assert not missing, f"docs/metrics.md says nothing of {missing}"
    assert "`clip_low`" in PAGE and "`clip_high`" in PAGE


def test_every_metric_of_the_page_is_logged():
    found = logged()
    assert len(found) > 70, "the code's habits of naming have changed: this test no longer sees what is logged"
    invented = [name for name in documented() if not any(re.fullmatch(pattern(name), one.replace("*", "x")) for one in found)]
    written = "\n".join(path.read_text(encoding="utf-8") for source in SOURCES for path in source.rglob("*.py"))
    invented = [name for name in invented if f'"{name.removeprefix("validation/")}"' not in written]
    assert not invented, f"docs/metrics.md describes what nobody logs: {sorted(invented)}"
