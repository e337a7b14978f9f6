"""Put together the page to try a model: one HTML file that needs nothing else, and its policy.

Answers and prompts become text in it, never markup.
"""

import base64
import hashlib
import re
from functools import cache
from importlib import resources

# It talks to this server alone; style and script are the ones in the file, known by their hash.
POLICY = (
    "default-src 'none'; connect-src 'self'; img-src data:; media-src blob:; script-src 'sha256-{script}'; "
    "style-src 'sha256-{style}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@cache
def page_and_policy() -> tuple[str, str]:
    """Return the page, and the Content-Security-Policy that goes with it."""
    folder = resources.files("mdl_toolkit.serving") / "page"
    read = {
        name: (folder / name).read_text(encoding="utf-8") for name in ("page.html", "style.css", "try.js")
    }
    parts = {"style": read["style.css"], "script": read["try.js"]}
    hashes = {
        name: base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        for name, part in parts.items()
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], read["page.html"])
    return page, POLICY.format(**hashes)
