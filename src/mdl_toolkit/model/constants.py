"""Define numbers that the model and the toolkit must agree on, without importing torch."""

# Hz, of the audio that the model takes.
SAMPLE_RATE = 16_000
# Seconds of the longest recordings that the authors of the published models give figures for.
MEASURED_SECONDS = 30
# The label of a token that is not supervised; cross entropy skips it, in transformers' models too.
IGNORE_INDEX = -100
# Logits that exist at once: 2**26 float32 are 256 MiB, or those of 441 tokens in a vocabulary of 152,064.
MOST_LOGITS = 2**26
# The token in the place of audio, where a configuration does not say it.
AUDIO_TOKEN_ID = 151_646
# The kinds of decoder that a MiDashengLM has, as `text_config.model_type` names them.
TEXT_MODEL_TYPES = ("qwen2_5_omni_text", "qwen2", "qwen3")
# The module of the encoder in one with an acoustic branch, where its configuration does not name it.
SEMANTIC_MODULE = "model"
