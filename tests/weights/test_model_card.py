"""The model card: front matter that the hub reads, and users' texts that stay texts."""

import json
import re
from dataclasses import replace

import pytest
import yaml

from mdl_toolkit.weights.model_card import ResultMetadata, render_card
from mdl_toolkit.weights.provenance import Base, Prompts, Provenance
from tests.support.runs import copy_checkpoint, train_options

NASTY = '---\nlicense: mine\n---\n```\n# Title\n````\n<script>alert("x")</script> {{x}} %s "\'\\ 中文'
ORIGIN = Provenance(
    Base("mispeech/midashenglm-7b", None, "f"), Prompts("Be brief.", NASTY),
    {"rows": 1234, "hours": 5.5}, {"steps": 10, "eval_loss": 0.25, "eval_wer": 0.125},
)  # fmt: skip


@pytest.fixture
def base(golden, tmp_path):
    return copy_checkpoint(golden, "A-small", tmp_path)


def made(base, *, is_adapter=False, origin=ORIGIN):
    return render_card(
        ResultMetadata(origin, train_options(base, base, base), ""), base, is_adapter=is_adapter
    )


def front(page):
    return yaml.safe_load(re.match(r"---\n(.*?\n)---\n", page, re.DOTALL)[1])


def outside_blocks(page):
    """The page without its code blocks, by CommonMark's rule for fences."""
    kept, fence = [], None
    for line in page.splitlines():
        ticks = re.match("`{3,}", line)
        if fence is None and ticks:
            fence = len(ticks[0])
        elif fence is not None:
            if re.fullmatch(f"`{{{fence},}}\\s*", line):
                fence = None
        else:
            kept.append(line)
    assert fence is None
    return "\n".join(kept)


def test_front_matter_of_a_model(base):
    (base / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, zh]\ntags: [x]\n---\n# Base\n")
    assert front(made(base)) == {
        "base_model": "mispeech/midashenglm-7b", "library_name": "transformers",
        "pipeline_tag": "audio-text-to-text", "tags": ["midashenglm", "audio", "mdl-toolkit"],
        "license": "apache-2.0", "language": ["en", "zh"],
    }  # fmt: skip


def test_front_matter_of_an_adapter(base):
    assert front(made(base, is_adapter=True)) == {
        "base_model": "mispeech/midashenglm-7b", "base_model_relation": "adapter", "library_name": "peft",
        "pipeline_tag": "audio-text-to-text", "tags": ["midashenglm", "audio", "mdl-toolkit", "lora"],
    }  # fmt: skip


@pytest.mark.parametrize("text", ["# no front matter", "---\n: [\n---\n", "---\n- a list\n---\n", "---\n"])
def test_a_base_whose_card_says_nothing(base, text):
    (base / "README.md").write_text(text)
    assert "license" not in front(made(base))


def test_users_texts_stay_texts(base):
    page = made(base)
    assert "license" not in front(page)
    seen = outside_blocks(page)
    assert "script" not in seen
    assert "# Title" not in seen
    assert NASTY in page
    assert repr(NASTY) in page


def test_no_path_of_this_machine(base):
    origin = Provenance(Base(str(base.resolve()), None, "f"))
    page = made(base, origin=origin)
    assert str(base.parent) not in page
    assert front(page)["base_model"] == "A-small"


def test_data_settings_metrics_and_use(base):
    page = made(base, origin=replace(ORIGIN, prompts=Prompts(None, 'What\'s "it"?')))
    for expected in (
        "| rows | 1,234 |",
        "| eval wer | 0.125 |",
        "lora_rank: 4",
        "vllm serve FOLDER\n",
        "vllm serve FOLDER --trust-remote-code --dtype float32\n",
        "trust_remote_code",
    ):
        assert expected in page
    for block in re.findall("```python\n(.*?)```", page, re.DOTALL):
        compile(block, "card", "exec")


def test_what_does_not_hold_is_not_said(base):
    config = json.loads((base / "config.json").read_text())
    del config["auto_map"]
    config["text_config"]["model_type"] = "qwen3"
    (base / "config.json").write_text(json.dumps(config))
    page = made(base, origin=Provenance())
    for absent in ("trust_remote_code", "--trust-remote-code", "## Data", "## Prompts", "## Metrics"):
        assert absent not in page
