"""A network behind torch.compile, where that works. Owns: falling back. Must not know: cards, precision, images."""

from __future__ import annotations

import logging
from typing import Any

import torch

log = logging.getLogger(__name__)


class CompiledNetwork(torch.nn.Module):
    """Calls `network`, compiled for each shape of input on first sight of it; eagerly where it cannot be compiled.

    One shape costs from seconds to a minute, once; torch compiles a handful of shapes and runs later ones eagerly.
    Answers agree with the eager network's but for rounding. Warns once, in the log, where there is no compiler.
    """

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self._network = network
        # Without CUDA graphs (mode "reduce-overhead"): up to torch 2.13 those are kept for each thread, and fail by an
        # assertion in any but the first (pytorch issue 123177).
        self._compiled: Any = torch.compile(network, dynamic=False)

    def forward(self, inputs: torch.Tensor) -> Any:
        if self._compiled is not None:
            try:
                return self._compiled(inputs)
            except _compile_errors() as error:
                log.warning("torch.compile does not work here, running without it: %s", str(error).splitlines()[0])
                self._compiled = None
        return self._network(inputs)


def _compile_errors() -> tuple[type[Exception], ...]:
    """What torch raises where compiling, rather than the network, fails. Loaded late: it takes a second."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor import exc

    found: list[type[Exception]] = [TorchDynamoException]
    for name in ("InductorError", "CppCompileError", "InvalidCxxCompiler"):
        kind = getattr(exc, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            found.append(kind)
    return tuple(found)
