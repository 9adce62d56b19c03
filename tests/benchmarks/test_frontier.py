"""The frontier: data with known labels, settings that scripts take, results that survive kills, tables that compare with controls."""

import json
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from flag_tools import load_script
from PIL import Image

from benchmarks.frontier import __main__ as frontier
from benchmarks.frontier import controls, data, running
from benchmarks.frontier.methods import CONTROL, METHODS, STOPPED, TRIED, TUNED_AS, grid, settings
from benchmarks.frontier.picture import draw
from benchmarks.frontier.results import Results
from benchmarks.frontier.samples import sheet
from benchmarks.frontier.summary import summary
from benchmarks.frontier.table import Number, against_controls, groups, over_seeds, page, verdict
from benchmarks.frontier.tasks import LIKES, PAIRS, SCORES, TASKS, flags_of, fresh_prompts, load_by_name
from benchmarks.frontier.work import Run, of_recipes, of_today, settings_digest
from benchmarks.one_thread import Failed
from diffusers_align.embedded.scenes import parse
from diffusers_align.files.paths import names

# tasks and data


def test_fresh_prompts_are_different_scenes_and_no_held_out_ones():
    first = fresh_prompts(20, 1, set())
    assert len(set(first)) == 20 and all("object" in parse(prompt) for prompt in first)
    assert not set(fresh_prompts(20, 1, set(first[:5]))) & set(first[:5])
    with pytest.raises(ValueError, match="only .* captions"):
        fresh_prompts(3, 1, type("All", (), {"__contains__": lambda self, item: True, "__len__": lambda self: 7})())


def test_rewards_go_by_name_and_model():
    assert flags_of("clip_score@mini-clip", "eval_") == {"eval_reward": "clip_score", "eval_reward_model": "mini-clip"}
    assert load_by_name("scene_score@scene-classifier")(torch.rand(1, 3, 32, 32), ["a cat"])["reward"].shape == (1,)


def test_best_and_worst_of_a_prompt_are_pairs():
    rows = [{"prompt": "a", "image": f"{i}", "reward": float(i), "background": "blue"} for i in range(5)] + [{"prompt": "b", "image": "x", "reward": 0.0}] * 2
    pairs = data.best_and_worst(rows, 4)
    assert [(row["image_0"], row["image_1"]) for row in pairs] == [("4", "0"), ("3", "1")], "the middle one and ties are in none"
    assert pairs[0] == {"prompt": "a", "background": "blue", "image_0": "4", "image_1": "0", "label_0": 1.0}
    assert data.best_and_worst(rows, 4, apart=2.0) == pairs[:1] and data.best_and_worst(rows, 4, apart=4.0) == []


def test_a_known_share_of_the_labels_is_wrong():
    rng = random.Random(0)
    pairs, likes = [{"label_0": 1.0}] * 200, [{"label": bool(i % 2)} for i in range(200)]
    assert Counter(row["label_0"] for row in data.with_wrong_labels(pairs, PAIRS, 0.1, rng)) == {1.0: 180, 0.0: 20}
    assert sum(a != b for a, b in zip(likes, data.with_wrong_labels(likes, LIKES, 0.1, rng))) == 20
    scores = [{"reward": float(i)} for i in range(200)]
    shuffled = data.with_wrong_labels(scores, SCORES, 0.5, rng)
    assert sorted(row["reward"] for row in shuffled) == [row["reward"] for row in scores] and sum(a == b for a, b in zip(scores, shuffled)) < 10
    assert data.with_wrong_labels(scores, SCORES, 0.0, rng) == scores
    with pytest.raises(ValueError, match="between 0 and 0.5"):
        data.with_wrong_labels(pairs, PAIRS, 0.6, rng)


def test_swapped_pairs_differ_in_the_object_alone(tmp_path):
    rows = data.swapped_pairs(tmp_path / "images", 3)
    score = load_by_name("scene_score")
    for row in rows:
        shown = [data_image(tmp_path, row[name]) for name in ("image_0", "image_1")]
        right, wrong = (score(image[None], [row["prompt"]])["object"] for image in shown)
        assert right > 0.5 > wrong
        assert (shown[0] == shown[1]).all(0).float().mean() > 0.2, "the same background around the object"


def data_image(folder, name):
    with Image.open(folder / "images" / name.rpartition("/")[2]) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def test_a_random_reward_belongs_to_the_image():
    images = torch.rand(50, 3, 4, 4)
    first = controls.random_reward(images, [""] * 50)
    assert torch.equal(first, controls.random_reward(images.clone(), [""] * 50)) and 0.3 < first.mean() < 0.7 and len(set(first.tolist())) == 50


