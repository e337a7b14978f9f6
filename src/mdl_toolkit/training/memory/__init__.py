"""Memory of a training: planned before weights are loaded, and what to do when it runs out.

Modules:
    plan          bytes of weights, adapters, optimizer and activations; what checkpointing may keep
    activations   activations of one step, in bytes
    forecast      memory, steps and arithmetic of a training, for `check`
    sharding      `--shard-weights`: each process keeps a share of every block
    oom           run in micro-batches, halving their size after each out-of-memory error
"""
