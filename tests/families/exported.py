"""The pipeline classes that diffusers exports, and the rows that they make with the cases."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass

CLASSIC, MODULAR = "classic", "modular"
NO_CASE = "no case: add one to tests/families/cases/"


@dataclass(frozen=True)
class Row:
    """A row of the table: a case, or a class without one.

    Attributes:
        name: the class, and the case's variant behind a slash.
        cls: the class.
        kind: `CLASSIC` or `MODULAR`.
        family: the folder of diffusers that it comes from.
        index: of its case; None where there is none.
        absent: why it cannot be built here, or `NO_CASE`.
        remark: of the case.
    """

    name: str
    cls: str
    kind: str
    family: str
    index: int | None = None
    absent: str = ""
    remark: str = ""

    @property
    def lacks_case(self) -> bool:
        return self.absent == NO_CASE


def exported() -> tuple[dict[str, type], dict[str, str]]:
    """The pipeline classes of diffusers by name, and what has "Pipeline" in its exported name but is none, with the reason."""
    import diffusers

    classes, left_out = {}, {}
    bases = (diffusers.DiffusionPipeline, diffusers.ModularPipeline) if hasattr(diffusers, "ModularPipeline") else (diffusers.DiffusionPipeline,)
    for name in sorted(name for name in dir(diffusers) if "Pipeline" in name and not name.startswith("_")):
        found = getattr(diffusers, name)
        if not inspect.isclass(found):
            continue
        if found in bases:
            left_out[name] = "the base class"
        elif not issubclass(found, bases):
            left_out[name] = _what_else(name, found)
        elif found.__name__ != name:
            left_out[name] = f"another name of {found.__name__}"
        else:
            classes[name] = found
    return classes, left_out


def _what_else(name: str, found: type) -> str:
    if "Onnx" in name:
        return "ONNX: no torch module to train"
    if name.startswith("Flax"):
        return "Flax: no torch module to train"
    if backends := getattr(found, "_backends", None):
        missing = [backend for backend in backends if not _installed(backend)]
        return f"a package that is not installed here: {', '.join(missing)}"
    if name.startswith("AutoPipelineFor"):
        return "picks one of the other classes"
    return "an output" if name.endswith("Output") else "blocks of modular pipelines" if name.endswith("Blocks") else "no pipeline"


def _installed(backend: str) -> bool:
    from diffusers.utils import import_utils

    return getattr(import_utils, f"is_{backend}_available", lambda: True)()


def rows(classes: Mapping[str, type], cases: Mapping[str, list], absent: Mapping[str, str]) -> list[Row]:
    """A row for each case of each class, and one for each class without cases, classic ones first."""
    found = []
    for name, cls in classes.items():
        kind, family = _origin(cls)
        if not cases.get(name):
            found.append(Row(name, name, kind, family, absent=absent.get(name, NO_CASE)))
        for index, case in enumerate(cases.get(name, ())):
            label = f"{name}/{case.variant}" if case.variant else name
            found.append(Row(label, name, kind, family, index, remark=case.remark))
    names = [row.name for row in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)}: several cases of one name; give each a variant.")
    return sorted(found, key=lambda row: (row.kind != CLASSIC, row.family.lower(), row.name.lower()))


def _origin(cls: type) -> tuple[str, str]:
    """Whether a class is classic or modular, and the folder that it comes from."""
    parts = cls.__module__.split(".")
    kind = MODULAR if "modular_pipelines" in parts else CLASSIC
    return kind, parts[2] if len(parts) > 3 and parts[2] != "deprecated" else parts[-2] if "deprecated" in parts else parts[-1]


def stale(classes: Mapping[str, type], left_out: Mapping[str, str], cases: Mapping[str, list], absent: Mapping[str, str]) -> list[str]:
    """Names of cases or absences that this diffusers does not export."""
    return sorted((set(cases) | set(absent)) - set(classes) - set(left_out))
