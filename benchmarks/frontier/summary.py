"""What the tables say in short: of each task, by route, which methods beat the controls, which are level with them and which lose."""

from __future__ import annotations

from collections import defaultdict

from benchmarks.frontier.methods import CONTROL
from benchmarks.frontier.table import against_controls, groups, is_controlled, over_seeds, verdict

HEAD = "| task | guidance | route | beat the controls | level with them | worse than they | no verdict: one seed |\n|---|---|---|---|---|---|---|"
PLACES, ONE_SEED = {"wins": 0, "even": 1, "loses": 2}, 3


def summary(rows: list[dict]) -> str:
    """A Markdown table of the largest budget of each task that has trained controls.

    Returns:
        The empty text where no method has several seeds.
    """
    lines, known = [], False
    for (task, model, guidance, *_), found in sorted(groups(rows).items()):
        for route, places in verdicts(found).items():
            known = known or any(places[:ONE_SEED])
            cells = [", ".join(names) for names in places]
            lines.append(f"| `{task}`, {model} | {guidance:g} | {route} | " + " | ".join(cells) + " |")
    return "\n".join([HEAD, *lines]) if known else ""


def verdicts(rows: dict[tuple[str, int], list[dict]]) -> dict[str, tuple[list[str], ...]]:
    """The methods of one table by route: those that win, are even and lose, and those with one seed, the largest gain first, each with its gain over the
    base."""
    trained = {key: entry for key, entry in rows.items() if key[1] and entry[0]["route"] != CONTROL and is_controlled(rows, key[1])}
    several = {name for (name, _), entry in trained.items() if len(entry) > 1}
    counted = {key: entry for key, entry in trained.items() if len(entry) > 1 or key[0] not in several}
    largest = {name: max(budget for other, budget in counted if other == name) for name, _ in counted}
    found: dict[str, tuple[list[str], ...]] = defaultdict(lambda: ([], [], [], []))
    for name, budget in sorted(largest.items(), key=lambda item: -over_seeds(counted[item], "reward_gain").mean):
        entry = counted[name, budget]
        place = PLACES.get(verdict(against_controls(rows, (name, budget)))) if len(entry) > 1 else ONE_SEED
        if place is not None:
            found[entry[0]["route"]][place].append(f"{name} {over_seeds(entry, 'reward_gain').mean:+.3f}")
    return dict(found)
