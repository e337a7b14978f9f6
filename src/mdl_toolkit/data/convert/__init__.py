"""`convert-dataset`: rows to shards, by several processes, interruptible.

Modules:
    run           the command, and the conversion of rows for other commands
    plan          rows to shards before any recording is opened
    worker        one shard, in a worker process
    work_folder   what is finished, what is stale
    stats         what a conversion counts and tells
"""
