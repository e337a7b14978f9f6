"""`check`: a dry run over CSVs.

Modules:
    run        the command
    rows       what is noted of each row, in a worker process
    findings   these added up: lengths, duplicates, leaks
    text       the findings in words
"""
