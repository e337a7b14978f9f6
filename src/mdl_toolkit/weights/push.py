"""Publish a model or adapter folder on Hugging Face or ModelScope, by the hubs' own libraries.

What is there already is not sent again, so that the same command goes on where an earlier one ended.
"""

import os
import re
from pathlib import Path

from mdl_toolkit.config.serving import PushOptions
from mdl_toolkit.config.yaml import SETTINGS_FILE
from mdl_toolkit.errors import ModelError
from mdl_toolkit.utils.console import say, size, warn
from mdl_toolkit.weights.hub import LOGINS, explain, status_of
from mdl_toolkit.weights.model_card import CARD
from mdl_toolkit.weights.provenance import read_provenance
from mdl_toolkit.weights.resolve import check_is_no_run, check_weights, require_package
from mdl_toolkit.weights.schemas import ADAPTER_CONFIG, MODEL_CONFIG

# The settings name files of this machine, and the card says what matters of them; hidden files are nobody's.
NOT_SENT = (SETTINGS_FILE, ".*", "*/.*", "__pycache__/*")
# What a hub takes as OWNER/NAME.
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
MODELSCOPE = "modelscope"


def push(options: PushOptions) -> str:
    """Publish a folder, and return the address of its page.

    Raises:
        ModelError: it is no whole model or adapter with a card, nobody is logged in, or the hub refuses it.
    """
    folder, is_modelscope = Path(options.folder).expanduser(), options.to == MODELSCOPE
    if not REPOSITORY.fullmatch(options.repo):
        raise ModelError("{repo}: expected OWNER/NAME", repo=options.repo)
    check_is_no_run(folder, MODEL_CONFIG, ADAPTER_CONFIG)
    if not any((folder / name).is_file() for name in (MODEL_CONFIG, ADAPTER_CONFIG)):
        raise ModelError("{folder}: no model and no adapter is there", folder=folder)
    check_weights(folder)
    if not (folder / CARD).is_file():
        raise ModelError("{folder}: no {card}, the model card; write one first", folder=folder, card=CARD)
    origin = read_provenance(folder)
    if (
        (folder / ADAPTER_CONFIG).is_file()
        and origin
        and origin.base
        and Path(origin.base.name).is_absolute()
    ):
        warn(
            "{folder}: the adapter names its base by a path of this machine, {base}; others give theirs with "
            "`mdl-toolkit merge --model-name`",
            folder=folder,
            base=origin.base.name,
        )
    check_login(is_modelscope)
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    say("sending {size} from {folder} to {repo}", size=size(total), folder=folder, repo=options.repo)
    try:
        address = (push_to_modelscope if is_modelscope else push_to_hugging_face)(folder, options)
    # The hubs' libraries raise a dozen kinds of errors.
    except Exception as problem:
        if status_of(problem) in (401, 403):
            raise ModelError(
                "{repo}: status {status}: this login may not write there; `{login}` with a token that may",
                repo=options.repo,
                status=status_of(problem),
                login=LOGINS[is_modelscope],
            ) from problem
        raise ModelError(
            "{repo}: {reason}; the same command goes on from there",
            repo=options.repo,
            reason=explain(problem, is_modelscope),
        ) from problem
    say("published: {address}", address=address)
    return address


def check_login(is_modelscope: bool) -> None:
    """Raise ModelError if nobody is logged in to the hub."""
    if is_modelscope:
        require_package(MODELSCOPE, MODELSCOPE, "--to modelscope")
        from modelscope.hub.api import ModelScopeConfig

        variable, token = "MODELSCOPE_API_TOKEN", ModelScopeConfig.get_cookies()
    else:
        from huggingface_hub import get_token

        variable, token = "HF_TOKEN", get_token()
    if not token and not os.environ.get(variable):
        raise ModelError(
            "nobody is logged in: `{login}` first, or set {variable}",
            login=LOGINS[is_modelscope],
            variable=variable,
        )


def push_to_hugging_face(folder: Path, options: PushOptions) -> str:
    """Upload a folder to Hugging Face, or to HF_ENDPOINT, and return the address of its page."""
    from huggingface_hub import HfApi

    api = HfApi()
    # The name as the hub spells it.
    repo = api.create_repo(options.repo, private=options.private or None, exist_ok=True)
    api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=folder,
        commit_message="Upload with mdl-toolkit",
        ignore_patterns=[*NOT_SENT],
    )
    return str(repo)


def push_to_modelscope(folder: Path, options: PushOptions) -> str:
    """Upload a folder to ModelScope, and return the address of its page."""
    from modelscope.hub.api import HubApi

    api = HubApi()
    visibility = "private" if options.private else "public"
    api.create_repo(options.repo, repo_type="model", visibility=visibility, exist_ok=True)
    api.upload_folder(
        repo_id=options.repo,
        folder_path=str(folder),
        commit_message="Upload with mdl-toolkit",
        ignore_patterns=[*NOT_SENT],
    )
    return f"https://www.modelscope.cn/models/{options.repo}"
