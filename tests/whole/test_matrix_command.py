"""The command that looks at every pipeline, on fake pipelines."""

import json
import sys
import time
import types

import fake_tasks
import pytest

from tests.families import __main__ as command
from tests.families import expected, exported, page, pool
from tests.families.case import Case
from tests.families.cell import Cell, DoesNotApply, Fault, looked_at
from tests.families.column import Column, look
from tests.families.columns import COLUMNS
from tests.families.exported import NO_CASE, Row
from tests.families.results import Result, Results

VERSIONS = {"diffusers": "1", "torch": "2"}


def result(row="APipeline", dtype="float32", **cells):
    return Result(row, dtype, VERSIONS, "source", {name: Cell(status, f"{name} is {status}" * (status != "yes")) for name, status in cells.items()})


def run(*tasks, limit=60.0, jobs=2):
    return {task.key: task for task in pool.run([pool.Task(key, *call) for key, call in enumerate(tasks)], jobs=jobs, limit=limit, source=pool.context([]))}


# --- cells ----------------------------------------------------------------------------------------------------------------


def of_ours(error):
    """A function that raises, as if it stood in the package."""
    path = str(command.ROOT / "diffusers_align" / "policy.py")
    line = next(i for i, text in enumerate(open(path), 1) if text.strip().startswith("raise ValueError"))
    code = compile("\n" * (line - 1) + f"raise {error}", path, "exec")
    return lambda: exec(code)


def test_a_cell_is_what_its_check_returns_or_raises():
    def check(error):
        raise error

    assert looked_at(lambda: None) == Cell("yes") and looked_at(lambda: "exact") == Cell("yes", "exact")
    assert looked_at(lambda: check(DoesNotApply("No time."))) == Cell("outside", "No time.")
    assert looked_at(lambda: check(Fault("Off by 3."))) == Cell("no", "Off by 3.")
    fault = looked_at(lambda: check(ValueError("of a test, not of the library")))
    assert fault.status == "no" and "ValueError: of a test" in fault.reason and "tests/whole/test_matrix_command.py:" in fault.reason


def test_a_sentence_that_the_library_raises_is_a_refusal_and_an_accident_is_not():
    assert looked_at(of_ours("ValueError('Give seeds.')")) == Cell("refused", "Give seeds.")
    assert looked_at(of_ours("TypeError('Give a list.')")).status == "refused"
    assert looked_at(of_ours("KeyError('vae')")).status == "no"

    def accident():
        command.parser().add_argument()  # raised by the standard library

    assert looked_at(accident).status == "no"


def test_columns_that_need_others_are_not_reached_without_them():
    def fails(subject):
        raise Fault("Off.")

    columns = (Column("a", "a", "", fails), Column("b", "b", "", lambda s: None, ("a",)), Column("c", "c", "", lambda s: None, ("b",)))
    assert {name: cell.status for name, cell in look(None, columns)} == {"a": "no", "b": "unreached", "c": "unreached"}
    others = (Column("a", "a", "", lambda s: None), *columns[1:], Column("d", "d", "", fails))
    begun = []
    assert {name: cell.status for name, cell in look(None, others, {"c"}, begun.append)} == dict.fromkeys("abc", "yes")
    assert begun == ["a", "b", "c"]


# --- processes ------------------------------------------------------------------------------------------------------------


def test_what_is_late_is_killed_and_what_it_had_said_is_kept():
    start = time.monotonic()
    tasks = run((fake_tasks.stuck, ()), (fake_tasks.green, (2,)), limit=3.0)
    assert time.monotonic() - start < 30
    assert {name: cell.status for name, cell in tasks[0].cells.items()} == {"stock": "yes", "rollout": "no"}
    assert tasks[0].cells["rollout"].reason == "Time limit of 3 s."
    assert {name: cell.status for name, cell in tasks[1].cells.items()} == {"stock": "yes", "policy": "yes"}


