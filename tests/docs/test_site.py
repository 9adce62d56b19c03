"""The documentation says what the repository holds: generated pages, links, walks."""

import re
from pathlib import Path

import pytest
from code_blocks import ROOT, loaded, pages
from PIL import Image

from benchmarks.frontier.methods import METHODS

DOCS = ROOT / "docs"
generate, hooks = loaded(DOCS / "generate.py"), loaded(DOCS / "hooks.py")
ALGORITHMS = sorted(path.stem for path in (ROOT / "diffusers_align" / "algorithms").glob("[!_]*.py"))
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s#]*)(?:#([^)\s]+))?\)")
MOST_FILES = 15


def without_code(page: Path) -> str:
    return re.sub(r"^(```+).*?^\1|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


# algorithms


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_page_of_each_algorithm_is_up_to_date(name):
    assert (DOCS / "algorithms" / f"{name}.md").read_text(encoding="utf-8") == generate.page_of(name), "run python docs/generate.py"


def test_the_table_of_recipes_is_up_to_date():
    assert (DOCS / "recipes.md").read_text(encoding="utf-8") == generate.page_of_recipes(), "run python docs/generate.py"
    assert generate.page_of_recipes().count("](../training_scripts/recipes/") == len(list(generate.RECIPES.glob("*.yaml")))


def test_there_are_no_other_pages():
    assert {path.stem for path in (DOCS / "algorithms").glob("*.md")} == {*ALGORITHMS, "index"} == {*generate.PAGES, "index"}


def test_every_script_and_recipe_has_a_page():
    scripts = {path.stem for path in (ROOT / "training_scripts").glob("train_*.py")}
    assert scripts - {page.script for page in generate.PAGES.values()} == {"train_reward"}  # which learns a reward: no algorithm of its own
    assert {path.stem for path in generate.RECIPES.glob("*.yaml")} == {recipe for page in generate.PAGES.values() for recipe in page.recipes}


def test_every_measured_row_is_in_the_benchmarks_or_may_come_on_the_frontier():
    cells = {line.split("|")[1].strip() for line in (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")}
    assert {row for page in generate.PAGES.values() for row in page.rows} <= cells | set(METHODS)


def test_a_page_has_its_parts():
    page = generate.page_of("diffusion_dpo")
    assert page.index("# Diffusion-DPO") < page.index("```math") < page.index("make_preferences.py") < page.index("train_dpo.py --config")
    assert "| Diffusion-DPO | 2 | 5,571 |" in page and "| DPO, shuffled |" in page, "the row of the frontier, and its control"
    assert "::: diffusers_align.algorithms.diffusion_dpo.diffusion_dpo_loss" in page
    assert "$$" not in "".join(generate.page_of(name) for name in ALGORITHMS)  # all are blocks of their own


# links


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(without_code(page)):
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{target} is no file"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, f"{target} has no heading #{anchor}"


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[2]
    listed = re.findall(r"[\w/]+\.md", nav)
    assert sorted(listed) == sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md") if path != DOCS / "README.md")


@pytest.mark.parametrize(
    ("page", "link", "on_the_site"),
    [
        ("guides/pairs.md", "../preference_data.md", "../preference_data.md"),
        ("figures.md", "../benchmarks/README.md", "repository/benchmarks/index.md"),
        ("guides/pairs.md", "../../training_scripts/train_dpo.py", "../repository/training_scripts/train_dpo.py.md"),
        ("training.md", "../training_scripts/recipes", "repository/training_scripts/recipes.md"),
        ("repository/benchmarks/index.md", "../docs/toy_curves.png", "../../toy_curves.png"),
        ("repository/diffusers_align/embedded/index.md", "samples.png", "samples.png"),
    ],
)
def test_a_link_of_the_repository_becomes_one_of_the_site(page, link, on_the_site):
    text = hooks.LINK.sub(lambda match: hooks.relinked(hooks.origin(page), page, match), f"[text]({link}#there) `[code]` <!-- -->")
    assert text == f"[text]({on_the_site}#there) `[code]` <!-- -->"


@pytest.mark.parametrize("link", ["nowhere.md", "../../outside.md", "https://example.org", "#heading"])
def test_other_links_stay(link):
    assert hooks.LINK.sub(lambda match: hooks.relinked("docs/index.md", "index.md", match), f"[text]({link})") == f"[text]({link})"


# the architecture's walks
MOST_FILES = 15


@pytest.mark.parametrize("name", ["latent", "pair"])
def test_the_walks_pass_files_that_exist_and_not_too_many(name):
    """The pictures carry the list that they show; `benchmarks/walks.py` draws them."""
    assert f"walk_{name}.png" in (DOCS / "architecture.md").read_text(encoding="utf-8")
    with Image.open(DOCS / f"walk_{name}.png") as picture:
        files = picture.info["walk"].splitlines()
        assert len(picture.convert("L").getcolors()) > 50
    assert [file for file in files if not (ROOT / file).exists()] == []
    assert 5 < len(files) <= MOST_FILES
