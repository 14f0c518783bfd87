"""Code blocks of a page; ``python -m tests.repo.docs.page PAGE`` runs them in order.

Python blocks share a namespace, sh blocks are run by ``bash -e``. A text block holds the output of
the block before it, where ``...`` stands for anything. A block with a title is a file. The comment
``<!-- not run: REASON -->`` before a block is for one that cannot run.
"""

import contextlib
import doctest
import io
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

LANGUAGES = ("csv", "python", "sh", "text")
LOOSELY = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    """``line`` is that of the first line of code, from 1; ``reason`` says why it is not run."""

    language: str
    title: str | None
    code: str
    line: int
    reason: str | None


def blocks(page):
    found, reason = [], None
    for token in MarkdownIt().parse(page.read_text()):
        if token.type == "fence":
            language, title = re.fullmatch(r'(\S*)(?: title="(.*)")?', token.info).groups()
            found.append(Block(language, title, token.content, token.map[0] + 2, reason))
        comment = re.match(r"<!-- not run: (.+) -->", token.content)
        reason = comment[1] if comment else None
    return found


def run(page):
    namespace, output = {"__name__": "__main__"}, ""
    for block in blocks(page):
        if block.reason:
            continue
        where = f"{page}, line {block.line}"
        if block.title:
            path = Path(block.title)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.code)
        elif block.language == "python":
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(code, namespace)
            output = printed.getvalue()
        elif block.language == "sh":
            print(where, flush=True)
            command = ["bash", "-e", "-o", "pipefail", "-c", block.code]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        else:
            assert doctest.OutputChecker().check_output(block.code, output, LOOSELY), (
                f"{where}: expected\n{block.code}got\n{output}"
            )


if __name__ == "__main__":
    from tests.repo.docs.world import prepare

    page = Path(sys.argv[1])
    prepare(page.read_text())
    run(page)