def test_a_process_that_ends_or_raises_is_a_fault():
    tasks = run((fake_tasks.crashed, ()), (fake_tasks.broken, ()))
    assert tasks[0].cells["rollout"] == Cell("no", "The process ended with code 7.")
    assert "no" in {cell.status for cell in tasks[1].cells.values()}
    assert any("out of order" in cell.reason for cell in tasks[1].cells.values())


# --- results --------------------------------------------------------------------------------------------------------------


def test_results_are_read_back_and_the_latest_counts(tmp_path):
    path = tmp_path / "runs" / "families.jsonl"
    results = Results(path, VERSIONS)
    results.add(result(stock="yes", replay="no"))
    results.add(result(stock="yes", replay="yes"))
    results.add(result(dtype="bfloat16", stock="yes"))
    path.write_text(path.read_text() + '{"row": "cut o')  # a run that was killed
    again = Results(path, VERSIONS)
    assert again.get("APipeline", "float32") == result(stock="yes", replay="yes")
    assert len(again.found) == 2
    assert Results(path, {**VERSIONS, "diffusers": "2"}).found == {}


def test_what_was_looked_at_is_not_looked_at_again(tmp_path, monkeypatch, capsys):
    rows = [Row("APipeline", "APipeline", "classic", "a", 0), Row("BPipeline", "BPipeline", "classic", "b", 0)]
    results, ran = Results(tmp_path / "families.jsonl", VERSIONS), []

    def fake(tasks, **options):
        for task in tasks:
            ran.append((task.key[0].name, task.key[1]))
            task.cells["stock"] = Cell("yes")
            if len(ran) == 3:
                raise KeyboardInterrupt
            yield task

    monkeypatch.setattr(pool, "run", fake)
    options = command.parser().parse_args([])
    with pytest.raises(SystemExit):
        command._look(rows, options, results, None, "source", command.asked(options))
    assert "goes on from here" in capsys.readouterr().out
    again = Results(tmp_path / "families.jsonl", VERSIONS)
    assert len(command._look(rows, options, again, None, "source", command.asked(options))) == 4
    assert ran == [("APipeline", "float32"), ("APipeline", "bfloat16"), ("BPipeline", "float32"), ("BPipeline", "float32"), ("BPipeline", "bfloat16")]
    for arguments, number in ((["--fresh"], 4), (["--changed"], 0), (["--changed", "--dtype", "float32"], 0), (["--fresh", "--dtype", "float32"], 2)):
        before = len(ran)
        ran[:0] = [None] * 10  # no interruption
        options = command.checked(arguments)
        command._look(rows, options, again, None, "source", command.asked(options))
        assert len(ran) - before - 10 == number
    before = len(ran)
    options = command.checked(["--changed"])
    command._look(rows, options, again, None, "another source", command.asked(options))
    assert len(ran) - before == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--accept", "APipeline"], "--accept writes what holds for all"),
        (["--report", "--dtype", "float32"], "--report writes what holds for all"),
        (["--accept", "--column", "replay"], "--accept writes what holds for all"),
        (["--report", "--changed"], "--report looks at nothing, so that --changed would"),
        (["--list", "--fresh", "--accept"], "--list looks at nothing, so that --fresh and --accept would"),
        (["--jobs", "0"], "--jobs is at least 1"),
        (["--time-limit", "nan"], "--time-limit above 0"),
    ],
)
def test_options_without_effect_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.checked(arguments)
    assert message in capsys.readouterr().err
    assert command.checked(["--report", "--accept"]).accept


def test_columns_are_checked_and_looked_at_where_they_are():
    assert command.asked(command.checked([])) == {"float32": None, "bfloat16": None}
    half = [column.name for column in COLUMNS if column.half]
    whole = [column.name for column in COLUMNS if not column.half]
    assert command.asked(command.checked(["--column", half[0], "--column", whole[0]])) == {"float32": {half[0], whole[0]}, "bfloat16": {half[0]}}
    assert command.asked(command.checked(["--column", whole[0]])) == {"float32": {whole[0]}}
    with pytest.raises(SystemExit, match="--column repaly: there is no such column. Did you mean 'replay'"):
        command.asked(command.checked(["--column", "repaly"]))
    with pytest.raises(SystemExit, match="not looked at in bfloat16"):
        command.asked(command.checked(["--column", whole[0], "--dtype", "bfloat16"]))


