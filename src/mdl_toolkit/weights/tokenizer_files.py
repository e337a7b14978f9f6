"""The text side of a model folder: tokenizer, chat template, special tokens."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdl_toolkit.errors import ModelError
from mdl_toolkit.weights.resolve import read_json, read_text

USUAL_TOKENS = {
    "audio_token": "<|AUDIO|>", "audio_bos_token": "<|audio_bos|>", "audio_eos_token": "<|audio_eos|>",
    "pad_token": "<|endoftext|>",
}  # fmt: skip


@dataclass(frozen=True)
class TokenizerFiles:
    """What is needed to turn conversations into ids; small, and can be sent to worker processes.

    Attributes:
        tokenizer: the content of `tokenizer.json`.
        chat_template: Jinja text.
        specials: special tokens by name: `audio_token`, `audio_bos_token`, `audio_eos_token`, `pad_token`
            always, others where there are any.
    """

    tokenizer: str
    chat_template: str
    specials: tuple[tuple[str, str], ...]

    @property
    def tokenizer_fingerprint(self) -> str:
        """The same for the same tokenizer, whatever its file looks like."""
        canonical = json.dumps(json.loads(self.tokenizer), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def template_fingerprint(self) -> str:
        """The same for the same chat template."""
        return hashlib.sha256(self.chat_template.encode()).hexdigest()[:16]


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """The text side of a model folder.

    Raises:
        ModelError: the tokenizer or the chat template is missing or broken.
    """
    config = read_json(folder / "tokenizer_config.json")
    processor = folder / "processor_config.json"
    config = {**config, **(read_json(processor) if processor.is_file() else {})}
    named = {
        name: token for name, value in config.items() if name.endswith("_token") and (token := _token(value))
    }
    specials = {**USUAL_TOKENS, **named}
    return TokenizerFiles(
        _tokenizer_json(folder), _chat_template(folder, config), tuple(sorted(specials.items()))
    )


def _token(value: Any) -> str | None:
    """A token is written as a string or as an object with its content."""
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _tokenizer_json(folder: Path) -> str:
    file = folder / "tokenizer.json"
    if file.is_file():
        read_json(file)
        return read_text(file)
    for older in ("vocab.json", "merges.txt"):
        if not (folder / older).is_file():  # transformers would make an empty tokenizer
            raise ModelError(
                "{folder}: no tokenizer (neither tokenizer.json nor {older})", folder=folder, older=older
            )
    from transformers import Qwen2Tokenizer

    try:
        return str(Qwen2Tokenizer.from_pretrained(folder).backend_tokenizer.to_str())
    except Exception as problem:  # whatever a broken file makes the library raise
        reason = " ".join(str(problem).split())
        raise ModelError("{folder}: no tokenizer ({reason})", folder=folder, reason=reason) from problem


def _chat_template(folder: Path, config: dict[str, Any]) -> str:
    file, old = folder / "chat_template.jinja", folder / "chat_template.json"
    if file.is_file():
        return read_text(file)
    template = config.get("chat_template")
    if template is None and old.is_file():
        template = read_json(old).get("chat_template")
    if isinstance(template, list):
        named = [each for each in template if isinstance(each, dict) and each.get("name") == "default"]
        template = named[0].get("template") if named else None
    if not isinstance(template, str):
        raise ModelError("{folder}: no chat template", folder=folder)
    return template