# methods


@pytest.mark.parametrize("model", ["mini-sd3", "mini-sd"])
@pytest.mark.parametrize("name", list(METHODS))
def test_the_script_takes_the_settings_of_every_method(name, model, tmp_path):
    method = METHODS[name]
    for task in (task for task in TASKS.values() if method.applies(task, model)):
        found = settings(method, task, model, "mini_train", grid(method)[0]) | {"output_dir": "out", **running.UNWATCHED, "seed": 3, "num_epochs": 2}
        found |= {"dataset_name": "data"} if method.data else {}
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump(found))
        args = load_script(method.script).parse_args(["--config", str(tmp_path / "settings.yaml")])
        schedule = "constant" if method.settings.get("update") == "trpo" else "linear"
        assert (args.pretrained_model_name_or_path, args.lr_scheduler, args.seed) == (model, schedule, 3)
        for key, factor in zip(method.tuned.values(), grid(method)[0].values()):
            assert getattr(args, key) == pytest.approx(factor * settings(method, task, model, "mini_train", {})[key]), "the search moves what the script reads"


def test_every_training_script_has_a_row():
    scripts = {name for name in names("training_scripts") if name.startswith("train_")}
    assert scripts - {method.script for method in METHODS.values()} == {"train_reward", "train_vader", "train_value_steering"}, "docs/frontier.md says why"


def test_every_task_has_its_controls():
    for name, task in TASKS.items():
        found = {control for control in TUNED_AS if METHODS[control].applies(task, "mini-sd3")}
        assert "plain fine-tuning" in found and ("random reward" in found) is task.online
        assert ("DPO, shuffled" in found) is (PAIRS in task.kinds), name
        assert ("DPO, pairs apart" in found) is (PAIRS in task.kinds and task.data == "own"), "pairs of scenes have no rewards"


def test_every_method_has_the_same_search():
    factors = {name: len(grid(method)) for name, method in METHODS.items()}
    assert {factors.pop(name) for name, method in METHODS.items() if method.settings.get("update") == "trpo"} == {2}, "it has no learning rate"
    assert set(factors.values()) == {3, 6} and all((number == 6) is (METHODS[name].strength is not None) for name, number in factors.items())
    assert set(TUNED_AS) == {name for name, method in METHODS.items() if method.route == CONTROL or method.apart} | set(STOPPED) | set(TRIED)


