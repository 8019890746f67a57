"""The site beside MkDocs: pages and pictures from outside docs/, and docstrings as Markdown."""

import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = ["CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md"]
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)#\s]+)")


def _linked(page: str, text: str) -> list[str]:
    """What a page of the repository links to, as paths of the repository."""
    folder = (ROOT / page).parent
    targets = [(folder / target).resolve() for _, target in LINK.findall(text)]
    return [str(path.relative_to(ROOT)) for path in targets if path.is_relative_to(ROOT) and path.is_file()]


def on_files(files, config):
    """Adds the pages, and every file that some page links to, under its path in the repository."""
    wanted = dict.fromkeys(PAGES)
    for page in [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages())]:
        wanted |= dict.fromkeys(_linked(page, (ROOT / page).read_text()))
    for path in wanted:
        if not path.startswith("docs/"):
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown, page, **_):
    """Links as the site has them: docs/ is its root, beside what lies outside docs/."""
    if page.file.src_uri in PAGES:
        return LINK.sub(lambda link: link[1] + link[2].replace("docs/", "", 1), markdown)
    if "/" not in page.file.src_uri:
        return LINK.sub(lambda link: link[1] + link[2].removeprefix("../"), markdown)
    return markdown


class Blocks(griffe.Extension):
    """Docstrings are written to be read in a terminal. Here indented lines below a line that is no section of
    Google's become a list, and an asterisk outside of code and *emphasis* stays one."""

    SECTIONS = re.compile(r"(Args|Keyword Args|Raises|Returns|Examples):$")
    STARRED = re.compile(r"(``.*?``|`.*?`|\*\w+\*)|\*")

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            lines = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n").splitlines()
            obj.docstring.value = "\n".join(self._markdown(lines))

    def _markdown(self, lines: list[str]):
        before, kind = "", ""
        for line in lines:
            if not line.strip() and kind != "section":
                kind = ""
            elif not line.startswith(" "):
                kind = "section" if self.SECTIONS.match(line) else "text"
            elif kind == "text" and before.strip():
                kind = "list"
                yield ""
            elif kind == "":
                kind = "code"
            if kind == "list":
                line = re.sub("^ {4}(?! )", "- ", line)
            if kind != "code" and not line.lstrip().startswith(">>>"):
                line = self.STARRED.sub(lambda found: found[1] or r"\*", line)
            yield line
            before = line
