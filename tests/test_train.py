"""Training: repeatable, honest about what chooses, and scored under GLUE's names."""

import numpy as np
import pytest
import torch
from test_writer import Toy

import store
from stages import baselines, tasks
from stages.depths import Depths
from stages.evaluate import say, score
from stages.heads import Head, classifier
from stages.loader import Loader
from stages.metrics import paired, scores
from stages.read import READ
from stages.train import Schedule, hold_out, train
from store import Refused

CPU = torch.device("cpu")
N = 200
TASK = tasks.Task("toy", ("text",), "classification", ("accuracy",), ("a", "b"))


@pytest.fixture(scope="module")
def learnable(tmp_path_factory):
    """A cache of one row an example whose label is a sign in its first block."""
    toy = Toy(np.ones(N, int))
    root = tmp_path_factory.mktemp("train")
    toy.build(root)
    return store.open(toy.path(root)), (toy.rows[:, 1, 0] > 0).astype(np.int64)


def run(learnable, schedule, seed=0, told=lambda line: None):
    cache, labels = learnable
    torch.manual_seed(seed)
    head = Head(READ(3, 8), "first", 3, classifier(3, 2, 0.1), 2, Depths.of(cache.states["encoder"]))
    fit, choose = hold_out(labels, 0.1, seed)
    loaders = [Loader(cache, part, labels, 16, CPU) for part in (fit, choose)]
    return head, loaders, train(head, TASK, *loaders, schedule, told)


def test_it_learns_and_repeats_to_the_bit(learnable):
    first, again, other = (run(learnable, Schedule(epochs=6, lr=0.02, seed=seed), seed)[2] for seed in (0, 0, 1))
    assert max(line["choose"]["accuracy"] for line in first.curve) > 0.9
    assert all(torch.equal(first.weights[name], again.weights[name]) for name in first.weights)
    assert not all(torch.equal(first.weights[name], other.weights[name]) for name in first.weights)
    assert [line["loss"] for line in first.curve] == [line["loss"] for line in again.curve]


def test_the_best_epoch_is_kept_and_training_stops_without_progress(learnable):
    head, (_, choose), outcome = run(learnable, Schedule(epochs=40, lr=0.02, patience=2))
    chosen = [line["choose"]["accuracy"] for line in outcome.curve]
    assert outcome.epoch == 1 + chosen.index(max(chosen))
    assert len(chosen) == outcome.epoch + 2 < 40
    head.load_state_dict(outcome.weights)
    assert score(TASK, say(head, choose))["accuracy"] == max(chosen)


def test_a_loss_that_explodes_says_so(learnable):
    with pytest.raises(Refused, match="the learning rate 1e\\+30 is too high"):
        run(learnable, Schedule(epochs=3, lr=1e30))


def test_the_rate_warms_up_and_falls_to_nothing():
    schedule = Schedule(lr=2.0, warmup=0.1)
    assert [schedule.rate(x) for x in (0.05, 0.1, 0.55, 1.0)] == pytest.approx([1.0, 2.0, 1.0, 0.0])


def test_what_chooses_is_not_trained_on_and_never_unlabelled():
    labels = np.array([0, 1, -1] * 40)
    fit, choose = hold_out(labels, 0.1, 0)
    assert len(choose) == 8 and len(fit) == 72
    assert not set(fit) & set(choose) and (labels[np.concatenate([fit, choose])] >= 0).all()
    assert hold_out(labels, 0.1, 0)[1].tolist() == choose.tolist() != hold_out(labels, 0.1, 1)[1].tolist()
    assert set(np.concatenate(hold_out(np.array([1.0, np.nan, 2.0], np.float32), 0.1, 0))) == {0, 2}
    large = hold_out(np.zeros(1000, np.int64), 0.1, 0)[1]
    assert len(np.unique(large // 100)) <= 2  # neighbours on disk
    with pytest.raises(Refused, match="1 labelled training examples"):
        hold_out(np.array([-1, 0]), 0.1, 0)


def test_metrics_are_glues():
    labels, said = np.array([0, 1, 1, 0, 1]), np.array([0, 1, 0, 0, 1])
    found = scores(("accuracy", "f1", "matthews_correlation"), said, labels)
    assert found == pytest.approx({"accuracy": 0.8, "f1": 0.8, "matthews_correlation": (2 * 2 - 0 * 1) / 6})
    x, y = np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 8])
    assert scores(("pearson", "spearmanr"), x, y) == pytest.approx({"pearson": np.corrcoef(x, y)[0, 1], "spearmanr": 0.8})


def test_paired_scores_are_compared_by_a_t_test():
    from scipy import stats

    one, two = np.array([0.9, 0.8, 0.85, 0.7]), np.array([0.8, 0.82, 0.8, 0.66])
    difference, error, p = paired(one, two)
    assert (difference, error) == pytest.approx((0.0425, stats.sem(one - two)))
    assert p == pytest.approx(stats.ttest_rel(one, two).pvalue)
    assert paired(one, one) == (0.0, 0.0, 1.0) and paired(one + 0.125, one)[2] < 1e-6


def test_a_constant_has_no_correlation():
    assert scores(("pearson", "spearmanr"), np.ones(3), np.arange(3.0)) == {"pearson": 0.0, "spearmanr": 0.0}
    assert scores(("matthews_correlation", "f1"), np.zeros(3, int), np.array([0, 1, 1])) == {
        "matthews_correlation": 0.0,
        "f1": 0.0,
    }


def test_baselines_are_what_they_say():
    assert baselines.majority(TASK, np.array([0, 1, 1]), 2).tolist() == [1, 1]
    ranked = tasks.find("stsb")
    assert baselines.majority(ranked, np.array([1.0, 2.0]), 2).tolist() == [1.5, 1.5]
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 5)).astype(np.float32)
    y = (x[:, 2] > 0).astype(np.int64)
    parts = (x[:200], y[:200]), (x[200:250], y[200:250])
    assert (baselines.linear_probe(TASK, *parts, x[250:])[0] == y[250:]).mean() > 0.9
    guess = baselines.linear_probe(ranked, (x[:200], x[:200, 0]), (x[200:250], x[200:250, 0]), x[250:])[0]
    np.testing.assert_allclose(guess, x[250:, 0], atol=0.05)


def test_the_probe_sees_the_pooled_final_state(learnable):
    cache, labels = learnable
    mine = Loader(cache, np.arange(N), labels, 16, CPU)
    features, found = baselines.features(mine, "first", Depths.of(cache.states["encoder"]))
    assert np.array_equal(features, np.concatenate([cache.rows(n)[:, 1] for n in range(N)]))
    assert np.array_equal(found, labels)