def test_a_run_that_may_end_early_is_watched_and_the_others_are_not(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(running, "run_script", lambda script, found, folder, resume=False: seen.update(found))
    monkeypatch.setattr(running, "spent", lambda folder: running.Spent(1000 * seen["num_epochs"], 500, 4, 48, 1.0))
    for name in ("ReFL", "ReFL, stopped"):
        found = settings(METHODS[name], TASKS["color"], "mini-sd3", "mini_train", {})
        running.train("train_refl", found, 16000, tmp_path / name, tmp_path / "probes")
        watched = name == "ReFL, stopped"
        assert (seen["num_epochs"], seen["checkpointing_epochs"], seen["validation_epochs"]) == (16, 2, 2 if watched else 10**6)
        assert seen["num_eval_samples"] == (48 if watched else 2) and seen.get("early_stop_hacking") == (3.0 if watched else None)
        assert seen.get("eval_reward") == ("scene_judge" if watched else None), "neither what is trained on nor what fills the tables"


@pytest.mark.parametrize(("before", "epochs"), [(0, 16), (3000, 13), (30000, 1)])
def test_what_comes_once_before_the_epochs_is_part_of_the_budget(before, epochs, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(running, "run_script", lambda script, found, folder, resume=False: seen.update(found))
    monkeypatch.setattr(running, "spent", lambda folder: running.Spent(before + 1000 * seen["num_epochs"], 500, 4, 48, 1.0))
    spent = running.train("train_dense_grpo", {"learning_rate": 1e-3}, 16000, tmp_path / "run", tmp_path / "probes")
    assert seen["num_epochs"] == epochs and spent.rows == before + 1000 * epochs


# results


ROW = {"task": "color", "model": "mini-sd3", "method": "Flow-GRPO", "route": "online RL", "budget": 2000, "seed": 0, "guidance": 3.0, "judge": "scene_score"}
ROW |= {
    "images": 192,
    "weights": "w",
    "settings": "s",
    "tuned": True,
    "factors": {},
    "rows": 2100,
    "updates": 4,
    "distinct": 192,
    "processor_seconds": 20.0,
    "rows_an_image": 24.0,
    "gap": 0.5,
}


def row(gain=0.1, error=0.01, **changes):
    numbers = {name: {"mean": gain, "se": error} for name in ("reward", "judged", "reward_gain", "judge_gain", "kl", "diversity")}
    return {**ROW, **numbers, **changes}


def test_results_survive_a_torn_line_and_tell_weights_apart(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    results.add(row(kl={"mean": float("nan"), "se": 0.0}))
    with results.path.open("a") as file:
        file.write('{"task": "col')
    again = Results(results.path)
    assert row() in again and len(again.all()) == 1 and row(weights="other") not in again and row(seed=1) not in again
    assert row(settings="other") not in again
    again.add(row(seed=1))
    assert len(Results(results.path).all()) == 2 and again.all()[0]["kl"]["mean"] is None


def controlled(gain, control):
    """A method over three seeds beside a control."""
    rows = [row(gain + 0.01 * seed, seed=seed) for seed in range(3)]
    rows += [row(control + 0.01 * seed, seed=seed, method="plain fine-tuning", route=CONTROL) for seed in range(3)]
    (found,) = groups([*rows, row(0.0, method="base", budget=0), row(0.9, method="real scenes", route=CONTROL, budget=2000)]).values()
    return against_controls(found, ("Flow-GRPO", 2000))


def test_the_summary_says_who_beats_the_controls():
    def seeds(gain, name, **changes):
        return [row(gain + 0.01 * seed, seed=seed, method=name, **changes) for seed in range(3)]

    rows = [*seeds(0.3, "AWM"), *seeds(0.5, "Flow-GRPO"), *seeds(0.0, "SPO"), *seeds(0.1, "RWR", route="data")]
    rows += [
        *seeds(0.1, "plain fine-tuning", route=CONTROL),
        *seeds(0.9, "Flow-GRPO", budget=500),
        row(0.7, method="DRTune"),
        row(0.9, method="AWM", budget=9000),
    ]
    lines = summary(rows).splitlines()[2:]
    where = "| `color`, mini-sd3 | 3 |"
    assert lines == [f"{where} online RL | Flow-GRPO +0.510, AWM +0.310 |  | SPO +0.010 | DRTune +0.700 |", f"{where} data |  | RWR +0.110 |  |  |"]
    assert summary([row()]) == ""
    alone = [*seeds(0.8, "AWM", budget=32000), *rows]  # without a control of its budget
    assert summary(alone).splitlines()[2:] == lines
    told = next(line for line in page(alone).splitlines() if line.startswith("| AWM") and "+0.810" in line)
    assert "| no control of this budget |" in told and "wins" not in told


def test_rows_of_other_numbers_than_todays_are_not_shown():
    def of(factors, name="Flow-GRPO"):
        return row(method=name, settings=settings_digest(Run("color", "mini-sd3", name, 8000, 0, factors)), tuned=False, factors=factors)

    bare, recipes, tripled, base = of({}), of({"learning_rate": 1.0, "strength": 1.0}), of({"learning_rate": 3.0}), row(method="base", settings="", tuned=False)
    assert bare["settings"] == recipes["settings"] != tripled["settings"]
    assert of_today([bare, tripled, {**bare, "settings": "another"}, base], {}) == [bare, base], "without a search, the recipe's"

    found = {"color/mini-sd3/Flow-GRPO": {"learning_rate": 3.0}}
    assert of_today([bare, tripled, base], found) == [{**tripled, "tuned": True}, base], "a search puts its numbers in their place"
    chosen = {"color/mini-sd3/Flow-GRPO": {"learning_rate": 1.0, "strength": 1.0}}
    assert of_today([bare], chosen) == [{**bare, "tuned": True, "factors": chosen["color/mini-sd3/Flow-GRPO"]}], "it may have chosen the recipe's own"
    control = of({"learning_rate": 3.0}, "random reward")
    assert of_today([control, of({}, "random reward")], found) == [{**control, "tuned": True}], "a control follows its method"


def test_what_a_search_has_put_aside_is_kept_by_itself():
    def of(factors, name="Flow-GRPO", **more):
        return row(method=name, settings=settings_digest(Run("color", "mini-sd3", name, 8000, 0, factors)), tuned=False, factors=factors, **more)

    bare, tripled, other, base = of({}), of({"learning_rate": 3.0}), of({}, "AWM"), row(method="base", settings="", tuned=False, budget=0)
    elsewhere = {**base, "guidance": 1.0}
    found = {"color/mini-sd3/Flow-GRPO": {"learning_rate": 3.0}}
    assert of_recipes([bare, tripled, other, base, elsewhere], found) == [base, {**bare, "tuned": True}]
    assert of_recipes([bare, other, base], {}) == [] and of_recipes([bare, base], {"color/mini-sd3/Flow-GRPO": {"learning_rate": 1.0}}) == []
    assert "## color, mini-sd3, guidance 3, before" in page([base, {**bare, "tuned": True}], ", before")


def test_no_mean_is_over_two_settings():
    (found,) = groups([row(0.5, settings="before"), row(0.1, seed=0), row(0.3, seed=1)]).values()
    assert over_seeds(found["Flow-GRPO", 2000], "reward_gain").mean == pytest.approx(0.2)


def test_a_win_is_one_over_the_best_control():
    assert verdict(controlled(0.3, 0.1)) == "wins"
    assert verdict(controlled(0.1, 0.1)) == "even" and verdict(controlled(0.05, 0.2)) == "loses"
    assert controlled(0.3, -0.2).mean == pytest.approx(0.31), "the base is a control of gain 0; real scenes are a bound and none"
    assert verdict(Number(0.3, float("nan"))) == "no error known"


def test_errors_are_of_the_images_and_of_the_seeds():
    assert over_seeds([row(0.1), row(0.3)], "reward_gain") == Number(pytest.approx(0.2), pytest.approx((0.1**2 + 0.01**2) ** 0.5))
    same = over_seeds([row(0.1, 0.03)] * 3, "reward_gain")
    assert same == Number(pytest.approx(0.1), pytest.approx(0.03)), "seeds that agree share their images' error"
    assert math.isnan(over_seeds([row()], "rows").error) and over_seeds([row(rows=2), row(rows=4)], "rows").error == pytest.approx(1.0)
    assert over_seeds([row(0.1, 0.07)], "reward_gain") == Number(0.1, 0.07)


def test_tables_and_pictures_are_made_of_the_rows(tmp_path):
    rows = [row(0.1 * budget + 0.002 * (seed - 0.5), seed=seed, budget=budget, tuned=False) for budget in (1, 2) for seed in (0, 1)]
    rows += [
        row(0.0, method="base", route="base", budget=0, tuned=False),
        row(0.5, method="real scenes", route=CONTROL, budget=0, kl={"mean": None, "se": None}),
    ]
    text = page(rows)
    assert "## color, mini-sd3, guidance 3" in text and "| Flow-GRPO* | 2 | 2,100 | 4 | 192 | 20 | +0.200" in text and "search was not run" in text
    assert "No control was trained" in text and ", wins |" in text
    assert ", one seed |" in page([row()]) and "Trained controls: random reward." in page([row(), row(method="random reward", route=CONTROL)])
    assert text.index("| base |") < text.index("| real scenes |") < text.index("| Flow-GRPO* |")
    (path,) = draw(rows, tmp_path)
    with Image.open(path) as picture:
        drawn = np.array(picture.convert("RGB")).reshape(-1, 3)
    for color in ((31, 119, 180), (0, 0, 0)):
        assert (drawn == color).all(1).sum() > 50, "the method's curve, and the bound's line"
    assert "| 0.0005, kl_weight 0.1 |" in text and "| 0.0015, kl_weight 0.01 |" in page([row(factors={"learning_rate": 3.0, "strength": 0.1})])
    assert page([]) == "Nothing has been measured yet.\n"


def test_a_sheet_has_a_row_a_method_below_the_prompts(tmp_path):
    colors = {"base": [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)], "a method": [(0.0, 0.0, 1.0), (1.0, 1.0, 0.0)]}
    rows = {name: [torch.tensor(color).view(3, 1, 1).expand(3, 4, 4) for color in found] for name, found in colors.items()}
    sheet(rows, ["one", "two"]).savefig(tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    middle = {color: np.argwhere((pixels == [255 * part for part in color]).all(-1)).mean(0) for found in colors.values() for color in found}
    (red, green), (blue, yellow) = ([middle[color] for color in found] for found in colors.values())
    assert abs(red - green)[0] < 1 and abs(blue - yellow)[0] < 1 and red[0] < blue[0], "rows"
    assert abs(red - blue)[1] < 1 and abs(green - yellow)[1] < 1 and red[1] < green[1], "columns"


def test_the_published_page_is_that_of_the_committed_results():
    assert frontier.PAGE.read_text(encoding="utf-8") == frontier.published(), "run python -m benchmarks.frontier publish"


# the command


TINY = ["--images", "4", "--search_images", "4", "--kl", "2", "--budgets", "1", "--seeds", "0", "--guidance", "1", "--models", "mini-sd3"]


@pytest.fixture
def small(monkeypatch):
    """Trainings of seconds: a few samples an epoch and two steps each."""
    small = {"num_samples_per_epoch": 4, "train_batch_size": 4, "num_inference_steps": 2}

    def call(script, settings, folder, resume=False, real=running.run_script):
        fits = {name: value for name, value in small.items() if name in settings}
        real(script, settings | fits, folder, resume)

    monkeypatch.setattr(running, "run_script", call)
    monkeypatch.setattr("benchmarks.frontier.judging.STEPS", 2)
    monkeypatch.setattr("benchmarks.frontier.methods.FACTORS", {"learning_rate": (1.0,), "strength": (0.5,)})


@pytest.mark.long
def test_a_run_is_trained_judged_and_not_done_again(tmp_path, small, capsys):
    words = ["--tasks", "swaps", "--methods", "Diffusion-DPO", "best of 2", "real scenes", "--swaps", "6", "--output_dir", str(tmp_path), *TINY]
    frontier.main(["search", *words])
    frozen = json.loads((tmp_path / "frozen.json").read_text())
    assert set(frozen) == {"swaps/mini-sd3/Diffusion-DPO"} and len((tmp_path / "search.jsonl").read_text().splitlines()) == 1
    frontier.main(["run", *words])
    rows = {row["method"]: row for row in Results(tmp_path / "results.jsonl").all()}
    assert set(rows) == {"base", "real scenes", "best of 2", "Diffusion-DPO"}
    trained = rows["Diffusion-DPO"]
    assert trained["tuned"] and trained["factors"] == frozen["swaps/mini-sd3/Diffusion-DPO"]
    assert trained["rows"] > 0 and trained["updates"] > 0 and trained["distinct"] > 0 and trained["processor_seconds"] > 0 and trained["kl"]["mean"] > 0
    assert rows["base"]["reward_gain"]["mean"] == 0 and rows["base"]["kl"]["mean"] == 0 and rows["real scenes"]["reward"]["mean"] > 0.8
    assert (rows["base"]["rows_an_image"], rows["best of 2"]["rows_an_image"]) == (2, 4)
    capsys.readouterr()
    frontier.main(["run", *words])
    assert capsys.readouterr().out == "", "all of it is there"
    frontier.main(["report", *words])
    assert "| Diffusion-DPO |" in (tmp_path / "frontier.md").read_text() and (tmp_path / "frontier_swaps_mini-sd3_g1.png").is_file()
    frontier.main(["samples", *words])
    with Image.open(tmp_path / "frontier_swaps_mini-sd3_g1_samples.png") as image:
        assert image.height > image.width / 4, "two rows of four pictures: the base's and the method's"


def test_a_new_folder_may_begin_with_what_is_published(tmp_path, monkeypatch):
    monkeypatch.setattr(frontier, "PUBLISHED", tmp_path / "published")
    Results(tmp_path / "published" / "results.jsonl").add(row())
    (tmp_path / "published" / "frozen.json").write_text('{"color/mini-sd3/AWM": {}}')
    found = []
    monkeypatch.setattr(frontier.Work, "run", lambda work: found.append((work.results.all(), work.frozen())))
    for words in (["--from_published", "--output_dir", str(tmp_path / "on")], ["--output_dir", str(tmp_path / "anew")]):
        frontier.main(["run", *words])
    assert found == [(Results(tmp_path / "published" / "results.jsonl").all(), {"color/mini-sd3/AWM": {}}), ([], {})]
    Results(tmp_path / "on" / "results.jsonl").add(row(seed=1))
    frontier.main(["run", "--from_published", "--output_dir", str(tmp_path / "on")])
    assert len(found[-1][0]) == 2, "a folder with results keeps them"


@pytest.mark.slow
def test_a_failure_is_told_and_the_others_run(tmp_path, monkeypatch):
    def refuse(script, *args):
        raise Failed(f"{script} ended with status 1")

    monkeypatch.setattr("benchmarks.frontier.work.train", refuse)
    words = ["--tasks", "swaps", "--methods", "Diffusion-DPO", "--swaps", "6", "--output_dir", str(tmp_path), *TINY]
    with pytest.raises(SystemExit, match="1 failed; the same command tries them again"):
        frontier.main(["run", *words])
    assert [row["method"] for row in Results(tmp_path / "results.jsonl").all()] == ["base"]
