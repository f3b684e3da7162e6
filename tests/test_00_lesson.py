"""Supervised Memory Training on four tokens, by hand. Read this file from top to bottom: it is the method.

The row is `a b a c`. After each token the next one is to be predicted:

    t      -1   0   1   2   3
    x_t         a   b   a   c       what is read
    y_t         b   a   c   -       what is predicted; nothing follows the last token

A recurrent network reads x_0, x_1, .. one after the other and keeps a memory: m_t = f(m_{t-1}, x_t). From m_t
it predicts y_t. SMT trains f without running it over the row: an encoder says what m_{t-1} and m_t should be.
"""
import torch

from model import IGNORE, build, empty_memory, futures, roll_out
from train_smt import Config, count_terms, smt_loss

A, B, C, PAD = 0, 1, 2, 3                   # V = 3 tokens; PAD stands for "no token"
x = torch.tensor([[A, B, A, C]])
y = torch.tensor([[B, A, C, IGNORE]])
t = torch.tensor([1, 2])                    # a step of training looks at a few random positions; here two
config = Config(memory_tokens=2, d_model=8, n_heads=2, context_len=3, future_len=2, batch_size=1, positions=2)


def make():
    torch.manual_seed(0)
    return build(config, vocab_size=3).double()


def surprise(logits, target):
    """Cross-entropy of one prediction: -log of the probability of what came."""
    return -logits.softmax(-1)[target].log()


def losses():
    """What train_smt.py computes, term by term."""
    return smt_loss(make(), x, y, t, count_terms(x, y, t, config, PAD), config)[1]


def memory(networks, t):
    """m_t (1, K, d), from the encoder."""
    return networks["encoder"](x, torch.tensor([t]))[:, 0]


def test_1_the_encoder_reads_the_past_and_writes_a_memory():
    """It reads the last context_len = 3 tokens; before the row there is PAD."""
    encoder, contexts = make()["encoder"], []
    encoder.embed.register_forward_pre_hook(lambda _, inputs: contexts.extend(inputs[0].tolist()))
    memories = encoder(x, torch.tensor([-1, 0, 1, 2, 3]))
    assert contexts == [[PAD, PAD, PAD],        # m_{-1}, which is m_empty: nothing was read
                        [PAD, PAD, A],          # m_0
                        [PAD, A, B],            # m_1
                        [A, B, A],              # m_2
                        [B, A, C]]              # m_3
    assert memories.shape == (1, 5, 2, 8)       # one row, five positions, K = 2 memory tokens of width d = 8


def test_2_a_memory_is_good_if_the_future_can_be_decoded_from_it():
    """The decoder predicts future_len = 2 targets: the first from m_t alone, the second with x_{t+1}, too."""
    networks = make()
    future_x, future_y = futures(x, y, t, config.future_len, PAD)
    assert future_y.tolist() == [[[A, C], [C, IGNORE]]]         # y_1 y_2 at t = 1, and y_2 y_3 at t = 2
    assert future_x.tolist() == [[[A], [C]]]                    # x_2 at t = 1, and x_3 at t = 2
    first = networks["decoder"](memory(networks, 1), torch.tensor([[A]]))[0]
    second = networks["decoder"](memory(networks, 2), torch.tensor([[C]]))[0]
    L_dec = (surprise(first[0], A) + surprise(first[1], C) + surprise(second[0], C)) / 3
    torch.testing.assert_close(losses()["loss_dec"], L_dec)


def test_3_f_learns_one_step_at_a_time_from_pairs_of_memories():
    """(m_0, x_1) -> m_1 and (m_1, x_2) -> m_2. No step waits for another: pairs are learned in parallel."""
    networks, errors = make(), []
    for before, token, after in ((0, B, 1), (1, A, 2)):
        predicted = networks["updater"](memory(networks, before), torch.tensor([token]))
        errors.append((predicted - memory(networks, after)).square().mean())
    torch.testing.assert_close(losses()["loss_dyn"], sum(errors) / 2)


def test_4_memories_stay_apart_from_each_other():
    """L_dyn alone would be 0 if all memories were the same. L_unif is large where memory tokens are close."""
    networks = make()
    u = torch.cat([memory(networks, 1), memory(networks, 2)]).flatten(0, 1)         # 4 memory tokens
    u = u / u.norm(dim=-1, keepdim=True)
    closeness = [torch.exp(-2 * (u[a] - u[b]).square().sum()) for a in range(4) for b in range(4) if a != b]
    torch.testing.assert_close(losses()["loss_unif"], (sum(closeness) / 12).log())


def test_5_the_readout_learns_to_predict_from_a_memory_alone():
    networks = make()
    logits = [networks["readout"](memory(networks, i))[0] for i in (1, 2)]
    torch.testing.assert_close(losses()["loss_read"], (surprise(logits[0], A) + surprise(logits[1], C)) / 2)


def test_6_the_objective_is_the_sum():
    terms = losses()
    total = terms["loss_dec"] + 0.1 * terms["loss_dyn"] + 0.001 * terms["loss_unif"] + terms["loss_read"]
    torch.testing.assert_close(terms["train_loss"], total)


def test_7_after_training_f_and_readout_run_alone():
    """From a stored m_empty, token by token: the encoder and the decoder are not needed."""
    networks = make()
    m = empty_memory(networks["encoder"])[None]
    assert torch.equal(m, memory(networks, -1))
    memories = roll_out(networks["updater"], m, x)
    for i in range(4):
        m = networks["updater"](m, x[:, i])
        assert torch.equal(memories[:, i], m) and networks["readout"](m).shape == (1, 3)
