"""The alternation and what decides cluster sizes, on toy data, without the estimator."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from sklearn_sela._heads import sizes_are_equal, target_sizes
from sklearn_sela._labels import FeatureLabels, SelfLabels
from sklearn_sela._network import SelfLabelNetwork
from sklearn_sela._training import (
    Schedule,
    label_pass,
    self_label,
    stalled,
)

SCHEDULE = Schedule(
    epochs=6,
    batch_size=32,
    learning_rate=0.1,
    weight_decay=5e-4,
    lr_schedule="one_cycle",
    n_views=2,
    n_solves=None,
    label_rows=1024,
)
N = 120


def two_groups(share=0.5, seed=0):
    """(N, 2) points around (+-1, 0), shuffled, and their group."""
    g = torch.Generator().manual_seed(seed)
    group = (torch.arange(N) >= share * N).long()[torch.randperm(N, generator=g)]
    x = 0.2 * torch.randn(N, 2, generator=g)
    x[:, 0] += 2.0 * group - 1
    return x, group


class Toy:
    """A linear network on two groups, with views by hand: small noise."""

    def __init__(self, share=0.5, wrong=0.2, heads=2, seed=0):
        self.generator = torch.Generator().manual_seed(seed)
        self.x, self.group = two_groups(share, seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.network = SelfLabelNetwork(nn.Linear(2, 2), 2, heads, 2)
        flip = torch.rand(heads, N, generator=self.generator) < wrong
        self.start = torch.where(flip, 1 - self.group, self.group)
        self.weights = torch.tensor([[share, 1 - share]] * heads, dtype=torch.float64)
        self.calls = 0

    def views(self, rows):
        self.calls += 1
        return self.x[rows] + 0.05 * torch.randn(len(rows), 2, generator=self.generator)

    def labels(self, reg=0.2, reg_m=math.inf, soft=True, momentum=0.5):
        return SelfLabels(self.start, self.weights, reg, reg_m, soft, momentum)

    def run(self, labels, schedule=SCHEDULE, views=None):
        stream = partial(map, views or self.views)
        epochs = self_label(self.network, stream, labels, schedule, self.generator)
        self.records = []
        for record, _ in epochs:
            self.records.append(record)


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("share", [0.5, 0.7])
def test_alternation_corrects_wrong_starting_labels(soft, share):
    toy = Toy(share)
    labels = toy.labels(soft=soft)
    toy.run(labels)
    assert ((labels.labels == toy.group).double().mean(1) >= 0.98).all()


def test_alternation_holds_the_sizes_asked_for():
    # The groups are 50:50; the labels must be 70:30 all the same.
    toy = Toy(share=0.5)
    toy.weights = torch.tensor([[0.7, 0.3]] * 2, dtype=torch.float64)
    labels = toy.labels()
    toy.run(labels)
    assert float(labels.targets(torch.arange(N))[:, :, 0].mean()) == pytest.approx(0.7, abs=2e-3)


def test_record_gets_one_row_an_epoch():
    toy = Toy()
    toy.run(toy.labels())
    assert len(toy.records) == SCHEDULE.epochs
    assert set(toy.records[0]) == {
        "loss",
        "seconds",
        "solver_iterations",
        "marginal_error",
        "changed",
        "smallest",
        "largest",
    }


def test_first_epoch_trains_on_the_starting_labels():
    toy = Toy()
    labels = toy.labels()
    toy.run(labels, replace(SCHEDULE, epochs=1))
    assert torch.equal(labels.labels, toy.start)
    assert toy.records[0]["solver_iterations"] == 0


def test_changed_is_the_share_of_rows_that_a_solve_relabelled():
    toy = Toy(wrong=0.25)
    labels = toy.labels()
    toy.run(labels, replace(SCHEDULE, epochs=2))
    expected = float((labels.labels != toy.start).double().mean())
    assert toy.records[1]["changed"] == pytest.approx(expected)
    assert expected > 0.1


def test_smallest_and_largest_are_cluster_sizes():
    toy = Toy(share=0.7, wrong=0.0)
    toy.run(toy.labels(), replace(SCHEDULE, epochs=1))
    assert (toy.records[0]["smallest"], toy.records[0]["largest"]) == (36, 84)


def test_loss_is_the_mean_cross_entropy_of_rows():
    # A learning rate of almost nothing: the network stays, so one can compute it by hand.
    toy = Toy()
    expected = nn.functional.cross_entropy(toy.network(toy.x).transpose(0, 1)[0], toy.start[0])
    other = nn.functional.cross_entropy(toy.network(toy.x).transpose(0, 1)[1], toy.start[1])
    toy.run(toy.labels(), replace(SCHEDULE, epochs=1, learning_rate=1e-12), lambda r: toy.x[r])
    assert toy.records[0]["loss"] == pytest.approx(float((expected + other).detach()) / 2, rel=1e-5)


def test_every_row_is_seen_once_an_epoch():
    toy, seen = Toy(), []

    def views(rows):
        seen.append(rows)
        return toy.x[rows]

    toy.run(toy.labels(), replace(SCHEDULE, epochs=1), views)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(N))
    assert {len(rows) for rows in seen} == {30}  # 120 rows in even batches of about 32


@pytest.mark.parametrize(("n", "batch_size"), [(3, 2), (5, 4), (9, 2), (20, 1)])
def test_no_batch_of_one_row_as_batch_norm_cannot_train_on_it(n, batch_size):
    toy, sizes = Toy(), []

    def views(rows):
        sizes.append(len(rows))
        return toy.x[rows]

    labels = SelfLabels(toy.start[:, :n], toy.weights, 0.2, math.inf, True, 0.5)
    toy.run(labels, replace(SCHEDULE, epochs=1, batch_size=batch_size), views)
    assert min(sizes) >= 2


def test_solves_average_over_the_views():
    toy = Toy()
    toy.run(toy.labels(), replace(SCHEDULE, epochs=2, n_views=5))
    batches = 4
    assert toy.calls == 2 * batches + 5


def test_without_views_of_its_own_a_solve_takes_what_training_predicted():
    toy, seen = Toy(), {}

    def views(rows):
        x = toy.views(rows)
        for i, one in zip(rows.tolist(), x, strict=True):
            seen.setdefault(i, one)  # of the first epoch
        return x

    labels = toy.labels()
    # At a learning rate of almost 0 the network stays, and its predictions can be repeated.
    toy.run(labels, replace(SCHEDULE, epochs=2, n_views=0, learning_rate=1e-12), views)
    assert toy.calls == 2 * 4  # batches: no pass besides training
    expected = toy.network(torch.stack([seen[i] for i in range(N)])).log_softmax(2)
    torch.testing.assert_close(labels.scores, expected.transpose(0, 1).detach())


def test_momentum_is_the_share_of_the_last_scores_that_is_kept():
    one, two, three = (random_scores(k=2, seed=seed) for seed in range(3))
    toy = Toy()
    labels = toy.labels(momentum=0.25)
    expected = one
    for new in (one, two, three):
        if new is not one:
            expected = 0.25 * expected + 0.75 * new
        see(labels, new)
        labels.solve(None)
        torch.testing.assert_close(labels.scores, expected)


def test_momentum_of_one_is_the_mean_of_all():
    scores = [random_scores(k=2, seed=seed) for seed in range(4)]
    labels = Toy().labels(momentum=1.0)
    for new in scores:
        see(labels, new)
        labels.solve(None)
    torch.testing.assert_close(labels.scores, torch.stack(scores).mean(0))


def test_soft_targets_rest_between_solves():
    toy, targets = Toy(), []
    labels = toy.labels()

    def views(rows):
        targets.append(labels.targets(torch.arange(N)))
        return toy.views(rows)

    schedule = replace(SCHEDULE, epochs=4, n_views=0, n_solves=1)
    (solved_at,) = schedule.solve_epochs()
    toy.run(labels, schedule, views)
    batches = len(targets) // 4
    after = targets[solved_at * batches :]
    assert all(torch.equal(q, after[0]) for q in after)


def label_pass_of(network, views, n_views):
    schedule = replace(SCHEDULE, n_views=n_views, label_rows=50)
    parts = list(
        label_pass(network, lambda x: network(x).log_softmax(2), partial(map, views), N, schedule)
    )
    assert torch.equal(torch.cat([rows for rows, _ in parts]), torch.arange(N))
    return torch.cat([log_p for _, log_p in parts])


def test_label_pass_gives_the_mean_over_views():
    toy, seen = Toy(), {}
    turn = itertools.cycle([0.0, 1.0])

    def views(rows):
        shift = next(turn)
        seen.setdefault(shift, []).append(toy.x[rows] + shift)
        return seen[shift][-1]

    found = label_pass_of(toy.network, views, 2)
    expected = [toy.network(torch.cat(x)).log_softmax(2) for x in seen.values()]
    torch.testing.assert_close(found, torch.stack(expected).mean(0).detach())


def test_label_pass_is_in_eval_mode():
    toy = Toy()
    toy.network.backbone = nn.Sequential(toy.network.backbone, nn.Dropout(0.5))
    toy.network.train()
    one, two = (label_pass_of(toy.network, lambda r: toy.x[r], 1) for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("at", [5, 7, 8, 9])  # 4 batches an epoch, and 2 views before the second
def test_interruption_restores_the_last_complete_epoch(at):
    toy = Toy()
    with pytest.raises(KeyboardInterrupt):
        toy.run(toy.labels(), replace(SCHEDULE, epochs=6), interrupt(toy, at))
    expected = Toy()
    with pytest.raises(KeyboardInterrupt):
        expected.run(expected.labels(), SCHEDULE, interrupt(expected, 5))
    assert len(toy.records) == len(expected.records) == 1
    assert_same_weights(toy.network, expected.network)


def test_whoever_stops_asking_has_the_network_of_the_last_epoch():
    toy, expected = Toy(), Toy()
    epochs = self_label(toy.network, partial(map, toy.views), toy.labels(), SCHEDULE, toy.generator)
    next(epochs), next(epochs)
    epochs.close()
    with pytest.raises(KeyboardInterrupt):
        expected.run(expected.labels(), SCHEDULE, interrupt(expected, 11))
    assert len(expected.records) == 2
    assert_same_weights(toy.network, expected.network)


@pytest.mark.parametrize(
    ("losses", "patience", "expected"),
    [
        ([3, 2, 1], None, False),
        ([3, 2, 1], 1, False),
        ([3, 2, 2], 1, True),
        ([3, 2, 2], 2, False),
        ([3, 2, 2, 2], 2, True),
        ([3, 2, 2.5, 1.99], 2, True),  # by less than tol
        ([3, 2, 2.5, 1.9], 2, False),
        ([3], 1, False),
    ],
)
def test_loss_has_stalled_if_the_last_epochs_brought_nothing(losses, patience, expected):
    assert stalled(losses, patience, 0.05) is expected


def test_interruption_of_the_first_epoch_restores_the_start():
    toy = Toy()
    start = copy.deepcopy(toy.network)
    with pytest.raises(KeyboardInterrupt):
        toy.run(toy.labels(), SCHEDULE, interrupt(toy, 3))
    assert toy.records == []
    assert_same_weights(toy.network, start)


def interrupt(toy, at):
    """The toy's views, with Ctrl-C in the at-th call."""

    def views(rows):
        if toy.calls + 1 == at:
            raise KeyboardInterrupt
        return toy.views(rows)

    return views


