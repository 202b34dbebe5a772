"""READ against the formulas of its paper, written out."""

import pytest
import torch
from torch import nn

from stages.depths import Depths
from stages.heads import Batch, Head, Pool, check_pool
from stages.read import CELLS, READ
from store import Refused

STATES = ["embedding", "block.1", "block.2", "block.3", "final"]
D, H = 6, 4


def trained(read):
    """Random weights everywhere: W_o begins at zero, and hides everything else."""
    with torch.no_grad():
        for parameter in read.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return read


def by_hand(read, rows, cell):
    """read.md line by line, one row at a time, one depth at a time; torch's gate order r, z, n and i, f, g, o."""
    w_i, w_h = read.cell.weight_ih_l0, read.cell.weight_hh_l0
    b_i, b_h = read.cell.bias_ih_l0, read.cell.bias_hh_l0

    def normed(h):
        return read.norm.weight * h / torch.sqrt((h**2).mean() + 1e-6)

    out = []
    for row in rows:
        r = read.start.weight @ normed(row[0]) + read.start.bias if read.start is not None else torch.zeros(H)
        c, all_r = torch.zeros(H), []
        for h in row[1:4]:
            u = read.scale_in * normed(h)
            a, b = w_i @ u + b_i, w_h @ r + b_h
            if cell == "rnn":
                r = torch.tanh(a + b)
            elif cell == "gru":
                reset, update = torch.sigmoid(a[:H] + b[:H]), torch.sigmoid(a[H : 2 * H] + b[H : 2 * H])
                new = torch.tanh(a[2 * H :] + reset * b[2 * H :])
                r = (1 - update) * new + update * r
            else:
                i, f, g, o = (a + b).chunk(4)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                r = torch.sigmoid(o) * torch.tanh(c)
            all_r.append(r)
        mixed = torch.stack(all_r).mean(0) if read.aggregate == "mean" else all_r[-1]
        out.append(row[4] + read.scale_out * (read.out.weight @ mixed + read.out.bias))
    return torch.stack(out)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("aggregate", ["mean", "last"])
@pytest.mark.parametrize("initial", ["zero", "embedding"])
def test_read_is_its_formulas_and_so_are_its_gradients(cell, aggregate, initial):
    torch.manual_seed(0)
    read = trained(READ(D, H, cell, aggregate, initial, scale_in=0.7, scale_out=1.3)).double()
    rows = torch.randn(5, 5, D, dtype=torch.float64)
    torch.set_default_dtype(torch.float64)
    try:
        expected = by_hand(read, rows, cell)
    finally:
        torch.set_default_dtype(torch.float32)
    found = read(rows, Depths.of(STATES))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    for one, two in zip(
        torch.autograd.grad(found.square().sum(), list(read.parameters())),
        torch.autograd.grad(expected.square().sum(), list(read.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("width", "count"), [(768, 986_112), (1024, 1_248_768)])
def test_the_parameter_counts_are_the_papers(width, count):
    assert sum(p.numel() for p in READ(width, 256).parameters()) == count


@pytest.mark.parametrize(("cell", "gates"), [("rnn", 1), ("gru", 3), ("lstm", 4)])
def test_the_parameter_count_is_its_formula(cell, gates):
    expected = gates * (H * D + H * H + 2 * H) + (H * D + D) + D
    assert sum(p.numel() for p in READ(D, H, cell).parameters()) == expected


def test_training_begins_at_the_backbones_own_state():
    rows = torch.randn(3, 5, D)
    assert torch.equal(READ(D, H)(rows, Depths.of(STATES)), rows[:, 4])


def test_rows_never_mix():
    read, rows = trained(READ(D, H)), torch.randn(4, 5, D)
    whole = read(rows, Depths.of(STATES))
    torch.testing.assert_close(whole[2:3], read(rows[2:3], Depths.of(STATES)))


def test_what_the_state_axis_means():
    assert Depths.of(STATES) == (0, [1, 2, 3], 4)
    assert Depths.of(["embedding", "block.1", "block.2"]) == (0, [1, 2], 2)
    assert Depths.of(["block.2", "final"]) == (None, [0], 1)
    with pytest.raises(Refused, match="runs over block outputs"):
        Depths.of(["embedding", "final"])


def test_an_unknown_cell_is_answered_with_the_known():
    with pytest.raises(Refused, match="unknown cell 'gruu'; known: rnn, gru, lstm"):
        READ(D, H, "gruu")
    with pytest.raises(Refused, match="has no `embedding` state"):
        READ(D, H, initial="embedding")(torch.randn(2, 2, D), Depths.of(["block.1", "block.2"]))


def batch(lengths, labels=None):
    lengths = torch.tensor(lengths)
    example = torch.arange(len(lengths)).repeat_interleave(lengths)
    labels = torch.zeros(len(lengths), dtype=torch.int64) if labels is None else torch.tensor(labels)
    return Batch(torch.randn(len(example), 5, D), example, lengths.cumsum(0) - lengths, labels, torch.arange(len(lengths)))


@pytest.mark.parametrize("kind", ["first", "last", "mean", "attention"])
def test_pooling_is_what_it_is_example_by_example(kind):
    torch.manual_seed(0)
    many, pool = batch([3, 1, 4]), Pool(kind, D)
    rows = torch.randn(8, D)
    if kind == "attention":
        nn.init.normal_(pool.query)
    expected = []
    for own in rows.split([3, 1, 4]):
        if kind == "attention":
            expected.append(torch.softmax(torch.tanh(own) @ pool.query, 0) @ own)
        else:
            expected.append({"first": own[0], "last": own[-1], "mean": own.mean(0)}[kind])
    torch.testing.assert_close(pool(rows, many), torch.stack(expected))


def test_pooling_goes_with_the_token_rule():
    assert check_pool(None, "all") == "attention" and check_pool(None, "mean") == "mean"
    with pytest.raises(Refused, match="pool 'attention' does not go with tokens=first; it allows first"):
        check_pool("attention", "first")


def test_the_classifier_is_its_formula():
    head = Head(trained(READ(D, H)), "mean", D, 3, 0.5, Depths.of(STATES)).eval()
    many = batch([2, 2], [2, 0])
    hidden = head.read(many.rows, Depths.of(STATES)).reshape(2, 2, D).mean(1)
    dense, out = head.output[1], head.output[4]
    logits = torch.tanh(hidden @ dense.weight.T + dense.bias) @ out.weight.T + out.bias
    torch.testing.assert_close(head(many), logits)
    torch.testing.assert_close(head.loss(many), nn.functional.cross_entropy(logits, many.labels))


def test_a_regressor_speaks_in_the_labels_unit():
    head = Head(READ(D, H), "mean", D, 1, 0.0, Depths.of(STATES))
    head.standardise([1.0, 3.0, 5.0])
    nn.init.zeros_(head.output[-1].weight)
    nn.init.zeros_(head.output[-1].bias)
    many = batch([1, 2], [3.0, 5.0])
    assert head(many).tolist() == [[3.0], [3.0]]
    assert head.loss(many).item() == pytest.approx((0 + (2 / 2) ** 2) / 2)
