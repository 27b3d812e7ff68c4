"""Squeezed attends to the keys of clusters that matter; the rules are in ``decode_rules.py``."""

import functools

import numpy
import pytest
import torch

from attnsieve import CachedKV
from attnsieve.kmeans import kmeans
from attnsieve.methods import DenseDecode, Squeezed
from cases import randn
from decode_rules import observed_importance, of_keys, quantile, squeezed
from numerics import assert_bitwise
from test_methods_decode import FIRST, HEADS, LAYERS, STEPS, TOLERANCE, Steps, check

OBSERVED = 10
LISTS = pytest.mark.parametrize("list_heads", ["q", "kv"])


def clustered(steps):
    """Gives the prompt's keys directions in common, and makes the queries care about them."""
    ways = randn((LAYERS, 2, steps.heads[1], 9, 64), seed=7).to(steps.k)
    which = torch.arange(FIRST, device=steps.k.device) * 7 % 9
    steps.k[..., :FIRST, :] = 0.5 * steps.k[..., :FIRST, :] + ways[..., which, :]
    return steps


def prompt_of(steps):
    shape = (LAYERS, 2, steps.heads[0], FIRST, 64)
    return randn(shape, steps.k.dtype, steps.k.device, 4)


def prefilled(steps, **options):
    method, prompt = Squeezed(**dict(observed=OBSERVED, share=0.1) | options), prompt_of(steps)
    for layer in range(LAYERS):
        method.prefill(prompt[layer], steps.k[layer, :, :, :FIRST], layer_idx=layer)
    return method


def labels_of(method, level, layer, b):
    return getattr(method.clusters[0, layer], level).labels[b].cpu()


def thresholds(steps, method, level, share):
    """Of each sequence, over all layers and heads."""
    prompt, found = prompt_of(steps)[:, :, :, FIRST - OBSERVED :].double().cpu(), []
    for b in range(2):
        values = []
        for layer in range(LAYERS):
            k = steps.k[layer, b, :, : FIRST - OBSERVED].double().cpu()
            labels = labels_of(method, level, layer, b)
            lists = steps.heads[0] if method.list_heads == "q" else steps.heads[1]
            if level == "fine":
                values.append(observed_importance(prompt[layer, b], k, labels, lists))
            else:
                coarse = coarse_of(steps, method, layer, b)
                values.append(coarse_importance(prompt[layer, b], *coarse, lists))
        found.append(quantile(torch.stack(values), share))
    return found


def coarse_of(steps, method, layer, b):
    """(labels of the keys, centroids, sizes): a coarse centroid is the mean of fine ones."""
    k = steps.k[layer, b, :, : FIRST - OBSERVED].double().cpu()
    clusters, fine = method.clusters[0, layer], labels_of(method, "fine", layer, b)
    parents, above = clusters.parents[b].cpu(), labels_of(method, "coarse", layer, b)
    count = clusters.coarse.centroids.shape[2]
    centroids = torch.zeros(len(k), count, 64, dtype=torch.float64)
    sizes = torch.zeros(len(k), count, dtype=torch.float64)
    for h in range(len(k)):
        means = torch.stack([k[h, fine[h] == c].mean(0) for c in range(parents.shape[1])])
        for c in range(count):
            centroids[h, c] = means[parents[h] == c].mean(0)
            sizes[h, c] = int((above[h] == c).sum())
        assert torch.equal(above[h], parents[h][fine[h]])
    return above, centroids, sizes


def coarse_importance(queries, above, centroids, sizes, lists):
    """[lists, n], mean over ``queries [Hq, w, D]``."""
    group = len(queries) // len(centroids)
    centroids, sizes = (x.repeat_interleave(group, 0) for x in (centroids, sizes))
    weights = torch.exp(queries @ centroids.mT / 8)
    weights /= (weights * sizes[:, None]).sum(2, keepdim=True)
    return of_keys(weights.unflatten(0, (lists, -1)).amax(1).mean(1), above)


