"""Run the mini recipes again and compare every logged metric with the committed curve.

    python -m benchmarks.verify
    python -m benchmarks.verify flow_grpo_mini_sd3 draft_mini_sd3
    python -m benchmarks.verify --record flow_grpo_mini_sd3

On a machine of the type that a curve was recorded on (torch, diffusers, what the CPU can do) all numbers must be the same to the last bit; on another one,
within the band of docs/recipes.md. One recipe at a time, minutes each, on one thread. A pass that is interrupted goes on where it was; one that came to its end
begins anew. Without names: all mini recipes that have a curve. The status is 1 if anything differs or could not be compared.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
from pathlib import Path

from benchmarks.one_thread import Failed
from benchmarks.verify.comparison import columns, compare, machine_type
from benchmarks.verify.running import run, source_digest
from diffusers_align.files.levels import curve_file, digest_of, inputs_of, level, read_curve, settings_digest
from diffusers_align.files.paths import names

RECORDABLE = ("differs", "no curve", "out of date")
FAILED = ("failed", *RECORDABLE)


def mini_recipes() -> list[str]:
    """The recipes of the embedded models, which run here."""
    return [name for name in names("recipes") if "_mini_" in name]


def begin(place: Path, key: str, say) -> None:
    """The folder of a pass: the one that was interrupted if it was of this code and this machine, otherwise an empty one."""
    state = place / "pass.json"
    if state.is_file() and json.loads(state.read_text()) != key:
        say(f"{place} holds an unfinished pass of other code or another machine: it begins anew.")
        shutil.rmtree(place)
    place.mkdir(parents=True, exist_ok=True)
    state.write_text(json.dumps(key))


def end(place: Path) -> None:
    """A pass that is over makes room for the next one; its logs and outputs stay beside it."""
    last = place.with_name("last")
    shutil.rmtree(last, ignore_errors=True)
    place.rename(last)


def outcome(recipe: str, rows: list[dict], record: bool) -> dict:
    """What a finished run says: `status` and the lines that explain it; the curve is written where it was asked for, or where this type of machine is new."""
    found, curve, machine = columns(rows), read_curve(recipe), machine_type()
    fresh = {"settings": settings_digest(recipe), "inputs": inputs_of(recipe), "machine": machine, "metrics": found, "reproduced": {}}
    current = curve is not None and all(curve[name] == fresh[name] for name in ("settings", "inputs"))
    if not current or (record and curve["metrics"] != found):
        if record:
            write(recipe, fresh)
            told = [] if curve is None else [f"{difference.metric} {difference.what}" for difference in compare(curve["metrics"], found)]
            return {"status": "recorded", "lines": [f"{curve_file(recipe)} is new: run the recipe again without --record, and commit it.", *told[:5]]}
        if curve is None:
            return {"status": "no curve", "lines": ["--record writes one."]}
        changed = [name for name, digest in fresh["inputs"].items() if curve["inputs"].get(name) != digest]
        what = "the recipe's settings" if curve["settings"] != fresh["settings"] else ", ".join(changed) or "its inputs"
        return {"status": "out of date", "lines": [f"{what} changed since the curve was recorded. --record writes it anew."]}
    differences = compare(curve["metrics"], found)
    same_type, worst = machine == curve["machine"], max((difference.share for difference in differences), default=0.0)
    lines = [f"{difference.metric} {difference.what}" for difference in differences]
    if differences and (same_type or worst > 1):
        told = "within the band all the same" if worst <= 1 else "outside the band"
        return {"status": "differs", "lines": [f"Recorded on {'this type of machine' if same_type else shown(curve['machine'])}; {told}.", *lines]}
    marked = mark(recipe, curve, machine)
    status = "bit for bit" if not differences else f"within the band ({worst:.0%} of it used)"
    return {"status": status, "lines": ([f"{curve_file(recipe)} says so now: commit it."] if marked else []) + lines[:3]}


def shown(machine: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def mark(recipe: str, curve: dict, machine: dict) -> bool:
    """Write into the curve's file that it was reproduced on this type of machine; False if that stands there."""
    digest = digest_of(curve["metrics"])
    before = curve["reproduced"].get("machines", []) if curve["reproduced"].get("curve") == digest else []
    if machine in before:
        return False
    write(recipe, {**curve, "reproduced": {"curve": digest, "machines": [*before, machine]}})
    return True


def write(recipe: str, curve: dict) -> None:
    """The curve's file: a line a metric."""
    metrics = ",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in curve["metrics"].items())
    others = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in curve.items() if name != "metrics")
    curve_file(recipe).parent.mkdir(exist_ok=True)
    curve_file(recipe).write_text(f'{{\n{others},\n "metrics": {{\n{metrics}\n }}\n}}\n', encoding="utf-8")


def verify(recipe: str, place: Path, record: bool, say) -> dict:
    """The outcome of one recipe, from the pass that is under way if it is known there: a curve is never compared with the run that it was recorded from."""
    kept, rows = place / "outcomes" / f"{recipe}.json", place / "outcomes" / f"{recipe}.rows.json"
    found = json.loads(kept.read_text()) if kept.is_file() else None
    if found and not (record and found["status"] in RECORDABLE):
        return found
    try:
        if found is None:
            logged = run(recipe, place, say)
            kept.parent.mkdir(exist_ok=True)
            rows.write_text(json.dumps(logged))
        found = outcome(recipe, json.loads(rows.read_text()), record)
    except Failed as error:
        return {"status": "failed", "lines": str(error).splitlines()}  # not kept: the next try goes on from its checkpoint
    kept.write_text(json.dumps(found))
    return found


def asked_for(given: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """The recipes to run: those given, or all mini ones with a curve."""
    if unknown := sorted(set(given) - set(mini_recipes())):
        parser.error(f"no mini recipe {', '.join(unknown)}: there are {', '.join(mini_recipes())}")
    if given:
        return given
    with_curve = [name for name in mini_recipes() if read_curve(name) is not None]
    if not with_curve:
        parser.error("no mini recipe has a curve yet: name the recipes to record, with --record")
    if without := sorted(set(mini_recipes()) - set(with_curve)):
        print(f"Without a curve, so not run: {', '.join(without)}", flush=True)
    return with_curve


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.verify", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", help="mini recipes; all that have a curve if absent")
    parser.add_argument("--record", action="store_true", help="write the curve where there is none of these settings and models, or where it differs")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/verify"), help="of the pass that is under way, and of the last one")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a run is ended in order

    def say(text: str) -> None:
        print(text, flush=True)

    recipes, place = asked_for(args.recipes, parser), args.output_dir.resolve() / "pass"
    begin(place, digest_of([source_digest(), machine_type()]), say)
    found = {}
    try:
        for number, recipe in enumerate(recipes, 1):
            say(f"{recipe} ({number} of {len(recipes)})")
            found[recipe] = verify(recipe, place, args.record, say)
            say("\n".join([f"{recipe}: {found[recipe]['status']}", *(f"    {line}" for line in found[recipe]["lines"])]))
    except KeyboardInterrupt:
        say("Interrupted: the same command goes on from here.")
        raise SystemExit(130) from None
    say("\n" + "\n".join(f"{recipe:32s} {entry['status']:28s} level: {level(recipe)}" for recipe, entry in found.items()))
    failed = [recipe for recipe, entry in found.items() if entry["status"] in FAILED]
    if not any(entry["status"] == "failed" for entry in found.values()):
        end(place)
    raise SystemExit(f"{len(failed)} of {len(found)} recipes did not pass: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
