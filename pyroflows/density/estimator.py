"""The density estimator of tables: scikit-learn's conventions, DataFrames on both sides."""

from __future__ import annotations

import dataclasses
import math
import numbers
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyroflows.density import files
from pyroflows.density.cellwise import score_columns
from pyroflows.density.conditionals import Numbers
from pyroflows.density.conventions import Conventions, NotFittedError, with_flow
from pyroflows.density.engine import Engine, Fit, Settings, TrainingTable
from pyroflows.density.flow_engine import FlowEngine
from pyroflows.density.mixed_engine import MixedEngine
from pyroflows.density.model import TableModel
from pyroflows.density.streaming import TableFile, shards_of
from pyroflows.flow import Flow
from pyroflows.tables import Schema, as_frame
from pyroflows.tables.conditions import as_events, read_conditions
from pyroflows.tables.inputs import check_half_known, fill_gaps, possible
from pyroflows.tables.schema import ignored
from pyroflows.training.budget import Budget
from pyroflows.training.parallel import rank_and_world

if TYPE_CHECKING:
    import pandas as pd
    import pyro.distributions as dist

__all__ = ["DensityEstimator", "NotFittedError"]


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
        if not isinstance(engine, MixedEngine):
            raise AttributeError(f"{type(engine).__name__} has no model_; see engine_")
        return engine.model

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

    def _frame(self, x: Any, *, partial: bool = False) -> pd.DataFrame:
        """A table with the columns of the fit."""
        import pandas as pd

        named = isinstance(x, pd.DataFrame) or isinstance(x, Mapping)
        if isinstance(x, Mapping) and not isinstance(x, pd.DataFrame):
            one = all(np.ndim(v) == 0 or isinstance(v, str) for v in x.values())
            rows = {k: [v] for k, v in x.items()} if one else x
            x = pd.DataFrame(rows, index=[0] if one else None)
        frame = as_frame(x, self.schema_.names)
        names = [c.name for c in self.schema_]
        # the rest of a table is not our concern
        if named and (self.target is not None or self.given is not None or ignored(self.schema)):
            keep = [c for c in names if c in frame.columns]
            frame = frame[keep] if partial or len(keep) == len(names) else frame
        if not named and frame.shape[1] != len(names):
            raise ValueError(
                f"X has {frame.shape[1]} features, but {type(self).__name__} is expecting "
                f"{len(names)} features as input"
            )
        strings = all(isinstance(c, str) for c in frame.columns)
        if named and not partial and strings and hasattr(self, "feature_names_in_"):
            have = list(frame.columns)
            if have != names:
                unknown, absent = (
                    [c for c in have if c not in names],
                    [c for c in names if c not in have],
                )
                lines = ["The feature names should match those that were passed during fit."]
                lines += (
                    ["Feature names unseen at fit time:", *(f"- {c}" for c in sorted(unknown))]
                    if unknown
                    else []
                )
                lines += (
                    [
                        "Feature names seen at fit time, yet now missing:",
                        *(f"- {c}" for c in sorted(absent)),
                    ]
                    if absent
                    else []
                )
                if not unknown and not absent:
                    lines.append("Feature names must be in the same order as they were in fit.")
                raise ValueError("\n".join(lines) + "\n")
        elif named and not partial and strings and not hasattr(self, "feature_names_in_"):
            warnings.warn(
                f"X has feature names, but {type(self).__name__} was fitted without feature names",
                stacklevel=3,
            )
            frame = frame.set_axis(names, axis=1) if frame.shape[1] == len(names) else frame
        elif not named and hasattr(self, "feature_names_in_"):
            warnings.warn(
                f"X does not have valid feature names, but {type(self).__name__} "
                "was fitted with feature names",
                stacklevel=3,
            )
        return frame

    def _encode(self, x: Any, *, partial: bool = False) -> Tensor:
        return torch.from_numpy(
            self.schema_.encode(self._frame(x, partial=partial), partial=partial)
        )

    # ------------------------------------------------------------------ fitting

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> DensityEstimator:
        """Fit the density of a table.

        Args:
            X: DataFrame, mapping of columns, or array of shape (rows, columns).
            y: Ignored.
            sample_weight: Nonnegative weight of each row: how often it counts as repeated, where
                all weights are whole numbers; else relative to their mean.

        Returns:
            The estimator.

        Raises:
            ValueError: For an empty table, infinite cells, or names that are not columns, naming
                them.
        """
        self._check_params()
        budget = Budget(self.max_time)
        frame = as_frame(X)
        if frame.shape[1] == 0:
            raise ValueError(
                f"0 feature(s) (shape={frame.shape}) while a minimum of 1 is required."
            )
        if len(frame) == 0:
            raise ValueError(
                f"0 sample(s) (shape={frame.shape}) while a minimum of 1 is required."
            )
        if self.missing not in ("ignore", "model"):
            raise ValueError(f"missing must be 'ignore' or 'model'; got {self.missing!r}")
        weight = _weights(sample_weight, len(frame))
        frame, weight = frame[weight > 0], weight[weight > 0]
        self._forget()
        if hasattr(X, "columns") and all(isinstance(c, str) for c in frame.columns):
            self.feature_names_in_ = np.array(frame.columns, dtype=object)
        used, given = self._read_schema(frame)
        self.n_features_in_ = len(used)
        if hasattr(self, "feature_names_in_"):
            self.feature_names_in_ = np.array(used, dtype=object)
        return self._fit_table(
            TrainingTable(
                self.schema_,
                torch.from_numpy(self.schema_.encode(frame[used])),
                torch.from_numpy(weight),
                [used.index(g) for g in given],
            ),
            budget,
        )

    def fit_file(
        self,
        path: Any,
        *,
        in_memory: int = 1_000_000,
        sample_rows: int = 200_000,
        **options: Any,
    ) -> DensityEstimator:
        """Fit text or Parquet, streamed if it has more rows than ``in_memory``.

        The schema, scales and held-out rows then come from a random sample; training rows stream
        in shuffled chunks, row groups in random order.

        Args:
            path: The file or folder, or a :class:`~pyroflows.density.streaming.TableFile`.
            in_memory: Rows up to which the table is simply read.
            sample_rows: Size of the sample.
            options: For text, those of :func:`pandas.read_csv`: ``sep``, ``na_values``, ...
        """
        file = path if isinstance(path, TableFile) else TableFile(path, **options)
        total = file.count()
        if total <= in_memory:
            return self.fit(file.read())
        budget = Budget(self.max_time)
        rng = np.random.default_rng(self._seed())
        frame = file.sample(sample_rows, rng)
        self._forget()
        used, given = self._read_schema(frame)
        file.columns, frame = used, frame[used]
        self.n_features_in_, self.feature_names_in_ = len(used), np.array(used, dtype=object)
        values = torch.from_numpy(self.schema_.encode(frame))
        shards = shards_of(
            file, self.schema_, np.random.default_rng(self._seed()), *rank_and_world()
        )
        weight = torch.ones(len(values), dtype=torch.float64)
        places = [used.index(g) for g in given]
        return self._fit_table(
            TrainingTable(self.schema_, values, weight, places, shards, total), budget
        )

    def _read_schema(self, frame: pd.DataFrame) -> tuple[list[Any], list[Any]]:
        """Decide what the columns are; returns those of the model, and the given ones."""
        unknown = [c for c in self.schema or {} if c not in frame.columns]
        if unknown:
            raise ValueError(f"schema names no columns of the table: {unknown}")
        kept = [c for c in frame.columns if c not in ignored(self.schema)]
        targets, given = self._roles(kept)
        used = [c for c in kept if c in {*targets, *given}]
        changes = {c: v for c, v in (self.schema or {}).items() if c in used}
        self.schema_ = Schema.from_frame(frame[used], changes, self.constraints or (), given=given)
        half = self.schema_.half_known(frame[used])
        if half:
            rows = {c: int(where.sum()) for c, where in half.items()}
            warnings.warn(
                f"cells that a constraint ties to a missing one tell the fit nothing: {rows}",
                stacklevel=3,
            )
        return used, given

    def _check_params(self) -> None:
        """Constructor arguments that have a range."""
        _count("draws", self.draws)
        _count("dequantization_draws", self.dequantization_draws)
        for name in ("max_steps", "members", "hidden_dim", "batch_size"):
            if getattr(self, name) is not None:
                _count(name, getattr(self, name))
        for name in ("max_time", "learning_rate"):
            value = getattr(self, name)
            if name == "max_time" and value is None:
                continue
            if not isinstance(value, numbers.Real) or not float(value) > 0:
                raise ValueError(f"{name} must be a positive number; got {value!r}")

    def _forget(self) -> None:
        for name in ("feature_names_in_", "engine_", "schema_", "history_"):
            if hasattr(self, name):
                delattr(self, name)

    def _roles(self, columns: list[Any]) -> tuple[list[Any], list[Any]]:
        def listed(x: Any) -> list[Any] | None:
            return (
                None
                if x is None
                else [x]
                if isinstance(x, str) or not isinstance(x, Sequence)
                else list(x)
            )

        target, given = listed(self.target), listed(self.given)
        if target is None:
            target = [c for c in columns if c not in (given or [])]
        elif given is None:
            given = [c for c in columns if c not in target]
        given = given or []
        unknown = [c for c in [*target, *given] if c not in columns]
        both = [c for c in target if c in given]
        if unknown or both or not target:
            raise ValueError(
                "target and given must be disjoint columns of the table, at least one target; "
                f"unknown: {unknown}, in both: {both}"
            )
        return target, given

    def _engine(self) -> Engine:
        """A new engine with the settings of the constructor."""
        if self.flow is None:
            return MixedEngine(self._settings())
        return FlowEngine(self._settings(), self.flow, self.dequantization_draws)

    def _settings(self) -> Settings:
        names = [field.name for field in dataclasses.fields(Settings)]
        return Settings(**{name: getattr(self, name) for name in names})

    def _fit_table(self, table: TrainingTable, budget: Budget) -> DensityEstimator:
        engine = self._engine()
        with torch.inference_mode(False), torch.enable_grad():
            values, weight = table.values.clone(), table.weight.clone()  # of this mode
            table = dataclasses.replace(table, values=values, weight=weight)
            fit = engine.fit(table, budget=budget, generator=self._generator())
        self.engine_, self.history_ = engine, _history(fit.history)
        self._calibrate(table, fit, 200 if budget.over() else 2000)
        budget.warn(stacklevel=3)
        return self

    def _calibrate(self, table: TrainingTable, fit: Fit, rows: int = 2000) -> None:
        """Keep what thresholds and summaries need of the held-out rows."""
        few = (fit.held if len(fit.held) else torch.arange(len(table)))[:rows]
        values, weight = table.values[few], table.weight[few]
        nats = self.engine_.column_log_prob(values)
        score = nats.sum(0)
        if bool((values.isnan().any()) | score.isnan().any()):
            score = self.engine_.log_prob(values, draws=16)[0]
        score, order = score.sort()
        below = weight[order].cumsum(0)
        place = torch.linspace(0, 1, 201, dtype=below.dtype) * (below[-1] - weight[order[-1]])
        at = np.interp(place, below - weight[order], score)
        self._score_quantiles = at
        there = ~values[:, self.engine_.order[self.engine_.num_given :]].T.isnan()
        known = (there * weight).sum(1).clamp_min(1e-9)
        self._column_nats = ((nats * weight).sum(1) / known).tolist()

    @torch.inference_mode(False)
    @torch.enable_grad()
    def partial_fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> DensityEstimator:
        """Go on training on more rows of the same columns.

        The schema, scales and bins stay those of the first call.
        """
        if not hasattr(self, "engine_"):
            return self.fit(X, y, sample_weight)
        import pandas as pd

        values = self._encode(X)
        weight = torch.from_numpy(_weights(sample_weight, len(values)))
        given = self.engine_.order[: self.engine_.num_given]
        table, budget = TrainingTable(self.schema_, values, weight, given), Budget(self.max_time)
        self.engine_.settings = self._settings()
        fit = self.engine_.partial_fit(table, budget=budget, generator=self._generator())
        budget.warn(stacklevel=2)
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
        model = self._ready()
        frame = self._frame(X)
        out, error = model.log_prob(
            torch.from_numpy(self.schema_.encode(frame)),
            pattern=self.missing == "model",
            draws=self.draws,
        )
        nats = self._constrained(out.numpy(), frame)
        return (nats, error.numpy()) if return_error else nats

    def score_columns(self, X: Any) -> pd.DataFrame:
        """Log-density of each cell given the row's earlier ones in the model's order.

        One column a target, in the table's order; a row's cells sum to its :meth:`score_samples`.
        Impossible values have ``-inf``, labels that fitting did not see its small share. A missing
        cell has NaN (skipped in the sum), and cells after it their log-density given the observed
        ones; with ``missing="model"`` it has the log-probability of being missing.
        """
        model, frame = self.model_, self._frame(X)
        return score_columns(model, frame, pattern=self.missing == "model", draws=self.draws)

    def _constrained(self, nats: np.ndarray, frame: pd.DataFrame) -> np.ndarray:
        """-inf where a row breaks a constraint."""
        check_half_known(self.schema_, frame)
        return np.where(self.schema_.broken(frame), -np.inf, nats)

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
        X, conditions = read_conditions(X)
        model = self._ready().within(conditions)
        frame = self._frame(X, partial=True)
        values = torch.from_numpy(self.schema_.encode(frame, partial=True))
        draws = self.draws if draws is None else _count("draws", draws)
        out, error = model.log_prob(values, draws=draws)
        nats = self._constrained(out.numpy(), frame)
        return (nats, error.numpy()) if return_error else nats

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
        engine = self._ready()
        columns = [self.schema_.columns[j] for j in engine.order[engine.num_given :]]
        events = as_events(condition, columns)
        nats, error = self.log_marginal(events, draws=draws, return_error=True)
        out: Any = np.exp(nats), np.exp(nats) * error
        if all(np.ndim(v) == 0 for v in read_conditions(events)[0].values()):
            out = float(out[0][0]), float(out[1][0])
        return out if return_error else out[0]

    def predict_outliers(self, X: Any, contamination: float = 0.01) -> np.ndarray:
        """True for rows less likely than this share of the held-out rows of the fit."""
        if not 0 < contamination < 1:
            raise ValueError(f"contamination must lie in (0, 1); got {contamination}")
        self._ready()
        threshold = np.interp(contamination, np.linspace(0, 1, 201), self._score_quantiles)
        return self.score_samples(X) < threshold

    def pit(self, X: Any, random_state: Any = 0) -> pd.DataFrame:
        """Probability integral transforms F(x_t | earlier columns): uniform if the model is right.

        Point masses and lattice cells are spread uniformly over their jump.
        """
        import pandas as pd

        engine, values = self._ready(), self._encode(X)
        generator = self._generator(random_state)
        out = {}
        for j, law in engine.conditionals(values):
            if isinstance(law, Numbers):
                u = torch.rand(len(values), generator=generator, dtype=values.dtype)
                out[self.schema_.columns[j].name] = law.pit(values[:, j], u).numpy()
        return pd.DataFrame(out)

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
        model = self._ready()
        generator = self._generator(random_state)
        leave = self.missing == "model" if missing is None else missing
        if n < 0 or int(n) != n:
            raise ValueError(f"n must be a nonnegative integer; got {n}")
        n = int(n)
        if given is None:
            if model.num_given:
                names = [self.schema_.columns[j].name for j in model.order[: model.num_given]]
                raise ValueError(
                    f"this model is conditional: pass given= with the columns {names}"
                )
            blank = torch.full((n, len(self.schema_)), torch.nan, dtype=torch.float64)
            return self._wrapped(
                self.schema_.decode(self._fill(blank, 1, generator, leave)[:, 0].numpy())
            )
        model, values, good, frame = self._given(given)
        if not len(values) or not n:
            return self._wrapped(self.schema_.decode(values[:0].numpy()))
        filled = values[:, None].repeat(1, n, 1)
        filled[good] = model.complete(values[good], n, generator=generator, leave=leave)
        drawn = self.schema_.decode(filled.flatten(0, 1).numpy())
        same = [c for c in frame.columns if frame[c].dtype == drawn[c].dtype]
        return self._wrapped(fill_gaps(frame[same].iloc[np.arange(len(frame)).repeat(n)], drawn))

    def _given(self, given: Any) -> tuple[Engine, Tensor, Tensor, pd.DataFrame]:
        """Encoded evidence, which rows of it can be (the others are blank), and its cells.

        Before them, the engine within what conditions ask for. Targets of a conditional model are
        blanked, its given columns must be there.
        """
        given, conditions = read_conditions(given)
        model = self._ready().within(conditions)
        frame = self._frame(given, partial=True)
        names = [self.schema_.columns[j].name for j in model.order]
        if model.num_given:
            names, scored = names[: model.num_given], []
            absent = [c for c in names if c not in frame.columns]
            if absent:
                raise ValueError(
                    f"this model is conditional: the given columns {absent} are missing"
                )
            frame = frame[[c for c in frame.columns if c in names]]
        else:
            scored = names
        check_half_known(self.schema_, frame)
        values = self.schema_.encode(frame, partial=True)
        good = possible(self.schema_, frame, values, scored) if len(frame) else np.ones(0, bool)
        values[~good] = np.nan
        return model, torch.from_numpy(values), torch.from_numpy(good), frame

    def _fill(
        self, values: Tensor, n: int, generator: torch.Generator, leave: bool = False
    ) -> Tensor:
        """Several completions of each row, shape (N, n, D)."""
        return self._ready().complete(values, n, generator=generator, leave=leave)

    def impute(self, X: Any, *, method: str = "draw", random_state: Any = None) -> Any:
        """Fill in missing cells from their distribution given the row's observed ones.

        Args:
            X: Table with missing cells; absent columns of a joint model count as missing.
            method: ``"draw"`` one joint draw per row, or ``"mean"`` the mean of a number and the
                most probable label, each by itself.
            random_state: Seed; default the estimator's.
        """
        if method not in ("draw", "mean"):
            raise ValueError(f"method must be 'draw' or 'mean'; got {method!r}")
        self._ready()
        frame = self._frame(X, partial=True)
        check_half_known(self.schema_, frame)
        values = torch.from_numpy(self.schema_.encode(frame, partial=True))
        todo = values.isnan().any(1).nonzero()[:, 0]
        if len(todo):
            generator = self._generator(random_state)
            if method == "draw":
                values[todo] = self._fill(values[todo], 1, generator)[:, 0]
            else:
                values[todo] = self._ready().averages(
                    values[todo], max(self.draws, 256), generator=generator
                )
        filled = self.schema_.decode(values.numpy(), index=frame.index)
        return self._wrapped(fill_gaps(frame, filled))

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
        import pandas as pd

        draws = _count("draws", draws)
        levels = np.atleast_1d(np.asarray(q, float))
        if ((levels < 0) | (levels > 1)).any():
            raise ValueError(f"q must lie in [0, 1]; got {q}")
        engine, values, good, _ = self._given(given)
        values = values[good]
        out: dict[Any, np.ndarray] = {}
        filled = None
        exact = self._alone(values)
        for j in self._open(values):
            column = self.schema_.columns[j]
            law = engine.conditional(values, j) if j == exact and not column.relation else None
            if isinstance(law, Numbers):
                p = torch.as_tensor(levels).expand(len(values), -1)
                found = list(law.quantile(p).numpy().T)
            else:
                if filled is None:
                    generator = self._generator(random_state)
                    drawn = engine.complete(values, draws, generator=generator)
                    filled = self.schema_.natural(drawn.numpy())
                x = filled[:, :, j]
                found = list(
                    np.quantile(
                        x, levels, axis=1, method="inverted_cdf" if column.step else "linear"
                    )
                )
            for level, x in zip(levels, found, strict=True):
                name = column.name if np.ndim(q) == 0 else (column.name, float(level))
                out[name] = _times(column, _spread(x, good))
        frame = pd.DataFrame(out)
        if np.ndim(q):
            frame.columns = pd.MultiIndex.from_tuples(frame.columns, names=["column", "q"])
        return frame

    def interval(self, given: Any, coverage: float = 0.9, **options: Any) -> pd.DataFrame:
        """Central prediction intervals, columns (target, "lower") and (target, "upper").

        Options as for :meth:`quantile`.
        """
        if not 0 < coverage < 1:
            raise ValueError(f"coverage must lie in (0, 1); got {coverage}")
        out = self.quantile(given, [(1 - coverage) / 2, (1 + coverage) / 2], **options)
        names = [
            (name, side)
            for name in out.columns.get_level_values(0).unique()
            for side in ("lower", "upper")
        ]
        return out.set_axis(type(out.columns).from_tuples(names, names=["column", "end"]), axis=1)

    def mean(self, given: Any, *, draws: int = 1024, random_state: Any = None) -> pd.DataFrame:
        """Means of the number targets given the rest of each row.

        Of the exact conditional for the first missing target if no observed one comes after it in
        the model's order, as in a conditional model; averages of ``draws`` samples otherwise.
        """
        import pandas as pd

        draws = _count("draws", draws)
        engine, values, good, _ = self._given(given)
        values = values[good]
        places = self._open(values)
        generator = self._generator(random_state)
        filled = engine.averages(values, draws, generator=generator).numpy()
        if any(len(c.relation.exprs) > 1 for c in self.schema_ if c.relation is not None):
            drawn = engine.complete(values, draws, generator=generator).numpy()
            # of a largest, which is not the largest of means
            filled = self.schema_.natural(drawn).mean(1)
        else:
            filled = self.schema_.natural(filled)
        out = {}
        for j in places:
            column = self.schema_.columns[j]
            out[column.name] = _times(column, _spread(filled[:, j], good))
        return pd.DataFrame(out)

    def _alone(self, values: Tensor) -> int | None:
        """The target that every row misses first, with nothing observed after it, if any."""
        targets = self.engine_.order[self.engine_.num_given :]
        gone = values[:, targets].isnan()
        first = gone.long().argmax(1)
        if len(gone) and bool((first == first[0]).all()) and bool(gone[:, first[0] :].all()):
            return targets[int(first[0])]
        return None

    def _open(self, values: Tensor) -> list[int]:
        """The number targets that are missing in every row, in the model's order."""
        gone, columns = values.isnan().all(0), self.schema_.columns
        targets = self.engine_.order[self.engine_.num_given :]
        places = [j for j in targets if bool(gone[j]) and not columns[j].is_label]
        if not places:
            raise ValueError(
                "no number column is left to predict: leave the wanted columns out of given"
            )
        return places

    # ------------------------------------------------------------------ the flow

    @property
    def flow_(self) -> Flow:
        """The fitted flow of the numbers, in data units; its context is :meth:`flow_context`."""
        return self._flow_engine("flow_").flow

    def flow_context(self, X: Any) -> Tensor | None:
        """What the flow is told of rows: given columns, labels, and which atoms; float64."""
        engine = self._flow_engine("flow_context")
        return engine.context(self._encode(X))

    @with_flow
    def transform(self, X: Any) -> pd.DataFrame:
        """The noise from which the flow makes the rows' numbers: standard normal, if it is right.

        A value on a lattice counts as the middle of its recording cell, one at a point mass as
        the median of its column.
        """
        import pandas as pd

        engine, frame = self._flow_engine("transform"), self._frame(X)
        noise = engine.noise(torch.from_numpy(self.schema_.encode(frame))).numpy()
        names = [self.schema_.columns[j].name for j in engine.numbers.columns]
        return pd.DataFrame(noise, index=frame.index, columns=names)

    @with_flow
    def inverse_transform(self, noise: Any, given: Any = None) -> Any:
        """The rows that noise makes; undoes :meth:`transform`.

        To rounding, and exactly on a lattice.

        Args:
            noise: Table or array of one column a number.
            given: Rows with the given columns and labels, and with numbers where they are at a
                point mass, which they keep; None where the flow has no context.
        """
        engine, noise = self._flow_engine("inverse_transform"), torch.as_tensor(np.array(noise))
        values, index = np.full((len(noise), len(self.schema_)), np.nan), None
        if given is not None:
            frame = self._frame(given, partial=True)
            values, index = self.schema_.encode(frame, partial=True), frame.index
        rows = engine.from_noise(noise, torch.from_numpy(values)).numpy()
        return self._wrapped(self.schema_.decode(rows, index=index))

    def _flow_engine(self, what: str) -> FlowEngine:
        if self.flow is None:
            raise AttributeError(f"{what} needs a flow: DensityEstimator(flow='neural_spline')")
        engine = self._ready()
        assert isinstance(engine, FlowEngine)
        return engine

    # ------------------------------------------------------------------ reports and files

    def summary(self) -> pd.DataFrame:
        """One row per column.

        Its role, how it is modelled, its share of missing cells, its held-out nats given
        earlier columns.
        """
        model = self._ready()
        frame = self.schema_.summary()
        names = [self.schema_.columns[j].name for j in model.order]
        role = {name: "given" if i < model.num_given else "target" for i, name in enumerate(names)}
        frame.insert(0, "role", [role[n] for n in frame.index])
        nats = dict(zip(names[model.num_given :], self._column_nats, strict=True))
        frame["place"] = [names.index(n) for n in frame.index]
        frame["nats"] = [nats.get(n, math.nan) for n in frame.index]
        return frame

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


