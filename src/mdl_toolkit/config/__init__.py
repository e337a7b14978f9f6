"""Options: what the commands accept, on the command line, in YAML and in Python.

Modules:
    types        how a value is spelled, and which values are accepted
    options      one option, and the base class of all options
    other_names  what is meant by a name that is no option
    yaml         options to and from YAML
    data         `ConvertOptions`, `CheckOptions` and what several commands share
    train        `TrainOptions`, `MergeOptions`
    inference    `InferenceOptions`
    evaluation   `EvaluateOptions`, `ReportOptions`
    serving      `ServeOptions`, `PushOptions`
"""
