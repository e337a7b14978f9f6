"""Tokenizer, chat template and special tokens of a model folder."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdl_toolkit.errors import ModelError
from mdl_toolkit.i18n import Localized
from mdl_toolkit.model.constants import AUDIO_TOKEN_ID
from mdl_toolkit.utils.files import parse_json
from mdl_toolkit.weights.config_files import read_json, read_text, refusal, value_at
from mdl_toolkit.weights.schemas import (
    MODEL_CONFIG,
    PROCESSOR_CONFIG,
    TEMPLATE_CONFIG,
    TOKENIZER,
    TOKENIZER_CONFIG,
)

USUAL_TOKENS = {
    "audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
    "pad_token": "<|endoftext|>",
}  # fmt: skip


@dataclass(frozen=True)
class TokenizerFiles:
    """Hold the files that turn conversations into token ids; they can be sent to worker processes.

    Attributes:
        tokenizer: the content of `tokenizer.json`.
        chat_template: a Jinja template.
        specials: special tokens by name: always `audio_token`, `audio_bos_token`, `audio_eos_token` and
            `pad_token`, and any others of the folder.
    """

    tokenizer: str
    chat_template: str
    specials: tuple[tuple[str, str], ...]

    @property
    def tokenizer_fingerprint(self) -> str:
        """A hash of the tokenizer, independent of how its file is formatted."""
        canonical = json.dumps(parse_json(self.tokenizer), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def vocabulary_size(self) -> int:
        """The least number above all token ids."""
        return 1 + max(ids_of(parse_json(self.tokenizer)).values(), default=-1)

    @property
    def template_fingerprint(self) -> str:
        """A hash of the chat template."""
        return hashlib.sha256(self.chat_template.encode()).hexdigest()[:16]


def read_tokenizer_files(folder: Path, base: Path | None = None) -> TokenizerFiles:
    """Read tokenizer, chat template and special tokens of a model folder, or of an adapter's.

    Args:
        folder: that of a model or adapter.
        base: that of an adapter's base, which the ids must fit; it is read where the adapter lies alone in
            its folder, as those from elsewhere do.

    Raises:
        ModelError: the tokenizer or the chat template is missing, broken or another model's.
    """
    model = base or folder
    if not (folder / TOKENIZER_CONFIG).is_file():
        folder = model
    config, processor = read_json(folder / TOKENIZER_CONFIG), folder / PROCESSOR_CONFIG
    config |= read_json(processor) if processor.is_file() else {}
    specials = dict(USUAL_TOKENS)
    for name, value in config.items():
        # A token is written as a string or as an object with its content.
        token = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(token, str) and token:
            specials[name] = token
    tokenizer = _tokenizer_json(folder)
    check_ids(tokenizer, specials["audio_token"], model)
    file, old = folder / "chat_template.jinja", folder / TEMPLATE_CONFIG
    template = read_text(file) if file.is_file() else config.get("chat_template")
    if template is None and old.is_file():
        template = read_json(old).get("chat_template")
    if isinstance(template, list):
        template = next((each["template"] for each in template if each["name"] == "default"), None)
    if template is None:
        raise ModelError("{folder}: no chat template", folder=folder)
    return TokenizerFiles(tokenizer, template, tuple(sorted(specials.items())))


def ids_of(tokenizer: dict[str, Any]) -> dict[str, int]:
    """Return the id of each token of a `tokenizer.json`."""
    added = tokenizer.get("added_tokens") or ()
    return {**tokenizer["model"]["vocab"], **{token["content"]: token["id"] for token in added}}


def check_ids(tokenizer: str, audio_token: str, model: Path) -> None:
    """Refuse a tokenizer whose ids are not those of a model's `config.json`, where that is there.

    Args:
        tokenizer: the content of `tokenizer.json`.
        audio_token: the text of the token in the place of audio.
        model: the model's folder.

    Raises:
        ModelError: another id stands for audio, or there are more ids than embeddings.
    """
    path = model / MODEL_CONFIG
    if not path.is_file():
        return
    config, ids = read_json(path), ids_of(parse_json(tokenizer))
    size, audio_id = value_at(config, "text_config.vocab_size"), config.get("audio_token_id")
    audio_id = AUDIO_TOKEN_ID if audio_id is None else audio_id
    highest = max(ids.values(), default=-1)
    if size is not None and highest >= size:
        wanted = Localized("more than {highest}, the highest id in tokenizer.json", highest=highest)
        raise refusal(path, "text_config.vocab_size", wanted, size)
    if audio_id != ids.get(audio_token, audio_id):
        wanted = Localized(
            "{number}, the id of {token} in tokenizer.json", number=ids[audio_token], token=audio_token
        )
        raise refusal(path, "audio_token_id", wanted, audio_id)


def _tokenizer_json(folder: Path) -> str:
    file = folder / "tokenizer.json"
    if file.is_file():
        read_json(file, TOKENIZER)
        return read_text(file)
    for older in ("vocab.json", "merges.txt"):
        # Without them, transformers would make an empty tokenizer.
        if not (folder / older).is_file():
            raise ModelError(
                "{folder}: no tokenizer (neither tokenizer.json nor {older})", folder=folder, older=older
            )
    from transformers import Qwen2Tokenizer

    try:
        return str(Qwen2Tokenizer.from_pretrained(folder).backend_tokenizer.to_str())
    # A broken file makes the library raise anything.
    except Exception as problem:
        reason = " ".join(str(problem).split())
        raise ModelError("{folder}: no tokenizer ({reason})", folder=folder, reason=reason) from problem
