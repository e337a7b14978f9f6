"""Tokenizer, chat template and special tokens of a model folder."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from mdl_toolkit.errors import ModelError
from mdl_toolkit.utils.files import parse_json
from mdl_toolkit.weights.resolve import read_json, read_text

TOKENIZER_CONFIG = "tokenizer_config.json"
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
        tokenizer = parse_json(self.tokenizer)
        added = (token["id"] for token in tokenizer.get("added_tokens") or ())
        return 1 + max(map(int, [-1, *tokenizer["model"]["vocab"].values(), *added]))

    @property
    def template_fingerprint(self) -> str:
        """A hash of the chat template."""
        return hashlib.sha256(self.chat_template.encode()).hexdigest()[:16]


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Read tokenizer, chat template and special tokens of a model folder.

    Raises:
        ModelError: the tokenizer or the chat template is missing or broken.
    """
    config = read_json(folder / TOKENIZER_CONFIG)
    processor = folder / "processor_config.json"
    config = {**config, **(read_json(processor) if processor.is_file() else {})}
    specials = dict(USUAL_TOKENS)
    for name, value in config.items():
        # A token is written as a string or as an object with its content.
        token = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(token, str) and token:
            specials[name] = token
    tokenizer = _tokenizer_json(folder)
    file, old = folder / "chat_template.jinja", folder / "chat_template.json"
    template = read_text(file) if file.is_file() else config.get("chat_template")
    if template is None and old.is_file():
        template = read_json(old).get("chat_template")
    if isinstance(template, list):
        default = [each for each in template if isinstance(each, dict) and each.get("name") == "default"]
        template = default[0].get("template") if default else None
    if not isinstance(template, str):
        raise ModelError("{folder}: no chat template", folder=folder)
    return TokenizerFiles(tokenizer, template, tuple(sorted(specials.items())))


def _tokenizer_json(folder: Path) -> str:
    file = folder / "tokenizer.json"
    if file.is_file():
        read_json(file)
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
