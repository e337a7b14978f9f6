"""Define the numbers that the model and everything around it must agree on; torch is not imported."""

# Hz, of the audio that the model's mel front end takes.
SAMPLE_RATE = 16_000
# A label where nothing is to be learnt; cross entropy skips it, in transformers' models too.
IGNORE_INDEX = -100
# Logits that exist at once: 2**26 float32 are 256 MiB, or 441 positions of 152,064 words.
MOST_LOGITS = 2**26