def _times(column: Any, x: np.ndarray) -> Any:
    """Numbers of a datetime column as datetimes, others as they are."""
    return column.cells(x).to_numpy() if column.kind == "datetime" or column.origin else x


def _spread(x: np.ndarray, good: Tensor) -> np.ndarray:
    """Results of the good rows among all, NaN for the others."""
    out = np.full(len(good), np.nan)
    out[good.numpy()] = x
    return out


def _count(name: str, value: Any) -> int:
    """A positive integer."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer; got {value!r}")
    return int(value)


def _weights(weight: Any, n: int) -> np.ndarray:
    """Whole weights count repetitions of a row; others are relative, and have mean one."""
    if weight is None:
        return np.ones(n)
    if isinstance(weight, numbers.Real):
        weight = np.full(n, float(float(weight) > 0) if weight == weight else weight)
    out = np.array(weight, dtype=float)
    if out.ndim != 1 or len(out) != n:
        raise ValueError(
            f"Sample weights must be 1D array or scalar of length {n}; got shape {out.shape}"
        )
    if not np.isfinite(out).all() or (out < 0).any() or out.sum() == 0:
        raise ValueError("sample_weight must be finite, nonnegative and not all zero")
    whole = bool((out == np.round(out)).all()) and out.sum() <= 64 * n
    return out if whole else out / out[out > 0].mean()


def _history(entries: list[dict[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        entries, columns=["step", "epoch", "train", "valid", "lr", "seconds", "skipped"]
    )
