"""Every Python snippet of the pages runs; the snippets of one page run in order, as one program."""

import pathlib
import re

import jax
import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
    path.relative_to(ROOT)
    for folder in (".", ".github", "examples", "optax_clipquant", "tests")
    for path in sorted((ROOT / folder).glob("*.md" if folder == "." else "**/*.md"))
]


def snippets(page: pathlib.Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=str)
def test_snippets_run(page, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    # As for a user, without this test suite's strictness.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile("\n".join(snippets(page)), str(page), "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_relative_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
