"""Merge an adapter, trained before or by others, and its base into one model."""

from functools import partial
from pathlib import Path

from mdl_toolkit.config.train import MergeOptions
from mdl_toolkit.config.yaml import to_yaml
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.inference.verify import synthesize_samples, verify_merge
from mdl_toolkit.training.result import training_of
from mdl_toolkit.training.warm_start import find_adapter
from mdl_toolkit.utils.console import say
from mdl_toolkit.utils.files import check_apart
from mdl_toolkit.utils.ownership import check_output_folder
from mdl_toolkit.weights.loading import base_of, quiet_libraries, recorded_base
from mdl_toolkit.weights.merge import export_merged
from mdl_toolkit.weights.model_card import ResultMetadata
from mdl_toolkit.weights.provenance import Base, Provenance, read_provenance
from mdl_toolkit.weights.resolve import recorded_name
from mdl_toolkit.weights.tokenizer_files import read_tokenizer_files


def merge_adapter(options: MergeOptions) -> Path:
    """Merge an adapter into its base, and write the model.

    Returns:
        The folder of the merged model.

    Raises:
        ToolkitError: adapter or base are not to be had, do not belong together, or give another result.

    Example:
        ```python
        from mdl_toolkit import MergeOptions, merge_adapter

        merged = merge_adapter(MergeOptions(adapter="run/final", output="merged"))
        print(sorted(path.name for path in merged.iterdir()))
        ```
    """
    output = Path(options.output)
    check_output_folder(output, options.COMMAND)
    adapter = find_adapter(options.adapter, from_modelscope=options.from_modelscope)
    check_apart(output, adapter)
    base = base_of(adapter, from_modelscope=options.from_modelscope, name=options.model_name)
    check_apart(output, base)
    quiet_libraries()
    origin = read_provenance(adapter)
    if origin is None:
        name = options.model_name or recorded_base(adapter)
        origin = Provenance(Base.of(base, recorded_name(name, base)))
    about = ResultMetadata(origin, training_of(adapter), to_yaml(options))
    verify = None
    if options.verify:
        samples = synthesize_samples(ChatTokenizer(read_tokenizer_files(base)), origin.prompts)
        verify = partial(verify_merge, base, adapter, samples=samples) if samples else None
    export_merged(base, adapter, output, about, verify=verify, dtype=options.dtype, kind=options.COMMAND)
    say("done: the merged model is in {output}", output=output)
    return output
