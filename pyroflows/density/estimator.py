"""The density estimator of tables: scikit-learn's conventions, DataFrames on both sides."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyroflows.density import files
from pyroflows.density.cellwise import exact_model, score_columns
from pyroflows.density.conventions import (
    Conventions,
    NotFittedError,
    when_fitted,
    with_flow,
    with_labels,
)
from pyroflows.density.engine import Engine, Fit, Settings, TrainingTable
from pyroflows.density.explain import Explanation, calibrated, explain
from pyroflows.density.flow_engine import FlowEngine
from pyroflows.density.inputs import Evidence, Inputs, check_settings, count, read_schema, weights
from pyroflows.density.mixed_engine import MixedEngine
from pyroflows.density.model import TableModel
from pyroflows.density.oddness import by_quantiles
from pyroflows.density.predict import label_table, predicted, target_of
from pyroflows.density.quality import Report, compare, drawn_like
from pyroflows.density.queries import (
    calibrate,
    imputed,
    intervals,
    log_prob,
    means,
    noise_of,
    pit,
    quantiles,
    rows_of,
    sampled,
    summary,
)
from pyroflows.density.streaming import Source, TableFile, shards_of
from pyroflows.density.surprise import oddness_of, row_oddness
from pyroflows.flow import Flow
from pyroflows.tables import as_frame
from pyroflows.tables.frames import takes_tables
from pyroflows.tables.schema import ignored
from pyroflows.training.budget import Budget
from pyroflows.training.parallel import rank_and_world

if TYPE_CHECKING:
    import pandas as pd
    import pyro.distributions as dist

__all__ = ["DensityEstimator", "NotFittedError"]


@takes_tables("X", "given", "real")
class DensityEstimator(Conventions):
    r"""Density of the rows of a table: exact log-densities, samples, conditionals and imputations.

    .. math:: p(row) = \prod_t p(x_t \mid x_1, \ldots, x_{t-1})

    Each conditional of a number is a mixture of logistics on a smooth scale and of the bins of an
    adaptive histogram, that of a label is a softmax; the parameters come from one small network
    per column, several of them averaged, and for tables of up to 20,000 rows joined with a mixture
    of Gaussians in the proportion that held-out rows prefer.

    Log-densities are in data units: labels and integers count as probabilities, continuous columns
    as densities, lattice-valued ones as P(cell) / step, datetimes per second. Missing cells are
    integrated out: exactly if no observed column comes after them in the model's order (which puts
    columns with missing cells last) or few labels are missing, by quadrature if one number is, by
    draws with a fixed seed and a known error else. A row's score is its own.

    Args:
        target: Columns to model; None for all that are not given.
        given: Columns to condition on; None for none, or for all others where ``target`` is set.
        schema: Changes to what the columns are taken for, e.g. ``{"price": {"step": None}, "zip":
            {"kind": "categorical"}, "id": {"kind": "key"}, "note": {"kind": "ignore"}}``; see
            :class:`pyroflows.tables.Column`. Keys are drawn afresh; what is ignored is left out.
        flow: None for the model above; or a flow for the numbers, given labels and point masses,
            which keep their model: the name of a recipe (``"neural_spline"``, ``"maf"``,
            ``"realnvp"``, ``"nice"``, ``"glow"``, ``"iaf"``), of a size that suits the table, or
            what makes a flow of ``(input_dim, context_dim)``. The table must have no missing
            cells. See :class:`~pyroflows.density.flow_engine.FlowEngine`.
        dequantization_draws: With a flow, points of a row's recording cells whose densities are
            averaged where rows are scored: 1 for the bound of uniform dequantization, more for a
            tighter one.
        constraints: What holds between columns of every row, e.g. ``["start < end", "a + b ==
            c"]``; see :mod:`pyroflows.tables.constraints`.
        missing: ``"ignore"``: missing cells are integrated out; ``"model"``: which cells are
            missing is part of the row, in scores and samples.
        max_time: Seconds of processor time for the whole fit, at most but for a last check; a
            warning says what they cut.
        max_steps: Optimizer steps, at most; None for a plan by the size of the table.
        members: Networks per column; None for a choice by the number of rows.
        hidden_dim: Width of the networks; None for a choice by the number of rows.
        batch_size: Rows per step; None for a choice by the number of rows.
        learning_rate: Peak of the schedule.
        draws: Particles per row where missing cells are integrated out or filled in.
        random_state: Seed, ``numpy.random.RandomState``, or None.
        device: ``"auto"`` (a GPU for large tables where there is one), or any name torch knows.
        progress: Show a bar with the held-out nats.

    Attributes:
        engine_: The fitted :class:`~pyroflows.density.engine.Engine`.
        schema_: What the columns are.
        history_: DataFrame of the training.
        n_features_in_: Number of columns.
        feature_names_in_: Their names, if they are all strings and came with a DataFrame.

    Example:
        >>> import pandas as pd
        >>> from pyroflows.density import DensityEstimator
        >>> table = pd.DataFrame({"a": range(60), "b": ["x", "y", "z"] * 20})
        >>> model = DensityEstimator(random_state=0, max_steps=20).fit(table)
        >>> model.sample(3).columns.tolist()
        ['a', 'b']
    """

    def __init__(
        self,
        *,
        target: Sequence[Any] | None = None,
        given: Sequence[Any] | None = None,
        schema: Mapping[Any, Mapping[str, Any]] | None = None,
        constraints: Sequence[Any] | None = None,
        flow: str | Callable[[int, int], Flow] | None = None,
        dequantization_draws: int = 8,
        missing: str = "ignore",
        max_time: float = 90.0,
        max_steps: int | None = None,
        members: int | None = None,
        hidden_dim: int | None = None,
        batch_size: int | None = None,
        learning_rate: float = 3e-3,
        draws: int = 64,
        random_state: Any = None,
        device: str = "auto",
        progress: bool = False,
    ) -> None:
        self.target = target
        self.given = given
        self.schema = schema
        self.constraints = constraints
        self.flow = flow
        self.dequantization_draws = dequantization_draws
        self.missing = missing
        self.max_time = max_time
        self.max_steps = max_steps
        self.members = members
        self.hidden_dim = hidden_dim
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.draws = draws
        self.random_state = random_state
        self.device = device
        self.progress = progress

    # ------------------------------------------------------------------ input

    @property
    def model_(self) -> TableModel:
        """The fitted model of the default engine."""
        engine = self._ready()
        if engine.exact is None:
            raise AttributeError(f"{type(engine).__name__} has no model_; see engine_")
        return engine.exact

    def _ready(self) -> Engine:
        if not hasattr(self, "engine_"):
            message = (
                f"This {type(self).__name__} is not fitted yet. Call 'fit' with a table first."
            )
            if "sklearn" in sys.modules:
                from sklearn.exceptions import NotFittedError as Theirs

                raise Theirs(message)
            raise NotFittedError(message)
        return self.engine_

    @property
    def _inputs(self) -> Inputs:
        """What reads tables as the fit did."""
        engine = self._ready()
        others = self.target is not None or self.given is not None or bool(ignored(self.schema))
        named = hasattr(self, "feature_names_in_")
        return Inputs(type(self).__name__, engine, named=named, others=others)

    # ------------------------------------------------------------------ fitting

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> DensityEstimator:
        """Fit the density of a table.

        Args:
            X: DataFrame, mapping of columns, array of shape (rows, columns), or a
                :class:`~pyroflows.density.streaming.Source`, see :meth:`fit_file`.
            y: Ignored.
            sample_weight: Nonnegative weight of each row: how often it counts as repeated, where
                all weights are whole numbers; else relative to their mean.

        Returns:
            The estimator.

        Raises:
            ValueError: For an empty table, infinite cells, or names that are not columns, naming
                them.
        """
        check_settings(self.get_params())
        if isinstance(X, Source):
            if sample_weight is not None:
                raise ValueError("sample_weight is for tables in memory; a source has none")
            return self.fit_file(X)
        budget = Budget(self.max_time)
        frame, named = as_frame(X), hasattr(X, "columns")
        for size, kind in zip(frame.shape, ("sample", "feature"), strict=True):
            if size == 0:
                raise ValueError(
                    f"0 {kind}(s) (shape={frame.shape}) while a minimum of 1 is required."
                )
        weight = weights(sample_weight, len(frame))
        return self._fit(frame[weight > 0], weight[weight > 0], budget, named=named)

    def fit_file(
        self,
        path: Any,
        *,
        in_memory: int = 1_000_000,
        sample_rows: int = 200_000,
        **options: Any,
    ) -> DensityEstimator:
        """Fit a file or another source of rows, streamed if it has more than ``in_memory``.

        The schema, scales and held-out rows then come from a random sample; training rows stream
        in shuffled chunks, row groups in random order.

        Args:
            path: The file or folder, or any :class:`~pyroflows.density.streaming.Source`.
            in_memory: Rows up to which the table is simply read.
            sample_rows: Size of the sample.
            options: For text, those of :func:`pandas.read_csv`: ``sep``, ``na_values``, ...
        """
        check_settings(self.get_params())
        source = path if isinstance(path, Source) else TableFile(path, **options)
        if source.count() <= in_memory:
            return self.fit(source.read())
        budget = Budget(self.max_time)
        frame = source.sample(sample_rows, np.random.default_rng(self._seed()))
        return self._fit(frame, np.ones(len(frame)), budget, named=True, source=source)

    def _fit(
        self,
        frame: pd.DataFrame,
        weight: np.ndarray,
        budget: Budget,
        *,
        named: bool,
        source: Source | None = None,
    ) -> DensityEstimator:
        """Fit a frame; or, from a source, the rows of which it is a sample."""
        self._forget()
        roles = dict(target=self.target, given=self.given)
        changes, bonds = self.schema or {}, self.constraints or ()
        self.schema_, given = read_schema(frame, **roles, changes=changes, constraints=bonds)
        names = self.schema_.names
        self.n_features_in_ = len(names)
        if named and all(isinstance(c, str) for c in frame.columns):
            self.feature_names_in_ = np.array(names, dtype=object)
        table = TrainingTable(
            self.schema_,
            torch.from_numpy(self.schema_.encode(frame[names])),
            torch.from_numpy(weight),
            [names.index(g) for g in given],
        )
        if source is not None:
            shards = shards_of(source, self.schema_, np.random.default_rng(self._seed()))
            table = dataclasses.replace(table, shards=shards, total=source.count())
        engine = self._engine()
        with torch.inference_mode(False), torch.enable_grad():
            fit = engine.fit(table.cloned(), budget=budget, generator=self._generator())
        self.engine_, self.history_ = engine, _history(fit.history)
        self._calibrate(table, fit, 200 if budget.over() else 2000)
        budget.warn()
        return self

    def _forget(self) -> None:
        for name in ("feature_names_in_", "engine_", "schema_", "history_", "oddness_"):
            if hasattr(self, name):
                delattr(self, name)

    def _engine(self) -> Engine:
        """A new engine with the settings of the constructor."""
        if self.flow is None:
            return MixedEngine(self._settings())
        return FlowEngine(self._settings(), self.flow, self.dequantization_draws)

    def _settings(self) -> Settings:
        names = [field.name for field in dataclasses.fields(Settings)]
        return Settings(**{name: getattr(self, name) for name in names})

    def _calibrate(self, table: TrainingTable, fit: Fit, rows: int = 2000) -> None:
        """Keep what thresholds and summaries need of the held-out rows."""
        self._score_quantiles, self._column_nats = calibrate(self.engine_, table, fit, rows)
        self.oddness_ = oddness_of(self.engine_, table, fit, rows, self.missing == "model")

    @torch.inference_mode(False)
    @torch.enable_grad()
    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> DensityEstimator:
        """Go on training on more rows of the same columns.

        The schema, scales and bins stay those of the first call.
        """
        if not hasattr(self, "engine_"):
            return self.fit(X, y, sample_weight)
        import pandas as pd

        values = self._inputs.values(X)
        weight = torch.from_numpy(weights(sample_weight, len(values)))
        given = self.engine_.order[: self.engine_.num_given]
        table, budget = TrainingTable(self.schema_, values, weight, given), Budget(self.max_time)
        self.engine_.settings = self._settings()
        fit = self.engine_.partial_fit(table, budget=budget, generator=self._generator())
        budget.warn()
        self.history_ = pd.concat([self.history_, _history(fit.history)], ignore_index=True)
        self._calibrate(table, fit)
        return self

    # ------------------------------------------------------------------ densities

    def score_samples(self, X: Any, *, return_error: bool = False) -> Any:
        """Log-density of each row, shape (rows,), in data units; ``-inf`` outside the support.

        Args:
            X: A table of the columns of the fit.
            return_error: Whether to return also the error of each row in nats: 0 for complete
                rows and sums over missing labels, numerical where one missing number is
                integrated out, a standard error where draws do it.
        """
        nats, error = log_prob(
            self._ready(),
            self._inputs.frame(X),
            pattern=self.missing == "model",
            draws=self.draws,
        )
        return (nats, error) if return_error else nats

    def score_columns(self, X: Any) -> pd.DataFrame:
        """Log-density of each cell given the row's earlier ones in the model's order.

        One column a target, in the table's order; a row's cells sum to its :meth:`score_samples`.
        Impossible values have ``-inf``, labels that fitting did not see its small share. A missing
        cell has NaN (skipped in the sum), and cells after it their log-density given the observed
        ones; with ``missing="model"`` it has the log-probability of being missing.
        """
        model = exact_model(self._ready(), "score_columns")
        frame = self._inputs.frame(X)
        return score_columns(model, frame, pattern=self.missing == "model", draws=self.draws)

    def score(self, X: Any, y: Any = None) -> float:
        """Mean log-density of the rows."""
        return float(np.mean(self.score_samples(X)))

    def log_marginal(self, X: Any, *, draws: int | None = None, return_error: bool = False) -> Any:
        """Log-density of the cells that are there, shape (rows,).

        Columns may be absent, whatever ``missing`` says.

        Args:
            X: A table of some of the columns, or conditions as :meth:`sample` takes them, of which
                the log-probability counts (of several values of a density their summed density).
            draws: Particles per row and batch, where draws are needed; default the estimator's.
            return_error: As in :meth:`score_samples`.
        """
        engine, frame = self._inputs.part(X)
        draws = self.draws if draws is None else count("draws", draws)
        nats, error = log_prob(engine, frame, partial=True, draws=draws)
        return (nats, error) if return_error else nats

    def probability(
        self, condition: Mapping[Any, Any], *, draws: int = 256, return_error: bool = False
    ) -> Any:
        """Probability that a row fulfils conditions, e.g. ``{"age": (18, 30), "sex": "F"}``.

        Args:
            condition: As ``given`` of :meth:`sample`; a scalar is that value. A conditional model
                needs the columns that it is given, as scalars or arrays.
            draws: Particles per batch, where sums are too many.
            return_error: Whether to return also the error, numerical or a standard error.

        Returns:
            One number, or shape (rows,) where columns are arrays.

        Raises:
            ValueError: If a single value of a continuous column is asked for, or no cell of a
                column fulfils its condition.
        """
        events, one = self._inputs.events(condition)
        nats, error = self.log_marginal(events, draws=draws, return_error=True)
        out: Any = np.exp(nats), np.exp(nats) * error
        out = (float(out[0][0]), float(out[1][0])) if one else out
        return out if return_error else out[0]

    def predict_outliers(self, X: Any, contamination: float = 0.01) -> np.ndarray:
        """True for rows odder than all but this share of the held-out rows of the fit."""
        if not 0 < contamination < 1:
            raise ValueError(f"contamination must lie in (0, 1); got {contamination}")
        return self.outlier_score(X) > -np.log(contamination)

    def outlier_score(self, X: Any) -> np.ndarray:
        """How odd rows are, shape (rows,): ``exp(-score)`` of held-out rows are at least as odd.

        A row is as odd as its oddest cell, or as all of its cells together, whichever is rarer;
        beyond the held-out rows the share is extrapolated. Infinite outside the support and where
        a constraint is broken. One pass over the conditionals, as :meth:`score_samples`.
        """
        engine, frame = self._ready(), self._inputs.frame(X)
        if self.oddness_ is None:
            return by_quantiles(-self._score_quantiles, -self.score_samples(X))
        return row_oddness(engine, self.oddness_, frame, pattern=self.missing == "model")

    def explain(self, X: Any, *, given: str = "earlier", coverage: float = 0.9) -> Explanation:
        """Why rows are odd: for each cell, what was expected and how odd it is.

        A cell's ``tail`` is the share of held-out rows whose cell in that column is at least as
        surprising: small is odd, 0 is impossible. A cell that is odd by itself (outside the
        support, beyond nearly all of its column, a label that fitting did not see) is blamed
        alone: the others are judged as if it were what was expected.

        Args:
            X: A table of the columns of the fit; best some rows, such as the outliers.
            given: ``"earlier"``: each cell given those before it in the model's order; quick, but
                of two cells that do not fit each other the later one is blamed. ``"others"``: each
                given all others of its row, which blames both; some 0.02 to 0.05 seconds for each
                row and column. Tails are calibrated by held-out cells given earlier ones.
            coverage: Of the intervals.

        Returns:
            An :class:`~pyroflows.density.explain.Explanation`: ``.top()``, ``.table``, ``.tail``,
            ``.rows``, ``.plot()``.
        """
        model, frame = exact_model(self._ready(), "explain"), self._inputs.frame(X)
        held, pattern = calibrated(self.oddness_), self.missing == "model"
        return explain(model, held, frame, given=given, coverage=coverage, pattern=pattern)

    def pit(self, X: Any, random_state: Any = 0) -> pd.DataFrame:
        """Probability integral transforms F(x_t | earlier columns): uniform if the model is right.

        Point masses and lattice cells are spread uniformly over their jump. With a flow, of the
        noise that makes a row's numbers; see :meth:`transform`.
        """
        frame = self._inputs.frame(X)
        return pit(self._ready(), frame, self._generator(random_state))

    # ------------------------------------------------------------------ samples

    def sample(
        self,
        n: int = 1,
        given: Any = None,
        *,
        missing: bool | None = None,
        random_state: Any = None,
    ) -> Any:
        """Draw rows.

        Args:
            n: Number of rows, or of rows per row of ``given``.
            given: What to condition on: a dict or DataFrame with some of the columns (of a joint
                model), or with all given columns. Beside values a dict takes conditions: a tuple
                ``(low, high)`` for a range, None for an open end; a set, or beside conditions a
                list, for one of these values; a function from a Series of cells to booleans. See
                :mod:`pyroflows.tables.conditions`.
            missing: Whether cells may be missing, as often as in the data; default as
                ``missing="model"`` says.
            random_state: Seed; default the estimator's.

        Returns:
            DataFrame of the columns of the fit with their dtypes; n consecutive rows for each row
            of ``given``.
        """
        leave = self.missing == "model" if missing is None else missing
        evidence = None if given is None else self._inputs.given(given)
        generator = self._generator(random_state)
        return self._wrapped(sampled(self._ready(), n, evidence, generator=generator, leave=leave))

    def impute(self, X: Any, n: int = 1, *, method: str = "draw", random_state: Any = None) -> Any:
        """Fill in missing cells from their distribution given the row's observed ones.

        Several imputations are independent draws of all gaps of a row at once: an analysis run on
        each and pooled by Rubin's rules (1987) counts what the gaps leave unknown. A row's
        imputations depend on the row, its place in the table and the seed alone.

        Args:
            X: Table with missing cells; absent columns of a joint model count as missing.
            n: Imputations.
            method: ``"draw"`` a joint draw per row, or ``"mean"`` the mean of a number and the
                most probable label, each by itself.
            random_state: Seed; default the estimator's.

        Returns:
            The table without gaps; a list of ``n`` of them if n > 1.
        """
        if method not in ("draw", "mean") or method == "mean" and n != 1:
            raise ValueError(f"method must be 'draw', or 'mean' of n=1; got {method!r}, n={n!r}")
        frame, draws = self._inputs.frame(X, partial=True), max(self.draws, 256)
        tables = imputed(
            self._ready(),
            frame,
            count("n", n),
            draws=draws if method == "mean" else None,
            generator=self._generator(random_state),
        )
        found = [self._wrapped(table) for table in tables]
        return found if n > 1 else found[0]

    # ------------------------------------------------------------------ summaries of conditionals

    def quantile(
        self,
        given: Any,
        q: float | Sequence[float] = 0.5,
        *,
        draws: int = 1024,
        random_state: Any = None,
    ) -> pd.DataFrame:
        """Quantiles of the number targets given the rest of each row.

        Exact (by inverting the distribution function) for the first missing target if no observed
        one comes after it in the model's order, as in a conditional model; from ``draws`` samples
        otherwise.

        Args:
            given: Rows to condition on; for a joint model, columns that are absent or missing are
                the targets. Or conditions, as :meth:`sample` takes them.
            q: One probability or several.
            draws: Samples per row.
            random_state: Seed; default the estimator's.

        Returns:
            One column per target, or per (target, q) if q is a sequence.
        """
        draws, evidence = count("draws", draws), self._inputs.given(given)
        generator = self._generator(random_state)
        return quantiles(evidence, q, draws=draws, generator=generator)

    def interval(self, given: Any, coverage: float = 0.9, **options: Any) -> pd.DataFrame:
        """Central prediction intervals, columns (target, "lower") and (target, "upper").

        Options as for :meth:`quantile`.
        """
        if not 0 < coverage < 1:
            raise ValueError(f"coverage must lie in (0, 1); got {coverage}")
        levels = [(1 - coverage) / 2, (1 + coverage) / 2]
        return intervals(self.quantile(given, levels, **options))

    def mean(self, given: Any, *, draws: int = 1024, random_state: Any = None) -> pd.DataFrame:
        """Means of the number targets given the rest of each row.

        Of the exact conditional for the first missing target if no observed one comes after it in
        the model's order, as in a conditional model; averages of ``draws`` samples otherwise.
        """
        draws, evidence = count("draws", draws), self._inputs.given(given)
        generator = self._generator(random_state)
        return means(evidence, draws=draws, generator=generator)

    # ------------------------------------------------------------------ predictions

    @when_fitted
    def predict(self, X: Any, target: Any = None, *, random_state: Any = None) -> pd.Series:
        """One column given the other cells of each row.

        The most probable label, or the conditional mean of a number (a median is ``quantile``).
        Whatever X holds in that column is not looked at; missing cells are integrated out.

        Args:
            X: Rows, or conditions as :meth:`sample` takes them; columns may be absent.
            target: The column; None for the only target of the model, the only one that X lacks,
                or the last.
            random_state: Seed, where means take draws; default the estimator's.

        Returns:
            Series of the column's type with the index of X (means of integers are floats).
        """
        target, evidence = self._without(X, target, label=False)
        generator = self._generator(random_state)
        return predicted(evidence, target, draws=self.draws, generator=generator)

    @with_labels
    def predict_proba(self, X: Any, target: Any = None) -> pd.DataFrame:
        """Probabilities of the labels of one column given the other cells of each row.

        Exact, by Bayes' rule over all labels; other missing cells are integrated out as in
        :meth:`log_marginal`.

        Args:
            X: As for :meth:`predict`.
            target: The label column; None for the only one that X lacks, or the last.

        Returns:
            One column a label, one row a row of X; rows sum to one.

        Raises:
            ValueError: If the column holds no labels.
        """
        target, evidence = self._without(X, target, label=True)
        return label_table(evidence, target, draws=self.draws)

    def _without(self, X: Any, target: Any, *, label: bool) -> tuple[Any, Evidence]:
        """The column to predict, and the evidence of the others."""
        engine = self._ready()
        rows = X if isinstance(X, Mapping) else self._inputs.frame(X, partial=True)
        target = target_of(engine, target, list(rows), label=label)
        if isinstance(rows, Mapping):
            return target, self._inputs.given({k: v for k, v in rows.items() if k != target})
        return target, self._inputs.given(rows[[c for c in rows.columns if c != target]])

    # ------------------------------------------------------------------ the flow

    @property
    def flow_(self) -> Flow:
        """The fitted flow of the numbers, in data units; its context is :meth:`flow_context`."""
        return self._flow_engine("flow_").flow

    def flow_context(self, X: Any) -> Tensor | None:
        """What the flow is told of rows: given columns, labels, and which atoms; float64."""
        engine = self._flow_engine("flow_context")
        return engine.context(self._inputs.values(X))

    @with_flow
    def transform(self, X: Any) -> pd.DataFrame:
        """The noise from which the flow makes the rows' numbers: standard normal, if it is right.

        A value on a lattice counts as the middle of its recording cell, one at a point mass as
        the median of its column.
        """
        return noise_of(self._flow_engine("transform"), self._inputs.frame(X))

    @with_flow
    def inverse_transform(self, noise: Any, given: Any = None) -> Any:
        """The rows that noise makes; undoes :meth:`transform`.

        To rounding, and exactly on a lattice.

        Args:
            noise: Table or array of one column a number.
            given: Rows with the given columns and labels, and with numbers where they are at a
                point mass, which they keep; None where the flow has no context.
        """
        engine = self._flow_engine("inverse_transform")
        frame = None if given is None else self._inputs.frame(given, partial=True)
        return self._wrapped(rows_of(engine, noise, frame))

    def _flow_engine(self, what: str) -> FlowEngine:
        engine = None if self.flow is None else self._ready()
        if not isinstance(engine, FlowEngine):
            raise AttributeError(
                f"{what} needs a flow: fit a DensityEstimator(flow='neural_spline')"
            )
        return engine

    # ------------------------------------------------------------------ reports and files

    def summary(self) -> pd.DataFrame:
        """One row per column.

        Its role, how it is modelled, its share of missing cells, its held-out nats given
        earlier columns.
        """
        return summary(self._ready(), self._column_nats)

    def report(
        self, real: Any, synthetic: Any = None, *, train: Any = None, random_state: Any = None
    ) -> Report:
        """How good samples are, beside real rows: see :func:`pyroflows.density.quality.compare`.

        Two-sample AUC, distances of columns and pairs, nats, copies of training rows; of at most
        20,000 rows.

        Args:
            real: A table of the columns of the fit, best rows that it did not see.
            synthetic: Rows of any other origin; default draws of this model.
            train: The rows of the fit, so that copies of them are seen; default half of ``real``.
            random_state: Seed; default the estimator's.
        """
        frame, seed = self._inputs.frame(real), self._seed(random_state)
        keys = [c.name for c in self.schema_ if c.kind == "key"]
        if synthetic is None:
            few = frame.sample(min(len(frame), 20000), random_state=seed % 2**31)
            synthetic = drawn_like(self, few, seed)
        tables = [as_frame(t).drop(columns=keys) for t in (frame, synthetic)]
        train = None if train is None else self._inputs.frame(train)
        return compare(*tables, train=train, nats=self.score(frame.head(20000)), seed=seed)

    def distribution(self) -> dist.TorchDistribution:
        """The joint density of number targets as a Pyro distribution over vectors.

        Raises:
            ValueError: If a target is a label or columns are given.
        """
        from pyroflows.density.distribution import TableDistribution

        return TableDistribution(self._ready())

    def save(self, path: Any) -> None:
        """Write a safetensors file with the schema in its metadata.

        It holds numbers and JSON, no code.
        """
        self._ready()
        if rank_and_world()[0] == 0:
            files.save(self, path)

    @classmethod
    def load(
        cls, path: Any, *, device: str = "cpu", flow: Callable[[int, int], Flow] | None = None
    ) -> DensityEstimator:
        """Read what :meth:`save` wrote; executes nothing from the file.

        Args:
            path: The file.
            device: Where the networks go.
            flow: The callable that the model was fitted with, if it was one.
        """
        return files.load(cls, path, device=device, flow=flow)


def _history(entries: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        entries, columns=["step", "epoch", "train", "valid", "lr", "seconds", "skipped"]
    )