# --- what turned red ------------------------------------------------------------------------------------------------------


def test_what_was_green_and_is_not_is_told_first_and_fails(tmp_path, capsys):
    path = tmp_path / "expected.json"
    expected.write([result(stock="yes", replay="yes", encode="refused", lora="outside", dpo="no"), result("BPipeline", stock="yes")], VERSIONS, path)
    before, versions = expected.read(path)
    assert versions == VERSIONS and before["APipeline", "float32"]["encode"] == "refused"
    now = result(stock="yes", replay="no", encode="unreached", lora="refused", dpo="no")
    assert [(name, was) for _, name, was in expected.regressions([now], before)] == [("replay", "yes"), ("encode", "refused")]
    assert [name for _, name, _ in expected.regressions([result(stock="refused")], before)] == ["stock"]
    rows = [Row("APipeline", "APipeline", "classic", "a", 0)]
    assert command.told(rows, [now], before) == 1
    told = capsys.readouterr().out
    assert told.index("Green before, and not now") < told.index("replay: was yes, is no") < told.index("dpo: dpo is no")
    assert "python -m tests.families APipeline --column replay --traceback" in told and told.count(" replay: ") == 1
    assert command.told(rows, [result(stock="yes", encode="refused")], before) == 0
    assert expected.read(tmp_path / "none.json") == ({}, {})


def test_a_class_that_neither_cases_nor_absences_name_fails(capsys):
    def of(module, name):
        return type(name, (), {"__module__": module})

    classes = {
        "APipeline": of("diffusers.pipelines.a.pipeline_a", "APipeline"),
        "BModularPipeline": of("diffusers.modular_pipelines.b.modular_pipeline", "BModularPipeline"),
        "CPipeline": of("diffusers.pipelines.deprecated.c.pipeline_c", "CPipeline"),
    }
    cases = {"APipeline": [Case(None), Case(None, variant="2.2")]}
    rows = exported.rows(classes, cases, {"CPipeline": "weights from a Hub alone"})
    assert [(row.name, row.kind, row.family) for row in rows] == [
        ("APipeline", "classic", "a"), ("APipeline/2.2", "classic", "a"), ("CPipeline", "classic", "c"), ("BModularPipeline", "modular", "b"),
    ]  # fmt: skip
    assert rows[2].absent == "weights from a Hub alone" and rows[3].absent == NO_CASE
    assert exported.stale(classes, {}, {**cases, "GonePipeline": []}, {}) == ["GonePipeline"]
    assert command.told(rows, [], {}) == 1
    assert "BModularPipeline: no case: add one to tests/families/cases/" in capsys.readouterr().out
    assert command.told(rows[:3], [], {}) == 0
    with pytest.raises(ValueError, match="give each a variant"):
        exported.rows(classes, {"APipeline": [Case(None), Case(None)]}, {})


def test_rows_are_chosen_by_name_pattern_and_variant():
    rows = [Row(name, name.split("/")[0], "classic", "a", 0) for name in ("APipeline", "APipeline/2.2", "AInpaintPipeline")]
    for names, number in ([], 3), (["APipeline"], 2), (["APipeline/2.2"], 1), (["*Inpaint*"], 1):
        assert len(command.chosen(rows, names)) == number
    with pytest.raises(SystemExit, match="BPipeline: no pipeline class"):
        command.chosen(rows, ["APipeline", "BPipeline"])


