"""What scikit-learn expects of an estimator, without importing it."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from pyroflows.density.predict import label_names

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Conventions", "NotFittedError", "when_fitted", "with_flow", "with_labels"]


class NotFittedError(ValueError, AttributeError):
    """The estimator was used before ``fit``."""


class with_flow:  # noqa: N801 - a decorator
    """A method that an estimator has only with a flow: without one there is no such attribute."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method, self.__doc__ = method, method.__doc__

    def __get__(self, estimator: Any, kind: type | None = None) -> Any:
        if estimator is None:
            return self.method
        if estimator.flow is None:
            raise AttributeError(
                f"{self.method.__name__} needs a flow: DensityEstimator(flow='neural_spline')"
            )
        return self.method.__get__(estimator)


class when_fitted:  # noqa: N801 - a decorator
    """A method that an estimator has once it is fitted."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self.method, self.__doc__ = method, method.__doc__

    def __get__(self, estimator: Any, kind: type | None = None) -> Any:
        if estimator is None:
            return self.method
        if not hasattr(estimator, "engine_"):
            name = f"{type(estimator).__name__}.{self.method.__name__}"
            raise NotFittedError(f"{name} needs a model: call 'fit' with a table first")
        return self.method.__get__(estimator)


class with_labels(when_fitted):  # noqa: N801 - a decorator
    """A method that it has, besides, only if some column that it models is a label."""

    def __get__(self, estimator: Any, kind: type | None = None) -> Any:
        method = super().__get__(estimator, kind)
        if estimator is not None and not label_names(estimator.engine_):
            raise AttributeError(
                f"{self.method.__name__} needs a column of labels; "
                f"{estimator.schema_.names} are none that the model predicts"
            )
        return method


class Conventions:
    """Parameters by name, tags, output containers and seeds."""

    random_state: Any

    @classmethod
    def _names(cls) -> list[str]:
        return [n for n in inspect.signature(cls.__init__).parameters if n != "self"]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Constructor arguments."""
        return {n: getattr(self, n) for n in self._names()}

    def set_params(self, **params: Any) -> Self:
        """Set constructor arguments."""
        for name, value in params.items():
            if name not in self._names():
                raise ValueError(
                    f"Invalid parameter {name!r} for estimator {self}. "
                    f"Valid parameters are: {self._names()}."
                )
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        default = {
            n: p.default for n, p in inspect.signature(type(self).__init__).parameters.items()
        }
        changed = [
            f"{n}={v!r}"
            for n, v in self.get_params().items()
            if not (v is default[n] or v == default[n])
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import InputTags, Tags, TargetTags

        tags = Tags(
            estimator_type="density_estimator",
            target_tags=TargetTags(required=False),
            input_tags=InputTags(),
        )
        tags.input_tags.allow_nan = True
        tags.input_tags.string = True
        tags.input_tags.categorical = True
        return tags

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "engine_")

    def set_output(self, *, transform: str | None = None) -> Self:
        """Give tables back as those of ``"pandas"``, ``"polars"`` or ``"pyarrow"``, whatever came.

        With ``"default"``, samples and imputations come back as arrays; None changes nothing.
        """
        if transform not in (None, "pandas", "polars", "pyarrow", "default"):
            raise ValueError(
                "set_output: transform must be 'pandas', 'polars', 'pyarrow', 'default' or None; "
                f"got {transform!r}"
            )
        if transform is not None:
            self._output = transform
        return self

    def _wrapped(self, frame: pd.DataFrame) -> Any:
        return frame.to_numpy() if getattr(self, "_output", "pandas") == "default" else frame

    def _seed(self, random_state: Any = None) -> int:
        state = self.random_state if random_state is None else random_state
        if state is None:
            return int(np.random.SeedSequence().generate_state(1)[0])
        if hasattr(state, "randint"):
            return int(state.randint(2**31 - 1))
        if isinstance(state, np.random.Generator):
            return int(state.integers(2**31 - 1))
        if isinstance(state, numbers.Integral):
            return int(state)
        raise ValueError(
            f"random_state must be an integer, a RandomState, a Generator or None; got {state!r}"
        )

    def _generator(self, random_state: Any = None) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(random_state))
