"""Inference backends of AutoRound, found through the entry point `backends`.

Importing this package lets `from_pretrained` of Transformers load checkpoints with our kernels, see
`transformers_loader`; Transformers itself is not imported by it.
"""

import _autoround_backends_autoload

_autoround_backends_autoload.install()