def test_what_is_exported_is_classes_and_the_rest_with_reasons(monkeypatch):
    class Base:
        pass

    class Modular:
        pass

    class APipeline(Base):
        pass

    dummy = type("OpencvPipeline", (), {"_backends": ["torch", "a_missing_one"]})
    fake = {
        "DiffusionPipeline": Base, "ModularPipeline": Modular, "APipeline": APipeline, "OldPipeline": APipeline, "OpencvPipeline": dummy,
        "OnnxAPipeline": type("OnnxAPipeline", (), {}), "FlaxAPipeline": type("FlaxAPipeline", (), {}), "APipelineOutput": type("APipelineOutput", (), {}),
    }  # fmt: skip
    monkeypatch.setitem(sys.modules, "diffusers", types.SimpleNamespace(**fake))
    monkeypatch.setattr(exported, "_installed", lambda name: name == "torch")
    classes, left_out = exported.exported()
    assert classes == {"APipeline": APipeline}
    assert left_out == {
        "APipelineOutput": "an output",
        "DiffusionPipeline": "the base class",
        "FlaxAPipeline": "Flax: no torch module to train",
        "ModularPipeline": "the base class",
        "OldPipeline": "another name of APipeline",
        "OnnxAPipeline": "ONNX: no torch module to train",
        "OpencvPipeline": "a package that is not installed here: a_missing_one",
    }


# --- the page -------------------------------------------------------------------------------------------------------------


def test_the_page_counts_and_numbers_reasons(tmp_path):
    columns = [Column("stock", "call", "the call runs", None, half=True), Column("replay", "rep", "replays are exact", None)]
    rows = [
        Row("APipeline", "APipeline", "classic", "a", 0, remark="with another scheduler"),
        Row("BPipeline", "BPipeline", "classic", "b", 0),
        Row("CPipeline", "CPipeline", "classic", "b", absent="weights from a Hub"),
        Row("DModularPipeline", "DModularPipeline", "modular", "d", 0),
    ]
    sentences = [f"{row.cls} is off by {number}." for row, number in zip(rows, ("1e-3", "2.5", "", "7"))]
    results = [Result(rows[i].name, "float32", VERSIONS, "s", {"stock": Cell("yes"), "replay": Cell("no", sentences[i])}) for i in (0, 1, 3)]
    results.append(Result("APipeline", "bfloat16", VERSIONS, "s", {"stock": Cell("refused", "No halves.")}))
    path = tmp_path / "families.md"
    page.write(rows, results, columns, {"XPipeline": "the base class"}, VERSIONS, path)
    text = path.read_text()
    for line in (
        "diffusers 1, torch 2",
        "2 of 3 classic classes and 1 of 1 modular classes are built",
        "| rep | replays are exact | 0 | 0 | 0 | 2 | 0 | 0 | 0 | 0 | 1 | 0 |",
        "| call bf16 | the same in bfloat16 | 0 | 1 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 0 |",
        "| A<sup>2</sup> | ● | ✗<sup>1</sup> | ○<sup>3</sup> |",
        "| B | ● | ✗<sup>1</sup> |   |",
        "| DModular | ● | ✗<sup>1</sup> |   |",
        "| CPipeline | b | weights from a Hub |",
        "* the base class: XPipeline",
        "1. The pipeline is off by 1e-3. *(3 times)*",
        "2. with another scheduler",
        "3. No halves.",
    ):
        assert line in text.splitlines() or line in text, line


def test_a_column_of_the_results_that_is_no_more_does_no_harm(tmp_path):
    rows = [Row("APipeline", "APipeline", "classic", "a", 0)]
    page.write(rows, [result(gone="yes")], [Column("stock", "call", "the call runs", None)], {}, VERSIONS, tmp_path / "page.md")
    assert "| A |   |   |" in (tmp_path / "page.md").read_text()


def test_the_lines_of_the_baseline_are_json(tmp_path):
    expected.write([result(stock="yes"), result(dtype="bfloat16", replay="no")], VERSIONS, tmp_path / "e.json")
    assert json.loads((tmp_path / "e.json").read_text())["float32 APipeline"] == "y"
