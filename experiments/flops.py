"""What a training step costs in arithmetic: the `flops` and `sequential_flops` of each log line.

FLOPs count two per multiply-add, of matrix products and attention alone; backward costs twice the forward. Sequential FLOPs are
those on the longest chain of dependent operations, which no number of processors makes shorter. The four functions at the end
return both, for a batch of all processes.
"""
from torch import nn


def forward_flops(config, vocab_size, T, S):
    """FLOPs of one forward pass, two per multiply-add: the encoder for S memories of one row of T tokens (trunk: its trunk alone, as
    a language model), the decoder for one future, as long as those of all places of the row are on average, the updater for one
    step, the readout for one memory."""
    d, K = config.d_model, config.memory_tokens

    def stack(n_layers, tokens, keys, kept=None):
        """Transformer: in the last layer the tokens that are not `kept` only make queries, keys and values."""
        unused = 0 if kept is None else tokens - kept
        return n_layers * tokens * (24 * d * d + 4 * keys * d) - unused * (18 * d * d + 4 * keys * d)

    def mix(tokens):
        return tokens * 2 * d * d * config.conv_width if config.conv_width > 1 else 0

    window, most = config.context_len + K, min(config.context_len, T)
    seen = most - most * most // (2 * T)                                        # places of the trunk, on average over a row
    longest = min(config.future_len, T)
    future = longest - longest * (longest - 1) // (2 * T)                       # targets up to the row's end, on average
    decoded, last = K + future - 1, 2 * d * vocab_size
    trunk = mix(T + 1) + stack(config.encoder_layers, T + 1, seen)
    slots = 2 * d * (K - 1) * (T + 1) * (1 + S) + S * 2 * d * d
    return {"encoder": S * (mix(config.context_len) + stack(config.encoder_layers, window, window, K)) if config.encoder == "window"
                       else trunk + slots,
            "trunk": trunk + T * last,
            "decoder": mix(future - 1) + stack(config.decoder_layers, decoded, decoded // 2) + future * last,
            "updater": {"transformer": stack(config.updater_layers, K + 1, K + 1, K) + 2 * K * d,
                        "mlp": config.updater_layers * 4 * K * d * (2 * K * d + d) + 2 * K * d,
                        "gru": 6 * K * d * (K * d + d)}[config.updater],
            "readout": stack(config.decoder_layers, K, K, 1) + last}


def chain_flops(network):
    """FLOPs along the longest chain of dependent operations of a network: one token's way through all of its matrices."""
    return 2 * sum(p.numel() for name, p in network.named_parameters() if p.dim() == 2 and not name.endswith(("embed.weight", "registers")))


def smt_flops(config, networks, vocab_size, T, trunk_alone=False):
    """FLOPs and sequential FLOPs of a step of train_smt.py."""
    S, chain = config.positions, {name: chain_flops(network) for name, network in networks.items()}
    forward = forward_flops(config, vocab_size, T, 2 * S)
    if trunk_alone:
        encoder = networks["encoder"]
        return 3 * config.batch_size * forward["trunk"], 3 * chain_flops(nn.ModuleList([encoder.embed, encoder.transformer, networks["decoder"].head]))
    head = T * 2 * config.d_model * vocab_size if config.encoder == "causal" else 0
    once = forward["encoder"] + head + S * (forward["decoder"] + forward["updater"] + forward["readout"])
    return 3 * config.batch_size * once, 3 * (chain["encoder"] + max(chain["decoder"], chain["updater"], chain["readout"]))


def dmt_flops(config, model_config, networks, vocab_size, T, n, h, R):
    """FLOPs and sequential FLOPs of an iteration of train_dmt.py: n roll-outs of h tokens in each row, R labelled steps in each."""
    forward = forward_flops(model_config, vocab_size, T, n * (R + 1))
    chain = {name: chain_flops(network) for name, network in networks.items()}
    return (config.batch_size * (forward["encoder"] + n * h * forward["updater"] + 3 * n * R * (forward["updater"] + forward["readout"])),
            h * chain["updater"] + chain["encoder"] + 3 * max(chain["updater"], chain["readout"]))


def bptt_flops(config, model_config, networks, vocab_size, T):
    """FLOPs and sequential FLOPs of a step of train_bptt.py."""
    forward = forward_flops(model_config, vocab_size, T, 1)
    return (3 * config.batch_size * T * (forward["updater"] + forward["readout"]),
            3 * (T * chain_flops(networks["updater"]) + chain_flops(networks["readout"])))


def transformer_flops(config, networks, vocab_size, T):
    """FLOPs and sequential FLOPs of a step of train_transformer.py."""
    d, seen = config.d_model, min(config.context_len, T)
    keys = seen - seen * seen // (2 * T)                                        # that a token attends to, on average
    token = config.decoder_layers * (24 * d * d + 4 * keys * d) + 2 * d * vocab_size
    return 3 * config.batch_size * T * token, 3 * chain_flops(networks["decoder"])
