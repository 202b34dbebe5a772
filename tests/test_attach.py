"""READ from the cache is READ in the loop: logits, loss, gradients, and weights after training, for every kind of backbone."""

import copy

import families
import numpy as np
import pytest
import torch
from families import KINDS_OF

from stages import extract
from stages.attach import attach
from stages.heads import Batch
from stages.kinds import KINDS, main_stream, pool_of
from stages.shape import Shape, build

ARCHITECTURES = ["bert", "modernbert", "gpt2", "llama", "t5", "bart", "vit", "dinov2"]
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
STEPS = 50


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            path = families.save(name, tmp_path_factory.mktemp(name))
            made[name] = (families.opened(path)[0], families.examples(path, name, 24))
        return made[name]

    return make


def head_of(backbone, rule, joiner=True, **more):
    states = backbone.anatomy.states("all", rule)
    if not joiner:
        states = dict(list(states.items())[-1:])
    torch.manual_seed(1)
    kind = backbone.anatomy.kind
    shape = Shape(16, states, 3, pool_of(kind, rule, None), 8, dropout=0.2, **more)
    head = build(shape, torch.randn(3, 16))
    torch.nn.init.normal_(head.read.out.weight if hasattr(head.read, "out") else head.read.decoder.out.weight, std=0.3)
    return head, states


def cached(backbone, examples, batch, states, rule, labels):
    """The batch that a loader makes of a chunk: rows of these examples, wherever they went through the backbone."""
    data = {path: torch.from_numpy(v) for path, v in extract.chunk(backbone, examples, range(24), states, rule, "fp32").items()}
    main = main_stream(backbone.anatomy.kind, rule)
    main = main if main in states else "decoder"
    ragged = main == main_stream(backbone.anatomy.kind, rule) and rule == "all"
    lengths = torch.from_numpy(examples.lengths if ragged else np.ones(24, int))
    begin = lengths.cumsum(0) - lengths
    taken = torch.cat([torch.arange(begin[n], begin[n] + lengths[n]) for n in batch])
    own = lengths[batch]
    both = len(states) > 1
    return Batch(
        rows=data[f"{main}/values"][taken],
        example=torch.arange(len(batch)).repeat_interleave(own),
        start=own.cumsum(0) - own,
        labels=labels,
        place=torch.tensor(batch),
        decoder=data["decoder/values"][batch] if both else None,
        attention=data["encoder/cross_attention"][taken] if both else None,
    )


CASES = [
    (name, rule, joiner)
    for name in ARCHITECTURES
    for rule in KINDS[KINDS_OF[name]].tokens
    for joiner in ((True, False) if (KINDS_OF[name], rule) == ("encoder-decoder", "all") else (True,))
]


@pytest.mark.parametrize(("name", "rule", "joiner"), CASES)
def test_training_from_the_cache_is_training_in_the_loop(opened, name, rule, joiner):
    backbone, examples = opened(name)
    here, states = head_of(backbone, rule, joiner)
    there = copy.deepcopy(here)
    batches = [torch.randperm(24, generator=torch.Generator().manual_seed(n))[:6].tolist() for n in range(4)]
    labels = torch.arange(24) % 3
    held = [cached(backbone, examples, batch, states, rule, labels[batch]) for batch in batches]
    loop = attach(backbone, there, states, rule)
    assert {id(p) for p in loop.parameters()} == {id(p) for p in there.parameters()}
    optimisers = [torch.optim.AdamW(head.parameters(), lr=3e-3) for head in (here, there)]
    with torch.inference_mode():
        logits = here.eval()(held[0]), loop.eval()(examples.collate(np.array(batches[0])))
    torch.testing.assert_close(*logits, **CLOSE)
    here.train(), there.train()
    for step in range(STEPS):
        batch = batches[step % 4]
        losses = []
        for number, head in enumerate((here, there)):
            torch.manual_seed(step)  # the same dropout
            live = examples.collate(np.array(batch))
            losses.append(head.loss(held[step % 4]) if number == 0 else loop.loss(live, labels[batch]))
            losses[-1].backward()
        torch.testing.assert_close(*losses, **CLOSE)
        if step == 0:
            for (key, one), two in zip(here.named_parameters(), there.parameters(), strict=True):
                assert one.grad is not None, key
                assert (one.grad - two.grad).norm() <= 1e-5 * one.grad.norm() + 1e-8, key
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
    for (key, one), two in zip(here.named_parameters(), there.parameters(), strict=True):
        assert (one - two).norm() <= 1e-5 * one.norm(), key
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in backbone.model.parameters())


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_a_verbalizer_too_and_it_trains_nothing_but_read(opened, name):
    backbone, examples = opened(name)
    head, states = head_of(backbone, "last", head="verbalizer")
    batch = [3, 1, 7]
    loss = head.loss(cached(backbone, examples, batch, states, "last", torch.tensor([0, 2, 1])))
    live = attach(backbone, head, states, "last").loss(examples.collate(np.array(batch)), torch.tensor([0, 2, 1]))
    torch.testing.assert_close(loss, live, **CLOSE)


def test_in_the_loop_states_can_go_through_the_caches_codec(opened):
    backbone, examples = opened("bert")
    head, states = head_of(backbone, "all")
    plain, coded = (attach(backbone, head, states, "all", codec) for codec in ("fp32", "bf16"))
    inputs = examples.collate(np.arange(4))
    rows = plain.batch(inputs).rows
    assert torch.equal(coded.batch(inputs).rows, rows.to(torch.bfloat16).float())
