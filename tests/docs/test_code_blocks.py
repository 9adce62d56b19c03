"""Every code block of every Markdown file runs, or says why not: docs/keeping_the_docs.md has the rules."""

import pytest
from code_blocks import FREE, ROOT, Block, blocks_of, pages, replaced, run

PAGES = [page for page in pages() if blocks_of(page)]
FOLDERS = ("training_scripts", "pipelines", "schedulers", "benchmarks", "docs")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader is: a checkout, in which they may write."""
    for name in FOLDERS:
        (tmp_path / name).symlink_to(ROOT / name, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_blocks_of_a_page_run(page, folder):
    names = {"__name__": "__main__"}
    for block in blocks_of(page):
        try:
            run(block, names, folder)
        except Exception as error:
            raise AssertionError(f"{block}: {type(error).__name__}: {error}") from error


def test_what_is_not_run_is_said(capsys):
    left_out = [block for page in PAGES for block in blocks_of(page) if block.reason is not None]
    number = sum(block.language not in FREE for page in PAGES for block in blocks_of(page))
    with capsys.disabled():
        print(f"\n{len(left_out)} of {number} code blocks are not run:", *(f"  {block}: {block.reason}" for block in left_out), sep="\n")
    assert number > 50 and len(left_out) < number / 10


def block(text: str) -> Block:
    return blocks_of(ROOT / "page.md", text)[0]


@pytest.mark.parametrize(
    ("fence", "message"),
    [
        ("```python\n1 / 0\n```", "division"),
        ("```bash\naccelerate launch training_scripts/train_dpo.py --bta 3\n```", "--beta"),
        ("```bash\naccelerate launch --nonsense training_scripts/train_dpo.py\n```", "nonsense"),
        ("```bash\npython training_scripts/train_everything.py\n```", "no script"),
        ("```bash\npython benchmarks/overhead.py --nonsense\n```", "nonsense"),
        ('```bash\npip install ".[nonsense]"\n```', "no extra"),
        ("```bash\nmake nonsense\n```", "no target"),
        ("```bash\nmake verify NONSENSE=1\n```", "no variable"),
        ("```bash\npython -m benchmarks.verify --nonsense\n```", "nonsense"),
        ("```bash\nfrobnicate\n```", "no way to check"),
        ("```yaml\nnonsense: 1\n```", "no script takes"),
        ("```json\n{1: 2}\n```", "Expecting"),
        ("```\nno language\n```", "without a language"),
    ],
)
def test_a_wrong_block_fails(fence, message, folder):
    with pytest.raises(Exception, match=message):
        run(block(fence), {}, folder)


@pytest.mark.parametrize(
    "fence",
    [
        "```yaml\nprompts: mini_train\nlearning_rate: 1.0e-4\nsde_window_size: 2\n```",  # a part of a recipe
        "```yaml\ncompute_environment: LOCAL_MACHINE\ndistributed_type: NO\n```",
        "```bash\nscript=training_scripts/train_dpo.py\naccelerate launch --num_processes 1 $script --config dpo_mini_sd3 && make style  # both\n```",
        "```bash\naccelerate launch $(diffusers-align path train_ddpo) --config ddpo_mini_sd\n```",
        '```json\n{"a": 1}\n{"b": 2}\n```',
        "<!-- not run: no GPU -->\n```python\n1 / 0\n```",
        "<!-- setup: x = 1 -->\n```python\nassert x == 1\n```",
    ],
)
def test_a_right_block_passes(fence, folder):
    run(block(fence), {}, folder)


def test_a_block_that_is_a_file_can_be_imported(folder):
    run(block("```python\n# a_reward_of_docs.py: two lines\nworth = 3\n```"), {}, folder)
    run(block("```python\nfrom a_reward_of_docs import worth\n\nassert worth == 3\n```"), {}, folder)


def test_comments_before_a_fence_belong_to_it():
    page = "<!-- run: a=b 'c d=e f' -->\n<!-- setup:\nx = 1\n-->\n```python\ny = x\n```\n<!-- not run: no GPU -->\n\n```python\n1\n```\n"
    first, second = blocks_of(ROOT / "page.md", page)
    assert first.replacements == (("a", "b"), ("c d", "e f")) and first.setup.strip() == "x = 1" and first.line == 6
    assert second.reason is None and second.replacements == ()  # a blank line parts them


@pytest.mark.parametrize(
    ("text", "old", "new", "language", "expected"),
    [
        ("f(steps=20, b=1)", "steps", "2", "python", "f(steps=2, b=1)"),
        ("run --steps 20 --b 1", "steps", "2", "bash", "run --steps 2 --b 1"),
        ("steps: 20\nb: 1", "steps", "2", "yaml", "steps: 2\nb: 1"),
        ("load('big/model')", "big/model", "mini", "python", "load('mini')"),
    ],
)
def test_a_comment_replaces_values_and_text(text, old, new, language, expected):
    assert replaced(text, old, new, language) == expected
    with pytest.raises(AssertionError, match="not in the block"):
        replaced(text, "absent", "x", language)
