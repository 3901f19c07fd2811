"""Format `npz`: a NumPy archive with the integers of every layer, and config.json beside it."""

import numpy
import torch

import autoround_core as core


class NpzFormat(core.CheckpointFormat):
    name, summary = "npz", "NumPy, for looking at the integers"

    def why_not(self, spec):
        return None if spec.scheme.data_type == "int" else f"stores integers, not {spec.scheme.data_type}"

    def open(self, directory, context):
        return Writer(directory, context.config)

    def recognizes(self, directory):
        return (directory / "weights.npz").is_file()

    def read(self, directory):
        return Reader(directory)


class Writer(core.CheckpointWriter):
    def __init__(self, directory, config):
        self.directory, self.config, self.arrays, self.schemes = directory, config, {}, {}

    def add(self, layer):
        self.schemes[layer.name] = str(layer.weight.scheme)
        for part, tensor in {**layer.weight.tensors(), "bias": layer.bias}.items():
            if tensor is not None:
                self.keep(f"{layer.name}|{part}", tensor)

    def keep(self, name, tensor):
        if tensor.dtype == torch.bfloat16:  # NumPy has none: its bits travel as int16
            name, tensor = f"{name}:bf16", tensor.view(torch.int16)
        self.arrays[name] = tensor.detach().cpu().numpy().copy()  # the model goes on changing

    def finish(self):
        numpy.savez(self.directory / "weights.npz", **self.arrays)
        quantization = {"quant_method": "npz", "schemes": self.schemes}
        core.write_json(self.directory / "config.json", {**self.config, "quantization_config": quantization})


class Reader(core.CheckpointReader):
    def __init__(self, directory):
        self.config = core.read_json(directory / "config.json")
        try:
            arrays = dict(numpy.load(directory / "weights.npz"))  # refuses pickles
        except Exception as error:  # NumPy and zipfile raise half a dozen types
            raise core.CheckpointError(f"`{directory}` holds no readable weights.npz: {error}") from None
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        self.tensors = {name.removesuffix(":bf16"): tensor.view(torch.bfloat16) if ":bf16" in name else tensor
                        for name, tensor in tensors.items()}

    def layers(self):
        for name, scheme in self.config["quantization_config"]["schemes"].items():
            fields = [self.tensors[f"{name}|{part}"] for part in ("codes", "scale", "zero_point")]
            weight = core.AffineWeight(core.QuantScheme.parse(scheme), *fields)
            yield core.QuantizedLayer(name, weight, self.tensors.get(f"{name}|bias"))

    def rest(self):
        return ((name, tensor) for name, tensor in self.tensors.items() if "|" not in name)
