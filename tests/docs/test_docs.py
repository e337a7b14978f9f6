"""The documents: fresh option tables, commands that parse, code that compiles, links that lead somewhere."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from mdl_toolkit.cli.click_options import Session
from mdl_toolkit.cli.main import PROGRAM, toolkit
from mdl_toolkit.config.options import Options
from mdl_toolkit.config.train import TrainOptions
from mdl_toolkit.config.yaml import to_yaml
from tests.support.cli_reference import PAGES, REGION, refreshed
from tests.support.paths import DOCS, ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
TWO_LANGUAGES = (
    "index", "installation", "cli", "data", "check", "training", "inference", "evaluation", "report",
    "serving", "model", "troubleshooting",
)  # fmt: skip


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (name, content)
        for name, path in zip(NAMES, DOCUMENTS, strict=True)
        for kind, content in BLOCK.findall(path.read_text(encoding="utf-8"))
        if kind == language
    ]


def commands() -> list[tuple[str, list[str]]]:
    """The words behind `mdl-toolkit` or `-m mdl_toolkit` of every command line that is shown."""
    found = []
    for name, content in blocks("bash"):
        for line in content.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == [PROGRAM]:
                found.append((name, words[1:]))
            elif "mdl_toolkit" in words:
                found.append((name, words[words.index("mdl_toolkit") + 1 :]))
    return found


def parsed(words: list[str]) -> list[Options]:
    """The options that would have reached a room; none if the words only ask for a version or help."""
    reached: list[Options] = []
    group = toolkit()
    for command in group.commands.values():
        command.work = reached.append
    with group.make_context(PROGRAM, list(words), obj=Session()) as context:
        group.invoke(context)
    return reached


@pytest.mark.parametrize("language", PAGES)
def test_the_options_on_the_command_line_pages_are_fresh(language):
    page = PAGES[language].read_text(encoding="utf-8")
    assert page == refreshed(page, language), "run: python -m tests.support.cli_reference"
    assert [name for _, name, _ in REGION.findall(page)] == list(toolkit().commands)


@pytest.mark.parametrize(("name", "words"), [c for c in commands() if "--version" not in c[1]])
def test_commands_that_are_shown_parse(monkeypatch, tmp_path, name, words):
    monkeypatch.chdir(tmp_path)
    if "--config" in words:
        settings = Path(words[words.index("--config") + 1])
        settings.parent.mkdir(parents=True)
        settings.write_text(to_yaml(TrainOptions(train_dataset="in", output="out")), encoding="utf-8")
    assert len(parsed(words)) == 1, name


def test_both_languages_show_the_same_commands():
    chinese = {page: words for page, words in by_page("zh").items() if words}
    assert chinese == {page: words for page, words in by_page("en").items() if words}
    assert len(chinese) > 3


def by_page(language: str) -> dict[str, list[list[str]]]:
    """The options that the commands on each page name; the texts between them differ."""
    suffix = {"README.md": "README.en.md"}
    shown: dict[str, list[list[str]]] = {}
    for name, words in commands():
        page, _, rest = suffix.get(name, name).partition(f".{language}.")
        if rest:
            shown.setdefault(page, []).append([word for word in words if word.startswith("-")])
    return shown


@pytest.mark.parametrize(("name", "code"), blocks("python"))
def test_python_that_is_shown_compiles(name, code):
    compile(code, name, "exec")


def test_every_page_exists_in_both_languages():
    pages = {path.name for path in DOCS.glob("*.md")}
    assert {f"{page}.{language}.md" for page in TWO_LANGUAGES for language in ("zh", "en")} <= pages


def test_the_site_leads_to_every_page_under_a_title_in_both_languages():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^  - (.+): (\S+\.md)$", settings, re.MULTILINE))
    assert sorted(shown.values()) == sorted(
        {re.sub(r"\.(zh|en)\.md$", ".md", path.name) for path in DOCS.glob("*.md")}
    )
    _, _, translations = settings.partition("nav_translations:")
    assert set(shown) == set(re.findall(r"^ {12}(.+): .+$", translations, re.MULTILINE))


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    path = ROOT / name
    for link in LINK.findall(_without_code(path.read_text(encoding="utf-8"))):
        if not re.match(r"https?://", link):
            target, _, anchor = link.partition("#")
            found = _target(path, target)
            assert found.exists(), link
            assert not anchor or anchor in _anchors(found), link


def _target(path: Path, link: str) -> Path:
    """What a link means: on the site, `cli.md` is the page in the language of the one it stands on."""
    if not link:
        return path
    translated = path.parent / link.replace(".md", f"{path.suffixes[0]}.md")
    return translated if path.parent == DOCS and translated.exists() else path.parent / link


def _without_code(text: str) -> str:
    return re.sub(r"`[^`]*`", "", BLOCK.sub("", text))


def _anchors(path: Path) -> set[str]:
    headings: list[Any] = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}
