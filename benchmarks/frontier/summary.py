"""What the tables say in short: of each task, by route, which methods beat the controls, which are level with them and which lose."""

from __future__ import annotations

from collections import defaultdict

from benchmarks.frontier.methods import CONTROL
from benchmarks.frontier.table import against_controls, groups, over_seeds, verdict

HEAD = "| task | guidance | route | beat the controls | level with them | worse than they |\n|---|---|---|---|---|---|"
PLACES = {"wins": 0, "even": 1, "loses": 2}


def summary(rows: list[dict]) -> str:
    """A Markdown table of the largest budget of each task; of methods with one seed alone, which have no verdict, it says nothing.

    Returns:
        The empty text where no method has several seeds.
    """
    lines = []
    for (task, model, guidance, *_), found in sorted(groups(rows).items()):
        for route, places in verdicts(found).items():
            cells = [", ".join(names) for names in places]
            lines.append(f"| `{task}`, {model} | {guidance:g} | {route} | " + " | ".join(cells) + " |")
    return "\n".join([HEAD, *lines]) if lines else ""


def verdicts(rows: dict[tuple[str, int], list[dict]]) -> dict[str, tuple[list[str], list[str], list[str]]]:
    """The methods of one table by route: those that win, are even and lose, the largest gain first, each with its gain over the base."""
    trained = {key: entry for key, entry in rows.items() if key[1] and entry[0]["route"] != CONTROL and len(entry) > 1}
    largest = {name: max(budget for other, budget in trained if other == name) for name, _ in trained}
    found: dict[str, tuple[list[str], list[str], list[str]]] = defaultdict(lambda: ([], [], []))
    for name, budget in sorted(largest.items(), key=lambda item: -over_seeds(trained[item], "reward_gain").mean):
        said = verdict(against_controls(rows, (name, budget)))
        if said in PLACES:
            gain = over_seeds(trained[name, budget], "reward_gain").mean
            found[trained[name, budget][0]["route"]][PLACES[said]].append(f"{name} {gain:+.3f}")
    return dict(found)
