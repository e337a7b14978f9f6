"""Download a model by its name from Hugging Face or ModelScope, or take it from their caches.

A cache does where the hub cannot be reached. The authors' organisation has another name on each of the two.
"""

import re
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

from mdl_toolkit.errors import ModelError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.utils.console import say, warn

TEXT_FILES = ("*.json", "*.jinja", "*.txt")
WEIGHTS = "*.safetensors"
# Files that a checkpoint folder may hold besides these; they are copied when a model is exported.
OTHER_FILES = (WEIGHTS, "*.py", "*.md", "LICENSE*", "NOTICE*")
ON_HUGGING_FACE, ON_MODELSCOPE = "mispeech", "midasheng"
# How one logs in, to Hugging Face and to ModelScope.
LOGINS = ("hf auth login", "modelscope login")
# The default, and what its authors recommend in its place.
FIRST_REVISION, RECOMMENDED = "midashenglm-7b", "midashenglm-7b-1021-bf16"
# Models of the family that are no MiDashengLM.
_OTHER_KINDS = re.compile(r"midashenglm(-[\w.]+)*-(spatial|gen)(-.*)?", re.IGNORECASE)


def download(name: str, revision: str | None, *, from_modelscope: bool, weights: bool) -> Path:
    """Return the folder of a model on a hub, whose files are downloaded where they are not cached.

    Args:
        name: the model's name; where the hub has none of it, the authors' other organisation is asked too.
        revision: a commit on Hugging Face; the newest if not given.
        from_modelscope: ask ModelScope.
        weights: download everything; otherwise only the small text files.

    Raises:
        ModelError: neither hub nor cache has it, or it is a relative of MiDashengLM with other parts.
    """
    owner, _, model = name.rpartition("/")
    here, there = (ON_HUGGING_FACE, ON_MODELSCOPE)[:: -1 if from_modelscope else 1]
    names = [name, *([f"{here}/{model}"] if owner == there else [])]
    if owner in (here, there):
        check_before_download(name, f"{here}/{RECOMMENDED}", revision, from_modelscope, weights)
    problems: dict[str, Exception] = {}
    for candidate in names:
        # A hub that could not be reached is not asked again, only its cache.
        only_cached = any(status_of(problem) not in (401, 404) for problem in problems.values())
        for cached in (True,) if only_cached else (False, True):
            try:
                folder = _snapshot(candidate, revision, from_modelscope, weights, cached=cached)
            # The hubs' libraries raise a dozen kinds of errors; each means that they do not have it.
            except Exception as problem:  # noqa: BLE001
                problems.setdefault(candidate, problem)
                continue
            if cached:
                reason = explain(problems[name], from_modelscope)
                warn(
                    "{name}: taken from the cache, {folder} ({reason})",
                    name=candidate,
                    folder=folder,
                    reason=reason,
                )
            return folder
    hub = "ModelScope" if from_modelscope else "Hugging Face"
    first, *others = (explain(problem, from_modelscope) for problem in problems.values())
    message = Localized("{hub} did not give it ({reason})", hub=hub, reason=first)
    for second in others:
        message = Localized(
            "{hub} did not give it ({reason}), nor {other} ({second})",
            hub=hub,
            reason=first,
            other=names[1],
            second=second,
        )
    raise NotFoundError(name, message) from problems[name]


def check_before_download(
    name: str, recommended: str, revision: str | None, from_modelscope: bool, weights: bool
) -> None:
    """Refuse relatives of MiDashengLM; say how large the default's weights are, where they are not cached.

    Raises:
        ModelError: the model has other parts.
    """
    model = name.rpartition("/")[2]
    if _OTHER_KINDS.fullmatch(model):
        raise ModelError(
            "model {name}: a relative of MiDashengLM with parts that are not computed here; give a "
            "MiDashengLM, for example {other}",
            name=name,
            other=recommended,
        )
    if model != FIRST_REVISION or not weights:
        return
    cached: list[Path] = []
    # The libraries raise errors of many kinds where the cache has nothing.
    with suppress(Exception):
        cached = [*_snapshot(name, revision, from_modelscope, True, cached=True).glob(WEIGHTS)]
    if not cached:
        say(
            "{name}: the float32 weights of the first revision are downloaded now, 33 GB; its authors "
            "recommend {other} for fine-tuning (--model-name)",
            name=name,
            other=recommended,
        )


class NotFoundError(ModelError):
    """Say that a name is neither a folder nor a model on a hub.

    Attributes:
        reason: the same without a remedy, for whom other options name the model.
    """

    def __init__(self, name: str, message: Localized) -> None:
        self.reason = Localized("model {name}: not a folder here, and {message}", name=name, message=message)
        super().__init__(
            "{reason}. Give a local folder with --model-name, set HF_ENDPOINT to a mirror that can be "
            "reached, or use --from-modelscope true",
            reason=self.reason,
        )


def _snapshot(name: str, revision: str | None, from_modelscope: bool, weights: bool, *, cached: bool) -> Path:
    patterns = [*TEXT_FILES, *(OTHER_FILES if weights else ())]
    if from_modelscope:
        from modelscope import snapshot_download

        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=cached))
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=cached))


def _chain(problem: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it came from."""
    while problem is not None:
        yield problem
        problem = problem.__cause__ or problem.__context__


def status_of(problem: Exception) -> int | None:
    """Return the HTTP status that an error tells of."""
    for each in _chain(problem):
        if type(each).__name__ == "NotExistError":
            return 404
        if (status := getattr(getattr(each, "response", None), "status_code", None)) is not None:
            return int(status)
    return None


def explain(problem: Exception, from_modelscope: bool) -> Localized | str:
    """Say why a hub did not do what it was asked to, and what to do about it."""
    text = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
    status, kinds = status_of(problem), {type(each).__name__ for each in _chain(problem)}
    if status in (401, 403):
        return Localized(
            "status {status}: it is not there, or you have to log in, by `{login}`, and to accept the terms "
            "on its page",
            status=status,
            login=LOGINS[from_modelscope],
        )
    if "SOCKS" in text:
        package = "requests[socks]" if from_modelscope else "httpx[socks]"
        return Localized(
            'the proxy speaks SOCKS, which needs a package: pip install "{package}"', package=package
        )
    from huggingface_hub import constants

    address = urlsplit("https://www.modelscope.cn" if from_modelscope else constants.ENDPOINT)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    is_used = proxy and not urllib.request.proxy_bypass(str(address.hostname))
    if is_used and any(kind in {"ProxyError", "ConnectError", "ConnectionError"} for kind in kinds):
        # Without the password that it may hold.
        shown = urlsplit(str(proxy)).netloc.rpartition("@")[2]
        return Localized("the proxy {proxy} does not let it through: {reason}", proxy=shown, reason=text)
    return text