def assert_same_weights(one, two):
    for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_targets_before_a_solve_are_the_starting_labels():
    toy = Toy()
    targets = toy.labels().targets(torch.tensor([4, 2]))
    assert targets.shape == (2, 2, 2)
    assert torch.equal(targets.argmax(2), toy.start[:, [4, 2]].T)
    assert set(targets.flatten().tolist()) == {0.0, 1.0}


def see(labels, scores):
    for rows in torch.arange(N).split(50):
        labels.see(rows, scores[:, rows].transpose(0, 1))


def random_scores(heads=2, k=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(heads, N, k, generator=g).log_softmax(2)


def solved(soft, weights=(0.2, 0.3, 0.5), reg_m=math.inf):
    start = torch.zeros(2, N, dtype=torch.int64)
    shares = torch.tensor([weights] * 2, dtype=torch.float64)
    state = SelfLabels(start, shares, 0.2, reg_m, soft, 0.0)
    see(state, random_scores())
    state.solve(None)
    return state


def test_hard_targets_are_the_labels():
    state = solved(soft=False)
    targets = state.targets(torch.arange(N))
    assert torch.equal(targets.argmax(2), state.labels.T)
    assert set(targets.flatten().tolist()) == {0.0, 1.0}


def test_soft_targets_are_distributions_that_peak_at_the_labels():
    state = solved(soft=True)
    targets = state.targets(torch.arange(N))
    torch.testing.assert_close(targets.sum(2), torch.ones(N, 2))
    assert torch.equal(targets.argmax(2), state.labels.T)
    assert float(((targets > 0.01) & (targets < 0.99)).double().mean()) > 0.1


def test_soft_targets_have_the_shares_asked_for():
    targets = solved(soft=True).targets(torch.arange(N))
    expected = torch.tensor([[0.2, 0.3, 0.5]] * 2)
    torch.testing.assert_close(targets.mean(0), expected, atol=1e-3, rtol=0)


def test_learned_sizes_are_pulled_part_of_the_way():
    free = solved(True, reg_m=1e-6).targets(torch.arange(N)).mean(0)[0]
    pulled = solved(True, reg_m=0.3).targets(torch.arange(N)).mean(0)[0]
    goal = torch.tensor([0.2, 0.3, 0.5])
    assert (pulled - goal).abs().sum() < 0.8 * (free - goal).abs().sum()
    assert (pulled - goal).abs().sum() > 0.05 * (free - goal).abs().sum()


def test_a_second_solve_goes_on_from_the_potential_of_the_first():
    state = solved(soft=True)
    first = state.n_iter
    see(state, random_scores())
    state.solve(None)
    assert state.n_iter < first
    assert state.changed == 0.0


def test_solve_epochs_are_all_but_the_first():
    assert SCHEDULE.solve_epochs() == {1, 2, 3, 4, 5}


def test_solve_epochs_are_quadratic_and_so_dense_early_on():
    assert replace(SCHEDULE, epochs=100, n_solves=4).solve_epochs() == {4, 16, 36, 64}


@pytest.mark.parametrize("n_solves", [1, 3, 10, 80])
@pytest.mark.parametrize("epochs", [2, 50])
def test_solve_epochs_lie_within_the_training(epochs, n_solves):
    found = replace(SCHEDULE, epochs=epochs, n_solves=n_solves).solve_epochs()
    assert len(found) <= n_solves
    assert min(found) >= 1
    assert max(found) < epochs


def test_one_epoch_has_no_solve():
    assert replace(SCHEDULE, epochs=1).solve_epochs() == set()


def rates(lr_schedule, steps=100):
    network = nn.Linear(2, 2)
    sgd, rate = replace(SCHEDULE, lr_schedule=lr_schedule).optimiser(network, steps)
    found = []
    for _ in range(steps):
        found.append(sgd.param_groups[0]["lr"])
        sgd.step()
        rate.step()
    return np.array(found)


def test_one_cycle_rises_to_the_learning_rate_and_falls_to_nothing():
    found = rates("one_cycle")
    assert found.max() == pytest.approx(0.1)
    assert 5 < found.argmax() < 60
    assert found[-1] < 1e-3


def test_step_schedule_divides_by_ten_three_times():
    found = rates("step")
    np.testing.assert_allclose(found[[0, 39, 40, 60, 80, 99]], [0.1, 0.1, 1e-2, 1e-3, 1e-4, 1e-4])


@pytest.mark.parametrize("k", [2, 10])
def test_equal_sizes_of_many_rows_pass_as_equal(k):
    assert sizes_are_equal(np.full(k, 10_000 // k))


def test_sizes_of_70_to_30_do_not_pass_as_equal():
    assert not sizes_are_equal(np.array([7000, 3000]))


@pytest.mark.parametrize("counts", [[5, 5], [1, 1, 1], [10, 10, 10, 10]])
def test_few_rows_do_not_pass_as_equal(counts):
    assert not sizes_are_equal(np.array(counts))


def test_an_empty_cluster_is_not_equal():
    assert not sizes_are_equal(np.array([5000, 5000, 0]))


def test_one_cluster_is_equal():
    assert sizes_are_equal(np.array([17]))


def test_the_test_for_equal_sizes_keeps_its_level():
    # True sizes off by 15 % (root mean square) may pass in 1 % of samples.
    shares = np.array([0.5 * 1.15, 0.5 * 0.85])
    draws = np.random.default_rng(0).multinomial(2000, shares, 1500)
    passed = np.mean([sizes_are_equal(c) for c in draws])
    assert 0.001 < passed < 0.02


def labels_of_sizes(*counts):
    return np.repeat(np.arange(len(counts)), counts)[None]


def test_learned_sizes_are_a_pull_to_those_of_the_start():
    _, weights, pull = target_sizes(labels_of_sizes(700, 300), 2, "learned")
    np.testing.assert_allclose(weights, [[701 / 1002, 301 / 1002]])
    assert 0 < pull < math.inf


def test_learned_sizes_that_are_equal_are_held():
    _, weights, pull = target_sizes(labels_of_sizes(5010, 4990), 2, "learned")
    np.testing.assert_array_equal(weights, [[0.5, 0.5]])
    assert pull == math.inf


def test_a_learned_size_is_never_zero():
    _, weights, _ = target_sizes(labels_of_sizes(60, 40), 3, "learned")
    assert (weights > 0).all()
    assert weights.sum() == pytest.approx(1)


def test_balanced_sizes_are_held_whatever_the_start():
    labels, weights, pull = target_sizes(labels_of_sizes(700, 300), 2, "balanced")
    np.testing.assert_array_equal(labels, labels_of_sizes(700, 300))
    np.testing.assert_array_equal(weights, [[0.5, 0.5]])
    assert pull == math.inf


def test_given_shares_name_the_clusters_by_size():
    start = np.concatenate([labels_of_sizes(20, 70, 10), labels_of_sizes(10, 20, 70)])
    labels, weights, pull = target_sizes(start, 3, np.array([1.0, 2.0, 7.0]))
    assert [np.bincount(row).tolist() for row in labels] == [[10, 20, 70]] * 2
    np.testing.assert_allclose(weights, [[0.1, 0.2, 0.7]] * 2)
    assert pull == math.inf


def test_given_shares_that_tie_still_rename_one_to_one():
    labels, _, _ = target_sizes(labels_of_sizes(30, 30, 40), 3, np.array([1.0, 1.0, 1.0]))
    assert sorted(np.bincount(labels[0])) == [30, 30, 40]


def test_a_weak_pull_cannot_let_a_cluster_die():
    # A network sure of one cluster for all rows outbids the KL term; the labels must not follow.
    toy = Toy(share=0.4)
    labels = toy.labels(reg_m=1.0)
    sure = torch.stack([torch.zeros(N), torch.full((N,), -20.0)], 1) + 0.01 * toy.x
    see(labels, sure.expand(2, N, 2))
    labels.solve(None)
    for row in labels.labels:
        assert (row.bincount(minlength=2) >= 0.5 * N * toy.weights[0]).all()


@pytest.mark.parametrize("n_views", [1, 3])
@pytest.mark.parametrize("soft", [True, False])
def test_labels_kept_as_features_are_those_kept_as_scores(n_views, soft):
    schedule = replace(SCHEDULE, n_views=n_views)
    runs = []
    for as_features in (False, True):
        toy = Toy()
        labels = toy.labels(soft=soft, momentum=0.0)
        if as_features:
            labels = FeatureLabels(toy.start, toy.weights, 0.2, math.inf, soft, n_features=2)
            assert not hasattr(labels, "scores")
        toy.run(labels, schedule)
        rows = torch.arange(N)
        runs.append((labels.labels, labels.targets(rows), [r["loss"] for r in toy.records]))
    (one, p, losses), (two, q, others) = runs
    assert torch.equal(one, two)
    torch.testing.assert_close(p, q, atol=1e-3, rtol=0)
    assert losses == pytest.approx(others, abs=1e-3)


@pytest.mark.parametrize("soft", [True, False])
def test_labels_kept_as_features_go_on_from_their_state(soft):
    toy = Toy()
    labels = FeatureLabels(toy.start, toy.weights, 0.2, math.inf, soft, n_features=2)
    toy.run(labels)
    again = FeatureLabels(toy.start, toy.weights, 0.2, math.inf, soft, n_features=2)
    state = copy.deepcopy(labels.state_dict())
    assert ("features" in state) == soft  # hard labels do without, until the next pass
    again.load_state_dict(state)
    assert torch.equal(again.labels, labels.labels)
    assert torch.equal(again.targets(torch.arange(N)), labels.targets(torch.arange(N)))
