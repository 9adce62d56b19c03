"""Writes docs/algorithms/*.md, one page per algorithm, from what the repository says of it already, and the table of docs/recipes.md.

    python docs/generate.py

A page is its module's docstring (idea, objective, differences, logged numbers), then how to run it, its recipes, the rows of
docs/frontier.md and benchmarks/README.md that name it, its picture, and its functions. `PAGES` says which script, recipes, rows and picture belong to which
algorithm. The pages are committed, so that they can be read without building the site; a test compares them with this script's output.
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from diffusers_align.files.levels import LEVELS, level, made_by, script_of

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
MODULES = ROOT / "diffusers_align" / "algorithms"
RECIPES = ROOT / "training_scripts" / "recipes"
MARK = "<!-- The table is written by docs/generate.py. -->"

COMPUTE = ("inference_time.png", "reward against compute of the methods that train nothing")


@dataclass(frozen=True)
class Page:
    """What belongs to an algorithm.

    Attributes:
        script: the training script, without `.py`.
        recipes: names of its recipes; the first one is run in the command.
        flags: what the command adds to that recipe.
        pipeline: of `pipelines/`, where nothing is trained; `call` and `load` are arguments of the example, `quick` what its test replaces.
        rows: first cells of its rows in docs/frontier.md and benchmarks/README.md.
        picture: a file of docs/ and what it shows.
        note: a sentence of its own.
    """

    script: str = ""
    recipes: tuple[str, ...] = ()
    flags: str = ""
    pipeline: str = ""
    call: str = ""
    load: str = 'reward="scene_score"'
    quick: str = "num_inference_steps=2"
    rows: tuple[str, ...] = ()
    picture: tuple[str, str] | None = None
    note: str = ""


PAGES = {
    "adjoint_matching": Page(
        "train_adjoint_matching",
        ("adjoint_matching_mini_sd3", "adjoint_matching_mini_sd", "adjoint_matching_sd35"),
        rows=("Adjoint Matching",),
    ),
    "advantage_weighted_matching": Page("train_awm", ("awm_mini_sd3", "awm_sd35"), rows=("AWM",)),
    "alignprop": Page("train_alignprop", ("alignprop_mini_sd", "alignprop_sd15"), rows=("AlignProp", "AlignProp, stopped")),
    "best_of_n": Page(
        pipeline="best_of_n", call="num_candidates=8", rows=("stock (best of 1)", "best of 2", "best of 4", "best of 8", "zero-order, 2 x 4"), picture=COMPUTE
    ),
    "continuous_adjoint": Page("train_draft", ("draft_mini_sd3",), flags="--adjoint"),
    "d3po": Page("train_d3po", ("d3po_mini_sd3", "d3po_sd15"), rows=("D3PO",)),
    "dance_grpo": Page("train_flow_grpo", ("flow_grpo_dance_mini_sd3", "flow_grpo_dance_flux"), rows=("DanceGRPO",)),
    "ddpo": Page(
        "train_ddpo",
        ("ddpo_mini_sd", "ddpo_sd15"),
        rows=("DDPO-IS", "DDPO-IS, noise in five steps", "TRPO", "TRPO, noise in two steps"),
        picture=("ddpo_before_after.png", "mini-sd before and after `make demo-ddpo`, at equal prompts and seeds"),
        note="`--update trpo` replaces the clipped steps by natural-gradient steps with a line search on the exact KL (`diffusers_align.rl.trust_region`). Its "
        "radius is shared by the steps with noise: 20 nats on two of them broke the pictures in three of four runs, on five in none. With the recipe above add "
        "`--sde_window 0 5`.",
    ),
    "dense_grpo": Page("train_dense_grpo", ("dense_grpo_mini_sd3", "dense_grpo_sd35"), rows=("DenseGRPO",)),
    "diffusion_dpo": Page(
        "train_dpo",
        ("dpo_mini_sd3", "dpo_sd15", "dpo_sdxl", "dpo_sd35", "dpo_flux"),
        rows=("Diffusion-DPO", "Diffusion-DPO, stopped", "DPO, safeguard"),
        note="[Why is my loss 0.69?](../why_is_my_loss_069.md) says what to expect of the first epochs, [Preference data](../preference_data.md) "
        "what the data may look like.",
    ),
    "diffusion_kto": Page("train_kto", ("kto_mini_sd3", "kto_sd15"), rows=("Diffusion-KTO",)),
    "diffusion_nft": Page("train_nft", ("nft_mini_sd3", "nft_sd35"), rows=("DiffusionNFT",)),
    "diffusion_sdpo": Page("train_dpo", ("dpo_mini_sd3", "dpo_sdxl"), flags="--safeguard_mu 0.6", rows=("DPO, safeguard",)),
    "discrete_adjoint_matching": Page(note="It is for models over tokens and has no script: its functions are for your own loop."),
    "dpok": Page("train_dpok", ("dpok_mini_sd", "dpok_sd15"), rows=("DPOK", "DPOK, noise in five steps")),
    "draft": Page("train_draft", ("draft_mini_sd3", "draft_sd15", "draft_sd35"), rows=("DRaFT-1", "DRaFT-3", "DRaFT", "DRaFT-LV")),
    "drtune": Page("train_draft", ("draft_mini_sd3",), flags="--method drtune --num_trained_steps 3", rows=("DRTune", "DRTune, stopped")),
    "dspo": Page("train_dspo", ("dspo_mini_sd3", "dspo_sd15", "dspo_sdxl"), rows=("DSPO",)),
    "flow_cps": Page("train_flow_grpo", ("flow_grpo_cps_mini_sd3", "flow_grpo_cps_sd35"), rows=("Flow-CPS",)),
    "flow_grpo": Page(
        "train_flow_grpo",
        ("flow_grpo_mini_sd3", "flow_grpo_edit_mini_sd3", "flow_grpo_sd35", "flow_grpo_flux"),
        rows=("Flow-GRPO", "Flow-GRPO, own latents", "Flow-GRPO, noise in five steps", "Flow-GRPO, own latents, noise in five steps"),
        picture=("demo_before_after.png", "mini-sd3 before and after `make demo`, at equal prompts and seeds"),
    ),
    "grpo_guard": Page("train_flow_grpo", ("flow_grpo_guard_mini_sd3", "flow_grpo_guard_sd35"), rows=("GRPO-Guard",)),
    "guidance": Page(
        pipeline="reward_guided",
        call='preset="mpgd"',
        rows=("dps, 10", "mpgd, 0.2", "freedom, 0.2", "tfg, 4", "flowchef, 4", "universal, 2"),
        picture=("inference_time_samples.png", "stock samples, universal guidance, best of 8 and particle steering, at equal prompts and seeds"),
    ),
    "inpo": Page("train_dpo", ("dpo_mini_sd3",), flags="--inversion_steps 2", rows=("InPO",)),
    "linear_dpo": Page(
        "train_dpo",
        ("dpo_mini_sd3", "dpo_linear_sd15", "dpo_linear_sdxl", "dpo_linear_sd35"),
        flags="--loss linear --sft_weight 0",
        rows=("Linear-DPO",),
    ),
    "mapo": Page("train_dpo", ("dpo_mini_sd3", "dpo_mapo_sdxl"), flags="--loss mapo --beta 0.1 --sft_weight 0", rows=("MaPO",)),
    "mix_grpo": Page("train_flow_grpo", ("flow_grpo_mix_mini_sd3", "flow_grpo_mix_flux"), rows=("MixGRPO",)),
    "mv_grpo": Page("train_mv_grpo", ("mv_grpo_mini_sd3", "mv_grpo_flux"), rows=("MV-GRPO",)),
    "noise_optimization": Page(
        pipeline="noise_optimization",
        call='optimizer="sgd", num_iterations=10',
        quick="num_inference_steps=2 num_iterations=1",
        rows=("ReNO, 10 iterations", "D-Flow, 5 iterations"),
        picture=COMPUTE,
    ),
    "particle_steering": Page(
        pipeline="particle_steering",
        call="num_particles=8, reward_scale=10.0",
        rows=("SDE twin, 1 particle", "bootstrap, 4 particles", "bootstrap, 8 particles", "twisted, 4 particles", "twisted, 8 particles"),
        picture=COMPUTE,
    ),
    "preference_flow_matching": Page(
        "train_pfm",
        ("pfm_likes_blue_mini_sd", "pfm_scene_score_mini_sd"),
        picture=("pfm_before_after.png", "pictures of mini-sd, and what the flow makes of them"),
        note="It needs pictures alone, so the generator may be a closed API. [Figures](../../benchmarks/README.md#preference-flow-matching-python-"
        "benchmarkspreference_flowpy---task-likes_blue-scene_score-variations) say what was won and what was lost.",
    ),
    "refl": Page("train_refl", ("refl_mini_sd3", "refl_sd15"), rows=("ReFL", "ReFL, stopped")),
    "reinforce": Page("train_ddpo", ("ddpo_mini_sd",), flags="--estimator sf", rows=("DDPO-SF", "DDPO-SF, noise in five steps")),
    "reward_weighted_regression": Page("train_rwr", ("rwr_mini_sd3", "rwr_sd15"), rows=("RWR",)),
    "spo": Page("train_spo", ("spo_mini_sd3", "spo_sd15", "spo_sdxl"), rows=("SPO",)),
    "srpo": Page("train_draft", ("draft_mini_sd3",), flags="--method srpo"),
    "svdd": Page(pipeline="particle_steering", call='method="svdd", num_particles=8', rows=("SVDD, 8 candidates",), picture=COMPUTE),
    "value_steering": Page(
        "train_value_steering",
        ("value_steering_mini_sd",),
        note="[Figures](../../benchmarks/README.md#value-steering-python-benchmarksvalue_steeringpy) compare it with best-of-n and SVDD at equal denoiser "
        "calls. [RL libraries](../guides/rl_libraries.md) learn on the same decision process.",
    ),
    "vader": Page(
        "train_vader", ("vader_wan",), note="No video model is embedded, so no learning curve was measured; tests compare its gradients with autograd."
    ),
}


# the module's own page


def described(name: str) -> tuple[str, str]:
    """Title and text of a module's docstring, in Markdown."""
    page = ast.get_docstring(ast.parse((MODULES / f"{name}.py").read_text(encoding="utf-8")))
    opening, _, text = page.partition("\n\n")
    opening, source = " ".join(opening.split()), re.search(r" \(([^()]*https://[^()]*)\)", opening.replace("\n", " "))
    title, _, rest = (opening.replace(source.group(), "") if source else opening).removesuffix(".").partition(". ")
    text = "".join(f"{part}.\n\n" for part in (f"Source: {source.group(1)}" if source else "", rest) if part) + text
    text = re.sub(r"^\$\$ *(.*?) *\$\$$", r"```math\n\1\n```", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^(Logged|Reported|Returned|Against the official code)\b", r"**\1**", text, flags=re.MULTILINE)
    others = "|".join(sorted(set(PAGES) - {name}, key=len, reverse=True))
    text = re.sub(rf"`({others})`", r"[`\1`](\1.md)", text)
    return title, text


def public_names(name: str) -> list[str]:
    """Public functions and classes of a module, in their order."""
    tree = ast.parse((MODULES / f"{name}.py").read_text(encoding="utf-8"))
    return [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")]


# how it is run


def comment_of(recipe: str) -> list[str]:
    """The comment lines among the first twelve of a recipe: what it is, and how its data are made."""
    lines = (RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()
    return [line[2:] for line in lines[:12] if line.startswith("# ")]


def commands_for(recipe: str) -> list[str]:
    """The commands that make a recipe's data, where its comment has some."""
    return [" \\\n    ".join(command) for command in made_by(recipe)]


def run_section(page: Page) -> str:
    if page.pipeline:
        return example(page)
    if not page.script:
        return ""
    recipe = page.recipes[0]
    command = f"accelerate launch training_scripts/{page.script}.py --config training_scripts/recipes/{recipe}.yaml"
    if page.flags:
        command += f" \\\n    {page.flags} --output_dir runs/{page.script.removeprefix('train_')}_variant"
    commands = "\n".join([*commands_for(recipe), command])
    table = ["| recipe | model | [level](../recipes.md) | what it is |", "|---|---|---|---|"]
    for name in page.recipes:
        table.append(f"| [`{name}`](../../training_scripts/recipes/{name}.yaml) | `{model_of(name)}` | {level(name)} | {first_sentence(name)} |")
    script = f"Script: [`training_scripts/{page.script}.py`](../../training_scripts/{page.script}.py); `--help` explains its flags."
    return f"## Run it\n\n```bash\n{commands}\n```\n\n{script}\n\n" + "\n".join(table) + "\n\n"


def model_of(recipe: str) -> str:
    return yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text(encoding="utf-8"))["pretrained_model_name_or_path"]


def first_sentence(recipe: str) -> str:
    text = " ".join(comment_of(recipe))
    return re.match(r"(.*?[^.][.:])(?= [A-Z(]|$)|.*", text).group(0).rstrip(":.") + "."


def example(page: Page) -> str:
    return f"""## Run it

<!-- run: {page.quick} -->
```python
from diffusers import DiffusionPipeline
from diffusers_align import embedded, pipelines

pipe = DiffusionPipeline.from_pretrained(
    embedded.path("mini-sd3"),  # or any model of the Hub
    custom_pipeline=pipelines.path("{page.pipeline}"),
    trust_remote_code=True,  # diffusers asks for it with every custom pipeline
    {page.load},
)
out = pipe("two dogs on a blue background", {page.call}, num_inference_steps=10, max_sequence_length=1)
out.images[0].save("two_dogs.png")
print(out.rewards)
```

Pipeline: [`pipelines/{page.pipeline}.py`](../../pipelines/README.md), with every argument of the stock pipeline's call besides its own.

"""


# what was measured


# Rows that a method's own stands beside, where a table has them.
BESIDE = ("base", "stock (best of 1)", "plain fine-tuning", "random reward", "DPO, shuffled", "KTO, shuffled", "RWR, shuffled")


def first_cell(line: str) -> str:
    """Of a row, without the star that a note explains."""
    return line.split("|")[1].strip().rstrip("*") if line.startswith("|") else ""


def tables_with(page: Path, rows: tuple[str, ...]) -> list[str]:
    """The tables of a page that have rows with these first cells, cut down to them and what they stand beside, each below its heading."""
    found, heading, caption = [], "", ""
    for block in re.split(r"\n\n+", page.read_text(encoding="utf-8")):
        lines = block.splitlines()
        if lines[0].startswith("#"):
            heading, caption = lines[0].lstrip("# "), ""
        elif not lines[0].startswith("|"):
            caption = lines[-1] if len(lines) == 1 and len(lines[0]) < 80 else ""
        kept = list(dict.fromkeys(line for line in lines[2:] if first_cell(line) in (*BESIDE, *rows)))
        if lines[0].startswith("|") and any(first_cell(line) in rows for line in kept):
            found.append(f"{heading}{f': {caption}' if caption else ''}\n\n" + "\n".join([*lines[:2], *kept]) + "\n\n")
    return found


def frontier_picture(heading: str) -> str:
    """The picture of a table of docs/frontier.md, which is named after it."""
    task, model, guidance = heading.split(", ")
    file = f"frontier_{task}_{model}_g{guidance.removeprefix('guidance ')}.png"
    return f"![gains against the path KL, the denoiser rows and a judge that took no part](../{file})\n\n"


def measured(rows: tuple[str, ...]) -> str:
    """What docs/frontier.md and benchmarks/README.md have of a method."""
    frontier, others = (tables_with(page, rows) for page in (DOCS / "frontier.md", ROOT / "benchmarks" / "README.md"))
    star = "A star: its recipe's own numbers, without a search."
    parts = [f"From [the frontier](../frontier.md), which says what is compared, at equal budgets. {star}\n\n"] if frontier else []
    parts += [table + (frontier_picture(heading) if (heading := table.partition("\n")[0]).count(", ") == 2 else "") for table in frontier]
    parts += ["From [benchmarks](../../benchmarks/README.md), which says how and what it means.\n\n", *others] if others else []
    return "## Measured\n\n" + "".join(parts) if parts else ""


def page_of(name: str) -> str:
    """The whole page of an algorithm."""
    page = PAGES[name]
    title, text = described(name)
    parts = ["<!-- Written by docs/generate.py: change the module's docstring, or that script. -->\n\n", f"# {title}\n\n{text.strip()}\n\n"]
    parts += [f"{page.note}\n\n" if page.note else "", run_section(page), measured(page.rows)]
    if page.picture:
        file, what = page.picture
        parts.append(f"![{what}](../{file})\n\n*{what[0].upper()}{what[1:]}.*\n\n")
    parts.append(
        f"## Functions\n\nIn [`diffusers_align/algorithms/{name}.py`](../../diffusers_align/algorithms/{name}.py); torch alone, tensors in and out.\n\n"
    )
    parts += [f"::: diffusers_align.algorithms.{name}.{public}\n\n" for public in public_names(name)]
    return "".join(parts).rstrip() + "\n"


# all recipes


def page_of_recipes() -> str:
    """docs/recipes.md: its own words up to the mark, then every recipe with its level."""
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    found = {recipe.stem: level(recipe.stem) for recipe in sorted(RECIPES.glob("*.yaml"))}
    counts = ", ".join(f"{list(found.values()).count(wanted)} {wanted}" for wanted in LEVELS)
    rows = [f"Of {len(found)} recipes: {counts}.", "", "| recipe | level | model | script |", "|---|---|---|---|"]
    for name in sorted(found, key=lambda name: (LEVELS.index(found[name]), name)):
        script, link = script_of(name), f"[`{name}`](../training_scripts/recipes/{name}.yaml)"
        rows.append(f"| {link} | {found[name]} | `{model_of(name)}` | [`{script}.py`](../training_scripts/{script}.py) |")
    return page[: page.index(MARK) + len(MARK)] + "\n\n" + "\n".join(rows) + "\n"


def main() -> None:
    for name in PAGES:
        (DOCS / "algorithms" / f"{name}.md").write_text(page_of(name), encoding="utf-8")
    (DOCS / "recipes.md").write_text(page_of_recipes(), encoding="utf-8")
    print(f"{len(PAGES)} pages in {(DOCS / 'algorithms').relative_to(ROOT)}, and the table of docs/recipes.md")


if __name__ == "__main__":
    main()
