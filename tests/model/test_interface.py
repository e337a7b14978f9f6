"""The model among its neighbours: transformers' Auto classes and conventions, PEFT, the processor.

A published folder opens without running its code; what is saved is what was loaded; what does not fit is an
error that names it. The numbers themselves are in `test_model.py`.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    Qwen2Tokenizer,
    Wav2Vec2FeatureExtractor,
)

from mdl_toolkit.model import CheckpointError, MiDashengLMConfig, MiDashengLMModel, MiDashengLMProcessor
from tests.support.paths import CHECKPOINTS
from tests.support.waves import padded, wave

SMALL = CHECKPOINTS / "A-small"
AUDIO, BOS, EOS = "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"
END_OF_TURN, END_OF_TEXT = 485, 483  # of the small tokenizers
# peft 0.21 asks transformers 5.23 for a property by its old name.
OLD_NAME_IN_PEFT = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def fresh_model(folder: Path = SMALL, **kwargs: Any) -> MiDashengLMModel:
    return AutoModelForCausalLM.from_pretrained(folder, **kwargs)


@pytest.fixture
def model() -> MiDashengLMModel:
    return fresh_model()


@cache
def the_processor() -> MiDashengLMProcessor:
    return AutoProcessor.from_pretrained(SMALL)


@pytest.fixture
def processor() -> MiDashengLMProcessor:
    return the_processor()


def questions(*rows: tuple[str, np.ndarray]) -> dict[str, Tensor]:
    """Model inputs for prompts about clips."""
    texts = [f"<|im_start|>user\n{AUDIO}{text}<|im_end|>\n<|im_start|>assistant\n" for text, _ in rows]
    return dict(the_processor()(text=texts, audio=[clip for _, clip in rows]))


def rewritten(
    folder: Path,
    source: Path = SMALL,
    tensors: Callable[[dict[str, Tensor]], Any] = lambda _: None,
    config: Callable[[dict[str, Any]], Any] = lambda _: None,
) -> Path:
    """A copy of a checkpoint with changed tensors or configuration."""
    shutil.copytree(source, folder)
    weights = load_file(folder / "model.safetensors")
    tensors(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    config(content)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


# --- opening a folder ---


@pytest.fixture
def hostile(tmp_path: Path) -> tuple[Path, Path]:
    """A published folder whose code leaves a mark when it runs, and the place of the mark."""
    folder, mark = tmp_path / "hostile", tmp_path / "it-ran"
    shutil.copytree(SMALL, folder)
    for part in ("configuration", "modeling", "processing"):
        code = f"open({str(mark)!r}, 'w').close()\nraise RuntimeError('code of the checkpoint ran')\n"
        (folder / f"{part}_midashenglm.py").write_text(code)
    assert "auto_map" in json.loads((folder / "config.json").read_text())
    assert "auto_map" in json.loads((folder / "processor_config.json").read_text())
    return folder, mark


@pytest.mark.parametrize("trust", [None, False, True])
@pytest.mark.parametrize(
    ("auto", "wanted"),
    [
        (AutoConfig, MiDashengLMConfig),
        (AutoModelForCausalLM, MiDashengLMModel),
        (AutoProcessor, MiDashengLMProcessor),
        (AutoTokenizer, Qwen2Tokenizer),
    ],
)
def test_auto_classes_run_no_code_of_a_checkpoint(
    auto: Any, wanted: type, trust: bool | None, hostile: tuple[Path, Path]
):
    folder, mark = hostile
    settings = {} if trust is None else {"trust_remote_code": trust}
    assert type(auto.from_pretrained(folder, **settings)) is wanted
    assert not mark.exists()


def test_config_reads_the_published_keys():
    config = AutoConfig.from_pretrained(SMALL)
    audio, text = config.parts
    assert (config.model_type, config.subsample_factor, config.audio_token_id) == ("midashenglm", 5, 486)
    assert (audio.model_type, audio.embed_dim, audio.chunk_patches) == (
        "midashenglm_dasheng_encoder",
        48,
        252,
    )
    assert (text.model_type, text.hidden_size) == ("qwen2_5_omni_text", 64)


def test_config_defaults_are_those_of_absent_keys():
    audio, text = MiDashengLMConfig().parts
    assert (audio.embed_dim, audio.depth, audio.num_heads, audio.target_length) == (768, 12, 12, 1012)
    assert (audio.patch_size, audio.patch_stride, audio.init_values) == (16, 16, None)
    assert (audio.n_fft, audio.win_length, audio.hop_length, audio.n_mels) == (512, 512, 160, 64)
    assert text.model_type == "qwen2_5_omni_text"


@pytest.mark.parametrize("kind", ["llama", "no_such_model"])
def test_another_kind_of_decoder_is_refused(kind: str, tmp_path: Path):
    folder = rewritten(tmp_path / "m", config=lambda c: c["text_config"].update(model_type=kind))
    with pytest.raises(ValueError, match=f"'{kind}' is not one of qwen2_5_omni_text, qwen2, qwen3"):
        fresh_model(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("patch_size", 16),
        ("patch_stride", [64, 2]),
        ("input_channels", 2),
        ("center", False),
        ("drop_rate", 0.1),
    ],
)
def test_an_encoder_that_we_do_not_compute_is_refused(key: str, value: Any, tmp_path: Path):
    folder = rewritten(tmp_path / "m", config=lambda c: c["audio_encoder_config"].update({key: value}))
    with pytest.raises(ValueError, match=r"audio_encoder_config\.\w+ = .* is not supported"):
        fresh_model(folder)


def test_a_new_model_is_initialised(model: MiDashengLMModel):
    new = AutoModelForCausalLM.from_config(model.config)
    assert all(t.isfinite().all() for t in new.state_dict().values())
    assert new.audio_encoder.time_pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.all(new.audio_encoder.init_bn.running_var == 1)


# --- checkpoints that do not fit ---


def test_an_unknown_tensor_is_named(tmp_path: Path):
    extra = {"audio_encoder.acoustic.conv.weight": torch.ones(2)}
    folder = rewritten(tmp_path / "m", tensors=lambda t: t.update(extra))
    with pytest.raises(CheckpointError, match=r"unknown: audio_encoder\.acoustic\.conv\.weight"):
        fresh_model(folder)


@pytest.mark.parametrize(
    "name",
    ["audio_encoder.norm.weight", "audio_encoder.init_bn.running_mean", "decoder.lm_head.weight"],
)
def test_a_missing_tensor_is_named(name: str, tmp_path: Path):
    folder = rewritten(tmp_path / "m", tensors=lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match=f"missing: {name}"):
        fresh_model(folder)


@pytest.mark.parametrize("settings", [{}, {"ignore_mismatched_sizes": True}])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(settings: dict[str, Any], tmp_path: Path):
    wrong = {"audio_projector.net.0.bias": torch.ones(2)}
    folder = rewritten(tmp_path / "m", tensors=lambda t: t.update(wrong))
    message = r"of another shape: audio_projector\.net\.0\.bias \[2\] instead of \[64\]"
    with pytest.raises(CheckpointError, match=message):
        fresh_model(folder, **settings)


def test_everything_wrong_is_said_in_one_go(tmp_path: Path):
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["audio_encoder.norm.gain"] = tensors.pop("audio_encoder.norm.weight")
        tensors["audio_projector.net.0.bias"] = torch.ones(2)

    folder = rewritten(tmp_path / "m", tensors=spoil)
    with pytest.raises(CheckpointError) as error:
        fresh_model(folder)
    for part in (str(folder), "norm.gain", "norm.weight", "net.0.bias"):
        assert part in str(error.value)


def test_constants_of_an_old_front_end_are_ignored(tmp_path: Path):
    old = {"audio_encoder.front_end.0.spectrogram.window": torch.ones(512)}
    folder = rewritten(tmp_path / "m", tensors=lambda t: t.update(old))
    model, info = fresh_model(folder, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not any("front_end" in name for name in model.state_dict())


def test_the_first_argument_may_be_given_by_name():
    assert MiDashengLMModel.from_pretrained(pretrained_model_name_or_path=SMALL).dtype == torch.float32


# --- saving ---


@pytest.mark.parametrize("shards", ["one file", "many files"])
@pytest.mark.parametrize("name", ["A-small", "B-small", "B-small-tied"])
def test_what_is_saved_is_what_was_loaded(name: str, shards: str, tmp_path: Path):
    model = fresh_model(CHECKPOINTS / name)
    model.save_pretrained(tmp_path, **({} if shards == "one file" else {"max_shard_size": "100KB"}))
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (shards == "many files")
    saved = {key: tensor for file in files for key, tensor in load_file(file).items()}
    original = load_file(CHECKPOINTS / name / "model.safetensors")
    assert saved.keys() == original.keys()
    for key, tensor in original.items():
        assert saved[key].dtype == tensor.dtype
        assert torch.equal(saved[key], tensor), key
    again = fresh_model(tmp_path)
    assert again.config.to_json_string() == model.config.to_json_string()
    assert again.generation_config.to_dict() == model.generation_config.to_dict()
    assert again.state_dict().keys() == model.state_dict().keys()


def test_saved_config_keeps_the_published_keys(tmp_path: Path):
    fresh_model().save_pretrained(tmp_path)
    saved, original = (json.loads((f / "config.json").read_text()) for f in (tmp_path, SMALL))
    added_by_transformers = {"transformers_version", "text_config", "audio_encoder_config"}
    for key in original.keys() - added_by_transformers:
        assert saved[key] == original[key]
    for part in ("text_config", "audio_encoder_config"):
        renamed = {"rope_scaling", "rope_theta"}  # now rope_parameters
        for key in original[part].keys() - renamed:
            assert saved[part][key] == original[part][key]
    assert saved["text_config"]["model_type"] == "qwen2_5_omni_text"
    assert saved["text_config"]["rope_parameters"]["rope_theta"] == original["text_config"]["rope_theta"]
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (
        [END_OF_TURN, END_OF_TEXT],
        END_OF_TEXT,
    )


def test_saving_in_bfloat16_keeps_the_kind_of_every_tensor(tmp_path: Path):
    fresh_model(dtype=torch.bfloat16).save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    frozen = {key: tensor.dtype for key, tensor in saved.items() if ".init_bn." in key}
    assert frozen.pop("audio_encoder.init_bn.num_batches_tracked") == torch.int64
    assert set(frozen.values()) == {torch.float32}
    assert {tensor.dtype for key, tensor in saved.items() if ".init_bn." not in key} == {torch.bfloat16}


def test_tied_embeddings_stay_tied(tmp_path: Path):
    fresh_model(CHECKPOINTS / "B-small-tied").save_pretrained(tmp_path)
    assert "decoder.lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = fresh_model(tmp_path)
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert again.config.tie_word_embeddings is again.config.text_config.tie_word_embeddings is True
    loose = fresh_model()
    assert loose.get_output_embeddings().weight is not loose.get_input_embeddings().weight


@pytest.mark.parametrize("where", ["the whole", "the decoder"])
def test_tying_may_be_said_of_the_whole_or_of_the_decoder(where: str, tmp_path: Path):
    def say(config: dict[str, Any]) -> None:
        del config["text_config"]["tie_word_embeddings"]
        (config if where == "the whole" else config["text_config"])["tie_word_embeddings"] = True

    model = fresh_model(rewritten(tmp_path / "m", CHECKPOINTS / "B-small-tied", config=say))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


# --- inputs that do not fit ---


def test_placeholders_and_features_must_be_as_many(model: MiDashengLMModel):
    batch = questions(("What?", wave(16000, 1)))
    with pytest.raises(ValueError, match="5 audio placeholders, but the clips give 2 features"):
        model(**{**batch, "audio_length": torch.tensor([6400])})
    with pytest.raises(ValueError, match="5 audio placeholders, but the clips give 0 features"):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (256, "clip 1 has 256 samples; from 257 to 16000"),
        (16001, "clip 1 has 16001 samples; from 257 to 16000"),
    ],
)
def test_an_impossible_length_is_named(length: int, message: str, model: MiDashengLMModel):
    clips = torch.tensor(padded([wave(16000, 1), wave(3200, 2)]))
    with pytest.raises(ValueError, match=message):
        model.audio_features(clips, torch.tensor([16000, length]))


def test_clips_and_lengths_must_be_as_many(model: MiDashengLMModel):
    with pytest.raises(ValueError, match=r"input_values \[2, 16000\] do not match 1 audio lengths"):
        model.audio_features(torch.zeros(2, 16000), torch.tensor([16000]))


def test_lengths_may_be_left_out(model: MiDashengLMModel):
    batch = questions(("What?", wave(16000, 1)))
    wanted = model(**batch).logits
    del batch["audio_length"]
    assert torch.equal(model(**batch).logits, wanted)


def test_neither_ids_nor_embeddings_is_an_error(model: MiDashengLMModel):
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        model(labels=torch.ones(1, 2))
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        model.generate()


def test_text_alone_is_possible(model: MiDashengLMModel):
    ids = torch.tensor([[1, 2, 3]])
    assert model(input_ids=ids).logits.shape == (1, 3, 512)
    assert torch.equal(
        model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(input_ids=ids).logits
    )


# --- generate ---

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
CLIPS = [
    ("What?", wave(16000, 1)),
    ("What is the category of this sound?", wave(3200, 2)),
    ("", wave(40000, 3)),
]


def plain_greedy(model: MiDashengLMModel, batch: dict[str, Tensor], steps: int) -> list[int]:
    """Answer a single prompt without a cache, one whole forward pass per token."""
    ids = batch["input_ids"]
    for _ in range(steps):
        audio = {"input_values": batch["input_values"], "audio_length": batch["audio_length"]}
        best = model(input_ids=ids, **audio).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, best], dim=1)
    return ids[0, -steps:].tolist()


@torch.no_grad()
def test_generate_gives_the_new_tokens_only_in_any_company(model: MiDashengLMModel):
    alone = [model.generate(**questions(row), **GREEDY)[0].tolist() for row in CLIPS]
    together = model.generate(**questions(*CLIPS), **GREEDY)
    assert together.tolist() == alone
    assert alone[0] == plain_greedy(model, questions(CLIPS[0]), 6)


@OLD_NAME_IN_PEFT
@torch.no_grad()
@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_generate_works_through_peft(task: str | None, model: MiDashengLMModel):
    without = model.generate(**questions(*CLIPS), **GREEDY)
    torch.manual_seed(0)
    targets = r"(decoder|audio_encoder).*\.(q_proj|fc1)"
    config = LoraConfig(r=4, lora_alpha=64, target_modules=targets, init_lora_weights=False, task_type=task)
    adapted = get_peft_model(model, config)
    answers = adapted.generate(**questions(*CLIPS), **GREEDY)
    assert answers.shape == without.shape
    assert not torch.equal(answers, without)
    assert answers[0].tolist() == plain_greedy(adapted, questions(CLIPS[0]), 6)
    merged = adapted.merge_and_unload()
    assert torch.equal(merged.generate(**questions(*CLIPS), **GREEDY), answers)
    labels = {"labels": questions(CLIPS[0])["input_ids"]}
    assert adapted(**questions(CLIPS[0]), **labels).loss.isfinite()


def test_beams_find_an_answer_no_less_likely(model: MiDashengLMModel):
    batch, likelihood = questions(CLIPS[0]), {}
    for beams in (1, 2, 4):
        answer = model.generate(**batch, **GREEDY, num_beams=beams)
        assert answer.shape == (1, 6)
        ids = torch.cat([batch["input_ids"], answer], dim=1)
        logits = model(**{**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}).logits[0, -7:-1]
        likelihood[beams] = logits.log_softmax(-1).gather(1, answer[0, :, None]).sum().item()
    assert likelihood[4] >= likelihood[1]
    assert model.generate(**questions(*CLIPS), **GREEDY, num_beams=2).shape == (3, 6)


def test_generation_config_of_the_folder_applies(model: MiDashengLMModel):
    assert model.generation_config.eos_token_id == [END_OF_TURN, END_OF_TEXT]
    free = model.generate(**questions(CLIPS[0]), **GREEDY)[0].tolist()
    model.generation_config.eos_token_id = free[2]
    assert model.generate(**questions(CLIPS[0]), max_new_tokens=6)[0].tolist() == free[:3]


def test_a_generation_config_given_adds_to_that_of_the_folder(model: MiDashengLMModel):
    free = model.generate(**questions(CLIPS[0]), **GREEDY)[0].tolist()
    given = GenerationConfig(max_new_tokens=5, do_sample=False)
    assert model.generate(**questions(CLIPS[0]), generation_config=given)[0].tolist() == free[:5]
    model.generation_config.eos_token_id = free[2]
    assert model.generate(**questions(CLIPS[0]), generation_config=given)[0].tolist() == free[:3]
    other = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=free[1])
    assert model.generate(**questions(CLIPS[0]), generation_config=other)[0].tolist() == free[:2]
    assert given.eos_token_id is None  # what was given is not written to


def test_no_end_token_means_none_whatever_the_decoder_says(model: MiDashengLMModel, tmp_path: Path):
    free = model.generate(**questions(CLIPS[0]), **GREEDY)[0].tolist()
    folder = rewritten(tmp_path / "m", config=lambda c: c["text_config"].update(eos_token_id=free[2]))
    assert fresh_model(folder).generate(**questions(CLIPS[0]), **GREEDY)[0].tolist() == free
    (folder / "generation_config.json").unlink()
    without_file = fresh_model(folder)  # then the configuration speaks, as in transformers
    settings = {"max_new_tokens": 6, "pad_token_id": END_OF_TEXT}
    assert without_file.generate(**questions(CLIPS[0]), **settings)[0].tolist() == free[:3]
    assert without_file.generate(**questions(CLIPS[0]), **GREEDY)[0].tolist() == free


def test_generate_returns_a_dict_when_asked(model: MiDashengLMModel):
    out = model.generate(**questions(CLIPS[0]), **GREEDY, return_dict_in_generate=True, output_scores=True)
    assert out.sequences.shape == (1, 6)
    assert len(out.scores) == 6


# --- the processor ---


def test_processor_has_the_published_parts(processor: MiDashengLMProcessor):
    assert type(processor.feature_extractor) is Wav2Vec2FeatureExtractor
    assert type(processor.tokenizer) is Qwen2Tokenizer
    assert processor.chat_template == (SMALL / "chat_template.jinja").read_text()
    assert (processor.audio_token, processor.audio_bos_token, processor.audio_eos_token) == (AUDIO, BOS, EOS)
    assert set(processor(text=AUDIO, audio=wave(3200, 1))) == set(processor.model_input_names)


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        (f"a {AUDIO} b", f"a {BOS}{AUDIO * 5}{EOS} b"),
        (f"{BOS}{AUDIO}{EOS}b", f"{BOS}{AUDIO * 5}{EOS}b"),
        (f"{BOS}{AUDIO}b", f"{BOS}{AUDIO * 5}b"),
        (f"a{AUDIO}{EOS}", f"a{AUDIO * 5}{EOS}"),
        (f"{BOS} {AUDIO}", f"{BOS} {BOS}{AUDIO * 5}{EOS}"),
    ],
)
def test_a_placeholder_is_repeated_and_marked_where_it_is_not(
    text: str, expanded: str, processor: MiDashengLMProcessor
):
    ids = processor(text=text, audio=wave(16000, 1))["input_ids"]
    assert processor.batch_decode(ids) == [expanded]
    assert ids.tolist() == [processor.tokenizer(expanded)["input_ids"]]


def test_placeholders_take_the_clips_in_order(processor: MiDashengLMProcessor):
    clips = [wave(3200, 1), wave(6400, 2), wave(16000, 3)]
    out = processor(text=[f"{AUDIO}{AUDIO}", f"a{AUDIO}"], audio=clips)
    decoded = processor.batch_decode(out["input_ids"])
    assert decoded[0].endswith(f"{BOS}{AUDIO}{EOS}{BOS}{AUDIO * 2}{EOS}")
    assert decoded[1].endswith(f"a{BOS}{AUDIO * 5}{EOS}")
    assert out["audio_length"].tolist() == [3200, 6400, 16000]


def test_text_is_padded_on_the_left_and_clips_on_the_right(processor: MiDashengLMProcessor):
    clips = [wave(3200, 1), wave(16000, 2)]
    out = processor(text=[AUDIO, f"a {AUDIO} b"], audio=clips, sampling_rate=16000)
    assert (
        out["input_ids"][0].tolist()
        == [END_OF_TEXT] * 7 + processor.tokenizer(f"{BOS}{AUDIO}{EOS}")["input_ids"]
    )
    assert out["attention_mask"].tolist() == [[0] * 7 + [1] * 3, [1] * 10]
    assert out["input_values"].dtype == torch.float32
    np.testing.assert_array_equal(out["input_values"].numpy(), padded(clips))
    assert out["audio_length"].dtype == torch.int64
    assert out["audio_length"].tolist() == [3200, 16000]


@pytest.mark.parametrize(
    "kind", [list, torch.tensor, lambda clip: clip.astype(np.float64), lambda clip: clip[None]]
)
def test_a_clip_may_come_in_many_kinds(kind: Callable[[np.ndarray], Any], processor: MiDashengLMProcessor):
    clip = wave(3200, 1)
    out = processor(text=AUDIO, audio=kind(clip))
    np.testing.assert_array_equal(out["input_values"].numpy(), clip[None])


def test_an_array_of_clips_is_several_clips(processor: MiDashengLMProcessor):
    out = processor(text=[AUDIO, AUDIO], audio=np.stack([wave(3200, 1), wave(3200, 2)]))
    assert out["audio_length"].tolist() == [3200, 3200]


def test_text_or_audio_alone_is_possible(processor: MiDashengLMProcessor):
    assert set(processor("hello")) == {"input_ids", "attention_mask"}
    assert processor("hello", return_tensors=None)["input_ids"] == [processor.tokenizer("hello")["input_ids"]]
    assert set(processor(audio=[wave(3200, 1)])) == {"input_values", "audio_length"}
    unpadded = processor(text=["a", "bcd"], text_kwargs={"padding": False}, return_tensors=None)
    assert [len(ids) for ids in unpadded["input_ids"]] == [1, 3]


@pytest.mark.parametrize("settings", [{"sampling_rate": 8000}, {"audio_kwargs": {"sampling_rate": 8000}}])
def test_a_wrong_rate_is_refused(settings: dict[str, Any], processor: MiDashengLMProcessor):
    with pytest.raises(ValueError, match="8000 Hz: the model wants 16000 Hz"):
        processor(text=AUDIO, audio=wave(3200, 1), **settings)


def test_placeholders_and_clips_must_be_as_many(processor: MiDashengLMProcessor):
    with pytest.raises(ValueError, match=r"2 <\|AUDIO\|> placeholders for 1 clips"):
        processor(text=[AUDIO, f"a{AUDIO}"], audio=wave(3200, 1))
    with pytest.raises(ValueError, match=r"0 <\|AUDIO\|> placeholders for 1 clips"):
        processor(text="a", audio=wave(3200, 1))


def test_a_clip_with_channels_is_refused(processor: MiDashengLMProcessor):
    with pytest.raises(ValueError, match=r"shape \[2, 3200\]; one channel"):
        processor(text=AUDIO, audio=[np.zeros((2, 3200), np.float32)])


def conversation(*audio: dict[str, Any]) -> list[dict[str, Any]]:
    parts = [{"type": "audio", **part} for part in audio]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "Caption the audio."}]}]


RENDERED = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    f"{BOS}{AUDIO * 5}{EOS}Caption the audio.<|im_end|>\n<|im_start|>assistant\n"
)


def test_chat_template_takes_arrays(processor: MiDashengLMProcessor, model: MiDashengLMModel):
    turn = conversation({"audio": wave(16000, 1)})
    settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    out = processor.apply_chat_template(turn, **settings)
    assert processor.batch_decode(out["input_ids"]) == [RENDERED]
    assert out["audio_length"].tolist() == [16000]
    assert model.generate(**out, **GREEDY).shape == (1, 6)
    text = processor.apply_chat_template(turn, add_generation_prompt=True)
    assert text == RENDERED.replace(AUDIO * 5, AUDIO)
    two = conversation({"audio": wave(3200, 1)}, {"audio": wave(16000, 1)})
    several = processor.apply_chat_template([two, turn], **settings)
    assert several["audio_length"].tolist() == [3200, 16000, 16000]
    assert model.generate(**several, **GREEDY).shape == (2, 6)


@pytest.mark.skipif(version("transformers") < "5.20", reason="its load_audio needs librosa")
def test_chat_template_takes_paths(processor: MiDashengLMProcessor, tmp_path: Path):
    clip = wave(16000, 1)
    soundfile.write(tmp_path / "a.wav", clip, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "b.wav", clip[::2], 8000, subtype="FLOAT")
    for name in ("a.wav", "b.wav"):  # the second is resampled
        turn = conversation({"path": str(tmp_path / name)})
        settings = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
        out = processor.apply_chat_template(turn, **settings)
        assert processor.batch_decode(out["input_ids"]) == [RENDERED]
        assert out["audio_length"].tolist() == [16000]


def test_processor_round_trip(processor: MiDashengLMProcessor, tmp_path: Path):
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is MiDashengLMProcessor
    assert again.to_dict() == processor.to_dict()
    assert again.chat_template == processor.chat_template
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    inputs = {"text": [AUDIO, f"a {AUDIO} 狗"], "audio": [wave(3200, 1), wave(16000, 2)]}
    wanted, got = processor(**inputs), again(**inputs)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_processor_opens_a_folder_without_its_own_file(tmp_path: Path):
    folder = tmp_path / "m"
    shutil.copytree(SMALL, folder)
    (folder / "processor_config.json").unlink()
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is MiDashengLMProcessor
    assert (processor.audio_token, processor.model_subsampling) == (AUDIO, 5)


# --- imports ---


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import mdl_toolkit.model.lengths", {"torch", "transformers", "numpy"}),
        ("import mdl_toolkit.model", {"torch", "transformers", "numpy"}),
    ],
)
def test_lengths_can_be_imported_without_torch(statement: str, absent: set[str]):
    code = f"import sys; {statement}; print(sorted({absent!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_that_the_room_does_not_have():
    import mdl_toolkit.model as room

    with pytest.raises(AttributeError, match="no attribute 'Whisper'"):
        _ = room.Whisper
    assert issubclass(room.MiDashengLMConfig, PreTrainedConfig)
