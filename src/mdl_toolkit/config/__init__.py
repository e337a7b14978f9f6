"""Options: what the commands accept, on the command line, in YAML and in Python.

Modules:
    types      how a value is spelled, and which values are accepted
    options    one option, and what all options classes share
    yaml       options to and from YAML
    data       `ConvertOptions`, `CheckOptions` and what several commands share
    train      `TrainOptions`
    results    options of the commands that use a trained model
"""
