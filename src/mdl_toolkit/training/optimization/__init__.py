"""How a run changes the weights: when, at which learning rate, by which optimizer.

Modules:
    schedule      steps, warm-up, learning rate, when to save and to evaluate
    expectation   what so few steps can teach, in words
    row_shares    with `--shard-weights`: each process updates rows of the full copies
    optimizer     AdamW, its 8-bit kind, and their states as checkpoints keep them
"""
