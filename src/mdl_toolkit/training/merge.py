"""Merge an adapter, trained before or by others, and its base into one model."""

from functools import partial
from pathlib import Path

from mdl_toolkit.config.train import MergeOptions
from mdl_toolkit.config.yaml import to_yaml
from mdl_toolkit.data.tokenization import ChatTokenizer
from mdl_toolkit.errors import ModelError
from mdl_toolkit.inference.verify import synthesize_samples, verify_merge
from mdl_toolkit.training.checkpoints import CHECKSUMS, damage
from mdl_toolkit.training.result import training_of
from mdl_toolkit.utils.console import say
from mdl_toolkit.utils.files import check_apart
from mdl_toolkit.utils.ownership import check_output_folder
from mdl_toolkit.weights.loading import base_of, quiet_libraries
from mdl_toolkit.weights.merge import export_merged
from mdl_toolkit.weights.model_card import ResultMetadata
from mdl_toolkit.weights.provenance import Base, Provenance, read_provenance
from mdl_toolkit.weights.resolve import (
    ADAPTER_CONFIG,
    BASE_NAME,
    check_is_no_run,
    find_model,
    read_json,
    recorded_name,
)
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
    adapter = _find_adapter(options)
    check_apart(output, adapter)
    base = base_of(adapter, from_modelscope=options.from_modelscope, name=options.model_name)
    check_apart(output, base)
    quiet_libraries()
    origin = read_provenance(adapter)
    if origin is None:
        name = options.model_name or read_json(adapter / ADAPTER_CONFIG)[BASE_NAME]
        origin = Provenance(Base.of(base, recorded_name(name, base)))
    about = ResultMetadata(origin, training_of(adapter), to_yaml(options))
    verify = None
    if options.verify:
        samples = synthesize_samples(ChatTokenizer(read_tokenizer_files(base)), origin.prompts)
        verify = partial(verify_merge, base, adapter, samples=samples) if samples else None
    export_merged(base, adapter, output, about, verify=verify, dtype=options.dtype, kind=options.COMMAND)
    say("done: the merged model is in {output}", output=output)
    return output


def _find_adapter(options: MergeOptions) -> Path:
    """Find the adapter's folder, downloading it if need be.

    Raises:
        ModelError: the adapter is not to be had, is no adapter, or is a damaged checkpoint.
    """
    local = Path(options.adapter).expanduser()
    if local.is_dir() and not (local / ADAPTER_CONFIG).is_file():
        check_is_no_run(local, ADAPTER_CONFIG)
        folder = local
    else:
        folder = find_model(options.adapter, from_modelscope=options.from_modelscope, weights=True)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            "{folder}: no adapter ({config}); give an adapter's folder, for example checkpoint-500",
            folder=folder,
            config=ADAPTER_CONFIG,
        )
    if (folder / CHECKSUMS).is_file() and (reason := damage(folder)):
        raise ModelError("{folder}: not a complete checkpoint ({reason})", folder=folder, reason=reason)
    return folder
