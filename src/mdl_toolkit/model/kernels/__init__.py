"""Replace operations at which torch's plain ones are slow or large; tests compare each with the plain way.

Modules:
    attention       attend within chunks of different lengths, on a CPU without padding
    cross_entropy   sum the loss over a large vocabulary in the memory of a few logits, on any device
    norms           normalise in one kernel where a device has one
    matmul          lay weights out once, for inference on a CPU in float32

Other kernels for CPUs were measured and gained under 3 %.
"""