@pytest.mark.parametrize("clusters", [1, 7, 40])
def test_kmeans_is_lloyds_iteration(device, clusters):
    points = randn((2, 3, 40, 16), device=device, seed=1)
    centroids, labels, sizes = (x.cpu() for x in kmeans(points, clusters, iterations=100))
    for at in numpy.ndindex(2, 3):
        x = points[at].cpu().double().numpy()
        unit = x / numpy.linalg.norm(x, axis=1, keepdims=True)
        centres = unit[numpy.arange(clusters) * 40 // clusters]
        for _ in range(100):
            near = ((unit[:, None] - centres) ** 2).sum(2).argmin(1)
            for c in set(near):
                centres[c] = unit[near == c].mean(0)
        assert labels[at].tolist() == near.tolist()
        for c in range(clusters):
            members = x[near == c]
            assert len(members) == int(sizes[at][c])
            mean = members.mean(0) if len(members) else numpy.zeros(16)
            numpy.testing.assert_allclose(centroids[at][c], mean, rtol=1e-5, atol=1e-6)


def test_kmeans_of_equal_and_zero_points_and_again(device):
    points = randn((1, 2, 30, 16), device=device)
    points[:, :, 5:20] = points[:, :, :1]
    points[:, :, 20:25] = 0
    first = kmeans(points, 12, iterations=50)
    assert int(first[2].sum()) == 60 and (first[2] == 0).any()
    assert (first[0][first[2] == 0] == 0).all()
    for ours, theirs in zip(first, kmeans(points, 12, iterations=50), strict=True):
        assert_bitwise(ours, theirs)
    alone = kmeans(points[:, 1:], 12, iterations=50)
    assert torch.equal(alone[1], first[1][:, 1:])


@LISTS
@pytest.mark.parametrize("heads", HEADS)
def test_squeezed(heads, list_heads):
    steps = clustered(Steps(heads))
    method = prefilled(steps, percentile=0.7, list_heads=list_heads)
    limits = thresholds(steps, method, "fine", 0.7)
    lists = heads[0] if list_heads == "q" else heads[1]
    kept = []

    def rule(step, layer, b):
        q, k, _ = steps.of(step, layer, b)
        found = squeezed(q, k, labels_of(method, "fine", layer, b), limits[b], lists)
        kept.extend(len(x) / k.shape[1] for x in found)
        return found

    check(steps, method, rule)
    assert 0.1 < sum(kept) / len(kept) < 0.6


@LISTS
@pytest.mark.parametrize("heads", HEADS)
def test_two_levels(heads, list_heads):
    steps = clustered(Steps(heads))
    options = dict(percentile=0.6, coarse=0.05, coarse_percentile=0.4, list_heads=list_heads)
    method = prefilled(steps, share=0.2, **options)
    fine, coarse = (thresholds(steps, method, *x) for x in (("fine", 0.6), ("coarse", 0.4)))
    lists = heads[0] if list_heads == "q" else heads[1]
    of_layer = functools.lru_cache(None)(lambda layer, b: coarse_of(steps, method, layer, b))

    def rule(step, layer, b):
        q, k, _ = steps.of(step, layer, b)
        labels = labels_of(method, "fine", layer, b)
        return squeezed(q, k, labels, fine[b], lists, (*of_layer(layer, b), coarse[b]))

    check(steps, method, rule)
    one = prefilled(steps, share=0.2, **options | dict(coarse=None))
    assert not torch.equal(one_step(method, steps), one_step(one, steps))


def one_step(method, steps):
    return method(steps.q[0, 0], steps.contiguous(0, 0))


def test_a_cluster_per_key_is_a_threshold_on_exact_weights(device):
    """Kept is what the softmax over the prompt gives more than the threshold."""
    steps = Steps((6, 3), device, torch.float32 if device == "cpu" else torch.bfloat16)
    method = prefilled(steps, share=1.0, percentile=0.8, list_heads="q")
    prompt, clustered_keys = prompt_of(steps).double().cpu(), FIRST - OBSERVED
    limits = []
    for b in range(2):
        values = []
        for layer in range(LAYERS):
            k = steps.k[layer, b, :, :clustered_keys].double().cpu().repeat_interleave(2, 0)
            rows = prompt[layer, b, :, clustered_keys:]
            values.append(torch.softmax(rows @ k.mT / 8, -1).mean(1))
        limits.append(quantile(torch.stack(values), 0.8))

    def rule(step, layer, b):
        q, k, _ = steps.of(step, layer, b)
        k = k.repeat_interleave(2, 0)
        weights = torch.softmax((k[:, :clustered_keys] @ q.unsqueeze(2))[..., 0] / 8, -1)
        newer = set(range(clustered_keys, k.shape[1]))
        return [newer | set((row > limits[b]).nonzero().flatten().tolist()) for row in weights]

    got, want = steps.run(method), steps.expected(rule)
    tolerance = dict(cpu=dict(rtol=1e-4, atol=1e-5), cuda=dict(rtol=5e-2, atol=5e-2))
    torch.testing.assert_close(got.double().cpu(), want, **tolerance[device])


@pytest.mark.parametrize("options", [dict(percentile=0.0), dict(observed=FIRST), dict()])
def test_dense_where_nothing_is_left_out_or_clustered(options):
    steps = Steps((6, 3))
    method = prefilled(steps, **options) if options else Squeezed()
    assert_bitwise(steps.run(method), steps.run(DenseDecode()))


def test_pieces_after_the_prompt_are_attended_to():
    """A question about a fixed prompt; one that replaces clustered keys makes everything dense."""
    steps, first = clustered(Steps((6, 3))), FIRST - 40
    prompt = prompt_of(steps)

    def asked(begin):
        method, pieces = Squeezed(observed=OBSERVED, share=0.1), [slice(0, first)]
        if begin is not None:
            pieces.append(slice(begin, FIRST))
        for rows in pieces:
            for layer in range(LAYERS):
                q, k = prompt[layer][:, :, rows], steps.k[layer][:, :, rows]
                method.prefill(q, k, layer_idx=layer, begin=rows.start)
        return steps.run(method)

    alone, dense = asked(None), steps.run(DenseDecode())
    assert not torch.equal(alone, dense)
    assert_bitwise(asked(first), alone)
    assert_bitwise(asked(first - OBSERVED), alone)
    assert_bitwise(asked(first - OBSERVED - 1), dense)


@pytest.mark.parametrize("coarse", [None, 0.04])
def test_in_pages_again_and_of_one_sequence(device, coarse):
    steps = clustered(Steps((6, 3), device, torch.float32 if device == "cpu" else torch.bfloat16))
    options = dict(coarse=coarse, percentile=0.7)
    method = prefilled(steps, **options)
    plain = steps.run(method)
    method.reset()
    assert not method.state
    pages = steps.run(method, steps.paged(torch.nan))
    torch.testing.assert_close(pages, plain, **TOLERANCE[device])
    assert_bitwise(steps.run(prefilled(steps, **options)), plain)
    one = clustered(Steps((6, 3), device, steps.k.dtype))
    one.q, one.k, one.v = steps.q[:, :, 1:], steps.k[:, 1:], steps.v[:, 1:]
    method = Squeezed(observed=OBSERVED, share=0.1, **options)
    for layer in range(LAYERS):
        method.prefill(prompt_of(steps)[layer][1:], one.k[layer, :, :, :FIRST], layer_idx=layer)
    torch.testing.assert_close(one.run(method), plain[:, :, 1:], **TOLERANCE[device])


def weights_of(method, q, k):
    """What each key gets [Hq, rows, T]: values are unit vectors."""
    v = torch.eye(64).view(1, 1, 64, 64)
    return method(q, CachedKV(k, v[:, :, : k.shape[2]]))[0, ..., : k.shape[2]]


def of_a_short_prompt(k, **options):
    """50 tokens of one sequence, of which 40 are clustered."""
    method = Squeezed(observed=OBSERVED, share=0.2, percentile=0.5, **options)
    method.prefill(randn((1, 2, 50, 64), seed=4), k[:, :, :50])
    return method


def test_a_capacity_keeps_the_best():
    k, q = randn((1, 1, 55, 64)), randn((1, 2, 1, 64), seed=5)
    whole, cut = (weights_of(of_a_short_prompt(k, capacity=n), q, k) > 0 for n in (None, 7))
    assert int(whole[0, 0, :40].sum()) > 7 == int(cut[0, 0, :40].sum())
    assert (cut <= whole).all() and cut[:, :, 40:].all()


def test_rows_of_a_draft_are_steps_of_their_own():
    steps = clustered(Steps((6, 3)))
    q, method, outs = randn((2, 6, 4, 64), seed=5), prefilled(steps), []
    for poison in (0.0, 3.0):
        k = steps.k[0].clone()
        k[:, :, -1] += poison
        method.reset()
        outs.append(method(q, CachedKV(k, steps.v[0])))
    assert_bitwise(outs[0][:, :, :3], outs[1][:, :, :3])
    for row in range(4):
        method.reset()
        cache = CachedKV(*(x[0, :, :, : FIRST + STEPS - 3 + row] for x in (steps.k, steps.v)))
        alone = method(q[:, :, row : row + 1], cache)
        torch.testing.assert_close(outs[0][:, :, row : row + 1], alone, rtol=1e-5, atol=1e-5)


def test_tokens_in_the_place_of_rejected_ones_are_seen():
    """Back to 29 of 40 clustered tokens: what comes then is attended to, each token once."""
    k = randn((1, 1, 60, 64))
    method = of_a_short_prompt(k)
    weights_of(method, randn((1, 2, 1, 64)), k[:, :, :51])
    k[:, :, 29:] = randn((1, 1, 31, 64), seed=9)
    for length, rows in ((30, 1), (33, 3), (34, 1), (42, 8), (43, 1)):
        q = randn((1, 2, rows, 64), seed=length)
        weights = weights_of(method, q, k[:, :, :length])[:, -1].double()
        assert (weights[:, 29:] > 0).all() and (weights[:, :29] == 0).any()
        scores = q[0, :, -1].double() @ k[0, 0, :length].double().T / 8
        want = torch.softmax(scores.masked_fill(weights == 0, -torch.inf), -1)
        torch.testing.assert_close(weights, want, rtol=1e-4, atol=1e-7)


def test_bad_parameters_are_named():
    for name, bad in (
        ("percentile", 1.0),
        ("coarse_percentile", -0.1),
        ("share", 0.0),
        ("coarse", 1.5),
        ("observed", 0),
        ("capacity", 0),
        ("list_heads", "one"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            Squeezed(**{name: bad})
    points = randn((1, 1, 5, 16))
    for clusters, iterations, name in (
        (0, 1, "clusters"),
        (6, 1, "clusters"),
        (2, 0, "iterations"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: "):
            kmeans(points, clusters, iterations=iterations)
