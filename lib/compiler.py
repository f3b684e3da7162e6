"""torch.compile: whether it works here, and its processes."""
import signal

import torch
from torch._functorch import config as functorch_config

from lib.cli import STOPS

COMPILED_SHAPES = 32    # past this limit torch.compile compiles no more; DMT has several shapes


def configure():
    """Set torch.compile's options: number of shapes, and a backward pass outside of autocast."""
    torch._dynamo.config.cache_size_limit = COMPILED_SHAPES
    if hasattr(functorch_config, "backward_pass_autocast"):     # not in every version
        functorch_config.backward_pass_autocast = "off"


def compile_failure(device):
    """Why torch.compile fails here, in a line, "" if it works: it needs a C++ compiler, on CUDA Triton."""
    configure()
    try:
        if device.type == "cuda":
            start_compile_workers()
        torch.compile(torch.square)(torch.ones(8, device=device))
        return ""
    except Exception as error:  # noqa: BLE001  compilers fail in many ways
        return " ".join(str(error).split())[:120]


def start_compile_workers():
    """Start torch.compile's processes, which build kernels for a GPU, deaf to the signals that stop a run.

    A signal to all processes of a run would end them, too, and the run would wait for them forever.
    """
    from torch._inductor.async_compile import AsyncCompile
    known = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)         # which they inherit
    try:
        AsyncCompile.warm_pool()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, known)
