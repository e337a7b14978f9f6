"""Hold the operations of the model that torch's plain ones are much slower or larger at, a module for each.

- `attention`: attend within chunks of different lengths (`chunked_attention`) without padding, on a CPU.
- `cross_entropy`: sum the loss over a large vocabulary (`head_loss`, `summed_cross_entropy`) in the memory of
  a few logits, on any device.
- `matmul`: lay weights out once (`prepack`) for answering on a CPU in float32.

Each stands beside the plain way in a test. Other kernels for CPUs were measured and gained under 3 %.
"""
