"""Fill the template in `page/`: one HTML file that needs nothing else, and a policy that forbids more.

Texts from data are JSON in a block that is no script, and the page's script makes text of them, never markup.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from mdl_toolkit import __version__
from mdl_toolkit.errors import InputError
from mdl_toolkit.utils.files import replace_file, report_write_errors

# In the order in which they run.
SCRIPTS = ("words", "differences", "charts", "rows", "filters", "start")
# Nothing is fetched but recordings; style and script are the ones in the file, known by their hash.
POLICY = (
    "default-src 'none'; media-src file: data: http: https:; script-src 'sha256-{script}'; "
    "style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'"
)


def write_page(path: Path, name: str, values: Mapping[str, Any], option: str = "--output") -> None:
    """Write a report, whole or not at all.

    Args:
        path: the HTML file; an existing one is replaced.
        name: the subject, for its title.
        values: by part (`run`, `evaluation`, `rows`), as `page/start.js` shows them; None for a part
            that is not there.
        option: the option that gave the path.

    Raises:
        InputError: it cannot be written.
    """
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    shown = {"name": name, "toolkit": __version__, "made": made, **values}
    data = json.dumps(shown, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    style = _part("style.css")
    script = '"use strict";\n(() => {\n' + "\n".join(_part(f"{part}.js") for part in SCRIPTS) + "})();\n"
    parts = {
        "policy": POLICY.format(script=_hash(script), style=_hash(style)),
        "style": style,
        "script": script,
        # No `</script>` or `<!--` may end or hide the block.
        "values": data.replace("<", "\\u003c"),
    }
    text = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _part("page.html"))
    with report_write_errors(f"{option} {path}", InputError), replace_file(path, "page") as work:
        work.write_text(text, encoding="utf-8", newline="\n")


def _part(name: str) -> str:
    return (resources.files("mdl_toolkit.reporting") / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
