"""CUDA graphs."""
import sys
import warnings
import weakref

import torch

GRAPH_DEVICE = "cuda"   # the kind of device that has CUDA graphs
MOST_GRAPHS = 32        # graphs of a training step: each holds gradients of all parameters


def captured(function):
    """function(module, *tensors), without gradients, from one CUDA graph for each module and each shape of
    the tensors.

    A step of an RNN is hundreds of small kernels that take longer to launch than to run: a graph is one
    launch of all of them. The graph reads the module's parameters where they are: they may change in place,
    but must not be replaced. function must not synchronise or draw random numbers, and returns a tensor or
    a tuple of tensors. On devices without graphs it is called as it is; so is it once a capture has failed,
    with a line on stderr.
    """
    graphs, failed = weakref.WeakKeyDictionary(), False     # module -> {shapes: (inputs, graph, output)}

    def call(module, *tensors):
        nonlocal failed
        if failed or tensors[0].device.type != GRAPH_DEVICE:
            with torch.inference_mode():
                output = function(module, *tensors)
            return copy_of(output)                      # outside: normal tensors, which may enter a loss
        with torch.inference_mode(False), torch.no_grad():
            captures = graphs.setdefault(module, {})
            shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]
            key = torch.is_autocast_enabled(GRAPH_DEVICE), *shapes
            if key not in captures:
                try:
                    captures[key] = capture(function, module, tensors)
                except RuntimeError as error:           # slower is better than not at all
                    failed = True
                    report(error)
            if failed:
                return copy_of(function(module, *tensors))
            inputs, graph, output = captures[key]
            for own, given in zip(inputs, tensors, strict=True):
                own.copy_(given)
            graph.replay()
            return copy_of(output)
    return call


def report(error):
    """Say why a capture has failed; raise if memory has run out."""
    cause = error.__context__ or error      # the end of a broken capture raises, too
    if isinstance(cause, torch.OutOfMemoryError):
        raise cause
    print(f"note: no CUDA graphs, the RNN is slow: {(str(cause).splitlines() or [''])[0]}", file=sys.stderr)


class Bound(torch.nn.Module):
    """function(module, ...) as a module: DDP and CUDA graphs find the parameters in it."""

    def __init__(self, function, module):
        super().__init__()
        self.function, self.module = function, module

    def forward(self, *arguments):
        return self.function(self.module, *arguments)


def captured_with_gradients(function, module, inputs):
    """Calls of function(module, *tensors), one for each of inputs: a CUDA graph each, forward and backward.

    inputs: tuples of sample tensors, whose shapes and types stay. The calls share memory: make all of them in
    this order, each once, then go backward. A result lasts until the same call is made again. function
    enters autocast, without its cache: the backward pass is to run outside. As for `captured`, parameters may
    change in place only, and function must not synchronise or draw random numbers. () on devices without
    graphs and for more than MOST_GRAPHS calls; also, with a line on stderr, where the capture fails.
    """
    if inputs[0][0].device.type != GRAPH_DEVICE or len(inputs) > MOST_GRAPHS:
        return ()
    modules = tuple(Bound(function, module) for _ in inputs)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)    # of the warm-up's stream, which has ended
            calls = torch.cuda.make_graphed_callables(modules, tuple(inputs))
    except RuntimeError as error:
        report(error)
        return ()
    for p in module.parameters():
        p.register_hook(torch.clone)        # the next replay writes to the gradients that this one returned
    return calls


def copy_of(output):
    """A copy of a tensor, or of a tuple of tensors."""
    return tuple(map(torch.clone, output)) if isinstance(output, tuple) else output.clone()


def capture(function, module, tensors):
    """A CUDA graph of function(module, *tensors): the tensors it reads, the graph, and what a replay writes
    its result to.

    Autocast is entered inside, without its cache: a cast of a weight that was cached outside would be an old
    one at a replay.
    """
    inputs = [tensor.clone() for tensor in tensors]
    autocast = torch.autocast(GRAPH_DEVICE, dtype=torch.get_autocast_dtype(GRAPH_DEVICE), cache_enabled=False,
                              enabled=torch.is_autocast_enabled(GRAPH_DEVICE))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), autocast:     # libraries allocate before the capture
        for _ in range(2):
            function(module, *inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"), autocast:   # NCCL's own thread may go on
        output = function(module, *inputs)
    return inputs, graph, output
