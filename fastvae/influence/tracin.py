"""TracIn: the influence of training samples, summed over checkpoints."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastvae._extension import raw
from fastvae.arguments import expect_at_least, expect_numbers
from fastvae.influence.audit import AUDITED
from fastvae.influence.batches import (
    Take,
    check_order,
    count_of,
    images_alone,
    spread_over,
    tiles_of,
    whole_batch,
    with_entries,
)
from fastvae.influence.cache import FactorCache, fingerprint
from fastvae.influence.coverage import Coverage
from fastvae.influence.engine import Engine
from fastvae.influence.evaluation import Batch, Evaluation
from fastvae.influence.factors import Factors, concatenate, dot
from fastvae.influence.read_sweeps import uses_of
from fastvae.influence.scores import InfluenceWithError, self_scores
from fastvae.influence.sharding import Share
from fastvae.influence.snapshots import Snapshot, Snapshots
from fastvae.influence.sweeps import is_swept
from fastvae.influence.topk import KMostInfluentialResults, TopK
from fastvae.influence.uses import Uses
from fastvae.locks import Turns
from fastvae.models import HVAE, BaseVAE
from fastvae.private import private_copy
from fastvae.progress import with_bar
from fastvae.training import load_checkpoint
from fastvae.wrappers import unwrap

__all__ = ["InfluenceWithError", "KMostInfluentialResults", "TracIn"]

_FEW = 64
"""Samples in a tile at least, if its rows allow, and a divisor of its size: products with fewer run at a lower rate,
and with a few more, too."""


@dataclass(frozen=True)
class _Sizes:
    """How much a device works on at once."""

    rows: int
    """Samples x draws in a tile of the training set: enough for products to run at full rate."""
    gradient_bytes: int
    """Entries of gradients in a tile, where more than a few samples have so many. On a CPU the memory of one tile is
    used again for the next, where pages that are touched for the first time cost as much as the products."""
    query_bytes: int
    """Factors of queries held at once; beyond that the training set is gone through again for the rest."""


_ON_CPU, _ON_GPU = _Sizes(1024, 2**26, 2**29), _Sizes(16384, 2**30, 2**32)


class TracIn:
    """Influence of training samples on queries (Pruthi et al., NeurIPS 2020; for VAEs: Kong, Chaudhuri, 2021).

    The influence of a training sample x_i on a query x_j is

        sum over checkpoints c of  w_c <g_c(x_i), g_c(x_j)>,   g_c(x) = 1/S sum_s grad_theta loss(x, noise_s)

    over all trained parameters theta, exactly; positive for proponents (training on x_i lowered the loss of x_j),
    negative for opponents. Arguments, order and results are those of captum's ``TracInCP``. Each checkpoint is loaded
    into a private copy of the model, in eval mode: the model itself is not touched, so that others may train it or
    serve from it meanwhile. Several threads may call one object, which they do in turn.

    Args:
        model: any module; ``fastvae`` models need nothing else.
        train_dataset: a ``Dataset`` or a ``DataLoader`` in the data set's own order (one that shuffles is refused);
            also a tensor or tuple of tensors.
        checkpoints: files (or whatever ``checkpoints_load_func`` reads), each loaded once in the object's life; or
            the path of a folder, whose entries are taken in sorted order. None: the model as it is at each call.
        checkpoints_load_func: (a private copy of the model, checkpoint) -> weight w_c: learning rate times the
            epochs that it stands for. The default reads what ``fastvae.fit`` writes.
        layers: names of modules to restrict the parameters to; None: all.
        loss_fn: None: ``model(batch[0])`` gives the loss of each sample, [B]. Otherwise ``loss_fn(model(*batch[:-1]),
            batch[-1])``, for a batch of one tensor ``loss_fn(model(x), x)``: [B], or a scalar with an attribute
            ``reduction`` of "sum" or "mean".
        batch_size: at which ``train_dataset`` is collated at least. Results do not depend on it.
        test_loss_fn: of the queries, if another.
        sample_wise_grads_per_batch: accepted for captum's sake; gradients are always those of each sample.
        num_samples: S, draws of the noise of models that draw any, keyed by (seed, checkpoint, sample, draw). A
            checkpoint counts by its weights, not by its place: the scores of several are the sum of those of each,
            and their sampling errors average out (equal weights have equal noise).
        seed: of the noise.
        query_seed: of the queries' noise; None: the same. With the same noise a training sample's product with
            itself is larger by the sampling variance over S, which flatters retrieval of a query itself.
        uncovered: what becomes of parameters whose gradients neither a rule nor a module by itself (in a flow: an
            operation) gives, those of a decoder under a Jacobian penalty, say: "error" (:class:`UncoveredParameter`),
            or "materialise" (autograd, sample by sample: exact and slow).
        process_group: of ``torch.distributed``: the training set is shared out, every process calls with the
            same arguments and gets the whole result. None: this process alone.
        cache_dir: a folder in which the factors of the training set are kept (safetensors), so that further
            queries need no forward or backward pass over it. They take much more room than the images:
            ``coverage`` says by which route each layer goes. One folder for each model class and loss.
        condition: of a conditional ``fastvae`` model, where its condition is in a batch, as for :func:`fastvae.fit`.
        weight: where the weights of x's elements are, in the same way: of queries, too.

    Raises:
        UncoveredParameter: a parameter whose gradients would be missing; at the first call, too.
        ValueError: arguments that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        checkpoints: str | os.PathLike[str] | Iterable[Any] | None,
        checkpoints_load_func: Callable[..., float] = load_checkpoint,
        layers: Sequence[str] | None = None,
        loss_fn: Callable[..., Tensor] | None = None,
        batch_size: int = 1,
        test_loss_fn: Callable[..., Tensor] | None = None,
        sample_wise_grads_per_batch: bool = False,
        *,
        num_samples: int = 16,
        seed: int = 0,
        query_seed: int | None = None,
        uncovered: str = "error",
        process_group: Any = None,
        cache_dir: str | os.PathLike[str] | None = None,
        condition: int | str | Callable[[Any], Tensor] | None = None,
        weight: int | str | Callable[[Any], Tensor] | None = None,
    ) -> None:
        expect_numbers(
            "TracIn", num_samples=num_samples, batch_size=batch_size, seed=seed, query_seed=query_seed
        )
        expect_at_least("TracIn", 1, num_samples=num_samples, batch_size=batch_size)
        self.model = unwrap(model)
        self.train_dataset = train_dataset
        self.batch_size = batch_size
        check_order("train_dataset", train_dataset)
        self._snapshots = Snapshots(self.model, checkpoints, checkpoints_load_func, self._use)
        self._places = {
            name: place for name, place in (("condition", condition), ("weight", weight)) if place is not None
        }
        if self._places and not (isinstance(self.model, BaseVAE) and loss_fn is test_loss_fn is None):
            raise ValueError(f"TracIn: {next(iter(self._places))}: expected a fastvae model and its own loss")
        besides = tuple(self._places)
        private = private_copy(self.model)
        swept = is_swept(private) and not besides
        uses = None if swept or loss_fn is not None or test_loss_fn is not None else self._uses(private)
        self._engine = Engine(private, layers, uncovered, swept, uses)
        self._train = Evaluation(private, loss_fn, num_samples, seed, besides)
        self._query = Evaluation(
            private,
            loss_fn if test_loss_fn is None else test_loss_fn,
            num_samples,
            seed if query_seed is None else query_seed,
            besides,
        )
        self._train.reads = self._query.reads = uses is not None
        self._share = Share(process_group)
        self._turns = Turns()
        self._memory = raw.Recycling()
        self._cache = FactorCache(cache_dir)
        self._settings = f"{num_samples} {seed} {layers} {uncovered} noise keyed by weights"
        if weight is not None:
            self._settings += f" {besides}"

    def influence(
        self,
        inputs: Any,
        k: int | None = None,
        proponents: bool = True,
        show_progress: bool = False,
        aggregate: bool = False,
    ) -> Tensor | KMostInfluentialResults:
        """The influence of every training sample on every query, or of the k most influential ones.

        Args:
            inputs: queries: a tensor, a tuple of tensors as a batch of ``train_dataset`` has them, or a
                ``DataLoader``.
            k: how many training samples to name for each query; memory then does not grow with the training set.
                None: all scores.
            proponents: the k largest scores; False: the k smallest (opponents).
            show_progress: a bar over the training set (needs tqdm).
            aggregate: the influence on the sum of the queries' losses: n_test is 1.

        Returns:
            [n_test, n_train] on the CPU, or :class:`KMostInfluentialResults` of [n_test, k].
        """
        expect_at_least("TracIn: influence", 1, optional=True, k=k)
        with self._borrowed():
            queries = self._queries(inputs)
            if k is None or aggregate:
                scores = self._all_scores(queries, show_progress, aggregate)
                if k is None:
                    return scores
                best = TopK(k, proponents)
                best.add(torch.arange(scores.shape[1], device="cpu"), scores)
                return best.result()
            found = []
            for part in self._parts(queries):
                best = TopK(k, proponents)
                for first, scores in self._stream(part, show_progress):
                    best.add(torch.arange(first, first + scores.shape[1], device="cpu"), scores)
                found.append(self._share.merged(best).result())
        return KMostInfluentialResults(*(torch.cat(columns) for columns in zip(*found, strict=True)))

    def influence_with_error(self, inputs: Any, show_progress: bool = False) -> InfluenceWithError:
        """All scores, and the standard error that each has from averaging over S draws instead of all.

        A score is the product of two means over S independent draws; the spread of its terms over the draws of
        the training sample and over those of the query gives its variance (delta method), which adds up over
        checkpoints. With common noise on
        both sides (``query_seed=None``) that of a sample with itself leaves out a bias of the same order.

        Raises:
            ValueError: fewer than two draws, or a model that draws no noise.
        """
        with self._borrowed():
            queries = self._queries(inputs)
            draws = self._train.draws_of(queries)
            if draws < 2:
                raise ValueError(
                    "TracIn: influence_with_error: expected a model that draws noise and num_samples of at least 2"
                )
            scores, variances = [], []
            for part in self._parts(queries):
                tiles = [
                    (first, torch.stack(self._with_variance(part, batch, draws)).flatten(0, 1))
                    for first, batch in self._tiles(self._routes(part), show_progress)
                ]
                both = self._share.assembled(tiles, 2 * len(part[0]), self._count()).unflatten(0, (2, -1))
                scores.append(both[0])
                variances.append(both[1])
        return InfluenceWithError(torch.cat(scores), torch.cat(variances).sqrt())

    def self_influence(
        self,
        inputs: Any = None,
        show_progress: bool = False,
        outer_loop_by_checkpoints: bool = False,
        *,
        unbiased: bool = False,
    ) -> Tensor:
        """The influence of every sample on itself: sum_c w_c |g_c(x)|^2.

        Args:
            inputs: as in ``influence``; None: the training set.
            show_progress: a bar over the samples (needs tqdm).
            outer_loop_by_checkpoints: accepted for captum's sake; the result is the same.
            unbiased: the U-statistic (|sum_s g_s|^2 - sum_s |g_s|^2) / (S (S - 1)) instead of the squared norm of
                the mean, which the sampling variance of the S draws makes larger.

        Returns:
            [n] on the CPU.

        Raises:
            ValueError: ``unbiased`` with fewer than two draws, or a model that draws no noise.
        """
        evaluation = self._train if inputs is None else self._query
        check_order("inputs", inputs)
        with self._borrowed():
            self._audit(evaluation, self.train_dataset if inputs is None else inputs)
            routes = self._engine.routes(_FEW, None)
            parts = []
            for first, batch in self._tiles(routes, show_progress, inputs):
                parts.append(
                    (first, self_scores(self._snapshots, self._engine, evaluation, batch, unbiased)[None])
                )
            return self._share.assembled(parts, 1, self._count(inputs))[0]

    def forget_checkpoints(self) -> None:
        """Load them anew at the next call."""
        with self._turns:
            self._snapshots.forget()

    def coverage(self, num_queries: int = 100) -> Coverage:
        """How every parameter's part of the scores is computed, for so many queries; ``print`` shows a table."""
        with self._borrowed():
            return self._engine.coverage(self._count(), num_queries)

    def _uses(self, private: nn.Module) -> Uses | None:
        """Of the parameters of a decoder that is read, for codes of the first samples."""
        if not isinstance(private, HVAE) or self.train_dataset is None:
            return None
        take = functools.partial(with_entries, self._places) if self._places else images_alone
        try:
            batch = next(tiles_of(self.train_dataset, 2, self.batch_size, take))
            given = dict(zip(self._places, self._here(batch)[1:], strict=True))
            given.pop("weight", None)
            with torch.no_grad():
                z, _ = private.encode(self._here(batch)[0], **given)
        # What does not fit is said at the first call.
        except Exception:
            return None
        return uses_of(private, z, given.get("condition"))

    def _use(self, snapshot: Snapshot) -> None:
        """Work under a checkpoint."""
        self._engine.bind(snapshot.model)
        self._train.bind(snapshot)
        self._query.bind(snapshot)

    @contextmanager
    def _borrowed(self) -> Iterator[None]:
        """All checkpoints loaded, every parameter known to be covered, and no other thread here."""
        with self._turns, self._snapshots.borrowed(), self._memory:
            if self.train_dataset is not None:
                self._audit(self._train, self.train_dataset)
            yield

    def _audit(self, evaluation: Evaluation, data: Any) -> None:
        if not self._engine.audited(evaluation):
            few = next(tiles_of(spread_over(data, AUDITED), AUDITED, self.batch_size, self._take(evaluation)))
            self._engine.audit(evaluation, self._here(few))

    # ---- samples ----

    def _take(self, evaluation: Evaluation) -> Take:
        if self._places:
            return functools.partial(with_entries, self._places)
        return images_alone if evaluation.loss_fn is None else whole_batch

    def _count(self, data: Any = None) -> int:
        return count_of(self.train_dataset if data is None else data)

    def _here(self, batch: Batch) -> Batch:
        device = next(self.model.parameters()).device
        # Tensors made under inference_mode cannot take part in a backward pass.
        return tuple((part.clone() if part.is_inference() else part.detach()).to(device) for part in batch)

    @property
    def _sizes(self) -> _Sizes:
        return _ON_CPU if next(self.model.parameters()).device.type == "cpu" else _ON_GPU

    def _tile(self, evaluation: Evaluation, routes: dict[str, str]) -> int:
        """Samples to work on at once."""
        element, sizes = next(self.model.parameters()).element_size(), self._sizes
        each = max(1, self._engine.gradient_numel(routes) * element)
        fitting = max(_FEW, sizes.gradient_bytes // each // _FEW * _FEW)
        return max(1, min(sizes.rows // evaluation.draws, fitting))

    def _tiles(
        self, routes: dict[str, str], show_progress: bool, data: Any = None
    ) -> Iterator[tuple[int, Batch]]:
        """This process's tiles of the training set (or of ``data``), with the index of their first sample."""
        evaluation = self._train if data is None else self._query
        data = self.train_dataset if data is None else data
        tile = self._tile(evaluation, routes)
        tiles: Iterable[Batch] = tiles_of(data, tile, self.batch_size, self._take(evaluation))
        if show_progress:
            tiles = with_bar("TracIn", tiles, "tile", -(-count_of(data) // tile))
        first = 0
        for index, batch in enumerate(tiles):
            if self._share.is_mine(index):
                yield first, self._here(batch)
            first += len(batch[0])

    def _queries(self, inputs: Any) -> Batch:
        """All queries as one batch."""
        check_order("inputs", inputs)
        parts = list(tiles_of(inputs, 2**40, self.batch_size, self._take(self._query)))
        if not parts:
            raise ValueError("TracIn: inputs: expected at least one sample")
        queries = self._here(parts[0])
        self._engine.audit(self._query, queries)
        return queries

    def _parts(self, queries: Batch) -> Iterator[Batch]:
        """The queries, so many at a time as their factors fit."""
        element = next(self.model.parameters()).element_size()
        each = self._engine.factor_numel(self._routes(queries)) * element * len(self._snapshots)
        count = max(1, self._sizes.query_bytes // max(1, each))
        for first in range(0, len(queries[0]), count):
            yield tuple(part[first : first + count] for part in queries)

    # ---- scores ----

    def _factors(
        self, evaluation: Evaluation, batch: Batch, routes: dict[str, str], fold: bool = True
    ) -> Factors:
        """Of a batch of any size, under the current checkpoint."""
        tile = self._tile(evaluation, routes)
        return concatenate(
            [
                self._engine.factors(
                    evaluation, tuple(part[i : i + tile] for part in batch), routes, fold=fold
                )
                for i in range(0, len(batch[0]), tile)
            ]
        )

    def _train_factors(self, batch: Batch, routes: dict[str, str]) -> Factors:
        """Of a tile of the training set, from the cache if there is one."""
        if not self._cache.enabled:
            return self._factors(self._train, batch, routes)
        samples = fingerprint({str(i): part for i, part in enumerate(batch)})
        key = f"{self._settings} {self._snapshots.fingerprint()} {samples} {sorted(routes.items())}"
        found = self._cache.get(key, lambda: self._factors(self._train, batch, routes))
        return found.to(batch[0].device)

    def _routes(self, queries: Batch) -> dict[str, str]:
        return self._engine.routes(self._count(), len(queries[0]))

    def _stream(self, queries: Batch, show_progress: bool) -> Iterator[tuple[int, Tensor]]:
        """Scores [M, n] of tile after tile, with the index of the tile's first sample."""
        self._snapshots.enter(0)
        routes = self._routes(queries)
        of_queries = []
        for index in range(len(self._snapshots)):
            self._snapshots.enter(index)
            of_queries.append(self._factors(self._query, queries, routes))
        for first, batch in self._tiles(routes, show_progress):
            total: Tensor | None = None
            for index, factors in enumerate(of_queries):
                weight = self._snapshots.enter(index)
                scores = dot(factors, self._train_factors(batch, routes)).mul_(weight)
                total = scores if total is None else total.add_(scores)
            assert total is not None
            yield first, total.cpu()

    def _all_scores(self, queries: Batch, show_progress: bool, aggregate: bool) -> Tensor:
        """[M, N], or [1, N] summed over the queries."""
        found = []
        for part in self._parts(queries):
            tiles = [
                (first, scores.sum(0, keepdim=True) if aggregate else scores)
                for first, scores in self._stream(part, show_progress)
            ]
            found.append(self._share.assembled(tiles, 1 if aggregate else len(part[0]), self._count()))
        if aggregate:
            return torch.stack(found).sum(0)
        return torch.cat(found) if len(found) > 1 else found[0]

    def _with_variance(self, queries: Batch, batch: Batch, draws: int) -> tuple[Tensor, Tensor]:
        """Scores [M, n] and their sampling variance."""
        routes = self._routes(queries)
        scores = torch.zeros(len(queries[0]), len(batch[0]), device="cpu")
        variance = torch.zeros_like(scores)
        for group in self._snapshots.by_noise():
            by_query: Tensor | float = 0.0
            by_sample: Tensor | float = 0.0
            for index in group:
                weight = self._snapshots.enter(index)
                mean_q, mean_t = (
                    self._factors(self._query, queries, routes),
                    self._factors(self._train, batch, routes),
                )
                each_q = self._factors(self._query, queries, routes, fold=False)
                each_t = self._factors(self._train, batch, routes, fold=False)
                by_query = by_query + weight * dot(each_q, mean_t).view(-1, draws, len(batch[0]))
                by_sample = by_sample + weight * dot(mean_q, each_t).view(len(queries[0]), -1, draws)
            assert isinstance(by_query, Tensor) and isinstance(by_sample, Tensor)
            # Noise under other weights is independent: variances add.
            scores = scores + by_query.mean(1).cpu()
            variance = variance + (by_query.var(1) / draws + by_sample.var(2) / draws).cpu()
        return scores, variance
